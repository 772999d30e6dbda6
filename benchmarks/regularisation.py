"""Dropout, weight decay and early stopping, each turned up and down, on little text and on much, over five seeds.

    OMP_NUM_THREADS=1 python benchmarks/regularisation.py        (about 11 minutes on one core)

The text is playhouse, whose floor is known. A *tuning block*, cut from the end of the training text, chooses the
learning rate of the baseline on each length of text and says when to stop early; the validation text is scored once for
every model that a row is about. A stopped model is the best one that its patience lets it see: training goes on until
so many looks at the tuning block in a row brought nothing new. The baseline alone is trained on twice the little text
too, to set beside the remedies what they are a remedy for the lack of.
"""

import copy
import math
import os
import time
from dataclasses import asdict, replace

import record
import torch
from tqdm.auto import tqdm

from slm_lib import data, training
from slm_lib.blocks import GPT, GPTConfig

SEEDS, TUNING_SEED = [0, 1, 2, 3, 4], 100
LEARNING_RATES = [2e-3, 6e-3, 1.8e-2]
SIZES = {"block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
TRAINING = training.TrainingConfig(batch_size=16, max_iters=600, warmup_iters=50, eval_interval=30)
TEXTS = {"little": 5_000, "twice as much": 10_000, "much": 880_000}  # characters to learn from
TUNING_CHARACTERS = 10_000
PATIENCE = [1, 2, 4]
VARIANTS = {
    "baseline": {},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.3": {"dropout": 0.3},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 4": {"weight_decay": 4.0},
}


def run(ids, block, variant: dict, learning_rate: float, seed: int) -> tuple[list[GPT], dict]:
    """Train one model; return it as it was at every look, and a row with what the looks saw."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig.gpt2(vocab_size=65, dropout=variant.get("dropout", 0.0), **SIZES))
    decay = variant.get("weight_decay", TRAINING.weight_decay)
    config = replace(TRAINING, learning_rate=learning_rate, weight_decay=decay, seed=seed)
    looks, learned, tuned = [], [], []

    def look(trainer):
        looks.append(copy.deepcopy(model))
        learned.append(round(training.evaluate(model, ids[: len(block)]), 4))
        tuned.append(round(training.evaluate(model, block), 4))

    began = time.process_time()
    training.train(model, ids, config, look, progress=False)
    row = {"seed": seed, "learning_rate": learning_rate, "steps": config.max_iters, "parameters": model.n_parameters,
           "seconds": round(time.process_time() - began, 1), "tuning_curve": tuned, "learned_curve": learned}
    return looks, row


def stops_at(losses: list[float], patience: int) -> int:
    """The look whose model early stopping keeps: the best before `patience` looks in a row brought nothing new."""
    best = 0
    for i, loss in enumerate(losses):
        if loss < losses[best]:
            best = i
        elif i - best >= patience:
            break
    return best


def stopped(looks: list[GPT], row: dict, val_ids) -> list[dict]:
    """The rows of early stopping, one for each patience, from a run that was not stopped."""
    rows = []
    for patience in PATIENCE:
        i = stops_at(row["tuning_curve"], patience)
        kept = {**row, "variant": f"patience {patience}", "steps": i * TRAINING.eval_interval,
                "loss": round(training.evaluate(looks[i], val_ids), 4), "learned_loss": row["learned_curve"][i]}
        rows.append({name: value for name, value in kept.items() if not name.endswith("_curve")})
    return rows


def study(text: str, ids, block, val_ids) -> list[dict]:
    """All rows of one length of text: the choice of a learning rate, then every variant with every seed."""
    rows = []
    for rate in LEARNING_RATES:
        _, row = run(ids, block, {}, rate, TUNING_SEED)
        rows.append({"study": text, "variant": "baseline", "scored": "tuning block", **row,
                     "loss": min(row["tuning_curve"])})
    rate = min(rows, key=lambda row: row["loss"] or math.inf)["learning_rate"]
    for seed in tqdm(SEEDS, desc=text):
        variants = {"baseline": {}} if text == "twice as much" else VARIANTS
        for variant, changes in variants.items():
            looks, row = run(ids, block, changes, rate, seed)
            row |= {"study": text, "variant": variant, "scored": "validation text",
                    "loss": round(training.evaluate(looks[-1], val_ids), 4), "learned_loss": row["learned_curve"][-1]}
            rows += [row, *(stopped(looks, row, val_ids) if variant == "baseline" else [])]
    return rows


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = data.load_corpus("playhouse")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    block = train_ids[-TUNING_CHARACTERS:]
    config = {"corpus": corpus.name, "floor": corpus.floor, "sizes": SIZES, "training": asdict(TRAINING),
              "texts": TEXTS, "tuning_characters": TUNING_CHARACTERS, "variants": VARIANTS, "patience": PATIENCE,
              "seeds": SEEDS, "learning_rates": LEARNING_RATES, "tuning_seed": TUNING_SEED}
    rows = []
    for text, length in TEXTS.items():
        rows += study(text, train_ids[:length], block, val_ids)
        record.save("regularisation", config, rows)


if __name__ == "__main__":
    main()
