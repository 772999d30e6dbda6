"""Who competes in benchmarks/cpu.py, each in a process of its own: nanoGPT, ours, the n-gram; and their one evaluator.

benchmarks/gpu.py shares the way in which nanoGPT is run, the evaluator, and the search.

A checkout of github.com/karpathy/nanoGPT is never changed: a temporary copy of it gets tiny Shakespeare, and its
train.py runs there as it is. Two things reach into it from outside: the seed that it fixes, torch.manual_seed(1337),
is moved by ours, and PyTorch is asked to tell the time after each update. It evaluates only before its first update
and after its last, which it saves.

The clock counts training only: for nanoGPT from update to update, its evaluations and start-up left out; for ours the
updates, and for the n-gram the counting. Memory is the most that the process held until training ended.
"""

import hashlib
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from slm_lib import data, playhouse, training
from slm_lib.blocks import GPT
from slm_lib.ngrams import KneserNey
from slm_lib.presets import PRESETS
from slm_lib.settings import fastest_precision

CONTEXT = 64  # what all are given alike in the first column
TOKENIZER = data.CharTokenizer(playhouse.SYMBOLS)
COMMIT = "3adf61e"
NANOGPT = {  # what two files of that commit hash to
    "train.py": "413bd97b40bb400a2a0d01230e2946f056c263ebac1b7281c2367d964a123085",
    "model.py": "7c01703240dbec5d554527dc666e35b3df8391d0b117fddc07afcf325a21d11c",
}
RECIPE = {  # the README's for a CPU; all else is in config/train_shakespeare_char.py
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
TUNING_CHARACTERS = 50_000  # the last ones of the training text; nothing is ever chosen on the validation text
SECOND_PLAY = "Master:\nBoatswain!"  # how The Tempest begins; before it stands the end of The Taming of the Shrew


# --- one evaluator for all --------------------------------------------------------------------------------------------


def overlapping(model: nn.Module, ids: Tensor, own: Tensor) -> Tensor:
    """The surprise (N,) of each token of `ids` (N,), with at least three quarters of block_size before it, or all.

    To `own`, that in disjoint windows, come passes whose windows begin a quarter later each, of which the last quarters
    of the windows are kept.
    """
    T, surprises = model.config.block_size, own.clone()
    for offset in range(T // 4, T, T // 4):
        later = training.surprisal(model, ids[offset:], start_id=int(ids[offset - 1]))
        kept = torch.arange(len(later)) % T >= T - T // 4
        surprises[offset:][kept] = later[kept]
    return surprises


def columns(model: nn.Module | KneserNey, ids: Tensor, context: int = CONTEXT) -> dict[str, Tensor]:
    """The surprise (N,) of each character in the three columns, the first named by its context.

    A model that counts has no windows of its own; one that reads less than `context` has its own windows there.
    """
    if isinstance(model, KneserNey):
        own = model.score(ids)
        return {str(context): model.score(ids, context), "own": own, "full": own}
    own = training.surprisal(model, ids)
    equal = own if model.config.block_size <= context else training.surprisal(model, ids, context)
    return {str(context): equal, "own": own, "full": overlapping(model, ids, own)}


def losses(model: nn.Module | KneserNey, text: str, context: int = CONTEXT) -> dict[str, float]:
    """The mean of each column over a text, and over each of the two plays where it holds both."""
    parts, border = {"loss": slice(None)}, text.find(SECOND_PLAY)
    if border > 0:
        parts |= {"shrew": slice(border), "tempest": slice(border, None)}
    found = columns(model, TOKENIZER.encode(text), context)
    return {f"{part}_{column}": round(surprises[piece].double().mean().item(), 4)
            for part, piece in parts.items() for column, surprises in found.items()}  # fmt: skip


# --- the contestants, each in a process of its own --------------------------------------------------------------------


class EveryPosition(nn.Module):
    """nanoGPT's model with the interface of ours: asked for a loss, its forward gives logits at every position."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids: Tensor) -> Tensor:
        logits, _ = self.model(ids, ids)
        return logits


def run_nanogpt(job: dict, flags: dict, train_ids: Tensor, after_update: Callable) -> None:
    """Run train.py of the copy of nanoGPT in `job` for its steps, with flags, and call back after each update."""
    steps = job["steps"]
    flags = {**flags, "max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps}
    os.chdir(job["copy"])
    sys.path.insert(0, job["copy"])
    train_ids.numpy().astype(np.uint16).tofile("data/shakespeare_char/train.bin")
    sys.argv = ["train.py", "config/train_shakespeare_char.py", f"--out_dir={job['folder']}"]
    sys.argv += [f"--{name}={value}" for name, value in {**flags, "always_save_checkpoint": True}.items()]
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: manual_seed(seed + job["seed"])
    hook = register_optimizer_step_post_hook(after_update)
    runpy.run_path("train.py", run_name="__main__")
    hook.remove()
    torch.manual_seed = manual_seed


def trained_nanogpt(job: dict) -> EveryPosition:
    """The model that `run_nanogpt` left after its last step, on the CPU."""
    from model import GPT as NanoGPT  # the copy's: it is found first
    from model import GPTConfig as NanoGPTConfig

    stored = torch.load(Path(job["folder"]) / "ckpt.pt", map_location="cpu")
    assert stored["iter_num"] == job["steps"]  # train.py saves before the update after the last
    model = NanoGPT(NanoGPTConfig(**stored["model_args"]))
    weights = {name.removeprefix("_orig_mod."): weight for name, weight in stored["model"].items()}  # of torch.compile
    model.load_state_dict(weights)
    return EveryPosition(model)


def train_nanogpt(job: dict, train_ids: Tensor) -> tuple[nn.Module, dict]:
    """Train nanoGPT as `job` says; return its model after the last step, and what it took."""
    flags, steps, ticks = {**RECIPE, **job["flags"]}, job["steps"], []
    run_nanogpt(job, flags, train_ids, lambda *_: ticks.append((time.perf_counter(), time.process_time())))
    seconds, processor = ((ticks[steps - 1][clock] - ticks[0][clock]) * steps / (steps - 1) for clock in (0, 1))
    facts = spent(seconds, processor, steps * flags["batch_size"] * flags["block_size"])
    model = trained_nanogpt(job)
    return model, {"parameters": sum(p.numel() for p in model.parameters()), **facts}


def our_training(preset: str, **changes) -> training.TrainingConfig:
    """A preset's settings, with the precision that `make train` takes on this machine, and `changes`."""
    config = replace(PRESETS[preset].training, **changes)
    return replace(config, precision=fastest_precision(torch.device("cpu"))) if config.precision == "auto" else config


def train_ours(job: dict, train_ids: Tensor) -> tuple[nn.Module, dict]:
    """Train the preset of `job` with its steps; return the model and what it took."""
    config = our_training(job["preset"], seed=job["seed"], max_iters=job["steps"])
    torch.manual_seed(config.seed)
    trainer = training.Trainer(GPT(PRESETS[job["preset"]].model_config(TOKENIZER.vocab_size)), train_ids, config)
    began = time.process_time()
    seconds = trainer.run(progress=False).seconds
    seen = trainer.step * config.batch_size * trainer.block_size
    facts = {"parameters": trainer.model.n_parameters, **spent(seconds, time.process_time() - began, seen)}
    return trainer.model, facts


def count_ngrams(job: dict, train_ids: Tensor) -> tuple[KneserNey, dict]:
    """Count the n-grams of the order in `job`; parameters are the runs of symbols whose counts are kept."""
    began = time.perf_counter(), time.process_time()
    model = KneserNey(job["order"], TOKENIZER.vocab_size).fit(train_ids)
    facts = spent(time.perf_counter() - began[0], time.process_time() - began[1], len(train_ids))
    return model, {"parameters": sum(len(level.grams) for level in model._levels), **facts}


def spent(seconds: float, processor: float, seen: int) -> dict[str, float]:
    """What training took: time by the clock and of the processors, the characters read, and the most memory so far."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"characters_seen": seen, "characters_per_second": round(seen / seconds), "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2), "memory_mib": round(memory)}  # fmt: skip


def texts(job: dict) -> tuple[str, str]:
    """What the contestant of `job` learns from, and what it is scored on; `characters` may cut both shorter."""
    train, scored = data.split(data.load_corpus(job.get("corpus", "shakespeare")))
    if job["tuning"]:
        train, scored = train[:-TUNING_CHARACTERS], train[-TUNING_CHARACTERS:]
    few, fewer = job.get("characters") or (None, None)
    return train[:few], scored[:fewer]


def contend(job: dict) -> None:
    """What the fresh process does: train, score, and leave a row beside the checkpoint."""
    torch.set_num_threads(job["threads"])
    train, scored = texts(job)
    contestant = {"nanogpt": train_nanogpt, "ours": train_ours, "ngram": count_ngrams}[job["kind"]]
    model, row = contestant(job, TOKENIZER.encode(train))
    row |= losses(model, scored) if job["score"] else {}
    (Path(job["folder"]) / "row.json").write_text(json.dumps(row))


def measure(job: dict, program: str = __file__, **changes) -> dict:
    """The row of one contestant, trained in a fresh process. Raises RuntimeError with its last words if it fails.

    The process is told when it was begun, by a clock that all processes share.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {"seed": 0, "steps": 1, "tuning": False, "score": True, **job, **changes, "folder": folder}
        job["began"] = time.perf_counter()
        done = subprocess.run(
            [sys.executable, program, json.dumps(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{job} failed:\n{done.stdout[-3000:]}")
        return json.loads((Path(folder) / "row.json").read_text())


def climb(attempt: Callable[[dict], float], stages: list[list[dict]]) -> None:
    """Search by stages: each change is tried on top of the best so far, and a stage ends with one that does not help.

    `attempt` gives a loss for changes, first for none.
    """
    best, least = {}, attempt({})
    for stage in stages:
        for change in stage:
            if (loss := attempt({**best, **change})) >= least:
                break
            best, least = {**best, **change}, loss


def copy_nanogpt(checkout: Path, folder: str, files: dict[str, str] = NANOGPT) -> str:
    """A copy of nanoGPT that has prepared our text, the same characters and numbers as ours. Returns its place.

    Raises ValueError where one of its `files` is not what it should hash to.
    """
    for name, known in files.items():
        if hashlib.sha256((checkout / name).read_bytes()).hexdigest() != known:
            raise ValueError(f"{checkout / name} is not that of nanoGPT at commit {COMMIT}: check that one out")
    copy, corpus = Path(shutil.copytree(checkout, Path(folder) / "nanogpt")), data.load_corpus("shakespeare")
    place = copy / "data" / "shakespeare_char"
    (place / "input.txt").write_text(corpus.text, encoding="utf-8")
    subprocess.run([sys.executable, "prepare.py"], cwd=place, check=True, stdout=subprocess.DEVNULL)
    for name, text in zip(("train.bin", "val.bin"), data.split(corpus), strict=True):
        ours = TOKENIZER.encode(text).numpy()
        assert np.array_equal(np.fromfile(place / name, np.uint16), ours), f"{name} differs from our text"
    return str(copy)


if __name__ == "__main__":
    contend(json.loads(sys.argv[1]))
