"""Seven optimizers race on one small GPT, and what a warm-up is worth to one of them.

    SLM_CORPUS=shakespeare OMP_NUM_THREADS=1 python benchmarks/optimizer_race.py        (about 9 minutes on one core)

Each optimizer first chooses its learning rate on a block cut from the end of the training text, in steps of three until
both neighbours of the best are worse, by the mean of three seeds: by one seed, large rates win that fail on the next.
The validation text is scored once, at the end of each of five final runs, with seeds of their own. All share the model,
the batches of a seed, the number of steps, the schedule and the clipping. The study "warm-up" trains AdamW with and
without one, at the learning rate it chose and at a larger one.
"""

import math
import os
import statistics
import time
from dataclasses import asdict, replace

import record
import torch
from tqdm.auto import tqdm

from slm_lib import adam, data, training
from slm_lib.blocks import GPT, GPTConfig

SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [100, 101, 102]
SIZES = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 48}
TRAINING = training.TrainingConfig(batch_size=16, max_iters=300, warmup_iters=30)
TUNING_CHARACTERS = 50_000
FIRST_RATES = {  # where each search begins
    "SGD": 1.0, "Momentum": 0.3, "Nesterov": 0.3, "RMSProp": 3e-3, "Adam": 1e-2, "AdamW": 1e-2, "Muon": 1e-2,
}  # fmt: skip
FACTOR, HIGHEST = 3, 10.0


def make_optimizer(name: str, model: GPT) -> adam.Optimizer:
    """An optimizer by name, with the defaults of training: β₂ 0.95, weight decay on matrices where it is decoupled."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    betas, decay = (TRAINING.beta1, TRAINING.beta2), TRAINING.weight_decay
    if name == "Muon":  # embeddings are tables of vectors, and the tied head is one of them
        hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")]
        rest = [p for n, p in model.named_parameters() if p.dim() < 2 or not n.startswith("blocks.")]
        muon = adam.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return adam.Together(muon, adam.AdamW(rest, betas=betas, weight_decay=0.0))
    if name == "AdamW":
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        return adam.AdamW(groups, betas=betas)
    if name == "Adam":
        return adam.Adam(model.parameters(), betas=betas)
    if name == "RMSProp":
        return adam.RMSProp(model.parameters(), alpha=TRAINING.beta2)
    return getattr(adam, name)(model.parameters())


def run(name: str, train_ids, held_out_ids, learning_rate: float, seed: int, warmup_iters: int | None = None) -> dict:
    """Train with one optimizer and score on a held-out text; a run whose loss is no number any more counts as None."""
    warmup_iters = TRAINING.warmup_iters if warmup_iters is None else warmup_iters
    config = replace(TRAINING, learning_rate=learning_rate, seed=seed, warmup_iters=warmup_iters)
    torch.manual_seed(seed)
    model = GPT(GPTConfig.gpt2(vocab_size=65, **SIZES))
    trainer, began = training.Trainer(model, train_ids, config), time.process_time()
    trainer.optimizer = make_optimizer(name, model)
    try:
        trainer.run(progress=False)
        loss = training.evaluate(model, held_out_ids)
        loss = round(loss, 4) if math.isfinite(loss) else None
    except FloatingPointError:
        loss = None
    curve = [round(statistics.fmean(part), 3) for i in range(0, len(trainer.history.losses), 20)
             if (part := trainer.history.losses[i : i + 20])]
    return {"seed": seed, "learning_rate": learning_rate, "steps": trainer.step, "parameters": model.n_parameters,
            "loss": loss, "seconds": round(time.process_time() - began, 1), "curve": curve}


def choose_learning_rate(name: str, train_ids) -> list[dict]:
    """The runs that bracket the best learning rate on the tuning block, those of the best first."""
    fit, block = train_ids[:-TUNING_CHARACTERS], train_ids[-TUNING_CHARACTERS:]
    tried, wanted = {}, {-1, 0, 1}
    while wanted:
        for i in sorted(wanted):
            rate = min(HIGHEST, float(f"{FIRST_RATES[name] * FACTOR**i:.4g}"))
            tried[i] = [run(name, fit, block, rate, seed) for seed in TUNING_SEEDS]
        best = min(tried, key=lambda i: mean_loss(tried[i]))
        wanted = {i for i in (best - 1, best + 1) if i not in tried and FIRST_RATES[name] * FACTOR ** (i - 1) < HIGHEST}
    return [row for rows in sorted(tried.values(), key=mean_loss) for row in rows]


def mean_loss(rows: list[dict]) -> float:
    """The mean loss of some runs; infinite where one of them broke down."""
    return math.inf if any(row["loss"] is None for row in rows) else statistics.fmean(row["loss"] for row in rows)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = data.load_corpus("shakespeare")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    config = {"corpus": corpus.name, "sizes": SIZES, "training": asdict(TRAINING), "seeds": SEEDS,
              "first_rates": FIRST_RATES, "factor": FACTOR, "tuning_seeds": TUNING_SEEDS,
              "tuning_characters": TUNING_CHARACTERS}
    rows, best = [], {}
    for name in tqdm(FIRST_RATES, desc="race"):
        tried = choose_learning_rate(name, train_ids)
        best[name] = tried[0]["learning_rate"]
        rows += [{"study": "race", "variant": name, "scored": "tuning block", **row} for row in tried]
        for seed in SEEDS:
            row = run(name, train_ids, val_ids, best[name], seed)
            rows.append({"study": "race", "variant": name, "scored": "validation text", **row})
        record.save("optimizers", config, rows)
    for factor in tqdm((1, 3), desc="warm-up"):
        for warmup_iters in (TRAINING.warmup_iters, 0):
            for seed in SEEDS:
                row = run("AdamW", train_ids, val_ids, best["AdamW"] * factor, seed, warmup_iters)
                variant = f"{factor} times the rate, {'with' if warmup_iters else 'no'} warm-up"
                rows.append({"study": "warm-up", "variant": variant, "scored": "validation text", **row})
    record.save("optimizers", config, rows)


if __name__ == "__main__":
    main()
