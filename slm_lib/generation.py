"""From logits to text: draw the next token, append it, look again."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slm_lib.tokens import Tokenizer, decode_stream


def next_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Logits (..., V) to the probabilities (..., V) that are drawn from, in float64.

    `temperature` divides the logits: below 1 sharpens, above 1 flattens, 0 leaves only the likeliest token. `top_k`
    keeps that many. Raises ValueError for a negative temperature or a top_k below 1.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} must not be negative: 0 takes the likeliest, 1 draws as trained")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1, or None to keep every token")
    logits = logits.double()
    keep = 1 if temperature == 0 else min(top_k or logits.shape[-1], logits.shape[-1])
    best, places = logits.topk(keep)
    chosen = (best / (temperature or 1.0)).softmax(-1)
    return torch.zeros_like(logits).scatter(-1, places, chosen)


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "\n",
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = 0,
) -> Iterator[str]:
    """Continue `prompt`, one token after the other, and yield each as text as soon as it is drawn.

    The model sees the last block_size tokens. A token that ends inside a character waits for the rest of it. A seed
    gives the same text again; None gives another one each time. Raises ValueError for a prompt with symbols that the
    vocabulary lacks.
    """
    ids = tokenizer.encode(prompt or "\n")[None]  # (1, T)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    yield from decode_stream(tokenizer, _draw(model, ids, length, temperature, top_k, generator))


def _draw(
    model: nn.Module, ids: Tensor, length: int, temperature: float, top_k: int | None, generator: torch.Generator
) -> Iterator[int]:
    """Draw `length` ids after ids (1, T), one by one."""
    device = next(model.parameters()).device
    model.eval()
    for _ in range(length):
        with torch.no_grad():
            logits = model(ids[:, -model.config.block_size :].to(device))[0, -1].cpu()  # (V,)
        drawn = torch.multinomial(next_probabilities(logits, temperature, top_k), 1, generator=generator)
        ids = torch.cat([ids, drawn[None]], dim=1)
        yield drawn.item()


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "\n",
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = 0,
) -> str:
    """The whole of `stream` at once: `length` new tokens after `prompt`, without the prompt."""
    return "".join(stream(model, tokenizer, prompt, length, temperature, top_k, seed))
