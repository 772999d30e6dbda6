"""Attention and an MLP make a block, blocks make a stack, and the stack between two embeddings is a GPT."""

from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_lib.attention import CausalSelfAttention
from slm_lib.embeddings import POSITIONS, Embedding

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
LARGEST_MODEL = 20_000_000_000  # parameters; beyond it a size is a slip of the pen


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU, elementwise; So et al. (2021)."""
    x = F.relu(x)
    return x * x  # under autocast CUDA would leave bfloat16 for float32 to compute .square()


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu2": relu2, "swiglu": F.silu}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT and its few choices; `GPTConfig.gpt2` and `GPTConfig.modern` are the two named designs.

    `norm` layer|rms, `position` learned|sinusoidal|rotary|none, `activation` gelu|gelu_tanh|relu2|swiglu; `qk_norm`
    normalises queries and keys, `zero_init` starts every output projection at zero, `tie_weights` lets the token
    embedding serve as the head. Raises ValueError for a value that cannot be built.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    norm: str = "layer"
    position: str = "learned"
    activation: str = "gelu_tanh"
    qk_norm: bool = False
    zero_init: bool = False
    tie_weights: bool = True

    @classmethod
    def gpt2(cls, **sizes) -> "GPTConfig":
        """The design of GPT-2 (Radford et al., 2019): the same logits as the original with the same weights."""
        return cls(**sizes)

    @classmethod
    def modern(cls, **sizes) -> "GPTConfig":
        """A design of the 2020s: RMSNorm, rotary positions, QK-norm, ReLU², zero-initialised outputs, no bias."""
        choices = {"norm": "rms", "position": "rotary", "activation": "relu2", "qk_norm": True}
        return cls(**{**choices, "zero_init": True, "bias": False, "tie_weights": False, **sizes})

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value < 2**63):
                raise ValueError(f"{field.name} {value!r} must be a whole number of at least 1 (and below 2**63)")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} {value!r} must be True or False")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r} must be a share from 0 up to, but not including, 1")
        for name, choices in {"norm": NORMS, "position": POSITIONS, "activation": ACTIVATIONS}.items():
            if getattr(self, name) not in list(choices):  # a list: what cannot be hashed is refused too
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: choose one of {', '.join(choices)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                f"take n_embd {self.n_embd - self.n_embd % self.n_head + self.n_head} or another n_head"
            )
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"rotary needs an even head size, but n_embd / n_head is {self.n_embd // self.n_head}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if self.n_layer > 1_000:
            raise ValueError(f"n_layer {self.n_layer} would take hours to build and to train: take at most 1,000")
        rough = 12 * self.n_layer * self.n_embd**2 + (self.vocab_size + self.block_size) * self.n_embd
        if rough > LARGEST_MODEL:
            raise ValueError(f"about {rough:.0e} parameters fit on no machine here: lower n_layer or n_embd")


def _hidden(n_embd: int, activation: str) -> int:
    """The hidden width of an MLP."""
    return 8 * n_embd // 3 if activation == "swiglu" else 4 * n_embd


class MLP(nn.Module):
    """Two matrices with an activation between them, at each position by itself: x (B, T, C) to (B, T, C).

    The hidden width is 4 C; "swiglu" (Shazeer, 2020) has a third matrix, a gate, and 8/3 C, so as to cost the same.
    """

    def __init__(self, n_embd: int, activation: str, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.gated, hidden = activation == "swiglu", _hidden(n_embd, activation)
        self.up = nn.Linear(n_embd, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, n_embd, bias=bias)
        self.activation, self.dropout = ACTIVATIONS[activation], nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # (B, T, C) @ (C, 4C) = (B, T, 4C)
        if self.gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            hidden = hidden * self.activation(gate)
        else:
            hidden = self.activation(hidden)
        return self.dropout(self.down(hidden))  # (B, T, 4C) @ (4C, C) = (B, T, C)


class Block(nn.Module):
    """One layer of a GPT: x plus what attention adds, plus what the MLP adds; (B, T, C) to (B, T, C)."""

    def __init__(self, norm1: nn.Module, attention: nn.Module, norm2: nn.Module, mlp: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *cache) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), *cache))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only Transformer: ids (B, T) to logits (B, T, V) for the token that follows each position.

    Raises ValueError for a context longer than block_size.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab_size, c.block_size, c.n_embd, c.position, c.dropout)
        self.blocks = nn.ModuleList(self._block() for _ in range(c.n_layer))
        self.norm = self._norm()
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.head.weight = self.embedding.token.weight
        self._initialise()

    def _norm(self) -> nn.Module:
        c = self.config
        return nn.LayerNorm(c.n_embd, bias=c.bias) if c.norm == "layer" else nn.RMSNorm(c.n_embd, eps=1e-5)

    def _block(self) -> Block:
        c = self.config
        attention = CausalSelfAttention(c.n_embd, c.n_head, c.bias, c.dropout, c.position == "rotary", c.qk_norm)
        return Block(self._norm(), attention, self._norm(), MLP(c.n_embd, c.activation, c.bias, c.dropout), c.dropout)

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's scheme: normal weights, deviation 0.02, smaller by depth where they write to the residual stream."""
        c = self.config
        writers = [w for block in self.blocks for w in (block.attention.output.weight, block.mlp.down.weight)]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in writers:
            weight.mul_(0 if c.zero_init else (2 * c.n_layer) ** -0.5)
        if c.zero_init and not c.tie_weights:
            self.head.weight.zero_()

    @property
    def n_parameters(self) -> int:
        """How many numbers training may change; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        start = 0 if cache is None else cache.length
        stop = start + ids.shape[1]
        if stop > self.config.block_size:
            raise ValueError(
                f"a context of {stop} tokens is longer than block_size {self.config.block_size}: cut it shorter"
            )
        x = self.embedding(ids, start)
        for i, block in enumerate(self.blocks):
            x = block(x) if cache is None else block(x, cache, i)
        if cache is not None:
            cache.length = stop
        return self.head(self.norm(x))  # (B, T, C) @ (C, V) = (B, T, V)


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Where the parameters of a GPT sit: part to how many; a tied head counts as 0, so the sum is `n_parameters`.

    >>> count_parameters(GPTConfig.gpt2(vocab_size=65, block_size=64, n_layer=2, n_head=4, n_embd=64))["mlp"]
    66176
    """
    c, C, hidden = config, config.n_embd, _hidden(config.n_embd, config.activation)
    up = 2 * hidden if c.activation == "swiglu" else hidden
    return {
        "token embedding": c.vocab_size * C,
        "positions": c.block_size * C if c.position == "learned" else 0,
        "attention": c.n_layer * (4 * C * C + c.bias * 4 * C),  # C to 3C, and C to C
        "mlp": c.n_layer * ((up + hidden) * C + c.bias * (up + C)),
        "norms": (2 * c.n_layer + 1) * C * (2 if c.norm == "layer" and c.bias else 1),
        "head": 0 if c.tie_weights else c.vocab_size * C,
    }


def count_flops(config: GPTConfig, length: int | None = None) -> dict[str, int]:
    """Floating-point operations of a forward pass for each token of a context of `length` (block_size by default).

    Only matrix products count, 2 for each multiply-and-add, as PaLM does (Chowdhery et al., 2022, appendix B); the
    masked half of the scores counts too. A backward pass costs twice as much again.
    """
    c, C, T = config, config.n_embd, length or config.block_size
    matrices = 3 if c.activation == "swiglu" else 2
    return {
        "projections": c.n_layer * 2 * 4 * C * C,
        "looking back": c.n_layer * 2 * 2 * T * C,  # query by key, and weights by value
        "mlp": c.n_layer * 2 * matrices * _hidden(C, c.activation) * C,
        "head": 2 * c.vocab_size * C,
    }


def count_memory(config: GPTConfig, batch_size: int, length: int | None = None) -> dict[str, int]:
    """Bytes that training in float32 with Adam keeps, for a batch of contexts of `length` (block_size by default).

    The first three are exact. Activations, what the forward pass keeps for the backward one, are an estimate: right
    for LayerNorm with fused attention and no dropout, too low by up to half for designs that normalise more.
    """
    c, C, tokens = config, config.n_embd, batch_size * (length or config.block_size)
    weights = 4 * sum(count_parameters(c).values())
    kept = (4 if c.activation == "swiglu" else 2) * _hidden(C, c.activation)  # what goes into and out of the activation
    # a block keeps what enters its two norms, qkv (C) and its output (3C), the output layer (C) and the MLP (C); then
    # for each norm a mean and a deviation, for each head the logarithm of a softmax's sum
    floats = c.n_layer * (8 * C + kept + c.n_head + 4) + 2 * C + 2 + c.vocab_size
    return {"weights": weights, "gradients": weights, "Adam's moments": 2 * weights, "activations": 4 * tokens * floats}
