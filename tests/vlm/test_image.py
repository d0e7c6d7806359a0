"""Preprocessing by numbers: against the processors that models come with, and by hand."""

import numpy as np
import pytest
from PIL import Image

from tokcompile import InputError
from tokcompile.vlm import Patches, Preprocess


@pytest.fixture
def picture(tmp_path):
    """70 x 50 pixels, smooth, so that filters agree to rounding."""
    y, x = np.mgrid[:50, :70]
    array = np.stack([x * 3, y * 5, (x + y) * 2], -1).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_stretched_and_normalised(picture):
    got = Preprocess((56, 48), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))(picture, (1, 3, 56, 48))
    resized = np.asarray(Image.open(picture).resize((48, 56), 3), dtype=np.float32) / 255
    want = (resized - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    assert got.shape == (1, 3, 56, 48)
    assert np.abs(got[0].numpy().transpose(1, 2, 0) - want).max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 1, 3, 56, 56)])
def test_other_axes_in_front(shape, picture):
    assert Preprocess((56, 56))(picture, shape).shape == shape


def test_the_middle_of_the_short_side(picture):
    got = Preprocess((50, 50), (0, 0, 0), (1, 1, 1), "crop")(picture, (3, 50, 50))
    want = np.asarray(Image.open(picture))[:, 10:60].astype(np.float32) / 255
    assert np.abs(got.numpy().transpose(1, 2, 0) - want).max() < 1e-6


def test_padded_to_a_square(picture):
    got = Preprocess((70, 70), (0.5, 0.5, 0.5), (1, 1, 1), "pad")(picture, (3, 70, 70))
    assert got[:, :9].abs().max() < 0.01
    want = np.asarray(Image.open(picture)).astype(np.float32) / 255 - 0.5
    assert np.abs(got[:, 10:60].numpy().transpose(1, 2, 0) - want).max() < 1e-6


def test_patches_as_qwen_takes_them(picture):
    """Written out patch by patch: 2 x 2 neighbours in a row, each with its channels, both frames, its rows and columns."""
    got = Preprocess((48, 64), (0, 0, 0), (1, 1, 1), "stretch", patches=Patches(8, 2, 2))(picture, (48, 3 * 2 * 64))
    image = np.asarray(Image.open(picture).resize((64, 48), 3)).astype(np.float32) / 255
    at = 0
    for row in range(0, 6, 2):
        for column in range(0, 8, 2):
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                patch = image[(row + i) * 8 : (row + i + 1) * 8, (column + j) * 8 : (column + j + 1) * 8]
                want = np.stack([patch.transpose(2, 0, 1)] * 2, 1)
                assert np.abs(got[at].numpy() - want.reshape(-1)).max() < 1e-6
                at += 1
    assert at == len(got)


def test_the_processors_of_models(picture):
    """Only what tokenizes no text and needs no other package."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    want = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    got = Preprocess.from_config(processor.to_dict(), (1, 3, 56, 56))(picture, (1, 3, 56, 56))
    assert float((got - want).abs().max()) < 0.05
    assert transformers.__version__


def test_patches_from_a_configuration():
    config = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    made = Preprocess.from_config(config, (48, 1176), (1, 8, 6))
    assert (made.size, made.fit, made.patches) == ((112, 84), "aspect", Patches(14, 2, 2))
    with pytest.raises(InputError, match="image_grid_thw"):
        Preprocess.from_config(config, (48, 1176))
    assert Preprocess.from_data(made.data()) == made


def test_images_that_do_not_fit(picture, tmp_path):
    aspect = Preprocess((56, 56), fit="aspect")
    with pytest.raises(InputError, match=r"is 70 x 50 pixels, and this model was made for images shaped like 56 x 56"):
        aspect(picture, (3, 56, 56))
    with pytest.raises(InputError, match=r"become 1x3x56x56, and the vision part takes 2x3x56x56"):
        Preprocess((56, 56))(picture, (2, 3, 56, 56))
    (tmp_path / "no.png").write_text("nothing")
    for path in (tmp_path / "no.png", tmp_path / "missing.png"):
        with pytest.raises(InputError, match="cannot read the image"):
            aspect(path, (3, 56, 56))


@pytest.mark.parametrize("wrong", [dict(fit="tile"), dict(resample="cubic"), dict(std=(1, 0, 1)), dict(mean=(0.5,))])
def test_numbers_that_are_none(wrong):
    with pytest.raises(InputError):
        Preprocess((56, 56), **wrong)


def test_without_a_shape_of_an_image():
    with pytest.raises(InputError, match="are no image"):
        Preprocess.from_config({}, (48, 1176))
