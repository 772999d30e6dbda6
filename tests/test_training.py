"""The loop against one written out with torch, the evaluator against its definition, and stopping at any moment."""

import ast
import contextlib
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from types import FunctionType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, lesson_path, notices

from slm_lib import check, checkpoints, faults, training, widgets
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.checkpoints import load_model, pack_optimizer, publish, unpack_optimizer, verify
from slm_lib.data import CharTokenizer, draw_batch
from slm_lib.training import Trainer, TrainingConfig, make_optimizer

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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_either_optimizer_is_saved_and_resumed_to_the_last_bit(tmp_path, optimizer):
    config = TrainingConfig(batch_size=4, max_iters=40, eval_interval=20, optimizer=optimizer)

    def save(trainer):
        trainer.save(tmp_path / f"{trainer.step}", TOKENIZER)

    straight = Trainer(small_model(dropout=0.1), IDS, config)
    straight.run(save, progress=False)
    resumed = Trainer.resume(tmp_path / "20", IDS)
    assert resumed.step == 20 and resumed.config == config and len(resumed.optimizer.state) > 0
    resumed.run(progress=False)
    assert resumed.history.losses == straight.history.losses
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="optimizer cannot change in the middle"):
        Trainer.resume(tmp_path / "20", IDS, optimizer="adamw")


def test_bfloat16_and_muon_on_two_threads_resume_to_the_last_bit_too(tmp_path):
    config = TrainingConfig(batch_size=16, max_iters=8, eval_interval=4, optimizer="muon", precision="bfloat16")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        straight = Trainer(small_model(block_size=32, n_embd=64, dropout=0.1), IDS, config)
        straight.run(lambda trainer: trainer.save(tmp_path / f"{trainer.step}", TOKENIZER) and None, progress=False)
        resumed = Trainer.resume(tmp_path / "4", IDS)
        resumed.run(progress=False)
    finally:
        torch.set_num_threads(threads)
    assert resumed.history.losses == straight.history.losses and len(straight.history.losses) == 8
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_optimizer_that_the_settings_do_not_build_is_saved_and_not_resumed(tmp_path):
    model = small_model()
    trainer = Trainer(model, IDS, TrainingConfig(optimizer="muon"), optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="was trained with SGD, its settings make Muon and AdamW: train anew"):
        Trainer.resume(trainer.save(tmp_path / "model", TOKENIZER), IDS)


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


# --- what a config may ask for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100, 200])
def test_every_schedule_climbs_straight_and_never_rises_again(schedule, warmup):
    config = TrainingConfig(max_iters=100, warmup_iters=warmup, learning_rate=0.02, schedule=schedule)
    rates = [training.learning_rate_at(step, config) for step in range(100)]
    top = min(warmup, 99)
    assert min(rates) >= 0 and max(rates) <= 0.02 + 1e-15
    if warmup <= 50:
        assert rates[:top] == pytest.approx([0.02 * (step + 1) / (warmup + 1) for step in range(top)], rel=1e-12)
        assert rates[top] == pytest.approx(0.02) and rates[top:] == sorted(rates[top:], reverse=True)
        half = top + (100 - warmup) // 2  # both falls cross the middle at half the way
        middle = {"linear": 0.01, "cosine": 0.01, "constant": 0.02}[schedule]
        assert rates[half] == pytest.approx(middle, rel=0.03)
    assert (rates[-1] < 0.02 / 20) == (schedule != "constant") or warmup >= 99


def written_out(model, ids, config):
    """The loop with a plain AdamW in tensors, in the precision of the model: its losses and lengths of gradients."""
    w = list(model.parameters())
    m, v = ([torch.zeros_like(p) for p in w] for _ in range(2))
    generator, losses, norms = torch.Generator().manual_seed(config.seed), [], []
    for step in range(config.max_iters):
        x, y = draw_batch(ids, config.batch_size, model.config.block_size, generator)
        loss = -model(x).log_softmax(-1).gather(-1, y[..., None]).mean()
        gradients = torch.autograd.grad(loss, w)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        rate = training.learning_rate_at(step, config)
        for i, g in enumerate(gradients):
            g = g * min(1.0, config.grad_clip / (norm + 1e-6))
            m[i] = config.beta1 * m[i] + (1 - config.beta1) * g
            v[i] = config.beta2 * v[i] + (1 - config.beta2) * g * g
            m_hat, v_hat = m[i] / (1 - config.beta1 ** (step + 1)), v[i] / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay if w[i].dim() >= 2 else 0.0
            w[i].data.mul_(1 - rate * decay).sub_(rate * m_hat / (v_hat.sqrt() + 1e-8))
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loop_by_hand_equals_the_librarys_loss_for_loss(schedule, pieces, tied):
    config = TrainingConfig(batch_size=8, max_iters=50, warmup_iters=7, learning_rate=0.01, grad_clip=0.6,
                            schedule=schedule, gradient_accumulation=pieces)  # fmt: skip
    mine, theirs = (small_model(tie_weights=tied, zero_init=not tied).double() for _ in range(2))
    losses, norms = written_out(mine, IDS, config)
    history = training.train(theirs, IDS, config, progress=False)
    assert history.losses == pytest.approx(losses, rel=1e-10)
    assert history.gradient_norms == pytest.approx(norms, rel=1e-9)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_accumulated_gradients_are_the_big_batchs(pieces):
    found = {}
    for count in (1, pieces):
        config = TrainingConfig(batch_size=6, max_iters=1, gradient_accumulation=count, grad_clip=1e9)
        trainer = Trainer(small_model(zero_init=False).double(), IDS, config)
        trainer.update()
        found[count] = [*(p.grad for p in trainer.model.parameters()), torch.tensor(trainer.history.losses).double()]
    for whole, summed in zip(found[1], found[pieces], strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)


def test_a_batch_that_does_not_divide_into_pieces_is_refused():
    with pytest.raises(ValueError, match="gradient_accumulation 4 does not cut batch_size 6"):
        TrainingConfig(batch_size=6, gradient_accumulation=4)


@pytest.mark.parametrize("wrong", [{"schedule": "wavy"}, {"precision": "float8"}, {"compile": 1}])
def test_a_choice_that_does_not_exist_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_bfloat16_changes_the_loss_a_little_and_the_weights_stay_float32():
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = small_model()
        config = TrainingConfig(batch_size=4, max_iters=20, precision=precision)
        losses[precision] = training.train(model, IDS, config, progress=False).losses
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)


def test_any_optimizer_with_torchs_interface_serves_and_gets_the_learning_rate():
    class Plain:
        def __init__(self, params):
            self.param_groups, self.rates = [{"params": list(params), "lr_scale": 0.5}], []

        def zero_grad(self, set_to_none=True):
            for p in self.param_groups[0]["params"]:
                p.grad = None

        @torch.no_grad()
        def step(self):
            self.rates.append(self.param_groups[0]["lr"])
            for p in self.param_groups[0]["params"]:
                p -= self.rates[-1] * p.grad

    model, config = small_model(), TrainingConfig(batch_size=4, max_iters=5, warmup_iters=2, learning_rate=0.1)
    trainer = Trainer(model, IDS, config, optimizer=Plain(model.parameters()))
    trainer.run(progress=False)
    expected = [0.5 * training.learning_rate_at(step, config) for step in range(5)]
    assert trainer.optimizer.rates == pytest.approx(expected)


def test_evaluation_in_double_precision_stays_double():
    model = small_model(zero_init=False).double()
    assert training.surprisal(model, IDS[:20]).dtype == torch.float64
    assert training.surprisal(model.float(), IDS[:20]).dtype == torch.float32


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------

LESSON = lesson_path("training")
LONG_WORK = re.compile(
    r"seed\) for|one_batch\(fault\) for|times_seen\(play|load_corpus\(\)|observed\(\*|Dirichlet|timed\(p|picture"
)


def short_work(source, names):
    """Run a cell; one that takes long, or reads what such a one found, only as far as it defines functions."""
    nodes = ast.parse(source).body
    definitions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    exec(compile(ast.Module(definitions, []), "lesson", "exec"), names)
    if "check.same(" in source or not LONG_WORK.search(source):
        with contextlib.suppress(*([] if "check.same(" in source else [NameError])):
            exec(source, names)
    names["plt"].close("all") if "plt" in names else None


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson, without what it trains for long."""
    names = {}
    for source in itertools.takewhile(lambda source: "subprocess.Popen" not in source, code_cells(LESSON)):
        short_work(source, names)
    return names


def off(function):
    """The same, off by a millionth, or by a letter."""

    def answer(*args, **kwargs):
        right = function(*args, **kwargs)
        return f"{right}!" if isinstance(right, str | None) else right * 1.000001

    return answer


def other_decay(model, config):
    return make_optimizer(model, replace(config, weight_decay=config.weight_decay + 0.01))


def published_with_a_wrong_manifest(folder, files):
    saved = publish(folder, files)
    (saved / checkpoints.MANIFEST).write_text(json.dumps(dict.fromkeys(files, "0" * 64)), encoding="utf-8")
    return saved


def read_with_a_bit_flipped(folder):
    return {name: content[:-1] + bytes([content[-1] ^ 1]) for name, content in verify(folder).items()}


def packed_in_half(optimizer, generators):
    state = optimizer.state_dict()
    halved = {i: {key: t / 2 for key, t in entry.items()} for i, entry in state["state"].items()}
    return pack_optimizer(SimpleNamespace(state_dict=lambda: {**state, "state": halved}), generators)


def unpacked_and_forgotten(files, optimizer):
    generators = unpack_optimizer(files, optimizer)
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    return generators


def loaded_with_a_scratch(folder):
    model, tokenizer, provenance = load_model(folder)
    model.head.weight.data[0, 0] += 1
    return model, tokenizer, provenance


# What a proof reads, and how to break it: the library's things, and torch where it stands in for them.
BREAKS = {
    "training.surprisal(": lambda: patch.object(training, "surprisal", off(training.surprisal)),
    "training.evaluate(": lambda: patch.object(training, "evaluate", off(training.evaluate)),
    "training.train(": lambda: patch.object(training, "learning_rate_at", off(training.learning_rate_at)),
    "training.learning_rate_at(": lambda: patch.object(training, "learning_rate_at", off(training.learning_rate_at)),
    "training.make_optimizer(": lambda: patch.object(training, "make_optimizer", other_decay),
    "gradient_accumulation": lambda: patch.object(Trainer, "_pieces", lambda trainer, x, y: [(x[:2], y[:2])]),
    "gradient_norms": lambda: patch.object(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.ones(())),
    "faults.first_not_finite(": lambda: patch.object(faults, "first_not_finite", off(faults.first_not_finite)),
    "checkpoints.publish(": lambda: patch.object(checkpoints, "publish", published_with_a_wrong_manifest),
    "checkpoints.verify(": lambda: patch.object(checkpoints, "verify", read_with_a_bit_flipped),
    "checkpoints.pack_optimizer(": lambda: patch.object(checkpoints, "pack_optimizer", packed_in_half),
    "checkpoints.unpack_optimizer(": lambda: patch.object(checkpoints, "unpack_optimizer", unpacked_and_forgotten),
    "checkpoints.load_model(": lambda: patch.object(checkpoints, "load_model", loaded_with_a_scratch),
    "F.cross_entropy(": lambda: patch.object(F, "cross_entropy", off(F.cross_entropy)),
    "whole, f": lambda: patch.object(torch.autograd, "grad", doubled(torch.autograd.grad)),
}


def doubled(grad):
    """Autograd that is wrong for small batches only: the pieces' gradients do not add up to the whole's."""
    return lambda loss, w: [g * (1 + 1e-6 * loss.item()) for g in grad(loss, w)]


def copied(names, folder):
    """The names, with a fresh folder to publish into, so that a proof can run twice."""
    return {**names, "folder": folder} if "folder" in names else dict(names)


def test_each_proof_fails_when_the_library_is_broken(tmp_path, capsys):
    names, caught, sources = {}, set(), code_cells(LESSON)
    last = max(i for i, source in enumerate(sources) if "check.same(" in source)
    for i, source in enumerate(sources[: last + 1]):
        if "check.same(" in source:
            read = {name for name in BREAKS if name in source}
            here = set()
            for name in read:
                with BREAKS[name]():
                    folder = tmp_path / f"{i}-{len(here)}"
                    here |= {name} if notices(source, copied(names, folder), KeyError) else set()
            assert here, f"no broken thing is noticed by this proof:\n{source}"
            caught |= here
        short_work(source, names)
    assert caught == set(BREAKS)


# --- its panels -------------------------------------------------------------------------------------------------------


def run_to_the_end(panel):
    panel.run_button.click()
    assert panel.wait(120) and panel.status.value.startswith("done") and panel.progress.value == 1, panel.status.value


def test_the_training_panel_says_the_price_trains_and_stops(lesson):
    space = {**lesson, "fit": IDS, "block": IDS[:100], "marks": {"uniform": math.log(5)}, "speed": 1e9,
             "recipe": TrainingConfig(batch_size=4, max_iters=20, learning_rate=0.01, eval_interval=10),
             "sizes": {"vocab_size": 5, "block_size": 8, "n_layer": 1, "n_head": 4, "n_embd": 16}}  # fmt: skip
    for name in ("choices", "operations", "price_tag", "train_live", "draw_run"):
        space[name] = FunctionType(lesson[name].__code__, space, argdefs=lesson[name].__defaults__)
    knobs = {"n_layer": widgets.slider(1, 6, 1), "n_embd": widgets.slider(16, 256, 16, 16)}
    knobs |= {"learning_rate": widgets.slider(1e-4, 1.0, 0.01, log=True), "steps": widgets.slider(5, 90_000, 60)}
    knobs |= {"dropout": widgets.slider(0.0, 0.5, 0.0, 0.05)}
    panel = widgets.RunPanel(
        space["train_live"], lambda result: space["draw_run"](*result), None,
        lambda **values: space["price_tag"](*space["choices"](**values)), **knobs,
        schedule=widgets.choice(["linear", "cosine", "constant"]))  # fmt: skip
    before = panel.about.text
    panel.set(n_embd=64)
    assert "parameters" in before and panel.about.text != before
    run_to_the_end(panel)
    losses, held_out, _ = panel.result
    assert len(losses) == 60 and [step for step, _ in held_out] == [0, 50, 60] and panel.image.value
    panel.set(steps=90_000, schedule="cosine", dropout=0.2)
    panel.start()
    while panel.progress.value == 0:
        time.sleep(0.01)
    panel.stop()
    assert panel.wait(60) and panel.status.value == "stopped" and 0 < len(panel.result[0]) < 90_000


def test_the_remedy_panel_trains_on_any_length_of_text(lesson):
    knobs = {"letters_to_learn": widgets.slider(500, 500_000, 3_000, log=True), "seed": widgets.slider(0, 9, 0)}
    knobs |= {"dropout": widgets.slider(0.0, 0.6, 0.1, 0.05), "weight_decay": widgets.slider(0.0, 8.0, 0.1, 0.1)}
    knobs |= {"learning_rate": widgets.slider(1e-4, 0.1, 6e-3, log=True)}
    panel = widgets.RunPanel(partial(lesson["remedy"], steps=30), lesson["draw_remedy"], **knobs)
    run_to_the_end(panel)
    first = panel.result
    assert first[0] == [0, 30] and first[2][1] < first[2][0]
    panel.set(letters_to_learn=500, dropout=0.3, weight_decay=4.0)
    run_to_the_end(panel)
    assert panel.result != first


def test_the_compile_panel_tells_what_compiling_costs(lesson):
    answers = iter([(0.010, 0.02, [4.0, 3.0]), (0.008, 4.02, [4.0, 3.0001])])
    compiled = FunctionType(lesson["compiled"].__code__, {**lesson, "timed": lambda **choice: next(answers)})
    panel = widgets.RunPanel(compiled, str, "not compiled yet")
    assert panel.text == "not compiled yet"
    run_to_the_end(panel)
    assert "compiling took 4 s" in panel.text and "pays after 2,006 steps" in panel.text
    assert "the losses differ by up to 1e-04" in panel.text


def test_the_attention_panel_shows_every_look_and_head(lesson):
    space = {**lesson, "record": {"maps": torch.rand(3, 2, 4, 24, 24).tril()}, "line": "x" * 24, "looks": [0, 10, 20]}
    sliders = {"look": widgets.slider(0, 2, 0), "block": widgets.slider(1, 2, 1), "head": widgets.slider(1, 4, 1)}
    panel = widgets.Panel(FunctionType(lesson["draw_attention"].__code__, space), **sliders)
    pictures = [panel.image.value]
    for place in ({"look": 2}, {"block": 2}, {"head": 4}):
        panel.set(**place)
        pictures.append(panel.image.value)
    assert panel.status.value == "" and len(set(pictures)) == 4


# --- its exercises ----------------------------------------------------------------------------------------------------


def accumulate(share=lambda y, pieces: y.numel() / sum(y.numel() for _, y in pieces), fresh=True, gain=1.0):
    def answer(model, pieces):
        if fresh:
            model.zero_grad(set_to_none=True)
        total = 0.0
        for x, y in pieces:
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) * share(y, pieces)
            (gain * loss).backward()
            total += loss.item()
        return total

    return answer


def starts_at_zero(step, total, warmup, fall, highest):
    return highest * min(step / max(1, warmup), 1.0, (total - step) / fall)


def falls_to_zero_too_soon(step, total, warmup, fall, highest):
    return highest * min((step + 1) / (warmup + 1), 1.0, (total - 1 - step) / fall)


def falls_to_a_tenth(step, total, warmup, fall, highest):
    return highest * min((step + 1) / (warmup + 1), 1.0, max(0.1, (total - step) / fall))


def never_holds(step, total, warmup, fall, highest):
    return highest * min((step + 1) / (warmup + 1), (total - step) / (total - warmup))


def reaches_the_top_a_step_early(step, total, warmup, fall, highest):
    return highest * min((step + 1) / max(1, warmup), 1.0, (total - step) / fall)


def best_of_all(losses, patience):
    best = min(range(len(losses)), key=losses.__getitem__)
    return best, min(len(losses) - 1, best + patience)


def keeps_the_last(losses, patience):
    kept, end = stop_at(losses, patience)
    return end, end


def stop_at(losses, patience, beats=lambda loss, best: loss < best):
    best = i = 0
    for i, loss in enumerate(losses):
        if i and beats(loss, losses[best]):
            best = i
        if i - best == patience:
            break
    return best, i


def counts_worse_looks_altogether(losses, patience):
    best = worse = i = 0
    for i, loss in enumerate(losses):
        if loss < losses[best]:
            best = i
        elif i:
            worse += 1
        if worse == patience:
            break
    return best, i


def by_learned_text_alone(learned, new, uniform):
    return "diverging" if learned[-1] > uniform else "underfitting" if learned[-1] < learned[-6] - 0.1 else "at rest"


def by_the_last_two_looks(learned, new, uniform):
    if learned[-1] > uniform:
        return "diverging"
    if new[-1] - learned[-1] > 0.3:
        return "overfitting"
    return "underfitting" if learned[-1] < learned[-2] else "at rest"


def handover(weights=True, means=True, place=True, draws=True, shared=False):
    def answer(trainer, fresh):
        if weights:
            fresh.model.load_state_dict(trainer.model.state_dict())
        if means:
            fresh.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
        if place:
            fresh.history = trainer.history if shared else copy.deepcopy(trainer.history)
        if draws:
            fresh.generator.set_state(trainer.generator.get_state())

    return answer


def moves_the_old_one(trainer, fresh):
    handover()(trainer, fresh)
    trainer.update()


WRONG = {
    "my_accumulate": {
        "a piece counts as much as its letters": accumulate(lambda y, pieces: 1 / len(pieces)),
        "is each piece weighted by its share": accumulate(lambda y, pieces: 1.0),
        "left in .grad": accumulate(fresh=False),
        "with equal pieces the gradient is wrong": accumulate(gain=2.0),
    },
    "my_schedule": {
        "its rate is 0": starts_at_zero,
        "would reach zero at step": falls_to_a_tenth,
        "between climb and fall": falls_to_zero_too_soon,
        "should stay": never_holds,
        "is not a straight line": reaches_the_top_a_step_early,
    },
    "my_stop": {
        "training ends at look": best_of_all,
        "the best look until then": keeps_the_last,
        "count the looks in a row": counts_worse_looks_altogether,
        "brought nothing new": partial(stop_at, beats=lambda loss, best: loss <= best),
    },
    "my_diagnosis": {
        "a run that is overfitting was called": by_learned_text_alone,
        "a run that is at rest was called": by_the_last_two_looks,
        "is none of the four words": lambda learned, new, uniform: "bad luck",
    },
    "my_handover": {
        "the first loss differs already": handover(weights=False),
        "what does the optimizer remember": handover(means=False),
        "stands at step 0": handover(place=False),
        "the generator of batches": handover(draws=False),
        "give it its own history": handover(shared=True),
        "it must stay as it is": moves_the_old_one,
    },
}


def test_the_exercises_are_graded():
    named = {name: [named_as(words, answer) for words, answer in answers.items()] for name, answers in WRONG.items()}
    assert_graded("training", named)


def named_as(words, answer):
    def wrong(*args):
        return answer(*args)

    wrong.__name__ = words
    return wrong


def test_the_graders_explain():
    graders = check.graders(LESSON)
    for name, answers in WRONG.items():
        for words, answer in answers.items():
            verdict = check.exercise(named_as(words, answer), graders[f"grade_{name.removeprefix('my_')}"])
            assert verdict.startswith("not yet") and words in verdict, (name, words, verdict)
