from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from zoo.data.cache import open_pixels
from zoo.data.transforms import center_crop, normalise_tensor
from zoo.training.averaging import Candidate, average, greedy_soup, reestimate_batch_norm, statistics_batches
from zoo.training.checkpoint import save_tensors
from zoo.training.plan import make_plan


def states(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "weight": torch.randn(4, 3, generator=draw),
            "half": torch.randn(5, generator=draw).bfloat16(),
            "steps": torch.tensor(10 + number),
        }
        for number in range(count)
    ]


# The mean -------------------------------------------------------------------------------------------------------------


def test_the_mean_is_exact_in_each_type_and_counts_are_the_lasts():
    given_states = states(7)
    before = [{key: value.clone() for key, value in state.items()} for state in given_states]
    mean = average(given_states)
    for key in ("weight", "half"):
        expected = np.mean([state[key].double().numpy() for state in given_states], axis=0)
        assert torch.equal(mean[key], torch.from_numpy(expected).to(given_states[0][key].dtype))
    assert mean["steps"] == 16
    assert all(torch.equal(old[key], new[key]) for old, new in zip(before, given_states, strict=True) for key in old)


def test_the_mean_of_one_is_itself_and_of_many_hardly_depends_on_their_order():
    (one,) = states(1)
    mean = average([one])
    assert all(torch.equal(mean[key], one[key]) and mean[key] is not one[key] for key in one)
    many = [{"weight": 1e4 * torch.ones(3) + 1e-3 * number} for number in range(100)]
    assert torch.equal(average(many)["weight"], average(reversed(many))["weight"])


def test_the_mean_is_torchs_swa():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    averaged, kept = AveragedModel(net), []
    for _ in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update_parameters(net)
        kept.append({key: value.clone() for key, value in net.state_dict().items()})
    mean = average(kept)
    for key, value in averaged.module.named_parameters():
        torch.testing.assert_close(mean[key], value.detach(), rtol=1e-5, atol=1e-6)


def test_one_state_is_in_memory_at_a_time():
    alive: list[weakref.ref] = []

    def each():
        for number in range(5):
            tensor = torch.full((3,), float(number))
            assert sum(ref() is not None for ref in alive) == 0
            alive.append(weakref.ref(tensor))
            yield {"weight": tensor}

    assert average(each())["weight"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("odd", [{"bias": torch.zeros(2)}, {"weight": torch.zeros(3)}])
def test_states_of_two_networks_are_refused(odd):
    with pytest.raises(ValueError, match="no state"):
        average([])
    with pytest.raises(ValueError, match=r"differ in .*weight"):
        average([{"weight": torch.zeros(2)}, odd])
    with pytest.raises(ValueError, match=r"differ in .*weight"):
        greedy_soup([Candidate("a", lambda: {"weight": torch.zeros(2)}), Candidate("b", lambda: odd)], lambda _: 0.0)


# The greedy soup ------------------------------------------------------------------------------------------------------


def by_the_paper(candidates: dict[str, torch.Tensor], score, sign: int) -> list[str]:
    """Recipe 1 of the paper, word for word: each average from scratch."""
    order = sorted(candidates, key=lambda name: sign * score(candidates[name]), reverse=True)
    ingredients: list[str] = []
    for name in order:
        tried = torch.stack([candidates[each] for each in [*ingredients, name]]).mean(0)
        now = torch.stack([candidates[each] for each in ingredients]).mean(0) if ingredients else None
        if now is None or sign * score(tried) >= sign * score(now):
            ingredients.append(name)
    return ingredients


@settings(max_examples=60)
@given(
    values=st.lists(st.lists(st.integers(-8, 8), min_size=2, max_size=2), min_size=1, max_size=7),
    sign=st.sampled_from([1, -1]),
)
def test_the_soup_is_the_papers(values, sign):
    weights = {f"epoch {number}": torch.tensor(each, dtype=torch.float64) for number, each in enumerate(values)}

    def distance(weight: torch.Tensor) -> float:
        return -sign * float((weight - torch.tensor([1.0, 2.0])).square().sum())

    soup = greedy_soup(
        [Candidate(name, lambda weight=weight: {"weight": weight}) for name, weight in weights.items()],
        lambda state: distance(state["weight"]),
        sign,
    )
    assert soup.chosen == by_the_paper(weights, distance, sign)
    assert sign * soup.value >= max(sign * value for value in soup.values.values())
    assert soup.value == distance(soup.state["weight"])
    assert soup.values == {name: distance(weight) for name, weight in weights.items()}


def test_known_scores_are_not_computed_again_and_what_is_no_number_is_worst():
    scored: list[float] = []

    def score(state) -> float:
        scored.append(float(state["w"]))
        return float("nan") if state["w"] > 5 else float(state["w"])

    soup = greedy_soup(
        [
            Candidate("none", lambda: {"w": torch.tensor(9.0)}, float("nan")),
            Candidate("low", lambda: {"w": torch.tensor(1.0)}, 1.0),
            Candidate("high", lambda: {"w": torch.tensor(3.0)}, 3.0),
        ],
        score,
    )
    assert (soup.chosen, soup.value, float(soup.state["w"])) == (["high"], 3.0, 3.0)
    assert scored == [2.0, 6.0]  # the averages alone, from the best candidate down
    undefined = greedy_soup([Candidate(name, lambda: {"w": torch.tensor(9.0)}) for name in "ab"], score)
    assert undefined.chosen == ["a"]
    with pytest.raises(ValueError, match="no candidate"):
        greedy_soup([], score)


def test_candidates_are_read_from_files_one_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def load(path):
        assert not any(ref() is not None for ref in alive)
        state = load_file(path)
        alive.append(weakref.ref(state["weight"]))
        return state

    files = []
    for number, state in enumerate(states(6)):
        files.append(tmp_path / f"epoch-{number}.safetensors")
        save_tensors(files[-1], state)
    soup = greedy_soup(
        [Candidate(file.stem, partial(load, file)) for file in files],
        lambda state: -float(state["weight"].square().sum()),
    )
    assert len(soup.chosen) > 1
    chosen = [states(6)[int(name[-1])] for name in soup.chosen]
    assert all(torch.equal(soup.state[key], value) for key, value in average(chosen).items())
    assert len(alive) == 12  # each once for its own score, once for the average with it


# Batch norm -----------------------------------------------------------------------------------------------------------


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(dropout),
        nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 2),
    )  # fmt: skip


def images(*sizes: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=draw) + 0.5 for size in sizes]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key}


def test_statistics_of_equal_batches_are_torchs():
    ours, theirs, batches = network(), network(), images(6, 6, 6)
    assert reestimate_batch_norm(ours, batches, ours) == 2
    update_bn(batches, theirs)
    for key, value in statistics(theirs).items():
        torch.testing.assert_close(statistics(ours)[key], value)
    assert [ours[1].momentum, ours[6].momentum] == [0.3, None]
    assert not any(module.training for module in ours.modules())


def test_statistics_count_batches_by_their_size_and_are_those_of_the_input():
    model, batches = network(), images(9, 4, 1, 2)
    reestimate_batch_norm(model, batches, model)
    used = [batch for batch in batches if len(batch) > 1]
    inputs = [model[0](batch).detach().transpose(0, 1).flatten(1).double() for batch in used]
    shares = [len(batch) / 15 for batch in used]
    mean = sum(share * each.mean(1) for share, each in zip(shares, inputs, strict=True))
    variance = sum(share * each.var(1) for share, each in zip(shares, inputs, strict=True))
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    first = statistics(model)
    reestimate_batch_norm(model, batches, model)  # from the start, whatever was there
    assert all(torch.equal(value, first[key]) for key, value in statistics(model).items())


def test_dropout_does_not_widen_the_statistics():
    plain, dropping = network(), network(dropout=0.7)
    for model in (plain, dropping):
        reestimate_batch_norm(model, images(8, 8), model)
    assert all(torch.equal(value, statistics(plain)[key]) for key, value in statistics(dropping).items())


def test_frozen_layers_keep_their_statistics():
    model = network()
    before = statistics(model)
    assert reestimate_batch_norm(model, images(8), model, frozen=["1"]) == 1
    changed = {key for key, value in statistics(model).items() if not torch.equal(value, before[key])}
    assert changed == {"6.running_mean", "6.running_var"}


def test_networks_without_batch_norm_are_asked_for_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def never():
        raise AssertionError("a batch was asked for")
        yield

    assert reestimate_batch_norm(model, never(), model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_image_gives_no_statistics_and_the_layers_are_left_in_order():
    model = network()
    with pytest.raises(ValueError, match="two images"):
        reestimate_batch_norm(model, images(1), model)
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.zeros(2, 7, 8, 8)], model)
    assert [model[1].momentum, model[6].momentum] == [0.3, None]
    assert not any(module.training for module in model.modules())


@pytest.fixture
def prepared(tiny, make_recipe):
    plan = make_plan(make_recipe(model__name="test_resnet"), "tiny", 0, tiny)
    return plan, open_pixels(plan.dataset, "train", plan.preprocessing)


def test_training_images_come_once_mixed_and_as_they_are_scored(prepared):
    plan, pixels = prepared
    found = list(statistics_batches(pixels, plan.preprocessing, 5, seed=3))
    assert [len(batch) for batch in found] == [5, 5, 5, 3]
    crops = np.stack([center_crop(pixels[place], plan.preprocessing.image_size) for place in range(len(pixels))])
    place = {crop.tobytes(): number for number, crop in enumerate(crops)}
    order = [place[image.tobytes()] for batch in found for image in batch]
    assert sorted(order) == list(range(18)) and order != sorted(order)
    assert all(len(set(pixels.y_true[order[start : start + 5]])) > 1 for start in (0, 5, 10))
    again = statistics_batches(pixels, plan.preprocessing, 5, seed=3)
    assert all(np.array_equal(*pair) for pair in zip(found, again, strict=True))


def test_an_averaged_network_normalises_again(prepared):
    """The mean of two trained networks' statistics is not that of the mean; after estimation its input is standard."""
    plan, pixels = prepared
    model = plan.model()[0]
    draw, kept = torch.Generator().manual_seed(0), []
    for _ in range(2):
        moved = plan.model()[0].train()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=draw))
            for batch in statistics_batches(pixels, plan.preprocessing, 18, 0):
                for _ in range(60):  # until the moving average has arrived
                    moved(normalise_tensor(torch.from_numpy(batch), plan.preprocessing))
        kept.append(moved.state_dict())
    model.load_state_dict(average(kept))
    last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            (inputs[0] - module.running_mean[:, None, None]) / module.running_var[:, None, None].sqrt()
        )
    )

    def forward(batch):
        return model(normalise_tensor(torch.from_numpy(batch), plan.preprocessing))

    def off_standard() -> float:
        seen.clear()
        with torch.inference_mode():
            forward(next(statistics_batches(pixels, plan.preprocessing, 18, 0)))
        values = seen[0].transpose(0, 1).flatten(1)
        return float((values.std(1).log().abs() + values.mean(1).abs()).mean())

    model.eval()
    before = off_standard()
    assert reestimate_batch_norm(model, statistics_batches(pixels, plan.preprocessing, 18, 0), forward) > 1
    assert before > 0.3
    assert off_standard() < 0.05  # not 0: running variances are those of samples, n / (n - 1)
