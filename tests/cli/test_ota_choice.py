"""Real engines choose: the variant that loads runs, signed limits hold, the factory's bundle comes up. By commands."""

import json
import logging

import msgspec
import pytest
from click.testing import CliRunner
from fakes.bundles import gemm_onnx, mlp_bundle, mlp_onnx
from onnx import ModelProto

from edgekit import bundle
from edgekit.cli import cli
from edgekit.cli.ota import _member
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, Unrunnable, UsageError
from edgekit.ota.device import slots
from edgekit.ota.device.factory import Factory
from edgekit.ota.device.needs import lacks
from edgekit.ota.device.update import Device, recover
from edgekit.ota.release import Limits, Release
from edgekit.ota.server import publisher
from edgekit.runtime import capabilities

CLASS, PLAIN = "x86-64", "x86-64.plain"
FAST = ("--probation-requests", "0", "--probation-seconds", "0")


def ota(*arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def unknown_operator():
    """Return a file whose operator no engine has."""
    model = ModelProto.FromString(gemm_onnx([[1.0]] * 64))
    model.graph.node[0].op_type = "Quux"
    return model.SerializeToString()


def two_variants(folder, best=None, requires=None):
    """Seal a bundle whose own variant of the class holds ``best``, and a plain one that any ONNX Runtime runs."""
    sound = mlp_bundle(folder.with_name(f"{folder.name}-sound"))
    (own,) = sound.manifest.variants
    plain = msgspec.structs.replace(own, name=PLAIN, main=f"{PLAIN}/model.onnx", files=(f"{PLAIN}/model.onnx",))
    variants = (msgspec.structs.replace(own, requires=requires or {}), plain)
    files = {entry.path: sound.path(entry.path).read_bytes() for entry in sound.manifest.files}
    files |= {own.main: mlp_onnx() if best is None else best, plain.main: mlp_onnx()}
    return bundle.seal(folder, msgspec.structs.replace(sound.manifest, variants=variants), files)


def release_of(made, **limits):
    return Release(model="mlp", profile=CLASS, version=1, bundle=made.digest, limits=Limits(**limits))


@pytest.fixture
def serving():
    serving = HostServing(CLASS, threads=1)
    yield serving
    serving.close()


def update(fleet, state, *more, code=0):
    root = fleet / "repository" / "metadata" / "1.root.json"
    head = ("agent", "--state", state, "--root", root, "--device", "pi", "--target", CLASS, "--threads", "1")
    return ota(*head, "--repository", fleet / "repository", "--once", *more, code=code)


def test_a_device_runs_what_its_engine_takes_and_the_commands_say_why_not_the_better_one(tmp_path):
    fleet, state = tmp_path / "fleet", tmp_path / "pi"
    made = two_variants(tmp_path / "b", unknown_operator())
    ota("init", fleet, "--name", "home")
    said = json.loads(ota("publish", fleet, made.folder, *FAST, "--json").stdout)
    assert said["releases"][0]["variants"] == [CLASS, PLAIN]
    assert "installed version 1" in update(fleet, state).output
    found = slots.load(state)
    choice = found.choices[found.current.path]
    assert choice.variant == PLAIN
    assert "Quux" in choice.left[CLASS]
    assert [path.name for path in (state / "bundles").iterdir()] == [f"{made.digest}.{PLAIN}"]


def test_publish_signs_order_predecessors_and_limits(tmp_path):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--name", "home")
    made = two_variants(tmp_path / "b")
    more = ("--replaces", 3, "--replaces-model", "cats", "--max-rss", 200, "--max-load", 1.5, "--version", 7)
    assert f"{PLAIN}, {CLASS}" in ota("publish", fleet, made.folder, "--variants", f"{PLAIN},{CLASS}", *more).output
    (signed,) = publisher.releases(fleet)
    assert signed.order == (PLAIN, CLASS)
    assert (signed.replaces.version, signed.replaces.models) == (3, ("cats",))
    assert (signed.limits.max_rss_mib, signed.limits.max_load_seconds) == (200, 1.5)
    assert "unknown variant" in ota("publish", fleet, made.folder, "--variants", "nonesuch", code=2).output


@pytest.mark.parametrize(
    ("option", "told"),
    [(("--max-rss", 20), "more memory than the 20 MiB"), (("--max-load", 0.00001), "load of the try-out is")],
)
def test_a_broken_limit_is_rolled_back_with_what_was_measured(tmp_path, option, told):
    fleet, state = tmp_path / "fleet", tmp_path / "pi"
    ota("init", fleet, "--name", "home")
    ota("publish", fleet, two_variants(tmp_path / "b").folder, *FAST, *option)
    assert told in update(fleet, state, code=HealthError.exit_code).output
    word = slots.load(state).outcome
    assert word.measured["peak_rss_mib"] > 20
    assert ("load_ms" in word.measured) == (option[0] == "--max-load")


def test_each_signed_limit_of_a_try_out_is_held_and_told_with_its_unit(serving, tmp_path):
    made = two_variants(tmp_path / "b")
    figures = serving.try_out(made, release_of(made, max_rss_mib=2000, max_load_seconds=60, max_p95_ms=10_000))
    assert {"load_ms", "p95_ms", "peak_rss_mib", "sqnr_db"} <= set(figures)
    above = 0.98 * figures["peak_rss_mib"]
    with pytest.raises(HealthError, match=r"memory than the|peak_rss of the try-out is [\d.]+ MiB, limit") as caught:
        serving.try_out(made, release_of(made, max_rss_mib=above))
    assert caught.value.measured["peak_rss_mib"] > above


def test_what_no_engine_takes_is_unrunnable_and_what_answers_wrongly_is_not(serving, tmp_path):
    with pytest.raises(Unrunnable, match="Quux"):
        serving.try_out(made := two_variants(tmp_path / "b", unknown_operator()), release_of(made))
    wrong = mlp_bundle(tmp_path / "wrong", wrong_golden=True)
    with pytest.raises(HealthError) as caught:
        serving.try_out(wrong, release_of(wrong))
    assert not isinstance(caught.value, Unrunnable)
    assert caught.value.measured["sqnr_db"] < 0


def test_the_chosen_variant_serves_and_another_of_the_same_bundle_may_take_its_place(serving, tmp_path):
    two_variants(tmp_path / "b")
    for name in (CLASS, PLAIN, CLASS):
        serving.activate(bundle.read(tmp_path / "b", name))
        assert serving.host.session.variant.name == name


def test_the_factory_bundle_serves_a_device_that_has_nothing(serving, tmp_path):
    made = two_variants(tmp_path / "image", unknown_operator(), {"onnxruntime": ">=99"})
    here = _member.capabilities()
    device = Device("pi", CLASS, tmp_path / "pi", serving, here, factory=Factory(made.folder, made.digest))
    device.state.mkdir()
    recover(device)
    assert (serving.host.digest, serving.host.session.variant.name) == (made.digest, PLAIN)


def test_the_agent_takes_a_factory_bundle_and_may_do_without_the_sandbox_and_says_if_it_is_none(tmp_path, caplog):
    fleet, state = tmp_path / "fleet", tmp_path / "pi"
    made = two_variants(tmp_path / "b")
    ota("init", fleet, "--name", "home")
    ota("publish", fleet, made.folder, *FAST)
    with caplog.at_level(logging.ERROR):
        update(fleet, state, "--factory", tmp_path / "nowhere", "--unsafe-without-sandbox")
    assert "the factory bundle neither" in caplog.text
    assert slots.load(state).current.version == 1


def test_this_machine_has_what_our_own_exports_ask_for(tmp_path):
    here = _member.capabilities()
    made = two_variants(tmp_path / "b", requires={"onnxruntime": ">=1.20", "opset": "21"})
    assert lacks(made.manifest.variant(CLASS), here) == ""
    assert {"onnx", "null"} <= here.formats
    assert int(here.versions["memory_mib"]) > 100


def test_the_words_of_linux_for_instructions_are_those_of_the_classes(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("Features\t: fp asimd asimddp asimdhp i8mm\n")
    assert {"neon", "dotprod", "fp16", "i8mm"} <= capabilities.find(tmp_path).instructions
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: sse4_2 avx2 avx512_vnni\n")
    assert {"sse4_2", "avx2", "avx512_vnni"} <= capabilities.find(tmp_path).instructions
    assert capabilities.find(tmp_path / "nowhere").instructions == frozenset()


def test_a_clock_that_linux_does_not_know_to_be_set_is_told(monkeypatch):
    import ctypes

    for state, is_set in ((0, True), (5, False)):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, state=state: type("C", (), {"adjtimex": lambda *_: state}))
        assert _member.clock_is_set() == is_set


def test_a_factory_without_a_bundle_is_a_wrong_call(tmp_path):
    with pytest.raises(UsageError, match="no bundle"):
        Factory(tmp_path).open(CLASS, None)
