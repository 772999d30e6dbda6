"""The command line as a newcomer types it, in a process of its own."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

TINY = ["--corpus", "mine.txt", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--batch-size", "4", "--device", "cpu", "--out", "out"]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mine.txt").write_text("Now is the winter of our discontent\nMade glorious summer;\n" * 60)
    return tmp_path


def command(place, *words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "slm_lib", *words], cwd=place, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)  # fmt: skip


def test_train_evaluate_generate(place):
    trained = command(place, "train", *TINY, "--max-iters", "30", "--eval-interval", "10")
    assert trained.returncode == 0, trained.stderr
    assert "loss on the whole validation text" in trained.stdout and "loss" in trained.stderr
    assert sorted(p.name for p in (place / "out").iterdir()) == ["model", "step-000020", "step-000030"]
    told = command(place, "evaluate", "--model", "out/model", "--corpus", "mine.txt").stdout
    loss = told.rsplit(": ", 1)[1].strip()
    assert "nats" in loss and loss in trained.stdout  # the stored model has the loss that training reported
    written = command(place, "generate", "--model", "out/model", "--prompt", "Now", "--length", "40", "--seed", "1")
    assert written.stdout.startswith("Now") and len(written.stdout) == 44


def test_byte_pairs_are_learned_kept_and_resumed(place):
    trained = command(place, "train", *TINY, "--vocab-size", "270", "--max-iters", "20", "--eval-interval", "10")
    assert trained.returncode == 0 and "a vocabulary of 270" in trained.stdout, trained.stderr
    told = command(place, "evaluate", "--model", "out/model", "--corpus", "mine.txt").stdout.rsplit(": ", 1)[1].strip()
    nats, bits = float(told.split()[0]), float(told.split("· ")[1].split()[0])
    assert told in trained.stdout and bits < 0.95 * nats / math.log(2)  # a token holds more than one character
    (place / "out" / "model").rename(place / "first")
    resumed = command(place, "train", "--corpus", "mine.txt", "--resume", "out", "--device", "cpu")
    assert told in resumed.stdout, resumed.stderr
    written = command(place, "generate", "--model", "first", "--prompt", "Now \u263a", "--length", "9", "--seed", "1")
    assert written.stdout.startswith("Now \u263a") and written.returncode == 0


def test_ctrl_c_saves_and_resume_finishes(place):
    running = subprocess.Popen([sys.executable, "-m", "slm_lib", "train", *TINY, "--max-iters", "3000"], cwd=place,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    seen = ""
    while "/3000" not in seen:  # the progress bar is there, so an interrupt is expected; the steps take seconds
        seen += running.stderr.read(1)
        assert running.poll() is None, seen
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert "stopped after step" in output, errors
    assert not (place / "out" / "model").exists()
    resumed = command(place, "train", "--corpus", "mine.txt", "--resume", "out", "--device", "cpu")
    assert resumed.returncode == 0 and "loss on the whole validation text" in resumed.stdout, resumed.stderr
    assert (place / "out" / "model" / "model.safetensors").exists()


def test_a_run_is_not_resumed_on_another_text(place):
    assert command(place, "train", *TINY, "--max-iters", "4", "--eval-interval", "2").returncode == 0
    (place / "other.txt").write_text((place / "mine.txt").read_text() + "Now is the summer")
    failed = command(place, "train", "--resume", "out", "--corpus", "other.txt")
    assert failed.returncode != 0 and "was trained on mine, not on other" in failed.stderr


@pytest.mark.parametrize("words, told", [
    (["train", *TINY, "--n-embd", "15"], "n_embd 15 is not divisible by n_head 2"),
    (["train", *TINY, "--vocab-size", "255"], "vocab_size 255 has no room for the 256 bytes"),
    (["train", *TINY, "--learning-rate", "-1"], "learning_rate -1.0"),
    (["train", *TINY, "--block-size", "100000"], "block_size 100000 does not fit into a text"),
    (["train", "--corpus", "missing.txt"], "missing.txt"),
    (["train", "--resume", "nowhere"], "nowhere holds no whole checkpoint"),
    (["generate", "--model", "nowhere"], "nowhere holds no manifest.json"),
])  # fmt: skip
def test_mistakes_get_one_sentence_and_no_traceback(place, words, told):
    failed = command(place, *words)
    assert failed.returncode != 0 and told in failed.stderr
    assert "Traceback" not in failed.stderr and not (place / "out").exists()


def test_help_names_every_command_and_setting(place):
    assert all(word in command(place, "--help").stdout for word in ("train", "evaluate", "generate", "download"))
    told = command(place, "train", "--help").stdout
    assert all(word in told for word in ("--n-layer", "--learning-rate", "--resume", "--max-iters", "--corpus"))


def test_importing_the_package_is_light():
    heavy = ("matplotlib", "ipywidgets", "IPython", "optuna", "sqlalchemy")
    program = f"import sys, slm_lib.__main__; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
