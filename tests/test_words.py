"""One word for each thing, the field's own: none of the project's former private words is left in names, help, messages
and documents. What models read or were trained on keeps its words, and so do keys of records on disk."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# former word -> the word now; regular expressions, of whole words
NAMES = {
    r"glances?|glanced": "context features",
    r"own_turns": "on_policy",
    r"lessons?": "curriculum, examples",
    r"looks_twice": "two_pass",
    r"look_(every|split|side)": "eval_every, eval_split",
    r"bank|veil|forgotten": "feature_cache, feature dropout",
    r"spoilt|spoiled|imperfect": "corrupted",
    r"foreign": "unrelated",
    r"erring": "self_correcting",
    r"asker|teller|untold|raws|raw_episodes?": "QuestionGenerator, Narrator, Rejected, expert_episodes",
    r"sights?|scenes?|moments?_of": "VisualFacts, TeacherContext",
    r"settling": "convergence",
    r"unheard": "ignore_progress",
    r"warm_up|clip_norm|path_tokens|keep_checkpoints": "as TRL names them",
    r"taken_over|take_over": "interrupted, interrupt",
    r"boards?": "prompt_state",
    r"made_by|people_turns": "provenance, human_turns",
    r"desks?|shelf|gate": "tab, ImageStore, AuthMiddleware",
    r"pictures?": "image",
    r"learnt": "learned",
    r"persons?": "user",
    r"(?<!ground_)truths?": "ground_truth",
    r"several": "multiple",
}
CLASSES = {
    "Sight",
    "Scene",
    "Moment",
    "Told",
    "Board",
    "Desk",
    "Gate",
    "Lesson",
    "Lessons",
    "OwnTurns",
    "Asking",
    "Bank",
}
PROSE = {
    r"glanc(?:e|es|ed)": "context features",
    r"own turns": "on-policy states",
    r"looks? twice": "two-pass",
    r"(?:the|a) veil|spoilt|imperfect|erring|untold": "feature dropout, corrupted, self-correction, rejected",
    r"foreign": "unrelated",
    r"go(?:es|ing)? on where (?:it|they)|goes on from (?:its|the|there|here)": "resumes",
    r"an option away": "one flag away",
    r"pictures?": "image",
    r"several": "multiple",
    r"(?:un)?learnt": "learned",
    r"persons?": "user",
    r"(?<!ground[ -])truths?": "ground truth",
    r"settling": "convergence",
    r"own[-_]turns": "on-policy",
    r"in words(?! alone)": "as text, text-only",
}
ON_DISK = {"made_by", "people_turns"}  # keys of records, which older versions wrote
# Their literal strings are the models' language: questions, thoughts, prompts, and what recognises them.
MODEL_TEXT = (
    "src/ibisagent/generation/teacher/",
    "src/ibisagent/generation/questions.py",
    "src/ibisagent/protocol.py",
    "src/ibisagent/query.py",
    "src/ibisagent/training/nano/curriculum.py",
    "tests/test_teacher.py",
    "tests/test_protocol.py",
    "tests/test_query.py",
    "tests/test_trajectories.py",
)
HISTORY = ("docs/experiments/",)
THIS = "tests/test_words.py"

NAME_PARTS = re.compile(rf"(?<![a-z])(?:{'|'.join(NAMES)})(?![a-z])")
PROSE_WORDS = re.compile(rf"\b(?:{'|'.join(PROSE)})\b", re.IGNORECASE)


def parts(name: str) -> str:
    """A name in small letters, its words apart: "OwnTurns" -> "own_turns"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def old_names(name: str) -> list[str]:
    return [name] if name in CLASSES or NAME_PARTS.search(parts(name)) else []


def old_words(prose: str) -> list[str]:
    plain = re.sub(r"\s*\n\s*#?\s*", " ", prose)  # an expression may go over a line's end
    return [found[0] for found in PROSE_WORDS.finditer(plain)]


def in_python(text: str, *, model_text: bool = False) -> Iterator[tuple[int, str]]:
    """(line, former word) of names, comments, docstrings and other strings."""
    statement = True  # a string that begins one is a docstring
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found: list[str] = []
        if token.type == tokenize.NAME:
            found = old_names(token.string)
        elif token.type == tokenize.COMMENT:
            found = old_words(token.string)
        elif token.type == tokenize.STRING:
            body = token.string.strip("rbfRBF").strip("'\"")
            if body not in ON_DISK and (statement or not model_text):
                fields = re.findall(r"(?<!\{)\{([A-Za-z_][\w.]*)", token.string)  # of f-strings
                found = old_words(token.string) + [one for field in fields for one in old_names(field)]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
        yield from ((token.start[0], one) for one in found)


def in_document(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        found = old_words(line) + [name for name in re.findall(r"\w*_\w+", line) for name in old_names(name)]
        yield from ((number, one) for one in found if one not in ON_DISK)


def files() -> list[str]:
    kinds = {".py", ".pyi", ".md", ".toml", ".sh", ".html", ".yaml"}
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "recipes", "docs", "docker")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    names = [path.relative_to(ROOT).as_posix() for path in [*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]]
    return sorted(name for name in names if not name.startswith((*HISTORY, THIS, "recipes/verl/")))


@pytest.mark.parametrize("name", files())
def test_a_file_speaks_the_words_of_the_field(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith((".py", ".pyi")):
        found = list(in_python(text, model_text=name.startswith(MODEL_TEXT)))
    else:
        found = list(in_document(text))
    assert not found, f"{name}, (line, former word): {found}; the words now stand in {THIS}"


def test_the_checks_can_fail() -> None:
    code = (
        '"""A picture."""\n'
        "def made_by(truth):  # what was learnt\n"
        "    x = OwnTurns, 'see the person'\n"
        '    return f"{x} {the_truth.lessons}", "made_by", ground_truth\n'
    )
    assert [word for _, word in in_python(code)] == [
        "picture", "made_by", "truth", "learnt", "OwnTurns", "person", "the_truth.lessons",
    ]  # fmt: skip
    assert [word for _, word in in_python('"""A picture."""\nx = "a picture"\n', model_text=True)] == ["picture"]
    assert [word for _, word in in_python('x = "the\\n"  # from the ground truth\ny = several_\n')] == ["several_"]
    assert list(in_document("It goes on where it stopped: `looks_twice`, `made_by`.\nNo pictured truthful person")) == [
        (1, "goes on where it"), (1, "looks_twice"), (2, "person"),
    ]  # fmt: skip
    assert old_words("one\n# option, an option\n    away") == ["an option away"]
    assert not old_words("the ground\n    truth")
