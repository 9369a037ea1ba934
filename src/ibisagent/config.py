"""Settings from a TOML file, checked: what every long run of this package is started with. Knows no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from ibisagent.errors import ConfigError

Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda one: [one] if isinstance(one, str | Path) else one)]
"""A setting that takes one path or more."""


class Recipe(BaseModel):
    """Settings of a run, as read from a TOML file; unknown names and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path, changes: Iterable[str] = ()) -> Self:
        """The recipe in `path`, with settings replaced by `changes`: "NAME=VALUE", or "TABLE.NAME=VALUE" in a table.

        A value is read as TOML, or else taken as it stands. ConfigError says what is wrong, and where.
        """
        settings = _load(path)
        for change in changes:
            _change(settings, change)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise first_fault(error, str(path)) from error

    @classmethod
    def read_one(cls, path: Path, name: str) -> Any:
        """The setting `name` of the recipe in `path`, its default where it is left out.

        Settings that a run needs may be left out here; whatever is there is checked, as by `read`.
        """
        settings = _load(path)
        try:
            return getattr(cls.model_validate(settings), name)
        except ValidationError as error:
            if any(fault["type"] != "missing" or len(fault["loc"]) > 1 for fault in error.errors()):
                raise first_fault(error, str(path)) from error
        field = cls.model_fields[name]
        if name not in settings:
            return field.get_default(call_default_factory=True)
        annotation: Any = field.annotation
        return TypeAdapter(annotation).validate_python(settings[name])


class NetworkRecipe(Recipe):
    """Settings that the training runs of all small networks share (`training.loop`); each has defaults of its own."""

    batch_size: PositiveInt
    learning_rate: PositiveFloat
    """The peak, after the warm-up; it falls along a cosine from there."""
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: PositiveInt
    eval_every: PositiveInt
    """Examples between two validations on the patients held out for choosing settings (one in sixteen)."""


def first_fault(error: ValidationError, where: str) -> ConfigError:
    """What is wrong first in settings from `where`, those that are missing last, in one line."""
    fault = min(error.errors(), key=lambda fault: bool(fault["type"] == "missing"))
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return ConfigError(f"{where}: {place}: there is no such setting; see recipes/ for examples")
    return ConfigError(f"{where}: {place}: {fault['msg']} (given: {fault.get('input')!r})")


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give a TOML file as in recipes/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}): see recipes/ for examples") from error


def _change(settings: dict[str, Any], change: str) -> None:
    name, equals, value = change.partition("=")
    *tables, last = name.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"setting '{change}': write NAME=VALUE")
    for table in tables:
        settings = settings.setdefault(table, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"setting '{change}': '{table}' is no table")
    try:
        settings[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        settings[last] = value.strip()
