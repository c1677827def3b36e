import os
import subprocess
import sys

import pytest

from zoo.data.manifest import load_dataset
from zoo.errors import ZooError


def test_a_built_in_dataset_that_is_not_made_is_said_to_be_so(root):
    with pytest.raises(ZooError, match="dataset 'digits' is not made yet; make it with `zoo data import digits`"):
        load_dataset("digits", root, make_builtin=False)


@pytest.mark.slow
def test_what_is_scored_is_compared_without_torch(trained):
    """The table is a function of run folders: it must come out where no network could be loaded."""
    code = (
        "import sys\n"
        "from zoo.benchmark.comparisons import comparison_of, score_missing\n"
        "from zoo.benchmark.reports import report\n"
        "score_missing([], data='tiny')\n"
        "assert len(comparison_of(data='tiny', metric='auroc').rows) == 2\n"
        "report(data='tiny', explain=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    environment = {**os.environ, "ZOO_HOME": str(trained.root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
