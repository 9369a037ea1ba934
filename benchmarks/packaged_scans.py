"""Scans that others made and packaged: which of them are read, and why the others are not.

    python benchmarks/packaged_scans.py                      # files that pydicom, highdicom and nibabel bring along
    python benchmarks/packaged_scans.py --folder pydicom-data=UNPACKED_WHEEL

Prints the table of docs/results.md, "Scans that others made". Every DICOM, NIfTI and MGH file is read and a slice of it
shown. Gzipped DICOM files are unpacked first, as no viewer reads them. Files of other kinds (surfaces, tracks, MINC,
Philips PAR/REC) are left out.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ibisagent.errors import IbisError
from ibisagent.volumes import SliceView, is_volume, read_volume

PACKAGES = ("pydicom", "highdicom", "nibabel")
OTHER_KINDS = (".py", ".pyc", ".pyi", ".gz.par", ".dconn.nii")
SHOWN = 3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=FOLDER", help="one more collection")
    arguments = parser.parse_args()
    folders = {f"{name} {version(name)}": _folder_of(name) for name in PACKAGES}
    folders |= {name: Path(folder) for name, _, folder in (given.partition("=") for given in arguments.folder)}
    print("| collection | scans | read | refused, and why |\n|---|---|---|---|")
    warnings.simplefilter("ignore")  # what matters is read or refused
    for name, folder in folders.items():
        total, read, refused = judge(folder)
        reasons = "; ".join(
            f"{len(files)} {reason} ({', '.join(files[:SHOWN])}{', ...' if len(files) > SHOWN else ''})"
            for reason, files in sorted(refused.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        )
        print(f"| {name} | {total} | {read} | {reasons or '-'} |")


def judge(folder: Path) -> tuple[int, int, dict[str, list[str]]]:
    """(scans, how many are read, names of the others by the reason they are refused for)."""
    total = read = 0
    refused: dict[str, list[str]] = defaultdict(list)
    for file in scans_below(folder):
        total += 1
        try:
            view = SliceView(_read_one(file))
            assert view.image(view.count // 2).pixels.size  # noqa: S101 - of a benchmark
        except IbisError as error:
            said = re.sub(r"\d{6,}", "N", str(error).replace(str(file), "").partition(": ")[2])
            refused[re.split(r"; | \(|, and ", said)[0]].append(file.name)
        else:
            read += 1
    return total, read, refused


def _read_one(file: Path) -> object:
    """The volume of a file; the first where it holds more than one, which is what a user would then choose."""
    try:
        return read_volume(file)
    except IbisError as error:
        if "choose with --channel" not in str(error):
            raise
        return read_volume(file, channel=0)


def scans_below(folder: Path) -> Iterator[Path]:
    """Every scan below the folder; gzipped DICOM files unpacked."""
    with tempfile.TemporaryDirectory() as unpacked:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            if file.name.endswith(OTHER_KINDS):
                continue
            if file.name.endswith(".dcm.gz"):
                plain = Path(unpacked) / file.name.removesuffix(".gz")
                with gzip.open(file) as packed, plain.open("wb") as target:
                    shutil.copyfileobj(packed, target)
                yield plain
            elif is_volume(file):
                yield file


def _folder_of(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: pip install 'ibisagent[medical]'")
    return Path(found.origin).parent


if __name__ == "__main__":
    main()
