"""What a model card says of a run and its artefact: plain numbers and texts, gathered once, at the export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CardFacts:
    """All that a card says beyond `bundle.json`; no sample, file or group is named in it.

    Scores are fractions in [0, 1] with intervals of 95 % `[low, high]`; what is not known is None or empty. Texts are
    as the dataset's author wrote them, and are to be shown as foreign.

    - dataset: name. summary, licence, source, note: of `dataset.toml`. faults: what is known to be wrong with the data.
    - medical: the dataset says so. classes: in the order of the outputs. negative_class: that of the healthy.
    - splits: split to `images`, `groups`, `classes` (name to images). group_rule: what a group stands for, in words.
    - audit_ok: whether no leak between the splits is found now; None where the images are not there to be looked at.
      leaks: what leaks, in sentences. leaks_accepted: the run was trained in spite of them.
    - images_skipped: split to how many images were left out as unreadable.
    - floors: `name`, and for each of FLOOR_METRICS `val_<metric>` and `val_<metric>_ci`. floors_test: the same of test,
      `test_<metric>`, empty where the run was not scored on test.
    - val: the artefact's scores: `n`, `n_groups`, each metric of METRIC_SIGN (None where undefined) and `<metric>_ci`,
      `per_class` (name to precision, recall, f1, support), `confusion_matrix`. test: the same of the trained run, in
      its own number format, where it was scored; else None.
    - groups_val, groups_test: how top1 spreads over groups: `groups`, `worst`, `q25`, `median`, `q75`, `best`,
      `below_half` (share of the groups with a top1 under 0.5); None where no group has more than one image.
    - calibration: `temperature`, then of val `ece_before`, `ece_after` (fitted on it, hence favourable),
      `log_loss_before`, `log_loss_after`, `reliability_before`, `reliability_after` (bars of
      `zoo.evaluation.calibration_error.reliability`); `test`: the same keys of the run's test logits, or None.
    - rules_on_val: `set_coverage`, `mean_set_size`, `answered` (share not referred), `error_answered`: of val, on which
      the rules were chosen.
    - weights_licence: as the registry states it. training: `recipe`, `strategy`, `epochs`, `best_epoch`, `train_s`,
      `device`, `precision`, `params`, `params_trained`, `made_of`, `notes`, `weights` (what training began from).
    - versions: package to version, of training. exporter: as in `bundle.json`.
    - looks_at_test: how often any run was scored on this test split, None where the ledger does not say.
    - intended_use, limits: sentences.
    """

    dataset: str
    classes: list[str]
    summary: str = ""
    licence: str = ""
    source: str = ""
    note: str = ""
    faults: list[str] = field(default_factory=list)
    medical: bool = False
    negative_class: str | None = None
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    group_rule: str = ""
    audit_ok: bool | None = None
    leaks: list[str] = field(default_factory=list)
    leaks_accepted: bool = False
    images_skipped: dict[str, int] = field(default_factory=dict)
    floors: list[dict[str, Any]] = field(default_factory=list)
    floors_test: list[dict[str, Any]] = field(default_factory=list)
    val: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] | None = None
    groups_val: dict[str, Any] | None = None
    groups_test: dict[str, Any] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    rules_on_val: dict[str, Any] = field(default_factory=dict)
    weights_licence: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exporter: dict[str, Any] = field(default_factory=dict)
    looks_at_test: int | None = None
    intended_use: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
