"""What size buys and costs: models of four sizes on little, middling and much text.

    OMP_NUM_THREADS=1 python benchmarks/sizes.py        (about 5 minutes on one core)

The text is playhouse, drawn afresh: each seed has its own training text, the learning rates are chosen on a text of
their own, and nothing is chosen on the test text, whose floor is known exactly. All runs have the same number of steps
and, after the warm-up, a constant learning rate: so each point of a curve is where a shorter run would have ended, and
sizes can be compared at the same steps, the same operations or the same seconds. A program that was interrupted goes on
where it stopped.
"""

import json
import math
import os
import time
from dataclasses import asdict, replace

import record
import torch
from tqdm.auto import tqdm

from slm_lib import playhouse, training
from slm_lib.blocks import GPT, GPTConfig, count_flops, count_memory
from slm_lib.data import CharTokenizer

SEEDS = [0, 1, 2]
SIZES = {
    "8k": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "29k": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "90k": {"n_layer": 3, "n_head": 3, "n_embd": 48},
    "318k": {"n_layer": 4, "n_head": 4, "n_embd": 80},
}
TEXTS = {"little": 8_000, "middle": 60_000, "much": 1_000_000}  # characters
BLOCK_SIZE, TEST_CHARACTERS, GLANCE = 64, 30_000, 5_000
TRAINING = training.TrainingConfig(
    batch_size=16, max_iters=250, warmup_iters=25, eval_interval=25, schedule="constant"
)
LEARNING_RATES, TUNING_STEPS = [1e-3, 3e-3, 1e-2, 3e-2, 9e-2], 125
AS_GOOD = 0.02  # nats: what luck alone makes of one seed; between such rates the lower is the safer
TUNING_SEED, SCORING_SEED, TEST_SEED = 500, 501, 900  # of the texts that choose learning rates, and of the last one
TOKENIZER = CharTokenizer(playhouse.SYMBOLS)


def encoded(characters: int, seed: int) -> torch.Tensor:
    """That many characters of playhouse, as ids."""
    return TOKENIZER.encode(playhouse.text(playhouse.scenes(characters, seed))[:characters])


def build(size: str, seed: int, block_size: int = BLOCK_SIZE) -> GPT:
    """A fresh model of one of the sizes."""
    torch.manual_seed(seed)
    return GPT(GPTConfig.modern(vocab_size=TOKENIZER.vocab_size, block_size=block_size, **SIZES[size]))


def run(size: str, train_ids, scored_ids, learning_rate: float, seed: int, steps: int) -> dict:
    """Train one model and score it; its curve holds (step, training loss, held-out loss) on parts of the texts."""
    config = replace(TRAINING, learning_rate=learning_rate, seed=seed, max_iters=steps)
    trainer, curve = training.Trainer(build(size, seed), train_ids, config), []

    def glance(trainer):
        began = time.process_time()
        losses = [round(training.evaluate(trainer.model, ids[:GLANCE]), 3) for ids in (train_ids, scored_ids)]
        curve.append([trainer.step, *losses, time.process_time() - began])

    began = time.process_time()
    trainer.run(glance, progress=False)
    seconds = time.process_time() - began - sum(point.pop() for point in curve)  # of training alone
    model, tokens = trainer.model, steps * config.batch_size * BLOCK_SIZE
    return {
        "size": size, "seed": seed, "learning_rate": learning_rate, "steps": steps, "parameters": model.n_parameters,
        "characters": len(train_ids), "passes": round(tokens / len(train_ids), 2),
        "train_loss": round(training.evaluate(model, train_ids[:TEST_CHARACTERS]), 4),
        "held_out_loss": round(training.evaluate(model, scored_ids), 4),
        "seconds": round(seconds, 2), "flops": 3 * tokens * sum(count_flops(model.config).values()),
        "bytes": sum(count_memory(model.config, config.batch_size).values()), "curve": curve,
    }  # fmt: skip


def try_learning_rates(size: str, train_ids, scored_ids) -> list[dict]:
    """Runs that bracket the best learning rate: both its neighbours are among them, where the list has them."""
    tried, wanted = {}, {1, 2}
    while wanted:
        for i in wanted:
            tried[i] = run(size, train_ids, scored_ids, LEARNING_RATES[i], TUNING_SEED, TUNING_STEPS)
        best = min(tried, key=lambda i: tried[i]["held_out_loss"])
        wanted = {best - 1, best + 1} & set(range(len(LEARNING_RATES))) - set(tried)
    return list(tried.values())


def seconds_per_step(ids) -> dict[str, float]:
    """Processor seconds of a step for each size, timed in turns, the quickest turn counting."""
    trainers = {size: training.Trainer(build(size, 0), ids, TRAINING) for size in SIZES}
    seconds = {size: [] for size in SIZES}
    for _ in range(8):
        for size, trainer in trainers.items():
            began = time.process_time()
            for _ in range(4):
                trainer.update()
            seconds[size].append((time.process_time() - began) / 4)
    return {size: round(min(values), 5) for size, values in seconds.items()}


def chosen_rates(rows: list[dict]) -> dict[str, float]:
    """The learning rate for each size: the lowest of those that did best on the tuning text, or as good as best."""
    rates = {}
    for size in SIZES:
        tried = {row["learning_rate"]: row["held_out_loss"] for row in rows
                 if row["size"] == size and row["scored"] == "tuning text"}  # fmt: skip
        rates[size] = min(rate for rate, loss in tried.items() if loss <= min(tried.values()) + AS_GOOD)
    return rates


def finished(name: str, config: dict) -> dict:
    """What an interrupted run of the same program with the same settings has kept, or nothing."""
    path = record.ROOT / "results" / name / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = found.get("config") == json.loads(json.dumps(config)) and found.get("commit") == record.COMMIT
    return found if same else {}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    test = playhouse.text(playhouse.scenes(TEST_CHARACTERS, TEST_SEED))
    test_ids, much = TOKENIZER.encode(test), TEXTS["much"]
    tuning_ids, scoring_ids = encoded(much, TUNING_SEED), encoded(TEST_CHARACTERS, SCORING_SEED)
    config = {"sizes": SIZES, "design": "modern", "block_size": BLOCK_SIZE, "texts": TEXTS, "seeds": SEEDS,
              "training": asdict(TRAINING), "learning_rates": LEARNING_RATES, "test_characters": len(test),
              "glance": GLANCE, "tuning_steps": TUNING_STEPS, "as_good": AS_GOOD,
              "text_seeds": {"tuning": TUNING_SEED, "scoring": SCORING_SEED, "test": TEST_SEED}}
    before = finished("sizes", config)
    rows = before.get("rows", [])
    cost = before.get("seconds_per_step") or seconds_per_step(tuning_ids)
    facts = {"floor": round(-playhouse.log_prob(test) / len(test), 4), "seconds_per_step": cost}
    for size in tqdm(SIZES, desc="learning rates"):
        if not any(row["size"] == size for row in rows):
            tried = try_learning_rates(size, tuning_ids, scoring_ids)
            rows += [{"scored": "tuning text", "text": "much", **row} for row in tried]
            record.save("sizes", config, rows, **facts)
    rates = chosen_rates(rows)
    done = {(row["size"], row["text"], row["seed"]) for row in rows if row["scored"] == "test text"}
    plan = [(size, text, seed) for seed in SEEDS for size in SIZES for text in TEXTS]
    for size, text, seed in tqdm([one for one in plan if one not in done]):
        row = run(size, encoded(TEXTS[text], seed), test_ids, rates[size], seed, TRAINING.max_iters)
        rows.append({"scored": "test text", "text": text, **row})
        record.save("sizes", config, rows, **facts)
    assert all(math.isfinite(row["held_out_loss"]) for row in rows)


if __name__ == "__main__":
    main()
