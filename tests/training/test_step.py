from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import nn

from zoo.data.transforms import normalise_tensor
from zoo.errors import ZooError
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.training.loop import train
from zoo.training.loss import Criterion
from zoo.training.precision import PrecisionPlan
from zoo.training.step import Updater, piece_sizes, step_seed
from zoo.training.strategy import make_optimizer

CPU = torch.device("cpu")
FLOAT32 = PrecisionPlan("float32", channels_last=True)
MIXES = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]


@pytest.fixture
def updater(tiny, make_recipe):
    """Return what makes an updater of a small network, which remembers what it was given."""
    from zoo.training.plan import make_plan

    def make(parts: int = 1, network: nn.Module | None = None, **keys) -> Updater:
        plan = make_plan(make_recipe(device="cpu", **keys), "tiny", 0, tiny)
        torch.manual_seed(0)
        model = network or nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
        optimizer = make_optimizer(model, plan.recipe)
        return Updater(plan.recipe, plan.preprocessing, 0, CPU, FLOAT32, Criterion(), model, optimizer, 3, parts=parts)

    return make


def batch(count: int):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(count) % 3, torch.arange(count)


def mixed(make: Updater, count: int, number: int = 1):
    pixels, labels, _ = batch(count)
    return make._inputs(pixels, labels, step_seed(0, 1, number), 8, True)


@pytest.mark.parametrize("mix", MIXES)
def test_a_batch_of_even_size_is_mixed_as_timm_does_to_the_last_bit(updater, mix):
    make = updater(**mix)
    pixels, labels, _ = batch(6)
    for number in range(1, 9):
        found, targets, _ = mixed(make, 6, number)
        images = normalise_tensor(pixels, make.preprocessing)
        seed = step_seed(0, 1, number)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        mixup = Mixup(mix.get("mixup", 0.0), mix.get("cutmix", 0.0), label_smoothing=0.0, num_classes=3)
        wanted, wanted_targets = mixup(images, labels)
        assert torch.equal(found, wanted) and torch.equal(targets, wanted_targets)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [3, 7])
def test_a_batch_of_odd_size_is_mixed_with_its_reverse(updater, mix, count):
    make = updater(**mix)
    pixels, labels, _ = batch(count)
    plain = normalise_tensor(pixels, make.preprocessing)
    pasted = shared = 0
    for number in range(1, 9):
        images, targets, own = mixed(make, count, number)
        assert torch.equal(own, labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        middle = count // 2
        torch.testing.assert_close(images[middle], plain[middle])  # it is its own partner
        assert float(targets[middle, labels[middle]]) == pytest.approx(1)
        share = (targets[0, labels[0]]).item() if labels[0] != labels[-1] else targets[1, labels[1]].item()
        blended = plain * share + plain.flip(0) * (1 - share)
        taken = images == plain.flip(0)
        if torch.allclose(images, blended, atol=1e-5):
            shared += 1
        else:  # a rectangle of the partner, as large as the targets say
            assert bool((taken | (images == plain)).all())
            assert float(taken[0, 0].float().mean()) == pytest.approx(1 - share, abs=0.05)  # some are alike
            pasted += 1
    assert shared >= 1 or "mixup" not in mix
    assert pasted >= 1 or "cutmix" not in mix


def test_odd_batches_of_a_run_are_mixed(updater):
    seen = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, images):
            seen.append(images.detach().clone())
            return self.head(images.mean((2, 3)))

    make = updater(mixup=1.0, network=Seen())
    for count in (7, 6, 1):
        make.update([batch(count)], 1, 1, 8)
        plain = normalise_tensor(batch(count)[0], make.preprocessing)
        assert torch.equal(seen[-1], plain) == (count == 1)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_no_piece_is_of_one_image_where_a_whole_batch_has_larger_ones():
    for batch_size in range(1, 20):
        for parts in range(1, 2 * batch_size):
            largest = max(piece_sizes(batch_size, parts, batch_size))
            for count in range(1, batch_size + 1):
                sizes = piece_sizes(count, parts, batch_size)
                assert sum(sizes) == count and len(sizes) <= parts
                if parts < batch_size:
                    assert 1 not in sizes or count == 1
                    assert max(sizes) <= max(3, largest)
                else:
                    assert sizes == [1] * count
            if batch_size % parts == 0:
                wanted = [len(each) for each in torch.zeros(batch_size).chunk(min(parts, batch_size))]
                assert piece_sizes(batch_size, parts, batch_size) == wanted


class Narrow(nn.Module):
    """Normalises a batch's features, of which one image has one value each."""

    most = 100

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        if self.training and images.device.type != "meta" and len(images) > self.most:
            raise MemoryError("no room")
        return self.head(self.norm(images.mean((2, 3))))


@pytest.mark.parametrize(("count", "parts"), [(7, 3), (5, 2), (3, 4), (7, 4), (9, 4)])
def test_batch_norm_over_maps_of_one_pixel_trains_in_parts(updater, count, parts):
    torch.manual_seed(0)
    network = Narrow(3)
    before = copy.deepcopy(network.state_dict())
    loss, _ = updater(parts, network, batch_size=9).update([batch(count)], 1, 1, 8)
    assert bool(torch.isfinite(loss))
    assert not torch.equal(before["head.weight"], network.state_dict()["head.weight"])


@pytest.fixture
def narrow():
    register_model("narrow_net")(Narrow)
    yield Narrow
    del own_models["narrow_net"]
    Narrow.most = 100


@pytest.mark.slow
def test_where_batch_norm_needs_more_images_than_memory_suffices_for_that_is_said(tiny, make_recipe, narrow):
    narrow.most = 1
    with pytest.raises(
        ZooError,
        match=r"^out of memory even with two images at a time \(no room\), and batch normalisation cannot do with one",
    ):
        train(make_recipe("none", model__name="narrow_net", batch_size=4, device="cpu"), "tiny", 0, tiny)
    narrow.most = 3
    run = train(make_recipe("parts", model__name="narrow_net", batch_size=7, device="cpu"), "tiny", 0, tiny)
    assert "computed in 4 parts" in run.record.notes[0]
