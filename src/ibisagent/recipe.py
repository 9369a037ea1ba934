"""Settings from a TOML file, checked: what every long run of this package is started with. Knows no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ibisagent.errors import ConfigError


class Recipe(BaseModel):
    """Settings of a run, as read from a TOML file; unknown names and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path, changes: Iterable[str] = ()) -> Self:
        """The recipe in `path`, with settings replaced by `changes`: "NAME=VALUE", or "TABLE.NAME=VALUE" in a table.

        A value is read as TOML, or else taken as it stands. ConfigError says what is wrong, and where.
        """
        try:
            settings = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}): give a TOML file as in recipes/") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML ({error}): see recipes/ for examples") from error
        for change in changes:
            _change(settings, change)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {where}: {first['msg']} (given: {first.get('input')!r})") from error


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
