"""The losses against their definitions, the random ones against their expectation, and what they may not cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_compress.distillation import affinity, fast_feature_affinity, feature_affinity, logit_distillation
from hf_compress.distillation.losses import box_distillation, foreground, unit_pixels
from hf_compress.errors import MethodError


def maps(seed: int = 0, batch: int = 3, pixels: int = 20, channels: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, pixels, c, generator=generator, dtype=torch.float64) for c in channels)  # type: ignore


def differences(student: Tensor, teacher: Tensor) -> Tensor:
    """D by its definition: cosines of pixels, with the paper's own floor left out."""
    ours, theirs = (x / x.norm(dim=-1, keepdim=True) for x in (student, teacher))
    return ours @ ours.mT - theirs @ theirs.mT


def estimates(student: Tensor, teacher: Tensor, projections: int, draws: int, norm: str = "squared") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [fast_feature_affinity(student, teacher, projections, norm, generator=generator) for _ in range(draws)]
    )


@given(batch=st.integers(1, 3), pixels=st.integers(1, 12), ours=st.integers(1, 9), theirs=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_exact_is_the_definition(batch, pixels, ours, theirs):
    """Both ways of computing the squared norm, whichever of pixels and channels are more."""
    student, teacher = maps(pixels, batch, pixels, (ours, theirs))
    difference = differences(student, teacher)
    # the floor adds 1e-6 of the mean squared length of a pixel; of one channel, a pixel can be far below the mean
    close = {"rtol": 1e-4, "atol": 1e-4 if min(ours, theirs) > 2 else 2e-2}
    torch.testing.assert_close(feature_affinity(student, teacher), difference.square().mean(), **close)
    torch.testing.assert_close(feature_affinity(student, teacher, "l1"), difference.abs().mean(), **close)


def test_few_channels_and_many_pixels_agree_with_the_pairwise_form():
    student, teacher = maps(3, pixels=50)
    pairwise = (affinity(student) - affinity(teacher)).square().mean()
    assert feature_affinity(student, teacher).item() == pytest.approx(pairwise.item(), rel=1e-12)
    # float32 sums lose what the squares of the two cancel: 1e-7 of squares of about 0.2, against a loss of 0.2
    assert feature_affinity(student.float(), teacher.float()).item() == pytest.approx(pairwise.item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["squared", "l1"])
@pytest.mark.parametrize("fast", [False, True])
def test_gradients(norm, fast):
    student, teacher = maps(2, batch=2, pixels=7)
    student.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        if fast:
            return fast_feature_affinity(x, teacher, 4, norm, generator=torch.Generator().manual_seed(0))
        return feature_affinity(x, teacher, norm)

    # the floor follows the map without a gradient, which numbers see: 1e-6 of it
    assert torch.autograd.gradcheck(loss, (student,), atol=1e-6, rtol=1e-3)


def test_the_same_affinities_are_no_distance():
    """F_student = c F_teacher with another c > 0 at every pixel, and channels in another order."""
    _, teacher = maps()
    student = teacher[..., torch.randperm(9)] * torch.linspace(0.5, 4, 20, dtype=torch.float64)[:, None]
    assert feature_affinity(student, teacher).item() < 1e-9  # the floor differs by 1e-6 of a pixel's squared length
    assert feature_affinity(student, teacher, "l1").item() < 1e-5
    assert estimates(student, teacher, 15, 3).max() < 1e-9


def test_the_fast_squared_loss_is_unbiased_and_its_error_falls_by_the_root_of_k():
    """E ||DZ||^2 / k = ||D||^2 for any D; its relative standard deviation is at most sqrt(2 / k)."""
    student, teacher = maps(4, batch=2, pixels=30, channels=(16, 16))
    exact = feature_affinity(student, teacher)
    draws, deviations = 2000, {}
    for projections in (1, 4, 16, 64):
        found = estimates(student, teacher, projections, draws) / exact - 1
        deviations[projections] = found.std().item()
        # of the mean of so many draws; five standard errors
        assert abs(found.mean().item()) < 5 * deviations[projections] / math.sqrt(draws)
        assert deviations[projections] < math.sqrt(2 / projections)
    for k in (
        1,
        4,
        16,
    ):  # four times the projections, half the error; a standard deviation of 2,000 draws is known to 2-4 %
        assert deviations[4 * k] / deviations[k] == pytest.approx(0.5, rel=0.15)


def test_the_unbiased_bound_is_reached_where_the_difference_has_one_direction():
    """A student whose pixels are all alike and a teacher with two kinds: D has rank two at most, so the error is large."""
    student = torch.ones(1, 40, 3, dtype=torch.float64)
    teacher = torch.zeros(1, 40, 2, dtype=torch.float64)
    teacher[:, :20, 0], teacher[:, 20:, 1] = 1, 1
    found = estimates(student, teacher, 10, 2000) / feature_affinity(student, teacher) - 1
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(2000) and 0.25 < found.std() < math.sqrt(2 / 10)


def test_the_fast_l1_loss_estimates_lengths_of_rows():
    """The paper's code: sqrt(2/pi) times the sum of the rows' lengths over n^2. It is not the exact l1."""
    student, teacher = maps(5, pixels=64, channels=(16, 16))
    difference = differences(student, teacher)
    expected = math.sqrt(2 / math.pi) * difference.norm(dim=-1).sum(-1).mean() / 64**2
    found = estimates(student, teacher, 15, 400, "l1")
    assert found.mean().item() == pytest.approx(expected.item(), rel=0.01)
    assert found.mean() < 0.2 * feature_affinity(student, teacher, "l1")


@pytest.mark.parametrize("norm", ["squared", "l1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_pixels_and_huge_features_are_safe(norm, dtype):
    student, teacher = (x.to(dtype) for x in maps(6, pixels=32))
    student, teacher = student * 6e3, teacher * 6e3  # squares are far above what fp16 can hold
    student[:, :5], student[0], teacher[:, 3:8] = 0, 0, 0  # pixels of no length in either map, and a map of nothing
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [feature_affinity(student, teacher, norm), fast_feature_affinity(student, teacher, 5, norm)]
    for loss in losses:
        assert loss.dtype == torch.float32 and loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert gradient.isfinite().all() and gradient[0].abs().max() == 0
    wide = student.detach().float()
    assert unit_pixels(wide)[:, :5].abs().max() == 0


def test_the_gradient_of_a_pixel_of_no_length_is_bounded():
    student, teacher = maps(7, batch=1, pixels=30)
    student[:, 0] *= 1e-9
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_affinity(student, teacher), student)
    usual = gradient[:, 1:].norm(dim=-1).median()
    assert gradient[:, 0].norm() < 1e4 * usual  # a thousand by the floor; with the code's 1e-5 it would be 1e5


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("case", ["fast squared", "fast l1", "exact squared", "exact l1"])
def test_memory_is_linear_in_pixels(case):
    """No tensor of the forward or backward pass grows faster than the maps; of the exact l1 it is known to."""
    kind, norm = case.split()
    most = {}
    for pixels in (256, 1024):
        student, teacher = (x.float().requires_grad_() for x in maps(8, 2, pixels, (8, 12)))
        with Largest() as watch:
            loss = fast_feature_affinity if kind == "fast" else feature_affinity
            loss(student, teacher, norm=norm).backward()
        most[pixels] = watch.most
    limit = 2 * 1024 * 15  # batch, pixels, projections
    assert most[1024] == 4 * most[256] and most[1024] <= limit if case != "exact l1" else most[1024] == 2 * 1024**2


def test_global_randomness_is_not_reset():
    student, teacher = maps()
    torch.manual_seed(7)
    fast_feature_affinity(student, teacher)
    first = torch.rand(1)
    fast_feature_affinity(student, teacher)
    assert torch.rand(1) != first  # the released code seeds the global generator with 1 at every call
    torch.manual_seed(7)
    fast_feature_affinity(student, teacher, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 7), (2, 7, 3, 3)])
def test_logits(shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    assert torch.equal(logit_distillation(student, teacher), (student - teacher).square().mean())
    dim = 1 if len(shape) in (2, 4) else 2
    for temperature in (1.0, 3.0):
        p, q = ((x / temperature).softmax(dim) for x in (teacher, student))
        expected = temperature**2 * (p * (p / q).log()).sum(dim).mean()
        found = logit_distillation(student, teacher, "kl", temperature)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert logit_distillation(teacher, teacher, "kl", temperature) == 0
    half = logit_distillation(student.half() * 1e4, teacher.half() * 1e4)
    assert half.isfinite()  # of squares that fp16 cannot hold


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: feature_affinity(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)), ["[2, 4, 3]", "[2, 5, 3]", "Resize"]),
        (lambda: feature_affinity(torch.zeros(2, 4), torch.zeros(2, 4)), ["[2, 4]"]),
        (lambda: feature_affinity(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), "l2"), ["l2", "squared", "l1"]),
        (lambda: fast_feature_affinity(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), 0), ["projections=0", "15"]),
        (lambda: fast_feature_affinity(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), 1.5), ["projections=1.5"]),
        (lambda: logit_distillation(torch.zeros(2, 4), torch.zeros(2, 5)), ["[2, 4]", "[2, 5]"]),
        (lambda: logit_distillation(torch.zeros(2, 4), torch.zeros(2, 4), "js"), ["js", "mse", "kl"]),
        (lambda: logit_distillation(torch.zeros(2, 4), torch.zeros(2, 4), "kl", 0), ["temperature=0"]),
        (lambda: logit_distillation(torch.zeros(2, 4), torch.zeros(2, 4), "kl", float("nan")), ["temperature=nan"]),
    ],
)  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(MethodError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes_count_by_the_teachers_confidence():
    theirs = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = theirs.clone()
    ours[0, 0] += torch.tensor([0.1, -0.1, 0.2, 0.0], dtype=torch.float64)  # a distance of 0.4
    ours[1, 2] += 10
    confidence = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert box_distillation(ours, theirs, confidence) == pytest.approx(0.4 * 0.5 / 2.0, rel=1e-12)
    assert box_distillation(ours, theirs, torch.zeros(2, 3)) == 0  # nothing is there
    with pytest.raises(MethodError, match=r"\[2, 2, 4\].*\[2, 3, 4\]"):
        box_distillation(ours[:, :2], theirs, confidence)


def test_foreground_of_both_kinds_of_detectors():
    logits = torch.tensor([[[0.0, 2.0, -1.0], [-3.0, -4.0, 5.0]]])
    assert torch.allclose(foreground(logits, 3), torch.tensor([[2.0, 5.0]]).sigmoid())
    assert torch.allclose(foreground(logits, 2), logits.softmax(-1)[..., :2].amax(-1))
