"""Questions with their answers, from the facts of the pairs: no pixels and no segmenter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ibisagent.datasets import CaseRow
from ibisagent.domain import MAX_NAME_CHARS
from ibisagent.generation.config import FactoryConfig, Question
from ibisagent.generation.filters import is_trained_on
from ibisagent.generation.teacher.phrasings import DESCRIPTIONS, SHARES, Absences, is_abnormal, phrasings, with_article

VAGUE_SITES = ("tissue", "cell")


class QuestionGenerator:
    """Writes the questions of one image. The draws depend on the seed and the pair alone."""

    def __init__(self, config: FactoryConfig, rows: Sequence[CaseRow]) -> None:
        """rows: of the whole data, for the names of what is absent."""
        self._config = config
        self._absences = Absences([row for row in rows if len(row.object) <= MAX_NAME_CHARS])

    def ask(self, rows: Sequence[CaseRow], facts: Mapping[str, Mapping[str, Any]]) -> list[Question]:
        """All questions about the image of `rows`; those of self-reflection are asked by `ask_again`."""
        questions: list[Question] = []
        for row in rows:
            known = facts.get(row.id)
            if known is None:
                continue
            draw = _Draw(self._config, row)
            if known["present"]:
                questions += self._present(draw, rows, facts)
            questions += self._absent(draw, rows, known)
            questions += self._words(draw, rows, facts)
        return questions

    def ask_again(self, rows: Sequence[CaseRow], facts: Mapping[str, Mapping[str, Any]]) -> list[Question]:
        """Questions of self-reflection: their episodes err and take it back, or begin with something inconsistent."""
        questions: list[Question] = []
        for row in rows:
            known = facts.get(row.id)
            if known is None or not known["present"]:
                continue
            draw, made = _Draw(self._config, row), known["episodes"]
            if "self_correcting" in made:
                questions.append(draw.question("correction", "referring", expert="self_correcting", name=row.object))
            if "unrelated" in made:
                questions.append(
                    draw.question("inconsistency", "refinement", expert="unrelated", start=True, name=row.object)
                )
            elif draw.chance("claim") < self._config.inconsistency and (claim := _false_side(known)):
                questions.append(
                    draw.question("inconsistency", "wrong side", expert="plain", name=row.object, claim=claim)
                )
        return questions

    def _present(self, draw: _Draw, rows: Sequence[CaseRow], facts: Mapping[str, Mapping[str, Any]]) -> list[Question]:
        config, row, known = self._config, draw.row, facts[draw.row.id]
        made = [draw.question("referring", "referring", name=row.object) for _ in range(config.referring)]
        alone = not any(_same_words(other.object, row.object) for other in rows if other.id != row.id)
        for _ in range(config.reasoning):
            ways = [("reasoning", {"description": text}) for text in DESCRIPTIONS.get(row.object, ()) if alone]
            if len(rows) == 1 and is_abnormal(row.object):
                ways.append(("abnormality", {}))
            ways += [("comparison", words) for words in _comparisons(row, rows, facts)]
            if ways:
                kind, words = draw.pick(ways)
                made.append(draw.question("reasoning", kind, **words))
            else:
                made.append(draw.question("referring", "referring", name=row.object))
        made += [draw.question("existence", "existence", name=row.object) for _ in range(config.existence)]
        if "start" in known["episodes"]:
            made += [
                draw.question("refinement", "refinement", expert="start", start=True, name=row.object)
                for _ in range(config.refinement)
            ]
        else:
            made += [draw.question("referring", "referring", name=row.object) for _ in range(config.refinement)]
        if "multiple" in known["episodes"]:
            by_id = {other.id: other for other in rows}
            asked = [by_id[row_id] for row_id in known["multiple"]]
            names = _listed([f"the {other.object}" for other in asked])
            made += [
                draw.question("multiple", "multiple", expert="multiple", rows=asked, names=names)
                for _ in range(config.multiple)
            ]
        return made

    def _absent(self, draw: _Draw, rows: Sequence[CaseRow], known: Mapping[str, Any]) -> list[Question]:
        if not known["present"]:
            names = [draw.row.object] * self._config.absent
        else:
            present = [row.object for row in rows]
            near, far = self._absences.near(draw.row, present), self._absences.far(draw.row, present)
            names = []
            for number in range(self._config.absent):
                choice = near if number % 2 == 0 else far
                choice = [name for name in choice or near or far if name not in names]
                names += [draw.pick(choice)] if choice else []
        return [
            draw.question("existence", draw.pick(["existence", "referring"]), expert="", absent=name, name=name)
            for name in names
        ]

    def _words(self, draw: _Draw, rows: Sequence[CaseRow], facts: Mapping[str, Mapping[str, Any]]) -> list[Question]:
        row, known = draw.row, facts[draw.row.id]
        ways: list[tuple[str, str, dict[str, Any]]] = []
        if row.modality:
            ways.append(("modality", row.modality, {}))
        if row.site and row.site not in VAGUE_SITES:
            ways.append(("organ", row.site, {}))
        if known["present"]:
            left, right = known["extent"]
            if right < 0.48 or left > 0.52:
                ways.append(("side", "left" if right < 0.48 else "right", {}))
            if known["pieces"]:
                ways.append(("count", str(known["pieces"]), {}))
            near = self._absences.near(row, [other.object for other in rows])
            if near and not is_abnormal(row.object):
                other = draw.pick(near)
                pair = [row.object, other] if draw.chance("order") < 0.5 else [other, row.object]
                ways.append(("which", row.object, {"first": pair[0], "second": pair[1]}))
            for share, value in SHARES.items():
                if not 0.75 * value < known["area"] < 1.3 * value:
                    ways.append(("size", "yes" if known["area"] > value else "no", {"share": share}))
        made: list[Question] = []
        kinds = list(dict.fromkeys(kind for kind, _, _ in ways))
        while ways and len(made) < self._config.vqa:
            kind = draw.pick(kinds)
            kinds = [other for other in kinds if other != kind] or list(dict.fromkeys(k for k, _, _ in ways))
            _, answer, words = draw.pick([way for way in ways if way[0] == kind])
            made.append(draw.question("vqa", kind, expert="", answer=answer, name=row.object, **words))
        return made


class _Draw:
    """Draws for one pair, and questions about it."""

    def __init__(self, config: FactoryConfig, row: CaseRow) -> None:
        self.row = row
        self._config = config
        self._random = config.random(row.id, "questions")
        self._made = 0
        self._used: set[tuple[str, int]] = set()

    def chance(self, what: str) -> float:
        return float(self._config.random(self.row.id, what).random())

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self._random.integers(len(choices)))]

    def question(
        self,
        family: str,
        kind: str,
        *,
        expert: str = "plain",
        rows: Sequence[CaseRow] = (),
        answer: str = "",
        absent: str = "",
        start: bool = False,
        claim: str = "",
        **words: str,
    ) -> Question:
        row = self.row
        asked = list(rows) or [row]
        evaluation = not is_trained_on(row.split)
        offered = phrasings(kind, held_out=evaluation)
        fresh = [item for item in offered if (kind, item[0]) not in self._used] or offered
        number, template = self.pick(fresh)
        self._used.add((kind, number))
        self._made += 1
        words = {"modality": row.modality or "medical", "claim": claim, **words}
        words["a_name"] = with_article(words.get("name", row.object))
        return Question(
            # the family keeps ids of the two rounds of questions apart
            id=f"{row.id}?{family}-{self._made}",
            rows=[other.id for other in asked],
            family=family,
            kind=kind,
            phrasing=number,
            held_out=evaluation,
            query=template.format(**words),
            answer=answer,
            targets=[] if absent or answer else [other.object for other in asked],
            absent=[absent] if absent else [],
            expert=f"{row.id}|{expert}" if expert else "",
            claim=claim,
            start=start,
            image=str(row.image),
            split=row.split,
            patient=row.patient,
            modality=row.modality,
            dataset=row.dataset,
            licence_class=row.licence_class,
        )


def _comparisons(row: CaseRow, rows: Sequence[CaseRow], facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Comparisons with one other object of the image that `row` wins clearly."""
    here = facts[row.id]
    ways = []
    for other in rows:
        there = facts.get(other.id)
        if other.id == row.id or there is None or not there["present"] or _same_words(row.object, other.object):
            continue
        names = _listed(sorted([f"the {row.object}", f"the {other.object}"]))
        gaps = {"area": here["area"] / there["area"]}
        across, down = (a - b for a, b in zip(here["centre"], there["centre"], strict=True))
        wins = {
            "is larger": gaps["area"] > 1.5,
            "is smaller": gaps["area"] < 0.66,
            "lies further left": across < -0.15,
            "lies further right": across > 0.15,
            "lies further up": down < -0.15,
            "lies further down": down > 0.15,
        }
        ways += [{"names": names, "property": what} for what, so in wins.items() if so]
    return ways


def _false_side(known: Mapping[str, Any]) -> str:
    left, right = known["extent"]
    if right < 0.45:
        return "on the right of the picture"
    return "on the left of the picture" if left > 0.55 else ""


def _same_words(name: str, other: str) -> bool:
    """Whether one name is part of the other ("lung", "left lung"), so that a comparison would be of one thing."""
    words, others = set(name.lower().split()), set(other.lower().split())
    return words <= others or others <= words


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def final_answer(question: Question, place: str) -> str:
    """The text answer that ends the episode. place: of the first target in the image, "" where unclear."""
    if question.answer:
        return question.answer
    if question.absent:
        name = question.absent[0]
        return f"No, there is no {name} in this image." if question.kind == "existence" else f"There is no {name} here."
    names = _listed([f"the {name}" for name in question.targets])
    are = "is" if len(question.targets) == 1 else "are"
    begun = names[0].upper() + names[1:]
    if question.claim:
        return f"{begun} {are} segmented; it lies {place}, not {question.claim}."
    if question.family == "inconsistency":
        return f"The mask you gave showed something else; I discarded it. {begun} {are} segmented."
    if question.kind == "existence":
        return f"Yes, {names} {are} visible and segmented."
    if question.kind == "abnormality":
        return f"Yes: {names} {are} visible and segmented."
    if question.kind in ("reasoning", "comparison"):
        return f"It is {names}, which {are} now segmented."
    return f"{begun} {are} {'corrected' if question.kind == 'refinement' else 'segmented'}."
