"""The real page in a real browser: headless Chromium driven by Playwright. Skipped where there is none.

IBIS_SCREENSHOTS=folder takes pictures of every state, with the packaged models instead of the fakes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pytest
from loopback import serving
from volume_phantoms import GRIDS, blob, hounsfield

from ibisagent.datasets import read_cases
from ibisagent.domain import Image
from ibisagent.imaging.images import write_png
from ibisagent.policies import load_policy
from ibisagent.policies.base import Policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import COLOURS, OPACITY
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.server.app import create_app
from ibisagent.server.page import mount_page
from ibisagent.server.service import Limits, Service
from ibisagent.server.volumes import PackageVolumes

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
BROWSER = os.environ.get("IBIS_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
SCREENSHOTS = os.environ.get("IBIS_SCREENSHOTS")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"no browser is here: none of {', '.join(BROWSERS)} (or IBIS_BROWSER)"),
    # Gradio and its libraries, not ours:
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REPLIES = (
    "<think>The bright oval is the disc.</think><action>click + (0.16, 0.46) optic disc</action>",
    "<think>A little more below.</think><action>click + (0.17, 0.48) optic disc</action>",
    "<think>It fits.</think><action>stop</action><answer>The optic disc is segmented.</answer>",
)


class Thinking(ScriptedPolicy):
    """Takes its time over every turn, so that a browser can see one before the next."""

    def respond(self, observations: Any) -> Any:
        time.sleep(0.7)
        return super().respond(observations)


def models() -> tuple[Policy, Segmenter]:
    if SCREENSHOTS:
        return load_policy("ibis-nano"), load_segmenter("ibis-click")
    return Thinking(list(REPLIES)), load_segmenter("region")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    limits = Limits(pixels=3_000_000)
    service = Service(*models(), tmp_path_factory.mktemp("data"), limits=limits, volumes=PackageVolumes())
    with serving(create_app(service, mounts=(mount_page,))) as address:
        yield address, service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, served: tuple[str, Service]) -> Iterator[Any]:
    one = browser.new_page(viewport={"width": 1366, "height": 850})
    one.set_default_timeout(30_000)
    outside: list[str] = []
    one.on("request", lambda request: None if "127.0.0.1" in request.url else outside.append(request.url))
    one.goto(served[0])
    one.wait_for_selector("#picture")
    yield one
    one.close()
    assert not [url for url in outside if not url.startswith(("data:", "blob:"))], outside


def snap(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.wait_for_timeout(1200)
        page.screenshot(path=str(Path(SCREENSHOTS) / f"page-{name}.png"))


def wait_for_turns(page: Any, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('#turns li').length >= {count}")


def wait_for_frames(page: Any) -> None:
    """Until the browser has drawn two more frames."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def click_picture(page: Any, x: float, y: float) -> None:
    """Click on a place of the picture, given as fractions of its width and height."""
    page.wait_for_function("(document.querySelector('#picture img') || {}).naturalWidth > 0")  # while it is replaced
    page.locator("#picture img").scroll_into_view_if_needed()
    box = page.locator("#picture img").bounding_box()
    natural = page.evaluate(
        "(() => { const i = document.querySelector('#picture img'); return [i.naturalWidth, i.naturalHeight]; })()"
    )
    scale = min(box["width"] / natural[0], box["height"] / natural[1], 1)
    width, height = natural[0] * scale, natural[1] * scale
    left, top = box["x"] + (box["width"] - width) / 2, box["y"] + (box["height"] - height) / 2
    page.mouse.click(left + x * width, top + y * height)


def shown_pixels(page: Any) -> np.ndarray:
    """The picture as the browser shows it, at the size of the image it was made of (`_enlarged` repeats pixels)."""
    source = page.locator("#picture img").get_attribute("src")
    assert source.startswith("data:image/jpeg;base64,"), source[:100]  # no file that others could ask for
    shown = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))
    return shown.astype(int)


def wait_until(page: Any, holds: Callable[[], bool], what: str) -> None:
    for _ in range(150):
        if holds():
            return
        page.wait_for_timeout(200)
    pytest.fail(what)


def wait_for_picture(page: Any, pixels: np.ndarray) -> None:
    """Until `pixels` (H, W, 3) are shown, whatever JPEG makes of them."""

    def same() -> bool:
        shown = shown_pixels(page)
        zoom = shown.shape[0] // pixels.shape[0]
        small = shown[zoom // 2 :: zoom, zoom // 2 :: zoom]
        return small.shape == pixels.shape and float(np.abs(small - pixels).mean()) < 4

    wait_until(page, same, "the picture is not shown")


def wait_for_colour(page: Any, colour: tuple[int, int, int] | None, at: tuple[int, int]) -> None:
    """Until the plate at pixel `at` (x, y) of a picture of 160 x 120 is tinted so; None: not at all."""
    plate = np.array([210, 210, 210])
    wanted = plate if colour is None else plate + OPACITY * (np.array(colour) - plate)

    def tinted() -> bool:
        shown = shown_pixels(page)
        zoom = shown.shape[1] // 160
        x, y = (place * zoom + zoom // 2 for place in at)
        return float(np.abs(shown[y, x] - wanted).max()) < 12

    wait_until(page, tinted, f"colour {wanted} is not at {at}")


def choose(page: Any, dropdown: str, option: str) -> None:
    page.click(f"{dropdown} input")
    page.get_by_role("option", name=option, exact=True).click()


def session_of(service: Service) -> Any:
    return service.session(service.session_ids[-1])


def test_a_person_and_the_agent_segment_an_eye(page: Any, served: tuple[str, Service]) -> None:
    service = served[1]
    snap(page, "start")
    page.click("#sample")
    page.wait_for_selector("#picture img")
    assert page.input_value("#query textarea") == "Segment the optic disc."
    snap(page, "opened")
    page.click("#run")
    wait_for_turns(page, 1)
    session = session_of(service)
    assert session.running or SCREENSHOTS, "the first turn was seen only after the run had ended"
    snap(page, "running")
    page.wait_for_function("!document.querySelector('#status').innerText.includes('thinking')", timeout=60_000)
    assert session.masks["optic disc"].any()
    count = len(session.steps)
    wait_for_turns(page, count)
    snap(page, "agent")

    click_picture(page, 0.165, 0.50)
    wait_for_turns(page, count + 1)
    positive = session.steps[-1].turn.reply.actions[0]
    assert positive.positive
    assert abs(positive.x - 0.165 * session.image.size[1]) < 5
    assert abs(positive.y - 0.50 * session.image.size[0]) < 5
    page.get_by_label("Negative click").check()
    before = session.masks["optic disc"]
    click_picture(page, 0.245, 0.45)
    wait_for_turns(page, count + 2)
    assert not session.steps[-1].turn.reply.actions[0].positive
    snap(page, "corrected")
    page.click("#undo")
    wait_for_turns(page, count + 3)
    assert np.array_equal(session.masks["optic disc"], before)

    for kind, ending in (("mask", ".png"), ("record", ".json"), ("report", ".html"), ("export", ".zip")):
        with page.expect_download() as download:
            page.click(f"#legend a.{kind}")
        content = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename.endswith(ending)
        if kind == "mask":
            mask = np.array(PIL.Image.open(io.BytesIO(content))) > 0
            assert np.array_equal(mask, session.masks["optic disc"])
        elif kind == "record":
            assert json.loads(content)["query"] == "Segment the optic disc."
    page.get_by_text("Before and after").click()
    snap(page, "exported")


def test_errors_are_said_in_plain_words(page: Any) -> None:
    page.click("#run")
    page.get_by_text("open an image first").wait_for()
    page.set_input_files("#file input", {"name": "eye.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.get_by_text("not a readable PNG").wait_for()
    snap(page, "error")


def test_own_file_boxes_and_keyboard(page: Any, served: tuple[str, Service], tmp_path: Path) -> None:
    pixels = np.full((120, 160, 3), 40, dtype=np.uint8)
    pixels[30:80, 50:110] = 210
    write_png(Image(pixels).pixels, tmp_path / "own.png")
    page.set_input_files("#file input", str(tmp_path / "own.png"))
    page.wait_for_selector("#picture img")
    page.get_by_text("160 x 120 pixels").wait_for()
    page.fill("#query textarea", "bright plate")
    session = session_of(served[1])
    page.get_by_label("Box (two corners)").check()
    click_picture(page, 0.28, 0.2)
    page.get_by_text("opposite corner").wait_for()
    click_picture(page, 0.72, 0.72)
    wait_for_turns(page, 1)
    assert session.image.source == "own.png"
    mask = session.masks["bright plate"]
    assert mask.any()
    page.get_by_label("Positive click").check()
    page.get_by_text("Without a mouse").click()
    page.wait_for_selector("#place")
    wait_for_frames(page)  # in the next one Gradio gives what has just been shown its first values once more
    for box, value in (("#x input", "5"), ("#y input", "7")):
        page.fill(box, value)
        page.press(box, "Tab")
    assert [page.input_value(f"#{axis} input") for axis in "xy"] == ["5", "7"]
    page.focus("#place")
    page.keyboard.press("Enter")
    wait_for_turns(page, 2)
    assert session.prompts[-1].x == 5
    assert session.prompts[-1].y == 7
    page.focus("#undo")
    page.keyboard.press("Space")
    wait_for_turns(page, 3)
    assert np.array_equal(session.masks["bright plate"], mask)


def test_colours_and_visibility_and_training_data(page: Any, served: tuple[str, Service], tmp_path: Path) -> None:
    pixels = np.full((120, 160, 3), 40, dtype=np.uint8)
    pixels[30:80, 20:60] = pixels[30:80, 100:140] = 210
    write_png(pixels, tmp_path / "two.png")
    page.set_input_files("#file input", str(tmp_path / "two.png"))
    page.get_by_text("160 x 120 pixels").wait_for()
    page.fill("#query textarea", "left plate")
    click_picture(page, 40 / 160, 55 / 120)
    wait_for_turns(page, 1)
    page.fill("#target input", "right plate")
    page.press("#target input", "Enter")
    click_picture(page, 120 / 160, 55 / 120)
    wait_for_turns(page, 2)
    page.get_by_label("Show clicks and boxes").uncheck()
    wait_for_colour(page, COLOURS["green"], at=(30, 70))
    wait_for_colour(page, COLOURS["orange"], at=(110, 70))
    choose(page, "#colour", "magenta")
    wait_for_colour(page, COLOURS["magenta"], at=(110, 70))
    page.get_by_role("checkbox", name="left plate").uncheck()
    wait_for_colour(page, None, at=(30, 70))
    click_picture(page, 5 / 160, 5 / 120)  # what was chosen stays chosen
    wait_for_turns(page, 3)
    wait_for_colour(page, COLOURS["magenta"], at=(110, 70))
    wait_for_colour(page, None, at=(30, 70))
    assert not page.get_by_role("checkbox", name="left plate").is_checked()
    snap(page, "colours")
    with page.expect_download() as download:
        page.click("#legend a.training")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path / "training")
    cases = list(read_cases(tmp_path / "training" / "manifest.csv"))
    assert {target for case in cases for target in case.targets} == {"left plate", "right plate"}
    session = session_of(served[1])
    for case in cases:
        for name, target in case.targets.items():
            assert np.array_equal(target, session.masks[name])


def test_a_volume_is_worked_on_slice_by_slice(page: Any, served: tuple[str, Service], tmp_path: Path) -> None:
    inside = blob((46, 34, 20))
    nibabel.save(nibabel.Nifti1Image(hounsfield(inside), GRIDS["RAS-uneven"]), tmp_path / "scan.nii.gz")
    volume = PackageVolumes().read(tmp_path / "scan.nii.gz")
    page.set_input_files("#file input", str(tmp_path / "scan.nii.gz"))
    page.get_by_text("46 x 34 x 20 voxels").wait_for()
    page.fill("#query textarea", "Segment the optic disc.")
    wait_for_picture(page, volume.slice(2, 10, "auto").pixels)
    snap(page, "volume")
    page.focus("#slice input[type=range]")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for_picture(page, volume.slice(2, 8, "auto").pixels)
    choose(page, "#window", "lung")
    wait_for_picture(page, volume.slice(2, 8, "lung").pixels)
    choose(page, "#window", "liver")
    wait_for_picture(page, volume.slice(2, 8, "liver").pixels)

    page.get_by_label("Show clicks and boxes").uncheck()
    page.click("#ask")
    wait_for_turns(page, 1)
    session = session_of(served[1])
    assert np.array_equal(session.image.pixels, volume.slice(2, 8, "liver").pixels)
    snap(page, "volume-slice")
    page.focus("#slice input[type=range]")
    page.keyboard.press("ArrowRight")
    page.get_by_text("No turns yet").wait_for()
    wait_for_picture(page, volume.slice(2, 9, "liver").pixels)
    page.keyboard.press("ArrowLeft")
    wait_for_turns(page, 1)  # the slice's session was kept
    page.get_by_label("sagittal").check()
    wait_for_picture(page, volume.slice(0, 23, "liver").pixels)
    snap(page, "volume-sagittal")
