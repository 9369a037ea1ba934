"""Tools for other agents, over the Model Context Protocol (streamable HTTP) at /mcp, with its official SDK."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.utilities.types import Image as McpImage
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import Field
from starlette.applications import Starlette

from ibisagent.environment import package_version
from ibisagent.errors import DataError, IbisError
from ibisagent.files import png_bytes
from ibisagent.imaging.masks import encode_rle
from ibisagent.inference.session import Session
from ibisagent.protocol import overlay
from ibisagent.server.app import AgentThreads
from ibisagent.server.schemas import session_view
from ibisagent.server.service import MissingError, Service
from ibisagent.server.zips import export_zip

Image = Annotated[str, Field(description="the image file (PNG, JPEG, TIFF, BMP) in base64")]
Query = Annotated[str, Field(description='what to segment, such as "Segment the optic disc."')]
SessionId = Annotated[str, Field(description="the session, as open_image named it")]
Made = TypeVar("Made")

INSTRUCTIONS = (
    "Segment objects in biomedical images. open_image starts a session; run segments what the query names;"
    " click and box correct its masks; look shows them, and so does the resource ibisagent://sessions/{session}/masks;"
    " export gives the files. A session that is idle for too long is deleted, see open_image: export first, close it"
    " when you are done. Research software: not for clinical use."
)
MASK_URI = "ibisagent://sessions/{session}/masks/{target}"
IMAGE_URI = "ibisagent://sessions/{session}/masks"


def mount_mcp(app: FastAPI, service: Service, threads: AgentThreads) -> Callable[[], Any]:
    """Add the endpoint; its session manager runs with the application. Names and origins are checked by the
    middleware."""
    server = MCPServer("ibisagent", instructions=INSTRUCTIONS, version=package_version(), log_level="WARNING")
    tab = _Sessions(service, threads)
    _add_tools(server, tab)
    _add_acts(server, tab)
    _add_resources(server, tab)
    inner: Starlette = server.streamable_http_app(
        streamable_http_path="/mcp",
        json_response=True,
        stateless_http=True,
        max_request_body_size=service.limits.upload_bytes * 2,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    app.router.routes.extend(inner.routes)
    return lambda: server.session_manager.run()


def _view(session: Session) -> dict[str, Any]:
    return session_view(session).model_dump()


class _Sessions:
    """The sessions that other agents may use: those that belong to no visitor of the page."""

    def __init__(self, service: Service, threads: AgentThreads) -> None:
        self.service, self._threads = service, threads

    async def answered(self, work: Callable[[], Made]) -> Made:
        """The result of `work`; what goes wrong becomes a message that the other agent reads."""
        try:
            return await self._threads(work)
        except IbisError as error:
            raise ToolError(str(error)) from error

    def shared(self, id_: str) -> Session:
        """A session by its id."""
        self.service.check_visitor(id_, None)
        return self.service.session(id_)

    def opened(self, image: str, query: str) -> Session:
        """A new session, which goes when it is idle: agents do not come back."""
        try:
            content = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError("the image is not base64: send the whole file in base64") from error
        return self.service.open(self.service.read_upload(content, "image"), query, passing=True)

    async def acted(self, id_: str, act: Callable[[Session], object]) -> dict[str, Any]:
        """The session after something was done in it."""

        def work() -> dict[str, Any]:
            found = self.shared(id_)
            act(found)
            return _view(found)

        return await self.answered(work)


def _add_tools(server: MCPServer[Any], tab: _Sessions) -> None:
    service, answered, shared, opened = tab.service, tab.answered, tab.shared, tab.opened
    idle = f"It is deleted {service.limits.idle_seconds / 60:g} minutes after its last use."

    @server.tool()
    async def segment(image: Image, query: Query) -> dict[str, Any]:
        """Segment an image in one go: masks as COCO run lengths by object. Nothing is kept."""

        def work() -> dict[str, Any]:
            session = opened(image, query)
            try:
                session.run()
                return {"masks": {name: encode_rle(mask) for name, mask in session.masks.items()}}
            finally:
                service.close_session(session.id)

        return await answered(work)

    @server.tool(description=f"Open a session on an image. {idle}")
    async def open_image(image: Image, query: Query) -> dict[str, Any]:
        return await answered(lambda: _view(opened(image, query)))

    @server.tool()
    async def ask(session: SessionId, query: str | None = None) -> dict[str, Any]:
        """One turn of the segmenting agent. query: a new request, left out: the last one."""
        return await tab.acted(session, lambda found: found.ask(query))

    @server.tool()
    async def run(session: SessionId, query: str | None = None) -> dict[str, Any]:
        """Turns of the segmenting agent until it stops."""

        def work() -> dict[str, Any]:
            found = shared(session)
            return {"ended": found.run(query), "session": _view(found)}

        return await answered(work)

    @server.tool(structured_output=False)
    async def look(session: SessionId) -> McpImage:
        """The image with its masks."""

        def work() -> McpImage:
            found = shared(session)
            return McpImage(data=png_bytes(overlay(found.image, found.masks)), format="png")

        return await answered(work)

    @server.tool()
    async def export(session: SessionId) -> dict[str, Any]:
        """Masks as COCO run lengths by object, and all files (masks, overlay, record, report) as a zip in base64."""

        def work() -> dict[str, Any]:
            found = shared(session)
            masks = {name: encode_rle(mask) for name, mask in found.masks.items()}
            return {"masks": masks, "zip": base64.b64encode(export_zip(service, found)).decode()}

        return await answered(work)


def _add_acts(server: MCPServer[Any], tab: _Sessions) -> None:
    @server.tool()
    async def click(
        session: SessionId, x: int, y: int, positive: bool = True, target: str | None = None
    ) -> dict[str, Any]:
        """Click on pixel column x, row y: it belongs to the target (positive), or does not."""
        return await tab.acted(session, lambda found: found.click(x, y, positive=positive, target=target))

    @server.tool()
    async def box(session: SessionId, x0: int, y0: int, x1: int, y1: int, target: str | None = None) -> dict[str, Any]:
        """Draw a box around the target: columns x0 to x1 and rows y0 to y1, the last ones outside it."""
        return await tab.acted(session, lambda found: found.box(x0, y0, x1, y1, target=target))

    @server.tool()
    async def undo(session: SessionId) -> dict[str, Any]:
        """Take back the newest turn with clicks or boxes."""
        return await tab.acted(session, Session.undo)

    @server.tool()
    async def redo(session: SessionId) -> dict[str, Any]:
        """Bring back what was undone."""
        return await tab.acted(session, Session.redo)

    @server.tool()
    async def close(session: SessionId) -> dict[str, Any]:
        """Close a session and delete its files: export first."""

        def work() -> dict[str, Any]:
            tab.service.check_visitor(session, None)
            tab.service.close_session(session)
            return {"closed": session}

        return await tab.answered(work)


def _add_resources(server: MCPServer[Any], tab: _Sessions) -> None:
    @server.resource(IMAGE_URI, mime_type="image/png")
    async def image(session: str) -> bytes:
        """The image of a session with its masks."""

        def work() -> bytes:
            found = tab.shared(session)
            return png_bytes(overlay(found.image, found.masks))

        return await tab.answered(work)

    @server.resource(MASK_URI, mime_type="image/png")
    async def mask(session: str, target: str) -> bytes:
        """One mask of a session: the image's size, 0 outside and 255 inside."""

        def work() -> bytes:
            masks = tab.shared(session).masks
            if target not in masks:
                raise MissingError(f"no target '{target[:80]}' in this session")
            return png_bytes(masks[target])

        return await tab.answered(work)
