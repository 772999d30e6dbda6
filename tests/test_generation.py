"""What is drawn comes from the model's own probabilities, reshaped as asked, and a seed repeats it."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from slm_lib.blocks import GPT, GPTConfig
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
