"""Every message survives the wire, and nothing else does."""

import contextlib

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekit.errors import MessageError, TrustError
from edgekit.ota import messages
from edgekit.ota.messages import (
    MAX_ALERTS,
    MAX_BLOCK_BYTES,
    MAX_MESSAGE_BYTES,
    Alert,
    Block,
    BlockRequest,
    Chosen,
    Desired,
    Drift,
    Failed,
    Health,
    Hello,
    Installed,
    Refused,
    Report,
    RolledBack,
    Waiting,
)
from edgekit.ota.release import Limits, Release, from_custom, to_custom

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
COUNTS = st.integers(0, 1 << 53)
TEXTS = st.text(max_size=200).filter(lambda t: t.isprintable())
DIGESTS = st.from_regex(r"([0-9a-f]{64})?", fullmatch=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
MEASURED = st.dictionaries(TEXTS, NUMBERS, max_size=4)
PATHS = st.from_regex(r"models/[A-Za-z0-9._-]{1,20}/[A-Za-z0-9._-]{1,20}/[0-9]{1,9}\.json", fullmatch=True)
WHO = {"device": NAMES, "deployment": NAMES, "attempt": COUNTS, "version": COUNTS}
REPORTS = st.one_of(
    st.builds(
        Hello,
        device=NAMES,
        profile=NAMES,
        boot=NAMES,
        online=st.booleans(),
        release=TEXTS,
        version=COUNTS,
        bundle=DIGESTS,
        agent=TEXTS,
        facts=st.dictionaries(NAMES, TEXTS, max_size=4),
    ),
    st.builds(Installed, **WHO, bundle=DIGESTS, measured=MEASURED),
    st.builds(RolledBack, **WHO, reason=TEXTS, measured=MEASURED),
    st.builds(Refused, **WHO, reason=TEXTS),
    st.builds(Failed, **WHO, reason=TEXTS),
    st.builds(Waiting, **WHO, reason=TEXTS, until=COUNTS),
    st.builds(Health, device=NAMES, bundle=DIGESTS, requests=COUNTS, errors=COUNTS, p95_ms=NUMBERS, number=COUNTS),
    st.builds(
        Chosen,
        device=NAMES,
        bundle=DIGESTS,
        variant=NAMES,
        left=st.dictionaries(NAMES, TEXTS.map(lambda text: text[:500]), max_size=16),
    ),
    st.builds(
        Drift,
        device=NAMES,
        bundle=DIGESTS,
        alerts=st.lists(
            st.builds(Alert, kind=NAMES, what=TEXTS, value=NUMBERS, limit=NUMBERS, since=NUMBERS), max_size=MAX_ALERTS
        ).map(tuple),
    ),
)


@given(REPORTS)
def test_report_survives_the_wire(report):
    assert messages.decode(messages.encode(report), Report) == report


@given(st.builds(Desired, deployment=NAMES, attempt=COUNTS, release=PATHS, version=COUNTS))
def test_desired_survives_the_wire(desired):
    assert messages.decode(messages.encode(desired), Desired) == desired


@given(
    st.builds(
        BlockRequest,
        path=st.one_of(
            st.from_regex(r"blobs/[0-9a-f]{64}", fullmatch=True),
            st.from_regex(r"metadata/[0-9a-z._-]{1,100}\.json", fullmatch=True),
        ),
        offset=COUNTS,
        length=st.integers(1, MAX_BLOCK_BYTES),
    )
)
def test_block_request_survives_the_wire(request_):
    assert messages.decode(messages.encode(request_), BlockRequest) == request_


@given(st.builds(Block, total=COUNTS, data=st.binary(max_size=1000), error=TEXTS))
def test_block_survives_the_wire(block):
    assert messages.decode_block(messages.encode_block(block)) == block


@example(b"\x81\xa3\x00\x00\x80")
@example(b'{"\xff": 1}')
@given(st.binary(max_size=300))
def test_garbage_is_a_message_error_and_never_anything_else(payload):
    for kind in (Desired, Report, BlockRequest):
        with pytest.raises(MessageError):
            messages.decode(payload, kind)
    with contextlib.suppress(MessageError):
        messages.decode_block(payload)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"deployment": "../x"}, Desired),
        ({"deployment": "a\n"}, Desired),
        ({"attempt": -1}, Desired),
        ({"attempt": True}, Desired),
        ({"version": 1 << 54}, Desired),
        ({"release": "models/a/b/../../root.json"}, Desired),
        ({"release": "models/a/b/1.json\n"}, Desired),
        ({"surprise": 1}, Desired),
        ({"path": "../keys/root.pem"}, BlockRequest),
        ({"path": "keys/root.pem"}, BlockRequest),
        ({"path": "/etc/passwd"}, BlockRequest),
        ({"path": "metadata/../../keys/root.json"}, BlockRequest),
        ({"length": 0}, BlockRequest),
        ({"length": MAX_BLOCK_BYTES + 1}, BlockRequest),
        ({"offset": -1}, BlockRequest),
    ],
)
def test_value_out_of_bounds_is_refused(changes, kind):
    sound = {
        Desired: {"deployment": "d", "attempt": 1, "release": "models/a/b/1.json", "version": 1},
        BlockRequest: {"path": "blobs/" + "0" * 64, "offset": 0, "length": 1},
    }[kind]
    messages.decode(msgspec.json.encode(sound), kind)
    with pytest.raises(MessageError):
        messages.decode(msgspec.json.encode(sound | changes), kind)


def test_alerts_are_bounded_and_fit_into_a_message():
    one = Alert(kind="k" * 64, what="é" * 200, value=1.0, limit=0.5, since=1e9)
    most = Drift(device="pi-1", bundle="a" * 64, alerts=(one,) * MAX_ALERTS)
    assert messages.decode(messages.encode(most), Report) == most
    assert len(messages.encode(most)) < MAX_MESSAGE_BYTES / 4
    for more in (
        msgspec.structs.replace(most, alerts=(one,) * (MAX_ALERTS + 1)),
        msgspec.structs.replace(most, alerts=(msgspec.structs.replace(one, what="x" * 201),)),
        msgspec.structs.replace(most, alerts=(msgspec.structs.replace(one, kind="a b"),)),
        msgspec.structs.replace(most, alerts=(msgspec.structs.replace(one, value=float("nan")),)),
    ):
        with pytest.raises(MessageError):
            messages.decode(messages.encode(more), Report)


@pytest.mark.attack("endless data")
def test_endless_message_is_refused_before_it_is_parsed():
    with pytest.raises(MessageError, match="longer than"):
        messages.decode(b" " * (MAX_MESSAGE_BYTES + 1), Desired)
    with pytest.raises(MessageError, match="longer than"):
        messages.decode_block(b"\0" * (MAX_BLOCK_BYTES + 5000))


@pytest.mark.attack("nested message")
@pytest.mark.parametrize("kind", [Desired, Report, BlockRequest])
def test_message_that_nests_without_end_is_a_message_error(kind):
    deep = b"[" * 30_000 + b"]" * 30_000
    for payload in (b'{"x":' + deep + b"}", b'{"x":' + deep + b',"type":"hello"}', deep):
        with pytest.raises(MessageError, match="malformed"):
            messages.decode(payload, kind)
    for nested in (b"\x91" * 100_000, b"\x81\xa1x" + b"\x91" * 100_000):
        with pytest.raises(MessageError, match="malformed"):
            messages.decode_block(nested)


@pytest.mark.attack("device ids")
@pytest.mark.parametrize("name", ["#", "../x", "a/b", "", "a b", "é", "-a", "a" * 65, "a\n", "$SYS"])
def test_name_that_could_change_the_topic_is_refused(name):
    with pytest.raises(MessageError, match="no identifier"):
        messages.topic("lab", name, "hello")
    with pytest.raises(MessageError, match="no identifier"):
        messages.topic(name, "pi", "hello")


@given(NAMES, NAMES)
def test_topic_tells_its_device(fleet, device):
    assert messages.device_of(messages.topic(fleet, device, "report")) == device


@pytest.mark.parametrize("topic", ["", "a/b", "edgekit/v1/lab/device/pi/hello", "edgekit/v1/lab/devices/pi/a/b"])
def test_foreign_topic_has_no_device(topic):
    with pytest.raises(MessageError, match="no topic of a device"):
        messages.device_of(topic)


@given(
    st.builds(
        Release,
        model=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        profile=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        version=st.integers(1, 999_999_999),
        bundle=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        limits=st.builds(Limits, max_p95_ms=st.none() | NUMBERS, max_error_rate=NUMBERS),
    )
)
def test_release_survives_its_signed_field(release):
    assert from_custom(to_custom(release)) == release


@pytest.mark.parametrize("custom", [None, {}, {"release": 1}, {"release": "{}"}, {"release": "{}", "more": 1}, "x"])
def test_malformed_signed_release_is_not_trusted(custom):
    with pytest.raises(TrustError, match="malformed"):
        from_custom(custom)
