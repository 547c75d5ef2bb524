"""SiDT's detector: surgery on backbone and head, the loss, and everything that transformers expects."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import images, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import assert_close, assert_cut_equals_masked, random_keep
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

from hf_compress import Plan, find_axes, prune, shrink
from hf_compress.data import Scenes, detection_collator
from hf_compress.errors import DataError, ModelError
from hf_compress.measurement.detection import DetectionEvaluation, mean_average_precision
from hf_compress.models.pruned_vit import PrunedViTConfig
from hf_compress.models.sidt import SidtConfig, SidtForObjectDetection, SidtImageProcessor
from hf_compress.models.sidt.loss_sidt import Points, assign, corners, points_of

SIZE = 64
_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIZE, "patch_size": 8}
BACKBONES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "pruned_vit": lambda: PrunedViTConfig(intermediate_sizes=[40, 32], **_VIT),
    "vitdet": lambda: transformers.VitDetConfig(mlp_ratio=2, pretrain_image_size=SIZE, **_VIT),
    "dinov2": lambda: transformers.Dinov2Config(mlp_ratio=2, **_VIT),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=12, depths=[1, 1, 1], num_heads=[1, 2, 3], window_size=4,
        out_features=["stage1", "stage2", "stage3"],
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    ),
    "timm": lambda: transformers.TimmBackboneConfig(
        backbone="resnet10t", use_pretrained_backbone=False, out_indices=[1, 2, 3]
    ),
}  # fmt: skip


def configuration(backbone: str = "pruned_vit", **changes: object) -> SidtConfig:
    arguments = {"pyramid_channels": 24, "group_size": 4, "head_layers": 1, "num_labels": 5, **changes}
    return SidtConfig(backbone_config=BACKBONES[backbone](), **arguments)


def detector(backbone: str = "pruned_vit", **changes: object) -> SidtForObjectDetection:
    torch.manual_seed(0)
    return perturb(SidtForObjectDetection(configuration(backbone, **changes)))


def objects(*boxes: list[float], classes: list[int] | None = None) -> dict[str, Tensor]:
    """A label: boxes as centre and size, relative to the image."""
    numbers = classes if classes is not None else list(range(len(boxes)))
    return {
        "class_labels": torch.tensor(numbers, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


LABELS = [objects([0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.3, 0.2]), objects()]


def raw(output: object) -> SimpleNamespace:
    """Scores and boxes as one tensor, so that the law about logits covers both."""
    return SimpleNamespace(logits=torch.cat([output.logits, output.pred_boxes], dim=-1))  # type: ignore[attr-defined]


class Both(torch.nn.Module):
    """A detector whose ``logits`` hold the boxes too."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return raw(self.model(pixel_values))


# -- surgery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cut_equals_masked(backbone: str) -> None:
    model = detector(backbone).double()
    whole = Both(model).eval()
    graph = find_axes(whole, images(SIZE).double())
    assert not graph.without_rule
    keep = random_keep(graph, seed=3)
    for part in ("backbone", "neck", "head"):
        assert any(name.startswith(f"model.{part}") for name in keep), f"nothing of the {part} can be pruned"
    # every convolution of both towers, by whole groups
    assert {"model.head.classification.conv.0:groups", "model.head.regression.conv.0:groups"} <= set(keep)
    small = assert_cut_equals_masked(whole, graph, keep, images(SIZE).double())
    ours = shrink(copy.deepcopy(whole), Plan({n: mask.nonzero().flatten() for n, mask in keep.items()}, graph))
    with torch.no_grad():
        assert_close(ours(images(SIZE).double()).logits, small(images(SIZE).double()).logits)


@pytest.mark.parametrize("backbone", ["pruned_vit", "swin"])
def test_a_pruned_detector_is_saved_loaded_and_trained(backbone: str, tmp_path: Path) -> None:
    model = detector(backbone)
    before = sum(p.numel() for p in model.parameters())
    prune(model, macs=0.6)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    with torch.no_grad():
        ours, theirs = model(images(SIZE)), loaded(images(SIZE))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.pred_boxes, theirs.pred_boxes)
    loss = loaded.train()(images(SIZE), labels=LABELS).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in loaded.head.parameters())


# -- which point finds which object -------------------------------------------------------------------------------

# multiples of a power of two, which float32 adds and multiplies exactly: boundaries are then met, and no tolerance is needed
_SIDES = st.tuples(*[st.integers(0, 256).map(lambda n: n / 256) for _ in range(4)])
_RADII = st.integers(4, 24).map(lambda n: n / 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(_SIDES, min_size=0, max_size=6), _RADII)
def test_assignment_is_the_papers(sides: list[tuple[float, ...]], radius: float) -> None:
    """Against loops over points and objects that follow section 3.1 sentence by sentence."""
    size = 64.0
    boxes = torch.tensor([[min(a, b), min(c, d), max(a, b), max(c, d)] for a, b, c, d in sides]).reshape(-1, 4) * size
    points = points_of([torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)], (64, 64), object_range=3.0)
    found = assign(points, boxes, radius)
    for place, (x, y) in enumerate(points.centers.tolist()):
        stride = 8 if place < 64 else 16
        fitting = []
        for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            distances = (x - x1, y - y1, x2 - x, y2 - y)
            near = abs(x - (x1 + x2) / 2) < radius * stride and abs(y - (y1 + y2) / 2) < radius * stride
            of_level = max(distances) <= 24 if stride == 8 else max(distances) >= 24
            if min(distances) > 0 and near and of_level:
                fitting.append(((x2 - x1) * (y2 - y1), number))
        if not fitting:
            assert found[place] == -1
        else:  # equally small ones are equally good
            area = min(fitting)[0]
            assert found[place] >= 0
            chosen = next((a for a, number in fitting if number == int(found[place])), None)
            assert chosen == area


def test_a_box_is_where_its_distances_put_it() -> None:
    points = points_of([torch.zeros(1, 1, 2, 4)], (32, 32), object_range=8.0)
    assert points.centers[0].tolist() == [4.0, 8.0] and points.strides[0].tolist() == [8.0, 16.0]
    box = corners(torch.tensor([[0.5, 0.25, 1.0, 0.5]]), Points(*(part[:1] for part in points)))
    assert box.tolist() == [[0.0, 4.0, 12.0, 16.0]]


# -- the loss -----------------------------------------------------------------------------------------------------


def test_images_without_objects_and_broken_boxes_give_a_finite_loss() -> None:
    model = detector()
    none = model(images(SIZE), labels=[objects(), objects()])
    assert none.loss.isfinite() and none.loss_dict["loss_bbox"] == 0 == none.loss_dict["loss_centerness"]
    none.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    broken = objects([0.5, 0.5, 0.4, 0.3], [float("nan"), 0.1, 0.2, 0.2], [0.5, 0.5, 0.0, 0.3], [0.5, 0.5, -0.2, 0.3])
    fine = {name: value[:1] for name, value in broken.items()}
    assert model(images(SIZE), labels=[broken, objects()]).loss == model(images(SIZE), labels=[fine, objects()]).loss


def test_a_class_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(DataError, match="5 classes"):
        detector()(images(SIZE), labels=[objects([0.5, 0.5, 0.4, 0.3], classes=[5]), objects()])
    with pytest.raises(DataError, match="1 images and 2 images"):
        detector()(images(SIZE), labels=[objects()])


def test_half_precision_keeps_the_loss_in_float32() -> None:
    model = detector().train()
    expected = model(images(SIZE), labels=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(SIZE), labels=LABELS)
    assert output.loss.dtype == torch.float32 == output.logits.dtype
    # bfloat16 has 8 bits: features differ by about a hundredth
    assert abs(output.loss.item() - expected.loss.item()) < 0.05 * expected.loss.item()
    output.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("backbone", ["pruned_vit", "swin"])
def test_gradient_checkpointing_changes_no_gradient(backbone: str) -> None:
    model = detector(backbone).double().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(images(SIZE).double(), labels=LABELS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-12)  # the same float64 sums


def test_padding_changes_what_boxes_are_relative_to_and_nothing_else() -> None:
    model = detector()
    pixels = images(SIZE)
    mask = torch.zeros(2, SIZE, SIZE, dtype=torch.int64)
    mask[:, :48, :32] = 1
    with torch.no_grad():
        whole, padded = model(pixels), model(pixels, pixel_mask=mask)
    assert torch.equal(whole.logits, padded.logits)
    pixel = corners_of(whole.pred_boxes) * SIZE
    limit = torch.tensor([32.0, 48.0, 32.0, 48.0])
    # clamping twice, and a division and a multiplication in float32
    torch.testing.assert_close(corners_of(padded.pred_boxes) * limit, torch.minimum(pixel, limit), rtol=0, atol=1e-3)


def corners_of(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


# -- as transformers expects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_and_loaded_is_the_same(backbone: str, tmp_path: Path) -> None:
    model = detector(backbone)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SidtConfig)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is SidtForObjectDetection
    with torch.no_grad():
        ours, theirs = model(images(SIZE)), loaded(images(SIZE))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.pred_boxes, theirs.pred_boxes)
    as_tuple = model(images(SIZE), labels=LABELS, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0


def test_first_scores_are_the_prior_and_first_boxes_have_an_extent() -> None:
    torch.manual_seed(0)
    model = SidtForObjectDetection(configuration(prior_probability=0.02))
    assert torch.allclose(model.head.classification.cls_logits.bias.sigmoid(), torch.tensor(0.02))
    model.set_attn_implementation("eager")  # of the backbone: the others give no attention weights
    output = model.eval()(images(SIZE), output_hidden_states=True, output_attentions=True)
    assert abs(float(output.logits.sigmoid().pow(2).mean()) / 0.01 - 1) < 0.3  # sqrt(0.02 x 0.5), squared
    assert bool((output.pred_boxes[..., 2:] > 0).all())
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2


def test_other_image_sizes_and_one_example_alone() -> None:
    model = detector("resnet")
    with torch.no_grad():
        assert model(torch.randn(1, 3, 50, 94)).logits.shape[-1] == 5
        both = model(images(SIZE))
        one = model(images(SIZE)[:1])
    torch.testing.assert_close(both.logits[:1], one.logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_forward_pass_can_be_exported(tmp_path: Path) -> None:
    from hf_compress.export import export_onnx, onnx_runner

    model = detector()
    exported = torch.export.export(model, (images(SIZE),), strict=False).module()
    with torch.no_grad():
        expected = model(images(SIZE))
        again = exported(images(SIZE))
    assert torch.equal(again.logits, expected.logits) and torch.equal(again.pred_boxes, expected.pred_boxes)
    run = onnx_runner(export_onnx(Both(model), tmp_path / "detector.onnx", images(SIZE)))
    # float32 sums in another order
    torch.testing.assert_close(run(images(SIZE)), raw(expected).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_config": {"model_type": "no_such_model"}}, "no_such_model"),
        ({"backbone_config": {"hidden_size": 8}}, "model_type=None"),
        ({"backbone_config": transformers.BertConfig()}, "BertConfig"),
        ({"pyramid_channels": 20, "group_size": 8}, "pyramid_channels"),
        ({"pyramid_channels": 10**9}, "pyramid_channels"),
        ({"group_size": 0}, "group_size"),
        ({"pyramid_scales": []}, "pyramid_scales"),
        ({"pyramid_scales": [1, 2]}, "falling"),
        ({"pyramid_scales": [3]}, "pyramid_scales"),
        ({"head_layers": -1}, "head_layers"),
        ({"object_range": float("nan")}, "object_range"),
        ({"center_sampling_radius": 0}, "center_sampling_radius"),
        ({"prior_probability": 1.0}, "prior_probability"),
        ({"num_labels": 0}, "num_labels"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SidtConfig(**changes)


def test_feature_maps_of_one_size_are_no_pyramid() -> None:
    config = SidtConfig(backbone_config=PrunedViTConfig(out_features=["stage1", "stage2"], **_VIT), pyramid_channels=16)
    with pytest.raises(ModelError, match="out_features"):
        SidtForObjectDetection(config)(images(SIZE))


# -- images in, detections out ------------------------------------------------------------------------------------


def test_overlapping_detections_of_a_class_become_the_best_one() -> None:
    processor = SidtImageProcessor()
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.38], [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.0]]])
    probability = torch.full((1, 4, 2), 1e-4)
    probability[0, 0, 1], probability[0, 1, 1], probability[0, 2, 0], probability[0, 3, 0] = 0.8, 0.9, 0.7, 0.95
    output = SimpleNamespace(logits=torch.logit(probability), pred_boxes=boxes)
    (found,) = processor.post_process_object_detection(output, threshold=0.5, target_sizes=[(100, 200)])
    assert found["labels"].tolist() == [1, 0]  # other classes overlap freely; the box without a height is gone
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["boxes"][0], torch.tensor([60.0, 31.0, 140.0, 69.0]), rtol=0, atol=1e-3)
    (all_classes,) = processor.post_process_object_detection(output, threshold=0.75)
    assert all_classes["scores"].shape == (1,)
    with pytest.raises(DataError, match="target_sizes"):
        processor.post_process_object_detection(output, target_sizes=[(1, 1), (2, 2)])


def test_boxes_stay_relative_to_the_image_when_it_is_padded() -> None:
    processor = SidtImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    pictures = [np.zeros((32, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)]
    annotation = {"image_id": 0, "annotations": [{"bbox": [8, 8, 16, 16], "category_id": 0, "area": 9, "iscrowd": 0}]}
    batch = processor(images=pictures, annotations=[annotation, annotation], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 32, 64) and batch["pixel_mask"].sum((1, 2)).tolist() == [2048, 1024]
    assert batch["labels"][0]["boxes"].tolist() == [[0.25, 0.5, 0.25, 0.5]]
    assert batch["labels"][1]["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]


@pytest.mark.slow
def test_trainer_trains_evaluates_and_a_pipeline_in_a_new_process_finds_the_files(tmp_path: Path) -> None:
    scenes = Scenes("train", 8, size=SIZE, scale=(0.3, 0.5))
    processor = SidtImageProcessor(size={"height": SIZE, "width": SIZE})
    torch.manual_seed(0)
    model = SidtForObjectDetection(configuration(num_labels=10, id2label=scenes.id2label))
    evaluation = DetectionEvaluation(processor)
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=3, use_cpu=True, report_to=[],
        remove_unused_columns=False, eval_do_concat_batches=False, save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=scenes, eval_dataset=scenes, data_collator=detection_collator(processor, 10),
        compute_metrics=evaluation, preprocess_logits_for_metrics=evaluation.detections, processing_class=processor,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before and 0 <= after["eval_map"] <= after["eval_map_50"] <= 1
    trainer.save_model(tmp_path / "detector")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "detector")) is SidtImageProcessor
    scenes[0]["image"].resize((100, 80)).save(tmp_path / "scene.png")
    code = (
        "import sys, json, hf_compress\nfrom transformers import pipeline\n"
        f"found = pipeline('object-detection', model={str(tmp_path / 'detector')!r}, device='cpu')"
        f"({str(tmp_path / 'scene.png')!r}, threshold=0.001)\nprint(json.dumps(found))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "is not supported for object-detection" not in process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found and {"score", "label", "box"} == set(found[0]) and found[0]["label"] in scenes.names
    assert all(0 <= d["box"]["xmin"] <= d["box"]["xmax"] <= 100 and d["box"]["ymax"] <= 80 for d in found)


def test_it_learns_to_detect() -> None:
    """Four scenes by heart: a loss that pulled in a wrong direction anywhere could not get there."""
    scenes = Scenes("train", 4, size=SIZE, scale=(0.3, 0.5), items=(1, 3))
    processor = SidtImageProcessor(size={"height": SIZE, "width": SIZE})
    batch = detection_collator(processor, 10)([scenes[i] for i in range(4)])
    torch.manual_seed(0)
    model = SidtForObjectDetection(configuration(num_labels=10, pyramid_channels=32, group_size=8)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(**batch)
    sizes = [(SIZE, SIZE)] * 4
    found = processor.post_process_object_detection(output, threshold=0.05, target_sizes=sizes)
    targets = [
        {"boxes": corners_of(label["boxes"]) * SIZE, "labels": label["class_labels"]} for label in batch["labels"]
    ]
    assert mean_average_precision(found, targets)["map_50"] > 0.9


def _loss_of_my_image(folder: str) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    model = SidtForObjectDetection.from_pretrained(folder).double()
    mine = slice(state.process_index, state.process_index + 1)
    loss = model(images(SIZE)[mine].double(), labels=UNEVEN[mine]).loss.detach()
    torch.save(loss, Path(folder) / f"{state.process_index}.pt")


UNEVEN = [
    objects([0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.3, 0.2], [0.7, 0.8, 0.4, 0.3]),
    objects([0.4, 0.4, 0.2, 0.2]),
]


@pytest.mark.multi_process
def test_two_processes_share_one_loss(tmp_path: Path) -> None:
    """Images with many and with few objects: the mean of the processes' losses is the loss of their batches together."""
    model = detector().double()
    model.save_pretrained(tmp_path)
    whole = model(images(SIZE).double(), labels=UNEVEN).loss
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        f"from test_sidt import _loss_of_my_image\nfrom accelerate import debug_launcher\n"
        f"debug_launcher(_loss_of_my_image, ({str(tmp_path)!r},), num_processes=2)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    losses = torch.stack([torch.load(tmp_path / f"{i}.pt") for i in range(2)])
    assert losses[0] != losses[1]
    # the loss is summed in float32
    torch.testing.assert_close(losses.mean().float(), whole.detach().float(), rtol=1e-5, atol=0)
