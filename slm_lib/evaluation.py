"""How good is a model, and how sure is that? Units that compare, intervals, paired tests, parts of a loss, calibration.

All begins with the surprise of each character of a text, in nats. Its mean says neither how far it would move on
another text nor what it hides, so the functions here take the single values. Scores for answers are in `scores`.
"""

import itertools
import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from slm_lib import training
from slm_lib.data import CharTokenizer
from slm_lib.ngrams import loss_units
from slm_lib.tokens import Tokenizer, start_id

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # letters, with apostrophes inside
_MOST_SIGNS = 14  # with so many blocks all ways to turn signs are tried, beyond it 10,000 of them

# --- the loss of a text -----------------------------------------------------------------------------------------------


class TextLoss(NamedTuple):
    """What a text cost a model; the last three, and `nats`, compare across tokenizers."""

    nats: float  # for the whole text: minus the logarithm of its probability
    per_token: float
    perplexity: float  # per token
    bits_per_character: float
    bits_per_byte: float  # of UTF-8
    perplexity_per_word: float  # a word is what stands between white space


def text_loss(nats: Tensor, text: str) -> TextLoss:
    """The surprise of the tokens of a text, nats (N,), in all units in use. Raises ValueError for an empty text."""
    if len(nats) == 0 or not text:
        raise ValueError(f"{len(nats)} tokens and {len(text)} characters: an empty text has no loss")
    loss, tokens, words = nats.double().mean().item(), len(nats), max(1, len(text.split()))
    bits = [loss_units(loss, length / tokens).bits_per_character for length in (len(text), len(text.encode()))]
    return TextLoss(
        loss * tokens, loss, loss_units(loss).perplexity, *bits, loss_units(loss * tokens / words).perplexity
    )


def per_character(nats: Tensor, tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """Surprise of tokens `ids` (N,), nats (N,), shared out over their characters: (characters,), float64.

    Every byte of a token takes an equal part, a character what its bytes took. The sum stays what it was, so models
    with different tokens can be set side by side, character by character.
    """
    if isinstance(tokenizer, CharTokenizer):
        return nats.double()
    pieces = [tokenizer.pieces[i] for i in ids.tolist()]
    lengths = torch.tensor([len(piece) for piece in pieces])
    of_bytes = (nats.double() / lengths).repeat_interleave(lengths)
    begins = torch.tensor([byte & 0xC0 != 0x80 for byte in b"".join(pieces)])  # the first byte of a character
    return torch.zeros(int(begins.sum()), dtype=torch.float64).index_add(0, begins.cumsum(0) - 1, of_bytes)


def character_surprisal(model: nn.Module, tokenizer: Tokenizer, text: str, block_size: int | None = None) -> Tensor:
    """How much each character of a text surprises a model, whatever its tokens: nats (characters,), float64.

    Windows and start as in `training.surprisal`. Raises ValueError for an empty text or unknown characters.
    """
    ids = tokenizer.encode(text)
    return per_character(training.surprisal(model, ids, block_size, start_id(tokenizer)), tokenizer, ids)


@torch.no_grad()
def text_logits(
    model: nn.Module, ids: Tensor, stride: int | None = None, block_size: int | None = None, start_id: int = 0
) -> Tensor:
    """What a model says before each token of a text: ids (N,) to logits (N, V), on the CPU.

    A window of block_size tokens begins every `stride` tokens, and only what is new in it is kept: with a stride below
    block_size each token but the first sees at least block_size - stride before it. By default the windows do not
    overlap, as in `training.surprisal`. Raises ValueError for an empty text or a stride that skips tokens.
    """
    T, N = block_size or model.config.block_size, len(ids)
    stride = T if stride is None else stride
    if N == 0 or not 1 <= stride <= T:
        raise ValueError(f"a text of {N} tokens, a stride of {stride}: give some text, and a stride from 1 to {T}")
    device, was_training = next(model.parameters()).device, model.training
    inputs = torch.cat([ids.new_tensor([start_id]), ids[:-1]])
    windows = [inputs[begin : begin + T] for begin in range(0, max(1, N - T + stride), stride)]
    whole = windows if len(windows[-1]) == len(windows[0]) else windows[:-1]  # the last one may be shorter
    at_once, rest = max(1, training.TOKENS_AT_ONCE // T), windows[len(whole) :]
    batches = [*torch.stack(whole).split(at_once), *(window[None] for window in rest)]
    rows = [row for batch in batches for row in model.eval()(batch.to(device)).cpu()]  # (T, V) each
    model.train(was_training)
    return torch.cat([rows[0], *(row[T - stride :] for row in rows[1:])])


# --- how sure ---------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean, the bounds that its like would keep to in most texts, and its standard error."""

    mean: float
    low: float
    high: float
    error: float


class Comparison(NamedTuple):
    """First minus second on the same text, and how often luck alone would set two equal models so far apart."""

    difference: Interval
    chance: float


def _blocks(values: ArrayLike, block: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The sums and the lengths of the blocks: of one length (the last may be shorter), or of the lengths given."""
    values = np.asarray(values, dtype=np.float64)
    if isinstance(block, int):
        block = [min(block, len(values) - begin) for begin in range(0, len(values), max(1, block))]
    lengths = np.array(block)
    if len(lengths) < 2 or lengths.sum() != len(values) or lengths.min() < 1:
        said = f"{len(lengths)} blocks of {lengths.sum()} values in all"
        raise ValueError(f"{said} for {len(values)} values: give at least two blocks that cover them once")
    return np.add.reduceat(values, lengths.cumsum() - lengths), lengths


def bootstrap(
    values: ArrayLike, block: int | Sequence[int] = 1000, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """How far the mean of `values` (N,) would move on other texts of this kind: the bootstrap (Efron, 1979) of blocks.

    The text is cut into blocks of `block` values (or of the lengths given), and as many blocks are drawn from these
    with replacement, again and again; neighbouring values stay together, since they are not independent (Carlstein,
    1986). Raises ValueError where there are fewer than two blocks.
    """
    sums, lengths = _blocks(values, block)
    generator, means = np.random.default_rng(seed), np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / lengths[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / lengths.sum()), float(low), float(high), float(means.std(ddof=1)))


def compare(first: ArrayLike, second: ArrayLike, block: int | Sequence[int] = 1000, seed: int = 0) -> Comparison:
    """Whether two models differ on one text: the surprise of both at each character, (N,) and (N,).

    The difference is taken character by character, so what makes a text hard for both falls out. The interval is
    that of `bootstrap`; `chance` turns the sign of whole blocks at random (Fisher's randomisation, 1935), in all ways
    where there are few. It speaks of these two models, not of how they were made: another seed is another model.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape}: both models must be measured on the same characters")
    sums, _ = _blocks(first - second, block)
    if len(sums) <= _MOST_SIGNS:
        signs = np.array(list(itertools.product((1, -1), repeat=len(sums))))
    else:
        signs = np.random.default_rng(seed).choice((1, -1), size=(10_000, len(sums)))
        signs[0] = 1  # what was found is one of the ways
    apart = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    return Comparison(bootstrap(first - second, block, seed=seed), float(apart.mean()))


# --- where the loss is ------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a text: how many values, their mean, and their share of the sum over the whole."""

    count: int
    mean: float
    share: float


def by_label(values: ArrayLike, labels: Sequence[Hashable]) -> dict[Hashable, Part]:
    """What a loss is made of: values (N,) by their labels, sorted. Raises ValueError unless each has one label."""
    values, labels = np.asarray(values, dtype=np.float64), list(labels)
    if len(values) != len(labels) or not labels:
        raise ValueError(f"{len(values)} values and {len(labels)} labels: give one label for each value")
    names = sorted(set(labels))
    place = {name: i for i, name in enumerate(names)}
    where = np.array([place[label] for label in labels])
    counts, sums = np.bincount(where), np.bincount(where, weights=values)
    parts = zip(names, counts.tolist(), sums.tolist(), strict=True)
    return {name: Part(n, s / n, s / values.sum().item()) for name, n, s in parts}


def character_kinds(text: str) -> list[str]:
    """The kind of each character: "word begins", "in a word", "mark", "space" or "line end".

    >>> character_kinds("O, no")
    ['word begins', 'mark', 'space', 'word begins', 'in a word']
    """
    kinds = ["line end" if c == "\n" else "space" if c.isspace() else "mark" for c in text]
    for word in _WORD.finditer(text):
        kinds[word.start() : word.end()] = ["word begins"] + ["in a word"] * (word.end() - word.start() - 1)
    return kinds


def word_status(text: str, training_text: str) -> list[str]:
    """Of each character whether its word occurs in the training text: "seen", "unseen", or "no word"."""
    known, status = set(_WORD.findall(training_text)), ["no word"] * len(text)
    for word in _WORD.finditer(text):
        status[word.start() : word.end()] = ["seen" if word[0] in known else "unseen"] * len(word[0])
    return status


# --- does it know what it knows ---------------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """For each bin that is not empty: mean confidence, share that came true, and how many."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability(confidence: Tensor, right: Tensor, bins: int = 10) -> Reliability:
    """Forecasts (N,) in (0, 1] and whether each came true (N,), in bins of equal width that include their upper end."""
    if confidence.shape != right.shape or not len(right) or confidence.min() < 0 or confidence.max() > 1:
        said = f"{len(confidence)} forecasts for {len(right)} outcomes"
        raise ValueError(f"{said}: give as many of both, and chances from 0 to 1")
    confidence, right = confidence.double(), right.double()
    place = torch.bucketize(confidence, torch.arange(1, bins, dtype=torch.float64) / bins)
    count, sums, hits = (torch.bincount(place, w, minlength=bins) for w in (None, confidence, right))
    held = count > 0
    return Reliability(sums[held] / count[held], hits[held] / count[held], count[held])


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """How far confidence and accuracy lie apart, the mean over bins by their counts (Naeini et al., 2015)."""
    said, true, count = reliability(confidence, right, bins)
    return ((said - true).abs() * count).sum().item() / len(right)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature that makes logits (N, V) foretell targets (N,) best (Guo et al., 2017).

    The loss is convex in 1/T, and Newton's steps, none beyond a factor of two, walk to its bottom. Raises ValueError
    where no temperature is the best one: every guess is right, or the logits are no better than no logits.
    """
    logits, right = logits.double(), logits.double().gather(-1, targets[:, None])
    if len(targets) == 0 or (right >= logits.amax(-1, keepdim=True)).all():
        raise ValueError(f"all of {len(targets)} guesses are right: the lower the temperature the better, none is best")
    if (logits.mean(-1, keepdim=True) - right).mean() >= 0:
        raise ValueError("these logits foretell no better than chance: the higher the temperature the better")
    inverse = 1.0
    for _ in range(100):
        chances = (inverse * logits).softmax(-1)
        mean = (chances * logits).sum(-1, keepdim=True)
        slope, bend = (mean - right).mean().item(), (chances * (logits - mean) ** 2).sum(-1).mean().item()
        before, inverse = inverse, min(2 * inverse, max(inverse / 2, inverse - slope / max(bend, 1e-300)))
        if abs(inverse - before) <= 1e-14 * inverse:
            break
    return 1 / inverse
