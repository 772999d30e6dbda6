"""The GPT against `transformers`, and the properties that every choice of its parts must keep."""

import ast
import contextlib
import importlib.util
import itertools
import json
import re
from functools import partial
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, lesson_path, notices
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm_lib import check, training, widgets
from slm_lib.blocks import (
    ACTIVATIONS,
    GPT,
    MLP,
    NORMS,
    Block,
    GPTConfig,
    count_flops,
    count_memory,
    count_parameters,
)
from slm_lib.embeddings import POSITIONS

ROOT = Path(__file__).parents[1]
LESSON = lesson_path("blocks")

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


# --- counting ---------------------------------------------------------------------------------------------------------

CHOICES = list(itertools.product(NORMS, POSITIONS, ACTIVATIONS, (True, False), (True, False)))


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
def test_every_parameter_is_counted(design):
    for norm, position, activation, bias, tie in CHOICES:
        choices = {"norm": norm, "position": position, "activation": activation, "bias": bias, "tie_weights": tie}
        config = design(**SIZES, **choices)
        assert sum(count_parameters(config).values()) == GPT(config).n_parameters, choices


def test_parameters_are_counted_where_they_sit():
    model = GPT(GPTConfig.gpt2(**SIZES, tie_weights=False))
    found = dict.fromkeys(count_parameters(model.config), 0)
    homes = {"embedding.token": "token embedding", "embedding.place": "positions", "head": "head"}
    for name, parameter in model.named_parameters():
        inside = next((part for part in ("attention", "mlp", "norm") if f".{part}" in f".{name}"), "")
        part = next((home for start, home in homes.items() if name.startswith(start)), inside)
        found["norms" if part == "norm" else part] += parameter.numel()
    assert found == count_parameters(model.config)


def test_gpt2_has_the_parameters_that_it_is_known_for():
    small = GPTConfig.gpt2(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    large = GPTConfig.gpt2(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600)
    assert [sum(count_parameters(config).values()) for config in (small, large)] == [124_439_808, 1_557_611_200]


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("length", [12, 5])
def test_flops_are_those_that_torch_counts(design, activation, length):
    config = design(**SIZES, activation=activation)
    model, ids = GPT(config), torch.randint(11, (3, length))
    counted = []
    for backward in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(ids).sum()
            if backward:
                loss.backward()
        counted.append(counter.get_total_flops())
    forward = ids.numel() * sum(count_flops(config, length).values())
    assert counted == [forward, 3 * forward]
    assert count_flops(config) == count_flops(config, config.block_size)


def kept_for_backward(model, ids):
    """Bytes of the tensors, weights aside, that a forward pass with its loss keeps."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    return loss, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("n_layer, n_embd, activation", [(1, 32, "gelu"), (3, 64, "gelu_tanh"), (2, 48, "swiglu")])
def test_memory_is_what_torch_keeps(n_layer, n_embd, activation):
    sizes = {"vocab_size": 65, "block_size": 16, "n_layer": n_layer, "n_head": 4, "n_embd": n_embd}
    config = GPTConfig.gpt2(**sizes, activation=activation)
    model, expected = GPT(config), count_memory(config, batch_size=8)
    loss, kept = kept_for_backward(model, torch.randint(65, (8, 16)))
    assert kept == pytest.approx(expected["activations"], rel=0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    loss.backward()
    optimizer.step()
    assert expected["weights"] == sum(p.nbytes for p in model.parameters())
    assert expected["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert expected["Adam's moments"] == sum(t.nbytes for t in moments)


def test_the_estimate_of_activations_is_near_for_modern_too():
    config = GPTConfig.modern(vocab_size=65, block_size=32, n_layer=4, n_head=4, n_embd=64)
    _, kept = kept_for_backward(GPT(config), torch.randint(65, (8, 32)))
    assert 1 <= kept / count_memory(config, 8)["activations"] <= 1.5


# --- what transformers answered, stored -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_reference():
    path = ROOT / "benchmarks" / "gpt2_reference.py"
    spec = importlib.util.spec_from_file_location("gpt2_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stored_answers_are_those_of_the_installed_transformers(gpt2_reference):
    stored = json.loads((ROOT / "results" / "gpt2" / "result.json").read_text(encoding="utf-8"))
    model = gpt2_reference.theirs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(stored["weights"][name], dtype=torch.float64))
    assert set(stored["weights"]) == {name for name, _ in model.named_parameters()}
    answers = gpt2_reference.answers(model)
    for name, value in stored["rows"][0].items():
        torch.testing.assert_close(torch.tensor(answers[name]), torch.tensor(value), atol=1e-12, rtol=0)
    assert min(abs(parameter).max() for parameter in model.parameters()) > 0.01


# --- the lesson -------------------------------------------------------------------------------------------------------

LONG_WORK = re.compile(
    r"\bends\b|lab_training\(|\blab\b|first_race|\bablations\b|removed|shapes|designs|gains|at_zero|draw_maps"
)


@pytest.fixture(scope="module")
def lesson():
    """The names of the lesson; of the cells that train, or read what was trained, only what they define."""
    names = {}
    for source in itertools.takewhile(lambda source: "def model_of" not in source, code_cells(LESSON)):
        nodes, long = ast.parse(source).body, LONG_WORK.search(source)
        kept = [node for node in nodes if not long or isinstance(node, ast.FunctionDef | ast.ClassDef)]
        with contextlib.chdir(LESSON.parent):
            exec(compile(ast.Module(kept, []), "lesson", "exec"), names)
    names["plt"].close("all")
    return names


def definitions():
    """The functions of the lesson alone, with its imports and the tables that they read."""
    kinds, tables = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef, {"bends_by_hand", "parts"}
    names = {}
    for source in code_cells(LESSON):
        for node in ast.parse(source).body:
            targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AugAssign) else [])
            if isinstance(node, kinds) or {ast.unparse(target) for target in targets} & tables:
                exec(compile(ast.Module([node], []), "lesson", "exec"), names)
    return names


def test_the_readers_gpt_equals_transformers_in_logits_and_gradients():
    model = randomised(GPTConfig.gpt2(**SIZES))
    theirs, pairs, turned = transformers_twin(model)
    hand = definitions()
    weights = {name: parameter.detach().tolist() for name, parameter in theirs.named_parameters()}
    w = {name: tensor.requires_grad_() for name, tensor in hand["translated"](weights).items()}
    w["head.weight"] = w["embedding.token.weight"]
    ids = torch.randint(11, (3, 12))
    mine, twin = hand["gpt_by_hand"](ids, w, model.config), theirs(ids).logits
    torch.testing.assert_close(mine, twin, atol=1e-9, rtol=0)
    for logits in (mine, twin):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    named = dict(theirs.named_parameters())
    for there, here in pairs:
        expected = named[there].grad.T if there in turned else named[there].grad
        torch.testing.assert_close(w[here].grad, expected, atol=1e-9, rtol=0)


def off(function):
    """The same, off by a millionth, or by one where it counts."""

    def answer(*args, **kwargs):
        right = function(*args, **kwargs)
        return {key: value + 1 for key, value in right.items()} if isinstance(right, dict) else right * 1.000001

    return answer


# What a proof reads, and how to break it: the library's things, and the outside references that stand in for them.
BREAKS = {
    "relu2(along)": lambda names: patch.dict(names, relu2=off(names["relu2"])),
    "ACTIVATIONS[name](along)": lambda names: patch.dict(
        names, ACTIVATIONS={name: off(bend) for name, bend in ACTIVATIONS.items()}),
    "mlp(x_six)": lambda names: patch.object(MLP, "forward", off(MLP.forward)),
    "block(x_in)": lambda names: patch.object(Block, "forward", off(Block.forward)),
    "model(ids)": lambda names: patch.object(GPT, "forward", off(GPT.forward)),
    "count_parameters(": lambda names: patch.dict(names, count_parameters=off(count_parameters)),
    "count_flops(": lambda names: patch.dict(names, count_flops=off(count_flops)),
    "count_memory(": lambda names: patch.dict(names, count_memory=off(count_memory)),
    "GPT(config).parameters()": lambda names: patch.dict(names, GPT=lambda config: nn.Linear(2, 2)),
    "F.layer_norm(": lambda names: patch.object(F, "layer_norm", off(F.layer_norm)),
    "F.rms_norm(": lambda names: patch.object(F, "rms_norm", off(F.rms_norm)),
    "F.cross_entropy(": lambda names: patch.object(F, "cross_entropy", off(F.cross_entropy)),
    "layer(noise)": lambda names: patch.object(nn.Dropout, "forward", off(nn.Dropout.forward)),
    "theirs[": lambda names: patch.dict(
        names, theirs={**names["theirs"], **{key: (torch.tensor(names["theirs"][key]) + 1e-6).tolist()
                                             for key in ("logits", "gradient")}}),
    "flops_by_torch(": lambda names: patch.dict(names, flops_by_torch=lambda *args, **kwargs: 1),
    "make_optimizer(": lambda names: patch.object(
        training, "make_optimizer", lambda model, config: torch.optim.SGD(model.parameters(), 0.1)),
}  # fmt: skip


def notices_broken(source, names, breaking):
    with breaking(names):
        return notices(source, dict(names))


def test_each_proof_fails_when_the_library_is_broken(monkeypatch):
    monkeypatch.chdir(LESSON.parent)
    names, caught = {}, set()
    sources = code_cells(LESSON)
    last = max(i for i, source in enumerate(sources) if "check.same(" in source)
    for source in sources[: last + 1]:
        if "check.same(" in source:
            read = {name for name in BREAKS if name in source}
            here = {name for name in read if notices_broken(source, names, BREAKS[name])}
            assert here, f"no broken thing is noticed by this proof:\n{source}"
            caught |= here
        if not LONG_WORK.search(source) and "widgets." not in source:
            exec(source, names)
            names["plt"].close("all")
    assert caught == set(BREAKS)


# --- its exercises ----------------------------------------------------------------------------------------------------


def in_a_row(x, norm, attention, mlp):
    x = x + attention(norm(x))
    return x + mlp(norm(x))


def parallel_without_residual(x, norm, attention, mlp):
    return attention(norm(x)) + mlp(norm(x))


def parallel_without_norm(x, norm, attention, mlp):
    return x + attention(x) + mlp(x)


def parallel_of_the_normed(x, norm, attention, mlp):
    return norm(x) + attention(norm(x)) + mlp(norm(x))


def widest(total):
    def answer(budget, n_layer, vocab_size, block_size):
        return max((C for C in range(8, 1000, 8) if total(C, n_layer, vocab_size, block_size) <= budget), default=0)

    return answer


def parameters_of(C, n_layer, vocab_size, block_size):
    return n_layer * (12 * C * C + 13 * C) + (vocab_size + block_size + 2) * C


width_without_tables = widest(lambda C, L, V, T: 12 * L * C * C)
width_with_an_own_head = widest(lambda C, L, V, T: parameters_of(C, L, V, T) + V * C)


def width_one_step_too_far(*budget_and_shape):
    return widest(parameters_of)(*budget_and_shape) + 8


def width_at_least_eight(*budget_and_shape):
    return widest(parameters_of)(*budget_and_shape) or 8


def rms_backward(stretch=True, shift=False, with_eps=True, summed=True):
    def answer(upstream, x, weight, eps=1e-5):
        root = (x.square().mean(-1, keepdim=True) + (eps if with_eps else 0.0)).sqrt()
        x_hat, g = x / root, upstream * weight
        g_x = g - (g.mean(-1, keepdim=True) if shift else 0.0)
        g_x = g_x - (x_hat * (g * x_hat).mean(-1, keepdim=True) if stretch else 0.0)
        g_weight = upstream * x_hat
        return g_x / root, g_weight.flatten(0, -2).sum(0) if summed else g_weight

    return answer


def diagnosis(**changes):
    """The right diagnosis with some letters changed."""
    deal = check.graders(LESSON)["deal"]()
    return lambda: {**deal, **changes}


def letters_of(*faults):
    deal = check.graders(LESSON)["deal"]()
    return [next(letter for letter, fault in deal.items() if fault == wanted) for wanted in faults]


def swapped(one, other):
    first, second = letters_of(one, other)
    return diagnosis(**{first: other, second: one})


WRONG = {
    "my_parallel_block": {
        "must read what attention reads": in_a_row,
        "goes on as it was": parallel_without_residual,
        "reads the normalised stream": parallel_without_norm,
        "add to x": parallel_of_the_normed,
    },
    "my_width": {
        "do the tables count": width_without_tables,
        "would fit": width_with_an_own_head,
        "is too wide": width_one_step_too_far,
        "the answer is 0": width_at_least_eight,
    },
    "my_rms_norm_backward": {
        "a part along x": rms_backward(stretch=False),
        "do not take off the mean": rms_backward(shift=True),
        "its gradient over B and T": rms_backward(summed=False),
        "upstream times the normalised x": rms_backward(with_eps=False),
    },
    "my_diagnosis": {
        "weight right of the diagonal": swapped("mask off by one", "targets not shifted"),
        "nearly one-hot before any": swapped("no positions", "no scaling"),
        "is not one of the seven names": diagnosis(A="a bad day"),
        "name a fault for each of the letters": lambda: {"A": "sound"},
    },
}


def test_the_exercises_are_graded():
    assert_graded("blocks", {name: list(answers.values()) for name, answers in WRONG.items()})


def test_the_graders_explain(capsys):
    graders = check.graders(LESSON)
    for name, answers in WRONG.items():
        for words, answer in answers.items():
            verdict = check.exercise(answer, graders[f"grade_{name.removeprefix('my_')}"])
            assert verdict.startswith("not yet") and words in verdict, (name, words, verdict)
    capsys.readouterr()
    assert check.exercise(diagnosis(), graders["grade_diagnosis"]) == "right"
    printed = capsys.readouterr().out
    assert all(tell_tale in printed for tell_tale in graders["FAULTS"].values())


# --- its panels -------------------------------------------------------------------------------------------------------


def changes_with(panel, **values):
    before = panel.image.value
    panel.set(**values)
    assert panel.status.value == "" and panel.image.value not in (b"", before), values


def test_the_parameters_panel_moves(lesson):
    sizes = {"n_layer": widgets.slider(1, 48, 4), "n_embd": widgets.slider(32, 1024, 128, 32)}
    sizes |= {"vocab_size": widgets.slider(64, 100_000, 64, log=True), "design": widgets.choice(["gpt2", "modern"])}
    parts = widgets.Panel(lesson["draw_parts"], **sizes)
    for values in ({"n_layer": 48}, {"n_embd": 32}, {"vocab_size": 50_000}, {"design": "modern"}):
        changes_with(parts, **values)


def test_the_maps_panel_moves(lesson):
    lesson = {**lesson, "lab": {letter: (model, []) for letter, model in lesson["untrained"].items()}}
    draw = FunctionType(lesson["draw_maps"].__code__, lesson)
    panel = widgets.Panel(draw, text=widgets.entry("aaa"), layer=widgets.slider(1, 3, 1))
    for values in ({"layer": 3}, {"text": "Come, good fellow, come and hear me out"}, {"text": ""}):
        changes_with(panel, **values)


VARIANTS = ["no residual", "no norm", "no MLP", "no attention", "no position", "1 head", "post-norm"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_race_panel_trains_each_variant(lesson, variant):
    train = partial(lesson["race"], steps=3)
    choices = {"variant": widgets.choice([variant]), "seed": widgets.slider(0, 9, 0)}
    knobs = {"learning_rate": widgets.slider(3e-4, 3e-2, 3e-3, log=True), "n_layer": widgets.slider(1, 8, 2)}
    panel = widgets.RunPanel(train, lesson["draw_race"], None, **choices, **knobs)
    panel.run_button.click()
    assert panel.wait(60) and panel.status.value.startswith("done") and panel.progress.value == 1
    assert set(panel.result) == {"baseline", variant}
    assert panel.result["baseline"] != panel.result[variant] and all(len(v) == 3 for v in panel.result.values())
