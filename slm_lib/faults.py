"""What can stop a training, told in a sentence: numbers no longer finite, too little memory, an interrupt."""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "size calculation overflowed")


def first_not_finite(model: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """The first tensor that is NaN or infinite when the loss of contexts x (B, T) and targets y (B, T) is computed.

    Looked at in the order of the computation: the weights, what each module puts out, the loss, then the gradients
    from the last layer to the first, which stay in the parameters. None where all is finite.

    >>> model = nn.Embedding(2, 2)
    >>> _ = model.weight.data.fill_(float("nan"))
    >>> first_not_finite(model, torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
    'the weight called weight'
    """
    weights = [name for name, weight in model.named_parameters() if not _finite(weight)]
    if weights:
        return f"the weight called {weights[0]}"
    with _watched(model) as outputs:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    if outputs:
        return f"the output of {outputs[0]}"
    if not _finite(loss):
        return "the loss itself"
    model.zero_grad(set_to_none=True)
    loss.backward()
    slopes = [name for name, weight in model.named_parameters() if weight.grad is not None and not _finite(weight.grad)]
    return f"the gradient of {slopes[-1]}" if slopes else None


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Within it, the list it yields gathers the names of modules that put out something that is not finite."""
    found: list[str] = []

    def hook(name: str):
        def look(module, inputs, output):
            if isinstance(output, Tensor) and not _finite(output):
                found.append(name or "the model")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Within it, every kind of "out of memory" becomes a MemoryError with a sentence that ends in `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        raise MemoryError(f"the memory of this machine does not suffice: {advice}") from None


@contextmanager
def interrupts(patient: bool = False) -> Iterator[threading.Event]:
    """Within it, a first Ctrl-C sets the event it yields instead of breaking into an update; a second breaks.

    The patient one takes any number of them, and stays deaf after it where there was one: of several processes that
    train together none may leave before all have ended the step, and the first then saves.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(number, frame):
        if asked.is_set() and not patient:
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if patient and asked.is_set() else before)
