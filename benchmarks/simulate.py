"""How often a rollout halts that should not, how often one that should, and how many devices are hurt until then.

Played by the code of `edgekit ota simulate` over seeded fleets of 2,000 devices, a fifth of them switched off, with
waves of 5 %, 25 % and 100 %, each watched for an hour. The peer is a policy, not a product: the same waves over the
same fleets, halted when a tenth of all reached devices has failed, whatever their class: the kind of threshold that
AWS IoT Jobs (abort criteria) and hawkBit (error threshold) offer. It sees failed installs only, as they do.
"""

from __future__ import annotations

import time

from _report import Row, run

from edgekit.ota.server import simulation
from edgekit.ota.server.scenario import parse

ALPHA = 0.05
CLASSES = {"raspberry-pi-5": 0.6, "jetson-orin": 0.3, "android-arm64": 0.1}
BASE = """
hours = {hours}
[plan]
waves = ["5%", "25%", "100%"]
dwell = 3600
patience = 3600
{plan}
[fleet]
devices = {devices}
flaky = 0.02
past = 2000
error_rate = 0.01
alerting = 0.05
{fleet}
{faults}
"""
FAULTS = {
    "p95 up by 15 %": "latency = 0.15",
    "errors up by 1 point": "errors = 0.01",
    "alerts on 20 % of devices": "drift = 0.2",
    "failures up by 5 points": "failures = 0.05",
}


def main(quick: bool) -> list[Row]:
    seeds = range(8 if quick else 40)
    fine = [play(seed, hours=12) for seed in range(12 if quick else 200)]
    alarms = sum(bool(story.halted_by) for story in fine)
    rows = [Row(f"false alarms, {len(fine)} releases that are no worse", alarms / len(fine), "of rollouts",
                "alpha", ALPHA, "value <= peer")]  # fmt: skip
    for what, fault in FAULTS.items():
        stories = [play(seed, fault) for seed in seeds]
        found = sum(bool(story.halted_by) and story.wave < 3 for story in stories) / len(stories)
        goal = "value >= 0.9" if "failures" not in fault else ""
        rows.append(Row(f"{what}: found before the last wave", found, "of rollouts", goal=goal))
        hurt = sum(story.hurt for story in stories) / len(stories)
        theirs = [play(seed, fault, peer=True).hurt for seed in seeds]
        rows.append(Row(f"{what}: devices hurt", hurt, "of 2,000", "10 % threshold", sum(theirs) / len(theirs)))
    for profile, share in CLASSES.items():
        ours = [play(seed, "failures = 0.8", where=profile) for seed in seeds]
        theirs = [play(seed, "failures = 0.8", where=profile, peer=True) for seed in seeds]
        hurt, other = (sum(story.hurt for story in stories) / len(stories) for stories in (ours, theirs))
        what = f"bad on {profile} ({share:.0%} of devices)"
        caught = sum(story.wave == 1 for story in ours) / len(ours)
        rows.append(Row(f"{what}: caught in the canary", caught, "of rollouts", goal="value >= 0.95"))
        rows.append(Row(f"{what}: devices hurt", hurt, "of 2,000", "10 % threshold", other, "value <= peer"))
    began = time.perf_counter()
    story = play(0, devices=10_000, hours=96)
    rows.append(
        Row(f"10,000 devices to the end ({story.hours:.0f} h)", time.perf_counter() - began, "s", goal="value <= 60")
    )
    return rows


def play(seed: int, fault: str = "", where: str = "", *, peer: bool = False, **told: float) -> simulation.Story:
    """Play one rollout. The peer knows of no classes: to it they are a tag that it does not look at."""
    weights = ", ".join(f"{name} = {share}" for name, share in CLASSES.items())
    fleet = f"classes = {{any = 1.0}}\nregions = {{{weights}}}\nzones = {{}}" if peer else f"classes = {{{weights}}}"
    field = "tag.region" if peer else "class"
    faults = f"[[faults]]\n{fault}\n" + (f'where = "{field} = {where}"\n' if where else "") if fault else ""
    plan = 'max_failures = "10%"\nstrata = []' if peer else f"[plan.judging]\nalpha = {ALPHA}"
    text = BASE.format(**{"plan": plan, "fleet": fleet, "faults": faults, "devices": 2000, "hours": 48, **told})
    return simulation.play(parse(text), seed)


if __name__ == "__main__":
    run("Rollouts that halt: power, false alarms, devices hurt", main)
