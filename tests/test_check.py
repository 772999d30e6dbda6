import json
import math

import nbformat
import numpy as np
import pytest
import torch
from exercises import assert_graded
from nbformat import v4

from slm_lib import check
from slm_lib.data import Corpus
from slm_lib.ngrams import LossUnits, loss_units

TABLE = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7


@pytest.mark.parametrize(
    ("mine", "theirs", "printed"),
    [
        (3, 3, "integers"),
        ([1, 2, 3], torch.tensor([1, 2, 3]), "integers, shape (3,)"),
        (0.1 + 0.2, 0.3, "float64"),
        ((TABLE + 1e-12).tolist(), TABLE, "float64, shape (2, 3)"),
        ([torch.tensor(1.0).double(), 2.0], np.array([1.0, 2.0]), "float64, shape (2,)"),
        ([0.0, -math.inf], torch.tensor([0.0, -math.inf]).double(), "float64, shape (2,)"),
        (TABLE > 0.5, (TABLE > 0.5).numpy(), "truth values, shape (2, 3)"),
        ("to be", "to be", "5 characters"),
        (["to", "be"], ["to", "be"], "2 items"),
        ([[1, 2], [3]], [[1, 2], [3]], "2 items"),
        ({"a": TABLE, "b": "x"}, {"b": "x", "a": TABLE.clone()}, "2 entries"),
        ((math.log(4), 2.0, 4.0), loss_units(math.log(4)), "float64, shape (3,)"),
    ],
)
def test_same_says_what_it_proved(mine, theirs, printed, capsys):
    check.same(mine, theirs, "a thing")
    assert capsys.readouterr().out == f"same: a thing ({printed})\n"


@pytest.mark.parametrize(
    ("mine", "theirs", "place"),
    [
        (3, 4, "mine is 3, the library's 4"),
        ([1, 2, 3], [1, 2, 4], "at [2]: mine is 3, the library's 4"),
        (1.0, 1.0 + 1e-8, "differ"),
        (TABLE, TABLE + 1e-8, "at [0, 0]"),
        (TABLE, TABLE.T, "shapes differ"),
        (TABLE, TABLE.flatten(), "shapes differ"),
        (math.nan, math.nan, "nan"),
        (True, 1, "types differ"),
        (1, "1", "mine is 1, the library's '1'"),
        (None, 1, "mine is None"),
        ("to be or not", "to be and not", "from character 6"),
        ("to be", "to be or", "from character 5"),
        (["to", "be"], ["to", "bee"], "at [1] from character 2"),
        ([[1, 2], [3]], [[1, 2], [4]], "at [1][0]"),
        (["to"], ["to", "be"], "length 1"),
        ({"a": 1}, {"a": 1, "b": 2}, "keys"),
        ({"a": TABLE}, {"a": TABLE + 1}, "at ['a'][0, 0]"),
        (LossUnits(1.0, 2.0, 3.0), LossUnits(1.0, 2.0, 3.1), "at [2]"),
    ],
)
def test_same_names_the_first_difference(mine, theirs, place, capsys):
    with pytest.raises(AssertionError) as caught:
        check.same(mine, theirs, "a thing")
    assert place in str(caught.value)
    assert str(caught.value).startswith("a thing: ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_refuses_floats_that_hide_errors(dtype):
    rough = TABLE.to(dtype)
    pairs = [(rough, TABLE), (TABLE, rough), (list(rough[0]), TABLE[0]), ({"a": rough}, {"a": TABLE})]
    for mine, theirs in pairs:
        with pytest.raises(TypeError, match="float64"):
            check.same(mine, theirs, "a thing")
    with pytest.raises(TypeError, match="float64"):
        check.same(np.float32(1), 1.0, "a thing")


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, 3).double(), np.zeros(0)])
def test_same_refuses_to_compare_nothing(nothing):
    with pytest.raises(ValueError, match="proves nothing"):
        check.same(nothing, type(nothing)(nothing) if isinstance(nothing, list) else nothing + 0, "a thing")


def test_same_refuses_a_thing_compared_to_itself():
    with pytest.raises(ValueError, match="same object"):
        check.same(TABLE, TABLE, "a thing")


def test_claim_prints_the_bounds_and_never_the_value(capsys):
    check.claim("seven beats two", 1.532917, high=1.6)
    check.claim("the share is sensible", torch.tensor(0.5), 0.1, 0.9)
    check.claim("it is sorted", np.bool_(True))
    check.claim("all are", (TABLE >= 0).all())
    assert capsys.readouterr().out.splitlines() == [
        "claim: seven beats two (at most 1.6)",
        "claim: the share is sensible (at least 0.1, at most 0.9)",
        "claim: it is sorted",
        "claim: all are",
    ]


@pytest.mark.parametrize(
    ("value", "bounds"), [(1.7, {"high": 1.6}), (1.5, {"low": 1.6}), (math.nan, {"low": 0}), (False, {})]
)
def test_claim_fails(value, bounds):
    with pytest.raises(AssertionError, match="seven beats two"):
        check.claim("seven beats two", value, **bounds)


def test_a_claim_that_cannot_fail_is_refused():
    with pytest.raises(ValueError, match="could not fail"):
        check.claim("a number", 3.0)


def test_predict_then_reveal(capsys):
    guess = check.predict("the first loss, in nats", 3.0)
    assert guess.guess == 3.0
    guess.reveal(torch.tensor(4.174387))
    check.predict("the most frequent character", "e").reveal(" ")
    assert capsys.readouterr().out.splitlines() == [
        "predict: the first loss, in nats? your guess: 3",
        "the first loss, in nats: your guess 3, the truth 4.17",
        "predict: the most frequent character? your guess: e",
        "the most frequent character: your guess e, the truth  ",
    ]


def test_source_is_the_real_source():
    shown = check.source(check.Prediction.reveal)
    assert repr(shown).startswith("def reveal(self")
    assert shown._repr_markdown_() == f"```python\n{shown.text}\n```"


def double(x):
    return 2 * x


# As in a notebook: pytest adds its own words to the asserts that it reads in a file.
exec("def grade_double(answer):\n    assert answer(3) == 6, '3 should become 6'", globals())


def stub(x):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (double, "right"),
        (stub, "not attempted"),
        (lambda x: x, "not yet: 3 should become 6"),
        (lambda x: x / 0, "not yet: it stops with ZeroDivisionError: division by zero"),
        (lambda: 6, "not yet: it stops with TypeError: <lambda>() takes 0 positional arguments but 1 was given"),
    ],
)
def test_exercise(answer, verdict, capsys):
    result = check.exercise(answer, globals()["grade_double"])
    assert result == verdict
    assert capsys.readouterr().out == f"{answer.__name__}: {result}\n"


def lesson(folder, *cells):
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in cells])
    nbformat.write(notebook, folder / "01_lesson.ipynb")
    return folder / "01_lesson.ipynb"


def test_graders_come_from_the_lesson(tmp_path):
    path = lesson(
        tmp_path,
        ("%matplotlib inline\nimport math as m\nprint(1 / 0)", []),
        ("FACTOR = 2\ndef grade_x(answer):\n    assert answer(m.pi) == FACTOR * m.pi + OFFSET, 'wrong'", ["grader"]),
    )
    namespace = {"OFFSET": 0}
    found = check.graders(path, namespace)
    assert set(found) == {"FACTOR", "grade_x", "m"}
    assert namespace == {"OFFSET": 0}
    assert check.exercise(double, found["grade_x"]) == "right"


def test_a_lesson_without_graders_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no cell tagged 'grader'"):
        check.graders(lesson(tmp_path, ("x = 1", [])))


def test_ladder_prints_and_keeps_rows(tmp_path, monkeypatch, capsys):
    corpus = Corpus("playhouse", "", "", "", 1.0, "ab", 0)
    monkeypatch.delenv("SLM_LADDER", raising=False)
    check.ladder("uniform", math.log(64), "shakespeare")
    path = tmp_path / "ladder.json"
    monkeypatch.setenv("SLM_LADDER", str(path))
    check.ladder("GPT", 1.25, corpus, parameters=1000)
    check.ladder("pairs", 3.0, "playhouse", chars_per_token=2.0)
    check.ladder("GPT", torch.tensor(1.2), corpus, parameters=2000)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "ladder: uniform on shakespeare: 4.16 nats · 6.00 bits per character · perplexity 64.00"
    assert printed[1].endswith("0.25 nats per character above the floor")
    rows = json.loads(path.read_text())
    assert [(row["name"], row["loss"]) for row in rows] == [("pairs", 3.0), ("GPT", 1.2)]
    assert rows[1]["parameters"] == 2000
    check.show_ladder("playhouse", path)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["playhouse", "pairs", "GPT"]  # 1.5 nats per character, then 1.2
    assert "2.16" in table[1]


def test_an_empty_ladder_says_so(tmp_path, capsys):
    check.show_ladder(path=tmp_path / "none.json")
    assert "still empty" in capsys.readouterr().out


def test_wrong_answers_to_an_exercise_are_told_from_right_ones(tmp_path):
    stub = ("def my_double(x):\n    raise NotImplementedError", [])
    grader = ("def grade_double(answer):\n    assert answer(3) == 6, 'wrong'", ["grader"])
    lesson(tmp_path, ("from slm_lib import check", []), stub, grader, ("check.exercise(my_double, grade_double)", []))
    (tmp_path / "solutions").mkdir()
    lesson(tmp_path / "solutions", ("def my_double(x):\n    return x + x", []))
    halve, triple = lambda x: x / 2, lambda x: 3 * x
    assert_graded("lesson", {"my_double": [halve, triple]}, tmp_path)
    for wrong in ({}, {"my_double": [halve]}, {"my_double": [halve, double]}, {"my_triple": [halve, triple]}):
        with pytest.raises(AssertionError):
            assert_graded("lesson", wrong, tmp_path)
    lesson(tmp_path / "solutions", ("def my_double(x):\n    return x * x", []))
    with pytest.raises(AssertionError):
        assert_graded("lesson", {"my_double": [halve, triple]}, tmp_path)


def test_a_stored_result_names_its_command(tmp_path, capsys):
    (tmp_path / "speed").mkdir()
    stored = {"command": "python benchmarks/speed.py", "machine": {"cores": 2}, "rows": [{"seed": 0, "loss": 2.0}]}
    (tmp_path / "speed" / "result.json").write_text(json.dumps(stored))
    assert check.result("speed", tmp_path) == stored
    assert "`python benchmarks/speed.py`" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no result 'size': these are stored: speed"):
        check.result("size", tmp_path)


def test_a_large_count_is_printed_in_full(capsys):
    check.claim("parameters", 124_439_808, 124_439_808, 124_439_808)
    check.claim("small", 0.5, low=0.25, high=1e6)
    large, small = capsys.readouterr().out.splitlines()
    assert large == "claim: parameters (equal to 124,439,808)"
    assert small == "claim: small (at least 0.25, at most 1,000,000)"
