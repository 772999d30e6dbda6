"""The GPT against `transformers`, and the properties that every choice of its parts must keep."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from slm_lib.blocks import ACTIVATIONS, GPT, MLP, NORMS, GPTConfig
from slm_lib.embeddings import POSITIONS

SIZES = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}


def randomised(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every weight is random, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def transformers_twin(model: GPT):
    """`transformers`' GPT-2 with the weights of our `gpt2` design."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0)).double().eval()  # fmt: skip
    state = {"transformer.wte.weight": "embedding.token", "transformer.wpe.weight": "embedding.place"}
    pairs = [(name, f"{mine}.weight") for name, mine in state.items()]
    parts = {"ln_1": "norm1", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.output",
             "ln_2": "norm2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # fmt: skip
    for i, (there, here), kind in itertools.product(range(c.n_layer), parts.items(), ("weight", "bias")):
        pairs.append((f"transformer.h.{i}.{there}.{kind}", f"blocks.{i}.{here}.{kind}"))
    pairs += [(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")]
    mine, twin = dict(model.named_parameters()), dict(theirs.named_parameters())
    turned = {there for there, _ in pairs if ".c_" in there and there.endswith("weight")}  # Conv1D stores W transposed
    with torch.no_grad():
        for there, here in pairs:
            twin[there].copy_(mine[here].T if there in turned else mine[here])
    assert {there for there, _ in pairs} == set(twin)
    return theirs, pairs, turned


def test_gpt2_equals_transformers_in_logits_and_gradients():
    model = randomised(GPTConfig.gpt2(**SIZES))
    theirs, pairs, turned = transformers_twin(model)
    ids = torch.randint(11, (3, 12))
    losses = []
    for logits in (model(ids), theirs(ids).logits):
        losses.append((logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=1e-9, rtol=0)
    for _, loss in losses:
        loss.backward()
    mine, twin = dict(model.named_parameters()), dict(theirs.named_parameters())
    for there, here in pairs:
        expected = twin[there].grad.T if there in turned else twin[there].grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine[here].grad, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_later_token_leaves_earlier_logits_untouched(position, norm, activation):
    for design in (GPTConfig.gpt2, GPTConfig.modern):
        model = randomised(design(**SIZES, position=position, norm=norm, activation=activation))
        ids = torch.randint(11, (2, 12))
        changed = ids.clone()
        changed[:, 7] = (ids[:, 7] + 1) % 11
        before, after = model(ids), model(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7], atol=0, rtol=0)
        assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-9  # and every later one does look back


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
def test_a_new_model_guesses_almost_uniformly(design):
    torch.manual_seed(0)
    config = design(**{**SIZES, "n_embd": 64})
    ids = torch.randint(11, (8, 12))
    loss = F.cross_entropy(GPT(config)(ids).flatten(0, 1), torch.randint(11, (96,)))
    assert abs(loss - torch.log(torch.tensor(11.0))) < 0.05


def test_dropout_acts_in_training_only():
    model = randomised(GPTConfig.gpt2(**SIZES, dropout=0.5))
    ids = torch.randint(11, (1, 12))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_tied_weights_are_one_tensor_and_count_once():
    tied, untied = (GPT(GPTConfig.gpt2(**SIZES, tie_weights=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.token.weight
    assert untied.n_parameters - tied.n_parameters == 11 * 16


def test_zero_initialised_blocks_change_nothing_at_first():
    model = GPT(GPTConfig.modern(**SIZES))
    ids = torch.randint(11, (2, 12))
    x = model.embedding(ids)
    for block in model.blocks:
        x = block(x)
    assert torch.equal(x, model.embedding(ids)) and not model(ids).any()


def test_swiglu_costs_about_as_much_as_the_plain_mlp():
    plain, gated = (sum(p.numel() for p in MLP(96, kind).parameters()) for kind in ("gelu", "swiglu"))
    assert abs(gated / plain - 1) < 0.02


@pytest.mark.parametrize("wrong, words", [
    ({"n_embd": 15}, "not divisible by n_head"), ({"n_layer": 0}, "n_layer 0"), ({"n_head": -2}, "n_head -2"),
    ({"n_embd": 16.0}, "n_embd 16.0"), ({"dropout": 1.0}, "dropout 1.0"), ({"dropout": "much"}, "dropout 'much'"),
    ({"norm": "batch"}, "choose one of layer, rms"), ({"position": "gps"}, "choose one of"),
    ({"activation": "tanh"}, "choose one of"), ({"bias": 1}, "bias 1"), ({"n_embd": 10**7}, "parameters"),
    ({"block_size": 10**12}, "parameters"), ({"position": "rotary", "n_embd": 6, "n_head": 2}, "rotary"),
    ({"position": "sinusoidal", "n_embd": 15, "n_head": 1}, "sinusoidal"), ({"vocab_size": True}, "vocab_size True"),
])  # fmt: skip
def test_a_config_that_cannot_be_built_is_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig.gpt2(**{**SIZES, **wrong})


def test_a_context_beyond_block_size_is_refused():
    with pytest.raises(ValueError, match="longer than block_size 12"):
        GPT(GPTConfig.gpt2(**SIZES))(torch.zeros(1, 13, dtype=torch.long))
