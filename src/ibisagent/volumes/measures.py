"""Measurements of a mask in a volume: millilitres, area, longest diameter; as JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from ibisagent.domain import Mask
from ibisagent.files import csv_text, write_json, write_whole
from ibisagent.volumes.views import SliceView


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one target. What needs millimetres is None where the source does not tell them, or the mask is empty.

    area_mm2, longest_diameter_mm: the largest in one slice of the view, which is named; a diameter joins the middles of
    outer pixel edges. volume_ml counts voxels; unevenly spaced ones reach half way to the next slices. slices: first
    and last that show the target, counted from 0.
    """

    voxels: int
    volume_ml: float | None
    area_mm2: float | None
    area_slice: int | None
    longest_diameter_mm: float | None
    diameter_slice: int | None
    slices: tuple[int, int] | None


def measure(view: SliceView, mask: np.ndarray) -> Measures:
    """Measures of an (I, J, K) bool mask on the grid of `view.volume`, slice by slice."""
    volume = view.volume
    voxels, extent, found = 0, 0.0, list[int]()
    area, diameter = (0.0, -1), (0.0, -1)
    row_mm, column_mm = view.plane_mm
    for index in range(view.count):
        plane = view.voxels_of(mask, index)
        count = int(np.count_nonzero(plane))
        if not count:
            continue
        voxels += count
        extent += count * volume.slice_share(index)
        found.append(index)
        area = max(area, (count * row_mm * column_mm, index), key=lambda pair: pair[0])
        diameter = max(diameter, (longest_diameter(plane, (row_mm, column_mm)), index), key=lambda pair: pair[0])
    if not found or not volume.spacing_known:
        return Measures(voxels, 0.0 if not found else None, None, None, None, None, _ends(found))
    millilitres = extent * volume.voxel_ml if volume.oriented else None
    return Measures(voxels, millilitres, *area, *diameter, _ends(found))


def longest_diameter(plane: Mask, spacing_mm: tuple[float, float]) -> float:
    """The longest distance within a (H, W) mask in millimetres, from outer pixel edge to outer pixel edge; 0 if empty.

    spacing_mm: (row, column).
    """
    inner = cv2.erode(plane.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
    rows, columns = np.nonzero(plane & ~inner)
    if not rows.size:
        return 0.0
    centres = np.stack([rows, columns], axis=1).astype(np.float64)
    edges = np.concatenate([centres + shift for shift in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))]) * spacing_mm
    hull = cv2.convexHull(edges.astype(np.float32))[:, 0].astype(np.float64)
    return float(np.linalg.norm(hull[:, None] - hull[None], axis=2).max())


def write_measures(measured: Mapping[str, Measures], name: str, path: Path) -> None:
    """Write {target: Measures} of the volume called `name` as `.json` or `.csv`, as the path says."""
    rows = {target: asdict(values) for target, values in measured.items()}
    if path.suffix == ".json":
        write_json({"volume": name, "measures": rows}, path)
        return
    columns = [column for column in Measures.__dataclass_fields__ if column != "slices"]
    table: list[list[object]] = [["volume", "target", *columns, "first_slice", "last_slice"]]
    for target, values in rows.items():
        table.append([name, target, *(values[column] for column in columns), *(values["slices"] or ("", ""))])
    write_whole(csv_text(table).encode(), path)


def _ends(found: list[int]) -> tuple[int, int] | None:
    return (found[0], found[-1]) if found else None
