"""For the tests of a lesson's graders: the stub is not attempted, the solution is right, wrong answers are caught."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

from slm_lib import check

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def assert_graded(noun: str, wrong: dict[str, list[Callable]], notebooks: Path = NOTEBOOKS) -> None:
    """Try every exercise of the lesson on `noun`: its stub, its solution, and the wrong answers given for each.

    `wrong` maps each exercise (the name of its stub, such as "my_encode") to at least two answers that a reader might
    well give.
    """
    (lesson,) = notebooks.glob(f"[0-9][0-9]_{noun}.ipynb")
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


def _sources(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _exercises(lesson: Path) -> dict[str, str]:
    """The answers and graders that the lesson hands to `check.exercise`."""
    calls = [node for text in _sources(lesson) for node in ast.walk(_parsed(text)) if isinstance(node, ast.Call)]
    graded = [call for call in calls if ast.unparse(call.func) == "check.exercise"]
    return {ast.unparse(call.args[0]): ast.unparse(call.args[1]) for call in graded}


def _functions(notebook: Path, names: set[str]) -> dict[str, Callable]:
    """The functions of these names, made by running a notebook's imports and definitions alone."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    body = [node for text in _sources(notebook) for node in _parsed(text).body if isinstance(node, kinds)]
    space = {}
    exec(compile(ast.Module(body, []), str(notebook), "exec"), space)
    return {name: space[name] for name in names}


def _parsed(text: str) -> ast.Module:
    return ast.parse("\n".join("pass" if line.startswith(("%", "!")) else line for line in text.split("\n")))
