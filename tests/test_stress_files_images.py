"""Stress tests of image folders: unusual images are read, bad ones refused by name, other files ignored."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import assert_harmless, attempt, listing, refused
from layouts import silent, write_images
from PIL import Image

import data

pytestmark = [
    pytest.mark.stress,
    pytest.mark.tried("pictures, damaged, enormous or odd"),
    pytest.mark.usefixtures("ffcv", "small_and_offline"),
]
COLOUR, SIDE = (10, 200, 90), 16
PICTURE = Image.new("RGB", (SIDE, SIDE), COLOUR)
GREY = (0x80, 0x80, 0x80)


@pytest.fixture
def work(tmp_path) -> Path:
    """Return the working folder of a case, an image folder; `data` beside it is for prepared files."""
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "work", each=1, size=(SIDE, SIDE))
    return tmp_path / "work"


def saved(image: Image.Image, form: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def grey(dtype: str, value: float, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.fromarray(np.full(size[::-1], value, dtype))


def others(count: int) -> dict:
    """Return settings that save `count` more frames, which are black."""
    return {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))] * count}


def clear(form: str) -> Callable[[], bytes]:
    """Return a function that saves PICTURE with a palette in which each colour has its own transparency."""
    return lambda: saved(PICTURE.quantize(4), form, transparency=bytes([0, 128, 255, 255]))


READ = {  # suffix, content and colour of a file
    "a JPEG that is called PNG": (".png", lambda: saved(PICTURE, "JPEG", quality=95), COLOUR),
    "a PNG that is called JPEG": (".JPeG", lambda: saved(PICTURE, "PNG"), COLOUR),
    "a JPEG in CMYK": (".jpg", lambda: saved(PICTURE.convert("CMYK"), "JPEG", quality=95), COLOUR),
    "a TIFF in CMYK": (".tif", lambda: saved(PICTURE.convert("CMYK"), "TIFF"), COLOUR),
    "a TIFF in YCbCr": (".tif", lambda: saved(PICTURE.convert("YCbCr"), "TIFF"), COLOUR),
    "a TIFF in L*a*b*": (
        ".tif",
        lambda: saved(Image.new("LAB", (SIDE, SIDE), (255, 128, 128)), "TIFF"),
        (255,) * 3,
    ),
    "a progressive JPEG": (".jpg", lambda: saved(PICTURE, "JPEG", progressive=True, quality=95), COLOUR),
    "a JPEG of grey": (".jpg", lambda: saved(PICTURE.convert("L").point(lambda _: 128), "JPEG"), GREY),
    "a PNG with a palette": (".png", lambda: saved(PICTURE.quantize(4), "PNG"), COLOUR),
    "a PNG whose palette is transparent": (".png", clear("PNG"), COLOUR),
    "a PNG of one transparent colour": (".png", lambda: saved(PICTURE, "PNG", transparency=COLOUR), COLOUR),
    "a PNG with alpha": (".png", lambda: saved(PICTURE.convert("RGBA"), "PNG"), COLOUR),
    "a PNG of grey with alpha": (".png", lambda: saved(grey("u1", 128).convert("LA"), "PNG"), GREY),
    "a PNG of black and white": (".png", lambda: saved(grey("u1", 255).convert("1"), "PNG"), (255, 255, 255)),
    "a PNG of 16-bit grey": (".png", lambda: saved(grey("u2", 0x8001), "PNG"), GREY),
    "a PNG of 16-bit colours": (
        ".png",
        lambda: png(SIDE, SIDE, 16, 2, (b"\0" + bytes([10, 1, 200, 2, 90, 3]) * SIDE) * SIDE),
        COLOUR,
    ),
    "a TIFF of 16-bit grey": (".tiff", lambda: saved(grey("u2", 0x80FF), "TIFF"), GREY),
    "a big-endian TIFF of 16-bit grey": (".tiff", lambda: saved(grey(">u2", 0x80FF), "TIFF"), GREY),
    "a PGM of 16 bits": (".pgm", lambda: b"P5 16 16 65535\n" + b"\x80\x11" * 256, GREY),
    "a PPM of 16-bit colours": (
        ".ppm",
        lambda: b"P6 16 16 65535\n" + bytes([10, 10, 200, 200, 90, 90]) * 256,
        COLOUR,
    ),
    "a PPM in words": (".ppm", lambda: b"P3 16 16 255\n" + b"10 200 90\n" * 256, COLOUR),
    "a GIF": (".gif", lambda: saved(PICTURE, "GIF"), COLOUR),
    "an animated GIF, of which the first frame counts": (
        ".gif",
        lambda: saved(PICTURE, "GIF", **others(3)),
        COLOUR,
    ),
    "an animated PNG, of which the first frame counts": (
        ".png",
        lambda: saved(PICTURE, "PNG", **others(3)),
        COLOUR,
    ),
    "an animated WebP, of which the first frame counts": (
        ".webp",
        lambda: saved(PICTURE, "WEBP", lossless=True, **others(3)),
        COLOUR,
    ),
    "a TIFF of several pages, of which the first counts": (
        ".tif",
        lambda: saved(PICTURE, "TIFF", **others(3)),
        COLOUR,
    ),
    "a BMP": (".bmp", lambda: saved(PICTURE, "BMP"), COLOUR),
    "one pixel": (".png", lambda: saved(Image.new("RGB", (1, 1), COLOUR), "PNG"), COLOUR),
    "4,000 pixels by one": (".png", lambda: saved(Image.new("RGB", (4000, 1), COLOUR), "PNG"), COLOUR),
    "bytes after the end": (".png", lambda: saved(PICTURE, "PNG") + b"#!/bin/sh\ntouch canary\n", COLOUR),
}


@pytest.mark.parametrize("case", READ)
def test_an_image_of_an_unusual_kind_is_read_correctly(work, case):
    suffix, make, colour = READ[case]
    (work / "train" / "cat" / f"9{suffix}").write_bytes(make())
    outcome = attempt(data, [work, "--data-dir", work.parent / "data", "--image-size", SIDE], work)
    assert outcome.status == 0 and len(outcome.lines) == 1, outcome
    assert_harmless(outcome)
    dataset = data.open_dataset(str(work), work.parent / "data", image_size=SIDE, say=silent)
    assert len(dataset.train.labels) == 3 and dataset.train.labels.tolist() == [0, 0, 1]
    assert np.abs(dataset.train.images[1].astype(int) - colour).max() <= 3


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(canary) (w) file closefile\n"
IFD = struct.pack("<HHII", 256, 3, 1, 16) + struct.pack("<HHII", 257, 3, 1, 16)
REFUSED = {
    "zero bytes": (".png", lambda: b""),
    "zeros": (".jpg", lambda: bytes(10**5)),
    "text": (".png", lambda: b"not a picture"),
    "an SVG that is called PNG": (".png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a PostScript file that is called PNG": (".png", lambda: EPS),
    "a PDF that is called JPEG": (".jpg", lambda: saved(PICTURE, "PDF")),
    "an icon that is called PNG": (".png", lambda: saved(PICTURE, "ICO")),
    **{
        f"{form}, {what}": (f".{form.lower()}", lambda form=form, end=end: saved(NOISE, form)[:end])
        for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
        for what, end in (("ten bytes of it", 10), ("its first quarter", 1000))
    },
    "a PNG of 60,000 pixels a side": (".png", lambda: png(60000, 60000, 8, 2, b"\0" * 1000)),
    "a PNG of 12,000 pixels a side, all there": (
        ".png",
        lambda: png(12000, 12000, 1, 0, bytes(1501 * 12000)),
    ),
    "a PNG of 2 to the 31 pixels a side": (".png", lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b"")),
    "a PNG of no pixels": (".png", lambda: png(0, 0, 8, 2, b"")),
    "a PNG of 500,000 pixels by one": (".png", lambda: png(500_000, 1, 1, 0, bytes(62501))),
    "a PNG whose pixels end early": (".png", lambda: png(SIDE, SIDE, 8, 2, bytes(100))),
    "a PNG with a wrong checksum": (".png", lambda: saved(PICTURE, "PNG").replace(b"IDATx", b"IDATy")),
    "a PNG of a depth that there is not": (".png", lambda: png(SIDE, SIDE, 3, 2, bytes(800))),
    "a PNG whose text unpacks to 100 MB": (
        ".png",
        lambda: png(SIDE, SIDE, 8, 2, bytes(784), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))),
    ),
    "a GIF of 65,535 pixels a side": (".gif", lambda: b"GIF89a" + b"\xff" * 4 + saved(NOISE, "GIF")[10:]),
    "a BMP of enormous sides": (
        ".bmp",
        lambda: saved(PICTURE, "BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + b"\1\0\x18\0" + bytes(500),
    ),
    "a BMP of negative sides": (
        ".bmp",
        lambda: saved(PICTURE, "BMP")[:18] + struct.pack("<ii", -5, -5) + b"\1\0\x18\0" + bytes(500),
    ),
    "a PPM of enormous sides": (".ppm", lambda: b"P6 99999 99999 255\n" + bytes(100)),
    "a PPM whose side has 5,000 digits": (".ppm", lambda: b"P6 " + b"9" * 5000 + b" 1 255\n" + bytes(100)),
    "a PPM of a negative side": (".ppm", lambda: b"P6 -16 16 255\n" + bytes(768)),
    "a PGM of floating-point numbers": (".pgm", lambda: b"Pf\n16 16\n-1.0\n" + struct.pack("<f", 0.5) * 256),
    "a TIFF of floating-point numbers": (".tif", lambda: saved(grey("f4", 0.5), "TIFF")),
    "a TIFF of 32-bit numbers": (".tif", lambda: saved(grey("i4", 2**20), "TIFF")),
    "a TIFF of negative numbers": (".tif", lambda: saved(grey("i4", -1), "TIFF")),
    "a TIFF whose directory leads to itself": (
        ".tif",
        lambda: b"II*\0\x08\0\0\0\x02\0" + IFD + struct.pack("<I", 8),
    ),
    "a TIFF of four billion entries": (
        ".tif",
        lambda: b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 2**32 - 1, 8),
    ),
    "a TIFF whose directory is elsewhere": (".tif", lambda: b"II*\0" + struct.pack("<I", 2**32 - 1)),
    "a WebP of a false length": (".webp", lambda: b"RIFF" + b"\xff" * 4 + saved(NOISE, "WEBP")[8:100]),
    "a JPEG of 65,535 pixels a side": (
        ".jpg",
        lambda: saved(PICTURE, "JPEG").replace(b"\x08\0\x10\0\x10\x03", b"\x08\xff\xff\xff\xff\x03"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_or_too_large_image_is_refused_by_name(work, case):
    suffix, make = REFUSED[case]
    (work / "train" / "dog" / f"9{suffix}").write_bytes(make())
    said = refused(data, [work, "--data-dir", work.parent / "data", "--image-size", SIDE], work)
    assert f"train/dog/9{suffix} is not a readable image" in said and not (work / "canary").exists()


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))


IGNORED = {
    "a folder": Path.mkdir,
    "a fifo": os.mkfifo,
    "a socket": bind,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a hidden file": lambda path: path.with_name(".9.png").write_bytes(b"rubbish"),
    "an SVG": lambda path: path.with_suffix(".svg").write_text("<svg><script>alert(1)</script></svg>"),
    "a file without a suffix": lambda path: path.with_suffix("").write_bytes(b"rubbish"),
    "a file of code": lambda path: path.with_suffix(".png.py").write_text("open('canary', 'w')"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_other_files_are_ignored_and_a_line_says_so(work, case, monkeypatch):
    monkeypatch.chdir(work.parent)
    IGNORED[case](work / "train" / "cat" / "9.png")
    before = listing(work)
    outcome = attempt(data, [work, "--data-dir", work.parent / "data"], work)
    assert outcome.status == 0 and len(outcome.lines) == 2, outcome
    assert "ignored 1 files that are hidden or not images" in outcome.lines[0]
    assert_harmless(outcome)
    assert listing(work) == before


def test_an_image_that_is_a_link_to_itself_is_refused_by_name(work):
    (work / "train" / "cat" / "9.png").symlink_to("9.png")
    assert "train/cat/9.png" in refused(data, [work, "--data-dir", work.parent / "data"], work)
