"""What each part of a GPT is worth: parts removed, the steps from gpt2 to modern, and depth against width.

    SLM_CORPUS=shakespeare OMP_NUM_THREADS=1 python benchmarks/ablations.py        (about 40 minutes on one core)

Three studies, each over five seeds. Every variant first chooses its own learning rate on a block cut from the end of
the training text, in steps of three until both neighbours of the best are worse; the validation text is scored once, at
the end of each final run. The studies "ablations" and "shapes" give every variant the same number of steps, "designs"
the same processor time.
"""

import math
import os
import statistics
import time
from dataclasses import asdict, replace

import record
import torch
from torch import nn
from tqdm.auto import tqdm

from slm_lib import data, training
from slm_lib.blocks import GPT, Block, GPTConfig

SEEDS, TUNING_SEED = [0, 1, 2, 3, 4], 100
LEARNING_RATES = [7e-4, 2e-3, 6e-3, 1.8e-2, 5.4e-2]
SIZES = {"block_size": 64, "n_layer": 6, "n_head": 4, "n_embd": 48}
TRAINING = training.TrainingConfig(batch_size=16, max_iters=400, warmup_iters=50)
TUNING_CHARACTERS = 50_000


class WithoutResidual(Block):
    """A block that replaces x where it should add to it."""

    def forward(self, x):
        return self.mlp(self.norm2(self.attention(self.norm1(x))))


class PostNorm(Block):
    """The block of Vaswani et al. (2017): the norm stands after the sum."""

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Nothing(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, x):
        return torch.zeros_like(x)


def build(block: type[Block] = Block, without: tuple[str, ...] = (), **choices) -> GPT:
    """A GPT of 65 symbols whose blocks are of another kind, or lack parts ("norm", "attention", "mlp")."""
    model = GPT(GPTConfig.gpt2(vocab_size=65, **{**SIZES, **choices}))
    for layer in model.blocks:
        layer.__class__ = block
        for part in without:
            for name in ("norm1", "norm2") if part == "norm" else (part,):
                setattr(layer, name, nn.Identity() if part == "norm" else Nothing())
    if "norm" in without or block is PostNorm:
        model.norm = nn.Identity()
    return model


ABLATIONS = {
    "baseline": {},
    "no residual": {"block": WithoutResidual},
    "no norm": {"without": ("norm",)},
    "no MLP": {"without": ("mlp",)},
    "no attention": {"without": ("attention",)},
    "no position": {"position": "none"},
    "1 head": {"n_head": 1},
    "12 heads": {"n_head": 12},
    "post-norm": {"block": PostNorm},
    "post-norm without warm-up": {"block": PostNorm, "warmup_iters": 0, "learning_rate_of": "post-norm"},
}
# Each step keeps what the ones before it changed.
STEPS = {
    "gpt2": {},
    "no biases": {"bias": False},
    "RMSNorm": {"norm": "rms"},
    "rotary": {"position": "rotary"},
    "QK-norm": {"qk_norm": True},
    "ReLU²": {"activation": "relu2"},
    "own head": {"tie_weights": False},
    "zero init": {"zero_init": True},
}
DESIGNS = {name: {key: value for step in list(STEPS.values())[: i + 1] for key, value in step.items()}
           for i, name in enumerate(STEPS)}
SHAPES = {f"{n_layer} x {n_embd}": {"n_layer": n_layer, "n_embd": n_embd, "n_head": 2}
          for n_layer, n_embd in [(1, 118), (2, 84), (4, 58), (6, 48), (12, 34)]}


def run(spec: dict, train_ids, held_out_ids, learning_rate: float, seed: int, max_iters: int) -> dict:
    """Train one variant and score it on a held-out text; a run whose loss is no number any more counts as None."""
    spec = {key: value for key, value in spec.items() if key != "learning_rate_of"}
    config = replace(TRAINING, learning_rate=learning_rate, seed=seed, max_iters=max_iters,
                     warmup_iters=spec.pop("warmup_iters", TRAINING.warmup_iters))
    torch.manual_seed(seed)
    model = build(**spec)
    trainer, began = training.Trainer(model, train_ids, config), time.process_time()
    try:
        trainer.run(progress=False)
        loss = training.evaluate(model, held_out_ids)
    except FloatingPointError:
        loss = None
    curve = [round(statistics.fmean(part), 3) for i in range(0, len(trainer.history.losses), 20)
             if (part := trainer.history.losses[i : i + 20])]
    return {"seed": seed, "learning_rate": learning_rate, "steps": trainer.step, "parameters": model.n_parameters,
            "loss": loss and round(loss, 4), "seconds": round(time.process_time() - began, 1), "curve": curve}


def steps_at_equal_time(variants: dict, ids) -> dict[str, int]:
    """How many steps each variant makes in the processor time that the first needs for its own, timed in turns."""
    trainers = {name: training.Trainer(build(**spec), ids, TRAINING) for name, spec in variants.items()}
    seconds = {name: [] for name in variants}
    for _ in range(12):
        for name, trainer in trainers.items():
            began = time.process_time()
            for _ in range(8):
                trainer.update()
            seconds[name].append(time.process_time() - began)
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(cost.values()))
    return {name: round(TRAINING.max_iters * first / value) for name, value in cost.items()}


def choose_learning_rate(spec: dict, train_ids, max_iters: int) -> list[dict]:
    """The runs that bracket the best learning rate, the best first; the search starts in the middle of the list."""
    fit, block = train_ids[:-TUNING_CHARACTERS], train_ids[-TUNING_CHARACTERS:]
    tried, wanted = {}, {1, 2}
    while wanted:
        for i in wanted:
            tried[i] = run(spec, fit, block, LEARNING_RATES[i], TUNING_SEED, max_iters)
        best = min(tried, key=lambda i: tried[i]["loss"] or math.inf)
        wanted = {best - 1, best + 1} & set(range(len(LEARNING_RATES))) - set(tried)
    return sorted(tried.values(), key=lambda row: row["loss"] or math.inf)


def study(name: str, variants: dict, train_ids, val_ids, steps: dict[str, int]) -> list[dict]:
    """All runs of a study: those that choose the learning rate, then the seeds with the best of them."""
    rows, best = [], {}
    for variant, spec in tqdm(variants.items(), desc=name):
        if "learning_rate_of" in spec:
            best[variant] = best[spec["learning_rate_of"]]
        else:
            tried = choose_learning_rate(spec, train_ids, steps[variant])
            best[variant] = tried[0]["learning_rate"]
            rows += [{"study": name, "variant": variant, "scored": "tuning block", **row} for row in tried]
        for seed in SEEDS:
            row = run(spec, train_ids, val_ids, best[variant], seed, steps[variant])
            rows.append({"study": name, "variant": variant, "scored": "validation text", **row})
    return rows


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = data.load_corpus("shakespeare")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    config = {"corpus": corpus.name, "sizes": SIZES, "training": asdict(TRAINING), "seeds": SEEDS,
              "learning_rates": LEARNING_RATES, "tuning_seed": TUNING_SEED, "tuning_characters": TUNING_CHARACTERS}
    common = {"vocab_size": 65, **SIZES}
    assert GPTConfig.gpt2(**common, **DESIGNS["zero init"]) == GPTConfig.modern(**common), "the steps miss modern"
    rows = []
    for name, variants in {"designs": DESIGNS, "shapes": SHAPES, "ablations": ABLATIONS}.items():
        steps = dict.fromkeys(variants, TRAINING.max_iters)
        if name == "designs":
            steps = steps_at_equal_time(variants, train_ids)
        rows += study(name, variants, train_ids, val_ids, steps)
        record.save("ablations", config, rows)


if __name__ == "__main__":
    main()
