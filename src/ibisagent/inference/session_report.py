"""The page that `Session.report` gives: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

from ibisagent.files import png_bytes
from ibisagent.inference.image import describe_actions
from ibisagent.protocol import overlay

if TYPE_CHECKING:
    from ibisagent.inference.session import Session

_REPORT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111}}
img{{max-width:100%;height:auto}}table{{border-collapse:collapse;width:100%}}
td,th{{border-bottom:1px solid #ccc;padding:.3rem .5rem;text-align:left;vertical-align:top}}</style>
<h1>{title}</h1>
<p>{size}. Research software: not for clinical use.</p>
<img alt="the image with its masks" src="data:image/png;base64,{image}">
<h2>Objects</h2><table><tr><th>object<th>pixels<th>area</tr>{objects}</table>
<h2>Turns</h2><table><tr><th>turn<th>by<th>thought<th>action<th>predicted quality</tr>{turns}</table>
<p>Made by {provenance}.</p></html>
"""


def session_report(session: Session) -> str:
    """The image with its masks, the objects with their areas, every turn and who took it."""
    image, masks = session.image, session.masks
    encoded = png_bytes(overlay(image, masks))
    objects = []
    for name, mask in masks.items():
        pixels = int(mask.sum())
        area = (
            "not known" if image.spacing_mm is None else f"{pixels * image.spacing_mm[0] * image.spacing_mm[1]:.1f} mm²"
        )
        objects.append(f"<tr><td>{html.escape(name)}<td>{pixels}<td>{area}</tr>")
    turns = []
    for number, step in enumerate(session.steps, 1):
        reply, score = step.turn.reply, step.turn.segmenter_score
        cells = (
            str(number),
            step.by,
            reply.thought,
            reply.problem or describe_actions(reply.actions),
            "" if score is None else f"{score:.2f}",
        )
        turns.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>")
    provenance = session.episodes()[-1].provenance
    shown = ("policy", "segmenter", "ibisagent", "policy_weights_sha256", "weights_sha256")
    return _REPORT.format(
        title=html.escape(session.query),
        size=f"{image.size[1]} x {image.size[0]} pixels",
        image=base64.b64encode(encoded).decode(),
        objects="".join(objects),
        turns="".join(turns),
        provenance=html.escape(", ".join(f"{key} {provenance[key]}" for key in shown if provenance.get(key))),
    )
