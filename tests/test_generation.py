"""What is drawn comes from the model's own probabilities, reshaped as asked, and a seed repeats it."""

import contextlib
import itertools
import random
import re
from types import FunctionType
from unittest.mock import patch

import pytest
import torch
from exercises import assert_graded, code_cells, execute_but_for_long_work, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from slm_lib import checkpoints, generation, widgets
from slm_lib.blocks import GPT, Block, GPTConfig
from slm_lib.cache import KeyValueCache
from slm_lib.checkpoints import load_model
from slm_lib.data import CharTokenizer
from slm_lib.generation import (
    Concordance,
    beam_search,
    continuations,
    distinct,
    generate,
    next_probabilities,
    penalise,
    stream,
)  # fmt: skip
from slm_lib.tokens import BytePairTokenizer

TOKENIZER = CharTokenizer("\nabc")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(vocab_size=4, block_size=6, n_layer=1, n_head=1, n_embd=8))
    torch.nn.init.normal_(model.head.weight)
    return model


def test_temperature_and_top_k_reshape_the_softmax():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    torch.testing.assert_close(next_probabilities(logits), logits.double().softmax(-1))
    torch.testing.assert_close(next_probabilities(logits, 0.5), (2 * logits.double()).softmax(-1))
    assert next_probabilities(logits, 0).tolist() == [0, 1, 0, 0]
    top = next_probabilities(logits, 1.0, top_k=2)
    assert top.tolist() == pytest.approx([0, 1 / (1 + torch.e**-1), 1 - 1 / (1 + torch.e**-1), 0])
    assert torch.equal(next_probabilities(logits, 1.0, top_k=99), next_probabilities(logits))


LOGITS = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
WISHES = [
    ({"temperature": 0.7}, [theirs.TemperatureLogitsWarper(0.7)]),
    ({"temperature": 1e-300}, [theirs.TopKLogitsWarper(1)]),
    ({"top_k": 1}, [theirs.TopKLogitsWarper(1)]),
    ({"top_k": 5}, [theirs.TopKLogitsWarper(5)]),
    *(({"top_p": p}, [theirs.TopPLogitsWarper(p)]) for p in (0.05, 0.5, 0.9, 0.999, 1.0)),
    *(({"min_p": p}, [theirs.MinPLogitsWarper(p)]) for p in (0.0, 0.02, 0.3, 1.0)),
    (
        {"temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
        [theirs.TemperatureLogitsWarper(1.4), theirs.TopKLogitsWarper(12), theirs.TopPLogitsWarper(0.8),
         theirs.MinPLogitsWarper(0.1)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "warpers"), WISHES, ids=[str(wish) for wish, _ in WISHES])
def test_each_wish_is_what_transformers_makes_of_it(wish, warpers):
    scores = LOGITS.clone()
    for warper in warpers:
        scores = warper(None, scores)
    torch.testing.assert_close(next_probabilities(LOGITS, **wish), scores.softmax(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3, 5.0])
def test_the_penalty_is_that_of_transformers(penalty):
    seen = torch.randint(30, (40, 7), generator=torch.Generator().manual_seed(1))
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(seen, LOGITS.clone())
    torch.testing.assert_close(penalise(LOGITS, seen, penalty), expected, atol=1e-12, rtol=0)
    assert torch.equal(penalise(LOGITS[0], seen[0], penalty), penalise(LOGITS, seen, penalty)[0])


@given(st.integers(0, 10**6), st.floats(0.05, 3), st.integers(1, 9), st.floats(0.01, 1), st.floats(0, 1))
def test_whatever_is_wished_stays_a_distribution_with_the_likeliest_first(seed, temperature, top_k, top_p, min_p):
    logits = 5 * torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    chances = next_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(chances.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (chances >= 0).all() and ((chances > 0).sum(-1) <= top_k).all()
    assert torch.equal(chances.argmax(-1), logits.argmax(-1))
    smallest_kept = logits.masked_fill(chances == 0, torch.inf).amin(-1)
    assert (logits.masked_fill(chances > 0, -torch.inf).amax(-1) <= smallest_kept).all()


def test_letters_are_drawn_as_often_as_the_model_says(model):
    with torch.no_grad():
        expected = model(TOKENIZER.encode("ab")[None])[0, -1].softmax(-1)
    drawn = "".join(generate(model, TOKENIZER, "ab", 1, 1.0, seed=seed) for seed in range(2_000))
    shares = torch.tensor([drawn.count(symbol) / 2_000 for symbol in TOKENIZER.symbols])
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)


def test_a_seed_repeats_and_none_does_not(model):
    texts = [generate(model, TOKENIZER, "a", 60, 1.0, seed=seed) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1] and len(set(texts[1:])) == 4


def test_writing_goes_on_past_block_size_and_sees_the_last_block(model):
    long = generate(model, TOKENIZER, "abcabcabcabc", 30, temperature=0)
    assert len(long) == 30 and long == generate(model, TOKENIZER, "abcabc", 30, temperature=0)


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("wishes", [
    {}, {"temperature": 1.3, "top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"repetition_penalty": 1.5},
])  # fmt: skip
def test_a_text_is_what_reading_everything_again_would_draw(design, wishes):
    model = tiny(design, block_size=8)
    for keep in (1, 3, 8):
        expected = written_slowly(model, "ab", 30, keep, **{"temperature": 1.0, **wishes})
        assert generate(model, TOKENIZER, "ab", 30, **{"temperature": 1.0, **wishes}, seed=3, keep=keep) == expected


def tiny(design=GPTConfig.gpt2, block_size=8):
    torch.manual_seed(0)
    model = GPT(design(vocab_size=4, block_size=block_size, n_layer=2, n_head=2, n_embd=8)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def written_slowly(model, prompt, length, keep, repetition_penalty=1.0, **wishes):
    """Every token from a fresh look at its whole window; where the window begins is told by counting."""
    ids, generator = TOKENIZER.encode(prompt)[None], torch.Generator().manual_seed(3)
    begin = max(0, ids.shape[1] - model.config.block_size)
    for _ in range(length):
        if ids.shape[1] - begin > model.config.block_size:
            begin = ids.shape[1] - keep
        with torch.no_grad():
            logits = penalise(model(ids[:, begin:])[:, -1], ids, repetition_penalty)
        ids = torch.cat([ids, torch.multinomial(next_probabilities(logits, **wishes), 1, generator=generator)], 1)
    return TOKENIZER.decode(ids[0, len(prompt) :])


def test_a_lone_text_of_a_large_model_is_written_from_a_copy_stored_by_columns(model, monkeypatch):
    assert generation._Window(model, 1).model is model
    monkeypatch.setattr(generation, "LARGE", model.n_parameters)
    before = {name: (weight.data_ptr(), weight.stride()) for name, weight in model.named_parameters()}
    window, ids = generation._Window(model, 1), torch.randint(model.config.vocab_size, (1, 5))
    stored = [part.weight for part in window.model.modules() if isinstance(part, torch.nn.Linear)]
    assert stored and all(weight.stride(0) == 1 for weight in stored)
    torch.testing.assert_close(window(ids), model(ids)[:, -1])
    assert {name: (weight.data_ptr(), weight.stride()) for name, weight in model.named_parameters()} == before
    assert generation._Window(model, 2).model is model


def test_a_model_without_a_cache_sees_its_last_block(model):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.lengths = model, model.config, []

        def forward(self, ids):
            self.lengths.append(ids.shape[1])
            return self.inner(ids)

    plain = Plain()
    assert generate(plain, TOKENIZER, "ab", 20) == generate(model, TOKENIZER, "ab", 20, keep=6)
    assert plain.lengths == [2, 3, 4, 5] + [6] * 16


class MyAttention(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(1)


class MyBlock(Block):
    def forward(self, x):
        return self.norm1(x + self.attention(x))


@pytest.mark.parametrize("part", [MyAttention, MyBlock])
def test_a_gpt_with_parts_of_the_readers_own_is_read_without_a_cache(part):
    model = tiny()
    for block in model.blocks:
        if part is MyBlock:
            block.__class__ = MyBlock
        else:
            block.attention = MyAttention()
    assert len(generate(model, TOKENIZER, "ab", 20)) == 20


def test_many_at_once_are_each_what_its_seed_gives():
    model = tiny()
    for wishes in ({}, {"top_p": 0.7, "repetition_penalty": 1.2}):
        texts = continuations(model, TOKENIZER, "ab", 25, 1.0, seeds=[5, 0, 5, 7], **wishes)
        assert texts == [generate(model, TOKENIZER, "ab", 25, 1.0, seed=seed, **wishes) for seed in (5, 0, 5, 7)]
    assert len(set(continuations(model, TOKENIZER, "a", 25, 1.0, seeds=[None] * 3))) == 3
    assert continuations(model, TOKENIZER, "a", 0, seeds=[1]) == [""]


# --- the likeliest text -----------------------------------------------------------------------------------------------


def log_probability(model, prompt, text):
    ids = TOKENIZER.encode(prompt + text)[None]
    with torch.no_grad():
        chosen = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])  # (1, T - 1, 1)
    return chosen[0, -len(text) :].sum().item()


def test_a_beam_as_wide_as_the_tree_finds_the_likeliest_of_all():
    model = tiny()
    every = [(log_probability(model, "ab", "".join(t)), "".join(t)) for t in itertools.product("\nabc", repeat=4)]
    found = beam_search(model, TOKENIZER, "ab", 4, width=256)
    assert [text for text, _ in found] == [text for _, text in sorted(every, reverse=True)]
    assert [score for _, score in found] == pytest.approx([score for score, _ in sorted(every, reverse=True)])


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_beam_finds_what_transformers_finds(width):
    from test_blocks import transformers_twin

    model = tiny(GPTConfig.gpt2, block_size=16)
    twin, _, _ = transformers_twin(model)
    twin.generation_config.eos_token_id = None
    start = TOKENIZER.encode("ab")[None]
    wishes = {"num_beams": width, "do_sample": False, "max_new_tokens": 9, "num_return_sequences": width}
    ids = twin.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **wishes)
    found = beam_search(model, TOKENIZER, "ab", 9, width)
    assert [text for text, _ in found] == [TOKENIZER.decode(row) for row in ids[:, 2:]]
    for text, score in found:
        assert score == pytest.approx(log_probability(model, "ab", text))


def test_a_beam_of_one_is_greedy_and_a_wider_one_is_never_far(model):
    assert beam_search(model, TOKENIZER, "ab", 20, 1)[0][0] == generate(model, TOKENIZER, "ab", 20, 0)
    assert beam_search(model, TOKENIZER, "ab", 0, 3) == [("", 0.0)]


# --- what was written -------------------------------------------------------------------------------------------------


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=30), st.integers(1, 9))
def test_a_concordance_finds_what_looking_everywhere_finds(text, written, most):
    concordance = Concordance(text, most)
    slow = [max(n for n in range(min(most, len(written) - i) + 1) if written[i : i + n] in text)
            for i in range(len(written))]  # fmt: skip
    assert concordance.runs(written) == slow
    length, place = concordance.find(written)
    assert text[place : place + length] == written[:length]
    n = random.Random(len(written)).randint(1, min(most, len(written)))
    grams = [written[i : i + n] for i in range(len(written) - n + 1)]
    assert concordance.seen(written, n) == sum(gram in text for gram in grams) / len(grams)


@given(st.text("abc", min_size=4, max_size=60))
def test_distinct_counts_different_runs(text):
    runs = ["".join(run) for run in zip(text, text[1:], text[2:], strict=False)]
    assert distinct(text, 3) == len(set(runs)) / len(runs)
    assert distinct("abcabcabc", 3) == 3 / 7 and distinct("abc", 3) == 1


# --- streaming, and what is refused -----------------------------------------------------------------------------------


def test_streaming_yields_as_it_draws(model):
    pieces = stream(model, TOKENIZER, "", 10**9)
    assert len(next(pieces)) == 1 and next(pieces) in TOKENIZER.symbols


def test_streaming_never_breaks_a_character():
    tokenizer = BytePairTokenizer([])  # bytes alone: the snowman needs three of them

    class Snow(torch.nn.Linear):  # writes "\u2603!" for ever, byte by byte
        config = GPTConfig.gpt2(vocab_size=256, block_size=8, n_layer=1, n_head=1, n_embd=8)

        def forward(self, ids):
            written = tokenizer.encode("\u2603!")
            place = (written == ids[0, -1]).nonzero().item()
            return 99.0 * torch.nn.functional.one_hot(written[(place + 1) % 4], 256)[None, None]

    assert list(stream(Snow(1, 1), tokenizer, "!", 8)) == ["\u2603", "!", "\u2603", "!"]
    assert generate(Snow(1, 1), tokenizer, "!", 6) == "\u2603!\ufffd"  # it had to stop within a character


@pytest.mark.parametrize("options, words", [
    ({"prompt": "abé"}, "lacks 'é'"), ({"temperature": -1.0}, "temperature -1.0"), ({"top_k": 0}, "top_k 0"),
    ({"temperature": float("nan")}, "temperature nan"), ({"top_p": 0.0}, "top_p 0.0"), ({"top_p": 1.1}, "top_p 1.1"),
    ({"min_p": -0.1}, "min_p -0.1"), ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    ({"length": -1}, "length -1"), ({"keep": 7}, "keep 7 must be from 1 to 6"),
])  # fmt: skip
def test_bad_wishes_are_refused_by_name(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, TOKENIZER, **options)


@pytest.mark.parametrize(("ask", "words"), [
    (lambda model: beam_search(model, TOKENIZER, width=0), "width 0"),
    (lambda model: distinct("abc", 4), "n 4 must be from 1 to 3"),
    (lambda model: Concordance("abc", 0), "most 0"),
    (lambda model: Concordance("abc").seen("ab", 3), "n 3 must be from 1 to 2"),
    (lambda model: next_probabilities(torch.tensor([1.0, float("nan")])), "hold NaN"),
    (lambda model: continuations(model, TOKENIZER, seeds=[]), "no seeds"),
])  # fmt: skip
def test_other_bad_wishes_are_refused_too(model, ask, words):
    with pytest.raises(ValueError, match=words):
        ask(model)


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------

LESSON = lesson_path("generation")


class BrokenConcordance(Concordance):
    def runs(self, written):
        return [run + 1 for run in super().runs(written)]

    def seen(self, written, n=8):
        return super().seen(written, n) * 1.000001


class BrokenCache(KeyValueCache):
    def attend(self, layer, query, key, value):
        return super().attend(layer, query, key, 1.000001 * value)

    @classmethod
    def of(cls, model, B=1):
        cache = super().of(model, B)
        cache.keys.append(cache.keys[0])
        return cache


BROKEN = {
    "next_probabilities": lambda *args, **kwargs: next_probabilities(*args, **kwargs) * 1.000001,
    "penalise": lambda logits, seen, penalty: penalise(logits, seen, 1.000001 * penalty),
    "stream": lambda *args, **kwargs: ["!", *stream(*args, **kwargs)],
    "generate": lambda *args, **kwargs: generate(*args, **kwargs)[::-1],
    "continuations": lambda *args, **kwargs: continuations(*args, **kwargs)[::-1],
    "beam_search": lambda *args: [(text, 1.000001 * score) for text, score in beam_search(*args)][::-1],
    "distinct": lambda text, n: distinct(text, n + 1),
    "Concordance": BrokenConcordance,
    "KeyValueCache": BrokenCache,
}
# Cells that write long texts; of these only the functions that they define are kept.
LONG_WORK = re.compile(
    r"widgets\.|penalties|beam_search\(model|samples|five\.|by_hand\(play_train, n,|writing|costs|loop ="
)


def small_model(folder):
    """In place of the trained model: the same letters, and few numbers."""
    _, tokenizer, provenance = load_model(folder)
    torch.manual_seed(0)
    sizes = {"block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig.modern(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model, tokenizer, provenance


def walk():
    """Run the lesson on a small model, long work left out; yield each cell's source, and the names before it ran."""
    names = {}
    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(LESSON.parent):
        patched.setenv("SLM_CORPUS", "playhouse")
        patched.setattr(checkpoints, "load_model", small_model)
        for source in code_cells(LESSON):
            yield source, names
            long = LONG_WORK.search(source) and "check.same(" not in source
            execute_but_for_long_work(source, names, long, AssertionError, NameError, KeyError)
            names.setdefault("pairs", {"greedy": [("", "to be or not to be or not to be")]})


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson, on a small model."""
    return [names for _, names in walk()][-1]


def test_each_proof_fails_when_the_library_is_broken():
    caught, forward = set(), GPT.forward
    for source, names in walk():
        if "check.same(" not in source:
            continue
        broken = {name: BROKEN[name] for name in BROKEN if name in source}
        noticed = {name for name, thing in broken.items() if notices(source, {**names, **instead(name, thing, names)})}
        if "uncached" in source:  # what the model says when it reads everything
            with patch.object(GPT, "forward", lambda self, *args: forward(self, *args) * 1.000001):
                off = {"uncached": names["uncached"] * 1.000001} if "uncached" in names else {}
                noticed |= {"uncached"} if notices(source, {**names, **off}) else set()
        assert noticed, f"no broken thing is noticed by this proof:\n{source}"
        caught |= noticed
    assert caught == {*BROKEN, "uncached"}


def instead(name, thing, names):
    """The broken thing, also in what was made of it in an earlier cell."""
    made = {name: thing}
    if name == "Concordance" and "concordance" in names:
        made["concordance"] = BrokenConcordance(names["concordance"].text)
    return made


# --- its exercises ----------------------------------------------------------------------------------------------------


def stops_before_it_is_reached(chances, p):
    return int((chances.sort(descending=True).values.cumsum(0) < p).sum())


def takes_them_as_they_come(chances, p):
    return int((chances.cumsum(0) < p).sum()) + 1


def begins_with_the_rarest(chances, p):
    return int((chances.sort().values.cumsum(0) < p).sum()) + 1


def halving(hotter_if_less):
    def answer(logits, nats):
        low, high = 0.01, 100.0
        for _ in range(60):
            middle = (low * high) ** 0.5
            chances = (logits / middle).softmax(-1)
            less = -torch.special.xlogy(chances, chances).sum() < nats
            low, high = (middle, high) if less == hotter_if_less else (low, middle)
        return middle

    return answer


def multiplies(logits, nats):
    return 1 / halving(True)(logits, nats)


def too_few_steps(logits, nats):
    return round(halving(True)(logits, nats), 1) + 0.05


def bans_the_first_alone(ids, n):
    return set(sorted(right_banned(ids, n))[:1])


def right_banned(ids, n):
    runs = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
    return {new for new in set(ids) if len(ids) >= n and tuple([*ids, new][-n:]) in runs}


def one_too_short(ids, n):
    beginning = ids[max(0, len(ids) - n) :]
    return {ids[i + n] for i in range(len(ids) - n) if ids[i : i + n] == beginning}


def forgets_the_empty_beginning(ids, n):
    beginning = ids[-(n - 1) :]
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == beginning}


def keeps_too_much(p, q):
    return (p / q), p


def draws_from_p_again(p, q):
    return (p / q).clamp(max=1), p


def leaves_it_negative(p, q):
    return (p / q).clamp(max=1), (p - q) / (p - q).sum().clamp(min=1e-9)


def never_keeps(p, q):
    return torch.zeros_like(p), p


@torch.no_grad()
def reads_it_again(model, prompt, endings):
    scores = []
    for ending in endings:
        z = model(torch.tensor([prompt + ending]))[0].log_softmax(-1)
        scores.append(sum(z[len(prompt) + i - 1, token].item() for i, token in enumerate(ending)))
    return scores


@torch.no_grad()
def never_forgets(model, prompt, endings):
    cache, scores = KeyValueCache.of(model), []
    first = model(torch.tensor([prompt]), cache)[0, -1:]
    for ending in endings:
        z = torch.cat([first, model(torch.tensor([ending]), cache)[0, :-1]])
        scores.append(z.log_softmax(-1)[range(len(ending)), ending].sum().item())
    return scores


def without_the_first(model, prompt, endings):
    return [log_probability_of(model, prompt, ending)[1:].sum().item() for ending in endings]


def the_mean(model, prompt, endings):
    return [log_probability_of(model, prompt, ending).mean().item() for ending in endings]


@torch.no_grad()
def log_probability_of(model, prompt, ending):
    z = model(torch.tensor([prompt + ending]))[0].log_softmax(-1)
    return z[len(prompt) - 1 :][range(len(ending)), ending]


def test_graders():
    assert_graded("generation", {
        "my_nucleus": [stops_before_it_is_reached, takes_them_as_they_come, begins_with_the_rarest],
        "my_temperature": [halving(False), multiplies, too_few_steps],
        "my_banned": [bans_the_first_alone, one_too_short, forgets_the_empty_beginning],
        "my_speculation": [keeps_too_much, draws_from_p_again, leaves_it_negative, never_keeps],
        "my_endings": [reads_it_again, never_forgets, without_the_first, the_mean],
    })  # fmt: skip


# --- its panels -------------------------------------------------------------------------------------------------------


def test_the_panel_reshapes_as_its_sliders_move(lesson):
    panel = widgets.Panel(
        lesson["draw_next"], place=widgets.slider(0, 50, 3), temperature=widgets.slider(0.0, 3.0, 1.0, 0.1),
        top_k=widgets.slider(1, 65, 65), top_p=widgets.slider(0.05, 1.0, 1.0), min_p=widgets.slider(0.0, 1.0, 0.0),
    )  # fmt: skip
    changes = [{"place": 9}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 9}, {"top_p": 0.3}, {"min_p": 1.0}]
    for change in changes:
        before = panel.image.value
        panel.set(**change)
        assert panel.status.value == "" and panel.image.value != before, change


def test_the_writer_follows_its_sliders(lesson):
    model, tokenizer = lesson["model"], lesson["tokenizer"]
    panel = widgets.WritePanel(
        lesson["write"], prompt="ROMEO:\n", temperature=1.0, top_p=widgets.slider(0.05, 1.0, 1.0),
        min_p=widgets.slider(0.0, 1.0, 0.1),
    )  # fmt: skip
    for wishes in ({"top_p": 1.0, "min_p": 0.1}, {"top_p": 0.3, "min_p": 0.0}):
        panel.set(**wishes)
        assert panel.wait(60)
        assert panel.text == "ROMEO:\n" + generate(model, tokenizer, "ROMEO:\n", 300, 1.0, **wishes)


def test_the_panel_of_copies_shows_each_sample(lesson):
    texts = {0.4: ["to be or not to be", "not to be or to be"], "held-out text": ["or to be not", "to"]}
    places = {"samples": texts, "concordance": Concordance("to be or not to be, that is the question")}
    draw = lesson["draw_copied"]
    draw = FunctionType(draw.__code__, {**lesson, **places}, "draw", draw.__defaults__, draw.__closure__)
    texts["held-out text"][1] = "to be a question"
    panel = widgets.Panel(draw, temperature=widgets.choice(list(texts)), sample=widgets.slider(1, 2, 1))
    seen = {panel.image.value}
    for change in ({"sample": 2}, {"temperature": "held-out text"}, {"sample": 1}):
        panel.set(**change)
        assert panel.status.value == "" and panel.image.value not in seen, (change, panel.status.value)
        seen.add(panel.image.value)


@given(st.text("ab", max_size=20))
def test_a_character_belongs_to_the_longest_run_that_covers_it(lesson, written):
    runs = Concordance("abba aab bab").runs(written)
    slow = [
        max([run for start, run in enumerate(runs) if start <= i < start + run], default=0) for i in range(len(runs))
    ]
    assert lesson["belongs_to"](runs) == slow
