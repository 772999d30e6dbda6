"""Reading a text bit by bit with a cache gives what reading it at once gives, for every design of a GPT."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lib.blocks import GPT, GPTConfig
from slm_lib.cache import KeyValueCache
from slm_lib.embeddings import POSITIONS

SIZES = {"vocab_size": 11, "block_size": 12, "n_layer": 3, "n_head": 2, "n_embd": 16}
EXACT = {"atol": 1e-12, "rtol": 1e-12}  # float64: a right answer is off by rounding alone


def randomised(config: GPTConfig) -> GPT:
    """A model in float64 whose every weight is random, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return model


MODELS = {
    f"{position}{', qk_norm' if qk_norm else ''}": randomised(
        replace(GPTConfig.gpt2(**SIZES), position=position, qk_norm=qk_norm)
    )
    for position, qk_norm in itertools.product(POSITIONS, (False, True))
}
MODELS["modern"] = randomised(GPTConfig.modern(**SIZES))
MODELS["swiglu, untied"] = randomised(GPTConfig.gpt2(**SIZES, activation="swiglu", tie_weights=False, norm="rms"))
every_design = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def text(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def read(model: GPT, ids: torch.Tensor, lengths: list[int], cache: KeyValueCache) -> torch.Tensor:
    """The logits at every position of ids (B, T), read in pieces of these lengths: (B, T, V)."""
    return torch.cat([model(piece, cache) for piece in ids.split(lengths, dim=1)], dim=1)


@every_design
@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 3), lengths=st.lists(st.integers(1, 12), min_size=1).filter(lambda n: sum(n) <= 12))
def test_reading_in_pieces_equals_reading_at_once(model, B, lengths):
    ids, cache = text(B, sum(lengths)), KeyValueCache.of(model, B)
    torch.testing.assert_close(read(model, ids, lengths, cache), model(ids), **EXACT)
    assert cache.length == sum(lengths)


@every_design
def test_token_by_token_equals_reading_at_once(model):
    ids, cache = text(2, 12), KeyValueCache.of(model, 2)
    torch.testing.assert_close(read(model, ids, [1] * 12, cache), model(ids), **EXACT)


@every_design
@given(kept=st.integers(0, 8))
@settings(max_examples=9, deadline=None)
def test_what_is_forgotten_leaves_no_trace(model, kept):
    first, second, cache = text(2, 12, seed=1), text(2, 12, seed=2), KeyValueCache.of(model, 2)
    read(model, first, [12], cache)
    cache.length = kept
    mixed = torch.cat([first[:, :kept], second[:, : 9 - kept]], dim=1)
    torch.testing.assert_close(read(model, mixed[:, kept:], [9 - kept], cache), model(mixed)[:, kept:], **EXACT)


@every_design
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
@settings(max_examples=9, deadline=None)
def test_rows_are_taken_in_any_order_and_number(model, rows):
    ids, more, cache = text(3, 5), text(len(rows), 4, seed=1), KeyValueCache.of(model, 3)
    model(ids, cache)
    cache.take(torch.tensor(rows))
    whole = torch.cat([ids[rows], more], dim=1)
    torch.testing.assert_close(read(model, more, [3, 1], cache), model(whole)[:, 5:], **EXACT)


def test_a_shorter_cache_is_as_exact():
    model = MODELS["modern"]
    ids, cache = text(1, 7), KeyValueCache(3, 1, 2, 7, 8, torch.float64)
    torch.testing.assert_close(read(model, ids, [2, 5], cache), model(ids), **EXACT)


@every_design
def test_a_full_cache_refuses_in_a_sentence_and_stays_as_it_was(model):
    ids, cache = text(1, 12), KeyValueCache.of(model)
    model(ids[:, :10], cache)
    with pytest.raises(ValueError, match="13 tokens is longer than block_size 12"):
        model(ids[:, :3], cache)
    torch.testing.assert_close(model(ids[:, 10:], cache), model(ids)[:, 10:], **EXACT)


def test_a_full_cache_that_is_shorter_than_the_model_says_so():
    model = MODELS["modern"]
    ids, cache = text(1, 12), KeyValueCache(3, 1, 2, 7, 8, torch.float64)
    model(ids[:, :6], cache)
    with pytest.raises(ValueError, match="the cache holds 6 of 7 positions: 2 more do not fit"):
        model(ids[:, 6:8], cache)
    torch.testing.assert_close(model(ids[:, 6:7], cache), model(ids[:, :7])[:, 6:], **EXACT)


@given(st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_query_sees_what_came_before_it_and_itself(past, T):
    generator = torch.Generator().manual_seed(past)
    query, key, value = torch.randn(3, 2, 3, past + T, 4, dtype=torch.float64, generator=generator)
    cache = KeyValueCache(1, 2, 3, 9, 4, torch.float64)
    if past:
        cache.attend(0, *(x[:, :, :past] for x in (query, key, value)))
        cache.length = past
    mixed = cache.attend(0, *(x[:, :, past:] for x in (query, key, value)))
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, :, past:]
    torch.testing.assert_close(mixed, theirs, **EXACT)


def test_memory_is_taken_once():
    model, cache = MODELS["modern"], KeyValueCache.of(MODELS["modern"], 2)
    places = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    read(model, text(2, 12), [5, 1, 1, 1, 4], cache)
    assert [tensor.data_ptr() for tensor in cache.keys + cache.values] == places
    assert all(tensor.shape == (2, 2, 12, 8) and tensor.any() for tensor in cache.keys + cache.values)


@every_design
def test_autocast_and_low_precision_go_through(model):
    ids, cache = text(2, 12), KeyValueCache.of(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        pieces, whole = read(model, ids, [4, 1, 7], cache), model(ids)
    torch.testing.assert_close(pieces.softmax(-1), whole.softmax(-1), atol=0.1, rtol=0.1)
