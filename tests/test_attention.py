"""Attention against torch's own modules, forward and backward, what its options must do, and its lesson."""

import ast
import re

import pytest
import torch
import torch.nn.functional as F
from exercises import assert_graded, code_cells, lesson_path, notices
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slm_lib import attention, check, plot
from slm_lib.attention import CausalSelfAttention
from slm_lib.embeddings import rotary_table, rotate

OPTIONS = [{"rotary": rotary, "qk_norm": qk_norm} for rotary in (False, True) for qk_norm in (False, True)]


def twins():
    """The library's attention and torch.nn.MultiheadAttention with the same weights, and the mask that torch wants."""
    torch.manual_seed(0)
    mine = CausalSelfAttention(12, 3).double()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        mine.qkv.bias.normal_()
        mine.output.bias.normal_()
        theirs.in_proj_weight.copy_(mine.qkv.weight)
        theirs.in_proj_bias.copy_(mine.qkv.bias)
        theirs.out_proj.weight.copy_(mine.output.weight)
        theirs.out_proj.bias.copy_(mine.output.bias)
    return mine, theirs, torch.ones(7, 7, dtype=torch.bool).triu(1)


def test_equals_torch_multihead_attention():
    mine, theirs, future = twins()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    out, weights = theirs(x, x, x, attn_mask=future, average_attn_weights=False)
    torch.testing.assert_close(mine(x), out, atol=1e-12, rtol=0)
    torch.testing.assert_close(mine.weights(x), weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rotary", [False, True])
def test_bfloat16_on_a_processor_gives_the_same_to_its_rounding(rotary, dropout):
    """Under autocast the mixing takes another road; output and gradients stay near those of float32."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(32, 4, dropout=dropout, rotary=rotary, qk_norm=True).train(dropout > 0)
    x = torch.randn(3, 20, 32)
    found = []
    for lower in (False, True):
        torch.manual_seed(1)
        passes = 300 if dropout else 1  # dropout is drawn elsewhere in the two roads: their means are compared
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            out = torch.stack([layer(x).float() for _ in range(passes)]).mean(0)
        layer.zero_grad()
        out.square().sum().backward()
        found.append((out.detach(), layer.qkv.weight.grad.clone()))
    (out, gradient), (lower_out, lower_gradient) = found
    assert not torch.equal(out, lower_out)
    assert (out - lower_out).norm() < (0.1 if dropout else 0.02) * out.norm()
    assert (gradient - lower_gradient).norm() < (0.15 if dropout else 0.03) * gradient.norm()


def test_gradients_equal_those_of_torch_multihead_attention():
    mine, theirs, future = twins()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(2, 7, 12, dtype=torch.float64)
    ours = [x, mine.qkv.weight, mine.qkv.bias, mine.output.weight, mine.output.bias]
    torchs = [x, theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight, theirs.out_proj.bias]
    found = torch.autograd.grad(mine(x), ours, slope)
    expected = torch.autograd.grad(theirs(x, x, x, attn_mask=future, need_weights=False)[0], torchs, slope)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_sum_to_one_see_no_future_and_reproduce_forward_with_its_gradients(options):
    torch.manual_seed(1)
    module = CausalSelfAttention(12, 3, **options).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    weights = module.weights(x)
    assert weights.shape == (2, 3, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9).double(), atol=1e-12, rtol=0)
    assert (weights >= 0).all() and not weights.triu(1).any()
    value = module.qkv(x)[..., 24:].view(2, 9, 3, 4).transpose(1, 2)
    mixed = module.output((weights @ value).transpose(1, 2).reshape(2, 9, 12))
    torch.testing.assert_close(mixed, module(x), atol=1e-12, rtol=0)
    slope, leaves = torch.randn_like(mixed), [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, leaves, slope) for out in (mixed, module(x))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_weights_have_no_dropout():
    torch.manual_seed(0)
    module = CausalSelfAttention(8, 2, dropout=0.5).train()
    x = torch.randn(1, 6, 8)
    assert torch.equal(module.weights(x), module.weights(x)) and not torch.equal(module(x), module(x))


@given(st.integers(1, 8), st.sampled_from([(4, 1), (4, 2), (8, 4)]), st.sampled_from(OPTIONS), st.integers(0, 99))
def test_no_output_moves_when_a_later_row_changes(T, shape, options, seed):
    generator = torch.Generator().manual_seed(seed)
    if options["rotary"] and shape[0] // shape[1] % 2:
        return
    module = CausalSelfAttention(*shape, **options).double()
    x = torch.randn(1, T, shape[0], generator=generator).double()
    place = seed % T
    changed = x.clone()
    changed[:, place:] += torch.randn(1, T - place, shape[0], generator=generator).double()
    torch.testing.assert_close(module(x)[:, :place], module(changed)[:, :place], atol=1e-12, rtol=0)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
    torch.manual_seed(0)
    plain, normed = (CausalSelfAttention(8, 2, bias=False, qk_norm=qk).double() for qk in (False, True))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    for module, same in ((plain, False), (normed, True)):
        before = module(x)
        with torch.no_grad():
            module.qkv.weight[:16] *= 3  # queries and keys, not values
        assert torch.allclose(before, module(x), atol=1e-4) == same


def test_rotary_sees_distance_and_not_place():
    torch.manual_seed(0)
    attention = CausalSelfAttention(8, 2, rotary=True).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    # The same four vectors three places later, behind vectors that no query attends to, must mix alike.
    late = torch.cat([torch.zeros(1, 3, 8, dtype=torch.float64), x], dim=1)
    query, key, _ = attention.qkv(late).view(1, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    table = rotary_table(7, 4, torch.float64, torch.device("cpu"))
    scores = rotate(query, *table) @ rotate(key, *table).transpose(-1, -2)
    early_query, early_key, _ = attention.qkv(x).view(1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    table = rotary_table(4, 4, torch.float64, torch.device("cpu"))
    early = rotate(early_query, *table) @ rotate(early_key, *table).transpose(-1, -2)
    torch.testing.assert_close(scores[..., 3:, 3:], early, atol=1e-12, rtol=0)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="n_embd 10 is not divisible by n_head 3"):
        CausalSelfAttention(10, 3)


# --- the lesson: break a thing once, and each proof that rests on it fails --------------------------------------------

LESSON = lesson_path("attention")
LAST_PROOF = "logits of the model with peek(0)"


def off(function):
    """The function with its result a little off."""
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.000001


BREAKABLE = {
    "forward": (CausalSelfAttention, "forward", off(CausalSelfAttention.forward)),
    "weights": (CausalSelfAttention, "weights", off(CausalSelfAttention.weights)),
    "sdpa": (F, "scaled_dot_product_attention", off(F.scaled_dot_product_attention)),
    "softmax": (torch, "softmax", off(torch.softmax)),
    "rotate": (attention, "rotate", lambda x, *table: x),
    "rms_norm": (F, "rms_norm", lambda x, shape: x),
    "counter": (FlopCounterMode, "get_total_flops", lambda counter: 1),
}
# Some proofs compare two things made by hand; for these one of the two is broken.
BY_HAND = {
    "average_by_hand": lambda x: x.cumsum(0),
    "softmax_by_hand": lambda scores: scores.exp(),
    "weights_by_hand": lambda query, key, *rest: torch.ones(6, 6).double(),
    "loops_by_hand": lambda *parts: parts,
    "softmax_backward_by_hand": lambda weights, slope: weights * slope,
    "split_by_hand": lambda x, n_head: x.view(x.shape[0], n_head, x.shape[1], -1),
    "attend_by_hand": lambda query, key, value, **_: value,
}


def proofs():
    """Walk through the lesson, leaving out what takes long; yield each proof and the names that it can see."""
    sources = code_cells(LESSON)
    (last,) = [i for i, source in enumerate(sources) if LAST_PROOF in source]
    assert not any("check.same(" in source for source in sources[last + 1 :])
    names = {}
    for source in sources[: last + 1]:
        if "check.same(" in source:
            yield source, names
        elif re.search(r"seconds|bytes_kept|\bours\b", source):
            continue
        exec(source, names)
        names["plt"].close("all")


def noticed_by(source, names):
    """Which broken parts of the library a proof notices."""
    found = set()
    for name, broken in BREAKABLE.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*broken)
            if notices(source, dict(names), RuntimeError):
                found.add(name)
    return found


def test_each_proof_fails_when_something_is_broken():
    caught = set()
    for source, names in proofs():
        here = noticed_by(source, names)
        known = {name: broken for name, broken in BY_HAND.items() if name in names}
        by_hand = any(notices(source, {**names, name: broken}, RuntimeError) for name, broken in known.items())
        assert here or by_hand, f"no broken thing is noticed by this proof:\n{source}"
        caught |= here
    assert caught == set(BREAKABLE)


# --- the widgets of 05_attention --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson():
    """The lesson's imports and definitions, and the few values that its panels need; nothing is trained."""
    sources = code_cells(LESSON)
    kinds, names = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef, {}
    body = [node for source in sources for node in ast.parse(source).body if isinstance(node, kinds)]
    exec(compile(ast.Module(body, []), str(LESSON), "exec"), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(LESSON.parent)
        for start in ("play = ", "recipe = ", "trained, tokenizer"):
            (source,) = [source for source in sources if source.startswith(start)]
            exec(source, names)
    names["runs"] = {(1, 1): (None, [4.0, 3.0], None)}
    for call, name in {"widgets.RunPanel(": "run_panel", "widgets.Panel(": "head_panel"}.items():
        (source,) = [source for source in sources if call in source]
        *before, shown = ast.parse(source).body
        exec(compile(ast.Module(before, []), "before", "exec"), names)
        names[name] = eval(compile(ast.Expression(shown.value), "panel", "eval"), names)
    return names


def test_the_panel_of_heads_follows_its_controls(lesson):
    panel = lesson["head_panel"]
    first = panel.image.value
    panel.set(text="O Romeo, Romeo", layer=1, head=0)
    assert panel.image.value != first and panel.status.value == ""
    picture = panel.draw(text="O Romeo, Romeo", layer=1, head=0).axes[0]
    assert "grid of 14 × 14" in plot.describe(picture) and "layer 1, head 0" in picture.get_title(loc="left")


@pytest.mark.parametrize("text", ["a", "😀 naïve\t“façade”\x07", "x" * 500, "\ud800ab"])
def test_the_panel_of_heads_bears_any_text(lesson, text):
    lesson["head_panel"].set(text=text)
    assert lesson["head_panel"].status.value == ""


@pytest.mark.parametrize("text", ["", "😀\u202e", "שלום"])
def test_the_panel_of_heads_says_when_there_is_nothing_to_look_at(lesson, text):
    lesson["head_panel"].set(text=text)
    assert "nothing to look at" in lesson["head_panel"].status.value


def test_the_panel_that_trains_a_leak(lesson):
    panel = lesson["run_panel"]
    before = panel.image.value
    panel.set(ahead=1, steps=50)
    panel.start()
    assert panel.wait(120) and panel.status.value.startswith("done")
    assert len(panel.result) == 50 and panel.result[-1] < panel.result[0] and panel.image.value != before


# --- the exercises of 05_attention: wrong answers that the graders must refuse ----------------------------------------


def divides_by_the_width(x, width):
    return torch.stack([x[max(0, t - width + 1) : t + 1].sum(0) / width for t in range(len(x))])


def one_row_too_many(x, width):
    return torch.stack([x[max(0, t - width) : t + 1].mean(0) for t in range(len(x))])


def leaves_itself_out(x, width):
    return torch.stack([x[max(0, t - width) : t].mean(0) for t in range(len(x))])


def centred(x, width):
    return torch.stack([x[max(0, t - width // 2) : t + width // 2 + 1].mean(0) for t in range(len(x))])


def changes_only_the_last(model, vocab_size, T):
    ids = torch.zeros(1, T, dtype=torch.long)
    changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    return not torch.allclose(model(ids)[:, :-1], model(changed)[:, :-1])


def counts_its_own_place(model, vocab_size, T):
    ids = torch.arange(T)[None] % vocab_size
    logits = model(ids)
    for place in range(T):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % vocab_size
        if not torch.allclose(model(changed)[:, : place + 1], logits[:, : place + 1]):
            return True
    return False


def asks_for_bits(model, vocab_size, T):
    ids = torch.zeros(1, T, dtype=torch.long)
    logits = model(ids)
    return any(not torch.equal(model(ids + token)[:, :1], logits[:, :1]) for token in range(vocab_size))


def tries_one_token(model, vocab_size, T):
    ids = torch.zeros(1, T, dtype=torch.long)
    for place in range(1, T):
        changed = ids.clone()
        changed[0, place] = 1
        if not torch.allclose(model(changed)[:, :place], model(ids)[:, :place]):
            return True
    return False


def attends(query, key, value, scale=None, ahead=0, axis=-1, mask_last=False):
    scale = scale or query.shape[-1] ** -0.5
    asking, places = query.shape[-2], key.shape[-2]
    future = torch.ones(asking, places).triu(1 + ahead + places - asking).bool()
    scores = query @ key.transpose(-2, -1) * scale
    if mask_last:
        return torch.softmax(scores, axis).masked_fill(future, 0) @ value
    return torch.softmax(scores.masked_fill(future, -torch.inf), axis) @ value


def not_scaled(query, key, value):
    return attends(query, key, value, scale=1.0)


def scaled_by_d(query, key, value):
    return attends(query, key, value, scale=1 / query.shape[-1])


def off_by_one(query, key, value):
    return attends(query, key, value, ahead=1)


def takes_them_for_the_first(query, key, value):
    return attends(query, key, value, ahead=query.shape[-2] - key.shape[-2])


def over_the_queries(query, key, value):
    return attends(query, key, value, axis=-2)


def masks_after_the_softmax(query, key, value):
    return attends(query, key, value, mask_last=True)


def only_a_view(x, n_head):
    if x.ndim == 3:
        return x.view(x.shape[0], n_head, x.shape[1], -1)
    return x.reshape(x.shape[0], x.shape[2], -1)


def every_second_channel(x, n_head):
    if x.ndim == 3:
        return x.unflatten(2, (-1, n_head)).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).flatten(2)


def forgets_to_turn_back(x, n_head):
    if x.ndim == 3:
        return x.unflatten(2, (n_head, -1)).transpose(1, 2)
    return x.reshape(x.shape[0], x.shape[2], -1)


def only_the_diagonal(weights, d_weights, temperature):
    return weights * (1 - weights) * d_weights / temperature


def subtracts_the_plain_mean(weights, d_weights, temperature):
    return weights * (d_weights - d_weights.mean(-1, keepdim=True)) / temperature


def forgets_the_temperature(weights, d_weights, temperature):
    return weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))


def times_the_temperature(weights, d_weights, temperature):
    return forgets_the_temperature(weights, d_weights, temperature) * temperature


def test_the_exercises():
    assert_graded(
        "attention",
        {
            "my_window": [divides_by_the_width, one_row_too_many, leaves_itself_out, centred],
            "my_leak_test": [changes_only_the_last, counts_its_own_place, asks_for_bits, tries_one_token],
            "my_attention": [
                not_scaled, scaled_by_d, off_by_one, takes_them_for_the_first,
                over_the_queries, masks_after_the_softmax,
            ],
            "my_heads": [only_a_view, every_second_channel, forgets_to_turn_back],
            "my_softmax_backward": [
                only_the_diagonal, subtracts_the_plain_mean, forgets_the_temperature, times_the_temperature,
            ],
        },
    )  # fmt: skip


MESSAGES = [
    ("grade_window", divides_by_the_width, "near the beginning"),
    ("grade_window", leaves_itself_out, "not a number"),
    ("grade_leak_test", changes_only_the_last, "missed"),
    ("grade_leak_test", counts_its_own_place, "does not leak"),
    ("grade_attention", not_scaled, "root of D"),
    ("grade_attention", masks_after_the_softmax, "sum to 1"),
    ("grade_attention", off_by_one, "sees a later one"),
    ("grade_attention", takes_them_for_the_first, "1 queries, 5 keys: the last position must see itself"),
    ("grade_heads", only_a_view, "a view alone"),
    ("grade_heads", forgets_to_turn_back, "on the way back"),
    ("grade_softmax_backward", only_the_diagonal, "sum to 0"),
    ("grade_softmax_backward", forgets_the_temperature, "divided by what"),
]


@pytest.mark.parametrize(("grader", "answer", "message"), MESSAGES, ids=[answer.__name__ for _, answer, _ in MESSAGES])
def test_graders_say_what_is_wrong(grader, answer, message):
    assert message in check.exercise(answer, check.graders(LESSON)[grader])
