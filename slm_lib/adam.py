"""How weights move: SGD, Momentum, Nesterov, RMSProp, Adam, AdamW and Muon, with the interface of torch.optim.

Each optimizer is one rule, `update`, for one weight tensor and its gradient; what they share is `Optimizer`. The state
has torch.optim's names, so that a run which torch.optim began can go on here. Written to be read: torch.optim does the
same in fewer, fused operations, and is faster.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

# From which value on each hyperparameter makes no sense; all begin at 0.
LIMITS = {"lr": math.inf, "weight_decay": math.inf, "eps": math.inf, "momentum": 1, "alpha": 1, "betas": 1}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024): a polynomial that is steep at zero


class Optimizer:
    """What all optimizers share: groups of parameters, each with its hyperparameters, and a state for each parameter.

    `params` are tensors of any shape, or dictionaries {"params": tensors, ...} whose further entries replace the
    defaults. A rule of your own needs `update(weight, gradient, state, group)`, which changes weight and state in
    place. Raises ValueError for a hyperparameter that makes no sense, TypeError for what is no parameter.
    """

    def __init__(self, params: Iterable, **defaults):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [{**defaults, **group, "params": _tensors(group["params"])} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        _check_parameters(self._parameters())
        for group in self.param_groups:
            _check_hyperparameters(group)

    def _parameters(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        """Move one weight tensor, in place; gradient and state have its shape."""
        raise NotImplementedError("an optimizer needs a rule: write update(weight, gradient, state, group)")

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, self.state.setdefault(weight, {}), group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: set them to None, or to zeros."""
        for weight in self._parameters():
            weight.grad = None if set_to_none or weight.grad is None else torch.zeros_like(weight.grad)

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on: the state by the number of the parameter, and the groups."""
        number = {weight: i for i, weight in enumerate(self._parameters())}
        groups = [{**group, "params": [number[weight] for weight in group["params"]]} for group in self.param_groups]
        return {"state": {number[weight]: dict(entry) for weight, entry in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        """Put back what `state_dict`, ours or torch.optim's, returned. Raises ValueError where the groups differ."""
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != [len(group["params"]) for group in saved["param_groups"]]:
            raise ValueError(f"this state belongs to other groups: here they have {sizes} parameters")
        self.state.clear()
        for group, kept in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({name: kept[name] for name in group if name in kept and name != "params"})
            for i, weight in zip(kept["params"], group["params"], strict=True):
                entry = saved["state"].get(i, {})
                self.state[weight] = {name: _like(value, weight, group) for name, value in entry.items()}


def _tensors(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def _like(value: Tensor, weight: Tensor, group: dict) -> Tensor:
    """A copy of a saved tensor as its weight is; a count of steps stays as it is, but where torch fuses it lies."""
    if value.dim() == 0:
        return value.to(weight.device if group.get("fused") else value.device, copy=True)
    return value.to(weight, copy=True)


def _check_parameters(weights: list) -> None:
    if not weights:
        raise ValueError("there is nothing to optimize: the list of parameters is empty")
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{type(weight).__name__} is no parameter: give tensors, as model.parameters() does")
        if not weight.is_leaf:
            raise ValueError("a tensor that was computed from others is no parameter: give the ones it came from")
    if len(set(weights)) < len(weights):
        raise ValueError("one parameter stands twice among the groups: name each once")


def _check_hyperparameters(group: dict) -> None:
    betas = group.get("betas", (0, 0))
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas {betas!r} must be two numbers, for the mean and for the mean square")
    for name in LIMITS.keys() & group.keys():
        upper = "be 0 or more" if LIMITS[name] == math.inf else "lie in 0..1, 1 excluded"
        for value in betas if name == "betas" else [group[name]]:
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < LIMITS[name]:
                raise ValueError(f"{name} {group[name]!r} makes no sense: it must be a number and {upper}")


def _running(state: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    """A tensor of the state; zeros of the weight's shape before the first step."""
    if name not in state:
        state[name] = torch.zeros_like(weight)
    return state[name]


class SGD(Optimizer):
    """Gradient descent (Robbins and Monro, 1951, with noisy gradients): w ← w − lr·g.

    Weight decay is in the loss: g ← g + weight_decay·w. Raises ValueError as `Optimizer` does.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def update(self, weight, gradient, state, group):
        weight -= group["lr"] * _with_decay(gradient, weight, group)


def _with_decay(gradient: Tensor, weight: Tensor, group: dict) -> Tensor:
    """The gradient of the loss plus weight_decay·|w|²/2."""
    return gradient + group["weight_decay"] * weight if group["weight_decay"] else gradient


class Momentum(Optimizer):
    """Gradient descent that keeps rolling (Polyak, 1964): b ← momentum·b + g, w ← w − lr·b.

    As in torch.optim.SGD the new gradient counts fully, so a steady one makes steps of lr·g/(1 − momentum).
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, weight, gradient, state, group):
        gradient, buffer = _with_decay(gradient, weight, group), _running(state, "momentum_buffer", weight)
        buffer.mul_(group["momentum"]).add_(gradient)
        weight -= group["lr"] * self.direction(gradient, buffer, group["momentum"])

    def direction(self, gradient: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Where to go, given the gradient and all that came before it in the buffer."""
        return buffer


class Nesterov(Momentum):
    """Momentum that looks ahead (Nesterov, 1983; this form: Sutskever et al., 2013): w ← w − lr·(g + momentum·b)."""

    def direction(self, gradient, buffer, momentum):
        return gradient + momentum * buffer


class RMSProp(Optimizer):
    """A step size for each weight (Hinton, 2012, lecture 6e): v ← alpha·v + (1 − alpha)·g², w ← w − lr·g/(√v + eps)."""

    def __init__(
        self, params: Iterable, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0
    ):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)

    def update(self, weight, gradient, state, group):
        gradient, square = _with_decay(gradient, weight, group), _running(state, "square_avg", weight)
        square.lerp_(gradient.square(), 1 - group["alpha"])
        weight -= group["lr"] * gradient / (square.sqrt() + group["eps"])


class Adam(Optimizer):
    """Momentum and RMSProp joined, with their start put right (Kingma and Ba, 2015, algorithm 1).

    m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², w ← w − lr·m̂/(√v̂ + eps) with m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).
    Weight decay is in the loss: g ← g + weight_decay·w.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, weight, gradient, state, group):
        weight -= group["lr"] * self.direction(_with_decay(gradient, weight, group), state, group)

    def direction(self, gradient: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
        """m̂/(√v̂ + eps), of the gradient's shape; the running means in `state` move on by one step."""
        (beta1, beta2), count = group["betas"], state.setdefault("step", torch.tensor(0.0))
        mean, square = _running(state, "exp_avg", gradient), _running(state, "exp_avg_sq", gradient)
        count += 1
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        mean_hat = mean / (1 - beta1 ** count.item())
        square_hat = square / (1 - beta2 ** count.item())
        return mean_hat / (square_hat.sqrt() + group["eps"])


class AdamW(Adam):
    """Adam with weight decay outside the gradient: w ← (1 − lr·weight_decay)·w first (Loshchilov and Hutter, 2019)."""

    def __init__(self, params: Iterable, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, weight, gradient, state, group):
        weight *= 1 - group["lr"] * group["weight_decay"]
        weight -= group["lr"] * self.direction(gradient, state, group)


def orthogonalise(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """A matrix (m, n), or each of a stack (..., m, n), with its own singular vectors and all singular values near 1.

    Newton-Schulz: x ← a·x + b·(xxᵀ)x + c·(xxᵀ)²x, which needs no SVD (Bernstein and Newhouse, 2024; Jordan et al.,
    2024). They come to about 0.7 to 1.2; one that is a thousand times smaller than all together grows, but stays small.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # now no singular value is above 1
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # so that gram is the smaller of two possible squares
    for _ in range(steps):
        gram = x @ x.mT  # (m, n) @ (n, m) = (m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x  # (m, m) @ (m, n) = (m, n)
    return x.mT if tall else x


class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al., 2024): w ← (1 − lr·weight_decay)·w − lr·scale·orthogonal(d).

    d is Nesterov's look ahead from the running mean of the gradients. `adjust_lr_fn`: "original" has scale
    √max(1, m/n); "match_rms_adamw" has 0.2·√max(m, n), which makes steps as large as AdamW's, so that one learning
    rate serves both (Liu et al., 2025). Matrices of one shape are orthogonalised as one stack. Raises ValueError for a
    parameter that is not a matrix: give it to AdamW.
    """

    def __init__(self, params: Iterable, lr=1e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=adjust_lr_fn)
        for group in self.param_groups:
            if group["adjust_lr_fn"] not in ("original", "match_rms_adamw"):
                raise ValueError(f"adjust_lr_fn {group['adjust_lr_fn']!r}: choose original or match_rms_adamw")
        for weight in self._parameters():
            if weight.dim() != 2:
                raise ValueError(f"Muon moves matrices, not shape {tuple(weight.shape)}: give the rest to AdamW")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            moving = [weight for weight in group["params"] if weight.grad is not None]
            for shape in dict.fromkeys(weight.shape for weight in moving):
                alike = [weight for weight in moving if weight.shape == shape]
                ahead = torch.stack([self._ahead(weight, group["momentum"]) for weight in alike])  # (k, m, n)
                for weight, direction in zip(alike, orthogonalise(ahead), strict=True):
                    self.update(weight, direction, self.state[weight], group)

    def _ahead(self, weight: Tensor, momentum: float) -> Tensor:
        """Where the running mean of the gradients, which takes in this one, is going."""
        buffer = _running(self.state.setdefault(weight, {}), "momentum_buffer", weight)
        return weight.grad.lerp(buffer.lerp_(weight.grad, 1 - momentum), momentum)

    def update(self, weight, direction, state, group):
        (m, n), lr = weight.shape, group["lr"]
        scale = math.sqrt(max(1, m / n)) if group["adjust_lr_fn"] == "original" else 0.2 * math.sqrt(max(m, n))
        weight.mul_(1 - lr * group["weight_decay"])
        if isinstance(lr, Tensor):  # it lies on the device, and a recorded step reads it there
            weight.addcmul_(direction, lr * scale, value=-1)
        else:
            weight.sub_(direction, alpha=lr * scale)


class Together(Optimizer):
    """Several optimizers, ours or torch.optim's, each with parameters of its own, as one: a step is one of each.

    Raises ValueError where two of them hold the same parameter.
    """

    def __init__(self, *optimizers: Optimizer | torch.optim.Optimizer):
        self.optimizers, self.state = optimizers, defaultdict(dict)
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        _check_parameters(self._parameters())
        for optimizer in optimizers:
            self.state.update(optimizer.state)
            optimizer.state = self.state  # one memory for all, so that it is saved and loaded as one

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
