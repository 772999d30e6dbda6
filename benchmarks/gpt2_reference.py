"""Keeps what `transformers`' GPT-2 answers for random weights: results/gpt2, a witness that readers need not install.

    python benchmarks/gpt2_reference.py
"""

import torch
import torch.nn.functional as F

from slm_lib.blocks import GPTConfig

SIZES = {"vocab_size": 7, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 4}


def theirs():
    """A tiny GPT-2 of `transformers` in float64, every weight drawn at random, so that nothing hides behind a zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer"}
    config = GPT2Config(
        **{name: SIZES[ours] for name, ours in names.items()}, n_head=SIZES["n_head"], bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # few digits, so that the stored numbers stay readable and exact
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3).double().round(decimals=3))
    return model


def answers(model) -> dict:
    """Ids, logits, the loss of predicting each next id, and the gradient of that loss for the tied embedding."""
    ids = torch.tensor([[1, 6, 2, 2, 0, 5], [3, 3, 4, 1, 0, 2]])
    logits = model(ids).logits  # (B, T, V)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    gradient = model.transformer.wte.weight.grad
    return {"ids": ids.tolist(), "logits": logits.tolist(), "loss": loss.item(), "gradient": gradient.tolist()}


if __name__ == "__main__":
    import record
    import transformers

    GPTConfig.gpt2(**SIZES)  # sizes that our own model takes, too
    model = theirs()
    weights = {name: parameter.tolist() for name, parameter in model.named_parameters()}
    record.save("gpt2", SIZES, [answers(model)], transformers=transformers.__version__, weights=weights)
