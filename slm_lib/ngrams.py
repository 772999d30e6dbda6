"""Language models that count: n-gram tables, their smoothing, and Kneser-Ney of any order.

An n-gram model of order n guesses the next symbol from the n - 1 symbols before it, and all it knows is how often
each followed which. Small orders fit in a table with one axis per symbol (`count_ngrams`, `smooth`); `KneserNey`
keeps only what occurred, so its order has no limit.

Two conventions hold throughout, the same as when a neural model is evaluated. Every symbol of a text is scored once,
the first one included: the text is read as if `START_ID` (the newline, in a vocabulary of sorted characters) stood
before it. And surprise is in nats; `loss_units` is the one place that turns it into anything else.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

START_ID = 0
_LARGEST_TABLE = 2**26  # numbers in a dense table: half a gigabyte in float64


class LossUnits(NamedTuple):
    """One loss in its three usual units; `str()` writes them on one line."""

    nats: float
    bits_per_character: float
    perplexity: float

    def __str__(self) -> str:
        bits = f"{self.bits_per_character:.2f} bits per character"
        return f"{self.nats:.2f} nats · {bits} · perplexity {self.perplexity:.2f}"


def loss_units(loss: float, chars_per_token: float = 1.0) -> LossUnits:
    """A mean loss in nats per token, also as bits per character and as perplexity per token.

    Perplexity is the number of equally likely choices that would be just as surprising: exp(loss). Bits are counted
    per character, so that models with different tokens can be compared: `chars_per_token` is how many characters a
    token of the scored text holds on average. Raises ValueError for a loss below 0 or a token of no length.

    >>> print(loss_units(math.log(4)))
    1.39 nats · 2.00 bits per character · perplexity 4.00
    """
    loss, chars_per_token = float(loss), float(chars_per_token)
    if not loss >= 0:
        raise ValueError(f"a loss of {loss} nats is impossible, since no probability exceeds 1: pass a mean of -log p.")
    if not chars_per_token > 0:
        raise ValueError(f"chars_per_token is {chars_per_token}, but a token holds characters: pass a number above 0.")
    perplexity = math.exp(loss) if loss < 700 else math.inf  # math.exp overflows just above 709
    return LossUnits(loss, loss / math.log(2) / chars_per_token, perplexity)


def count_ngrams(ids: torch.Tensor, order: int, vocab_size: int) -> torch.Tensor:
    """How often each run of `order` symbols occurs: ids (T,) to int64 counts (V, ..., V) with one axis per symbol.

    The last axis is the symbol that follows, the ones before it its context, the oldest first. Each of the T symbols
    is counted once as the one that follows, the first ones after `START_ID`. Raises ValueError for bad ids or an
    order below 1, and for a table too large to write down.
    """
    ids = _checked(ids, vocab_size)
    _check_whole("order", order, "an n-gram holds at least the symbol that it predicts")
    if vocab_size**order > _LARGEST_TABLE:
        raise ValueError(
            f"a table of order {order} over {vocab_size} symbols has {vocab_size**order:.1e} places, "
            f"too many to write down: count with KneserNey({order}, {vocab_size}), which keeps only what occurs."
        )
    cells = _windows(ids, order) @ (vocab_size ** np.arange(order)[::-1])
    counts = np.bincount(cells, minlength=vocab_size**order)
    return torch.from_numpy(counts).reshape((vocab_size,) * order)


def smooth(counts: torch.Tensor, strength: float = 1.0, prior: torch.Tensor | None = None) -> torch.Tensor:
    """Counts (..., V) to float64 probabilities (..., V), with `strength` imagined counts shared out as the prior says.

    (count + strength * prior) / (total + strength), for each context by itself. A uniform prior (the default) with
    strength V is add-one smoothing; the table of a shorter context as the prior backs off to it, the more so the
    less was counted (MacKay and Peto, "A hierarchical Dirichlet language model", 1995). With strength 0 these are
    plain shares, and a context never counted keeps a row of zeros. Raises ValueError for a negative strength.

    >>> smooth(torch.tensor([3, 1]), strength=2)
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    if not strength >= 0:
        raise ValueError(f"strength is {strength}, but counts cannot be owed: pass 0 or more imagined counts.")
    counts = counts.double()
    if prior is None:
        prior = torch.full_like(counts, 1 / counts.shape[-1])
    total = counts.sum(-1, keepdim=True) + strength
    return (counts + strength * prior) / total.clamp_min(torch.finfo(torch.float64).tiny)


def score(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The surprise of each symbol under a table of probabilities (V, ..., V): ids (T,) to -log p in nats, (T,) float64.

    Their mean is the cross-entropy of the table on the text. A probability of 0 gives infinite surprise. Raises
    ValueError for bad ids or for a table whose axes differ.
    """
    table = _checked_table(probabilities)
    grams = _windows(_checked(ids, table.shape[-1]), table.ndim)
    return -torch.log(table[tuple(torch.from_numpy(grams.T.copy()))])


def sample(probabilities: torch.Tensor, length: int, generator=None, prompt_ids=None) -> torch.Tensor:
    """Write `length` symbols from a table of probabilities (V, ..., V): the new ids, (length,), without the prompt.

    Draws with a torch.Generator, for a text that can be repeated; without `prompt_ids` it begins after `START_ID`.
    Raises ValueError for a length below 1, bad ids, or a context to which the table gives no probabilities.
    """
    table = _checked_table(probabilities)
    return _write(lambda context: table[tuple(context)], table.ndim, table.shape[-1], length, generator, prompt_ids)


class KneserNey:
    """An interpolated Kneser-Ney model of any order, with three discounts per order.

    Each order takes a little from every count it has (the discount) and gives what it took to the order below; below
    the first order stands the uniform guess, so nothing is impossible. The orders below the highest do not count how
    often a run occurred but after how many different symbols it did. Formulas and discounts: "modified Kneser-Ney" in
    Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999); the idea: Kneser and
    Ney, "Improved backing-off for m-gram language modeling" (1995). Raises ValueError for an order or size below 1.
    """

    def __init__(self, order: int, vocab_size: int):
        _check_whole("order", order, "an n-gram holds at least the symbol that it predicts")
        _check_whole("vocab_size", vocab_size, "a text needs symbols")
        self.order, self.vocab_size = int(order), int(vocab_size)
        self.discounts = None  # (order, 3) float64: what counts of 1, 2, and 3 or more lose, one row per order
        self._levels: list[_Level] = []

    def fit(self, ids: torch.Tensor) -> "KneserNey":
        """Count the ids (T,) of a training text, forgetting any earlier one, and return the model itself.

        A context is a node of a tree, numbered by its place among the sorted (shorter context, older symbol) pairs;
        a gram is a (context, symbol that follows) pair. Packing a pair into one integer needs nodes * V < 2^63 only.
        """
        history, follows = self._split(ids)
        contexts, node = [np.zeros(1, np.int64)], np.zeros(len(follows), np.int64)
        for age in range(1, self.order):
            keys, node = np.unique(node * self.vocab_size + history[:, -age], return_inverse=True)
            contexts.append(keys)
        grams, counts = np.unique(node * self.vocab_size + follows, return_counts=True)
        levels, discounts = [], []
        for keys in reversed(contexts):
            discounts.append(_discounts(counts))
            levels.append(self._level(keys, grams, counts, discounts[-1]))
            context, follower = np.divmod(grams, self.vocab_size)
            # A gram without its oldest symbol: as often as that happens, so many different symbols came before it.
            shorter = keys[context] // self.vocab_size
            grams, counts = np.unique(shorter * self.vocab_size + follower, return_counts=True)
        self._levels, self.discounts = levels[::-1], torch.from_numpy(np.stack(discounts[::-1]))
        return self

    def score(self, ids: torch.Tensor, context: int | None = None) -> torch.Tensor:
        """The surprise of each symbol: ids (T,) to -log p in nats, (T,) float64.

        With `context` the text is cut into disjoint windows of that many symbols, as when a neural model is evaluated:
        a window reads the symbol before its first one and nothing older. Raises ValueError for bad ids or context.
        """
        history, follows = self._split(ids, context)
        return -torch.log(torch.from_numpy(self._predict(history, follows)))

    def longest_context(self, ids: torch.Tensor) -> torch.Tensor:
        """How far back the training text agrees, per symbol: ids (T,) to lengths (T,) int64 between 0 and order - 1.

        A length of k says that the k symbols before this one stood together somewhere in the training text.
        """
        history, _ = self._split(ids)
        known = sum((node >= 0).astype(np.int64) for node in self._nodes(history))
        return torch.from_numpy(known - 1)

    def probabilities(self, context_ids: torch.Tensor) -> torch.Tensor:
        """What follows a context: ids (T,), of which the last order - 1 count, to float64 probabilities (V,).

        A shorter context, even an empty one, asks the lower orders. Raises ValueError for ids outside the vocabulary.
        """
        context = _checked(context_ids, self.vocab_size, least=0)
        padded = np.concatenate([np.full(self.order - 1, -1), context])[len(context) :]
        history = np.broadcast_to(padded, (self.vocab_size, self.order - 1))
        return torch.from_numpy(self._predict(history, np.arange(self.vocab_size)))

    def sample(self, length: int, generator=None, prompt_ids=None) -> torch.Tensor:
        """Write `length` symbols: the new ids, (length,), without the prompt; without one, after `START_ID`."""
        return _write(self.probabilities, self.order, self.vocab_size, length, generator, prompt_ids)

    def _split(self, ids, context=None) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) to the symbols before each one, (T, order - 1) with -1 where a window ends, and the symbols (T,)."""
        grams = _windows(_checked(ids, self.vocab_size), self.order)
        history, follows = grams[:, :-1], grams[:, -1]
        if context is not None:
            _check_whole("context", context, "a window holds at least the symbol that it scores")
            age = np.arange(self.order - 1, 0, -1)
            history = np.where(age <= np.arange(len(follows))[:, None] % context + 1, history, -1)
        return history, follows

    def _level(self, keys: np.ndarray, grams: np.ndarray, counts: np.ndarray, discounts: np.ndarray) -> "_Level":
        taken = discounts[np.minimum(counts, 3) - 1]
        node = grams // self.vocab_size
        total = np.bincount(node, weights=counts, minlength=len(keys))
        given = np.bincount(node, weights=taken, minlength=len(keys)) / total
        return _Level(keys, grams, (counts - taken) / total[node], given)

    def _nodes(self, history: np.ndarray):
        """Yield, from the empty context to the longest, where each row of history (T, order - 1) stands; -1: unseen."""
        if not self._levels:
            raise RuntimeError("this model has counted nothing yet: call fit(ids) with a training text first.")
        node = np.zeros(len(history), np.int64)
        yield node
        for age, level in enumerate(self._levels[1:], start=1):
            symbol = history[:, -age]
            node = _find(level.contexts, np.where((node < 0) | (symbol < 0), -1, node * self.vocab_size + symbol))
            yield node

    def _predict(self, history: np.ndarray, follows: np.ndarray) -> np.ndarray:
        """The probability (T,) of each symbol in follows (T,) after its row of history (T, order - 1)."""
        p = np.full(len(follows), 1 / self.vocab_size)
        for node, level in zip(self._nodes(history), self._levels, strict=True):
            gram = _find(level.grams, np.where(node < 0, -1, node * self.vocab_size + follows))
            own = np.where(gram < 0, 0.0, level.shares[gram])
            p = np.where(node < 0, p, own + level.given[node] * p)
        return p


class _Level(NamedTuple):
    """What a Kneser-Ney model keeps for one order; the arrays of keys are sorted, so that they can be searched."""

    contexts: np.ndarray  # one key per context: (shorter context, older symbol)
    grams: np.ndarray  # one key per gram: (context, symbol that follows)
    shares: np.ndarray  # per gram: its discounted share of its context's count
    given: np.ndarray  # per context: the probability handed down to the order below


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What counts of 1, 2 and 3 or more lose, estimated as Chen and Goodman do; half of that if a text is too small."""
    one, two, three, four = np.bincount(np.minimum(counts, 5), minlength=5)[1:5].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = one / (one + 2 * two)
        estimate = np.array([1 - 2 * y * two / one, 2 - 3 * y * three / two, 3 - 4 * y * four / three])
    most = np.array([1.0, 2.0, 3.0])
    return estimate if ((estimate > 0) & (estimate < most)).all() else most / 2


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key stands among the sorted keys; -1 where it is missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _windows(ids: np.ndarray, order: int) -> np.ndarray:
    """Ids (T,) to runs (T, order): each symbol with the order - 1 before it, `START_ID` standing before the text."""
    padded = np.concatenate([np.full(order - 1, START_ID), ids])
    return np.lib.stride_tricks.sliding_window_view(padded, order)


def _write(probabilities, order: int, vocab_size: int, length: int, generator, prompt_ids) -> torch.Tensor:
    """Draw `length` symbols one after the other, each from probabilities(the order - 1 ids before it), a (V,) row."""
    _check_whole("length", length, "a text that is written has symbols")
    prompt = [] if prompt_ids is None else _checked(prompt_ids, vocab_size, least=0).tolist()
    written = [START_ID] * (order - 1) + prompt
    for _ in range(length):
        context = written[len(written) - order + 1 :]
        ladder = probabilities(context).cumsum(0)  # (V,)
        if not ladder[-1] > 0:
            raise ValueError(f"what follows {context} was never counted: smooth the counts with a strength above 0.")
        dart = torch.rand(1, dtype=torch.float64, generator=generator)
        written.append(int(torch.searchsorted(ladder[:-1], dart, right=True)))
    return torch.tensor(written[-length:])


def _check_whole(name: str, value: int, reason: str) -> None:
    if not (value >= 1 and value == int(value)):
        raise ValueError(f"{name} is {value}, but {reason}: pass a whole number from 1 up.")


def _checked(ids, vocab_size: int, least: int = 1) -> np.ndarray:
    ids = torch.as_tensor(ids).cpu().numpy()
    if ids.ndim != 1 or len(ids) < least:
        raise ValueError(f"ids have shape {ids.shape}, but a text is one row of at least {least} symbols: pass (T,).")
    if len(ids) and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"ids run from {ids.min()} to {ids.max()} ({ids.dtype}), but the vocabulary has the integers 0 to "
            f"{vocab_size - 1}: encode the text with the tokenizer of this model."
        )
    return ids.astype(np.int64)


def _checked_table(probabilities: torch.Tensor) -> torch.Tensor:
    table = torch.as_tensor(probabilities)
    if table.ndim < 1 or len(set(table.shape)) != 1:
        raise ValueError(f"a table of shape {tuple(table.shape)} has no V symbols on every axis: pass (V, ..., V).")
    return table.double()
