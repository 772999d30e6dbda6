"""Scores against scikit-learn and sacrebleu on thousands of random cases, and what they say to bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lib import scores

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")

LABELS = st.sampled_from("abcde")
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=25)
WORDS = st.lists(st.sampled_from(["the", "king", "is", "in", "his", "hall", "a", "crown"]), max_size=9).map(" ".join)
CASES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6)
thousand = settings(max_examples=1000)


def close(mine, theirs):
    return np.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


# --- labels, as in scikit-learn ---------------------------------------------------------------------------------------


@thousand
@given(PAIRS)
def test_accuracy_and_confusion_are_those_of_scikit_learn(pairs):
    truth, guesses = zip(*pairs, strict=True)
    assert close(scores.accuracy(truth, guesses), metrics.accuracy_score(truth, guesses))
    assert scores.confusion(truth, guesses).tolist() == metrics.confusion_matrix(truth, guesses).tolist()


@thousand
@given(PAIRS, st.sampled_from([None, "macro", "micro"]), st.sets(LABELS, min_size=1) | st.none())
def test_precision_recall_and_f1_are_those_of_scikit_learn(pairs, average, labels):
    truth, guesses = zip(*pairs, strict=True)
    labels = None if labels is None or not labels & set(truth) else sorted(labels, reverse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = metrics.precision_recall_fscore_support(
            truth, guesses, average=average, labels=labels, zero_division=0
        )
    if average is None:
        mine = list(zip(*scores.class_scores(truth, guesses, labels).values(), strict=True))
        assert list(scores.class_scores(truth, guesses, labels)) == (labels or sorted({*truth, *guesses}))
    else:
        mine = scores.mean_scores(truth, guesses, average, labels)
    assert close(mine, theirs[:3])


@given(PAIRS)
def test_micro_is_the_accuracy_and_a_subset_of_labels_keeps_its_rows(pairs):
    truth, guesses = zip(*pairs, strict=True)
    assert close(scores.mean_scores(truth, guesses, "micro"), [scores.accuracy(truth, guesses)] * 3)
    kept = sorted(set(truth))[::2]
    theirs = metrics.confusion_matrix(truth, guesses, labels=kept)
    assert scores.confusion(truth, guesses, kept).tolist() == theirs.tolist()


def test_labels_may_be_numbers_tensors_or_arrays():
    truth, guesses = [2, 0, 1, 2], [2, 1, 1, 0]
    for kind in (torch.tensor, np.array, tuple):
        assert scores.accuracy(kind(truth), kind(guesses)) == 0.5
        assert scores.confusion(kind(truth), kind(guesses)).tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_one_class_alone_and_labels_never_seen_have_scores():
    assert scores.mean_scores(["a", "a"], ["a", "a"]) == (1.0, 1.0, 1.0)
    never_guessed, never_true = scores.class_scores(["a", "b"], ["b", "c"]), scores.class_scores(["a"], ["b"])
    assert never_guessed["a"] == (0, 0, 0) and never_guessed["c"] == (0, 0, 0)
    assert set(never_true.values()) == {(0, 0, 0)}
    assert scores.class_scores(["a"], ["a"], ["a", "z"])["z"] == (0, 0, 0)


# --- text, as in sacrebleu --------------------------------------------------------------------------------------------


def theirs_of(candidates, references, **settings):
    most = max(map(len, references))
    streams = [[each[i] if i < len(each) else each[0] for each in references] for i in range(most)]  # a repeat is idle
    return sacrebleu.BLEU(tokenize="none", force=True, **settings).corpus_score(list(candidates), streams)


@thousand
@given(CASES, st.booleans(), st.booleans(), st.integers(1, 5))
def test_bleu_is_that_of_sacrebleu(cases, smooth, effective_order, order):
    candidates, references = zip(*cases, strict=True)
    references = [[text or "crown" for text in each] for each in references]  # sacrebleu knows no empty reference
    mine = scores.bleu(candidates, references, order, smooth, effective_order)
    method = "exp" if smooth else "none"
    theirs = theirs_of(
        candidates, references, smooth_method=method, max_ngram_order=order, effective_order=effective_order
    )
    assert math.isclose(mine.score, theirs.score, rel_tol=1e-9, abs_tol=1e-9)
    assert close(mine.brevity, theirs.bp)
    assert theirs.score == 0 or close(mine.precisions, theirs.precisions)


@given(WORDS.filter(lambda text: len(text.split()) >= 4))
def test_a_perfect_answer_has_100_and_an_empty_one_0(text):
    assert math.isclose(scores.bleu([text], [[text]]).score, 100)
    assert scores.bleu([""], [[text]]) == (0.0, (0.0, 0.0, 0.0, 0.0), 0.0)


def test_an_empty_reference_is_a_text_without_words():
    assert scores.bleu(["the king"], [[""]]).score == 0
    assert scores.bleu(["the king is"], [["", "the king is"]], order=3).score == pytest.approx(100)


def test_the_text_is_cut_as_one_wishes():
    assert scores.bleu(["abcd"], [["abcd"]]).score == 0  # one word has no runs of four
    assert scores.bleu(["abcd"], [["abcd"]], split=list).score == pytest.approx(100)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "0 true labels": lambda: scores.accuracy([], []),
    "2 true labels and 1 guesses": lambda: scores.confusion(["a", "b"], ["a"]),
    "name each once": lambda: scores.class_scores(["a"], ["a"], ["a", "a"]),
    "at least one that is true": lambda: scores.mean_scores(["a"], ["a"], labels=["z"]),
    "average 'weighted'": lambda: scores.mean_scores(["a"], ["a"], "weighted"),
    "0 candidates": lambda: scores.bleu([], []),
    "1 candidates, 2 lists": lambda: scores.bleu(["a"], [["a"], ["b"]]),
    r"are \[\]": lambda: scores.bleu(["a"], [[]]),
    "give a list of one text or more": lambda: scores.bleu(["a"], ["a"]),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_refused_with_one_sentence(message):
    with pytest.raises(ValueError, match=message) as refusal:
        BAD_INPUT[message]()
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)
