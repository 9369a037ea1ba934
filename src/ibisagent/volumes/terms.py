"""Coded terms (SNOMED CT as DICOM uses it) and colours of objects: the one reader of `terms.csv`.

The table holds every object name of the packaged models, and organs that larger models are asked for. Its codes are
those that DICOM's own dictionary (PS3.16) holds, which may be used with DICOM without another licence; where that has
no code as narrow as the name (a mitochondrion), the next wider one stands (cell), and the object's label says the rest.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

Rgb = tuple[int, int, int]

_COLUMNS = ("name", "category", "type", "modifier", "region", "colour")
_OTHERS: tuple[Rgb, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (148, 103, 189),
)
"""For names without a colour of their own: Okabe and Ito's, which colour-blind readers tell apart, and violet."""


@dataclass(frozen=True, slots=True)
class Code:
    """One coded concept as DICOM writes it: value, scheme ("SCT": SNOMED CT) and meaning."""

    value: str
    meaning: str
    scheme: str = "SCT"


@dataclass(frozen=True, slots=True)
class Term:
    """What an object is, in codes, and the colour (R, G, B of 0 to 255) that it is drawn in.

    category and kind are DICOM's segmented property category and type; modifier narrows the kind (left, benign), region
    says which organ a finding lies in. known: False where nothing but the name is known, and the codes say "Tissue".
    """

    category: Code
    kind: Code
    modifier: Code | None
    region: Code | None
    colour: Rgb
    known: bool = True


_TISSUE = Code("85756007", "Tissue")
_ABNORMAL = Code("49755003", "Morphologically Abnormal Structure")
_MODIFIERS = {"left": Code("7771000", "Left"), "right": Code("24028007", "Right")}
_NEOPLASM, _LESION = Code("108369006", "Neoplasm"), Code("52988006", "Lesion")
_FINDINGS = {
    **dict.fromkeys(("tumor", "cancer", "carcinoma", "neoplasm", "metastasis", "metastases"), _NEOPLASM),
    **dict.fromkeys(("lesion", "polyp", "abnormality"), _LESION),
    "cyst": Code("367643001", "Cyst"),
    "mass": Code("4147007", "Mass"),
    "nodule": Code("27925004", "Nodule"),
    "hematoma": Code("35566002", "Hematoma"),
    "hemorrhage": Code("50960005", "Hemorrhage"),
    "edema": Code("79654002", "Edema"),
}
"""What the last word of a name means, where the words before it say in which organ."""

_AMERICAN = (("tumour", "tumor"), ("haem", "hem"), ("oesoph", "esoph"), ("oedema", "edema"))


def term(name: str) -> Term:
    """The term of an object's name, in whatever case and with or without a side or a plural s.

    What the table does not hold is looked up in DICOM's context groups of anatomy (CID 7151), tissue (7166) and
    findings (7159); a name that nobody knows is "Tissue" in a colour that depends on the name alone.
    """
    plain, table = _plain(name), _table()
    for spelled in (plain, plain.removesuffix("s")):
        if spelled in table:
            return table[spelled]
    side, _, rest = plain.partition(" ")
    if side in _MODIFIERS and rest and (found := term(rest)).known:
        return replace(found, modifier=found.modifier or _MODIFIERS[side])
    where, _, last = plain.rpartition(" ")
    if finding := _FINDINGS.get(last) or _FINDINGS.get(last.removesuffix("s")):
        organ = term(where) if where else None
        region = organ.kind if organ is not None and organ.known and organ.category != _ABNORMAL else None
        return Term(_ABNORMAL, finding, None, region, _own_colour(plain))
    return _from_dicom(plain) or Term(_TISSUE, _TISSUE, None, None, _own_colour(plain), known=False)


def colours(names: Iterable[str]) -> dict[str, Rgb]:
    """A colour for each name, its own where no earlier name has it, so that all in one file differ (up to 8 more)."""
    chosen: dict[str, Rgb] = {}
    for name in names:
        wanted = (term(name).colour, *_OTHERS)
        chosen[name] = next((one for one in wanted if one not in chosen.values()), wanted[0])
    return chosen


@cache
def _table() -> dict[str, Term]:
    """The terms by name, in small letters and without signs."""
    text = files("ibisagent.volumes").joinpath("terms.csv").read_text(encoding="utf-8")
    read: dict[str, Term] = {}
    for row in csv.DictReader(text.splitlines()):
        category, kind, modifier, region = (_code(row[column]) for column in _COLUMNS[1:5])
        colour = bytes.fromhex(row["colour"].removeprefix("#"))
        read[_plain(row["name"])] = Term(
            category or _TISSUE, kind or _TISSUE, modifier, region, (colour[0], colour[1], colour[2])
        )
    return read


def _plain(name: str) -> str:
    """A name as the table is searched for it: small letters, American spelling, one blank between words."""
    plain = " ".join(re.sub(r"[_\W]+", " ", name.casefold()).split())
    for british, american in _AMERICAN:
        plain = plain.replace(british, american)
    return plain


def _code(cell: str) -> Code | None:
    """A cell of the table, "10200004 Liver"; None where it is empty."""
    value, _, meaning = cell.partition(" ")
    return Code(value, meaning) if cell else None


def _from_dicom(plain: str) -> Term | None:
    from pydicom.sr.codedict import codes

    spelled = "".join(word.capitalize() for word in plain.split())
    for keyword in filter(str.isidentifier, (spelled, spelled.removesuffix("s"))):
        for group, category in (
            (codes.cid7159, codes.cid7150.MorphologicallyAbnormalStructure),
            (codes.cid7166, codes.cid7150.Tissue),
            (codes.cid7151, codes.cid7150.AnatomicalStructure),
        ):
            if keyword in group.dir():
                found = getattr(group, keyword)
                kind = Code(found.value, found.meaning, found.scheme_designator)
                return Term(Code(category.value, category.meaning), kind, None, None, _own_colour(plain))
    return None


def _own_colour(plain: str) -> Rgb:
    """One of `_OTHERS`, the same for a name in every file."""
    return _OTHERS[hashlib.sha256(plain.encode()).digest()[0] % len(_OTHERS)]
