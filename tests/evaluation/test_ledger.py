from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from drawn_runs import make_run, record

from zoo.errors import ZooError
from zoo.evaluation.ledger import looks_at_test, record_look
from zoo.files import Home
from zoo.runs import list_runs
from zoo.training.scoring import evaluate


def test_every_look_is_a_line_and_is_counted_by_split(root):
    assert looks_at_test(root, "ab" * 32) == {"scorings": 0, "recipes": 0, "first": None, "last": None}
    for recipe, seed, digest in (("a", 0, "ab"), ("a", 1, "ab"), ("b", 0, "ab"), ("b", 0, "cd")):
        record_look(root, record(recipe, seed, split_digest=digest * 32))
    found = looks_at_test(root, "ab" * 32)
    assert (found["scorings"], found["recipes"]) == (3, 2)
    assert found["first"] <= found["last"] and found["first"].endswith("+00:00")
    assert looks_at_test(root, "cd" * 32)["scorings"] == 1
    keys = {"time", "dataset", "split_digest", "run", "recipe", "recipe_digest", "seed"}
    assert all(set(json.loads(line)) == keys for line in root.ledger.read_text().splitlines())


def test_scoring_test_is_a_look_and_nothing_else_is(trained):
    run = next(iter(list_runs(trained)))
    digest = run.record.split_digest
    before = looks_at_test(trained, digest)["scorings"]
    evaluate(run, "val", trained)
    run.predictions_file("val").unlink()
    evaluate(run, "val", trained)
    evaluate(run, "test", trained)  # known already: not scored again
    assert looks_at_test(trained, digest)["scorings"] == before
    run.predictions_file("test").unlink()
    evaluate(run, "test", trained)
    assert looks_at_test(trained, digest)["scorings"] == before + 1


def test_scored_runs_from_before_the_ledger_count_too(root):
    make_run(root, "a"), make_run(root, "b", splits=("val",)), make_run(root, "c", split_digest="cd" * 32)
    assert looks_at_test(root, "ab" * 32) == {"scorings": 1, "recipes": 1, "first": None, "last": None}
    record_look(root, record("a", run="tiny--a--s0--0"))
    assert looks_at_test(root, "ab" * 32)["scorings"] == 1
    record_look(root, record("a", run="tiny--a--s0--0"))
    assert looks_at_test(root, "ab" * 32)["scorings"] == 2


def test_a_line_that_was_cut_off_takes_no_other_with_it(root):
    record_look(root, record("a"))
    with root.ledger.open("ab") as stream:
        stream.write(b'{"time": "2026-01-01", "split_di')
    record_look(root, record("b"))
    with root.ledger.open("ab") as stream:
        stream.write(b"[1]\n\xff\xfe\n\n")
    assert looks_at_test(root, "ab" * 32)["scorings"] == 2


def test_lines_of_several_processes_do_not_mix(root):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_look_often, [(str(root.root), name) for name in "abcd"]))
    assert looks_at_test(root, "ab" * 32) | {"first": 0, "last": 0} == {
        "scorings": 200, "recipes": 4, "first": 0, "last": 0,
    }  # fmt: skip


def _look_often(task):
    from pathlib import Path

    for seed in range(50):
        record_look(Home(Path(task[0])), record(task[1], seed))


def test_a_look_that_cannot_be_noted_is_said_in_one_line(full_disk):
    full = Home(full_disk)
    (full_disk / "models").mkdir()
    with (full_disk / "fill").open("wb") as stream, pytest.raises(OSError):
        while True:
            stream.write(b"\0" * 65536)
            stream.flush()
            os.fsync(stream.fileno())
    with pytest.raises(ZooError, match=r"cannot write .*ledger\.jsonl.*No space left"):
        for _ in range(100):  # the last block may have room for a few lines
            record_look(full, record())
