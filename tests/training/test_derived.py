from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import Interrupted, ZooError
from zoo.evaluation.predictions import read_predictions
from zoo.files import sha256_file
from zoo.runs import Run, RunHeld, find_run, list_runs, run_lock
from zoo.training import derived
from zoo.training.derived import sources
from zoo.training.loop import train, train_plan
from zoo.training.plan import make_plan
from zoo.training.scoring import evaluate


def test_views_are_a_run_of_their_own_that_shares_the_weights(tiny, make_recipe):
    plain = train(make_recipe("net"), "tiny", 0, tiny)
    ticks = []
    viewed = train(make_recipe("net-tta", tta="flip"), "tiny", 0, tiny, on_tick=lambda tick: ticks.append(tick.phase))
    assert set(ticks) == {"deriving"}  # nothing was trained again
    assert viewed.name != plain.name and viewed.record.recipe_digest != plain.record.recipe_digest
    assert sha256_file(viewed.weights_file) == sha256_file(plain.weights_file)
    assert (viewed.record.tta, viewed.record.made_of, viewed.record.recipe) == ("flip", [plain.name], "net-tta")
    one, two = (read_predictions(run.predictions_file("val")) for run in (plain, viewed))
    assert not np.allclose(one.logits, two.logits)
    assert {run.name for run in list_runs(tiny)} == {plain.name, viewed.name}
    before = evaluate(viewed, "test", tiny)
    viewed.predictions_file("test").unlink()
    assert evaluate(viewed, "test", tiny) == before
    evaluate(plain, "test", tiny)
    assert not np.allclose(
        read_predictions(viewed.predictions_file("test")).logits,
        read_predictions(plain.predictions_file("test")).logits,
    )


def test_views_alone_train_the_plain_run_too(tiny, make_recipe):
    viewed = train(make_recipe("net-tta", tta="crops", strategy="linear-probe", policy="none"), "tiny", 0, tiny)
    (plain,) = (find_run(name, tiny) for name in viewed.record.made_of)
    assert plain.record.recipe == "net" and plain.record.status == "finished"
    other = train(make_recipe("odd", tta="flip"), "tiny", 0, tiny)
    assert find_run(other.record.made_of[0], tiny).record.recipe == "odd-plain"


def test_a_soup_of_seeds_is_no_worse_on_val_than_the_best_of_them(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    recipe = make_recipe("net-soup", weights=source.name, image_size=32, epochs=1, **{"average.seeds": 3})
    soup = train(recipe, "tiny", 1, trained)
    made = [run for run in list_runs(trained) if run.record.recipe == "net"]
    assert sorted(run.record.seed for run in made) == [3, 4, 5]
    assert soup.record.seed == 1 and set(soup.record.made_of) <= {run.name for run in made}
    metric = recipe.finetune.metric
    assert soup.metrics("val")[metric] >= max(run.metrics("val")[metric] for run in made)
    assert soup.record.train_s == pytest.approx(sum(run.record.train_s for run in made), abs=0.01)
    state = load_file(soup.weights_file)
    parts = [load_file(find_run(name, trained).weights_file) for name in soup.record.made_of]
    torch.testing.assert_close(state["fc.weight"], torch.stack([part["fc.weight"] for part in parts]).mean(0))
    assert 0 <= evaluate(soup, "test", trained)["top1"] <= 1
    # What is stored is what was scored.
    before = soup.metrics("val")
    soup.metrics_file("val").unlink()
    assert evaluate(soup, "val", trained)["log_loss"] == pytest.approx(before["log_loss"], rel=1e-4)


def test_a_soup_of_probes_shares_their_backbone(trained, make_recipe):
    source = next(run for run in list_runs(trained) if "--tiny--s0" in run.name)
    more = {"strategy": "linear-probe", "policy": "none", "weights": source.name, "image_size": 32}
    soup = train(make_recipe("probe-soup", **more, **{"average.seeds": 2}), "tiny", 0, trained)
    before, after = load_file(source.weights_file), load_file(soup.weights_file)
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("fc."))


@pytest.mark.parametrize("method", ["swa", "soup"])
def test_an_average_of_epochs_is_kept_where_val_likes_it_and_survives_interruption(tiny, make_recipe, method):
    recipes = {
        name: make_recipe(name, epochs=4, **{"average.method": method, "average.last_epochs": 3})
        for name in ("whole", "broken")
    }
    whole = train(recipes["whole"], "tiny", 0, tiny)
    (note,) = whole.record.notes
    assert note.startswith(f"{method} of epochs ")
    best = max(row["val_balanced_accuracy"] for row in whole.history())
    value = whole.metrics("val")["balanced_accuracy"]
    assert value >= best
    assert ("kept in place of epoch" in note) == (
        float(note.split(": val balanced_accuracy ")[1][:6]) >= round(best, 4)
    )

    def stop(tick):
        if tick.epoch == 4 and tick.phase == "network":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(recipes["broken"], "tiny", 0, tiny, on_tick=stop)
    folder = make_plan(recipes["broken"], "tiny", 0, tiny).run.path / "checkpoint"
    assert len(list(folder.glob("average-*"))) == 3
    broken = train(recipes["broken"], "tiny", 0, tiny)
    assert sha256_file(broken.weights_file) == sha256_file(whole.weights_file)
    assert broken.predictions_file("val").read_bytes() == whole.predictions_file("val").read_bytes()
    assert not folder.exists()


def test_a_source_that_fails_is_the_reason(tiny, make_recipe):
    recipe = make_recipe("wild-tta", tta="flip", lr=1e30, policy="none")
    with pytest.raises(ZooError, match="not finite"):
        train(recipe, "tiny", 0, tiny)
    records = {run.record.recipe: run.record for run in list_runs(tiny)}
    assert {name: record.status for name, record in records.items()} == {"wild": "failed", "wild-tta": "failed"}
    assert "not finite" in records["wild-tta"].reason


def test_a_run_whose_source_another_process_trains_has_not_failed(tiny, make_recipe):
    plan = make_plan(make_recipe("net-tta", tta="flip"), "tiny", 0, tiny)
    source = sources(plan)[-1].run.name
    with run_lock(tiny, source), pytest.raises(RunHeld, match=f"run '{source}' is being trained by process"):
        train_plan(plan)
    assert not (plan.run.path / "run.json").exists()
    assert train_plan(plan).finished


def test_a_copy_that_a_full_disk_or_a_lost_file_breaks_is_said_and_leaves_no_part(tiny, make_recipe, full_disk):
    source = train(make_recipe("net"), "tiny", 0, tiny)
    run = Run(full_disk / "run")
    (full_disk / "filler").write_bytes(bytes((1 << 20) - 64 * 1024))
    with pytest.raises(ZooError, match=r"cannot write .*: No space left on device; free space"):
        derived._copy(source, run)
    assert not [each.name for each in run.path.iterdir() if each.name.startswith(".")]
    source.history_file.unlink()
    with pytest.raises(ZooError, match=r"history.jsonl of run .* cannot be read: .*; train it again"):
        derived._copy(source, Run(tiny.runs / "run"))


@pytest.mark.slow
def test_a_copy_that_a_kill_cut_off_is_removed_when_the_run_is_made(tiny, make_recipe):
    recipe = make_recipe("net-tta", tta="flip")
    plan = make_plan(recipe, "tiny", 0, tiny)
    code = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "from zoo.runs import Run\n"
        "from zoo.training.derived import _copy\n"
        "shutil.copyfileobj = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "_copy(*(Run(Path(each)) for each in sys.argv[1:]))\n"
    )
    source = train_plan(sources(plan)[0])
    done = subprocess.run([sys.executable, "-c", code, str(source.path), str(plan.run.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [each.name[:9] for each in plan.run.path.iterdir()] == [".weights."]
    assert train_plan(plan).finished
    assert not [each.name for each in plan.run.path.iterdir() if each.name.startswith(".")]
