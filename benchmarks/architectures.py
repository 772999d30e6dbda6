"""An MLP with a window, an RNN, an LSTM, a GRU and a Transformer: one task, one budget, one evaluator, five seeds.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py        (about 8 minutes on one core)

*Race*: models of three sizes, equal in parameters, on playhouse, whose floor is known; all see the same batches. The
learning rate is chosen for each kind and size on a tuning block cut from the training text, and is constant after the
warm-up, so that each point of a curve is where a shorter run would have ended. The validation text is scored once.
For the largest size it is also measured how surprise at recalled names depends on their distance, how far the gradient
of the last loss reaches back, and what a longer context than in training is worth. *Carry*: a letter to be kept over a
known distance, among letters that mean nothing. A program that was interrupted goes on where it stopped; `--dry` runs
all of it in small.
"""

import json
import math
import os
import sys
import time
from bisect import bisect
from dataclasses import asdict, replace

import record
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from slm_lib import data, playhouse, training
from slm_lib.architectures import KINDS, UNASKED, asked, build

DRY = "--dry" in sys.argv
SEEDS, TUNING_SEED = ([0, 1] if DRY else [0, 1, 2, 3, 4]), 100
SIZES = {"8k": 8_000, "22k": 22_000, "62k": 62_000}
LOOKED_INTO = "62k"
BLOCK_SIZE, WINDOW = 64, 8
RATES = [3e-3, 1e-2, 3e-2]
TRAINING = training.TrainingConfig(
    batch_size=16, max_iters=20 if DRY else 300, warmup_iters=5 if DRY else 30, eval_interval=10 if DRY else 30,
    schedule="constant",
)  # fmt: skip
TUNING_STEPS = 10 if DRY else 100
GLANCE = 1_000 if DRY else 5_000  # characters of the tuning block, which a look along the way reads
RECALL_CHARACTERS = 2_000 if DRY else 40_000
BINS = [10, 16, 24, 32, 40, 48, 58]  # characters back
CONTEXTS = [16, 32, 64, 128, 256, 512]
CARRY = {"block_size": 48, "n_parameters": 16_000}
CARRY_TRAINING = replace(TRAINING, batch_size=32, max_iters=20 if DRY else 500, schedule="linear")
DISTANCES = [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]

TOKENIZER = data.CharTokenizer(playhouse.SYMBOLS)
CARRIER = data.CharTokenizer("?ABCDEFGHabcdefgh")


# --- the race ---------------------------------------------------------------------------------------------------------


def model_of(kind: str, size: str, seed: int):
    """A fresh model of a kind, with about as many parameters as the others of its size."""
    torch.manual_seed(seed)
    return build(kind, TOKENIZER.vocab_size, BLOCK_SIZE, SIZES[size], WINDOW)


def race(kind: str, size: str, ids, held_out, rate: float, seed: int, steps: int):
    """Train one model; return it and a row whose curve holds (step, processor seconds of training, held-out loss)."""
    config = replace(TRAINING, learning_rate=rate, seed=seed, max_iters=steps)
    trainer, curve, looked = training.Trainer(model_of(kind, size, seed), ids, config), [], 0.0
    began = time.process_time()

    def look(trainer):
        nonlocal looked
        now = time.process_time()
        loss = round(training.evaluate(trainer.model, held_out), 4)
        curve.append([trainer.step, round(now - began - looked, 2), loss])
        looked += time.process_time() - now

    try:
        trainer.run(look, progress=False)
    except FloatingPointError:
        curve.append([trainer.step, 0.0, None])
    model = trainer.model
    row = {"study": "race", "variant": kind, "size": size, "seed": seed, "learning_rate": rate, "steps": steps,
           "characters": steps * config.batch_size * BLOCK_SIZE,
           "parameters": sum(p.numel() for p in model.parameters()),
           "loss": curve[-1][2], "seconds": curve[-1][1], "curve": curve}  # fmt: skip
    return model, row


def recalls() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A fresh text: its ids, the exact surprise, and for each bin of distances where a recall begins.

    A recall counts if the window of BLOCK_SIZE before it holds all of what it repeats. Only its first character is
    asked for: from the second on, whoever can spell needs no memory.
    """
    scenes = playhouse.scenes(RECALL_CHARACTERS, seed=700)
    text, start, places = playhouse.text(scenes), 0, [[] for _ in BINS[1:]]
    for scene in scenes:
        for recall in scene.recalls:
            place, back = start + recall.start, recall.distance + recall.stop - recall.start
            if place >= BLOCK_SIZE >= back and BINS[0] <= recall.distance < BINS[-1]:
                places[bisect(BINS, recall.distance) - 1].append(place)
        start += len(scene.text)
    exact = torch.from_numpy(playhouse.surprisal(text))
    return TOKENIZER.encode(text), exact, [torch.tensor(found, dtype=torch.long) for found in places]


@torch.no_grad()
def excess_at(model, ids, exact, places) -> float | None:
    """The mean surprise at places above the exact one, each seen with the whole window of BLOCK_SIZE before it."""
    if not len(places):
        return None
    windows = ids[places[:, None] + torch.arange(-BLOCK_SIZE, 1)]  # (N, T+1)
    losses = F.cross_entropy(model.eval()(windows[:, :-1])[:, -1], windows[:, -1], reduction="none").double()
    return round((losses - exact[places]).mean().item(), 4)


def reach(model, ids, rows: int = 64) -> list[float]:
    """The length of the gradient of the last loss for the vector k steps back, k = 0, 1, ...; the mean over windows."""
    x, y = data.draw_batch(ids, rows, BLOCK_SIZE, torch.Generator().manual_seed(0))
    kept = []

    def caught(module, inputs, output):
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = model.embedding.register_forward_hook(caught)
    F.cross_entropy(model(x)[:, -1], y[:, -1], reduction="sum").backward()
    handle.remove()
    return [float(f"{size:.4g}") for size in kept[0].grad.norm(dim=-1).mean(0).flip(0).tolist()]


def longer(model, ids) -> dict[str, float | None]:
    """The loss when read in windows of other lengths than in training; None where a model cannot."""
    found = {}
    for context in CONTEXTS:
        try:
            found[str(context)] = round(training.evaluate(model, ids, block_size=context), 4)
        except ValueError:
            found[str(context)] = None
    return found


def chosen(rows: list[dict], study: str, **where) -> float:
    """The learning rate that did best on the tuning block."""
    tried = [row for row in rows if row["study"] == study and row["scored"] == "tuning block"
             and all(row[name] == value for name, value in where.items())]  # fmt: skip
    return min(tried, key=lambda row: row["loss"] or math.inf)["learning_rate"]


# --- a letter to carry ------------------------------------------------------------------------------------------------


class CarryTrainer(training.Trainer):
    """The one loop on texts such as "badCfgeahbd?": the answer is the capital, and nothing else is asked for."""

    def draw(self):
        return texts_to_carry(self.config.batch_size, self.generator)


def texts_to_carry(n: int, generator: torch.Generator, distance: int | None = None):
    """Texts (n, T) that hold one capital and end in "?", and as targets that capital at the end; -100 elsewhere.

    The answer would stand `distance` places behind the capital, 2 to T of them by chance.
    """
    T = CARRY["block_size"]
    x, capitals = 9 + torch.randint(8, (n, T), generator=generator), 1 + torch.randint(8, (n,), generator=generator)
    back = torch.randint(2, T + 1, (n,), generator=generator) if distance is None else torch.full((n,), distance)
    x[torch.arange(n), T - back], x[:, -1] = capitals, 0
    y = torch.full_like(x, UNASKED)
    y[:, -1] = capitals
    return x, y


def by_distance(model) -> list[float]:
    """Nats at the answer for each of DISTANCES, on texts that no one has seen."""
    fresh = (texts_to_carry(400, torch.Generator().manual_seed(900 + distance), distance) for distance in DISTANCES)
    return [round(asked(model, *texts).mean().item(), 4) for texts in fresh]


def carry(kind: str, rate: float, seed: int, steps: int) -> dict:
    """Train one model to carry a letter; a row with its loss at each distance."""
    torch.manual_seed(seed)
    model = build(kind, CARRIER.vocab_size, CARRY["block_size"], CARRY["n_parameters"], WINDOW)
    config, began = replace(CARRY_TRAINING, learning_rate=rate, seed=seed, max_iters=steps), time.process_time()
    alphabet = torch.arange(CARRIER.vocab_size).repeat(4)
    try:
        CarryTrainer(model, alphabet, config).run(progress=False)
        found = by_distance(model)
    except FloatingPointError:
        found = [math.log(8)] * len(DISTANCES)
    return {"study": "carry", "variant": kind, "seed": seed, "learning_rate": rate, "steps": steps,
            "parameters": sum(p.numel() for p in model.parameters()), "loss": round(sum(found) / len(found), 4),
            "seconds": round(time.process_time() - began, 1), "by_distance": found}  # fmt: skip


# --- all of it --------------------------------------------------------------------------------------------------------


def finished(config: dict) -> list[dict]:
    """The rows that an interrupted run of the same program with the same settings has kept."""
    path = record.ROOT / "results" / "architectures" / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = found.get("config") == json.loads(json.dumps(config)) and found.get("commit") == record.COMMIT
    return found["rows"] if same else []


def plan(rows: list[dict], texts: dict):
    """Every row that is to be measured, as (what tells it from the others, how to get it); the choices come first."""
    for kind in KINDS:
        for size in SIZES:
            for rate in RATES:
                key = {"study": "race", "scored": "tuning block", "variant": kind, "size": size, "learning_rate": rate}
                yield key, lambda kind=kind, size=size, rate=rate: race(
                    kind, size, texts["fit"], texts["block"], rate, TUNING_SEED, TUNING_STEPS)[1]  # fmt: skip
        for rate in RATES:
            key = {"study": "carry", "scored": "tuning block", "variant": kind, "learning_rate": rate}
            yield key, lambda kind=kind, rate=rate: carry(kind, rate, TUNING_SEED, 2 * TUNING_STEPS)
    for seed in SEEDS:
        for kind in KINDS:
            for size in SIZES:
                key = {"study": "race", "scored": "validation text", "variant": kind, "size": size, "seed": seed}
                yield key, lambda kind=kind, size=size, seed=seed: scored(rows, texts, kind, size, seed)
            key = {"study": "carry", "scored": "fresh lines", "variant": kind, "seed": seed}
            yield key, lambda kind=kind, seed=seed: carry(
                kind, chosen(rows, "carry", variant=kind), seed, CARRY_TRAINING.max_iters)  # fmt: skip



def scored(rows: list[dict], texts: dict, kind: str, size: str, seed: int) -> dict:
    """A row of the race on the validation text; for the largest size with what the model remembers."""
    rate = chosen(rows, "race", variant=kind, size=size)
    model, row = race(kind, size, texts["fit"], texts["block"], rate, seed, TRAINING.max_iters)
    row["loss"] = round(training.evaluate(model, texts["val"]), 4) if row["loss"] is not None else None
    if size == LOOKED_INTO:
        ids, exact, places = texts["recalls"]
        row["recall"] = [excess_at(model, ids, exact, found) for found in places]
        row["reach"], row["longer"] = reach(model, texts["block"]), longer(model, texts["val"][:20_000])
    return row


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = data.load_corpus("playhouse")
    train_ids, val_ids = (TOKENIZER.encode(text) for text in data.split(corpus))
    texts = {"fit": train_ids[:-GLANCE], "block": train_ids[-GLANCE:], "val": val_ids[:2000] if DRY else val_ids}
    texts["recalls"] = recalls()
    config = {"corpus": corpus.name, "floor": corpus.floor, "sizes": SIZES, "window": WINDOW,
              "looked_into": LOOKED_INTO, "block_size": BLOCK_SIZE, "training": asdict(TRAINING),
              "tuning_steps": TUNING_STEPS, "rates": RATES, "seeds": SEEDS,
              "bins": BINS, "recalled": [len(found) for found in texts["recalls"][2]],
              "contexts": CONTEXTS, "carry": CARRY, "carry_training": asdict(CARRY_TRAINING),
              "distances": DISTANCES}  # fmt: skip
    rows = finished(config)
    there = {json.dumps(row["key"], sort_keys=True) for row in rows}
    name = "architectures" if not DRY else "architectures-dry"
    for key, measure in tqdm(list(plan(rows, texts))):
        if json.dumps(key, sort_keys=True) not in there:
            rows.append({**measure(), **key, "key": key})
            record.save(name, config, rows)


if __name__ == "__main__":
    main()
