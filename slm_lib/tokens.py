"""Byte-pair encoding: a vocabulary between characters and words, learned by merging what stands together most often.

The byte-level form of GPT-2 (Radford et al., 2019): `PATTERN` cuts the text into words, a word is its UTF-8 bytes, and
the most frequent pair becomes a token, again and again (Sennrich, Haddow and Birch, "Neural machine translation of rare
words with subword units", 2016). Merges and ids are those of `ByteLevel` in Hugging Face's `tokenizers`; the two can
differ only where a character is so new that only one of the two Unicode tables knows whether it is a letter.
"""

import codecs
import heapq
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import regex
import torch
from torch import Tensor

from slm_lib import ngrams
from slm_lib.data import CharTokenizer

Pair = tuple[int, int]

# GPT-2's cut: an English ending after an apostrophe; letters, digits, or other marks, each with one space before them;
# white space, of which the last space is left to the word that follows.
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# The bytes in the order of their ids, as in GPT-2: those that print in Latin-1 first, then the others.
BYTES = sorted(range(256), key=lambda byte: not (33 <= byte <= 126 or 161 <= byte <= 255 and byte != 173))
ID_OF_BYTE = {byte: i for i, byte in enumerate(BYTES)}
_MOST_KNOWN = 2**18  # words whose ids a tokenizer remembers


def split_words(text: str) -> list[str]:
    """Cut a text into words that no merge will cross: put together again they are the text.

    Raises ValueError for half of a surrogate pair, which stands for no character.

    >>> split_words("To be, or not to be")
    ['To', ' be', ',', ' or', ' not', ' to', ' be']
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text, {text[error.start]!a}, is half of a surrogate pair and has no UTF-8 "
            "bytes: drop such halves with text.encode('utf-8', 'ignore').decode()"
        ) from None
    return PATTERN.findall(text)


def merge_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """The ids with each occurrence of the pair replaced by `new`, from left to right.

    >>> merge_pair([7, 7, 7, 8], (7, 7), 9)
    [9, 7, 8]
    """
    merged, place = [], 0
    while place < len(ids):
        found = ids[place] == pair[0] and place + 1 < len(ids) and ids[place + 1] == pair[1]
        merged.append(new if found else ids[place])
        place += 2 if found else 1
    return merged


def train_merges(text: str, n_merges: int) -> list[Pair]:
    """Learn pairs of ids from a text, the most frequent first, ties to the smaller ids; merge i makes the id 256 + i.

    Nothing is counted twice: each different word stands once, with its count; a merge touches only the words that hold
    its pair; and a heap offers the most frequent pair, whose count is corrected if it has fallen since. Fewer merges
    come back where no pair is left. Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("there is nothing to learn merges from: the text is empty")
    words = Counter(split_words(text))
    chains, times = [[ID_OF_BYTE[byte] for byte in word.encode()] for word in words], list(words.values())
    counts, places, merges = Counter(), defaultdict(set), []
    for w, chain in enumerate(chains):
        for pair in pairwise(chain):
            counts[pair] += times[w]
            places[pair].add(w)
    heap = [(-counts[pair], pair) for pair in counts]
    heapq.heapify(heap)
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: counts only fall, so the true one belongs further down
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, fresh = 256 + len(merges), set()
        merges.append(pair)
        for w in places.pop(pair):
            merged = merge_pair(chains[w], pair, new)
            for old in pairwise(chains[w]):
                counts[old] -= times[w]
            for neighbours in pairwise(merged):
                counts[neighbours] += times[w]
                if new in neighbours:
                    places[neighbours].add(w)
                    fresh.add(neighbours)
            chains[w] = merged
        for neighbours in fresh:
            heapq.heappush(heap, (-counts[neighbours], neighbours))
    return merges


class BytePairTokenizer:
    """Bytes and merged pairs to integers and back; nothing is unknown, since every text is bytes.

    Ids: the 256 bytes, then one for each of `merges` in their order, then the `special` tokens, which `encode` finds
    in a text only if asked. `pieces[id]` is the bytes that an id stands for. Raises ValueError for merges that cannot
    have been learned in this order.

    >>> tokenizer = BytePairTokenizer.train("to be or not to be", vocab_size=258)
    >>> [tokenizer.pieces[i] for i in tokenizer.encode("to be")]
    [b'to', b' ', b'be']
    """

    def __init__(self, merges: Iterable[Pair], special: Iterable[str] = ()):
        self.merges, self.special = [(left, right) for left, right in merges], tuple(special)
        self.pieces = [bytes([byte]) for byte in BYTES]
        for left, right in self.merges:
            if not (0 <= left < len(self.pieces) and 0 <= right < len(self.pieces)):
                raise ValueError(f"merge {left}, {right} needs a token that is not there yet: keep the learned order")
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._id_of_pair = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._id_of_special = {text: len(self.pieces) + i for i, text in enumerate(self.special)}
        if len(set(self.pieces)) < len(self.pieces) or len(self._id_of_special) < len(self.special):
            raise ValueError("two tokens stand for the same text: each merge and special token may occur only once")
        if "" in self.special:
            raise ValueError("a special token is empty: give it a text that no one writes, such as <|endoftext|>")
        self.pieces += [text.encode() for text in self.special]
        longest_first = sorted(self.special, key=len, reverse=True)
        self._specials = regex.compile(f"({'|'.join(map(regex.escape, longest_first))})")
        self._known: dict[str, list[int]] = {}

    @classmethod
    def train(cls, text: str, vocab_size: int, special: Iterable[str] = ()) -> "BytePairTokenizer":
        """A tokenizer of `vocab_size` tokens, special ones included, or of fewer where the text has no more pairs.

        Raises ValueError for an empty text and for a vocabulary that has no room for the 256 bytes.
        """
        special = tuple(special)
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size {vocab_size} has no room for the 256 bytes"
                + (f" and {len(special)} special tokens" if special else "")
                + f": take at least {256 + len(special)}"
            )
        return cls(train_merges(text, vocab_size - 256 - len(special)), special)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens, special ones included."""
        return len(self.pieces)

    def encode(self, text: str, allow_special: bool = False) -> Tensor:
        """Text to ids (N,), torch.long; a special token's text stays plain text unless `allow_special` is set.

        Merges are made in the order in which they were learned. Raises ValueError as `split_words` does.
        """
        parts = self._specials.split(text) if allow_special and self.special else [text]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:  # what the split caught: a special token
                ids.append(self._id_of_special[part])
                continue
            for word in split_words(part):
                ids += self._known.get(word) or self._encode_word(word)
        return torch.tensor(ids, dtype=torch.long)

    def _encode_word(self, word: str) -> list[int]:
        ids = [ID_OF_BYTE[byte] for byte in word.encode()]
        while len(ids) > 1:
            first = min(pairwise(ids), key=lambda pair: self._id_of_pair.get(pair, math.inf))
            if first not in self._id_of_pair:
                break
            ids = merge_pair(ids, first, self._id_of_pair[first])
        if len(self._known) < _MOST_KNOWN:
            self._known[word] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids (N,), a tensor or any iterable of integers, back to text. Raises ValueError for an id outside 0..V-1.

        Bytes that are no whole character, as a cut can leave them, become the replacement character U+FFFD.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}: these come from another tokenizer")
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The tokenizer as a line of JSON."""
        fields = {"kind": "byte pairs", "version": 1, "merges": self.merges, "special": self.special}
        return json.dumps(fields) + "\n"

    @classmethod
    def from_json(cls, stored: str) -> "BytePairTokenizer":
        """The tokenizer that `to_json` wrote. Raises ValueError for a damaged text or one of another kind."""
        try:
            fields = json.loads(stored)
            if (fields["kind"], fields["version"]) != ("byte pairs", 1):
                raise ValueError
            return cls(((int(left), int(right)) for left, right in fields["merges"]), fields["special"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("this is no byte-pair tokenizer of version 1, or a damaged one: save it again") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BytePairTokenizer":
        """Read a tokenizer that `save` wrote. Raises ValueError, with the file's name, for anything else."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


Tokenizer = CharTokenizer | BytePairTokenizer


def tokenizer_from_json(stored: str) -> Tokenizer:
    """A tokenizer of either kind from its JSON. Raises ValueError for a damaged text or one of another kind."""
    try:
        kind = json.loads(stored)["kind"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("this is no tokenizer, or a damaged one: save it again") from None
    return (BytePairTokenizer if kind == "byte pairs" else CharTokenizer).from_json(stored)


def start_id(tokenizer: Tokenizer) -> int:
    """The id that stands before a text when a model is evaluated: that of the newline."""
    return ID_OF_BYTE[ord("\n")] if isinstance(tokenizer, BytePairTokenizer) else ngrams.START_ID


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Decode ids one by one, and yield text as soon as it is whole: a character of several bytes is never broken."""
    waiting = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if isinstance(tokenizer, BytePairTokenizer):
            text = waiting.decode(tokenizer.pieces[i])
        else:
            text = tokenizer.decode([i])
        if text:
            yield text
    if rest := waiting.decode(b"", final=True):
        yield rest
