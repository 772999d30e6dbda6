"""What is counted against what torch counts and keeps; the recorded step against the plain one; and the lesson."""

import ast
import contextlib
import math
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, lesson_path, notices
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm_lib import check, checkpoints, generation, gpu, settings, widgets
from slm_lib.blocks import GPT, GPTConfig, count_flops, count_memory, relu2
from slm_lib.checkpoints import load_model
from slm_lib.data import CharTokenizer
from slm_lib.settings import TrainingConfig
from slm_lib.training import Trainer

TOKENIZER = CharTokenizer("\nabcd")
IDS = TOKENIZER.encode("".join("abcd"[(i * i + i // 7) % 4] for i in range(600)))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

# --- the library ------------------------------------------------------------------------------------------------------


def config(design=GPTConfig.modern, **changes) -> GPTConfig:
    return design(**{"vocab_size": 5, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes})


@pytest.mark.parametrize("m, n, k, size", [(1, 1, 1, 4), (3, 5, 7, 2), (384, 1536, 384, 2), (1, 1000, 1000, 4)])
def test_intensity_is_operations_for_each_byte(m, n, k, size):
    a, b = torch.ones(m, k), torch.ones(k, n)
    with FlopCounterMode(display=False) as counter:
        product = a @ b
    moved = size * (a.numel() + b.numel() + product.numel())
    assert gpu.intensity(m, n, k, size) == pytest.approx(counter.get_total_flops() / moved, rel=1e-15)


def test_intensity_grows_with_each_side_and_halves_with_the_size():
    assert gpu.intensity(64, 64, 64) < gpu.intensity(128, 64, 64) < gpu.intensity(128, 128, 64)
    assert gpu.intensity(64, 64, 64, 4) == gpu.intensity(64, 64, 64, 2) / 2
    assert gpu.intensity(1, 10**6, 10**6) < 1  # a vector and a matrix: each weight serves once


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_operations_of_a_step_are_those_that_torch_counts(design, optimizer):
    shape = config(design, n_embd=24, activation="swiglu")
    model, ids = GPT(shape), torch.randint(5, (3, 8))
    mover = settings.make_optimizer(model, TrainingConfig(optimizer=optimizer))
    counted = []
    with sdpa_kernel(SDPBackend.MATH):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                loss = model(ids).square().mean()
                if backward:
                    loss.backward()
            counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        mover.step()
    expected = {"forward": counted[0], "backward": counted[1] - counted[0], "optimizer": counter.get_total_flops()}
    assert gpu.step_flops(shape, 3, optimizer) == expected
    assert (expected["optimizer"] > 0) == (optimizer == "muon")


def test_utilisation_is_one_where_the_peak_does_nothing_else():
    shape = config(n_embd=64)
    each = 3 * sum(count_flops(shape).values())
    assert gpu.utilisation(shape, 1e15 / each, 1e15) == pytest.approx(1)
    assert gpu.utilisation(shape, 0.4e15 / each, 1e15) == pytest.approx(0.4)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_the_memory_in_float32_is_the_one_that_was_counted_before(activation):
    shape = config(GPTConfig.gpt2, n_embd=48, n_layer=3, activation=activation)
    mine, before = gpu.training_memory(shape, 4), count_memory(shape, 4)
    assert [mine["weights"], mine["gradients"], mine["activations"]] == [
        before["weights"], before["gradients"], before["activations"]]  # fmt: skip
    assert mine["optimizer"] == before["Adam's moments"] and mine["copies of weights"] == 0


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_memory_is_the_one_it_fills(design, optimizer):
    trainer = Trainer(GPT(config(design)), IDS, TrainingConfig(optimizer=optimizer, batch_size=2))
    trainer.update()
    state = [t for entry in trainer.optimizer.state.values() for t in entry.values() if t.dim()]
    predicted = gpu.training_memory(trainer.model.config, 2, optimizer)
    assert predicted["optimizer"] == sum(t.nbytes for t in state)
    assert predicted["gradients"] == sum(p.grad.nbytes for p in trainer.model.parameters())


class FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel of CUDA: it works in float32, and keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx, x):
        rows = x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        ctx.save_for_backward(x, rows)
        return x * rows

    @staticmethod
    def backward(ctx, slope):
        return slope


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel of CUDA: it keeps what goes in, what comes out, and a number for each row of scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        B, H, T, D = query.shape
        mixed = query.new_zeros(B, T, H, D).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mixed, query.new_zeros(B, H, T, dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx, slope):
        return slope, slope, slope


def attend_as_on_cuda(self, x):
    lower = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    mixed = FusedAttention.apply(*(part.to(lower) for part in self._queries_keys_values(x)))
    return self.output(mixed.transpose(1, 2).flatten(2))


def kept_by(model, ids, precision):
    """Bytes that a forward pass with its loss keeps: without whole numbers, weights, their copies, tables of turns."""
    others = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    others |= {(ids.shape[1], model.config.n_embd // model.config.n_head // 2), ()}
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point() and tuple(tensor.shape) not in others:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(ids)
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": False}, {"position": "none"}, {"position": "learned", "qk_norm": False}, {"activation": "swiglu"},
    {"design": GPTConfig.gpt2}, {"design": GPTConfig.gpt2, "activation": "swiglu", "bias": False},
], ids=str)  # fmt: skip
def test_the_memory_of_activations_is_what_the_kernels_of_cuda_keep(monkeypatch, changes, precision):
    monkeypatch.setattr(F, "rms_norm", lambda x, *others: FusedNorm.apply(x.float()))
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x.float()) * self.weight.detach())
    monkeypatch.setattr("slm_lib.attention.CausalSelfAttention.forward", attend_as_on_cuda)
    shape = config(**{"n_embd": 48, **changes})
    kept = kept_by(GPT(shape), torch.randint(5, (3, 8)), precision)
    assert kept == gpu.training_memory(shape, 3, precision=precision)["activations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_square_of_relu_is_torchs_to_the_last_bit(dtype):
    x, slope = (torch.randn(500).to(dtype) for _ in range(2))
    ends = []
    for square in (relu2, lambda x: F.relu(x).square()):
        given = x.clone().requires_grad_()
        square(given).backward(slope)
        ends.append((square(x), given.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))


@on_gpu
def test_the_square_of_relu_stays_in_bfloat16():
    with torch.autocast("cuda", torch.bfloat16):
        assert relu2(torch.ones(3, device="cuda", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bfloat16_halves_what_enters_the_products_and_copies_their_weights():
    shape = GPTConfig.modern(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    full, half = (gpu.training_memory(shape, 64, precision=name) for name in ("float32", "bfloat16"))
    linear = sum(m.weight.numel() for m in GPT(shape).modules() if isinstance(m, nn.Linear))
    assert half["copies of weights"] == 2 * linear
    assert 0.5 < half["activations"] / full["activations"] < 0.8
    assert all(half[part] == full[part] for part in ("weights", "gradients", "optimizer"))
    dropped = gpu.training_memory(replace(shape, dropout=0.1), 64)["activations"] - full["activations"]
    assert dropped == 64 * 256 * 384 * (2 * 6 + 1)  # after the embedding, and twice in each block


def test_below_the_ridge_the_memory_is_waited_for_and_above_it_the_arithmetic():
    roof = gpu.Roof(peak=8e14, bandwidth=4e12)
    assert roof.ridge == 200 and roof.attainable(roof.ridge) == roof.peak
    assert roof.attainable(50) == 2e14 and roof.attainable(200.1) == roof.attainable(1e9) == 8e14


def test_a_roof_is_measured_where_the_work_is_done():
    roof = gpu.measure_roof(torch.device("cpu"))
    assert 1e8 < roof.peak < 1e14 and 1e8 < roof.bandwidth < 1e13


def test_the_least_time_counts(monkeypatch):
    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0, 10.0, 16.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    called = []
    assert gpu._seconds(lambda: called.append(1), torch.device("cpu"), together=11.0) == 2.0 and len(called) == 4


# --- the recorded step, as far as a processor can follow it -----------------------------------------------------------


def trainer(device="cpu", dtype=torch.float32, shape=None, **changes) -> Trainer:
    torch.manual_seed(0)
    model = GPT(config(**{"dropout": 0.1, **(shape or {})})).to(device, dtype)
    recipe = {"batch_size": 4, "max_iters": 12, "warmup_iters": 3, "learning_rate": 0.01, "eval_interval": 6}
    return Trainer(model, IDS, TrainingConfig(**{**recipe, **changes}))


def both(**choices):
    """Two trainings of the same: as it is, and captured."""
    plain, captured = trainer(**choices), trainer(**choices)
    gpu.capture(captured)
    for one in (plain, captured):
        torch.manual_seed(1)
        one.run(progress=False)
    return plain, captured


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"precision": "bfloat16"}, {"grad_clip": 0.05}])
def test_a_captured_training_is_the_same_to_the_last_bit(changes):
    plain, captured = both(**changes)
    assert captured.history.losses == plain.history.losses and len(plain.history.losses) == 12
    assert captured.history.gradient_norms == plain.history.gradient_norms
    for mine, theirs in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(captured.generator.get_state(), plain.generator.get_state())
    assert isinstance(captured.move, gpu._Replayed) and captured.move.calls == 12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_muon_reads_its_learning_rate_from_the_device_and_goes_the_same_way(dtype, tolerance):
    plain, captured = both(dtype=dtype, optimizer="muon")
    assert captured.history.losses == pytest.approx(plain.history.losses, rel=tolerance)
    for mine, theirs in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=10 * tolerance, rtol=0)
    rates = [group["lr"].item() for group in captured.optimizer.param_groups]
    assert rates == pytest.approx([group["lr"] for group in plain.optimizer.param_groups])


def test_the_same_places_are_read_and_written_from_the_fourth_update_on():
    captured, seen = trainer(), []
    gpu.capture(captured)
    rates = [group["lr"] for group in captured.optimizer.param_groups]
    for _ in range(7):
        captured.update()
        if captured.step > gpu.WARM_UP:
            seen.append([tensor.data_ptr() for tensor in captured.gradient.inputs])
    assert len(seen) == 4 and all(places == seen[0] for places in seen)
    assert [group["lr"] for group in captured.optimizer.param_groups] == rates
    assert all(mine is theirs["lr"] for mine, theirs in zip(rates, captured.optimizer.param_groups, strict=True))


def test_capturing_changes_nothing_by_itself_and_twice_is_once():
    one, other = trainer(optimizer="muon"), trainer(optimizer="muon")
    gpu.capture(other)
    gradient = other.gradient
    gpu.capture(other)
    assert other.gradient is gradient and other.step == 0 and not other.optimizer.state
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    for (x, y), (mine, theirs) in ((one.draw(), other.draw()) for _ in range(3)):
        assert torch.equal(x, mine) and torch.equal(y, theirs)


@pytest.mark.parametrize("at", [1, 6])  # before and after the step is recorded
def test_a_captured_training_breaks_down_with_the_same_words_and_its_weights_stay(at):
    told = []
    for wish in (False, True):
        broken = trainer()
        if wish:
            gpu.capture(broken)
        for _ in range(at):
            broken.update()
        broken.model.norm.weight.data[0] = math.inf
        before = [p.clone() for p in broken.model.parameters()]
        with pytest.raises(FloatingPointError) as found:
            broken.update()
        told.append(str(found.value))
        assert all(torch.equal(p, q) for p, q in zip(broken.model.parameters(), before, strict=True))
    assert told[0] == told[1] and f"at step {at}:" in told[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_captured_training_is_saved_and_goes_on_either_way(tmp_path, optimizer):
    straight = trainer(optimizer=optimizer)
    straight.run(progress=False)
    captured = trainer(optimizer=optimizer)
    gpu.capture(captured)
    captured.run(lambda one: one.step == 6 and one.save(tmp_path / "6", TOKENIZER), progress=False)
    for wish in (False, True):
        resumed = Trainer.resume(tmp_path / "6", IDS)
        assert all(isinstance(group["lr"], float) for group in resumed.optimizer.param_groups)
        if wish:
            gpu.capture(resumed)
        resumed.run(progress=False)
        assert resumed.history.losses == pytest.approx(straight.history.losses, rel=1e-5 if optimizer == "muon" else 0)


def test_another_task_draws_its_own_batches():
    class Backwards(Trainer):
        def draw(self):
            x, y = super().draw()
            return x.flip(1), y.flip(1)

    ends = []
    for wish in (False, True):
        torch.manual_seed(0)
        other = Backwards(GPT(config()), IDS, TrainingConfig(batch_size=4, max_iters=8))
        if wish:
            gpu.capture(other)
        ends.append(other.run(progress=False).losses)
    assert ends[0] == ends[1]


def test_what_cannot_be_recorded_is_refused_in_a_sentence():
    model = GPT(config())
    slow = Trainer(model, IDS, TrainingConfig(), optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="AdamW cannot be recorded: take Muon, or torch's AdamW with fused=True"):
        gpu.capture(slow)
    assert isinstance(slow.optimizer.param_groups[0]["lr"], float)  # nothing was changed
    several = trainer()
    several.ranks.count = 2
    with pytest.raises(ValueError, match="what several processes do together is not recorded"):
        gpu.capture(several)


def test_where_recording_fails_the_updates_are_made_as_usual_after_a_warning(monkeypatch):
    plain, captured = trainer(), trainer()
    gpu.capture(captured)
    for one in (plain, captured):
        torch.manual_seed(1)
        for _ in range(gpu.WARM_UP):
            one.update()

    class NoGraph:
        def __init__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    captured.gradient.stream = captured.move.stream = "a stream"
    states = []
    for one in (plain, captured):
        torch.manual_seed(2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            one.update()
            one.update()
        states.append(one.history.losses)
    assert states[0] == states[1] and len(told) == 2  # one for each half of an update
    reason = "operation not permitted when stream is capturing"
    assert str(told[0].message) == f"each operation is launched on its own, for recording failed ({reason})"


def test_work_goes_aside_three_times_is_recorded_once_and_then_only_replayed(monkeypatch):
    """The order of what is asked of CUDA, told by stand-ins: where there is no GPU nothing else can tell."""
    told = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = getattr(name, "type", name)

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            told.append("replay")

    @contextlib.contextmanager
    def within(name):
        told.append(f"enter {name}")
        yield
        told.append(f"leave {name}")

    here = Stream("here")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode, stream: within(f"graph {stream.name}"))
    replayed = gpu._Replayed(lambda x: told.append("work") or 2 * x, torch.device("cuda"))
    found = [replayed(torch.full((2,), float(i))).tolist() for i in range(6)]
    aside = ["aside waits for here", "enter aside", "work", "leave aside", "here waits for aside"]
    assert told == 3 * aside + ["enter graph aside", "work", "leave graph aside"] + 3 * ["replay"]
    assert found[:4] == [[0, 0], [2, 2], [4, 4], [6, 6]]
    assert found[4:] == [[6, 6], [6, 6]] and replayed.inputs[0].tolist() == [5, 5]  # a stand-in computes nothing


def test_a_compiled_model_is_captured_too(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    plain, captured = both(compile=True)
    assert compiled == [plain.model, captured.model] and captured.history.losses == plain.history.losses


# --- the writer -------------------------------------------------------------------------------------------------------


def talkative(device="cpu", **changes) -> GPT:
    """A model with an opinion about each next letter."""
    torch.manual_seed(3)
    model = GPT(config(**changes)).to(device)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("prompt", ["", "ab", "abcdabcd", "abcdabcdabcdabcd"])
@pytest.mark.parametrize("length", [0, 1, 5, 40])
def test_the_likeliest_text_is_the_one_that_generation_writes(design, prompt, length):
    model = talkative(design=design)
    written = gpu.Writer(model).generate(TOKENIZER, prompt, length, temperature=0)
    assert written == generation.generate(model, TOKENIZER, prompt, length, temperature=0)


def test_a_seed_writes_the_same_text_again_and_another_one_another():
    writer = gpu.Writer(talkative())
    texts = [writer.generate(TOKENIZER, "a", 60, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(writer.replays) == 7  # each place but the prompt's


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    model = talkative(block_size=2)
    writer, counts = gpu.Writer(model), torch.zeros(5)
    for seed in range(1500):
        counts[TOKENIZER.encode(writer.generate(TOKENIZER, "ab", 1, temperature, seed))] += 1
    chances = generation.next_probabilities(model(TOKENIZER.encode("ab")[None])[0, -1], temperature)
    assert (counts / 1500 - chances).abs().max() < 0.05 and counts.max() < 1450


# --- the recorded step on a GPU ---------------------------------------------------------------------------------------


def on_cuda(captured, steps=40, seed=1, **choices):
    one = trainer("cuda", max_iters=steps, **choices)
    if captured:
        gpu.capture(one)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "each operation is launched")
        one.run(progress=False)
    return one


@on_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replayed_training_loses_as_a_plain_one(optimizer, precision):
    plain, replayed = (on_cuda(wish, optimizer=optimizer, precision=precision) for wish in (False, True))
    assert isinstance(replayed.move.replay.__self__, torch.cuda.CUDAGraph)
    assert isinstance(replayed.gradient.replay.__self__, torch.cuda.CUDAGraph)
    tolerance = 1e-3 if precision == "float32" else 0.03
    assert replayed.history.losses == pytest.approx(plain.history.losses, rel=tolerance)
    assert replayed.history.losses[-1] < replayed.history.losses[0] - 0.05


@on_gpu
def test_each_replay_drops_other_activations_and_one_seed_drops_the_same():
    found = []
    for seed in (1, 1, 2):
        one = trainer("cuda", shape={"dropout": 0.5}, learning_rate=1e-9, max_iters=30)
        gpu.capture(one)
        batch = one.draw()
        one.draw = lambda batch=batch: batch  # so that nothing else differs from update to update
        torch.manual_seed(seed)
        found.append(one.run(progress=False).losses)
    assert found[0] == found[1] != found[2]
    assert all(len({round(loss, 6) for loss in losses}) > 25 for losses in found)


@on_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_replayed_training_is_saved_and_goes_on_there_and_on_a_processor(tmp_path, optimizer):
    straight = on_cuda(True, steps=20, optimizer=optimizer)
    first = trainer("cuda", max_iters=20, optimizer=optimizer)
    gpu.capture(first)
    torch.manual_seed(1)
    first.run(lambda one: one.step == 12 and one.save(tmp_path / "12", TOKENIZER), progress=False)
    resumed = Trainer.resume(tmp_path / "12", IDS, "cuda")
    gpu.capture(resumed)
    resumed.run(progress=False)
    assert resumed.history.losses == pytest.approx(straight.history.losses, rel=0.01)
    there = Trainer.resume(tmp_path / "12", IDS, "cpu")
    there.run(progress=False)
    assert there.history.losses == pytest.approx(straight.history.losses, rel=0.1)  # other activations are dropped


@on_gpu
def test_a_replayed_training_breaks_down_before_its_weights_do():
    broken = on_cuda(True, steps=10)
    broken.model.norm.weight.data[0] = math.inf
    before = [p.clone() for p in broken.model.parameters()]
    with pytest.raises(FloatingPointError, match="the weight called norm.weight is no longer finite"):
        broken.update()
    assert all(torch.equal(p, q) for p, q in zip(broken.model.parameters(), before, strict=True))


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_predicted_memory_is_what_a_gpu_takes_for_a_step(precision):
    shape = GPTConfig.modern(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.1)
    recipe = TrainingConfig(batch_size=32, optimizer="muon", precision=precision, max_iters=3)
    one = Trainer(GPT(shape).to("cuda"), torch.arange(5_000) % 65, recipe)
    one.run(progress=False)
    torch.cuda.reset_peak_memory_stats()
    one.update()
    predicted = sum(gpu.training_memory(shape, 32, "muon", precision).values())
    assert 0.9 < torch.cuda.max_memory_allocated() / predicted < 1.5


@on_gpu
def test_a_gpu_has_a_higher_roof_in_bfloat16():
    full, half = (gpu.measure_roof(torch.device("cuda"), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.peak > full.peak and half.bandwidth == pytest.approx(full.bandwidth, rel=0.3)


@on_gpu
def test_the_writer_replays_what_generation_writes():
    model = talkative("cuda")
    writer = gpu.Writer(model)
    texts = [writer.generate(TOKENIZER, "ab", 60, temperature=0) for _ in range(3)]
    assert set(texts) == {generation.generate(model, TOKENIZER, "ab", 60, temperature=0)}
    assert all(isinstance(replay.__self__, torch.cuda.CUDAGraph) for replay in writer.replays.values())
    again, other = (writer.generate(TOKENIZER, "ab", 60, seed=seed) for seed in (1, 2))
    assert again == writer.generate(TOKENIZER, "ab", 60, seed=1) != other


# --- the lesson -------------------------------------------------------------------------------------------------------

LESSON = lesson_path("gpu")


class BrokenRoof(gpu.Roof):
    ridge = property(lambda self: 1.000001 * self.peak / self.bandwidth)

    def attainable(self, intensity):
        return 1.000001 * super().attainable(intensity)


class BrokenWriter(gpu.Writer):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)[::-1]


def with_one_more(count):
    def broken(*args):
        counted = count(*args)
        first = next(iter(counted))
        return {**counted, first: counted[first] + 1}

    return broken


def captured_with_other_batches(trainer):
    gpu.capture(trainer)
    trainer.generator.manual_seed(99)


BROKEN = {
    "intensity": lambda *args: gpu.intensity(*args) * 1.000001,
    "Roof": BrokenRoof,
    "step_flops": with_one_more(gpu.step_flops),
    "training_memory": with_one_more(gpu.training_memory),
    "utilisation": lambda *args: gpu.utilisation(*args) * 1.000001,
    "capture": captured_with_other_batches,
    "Writer": BrokenWriter,
    "count_flops": with_one_more(count_flops),
}
# Cells that take long or take times; of these only the functions that they define are kept.
LONG_WORK = re.compile(
    r"seconds_of\(lambda|speed_of|seconds_to_add\(n\) for|measure_roof\(|trained_in|live_run\(\)|per_second\(|in_full"
    r"|speed_here|in_a_step|surprisal\(|nats\[|of_all|by_place|widgets\."
)
WITH_TORCH = re.compile(r"x @ w, \"the|many\.to|written out|looped")  # these proofs ask nothing of the library


def small_model(folder):
    """In place of a trained model: its letters, its record, and few numbers."""
    _, tokenizer, provenance = load_model(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 128, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig.modern(**sizes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model, tokenizer, provenance


def walk(folder=LESSON.parent, names=None):
    """Run the lesson without its long work, on small models; yield each cell's source, and the names before it ran."""
    names = {} if names is None else names
    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(folder):
        patched.setenv("SLM_CORPUS", "playhouse")
        patched.setattr(checkpoints, "load_model", small_model)
        for source in code_cells(LESSON):
            yield source, names
            long = LONG_WORK.search(source) and "check.same(" not in source
            kept = [node for node in ast.parse(source).body if not long or isinstance(node, ast.FunctionDef)]
            with contextlib.suppress(AssertionError, NameError, KeyError):  # claims that rest on the long work
                exec(compile(ast.Module(kept, []), "lesson", "exec"), names)
            if "plt" in names:
                names["plt"].close("all")


def after(folder=LESSON.parent):
    """The names of the lesson, with what its long work would have found at hand."""
    names = [names for _, names in walk(folder)][-1]
    names |= {"here": gpu.Roof(1e11, 1e10), "speeds": {"cpu": [1e10] * 8}, "additions": 1e9, "whose": "four moments"}
    names |= {"sides": [2**i for i in range(3, 11)], "speed_here": {"one window": 1e4, "16 windows": 3e4}}
    names["slopes"] = {kind: 10.0 ** -torch.arange(1.0, 12.0) for kind in ("stream", "logits", "weights")}
    names["moments"] = [{"step": 10**i, "loss": 4.0 - i, "sample": f"ANN:\nSo be it {i}.\n" * 9} for i in range(4)]
    return names


@pytest.fixture(scope="module")
def lesson():
    return after()


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in walk():
        if "check.same(" not in source or "grade_" in source:
            continue
        used = {name for name in BROKEN if re.search(rf"\b{name}\(", source)}
        noticed = {name for name in used if notices(source, {**names, name: BROKEN[name]})}
        assert noticed or WITH_TORCH.search(source), f"no broken thing is noticed by this proof:\n{source}"
        caught |= noticed
    assert caught == set(BROKEN)


# --- its exercises ----------------------------------------------------------------------------------------------------


def one_after_the_other(work, peak, bandwidth, call):
    return sum(o / peak + b / bandwidth + call for o, b in work), "arithmetic"


def most_kernels(work, peak, bandwidth, call):
    words = ["arithmetic", "memory", "orders"]
    longest = [max(zip((o / peak, b / bandwidth, call), words, strict=True)) for o, b in work]
    return sum(seconds for seconds, _ in longest), max(words, key=[word for _, word in longest].count)


def all_at_once(work, peak, bandwidth, call):
    totals = (sum(o for o, _ in work) / peak, sum(b for _, b in work) / bandwidth, call * len(work))
    return max(zip(totals, ("arithmetic", "memory", "orders"), strict=True))


def scaler(forgets=False, at_once=False, never_doubles=False):
    def answer(largest, start, patience):
        scale, good, scales, skipped = start, 0, [], []
        for size in largest:
            overflow = size * scale > 65_504
            scale = scale / 2 if overflow and at_once else scale
            scales.append(scale)
            skipped.append(overflow)
            good = (good if forgets else 0) if overflow else good + 1
            if overflow and not at_once:
                scale /= 2
            elif good == patience and not never_doubles:
                scale, good = scale * 2, 0
        return scales, skipped

    answer.__name__ = f"forgets {forgets}, at once {at_once}, never doubles {never_doubles}"
    return answer


def one_by_one(numbers):
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


def from_zero(numbers):
    return sum(numbers)


def in_float32(numbers):
    return torch.tensor([float(number._x) for number in numbers]).sum()


def half_of_them(numbers):
    return numbers[0] if len(numbers) == 1 else half_of_them(numbers[: len(numbers) // 2]) + numbers[-1]


def counts_twice(chain, needed, size):
    results = {name for name, _ in chain}
    outside = {name for _, inputs in chain for name in inputs} - results
    return sum(len(inputs) + 1 for _, inputs in chain) * size, (len(outside) + len(needed)) * size


def writes_all_results(chain, needed, size):
    results = {name for name, _ in chain}
    outside = {name for _, inputs in chain for name in inputs} - results
    return sum(len(set(inputs)) + 1 for _, inputs in chain) * size, (len(outside) + len(results)) * size


def reads_results_again(chain, needed, size):
    apart = sum(len(set(inputs)) + 1 for _, inputs in chain)
    return apart * size, (len({name for _, inputs in chain for name in inputs}) + len(needed)) * size


def test_graders():
    assert_graded("gpu", {
        "my_time": [one_after_the_other, most_kernels, all_at_once],
        "my_scales": [scaler(forgets=True), scaler(at_once=True), scaler(never_doubles=True)],
        "my_total": [one_by_one, from_zero, in_float32, half_of_them],
        "my_bytes": [counts_twice, writes_all_results, reads_results_again],
    })  # fmt: skip


# --- its panels -------------------------------------------------------------------------------------------------------


def seen(panel, changes):
    """Whether every change shows something new, and no complaint."""
    for change in changes:
        before = panel.image.value, panel.text
        panel.set(**change)
        assert panel.status.value == "" and (panel.image.value, panel.text) != before, (change, panel.status.value)


def test_the_panel_of_waiting_follows_its_sliders(lesson):
    panel = widgets.Panel(
        lesson["draw_waiting"], windows=widgets.slider(1, 256, 8), n_embd=widgets.slider(96, 3072, 384, 96),
        on=widgets.choice(list(lesson["roofs"]), "H100"), microseconds_per_order=widgets.slider(0.5, 20.0, 5.0, 0.5),
    )  # fmt: skip
    changes = [{"windows": 256}, {"n_embd": 3072}, {"on": "T4"}, {"windows": 1, "n_embd": 96}]
    seen(panel, [*changes, {"microseconds_per_order": 20.0}])


def test_the_panel_of_scales_follows_its_sliders(lesson):
    controls = {"scale_as_power_of_two": widgets.slider(0, 40, 0), "windows": widgets.slider(1, 64, 64)}
    panel = widgets.Panel(lesson["draw_scale"], **controls, kind=widgets.choice(["stream", "logits", "weights"]))
    seen(panel, [{"scale_as_power_of_two": 40}, {"windows": 1}, {"kind": "weights"}])


def test_the_panel_of_memory_follows_its_sliders(lesson):
    panel = widgets.Panel(
        lesson["draw_memory"], n_layer=widgets.slider(1, 48, 6), n_embd=widgets.slider(64, 2048, 384, 64),
        context=widgets.slider(64, 4096, 256, 64), windows=widgets.slider(1, 512, 64),
        optimizer=widgets.choice(["muon", "adamw"]), precision=widgets.choice(["bfloat16", "float32"]),
    )  # fmt: skip
    changes = [{"n_layer": 48}, {"n_embd": 64}, {"n_embd": 2048}, {"context": 4096}, {"windows": 1}]
    seen(panel, [*changes, {"optimizer": "adamw"}, {"precision": "float32"}])


def test_the_panel_of_moments_shows_each(lesson):
    panel = widgets.Panel(lesson["draw_moment"], moment=widgets.slider(0, 3, 3))
    seen(panel, [{"moment": i} for i in range(3)])


def test_the_plan_says_what_it_costs_and_what_does_not_fit(lesson):
    panel = widgets.Panel(
        lesson["plan"], million_parameters=widgets.slider(1, 10_000, 10, log=True),
        million_tokens=widgets.slider(1, 1_000_000, 200, log=True), on=widgets.choice(list(lesson["SHEETS"]), "H100"),
        devices=widgets.slider(1, 64, 1), share_of_peak=widgets.slider(0.02, 0.8, 0.2, 0.02),
        per_hour=widgets.slider(0.0, 10.0, 3.0, 0.1), per_kwh=widgets.slider(0.0, 1.0, 0.3, 0.01),
    )  # fmt: skip
    assert "too much" not in panel.text
    changes = [{"devices": 8}, {"share_of_peak": 0.4}, {"per_hour": 9.0}, {"per_kwh": 1.0}, {"million_tokens": 1e6}]
    seen(panel, [*changes, {"million_parameters": 1e4}, {"on": "T4"}])
    assert "too much" in panel.text


def test_the_panel_of_remedies_measures_here_and_leaves_the_threads_as_they_were(lesson):
    place, before = widgets.choice(["cpu"]), torch.get_num_threads()
    knobs = {"n_embd": widgets.slider(32, 512, 32, 32), "windows": widgets.slider(2, 64, 4)}
    knobs |= {"threads": widgets.slider(1, 2, 1), "place": place}
    panel = widgets.RunPanel(lesson["measure"], lesson["draw_speeds"], about=lesson["price"], **knobs)
    assert "operations" in panel.about.text
    panel.start()
    assert panel.wait(120) and panel.status.value.startswith("done"), panel.status.value
    assert list(panel.result)[:3] == ["one window", "4 windows", "fused AdamW"] and min(panel.result.values()) > 0
    assert torch.get_num_threads() == before


# --- with and without what a GPU measured -----------------------------------------------------------------------------


def test_without_stored_results_one_line_says_so(lesson, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "result", partial(check.result, folder=tmp_path))
    assert lesson["stored"]("gpu_steps") is None
    assert "does not exist yet" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folders like the project's, with what the programs for a GPU measure at toy size on a processor."""
    root, project = Path(__file__).parents[1], tmp_path_factory.mktemp("project")
    (project / "notebooks").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLM_CORPUS": "playhouse"}
    for program in ("gpu_steps", "gpu_run"):
        words = [sys.executable, root / "benchmarks" / f"{program}.py", "--dry", project]
        subprocess.run(words, check=True, env=environment, cwd=root, capture_output=True)
    for model in (root / "models").iterdir():
        if model.name != "shakespeare-gpu":
            (project / "models" / model.name).symlink_to(model)
    return project


def test_with_stored_results_the_lesson_shows_them(measured, monkeypatch, capsys):
    monkeypatch.setattr(check, "result", partial(check.result, folder=measured))
    names = after(measured / "notebooks")
    capsys.readouterr()
    shows = ["steps_of_gpu = ", 'row["study"] == "memory"', "speed_rows, rates", "full_run = ", "moments, whose"]
    shows += ["has_gpu_model = "]
    with contextlib.chdir(measured / "notebooks"):
        for source in (source for source in code_cells(LESSON) if any(mark in source for mark in shows)):
            exec(source, names)
            names["plt"].close("all")
    assert names["steps_of_gpu"]["dry"] and names["full_run"]["dry"]
    assert names["whose"].startswith("stored") and names["moments"] == names["full_run"]["rows"]
    assert names["larger"] == "shakespeare-gpu" and "does not exist" not in capsys.readouterr().out
    assert list(names["rates"])[0] == "float32" and names["draw_moment"](len(names["moments"]) - 1).axes
