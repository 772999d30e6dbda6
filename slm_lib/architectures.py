"""What stood where the Transformer stands, and the three shapes of a Transformer made from the same blocks.

A window with an MLP, three recurrent cells, an encoder and an encoder-decoder. All take ids to logits, so that the one
loop trains them and the one evaluator scores them; another task is another way to draw a batch, and nothing else.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_lib.attention import CausalSelfAttention
from slm_lib.blocks import GPT, Block, GPTConfig, count_parameters
from slm_lib.training import Trainer, TrainingConfig

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
KINDS = ("mlp", *CELLS, "transformer")
GATES = {"rnn": 1, "lstm": 4, "gru": 3}  # a cell has so many matrices for the token, and as many for its state
UNASKED = -100  # a target that does not count


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that is no Transformer: `kind` mlp|rnn|lstm|gru, `n_embd` the width of its vectors.

    An mlp reads `window` tokens and has 4 n_embd hidden numbers. The state of a recurrent one is n_embd numbers (an
    LSTM has two such states); `keep_bias` is added to the gate that holds on to it, so that it begins by remembering
    (Gers et al., 2000; Jozefowicz et al., 2015). Raises ValueError for a value that cannot be built.
    """

    kind: str
    vocab_size: int
    block_size: int
    n_embd: int
    window: int = 8
    keep_bias: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS[:-1]:
            raise ValueError(f"kind {self.kind!r} is not known here: choose one of {', '.join(KINDS[:-1])}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value < 2**63):
                raise ValueError(f"{field.name} {value!r} must be a whole number of at least 1 (and below 2**63)")
        if not abs(self.keep_bias) < 100:
            raise ValueError(f"keep_bias {self.keep_bias!r} must lie within -100..100: try 1")

    @property
    def n_parameters(self) -> int:
        """How many numbers training may change in a model of these sizes."""
        V, C = self.vocab_size, self.n_embd
        if self.kind == "mlp":
            return V * C + (self.window * C + 1) * 4 * C + (4 * C + 1) * V
        return V * C + GATES[self.kind] * (2 * C * C + 2 * C) + (C + 1) * V


class WindowMLP(nn.Module):
    """Each token from the `window` before it, by an MLP: ids (B, T) to logits (B, T, V); Bengio et al. (2003).

    Before the text stand vectors of zeros. What lies outside the window does not exist for it.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.config, C = sizes, sizes.n_embd
        self.embedding = nn.Embedding(sizes.vocab_size, C)
        self.up = nn.Linear(sizes.window * C, 4 * C)
        self.head = nn.Linear(4 * C, sizes.vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        W = self.config.window
        x = F.pad(self.embedding(ids), (0, 0, W - 1, 0))  # (B, W-1 + T, C)
        windows = x.unfold(1, W, 1).transpose(2, 3).flatten(2)  # (B, T, C, W) to (B, T, W C), the oldest token first
        return self.head(torch.tanh(self.up(windows)))  # (B, T, W C) to (B, T, 4C) to (B, T, V)


class Recurrent(nn.Module):
    """A state that each token changes, and a guess from every state: ids (B, T) to logits (B, T, V).

    The cell is torch's: rnn (Elman, 1990), lstm (Hochreiter and Schmidhuber, 1997), gru (Cho et al., 2014). It begins
    with a state of zeros, and no text is too long for it; block_size is only what training shows at once.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        if sizes.kind not in CELLS:
            raise ValueError(f"a model of kind {sizes.kind} has no state: build it as WindowMLP")
        self.config, C = sizes, sizes.n_embd
        self.embedding = nn.Embedding(sizes.vocab_size, C)
        self.cell = CELLS[sizes.kind](C, C, batch_first=True)
        self.head = nn.Linear(C, sizes.vocab_size)
        if GATES[sizes.kind] > 1:  # the second gate of both holds on to the old state: forget gate, update gate
            self.cell.bias_hh_l0.data[C : 2 * C] += sizes.keep_bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(ids)[0]

    def read(self, ids: Tensor, state=None) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Logits (B, T, V), and the state after the last token, with which the next call goes on: (1, B, C), or two."""
        x, state = self.cell(self.embedding(ids), state)  # (B, T, C)
        return self.head(x), state


def build(kind: str, vocab_size: int, block_size: int, n_parameters: int, window: int = 8) -> nn.Module:
    """A model of a kind, mlp|rnn|lstm|gru|transformer, with as nearly `n_parameters` as some width gives.

    The transformer is a GPT of the modern design with two blocks of four heads, so its width goes up in eights. Raises
    ValueError where no width comes near.
    """
    if kind == "transformer":
        sizes = {"vocab_size": vocab_size, "block_size": block_size, "n_layer": 2, "n_head": 4}
        choices = [GPTConfig.modern(**sizes, n_embd=width) for width in range(8, 1025, 8)]
        counts = [sum(count_parameters(config).values()) for config in choices]
    else:
        choices = [Sizes(kind, vocab_size, block_size, width, window) for width in range(1, 1025)]
        counts = [config.n_parameters for config in choices]
    count, config = min(zip(counts, choices, strict=True), key=lambda pair: abs(pair[0] - n_parameters))
    if not n_parameters / 2 <= count <= n_parameters * 2:
        raise ValueError(f"no {kind} has about {n_parameters:,} parameters, the nearest has {count:,}: ask for those")
    return {"mlp": WindowMLP, "transformer": GPT}.get(kind, Recurrent)(config)


# --- the three shapes -------------------------------------------------------------------------------------------------


class SelfAttention(CausalSelfAttention):
    """The same attention with the mask left out: each position looks at all, those after it included."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._queries_keys_values(x)  # (B, H, T, D) each
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * self.head_size**-0.5 @ key.transpose(2, 3)).softmax(-1)  # (B, H, T, T)


class Encoder(GPT):
    """A GPT that looks both ways: ids (B, T) to logits (B, T, V) for the token *at* each place; Devlin et al. (2019).

    It learns by filling blanks (`FillTrainer`): asked for a token that it can see, it would have nothing to learn.
    """

    def _block(self) -> Block:
        block, c = super()._block(), self.config
        block.attention = SelfAttention(c.n_embd, c.n_head, c.bias, c.dropout, c.position == "rotary", c.qk_norm)
        return block


class CrossAttention(nn.Module):
    """Attention from one text into another: x (B, T, C) asks, source (B, S, C) answers, to (B, T, C).

    Queries come from x, keys and values from the source, and there is no mask: the source is all there from the start.
    """

    def __init__(self, n_embd: int, n_head: int, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}: every head needs the same width")
        self.n_head, self.head_size, self.dropout = n_head, n_embd // n_head, dropout
        self.query = nn.Linear(n_embd, n_embd, bias=bias)
        self.key_value = nn.Linear(n_embd, 2 * n_embd, bias=bias)
        self.output = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        query, key, value = self._queries_keys_values(x, source)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))

    def weights(self, x: Tensor, source: Tensor) -> Tensor:
        """How much each position of x takes from each of the source: (B, H, T, S), no dropout."""
        query, key, _ = self._queries_keys_values(x, source)
        return (query * self.head_size**-0.5 @ key.transpose(2, 3)).softmax(-1)

    def _queries_keys_values(self, x: Tensor, source: Tensor) -> list[Tensor]:
        parts = [self.query(x), *self.key_value(source).chunk(2, dim=-1)]  # (B, T, C) and twice (B, S, C)
        return [part.unflatten(-1, (self.n_head, self.head_size)).transpose(1, 2) for part in parts]  # (B, H, ., D)


class CrossBlock(Block):
    """A GPT's block with a look into a source between its halves: x (B, T, C), source (B, S, C) to (B, T, C)."""

    def __init__(self, block: Block, norm: nn.Module, cross: CrossAttention):
        super().__init__(block.norm1, block.attention, block.norm2, block.mlp, block.dropout.p)
        self.norm, self.cross = norm, cross

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.dropout(self.cross(self.norm(x), source))
        return x + self.mlp(self.norm2(x))


class _Decoder(GPT):
    """A GPT whose blocks look into a source: ids (B, T) and source (B, S, C) to logits (B, T, V)."""

    def _block(self) -> Block:
        c = self.config
        return CrossBlock(super()._block(), self._norm(), CrossAttention(c.n_embd, c.n_head, c.bias, c.dropout))

    def forward(self, ids: Tensor, source: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, source)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """An encoder reads a source, a decoder writes and looks into it: ids (B, S + T) to logits (B, T, V).

    The first `source_size` ids are the source, the others what is written, of which the config's block_size speaks;
    Vaswani et al. (2017), Raffel et al. (2020). Raises ValueError where nothing is written, or too much.
    """

    def __init__(self, config: GPTConfig, source_size: int):
        super().__init__()
        self.source_size, self.config = source_size, replace(config, block_size=source_size + config.block_size)
        self.encoder, self.decoder = Encoder(replace(config, block_size=source_size)), _Decoder(config)
        self.encoder.head = nn.Identity()  # what it found is wanted, not what it would say

    def forward(self, ids: Tensor) -> Tensor:
        S, most = self.source_size, self.config.block_size
        if not S < ids.shape[1] <= most:
            raise ValueError(f"{ids.shape[1]} ids: give a source of {S}, and after it 1 to {most - S} that are written")
        return self.decoder(ids[:, S:], self.encoder(ids[:, :S]))


class Given(nn.Module):
    """An encoder-decoder that has read a source, ids (S,): ids (B, T) to logits (B, T, V), as `generation` wants it."""

    def __init__(self, model: EncoderDecoder, source: Tensor):
        super().__init__()
        if source.shape != (model.source_size,):
            raise ValueError(f"a source has {model.source_size} ids, this one {tuple(source.shape)}: fill it up")
        self.model, self.config = model.eval(), model.decoder.config
        self.found = model.encoder(source[None]).detach()  # (1, S, C)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.decoder(ids, self.found.expand(len(ids), -1, -1))


# --- their tasks ------------------------------------------------------------------------------------------------------


def hide(ids: Tensor, share: float, mask_id: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Hide a share of ids (B, T) behind `mask_id`; targets (B, T) are what was hidden, and -100 where nothing was.

    In each row at least one is hidden. Raises ValueError for a share outside 0..1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must lie above 0 and not beyond 1: try 0.15")
    luck = torch.rand(ids.shape, generator=generator).to(ids.device)
    hidden = (luck < share) | (luck == luck.amin(1, keepdim=True))
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, UNASKED)


class FillTrainer(Trainer):
    """The one loop, with blanks to fill: a share of each window is hidden, and only that is asked for."""

    def __init__(self, model: nn.Module, ids: Tensor, config: TrainingConfig, mask_id: int, share: float = 0.15):
        super().__init__(model, ids, config)
        self.mask_id, self.share = mask_id, share

    def draw(self) -> tuple[Tensor, Tensor]:
        """Windows of the text (B, T) with blanks, and what stood there."""
        return hide(super().draw()[0], self.share, self.mask_id, self.generator)


def answering(sources: Tensor, targets: Tensor, start_id: int = 0) -> tuple[Tensor, Tensor]:
    """What an encoder-decoder is shown, (N, S + T), and asked for, (N, T): sources (N, S), and targets one place later.

    A target shorter than T is filled up with -100. Raises ValueError where not every source has its target.
    """
    if len(sources) != len(targets) or not len(sources):
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets: give one target for each source")
    start = torch.full_like(targets[:, :1], start_id)
    return torch.cat([sources, start, targets[:, :-1].clamp(min=0)], dim=1), targets


class PairTrainer(Trainer):
    """The one loop, with pairs to learn: what `answering` made of sources (N, S) and targets (N, T)."""

    def __init__(self, model: EncoderDecoder, shown: Tensor, wanted: Tensor, config: TrainingConfig):
        super().__init__(model, shown.flatten(), config, block_size=1)
        self.shown, self.wanted = shown, wanted

    def draw(self) -> tuple[Tensor, Tensor]:
        """Some of the pairs: shown (B, S + T) and wanted (B, T)."""
        rows = torch.randint(len(self.shown), (self.config.batch_size,), generator=self.generator)
        return self.shown[rows].to(self.device), self.wanted[rows].to(self.device)


@torch.no_grad()
def asked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How much each target that counts surprises a model: x (B, T) and y (B, T'), -100 not counting, to nats (N,)."""
    was_training = model.training
    logits = model.eval()(x)  # (B, T', V)
    model.train(was_training)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return losses[y.flatten() != UNASKED]
