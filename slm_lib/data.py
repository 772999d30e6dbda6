"""From raw text to batches: corpora, cleaning, characters to integers, the split, and batches of shifted windows."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import unicodedata
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slm_lib import playhouse

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
PLAYHOUSE_CHARACTERS = 1_000_000
SHORTEST_CORPUS = 1_000  # characters; below this there is nothing to hold out


@dataclass(frozen=True)
class Corpus:
    """A text to learn from, and what is known about it.

    `floor` is the lowest loss to expect on the validation text, in nats per character, or None where nobody knows it.
    `symbols` are the characters of the vocabulary, sorted; `split_at` is where training ends and validation begins.
    """

    name: str
    text: str
    source: str
    sha256: str
    floor: float | None
    symbols: str
    split_at: int

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self.text):,} characters, from {self.source})"


def load_corpus(name: str | os.PathLike | None = None) -> Corpus:
    """Return a corpus by name ("shakespeare", "playhouse") or the path of a UTF-8 text file, and print which one it is.

    Without a name: `$SLM_CORPUS` if that is set, else Shakespeare if it lies on this machine, else playhouse.
    Shakespeare asked for by name is downloaded where it is missing. Raises FileNotFoundError, ConnectionError or
    ValueError with a sentence that says what is wrong with the text.
    """
    name, why = (name, "") if name is not None else _choose()
    if name == "playhouse":
        corpus = _playhouse()
    elif name == "shakespeare":
        corpus = _shakespeare(find_shakespeare() or download_shakespeare())
    else:
        corpus = _own_file(Path(name))
    print(f"corpus: {corpus.name}, {len(corpus.text):,} characters, {len(corpus.symbols)} symbols{why}")
    return corpus


def _choose() -> tuple[str, str]:
    """The corpus for a reader who named none, and the reason in words."""
    if os.environ.get("SLM_CORPUS"):
        return os.environ["SLM_CORPUS"], " (named by SLM_CORPUS)"
    if find_shakespeare():
        return "shakespeare", " (found on this machine)"
    return "playhouse", " (Shakespeare is not on this machine; `python -m slm_lib download` fetches it)"


def _playhouse() -> Corpus:
    scenes = playhouse.scenes(PLAYHOUSE_CHARACTERS, seed=0)
    text = playhouse.text(scenes)
    # The split falls on a scene boundary, so that the held-out scenes are whole and their probability is exact.
    split_at, train_scenes = 0, 0
    while split_at < 0.9 * len(text):
        split_at += len(scenes[train_scenes].text)
        train_scenes += 1
    floor = -sum(scene.log_prob for scene in scenes[train_scenes:]) / (len(text) - split_at)
    return Corpus("playhouse", text, "its own grammar", _sha256(text), floor, playhouse.SYMBOLS, split_at)


def _shakespeare(path: Path) -> Corpus:
    text = _read(path)
    if _sha256(text) != SHAKESPEARE_SHA256:
        raise ValueError(f"{path} is not tiny Shakespeare (its SHA-256 differs): delete it, then download it anew")
    return Corpus("shakespeare", text, path.name, SHAKESPEARE_SHA256, None, playhouse.SYMBOLS, int(0.9 * len(text)))


def _own_file(path: Path) -> Corpus:
    text = _read(path)
    if len(text) < SHORTEST_CORPUS:
        raise ValueError(f"{path} has {len(text)} characters, too few to learn from: give at least {SHORTEST_CORPUS:,}")
    return Corpus(path.stem, text, path.name, _sha256(text), None, "".join(sorted(set(text))), int(0.9 * len(text)))


def _read(path: Path) -> str:
    """The text of a UTF-8 file with line ends made "\\n", or an error that names the file and the reason."""
    if not path.is_file():
        raise FileNotFoundError(f"no corpus or file '{path}': use 'shakespeare', 'playhouse' or a text file's path")
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"{path} is empty: give a file with text in it")
    if b"\0" in raw:
        raise ValueError(f"{path} is binary (it holds zero bytes), not text: give a plain UTF-8 text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start} does not fit): save it again as UTF-8") from None
    return text.replace("\r\n", "\n")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cache() -> Path:
    import pooch  # here and not above: it takes longer to import than all else in this module

    return Path(pooch.os_cache("slm_lib"))


def find_shakespeare() -> Path | None:
    """Where tiny Shakespeare lies on this machine: `$SLM_DATA_DIR`, then the user's cache; None if nowhere."""
    folders = [Path(os.environ["SLM_DATA_DIR"])] if os.environ.get("SLM_DATA_DIR") else []
    return next(filter(Path.is_file, (folder / SHAKESPEARE_FILE for folder in [*folders, _cache()])), None)


def download_shakespeare() -> Path:
    """Fetch tiny Shakespeare into the user's cache, check its hash, and return its path.

    Raises ConnectionError where there is no network or the transfer broke, ValueError for a file with the wrong hash;
    neither leaves anything behind.
    """
    import pooch
    import requests

    advice = "check the network and try again, or go on with the 'playhouse' corpus, which needs none"
    if not _reachable(SHAKESPEARE_URL):
        raise ConnectionError(f"{SHAKESPEARE_URL} cannot be reached from here: {advice}")
    fetch, known = pooch.HTTPDownloader(progressbar=True, timeout=(3, 10)), f"sha256:{SHAKESPEARE_SHA256}"
    try:
        return Path(pooch.retrieve(SHAKESPEARE_URL, known, SHAKESPEARE_FILE, _cache(), downloader=fetch))
    except requests.RequestException as error:
        reason = type(error).__name__
        raise ConnectionError(f"the download of {SHAKESPEARE_URL} broke off ({reason}): {advice}") from None
    except ValueError:
        problem = "is not tiny Shakespeare (its SHA-256 differs) and was thrown away"
        raise ValueError(f"what {SHAKESPEARE_URL} sent {problem}: {advice}") from None


def _reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether the host of `url` takes a connection; asked in a thread, since a name look-up knows no time-out."""
    address, answered = urllib.parse.urlparse(url), threading.Event()
    if urllib.request.getproxies().get(address.scheme):
        return True  # behind a proxy only the real request can tell

    def knock() -> None:
        with contextlib.suppress(OSError):
            port = address.port or {"http": 80, "https": 443}[address.scheme]
            socket.create_connection((address.hostname, port), timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def split(corpus: Corpus) -> tuple[str, str]:
    """Return the training text (the first 90 %) and the validation text (the rest)."""
    return corpus.text[: corpus.split_at], corpus.text[corpus.split_at :]


@dataclass(frozen=True)
class Cleaned:
    """A cleaned text, and a count of what cleaning changed: `replaced` by a plainer character, `dropped` for good."""

    text: str
    replaced: Counter
    dropped: Counter


PLAINER = {"\u201c": "'", "\u201d": "'", '"': "'", "\u2018": "'", "\u2019": "'"}  # quotation marks and apostrophes
PLAINER |= {"\u2013": "-", "\u2014": "--", "\u2026": "...", "\t": " ", "\r": ""}


def clean(text: str, symbols: str) -> Cleaned:
    """Bring a text into a vocabulary of `symbols`: plainer quotes and dashes, accents taken off, the rest dropped.

    A character that is in `symbols` is never touched, so a text that fits comes back as it was.

    >>> clean("\u201cCaf\u00e9\u201d \u2603", "'Cafe ").text
    "'Cafe' "
    """
    replaced, dropped, pieces = Counter(), Counter(), []
    for character in text:
        if character in symbols:
            pieces.append(character)
            continue
        plain = PLAINER.get(character) or unicodedata.normalize("NFKD", character)
        plain = "".join(c for c in plain if c in symbols)
        (replaced if plain or character == "\r" else dropped)[character] += 1
        pieces.append(plain)
    return Cleaned("".join(pieces), replaced, dropped)


class CharTokenizer:
    """Characters to integers and back: the id of a character is its place in `symbols`.

    >>> tokenizer = CharTokenizer("abc")
    >>> tokenizer.encode("cab").tolist()
    [2, 0, 1]
    >>> tokenizer.decode([2, 0, 1])
    'cab'
    """

    def __init__(self, symbols: str):
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError(f"symbols {symbols!r} must hold at least one character, each only once: use from_text")
        self.symbols = symbols
        self._id_of = {symbol: i for i, symbol in enumerate(symbols)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character that occurs in `text`, sorted."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """V, the number of different symbols."""
        return len(self.symbols)

    def encode(self, text: str) -> Tensor:
        """Text of N characters to ids (N,), torch.long. Raises ValueError for a character outside the vocabulary."""
        try:
            return torch.tensor([self._id_of[character] for character in text], dtype=torch.long)
        except KeyError:
            lacking = ", ".join(map(repr, sorted(set(text) - set(self.symbols))[:5]))
            raise ValueError(
                f"the vocabulary of {self.vocab_size} symbols lacks {lacking}: remove them, or use data.clean"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids (N,), a tensor or any iterable of integers, back to text. Raises ValueError for an id outside 0..V-1."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}: these come from another tokenizer")
        return "".join(self.symbols[i] for i in ids)

    def to_json(self) -> str:
        """The tokenizer as a line of JSON."""
        return json.dumps({"kind": "characters", "version": 1, "symbols": self.symbols}) + "\n"

    @classmethod
    def from_json(cls, stored: str) -> "CharTokenizer":
        """The tokenizer that `to_json` wrote. Raises ValueError for a damaged text or one of another kind."""
        try:
            fields = json.loads(stored)
            if (fields["kind"], fields["version"]) != ("characters", 1):
                raise ValueError
            return cls("".join(fields["symbols"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError("this is no character tokenizer of version 1, or a damaged one: save it again") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CharTokenizer":
        """Read a tokenizer that `save` wrote. Raises ValueError, with the file's name, for anything else."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def draw_batch(
    ids: Tensor, batch_size: int, block_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw windows at random places: contexts (B, T) and targets (B, T), the same windows one position later.

    `ids` (N,) may lie on any device, and the batch comes back on it; `generator` is a CPU one, so that a seed gives
    the same batches everywhere. Raises ValueError where no window of block_size + 1 fits into the text.
    """
    if min(batch_size, block_size) < 1:
        raise ValueError(f"batch_size {batch_size} and block_size {block_size} must both be at least 1")
    if len(ids) <= block_size:
        raise ValueError(f"block_size {block_size} does not fit into a text of {len(ids)} tokens: take a smaller one")
    starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    places = (starts + torch.arange(block_size + 1)).to(ids.device)  # (B, T+1) = (B, 1) + (T+1,)
    windows = ids[places]
    return windows[:, :-1], windows[:, 1:]
