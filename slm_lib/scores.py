"""Scores for answers: labels against labels, text against text, with the conventions of scikit-learn and sacrebleu.

A share of nothing is 0, as there. Where they raise an error, or leave a value open, one sentence says what to give.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# --- labels -----------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Precision, recall, and F1, their harmonic mean; each is 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


def _checked(truth: Sequence, guesses: Sequence, labels: Sequence | None) -> tuple[list, list, list]:
    truth, guesses = (x.tolist() if isinstance(x, Tensor | np.ndarray) else list(x) for x in (truth, guesses))
    if len(truth) != len(guesses) or not truth:
        raise ValueError(f"{len(truth)} true labels and {len(guesses)} guesses: give as many, and at least one")
    labels = sorted({*truth, *guesses}) if labels is None else list(labels)
    if len(set(labels)) != len(labels) or not set(labels) & set(truth):
        raise ValueError(f"labels {labels}: name each once, and at least one that is true somewhere")
    return truth, guesses, labels


def accuracy(truth: Sequence[Hashable], guesses: Sequence[Hashable]) -> float:
    """The share of guesses that are right."""
    truth, guesses, _ = _checked(truth, guesses, None)
    return sum(t == g for t, g in zip(truth, guesses, strict=True)) / len(truth)


def confusion(truth: Sequence[Hashable], guesses: Sequence[Hashable], labels: Sequence | None = None) -> Tensor:
    """How often each label (a row) was called each label (a column): counts (K, K), over all labels found, sorted."""
    truth, guesses, labels = _checked(truth, guesses, labels)
    found = Counter(zip(truth, guesses, strict=True))
    return torch.tensor([[found[row, column] for column in labels] for row in labels])


def class_scores(
    truth: Sequence[Hashable], guesses: Sequence[Hashable], labels: Sequence | None = None
) -> dict[Hashable, Scores]:
    """Precision, recall and F1 of each label; a label that is never true or never guessed has 0 where it must."""
    truth, guesses, labels = _checked(truth, guesses, labels)
    return {name: _scores(*counts) for name, counts in _counts(truth, guesses, labels).items()}


def mean_scores(
    truth: Sequence[Hashable], guesses: Sequence[Hashable], average: str = "macro", labels: Sequence | None = None
) -> Scores:
    """One score for all labels: "macro" is the plain mean over labels, "micro" counts all their cases together."""
    if average not in ("macro", "micro"):
        raise ValueError(f"average {average!r}: take 'macro', every label alike, or 'micro', every case alike")
    counts = list(_counts(*_checked(truth, guesses, labels)).values())
    if average == "micro":
        return _scores(*map(sum, zip(*counts, strict=True)))
    return Scores(*np.mean([_scores(*each) for each in counts], axis=0).tolist())


def _counts(truth: list, guesses: list, labels: list) -> dict[Hashable, tuple[int, int, int]]:
    """For each label: how often it was rightly guessed, guessed, and true."""
    hits = Counter(t for t, g in zip(truth, guesses, strict=True) if t == g)
    guessed, true = Counter(guesses), Counter(truth)
    return {label: (hits[label], guessed[label], true[label]) for label in labels}


def _scores(hits: int, guessed: int, true: int) -> Scores:
    return Scores(*(a / b if b else 0.0 for a, b in ((hits, guessed), (hits, true), (2 * hits, guessed + true))))


# --- text -------------------------------------------------------------------------------------------------------------


class Bleu(NamedTuple):
    """The score, 0 to 100; the precisions of the runs of 1, 2, … words in percent; the penalty for being short."""

    score: float
    precisions: tuple[float, ...]
    brevity: float


def bleu(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    order: int = 4,
    smooth: bool = True,
    effective_order: bool = False,
    split: Callable[[str], list[str]] = str.split,
) -> Bleu:
    """How much the runs of words of candidates agree with those of references, one list of these for each candidate.

    BLEU (Papineni et al., 2002) of the whole, counts first added up, with the conventions of sacrebleu (Post, 2018):
    where no run of a length is right, `smooth` counts a half of one, then a quarter; `effective_order` leaves out
    lengths that no candidate has, for single sentences. Raises ValueError where there is nothing to compare.
    """
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(f"{len(candidates)} candidates, {len(references)} lists of references: give as many, not none")
    hits, totals, length, wanted = [0] * order, [0] * order, 0, 0
    for candidate, right in zip(candidates, references, strict=True):
        if isinstance(right, str) or not right:
            raise ValueError(f"the references of {candidate[:40]!r} are {right!r}: give a list of one text or more")
        words, right = split(candidate), [split(text) for text in right]
        length += len(words)
        wanted += min((abs(len(text) - len(words)), len(text)) for text in right)[1]  # the nearest, or the shorter
        for n in range(order):
            most = reduce(or_, (_runs(text, n + 1) for text in right))  # the most often that any reference has it
            hits[n] += (_runs(words, n + 1) & most).total()
            totals[n] += max(0, len(words) - n)
    brevity = 1.0 if length >= wanted else math.exp(1 - wanted / length) if length else 0.0
    precisions = _precisions(hits, totals, smooth)
    used = precisions[: sum(total > 0 for total in totals)] if effective_order else precisions
    score = brevity * math.exp(sum(map(math.log, used)) / len(used)) if used and min(used) > 0 else 0.0
    return Bleu(score, precisions, brevity)


def _runs(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _precisions(hits: list[int], totals: list[int], smooth: bool) -> tuple[float, ...]:
    """In percent; for lengths without a hit smoothing counts 1/2, 1/4, …, unless there is no hit at all."""
    precisions, part = [], 1.0 if smooth and any(hits) else 0.0
    for hit, total in zip(hits, totals, strict=True):
        part = part if hit or not total else part / 2
        precisions.append(100 * (hit or part) / total if total else 0.0)
    return tuple(precisions)
