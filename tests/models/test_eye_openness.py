"""The eye openness model: its objective to the last digit, sizes, labels that are missing, and all that the package can do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import perturb
from masking import assert_cut_equals_masked, random_keep
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, Trainer, TrainingArguments

from hf_compress import (
    FeatureAffinityDistillation,
    HfCompressConfig,
    Plan,
    export_onnx,
    find_axes,
    prune,
    quantize,
    shrink,
)
from hf_compress.errors import DataError, ModelError
from hf_compress.export import onnx_difference
from hf_compress.models.eye_openness import (
    DropDomainHead,
    EyeOpennessConfig,
    EyeOpennessForRegression,
    EyeOpennessImageProcessor,
    ReversalSchedule,
)
from hf_compress.models.eye_openness.loss_eye_openness import (
    binary_loss,
    interval_loss,
    kappa_of,
    link_logit,
    ranking_loss,
    raw_kappa,
    regression_loss,
    reversal_strength,
    reverse_gradient,
    rho,
)

NAN = float("nan")


def model(**settings: object) -> EyeOpennessForRegression:
    torch.manual_seed(0)
    return EyeOpennessForRegression(EyeOpennessConfig(**{"backbone": "nano", **settings}))


def eyes(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def gradients(net: EyeOpennessForRegression) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# -- the objective --------------------------------------------------------------------------------------------------


def test_rho_is_a_parabola_and_then_a_line() -> None:
    found = rho(torch.tensor([0, 0.02, 0.05, 0.10, 0.15, 0.20]), 0.05)
    torch.testing.assert_close(found, torch.tensor([0, 0.004, 0.025, 0.075, 0.125, 0.175]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("openness", "state", "loss", "sign"),
    [(0.50, 1, 0.0, 0), (0.05, 0, 0.0, 0), (0.30, 1, 0.125, -1), (0.32, 0, 0.175, 1)],
)
def test_the_interval_has_no_gradient_inside_and_pulls_towards_it_outside(
    openness: float, state: int, loss: float, sign: int
) -> None:
    s = torch.tensor([[openness]], requires_grad=True)
    found = interval_loss(s, torch.tensor([[state]]))
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    assert float(s.grad.sign()) == sign


def test_the_link_is_logistic_and_increasing() -> None:
    found = link_logit(torch.tensor([0, 0.28, 1]), 12.0, 0.28).sigmoid()
    torch.testing.assert_close(found, torch.tensor([0.03357, 0.5, 0.99982]), atol=1e-5, rtol=0)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for raw in (-100.0, 0.0, 20.0, 1e4):
        kappa = kappa_of(torch.tensor(raw, dtype=torch.float64))
        assert 4 <= float(kappa) <= 40
        assert bool((link_logit(grid, kappa, 0.28).diff() > 0).all())
    assert float(kappa_of(torch.tensor(raw_kappa(12.0)))) == pytest.approx(12, abs=1e-5)


def test_the_slope_of_the_link_stays_in_its_range_whatever_the_learning_rate() -> None:
    net = model(weak_objective="link")
    assert float(kappa_of(net.link_slope.detach())) == pytest.approx(12, abs=1e-4)
    assert float(net.link_place.detach().sigmoid()) == pytest.approx(0.28, abs=1e-6)
    optimizer = torch.optim.SGD([net.link_slope, net.link_place], lr=1.0)
    state = torch.tensor([[1], [0]] * 4)
    for _ in range(100):
        optimizer.zero_grad()
        net(eyes(8), eye_state=state).loss.backward()
        optimizer.step()
        assert 4 <= float(kappa_of(net.link_slope.detach())) <= 40


def test_ranking_wants_a_margin_between_the_classes() -> None:
    state = torch.tensor([[1], [0]])
    for opened, wanted in ((0.8, 0.0), (0.4, 0.1)):
        found = ranking_loss(torch.tensor([[opened], [0.2]]), state)
        assert float(found) == pytest.approx(wanted, abs=1e-6)
    s = torch.tensor([[0.4], [0.2]], requires_grad=True)
    loss = ranking_loss(s, torch.ones(2, 1, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0 and bool(s.grad.isfinite().all())


@pytest.mark.parametrize("objective", ["interval", "link", "bce"])
def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient(objective: str) -> None:
    net = model(weak_objective=objective, predict_uncertainty=True, loss_weights={"rank": 1.0})
    nothing = torch.full((4, 1), NAN)
    loss = net(eyes(4), openness=nothing, aperture_ratio=nothing, eye_state=torch.full((4, 1), -100)).loss
    assert loss.requires_grad and float(loss.detach()) == 0.0
    loss.backward()
    assert all(not bool(grad.any()) for grad in gradients(net).values())


def test_missing_labels_never_reach_the_gradient() -> None:
    openness = torch.tensor([[0.3], [NAN], [0.9], [NAN]], dtype=torch.float64)
    predicted = torch.tensor([[0.5], [0.2], [0.4], [0.7]], dtype=torch.float64, requires_grad=True)
    regression_loss(predicted, openness).backward()
    kept = predicted.detach()[[0, 2]].requires_grad_()
    regression_loss(kept, openness[[0, 2]]).backward()
    torch.testing.assert_close(predicted.grad[[0, 2]], kept.grad, atol=1e-7, rtol=0)
    assert not bool(predicted.grad[[1, 3]].any())


def test_a_missing_label_is_as_good_as_a_missing_image() -> None:
    net = model().eval()  # batch statistics would mix the images
    labels = torch.tensor([[0.3], [NAN], [0.9], [NAN]])
    net(eyes(4), openness=labels, aperture_ratio=0.4 * labels).loss.backward()
    whole = gradients(net)
    net.zero_grad()
    net(eyes(4)[[0, 2]], openness=labels[[0, 2]], aperture_ratio=0.4 * labels[[0, 2]]).loss.backward()
    for name, grad in gradients(net).items():
        torch.testing.assert_close(whole[name], grad, atol=1e-7, rtol=1e-4)  # float32 sums of other lengths


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_a_mixed_batch_is_the_weighted_sum_of_two_means_in_any_order(slack: float) -> None:
    net = model(loss_weights={"synthetic": 2.0, "weak": 0.5}, interval_slack=slack).eval()
    openness = torch.tensor([[0.3], [0.9], [NAN], [NAN], [NAN]])
    state = torch.tensor([[-100], [-100], [1], [0], [1]])
    images = eyes(5)
    found = net(images, openness=openness, eye_state=state)
    s = found.openness.detach()
    hinge = interval_loss(s[2:], state[2:], 0.12 + slack, 0.45 - slack)
    wanted = 2.0 * regression_loss(s[:2], openness[:2]) + 0.5 * hinge
    torch.testing.assert_close(found.loss.detach(), wanted, atol=1e-6, rtol=0)
    order = torch.tensor([3, 0, 4, 2, 1])
    other = net(images[order], openness=openness[order], eye_state=state[order]).loss
    torch.testing.assert_close(other, found.loss, atol=1e-6, rtol=0)


def test_sample_weights_weigh_within_each_mean() -> None:
    net = model().eval()
    openness = torch.tensor([[0.3], [0.9], [0.1]])
    weighted = net(eyes(3), openness=openness, sample_weight=torch.tensor([1.0, 0.0, 3.0])).loss
    repeated = net(eyes(3)[[0, 2, 2, 2]], openness=openness[[0, 2, 2, 2]]).loss
    torch.testing.assert_close(weighted, repeated, atol=1e-6, rtol=0)


def test_reversed_gradients() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reverse_gradient(x, 0.3), x)
    (reverse_gradient(x, 0.3) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * 2 * x.detach(), atol=1e-7, rtol=0)
    assert [reversal_strength(p) for p in (0, 0.5, 1)] == pytest.approx([0, 0.98661, 0.99991], abs=1e-5)


def test_the_domain_head_learns_and_the_trunk_unlearns() -> None:
    net = model(num_domains=2, loss_weights={"domain": 1.0, "synthetic": 0.0})
    domains, labels = torch.tensor([0, 0, 1, 1]), torch.full((4, 1), NAN)
    found = []
    for strength in (1.0, 2.0):
        net.zero_grad()
        net.adversarial_strength = strength
        net.eval()(eyes(4), openness=labels, domain_ids=domains).loss.backward()
        found.append(gradients(net))
    trunk, head = "backbone.layers.0.convolution.weight", "domain_hidden.weight"
    torch.testing.assert_close(2 * found[0][trunk], found[1][trunk])
    torch.testing.assert_close(found[0][head], found[1][head])
    with pytest.raises(ModelError, match="num_domains"):
        model(loss_weights={"domain": 1.0})
    assert sum(p.numel() for name, p in net.named_parameters() if name.startswith("domain")) == 24 * 64 + 64 + 64 + 1


def test_the_binary_control_is_cross_entropy() -> None:
    found = binary_loss(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[1], [0], [-100]]))
    assert float(found) == pytest.approx((math.log(2) + math.log1p(math.exp(2))) / 2, abs=1e-6)


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_eyes", [1, 2])
def test_shapes_and_ranges(num_eyes: int) -> None:
    net = model(num_eyes=num_eyes, predict_uncertainty=True).eval()
    found = net(eyes(2))
    for value in (found.openness, found.logits, found.aperture_ratio, found.open_probability, found.log_scale):
        assert value.shape == (2, num_eyes)
    for images in (1e4 * eyes(2), -1e4 * eyes(2), torch.zeros(2, 3, 32, 48)):
        s = net(images).openness
        assert bool(((s >= 0) & (s <= 1)).all())
    assert len(net(eyes(2), output_hidden_states=True).hidden_states) == 4
    assert isinstance(net(eyes(2), return_dict=False), tuple)


@pytest.mark.parametrize(("backbone", "params"), [("tiny", 249_905), ("tiny-pool", 139_313), ("nano", 7_953)])
def test_sizes(backbone: str, params: int) -> None:
    net = model(backbone=backbone, predict_aperture=False)
    assert sum(p.numel() for p in net.parameters()) == params
    with_domains = model(backbone="tiny", predict_aperture=False, num_domains=2, loss_weights={"domain": 0.05})
    assert sum(p.numel() for p in with_domains.parameters()) == 249_905 + 6_273


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backbone": "tiny-pool", "num_eyes": 2},
        {"num_domains": 3, "domain_batch_norm": True, "loss_weights": {"domain": 0.1}, "weak_objective": "link"},
        {"backbone": "timm/mobilenetv3_small_050"},
    ],
    ids=["nano", "two_eyes", "domains", "timm"],
)
def test_saved_and_loaded_is_bit_equal(settings: dict[str, object], tmp_path) -> None:
    net = perturb(model(**settings))
    net.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is EyeOpennessForRegression
    images = torch.rand(2, 3, *net.config.image_size)
    assert torch.equal(net(images).openness, again(images).openness)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == net.config.to_diff_dict()


def test_domains_have_statistics_of_their_own_and_merge_into_one() -> None:
    net = model(num_domains=2, domain_batch_norm=True).train()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    net(eyes(4), domain_ids=torch.tensor([1, 1, 1, 1]))
    after = net.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == (".norms.0." in name), name
    perturb(net)
    images = eyes(4)
    by_domain = net(images, domain_ids=torch.tensor([1, 0, 1, 1])).openness
    alone = net(images[[1]], domain_ids=torch.tensor([0])).openness
    torch.testing.assert_close(
        by_domain[[1]], alone, atol=1e-6, rtol=0
    )  # routed one by one, each by its own statistics
    merged = net.merge_domains()
    torch.testing.assert_close(merged(images).openness[[0, 2, 3]], by_domain[[0, 2, 3]], atol=1e-5, rtol=0)
    assert not any(".norms." in name for name in merged.state_dict())


def test_exposure_cannot_matter() -> None:
    net = perturb(model())
    images = 0.5 * eyes(3)
    torch.testing.assert_close(net(images).openness, net(images + 0.1).openness, atol=1e-5, rtol=0)
    flat = 1e-4 * eyes(3)  # contrast is kept where there is almost none
    with torch.no_grad():
        assert float((net(flat).openness - net(torch.zeros(3, 3, 32, 48)).openness).abs().max()) < 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "huge"}, {"num_eyes": 3}, {"closed_max": 0.5}, {"weak_objective": "hope"}, {"num_domains": 0},
        {"interval_slack": 0.17}, {"loss_weights": {"luck": 1.0}}, {"inference_domain": 1}, {"image_size": 2}, {"dropout": 1.0},
        {"backbone": "timm/resnet18", "domain_batch_norm": True},
        {"backbone": "timm/no_such_network"}, {"backbone": "timm/hf-hub:somebody/weights"},
        {"backbone": "timm/resnet18", "backbone_kwargs": {"pretrained": True}},
        {"backbone": "timm/vit_tiny_patch16_224", "image_size": 224},
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"EyeOpennessConfig|dimensions"):
        model(**settings)


def test_images_and_domains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="3x32x48"):
        model()(torch.rand(2, 3, 24, 48))
    with pytest.raises(DataError, match="num_domains"):
        model(num_domains=2)(eyes(2), domain_ids=torch.tensor([0, 2]))


# -- what the package can do with it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["nano", "tiny", "tiny-pool"])
def test_every_axis_is_exact_and_cutting_is_masking(backbone: str) -> None:
    net = perturb(model(backbone=backbone, num_domains=2, domain_batch_norm=True, loss_weights={"domain": 0.1}))
    axes = find_axes(net)
    assert len(axes) == len(net.backbone.layers) + 2  # the head's and the domain head's hidden units
    assert all(axis.is_exact for axis in axes) and not axes.without_rule
    net = net.double()
    assert_cut_equals_masked(net, axes, random_keep(axes, 0), eyes(2).double())


def test_a_pruned_model_still_trains_on_both_domains(tmp_path) -> None:
    net = model(num_domains=2, domain_batch_norm=True, loss_weights={"domain": 0.1})
    axes = find_axes(net)
    shrink(net, Plan({axis.name: tuple(range(0, axis.size, 2)) for axis in axes}, axes))
    found = net.train()(eyes(4), openness=torch.rand(4, 1), domain_ids=torch.tensor([0, 1, 0, 1]))
    found.loss.backward()
    net.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(eyes(4)).openness, net(eyes(4)).openness)


def test_it_is_exported_with_a_free_batch_and_quantized(tmp_path) -> None:
    net = perturb(model(backbone="tiny"))
    prune(net, macs=0.25)
    assert find_axes(net).macs <= 0.25 * find_axes(model(backbone="tiny")).macs
    path = export_onnx(net, tmp_path / "model.onnx", check_inputs={"pixel_values": eyes(32)})
    for batch in (1, 7):
        assert onnx_difference(net, path, eyes(batch)) <= 1e-4
    quantize(net, HfCompressConfig(weights=4))
    net.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(eyes(2)).openness, net(eyes(2)).openness, atol=1e-6, rtol=0)


def test_it_learns_under_the_ordinary_trainer(tmp_path) -> None:
    """Openness is the height of a dark band, which nano has to learn in 60 steps."""
    generator = torch.Generator().manual_seed(0)
    openness = torch.rand(256, generator=generator)
    rows = torch.linspace(-1, 1, 32)[None, :, None].expand(256, 32, 48)
    images = 0.8 - 0.6 * (rows.abs() < openness[:, None, None]).float()
    images = images[:, None].expand(-1, 3, -1, -1) + 0.05 * torch.randn(256, 3, 32, 48, generator=generator)
    data = [{"pixel_values": image, "openness": y[None]} for image, y in zip(images, openness, strict=True)]
    net = model(num_domains=1)

    def loss() -> float:
        with torch.no_grad():
            return float(net.eval()(images, openness=openness).loss)

    before = loss()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=64, learning_rate=4e-3, seed=0,
        remove_unused_columns=False, report_to="none", save_strategy="no", use_cpu=True, logging_strategy="no",
        label_names=["openness"],
    )  # fmt: skip
    trainer = Trainer(net, arguments, train_dataset=data, eval_dataset=data, callbacks=[ReversalSchedule()])
    trainer.train()
    assert net.adversarial_strength == pytest.approx(reversal_strength(59 / 60))
    assert loss() <= 0.5 * before
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss(), abs=1e-5)


def test_the_domain_head_of_a_student_is_scheduled_and_taken_out(tmp_path) -> None:
    """Trainer's model is the pair of student and teacher then, and has neither."""
    student = model(num_domains=2, loss_weights={"domain": 0.05})
    pair = FeatureAffinityDistillation(student, model(), affinity_weight=0.0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    data = [{"pixel_values": image} for image in eyes(8)]
    Trainer(pair, arguments, train_dataset=data, callbacks=[ReversalSchedule(), DropDomainHead()]).train()
    assert student.adversarial_strength == pytest.approx(reversal_strength(1 / 2))
    assert not any("domain" in name for name in student.state_dict())


# -- images in -------------------------------------------------------------------------------------------------------


def picture(width: int = 160, height: int = 120) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def test_a_right_eye_is_the_left_eye_of_the_mirrored_picture(tmp_path) -> None:
    processor, image = EyeOpennessImageProcessor(), picture()
    left, right = (110.5, 55.0), (52.25, 61.0)
    found = processor(image, eyes=[[left, right]], return_tensors="pt")["pixel_values"]
    mirrored = [[(image.width - right[0], right[1]), (image.width - left[0], left[1])]]
    other = processor(ImageOps.mirror(image), eyes=mirrored, return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, 32, 48) and float(found.max()) <= 1
    assert torch.equal(found[1], other[0]) and torch.equal(found[0], other[1])
    processor.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EyeOpennessImageProcessor


@pytest.mark.parametrize("angle", [0.0, 0.4, -0.3])
def test_a_turned_face_gives_the_same_crop(angle: float) -> None:
    """A dark ellipse along the line of the eyes, at the left eye: upright and in the middle of the crop, whatever the angle."""
    scale, distance = 4, 80.0
    right = np.array([60.0, 90.0])
    left = right + distance * np.array([math.cos(angle), math.sin(angle)])
    y, x = np.mgrid[: 180 * scale, : 200 * scale] / scale
    along = (x - left[0]) * math.cos(angle) + (y - left[1]) * math.sin(angle)
    across = -(x - left[0]) * math.sin(angle) + (y - left[1]) * math.cos(angle)
    inside = (along / 18) ** 2 + (across / 7) ** 2 < 1
    image = Image.fromarray(np.where(inside[..., None], 20, 220).astype(np.uint8).repeat(3, -1)).reduce(scale)
    crop = EyeOpennessImageProcessor()(image, eyes=[[left, right]], return_tensors="np")["pixel_values"][0, 0]
    step = 0.65 * distance / 48  # pixels of the picture in one of the crop
    v, u = np.mgrid[:32, :48]
    wanted = ((u + 0.5 - 24) * step / 18) ** 2 + ((v + 0.5 - 16) * step / 7) ** 2 < 1
    assert np.mean((crop < 0.47) == wanted) > 0.98  # the rim of the ellipse is 3 % of the pixels


def test_crops_that_cannot_be_judged_are_refused() -> None:
    processor = EyeOpennessImageProcessor()
    with pytest.raises(DataError, match="too small"):
        processor(Image.new("RGB", (1, 1)))
    with pytest.raises(DataError, match="too small"):
        processor(picture(), eyes=[[(60.0, 60.0), (55.0, 60.0)]])
    with pytest.raises(DataError, match="hidden"):
        processor(picture(), eyes=[[(NAN, NAN), (55.0, 60.0)]])
    with pytest.raises(DataError, match="outside"):
        processor(picture(), eyes=[[(190.0, 60.0), (55.0, 60.0)]])
    with pytest.raises(DataError, match="NaN"):
        processor(np.full((3, 32, 48), NAN, dtype=np.float32))
    with pytest.raises(DataError, match="no face"):
        processor(picture(), eyes=np.zeros((0, 2, 2)))
    with pytest.raises(DataError, match="2 pictures"):
        processor([picture(), picture()], eyes=[[(110.0, 60.0), (55.0, 60.0)]])
