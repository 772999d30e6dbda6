"""A table on which searches can be replayed, and the runs that tell a better setting from luck.

    OMP_NUM_THREADS=1 python benchmarks/search_table.py        (about 20 minutes on one core; stopped, it goes on)

Studies on Shakespeare, every run scored on a block cut from the end of the training text:

- "grid": learning rate x layers x width x batch size, two seeds each. Every run has the same time, as
  `cost` estimates it for a processor of a fixed speed, so that a small model makes more steps; the loss is kept at each
  rung of the way.
- "wider": a smaller grid beyond the edge of the first, where its best settings lie, two seeds each.
- "noise": the baseline of the next study over eight seeds.
- "alone": each hyperparameter turned by itself, three seeds, the rest (the number of steps too) as in the baseline.
- "fresh": the six settings of both grids with the lowest means, again, on six seeds that the grids did not see.
- "chosen": the one of these with the lowest mean, on eight further seeds; it alone is scored on the validation text.
"""

import json
import os
import statistics
import time
from dataclasses import asdict

import record
import torch

from slm_lib import data
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.training import Trainer, TrainingConfig, evaluate
from slm_lib.tuning import Speed, in_rungs, steps_within

SPEED = Speed(per_layer=1e-3, per_operation=1.5e-11)  # about that of the processor on which the table was made
SECONDS = 2.0  # of one full training in the grid, evaluation aside
SPACE = {
    "learning_rate": [2.2e-3, 4.6e-3, 1e-2, 2.2e-2, 4.6e-2],
    "n_layer": [1, 2, 4],
    "n_embd": [16, 48, 96],
    "batch_size": [8, 16, 32],
}
BEYOND = {"learning_rate": [2.2e-2, 4.6e-2, 1e-1], "n_layer": [1], "n_embd": [16, 32], "batch_size": [32, 64]}
BASELINE = {
    "batch_size": 16, "block_size": 32, "max_iters": 400, "learning_rate": 1e-2, "n_embd": 48, "n_head": 3,
    "n_layer": 2, "dropout": 0.0, "weight_decay": 0.1, "warmup_iters": 40,
}  # fmt: skip
ALONE = {
    "batch_size": [4, 8, 32, 64],
    "block_size": [8, 16, 64],
    "max_iters": [100, 200, 800],
    "learning_rate": [2.2e-3, 4.6e-3, 2.2e-2, 4.6e-2],
    "n_embd": [24, 96],
    "n_head": [1, 12],
    "n_layer": [1, 4],
    "dropout": [0.1, 0.3],
    "weight_decay": [0.0, 1.0],
    "warmup_iters": [0, 160],
}
GRID_SEEDS, NOISE_SEEDS, ALONE_SEEDS = [0, 1], range(8), [0, 1, 2]
FRESH_SEEDS, FINAL_SEEDS = range(100, 106), range(200, 208)
TUNING_CHARACTERS = 16_384
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout")
RECIPE = ("batch_size", "max_iters", "learning_rate", "weight_decay", "warmup_iters")
ROWS = record.ROOT / "results" / "search" / "result.json"


def settings(space: dict) -> list[dict]:
    """Every combination of a space, learning rates innermost."""
    return [{"learning_rate": rate, "n_layer": n_layer, "n_embd": n_embd, "batch_size": batch_size}
            for n_layer in space["n_layer"] for n_embd in space["n_embd"]
            for batch_size in space["batch_size"] for rate in space["learning_rate"]]


def completed(setting: dict) -> dict:
    """A setting of the grid with all that it leaves open: the steps that fit in its time, a tenth of them warm-up."""
    full = {**BASELINE, **setting, "n_head": setting["n_embd"] // 16}
    shape = GPTConfig.gpt2(vocab_size=65, **{name: full[name] for name in SHAPE})
    steps = steps_within(SECONDS, shape, full["batch_size"], SPEED)
    return {**full, "max_iters": steps, "warmup_iters": steps // 10}


def run(setting: dict, seed: int, train_ids, held_out) -> tuple[dict, GPT]:
    """Train a setting; its losses at the rungs (None from where it broke down), and what it took."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig.gpt2(vocab_size=65, **{name: setting[name] for name in SHAPE}))
    recipe = TrainingConfig(seed=seed, **{name: setting[name] for name in RECIPE})
    began, trainer = time.process_time(), Trainer(model, train_ids, recipe)
    losses = list(in_rungs(trainer, held_out))
    losses = [round(loss, 4) if loss < 1e9 else None for loss in losses]
    return {"parameters": model.n_parameters, "steps": recipe.max_iters, "losses": losses, "loss": losses[-1],
            "seconds": round(time.process_time() - began, 2)}, model


def lowest(rows: list[dict], studies: tuple, keys: tuple) -> list[tuple]:
    """The settings of some studies from the lowest mean loss up, each as its values in the order of `keys`."""
    found = {}
    for row in rows:
        if row["study"] in studies:
            found.setdefault(tuple(row[key] for key in keys), []).append(9.9 if row["loss"] is None else row["loss"])
    return sorted(found, key=lambda key: statistics.fmean(found[key]))


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = data.load_corpus("shakespeare")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    fit, held_out = train_ids[:-TUNING_CHARACTERS], train_ids[-TUNING_CHARACTERS:]
    rows = json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.exists() else []
    done = {(row["study"], row["seed"], json.dumps(row["changed"])) for row in rows}
    config = {"corpus": corpus.name, "seconds": SECONDS, "speed": asdict(SPEED), "space": SPACE, "beyond": BEYOND,
              "baseline": BASELINE, "tuning_characters": TUNING_CHARACTERS}

    def measure(study: str, seeds, changes: list[dict]) -> None:
        for seed in seeds:
            for i, changed in enumerate(changes):
                key = (study, seed, json.dumps(changed))
                if key in done:
                    continue
                done.add(key)
                setting = {**BASELINE, **changed} if study in ("noise", "alone") else completed(changed)
                row, model = run(setting, seed, fit, held_out)
                if study == "chosen":
                    row["validation"] = round(evaluate(model, val_ids), 4)
                rows.append({"study": study, "seed": seed, "changed": changed, **setting, **row})
                if i % 10 == 9:
                    record.save("search", config, rows)
            record.save("search", config, rows)
            print(study, "seed", seed, "done", flush=True)

    inside, shallow = settings(SPACE), [setting for setting in settings(SPACE) if setting["n_layer"] < 4]
    beyond = [setting for setting in settings(BEYOND) if setting not in inside]
    turned = [{name: value} for name, values in ALONE.items() for value in values]
    measure("grid", [0], inside)
    measure("grid", [1], shallow)  # where the best ones are
    measure("wider", GRID_SEEDS, beyond)
    measure("noise", NOISE_SEEDS, [{}])
    measure("alone", ALONE_SEEDS[:2], turned)
    top = [dict(zip(SPACE, values, strict=True)) for values in lowest(rows, ("grid", "wider"), tuple(SPACE))[:6]]
    measure("fresh", FRESH_SEEDS, top)
    measure("chosen", FINAL_SEEDS, [dict(zip(SPACE, lowest(rows, ("fresh",), tuple(SPACE))[0], strict=True))])
    measure("alone", ALONE_SEEDS, turned)
    measure("grid", GRID_SEEDS, inside)


if __name__ == "__main__":
    main()
