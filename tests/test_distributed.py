"""Two processes train what one trains: the same losses and weights, and they stop, break down and save as one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from slm_lib import checkpoints, runs
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.distributed import Ranks
from slm_lib.training import Trainer, TrainingConfig

IDS = torch.tensor([(i * i + i // 7) % 5 for i in range(600)])
CASES = {"plain": {}, "accumulated": {"gradient_accumulation": 3}, "cosine": {"schedule": "cosine", "grad_clip": 0.05},
         "muon": {"optimizer": "muon"}}  # fmt: skip
TINY = ["--corpus", "mine.txt", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--batch-size", "4", "--device", "cpu", "--precision", "float32"]  # fmt: skip


def double_model(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=16)).double()


def trainer(seed: int = 0, **changes) -> Trainer:
    settings = {"batch_size": 12, "max_iters": 20, "warmup_iters": 3, "learning_rate": 0.01, "eval_interval": 5}
    return Trainer(double_model(seed), IDS, TrainingConfig(**{**settings, **changes}))


WORKER = textwrap.dedent("""
    import json, math, os, signal, sys, torch, torch.distributed as dist
    sys.path.insert(0, {tests!r})
    from test_distributed import CASES, trainer
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {{}}

    for name, changes in CASES.items():  # the second process starts from other weights, which must not count
        run, called = trainer(seed=rank, **changes), []
        run.run(lambda run: called.append(run.step), progress=False)
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        found[name] = [run.history.losses, run.history.gradient_norms, weights.tolist(), called]

    run = trainer(max_iters=1000, eval_interval=1)  # the first process alone wishes to stop
    run.run(lambda run: run.step == 4, progress=False)
    found["wish"] = [run.step, run.history.interrupted]

    run = trainer(max_iters=1000)  # the second process alone is interrupted
    update = run.update
    def interrupted():
        if rank == 1 and run.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return update()
    run.update = interrupted
    run.run(progress=False)
    found["interrupt"] = [run.step, run.history.interrupted, signal.getsignal(signal.SIGINT) is signal.SIG_IGN]

    run = trainer()  # the weights of both break, and an output of the second process alone
    for name in ("weight", "output"):
        if name == "weight":
            run.model.head.weight.data[0, 0] = math.nan
        else:
            run = trainer()
            if rank == 1:
                run.model.norm.register_forward_hook(lambda module, inputs, output: output * math.inf)
        try:
            run.run(progress=False)
        except FloatingPointError as error:
            found[name] = str(error)

    try:
        trainer(batch_size=9)
    except ValueError as error:
        found["indivisible"] = str(error)

    run = trainer(max_iters=3)  # each process drops other activations
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    run.run(progress=False)
    found["dropped"] = torch.rand(3).tolist()
    json.dump(found, open({out!r} + str(rank), "w"))
    dist.barrier()
    dist.destroy_process_group()
""")


@contextlib.contextmanager
def torchrun(*words):
    """Two processes under way; none outlives the test."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    running = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        yield running
    finally:
        running.terminate()  # nothing where it has ended; torchrun ends its processes, at last with a kill
        running.wait(60)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, in one start of both."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "worker.py").write_text(WORKER.format(tests=os.path.dirname(__file__), out=str(place / "rank")))
    with torchrun(str(place / "worker.py")) as running:
        _, errors = running.communicate(timeout=150)
    assert running.returncode == 0, errors
    return [json.loads((place / f"rank{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_to_nine_digits(found, name):
    alone, threads = trainer(**CASES[name]), torch.get_num_threads()
    torch.set_num_threads(1)
    alone.run(progress=False)
    torch.set_num_threads(threads)
    weights = torch.cat([p.detach().flatten() for p in alone.model.parameters()])
    for rank in (0, 1):
        losses, norms, theirs, _ = found[rank][name]
        assert losses == pytest.approx(alone.history.losses, abs=1e-9, rel=0) and len(losses) == 20
        assert norms == pytest.approx(alone.history.gradient_norms, abs=1e-9, rel=0)
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), weights, atol=1e-9, rtol=0)
    assert found[0][name][:3] == found[1][name][:3]


def test_only_the_first_process_calls_the_callback(found):
    assert found[0]["plain"][3] == [0, 5, 10, 15, 20] and found[1]["plain"][3] == []


def test_all_stop_together_whoever_is_asked(found):
    assert [found[rank]["wish"] for rank in (0, 1)] == [[4, False]] * 2
    assert [found[rank]["interrupt"][:2] for rank in (0, 1)] == [[8, True]] * 2
    assert [found[rank]["interrupt"][2] for rank in (0, 1)] == [False, True]  # it stays deaf while the first saves


def test_all_break_down_together(found):
    told = "the weight called head.weight is no longer finite (loss nan) at step 0"
    assert all(told in found[rank]["weight"] for rank in (0, 1))
    assert "the loss is no longer finite (loss nan) at step 0" in found[0]["output"]
    assert "the output of norm is no longer finite (loss nan) at step 0" in found[1]["output"]


def test_a_batch_that_does_not_divide_is_refused(found):
    told = "batch_size 9 does not divide into 2 processes x gradient_accumulation 1: take a multiple"
    assert all(told in found[rank]["indivisible"] for rank in (0, 1))


def test_processes_drop_other_activations(found):
    assert found[0]["dropped"] != found[1]["dropped"]


def test_one_process_alone_is_all_there_is():
    ranks, batch = Ranks(), torch.arange(6)
    model = double_model(0)
    assert ranks.join(model) is model and torch.equal(ranks.rows(batch), batch)
    assert ranks.mean(torch.tensor(2.5)) == 2.5 and ranks.any(True) and not ranks.any(False)
    with ranks.apart(model):
        pass


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("Now is the winter of our discontent\nMade glorious summer;\n" * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def slm(monkeypatch, *words) -> None:
    from slm_lib.__main__ import main

    monkeypatch.setattr("sys.argv", ["slm_lib", *words])
    main()


def test_the_command_line_under_torchrun(place, monkeypatch, capsys):
    words = ["train", *TINY, "--max-iters", "12", "--eval-interval", "5"]
    with torchrun("-m", "slm_lib", *words, "--gradient-accumulation", "2", "--out", "two") as running:
        slm(monkeypatch, *words, "--out", "one")
        capsys.readouterr()
        output, errors = running.communicate(timeout=150)
    assert running.returncode == 0, errors
    assert output.count("corpus: mine") == output.count("loss on the whole validation text") == 1
    assert "on 2 processes (cpu) in float32; 12 steps of 4 x 16 tokens" in output
    assert sorted(os.listdir("two")) == ["model", "step-000010", "step-000012"]
    one, two = (json.loads(checkpoints.verify(f"{folder}/step-000012")["training.json"]) for folder in ("one", "two"))
    assert two["history"]["losses"] == pytest.approx(one["history"]["losses"], abs=1e-4)


def test_an_interrupt_of_torchrun_saves_once_and_one_process_can_go_on(place, monkeypatch, capsys):
    words = ["train", *TINY, "--max-iters", "100000", "--eval-interval", "50", "--out", "out"]
    with torchrun("-m", "slm_lib", *words) as running:
        deadline = time.monotonic() + 120
        while not runs.kept_checkpoints(place / "out") and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)  # torchrun hands it on to its processes, which have sessions of their own
        output, errors = running.communicate(timeout=60)
    assert output.count("stopped after step") == 1, errors
    newest = runs.kept_checkpoints(place / "out")[-1]
    assert f"{int(newest.name[5:]):,}" in output and "model" not in os.listdir("out")
    steps = str(int(newest.name[5:]) + 1)
    slm(monkeypatch, "train", "--corpus", "mine.txt", "--device", "cpu", "--resume", "out", "--max-iters", steps)
    assert "loss on the whole validation text" in capsys.readouterr().out
