"""Units, intervals, the paired test, parts of a loss and calibration against their definitions; and the lesson."""

import contextlib
import itertools
import math
import random
import re
from statistics import fmean
from types import FunctionType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, execute_but_for_long_work, lesson_path, notices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slm_lib import evaluation, scores, training, widgets
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.ngrams import loss_units
from slm_lib.tokens import BytePairTokenizer, start_id

LESSON = lesson_path("evaluation")
TEXT = "To be, or not to be: naïve café! "
VALUES = st.lists(st.floats(0, 9), min_size=2, max_size=30)


def gpt(vocab_size=11, block_size=8):
    torch.manual_seed(0)
    model = GPT(GPTConfig.modern(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=2, n_embd=8)).double()
    nn.init.normal_(model.head.weight)
    return model.eval()


# --- the loss of a text -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40), st.text(min_size=1, max_size=60))
def test_all_units_say_the_same_total(nats, text):
    text = text.encode("utf-8", "ignore").decode() or "a"
    loss = evaluation.text_loss(torch.tensor(nats, dtype=torch.float64), text)
    assert math.isclose(loss.nats, sum(nats), abs_tol=1e-9)
    assert math.isclose(loss.bits_per_character * len(text) * math.log(2), sum(nats), abs_tol=1e-9)
    assert math.isclose(loss.bits_per_byte * len(text.encode()) * math.log(2), sum(nats), abs_tol=1e-9)
    assert loss.perplexity == loss_units(fmean(nats)).perplexity or math.isclose(loss.perplexity, math.exp(fmean(nats)))
    assert math.isclose(min(math.log(loss.perplexity_per_word), 700), min(sum(nats) / max(1, len(text.split())), 700),
                        rel_tol=1e-9, abs_tol=1e-9)  # fmt: skip


@given(st.text("aé中🙂 b\u0301", min_size=1, max_size=30), st.integers(256, 270))
def test_tokens_are_shared_out_over_their_characters(text, size):
    tokenizer = BytePairTokenizer.train(TEXT + text, size)
    ids = tokenizer.encode(text)
    nats = torch.rand(len(ids), dtype=torch.float64)
    shared = evaluation.per_character(nats, tokenizer, ids)
    assert len(shared) == len(text) and math.isclose(shared.sum(), nats.sum(), abs_tol=1e-12)


def test_a_character_model_keeps_its_surprise_and_pairs_are_measured_after_a_newline():
    letters, model = CharTokenizer("\n abcdefghi"), gpt()
    text = "a bad face"
    expected = training.surprisal(model, letters.encode(text))
    assert torch.equal(evaluation.character_surprisal(model, letters, text), expected.double())
    pairs = BytePairTokenizer.train(TEXT, 258)
    model, ids = gpt(258), pairs.encode(TEXT)
    shared = evaluation.character_surprisal(model, pairs, TEXT, block_size=5)
    assert len(shared) == len(TEXT)
    assert math.isclose(shared.sum(), training.surprisal(model, ids, 5, start_id(pairs)).sum(), rel_tol=1e-12)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 30])
def test_logits_in_separate_windows_are_those_of_the_evaluator(length):
    model, ids = gpt(), torch.randint(11, (length,), generator=torch.Generator().manual_seed(1))
    logits = evaluation.text_logits(model, ids, start_id=3)
    nats = F.cross_entropy(logits, ids, reduction="none")
    assert torch.allclose(nats, training.surprisal(model, ids, start_id=3), atol=1e-12)


@given(st.integers(1, 8), st.integers(1, 40))
@settings(max_examples=60)
def test_with_overlap_each_token_sees_what_the_stride_promises(stride, length):
    model, ids = gpt(), torch.randint(11, (length,), generator=torch.Generator().manual_seed(length))
    logits, read = evaluation.text_logits(model, ids, stride), [0, *ids.tolist()]
    for i in range(length):
        first = 0 if i < 8 else -(-(i - 7) // stride) * stride
        assert i - first >= min(i, 8 - stride)
        with torch.no_grad():
            assert torch.allclose(logits[i], model(torch.tensor([read[first : i + 1]]))[0, -1], atol=1e-10)


def test_logits_leave_the_model_in_its_mode_and_do_without_gradients():
    model = gpt().train()
    assert not evaluation.text_logits(model, torch.arange(9)).requires_grad and model.training


# --- how sure ---------------------------------------------------------------------------------------------------------


@given(VALUES, st.integers(1, 12), st.integers(0, 3))
def test_the_interval_is_about_the_mean_and_can_be_repeated(values, block, seed):
    block = min(block, len(values) - 1)
    found = evaluation.bootstrap(values, block, 100, seed=seed)
    assert found == evaluation.bootstrap(torch.tensor(values, dtype=torch.float64), block, 100, seed=seed)
    assert math.isclose(found.mean, fmean(values), abs_tol=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_for_independent_values_the_error_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=2000)
    assert evaluation.bootstrap(values, 1, 2000).error == pytest.approx(values.std() / math.sqrt(2000), rel=0.06)
    wide, narrow = (evaluation.bootstrap(values, 1, 500, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_blocks_may_have_lengths_of_their_own():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert evaluation.bootstrap(values, [3, 3, 1]) == evaluation.bootstrap(values, 3)
    assert evaluation.bootstrap(values, [1, 6]).mean == 4.0


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9))
def test_the_chance_is_the_share_of_signs_that_go_as_far(differences):
    ways = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    expected = fmean(way >= abs(sum(differences)) for way in ways)
    found = evaluation.compare(np.array(differences, float), np.zeros(len(differences)), 1)
    back = evaluation.compare(np.zeros(len(differences)), np.array(differences, float), 1)
    assert found.chance == pytest.approx(expected) == back.chance
    assert found.difference.mean == pytest.approx(-back.difference.mean)


def test_many_blocks_are_turned_at_random_and_equal_models_do_not_differ():
    differences = np.random.default_rng(1).normal(0.3, size=16)
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert evaluation.compare(differences, np.zeros(16), 1).chance == pytest.approx(exact, abs=0.02)
    assert evaluation.compare(differences, differences, 1).chance == 1.0


def test_a_model_compared_with_its_equal_is_seldom_called_different():
    generator, called = np.random.default_rng(0), 0
    for _ in range(200):
        first, second = generator.normal(size=(2, 400))
        called += evaluation.compare(first, second, 20).chance <= 0.05
    assert called <= 20


# --- where the loss is ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.1, 9), st.sampled_from("abc")), min_size=1, max_size=30))
def test_parts_add_up_to_the_whole(pairs):
    values, labels = zip(*pairs, strict=True)
    parts = evaluation.by_label(values, labels)
    assert list(parts) == sorted(set(labels))
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    for label, part in parts.items():
        own = [value for value, other in pairs if other == label]
        assert part.count == len(own) and part.mean == pytest.approx(fmean(own))


@given(st.text("aB' \n,.", max_size=40))
def test_every_character_has_a_kind_and_its_word_is_known_or_not(text):
    kinds, status = evaluation.character_kinds(text), evaluation.word_status(text, text[: len(text) // 2])
    assert len(kinds) == len(status) == len(text)
    in_words = [kind in ("word begins", "in a word") for kind in kinds]
    assert in_words == [s != "no word" for s in status]
    assert all(inside for inside, c in zip(in_words, text, strict=True) if c.isalpha())
    assert "unseen" not in evaluation.word_status(text, text)


def test_words_and_kinds_by_example():
    assert evaluation.word_status("to do't", "do to")[3:] == ["unseen"] * 4
    kinds = evaluation.character_kinds("'tis O'er é\n7")
    shown = {"word begins": "W", "in a word": "w", "mark": "m", "space": "_", "line end": "e"}
    assert "".join(shown[kind] for kind in kinds) == "mWww_Wwww_Wem"


# --- calibration ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_bins_include_their_upper_end(pairs, bins):
    confidence, right = (torch.tensor(x) for x in zip(*pairs, strict=True))
    confidence = confidence.double()
    rows = []
    for i in range(bins):
        inside = [(c, r) for c, r in zip(confidence.tolist(), right.tolist(), strict=True)
                  if (i / bins < c or i == 0) and c <= (i + 1) / bins]  # fmt: skip
        if inside:
            rows.append((fmean(c for c, _ in inside), fmean(r for _, r in inside), len(inside)))
    found = evaluation.reliability(confidence, right, bins)
    assert torch.allclose(torch.stack([x.double() for x in found], 1), torch.tensor(rows, dtype=torch.float64))
    error = sum(abs(c - r) * n for c, r, n in rows) / len(pairs)
    assert evaluation.calibration_error(confidence, right, bins) == pytest.approx(error, abs=1e-12)


def test_bins_are_those_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    generator = np.random.default_rng(0)
    said = generator.random(500)
    came = generator.random(500) < said
    true, mean = calibration.calibration_curve(came, said, n_bins=10)
    found = evaluation.reliability(torch.tensor(said), torch.tensor(came))
    assert np.allclose(found.confidence, mean) and np.allclose(found.accuracy, true)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_is_found_again_and_nothing_near_it_is_better(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 6, dtype=torch.float64, generator=generator)
    targets = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
    found = evaluation.fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.08)
    losses = [F.cross_entropy(logits / (found * factor), targets) for factor in (0.99, 1.0, 1.01)]
    assert losses[1] == min(losses)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "an empty text has no loss": lambda: evaluation.text_loss(torch.ones(3), ""),
    "0 tokens": lambda: evaluation.text_loss(torch.ones(0), "a"),
    "a stride of 9": lambda: evaluation.text_logits(gpt(), torch.arange(9), 9),
    "a stride of 0": lambda: evaluation.text_logits(gpt(), torch.arange(9), 0),
    "a text of 0 tokens": lambda: evaluation.text_logits(gpt(), torch.arange(0)),
    "1 blocks of 5 values": lambda: evaluation.bootstrap([1.0] * 5, 5),
    "for 4 values": lambda: evaluation.bootstrap([1.0] * 4, [2, 3]),
    "the same characters": lambda: evaluation.compare([1.0, 2.0], [1.0, 2.0, 3.0], 1),
    "3 values and 2 labels": lambda: evaluation.by_label([1.0, 2.0, 3.0], "ab"),
    "0 values and 0 labels": lambda: evaluation.by_label([], []),
    "3 forecasts for 2 outcomes": lambda: evaluation.reliability(torch.ones(3), torch.ones(2)),
    "0 forecasts": lambda: evaluation.reliability(torch.ones(0), torch.ones(0)),
    "chances from 0 to 1": lambda: evaluation.reliability(torch.tensor([1.2]), torch.tensor([True])),
    "all of 2 guesses are right": lambda: evaluation.fit_temperature(torch.eye(2), torch.arange(2)),
    "all of 0 guesses": lambda: evaluation.fit_temperature(torch.ones(0, 3), torch.arange(0)),
    "no better than chance": lambda: evaluation.fit_temperature(torch.eye(2), torch.tensor([1, 0])),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_refused_with_one_sentence(message):
    with pytest.raises(ValueError, match=message) as refusal:
        BAD_INPUT[message]()
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------


def off(function):
    """The function, a millionth too large, or with its last entry first."""

    def broken(*args, **kwargs):
        return spoil(function(*args, **kwargs))

    return broken


def spoil(found):
    if isinstance(found, float | torch.Tensor):
        return found * 1.000001 if not isinstance(found, torch.Tensor) or found.is_floating_point() else found + 1
    if isinstance(found, dict):
        return {key: spoil(value) for key, value in found.items()}
    if isinstance(found, tuple):
        return type(found)(*map(spoil, found)) if hasattr(found, "_fields") else tuple(map(spoil, found))
    if isinstance(found, list):
        return found[::-1]
    return found


BROKEN = {name: getattr(evaluation, name) for name in (
    "text_loss", "per_character", "character_surprisal", "text_logits", "bootstrap", "compare", "by_label",
    "character_kinds", "word_status", "reliability", "calibration_error", "fit_temperature",
)}  # fmt: skip
BROKEN |= {name: getattr(scores, name) for name in ("accuracy", "confusion", "class_scores", "mean_scores", "bleu")}
# Cells that train or count long; of these only the functions that they define are kept.
LONG_WORK = re.compile(
    r"load_corpus\(\)|load_model|gpt_logits|of_gpt|of_token|coverage\(|held\b|counters|surprise\[|twin|readers|stage|"
    r"verdicts|seven|strides|playhouse\.|leak|honest|sure|judges|costs|systems|minds|widgets\.|val_text|spoken|exercise"
)


def walk():
    """Run the lesson, long work left out; yield each cell's source, and the names before it ran."""
    names = {}
    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(LESSON.parent):
        patched.setenv("SLM_CORPUS", "playhouse")
        for source in code_cells(LESSON):
            yield source, names
            long = LONG_WORK.search(source) and "check.same(" not in source
            long = long and "from slm_lib" not in source
            execute_but_for_long_work(source, names, long, NameError, KeyError)
            if "train_ids" not in names and "play_train" in names:
                names["train_ids"], names["play_ids"] = (names["letters"].encode(names[part][:20_000])
                                                         for part in ("play_train", "play_val"))  # fmt: skip


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson without its long work."""
    return [names for _, names in walk()][-1]


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in walk():
        if "check.same(" not in source:
            continue
        used = {name for name in BROKEN if re.search(rf"(evaluation|scores)\.{name}\(", source)}
        noticed = set()
        for name in used:
            home = evaluation if hasattr(evaluation, name) else scores
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(home, name, off(BROKEN[name]))
                noticed |= {name} if notices(source, dict(names)) else set()
        assert noticed, f"no broken thing is noticed by this proof:\n{source}"
        caught |= noticed
    assert caught == set(BROKEN)


# --- its exercises ----------------------------------------------------------------------------------------------------


def takes_characters_for_independent(nats, block, error):
    return block * math.ceil((nats.std().item() / error) ** 2 / block)


def counts_blocks(nats, block, error):
    means = nats[: len(nats) // block * block].view(-1, block).mean(1)
    return math.ceil((means.std().item() / error) ** 2)


def forgets_the_root(nats, block, error):
    means = nats[: len(nats) // block * block].view(-1, block).mean(1)
    return block * math.ceil(means.std().item() / error)


def rings_at_a_single_character(nats, exact, level):
    rings = ((exact - nats) >= -math.log(level)).nonzero()
    return int(rings[0]) if len(rings) else None


def minds_no_sign(nats, exact, level):
    rings = ((exact - nats).cumsum(0).abs() >= -math.log(level)).nonzero()
    return int(rings[0]) if len(rings) else None


def looks_at_the_end_alone(nats, exact, level):
    return len(nats) - 1 if (exact - nats).sum() >= -math.log(level) else None


def never_rings(nats, exact, level):
    return None


def rings_too_early(nats, exact, level):
    rings = ((exact - nats).cumsum(0) >= 0.1 - math.log(level) / 4).nonzero()
    return int(rings[0]) if len(rings) else None


def equal_widths(confidence, right, bins):
    return evaluation.calibration_error(confidence, right, bins)


def does_not_sort(confidence, right, bins):
    gaps = confidence - right.double()
    return sum(group.sum().abs().item() for group in gaps.tensor_split(bins)) / len(gaps)


def weighs_alike(confidence, right, bins):
    gaps = (confidence - right.double())[confidence.argsort()]
    return fmean(group.mean().abs().item() for group in gaps.tensor_split(bins))


def sorts_one_alone(confidence, right, bins):
    gaps = confidence.sort().values - right.double()
    return sum(group.sum().abs().item() for group in gaps.tensor_split(bins)) / len(gaps)


def f1_of_the_means(table):
    precision = (table.diag() / table.sum(0).clamp(min=1)).mean()
    recall = (table.diag() / table.sum(1).clamp(min=1)).mean()
    return (2 * precision * recall / (precision + recall)).item()


def leaves_out_empty_labels(table):
    both = (table.sum(0) + table.sum(1)).double()
    return (2 * table.diag() / both)[both > 0].mean().item()


def the_accuracy(table):
    return (table.diag().sum() / table.sum()).item()


def turns_round(reference):
    return " ".join(reference.split()[::-1])


def swaps_two(reference):
    first, *words, last = reference.split()
    return " ".join([last, *words, first])


def adds_a_word(reference):
    return "now " + reference


def test_graders():
    assert_graded("evaluation", {
        "my_length": [takes_characters_for_independent, counts_blocks, forgets_the_root],
        "my_alarm": [rings_at_a_single_character, minds_no_sign, looks_at_the_end_alone, never_rings, rings_too_early],
        "my_equal_bins": [equal_widths, does_not_sort, weighs_alike, sorts_one_alone],
        "my_macro_f1": [f1_of_the_means, leaves_out_empty_labels, the_accuracy],
        "my_fake": [turns_round, swaps_two, adds_a_word],
    })  # fmt: skip


# --- its panels -------------------------------------------------------------------------------------------------------


def with_names(function, names):
    """A function of the lesson that sees other names."""
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)


def test_the_panel_shows_any_two_models_on_any_text(lesson):
    minds = {"one": lambda text: torch.ones(len(text)), "half": lambda text: torch.linspace(0, 1, len(text))}
    draw = with_names(lesson["draw_two_minds"], {"minds": minds, "gpt_letters": lesson["letters"]})
    first, second = widgets.choice(["one", "half"]), widgets.choice(["half", "one"])
    darkest = widgets.slider(1, 10, 6)
    panel = widgets.Panel(draw, text=widgets.entry("O Romeo"), first=first, second=second, darkest=darkest)
    seen = {panel.image.value}
    texts = [{"text": "“Wherefore” art thou"}, {"text": "Line\nand line"}]
    for change in ({"first": "half"}, {"second": "one"}, {"darkest": 2}, *texts):
        panel.set(**change)
        assert panel.status.value == "" and panel.image.value not in seen, (change, panel.status.value)
        seen.add(panel.image.value)
    panel.set(text="☃")
    assert panel.text == "Write something."


def test_the_run_shows_what_is_left(lesson):
    names = {"left": {"6-gram": 0.2}}
    watch, draw = (with_names(lesson[name], {**lesson, **names}) for name in ("watch", "draw_left"))
    steps, width = widgets.slider(20, 40, 20), widgets.slider(16, 32, 16, 16)
    panel = widgets.RunPanel(watch, draw, steps=steps, n_embd=width, seed=0)
    panel.start()
    assert panel.wait(120) and panel.status.value.startswith("done")
    shares = [share for _, share in panel.result]
    assert shares[-1] < 0.9 < shares[0] < 1.3 and panel.result[-1][0] == 20


# --- its small helpers ------------------------------------------------------------------------------------------------


@given(VALUES, st.floats(0, 1))
def test_quantiles_by_hand_are_those_of_numpy(lesson, values, share):
    assert lesson["quantile_by_hand"](values, share) == pytest.approx(np.quantile(values, share), abs=1e-9)


@given(st.text("aB' \n,.", max_size=40))
def test_kinds_and_status_by_hand_are_the_librarys(lesson, text):
    assert lesson["kinds_by_hand"](text) == evaluation.character_kinds(text)
    known = text[: len(text) // 2]
    assert lesson["status_by_hand"](text, known) == evaluation.word_status(text, known)


def test_lines_that_stand_in_both_parts_are_found_with_their_places(lesson):
    train, val = "a line of some length\nshort\nanother line, long\n", "short\nanother line, long\nnew line of words\n"
    assert lesson["twice"](train, val, least=10) == [(6, "another line, long")]


def test_the_bound_on_the_alarm_holds():
    drawn, rang = random.Random(0), 0
    for _ in range(500):
        below = 0.0
        for _ in range(60):
            below += math.log(2) + math.log(0.8 if drawn.random() < 0.5 else 0.2)
            if below >= 2:
                rang += 1
                break
    assert rang / 500 <= math.exp(-2) + 0.03
