"""The picture: borders and colours by hand, and a file that shows something."""

import numpy as np
import pytest

from tokcompile.demo.trackers import Stage, untouched

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install pillow")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")

from tokcompile.demo import picture as drawing  # noqa: E402

COLOURS = np.array([[[1.0, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]])  # 2 x 2 patches
CANVAS = COLOURS.repeat(4, 0).repeat(4, 1)


def stage(*owner):
    return Stage(0, "some", max(owner) + 1, True, np.array(owner))


def test_untouched_patches_are_painted_as_they_are():
    np.testing.assert_array_equal(drawing.paint(CANVAS, untouched(4), 2), CANVAS)
    assert drawing.borders(untouched(4), 2) == []


def test_merged_patches_get_their_mean_colour_and_one_outline():
    merged = stage(0, 0, 1, 2)
    painted = drawing.paint(CANVAS, merged, 2)
    np.testing.assert_allclose(painted[:4], np.broadcast_to([0.5, 0.5, 0], (4, 8, 3)))
    np.testing.assert_array_equal(painted[4:], CANVAS[4:])
    assert drawing.borders(merged, 2) == [[(0, 1), (1, 1)], [(1, 1), (2, 1)]]


def test_dropped_patches_are_dark_and_grey():
    dropped = stage(0, -1, 1, 2)
    painted = drawing.paint(CANVAS, dropped, 2)
    np.testing.assert_allclose(painted[:4, 4:], 0.587 * drawing.DARK)
    np.testing.assert_array_equal(painted[4:], CANVAS[4:])
    assert drawing.borders(dropped, 2) == [[(1, 0), (1, 1)], [(1, 1), (2, 1)]]


def test_the_file_shows_every_row(tmp_path):
    noise = np.random.default_rng(0)
    photograph = Image.fromarray(noise.integers(0, 255, (90, 120, 3), dtype=np.uint8))
    made = drawing.Picture("title", photograph, noise.random((224, 224)), [1, 3, 5])
    pairs = stage(*np.arange(256) // 2)
    made.rows = [
        drawing.Row("tome", ["one"], made.saliency * 0.5, [untouched(256), pairs, pairs]),
        drawing.Row("smaller input", ["two"], made.saliency, size=(154, 168)),
    ]
    drawing.draw(made, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 800 < pixels.shape[1]
    third = pixels.shape[0] // 3
    for top in (0, third, 2 * third):
        assert pixels[top : top + third].std() > 20
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_the_photograph_fills_the_patches_it_fills_in_the_model():
    made = drawing.Picture("", Image.new("RGB", (200, 100), "white"), np.zeros((224, 224)), [])
    bright = made.canvas.mean(2) > 0.5
    assert bright.all(1).sum() == 224  # half of the picture's 448 rows
    assert made.box == (slice(56, 168), slice(0, 224))
    assert bright[112:336].all()
