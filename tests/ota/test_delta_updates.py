"""A device with the right base fetches a delta; whatever is wrong with it, it gets the signed file all the same."""

import errno
import hashlib
import os
import shutil
import signal

import msgspec
import numpy as np
import pytest
from fakes.fleets import FLEET, NOW, PROFILE, QUICK, Fleet, install, noise, operator_signs, wish
from fakes.kills import run_and_kill
from fakes.steps import SIZE, sealed, weights
from fakes.weight_files import numbers

from edgekit import bundle
from edgekit.errors import ResourceError, TransferError
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.ota import messages
from edgekit.ota.deltas import applying, listing
from edgekit.ota.deltas.listing import Delta
from edgekit.ota.device import slots
from edgekit.ota.device.download import RESERVE_BYTES
from edgekit.ota.device.fetchers import ChannelFetcher, FolderFetcher
from edgekit.ota.device.update import update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Block, Installed
from edgekit.ota.server import publisher, repository
from edgekit.ota.server.delegations import role_of
from edgekit.ota.server.draft import Draft
from edgekit.ota.server.keys import Custody


class Deltas(Fleet):
    """A fleet whose versions are small steps from each other."""

    def publish(self, seed, data=None, count=3, **options):
        made = sealed(self.folder / "sealed" / str(seed), weights(seed) if data is None else data, **options)
        releases = publisher.publish(self.folder, made, now=NOW, limits=QUICK)
        self.signed = publisher.add_deltas(self.folder, releases, now=NOW, count=count)
        return releases[0]


@pytest.fixture
def fleet(tmp_path):
    return Deltas(tmp_path / "fleet")


@pytest.fixture
def story(fleet, tmp_path):
    """A device on which version 1 serves; version 2 is published with a delta."""
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    return fleet, device, fleet.publish(2)


def asked(fleet, device, release, fetcher=None, **options):
    """Install and return how many bytes each place of the repository gave."""
    seen = {}

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def stream(self, path, start, end):
            for piece in self.inner.stream(path, start, end):
                room = path.split("/")[0]
                seen[room] = seen.get(room, 0) + len(piece)
                yield piece

    outcome = update(device, wish(release, **options), Watched(fetcher or FolderFetcher(fleet.repository)), NOW)
    assert isinstance(outcome, Installed), outcome
    assert outcome.measured["downloaded_bytes"] == seen.get("blobs", 0) + seen.get("deltas", 0)
    return seen


def holds(device, data):
    state = slots.load(device.state)
    found = slots.open_current(device.state, state)
    assert found.path(found.manifest.variants[0].main).read_bytes() == data
    assert not list(device.state.glob("deltas/*"))
    return True


def whole_file(story, device=None, size=SIZE):
    """Check that the device fetches the whole file and ends with the signed one."""
    fleet, own, release = story
    seen = asked(fleet, device or own, release)
    assert seen["blobs"] >= size
    return holds(device or own, weights(release.version))


def resigned(fleet, release, change):
    """Let the operator sign another list of deltas than the one that was made."""
    enlist(fleet, release, listing.encode(tuple(change(fleet.signed[release.path]))))


def enlist(fleet, release, data):
    """Sign these bytes as the list of a release's deltas."""
    operator_signs(
        fleet, release.model, lambda signed: publisher._add_listing(fleet.folder, signed, release.deltas_path, data)
    )


def test_device_with_the_old_file_fetches_a_quarter_and_ends_with_the_same_bytes(story):
    fleet, device, release = story
    seen = asked(fleet, device, release)
    assert seen["deltas"] < 0.3 * SIZE
    assert "blobs" not in seen
    assert holds(device, weights(2))


def test_delta_comes_over_a_channel_as_well(story):
    fleet, device, release = story
    broker = MemoryBroker()
    requests = fleet.serve(broker.connect("server"))
    asked(fleet, device, release, ChannelFetcher(broker.connect("pi-1"), FLEET, "pi-1"))
    assert {r.path.split("/")[0] for r in requests} == {"metadata", "targets", "deltas"}
    assert holds(device, weights(2))


def test_device_three_versions_behind_needs_one_delta_and_one_further_behind_the_whole_file(fleet, tmp_path):
    first = fleet.publish(1)
    behind = [fleet.device(tmp_path / f"device-{i}") for i in (1, 2)]
    assert isinstance(install(fleet, behind[0], first), Installed)
    assert isinstance(install(fleet, behind[1], fleet.publish(2)), Installed)
    fleet.publish(3)
    fleet.publish(4)
    newest = fleet.publish(5)
    assert len(fleet.signed[newest.path]) == 3
    assert "blobs" not in asked(fleet, behind[1], newest)
    assert "deltas" not in asked(fleet, behind[0], newest)
    assert all(holds(device, weights(5)) for device in behind)


def test_delta_that_the_server_cannot_read_is_not_waited_for(story, monkeypatch):
    fleet, device, release = story
    read = repository.read_block

    def broken(folder, request):
        if request.path.startswith("deltas/"):
            return Block(error="cannot read it: Input/output error")
        return read(folder, request)

    monkeypatch.setattr(repository, "read_block", broken)
    broker = MemoryBroker()
    requests = fleet.serve(broker.connect("server"))
    asked(fleet, device, release, ChannelFetcher(broker.connect("pi-1"), FLEET, "pi-1"))
    assert {"deltas", "blobs"} <= {r.path.split("/")[0] for r in requests}
    assert holds(device, weights(2))


def test_device_without_anything_installed_gets_the_whole_file(story, tmp_path):
    assert whole_file(story, story[0].device(tmp_path / "new"))


def test_device_whose_base_lost_a_byte_gets_the_whole_file(story):
    _, device, _ = story
    state = slots.load(device.state)
    path = slots.open_current(device.state, state).path(f"{PROFILE}/model.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert whole_file(story)


def test_no_deltas_are_made_where_none_are_asked_for(fleet):
    fleet.publish(1)
    release = fleet.publish(2, count=0)
    assert fleet.signed == {}
    assert not (fleet.repository / "deltas").exists()
    assert [r.version for r in publisher.releases(fleet.folder)] == [1, release.version]


def test_lists_of_deltas_are_no_releases_and_versions_rise_beside_them(story):
    fleet, _, release = story
    assert release.deltas_path in Draft.of(Custody(fleet.folder), NOW).role(role_of(release.model)).targets
    assert [r.version for r in publisher.releases(fleet.folder)] == [1, 2]
    assert fleet.publish(3).version == 3


def test_another_model_in_the_same_place_is_no_delta(fleet):
    fleet.publish(1)
    assert fleet.publish(2, data=noise("other", SIZE)).path not in fleet.signed
    assert list((fleet.repository / "deltas").iterdir()) == []


def test_external_data_of_onnx_are_cut_where_the_graph_says(fleet, tmp_path, monkeypatch):
    """The file of weights is bare bytes: what its tensors are stands in the graph beside it."""
    onnx = pytest.importorskip("onnx")
    found = []
    made = publisher.deltas.making.make
    monkeypatch.setattr(publisher.deltas.making, "make", lambda *a, **k: found.extend(a[:2]) or made(*a, **k))
    device = fleet.device(tmp_path / "device")
    for version in (1, 2):
        arrays = numbers(1, first=(32, 64), second=(64, 64))
        arrays["second"] = arrays["second"] * np.float32(1 + version / 1000)
        model = onnx.helper.make_model(
            onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()])
        )
        place = tmp_path / str(version)
        place.mkdir()
        onnx.save(model, place / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
        files = {"name": "model.onnx", "w.data": (place / "w.data").read_bytes()}
        release = fleet.publish(version, data=(place / "model.onnx").read_bytes(), **files)
        assert isinstance(install(fleet, device, release), Installed)
    names = {tuple(tensor.name for tensor in source.tensors) for source in found if source.tensors}
    assert names == {("first", "second")}
    assert {tensor.layout for source in found for tensor in source.tensors} == {"float32"}
    (delta,) = fleet.signed[release.path]
    assert delta.size < 0.6 * 4 * 64 * 96


def test_renamed_file_is_recognised(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    release = fleet.publish(2, name="model-2.bin")
    assert "blobs" not in asked(fleet, device, release)
    assert holds(device, weights(2))


@pytest.mark.parametrize("names", [[f"{PROFILE}.fp32", f"{PROFILE}.int8"], [PROFILE, f"{PROFILE}.fp32"]])
def test_deltas_are_made_of_the_variants_that_a_release_signs(fleet, names):
    signed = [name for name in names if name != PROFILE]
    for seed in (1, 2):
        variants = tuple(
            Variant(
                name=name,
                format="onnx",
                precision="fp32",
                main=f"{name}/model.onnx",
                files=(f"{name}/model.onnx",),
                parity=Parity(status="checked"),
            )
            for name in names
        )
        files = {f"{name}/model.onnx": noise(name, 400_000) + noise(f"{name}{seed}", 4000) for name in names}
        manifest = Manifest(name="digits", version=str(seed), task="tensor", variants=variants, files=())
        made = bundle.seal(fleet.folder / "sealed" / f"{seed}", manifest, files)
        options = {"limits": QUICK, "profiles": (PROFILE,), "variants": tuple(signed)}
        releases = publisher.publish(fleet.folder, made, now=NOW, **options)
        deltas = publisher.add_deltas(fleet.folder, releases, now=NOW)
    shas = {entry.sha256 for name in signed for entry in made.manifest.files_of(name)}
    assert len(deltas[releases[0].path]) == len(signed)
    assert {delta.new for delta in deltas[releases[0].path]} <= shas


@pytest.mark.attack("unsigned delta")
def test_unsigned_delta_is_never_used(story):
    fleet, device, release = story
    operator_signs(fleet, release.model, lambda signed: signed.targets.pop(release.deltas_path))
    assert "deltas" not in asked(fleet, device, release)
    assert holds(device, weights(2))


def test_forged_list_of_deltas_is_not_believed_and_the_release_comes_whole(story):
    fleet, _, release = story
    (path,) = (fleet.repository / "targets").rglob("*.deltas.json")
    forged = [msgspec.structs.replace(d, size=1, sha256="0" * 64) for d in fleet.signed[release.path]]
    path.write_bytes(listing.encode(tuple(forged)))
    assert whole_file(story)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"deltas": 3}', b"\xff\xfe", b'{"deltas": [], "more": 1}'])
def test_signed_list_that_nobody_can_read_is_none(story, data):
    fleet, _, release = story
    enlist(fleet, release, data)
    assert whole_file(story)


@pytest.mark.parametrize("change", [lambda d: d + b"more", lambda d: d[:-1], lambda _: b"", lambda d: b"x" + d[1:]])
def test_delta_that_is_not_the_signed_one_is_dropped_and_the_whole_file_fetched(story, change):
    (path,) = (story[0].repository / "deltas").iterdir()
    path.write_bytes(change(path.read_bytes()))
    fleet, device, release = story
    length = fleet.signed[release.path][0].size
    if len(path.read_bytes()) > length:  # what is longer is cut at the signed length, and is then the signed one
        assert asked(fleet, device, release)["deltas"] == length
        assert holds(device, weights(2))
    else:
        assert whole_file(story)


@pytest.mark.attack("endless data")
def test_delta_longer_than_signed_is_refused(story):
    fleet, _, release = story
    resigned(fleet, release, lambda signed: [msgspec.structs.replace(d, size=d.size - 1) for d in signed])
    assert whole_file(story)


def test_missing_delta_is_no_reason_to_wait(story):
    shutil.rmtree(story[0].repository / "deltas")
    assert whole_file(story)


def test_signed_delta_that_gives_other_bytes_is_dropped(story):
    fleet, _, release = story
    wrong = fleet.signed[release.path][0]
    data = bytearray((fleet.repository / "deltas" / wrong.sha256).read_bytes())
    data[-1] ^= 1
    changed = Delta(base=wrong.base, new=wrong.new, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    (fleet.repository / "deltas" / changed.sha256).write_bytes(data)
    resigned(fleet, release, lambda _: [changed])
    assert whole_file(story)


def test_break_in_a_delta_goes_on_where_it_broke(story):
    fleet, device, release = story
    whole = fleet.signed[release.path][0].size

    class Torn(FolderFetcher):
        def stream(self, path, start, end):
            data = b"".join(super().stream(path, start, end))
            if path.startswith("deltas/") and start == 0:
                yield data[: whole // 3]
                raise TransferError("torn")
            yield data

    with pytest.raises(TransferError):
        asked(fleet, device, release, Torn(fleet.repository))
    assert asked(fleet, device, release)["deltas"] == whole - whole // 3
    assert holds(device, weights(2))


def test_rest_of_a_file_that_is_shorter_than_the_delta_is_fetched_instead(story):
    fleet, device, release = story
    target = slots.staging_folder(device.state, release.bundle) / PROFILE / "model.bin"
    target.parent.mkdir(parents=True)
    target.write_bytes(weights(2)[:-100])
    seen = asked(fleet, device, release)
    assert seen["blobs"] == 100
    assert "deltas" not in seen
    assert holds(device, weights(2))


def test_disk_too_small_for_file_and_delta_is_noticed_before_the_first_byte(story, monkeypatch):
    fleet, device, release = story
    usage = shutil.disk_usage(device.state)
    needed = SIZE + fleet.signed[release.path][0].size + RESERVE_BYTES
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            assert "blobs" not in asked(fleet, device, release)
        else:
            with pytest.raises(ResourceError, match="bytes free"):
                asked(fleet, device, release)
            assert not list((device.state / "deltas").glob("*"))


def metered_out(device, monkeypatch, room):
    """Let the disk have `room` bytes more than there are now; return a list of what was free each time it was asked."""
    usage = shutil.disk_usage(device.state)

    def held():
        return sum(path.stat().st_size for path in device.state.rglob("*") if path.is_file())

    before, free = held(), []

    def asked_for(_):
        free.append(room - (held() - before))
        return usage._replace(free=free[-1])

    monkeypatch.setattr(shutil, "disk_usage", asked_for)
    return free


def test_half_a_file_beside_its_delta_does_not_eat_into_the_reserve(story, monkeypatch):
    fleet, device, release = story
    target = slots.staging_folder(device.state, release.bundle) / PROFILE / "model.bin"
    target.parent.mkdir(parents=True)
    target.write_bytes(weights(2)[: SIZE // 2])
    delta = fleet.signed[release.path][0]
    free = metered_out(device, monkeypatch, SIZE - SIZE // 2 + delta.size + RESERVE_BYTES + 5000)
    apply = applying.apply

    def measuring(*arguments):
        apply(*arguments)
        shutil.disk_usage(device.state)

    monkeypatch.setattr(applying, "apply", measuring)
    assert "blobs" not in asked(fleet, device, release)
    assert min(free) >= RESERVE_BYTES


def test_delta_that_came_whole_before_a_kill_needs_no_room_twice(story, monkeypatch):
    fleet, device, release = story
    metered_out(device, monkeypatch, SIZE + fleet.signed[release.path][0].size + RESERVE_BYTES + 5000)

    def killed(*_):
        raise OSError(errno.EIO, "killed here")

    with monkeypatch.context() as patched:
        patched.setattr(applying, "apply", killed)
        with pytest.raises(OSError, match="killed here"):
            asked(fleet, device, release)
    assert not asked(fleet, device, release).keys() & {"blobs", "deltas"}
    assert holds(device, weights(2))


def test_delta_of_a_release_that_nobody_wants_any_more_is_swept(story):
    fleet, device, release = story
    scratch = slots.scratch_folder(device.state)
    scratch.mkdir()
    (scratch / ("0" * 64)).write_bytes(b"old")
    asked(fleet, device, release)
    assert not scratch.exists()


def test_block_paths_name_deltas_and_nothing_around_them():
    ok = messages.BlockRequest(path=f"deltas/{'0' * 64}", offset=0, length=1)
    assert messages.decode(messages.encode(ok), messages.BlockRequest) == ok
    for path in ("deltas/../keys/root.pem", "deltas/", "deltas/x", f"deltas/{'0' * 63}"):
        with pytest.raises(messages.MessageError):
            messages.decode(messages.encode(msgspec.structs.replace(ok, path=path)), messages.BlockRequest)


def test_kill_in_the_middle_of_applying_is_made_good_by_the_next_try(fleet, tmp_path, monkeypatch):
    old = noise("long", 3 << 20)
    new = bytes(b ^ (i % 97 == 0) for i, b in enumerate(old))
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1, data=old)), Installed)
    release = fleet.publish(2, data=new)
    child = os.fork()
    if child == 0:
        records = []
        read = applying.container.read_record

        def read_and_die(file):
            records.append(read(file))
            if len(records) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return records[-1]

        monkeypatch.setattr(applying.container, "read_record", read_and_die)
        try:
            install(fleet, device, release)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    half = (slots.scratch_folder(device.state) / "new").read_bytes()
    assert 0 < len(half) < len(new)
    assert holds_still(device, old)
    seen = asked(fleet, device, release)
    assert "blobs" not in seen
    assert "deltas" not in seen  # the delta had come before
    assert holds(device, new)


def holds_still(device, data):
    found = slots.open_current(device.state, slots.load(device.state))
    return found.path(f"{PROFILE}/model.bin").read_bytes() == data


@pytest.mark.slow
def test_kill_at_any_step_of_a_delta_update_leaves_the_old_or_the_new_bundle_and_the_update_completes(story, tmp_path):
    fleet, device, release = story
    for at in range(1, 300):
        copy = fleet.device(tmp_path / f"device-{at}")
        shutil.rmtree(copy.state)
        shutil.copytree(device.state, copy.state)
        killed = run_and_kill(lambda copy=copy: install(fleet, copy, release), at)
        state = slots.load(copy.state)
        found = slots.open_current(copy.state, state)
        version = 2 if state.current == release else 1
        assert found.path(f"{PROFILE}/model.bin").read_bytes() == weights(version)
        assert isinstance(install(fleet, copy, release), Installed)
        assert holds(copy, weights(2))
        shutil.rmtree(copy.state)
        if not killed:
            break
    assert at > 30
