"""Attacks by files that are signed, their signer fooled or an attacker, on a real engine: the old model serves on."""

import hashlib
import io
import json
import pickle
import time
import zipfile

import msgspec
import numpy as np
import pytest
from fakes import gguf_files
from fakes.bundles import mlp_bundle, mlp_onnx, npy
from fakes.fleets import NOW, wish
from fakes.simulator import Simulator

from edgekit import bundle
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import BundleError
from edgekit.ota.device import slots, trust
from edgekit.ota.device.update import Device, update
from edgekit.ota.messages import Installed, Refused, RolledBack
from edgekit.runtime import arrays

CLASS = "x86-64"
X = np.ones((1, 64), np.float32)
GOLDEN = "golden/image.npy"


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A device on which a real model serves: its bundle, and all that an attack is built from."""
    folder = tmp_path_factory.mktemp("world")
    simulator = Simulator(folder / "operator")
    serving = HostServing(CLASS, port=0, threads=1)
    device = Device("pi-1", CLASS, folder / "device", serving)
    trust.install_root(device.state, simulator.files["metadata/1.root.json"])
    sound = mlp_bundle(folder / "sound")
    one = simulator.add_bundle(sound, 1, CLASS)
    simulator.publish()
    assert isinstance(update(device, wish(one), simulator, NOW), Installed)
    yield folder, simulator, device, sound
    serving.close()


@pytest.fixture
def attack(world, tmp_path):
    """Sign a bundle with other files in it, let the device install it, and see that the first model still answers."""
    _, simulator, device, sound = world

    def attack(files, *, draft=None):
        before = slots.load(device.state).current
        own = {entry.path: sound.path(entry.path).read_bytes() for entry in sound.manifest.files}
        evil = bundle.seal(tmp_path / "evil", draft or sound.manifest, {**own, **files})
        release = simulator.add_bundle(evil, simulator.targets.version + 1, CLASS)
        simulator.publish()
        outcome = update(device, wish(release, f"d{release.version}"), simulator, NOW)
        assert slots.load(device.state).current == before
        assert device.serving.host.run({"image": X})[0]["scores"].shape == (1, 10)
        return outcome

    attack.sound = sound
    return attack


def with_weights(location, **entries):
    """Return the model's graph with the first weights in a file elsewhere."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    proto = onnx.load_from_string(mlp_onnx())
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    return proto.SerializeToString()


@pytest.mark.attack("external-data escape")
@pytest.mark.parametrize("location", ["../../../../secret", "../golden/image.npy"])
def test_signed_graph_that_reads_out_of_its_bundle_is_rolled_back_unopened(attack, world, location):
    (world[0] / "device/secret").write_bytes(bytes(1 << 20))
    outcome = attack({attack.sound.manifest.variants[0].main: with_weights(location)})
    assert isinstance(outcome, RolledBack)
    assert f"reads '{location}', which is not a file of this model" in outcome.reason


@pytest.mark.attack("absolute path")
def test_signed_graph_that_reads_an_absolute_path_is_rolled_back_unopened(attack):
    outcome = attack({attack.sound.manifest.variants[0].main: with_weights("/etc/hostname", length=1)})
    assert isinstance(outcome, RolledBack)
    assert "reads '/etc/hostname'" in outcome.reason


def as_gguf(sound):
    main = f"{CLASS}/model.gguf"
    variant = msgspec.structs.replace(sound.manifest.variants[0], format="gguf", main=main, files=(main,), inputs=(),
                                      outputs=())  # fmt: skip
    draft = msgspec.structs.replace(sound.manifest, task="text-generation", variants=(variant,), postprocess=None)
    return main, draft


@pytest.mark.attack("truncated GGUF")
def test_signed_gguf_that_is_cut_is_rolled_back_before_llama_cpp_reads_it(attack):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    main, draft = as_gguf(attack.sound)
    whole = gguf_files.model([("token_embd.weight", (32, 4), 0, 0)], data=bytes(512))
    outcome = attack({main: whole[:-100]}, draft=draft)
    assert isinstance(outcome, RolledBack)
    assert "'token_embd.weight' ends at byte" in outcome.reason


@pytest.mark.attack("oversized GGUF")
def test_signed_gguf_of_endless_counts_is_rolled_back_before_llama_cpp_reads_it(attack):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    main, draft = as_gguf(attack.sound)
    outcome = attack({main: gguf_files.model([], counts=(2**63, 2**63))}, draft=draft)
    assert isinstance(outcome, RolledBack)
    assert "9223372036854775808 tensors" in outcome.reason


@pytest.mark.attack("pickle")
def test_signed_golden_file_that_is_a_pickle_is_rolled_back_and_does_not_run(attack, tmp_path):
    mark, content = tmp_path / "it ran", io.BytesIO()
    np.save(content, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    outcome = attack({GOLDEN: content.getvalue()})
    assert isinstance(outcome, RolledBack)
    assert "objects are pickled, and not read" in outcome.reason
    assert not mark.exists()


@pytest.mark.attack("pickle")
def test_no_format_that_is_a_pickle_is_opened(attack, tmp_path):
    mark = tmp_path / "it ran"
    variant = msgspec.structs.replace(attack.sound.manifest.variants[0], format="pickle")
    draft = msgspec.structs.replace(attack.sound.manifest, variants=(variant,))
    outcome = attack({variant.main: pickle.dumps(Evil(mark))}, draft=draft)
    assert isinstance(outcome, RolledBack)
    assert "no engine runs pickle" in outcome.reason
    assert not mark.exists()


def test_evil_is_evil(tmp_path):
    """What the tests above say does not run would, if anything unpickled it."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "it ran"))).close()  # noqa: S301  # our own, and the very thing we refuse
    assert (tmp_path / "it ran").exists()


def header(shape, descr="<f4"):
    told = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told.encode()


BOMBS = {
    "numbers that are not there": (header("(1000000000000,)"), "tells of 4000000000000 bytes, 64 follow"),
    "a size that is below zero": (header("(-1,)"), "no plain numbers"),
    "a shape that is no shape": (header("(1" + ",(1" * 30), "no plain numbers"),
    "numbers of a terabyte each": (header("(1,)", "<U250000000000"), "no plain numbers"),
    "more than it says": (header("(2,)"), "tells of 8 bytes, 64 follow"),
}


@pytest.mark.attack("bomb")
@pytest.mark.parametrize("name", BOMBS)
def test_golden_file_that_promises_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path, name):
    start, because = BOMBS[name]
    (tmp_path / "a.npy").write_bytes(start + bytes(64))
    with pytest.raises(BundleError, match=because):
        arrays.read(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(npy(X))
    assert (arrays.read(tmp_path / "a.npy") == X).all()


@pytest.mark.attack("bomb")
def test_archive_in_the_place_of_an_array_is_never_unpacked(attack, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("image.npy", bytes(64 << 20))
    outcome = attack({GOLDEN: (tmp_path / "bomb.npz").read_bytes()})
    assert isinstance(outcome, RolledBack)
    assert "image.npy is no .npy file" in outcome.reason


@pytest.mark.attack("bomb")
@pytest.mark.parametrize("size", [2**63 - 1, (1 << 40) + 1])
def test_signed_file_larger_than_any_disk_is_refused_at_its_manifest(world, tmp_path, size):
    _, simulator, device, sound = world
    content = json.loads((sound.folder / "manifest.json").read_bytes())
    content["files"][0]["size"] = size
    data = json.dumps(content).encode()
    evil = mlp_bundle(tmp_path / "b", seed=size % 97, version=str(size))
    release = simulator.add_bundle(evil, simulator.targets.version + 1, CLASS)
    release = msgspec.structs.replace(release, bundle=hashlib.sha256(data).hexdigest())
    simulator.put(release, data)
    simulator.publish()
    outcome = update(device, wish(release, f"d{release.version}"), simulator, NOW)
    assert isinstance(outcome, Refused)
    assert "signed but is unusable" in outcome.reason
    del simulator.targets.targets[release.path]


@pytest.mark.attack("symlink")
@pytest.mark.attack("unlisted file")
@pytest.mark.parametrize("what", ["link", "file", "folder that is a link"])
def test_what_somebody_put_into_the_staging_folder_is_never_installed(world, tmp_path, what):
    _, simulator, device, _ = world
    good = mlp_bundle(tmp_path / "good", seed=7, version=what)
    release = simulator.add_bundle(good, simulator.targets.version + 1, CLASS)
    simulator.publish()
    staging = slots.staging_folder(device.state, release.bundle)
    staging.mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    if what == "file":
        (staging / "extra.so").write_bytes(b"evil")
    else:
        (staging / "extra").symlink_to(tmp_path / "secret" if what != "link" else "/etc/passwd")
    before = slots.load(device.state).current
    with pytest.raises(BundleError, match=r"is a link|not listed"):
        update(device, wish(release, f"d{release.version}"), simulator, NOW)
    assert slots.load(device.state).current == before
    assert not staging.exists()


@pytest.mark.attack("bomb")
def test_guard_of_a_large_file_reads_its_structure_alone(tmp_path):
    """A GGUF of a tebibyte, and no block of it on the disk: were the weights read, this would never end."""
    from edgekit.guards import ModelFile, check_file

    path, size = tmp_path / "m.gguf", 1 << 40
    with path.open("wb") as file:
        file.write(gguf_files.model([("w", (1 << 38,), 0, 0)]))
        try:
            file.truncate(len(gguf_files.model([("w", (1 << 38,), 0, 0)])) + size)
        except OSError:
            pytest.skip("this file system has no files of a tebibyte with holes in them")
    started = time.process_time()
    check_file(ModelFile(tmp_path, "m.gguf"), "gguf")
    assert time.process_time() - started < 5
