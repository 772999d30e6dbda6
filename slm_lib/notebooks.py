"""Executing the notebooks: `run` into a folder that git ignores, `record` in place, for what is committed."""

import base64
import io
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

from slm_lib import check

ROOT = Path(__file__).parents[1]
CELL_SECONDS = 900  # a cell that works longer than this has lost its way
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


class _ThisPython(KernelSpecManager):
    """Knows one kernel, the running Python, whatever kernels the user once installed under the name python3."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class _Manager(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return _ThisPython()


def paths(folder: Path) -> list[Path]:
    """The notebooks of a folder in reading order, then their solutions."""
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted(folder.glob("solutions/[0-9][0-9]_*.ipynb"))]


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str]) -> str | None:
    """Execute a notebook in its folder, filling in its outputs; return the traceback of a failing cell, else None."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": python_path, **environment}
    env.pop("MPLBACKEND", None)  # one that is set for a whole machine hides every picture
    options = {"timeout": CELL_SECONDS, "record_timing": False, "coalesce_streams": True}
    options |= {"kernel_manager_class": _Manager, "resources": {"metadata": {"path": str(folder)}}}
    try:
        NotebookClient(notebook, **options).execute(env=env, stderr=subprocess.DEVNULL)  # what a kernel says of itself
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error)
    return None


def run(folder: str | os.PathLike | None = None, into: str | os.PathLike | None = None) -> int:
    """Execute all notebooks of `folder` into `into` (runs/notebooks); print times, the ladder and a sample.

    Goes on after a notebook that fails. Returns the exit status: 1 if one failed.
    """
    folder, into = Path(folder or ROOT / "notebooks"), Path(into or ROOT / "runs" / "notebooks")
    into.mkdir(parents=True, exist_ok=True)
    ladder = into / "ladder.json"
    ladder.unlink(missing_ok=True)
    failures = {}
    for path, notebook, failure in _executed(folder, ladder, {}):
        copy = into / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, copy)
        if failure:
            failures[path.stem] = failure
    for name, failure in failures.items():
        print(f"\n{name} failed:\n{failure}")
    print(f"\nThe executed notebooks are in {into}\n")
    check.show_ladder(path=ladder)
    _sample(ROOT / "models" / "shakespeare-cpu")
    return 1 if failures else 0


def _executed(
    folder: Path, ladder: Path, environment: dict[str, str]
) -> Iterator[tuple[Path, nbformat.NotebookNode, str | None]]:
    """Execute the notebooks of a folder one after the other, with a line for each; rows of the ladder get its name."""
    found = paths(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no notebooks: run this in a clone of the project")
    environment = {"SLM_LADDER": str(ladder.resolve()), **environment}
    began = time.monotonic()
    for path in found:
        name, start = str(path.relative_to(folder).with_suffix("")), time.monotonic()
        print(f"{name:32}", end="", flush=True)
        notebook = nbformat.read(path, as_version=4)
        failure = execute(notebook, path.parent, environment)
        rows = [{"notebook": path.stem, **row} for row in check.read_ladder(ladder)]
        if rows:
            check.write_ladder(rows, ladder)
        print(f"{time.monotonic() - start:6.1f} s{'   failed' if failure else ''}", flush=True)
        yield path, notebook, failure
    print(f"{'all':32}{time.monotonic() - began:6.1f} s")


def _sample(folder: Path) -> None:
    if not folder.is_dir():
        print(f"\nThere is no trained model in models/{folder.name}: `make train` trains one.")
        return
    from slm_lib import checkpoints, generation

    model, tokenizer, _ = checkpoints.load_model(folder)
    prompt = "ROMEO:\n"
    print(f"\nA sample from models/{folder.name}:\n\n{prompt}{generation.generate(model, tokenizer, prompt, 400)}")


# --- what is committed ------------------------------------------------------------------------------------------------


def record(folder: str | os.PathLike | None = None, root: str | os.PathLike = ROOT) -> int:
    """Execute all notebooks in place, on Shakespeare and with one thread, and write the ladder from their rows.

    Nothing is written unless all of them pass. An unchanged result is an unchanged file. Returns the exit status.
    """
    from slm_lib.data import find_shakespeare

    if not find_shakespeare():
        print("Committed outputs come from Shakespeare, which is not on this machine: `python -m slm_lib download`")
        return 1
    root, environment = Path(root), {"SLM_CORPUS": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    ladder = root / "runs" / "ladder.json"
    ladder.parent.mkdir(exist_ok=True)
    ladder.unlink(missing_ok=True)
    recorded = {}
    for path, notebook, failure in _executed(Path(folder or root / "notebooks"), ladder, environment):
        if failure:
            print(f"\n{path.stem} failed, so nothing is written:\n{failure}")
            return 1
        recorded[path] = nbformat.writes(normalise(notebook)) + "\n"
    for path, text in recorded.items():
        _write(path, text)
    rows = check.read_ladder(ladder)
    (root / "results").mkdir(exist_ok=True)
    _write(root / "results" / "ladder.json", ladder.read_text(encoding="utf-8") if rows else "[]\n")
    readme = root / "README.md"
    if readme.is_file():
        _write(readme, with_ladder(readme.read_text(encoding="utf-8"), rows))
    return 0


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"changed: {path.parent.name}/{path.name}")


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out of a notebook what differs from run to run or from machine to machine, in place; return it."""
    notebook.metadata = nbformat.from_dict({**KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            data = output.get("data", {})
            if len(data) > 1:
                data.pop(WIDGET, None)  # without a kernel, a saved view shows nothing; the picture beside it does
            for kind in [kind for kind in data if kind.startswith("text/")]:
                data[kind] = _anonymous(data[kind])
            if "image/png" in data:
                data["image/png"] = _in_few_colors(data["image/png"])
            if "text" in output:
                output.text = _anonymous(output.text)
    return notebook


def _in_few_colors(picture: str, colors: int = 256) -> str:
    """A PNG in base64 with a palette instead of four bytes for each pixel: a third of the size, and looks the same."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        small = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), picture, key=len)


def _anonymous(text: str) -> str:
    """Text without memory addresses and without the places where this machine keeps things."""
    text = ADDRESS.sub("at 0x0", text).replace(f"{ROOT}{os.sep}", "")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def with_ladder(readme: str, rows: list[dict]) -> str:
    """The text of a README with the ladder as tables between its two `ladder` comments."""
    tables = []
    for corpus in sorted({row["corpus"] for row in rows}, reverse=True):
        tables += ["", f"| {corpus} | nats | bits per character | perplexity | notebook |", "|---|--:|--:|--:|---|"]
        for row, units in check.climb(rows, corpus):
            numbers = f"{units.nats:.2f} | {units.bits_per_character:.2f} | {units.perplexity:.2f}"
            link = f"[{row['notebook']}](notebooks/{row['notebook']}.ipynb)" if "notebook" in row else ""
            tables.append(f"| {row['name']} | {numbers} | {link} |")
    pattern = re.compile(r"(<!-- ladder -->\n).*?(<!-- /ladder -->)", re.DOTALL)
    return pattern.sub(lambda found: found[1] + "\n".join([*tables, "", found[2]]), readme)

