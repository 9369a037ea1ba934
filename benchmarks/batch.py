"""1,000 images in one folder: `ibisagent segment` is killed twice, resumes, and ends complete, with flat memory.

    python benchmarks/batch.py [--images N] [--policy P] [--segmenter S]

Draws its images, so it needs no data. Prints one JSON object: whether every result is there once, how many the last run
kept, how long it took, its peak memory after every 100 images. Exit code 1 where a result is missing or double.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np

from ibisagent.imaging.images import write_png

SIDE = 128


def draw(folder: Path, count: int) -> list[str]:
    """So many images of a bright disc on noise, in folders of 100 with equal file names in each."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    paths = []
    for number in range(count):
        y, x = random.integers(30, SIDE - 30, 2)
        image = random.integers(20, 60, (SIDE, SIDE))
        image[(rows - y) ** 2 + (columns - x) ** 2 < 18**2] = 210
        path = folder / f"{number // 100:02}" / f"image-{number % 100:02}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(np.repeat(image[..., None], 3, axis=2).astype(np.uint8), path)
        paths.append(str(path))
    return paths


def peak_megabytes(pid: int) -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def run(command: list[str], stop_after: int | None) -> tuple[list[dict[str, object]], dict[int, float]]:
    """Results that were printed until the end, or until the process is killed after so many; memory on the way."""
    results: list[dict[str, object]] = []
    memory: dict[int, float] = {}
    with Popen(command, stdout=PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith('{"image"'):
                results.append(json.loads(line))
                if len(results) % 100 == 0:
                    memory[len(results)] = round(peak_megabytes(process.pid), 1)
            if len(results) == stop_after:
                process.kill()
                break
    return results, memory


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--policy", default="centre-click")
    parser.add_argument("--segmenter", default="region")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        images = draw(folder, options.images)
        command = [sys.executable, "-m", "ibisagent", "segment", *images, "the disc", "-o", str(out), "--json"]
        command += ["--policy", options.policy, "--segmenter", options.segmenter]
        for stop_after in (options.images // 5, options.images // 2):
            run(command, stop_after)
        started = time.perf_counter()
        results, memory = run(command, None)
        seconds = time.perf_counter() - started
        kept = sum("kept" in one for one in results)
        records = {str(one.get("record")) for one in results}
        complete = len(records) == len(list(out.glob("*_record.json"))) == options.images
        made = {"images": options.images, "policy": options.policy, "segmenter": options.segmenter}
        summary = {"complete": complete, "kept_by_the_last_run": kept, "seconds_of_the_last_run": round(seconds, 1)}
        print(json.dumps({**made, **summary, "peak_megabytes_after": memory}, indent=1))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
