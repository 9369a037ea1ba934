"""How fast the page is, in a real browser: a click until its mask is shown, the next image, frames while panning.

    python benchmarks/page.py [--policy ibis-nano] [--segmenter ibis-click] [--clicks 40]

Prints one JSON object: 95th percentiles in milliseconds, frames a second while a 4,000 x 4,000 image is moved about.
Targets: click 250 ms, next image 150 ms where the agent has worked ahead, 60 frames a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
PANNING = """async () => {
    const image = document.querySelector("#image"), box = image.getBoundingClientRect(), times = [];
    const tell = (kind, x, y) => image.dispatchEvent(new PointerEvent(kind, {
        pointerId: 1, clientX: box.left + x, clientY: box.top + y, button: kind === "pointermove" ? -1 : 1,
        bubbles: true}));
    image.setPointerCapture = () => {};
    tell("pointerdown", 300, 300);
    const began = performance.now();
    while (performance.now() - began < 3000) {
        times.push(await new Promise(requestAnimationFrame));
        const way = times.length / 20;
        tell("pointermove", 300 + 200 * Math.cos(way), 300 + 200 * Math.sin(way));
    }
    tell("pointerup", 300, 300);
    return (times.length - 1) * 1000 / (times.at(-1) - times[0]);
}"""


def draw(number: int, side: int) -> np.ndarray:
    """A noisy image with one bright ellipse."""
    random = np.random.default_rng(number)
    pixels = np.repeat(random.normal(70, 12, (side, side, 1)), 3, axis=2)
    centre, axes = (side // 2 + number * 7, side // 2), (side // 5, side // 7)
    pixels[cv2.ellipse(np.zeros((side, side), np.uint8), centre, axes, 20, 0, 360, 1, -1) > 0] += 90
    return pixels.clip(0, 255).astype(np.uint8)


def wait(holds: Callable[[], bool], seconds: float = 180) -> None:
    """Until it holds, looked at every 2 ms."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
        time.sleep(0.002)


def measure(page: Any, files: list[Path], large: Path, clicks: int) -> dict[str, float]:
    """The three results."""
    page.set_input_files("#file input", [str(file) for file in files])
    wait(lambda: page.locator("#strip li").count() == len(files))
    page.fill("#query", "Segment the polyp.")
    page.press("#query", "Enter")
    wait(lambda: page.locator("#strip .agent").count() == len(files))
    nexts = []
    for _ in files[1:]:
        title = page.title()
        page.evaluate("performance.mark('next')")
        page.keyboard.press(".")
        wait(lambda before=title: page.title() != before and page.locator("#image img").count() == 1)
        nexts.append(page.evaluate("performance.now() - performance.getEntriesByName('next').at(-1).startTime"))
        time.sleep(0.4)  # somebody looks at it
    random, taken = np.random.default_rng(0), []
    box = page.locator("#image img").bounding_box()
    for _ in range(clicks):
        turns = page.locator("#turns li").count()
        x, y = random.uniform(0.1, 0.9, 2)
        began = time.perf_counter()
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        wait(lambda count=turns: page.locator("#turns li").count() > count)
        taken.append(1000 * (time.perf_counter() - began))
    page.set_input_files("#file input", str(large))
    wait(lambda: page.title().startswith(large.name))
    page.locator("#image img").wait_for()
    for _ in range(6):
        page.keyboard.press("+")
    time.sleep(1)
    frames = page.evaluate(PANNING)
    return {
        "click_ms_p95": round(float(np.percentile(taken, 95)), 1),
        "next_image_ms_p95": round(float(np.percentile(nexts, 95)), 1),
        "frames_a_second": round(frames, 1),
    }


def main() -> None:
    """As the module says."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--policy", default="ibis-nano")
    options.add_argument("--segmenter", default="ibis-click")
    options.add_argument("--clicks", type=int, default=40)
    chosen = options.parse_args()
    browser = os.environ.get("IBIS_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        files = [Path(folder) / f"image-{number}.png" for number in range(6)]
        for number, file in enumerate(files):
            cv2.imwrite(str(file), draw(number, 640))
        large = Path(folder) / "large.png"
        cv2.imwrite(str(large), draw(9, 4000))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "ibisagent",
            "serve",
            "api",
            "--page",
            "--port",
            str(port),
            "--data",
            folder + "/data",
        ]
        command += ["--policy", chosen.policy, "--segmenter", chosen.segmenter]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                with suppress(OSError):
                    return bool(urllib.request.urlopen(f"{url}/ready").status == 200)
                return False

            wait(ready)
            page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
                viewport={"width": 1440, "height": 900}
            )
            page.goto(url)
            page.locator("#sample").wait_for()
            print(json.dumps(measure(page, files, large, chosen.clicks)))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
