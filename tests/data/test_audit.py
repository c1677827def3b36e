from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scenes import draw_scene

from zoo.data.audit import judge_files, open_folder
from zoo.data.facts import dataset_facts, wrong_suffix
from zoo.data.sources import import_dataset
from zoo.errors import ZooError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """Return a PNG whose header claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(3751 * 200), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bad_files() -> dict[str, bytes]:
    """Return 25 bad files of 12 kinds by the kind of finding that they must be."""
    image = Image.fromarray(draw_scene(1))
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)
    frames = [image.convert("P"), Image.fromarray(draw_scene(2)).convert("P")]
    return {
        "unreadable/zero1.png": b"",
        "unreadable/zero2.jpg": b"",
        "unreadable/cut1.jpg": jpeg[: len(jpeg) // 2],
        "unreadable/cut2.png": png[: len(png) // 2],
        "unreadable/cut3.png": png[:40],
        "unreadable/text1.jpg": b"this is no image",
        "unreadable/text2.png": b"<html><body>404</body></html>",
        "unreadable/bomb1.png": bomb(),
        "unreadable/bomb2.png": bomb(),
        "no_image/readme.txt": b"hello",
        "no_image/table.csv": b"a,b\n1,2\n",
        "wrong_suffix/jpeg.png": jpeg,
        "wrong_suffix/png.jpg": png,
        "animated/one.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated/two.png": encoded(image, "PNG", save_all=True, append_images=[Image.fromarray(draw_scene(2))]),
        "odd_mode/palette1.png": encoded(image.convert("P"), "PNG"),
        "odd_mode/palette2.png": encoded(Image.fromarray(draw_scene(3)).convert("P"), "PNG"),
        "odd_mode/cmyk1.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "odd_mode/cmyk2.jpg": encoded(Image.fromarray(draw_scene(4)).convert("CMYK"), "JPEG"),
        "odd_mode/deep1.png": encoded(deep, "PNG"),
        "odd_mode/deep2.tif": encoded(deep, "TIFF"),
        "odd_mode/alpha1.png": encoded(image.convert("RGBA"), "PNG"),
        "odd_mode/alpha2.webp": encoded(
            Image.fromarray(draw_scene(5)).convert("RGBA").convert("LA").convert("RGBA"), "PNG"
        ),
        "turned/one.jpg": encoded(image, "JPEG", exif=turned),
        "hostile_name/=cmd.png": encoded(Image.fromarray(draw_scene(6)), "PNG"),
    }


def plant(folder, good: int, side: int = 64) -> dict[str, str]:
    """Write good pictures in two classes, bad files among them, and return path to the kind that each must be."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(good // 2):
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:05}.jpg", quality=85)
    wanted = {}
    for place, (name, data) in enumerate(bad_files().items()):
        kind, file = name.split("/")
        path = f"{('cat', 'dog')[place % 2]}/{file}"
        (folder / path).write_bytes(data)
        wanted[path] = kind
    return wanted


def accused(findings) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in findings:
        found.setdefault(each.path, set()).add(each.kind)
    return found


def check_all_found(root, folder, wanted) -> None:
    dataset = import_dataset(folder, "photos", root, bad_images="skip")
    for findings in (
        judge_files(dataset, dataset_facts(dataset)),
        judge_files(*open_folder(folder)),
    ):
        found = accused(findings)
        missed = {path: kind for path, kind in wanted.items() if kind not in found.get(path, set())}
        assert missed == {}
        assert set(found) == set(wanted)  # nobody else is accused


def test_every_bad_file_is_found_and_no_good_one_accused(root, tmp_path):
    wanted = plant(tmp_path / "source", 60)
    assert len(wanted) == 25
    check_all_found(root, tmp_path / "source", wanted)


@pytest.mark.slow
def test_25_bad_files_are_found_in_10000(root, tmp_path):
    wanted = plant(tmp_path / "source", 10_000, side=24)
    assert len(wanted) == 25
    check_all_found(root, tmp_path / "source", wanted)


def test_files_that_changed_or_went_since_the_import_are_named(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "p", {"a": range(9), "b": range(20, 29)})
    dataset = import_dataset(folder, "p", root, copy=True)
    (dataset.root / "a/00001.png").unlink()
    Image.fromarray(draw_scene(77)).save(dataset.root / "a/00002.png")
    Image.fromarray(draw_scene(78)).save(dataset.root / "a/new.png")
    for file in (dataset.folder / ".cache").iterdir():
        file.unlink()
    found = accused(judge_files(dataset, dataset_facts(dataset)))
    assert found == {"a/00001.png": {"unreadable"}, "a/00002.png": {"changed"}, "a/new.png": {"not_in_manifest"}}


def test_a_folder_without_files_cannot_be_looked_at(tmp_path):
    with pytest.raises(ZooError, match="there is no file in"):
        open_folder(tmp_path)


def test_endings_of_no_known_format_are_nobodys_fault():
    assert not wrong_suffix("a.xyz", "UNKNOWN")
    assert wrong_suffix("a", "PNG")


@pytest.mark.slow
def test_every_real_bad_image_is_judged_without_a_crash_and_in_little_memory(assets):
    import subprocess
    import sys

    program = (
        "import resource, sys; from pathlib import Path\n"
        "from zoo.data.audit import judge_files, open_folder\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "dataset, facts = open_folder(Path(sys.argv[1])); judge_files(dataset, facts)\n"
        "print(len(dataset.frame), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(assets / "badimages")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, grown_kib = (int(each) for each in done.stdout.split())
    assert count >= 572
    assert grown_kib < 300 * 1024
