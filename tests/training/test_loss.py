from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from zoo.recipe import LossTable
from zoo.training.loss import Criterion, make_criterion

CPU = torch.device("cpu")
WEIGHT = torch.tensor([0.5, 2.0, 1.5, 1.0])
WAYS = list(itertools.product([None, WEIGHT], [0.0, 0.1], ["hard", "soft"]))


def batch(kind: str, count: int = 17, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(count, 4, generator=generator, dtype=dtype)
    hard = torch.randint(4, (count,), generator=generator)
    soft = torch.softmax(torch.randn(count, 4, generator=generator, dtype=dtype), 1)
    return logits, hard if kind == "hard" else soft


def spelled_out(logits, target, weight, smoothing, gamma):
    """The weighted sum of focal losses, class by class in float64, as the paper writes it."""
    total = 0.0
    for row, each in zip(logits.double().tolist(), target.tolist(), strict=True):
        p = np.exp(np.array(row) - max(row))
        p /= p.sum()
        shares = np.eye(len(p))[each] if isinstance(each, int) else np.array(each)
        shares = shares * (1 - smoothing) + smoothing / len(p)
        weights = np.ones(len(p)) if weight is None else weight.double().numpy()
        total += float((weights * shares * (1 - p) ** gamma * -np.log(p)).sum())
    return total


@pytest.mark.parametrize(("weight", "smoothing", "kind"), WAYS)
@pytest.mark.parametrize("gamma", [None, 0.0])
def test_cross_entropy_is_torchs_own_bit_for_bit(weight, smoothing, kind, gamma):
    logits, target = batch(kind)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = Criterion(weight, smoothing, gamma)(ours, target)
    reference = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(theirs, target)
    loss.backward()
    reference.backward()
    assert torch.equal(loss, reference)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("weight", "smoothing", "kind"), WAYS)
@pytest.mark.parametrize("gamma", [None, 0.5, 2.0])
def test_parts_of_a_batch_add_up_to_the_whole(weight, smoothing, kind, gamma):
    logits, target = batch(kind)
    criterion = Criterion(weight, smoothing, gamma)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mean = criterion(whole, target)
    mean.backward()
    cuts = [slice(0, 5), slice(5, 6), slice(6, 17)]
    denominator = sum(criterion.denominator(target[cut]) for cut in cuts)
    total = 0.0
    for cut in cuts:
        part, own = criterion.sums(parts[cut], target[cut])
        assert torch.equal(own, criterion.denominator(target[cut]))
        (part / denominator).backward()
        total += float(part.detach())
    assert total / float(denominator) == pytest.approx(float(mean.detach()), rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("weight", "smoothing", "kind"), WAYS)
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 5.0])
def test_focal_loss_is_the_papers_formula(weight, smoothing, kind, gamma):
    logits, target = batch(kind)
    total, denominator = Criterion(weight, smoothing, gamma).sums(logits, target)
    assert float(total) == pytest.approx(spelled_out(logits, target, weight, smoothing, gamma), rel=1e-5)
    expected = float(weight[target].sum()) if weight is not None and kind == "hard" else len(target)
    assert float(denominator) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_of_a_vanishing_gamma_is_cross_entropy(kind, smoothing):
    logits, target = batch(kind, dtype=torch.float64)
    criterion = Criterion(WEIGHT.double(), smoothing, 1e-9)
    reference = nn.CrossEntropyLoss(weight=WEIGHT.double(), label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(criterion(logits, target), reference, rtol=1e-7, atol=0)


def test_two_classes_give_torchvisions_focal_loss_of_the_sigmoid():
    from torchvision.ops import sigmoid_focal_loss

    generator = torch.Generator().manual_seed(0)
    logit, label = 3 * torch.randn(50, generator=generator), torch.randint(2, (50,), generator=generator)
    ours = Criterion(gamma=2.0)(torch.stack([torch.zeros(50), logit], 1), label)
    theirs = sigmoid_focal_loss(logit, label.float(), alpha=-1, gamma=2.0, reduction="mean")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.7])
def test_slopes_of_the_focal_loss(kind, gamma):
    logits, target = batch(kind, 5, torch.float64)
    criterion = Criterion(WEIGHT, 0.1, gamma).double()
    assert torch.autograd.gradcheck(lambda x: criterion(x, target), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.01, 0.5, 1.0, 1.5, 2.0, 10.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_certain_and_wrong_logits_keep_finite_slopes(gamma, smoothing):
    logits = torch.tensor([[500.0, 0, 0], [0, 500.0, 0], [40.0, 0, 0], [0, 0, 0]], requires_grad=True)
    loss = Criterion(None, smoothing, gamma)(logits, torch.tensor([0, 0, 0, 2]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert logits.grad[1, 0] < -0.2  # what is wrong is counted in full
    if not smoothing:
        assert logits.grad[0].abs().max() < 1e-2


def test_a_nearly_right_answer_counts_by_its_own_small_error():
    logits = torch.tensor([[18.0, 0.0]])  # 1 - p is 1.5e-8, less than float32 tells from 1
    loss = Criterion(gamma=1.0)(logits, torch.tensor([0]))
    wrong = 1 / (1 + np.exp(18.0))
    assert float(loss) == pytest.approx(wrong * -np.log1p(-wrong), rel=1e-3)


def test_balanced_weights_are_scikit_learns():
    counts = np.array([10, 3, 40])
    criterion = make_criterion(LossTable(class_weights="balanced"), counts, CPU)
    labels = np.repeat(np.arange(3), counts)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels).astype(np.float32)
    assert criterion.weight is not None and np.array_equal(criterion.weight.numpy(), expected)
    assert float(criterion.denominator(torch.from_numpy(labels))) == pytest.approx(53)
    assert make_criterion(LossTable(), np.array([10, 0]), CPU).weight is None
    with pytest.raises(ValueError, match=r"\[10, 0\]"):
        make_criterion(LossTable(class_weights="balanced"), np.array([10, 0]), CPU)


@pytest.mark.parametrize(
    ("loss", "gamma"),
    [
        (LossTable(), 0.0),
        (LossTable(name="focal"), 2.0),
        (LossTable(name="focal", gamma=0.0), 0.0),
        (LossTable(name="focal", gamma=0.5), 0.5),
    ],
)
def test_gamma_left_out_is_two(loss, gamma):
    assert make_criterion(loss, np.array([1, 1]), CPU).gamma == gamma
    assert make_criterion(LossTable(label_smoothing=0.2), np.array([1, 1]), CPU).label_smoothing == 0.2
