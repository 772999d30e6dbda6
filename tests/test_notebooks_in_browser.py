"""The panels as a reader meets them: JupyterLab in headless Chromium, on copies of the notebooks.

Skipped, with the reason, where playwright or a Chromium is missing.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import symtable
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser here: none of {', '.join(NAMES)} is on the PATH")

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell stands in the page, seen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
READY = """() => { const s = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return s?.isReady && s.session?.kernel?.connectionStatus === 'connected' && s.session.kernel.status === 'idle' }"""
RUN_ALL = """seconds => Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'),
    new Promise((_, give_up) => setTimeout(() => give_up(new Error(`not done in ${seconds} s`)), 1000 * seconds))])"""
PICTURE = """async output => {
    const image = [...output.querySelectorAll('img')].find(image => image.src && image.offsetParent);
    if (!image) return null;
    const bytes = await (await fetch(image.src)).arrayBuffer(), hash = await crypto.subtle.digest('SHA-1', bytes);
    return bytes.byteLength ? [...new Uint8Array(hash)].join() : null }"""


@contextlib.contextmanager
def jupyterlab(folder, settings):
    """A JupyterLab server on `folder`, with nothing of the user's own configuration; yields its address and token."""
    for name, values in SETTINGS.items():
        path = settings / "user" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(settings / "config"),
        "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "user"),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "SLM_CORPUS": "playhouse",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    log = settings / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(lambda: _answers(f"http://127.0.0.1:{port}/api?token={token}"), 90, lambda: log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(address):
    with contextlib.suppress(OSError):
        urllib.request.urlopen(address, timeout=1).close()
        return True
    return False


def _wait(condition, seconds, complaint):
    """Wait until a condition holds; fail with a complaint, which may be a function, where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint() if callable(complaint) else complaint
        time.sleep(0.05)


class Lab:
    """A notebook open in JupyterLab."""

    def __init__(self, page, notebook):
        self.page, self.sources = page, ["".join(cell.source) for cell in notebook.cells]

    def run_all(self, seconds=300):
        # Before the session is connected, a "run all" would be lost without a word.
        self.page.wait_for_function(READY, timeout=90_000)
        done = self.page.evaluate(RUN_ALL, seconds)
        errors = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        assert done and not errors.count(), errors.first.inner_text()[-1500:] if errors.count() else "not run"

    def output(self, text):
        """The output area of the first cell whose source holds `text`."""
        place = next(i for i, source in enumerate(self.sources) if text in source)
        cell = self.page.locator(".jp-Notebook .jp-Cell").nth(place)
        cell.scroll_into_view_if_needed()
        return Output(cell.locator(".jp-Cell-outputArea"))


class Output:
    """What one cell shows: a panel with sliders, buttons, a picture or a text."""

    def __init__(self, area):
        self.area = area

    def shown(self):
        """The text of the page and a digest of the picture, whichever there is."""
        return self.area.locator("pre").all_inner_texts(), self.area.evaluate(PICTURE)

    def wait_changed(self, before, seconds=20):
        _wait(lambda: self.shown() != before, seconds, "what the panel shows did not change")
        return self.shown()

    def press(self, key, times=1, slider=0):
        """Press a key on a slider, as a reader without a mouse does."""
        handle = self.area.locator(".noUi-handle").nth(slider)
        for _ in range(times):
            handle.focus()
            handle.press(key)

    def drag(self, distance, slider=0):
        """Drag a slider with the mouse, by some pixels."""
        handle = self.area.locator(".noUi-handle").nth(slider)
        handle.scroll_into_view_if_needed()
        box, mouse = handle.bounding_box(), handle.page.mouse
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + distance, y, steps=10)
        mouse.up()

    def readout(self, slider=0):
        return self.area.locator(".widget-readout").nth(slider).inner_text()

    def button(self, name):
        return self.area.get_by_role("button", name=name)


@contextlib.contextmanager
def lab_notebook(path, scratch):
    """Open a copy of a notebook in JupyterLab (which saves by itself), in a folder laid out as the project is."""
    (scratch / "notebooks").mkdir(parents=True)
    for source in path.parent.glob("*.ipynb"):
        shutil.copy(source, scratch / "notebooks")
    for name in ("models", "results"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, scratch / name)
    options = {"executable_path": CHROMIUM, "args": FLAGS, "ignore_default_args": ["--headless"], "headless": True}
    with jupyterlab(scratch, scratch / "settings") as (address, token), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(scratch / "profile"), viewport={"width": 1280, "height": 1000}, **options
        )
        try:
            page = browser.pages[0] if browser.pages else browser.new_page()
            page.goto(f"{address}/lab/tree/notebooks/{path.name}?token={token}&reset")
            page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
            yield Lab(page, nbformat.read(path, as_version=4))
        finally:
            browser.close()


def lesson(noun):
    (path,) = (ROOT / "notebooks").glob(f"[0-9][0-9]_{noun}.ipynb")
    return path


def test_welcome_writes_anew_when_the_temperature_slider_moves(tmp_path):
    with lab_notebook(lesson("welcome"), tmp_path) as lab:
        lab.run_all()
        panel = lab.output("widgets.WritePanel(write, ")
        before, readout = panel.shown(), panel.readout()
        assert before[0][0].startswith("ROMEO:")
        panel.press("ArrowRight", times=6)
        after = panel.wait_changed(before)
        assert panel.readout() != readout
        assert after[0][0].startswith("ROMEO:")
        panel.drag(60)
        panel.wait_changed(after)
        panel.area.locator("textarea").fill("JULIET:\n")
        _wait(lambda: panel.shown()[0][0].startswith("JULIET:\n"), 20, "the new prompt is not continued")
        panel.area.locator("textarea").fill("JULIET: 100 %")
        panel.area.get_by_text("lacks").wait_for(timeout=10_000)


def needed_for(notebook, text):
    """A notebook of only those code cells that the first cell with `text` in it needs, and that cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    last = next(i for i, cell in enumerate(cells) if text in cell.source)
    gives, takes = zip(*(_names(cell.source) for cell in cells[: last + 1]), strict=True)
    wanted, late = set(), {last}
    while not late <= wanted:
        wanted |= late
        kept, missing = [], set()
        for i in reversed(range(last + 1)):
            if i in wanted or gives[i] & missing:
                kept, missing = [cells[i], *kept], (missing - gives[i]) | takes[i]
        # A function may use a name that is given only after it.
        late = {max(i for i, names in enumerate(gives) if name in names) for name in missing & set().union(*gives)}
    return v4.new_notebook(cells=kept, metadata=notebook.metadata)


def _names(source):
    """The names that a cell gives to the notebook, and those that it takes from it."""
    python = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    tables = [symtable.symtable(python, "cell", "exec")]
    gives = {name.get_name() for name in tables[0].get_symbols() if name.is_assigned() or name.is_imported()}
    takes = {name.get_name() for name in tables[0].get_symbols() if name.is_referenced()}
    for table in tables:
        tables += table.get_children()
        takes |= {name.get_name() for name in table.get_symbols() if name.is_global() and name.is_referenced()}
    return gives, takes


PANELS = {
    "ngrams": "widgets.Panel(write_at",
    "tokens": "widgets.Panel(draw_own",
    "embeddings": "widgets.Panel(hands",
    "attention": "widgets.Panel(draw_head",
    "blocks": "draw_parts, n_layer=widgets",
    "adam": "draw_path, surface=widgets",
    "architectures": "widgets.Panel(draw_reach",
    "generation": "widgets.Panel(\n    draw_next, place=widgets",
    "evaluation": "widgets.Panel(\n    draw_two_minds",
    "gpu": "widgets.Panel(\n    draw_memory, n_layer=widgets",
}
RUN_PANELS = {"training": "panel = widgets.RunPanel(\n    train_live", "tuning": "widgets.RunPanel(try_out"}


@contextlib.contextmanager
def panel_of(noun, text, scratch):
    """The output of the cell of a lesson that has `text` in it, in JupyterLab, with only what it needs run."""
    path = scratch / "source" / lesson(noun).name
    path.parent.mkdir()
    nbformat.write(needed_for(nbformat.read(lesson(noun), as_version=4), text), path)
    with lab_notebook(path, scratch / "work") as lab:
        lab.run_all()
        yield lab.output(text)


@pytest.mark.parametrize("noun", PANELS)
def test_a_panel_of_the_lesson_redraws_when_its_slider_moves(noun, tmp_path):
    with panel_of(noun, PANELS[noun], tmp_path) as panel:
        before, readout = panel.shown(), panel.readout()
        panel.press("ArrowLeft" if readout == panel_maximum(panel) else "ArrowRight")
        panel.wait_changed(before)
        assert panel.readout() != readout


@pytest.mark.parametrize("noun", RUN_PANELS)
def test_a_training_panel_of_the_lesson_tells_its_price_and_then_trains(noun, tmp_path):
    with panel_of(noun, RUN_PANELS[noun], tmp_path) as panel:
        price, picture = panel.shown()
        panel.press("ArrowRight", slider=1)
        dearer = panel.wait_changed((price, picture))
        assert dearer[0] != price and dearer[1] == picture
        panel.button("Run").click()
        _wait(lambda: panel.shown()[1] != picture, 60, panel.area.inner_text)
        if panel.button("Stop").is_enabled():
            panel.button("Stop").click()
        panel.area.get_by_text(re.compile("stopped|done in")).wait_for(timeout=20_000)


def panel_maximum(panel):
    return panel.area.locator(".noUi-handle").first.get_attribute("aria-valuemax")


def test_work_in_the_background_is_shown_as_it_goes_on_and_stopped(tmp_path):
    cells = [
        "import time\nfrom slm_lib import plot, widgets",
        "def train(rate):\n    for i in range(1000):\n        time.sleep(0.01)\n        yield i / 1000, i * rate",
        "def draw(height):\n    fig, ax = plot.figure(size=(3, 2))\n    ax.plot([0, height])\n    return fig",
        "widgets.RunPanel(train, draw, rate=widgets.slider(1, 9, 2))",
    ]
    path = tmp_path / "source" / "demo.ipynb"
    path.parent.mkdir()
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}  # or JupyterLab asks for one
    nbformat.write(notebook, path)
    with lab_notebook(path, tmp_path / "work") as lab:
        lab.run_all(60)
        panel = lab.output("widgets.RunPanel(")
        assert panel.shown() == ([], None)
        panel.button("Run").click()
        first = panel.wait_changed(([], None))
        panel.wait_changed(first)
        panel.button("Stop").click()
        panel.area.get_by_text("stopped").wait_for(timeout=5_000)
        time.sleep(1)  # the result so far is drawn after the word
        stopped = panel.shown()
        time.sleep(1.5)  # three pictures, if the work went on
        assert panel.shown() == stopped
        assert panel.button("Stop").is_disabled()
