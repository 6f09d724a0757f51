"""From a picture to the tensor a model was trained on, and from scores to labels."""

import io

import numpy as np
import pytest
from fakes import bundles
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import edgekit
from edgekit.errors import HealthError, InputError
from edgekit.manifest import Classification, ImagePreprocess
from edgekit.pictures import picture_to_tensor
from edgekit.runtime.labels import best_labels


def png(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_shorter_side_is_resized_and_the_centre_cropped():
    columns = np.repeat(np.arange(0, 200, dtype=np.uint8)[None], 100, 0)  # 200 wide, 100 high, value = column
    how = ImagePreprocess(input="image", resize=100, crop=50, mode="L")
    tensor = picture_to_tensor(png(Image.fromarray(columns)), how)
    assert tensor.shape == (1, 1, 50, 50)
    np.testing.assert_array_equal(tensor[0, 0, 0], np.arange(75, 125))


def test_channels_are_normalized_each_by_its_own_mean_and_deviation():
    how = ImagePreprocess(input="image", resize=8, crop=8, mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
    tensor = picture_to_tensor(png(Image.new("RGB", (8, 8), (110, 120, 130))), how)
    assert tensor.dtype == np.float32
    np.testing.assert_allclose(tensor[0, :, 0, 0], [50.0, 25.0, 20.0])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_any_kind_of_picture_becomes_three_channels(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    data = png(Image.new(mode, (20, 10)), kind)
    assert picture_to_tensor(data, ImagePreprocess(input="i", resize=4, crop=4)).shape == (1, 3, 4, 4)


def test_rotation_that_a_camera_noted_is_applied():
    picture = Image.new("L", (20, 10), 0)
    picture.paste(255, (0, 0, 10, 10))  # the left half is white
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees: left becomes top
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif, quality=100)
    tensor = picture_to_tensor(file.getvalue(), ImagePreprocess(input="i", resize=10, crop=10, mode="L"))
    assert tensor[0, 0, :3].mean() > 200
    assert tensor[0, 0, -3:].mean() < 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    picture = Image.effect_noise((24, 16), 80)
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    tensor = picture_to_tensor(file.getvalue(), ImagePreprocess(input="i", resize=16, crop=16, mode="L"))
    whole = picture_to_tensor(png(want), ImagePreprocess(input="i", resize=16, crop=16, mode="L"))
    np.testing.assert_array_equal(tensor, whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO"])
def test_formats_of_pictures_that_people_have_are_taken(kind):
    tensor = picture_to_tensor(
        png(Image.new("RGB", (8, 8), (200, 100, 50)), kind), ImagePreprocess(input="i", resize=8, crop=8)
    )
    np.testing.assert_allclose(tensor[0, :, 4, 4], [200, 100, 50], atol=6)


def test_eps_is_refused_because_pillow_would_start_ghostscript():
    with pytest.raises(InputError, match="are no picture"):
        picture_to_tensor(png(Image.new("L", (8, 8)), "EPS"), ImagePreprocess(input="i", resize=4, crop=4))


@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), seed=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_damaged_pictures_are_decoded_or_refused_and_nothing_else(kind, seed):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", 1.5
    file = io.BytesIO()
    picture.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    data = bytearray(file.getvalue())
    for _ in range(seed.choice([1, 2, 8])):
        data[seed.randrange(seed.choice([60, len(data)]))] = seed.randrange(256)
    try:
        tensor = picture_to_tensor(bytes(data), ImagePreprocess(input="i", resize=8, crop=8, mode="L"))
    except InputError:
        return
    assert tensor.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(InputError, match="are no picture"):
        picture_to_tensor(data, ImagePreprocess(input="i", resize=4, crop=4))


def test_truncated_picture_is_refused():
    data = png(Image.effect_noise((64, 64), 90))
    with pytest.raises(InputError, match="are no picture"):
        picture_to_tensor(data[: len(data) // 2], ImagePreprocess(input="i", resize=4, crop=4))


def test_small_file_that_claims_a_giant_picture_is_refused_before_it_is_decoded():
    bomb = png(Image.new("1", (9000, 9000)))
    with pytest.raises(InputError, match="megapixels"):
        picture_to_tensor(bomb, ImagePreprocess(input="i", resize=4, crop=4))


def test_labels_come_best_first_with_probabilities():
    how = Classification(output="scores", labels=("cat", "dog", "fox"), top_k=2)
    labels = best_labels(np.log(np.array([0.2, 0.7, 0.1])), how, how.top_k)
    assert [name for name, _ in labels] == ["dog", "cat"]
    np.testing.assert_allclose([share for _, share in labels], [0.7, 0.2])


def test_output_that_is_a_probability_already_is_left_alone():
    how = Classification(output="scores", softmax=False)
    assert best_labels(np.array([0.25, 0.75]), how, 1) == [("1", 0.75)]


def test_scores_that_are_not_finite_are_a_health_error():
    with pytest.raises(HealthError, match="NaN"):
        best_labels(np.array([np.nan, 1.0]), Classification(output="scores"), 1)


def test_bundle_recognizes_a_picture(tmp_path):
    bundles.brightness_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session:
        assert session.run_raw(png(Image.new("RGB", (20, 30), (250, 250, 250))))[0][0] == "bright"
        assert session.run_raw(png(Image.new("RGB", (20, 30), (5, 5, 5))))[0][0] == "dark"


def test_model_without_preprocessing_refuses_a_picture(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session:
        with pytest.raises(InputError, match="does not say how to read a picture"):
            session.run_raw(b"")
        with pytest.raises(InputError, match="gives no labels"):
            session.labels({})
