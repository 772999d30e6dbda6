"""Choosing a setting: its cost before training, the noise of its loss, and searches that can be replayed on a table.

A *setting* is a dictionary from a hyperparameter's name to its value. A *run* is a function that takes a setting and
yields its loss at each of the `RUNGS`, shares of a full training; who stops asking stops the training. Every search has
the same call, `search(space, run, budget, seed)`, with the budget in full trainings, and returns its trials in order.
"""

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


# --- what a setting costs ---------------------------------------------------------------------------------------------


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
        memory=sum(count_memory(model, recipe.batch_size).values()),
        seconds=recipe.max_iters * _step_seconds(model, recipe.batch_size, speed),
    )


def steps_within(seconds: float, model: GPTConfig, batch_size: int, speed: Speed) -> int:
    """How many updates fit into an estimated time; at least one."""
    return max(1, int(seconds / _step_seconds(model, batch_size, speed)))


def fit_speed(layers: Sequence[int], operations: Sequence[float], seconds: Sequence[float]) -> Speed:
    """The speed that explains measured steps best: least squares of the relative errors.

    For each measured step: the model's layers, the step's operations, the seconds it took.
    """
    measured = np.asarray(seconds, dtype=float)
    columns = np.stack([(np.asarray(layers) + 1) / measured, np.asarray(operations) / measured], axis=1)
    (per_layer, per_operation), *_ = np.linalg.lstsq(columns, np.ones(len(measured)), rcond=None)
    return Speed(float(per_layer), float(per_operation))


def measure_speed(updates: int = 5) -> Speed:
    """The speed of this machine's processor as it is now, from a few updates of three small models."""
    probes, ids = [(1, 32, 8), (4, 32, 8), (2, 128, 32)], torch.arange(1000) % 65
    layers, operations, seconds = [], [], []
    for n_layer, n_embd, batch_size in probes:
        config = GPTConfig.gpt2(vocab_size=65, block_size=32, n_layer=n_layer, n_head=2, n_embd=n_embd)
        trainer, times = Trainer(GPT(config), ids, TrainingConfig(batch_size=batch_size)), []
        for _ in range(updates):
            began = time.perf_counter()
            trainer.update()
            times.append(time.perf_counter() - began)
        layers.append(n_layer)
        operations.append(_step_operations(config, batch_size))
        seconds.append(statistics.median(times))
    return fit_speed(layers, operations, seconds)


# --- a run, and its noise ---------------------------------------------------------------------------------------------


def in_rungs(trainer: Trainer, held_out: Tensor, rungs: Sequence[float] = RUNGS) -> Iterator[float]:
    """Train, and yield the loss on a held-out text at each rung; infinity from where the training breaks down."""
    for rung in rungs:
        try:
            while trainer.step < round(rung * trainer.config.max_iters):
                trainer.update()
            yield evaluate(trainer.model, held_out)
        except FloatingPointError:
            yield math.inf


def chance(first: Sequence[float], second: Sequence[float], draws: int = 20_000) -> float:
    """How often luck alone would set two groups of losses so far apart: the permutation test (Fisher, 1935).

    The share of all ways to deal the losses into two groups of these sizes whose means lie at least as far apart as
    found; from `draws` random deals where there are more ways. 1 means nothing to see, 0.05 one case in twenty.
    """
    both, n = np.array([*first, *second], dtype=float), len(first)
    if math.comb(len(both), n) <= draws:
        deals = np.array(list(itertools.combinations(range(len(both)), n)))
    else:
        generator = np.random.default_rng(0)
        deals = np.array([np.arange(n), *(generator.permutation(len(both))[:n] for _ in range(draws))])
    total, inside = both.sum(), both[deals].sum(axis=1)
    gaps = np.abs(inside / n - (total - inside) / len(second))
    found = abs(both[:n].mean() - both[n:].mean())
    return float((gaps >= found - 1e-12).mean())


def verdict(first: Sequence[float], second: Sequence[float], level: float = 0.05) -> str:
    """Which group of losses is lower, "first" or "second", or "cannot tell" where chance would do as much."""
    if chance(first, second) > level:
        return "cannot tell"
    return "first" if statistics.fmean(first) < statistics.fmean(second) else "second"


# --- the learning-rate range test -------------------------------------------------------------------------------------


def range_test(
    update: Callable[[float], float], low: float, high: float, steps: int, blown: float = 2.0
) -> tuple[list[float], list[float]]:
    """Raise the learning rate from low to high in equal factors, one update for each (Smith, 2017).

    `update(rate)` makes one step and returns the loss from before it. Ends early where a loss is not finite or above
    `blown` times the first. Returns the rates and the losses.
    """
    rates, losses = [], []
    for i in range(steps):
        rate = low * (high / low) ** (i / (steps - 1))
        loss = update(rate)
        rates.append(rate)
        losses.append(loss)
        if not math.isfinite(loss) or loss > blown * losses[0]:
            break
    return rates, losses


def edge(rates: Sequence[float], losses: Sequence[float], memory: float = 0.0) -> float:
    """The rate after which the loss begins to rise; it is smoothed first, each value keeping `memory` of the last."""
    smooth, lowest, found = losses[0], math.inf, rates[0]
    for before, loss in zip([rates[0], *rates], losses, strict=False):  # a loss is the work of the rate before it
        smooth = memory * smooth + (1 - memory) * loss
        if smooth < lowest:
            lowest, found = smooth, before
    return found


# --- a space of settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """A knob with a continuous range, from low to high; with `log` in equal factors instead of equal steps."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the way, 0 to 1."""
        return self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """The value that an Optuna trial proposes."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class OneOf:
    """A knob with a few values in order."""

    values: tuple

    def at(self, share: float) -> Any:
        """The value at a share of the way, 0 to 1: each has an equal part of the way."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """The value that an Optuna trial proposes; it sees places in the order, so that neighbours count as near."""
        return self.values[trial.suggest_int(name, 0, len(self.values) - 1)]


Space = Mapping[str, Between | OneOf]


@dataclass
class Trial:
    """One setting that was tried, and its loss at each rung that it reached."""

    setting: Setting
    losses: list[float]


def spent(trials: Sequence[Trial], rungs: Sequence[float] = RUNGS) -> float:
    """What trials cost together, in full trainings: each as far as it was trained."""
    return sum(rungs[len(trial.losses) - 1] for trial in trials)


def best(trials: Sequence[Trial]) -> Trial:
    """Of the trials that got farthest, the one with the lowest loss."""
    farthest = max(len(trial.losses) for trial in trials)
    return min((trial for trial in trials if len(trial.losses) == farthest), key=lambda trial: trial.losses[-1])


# --- searches ---------------------------------------------------------------------------------------------------------


def grid(space: Space, points: Mapping[str, int], offset: float = 0.5) -> list[Setting]:
    """Every combination of so many points of each knob, each point in the middle (or at `offset`) of its part."""
    axes = [[knob.at((i + offset) / points[name]) for i in range(points[name])] for name, knob in space.items()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def grid_search(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """The finest grid that the budget pays for, the knobs refined in turn; the seed sets where its points lie."""
    points, offset = dict.fromkeys(space, 1), random.Random(seed).random()
    for name in itertools.cycle(space):
        finer = {**points, name: points[name] + 1}
        if math.prod(finer.values()) > budget:
            break
        points = finer
    return [Trial(setting, list(run(setting))) for setting in grid(space, points, offset)]


def _draw(space: Space, generator: random.Random) -> Setting:
    return {name: knob.at(generator.random()) for name, knob in space.items()}


def random_search(space: Space, run: Run, budget: float, seed: int) -> list[Trial]:
    """Settings drawn at random, each knob by itself (Bergstra and Bengio, 2012)."""
    generator = random.Random(seed)
    settings = [_draw(space, generator) for _ in range(int(budget))]
    return [Trial(setting, list(run(setting))) for setting in settings]


def successive_halving(space: Space, run: Run, budget: float, seed: int, rungs: Sequence[float] = RUNGS) -> list[Trial]:
    """Many random settings to the first rung, the better half of them to the next, and so on (Jamieson, 2016)."""
    generator, plan = random.Random(seed), _halving_plan(budget, rungs)
    trials = [Trial(_draw(space, generator), []) for _ in range(plan[0])]
    running, alive = {id(trial): run(trial.setting) for trial in trials}, trials
    for n in plan:
        alive = sorted(alive, key=lambda trial: trial.losses[-1:])[:n]
        for trial in alive:
            trial.losses.append(next(running[id(trial)]))
    return trials


def _halving_plan(budget: float, rungs: Sequence[float]) -> list[int]:
    """How many settings reach each rung, as many as the budget pays for, and at least one."""
    parts = [part - before for before, part in itertools.pairwise([0, *rungs])]
    plans = ([max(1, n // 2**i) for i in range(len(rungs))] for n in itertools.count(1))
    affordable = itertools.takewhile(lambda plan: np.dot(plan, parts) <= budget, plans)
    return list(affordable)[-1]


def tpe_search(space: Space, run: Run, budget: float, seed: int, rungs: Sequence[float] = RUNGS) -> list[Trial]:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011): draws near what was good so far, and prunes.

    A trial ends at a rung where its loss is worse than the median of the trials before it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study, trials = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner()), []
    while spent(trials, rungs) + 1 <= budget:
        ask = study.ask()
        trials.append(Trial({name: knob.suggest(ask, name) for name, knob in space.items()}, []))
        for rung, loss in enumerate(run(trials[-1].setting)):
            trials[-1].losses.append(loss)
            ask.report(loss, rung)
            if rung + 1 < len(rungs) and ask.should_prune():
                study.tell(ask, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(ask, trials[-1].losses[-1])
    return trials


# --- a table to replay searches on ------------------------------------------------------------------------------------


class Table:
    """Precomputed runs of every setting of a space of `OneOf` knobs: rows with the knobs, a seed and the losses."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], space: Space):
        self.space, self.curves = space, {}
        for row in rows:
            self.curves.setdefault(self._place(row), []).append(list(row["losses"]))

    def _place(self, setting: Mapping[str, Any]) -> tuple:
        return tuple(setting[name] for name in self.space)

    def run(self, seed: int) -> Run:
        """A run that trains nothing: it replays the losses of one of the setting's stored runs, drawn at random."""
        generator = random.Random(seed)
        return lambda setting: iter(generator.choice(self.curves[self._place(setting)]))

    def mean(self, setting: Mapping[str, Any]) -> float:
        """The mean final loss of a setting over its stored runs."""
        return statistics.fmean(losses[-1] for losses in self.curves[self._place(setting)])

    def regret(self, setting: Mapping[str, Any]) -> float:
        """How much higher a setting's mean final loss is than the best setting's; never negative."""
        return self.mean(setting) - min(self.mean(dict(zip(self.space, place, strict=True))) for place in self.curves)


def regrets(table: Table, search: Callable[..., list[Trial]], budget: float, replays: int) -> list[float]:
    """The regret of what a search ends with, over replays that differ in its seed and in the runs it sees."""
    return [table.regret(best(search(table.space, table.run(seed), budget, seed)).setting) for seed in range(replays)]
