"""Executing notebooks: small ones, written to a temporary folder."""

import base64
import io
import json
import re
import shutil

import nbformat
import numpy as np
import pytest
from nbformat import v4
from PIL import Image

from slm_lib import check, data, notebooks, plot


def write(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources]), path)


@pytest.fixture
def project(tmp_path):
    """A folder with two lessons and a solution."""
    write(
        tmp_path / "notebooks" / "00_first.ipynb",
        "import os, sys\nfrom slm_lib import check, plot, widgets\nprint(os.path.basename(os.getcwd()))",
        "check.ladder('uniform', 4.2, 'shakespeare')\nobject()",
        "widgets.Panel('{n}'.format, n=widgets.slider(1, 9, 4))",
        "print(sys.executable, os.environ.get('OMP_NUM_THREADS'), os.environ.get('SLM_CORPUS'))",
    )
    second = "from slm_lib import check\ncheck.ladder('pairs', 2.5, 'shakespeare')"
    write(tmp_path / "notebooks" / "01_second.ipynb", second)
    write(tmp_path / "notebooks" / "solutions" / "01_second.ipynb", "open('../01_second.ipynb').read()[:1]")
    return tmp_path


def outputs(path):
    return [cell.outputs for cell in nbformat.read(path, as_version=4).cells]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_executes_everything_in_order_and_changes_no_notebook(project, capsys):
    (project / "runs").mkdir()
    check.write_ladder([{"corpus": "a", "name": "stale", "loss": 1.0}], project / "runs" / "ladder.json")
    before = {path: old for path, old in snapshot(project).items() if path.suffix == ".ipynb"}
    assert notebooks.run(project / "notebooks", project / "runs") == 0
    assert {path: after for path, after in snapshot(project).items() if project / "runs" not in path.parents} == before
    printed = capsys.readouterr().out
    lines = re.findall(r"^(\S+) +[\d.]+ s$", printed, re.M)
    assert lines == ["00_first", "01_second", "solutions/01_second", "all"]
    assert re.search(r"uniform +4.20.*\n +pairs +2.50", printed)
    assert outputs(project / "runs" / "00_first.ipynb")[0][0].text == "notebooks\n"
    assert outputs(project / "runs" / "solutions" / "01_second.ipynb")[0][0].data["text/plain"] == "'{'"
    names = [(row["notebook"], row["name"]) for row in check.read_ladder(project / "runs" / "ladder.json")]
    assert names == [("00_first", "uniform"), ("01_second", "pairs")]


def test_run_names_the_failing_cell_and_goes_on(project, capsys):
    write(project / "notebooks" / "00_first.ipynb", "x = 1\nx / 0")
    write(project / "notebooks" / "01_second.ipynb", "2")
    assert notebooks.run(project / "notebooks", project / "runs") == 1
    printed = capsys.readouterr().out
    assert re.search(r"00_first +[\d.]+ s +failed", printed)
    assert "ZeroDivisionError" in printed and "x / 0" in printed
    assert re.search(r"^01_second +[\d.]+ s$", printed, re.M)


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no notebooks"):
        notebooks.run(tmp_path, tmp_path / "runs")


@pytest.fixture
def shakespeare(project, monkeypatch):
    """Only its presence matters here: none of these notebooks opens it."""
    (project / "data").mkdir()
    (project / "data" / data.SHAKESPEARE_FILE).write_text("Before we proceed any further, hear me speak.")
    monkeypatch.setenv("SLM_DATA_DIR", str(project / "data"))
    monkeypatch.setenv("SLM_CORPUS", "playhouse")


def test_record_writes_what_depends_on_the_results_alone(project, shakespeare, capsys):
    (project / "README.md").write_text("before\n<!-- ladder -->\nold\n<!-- /ladder -->\nafter\n")
    assert notebooks.record(project / "notebooks", project) == 0
    first = snapshot(project)
    assert "changed: notebooks/00_first.ipynb" in capsys.readouterr().out
    _stored_outputs_are_clean(project / "notebooks" / "00_first.ipynb")
    _the_ladder_is_kept(project)
    assert notebooks.record(project / "notebooks", project) == 0
    assert "changed" not in capsys.readouterr().out
    assert snapshot(project) == first


def _stored_outputs_are_clean(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert [cell.execution_count for cell in stored.cells] == [1, 2, 3, 4]
    assert [cell.id for cell in stored.cells] == ["c000", "c001", "c002", "c003"]
    assert "widgets" not in stored.metadata
    first, second, panel, machine = outputs(path)
    assert first[0].text == "notebooks\n"
    assert second[1].data["text/plain"] == "<object at 0x0>"
    assert panel[0].data == {"text/plain": "Panel(n=4)\n4"}
    executable, threads, corpus = machine[0].text.split(" ")
    assert (threads, corpus) == ("1", "\n")
    assert str(notebooks.ROOT) not in executable


def _the_ladder_is_kept(project):
    rows = json.loads((project / "results" / "ladder.json").read_text())
    found = [(row["name"], row["loss"], row["notebook"]) for row in rows]
    assert found == [("uniform", 4.2, "00_first"), ("pairs", 2.5, "01_second")]
    readme = (project / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| pairs | 2.50 | 3.61 | 12.18 | [01_second](notebooks/01_second.ipynb) |" in readme
    assert readme.index("uniform") < readme.index("pairs")


def test_record_writes_nothing_when_a_notebook_fails(project, shakespeare, capsys):
    write(project / "notebooks" / "00_first.ipynb", "1")
    write(project / "notebooks" / "01_second.ipynb", "1 / 0")
    before = snapshot(project / "notebooks")
    assert notebooks.record(project / "notebooks", project) == 1
    assert snapshot(project / "notebooks") == before
    assert not (project / "results").exists()
    assert "01_second failed" in capsys.readouterr().out


def test_record_wants_shakespeare(project, monkeypatch, capsys):
    monkeypatch.setattr(data, "find_shakespeare", lambda: None)
    before = snapshot(project)
    assert notebooks.record(project / "notebooks", project) == 1
    assert snapshot(project) == before
    assert "not on this machine" in capsys.readouterr().out


def test_a_stored_picture_is_small_and_looks_the_same():
    fig, ax = plot.figure()
    plot.heatmap(ax, np.linspace(0, 1, 400).reshape(20, 20))
    ax.plot(np.arange(20), 10 + 9 * np.sin(np.arange(20)), color=plot.VERMILLION)
    picture = base64.b64encode(plot.png(fig)).decode()
    output = v4.new_output("display_data", data={"image/png": picture})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("fig", outputs=[output])])
    stored = notebooks.normalise(notebook).cells[0].outputs[0].data["image/png"]
    assert len(stored) < 0.6 * len(picture)
    before, after = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)
                     for data in (picture, stored))  # fmt: skip
    assert before.shape == after.shape and np.abs(before - after).mean() < 1


def test_the_kernel_is_this_python_whatever_the_user_installed(project, monkeypatch):
    foreign = project / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": [shutil.which("false"), "{connection_file}"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(project))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(project))
    notebook = v4.new_notebook(cells=[v4.new_code_cell("6 * 7")])
    assert notebooks.execute(notebook, project, {}) is None
    assert notebook.cells[0].outputs[0].data["text/plain"] == "42"
