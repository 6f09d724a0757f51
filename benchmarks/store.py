"""What a step of the fleet's service costs with 1,000 devices, in SQLite or a PostgreSQL that is named.

    python benchmarks/store.py [--json FILE] [--database postgresql+psycopg://…]

PostgreSQL is asked to make a new fleet in the database; nothing is taken away afterwards.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from edgekit.ota import messages
from edgekit.ota.channel import Arrival
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Failed, Health, Hello
from edgekit.ota.server import service as services
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import Service
from edgekit.ota.server.store import Store

DEVICES = 1000
PLAN = Plan(model="cat", version=2, profiles=("pi",), waves=(0.3, 1.0))


class Fleet:
    """A service whose devices speak past the broker."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.numbers = itertools.count(1)
        self.store = Store(database or folder / "fleet.sqlite", f"bench-{time.time_ns()}")
        self.service = Service(folder, MemoryBroker().connect("server"), self.store, lambda: 1.8e9)
        services.TICK_SECONDS = 0.0  # look with every step
        for number in range(DEVICES):
            told = {"release": "models/cat/pi/1.json", "version": 1}
            self.say(number, "hello", Hello(device=f"pi-{number}", profile="pi", boot="b", online=True, **told))
        for _ in range(4):
            self.service.step()
        self.store.start(PLAN, 1.8e9)
        self.service.step()

    def say(self, number: int, leaf: str, message: messages.Report) -> None:
        """Have a device say something."""
        topic = messages.topic(self.store.name, f"pi-{number}", leaf)
        self.service._arrived(Arrival(topic, messages.encode(message)))  # noqa: SLF001  # as the channel does

    def health(self, number: int) -> None:
        """Say what devices say every half minute."""
        self.say(
            number,
            "report",
            Health(device=f"pi-{number}", bundle="", requests=next(self.numbers), errors=0, p95_ms=2.0),
        )

    def failed(self, number: int) -> None:
        """Say what is kept."""
        head = {"device": f"pi-{number}", "deployment": "cat-v2", "attempt": 1, "version": 2}
        self.say(number, "report", Failed(**head, reason=f"no {next(self.numbers)}"))

    def measure(self, how: object, count: int, rounds: int) -> float:
        """Return the median of a step's milliseconds when so many devices have spoken."""
        taken = []
        for _ in range(rounds):
            for number in range(count):
                how(number)
            started = time.perf_counter()
            self.service.step()
            taken.append(1000 * (time.perf_counter() - started))
        return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--database")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), options.database)
        rows = {
            "nothing new": fleet.measure(fleet.health, 0, 40),
            "one health report": fleet.measure(fleet.health, 1, 40),
            "500 health reports": fleet.measure(fleet.health, 500, 20),
            "500 reports that are kept, each with a line in the diary": fleet.measure(fleet.failed, 500, 20),
        }
        kind = fleet.store.database.kind
        fleet.store.close()
    print(f"{DEVICES:,} devices, {kind}: a step takes")
    for what, milliseconds in rows.items():
        print(f"  {milliseconds:7.1f} ms  {what}")
    if options.json:
        options.json.write_text(json.dumps({"database": kind, "milliseconds": rows}, indent=2))


if __name__ == "__main__":
    main()
