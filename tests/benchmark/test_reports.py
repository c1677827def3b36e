from __future__ import annotations

import shutil

import pytest
from drawn_runs import make_run, record

from zoo.benchmark.comparisons import score_missing
from zoo.benchmark.reports import report
from zoo.data.manifest import load_dataset
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.reporting.comparison import make_comparison
from zoo.runs import list_runs


@pytest.mark.slow
def test_a_report_of_a_dataset_and_of_named_runs(trained, tmp_path):
    score_missing([], data="tiny", root=trained)
    file = report(data="tiny", root=trained)
    assert file == trained.benchmarks / "tiny" / "all-runs.html"
    page = file.read_text()
    assert "Audit: no copy, near-copy or group lies across" in page
    assert load_dataset("tiny", trained).split_digest in page
    assert "data:image/jpeg" in page
    names = [run.name for run in list_runs(trained)]
    again = report(runs=names, root=trained, output=tmp_path / "own.html")
    assert again == tmp_path / "own.html" and again.read_text() == page


@pytest.mark.slow
def test_a_benchmark_s_report_has_its_failures_as_rows(trained):
    score_missing([], data="tiny", root=trained)
    runs = list_runs(trained)
    failed = record("lost", status="failed", reason="no such weights").model_copy(
        update={key: getattr(runs[0].record, key) for key in ("dataset", "split_digest", "classes")}
    )
    (trained.root / "benchmarks").mkdir(exist_ok=True)
    (trained.benchmarks / "own.toml").write_text('dataset = "tiny"\nrecipes = ["tiny", "tiny-lp", "lost"]\n')
    write_json(trained.benchmarks / "own" / "table.json", make_comparison([*runs, failed]).document())
    page = report("own", root=trained).read_text()
    assert "failed: lost: no such weights" in page and "Failed, in full or in part: lost." in page


def test_what_no_report_can_be_made_of_is_said(root, tmp_path):
    with pytest.raises(ZooError, match=r"a report is of a benchmark, or of --data N"):
        report(root=root)
    with pytest.raises(ZooError, match="unknown benchmark 'quickstrat'; did you mean 'quickstart'"):
        report("quickstrat", root=root)
    with pytest.raises(ZooError, match="benchmark 'quickstart' has no table yet; run it with `zoo bench quickstart`"):
        report("quickstart", root=root)
    make_run(root)
    with pytest.raises(ZooError, match=r"ends in \.html\. Got '.*x\.pdf'"):
        report(runs=["tiny--cnn--s0--0"], root=root, output=tmp_path / "x.pdf")
    with pytest.raises(ZooError, match="there is no run"):
        report(runs=["nothing"], root=root)


def test_a_table_whose_runs_are_gone_is_refused(root):
    run = make_run(root)
    write_json(root.benchmarks / "quickstart" / "table.json", make_comparison([run]).document())
    shutil.rmtree(run.path)
    with pytest.raises(ZooError, match=f"run '{run.name}' of the table is gone; run `zoo bench quickstart` again"):
        report("quickstart", root=root)


def test_a_full_disk_is_said_before_the_work(trained, full_disk):
    score_missing([], data="tiny", root=trained)
    with pytest.raises(ZooError, match="No space left"):
        report(data="tiny", root=trained, output=full_disk / "report.html")
