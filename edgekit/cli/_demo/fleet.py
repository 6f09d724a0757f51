"""The last five chapters: a fleet gets v1, refuses forgeries, takes v2 under load, and survives a bad v3."""

from __future__ import annotations

import copy
import shutil
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit import workload
from edgekit.cli._demo import cast, models, plots
from edgekit.errors import UsageError
from edgekit.model import TorchNetwork
from edgekit.ota import messages, mqtt
from edgekit.ota.messages import Desired
from edgekit.ota.release import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.cli._demo.cast import Fleet
    from edgekit.cli._demo.models import Workshop
    from edgekit.cli._demo.story import Story
    from edgekit.model import Model
    from edgekit.ota.server.rollout import Rollout

LIMITS = Limits(min_agreement=0.6, probation_requests=25, probation_seconds=20)
"""Signed with every release: on live requests the new model must agree with the old one on six in ten."""


def play(story: Story, shop: Workshop, whole: Bundle, small: Bundle) -> None:
    """Run the fleet through its five chapters."""
    data = workload.load_data(shop.example("efficientnet.py:data"))
    cat = workload.named_object(shop.example("efficientnet.py:cat_picture"))()
    picture = cat.read_bytes()  # type: ignore[attr-defined]  # the example returns a path
    samples = data.calibration.inputs["image"]
    marks: dict[str, float] = {}
    for old in ("fleet", "devices"):
        shutil.rmtree(shop.out / old, ignore_errors=True)
    with cast.running(shop.out / "fleet", shop.out / "devices", picture, samples) as fleet:
        _first_release(story, fleet, whole, picture)
        marks["tampered"] = fleet.now()
        name = _tampered(story, fleet, whole, small)
        marks["v2"] = fleet.now()
        _under_load(story, fleet, name, (whole, small))
        marks["replay"] = fleet.now()
        _replayed(story, fleet, small)
        marks["bad v3"] = fleet.now()
        _bad_release(story, shop, fleet, small)
    _nothing_failed(story, fleet, {"v1 fp32": whole.digest, "v2 int8": small.digest}, marks)


def _first_release(story: Story, fleet: Fleet, whole: Bundle, picture: bytes) -> None:
    story.chapter("A fleet of six gets its first model, signed, over MQTT")
    story.tell("pi-1 is a process of its own with an HTTP server; pi-2 to pi-6 run in threads. The broker is embedded.")
    fleet.publish(whole, LIMITS)
    fleet.roll_out(1, (1.0,))
    took = fleet.wait("all run v1", lambda: _running(fleet, whole) == 6)
    count = _running(fleet, whole)
    story.check("six devices verified, tried out and serve v1 (fp32)", f"{count} of 6, {took:.1f} s", holds=count == 6)
    fleet.wait("pi-1 answers over HTTP", lambda: bool(fleet.requests))
    label, share = fleet.requests[-1].labels[0]
    story.tell(f"pi-1 sees the photograph of a cat: {label}, {share:.0%} sure.")
    story.show("Chelsea, as pi-1 was asked about her", plots.picture(picture))


def _tampered(story: Story, fleet: Fleet, whole: Bundle, small: Bundle) -> str:
    """Change one byte of v2's weights on the server; the canary must not install it, and nobody else is asked to."""
    story.chapter("Somebody changes one byte on the server")
    fleet.publish(small, LIMITS)
    variant = small.manifest.variant(cast.CLASS)
    entry = next(e for e in small.manifest.files if e.path == variant.main)
    blob = fleet.folder / "repository" / "blobs" / entry.sha256
    genuine = blob.read_bytes()
    _overwrite(blob, genuine[:1000] + bytes([genuine[1000] ^ 1]) + genuine[1001:])
    name = fleet.roll_out(2, (0.1, 1.0))
    fleet.wait("the canary raises the alarm", lambda: bool(_answered(fleet.rollout(name), "failed")))
    canary = fleet.rollout(name).assigned
    reason = fleet.devices()[next(iter(canary))].reason
    story.check(
        "the tampered v2 was not installed", f"{', '.join(canary)}: {reason}", holds=bool(reason) and len(canary) == 1
    )
    story.check("every device still serves v1", f"{_running(fleet, whole)} of 6", holds=_running(fleet, whole) == 6)
    story.tell("Nobody else is asked. The operator restores the file; the canary tries again by itself and goes on.")
    _overwrite(blob, genuine)
    return name


def _under_load(story: Story, fleet: Fleet, name: str, versions: tuple[Bundle, Bundle]) -> None:
    story.chapter("v2 (int8) arrives in two waves while requests keep flowing")
    whole, small = versions
    before = len(fleet.requests)
    took = fleet.wait("the rollout is done", lambda: fleet.rollout(name).status == "done")
    fleet.wait("pi-1 answers with v2", lambda: fleet.requests[-1].digest == small.digest)
    seen = fleet.requests[before:]
    digests = {r.digest for r in seen}
    label, share = fleet.requests[-1].labels[0]
    story.check("all six run v2", f"{_running(fleet, small)} of 6, {took:.1f} s", holds=_running(fleet, small) == 6)
    story.check("the int8 model on pi-1 recognizes the cat", f"{label}, {share:.0%}", holds="cat" in label.lower())
    errors = [r.error for r in seen if r.error]
    story.check(
        "no request failed during the swap", f"{len(errors)} of {len(seen)} failed", holds=not errors and len(seen) > 20
    )
    story.check(
        "both versions answered in that stream",
        f"{len(digests)} digests",
        holds=digests == {whole.digest, small.digest},
    )


def _replayed(story: Story, fleet: Fleet, small: Bundle) -> None:
    """Publish an old wish in the server's name, as anyone could who got into the broker, as if it were the newest."""
    story.chapter("An attacker replays the order for v1, which was signed once")
    channel = mqtt.connect(fleet.url, "attacker")
    release = f"models/{cast.MODEL}/{cast.CLASS}/1.json"
    newest = int(time.time() * 1000)  # one of a lower revision is not even looked at
    old = Desired(deployment="replayed", attempt=1, release=release, version=1, revision=newest)
    heard: list[messages.Report] = []
    channel.subscribe(
        messages.topic(cast.FLEET, "pi-1", "report"),
        lambda a: heard.append(messages.decode(a.payload, messages.Report)),  # type: ignore[arg-type]  # a union is a type to msgspec
    )
    channel.publish(messages.topic(cast.FLEET, "pi-1", "desired"), messages.encode(old), retain=True)
    fleet.wait("pi-1 answers the replay", lambda: any(isinstance(r, messages.Refused) for r in heard))
    refusal = next(r for r in heard if isinstance(r, messages.Refused))
    channel.close()
    heard_at = len(fleet.requests)
    fleet.wait("pi-1 answers again", lambda: len(fleet.requests) > heard_at + 1)
    story.check("the replayed v1 was refused", refusal.reason, holds=refusal.version == 1)
    serves = fleet.requests[-1].digest
    story.check("pi-1 still serves v2", f"digest {serves[:12]}", holds=serves == small.digest)


def _bad_release(story: Story, shop: Workshop, fleet: Fleet, small: Bundle) -> None:
    """Publish a sound, signed model whose classes are shifted by one; live traffic must catch it."""
    story.chapter("A bad v3: trained on a class list that was shifted by one")
    story.tell(
        "The file computes exactly what its model computes, and every signature is right. Only live traffic can tell."
    )
    model, target = _shifted(workload.load(str(shop.out / "efficientnet-int8"))), shop.out / "efficientnet-v3.edgekit"
    wrong = models.bundle_of(model, [cast.CLASS], target, version="3", name=cast.MODEL)
    fleet.publish(wrong, LIMITS)
    name = fleet.roll_out(3, (0.3, 1.0))
    fleet.wait("the rollout halts", lambda: fleet.rollout(name).status == "halted")
    halted = fleet.rollout(name)
    rolled_back = _answered(halted, "rolled-back")
    for device in rolled_back:
        story.tell(f"{device}: {fleet.devices()[device].reason}")
    story.check("the canary rolled back to v2 by itself", ", ".join(rolled_back) or "nobody", holds=bool(rolled_back))
    fleet.wait("the canary serves v2", lambda: _running(fleet, small) == 6)
    untouched = 6 - len(halted.assigned)
    seen = f"{untouched} of 6 devices never saw v3; {halted.reason}"
    story.check("the rollout halted in its canary wave", seen, holds=halted.wave == 0 and untouched >= 4)
    story.check("every device serves v2", f"{_running(fleet, small)} of 6", holds=_running(fleet, small) == 6)


def _nothing_failed(story: Story, fleet: Fleet, versions: dict[str, str], marks: dict[str, float]) -> None:
    failed, total = fleet.failed_requests(), len(fleet.requests) + fleet.others
    seen = f"{len(failed)} of {total:,} failed{': ' if failed else ''}{''.join(failed[:1])}"
    story.check("not one request failed in the whole story", seen, holds=not failed and total > 200)
    names = {digest: name for name, digest in versions.items()}
    points: dict[str, list[tuple[float, float]]] = {}
    for request in fleet.requests:
        if not request.error:
            points.setdefault(names.get(request.digest, "v3 bad"), []).append((request.at, request.ms))
    story.show(
        "Every request to pi-1: its latency over HTTP, coloured by the version that answered",
        plots.timeline(points, marks),
    )


def _running(fleet: Fleet, bundle: Bundle) -> int:
    """Count the devices that report the bundle and whose last answer to a request came from it."""
    reported = {name for name, device in fleet.devices().items() if device.bundle == bundle.digest}
    return sum(fleet.answered_by.get(name) == bundle.digest for name in reported)


def _answered(rollout: Rollout, outcome: str) -> list[str]:
    return sorted(name for name, a in rollout.assigned.items() if a.outcome == outcome)


def _overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _shifted(model: Model) -> Model:
    """Return the model with the rows of its classifier moved by one, as a wrong class list would."""
    if not isinstance(model.network, TorchNetwork):
        raise UsageError(f"{model.name} is no PyTorch network")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies its own graphs with a deprecated call
        module = copy.deepcopy(model.network.module)
    state = module.state_dict()
    for name in [n for n in state if n.endswith(("_fc.weight", "_fc.bias"))]:
        state[name] = state[name].roll(1, 0)
    module.load_state_dict(state)
    return replace(model, network=replace(model.network, module=module))
