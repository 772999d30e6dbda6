"""Panels to turn: controls around a plain function, with a picture or text that a notebook keeps.

`Panel` redraws at once and is for light work. `RunPanel` is for work of over a second: a button, a bar, Stop.
`WritePanel` streams text and starts again when its prompt or a slider changes. From Python, `set` moves the controls
and `wait` waits until all is still. The notebook keeps what is shown as a picture or text, for where no kernel runs.
"""

import base64
import html
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets

from slm_lib import plot

REDRAW_SECONDS, SHOW_SECONDS = 0.5, 0.04  # while work goes on, a picture or text is not shown again sooner than this
TEXT_STYLE = "white-space: pre-wrap; line-height: 1.35; margin: 4px 0; max-width: 80ch"


def slider(low: float, high: float, value: float, step: float | None = None, log: bool = False) -> ipywidgets.Widget:
    """A slider from `low` to `high`: over integers where all are integers, in factors (twenty to a ten) with `log`."""
    if log:
        least, most = math.log10(low), math.log10(high)
        return ipywidgets.FloatLogSlider(min=least, max=most, value=value, step=step or 0.05, readout_format=".2g")
    if all(isinstance(number, int) for number in (low, high, value, step or 1)):
        return ipywidgets.IntSlider(min=low, max=high, value=value, step=step or 1)
    return ipywidgets.FloatSlider(min=low, max=high, value=value, step=step or (high - low) / 100, readout_format=".2f")


def choice(options: Sequence[Any], value: Any = None) -> ipywidgets.Widget:
    """One of several options; the first by default."""
    return ipywidgets.Dropdown(options=options, value=options[0] if value is None else value)


def entry(value: str | bool) -> ipywidgets.Widget:
    """A line of text to edit, or for a truth value a box to tick."""
    return ipywidgets.Checkbox(value=value, indent=False) if isinstance(value, bool) else ipywidgets.Text(value=value)


class _Base(ipywidgets.VBox):
    """Controls and a place to show a Figure or text; plain values among the controls are passed on as they are."""

    def __init__(self, controls: dict[str, Any]):
        self.controls = {k: v for k, v in controls.items() if isinstance(v, ipywidgets.Widget)}
        self.fixed = {k: v for k, v in controls.items() if k not in self.controls}
        width = f"{max(map(len, self.controls), default=0) + 1}ch"
        for name, control in self.controls.items():
            control.description, control.style.description_width = name.replace("_", " "), width
            control.observe(lambda _: self._held or self._changed(), "value")
        self.image = ipywidgets.Image(layout={"display": "none", "align_self": "flex-start", "max_width": "100%"})
        self.page, self.status = ipywidgets.HTML(), ipywidgets.Label(layout={"display": "none"})
        self.text, self._held, self._job = "", False, None
        super().__init__()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now, by name."""
        return {**self.fixed, **{name: control.value for name, control in self.controls.items()}}

    def set(self, **values: Any) -> None:
        """Move controls by name, as a hand would, but with one redraw for all of them."""
        unknown = set(values) - set(self.controls)
        if unknown:
            raise ValueError(f"no control is called {sorted(unknown)}: this panel has {sorted(self.controls)}")
        self._held = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._held = False
        self._changed()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no work is in progress, at most `timeout` seconds; return whether that came true."""
        if self._job is not None:
            self._job.join(timeout)
        return self._job is None or not self._job.is_alive()

    def _changed(self) -> None:
        """What a moved control leads to; nothing, unless a panel says otherwise."""

    def _show(self, content: Any) -> None:
        """Put a Figure, or a piece of text, before the reader."""
        if isinstance(content, str):
            self.text, self.page.value = content, _page(content)
        else:
            self.image.value = plot.png(content)
            self.image.layout.display = None

    def _say(self, message: str | Exception) -> None:
        if isinstance(message, Exception) and not isinstance(message, ValueError):  # ours are whole sentences
            message = f"{type(message).__name__}: {message}"
        self.status.value, self.status.layout.display = str(message), None if str(message) else "none"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = f"{self!r}\n{self.text}" if self.text else repr(self)
        if self.image.value:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return bundle


def _page(text: str, prompt: str = "") -> str:
    """Text as HTML that keeps its lines, what was given set off in colour from what was written."""
    given = f'<b style="color: {plot.VERMILLION}">{html.escape(prompt)}</b>' if prompt else ""
    return f'<pre style="{TEXT_STYLE}">{given}{html.escape(text)}</pre>'


class Panel(_Base):
    """Redraws as its controls move: `draw(**values)` returns a Figure or text, and takes well under a second."""

    def __init__(self, draw: Callable[..., Any], **controls: Any):
        super().__init__(controls)
        self.draw = draw
        self.children = [*self.controls.values(), self.status, self.image, self.page]
        self._show(draw(**self.values))

    def _changed(self) -> None:
        try:
            self._show(self.draw(**self.values))
            self._say("")
        except Exception as error:
            self._say(error)


class _Job(threading.Thread):
    """Background work that can be called off: from then on it changes nothing that the reader sees.

    A job first waits for the one before it, so that at most one of them works at any time.
    """

    def __init__(self, work: Callable[["_Job"], None], before: "_Job | None", lock: threading.Lock):
        super().__init__(daemon=True)
        self.work, self.before, self.lock = work, before, lock
        self.called_off = False

    def run(self) -> None:
        if self.before is not None:
            self.before.join()
            self.before = None  # or a long evening of jobs would hang on one chain
        if not self.called_off:
            self.work(self)

    def show(self, change: Callable[..., None], *args: Any) -> None:
        """Change what the reader sees, unless the job was called off."""
        with self.lock:
            if not self.called_off:
                change(*args)

    def call_off(self) -> None:
        with self.lock:
            self.called_off = True


class _BackgroundPanel(_Base):
    """A panel whose work runs in a thread, the latest request alone.

    `_work(job, values)` does it, changes what is seen through `job.show` alone, and returns the closing line.
    """

    def __init__(self, controls: dict[str, Any]):
        super().__init__(controls)
        self._lock = threading.Lock()
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def running(self) -> bool:
        """Whether work is in progress that was not called off."""
        return self._job is not None and self._job.is_alive() and not self._job.called_off

    def start(self) -> None:
        """Begin with what the controls say now; work in progress is called off."""
        if self._job is not None:
            self._job.call_off()
        values, self.stop_button.disabled = self.values, False
        self._say("working")
        self._job = _Job(lambda job: self._guarded(job, values), self._job, self._lock)
        self._job.start()

    def stop(self) -> None:
        """Call off the work in progress; what is already there stays."""
        if self.running:
            self._job.call_off()
            self._settle("stopped")

    def _guarded(self, job: _Job, values: dict[str, Any]) -> None:
        try:
            job.show(self._settle, self._work(job, values))
        except Exception as error:  # a thread's traceback would be seen by nobody
            job.show(self._settle, error)

    def _settle(self, message: str | Exception) -> None:
        self.stop_button.disabled = True
        self._say(message)


class RunPanel(_BackgroundPanel):
    """Works when its button is pressed: `train(**values)` yields (fraction done, result) as it goes on.

    `draw(result)` returns a Figure (from `plot.figure`, since it runs in a thread) or text; it is called now and then
    while the work goes on, and at the end. `result` is what to draw before the first run, if anything; what
    `about(**values)` returns stands below the controls and follows them: what a run would cost, say.
    """

    def __init__(self, train: Callable[..., Iterator], draw: Callable, result: Any = None, about=None, **controls: Any):
        super().__init__(controls)
        self.train, self.draw, self.result = train, draw, result
        self.run_button = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.run_button.on_click(lambda _: self.start())
        self.progress = ipywidgets.FloatProgress(value=0.0, max=1.0)
        row = ipywidgets.HBox([self.run_button, self.stop_button, self.progress, self.status])
        self.about = Panel(about, **controls) if about else None
        self.children = [*([self.about] if about else self.controls.values()), row, self.image, self.page]
        if result is not None:
            self._show(draw(result))

    def _work(self, job: _Job, values: dict[str, Any]) -> str:
        began = drawn = time.monotonic()
        result = self.result
        job.show(self._advance, 0.0, result)
        for fraction, result in self.train(**values):
            job.show(self._advance, fraction, result)
            if job.called_off:
                return ""
            if time.monotonic() - drawn > REDRAW_SECONDS:
                job.show(self._show, self.draw(result))
                drawn = time.monotonic()
        if result is not None:
            job.show(self._show, self.draw(result))
        return f"done in {time.monotonic() - began:.1f} s"

    def _advance(self, fraction: float, result: Any) -> None:
        self.progress.value, self.result = fraction, result

    def stop(self) -> None:
        """Call off the work in progress and draw its result so far."""
        if self.running:
            super().stop()
            if self.result is not None:
                self._show(self.draw(self.result))


class WritePanel(_BackgroundPanel):
    """Continues a prompt: `write(prompt=, temperature=, seed=, **values)` yields pieces of text as they are drawn.

    A changed prompt or slider calls off what is being written and starts again; the button writes with another seed.
    An error, such as a character that the vocabulary lacks, stands beside the button in one sentence.
    """

    def __init__(
        self, write: Callable[..., Iterator[str]], prompt: str = "\n", temperature: float = 0.8, seed: int = 0, **others
    ):
        box = ipywidgets.Textarea(value=prompt, rows=2, layout={"width": "80ch"})
        super().__init__({"prompt": box, "temperature": slider(0.0, 2.0, temperature, 0.05), **others})
        self.write, self.seed = write, seed
        self.write_button = ipywidgets.Button(description="Write again", icon="pencil", button_style="primary")
        self.write_button.on_click(lambda _: self.again())
        self.page.layout.min_height = "16em"  # so that what stands below does not jump as the text grows
        row = ipywidgets.HBox([self.write_button, self.stop_button, self.status])
        self.children = [*self.controls.values(), row, self.page]
        self.start()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now, by name, and the seed."""
        return {**super().values, "seed": self.seed}

    def again(self) -> None:
        """Write with the next seed."""
        self.seed += 1
        self.start()

    _changed = _BackgroundPanel.start

    def _work(self, job: _Job, values: dict[str, Any]) -> str:
        written, shown = "", 0.0
        for piece in self.write(**values):
            written += piece
            if job.called_off:
                return ""
            if time.monotonic() - shown > SHOW_SECONDS:
                job.show(self._show_written, values["prompt"], written)
                shown = time.monotonic()
        job.show(self._show_written, values["prompt"], written)
        return ""

    def _show_written(self, prompt: str, written: str) -> None:
        self.text, self.page.value = prompt + written, _page(written, prompt)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        self.wait(30)  # so that what the notebook keeps is a finished text
        return super()._repr_mimebundle_(**kwargs)
