"""How fast the page is, in a real browser: a click until its mask is shown, the next image, frames while panning.

    python benchmarks/page.py [--policy ibis-nano] [--segmenter ibis-click] [--clicks 40] [--screenshots FOLDER]

Prints one JSON object: 95th percentiles in milliseconds, from the event in the page until the frame that shows what
comes of it; frames a second while a 4,000 x 4,000 image with a mask is moved about, and what a frame costs, in
milliseconds of the page's scripts and of all the browser's processors, which hold on a machine that does other work.
Targets: click 250 ms, next image 150 ms where the agent has worked ahead, 60 frames a second. --screenshots: those of
the guides instead, of scikit-image's photograph of an eye and of a scan that is drawn.
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
import nibabel
import numpy as np
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from volume_phantoms import GRIDS, blob, hounsfield

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
PANNING = """async () => {
    const image = document.querySelector("#image"), box = image.getBoundingClientRect(), times = [];
    const tell = (kind, x, y) => image.dispatchEvent(new PointerEvent(kind, {
        pointerId: 1, clientX: box.left + x, clientY: box.top + y, button: kind === "pointermove" ? -1 : 1,
        bubbles: true}));
    image.setPointerCapture = () => {};
    tell("pointerdown", 300, 300);
    const began = performance.now();
    let scripts = 0;
    while (performance.now() - began < SECONDS * 1000) {
        times.push(await new Promise(requestAnimationFrame));
        const way = times.length / 20, before = performance.now();
        tell("pointermove", 300 + 200 * Math.cos(way), 300 + 200 * Math.sin(way));
        scripts += performance.now() - before;
    }
    tell("pointerup", 300, 300);
    return [times.length, (times.length - 1) * 1000 / (times.at(-1) - times[0]), scripts / times.length];
}"""
EVENT = """([kind, place]) => {
    const seen = document.querySelector(place);
    window.measured = new Promise(done => addEventListener(kind, event => {
        new MutationObserver((_, watching) => {
            watching.disconnect();
            requestAnimationFrame(() => setTimeout(() => done(performance.now() - event.timeStamp)));
        }).observe(seen, {childList: true, characterData: true, subtree: true});
    }, {once: true, capture: true}));
}"""


def draw(number: int, side: int) -> np.ndarray:
    """A noisy image with one bright ellipse."""
    random = np.random.default_rng(number)
    pixels = np.repeat(random.normal(70, 12, (side, side, 1)), 3, axis=2)
    centre, axes = (side // 2 + number * 7, side // 2), (side // 5, side // 7)
    pixels[cv2.ellipse(np.zeros((side, side), np.uint8), centre, axes, 20, 0, 360, 1, -1) > 0] += 90
    return pixels.clip(0, 255).astype(np.uint8)


def wait(holds: Callable[[], bool], seconds: float = 900) -> None:
    """Until it holds, looked at every 2 ms."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
        time.sleep(0.002)


def timed(page: Any, event: str, changes: str, act: Callable[[], None]) -> float:
    """Milliseconds from an event that `act` brings about until the frame in which `changes` has changed."""
    page.evaluate(EVENT, [event, changes])
    act()
    return float(page.evaluate("() => window.measured"))


def browser_seconds(server: int) -> float:
    """CPU time of all processes that this one has started, but for the server."""
    parents, used = dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            values = stat.read_text().rpartition(")")[2].split()
            process = int(stat.parent.name)
            parents[process], used[process] = int(values[1]), int(values[11]) + int(values[12])
    ours, found = {os.getpid()}, set[int]()
    while ours:
        ours = {process for process, parent in parents.items() if parent in ours and process != server}
        found |= ours
    return sum(used[process] for process in found) / os.sysconf("SC_CLK_TCK")


def measure(page: Any, files: list[Path], large: Path, clicks: int, server: int) -> dict[str, float]:
    """All results."""
    page.set_input_files("#file input", [str(file) for file in files])
    wait(lambda: page.locator("#strip li").count() == len(files))
    page.fill("#query", "Segment the polyp.")
    page.press("#query", "Enter")
    wait(lambda: page.locator("#strip .agent").count() == len(files))
    nexts = []
    for _ in files[1:]:
        nexts.append(timed(page, "keydown", "title", lambda: page.keyboard.press(".")))
        time.sleep(0.4)  # somebody looks at it
    random, taken = np.random.default_rng(0), []
    box = page.locator("#image img").bounding_box()

    def click() -> None:
        x, y = random.uniform(0.1, 0.9, 2)
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])

    for _ in range(clicks):
        turns = page.locator("#turns li").count()
        taken.append(timed(page, "pointerup", "#turns", click))
        wait(lambda count=turns: page.locator("#turns li").count() > count)
    page.set_input_files("#file input", str(large))
    wait(lambda: page.title().startswith(large.name))
    box = page.locator("#image img").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    wait(lambda: page.locator("#turns li").count() == 1)
    page.focus("#image")
    for _ in range(6):
        page.keyboard.press("+")
    page.evaluate(PANNING.replace("SECONDS", "1"))  # what is seen is drawn once
    used = browser_seconds(server)
    count, frames, scripts = page.evaluate(PANNING.replace("SECONDS", "5"))
    used = browser_seconds(server) - used
    return {
        "click_ms_p95": round(float(np.percentile(taken, 95)), 1),
        "next_image_ms_p95": round(float(np.percentile(nexts, 95)), 1),
        "frames_a_second": round(frames, 1),
        "script_ms_a_frame": round(scripts, 2),
        "cpu_ms_a_frame": round(1000 * used / count, 1),
    }


def screenshots(page: Any, files: list[Path], scan: Path, folder: Path) -> None:
    """An image that the agent has segmented and a user corrects, a scan, and the list of all."""

    def snap(name: str) -> None:
        time.sleep(2)
        pixels = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
        cv2.imwrite(str(folder / f"page-{name}.webp"), pixels, [cv2.IMWRITE_WEBP_QUALITY, 82])

    def says(text: str) -> None:
        wait(lambda: text in page.inner_text("#status"))

    page.set_viewport_size({"width": 1280, "height": 800})
    page.click("#sample")
    says("Say what to segment")
    page.press("#query", "Enter")
    says("The agent")
    wait(lambda: page.inner_text("#run").startswith("Run"))
    box = page.locator("#image img").bounding_box()
    for _ in range(2):
        page.mouse.move(box["x"] + 0.17 * box["width"], box["y"] + 0.48 * box["height"])
        page.mouse.wheel(0, -300)
    page.keyboard.press("u")
    says("pixels. Correct it")
    page.uncheck("#ahead")
    page.set_input_files("#file input", [str(file) for file in [*files, scan]])
    wait(lambda: page.locator("#strip li").count() == len(files) + 2)
    page.locator("#strip button").first.click()
    wait(lambda: page.title().startswith("eye"))
    snap("image")
    page.locator("#strip button").last.click()
    says("slices")
    page.fill("#query", "bright blob")
    box = page.locator("#image img").bounding_box()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    says("pixels. Correct it")
    page.keyboard.press("g")
    says("Carried on")
    snap("scan")
    page.click("#home")
    page.locator("#welcome").wait_for()
    snap("list")


def main() -> None:
    """As the module says."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--policy", default="ibis-nano")
    options.add_argument("--segmenter", default="ibis-click")
    options.add_argument("--clicks", type=int, default=40)
    options.add_argument("--screenshots", type=Path)
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
            page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"], timeout=300_000).new_page(
                viewport={"width": 1440, "height": 900}
            )
            page.set_default_timeout(300_000)
            page.goto(url)
            page.locator("#sample").wait_for()
            if chosen.screenshots is None:
                print(json.dumps(measure(page, files, large, chosen.clicks, server.pid)))
            else:
                scan = Path(folder) / "abdomen.nii.gz"
                nibabel.save(nibabel.Nifti1Image(hounsfield(blob((96, 80, 24))), GRIDS["RAS-uneven"]), scan)
                screenshots(page, files, scan, chosen.screenshots)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
