from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zoo.errors import ZooError
from zoo.files import home, sha256_file, to_json
from zoo.recipe import known_keys
from zoo.reporting.writers import WRITERS, check_writers, flat_recipe, open_writers
from zoo.runs import run_lock
from zoo.training.derived import sources
from zoo.training.loop import train_plan
from zoo.training.plan import Plan, make_plan

BOTH = list(WRITERS)
Points = list[tuple[int, float]]


def rows(*epochs: int, loss: float = 1.0) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "phase": "network",
            "lr": 0.1,
            "train_loss": loss / epoch,
            "val_loss": loss,
            "val_top1": 0.5,
            "val_auroc": None if epoch == 1 else float("nan"),
        }
        for epoch in epochs
    ]


def keep(plan: Plan, history: list[dict]) -> None:
    """Write the history that a checkpoint leaves."""
    plan.run.path.mkdir(parents=True, exist_ok=True)
    plan.run.history_file.write_text("".join(f"{to_json(row)}\n" for row in history), encoding="utf-8")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory, _template) -> Path:
    """The database of MLflow before the first run: seconds to make, so it is made once."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copytree(_template, folder / "home")
    root = home(folder / "home")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    open_writers(["mlflow"], make_plan("tiny", "tiny", 7, root)).fail("only the tables were wanted")
    return root.root / "models" / "mlflow" / "mlflow.db"


@pytest.fixture
def plan(tiny, make_recipe, empty_store, monkeypatch) -> Plan:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tiny.root / "models" / "mlflow" / "mlflow.db"
    store.parent.mkdir(parents=True)
    shutil.copy(empty_store, store)
    return make_plan(make_recipe(), "tiny", 0, tiny)


def board(plan: Plan) -> EventAccumulator:
    found = EventAccumulator(str(plan.run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def in_tensorboard(plan: Plan, key: str) -> Points:
    return [(each.step, pytest.approx(each.value)) for each in board(plan).Scalars(key)]


def client(plan: Plan):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{plan.home.root / 'models' / 'mlflow' / 'mlflow.db'}")


def mlflow_runs(plan: Plan) -> list:
    found = client(plan)
    (experiment,) = found.search_experiments(filter_string="name = 'tiny'")
    return found.search_runs([experiment.experiment_id], f"tags.`zoo.run` = '{plan.run.name}'")


def in_mlflow(plan: Plan, key: str) -> Points:
    (run,) = mlflow_runs(plan)
    history = client(plan).get_metric_history(run.info.run_id, key)
    return sorted((each.step, pytest.approx(each.value)) for each in history)


READERS = {"tensorboard": in_tensorboard, "mlflow": in_mlflow}


@pytest.mark.slow
def test_names_that_are_unknown_or_not_installed_are_refused_before_work(plan, monkeypatch):
    assert check_writers(["mlflow", "tensorboard", "mlflow"]) == ["mlflow", "tensorboard"]
    with pytest.raises(
        ZooError, match=r"write to tensorboard, mlflow\. Got 'tensorbord'; did you mean 'tensorboard'\?"
    ):
        open_writers(["tensorbord"], plan)
    monkeypatch.setitem(WRITERS, "mlflow", ("a_package_that_is_not_there",))
    with pytest.raises(
        ZooError, match=r"a_package_that_is_not_there, which is not installed; pip install 'zoo\[mlflow\]'"
    ):
        open_writers(BOTH, plan)
    assert not plan.run.path.exists()
    open_writers([], plan).epoch(rows(1)[0])
    assert not plan.run.path.exists()


def test_each_writers_packages_are_those_of_its_extra():
    import tomllib

    file = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name, packages in WRITERS.items():
        wanted = {each.split(">=")[0].replace("-skinny", "") for each in extras[name]}
        assert wanted == set(packages) and name in extras["dev"][0]


def test_a_recipe_is_flat_and_without_what_is_no_part_of_its_numbers(make_recipe):
    recipe = make_recipe(summary="some words", image_sizes=[32, 48], workers=0, loss__name="focal", gamma=1.5)
    flat = flat_recipe(recipe)
    assert flat["finetune.image_sizes"] == "[32, 48]" and flat["optimizer.lr"] == 3e-3 and flat["loss.gamma"] == 1.5
    assert all(isinstance(value, (str, int, float)) for value in flat.values())
    assert flat.keys() - {"name"} <= {key for key, table in known_keys().items() if table is None}
    assert not flat.keys() & {"summary", "workers", "device", "checkpoint_minutes", "search"}


@pytest.mark.parametrize("name", BOTH)
def test_epochs_are_written_with_their_numbers(plan, name):
    writers = open_writers([name], plan)
    for row in rows(1, 2, 3):
        writers.epoch(row)
        assert READERS[name](plan, "val_loss")[-1] == (row["epoch"], 1.0)  # at once, not at the end
    assert READERS[name](plan, "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    writers.fail("stopped\nhere", interrupted=True)
    keys = board(plan).Tags()["scalars"] if name == "tensorboard" else mlflow_runs(plan)[0].data.metrics
    assert set(keys) == {"lr", "train_loss", "val_loss", "val_top1"}  # what is no number is left out
    assert writers.notes == []


@pytest.mark.parametrize("name", BOTH)
def test_a_resumed_run_goes_on_in_the_same_place_without_gaps_or_twice(plan, name):
    first = open_writers([name], plan)
    for row in rows(1, 2, 3):
        first.epoch(row)
    keep(plan, rows(1, 2))  # killed: epoch 3 was written, but no checkpoint has it
    second = open_writers([name], plan)
    for row in rows(3, 4):
        second.epoch(row)
    second.fail("interrupted", interrupted=True)
    keep(plan, rows(1, 2, 3, 4, 5))  # epoch 5 was trained without the writer
    third = open_writers([name], plan)
    third.epoch(rows(6)[0])
    third.epoch(rows(6)[0])
    expected = [(epoch, 1 / epoch) for epoch in range(1, 7)]
    assert READERS[name](plan, "train_loss") == expected
    assert (first.notes, second.notes, third.notes) == ([], [], [])


@pytest.mark.parametrize("name", BOTH)
def test_a_run_that_starts_again_leaves_no_step_twice(plan, name):
    keep(plan, rows(1, 2, 3))
    writers = open_writers([name], plan)
    for row in rows(1, 2):  # the checkpoint was damaged
        writers.epoch(row)
    steps = [step for step, _ in READERS[name](plan, "train_loss")]
    assert steps == ([1, 2] if name == "tensorboard" else [1, 2, 3])


def test_an_event_file_that_a_crash_cut_off_is_gone_on_from(plan):
    writers = open_writers(["tensorboard"], plan)
    for row in rows(1, 2):
        writers.epoch(row)
    (file,) = (plan.run.path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    keep(plan, rows(1, 2))
    again = open_writers(["tensorboard"], plan)
    again.epoch(rows(3)[0])
    assert in_tensorboard(plan, "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert len(in_tensorboard(plan, "val_top1")) == 3


def test_a_real_run_is_read_back_whole(plan):
    writers = open_writers(BOTH, plan)
    run = train_plan(plan)
    for row in run.history():
        writers.epoch(row)
    writers.finish(run.record, run.metrics("val"))
    assert writers.notes == []
    history, metrics = run.history(), run.metrics("val")
    for name in BOTH:
        for key in ("train_loss", "val_loss", "val_balanced_accuracy", "images_per_s", "lr"):
            assert READERS[name](plan, key) == [(row["epoch"], row[key]) for row in history]
        for key in ("top1", "auroc", "ece", "n"):
            assert READERS[name](plan, f"final_val_{key}") == [(2, metrics[key])]
    said = {
        tag: board(plan).Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board(plan).Tags()["tensors"]
    }
    digest = sha256_file(run.weights_file)
    assert digest in said["weights/text_summary"] and plan.dataset.split_digest in said["run/text_summary"]
    assert "optimizer.lr = 0.003" in said["recipe/text_summary"]
    (kept,) = mlflow_runs(plan)
    assert kept.info.status == "FINISHED" and kept.info.run_name == run.name
    tags = {key: kept.data.tags[key] for key in ("dataset", "split_digest", "seed", "recipe", "weights_sha256")}
    assert tags == {
        "dataset": "tiny",
        "split_digest": plan.dataset.split_digest,
        "seed": "0",
        "recipe": "tiny",
        "weights_sha256": digest,
    }
    assert kept.data.params == {key: str(value) for key, value in flat_recipe(plan.recipe).items()}


def test_hyperparameters_stand_beside_the_val_metrics(plan):
    from tensorboard.plugins.hparams import plugin_data_pb2

    run = train_plan(plan)
    open_writers(["tensorboard"], plan).finish(run.record, run.metrics("val"))
    metadata = board(plan).summary_metadata["_hparams_/session_start_info"]
    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    assert content.session_start_info.hparams["optimizer.lr"].number_value == 3e-3
    assert content.session_start_info.hparams["model.name"].string_value == "simple_cnn"


def test_ends_of_runs_are_told_apart_in_mlflow(plan, make_recipe):
    open_writers(["mlflow"], plan).fail("the loss was not finite")
    (run,) = mlflow_runs(plan)
    assert (run.info.status, run.data.tags["reason"]) == ("FAILED", "the loss was not finite")
    writers = open_writers(["mlflow"], plan)  # mended: the same run goes on
    assert mlflow_runs(plan)[0].info.status == "RUNNING"
    writers.fail("Ctrl-C", interrupted=True)
    assert mlflow_runs(plan)[0].info.status == "KILLED"
    finished = train_plan(plan)
    open_writers(["mlflow"], plan).finish(finished.record, finished.metrics("val"))
    assert [run.info.status for run in mlflow_runs(plan)] == ["FINISHED"]
    shutil.rmtree(plan.run.path)  # thrown away and trained anew: a run of its own
    open_writers(["mlflow"], plan)
    assert sorted(run.info.status for run in mlflow_runs(plan)) == ["FINISHED", "RUNNING"]
    other = make_plan(make_recipe(), "tiny", 1, plan.home)
    open_writers(["mlflow"], other)
    assert len(mlflow_runs(other)) == 1


@pytest.mark.slow
def test_two_processes_may_start_at_once_on_a_home_without_a_store(tiny, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = (
        "import sys\nfrom zoo.reporting.writers import open_writers\nfrom zoo.training.plan import make_plan\n"
        "writers = open_writers(['mlflow'], make_plan('tiny', 'tiny', int(sys.argv[1])))\n"
        "writers.epoch({'epoch': 1, 'train_loss': 0.5})\nassert not writers.notes, writers.notes\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(seed)], stderr=subprocess.PIPE) for seed in (0, 1)]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
        assert b"INFO" not in said
    for seed in (0, 1):
        assert in_mlflow(make_plan("tiny", "tiny", seed, tiny), "train_loss") == [(1, 0.5)]


def test_a_store_elsewhere_is_the_users_choice(plan, tmp_path, monkeypatch):
    elsewhere = tmp_path / "a place of my own" / "肺.db"
    elsewhere.parent.mkdir()
    shutil.copy(plan.home.root / "models" / "mlflow" / "mlflow.db", elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}")
    open_writers(["mlflow"], plan).epoch(rows(1)[0])
    from mlflow.tracking import MlflowClient

    there = MlflowClient(tracking_uri=f"sqlite:///{elsewhere}")
    found = [run for each in there.search_experiments() for run in there.search_runs([each.experiment_id])]
    assert plan.run.name in [run.info.run_name for run in found]
    assert mlflow_runs(plan) == []


def test_stores_that_cannot_be_opened_are_said_before_work(plan, monkeypatch):
    store = plan.home.root / "models" / "mlflow" / "mlflow.db"
    experiment = client(plan).get_experiment_by_name("tiny")
    client(plan).delete_experiment(experiment.experiment_id)
    with pytest.raises(ZooError, match=r"'tiny' .* was deleted; restore it"):
        open_writers(["mlflow"], plan)
    damaged = store.with_name("damaged.db")
    damaged.write_bytes(b"no database at all, " * 400)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{damaged}")
    monkeypatch.setenv("MLFLOW_MAX_DB_CONNECT_RETRIES", "1")
    with pytest.raises(ZooError, match=r"mlflow cannot be opened: .*not a database"):
        open_writers(["mlflow"], plan)
    plan.run.path.mkdir(parents=True)
    (plan.run.path / "tensorboard").write_text("a file in its place")
    with pytest.raises(ZooError, match="tensorboard cannot be opened: "):
        open_writers(["tensorboard"], plan)


def test_what_goes_wrong_in_training_ends_the_writer_and_not_the_run(plan):
    notes: list[str] = []
    writers = open_writers(BOTH, plan, notes.append)
    writers.epoch(rows(1)[0])
    client(plan).delete_run(mlflow_runs(plan)[0].info.run_id)  # by hand, in mid-run
    for row in rows(2, 3):
        writers.epoch(row)
    writers.fail("stopped")
    assert notes == writers.notes and len(notes) == 1 and notes[0].startswith("nothing more is written to mlflow: ")
    assert [step for step, _ in in_tensorboard(plan, "train_loss")] == [1, 2, 3]


def test_a_full_disk_ends_the_writer_and_not_the_run(plan, full_disk, monkeypatch):
    # TensorBoard writes in a thread, which dies of it; pytest would report that in whatever test it is heard of.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    before = set(threading.enumerate())
    (plan.home.root / "models" / "runs").mkdir(parents=True, exist_ok=True)
    plan.run.path.symlink_to(full_disk)
    writers = open_writers(["tensorboard"], plan)
    writers.epoch(rows(1)[0])
    with pytest.raises(OSError, match="No space"), (full_disk / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(512))
    for epoch in range(2, 200):
        writers.epoch(rows(epoch)[0])
    assert len(writers.notes) == 1 and "No space left" in writers.notes[0]
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert not any(thread.is_alive() for thread in set(threading.enumerate()) - before)


def train_at_the_prompt(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo", "train", "tiny", "--data", "tiny", "--offline", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def soup_of_two(plan: Plan, **more) -> tuple[dict, list[str]]:
    """Return what makes the recipe a soup of two seeds, from weights in a file, and that as words of a command."""
    start = str(plan.home.root / "start.safetensors")
    save_file(plan.model()[0].state_dict(), start)
    changes = {"average.seeds": 2, "model.weights": start, "model.image_size": 32, **more}
    return changes, [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_each_run_that_a_soup_is_made_of_has_writers_of_its_own(plan, make_recipe):
    changes, settings = soup_of_two(plan)
    made = train_at_the_prompt(*settings, "--log", "tensorboard", "--log", "mlflow", "--watch")
    assert made.returncode == 0, made.stderr
    soup = make_plan(make_recipe(**changes), "tiny", 0, plan.home)
    epochs = plan.recipe.finetune.epochs
    for each in sources(soup):
        assert [step for step, _ in in_tensorboard(each, "train_loss")] == list(range(1, epochs + 1))
        assert [step for step, _ in in_mlflow(each, "train_loss")] == list(range(1, epochs + 1))
        assert (each.run.path / "loss.png").is_file()
    assert [run.info.status for run in mlflow_runs(soup)] == ["FINISHED"]


@pytest.mark.slow
def test_a_soup_of_two_processes_is_told_of_too(plan, make_recipe):
    changes, settings = soup_of_two(plan, epochs=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zoo"]
    command = ["train", "tiny", "--data", "tiny", "--offline", *settings, "--log-to", "tensorboard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    soup = make_plan(make_recipe(**changes), "tiny", 0, plan.home)
    assert [in_tensorboard(each, "train_loss")[0][0] for each in sources(soup)] == [1, 1]


@pytest.mark.slow
def test_a_soup_whose_seed_fails_is_a_failed_run_that_says_why(plan, make_recipe):
    changes, settings = soup_of_two(plan, lr=1e30)
    failed = train_at_the_prompt(*settings, "--log", "mlflow", "--watch")
    assert failed.returncode == 1 and "the loss was not finite" in failed.stderr
    soup = make_plan(make_recipe(**changes), "tiny", 0, plan.home)
    assert soup.run.record.status == "failed" and "the loss was not finite" in soup.run.record.reason
    assert [run.info.status for run in mlflow_runs(sources(soup)[0])] == ["FAILED"]


@pytest.mark.slow
def test_who_finds_a_run_in_progress_leaves_what_is_written_of_it_alone(plan):
    writers = open_writers(["mlflow"], plan)
    with run_lock(plan.home, plan.run.name):
        done = train_at_the_prompt("--log", "mlflow", "--log", "tensorboard")
        assert done.returncode == 1 and "is being trained by process" in done.stderr
        (run,) = mlflow_runs(plan)
        assert run.info.status == "RUNNING" and "reason" not in run.data.tags
        assert not (plan.run.path / "tensorboard").exists()
    writers.fail("stopped", interrupted=True)
    done = train_at_the_prompt("--log", "mlflow", "--log", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert [run.info.status for run in mlflow_runs(plan)] == ["FINISHED"]
    history = plan.run.history()
    for name in BOTH:
        assert READERS[name](plan, "train_loss") == [(row["epoch"], row["train_loss"]) for row in history]


@pytest.mark.slow
def test_a_store_that_cannot_be_opened_is_no_failure_of_the_run(plan, monkeypatch):
    damaged = plan.home.root / "damaged.db"
    damaged.write_bytes(b"no database at all, " * 400)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{damaged}")
    monkeypatch.setenv("MLFLOW_MAX_DB_CONNECT_RETRIES", "1")
    done = train_at_the_prompt("--log", "mlflow")
    assert done.returncode == 1 and done.stderr.startswith("error: mlflow cannot be opened: "), done.stderr
    assert not (plan.run.path / "run.json").exists()


SPY = """
import os, socket, sys
asked = []
def refuse(*arguments, **_):
    asked.append(repr(arguments))
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = refuse
"""


def spied(code: str, folder: Path) -> str:
    """Run code with every connection refused and noted, in an environment that no tool takes for a test's."""
    hidden = ("CI", "PYTEST", "MLFLOW", "DO_NOT_TRACK", "GITHUB", "GITLAB", "JENKINS", "TF_BUILD", "BUILDKITE")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    clean |= {"HOME": str(folder), "ZOO_HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", SPY + code],
        env=clean,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_writing_opens_no_connection(plan):
    code = (
        "from zoo.reporting.writers import open_writers\nfrom zoo.training.plan import make_plan\n"
        "from zoo.training.loop import train_plan\nimport threading\n"
        "plan = make_plan('tiny', 'tiny', 0)\nwriters = open_writers(['tensorboard', 'mlflow'], plan)\n"
        "run = train_plan(plan)\nfor row in run.history(): writers.epoch(row)\n"
        "writers.finish(run.record, run.metrics('val'))\nassert not writers.notes, writers.notes\n"
        "from mlflow.telemetry.client import get_telemetry_client\nassert get_telemetry_client() is None\n"
        "import atexit\natexit._run_exitfuncs()\nprint(asked)\n"
    )
    assert spied(code, plan.home.root).splitlines()[-1] == "[]"
