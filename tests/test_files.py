from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError, one_line
from zoo.files import (
    atomic_writer,
    check_name,
    check_writable,
    digest_of,
    find_toml,
    home,
    list_toml,
    read_json,
    read_toml,
    remove_half_written,
    sha256_bytes,
    sha256_file,
    to_json,
    write_error,
    write_json,
    write_text,
    write_toml,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(), VALUES))
def test_json_comes_back_and_its_digest_does_not_hang_on_the_order(value):
    assert json.loads(to_json(value)) == value
    assert digest_of(value) == digest_of(dict(reversed(value.items())))


@given(st.text(), st.integers(2, 50))
def test_one_line_is_one_printable_line(text, limit):
    assert one_line(text, limit).isprintable() and len(one_line(text, limit)) <= limit


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [math.nan, np.float32("inf"), np.arange(2)], "b": np.float64(0.5), 3: (1,)}
    assert json.loads(to_json(value)) == {"a": [None, None, [0, 1]], "b": 0.5, "3": [1]}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), atomic_writer(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert read_json(file) == {"schema_version": 1, "a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_file_has_the_rights_that_others_would_give_it(tmp_path):
    write_text(tmp_path / "a", "ä")
    (tmp_path / "b").write_text("b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
    assert sha256_file(tmp_path / "a") == sha256_bytes("ä".encode())


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: write_text(path, "x"),
        check_writable,
    ):
        with pytest.raises(ZooError, match=r"cannot write .*(File exists|Not a directory); check the path"):
            write(tmp_path / "file" / "below")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    said = str(write_error(tmp_path, OSError(28, "No space left on device")))
    assert said.endswith("No space left on device; free space on that disk, or work elsewhere with --home")


def test_a_full_disk_is_said_before_work(full_disk):
    with pytest.raises(ZooError, match="No space left on device; free space"):
        check_writable(full_disk)
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no valid JSON"), ("[1]", "must hold one JSON table. Got a list"), ("\xff", "is no valid JSON")],
)
def test_a_damaged_json_is_said(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ZooError, match=said):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("version", [2, '"1"', "null"])
def test_an_unknown_schema_is_refused(tmp_path, version):
    (tmp_path / "a.json").write_text(f'{{"schema_version": {version}}}')
    with pytest.raises(ZooError, match="this zoo reads up to 1: update the zoo"):
        read_json(tmp_path / "a.json")


def test_toml_comes_back_without_what_is_none(tmp_path):
    write_toml(tmp_path / "a.toml", {"a": None, "b": {"c": [1, 2], "d": None}, "e": "ü\n"})
    assert read_toml(tmp_path / "a.toml") == {"b": {"c": [1, 2]}, "e": "ü\n"}
    (tmp_path / "a.toml").write_text("a = \nb = 1")
    with pytest.raises(ZooError, match=r"is no valid TOML: .*line 1"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(ZooError, match="there is no file"):
        read_toml(tmp_path / "b.toml")
    with pytest.raises(ZooError, match=r"cannot read .*Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a--b", ".a", "a/b", "a" * 81, "ä", "a\n"])
def test_a_name_that_cannot_be_a_folder_s_is_refused(name):
    with pytest.raises(ZooError, match="recipe name must be 1 to 80 letters"):
        check_name(name, "recipe")


def test_home_is_the_argument_then_the_environment_then_here(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_HOME", raising=False)
    assert home().root == tmp_path
    monkeypatch.setenv("ZOO_HOME", "one")
    assert home().root == tmp_path / "one"
    assert home(tmp_path).root == tmp_path
    for wrong in (tmp_path / "none", "/dev/null/x"):
        with pytest.raises(ZooError, match=r"the home folder .* is no folder; make it"):
            home(wrong)


def test_a_home_below_a_folder_that_may_not_be_entered_is_refused(tmp_path, as_nobody):
    (tmp_path / "shut" / "home").mkdir(parents=True)
    tmp_path.chmod(0o755)
    (tmp_path / "shut").chmod(0o700)
    code = "try: home('shut/home')\nexcept ZooError as error: print(error)"
    told = as_nobody("from zoo.files import home; from zoo.errors import ZooError", code, tmp_path)
    assert told.startswith("the home folder ") and "is no folder; make it, or name another" in told
    with pytest.raises(ZooError, match="there is no home folder for '~nobody-there/zoo'"):
        home("~nobody-there/zoo")


def test_the_user_s_recipe_comes_before_the_built_in_one(root):
    built_in = find_toml("simple_cnn", "recipes", root.recipes)
    write_text(root.recipes / "simple_cnn.toml", "")
    assert find_toml("simple_cnn", "recipes", root.recipes) == root.recipes / "simple_cnn.toml" != built_in
    assert len(list_toml("recipes", root.recipes)) > 10
    with pytest.raises(ZooError, match="unknown recipe 'simple_cnm'; did you mean 'simple_cnn'"):
        find_toml("simple_cnm", "recipes", root.recipes)
    with pytest.raises(ZooError, match=r"there is no file 'gone.toml'"):
        find_toml("gone.toml", "recipes", root.recipes)


KILLED = """
import os, signal, sys
from pathlib import Path
from zoo.files import check_writable
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.posix_fallocate = killed
check_writable(Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_kill_in_the_middle_of_the_write_test_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_what_is_half_written_of_a_name_that_begins_alike_is_left_to_its_own_process(tmp_path):
    names = [f"{'long' * 12}-s{seed}.json" for seed in (0, 1)]
    with atomic_writer(tmp_path / names[0]) as stream:
        stream.write(b"{}")
        remove_half_written(tmp_path, names[1])
    assert (tmp_path / names[0]).read_bytes() == b"{}"
    with atomic_writer(tmp_path / names[0]):
        remove_half_written(tmp_path / "nothing")
        (begun,) = (each for each in tmp_path.iterdir() if each.name.startswith("."))
        begun.with_name(begun.name[:-8] + "abcdefgh").write_text("x")
        for name, left in ((names[0][:40], 2), ("*", 0)):
            remove_half_written(tmp_path, name)
            assert sum(each.name.startswith(".") for each in tmp_path.iterdir()) == left
        begun.write_text("")
