"""Public benchmarks: where each comes from, its licence, how to get it, its official rules; checks of local copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ibisagent.datasets import layout_of, read_cases
from ibisagent.errors import DataError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    test_split: the split that published results are about; "" where there is none with public masks. empty_iou: what
    the official score gives a case whose ground truth and mask are both empty; None where that cannot be, or is not
    said.
    rules: the rest of the official rules, and what we do otherwise.
    """

    title: str
    source: str
    licence: str
    how_to_get: str
    layout: str
    test_split: str
    empty_iou: float | None
    rules: str


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "biomedparse": Benchmark(
            "BiomedParseData (Zhao et al., Nature Methods 2025)",
            "https://huggingface.co/datasets/microsoft/BiomedParseData",
            "CC BY-NC-SA 4.0 for the release; each of its data sets keeps its own",
            "hf download microsoft/BiomedParseData --repo-type dataset, then unpack the archives",
            "<data set>/{train,test}/<name>_<modality>_<site>.png, {train,test}_mask/..._<object>.png,"
            " {train,test}.json",
            "test",
            None,
            "Images of 1024 x 1024. One case is one annotation of test.json: an image and the union of an object's"
            " instances. Dice of each case, mean and median per data set and modality. Objects that are not there are"
            " tested apart (test_absent.json), which is not read.",
        ),
        "mecovqa": Benchmark(
            "MeCoVQA-G and MeCoVQA-G+ (MedPLIB, Huang et al., AAAI 2025; G+: Citrus-V, 2025)",
            "https://github.com/ShawnHuang497/MedPLIB; https://huggingface.co/datasets/jdh-algo/MeCoVQA-G-Plus",
            "Apache-2.0 for MedPLIB's code; the images keep the terms of SA-Med2D-20M",
            "the JSON files from either address, with SA-Med2D-20M's SAMed2Dv1 folder linked beside them",
            "JSON list of {image, conversations}; the answer to segment holds <mask>masks/NAME.png</mask>",
            "test",
            0.0,
            "Mean over the cases of the IoU, and of 2 IoU / (1 + IoU), also per modality (first word of the file name)."
            " A case in which ground truth and mask are both empty counts 0. Masks in masks_merged are made by the"
            " user from"
            " the instances of SA-Med2D-20M; files that are missing are told.",
        ),
        "medsegbench": Benchmark(
            "MedSegBench (Kuş and Aydin, Scientific Data 2024)",
            "https://zenodo.org/records/13358372, https://github.com/zekikus/MedSegBench",
            "differs by data set, stated in the medsegbench package: CC0 to non-commercial",
            "pip install medsegbench and download=True, or the .npz files from Zenodo",
            "<name>_<128|256|512>.npz with {train,val,test}_images (N, H, W[, 3]) and {train,val,test}_label (N, H, W)",
            "test",
            1.0,
            "512 pixels. Binary sets: IoU and F1 of each image from its pixel counts, mean over images that are not"
            " NaN; both empty counts 1 (segmentation-models-pytorch). Images without the object are part of the"
            " official mean, but are no case here: there is nothing to segment. Names of objects are ours.",
        ),
        "msd": Benchmark(
            "Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022)",
            "http://medicaldecathlon.com",
            "CC BY-SA 4.0",
            "the ten .tar files from the site (or the AWS open data registry), unpacked",
            "TaskNN_Name/dataset.json, imagesTr/*.nii.gz, labelsTr/*.nii.gz",
            "",
            None,
            "Official: Dice and normalised surface distance of whole volumes, on hidden test labels. Here: every axial"
            " slice of a training volume that shows an object, first channel; a result on slices is none of the"
            " challenge's. Take `ibisagent segment` for volumes.",
        ),
        "coco": Benchmark(
            "any data set in COCO's instance format (Lin et al., ECCV 2014)",
            "https://cocodataset.org/#format-data",
            "that of the data set",
            "export it from CVAT, Label Studio, Roboflow, ...",
            "instances_<split>.json or _annotations.coco.json; polygons or run lengths",
            "",
            None,
            "Official: average precision of scored instances, which an agent that gives one mask per name has not."
            " Here: all instances of a category in an image are one mask; pairs with a crowd region are left out.",
        ),
        "samed2d": Benchmark(
            "SA-Med2D-20M (Ye et al., arXiv:2311.11969)",
            "https://huggingface.co/datasets/OpenGVLab/SA-Med2D-20M",
            "CC BY-NC-SA 4.0; each source keeps its own",
            "all parts of SA-Med2D-16M.zip from the hub, joined with zip -s=0 and unpacked: SAMed2Dv1",
            "SAMed2Dv1/{images,masks}, SAMed2D_v1.json, SAMed2D_v1_class_mapping_id.json",
            "",
            None,
            "Official: every instance is prompted by itself, Dice at 256 x 256. Here: the instances of a class are one"
            " mask, as MeCoVQA-G+ has them.",
        ),
    }
)
"""By the name that `layout_of` gives their files.

Addresses and licences as copies of the sources' pages stated them: they may have changed, and the terms of each
image's own source hold as well. Read them before use.
"""


@dataclass(frozen=True, slots=True)
class Copy:
    """What a local copy holds. checked: cases that were decoded. problems: a line for each that could not be."""

    path: str
    layout: str
    pairs: int
    images: int
    objects: int
    splits: Mapping[str, int]
    modalities: Mapping[str, int]
    patients: int
    checked: int
    problems: tuple[str, ...]


def check_copy(path: Path, *, limit: int | None = 50) -> Copy:
    """Read all rows under `path` and decode `limit` of its cases, evenly spread; None: all.

    DataError where there is nothing to read; what is wrong with single cases is listed.
    """
    cases = read_cases(path)
    rows = cases.rows
    source = cases.spread(limit)
    problems = []
    for row in source.rows:
        try:
            source.decode(row)
        except DataError as error:
            problems.append(str(error))
    return Copy(
        str(path),
        layout_of(path),
        len(rows),
        len({row.image for row in rows}),
        len({row.object for row in rows}),
        dict(Counter(row.split or "none" for row in rows)),
        dict(Counter(row.modality or "unknown" for row in rows).most_common()),
        len({(row.dataset, row.patient) for row in rows if row.patient}),
        len(source),
        tuple(problems),
    )
