"""Attention against torch's own module, and what its options must do."""

import pytest
import torch

from slm_lib.attention import CausalSelfAttention


def test_equals_torch_multihead_attention():
    torch.manual_seed(0)
    mine = CausalSelfAttention(12, 3).double()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(mine.qkv.weight)
        theirs.in_proj_bias.copy_(mine.qkv.bias)
        theirs.out_proj.weight.copy_(mine.output.weight)
        theirs.out_proj.bias.copy_(mine.output.bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(mine(x), theirs(x, x, x, attn_mask=future)[0], atol=1e-12, rtol=0)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
    torch.manual_seed(0)
    plain, normed = (CausalSelfAttention(8, 2, bias=False, qk_norm=qk).double() for qk in (False, True))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    for module, same in ((plain, False), (normed, True)):
        before = module(x)
        with torch.no_grad():
            module.qkv.weight[:16] *= 3  # queries and keys, not values
        assert torch.allclose(before, module(x), atol=1e-4) == same


def test_rotary_sees_distance_and_not_place():
    torch.manual_seed(0)
    attention = CausalSelfAttention(8, 2, rotary=True).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    # The same four vectors three places later, behind vectors that no query attends to, must mix alike.
    late = torch.cat([torch.zeros(1, 3, 8, dtype=torch.float64), x], dim=1)
    query, key, _ = attention.qkv(late).view(1, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    from slm_lib.embeddings import rotary_table, rotate

    table = rotary_table(7, 4, torch.float64, torch.device("cpu"))
    scores = rotate(query, *table) @ rotate(key, *table).transpose(-1, -2)
    early_query, early_key, _ = attention.qkv(x).view(1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    table = rotary_table(4, 4, torch.float64, torch.device("cpu"))
    early = rotate(early_query, *table) @ rotate(early_key, *table).transpose(-1, -2)
    torch.testing.assert_close(scores[..., 3:, 3:], early, atol=1e-12, rtol=0)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="n_embd 10 is not divisible by n_head 3"):
        CausalSelfAttention(10, 3)
