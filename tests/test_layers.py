"""Imports go strictly downward, and torch stays where it belongs. Read from the source, so lazy imports count."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ibisagent"

LAYERS = (
    ("errors", "files", "domain"),  # the vocabulary
    ("imaging", "config", "protocol", "query", "store"),  # what is read, written and said
    ("segmenters", "volumes", "policies", "datasets"),  # what can be loaded
    ("environment", "rewards"),  # the loop
    ("inference",),  # it is run on files
    ("evaluation", "generation"),  # it is judged, and taught from
    ("training", "integrations"),  # it learns
    ("server", "cli", "__main__"),  # it is used
)
"""From the ground up. A room imports from lower layers, or from its own as long as no circle comes of it."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MOST_ENTRIES = 26
LONGEST_FILE, LONGEST_FUNCTION = 700, 80  # lines
HEAVY = {"torch", "torchvision", "transformers", "trl", "peft", "timm", "accelerate"}
MAY_BE_HEAVY = (
    "segmenters/",
    "policies/nano.py",
    "policies/sizes",
    "policies/torch_model",
    "training/",
    "inference/models",
)  # the last: doctor looks
MODULES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path, source: Path = SOURCE) -> str:
    """Dotted name below the package, "" for the package itself."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: Path = SOURCE, *, at_once: bool = False) -> set[str]:
    """Absolute dotted names of everything that a file imports, anywhere in it; at_once: as soon as it is imported."""
    found: set[str] = set()
    package = path.relative_to(source).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
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


def rooms_used(path: Path) -> set[str]:
    """The other rooms that a module imports from."""
    own = module_of(path).split(".")[0]
    return {room(name) for name in imports(path)} - {"", own}


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_never_go_upward(path: Path) -> None:
    own = module_of(path).split(".")[0]
    if not own:  # the package itself names its public parts, lazily
        assert not rooms_used(path)
        return
    assert own in LEVEL, f"{own} has no layer yet: add it to LAYERS and to docs/design.md"
    for other in rooms_used(path):
        assert other in LEVEL, f"{path.name} imports {other}, which has no layer"
        assert LEVEL[other] <= LEVEL[own], f"{module_of(path)} imports {other}, which is above it"


def test_there_are_few_layers_and_no_circles() -> None:
    assert len(LAYERS) <= 8
    uses: dict[str, set[str]] = {}
    for path in MODULES:
        uses.setdefault(module_of(path).split(".")[0], set()).update(rooms_used(path))
    order = TopologicalSorter(uses)
    order.prepare()  # raises CycleError, which names the circle


def test_no_module_needs_itself_while_it_is_imported() -> None:
    names = {f"ibisagent.{module_of(path)}".rstrip("."): path for path in MODULES}

    def needed(dotted: str) -> str:
        return dotted if dotted in names else dotted.rpartition(".")[0]  # a module, or what is in one

    uses = {name: {needed(one) for one in imports(path, at_once=True)} & names.keys() for name, path in names.items()}
    order = TopologicalSorter({name: used - {name} for name, used in uses.items()})
    order.prepare()  # raises CycleError, which names the circle


def test_the_package_root_fits_on_a_screen() -> None:
    entries = [entry.name for entry in SOURCE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", sorted((SOURCE / "cli").glob("*.py")), ids=module_of)
def test_commands_write_no_files(path: Path) -> None:
    written = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    called = {node.func for node in written if isinstance(node, ast.Call)}
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in called}
    assert not names & {"open", "write_text", "write_bytes", "write_whole", "write_json", "mkdir"}


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
