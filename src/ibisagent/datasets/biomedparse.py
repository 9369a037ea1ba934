"""BiomedParseData: folders `{split}` and `{split}_mask`, names that tell everything, and perhaps `{split}.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ibisagent.datasets.members import read_json
from ibisagent.datasets.rows import CaseRow, refuse_duplicates
from ibisagent.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})


def splits(folder: Path) -> list[str]:
    """Names of the splits in one BiomedParseData data set: folders that have a twin named `..._mask`."""
    names = {child.name for child in folder.iterdir() if child.is_dir()}
    return sorted(name for name in names if f"{name}_mask" in names)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def read_data_set(folder: Path, name: str = "") -> list[CaseRow]:
    """The pairs of one BiomedParseData data set, called `name` (default: as its folder).

    Where a split has the release's `{split}.json`, the pairs are those that it lists, as in the official evaluation;
    else those that the names tell. Images without any mask are no pairs and are left out.
    """
    name = name or folder.resolve().name
    rows = []
    for split in splits(folder):
        listed = folder / f"{split}.json"
        pairs = _listed(folder, split, listed) if listed.is_file() else _named(folder, split)
        for image, mask, thing in pairs:
            modality, site = _facts(image.stem)
            rows.append(
                CaseRow(
                    f"{name}/{split}/{image.name}#{thing}",
                    image,
                    mask,
                    thing,
                    f"Segment the {thing}.",
                    modality=modality,
                    site=site,
                    dataset=name,
                    split=split,
                    where=str(mask),
                )
            )
    rows.sort(key=lambda row: (row.split, row.image.name, row.object))
    refuse_duplicates(rows)
    return rows


def _facts(stem: str) -> tuple[str, str]:
    """(modality, site), the last two parts of a name of at least three."""
    parts = [part.replace("+", " ") for part in stem.split("_")]
    return (parts[-2], parts[-1]) if len(parts) >= 3 else ("", "")


def _named(folder: Path, split: str) -> Iterator[tuple[Path, Path, str]]:
    """(image, mask, object) as the file names tell."""
    images: dict[str, Path] = {}
    for image in _images(folder / split):
        if image.stem in images:
            raise DataError(f"{image}: shares its name with {images[image.stem].name}; rename one of the two")
        images[image.stem] = image
    for mask in _images(folder / f"{split}_mask"):
        stem = mask.stem
        while stem not in images and "_" in stem:
            stem = stem.rpartition("_")[0]
        thing = mask.stem[len(stem) + 1 :].replace("+", " ").strip()
        if stem not in images or not thing:
            raise DataError(f"{mask}: no image in {folder / split} is called '<image name>_<object>'; rename it")
        yield images[stem], mask, thing


def _listed(folder: Path, split: str, listed: Path) -> Iterator[tuple[Path, Path, str]]:
    """(image, mask, object) as the release's JSON lists them: one annotation, one pair."""
    try:
        for annotation in read_json(listed)["annotations"]:
            image, mask = folder / split / annotation["file_name"], folder / f"{split}_mask" / annotation["mask_file"]
            thing = mask.stem.rpartition("_")[2].replace("+", " ").strip()
            for kind, file in (("image", image), ("mask", mask)):
                if not file.is_file():
                    raise DataError(f"{listed}: {kind} '{file.name}' is not in {file.parent}; download it again")
            yield image, mask, thing
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{listed}: does not list BiomedParse annotations ({error!r}); remove or repair it") from error
