"""Which objects a sentence asks for, by which of the names that a policy learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibisagent.errors import ConfigError
from ibisagent.generation.teacher.phrasings import phrasings, with_article
from ibisagent.query import requests

NAMES = (
    *("optic disc", "optic cup", "retinal vessel", "liver", "liver tumor", "kidney", "kidney tumor", "spleen", "aorta"),
    *("left lung", "right lung", "lung", "left ventricle", "right ventricle", "nucleus", "mitochondrion", "breast"),
    *("benign breast tumor", "malignant breast tumor", "abdominal aorta and iliac artery", "L3 vertebra"),
    *("L5 vertebra", "L4-L5 intervertebral disc", "carotid artery", "esophagus", "soft exudate"),
)


def asked(query: str) -> list[tuple[str, bool]]:
    """(the name that the policy is asked for, whether it learned that) of each object."""
    return [(one.asked, one.known) for one in requests(query, NAMES)]


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("OPTIC DISC", "optic disc"),
        ("SEGMENT THE OPTIC DISC!", "optic disc"),
        ("Outline the papilla, please.", "optic disc"),
        ("optic nerve head", "optic disc"),
        ("Optic-Disk", "optic disc"),
        ("LV", "left ventricle"),
        ("Please mark the RV in this scan.", "right ventricle"),
        ("lien", "spleen"),
        ("HEPAR", "liver"),
        ("liver tumour", "liver tumor"),
        ("oesophagus", "esophagus"),
        ("retinal vessels", "retinal vessel"),
        ("Segment both lungs.", "lung"),
        ("nuclei", "nucleus"),
        ("mitochondria", "mitochondrion"),
        ("carotid arteries", "carotid artery"),
        ("Lt lung", "left lung"),
        ("lung (right)", "right lung"),
        ("pulmo sinister", "left lung"),
        ("L4/L5 disc", "L4-L5 intervertebral disc"),
        ("abdominal aorta and iliac artery", "abdominal aorta and iliac artery"),
        ("Segment the abdominal aorta and iliac artery.", "abdominal aorta and iliac artery"),
        ("Wo ist die Leber?", "liver"),
        ("Montrez-moi le foie, s'il vous plaît", "liver"),
        ("¿Dónde está el hígado?", "liver"),
        ("segmentation of the liver", "liver"),
        ("Is there a liver in this image? If so, segment it.", "liver"),
    ],
)
def test_other_words_for_a_learned_name_mean_that_name(query: str, name: str) -> None:
    assert asked(query) == [(name, True)]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("Segment the optic disc and the optic cup.", ["optic disc", "optic cup"]),
        ("liver, spleen and aorta", ["liver", "spleen", "aorta"]),
        ("liver, spleen, and aorta", ["liver", "spleen", "aorta"]),
        ("liver & spleen", ["liver", "spleen"]),
        ("liver; spleen", ["liver", "spleen"]),
        ("liver and spleen", ["liver", "spleen"]),
        ("Segment the liver. Segment the spleen.", ["liver", "spleen"]),
        ("I need masks of the RV and the LV.", ["right ventricle", "left ventricle"]),
        ("left and right lung", ["left lung", "right lung"]),
        ("benign and malignant breast tumors", ["benign breast tumor", "malignant breast tumor"]),
        ("the liver, the Liver and the LIVER", ["liver"]),
    ],
)
def test_multiple_objects_are_told_apart(query: str, names: list[str]) -> None:
    assert asked(query) == [(name, True) for name in names]


def test_an_object_that_was_never_learned_may_stand_beside_one_that_was() -> None:
    assert asked("the liver and the gallbladder") == [("liver", True), ("gallbladder", False)]
    assert asked("left and right kidney") == [("left kidney", False), ("right kidney", False)]


@pytest.mark.parametrize(
    "query",
    [
        "breast and ovarian cancer",
        "head and neck",
        "kidney and liver tumor",
        "Segment the soft tissue and bone sarcoma.",
    ],
)
def test_what_may_be_one_object_or_two_is_refused(query: str) -> None:
    with pytest.raises(ConfigError, match="one object or"):
        requests(query, NAMES)


@pytest.mark.parametrize("query", ["segment everything", "all organs", "Please segment all objects in this image."])
def test_everything_is_what_the_caller_knows_of_the_image_or_refused(query: str) -> None:
    with pytest.raises(ConfigError, match="everything"):
        requests(query, NAMES)
    found = requests(query, NAMES, lambda: ["optic disc", "optic cup"])
    assert [one.asked for one in found] == ["optic disc", "optic cup"]


def test_more_objects_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        requests(", ".join(NAMES[:9]), NAMES)


@pytest.mark.parametrize(
    ("query", "name", "is_asked", "nearest"),
    [
        ("Segment the optc disc.", "optc disc", "optic disc", "optic disc"),
        ("livr", "livr", "liver", "liver"),
        ("left lnug", "left lnug", "left lung", "left lung"),
        ("nucleolus", "nucleolus", "nucleolus", "nucleus"),
        ("left kidney", "left kidney", "left kidney", "kidney"),
        ("gallbladder", "gallbladder", "gallbladder", None),
        ("fovea", "fovea", "fovea", None),
        ("L6 vertebra", "L6 vertebra", "l6 vertebra", "L5 vertebra"),
        ("DISC", "DISC", "disc", None),
    ],
)
def test_a_name_that_was_never_learned_is_said_to_be_so(
    query: str, name: str, is_asked: str, nearest: str | None
) -> None:
    [one] = requests(query, NAMES)
    assert (one.name, one.asked, one.known, one.nearest) == (name, is_asked, False, nearest)


def test_a_learned_name_is_never_taken_for_another() -> None:
    for name in NAMES:
        [one] = requests(name, NAMES)
        assert (one.asked, one.known) == (name, True)


@pytest.mark.parametrize("kind", ["referring", "existence", "refinement", "wrong side"])
def test_every_phrasing_names_its_object(kind: str) -> None:
    for held_out in (False, True):
        for _, text in phrasings(kind, held_out=held_out):
            claim = "on the left of the image"
            query = text.format(name="optic disc", a_name=with_article("optic disc"), modality="fundus", claim=claim)
            assert asked(query) in ([("optic disc", True)], []), query  # none: a description


@pytest.mark.parametrize(
    "kind", ["modality", "organ", "side", "count", "size", "which", "abnormality", "reasoning", "comparison"]
)
def test_questions_that_name_no_object_to_segment_name_none(kind: str) -> None:
    words = {"description": "the organ that makes bile", "names": "the liver and the spleen", "property": "is larger"}
    words |= {"first": "liver", "second": "spleen", "share": "half", "name": "liver"}
    for held_out in (False, True):
        for _, text in phrasings(kind, held_out=held_out):
            assert requests(text.format(**words), NAMES) == (), text


@given(st.text(max_size=200))
def test_any_text_gives_requests_or_one_clear_error(query: str) -> None:
    problem, found = "", ()
    try:
        found = requests(query, NAMES)
    except ConfigError as error:
        problem = str(error)
    assert "\n" not in problem
    assert len(found) <= 8
    assert all(one.name and one.asked for one in found)
