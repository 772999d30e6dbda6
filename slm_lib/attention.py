"""Each position looks back at the ones before it and takes what it needs: causal self-attention with several heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_lib.embeddings import rotary_table, rotate


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, x (B, T, C) to (B, T, C); Vaswani et al. (2017), section 3.2.

    `rotary` turns queries and keys by their place (Su et al., 2021), `qk_norm` brings them to unit mean square before
    they meet (Henry et al., 2020). Raises ValueError where the channels do not divide into the heads.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}: every head needs the same width")
        self.n_head, self.head_size = n_head, n_embd // n_head
        self.rotary, self.qk_norm, self.dropout = rotary, qk_norm, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.output = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor, cache=None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        query, key, value = self._queries_keys_values(x, cache)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:  # slm_lib.cache: x goes on where the cache ends, and looks back at what it keeps
            mixed = cache.attend(layer, query, key, value)
        elif value.dtype == torch.bfloat16 and value.device.type == "cpu":
            # written out: the fused kernel's backward pass takes five times as long in this precision on a processor
            mixed = F.dropout(self._weights(query, key), dropout) @ value
        else:
            # softmax(query @ key.T / sqrt(D)) @ value, the future masked: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).reshape(B, T, C))

    def weights(self, x: Tensor) -> Tensor:
        """How much each position (the third axis) takes from each (the last): x (B, T, C) to (B, H, T, T), no dropout.

        `forward` mixes the values with these and never writes them down; this is the slow way, made to be looked at.
        """
        query, key, _ = self._queries_keys_values(x)
        return self._weights(query, key)

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """What each query makes of the keys up to its own place: two tensors (B, H, T, D) to (B, H, T, T)."""
        scores = query * self.head_size**-0.5 @ key.transpose(2, 3)  # (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        future = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
        return (scores + future).softmax(-1)

    def _queries_keys_values(self, x: Tensor, cache=None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) to three tensors (B, H, T, D), queries and keys normalised and turned where that is chosen."""
        B, T, C = x.shape
        # (B, T, C) @ (C, 3C) = (B, T, 3C), cut into three tensors (B, H, T, D)
        parts = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        pair, value = parts.split([2, 1])  # queries and keys are treated alike: (2, B, H, T, D)
        if self.qk_norm:
            pair = F.rms_norm(pair, (self.head_size,))
        if self.rotary:
            start, size = (0, T) if cache is None else (cache.length, cache.size)
            turns = rotary_table(size, self.head_size, pair.dtype, x.device)
            pair = rotate(pair, *(turn[start : start + T] for turn in turns))
        return *pair, value[0]
