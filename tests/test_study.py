"""Several processes search together, a kill loses one trial only, and nothing is chosen on the validation text."""

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState

from slm_lib import data, runs, study

TINY = ["--corpus", "mine.txt", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--batch-size", "4", "--device", "cpu"]  # fmt: skip
TUNE = ["tune", *TINY, "--max-iters", "16", "--storage", "study.log"]


def trials(storage="study.log", name="study"):
    return optuna.load_study(study_name=name, storage=study._storage(storage)).trials


def test_two_workers_share_a_study_and_a_kill_loses_one_trial_only(slm, tmp_path):
    words = [sys.executable, "-m", "slm_lib", "tune", *TINY, "--max-iters", "400", "--storage", "study.log",
             "--trials", "5", "--pruner", "none"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, survivor = (subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
                        for _ in range(2))  # fmt: skip
    try:
        mine, deadline, begun = [], time.monotonic() + 120, tmp_path / "study.log"
        while not mine and time.monotonic() < deadline:  # until the first is in the middle of a trial
            time.sleep(0.05)
            known = trials() if begun.exists() and begun.stat().st_size > 1000 else []
            mine = [trial for trial in known if trial.state == TrialState.RUNNING and trial.intermediate_values
                    and trial.user_attrs["worker"]["pid"] == killed.pid]  # fmt: skip
        killed.kill()
        killed.wait()
        output, errors = survivor.communicate(timeout=150)
    finally:
        killed.kill()
        survivor.kill()
    assert survivor.returncode == 0, errors
    states = [trial.state for trial in trials()]
    assert trials()[mine[0].number].state == TrialState.FAIL and states.count(TrialState.FAIL) == 1
    assert 5 <= states.count(TrialState.COMPLETE) <= 6 and TrialState.RUNNING not in states
    assert f"trial {mine[0].number} was lost with its worker" in output
    best = min((trial for trial in trials() if trial.value), key=lambda trial: trial.value)
    assert f"number {best.number}, {best.value:.2f} nats" in output and "python -m slm_lib train" in output


@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db", "deep/er/study.log"])
def test_a_study_goes_on_where_it_was_left_and_its_best_can_be_trained(slm, storage):
    words = [*TUNE, "--storage", storage, "--search", "learning_rate=1e-3:1e-2", "--search", "n-layer=1,2"]
    words = [word for i, word in enumerate(words) if "--n-layer" not in words[max(0, i - 1) : i + 1]]
    printed, died = slm(*words, "--trials", "2")
    assert died == "" and [line.split(":")[0] for line in printed.splitlines()[1:3]] == ["trial 0", "trial 1"]
    printed, died = slm(*words, "--trials", "3")
    assert died == "" and "trial 2: " in printed and "trial 1: " not in printed
    assert slm(*words, "--trials", "3")[0].splitlines()[1].startswith("best of 3 trials")
    command = printed.splitlines()[-1]
    assert command.startswith("python -m slm_lib train --preset shakespeare-cpu --corpus mine.txt")
    trained, died = slm(*shlex.split(command)[3:], "--out", "out")
    assert died == "" and "loss on the whole validation text" in trained


def test_the_tuning_block_is_training_text_and_the_validation_text_is_never_read(slm, monkeypatch):
    split = data.split
    texts = []

    def without_validation(corpus):
        texts.append(split(corpus))
        return texts[-1][0], None  # a None cannot be encoded, cut or measured

    monkeypatch.setattr(data, "split", without_validation)
    search = []
    monkeypatch.setattr(study.Search, "trial", lambda self, trial: search.append(self) or 1.0)
    assert slm(*TUNE, "--trials", "1")[1] == ""
    found, (train, _) = search[0], texts[0]
    fitted, held_out = found.tokenizer.decode(found.fitted), found.tokenizer.decode(found.held_out)
    assert fitted + held_out == train and len(held_out) == len(train) // 10


def test_the_loss_of_a_trial_is_that_of_the_model_on_the_tuning_block(slm, monkeypatch):
    seen = {}
    look = study.Search.look

    def spy(self, trial, trainer):
        look(self, trial, trainer)
        seen[trainer.step] = runs.training.evaluate(trainer.model, self.held_out)

    monkeypatch.setattr(study.Search, "look", spy)
    assert slm(*TUNE, "--trials", "1")[1] == ""
    assert list(seen) == [0, 2, 4, 6, 8, 10, 12, 14, 16] and trials()[0].value == seen[16]
    assert list(trials()[0].intermediate_values.values()) == [seen[step] for step in list(seen)[1:]]


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_bad_trials_are_stopped_early_and_never_the_best(slm, monkeypatch, pruner):
    losses = iter([1.0, 1.1, 1.2, 1.3, 9.0, 1.4, 8.0, 7.0])

    def pretend(self, trial):
        loss = next(losses)
        for step in range(1, 9):
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    monkeypatch.setattr(study.Search, "trial", pretend)
    printed, died = slm(*TUNE, "--trials", "8", "--pruner", pruner)
    states = [trial.state for trial in trials()]
    assert died == "" and "number 0, 1.00 nats" in printed
    assert (states[4] == states[6] == TrialState.PRUNED) == (pruner != "none")


def test_an_interrupt_ends_cleanly_and_the_same_command_goes_on(slm, monkeypatch):
    look = study.Search.look

    def interrupt(self, trial, trainer):
        look(self, trial, trainer)
        if trial.number == 1 and trainer.step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(study.Search, "look", interrupt)
        printed, died = slm(*TUNE, "--trials", "3")
    assert died == "" and "stopped; the same command goes on (1 of 3 trials are done)" in printed
    assert "best of 1 trials: number 0" in printed
    printed, died = slm(*TUNE, "--trials", "3")
    states = [trial.state for trial in trials()]
    assert states[1] == TrialState.FAIL and len(states) == 4 and "best of 3 trials" in printed


def test_the_dead_of_this_machine_are_buried_and_nobody_else(slm):
    assert slm(*TUNE, "--trials", "1")[1] == ""
    begun = optuna.load_study(study_name="study", storage=study._storage("study.log"))
    here, child = study.platform.node(), subprocess.Popen(["true"])
    child.wait()
    places = [(here, child.pid), (here, os.getppid()), ("elsewhere", child.pid), (here, os.getpid())]
    for machine, pid in places:
        begun.ask().set_user_attr("worker", {"machine": machine, "pid": pid})
    begun.ask()  # one that has not said yet who works on it
    study.bury_the_dead(begun)
    states = [trial.state.name for trial in begun.trials[1:]]
    assert states == ["FAIL", "RUNNING", "RUNNING", "FAIL", "RUNNING"]


def test_settings_that_cannot_be_trained_are_told_and_end_the_study_all_the_same(slm):
    printed, died = slm(*TUNE[:-2], "--storage", "a.log", "--trials", "2", "--search", "block_size=90000,80000",
                        "--search", "dropout=0.1,0.2")  # fmt: skip
    assert "--block-size is given and searched at once" in died
    words = [*TUNE, "--trials", "2", "--search", "warmup_iters=0,1", "--batch-size", str(10**13)]
    printed, died = slm(*words)
    assert died == "" and printed.count("the memory of this machine does not suffice: lower batch_size") == 3
    assert "no trial has come to its end; the last said: the memory" in printed


@pytest.mark.parametrize("word", [
    "learning_rate", "learning_rate=", "learning_rate=a:b", "learning_rate=2:1", "learning_rate=1:2:3", "seed=1,2",
    "speed=1:2", "n_layer=1.5,2", "schedule=linear:cosine", "schedule=step", "=1:2", "",
])  # fmt: skip
def test_a_range_that_cannot_be_read_is_told(word):
    with pytest.raises(ValueError, match="--search"):
        study.read_space([word])


def test_a_study_of_something_else_is_not_mixed_in(slm):
    assert slm(*TUNE, "--trials", "1")[1] == ""
    assert "has another fixed" in slm(*TUNE, "--trials", "2", "--learning-rate", "0.1", "--search", "dropout=0,0.1")[1]
    assert "has another search" in slm(*TUNE, "--trials", "2", "--search", "dropout=0,0.1")[1]
    with open("mine.txt", "a") as file:
        file.write("And all the clouds")
    assert "has another corpus" in slm(*TUNE, "--trials", "2")[1]
    optuna.create_study(study_name="theirs", storage=study._storage("study.log")).ask()
    assert "is not from this command" in slm(*TUNE, "--trials", "2", "--name", "theirs")[1]
    assert slm(*TUNE, "--trials", "1", "--name", "another")[1] == "" and len(trials()) == 1


def test_a_damaged_or_foreign_storage_gets_a_sentence_and_stays_as_it_is(slm, tmp_path):
    assert slm(*TUNE, "--trials", "1")[1] == ""
    whole = (tmp_path / "study.log").read_bytes()
    lines = whole.splitlines(keepends=True)
    sqlite3.connect("foreign.db").execute("create table mine (x)").connection.commit()
    (tmp_path / "folder").mkdir()
    damaged = {"cut.log": whole[:-5], "text.log": b"hello", "middle.log": lines[0] + b"{oops\n" + b"".join(lines[1:]),
               "other.log": b'{"a": 1}\n', "binary.log": bytes(range(256)) * 9,
               "list.log": lines[0] + b"[]\n" + lines[1],
               "field.log": lines[0] + b'{"op_code": 77}\n' + lines[1], "damaged.db": b"SQLite format 3\0" + b"x" * 99}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    for name in [*damaged, "foreign.db"]:
        storage = f"sqlite:///{name}" if name.endswith(".db") else name
        before = (tmp_path / name).read_bytes()
        printed, died = slm(*TUNE[:-1], storage, "--trials", "2")
        assert f"{storage} is damaged, or no storage of Optuna's" in died, (name, printed, died)
        assert (tmp_path / name).read_bytes() == before, name
    for storage in ("nodriver://x/y", "postgresql://127.0.0.1:1/x", "sqlite:////nowhere/at/all.db"):
        assert f"{storage} is damaged, or no storage" in slm(*TUNE[:-1], storage, "--trials", "2")[1]
    assert "Is a directory" in slm(*TUNE[:-1], "folder", "--trials", "2")[1]
