"""The measure of rounding, where it is taken from few numbers: what chance may do, and what it may not excuse."""

import numpy as np
import pytest
import torch
from reference import perturbed
from vit_pytorch.deepvit import DeepViT

import convert
from convert.outputs import compare_outputs
from convert.parity import FALSE_ALARMS, RATIO, USUAL_RATIO, compare, ratio_limit


def small(**fields: int) -> DeepViT:
    torch.manual_seed(0)
    return DeepViT(image_size=8, patch_size=4, dim=12, depth=2, mlp_dim=8, dim_head=4, **fields)


@pytest.mark.parametrize('numbers', [2, 5, 20, 50])
def test_chance_stays_below_the_limit(numbers: int) -> None:
    """A million right parts, whose errors are as large as a right port's become: about one alarm is expected."""
    random = np.random.default_rng(numbers)
    squares = random.chisquare(numbers, (2, 1_000_000))
    ratios = USUAL_RATIO * np.sqrt(squares[0] / squares[1])
    assert (ratios > ratio_limit(numbers)).sum() <= 1e6 * FALSE_ALARMS + 5
    if numbers < 50:
        assert (ratios > RATIO).sum() > 100  # of which `RATIO` would call so many wrong


def test_many_numbers_are_held_to_three_times_the_error() -> None:
    assert ratio_limit(51) > ratio_limit(52) == ratio_limit(10**7) == RATIO


@pytest.mark.parametrize(
    ('numbers', 'times', 'right'), [(2, 1e2, True), (2, 1e4, False), (80, 2.9, True), (80, 3.1, False)]
)
def test_how_much_larger_an_error_may_be(numbers: int, times: float, right: bool) -> None:
    truth = np.ones(numbers)
    row = compare('', '', 1e-12, 'float32', truth, truth + 1e-6, truth, truth + times * 1e-6)
    assert row.right == right
    assert row.port_limit == pytest.approx(ratio_limit(numbers) * 1e-6)


@pytest.mark.parametrize('seed', [0, 2])
def test_the_gradients_of_two_heads_norms_are_right(seed: int) -> None:
    """Two numbers each, of which chance makes ratios of 7 and 4 with these seeds, on one machine at least."""
    report = convert.verify(perturbed(small(heads=2, num_classes=5), seed), gradients=True, seed=seed)
    few = [row for row in report.gradients if 'reattn_norm' in row.name]
    assert report.right
    assert [row.ratio_limit for row in few] == 4 * [ratio_limit(2)]


def test_saved_outputs_of_one_image_and_two_classes() -> None:
    module = perturbed(small(heads=3, num_classes=2))
    model, variables = convert.from_torch(module)
    for seed in range(20):
        image = np.random.default_rng(seed).standard_normal((1, 8, 8, 3), np.float32)
        with torch.no_grad():
            outputs = module(torch.tensor(image.transpose(0, 3, 1, 2))).numpy()
        assert compare_outputs(model, variables, image, outputs).right, seed
        assert not compare_outputs(model, variables, image, outputs * np.float32(1.01)).right, seed
