"""The web page: one image, one person, one agent. Gradio, mounted in the server's application.

The page holds no truth of its own: what is seen comes from the `Session` in the service, by its id.
"""

from __future__ import annotations

import asyncio
import base64
import html
import io
import os
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import gradio as gr
import numpy as np
import PIL.Image
from fastapi import FastAPI
from starlette.routing import Mount

from ibisagent.domain import Box, Click, Image, Masks, standing
from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import one_line
from ibisagent.inference.image import describe_actions
from ibisagent.inference.session import RunEnd, Session, Step
from ibisagent.protocol import COLOURS, OPACITY, overlay
from ibisagent.server.app import AgentThreads
from ibisagent.server.service import VOLUME_SUFFIXES, Service, VolumeLike
from ibisagent.server.visitors import PageDoor, Uploads, visitor_in

FILE_TYPES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", *VOLUME_SUFFIXES, ".gz"]
SAMPLE_QUERY = "Segment the optic disc."
POSITIVE, NEGATIVE, BOX = "Positive click", "Negative click", "Box (two corners)"
NOW = "as it is now"
THINKING = "The agent is thinking ..."
SHOWN_SIDE = 1200  # pixels: smaller pictures are enlarged by whole factors
JPEG_QUALITY = 85
MAX_VOLUMES = 4  # kept in memory
ENDS: dict[RunEnd, str] = {
    "stopped": "The agent says that it is done.",
    "max_turns": "The agent has used its turns. Let it go on, or correct the mask yourself.",
    "malformed": "The agent wrote something that cannot be read, twice. Correct the mask yourself.",
    "repeated": "The agent repeats itself. Correct the mask yourself, or ask differently.",
    "taken_over": "You have taken over.",
}
CSS = """
.gradio-container {max-width: 1500px !important; margin: 0 auto !important}
#picture img {cursor: crosshair}
#turns {max-height: 22rem; overflow-y: auto}
#turns ol {margin: 0; padding-left: 1.4rem}
#turns li {margin: 0 0 .5rem; padding: 0}
#turns .person {border-left: 4px solid #1e64ff; padding-left: .5rem}
#turns .agent {border-left: 4px solid #22c55e; padding-left: .5rem}
#turns .act {font-family: ui-monospace, monospace; font-size: .85em; overflow-wrap: anywhere}
.chip {display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .3em}
#status {min-height: 2.2rem; font-size: 1.05em}
*:focus-visible {outline: 3px solid #1e64ff !important; outline-offset: 1px}
"""


@dataclass
class Desk:
    """What one browser tab works on: the open session, a box's first corner, and a volume's slice where there is one.

    visitor: whose tab it is; the sessions that are opened here are theirs alone.
    slices: the sessions of the slices of the volume that were worked on, by (axis, index, window). hidden: objects that
    are not to be seen. colours: names of COLOURS that were chosen for objects.
    """

    session: str | None = None
    visitor: str | None = None
    corner: tuple[int, int] | None = None
    volume: str | None = None
    name: str = ""
    place: tuple[int, int, str] = (0, 0, "")
    slices: dict[tuple[int, int, str], str] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    colours: dict[str, str] = field(default_factory=dict)


def mount_page(app: FastAPI, service: Service, _threads: AgentThreads) -> None:
    """Serve the page at "/", behind a `PageDoor`. Its uploads lie in the data folder."""
    uploads = Uploads(service.private_folder("uploads/page"))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)  # a file that lies there is used in place, not copied
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    blocks = _in_event_loop(lambda: _mount_gradio(app, Page(service, uploads), service.limits.upload_bytes))
    # Gradio refuses files that were not uploaded, and takes none of an application's own for public, only in one that
    # it launched itself.
    blocks.has_launched = blocks.is_running = True
    for component in blocks.config["components"]:  # they name files of Gradio's makers
        component.pop("example_inputs", None)
    mounted = app.router.routes[-1]
    if not isinstance(mounted, Mount):
        raise RuntimeError("Gradio did not mount the page where its door belongs")
    limit = service.limits.upload_bytes
    mounted.app = PageDoor(mounted.app, uploads, app.state.keys, max_upload=limit, events=frozenset(blocks.fns))


def _mount_gradio(app: FastAPI, page: Page, max_upload: int) -> gr.Blocks:
    blocks = page.build()
    fonts = ["system-ui", "sans-serif"]
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),  # none from elsewhere
        max_file_size=max_upload,
        show_error=False,  # what is not foreseen is for the log, not for visitors
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    return blocks


def _in_event_loop(make: Callable[[], gr.Blocks]) -> gr.Blocks:
    """What `make` gives, made while an event loop runs: else Gradio makes one for each of its locks and closes none."""

    async def made() -> gr.Blocks:
        return make()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(made())
    return make()


class Page:
    """Builds the page and answers its events."""

    def __init__(self, service: Service, uploads: Uploads) -> None:
        self._service, self._uploads = service, uploads
        self._volumes: OrderedDict[str, VolumeLike] = OrderedDict()

    @property
    def _kinds(self) -> list[str]:
        volumes = [] if self._service.volumes is None else ["NIfTI", "DICOM"]
        return ["PNG", "JPEG", "TIFF", "BMP", *volumes]

    # ------------------------------------------------------------------------------------------- what it looks like

    def build(self) -> gr.Blocks:
        """The page, ready to be mounted."""
        with gr.Blocks(title="ibisagent", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
            desk = gr.State(Desk())
            gr.Markdown(
                "## ibisagent: name an object, get its mask\nResearch software: not for clinical use."
                f" Reads {', '.join(self._kinds)}."
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=280):
                    file = gr.File(
                        label="1. Drop an image here",
                        file_types=FILE_TYPES,
                        height=120,
                        elem_id="file",
                    )
                    sample = gr.Button("Take the sample: a photograph of an eye", elem_id="sample", size="sm")
                    query = gr.Textbox(
                        label="2. What is to be segmented?",
                        placeholder="for example: Segment the optic disc.",
                        elem_id="query",
                        max_length=2000,
                    )
                    with gr.Row():
                        run = gr.Button("Let the agent work", variant="primary", elem_id="run", min_width=240)
                        ask = gr.Button("One turn", elem_id="ask", min_width=80)
                        stop = gr.Button("Take over", elem_id="take-over", min_width=80)
                    status = gr.Markdown("Open an image to begin.", elem_id="status")
                    turns = gr.HTML(self._timeline(None), elem_id="turns")
                    moment = gr.Dropdown([NOW], value=NOW, label="Look at", elem_id="moment")
                    fork = gr.Button("Go on from there", elem_id="fork", size="sm")
                with gr.Column(scale=4, min_width=420):
                    picture = gr.Image(
                        label="3. Click on the picture to correct the mask",
                        interactive=False,
                        elem_id="picture",
                        height=560,
                        buttons=["fullscreen"],
                        alt_text="the image with the masks and clicks on it",
                    )
                    with gr.Group(visible=False) as volume_panel, gr.Row():
                        axis = gr.Radio([("sagittal", 0), ("coronal", 1), ("axial", 2)], value=2, label="Direction")
                        index = gr.Slider(0, 1, 0, step=1, label="Slice", elem_id="slice")
                        window = gr.Dropdown([], label="Window", elem_id="window")
                    with gr.Accordion("Before and after", open=False) as compare:
                        before_after = gr.ImageSlider(label="left: the image, right: with its masks", elem_id="compare")
                with gr.Column(scale=2, min_width=260):
                    tool = gr.Radio([POSITIVE, NEGATIVE, BOX], value=POSITIVE, label="A click means", elem_id="tool")
                    target = gr.Dropdown(
                        [],
                        label="for this object (or a new name)",
                        allow_custom_value=True,
                        elem_id="target",
                    )
                    colour = gr.Dropdown(list(COLOURS), label="in this colour", elem_id="colour")
                    with gr.Row():
                        undo = gr.Button("Undo", elem_id="undo", min_width=70, size="md")
                        redo = gr.Button("Redo", elem_id="redo", min_width=70, size="md")
                        reset = gr.Button("Start over", elem_id="reset", min_width=70, size="md")
                    with gr.Accordion("Without a mouse: place by numbers", open=False), gr.Row():
                        column = gr.Number(0, label="x (pixel)", precision=0, minimum=0, min_width=70, elem_id="x")
                        row = gr.Number(0, label="y (pixel)", precision=0, minimum=0, min_width=70, elem_id="y")
                        place = gr.Button("Place", elem_id="place", min_width=70)
                    legend = gr.HTML("", elem_id="legend")
                    shown = gr.CheckboxGroup([], label="Show", elem_id="shown")
                    opacity = gr.Slider(0, 1, OPACITY, step=0.05, label="Opacity of the masks", elem_id="opacity")
                    marks = gr.Checkbox(True, label="Show clicks and boxes", elem_id="marks")
                    accept = gr.Button("The masks are right", elem_id="accept")

            # Pictures are sent as they are: Gradio's postprocessing makes files of them, which it gives to everybody.
            silent: dict[str, Any] = {"api_visibility": "undocumented"}  # programs have /v1
            shows: dict[str, Any] = {**silent, "postprocess": False}
            quiet: dict[str, Any] = {**shows, "show_progress": "hidden"}
            view = [desk, opacity, marks]
            board = [desk, picture, turns, legend, shown, target, colour, moment, status, before_after]
            look = [desk, picture, legend, before_after]

            opened = [desk, query, volume_panel, axis, index, window, status]
            file.upload(self._open_file, [desk, file, query], opened, **silent).then(self._show, view, board, **shows)
            sample.click(self._open_sample, [desk, query], opened, **silent).then(self._show, view, board, **shows)
            run.click(self._run, [*view, query], board, **quiet)
            query.submit(self._run, [*view, query], board, **quiet)
            ask.click(self._ask, [*view, query], board, **quiet)
            stop.click(self._take_over, view, board, **quiet)
            picture.select(self._click, [*view, tool, target, query], board, **quiet)
            place.click(self._place, [*view, tool, target, query, column, row], board, **quiet)
            for button, act in ((undo, "undo"), (redo, "redo"), (reset, "reset"), (accept, "accept")):
                button.click(self._simple(act), view, board, **quiet)
            fork.click(self._fork, [*view, moment], board, **quiet)
            for control in (opacity, marks, moment):
                control.input(self._look, [*view, moment], look, **quiet)
            shown.input(self._hide, [*view, moment, shown], look, **quiet)
            colour.input(self._recolour, [*view, moment, target, colour], look, **quiet)
            target.input(self._colour_of, [desk, target], colour, **quiet)
            compare.expand(self._look, [*view, moment], look, **quiet)
            index.input(  # also at every step of an arrow key; of many at once, the last counts
                self._slice, [*view, axis, index, window], board, **quiet, trigger_mode="always_last"
            )
            axis.input(self._axis, [desk, axis], index, **silent).then(
                self._slice, [*view, axis, index, window], board, **shows
            )
            window.input(self._slice, [*view, axis, index, window], board, **quiet)
        blocks.queue(default_concurrency_limit=16, max_size=256)
        built: gr.Blocks = blocks
        return built

    # ------------------------------------------------------------------------------------------------------ showing

    def _show(self, desk: Desk, opacity: float, marks: bool, said: str = "") -> list[Any]:
        """Everything, as it is now."""
        session = self._session(desk)
        if session is None:
            image = self._picture_of(desk)
            pixels = None if image is None else _inline(_enlarged(image.pixels, _zoom(image)))
            return [
                desk,
                pixels,
                self._timeline(None),
                "",
                gr.update(choices=[], value=[]),
                gr.update(choices=[]),
                gr.update(value=None),
                gr.update(choices=[NOW], value=NOW),
                said or gr.skip(),
                None,
            ]
        names = list(session.masks)
        moments = [NOW, *(f"after turn {number}" for number in range(len(session.steps), -1, -1))]
        picture, legend, pair = self._look_at(session, desk, opacity, marks, NOW)
        return [
            desk,
            picture,
            self._timeline(session),
            legend,
            gr.update(choices=names, value=[name for name in names if name not in desk.hidden]),
            gr.update(choices=list(dict.fromkeys([session.target, *names])), value=session.target),
            self._colour_of(desk, session.target),
            gr.update(choices=moments, value=NOW),
            said or self._summary(session),
            pair,
        ]

    def _look(self, desk: Desk, opacity: float, marks: bool, moment: str) -> list[Any]:
        """The picture alone, as its controls are set."""
        session = self._session(desk)
        if session is None:
            return [desk, gr.skip(), gr.skip(), gr.skip()]
        return [desk, *self._look_at(session, desk, opacity, marks, moment)]

    def _hide(self, desk: Desk, opacity: float, marks: bool, moment: str, shown: list[str]) -> list[Any]:
        session = self._session(desk)
        hidden = frozenset(() if session is None else session.masks).difference(shown)
        return self._look(replace(desk, hidden=hidden), opacity, marks, moment)

    def _recolour(
        self, desk: Desk, opacity: float, marks: bool, moment: str, target: str | None, colour: str
    ) -> list[Any]:
        colours = {**desk.colours, target: colour} if target else desk.colours
        return self._look(replace(desk, colours=colours), opacity, marks, moment)

    def _colour_of(self, desk: Desk, target: str | None) -> Any:
        """The colour that is offered for an object: its own; none for one that has no mask yet and no choice."""
        session = self._session(desk)
        colours = desk.colours if session is None else _colours(desk, session, session.masks)
        return gr.update(value=colours.get(target or ""))

    def _look_at(
        self, session: Session, desk: Desk, opacity: float, marks: bool, moment: str
    ) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
        steps = session.steps
        count = len(steps) if moment == NOW else int(moment.rpartition(" ")[2])
        masks: Masks = session.masks if count == len(steps) else session.fork(count).masks
        colours = _colours(desk, session, masks)
        visible = {name: mask for name, mask in masks.items() if name not in desk.hidden}
        palette = [COLOURS[colours[name]] for name in visible] or list(COLOURS.values())
        plain = session.image.pixels
        tinted = np.asarray(overlay(session.image, visible, colours=palette, opacity=opacity))
        pair = [_inline(plain), _inline(tinted)]
        zoom = _zoom(session.image)
        tinted = _enlarged(tinted, zoom)
        if marks:
            prompts = session.prompts if count == len(steps) else standing([step.turn for step in steps[:count]])
            _draw_marks(tinted, prompts, desk.corner, zoom)
        return _inline(tinted), self._legend(session, masks, colours), pair

    @staticmethod
    def _legend(session: Session, masks: Masks, colours: dict[str, str]) -> str:
        """The objects with their colours, and everything that can be downloaded: plain links to the server."""
        base = f"/v1/sessions/{session.id}"
        lines = []
        for name, mask in masks.items():
            link = f"{base}/mask?target={quote(name, safe='')}"
            lines.append(
                f'<span class="chip" style="background:rgb{COLOURS[colours[name]]}"></span>'
                f"{html.escape(name)}: {int(mask.sum())} pixels,"
                f' <a class="mask" href="{link}" download>download the mask</a>'
            )
        files = [("record", "Record"), ("report", "Report"), ("export", "Everything (zip)")]
        if any(step.by == "person" for step in session.steps):
            files.append(("training", "Your corrections, to train with (zip)"))
        links = " | ".join(f'<a class="{path}" href="{base}/{path}" download>{text}</a>' for path, text in files)
        return "<br>".join([*lines, f"Download: {links}"])

    @staticmethod
    def _timeline(session: Session | None) -> str:
        if session is None or not session.steps:
            return "<p>No turns yet.</p>"
        lines = []
        for step in session.steps:
            reply, score = step.turn.reply, step.turn.segmenter_score
            act = f"could not be read: {reply.problem}" if reply.problem else describe_actions(reply.actions)
            quality = "" if score is None else f" <b>predicted quality {score:.2f}</b>"
            thought = f"{html.escape(reply.thought)}<br>" if reply.thought else ""
            who = "Agent" if step.by == "agent" else "You"
            said = f'<b>{who}</b>: {thought}<span class="act">{html.escape(act)}</span>{quality}'
            lines.append(f'<li class="{step.by}">{said}</li>')
        return f'<ol aria-label="turns">{"".join(lines)}</ol>'

    @staticmethod
    def _summary(session: Session) -> str:
        if session.running:
            return THINKING
        height, width = session.image.size
        if not session.steps:
            return f"{width} x {height} pixels. Say what to segment, or click on it."
        count = len(session.steps)
        return f"{count} turn{'s' * (count != 1)} so far. Click to correct, or let the agent go on."

    # ------------------------------------------------------------------------------------------------------ opening

    def _open_file(self, desk: Desk, file: str | None, query: str, request: gr.Request) -> list[Any]:
        try:
            if file is None:
                raise ConfigError("no file arrived: drop it again")
            visitor = visitor_in(request.session_hash)
            name, content = self._uploads.take(visitor, file)
            if name.lower().endswith(VOLUME_SUFFIXES) and self._service.volumes is not None:
                return self._open_volume(content, name, query, visitor)
            return self._open(self._service.read_picture(content, name), query, visitor)
        except (IbisError, OSError) as error:
            return [desk, *[gr.skip()] * 5, _problem(error)]

    def _open_sample(self, desk: Desk, query: str, request: gr.Request) -> list[Any]:
        try:
            import skimage

            path = Path(skimage.__file__).parent / "data" / "retina.jpg"
            image = self._service.read_picture(path.read_bytes(), path.name)
            return self._open(image, query if query.strip() else SAMPLE_QUERY, visitor_in(request.session_hash))
        except (IbisError, OSError) as error:
            return [desk, *[gr.skip()] * 5, _problem(error)]

    def _open(self, image: Image, query: str, visitor: str | None) -> list[Any]:
        session = self._open_session(image, query, visitor)
        hidden = gr.update(visible=False)
        return [Desk(session.id, visitor), query, hidden, gr.skip(), gr.skip(), gr.skip(), self._summary(session)]

    def _open_session(self, image: Image, query: str, visitor: str | None) -> Session:
        """Nothing may have been asked yet: what is typed later counts from the first act on."""
        return self._service.open(image, query if query.strip() else "target", owner=visitor)

    def _open_volume(self, content: bytes, name: str, query: str, visitor: str | None) -> list[Any]:
        volume, formats = self._service.read_volume(content, name), self._service.volumes
        key = uuid.uuid4().hex  # an address in memory would come back, as the volume of somebody else
        self._volumes[key] = volume
        while len(self._volumes) > MAX_VOLUMES:
            self._volumes.popitem(last=False)
        windows = list(formats.windows) if formats is not None else []
        middle = volume.shape[2] // 2
        desk = Desk(visitor=visitor, volume=key, name=name, place=(2, middle, windows[0]))
        slider = gr.update(maximum=volume.shape[2] - 1, value=middle)
        chosen = gr.update(choices=windows, value=windows[0])
        said = f"{' x '.join(map(str, volume.shape))} voxels. Choose a slice, then say what to segment."
        return [desk, query, gr.update(visible=True), gr.update(value=2), slider, chosen, said]

    def _axis(self, desk: Desk, axis: int) -> Any:
        volume = self._volumes.get(desk.volume or "")
        return gr.skip() if volume is None else gr.update(maximum=volume.shape[axis] - 1, value=volume.shape[axis] // 2)

    def _slice(self, desk: Desk, opacity: float, marks: bool, axis: int, index: float, window: str) -> list[Any]:
        place = (axis, int(index), window)
        desk = replace(desk, session=desk.slices.get(place), corner=None, place=place)
        return self._show(desk, opacity, marks)

    def _picture_of(self, desk: Desk) -> Image | None:
        volume = self._volumes.get(desk.volume or "")
        return None if volume is None else volume.slice(*desk.place)

    def _session(self, desk: Desk) -> Session | None:
        return None if desk.session is None else self._service.session(desk.session)

    def _at(self, desk: Desk, query: str) -> tuple[Desk, Session]:
        """The session to act in; that of a slice is opened when somebody acts in it for the first time."""
        session = self._session(desk)
        if session is None:
            image = self._picture_of(desk)
            if image is None:
                raise ConfigError("open an image first, or take the sample")
            session = self._open_session(image, query, desk.visitor)
            desk = replace(desk, session=session.id, slices={**desk.slices, desk.place: session.id})
        return desk, session

    # ------------------------------------------------------------------------------------------------------- acting

    def _run(
        self, desk: Desk, opacity: float, marks: bool, query: str, turns: int | None = None
    ) -> Iterator[list[Any]]:
        """Turns as they happen; the picture is shown after each."""
        try:
            desk, session = self._at(desk, query)
            if not query.strip():
                raise ConfigError("say what is to be segmented first")
            news: queue.Queue[Step | RunEnd | IbisError] = queue.Queue()

            def work() -> None:
                try:
                    limit = {} if turns is None else {"max_turns": turns}
                    news.put(session.run(query, on_step=news.put, **limit))
                except IbisError as error:
                    news.put(error)

            threading.Thread(target=work, name="page-run", daemon=True).start()
            yield self._show(desk, opacity, marks, THINKING)
            while True:
                one = news.get()
                if isinstance(one, IbisError):
                    raise one
                if isinstance(one, str):
                    ended = "" if turns == 1 and one == "max_turns" else ENDS[one]
                    yield self._show(desk, opacity, marks, ended)
                    return
                yield self._show(desk, opacity, marks, THINKING)
        except IbisError as error:
            yield self._show(desk, opacity, marks, _problem(error))

    def _ask(self, desk: Desk, opacity: float, marks: bool, query: str) -> Iterator[list[Any]]:
        yield from self._run(desk, opacity, marks, query, turns=1)

    def _take_over(self, desk: Desk, opacity: float, marks: bool) -> list[Any]:
        session = self._session(desk)
        if session is not None:
            session.take_over()
        said = "You have taken over: click, or let the agent work again."
        return self._show(desk, opacity, marks, said)

    def _click(
        self, desk: Desk, opacity: float, marks: bool, tool: str, target: str | None, query: str, event: gr.SelectData
    ) -> list[Any]:
        session = self._session(desk)
        image = self._picture_of(desk) if session is None else session.image
        x, y = (int(value) // (1 if image is None else _zoom(image)) for value in event.index)
        return self._place(desk, opacity, marks, tool, target, query, x, y)

    def _place(
        self, desk: Desk, opacity: float, marks: bool, tool: str, target: str | None, query: str,
        column: float | None, row: float | None,
    ) -> list[Any]:  # fmt: skip
        said = ""
        try:
            desk, session = self._at(desk, query)
            if not session.steps and query.strip():  # what was typed since the image was opened
                default = session.target
                session.request(query)
                target = None if target == default else target
            if column is None or row is None:
                raise ConfigError("give x and y as whole numbers")
            x, y, name = int(column), int(row), target or None
            if tool != BOX:
                session.click(x, y, positive=tool == POSITIVE, target=name)
                corner = None
            elif desk.corner is None:
                corner, said = (x, y), "Now the opposite corner of the box."
            else:
                (x0, x1), (y0, y1) = sorted((x, desk.corner[0])), sorted((y, desk.corner[1]))
                corner = None
                session.box(x0, y0, x1 + 1, y1 + 1, target=name)
            desk = replace(desk, corner=corner)
        except IbisError as error:
            said = _problem(error)
        return self._show(desk, opacity, marks, said)

    def _simple(self, act: str) -> Callable[..., list[Any]]:
        def do(desk: Desk, opacity: float, marks: bool) -> list[Any]:
            said = ""
            try:
                session = self._session(desk)
                if session is None:
                    raise ConfigError("open an image first, or take the sample")
                getattr(session, act)()
            except IbisError as error:
                said = _problem(error)
            return self._show(desk, opacity, marks, said)

        return do

    def _fork(self, desk: Desk, opacity: float, marks: bool, moment: str) -> list[Any]:
        said = ""
        try:
            session = self._session(desk)
            if session is None or moment == NOW:
                raise ConfigError("choose a turn under 'Look at' first")
            fork = self._service.fork(session.id, int(moment.rpartition(" ")[2]))
            slices = {**desk.slices, desk.place: fork.id} if desk.volume else {}
            desk = replace(desk, session=fork.id, corner=None, slices=slices)
            said = f"A new session that begins as it was {moment}. The old one is kept until it expires."
        except IbisError as error:
            said = _problem(error)
        return self._show(desk, opacity, marks, said)


def _colours(desk: Desk, session: Session, masks: Masks) -> dict[str, str]:
    """Names of COLOURS by object: the chosen one, else by its place among `masks`, else among those of today."""
    palette = list(COLOURS)
    ranks = {name: rank for among in (session.masks, masks) for rank, name in enumerate(among)}
    return {name: palette[rank % len(palette)] for name, rank in ranks.items()} | desk.colours


def _problem(error: Exception) -> str:
    """An error in plain words, for the status line."""
    return f"**That did not work:** {html.escape(one_line(error, 400))}"


def _inline(pixels: np.ndarray) -> dict[str, Any]:
    """A picture as Gradio's components take it, within the answer: there is no file that somebody could ask for."""
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, format="JPEG", quality=JPEG_QUALITY)
    return {"url": f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}", "path": None}


def _zoom(image: Image) -> int:
    """How often the pixels of a small picture are repeated: Gradio shows no picture larger than it is."""
    return max(1, SHOWN_SIDE // max(image.size))


def _enlarged(pixels: np.ndarray, zoom: int) -> np.ndarray:
    """A copy, each pixel `zoom` times along both axes."""
    return np.array(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))


def _draw_marks(pixels: np.ndarray, prompts: list[Click | Box], corner: tuple[int, int] | None, zoom: int) -> None:
    """Clicks as discs with a sign, boxes as frames; sized so that they can be seen at any picture size."""
    size = max(4, round(max(pixels.shape[:2]) / 90))
    thin, middle = max(1, size // 4), zoom // 2
    white, blue, green, red = (255, 255, 255), (30, 100, 255), (0, 140, 60), (210, 20, 40)
    for prompt in prompts:
        if isinstance(prompt, Box):
            corners = (prompt.x0 * zoom, prompt.y0 * zoom), (prompt.x1 * zoom - 1, prompt.y1 * zoom - 1)
            cv2.rectangle(pixels, *corners, white, thin * 2)
            cv2.rectangle(pixels, *corners, blue, thin)
            continue
        x, y = prompt.x * zoom + middle, prompt.y * zoom + middle
        cv2.circle(pixels, (x, y), size + thin, white, -1, cv2.LINE_AA)
        cv2.circle(pixels, (x, y), size, green if prompt.positive else red, -1, cv2.LINE_AA)
        arm = size // 2
        cv2.line(pixels, (x - arm, y), (x + arm, y), white, thin)
        if prompt.positive:
            cv2.line(pixels, (x, y - arm), (x, y + arm), white, thin)
    if corner is not None:
        place = (corner[0] * zoom + middle, corner[1] * zoom + middle)
        cv2.drawMarker(pixels, place, blue, cv2.MARKER_TILTED_CROSS, size * 3, thin * 2)
