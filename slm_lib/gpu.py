"""What a GPU is asked to do and what it can do, counted before it is measured; and steps that it replays."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slm_lib.adam import Muon
from slm_lib.blocks import GPT, GPTConfig, count_flops, count_parameters
from slm_lib.cache import KeyValueCache
from slm_lib.data import draw_batch
from slm_lib.tokens import Tokenizer
from slm_lib.training import Trainer

WARM_UP = 3  # updates made as usual before one is recorded: in them kernels are chosen and what stays is made

# --- what is asked for ------------------------------------------------------------------------------------------------


def intensity(m: int, n: int, k: int, size: int = 2) -> float:
    """Operations for each byte moved when (m, k) @ (k, n) = (m, n) is computed, `size` bytes for each number.

    Each of the three matrices passes between memory and processor once, which is the least that can be.

    >>> intensity(384, 384, 384), round(intensity(1, 384, 384), 3)
    (128.0, 0.995)
    """
    return 2 * m * n * k / (size * (m * k + k * n + m * n))


def step_flops(config: GPTConfig, batch_size: int, optimizer: str = "adamw") -> dict[str, int]:
    """Floating-point operations of one update on `batch_size` contexts of block_size: those of its matrix products.

    The backward pass makes two products for each one of the forward pass. Muon's are those of Newton and Schulz, which
    do not grow with the batch; AdamW has none.
    """
    forward = batch_size * config.block_size * sum(count_flops(config).values())
    muon = sum(_newton_schulz_flops(*shape) for shape in _inside(config)) if optimizer == "muon" else 0
    return {"forward": forward, "backward": 2 * forward, "optimizer": muon}


def _newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Operations of `adam.orthogonalise` for a matrix: its smaller side is that of the squares."""
    m, n = min(m, n), max(m, n)
    return steps * 2 * (m * n * m + m * m * m + m * m * n)


def _inside(config: GPTConfig) -> list[torch.Size]:
    """The shapes of the matrices inside the blocks, which Muon moves."""
    return [p.shape for p in _on_paper(config).blocks.parameters() if p.dim() == 2]


def _on_paper(config: GPTConfig) -> GPT:
    """The model without its numbers, which takes no memory, however large it is."""
    with torch.device("meta"):
        return GPT(config)


def utilisation(config: GPTConfig, tokens_per_second: float, peak: float) -> float:
    """The share of a device's `peak` (operations per second) that training at this speed uses for the model, 0 to 1.

    Model FLOPs utilisation (Chowdhery et al., 2022, appendix B): what the optimizer computes does not count.
    """
    return 3 * sum(count_flops(config).values()) * tokens_per_second / peak


def training_memory(
    config: GPTConfig, batch_size: int, optimizer: str = "adamw", precision: str = "float32"
) -> dict[str, int]:
    """Bytes that a training on `batch_size` contexts of block_size keeps on a GPU, by what they are for.

    Weights, gradients and the optimizer's memory are float32 in either precision. Under bfloat16 the matrix of each
    linear layer has a copy, and what enters and leaves the products is half as large; residual stream and logits are
    not. Activations are what the forward pass keeps for the backward one. What lives only for a moment comes on top,
    so that the measured peak is higher.
    """
    total, inside = sum(count_parameters(config).values()), sum(m * n for m, n in _inside(config))
    moments = 2 * total - (inside if optimizer == "muon" else 0)  # AdamW keeps two numbers for each weight, Muon one
    copied = inside + config.vocab_size * config.n_embd if precision == "bfloat16" else 0
    return {
        "weights": 4 * total,
        "copies of weights": 2 * copied,
        "gradients": 4 * total,
        "optimizer": 4 * moments,
        "activations": batch_size * config.block_size * _kept(config, 2 if precision == "bfloat16" else 4),
    }


def _kept(config: GPTConfig, size: int) -> int:
    """Bytes of activations for each token, where what enters and leaves a product has `size` bytes for each number."""
    c, C, hidden = config, config.n_embd, _on_paper(config).blocks[0].mlp.down.in_features
    # what enters a norm, its statistics, and what it hands on to a product
    norm = 4 * C + 4 * (2 if c.norm == "layer" else 1) + size * C
    # queries, keys and values, what is mixed from them, and the logarithm of the sum in each softmax
    attention = size * (3 * C + C) + 4 * c.n_head
    if c.qk_norm or c.position == "rotary":
        attention += size * 2 * C  # queries and keys once more
    if c.qk_norm:  # which always works in float32
        attention += 4 * 2 * c.n_head + (4 * 2 * C if size < 4 else 0)
    mlp = size * hidden * (4 if c.activation == "swiglu" else 2)
    dropped = C if c.dropout else 0  # a byte tells whether a number was kept
    return c.n_layer * (2 * norm + attention + mlp + 2 * dropped) + norm + dropped + 4 * c.vocab_size


# --- what a device can do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """The roofline of a device (Williams et al., 2009): `peak` operations, `bandwidth` bytes of memory, per second.

    >>> roof = Roof(peak=100.0, bandwidth=2.0)
    >>> roof.ridge, roof.attainable(10), roof.attainable(1000)
    (50.0, 20.0, 100.0)
    """

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """The intensity from which on the arithmetic, and no longer the memory, is what is waited for."""
        return self.peak / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """Operations per second that work of an intensity (operations per byte) can reach at most."""
        return min(self.peak, self.bandwidth * intensity)


def measure_roof(device: torch.device, dtype: torch.dtype = torch.float32) -> Roof:
    """The roof of a device as it is now: its fastest product of two square matrices, its fastest copy of a tensor."""
    size, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    matrix = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peak = 2 * size**3 / _seconds(lambda: matrix @ matrix, device)
    return Roof(peak, 2 * length / _seconds(lambda: target.copy_(source), device))  # each byte is read and written


def _seconds(work: Callable[[], object], device: torch.device, together: float = 0.3) -> float:
    """The least time that `work` took, of many: the first warm up, and whatever disturbs makes one longer."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < together:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # until then the work has only been asked for
        times.append(time.perf_counter() - began)
    return min(times)


# --- steps that are replayed ------------------------------------------------------------------------------------------


def capture(trainer: Trainer) -> None:
    """Let a trainer replay its updates as CUDA graphs, after a few that it makes as usual; all else stays as it is.

    One graph computes the gradient and a second moves the weights, so that a loss that is not finite still stops the
    training before it touches them. Batches, checks and checkpoints are the same, losses up to rounding. Of the
    settings only the learning rate may change after the first update that is replayed. Without CUDA the same work is
    called. Raises ValueError for several processes, and for an optimizer that cannot be recorded.
    """
    if isinstance(trainer.move, _Replayed):
        return
    if trainer.ranks.count > 1:
        raise ValueError("what several processes do together is not recorded")
    for part in getattr(trainer.optimizer, "optimizers", [trainer.optimizer]):
        if not isinstance(part, Muon) and not all(group.get("fused") for group in part.param_groups):
            raise ValueError(f"{type(part).__name__} cannot be recorded: take Muon, or torch's AdamW with fused=True")
    on_gpu = trainer.device.type == "cuda"
    for group in trainer.optimizer.param_groups:  # a recording reads the rate from where it lies
        exact = torch.float32 if on_gpu else torch.float64
        group["lr"] = torch.tensor(group["lr"], dtype=exact, device=trainer.device)
        if "capturable" in group:
            group["capturable"] = on_gpu
    if type(trainer).draw is Trainer.draw:  # and not another task's
        trainer.draw = _drawn_there(trainer)
    trainer.gradient, trainer.move = (_Replayed(work, trainer.device) for work in (trainer.gradient, trainer.move))


def _drawn_there(trainer: Trainer) -> Callable[[], tuple[Tensor, Tensor]]:
    """`trainer.draw`, of which only the places of the windows travel to the device, and nobody waits for them."""
    B, T, device = trainer.config.batch_size, trainer.block_size, trainer.device
    places, steps = torch.arange(len(trainer.ids)), torch.arange(T + 1, device=device)

    def draw() -> tuple[Tensor, Tensor]:
        starts = draw_batch(places, B, T, trainer.generator)[0][:, :1]  # (B, 1)
        if device.type == "cuda":
            starts = starts.pin_memory().to(device, non_blocking=True)
        windows = trainer.ids[starts + steps]  # (B, 1) + (T+1,) = (B, T+1)
        return windows[:, :-1], windows[:, 1:]

    return draw


class _Replayed:
    """Work on tensors that is recorded as a CUDA graph after a few calls, and replayed from then on.

    A recording reads and writes the same places each time: inputs are copied there, and outputs lie there until the
    next call.
    """

    def __init__(self, work: Callable, device: torch.device):
        self.work, self.device, self.calls = work, device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *inputs: Tensor) -> object:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._aside(inputs)
        if self.calls == WARM_UP + 1:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.replay = _recorded(self._call, stream=self.stream) if self.stream else self._call
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.replay()
        return self.outputs

    def _call(self) -> None:
        self.outputs = self.work(*self.inputs)

    def _aside(self, inputs: tuple[Tensor, ...]) -> object:
        """Called on a stream of its own, as PyTorch wants it before a recording."""
        if self.stream is None:
            return self.work(*inputs)
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # for what comes later
            outputs = self.work(*inputs)
        here.wait_stream(self.stream)
        return outputs


def _recorded(work: Callable[[], None], **where: object) -> Callable[[], None]:
    """The replay of `work`, recorded as a CUDA graph; or `work` itself, after a warning, where that fails."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
            work()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"each operation is launched on its own, for recording failed ({reason})", stacklevel=3)
        return work
    return graph.replay


class Writer:
    """Writes as `generation.generate` does, each step replayed as a CUDA graph; without CUDA the same work is called.

    Each place of the window has a step, recorded when it is first reached, which reads the token there and draws the
    next one on the GPU, so that nobody waits for it until the window is full.
    """

    def __init__(self, model: GPT):
        self.model, self.cache, self.replays = model.eval(), KeyValueCache.of(model), {}
        size, device = model.config.block_size, model.embedding.token.weight.device
        self.ids = torch.zeros(size + 1, dtype=torch.long, device=device)  # the window, and what follows it
        self.noise = torch.zeros(size + 1, model.config.vocab_size, device=device)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.no_grad()
    def generate(
        self, tokenizer: Tokenizer, prompt: str = "\n", length: int = 200, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """`length` new tokens after `prompt`, as text; a seed gives the same again, temperature 0 the likeliest."""
        generator, size = torch.Generator().manual_seed(seed), len(self.ids) - 1
        known, written = tokenizer.encode(prompt or "\n")[-size:], []
        while len(written) < length:
            start, stop = len(known), min(size + 1, len(known) + length - len(written))
            # the largest of logits / temperature + Gumbel's noise is a draw from their softmax (Gumbel, 1954)
            gumbel = -torch.empty(self.noise.shape).exponential_(generator=generator).log()
            self.noise.copy_(temperature * gumbel)
            self.ids[:start] = known.to(self.ids.device)
            self._read(0, start)
            for place in range(start, stop - 1):
                self._step(place)
            window = self.ids[:stop].cpu()
            written += window[start:].tolist()
            known = window[-max(1, size // 2) :]
        return tokenizer.decode(written)

    def _read(self, start: int, stop: int) -> None:
        """Read the tokens at these places of the window, and draw the one that follows."""
        self.cache.length = start
        logits = self.model(self.ids[None, start:stop], self.cache)[0, -1]  # (V,)
        self.ids[stop] = (logits + self.noise[stop]).argmax()

    def _step(self, place: int) -> None:
        """Read the token at a place and draw the next: the first time as usual, which has to be before a recording."""
        if place in self.replays:
            self.replays[place]()
            return
        work = partial(self._read, place, place + 1)
        work()
        self.replays[place] = work if self.pool is None else _recorded(work, pool=self.pool)
