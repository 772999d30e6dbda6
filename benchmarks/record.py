"""Keeps what a benchmark measured: results/<name>/result.json, which notebooks load with `check.result`; shows it."""

import json
import math
import os
import re
import statistics
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


def stored(name: str, config: dict | None = None) -> dict:
    """A result that is there, if it was made with this config; otherwise an empty one."""
    path = ROOT / "results" / name / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    fits = config is None or found.get("config") == json.loads(json.dumps(config))
    return found if fits else {"rows": []}


def spread(rows: list[dict], key: str, digits: int = 3) -> str:
    """The mean of a column over the seeds, with its standard error where there are several and they differ."""
    values = [row[key] for row in rows]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):,.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table as Markdown, its first column to the left and all others to the right."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", *["--:"] * (len(head) - 1)], *body])


def with_table(readme: str, name: str, table: str) -> str:
    """The text of a README with a table between its two comments of that name. Raises ValueError where it has none."""
    if f"<!-- {name} -->" not in readme:
        raise ValueError(
            f"README.md has no place for the table: write <!-- {name} --> and <!-- /{name} --> on two lines"
        )
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", readme)


def command() -> str:
    """The command line that runs this program, as typed in the project's folder."""
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
