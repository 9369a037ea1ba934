"""Whether what was taught is better than what was there: cross-validation over patients, decided object by object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibisagent.evaluation.reliability import MIN_CASES, Reliability, fit
from ibisagent.evaluation.statistics import Interval, patient_interval, patient_sureness
from ibisagent.training.teach.part import Compared, Result

SURE_NEW, SURE_KNOWN = 0.5, 0.8
"""Share of the resamplings of the patients in which the expert must be better: of an object that the old policy never
learned, and of one that it did, where there is something to lose."""
ACCEPTED = 0.85
"""What an IoU counts as at most, of both agents, where the mask is the old agent's own, accepted as it was: it is good
enough, but no judge of which agent is better, as the old one would always be right by it."""
DOUBTED, AGREED = 0.2, 0.6
"""IoU below which a mask may be wrong, where half of the masks of that object are met by the other one."""


@dataclass(frozen=True, slots=True)
class TaughtObject:
    """One object that was taught.

    images: how many show it. known: the old agent had learned an object of this name. before, after: mean IoU of the
    old and the taught agent on the user's own images, each judged by weights that had not seen its patient, at most
    ACCEPTED for a mask that the old agent made; None where nothing could be checked. interval: 95% of after - before,
    None where fewer than two patients show the object. kept: the taught weights answer for it; else the old agent does.
    reason: why. doubtful: image files whose masks are unlike what the others teach: worth a look.
    """

    name: str
    images: int
    known: bool
    before: float | None
    after: float | None
    interval: tuple[float, float] | None
    kept: bool
    reason: str
    doubtful: tuple[str, ...] = ()


def decide(name: str, images: int, known: bool, compared: Sequence[Compared], *, check: bool) -> TaughtObject:
    """Whether the expert is to answer for `name`. compared: its pairs that could be judged; check: they should be."""
    own = [_fairly(one) for one in compared if one.object == name]
    if not own:
        if not check:
            return TaughtObject(name, images, known, None, None, None, True, "not checked")
        kept = not known
        told = "taught, unchecked" if kept else "left as it was, as the old agent knows this name"
        return TaughtObject(
            name,
            images,
            known,
            None,
            None,
            None,
            kept,
            f"too few images, or patients, to check it on others than it learned: {told}",
        )
    gains = [(one.patient, one.after - one.before) for one in own]
    sure, needed = patient_sureness(gains), SURE_KNOWN if known else SURE_NEW
    before, after = (round(float(np.mean([getattr(one, side) for one in own])), 4) for side in ("before", "after"))
    interval: Interval | None = patient_interval(gains)
    kept = after > before and sure >= needed
    reason = "better on images that it had not seen" if kept else "not surely better: left as it was"
    met = float(np.median([one.after for one in own])) >= AGREED
    doubtful = tuple(sorted(one.image for one in own if met and one.after < DOUBTED))
    return TaughtObject(name, images, known, before, after, interval, kept, reason, doubtful)


def _fairly(one: Compared) -> Compared:
    """`one`, its IoUs at most ACCEPTED where the old agent made the mask."""
    most = ACCEPTED if one.before == 1 else 1.0
    return replace(one, before=min(one.before, most), after=min(one.after, most))


def decide_together(found: Sequence[TaughtObject], compared: Sequence[Compared]) -> list[TaughtObject]:
    """The same objects, kept all or none: an adapter answers for everything."""
    gains = [(one.patient, one.after - one.before) for one in map(_fairly, compared)]
    kept = not gains or patient_sureness(gains) >= SURE_KNOWN
    reason = "better on the whole" if kept else "not surely better on the whole: left as it was"
    return [replace(one, kept=kept, reason=reason if compared else one.reason) for one in found]


def calibration_of(objects: Sequence[TaughtObject], results: Sequence[Result]) -> Reliability | None:
    """How sure the taught weights are, from the masks of the check: each of an object that is kept, drawn by weights
    that had not seen its patient. None for fewer than `MIN_CASES`."""
    names = {one.name for one in objects if one.kept}
    cases = [one for result in results for one in result.compared if one.object in names and one.signals]
    if len(cases) < MIN_CASES:
        return None
    made_with = next(result.made_with for result in results if result.made_with)
    return fit([one.signals for one in cases], [one.after for one in cases], made_with)
