"""Embeddings against their definitions."""

import math

import pytest
import torch

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
