from __future__ import annotations

import hashlib
import io
import json
import re
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from zoo.data.decode import BadImage, decode, pixel_sha256, read_header, read_size, resize
from zoo.errors import ZooError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (24, 36), dtype=np.uint8)
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}}


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def samples() -> dict[str, bytes]:
    colour = Image.fromarray(COLOUR)
    return {
        "png": encode(COLOUR),
        "png-palette": encode(colour.quantize(8)),
        "png-16": encode(GREY.astype(np.uint16) * 257),
        "jpeg": encode(COLOUR, "JPEG"),
        "jpeg-progressive": encode(COLOUR, "JPEG", progressive=True),
        "bmp": encode(COLOUR, "BMP"),
        "tiff": encode(COLOUR, "TIFF"),
        "tiff-lzw": encode(COLOUR, "TIFF", compression="tiff_lzw"),
        "webp": encode(COLOUR, "WEBP"),
        "gif": encode(colour.quantize(8), "GIF"),
        "ppm": encode(COLOUR, "PPM"),
        "pgm-plain": b"P2 4 2 255\n" + b" ".join(str(v).encode() for v in range(8)),
    }


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_back(kind):
    decoded = decode(encode(COLOUR, kind, **LOSSLESS[kind]))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, COLOUR)


def test_jpeg_is_what_pillow_makes_of_it():
    data = encode(COLOUR, "JPEG")
    np.testing.assert_array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_as_pillow_does(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(COLOUR, kind, exif=exif, **LOSSLESS.get(kind, {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    if orientation >= 5:
        assert expected.shape == (36, 24, 3)


def test_orientation_of_16_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(GREY.astype(np.uint16) * 257, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data)[:, :, 0], np.rot90(GREY, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"MM\0*" * 9])
def test_a_damaged_exif_block_does_not_cost_the_image(exif):
    assert decode(encode(COLOUR, "JPEG", exif=exif)).shape == COLOUR.shape


def test_opaque_alpha_equals_no_alpha():
    opaque = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(decode(encode(opaque)), COLOUR)
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (36, 24), 255)])
    np.testing.assert_array_equal(decode(encode(grey)), np.repeat(GREY[:, :, None], 3, 2))


def test_transparency_is_laid_over_white_and_opaque_pixels_stay():
    alpha = np.full(COLOUR.shape[:2], 255, np.uint8)
    alpha[:, 0], alpha[:, 1] = 0, 128
    decoded = decode(encode(np.dstack([COLOUR, alpha])))
    assert (decoded[:, 0] == 255).all()
    np.testing.assert_array_equal(decoded[:, 2:], COLOUR[:, 2:])
    half = COLOUR[:, 1].astype(float) * 128 / 255 + 255 * 127 / 255
    assert np.abs(decoded[:, 1] - half).max() <= 1


def test_palette_with_a_transparent_colour_and_png_colour_key():
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L")
    palette = palette.convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    decoded = decode(encode(palette, transparency=1))
    assert decoded.tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]
    key = decode(encode(Image.new("L", (2, 2), 7), transparency=7))
    assert (key == 255).all()


def test_cmyk_one_bit_and_animations():
    cmyk = Image.new("CMYK", (5, 4), (0, 255, 255, 0))
    assert (decode(encode(cmyk, "TIFF")) == [255, 0, 0]).all()
    assert decode(encode(cmyk, "JPEG")).shape == (4, 5, 3)
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode(encode(bits))[:, :, 1], np.where(GREY > 127, 255, 0))
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind, {}))
        assert (decode(data) == [255, 0, 0]).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_linearly_and_never_clipped(kind):
    values = np.arange(0, 65536, 13, dtype=np.uint16)[:5040].reshape(70, 72)
    values[0, 0], values[-1, -1] = 0, 65535
    decoded = decode(encode(values, kind))
    np.testing.assert_array_equal(decoded[:, :, 0], np.rint(values / 257).astype(np.uint8))
    assert decoded[0, 0, 0] == 0
    assert decoded[-1, -1, 0] == 255
    assert len(np.unique(decoded)) == 256
    np.testing.assert_array_equal(decode(encode(GREY.astype(np.uint16) * 257, kind))[:, :, 2], GREY)


def big_endian_tiff(width: int, height: int, bits: int, pixels: bytes, **more: int) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    tags |= {int(tag[1:]): value for tag, value in more.items()}
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + struct.pack(">H", len(tags)) + entries + b"\0" * 4


def test_big_endian_16_bit_tiff():
    values = np.array([[0, 257 * 7], [257 * 200, 65535]], dtype=np.uint16)
    assert decode(big_endian_tiff(2, 2, 16, values.astype(">u2").tobytes()))[:, :, 0].tolist() == [
        [0, 7],
        [200, 255],
    ]


def test_32_bit_grey_within_16_bits_is_scaled_and_beyond_is_refused():
    values = np.array([[0, 257 * 3], [65535, 257 * 100]], dtype=np.int32)
    assert decode(encode(values, "TIFF"))[:, :, 0].tolist() == [[0, 3], [255, 100]]
    with pytest.raises(BadImage, match="32-bit values from 0 to 65536; they must lie within 0 to 65535"):
        decode(encode(np.array([[0, 65536]], dtype=np.int32), "TIFF"))
    with pytest.raises(BadImage, match="32-bit values from -1024 to 3"):
        decode(encode(np.array([[-1024, 3]], dtype=np.int32), "TIFF"))


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_floating_point_pixels_are_refused(kind):
    with pytest.raises(BadImage, match="floating-point pixels"):
        decode(encode(np.array([[0.5, 2.0]], dtype=np.float32), kind))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"hello", "no image"),
        (b"<html><body>404</body></html>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (b"\x89PNG\r\n\x1a\n", "truncated|unreadable"),
        (b"\xff\xd8\xff", "truncated|unreadable"),
        (b"BM", "truncated|unreadable"),
    ],
)
def test_no_images_are_refused_with_a_short_reason(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert isinstance(caught.value, ZooError)
    assert len(str(caught.value)) < 160
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(name, kept):
    data = samples()[name]
    assert decode(data).shape[2] == 3
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * kept)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_truncated_jpeg_is_called_truncated():
    data = encode(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8)), "JPEG")
    for part in (0.2, 0.5, 0.99):
        with pytest.raises(BadImage, match=r"^truncated$"):
            decode(data[: int(len(data) * part)])


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_size_is_checked_in_the_header():
    with pytest.raises(BadImage, match="too large: 32000 x 32000 pixels"):
        decode(png_header(32000, 32000))
    with pytest.raises(BadImage, match="too large: 36 x 24 pixels, more than 863"):
        decode(encode(COLOUR), max_pixels=863)
    assert decode(encode(COLOUR), max_pixels=864).shape == COLOUR.shape


def test_gif_and_webp_canvases_are_checked_before_they_are_allocated():
    gif = bytearray(samples()["gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    webp = bytearray(encode(Image.new("RGBA", (16, 16), (1, 2, 3, 9)), "WEBP", save_all=True, exif=b"x"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    for data in (bytes(gif), bytes(webp)):
        with pytest.raises(BadImage, match=r"too large|unreadable"):
            decode(data)


def test_a_progressive_jpeg_of_many_scans_is_refused_quickly():
    data = encode(Image.new("L", (8000, 7900)), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    with pytest.raises(BadImage, match="too large: 106 scans"):
        decode(data[:-2] + scan * 100 + data[-2:])


def test_tiff_tiles_larger_than_an_image_are_refused():
    data = big_endian_tiff(9, 9, 8, b"\0" * 81, t259=5, t322=1 << 16, t323=1 << 16, t324=8, t325=81)
    with pytest.raises(BadImage, match="tiles of more pixels"):
        decode(data)


def bad_tiff() -> bytes:
    """A TIFF that Pillow warns about: a tag with more values than it may have."""
    return encode(COLOUR, "TIFF", tiffinfo={262: 2, 296: 2}).replace(
        struct.pack("<HHI", 296, 3, 1), struct.pack("<HHI", 296, 3, 2)
    )


def test_pillows_warnings_are_silent_in_threads_and_all_other_warnings_stay():
    data = bad_tiff()
    with pytest.warns(UserWarning, match="Metadata Warning"):
        Image.open(io.BytesIO(data)).load()
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: [decode(data) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        warnings.warn("mine", stacklevel=1)
        for thread in threads:
            thread.join()
        assert [str(each.message) for each in seen] == ["mine"]
        with pytest.warns(UserWarning, match="Metadata Warning"):
            Image.open(io.BytesIO(data)).load()
    assert warnings.filters == before


SEEDS = list(samples().values())


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, len(SEEDS) - 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=12),
    kept=st.floats(0.05, 1),
    tail=st.binary(max_size=30),
)
@example(seed=0, changes=[], kept=1.0, tail=b"")
def test_mutated_files_give_pixels_or_bad_image_and_nothing_else(seed, changes, kept, tail):
    data = bytearray(SEEDS[seed])
    for place, new in changes:
        at = int(place * len(data))
        data[at : at + len(new)] = new
    data = bytes(data[: int(len(data) * kept)]) + tail
    try:
        decoded = decode(data, max_pixels=1_000_000)
    except BadImage as error:
        reason = str(error)
        with pytest.raises(BadImage) as again:
            decode(data, max_pixels=1_000_000)
        assert str(again.value) == reason
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3
    assert decoded.shape[0] * decoded.shape[1] <= 1_000_000


@given(st.binary(max_size=200))
def test_random_bytes_are_bad_images(data):
    with pytest.raises(BadImage):
        decode(data)


@pytest.mark.assets
def test_all_bad_images_of_the_assets_within_bounded_memory_and_without_a_warning(assets: Path):
    program = """
import json, resource, sys, warnings
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
warnings.simplefilter("error")
from zoo.data.decode import BadImage, decode
folder, results = Path(sys.argv[1]), {}
for row in json.loads((folder / "MANIFEST.json").read_text()):
    try:
        results[row["path"]] = list(decode((folder / row["path"]).read_bytes()).shape)
    except BadImage as error:
        results[row["path"]] = str(error)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([results, int(peak.split()[1])]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(assets / "badimages")],
        capture_output=True,
        timeout=60,
        check=True,
    )
    results, peak_kib = json.loads(done.stdout)
    assert b"Warning" not in done.stderr
    assert len(results) == 572
    assert peak_kib < 600 * 1024
    expected = {row["path"]: row for row in json.loads((assets / "badimages" / "MANIFEST.json").read_text())}
    formats = {"PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM"}
    for path, result in results.items():
        row = expected[path]
        if isinstance(result, list):
            assert row["result"] == "ok"
            assert sorted(result[:2]) == sorted(row["size"]), path
        else:
            readable = row["result"] == "ok" and row["format"] in formats and row["mode"] != "F"
            assert not readable or path == "pillow/broken_data_stream.png", (path, result)
    assert sum(isinstance(result, list) for result in results.values()) > 350


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((100, 150), 50, (50, 75)),
        ((150, 100), 50, (75, 50)),
        ((333, 500), 224, (224, 336)),
        ((1, 1), 8, (8, 8)),
        ((10, 40), 5, (5, 20)),
        ((10, 41), 5, (5, 20)),
        ((5000, 1), 16, (64, 16)),
    ],
)
def test_resize_keeps_the_aspect_and_bounds_it(shape, size, expected):
    resized = resize(np.zeros((*shape, 3), np.uint8), size, "bilinear")
    assert resized.shape == (*expected, 3)
    assert resized.dtype == np.uint8


@settings(deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(1, 64),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
def test_resize_has_the_shorter_side_exact_and_the_long_one_by_torchvisions_rule(height, width, size, interpolation):
    resized = resize(np.full((height, width, 3), 77, np.uint8), size, interpolation)
    short, long = sorted(resized.shape[:2])
    inner_short = min(height, width)
    inner_long = min(max(height, width), 4 * inner_short)
    assert short == size
    assert long == (inner_long if inner_short == size else int(size * inner_long / inner_short))
    assert (resized == 77).all()


def test_resize_is_pillows_antialiased_resampling_of_the_middle():
    wide = RNG.integers(0, 256, (20, 100, 3), dtype=np.uint8)
    middle = Image.fromarray(np.ascontiguousarray(wide[:, 10:90])).resize((40, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(wide, 10, "bicubic"), np.array(middle))


def test_resize_to_the_same_size_copies():
    resized = resize(COLOUR, 24, "bilinear")
    np.testing.assert_array_equal(resized, COLOUR)
    assert not np.shares_memory(resized, COLOUR)


def test_pixel_sha256_covers_shape_and_pixels():
    assert pixel_sha256(COLOUR) == pixel_sha256(np.asfortranarray(COLOUR))
    assert pixel_sha256(COLOUR) == hashlib.sha256(b"(24, 36, 3)" + COLOUR.tobytes()).hexdigest()
    other = COLOUR.copy()
    other[-1, -1, -1] ^= 1
    assert pixel_sha256(other) != pixel_sha256(COLOUR)
    assert pixel_sha256(decode(encode(COLOUR))) == pixel_sha256(decode(encode(COLOUR, "BMP")))


def test_peak_memory_of_a_large_image_is_bounded():
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="too large"):
        decode(png_header(8001, 8000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 50 * 1024


NAME = b"Muster^Max 1.4.1960"


def tiff_with_a_text_for_its_compression() -> bytes:
    """A TIFF whose tag 259 is ASCII: Pillow's KeyError repeats it."""
    data = encode(GREY, "TIFF")
    place = data.index(struct.pack("<HHI", 259, 3, 1))
    entry = struct.pack("<HHII", 259, 2, len(NAME) + 1, len(data))
    return data[:place] + entry + data[place + 12 :] + NAME + b"\0"


def png_with_a_chunk_called(name: bytes) -> bytes:
    data = encode(COLOUR)
    chunk = struct.pack(">I", 4) + name + b"abcd" + struct.pack(">I", zlib.crc32(name))  # a wrong sum
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("read", [decode, read_header, read_size])
@pytest.mark.parametrize(
    "data",
    [
        tiff_with_a_text_for_its_compression(),
        png_with_a_chunk_called(b"Must"),
        png_with_a_chunk_called(b"19.4"),
        b"P5 Muster 19.4.1960 255\n",
        b"P5 4 4 Muster^Max\n",
    ],
)
def test_no_reason_repeats_what_stands_in_the_file(read, data):
    try:
        read(data)
    except BadImage as bad:
        assert re.fullmatch(
            r"truncated|unreadable: (broken PNG file|damaged, or of a kind that is not supported)", str(bad)
        )
    else:
        assert read is not decode


def test_what_pillow_says_of_the_kind_of_damage_stays():
    bmp = bytearray(encode(COLOUR, "BMP"))
    bmp[28] = 7  # bits a pixel
    with pytest.raises(BadImage, match=r"^unreadable: Unsupported BMP pixel depth$"):
        decode(bytes(bmp))
