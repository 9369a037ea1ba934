"""The documents say what is true of the code: commands, options, links, modules, settings and Python in them exist."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import loopback
import nibabel as nib
import numpy as np
import pytest
import skimage
import typer
from volume_phantoms import GRIDS, blob, hounsfield

from ibisagent import load_policy, load_segmenter
from ibisagent.cli.app import app
from ibisagent.generation.config import FactoryConfig
from ibisagent.imaging.images import read_image, write_mask_png, write_png
from ibisagent.rewards import weights_of
from ibisagent.server.app import create_app
from ibisagent.server.service import Service
from ibisagent.training.click.trainer import ClickRecipe
from ibisagent.training.finetune.recipes import RlRecipe
from ibisagent.training.finetune.sft import SftRecipe
from ibisagent.training.nano.trainer import NanoRecipe

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "ibisagent"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((SOURCE / "weights").rglob("*.md")),
]
EXPERIMENTS = ROOT / "docs" / "experiments"
LONGEST_README = 130  # lines
RECIPES = (FactoryConfig, ClickRecipe, NanoRecipe, SftRecipe, RlRecipe)
NOT_RUN = "<!-- not run:"  # and why; the line before a Python block that can only be compiled
DATA_FILES = (
    ".json",
    ".csv",
    ".toml",
    ".html",
    ".md",
    ".tex",
    ".png",
    ".npz",
    ".jsonl",
    ".lock",
)  # "evaluation.json" is no module

_FENCE = re.compile(r"(?:^(?P<before>[^\n]*)\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}[^\n]*\n)+", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_DOTTED = re.compile(r"(?:ibisagent\.)?[a-z_]\w*(?:\.\w+)+")
_FILE = re.compile(r"(?:\w[\w.-]*/)+[\w.-]+\.(?:py|toml|sh|yaml)|\w+\.py")
_SETTING = re.compile(r"(\w+) = \S.*")


def documents() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(text: str) -> str:
    """Text without its fenced and indented code."""
    return _INDENTED.sub("", _FENCE.sub("", text))


def spans(text: str) -> list[str]:
    """What stands between backticks, outside code blocks; a command may be broken over two lines there."""
    return _SPAN.findall(re.sub(r"(?<=\S)\n *(?=\S)", " ", prose(text)))


def code_lines(text: str) -> list[str]:
    """The lines of all code blocks that are not Python, and all code spans; continued lines joined."""
    blocks = [found["code"] for found in _FENCE.finditer(text) if found["language"] != "python"]
    blocks += _INDENTED.findall(_FENCE.sub("", text))
    return [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *spans(text)]


@cache
def root_command() -> click.Command:
    return typer.main.get_command(app)  # type: ignore[no-any-return]


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def all_commands(command: click.Command | None = None) -> Iterator[click.Command]:
    command = command or root_command()
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from all_commands(below)


def benchmark_options(path: Path) -> set[str]:
    return set(re.findall(r'"(--?[\w-]+)"', path.read_text(encoding="utf-8")))


def command_problem(line: str) -> str | None:
    """What is wrong with the call of a command in `line`; None where there is none, or nothing is wrong."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None  # an excerpt of another language
    for place, word in enumerate(words):
        if word.startswith("benchmarks/"):
            script = ROOT / word
            known = benchmark_options(script) if script.is_file() else set()
            unknown = [
                given for given in words[place:] if given.startswith("-") and given.partition("=")[0] not in known
            ]
            return f"no {word}" if not script.is_file() else f"{word} has no {unknown[0]}" if unknown else None
    if "ibisagent" not in words or words[0] in ("import", "from"):
        return None
    at = words.index("ibisagent")
    if at and words[at - 1].startswith("--"):
        return None  # another program's word for us
    command, rest = root_command(), words[at + 1 :]
    while rest and (below := getattr(command, "commands", {})):
        if rest[0] in below:
            command, rest = below[rest[0]], rest[1:]
        elif command.name == "serve" and rest[0].startswith("-"):
            command = below["api"]  # as `serve` alone
        elif rest[0] == "--help":
            return None
        else:
            return f"no command '{rest[0]}' in '{' '.join(words[at:])}'"
    known = options_of(command)
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"'{command.name}' has no {unknown[0]}" if unknown else None


@cache
def all_options() -> set[str]:
    """Those of all commands and benchmarks."""
    known = set().union(*(options_of(command) for command in all_commands()))
    return known.union(*(benchmark_options(path) for path in (ROOT / "benchmarks").glob("*.py")))


def option_problem(span: str) -> str | None:
    """What is wrong with a span that begins with an option: no command and no benchmark has it."""
    name = re.match(r"--[a-z][\w-]*", span)
    return None if name is None or name[0] in all_options() else f"nothing has the option {name[0]}"


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Names that statements define, with what defines them."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found |= {part.id: node for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def module_problem(span: str) -> str | None:
    """What is wrong with a dotted name or a file in our packages; read from the source, so nothing is imported."""
    if _FILE.fullmatch(span):
        return None if any((base / span).is_file() for base in (ROOT, SOURCE.parent, SOURCE)) else f"no file {span}"
    if not _DOTTED.fullmatch(span) or span.endswith(DATA_FILES):
        return None
    parts = span.removeprefix("ibisagent.").split(".")
    if not span.startswith("ibisagent.") and not any((SOURCE / (parts[0] + end)).exists() for end in ("", ".py")):
        return None  # another package's
    folder = SOURCE
    while parts and (folder / parts[0]).is_dir():
        folder, parts = folder / parts[0], parts[1:]
    module = folder / "__init__.py"
    if parts and (folder / f"{parts[0]}.py").is_file():
        module, parts = folder / f"{parts[0]}.py", parts[1:]
    body = ast.parse(
        (module.with_suffix(".pyi") if folder == SOURCE and module.stem == "__init__" else module).read_text()
    ).body
    for part in parts:
        node = defined(body).get(part)
        if node is None:
            return f"no {span}: {module.relative_to(ROOT)} has no {part}"
        body = node.body if isinstance(node, ast.ClassDef) else []
    return None


def setting_problem(span: str) -> str | None:
    """What is wrong with a setting written as in a recipe: no recipe has it."""
    found = _SETTING.fullmatch(span)
    if found is None:
        return None
    known = set().union(*(recipe.model_fields for recipe in RECIPES))
    return None if found[1] in known else f"no recipe has a setting {found[1]}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problem(link: str, path: Path) -> str | None:
    """What is wrong with a link in the document `path`; links to other sites are not followed."""
    if re.match(r"[a-z]+:", link):
        return None
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists():
        return f"no {link}"
    if anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
        return f"no heading '{anchor}' in {target.name}"
    return None


def problems(text: str, path: Path) -> list[str]:
    """Everything that is wrong with the document `text`, that lies at `path`."""
    found = [command_problem(line) for line in code_lines(text)]
    for check in (option_problem, module_problem, setting_problem):
        found += [check(span) for span in spans(text)]
    found += [link_problem(link, path) for link in _LINK.findall(prose(text))]
    return [problem for problem in found if problem]


@documents()
def test_a_document_names_what_is_there(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Run\n\n    ibisagent train-nano recipes/ibis-nano.toml\n", "no command 'train-nano'"),
        ("Run `ibisagent eval run DATA --splits val`.", "'run' has no --splits"),
        ("Run `ibisagent eval\nrunning DATA`.", "no command 'running'"),
        ("```\naccelerate launch --x 1 -m ibisagent \\\n  train sfft R\n```\n", "no command 'sfft'"),
        ("Run `ibisagent serve --hosts 0.0.0.0`.", "'api' has no --hosts"),
        ("Run `python benchmarks/loop.py --pols x`.", "benchmarks/loop.py has no --pols"),
        ("Run `python benchmarks/loops.py`.", "no benchmarks/loops.py"),
        ("Give `--recheckk 0`.", "nothing has the option --recheckk"),
        ("See `inference.imags.read_case`.", "no inference.imags.read_case"),
        ("See `ibisagent.domain.Episode.answers`.", "domain.py has no answers"),
        ("See `training/sft.py`.", "no file training/sft.py"),
        ("Set `leave_outs = []`.", "no recipe has a setting leave_outs"),
        ("See [it](docs/nothing.md).", "no docs/nothing.md"),
        ("See [it](docs/results.md#nothing).", "no heading 'nothing' in results.md"),
        ("See [it](#nothing).\n", "no heading 'nothing' in README.md"),
    ],
)
def test_what_is_not_there_is_found(text: str, problem: str) -> None:
    found = problems(text, ROOT / "README.md")
    assert len(found) == 1
    assert problem in found[0]


def test_what_is_there_is_let_through() -> None:
    text = (
        '`ibisagent`, `ibisagent eval`, `ibisagent serve --page`, `ibisagent segment *.png "the liver" -o x`,\n'
        "`python benchmarks/loop.py --policy x`, `--recheck 0`, `inference.image.read_case`, `domain.Episode.turns`,\n"
        "`ibisagent.segment`, `evaluation.json`, `torch.load`, `protocol.py`, `plain = true`, `tests/test_cli.py`,\n"
        "[results](docs/results.md#agent), [elsewhere](https://example.org/x#y)\n"
    )
    assert problems(text, ROOT / "README.md") == []


def python_blocks() -> list[tuple[Path, str, str]]:
    """(document, the line before, code) of every Python block."""
    return [
        (path, found["before"], found["code"])
        for path in DOCUMENTS
        for found in _FENCE.finditer(path.read_text(encoding="utf-8"))
        if found["language"] == "python"
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `ibisagent serve` serves, on a free port."""
    service = Service(load_policy("ibis-nano"), load_segmenter("ibis-click"), tmp_path_factory.mktemp("server"))
    with loopback.serving(create_app(service)) as address:
        yield address
    service.close()


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the documents speak of, in the current folder: an eye, a scan, a manifest."""
    write_png(read_image(Path(skimage.__file__).parent / "data" / "retina.jpg").pixels, tmp_path / "eye.png")
    mask = blob((23, 17, 6))
    nib.save(nib.Nifti1Image(hounsfield(mask), GRIDS["LPS-uneven"]), tmp_path / "ct.nii.gz")
    middle = mask[:, :, 3]
    write_png(np.where(middle[..., None], 220, 30).repeat(3, axis=2).astype(np.uint8), tmp_path / "p1.png")
    write_mask_png(middle, tmp_path / "p1_liver.png")
    (tmp_path / "data.csv").write_text("image,mask,object,split\np1.png,p1_liver.png,liver,val\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize(
    ("path", "before", "code"), python_blocks(), ids=lambda value: value.name if isinstance(value, Path) else ""
)
def test_python_in_documents_runs(path: Path, before: str, code: str, request: pytest.FixtureRequest) -> None:
    compiled = compile(code, str(path), "exec")
    if before.startswith(NOT_RUN):
        return
    if "http://127.0.0.1:8002" in code:
        compiled = compile(code.replace("http://127.0.0.1:8002", request.getfixturevalue("server")), str(path), "exec")
    exec(compiled, {})


def test_tables_of_rewards_in_documents_are_read() -> None:
    tables = [
        tomllib.loads(found["code"])
        for path in DOCUMENTS
        for found in _FENCE.finditer(path.read_text(encoding="utf-8"))
        if found["language"] == "toml"
    ]
    assert tables
    for table in tables:
        assert weights_of(table.pop("rewards"), "document")
        assert not table


def test_the_readme_is_short_and_names_every_first_word() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_README
    for word in getattr(root_command(), "commands", {}):
        assert f"| `ibisagent {word}` |" in text


def test_the_design_page_names_every_wing() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    wings = [path.name + "/" * path.is_dir() for path in SOURCE.iterdir() if not path.name.startswith((".", "__"))]
    assert [name for name in wings if f"`{name}`" not in text and name not in ("py.typed", "weights/")] == []


def test_every_experiment_is_in_the_index_with_its_verdict() -> None:
    listed = re.findall(
        r"^\| [+0-] \| \[(\S+): (.+)\]\((\S+)\) \|$", (EXPERIMENTS / "README.md").read_text(), re.MULTILINE
    )
    files = {path.name: path.read_text(encoding="utf-8").partition("\n")[0] for path in EXPERIMENTS.glob("20*.md")}
    assert {name: f"# {title}" for _, title, name in listed} == files
    assert [date for date, _, _ in listed] == sorted((name[:10] for name in files), reverse=True)
    for name in files:
        text = (EXPERIMENTS / name).read_text(encoding="utf-8")
        assert all(f"**{part}.**" in text for part in ("Question", "Set-up", "Result"))
        assert "**Decision.**" in text or "## Decision" in text


def test_documents_that_the_source_names_are_there() -> None:
    folders = (ROOT / "src", ROOT / "tests", ROOT / "benchmarks", ROOT / "recipes", ROOT / "docker")
    texts = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".sh", ".yaml")
    ]
    named = {
        (path, name) for path in texts for name in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert [(path, name) for path, name in named if path != Path(__file__) and not (ROOT / name).is_file()] == []
