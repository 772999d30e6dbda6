"""Keeps notebooks, modules and tests from drifting apart. Reads source; runs nothing of it.

Every rule is a function that returns what is wrong, in sentences; each is also shown something broken.
"""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    "welcome", "data", "ngrams", "tokens", "embeddings", "attention", "blocks", "adam", "training", "architectures",
    "generation", "evaluation", "tuning", "scaling", "gpu", "inside", "finetuning",
]  # fmt: skip
# The notebook that opens a module of another name.
BEFORE_TRAINING = ["checkpoints", "settings", "distributed", "faults"]
OPENED_ELSEWHERE = {"grammar": "data", "playhouse": "data", "cache": "generation", "scores": "evaluation"}
OPENED_ELSEWHERE |= dict.fromkeys(BEFORE_TRAINING, "training")
TESTED_ELSEWHERE = {"grammar": "playhouse"}  # it reads the notation of playhouse.grammar, and nothing else
CONTENT = [noun for noun in ORDER if noun != "welcome"]
before, after = CONTENT[: CONTENT.index("training")], CONTENT[CONTENT.index("training") :]
after.insert(after.index("generation"), "cache")
after.insert(after.index("evaluation"), "scores")
CONTENT = ["grammar", "playhouse", *before, *BEFORE_TRAINING, *after]
PLUMBING = {"check", "plot", "widgets", "notebooks", "presets", "provenance", "runs", "study", "__main__"}
EXTRAS = {"torch", "numpy", "slm_lib", "tqdm", "pooch", "requests", "safetensors", "regex", "optuna"}
ONLY_IN = {"matplotlib": "plot", "ipywidgets": "widgets"}

# Modules whose notebook is still to come. Empty when the series is complete.
UNOPENED: set[str] = set()
# Notebooks that open no module of their own.
WITHOUT_MODULE = {"welcome"}
# Public names that need no proof, each with the reason.
UNPROVED = {
    "data.load_corpus": "reads a file",
    "data.find_shakespeare": "looks for a file",
    "data.download_shakespeare": "fetches a file",
    "data.Corpus": "a record: nothing is computed in it",
    "data.Cleaned": "a record: nothing is computed in it",
    "grammar.Item": "a record: nothing is computed in it",
    "grammar.Form": "a record: nothing is computed in it",
    "grammar.Rule": "a record: nothing is computed in it",
    "grammar.Rules": "reads a text",
    "playhouse.Scene": "a record: nothing is computed in it",
    "playhouse.Line": "a record: nothing is computed in it",
    "playhouse.Recall": "a record: nothing is computed in it",
    "playhouse.EntropyRate": "a record: nothing is computed in it",
    "checkpoints.sweep": "deletes files",
    "distributed.Ranks": "talks between processes; test_distributed shows that two equal one",
    "faults.enough_memory": "turns one exception into a sentence",
    "faults.interrupts": "catches a signal",
    "training.choose_device": "asks the machine which devices it has",
    "settings.fastest_precision": "asks the machine what it is made for",
    "gpu.measure_roof": "takes times with a clock",
    "tuning.Speed": "a record: nothing is computed in it",
    "tuning.Cost": "a record: nothing is computed in it",
    "tuning.Trial": "a record: nothing is computed in it",
    "tuning.measure_speed": "takes times with a clock; fit_speed, which it calls, is proved",
    "ngrams.LossUnits": "a record, and loss_units, which fills it, is proved",
}
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
MEANT_TO_FAIL = {"raises-exception", "nbval-raises-exception"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|tmp|work|Users|var|opt|usr|mnt)/|\b[A-Z]:\\")


class Cell:
    """A code cell: its source, tags, outputs, and the text that the outputs hold."""

    def __init__(self, raw):
        self.source = "".join(raw["source"])
        self.lines = self.source.splitlines()
        self.count, self.outputs = raw["execution_count"], raw["outputs"]
        marks = re.findall(r"#\s*(NBVAL_\w+)", self.source)
        self.tags = {*raw["metadata"].get("tags", []), *(mark.lower().replace("_", "-") for mark in marks)}
        plain = "\n".join("pass" if line.startswith(("%", "!")) else line for line in self.lines)
        self.tree = ast.parse(plain)
        self.calls = {ast.unparse(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        self.asserts = any(isinstance(node, ast.Assert) for node in ast.walk(self.tree))

    @property
    def texts(self):
        for output in self.outputs:
            parts = [output.get("text"), output.get("evalue"), output.get("traceback")]
            parts += [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
            yield from ("".join(part) for part in parts if part)


class Notebook:
    """A notebook read from its file."""

    def __init__(self, path):
        self.path, self.size = path, path.stat().st_size
        self.noun = re.sub(r"^\d\d_", "", path.stem)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        self.cells = [Cell(c) for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        self.prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        self.tree = ast.Module([node for cell in self.cells for node in cell.tree.body], [])


def slm_imports(tree):
    """The modules of slm_lib that some source imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "slm_lib":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slm_lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("slm_lib.")}
    return found


def packages(tree):
    """The top-level packages that some source imports; a relative import counts as '.'."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def public(source):
    """The public functions and classes of a module."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds) and node.name[0] != "_"}


MODULES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "slm_lib").glob("*.py"))}
LESSONS = [Notebook(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
SOLUTIONS = [Notebook(path) for path in sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))]
LIBRARY = set().union(*(public(source) for name, source in MODULES.items() if name != "__main__"))


# --- rules for a module -----------------------------------------------------------------------------------------------


def imports_what_it_may(name, source):
    tree = ast.parse(source)
    wrong = [f"only {home}.py imports {package}" for package, home in ONLY_IN.items()
             if package in packages(tree) and name != home]
    if "*" in {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}:
        wrong.append("star import")
    if name in CONTENT:
        earlier = CONTENT[: CONTENT.index(name)]
        wrong += [f"imports {used}, which is not opened before it" for used in slm_imports(tree) - set(earlier)]
        wrong += [f"imports {used}" for used in packages(tree) - EXTRAS - set(ONLY_IN) - sys.stdlib_module_names]
    return wrong


def stays_short(name, source):
    wrong = [f"{name}.py has {len(source.splitlines())} lines"] if len(source.splitlines()) > 300 else []
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > 60:
            wrong.append(f"{node.name} has {node.end_lineno - node.lineno + 1} lines")
    return wrong


MODULE_RULES = [imports_what_it_may, stays_short]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rule", MODULE_RULES, ids=lambda rule: rule.__name__)
def test_module(rule, name):
    assert rule(name, MODULES[name]) == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (imports_what_it_may, "data", "from slm_lib import attention"),
        (imports_what_it_may, "data", "import slm_lib.attention"),
        (imports_what_it_may, "data", "def f():\n    from slm_lib.check import same"),
        (imports_what_it_may, "data", "import scipy"),
        (imports_what_it_may, "data", "from . import playhouse"),
        (imports_what_it_may, "blocks", "from slm_lib.attention import *"),
        (imports_what_it_may, "check", "import matplotlib.pyplot as plt"),
        (imports_what_it_may, "plot", "from ipywidgets import VBox"),
        (stays_short, "data", "x = 1\n" * 301),
        (stays_short, "data", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_a_broken_module_is_caught(rule, name, source):
    assert rule(name, source)


def test_sound_modules_pass():
    source = "import math\nimport torch\nfrom slm_lib import data\n" + "def f():\n" + "    x = 1\n" * 59
    assert [problem for rule in MODULE_RULES for problem in rule("ngrams", source)] == []


# --- one noun: notebook, module, test; in reading order ---------------------------------------------------------------


def names_agree(notebooks, modules, tests, unopened):
    """What is wrong with the names in the three folders, given as stems."""
    nouns = [re.sub(r"^\d\d_", "", stem) for stem in notebooks]
    wrong = [f"{stem} should be number {i:02d}" for i, stem in enumerate(notebooks) if stem[:3] != f"{i:02d}_"]
    wrong += [f"{noun} has no place in the reading order" for noun in nouns if noun not in ORDER]
    if [noun for noun in ORDER if noun in nouns] != [noun for noun in nouns if noun in ORDER]:
        wrong.append(f"the notebooks are not in reading order: {nouns}")
    content = [name for name in modules if name not in PLUMBING | {"__init__"}]
    for name in content:
        is_open = OPENED_ELSEWHERE.get(name, name) in nouns
        if name not in CONTENT:
            wrong.append(f"{name}.py is neither a noun of the series nor plumbing")
        elif not is_open and name not in unopened:
            wrong.append(f"{name}.py has no notebook that opens it")
        elif is_open and name in unopened:
            wrong.append(f"{name} is opened now: take it from UNOPENED")
    wrong += [f"{name} is in UNOPENED but not in slm_lib" for name in unopened - set(modules)]
    tested = {TESTED_ELSEWHERE.get(name, name) for name in modules} - {"__init__", "__main__"}
    wrong += [f"tests/test_{name}.py is missing" for name in tested if f"test_{name}" not in tests]
    return wrong + [f"{n} has no module" for n in nouns if n not in modules and n not in WITHOUT_MODULE]


def test_names_agree():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert names_agree([lesson.path.stem for lesson in LESSONS], list(MODULES), tests, UNOPENED) == []


@pytest.mark.parametrize(
    "change",
    [
        {"notebooks": ["00_welcome", "02_data"]},
        {"notebooks": ["00_data", "01_welcome"]},
        {"notebooks": ["00_welcome", "01_data", "02_dragons"]},
        {"notebooks": ["00_welcome", "01_data", "02_ngrams"]},
        {"notebooks": ["00_welcome"]},
        {"notebooks": ["00_welcome", "01_data", "02_attention"]},
        {"modules": ["data", "utils"]},
        {"modules": ["data"]},
        {"tests": {"test_data"}},
    ],
)
def test_disagreeing_names_are_caught(change):
    sound = {
        "notebooks": ["00_welcome", "01_data"],
        "modules": ["__init__", "__main__", "check", "data", "attention"],
        "tests": {"test_check", "test_data", "test_attention", "test_structure"},
        "unopened": {"attention"},
    }
    assert names_agree(**sound) == []
    assert names_agree(**{**sound, **change})


def test_exercises_have_solutions():
    with_exercises = {lesson.path.name for lesson in LESSONS if any("check.exercise" in c.calls for c in lesson.cells)}
    assert {solution.path.name for solution in SOLUTIONS} == with_exercises


# --- rules for every stored notebook ----------------------------------------------------------------------------------


def comes_from_one_clean_run(notebook):
    counts = [cell.count for cell in notebook.cells]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def shows_no_errors(notebook):
    wrong = []
    for cell in notebook.cells:
        for output in cell.outputs:
            if output["output_type"] == "error" and not cell.tags & MEANT_TO_FAIL:
                wrong.append(f"error: {output.get('evalue')}")
            if output.get("name") == "stderr":
                wrong.append(f"stderr: {''.join(output['text'])[:200]}")
    return wrong


def shows_no_machine_paths(notebook):
    texts = [text for cell in notebook.cells for text in cell.texts]
    return [f"a path of a machine: {text[:200]}" for text in texts if MACHINE_PATH.search(text)]


def is_small(notebook):
    return [f"{notebook.size / 1000:.0f} kB"] if notebook.size > 800_000 else []


def is_seen_by_nbval(notebook):
    wrong = []
    for cell in notebook.cells:
        if cell.lines[-1].rstrip().endswith(";"):
            wrong.append(f"nbval does not compare a cell that ends in ';': {cell.lines[-1]}")
        if "nbval-skip" in cell.tags:
            wrong.append(f"a cell is skipped: {cell.lines[0]}")
        bad = {"interact", "interactive_output", "Output", "clear_output"}
        wrong += [f"nbval cannot compare {call}" for call in cell.calls if call.split(".")[-1] in bad]
        if any("image/svg+xml" in output.get("data", {}) for output in cell.outputs):
            wrong.append("an SVG differs in every run")
    return wrong


def needs_no_network(notebook):
    wrong = [f"a remote image: {text[:80]}" for text in notebook.prose
             if re.search(r"!\[[^\]]*\]\(\s*https?:|<img[^>]+src=[\"']?https?:", text)]
    lines = [line for cell in notebook.cells for line in cell.lines]
    fetch = re.compile(r"\s*[!%]\s*(pip|conda|uv|wget|curl|git)\b")
    return wrong + [f"fetches: {line}" for line in lines if fetch.match(line)]


STORED_RULES = [
    comes_from_one_clean_run,
    shows_no_errors,
    shows_no_machine_paths,
    is_small,
    is_seen_by_nbval,
    needs_no_network,
]

# --- rules for a lesson -----------------------------------------------------------------------------------------------


def has_small_cells(notebook):
    lengths = sorted(len(cell.lines) for cell in notebook.cells)
    wrong = [f"a cell of {lengths[-1]} lines"] if lengths[-1] > 25 else []
    most = lengths[int(0.9 * (len(lengths) - 1))]
    wrong += [f"nine in ten cells should have at most 15 lines, here {most}"] if most > 15 else []
    median = statistics.median(lengths)
    return wrong + ([f"the median cell has {median} lines, more than 4"] if median > 4 else [])


def has_headings(notebook):
    heads = [line for text in notebook.prose for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines()]
    ones, twos = (sum(line.startswith(mark) for line in heads) for mark in ("# ", "## "))
    return [] if ones == 1 and 4 <= twos <= 9 else [f"{ones} headings of the first level and {twos} of the second"]


def compares_half(notebook):
    talking = [cell for cell in notebook.cells if any(cell.texts)]
    strict = [cell for cell in talking if not cell.tags & UNCOMPARED]
    return [] if talking and len(strict) >= len(talking) / 2 else [f"{len(strict)} of {len(talking)} outputs compared"]


def asserts_what_it_does_not_compare(notebook):
    def checks(cell):
        return cell.asserts or any(call.startswith("check.") for call in cell.calls)

    pairs = zip(notebook.cells, [*notebook.cells[1:], None], strict=True)
    uncompared = [(cell, after) for cell, after in pairs if cell.tags & UNCOMPARED]
    loose = [cell for cell, after in uncompared if not checks(cell) and not (after and checks(after))]
    return [f"nothing is asserted in or right after the uncompared cell {cell.lines[0]!r}" for cell in loose]


def defines_no_library_name(notebook):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = {node.name for node in ast.walk(notebook.tree) if isinstance(node, kinds)}
    return [f"{name} is a name of the library" for name in defined & LIBRARY]


def uses_only_open_boxes(notebook):
    if notebook.noun == "welcome":  # it borrows everything
        return []
    borrowed = " ".join(line for text in notebook.prose[:5] for line in text.splitlines() if "borrow" in line.lower())
    opened = ORDER.index(notebook.noun)
    used = [m for m in slm_imports(notebook.tree) if m in CONTENT and not re.search(rf"\b{m}\b", borrowed)]
    late = [m for m in used if ORDER.index(OPENED_ELSEWHERE.get(m, m)) > opened]
    wrong = [f"{m} is not open yet, and the contract does not borrow it" for m in late]
    return wrong + (["imports ipywidgets itself"] if "ipywidgets" in packages(notebook.tree) else [])


def by_hand_names(tree):
    """The names whose value comes, maybe through other names, from a function called *_by_hand."""

    def by_hand(node):
        return any(isinstance(n, ast.Name) and (n.id.endswith("_by_hand") or n.id in found) for n in ast.walk(node))

    found, kinds = set(), ast.Assign | ast.AugAssign | ast.AnnAssign
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.value is not None and by_hand(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return by_hand


def proves(notebook, names):
    """Which of `names` stand in a cell where `check.same` compares something made by hand."""
    by_hand, proved = by_hand_names(notebook.tree), set()
    for cell in notebook.cells:
        calls = [n for n in ast.walk(cell.tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "check.same"]
        if any(call.args and by_hand(call.args[0]) for call in calls):
            proved |= {name for name in names if re.search(rf"\b{name}\b", cell.source)}
    return proved


LESSON_RULES = [
    has_small_cells,
    has_headings,
    compares_half,
    asserts_what_it_does_not_compare,
    defines_no_library_name,
    uses_only_open_boxes,
]


@pytest.mark.parametrize("rule", STORED_RULES + LESSON_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_lesson(lesson, rule):
    assert rule(lesson) == []


@pytest.mark.parametrize("rule", STORED_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda solution: solution.path.stem)
def test_solution(solution, rule):
    assert rule(solution) == []


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_every_public_name_is_proved_where_its_box_is_opened(lesson):
    opened = [name for name in MODULES if OPENED_ELSEWHERE.get(name, name) == lesson.noun]
    needed = {f"{module}.{name}" for module in opened for name in public(MODULES[module])} - set(UNPROVED)
    proved = proves(lesson, {name.split(".")[1] for name in needed})
    assert {name for name in needed if name.split(".")[1] not in proved} == set()


def test_names_that_need_no_proof_exist():
    known = {f"{module}.{name}" for module, source in MODULES.items() for name in public(source)}
    assert set(UNPROVED) - known == set()


# --- broken notebooks -------------------------------------------------------------------------------------------------


def code(source, *outputs, tags=(), count=None):
    return {"cell_type": "code", "source": source, "outputs": list(outputs), "execution_count": count,
            "metadata": {"tags": list(tags)}}


def prose(text):
    return {"cell_type": "markdown", "source": text, "metadata": {}}


def said(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def write(folder, cells, noun="ngrams"):
    number = 0
    for cell in cells:
        if cell["cell_type"] == "code" and cell["execution_count"] is None:
            number += 1
            cell["execution_count"] = number
    path = folder / f"02_{noun}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return Notebook(path)


def sound():
    return [prose("# Counting\n\nIt borrows `training`."), prose("## A\n\n## B\n\n## C\n\n## D"),
            code("from slm_lib import check, data, training\nprint(1)", said("1"))]


LONG = "\n".join(["x = 1"] * 26)
BROKEN = [
    (comes_from_one_clean_run, [code("x = 1", count=7)]),
    (shows_no_errors, [code("1/0", {"output_type": "error", "ename": "Z", "evalue": "division", "traceback": []})]),
    (shows_no_errors, [code("x = 1", said("warning", "stderr"))]),
    (shows_no_machine_paths, [code("print(p)", said("/home/ann/slm/data.txt"))]),
    (shows_no_machine_paths, [code("p", {"output_type": "execute_result", "data": {"text/plain": "'C:\\\\Users'"}})]),
    (is_small, [code("x = 1", said("a" * 800_000))]),
    (is_seen_by_nbval, [code("plt.plot(x);")]),
    (is_seen_by_nbval, [code("print(1)", tags=["nbval-skip"])]),
    (is_seen_by_nbval, [code("print(1)  # NBVAL_SKIP")]),
    (is_seen_by_nbval, [code("widgets.interact(f, x=3)")]),
    (is_seen_by_nbval, [code("f", {"output_type": "display_data", "data": {"image/svg+xml": "<svg/>"}})]),
    (needs_no_network, [prose("![a cat](https://example.org/cat.png)")]),
    (needs_no_network, [prose('<img width="3" src="http://example.org/cat.png">')]),
    (needs_no_network, [code("!pip install torch")]),
    (has_small_cells, [code(LONG)]),
    (has_small_cells, [code("\n".join(["x = 1"] * 16)) for _ in range(2)]),
    (has_small_cells, [code("x = 1\n" * 5) for _ in range(3)]),
    (has_headings, [prose("# A second title")]),
    (has_headings, [prose("## E\n## F\n## G\n## H\n## I\n## J")]),
    (compares_half, [code("print(2)", said("2"), tags=["nbval-ignore-output"]) for _ in range(2)]),
    (asserts_what_it_does_not_compare, [code("print(2)", said("2"), tags=["nbval-ignore-output"])]),
    (asserts_what_it_does_not_compare, [code("print(2)  # NBVAL_IGNORE_OUTPUT"), code("x = 1"), code("assert x")]),
    (defines_no_library_name, [code("def draw_batch(ids):\n    return ids")]),
    (defines_no_library_name, [code("class CharTokenizer:\n    pass")]),
    (uses_only_open_boxes, [code("from slm_lib.attention import CausalSelfAttention")]),
    (uses_only_open_boxes, [code("import ipywidgets")]),
]


@pytest.mark.parametrize(("rule", "cells"), BROKEN, ids=[f"{i}-{rule.__name__}" for i, (rule, _) in enumerate(BROKEN)])
def test_a_broken_notebook_is_caught(rule, cells, tmp_path):
    assert rule(write(tmp_path, sound() + cells))


def test_a_sound_notebook_passes_and_every_rule_is_seen_to_fail(tmp_path):
    notebook = write(tmp_path, sound())
    assert [problem for rule in STORED_RULES + LESSON_RULES for problem in rule(notebook)] == []
    assert {rule for rule, _ in BROKEN} == {*STORED_RULES, *LESSON_RULES}


@pytest.mark.parametrize(
    ("sources", "proved"),
    [
        (["check.same(split_by_hand(t), data.split(c), 'split')"], {"split"}),
        (["mine = split_by_hand(t)", "first, _ = mine", "check.same(first, data.split(c)[0])"], {"split"}),
        (["check.same(data.split(c), data.split(c))"], set()),
        (["check.same(data.split(c), split_by_hand(t))"], set()),
        (["print(split_by_hand(t), data.split(c))", "check.same(1, 1)"], set()),
        (["data.split(c)", "check.same(clean_by_hand(t), data.clean(t, s))"], set()),
    ],
)
def test_what_counts_as_a_proof(sources, proved, tmp_path):
    assert proves(write(tmp_path, [code(source) for source in sources]), {"split"}) == proved
