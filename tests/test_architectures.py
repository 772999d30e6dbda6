"""Other architectures against torch's own modules, what each may see, how they learn, and their lesson."""

import contextlib
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, execute_but_for_long_work, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slm_lib import architectures, generation, training, widgets
from slm_lib.architectures import (
    CELLS,
    KINDS,
    UNASKED,
    CrossAttention,
    CrossBlock,
    Encoder,
    EncoderDecoder,
    FillTrainer,
    Given,
    PairTrainer,
    Recurrent,
    SelfAttention,
    Sizes,
    WindowMLP,
    answering,
    asked,
    build,
    hide,
)  # fmt: skip
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.training import TrainingConfig

SHAPE = {"vocab_size": 7, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}
LETTERS = CharTokenizer("\nabcdef")


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def ids(*shape, V=7, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# --- recurrent cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
def test_a_recurrent_model_is_one_cell_stepped_along_the_text(kind):
    """Against torch's single-step cells, which are other code than its whole-text ones; with gradients."""
    torch.manual_seed(0)
    model = Recurrent(Sizes(kind, 7, 6, 5)).double()
    cell = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](5, 5).double()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({name: getattr(model.cell, f"{name}_l0").detach() for name in names})
    text, state, logits = ids(3, 9), None, []
    for t in range(9):
        state = cell(model.embedding(text[:, t]), state)
        logits.append(model.head(state[0] if kind == "lstm" else state))
    stepped = torch.stack(logits, 1)
    close(stepped, model(text))
    slope = torch.randn_like(stepped)
    mine = torch.autograd.grad(model(text), model.embedding.weight, slope)[0]
    close(mine, torch.autograd.grad(stepped, model.embedding.weight, slope)[0])


@pytest.mark.parametrize("kind", CELLS)
@given(cut=st.integers(1, 11))
def test_reading_goes_on_from_a_state(kind, cut):
    torch.manual_seed(0)
    model, text = Recurrent(Sizes(kind, 7, 6, 5)).double(), ids(2, 12)
    first, state = model.read(text[:, :cut])
    rest, _ = model.read(text[:, cut:], state)
    close(torch.cat([first, rest], 1), model(text))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_keep_bias_opens_the_gate_that_holds_on_to_the_state(kind):
    torch.manual_seed(0)
    kept = Recurrent(Sizes(kind, 7, 6, 5, keep_bias=80.0)).double()
    full, empty = torch.randn(1, 1, 5).double(), torch.zeros(1, 1, 5).double()
    with torch.no_grad():
        if kind == "lstm":  # no news: the cell stays as it is
            kept.cell.bias_hh_l0[:5] -= 80
        _, after = kept.read(ids(1, 50), (empty, full) if kind == "lstm" else full)
    close(after[1] if kind == "lstm" else after, full)


def test_an_rnn_has_no_gate_to_open():
    torch.manual_seed(0)
    one = Recurrent(Sizes("rnn", 7, 6, 5, keep_bias=50.0))
    torch.manual_seed(0)
    assert torch.equal(one.cell.bias_hh_l0, Recurrent(Sizes("rnn", 7, 6, 5)).cell.bias_hh_l0)


# --- the window -------------------------------------------------------------------------------------------------------


def test_a_window_is_a_convolution_followed_by_an_mlp():
    torch.manual_seed(0)
    model, text = WindowMLP(Sizes("mlp", 7, 6, 4, window=3)).double(), ids(2, 9)
    kernel = model.up.weight.view(16, 3, 4).transpose(1, 2)  # (hidden, C, W)
    x = F.pad(model.embedding(text).transpose(1, 2), (2, 0))
    close(model(text), model.head(torch.tanh(F.conv1d(x, kernel, model.up.bias).transpose(1, 2))))


@given(st.integers(1, 6), st.integers(0, 11), st.integers(0, 50))
def test_a_window_ends_where_it_ends(window, place, seed):
    torch.manual_seed(seed)
    model, text = WindowMLP(Sizes("mlp", 7, 6, 4, window=window)).double(), ids(1, 12, seed=seed)
    other = text.clone()
    other[0, place] = (text[0, place] + 1) % 7
    moved = (model(other) != model(text)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(place, min(place + window, 12)))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [3_000, 62_000])
def test_build_comes_as_near_as_a_width_can(kind, wanted):
    model = build(kind, 65, 64, wanted)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count - wanted) / wanted < (0.25 if kind == "transformer" else 0.08)
    if kind != "transformer":
        assert count == model.config.n_parameters
        for width in (model.config.n_embd - 1, model.config.n_embd + 1):
            assert abs(Sizes(kind, 65, 64, width).n_parameters - wanted) >= abs(count - wanted)
    assert model(ids(2, 64, V=65)).shape == (2, 64, 65)


@pytest.mark.parametrize(("ask", "words"), [
    (lambda: Sizes("cnn", 7, 6, 5), "kind 'cnn' is not known here: choose one of mlp, rnn, lstm, gru"),
    (lambda: Sizes("transformer", 7, 6, 5), "kind 'transformer'"),
    (lambda: Sizes("rnn", 7, 6, 0), "n_embd 0 must be a whole number"),
    (lambda: Sizes("mlp", 7, 6, 5, window=2.5), "window 2.5"),
    (lambda: Sizes("mlp", True, 6, 5), "vocab_size True"),
    (lambda: Sizes("lstm", 7, 6, 5, keep_bias=float("nan")), "keep_bias nan"),
    (lambda: Recurrent(Sizes("mlp", 7, 6, 5)), "has no state: build it as WindowMLP"),
    (lambda: build("rnn", 65, 64, 10), "no rnn has about 10 parameters, the nearest has"),
    (lambda: build("transformer", 65, 64, 10**10), "ask for those"),
    (lambda: build("gpt", 65, 64, 10_000), "kind 'gpt' is not known"),
    (lambda: CrossAttention(9, 2), "n_embd 9 is not divisible by n_head 2"),
    (lambda: EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4)(ids(2, 4)), "give a source of 4, and after it 1 to 6"),
    (lambda: EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4)(ids(2, 11)), "11 ids: give a source of 4"),
    (lambda: Given(EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4), ids(3)), r"a source has 4 ids, this one \(3,\): fill"),
    (lambda: hide(ids(2, 3), 0.0, 7), "share 0.0 must lie above 0"),
    (lambda: hide(ids(2, 3), 1.5, 7), "share 1.5"),
    (lambda: answering(ids(3, 4), ids(2, 5)), "3 sources and 2 targets: give one target for each"),
    (lambda: answering(ids(0, 4), ids(0, 5)), "0 sources and 0 targets"),
    (lambda: FillTrainer(Encoder(GPTConfig.gpt2(**SHAPE)), ids(5), TrainingConfig(), 6), "block_size 6 does not fit"),
])  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


# --- the one loop, the one evaluator, generation ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_scored_and_read_like_a_gpt(kind):
    text = LETTERS.encode("abcdef\n" * 60)
    torch.manual_seed(0)
    model = build(kind, 7, 14, 3_000)
    before = training.evaluate(model, text)
    config = TrainingConfig(batch_size=8, max_iters=60, warmup_iters=5, learning_rate=0.02)
    twin = copy.deepcopy(model)
    history = training.train(model, text, config, progress=False)
    assert training.train(twin, text, config, progress=False).losses == history.losses
    assert training.evaluate(model, text) < 0.3 < before
    assert generation.generate(model, LETTERS, "abc", 11, temperature=0) == "def\nabcdef\n"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "transformer"])
def test_only_the_transformer_ends_at_its_block_size(kind):
    assert training.evaluate(build(kind, 7, 8, 3_000), ids(40), block_size=40) > 0
    with pytest.raises(ValueError, match="longer than block_size 8"):
        training.evaluate(build("transformer", 7, 8, 3_000), ids(40), block_size=40)


# --- the three shapes -------------------------------------------------------------------------------------------------


def test_self_attention_equals_torch_without_a_mask():
    torch.manual_seed(0)
    mine, theirs = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.load_state_dict({"in_proj_weight": mine.qkv.weight, "in_proj_bias": mine.qkv.bias,
                            "out_proj.weight": mine.output.weight, "out_proj.bias": mine.output.bias})  # fmt: skip
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    out, weights = theirs(x, x, x, average_attn_weights=False)
    close(mine(x), out)
    close(mine.weights(x), weights)


def test_cross_attention_equals_torch_forward_and_backward():
    torch.manual_seed(0)
    mine, theirs = CrossAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key_value.bias]))
        theirs.out_proj.weight.copy_(mine.output.weight)
        theirs.out_proj.bias.copy_(mine.output.bias)
    x, source = (torch.randn(2, T, 12, dtype=torch.float64, requires_grad=True) for T in (5, 9))
    out, weights = theirs(x, source, source, average_attn_weights=False)
    close(mine(x, source), out)
    close(mine.weights(x, source), weights)
    slope = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(o, (x, source), slope) for o in (mine(x, source), out)), strict=True):
        close(a, b)


def torchs_layers(layer_class, blocks):
    """torch's own layers, with the norm first, and the weights of our blocks."""
    gelu, layers = partial(F.gelu, approximate="tanh"), []
    for block in blocks:
        layer = layer_class(8, 2, 32, dropout=0.0, activation=gelu, batch_first=True, norm_first=True).double()
        parts = {"self_attn.in_proj_": block.attention.qkv, "self_attn.out_proj.": block.attention.output,
                 "linear1.": block.mlp.up, "linear2.": block.mlp.down, "norm1.": block.norm1}  # fmt: skip
        if isinstance(block, CrossBlock):
            both = nn.Linear(8, 24).double()
            both.weight.data = torch.cat([block.cross.query.weight.data, block.cross.key_value.weight.data])
            both.bias.data = torch.cat([block.cross.query.bias.data, block.cross.key_value.bias.data])
            parts |= {"multihead_attn.in_proj_": both, "multihead_attn.out_proj.": block.cross.output,
                      "norm2.": block.norm, "norm3.": block.norm2}  # fmt: skip
        else:
            parts |= {"norm2.": block.norm2}
        weights = {f"{name}weight": part.weight for name, part in parts.items()}
        layer.load_state_dict(weights | {f"{name}bias": part.bias for name, part in parts.items()})
        layers.append(layer.train())  # torch's fast path for evaluation is other code
    return layers


def test_an_encoder_equals_torchs_transformer_encoder():
    torch.manual_seed(0)
    model, text = Encoder(GPTConfig.gpt2(**SHAPE)).double(), ids(3, 6)
    x = model.embedding(text)
    for layer in torchs_layers(nn.TransformerEncoderLayer, model.blocks):
        x = layer(x)
    close(model(text), model.head(model.norm(x)))


def test_an_encoder_decoder_equals_torchs():
    torch.manual_seed(0)
    model, source, written = EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4).double(), ids(3, 4), ids(3, 5, seed=1)
    found = model.encoder.embedding(source)
    for layer in torchs_layers(nn.TransformerEncoderLayer, model.encoder.blocks):
        found = layer(found)
    found, x = model.encoder.norm(found), model.decoder.embedding(written)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for layer in torchs_layers(nn.TransformerDecoderLayer, model.decoder.blocks):
        x = layer(x, found, tgt_mask=future)
    close(model(torch.cat([source, written], 1)), model.decoder.head(model.decoder.norm(x)))


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
def test_the_encoder_is_the_gpt_but_for_the_mask(design):
    torch.manual_seed(0)
    gpt, encoder = GPT(design(**SHAPE)), Encoder(design(**SHAPE))
    encoder.load_state_dict(gpt.state_dict())
    assert [type(block.attention) for block in encoder.blocks] == [SelfAttention] * 2
    for module in (gpt, encoder):
        nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(1))
        for block in module.blocks:
            nn.init.normal_(block.attention.output.weight, generator=torch.Generator().manual_seed(2))
    text = ids(1, 6)
    other = text.clone()
    other[0, 5] = (text[0, 5] + 1) % 7
    assert torch.equal(gpt(other)[0, :5], gpt(text)[0, :5])
    assert (encoder(other) != encoder(text)).any(-1).all()


@given(st.integers(0, 9), st.integers(0, 50))
def test_what_is_written_later_moves_nothing_before_it_and_the_source_moves_all(place, seed):
    torch.manual_seed(seed)
    model, text = EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4).double(), ids(1, 10, seed=seed)
    other = text.clone()
    other[0, place] = (text[0, place] + 1) % 7
    moved = (model(other) - model(text)).abs().amax(-1)[0] > 1e-15
    assert moved.tolist() == [place < 4 or t >= place - 4 for t in range(6)]


def test_dropout_works_in_both_new_attentions_and_rests_in_evaluation():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    for attention, args in ((SelfAttention(8, 2, dropout=0.5), (x,)), (CrossAttention(8, 2, dropout=0.5), (x, x))):
        assert not torch.equal(attention.train()(*args), attention(*args))
        assert torch.equal(attention.eval()(*args), attention(*args))


def test_first_weights_are_small_and_first_loss_is_uniform():
    torch.manual_seed(0)
    model = EncoderDecoder(GPTConfig.gpt2(**{**SHAPE, "n_embd": 64}), 4)
    assert 0.015 < model.decoder.blocks[0].cross.query.weight.std() < 0.025
    x, y = answering(ids(50, 4), ids(50, 6, seed=1))
    assert abs(asked(model, x, y).mean().item() - math.log(7)) < 0.1


# --- their tasks ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.01, 1.0), st.integers(0, 99))
def test_hiding_hides_some_of_each_row_and_asks_for_these_alone(B, T, share, seed):
    text = ids(B, T, seed=seed)
    shown, targets = hide(text, share, 7, torch.Generator().manual_seed(seed))
    hidden = shown == 7
    assert hidden.any(1).all()
    assert torch.equal(shown[~hidden], text[~hidden]) and torch.equal(targets[hidden], text[hidden])
    assert (targets[~hidden] == UNASKED).all()
    again = hide(text, share, 7, torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], shown)


def test_hiding_keeps_to_its_share():
    shown, _ = hide(ids(200, 100), 0.15, 7, torch.Generator().manual_seed(0))
    assert abs((shown == 7).double().mean() - 0.15) < 0.01


def test_a_fill_trainer_learns_to_fill_from_both_sides():
    """In "ab", "bc", "ca" the middle of three is known from either side, the first and last from the other."""
    text = LETTERS.encode("abc" * 100)
    torch.manual_seed(0)
    model = Encoder(GPTConfig.modern(**{**SHAPE, "vocab_size": 8, "n_embd": 16}))
    config = TrainingConfig(batch_size=16, max_iters=300, warmup_iters=10, learning_rate=0.01)
    history = FillTrainer(model, text, config, mask_id=7).run(progress=False)
    assert sum(history.losses[-20:]) / 20 < 0.1
    x, y = hide(text[:60].view(10, 6), 0.15, 7, torch.Generator().manual_seed(5))
    assert asked(model, x, y).mean() < 0.1


def test_a_pair_trainer_learns_to_write_backwards_and_generation_writes_it():
    sources = ids(400, 4, V=6) + 1
    torch.manual_seed(0)
    model = EncoderDecoder(GPTConfig.gpt2(**{**SHAPE, "block_size": 4, "n_embd": 32}), 4)
    config = TrainingConfig(batch_size=32, max_iters=400, warmup_iters=20, learning_rate=0.01)
    pairs = answering(sources, sources.flip(1))
    losses = PairTrainer(model, *pairs, config).run(progress=False).losses
    assert losses[0] > 1.5 > 0.1 > sum(losses[-20:]) / 20
    written = generation.generate(Given(model, LETTERS.encode("abcd")), LETTERS, "\n", 4, temperature=0)
    assert written == "dcba"
    assert asked(model, *pairs).shape == (1600,)


def test_targets_that_are_filled_up_do_not_count():
    sources, targets = ids(3, 4), ids(3, 6, seed=1)
    targets[:, 4:] = UNASKED
    shown, wanted = answering(sources, targets, start_id=5)
    assert torch.equal(shown[:, :4], sources) and (shown[:, 4] == 5).all()
    assert torch.equal(shown[:, 5:9], targets[:, :4])
    assert shown.min() >= 0 and torch.equal(wanted, targets)
    torch.manual_seed(0)
    model = EncoderDecoder(GPTConfig.gpt2(**SHAPE), 4)
    nats = asked(model, shown, wanted)
    assert nats.shape == (12,)
    mean = F.cross_entropy(model(shown).flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(nats.mean(), mean)
    trainer = PairTrainer(model, shown, wanted, TrainingConfig(batch_size=3, max_iters=1))
    assert trainer.draw()[0].shape == (3, 10) and trainer.update() > 0


def test_asking_leaves_the_mode_of_a_model():
    model = Encoder(GPTConfig.gpt2(**{**SHAPE, "dropout": 0.5})).train()
    x, y = ids(2, 6), ids(2, 6)
    assert torch.equal(asked(model, x, y), asked(model, x, y)) and model.training


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------

LESSON = lesson_path("architectures")
LONG_WORK = ("quickest(", "step_time", "waits", "fig, ax", "widgets.", "carry_live(kind)", "blank_by_hand(begins")


def off(kind, name="forward"):
    """Make a method of a class a little wrong."""
    right = getattr(kind, name)

    def broken(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        return (found[0] * 1.000001, found[1]) if isinstance(found, tuple) else found * 1.000001

    return kind, name, broken


def another_draw(kind):
    right = kind.draw

    def broken(self):
        x, y = right(self)
        return x, y.roll(1, 0)

    return kind, "draw", broken


METHODS = {
    "WindowMLP": off(WindowMLP),
    "Recurrent": off(Recurrent, "read"),
    "Sizes": (Sizes, "n_parameters", property(lambda self, right=Sizes.n_parameters.fget: right(self) + 1)),
    "SelfAttention": off(SelfAttention),
    "Encoder": (Encoder, "forward", lambda self, ids: GPT.forward(self, ids) * 1.000001),
    "CrossAttention": off(CrossAttention),
    "CrossBlock": off(CrossBlock),
    "EncoderDecoder": off(EncoderDecoder),
    "Given": (Given, "forward", lambda self, ids, right=Given.forward: -right(self, ids)),
    "FillTrainer": another_draw(FillTrainer),
    "PairTrainer": another_draw(PairTrainer),
}
FUNCTIONS = {
    "build": lambda kind, V, T, n, window=8: build(kind, V, T, n + 5000, window),
    "hide": lambda *args: hide(*args)[::-1],
    "answering": lambda *args: answering(*args)[::-1],
    "asked": lambda *args: asked(*args) * 1.000001,
}


def short_run(self, callback=None, progress=True):
    for _ in range(min(10, self.config.max_iters)):
        self.update()
    self.model.eval()
    return self.history


def walk():
    """Run the lesson with training cut short and long work left out; yield each cell, and the names before it ran."""
    names, evaluate = {}, training.evaluate

    def short_evaluate(model, ids, *args, **kwargs):
        return evaluate(model, ids[:1000], *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(LESSON.parent):
        patched.setenv("SLM_CORPUS", "playhouse")
        patched.setattr(training.Trainer, "run", short_run)
        patched.setattr(training, "evaluate", short_evaluate)
        for source in code_cells(LESSON):
            yield source, names
            long = any(mark in source for mark in LONG_WORK) and "check.same(" not in source
            execute_but_for_long_work(source, names, long, AssertionError, NameError)  # claims about trained models


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson, with models that are hardly trained."""
    return [names for _, names in walk()][-1]


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in walk():
        if "check.same(" not in source:
            continue
        used = {name for name in {*METHODS, *FUNCTIONS} if name in source}
        used -= {"build"} if "count_flops" in source else set()  # proved is what another lesson opened
        here = set()
        for name in used & set(METHODS):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(*METHODS[name])
                here |= {name} if notices(source, {**names}) else set()
        here |= {name for name in used & set(FUNCTIONS) if notices(source, {**names, name: FUNCTIONS[name]})}
        assert here or not used, f"no broken thing is noticed by this proof:\n{source}"
        caught |= here
    assert caught == {*METHODS, *FUNCTIONS}


def louder(right):
    return lambda self, x: right(self, 1.000001 * x)


def test_each_cell_by_hand_notices_another_cell():
    """The proofs against torch.nn's cells fail for a cell that hears its letters a little louder."""
    noticed = set()
    for source, names in walk():
        for name in ("RNN", "LSTM", "GRU"):
            if f"torch.nn.{name}" in source and "check.same(" in source:
                right = getattr(nn, name).forward
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(getattr(nn, name), "forward", louder(right))
                    assert notices(source, {**names}), source
                noticed.add((name, "gradient" in source))
    assert noticed == {(name, gradient) for name in ("RNN", "LSTM", "GRU") for gradient in (False, True)}


# --- its exercises ----------------------------------------------------------------------------------------------------


def without_the_root(share, steps):
    return torch.logit(torch.tensor(share, dtype=torch.float64)).item()


def divided_by_the_steps(share, steps):
    return torch.logit(torch.tensor(1 - (1 - share) / steps, dtype=torch.float64)).item()


def the_gate_itself(share, steps):
    return share ** (1 / steps)


def unit(keep=lambda f: 1 - f, sees=lambda f, h: f * h, first=0):
    def answer(x, W, U, b):
        h, states, C = torch.zeros(U.shape[1], dtype=x.dtype), [], U.shape[1]
        gate, news = (slice(0, C), slice(C, 2 * C))[:: -1 if first else 1]
        for letter in x:
            f = torch.sigmoid(W[gate] @ letter + U[gate] @ h + b[gate])
            h = keep(f) * h + f * torch.tanh(W[news] @ letter + U[news] @ sees(f, h) + b[news])
            states.append(h)
        return torch.stack(states)

    return answer


def unit_that_keeps_what_is_new(x, W, U, b):
    return unit(keep=lambda f: f)(x, W, U, b)


def unit_whose_news_sees_all(x, W, U, b):
    return unit(sees=lambda f, h: h)(x, W, U, b)


def unit_with_halves_exchanged(x, W, U, b):
    return unit(first=1)(x, W, U, b)


def only_the_last_state(x, W, U, b):
    return unit()(x, W, U, b)[-1]


def without_the_state(model, ids, size):
    return torch.cat([model.read(piece[None])[0][0] for piece in ids.split(size)])


def all_at_once(model, ids, size):
    return model(ids[None])[0]


def whole_pieces_only(model, ids, size):
    state, logits = None, []
    for i in range(len(ids) // size):
        said, state = model.read(ids[None, i * size : (i + 1) * size], state)
        logits.append(said[0])
    return torch.cat(logits) if logits else torch.zeros(0, 6)


def again_from_the_beginning(model, ids, size):
    logits = []
    for i in range(0, len(ids), size):
        state = None
        for piece in ids[: i + size].split(size):
            said, state = model.read(piece[None], state)
        logits.append(said[0])
    return torch.cat(logits)


def only_the_triangle(length, prefix):
    return torch.ones(length, length).tril().bool()


def the_prefix_alone_sees_it(length, prefix):
    table = torch.zeros(length, length, dtype=torch.bool)
    table[:prefix, :prefix] = True
    table[prefix:, prefix:] = torch.ones(length - prefix, length - prefix).tril().bool()
    return table


def turned_round(length, prefix):
    places = torch.arange(length)
    return ((places <= places[:, None]) | (places < prefix)).T


def one_place_too_many(length, prefix):
    places = torch.arange(length)
    return (places <= places[:, None]) | (places <= prefix)


def corrupting(hidden=0.8, mixed=0.9, most=None, ask=lambda ids, chosen, shown: torch.where(chosen, ids, -100)):
    def answer(ids, chosen, mask_id, vocab_size, generator):
        dart = torch.rand(ids.shape, generator=generator)
        random_ids = torch.randint(most or vocab_size, ids.shape, generator=generator)
        shown = torch.where(dart < hidden, mask_id, torch.where(dart < mixed, random_ids, ids))
        shown = torch.where(chosen, shown, ids)
        return shown, ask(ids, chosen, shown)

    return answer


def hides_all(*args):
    return corrupting(hidden=1.0)(*args)


def never_leaves_one(*args):
    return corrupting(mixed=1.0)(*args)


def asks_for_the_changed_alone(*args):
    return corrupting(ask=lambda ids, chosen, shown: torch.where(shown != ids, ids, -100))(*args)


def draws_few_symbols(*args):
    return corrupting(most=10)(*args)


def draws_with_another_generator(ids, chosen, mask_id, vocab_size, generator):
    return corrupting()(ids, chosen, mask_id, vocab_size, None)


def test_graders():
    assert_graded("architectures", {
        "my_keep_bias": [without_the_root, divided_by_the_steps, the_gate_itself],
        "my_cell": [
            unit_that_keeps_what_is_new, unit_whose_news_sees_all, unit_with_halves_exchanged, only_the_last_state,
        ],
        "my_read": [without_the_state, all_at_once, whole_pieces_only, again_from_the_beginning],
        "my_table": [only_the_triangle, the_prefix_alone_sees_it, turned_round, one_place_too_many],
        "my_corrupt": [
            hides_all, never_leaves_one, asks_for_the_changed_alone, draws_few_symbols, draws_with_another_generator,
        ],
    })  # fmt: skip


# --- its panels -------------------------------------------------------------------------------------------------------


def test_the_panel_of_reach_follows_its_sliders(lesson):
    panel = widgets.Panel(
        lesson["draw_reach"], kind=widgets.choice(["lstm", "gru", "rnn"]),
        keep_bias=widgets.slider(-2.0, 6.0, 1.0, 0.25), scale=widgets.slider(0.2, 4.0, 1.0, 0.1),
        seed=widgets.slider(0, 9, 0),
    )  # fmt: skip
    for change in ({"keep_bias": 5.0}, {"kind": "gru"}, {"kind": "rnn"}, {"scale": 3.0}, {"seed": 4}):
        before = panel.image.value
        panel.set(**change)
        assert panel.status.value == "" and panel.image.value != before, (change, panel.status.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_panel_of_the_race_trains_what_it_is_told(lesson, kind):
    panel = widgets.RunPanel(
        lesson["race_live"], lesson["draw_race"], kind=kind, parameters=widgets.slider(4_000, 400_000, 8_000, log=True),
        steps=widgets.slider(5, 3_000, 5), learning_rate=widgets.slider(1e-4, 0.1, 1e-2, log=True), seed=0,
    )  # fmt: skip
    lesson["smooth"] = {"gru": [2.0] * 281}
    panel.run_button.click()
    assert panel.wait(60)
    assert panel.status.value.startswith("done in"), panel.status.value
    name, losses = panel.result
    assert name == kind and len(losses) == 5 and panel.image.value


# --- its tables -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 48), st.integers(0, 99))
def test_a_carried_letter_stands_where_it_is_said_to(lesson, distance, seed):
    shown, targets = lesson["texts_to_carry"](3, torch.Generator().manual_seed(seed), distance)
    assert torch.equal(shown[:, 48 - distance], targets[:, -1]) and (shown[:, -1] == 0).all()
    assert ((shown >= 1) & (shown <= 8)).sum(1).tolist() == [1, 1, 1] and (targets[:, :-1] == UNASKED).all()


def test_recall_places_repeat_what_the_window_holds(lesson):
    scenes = lesson["playhouse"].scenes(5_000, seed=3)
    text = lesson["playhouse"].text(scenes)
    found = lesson["recall_places"](scenes, [10, 30, 58])
    places = [place for bin in found for place in bin]
    literal = [place for place in places if text[place : place + 3] in text[place - 64 : place]]
    assert len(places) > 10 and len(literal) > len(places) / 2  # the others agree with what was said, or answer it


def test_public_names_all_have_docstrings():
    for name in dir(architectures):
        thing = getattr(architectures, name)
        if getattr(thing, "__module__", "") == "slm_lib.architectures" and not name.startswith("_"):
            assert thing.__doc__, name
