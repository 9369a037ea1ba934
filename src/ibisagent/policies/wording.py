"""What a policy is told, from a TOML file or from the source of the paper's public code.

The wording of the public code is its authors'. It is read from the user's own checkout, and nowhere in this package;
without it the dialect "released" says the same in other words.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

from pydantic import field_validator

from ibisagent.config import Recipe
from ibisagent.domain import QUERY_PLACE, Wording
from ibisagent.errors import ConfigError

PUBLIC_CODE = "Yankai96/IBISAgent"
PARAPHRASED = (
    "the dialect released says in other words what the public weights were told; "
    f"`ibisagent data prompts CHECKOUT -o prompts.toml` reads theirs from a checkout of {PUBLIC_CODE}, for --prompts"
)
"""What a user is told who runs the dialect "released" without such a file."""

_PLACES = {  # part of the wording -> file of the public code, name that it is assigned to
    "system": ("infer/multi_turn.py", "SYSTEM_PROMPT"),
    "first": ("infer/multi_turn.py", "current_prompt"),
    "refine": ("infer/mllm_engine.py", "refinement_prompt"),
}


class _File(Recipe):
    system: str
    first: str = QUERY_PLACE
    refine: str

    @field_validator("first", "refine")
    @classmethod
    def _has_place(cls, text: str) -> str:
        if QUERY_PLACE not in text:
            raise ValueError(f"has no {QUERY_PLACE}, where the query goes")
        return text


def read_wording(path: str | Path) -> Wording:
    """The wording in a TOML file with the texts system, first and refine. ConfigError where it is none."""
    return Wording(**_File.read(Path(path)).model_dump())


def wording_facts(dialect: str, wording: Wording | None) -> dict[str, str]:
    """For the record: whose words a policy was told, where they are not simply its dialect's."""
    if wording is not None:
        text = json.dumps([wording.system, wording.first, wording.refine])
        return {"prompts_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"prompts": "paraphrased"} if dialect == "released" else {}


def write_wording(wording: Wording, path: str | Path) -> None:
    """Write a file for `read_wording`."""
    texts = {part: getattr(wording, part) for part in _PLACES}
    lines = [f"{part} = {json.dumps(text, ensure_ascii=False)}\n" for part, text in texts.items()]
    Path(path).write_text("".join(lines), encoding="utf-8")


def wording_of_checkout(folder: str | Path) -> Wording:
    """The wording in a checkout of the public code, which is parsed, not run. ConfigError where it is not there."""
    return Wording(**{part: _assigned(Path(folder) / file, name) for part, (file, name) in _PLACES.items()})


def _assigned(path: Path, name: str) -> str:
    """The text that is assigned to `name` first in a Python file, with QUERY_PLACE for what an f-string puts in."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give a checkout of {PUBLIC_CODE}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            value = node.value.body if isinstance(node.value, ast.IfExp) else node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
            if isinstance(value, ast.JoinedStr):
                return "".join(
                    str(part.value) if isinstance(part, ast.Constant) else QUERY_PLACE for part in value.values
                )
    raise ConfigError(f"{path}: assigns no text to {name}: give a checkout of {PUBLIC_CODE} as it was published")
