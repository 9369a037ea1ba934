"""Which tokens may come next in a reply of `ibis-nano`: only those that `protocol.parse` can go on to read.

A small model sometimes writes a word where a place is due, or never ends. So the words that would make its reply
unreadable in dialect "ibis" are ruled out while it writes: a reply is <think>words</think><action>actions</action>,
after a stop <answer>words</answer>, and an action is one of the phrases below; a place is a token of its own, and the
second corner of a box lies right of and below the first. What it means stays the model's own choice.

All of this follows from the tokens of the reply so far, so that learning from a sampled reply can rule out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ibisagent.domain import MAX_NAME_CHARS, MAX_TARGETS

_PLACES = {"point": "named", "first corner": "between", "second corner": "named"}
"""Where a place is due, and what follows it."""
_TEXTS = {
    "thought": {"</think>": "thought out"},
    "named": {";": "next action", "</action>": "end"},
    "absent": {";": "next absent", "</action>": "stopped"},
    "answer": {"</answer>": "end"},
}
"""Where words stand, and how they end."""
_NAMES = ("named", "absent")
_ACTIONS = {"click + ": "point", "click - ": "point", "box ": "first corner", "undo": "undone", "stop": "no more"}
_PHRASES = {
    "reply": {"<think>": "thought", "<action>": "action"},
    "thought out": {"<action>": "action"},
    "action": _ACTIONS,
    "next action": {f" {phrase}": then for phrase, then in _ACTIONS.items()},
    "between": {" ": "second corner"},
    "undone": {f" {steps}": "counted" for steps in range(1, 10)} | {";": "next action", "</action>": "end"},
    "counted": {";": "next action", "</action>": "end"},
    "no more": {";": "next absent", "</action>": "stopped"},
    "next absent": {" absent": "absent"},
    "stopped": {"<answer>": "answer", "<|end|>": "free"},
    "end": {"<|end|>": "free"},
}
"""Where one of few phrases is due, and what follows each."""
_SHARES = {"thought": 0.4, "named": 0.7, "absent": 0.7, "undone": 0.7, "counted": 0.7, "no more": 0.7, "answer": 0.95}
"""Of the longest reply's tokens: after so many, a thought, the actions, an answer come to their end."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a reply its next token stands.

    state: what is due; "free" where anything may come: outside replies. said: what was written since that became due.
    tokens, items: of the reply so far. corner: the first corner of the box under way, as a number of a cell.
    """

    state: str = "free"
    said: str = ""
    tokens: int = 0
    items: int = 0
    corner: int = 0


class Grammar:
    """The grammar in the tokens of one vocabulary: words first, then the cells of a grid of places, row by row."""

    def __init__(self, words: Sequence[str], places: int, longest: int) -> None:
        """words: the text of each. places: cells per axis. longest: tokens of a reply."""
        self._words, self._places, self._longest = words, places, longest
        self._begins = words.index("<|assistant|>")
        self._widest = max(map(len, words))
        self._plain = np.array(["<" not in word and ">" not in word for word in words])  # no tag, nor a part of one
        self._of_names = self._plain & np.array([";" not in word for word in words])
        self._first_of_names = self._of_names & np.array([word.startswith(" ") for word in words])
        self._allowed = lru_cache(maxsize=1024)(self._allowed_words)

    def walk(self, ids: Sequence[int]) -> Iterator[Position]:
        """The position after each token of a conversation."""
        here = Position()
        for token in ids:
            here = Position("reply") if token == self._begins else self._after(here, token)
            yield here

    def end_of(self, ids: Sequence[int]) -> Position:
        """The position after the last token of a conversation."""
        begun = next((place for place in reversed(range(len(ids))) if ids[place] == self._begins), len(ids))
        return [Position(), *self.walk(ids[begun:])][-1]

    def allowed(self, here: Position) -> np.ndarray:
        """(V,) bool: which tokens may come next; at least one."""
        cells = np.full((self._places, self._places), here.state in ("free", "point"))
        if here.state == "first corner":
            cells[:-1, :-1] = True  # leaves room for the second one
        elif here.state == "second corner":
            row, column = divmod(here.corner, self._places)
            cells[row + 1 :, column + 1 :] = True
        late = here.tokens >= _SHARES.get(here.state, 1.0) * self._longest
        long = here.state in _NAMES and len(here.said) + self._widest > MAX_NAME_CHARS
        last = late or here.items + 1 >= MAX_TARGETS
        said = here.said if here.state in _PHRASES else here.said[:1]
        return np.concatenate([self._allowed(here.state, said, late or long, last), cells.ravel()])

    def _after(self, here: Position, token: int) -> Position:
        """The position after one more token; "free" after one that is not allowed."""
        state, tokens = here.state, here.tokens + 1
        if token >= len(self._words):
            then = _PLACES.get(state, "free")
            return Position(then, "", tokens, here.items, token - len(self._words))
        word, said = self._words[token], here.said + self._words[token]
        then = _TEXTS[state].get(word, "") if state in _TEXTS else _PHRASES.get(state, {}).get(said, "")
        if then:
            return Position(then, "", tokens, here.items + then.startswith("next"), here.corner)
        goes_on = state in _TEXTS or any(phrase.startswith(said) for phrase in _PHRASES.get(state, ()))
        return replace(here, said=said, tokens=tokens) if goes_on else Position()

    def _allowed_words(self, state: str, said: str, ending: bool, last: bool) -> np.ndarray:
        """(words,) bool. ending: free text comes to its end; last: no further action follows."""
        if state == "free":
            return np.ones(len(self._words), dtype=bool)
        ends = _TEXTS.get(state) or _PHRASES.get(state, {})
        if last:
            ends = {phrase: then for phrase, then in ends.items() if not then.startswith("next")}
        if state in _TEXTS:
            found = np.array([word in ends for word in self._words])
            words = self._plain if state not in _NAMES else self._of_names if said else self._first_of_names
            return found if ending else found | words
        begins = [any(end.startswith(said + word) for end in ends) for word in self._words]
        allowed: np.ndarray = np.array([said + word in ends for word in self._words]) | (self._plain & begins)
        return allowed
