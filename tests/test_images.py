"""The image reader against Detectron2's, hostile files, and 16 bits, which Detectron2 clips."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from detectron2.data.detection_utils import read_image as detectron2_reads
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image

from resnext_det import image_files, images
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.images import (
    CHANNELS,
    Header,
    check_pixel_format,
    read_header,
    read_image,
    read_labels,
    read_picture,
)

RAMP = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    if mode == "CMYK":
        return Image.frombytes(mode, size, pixels.tobytes())
    if mode == "RGBA":
        return Image.fromarray(pixels)
    if mode == "LA":
        return Image.fromarray(pixels[..., :2])
    if mode == "P with transparency":
        palette = Image.fromarray(pixels[..., :3]).quantize(16)
        palette.info["transparency"] = 3
        return palette
    return Image.fromarray(pixels[..., :3]).convert(mode)


# All modes of up to 8 bits that each format can hold.
STORED = {
    "png": ("1", "L", "LA", "P", "P with transparency", "RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB"),
    "jpg": ("L", "RGB", "CMYK", "YCbCr"),
    "gif": ("L", "P", "P with transparency", "RGB"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA"),
    "jp2": ("L", "LA", "RGB", "RGBA"),
    "ppm": ("1", "L", "RGB"),
    "tga": ("L", "RGB", "RGBA"),
    "avif": ("RGB", "RGBA"),
    "mpo": ("RGB",),
}


@pytest.mark.parametrize("suffix", list(STORED))
def test_pixels_are_those_of_detectron2(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    for mode in STORED[suffix]:
        noise(mode).save(file)
        for pixel_format in CHANNELS:
            try:
                expected = detectron2_reads(str(file), pixel_format)
            except ValueError:  # Pillow converts LAB to RGB only
                with pytest.raises(DatasetError, match="cannot be read: conversion from LAB"):
                    read_image(file, pixel_format)
                continue
            found = read_image(file, pixel_format)
            assert found.dtype == (np.float32 if pixel_format == "YUV-BT.601" else np.uint8)
            assert found.shape == (23, 37, CHANNELS[pixel_format])
            assert np.array_equal(found, expected.astype(found.dtype)), (mode, pixel_format)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_images_are_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    file = tmp_path / f"a.{suffix}"
    noise().save(file, exif=exif)
    if suffix == "tiff":  # Detectron2 turns one twice
        noise().save(tmp_path / "a.png", exif=exif)
        expected = detectron2_reads(str(tmp_path / "a.png"), "BGR")
    else:
        expected = detectron2_reads(str(file), "BGR")
    found = read_image(file, "BGR")
    assert np.array_equal(found, expected)
    header = read_header(file)
    assert (header.height, header.width) == found.shape[:2]
    assert found.shape[0] == (37 if orientation >= 5 else 23)
    if suffix != "tiff":
        assert read_picture(file, upright=False).size == (37, 23)


def write_deep(file: Path, values: NDArray[Any] = RAMP) -> Path:
    """Write grey of 16 bits as a camera or a scanner does."""
    height, width = values.shape
    if file.suffix == ".pgm":
        file.write_bytes(b"P5 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes())
    elif file.suffix == ".mm":  # TIFF in Motorola's order of bytes
        Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes()).save(file, "TIFF")
    else:
        Image.fromarray(values).save(file)
    return file


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.mm", "a.pgm", "a.jp2"])
def test_keeps_the_upper_8_of_16_bits(name: str, tmp_path: Path) -> None:
    """Detectron2 clips: all above 255 is white."""
    file = write_deep(tmp_path / name)
    assert np.array_equal(read_image(file), np.repeat(RAMP[:, :, None] >> 8, 3, axis=2))
    header = read_header(file)
    assert header == Header(40, 30, 16)
    assert (detectron2_reads(str(file), "RGB") == 255).mean() > 0.99


def test_grey_and_colour_of_16_bits_agree(tmp_path: Path) -> None:
    """The colour image is written here, as Pillow cannot."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    rows = np.repeat(RAMP[:, :, None], 3, axis=2).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    grey = read_image(write_deep(tmp_path / "grey.png"))
    assert np.array_equal(read_image(tmp_path / "colour.png"), grey)
    assert read_header(tmp_path / "colour.png").bits == 16


def test_keeps_the_upper_8_of_12_bits(tmp_path: Path) -> None:
    """Two values in three bytes of a TIFF, as detectors of X-rays write them."""
    values = np.linspace(0, 4095, 1200).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").tobytes()
    pixels = b"".join(packed[n + 1 : n + 4] for n in range(0, len(packed), 4))
    entries = [(256, 40), (257, 30), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, 30), (279, len(pixels))]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    directory = struct.pack("<H", len(entries)) + tags + struct.pack("<I", 0)
    header = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    (tmp_path / "a.tif").write_bytes(header + pixels + directory)
    found = read_image(tmp_path / "a.tif", "L")[..., 0]
    assert np.array_equal(found, values.reshape(30, 40) >> 4)


def test_warns_once_of_16_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_files._warn_of_deep_images.cache_clear()
    file = write_deep(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        read_image(file)
        read_image(file)
    assert caplog.text.count("only the upper 8 are used") == 1


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_refuses_floats_and_32_bit_integers(values: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((30, 40), values)).save(tmp_path / "a.tif")
    for read in (read_image, read_header, read_labels):
        with pytest.raises(DatasetError, match=r"a\.tif cannot be read: .*Convert it to 8 bits"):
            read(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="range is unknown"):
        images.as_array(Image.fromarray(np.ones((30, 40), values)), "BGR")


def test_labels_of_16_bits_keep_their_values(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(read_labels(write_deep(tmp_path / "a.png", labels)), labels)
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "b.png")
    assert np.array_equal(read_labels(tmp_path / "b.png"), labels)
    with pytest.raises(DatasetError, match="has class 256, but at most 255"):
        read_labels(write_deep(tmp_path / "a.png", labels + 1))


def test_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone decodes EPS through Ghostscript, whatever the file is called."""
    started: list[object] = []

    def ghostscript(*arguments: object, **_: object) -> object:
        started.append(arguments)
        return Image.new("RGB", (40, 30)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    noise().save(tmp_path / "a.eps")
    for name in ("a.eps", "a.jpg"):
        (tmp_path / name).write_bytes((tmp_path / "a.eps").read_bytes())
        for read in (read_image, read_header, read_labels):
            with pytest.raises(DatasetError, match=f"{name} cannot be read: .*none of the formats"):
                read(tmp_path / name)
    assert not started
    detectron2_reads(str(tmp_path / "a.jpg"), "RGB")
    assert started  # so the file would have done harm


def test_refuses_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for read in (read_image, read_header, read_labels):
        with pytest.raises(DatasetError, match=r"a\.jpg cannot be read: not a regular file"):
            read(tmp_path / "a.jpg")


def damaged(kind: str) -> bytes:
    stream = io.BytesIO()
    noise(size=(300, 200)).save(stream, "PNG" if "PNG" in kind else "JPEG")
    whole = stream.getvalue()
    return {
        "no image": b"no image",
        "empty": b"",
        "half a JPEG": whole[:900],
        "half a PNG": whole[: len(whole) // 2],
        "PNG with broken pixels": whole[:2000] + bytes(2000) + whole[4000:],
        "PNG that pretends to be huge": whole[:16] + struct.pack(">II", 60000, 60000) + whole[24:],
        "PPM that pretends to be huge": b"P5 40000 30000 255\n" + bytes(2000),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("no image", "empty", "half a JPEG", "half a PNG", "PNG with broken pixels"),
        *("PNG that pretends to be huge", "PPM that pretends to be huge"),
    ],
)
def test_names_damaged_files(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a\n\x1b[31m.jpg"
    file.write_bytes(damaged(kind))
    with pytest.raises(DatasetError, match=r"a\\n\\x1b\[31m\.jpg cannot be read: ."):
        read_image(file)


def test_names_missing_files(tmp_path: Path) -> None:
    for name in ("none.jpg", "a" * 5000, "\0"):
        with pytest.raises(DatasetError, match="cannot be read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("pixel_format", "channels", "said"),
    [
        ("YUV", 3, "INPUT.FORMAT is 'YUV'; it must be one of BGR, RGB"),
        ("bgr", 3, "INPUT.FORMAT is 'bgr'"),
        ("I", 1, "INPUT.FORMAT is 'I'"),
        ("L", 3, "L has 1 channels, but MODEL.PIXEL_MEAN has 3 values"),
        ("CMYK", 3, "CMYK has 4 channels"),
    ],
)
def test_refuses_pixel_formats(pixel_format: str, channels: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_pixel_format(pixel_format, channels)


def outcome(file: Path, pixel_format: str, *, fast: bool) -> str | tuple[Any, bytes]:
    try:
        pixels = read_image(file, pixel_format, fast=fast)
        return pixels.shape, pixels.tobytes()
    except DatasetError as error:
        return str(error)


def jpeg(mode: str = "RGB", **words: Any) -> bytes:
    stream = io.BytesIO()
    noise(mode, (90, 70)).save(stream, "JPEG", **words)
    return stream.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_fast_decoding_changes_no_pixel_and_no_error(progressive: bool, tmp_path: Path) -> None:
    """Also of JPEGs cut or damaged at random places."""
    file, random = tmp_path / "a.jpg", np.random.default_rng(0)
    whole = [jpeg(subsampling=each, progressive=progressive) for each in ("4:2:0", "4:4:4")]
    given = [*whole, *(jpeg(mode, progressive=progressive) for mode in ("L", "CMYK"))]
    for content in whole:
        for place in random.integers(2, len(content), 40):
            given += [content[:place], content[:place] + b"\xff\xd9"]
            given += [content[:place] + bytes([random.integers(256)]) + content[place + 1 :]]
            given += [content[: place % 700] + bytes(1) + content[place % 700 + 1 :]]
    found = []
    for content in given:
        file.write_bytes(content)
        found.append(outcome(file, "BGR", fast=True))
        assert found[-1] == outcome(file, "BGR", fast=False)
    assert 10 < sum(isinstance(each, str) for each in found) < len(found) - 10


def test_fast_decoding_is_for_ordinary_jpegs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = Image.Exif()
    turned[274] = 6
    file, calls = tmp_path / "a.jpg", []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **k: (calls.append(a), decode(*a, **k))[1]
    )
    cases = [(jpeg(), "BGR", 1), (jpeg("L"), "RGB", 1), (jpeg(), "L", 0), (jpeg("CMYK"), "BGR", 0)]
    for content, pixel_format, number in [*cases, (jpeg(exif=turned), "BGR", 0)]:
        calls.clear()
        file.write_bytes(content)
        found = outcome(file, pixel_format, fast=True)
        assert len(calls) == number
        assert found == outcome(file, pixel_format, fast=False)
