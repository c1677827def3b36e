from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from zoo.data.room import GB, caches_of, make_room
from zoo.errors import ZooError
from zoo.training import stored
from zoo.training.stored import read_stored, store_once

VALUES = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(0))


def store(file: Path, values: torch.Tensor, whole: bool = True):
    def compute(add, start):
        for part in torch.split(values[start:], 2):
            add(part, whole)

    return store_once(file, len(values), compute)


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        VALUES.contiguous(memory_format=torch.channels_last),
        VALUES.bfloat16().contiguous(memory_format=torch.channels_last),
        VALUES.half(),
        VALUES.flatten(1).bfloat16(),
        VALUES.flatten(2),
    ],
)
def test_an_array_comes_back_as_it_was(tmp_path, values):
    made, read = store(tmp_path / "a.npy", values), read_stored(tmp_path / "a.npy", 5)
    assert read is not None
    for each in (made, read):
        assert each.values.dtype == values.dtype and torch.equal(each.values, values)
        assert each.values.stride() == values.stride()
        assert each.facts["whole"] is True


def test_what_is_read_may_be_written_to_and_the_file_stays(tmp_path):
    before = store(tmp_path / "a.npy", VALUES).values
    before.zero_()
    read = read_stored(tmp_path / "a.npy", 5)
    assert read is not None and torch.equal(read.values, VALUES)


def test_damage_of_any_kind_is_no_array(tmp_path):
    file = tmp_path / "a.npy"
    assert read_stored(file, 5) is None
    store(file, VALUES)
    record, data = file.with_suffix(".json"), file.read_bytes()
    assert read_stored(file, 4) is None
    for changed in (b"", data[:-1], data + b"0", data[:200] + bytes([data[200] ^ 4]) + data[201:]):
        file.write_bytes(changed)
        assert read_stored(file, 5) is None
    file.write_bytes(data)
    assert read_stored(file, 5) is not None
    for text in ("", "{}", "[]", record.read_text().replace("float32", "complex")[:-9]):
        record.write_text(text)
        assert read_stored(file, 5) is None
    assert torch.equal(store(file, VALUES).values, VALUES)


def test_too_few_rows_are_a_fault_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="2 rows were written where 5 were promised"):
        store_once(tmp_path / "a.npy", 5, lambda add, _: add(VALUES[:2], True))
    assert not list(tmp_path.glob("*a.npy*"))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        store(tmp_path / "taken" / "a.npy", VALUES)


def slowly(folder: str) -> list[float]:
    def compute(add, start):
        with (Path(folder) / "computed.txt").open("a") as stream:
            stream.write("once\n")
        time.sleep(1.5)
        add(VALUES, True)

    return store_once(Path(folder) / "a.npy", 5, compute).values.flatten().tolist()


@pytest.mark.slow
def test_of_several_processes_one_computes_and_all_have_it(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(slowly, [str(tmp_path)] * 3))
    assert found == [VALUES.flatten().tolist()] * 3
    assert (tmp_path / "computed.txt").read_text() == "once\n"


def test_who_waits_is_told_and_may_leave(tmp_path):
    from filelock import FileLock

    told = []

    def on_wait() -> None:
        told.append(1)
        if len(told) == 3:
            raise KeyboardInterrupt

    with FileLock(tmp_path / ".a.lock"), pytest.raises(KeyboardInterrupt):
        store_once(tmp_path / "a.npy", 5, lambda add, _: add(VALUES, True), on_wait)
    assert len(told) == 3


def killed(folder: str) -> None:
    def compute(add, start):
        add(VALUES[:2], True)
        os.kill(os.getpid(), signal.SIGKILL)

    store_once(Path(folder) / "a.npy", 5, compute)


def dies(work, folder: Path) -> None:
    """Run work in a process of its own, which must end by a kill."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_what_a_killed_process_has_begun_is_removed(tmp_path):
    dies(killed, tmp_path)
    assert len(list(tmp_path.glob(".a.npy.*"))) == 1
    assert torch.equal(store(tmp_path / "a.npy", VALUES).values, VALUES)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.lock", "a.json", "a.npy"]


MANY = torch.randn(23, 6, generator=torch.Generator().manual_seed(1)).bfloat16()


def in_batches(last: int, began: list[int], how: str = "", whole: bool = True):
    """A pass of batches of 4, each in two pieces, that is ended before the batch that begins at `last`."""

    def compute(add, start):
        began.append(start)
        for first in range(start, len(MANY), 4):
            if first == last and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if first == last:
                raise KeyboardInterrupt
            for part in torch.split(MANY[first : first + 4], 3):
                add(part, whole and first != 8)

    return compute


def killed_later(folder: str) -> None:
    stored.PART_S = 0.0
    store_once(Path(folder) / "a.npy", 23, in_batches(12, [], "killed"), every=4)


@pytest.mark.slow
def test_a_pass_that_is_killed_goes_on_where_it_was(tmp_path):
    dies(killed_later, tmp_path)
    assert sorted(each.name for each in tmp_path.glob("a-p[0-9]*")) == [
        f"a-p{number}.{kind}" for number in range(3) for kind in ("json", "npy")
    ]
    began: list[int] = []
    with pytest.raises(KeyboardInterrupt):  # what comes after it is kept at the end: a minute has not gone by
        store_once(tmp_path / "a.npy", 23, in_batches(20, began), every=4)
    made = store_once(tmp_path / "a.npy", 23, in_batches(99, began), every=4)
    assert began == [12, 20]
    assert torch.equal(made.values, MANY) and made.facts["whole"] is False and made.facts["seconds"] > 0
    assert read_stored(tmp_path / "a.npy", 23) is not None
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.lock", "a.json", "a.npy"]


@pytest.mark.parametrize("damage", ["flipped", "gone", "another"])
def test_parts_that_are_not_good_are_computed_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(stored, "PART_S", 0.0)
    began: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        store_once(tmp_path / "a.npy", 23, in_batches(20, began), every=4)
    second = tmp_path / "a-p1.npy"
    if damage == "flipped":
        second.write_bytes(second.read_bytes()[:-1] + b"\x7f")
    elif damage == "gone":
        second.unlink()
    else:
        for kind in (".npy", ".json"):
            (tmp_path / f"a-p3{kind}").replace(second.with_suffix(kind))
    made = store_once(tmp_path / "a.npy", 23, in_batches(99, began), every=4)
    assert began == [0, 4] and torch.equal(made.values, MANY)


def test_without_room_for_parts_the_pass_itself_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PART_S", 0.0)
    (tmp_path / "a-p0.npy").mkdir()
    tried, kept = [], []
    write = stored._Parts._write

    def watched(parts, count):
        tried.append(count)
        kept.append(parts)
        write(parts, count)

    monkeypatch.setattr(stored._Parts, "_write", watched)
    assert torch.equal(store_once(tmp_path / "a.npy", 23, in_batches(99, []), every=4).values, MANY)
    assert tried == [4] and kept[0]._waiting == []  # once, and nothing waits in memory


def test_a_part_that_was_half_written_is_removed(tmp_path):
    left = [tmp_path / f".a-p0.npy.{'x' * 8}", tmp_path / f".a-p12.json.{'y' * 8}"]
    for each in left:
        each.write_bytes(b"half")
    store_once(tmp_path / "a.npy", 23, in_batches(99, []), every=4)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.lock", "a.json", "a.npy"]


def test_arrays_leave_for_want_of_room_but_not_while_they_are_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE_GB", "inf")
    folder = tmp_path / "data" / "tiny" / ".cache"
    names = ["features-a.npy", "boundary-b.npy", "features-c.npy"]
    held = {name: store(folder / name, VALUES) for name in names}
    size = (folder / names[0]).stat().st_size
    assert set(caches_of(tmp_path / "data")) == {folder / name for name in names}  # no record, and no lock
    pixels = folder / "pixels-train.bin"
    assert not make_room(pixels, size, 3 * size)
    values = held.pop(names[1]).values[2:3]
    del held[names[0]], held[names[2]]
    time.sleep(0.02)
    assert read_stored(folder / names[0], 5) is not None  # used again: the third is now the oldest that nobody has
    assert make_room(pixels, size, 3 * size)
    assert sorted(each.name for each in folder.iterdir() if not each.name.startswith(".")) == [
        "boundary-b.json",
        "boundary-b.npy",
        "features-a.json",
        "features-a.npy",
    ]
    assert not make_room(pixels, 2 * size, 2 * size)
    assert torch.equal(values, VALUES[2:3])
    del values
    # What is stored makes its own room, and is computed again where it had to leave.
    monkeypatch.setenv("ZOO_CACHE_GB", repr(2.5 * size / GB))
    store(folder / names[2], VALUES)
    assert (folder / names[2]).exists() and not (folder / names[1]).exists()
    assert torch.equal(store(folder / names[1], VALUES).values, VALUES)
    assert sum(facts.st_size for facts in caches_of(tmp_path / "data").values()) == 2 * size
