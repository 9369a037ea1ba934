"""What the package leaves on a disk and says: whole files, folders of one run, safe names, PNG, text in one line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibisagent.errors import ConfigError, DataError, IbisError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

MAX_NAME_BYTES = 80
"""Longest part of a file name that is taken from an image's or an object's name; file systems allow 255 in all."""


@contextmanager
def appearing_whole(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """A temporary name beside `path` to write a file under; it is renamed when the block ends.

    So readers see the old file or the whole new one. suffix: of the temporary name, for writers that go by it.

    Raises DataError when the folder does not exist or cannot be written, or the disk is full; nothing is left behind,
    whatever the block raises.
    """
    part = path.parent / f".{uuid.uuid4().hex}{suffix}"
    try:
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


@contextmanager
def unfinished_folder(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `folder` to prepare the files of the result `name` in; it is gone when the block ends.

    What a run of the same result left there when it was killed goes first. OSError where it cannot be made.
    """
    part = folder / f".ibisagent-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write a file as `appearing_whole` says, and raise as it does."""
    with appearing_whole(Path(path)) as part, part.open("xb") as file:
        file.write(content)


def write_json(value: object, path: Path, *, sort_keys: bool = False) -> None:
    """Write a value as JSON that people can read, as `write_whole`."""
    write_whole((json.dumps(value, indent=1, sort_keys=sort_keys) + "\n").encode(), path)


@contextmanager
def reading(where: object, remedy: str, kind: type[IbisError] = DataError) -> Iterator[None]:
    """Raise what goes wrong while the block reads a file, and takes values out of it, as one error of `kind`.

    where: the file. remedy: what to do about it, such as "copy it again". Errors of this package pass as they are.
    """
    try:
        yield
    except IbisError:
        raise
    except OSError as error:
        raise kind(f"{where}: cannot be read ({error.strerror or one_line(error)}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error, 300)
        raise kind(f"{where}: is damaged, or something else ({reason}); {remedy}") from error


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it where they are not there yet; DataError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be used as a folder ({error.strerror}); choose another one") from error


def try_folder(folder: Path) -> None:
    """Make `folder` and see that files can be written into it, before the work whose results go there.

    DataError as `make_folder` and `write_whole` raise it.
    """
    make_folder(folder)
    _try(folder)


def try_file(path: Path) -> None:
    """See that a file can be written at `path`, before the work whose result it is. DataError as `write_whole`."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file")
    _try(path.parent)


def _try(folder: Path) -> None:
    probe = folder / f".{uuid.uuid4().hex}.probe"
    write_whole(b"", probe)
    probe.unlink()


def claim(
    path: Path,
    facts: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    notes: Mapping[str, Any] | None = None,
    leftovers: Iterable[Path] = (),
    write: bool = True,
) -> None:
    """Claim the folder of `path` for one run: write its `facts` to this JSON file, or check that it holds the same.

    free: names that may differ between two starts of a run, wherever they stand in the facts. notes: what is written
    beside the facts and never compared. leftovers: what only a run leaves; where one is there and `path` is not, the
    folder is another's. write: False only checks. ConfigError where the folder holds another run, DataError where the
    file is damaged or cannot be written.
    """
    content = (json.dumps({**facts, **(notes or {})}, indent=1, sort_keys=True) + "\n").encode()
    if path.exists():
        try:
            before = path.read_bytes()
            earlier = json.loads(before)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: is damaged ({one_line(error)}); choose another folder, or delete it") from error
        if not isinstance(earlier, dict):
            raise DataError(f"{path}: is damaged; choose another folder, or delete it")
        same_run({name: value for name, value in earlier.items() if name not in (notes or {})}, facts, path, free=free)
        write = write and content != before
    elif left := next((one for one in leftovers if one.exists()), None):
        raise ConfigError(f"{path.parent}: holds {left.name}, but no {path.name}; choose another folder")
    if write:
        make_folder(path.parent)
        write_whole(content, path)


def same_run(earlier: Mapping[str, Any], now: Mapping[str, Any], where: object, *, free: Collection[str] = ()) -> None:
    """ConfigError naming the first fact in which the run that `where` holds differs from the one `now`.

    free: names that may differ. Facts are plain values, lists and objects, as in JSON.
    """
    plain = json.loads(json.dumps(dict(now)))
    for name, old, new in _differences(dict(earlier), plain, free):
        raise ConfigError(
            f"{where}: is of another run ({name} was {one_line(old, 80)}, now it is {one_line(new, 80)});"
            " choose another folder or the old value"
        )


class FileHashes:
    """SHA-256 of files, kept in a JSON file, so that those whose size and times did not change are not read again.

    The times are those of the content and of the inode: a copy that keeps the first changes the second.
    """

    def __init__(self, path: Path) -> None:
        """path: where they are kept, and where `write` puts them. DataError if what is there is damaged."""
        self._path = path
        self._earlier: dict[str, list[Any]] = {}
        self._now: dict[str, list[Any]] = {}
        try:
            self._earlier = {name: list(known) for name, known in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({one_line(error)}); delete it") from error

    def of(self, file: Path) -> str:
        """Hash of what `file` holds; "" where it cannot be read. Each file is looked at once by an object."""
        name = str(file)
        if name not in self._now:
            try:
                found = file.stat()
                state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
                known = self._earlier.get(name, [])
                if known[:-1] != state:
                    with file.open("rb") as content:
                        known = [*state, hashlib.file_digest(content, "sha256").hexdigest()]
            except OSError:
                known = [""]
            self._now[name] = known
        return str(self._now[name][-1])

    def write(self) -> None:
        """Keep the hashes of the files that were asked for. DataError as `write_whole`."""
        write_whole((json.dumps(self._now, indent=0, sort_keys=True) + "\n").encode(), self._path)


def weights_sha256(folder: Path) -> str:
    """Hash of the safetensors in `folder`: of the file itself where it is one, else of their "hash  name" lines."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in hashes.items()).encode()).hexdigest()


def _differences(old: Any, new: Any, free: Collection[str], name: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}.difference(free)):
            yield from _differences(old.get(key), new.get(key), free, key)
    elif old != new:
        yield name, old, new


def safe_name(name: str, taken: set[str]) -> str:
    """`name` made fit to be a part of a file name, numbered if `taken` holds it already; it is added to `taken`.

    Names that differ only in case count as equal, since many file systems cannot keep both.
    """
    plain = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "image"
    plain = plain.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    number, chosen = 1, plain
    while chosen.casefold() in taken:
        number += 1
        chosen = f"{plain}-{number}"
    taken.add(chosen.casefold())
    return chosen


def file_names(paths: Iterable[str | Path]) -> list[str]:
    """One distinct safe name per path to begin its output files with: its stem, numbered where a batch has it twice."""
    taken: set[str] = set()
    return [safe_name(Path(path).stem, taken) for path in paths]


def png_bytes(image: PIL.Image.Image | np.ndarray) -> bytes:
    """An image as a PNG file, compressed for speed.

    image: a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) uint8, RGB or RGBA, or a mask (H, W) bool, which
    becomes 0 and 255.
    """
    import cv2  # here, as every command imports this module, and most of the time of `ibisagent --help` went there
    import numpy as np
    import PIL.Image

    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    if image.ndim == 3:  # OpenCV's order is BGR and BGRA
        image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    done, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise DataError(f"an image {image.shape} {image.dtype} cannot be written as PNG")
    return bytes(encoded.tobytes())


def one_line(text: object, length: int = 120) -> str:
    """Text of a model, a user or a library in one printable line of at most `length` characters.

    It must not steer a terminal, nor flood a message. An error without a text is called by its kind.
    """
    start = str(text)[: 4 * length]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in start).split())
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    return line if len(line) <= length else f"{line[: length - 1]}…"


def html_page(template: str, **values: object) -> bytes:
    """A Jinja template of this package, such as "evaluation/report.html", filled with `values`; text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = files("ibisagent").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values).encode()


# Spreadsheets run a cell that starts with "=", "+", "-" or "@" as a formula, and names of files, objects and cases come
# from outside. Such a cell gets an apostrophe in front, as OWASP advises; numbers stay as they are.
_FORMULA = re.compile(r"'*(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")  # the last four: the same, full width
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+|inf|nan)(e[+-]?\d+)?\s*%?", re.IGNORECASE | re.ASCII)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows, the heading first, as CSV with "\\n" between them. Text that would run as a formula is defused."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        writer = csv.writer(line, lineterminator="\r\n")  # quotes both, so no "\r" is bare
        writer.writerow([_cell(value) for value in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def plain_cell(text: str) -> str:
    """The text that `csv_text` wrote as this cell; cells of other programs stay as they are."""
    return text[1:] if text.startswith("'") and _runs(text[1:]) else text


def markdown_cell(text: str) -> str:
    """Text from outside in one line of Markdown: no new cell, no markup."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;").replace("[", "\\[")


def _cell(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if _runs(text) else text


def _runs(text: str) -> bool:
    return _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None
