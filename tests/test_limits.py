"""Files that claim, or unpack to, far more than they are: refused in one line, before memory or time is spent.

Each is read in a process of its own, under the limits of a server, with little more memory than the libraries take.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from ibisagent.datasets import read_cases
from ibisagent.datasets.members import npz_array, npz_shapes, read_target
from ibisagent.errors import ConfigError, DataError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.imaging.images import decode_image, read_image, read_masks
from ibisagent.imaging.masks import decode_rle, decode_runs
from ibisagent.store import read_plain_record
from ibisagent.volumes import read_volume

PIXELS, VOXELS = 2**22, 2**24
MEMORY_MB, SECONDS = 96, 2.0
READER = """
import sys, time
from pathlib import Path
import nibabel, pydicom.pixels, SimpleITK, tifffile
import ibisagent.volumes.dicom, ibisagent.volumes.itk, ibisagent.volumes.nifti
from ibisagent.imaging import limits
from ibisagent.errors import DataError
from ibisagent.imaging.images import read_image
from ibisagent.volumes import is_volume, read_volume

def peak_kb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

def read(name):
    before, start = peak_kb(), time.process_time()
    try:
        with limits.at_most(pixels=PIXELS, voxels=VOXELS):
            (read_volume if is_volume(name) else read_image)(name)
        said = "it was read"
    except DataError as error:
        said = str(error)
    print(f"{(peak_kb() - before) // 1024}|{time.process_time() - start:.2f}|{said}", flush=True)

for name in sys.argv[1:]:
    read(name)
""".replace("PIXELS", str(PIXELS)).replace("VOXELS", str(VOXELS))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int = 9, height: int = 9, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(9 * 28))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def page(tags: dict[int, tuple[int, int, int]] | None = None, following: int = 0, width: int = 4) -> bytes:
    """One directory of a little-endian TIFF; tags: {number: (type, count, value)} besides those of a grey image."""
    usual = {256: width, 257: width, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: width, 279: 16}
    found = {number: (4, 1, value) for number, value in usual.items()} | (tags or {})
    entries = b"".join(struct.pack("<HHII", number, *found[number]) for number in sorted(found))
    return struct.pack("<H", len(found)) + entries + struct.pack("<I", following)


def tiff(*pages: bytes, tail: int = 64) -> bytes:
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages) + bytes(tail)


def stack(count: int) -> bytes:
    size = len(page())
    return tiff(*(page(following=8 + (number + 1) * size) for number in range(count - 1)), page())


def aliased_tags(count: int, size: int) -> dict[int, tuple[int, int, int]]:
    """Tags that all name the same stretch of bytes."""
    return {1000 + number: (7, size, 8) for number in range(count)}


def jpeg(**options: bool) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (1000, 1000)).save(file, "JPEG", **options)
    return file.getvalue()


def resized_jpeg() -> bytes:
    content = jpeg()
    at = content.index(b"\xff\xc0")
    return content[: at + 5] + struct.pack(">HH", 65_000, 65_000) + content[at + 9 :]


def jpeg_of_many_scans() -> bytes:
    content = jpeg(progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 900 + b"\xff\xd9"


def jpeg_of_aliased_exif() -> bytes:
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + page(aliased_tags(4000, 60_000)) + bytes(12_000)
    content = jpeg()
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


def nifti(*shape: int, code: int = 4, bits: int = 16, start: float = 352.0) -> bytes:
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into(f"<{len(shape) + 1}h", head, 40, len(shape), *shape)
    struct.pack_into("<hh", head, 70, code, bits)
    struct.pack_into("<8f", head, 76, *[1.0] * 8)
    struct.pack_into("<f", head, 108, start)
    struct.pack_into("<hh", head, 252, 0, 1)
    for row in range(3):
        struct.pack_into("<f", head, 280 + 20 * row, 1.0)
    head[344:348] = b"n+1\0"
    return bytes(head)


def zipped(head: bytes, megabytes: int) -> bytes:
    return gzip.compress(head + bytes(megabytes * 2**20), 1)


def extended() -> bytes:
    """A NIfTI header whose extension is said to be two gigabytes long."""
    head = bytearray(nifti(4, 4, 4, start=2.0e9))
    head[348] = 1
    return zipped(bytes(head) + struct.pack("<ii", 2**31 - 1024, 0), 200)


def nrrd(*sizes: int, more: str = "encoding: gzip") -> bytes:
    lines = ("NRRD0004", "type: short", f"dimension: {len(sizes)}", f"sizes: {' '.join(map(str, sizes))}", more)
    return "\n".join((*lines, "endian: little", "", "")).encode()


def meta_image(size: str, *more: str, sides: int = 3, data: str = "LOCAL") -> bytes:
    lines = ("ObjectType = Image", f"NDims = {sides}", "BinaryData = True", *more, f"DimSize = {size}")
    return "\n".join((*lines, "ElementType = MET_SHORT", f"ElementDataFile = {data}", "")).encode()


def dicom(syntax: UID, pixels: bytes, *, size: int = 64, frames: int = 1, bits: int = 8, private: bytes = b"") -> bytes:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3", "1.2.4"
    header.Rows = header.Columns = size
    header.BitsAllocated = header.BitsStored = bits
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = bits - 1, 0, 1
    header.PhotometricInterpretation, header.NumberOfFrames = "MONOCHROME2", frames
    header.add_new(0x00091010, "OB", private)
    header.PixelData = pixels
    header["PixelData"].VR = "OB"
    header["PixelData"].is_undefined_length = syntax.is_encapsulated
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.file_meta.MediaStorageSOPClassUID, header.file_meta.MediaStorageSOPInstanceUID = header.SOPClassUID, "1.2.3"
    file = io.BytesIO()
    pydicom.dcmwrite(file, header, enforce_file_format=True)
    return file.getvalue()


def resized_jpeg_2000() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (64, 64)).save(file, "JPEG2000", no_jp2=True)
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\x51")
    struct.pack_into(">II", content, at + 6, 60_000, 60_000)
    struct.pack_into(">II", content, at + 22, 60_000, 60_000)
    return bytes(content)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "size.png": (lambda: png(60_000, 60_000), "3600000000 pixels, at most"),
    "profile.png": (lambda: png(more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))), "unpacks to too much"),
    "text.png": (lambda: png(more=chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**26)))), "unpacks to too much"),
    "ztxt.png": (lambda: png(more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))), "unpacks to too much"),
    "chunks.png": (lambda: png(more=chunk(b"prIv", b"") * 500_000), "more than 65536 chunks"),
    "exif.png": (
        lambda: png(more=chunk(b"eXIf", tiff(page(aliased_tags(4000, 900_000)), tail=900_000))),
        "tags name more bytes than it has",
    ),
    "pages.tif": (lambda: stack(30_000), "a stack of more than 256 pages"),
    "circle.tif": (lambda: tiff(page(following=8)), "in a circle"),
    "long-circle.tif": (lambda: tiff(page(following=8 + len(page())), page(following=8)), "in a circle"),
    "sub-circle.tif": (lambda: tiff(page({330: (4, 1, 8)})), "in a circle"),
    "size.tif": (lambda: tiff(page(width=60_000)), "3600000000 pixels, at most"),
    "tags.tif": (lambda: tiff(page(aliased_tags(4000, 900_000)), tail=900_000), "tags name more bytes than it has"),
    "tiles.tif": (
        lambda: tiff(page({322: (4, 1, 1), 323: (4, 1, 1), 324: (4, 1, 8), 325: (4, 1, 1)}, width=2000)),
        "cut into 4000000 tiles",
    ),
    "tile.tif": (
        lambda: tiff(page({322: (4, 1, 60_000), 323: (4, 1, 60_000), 324: (4, 1, 8), 325: (4, 1, 1)})),
        "60000 x 60000 pixels",
    ),
    "deep.tif": (
        lambda: tiff(page({258: (4, 1, 64), 277: (4, 1, 12), 339: (4, 1, 3)}, width=2000)),
        "2000 x 2000 pixels of 96 bytes",
    ),
    "size.bmp": (
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6) + bytes(46),
        "3600000000 pixels, at most",
    ),
    "frames.gif": (
        lambda: b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + bytes(3) + (b"," + bytes(9) + b"\2\1\0\0") * 100_000,
        "not a readable",
    ),
    "size.jpg": (resized_jpeg, "65000 x 65000 pixels, at most"),
    "scans.jpg": (jpeg_of_many_scans, "over its image 9.. times"),
    "exif.jpg": (jpeg_of_aliased_exif, "tags name more bytes than it has"),
    "zeros.nii.gz": (lambda: zipped(nifti(512, 512, 256), 128), "512 x 512 x 256 voxels, at most"),
    "doubles.nii.gz": (lambda: zipped(nifti(256, 256, 200, code=64, bits=64), 100), "unpacks to 104857600 bytes"),
    "claim.nii.gz": (lambda: zipped(nifti(30_000, 30_000, 30_000), 1), "30000 x 30000 x 30000 voxels, at most"),
    "claim.nii": (lambda: nifti(30_000, 30_000, 30_000), "30000 x 30000 x 30000 voxels, at most"),
    "extension.nii.gz": (extended, "voxels begin after more than"),
    "zeros.nrrd": (lambda: nrrd(512, 512, 256) + gzip.compress(bytes(2**27), 1), "512 x 512 x 256 voxels, at most"),
    "claim.nrrd": (lambda: nrrd(100_000, 100_000, 100_000), "voxels, at most"),
    "sides.nrrd": (lambda: nrrd(*[1] * 15), "has 15 sides"),
    "elsewhere.nrrd": (lambda: nrrd(4, 4, more="encoding: raw\ndata file: /etc/hostname"), "outside its folder"),
    "claim.mha": (lambda: meta_image("100000 100000 100000"), "voxels, at most"),
    "zipped.mha": (
        lambda: meta_image("512 512 256", "CompressedData = True") + zlib.compress(bytes(2**27), 1),
        "512 x 512 x 256 voxels, at most",
    ),
    "zipped-size.mha": (
        lambda: meta_image("4 4 4", "CompressedData = True", "CompressedDataSize = 99999999999999"),
        "99999999999999 bytes of the file",
    ),
    "sides.mha": (lambda: meta_image("1 1 1", sides=100_000_000), "has 100000000 sides"),
    "channels.mha": (lambda: meta_image("4 4 4", "ElementNumberOfChannels = 1000000000"), "unpacks to"),
    "elsewhere.mha": (lambda: meta_image("4 4 1", data="/etc/hostname"), "outside its folder"),
    "list.mha": (lambda: meta_image("4 4 1", data="LIST\n../../secret"), "outside its folder"),
    "format.mha": (lambda: meta_image("4 4 1", data="%s%s%s%s%s%s%n 1 9 1"), "no name of numbered files"),
    "format.nrrd": (
        lambda: nrrd(4, 4, more="encoding: raw\ndata file: %d%s%s%s%s%n 1 9 1"),
        "no name of numbered files",
    ),
    "deflated.dcm": (
        lambda: dicom(DeflatedExplicitVRLittleEndian, bytes(4096), private=bytes(2**27)),
        "deflated, and unpacks to",
    ),
    "frames.dcm": (lambda: dicom(ExplicitVRLittleEndian, bytes(4096), frames=2**31 - 1), "2147483647 frames, at most"),
    "small-frames.dcm": (
        lambda: dicom(ExplicitVRLittleEndian, bytes(10**5), size=1, frames=10**5),
        "100000 frames, at",
    ),
    "size.dcm": (lambda: dicom(ExplicitVRLittleEndian, bytes(4096), size=65_000), "voxels, at most"),
    "jpeg-2000.dcm": (lambda: dicom(JPEG2000Lossless, encapsulate([resized_jpeg_2000()])), "claims 3600000000 pixels"),
    "jpeg.dcm": (
        lambda: dicom(UID("1.2.840.10008.1.2.4.50"), encapsulate([resized_jpeg()])),
        "claims 4225000000 pixels",
    ),
    "scans.dcm": (
        lambda: dicom(UID("1.2.840.10008.1.2.4.50"), encapsulate([jpeg_of_many_scans()]), size=1000),
        "over its image 9.. times",
    ),
    "jpeg-ls.dcm": (
        lambda: dicom(
            UID("1.2.840.10008.1.2.4.80"),
            encapsulate([b"\xff\xd8\xff\xf7\0\x0b\x08\xfd\xe8\xfd\xe8\1\1\x11\0\xff\xda\0\x08\1\1" + bytes(99)]),
        ),
        "claims 4225000000 pixels",
    ),
    "runs.dcm": (
        lambda: dicom(RLELossless, encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2**20])),
        "run lengths are longer",
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, float, str]]:
    """{file: (megabytes, seconds, message)}, all read by one process; a name that is missing did not survive."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    asked = [str(folder / name) for name in BOMBS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, *asked], capture_output=True, text=True, timeout=600, check=False
    )
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {name: (int(line[0]), float(line[1]), line[2]) for name, line in zip(BOMBS, lines, strict=False)}


def nrrd_of_another_file(lines: str) -> bytes:
    return f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 5 5 5\nencoding: raw\n{lines}\n\n".encode()


def meta_image_of_another_file(lines: str, first: str = "ObjectType = Image") -> bytes:
    return f"{first}\nNDims = 3\nBinaryData = True\nDimSize = 5 5 5\nElementType = MET_UCHAR\n{lines}\n".encode()


FAR = "./" * 60 + "../" * 40  # longer than an error message, and up to the root from any folder
ANOTHER_FILE: dict[str, Callable[[str], bytes]] = {  # headers that ITK reads in other ways than somebody who searches
    "absolute.mha": lambda there: meta_image_of_another_file(f"ElementDataFile = {there}"),
    "colon.mha": lambda there: meta_image_of_another_file(f"ElementDataFile : {there}"),
    "colon.mhd": lambda there: meta_image_of_another_file(f"ElementDataFile:{there}"),
    "other-word.mha": lambda there: meta_image_of_another_file(f"data file: LOCAL\nElementDataFile = {there}"),
    "empty-value.mha": lambda there: meta_image_of_another_file(
        f"Comment =\nElementDataFile = LOCAL\nElementDataFile = {there}"
    ),
    "twice.mha": lambda there: meta_image_of_another_file(f"ElementDataFile = LOCAL\nElementDataFile = {there}"),
    "other-magic.mha": lambda there: meta_image_of_another_file(f"ElementDataFile = {there}", "NRRD = 1\n"),
    "other-magic.nrrd": lambda there: meta_image_of_another_file(f"ElementDataFile = {there}"),
    "far.mha": lambda there: meta_image_of_another_file(f"ElementDataFile = {FAR}{there}"),
    "far-list.mha": lambda there: meta_image_of_another_file("ElementDataFile = LIST\n" + f"{FAR}{there}\n" * 5),
    "absolute.nrrd": lambda there: nrrd_of_another_file(f"data file: {there}"),
    "one-word.nrrd": lambda there: nrrd_of_another_file(f"DataFile: {there}"),
    "key.nrrd": lambda there: nrrd_of_another_file(f"ElementDataFile = LOCAL:=x\ndata file: {there}"),
    "same-key.nrrd": lambda there: nrrd_of_another_file(f"data file:=LOCAL\ndata file: {there}"),
    "carriage-return.nrrd": lambda there: nrrd_of_another_file(f"content: a\rdata file: {there}"),
    "list.nrrd": lambda there: nrrd_of_another_file("data file: LIST\n" + "\n".join([there] * 5)),
    "other-magic.nrrd.mha": lambda there: nrrd_of_another_file(f"data file: {there}"),
}


@pytest.mark.parametrize("name", ANOTHER_FILE)
def test_a_volume_has_no_voxels_of_another_file(name: str, tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "uploads"
    secret.write_bytes(b"CANARY--" * 20)
    folder.mkdir()
    (folder / name).write_bytes(ANOTHER_FILE[name](str(secret)))
    with pytest.raises(DataError, match=r"outside its folder|cannot be trusted"):
        read_volume(folder / name)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("one.mhd", meta_image_of_another_file("Comment = a: b = c\r\n0008|0060 = CT\nElementDataFile = 1.raw")),
        ("list.mhd", meta_image_of_another_file("ElementDataFile = LIST 2\n" + "1.raw\n" * 5)),
        ("numbered.mhd", meta_image_of_another_file("ElementDataFile = %d.raw 1 5 1")),
        ("one.nhdr", nrrd_of_another_file("# a: b\r\ncontent: c\nkey := d\ndata file: 1.raw")),
        ("numbered.nhdr", nrrd_of_another_file("data file: %d.raw 1 5 1")),
    ],
)
def test_voxels_beside_their_header_are_read(name: str, header: bytes, tmp_path: Path) -> None:
    voxels = bytes(range(125))
    for number in range(1, 6):
        plane = voxels[25 * number - 25 : 25 * number] if name.startswith("numbered") else voxels[:25]
        (tmp_path / f"{number}.raw").write_bytes(voxels if name.startswith("one") else plane)
    (tmp_path / name).write_bytes(header)
    expected = np.frombuffer(voxels[:25] * 5 if name.startswith("list") else voxels, np.uint8).reshape(5, 5, 5)
    np.testing.assert_array_equal(read_volume(tmp_path / name).voxels, expected.swapaxes(0, 2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_is_paid_for(answers: dict[str, tuple[int, float, str]], name: str) -> None:
    assert name in answers, "the reader did not survive"
    megabytes, seconds, said = answers[name]
    assert name in said
    assert re.search(BOMBS[name][1], said), said
    assert megabytes < MEMORY_MB, said
    assert seconds < SECONDS, said


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    """The same files, small: the checks refuse no honest ones."""
    honest = {
        "a.png": png(more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000)))),
        "a.jpg": jpeg(progressive=True),
        "a.tif": tiff(page({330: (4, 1, 8 + len(page({330: (4, 1, 0)})))}), page()),
    }
    for name, content in honest.items():
        (tmp_path / name).write_bytes(content)
        with limits.at_most(pixels=10**6):
            assert read_image(tmp_path / name).pixels.ndim == 3
    volumes = {
        "a.nii.gz": zipped(nifti(8, 8, 8), 1),
        "a.mha": meta_image("8 8 8") + bytes(1024),
        "a.nrrd": nrrd(8, 8, 8) + gzip.compress(bytes(1024)),
        "deflated.dcm": dicom(DeflatedExplicitVRLittleEndian, bytes(4096 * 3), frames=3),
        "runs.dcm": dicom(RLELossless, encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 32])),
    }
    for name, content in volumes.items():
        (tmp_path / name).write_bytes(content)
        with limits.at_most(voxels=64 * 64 * 4):
            assert not read_volume(tmp_path / name).voxels.any()


def test_one_time_point_of_many_is_read(tmp_path: Path) -> None:
    """Only what lies before the chosen one is unpacked, and only that is limited."""
    points = np.arange(300, dtype=np.int16).repeat(8**3)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti(8, 8, 8, 300) + points.tobytes()))
    with limits.at_most(voxels=8**3 * 50):
        assert (read_volume(tmp_path / "a.nii.gz", channel=70).voxels == 70).all()
        with pytest.raises(TooLargeError, match="unpacks to"):
            read_volume(tmp_path / "a.nii.gz", channel=299)


@contextmanager
def raised(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv(name, str(value))
        yield


def test_limits_are_raised_and_lowered_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    with raised(monkeypatch, "IBIS_MAX_PIXELS", 80), pytest.raises(TooLargeError, match="or set IBIS_MAX_PIXELS"):
        read_image(file)
    with raised(monkeypatch, "IBIS_MAX_PIXELS", 81):
        assert read_image(file).size == (9, 9)
    (tmp_path / "a.nii").write_bytes(nifti(4, 4, 4) + bytes(128))
    with raised(monkeypatch, "IBIS_MAX_VOXELS", 63), pytest.raises(TooLargeError, match="at most 63 are read"):
        read_volume(tmp_path / "a.nii")
    (tmp_path / "a.dcm").write_bytes(dicom(ExplicitVRLittleEndian, bytes(4096 * 3), frames=3))
    with raised(monkeypatch, "IBIS_MAX_FRAMES", 2), pytest.raises(TooLargeError, match="3 frames"):
        read_volume(tmp_path / "a.dcm")
    with (
        raised(monkeypatch, "IBIS_MAX_PIXELS", 2**40),
        limits.at_most(pixels=80),
        pytest.raises(TooLargeError, match=r"crop or shrink it$"),
    ):
        read_image(file)


def test_what_comes_over_a_network_is_held_against_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_image(png(), "it", ("PNG",)).size == (9, 9)
    with (
        raised(monkeypatch, "IBIS_MAX_PIXELS", 80),
        pytest.raises(TooLargeError, match=r"^it: 9 x 9 pixels, at most 80"),
    ):
        decode_image(png(), "it", ("PNG",))
    many = chunk(b"prIv", b"") * 70_000
    with pytest.raises(TooLargeError, match=r"^it: has more than 65536 chunks"):
        decode_image(png(more=many), "it", ("PNG",))
    for content in (jpeg(), b"nothing", b""):
        with pytest.raises(DataError, match=r"^it: not a readable PNG image"):
            decode_image(content, "it", ("PNG",))
    with pytest.raises(DataError, match=r"^it: damaged"):
        decode_image(png(60), "it", ("PNG",))


def test_raising_the_limit_raises_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)
    with raised(monkeypatch, "IBIS_MAX_PIXELS", 81):
        assert decode_image(png(), "it", ("PNG",)).size == (9, 9)


@pytest.mark.parametrize("value", ["", "-1", "0", "1e9", "many", "9" * 30])
def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with raised(monkeypatch, "IBIS_MAX_VOXELS", value), pytest.raises(ConfigError, match="IBIS_MAX_VOXELS is '"):
        limits.current()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png()),
        ("a.jpg", jpeg()),
        ("a.nii", nifti(4, 4, 4) + bytes(128)),
        ("a.dcm", dicom(ExplicitVRLittleEndian, bytes(4096 * 3), frames=3)),
    ],
)
def test_such_a_limit_is_not_taken_for_damage_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    read = read_image if name.endswith(("png", "jpg")) else read_volume
    with raised(monkeypatch, "IBIS_MAX_PIXELS", "many"), pytest.raises(ConfigError, match="IBIS_MAX_PIXELS is 'many'"):
        read(tmp_path / name)


def test_a_photograph_of_900_megapixels_and_a_scan_of_2000_slices_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    limits.check_voxels((512, 512, 2000), "a scan", bytes_each=2)
    with raised(monkeypatch, "IBIS_MAX_PIXELS", 30_000**2):
        limits.check_pixels(30_000, 30_000, "a photograph", bytes_each=3)
    with pytest.raises(TooLargeError, match="at most 67108864"):
        limits.check_pixels(30_000, 30_000, "a photograph", bytes_each=3)


RUNS = [
    {"size": [2**20, 2**20], "counts": "o" * 8},
    {"size": [60_000, 60_000], "counts": "0"},
    {"size": [100, 100], "counts": "PPPPPPPPPPPPPPPPPP1"},
    {"size": [100, 100], "counts": [10**12]},
    {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": [100, 100], "counts": [10**30]},
    {"size": [100, 100], "counts": [-(10**4), 2 * 10**4]},
    {"size": [100, 100], "counts": [2**62, 2**62, 2**62, 2**62, 10**4]},
    {"size": [100, 100], "counts": [0.5, 9999.5]},
    {"size": [float("inf"), 1], "counts": [1]},
]


@pytest.mark.parametrize("code", RUNS, ids=range(len(RUNS)))
def test_run_lengths_beyond_their_size_are_refused(code: dict[str, object]) -> None:
    with pytest.raises(DataError, match="run-length mask"):
        decode_runs(code)


def test_a_run_of_more_than_half_a_gigapixel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's own decoder keeps runs in 32 bits with sign; nothing is drawn here that stays empty."""
    pixels = 2**30
    counts = "".join(chr(48 + (pixels >> 5 * part & 31) + 32) for part in range(6)) + "1"
    with raised(monkeypatch, "IBIS_MAX_PIXELS", pixels), pytest.raises(DataError, match="does not fill"):
        decode_rle({"size": [2**15, 2**15], "counts": counts[:-1] + "0"})


def record(size: int, counts: list[str], side: int = 100) -> dict[str, object]:
    masks = [
        {"name": f"mask {number}", "rle": {"size": [size, size], "counts": code}} for number, code in enumerate(counts)
    ]
    return {
        "format": "ibisagent episode",
        "version": 1,
        "case_id": "a",
        "query": "Segment it.",
        "height": side,
        "width": side,
        "image_sha256": "0",
        "image_source": "",
        "start": masks,
        "turns": [],
        "stop": "stopped",
        "made_by": {},
    }


def test_masks_of_a_record_are_checked_before_they_are_unpacked() -> None:
    with pytest.raises(DataError, match=r"mask 'mask 0' is of size \(8000, 8000\), not \(100, 100\)"):
        read_plain_record(record(8000, ["0"]), "record.json")
    multiple = [f"{first}0" for first in "0123456789"]
    with limits.at_most(voxels=20_000), pytest.raises(TooLargeError, match="unpacks to 100000 bytes"):
        read_plain_record(record(100, multiple), "record.json")


def npy(shape: str, kind: str = "|u1", length: int | None = None) -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(header) if length is None else length) + header


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_numpy_archives_are_held_against_the_limits(tmp_path: Path) -> None:
    with limits.at_most(voxels=10**6):
        bomb = archive(tmp_path / "a.npz", x=npy("(5000, 5000)") + bytes(25 * 10**6))
        with pytest.raises(TooLargeError, match=r"a\.npz: 'x': unpacks to 25000000 bytes"):
            npz_array(bomb, "x")
        wide = archive(tmp_path / "b.npz", x=npy("(10, 10)", "|S9000000"))
        with pytest.raises(TooLargeError, match="unpacks to 900000000 bytes"):
            npz_array(wide, "x")
        overflow = archive(tmp_path / "c.npz", x=npy(f"({2**33}, {2**33})"))
        with pytest.raises(TooLargeError, match="unpacks to"):
            npz_array(overflow, "x")
    longer = archive(tmp_path / "d.npz", x=npy("(10, 10)") + bytes(10**8))
    with pytest.raises(DataError, match="'x' cannot be read"):
        npz_array(longer, "x")
    header = archive(tmp_path / "e.npz", x=npy("(1,)", length=2**31) + bytes(10**8))
    with pytest.raises(DataError, match="header is too long"):
        npz_shapes(header)
    many = archive(tmp_path / "f.npz", **{f"x{number}": b"" for number in range(2000)})
    with pytest.raises(DataError, match="holds 2000 files"):
        npz_shapes(many)


COCO = [
    ({"height": 10**6, "width": 10**6}, [[0, 0, 9, 0, 9, 9]], "1000000 x 1000000 pixels"),
    ({"height": -50, "width": -50}, [[0, 0, 9, 0, 9, 9]], "image of -50 x -50"),
    ({"height": float("inf"), "width": 5}, [[0, 0, 9, 0, 9, 9]], "cannot be drawn"),
    ({}, {"size": [10**6, 10**6], "counts": [10**12]}, "run-length mask of size"),
    ({}, {"size": [50, 50], "counts": [10**12]}, "does not fill"),
    ({}, [[0, 0, 2.0e9, 0, 9, 9]], "leaves the image"),
    ({}, [[0, 0, float("nan"), 0, 9, 9]], "leaves the image"),
    ({}, [[0, 0, 49, 49] * 100_000], "has an outline of"),
]


@pytest.mark.parametrize(("image", "shape", "said"), COCO, ids=[said for *_, said in COCO])
def test_what_coco_json_claims_is_checked(tmp_path: Path, image: dict[str, object], shape: object, said: str) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 50, "width": 50, **image}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": shape}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        read_target(tmp_path / "a.json" / "1" / "1", None)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_nested_too_deep_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"image":' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(DataError, match="is not JSON"):
        read_cases(tmp_path / name)


def test_a_mask_is_limited_as_an_image_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with limits.at_most(pixels=80), pytest.raises(TooLargeError, match="9 x 9 pixels, at most 80"):
        read_masks(tmp_path / "a.png")
