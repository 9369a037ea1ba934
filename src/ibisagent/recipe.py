"""Settings from a TOML file, checked: what every long run of this package is started with. Knows no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ibisagent.errors import ConfigError


class Recipe(BaseModel):
    """Settings of a run, as read from a TOML file; unknown names and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The recipe in `path`. ConfigError says what is wrong, and where."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}): give a TOML file as in recipes/") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML ({error}): see recipes/ for examples") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {where}: {first['msg']} (given: {first.get('input')!r})") from error
