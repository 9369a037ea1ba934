"""Six images corrected on the page, "Learn", and the seventh is better; the same through MONAI Label's /train.

    python benchmarks/teach_on_page.py [--examples N] [--image docs/guide/teach.png]

With the packaged weights, in a real browser, on a drawn star among discs, an object that no policy here knows. A
simulated user takes back what the agent did where it is poor, draws a box, corrects that with an expert's clicks, and
accepts the image. Prints one JSON object: IoU of the seventh
and eighth image before and after, and what the page and /train said; exit code 1 where the mean is not better by 0.1.
--examples: of each of the runs, by default as many as `ibisagent teach` learns from; 400 show the same in a third of
the time.
--image: write that of the guide, the eighth image with both masks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from playwright.sync_api import sync_playwright

from ibisagent import Mask, iou, load_policy, load_segmenter
from ibisagent.imaging.clicks import next_click
from ibisagent.server.annotate import mount_annotate
from ibisagent.server.app import create_app
from ibisagent.server.monai import mount_monai
from ibisagent.server.page import mount_page
from ibisagent.server.service import Service
from ibisagent.server.teaching_routes import mount_teaching
from ibisagent.server.volumes import PackageVolumes
from ibisagent.training.teach import TeachRecipe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from loopback import serving

SIZE = (240, 320)
GOOD, MOST_CLICKS = 0.85, 8
BETTER = 0.1
PATIENCE = 5.0  # seconds without a word
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
SHORTER = """
import sys
from ibisagent.server.teacher_process import main
from ibisagent.training.teach import TeachRecipe
main(sys.argv[1], TeachRecipe(examples=EXAMPLES))
"""


def draw(number: int) -> tuple[np.ndarray, Mask]:
    """A star among discs of the same colour: the pixels (H, W, 3), and the mask of the star."""
    random = np.random.default_rng(number)
    pixels = random.integers(70, 110, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    places = [(x, y) for y in range(40, SIZE[0] - 30, 60) for x in range(40, SIZE[1] - 30, 60)]
    for count, place in enumerate(random.permutation(len(places))[:8]):
        centre = np.array(places[place]) + random.integers(-6, 7, 2)
        if count:
            cv2.circle(pixels, tuple(int(one) for one in centre), int(random.integers(12, 20)), (190, 170, 160), -1)
            continue
        angles = np.arange(10) * np.pi / 5 + random.random()
        reach = np.where(np.arange(10) % 2, 0.42, 1.0) * random.integers(22, 28)
        corners = centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        for canvas, colour in ((pixels, (190, 170, 160)), (mask, 1)):
            cv2.fillPoly(canvas, [corners.round().astype(np.int32)], colour)
    return cv2.GaussianBlur(pixels, (0, 0), 1), mask > 0


def wait(holds: Callable[[], Any], what: str, seconds: float = 3600) -> None:
    """Until it holds; says what it waits for, once it has waited long."""
    started, told = time.monotonic(), False
    while not holds():
        waited = time.monotonic() - started
        if waited > seconds:
            raise SystemExit(f"{what} did not come in {seconds:.0f} s")
        if waited > PATIENCE and not told:
            print(f"waiting for {what}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)
    if told:
        print(f"{what}: after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def on_page(page: Any, service: Service, files: list[Path]) -> tuple[list[float], list[float], list[Mask], str]:
    """IoU of the last two images before and after the page has learned from the others, their masks, and its words."""

    def session(number: int) -> Any:
        return service.session(page.locator("#strip li").nth(number).get_attribute("data-id"))

    def found(number: int) -> Mask:
        masks = session(number).masks
        return np.any(list(masks.values()), axis=0) if masks else np.zeros(SIZE, bool)

    def done(number: int) -> bool:
        shown = page.locator(f"#strip li:nth-child({number + 1}) button.agent:not(.busy)").count()
        return bool(shown) and session(number).state == "agent"

    def correct(number: int) -> None:
        ground_truth, shown = draw(number)[1], page.locator("#image img").bounding_box()

        def at(x: float, y: float) -> tuple[float, float]:
            return shown["x"] + x * shown["width"] / SIZE[1], shown["y"] + y * shown["height"] / SIZE[0]

        def act(does: Callable[[], Any], what: str) -> None:
            before = found(number).tobytes(), len(session(number).steps)
            does()
            wait(lambda: (found(number).tobytes(), len(session(number).steps)) != before, what)

        page.focus("#image")
        while iou(found(number), ground_truth) < GOOD and session(number).can_undo:
            act(lambda: page.keyboard.press("u"), "the undo")
        if not found(number).any():
            rows, columns = np.nonzero(ground_truth)
            page.keyboard.press("b")
            page.mouse.move(*at(columns.min(), rows.min()))
            page.mouse.down()
            page.mouse.move(*at(columns.max() + 1, rows.max() + 1))
            act(page.mouse.up, "the box's mask")
            page.keyboard.press("p")
        for _ in range(MOST_CLICKS):
            click = next_click(ground_truth, found(number), "star")
            if iou(found(number), ground_truth) >= GOOD or click is None:
                break
            place, button = at(click.x + 0.5, click.y + 0.5), "left" if click.positive else "right"
            act(partial(page.mouse.click, *place, button=button), "the click's mask")

    last = [len(files) - 2, len(files) - 1]
    page.set_input_files("#file input", [str(file) for file in files])
    wait(lambda: page.locator("#strip li").count() == len(files), "the list of images")
    page.fill("#query", "Segment the star.")
    page.press("#query", "Enter")
    wait(lambda: all(done(number) for number in range(len(files))), "the agent's masks")
    before = [found(number) for number in last]
    for number in range(len(files) - 2):
        page.locator("#strip li button").nth(number).click()
        wait(lambda number=number: page.title().startswith(files[number].name), "the image")
        correct(number)
        if number + 1 < last[0]:  # to accept shows the next one, and what was seen is not done again
            page.focus("#image")
            page.keyboard.press("Enter")
            wait(lambda number=number: session(number).state == "accepted", "the acceptance")
    wait(lambda: page.locator("#learn").is_enabled(), "the button")
    page.locator("#learn").press("Enter")
    wait(lambda: service.teaching.now.state not in ("none", "running"), "the end of the teaching")
    said = service.teaching.said
    if service.teaching.folder is not None:
        old = [one.tobytes() for one in before]
        wait(lambda: all(done(one) and found(one).tobytes() not in old for one in last), "the new masks", 600)
    masks, ground_truths = [found(number) for number in last], [draw(number)[1] for number in last]
    both = [[iou(*pair) for pair in zip(made, ground_truths, strict=True)] for made in (before, masks)]
    return both[0], both[1], [before[1], masks[1]], said


def through_monai(web: httpx.Client, files: list[Path]) -> tuple[list[float], list[float], str]:
    """The same by the requests of a client of MONAI Label, with the ground truth as what its user submits."""

    def found(number: int) -> float:
        sent = {"params": (None, json.dumps({"query": "Segment the star."}))}
        sent["file"] = (files[number].name, files[number].read_bytes())
        answer = web.post("/infer/ibisagent?image=&output=image", files=sent).raise_for_status()
        mask = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_GRAYSCALE) > 0
        return iou(mask, draw(number)[1])

    last = [len(files) - 2, len(files) - 1]
    before = [found(number) for number in last]
    told = {"params": json.dumps({"label_info": [{"name": "star", "idx": 1}]})}
    for number in range(len(files) - 2):
        web.put(f"/datastore/?image={number}", files={"file": (files[number].name, files[number].read_bytes())})
        label = cv2.imencode(".png", draw(number)[1].astype(np.uint8))[1].tobytes()
        sent = {"label": ("label.png", label)}
        web.put(f"/datastore/label?image={number}", files=sent, data=told).raise_for_status()
    web.post("/train/ibisagent", json={}).raise_for_status()
    wait(lambda: web.get("/train/").json()["status"] != "RUNNING", "the end of the training")
    return before, [found(number) for number in last], web.get("/train/").json()["details"][0]


def write_image(path: Path, before: Mask, after: Mask, number: int) -> None:
    """The image, and with the outline of each mask: before, after."""
    pixels = draw(number)[0]
    panels = [pixels]
    for mask in (before, after):
        panel = pixels.copy()
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(panel, outlines, -1, (40, 220, 255), 2)
        panels.append(panel)
    row = np.concatenate([np.pad(one, ((0, 0), (0, 6), (0, 0)), constant_values=255) for one in panels], axis=1)
    # few colours, so that the file is small
    few = cv2.bilateralFilter(row, 5, 25, 5)[..., ::-1] // 16 * 16 + 8
    cv2.imwrite(str(path), few, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def main() -> None:
    """As the module says."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--examples", type=int, default=TeachRecipe.model_fields["examples"].default)
    options.add_argument("--image", type=Path)
    options.add_argument("--ways", default="page,monai", help="with commas")
    chosen = options.parse_args()
    browser = os.environ.get("IBIS_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)))
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "shorter.py").write_text(SHORTER.replace("EXAMPLES", str(chosen.examples)))
        teaching = partial(mount_teaching, process=(sys.executable, str(folder / "shorter.py")))
        files = [folder / f"{number}.png" for number in range(8)]
        for number, file in enumerate(files):
            cv2.imwrite(str(file), draw(number)[0][..., ::-1])
        for way in chosen.ways.split(","):
            models = load_policy("ibis-nano"), load_segmenter("ibis-click")
            service = Service(*models, folder / way, volumes=PackageVolumes())
            app = create_app(service, mounts=(mount_annotate, mount_monai, teaching, mount_page))
            with serving(app) as address:
                if way == "page":
                    with sync_playwright() as driver:
                        page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
                        page.set_default_timeout(600_000)
                        page.goto(address)
                        before, after, masks, said = on_page(page, service, files)
                    if chosen.image is not None:
                        write_image(chosen.image, *masks, len(files) - 1)
                else:
                    with httpx.Client(base_url=address, timeout=600) as web:
                        before, after, said = through_monai(web, files)
            service.close()
            told[way] = {"before": before, "after": after, "said": said}
    print(json.dumps(told, indent=1))
    sys.exit(any(np.mean(one["after"]) < np.mean(one["before"]) + BETTER for one in told.values()))


if __name__ == "__main__":
    main()
