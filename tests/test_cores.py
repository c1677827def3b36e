from __future__ import annotations

import pytest

from zoo.cores import core_quota, cores


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 1.5),
        ("10000 100000\n", 0.1),
        ("max 100000\n", None),
        ("", None),
        ("200000\n", None),
        ("200000 0\n", None),
        ("two 100000\n", None),
    ],
)
def test_a_containers_share_of_the_cores_is_read(tmp_path, text, wanted):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert core_quota(file) == wanted


def test_where_no_share_is_set_all_cores_count(tmp_path, monkeypatch):
    assert core_quota(tmp_path / "cpu.max") is None
    monkeypatch.setattr("zoo.cores.core_quota", lambda: 1)
    assert cores() == 1
    monkeypatch.setattr("zoo.cores.core_quota", lambda: 0.1)
    assert cores() == 1
    monkeypatch.setattr("zoo.cores.core_quota", lambda: 1 << 20)
    alone = cores()
    monkeypatch.setattr("zoo.cores.core_quota", lambda: None)
    assert cores() == alone >= 1
    monkeypatch.setattr("zoo.cores.core_quota", lambda: 1.5)
    assert cores() == min(2, alone)
