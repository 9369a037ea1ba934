"""Many sessions at once: errors, mixed-up masks, time of a click, memory, and what batching turns gains.

    python benchmarks/server.py [--sessions 50] [--seconds 180] [--together 16] [--policy NAME] [--segmenter NAME]

Every session has an image of its own, made from its number. It asks the agent once, then acts like a user: a click
(or an undo) every `PAUSE` seconds on average. At the end each session's record is played again with a segmenter of this
process on that session's image: a mask that came from elsewhere could not be rebuilt. Run it on an idle machine. With
`--seconds 1200` it is a soak: `server_growth_percent` says whether memory stays, from the second quarter of the time,
in which all is loaded, to the last one (goal: less than 5).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ibisagent.domain import Image
from ibisagent.errors import IbisError
from ibisagent.inference.replay import replay
from ibisagent.segmenters import load_segmenter
from ibisagent.server.client import Client, RemoteSession
from ibisagent.store import read_record

PAUSE = 5.0
LOOKS = 40  # at the server's memory
SIZE = (240, 320)
QUERY = "Segment the optic disc."


def draw(number: int) -> np.ndarray:
    """A photograph of an eye, turned, moved and lit by `number`: the packaged policy finds its optic disc."""
    rng = np.random.default_rng(number)
    whole = cv2.resize(cv2.imread(str(files("skimage") / "data" / "retina.jpg"))[..., ::-1], SIZE[::-1])
    turn = cv2.getRotationMatrix2D((SIZE[1] / 2, SIZE[0] / 2), rng.uniform(-20, 20), rng.uniform(0.9, 1.2))
    turn[:, 2] += rng.uniform(-15, 15, 2)
    return np.asarray(cv2.warpAffine(whole, turn, SIZE[::-1]) * rng.uniform(0.8, 1.1)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    """As PNG."""
    return bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())


def resident(process: int) -> float:
    """Megabytes of a process in memory."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def free_place(view: dict[str, Any], chance: random.Random) -> tuple[int, int]:
    """A pixel (x, y) that nobody has clicked on in this session: a click that stands already would be refused."""
    given = {(action.get("x"), action.get("y")) for turn in view["turns"] for action in turn["actions"]}
    while (place := (chance.randrange(SIZE[1]), chance.randrange(SIZE[0]))) in given:
        pass
    return place


class User(threading.Thread):
    """One session until `until`."""

    def __init__(self, url: str, number: int, until: float) -> None:
        super().__init__()
        self.url, self.number, self.until = url, number, until
        self.clicks: list[float] = []
        self.errors: list[str] = []
        self.turns = 0
        self.session: RemoteSession | None = None

    def run(self) -> None:
        """As the module says."""
        chance = random.Random(self.number)
        try:
            with Client(self.url, token="") as client:
                self.session = client.open(encoded(draw(self.number)), QUERY)
                self.turns = len(self.session.run()["turns"])
                while time.time() < self.until:
                    time.sleep(chance.expovariate(1 / PAUSE))
                    started = time.perf_counter()
                    if chance.random() < 0.2 and self.session.view["can_undo"]:
                        self.session.undo()
                        continue
                    x, y = free_place(self.session.view, chance)
                    self.session.click(x, y, positive=chance.random() < 0.6)
                    self.clicks.append(time.perf_counter() - started)
        except IbisError as error:
            self.errors.append(str(error))


def mixed_up(people: list[User], segmenter: str, client: Client, folder: Path) -> int:
    """Sessions whose masks are not those of their own image and clicks."""
    engine, wrong = load_segmenter(segmenter), 0
    for user in people:
        if user.session is None:
            continue
        path = folder / f"{user.number}.json"
        path.write_bytes(client.call("GET", f"/v1/sessions/{user.session.id}/record").content)
        episode = read_record(path)
        masks = replay(episode, Image(draw(user.number)), engine)
        wrong += any(not np.array_equal(masks[name], mask) for name, mask in episode.masks.items())
    return wrong


def growth(memory: list[int]) -> float:
    """Percent from the second quarter of the looks to the last one; medians, as a heap is trimmed now and then."""
    quarter = len(memory) // 4
    return round(100 * float(np.median(memory[-quarter:]) / np.median(memory[quarter : 2 * quarter]) - 1), 1)


def processor_seconds(process: int) -> float:
    """CPU time of a process so far: what can be compared on a machine that does other work as well."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def throughput(url: str, process: int, count: int, together: bool) -> dict[str, float]:
    """Agent turns in `count` sessions, all at once or one after the other: with new images, and once more from the
    beginning with the same ones, which the policy has embedded by then."""
    with Client(url, token="") as client:
        offset = 1000 if together else 2000
        sessions = [client.open(encoded(draw(offset + number)), QUERY) for number in range(count)]
        results = _run_all(sessions, process, together, "new")
        for session in sessions:
            session.reset()
        results |= _run_all(sessions, process, together, "seen")
        for session in sessions:
            session.close()
        return results


def _run_all(sessions: list[RemoteSession], process: int, together: bool, images: str) -> dict[str, float]:
    started, used = time.perf_counter(), processor_seconds(process)
    if together:
        threads = [threading.Thread(target=session.run) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for session in sessions:
            session.run()
    seconds, used = time.perf_counter() - started, processor_seconds(process) - used
    turns, how = sum(len(session.view["turns"]) for session in sessions), "together" if together else "one_by_one"
    return {
        f"{images}_images_{how}_turns_per_second": round(turns / seconds, 2),
        f"{images}_images_{how}_cpu_seconds_per_turn": round(used / turns, 3),
    }


def measure(options: argparse.Namespace, url: str, process: int, folder: Path) -> dict[str, Any]:
    """All results."""
    throughput(url, process, 1, together=True)  # whatever is loaded on first use
    rates = throughput(url, process, options.together, False) | throughput(url, process, options.together, True)
    for images in ("new", "seen"):
        alone, together = (rates[f"{images}_images_{how}_turns_per_second"] for how in ("one_by_one", "together"))
        rates[f"{images}_images_batching_factor"] = round(together / alone, 2)
    print(rates, file=sys.stderr, flush=True)
    until = time.time() + options.seconds
    people = [User(url, number, until) for number in range(options.sessions)]
    for user in people:
        user.start()
    memory = []
    while time.time() < until:
        time.sleep(options.seconds / LOOKS)
        memory.append(round(resident(process)))
    for user in people:
        user.join()
    print(f"memory of the server: {memory} MB; checking the masks", file=sys.stderr, flush=True)
    clicks = [seconds for user in people for seconds in user.clicks]
    errors = [error for user in people for error in user.errors]
    with Client(url, token="") as client:
        wrong = mixed_up(people, options.segmenter, client, folder)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_after": os.getloadavg()[0],
        "sessions": options.sessions,
        "seconds": options.seconds,
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "sessions_with_masks_of_others": wrong,
        "clicks": len(clicks),
        "agent_turns": sum(user.turns for user in people),
        "click_p50_seconds": round(float(np.percentile(clicks, 50)), 3) if clicks else None,
        "click_p95_seconds": round(float(np.percentile(clicks, 95)), 3) if clicks else None,
        "server_megabytes": memory,
        "server_growth_percent": growth(memory),
        **rates,
    }


def main() -> None:
    """Start a server, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--together", type=int, default=16, help="sessions that the gain of batching is measured with")
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        arguments = ["serve", "-p", options.policy, "-s", options.segmenter, "--data", f"{name}/data", "--port", port]
        command = [sys.executable, "-m", "ibisagent", *map(str, arguments)]
        with subprocess.Popen(command) as server:
            try:
                with Client(f"http://127.0.0.1:{port}", token="") as client:
                    for _ in range(600):
                        try:
                            client.call("GET", "/ready")
                            break
                        except IbisError:
                            time.sleep(0.2)
                print(json.dumps(measure(options, client.url, server.pid, Path(name)), indent=1))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
