"""Who competes in benchmarks/gpu.py, each in a process of its own and watched alike: nanoGPT, and ours.

nanoGPT's train.py runs as it is, with its config/train_shakespeare_char.py; contestants.py says how it is reached from
outside. Of its flags only those are set that let it evaluate as little as it can: one batch, before its first update
and after its last. Ours is the preset behind `python -m slm_lib train --preset shakespeare-gpu`, with the changes of
its job.

Every few updates all clocks stop and the one evaluator measures the loss on the text that is scored; nothing is chosen
by it. The clock of the loop begins after the fifth update, since the first ones compile or record the step, and takes
them to last as long as the others. The clock of all begins with the process: with imports, reading, compilation.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from contestants import TOKENIZER, EveryPosition, losses, run_nanogpt, texts, trained_nanogpt
from torch import Tensor, nn

from slm_lib import gpu, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.presets import PRESETS
from slm_lib.runs import SIZES
from slm_lib.settings import TrainingConfig, fastest_precision

PRESET = "shakespeare-gpu"
WINDOW = 256  # what all are given alike in the first column
TARGET = 1.4697  # nats per character: the best validation loss that nanoGPT's README gives for this recipe
THEIRS = {"batch_size": 64, "block_size": 256, "max_iters": 5_000}  # in nanoGPT's config, where no flag says otherwise
QUIETLY = {"eval_iters": 1}
START = 5  # updates before the clock of the loop begins


class Watch:
    """Looks at a training from outside: what time it is, in the loop and in all, and the loss while the clocks stand.

    `job` says when the process began; `ids` (N,) is the text that is scored. The memory is the most that PyTorch had
    taken of a CUDA device, its own looks left out, and None elsewhere.
    """

    def __init__(self, job: dict, ids: Tensor, device: torch.device):
        self.job, self.ids, self.device = job, ids, device
        self.curve, self.reached, self.memory, self.looking, self.all_in = [], {}, None, 0.0, 0.0

    def now(self) -> float:
        """Seconds of a clock that stands while this looks, after all that the device still had to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.looking

    def at(self, step: int, last: int, model: Callable[[], nn.Module]) -> None:
        """Told after an update which it was: begin, look, or let it pass."""
        if step == START:
            self.begin(step)
        elif START < step <= last and (step % self.job["every"] == 0 or step == last):
            self.look(model(), step)

    def begin(self, step: int) -> None:
        """The loop's clock starts, after so many updates: they will be taken to last as long as the others."""
        self.first, self.began = step, self.now()

    def look(self, model: nn.Module, step: int) -> None:
        """Stop the clocks after so many updates, measure the loss, and let them go on."""
        now = self.now()
        loop, self.all_in = (now - self.began) * step / (step - self.first), now - self.job["began"]
        if self.device.type == "cuda":
            self.memory = max(self.memory or 0, round(torch.cuda.max_memory_allocated() / 2**20))
        loss = training.evaluate(model, self.ids, min(WINDOW, model.config.block_size))
        self.curve.append([step, round(loop, 3), round(loss, 4)])
        if loss <= TARGET and not self.reached:
            self.reached = {"target_step": step, "seconds_to_target": round(loop, 3),
                            "seconds_to_target_all_in": round(self.all_in, 2)}  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.looking += self.now() - now

    def row(self, config: GPTConfig, tokens: int) -> dict:
        """What the training took that ended with the last look, after so many tokens."""
        steps, seconds, _ = self.curve[-1]
        best, rate, peak = min(self.curve, key=lambda point: point[2]), tokens / seconds, self.job["peak"]
        never = {"target_step": None, "seconds_to_target": None, "seconds_to_target_all_in": None}
        return {
            "block_size": config.block_size, "steps": steps, "characters_seen": tokens, "seconds": seconds,
            "seconds_all_in": round(self.all_in, 2), **never, **self.reached, "tokens_per_second": round(rate),
            "milliseconds_per_step": round(1e3 * seconds / steps, 3),
            "utilisation": peak and round(gpu.utilisation(config, rate, peak), 4), "memory_mib": self.memory,
            "best_loss": best[2], "best_step": best[0], "curve": self.curve,
        }  # fmt: skip


def train_nanogpt(job: dict, train_ids: Tensor, watch: Watch) -> tuple[nn.Module, GPTConfig, int]:
    """Run train.py of the copy of nanoGPT in `job`; return its model, that in our words, and how many tokens it saw."""
    flags, done = {**THEIRS, **QUIETLY, **job["flags"]}, itertools.count(1)
    steps = flags["max_iters"]

    def their_model() -> EveryPosition:
        model = sys.modules["__main__"].raw_model  # train.py is what runs
        return EveryPosition(getattr(model, "_orig_mod", model))  # without torch.compile's wrapper

    job = {**job, "steps": steps}
    run_nanogpt(job, flags, train_ids, lambda *_: watch.at(next(done), steps, their_model))
    model = trained_nanogpt(job).to(watch.device)
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
    config = GPTConfig.gpt2(**{name: getattr(model.config, name) for name in names}, activation="gelu")
    return model, config, steps * flags["batch_size"] * flags["block_size"]


def settings(changes: dict) -> tuple[dict, TrainingConfig]:
    """The preset with changes, by name: the model's sizes, and how to train."""
    preset = PRESETS[PRESET]
    sizes = {name: value for name, value in changes.items() if name in SIZES}
    return {**preset.sizes, **sizes}, replace(preset.training, **{n: v for n, v in changes.items() if n not in SIZES})


def train_ours(job: dict, train_ids: Tensor, watch: Watch) -> tuple[nn.Module, GPTConfig, int]:
    """Train our preset, changed as `job` says; return the model, its config, and how many tokens it saw."""
    sizes, config = settings(job["changes"])
    config = replace(config, seed=job["seed"], eval_interval=START)
    if config.precision == "auto":
        config = replace(config, precision=fastest_precision(watch.device))
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig.modern(vocab_size=TOKENIZER.vocab_size, **sizes)).to(watch.device)
    trainer = training.Trainer(model, train_ids, config)
    if watch.device.type == "cuda":
        gpu.capture(trainer)
    trainer.run(lambda trainer: watch.at(trainer.step, config.max_iters, lambda: model), progress=False)
    return model, model.config, config.max_iters * config.batch_size * model.config.block_size


def contend(job: dict) -> dict:
    """Train and score one contestant, in this process: its row."""
    train, scored = texts(job)
    watch = Watch(job, TOKENIZER.encode(scored), training.choose_device(job["device"]))
    train_it = {"nanogpt": train_nanogpt, "ours": train_ours}[job["kind"]]
    model, config, tokens = train_it(job, TOKENIZER.encode(train), watch)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, **watch.row(config, tokens), **losses(model, scored, WINDOW)}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    (Path(job["folder"]) / "row.json").write_text(json.dumps(contend(job)))
