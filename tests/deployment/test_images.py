from __future__ import annotations

import glob
import io
import os
from pathlib import Path

import pytest

from zoo.deployment.images import Encoded, Lost, bytes_of, find_images, listed_images, name_of
from zoo.errors import ZooError

DICOM = bytes(128) + b"DICM"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/1.jpeg", "b/notes.txt", "b/deep/3.PNG", "a.tif", ".hidden.png", ".git/x.png", "[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("ct/IM0001", "ct/1.2.840.113"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(DICOM)
    (tmp_path / "ct" / "README").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*given: str) -> list[str]:
    return [os.fspath(path) for path in find_images(given)]


def test_a_folder_means_its_images_and_dicoms_without_an_ending(folder):
    assert names("b") == ["b/1.jpeg", "b/2.png", "b/deep/3.PNG"]
    assert names("ct") == ["ct/1.2.840.113", "ct/IM0001"]
    assert names(".") == ["[1].png", "a.tif", "b/1.jpeg", "b/2.png", "b/deep/3.PNG", "ct/1.2.840.113", "ct/IM0001"]


def test_a_file_is_itself_whatever_it_is_called(folder):
    assert names("b/notes.txt", "[1].png", "a.tif", "a.tif") == ["b/notes.txt", "[1].png", "a.tif", "a.tif"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("b/*.png", ["b/2.png"]),
        ("b/*", ["b/1.jpeg", "b/2.png", "b/deep/3.PNG"]),
        ("**/*.[pP]*", ["[1].png", "b/2.png", "b/deep/3.PNG"]),
        ("**", ["[1].png", "a.tif", "b/1.jpeg", "b/2.png", "b/deep/3.PNG", "ct/1.2.840.113", "ct/IM0001"]),
        ("?/*.txt", ["b/notes.txt"]),
        ("ct/*", ["ct/1.2.840.113", "ct/IM0001"]),
    ],
)
def test_a_pattern_means_what_it_matches(folder, pattern, found):
    assert names(pattern) == found
    assert names(str(folder / pattern)) == [str(folder / each) for each in found]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["b/*.gif"], r"pattern 'b/\*.gif' matches no image; check it, and put it in quotes"),
        (["gone"], "there is no file or folder 'gone'; check the path"),
        (["x\0y"], r"there is no file or folder 'x\\\\x00y'"),
        (["a" * 5000], "there is no file or folder"),
        (["a" * 5000 + "*"], "matches no image"),
        (["ct/README", "empty"], r"folder 'empty' holds no image \(.bmp, "),
        ([], "no image was named"),
        ([b"GIF89a"], "images are given by their paths. Got bytes; write it to a file first"),
        ([None], "images are given by their paths. Got NoneType"),
        (["a.tif", ""], "a path is empty; give files, folders or patterns"),
    ],
)
def test_what_means_no_image_is_said(folder, given, said):
    (folder / "empty").mkdir()
    with pytest.raises(ZooError, match=said):
        find_images(given)


def test_one_path_is_a_list_of_one(folder):
    assert find_images("a.tif") == find_images(Path("a.tif")) == [Path("a.tif")]


def test_a_folder_that_links_to_itself_ends(folder):
    (folder / "b" / "again").symlink_to(folder / "b", target_is_directory=True)
    assert names("b") == ["b/1.jpeg", "b/2.png", "b/deep/3.PNG"]


@pytest.mark.parametrize(
    "text",
    [
        b"a.tif\nb\n\ngone.png\n",
        b"\xef\xbb\xbfa.tif\r\nb\r\ngone.png",
        b"a.tif\0b\0gone.png\0",
    ],
)
def test_a_list_holds_files_and_folders_and_keeps_what_is_lost(folder, text):
    found = listed_images(io.BytesIO(text), "list")
    assert [str(each) for each in found] == ["a.tif", "b/1.jpeg", "b/2.png", "b/deep/3.PNG", "gone.png"]


def test_a_list_holds_names_of_any_encoding(folder):
    (path,) = listed_images(io.BytesIO(b"caf\xe9 [1]*.png\n"), "list")
    assert os.fsencode(path) == b"caf\xe9 [1]*.png"
    for empty in (b"", b"\n \n", b"\0"):
        with pytest.raises(ZooError, match=r"list 'names.txt' names no path; write one on each line"):
            listed_images(io.BytesIO(empty), "names.txt")


def test_bytes_come_from_regular_files_alone(folder):
    (folder / "a.tif").write_bytes(b"some")
    assert bytes_of(folder / "a.tif") == b"some" == bytes_of(Encoded("-", b"some"))
    assert (name_of(folder / "a.tif"), name_of(Encoded("-", b""))) == (str(folder / "a.tif"), "-")
    os.mkfifo(folder / "pipe")
    for odd in (folder / "pipe", folder / "b"):
        with pytest.raises(ValueError, match="no regular file"):
            bytes_of(odd)
    with (folder / "huge.png").open("wb") as stream:
        stream.truncate((1 << 30) + 1)  # a hole: no disk is filled
    with pytest.raises(ValueError, match="too large: 1024 MiB"):
        bytes_of(folder / "huge.png")
    with pytest.raises(FileNotFoundError):
        bytes_of(folder / "gone.png")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("b/**/*.[pP]*", ["b/2.png", "b/deep/3.PNG"]),
        ("b/../**/3.*", ["b/../b/deep/3.PNG"]),
        ("**/deep/*", ["b/deep/3.PNG"]),
        ("**/b/**/?.*", ["b/1.jpeg", "b/2.png", "b/deep/3.PNG"]),
        ("**/notes.txt", ["b/notes.txt"]),
        ("**/.git/*.png", [".git/x.png"]),
        ("**/.*.png", [".hidden.png"]),
    ],
)
def test_any_depth_is_what_glob_takes_for_it(folder, pattern, found):
    assert names(pattern) == found == sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    assert names(str(folder / pattern)) == [str(folder / each) for each in found]


def test_a_pattern_of_any_depth_takes_each_file_once_though_links_lead_in_circles(folder):
    (folder / "b" / "again").symlink_to(".")
    (folder / "b" / "deep" / "up").symlink_to("..")  # with two of them `glob` never ends
    (folder / "b" / "self").symlink_to("../b")
    assert names("b/**/*.png") == ["b/2.png"]
    assert names("**/3.*") == ["b/deep/3.PNG"]


def test_a_link_that_leads_nowhere_is_a_file_with_a_reason_where_it_is_called_an_image(folder):
    for name, target in {"lost.png": "gone", "round.png": "round.png", "lost.txt": "gone", "lost": "gone"}.items():
        (folder / "b" / name).symlink_to(target)
    os.mkfifo(folder / "b" / "pipe.png")
    found = ["b/1.jpeg", "b/2.png", "b/deep/3.PNG", "b/lost.png", "b/round.png"]
    assert names("b") == found
    assert names("**/[lr]o*.png") == names("b/[lr]o*.png") == found[3:]
    with pytest.raises(FileNotFoundError):
        bytes_of(folder / "b" / "lost.png")


def test_what_may_not_be_read_is_a_file_with_a_reason(folder, as_nobody):
    (folder / "secret").mkdir(mode=0o700)
    (folder / "secret" / "x.png").touch()
    (folder / "b" / "link.png").symlink_to("../secret/x.png")
    folder.chmod(0o755)
    imports = "from zoo.deployment.images import find_images, listed_images; import io"
    code = "for given in ('b/link.png', 'b/l*.png', 'b/**/l*', 'b'): print(*find_images([given]))\n"
    code += "print(listed_images(io.BytesIO(b'secret\\na.tif\\nb/link.png'), 'list'))"
    told = as_nobody(imports, code, folder).splitlines()
    assert told[:4] == ["b/link.png"] * 3 + ["b/1.jpeg b/2.png b/deep/3.PNG b/link.png"]
    assert "Lost(name='secret', reason=\"cannot read the folder 'secret': Permission denied" in told[4]
    assert "PosixPath('a.tif'), PosixPath('b/link.png')" in told[4]


def test_a_folder_of_a_list_without_images_is_a_row_with_a_reason(folder):
    (folder / "empty").mkdir()
    (folder / "ct2").symlink_to("ct2")
    lost, found, link = listed_images(io.BytesIO(b"empty\na.tif\nct2"), "list")
    assert (lost, found, link) == (Lost("empty", "the folder holds no image"), Path("a.tif"), Path("ct2"))
    assert name_of(lost) == "empty"
    with pytest.raises(ValueError, match=r"^the folder holds no image$"):
        bytes_of(lost)
