"""What a policy writes, for policies that are told what to write."""

from __future__ import annotations

from phantoms import SIZE

from ibisagent.domain import Action, Reply
from ibisagent.protocol import write


def text(*actions: Action, thought: str = "", size: tuple[int, int] = SIZE) -> str:
    """A reply with these actions. size: (H, W) of the image that they are in."""
    return write(Reply(thought, actions), size, dialect="ibis")
