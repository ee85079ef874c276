"""Axes and curves of the charts."""

import re

import pytest

from DeBERTa.report.charts import (
    LEFT,
    MOST_POINTS,
    RIGHT,
    WIDTH,
    Curve,
    Kind,
    choose_ticks,
    draw_svg,
    thin_out,
)

LINEAR, LOG = Kind("a title", "", ""), Kind("a title", "", "", True)


@pytest.mark.parametrize("low", [-3.0, 0.0, 1e-6, 0.069, 7.0, 1e9])
@pytest.mark.parametrize("size", [1e-6, 0.013, 1.0, 42.0, 1e6])
def test_ticks(low, size):
    high = low + size
    if high == low:
        pytest.skip("not two numbers")
    ticks = choose_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in ticks)


def test_logarithmic_ticks():
    assert choose_ticks(0.5, 2000.0, True) == [1.0, 10.0, 100.0, 1000.0]
    assert choose_ticks(4.0, 90.0, True) == [5.0, 10.0, 20.0, 50.0]


@pytest.mark.parametrize("number", [1, 2, MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS + 7])
def test_long_curves_are_thinned_out(number):
    points = [(step, 3.0 * step) for step in range(number)]
    thin = thin_out(points)
    assert len(thin) <= MOST_POINTS + 1
    assert thin[-1] == points[-1]
    assert thin == points or number > MOST_POINTS
    assert all(0 <= y <= 3.0 * number for _, y in thin)


@pytest.mark.parametrize("kind", [LINEAR, LOG])
@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [5.0, 5.0], [-1.0, 1.0], [0.0, 3.0, 9.0], [1e-9, 1e9], [1e300, 1e-300]]
)
def test_curves_stay_inside(kind, values):
    curve = Curve("a & b", list(enumerate(values)), 0, 0)
    svg = draw_svg(kind, [curve])
    if len(values) == 1:  # a line would not be visible
        pairs = re.findall(r'<circle class="curve c0" cx="(.+?)" cy="(.+?)" r="3">', svg)
    else:
        (points,) = re.findall(r'points="([^"]+)"', svg)
        pairs = [point.split(",") for point in points.split()]
    numbers = [tuple(map(float, pair)) for pair in pairs]
    assert len(numbers) == len(values)
    assert all(LEFT <= x <= WIDTH - RIGHT and 10 <= y <= 186 for x, y in numbers)
    assert "a &amp; b" in svg


@pytest.mark.parametrize("last", [1, 6, 5000, 9999, 1_000_000])
def test_labels_of_steps_are_not_cut_off(last):
    """With 7 units per character, more than the font has."""
    svg = draw_svg(LINEAR, [Curve("a", [(0, 1.0), (last, 2.0)], 0, 0)])
    labels = re.findall(r'x="([\d.]+)" y="204" text-anchor="(\w+)">([^<]+)<', svg)
    assert labels
    for x, anchor, text in labels:
        assert float(x) + {"middle": 3.5, "end": 0}[anchor] * len(text) <= WIDTH
