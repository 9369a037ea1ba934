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
from ibisagent.server.app import AgentThreads, session_view
from ibisagent.server.service import Service, export_zip

Picture = Annotated[str, Field(description="the picture file (PNG, JPEG, TIFF, BMP) in base64")]
Query = Annotated[str, Field(description='what to segment, such as "Segment the optic disc."')]
SessionId = Annotated[str, Field(description="the session, as open_image named it")]
Made = TypeVar("Made")

INSTRUCTIONS = (
    "Segment objects in biomedical images. open_image starts a session; run segments what the query names;"
    " click corrects its masks; look shows them; export gives the files. Research software: not for clinical use."
)


def mount_mcp(app: FastAPI, service: Service, threads: AgentThreads) -> Callable[[], Any]:
    """Add the endpoint; its session manager runs with the application. Names and origins are checked by the gate."""
    server = MCPServer("ibisagent", instructions=INSTRUCTIONS, version=package_version(), log_level="WARNING")
    _add_tools(server, service, threads)
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


def _add_tools(server: MCPServer[Any], service: Service, threads: AgentThreads) -> None:
    async def answered(work: Callable[[], Made]) -> Made:
        """The result of `work`; what goes wrong becomes a message that the other agent reads."""
        try:
            return await threads(work)
        except IbisError as error:
            raise ToolError(str(error)) from error

    def shared(id_: str) -> Session:
        service.check_visitor(id_, None)
        return service.session(id_)

    def opened(picture: str, query: str) -> Session:
        try:
            content = base64.b64decode(picture, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError("the picture is not base64: send the whole file in base64") from error
        return service.open(service.read_picture(content, "image"), query)

    @server.tool()
    async def segment(picture: Picture, query: Query) -> dict[str, Any]:
        """Segment a picture in one go: masks as COCO run lengths by object. Nothing is kept."""

        def work() -> dict[str, Any]:
            session = opened(picture, query)
            try:
                session.run()
                return {"masks": {name: encode_rle(mask) for name, mask in session.masks.items()}}
            finally:
                service.close_session(session.id)

        return await answered(work)

    @server.tool()
    async def open_image(picture: Picture, query: Query) -> dict[str, Any]:
        """Open a session on a picture."""
        return await answered(lambda: _view(opened(picture, query)))

    @server.tool()
    async def ask(session: SessionId, query: str | None = None) -> dict[str, Any]:
        """One turn of the segmenting agent. query: a new request, left out: the last one."""

        def work() -> dict[str, Any]:
            found = shared(session)
            found.ask(query)
            return _view(found)

        return await answered(work)

    @server.tool()
    async def run(session: SessionId, query: str | None = None) -> dict[str, Any]:
        """Turns of the segmenting agent until it stops."""

        def work() -> dict[str, Any]:
            found = shared(session)
            return {"ended": found.run(query), "session": _view(found)}

        return await answered(work)

    @server.tool()
    async def click(
        session: SessionId, x: int, y: int, positive: bool = True, target: str | None = None
    ) -> dict[str, Any]:
        """Click on pixel column x, row y: it belongs to the target (positive), or does not."""

        def work() -> dict[str, Any]:
            found = shared(session)
            found.click(x, y, positive=positive, target=target)
            return _view(found)

        return await answered(work)

    @server.tool()
    async def undo(session: SessionId) -> dict[str, Any]:
        """Take back the newest turn with clicks."""

        def work() -> dict[str, Any]:
            found = shared(session)
            found.undo()
            return _view(found)

        return await answered(work)

    @server.tool(structured_output=False)
    async def look(session: SessionId) -> McpImage:
        """The picture with its masks."""

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
