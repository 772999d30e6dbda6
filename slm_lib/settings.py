"""How to train, in numbers and names; the learning rate of every step, and the optimizer that is meant."""

import math
from dataclasses import dataclass, fields

import torch
from torch import nn

from slm_lib.adam import Muon, Together

CHOICES = {
    "schedule": ("linear", "cosine", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "optimizer": ("adamw", "muon"),
}
MUON_LR_SCALE = 5.0  # `learning_rate` is AdamW's; a matrix under Muon goes so many times as far along each of its axes


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Counts are in steps; `learning_rate` is the highest one, at the end of the warm-up.

    `gradient_accumulation` cuts a batch into so many equal pieces, computed one after the other in less memory;
    `schedule` linear|cosine|constant is how the learning rate ends; `precision` auto|float32|bfloat16 is that of matrix
    products, auto being bfloat16 on CUDA; `optimizer` adamw|muon is what `make_optimizer` builds. Raises ValueError for
    a value with which no training makes sense.
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
    gradient_accumulation: int = 1
    schedule: str = "linear"
    precision: str = "auto"
    compile: bool = False
    optimizer: str = "adamw"

    def __post_init__(self):
        for f in fields(self):
            _check(f.name, f.type, getattr(self, f.name))
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation {self.gradient_accumulation} does not cut batch_size {self.batch_size} into "
                "equal pieces: take a divisor of it"
            )
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"learning_rate {self.learning_rate} must lie above 0 and not beyond 10: try 0.003")
        if not 0 <= self.weight_decay <= 10:
            raise ValueError(f"weight_decay {self.weight_decay} must lie in 0..10: try 0.1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in 0..1, 1 excluded: try 0.9, 0.95")
        if self.grad_clip <= 0:
            raise ValueError(f"grad_clip {self.grad_clip} must be above 0: try 1.0")


def _check(name: str, kind: type, value: object) -> None:
    """Raise ValueError where a setting is not of its kind."""
    lowest = 0 if name in ("warmup_iters", "seed") else 1
    if kind is str and value not in CHOICES[name]:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(CHOICES[name])}")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name} {value!r} must be True or False")
    if kind is int and (type(value) is not int or not lowest <= value < 2**63):
        raise ValueError(f"{name} {value!r} must be a whole number of at least {lowest} (and below 2**63)")
    if kind is float and (type(value) not in (int, float) or not abs(value) < math.inf):
        raise ValueError(f"{name} {value!r} must be a finite number")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: a straight climb to the highest, then down to zero at the end by schedule.

    "linear" falls in a straight line, "cosine" along half a wave (Loshchilov and Hutter, 2017), "constant" stays.
    """
    climb = min(1.0, (step + 1) / (config.warmup_iters + 1))
    left = (config.max_iters - step) / max(1, config.max_iters - config.warmup_iters)
    left = max(0.0, min(left, 1.0))
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[config.schedule]
    return config.learning_rate * min(climb, fall)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer | Together:
    """AdamW for all, or "muon": Muon for the matrices inside the model's blocks, and AdamW for all else.

    Embedding and head are tables of vectors rather than maps, which is why AdamW keeps them (Jordan et al., 2024).
    Matrices decay, vectors do not. Raises ValueError for muon where a model has no `blocks` with matrices.
    """
    inside = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    if config.optimizer == "adamw":
        return _adamw(list(model.parameters()), config)
    if not inside:
        raise ValueError("optimizer muon moves matrices inside blocks, and this model has none: take adamw")
    rest = [p for p in model.parameters() if all(p is not q for q in inside)]
    muon = Muon([{"params": inside, "lr_scale": MUON_LR_SCALE}], config.learning_rate, config.weight_decay)
    return Together(muon, _adamw(rest, config))


def _adamw(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) as torch has it, with weight decay on matrices and none on vectors."""
    matrices, vectors = ([p for p in parameters if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel for all weights; older PyTorch has none for MPS
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=fused)


def fastest_precision(device: torch.device) -> str:
    """bfloat16 for devices that are made for it, float32 for the others, which would be slower with it.

    Made for it are CUDA devices from Ampere on, and processors that say so: a machine always gives the same answer.
    """
    if device.type == "cuda":
        made_for_it = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell
        made_for_it = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
    return "bfloat16" if made_for_it else "float32"
