"""A run goes on from its checkpoints, with other settings too, and whatever ends it, the last good one stays."""

import json
import os
import signal

import pytest
import torch

from slm_lib import checkpoints, runs
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.settings import TrainingConfig

TINY = ["--corpus", "mine.txt", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--batch-size", "4", "--device", "cpu", "--out", "out", "--eval-interval", "3"]  # fmt: skip
RESUME = ["--corpus", "mine.txt", "--device", "cpu", "--resume", "out"]
WILD = ["--learning-rate", "10", "--weight-decay", "10", "--warmup-iters", "0", "--schedule", "constant"]


def folders(place="out"):
    return sorted(os.listdir(place))


def test_a_training_that_breaks_down_says_where_and_goes_on_from_the_last_good_checkpoint(slm):
    _, died = slm("train", *TINY, *WILD, "--max-iters", "40")
    assert "training broke down: the " in died and "is no longer finite" in died and "at step " in died
    assert "python -m slm_lib train --resume out --learning-rate 3.3" in died and folders()[-1].startswith("step-")
    newest = runs.kept_checkpoints(runs.Path("out"))[-1]
    model, _, _ = checkpoints.load_model(newest)
    assert all(weight.isfinite().all() for weight in model.parameters())
    died = slm("train", *RESUME, "--max-iters", newest.name[5:])[1]
    assert "the weights have grown beyond half precision" in died and "model" not in folders()


def test_weights_that_are_not_finite_are_never_saved_and_the_run_goes_on_from_before(slm, monkeypatch):
    told, _ = slm("train", *TINY, "--max-iters", "6")
    loss = told.split("validation text of mine: ")[1].splitlines()[0]
    os.rename("out", "straight")
    update = runs.training.Trainer.update

    def poison(self):
        value = update(self)
        if self.step == 6:
            self.model.head.weight.data[0, 0] = float("inf")
        return value

    with monkeypatch.context() as patched:
        patched.setattr(runs.training.Trainer, "update", poison)
        _, died = slm("train", *TINY, "--max-iters", "6")
    assert "the weight head.weight is no longer finite after step 6: not saved; the last checkpoint is good" in died
    assert folders() == ["step-000003"]
    printed, died = slm("train", *RESUME)
    assert died == "" and loss in printed


def test_a_resumed_run_takes_new_settings_and_refuses_those_that_come_too_late(slm):
    assert slm("train", *TINY, "--max-iters", "6", "--seed", "5")[1] == ""
    runs.shutil.rmtree("out/model")
    late = ["--seed", "1", "--n-layer", "2", "--beta1", "0.5"]
    assert "--n-layer, --beta1, --seed cannot change half-way" in slm("train", *RESUME, *late)[1]
    assert "learning_rate -1.0 must lie above 0" in slm("train", *RESUME, "--learning-rate", "-1")[1]
    printed, died = slm("train", *RESUME, "--max-iters", "8", "--schedule", "cosine", "--gradient-accumulation", "2")
    assert died == "" and "8 steps" in printed
    stored = json.loads((runs.Path("out/step-000008") / "training.json").read_text())
    expected = {"max_iters": 8, "schedule": "cosine", "gradient_accumulation": 2, "seed": 5}
    assert {name: stored["config"][name] for name in expected} == expected
    assert len(stored["history"]["losses"]) == len(stored["history"]["gradient_norms"]) == 8


def test_muon_on_the_command_line_is_kept_and_cannot_change_half_way(slm):
    assert slm("train", *TINY, "--max-iters", "6", "--optimizer", "muon")[1] == ""
    runs.shutil.rmtree("out/model")
    assert "--optimizer cannot change half-way" in slm("train", *RESUME, "--optimizer", "adamw")[1]
    printed, died = slm("train", *RESUME, "--max-iters", "8")
    assert died == "" and "8 steps" in printed
    state = json.loads(checkpoints.verify("out/step-000008")["training.json"])
    assert state["config"]["optimizer"] == "muon" and state["optimizer"] == "Muon and AdamW"


def test_the_precision_that_is_fast_here_is_stored_and_stays(slm, monkeypatch):
    monkeypatch.setattr(runs, "fastest_precision", lambda device: "bfloat16")
    printed, died = slm("train", *TINY, "--max-iters", "6")
    assert died == "" and "on cpu in bfloat16; 6 steps" in printed
    monkeypatch.setattr(runs, "fastest_precision", lambda device: "float32")
    runs.shutil.rmtree("out/model")
    assert "on cpu in bfloat16; 8 steps" in slm("train", *RESUME, "--max-iters", "8")[0]
    assert json.loads(checkpoints.verify("out/step-000008")["training.json"])["config"]["precision"] == "bfloat16"
    assert "on cpu in float32;" in slm("train", *TINY, "--max-iters", "2", "--out", "b", "--precision", "float32")[0]


MINUTES = ["--minutes", "0.02", "--dropout", "0.2", "--eval-interval", "100000"]


def test_minutes_become_steps_once_and_the_run_is_that_of_so_many_steps(slm):
    printed, died = slm("train", *TINY, *MINUTES)
    assert died == "", died
    steps = int(printed.split("0.02 minutes are ")[1].split(" steps here")[0].replace(",", ""))
    assert f"; {steps:,} steps of 4 x 16 tokens" in printed and steps > 5
    assert slm("train", *TINY, *MINUTES[2:], "--max-iters", str(steps), "--out", "straight")[1] == ""
    one, other = (checkpoints.verify(f"{folder}/step-{steps:06d}") for folder in ("out", "straight"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert one[name] == other[name]
    one, other = (json.loads(files["training.json"]) for files in (one, other))
    assert one["config"] == other["config"] and one["history"]["losses"] == other["history"]["losses"]


@pytest.mark.parametrize("words, told", [
    (["--minutes", "1", "--max-iters", "5"], "--minutes and --max-iters both say when to end: leave one of the two"),
    (["--minutes", "0"], "0 minutes are no time to train in"), (["--minutes", "nan"], "nan minutes are no time"),
    (["--minutes", "-2"], "-2 minutes are no time to train in"), (["--minutes", "1e300"], "1e+300 minutes are no time"),
])  # fmt: skip
def test_minutes_that_make_no_sense_are_refused(slm, words, told):
    died = slm("train", *TINY, *words)[1]
    assert told in died and not os.path.exists("out")


def test_minutes_come_too_late_for_a_run_that_has_begun(slm):
    assert slm("train", *TINY, "--max-iters", "3")[1] == ""
    assert "--minutes cannot change half-way" in slm("train", *RESUME, "--minutes", "1")[1]


def clocked(monkeypatch, first, others):
    """Trainers whose steps take as long as is said, by their own account."""
    def update(self):
        self.history.losses.append(1.0)
        passed.append(first if self.step == 1 else others)
        return 1.0

    passed = [0.0]
    monkeypatch.setattr(runs.training.Trainer, "update", update)
    monkeypatch.setattr(runs.training.time, "perf_counter", lambda: sum(passed))
    return passed


@pytest.mark.parametrize("first, others, seconds", [
    (0.5, 0.5, 100), (20.5, 0.5, 100), (0.5, 0.5, 3), (0.01, 0.01, 10), (0.01, 0.01, 1000),
])  # fmt: skip
def test_the_steps_of_a_time_are_those_that_its_own_trials_leave(monkeypatch, first, others, seconds):
    passed = clocked(monkeypatch, first, others)
    model = GPT(GPTConfig.modern(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4))
    trainer = runs.training.Trainer(model, torch.arange(60) % 3, TrainingConfig(batch_size=2))
    weights, drawn = [p.clone() for p in model.parameters()], trainer.generator.get_state()
    steps = runs.steps_within(trainer, seconds)
    spent = sum(passed) + first + (steps - 1) * others
    assert seconds - 1.5 * others < spent < seconds + 1e-6 or (steps == 1 and seconds == 3)
    assert sum(passed[1:]) < 2 * first + 5 * others + seconds / 30  # the trials are a small part of it
    assert trainer.step == 0 and torch.equal(trainer.generator.get_state(), drawn)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_a_stop_while_the_steps_are_timed_begins_nothing(slm, monkeypatch):
    update = runs.training.Trainer.update

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(runs.training.Trainer, "update", interrupted)
    assert slm("train", *TINY, "--minutes", "1")[1] == "stopped before the training began" and not os.path.exists("out")


def test_a_finished_run_says_so_and_a_longer_one_keeps_both_models(slm):
    assert slm("train", *TINY, "--max-iters", "3")[1] == ""
    printed, died = slm("train", *RESUME)
    assert died == "" and "this training is at its end, and out/model is its model" in printed
    assert slm("train", *RESUME, "--max-iters", "6")[1] == "" and {"model", "model-2"} < set(folders())


def test_a_checkpoint_of_another_version_or_optimizer_is_refused_by_name(slm):
    assert slm("train", *TINY, "--max-iters", "3", "--optimizer", "adamw")[1] == ""
    files = checkpoints.verify("out/step-000003")
    state = json.loads(files["training.json"])
    other = {**state, "config": {k: v for k, v in state["config"].items() if k != "schedule"}}
    files["training.json"] = json.dumps(other).encode()
    checkpoints.publish("out/step-000004", files)
    assert "out/step-000004 was saved by another version of slm_lib" in slm("train", *RESUME)[1]
    files["training.json"] = json.dumps({**state, "optimizer": "Muon"}).encode()
    checkpoints.publish("out/step-000005", files)
    assert "out/step-000005 was trained with Muon, its settings make AdamW: train anew" in slm("train", *RESUME)[1]


def test_a_folder_in_use_is_not_written_into_and_leftovers_are_swept(slm):
    os.makedirs("out/.step-000003.abc.unfinished")
    assert slm("train", *TINY, "--max-iters", "6")[1] == "" and folders() == ["model", "step-000003", "step-000006"]
    assert "out is in use: go on with it by --resume out" in slm("train", *TINY)[1]
    runs.shutil.rmtree("out/model")
    os.makedirs("out/.model.abc.unfinished")
    (runs.Path("out/step-000006") / "optimizer.safetensors").write_bytes(b"damaged")
    printed, died = slm("train", *RESUME)
    assert "passed over: out/step-000006/optimizer.safetensors is missing or damaged" in printed
    assert "out/step-000006" not in died and not [name for name in folders() if name.startswith(".")]


def test_a_million_steps_do_not_change_which_checkpoint_is_the_newest(tmp_path):
    for name in ("step-999999", "step-1000000", "step-000020", "step-x", "model"):
        (tmp_path / name).mkdir()
    assert [path.name for path in runs.kept_checkpoints(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]


def test_too_little_memory_names_the_knob(slm):
    assert "lower batch_size, raise gradient_accumulation" in slm("train", *TINY, "--batch-size", str(10**13))[1]


def test_a_machine_that_cannot_compile_says_so(slm, monkeypatch):
    def broken(*inputs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    died = slm("train", *TINY, "--compile")[1]
    assert died == "slm_lib: this machine cannot compile the model (no compiler here): leave out --compile"


def test_work_that_is_meant_for_a_gpu_says_so_on_a_processor_and_begins(slm, monkeypatch):
    small = ["--corpus", "mine.txt", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--device", "cpu"]
    printed, died = slm("train", "--preset", "shakespeare-gpu", *small, "--max-iters", "2", "--out", "short")
    assert died == "" and "2 steps of 64 x 256 tokens" in printed and "hours" not in printed
    monkeypatch.setattr(runs, "LONG_WORK", 1e9)
    monkeypatch.setattr(runs.gpu, "measure_roof", lambda *choices: runs.gpu.Roof(peak=1e6, bandwidth=1.0))
    printed, died = slm("train", "--preset", "shakespeare-gpu", *small, "--max-iters", "2", "--out", "long")
    step = sum(runs.gpu.step_flops(checkpoints.load_model("long/model")[0].config, 64, "muon").values())
    assert died == "" and f"on this processor that takes {2 * step / 1e6 / 3600:.1f} hours or more" in printed
    assert slm("train", "--corpus", "mine.txt", "--device", "cpu", "--resume", "long", "--max-iters", "3")[1] == ""
    monkeypatch.setattr(runs, "LONG_WORK", 500 * step)  # beyond what is done in a moment, and in the trials before it
    printed, died = slm("train", "--preset", "shakespeare-gpu", *small, "--minutes", "0.005", "--out", "timed")
    assert died == "" and "0.005 minutes are" in printed and "hours" not in printed


def test_on_cuda_the_updates_are_captured_and_what_cannot_be_is_said(monkeypatch, capsys):
    model = GPT(GPTConfig.modern(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4))
    trainer = runs.training.Trainer(model, torch.arange(60) % 3, TrainingConfig(batch_size=2))
    trainer.device, captured = torch.device("cuda"), []
    monkeypatch.setattr(runs.gpu, "capture", captured.append)
    runs._make_ready(trainer)
    assert captured == [trainer] and capsys.readouterr().out == ""

    def refuse(trainer):
        raise ValueError("no reason")

    monkeypatch.setattr(runs.gpu, "capture", refuse)
    runs._make_ready(trainer)
    assert capsys.readouterr().out == "each operation is launched on its own: no reason\n"
