"""Learning from text: the loss of a model on a text, and the one loop that lowers it."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from slm_lib import checkpoints
from slm_lib.data import draw_batch
from slm_lib.tokens import Tokenizer

TOKENS_AT_ONCE = 16_384  # how many positions evaluation looks at in one forward pass


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Counts are in steps; `learning_rate` is the highest one, at the end of the warm-up.

    Raises ValueError for a value with which no training makes sense.
    """

    batch_size: int = 32
    max_iters: int = 1_000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_iters: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    eval_interval: int = 250
    seed: int = 0

    def __post_init__(self):
        lowest = {"warmup_iters": 0, "seed": 0}
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{f.name} {value!r} must be a finite number")
            if f.type is int and (not isinstance(value, int) or value < lowest.get(f.name, 1)):
                raise ValueError(f"{f.name} {value!r} must be a whole number of at least {lowest.get(f.name, 1)}")
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"learning_rate {self.learning_rate} must lie above 0 and not beyond 10: try 0.003")
        if not 0 <= self.weight_decay <= 10:
            raise ValueError(f"weight_decay {self.weight_decay} must lie in 0..10: try 0.1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in 0..1, 1 excluded: try 0.9, 0.95")
        if self.grad_clip <= 0:
            raise ValueError(f"grad_clip {self.grad_clip} must be above 0: try 1.0")


@dataclass
class History:
    """What happened: the batch loss of every step, and the validation losses as (step, nats per token)."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def steps(self) -> list[int]:
        """The number of updates made before each batch loss was measured."""
        return list(range(len(self.losses)))


def choose_device(name: str = "auto") -> torch.device:
    """The device by name, or for "auto" the best one here: CUDA, then Apple's MPS, then the CPU.

    Raises ValueError for a device that this machine or this build of PyTorch does not have.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in found.items() if here)
    if not found.get(name.split(":")[0], False):
        here = " or ".join(kind for kind, is_here in found.items() if is_here)
        raise ValueError(f"device {name!r} is not to be had on this machine: use {here}")
    return torch.device(name)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: a straight climb to the highest, then a straight fall to zero at the end."""
    climb = (step + 1) / (config.warmup_iters + 1)
    fall = (config.max_iters - step) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * max(0.0, min(climb, fall, 1.0))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on the matrices and none on vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = _device_of(model).type in ("cpu", "cuda")  # one kernel for all weights; older PyTorch has none for MPS
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=fused)


def _autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 for the matrix products on CUDA; everything else stays float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def surprisal(model: nn.Module, ids: Tensor, block_size: int | None = None, start_id: int = 0) -> Tensor:
    """How much each token of `ids` (N,) surprises the model: nats (N,), float32 on the CPU.

    The text is cut into disjoint windows of `block_size` (the model's own, unless given), so a token sees at most
    block_size tokens before it. The first token follows `start_id`, by default 0, the newline of a sorted vocabulary.
    """
    if len(ids) == 0:
        raise ValueError("there is nothing to evaluate: the text is empty")
    T, device, was_training = block_size or model.config.block_size, _device_of(model), model.training
    inputs, targets = torch.cat([ids.new_tensor([start_id]), ids[:-1]]), ids
    whole = len(ids) // T * T  # the last window may be shorter
    rows = list(zip(inputs[:whole].view(-1, T), targets[:whole].view(-1, T), strict=True)) if whole else []
    pieces = [rows[i : i + max(1, TOKENS_AT_ONCE // T)] for i in range(0, len(rows), max(1, TOKENS_AT_ONCE // T))]
    if whole < len(ids):
        pieces.append([(inputs[whole:], targets[whole:])])
    losses = []
    model.eval()
    for piece in pieces:
        x, y = (torch.stack(side).to(device) for side in zip(*piece, strict=True))  # (B, T) each
        with _autocast(device):
            logits = model(x)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").cpu())
    model.train(was_training)
    return torch.cat(losses)


def evaluate(model: nn.Module, ids: Tensor, block_size: int | None = None, start_id: int = 0) -> float:
    """The mean loss over a whole text, nats per token: one deterministic pass in which every token is scored once."""
    return surprisal(model, ids, block_size, start_id).double().mean().item()


class Trainer:
    """The loop: draw a batch, forward, backward, clip, update. It can be stopped after any step, saved and resumed.

    `ids` (N,) is the training text; the model decides the device. One seed, one machine, one number of threads: the
    same losses, bit for bit.
    """

    def __init__(self, model: nn.Module, ids: Tensor, config: TrainingConfig, block_size: int | None = None):
        self.model, self.config, self.device = model, config, _device_of(model)
        self.block_size = block_size or model.config.block_size
        self.ids = ids.to(self.device)
        self.optimizer = make_optimizer(model, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history = History()
        draw_batch(ids, 1, self.block_size, torch.Generator())  # a text that is too short is refused now, not later

    @property
    def step(self) -> int:
        """How many updates have been made."""
        return len(self.history.losses)

    def update(self) -> float:
        """One step of training; returns the batch loss from before the update, in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.config)
        x, y = draw_batch(self.ids, self.config.batch_size, self.block_size, self.generator)
        with _autocast(self.device):
            logits = self.model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {self.step}: try a lower learning_rate")
        self.optimizer.step()
        self.history.losses.append(value)
        return value

    def run(self, callback: Callable[["Trainer"], object] | None = None, progress: bool = True) -> History:
        """Train to max_iters; the callback is called at step 0, every eval_interval and at the end, True from it stops.

        An interrupt (Ctrl-C, the stop button) lets the step at hand end, then returns: model and history stay usable.
        """
        bar = tqdm(total=self.config.max_iters, initial=self.step, unit="step", disable=not progress, mininterval=0.5)
        self.model.train()
        self.history.interrupted, called_at = False, -1
        with bar, _interrupts() as interrupted:
            while True:
                due = self.step % self.config.eval_interval == 0 or self.step >= self.config.max_iters
                if callback and due and called_at != self.step:
                    called_at = self.step
                    if callback(self):
                        break
                    self.model.train()
                if self.step >= self.config.max_iters:
                    break
                if interrupted.is_set():
                    self.history.interrupted = True
                    break
                begin = time.perf_counter()
                loss = self.update()
                self.history.seconds += time.perf_counter() - begin
                bar.update()
                if self.step % 10 == 0:
                    bar.set_postfix_str(f"loss {loss:.3f}")
        self.model.eval()
        return self.history

    def save(self, folder: str | os.PathLike, tokenizer: Tokenizer, provenance: dict | None = None) -> Path:
        """Publish a checkpoint as a new folder: the model, and all that `resume` needs to go on as if not stopped."""
        generators = {"batches": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"config": asdict(self.config), "block_size": self.block_size, "history": asdict(self.history)}
        extra = {**checkpoints.pack_optimizer(self.optimizer, generators), "training.json": json.dumps(state).encode()}
        return checkpoints.save_model(folder, self.model, tokenizer, provenance or {}, extra=extra)

    @classmethod
    def resume(cls, folder: str | os.PathLike, ids: Tensor, device: str | torch.device = "cpu") -> "Trainer":
        """The trainer that `save` stored, ready to `run`. Raises ValueError for a damaged folder."""
        model, _, _ = checkpoints.load_model(folder, device)
        files = checkpoints.verify(folder)
        if "training.json" not in files:
            raise ValueError(f"{folder} holds a model but no state of training: give a folder named step-…")
        state = json.loads(files["training.json"])
        trainer = cls(model, ids, TrainingConfig(**state["config"]), state["block_size"])
        trainer.history = History(**state["history"])
        generators = checkpoints.unpack_optimizer(files, trainer.optimizer)
        trainer.generator.set_state(generators["batches"])
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], trainer.device)
        return trainer


def train(
    model: nn.Module,
    ids: Tensor,
    config: TrainingConfig,
    callback: Callable[[Trainer], object] | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place on the text `ids` (N,) and return what happened; see also `Trainer`."""
    return Trainer(model, ids, config).run(callback, progress)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Within it, a first Ctrl-C sets the event it yields instead of breaking into an update; a second breaks."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
