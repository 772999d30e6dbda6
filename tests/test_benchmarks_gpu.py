"""What the programs for a GPU rest on; their whole path runs here on a CPU, at toy size."""

import functools
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_benchmarks import program
from torch import nn

from slm_lib import check, checkpoints, data, gpu, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.presets import PRESETS

CPU = torch.device("cpu")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_iters": 12, "warmup_iters": 1}
JOB = {"kind": "ours", "corpus": "playhouse", "characters": [9_000, 900], "every": 5, "device": "cpu", "threads": 1,
       "tuning": False, "seed": 0, "changes": TINY, "peak": None}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_corpus():
    """Drawing playhouse takes seconds: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_corpus", functools.cache(data.load_corpus))
        yield


@pytest.fixture(scope="module")
def contest():
    with program("gpu", "gpu_contestants", "contestants", "record") as module:
        yield module


@pytest.fixture(scope="module")
def gpu_contestants(contest):
    return sys.modules["gpu_contestants"]


@pytest.fixture(scope="module")
def contestants(contest):
    return sys.modules["contestants"]


@pytest.fixture(scope="module")
def steps(contest):
    with program("gpu_steps") as module:
        yield module


@pytest.fixture
def kept(contest, tmp_path, monkeypatch):
    """Results are kept below a folder of the test's."""
    monkeypatch.setattr(contest.record, "ROOT", tmp_path)
    return tmp_path


def tiny_gpt(block_size=32):
    torch.manual_seed(0)
    return GPT(GPTConfig.modern(vocab_size=65, block_size=block_size, n_layer=1, n_head=2, n_embd=16))


# --- watching a training ----------------------------------------------------------------------------------------------


@pytest.fixture
def watched(gpu_contestants, monkeypatch):
    """A watch whose clock advances when told to, and whose looks take 100 seconds and find given losses."""
    clock = SimpleNamespace(now=1_000.0, losses=[])

    def evaluate(*_):
        clock.now += 100
        return clock.losses.pop(0)

    monkeypatch.setattr(gpu_contestants.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(gpu_contestants.training, "evaluate", evaluate)
    return gpu_contestants.Watch({"began": 990.0, "peak": None}, torch.zeros(9), CPU), clock


def look_at(watch, clock, losses, seconds_per_step=1.0, first=0, every=10):
    """Let so many looks happen, one every few steps that each take their time."""
    clock.losses += losses
    clock.now += first * seconds_per_step * 50  # the first one compiles
    watch.begin(first)
    for step in range(every, every * len(losses) + 1, every):
        clock.now += (every - (first if step == every else 0)) * seconds_per_step
        watch.look(SimpleNamespace(config=SimpleNamespace(block_size=32)), step)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_clocks_stand_while_the_loss_is_looked_at(watched, first):
    watch, clock = watched
    look_at(watch, clock, [3.0, 2.0, 1.0], seconds_per_step=0.5, first=first)
    assert watch.curve == [[10, 5.0, 3.0], [20, 10.0, 2.0], [30, 15.0, 1.0]]  # the first step counts as the others do
    assert watch.all_in == pytest.approx(10 + 15 + first * 24.5)  # ten seconds before the loop, and the compilation
    assert watch.looking == 300


def test_the_target_is_reached_when_a_look_first_finds_it(watched, gpu_contestants):
    watch, clock = watched
    look_at(watch, clock, [3.0, gpu_contestants.TARGET + 1e-6, gpu_contestants.TARGET, 1.2, 1.9])
    row = watch.row(tiny_gpt().config, tokens=5_000)
    assert (row["target_step"], row["seconds_to_target"], row["seconds_to_target_all_in"]) == (30, 30, 40)
    assert (row["best_loss"], row["best_step"]) == (1.2, 40)  # shown: the loss that counts is the last one's
    assert (row["steps"], row["seconds"], row["seconds_all_in"]) == (50, 50, 60)
    assert row["tokens_per_second"] == 100 and row["milliseconds_per_step"] == 1_000


def test_a_target_that_is_never_reached_has_no_time(watched):
    watch, clock = watched
    look_at(watch, clock, [3.0, 2.0])
    row = watch.row(tiny_gpt().config, tokens=100)
    assert row["target_step"] is row["seconds_to_target"] is row["seconds_to_target_all_in"] is None


def test_utilisation_is_of_the_peak_that_was_measured(watched):
    watch, clock = watched
    look_at(watch, clock, [2.0])
    config = tiny_gpt().config
    assert watch.row(config, 1_000)["utilisation"] is None
    watch.job["peak"] = 1e6
    assert watch.row(config, 1_000)["utilisation"] == pytest.approx(gpu.utilisation(config, 100, 1e6), abs=1e-4)


def test_changes_reach_the_sizes_and_the_training_of_the_preset(gpu_contestants):
    preset = PRESETS[gpu_contestants.PRESET]
    sizes, config = gpu_contestants.settings({"n_layer": 2, "dropout": 0.25, "max_iters": 7})
    assert (sizes["n_layer"], sizes["dropout"], config.max_iters) == (2, 0.25, 7)
    assert sizes["n_embd"] == preset.sizes["n_embd"] and config.learning_rate == preset.training.learning_rate
    assert gpu_contestants.settings({}) == (preset.sizes, preset.training)
    with pytest.raises(TypeError, match="n_layers"):
        gpu_contestants.settings({"n_layers": 2})


def test_ours_is_trained_for_its_steps_and_scored_after_the_last(gpu_contestants, contestants):
    row = gpu_contestants.contend({**JOB, "began": gpu_contestants.time.perf_counter()})
    assert [point[0] for point in row["curve"]] == [10, 12] and row["steps"] == 12
    assert row["curve"][-1][2] == row["loss_256"] == row["loss_own"]  # it reads 32 characters: fewer than 256
    assert row["characters_seen"] == 12 * 4 * 32 and row["block_size"] == 32
    assert row["parameters"] == tiny_gpt().n_parameters
    assert 0 < row["seconds"] < row["seconds_all_in"] and row["memory_mib"] is None
    other = gpu_contestants.contend({**JOB, "began": 0.0, "seed": 1})
    assert row["loss_full"] != other["loss_full"]


def test_trials_learn_from_all_but_the_tuning_block(contestants):
    train, val = data.split(data.load_corpus("playhouse"))
    block = contestants.TUNING_CHARACTERS
    assert contestants.texts({"corpus": "playhouse", "tuning": False}) == (train, val)
    learned, scored = contestants.texts({"corpus": "playhouse", "tuning": True})
    assert learned + scored == train and len(scored) == block
    learned, scored = contestants.texts({"corpus": "playhouse", "tuning": False, "characters": [70, 30]})
    assert (learned, scored) == (train[:70], val[:30])


def test_the_first_column_is_named_by_its_window(contestants):
    ids, model = torch.randint(65, (500,)), tiny_gpt(block_size=48).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    found = contestants.columns(model, ids, 16)
    assert set(found) == {"16", "own", "full"}
    assert found["16"].mean().item() == pytest.approx(training.evaluate(model, ids, 16))
    assert torch.equal(contestants.columns(model, ids, 64)["64"], found["own"])  # it cannot read 64


MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 65
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    bias: bool = False
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(65, 65)
    def forward(self, ids, targets=None):
        logits = self.table(ids)
        if targets is None:
            return logits[:, -1:], None
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
TRAIN = """
import sys
import numpy as np
import torch
from dataclasses import asdict
from model import GPT, GPTConfig
given = dict(word[2:].split("=") for word in sys.argv[2:])
steps = int(given["max_iters"])
assert given["eval_interval"] == given["lr_decay_iters"] == given["max_iters"] and given["eval_iters"] == "1"
torch.manual_seed(1337)
raw_model = model = GPT(GPTConfig())
optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/train.bin", np.uint16).astype(np.int64))
for step in range(steps + 1):
    if step == steps:
        checkpoint = {"model": {"_orig_mod." + name: w for name, w in model.state_dict().items()},
                      "model_args": asdict(model.config), "iter_num": step}
        torch.save(checkpoint, given["out_dir"] + "/ckpt.pt")
    places = torch.randint(len(ids) - 17, (8, 1)) + torch.arange(17)
    model(ids[places][:, :-1], ids[places][:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def stand_in(tmp_path):
    """A program that can be run as nanoGPT is: a model of pairs of characters, learned in a moment."""
    copy = tmp_path / "copy"
    (copy / "data" / "shakespeare_char").mkdir(parents=True)
    (copy / "model.py").write_text(MODEL)
    (copy / "train.py").write_text(TRAIN)
    flags = {"batch_size": 8, "block_size": 16, "max_iters": 31}
    return {**JOB, "kind": "nanogpt", "copy": str(copy), "flags": flags, "every": 8}


@pytest.fixture
def here(gpu_contestants, tmp_path, monkeypatch):
    """Trains a contestant in this process, which then is as it was: nanoGPT's way moves into its folder."""

    def contend(job, **changes):
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.chdir(tmp_path)
        row = gpu_contestants.contend({**job, "folder": str(tmp_path), "began": 0.0, **changes})
        sys.modules.pop("model", None)
        return row

    return contend


def test_nanogpt_is_watched_from_outside_and_scored_after_its_last_step(contest, gpu_contestants, stand_in, here):
    row = contest.measure(stand_in, gpu_contestants.__file__)  # a process of its own
    assert [point[0] for point in row["curve"]] == [8, 16, 24, 31] and row["steps"] == 31  # 32 are made
    assert row["curve"][-1][2] == row["loss_256"] == row["loss_own"] == row["loss_full"]  # pairs need no context
    assert row["curve"][0][2] > row["curve"][-1][2]  # it learns, and looking does not stop it
    assert row["parameters"] == 65 * 65 and row["characters_seen"] == 31 * 8 * 16
    assert row["seconds"] < row["seconds_all_in"]  # importing PyTorch takes longer
    assert here(stand_in)["curve"][-1][2] == row["loss_256"] != here(stand_in, seed=1)["loss_256"]


def test_looking_changes_nothing(stand_in, here):
    for job in (stand_in, JOB):
        often, seldom = (here(job, every=every) for every in (5, 40))
        assert len(often["curve"]) > len(seldom["curve"]) == 1 and often["loss_full"] == seldom["loss_full"]


# --- the search and the contest ---------------------------------------------------------------------------------------


def test_climbing_keeps_what_helps_and_leaves_a_stage_that_does_not(contestants):
    tried = []

    def attempt(changes):
        tried.append(changes)
        return 2 - changes.get("a", 0) * (3 - changes.get("a", 0)) / 10 - (changes.get("b") == 1) / 10

    contestants.climb(attempt, [[{"a": 1}, {"a": 2}, {"a": 3}], [{"b": 2}, {"b": 1}], [{"b": 1}]])
    assert tried == [{}, {"a": 1}, {"a": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]


def searched(contest, plan, losses, bar=1.5):
    """Which trials a search makes, given losses by variant."""
    rows = []

    def attempt(variant, changes):
        loss = bar if variant == "nanoGPT" else losses(variant, changes)
        rows.append({"variant": variant, "changes": changes, "loss_256": loss, "loss_own": loss, "best_loss": bar})
        return rows[-1]

    contest.search(attempt, plan, rows)
    return rows


PLAN = {"flags": {}, "ours": {"batch_size": 4}, "stages": [[{"dropout": 0.2}]],
        "short": [{"max_iters": 10}, {"max_iters": 20}, {"max_iters": 30}, {"max_iters": 40}],
        "long": [{"block_size": 64}, {"block_size": 128}]}  # fmt: skip


def test_the_short_one_takes_the_fewest_steps_that_are_safely_below_nanogpts_best(contest):
    def losses(variant, changes):
        if variant == contest.SHORT:
            return {10: 1.7, 20: 1.495, 30: 1.485, 40: 1.4}[changes["max_iters"]]
        return 1.6 - 0.1 * ("dropout" in changes) - 0.001 * changes.get("block_size", 0)

    rows = searched(contest, PLAN, losses)
    assert [row["changes"].get("max_iters") for row in rows if row["variant"] == contest.SHORT] == [10, 20, 30]
    best = {"batch_size": 4, "dropout": 0.2}
    assert contest.chosen(rows, PLAN) == {"ours": best, contest.SHORT: {**best, "max_iters": 30},
                                          contest.LONG: {**best, "block_size": 128}}  # fmt: skip


def test_what_diverged_is_never_chosen_and_what_was_not_tried_comes_from_the_plan(contest):
    rows = searched(contest, {**PLAN, "flags": None}, lambda variant, changes: None if "dropout" in changes else 1.6)
    assert not [row for row in rows if row["variant"] in ("nanoGPT", contest.SHORT)]  # no bar without nanoGPT
    found = contest.chosen(rows, PLAN)
    assert found["ours"] == {"batch_size": 4} and found[contest.SHORT] == {"batch_size": 4, "max_iters": 30}
    rows = searched(contest, PLAN, lambda variant, changes: 1.6 - changes.get("max_iters", 0) / 1_000)
    assert contest.chosen(rows, PLAN)[contest.SHORT]["max_iters"] == 40  # none is safely below: the best there is
    assert contest.chosen([], PLAN)[contest.LONG] == {"batch_size": 4, "block_size": 64}


def toy(contest, **changes):
    """The plan of a dry run, smaller still."""
    return {**contest.DRY, "corpus": "playhouse", "seeds": {"nanoGPT": [0, 1], "ours": [0, 1]}, **changes}


BASE = {"device": "cpu", "name": "CPU", "roof": None, "peak": None, "threads": 1, "copy": "here"}


def row_of(variant, seed=0, **changes):
    """A row as the contest keeps it."""
    losses = {f"{part}_{column}": 1.5 + seed / 10 for part in ("loss", "shrew", "tempest")
              for column in ("256", "own", "full")}  # fmt: skip
    return {"variant": variant, "seed": seed, "parameters": 10_646_784, "block_size": 256, "steps": 100,
            "tokens_per_second": 2_000_000, "utilisation": 0.25, "memory_mib": 4_000, "seconds": 30.0,
            "seconds_all_in": 80.0, "seconds_to_target": 12.0, "seconds_to_target_all_in": 60.0, "best_loss": 1.46,
            **losses, **changes}  # fmt: skip


def measurement():
    """What the process of a contestant leaves."""
    return {name: value for name, value in row_of("").items() if name not in ("variant", "seed")}


def test_the_search_stops_when_its_minutes_are_over_and_goes_on(contest, kept, monkeypatch, capsys):
    clock, calls = SimpleNamespace(now=0.0), []

    def contend(job):
        assert job["tuning"]  # never the validation text
        clock.now += 50
        calls.append(job)
        if len(calls) == 2:
            raise FloatingPointError("training broke down")
        return measurement()

    monkeypatch.setattr(contest.gpu_contestants, "contend", contend)
    monkeypatch.setattr(contest, "measure", lambda job, program: contend(job))
    monkeypatch.setattr(contest, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now))
    contest.tune(BASE, toy(contest), "gpu/tuning", minutes=3)
    assert "goes on" in capsys.readouterr().out
    found = contest.record.stored("gpu/tuning")
    assert not found["finished"] and [row["loss_256"] for row in found["rows"]] == [1.5, None, 1.5, 1.5]
    contest.tune(BASE, toy(contest), "gpu/tuning", minutes=30)
    found = contest.record.stored("gpu/tuning")
    tried = {(row["variant"], json.dumps(row["changes"])) for row in found["rows"]}
    assert found["finished"] and len(tried) == len(found["rows"]) == len(calls)  # nothing twice
    assert found["chosen"]["ours"] == contest.DRY["ours"]  # the change diverged
    assert {row["scored"] for row in found["rows"]} == {"tuning block"}


def test_all_take_turns_and_an_interrupted_contest_goes_on(contest, kept, monkeypatch, capsys):
    calls, plan = [], toy(contest)

    def measured(job, program):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measurement()

    monkeypatch.setattr(contest, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        contest.compete(BASE, plan, "gpu", 9)
    assert "not finished" in capsys.readouterr().out
    assert len(contest.record.stored("gpu")["rows"]) == 3
    contest.compete(BASE, plan, "gpu", 9)
    ours = ["ours", contest.SHORT, contest.LONG]
    rows = contest.record.stored("gpu")["rows"]
    wanted = [("nanoGPT", 0), *((v, s) for s in (0, 1) for v in ours), ("nanoGPT", 1)]
    assert [(row["variant"], row["seed"]) for row in rows] == wanted and len(calls) == len(wanted) + 1
    assert calls[0]["flags"] == plan["flags"] and calls[2]["changes"]["max_iters"] == plan["short"][1]["max_iters"]
    assert {row["scored"] for row in rows} == {"validation text"}
    contest.compete(BASE, {**plan, "ours": {**plan["ours"], "max_iters": 9}}, "gpu", 9)
    assert len(calls) == 2 * len(wanted) + 1  # rows of other settings are not gone on with


def test_nothing_is_begun_that_would_end_too_late(contest, kept, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)

    def measured(job, program):
        clock.now += 200 if job["kind"] == "nanogpt" else 30
        return measurement()

    monkeypatch.setattr(contest, "measure", measured)
    monkeypatch.setattr(contest, "time", SimpleNamespace(monotonic=lambda: clock.now, strftime=lambda _: "now"))
    contest.compete(BASE, toy(contest), "gpu", minutes=9)
    assert clock.now == 200 + 6 * 30 and "no time is left for nanoGPT with seed 1" in capsys.readouterr().out
    contest.compete(BASE, toy(contest), "gpu", minutes=9)
    assert len(contest.record.stored("gpu")["rows"]) == 8


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_table_is_made_of_the_rows(contest):
    rows = [row_of("nanoGPT"), row_of("ours", 0), row_of("ours", 1, seconds_to_target=None, memory_mib=None)]
    lines = contest.table(rows).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1 and len({line.count("|") for line in lines[5:]}) == 1
    assert "| nanoGPT | 1 | 10,646,784 | 256 | 100 | 2,000,000 | 0.250 | 4,000 | 30.0 | 80.0 | 12.00 |" in lines[2]
    assert "| 4,000 (1 of 2) |" in lines[3] and "| 12.00 (1 of 2) |" in lines[3]
    assert "| 1.550 ± 0.050 |" in lines[-1]
    never = contest.table([row_of("ours", seconds_to_target=None, utilisation=None)]).splitlines()[2]
    assert "| never |" in never and "| – |" in never


def test_the_aims_are_judged_and_what_is_not_measured_is_open(contest):
    rows = [row_of("nanoGPT"), row_of("ours", loss_256=1.43), row_of(contest.LONG, loss_own=1.42),
            row_of(contest.SHORT, seconds_to_target=2.4, seconds_to_target_all_in=20.0)]  # fmt: skip
    said = contest.aims(rows, [{"ratio": 5.5}]).splitlines()
    assert [line.split()[0] for line in said] == ["met", "met", "met", "met", "missed", "met"]
    late = [*rows[:3], row_of(contest.SHORT, seconds_to_target=2.5, seconds_to_target_all_in=20.1)]
    assert [line.split()[0] for line in contest.aims(late, [{"ratio": 4.9}]).splitlines()][:2] == ["missed", "missed"]
    assert contest.aims(late, [{"ratio": 4.9}]).splitlines()[-1].startswith("missed")
    never = [*rows, row_of(contest.SHORT, seed=1, seconds_to_target=None)]
    assert contest.aims(never, []).splitlines()[0].startswith("missed")  # one seed of ours never came there
    never = [row_of("nanoGPT", seconds_to_target=None), *rows[1:]]
    assert contest.aims(never, []).splitlines()[0].startswith("open")
    assert {line.split()[0] for line in contest.aims([], []).splitlines()} == {"open"}


def test_the_table_stands_in_the_readme(contest):
    readme = "before\n<!-- cpu -->\nleft alone\n<!-- /cpu -->\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n"
    new = contest.record.with_table(readme, "gpu", "| new |")
    assert "| new |" in new and "old" not in new and "left alone" in new
    assert contest.record.with_table(new, "gpu", "| new |") == new
    with pytest.raises(ValueError, match="<!-- gpu -->"):
        contest.record.with_table("nothing\n", "gpu", "| new |")


def call(module, monkeypatch, capsys, *words):
    """A program by its command line: what it printed, and whether it ended well."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *words])
    died = None
    try:
        module.main()
    except SystemExit as error:
        died = error.code
    printed = capsys.readouterr()
    return printed.out + printed.err + str(died or ""), not died


def test_what_is_missing_is_said_in_words(contest, steps, kept, monkeypatch, capsys):
    said, well = call(contest, monkeypatch, capsys, "--table")
    assert not well and "nothing is measured yet" in said
    if not torch.cuda.is_available():
        said, well = call(contest, monkeypatch, capsys, "--nanogpt", str(kept))
        assert not well and "not to be had on this machine" in said
        said, well = call(steps, monkeypatch, capsys)
        assert not well and "--dry" in said
    said, well = call(contest, monkeypatch, capsys, "--nanogpt", str(kept), "--dry", str(kept))
    assert not well and "train.py" in said  # there is no checkout
    (kept / "train.py").write_text("something else")
    said, well = call(contest, monkeypatch, capsys, "--nanogpt", str(kept), "--dry", str(kept))
    assert not well and "3adf61e" in said


# --- dry runs ---------------------------------------------------------------------------------------------------------


def in_this_process(contest):
    """What trains a contestant without a process of its own, which takes seconds to import PyTorch."""
    fill = {"seed": 0, "tuning": False}
    return lambda job, program: contest.gpu_contestants.contend({**fill, **job, "began": 0.0})


def test_the_whole_path_of_the_contest_runs_dry(contest, kept, monkeypatch, capsys):
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    monkeypatch.setattr(contest, "measure", in_this_process(contest))
    said, well = call(contest, monkeypatch, capsys, "--dry", str(kept / "dry"))
    assert well and not (kept / "results").exists()  # a dry run is no result
    found, search = (check.result(name, kept / "dry") for name in ("gpu", "gpu/tuning"))
    assert found["dry"] and search["dry"] and search["finished"] and found["device"] == "CPU"
    ours = ["ours", contest.SHORT, contest.LONG]
    assert [(row["variant"], row["seed"]) for row in found["rows"]] == [(v, s) for s in (0, 1) for v in ours]
    assert len({row["call"] for row in found["rows"]}) == 1
    assert {row["block_size"] for row in found["rows"]} == {32, 64}
    for row in found["rows"]:
        assert row["curve"][-1][:2] == [row["steps"], row["seconds"]] and math.isfinite(row["loss_full"])
    assert said.count("| ours |") == 2 and "open" in said


def test_the_steps_of_speed_are_each_one_step(steps):
    on_gpu, on_cpu = steps.ways(torch.device("cuda")), steps.ways(CPU)
    assert list(on_gpu) == list(steps.SPEED) and set(on_cpu) < set(on_gpu)
    assert on_gpu["float32"] == steps.PLAIN == on_cpu["float32"]
    for (_, before), (name, after) in itertools.pairwise(on_gpu.items()):
        differ = {switch for switch in after if after[switch] != before[switch]}
        assert differ == set(steps.SPEED[name][0])
    assert on_gpu["CUDA graph"]["graph"] and not on_gpu["CUDA graph"]["compile"]
    assert not any(way["graph"] or way["compile"] or way["tf32"] for way in on_cpu.values())


def test_the_ways_draw_the_same_batches_and_end_at_the_same_loss(steps):
    ids, losses = torch.randint(65, (2_000,), generator=torch.Generator().manual_seed(0)), {}
    for name in ("float32", "text on the GPU", "fused AdamW"):
        way = {**steps.ways(CPU)[name], "precision": "float32"}
        trainer = steps.trainer_of(way, ids, {**TINY, "dropout": 0.0}, CPU)
        losses[name] = [trainer.update() for _ in range(4)]
        assert isinstance(trainer, steps.FromTheHost) != way["resident"]
    for found in losses.values():
        assert found == pytest.approx(losses["float32"], abs=1e-4)


@pytest.fixture(scope="module")
def dry_steps(steps, tmp_path_factory):
    """The rows of a dry run, even smaller."""
    folder = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_CORPUS", "playhouse")
        patch.setattr(steps, "DRY", {**steps.DRY, "seeds": [0], "rounds": 2})
        patch.setattr("sys.argv", ["gpu_steps.py", "--dry", str(folder)])
        steps.main()
    return check.result("gpu_steps", folder)


def of_study(found, study):
    return [row for row in found["rows"] if row["study"] == study]


def test_the_steps_run_dry(steps, dry_steps):
    assert dry_steps["dry"] and dry_steps["device"] == "CPU"
    assert list(dry_steps["steps_of_speed"]) == list(steps.ways(CPU))
    speeds = of_study(dry_steps, "speed")
    assert [(row["round"], row["variant"]) for row in speeds] == [(n, v) for n in (0, 1) for v in steps.ways(CPU)]
    sizes, batch = dry_steps["sizes"], dry_steps["batch_size"]
    for row in speeds:
        rate = 1e3 * batch * sizes["block_size"] / row["milliseconds_per_step"]
        assert row["tokens_per_second"] == pytest.approx(rate, rel=1e-2) and row["start_seconds"] > 0
    lines = steps.table(dry_steps["rows"]).splitlines()
    assert len(lines) == 2 + len(steps.ways(CPU)) and "| 1.0 |" in lines[2]
    assert {row["batch_size"] for row in of_study(dry_steps, "memory")} == set(steps.DRY["batches"])


def test_float16_is_looked_at_in_all_ways(steps, dry_steps):
    rows = {row["variant"]: row for row in of_study(dry_steps, "precision")}
    assert set(rows) == {*steps.FORMATS, *steps.MORE}
    assert rows["bfloat16"]["loss"] == pytest.approx(rows["float32"]["loss"], abs=0.1)
    assert rows["float32"]["loss"] < rows["float32"]["curve"][0][1]
    broken = rows["all in float16"]
    assert broken["loss"] is None and None in [loss for _, loss in broken["curve"]]


def test_a_gradient_has_as_many_numbers_in_every_format(dry_steps):
    rows = {row["variant"]: row for row in of_study(dry_steps, "gradients")}
    for row in rows.values():
        assert row["zero"] + sum(row["shares"]) == pytest.approx(1, abs=1e-4)
        assert row["exponents"] == sorted(row["exponents"])
    assert rows["float32"]["error"] == 0 < rows["float16"]["error"] < rows["bfloat16"]["error"] < 0.1
    assert rows["float16"]["zero"] >= rows["bfloat16"]["zero"]  # small ones vanish, if any are as small


def test_points_of_the_roofline_are_products_and_copies(dry_steps):
    for row in of_study(dry_steps, "products"):
        operations = 2 * row["m"] * row["k"] * row["n"]
        assert row["flops_per_second"] == pytest.approx(operations / row["seconds"])
        size = 2 if row["precision"] == "bfloat16" else 4
        assert row["intensity"] == pytest.approx(gpu.intensity(row["m"], row["n"], row["k"], size))
    [copy] = of_study(dry_steps, "bandwidth")
    assert copy["bytes_per_second"] == pytest.approx(copy["bytes"] / copy["seconds"])


def test_the_filmed_run_runs_dry_and_its_model_is_whole(contest, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    with program("gpu_run") as film:
        said, well = call(film, monkeypatch, capsys, "--dry", str(tmp_path))
        assert well, said
        said, well = call(film, monkeypatch, capsys, "--dry", str(tmp_path))
        assert not well and "is there already" in said
    found = check.result("gpu_run", tmp_path)
    model, tokenizer, about = checkpoints.load_model(tmp_path / "models" / "shakespeare-gpu")
    assert [row["step"] for row in found["rows"]] == [0, 10, 20]
    assert all(len(row["sample"]) == 40 for row in found["rows"]) and found["rows"][0]["train_loss"] is None
    assert found["rows"][0]["loss"] == pytest.approx(math.log(65), abs=0.01)
    assert found["rows"][-1]["loss"] < found["rows"][0]["loss"]
    ids = tokenizer.encode(data.split(data.load_corpus("playhouse"))[1])
    assert training.evaluate(model, ids) == pytest.approx(found["loss"], abs=1e-4) == about["validation_loss"]
    assert found["parameters"] == model.n_parameters and len(found["losses"]) == 2
    assert "gpu_run.py --dry" in json.dumps(about["commands"])


def test_a_file_that_is_too_large_is_refused(contest, steps, tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    with program("gpu_run") as film:
        monkeypatch.setattr(film, "LARGEST", 1_000)
        with pytest.raises(AssertionError, match="above 16 MB"):
            film.film(film.TINY, tmp_path / "model", str(tmp_path / "gpu_run"), dry=True)
    assert not (tmp_path / "model").exists()


class Writer(nn.Module):
    """Writes as nanoGPT does: reads everything again for each character."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def generate(self, ids, length, temperature):
        for _ in range(length):
            chances = (self.model(ids[:, -32:])[:, -1] / temperature).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], dim=1)
        return ids


def test_writing_is_compared_with_the_faster_of_nanogpts_two_ways(contest, steps):
    model = tiny_gpt().eval()
    with program("gpu_generation", "generation") as writing:
        rows = writing.measure(Writer(model), model, rounds=2)
    assert [(row["round"], row["stretch"]) for row in rows] == [(n, s) for n in (1, 2) for s in ("growing", "full")]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / max(row["nanogpt"], row["nanogpt_bfloat16"]), rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_ours_and_the_steps_run_on_a_gpu(gpu_contestants, steps, tmp_path, monkeypatch):
    job = {**JOB, "device": "cuda", "peak": 1e14, "began": gpu_contestants.time.perf_counter()}
    row = gpu_contestants.contend(job)
    assert row["memory_mib"] > 0 and 0 <= row["utilisation"] < 1 and row["curve"][-1][0] == TINY["max_iters"]
    monkeypatch.setenv("SLM_CORPUS", "playhouse")
    plan = {**steps.DRY, "sides": [64], "seeds": [0], "precision_steps": 20}
    rows = steps.measure(plan, torch.device("cuda"), str(tmp_path / "gpu_steps"))
    assert {row["variant"] for row in rows if row["study"] == "speed"} == set(steps.SPEED)
    assert all(row["memory_mib"] > 0 for row in rows if row["study"] == "speed")


def test_the_log_names_programs_that_are_there():
    root = Path(__file__).parents[1]
    log = (root / "results" / "gpu" / "LOG.md").read_text(encoding="utf-8")
    named = {word for word in log.replace("`", " ").split() if word.startswith("benchmarks/")}
    assert len(named) == 4 and all((root / name).is_file() for name in named)
