"""The faces for other programs: MONAI Label's protocol (3D Slicer, OHIF), and MCP (other agents)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import phantoms
import PIL.Image
import pytest
from loopback import png, serving
from volume_phantoms import GRIDS

from ibisagent.domain import Case, Image, Mask, Masks
from ibisagent.errors import DataError
from ibisagent.imaging.masks import decode_rle, iou
from ibisagent.inference.image import run_case
from ibisagent.policies.base import Policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters import Segmenter
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.service import Limits, Service
from ibisagent.server.volumes import PackageVolumes

SIZE = phantoms.SIZE
CLICK = "<think>The bright one.</think><action>click + (0.3133, 0.3197) bright box</action>"
STOP = "<think>It fits.</think><action>stop</action>"


@dataclass
class Stack:
    slices: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.slices.shape

    def slice(self, axis: int, index: int, window: str) -> Image:
        return Image(np.repeat(np.take(self.slices, index, axis)[..., None], 3, axis=2))


class NumpyVolumes:
    """Volumes as numpy files under another name: what the server needs of a reader, and no more."""

    windows: Sequence[str] = ("auto",)

    def read(self, path: Path) -> Stack:
        try:
            return Stack(np.load(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is no volume ({error})") from error

    def segment(self, volume: Any, query: str, policy: Policy, segmenter: Segmenter, on_slice: Any) -> dict[str, Mask]:
        masks = np.zeros(volume.shape, dtype=bool)
        for index in range(volume.shape[2]):
            episode = run_case(Case(str(index), volume.slice(2, index, "auto"), query), policy, segmenter)
            masks[..., index] = episode.masks["bright box"]
        return {"bright box": masks}

    def click(self, volume: Any, clicks: Any, segmenter: Segmenter, on_slice: Any, *, through: bool) -> dict[str, Mask]:
        raise NotImplementedError

    def write_masks(
        self, masks: Masks, volume: Any, path: Path, *, dtype: str = "uint8", compressed: bool = True
    ) -> None:
        labels = np.zeros(volume.shape, dtype=np.uint8)
        for number, mask in enumerate(masks.values(), 1):
            labels[mask] = number
        with path.open("wb") as file:
            np.save(file, labels)


def volume_file() -> bytes:
    encoded = io.BytesIO()
    np.save(encoded, np.stack([phantoms.bright_box()[..., 0]] * 3, axis=2))
    return encoded.getvalue()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("data")
    limits = Limits(sessions=4, upload_bytes=200_000)
    service = Service(ScriptedPolicy([CLICK, STOP]), RegionSegmenter(), folder, limits=limits, volumes=NumpyVolumes())
    with serving(create_app(service, mounts=standard_mounts(page=False))) as address:
        yield address


# ------------------------------------------------------------------------------------------------ MONAI Label


def infer(url: str, where: str, params: dict[str, Any], **files: Any) -> tuple[dict[str, Any], bytes]:
    """As MONAILabelClient.infer sends it: a form with params (and client_id), a two-part form comes back."""
    fields = {"params": json.dumps({**params, "client_id": "slicer"})}
    parts = {name: (None, value) for name, value in fields.items()} | files
    answer = httpx.post(f"{url}/infer/ibisagent?{where}", files=parts)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("multipart/form-data; boundary=")
    boundary = answer.headers["content-type"].partition("boundary=")[2].encode()
    _, facts, file, _ = answer.content.split(b"--" + boundary)
    return json.loads(facts.partition(b"\r\n\r\n")[2]), file.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")


def test_info_holds_what_clients_of_monai_label_read(url: str) -> None:
    info = httpx.get(f"{url}/info/").json()
    assert info["models"]["ibisagent"]["type"] == "deepgrow"
    assert "label" not in info["models"]["ibisagent"]["config"], "Slicer would send it in place of the segment's name"
    assert {"name", "version", "labels", "trainers", "strategies", "scoring", "datastore"} <= set(info)


def test_a_mask_for_an_image(url: str) -> None:
    facts, content = infer(url, "image=", {"query": "Segment the bright box."}, file=("eye.png", png()))
    labels = np.array(PIL.Image.open(io.BytesIO(content)))
    assert facts["label_names"] == {"bright box": 1}
    assert labels[20, 20] == 1
    assert labels[50, 70] == 0
    points = {"foreground": [[70, 50]], "background": [[20, 20]], "label": "background"}
    _, content = infer(url, "image=", points, file=("eye.png", png()))
    labels = np.array(PIL.Image.open(io.BytesIO(content)))
    assert (labels[50, 70], labels[20, 20]) == (1, 0)


def test_a_mask_for_a_volume_through_a_session(url: str) -> None:
    made = httpx.put(f"{url}/session/", files={"files": ("brain.nii.gz", volume_file())}).json()
    assert httpx.get(f"{url}/session/{made['session_id']}").json()["image"] == "brain.nii.gz"
    facts, content = infer(url, f"image=&session_id={made['session_id']}", {"query": "bright box"})
    labels = np.load(io.BytesIO(content))
    assert labels.shape == (61, 83, 3)
    assert labels[20, 20].tolist() == [1, 1, 1]
    assert facts["label_names"] == {"bright box": 1}
    assert httpx.delete(f"{url}/session/{made['session_id']}").status_code == 200
    assert httpx.get(f"{url}/session/{made['session_id']}").status_code == 404


def test_a_mask_for_a_nifti_volume(tmp_path: Path) -> None:
    values = np.full((46, 34, 12), -40, dtype=np.int16)
    values[12:30, 8:22] = 110
    volume = nibabel.Nifti1Image(values, GRIDS["oblique-uneven"])
    nibabel.save(volume, tmp_path / "brain.nii.gz")
    replies = ("<action>click + (0.46, 0.44) bright box</action>", STOP)
    service = Service(ScriptedPolicy(replies), RegionSegmenter(), tmp_path / "data", volumes=PackageVolumes())
    with serving(create_app(service, mounts=standard_mounts(page=False))) as address:
        file = ("brain.nii.gz", (tmp_path / "brain.nii.gz").read_bytes())
        facts, content = infer(address, "image=", {"query": "Segment the bright box."}, file=file)
    (tmp_path / "label.nii.gz").write_bytes(content)
    label = nibabel.load(tmp_path / "label.nii.gz")
    assert facts["label_names"] == {"bright box": 1}
    assert np.allclose(label.affine, volume.affine)
    assert iou(np.asarray(label.dataobj) == 1, values > 0) > 0.8


def test_the_datastore(url: str) -> None:
    sent = httpx.put(f"{url}/datastore/?image=..%2Fbrain", files={"file": ("b.nii.gz", volume_file())})
    assert sent.json() == {"image": "../brain"}
    assert httpx.get(f"{url}/datastore/").json()["total"] == 1
    assert httpx.head(f"{url}/datastore/image?image=..%2Fbrain").status_code == 200
    assert httpx.get(f"{url}/datastore/image?image=..%2Fbrain").content == volume_file()
    put = httpx.put(f"{url}/datastore/label?image=..%2Fbrain&tag=final", files={"label": ("l.nii.gz", b"label")})
    assert put.json()["image"] == "../brain"
    got = httpx.get(f"{url}/datastore/label?label=..%2Fbrain&tag=final")
    assert got.content == b"label"
    assert "label.nii.gz" in got.headers["content-disposition"]
    assert (
        httpx.get(f"{url}/datastore/?output=all").json()["objects"]["../brain"]["labels"]["final"]["ext"] == ".nii.gz"
    )
    httpx.put(f"{url}/datastore/?image=..%2Fbrain", files={"file": ("b.nii.gz", volume_file())})
    again = httpx.get(f"{url}/datastore/label?label=..%2Fbrain&tag=final")
    assert again.content == b"label", "an image that is sent again takes its labels along"
    _, content = infer(url, "image=..%2Fbrain", {"query": "bright box"})
    assert np.load(io.BytesIO(content)).any()
    assert httpx.delete(f"{url}/datastore/image?id=..%2Fbrain").status_code == 200
    assert httpx.get(f"{url}/datastore/image?image=..%2Fbrain").status_code == 404


@pytest.mark.parametrize(
    ("path", "files", "status"),
    [
        ("/infer/other?image=x", {}, 404),
        ("/infer/ibisagent", {}, 422),
        ("/infer/ibisagent?image=none", {}, 404),
        ("/infer/ibisagent", {"file": ("a.png", b"x")}, 422),
        ("/infer/ibisagent", {"file": ("a.nii", b"x")}, 422),
        ("/infer/ibisagent", {"file": ("a.png", png()), "params": (None, "[")}, 422),
        ("/infer/ibisagent", {"file": ("a.png", png()), "params": (None, '{"foreground": [[900, 1]]}')}, 422),
        ("/infer/ibisagent", {"file": ("a.png", bytes(300_000)), "params": (None, "{}")}, 413),
    ],
)
def test_bad_requests(path: str, files: dict[str, Any], status: int, url: str) -> None:
    answer = httpx.post(f"{url}{path}", files=files or {"params": (None, "{}")})
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str)


def test_the_image_store_is_bounded(url: str) -> None:
    made = [httpx.put(f"{url}/session/", files={"files": ("a.png", png())}) for _ in range(5)]
    assert [answer.status_code for answer in made] == [200] * 4 + [429]
    for answer in made[:4]:
        httpx.delete(f"{url}/session/{answer.json()['session_id']}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_client_of_monai_label_gets_a_mask(url: str, tmp_path: Path) -> None:
    library = pytest.importorskip("monailabel.client", reason="monailabel is not installed")
    (tmp_path / "brain.nii.gz").write_bytes(volume_file())
    client = library.MONAILabelClient(url, tmpdir=str(tmp_path))
    assert "ibisagent" in client.info()["models"]
    session = client.create_session(str(tmp_path / "brain.nii.gz"))["session_id"]
    file, params = client.infer("ibisagent", "", {"query": "bright box"}, session_id=session)
    assert np.load(file).any()
    assert params["label_names"] == {"bright box": 1}
    client.remove_session(session)


# -------------------------------------------------------------------------------------------------------- MCP


def test_an_agent_lists_and_calls_the_tools(url: str) -> None:
    from mcp import Client

    async def use() -> None:
        async with Client(f"{url}/mcp") as client:
            listed = {tool.name for tool in (await client.list_tools()).tools}
            assert {"segment", "open_image", "ask", "run", "click", "undo", "look", "export"} <= listed
            image = base64.b64encode(png()).decode()
            whole = await client.call_tool("segment", {"image": image, "query": "bright box"})
            assert decode_rle(whole.structured_content["masks"]["bright box"])[20, 20]
            opened = await client.call_tool("open_image", {"image": image, "query": "bright box"})
            session = opened.structured_content["id"]
            await client.call_tool("ask", {"session": session})
            clicked = await client.call_tool("click", {"session": session, "x": 70, "y": 50, "target": "background"})
            assert [turn["by"] for turn in clicked.structured_content["turns"]] == ["agent", "user"]
            seen = await client.call_tool("look", {"session": session})
            assert PIL.Image.open(io.BytesIO(base64.b64decode(seen.content[0].data))).size == (83, 61)
            exported = await client.call_tool("export", {"session": session})
            assert set(exported.structured_content["masks"]) == {"bright box", "background"}
            wrong = await client.call_tool("click", {"session": session, "x": 900, "y": 0})
            assert wrong.is_error
            assert "outside" in wrong.content[0].text
            boxed = await client.call_tool(
                "box", {"session": session, "x0": 10, "y0": 8, "x1": 42, "y1": 32, "target": "bright box"}
            )
            assert boxed.structured_content["turns"][-1]["actions"][0]["kind"] == "box"
            undone = await client.call_tool("undo", {"session": session})
            assert undone.structured_content["can_redo"]
            redone = await client.call_tool("redo", {"session": session})
            assert not redone.structured_content["can_redo"]
            templates = (await client.list_resource_templates()).resource_templates
            assert {one.mime_type for one in templates} == {"image/png"}
            read = await client.read_resource(f"ibisagent://sessions/{session}/masks/bright%20box")
            mask = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(read.contents[0].blob))))
            assert mask.shape == SIZE
            assert mask[20, 20] == 255
            seen = await client.read_resource(f"ibisagent://sessions/{session}/masks")
            assert PIL.Image.open(io.BytesIO(base64.b64decode(seen.contents[0].blob))).size == (83, 61)
            told = next(tool for tool in (await client.list_tools()).tools if tool.name == "open_image").description
            assert "deleted 60 minutes after" in told
            assert (await client.call_tool("close", {"session": session})).structured_content == {"closed": session}
            assert (await client.call_tool("look", {"session": session})).is_error

    asyncio.run(use())
