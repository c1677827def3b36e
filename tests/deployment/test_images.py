from __future__ import annotations

import io
import os

import pytest

from zoo.deployment.images import Encoded, bytes_of, find_images, listed_images, name_of
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
    ],
)
def test_what_means_no_image_is_said(folder, given, said):
    (folder / "empty").mkdir()
    with pytest.raises(ZooError, match=said):
        find_images(given)


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
