from __future__ import annotations

import json

import pytest

from zoo.cli import main
from zoo.deployment.bundle import list_bundles

KEYS = {
    "run",
    "reason",
    "candidates",
    "test",
    "bundle",
    "runner_up",
    "would_change",
    "nearest_misses",
    "environment",
}


@pytest.fixture
def command(trained, capsys, monkeypatch):
    """Return `command(words...)`: exit code, standard output and standard error of `zoo` in a home with three runs."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["zoo", *words])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_pick_prints_a_table_a_reason_and_json(command, trained, tmp_path, monkeypatch):
    figure = tmp_path / "front.png"
    words = ("pick", "--data", "tiny", "--max-latency-ms", "60000", "--min", "top1=0", "--margin", "1")
    code, out, err = command(*words, "--json", "--figure", str(figure))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= KEYS and found["figure"] == str(figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert found["bundle"] in list_bundles(trained) and found["test"]["top1_ci"]
    assert found["environment"]["threads"] >= 1

    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command(*words)
    assert code == 0
    for text in ("chosen: ", "runner-up: ", "test top1: ", f"bundle: {found['bundle']}", "next: zoo serve "):
        assert text in out
    assert "eager" in out and (trained.picks / "tiny.png").is_file()
    table = out[: out.index("chosen: ")].splitlines()[1:]
    assert max(map(len, table)) <= 80

    code, out, err = command(*words, "--figure", str(figure / "front.png"))  # below a file
    assert code == 1 and "chosen: " in out and "figure: " not in out
    assert err.startswith("error: cannot write") and err.count("\n") == 1

    code, out, err = command("pick", "--data", "tiny", "--max-size-mb", "0.000001", "--json")
    assert code == 1 and err.startswith("error: nothing fits: 0 of 2 candidates keep size at most 1e-06 MB; nearest: ")
    missed = json.loads(out)
    assert missed["run"] is None and missed["bundle"] is None and len(missed["nearest_misses"]) == 2
    code, out, err = command("pick", "--data", "tiny", "--max-size-mb", "0.000001")
    assert code == 1 and err.count("\n") == 1 and "nearest miss: " in out and "next: " not in out


@pytest.mark.parametrize(
    "words, said",
    [
        (("--data", "tinny"), "did you mean 'tiny'"),
        (("--data", "tiny", "--min", "top1"), "--min must be METRIC=V"),
        (("--data", "tiny", "--min", "top1=95"), "must be in [0, 1]. Got 95; write 0.95"),
        (("--data", "tiny", "--min", "recall:malign=0.9"), "did you mean 'malignant'"),
        (("--data", "tiny", "--metric", "accuracy"), "--metric must be one of top1"),
        (("--data", "tiny", "--cost", "money"), "--cost must be one of latency, size, memory"),
        (("--data", "tiny", "--max-latency-ms", "0"), "above 0. Got 0"),
        (("--data", "tiny", "--max-memory-mb", "nan"), "above 0. Got nan"),
        (("--data", "tiny", "--min", "top1=95%"), "write a percentage as a fraction, 0.95"),
        (("--data", "tiny", "--margin", "-1"), "the margin must be in [0, 1] of top1; 0.01 is one point. Got -1"),
        (("--data", "tiny", "--margin", "2"), "the margin must be in [0, 1] of top1; 0.01 is one point. Got 2"),
        (("--data", "tiny", "--metric", "log_loss", "--margin", "-1"), "the margin must be 0 or more of log_loss"),
        (("--data", "tiny", "--figure", "shot.pdf"), "--figure must be a file that ends in .png. Got 'shot.pdf'"),
        (("--data", "tiny", "--figure", "data"), "--figure must be a file that ends in .png. Got 'data'"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(command, trained, words, said):
    code, out, err = command("pick", *words)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list_bundles(trained) == []


@pytest.mark.parametrize("words", [(), ("--data", "tiny", "--max-latency-ms", "fast")])
def test_a_wrong_command_line_is_usage(command, words):
    code, _, err = command("pick", *words)
    assert code == 2 and "Traceback" not in err
