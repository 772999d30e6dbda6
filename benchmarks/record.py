"""Keeps what a benchmark measured: results/<name>/result.json, which notebooks load with `check.result`."""

import json
import os
import sys
import time
from pathlib import Path

from slm_lib.provenance import commit, machine

ROOT = Path(__file__).parents[1]
COMMIT = commit()  # of the code that was loaded, whatever is committed while it runs


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


def command() -> str:
    """The command line that runs this program, as typed in the project's folder."""
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
