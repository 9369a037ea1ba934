"""What the clients of MONAI Label ask in `params` of /infer: a request, or clicks, in the forms they have.

3D Slicer and OHIF send points as "foreground" and "background" to a model of the type "deepgrow", and under the names
of labels to one of the type "deepedit"; both are read, whatever the model says it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ibisagent.domain import MAX_NAME_CHARS, MAX_QUERY_CHARS, MAX_TARGETS
from ibisagent.errors import ConfigError
from ibisagent.query import target_of
from ibisagent.server.service import VoxelClick

MAX_POINTS = 64
BACKGROUND = "background"
Point = Annotated[list[int], Field(min_length=2, max_length=3)]
Points = Annotated[list[Point], Field(max_length=MAX_POINTS)]
Read = TypeVar("Read")
_POINTS = TypeAdapter(Points)


class InferParameters(BaseModel):
    """What of a request's parameters is read; clients send others as well, see `clicks`.

    slice: the only slice that counts (a client that works in two dimensions). extent: what a click is carried through.
    """

    model_config = ConfigDict(extra="allow")

    query: Annotated[str, Field(max_length=MAX_QUERY_CHARS)] = ""
    label: Annotated[str, Field(max_length=MAX_NAME_CHARS)] = ""
    foreground: Points = []
    background: Points = []
    slice: int | None = None
    extent: Literal["volume", "slice"] = "volume"
    roi: list[float] = []
    result_extension: Literal[".nrrd", ".nii.gz", ".nii"] = ".nii.gz"
    result_dtype: Literal["uint8", "uint16", "int16", "uint32", "int32"] = "uint8"
    result_compress: bool = True

    @property
    def carried(self) -> bool:
        """Whether clicks count beyond the slices that they are on."""
        return self.slice is None and self.extent == "volume"

    def clicks(self, labels: Sequence[str]) -> list[VoxelClick]:
        """The clicks, each once, on the voxels [i, j, k] of a volume or the pixels [x, y, 0] of an image.

        labels: of the model; the first is meant where nothing else names an object. Raises ConfigError for what cannot
        be clicked on, so that no click is dropped without a word.
        """
        if self.roi:
            raise ConfigError("a region of interest (roi) is not read here: remove it, and click")
        named = {name: _checked(value, name) for name, value in (self.model_extra or {}).items() if _are_points(value)}
        default = _name(self.label or (target_of(self.query) if self.query.strip() else labels[0]))
        positive = [(default, point) for point in self.foreground]
        positive += [(_name(name), point) for name, points in named.items() for point in points]
        clicked = list(dict.fromkeys(name for name, _ in positive))
        against = [default] if self.label.strip() or not clicked else clicked
        negative = [(name, point) for name in against for point in self.background]
        if len({*clicked, *against}) > MAX_TARGETS:
            raise ConfigError(f"points for {len(clicked)} labels: click on {MAX_TARGETS} at most at a time")
        found = [
            VoxelClick((point[0], point[1], point[2] if len(point) > 2 else 0), sign, name)
            for sign, pairs in ((True, positive), (False, negative))
            for name, point in pairs
            if self.slice is None or len(point) < 3 or point[2] == self.slice
        ]
        if (positive or negative) and not found:
            raise ConfigError(f"no point lies on slice {self.slice}: click on it, or leave out 'slice'")
        return list(dict.fromkeys(found))

    @property
    def has_flat_points(self) -> bool:
        """Whether a point has two numbers, as on an image."""
        lists = [self.foreground, self.background, *filter(_are_points, (self.model_extra or {}).values())]
        return any(len(point) == 2 for points in lists for point in points)


def read_parameters(text: str) -> InferParameters:
    """What a client sent as `params`. ConfigError where it cannot be read."""
    return _or_refused(lambda: InferParameters.model_validate_json(text or "{}"), "params")


def read_info(text: str) -> dict[str, Any]:
    """A JSON object that a client sent along. ConfigError for anything else."""
    return _or_refused(lambda: TypeAdapter(dict[str, Any]).validate_json(text or "{}"), "params")


def _are_points(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, list) for one in value)


def _checked(value: object, name: str) -> list[list[int]]:
    return _or_refused(lambda: _POINTS.validate_python(value), f"params {name[:40]}")


def _name(text: str) -> str:
    name = " ".join(text.split())
    if not name or not name.isprintable() or len(name) > MAX_NAME_CHARS:
        raise ConfigError(f"a label needs a name in one line of at most {MAX_NAME_CHARS} characters")
    return name


def _or_refused(read: Callable[[], Read], where: str) -> Read:
    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        raise ConfigError(f"{where}{' ' if place else ''}{place}: {first['msg']}") from error
