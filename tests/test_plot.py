import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from slm_lib import plot


@pytest.fixture
def ax():
    return plot.figure()[1]


def test_the_library_alone_does_not_load_matplotlib():
    modules = "slm_lib, slm_lib.generation, slm_lib.training, slm_lib.check"
    code = f"import sys, {modules}; print([name for name in ('matplotlib', 'ipywidgets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_png_is_a_picture_and_leaves_nothing_open():
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    assert plot.png(fig).startswith(b"\x89PNG\r\n")
    assert plt.get_fignums() == []


def test_the_same_picture_is_the_same_bytes():
    def picture(y):
        fig, ax = plot.figure()
        plot.lines(ax, range(3), {"a": y})
        return plot.png(fig)

    assert picture([1, 2, 3]) == picture([1, 2, 3]) != picture([1, 2, 4])


def test_bars(ax):
    assert plot.bars(ax, ["e", " ", "\n"], [3, 2, 1]) is ax
    assert [bar.get_height() for bar in ax.patches] == [3, 2, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["e", "␣", "↵"]


def test_lines(ax):
    plot.lines(ax, [0, 1, 2], {"a": [1, 2, 3], "b": [3, 2, 1]})
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 2, 3], [3, 2, 1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_levels_are_drawn_where_they_are_and_their_labels_do_not_touch():
    fig, ax = plot.figure()
    heights = {"bigram": 2.45, "7-gram": 1.53, "model": 1.52, "floor": 1.5}
    plot.loss_curve(ax, range(100), np.linspace(4.2, 1.6, 100), heights)
    assert sorted(line.get_ydata()[0] for line in ax.lines[1:]) == sorted(heights.values())
    fig.canvas.draw()
    boxes = sorted((label.get_window_extent() for label in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))
    assert boxes[-1].x1 <= fig.bbox.x1


def test_heatmap_writes_the_numbers_of_a_small_matrix(ax):
    matrix = np.where(np.tri(3) > 0, [[0.25, 0, 0], [0.5, -0.5, 0], [1, 2, 3]], -np.inf)
    plot.heatmap(ax, matrix, "abc", "abc")
    assert [text.get_text() for text in ax.texts[:4]] == ["0.25", "-inf", "-inf", "0.50"]
    assert ax.images[0].get_clim() == (-3, 3)
    assert np.ma.getmaskarray(ax.images[0].get_array()).sum() == 3


def test_heatmap_of_a_large_matrix_has_no_numbers(ax):
    plot.heatmap(ax, np.ones((20, 20)))
    assert len(ax.texts) == 0


def test_text_heat_puts_each_character_on_its_tile(ax):
    plot.text_heat(ax, "ab\ncdefg", range(8), width=4)
    assert [text.get_text() for text in ax.texts] == list("ab↵cdefg")
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2)]  # (column, row)
    assert [text.get_position() for text in ax.texts] == places
    grid = ax.images[0].get_array()
    assert grid.shape == (3, 4)
    assert grid[1, 2] == 5 and grid[2, 0] == 7
    assert np.ma.is_masked(grid[0, 3])


def test_text_heat_wants_one_value_for_each_character(ax):
    with pytest.raises(ValueError, match="3 characters and 2 values"):
        plot.text_heat(ax, "abc", [1, 2])


def test_tiles_tell_the_kinds_of_characters_apart(ax):
    plot.tiles(ax, ["aé B", "?\n3\t"])
    assert ax.images[0].get_array().tolist() == [[0, 0, 3, 1], [2, 4, 2, 3]]
    assert [text.get_text() for text in ax.texts] == list("aé␣B?↵3⇥")
    assert ax.texts[4].get_position() == (0, 1)  # (column, row)


@pytest.mark.parametrize("pieces", [["ab", "c"], [""], []])
def test_tiles_want_pieces_of_one_length(ax, pieces):
    with pytest.raises(ValueError, match="one length"):
        plot.tiles(ax, pieces)


def test_describe_says_what_is_there():
    fig, (left, right) = plot.figure(1, 2)
    left.set_title("loss")
    plot.loss_curve(left, range(200), np.linspace(4.1744, 2, 200), {"bigram": 2.454})
    plot.bars(right, "ab", [0.1234, 100.4])
    right.scatter([1, 2, 3], [-1, 0, 1e-17])
    assert plot.describe(fig) == (
        "loss; loss (nats per token) over step; line 'training' of 200 points, 2 to 4.2; level at 2.5"
        " | 2 bars, 0.12 to 100; 3 points, -1 to 0"
    )


def test_describe_changes_with_the_picture(ax):
    assert plot.describe(ax) == "empty"
    plot.heatmap(ax, np.eye(3))
    assert plot.describe(ax) == "grid of 3 × 3, 0 to 1"


def test_open_stops_of_the_road_carry_the_numbers_of_their_notebooks():
    _, ax = plot.figure()
    plot.road(ax, {"welcome": "a look", "data": "text", "ngrams": "counts", "tokens": "pieces"}, {"welcome", "ngrams"})
    words = [text.get_text() for text in ax.texts]
    assert [words[words.index(name) - 1] for name in ("welcome", "data", "ngrams", "tokens")] == ["00", "", "01", ""]
