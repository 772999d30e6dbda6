"""From logits to text: reshape what may come next, draw, append, look again; search; and judge what was written."""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from slm_lib.blocks import GPT
from slm_lib.cache import KeyValueCache
from slm_lib.tokens import Tokenizer, decode_stream

LARGE = 4_000_000  # so many weights do not stay in a processor's cache from one token to the next

# --- one distribution -------------------------------------------------------------------------------------------------


def next_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits (..., V) to the probabilities (..., V) that are drawn from, in float64.

    `temperature` divides the logits: below 1 sharpens, above 1 flattens, 0 leaves only the likeliest token. Then, in
    this order: `top_k` keeps that many tokens (Fan et al., 2018), `top_p` the likeliest that together reach this
    probability (the nucleus; Holtzman et al., 2020), `min_p` those with at least this share of the likeliest one's
    probability (Nguyen et al., 2024). What is kept is made to add up to 1. Raises ValueError for a value out of range.
    """
    _within("temperature", temperature, 0, math.inf, "0 takes the likeliest, 1 draws as trained")
    _within("top_k", 1 if top_k is None else top_k, 1, math.inf, "1 keeps the likeliest, None keeps every token")
    _within("top_p", 1 if top_p is None else top_p, 1e-9, 1, "small keeps only the likeliest, 1 keeps every token")
    _within("min_p", 0 if min_p is None else min_p, 0, 1, "1 keeps only the likeliest, 0 keeps every token")
    if logits.isnan().any():
        raise ValueError("the logits hold NaN: training broke down, or the weights are damaged")
    keep = 1 if temperature == 0 else min(top_k or logits.shape[-1], logits.shape[-1])
    if keep == logits.shape[-1] and top_p is None and min_p is None:  # nothing is cut off: no need to sort
        logits = logits.double()
        return ((logits - logits.amax(-1, keepdim=True)) / (temperature or 1.0)).softmax(-1)
    best, places = logits.double().topk(keep)  # sorted, the likeliest first
    kept = ((best - best[..., :1]) / (temperature or 1.0)).softmax(-1)
    if top_p is not None and top_p < 1:
        likelier = kept.cumsum(-1) - kept  # the probability of all that come before a token
        kept = kept * (likelier < top_p)
    if min_p is not None:
        kept = kept * (kept >= min_p * kept[..., :1])
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, places, kept)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) with those of the ids in `seen` (..., N) made smaller: positive ones divided by the penalty,
    negative ones multiplied by it; Keskar et al. (2019), "CTRL". 1 changes nothing, below 1 rewards repetition.

    Adding a constant to all logits changes no probability, but it does change what this does to them. Raises
    ValueError for a penalty that is not above 0.
    """
    _within("repetition_penalty", penalty, 1e-9, 1e9, "1 changes nothing, 1.2 is usual")
    was_seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, seen, True)
    harsher = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(was_seen, harsher, logits)


def _within(name: str, value: float, low: float, high: float, reason: str) -> None:
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {max(low, 0):g} to {high:g}"
        raise ValueError(f"{name} {value} must be {bounds}: {reason}")


# --- a text -----------------------------------------------------------------------------------------------------------


class _Window:
    """Reads growing ids (B, T) and gives the logits (B, V) of what follows; with a cache it reads only what is new.

    The window holds block_size tokens. Once it is full, a new one begins with the last `keep` of them; a model that
    can be read without a cache alone reads its last block_size tokens each time.
    """

    def __init__(self, model: nn.Module, B: int, keep: int | None = None):
        self.model, self.size, self.known = model.eval(), model.config.block_size, 0
        self.keep = max(1, self.size // 2) if keep is None else keep
        _within("keep", self.keep, 1, self.size, "so many tokens are read again when the window is full")
        self.device = next(model.parameters()).device
        self.cache = KeyValueCache.of(model, B) if _remembers(model) else None
        if self.cache is not None and B == 1 and self.device.type == "cpu" and model.n_parameters >= LARGE:
            self.model = _by_columns(model)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        if self.cache is None:
            return self.model(ids[:, -self.size :].to(self.device))[:, -1].cpu()
        if self.cache.length + T - self.known > self.size:
            self.cache.length, self.known = 0, T - (self.keep if self.known else self.size)
        new, self.known = ids[:, self.known :].to(self.device), T
        return self.model(new, self.cache)[:, -1].cpu()

    def take(self, rows: Tensor) -> None:
        """Go on with these rows of the batch."""
        if self.cache is not None:
            self.cache.take(rows.to(self.device))


def _by_columns(model: nn.Module) -> nn.Module:
    """A copy of a model with its matrices stored by columns: a processor multiplies a single row by them sooner."""
    model = deepcopy(model)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.detach().T.contiguous().T, requires_grad=False)
    return model


def _remembers(model: nn.Module) -> bool:
    """Whether a model can be read with a cache: a GPT in which nobody put a block or an attention that takes none."""
    parts = [part for block in model.blocks for part in (block, block.attention)] if isinstance(model, GPT) else [None]
    return all(part is not None and "cache" in signature(part.forward).parameters for part in parts)


def _draw(
    model: nn.Module,
    ids: Tensor,
    length: int,
    seeds: Sequence[int | None],
    keep: int | None = None,
    repetition_penalty: float = 1.0,
    **shape: Any,
) -> Iterator[Tensor]:
    """Draw `length` times one id (B,) after ids (B, T), each row with the generator of its own seed."""
    _within("length", length, 0, math.inf, "so many tokens are written")
    window, generators = _Window(model, len(ids), keep), [_generator(seed) for seed in seeds]
    for _ in range(length):
        logits = window(ids)  # (B, V)
        if repetition_penalty != 1:
            logits = penalise(logits, ids, repetition_penalty)
        chances = next_probabilities(logits, **shape)
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(chances, generators, strict=True)]
        ids = torch.cat([ids, torch.stack(drawn)], dim=1)
        yield ids[:, -1]


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "\n",
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = 0,
    **wishes: Any,
) -> Iterator[str]:
    """Continue `prompt`, one token after the other, and yield each as text as soon as it is drawn.

    `wishes` may hold `top_p` and `min_p`, as in `next_probabilities`, and `repetition_penalty`, as in `penalise`, for
    all that was written so far. The model sees the prompt's last block_size tokens; when its window is full, it reads
    the last `keep` (half of it, unless told otherwise) again and goes on from there. A token that ends inside a
    character waits for the rest of it. A seed gives the same text again; None gives another one each time. Raises
    ValueError for a prompt with symbols that the vocabulary lacks and for a wish out of range.
    """
    ids = tokenizer.encode(prompt or "\n")[None]  # (1, T)
    drawn = _draw(model, ids, length, [seed], temperature=temperature, top_k=top_k, **wishes)
    yield from decode_stream(tokenizer, (row.item() for row in drawn))


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "\n",
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = 0,
    **wishes: Any,
) -> str:
    """The whole of `stream` at once: `length` new tokens after `prompt`, without the prompt."""
    return "".join(stream(model, tokenizer, prompt, length, temperature, top_k, seed, **wishes))


def continuations(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "\n",
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seeds: Sequence[int | None] = range(4),
    **wishes: Any,
) -> list[str]:
    """Several texts after one prompt, written side by side in one batch: for each seed what `generate` gives for it.

    A batch of several rows rounds its sums in another order than a batch of one, so that a draw at the very border
    between two tokens can fall otherwise; in float64 that does not happen in practice.
    """
    if not seeds:
        raise ValueError("there are no seeds: give one for each text that you want")
    ids = tokenizer.encode(prompt or "\n").repeat(len(seeds), 1)  # (B, T)
    rows = list(_draw(model, ids, length, seeds, temperature=temperature, top_k=top_k, **wishes))
    texts = torch.stack([ids[:, 0], *rows], dim=1)[:, 1:]  # (B, length)
    return ["".join(decode_stream(tokenizer, text)) for text in texts.tolist()]


def beam_search(
    model: nn.Module, tokenizer: Tokenizer, prompt: str = "\n", length: int = 50, width: int = 4
) -> list[tuple[str, float]]:
    """Look for the likeliest continuation: keep the `width` best beginnings, lengthen each by every token, and again.

    Returns up to `width` pairs, best first: a text of `length` tokens, and the logarithm of its probability. Width 1
    takes the likeliest token each time; wide enough, the search misses nothing. Raises ValueError for a width below 1.
    """
    _within("width", width, 1, math.inf, "so many beginnings are kept")
    _within("length", length, 0, math.inf, "so many tokens are written")
    start = tokenizer.encode(prompt or "\n")
    ids, window = start.repeat(width, 1), _Window(model, width)  # (W, T)
    scores = torch.full((width,), -math.inf, dtype=torch.float64)
    scores[0] = 0  # at first all beginnings are the same: one of them counts
    for _ in range(length):
        longer = scores[:, None] + window(ids).double().log_softmax(-1)  # (W, 1) + (W, V) = (W, V)
        scores, best = longer.flatten().topk(width)
        rows, tokens = best // longer.shape[1], best % longer.shape[1]
        ids = torch.cat([ids[rows], tokens[:, None]], dim=1)
        window.take(rows)
    texts = ["".join(decode_stream(tokenizer, row)) for row in ids[:, len(start) :].tolist()]
    return [(text, score) for text, score in zip(texts, scores.tolist(), strict=True) if score > -math.inf]


# --- what was written -------------------------------------------------------------------------------------------------


def distinct(text: str, n: int) -> float:
    """The share of different ones among the runs of n characters of a text; 1 where none comes twice (Li et al., 2016).

    >>> distinct("to be or to be", 5)
    0.9
    """
    _within("n", n, 1, len(text), "a run has a length, and must fit into the text")
    runs = [text[i : i + n] for i in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs)


class Concordance:
    """All places of a text, sorted by what stands there, as words in a dictionary: any run is found by halving.

    A suffix array (Manber and Myers, 1993) that compares up to `most` characters. A million characters take seconds.
    """

    def __init__(self, text: str, most: int = 64):
        _within("most", most, 1, math.inf, "so many characters are compared")
        self.text, self.most = text, most
        self._places = array("q", sorted(range(len(text)), key=self._here))

    def _here(self, place: int) -> str:
        return self.text[place : place + self.most]

    def find(self, run: str) -> tuple[int, int]:
        """How many characters at the beginning of `run` the text holds in a row, at most `most`, and where: a place."""
        near = bisect_left(self._places, run[: self.most], key=self._here)
        neighbours = self._places[max(0, near - 1) : near + 1]
        return max(((_agree(run, self._here(place)), place) for place in neighbours), default=(0, 0))

    def runs(self, written: str) -> list[int]:
        """For each place in `written`: how many characters from there on stand in the text as they do here."""
        return [self.find(written[i : i + self.most])[0] for i in range(len(written))]

    def seen(self, written: str, n: int = 8) -> float:
        """The share of the runs of n characters of `written` that stand somewhere in the text."""
        _within("n", n, 1, min(self.most, len(written)), "a run has a length, and must fit")
        runs = self.runs(written)[: len(written) - n + 1]
        return sum(run >= n for run in runs) / len(runs)


def _agree(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
