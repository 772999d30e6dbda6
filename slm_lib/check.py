"""What lets a reader trust a notebook: proofs, claims, predictions, graded exercises, and the ladder of results."""

import ast
import dataclasses
import inspect
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slm_lib.ngrams import loss_units

ATOL, RTOL = 1e-10, 1e-12  # in float64 a right answer is off by about 1e-15, a wrong epsilon by far more than this
RESULTS = Path(__file__).parents[1] / "results"
LADDER = RESULTS / "ladder.json"


# --- proofs -----------------------------------------------------------------------------------------------------------


def same(mine: Any, theirs: Any, what: str = "by hand and in the library") -> None:
    """Prove that two results agree, and print what was proved.

    Takes numbers, tensors, arrays, strings, and lists or dictionaries of them. Integers and strings must agree exactly,
    floats to within 1e-10 + 1e-12 |theirs|. Raises AssertionError with the first place where they differ, TypeError
    for floats that are not float64, ValueError where nothing is compared.
    """
    if mine is theirs and isinstance(mine, Tensor | np.ndarray | list | dict):
        raise ValueError(f"{what}: both are one and the same object, which proves nothing: compute one of them by hand")
    print(f"same: {what} ({_compare(mine, theirs, what, '')})")


def _compare(mine: Any, theirs: Any, what: str, place: str) -> str:
    """Compare two results; return in words what was compared, or raise AssertionError at the first difference."""
    mine, theirs = map(_fields, (mine, theirs))
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        _compare_plain(set(mine), set(theirs), what, f"{place} keys")
        for key in theirs:
            _compare(mine[key], theirs[key], what, f"{place}[{key!r}]")
        return f"{len(theirs)} entries"
    a, b = _array(mine, what), _array(theirs, what)
    if a is not None and b is not None:
        return _compare_arrays(a, b, what, place)
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        if len(mine) != len(theirs):
            raise AssertionError(f"{what}: mine has length {len(mine)}, the library's {len(theirs)}")
        for i, pair in enumerate(zip(mine, theirs, strict=True)):
            _compare(*pair, what, f"{place}[{i}]")
        return f"{len(theirs)} items"
    return _compare_plain(mine, theirs, what, place)


def _fields(x: Any) -> Any:
    return dataclasses.astuple(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else x


def _compare_plain(mine: Any, theirs: Any, what: str, place: str) -> str:
    if isinstance(mine, str) and isinstance(theirs, str) and mine != theirs:
        i = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        near = slice(max(0, i - 10), i + 10)
        found = f"mine has {mine[near]!r}, the library {theirs[near]!r}"
        raise AssertionError(f"{what}: differ{_at(place)} from character {i} on: {found}")
    if type(mine) is not type(theirs) or mine != theirs:
        raise AssertionError(f"{what}: differ{_at(place)}: mine is {mine!r}, the library's {theirs!r}")
    if isinstance(theirs, str):
        return f"{len(theirs)} characters"
    return type(theirs).__name__


def _array(x: Any, what: str) -> np.ndarray | None:
    """`x` as an array of integers, truth values or float64; None for what is not numeric."""
    if isinstance(x, Tensor):
        if x.is_floating_point() and x.element_size() < 8:
            _refuse(str(x.dtype).removeprefix("torch."), what)
        return x.detach().cpu().numpy()
    if isinstance(x, list | tuple):
        if {type(item) for item in x} <= {int, float}:  # quick, for texts of a million ids
            return np.array(x)
        items = [_array(item, what) for item in x]
        if any(item is None or item.shape != items[0].shape for item in items):
            return None
        return np.array(items)
    if not isinstance(x, bool | int | float | complex | np.ndarray | np.generic):
        return None
    x = np.asarray(x)
    if x.dtype in (np.float16, np.float32, np.complex64):
        _refuse(str(x.dtype), what)
    return x if x.dtype.kind in "biufc" else None


def _refuse(dtype: str, what: str) -> None:
    problem = f"{dtype} cannot tell a right answer from an almost right one"
    raise TypeError(f"{what}: {problem}: compute in float64, as model.double() does")


def _compare_arrays(mine: np.ndarray, theirs: np.ndarray, what: str, place: str) -> str:
    if mine.shape != theirs.shape:
        raise AssertionError(f"{what}: shapes differ{_at(place)}: mine is {mine.shape}, the library's {theirs.shape}")
    if theirs.size == 0:
        raise ValueError(f"{what}: both are empty, which proves nothing: compare something")
    floats = "f" in mine.dtype.kind + theirs.dtype.kind or "c" in mine.dtype.kind + theirs.dtype.kind
    if (mine.dtype.kind == "b") != (theirs.dtype.kind == "b"):
        raise AssertionError(f"{what}: types differ: mine is {mine.dtype}, the library's {theirs.dtype}")
    equal = np.isclose(mine, theirs, rtol=RTOL, atol=ATOL) if floats else mine == theirs  # NaN is never equal
    if not equal.all():
        first = tuple(int(i) for i in np.argwhere(~equal)[0])
        place += f"[{', '.join(map(str, first))}]" if first else ""
        a, b = mine[first].item(), theirs[first].item()
        raise AssertionError(f"{what}: differ{_at(place)}: mine is {a}, the library's {b}")
    kind = "float64" if floats else "truth values" if theirs.dtype.kind == "b" else "integers"
    return f"{kind}, shape {theirs.shape}" if theirs.shape else kind


def _at(place: str) -> str:
    return f" at {place.strip()}" if place else ""


# --- claims and predictions -------------------------------------------------------------------------------------------


def claim(text: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Assert what a sentence says, and print the sentence with its bounds.

    `value` is a number that must lie in low..high, or, without bounds, a truth value. Raises AssertionError where the
    claim does not hold, ValueError for a number without any bound: such a claim could not fail.
    """
    bounded = math.isfinite(low) or math.isfinite(high)
    if not bounded and not isinstance(value, bool | np.bool_) and str(getattr(value, "dtype", "")) != "torch.bool":
        raise ValueError(f"the claim {text!r} has neither low nor high and could not fail: give a bound")
    if not bounded:
        assert bool(value), f"the claim does not hold: {text}"
        print(f"claim: {text}")
        return
    least, most = f"at least {_bound(low)}", f"at most {_bound(high)}"
    bounds = f"{least}, {most}" if math.isfinite(low) and math.isfinite(high) else least if math.isfinite(low) else most
    bounds = f"equal to {_bound(low)}" if low == high else bounds
    assert low <= float(value) <= high, f"the claim does not hold: {text}: {float(value):.6g} is not {bounds}"
    print(f"claim: {text} ({bounds})")


def _bound(value: float) -> str:
    """A bound to six digits, but whole millions in full."""
    return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 and value == int(value) else f"{value:g}"


@dataclasses.dataclass
class Prediction:
    """A reader's guess, waiting for the truth."""

    question: str
    guess: Any

    def reveal(self, truth: Any) -> None:
        """Print the guess beside the truth; floats are shown to three digits."""
        print(f"{self.question}: your guess {_short(self.guess)}, the truth {_short(truth)}")


def predict(question: str, default: Any) -> Prediction:
    """Commit to a guess before the answer is computed; the reader replaces `default` by their own."""
    print(f"predict: {question}? your guess: {_short(default)}")
    return Prediction(question, default)


def _short(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor | np.generic) and np.ndim(value) == 0 else value
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Source:
    """Python source that a notebook shows in colour and a terminal as it is."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.text}\n```"


def source(thing: Any) -> Source:
    """The library's real source of a function, class or module, for display."""
    return Source(textwrap.dedent(inspect.getsource(thing)).rstrip())


# --- exercises --------------------------------------------------------------------------------------------------------


class Verdict(str):
    """What `exercise` returns; a notebook does not show it a second time."""

    def _ipython_display_(self) -> None:
        pass


def exercise(answer: Callable, grader: Callable[[Callable], None]) -> str:
    """Grade an answer; print and return "not attempted", "right" or "not yet: <what is wrong>". Never raises.

    `grader(answer)` raises AssertionError, with a message for the reader, where the answer is wrong.
    """
    try:
        grader(answer)
        verdict = "right"
    except NotImplementedError:
        verdict = "not attempted"
    except AssertionError as error:
        verdict = f"not yet: {error or 'the grader found a wrong result'}"
    except Exception as error:
        verdict = f"not yet: it stops with {type(error).__name__}: {error}"
    print(f"{answer.__name__}: {verdict}")
    return Verdict(verdict)


def graders(notebook: str | os.PathLike, namespace: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the imports and the cells tagged `grader` of a lesson over `namespace`; return the names they define."""
    cells = [c for c in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    code = [("".join(cell["source"]), "grader" in cell["metadata"].get("tags", [])) for cell in cells]
    if not any(tagged for _, tagged in code):
        raise ValueError(f"{notebook} has no cell tagged 'grader': tag the cells that define the graders")
    before = dict(namespace or {})
    space = dict(before)
    for text, tagged in code:
        exec(compile(text if tagged else _imports(text), str(notebook), "exec"), space)
    return {name: value for name, value in space.items() if name != "__builtins__" and before.get(name) is not value}


def _imports(text: str) -> str:
    """The top-level import statements of a cell; lines of IPython magic are skipped."""
    plain = "\n".join("pass" if line.startswith(("%", "!")) else line for line in text.split("\n"))
    kept = [node for node in ast.parse(plain).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, kept))


# --- results ----------------------------------------------------------------------------------------------------------


def result(name: str, folder: str | os.PathLike = RESULTS) -> dict[str, Any]:
    """What a program in benchmarks/ measured once and stored in results/<name>; prints the command that made it.

    Raises FileNotFoundError for a result that is not there.
    """
    path = Path(folder) / name / "result.json"
    if not path.is_file():
        there = ", ".join(sorted(p.parent.name for p in Path(folder).glob("*/result.json"))) or "none"
        raise FileNotFoundError(f"there is no result {name!r}: these are stored: {there}")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"measured by `{found['command']}` on {found['machine']['cores']} cores: {len(found['rows'])} rows")
    return found


# --- the ladder -------------------------------------------------------------------------------------------------------


def ladder(name: str, loss: float, corpus: Any, chars_per_token: float = 1.0, **facts: Any) -> None:
    """Print one rung: a model's loss on the whole validation text, in nats per token, and how far the floor is below.

    `corpus` is a Corpus or its name. Where `$SLM_LADDER` names a JSON file, the row is kept there, with `facts`.
    """
    loss, corpus_name, floor = float(loss), getattr(corpus, "name", corpus), getattr(corpus, "floor", None)
    above = "" if floor is None else f" · {loss / chars_per_token - floor:.2f} nats per character above the floor"
    print(f"ladder: {name} on {corpus_name}: {loss_units(loss, chars_per_token)}{above}")
    if os.environ.get("SLM_LADDER"):
        row = {"corpus": corpus_name, "name": name, "loss": round(loss, 4)}
        row["chars_per_token"] = round(chars_per_token, 4)
        kept = [r for r in read_ladder(os.environ["SLM_LADDER"]) if (r["corpus"], r["name"]) != (corpus_name, name)]
        write_ladder([*kept, row | facts], os.environ["SLM_LADDER"])


def read_ladder(path: str | os.PathLike = LADDER) -> list[dict[str, Any]]:
    """The rows of a ladder file, in the order in which the notebooks added them; none where there is no file."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else []


def write_ladder(rows: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Keep rows of the ladder as JSON."""
    Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def climb(rows: list[dict[str, Any]], corpus: str) -> list[tuple[dict[str, Any], Any]]:
    """The rows of one corpus with their loss in all its units, from the worst to the best."""
    rungs = [(row, loss_units(row["loss"], row["chars_per_token"])) for row in rows if row["corpus"] == corpus]
    return sorted(rungs, key=lambda rung: -rung[1].bits_per_character)


def show_ladder(corpus: str | None = None, path: str | os.PathLike = LADDER) -> None:
    """Print the recorded results, best last, for one corpus or for each."""
    rows = read_ladder(path)
    if not rows:
        print("the ladder is still empty: `make record` fills it")
    for name in [corpus] if corpus else sorted({row["corpus"] for row in rows}, reverse=True):
        print(f"{name:51}{'nats':>8}{'bits/char':>11}{'perplexity':>12}")
        for row, units in climb(rows, name):
            print(f"  {row['name']:49}{units.nats:8.2f}{units.bits_per_character:11.2f}{units.perplexity:12.2f}")
