"""Scores mean what they say: first-order changes of the loss, squared gradients, norms; and computing them leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from masking import logits
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.axes.graph import Member
from hf_compress.errors import DataError, HfCompressError, MethodError, ModelError
from hf_compress.surgery import importance, magnitude_scores, prune
from hf_compress.surgery.importance import METHODS, loss_of

DETERMINISTIC = [method for method in METHODS if method != "random"]
FROM_GRADIENTS = ["taylor", "fisher"]
SOME_FAMILIES = ["resnet_basic", "mobilenet_v2", "vit", "convnext", "swin", "timm_vit", "plain_cnn"]


def built(family: str) -> tuple[nn.Module, AxisGraph, list[dict[str, Tensor]]]:
    """A float64 model, its axes and two labelled batches."""
    model, x = FAMILIES[family]()
    model, x = model.double(), x.double()
    generator = torch.Generator().manual_seed(3)
    batches = [
        {"pixel_values": torch.randn(x.shape, generator=generator, dtype=x.dtype), "labels": torch.tensor(labels)}
        for labels in ([0, 3], [1, 2])
    ]
    return model, find_axes(model, x[:1]), batches


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """For any family: plain modules take no labels."""
    output = model(batch["pixel_values"])
    return nn.functional.cross_entropy(logits(output), batch["labels"])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def scaled(model: nn.Module, members: tuple[Member, ...], index: int, factor: float) -> nn.Module:
    """A copy with all members multiplied at one index."""
    model = copy.deepcopy(model)
    tensors = tensors_of(model)
    with torch.no_grad():
        for member in members:
            tensor = tensors[member.parameter]
            factors = torch.ones(tensor.shape[member.dim], dtype=tensor.dtype)
            factors[member.positions[index]] = factor
            tensor.mul_(factors.view([-1 if dim == member.dim else 1 for dim in range(tensor.dim())]))
    return model


# -- what the scores are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_taylor_is_the_first_order_change_of_the_loss(family: str) -> None:
    """By central differences along the direction in which the producers of an index vanish."""
    model, axes, batches = built(family)
    scores = importance(model, axes, method="taylor", batches=batches, loss=cross_entropy)
    assert set(scores) == set(axes.axes)
    step = 1e-5
    for axis in list(axes)[:: 1 + len(axes) // 6]:
        for index in (0, axis.size - 1):
            expected = 0.0
            for batch in batches:
                with torch.no_grad():
                    less, more = (
                        cross_entropy(scaled(model, axis.producers, index, 1 + sign * step), batch) for sign in (-1, 1)
                    )
                expected += abs(float(more - less)) / (2 * step) / len(batches)
            # central differences: step^2 times a third derivative, and rounding of 1e-16 / step
            assert float(scores[axis.name][index]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def linear() -> tuple[nn.Module, AxisGraph, list[Tensor], Callable[[nn.Module, Tensor], Tensor]]:
    """A model and a loss that are linear in the producers of its one axis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return model, find_axes(model, batches[0][:1]), batches, lambda model, x: (model(x) * weights).sum()


def test_taylor_is_exact_where_the_loss_is_linear() -> None:
    model, axes, batches, loss = linear()
    (axis,) = axes
    scores = importance(model, axes, method="taylor", batches=batches, loss=loss)[axis.name]
    for index in range(axis.size):
        without = scaled(model, axis.producers, index, 0.0)
        expected = sum(abs(float((loss(without, x) - loss(model, x)).detach())) for x in batches) / len(batches)
        assert float(scores[index]) == pytest.approx(expected, rel=1e-12)


def test_fisher_is_half_the_sum_of_squared_gradients_times_squared_weights() -> None:
    model, axes, batches = built("vit")
    found = importance(model, axes, method="fisher", batches=batches)
    expected = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for axis in axes:
            for member in axis.producers:
                parameter = dict(model.named_parameters())[member.parameter]
                squares = (parameter * parameter.grad).detach().square()
                for index in range(axis.size):
                    expected[axis.name][index] += (
                        squares.index_select(member.dim, member.positions[index]).sum() / 2 / len(batches)
                    )
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=1e-20)


def test_group_norm_is_the_norm_of_all_slices() -> None:
    model, axes, _ = built("resnet_basic")
    found = importance(model, axes, method="group_norm", normalize="none")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for axis in axes:
        members = [m for m in axis.members if m.parameter in parameters]
        for index in range(axis.size):
            slices = [parameters[m.parameter].index_select(m.dim, m.positions[index]).flatten() for m in members]
            assert float(found[axis.name][index]) == pytest.approx(float(torch.cat(slices).norm()), rel=1e-10)
    relative = importance(model, axes, method="group_norm")
    for name, score in relative.items():
        torch.testing.assert_close(score, found[name] / found[name].mean())


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "convnext"])
def test_scores_follow_a_permutation(family: str) -> None:
    """Exchanging the indices of an axis everywhere leaves the function as it is and exchanges its scores."""
    model, axes, batches = built(family)
    before = {m: importance(model, axes, method=m, batches=batches, loss=cross_entropy) for m in DETERMINISTIC}
    generator = torch.Generator().manual_seed(0)
    for axis in [axis for axis in axes if axis.is_exact][:4]:
        order = torch.randperm(axis.size, generator=generator)
        other = copy.deepcopy(model)
        tensors = tensors_of(other)
        with torch.no_grad():
            for member in axis.members:
                tensor = tensors[member.parameter]
                moved = tensor.index_select(member.dim, member.positions[order].flatten())
                tensor.index_copy_(member.dim, member.positions.flatten(), moved)
        for method in DETERMINISTIC:
            after = importance(other, axes, method=method, batches=batches, loss=cross_entropy)
            for name, score in after.items():
                expected = before[method][name][order] if name == axis.name else before[method][name]
                # sums in another order: float64 rounding, on numbers that cancel within a sum
                scale = float(expected.abs().max())
                torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-9 * scale + 1e-18)


@pytest.mark.parametrize("family", ["resnet_basic", "vit"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_dead_indices_score_zero(family: str, method: str) -> None:
    model, axes, batches = built(family)
    for axis in axes:
        model = scaled(model, axis.members if method in ("magnitude", "group_norm") else axis.producers, 1, 0.0)
    scores = importance(model, axes, method=method, batches=batches)
    for score in scores.values():
        assert float(score[1]) == 0 and (score >= 0).all()


def test_scores_scale_with_the_loss_and_the_weights() -> None:
    model, axes, batches = built("resnet_basic")
    for method, power in (("taylor", 1), ("fisher", 2)):
        once = importance(model, axes, method=method, batches=batches)
        thrice = importance(model, axes, method=method, batches=batches, loss=lambda m, b: -3 * loss_of(m, b))
        for name, score in once.items():
            torch.testing.assert_close(thrice[name], 3**power * score, rtol=1e-9, atol=0)
    norms, magnitudes = importance(model, axes, method="group_norm", normalize="none"), magnitude_scores(model, axes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for name, score in importance(model, axes, method="group_norm", normalize="none").items():
        torch.testing.assert_close(score, 3 * norms[name])
    for name, score in magnitude_scores(model, axes).items():
        torch.testing.assert_close(score, magnitudes[name])


@pytest.mark.parametrize("method", METHODS)
def test_normalisations_divide_each_axis(method: str) -> None:
    model, axes, batches = built("resnet_basic")
    plain = importance(model, axes, method=method, batches=batches, normalize="none")
    for normalize, unit in (("mean", Tensor.mean), ("max", Tensor.max)):
        for name, score in importance(model, axes, method=method, batches=batches, normalize=normalize).items():
            assert float(unit(score)) == pytest.approx(1)
            assert torch.equal(score.argsort(), plain[name].argsort())
    for name, score in plain.items():
        assert score.shape == (axes[name].size,) and score.dtype == torch.float64 and score.device.type == "cpu"


def test_random_scores_follow_the_seed_and_nothing_else() -> None:
    model, axes, _ = built("resnet_basic")
    state = torch.get_rng_state()
    first, again, other = (importance(model, axes, method="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in axes.axes:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


# -- no trace -----------------------------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """A convolution whose values pass a frozen norm, as in the backbones of DETR: its shift is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        norm = transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


@pytest.mark.parametrize("method", FROM_GRADIENTS)
def test_producers_in_buffers_count(method: str) -> None:
    torch.manual_seed(0)
    model = FrozenNorm().double()
    model.layers[1].bias.fill_(2.0)
    axes = find_axes(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    axis = next(axis for axis in axes if axis.size == 6)
    assert "layers.1.bias" in {member.parameter for member in axis.producers}
    batch = {"x": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    with_shift = importance(model, axes, method=method, batches=[batch])[axis.name]
    assert not model.layers[1].bias.requires_grad and (with_shift > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model, axes, batches = built("resnet_basic")
    model.train()
    model.resnet.embedder.eval()
    names = [name for name, _ in model.named_parameters()]
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, 7.0) if i % 2 else None
    before = {name: (t.clone(), t.requires_grad, t.grad) for name, t in tensors_of(model).items()}
    modes = [module.training for module in model.modules()]
    identities = [id(parameter) for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():  # as a Trainer's callback may be called
        importance(model, axes, method=method, batches=batches)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities and [n for n, _ in model.named_parameters()] == names
    for name, tensor in tensors_of(model).items():
        values, requires_grad, gradient = before[name]
        assert torch.equal(tensor, values) and tensor.requires_grad == requires_grad and tensor.grad is gradient
        assert gradient is None or bool((gradient == 7).all())


@pytest.mark.parametrize("method", FROM_GRADIENTS)
def test_a_failing_batch_leaves_the_model_as_it_was(method: str) -> None:
    model, axes, batches = built("vit")
    model.train().requires_grad_(False)
    with pytest.raises(ModelError, match="batch 2"):
        importance(model, axes, method=method, batches=[batches[0], {"pixels": 1}])
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_half_precision_gives_finite_scores() -> None:
    model, axes, batches = built("vit")
    exact = importance(model, axes, method="taylor", batches=batches)
    model.bfloat16()
    half = [{**batch, "pixel_values": batch["pixel_values"].bfloat16()} for batch in batches]
    for name, score in importance(model, axes, method="taylor", batches=half).items():
        assert torch.isfinite(score).all()
        # bfloat16 keeps 8 bits, and a score is a sum of numbers that cancel
        assert torch.corrcoef(torch.stack([score, exact[name]]))[0, 1] > 0.9 or axes[name].size < 4


# -- batches ------------------------------------------------------------------------------------------------------


def test_any_iterable_of_batches_will_do() -> None:
    model, axes, batches = built("vit")
    items = [
        {"pixel_values": image, "labels": label}
        for batch in batches
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]
    loader: Any = torch.utils.data.DataLoader(items, batch_size=2, collate_fn=transformers.default_data_collator)
    expected = importance(model, axes, method="taylor", batches=batches)
    features = [transformers.BatchFeature(batch) for batch in batches]
    for other in (loader, tuple(batches), (batch for batch in batches), features):
        for name, score in importance(model, axes, method="taylor", batches=other).items():
            torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-15)
    one = importance(model, axes, method="taylor", batches=batches[0])
    for name, score in importance(model, axes, method="taylor", batches=batches[:1]).items():
        assert torch.equal(score, one[name])


def test_without_labels_the_predictions_are_the_labels() -> None:
    model, axes, batches = built("vit")
    own = {**batches[0], "labels": model(pixel_values=batches[0]["pixel_values"]).logits.argmax(1)}
    expected = importance(model, axes, method="taylor", batches=[own])
    found = importance(model, axes, method="taylor", batches=[{"pixel_values": own["pixel_values"]}])
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-15)


def wrong(model: nn.Module, batch: Any) -> Tensor:
    return torch.zeros(2)


def infinite(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss / 0


def detached(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss.detach()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "tailor"}, MethodError, "'taylor'"),
        ({"method": "taylor"}, MethodError, "need batches"),
        ({"method": "fisher", "batches": []}, DataError, "empty"),
        ({"method": "fisher", "batches": iter(())}, DataError, "empty"),
        ({"method": "fisher", "batches": 3}, DataError, "iterable of dicts"),
        ({"method": "fisher", "batches": "train"}, DataError, "iterable of dicts"),
        ({"method": "fisher", "batches": [torch.zeros(1, 3, 32, 32)]}, DataError, "must be a dict"),
        ({"method": "taylor", "batches": [{"pixels": 1}]}, ModelError, "failed on batch 1"),
        ({"method": "taylor", "batches": None, "normalize": "median"}, MethodError, "batches"),
        ({"method": "random", "normalize": "median"}, MethodError, "'median'"),
        ({"method": "taylor", "batches": "GOOD", "loss": wrong}, ModelError, r"one number in a tensor, got \(2,\)"),
        ({"method": "taylor", "batches": "GOOD", "loss": infinite}, ModelError, "loss of batch 1 is inf"),
        ({"method": "taylor", "batches": "GOOD", "loss": detached}, ModelError, "does not depend on the parameters"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[HfCompressError], message: str) -> None:
    model, axes, batches = built("vit")
    if arguments.get("batches") == "GOOD":
        arguments = {**arguments, "batches": batches}
    with pytest.raises(error, match=message):
        importance(model, axes, **arguments)


@pytest.mark.parametrize("method", FROM_GRADIENTS)
def test_a_gradient_that_is_not_finite_names_its_parameter(method: str) -> None:
    model, axes, batches = built("vit")

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    model.vit.layers[0].register_forward_hook(lambda module, args, output: Explode.apply(output))
    with pytest.raises(ModelError, match=r"gradient of 'vit.*' is not finite on batch 1"):
        importance(model, axes, method=method, batches=batches)


def test_weights_that_are_not_finite_are_named() -> None:
    model, axes, _ = built("vit")
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    for method in ("magnitude", "group_norm"):
        with pytest.raises(ModelError, match=r"mlp\.fc1\.weight"):
            importance(model, axes, method=method)


# -- pruning by them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_prune_takes_the_method_by_name(method: str) -> None:
    model, axes, batches = built("vit")
    x = batches[0]["pixel_values"]
    prune(model, scores=method, batches=batches, macs=0.6, example_inputs=x[:1])
    assert find_axes(model, x[:1]).macs <= 0.6 * axes.macs


def test_prune_refuses_before_it_looks_at_the_model() -> None:
    model, _ = FAMILIES["plain_cnn"]()  # which has no configuration to make example inputs from
    with pytest.raises(MethodError, match="batches"):
        prune(model, scores="taylor")


def test_taylor_tells_the_harmless_from_the_harmful() -> None:
    """Per axis, masking what it ranks lowest changes the loss less than masking what it ranks highest."""
    better = total = 0
    for family in ("resnet_basic", "vit", "convnext"):
        model, axes, batches = built(family)
        scores = importance(model, axes, method="taylor", batches=batches)
        with torch.no_grad():
            whole = sum(float(cross_entropy(model, batch)) for batch in batches)
            for axis in axes:
                order = scores[axis.name].argsort()
                changes = [
                    abs(
                        sum(float(cross_entropy(scaled(model, axis.producers, int(i), 0.0), b)) for b in batches)
                        - whole
                    )
                    for i in (order[0], order[-1])
                ]
                better += changes[0] < changes[1]
                total += 1
    assert better > 0.8 * total  # a coin would give half; the models are random and far from a minimum
