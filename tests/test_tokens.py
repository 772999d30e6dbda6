"""Byte pairs: equal to Hugging Face's `tokenizers`, merge for merge and id for id, and safe with any text at all."""

import codecs
import json
import math
import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers as hf
import torch
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lib import check, data, tokens
from slm_lib.ngrams import loss_units
from slm_lib.tokens import (
    BYTES,
    PATTERN,
    BytePairTokenizer,
    decode_stream,
    merge_pair,
    split_words,
    start_id,
    tokenizer_from_json,
    train_merges,
)

LESSON = lesson_path("tokens")
LINE = "she sells sea shells by the sea shore"
# No halves of surrogate pairs, which are no text; no unassigned code points, on which Unicode tables of different age
# disagree. Everything else, and often what makes trouble: odd white space, marks that combine, joiners, both writing
# directions, apostrophes.
TROUBLE = " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u180e\u2003\u200b\u2028\u3000\ufeff'sdmtlrev\u0301\u20e3\u200d"
TROUBLE += "0٣½Ⅷ漢字שלום\u202eمرحبا🙂👩🚀é.,-_\x00\x7f"
ANY = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.text(st.one_of(st.sampled_from(TROUBLE), ANY), max_size=60)
REPETITIVE = st.lists(st.sampled_from(["a", "aa", "ab", "ba", " a", " b", "é", "\n", "'s"]), min_size=1, max_size=120)


def huggingface(text, vocab_size):
    """Its tokenizer and the pairs of ids that it learned."""
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([text], trainer)
    model = json.loads(theirs.to_str())["model"]
    return theirs, [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def corpora():
    names = ["playhouse", *(["shakespeare"] if data.find_shakespeare() else [])]
    return pytest.mark.parametrize("name", names)


# --- against Hugging Face ---------------------------------------------------------------------------------------------


@corpora()
def test_same_merges_and_same_ids_on_a_whole_corpus(name):
    text = data.load_corpus(name).text
    ours = BytePairTokenizer.train(text, 256 + 1024)
    theirs, merges = huggingface(text, 256 + 1024)
    assert ours.merges == merges and ours.vocab_size == theirs.get_vocab_size() == 1280
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text).ids
    assert ours.decode(ids) == text
    assert train_merges(text, 4_000) == huggingface(text, 4_256)[1]


@given(TEXTS)
def test_any_text_is_cut_as_theirs_and_comes_back_whole(text):
    words = split_words(text)
    cut = hf.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert words == [text[start:end] for _, (start, end) in cut]
    assert "".join(words) == text


def test_every_assigned_character_is_the_same_kind_to_both():
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
    for i in range(0, len(characters), 500):
        text = "".join(f"a{c}1{c}?{c} {c}{c}a" for c in characters[i : i + 500])
        assert split_words(text) == [text[start:end] for _, (start, end) in byte_level.pre_tokenize_str(text)]


@settings(max_examples=60)
@given(TEXTS.filter(bool), TEXTS, st.integers(256, 300))
def test_any_text_gives_the_same_merges_and_ids(text, other, vocab_size):
    ours, (theirs, merges) = BytePairTokenizer.train(text, vocab_size), huggingface(text, vocab_size)
    assert ours.merges == merges
    for each in (text, other):
        ids = ours.encode(each)
        assert ids.tolist() == theirs.encode(each).ids and ids.dtype == torch.long
        assert ours.decode(ids) == each


@settings(max_examples=100)
@given(REPETITIVE, st.integers(256, 340))
def test_ties_and_runs_are_settled_alike(parts, vocab_size):
    text = "".join(parts)
    ours, (theirs, merges) = BytePairTokenizer.train(text, vocab_size), huggingface(text, vocab_size)
    assert ours.merges == merges and ours.encode(text).tolist() == theirs.encode(text).ids


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_decode_alike_also_where_characters_are_broken(ids):
    text = "naïve café ☃☃☃ 👩‍🚀👩‍🚀 שלום שלום " * 3
    ours, (theirs, _) = BytePairTokenizer.train(text, 300), huggingface(text, 300)
    ids = [i for i in ids if i < ours.vocab_size]
    assert ours.decode(ids) == theirs.decode(ids)
    assert "".join(decode_stream(ours, ids)) == ours.decode(ids)


def test_special_tokens_have_the_ids_that_theirs_have():
    ours = BytePairTokenizer.train(LINE, 270, special=["<|end|>", "<|end|>x"])
    theirs, _ = huggingface(LINE, 268)
    theirs.add_special_tokens(["<|end|>", "<|end|>x"])
    for text in ("a<|end|>b", "<|end|><|end|>", "<|end|>x", "", " <|end|> \n"):
        assert ours.encode(text, allow_special=True).tolist() == theirs.encode(text).ids
        assert ours.decode(ours.encode(text, allow_special=True)) == ours.decode(ours.encode(text)) == text
        assert max(ours.encode(text).tolist(), default=0) < 268


# --- learning ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2)), st.integers(0, 2), st.integers(0, 2))
def test_a_merge_leaves_no_pair_and_can_be_undone(ids, left, right):
    merged = merge_pair(ids, (left, right), 9)
    assert [i for m in merged for i in ((left, right) if m == 9 else (m,))] == ids
    assert (left, right) not in pairwise(merged)


def naive(text, n_merges):
    """Count everything again for every merge."""
    chains, merges = [[BYTES.index(byte) for byte in word.encode()] for word in PATTERN.findall(text)], []
    while len(merges) < n_merges:
        counts = Counter(pair for chain in chains for pair in pairwise(chain))
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        chains = [merge_pair(chain, merges[-1], 255 + len(merges)) for chain in chains]
    return merges


@settings(max_examples=60)
@given(REPETITIVE, st.integers(0, 40))
def test_counts_kept_up_to_date_are_counts_made_anew(parts, n_merges):
    assert train_merges("".join(parts), n_merges) == naive("".join(parts), n_merges)


def test_fewer_merges_are_the_first_ones():
    text = data.load_corpus("playhouse").text[:50_000]
    assert train_merges(text, 300)[:70] == train_merges(text, 70)


def test_one_repeated_byte_is_learned_until_no_pair_is_left():
    text = "a" * 100_000
    tokenizer = BytePairTokenizer.train(text, 1_000)
    assert tokenizer.vocab_size == huggingface(text, 1_000)[0].get_vocab_size() < 300
    assert len(tokenizer.encode(text)) == 1 and tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bytes_have_gpt2s_order():
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    ids = {character: i for i, character in enumerate(sorted(alphabet))}
    theirs = {byte: ids[hf.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))[0][0]]
              for byte in range(128)}  # fmt: skip
    assert all(tokens.ID_OF_BYTE[byte] == i for byte, i in theirs.items()) and sorted(BYTES) == list(range(256))
    assert start_id(BytePairTokenizer([])) == 198 and start_id(data.CharTokenizer("\nab")) == 0


# --- any text, any file -----------------------------------------------------------------------------------------------


ODD = ["", "\x00\x01\x1f\x7f", "🙂👩‍🚀", "שלום \u202eمرحبا", "e\u0301é", "\ufeff", "a" * 99_999]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back_exactly(text):
    for tokenizer in (BytePairTokenizer([]), BytePairTokenizer.train("so long a text " + text, 300)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == tokenizer.decode(ids.tolist()) and ids.dtype == torch.long
        assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()


REFUSED = {
    "character 2 of the text, '\\\\ud83d', is half of a surrogate pair": lambda: split_words("ab\ud83d"),
    "half of a surrogate pair and has no UTF-8 bytes: drop": lambda: BytePairTokenizer([]).encode("\udc00"),
    "the text is empty": lambda: BytePairTokenizer.train("", 300),
    "vocab_size 255 has no room for the 256 bytes: take at least 256": lambda: BytePairTokenizer.train(LINE, 255),
    "the 256 bytes and 2 special tokens: take at least 258": lambda: BytePairTokenizer.train(LINE, 257, ["<a>", "<b>"]),
    "merge 256, 7 needs a token that is not there yet": lambda: BytePairTokenizer([(256, 7)]),
    "merge -1, 7 needs": lambda: BytePairTokenizer([(-1, 7)]),
    "two tokens stand for the same text": lambda: BytePairTokenizer([(1, 2), (1, 2)]),
    "each merge and special token": lambda: BytePairTokenizer([], ["<a>", "<a>"]),
    "a special token is empty": lambda: BytePairTokenizer([], [""]),
    "ids must lie in 0..255": lambda: BytePairTokenizer([]).decode([256]),
    "these come from another tokenizer": lambda: BytePairTokenizer([]).decode(torch.tensor([-1])),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_with_one_sentence(message):
    with pytest.raises(ValueError, match=message) as refusal:
        REFUSED[message]()
    assert ". " not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_brings_the_tokenizer_back(tmp_path):
    tokenizer = BytePairTokenizer.train(LINE, 265, special=["<|end|>"])
    tokenizer.save(tmp_path / "t.json")
    for again in (BytePairTokenizer.load(tmp_path / "t.json"), tokenizer_from_json(tokenizer.to_json())):
        assert (again.merges, again.special, again.pieces) == (tokenizer.merges, tokenizer.special, tokenizer.pieces)
        assert again.to_json() == tokenizer.to_json()
    letters = data.CharTokenizer("\nab")
    assert tokenizer_from_json(letters.to_json()).symbols == letters.symbols


STORED = BytePairTokenizer.train(LINE, 262).to_json()
DAMAGED = [
    "", "{}", "[]", "null", "7", STORED[:-5], STORED[:40], STORED.replace('"version": 1', '"version": 2'),
    STORED.replace('"merges"', '"marges"'), STORED.replace("[220, 82]", "[220]"), STORED.replace("220", '"x"'),
    STORED.replace("[220, 82]", "[920, 82]"), STORED.replace('"special": []', '"special": [1]'),
    STORED.replace('"special": []', '"special": 3'), data.CharTokenizer("ab").to_json(),
]  # fmt: skip


@pytest.mark.parametrize("stored", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, stored):
    (tmp_path / "mine.json").write_text(stored)
    with pytest.raises(ValueError, match="mine.json: this is no byte-pair tokenizer of version 1, or a damaged one"):
        BytePairTokenizer.load(tmp_path / "mine.json")
    if "characters" not in stored:
        with pytest.raises(ValueError, match="this is no .*tokenizer.*: save it again"):
            tokenizer_from_json(stored)


def test_a_binary_file_is_refused_by_name(tmp_path):
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="mine.json"):
        BytePairTokenizer.load(tmp_path / "mine.json")


def test_the_cache_of_words_changes_nothing(monkeypatch):
    monkeypatch.setattr(tokens, "_MOST_KNOWN", 3)
    tokenizer = BytePairTokenizer.train(LINE, 270)
    assert tokenizer.encode(LINE * 3).tolist() == tokenizer.encode(LINE * 3).tolist()
    assert len(tokenizer._known) == 3


@given(TEXTS)
def test_a_stream_of_letters_and_of_bytes_is_the_text(text):
    tokenizer = BytePairTokenizer([])
    pieces = list(decode_stream(tokenizer, tokenizer.encode(text).tolist()))
    assert pieces == list(text)  # byte by byte, and never a part of a character
    if text:
        letters = data.CharTokenizer.from_text(text)
        assert list(decode_stream(letters, letters.encode(text).tolist())) == list(text)


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------


class BrokenTokenizer(BytePairTokenizer):
    def encode(self, text, allow_special=False):
        return super().encode(text, allow_special).roll(1)

    def decode(self, ids):
        return super().decode(ids)[:-1]


BROKEN = {
    "BYTES": sorted(range(256)),
    "split_words": lambda text: [text[:2], *split_words(text[2:])],
    "merge_pair": lambda ids, pair, new: merge_pair(ids[::-1], pair[::-1], new)[::-1] + [0],
    "train_merges": lambda text, n_merges: [(1, 1), *train_merges(text, n_merges)[:-1]],
    "BytePairTokenizer": BrokenTokenizer,
    "tokenizer": lambda tokenizer: BrokenTokenizer(tokenizer.merges),
    "decode_stream": lambda tokenizer, ids: list(decode_stream(tokenizer, ids))[1:],
    "tokenizer_from_json": lambda stored: BytePairTokenizer(tokenizer_from_json(stored).merges[1:-600]),
    "start_id": lambda tokenizer: start_id(tokenizer) + 1,
    "loss_units": lambda *args: loss_units(*args)._replace(bits_per_character=1.0),
}
LONG_WORK = r"both_ways\(s|plays|grid|bits\[|bits\)|_rungs|load_corpus\(\)|corpus_|nats\.|\(nats, |widgets\."


def proofs():
    """Walk through the lesson with a short text, leaving out long work; yield each proof and the names it can see."""
    names, last = {}, max(i for i, source in enumerate(code_cells(LESSON)) if "check.same(" in source)
    for source in code_cells(LESSON)[: last + 1]:
        if "check.same(" in source:
            yield source, names
        elif re.search(LONG_WORK, source) or "grade_" in source:
            continue
        try:
            exec(source, names)
        except AssertionError as error:  # a claim about the whole text
            assert "claim" in str(error)
        if "train, val" in source:
            names["train"], names["val"] = names["train"][:60_000], names["val"][:10_000]
        names["plt"].close("all")


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in proofs():
        here = set()
        for name, broken in BROKEN.items():
            if not re.search(rf"\b{name}\b", source):
                continue
            if name == "tokenizer":
                broken = broken(names["tokenizer"]) if "tokenizer" in names else None
            # merges in a wrong order may be refused before they are compared
            if notices(source, {**names, name: broken}, ValueError):
                here.add(name)
        assert here, f"no broken thing is noticed by this proof:\n{source}"
        caught |= here
    assert caught == set(BROKEN)


# --- the widgets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panels():
    """The panels of the lesson, by the function that draws in them."""
    found = {}
    names = [names for _, names in proofs()][-1]
    for source in code_cells(LESSON):
        before, *call = re.split(r"^(?=widgets\.)", source, flags=re.M)
        if call:
            exec(before, names)
            found[re.search(r"\((\w+)", call[0])[1]] = eval(call[0], names)
    return found


UNUSUAL = [
    "aaaa aaaa", "🙂🙂🙂", "🙂" * 120, "é", "שלום \x00", "x" * 500, "$x$ costs $5 or $\\frac{$ $\\frac{$",
    "नमस्ते नमस्ते", "สวัสดี", "日本語 日本語", " ", "\n\n\t", "\ufffd\ufeff",
]  # fmt: skip


@pytest.mark.filterwarnings("error")  # such as a letter that the font does not have
def test_the_readers_own_text_is_merged_step_by_step(panels):
    panel = panels["draw_own"]
    first = panel.image.value
    panel.set(merges=7)
    assert panel.image.value != first and not panel.status.value
    for text in UNUSUAL:
        for words in (True, False):
            panel.set(text=text, words=words, merges=30)
            assert not panel.status.value
    for words in (True, False):
        panel.set(text="\ud83d!", words=words)
        assert "half of a surrogate pair" in panel.status.value
    panel.set(text="")
    assert panel.text == "Write something."


@pytest.mark.filterwarnings("error")
def test_the_size_of_the_vocabulary_turns(panels):
    panel = panels["draw_size"]
    first = panel.image.value
    panel.set(merges=0)
    none = panel.image.value
    panel.set(text="THE number 2026 ☃", merges=1024)
    assert len({first, none, panel.image.value}) == 3 and not panel.status.value
    for text in UNUSUAL:
        for merges in (0, 3840):
            panel.set(text=text, merges=merges)
            assert not panel.status.value
    panel.set(text="a\udc00")
    assert "half of a surrogate pair" in panel.status.value
    panel.set(text="")
    assert panel.text == "Write something."


def test_no_piece_is_read_as_mathematics_or_runs_off_its_box(panels):
    draw = panels["draw_own"].draw
    labels = list(draw("$x^2$ $x^2$", 30, False).axes[0].texts)
    assert labels and not any(label.get_parse_math() for label in labels)
    for text in ("a" * 120, "🙂" * 120):
        assert max(len(label.get_text()) for label in draw(text, 30, False).axes[0].texts) <= 30


def test_the_library_is_timed_when_asked(panels):
    panel = panels["time_here"]
    assert panel.text == "not timed yet"
    panel.set(merges=64)
    panel.start()
    assert panel.wait(60) and panel.text.startswith("64 merges learned in")


# --- the exercises of 03_tokens ---------------------------------------------------------------------------------------


def merge_skipping_nothing(ids, pair, new):
    return [new if (a, b) == tuple(pair) else a for a, b in pairwise([*ids, None])]


def merge_once(ids, pair, new):
    places = [i for i, found in enumerate(pairwise(ids)) if found == pair][:1]
    return [*ids[: places[0]], new, *ids[places[0] + 2 :]] if places else ids


def merge_from_the_right(ids, pair, new):
    return merge_pair(ids[::-1], pair[::-1], new)[::-1]


def merge_in_place(ids, pair, new):
    ids[:] = merge_pair(ids, pair, new)
    return ids


def next_pair(copies=True, key=lambda counts, pair: (-counts[pair], pair), pairs=lambda chain: list(pairwise(chain))):
    def answer(chains, times):
        counts = Counter()
        for chain, count in zip(chains, times, strict=True):
            for pair in pairs(chain):
                counts[pair] += count if copies else 1
        return min(counts, key=lambda pair: key(counts, pair), default=None)

    return answer


def encode_left_to_right(ids, merges):
    place = 0
    while place + 1 < len(ids):
        pair = (ids[place], ids[place + 1])
        if pair in merges:
            ids, place = [*ids[:place], 256 + merges.index(pair), *ids[place + 2 :]], 0
        else:
            place += 1
    return ids


def encode_in_reverse(ids, merges):
    for i in reversed(range(len(merges))):
        ids = merge_pair(ids, merges[i], 256 + i)
    return ids


def encode_the_longest(ids, merges):
    chains = [[i] for i in range(256)]
    for left, right in merges:
        chains.append(chains[left] + chains[right])
    found, rest = [], list(ids)
    while rest:
        best = max((i for i, chain in enumerate(chains) if rest[: len(chain)] == chain), key=lambda i: len(chains[i]))
        found, rest = [*found, best], rest[len(chains[best]) :]
    return found


def decode_piece_by_piece(ids, pieces):
    return "".join(pieces[i].decode("utf-8", "replace") for i in ids), b""


def decode_without_waiting(ids, pieces):
    return b"".join(pieces[i] for i in ids).decode("utf-8", "replace"), b""


def decode_dropping_the_broken(ids, pieces):
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    return decoder.decode(b"".join(pieces[i] for i in ids)), decoder.getstate()[0]


WRONG = {
    "my_merge": [merge_skipping_nothing, merge_once, merge_from_the_right, merge_in_place],
    "my_next_pair": [
        next_pair(copies=False),
        next_pair(key=lambda counts, pair: -counts[pair]),
        next_pair(key=lambda counts, pair: (-counts[pair], pair[1], pair[0])),
        next_pair(pairs=lambda chain: set(pairwise(chain))),
    ],
    "my_encode": [encode_left_to_right, encode_in_reverse, encode_the_longest],
    "my_decode": [decode_piece_by_piece, decode_without_waiting, decode_dropping_the_broken],
    "my_bits_per_character": [
        lambda surprises, text: surprises.mean().item() / math.log(2),
        lambda surprises, text: surprises.sum().item() / len(text),
        lambda surprises, text: surprises.sum().item() / math.log(2) / len(text.encode()),
    ],
}


def test_graders():
    assert_graded("tokens", WRONG)


def encode_through_all_merges(ids, merges):
    for i, pair in enumerate(merges):
        ids = merge_pair(ids, pair, 256 + i)
    return ids


def units_of_the_library(surprises, text):
    return loss_units(surprises.mean(), len(text) / len(surprises)).bits_per_character


OTHER_WAYS = {
    "grade_merge": merge_pair,
    "grade_next_pair": next_pair(),
    "grade_encode": encode_through_all_merges,
    "grade_bits_per_character": units_of_the_library,
}


@pytest.mark.parametrize("grader", OTHER_WAYS)
def test_another_right_answer_is_right(grader):
    assert check.exercise(OTHER_WAYS[grader], check.graders(LESSON)[grader]) == "right"
