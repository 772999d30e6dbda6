"""Learning from text: the loss of a model on a text, and the one loop that lowers it."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from slm_lib import checkpoints
from slm_lib.data import draw_batch
from slm_lib.distributed import Ranks
from slm_lib.faults import enough_memory, first_not_finite, interrupts
from slm_lib.settings import TrainingConfig, learning_rate_at, make_optimizer
from slm_lib.tokens import Tokenizer

TOKENS_AT_ONCE = 16_384  # how many positions evaluation looks at in one forward pass; on CUDA four times as many
KEPT = {"seed", "optimizer", "weight_decay", "beta1", "beta2"}  # a checkpoint settles these


@dataclass
class History:
    """What happened: of every step the batch loss and the length of the gradient before it was clipped.

    `evaluations` is for losses on other texts, as (step, nats per token).
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
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


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 for the matrix products, on CUDA or where it is asked for; everything else stays as it is."""
    lower = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if lower else nullcontext()


def _losses(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits (B, T, V) against targets (B, T), computed in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B T, V)
    return F.cross_entropy(logits, targets.flatten(), reduction=reduction)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def surprisal(model: nn.Module, ids: Tensor, block_size: int | None = None, start_id: int = 0) -> Tensor:
    """How much each token of `ids` (N,) surprises the model: nats (N,), on the CPU.

    The text is cut into disjoint windows of `block_size` (the model's own, unless given), so a token sees at most
    block_size tokens before it. The first token follows `start_id`, by default 0, the newline of a sorted vocabulary.
    Computed in the precision of the weights on every device, so that a loss is the same everywhere, up to rounding.
    """
    if len(ids) == 0:
        raise ValueError("there is nothing to evaluate: the text is empty")
    T, device, was_training = block_size or model.config.block_size, _device_of(model), model.training
    inputs, targets = torch.cat([ids.new_tensor([start_id]), ids[:-1]]).to(device), ids.to(device)
    at_once = max(1, TOKENS_AT_ONCE * (4 if device.type == "cuda" else 1) // T)
    whole = len(ids) // T * T  # the last window may be shorter
    batches = (side[:whole].reshape(-1, T).split(at_once) for side in (inputs, targets))
    pieces = [*zip(*batches, strict=True), (inputs[None, whole:], targets[None, whole:])]
    model.eval()
    losses = [_losses(model(x), y, reduction="none") for x, y in pieces if x.numel()]  # of (B, T), each (B T,)
    model.train(was_training)
    return torch.cat(losses).cpu()


def evaluate(model: nn.Module, ids: Tensor, block_size: int | None = None, start_id: int = 0) -> float:
    """The mean loss over a whole text, nats per token: one deterministic pass in which every token is scored once."""
    return surprisal(model, ids, block_size, start_id).double().mean().item()


class Trainer:
    """The loop: draw a batch, forward, backward, clip, update. It can be stopped after any step, saved and resumed.

    `ids` (N,) is the training text; the model decides the device. `optimizer` is anything with the interface of
    torch.optim, by default `make_optimizer`; a group's own "lr_scale" multiplies its learning rate. One seed, one
    machine, one number of threads: the same losses, bit for bit. Where torch.distributed is initialised, each process
    (rank) computes its rows of the one batch, and gradients and losses are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        config: TrainingConfig,
        block_size: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.model, self.config, self.device = model, config, _device_of(model)
        self.block_size = block_size or model.config.block_size
        self.ids = ids.to(self.device)
        self.optimizer = make_optimizer(model, config) if optimizer is None else optimizer
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history = History()
        draw_batch(ids, 1, self.block_size, torch.Generator())  # a text that is too short is refused now, not later
        known = getattr(getattr(model, "config", None), "vocab_size", math.inf)
        if ids.min() < 0 or ids.max() >= known:
            raise ValueError(f"the text holds tokens from {ids.min()} to {ids.max()}, not all of vocab_size {known}")
        self.ranks = Ranks()
        if config.batch_size % (self.ranks.count * config.gradient_accumulation):
            raise ValueError(
                f"batch_size {config.batch_size} does not divide into {self.ranks.count} processes x "
                f"gradient_accumulation {config.gradient_accumulation}: take a multiple of their product"
            )
        self.forward = self.ranks.join(model)
        self.forward = torch.compile(self.forward) if config.compile else self.forward

    @property
    def step(self) -> int:
        """How many updates have been made."""
        return len(self.history.losses)

    def update(self) -> float:
        """One step of training; returns the batch loss from before the update, in nats per token.

        Raises FloatingPointError where loss or gradient is not finite, and then leaves the weights as they were;
        MemoryError where the batch is too large.
        """
        for group in self.optimizer.param_groups:
            held, rate = group.get("lr"), learning_rate_at(self.step, self.config) * group.get("lr_scale", 1.0)
            group["lr"] = held.fill_(rate) if isinstance(held, Tensor) else rate
        with enough_memory("lower batch_size, raise gradient_accumulation, or lower block_size, n_layer or n_embd"):
            x, y = self.draw()  # (B, T) each
            loss, norm = self.gradient(x, y)
            loss, norm = self.ranks.mean(loss), norm.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(self._breakdown(x, y, loss))
            self.move()
        self.history.losses.append(loss)
        self.history.gradient_norms.append(norm)
        return loss

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: contexts (B, T) and targets (B, T). A subclass may set another task."""
        return draw_batch(self.ids, self.config.batch_size, self.block_size, self.generator)

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the length of its gradient, which is left in the parameters, clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        total, pieces = torch.zeros((), device=self.device), self._pieces(self.ranks.rows(x), self.ranks.rows(y))
        for i, (x, y) in enumerate(pieces, 1):
            with self.ranks.apart(self.forward) if i < len(pieces) else nullcontext():
                with _autocast(self.device, self.config.precision):
                    logits = self.forward(x)  # (B, T, V)
                loss = _losses(logits, y) / len(pieces)
                loss.backward()
            total = total + loss.detach()
        return total, nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)

    def move(self) -> None:
        """Let the optimizer move the weights along their gradients."""
        with _autocast(self.device, self.config.precision):  # Muon's products
            self.optimizer.step()

    def _pieces(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        count = self.config.gradient_accumulation
        return list(zip(x.chunk(count), y.chunk(count), strict=True))

    def _breakdown(self, x: Tensor, y: Tensor, loss: float) -> str:
        """What to say when the loss of a batch, or a gradient, is no longer finite."""
        with _autocast(self.device, self.config.precision):
            found = next(filter(None, (first_not_finite(self.model, *piece) for piece in self._pieces(x, y))), None)
        found = found or ("the length of all gradients together" if math.isfinite(loss) else "the loss")
        return (
            f"training broke down: {found} is no longer finite (loss {loss:.3g}) at step {self.step}: "
            "try a lower learning_rate, more warmup_iters or a lower grad_clip"
        )

    def run(self, callback: Callable[["Trainer"], object] | None = None, progress: bool = True) -> History:
        """Train to max_iters; the callback is called at step 0, every eval_interval and at the end, True from it stops.

        An interrupt (Ctrl-C, the stop button) lets the step at hand end, then returns: model and history stay usable.
        Of several processes only the first calls the callback and shows progress, and all stop together.
        """
        hidden = not progress or self.ranks.rank > 0
        bar = tqdm(total=self.config.max_iters, initial=self.step, unit="step", disable=hidden, mininterval=0.5)
        if self.ranks.rank:  # each process drops other activations
            torch.manual_seed(self.config.seed + 1_000_003 * self.ranks.rank + self.step)
        self.model.train()
        self.history.interrupted, called_at = False, -1
        with bar, interrupts(patient=self.ranks.count > 1) as interrupted:
            while True:
                due = self.step % self.config.eval_interval == 0 or self.step >= self.config.max_iters
                if due and called_at != self.step:
                    called_at = self.step
                    if self._calls(callback):
                        break
                if self.step >= self.config.max_iters:
                    break
                if self.ranks.any(interrupted.is_set(), self.device):
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

    def _calls(self, callback: Callable[["Trainer"], object] | None) -> bool:
        """Whether the callback, called by the first process alone, wants all to stop."""
        wish = callback is not None and self.ranks.rank == 0 and bool(callback(self))
        self.model.train()
        return self.ranks.any(wish, self.device)

    def save(self, folder: str | os.PathLike, tokenizer: Tokenizer, provenance: dict | None = None) -> Path:
        """Publish a checkpoint as a new folder: the model, and all that `resume` needs to go on as if not stopped.

        Raises FloatingPointError for weights that are not finite: such a checkpoint would be the newest and worth
        nothing.
        """
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise FloatingPointError(f"the weight {name} is no longer finite after step {self.step}: not saved")
        generators = {"batches": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"config": asdict(self.config), "block_size": self.block_size, "history": asdict(self.history)}
        state["optimizer"] = _names(self.optimizer)
        extra = {**checkpoints.pack_optimizer(self.optimizer, generators), "training.json": json.dumps(state).encode()}
        return checkpoints.save_model(folder, self.model, tokenizer, provenance or {}, extra=extra)

    @classmethod
    def resume(cls, folder: str | os.PathLike, ids: Tensor, device: str | torch.device = "cpu", **changes) -> "Trainer":
        """The trainer that `save` stored, ready to `run`, with `changes` to its settings.

        Raises ValueError for a damaged folder, one of another version, or a change that comes too late.
        """
        if late := KEPT & set(changes):
            raise ValueError(f"{', '.join(sorted(late))} cannot change in the middle of training: start anew")
        model, _, _ = checkpoints.load_model(folder, device)
        files = checkpoints.verify(folder)
        if "training.json" not in files:
            raise ValueError(f"{folder} holds a model but no state of training: give a folder named step-…")
        state = json.loads(files["training.json"])
        if set(state["config"]) != {f.name for f in fields(TrainingConfig)}:
            raise ValueError(f"{folder} was saved by another version of slm_lib: train anew")
        config = replace(TrainingConfig(**state["config"]), **changes)
        trainer = cls(model, ids, config, state["block_size"])
        if state["optimizer"] != (ours := _names(trainer.optimizer)):
            raise ValueError(f"{folder} was trained with {state['optimizer']}, its settings make {ours}: train anew")
        trainer.history = History(**state["history"])
        generators = checkpoints.unpack_optimizer(files, trainer.optimizer)
        trainer.generator.set_state(generators["batches"])
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], trainer.device)
        return trainer


def _names(optimizer: torch.optim.Optimizer) -> str:
    """What an optimizer is called; of several together, all names."""
    return " and ".join(type(part).__name__ for part in getattr(optimizer, "optimizers", [optimizer]))


def train(
    model: nn.Module,
    ids: Tensor,
    config: TrainingConfig,
    callback: Callable[[Trainer], object] | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place on the text `ids` (N,) and return what happened; see also `Trainer`."""
    return Trainer(model, ids, config).run(callback, progress)
