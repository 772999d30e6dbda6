"""Ids become vectors, and vectors learn where they stand: token embeddings and four ways to tell the position."""

from functools import lru_cache

import torch
from torch import Tensor, nn

POSITIONS = ("learned", "sinusoidal", "rotary", "none")


class Embedding(nn.Module):
    """The entrance of a GPT: ids (B, T) to the residual stream x (B, T, C).

    `position` says what is added to the token's vector: a "learned" vector for each place, the "sinusoidal" waves of
    Vaswani et al. (2017), or nothing ("rotary", which turns queries and keys inside attention instead, and "none").
    """

    def __init__(self, vocab_size: int, block_size: int, n_embd: int, position: str = "learned", dropout: float = 0.0):
        super().__init__()
        self.token = nn.Embedding(vocab_size, n_embd)
        self.place = nn.Embedding(block_size, n_embd) if position == "learned" else None
        self.sinusoidal, self.block_size = position == "sinusoidal", block_size
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        x, stop = self.token(ids), start + ids.shape[1]  # (B, T, C)
        if self.place is not None:
            x = x + self.place.weight[start:stop]  # (B, T, C) + (T, C)
        elif self.sinusoidal:
            x = x + sinusoidal_table(self.block_size, x.shape[2], x.dtype, x.device)[start:stop]
        return self.dropout(x)


def _angles(length: int, n_waves: int) -> Tensor:
    """Angle of wave i at place t, t / 10000^(i / n_waves), as (T, n_waves) in float64."""
    frequencies = 10_000.0 ** (-torch.arange(n_waves, dtype=torch.float64) / n_waves)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


@lru_cache(maxsize=64)
def sinusoidal_table(length: int, n_embd: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The waves of Vaswani et al. (2017), section 3.5: (T, C), sine in even channels and cosine in odd ones."""
    with torch.inference_mode(False):  # a table made during inference must still serve training
        angles = _angles(length, n_embd // 2)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (T, C/2, 2) to (T, C)
        return table.to(dtype).to(device)


@lru_cache(maxsize=64)
def rotary_table(length: int, head_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each place turns each pair of channels: two tensors (T, D/2)."""
    with torch.inference_mode(False):
        angles = _angles(length, head_size // 2)
        return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channel i together with channel i + D/2 by the angle of its place: x (..., T, D) to (..., T, D).

    Rotary position embedding, Su et al. (2021): after it the product of a query and a key depends on their distance.
    """
    first, second = x.chunk(2, dim=-1)  # (..., T, D/2) each
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
