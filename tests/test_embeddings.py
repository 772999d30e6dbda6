"""Embeddings against their definitions."""

import ast
import contextlib
import copy
import math
import re

import pytest
import torch
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st

from slm_lib import widgets
from slm_lib.embeddings import POSITIONS, Embedding, rotary_table, rotate, sinusoidal_table

CPU = torch.device("cpu")


def test_a_token_embedding_is_a_row_of_its_matrix():
    embedding = Embedding(5, 4, 6, position="none")
    ids = torch.tensor([[3, 0, 3]])
    one_hot = torch.nn.functional.one_hot(ids, 5).float()
    torch.testing.assert_close(embedding(ids), one_hot @ embedding.token.weight)


@pytest.mark.parametrize("position", POSITIONS)
def test_only_added_positions_tell_equal_tokens_apart(position):
    x = Embedding(5, 4, 6, position=position)(torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(x[0, 0], x[0, 3]) == (position in ("rotary", "none"))


def test_the_sinusoidal_table_is_the_papers_formula():
    table = sinusoidal_table(9, 6, torch.float64, CPU)
    for t in range(9):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_rotation_is_multiplication_by_a_complex_number():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    turned = rotate(x, *rotary_table(9, 8, torch.float64, CPU))
    frequencies = torch.tensor([10_000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * frequencies
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), atol=1e-12, rtol=0)


def test_a_table_made_while_evaluating_still_serves_training():
    rotary_table.cache_clear()
    with torch.inference_mode():
        rotary_table(5, 4, torch.float32, CPU)
    x = torch.randn(1, 5, 4, requires_grad=True)
    rotate(x, *rotary_table(5, 4, torch.float32, CPU)).sum().backward()
    assert x.grad is not None


# --- against torch and transformers, values and gradients -------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_the_embedding_has_the_values_and_gradients_of_torchs(position):
    torch.manual_seed(0)
    embedding = Embedding(7, 5, 6, position=position).double()
    ids, arriving = torch.randint(7, (3, 4)), torch.randn(3, 4, 6, dtype=torch.float64)
    token = embedding.token.weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.embedding(ids, token)
    places = {"sinusoidal": sinusoidal_table(4, 6, torch.float64, CPU)}.get(position, 0)
    if position == "learned":
        places = torch.nn.functional.embedding(torch.arange(4), embedding.place.weight.detach())
        (gradient,) = torch.autograd.grad(embedding(ids), embedding.place.weight, arriving)
        torch.testing.assert_close(gradient[:4], arriving.sum(0))
        assert torch.equal(gradient[4], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(embedding(ids), expected + places)
    (mine,) = torch.autograd.grad(embedding(ids), embedding.token.weight, arriving)
    (theirs,) = torch.autograd.grad(expected, token, arriving)
    torch.testing.assert_close(mine, theirs)


def test_rotate_is_llamas_with_its_gradient():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(1)
    query, key, arriving = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)  # (B, H, T, D) each
    query.requires_grad_()
    cosine, sine = rotary_table(9, 8, torch.float64, CPU)
    twice = [torch.cat([half, half], dim=-1)[None] for half in (cosine, sine)]
    theirs, their_key = llama.apply_rotary_pos_emb(query, key, *twice)
    torch.testing.assert_close(rotate(query, cosine, sine), theirs, atol=1e-14, rtol=0)
    torch.testing.assert_close(rotate(key, cosine, sine), their_key, atol=1e-14, rtol=0)
    mine = torch.autograd.grad(rotate(query, cosine, sine), query, arriving)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, query, arriving), atol=1e-14, rtol=0)


def test_the_rotary_table_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    cosine, sine = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(20)[None])
    for mine, theirs in zip(rotary_table(20, 8, torch.float32, CPU), (cosine, sine), strict=True):
        torch.testing.assert_close(torch.cat([mine, mine], dim=-1), theirs[0], atol=1e-5, rtol=0)


def test_the_sinusoidal_table_is_marians_interleaved():
    marian = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = marian.MarianSinusoidalPositionalEmbedding(30, 8).create_weight()  # sines first, then cosines
    mine = sinusoidal_table(30, 8, torch.float32, CPU)
    torch.testing.assert_close(torch.cat([mine[:, 0::2], mine[:, 1::2]], dim=1), theirs, atol=1e-6, rtol=0)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 8))
def test_rotary_scores_depend_on_the_distance_only(m, n, shift, pairs):
    query, key = torch.randn(2, 2 * pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(pairs))
    cosine, sine = rotary_table(81, 2 * pairs, torch.float64, CPU)

    def score(m, n):
        return rotate(query, cosine[m], sine[m]) @ rotate(key, cosine[n], sine[n])

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), atol=1e-12, rtol=0)


# --- the lesson: each proof is seen to fail ---------------------------------------------------------------------------

SOURCES = code_cells(lesson_path("embeddings"))


class BrokenEmbedding(Embedding):
    def forward(self, ids):
        return super().forward(ids) * 1.000001


BROKEN = {
    "Embedding": BrokenEmbedding,
    "sinusoidal_table": lambda *args: sinusoidal_table(*args) * 1.000001,
    "rotary_table": lambda *args: tuple(part * 1.000001 for part in rotary_table(*args)),
    "rotate": lambda x, cosine, sine: rotate(x, cosine, -sine),
}
# What the proofs of the four names do not need: trained models, the corpus, measurements, and training.
UNNEEDED = re.compile(
    r"load_model|load_corpus|corpus|entrance|leaving|cosines|traces|often|bpe|word|kinds|\bafter\b|chance|moves|right\["
)


def is_proof(source):
    return "check.same(" in source and any(re.search(rf"\b{name}\b", source) for name in BROKEN)


def proofs():
    """Walk through the lesson's light cells; yield each proof of a library name and the names that it can see."""
    last, names = max(i for i, source in enumerate(SOURCES) if is_proof(source)), {}
    for source in SOURCES[: last + 1]:
        if is_proof(source):
            yield source, names
        elif UNNEEDED.search(source):
            continue
        with contextlib.suppress(NameError):
            exec(source, names)
        names["plt"].close("all")


def with_broken(name, names):
    """The names with one thing broken, in the embeddings that were built before too."""
    broken = {**names, name: BROKEN[name]}
    for key, value in names.items():
        if name == "Embedding" and type(value) is Embedding:
            broken[key] = copy.deepcopy(value)
            broken[key].__class__ = BrokenEmbedding
    return broken


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in proofs():
        used = {name for name in BROKEN if re.search(rf"\b{name}\b", source)}
        here = {name for name in used if notices(source, with_broken(name, names))}
        assert here, f"no broken thing is noticed by this proof:\n{source}"
        caught |= here
    assert caught == set(BROKEN)


# --- its panels, driven from Python -----------------------------------------------------------------------------------


def lesson_names(*definitions, **given):
    """The lesson's imports and the functions asked for, in a space of their own."""
    space = dict(given)
    for source in SOURCES:
        tree = ast.parse(source)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in definitions]
        exec(compile(ast.Module(imports + wanted, []), "lesson", "exec"), space)
    assert set(definitions) <= set(space)
    return space


def panel_source(start):
    """The call that builds the panel whose function is named first."""
    calls = [n for source in SOURCES for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    found = [call for call in calls if ast.unparse(call).startswith(start)]
    assert len(found) == 1
    return ast.unparse(found[0])


def test_the_panel_of_hands_shows_that_only_the_distance_counts():
    names = lesson_names("hands", "turned_by_hand")
    panel = eval(panel_source("widgets.Panel(hands"), names)
    score = panel.draw(**panel.values).axes[4].get_title(loc="left")
    panel.set(place_of_query=22, place_of_key=20)  # both moved by ten
    assert panel.draw(**panel.values).axes[4].get_title(loc="left") == score
    shown = panel.image.value
    panel.set(place_of_key=19)
    assert panel.image.value != shown
    assert panel.draw(**panel.values).axes[4].get_title(loc="left") != score


def test_the_film_moves_with_its_slider():
    torch.manual_seed(0)
    film = [torch.randn(6, 4, dtype=torch.float64) for _ in range(31)]
    names = lesson_names("frame", "constellation", "write_names", "principal_by_hand")
    names |= {"traces": [(None, {"entrance": film, "exit": film[::-1]}, [])], "often_ids": torch.arange(5)}
    names |= {"often": list("aeTx\n"), "often_kinds": ["vowel", "vowel", "capital", "consonant", "mark"]}
    names |= {"frames": range(0, 301, 10), "rising": dict.fromkeys(("entrance", "exit"), torch.rand(1, 31))}
    names["KINDS"] = {"vowel": "b", "consonant": "c", "capital": "y", "mark": "r"}
    panel = eval(panel_source("widgets.Panel(frame"), names)
    shown = panel.image.value
    panel.set(step=200)
    assert panel.image.value != shown
    shown = panel.image.value
    panel.set(end="entrance")
    assert panel.image.value != shown and panel.status.value == ""


def small_training(*definitions):
    ids = torch.randint(12, (500,), generator=torch.Generator().manual_seed(0))
    return lesson_names(*definitions, S=12, train_ids=ids, width=64)


def test_a_way_to_tell_positions_can_be_trained_live():
    names = small_training("train_one", "draw_run")
    names["found"] = {way: torch.tensor([2.0, 2.1]) for way in POSITIONS}
    names |= {"ways_to_choose": widgets.choice(["rotary", "none"]), "steps_to_go": widgets.slider(2, 800, 3, 1)}
    panel = eval(panel_source("widgets.RunPanel(train_one"), names)
    for way in ("rotary", "none"):
        panel.set(way=way)
        panel.run_button.click()
        assert panel.wait(60) and panel.status.value.startswith("done")
        assert panel.result[0] == way and len(panel.result[1]) == 3
        assert panel.image.value


def test_a_start_can_be_tried_live():
    names = small_training("race", "draw_race", "small_gpt")
    generator = torch.Generator().manual_seed(1)
    names["tables"] = {"counted": torch.randn(12, 64, generator=generator).double()}
    names["start"] = {"table": widgets.choice(["counted", "trained"]), "shuffled": widgets.entry(False)}
    panel = eval(panel_source("widgets.RunPanel(race"), names)
    ends = []
    for shuffled in (False, True):
        panel.set(shuffled=shuffled)
        panel.run_button.click()
        assert panel.wait(120) and panel.status.value.startswith("done")
        assert panel.result["random"] and len(panel.result["counted"]) == 80
        ends.append(panel.result)
    assert ends[0]["random"] == ends[1]["random"] and ends[0]["counted"] != ends[1]["counted"]


# --- its exercises ----------------------------------------------------------------------------------------------------


def rows_kept_once(arriving, ids, vocab_size, block_size):
    token, place = torch.zeros(vocab_size, 2).double(), torch.zeros(block_size, 2).double()
    token[ids] = arriving
    place[: ids.shape[1]] = arriving.sum(0)
    return token, place


def places_of_the_first_text(arriving, ids, vocab_size, block_size):
    token, place = torch.zeros(vocab_size, 2).double(), torch.zeros(block_size, 2).double()
    token.index_add_(0, ids.flatten(), arriving.flatten(0, 1))
    place[: ids.shape[1]] = arriving[0]
    return token, place


def places_without_those_not_reached(arriving, ids, vocab_size, block_size):
    token = torch.zeros(vocab_size, 2).double().index_add_(0, ids.flatten(), arriving.flatten(0, 1))
    return token, arriving.sum(0)


def purity(own, expect):
    def answer(vectors, labels):
        unit = torch.nn.functional.normalize(vectors, dim=1)
        cosines = unit @ unit.T
        nearest = (cosines if own else cosines.fill_diagonal_(-2)).argmax(1)
        return (labels[nearest] == labels).double().mean().item(), expect(torch.bincount(labels).double())

    return answer


def exact(n):
    return ((n * (n - 1)).sum() / (n.sum() * (n.sum() - 1))).item()


def step(angle, sign):
    def answer(k, n_embd):
        matrix = torch.zeros(n_embd, n_embd, dtype=torch.float64)
        for i in range(0, n_embd, 2):
            c, s = math.cos(angle(k, i, n_embd)), math.sin(angle(k, i, n_embd))
            block = torch.tensor([[c, -sign * s], [sign * s, c]], dtype=torch.float64)
            matrix[i : i + 2, i : i + 2] = block
        return matrix

    return answer


def turned_back(x, cosine, sine):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine + b * sine, b * cosine - a * sine], -1).flatten(-2)


def not_interleaved_again(x, cosine, sine):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


def mirrored(x, cosine, sine):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine + b * sine, a * sine - b * cosine], -1).flatten(-2)


def stretched(x, cosine, sine):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, a * sine - b * cosine], -1).flatten(-2)


WRONG = {
    "my_gradients": [rows_kept_once, places_of_the_first_text, places_without_those_not_reached],
    "my_purity": [
        purity(True, exact),
        purity(False, lambda n: ((n / n.sum()) ** 2).sum().item()),
        purity(False, lambda n: 1 / 3),
    ],
    "my_step": [
        step(lambda k, i, n: k / 10_000 ** (i / n), -1),
        step(lambda k, i, n: k, 1),
        step(lambda k, i, n: k / 10_000 ** (2 * i / n), 1),
    ],
    "my_rotate": [rotate, turned_back, not_interleaved_again, mirrored, stretched],
}


def test_the_exercises_are_graded():
    assert_graded("embeddings", WRONG)
