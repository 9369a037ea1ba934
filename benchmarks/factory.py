"""Speed of the data factory: one process against two Ray workers, seconds a pair for each stage, peak memory.

    python benchmarks/factory.py DATA [--limit 64] [--segmenter ibis-click] [--workers 2]

Both runs must end with the same files. Run it on an idle machine: workers are only faster where cores are free.
Starting Ray and loading the segmenter are part of the time: take --limit so large that they do not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.generation.config import FactoryConfig
from ibisagent.generation.on_ray import on_ray
from ibisagent.generation.stages import Plan, build

SPEED_UP = 1.7
"""What two workers on two idle cores should reach."""


def timed(plan: Plan, run_shards: Callable[..., None] | None) -> tuple[float, dict[str, float]]:
    """Seconds of a whole run, and of each stage."""
    stages: dict[str, float] = {}
    last = started = time.perf_counter()

    def progress(stage: str, _done: int, _total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    build(plan, progress=progress, run_shards=run_shards)
    return time.perf_counter() - started, stages


def digest(folder: Path) -> str:
    """Of all files below `folder`, names included."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Run both and print one JSON object; exit code 1 if the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    cases = read_cases(given.data)
    step = max(1.0, len(cases) / given.limit)
    rows = [cases.rows[int(index * step)] for index in range(min(given.limit, len(cases)))]
    config = FactoryConfig(segmenter=given.segmenter, shard_images=max(1, len(rows) // (8 * given.workers)))
    with tempfile.TemporaryDirectory() as folder:
        plans = [Plan(CaseSource(rows, cases.where), Path(folder) / name, config) for name in ("one", "workers")]
        alone, stages = timed(plans[0], None)
        together, _ = timed(plans[1], on_ray(given.workers))
        same = digest(plans[0].out) == digest(plans[1].out)
    report: dict[str, Any] = {
        "pairs": len(rows),
        "seconds_one_process": round(alone, 1),
        "seconds_a_pair_by_stage": {name: round(seconds / len(rows), 4) for name, seconds in stages.items()},
        "minutes_for_all_one_process": round(alone / len(rows) * len(cases) / 60, 1),
        "workers": given.workers,
        "seconds_workers": round(together, 1),
        "speed_up": round(alone / together, 2),
        "wanted_speed_up": SPEED_UP,
        "same_files": same,
        "peak_memory_gb_one_process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report, indent=1))
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
