"""Where a result comes from: the code, the data, the settings and the machine."""

import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch

from slm_lib.data import Corpus
from slm_lib.training import Trainer


def provenance(trainer: Trainer, corpus: Corpus, loss: float, chars_per_token: float) -> dict:
    """Where a model comes from: code, data, settings, machine and result."""
    losses = trainer.history.losses
    return {
        "commit": commit(),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "floor": corpus.floor},
        "training": asdict(trainer.config),
        "parameters": trainer.model.n_parameters,
        "tokens_seen": trainer.step * trainer.config.batch_size * trainer.block_size,
        "seconds": round(trainer.history.seconds, 1),
        "validation_loss": loss,
        "validation": "every token once, disjoint windows of block_size, nats per token",
        "chars_per_token": chars_per_token,
        "training_loss_every_10_steps": [round(sum(part) / len(part), 4) for i in range(0, len(losses), 10)
                                         if (part := losses[i : i + 10])],
        "machine": {**machine(), "device": str(trainer.device)},
        "date": time.strftime("%Y-%m-%d"),
    }


def machine() -> dict:
    """What this runs on."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None where git does not know it."""
    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parents[1])
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "slm_lib", "benchmarks")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "") or None
    except OSError:
        return None
