"""The agent on volumes: an expert on every tenth slice against an expert on every slice, cost, and memory.

    python benchmarks/volume.py [--segmenter ibis-click] [--only NAME ...] [--step 10] [--sample 1] [--json FILE]
    python benchmarks/volume.py --large      # peak memory of a volume of 512 x 512 x 400 voxels, from file to file

Volumes: nilearn's packaged MNI T1 template with its white-matter mask (`pip install nilearn`; the mask is its
probability above one half), and three simulated in code. `--sample N` judges both on every N-th slice, and asks the
expert about those only. The policy is the oracle, the segmenter is what is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import nibabel as nib
import numpy as np

from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.inference.volume import SliceCases, run_volume, slice_id
from ibisagent.inference.volume_files import VolumeWriter
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.volumes import SliceView, Volume, read_volume

GOAL, WHERE = 0.85, 0.88
"""Dice that every tenth slice should reach where every slice reaches the second."""

MEMORY_GOAL_GB = 4.0
TARGET = "object"


def white_matter() -> tuple[Volume, np.ndarray]:
    """The MNI152 2009a T1 template and its white matter, from nilearn's wheel."""
    import nilearn

    folder = Path(nilearn.__file__).parent / "datasets" / "data"
    probability = read_volume(folder / "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")
    share = probability.values(np.asarray(probability.voxels))
    return read_volume(folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"), share > share.max() / 2


def organ() -> tuple[Volume, np.ndarray]:
    """Two joined lobes, 160 x 140 x 60 voxels of 1 x 1 x 3 mm."""
    return _scan((160, 140, 60), (1.0, 1.0, 3.0), 0, lambda x, y, z: (
        ((x - 64) / 40) ** 2 + ((y - 70) / 32) ** 2 + ((z - 90) / 55) ** 2 <= 1
    ) | (((x - 104) / 28) ** 2 + ((y - 56) / 20) ** 2 + ((z - 76) / 30) ** 2 <= 1))  # fmt: skip


def vessel() -> tuple[Volume, np.ndarray]:
    """A bent tube of changing width, 150 x 170 x 70 voxels of 0.8 x 0.8 x 2 mm; it moves by its width in ten slices."""

    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        angle = (z - 70) / 45
        across = (x - 48 - 25 * np.cos(angle)) / (14 + 3 * np.sin(z / 9))
        along = (y - 68 - 30 * np.sin(angle)) / (11 + 2 * np.cos(z / 7))
        return (across**2 + along**2 <= 1) & (np.abs(z - 70) < 52)

    return _scan((150, 170, 70), (0.8, 0.8, 2.0), 1, inside)


def lesion() -> tuple[Volume, np.ndarray]:
    """A lump with bulges, 120 x 150 x 80 voxels of 1.2 x 1.2 x 1.5 mm."""

    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        angle = np.arctan2(y - 95, x - 80)
        radius = 24 + 4 * np.sin(3 * angle + z / 12)
        return (x - 80) ** 2 + (y - 95) ** 2 + ((z - 62) * 0.7) ** 2 <= radius**2

    return _scan((120, 150, 80), (1.2, 1.2, 1.5), 2, inside)


VOLUMES: dict[str, Callable[[], tuple[Volume, np.ndarray]]] = {
    "white matter (MNI T1)": white_matter,
    "simulated organ": organ,
    "simulated vessel": vessel,
    "simulated lesion": lesion,
}


def _scan(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    seed: int,
    inside: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Volume, np.ndarray]:
    """A body with other structures of like brightness, texture and noise, in Hounsfield-like numbers, and the ground
    truth."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(side) * mm for side, mm in zip(shape, spacing, strict=True)), indexing="ij")
    extent = [side * mm for side, mm in zip(shape, spacing, strict=True)]
    body = ((x / extent[0] - 0.5) / 0.47) ** 2 + ((y / extent[1] - 0.5) / 0.47) ** 2 <= 1
    values = np.where(body, 30.0, -900.0)
    for _ in range(6):
        middle = [random.uniform(0.2, 0.8) * side for side in extent]
        distance = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 + ((z - middle[2]) / 1.5) ** 2
        values[(distance <= random.uniform(8, 18) ** 2) & body] = random.uniform(-60, 70)
    ground_truth = inside(x, y, z)
    values[ground_truth] = 120
    texture = cv2.GaussianBlur(random.normal(0, 25, (shape[0], shape[1] * shape[2])), (0, 0), 1).reshape(shape)
    noisy = values + texture + random.normal(0, 12, shape)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    return Volume(np.rint(noisy).astype(np.int16), affine, f"simulated-{seed}"), ground_truth


def measure(name: str, segmenter: Segmenter, step: int, sample: int, clicks: int) -> dict[str, Any]:
    """Dice over the volume of both ways, and what they cost."""
    volume, ground_truth = VOLUMES[name]()
    view = SliceView(volume, "axial")
    policy = OraclePolicy(SliceCases(view, TARGET, {TARGET: ground_truth}), max_clicks=clicks)
    judged = range(0, view.count, sample)
    started = time.perf_counter()
    overlap = size = turns = 0
    for index in judged:
        case = SliceCases(view, TARGET, {TARGET: ground_truth})[slice_id(view, index)]
        wanted = case.targets[TARGET]  # type: ignore[index]
        env = SegmentationEnv(case, segmenter, dialect=policy.dialect, max_turns=clicks + 1)
        [episode] = rollout(policy, [env])
        mask = episode.masks.get(TARGET, np.zeros_like(wanted))
        overlap, size = overlap + int((mask & wanted).sum()), size + int(mask.sum()) + int(wanted.sum())
        turns += len(episode.turns)
    every = 2 * overlap / size
    seconds_every = time.perf_counter() - started
    started = time.perf_counter()
    found = run_volume(
        view,
        TARGET,
        policy,
        segmenter,
        keys=range(0, view.count, step),
        recheck=0,
        max_turns=clicks + 1,
        mask_selection="last",
    )
    seconds = time.perf_counter() - started
    mask = found.masks.get(TARGET, np.zeros(volume.shape, bool))
    pairs = [(view.voxels_of(mask, index), view.voxels_of(ground_truth, index)) for index in judged]
    overlap = sum(int((one & other).sum()) for one, other in pairs)
    size = sum(int(one.sum()) + int(other.sum()) for one, other in pairs)
    return {
        "slices": view.count,
        "dice_every_slice": every,
        f"dice_every_{step}th": 2 * overlap / size,
        "dice_carried_slices": _dice_between(view, mask, ground_truth, step),
        "turns_every_slice": turns * view.count / len(judged),
        "policy_calls": found.cost.policy_calls,
        "encoder_calls": found.cost.encoder_calls,
        "predictions": found.cost.predictions,
        "seconds_every_slice": seconds_every * view.count / len(judged),
        "seconds": seconds,
        "met": 2 * overlap / size >= GOAL if every >= WHERE else None,
    }


def _dice_between(view: SliceView, mask: np.ndarray, ground_truth: np.ndarray, step: int) -> float:
    pairs = [
        (view.voxels_of(mask, index), view.voxels_of(ground_truth, index))
        for index in range(view.count)
        if index % step
    ]
    size = sum(int(one.sum()) + int(other.sum()) for one, other in pairs)
    return 2 * sum(int((one & other).sum()) for one, other in pairs) / size if size else 1.0


def large(segmenter: Segmenter, clicks: int) -> dict[str, Any]:
    """Peak memory of this process for 512 x 512 x 400 voxels: NIfTI in, eight key slices, NIfTI and record out."""
    shape = (512, 512, 400)
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "large.nii"
        image = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.diag([-0.7, -0.7, 1.0, 1.0]))
        image.header.set_data_shape(shape)
        random = np.random.default_rng(0)
        ground_truth = np.zeros(shape, bool, order="F")
        rows, columns = np.ogrid[:512, :512]
        with scan.open("wb") as file:
            image.header.write_to(file)
            file.write(b"\0" * 4)
            for k in range(shape[2]):
                radius = 120 * max(0.0, 1 - ((k - 200) / 150) ** 2) ** 0.5
                ground_truth[:, :, k] = (
                    (rows - 230) ** 2 + ((columns - 260) * 1.4) ** 2 <= radius**2 if radius else False
                )
                plane = np.where(ground_truth[:, :, k], 120, 20) + random.normal(0, 20, shape[:2])
                file.write(plane.astype(np.int16).tobytes(order="F"))
        volume = read_volume(scan)
        view = SliceView(volume)
        policy = OraclePolicy(SliceCases(view, TARGET, {TARGET: ground_truth}), max_clicks=clicks)
        started = time.perf_counter()
        with VolumeWriter(Path(folder) / "out", volume.name, ("nifti", "rle")) as files:
            found = run_volume(
                view,
                TARGET,
                policy,
                segmenter,
                keys=range(25, 400, 50),
                recheck=0,
                max_turns=clicks + 1,
                mask_selection="last",
                on_episode=files.episode,
            )
            files.finish(found, view, TARGET, {})
        mask = found.masks[TARGET]
        return {
            "voxels": " x ".join(map(str, shape)),
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "ground_truth_of_the_oracle_gb": ground_truth.nbytes / 2**30,
            "dice": 2 * int((mask & ground_truth).sum()) / (int(mask.sum()) + int(ground_truth.sum())),
            "encoder_calls": found.cost.encoder_calls,
            "policy_calls": found.cost.policy_calls,
            "seconds": time.perf_counter() - started,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--only", nargs="*", help="names of volumes, or beginnings of them")
    parser.add_argument("--step", type=int, default=10)
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--clicks", type=int, default=10, help="most clicks of the expert on a slice")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    segmenter = load_segmenter(options.segmenter)
    results: dict[str, Any] = {"segmenter": {**segmenter.describe()}, "clicks": options.clicks}
    if options.large:
        results["large"] = large(segmenter, options.clicks)
        memory = results["large"]["peak_memory_gb"]
        results["large"]["met"] = memory <= MEMORY_GOAL_GB
    else:
        for name in VOLUMES:
            if not options.only or name.startswith(tuple(options.only)):
                results[name] = measure(name, segmenter, options.step, options.sample, options.clicks)
                print(name, json.dumps(results[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
