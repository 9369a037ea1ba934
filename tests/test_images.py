"""Images and masks from files: every kind of pixel, every kind of damage, and nothing half written."""

import resource
import struct
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import write_whole
from ibisagent.imaging.images import read_image, read_masks, write_mask_png, write_png

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

SIZE = (61, 83)
ORIENTATION = 274


def colours(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def ramp(low, high, dtype):
    return np.linspace(low, high, SIZE[0] * SIZE[1]).reshape(SIZE).astype(dtype)


def disc(value=1, dtype=np.uint8):
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    return (((columns - 30) ** 2 + (rows - 20) ** 2 < 150) * value).astype(dtype)


def oriented(pixels, orientation):
    """What a viewer shows of `pixels` stored with this tag."""
    image = PIL.Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(PIL.ImageOps.exif_transpose(image))


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png_header(width, height):
    """A PNG file of the stated size with next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_colours_come_back_exactly(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    PIL.Image.fromarray(colours()).save(path)
    image = read_image(path)
    assert np.array_equal(image.pixels, colours())
    assert image.source == str(path)
    assert image.pixels.flags.writeable
    assert image.pixels.flags.c_contiguous
    assert np.array_equal(read_image(str(path)).pixels, colours())


def test_jpeg_is_read_and_the_suffix_does_not_matter(tmp_path):
    smooth = np.dstack([ramp(0, 255, np.uint8)] * 3)
    PIL.Image.fromarray(smooth).save(tmp_path / "image.jpg", quality=95)
    (tmp_path / "image.jpg").rename(tmp_path / "image.png")
    assert np.abs(read_image(tmp_path / "image.png").pixels.astype(int) - smooth).max() <= 3


def test_one_and_two_channels_are_grey(tmp_path):
    grey = colours()[..., 0]
    alpha = colours(1)[..., 0]
    PIL.Image.fromarray(grey).save(tmp_path / "1.png")
    PIL.Image.merge("LA", (PIL.Image.fromarray(grey), PIL.Image.fromarray(alpha))).save(tmp_path / "2.png")
    PIL.Image.fromarray(disc().astype(bool)).save(tmp_path / "bits.png")
    for name in ("1.png", "2.png"):
        assert np.array_equal(read_image(tmp_path / name).pixels, np.dstack([grey] * 3))
    assert np.array_equal(read_image(tmp_path / "bits.png").pixels[..., 0], disc(255))


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([colours(), colours(1)[..., 0]])
    PIL.Image.fromarray(rgba).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png").pixels, colours())


def test_palettes_are_resolved(tmp_path):
    image = PIL.Image.fromarray(disc(2))
    image.putpalette([10, 20, 30, 0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\0\xff\x80"
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png").pixels
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[20, 30].tolist() == [200, 100, 50]


def test_cmyk_becomes_rgb(tmp_path):
    PIL.Image.new("CMYK", SIZE[::-1], (0, 255, 255, 0)).save(tmp_path / "image.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "image.jpg").pixels[20, 30]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_with_any_number_of_channels(tmp_path, channels, planar):
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, channels), dtype=np.uint8)
    stored = values if planar == "contig" else np.moveaxis(values, 2, 0)
    kind = "rgb" if channels in (3, 4) else "minisblack"
    tifffile.imwrite(tmp_path / "image.tif", stored, photometric=kind, planarconfig=planar)
    shown = {2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2]}[channels]  # two stains: red and green
    expected = np.dstack([values[..., shown], np.zeros((*SIZE, 3 - len(shown)), np.uint8)])
    assert np.array_equal(read_image(tmp_path / "image.tif").pixels, expected)


@pytest.mark.parametrize(("channels", "kind"), [(4, "minisblack"), (7, "minisblack"), (5, "rgb")])
def test_channels_that_would_not_be_shown_are_refused(tmp_path, channels, kind):
    values = np.zeros((*SIZE, channels), np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        values,
        photometric=kind,
        planarconfig="contig",
        extrasamples=[0] * (channels - (3 if kind == "rgb" else 1)),
    )
    with pytest.raises(DataError, match=f"has {channels} channels") as error:
        read_image(tmp_path / "a.tif")
    one_line(error)


def test_the_tag_of_a_tiff_says_what_is_alpha(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, 2), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
    )
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, np.dstack([values[..., 0]] * 3))
    tifffile.imwrite(
        tmp_path / "b.ome.tif", np.moveaxis(values, 2, 0), metadata={"axes": "CYX"}, photometric="minisblack"
    )
    assert np.array_equal(read_image(tmp_path / "b.ome.tif").pixels[..., :2], values)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64])
def test_tifffile_grey_is_read_as_written_in_every_mode(tmp_path, dtype, photometric, byteorder, compression):
    low = -100 if np.dtype(dtype).kind != "u" else 0
    values = ramp(low, 127 if dtype == np.int8 else 200, dtype)
    if dtype == np.uint32:
        values = values * np.uint32(2**24)  # beyond what 32 bits with a sign hold
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, byteorder=byteorder, compression=compression)
    shown = read_image(tmp_path / "a.tif").pixels[..., 0].astype(float)
    written = values.astype(float) * (-1 if photometric == "miniswhite" else 1)
    assert np.corrcoef(shown.ravel(), written.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 4])
def test_uncompressed_tiff_is_upright(tmp_path, orientation, dtype, channels):
    values = (ramp(0, 255, np.uint8) // 2 if channels == 1 else np.dstack([colours(), colours()[..., :1]])).astype(
        dtype
    )
    kind = "minisblack" if channels == 1 else "rgb"
    tifffile.imwrite(tmp_path / "plain.tif", values, photometric=kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=kind, extratags=[(ORIENTATION, 3, 1, orientation, True)])
    expected = oriented(read_image(tmp_path / "plain.tif").pixels, orientation)
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_opencv_is_read_as_written(tmp_path, dtype, channels, suffix):
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, channels), dtype=np.uint8).astype(dtype)
    values = values * dtype(257 if dtype == np.uint16 else 1)
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), values)  # blue first
    shown = read_image(tmp_path / f"a.{suffix}").pixels[..., ::-1]
    for channel in range(3):
        pair = shown[..., channel].ravel(), values[..., min(channel, channels - 1)].ravel()
        assert np.corrcoef(*(one.astype(float) for one in pair))[0, 1] > 0.999


def test_channels_as_pages_are_channels_but_other_pages_are_a_stack(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, *SIZE), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", values, metadata={"axes": "CYX"}, photometric="minisblack")
    assert np.array_equal(read_image(tmp_path / "a.ome.tif").pixels, np.moveaxis(values, 0, 2))
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="minisblack")
    with pytest.raises(DataError, match=r"b\.tif: is a stack") as error:
        read_image(tmp_path / "b.tif")
    one_line(error)


def test_a_thumbnail_beside_the_image_does_not_matter(tmp_path):
    image = PIL.Image.fromarray(colours())
    image.save(tmp_path / "image.tif", save_all=True, append_images=[image.resize((20, 10))])
    assert np.array_equal(read_image(tmp_path / "image.tif").pixels, colours())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", ramp(1000, 3000, np.uint16)),
        ("16.tif", ramp(1000, 3000, np.uint16)),
        ("signed.tif", ramp(-1000, 2000, np.int16)),
        ("32.tif", ramp(-100_000, 100_000, np.int32)),
        ("float.tif", ramp(-0.5, 0.25, np.float32)),
        ("double.tif", ramp(-0.5, 0.25, np.float64)),
    ],
)
def test_deep_grey_is_windowed(tmp_path, name, values):
    if name.endswith("png"):
        cv2.imwrite(str(tmp_path / name), values)
    else:
        tifffile.imwrite(tmp_path / name, values)
    pixels = read_image(tmp_path / name).pixels
    low, high = np.percentile(values, (0.5, 99.5))
    expected = (values.clip(low, high).astype(float) - low) / (high - low) * 255
    assert np.abs(pixels[..., 0] - expected).max() <= 0.51
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_deep_colours_keep_their_order_and_are_windowed_together(tmp_path):
    values = np.dstack([ramp(0, 4000, np.uint16), ramp(0, 2000, np.uint16), ramp(0, 1000, np.uint16)])
    cv2.imwrite(str(tmp_path / "image.png"), values[..., ::-1])
    tifffile.imwrite(tmp_path / "image.tif", values, photometric="rgb")
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([values[..., ::-1], values[..., 0]]))
    pixels = read_image(tmp_path / "image.png").pixels
    assert pixels[-1, -1].tolist() == pytest.approx([255, 128, 64], abs=4)
    assert len(np.unique(pixels[..., 2])) > 60  # not cut to the high byte
    assert np.array_equal(read_image(tmp_path / "image.tif").pixels, pixels)
    assert np.array_equal(read_image(tmp_path / "alpha.png").pixels, pixels)


def test_outliers_do_not_darken_the_window_and_nan_is_black(tmp_path):
    values = ramp(0, 1, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    values[1, 0] = 1e9
    tifffile.imwrite(tmp_path / "image.tif", values)
    pixels = read_image(tmp_path / "image.tif").pixels[..., 0]
    assert pixels[0, :3].tolist() == [0, 255, 0]
    assert pixels[1, 0] == 255
    assert abs(int(pixels[30, 41]) - 128) <= 3


def test_rare_values_and_constants_do_not_divide_by_zero(tmp_path):
    values = np.zeros(SIZE, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "flat.tif", values + 7)
    assert not read_image(tmp_path / "flat.tif").pixels.any()
    values[3, 4] = 1000
    tifffile.imwrite(tmp_path / "speck.tif", values)
    pixels = read_image(tmp_path / "speck.tif").pixels[..., 0]
    assert pixels[3, 4] == 255
    assert np.count_nonzero(pixels) == 1


def test_nothing_finite_and_complex_values_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "nan.tif", np.full(SIZE, np.nan, dtype=np.float32))
    tifffile.imwrite(tmp_path / "complex.tif", np.ones(SIZE, dtype=np.complex64))
    for name in ("nan.tif", "complex.tif"):
        with pytest.raises(DataError, match=name) as error:
            read_image(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.jpg", "deep.tif", "deep.png"])
def test_orientation_is_honoured(tmp_path, name, orientation):
    path = tmp_path / name
    if name == "deep.tif":
        deep = colours().astype(np.uint16) * 257
        tifffile.imwrite(path, deep, photometric="rgb", extratags=[(ORIENTATION, 3, 1, orientation, True)])
        plain = tmp_path / "plain.tif"
        tifffile.imwrite(plain, deep, photometric="rgb")
    elif name == "deep.png":
        plain = tmp_path / "plain.png"
        cv2.imwrite(str(plain), colours()[..., ::-1].astype(np.uint16) * 257)
        content = plain.read_bytes()
        tags = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
        chunk = b"eXIf" + tags
        chunk = struct.pack(">I", len(tags)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + chunk + content[33:])  # after the header
    else:
        plain = tmp_path / f"plain.{path.suffix}"
        PIL.Image.fromarray(colours()).save(path, exif=exif(orientation))
        PIL.Image.fromarray(colours()).save(plain.with_suffix(path.suffix))
        plain = plain.with_suffix(path.suffix)
    expected = oriented(read_image(plain).pixels, orientation)
    assert np.array_equal(read_image(path).pixels, expected)
    assert (read_image(path).size == SIZE) == (orientation < 5)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("size", [(100_000, 100_000), (12_000, 8_000), (9_000, 9_000), (1, 2**27)])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(DataError, match=r"bomb\.png: .* pixels, at most 67108864 are read; crop or shrink it") as error:
        read_image(tmp_path / "bomb.png")
    one_line(error)


def test_too_many_channels_are_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "cube.tif", np.zeros((5, 7, 40), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(DataError, match="40 channels"):
        read_image(tmp_path / "cube.tif")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_images_without_pixels_are_refused(tmp_path, size):
    (tmp_path / "none.png").write_bytes(png_header(*size))
    with pytest.raises(DataError, match=r"none\.png") as error:
        read_image(tmp_path / "none.png")
    one_line(error)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deep.png", "deep.tif"])
def test_truncated_files_are_refused_at_any_length(tmp_path, name):
    whole, cut = tmp_path / name, tmp_path / f"cut-{name}"
    if name == "deep.png":
        cv2.imwrite(str(whole), colours().astype(np.uint16) * 257)
    elif name == "deep.tif":
        tifffile.imwrite(whole, colours().astype(np.uint16) * 257, photometric="rgb")
    else:
        PIL.Image.fromarray(colours()).save(whole)
    content = whole.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9):
        cut.write_bytes(content[: int(len(content) * share) + 1])
        with pytest.raises(DataError, match=f"cut-{name}") as error:
            read_image(cut)
        one_line(error)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deep.png", "deep.tif"])
def test_damaged_bytes_give_an_image_or_a_data_error(tmp_path, name):
    path = tmp_path / name
    small = colours()[:9, :7]
    if name == "deep.tif":
        tifffile.imwrite(path, small.astype(np.uint16), photometric="rgb")
    elif name == "deep.png":
        cv2.imwrite(str(path), small.astype(np.uint16))
    else:
        PIL.Image.fromarray(small).save(path, exif=exif(6))
    content = path.read_bytes()
    random = np.random.default_rng(1)
    refused = []
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] = random.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert read_image(path).pixels.size
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(name in text and "\n" not in text for text in refused)


def test_files_that_are_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "fake.tif").write_bytes(b"II*\0" + b"\xff" * 50)
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "empty.png": "empty",
        "text.png": "not a readable",
        "fake.tif": "damaged",
        "folder.png": "folder",
        "missing.png": "no such file",
        "zero\0.png": "cannot be read",
        "x" * 300 + ".png": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            read_image(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.DCM", "a.nrrd"])
def test_volumes_are_named_as_what_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"123")
    with pytest.raises(DataError, match="is a volume, not an image"):
        read_image(tmp_path / name)


def test_reading_from_many_threads(tmp_path):
    """The guard against large images touches process-wide state."""
    PIL.Image.fromarray(colours()).save(tmp_path / "image.png")
    wrong = []

    def read():
        for _ in range(20):
            if not np.array_equal(read_image(tmp_path / "image.png").pixels, colours()):
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("value", [1, 7, 255])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_binary_masks_of_any_value(tmp_path, value, suffix):
    PIL.Image.fromarray(disc(value)).save(tmp_path / f"m.{suffix}")
    masks = read_masks(tmp_path / f"m.{suffix}")
    assert list(masks) == ["mask"]
    assert masks["mask"].dtype == bool
    assert np.array_equal(masks["mask"], disc().astype(bool))


def test_binary_masks_of_any_kind(tmp_path):
    ground_truth = disc().astype(bool)
    PIL.Image.fromarray(ground_truth).save(tmp_path / "bits.png")
    PIL.Image.fromarray(np.dstack([disc(255)] * 3)).save(tmp_path / "rgb.png")
    PIL.Image.fromarray(np.dstack([disc(255), disc(0), disc(0)])).save(tmp_path / "red.png")
    PIL.Image.fromarray(np.dstack([disc(255)] * 3 + [disc(0) + 255])).save(tmp_path / "rgba.png")
    PIL.Image.fromarray(disc(255)).save(tmp_path / "lossy.jpg", quality=60)
    cv2.imwrite(str(tmp_path / "deep.png"), disc(65535, np.uint16))
    tifffile.imwrite(tmp_path / "float.tif", disc(1, np.float32))
    palette = PIL.Image.fromarray(disc(1))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    for path in tmp_path.iterdir():
        assert np.array_equal(read_masks(path)["mask"], ground_truth), path.name


@pytest.mark.parametrize("compression", [None, "lzw", "packbits"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, np.float32])
def test_masks_that_tifffile_wrote(tmp_path, dtype, compression):
    tifffile.imwrite(tmp_path / "m.tif", disc(1, dtype), compression=compression if dtype is not bool else None)
    assert np.array_equal(read_masks(tmp_path / "m.tif")["mask"], disc().astype(bool))
    assert np.array_equal(read_masks(tmp_path / "m.tif", {1: "a"})["a"], disc().astype(bool))


def test_masks_with_white_at_zero(tmp_path):
    for name, values in {"8": 255 - disc(255), "16": 65535 - disc(65535, np.uint16)}.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", values, photometric="miniswhite")
    PIL.Image.fromarray(disc().astype(bool)).save(tmp_path / "fax.tif", compression="group4")
    for path in tmp_path.iterdir():
        assert np.array_equal(read_masks(path)["mask"], disc().astype(bool)), path.name


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (0, 0, 0)])
def test_masks_in_alpha(tmp_path, colour):
    full = np.full((*SIZE, 3), colour, np.uint8)
    PIL.Image.fromarray(np.dstack([full, disc(255)])).save(tmp_path / "rgba.png")
    PIL.Image.fromarray(np.dstack([full[..., 0], disc(255)]), "LA").save(tmp_path / "la.png")
    palette = PIL.Image.fromarray(disc(1))
    palette.putpalette([*colour, *colour])
    palette.save(tmp_path / "palette.png", transparency=0)
    for path in tmp_path.iterdir():
        assert np.array_equal(read_masks(path)["mask"], disc().astype(bool)), path.name


def test_masks_whose_alpha_says_something_else_are_refused(tmp_path):
    PIL.Image.fromarray(np.dstack([disc(255)] * 3 + [label_map() * 50 + 5])).save(tmp_path / "both.png")
    soft = ramp(0, 255, np.uint8)
    PIL.Image.fromarray(np.dstack([disc(0)] * 3 + [soft])).save(tmp_path / "soft.png")
    for name in ("both.png", "soft.png"):
        with pytest.raises(DataError, match=f"{name}: (both|is not binary)") as error:
            read_masks(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("colour", [(255, 255, 255), (100, 100, 100), (255, 0, 0), (0, 0, 200)])
def test_jpeg_masks_of_any_colour(tmp_path, colour, quality):
    PIL.Image.fromarray(disc()[..., None] * np.uint8(colour)).save(tmp_path / "m.jpg", quality=quality)
    mask = read_masks(tmp_path / "m.jpg")["mask"]
    assert (mask & (disc() > 0)).sum() / (mask | (disc() > 0)).sum() > 0.85


def test_jpegs_that_hold_no_mask_are_refused(tmp_path):
    PIL.Image.fromarray(disc(1)).save(tmp_path / "ones.jpg", quality=95)
    PIL.Image.fromarray(ramp(0, 255, np.uint8)).save(tmp_path / "soft.jpg")
    for name, message in {"ones.jpg": "largest value is 1", "soft.jpg": "one colour"}.items():
        with pytest.raises(DataError, match=message) as error:
            read_masks(tmp_path / name)
        one_line(error)


def test_a_black_file_is_an_empty_mask(tmp_path):
    PIL.Image.fromarray(disc(0)).save(tmp_path / "m.png")
    assert not read_masks(tmp_path / "m.png")["mask"].any()
    assert not read_masks(tmp_path / "m.png", {1: "liver"})["liver"].any()


def label_map(dtype=np.uint8):
    values = np.zeros(SIZE, dtype=dtype)
    values[5:20, 7:30], values[30:40, 7:30], values[50:60, 70:80] = 1, 2, 5
    return values


LABELS = {1: "liver", "2": "spleen", 5: "liver", 9: "kidney"}


@pytest.mark.parametrize("kind", ["8.png", "8.tif", "16.png", "32.tif", "float.tif", "palette.png", "rgb.png"])
def test_label_maps_are_split_by_the_stated_mapping(tmp_path, kind):
    path, values = tmp_path / kind, label_map()
    if kind == "palette.png":
        image = PIL.Image.fromarray(values)
        image.putpalette([0, 0, 0, *([200, 10, 10] * 5)])  # colours that cannot be told apart: the index counts
        image.save(path)
    elif kind == "16.png":
        cv2.imwrite(str(path), values.astype(np.uint16))
    elif kind in ("32.tif", "float.tif"):
        tifffile.imwrite(path, values.astype(np.int32 if kind == "32.tif" else np.float32))
    else:
        PIL.Image.fromarray(np.dstack([values] * 3) if kind == "rgb.png" else values).save(path)
    masks = read_masks(path, LABELS)
    assert list(masks) == ["liver", "spleen", "kidney"]
    assert np.array_equal(masks["liver"], np.isin(values, (1, 5)))
    assert np.array_equal(masks["spleen"], values == 2)
    assert not masks["kidney"].any()
    assert all(mask.dtype == bool and mask.shape == SIZE for mask in masks.values())


@pytest.mark.parametrize("palette", [False, True])
def test_colour_coded_masks_are_split_by_colour(tmp_path, palette):
    table = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [0, 0, 0], [0, 0, 0], [9, 9, 9]], dtype=np.uint8)
    image = PIL.Image.fromarray(table[label_map()])
    if palette:
        image = PIL.Image.fromarray(label_map())
        image.putpalette(table.ravel().tolist())
    image.save(tmp_path / "m.png")
    masks = read_masks(tmp_path / "m.png", {"#FF0000": "liver", "#0080ff": "spleen", "#090909": "grey"})
    for name, value in {"liver": 1, "spleen": 2, "grey": 5}.items():
        assert np.array_equal(masks[name], label_map() == value)


def test_label_maps_have_the_images_orientation(tmp_path):
    PIL.Image.fromarray(label_map()).save(tmp_path / "m.png", exif=exif(6))
    assert np.array_equal(read_masks(tmp_path / "m.png", LABELS)["spleen"], oriented(label_map(), 6) == 2)


def test_masks_that_cannot_be_meant(tmp_path):
    PIL.Image.fromarray(label_map()).save(tmp_path / "labels.png")
    PIL.Image.fromarray(disc(255)).save(tmp_path / "binary.png")
    PIL.Image.fromarray(colours()).save(tmp_path / "colours.png")
    PIL.Image.fromarray(label_map()).save(tmp_path / "labels.jpg")
    tifffile.imwrite(tmp_path / "fractions.tif", ramp(0, 1, np.float32))
    tifffile.imwrite(tmp_path / "nan.tif", np.full(SIZE, np.nan, dtype=np.float32))
    tifffile.imwrite(tmp_path / "deep.tif", colours().astype(np.uint16), photometric="rgb")
    for name, labels, message in [
        ("labels.png", None, r"4 values \(0, 1, 2, 5\)"),
        ("colours.png", None, r"values \(#"),
        ("binary.png", {1: "liver"}, r"labels 1 do not occur, it holds 2 values \(0, 255\)"),
        ("colours.png", {1: "liver"}, "coloured"),
        ("labels.jpg", {1: "liver"}, "JPEG"),
        ("fractions.tif", None, "fractions"),
        ("nan.tif", {1: "liver"}, "fractions"),
        ("deep.tif", {"#010203": "liver"}, "8-bit"),
        ("missing.png", None, "no such file"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            read_masks(tmp_path / name, labels)
        assert name in one_line(error)


@pytest.mark.parametrize(
    "labels", [{}, {"liver": "liver"}, {"#12": "a"}, {1: "a", "#ff0000": "b"}, {1.5: "a"}, {True: "a"}]
)
def test_labels_that_are_neither_numbers_nor_colours(tmp_path, labels):
    PIL.Image.fromarray(label_map()).save(tmp_path / "m.png")
    with pytest.raises(ConfigError) as error:
        read_masks(tmp_path / "m.png", labels)
    one_line(error)


# ----------------------------------------------------------------------------------------------------------- writing


def test_masks_and_images_are_written_and_read_back(tmp_path):
    write_mask_png(disc().astype(bool), tmp_path / "m.png")
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "m.png")), disc(255))
    for image in (colours(), colours()[..., 0], np.dstack([colours(), disc()]), ramp(0, 60000, np.uint16)):
        write_png(image, tmp_path / "p.png")
        assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "p.png")), image)
    write_png(PIL.Image.fromarray(colours()), str(tmp_path / "p.png"))
    assert np.array_equal(read_image(tmp_path / "p.png").pixels, colours())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.png", "p.png"]


def test_what_is_no_image_is_not_written(tmp_path):
    for image in (ramp(0, 1, np.float32), np.zeros((5, 7, 2), np.uint8), np.zeros((0, 7), np.uint8)):
        with pytest.raises(DataError, match=r"p\.png"):
            write_png(image, tmp_path / "p.png")
    with pytest.raises(DataError, match="bool"):
        write_mask_png(disc(), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "p.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # writing more fails as it does on a full disk
    try:
        with pytest.raises(DataError, match=r"p\.png: cannot be written .*; free space") as error:
            write_png(colours(), tmp_path / "p.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == b"old"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "p.png", tmp_path / "file" / "p.png", tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot be written") as error:
            write_whole(b"content", path)
        one_line(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("seed", range(3))
def test_files_of_five_writers_are_read_as_they_were_written(tmp_path, seed):
    """A few of the files that `benchmarks/image_files.py` makes by the thousand."""
    for package in ("imageio", "SimpleITK"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from image_files import WRITERS, fuzz

    found = list(fuzz(50, seed, tmp_path))
    assert not [one for one in found if one[3].startswith("WRONG")]
    assert {(writer, kind) for writer, kind, _, verdict in found if verdict == "right"} >= {
        (writer, kind) for writer in WRITERS for kind in ("image", "mask")
    }


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("kind", [None, "unassalpha", "assocalpha"])
def test_alpha_in_a_plane_of_its_own_and_colours_it_was_multiplied_into(tmp_path, compression, kind):
    """Pillow loses the second plane where it is compressed, and divides by alpha; the colours are as stored."""
    draw = np.random.default_rng(0)
    two, four = (draw.integers(0, 256, (29, 14, channels), dtype=np.uint8) for channels in (2, 4))
    options = {"compression": compression} | ({"extrasamples": [kind]} if kind else {})
    planes = {**options, "planarconfig": "separate", "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "two.tif", np.moveaxis(two, 2, 0), **planes)
    shown = read_image(tmp_path / "two.tif").pixels
    assert np.array_equal(shown[..., 0], two[..., 0])
    assert np.array_equal(shown[..., 1], two[..., 0] if kind else two[..., 1])
    tifffile.imwrite(tmp_path / "four.tif", four, **options, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "four.tif").pixels, four[..., :3])
