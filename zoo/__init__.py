"""Fine-tune and compare pretrained image backbones, with tables that can be believed.

Everything that a user needs is here; `import zoo` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "Home": "zoo.files",
    "Predictor": "zoo.deployment.predictor",
    "Recipe": "zoo.recipe",
    "Run": "zoo.runs",
    "ZooError": "zoo.errors",
    "audit_dataset": "zoo.reporting.audit",
    "bench": "zoo.benchmark.suite",
    "bench_all": "zoo.benchmark.contrasts",
    "compare": "zoo.benchmark.comparisons",
    "create_model": "zoo.models.registry",
    "evaluate": "zoo.training.scoring",
    "export": "zoo.deployment.export",
    "fold_dataset": "zoo.data.resplit",
    "find_lr": "zoo.reporting.lr_range",
    "find_model": "zoo.models.registry",
    "find_run": "zoo.runs",
    "home": "zoo.files",
    "import_dataset": "zoo.data.sources",
    "list_models": "zoo.models.registry",
    "list_recipes": "zoo.recipe",
    "list_runs": "zoo.runs",
    "load_dataset": "zoo.data.manifest",
    "load_model": "zoo.training.scoring",
    "load_recipe": "zoo.recipe",
    "pick": "zoo.benchmark.picking",
    "plan": "zoo.benchmark.outlook",
    "plot_confusion_matrices": "zoo.reporting.plots",
    "plot_learning_curves": "zoo.reporting.plots",
    "plot_samples": "zoo.reporting.plots",
    "plot_test_scores": "zoo.reporting.plots",
    "predictions_of": "zoo.training.scoring",
    "register_model": "zoo.models.registry",
    "report": "zoo.benchmark.reports",
    "resplit_dataset": "zoo.data.resplit",
    "show_dataset": "zoo.reporting.sheets",
    "split_summary": "zoo.data.manifest",
    "train": "zoo.training.loop",
    "tune": "zoo.benchmark.tune",
}
__all__ = ["__version__", *sorted(_PLACES)]  # noqa: PLE0604

if TYPE_CHECKING:
    from zoo.benchmark.comparisons import compare as compare
    from zoo.benchmark.contrasts import bench_all as bench_all
    from zoo.benchmark.outlook import plan as plan
    from zoo.benchmark.picking import pick as pick
    from zoo.benchmark.reports import report as report
    from zoo.benchmark.suite import bench as bench
    from zoo.benchmark.tune import tune as tune
    from zoo.data.manifest import load_dataset as load_dataset
    from zoo.data.manifest import split_summary as split_summary
    from zoo.data.resplit import fold_dataset as fold_dataset
    from zoo.data.resplit import resplit_dataset as resplit_dataset
    from zoo.data.sources import import_dataset as import_dataset
    from zoo.deployment.export import export as export
    from zoo.deployment.predictor import Predictor as Predictor
    from zoo.errors import ZooError as ZooError
    from zoo.files import Home as Home
    from zoo.files import home as home
    from zoo.models.registry import (
        create_model as create_model,
    )
    from zoo.models.registry import (
        find_model as find_model,
    )
    from zoo.models.registry import (
        list_models as list_models,
    )
    from zoo.models.registry import (
        register_model as register_model,
    )
    from zoo.recipe import Recipe as Recipe
    from zoo.recipe import list_recipes as list_recipes
    from zoo.recipe import load_recipe as load_recipe
    from zoo.reporting.audit import audit_dataset as audit_dataset
    from zoo.reporting.lr_range import find_lr as find_lr
    from zoo.reporting.sheets import show_dataset as show_dataset
    from zoo.runs import Run as Run
    from zoo.runs import find_run as find_run
    from zoo.runs import list_runs as list_runs
    from zoo.training.loop import train as train
    from zoo.training.scoring import (
        evaluate as evaluate,
    )
    from zoo.training.scoring import (
        load_model as load_model,
    )
    from zoo.training.scoring import (
        predictions_of as predictions_of,
    )


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
