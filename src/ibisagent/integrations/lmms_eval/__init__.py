"""The agent in lmms-eval: a task that any model can be asked, and our agent as one of its models.

    python -m ibisagent.integrations.lmms_eval DATA -o FOLDER --split val
    python -m lmms_eval --model ibisagent --model_args policy=ibis-nano,segmenter=ibis-click \
        --tasks ibis_segmentation --include_path FOLDER --batch_size 16

The first line writes the task: `ibis_segmentation.yaml` and `cases.jsonl`. An answer is JSON with one COCO run-length
mask, {"size": [H, W], "counts": "..."}, on the image's grid; our agent writes that, and so can any other model or
wrapper. An answer that is none counts as an empty mask, and in `readable`. No model is shown the ground truth.

lmms-eval (0.7) finds our model by the entry point "lmms_eval.models" of this package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ibisagent.datasets import CaseSource
from ibisagent.domain import Mask, union
from ibisagent.errors import DataError
from ibisagent.files import write_whole
from ibisagent.imaging.images import write_png
from ibisagent.imaging.masks import decode_rle, dice, encode_rle, iou

TASK = "ibis_segmentation"
_ASK = 'Answer with one JSON object, the mask as COCO run lengths: {{"size": [{height}, {width}], "counts": "..."}}'
_YAML = """\
# Written by python -m ibisagent.integrations.lmms_eval. Scores are means over the cases.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function ibisagent.integrations.lmms_eval.doc_to_visual
doc_to_text: !function ibisagent.integrations.lmms_eval.doc_to_text
doc_to_target: target
process_results: !function ibisagent.integrations.lmms_eval.process_results
generation_kwargs:
  max_new_tokens: 4096
  do_sample: false
metric_list:
{metrics}
metadata:
  - version: 1.0
"""
_METRIC = """\
  - metric: {name}
    aggregation: !function ibisagent.integrations.lmms_eval.mean
    higher_is_better: true
"""
METRICS = ("iou", "dice", "readable")


def write_task(cases: CaseSource, folder: Path) -> Path:
    """Write the task of all `cases` with a mask into `folder`, which exists; the YAML's path.

    Images inside containers are written beside it as PNG. DataError for a case that cannot be read.
    """
    lines = []
    for number, (row, case) in enumerate(zip(cases.rows, cases, strict=True)):
        if not case.targets:
            continue
        image = row.image
        if not image.is_file():
            image = folder / f"image-{number}.png"
            write_png(case.image.pixels, image)
        ground_truth = union(case.targets, list(case.targets), case.image.size)
        doc = {
            "id": row.id,
            "image": str(image.resolve()),
            "query": row.query,
            "object": row.object,
            "modality": row.modality,
            "target": json.dumps(encode_rle(ground_truth)),
        }
        lines.append(json.dumps(doc))
    if not lines:
        raise DataError(f"{cases.where}: no case has a mask to score by")
    data = folder / "cases.jsonl"
    write_whole(("\n".join(lines) + "\n").encode(), data)
    metrics = "".join(_METRIC.format(name=name) for name in METRICS).rstrip()
    page = folder / f"{TASK}.yaml"
    write_whole(_YAML.format(task=TASK, data=json.dumps(str(data.resolve())), metrics=metrics).encode(), page)
    return page


def doc_to_visual(doc: Mapping[str, Any]) -> list[PIL.Image.Image]:
    """The image, as the agent reads it."""
    from ibisagent.imaging.images import read_image

    return [PIL.Image.fromarray(read_image(doc["image"]).pixels)]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question, and how to answer it."""
    height, width = json.loads(doc["target"])["size"]
    return f"{doc['query']}\n{_ASK.format(height=height, width=width)}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """IoU and Dice of the answer with the ground truth, and whether it could be read (1 or 0)."""
    ground_truth = decode_rle(json.loads(doc["target"]))
    mask = read_answer(results[0], (int(ground_truth.shape[0]), int(ground_truth.shape[1])))
    found = np.zeros_like(ground_truth) if mask is None else mask
    return {"iou": iou(found, ground_truth), "dice": dice(found, ground_truth), "readable": float(mask is not None)}


def read_answer(text: str, size: tuple[int, int]) -> Mask | None:
    """The mask (H, W) of `size` in an answer; None if there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        mask = decode_rle(json.loads(text[start : end + 1]))
    except (ValueError, RecursionError):  # DataError is a ValueError
        return None
    return mask if mask.shape == size else None


def mean(values: Sequence[float]) -> float:
    """How a metric is put together."""
    return math.fsum(values) / len(values)


def model_manifest() -> Any:
    """What lmms-eval's entry point asks for: where our model is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="ibisagent", simple_class_path="ibisagent.integrations.lmms_eval.model.IbisAgent")
