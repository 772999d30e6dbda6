"""Corpora from every place they may come from, the tokenizer on any text, and batches; then the lesson's exercises."""

import hashlib
import http.server
import threading
import time
from dataclasses import replace

import pytest
import torch
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st

from slm_lib import data, grammar, playhouse


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A machine on which no corpus was ever found: empty cache, no variables."""
    monkeypatch.delenv("SLM_DATA_DIR", raising=False)
    monkeypatch.delenv("SLM_CORPUS", raising=False)
    monkeypatch.setattr(data, "_cache", lambda: tmp_path / "cache")
    return tmp_path


@pytest.fixture
def server(elsewhere, monkeypatch):
    """A web server on this machine whose answer the test chooses, in the place of the corpus's home."""
    answer = {"body": b"", "length": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(answer["length"] or len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "SHAKESPEARE_URL", f"http://127.0.0.1:{httpd.server_port}/input.txt")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield answer
        httpd.shutdown()


def test_playhouse_is_the_corpus_of_a_machine_without_any(elsewhere, capsys):
    corpus = data.load_corpus()
    assert corpus.name == "playhouse" and "not on this machine" in capsys.readouterr().out
    train, val = data.split(corpus)
    assert train + val == corpus.text and 0.9 <= len(train) / len(corpus.text) < 0.92
    assert corpus.floor == pytest.approx(-playhouse.log_prob(val) / len(val), rel=1e-9)


def test_the_environment_names_a_corpus(elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    assert data.load_corpus().name == "playhouse" and "named by SLM_CORPUS" in capsys.readouterr().out


def test_a_download_is_checked_kept_and_found_again(server, monkeypatch):
    server["body"] = text = b"To be, or not to be: that is the question.\n" * 50
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    corpus = data.load_corpus("shakespeare")
    assert corpus.text.encode() == text and corpus.floor is None
    server["body"] = b"gone"
    assert data.load_corpus().text == corpus.text  # from the cache, and chosen unasked


def test_a_download_with_the_wrong_hash_is_thrown_away(server, elsewhere):
    server["body"] = b"Whan that Aprille with his shoures soote\n"
    with pytest.raises(ValueError, match="SHA-256 differs.*playhouse"):
        data.load_corpus("shakespeare")
    assert not data.find_shakespeare()


def test_a_download_that_is_cut_off_leaves_nothing(server, elsewhere):
    server["body"], server["length"] = b"First Cit", 1_000_000
    with pytest.raises((ConnectionError, ValueError), match="playhouse"):
        data.load_corpus("shakespeare")
    assert not data.find_shakespeare()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/input.txt", "http://no-such-host.invalid/input.txt"])
def test_no_network_is_said_soon(elsewhere, monkeypatch, url):
    monkeypatch.setattr(data, "SHAKESPEARE_URL", url)
    monkeypatch.setattr(data.urllib.request, "getproxies", dict)
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot be reached.*playhouse"):
        data.load_corpus("shakespeare")
    assert time.monotonic() - begin < 10  # the promise to the reader, not a measure of speed


def test_a_wrong_file_in_the_data_folder_is_refused(elsewhere, monkeypatch):
    (elsewhere / data.SHAKESPEARE_FILE).write_text("not Shakespeare\n" * 100)
    monkeypatch.setenv("SLM_DATA_DIR", str(elsewhere))
    with pytest.raises(ValueError, match="is not tiny Shakespeare"):
        data.load_corpus()


@pytest.mark.parametrize("content, words", [
    (None, "no corpus or file"), (b"", "is empty"), (b"ab\0c" * 500, "is binary"), (b"caf\xe9 " * 500, "byte 3"),
    (b"too short", "9 characters"),
])  # fmt: skip
def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path, content, words):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"mine.txt.*{words}|{words}.*mine.txt"):
        data.load_corpus(path)


def test_the_readers_own_file(tmp_path):
    (tmp_path / "mine.txt").write_bytes("\ufeffÅ, two lines\r\n".encode() * 100)
    corpus = data.load_corpus(tmp_path / "mine.txt")
    assert corpus.text == "Å, two lines\n" + "\ufeffÅ, two lines\n" * 99 and corpus.name == "mine"
    assert len(data.split(corpus)[0]) == int(0.9 * len(corpus.text))


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_unicode_text_comes_back(text):
    tokenizer = data.CharTokenizer.from_text(text + "x")
    again = data.CharTokenizer.from_json(tokenizer.to_json())
    assert again.decode(again.encode(text)) == text and again.symbols == tokenizer.symbols


@given(st.text(alphabet="abc\u00e9\ud800", min_size=1), st.sampled_from("abc"))
def test_a_character_outside_the_vocabulary_is_refused_by_name(text, symbols):
    tokenizer = data.CharTokenizer(symbols)
    foreign = sorted(set(text) - set(symbols))
    if not foreign:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return
    with pytest.raises(ValueError) as refused:
        tokenizer.encode(text)
    assert all(repr(character) in str(refused.value) for character in foreign)


def test_ids_of_another_tokenizer_are_refused():
    for bad in ([0, 3], [-1]):
        with pytest.raises(ValueError, match="0..2"):
            data.CharTokenizer("abc").decode(bad)


def test_a_tokenizer_file_comes_back_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    data.CharTokenizer("a\u00e9\n").save(path)
    assert data.CharTokenizer.load(path).symbols == "a\u00e9\n"
    whole = path.read_text()
    for damaged in (whole[:20], "{}", "[]", whole.replace("characters", "words"), whole.replace("1", "2")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: .* version 1, or a damaged one"):
            data.CharTokenizer.load(path)


@given(st.text())
def test_cleaning_ends_in_the_vocabulary_and_leaves_what_fits(text):
    cleaned = data.clean(text, playhouse.SYMBOLS)
    assert set(cleaned.text) <= set(playhouse.SYMBOLS)
    assert data.clean(cleaned.text, playhouse.SYMBOLS).text == cleaned.text
    touched = sum(cleaned.replaced.values()) + sum(cleaned.dropped.values())
    assert touched == sum(character not in playhouse.SYMBOLS for character in text)


def test_targets_are_the_context_one_later_and_every_window_can_be_drawn():
    ids = torch.arange(10)
    x, y = data.draw_batch(ids, 500, 4, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (500, 4) and torch.equal(x + 1, y)
    assert torch.equal(x - x[:, :1], torch.arange(4).expand(500, 4))
    assert sorted(set(x[:, 0].tolist())) == list(range(6))  # the last start still leaves room for its target


def test_a_seed_draws_the_same_batch():
    draws = [data.draw_batch(torch.arange(99), 8, 4, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("batch_size, block_size, words", [(0, 4, "batch_size 0"), (4, -1, "block_size -1"),
                                                           (4, 10, "does not fit into a text of 10")])
def test_a_batch_that_cannot_be_drawn_is_refused(batch_size, block_size, words):
    with pytest.raises(ValueError, match=words):
        data.draw_batch(torch.arange(10), batch_size, block_size)


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------

LESSON = lesson_path("data")
LAST_PROOF = "floor of playhouse"


def changed(owner, name, change):
    """A part of the library and how to break it: its name, and the same with its result changed."""
    whole = getattr(owner, name)
    return name, (owner, lambda *args, **kwargs: change(whole(*args, **kwargs)))


def breakable():
    return [
        changed(data, "split", lambda parts: (parts[0] + parts[1][:1], parts[1][1:])),
        changed(data, "clean", lambda cleaned: replace(cleaned, text=cleaned.text.replace("'", "", 1))),
        changed(data.CharTokenizer, "encode", lambda ids: ids.roll(1)),
        changed(data.CharTokenizer, "decode", lambda text: text[::-1]),
        changed(data, "draw_batch", lambda batch: (batch[0], batch[0])),
        changed(playhouse.Grammar, "draw", lambda scene: scene._replace(text=scene.text.upper())),
        changed(playhouse.Grammar, "log_prob", lambda nats: nats * 1.000001),
        changed(playhouse.Grammar, "surprisal", lambda nats: nats[::-1]),
        changed(playhouse.Grammar, "entropy", lambda rate: rate._replace(nats_per_scene=rate[0] * 1.000001)),
        changed(grammar, "log_mass", lambda mass: mass * 1.000001),
        changed(grammar, "remember", lambda memory: memory[::-1]),
        changed(grammar, "bind", lambda memory: memory[::-1]),
        changed(playhouse, "log_prob", lambda nats: nats * 1.000001),
        changed(playhouse, "surprisal", lambda nats: nats * 1.000001),
        changed(playhouse, "scenes", lambda scenes: scenes[1:]),
        changed(playhouse, "text", str.swapcase),
    ]


def cells():
    sources = code_cells(LESSON)
    (last,) = [place for place, source in enumerate(sources) if LAST_PROOF in source]
    assert not any("check.same(" in source for source in sources[last + 1 :])
    return sources[: last + 1]


def wrong_facts(names):
    """What the library told earlier in the lesson, as it must not be."""
    if "play" in names:
        yield {"play": replace(names["play"], sha256="", floor=0.0)}
    if "drawn" in names:
        moved = [[r._replace(distance=r.distance + 1) for r in scene.recalls] for scene in names["drawn"]]
        yield {"drawn": [scene._replace(recalls=r) for scene, r in zip(names["drawn"], moved, strict=True)]}


def notices_broken(source, names, owner, name, broken):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        return notices(source, names)


def test_each_proof_fails_when_the_library_is_broken():
    names, caught = {}, set()
    for source in cells():
        if "check.same(" in source:
            here = [(owner, name) for name, (owner, broken) in breakable()
                    if f".{name}" in source and notices_broken(source, dict(names), owner, name, broken)]  # fmt: skip
            noticed = here or any(notices(source, {**names, **wrong}) for wrong in wrong_facts(names))
            assert noticed, f"no broken thing is noticed by this proof:\n{source}"
            caught |= set(here)
        exec(source, names)
        names["plt"].close("all")
    assert caught == {(owner, name) for name, (owner, _) in breakable()}


# --- the exercises of 01_data -----------------------------------------------------------------------------------------


def counts_repeats(words, plainer):
    """A word that occurs twice is taken for a collision."""
    came_from = {}
    for word in words:
        came_from.setdefault(plainer(word), []).append(word)
    return {plain: sorted(set(origins)) for plain, origins in came_from.items() if len(origins) > 1}


def keeps_lone_words(words, plainer):
    return {plainer(word): sorted({other for other in words if plainer(other) == plainer(word)}) for word in words}


def keeps_only_the_changed(words, plainer):
    """The word that is plain already is left out."""
    changed = {word for word in words if plainer(word) != word}
    collided = {plainer(word) for word in changed if plainer(word) in words}
    return {plain: sorted(word for word in changed if plainer(word) == plain) for plain in collided}


def drops_the_empty_line(characters, share):
    at = characters.find("\n\n", int(share * len(characters)))
    return characters[:at], characters[at + 2 :]


def cuts_anywhere(characters, share):
    at = int(share * len(characters))
    return characters[:at], characters[at:]


def cuts_after_any_line(characters, share):
    at = characters.find("\n", int(share * len(characters))) + 1
    return characters[:at], characters[at:]


def misses_the_speech_that_begins_there(characters, share):
    at = characters.find("\n\n", int(share * len(characters))) + 2
    return characters[:at], characters[at:]


def drops_the_rest(ids, block_size):
    starts = range(0, len(ids) - block_size, block_size)
    return [(ids[s : s + block_size], ids[s + 1 : s + block_size + 1]) for s in starts]


def shifts_within_the_window(ids, block_size):
    """Cuts first and shifts afterwards, so the first id of every window is never a target."""
    pieces = [ids[s : s + block_size] for s in range(0, len(ids), block_size)]
    return [(piece[:-1], piece[1:]) for piece in pieces if len(piece) > 1]


def does_not_shift(ids, block_size):
    return [(ids[s : s + block_size], ids[s : s + block_size]) for s in range(0, len(ids), block_size)]


def overlaps(ids, block_size):
    return [(ids[s : s + block_size], ids[s + 1 : s + block_size + 1]) for s in range(len(ids) - block_size)]


def draws_a_second_name():
    return ("scene = Here comes <name>, as the bells of the old town ring. Welcome, <name>./\n"
            "name = Tom | Ann | Meg | Will")  # fmt: skip


def favours_a_name():
    return ("scene = Here comes <who:name>, as the bells of the old town ring. Welcome, <=who:name>./\n"
            "name = 2* Tom | Ann | Meg | Will")  # fmt: skip


def says_it_again_at_once():
    return "scene = Welcome, <who:name>! O <=who:name>./\nname = Tom | Ann | Meg | Will"


def marks_no_recall():
    return ("scene = Here comes <who:name>, as the bells of the old town ring. Welcome, <=who>./\n"
            "name = Tom | Ann | Meg | Will")  # fmt: skip


def leaves_more_to_chance():
    return ("scene = Here comes <who:name>, as the bells of the old town <ring>. Welcome, <=who:name>./\n"
            "name = Tom | Ann | Meg | Will\nring = ring | toll")  # fmt: skip


def test_the_exercises():
    assert_graded(
        "data",
        {
            "my_collisions": [counts_repeats, keeps_lone_words, keeps_only_the_changed],
            "my_split": [
                drops_the_empty_line, cuts_anywhere, cuts_after_any_line, misses_the_speech_that_begins_there,
            ],
            "my_windows": [drops_the_rest, shifts_within_the_window, does_not_shift, overlaps],
            "my_grammar": [
                draws_a_second_name, favours_a_name, says_it_again_at_once, marks_no_recall, leaves_more_to_chance,
            ],
        },
    )  # fmt: skip
