"""Which variant of a release runs: the best that this device can, in the signed order, never another class's."""

import msgspec
import pytest
from fakes.fleets import NOW, OTHER, PROFILE, QUICK, Fleet, Serving, install, noise, operator_signs, wish
from fakes.kills import run_and_kill
from hypothesis import given
from hypothesis import strategies as st
from test_agent import Town

from edgekit import bundle
from edgekit.errors import HealthError, TransferError, UnknownName, Unrunnable, UsageError
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.ota.device import slots
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.needs import Capabilities, lacks
from edgekit.ota.device.update import MAX_TRIES, recover, retreat, update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Chosen, Installed, Refused, RolledBack
from edgekit.ota.release import Release, Replaces, from_custom, to_custom
from edgekit.ota.server import publisher

INT8, FP32, LITERT = PROFILE, f"{PROFILE}.fp32", f"{PROFILE}.litert"
PI = Capabilities(frozenset({"onnx", "tflite"}), {"onnxruntime": "1.20.1", "opset": ""}, frozenset({"neon"}))
NEEDS = {INT8: {"onnxruntime": ">=1.20", "opset": "21"}, FP32: {}, LITERT: {}, OTHER: {}}


def sealed(folder, seed=1, name="digits", needs=NEEDS, status="checked"):
    variants = tuple(
        Variant(
            name=one,
            format="tflite" if one == LITERT else "onnx",
            precision="fp32",
            main=f"{one}/model.onnx",
            files=(f"{one}/model.onnx",),
            parity=Parity(status=status),
            requires=requires,
        )
        for one, requires in needs.items()
    )
    files = {f"{one}/model.onnx": noise(f"{one}{seed}", 500) for one in needs} | {"labels.txt": b"zero\none\n"}
    manifest = Manifest(name=name, version=str(seed), task="tensor", variants=variants, files=())
    return bundle.seal(folder, manifest, files)


class Picky(Serving):
    """Cannot run some variants, and fails others; remembers what was tried."""

    def __init__(self, cannot=(), fails=()):
        super().__init__()
        self.cannot, self.fails, self.tried, self.serves = set(cannot), set(fails), [], None

    def try_out(self, bundle, release):
        self.tried.append(bundle.variant)
        assert (bundle.folder / bundle.manifest.variant(bundle.variant).main).is_file()
        if bundle.variant in self.cannot:
            raise Unrunnable(f"{bundle.variant} has an operator that nobody knows")
        if bundle.variant in self.fails:
            raise HealthError("p95 is too slow", measured={"p95_ms": 91.0, "broken": float("nan")})
        return super().try_out(bundle, release)

    def activate(self, bundle):
        super().activate(bundle)
        self.serves = bundle.variant if bundle else None


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


def publish(fleet, seed=1, needs=NEEDS, profiles=(PROFILE,), **options):
    made = sealed(fleet.folder / "sealed" / f"{seed}", seed, needs=needs)
    return publisher.publish(fleet.folder, made, now=NOW, limits=QUICK, profiles=profiles, **options)[0]


def device_of(fleet, folder, serving, capabilities=PI):
    device = fleet.device(folder, serving)
    return type(device)(device.name, device.profile, device.state, serving, capabilities)


def held(device):
    return sorted(path.relative_to(device.state / "bundles").as_posix() for path in device.state.glob("bundles/*/*/*"))


def test_the_best_variant_runs_and_no_byte_of_another_is_fetched(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())
    one = publish(fleet)
    assert one.order == (INT8, FP32, LITERT)
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.serves == INT8
    assert held(device) == [f"{one.bundle}/{INT8}/model.onnx"]
    assert slots.load(device.state).choices[one.path].left == {}


def test_a_variant_whose_engine_is_too_old_is_passed_over_without_being_fetched(fleet, tmp_path):
    old = Capabilities(PI.formats, {"onnxruntime": "1.19.2", "opset": ""})
    device = device_of(fleet, tmp_path / "d", Picky(), old)
    one = publish(fleet)
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.tried == [FP32]
    choice = slots.load(device.state).choices[one.path]
    assert choice.variant == FP32
    assert choice.left == {INT8: "it needs onnxruntime >=1.20, here is 1.19.2"}


def test_a_variant_that_turns_out_unrunnable_leaves_the_next_and_no_rollback(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky(cannot={INT8}))
    one = publish(fleet)
    word = install(fleet, device, one)
    assert isinstance(word, Installed)
    assert device.serving.tried == [INT8, FP32]
    state = slots.load(device.state)
    assert (state.rolled_back, state.begun) == ({}, {})
    assert "operator that nobody knows" in state.choices[one.path].left[INT8]
    assert held(device) == [f"{one.bundle}.{FP32}/{FP32}/model.onnx"], "what does not run is collected"
    reborn = device_of(fleet, device.state, Picky())
    assert recover(reborn) is None
    assert reborn.serving.serves == FP32, "the choice outlives a restart"
    assert install(fleet, reborn, one) == word


def test_a_variant_that_does_not_run_is_not_fetched_again_while_the_next_one_breaks_off(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky(cannot={INT8}))
    one = publish(fleet)
    manifest = bundle.read(fleet.folder / "sealed" / "1").manifest
    shas = {e.path.split("/")[0]: e.sha256 for e in manifest.files}
    asked = []

    class Breaking(FolderFetcher):
        def stream(self, path, start, end):
            asked.append(path)
            if path.endswith(shas[FP32]) and asked.count(path) < 3:
                raise TransferError("it broke off")
            return super().stream(path, start, end)

    for _ in range(2):
        with pytest.raises(TransferError):
            update(device, wish(one), Breaking(fleet.repository), NOW)
    assert isinstance(update(device, wish(one), Breaking(fleet.repository), NOW), Installed)
    assert asked.count(f"blobs/{shas[INT8]}") == 1
    assert device.serving.tried == [INT8, FP32]
    state = slots.load(device.state)
    assert "operator that nobody knows" in state.choices[one.path].left[INT8]
    assert state.unrunnable == {}


def test_the_fleet_is_told_which_variant_runs_and_why_not_the_better_one_but_only_where_there_is_a_choice(tmp_path):
    town = Town(tmp_path, MemoryBroker().connect)
    town.agent(Picky(cannot={INT8}))
    only, several = publish(town.fleet, variants=[FP32]), publish(town.fleet, 2)
    town.want(only)
    town.heard(Installed)
    town.want(several, "d2")
    word = town.heard(Chosen)
    assert (word.bundle, word.variant, list(word.left)) == (several.bundle, FP32, [INT8])
    assert "operator that nobody knows" in word.left[INT8]
    assert len([one for one in town.said if isinstance(one, Chosen)]) == 1
    town.end()


def test_a_variant_that_runs_and_misbehaves_is_rolled_back_with_its_figures_and_not_replaced_by_a_worse(
    fleet, tmp_path
):
    device = device_of(fleet, tmp_path / "d", Picky(fails={INT8}))
    word = install(fleet, device, publish(fleet))
    assert isinstance(word, RolledBack)
    assert device.serving.tried == [INT8]
    assert word.measured == {"p95_ms": 91.0}


def test_where_no_variant_runs_the_old_release_serves_on_and_every_reason_is_told(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())
    one = publish(fleet)
    install(fleet, device, one)
    device.serving.cannot = {INT8, FP32, LITERT}
    word = install(fleet, device, publish(fleet, 2), deployment="d2")
    assert isinstance(word, RolledBack)
    for name in (INT8, FP32, LITERT):
        assert f"{name}: {name} has an operator" in word.reason
    assert slots.load(device.state).current == one
    assert device.serving.serves == INT8


def test_the_signed_order_decides_and_what_it_leaves_out_never_runs(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky(cannot={LITERT}))
    one = publish(fleet, variants=[LITERT, FP32])
    assert one.order == (LITERT, FP32)
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.tried == [LITERT, FP32]


def test_a_release_signed_with_another_classs_variant_is_refused(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky(cannot={INT8}))
    one = publish(fleet)
    forged = msgspec.structs.replace(one, variants=(INT8, OTHER))

    def forge(targets):
        targets.targets[one.path].unrecognized_fields["custom"] = to_custom(forged)

    operator_signs(fleet, one.model, forge)
    word = install(fleet, device, one)
    assert isinstance(word, Refused)
    assert f"names the variant {OTHER}" in word.reason
    assert device.serving.tried == []


def test_the_same_bundle_with_another_variant_does_not_touch_the_folder_that_serves(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())
    made = sealed(tmp_path / "sealed")
    one, two = (
        publisher.publish(fleet.folder, made, now=NOW, limits=QUICK, profiles=[PROFILE], variants=[name])[0]
        for name in (INT8, FP32)
    )
    assert one.bundle == two.bundle
    install(fleet, device, one)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert device.serving.serves == FP32
    assert len(held(device)) == 2
    assert isinstance(retreat(device, two.bundle, "it crashes"), RolledBack)
    assert device.serving.serves == INT8


@pytest.mark.slow
def test_kill_at_any_step_between_two_variants_leaves_old_or_new_whole_and_the_choice_right(fleet, tmp_path):
    one, two = publish(fleet), publish(fleet, 2)
    points = 0
    for at in range(1, 300):
        device = device_of(fleet, tmp_path / f"d{at}", Picky())
        install(fleet, device, one)
        device.serving.cannot = {INT8}
        if not run_and_kill(lambda device=device: install(fleet, device, two, deployment="d2"), at):
            break
        points += 1
        reborn = device_of(fleet, device.state, Picky(cannot={INT8}))
        state = slots.load(device.state)
        recover(reborn)
        assert reborn.serving.serves == {one: INT8, two: FP32}[state.current]
        assert isinstance(install(fleet, reborn, two, deployment="d2"), Installed)
        assert reborn.serving.serves == FP32
    assert points > 20


class Deadly(Picky):
    """Takes the agent down, as the out-of-memory killer does: nothing behind it is written."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def try_out(self, bundle, release):
        self.power.setattr(slots, "save", lambda *_: None)
        raise KeyboardInterrupt


def test_a_release_that_takes_the_agent_down_three_times_is_not_begun_again_but_a_newer_one_is(fleet, tmp_path):
    one = publish(fleet)
    for attempt in range(MAX_TRIES):
        with pytest.MonkeyPatch.context() as power:
            device = device_of(fleet, tmp_path / "d", Deadly(power))
            with pytest.raises(KeyboardInterrupt):
                install(fleet, device, one)
        assert slots.failures(slots.load(device.state), one.path) == attempt + 1
    device = device_of(fleet, tmp_path / "d", Picky())
    word = install(fleet, device, one, attempt=9)
    assert isinstance(word, RolledBack)
    assert "not tried again" in word.reason
    assert device.serving.tried == []
    assert isinstance(install(fleet, device, publish(fleet, 2), deployment="d2"), Installed)


def test_crashes_of_the_agent_and_failures_of_the_model_count_together(fleet, tmp_path):
    one = publish(fleet)
    with pytest.MonkeyPatch.context() as power, pytest.raises(KeyboardInterrupt):
        install(fleet, device_of(fleet, tmp_path / "d", Deadly(power)), one)
    device = device_of(fleet, tmp_path / "d", Picky(fails={INT8}))
    install(fleet, device, one)
    assert slots.failures(slots.load(device.state), one.path) == 2
    install(fleet, device, one, attempt=2)
    device.serving.tried.clear()
    assert "not tried again" in install(fleet, device, one, attempt=3).reason
    assert device.serving.tried == []


def test_a_try_out_that_is_stopped_in_good_order_counts_for_nothing(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())

    def stopped(*_):
        raise OSError(28, "No space left on device")

    device.serving.try_out = stopped
    for _ in range(MAX_TRIES + 1):
        with pytest.raises(OSError, match="No space"):
            install(fleet, device, publish_once(fleet))
    assert slots.load(device.state).begun == {}


def publish_once(fleet):
    signed = publisher.releases(fleet.folder)
    return signed[0] if signed else publish(fleet)


def test_an_update_may_name_the_least_version_it_replaces(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())
    one, two = publish(fleet), publish(fleet, 2)
    three = publish(fleet, 3, replaces=Replaces(version=2))
    install(fleet, device, one)
    word = install(fleet, device, three, deployment="d3")
    assert isinstance(word, Refused)
    assert "replaces version 2 and later, version 1 is installed" in word.reason
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert isinstance(install(fleet, device, three, deployment="d4"), Installed)
    fresh = device_of(fleet, tmp_path / "fresh", Picky())
    assert isinstance(install(fleet, fresh, three), Installed), "where nothing is installed nothing is replaced"


def test_another_model_takes_over_only_if_its_owner_signed_that_and_the_way_back_is_no_way_down(fleet, tmp_path):
    device = device_of(fleet, tmp_path / "d", Picky())
    for seed in (1, 2):
        newest = publish(fleet, seed, replaces=Replaces(models=("cats",)))
        install(fleet, device, newest, deployment=f"d{seed}")
    cats = [
        publisher.publish(
            fleet.folder, sealed(tmp_path / f"cats{n}", n, "cats"), now=NOW, limits=QUICK, profiles=[PROFILE], **options
        )[0]
        for n, options in ((1, {}), (2, {"replaces": Replaces(models=("digits",))}))
    ]
    assert "another model" in install(fleet, device, cats[0], deployment="c1").reason
    assert isinstance(install(fleet, device, cats[1], deployment="c2"), Installed)
    older = Release(**{**msgspec.structs.asdict(newest), "version": 1})
    word = update(device, wish(older, "back"), FolderFetcher(fleet.repository), NOW)
    assert isinstance(word, Refused)
    assert "back from version 2 to 1" in word.reason
    assert isinstance(install(fleet, device, newest, deployment="again"), Installed)


def test_publishing_names_what_is_wrong_with_an_order(fleet, tmp_path):
    made = sealed(tmp_path / "sealed")
    with pytest.raises(UnknownName):
        publisher.publish(fleet.folder, made, now=NOW, variants=["nonesuch"])
    with pytest.raises(UsageError, match=f"{OTHER} is for none of"):
        publisher.publish(fleet.folder, made, now=NOW, profiles=[PROFILE], variants=[INT8, OTHER])
    with pytest.raises(UsageError, match="none of the variants"):
        publisher.publish(fleet.folder, made, now=NOW, profiles=[OTHER], variants=[INT8])
    unproved = sealed(tmp_path / "unproved", status="unverified")
    with pytest.raises(UsageError, match="unverified"):
        publisher.publish(fleet.folder, unproved, now=NOW, variants=[INT8])
    signed = publisher.publish(fleet.folder, made, now=NOW)
    assert {release.profile: release.order for release in signed} == {PROFILE: (INT8, FP32, LITERT), OTHER: (OTHER,)}


def test_a_release_without_new_fields_is_signed_as_before(fleet):
    one = publish(fleet, variants=[INT8])
    assert set(msgspec.json.decode(to_custom(one)["release"])) <= {"model", "profile", "version", "bundle", "limits"}
    assert from_custom(to_custom(one)) == one


def variant(requires, form="onnx"):
    return Variant(
        name="a",
        format=form,
        precision="int8",
        main="m",
        files=("m",),
        parity=Parity(status="checked"),
        requires=requires,
    )


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        ({}, ""),
        ({"onnxruntime": ">=1.20"}, ""),
        ({"onnxruntime": "1.20"}, ""),
        ({"onnxruntime": ">=1.20.2"}, "needs onnxruntime >=1.20.2, here is 1.20.1"),
        ({"onnxruntime": ">=1.9"}, ""),
        ({"opset": "99"}, ""),
        ({"ios": ">=17"}, "needs ios >=17, which is not here"),
        ({"isa": "neon"}, ""),
        ({"isa": "neon dotprod i8mm"}, "the processor has no dotprod; the processor has no i8mm"),
    ],
)
def test_what_a_variant_needs_is_compared_with_what_is_here(requires, told):
    assert told in lacks(variant(requires), PI)
    assert bool(lacks(variant(requires), PI)) == bool(told)
    assert lacks(variant(requires), None) == ""


def test_a_format_without_an_engine_is_named():
    assert lacks(variant({}, "coreml"), PI) == "no engine runs coreml here"


NUMBERS = st.lists(st.integers(0, 30), min_size=1, max_size=4)


@given(NUMBERS, NUMBERS)
def test_versions_are_compared_as_numbers_whatever_zeros_end_them(have, needed):
    here = Capabilities(frozenset({"onnx"}), {"x": ".".join(map(str, have))})
    width = max(len(have), len(needed))
    enough = have + [0] * (width - len(have)) >= needed + [0] * (width - len(needed))
    assert (lacks(variant({"x": f">={'.'.join(map(str, needed))}"}), here) == "") == enough
