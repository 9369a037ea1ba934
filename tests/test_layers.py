"""Imports go strictly downward, and torch stays where it belongs. Read from the source, so lazy imports count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ibisagent"

LAYERS = (
    ("errors",),
    ("files",),
    ("domain",),
    ("limits",),
    ("masks", "images", "csv_tables", "clicks", "protocol", "query", "calibration", "recipe", "resampling"),
    ("metrics", "segmenters", "policies", "datasets", "store", "volumes", "pacs"),
    ("environment", "rewards"),
    ("teacher",),
    ("trajectories", "evaluation", "ceiling", "session", "inventory", "volume_agent", "client"),
    ("factory", "audit", "reliability", "lmms_eval_plugin"),
    ("training", "doctor", "verl"),
    ("server", "terminal"),
    ("data_commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SIDEWAYS = {
    ("policies.nano", "segmenters"),  # its eye is the glance, as that of ibis-click
    ("evaluation.report", "session"),  # actions in the same words
    ("evaluation.runs", "session"),  # the same facts about policy and segmenter, the same default
    ("datasets.members", "volumes"),  # a slice of a volume is a picture of a data set
    ("datasets.decathlon", "volumes"),
    ("ceiling", "evaluation"),  # the expert's curves, the interval and the loop over cases are the same in both
}
HEAVY = {"torch", "torchvision", "transformers", "trl", "peft", "timm", "accelerate"}
MAY_BE_HEAVY = ("segmenters/", "policies/mllm", "policies/nano", "training/", "inventory")  # the last: doctor looks
MODULES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path, source: Path = SOURCE) -> str:
    """Dotted name below the package, "" for the package itself."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: Path = SOURCE) -> set[str]:
    """Absolute dotted names of everything that a file imports, anywhere in it."""
    found: set[str] = set()
    package = path.relative_to(source).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["ibisagent", *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(dotted: str) -> str:
    """The room of the house that "ibisagent.policies.mllm" is in: "policies"; "" for other packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "ibisagent" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_go_downward(path: Path) -> None:
    own = module_of(path).split(".")[0]
    if not own:  # the package itself names its public parts, lazily
        assert not any(room(name) for name in imports(path))
        return
    assert own in LEVEL, f"{own} has no layer yet: add it to LAYERS and to docs/design.md"
    for name in imports(path):
        other = room(name)
        if other and other != own and (module_of(path), other) not in SIDEWAYS:
            assert other in LEVEL, f"{path.name} imports {name}, which has no layer"
            assert LEVEL[other] < LEVEL[own], f"{module_of(path)} (L{LEVEL[own]}) imports {name} (L{LEVEL[other]})"


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_torch_stays_in_its_rooms(path: Path) -> None:
    if not path.relative_to(SOURCE).as_posix().startswith(MAY_BE_HEAVY):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY


def test_the_checks_can_fail(tmp_path: Path) -> None:
    """The reader sees imports of every form, at any depth."""
    code = tmp_path / "policies" / "made_up.py"
    code.parent.mkdir()
    code.write_text(
        "import torch.nn\ndef f():\n    from ibisagent.cli import app\n    from ibisagent import store\n"
        "    from ..server import chat\n    from . import base\n"
    )
    assert imports(code, tmp_path) == {
        "torch.nn",
        "ibisagent.cli.app",
        "ibisagent.store",
        "ibisagent.server.chat",
        "ibisagent.policies.base",
    }
    assert room("ibisagent.cli.app") == room("ibisagent.cli") == "cli"
    assert room("torch.nn") == room("ibisagent") == ""
