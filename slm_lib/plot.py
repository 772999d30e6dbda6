"""The pictures of the series: arrays in, `ax` in and out; nothing is shown or written to a file here.

Importing this module sets a calm style for all of matplotlib. A function takes an `ax` (from `plt.subplots()` in a
cell, from `figure()` inside a widget), draws, and returns it. `describe` says in one line what a picture holds: nbval
compares that line, for it does not compare pictures.
"""

import io
import textwrap
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

# Okabe and Ito's colours, which readers who confuse red and green can tell apart too (jfly.uni-koeln.de/color, 2008)
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK = "#CC79A7", "#56B4E9", "#F0E442", "#000000"
PALETTE = [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW, BLACK]
GREY = "#6E6E6E"
HEAT = LinearSegmentedColormap.from_list("slm_heat", ["#FFFFFF", "#FDE3C8", ORANGE, VERMILLION])
BALANCE = LinearSegmentedColormap.from_list("slm_balance", [BLUE, "#FFFFFF", VERMILLION])

_RENDERING = threading.Lock()  # panels render in several threads, and matplotlib can only render in one

mpl.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 100,
        "figure.figsize": (6.0, 3.5),
        "figure.constrained_layout.use": True,
        "axes.prop_cycle": mpl.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "axes.titlelocation": "left",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": BLACK,
        "ytick.labelcolor": BLACK,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "image.cmap": "cividis",
    }
)


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 3.5)) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes (one, or an array of them) that pyplot does not know of.

    For functions that a widget draws with: they may run in a background thread, where pyplot must not be used.
    """
    fig = Figure(figsize=size)
    return fig, fig.subplots(rows, columns)


def png(fig: Figure) -> bytes:
    """The picture as PNG bytes; the figure is closed if pyplot keeps it, so that no cell shows it again."""
    buffer = io.BytesIO()
    with _RENDERING:
        fig.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(fig)
    return buffer.getvalue()


def visible(text: str) -> str:
    """Text in which a space, a line end and a tab can be seen.

    >>> visible("a b\\n")
    'a␣b↵'
    """
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def bars(ax: Axes, labels: Sequence[Any], values: ArrayLike, color: str = BLUE) -> Axes:
    """One bar for each label; white space in labels is made visible."""
    ax.bar(range(len(labels)), np.asarray(values), color=color, width=0.8)
    shown = [visible(label) if str(label).isspace() else str(label) for label in labels]
    ax.set_xticks(range(len(labels)), shown)
    return ax


def lines(ax: Axes, x: ArrayLike, series: Mapping[str, ArrayLike]) -> Axes:
    """Curves over a common `x`, named in a legend where there are several."""
    for label, y in series.items():
        ax.plot(np.asarray(x), np.asarray(y), label=label)
    if len(series) > 1:
        ax.legend()
    return ax


def levels(ax: Axes, heights: Mapping[str, float]) -> Axes:
    """Dashed horizontal lines with their names at the right edge, such as the uniform guess or the floor.

    Call it last: labels that would touch are moved apart for the limits that the axes then have.
    """
    for y in heights.values():
        ax.axhline(y, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    low, high = ax.get_ylim()
    points = ax.bbox.height / ax.figure.dpi * 72 / (high - low)
    lowest = -np.inf  # in points: a label of 9 points needs about 11
    for label, y in sorted(heights.items(), key=lambda item: item[1]):
        lowest = max((y - low) * points, lowest + 11)
        shift = (6, lowest - (y - low) * points)
        ax.annotate(
            label, (1, y), shift, ax.get_yaxis_transform(), "offset points", va="center", fontsize=9, color=GREY
        )
    return ax


def loss_curve(
    ax: Axes, steps: ArrayLike, losses: ArrayLike, reference: Mapping[str, float] | None = None, label: str = "training"
) -> Axes:
    """Loss in nats per token over training steps, with reference levels drawn in."""
    ax.plot(np.asarray(steps), np.asarray(losses), label=label, color=BLUE, linewidth=1.2)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per token)")
    return levels(ax, reference) if reference else ax


def heatmap(ax: Axes, matrix: ArrayLike, rows: Sequence[Any] = (), columns: Sequence[Any] = ()) -> Axes:
    """A matrix (rows, columns) as colours; up to 150 entries also carry their number.

    Colours run from white at 0, to both sides where the matrix has negative entries; -inf (a masked score) is grey.
    """
    matrix = np.asarray(matrix, dtype=float)
    finite = np.abs(matrix[np.isfinite(matrix)])
    most = finite.max() if finite.size and finite.max() > 0 else 1.0
    signed = (matrix[np.isfinite(matrix)] < 0).any()
    ax.set_facecolor("#D9D9D9")
    shown = np.ma.masked_invalid(matrix)
    ax.imshow(shown, cmap=BALANCE if signed else HEAT, vmin=-most if signed else 0, vmax=most, aspect="auto")
    ax.set_xticks(range(len(columns)), [visible(str(c)) for c in columns])
    ax.set_yticks(range(len(rows)), [visible(str(r)) for r in rows])
    ax.spines[:].set_visible(False)
    if matrix.size <= 150:
        whole = np.array_equal(matrix, np.round(matrix))
        for (i, j), value in np.ndenumerate(matrix):
            ax.text(j, i, f"{value:.0f}" if whole else f"{value:.2f}", ha="center", va="center", fontsize=8)
    return ax


def text_heat(ax: Axes, characters: str, values: ArrayLike, width: int = 48, most: float | None = None) -> Axes:
    """Text, each character on a tile coloured by its value: white at 0, vermillion at `most` (the largest by default).

    Made for surprisal in nats. Lines break where the text does, and after `width` characters. Raises ValueError unless
    there is one value for each character.
    """
    values = np.asarray(values, dtype=float)
    if len(values) != len(characters) or not characters:
        raise ValueError(f"{len(characters)} characters and {len(values)} values: give one value for each character")
    places = _places(characters, width)
    grid = np.full(1 + np.max(places, axis=0), np.nan)  # (rows, columns)
    for (row, column), character, value in zip(places, characters, values, strict=True):
        grid[row, column] = value
        sign = "↵" if character == "\n" else character
        ax.text(column, row, sign, ha="center", va="center", fontsize=9, family="monospace")
    ax.imshow(np.ma.masked_invalid(grid), cmap=HEAT, vmin=0, vmax=most or values.max(), aspect=1.7)
    ax.set_axis_off()
    return ax


# Pale, so that a letter can be read on each of them.
KINDS = {"letter": "#CFE6F5", "capital": "#F7C9A5", "mark": "#BFE5D8", "space": "#F2F2F2", "line end": "#F0E442"}


def _kind(character: str) -> int:
    tests = (character.islower(), character.isalpha(), not character.isspace(), character != "\n")
    return tests.index(True) if True in tests else len(tests)


def tiles(ax: Axes, pieces: Sequence[str]) -> Axes:
    """Pieces of text of one length, a row for each: every character on a tile coloured by its kind (see `KINDS`).

    Made for batches. Raises ValueError unless all pieces have the same length.
    """
    if len({len(piece) for piece in pieces}) != 1 or not pieces[0]:
        raise ValueError(f"the pieces have the lengths {[len(piece) for piece in pieces]}: give pieces of one length")
    grid = [[_kind(character) for character in piece] for piece in pieces]
    ax.imshow(grid, cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=len(KINDS) - 1, aspect="auto")
    for row, piece in enumerate(pieces):
        for column, character in enumerate(visible(piece)):
            ax.text(column, row, character, ha="center", va="center", fontsize=9, family="monospace")
    ax.set_axis_off()
    return ax


def _places(characters: str, width: int) -> list[tuple[int, int]]:
    """The row and column at which each character of a text stands."""
    places, row, column = [], 0, 0
    for character in characters:
        if column == width:
            row, column = row + 1, 0
        places.append((row, column))
        row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    return places


def describe(picture: Figure | Axes, digits: int = 2) -> str:
    """What a picture holds, in one line: title, axis labels, how many lines, bars and points, and the extremes.

    Numbers are rounded to `digits` significant digits, so that the line is the same on every machine.
    """
    if isinstance(picture, Figure):
        return " | ".join(describe(ax, digits) for ax in picture.axes)
    title = picture.get_title(loc="left") or picture.get_title()
    names = " over ".join(filter(None, [picture.get_ylabel(), picture.get_xlabel()]))
    parts = [*_curves(picture, digits), *_bars(picture, digits), *_points(picture, digits), *_images(picture, digits)]
    return "; ".join([*filter(None, [title, names]), *(parts or ["empty"])])


def _range(values: ArrayLike, digits: int) -> str:
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not values.size:
        return "nothing finite"
    values = np.where(np.abs(values) < 1e-9 * np.abs(values).max(), 0.0, values)  # what is 0 but for rounding
    return f"{_rounded(values.min(), digits)} to {_rounded(values.max(), digits)}"


def _rounded(value: float, digits: int) -> str:
    return f"{float(f'{value:.{digits}g}') + 0.0:g}"  # so that 100 is not 1e+02, and -0 is 0


def _curves(ax: Axes, digits: int) -> list[str]:
    found = []
    for line in ax.lines:
        if line.get_transform() == ax.get_yaxis_transform():  # a level of `levels`, or any axhline
            found.append(f"level at {_rounded(line.get_ydata()[0], digits)}")
            continue
        name = "" if line.get_label().startswith("_") else f" '{line.get_label()}'"
        found.append(f"line{name} of {len(line.get_ydata())} points, {_range(line.get_ydata(), digits)}")
    return found


def _bars(ax: Axes, digits: int) -> list[str]:
    heights = [patch.get_height() for patch in ax.patches if isinstance(patch, Rectangle)]
    return [f"{len(heights)} bars, {_range(heights, digits)}"] if heights else []


def _points(ax: Axes, digits: int) -> list[str]:
    clouds = [np.asarray(c.get_offsets()) for c in ax.collections if len(c.get_offsets())]
    return [f"{len(cloud)} points, {_range(cloud[:, 1], digits)}" for cloud in clouds]


def _images(ax: Axes, digits: int) -> list[str]:
    grids = [image.get_array() for image in ax.images]
    sizes = [" × ".join(map(str, grid.shape)) for grid in grids]
    ranges = [_range(np.ma.compressed(grid), digits) for grid in grids]
    return [f"grid of {size}, {extremes}" for size, extremes in zip(sizes, ranges, strict=True)]


def road(ax: Axes, stops: Mapping[str, str], opened: Collection[str], width: int = 6) -> Axes:
    """A road of named stops with a phrase each, in rows of `width`; stops that are open are filled and counted."""
    numbers = {name: f"{n:02d}" for n, name in enumerate(name for name in stops if name in opened)}
    for i, (name, phrase) in enumerate(stops.items()):
        x, y, here = i % width, -(i // width), name in opened
        if x:
            ax.plot([x - 1, x], [y, y], color="#D9D9D9", linewidth=7, zorder=0)
        ax.scatter(x, y, s=420, color=BLUE if here else "#FFFFFF", edgecolor=BLUE if here else GREY, zorder=1)
        ax.text(x, y, numbers.get(name, ""), ha="center", va="center", fontsize=9, color="#FFFFFF")
        words = {"ha": "center", "va": "top"}
        ax.text(x, y - 0.27, name, fontsize=10, weight="bold", color=BLACK if here else GREY, **words)
        ax.text(x, y - 0.42, textwrap.fill(phrase, 17), fontsize=8, color=GREY, **words)
    ax.set_xlim(-0.6, width - 0.4)
    ax.set_ylim(-((len(stops) - 1) // width) - 0.8, 0.3)
    ax.set_axis_off()
    return ax
