"""What a policy learned, as `objects.json` beside its weights says: names of objects, and images that can show them.

A kind of image is a modality with a body site, and is told from the policy's own image features by a linear map. How
likely it is that an image shows an object: the share of the kinds that can show it, times a logistic function of the
highest logit of the policy's map of that object. `training.nano.vocabulary` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ibisagent.domain import MAX_TARGETS
from ibisagent.errors import PolicyError
from ibisagent.files import reading
from ibisagent.query import Request, requests

FILE = "objects.json"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a policy can say of one object of a request before it acts.

    known, nearest: as in `query.Request`. presence: how likely the image shows it, in [0, 1]; below the vocabulary's
    `absent_below` the policy calls it absent.
    """

    name: str
    known: bool
    nearest: str | None
    presence: float


@dataclass(frozen=True, eq=False)
class Look:
    """What a policy sees of one object in one image.

    kinds: probabilities of the vocabulary's kinds of images. region: (L, L) logits of where the object is.
    """

    kinds: np.ndarray
    region: np.ndarray


@dataclass(frozen=True, slots=True)
class Presence:
    """From the highest logit of an object's map to how likely the object is there: a logistic function of this slope
    and shift. absent_below: what is less likely is called absent."""

    slope: float
    shift: float
    absent_below: float


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The names that a policy learned, and what it takes for presence.

    kinds: (modality, site) of each kind of image. learned, possible: by name, the kinds whose images taught it, and
    those that can show it. weights (K, F), biases (K,): kinds from image features. usual: what is taken for presence,
    own: of the names that have their own.
    """

    kinds: tuple[tuple[str, str], ...]
    learned: Mapping[str, tuple[int, ...]]
    possible: Mapping[str, tuple[int, ...]]
    weights: np.ndarray
    biases: np.ndarray
    usual: Presence
    own: Mapping[str, Presence] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """The vocabulary in a folder of weights; None where there is none. PolicyError for a damaged one."""
        path = folder / FILE
        if not path.is_file():
            return None
        with reading(path, "download or copy the folder again", PolicyError):
            said = json.loads(path.read_bytes())
            objects, presence = said["objects"], said["presence"]
            return cls(
                tuple((str(modality), str(site)) for modality, site in said["kinds"]),
                {name: tuple(one["learned"]) for name, one in objects.items()},
                {name: tuple(one["possible"]) for name, one in objects.items()},
                np.array(said["weights"], dtype=np.float32),
                np.array(said["biases"], dtype=np.float32),
                Presence(*(float(presence[name]) for name in ("slope", "shift", "absent_below"))),
            )

    def requests(self, query: str, kinds: Callable[[], np.ndarray]) -> tuple[Request, ...]:
        """As `query.requests`. kinds: of the image, for "everything": all objects that its likeliest kind taught."""
        return requests(query, self.learned, lambda: self._shown_by(kinds()))

    def named(self, query: str) -> Request | None:
        """The one object that a query names; None where it names none or more than one."""
        found = requests(query, self.learned, lambda: ())
        return found[0] if len(found) == 1 else None

    def count(self, query: str) -> int:
        """How many objects a query asks for at most; at least 1."""
        return max(1, len(requests(query, self.learned, lambda: [f"object {n}" for n in range(MAX_TARGETS)])))

    def kinds_of(self, features: np.ndarray) -> np.ndarray:
        """Probabilities of the kinds (K,) of an image, from its mean features (F,)."""
        logits = self.weights @ features + self.biases
        shares = np.exp(logits - logits.max())
        probabilities: np.ndarray = shares / shares.sum()
        return probabilities

    def meant(self, request: Request) -> str | None:
        """The learned name that a request is about: itself, the one that it misspells, or the one that it is a kind of,
        as a left kidney is where kidneys are; None for what was never learned."""
        nearest = request.nearest
        if request.known:
            return request.asked
        if nearest is None or not (request.asked == nearest or request.name.lower().endswith(f" {nearest.lower()}")):
            return None
        return nearest

    def presence(self, request: Request, look: Look) -> float:
        """How likely the image shows what is asked for, in [0, 1]."""
        name = self.meant(request)
        possible = 1.0 if name is None else float(look.kinds[list(self.possible[name])].sum())
        line = self._line(name)
        return min(possible, 1.0) / (1.0 + float(np.exp(-(line.slope * float(look.region.max()) + line.shift))))

    def refuses(self, request: Request, look: Look) -> bool:
        """Whether what is asked for is called absent without any turn."""
        return self.presence(request, look) < self._line(self.meant(request)).absent_below

    def _line(self, name: str | None) -> Presence:
        return self.own.get(name, self.usual) if name is not None else self.usual

    def with_taught(self, other: Vocabulary, names: Collection[str]) -> Vocabulary:
        """This vocabulary, in which `names` mean what they mean in `other`, with its presence.

        Images of every kind can show them: no map of kinds was fitted with theirs in mind.
        """
        here = {kind: number for number, kind in enumerate(self.kinds)}
        learned = {
            name: tuple(here[other.kinds[kind]] for kind in other.learned[name] if other.kinds[kind] in here)
            for name in names
        }
        everywhere = tuple(range(len(self.kinds)))
        return replace(
            self,
            learned={**self.learned, **learned},
            possible={**self.possible, **dict.fromkeys(names, everywhere)},
            own={**self.own, **dict.fromkeys(names, other.usual)},
        )

    def asked(self, request: Request, look: Look) -> Asked:
        """What can be said of a request."""
        return Asked(request.name, request.known, request.nearest, round(self.presence(request, look), 4))

    def _shown_by(self, kinds: np.ndarray) -> Sequence[str]:
        likeliest = int(kinds.argmax())
        return [name for name, taught in self.learned.items() if likeliest in taught]
