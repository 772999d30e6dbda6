"""Cost against built models, searches against their definitions and Optuna, chance against counting, and the lesson."""

import ast
import contextlib
import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import fmean
from types import FunctionType
from unittest.mock import patch

import numpy as np
import optuna
import pytest
import torch
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm_lib import training, tuning, widgets
from slm_lib.blocks import GPT, GPTConfig, count_memory
from slm_lib.training import Trainer, TrainingConfig
from slm_lib.tuning import RUNGS, Between, OneOf, Speed, Table, Trial

LESSON = lesson_path("tuning")
SPACE = {"rate": OneOf((0.001, 0.003, 0.01, 0.03)), "depth": OneOf((1, 2, 4)), "width": OneOf((8, 16))}
SEARCHES = [tuning.grid_search, tuning.random_search, tuning.successive_halving, tuning.tpe_search]
SHAPE = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def table(seed=0, seeds=3):
    """A made-up table: losses that fall from rung to rung, with noise."""
    generator, rows = random.Random(seed), []
    for values in itertools.product(*(knob.values for knob in SPACE.values())):
        level = generator.uniform(2, 3)
        for _ in range(seeds):
            losses = [level + 1 / (rung + 0.5) + generator.gauss(0, 0.1) for rung in RUNGS]
            rows.append({**dict(zip(SPACE, values, strict=True)), "losses": losses})
    return Table(rows, SPACE)


def counted(run, bill):
    """The same run, which notes how far it was trained."""

    def paid(setting):
        place = len(bill)
        bill.append(0.0)
        for rung, loss in zip(RUNGS, run(setting), strict=True):
            bill[place] = rung
            yield loss

    return paid


# --- what a setting costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
def test_the_cost_equals_counts_of_a_built_model(design):
    shape, recipe = design(**SHAPE), TrainingConfig(batch_size=3, max_iters=7)
    cost = tuning.cost(shape, recipe, Speed(0.5, 1e-6))
    model = GPT(shape)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.zeros(3, 8, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert cost.operations == 7 * counter.get_total_flops()
    assert cost.memory == sum(count_memory(shape, 3).values())
    assert cost.seconds == pytest.approx(7 * (0.5 * 3 + 1e-6 * cost.operations / 7))


def test_accumulation_saves_memory_and_nothing_else():
    whole, cut = (
        tuning.cost(GPTConfig.gpt2(**SHAPE), TrainingConfig(batch_size=8, gradient_accumulation=pieces), Speed(1, 1))
        for pieces in (1, 4)
    )
    assert cut.memory < whole.memory
    assert (cut.parameters, cut.operations, cut.seconds) == (whole.parameters, whole.operations, whole.seconds)


@given(st.floats(0.01, 1e4), st.integers(1, 6), st.integers(1, 64))
def test_steps_within_a_time_fit_and_one_more_does_not(seconds, n_layer, batch_size):
    shape, speed = GPTConfig.gpt2(**{**SHAPE, "n_layer": n_layer}), Speed(1e-3, 1e-9)
    steps = tuning.steps_within(seconds, shape, batch_size, speed)

    def taken(n):
        return tuning.cost(shape, TrainingConfig(batch_size=batch_size, max_iters=n), speed).seconds

    assert steps == 1 or taken(steps) <= seconds * (1 + 1e-9)
    assert taken(steps + 1) > seconds * (1 - 1e-9)


@given(st.floats(1e-5, 1e-1), st.floats(1e-13, 1e-9))
def test_a_true_speed_is_found(per_layer, per_operation):
    layers, operations = [1, 4, 2, 8], [1e7, 5e7, 9e8, 2e8]
    seconds = [per_layer * (n + 1) + per_operation * o for n, o in zip(layers, operations, strict=True)]
    found = tuning.fit_speed(layers, operations, seconds)
    assert found.per_layer == pytest.approx(per_layer, rel=1e-5)
    assert found.per_operation == pytest.approx(per_operation, rel=1e-5)


def test_a_speed_is_measured():
    speed = tuning.measure_speed(updates=3)
    assert math.isfinite(speed.per_layer) and 1e-15 < speed.per_operation < 1e-6


# --- a run and its noise ----------------------------------------------------------------------------------------------


def trainer(learning_rate=3e-3, max_iters=16):
    torch.manual_seed(0)
    recipe = TrainingConfig(batch_size=2, max_iters=max_iters, learning_rate=learning_rate, warmup_iters=0)
    return Trainer(GPT(GPTConfig.gpt2(**SHAPE)), torch.arange(200) % 11, recipe)


def test_a_run_shows_its_loss_at_each_rung_and_stops_when_nobody_asks():
    held_out = torch.arange(40) % 11
    whole = trainer()
    losses = list(tuning.in_rungs(whole, held_out))
    assert whole.step == 16 and losses[-1] == training.evaluate(whole.model, held_out)
    asked = trainer()
    steps = tuning.in_rungs(asked, held_out)
    assert [next(steps), asked.step] == [losses[0], 2]
    assert [next(steps), asked.step] == [losses[1], 4]


def test_a_training_that_breaks_down_is_infinitely_bad():
    broken = trainer()
    steps = tuning.in_rungs(broken, torch.arange(40) % 11)
    next(steps)
    with torch.no_grad():
        broken.model.head.weight.fill_(math.nan)
    assert list(steps) == [math.inf] * 3


def counted_chance(first, second):
    """By integers over a common denominator: no rounding."""
    both, n = [round(1000 * x) for x in [*first, *second]], len(first)
    deals = list(itertools.combinations(range(len(both)), n))

    def gap(places):
        inside = sum(both[i] for i in places)
        return abs(inside * (len(both) - n) - (sum(both) - inside) * n)

    return fmean(gap(places) >= gap(range(n)) for places in deals)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_chance_is_a_share_of_deals(first, second):
    first, second = [x / 1000 for x in first], [x / 1000 for x in second]
    assert tuning.chance(first, second) == pytest.approx(counted_chance(first, second))
    assert tuning.chance(second, first) == pytest.approx(tuning.chance(first, second))


def test_many_losses_are_dealt_at_random_to_the_same_end():
    generator = random.Random(1)
    first, second = [generator.gauss(0, 1) for _ in range(10)], [generator.gauss(0.7, 1) for _ in range(10)]
    assert math.comb(20, 10) > 20_000
    every = list(itertools.combinations(range(20), 10))
    both = np.array([*first, *second])
    gaps = np.abs(2 * both[np.array(every)].sum(axis=1) - both.sum()) / 10
    assert tuning.chance(first, second) == pytest.approx((gaps >= gaps[0] - 1e-12).mean(), abs=0.015)
    assert tuning.chance(first, second) == tuning.chance(first, second)


def test_equal_settings_get_a_verdict_once_in_twenty_at_most_and_unequal_ones_their_own():
    generator = random.Random(2)
    names = Counter(tuning.verdict(*([generator.gauss(0, 1) for _ in range(5)] for _ in range(2))) for _ in range(800))
    assert names["first"] + names["second"] <= 0.05 * 800 * 1.35  # and three deviations for a draw of 800
    assert tuning.verdict([1, 2, 3, 4], [5, 6, 7, 8]) == "first"
    assert tuning.verdict([5, 6, 7, 8], [1, 2, 3, 4]) == "second"
    assert tuning.verdict([1, 2, 3], [5, 6, 7]) == "cannot tell"


# --- the range test ---------------------------------------------------------------------------------------------------


def quadratic(curvature):
    state = [1.0]

    def update(rate):
        loss = 0.5 * curvature * state[0] ** 2
        state[0] -= rate * curvature * state[0]
        return loss

    return update


@given(st.floats(0.5, 20))
def test_the_edge_of_a_quadratic_is_two_over_its_curvature(curvature):
    rates, losses = tuning.range_test(quadratic(curvature), 0.02 / curvature, 8 / curvature, 120)
    step = (8 / 0.02) ** (1 / 119)
    assert 2 / curvature / step <= tuning.edge(rates, losses) * 1.0001 <= 2 / curvature * 1.0002


def test_the_range_test_ends_where_the_loss_has_blown_up():
    losses = iter([3.0, 2.0, 5.9, 6.1, 1.0])
    assert tuning.range_test(lambda rate: next(losses), 0.1, 1.6, 5)[1] == [3.0, 2.0, 5.9, 6.1]
    losses = iter([3.0, math.nan, 1.0])
    rates, found = tuning.range_test(lambda rate: next(losses), 0.1, 0.4, 3)
    assert rates == pytest.approx([0.1, 0.2]) and tuning.edge(rates, found) == 0.1


# --- spaces and searches ----------------------------------------------------------------------------------------------


def test_a_share_of_the_way():
    assert Between(1e-4, 1e-2, log=True).at(0.5) == pytest.approx(1e-3)
    assert [Between(2.0, 6.0).at(share) for share in (0, 0.25, 1)] == [2, 3, 6]
    assert [OneOf("abc").at(share) for share in (0, 0.33, 0.34, 0.99, 1.0)] == list("aabcc")


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0, 0.999))
def test_a_grid_covers_the_product_once(a, b, c, offset):
    space = {"a": Between(0.0, 1.0), "b": Between(1.0, 2.0, log=True), "c": OneOf((1, 2, 3))}
    settings = tuning.grid(space, {"a": a, "b": b, "c": c}, offset)
    places = [tuple(setting.values()) for setting in settings]
    assert len(set(places)) == len(places) == a * b * c
    for name, n in zip("abc", (a, b, c), strict=True):
        values = Counter(setting[name] for setting in settings)
        assert len(values) == n and set(values.values()) == {a * b * c // n}


@pytest.mark.parametrize("budget", [1, 2, 7, 16, 24, 100])
def test_grid_search_is_as_fine_as_its_budget_and_never_repeats_a_setting(budget):
    found = [tuple(trial.setting.values()) for trial in tuning.grid_search(SPACE, table().run(0), budget, 3)]
    assert len(set(found)) == len(found) <= budget
    assert budget < 24 or len(found) == 24


def test_random_search_is_reproducible_and_uniform_in_logarithms():
    space = {"rate": Between(1e-4, 1e-1, log=True), "drop": Between(0.0, 0.5)}

    def draw(seed):
        return [trial.setting for trial in tuning.random_search(space, lambda setting: iter([1.0]), 3000, seed)]

    drawn, again, other = map(draw, (5, 5, 6))
    assert drawn == again != other
    shares = [math.log10(setting["rate"] / 1e-4) / 3 for setting in drawn]
    for values in (shares, [setting["drop"] / 0.5 for setting in drawn]):
        counts = Counter(int(10 * value) for value in values)
        assert set(counts) == set(range(10)) and all(abs(count - 300) < 5 * 300**0.5 for count in counts.values())
    assert abs(np.corrcoef(shares, [setting["drop"] for setting in drawn])[0, 1]) < 0.06


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("budget", [2.5, 8, 16, 21.25])
def test_a_search_spends_what_it_says_and_no_more_than_it_has(search, budget):
    bill = []
    trials = search(SPACE, counted(table().run(1), bill), budget, 4)
    assert sum(bill) == tuning.spent(trials) <= budget
    assert all(1 <= len(trial.losses) <= len(RUNGS) for trial in trials)
    if search is not tuning.grid_search:
        assert tuning.spent(trials) > budget - 1.5


def test_a_search_with_the_same_seed_is_the_same_search():
    for search in SEARCHES:
        first, again, other = (search(SPACE, table().run(7), 9, seed) for seed in (1, 1, 2))
        assert first == again != other


def test_successive_halving_keeps_the_best_of_a_monotone_table():
    """Where an early loss tells the end, the best of all that began must be what it ends with."""
    levels = {}

    def run(setting):
        level = levels.setdefault(tuple(setting.values()), len(levels) * 0.37 % 1)
        return (level + 1 / rung for rung in RUNGS)

    space = {"a": Between(0.0, 1.0), "b": Between(0.0, 1.0)}
    trials = tuning.successive_halving(space, run, 10, 0)
    assert levels[tuple(tuning.best(trials).setting.values())] == min(levels.values())
    reached = Counter(len(trial.losses) for trial in trials)
    alive = [sum(n for length, n in reached.items() if length > rung) for rung in range(4)]
    assert alive == [max(1, len(trials) // 2**i) for i in range(4)]
    more = [max(1, (len(trials) + 1) // 2**i) for i in range(4)]
    assert sum(n * part for n, part in zip(more, (0.125, 0.125, 0.25, 0.5), strict=True)) > 10


@pytest.mark.parametrize("seed", range(3))
def test_tpe_is_an_optuna_study(seed):
    trials = tuning.tpe_search(SPACE, table().run(seed), 14, seed)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.MedianPruner(n_startup_trials=5)
    )
    run = table().run(seed)

    def objective(trial):
        setting = {name: knob.at(trial.suggest_float(name, 0, 1)) for name, knob in SPACE.items()}
        for rung, loss in enumerate(run(setting)):
            trial.report(loss, rung)
            if rung < 3 and trial.should_prune():
                raise optuna.TrialPruned
        return loss

    study.optimize(objective, n_trials=len(trials))
    theirs = [
        [{name: knob.at(trial.params[name]) for name, knob in SPACE.items()}, list(trial.intermediate_values.values())]
        for trial in study.trials
    ]
    assert [[trial.setting, trial.losses] for trial in trials] == theirs
    assert any(len(trial.losses) < 4 for trial in trials)


def test_tpe_learns_where_to_look():
    space = {"a": Between(0.0, 1.0), "b": Between(0.0, 1.0)}

    def run(setting):
        return iter([(setting["a"] - 0.7) ** 2 + 0.01 * setting["b"]] * 4)

    late = [trial.setting["a"] for seed in range(5) for trial in tuning.tpe_search(space, run, 30, seed)[-10:]]
    assert fmean(abs(a - 0.7) for a in late) < 0.15


# --- the table --------------------------------------------------------------------------------------------------------


def test_regret_is_never_negative_and_nothing_for_the_best():
    found = table(3)
    settings = [dict(zip(SPACE, place, strict=True)) for place in found.curves]
    regrets = [found.regret(setting) for setting in settings]
    assert min(regrets) == 0 and sorted(regrets)[1] > 0
    for search in SEARCHES:
        assert min(tuning.regrets(found, search, 6, 8)) >= 0
    everything = tuning.regrets(found, tuning.grid_search, 24, 3)
    assert max(everything) < 0.35  # the whole table at once errs by its noise alone


def test_a_replay_hands_out_stored_runs_and_draws_them_by_its_seed():
    found, setting = table(), {"rate": 0.01, "depth": 2, "width": 8}
    stored = found.curves[0.01, 2, 8]
    run = found.run(0)
    drawn = [list(run(setting)) for _ in range(60)]
    assert all(losses in stored for losses in drawn) and len({tuple(losses) for losses in drawn}) == 3
    again = found.run(0)
    assert [list(again(setting)) for _ in range(60)] == drawn
    assert found.mean(setting) == pytest.approx(fmean(losses[-1] for losses in stored))


def test_a_run_that_broke_down_has_no_end_in_the_table():
    rows = [{"rate": rate, "losses": losses} for rate, losses in ((1, [2.0, None]), (2, [2.5, 2.4]))]
    found = Table(rows, {"rate": OneOf((1, 2))})
    assert found.regret({"rate": 1}) == math.inf and found.regret({"rate": 2}) == 0


def test_the_best_trial_got_farthest():
    trials = [Trial({"a": 1}, [1.0]), Trial({"a": 2}, [3.0, 2.5]), Trial({"a": 3}, [3.1, 2.4])]
    assert tuning.best(trials).setting == {"a": 3}


# --- the lesson -------------------------------------------------------------------------------------------------------

# Cells that train for seconds, or read what was trained.
LONG_WORK = re.compile(
    r"^(eight|large|own|race|by_budget|powers|ratios)\b|^tried = \[{|^\*_, \(_, bench|first_lean|ramps|edges|powers\["
    r"|draw_race\(race\)|reveal\(max\(eight|race\[",
    re.M,
)


def cells_of_lesson():
    return code_cells(LESSON)


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson; of the cells that train, only what they define."""
    names = {}
    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(LESSON.parent):
        patched.setenv("SLM_CORPUS", "playhouse")
        for source in cells_of_lesson():
            nodes, long = ast.parse(source).body, LONG_WORK.search(source) or "widgets." in source
            kept = [node for node in nodes if not long or isinstance(node, ast.FunctionDef | ast.ClassDef)]
            exec(compile(ast.Module(kept, []), "lesson", "exec"), names)
            if "plt" in names:
                names["plt"].close("all")
    return names


def off(function):
    """The same, off by a millionth, or by one where it counts; lists lose their last entry."""

    def answer(*args, **kwargs):
        right = function(*args, **kwargs)
        if isinstance(right, str):
            return {"first": "second"}.get(right, "first")
        if isinstance(right, tuple):
            return (right[0], [value * 1.000001 for value in right[1]])
        if isinstance(right, list):
            return [value + 0.001 for value in right] if isinstance(right[0], float) else right[:-1]
        return right + 1 if isinstance(right, int) else right * 1.000001

    return answer


def changed(**fields):
    def answer(function):
        def with_fields(*args):
            right = function(*args)
            return replace(right, **{name: change(getattr(right, name)) for name, change in fields.items()})

        return with_fields

    return answer


def in_tuning(name, wrap=off):
    return lambda: patch.object(tuning, name, wrap(getattr(tuning, name)))


def generous(search):
    return lambda space, run, budget, seed: search(space, run, 2 * budget, seed)


def broken_knobs():
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(OneOf, "at", lambda self, share: self.values[0]))
    stack.enter_context(patch.object(Between, "at", lambda self, share: self.low + share * (self.high - self.low)))
    return stack


# What a proof calls, and how to break it.
BREAKS = {
    "tuning.fit_speed(": in_tuning("fit_speed", changed(per_layer=lambda value: value * 1.000001)),
    "tuning.cost(": in_tuning("cost", changed(seconds=lambda value: value * 1.000001)),
    "tuning.steps_within(": in_tuning("steps_within"),
    "tuning.chance(": in_tuning("chance"),
    "tuning.verdict(": in_tuning("verdict"),
    "tuning.range_test(": in_tuning("range_test"),
    "tuning.edge(": in_tuning("edge"),
    "small.regret(": lambda: patch.object(Table, "regret", off(Table.regret)),
    "knob.at(": broken_knobs,
    "tuning.grid(": in_tuning("grid"),
    "tuning.random_search(space": in_tuning("random_search", generous),
    "tuning.in_rungs(": in_tuning("in_rungs", lambda f: lambda *args: [loss * 1.000001 for loss in f(*args)]),
    "tuning.grid_search(space": in_tuning("grid_search", generous),
    "tuning.successive_halving(space": in_tuning("successive_halving", generous),
    "tuning.spent(": in_tuning("spent"),
    "tuning.best(": in_tuning("best", lambda f: lambda trials: trials[0]),
    "tuning.tpe_search(space": in_tuning("tpe_search", generous),
    "tuning.regrets(": in_tuning("regrets"),
}


def test_each_proof_fails_when_the_library_is_broken(monkeypatch):
    monkeypatch.chdir(LESSON.parent)
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    names, caught, sources = {}, set(), cells_of_lesson()
    last = max(i for i, source in enumerate(sources) if "check.same(" in source)
    for source in sources[: last + 1]:
        if "check.same(" in source:
            found = {name for name in BREAKS if name in source}
            assert found, f"nothing is broken for this proof:\n{source}"
            for name in found:
                with BREAKS[name]():
                    if notices(source, dict(names), KeyError):
                        caught.add(name)
        if not LONG_WORK.search(source) and "widgets." not in source:
            exec(source, names)
            if "plt" in names:
                names["plt"].close("all")
    assert caught == set(BREAKS)


# --- its exercises ----------------------------------------------------------------------------------------------------


def every_rung_from_the_start(n, rungs, keep):
    return sum(max(1, n // keep**i) * rung for i, rung in enumerate(rungs))


def halves_always(n, rungs, keep):
    parts = np.diff([0, *rungs])
    return float(sum(max(1, n // 2**i) * part for i, part in enumerate(parts)))


def may_die_out(n, rungs, keep):
    return float(sum(n // keep**i * part for i, part in enumerate(np.diff([0, *rungs]))))


def without_replacement(losses, k):
    ordered, n = sorted(losses), len(losses)
    k = min(k, n)
    return sum(loss * math.comb(n - i - 1, k - 1) / math.comb(n, k) for i, loss in enumerate(ordered))


def mean_of_all(losses, k):
    return fmean(losses)


def lowest_of_all(losses, k):
    return min(losses)


def by_lowest_mean(losses, price):
    return min(losses, key=lambda name: fmean(losses[name]))


def by_price(losses, price):
    return min(price, key=price.get)


def by_distance_of_means(losses, price):
    best = by_lowest_mean(losses, price)
    near = [name for name in losses if fmean(losses[name]) - fmean(losses[best]) < 0.05]
    return min(near, key=price.get)


def seeds_by(wanted, scaled=True):
    def answer(gap, noise):
        generator, spread = random.Random(0), noise if scaled else 1
        for n in range(4, 10):
            pairs = [[[generator.gauss(mean, spread) for _ in range(n)] for mean in (0, gap)] for _ in range(200)]
            if sum(tuning.verdict(*pair) in wanted for pair in pairs) >= 160:
                return n
        return None

    return answer


def always_four(gap, noise):
    return 4


def sharpen(share, power):
    return share**power / (share**power + (1 - share) ** power)


def sharpens_the_mean(shares, temperature):
    share = fmean(shares)
    return float(share > 0.5) if temperature == 0 else sharpen(share, 1 / temperature)


def wrong_power(shares, temperature):
    return fmean(sharpen(share, temperature) for share in shares)


def not_normalised(shares, temperature):
    return fmean(share ** (1 / temperature) for share in shares)


def even_is_hers(shares, temperature):
    if temperature == 0:
        return fmean(share > 0.5 for share in shares)
    return fmean(sharpen(share, 1 / temperature) for share in shares)


WRONG = {
    "my_halving_bill": [every_rung_from_the_start, halves_always, may_die_out],
    "my_expected_best": [without_replacement, mean_of_all, lowest_of_all],
    "my_choice": [by_lowest_mean, by_price, by_distance_of_means],
    "my_written_share": [sharpens_the_mean, wrong_power, not_normalised, even_is_hers],
    "my_seeds_needed": [always_four, seeds_by(["first"], scaled=False), seeds_by(["first", "second", "cannot tell"])],
}


def test_the_exercises_are_graded():
    assert_graded("tuning", WRONG)


# --- its panels -------------------------------------------------------------------------------------------------------


def with_names(lesson, name, **others):
    """A function of the lesson that sees other values for some of its global names."""
    function = lesson[name]
    return FunctionType(function.__code__, {**lesson, **others}, name, function.__defaults__, function.__closure__)


def test_the_bench_shows_the_price_before_and_grows(lesson):
    bench = []
    sliders = {name: widgets.choice([value, *others]) for name, (value, *others) in {
        "n_layer": (1, 2), "n_embd": (12, 24), "n_head": (3, 5), "block_size": (8, 16), "batch_size": (2, 4),
        "max_iters": (4, 8), "learning_rate": (1e-2, 1e-3), "warmup_iters": (0, 2), "weight_decay": (0.1, 1.0),
        "dropout": (0.0, 0.2), "schedule": ("linear", "cosine"), "grad_clip": (1.0, 0.5), "beta1": (0.9, 0.5),
        "beta2": (0.95, 0.99), "design": ("gpt2", "modern")}.items()}  # fmt: skip
    ids = lesson["fit_ids"][:2000]
    parts = {"bench": bench, "fit_ids": ids, "tuning_ids": ids[:200], "speed": Speed(1e-3, 1e-11)}
    panel = widgets.RunPanel(
        with_names(lesson, "try_out", **parts), lesson["draw_bench"], None,
        about=with_names(lesson, "price", **parts), seed=widgets.slider(0, 9, 0), **sliders,
    )  # fmt: skip
    before = panel.about.text if hasattr(panel.about, "text") else panel.note.value
    assert "parameters" in before and "operations" in before
    panel.set(n_layer=2)
    after = panel.about.text if hasattr(panel.about, "text") else panel.note.value
    assert after != before
    for runs in (1, 2):
        panel.run_button.click()
        assert panel.wait(60) and panel.status.value.startswith("done"), panel.status.value
        assert len(bench) == runs and bench[-1]["loss"] > 0 and len(bench[-1]["losses"]) == 4
        panel.set(seed=3)
    assert panel.image.value
    plain = panel.about.text
    panel.set(design="modern", schedule="cosine", beta2=0.99)
    assert panel.about.text != plain  # another design has other parameters
    panel.run_button.click()
    assert panel.wait(60) and len(bench) == 3, panel.status.value
    assert bench[-1]["setting"]["schedule"] == "cosine" and bench[-1]["losses"] != bench[-2]["losses"]
    panel.set(n_head=5)
    panel.run_button.click()
    assert panel.wait(60) and "not divisible" in panel.status.value


def test_the_pairs_panel_moves(lesson):
    panel = widgets.Panel(
        lesson["draw_two"], rows=widgets.choice(list(lesson["space"]), "n_layer"),
        columns=widgets.choice(list(lesson["space"]), "n_embd"),
    )  # fmt: skip
    before = panel.image.value
    panel.set(columns="batch_size")
    assert panel.image.value != before and panel.status.value == ""
    panel.set(rows="batch_size")
    assert "different" in panel.status.value


@pytest.mark.parametrize("search", ["grid", "random", "halving", "TPE"])
def test_the_replay_panel_runs_each_search(lesson, search):
    shown = {}
    panel = widgets.RunPanel(
        with_names(lesson, "replay", shown=shown), with_names(lesson, "draw_race"), None,
        search=widgets.choice([search]), budget=widgets.slider(4, 64, 8, 4), replays=widgets.slider(2, 200, 3),
    )  # fmt: skip
    panel.run_button.click()
    assert panel.wait(60) and panel.status.value.startswith("done"), panel.status.value
    (found,) = shown.values()
    assert len(found) == 3 and min(found) >= 0 and panel.image.value


def test_the_lean_panel_asks_the_model_on_its_way(lesson):
    sliders = {"n_embd": widgets.slider(8, 64, 8, 8), "lean": widgets.slider(0.5, 0.95, 0.9, 0.05)}
    panel = widgets.RunPanel(
        partial(lesson["learn_lean"], steps=50), lesson["draw_lean"], None, seed=widgets.slider(0, 9, 1), **sliders
    )
    panel.run_button.click()
    assert panel.wait(120) and panel.status.value.startswith("done"), panel.status.value
    assert panel.result["steps"] == [25, 50] and panel.image.value
    assert all(0 < share < 1 for trade in ("smith", "nurse", "cooper", "brewer") for share in panel.result[trade])
