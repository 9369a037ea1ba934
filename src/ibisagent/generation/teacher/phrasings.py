"""How people ask: at least 20 phrasings for every kind of question, some of them kept back for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ibisagent.datasets import CaseRow

HELD_OUT_EVERY = 5
"""Of every so many phrasings the last is never trained on."""


def _each(openings: Sequence[str], endings: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{opening}{ending}" for opening in openings for ending in endings)


PHRASINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "referring": (
            "Segment the {name}.",
            "Find the {name}.",
            "Where is the {name}?",
            "Outline the {name}.",
            "Mark the {name}.",
            "{name}",
            "Show me the {name}.",
            "Locate the {name}.",
            "Delineate the {name}.",
            "Please segment the {name} in this image.",
            "I need a mask of the {name}.",
            "Trace the outline of the {name}.",
            "Highlight the {name}.",
            "Can you segment the {name}?",
            "Draw the contour of the {name}.",
            "Which pixels belong to the {name}?",
            "Point out the {name} and segment it.",
            "Give me the mask of the {name}, please.",
            "Could you mark the {name} in this picture?",
            "Annotate the {name}.",
            "Select the {name}.",
            "Identify and outline the {name}.",
            "Contour the {name} for me.",
            "In this {modality} image, segment the {name}.",
            "We want to see the {name} marked.",
        ),
        "reasoning": _each(
            (
                "Which part of this image shows {description}? ",
                "Look for {description}. ",
                "I am interested in {description}. ",
                "Somewhere here you can see {description}. ",
                "What here is {description}? ",
            ),
            (
                "Segment it.",
                "Find it and outline it.",
                "Say what it is and mark it.",
                "Please delineate it.",
                "Give me its mask.",
            ),
        ),
        "abnormality": _each(
            (
                "Are there any abnormalities? ",
                "Does this image show anything abnormal? ",
                "Do you see a lesion or another finding? ",
                "Is there something here that should not be there? ",
            ),
            (
                "If yes, segment them.",
                "If so, mark what you find.",
                "Outline it if there is.",
                "If there is, delineate it.",
                "Segment it in that case.",
            ),
        ),
        "comparison": _each(
            ("Compare {names}. ", "Look at {names}. ", "This image shows {names}. ", "There are {names} here. "),
            (
                "Segment the one that {property}.",
                "Which one {property}? Outline it.",
                "Mark only the one that {property}.",
                "Find the one that {property} and segment it.",
                "I need the mask of the one that {property}.",
            ),
        ),
        "existence": _each(
            (
                "Is there {a_name} in this image? ",
                "Do you see {a_name}? ",
                "Does this picture show {a_name}? ",
                "Check for {a_name}. ",
                "Can {a_name} be seen here? ",
            ),
            (
                "If so, segment it.",
                "If yes, mark it; if not, say so.",
                "Outline it if it is there.",
                "Segment it only if it is present.",
                "If it is visible, delineate it.",
            ),
        ),
        "multiple": _each(
            ("Segment {names}", "Outline {names}", "Find and mark {names}", "I need masks of {names}", "Show {names}"),
            (".", ", each with its own mask.", " in this image.", ", please.", ", one mask for each of them."),
        ),
        "refinement": _each(
            (
                "This mask of the {name} is not right yet. ",
                "A colleague began to mark the {name}. ",
                "Here is a first mask of the {name}. ",
                "The {name} is marked, but not exactly. ",
                "Continue from my mask of the {name}. ",
            ),
            ("Refine it.", "Correct it.", "Improve the mask.", "Fix what is wrong.", "Make it fit."),
        ),
        "wrong side": _each(
            (
                "Segment the {name}, which lies {claim}.",
                "The {name} is {claim}. Segment it.",
                "You will find the {name} {claim}. Outline it.",
                "Mark the {name} that you see {claim}.",
            ),
            ("", " Thank you.", " Be exact.", " Take your time.", " Please look closely."),
        ),
        "modality": _each(
            (
                "Which imaging modality is this",
                "What kind of medical image is this",
                "How was this image made",
                "What imaging technique do you see here",
                "With which modality was this picture taken",
            ),
            ("?", "? Answer in one word.", "? No segmentation is needed.", "? Just name it."),
        ),
        "organ": _each(
            (
                "Which part of the body or tissue is shown",
                "What region does this image show",
                "Which anatomical site is this",
                "Where in the body was this image taken",
                "What body site do you see",
            ),
            ("?", "? Answer in a word or two.", "? No mask is needed.", "? Just name it."),
        ),
        "side": _each(
            (
                "On which side of the picture is the {name}",
                "In which half of the image does the {name} lie",
                "Is the {name} in the left or in the right half of the picture",
                "Seen from the viewer, on which side of the image is the {name}",
                "Where does the {name} lie, left or right in the picture",
            ),
            ("?", "? Answer left or right.", "? One word is enough.", "? Do not segment it."),
        ),
        "count": _each(
            (
                "In how many separate pieces does the {name} appear",
                "How many separate regions of {name} are visible",
                "Count the separate parts of the {name}",
                "How many unconnected areas does the {name} form",
                "What is the number of separate areas of {name}",
            ),
            (".", ". Answer with a number.", ". Only the number, please.", ". No mask is needed."),
        ),
        "size": _each(
            (
                "Does the {name} take up more than {share} of the picture",
                "Is the {name} larger than {share} of the image",
                "Would you say that the {name} covers over {share} of the picture",
                "Does the area of the {name} exceed {share} of the image",
                "Is more than {share} of this picture {name}",
            ),
            ("?", "? Answer yes or no.", "? One word is enough.", "? Do not segment anything."),
        ),
        "which": _each(
            (
                "Is this {first} or {second}",
                "What is shown here, {first} or {second}",
                "Which of the two is visible, {first} or {second}",
                "Choose: {first} or {second}",
                "Do you see {first} or {second}",
            ),
            ("?", "? Answer with its name.", "? Name it only.", "? No mask is needed."),
        ),
    }
)
"""Question templates by kind."""


def phrasings(kind: str, *, held_out: bool) -> list[tuple[int, str]]:
    """The (number, template) of `kind` that are for training, or those that are kept for evaluation."""
    last = HELD_OUT_EVERY - 1
    return [
        (number, text) for number, text in enumerate(PHRASINGS[kind]) if (number % HELD_OUT_EVERY == last) is held_out
    ]


SHARES: Mapping[str, float] = MappingProxyType({"a tenth": 0.1, "a quarter": 0.25, "half": 0.5, "a twentieth": 0.05})
"""Shares of the image that questions about size name."""

DESCRIPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "aorta": ("the great vessel that carries blood from the heart to the body", "the body's largest artery"),
        "blood vessel": (
            "a channel that carries blood, seen in cross-section",
            "a structure through which blood flows",
        ),
        "brain tumor": ("an abnormal growth within the skull", "a mass in the brain"),
        "carotid artery": ("the artery of the neck that supplies the brain", "the pulsating vessel in the neck"),
        "foveal avascular zone": ("the small area at the centre of the macula that has no capillaries",),
        "glomerulus": (
            "the tuft of capillaries that filters blood in the kidney",
            "the round filtering unit of the kidney",
        ),
        "kidney": ("the organ that makes urine", "the organ that filters the blood and makes urine"),
        "kidney tumor": ("an abnormal growth in the organ that makes urine",),
        "knee bones": ("the bones that meet in the joint between thigh and lower leg",),
        "L5 vertebra": ("the lowest lumbar vertebra",),
        "L5-S1 intervertebral disc": ("the disc between the lowest lumbar vertebra and the sacrum",),
        "L4-L5 intervertebral disc": ("the disc between the two lowest lumbar vertebrae",),
        "L4 vertebra": ("the lumbar vertebra just above the lowest one",),
        "L1 vertebra": ("the uppermost lumbar vertebra",),
        "left atrium": ("the heart chamber that receives blood from the lungs",),
        "left ventricle": ("the heart chamber that pumps blood into the aorta",),
        "right atrium": ("the heart chamber that receives the body's venous blood",),
        "right ventricle": ("the heart chamber that pumps blood to the lungs",),
        "myocardium": ("the muscle of the heart", "the muscular wall of the heart"),
        "pulmonary artery": ("the vessel that carries blood from the heart to the lungs",),
        "left lung": ("the patient's left organ of breathing", "the breathing organ on the patient's left side"),
        "right lung": ("the patient's right organ of breathing", "the breathing organ on the patient's right side"),
        "lung": ("the organ of breathing", "the air-filled organ of the chest"),
        "liver": ("the organ that makes bile", "the large organ that makes bile and stores sugar"),
        "pancreas": ("the gland that makes insulin", "the gland behind the stomach that makes insulin"),
        "spleen": ("the organ that removes old red blood cells", "the lymphatic organ in the left upper abdomen"),
        "nerve": ("the cord that carries signals between brain and muscles", "a bundle of fibres that carries signals"),
        "nucleus": ("the part of a cell that holds its DNA", "where the cells keep their chromosomes"),
        "white blood cell": ("a cell of the immune system", "the leukocyte"),
        "white blood cell nucleus": ("the part of the leukocyte that holds its DNA", "the lobed core of the leukocyte"),
        "optic cup": ("the pit in the middle of where the optic nerve leaves the eye",),
        "optic disc": ("the place where the optic nerve leaves the eye", "the blind spot of the eye"),
        "retinal vessel": ("the vessels that supply the light-sensitive layer of the eye",),
        "polyp": ("a growth on the inner wall of the bowel", "a growth that rises from the mucosa"),
        "prostate gland": ("the glandular units of the prostate",),
        "prostate tumor": ("an abnormal growth in the prostate",),
        "skin lesion": ("the abnormal spot on the skin", "the part of the skin that differs from its surroundings"),
        "spinal canal": ("the passage in the spine that holds the nerve roots",),
        "stenotic coronary artery segment": ("a narrowed piece of a vessel that feeds the heart muscle",),
        "anterior hippocampus": ("the front part of the brain structure that forms memories",),
        "posterior hippocampus": ("the rear part of the brain structure that forms memories",),
        "pituitary tumor": ("an abnormal growth of the gland below the brain",),
        "meningioma": ("a growth that comes from the coverings of the brain",),
        "glioma": ("a growth that comes from the brain's supporting cells",),
        "lung tumor": ("an abnormal growth in the organ of breathing",),
        "epidural hematoma": ("blood between the skull and the outer covering of the brain",),
        "subdural hematoma": ("blood below the outer covering of the brain",),
        "subarachnoid hemorrhage": ("blood in the space around the brain that holds its fluid",),
        "intraparenchymal hemorrhage": ("blood within the tissue of the brain",),
        "intraventricular hemorrhage": ("blood in the fluid-filled chambers of the brain",),
        "abdominal aorta and iliac artery": ("the large artery of the abdomen with the two that it divides into",),
        "axon": ("the long fibre of a nerve cell that carries its signals away",),
        "bone fracture": ("a break in a bone", "where the bone is broken"),
        "brainstem": ("the part of the brain that joins the spinal cord",),
        "cell membrane": ("the thin border of the cells", "what encloses the cells"),
        "endotracheal tube": ("the tube through which the patient is ventilated",),
        "esophagus": ("the tube through which food passes to the stomach",),
        "fetal head": ("the head of the unborn child",),
        "fibroglandular breast tissue": ("the dense, milk-producing tissue of the breast",),
        "glial cell": ("a supporting cell of the nervous system",),
        "glottal space": ("the opening between the vocal folds",),
        "hard exudate": ("the bright yellow deposits of fat in the retina",),
        "hippocampus": ("the brain structure that forms memories",),
        "kidney stone": ("a hard deposit in the organ that makes urine",),
        "larynx": ("the voice box",),
        "liver tumor": ("an abnormal growth in the organ that makes bile",),
        "mandible": ("the lower jaw bone",),
        "microaneurysm": ("the smallest red dots in the retina, bulges of its capillaries",),
        "mitochondrion": ("the organelle that supplies the cell with energy",),
        "myelin sheath": ("the insulating layer around a nerve fibre",),
        "nasopharyngeal tumor": ("an abnormal growth in the space behind the nose",),
        "pectoral muscle": ("the muscle of the chest wall behind the breast",),
        "prostate": ("the gland below the bladder of men",),
        "pubic symphysis": ("the joint between the two pubic bones",),
        "soft exudate": ("the pale, fluffy spots in the retina",),
        "spinal cord": ("the cord of nerves within the spine",),
        "synapse": ("the contact at which a nerve cell passes its signal on",),
        "teeth": ("what the patient chews with", "all teeth of the jaws"),
        "vocal fold": ("the fold of the larynx that vibrates when we speak",),
    }
)
"""What objects are or do, for questions that do not name them. Only where one sentence settles which one is meant."""

_ABNORMAL = (
    "tumor",
    "lesion",
    "polyp",
    "hematoma",
    "hemorrhage",
    "mass",
    "cancer",
    "dysplasia",
    "glioma",
    "meningioma",
)
_SIDES = frozenset({"left", "right", "anterior", "posterior", "upper", "lower", "superior", "inferior"})
_DOUBTFUL = ("vessel", "artery", "nerve", "lesion", "aorta", "tissue", "mass", "spinal canal")


def with_article(name: str) -> str:
    """The name with "a" or "an": "an optic disc"."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def is_abnormal(name: str) -> bool:
    """Whether an object of this name is a finding, not anatomy."""
    return any(word in name.lower() for word in _ABNORMAL)


_REGIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("chest", "heart", "lung", "abdomen", "liver", "lumbar spine", "prostate"), frozenset({"torso"})
        ),
        **dict.fromkeys(("neck", "head and neck"), frozenset({"torso", "head"})),
        **dict.fromkeys(("shoulder", "hip"), frozenset({"torso", "limb"})),
        **dict.fromkeys(("transperineal", "fetal head"), frozenset({"torso", "head"})),
        **dict.fromkeys(("knee", "leg", "hand"), frozenset({"limb"})),
        **dict.fromkeys(("colon", "gastrointestinal tract"), frozenset({"gut"})),
        "larynx": frozenset({"larynx"}),
        "brain": frozenset({"head"}),
        "dental": frozenset({"head"}),
        "retinal": frozenset({"eye"}),
    }
)
"""Parts of the body that images of a site may show; sites that are not here may show anything."""


def body_parts(modality: str, site: str) -> frozenset[str]:
    """Coarse regions such that objects of one never show in images of others; none where that is not certain."""
    if modality in ("pathology", "microscopy", "electron microscopy"):
        return frozenset({"cells"})
    return _REGIONS.get(site, frozenset())


class Absences:
    """Names that an image certainly does not show, learned from the rows of the whole data.

    Near misses: other objects of the same data set, where the annotators looked for all of them; never a wider or
    narrower name of one that is there ("lung" for "left lung"). Far ones: objects of other parts of the body.
    """

    def __init__(self, rows: Sequence[CaseRow]) -> None:
        self._of_data_set: dict[str, set[str]] = {}
        parts: dict[str, list[frozenset[str]]] = {}
        for row in rows:
            if row.object:
                self._of_data_set.setdefault(row.dataset, set()).add(row.object)
                parts.setdefault(row.object, []).append(body_parts(row.modality, row.site))
        self._parts = {
            name: frozenset().union(*where)
            for name, where in parts.items()
            if all(where) and not any(word in name for word in _DOUBTFUL)
        }

    def near(self, row: CaseRow, present: Sequence[str]) -> list[str]:
        """Names of the row's data set that none of `present` covers, in order."""
        names = self._of_data_set.get(row.dataset, set()) if row.dataset else set()
        return sorted(name for name in names if not any(_related(name, other) for other in present))

    def far(self, row: CaseRow, present: Sequence[str]) -> list[str]:
        """Names that only occur in other parts of the body, in order."""
        parts = body_parts(row.modality, row.site)
        if not parts:
            return []
        return sorted(
            name
            for name, where in self._parts.items()
            if not parts & where and not any(_related(name, other) for other in present)
        )


def _related(name: str, present: str) -> bool:
    """Whether `name` may be there because `present` is: the same words, fewer of them, or only a side more."""
    words, others = set(name.lower().split()), set(present.lower().split())
    generic = name.lower() in ("suspicious lesion", "lesion", "object")
    return generic or words <= others or (others < words and words - others <= _SIDES)
