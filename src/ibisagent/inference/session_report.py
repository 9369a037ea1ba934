"""The page that `Session.report` gives: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from ibisagent.files import html_page, png_bytes
from ibisagent.inference.image import describe_actions
from ibisagent.protocol import overlay

if TYPE_CHECKING:
    from ibisagent.inference.session import Session


def session_report(session: Session) -> str:
    """The image with its masks, the objects with their areas, every turn and who took it."""
    image, masks = session.image, session.masks
    pixel_mm2 = None if image.spacing_mm is None else image.spacing_mm[0] * image.spacing_mm[1]
    provenance = session.episodes()[-1].provenance
    shown = ("policy", "segmenter", "ibisagent", "policy_weights_sha256", "weights_sha256")
    return html_page(
        "inference/session_report.html",
        title=session.query,
        size=image.size,
        image=base64.b64encode(png_bytes(overlay(image, masks))).decode(),
        pixels={name: int(mask.sum()) for name, mask in masks.items()},
        pixel_mm2=pixel_mm2,
        steps=[(step, step.turn.reply.problem or describe_actions(step.turn.reply.actions)) for step in session.steps],
        provenance=", ".join(f"{key} {provenance[key]}" for key in shown if provenance.get(key)),
    ).decode()
