"""What is drawn comes from the model's own probabilities, reshaped as asked, and a seed repeats it."""

import pytest
import torch

from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.generation import generate, next_probabilities, stream
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
    ({"temperature": float("nan")}, "temperature nan"),
])  # fmt: skip
def test_bad_wishes_are_refused_by_name(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, TOKENIZER, **options)
