"""The house style and the attention map: labels where they belong, nothing global by import."""

import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib.colors import to_rgb

mpl.use("agg")
import matplotlib.pyplot as plt

from tfm_ref import plots

WEIGHTS = torch.tensor([[0.7, 0.25, 0.05], [0.0, 0.1, 0.9]])
QUERIES, KEYS = ["it", "was"], ["the", "tired", "cat"]


@pytest.fixture(autouse=True)
def _leave_no_trace():
    with mpl.rc_context():
        yield
    plt.close("all")


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_map_puts_labels_and_numbers_where_they_belong():
    ax = plots.attention_map(WEIGHTS, QUERIES, KEYS, title="one head")
    ax.figure.canvas.draw()
    assert (labels(ax.xaxis), labels(ax.yaxis)) == (KEYS, QUERIES)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("key", "query", "one head")
    written = {tuple(map(int, t.get_position())): (t.get_text(), t.get_color()) for t in ax.texts}
    assert written == {  # (column, row); a dot is exactly 0, and less than 0.1 is left blank
        (0, 0): ("0.7", "white"),
        (1, 0): ("0.2", "black"),
        (0, 1): ("·", "gray"),
        (1, 1): ("0.1", "black"),
        (2, 1): ("0.9", "white"),
    }
    heights = [label.get_window_extent().y0 for label in ax.get_xticklabels()]
    assert min(heights) > ax.get_window_extent().y1, "keys stand above the map"
    rows = [label.get_window_extent().y0 for label in ax.get_yticklabels()]
    assert rows[0] > rows[1], "the first query is the top row"


def test_map_means_the_same_in_every_picture():
    """0 and 1 have fixed colours: two maps compare, however small their weights."""
    plots.use_house_style()
    for weights in WEIGHTS, WEIGHTS / 100:
        image = plots.attention_map(weights, QUERIES, KEYS).images[0]
        assert image.get_clim() == (0, 1)
        assert torch.equal(torch.tensor(image.get_array()), weights)
        grey = [sum(image.cmap(image.norm(v))[:3]) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert grey == sorted(grey, reverse=True)
        assert grey[0] > 2.9, "0 is white"


def test_map_draws_into_given_axes_and_takes_graph_tensors():
    _, ax = plt.subplots()
    weights = WEIGHTS[:, :2].bfloat16().requires_grad_()
    assert plots.attention_map(weights, QUERIES, ax=ax) is ax
    assert plt.get_fignums() == [1]
    assert labels(ax.xaxis) == labels(ax.yaxis) == QUERIES


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("weights", "queries", "keys", "rule"),
    [
        (WEIGHTS, QUERIES, QUERIES, r"\(2, 2\); got \(2, 3\)"),
        (WEIGHTS, KEYS, KEYS, r"\(3, 3\); got \(2, 3\)"),
        (WEIGHTS, QUERIES, None, r"\(2, 2\); got \(2, 3\)"),
        (WEIGHTS[None], QUERIES, KEYS, r"\(2, 3\); got \(1, 2, 3\)"),
    ],
)
def test_map_refuses_labels_that_do_not_fit(weights, queries, keys, rule):
    message = rf"^weights must have one row per query and one column per key, {rule}$"
    with pytest.raises(ValueError, match=message):
        plots.attention_map(weights, queries, keys)
    assert plt.get_fignums() == []


def test_curves_stay_apart_without_colour():
    """Each curve of the cycle has its own marker and its own colour, visible on white."""
    plots.use_house_style()
    _, ax = plt.subplots()
    curves = [ax.plot([0, 1], [i, i])[0] for i in range(len(plots.COLORS))]
    assert len({curve.get_marker() for curve in curves}) == len(curves) == len(plots.MARKERS)
    assert len({to_rgb(curve.get_color()) for curve in curves}) == len(curves)
    assert all(sum(to_rgb(curve.get_color())) < 2.5 for curve in curves)


def test_importing_changes_no_setting():
    """Only the call sets matplotlib's defaults."""
    script = (
        "import matplotlib as mpl; before = dict(mpl.rcParams); import tfm_ref.plots as plots; "
        "assert dict(mpl.rcParams) == before; plots.use_house_style(); "
        "assert dict(mpl.rcParams) != before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_table_is_the_same_markdown_for_text_and_page():
    """Any iterable of rows does, once, and the table can still be shown twice."""
    table = plots.Table(["n", "n²"], ((n, n * n) for n in (2, 3)))
    expected = "| n | n² |\n|---|---|\n| 2 | 4 |\n| 3 | 9 |"
    assert repr(table) == table._repr_markdown_() == expected
    assert repr(plots.Table(["n"], {}.items())) == "| n |\n|---|"


@pytest.mark.parametrize("row", [(), (1,), (1, 2, 3)])
def test_table_refuses_a_row_that_does_not_fit(row):
    with pytest.raises(ValueError, match=r"^a row must have one entry per column \(2\); got \("):
        plots.Table(["n", "n²"], [(1, 2), row])
