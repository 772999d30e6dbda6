"""The optimizers against torch.optim, at gradients of every size; then the lesson: its proofs, graders and panels."""

import ast
import contextlib
import math
import re
from functools import partial
from unittest.mock import patch

import pytest
import torch
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slm_lib import adam, check, checkpoints, training, widgets
from slm_lib.blocks import GPT, GPTConfig

SHAPES = [(3, 4), (5,), (2, 3, 2)]
SCALES = [1e-8, 1e-5, 1e-3, 1.0, 1e3]
TWINS = {
    "SGD": (adam.SGD, torch.optim.SGD, {"lr": 0.1}),
    "SGD, decay": (adam.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "Momentum": (adam.Momentum, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Momentum, decay": (adam.Momentum, torch.optim.SGD, {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1}),
    "Nesterov": (adam.Nesterov, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Nesterov, decay": (
        adam.Nesterov, torch.optim.SGD, {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    "RMSProp": (adam.RMSProp, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.99}),
    "RMSProp, decay": (adam.RMSProp, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}),
    "Adam": (adam.Adam, torch.optim.Adam, {"lr": 0.01}),
    "Adam, other betas": (adam.Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.95), "eps": 1e-6}),
    "Adam, decay": (adam.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": (adam.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "AdamW, decay": (adam.AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.3}),
}  # fmt: skip


def twins(name):
    """Our optimizer and torch's, each on weights of its own that are equal, and those weights."""
    ours, theirs, settings = TWINS[name]
    mine = {key: value for key, value in settings.items() if key != "nesterov"}
    sides = []
    for make, chosen in ((ours, mine), (theirs, settings)):
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in SHAPES]
        sides.append((make(weights, **chosen), weights))
    return sides


def walk(optimizer, weights, gradients):
    """Take a step for each of the gradients given for all weights; return how far each weight went."""
    starts = [weight.detach().clone() for weight in weights]
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return [weight.detach() - start for weight, start in zip(weights, starts, strict=True)]


def gradients_of(scale, steps, seed=0):
    """Gradients of one size, noisy about a mean, that stop for a while: zeros come in the middle, and in one row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        drawn = [scale * (0.3 + torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]
        drawn[0][0] = 0.0
        found.append([gradient * (0.0 if steps // 3 < step < steps // 2 else 1.0) for gradient in drawn])
    return found


def assert_same_walk(mine, theirs):
    """Equal in every weight to a billionth of the longest way, although the ways may be as short as 1e-9."""
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * max(b.abs().max().item(), 1e-300))


# --- equal to torch.optim ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TWINS)
def test_a_thousand_steps_equal_torchs(name, scale):
    gradients = gradients_of(scale, 1_000)
    mine, theirs = (walk(*side, gradients) for side in twins(name))
    assert_same_walk(mine, theirs)
    assert all(way.abs().max() > 0 for way in mine)


@pytest.mark.parametrize("name", TWINS)
def test_a_thousand_zero_gradients_equal_torchs(name):
    gradients = [[torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]] * 1_000
    mine, theirs = (walk(*side, gradients) for side in twins(name))
    assert_same_walk(mine, theirs)
    assert all(way.isfinite().all() for way in mine)
    if "decay" not in name and name != "AdamW":
        assert all((way == 0).all() for way in mine)


RIGHT = adam.Adam.direction


class EpsilonUnderTheRoot(adam.Adam):
    """Adam with the mistake that only small gradients show."""

    def direction(self, gradient, state, group):
        (beta1, beta2), eps = group["betas"], group["eps"]
        RIGHT(self, gradient, state, group)
        count = state["step"].item()
        return state["exp_avg"] / (1 - beta1**count) / (state["exp_avg_sq"] / (1 - beta2**count) + eps).sqrt()


class EpsilonBeforeCorrection(adam.Adam):
    """Adam whose epsilon is added before the mean square is put right: half as bad, as easily made."""

    def direction(self, gradient, state, group):
        (beta1, beta2), eps = group["betas"], group["eps"]
        RIGHT(self, gradient, state, group)
        count = state["step"].item()
        root = (state["exp_avg_sq"].sqrt() + eps) / (1 - beta2**count) ** 0.5
        return state["exp_avg"] / (1 - beta1**count) / root


@pytest.mark.parametrize("broken", [EpsilonUnderTheRoot, EpsilonBeforeCorrection])
def test_a_misplaced_epsilon_is_seen_at_small_gradients(broken, monkeypatch):
    monkeypatch.setitem(TWINS, "Adam", (broken, *TWINS["Adam"][1:]))
    with pytest.raises(AssertionError):
        test_a_thousand_steps_equal_torchs("Adam", 1e-8)


def test_adam_at_a_steady_gradient_of_epsilons_size_makes_half_steps():
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = adam.Adam([weight], lr=0.01)
    (way,) = walk(optimizer, [weight], [[torch.full((1,), 1e-8, dtype=torch.float64)]] * 100)
    assert way.item() == pytest.approx(-0.01 * 100 / 2, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TWINS)), st.floats(-9, 3), st.integers(0, 1_000))
def test_any_gradients_move_both_alike(name, exponent, seed):
    gradients = gradients_of(10.0**exponent, 30, seed)
    assert_same_walk(*(walk(*side, gradients) for side in twins(name)))


# --- groups, gradients that are missing, decay ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_groups_with_their_own_hyperparameters(name):
    ours, theirs, settings = TWINS[name]
    mine = {key: value for key, value in settings.items() if key != "nesterov"}
    ways = []
    for make, chosen in ((ours, mine), (theirs, settings)):
        weights = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
        groups = [{"params": weights[:1], "lr": 0.3, "weight_decay": 0.5}, {"params": iter(weights[1:])}]
        optimizer = make(groups, **chosen)
        optimizer.param_groups[1]["lr"] = 0.05  # as a schedule does
        ways.append(walk(optimizer, weights, gradients_of(0.1, 50)))
    assert_same_walk(*ways)


@pytest.mark.parametrize("name", TWINS)
def test_a_parameter_without_gradient_stays_and_is_not_counted(name):
    gradients = gradients_of(0.1, 40)
    for step in gradients[:20]:
        step[1] = None
    for step in gradients:
        step[2] = None
    mine, theirs = (walk(*side, gradients) for side in twins(name))
    assert_same_walk(mine[:2], theirs[:2])
    assert (mine[2] == 0).all()


def test_zero_grad_forgets():
    weight = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    optimizer = adam.SGD([weight, other])
    optimizer.zero_grad(set_to_none=False)
    assert (weight.grad == 0).all() and other.grad is None
    optimizer.zero_grad()
    assert weight.grad is None


def test_decay_in_the_loss_and_outside_of_it_differ():
    ends = {}
    for kind in (adam.Adam, adam.AdamW):
        weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = kind([weights], lr=0.01, weight_decay=0.1)
        noise = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for drawn in noise * torch.tensor([1.0, 0.1]):
            weights.grad = drawn
            optimizer.step()
        ends[kind] = weights.detach()
    assert ends[adam.Adam][1] < ends[adam.Adam][0] - 0.1  # the loss's decay is divided by the size of the gradient
    assert ends[adam.Adam].std() > 3 * ends[adam.AdamW].std()


# --- Muon -------------------------------------------------------------------------------------------------------------


def matrix(m, n, seed=0, scale=1.0):
    return scale * torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16), (48, 192)])
def test_an_orthogonalised_matrix_has_the_singular_vectors_of_the_svd(shape):
    given, found = matrix(*shape), adam.orthogonalise(matrix(*shape))
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    inner = left.mT @ found @ right.mT  # (r, m) @ (m, n) @ (n, r) = (r, r)
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-9, rtol=0)
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3
    assert values.max() / values.min() > 1.1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_size_of_a_matrix_does_not_matter(scale):
    torch.testing.assert_close(adam.orthogonalise(matrix(6, 9, scale=scale)), adam.orthogonalise(matrix(6, 9)))


def test_a_zero_matrix_stays_zero():
    assert (adam.orthogonalise(torch.zeros(3, 5)) == 0).all()


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_a_stack_is_orthogonalised_matrix_by_matrix(shape):
    matrices = [matrix(*shape, seed, scale) for seed, scale in ((1, 1.0), (2, 1e-3), (3, 1e4))]
    stack = torch.stack([*matrices, torch.zeros(shape, dtype=torch.float64)])
    for single, found in zip(stack, adam.orthogonalise(stack), strict=True):
        torch.testing.assert_close(found, adam.orthogonalise(single), atol=1e-12, rtol=0)
    torch.testing.assert_close(adam.orthogonalise(stack.view(2, 2, *shape)).view_as(stack), adam.orthogonalise(stack))


def test_muon_moves_many_matrices_as_one_optimizer_for_each_would():
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]
    ways = []
    for together in (True, False):
        weights = [matrix(*shape, seed).requires_grad_() for seed, shape in enumerate(shapes)]
        groups = [{"params": weights[:2], "lr": 0.1}, {"params": weights[2:], "momentum": 0.8}]
        settings = {"adjust_lr_fn": "match_rms_adamw"}
        alone = [adam.Muon([{**group, "params": [w]}], **settings) for group in groups for w in group["params"]]
        optimizer = adam.Muon(groups, **settings) if together else adam.Together(*alone)
        gradients = [[matrix(*shape, 100 * step + i) for i, shape in enumerate(shapes)] for step in range(20)]
        for step in gradients[5:9]:
            step[2] = None
        ways.append(walk(optimizer, weights, gradients))
    assert_same_walk(*ways)
    assert all(way.abs().max() > 1e-3 for way in ways[0])


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 12), (12, 48)])
def test_muon_equals_torchs_within_bfloat16(shape, adjust):
    """torch orthogonalises in bfloat16, which has 8 bits: errors of a few hundredths in numbers of about one."""
    Theirs = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    ways = []
    for make in (adam.Muon, Theirs):
        weight = matrix(*shape, seed=1).requires_grad_()
        optimizer = make([weight], lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn=adjust)
        ways.append(walk(optimizer, [weight], [[matrix(*shape, seed=2)]])[0])
    rms = ways[1].square().mean().sqrt()
    assert (ways[0] - ways[1]).square().mean().sqrt() < 0.02 * rms
    assert (ways[0] - ways[1]).abs().max() < 0.06 * ways[1].abs().max()


def test_muon_without_bfloat16_equals_torchs_to_the_last_digits(monkeypatch):
    Theirs = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    ways = []
    for make in (adam.Muon, Theirs):
        weight = matrix(12, 30, seed=1).requires_grad_()
        optimizer = make([weight], lr=0.1, weight_decay=0.2, momentum=0.9)
        ways.append(walk(optimizer, [weight], [[matrix(12, 30, seed=2 + step)] for step in range(100)]))
    assert_same_walk(*ways)


def test_muon_takes_its_learning_rate_as_a_tensor_too():
    ways = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        weight = matrix(12, 30, seed=1).requires_grad_()
        optimizer = adam.Muon([weight], weight_decay=0.2)
        optimizer.param_groups[0]["lr"] = rate
        ways.append(walk(optimizer, [weight], [[matrix(12, 30, seed=2 + step)] for step in range(20)]))
    assert_same_walk(*ways)
    assert ways[0][0].abs().max() > 1e-3


def test_muon_takes_matrices_alone():
    with pytest.raises(ValueError, match=r"matrices, not shape \(5,\): give the rest to AdamW"):
        adam.Muon([torch.zeros(3, 4), torch.zeros(5)])
    with pytest.raises(ValueError, match="choose original or match_rms_adamw"):
        adam.Muon([torch.zeros(3, 4)], adjust_lr_fn="twice")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (adam.SGD, {"lr": -0.1}, "lr -0.1 makes no sense"),
        (adam.SGD, {"lr": math.nan}, "lr nan makes no sense"),
        (adam.SGD, {"lr": math.inf}, "lr inf makes no sense"),
        (adam.SGD, {"lr": "fast"}, "lr 'fast' makes no sense"),
        (adam.SGD, {"lr": True}, "lr True makes no sense"),
        (adam.SGD, {"weight_decay": -1.0}, "weight_decay -1.0 makes no sense"),
        (adam.Momentum, {"momentum": 1.0}, "momentum 1.0 makes no sense: it must be a number and lie in 0..1"),
        (adam.Nesterov, {"momentum": -0.1}, "momentum -0.1 makes no sense"),
        (adam.RMSProp, {"alpha": 1.5}, "alpha 1.5 makes no sense"),
        (adam.RMSProp, {"eps": -1e-8}, "eps -1e-08 makes no sense"),
        (adam.Adam, {"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\) makes no sense"),
        (adam.Adam, {"betas": (0.9,)}, "must be two numbers"),
        (adam.AdamW, {"betas": 0.9}, "betas 0.9 must be two numbers"),
        (adam.Muon, {"momentum": 2}, "momentum 2 makes no sense"),
    ],
)
def test_hyperparameters_without_sense_are_refused(make, settings, words):
    weight = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=words) as caught:
        make([weight], **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        make([{"params": [weight], **settings}])


def test_parameters_without_sense_are_refused():
    weight = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="the list of parameters is empty"):
        adam.SGD([])
    with pytest.raises(TypeError, match="str is no parameter"):
        adam.SGD(["weight"])
    with pytest.raises(ValueError, match="give the ones it came from"):
        adam.SGD([weight * 2])
    with pytest.raises(ValueError, match="name each once"):
        adam.SGD([{"params": weight}, {"params": [weight]}])
    with pytest.raises(ValueError, match="name each once"):
        adam.Together(adam.SGD([weight]), adam.AdamW([weight]))
    with pytest.raises(NotImplementedError, match="an optimizer needs a rule"):
        weight.grad = torch.ones(2)
        adam.Optimizer([weight]).step()


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_a_state_goes_round(name):
    gradients = gradients_of(0.1, 40)
    (one, weights), _ = twins(name)
    walk(one, weights, gradients[:20])
    saved = one.state_dict()
    (other, copies), _ = twins(name)
    for group in other.param_groups:
        group["lr"] = 77.0
    for copy, weight in zip(copies, weights, strict=True):
        copy.data.copy_(weight.data)
    other.load_state_dict(saved)
    for mine, theirs in zip(walk(one, weights, gradients[20:]), walk(other, copies, gradients[20:]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", TWINS)
def test_what_torch_began_can_be_continued_and_the_other_way_round(name):
    gradients = gradients_of(0.1, 40)
    (ours, my_weights), (theirs, their_weights) = twins(name)
    walk(ours, my_weights, gradients[:20])
    walk(theirs, their_weights, gradients[:20])
    mine, others = ours.state_dict(), theirs.state_dict()
    for entry in mine["state"].values():
        entry.setdefault("step", torch.tensor(20.0))  # torch's RMSprop counts its steps, and does not use the count
    ours.load_state_dict(others)
    groups = [{**b, **a} for a, b in zip(mine["param_groups"], others["param_groups"], strict=True)]
    theirs.load_state_dict({"state": mine["state"], "param_groups": groups})
    assert_same_walk(*(walk(*side, gradients[20:]) for side in ((ours, my_weights), (theirs, their_weights))))


def test_a_state_of_other_groups_is_refused():
    one, other = adam.SGD([torch.zeros(2)]), adam.SGD([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"belongs to other groups: here they have \[1\] parameters"):
        one.load_state_dict(other.state_dict())


# --- in training ------------------------------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig.gpt2(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8))


def split_by_kind(model):
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
    return inner, [p for p in model.parameters() if all(p is not q for q in inner)]


MAKE = {
    "SGD": lambda model: adam.SGD(model.parameters()),
    "Momentum": lambda model: adam.Momentum(model.parameters()),
    "Nesterov": lambda model: adam.Nesterov(model.parameters()),
    "RMSProp": lambda model: adam.RMSProp(model.parameters()),
    "Adam": lambda model: adam.Adam(model.parameters()),
    "AdamW": lambda model: adam.AdamW(model.parameters()),
    "Muon": lambda model: adam.Together(
        adam.Muon(split_by_kind(model)[0], adjust_lr_fn="match_rms_adamw"), adam.AdamW(split_by_kind(model)[1])),
}  # fmt: skip
RECIPE = training.TrainingConfig(batch_size=4, max_iters=30, warmup_iters=3, learning_rate=0.01)
PERIODIC = torch.arange(7).repeat(40)


def trained(make, steps=30):
    model = tiny()
    trainer = training.Trainer(model, PERIODIC, RECIPE, optimizer=make(model))
    return trainer, [trainer.update() for _ in range(steps)]


@pytest.mark.parametrize("name", MAKE)
def test_it_trains_in_the_librarys_loop(name):
    trainer, losses = trained(MAKE[name])
    assert losses[-1] < losses[0] - (0.01 if name == "SGD" else 0.02)
    assert all(group["lr"] == training.learning_rate_at(29, RECIPE) for group in trainer.optimizer.param_groups)


def test_adamw_in_training_is_torchs():
    def groups(model):
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        return [
            {"params": matrices, "weight_decay": RECIPE.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]

    _, mine = trained(lambda model: adam.AdamW(groups(model), betas=(RECIPE.beta1, RECIPE.beta2)))
    _, theirs = trained(lambda model: training.make_optimizer(model, RECIPE))
    assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_it_goes_through_the_files_of_a_checkpoint(name):
    trainer, _ = trained(MAKE[name], steps=5)
    files = checkpoints.pack_optimizer(trainer.optimizer, {})
    ends = []
    for optimizer in (trainer.optimizer, MAKE[name](trainer.model)):
        model = tiny()
        trainer.model.load_state_dict(model.state_dict())
        if optimizer is not trainer.optimizer:
            checkpoints.unpack_optimizer(files, optimizer)
        optimizer.step()
        ends.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone())
    assert torch.equal(*ends)


def test_together_is_saved_and_loaded_as_one():
    trainer, _ = trained(MAKE["Muon"], steps=5)
    saved = {**trainer.optimizer.state_dict()}
    assert len(saved["state"]) == len(list(trainer.model.parameters()))
    fresh = MAKE["Muon"](trainer.model)
    fresh.load_state_dict(saved)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    ends = []
    for optimizer in (trainer.optimizer, fresh):
        for parameter, value in zip(trainer.model.parameters(), before, strict=True):
            parameter.data.copy_(value)
        optimizer.step()
        ends.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone())
    assert torch.equal(*ends)


def with_torchs_adamw(model):
    inside, rest = split_by_kind(model)
    return adam.Together(adam.Muon(inside), torch.optim.AdamW(rest, weight_decay=0.1, fused=True))


def test_together_takes_torchs_optimizers_too():
    ours, _ = trained(lambda model: adam.Together(
        adam.Muon(split_by_kind(model)[0]), adam.AdamW(split_by_kind(model)[1], weight_decay=0.1)))  # fmt: skip
    theirs, _ = trained(with_torchs_adamw)
    assert theirs.history.losses == pytest.approx(ours.history.losses, abs=1e-4)
    assert len(theirs.optimizer.state) == len(list(theirs.model.parameters()))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 12))
def test_together_with_torchs_goes_on_from_a_file_as_if_it_had_never_stopped(steps):
    straight, losses = trained(with_torchs_adamw, steps=steps + 8)
    begun, _ = trained(with_torchs_adamw, steps=steps)
    files = checkpoints.pack_optimizer(begun.optimizer, {})
    begun.optimizer = with_torchs_adamw(begun.model)
    checkpoints.unpack_optimizer(files, begun.optimizer)
    assert [begun.update() for _ in range(8)] == losses[steps:]
    for mine, other in zip(begun.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, other)


# --- the lesson -------------------------------------------------------------------------------------------------------

LESSON = lesson_path("adam")
LONG_WORK = re.compile(r"trained_for\(100\)|losses_with\(make,|steps_until\(s,|first_duel|milliseconds\(lambda")


def run_lesson(before_cell=lambda source, names: None):
    """The names of the lesson; of cells that train for long, or read what those made, only what they define."""
    names, kinds = {}, ast.FunctionDef | ast.ClassDef
    with contextlib.chdir(LESSON.parent):
        for source in code_cells(LESSON):
            before_cell(source, names)
            defined = ast.Module([node for node in ast.parse(source).body if isinstance(node, kinds)], [])
            exec(compile(defined, "lesson", "exec"), names)
            if not LONG_WORK.search(source) and "check.exercise(" not in source:
                with contextlib.suppress(NameError):
                    exec(source, names)
    names["plt"].close("all")
    return names


@pytest.fixture(scope="module")
def lesson():
    return run_lesson()


def slightly_off(step):
    """The same optimizer, whose steps are too long by a millionth."""

    def answer(self, weight, gradient, state, group):
        before = weight.clone()
        step(self, weight, gradient, state, group)
        weight += 1e-6 * (weight - before) + 1e-9

    return answer


def broken(kind):
    return lambda: patch.object(kind, "update", slightly_off(kind.update))


# What each proof of the lesson reads, and how to break it.
BREAKS = {
    "adam.SGD": broken(adam.SGD),
    "adam.Momentum": broken(adam.Momentum),
    "adam.Nesterov": lambda: patch.object(adam.Nesterov, "direction", adam.Momentum.direction),
    "adam.RMSProp": broken(adam.RMSProp),
    "adam.Adam,": lambda: patch.object(adam.Adam, "direction", EpsilonUnderTheRoot.direction),
    "adam.AdamW": broken(adam.AdamW),
    "adam.Optimizer": lambda: patch.object(adam.Optimizer, "step", lambda self: None),
    "adam.orthogonalise": lambda: patch.object(adam, "NEWTON_SCHULZ", (3.4445, -4.7750, 2.0316)),
    "adam.Muon": broken(adam.Muon),
    "adam.Together": lambda: patch.object(adam.Together, "step", lambda self: self.optimizers[0].step()),
    "torch.optim.Adam,": lambda: patch.object(torch.optim, "Adam", EpsilonUnderTheRoot),
    "clip_grad_norm_": lambda: patch.object(nn.utils, "clip_grad_norm_", lambda parameters, limit: None),
}


def notices_broken(source, names, breaking):
    with breaking():
        return notices(source, dict(names))


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()

    def try_to_break(source, names):
        if "check.same(" not in source or "loops and tensors" in source:
            return
        names = {**names, "seen": matrix(8, 4)}  # for the gradient of a model that is not trained here
        assert not notices(source, dict(names)), f"this proof fails without anything broken:\n{source}"
        here = {name for name in BREAKS if name in source and notices_broken(source, names, BREAKS[name])}
        assert here, f"no broken thing is noticed by this proof:\n{source}"
        caught.update(here)

    run_lesson(try_to_break)
    assert caught == set(BREAKS)


@pytest.mark.parametrize("wrong", [EpsilonUnderTheRoot, EpsilonBeforeCorrection])
def test_the_proof_of_adam_sees_each_misplaced_epsilon(lesson, wrong):
    (proof,) = (source for source in code_cells(LESSON) if "walked(adam.Adam, w0, scale" in source)
    with patch.object(adam.Adam, "direction", wrong.direction):
        assert notices(proof, dict(lesson))
    assert not notices(proof, dict(lesson))


# --- its exercises ----------------------------------------------------------------------------------------------------


def lion(mix="beta1", keep="beta2", fresh_memory=False, decay_in_sign=False, in_place=False, no_sign=False):
    def answer(weight, gradient, memory, lr, beta1, beta2, decay):
        betas = {"beta1": beta1, "beta2": beta2}
        kept = betas[keep] * memory + (1 - betas[keep]) * gradient
        base = kept if fresh_memory else memory
        direction = betas[mix] * base + (1 - betas[mix]) * gradient
        direction = direction + decay * weight if decay_in_sign else direction
        direction = direction if no_sign else direction.sign()
        shrink = 1.0 if decay_in_sign else 1 - lr * decay
        if in_place:
            weight *= shrink
            weight -= lr * direction
            return weight, kept
        return shrink * weight - lr * direction, kept

    return answer


def suspects(**changes):
    deal = check.graders(LESSON)["deal_suspects"]()
    return lambda: {**deal, **changes}


def swapped(one, other):
    deal = check.graders(LESSON)["deal_suspects"]()
    letter = {name: letter for letter, name in deal.items()}
    return suspects(**{letter[one]: other, letter[other]: one})


WRONG = {
    "my_rates": {
        "look at the steepest axis": lambda curvatures: (2 / min(curvatures), 2 / (max(curvatures) + min(curvatures))),
        "still converges beyond": lambda curvatures: (1 / max(curvatures), 1 / max(curvatures)),
        "does not converge": lambda curvatures: (2 / max(curvatures), 2 / max(curvatures)),
        "one near it leaves": lambda curvatures: (2 / max(curvatures), 1 / max(curvatures)),
    },
    "my_lion": {
        "leave the tensors": lion(in_place=True),
        "exactly one learning rate": lion(no_sign=True),
        "is β₂ of the old one": lion(keep="beta1"),
        "mixes with β₁": lion(mix="beta2"),
        "from before this step": lion(fresh_memory=True),
        "only decays": lion(decay_in_sign=True),
    },
    "my_noise_scale": {
        "less one": lambda g: g.var(0, correction=0).sum() / g.mean(0).square().sum(),
        "yours is 0.894": lambda g: g.var(0).sum() / g.mean(0).norm(),
        "so 0.4": lambda g: g.std(0).sum() / g.mean(0).square().sum(),
        "then divide": lambda g: (g.var(0) / g.mean(0).square()).mean() if g.shape[1] != 2 else 0.4,
    },
    "my_suspects": {
        "one and a half gradients": swapped("Momentum", "Nesterov"),
        "far shorter than 1": swapped("Adam with ε under the root", "Adam without correction"),
        "is not one of the seven": suspects(A="Adagrad"),
        "name an optimizer for each": lambda: {"A": "SGD"},
    },
}


def test_the_exercises_are_graded():
    assert_graded("adam", {name: list(answers.values()) for name, answers in WRONG.items()})


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, answers in WRONG.items() for words in answers])
def test_the_graders_explain(name, words):
    grader = check.graders(LESSON)[f"grade_{name.removeprefix('my_')}"]
    verdict = check.exercise(WRONG[name][words], grader)
    assert verdict.startswith("not yet") and words in verdict, verdict


# --- its panels -------------------------------------------------------------------------------------------------------


def changes_with(panel, **values):
    before = panel.image.value
    panel.set(**values)
    assert panel.status.value == "" and panel.image.value not in (b"", before), (values, panel.status.value)


def test_the_paths_panel_moves(lesson):
    panel = widgets.Panel(
        lesson["draw_path"], surface=widgets.choice(list(lesson["SURFACES"])),
        optimizer=widgets.choice(lesson["OPTIMIZERS"]), learning_rate=widgets.slider(1e-3, 1.0, 0.02, log=True),
        beta1=widgets.slider(0.0, 0.99, 0.8, 0.01), beta2=widgets.slider(0.5, 0.999, 0.9, 0.001),
        noise=widgets.slider(0.0, 5.0, 0.0),
    )  # fmt: skip
    for surface in list(lesson["SURFACES"])[1:]:
        changes_with(panel, surface=surface)
    for optimizer in lesson["OPTIMIZERS"][1:]:
        changes_with(panel, optimizer=optimizer)
    for values in ({"learning_rate": 1.0}, {"beta1": 0.0}, {"beta2": 0.999}, {"noise": 5.0}, {"learning_rate": 1e-3}):
        changes_with(panel, **values)


def test_a_path_that_flies_away_is_drawn_too(lesson):
    panel = widgets.Panel(lesson["draw_path"], surface="bent valley", optimizer="SGD", beta1=0.9, beta2=0.9, noise=0.0,
                          learning_rate=widgets.slider(1e-3, 1.0, 0.01, log=True))  # fmt: skip
    changes_with(panel, learning_rate=1.0)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Nesterov", "RMSProp", "Adam", "AdamW", "Muon"])
def test_the_duel_trains_each_optimizer(lesson, name):
    panel = widgets.RunPanel(
        partial(lesson["duel"], steps=3), lesson["draw_duel"], None, first=widgets.choice(["SGD"]), first_rate=1.0,
        second=widgets.choice([name]), second_rate=1e-2, warmup_iters=widgets.slider(0, 100, 0),
        seed=widgets.slider(0, 9, 0),
    )  # fmt: skip
    panel.run_button.click()
    assert panel.wait(60) and panel.status.value.startswith("done") and panel.progress.value == 1
    one, other = panel.result.values()
    assert len(one) == len(other) == 3 and one[0] == other[0] and one[2] != other[2]


def test_the_suspects_panel_moves(lesson):
    panel = widgets.Panel(lesson["draw_suspects"], gradients=widgets.entry("1 1 1 0 0 0"))
    for gradients in ("0.001 0.001", "1 -1 1 -1", "1 0 0 0 0 0 0 0 0 0 0 0 0 0"):
        changes_with(panel, gradients=gradients)
    for gradients in ("", "one two"):
        panel.set(gradients=gradients)
        assert "numbers" in panel.status.value
