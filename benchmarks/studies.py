"""Whole folders of studies: one command, killed twice, complete; its memory; and what Orthanc and dciodvfy make of it.

    python benchmarks/studies.py [--studies 20] [--side 128] [--slices 24] [--segmenter ibis-click] [--json FILE]
    python benchmarks/studies.py --orthanc      # also: SEG, SR and RTSTRUCT to an Orthanc of its own, and back

Studies are drawn in code: a CT, a scout and an MR of each patient, in a folder a series. The command is
`ibisagent segment STUDIES "the liver" --select "CT axial >= 20 slices" --select "MR axial"` with every DICOM format;
the policy is `centre-click`: what is measured is the run, not the masks. Needs the Debian
packages orthanc, orthanc-dicomweb and dicom3tools for --orthanc.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from orthanc import MISSING, orthanc
from volume_phantoms import affine_of, blob, hounsfield, slice_files

from ibisagent.volumes import dicomweb, read_volume
from ibisagent.volumes.writing import masks_on

MEMORY_GOAL_GB = 2.0
FORMATS = ("seg", "sr", "rtstruct")


def draw(root: Path, studies: int, side: int, slices: int) -> None:
    """Studies of three series each; 5 mm slices of 1.5 x 1.5 mm pixels."""
    for number in range(studies):
        study = pydicom.uid.generate_uid()
        shape = (side, side - 8, slices)
        values = hounsfield(blob(shape), seed=number)
        affine = affine_of(np.diag([-1.0, -1.0, 1.0]), (1.5, 1.5, 5.0), (80.0, 60.0, -40.0 - number))
        patient = {"PatientID": f"P{number:03d}", "StudyInstanceUID": study}
        folder = root / f"study-{number:02d}"
        slice_files(folder / "ct", values, affine, SeriesNumber=2, SeriesDescription="Abdomen", **patient)
        slice_files(folder / "scout", values[:, :, :1], affine, SeriesNumber=1, SeriesDescription="Scout", **patient)
        slice_files(folder / "mr", values, affine, SeriesNumber=3, Modality="MR", SeriesDescription="T1", **patient)


def command(root: Path, out: Path, segmenter: str) -> list[str]:
    """What a user would type."""
    formats = [part for name in FORMATS for part in ("--format", name)]
    chosen = ["--select", "CT axial >= 20 slices", "--select", "MR axial"]
    models = ["--policy", "centre-click", "--segmenter", segmenter, "--slices", "::6", "--recheck", "0"]
    program = [sys.executable, "-m", "ibisagent", "segment", str(root), "the liver"]
    return [*program, *chosen, *formats, *models, "-o", str(out)]


def run(root: Path, out: Path, segmenter: str, kills: int) -> dict[str, Any]:
    """The command, killed when a third, then two thirds of the results are there, and started again each time."""
    wanted = 2 * len(list(root.iterdir()))
    started, seconds = time.perf_counter(), 0.0
    for attempt in range(kills + 1):
        with (out.parent / f"run-{attempt}.log").open("wb") as log:
            process = subprocess.Popen(command(root, out, segmenter), stdout=log, stderr=log)
            while process.poll() is None:
                if attempt < kills and finished(out) >= wanted * (attempt + 1) // (kills + 1):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                time.sleep(0.2)
    seconds = time.perf_counter() - started
    rows = list(csv.DictReader((out / "series.csv").read_text().splitlines()))
    outcomes = [row["outcome"] for row in rows]
    return {
        "series": len(rows),
        "outcomes": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        "complete": finished(out) == wanted and process.returncode == 0,
        "left behind": [file.name for file in out.iterdir() if file.name.startswith(".")],
        "peak GB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "seconds": round(seconds, 1),
    }


def finished(out: Path) -> int:
    """How many volumes are done."""
    return len([file for file in out.glob("*_record.json") if "_slice-" not in file.name]) if out.is_dir() else 0


def round_trip(root: Path, out: Path, folder: Path) -> dict[str, Any]:
    """The objects of the first study to Orthanc and back: the same bytes of meaning, the same masks; and dciodvfy."""
    study = sorted(root.iterdir())[0]
    volume = read_volume(study / "ct")
    made = {kind: out / f"{volume.name}_{kind}.dcm" for kind in FORMATS}
    result: dict[str, Any] = {}
    with orthanc(folder) as server:
        dicomweb.store(server, [*sorted((study / "ct").iterdir()), *made.values()])
        for kind, file in made.items():
            sent = pydicom.dcmread(file)
            back = folder / f"back-{kind}"
            back.mkdir()
            dicomweb.fetch_series(f"{server}/studies/{sent.StudyInstanceUID}/series/{sent.SeriesInstanceUID}", back)
            [returned] = back.iterdir()
            got = pydicom.dcmread(returned)
            result[kind] = {"same content": got == sent}
            if kind != "sr":
                masks, stored = masks_on(volume, returned), masks_on(volume, file)
                same = masks.keys() == stored.keys() and all((masks[name] == stored[name]).all() for name in masks)
                result[kind]["same masks"] = bool(same)
            result[kind]["dciodvfy errors"] = errors_of(returned)
    return result


def errors_of(file: Path) -> list[str] | str:
    """The errors that dicom3tools' validator finds."""
    if shutil.which("dciodvfy") is None:
        return "dciodvfy is not installed: apt install dicom3tools"
    said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
    return [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]


def main() -> None:
    """Draw, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--orthanc", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.orthanc and MISSING:
        raise SystemExit(MISSING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "studies", options.studies, options.side, options.slices)
        found = run(folder / "studies", folder / "out", options.segmenter, options.kills)
        found["memory goal reached"] = found["peak GB"] <= MEMORY_GOAL_GB
        if options.orthanc:
            found["orthanc"] = round_trip(folder / "studies", folder / "out", folder)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
