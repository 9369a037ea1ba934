"""Image files of five writers in all their modes, read back: right values or one clear line, never a silent difference.

    python benchmarks/image_files.py [--files 3000] [--seed 0]

What is right is worked out from the array that was written, by code of its own. `tests/test_images.py` runs a few.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio.v3 as imageio
import numpy as np
import PIL.Image
import SimpleITK
import tifffile

from ibisagent.errors import DataError
from ibisagent.imaging.images import read_image, read_masks

LOSSY = 12.0  # mean difference in levels that a JPEG of these images stays below
JPEG_IOU = 0.9  # of a mask that went through JPEG
RIGHT, REFUSED = "right", "refused"


class UnwritableError(Exception):
    """The writer has no such mode."""


@dataclass
class File:
    """A file as written. shown: the values that it states, (H, W) or (H, W, C) without alpha; stored: what it is."""

    path: Path
    what: str
    shown: np.ndarray
    lossy: bool = False
    alpha: np.ndarray | None = None
    indices: np.ndarray | None = None  # of a palette


Writer = Callable[[np.random.Generator, Path, np.ndarray | None], File]
"""(draws, path without ending, a mask (H, W) bool or None for an image of any values) -> what it wrote."""


def values_of(random: np.random.Generator, dtype: str, shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """Values of a type over its range; where there is a mask, 0 and one other value."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.broadcast_to(_deep(mask, shape), shape) if mask is not None else random.random(shape) < 0.5
    if mask is not None:
        top = 1.0 if kind.kind == "f" else np.iinfo(kind).max
        level = random.choice([1, min(top, 100), top])
        return np.where(_deep(mask, shape), level, 0).astype(kind) * np.ones(shape, kind)
    if kind.kind == "f":
        made = (random.normal(0, 300, shape)).astype(kind)
        if random.random() < 0.3:
            made.flat[int(random.integers(made.size))] = np.nan
        return made
    bounds = np.iinfo(kind)
    return random.integers(bounds.min, bounds.max, shape, dtype=kind, endpoint=True)


def _deep(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    assert mask is not None  # noqa: S101
    return mask if len(shape) == 2 else mask[..., None]


def smooth(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An 8-bit image that JPEG keeps well."""
    coarse = random.integers(0, 256, (4, 4, *shape[2:])).astype(np.float32)
    return np.clip(cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_LINEAR), 0, 255).astype(np.uint8)


def with_orientation(stored: np.ndarray, number: int) -> np.ndarray:
    """What a reader shows of `stored` with that value of the tag Orientation."""
    turned = {
        1: stored,
        2: np.fliplr(stored),
        3: np.rot90(stored, 2),
        4: np.flipud(stored),
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }
    return turned[number]


def expected_image(shown: np.ndarray) -> np.ndarray | None:
    """What `read_image` is to give of stated values; None where only a refusal is right."""
    values = shown if shown.ndim == 3 else shown[..., None]
    if values.shape[2] > 3:
        return None
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8:
        real = values.astype(np.float64)
        finite = real[np.isfinite(real)]
        low, high = np.percentile(finite, (0.5, 99.5))
        if low == high:
            low, high = finite.min(), finite.max()
        real = np.where(np.isnan(real), low, real)
        values = np.rint(255 * (np.clip(real, low, high) - low) / ((high - low) or 1)).astype(np.uint8)
    if values.shape[2] == 2:
        return np.dstack([values, np.zeros_like(values[..., :1])])
    return values.repeat(3 // values.shape[2], axis=2)


# ------------------------------------------------------------------------------------------------------ the writers


def by_pillow(random: np.random.Generator, path: Path, mask: np.ndarray | None) -> File:
    """PNG, BMP, TIFF and JPEG in Pillow's modes, with orientation, compression, palettes and transparency."""
    ending = str(random.choice(["png", "bmp", "tif", "jpg"]))
    mode = str(random.choice(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]))
    size = _size(random, mask, large=ending == "jpg")
    options: dict[str, object] = {}
    alpha = indices = None
    if ending == "jpg":
        if mode not in ("L", "RGB", "CMYK"):
            raise UnwritableError
        channels = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
        stored = (
            smooth(random, (*size, *channels)) if mask is None else values_of(random, "u1", (*size, *channels), mask)
        )
        image = PIL.Image.fromarray(stored, mode if mode == "CMYK" else None)
        options = {"quality": 95, "subsampling": 0} if mode != "L" else {"quality": 95}
    elif mode == "P":
        count = 2 if mask is not None else int(random.choice([2, 4, 16, 256]))
        indices = mask.astype(np.uint8) if mask is not None else random.integers(0, count, size, dtype=np.uint8)
        colours = random.integers(0, 256, (count, 3), dtype=np.uint8)
        if mask is not None:
            colours[:] = [[0, 0, 0], random.integers(1, 256, 3)]
        image = PIL.Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        stored = colours[indices]
        if ending == "png":
            options = {"bits": {2: 1, 4: 2, 16: 4, 256: 8}[count]}
    else:
        dtype, channels = {
            "1": ("?", ()), "L": ("u1", ()), "LA": ("u1", (2,)), "RGB": ("u1", (3,)), "RGBA": ("u1", (4,)),
            "CMYK": ("u1", (4,)), "I;16": ("u2", ()), "I": ("i4", ()), "F": ("f4", ()),
        }[mode]  # fmt: skip
        stored = values_of(random, dtype, (*size, *channels), mask)
        if mode == "I" and ending == "png":
            stored = np.clip(stored, 0, 65535)  # what Pillow's PNG holds
        image = PIL.Image.fromarray(stored, "CMYK" if mode == "CMYK" else None)
        if mode in ("LA", "RGBA"):
            stored, alpha = _split_alpha(random, stored, mask)
            image = PIL.Image.fromarray(np.dstack([stored, alpha]))
            stored = stored[..., 0] if mode == "LA" else stored
    if mode == "CMYK":
        stored = np.asarray(image.convert("RGB"))
        if mask is not None:
            raise UnwritableError  # no mask is kept in printing inks
    if ending == "bmp" and alpha is not None:
        raise UnwritableError  # Pillow reads no alpha of BMP
    turn = 1
    if ending in ("tif", "jpg", "png"):
        turn = int(random.integers(1, 9))
        tags = PIL.Image.Exif()
        tags[274] = turn
        options["exif"] = tags
    if ending == "tif":
        kinds = [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"]
        options["compression"] = kinds[int(random.integers(len(kinds)))]
    file = path.with_suffix(f".{ending}")
    try:
        image.save(file, **options)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError) as error:
        raise UnwritableError from error
    what = f"{ending} {mode} {options.get('compression', '')} turn {turn}"
    turned = [None if one is None else with_orientation(one, turn) for one in (alpha, indices)]
    return File(file, what, with_orientation(stored, turn), ending == "jpg", *turned)


def by_tifffile(random: np.random.Generator, path: Path, mask: np.ndarray | None) -> File:
    """TIFF in every number type, 1 to 5 channels, both polarities, byte orders, planes, tiles and compressions."""
    dtype = str(random.choice(["?", "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"]))
    channels = int(random.choice([1, 1, 1, 2, 3, 4, 5]))
    if mask is not None and channels not in (1, 3):
        raise UnwritableError
    if dtype == "?" and channels > 1:
        raise UnwritableError
    size = _size(random, mask)
    stored = values_of(random, dtype, (*size, channels) if channels > 1 else size, mask)
    inks = "rgb" if channels in (3, 4) else str(random.choice(["minisblack", "miniswhite"]))
    planar = str(random.choice(["contig", "separate"])) if channels > 1 else None
    written = np.moveaxis(stored, 2, 0) if planar == "separate" else stored
    turn = int(random.integers(1, 9))
    options: dict[str, object] = {
        "photometric": inks,
        "byteorder": str(random.choice(["<", ">"])),
        "bigtiff": bool(random.random() < 0.2),
        "compression": str(random.choice(["none", "zlib", "lzw", "packbits", "zstd", "lzma"])),
        "extratags": [(274, "H", 1, turn, True)],
    }
    if planar is not None:
        options["planarconfig"] = planar
    if channels == 4:
        options["extrasamples"] = ["unassalpha"]
    if random.random() < 0.2 and dtype != "?":
        options["tile"] = (16, 16)
    elif random.random() < 0.5:
        options["rowsperstrip"] = int(random.integers(1, 9))
    if options["compression"] in ("zlib", "lzw", "zstd") and dtype != "?" and random.random() < 0.3:
        options["predictor"] = 3 if dtype[0] == "f" else 2
    file = path.with_suffix(".tif")
    try:
        tifffile.imwrite(file, written, **options)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UnwritableError from error
    shown = stored[..., :3] if channels == 4 else stored
    if inks == "miniswhite" and dtype != "?":  # tifffile tags all of one bit so, and means True is 1
        if dtype[0] == "u":
            shown = np.iinfo(shown.dtype).max - shown
        elif dtype[0] == "i":
            shown = -1 - shown
        else:
            shown = (np.nanmax(shown) + np.nanmin(shown)) - shown
    alpha = with_orientation(stored[..., 3], turn) if channels == 4 else None
    what = f"{dtype} x{channels} {inks} {planar} {options['compression']} turn {turn}"
    return File(file, what, with_orientation(shown, turn), alpha=alpha)


def by_opencv(random: np.random.Generator, path: Path, mask: np.ndarray | None) -> File:
    """PNG, TIFF, BMP and JPEG, 8, 16 and 32 bits, grey, colour and alpha; its TIFF is LZW unless told otherwise."""
    ending = str(random.choice(["png", "tif", "bmp", "jpg"]))
    dtype = str(random.choice(["u1", "u2", "i2", "f4"] if ending == "tif" else ["u1", "u2"]))
    channels = int(random.choice([1, 3, 4]))
    if (ending in ("bmp", "jpg") and dtype != "u1") or (ending in ("bmp", "jpg") and channels == 4):
        raise UnwritableError
    size = _size(random, mask, large=ending == "jpg")
    shape = (*size, channels) if channels > 1 else size
    stored = smooth(random, shape) if ending == "jpg" and mask is None else values_of(random, dtype, shape, mask)
    alpha = None
    if channels == 4:
        stored, alpha = _split_alpha(random, stored, mask)
    blue_first = stored if channels == 1 else np.dstack([stored[..., ::-1], *([] if alpha is None else [alpha])])
    options: list[int] = []
    if ending == "tif" and random.random() < 0.7:
        options = [cv2.IMWRITE_TIFF_COMPRESSION, int(random.choice([1, 5, 8, 32946, 32773]))]
    file = path.with_suffix(f".{ending}")
    try:
        done = cv2.imwrite(str(file), np.ascontiguousarray(blue_first), options)
    except cv2.error as error:
        raise UnwritableError from error
    if not done:
        raise UnwritableError
    return File(file, f"{ending} {dtype} x{channels} {options[1:]}", stored, ending == "jpg", alpha)


def by_imageio(random: np.random.Generator, path: Path, mask: np.ndarray | None) -> File:
    """PNG, BMP, JPEG and TIFF as imageio hands them to Pillow and tifffile."""
    ending = str(random.choice(["png", "bmp", "jpg", "tif", "tiff"]))
    dtype = str(random.choice(["u1", "u2", "?", "i2", "f4"]))
    channels = int(random.choice([1, 3, 4])) if dtype in ("u1", "u2") else 1
    if ending in ("bmp", "jpg") and (dtype != "u1" or channels == 4):
        raise UnwritableError
    if ending == "png" and dtype in ("i2", "f4"):
        raise UnwritableError
    size = _size(random, mask, large=ending == "jpg")
    shape = (*size, channels) if channels > 1 else size
    stored = smooth(random, shape) if ending == "jpg" and mask is None else values_of(random, dtype, shape, mask)
    alpha = None
    if channels == 4:
        stored, alpha = _split_alpha(random, stored, mask)
    file = path.with_suffix(f".{ending}")
    plugin = str(random.choice(["pillow", "tifffile"])) if ending.startswith("tif") else "pillow"
    try:
        imageio.imwrite(file, stored if alpha is None else np.dstack([stored, alpha]), plugin=plugin)
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
        raise UnwritableError from error
    return File(file, f"{ending} {dtype} x{channels} {plugin}", stored, ending == "jpg", alpha)


def by_simpleitk(random: np.random.Generator, path: Path, mask: np.ndarray | None) -> File:
    """PNG, TIFF, BMP and JPEG as ITK writes them."""
    ending = str(random.choice(["png", "tif", "bmp", "jpg"]))
    dtype = str(random.choice(["u1", "u2", "i2", "f4"] if ending == "tif" else ["u1", "u2"]))
    channels = int(random.choice([1, 1, 3, 4]))
    if ending in ("bmp", "jpg") and (dtype != "u1" or channels == 4):
        raise UnwritableError
    size = _size(random, mask, large=ending == "jpg")
    shape = (*size, channels) if channels > 1 else size
    stored = smooth(random, shape) if ending == "jpg" and mask is None else values_of(random, dtype, shape, mask)
    alpha = None
    if channels == 4:
        stored, alpha = _split_alpha(random, stored, mask)
    whole = stored if alpha is None else np.dstack([stored, alpha])
    file = path.with_suffix(f".{ending}")
    try:
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(whole, isVector=channels > 1), str(file), bool(random.random() < 0.5), 95
        )
    except RuntimeError as error:
        raise UnwritableError from error
    return File(file, f"{ending} {dtype} x{channels}", stored, ending == "jpg", alpha)


WRITERS: dict[str, Writer] = {
    "Pillow": by_pillow,
    "tifffile": by_tifffile,
    "OpenCV": by_opencv,
    "imageio": by_imageio,
    "SimpleITK": by_simpleitk,
}


def _size(random: np.random.Generator, mask: np.ndarray | None, large: bool = False) -> tuple[int, int]:
    if mask is not None:
        return int(mask.shape[0]), int(mask.shape[1])
    low = 48 if large else 2
    height, width = (int(side) for side in random.integers(low, low + 40, 2))
    return height, width


def _split_alpha(
    random: np.random.Generator, stored: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and alpha: any of both for an image; a mask is in one of them, and the other is one value."""
    top = np.iinfo(stored.dtype).max if stored.dtype.kind in "iu" else 1
    if mask is None:
        return stored[..., :-1], stored[..., -1]
    full = np.full(mask.shape, top, stored.dtype)
    if random.random() < 0.5:
        return stored[..., :-1], full
    return np.zeros_like(stored[..., :-1]), np.where(mask, full, 0).astype(stored.dtype)


# ------------------------------------------------------------------------------------------------------- the verdict


def blob(random: np.random.Generator) -> np.ndarray:
    """A mask (H, W) bool that neither covers nor leaves all of an image."""
    height, width = (int(side) for side in random.integers(40, 90, 2))
    mask = np.zeros((height, width), np.uint8)
    centre = int(random.integers(10, width - 10)), int(random.integers(10, height - 10))
    cv2.ellipse(mask, centre, (int(random.integers(6, 18)), int(random.integers(6, 18))), 0, 0, 360, 1, cv2.FILLED)
    return mask > 0


def judge_image(file: File) -> str:
    """RIGHT, "refused: why", or what differs."""
    try:
        found = read_image(file.path).pixels.astype(int)
    except DataError as error:
        return _refused(error, file)
    wanted = expected_image(file.shown)
    if wanted is None:
        return f"WRONG: read, although it has {file.shown.shape[2]} channels"
    if found.shape != wanted.shape:
        return f"WRONG: shape {found.shape}, not {wanted.shape}"
    off = np.abs(found - wanted)
    exact = file.shown.dtype in (np.uint8, np.bool_)  # others are windowed, and rounded to a level
    good = off.mean() <= LOSSY if file.lossy else off.max() <= (0 if exact else 1)
    return RIGHT if good else f"WRONG: up to {off.max()} levels off, {off.mean():.1f} in the mean"


def judge_mask(file: File) -> str:
    """As `judge_image`, for what the file says where: not 0, in its colours or in its alpha."""
    try:
        found = read_masks(file.path)["mask"]
    except DataError as error:
        return _refused(error, file)
    shown = file.shown if file.shown.ndim == 3 else file.shown[..., None]
    wanted = (shown != 0).any(axis=2)
    if file.alpha is not None and file.alpha.min() != file.alpha.max():
        wanted = file.alpha != 0
    if found.shape != wanted.shape:
        return f"WRONG: shape {found.shape}, not {wanted.shape}"
    both, either = int((found & wanted).sum()), int((found | wanted).sum())
    reached = both / either if either else 1.0
    return RIGHT if reached == 1 or (file.lossy and reached >= JPEG_IOU) else f"WRONG: IoU {reached:.3f}"


def judge_labels(file: File) -> str:
    """As `judge_image`, for the label map in a palette image or in whole numbers of one channel."""
    values = file.indices if file.indices is not None else file.shown
    labels = [int(value) for value in np.unique(values) if 0 < abs(int(value)) < 10**9][:5]
    if not labels:
        return RIGHT
    try:
        found = read_masks(file.path, {label: str(label) for label in labels})
    except DataError as error:
        return _refused(error, file)
    wrong = [label for label in labels if not np.array_equal(found[str(label)], values == label)]
    return f"WRONG: labels {wrong}" if wrong else RIGHT


def _refused(error: DataError, file: File) -> str:
    said = str(error)
    if "\n" in said or str(file.path) not in said:
        return f"WRONG: not one line that names the file: {said!r}"
    return f"{REFUSED}: {said.replace(str(file.path), '').strip(': ').split('(')[0].strip()}"


def _quietly(judge: Callable[[File], str], file: File) -> str:
    """What `judge` says; a warning of a library that reaches the user is wrong as well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdict = judge(file)
    return f"WRONG: warns: {caught[0].message}" if caught else verdict


def fuzz(files: int, seed: int, folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """(writer, "image", "mask" or "labels", what was written, verdict) of so many files, writers by turns."""
    number = made = 0
    while made < files:
        name = list(WRITERS)[number % len(WRITERS)]
        random = np.random.default_rng([seed, number])
        number += 1
        as_mask = bool(random.random() < 0.4)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the writers
                file = WRITERS[name](random, folder / f"{number}", blob(random) if as_mask else None)
        except UnwritableError:
            continue
        made += 1
        if as_mask:
            yield name, "mask", file.what, _quietly(judge_mask, file)
        else:
            yield name, "image", file.what, _quietly(judge_image, file)
            flat = file.indices is not None or (file.shown.ndim == 2 and file.shown.dtype.kind in "iu")
            if flat and not file.lossy and file.alpha is None:
                yield name, "labels", file.what, _quietly(judge_labels, file)
        file.path.unlink()


def main() -> None:
    """Print a table, why files were refused, and every difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter[str] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for writer, kind, what, verdict in fuzz(chosen.files, chosen.seed, Path(folder)):
            word = verdict.partition(":")[0]
            counts[writer, kind][word] += 1
            if word == REFUSED:
                reasons[verdict.removeprefix(f"{REFUSED}: ")] += 1
            elif word != RIGHT:
                wrong.append(f"{writer}, {kind}, {what}: {verdict}")
    print("| writer | read as | files | right values | refused in one line | different |\n|---|---|---|---|---|---|")
    for (writer, kind), found in sorted(counts.items()):
        print(f"| {writer} | {kind} | {found.total()} | {found[RIGHT]} | {found[REFUSED]} | {found['WRONG']} |")
    for reason, count in reasons.most_common():
        print(f"refused {count}: {reason}")
    print("\n".join(wrong) or "no difference")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
