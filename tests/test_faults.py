"""The tensor that breaks first is named, too little memory is told, an interrupt waits for the step at hand."""

import math
import os
import signal
import threading
import weakref

import pytest
import torch

from slm_lib.blocks import GPT, GPTConfig
from slm_lib.faults import enough_memory, first_not_finite, interrupts
from slm_lib.training import Trainer, TrainingConfig

X, Y = torch.tensor([[0, 1, 2, 3]] * 4), torch.tensor([[1, 2, 3, 4]] * 4)
IDS = torch.tensor([(i * i + i // 7) % 5 for i in range(600)])


def small_model(design=GPTConfig.gpt2, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(design(**{"vocab_size": 5, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}))


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
def test_nothing_is_found_where_all_is_finite(design):
    assert first_not_finite(small_model(design), X, Y) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_weight_is_the_first(value):
    model = small_model()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 2] = value
    assert first_not_finite(model, X, Y) == "the weight called blocks.1.mlp.up.weight"


@pytest.mark.parametrize("name, part", [
    ("embedding", lambda m: m.embedding), ("blocks.0.attention.qkv", lambda m: m.blocks[0].attention.qkv),
    ("blocks.1.mlp.up", lambda m: m.blocks[1].mlp.up), ("head", lambda m: m.head),
])  # fmt: skip
def test_a_broken_output_is_named_before_those_that_inherit_it(name, part):
    model = small_model()
    part(model).register_forward_hook(lambda module, inputs, output: output * math.inf)
    assert first_not_finite(model, X, Y) == f"the output of {name}"
    assert all(len(module._forward_hooks) == (module is part(model)) for module in model.modules())


def test_finite_logits_and_an_infinite_loss():
    model = small_model()
    model.head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 1e38) * torch.arange(-2, 3))
    assert first_not_finite(model, X, Y) == "the loss itself"


def test_of_gradients_the_one_nearest_to_the_loss_is_the_first():
    model = small_model(tie_weights=False)
    model.blocks[1].mlp.up.weight.register_hook(lambda slope: slope * math.nan)
    model.blocks[0].norm1.weight.register_hook(lambda slope: slope * math.inf)
    assert first_not_finite(model, X, Y) == "the gradient of blocks.1.mlp.up.weight"


def test_the_trainer_stops_before_the_weights_are_touched():
    model = small_model()
    trainer = Trainer(model, IDS, TrainingConfig(max_iters=9, batch_size=4, gradient_accumulation=2))
    trainer.update()
    model.blocks[0].attention.output.weight.register_hook(lambda slope: slope * math.nan)
    before = [weight.clone() for weight in model.parameters()]
    told = r"gradient of blocks.0.attention.output.weight is no longer finite \(loss 1.6\d*\) at step 1: try a lower"
    with pytest.raises(FloatingPointError, match=told):
        trainer.run(progress=False)
    assert all(map(torch.equal, before, model.parameters())) and len(trainer.history.gradient_norms) == 1


def test_a_gradient_whose_length_alone_overflows_stops_too():
    model = small_model(tie_weights=False)
    model.head.weight.register_hook(lambda slope: slope.sign() * 1e30)
    trainer = Trainer(model, IDS, TrainingConfig(batch_size=4))
    with pytest.raises(FloatingPointError, match="the length of all gradients together is no longer finite"):
        trainer.update()


@pytest.mark.parametrize("numbers", [10**14, 2**62])
def test_memory_that_no_machine_has_is_told_with_the_knob(numbers):
    held = []

    def fill():
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        return large, torch.zeros(numbers)

    with pytest.raises(MemoryError, match="does not suffice: lower n_embd$") as caught, enough_memory("lower n_embd"):
        fill()
    assert caught and held[0]() is None  # what filled the memory is let go, though the error is still at hand


def test_a_batch_that_no_machine_can_hold_is_told_with_the_knob():
    with pytest.raises(MemoryError, match="lower batch_size, raise gradient_accumulation, or lower block_size"):
        Trainer(small_model(), IDS, TrainingConfig(batch_size=10**13)).update()


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shape"), enough_memory("lower n_embd"):
        torch.zeros(3) @ torch.zeros(4, 4)
    with pytest.raises(KeyError), enough_memory("lower n_embd"):
        raise KeyError("x")
    with enough_memory("lower n_embd"):
        pass
    for told in ("CUDA out of memory. Tried to allocate", "MPS backend out of memory"):
        with pytest.raises(MemoryError), enough_memory("x"):
            raise RuntimeError(told)


def test_a_first_interrupt_asks_and_a_second_breaks():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_patient_one_takes_any_number_and_stays_deaf_after_one():
    before = signal.getsignal(signal.SIGINT)
    with interrupts(patient=True) as asked:
        pass
    assert not asked.is_set() and signal.getsignal(signal.SIGINT) is before
    try:
        with interrupts(patient=True) as asked:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_caught():
    seen = []

    def ask():
        with interrupts() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [False]
