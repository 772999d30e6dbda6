"""Choosing a setting: its cost before training, the noise of its loss, and searches that can be replayed on a table.

A *setting* is a dictionary from a hyperparameter's name to its value. A *run* is a function that takes a setting and
yields its loss at each of the `RUNGS`, shares of a full training; who stops asking stops the training. Every search has
the same call, `search(space, run, budget, seed)`, with the budget in full trainings, and returns its trials in order.
"""

import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

from slm_lib.blocks import GPT, GPTConfig, count_flops, count_memory, count_parameters
from slm_lib.training import Trainer, TrainingConfig, evaluate

RUNGS = (0.125, 0.25, 0.5, 1.0)  # where a run shows its loss, in shares of a full training
Setting = dict[str, Any]
Run = Callable[[Setting], Iterator[float]]


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains: seconds for each layer of each step, and seconds for each operation."""

    per_layer: float
    per_operation: float


@dataclass(frozen=True)
class Cost:
    """What a training takes: parameters, floating-point operations, bytes of memory, estimated seconds."""

    parameters: int
    operations: int
    memory: int
    seconds: float


def _step_operations(model: GPTConfig, batch_size: int) -> int:
    """Operations of one update: forward for each token of the batch, and twice as much backward."""
    return 3 * sum(count_flops(model).values()) * batch_size * model.block_size


def _step_seconds(model: GPTConfig, batch_size: int, speed: Speed) -> float:
    """Time for each layer, however small (the embeddings and the head count as one more), and for the operations."""
    return speed.per_layer * (model.n_layer + 1) + speed.per_operation * _step_operations(model, batch_size)


def cost(model: GPTConfig, recipe: TrainingConfig, speed: Speed) -> Cost:
    """What it will cost to train a GPT of this shape by this recipe, before anything is built."""
    return Cost(
        parameters=sum(count_parameters(model).values()),
        operations=recipe.max_iters * _step_operations(model, recipe.batch_size),
        memory=sum(count_memory(model, recipe.batch_size // recipe.gradient_accumulation).values()),
        seconds=recipe.max_iters * _step_seconds(model, recipe.batch_size, speed),
    )


def steps_within(seconds: float, model: GPTConfig, batch_size: int, speed: Speed) -> int:
    """How many updates fit into an estimated time; at least one."""
    return max(1, int(seconds / _step_seconds(model, batch_size, speed)))


def fit_speed(layers: Sequence[int], operations: Sequence[float], seconds: Sequence[float]) -> Speed:
    """The speed that explains measured steps best: least squares of the relative errors of their seconds."""
    measured = np.asarray(seconds, dtype=float)
    columns = np.stack([(np.asarray(layers) + 1) / measured, np.asarray(operations) / measured], axis=1)
    (per_layer, per_operation), *_ = np.linalg.lstsq(columns, np.ones(len(measured)), rcond=None)
    return Speed(max(0.0, float(per_layer)), max(0.0, float(per_operation)))  # noise must not make time run backward


def measure_speed(updates: int = 12) -> Speed:
    """The speed of this machine's processor as it is now, from a few updates of three small models."""
    measured = []
    for n_layer, n_embd in ((1, 32), (4, 32), (2, 128)):
        model = GPTConfig.gpt2(vocab_size=65, block_size=32, n_layer=n_layer, n_head=2, n_embd=n_embd)
        trainer, times = Trainer(GPT(model), torch.arange(1000) % 65, TrainingConfig(batch_size=16)), []
        for _ in range(updates):
            began = time.perf_counter()
            trainer.update()
            times.append(time.perf_counter() - began)
        measured.append((n_layer, _step_operations(model, 16), min(times)))  # the others were disturbed
    return fit_speed(*zip(*measured, strict=True))


def in_rungs(trainer: Trainer, held_out: Tensor) -> Iterator[float]:
    """Train, and yield the loss on a held-out text at each rung; infinity from where the training breaks down."""
    for rung in RUNGS:
        try:
            while trainer.step < round(rung * trainer.config.max_iters):
                trainer.update()
            yield evaluate(trainer.model, held_out)
        except FloatingPointError:
            yield math.inf


def chance(first: Sequence[float], second: Sequence[float]) -> float:
    """How often luck alone sets two groups of losses so far apart, 0 to 1: the permutation test (Fisher, 1935).

    It is the share of all ways to deal the losses into two groups of these sizes whose means lie at least as far apart
    as found; of 20,000 random deals where there are more.
    """
    both, n = np.array([*first, *second], dtype=float), len(first)
    inside = both[_deals(len(both), n)].sum(axis=1)
    gaps = np.abs(inside / n - (both.sum() - inside) / len(second))
    return float((gaps >= abs(both[:n].mean() - both[n:].mean()) - 1e-12).mean())


@functools.cache
def _deals(total: int, n: int, most: int = 20_000) -> np.ndarray:
    """The ways to choose n places of `total`, a row for each, the first n first."""
    if math.comb(total, n) <= most:
        return np.array(list(itertools.combinations(range(total), n)))
    generator = np.random.default_rng(0)
    return np.array([np.arange(n), *(generator.permutation(total)[:n] for _ in range(most - 1))])


def verdict(first: Sequence[float], second: Sequence[float], level: float = 0.05) -> str:
    """Which group of losses is lower, "first" or "second", or "cannot tell" where chance would do as much."""
    if chance(first, second) > level:
        return "cannot tell"
    return "first" if statistics.fmean(first) < statistics.fmean(second) else "second"


def range_test(update: Callable[[float], float], low: float, high: float, steps: int) -> tuple[list, list]:
    """Raise the learning rate from low to high in equal factors, one update for each (Smith, 2017).

    `update(rate)` makes one step and returns the loss from before it. Returns rates and losses; it ends early where a
    loss is over twice the first, or not a number.
    """
    rates, losses = [], []
    for i in range(steps):
        rates.append(low * (high / low) ** (i / (steps - 1)))
        losses.append(update(rates[-1]))
        if not losses[-1] <= 2 * losses[0]:
            break
    return rates, losses


def edge(rates: Sequence[float], losses: Sequence[float], memory: float = 0.0) -> float:
    """The rate after which the loss begins to rise; it is smoothed first, each value keeping `memory` of the last."""
    smooth = list(itertools.accumulate(losses, lambda kept, loss: memory * kept + (1 - memory) * loss))
    return rates[max(0, smooth.index(min(smooth)) - 1)]  # the lowest loss is the work of the step before it


@dataclass(frozen=True)
class Between:
    """A knob with a continuous range, from low to high; with `log` in equal factors instead of equal steps."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the way, 0 to 1."""
        return self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class OneOf:
    """A knob with a few values in order."""

    values: tuple

    def at(self, share: float) -> Any:
        """The value at a share of the way, 0 to 1: each has an equal part of the way."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


Space = Mapping[str, Between | OneOf]


@dataclass
class Trial:
    """One setting that was tried, and its loss at each rung that it reached."""

    setting: Setting
    losses: list[float]


def spent(trials: Sequence[Trial]) -> float:
    """What trials cost together, in full trainings: each as far as it was trained."""
    return sum(RUNGS[len(trial.losses) - 1] for trial in trials)


def best(trials: Sequence[Trial]) -> Trial:
    """Of the trials that got farthest, the one with the lowest loss."""
    farthest = max(len(trial.losses) for trial in trials)
    return min((trial for trial in trials if len(trial.losses) == farthest), key=lambda trial: trial.losses[-1])


def grid(space: Space, points: Mapping[str, int], offset: float = 0.5) -> list[Setting]:
    """Every combination of so many points of each knob, each point in the middle (or at `offset`) of its part."""
    axes = [[knob.at((i + offset) / points[name]) for i in range(points[name])] for name, knob in space.items()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def grid_search(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """The finest grid that the budget pays for, the coarsest knob refined first; the seed sets where its points lie."""
    points, offset = dict.fromkeys(space, 1), random.Random(seed).random()
    most = {name: len(knob.values) if isinstance(knob, OneOf) else math.inf for name, knob in space.items()}
    while True:
        finer = [
            {**points, name: points[name] + 1} for name in sorted(space, key=points.get) if points[name] < most[name]
        ]
        finer = [choice for choice in finer if math.prod(choice.values()) <= budget]
        if not finer:
            return [Trial(setting, list(run(setting))) for setting in grid(space, points, offset)]
        points = finer[0]


def _draw(space: Space, generator: random.Random) -> Trial:
    return Trial({name: knob.at(generator.random()) for name, knob in space.items()}, [])


def random_search(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """Settings drawn at random, each knob by itself (Bergstra and Bengio, 2012)."""
    generator = random.Random(seed)
    trials = [_draw(space, generator) for _ in range(int(budget))]
    return [Trial(trial.setting, list(run(trial.setting))) for trial in trials]


def successive_halving(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """As many random settings as can be paid; from each rung the better half goes on (Jamieson and Talwalkar, 2016)."""
    generator, plan, parts = random.Random(seed), [1] * len(RUNGS), np.diff([0, *RUNGS])
    while np.dot(more := [max(1, (plan[0] + 1) // 2**i) for i in range(len(RUNGS))], parts) <= budget:
        plan = more  # how many settings reach each rung
    trials = [_draw(space, generator) for _ in range(plan[0])]
    running, alive = {id(trial): run(trial.setting) for trial in trials}, trials
    for places in plan:
        alive = sorted(alive, key=lambda trial: trial.losses[-1:])[:places]
        for trial in alive:
            trial.losses.append(next(running[id(trial)]))
    return trials


def tpe_search(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011), which draws near what was good so far.

    A trial ends at a rung where its loss is worse than the median of the trials before it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, trials = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)), []  # it prunes by the median
    while spent(trials) + 1 <= budget:  # the next one may need a full training
        ask = study.ask()
        trials.append(Trial({name: knob.at(ask.suggest_float(name, 0, 1)) for name, knob in space.items()}, []))
        for rung, loss in enumerate(run(trials[-1].setting)):
            trials[-1].losses.append(loss)
            ask.report(loss, rung)
            if rung + 1 < len(RUNGS) and ask.should_prune():
                study.tell(ask, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(ask, trials[-1].losses[-1])
    return trials


class Table:
    """Stored runs of every setting of a space of `OneOf` knobs: rows with the knobs and the losses at the rungs."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], space: Space):
        self.space, self.curves = space, {}
        for row in rows:
            losses = [math.inf if loss is None else loss for loss in row["losses"]]  # None: the training broke down
            self.curves.setdefault(self._place(row), []).append(losses)
        self.lowest = min(statistics.fmean(losses[-1] for losses in found) for found in self.curves.values())

    def _place(self, setting: Mapping[str, Any]) -> tuple:
        return tuple(setting[name] for name in self.space)

    def run(self, seed: int) -> Run:
        """A run that trains nothing: it replays one of the setting's stored runs, drawn at random."""
        generator = random.Random(seed)
        return lambda setting: iter(generator.choice(self.curves[self._place(setting)]))

    def mean(self, setting: Mapping[str, Any]) -> float:
        """The mean final loss of a setting over its stored runs."""
        return statistics.fmean(losses[-1] for losses in self.curves[self._place(setting)])

    def regret(self, setting: Mapping[str, Any]) -> float:
        """How much higher a setting's mean final loss is than the best setting's; never negative."""
        return self.mean(setting) - self.lowest


def regrets(table: Table, search: Callable[..., list[Trial]], budget: float, replays: int) -> list[float]:
    """The regret of what a search ends with, over replays that differ in its seed and in the runs it sees."""
    return [table.regret(best(search(table.space, table.run(seed), budget, seed)).setting) for seed in range(replays)]
