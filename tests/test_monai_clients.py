"""What the modules of 3D Slicer and OHIF send, recorded from the sources of MONAI Label 0.8.5 and its plugins."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode, urlsplit

import httpx
import loopback
import nibabel
import numpy as np
import pydicom
import pytest
from loopback import png
from volume_phantoms import GRIDS, hounsfield, slice_files

from ibisagent.errors import ConfigError
from ibisagent.imaging.masks import iou
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.service import Limits, Service
from ibisagent.server.volumes import PackageVolumes

SHAPE = (46, 34, 12)
TOKEN = "a-token-of-the-tests"
LEFT, RIGHT = (slice(5, 17), slice(8, 22)), (slice(28, 41), slice(8, 22))
BEGIN, END = 3, 9  # slices that show the boxes
COMMON = {"client_id": "user-xyz", "result_extension": ".nrrd", "result_dtype": "uint8"}  # as the module adds them
OHIF = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
SEEN = "<action>click + (0.24, 0.44) bright box</action>"
STOP = "<action>stop</action>"


def boxes() -> dict[str, np.ndarray]:
    masks = {"left": np.zeros(SHAPE, bool), "right": np.zeros(SHAPE, bool)}
    masks["left"][LEFT[0], LEFT[1], BEGIN:END] = True
    masks["right"][RIGHT[0], RIGHT[1], BEGIN:END] = True
    return masks


def scan(folder: Path, grid: str = "LPS-uneven") -> bytes:
    values = np.full(SHAPE, -40, dtype=np.int16)
    for mask in boxes().values():
        values[mask] = 110
    nibabel.save(nibabel.Nifti1Image(values, GRIDS[grid]), folder / "scan.nii.gz")
    return (folder / "scan.nii.gz").read_bytes()


@contextmanager
def serving(
    folder: Path, token: str | None = None, *, origins: tuple[str, ...] = (), labels: tuple[str, ...] = ("target",),
    studies: str | None = None, **limits: Any
) -> Iterator[str]:  # fmt: skip
    policy = ScriptedPolicy([SEEN, STOP])
    service = Service(policy, RegionSegmenter(), folder, volumes=PackageVolumes(), limits=Limits(**limits))
    mounts = standard_mounts(page=False, labels=labels, studies=studies)
    with loopback.serving(create_app(service, token=token, mounts=mounts, origins=origins)) as url:
        yield url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("data") / "data") as address:
        yield address


def infer(url: str, image: str, params: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """As the module's client sends it, with its own way to write a form; the file has the name that the answer says."""
    edge = "----------lImIt_of_THE_fIle_eW_$"
    body = (
        f'--{edge}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{json.dumps(params)}\r\n--{edge}--\r\n\r\n'
    )
    headers = {"content-type": f"multipart/form-data; boundary={edge}", "content-length": str(len(body))}
    connection = http.client.HTTPConnection(*urlsplit(url).netloc.split(":"))
    connection.request("POST", f"/infer/ibisagent?image={quote_plus(image)}", body.encode(), headers)
    answer = connection.getresponse()
    content, kind = answer.read(), answer.headers["content-type"]
    connection.close()
    assert answer.status == 200, content
    _, facts, file, _ = content.split(b"--" + kind.partition("boundary=")[2].encode())
    head, _, labels = file.partition(b"\r\n\r\n")
    name = head.decode().partition('filename="')[2].partition('"')[0]
    (tmp_path / name).write_bytes(labels.removesuffix(b"\r\n"))
    return json.loads(facts.partition(b"\r\n\r\n")[2]), np.asarray(nibabel.load(tmp_path / name).dataobj)


@pytest.fixture
def stored(url: str, tmp_path: Path) -> str:
    sent = httpx.put(f"{url}/datastore/?image=scan", files={"file": ("scan.nii.gz", scan(tmp_path))})
    assert sent.json() == {"image": "scan"}
    return "scan"


FORMS: dict[str, tuple[dict[str, Any], str]] = {  # how a click on the voxel in "AT" comes, what the object is called
    "deepgrow": (
        {"label": "spleen", "foreground": ["AT"], "background": [], "query": "", "extent": "volume"},
        "spleen",
    ),
    "deepedit": ({"target": ["AT"], "label": "target", "query": "", **COMMON}, "target"),
    "deepedit, multiple labels": ({"liver": ["AT"], "spleen": [], "background": [], "label": "liver"}, "liver"),
    "deepedit, the label overwritten by the options": ({"target": ["AT"], "label": "", "query": ""}, "target"),
    "with a query": ({"foreground": ["AT"], "background": [], "query": "Segment the liver."}, "liver"),
    "OHIF": ({"foreground": ["AT"], "background": [], **OHIF}, "target"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_click_moves_the_mask(form: str, url: str, stored: str, tmp_path: Path) -> None:
    params, name = FORMS[form]
    ground_truth = boxes()
    for side, at in (("left", [10, 12, 5]), ("right", [34, 12, 5])):
        clicked = {key: [at] if value == ["AT"] else value for key, value in params.items()}
        facts, labels = infer(url, stored, clicked, tmp_path)
        assert facts["label_names"] == {name: 1}
        assert iou(labels == 1, ground_truth[side]) > 0.9


@pytest.mark.parametrize("grid", ["RAS-uneven", "PIR-uneven", "SAL-even", "oblique-uneven"])
def test_a_click_is_on_the_voxel_that_it_names(grid: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data") as url:
        httpx.put(f"{url}/datastore/?image=scan", files={"file": ("scan.nii.gz", scan(tmp_path, grid))})
        _, labels = infer(url, "scan", {"foreground": [[34, 12, 5]], "background": []}, tmp_path)
        assert iou(labels == 1, boxes()["right"]) > 0.9


def test_multiple_objects_and_clicks_against_them(url: str, stored: str, tmp_path: Path) -> None:
    both = {"left box": [[10, 12, 5]], "right box": [[34, 12, 5]], "background": [[22, 2, 5]], "label": ""}
    facts, labels = infer(url, stored, both, tmp_path)
    assert facts["label_names"] == {"left box": 1, "right box": 2}
    for number, side in enumerate(("left", "right"), 1):
        assert iou(labels == number, boxes()[side]) > 0.9
    again = {"foreground": [[10, 12, 5], [10, 12, 5]], "background": [], "label": "box"}  # "Update" sends them again
    _, labels = infer(url, stored, again, tmp_path)
    assert iou(labels == 1, boxes()["left"]) > 0.9
    denied = {"foreground": [[10, 12, 5]], "background": [[11, 13, 5]], "label": "box"}
    _, labels = infer(url, stored, denied, tmp_path)
    assert labels[11, 13, 5] == 0


def test_a_slice_alone(url: str, stored: str, tmp_path: Path) -> None:
    points = [[10, 12, 5], [34, 12, 6]]
    flat = {"foreground": points, "background": [], "label": "box", "slice": 5}
    _, labels = infer(url, stored, flat, tmp_path)
    assert np.unique(np.nonzero(labels)[2]).tolist() == [5]
    assert iou(labels[..., 5] == 1, boxes()["left"][..., 5]) > 0.7
    _, labels = infer(url, stored, {"foreground": points, "background": [], "extent": "slice"}, tmp_path)
    assert np.unique(np.nonzero(labels)[2]).tolist() == [5, 6]


def test_default_options_ask_for_the_models_label(tmp_path: Path) -> None:
    with serving(tmp_path / "data", labels=("bright box",)) as url:
        info = httpx.get(f"{url}/info/").json()
        assert info["labels"] == ["bright box"]
        options = {
            model: {key: value[0] if isinstance(value, list) else value for key, value in facts["config"].items()}
            for model, facts in info["models"].items()
        }
        assert {facts["type"] for facts in info["models"].values()} == {"deepgrow", "segmentation"}
        httpx.put(f"{url}/datastore/?image=scan", files={"file": ("scan.nii.gz", scan(tmp_path))})
        for given in options.values():
            facts, labels = infer(url, "scan", {**given, **COMMON}, tmp_path)
            assert facts["label_names"] == {"bright box": 1}
            assert labels[10, 12, 5] == 1
        eye = {"file": ("eye.png", png()), "params": (None, "{}")}
        answer = httpx.post(f"{url}/infer/ibisagent?image=&output=json", files=eye)
        assert answer.json()["label_names"] == {"bright box": 1}
    for number, wrong in enumerate(((), ("a\nb",), ("",), tuple(map(str, range(9))))):
        with pytest.raises(ConfigError, match="labels"), serving(tmp_path / str(number), labels=wrong):
            pass


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"foreground": [[99, 1, 1]]}, "outside the volume"),
        ({"target": [[1, 1, -1]]}, "outside the volume"),
        ({"foreground": [[1, 2]]}, "three numbers"),
        ({"target": [[1, 2]]}, "three numbers"),
        ({"target": [["a", 1, 2]]}, "params target"),
        ({"foreground": [[1.5, 1, 2]]}, "foreground"),
        ({"foreground": [[1, 1, 5]], "slice": 4}, "slice 4"),
        ({"foreground": [[1, 1, 5]], "roi": [1, 2, 3, 4, 5, 6]}, "roi"),
        ({str(number): [[number, 1, 5]] for number in range(9)}, "labels"),
        ({"foreground": [[1, 1, 5]] * 65}, "foreground"),
        ({"foreground": [[1, 1, 5]], "label": "a\u0000b"}, "label"),
        ({"foreground": [[10, 12, 5]], "result_extension": ".stl"}, "result_extension"),
    ],
)
def test_no_click_is_dropped_without_a_word(params: dict[str, Any], said: str, url: str, stored: str) -> None:
    answer = httpx.post(f"{url}/infer/ibisagent?image={stored}", files={"params": (None, json.dumps(params))})
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_scribbles_are_refused(url: str, stored: str) -> None:
    files = {"params": (None, "{}"), "label": ("scribbles.nii.gz", b"x")}
    answer = httpx.post(f"{url}/infer/ibisagent?image={stored}", files=files)
    assert answer.status_code == 422
    assert "scribbles" in answer.json()["detail"]


def test_ohif_reads_raw_nrrd_in_the_order_of_the_voxels(url: str, stored: str) -> None:
    params = {"foreground": [[10, 12, 5]], "background": [], **OHIF}
    files = {"params": (None, json.dumps(params))}
    answer = httpx.post(f"{url}/infer/ibisagent?image={stored}&output=image", files=files)
    head, _, raw = answer.content.partition(b"\n\n")
    assert head.startswith(b"NRRD")
    assert b"encoding: raw" in head
    assert b"sizes: 46 34 12" in head
    labels = np.frombuffer(raw, np.uint8).reshape(SHAPE[::-1]).transpose()
    assert iou(labels == 1, boxes()["left"]) > 0.9
    params |= {"result_dtype": "uint16"}  # as earlier versions of it asked
    whole = httpx.post(f"{url}/infer/ibisagent?image={stored}&output=all", files={"params": (None, json.dumps(params))})
    assert b'filename="label.nrrd"' in whole.content
    assert b'"centroids": {}' in whole.content
    assert b"type: unsigned short" in whole.content


# ------------------------------------------------------------------------------------------------- what is kept


def test_labels_outlive_the_server_with_what_is_said_of_them(tmp_path: Path) -> None:
    info = {"label_info": [{"name": "optic disc", "idx": 1}, {"name": "cup", "idx": 2}], "client_id": "user-xyz"}
    content = gzip.compress(b"x" * 400)
    for time_of_day in ("evening", "morning"):
        with serving(tmp_path / "data") as url, httpx.Client(base_url=url) as web:
            if time_of_day == "evening":
                web.put("/datastore/?image=eye", files={"file": ("eye.png", png())})
                made = web.put("/session/", files={"files": ("scan.nii.gz", scan(tmp_path))}).json()
                for name, tag in (("l.nii.gz", ""), ("l.seg.nrrd", "&tag=original"), ("label.bin", "&tag=ohif")):
                    files = {"params": (None, json.dumps(info)), "label": (f"/tmp/abc/{name}", content)}
                    saved = web.put(f"/datastore/label?image=eye{tag}", files=files)
                    assert saved.json() == {"image": "eye", "label": "eye"}
            labels = web.get("/datastore/?output=all").json()["objects"]["eye"]["labels"]
            assert {tag: label["ext"] for tag, label in labels.items()} == {
                "final": ".nii.gz", "original": ".seg.nrrd", "ohif": ".bin"
            }  # fmt: skip
            assert labels["final"]["info"]["label_info"] == info["label_info"]
            got = web.get("/datastore/label?label=eye&tag=original")
            assert got.content == content
            assert got.headers["content-disposition"].endswith('filename="label.seg.nrrd"')
            assert web.get("/datastore/image?image=eye").content == png()
            assert web.get(f"/session/{made['session_id']}").status_code == 200
            assert web.get("/info/").json()["datastore"] == {
                "total": 1, "completed": 1, "label_tags": {"final": 1, "original": 1, "ohif": 1}
            }  # fmt: skip
    with serving(tmp_path / "data") as url, httpx.Client(base_url=url) as web:
        changed = web.put("/datastore/label/info?label=eye&tag=final", data={"info": '{"segmentationMeta": {"a": 1}}'})
        assert {"label_info", "segmentationMeta"} <= set(changed.json())
        assert web.get("/datastore/label/info?label=eye&tag=final").json() == changed.json()
        assert web.delete("/datastore/label?id=eye&tag=final").status_code == 200
        assert web.get("/datastore/label?label=eye&tag=final").status_code == 404
        assert web.head("/datastore/label?image=eye&tag=ohif").status_code == 200
        bad = {"params": (None, "{}"), "label": ("l.exe", content)}
        assert web.put("/datastore/label?image=eye", files=bad).status_code == 422
        assert web.put("/datastore/label?image=eye", files={"label": ("l.nii", b"")}).status_code == 422


def test_images_stay_and_copies_for_a_session_go(tmp_path: Path) -> None:
    service = Service(ScriptedPolicy([STOP]), RegionSegmenter(), tmp_path, limits=Limits(idle_seconds=100))
    app = create_app(service, mounts=standard_mounts(page=False))
    with loopback.serving(app) as url, httpx.Client(base_url=url, timeout=60) as web:
        web.put("/datastore/?image=eye", files={"file": ("eye.png", png())})
        made = web.put("/session/", files={"files": ("eye.png", png())}).json()
        service.expire()
        assert web.get(f"/session/{made['session_id']}").status_code == 200
        for folder in (tmp_path / "monai-sessions").iterdir():
            import os

            os.utime(folder, (0, 0))
        service.expire()
        assert web.get(f"/session/{made['session_id']}").status_code == 404
        assert web.head("/datastore/image?image=eye").status_code == 200


# --------------------------------------------------------------------------------------------------- the module


def send(url: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*urlsplit(url).netloc.split(":"))
    if body is not None:
        headers = {"content-length": str(len(body)), "content-type": "application/x-www-form-urlencoded", **headers}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def test_the_module_logs_in(tmp_path: Path) -> None:
    def password(word: str) -> str:
        return urlencode({"username": "user-xyz", "password": word, "grant_type": "password"})

    with serving(tmp_path / "locked", TOKEN) as url:
        assert send(url, "GET", "/auth/") == (200, {"enabled": True})
        assert send(url, "GET", "/info/")[0] == 401
        assert send(url, "POST", "/auth/token", password("wrong-password"))[0] == 401
        assert send(url, "GET", "/auth/token/valid")[0] == 401
        status, token = send(url, "POST", "/auth/token", password(TOKEN))
        assert (status, token["token_type"]) == (200, "bearer")
        shown = {"Authorization": f"{token['token_type']} {token['access_token']}"}
        assert send(url, "GET", "/auth/token/valid", **shown)[0] == 200
        assert "ibisagent" in send(url, "GET", "/info/", **shown)[1]["models"]
        for _ in range(8):  # as slow as any other door for whoever tries passwords
            send(url, "POST", "/auth/token", password("wrong-password"))
        assert send(url, "POST", "/auth/token", password(TOKEN))[0] == 200
    with serving(tmp_path / "open") as url:
        assert send(url, "GET", "/auth/") == (200, {"enabled": False})
        assert send(url, "GET", "/auth/token/valid")[0] == 200


def test_which_image_comes_next(tmp_path: Path) -> None:
    with serving(tmp_path / "data", labels=("bright box",)) as url, httpx.Client(base_url=url, timeout=60) as web:

        def sample(strategy: str) -> dict[str, Any]:
            answer = web.post(f"/activelearning/{strategy}", json={"client_id": "user-xyz"})
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        assert sample("random") == {}
        for name, shade in (("sure", 220), ("blurred", 38), ("third", 200)):
            web.put(f"/datastore/?image={name}", files={"file": (f"{name}.png", png(shade=shade))})
        assert set(web.get("/info/").json()["strategies"]) == {"next", "random", "doubtful", "useful"}
        assert [sample("next")["id"] for _ in range(4)] == ["sure", "blurred", "third", "sure"]
        doubted = sample("doubtful")
        assert doubted["name"] == f"{doubted['id']}.png"
        every = web.get("/datastore/?output=all").json()["objects"]
        for name in every:
            if name != doubted["id"]:
                web.put(f"/datastore/label?image={name}", files={"label": ("l.png", png())})
        assert {sample(strategy)["id"] for strategy in ("next", "random", "doubtful", "useful")} == {doubted["id"]}
        web.put(f"/datastore/label?image={doubted['id']}", files={"label": ("l.png", png())})
        assert sample("doubtful") == {}
        assert web.post("/activelearning/other", json={}).status_code == 404


def test_the_most_doubtful_is_the_one_with_the_lowest_reliability(tmp_path: Path) -> None:
    with serving(tmp_path / "data", labels=("bright box",)) as url, httpx.Client(base_url=url, timeout=60) as web:
        for name, content in (("box", png()), ("nothing", png(shade=30)), ("scan", None)):
            file = (f"{name}.png", content) if content else ("scan.nii.gz", scan(tmp_path))
            web.put(f"/datastore/?image={name}", files={"file": file})
        answers = [web.post("/activelearning/doubtful", json={}).json()]
        kept = [json.loads(path.read_text()) for path in (tmp_path / "data").rglob("stored.json")]
        scores = {one["id"]: one["reliability"] for one in kept}
        assert scores["scan"] is None
        assert answers[0]["id"] == min(("box", "nothing"), key=scores.__getitem__)
        assert answers[0]["reliability"] == scores[answers[0]["id"]]


def test_training_needs_labels_and_the_log_is_read(url: str) -> None:
    with httpx.Client(base_url=url) as web:
        assert web.get("/train/?check_if_running=true").status_code == 404
        for answer in (web.post("/train/", json={}), web.post("/train/ibisagent", json={})):
            assert answer.status_code == 422
            assert "it takes 3" in answer.json()["detail"]
        assert "nothing is being learned" in web.delete("/train/").json()["detail"]
        assert list(web.get("/info/").json()["trainers"]) == ["ibisagent"]
        web.post("/infer/ibisagent?image=none-such")
        lines = web.get("/logs/?lines=1000&text=true").text
        assert "the server has started" in lines
        assert "refused with 404: MissingError" in lines
        assert "none-such" not in lines


# -------------------------------------------------------------------------------------------------------- OHIF


def test_pages_from_elsewhere(tmp_path: Path) -> None:
    viewer, ask = "http://viewer.example:3000", {"access-control-request-method": "POST"}
    with serving(tmp_path / "open", origins=(viewer,)) as url:
        for origin in (viewer, "http://localhost:3000", "http://127.0.0.1:3000", "https://[::1]"):
            answer = httpx.get(f"{url}/info/", headers={"origin": origin})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
            asked = httpx.options(f"{url}/infer/ibisagent", headers={"origin": origin, **ask})
            assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, origin)
            for path in ("/v1/sessions", "/v1/segment", "/mcp", "/health"):  # what OHIF does not need
                answer = httpx.get(f"{url}{path}", headers={"origin": origin})
                assert answer.status_code == 403
                assert "access-control-allow-origin" not in answer.headers
        for origin in ("http://evil.example", "null", "http://localhost.evil.example", f"{viewer}0"):
            answer = httpx.get(f"{url}/info/", headers={"origin": origin})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
    with serving(tmp_path / "locked", TOKEN, origins=(f"{viewer}/",)) as url:
        assert httpx.get(f"{url}/info/", headers={"origin": "http://localhost:3000"}).status_code == 403
        assert httpx.options(f"{url}/info/", headers={"origin": viewer, **ask}).status_code == 200
        assert httpx.get(f"{url}/info/", headers={"origin": viewer}).status_code == 401
        shown = {"origin": viewer, "authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/info/", headers=shown).status_code == 200
        cookie = httpx.post(f"{url}/login", data={"token": TOKEN}).cookies
        answer = httpx.get(f"{url}/info/", headers={"origin": viewer}, cookies=dict(cookie))
        assert answer.status_code == 401, "the cookie of our own page let another page in"
    for number, wrong in enumerate(("viewer.example", "*", "http://a/b", "file://", "")):
        with pytest.raises(ConfigError, match="origin"), serving(tmp_path / str(number), origins=(wrong,)):
            pass


@pytest.fixture
def dicomweb(tmp_path: Path) -> Iterator[tuple[str, list[Path]]]:
    """A DICOMweb server of one series: its address, and the files."""
    inside = boxes()["left"] | boxes()["right"]
    files = slice_files(tmp_path / "series", hounsfield(inside), GRIDS["LPS-uneven"])
    header = pydicom.dcmread(files[0])
    study, series = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
    listed = {"0020000D": study, "0020000E": series, "00080060": "CT"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.path.endswith("/series") and "/studies/" not in asked.path:
                wanted = parse_qs(asked.query).get("SeriesInstanceUID", [series])
                found = [{tag: {"vr": "UI", "Value": [value]} for tag, value in listed.items()}]
                self._answer("application/dicom+json", json.dumps(found if wanted == [series] else []).encode())
            elif asked.path == f"/dicom-web/studies/{study}/series/{series}":
                parts = b"".join(
                    b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() + b"\r\n" for file in files
                )
                self._answer('multipart/related; type="application/dicom"; boundary=edge', parts + b"--edge--\r\n")
            else:
                self.send_error(404)

        def _answer(self, kind: str, content: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dicom-web", files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_series_of_a_dicomweb_server(dicomweb: tuple[str, list[Path]], tmp_path: Path) -> None:
    pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed")
    address, files = dicomweb
    header = pydicom.dcmread(files[0])
    series = str(header.SeriesInstanceUID)
    with serving(tmp_path / "data", studies=address) as url, httpx.Client(base_url=url, timeout=60) as web:
        offered = web.post("/activelearning/next", json={}).json()
        assert (offered["id"], offered["StudyInstanceUID"]) == (series, str(header.StudyInstanceUID))
        params = {"foreground": [[10, 12, 5]], "background": [], **OHIF}
        form = {"params": (None, json.dumps(params))}
        answer = web.post(f"/infer/ibisagent?image={series}&output=image", files=form)
        assert answer.content.startswith(b"NRRD"), answer.text
        labels = np.frombuffer(answer.content.partition(b"\n\n")[2], np.uint8).reshape(SHAPE[::-1]).transpose()
        assert iou(labels == 1, boxes()["left"]) > 0.8
        seg = web.post(f"/infer/ibisagent?image={series}&output=dicom_seg", files=form)
        assert seg.headers["content-type"] == "application/dicom"
        dataset = pydicom.dcmread(io.BytesIO(seg.content))
        assert (dataset.Modality, dataset.StudyInstanceUID) == ("SEG", header.StudyInstanceUID)
        saved = web.put(f"/datastore/label?image={series}", files={"label": ("label.bin", b"x")})
        assert saved.status_code == 200
        assert web.post("/activelearning/random", json={}).json() == {}
        assert web.post("/infer/ibisagent?image=1.2.3.4", files=form).status_code == 404
    with serving(tmp_path / "alone") as url:
        answer = httpx.post(f"{url}/infer/ibisagent?image={series}", files=form)
        assert answer.status_code == 422
        assert "--studies" in answer.json()["detail"]
    with serving(tmp_path / "dead", studies="http://127.0.0.1:9/dicom-web") as url:
        answer = httpx.post(f"{url}/infer/ibisagent?image={series}", files=form, timeout=60)
        assert answer.status_code == 422
        assert "cannot be reached" in answer.json()["detail"]
