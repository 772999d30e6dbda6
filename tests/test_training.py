"""The loop against one written out with torch, the evaluator against its definition, and stopping at any moment."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from slm_lib import training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer, draw_batch
from slm_lib.training import Trainer, TrainingConfig

TOKENIZER = CharTokenizer("\nabcd")
TEXT = "".join("abcd"[(i * i + i // 7) % 4] for i in range(600))
IDS = TOKENIZER.encode(TEXT)


def small_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 5, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig.modern(**{**sizes, **changes}))


def test_training_equals_the_loop_written_out():
    config = TrainingConfig(batch_size=4, max_iters=30, learning_rate=0.01, warmup_iters=5, grad_clip=0.5)
    mine, theirs = small_model(), small_model()
    history = training.train(mine, IDS, config, progress=False)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                  lr=1.0, betas=(0.9, 0.95))  # fmt: skip
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(30):
        x, y = draw_batch(IDS, 4, 8, generator)
        loss = F.cross_entropy(theirs(x).view(-1, 5), y.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in theirs.parameters()))
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min((step + 1) / 6, (30 - step) / 25)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-4) and losses[-1] < losses[0] - 0.1


def test_the_learning_rate_climbs_falls_and_ends_near_zero():
    config = TrainingConfig(max_iters=100, warmup_iters=10, learning_rate=0.02)
    rates = [training.learning_rate_at(step, config) for step in range(101)]
    assert max(rates) == pytest.approx(0.02) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.02 / 50 and rates[100] == 0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 100])
@pytest.mark.parametrize("at_once", [8, 24, 16_384])
def test_evaluation_scores_every_token_once_from_disjoint_windows(monkeypatch, length, at_once):
    monkeypatch.setattr(training, "TOKENS_AT_ONCE", at_once)
    model, ids = small_model(), IDS[:length]
    torch.nn.init.normal_(model.head.weight)
    expected, read = [], [0, *ids.tolist()]
    for i in range(length):  # token i is predicted from its own window, which begins at a multiple of 8
        window = torch.tensor([read[i // 8 * 8 : i + 1]])
        expected.append(-F.log_softmax(model(window)[0, -1], -1)[ids[i]].item())
    assert training.surprisal(model, ids).tolist() == pytest.approx(expected, abs=1e-5)
    assert training.evaluate(model, ids) == pytest.approx(sum(expected) / length, abs=1e-5)


def test_evaluation_keeps_the_mode_and_refuses_an_empty_text():
    model = small_model(dropout=0.5).train()
    assert training.evaluate(model, IDS) == training.evaluate(model, IDS) and model.training
    with pytest.raises(ValueError, match="the text is empty"):
        training.evaluate(model, IDS[:0])


def test_the_callback_sees_step_0_each_interval_and_the_end_once_and_can_stop():
    config, seen = TrainingConfig(batch_size=2, max_iters=7, eval_interval=3), []
    training.train(small_model(), IDS, config, lambda trainer: seen.append(trainer.step), progress=False)
    assert seen == [0, 3, 6, 7]
    history = training.train(small_model(), IDS, config, lambda trainer: trainer.step == 3, progress=False)
    assert len(history.losses) == 3 and not history.interrupted


def test_the_stop_button_lets_the_step_end_and_leaves_all_usable():
    model = small_model()
    trainer = Trainer(model, IDS, TrainingConfig(batch_size=2, max_iters=1_000_000))
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    history = trainer.run(progress=False)
    assert history.interrupted and 0 < trainer.step < 1_000_000 and not model.training
    assert signal.getsignal(signal.SIGINT) is before
    stopped_at, loss = trainer.step, training.evaluate(model, IDS)
    trainer.update()
    assert trainer.step == stopped_at + 1 and math.isfinite(loss)


CHILD = textwrap.dedent("""
    import sys, torch
    sys.path.insert(0, {tests!r})
    from test_training import IDS, TOKENIZER, TrainingConfig, Trainer, small_model
    torch.set_num_threads(1)
    config = TrainingConfig(batch_size=4, max_iters=200, eval_interval=20, seed=3)
    trainer = Trainer(small_model(dropout=0.1), IDS, config)
    def save(trainer):
        if trainer.step == {save_at}:
            trainer.save({folder!r}, TOKENIZER)
            print("saved", flush=True)
        if trainer.step == {save_at} + 20:
            print("beyond", flush=True)
    trainer.run(save, progress=False)
    trainer.save({folder!r} + "-end", TOKENIZER)
""")


def child(folder, save_at: int) -> subprocess.Popen:
    program = CHILD.format(tests=os.path.dirname(__file__), folder=str(folder), save_at=save_at)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_kill_and_resume_equals_200_steps_straight_bit_for_bit(tmp_path):
    straight = child(tmp_path / "straight", save_at=0)
    assert straight.wait(120) == 0
    killed = child(tmp_path / "killed", save_at=100)
    assert killed.stdout.readline() == "saved\n" and killed.stdout.readline() == "beyond\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = Trainer.resume(tmp_path / "killed", IDS)
        assert resumed.step == 100
        resumed.run(progress=False)
    finally:
        torch.set_num_threads(threads)
    expected = Trainer.resume(tmp_path / "straight-end", IDS)
    assert resumed.history.losses == expected.history.losses and len(expected.history.losses) == 200
    for mine, theirs in zip(resumed.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(resumed.generator.get_state(), expected.generator.get_state())


def test_a_model_without_training_state_cannot_be_resumed(tmp_path):
    from slm_lib import checkpoints

    folder = checkpoints.save_model(tmp_path / "model", small_model(), TOKENIZER, {})
    with pytest.raises(ValueError, match="no state of training"):
        Trainer.resume(folder, IDS)


def test_a_loss_that_is_not_finite_stops_with_the_step():
    model = small_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: try a lower learning_rate"):
        training.train(model, IDS, TrainingConfig(max_iters=3), progress=False)


@pytest.mark.parametrize("wrong", [
    {"batch_size": 0}, {"max_iters": -1}, {"learning_rate": 0.0}, {"learning_rate": 1e9}, {"learning_rate": math.nan},
    {"weight_decay": -0.1}, {"warmup_iters": -1}, {"beta1": 1.0}, {"beta2": -0.1}, {"grad_clip": 0.0},
    {"eval_interval": 0}, {"batch_size": 2.5}, {"seed": -1}, {"learning_rate": "fast"},
])  # fmt: skip
def test_a_setting_that_cannot_train_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_a_text_shorter_than_a_block_is_refused_before_training():
    with pytest.raises(ValueError, match="block_size 8 does not fit into a text of 8 tokens"):
        Trainer(small_model(), IDS[:8], TrainingConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="'cuda' is not to be had on this machine"):
        training.choose_device("cuda")
    assert training.choose_device("auto").type in ("cpu", "mps") and training.choose_device("cpu").type == "cpu"


def test_progress_of_training_is_measured():
    begin = time.perf_counter()
    history = training.train(small_model(), IDS, TrainingConfig(max_iters=5), progress=False)
    assert 0 < history.seconds <= time.perf_counter() - begin and history.steps == [0, 1, 2, 3, 4]
