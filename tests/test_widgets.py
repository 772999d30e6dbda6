"""Panels driven from Python, with real small work: training, sampling, drawing."""

import threading
import time
from functools import partial

import pytest
import torch

from slm_lib import plot, widgets
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.generation import generate, stream


def curve(order, bend=1.0):
    fig, ax = plot.figure(size=(3, 2))
    plot.lines(ax, range(10), {"a": [bend * x**order for x in range(10)]})
    return fig


def descend(lr, steps=30):
    """Gradient descent on x**2 from 1, yielding the losses so far."""
    x, losses = torch.ones((), dtype=torch.float64, requires_grad=True), []
    for step in range(steps):
        loss = x**2
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= lr * gradient
        losses.append(loss.item())
        time.sleep(0.002)
        yield (step + 1) / steps, losses


def losses_curve(losses):
    fig, ax = plot.figure(size=(3, 2))
    return plot.loss_curve(ax, range(len(losses)), losses).figure


def picture(panel):
    shown = bytes(panel.image.value)
    assert shown.startswith(b"\x89PNG")
    return shown


@pytest.fixture(scope="module")
def writer():
    """A small untrained GPT that writes, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer("\n !,.:ABCEMORabcdefghijklmnopqrstuvwxyz")
    config = GPTConfig.modern(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config)
    torch.nn.init.normal_(model.get_parameter([name for name, _ in model.named_parameters()][-1]))
    return model, tokenizer


# --- controls ---------------------------------------------------------------------------------------------------------


def test_controls_hold_what_they_are_given():
    assert (widgets.slider(1, 8, 3).value, widgets.slider(0.0, 2.0, 0.8).value) == (3, 0.8)
    assert widgets.slider(1e-4, 1.0, 1e-2, log=True).value == pytest.approx(1e-2)
    assert widgets.choice(["a", "b"]).value == "a"
    assert widgets.choice(["a", "b"], "b").value == "b"
    assert (widgets.entry("to be").value, widgets.entry(True).value) == ("to be", True)


# --- Panel ------------------------------------------------------------------------------------------------------------


def test_a_panel_redraws_as_its_slider_moves():
    panel = widgets.Panel(curve, order=widgets.slider(0, 5, 1))
    before = picture(panel)
    panel.controls["order"].value = 3
    assert picture(panel) != before
    panel.set(order=1)
    assert picture(panel) == before


def test_set_moves_all_controls_and_draws_once():
    drawn = []

    def draw(a, b):
        drawn.append((a, b))
        return f"{a} and {b}"

    panel = widgets.Panel(draw, a=widgets.slider(0, 9, 1), b=widgets.slider(0, 9, 2))
    panel.set(a=5, b=6)
    assert drawn == [(1, 2), (5, 6)]
    assert panel.text == "5 and 6"
    with pytest.raises(ValueError, match="no control is called"):
        panel.set(c=1)


def test_what_a_panel_shows_is_kept_in_the_notebook():
    bundle = widgets.Panel(curve, order=widgets.slider(0, 5, 1), bend=0.5)._repr_mimebundle_()
    assert bundle["text/plain"] == "Panel(bend=0.5, order=1)"
    assert bundle["image/png"].startswith("iVBOR")
    text = widgets.Panel("to {what} <or> not".format, what=widgets.entry("be"))
    bundle = text._repr_mimebundle_()
    assert bundle["text/plain"] == "Panel(what='be')\nto be <or> not"
    assert "image/png" not in bundle
    assert "&lt;or&gt;" in text.page.value


def test_an_error_while_drawing_is_shown_and_the_picture_stays():
    def draw(n):
        if n > 5:
            raise ValueError(f"n is {n}, and there are 5: take fewer")
        return str(n)

    panel = widgets.Panel(draw, n=widgets.slider(0, 9, 1))
    panel.set(n=7)
    assert (panel.status.value, panel.text) == ("n is 7, and there are 5: take fewer", "1")
    panel.set(n=2)
    assert (panel.status.value, panel.text) == ("", "2")


# --- RunPanel ---------------------------------------------------------------------------------------------------------


def run_panel(train=descend, steps=30):
    return widgets.RunPanel(train, losses_curve, lr=widgets.slider(0.01, 0.4, 0.1), steps=steps)


def test_the_button_runs_with_the_values_of_the_controls():
    panel = run_panel()
    panel.set(lr=0.4)
    assert panel.result is None
    panel.run_button.click()
    assert panel.wait(20)
    assert panel.result == [pytest.approx((1 - 0.8) ** (2 * i)) for i in range(30)]
    assert panel.progress.value == 1.0
    assert picture(panel)
    assert panel.status.value.startswith("done in ")
    assert panel.stop_button.disabled


def test_stop_gives_the_panel_back_at_once_and_draws_what_there_is():
    panel = run_panel(steps=100_000)
    panel.start()
    while not panel.result:
        time.sleep(0.001)
    panel.stop_button.click()
    assert (panel.status.value, panel.running) == ("stopped", False)
    assert picture(panel)
    assert panel.wait(5)
    assert 0 < panel.progress.value < 1
    assert panel.status.value == "stopped"


def test_an_error_in_the_thread_is_not_lost():
    def train(lr, steps):
        yield 0.5, [1.0]
        raise FloatingPointError("the loss is not a number: lower the learning rate")

    panel = run_panel(train)
    panel.start()
    panel.wait(5)
    assert panel.status.value == "FloatingPointError: the loss is not a number: lower the learning rate"
    panel.train = descend
    panel.start()
    panel.wait(20)
    assert panel.status.value.startswith("done")


def test_a_second_start_replaces_the_first():
    alive, most = [0], [0]

    def train(lr, steps):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        try:
            yield from descend(lr, steps)
        finally:
            alive[0] -= 1

    panel = run_panel(train, steps=40)
    for lr in (0.1, 0.2, 0.3):
        panel.set(lr=lr)
        panel.start()
        time.sleep(0.02)
    panel.wait(20)
    assert most == [1]
    assert panel.result[1] == pytest.approx((1 - 0.6) ** 2)
    assert len(panel.result) == 40


def test_a_first_result_is_drawn_before_any_run():
    panel = widgets.RunPanel(descend, losses_curve, result=[3.0, 2.0], lr=widgets.slider(0.01, 0.4, 0.1))
    assert panel._repr_mimebundle_()["image/png"].startswith("iVBOR")
    assert panel._repr_mimebundle_()["text/plain"] == "RunPanel(lr=0.1)"
    assert not panel.running


def test_what_a_run_would_cost_stands_there_before_it_and_follows_the_controls():
    def about(lr, steps):
        if lr > 0.3:
            raise ValueError("too fast: keep lr below 0.3")
        return f"{steps} steps of {lr}"

    panel = widgets.RunPanel(descend, losses_curve, about=about, lr=widgets.slider(0.01, 0.4, 0.1), steps=30)
    assert panel.about.text == "30 steps of 0.1"
    panel.set(lr=0.2)
    assert panel.about.text == "30 steps of 0.2" and panel.result is None
    panel.set(lr=0.4)
    assert panel.about.status.value == "too fast: keep lr below 0.3"
    panel.set(lr=0.1)
    panel.start()
    assert panel.wait(20) and len(panel.result) == 30 and not panel.about.status.value


# --- WritePanel -------------------------------------------------------------------------------------------------------


def write_panel(writer, **others):
    return widgets.WritePanel(partial(stream, *writer), "ROMEO:\n", length=60, **others)


def test_the_panel_writes_what_generate_writes(writer):
    panel = write_panel(writer)
    assert panel.wait(20)
    assert panel.text == "ROMEO:\n" + generate(*writer, "ROMEO:\n", 60, temperature=0.8, seed=0)
    assert "<b style=" in panel.page.value and "ROMEO:\n</b>" in panel.page.value


def test_what_is_kept_is_the_finished_text(writer):
    bundle = write_panel(writer)._repr_mimebundle_()
    first, rest = bundle["text/plain"].split("\n", 1)
    assert first == "WritePanel(length=60, prompt='ROMEO:\\n', temperature=0.8, seed=0)"
    assert rest == "ROMEO:\n" + generate(*writer, "ROMEO:\n", 60, temperature=0.8, seed=0)


def test_slider_prompt_and_button_write_anew(writer):
    panel = write_panel(writer)
    panel.controls["temperature"].value = 1.5
    panel.wait(20)
    assert panel.text == "ROMEO:\n" + generate(*writer, "ROMEO:\n", 60, temperature=1.5, seed=0)
    panel.controls["prompt"].value = "be"
    panel.wait(20)
    assert panel.text == "be" + generate(*writer, "be", 60, temperature=1.5, seed=0)
    panel.write_button.click()
    panel.wait(20)
    assert panel.text == "be" + generate(*writer, "be", 60, temperature=1.5, seed=1)


def test_the_latest_request_wins_and_texts_do_not_mix(writer):
    seen = []
    panel = write_panel(writer)
    panel.page.observe(lambda change: seen.append(panel.text), "value")
    for step in range(20):  # as a hand that drags the slider
        panel.set(temperature=0.2 + 0.05 * step, prompt="mo" if step % 2 else "ac")
        time.sleep(0.003)
    panel.wait(20)
    assert panel.text == "mo" + generate(*writer, "mo", 60, temperature=0.2 + 0.05 * 19, seed=0)
    requests = [("ROMEO:\n", 0.8), *((prompt, 0.2 + 0.05 * step) for step in range(20) for prompt in ("mo", "ac"))]
    texts = [prompt + generate(*writer, prompt, 60, temperature, seed=0) for prompt, temperature in requests]
    assert all(any(text.startswith(shown) for text in texts) for shown in seen)
    assert threading.active_count() < 10


def test_an_unknown_character_is_one_sentence_and_the_text_stays(writer):
    panel = write_panel(writer)
    panel.wait(20)
    before = panel.text
    panel.set(prompt="10 dukes")
    panel.wait(20)
    assert "'0', '1'" in panel.status.value and "\n" not in panel.status.value
    assert panel.text == before
    panel.set(prompt="dukes")
    panel.wait(20)
    assert panel.status.value == ""
    assert panel.text.startswith("dukes")


def test_stop_keeps_what_is_written(writer):
    model, tokenizer = writer
    panel = widgets.WritePanel(partial(stream, model, tokenizer), "ROMEO:\n", length=100_000)
    while len(panel.text) < 20:
        time.sleep(0.005)
    panel.stop_button.click()
    kept = panel.text
    assert panel.wait(5)
    assert panel.text == kept
    assert panel.status.value == "stopped"


def test_a_new_request_ends_the_one_in_progress():
    def write(prompt, temperature, seed):
        yield f"{temperature:.1f}"
        while temperature < 1:  # without end
            time.sleep(0.001)
            yield "."

    panel = widgets.WritePanel(write, "a", temperature=0.5)
    panel.set(temperature=1.5)
    assert panel.wait(5)
    assert panel.text == "a1.5"
