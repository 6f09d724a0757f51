"""Whether texts are generated together: decided by measured time, in their order, and never at the price of a wait."""

import contextlib
import threading

import pytest

from edgekit.runtime import company
from edgekit.runtime.company import ENOUGH, Company


class Engine:
    """Generates with a clock of its own: a piece takes so many seconds, by how many texts are generated."""

    def __init__(self, most, seconds):
        self.now = 0.0
        self.seconds = seconds
        self.company = Company(most, clock=lambda: self.now)

    def play(self, turns, pieces=ENOUGH + 1):
        """Compute so many steps, each of which gives every text a piece."""
        for _ in range(pieces):
            self.now += self.seconds[len(turns)]
            for turn in turns:
                turn.piece()

    @contextlib.contextmanager
    def texts(self, count):
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.company.turn(lambda: False)) for _ in range(count)]

    def measure(self):
        with self.texts(1) as turns:
            self.play(turns)
        with self.texts(2) as turns:
            self.play(turns)


def places(one):
    """Count how many texts are let in at once."""
    inside, release = [], threading.Event()
    counted = threading.Semaphore(0)

    def work():
        with one.turn(release.is_set) as turn:
            inside.append(turn)
            counted.release()
            release.wait(20)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    while counted.acquire(timeout=0.3):
        pass
    found = len(inside)
    release.set()
    one.look_again()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("two", "gains"), [(1.3, True), (1.8, True), (1.95, False), (2.9, False)])
def test_what_takes_less_time_is_kept(two, gains):
    engine = Engine(4, {1: 1.0, 2: two})
    assert engine.company.gains is None
    engine.measure()
    assert engine.company.gains is gains
    assert places(engine.company) == (4 if gains else 1)


def test_one_alone_is_measured_before_two_are_let_in():
    engine = Engine(4, {1: 1.0, 2: 1.0})
    assert places(engine.company) == 1
    with engine.texts(1) as turns:
        engine.play(turns)
    assert places(engine.company) == 2


def test_where_one_has_room_there_is_no_company():
    engine = Engine(1, {1: 1.0})
    with engine.texts(1) as turns:
        engine.play(turns)
    assert engine.company.gains is None
    assert places(engine.company) == 1


def test_a_clock_that_stands_still_decides_nothing(monkeypatch):
    monkeypatch.setattr("edgekit.runtime.company.PATIENCE", 0.1)  # the real one is waited out
    engine = Engine(2, {1: 0.0, 2: 0.0})
    engine.measure()
    assert engine.company.gains is None


def test_a_prompt_that_is_computed_meanwhile_says_nothing_of_company():
    engine = Engine(2, {1: 1.0, 2: 1.2})
    with engine.texts(1) as turns:
        engine.play(turns)
    with engine.texts(2) as turns:
        for _ in range(3 * ENOUGH):  # the second one has given no piece yet
            engine.now += 50
            turns[0].piece()
        assert engine.company.gains is None
        engine.play(turns)
    assert engine.company.gains is True


def test_those_who_wait_are_let_in_in_their_order():
    engine = Engine(2, {1: 1.0, 2: 2.9})
    engine.measure()
    order = []

    def work(number):
        with engine.company.turn(lambda: False):
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with engine.texts(1):
        for number, thread in enumerate(threads):
            thread.start()
            while len(engine.company._waiting) <= number:
                pass
        assert order == []
    for thread in threads:
        thread.join(20)
    assert order == list(range(8))


def test_who_gives_up_does_not_wait_and_is_not_generated():
    engine = Engine(2, {1: 1.0, 2: 2.9})
    engine.measure()
    left, found = threading.Event(), []

    def work():
        with engine.company.turn(left.is_set) as turn:
            found.append(turn)

    thread = threading.Thread(target=work)
    with engine.texts(1):
        thread.start()
        left.set()
        engine.company.look_again()
        thread.join(5)
        assert found == [None]


def test_a_long_text_holds_up_nobody_for_ever(monkeypatch):
    monkeypatch.setattr(company, "PATIENCE", 0.2)
    engine = Engine(2, {1: 1.0, 2: 2.9})
    engine.measure()
    with engine.texts(1), engine.company.turn(lambda: False) as second:
        assert second is not None
