"""`ibisagent serve` and `ibisagent ui`: the API, a policy or a segmenter for other machines, the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ibisagent.cli.options import (
    AreaOption,
    DataFolderOption,
    DeleteOption,
    DeviceOption,
    HostOption,
    IdleOption,
    LearnOption,
    PolicyChoice,
    PolicyOption,
    PortOption,
    SegmenterOption,
    SessionsOption,
    SplitOption,
    UploadOption,
    VoxelsOption,
    spread_options,
)
from ibisagent.cli.output import status, stderr
from ibisagent.errors import ConfigError

GroundTruthOption = Annotated[
    bool, typer.Option("--ground-truth", help="Of a data set: begin with its masks, to look through and correct them.")
]


class _ApiByDefault(TyperGroup):
    """`serve` alone, or with options, is `serve api`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx)):
            args = ["api", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ApiByDefault,
    rich_markup_mode=None,
    help="Serve the agent over HTTP (api, the default), or a policy or segmenter alone to other machines.",
)


@app.command()
@spread_options
def policy(choice: PolicyChoice, host: HostOption = "127.0.0.1", port: PortOption = 8000) -> None:
    """Serve a model to anything that speaks the OpenAI chat protocol, such as --policy endpoint:URL#MODEL."""
    _require_server()
    with status("loading the model", quiet=False):
        from ibisagent.policies.mllm import MllmPolicy
        from ibisagent.server.policy_server import serve

        writer = choice.load()
    if not isinstance(writer, MllmPolicy):
        raise ConfigError(
            f"policy '{choice.policy}' is no model that could be served; give ibis-nano, a folder or a hub id"
        )
    serve(writer, host=host, port=port)


@app.command("segmenter")
def segmenter_server(
    segmenter: SegmenterOption = "ibis-click",
    device: DeviceOption = "auto",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8001,
) -> None:
    """Serve a segmenter to other machines, which use it as --segmenter remote:URL."""
    _require_server()
    with status("loading the segmenter", quiet=False):
        from ibisagent.segmenters import load_segmenter
        from ibisagent.server.segmenter_server import serve

        engine = load_segmenter(segmenter, device=device)
    serve(engine, host=host, port=port)


@app.command()
@spread_options
def api(
    choice: PolicyChoice,
    segmenter: SegmenterOption = "ibis-click",
    data: DataFolderOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8002,
    max_sessions: SessionsOption = 100,
    idle_minutes: IdleOption = 60.0,
    delete_after: DeleteOption = None,
    max_upload: UploadOption = 64,
    max_megapixels: AreaOption = 16,
    max_megavoxels: VoxelsOption = 128,
    label: Annotated[
        list[str] | None, typer.Option(help="What Slicer and OHIF ask for by default, such as 'optic disc'; repeat it.")
    ] = None,
    studies: Annotated[str | None, typer.Option(help="DICOMweb server to take series from, for OHIF.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may use it as OHIF does: http://viewer:3000; repeat it.")
    ] = None,
    page: Annotated[bool, typer.Option(help="Also serve the web page.")] = False,
    open_: Annotated[
        list[Path] | None,
        typer.Option("--open", help="Images, scans, a folder of them or a data set, to be labelled by all; repeat it."),
    ] = None,
    split: SplitOption = None,
    ground_truth: GroundTruthOption = False,
    learn_every: LearnOption = None,
    open_browser: Annotated[bool, typer.Option("--open-browser", hidden=True)] = False,
) -> None:
    """Serve sessions, one-shot segmentation and batch jobs over HTTP, for programs, 3D Slicer, OHIF and agents (MCP).

    The API is described at /docs. Only this machine is answered unless IBIS_TOKEN holds a secret.
    """
    _require_server()
    with status("loading the models", quiet=False):
        import platformdirs

        from ibisagent.segmenters import load_segmenter
        from ibisagent.server import app as server
        from ibisagent.server.auth import url_of
        from ibisagent.server.offers import offers_of
        from ibisagent.server.service import Limits, Service
        from ibisagent.server.volumes import PackageVolumes

        mounts = server.standard_mounts(page=page, labels=label or ["target"], studies=studies, learn_every=learn_every)
        writer = choice.load()
        limits = Limits(
            sessions=max_sessions,
            idle_seconds=idle_minutes * 60,
            delete_seconds=None if delete_after is None else delete_after * 24 * 3600,
            upload_bytes=max_upload * 2**20,
            pixels=max_megapixels * 2**20,
            voxels=max_megavoxels * 2**20,
        )
        folder = data or Path(platformdirs.user_data_dir("ibisagent")) / "server"
        server.check_host(host)
        offers = offers_of(open_ or [], split=split, ground_truth=ground_truth)
        engine = load_segmenter(segmenter, device=choice.device)
        address = url_of(host, port)
        service = Service(
            writer, engine, folder, limits=limits, volumes=PackageVolumes(), address=address, offers=offers
        )
    stderr.print(f"{address}{'' if page else '/docs'} - sessions in {folder} - stop with Ctrl+C")
    stderr.print(
        f"after {idle_minutes:g} minutes without use: what nobody worked on and what was fetched is deleted;"
        + (" nothing else ever is" if delete_after is None else f" after {delete_after:g} days everything is")
    )
    if open_browser:
        import threading
        import webbrowser

        threading.Timer(2.0, webbrowser.open, [address]).start()
    server.serve(service, host=host, port=port, mounts=mounts, origins=allow_origin or [])


def ui(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SOURCE]...", help="What to label: images, scans, folders of them, or a data set."),
    ] = None,
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    device: DeviceOption = "auto",
    data: DataFolderOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8002,
    max_upload: UploadOption = 64,
    browser: Annotated[bool, typer.Option(help="Open the page in the web browser.")] = True,
    split: SplitOption = None,
    ground_truth: GroundTruthOption = False,
    learn_every: LearnOption = None,
) -> None:
    """The web page: open an image, say what to segment, watch the agent, correct it with your own clicks.

    Each SOURCE is in its list from the beginning; of a data set every row, with its object as the request. The files
    are only read, and copied when they are opened.
    """
    api(
        policy=policy,
        segmenter=segmenter,
        device=device,
        data=data,
        host=host,
        port=port,
        max_upload=max_upload,
        page=True,
        open_=sources,
        split=split,
        ground_truth=ground_truth,
        learn_every=learn_every,
        open_browser=browser,
    )


def _require_server() -> None:
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "mcp")
    if missing := [name for name in needed if not find_spec(name)]:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'ibisagent[server]'")
