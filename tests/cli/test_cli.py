from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from scenes import AUDIT_KEYS

from zoo.cli import app, main
from zoo.data.manifest import load_dataset
from zoo.files import read_toml, sha256_file, write_toml
from zoo.recipe import load_recipe
from zoo.runs import list_runs
from zoo.training.loop import train


class Done:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def zoo(root_or_tiny, capsys, monkeypatch):
    """Run the command line in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM), os.environ.get("ZOO_HOME")
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            signal.signal(signal.SIGTERM, before[0])
            os.environ["ZOO_HOME"] = before[1]
        said = capsys.readouterr()
        return Done(end.value.code, said.out, said.err)

    return run


@pytest.fixture
def root_or_tiny(request):
    """The home: `trained` or `tiny` where the test asks for one, else an empty one."""
    for name in ("trained", "tiny"):
        if name in request.fixturenames:
            return request.getfixturevalue(name)
    return request.getfixturevalue("root")


def commands():
    """Return every command of the app with the words that call it."""

    def walk(command, words):
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, command
        for name, each in (inner or {}).items():
            yield from walk(each, [*words, name])

    return list(walk(typer.main.get_command(app), []))


COMMANDS = commands()


def test_there_are_commands():
    names = {" ".join(words) for words, _ in COMMANDS}
    assert names >= {"list", "show", "doctor", "data import", "data split", "train", "bench", "compare", "predict"}


@pytest.mark.parametrize(
    ("words", "command"), COMMANDS, ids=lambda each: "-".join(each) if isinstance(each, list) else ""
)
def test_every_command_has_help_json_and_home(zoo, words, command):
    done = zoo(*words, "--help")
    assert done.code == 0 and "Usage" in done.out and done.err == ""
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--home"} <= options
    assert command.help and all(parameter.help for parameter in command.params if parameter.opts[0].startswith("--"))


def test_help_and_version(zoo):
    assert "Fine-tune and compare" in zoo("--help").out
    assert zoo("-h").code == 0
    assert zoo("--version").out.startswith("zoo ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "tiny", "--data"],
        ["train", "tiny", "--data", "tiny", "--seed", "x"],
        ["train", "tiny", "--data", "tiny", "--epochs", "3"],
        ["predict", "run"],
        ["data", "split"],
        ["data", "nothing"],
        ["list"],
    ],
)
def test_bad_usage_exits_2(zoo, arguments):
    done = zoo(*arguments)
    assert done.code == 2 and done.out == "" and done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "tinny", "--data", "tiny"], "unknown recipe 'tinny'; did you mean 'tiny'"),
        (["train", "stranger", "--data", "tiny"], "resnet81"),
        (["train", "tiny", "--data", "tinny"], "there is no dataset 'tinny'; did you mean 'tiny'"),
        (["train", "tiny", "--data", "tiny", "--set", "lr"], "--set takes KEY=VALUE"),
        (
            ["train", "tiny", "--data", "tiny", "--bad-images", "skp"],
            "--bad-images must be fail or skip. Got 'skp'; did you mean 'skip'",
        ),
        (["train", "tiny", "--data", "tiny", "--seed", "-1"], "the seed must be from 0"),
        (["train", "wild", "--data", "tiny"], "not finite in epoch 1, step"),
        (["train", "tiny", "--data", "../tiny"], "dataset name must be"),
        (["bench", "--data", "tiny"], "a benchmark needs a name"),
        (["bench", "--data", "tiny", "--recipes", ",", "--seeds", "1"], "a benchmark needs a name"),
        (["compare"], "nothing to compare"),
        (["compare", "x"], "there is no run 'x'"),
        (["compare", "--data", "tiny"], "there is no run on the present split"),
        (
            ["list", "model"],
            "zoo list takes one of models, recipes, datasets, benchmarks, runs, bundles. Got 'model'; did you mean",
        ),
        (["show", "quickstrat"], "nothing here is called 'quickstrat'; did you mean 'quickstart'"),
        (["show", "a" * 3000], "nothing here is called"),
        (["predict", "x", "y"], "there is no"),
        (["data", "import", "nowhere", "--name", "n"], "nowhere"),
        (["data", "import", "nowhere"], "a dataset needs a name; give one with --name"),
        (["data", "split", "tinny"], "there is no dataset 'tinny'; did you mean 'tiny'"),
        (["data", "split", "tiny", "--ratios", "a,b"], "--ratios takes three shares"),
        (["list", "runs", "--home", "/dev/null/x"], "is no folder"),
        (["--home", "/dev/null/x", "list", "runs"], "is no folder"),
        (["train", "tiny", "--data", "tiny", "--home", "/dev/null/x"], "the home folder '/dev/null/x' is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(zoo, tiny, arguments, said):
    shown = ["--json"] if arguments[0] != "--home" else []
    done = zoo(*arguments, *shown)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert said in done.err


def test_every_fault_of_a_recipe_is_said_at_once_with_the_nearest(zoo, tiny):
    write_toml(tiny.recipes / "bad.toml", {"model": {"name": "simple_cnn"}, "optimiser": {}, "finetune": {"epoch": 3}})
    done = zoo("train", "bad", "--data", "tiny", "--set", "lerning=1", "--set", "batch_size=0")
    assert done.code == 1
    for said in (
        "4 faults",
        "'optimiser'; did you mean 'optimizer'",
        "did you mean 'finetune.epochs'",
        "'lerning'",
        "batch_size must be",
    ):
        assert said in done.err


def test_train_prints_what_scripts_rely_on_and_does_not_train_twice(zoo, tiny):
    done = zoo("train", "tiny", "--data", "tiny", "--json", "--set", "epochs=1")
    assert (done.code, done.err) == (0, "")
    assert {"run", "status", "val", "train_s", "images_per_s"} <= set(done.json)
    assert done.json["status"] == "finished" and 0 <= done.json["val"]["top1"] <= 1
    (run,) = list_runs(tiny)
    assert run.name == done.json["run"] and read_toml(run.path / "recipe.toml")["finetune"]["epochs"] == 1
    stat = run.weights_file.stat().st_mtime_ns
    again = zoo("train", "tiny", "--data", "tiny", "--set", "epochs=1")
    assert again.code == 0 and run.name in again.out and "top1" in again.out
    assert run.weights_file.stat().st_mtime_ns == stat


def test_train_names_a_bad_image_or_counts_it(zoo, tiny):
    dataset = load_dataset("tiny", tiny)
    bad = dataset.of_split("val")["path"].iloc[0]
    dataset.image_path(bad).unlink()
    done = zoo("train", "tiny", "--data", "tiny")
    assert done.code == 1 and Path(bad).name in done.err and "gone" in done.err
    done = zoo("train", "tiny", "--data", "tiny", "--bad-images", "skip", "--json")
    assert done.code == 0 and done.json["images_skipped"] == {"val": [f"{bad}: gone"]}
    done = zoo("train", "tiny", "--data", "tiny", "--bad-images", "skip")
    assert "left out of val: 1 unreadable image" in done.out


@pytest.mark.slow
def test_bench_exits_3_and_writes_the_table_where_some_runs_failed(zoo, tiny):
    done = zoo("bench", "--data", "tiny", "--recipes", "tiny,wild", "--seeds", "1", "--json")
    assert done.code == 3
    assert {"dataset", "split_digest", "leaks_accepted", "floors", "rows"} <= set(done.json)
    assert [row["status"] for row in done.json["rows"]] == ["finished", "failed"]
    keys = {
        "recipe",
        "model",
        "weights",
        "seeds",
        "status",
        "reason",
        "params",
        "val_top1",
        "test_top1",
        "test_top1_ci",
        "letters",
        "train_s",
    }
    assert all(keys <= set(row) for row in done.json["rows"])
    assert all({"name", "test_top1"} <= set(floor) for floor in done.json["floors"])
    before = (tiny.benchmarks / "tiny" / "table.md").read_bytes()
    done = zoo("bench", "--data", "tiny", "--recipes", "tiny,wild", "--seeds", "1")
    assert (
        done.code == 3 and "failed: wild: the loss was not finite" in done.out and "floor: majority class" in done.out
    )
    assert (tiny.benchmarks / "tiny" / "table.md").read_bytes() == before
    assert zoo("bench", "--data", "tiny", "--recipes", "tiny", "--seeds", "1").code == 0


@pytest.mark.slow
def test_compare_scores_and_prints(zoo, trained):
    run = list_runs(trained)[0]
    run.metrics_file("test").unlink()
    done = zoo("compare", "--data", "tiny", "--json")
    assert done.code == 0 and {row["recipe"] for row in done.json["rows"]} == {"tiny", "tiny-lp"}
    assert run.metrics_file("test").is_file()
    done = zoo("compare", *(run.name for run in list_runs(trained)), "--by", "train_s")
    assert done.code == 0 and "tiny-lp" in done.out and "95% CI" in done.out
    assert zoo("compare", "--data", "tiny", "--by", "tset").code == 1


@pytest.mark.parametrize("kind", ["models", "recipes", "datasets", "benchmarks", "runs"])
def test_lists_have_names_and_patterns(zoo, trained, kind):
    rows = zoo("list", kind, "--json").json
    assert rows and all(row["name"] for row in rows)
    first = rows[0]["name"]
    found = zoo("list", kind, first, "--json").json
    assert first in [row["name"] for row in found]
    assert zoo("list", kind, "no-such-thing", "--json").json == []
    assert f"no {kind} here match 'no-such-thing'" in zoo("list", kind, "no-such-thing").out
    shown = zoo("list", kind, first)
    assert shown.code == 0 and first in shown.out.replace("\n", "")


def test_a_damaged_run_is_listed_as_such(zoo, trained):
    run = list_runs(trained)[0]
    (run.path / "run.json").write_text("{")
    rows = {row["name"]: row for row in zoo("list", "runs", "--json").json}
    assert rows[run.name]["status"] == "damaged" and "no valid JSON" in rows[run.name]["reason"]
    assert zoo("compare", "--data", "tiny", "--json").code == 0


@pytest.mark.parametrize("what", ["simple_cnn", "resnet18", "quickstart", "tiny", "digits"])
def test_everything_can_be_shown(zoo, trained, what):
    assert zoo("show", what, "--json").json["kind"] in ("recipe", "benchmark", "dataset", "model")
    assert zoo("show", what).code == 0
    run = list_runs(trained)[0]
    assert zoo("show", run.name, "--json").json["metrics"]["val"]["top1"] == run.metrics("val")["top1"]


def test_data_is_imported_and_split(zoo, root, image_folder):
    done = zoo("data", "import", image_folder, "--name", "mine", "--json")
    assert done.code == 0
    assert {"dataset", "split_digest", "splits"} <= set(done.json)
    for split in ("train", "val", "test"):
        assert {"images", "groups", "classes"} <= set(done.json["splits"][split])
    assert sum(facts["images"] for facts in done.json["splits"].values()) == 36
    again = zoo("data", "split", "mine", "--json").json
    assert again["split_digest"] == done.json["split_digest"]
    other = zoo("data", "split", "mine", "--seed", "3", "--ratios", "0.5,0.25,0.25", "--json").json
    assert other["split_digest"] != done.json["split_digest"] and other["splits"]["val"]["images"] == 9
    assert "all images" in zoo("data", "split", "mine").out


def test_predict_explains_where_it_was_asked(zoo, trained, tmp_path):
    run = next(run.name for run in list_runs(trained))
    folder = load_dataset("tiny", trained).root
    shown = zoo("predict", run, str(folder), "--explain", str(tmp_path / "maps"), "--json")
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert rows and all(Path(row["explanation"]).is_file() for row in rows)
    shown = zoo("predict", run, str(folder), "--explain", str(tmp_path / "maps"))
    assert "where the network looked:" in shown.out
    (tmp_path / "file").write_text("")
    shown = zoo("predict", run, str(folder), "--explain", str(tmp_path / "file"))
    assert shown.code == 1


def test_compare_shows_pairs_and_writes_files(zoo, trained, tmp_path):
    files = [tmp_path / f"t{ending}" for ending in (".md", ".csv", ".json", ".tex")]
    options = [each for file in files for each in ("-o", str(file))]
    shown = zoo("compare", "--data", "tiny", "--pairs", "--metric", "macro_f1", "--margin", "0.5", *options)
    assert shown.code == 0, shown.out
    assert "test macro F1" in shown.out and "one − two" in shown.out and "verdict" in shown.out
    assert all(file.stat().st_size > 200 for file in files) and f"written: {files[0]}" in shown.out
    document = json.loads(files[2].read_text())
    assert document["metric"] == "macro_f1" and len(document["pairs"]) == 1 and document["pairs"][0]["margin"] == 0.5
    for name in ("markdown", "csv", "latex", "json"):
        shown = zoo("compare", "--data", "tiny", "--format", name)
        starts = {"markdown": "# tiny", "csv": "recipe,", "latex": "% needs", "json": "{"}
        assert shown.code == 0 and shown.out.startswith(starts[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "f1"], "metric must be one of top1"),
        (["--by", "speed"], "a table can be sorted by one of"),
        (["--margin", "0"], "a margin of equivalence must be above 0"),
        (["--format", "pdf"], "a format must be one of markdown, csv, json, latex"),
        (["-o", "table.xlsx"], "a comparison is written to a file that ends in"),
        (["-o", "/proc/nothing/t.md"], "cannot write"),
        (["--folds", "--by", "x"], "--folds needs --data N"),
        (["--folds"], "has 0 of any folds"),
    ],
)
def test_compare_says_what_it_cannot_do(zoo, trained, options, said):
    shown = zoo("compare", "--data", "tiny", *options)
    assert shown.code == 1 and said in shown.err and len(shown.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_report_and_plan_from_the_command_line(zoo, trained, tmp_path):
    file = tmp_path / "r.html"
    shown = zoo("report", "--data", "tiny", "-o", str(file), "--json")
    assert json.loads(shown.out) == {"report": str(file), "bytes": file.stat().st_size}
    assert "Shortcut probe" in file.read_text() and "where tiny" in file.read_text()
    shown = zoo("report", "--data", "tiny", "-o", str(file), "--no-explain")
    assert "Shortcut probe" not in file.read_text() and f"report: {file}" in shown.out
    shown = zoo("plan", "--data", "tiny", "--recipes", "tiny,tiny-lp", "--seeds", "2")
    assert "80 % power" in shown.out and "in all about" in shown.out
    answer = json.loads(zoo("plan", "--data", "tiny", "--recipes", "tiny", "--json").out)
    assert {"images", "differences", "seeds", "recipes", "minutes"} <= set(answer)
    wrong = (
        ["report"],
        ["report", "nothing"],
        ["plan", "--data", "none"],
        ["plan", "--data", "tiny", "--recipes", "x"],
    )
    for arguments in wrong:
        shown = zoo(*arguments)
        assert shown.code == 1 and shown.err.startswith("error: "), arguments


def test_predict_prints_one_object_a_line(zoo, trained, tmp_path):
    run = list_runs(trained)[0]
    folder = load_dataset("tiny", trained).root
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    done = zoo("predict", run.name, folder / "normal", bad, "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, len(rows)) == (0, 13)
    keys = {"path", "label", "scores", "prediction_set", "refer", "refer_reason", "operating_points", "error"}
    assert all(set(row) == keys for row in rows)
    assert rows[-1]["error"] and rows[-1]["label"] is None
    assert all(sum(row["scores"].values()) == pytest.approx(1) for row in rows[:-1])
    assert zoo("predict", run.name, bad).code == 1
    assert "bad.png" in zoo("predict", run.name, folder / "normal", bad).out
    for wrong, said in ((["gone.png"], "there is no file or folder"), ([folder, "--device", "gpu"], "device 'gpu'")):
        done = zoo("predict", run.name, *wrong, "--json")
        assert (done.code, done.out) == (1, "") and said in done.err


def test_the_doctor_is_content_here(zoo, root):
    done = zoo("doctor", "--json")
    assert done.code == 0 and done.json["ok"] is True
    assert {"python", "torch", "timm", "home"} <= {check["name"] for check in done.json["checks"]}
    shutil.rmtree(root.root / "models")
    (root.root / "models").write_text("in the way")
    done = zoo("doctor", "--json")
    assert done.code == 1 and not done.json["ok"]


def test_a_home_that_cannot_be_written_is_found_before_work(zoo, tiny):
    shutil.rmtree(tiny.root / "models", ignore_errors=True)
    (tiny.root / "models").write_text("in the way")
    done = zoo("train", "tiny", "--data", "tiny", "--json")
    assert (done.code, done.out) == (1, "") and "cannot write" in done.err
    assert not list((load_dataset("tiny", tiny).folder).glob(".cache/pixels-*"))


# Real processes ---------------------------------------------------------------------------------------------


def start(home, *arguments):
    environment = {**os.environ, "ZOO_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_signals_stop_a_run_that_then_goes_on_to_the_same_bits(tiny):
    changes = ["epochs=400", "patience=400"]
    command = ["train", "tiny", "--data", "tiny", "--json", *(word for each in changes for word in ("--set", each))]
    for sent, code, line in ((signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 6)):
        process = start(tiny, *command)
        history = None
        for _ in range(2400):
            files = list(tiny.runs.glob("*/history.jsonl"))
            history = files[0].read_text().splitlines() if files else []
            if len(history) >= line or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), err
        assert "Traceback" not in err and "goes on where it stopped with the same command" in err
        (folder,) = tiny.runs.iterdir()
        assert not (folder / "run.json").exists()
        assert len((folder / "history.jsonl").read_text().splitlines()) >= line
    # What the checkpoint holds is what a run holds that was never stopped before that step.
    from zoo.training.checkpoint import load_checkpoint
    from zoo.training.plan import make_plan

    recipe = load_recipe("tiny", {"epochs": 400, "patience": 400}, tiny)
    plan = make_plan(recipe, "tiny", 0, tiny)
    progress = load_checkpoint(folder / "checkpoint", plan.digest).progress
    (file,) = (folder / "checkpoint").glob("epoch-*.safetensors")
    found = sha256_file(file)
    folder.rename(folder.with_name("aside"))
    ticks = []

    def stop(tick):
        ticks.append((tick.epoch, tick.done))
        # The last update of an epoch is told twice: before val is scored, and when the epoch is saved.
        place = (progress.epoch + 1, progress.step) if progress.step else (progress.epoch, tick.total)
        if ticks.count(place) == (1 if progress.step else 2):
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        train(recipe, "tiny", 0, tiny, on_tick=stop)
    assert sha256_file(file) == found


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_fault(tiny):
    process = start(tiny, "list", "models", "--json")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (0, "")


@pytest.mark.slow
def test_a_mistake_in_a_real_process_is_one_line(tiny):
    process = start(tiny, "train", "tiny", "--data", "tinny", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: there is no dataset 'tinny'")


# Data: audit, split, show -----------------------------------------------------------------------------------------


@pytest.fixture
def leaking(tmp_path, write_scenes) -> Path:
    folder = write_scenes(
        tmp_path / "leaking",
        {
            f"{split}/{label}": range(first + at, first + at + count)
            for split, count, at in (("train", 9, 0), ("val", 4, 20), ("test", 4, 40))
            for label, first in (("a", 100), ("b", 200))
        },
    )
    shutil.copy(folder / "train/a/00100.png", folder / "test/a/copy.png")
    return folder


@pytest.mark.parametrize("columns", ["80", "120"])
def test_an_audit_says_what_leaks_and_ends_with_1(zoo, leaking, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert "LEAKS" in zoo("data", "import", leaking, "--name", "mine").out
    done = zoo("data", "audit", "mine")
    assert done.code == 1
    for text in ("pairs of the same picture", "leak tax", "a random split", "--repair", "audit.html"):
        assert text in done.out
    lines = [line for line in done.out.splitlines() if not line.startswith("page:")]
    assert max(map(len, lines)) <= int(columns)


def test_an_audit_as_json_has_the_agreed_keys(zoo, leaking):
    zoo("data", "import", leaking, "--name", "mine")
    done = zoo("data", "audit", "mine", "--json")
    assert done.code == 1
    assert set(done.json) >= AUDIT_KEYS
    assert (done.json["ok"], done.json["cross_split_leaks"]) == (False, 1)
    assert {"given", "random", "grouped"} <= set(done.json["leak_tax"])


def test_leaks_are_repaired_and_then_audited_with_0(zoo, leaking):
    zoo("data", "import", leaking, "--name", "mine")
    done = zoo("data", "split", "mine", "--repair")
    assert done.code == 0
    assert "dropped train/a/00100.png: the same picture stands in test: test/a/copy.png" in done.out
    assert zoo("data", "audit", "mine", "--json").code == 0
    again = zoo("data", "split", "mine", "--repair", "--json").json
    assert again["dropped"] == {}
    assert "split_digest" in again
    assert again["splits"]["train"]["images"] == 17


def test_a_folder_is_audited_by_its_path(zoo, leaking, root):
    done = zoo("data", "audit", leaking)
    assert done.code == 1
    assert "import it" in done.out
    assert (root.root / "audit-leaking" / "audit.html").is_file()


@pytest.mark.slow
def test_train_and_bench_refuse_leaks_until_they_are_accepted(zoo, tiny, leaking):
    zoo("data", "import", leaking, "--name", "mine")
    for verb in (("train", "tiny-lp"), ("bench", "--recipes", "tiny-lp", "--seeds", 1)):
        refused = zoo(*verb, "--data", "mine")
        assert refused.code == 1
        assert "leaks" in refused.err
        assert "--accept-leaks" in refused.err
    trained = zoo("train", "tiny-lp", "--data", "mine", "--accept-leaks", "--json")
    assert trained.code == 0
    assert trained.json["leaks_accepted"] is True
    done = zoo("bench", "--data", "mine", "--recipes", "tiny-lp", "--seeds", 1, "--accept-leaks", "--json")
    assert done.code == 0
    assert done.json["leaks_accepted"] is True
    assert zoo("compare", "--data", "mine", "--json").json["leaks_accepted"] is True
    assert "LEAKS ACCEPTED" in zoo("compare", "--data", "mine").out


def test_folds_are_datasets(zoo, root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "p", {"a": range(9), "b": range(20, 29)})
    zoo("data", "import", folder, "--name", "p")
    done = zoo("data", "split", "p", "--folds", 3, "--json")
    assert [each["dataset"] for each in done.json["folds"]] == ["p-fold0", "p-fold1", "p-fold2"]
    refused = zoo("data", "split", "p", "--folds", 3, "--group-blocks", 2)
    assert (refused.code, "--folds goes with --seed alone" in refused.err) == (1, True)


@pytest.mark.slow
def test_show_writes_sheets(zoo, tiny):
    done = zoo("data", "show", "tiny", "--per-class", 3, "--json")
    assert done.code == 0
    assert Path(done.json["files"][0]).name == "index.html"
    assert all(Path(file).is_file() for file in done.json["files"])
    assert zoo("data", "show", "tiny", "--seed", -1).code == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "audit", "nothing"), "there is no dataset 'nothing'"),
        (("data", "audit", "/" + "x" * 300), "dataset name must be"),
        (("data", "show", "iq_othnccd"), "--from FOLDER_OR_ZIP"),
        (("data", "import", "digits", "--from", "x"), "--from goes with a public data set"),
        (("data", "import", "x", "--name", "x", "--window", "lunge"), "did you mean 'lung'"),
        (("data", "import", "torchvision:CIFAR11", "--name", "x"), "did you mean 'CIFAR10'"),
        (("data", "import", "chest_ctscan"), "Kaggle"),
    ],
)
def test_mistakes_with_data_are_one_line(zoo, words, said):
    done = zoo(*words)
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_an_interruption_within_a_string_that_is_run_has_its_exit_code_too(tmp_path):
    """CPython marks an interruption that passes through exec() as uncaught, even where it is caught further out."""
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal, time, zoo.cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stop = 'os.kill(os.getpid(), signal.SIGINT); time.sleep(60)'\n"
        "zoo.cli.app = lambda **_: exec(stop)\n"
        "zoo.cli.main()\n"
    )
    command = [sys.executable, "-m", "stopped"]  # a script would not show it: it leaves by another way
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_import_that_is_stopped_says_so_and_leaves_nothing(tmp_path, write_scenes, number, code):
    folder = write_scenes(tmp_path / "p", {"a": range(300), "b": range(400, 700)})
    command = [sys.executable, "-m", "zoo", "data", "import", str(folder), "--name", "p", "--home", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data").glob(".import-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (code, "interrupted")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_public_data_set_can_be_looked_up_before_it_is_here(zoo):
    shown = zoo("show", "chest_ctscan", "--json").json
    assert shown["status"] == "to import with --from"
    assert "7 classes" in shown["faults"][0]
    listed = {row["name"]: row["status"] for row in zoo("list", "datasets", "--json").json}
    assert listed["iq_othnccd"] == "to import with --from"
