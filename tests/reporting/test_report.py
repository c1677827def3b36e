from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from drawn_runs import FLOORS, make_run, record
from PIL import Image

from zoo.evaluation.calibration import calibration_report
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.files import write_json, write_text
from zoo.reporting import curves
from zoo.reporting.blocks import Material
from zoo.reporting.comparison import make_comparison
from zoo.reporting.findings import findings, listed
from zoo.reporting.plots import save_figure
from zoo.reporting.report import report_page
from zoo.reporting.tables import FORMATS

EVIL = ["<img src=x onerror=alert(1)>", "=HYPERLINK(1)", "{{7*7}}"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def several(root, **changes):
    return [
        make_run(root, name, seed, right, **changes)
        for name, right in (("weak", 0.35), ("good", 0.9), ("better", 0.95))
        for seed in (0, 1)
    ]


def material(root, runs, **changes):
    comparison = make_comparison(runs, floors=FLOORS, **changes)
    by_recipe = {row["recipe"]: [run for run in runs if run.record.recipe == row["recipe"]] for row in comparison.rows}
    return Material(comparison, by_recipe)


class Text(HTMLParser):
    """What a page shows, and every attribute that could ask for something."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.links, self.hidden = [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "data", "srcset")]
        self.hidden += tag in ("style", "title")
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "title")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# Findings -------------------------------------------------------------------------------------------------------------


def test_the_findings_name_ties_winners_and_floors(root):
    said = findings(make_comparison(several(root), floors=FLOORS))
    assert re.match(
        r"(better and good|good and better) are not told apart; the best mean has better, test top1", said[0]
    )
    assert re.fullmatch(r"Both beat weak by \d+ to \d+ points\.", said[1])
    assert "Only" in said[2] and "above every floor" in said[2] and "majority class (0.400)" in said[2]
    assert re.match(r"Differences between two recipes are known to about ±\d+ points", said[3])


def test_one_recipe_no_score_and_no_difference(root):
    one = make_run(root, "alone")
    assert findings(make_comparison([one]))[0].startswith("alone: test top1 0.")
    failed = record("broken", status="failed", reason="no")
    assert findings(make_comparison([failed])) == ["No recipe has a score on test."]
    assert findings(make_comparison([one, failed]))[-1] == "Failed, in full or in part: broken."
    twin = make_run(root, "twinn", right=0.8)
    assert "Nothing is told apart" in findings(make_comparison([one, twin]))[0]
    assert findings(make_comparison([one, twin], leaks_accepted=True))[0].startswith("LEAKS ACCEPTED")
    assert listed(["a\nb"]) == "a b"


def test_a_winner_alone_and_what_is_equivalent(root):
    runs = [make_run(root, name, 0, right, n=300) for name, right in (("poor", 0.4), ("best", 0.98))]
    said = findings(make_comparison(runs, floors=FLOORS))
    assert said[0].startswith("best is better than every other recipe") and re.match(r"best beats poor by \d+", said[1])
    twins = [make_run(root, name, 0, 0.97, n=300) for name in ("one", "two")]
    assert "Shown to be equivalent within 20 points" in " ".join(findings(make_comparison(twins, margin=0.2)))


# The page -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_has_every_part_and_asks_for_nothing(root):
    page = report_page(material(root, several(root)))
    shown = Text(page)
    parts = ("Table", "Pairs", "Split", "Score against cost", "Learning curves", "Classes", "ROC and precision-recall")
    parts += ("Calibration", "Sets and referral", "Errors", "Hardest images", "Seeds and recipes", "Environment")
    for part in parts:
        assert part in shown.text, part
    assert "script" not in shown.tags and "link" not in shown.tags and "iframe" not in shown.tags
    assert all(link.startswith(("data:image/", "#")) for link in shown.links)
    anchors = re.findall(r'<h2 id="([^"]+)"', page)
    assert {link[1:] for link in shown.links if link.startswith("#")} == set(anchors)
    assert "default-src 'none'" in page and not re.search(r"https?://|@import", page)
    assert "This test split was scored 6 times, for 3 recipes" in shown.text
    assert all(alt for alt in re.findall(r'<img class="chart"[^>]*alt="([^"]*)"', page))


@pytest.mark.slow
def test_the_numbers_of_the_page_are_those_of_the_statistics(root):
    runs = several(root)
    made = material(root, runs)
    text = Text(report_page(made)).text
    best = made.runs[made.comparison.relative_to][0]
    val, test = (read_predictions(best.predictions_file(split)) for split in ("val", "test"))
    found = calibration_report(val, test, best.record.classes)
    assert f"{found['after']['ece']:.3f} [{found['after']['ece_ci'][0]:.3f}" in text
    assert f"{found['conformal']['lac']['coverage']:.3f} [" in text
    row = next(row for row in made.comparison.rows if row["recipe"] == "weak")
    assert f"{row['test_top1_ci'][0]:.3f}–{row['test_top1_ci'][1]:.3f}" in text
    wrong = np.mean(
        [
            [read_predictions(run.predictions_file("test")).y_pred != test.y_true for run in each]
            for each in made.runs.values()
        ],
        axis=1,
    )
    assert f"{int((wrong >= 0.5).all(axis=0).sum())} of 60 test images are missed by every recipe" in text


@pytest.mark.slow
def test_strangers_words_are_shown_as_text(root):
    runs = several(root, classes=EVIL)
    write_text(runs[0].path / "recipe.toml", 'summary = "</pre><script>alert(1)</script>"\n')
    page = report_page(material(root, runs))
    shown = Text(page)
    assert all(name in shown.text for name in EVIL)
    assert "script" not in shown.tags and shown.tags.count("img") == len(re.findall(r'<img [^>]*src="data:', page))
    assert "</pre><script>alert(1)</script>" in shown.text
    assert "49" not in [word for word in shown.words if word.strip() == "49"]


@pytest.mark.slow
def test_two_classes_have_operating_points_and_sensitivity(root):
    runs = several(root, classes=["healthy", "ill"], negative_class="healthy")
    text = Text(report_page(material(root, runs))).text
    assert "specificity ≥ 0.95 on val" in text and "sensitivity on test" in text


@pytest.mark.slow
def test_many_classes_show_those_with_the_lowest_recall(root):
    classes = [f"class {i:02}" for i in range(50)]
    runs = [make_run(root, "many", n=300, classes=classes)]
    text = Text(report_page(material(root, runs))).text
    assert "The 40 classes with the lowest recall of many." in text


@pytest.mark.slow
def test_failures_and_a_run_without_val_leave_no_gap(root):
    runs = [make_run(root, "a", splits=("test",)), make_run(root, "b")]
    comparison = make_comparison([*runs, record("c", status="failed", reason="<b>broke</b>")], floors=FLOORS)
    page = report_page(Material(comparison, {"a": runs[:1], "b": runs[1:], "c": []}))
    assert "failed: c: <b>broke</b>" in Text(page).text
    nothing = make_comparison([record("c", status="failed", reason="no")])
    assert "No recipe has a score on test." in Text(report_page(Material(nothing, {"c": []}))).text


ODD = {
    "one class in test": lambda p: (np.zeros_like(p.y_true), p.logits, p.groups),
    "one group": lambda p: (p.y_true, p.logits, np.full(len(p.y_true), "g")),
    "all right": lambda p: (p.y_true, 5 * np.eye(p.logits.shape[1])[p.y_true], p.groups),
    "all wrong": lambda p: (p.y_true, -5 * np.eye(p.logits.shape[1])[p.y_true], p.groups),
    "no opinion": lambda p: (p.y_true, np.zeros_like(p.logits), p.groups),
    "huge logits": lambda p: (p.y_true, p.logits * 1e30, p.groups),
    "a class of one": lambda p: (np.where(np.arange(len(p.y_true)) < 58, 0, p.y_true), p.logits, p.groups),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("classes", [["healthy", "ill"], ["a", "b", "c"]], ids=["two", "three"])
def test_odd_predictions_have_a_table_and_a_page(root, name, classes):
    runs = []
    for recipe, right in (("a", 0.6), ("b", 0.8)):
        run = make_run(root, recipe, 0, right, classes=classes)
        for split in ("val", "test"):
            found = read_predictions(run.predictions_file(split))
            y_true, logits, groups = ODD[name](found)
            found = Predictions(found.sample_ids, groups, y_true, logits)
            write_predictions(run.predictions_file(split), found)
            write_json(run.metrics_file(split), compute_metrics(found, classes))
        runs.append(run)
    for metric in ("top1", "auroc"):
        made = material(root, runs, metric=metric)
        assert "nan" not in " ".join(findings(made.comparison)).split()
        for write in FORMATS.values():
            assert "nan" not in write(made.comparison).lower().replace("nance", "")
    assert "Calibration" in report_page(made)


# Figures --------------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_scikit_learn(root):
    from sklearn.metrics import precision_recall_curve, roc_curve

    run = read_predictions(make_run(root, right=0.7, n=200).predictions_file("test"))
    ones = np.ones(200)
    grid = np.linspace(0, 1, 101)
    false, true, _ = roc_curve(run.y_true == 1, run.y_score[:, 1], drop_intermediate=False)
    assert curves._curve(run, [1], ones, "roc") == pytest.approx(np.interp(grid, false, true), abs=1e-9)
    precision, recall, _ = precision_recall_curve(run.y_true == 1, run.y_score[:, 1])
    expected = [max(precision[recall >= at - 1e-12][-1:], default=0) for at in grid]
    found = curves._curve(run, [1], ones, "pr")
    assert np.mean(np.abs(found - expected) < 1e-9) > 0.97


@pytest.mark.parametrize("names", [["a"], ["$x$", "<b>", "y" * 200, "肺"], [f"recipe-{i}" for i in range(17)]])
def test_figures_of_one_hostile_and_many_names_are_drawn(root, tmp_path, names):
    runs = {
        name: [read_predictions(make_run(root, f"r{i}", i, 0.6).predictions_file("test"))]
        for i, name in enumerate(names)
    }
    missed = {name: run.y_pred != run.y_true for name, (run,) in runs.items()}
    first = {name: each[0] for name, each in runs.items()}
    reports = {name: calibration_report(run, run, ["a", "b", "c"]) for name, run in list(first.items())[:4]}
    drawn = [
        curves.plot_roc_pr(dict(list(runs.items())[:4]), None, "roc"),
        curves.plot_reliability(reports),
        curves.plot_risk_coverage(first, {name: each["refer"] for name, each in reports.items()}),
        curves.plot_error_overlap(missed),
    ]
    for figure in drawn:
        save_figure(figure, tmp_path / "figure.png")  # `draw` of a bare canvas does nothing
        assert (np.asarray(Image.open(tmp_path / "figure.png").convert("L")) < 255).sum() > 1000


def test_without_anything_to_draw_a_figure_says_so():
    for figure in (
        curves.plot_differences([], "a"),
        curves.plot_pareto([], "top1"),
        curves.plot_reliability({}),
        curves.plot_roc_pr({}, None, "roc"),
        curves.plot_risk_coverage({}, {}),
        curves.plot_error_overlap({"a": np.zeros(3, bool)}),
    ):
        assert figure.texts and figure.texts[0].get_text().startswith("no ")


def test_the_front_holds_what_nothing_cheaper_equals():
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (5, 0.95)]
    assert curves._front(points) == [(1, 0.5), (2, 0.7), (3, 0.9), (5, 0.95)]


# In a real browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_hostile_names_are_text_and_nothing_runs(root, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(report_page(material(root, several(root, classes=EVIL))))
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}"]
    dom = subprocess.run([*base, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = Text(dom.stdout)
    assert all(name in shown.text for name in EVIL)
    assert all(link.startswith(("data:image/", "#")) for link in shown.links)
    picture = tmp_path / "page.png"
    subprocess.run(
        [*base, "--window-size=390,3000", f"--screenshot={picture}", file.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert pixels.shape == (3000, 390) and pixels.std() > 10  # not blank
    assert (pixels[:, -3:] == pixels[0, -1]).mean() > 0.95  # nothing runs over the edge of a phone
