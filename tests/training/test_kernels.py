from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.training.kernels import lacks_steady_kernel, steady_kernels
from zoo.training.loop import train

LACKS = "some_backward_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic'"


def settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*mode, cudnn.benchmark, cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory)


@pytest.mark.parametrize("strict", [True, False])
def test_settings_hold_within_the_block_and_for_cards_alone(monkeypatch, strict):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with steady_kernels(torch.device("cpu"), strict=strict):
        assert settings() == before
    with pytest.raises(KeyError), steady_kernels(torch.device("cuda"), strict=strict):
        assert settings() == (True, not strict, False, True, False)
        warnings.warn(f"{LACKS}, warn_only=True", UserWarning, stacklevel=1)  # the run's notes tell of it
        raise KeyError
    assert settings() == before


def test_a_network_without_steady_kernels_is_trained_with_others_and_the_run_says_so(tiny, make_recipe):
    class Lacking(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            if self.training and images.device.type != "meta" and refusals:
                raise refusals.pop()
            return self.head(images.mean((2, 3)))

    register_model("lacking_net")(Lacking)
    phases = []
    try:
        refusals = [RuntimeError(LACKS)]
        recipe = make_recipe(model__name="lacking_net")
        run = train(recipe, "tiny", 0, tiny, on_tick=lambda tick: phases.append(tick.phase))
        refusals = [RuntimeError(LACKS), RuntimeError(LACKS)]  # not for ever
        with pytest.raises(ZooError, match="some_backward_cuda does not have"):
            train(recipe, "tiny", 1, tiny)
    finally:
        del own_models["lacking_net"]
    (note,) = run.record.notes
    assert note.startswith("trained again it may have other bits: some_backward_cuda does not have a deterministic")
    assert any(phase.startswith("some_backward_cuda") for phase in phases)
    assert not any("out of memory" in phase for phase in phases)


def test_what_lacks_a_steady_kernel_is_told_from_other_errors():
    assert lacks_steady_kernel(RuntimeError(LACKS))
    assert not lacks_steady_kernel(RuntimeError("CUDA out of memory"))
    assert not lacks_steady_kernel(ValueError(LACKS))
