"""Speed of the loop: seconds per image, start-up times, and many environments together against one by one.

    IBIS_DATA=DATA python benchmarks/loop.py [--policy ibis-nano] [--segmenter ibis-click] [--json]

DATA: a labelled data set as `ibisagent eval run` reads it; its split "val" is used. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Case
from ibisagent.environment import SegmentationEnv, rollout, turn_limit
from ibisagent.inference.image import export, read_case, run_case
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter

IMAGES = 50
WARMUP = 3
TOGETHER = 16
CASES_OF_A_GROUP = 2  # a training step of reinforcement learning draws multiple episodes of each case
REPEATS = 7
LIMITS = {
    "seconds_per_image": ("<=", 2.0),
    "help_seconds": ("<=", 0.6),
    "import_seconds": ("<=", 0.3),
    "speed_up_together": (">=", 2.5),
}
"""What each result should be on a CPU of 2 cores."""


def distinct_images(cases: CaseSource, count: int) -> CaseSource:
    """At most `count` cases of different images, spread evenly over the data."""
    rows = list({row.image: row for row in cases.rows}.values())
    step = max(1.0, len(rows) / count)
    return CaseSource([rows[int(index * step)] for index in range(min(count, len(rows)))], cases.where)


def seconds_per_image(cases: CaseSource, policy: str, segmenter: str) -> dict[str, float]:
    """What `ibisagent segment` does for one image with loaded models: read, run the episode, write the files."""
    writer, engine = load_policy(policy), load_segmenter(segmenter)
    times, turns = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate([*cases.rows[-WARMUP:], *cases.rows[:IMAGES]]):
            started = time.perf_counter()
            case = read_case(row.image, row.query)
            episode = run_case(case, writer, engine)
            export(episode, case.image, folder, str(number))
            if number >= WARMUP:
                times.append(time.perf_counter() - started)
                turns.append(len(episode.turns))
    return {
        "images": len(times),
        "seconds_per_image": statistics.median(times),
        "slowest_image_seconds": max(times),
        "mean_turns": statistics.mean(turns),
    }


def together_against_one_by_one(
    cases: CaseSource, policy: str, segmenter: str, *, episodes_each: int = 1, temperature: float = 0.0
) -> dict[str, float]:
    """Episodes per second in one rollout, and one after the other; both with fresh models.

    The last of `cases` only warms up; the others are run `episodes_each` times and share what caches keep of an image.
    """

    def run(size: int) -> float:
        writer: Any = load_policy(policy, batch_size=TOGETHER, temperature=temperature)
        engine = load_segmenter(segmenter)
        *loaded, spare = cases

        def env(case: Case) -> SegmentationEnv:
            return SegmentationEnv(case, engine, dialect=writer.dialect, max_turns=turn_limit(writer))

        rollout(writer, [env(spare)])  # whatever is loaded on first use
        envs = [env(case) for case in loaded for _ in range(episodes_each)]
        started = time.perf_counter()
        for first in range(0, len(envs), size):
            writer.seed = first  # or else episodes of one case, one by one, would be the same one
            rollout(writer, envs[first : first + size])
        return len(envs) / (time.perf_counter() - started)

    together, alone = run(TOGETHER), run(1)
    return {
        "episodes_per_second_together": together,
        "episodes_per_second_one_by_one": alone,
        "speed_up_together": together / alone,
    }


def groups_against_one_by_one(cases: CaseSource, policy: str, segmenter: str) -> dict[str, float]:
    """The same for what a training step draws: sampled episodes of few cases, whose images are embedded once."""
    results = together_against_one_by_one(
        distinct_images(cases, CASES_OF_A_GROUP + 1),
        policy,
        segmenter,
        episodes_each=TOGETHER // CASES_OF_A_GROUP,
        temperature=1.0,
    )
    return {f"{CASES_OF_A_GROUP}_cases_{name}": value for name, value in results.items()}


def machine() -> dict[str, Any]:
    """What the results were measured on."""
    name = platform.processor() or platform.machine()
    return {"machine": f"{name}, {os.cpu_count()} cores", "load_before": os.getloadavg()[0]}


def start_up(*arguments: str) -> float:
    """Median wall seconds of a fresh interpreter."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set, as 'ibisagent eval run' reads it")
    cases = read_cases(os.environ["IBIS_DATA"], split="val")
    models = options.policy, options.segmenter
    results: dict[str, Any] = {}
    for measure in (
        lambda: machine() | {"policy": options.policy, "segmenter": options.segmenter},
        lambda: {
            "help_seconds": start_up("-m", "ibisagent", "--help"),
            "import_seconds": start_up("-c", "import ibisagent"),
        },
        lambda: together_against_one_by_one(distinct_images(cases, TOGETHER + 1), *models),
        lambda: groups_against_one_by_one(cases, *models),
        lambda: seconds_per_image(distinct_images(cases, IMAGES + WARMUP), *models),
    ):
        measured = measure()
        results |= measured
        if not options.json:
            print(*(line(*result) for result in measured.items()), sep="\n", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


def line(name: str, value: Any, goals: Mapping[str, tuple[str, float]] = LIMITS) -> str:
    """A result for people, with its goal where it has one."""
    shown = f"{value:.3f}" if isinstance(value, float) else value
    if name not in goals:
        return f"{name:42}{shown}"
    sign, limit = goals[name]
    met = value <= limit if sign == "<=" else value >= limit
    return f"{name:42}{shown}  (goal {sign} {limit:g})  {'ok' if met else 'MISSED'}"


if __name__ == "__main__":
    main()
