"""No faster than the limit over any time, no slower than is bearable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import TransferError
from edgekit.ota.device.pace import BURST_SECONDS, Bucket, Pace


@given(
    rate=st.integers(1, 10**7),
    pieces=st.lists(st.tuples(st.integers(1, 1 << 18), st.floats(0, 100)), min_size=1, max_size=60),
)
def test_over_any_time_no_more_comes_than_the_rate_and_one_burst(rate, pieces):
    bucket, now, taken = Bucket(rate), 0.0, []
    for size, idle in pieces:
        now += idle
        taken.append((now, size))
        now += bucket.take(size, now)
    for i, (start, _) in enumerate(taken):
        total = 0
        for j in range(i, len(taken)):
            # What came by the time the next piece may be asked for: the last piece's pause included.
            total += taken[j][1]
            end = taken[j + 1][0] if j + 1 < len(taken) else now
            assert total <= rate * (end - start) + rate * BURST_SECONDS + 1e-3 * total + 1


def test_steady_stream_comes_at_the_rate():
    bucket, now = Bucket(1000.0), 0.0
    for _ in range(100):
        now += bucket.take(500, now)
    assert now == pytest.approx(50.0, rel=0.05)


def test_clock_that_goes_back_gives_nothing_away():
    bucket = Bucket(1000.0)
    bucket.take(1000, 100.0)
    assert bucket.take(1000, 50.0) == pytest.approx(2.0, rel=0.01)


def test_trickle_is_given_up_after_its_window_and_not_before():
    pace = Pace(least=1000, window=60)
    for _ in range(59):
        pace.took(1.0, 10)
    with pytest.raises(TransferError, match="only 600 bytes came in 60 s, at least 1000 a second"):
        pace.took(1.0, 10)


def test_each_window_is_judged_by_itself_so_that_a_fast_start_buys_no_patience():
    pace = Pace(least=1000, window=60)
    pace.took(60.0, 10**9)
    pace.took(59.0, 0)
    with pytest.raises(TransferError):
        pace.took(1.0, 0)
