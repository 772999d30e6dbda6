"""Keeps what a benchmark measured: results/<name>/result.json, which notebooks load with `check.result`."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def save(name: str, config: dict, rows: list[dict], **facts) -> Path:
    """Write the rows of a benchmark with what made them: command, commit, settings, machine. Returns the file.

    A row is one measurement, such as {"variant": "no residual", "seed": 0, "loss": 2.1}; `facts` are further entries,
    such as a summary. A result that is already there is replaced in one step.
    """
    folder = ROOT / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = {"command": command(), "commit": COMMIT, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    text = json.dumps({**found, "config": config, **facts, "rows": rows}, indent=1, ensure_ascii=False)
    unfinished = folder / ".result.unfinished"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / "result.json")
    return folder / "result.json"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; the error of a single value is not known (NaN)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def command() -> str:
    """The command line that runs this program, as typed in the project's folder."""
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])


def commit() -> str:
    """The commit of the code that runs, marked where files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "slm_lib", "benchmarks")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


COMMIT = commit()  # of the code that was loaded, whatever is committed while it runs


def machine() -> dict:
    """What the measurement ran on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
