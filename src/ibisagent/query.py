"""Which objects a user's sentence asks for, and what a policy that knows certain names makes of them.

"OPTIC DISC"                         -> optic disc, known
"the optic disc and the optic cup"   -> two requests
"lien"                               -> spleen, by the table of synonyms (`policies/synonyms.toml`)
"Lt lung"                            -> left lung, by rule
"optc disc"                          -> not known; asked for as the nearest name, and never called by it
"gallbladder"                        -> not known
"breast and ovarian cancer"          -> refused: it cannot be known whether that is one object or two
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any

from ibisagent.domain import MAX_QUERY_CHARS, MAX_TARGETS
from ibisagent.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    """One object of a user's sentence.

    name: as the user wrote it; masks and answers are called so. asked: the name that the policy is asked for. known:
    whether the policy learned an object of this name. nearest: the closest name that it learned, where `known` is False
    and any is close.
    """

    name: str
    asked: str
    known: bool
    nearest: str | None = None


# ------------------------------------------------------------------------------------------- the object of a sentence

_VERBS = (
    "annotate|check|continue|contour|correct|delineate|detect|draw|find|fix|give|highlight|identify|improve|label|locate|"
    "look|make|mark|outline|please|point|refine|return|say|segment|select|show|trace"
)
_IMAGE = r"(?:image|picture|scan|slice|photo|photograph|radiograph|x-ray|frame|ct|mri|ultrasound)"
_FILLERS = (
    rf"(?:in|part of) (?:this|the|that) (?:[\w-]+ ){{0,3}}{_IMAGE}|this {_IMAGE}|pixels belong|began|interested in|"
    "(?:my|a) (?:first )?mask of|shows|"
    "a|all|am|an|and|any|are|can|colleague|could|do|does|for|from|here|i|is|it|just|"
    "(?:mask|contour|outline|location|position|segmentation)s? of|me|my|need|of|on|out|see|some|somewhere|that|the|"
    "there|this|to|us|visible|want|we|what|where|which|will find|would|you"
)
_COMMAND = re.compile(rf"(?:{_VERBS})\b", re.IGNORECASE)
_LEADING = re.compile(rf"(?:(?:{_VERBS}|{_FILLERS})(?:[\s,]+|$))+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?!;:](?=\s|$)")
_PLACE = re.compile(
    r"\s(?:(?:visible|shown|present|seen) )?(?:in|on|from|of|within) (?:this|the|that) "
    rf"(?:[\w-]+ ){{0,3}}{_IMAGE}\b.*",
    re.IGNORECASE,
)
_TRAILING = re.compile(
    rf"(?:^|,? )(?:please|for me|(?:only )?if|but|and (?:{_VERBS})|(?:is|are) (?:marked|not|there|visible)|"
    r"each (?:in|with)|one mask|separately|individually|as separate masks|respectively|"
    r"be (?:found|seen)|marked|which lies|that you see|"
    r"(?:is )?(?:on|in|at) the (?:left|right|top|bottom|upper|lower)|(?:is|are)$)\b.*",
    re.IGNORECASE,
)
_HOLLOW = re.compile(
    r"(?:\b(?:case|closely|fit|if|in|is|it|its|mask|masks|no|part|so|that|them|there|what|wrong|yes|you)\b[\s,]*)*",
    re.IGNORECASE,
)


def target_of(query: str) -> str:
    """The short name of the object that a query means: "Segment the optic disc." -> "optic disc". Never empty.

    Takes the first sentence that begins with a verb such as "segment", unless it only says "it", else the first; strips
    verbs, articles and question words at its beginning, "in this image", "if it is there" and the like at its end.
    At most 80 characters. A guess, for replies that name no object; queries that are already a name come back
    unchanged.
    """
    sentences = [part.strip() for part in _SENTENCE_END.split(query[:MAX_QUERY_CHARS]) if part.strip()] or ["target"]
    commands = [sentence for sentence in sentences if _COMMAND.match(sentence)]
    names = [_name_in(sentence) for sentence in (*commands, *sentences)]
    name = next((name for name in names if not _HOLLOW.fullmatch(name)), sentences[0])
    while len(name) > 80 and " " in name:
        name = name.rpartition(" ")[0]
    return name[:80] or "target"


def _name_in(sentence: str) -> str:
    """What is left of a sentence without the words around the name."""
    name = " ".join(sentence.split()).strip(" .,;:!?\"'")
    name = name[leading.end() :] if (leading := _LEADING.match(name)) else name
    return _TRAILING.sub("", _PLACE.sub("", name)).strip(" .,;:!?\"'")


# --------------------------------------------------------------------------------------------------- multiple objects

_WORDS_WANTED = re.compile(
    r"\b(?:modality|imaging technique|kind of (?:medical )?image|how (?:was|many)|count|number of|which (?:side|half)|"
    r"left or (?:in the )?right|more than|larger than|exceed|covers? over|body site|anatomical site|part of the body|"
    r"(?:what|which) region|where in the body|compare|which one|the one)\b|, [^,]+ or [^,]+\?|\bor\b.*\?",
    re.IGNORECASE,
)
_OPEN = re.compile(
    r"(?:(?:the|an?|any|all|some|other|main|suspicious) )*"
    r"(?:object|structure|target|lesion|region of interest|abnormalit(?:y|ies)|abnormal|finding|area|thing|anything.*|"
    r"something.*|one that.*|one|ones|it|them|target)s?",
    re.IGNORECASE,
)
_DESCRIPTION = re.compile(r"\b(?:that|which|where|who|whose|what)\b", re.IGNORECASE)
_EVERYTHING = re.compile(
    r"everything(?: (?:here|visible|you (?:can see|know)))?|all|(?:all|every)(?: of)?(?: the)?(?: visible)? "
    r"(?:objects?|organs?|structures?|things?|targets?|anatomy|tissues?)|"
    r"(?:the )?(?:whole|entire|full) (?:image|picture|scan|slice)",
    re.IGNORECASE,
)
_AND = re.compile(r"\s*(?:,\s*(?:and\s+|&\s*)?|\s(?:and|as well as|plus|und|et|y)\s|\s[&+]\s)\s*", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an?|both|all|any|its|each)\s+", re.IGNORECASE)


def requests(
    query: str, names: Collection[str], everything: Callable[[], Sequence[str]] | None = None
) -> tuple[Request, ...]:
    """The objects that `query` asks for, of a policy that learned `names`; none where it names none.

    everything: the names that "everything" stands for; None where that is not known.

    None are named by questions that are answered as text ("Which modality is this?"), by open ones ("Are there any
    abnormalities?") and by descriptions ("the organ that makes bile").

    Raises ConfigError where it cannot be told how many objects are meant, or which, and for more than MAX_TARGETS.
    """
    found: dict[str, Request] = {}
    for phrase in _phrases(query, names, everything):
        request = _request(phrase, names)
        found.setdefault(_plain(request.name), request)
    if len(found) > MAX_TARGETS:
        raise ConfigError(f"the query asks for {len(found)} objects, at most {MAX_TARGETS} at once: ask in parts")
    return tuple(found.values())


def _phrases(query: str, names: Collection[str], everything: Callable[[], Sequence[str]] | None) -> Iterator[str]:
    """The names of objects in a query, as they are written."""
    text = re.sub(r"\s*[;\n]\s*", ", ", query[:MAX_QUERY_CHARS].strip(" ;\n"))
    if _WORDS_WANTED.search(text):
        return
    if _lookup(_name_in(text), names):
        yield _name_in(text)
        return
    for phrase in _sentence_names(text):
        if _EVERYTHING.fullmatch(phrase):
            if everything is None:
                raise ConfigError("'everything' names no object: name each, such as \"the optic disc, the optic cup\"")
            yield from everything()
        elif not (_OPEN.fullmatch(phrase) or _DESCRIPTION.search(phrase)):
            yield from _divided(phrase, names)


def _sentence_names(text: str) -> list[str]:
    """What each sentence that commands names, else what the first sentence does."""
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
    if any(means_everything(sentence) for sentence in sentences):
        return ["everything"]
    commands = [name for part in sentences if _COMMAND.match(part) and not _HOLLOW.fullmatch(name := _name_in(part))]
    return commands or [name for part in sentences if not _HOLLOW.fullmatch(name := _name_in(part))][:1]


def means_everything(sentence: str) -> bool:
    """Whether a sentence asks for all that there is: the words around a name would hide the "all"."""
    verbless = re.sub(rf"^(?:(?:please|could|can|you|{_VERBS}|me)\s+)*", "", sentence, flags=re.IGNORECASE)
    verbless = _PLACE.sub("", _TRAILING.sub("", verbless)).strip(" .,;:!?")
    return bool(_EVERYTHING.fullmatch(verbless))


def _divided(phrase: str, names: Collection[str]) -> list[str]:
    """The names in a phrase: itself, or what its commas and "and"s part."""
    parts = [_bare(part) for part in _AND.split(phrase) if _bare(part)]
    if len(parts) < 2 or _lookup(phrase, names):
        return [phrase]
    as_list = len(parts) > 2 or "," in phrase or any(_ARTICLE.match(part) for part in _AND.split(phrase)[1:])
    if as_list and not _shared(parts, names):
        return parts
    shared = _shared(parts, names)
    known = all(_lookup(part, names) for part in parts)
    if shared and not known:
        return shared
    if known and not shared:
        return parts
    raise ConfigError(
        f"'{phrase[:80]}' can mean one object or {len(parts)}: ask for each with its full name, "
        f'such as "the {parts[0][:40]}, the {parts[-1][:40]}"'
    )


def _shared(parts: list[str], names: Collection[str]) -> list[str]:
    """The parts with the last words that they share, where all are known then, or the others are mere sides: of "left"
    and "right lung", "left lung" and "right lung"."""
    words = parts[-1].split()
    for count in range(len(words) - 1, 0, -1):
        head = " ".join(words[-count:])
        spread = [*(f"{part} {head}" for part in parts[:-1]), parts[-1]]
        of_sides = [_table()["sides"].get(_plain(part)) for part in parts[:-1]]
        if all(_lookup(name, names) for name in spread) or (all(of_sides) and count == len(words) - 1):
            return spread
    return []


def _bare(part: str) -> str:
    part = part.strip(" .,;:!?\"'")
    return _ARTICLE.sub("", part, count=1) if _ARTICLE.match(part) else part


# ------------------------------------------------------------------------------------------------------------- names

_BRITISH = (
    *(("tumour", "tumor"), ("haem", "hem"), ("ischaem", "ischem"), ("oesoph", "esoph")),
    *(("foetal", "fetal"), ("foetus", "fetus"), ("fibre", "fiber"), ("disk", "disc")),
)
_TYPO_LETTERS = 4  # words shorter than this are never taken for a misspelt one: L3 is not L5


def _request(phrase: str, names: Collection[str]) -> Request:
    name = " ".join(phrase.split())
    if found := _lookup(name, names):
        return Request(found[1], found[0], known=True)
    if typo := _misspelt(name, names):
        return Request(name, typo, known=False, nearest=typo)
    return Request(name, _spelling(name.lower()), known=False, nearest=_nearest(name, names))


def known_as(name: str, names: Collection[str]) -> str | None:
    """Which of `names` a name means: itself, a synonym's, or one written otherwise; None where it means none."""
    found = _lookup(" ".join(name.split()), names)
    return found[0] if found else None


def _lookup(phrase: str, names: Collection[str]) -> tuple[str, str] | None:
    """(the learned name that a phrase means, the phrase without words around it); None where it means none."""
    if phrase in names:
        return phrase, phrase
    table = _table()
    for surface in _surfaces(phrase, table):
        if surface in table["abbreviations"] and (name := table["abbreviations"][surface]) in names:
            return name, surface
        if name := _variants(frozenset(names)).get(_side_first(surface, table)):
            return name, surface
    return None


def _surfaces(phrase: str, table: Mapping[str, Any]) -> Iterator[str]:
    """The phrase, and what is left of it without articles, and without words of other languages around it."""
    phrase = phrase.strip(" .,;:!?¿¡\"'")
    yield phrase
    yield _bare(phrase)
    around = table["around"]
    words = re.split(r"[\s'’]+", phrase)
    while words and around.issuperset(_plain(words[0].strip("?!.,")).split()):
        words = words[1:]
    while words and around.issuperset(_plain(words[-1].strip("?!.,")).split()):
        words = words[:-1]
    if words:
        yield " ".join(words).strip(" .,;:!?¿¡")


def _side_first(surface: str, table: Mapping[str, Any]) -> str:
    """The key of a surface: "lung, left", "Lt lung", "pulmo sinister" -> "left lung" and "left pulmo"."""
    words = re.sub(r"[(),]", " ", _plain(surface)).split()
    sides = [table["sides"].get(word) for word in words]
    side = [one for one in sides if one]
    if len(side) != 1 or len(words) == 1:
        return _singular(" ".join(words))
    rest = _singular(" ".join(word for word, one in zip(words, sides, strict=True) if not one))
    return f"{side[0]} {rest}"


def _plain(name: str) -> str:
    """A name without capitals, accents, hyphens, British spelling and what cannot be seen, as a zero-width space."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    text = "".join(
        letter for letter in letters if not (unicodedata.combining(letter) or unicodedata.category(letter) == "Cf")
    )
    return _spelling(" ".join(re.sub(r"[-_/]", " ", text).split()))


def _spelling(text: str) -> str:
    for british, american in _BRITISH:
        text = text.replace(british, american)
    return text


def _singular(name: str) -> str:
    """Without the plural of the last word. Singulars that end so lose it as well, everywhere: they still match."""
    for plural, singular in (("ies", "y"), ("sses", "ss"), ("ices", "ix"), ("vertebrae", "vertebra"), ("s", "")):
        if name.endswith(plural) and len(name) > len(plural) + 2 and not name.endswith(("ss", "us", "is")):
            return name.removesuffix(plural) + singular
    return name


@cache
def _table() -> Mapping[str, Any]:
    """`synonyms.toml`, with all that is looked up in plain form."""
    read = tomllib.loads(files("ibisagent").joinpath("policies", "synonyms.toml").read_text(encoding="utf-8"))
    sides = {_plain(word): side for side, words in read["sides"].items() for word in (side, *words)}
    around = frozenset(_plain(word) for word in read["words"]["around"])
    return {"names": read["names"], "abbreviations": read["abbreviations"], "sides": sides, "around": around}


@cache
def _variants(names: frozenset[str]) -> Mapping[str, str]:
    """Key as `_side_first` makes it -> the learned name, for all names and their synonyms, with and without a side."""
    table = _table()
    variants: dict[str, str] = {}
    for name, synonyms in table["names"].items():
        for side, word in product(("", "left ", "right "), (name, *synonyms)):
            if side + name in names:
                variants[_side_first(side + word, table)] = side + name
    return variants | {_side_first(name, table): name for name in names}


def _misspelt(phrase: str, names: Collection[str]) -> str | None:
    """The only learned name of which each word is written with one wrong letter at most; None where there is none.

    More would be another name rather than a slip: a nucleolus is no nucleus.
    """
    words = _singular(_plain(_bare(phrase))).split()
    close = {
        name
        for key, name in _variants(frozenset(names)).items()
        if len(known := key.split()) == len(words) and all(map(_same_word, words, known))
    }
    return close.pop() if len(close) == 1 else None


def _same_word(written: str, known: str) -> bool:
    short = min(len(written), len(known)) < _TYPO_LETTERS
    return written == known or (not short and _one_slip(written, known))


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two exchanged, make `a` of `b`."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def _nearest(phrase: str, names: Collection[str]) -> str | None:
    """The learned name whose spelling, or a synonym's, is closest; None where none is close."""
    variants = _variants(frozenset(names))
    key = _side_first(_bare(phrase), _table())
    words = key.split()
    for start in range(1, len(words)):  # "left kidney" -> kidney
        if (name := variants.get(" ".join(words[start:]))) is not None:
            return name
    return next((variants[close] for close in get_close_matches(key, list(variants), n=1, cutoff=0.75)), None)
