"""Runs on disk: killed and continued, in multiple processes, compared, and as a page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pytest
import replies
from commands import ibisagent

from ibisagent.domain import Click, Stop, Undo
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.evaluation.report import coverage_curve, iou_by_turn, write_report
from ibisagent.evaluation.results import Evaluation, compare
from ibisagent.evaluation.runs import Run, Setup, run
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.imaging.masks import encode_rle
from ibisagent.inference.cases import MAX_FAILURES

SIZE = (37, 53)
box_mask = partial(phantoms.box_mask, size=SIZE)
text = partial(replies.text, size=SIZE)
CASES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen images of six patients; and a script that hits, corrects, gives up or writes nonsense in turn."""
    folder = tmp_path_factory.mktemp("data")
    rows, script = ["image,mask,object,modality,patient,split"], {}
    for number in range(CASES):
        x, y = 8 + number, 8 + number % 5
        mask = box_mask(x, y, x + 20, y + 12)
        write_png(np.where(mask, 220, 20).astype(np.uint8)[..., None].repeat(3, axis=2), folder / f"{number}.png")
        write_mask_png(mask, folder / f"{number}_mask.png")
        rows.append(f"{number}.png,{number}_mask.png,box,{('CT', 'MRI')[number % 2]},p{number // 2},val")
        hit, away = (
            text(Click(x + 10, y + 6, True, "box"), thought="Here <b>it</b> is."),
            text(Click(1, 1, True, "box")),
        )
        done = text(Stop("Done."))
        script[f"{number}.png#box"] = [[hit, done], [away, text(Undo(1)), hit, done], [done], [hit, "nonsense", done]][
            number % 4
        ]
    rows.append("0.png,,spleen,CT,p0,val")
    script["0.png#spleen"] = [text(Stop("None.", ("spleen",)))]
    (folder / "index.csv").write_text("\n".join(rows))
    (folder / "script.json").write_text(json.dumps(script))
    return folder


@pytest.fixture
def setup(data: Path) -> Setup:
    return Setup(data, policy=f"scripted:{data / 'script.json'}", segmenter="region", batch_size=2)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(Setup(data, policy=f"scripted:{data / 'script.json'}", segmenter="region", batch_size=2), folder)
    return folder


def results(folder: Path) -> dict[str, Any]:
    """Everything in evaluation.json but times."""
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(), object_hook=_untimed)
    return found


def _untimed(loaded: dict[str, Any]) -> dict[str, Any]:
    loaded.pop("seconds", None)
    return loaded


def evaluate_command(setup: Setup, folder: Path) -> list[str]:
    options = ["-p", setup.policy, "-s", setup.segmenter, "--batch-size", "2", "-o", str(folder)]
    return ["eval", "run", str(setup.data), *options]


def test_killed_run_ends_with_the_same_metrics(setup: Setup, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = folder / "cases.jsonl"
    command = [sys.executable, "-m", "ibisagent", *evaluate_command(setup, folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (-signal.SIGKILL, 0)  # 0: it was quicker
    started: list[tuple[int, int]] = []
    run(setup, folder, on_start=lambda total, done: started.append((total, done)))
    [(total, done)] = started
    assert 0 < done <= total == CASES + 1
    assert results(folder) == results(finished)
    assert {json.loads(line)["index"] for line in log.read_bytes().splitlines()} == set(range(CASES + 1))


def test_unfinished_block_is_judged_again(setup: Setup, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    log = folder / "cases.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # two blocks and a half; the power failed in the sixth line
    assert Run(folder).evaluation.results == Run(finished).evaluation.results[:5]
    started: list[tuple[int, int]] = []
    run(setup, folder, on_start=lambda total, done: started.append((total, done)))
    assert started == [(CASES + 1, 4)]
    assert results(folder) == results(finished)
    before = log.read_bytes()
    run(setup, folder)  # nothing is left to do
    assert log.read_bytes() == before


def test_workers_change_nothing(setup: Setup, finished: Path, tmp_path: Path) -> None:
    run(setup, tmp_path / "run", workers=2)
    assert results(tmp_path / "run") == results(finished)


def test_in_memory_is_the_same(setup: Setup, finished: Path) -> None:
    found = json.loads(json.dumps(run(setup).to_json()), object_hook=_untimed)
    assert found == results(finished)


def test_other_run_in_the_folder(setup: Setup, finished: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size was 2"):
        run(Setup(setup.data, policy=setup.policy, segmenter="region", batch_size=3), finished)
    with pytest.raises(ConfigError, match="workers"):
        run(setup, workers=0)


def test_tables_on_disk_say_what_the_summary_says(finished: Path) -> None:
    loaded = results(finished)
    overall = loaded["summaries"]["all"]
    assert (overall["cases"], overall["positives"], overall["patients"]) == (13, 12, 6)
    assert set(loaded["summaries"]) == {"all", "modality", "object", "size", "dataset"}
    rows = list(csv.DictReader(io.StringIO((finished / "summary.csv").read_text())))
    [iou] = [row for row in rows if (row["by"], row["group"], row["metric"]) == ("all", "all", "iou")]
    assert float(iou["value"]) == pytest.approx(overall["means"]["iou"], rel=1e-5)
    assert float(iou["low_95"]) == pytest.approx(overall["intervals"]["iou"][0], rel=1e-5)
    cases = list(csv.DictReader(io.StringIO((finished / "cases.csv").read_text())))
    assert len(cases) == 13
    assert float(cases[3]["parse_failures"]) == 1
    assert "| IoU pos. |" in (finished / "summary.md").read_text()
    latex = (finished / "summary.tex").read_text()
    assert r"area 0.5\% to 5\%" in latex or r"area $>$ 5\%" in latex
    assert latex.count(r"\\") == latex.count("\n") - latex.count("rule\n") - 3


def test_failures_are_tried_again(setup: Setup, data: Path, tmp_path: Path) -> None:
    script = json.loads((data / "script.json").read_text())
    (tmp_path / "script.json").write_text(json.dumps({**script, "3.png#box": []}))
    broken = Setup(setup.data, policy=f"scripted:{tmp_path / 'script.json'}", segmenter="region", batch_size=2)
    first = run(broken, tmp_path / "run")
    assert [failure.case_id for failure in first.failures] == ["3.png#box"]
    assert len(first.results) == CASES
    (tmp_path / "script.json").write_text(json.dumps(script))
    again = run(broken, tmp_path / "run")
    assert not again.failures
    assert len(again.results) == CASES + 1


def test_gives_up_when_everything_fails(tmp_path: Path) -> None:
    write_png(np.zeros((*SIZE, 3), np.uint8), tmp_path / "a.png")
    rows = [f"a.png,,thing {number}" for number in range(MAX_FAILURES + 4)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,mask,object", *rows]))
    (tmp_path / "script.json").write_text("{}")
    with pytest.raises(IbisError, match="in a row failed"):
        run(Setup(tmp_path / "rows.csv", policy=f"scripted:{tmp_path / 'script.json'}", segmenter="region"))


def test_no_run(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Run(tmp_path)
    shutil.copytree(finished, tmp_path / "damaged")
    with (tmp_path / "damaged" / "cases.jsonl").open("ab") as log:
        log.write(b"nonsense\n")
    with pytest.raises(DataError, match="line 14"):
        Run(tmp_path / "damaged")


def test_two_runs_are_compared(setup: Setup, finished: Path, tmp_path: Path) -> None:
    other = Setup(setup.data, policy="oracle", segmenter="region", limit=10)
    run(other, tmp_path / "oracle")
    shown = ibisagent("eval", "compare", finished, tmp_path / "oracle", "-o", tmp_path / "compared.md")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "compared.md").read_text() == shown.stdout
    assert "10 cases in both; left out: 3 only in A, 0 only in B" in shown.stdout
    assert shown.stderr.count("only in A, left out: ") == 3
    loaded = json.loads(ibisagent("eval", "compare", finished, tmp_path / "oracle", "--json").stdout)
    one = loaded["metrics"]["positive_iou"]
    assert one["difference"] == pytest.approx(one["b"] - one["a"])
    assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    assert {"CT", "MRI"} == set(loaded["groups"]["modality"])
    a = Run(finished).evaluation
    with pytest.raises(DataError, match="no case in common"):
        compare(a, Evaluation({}, (), ()))
    assert all(found.difference == 0 for found in compare(a, a).metrics.values())


def test_runs_that_were_judged_on_other_masks_are_not_compared(finished: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(finished, later)
    lines = [json.loads(line) for line in (later / "cases.jsonl").read_text().splitlines()]
    changed = next(line for line in lines if line["targets"])
    size = tuple(changed["targets"][0]["rle"]["size"])
    changed["targets"][0]["rle"] = encode_rle(np.ones(size, dtype=bool))
    (later / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused = ibisagent("eval", "compare", finished, later)
    assert refused.exit_code == 2
    assert f"1 of 13 cases were judged on other masks of the ground truth, such as {changed['result']['case_id']}" in (
        refused.stderr
    )
    changed["targets"][0]["rle"] = encode_rle(np.ones((5, 5), dtype=bool))  # resized on purpose
    (later / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ibisagent("eval", "compare", finished, later).exit_code == 0


# --------------------------------------------------------------------------------------------------------- the report


def test_curves_by_hand(finished: Path) -> None:
    curve = coverage_curve([0.2, 0.9, 0.5], [0.0, 1.0, 0.4])
    assert np.allclose(curve, [(1 / 3, 1.0), (2 / 3, 0.7), (1, 1.4 / 3)])
    results = Run(finished).evaluation.results[:2]  # hit at once; off, undone, hit
    first, last = (one.measures["iou"] for one in results)
    off = results[1].ious[0]
    expected = [(first + off) / 2, first / 2, (first + last) / 2, (first + last) / 2]
    assert [iou for _, iou in iou_by_turn(results, 4)] == pytest.approx(expected)
    assert iou_by_turn([], 4) == []


def test_images_that_changed_are_not_shown(setup: Setup, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(setup.data, data)
    run(Setup(data, policy=setup.policy, segmenter="region", baselines=False), tmp_path / "run")
    (data / "3.png").unlink()
    write_png(np.zeros((*SIZE, 3), np.uint8), data / "4.png")
    missing = write_report(tmp_path / "run", tmp_path / "page.html", cases=20)
    assert sorted(missing) == ["3.png#box", "4.png#box"]


def test_report_in_a_browser(finished: Path, browser: Any, tmp_path: Path) -> None:
    shown = ibisagent("eval", "report", finished, "-o", tmp_path / "report.html", "--cases", 2)
    assert shown.exit_code == 0, shown.output
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("svg polyline").count() == 6  # all and two modalities by turn; coverage with two to compare
    assert page.locator("table[data-by]:visible").count() == 1
    page.select_option("#by", "size")
    assert page.locator("table[data-by=size]").is_visible()
    assert page.locator(".card:visible").count() == 6
    images = page.locator(".card:visible img")
    assert images.count() > 12
    for number in range(images.count()):
        images.nth(number).scroll_into_view_if_needed()
    page.wait_for_function(
        "[...document.querySelectorAll('.card:not([hidden]) img')].every(one => one.complete && one.naturalWidth > 0)"
    )
    assert page.get_by_text("Here <b>it</b> is.").count()  # what a model writes is text, never markup
    page.select_option("#modality", "MRI")
    rows = page.locator("#rows tbody tr:visible")
    assert rows.count() == 6
    assert page.locator("#count").inner_text() == "6 cases"
    assert page.locator(".card:visible:not([data-modality=MRI])").count() == 0
    page.fill("#name", "11.png")
    assert rows.count() == 1
    page.click("#clear")
    page.click("#rows button.sort:text-is('IoU')")
    ious = [float(cell) for cell in page.locator("#rows tbody tr td:nth-child(5)").all_inner_texts()]
    assert ious == sorted(ious)
    assert len(ious) == 13
    if os.environ.get("IBIS_SCREENSHOTS"):
        page.screenshot(path=str(Path(os.environ["IBIS_SCREENSHOTS"]) / "report.png"), full_page=True)
    page.close()
    assert not troubles


def changeable(folder: Path) -> Setup:
    """Four images for validation and one to train on, of one patient each, in blocks of two cases."""
    rows, mask = ["image,mask,object,split,patient"], box_mask(10, 8, 30, 20)
    for number, split in enumerate(["val"] * 4 + ["Training"]):
        write_png(
            np.where(mask, 220, 20 + number).astype(np.uint8)[..., None].repeat(3, axis=2), folder / f"{number}.png"
        )
        write_mask_png(mask, folder / f"{number}_mask.png")
        rows.append(f"{number}.png,{number}_mask.png,box,{split},p{number}")
    (folder / "rows.csv").write_text("\n".join(rows))
    return Setup(folder / "rows.csv", policy="centre-click", segmenter="region", batch_size=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_cases_whose_files_changed_are_judged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    setup, folder = changeable(tmp_path), tmp_path / "run"
    first = run(setup, folder)
    assert [one.measures["iou"] > 0.5 for one in first.results] == [True] * 4
    mask_file = tmp_path / "2_mask.png"
    times = mask_file.stat()
    write_mask_png(box_mask(0, 0, 20, 12), mask_file)  # as many pixels; the file is dated back, as a copy may be
    os.utime(mask_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    started: list[tuple[int, int]] = []
    again = run(setup, folder, workers=workers, on_start=lambda total, done: started.append((total, done)))
    assert started == [(4, 2)]  # the block of the changed case is judged again
    assert "the files of 1 of 4 cases have changed" in caplog.text
    assert again.results == Run(folder).evaluation.results
    assert [one.measures["iou"] < 0.5 for one in again.results] == [False, False, True, False]
    assert results(folder)["cases"] == json.loads(json.dumps(run(setup).to_json()), object_hook=_untimed)["cases"]
    caplog.clear()
    for file in tmp_path.glob("*.png"):
        os.utime(file)  # touched and not changed
    run(setup, folder)
    assert "have changed" not in caplog.text


def test_what_the_baselines_learned_from_counts_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup, folder = changeable(tmp_path), tmp_path / "run"
    assert all(one.measures["prior_hit"] for one in run(setup, folder).results)
    write_mask_png(box_mask(40, 25, 50, 35), tmp_path / "4_mask.png")
    assert not any(one.measures["prior_hit"] for one in run(setup, folder).results)
    assert "the files of 4 of 4 cases have changed" in caplog.text


def test_a_stopped_start_forgets_what_has_changed(tmp_path: Path) -> None:
    """A run that ends before it is judged again does not go on to show the old figure."""
    setup, folder = changeable(tmp_path), tmp_path / "run"
    run(setup, folder)
    write_mask_png(box_mask(0, 0, 5, 5), tmp_path / "1_mask.png")

    def stop(total: int, done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, folder, on_start=stop)
    assert [one.case_id for one in Run(folder).evaluation.results] == ["0.png#box", "2.png#box", "3.png#box"]


def test_other_texts_are_another_run(tmp_path: Path) -> None:
    setup, folder = changeable(tmp_path), tmp_path / "run"
    run(setup, folder)
    table = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(table.replace("val,p3", "val,p2"))  # two images are of one patient after all
    with pytest.raises(ConfigError, match="cases_sha256"):
        run(setup, folder)


def test_one_row_fails_alone_and_many_such_rows_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts and labels that cannot be used fail their own row, which is named, however many they are in a row."""
    mask = box_mask(10, 8, 30, 20)
    write_png(np.where(mask, 220, 20).astype(np.uint8)[..., None].repeat(3, axis=2), tmp_path / "a.png")
    write_mask_png(mask, tmp_path / "m.png")
    write_mask_png(np.ones(SIZE, dtype=bool), tmp_path / "all.png")
    bad = [{"object": f"{number}" + "d" * 250} for number in range(MAX_FAILURES + 5)]
    bad.append({"object": "odd", "label": "liver"})
    good = [{"object": name} for name in ("box", "a (0, 1)", "</action>", "x; y", 'a "b"', "a\nb")]
    rows = [{"image": "a.png", "mask": "m.png", **row} for row in (*bad, *good)]
    rows.append({"image": "a.png", "mask": "all.png", "object": "everything"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup = Setup(tmp_path / "rows.jsonl", policy="centre-click", segmenter="region", batch_size=4)
    found = run(setup, tmp_path / "run")
    assert [one.object for one in found.results] == [*(row["object"] for row in good), "everything"]
    assert len(found.failures) == len(bad)
    assert all(f"row {number}: " in one.error for number, one in enumerate(found.failures, start=1))
    assert "an object's name has 251 characters, at most 200 can be said" in found.failures[0].error
    assert caplog.text.count("all.png: covers the whole image") == 1


def test_the_output_folder_is_tried_before_the_work(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        run(Setup(tmp_path / "none.csv"), tmp_path / "file" / "run")  # the data and the models are not even looked for
