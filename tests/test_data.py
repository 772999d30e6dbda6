"""Corpora from every place they may come from, the tokenizer on any text, and batches; then the lesson's exercises."""

import hashlib
import http.server
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_lib import data, playhouse


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
        with pytest.raises(ValueError, match="version 1, or a damaged one"):
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
