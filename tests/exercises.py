"""For the tests of lessons: their cells, whether a proof notices what was broken, and whether graders grade."""

import ast
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from slm_lib import check

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def lesson_path(noun: str, notebooks: Path = NOTEBOOKS) -> Path:
    """The notebook of a lesson, whatever its number."""
    (path,) = notebooks.glob(f"[0-9][0-9]_{noun}.ipynb")
    return path


def code_cells(notebook: Path) -> list[str]:
    """The sources of a notebook's code cells."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def notices(proof: str, names: dict, *others: type[Exception]) -> bool:
    """Whether a cell that proves something fails with these names; exceptions of `others` count as noticing too."""
    try:
        exec(proof, names)
    except (AssertionError, *others):
        return True
    return False


def execute_but_for_long_work(source: str, names: dict, long: bool, *suppressed: type[Exception]) -> None:
    """Execute a cell with these names, of a long one the functions alone; what rests on long work may raise."""
    kept = [node for node in _parsed(source).body if not long or isinstance(node, ast.FunctionDef)]
    with contextlib.suppress(*suppressed):
        exec(compile(ast.Module(kept, []), "lesson", "exec"), names)
    if "plt" in names:
        names["plt"].close("all")


def assert_graded(noun: str, wrong: dict[str, list[Callable]], notebooks: Path = NOTEBOOKS) -> None:
    """Try every exercise of the lesson on `noun`: its stub, its solution, and the wrong answers given for each.

    `wrong` maps each exercise (the name of its stub, such as "my_encode") to at least two answers that a reader might
    well give.
    """
    lesson = lesson_path(noun, notebooks)
    grader_of = _exercises(lesson)
    assert set(wrong) == set(grader_of), f"the exercises are {sorted(grader_of)}, wrong answers are for {sorted(wrong)}"
    graders = check.graders(lesson)
    stubs, solutions = _functions(lesson, set(wrong)), _functions(notebooks / "solutions" / lesson.name, set(wrong))
    for name, answers in wrong.items():
        grader = graders[grader_of[name]]
        assert check.exercise(stubs[name], grader) == "not attempted"
        assert check.exercise(solutions[name], grader) == "right"
        assert len(answers) >= 2, f"{name} has {len(answers)} wrong answers: give at least two"
        for answer in answers:
            verdict = check.exercise(answer, grader)
            assert verdict.startswith("not yet: "), f"{name}: the wrong answer {answer.__name__} is called {verdict!r}"


def _exercises(lesson: Path) -> dict[str, str]:
    """The answers and graders that the lesson hands to `check.exercise`."""
    calls = [node for text in code_cells(lesson) for node in ast.walk(_parsed(text)) if isinstance(node, ast.Call)]
    graded = [call for call in calls if ast.unparse(call.func) == "check.exercise"]
    return {ast.unparse(call.args[0]): ast.unparse(call.args[1]) for call in graded}


def _functions(notebook: Path, names: set[str]) -> dict[str, Callable]:
    """The functions of these names, made by running a notebook's imports and definitions alone."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    body = [node for text in code_cells(notebook) for node in _parsed(text).body if isinstance(node, kinds)]
    space = {}
    exec(compile(ast.Module(body, []), str(notebook), "exec"), space)
    return {name: space[name] for name in names}


def _parsed(text: str) -> ast.Module:
    return ast.parse("\n".join("pass" if line.startswith(("%", "!")) else line for line in text.split("\n")))
