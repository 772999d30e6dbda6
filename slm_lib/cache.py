"""A memory for generation: keys and values of what was read are kept, so that a new token is computed alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """The keys and values of every layer, for texts that are read bit by bit: `model(ids, cache)` goes on where it was.

    Room for `size` positions of B texts is taken at once: for each layer two tensors (B, H, size, D), of which the
    first `length` positions are filled. Set `length` to a smaller number to forget the rest, to 0 to start anew.
    Shazeer (2019), section 2.4.
    """

    def __init__(
        self, n_layer: int, B: int, H: int, size: int, D: int, dtype: torch.dtype | None = None, device: str = "cpu"
    ):
        self.keys = [torch.zeros(B, H, size, D, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.size, self.length = size, 0

    @classmethod
    def of(cls, model: nn.Module, B: int = 1) -> "KeyValueCache":
        """An empty cache for B texts, as long as a GPT can read."""
        c, weight = model.config, model.embedding.token.weight
        return cls(c.n_layer, B, c.n_head, c.block_size, c.n_embd // c.n_head, weight.dtype, weight.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the keys and values of T new positions, and let their queries look back at all: (B, H, T, D) each.

        `length` stays until every layer has done so. Raises ValueError where T positions do not fit.
        """
        T, stop = query.shape[2], self.length + query.shape[2]
        if stop > self.size:
            raise ValueError(f"the cache holds {self.length} of {self.size} positions: {T} more do not fit")
        self.keys[layer][:, :, self.length : stop] = key
        self.values[layer][:, :, self.length : stop] = value
        # the last of the queries may see everything, each one before it a position less
        visible = torch.ones(T, stop, dtype=torch.bool, device=key.device).tril(self.length) if T > 1 else None
        return F.scaled_dot_product_attention(
            query, self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop], visible
        )

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (B') of the batch, in this order; a row may be taken many times, or not at all."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
