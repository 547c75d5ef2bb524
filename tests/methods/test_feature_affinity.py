"""A student under its teacher with the stock Trainer: what is trained, saved, logged, resumed, and refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from distillation_run import SIZE, distributed, lenet, resnet, trained, vit
from slimming_training import Images, largest_difference, make_trainer, weights

from hf_compress.axes import find_axes
from hf_compress.distillation import feature_affinity
from hf_compress.errors import MethodError, ModelError
from hf_compress.hub import HfCompressConfig
from hf_compress.methods import (
    ArchitectureSearchCallback,
    DistillationCallback,
    FeatureAffinityDistillation,
    GrowingRegularizationCallback,
    NetworkSlimmingCallback,
    QuantizationAwareTrainingCallback,
    SparseGroupCallback,
    WidthSearchCallback,
    report_first,
)
from hf_compress.quantization import quantization_of
from hf_compress.surgery import prune

IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
Load = transformers.AutoModelForImageClassification.from_pretrained


# -- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_parts():
    student, teacher = resnet(0), resnet(1, widths=(16, 24))
    model = FeatureAffinityDistillation(
        student, teacher, kd_weight=0.5, affinity_weight=3.0, label_weight=0.25, fast=False, norm="l1", features=[1, 2]
    ).eval()
    labels = torch.tensor([1, 4, 2])
    found = model(IMAGES, labels=labels)
    ours = student(IMAGES, labels=labels, output_hidden_states=True)
    theirs = teacher(IMAGES, output_hidden_states=True)
    expected = 0.5 * (ours.logits - theirs.logits).square().mean() + 0.25 * ours.loss
    for stage in (1, 2):
        maps = (states.hidden_states[stage].flatten(2).mT for states in (ours, theirs))
        expected = expected + 3.0 * feature_affinity(*maps, "l1")
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.logits, ours.logits) and set(found) == {"loss", "logits"}


def test_evaluation_is_deterministic_and_training_is_not():
    model = FeatureAffinityDistillation(resnet(0), resnet(1), kd_weight=0)
    state = torch.get_rng_state()
    assert model.eval()(IMAGES).loss == model(IMAGES).loss and torch.equal(state, torch.get_rng_state())
    assert model.train()(IMAGES).loss != model(IMAGES).loss


def test_a_student_in_half_precision_has_a_float_loss():
    model = FeatureAffinityDistillation(vit(0).to(torch.bfloat16), vit(1), teacher_dtype="bfloat16").train()
    loss = model(IMAGES).loss
    assert loss.dtype == torch.float32 and next(model.teacher.parameters()).dtype == torch.bfloat16
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for is_on in (False, True):
        student = vit(0)
        model = FeatureAffinityDistillation(student, vit(1), kd_weight=0, features=[1, "vit.layernorm"]).train()
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant}) if hasattr(
                model, "activation_checkpointing_enable"
            ) else model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model(IMAGES.clone().requires_grad_()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert largest_difference(*gradients) < 1e-6  # reentrant checkpoints sum gradients in another order


# -- which features -----------------------------------------------------------------------------------------------

PAIRS = {
    "equal": (lambda: resnet(0), lambda: resnet(1), None, [(1, 1), (2, 2)]),
    "deeper teacher": (lambda: vit(0, layers=3), lambda: vit(1, layers=6), None, [(1, 2), (2, 4), (3, 6)]),
    "at most four": (lambda: vit(0, layers=8), lambda: vit(1, layers=8), None, [(2, 2), (4, 4), (6, 6), (8, 8)]),
    "patches and maps": (lambda: vit(0, layers=2), lambda: resnet(1), None, [(1, 1), (2, 2)]),
    "maps and patches": (lambda: resnet(0), lambda: vit(1, layers=2), None, [(1, 1), (2, 2)]),
    "other patches": (lambda: vit(0, patch=16), lambda: vit(1), [-1], [(-1, -1)]),
    "names": (
        lambda: resnet(0), lambda: vit(1), [("resnet.encoder.stages.1", "vit.layernorm"), ("resnet.embedder", 0)],
        [("resnet.encoder.stages.1", "vit.layernorm"), ("resnet.embedder", 0)],
    ),
    "a number": (lambda: lenet(0), lambda: lenet(1), 1, [(1, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("resizing", ["pool", "interpolate"])
@pytest.mark.parametrize("case", PAIRS)
def test_features_of_any_kind_are_matched(case, resizing):
    student, teacher, features, expected = PAIRS[case]
    model = FeatureAffinityDistillation(student(), teacher(), features=features, resizing=resizing, adaptors=True)
    assert model.pairs == expected
    model.train()(IMAGES).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.student.parameters())


def test_a_teacher_that_is_the_student_costs_nothing():
    """Whatever the layout of its maps; Swin has tokens, and as a backbone maps."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
    )
    swin = transformers.SwinForImageClassification(config)
    for student in (resnet(0), vit(0), swin):
        model = FeatureAffinityDistillation(student, copy.deepcopy(student)).eval()
        assert model(IMAGES).loss.item() < 1e-9


def test_class_tokens_are_left_out_where_sizes_differ():
    """A teacher whose patches are the student's four times: only patches take part, in their places."""
    from hf_compress.distillation.features import as_pixels, matched

    grid = torch.arange(16.0).view(1, 4, 4, 1).expand(2, 4, 4, 3)
    tokens = torch.cat([torch.full((2, 1, 3), 99.0), grid.flatten(1, 2)], dim=1)
    maps = grid.permute(0, 3, 1, 2)
    assert (
        as_pixels(tokens, (32, 32)).grid == as_pixels(maps, (32, 32)).grid == as_pixels(grid, (32, 32)).grid == (4, 4)
    )
    assert torch.equal(as_pixels(maps, (32, 32)).tokens, as_pixels(grid, (32, 32)).tokens)
    for other in (maps, grid):
        assert torch.equal(*matched(tokens, other, (32, 32), "pool", (0, 0)))
    small = torch.nn.functional.avg_pool2d(maps, 2)
    ours, theirs = matched(small, tokens, (32, 32), "pool", (0, 0))
    assert torch.equal(ours, theirs)
    ours, theirs = matched(small, tokens, (32, 32), "interpolate", (0, 0))  # corners are aligned
    assert torch.equal(theirs[0, [0, -1], 0], torch.tensor([0.0, 15.0]))
    wide = torch.zeros(1, 1 + 2 * 6, 3)
    assert as_pixels(wide, (16, 48)).grid == (2, 6) and as_pixels(wide, (32, 32)).grid == (3, 3)


# -- what is trained and saved ----------------------------------------------------------------------------------


def test_only_the_student_is_trained_counted_and_saved(tmp_path):
    student, teacher = resnet(0), resnet(1, widths=(16, 24))
    before, teachers = weights(student), weights(teacher)
    count = student.num_parameters()
    trainer = trained(student, teacher, tmp_path, save_strategy="steps", save_steps=3)
    model = trainer.model
    assert {id(p) for p in model.parameters()} == {id(p) for p in student.parameters()}
    assert model.num_parameters() == count and model.state_dict().keys() == before.keys()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in student.parameters()}
    assert largest_difference(weights(teacher), teachers) == 0 and not teacher.training
    assert largest_difference(weights(student), before) > 0
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-3"):
        again, report = Load(folder, output_loading_info=True)
        assert type(again) is type(student) and not any(report.values())
        assert again.config.to_dict() == Load(folder).config.to_dict() and again.num_parameters() == count
    assert largest_difference(weights(Load(tmp_path / "saved")), weights(student)) == 0


def test_labels_are_not_read(tmp_path):
    """Without labels in the data, with the right ones and with wrong ones: the same weights, bit by bit."""

    class Unlabelled(Images):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return {"pixel_values": item["pixel_values"]}

    class Wrong(Images):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "labels": (i * 5 + 3) % 7}

    found = []
    for data in (Images, Wrong, Unlabelled):
        student = resnet(0)
        model = FeatureAffinityDistillation(student, resnet(1))
        trainer = make_trainer(model, [], tmp_path, size=SIZE, max_steps=2)
        trainer.train_dataset = data(SIZE)
        trainer.train()
        found.append(weights(student))
    assert largest_difference(found[0], found[1]) == largest_difference(found[0], found[2]) == 0


def test_the_teacher_comes_from_its_own_path(tmp_path):
    teacher = resnet(1, widths=(16, 24))
    teacher.save_pretrained(tmp_path / "teacher")
    student, path = resnet(0), tmp_path / "teacher"
    models = [FeatureAffinityDistillation(student, t).eval() for t in (teacher, path, str(path))]
    assert len({model(IMAGES).loss.item() for model in models}) == 1


@pytest.mark.parametrize("build", [resnet, vit], ids=["resnet", "vit"])
def test_interrupted_run_ends_in_the_same_weights(build, tmp_path):
    """Bit by bit, with dropout, fresh projections, adaptors and four-bit weights: all of it comes from the checkpoint."""
    settings = {"adaptors": True, "label_weight": 0.1}
    arguments = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 3, "lr_scheduler_type": "linear"}
    dropout = {"hidden_dropout_prob": 0.1} if build is vit else {}

    def run(folder, **more):
        student = build(0, **dropout)
        callback = QuantizationAwareTrainingCallback(weights=4)
        trained(student, build(1), folder, [callback], settings, **arguments, **more)
        return student

    expected = weights(run(tmp_path))
    resumed = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(resumed), expected) == 0
    assert not any("hf_compress_adaptors" in name for name in expected)


def test_micro_batches_sum_to_a_batch(tmp_path):
    found = []
    for accumulated in (1, 2):
        student = lenet(0)
        # the exact loss: projections of micro-batches are drawn anew
        trained(
            student, lenet(1), tmp_path, settings={"fast": False}, max_steps=3,
            per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        found.append(weights(student))
    assert largest_difference(*found) < 1e-6  # float32 sums in another order


def test_a_loop_of_accelerate_trains_the_student_alone(tmp_path):
    from accelerate import Accelerator

    student, teacher = resnet(0), resnet(1)
    before, teachers = weights(student), weights(teacher)
    accelerator = Accelerator(cpu=True)
    model = FeatureAffinityDistillation(student, teacher)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = model.train()(pixel_values=IMAGES).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and largest_difference(weights(student), before) > 0
    assert largest_difference(weights(teacher), teachers) == 0
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "saved", state_dict=accelerator.get_state_dict(model))
    assert largest_difference(weights(Load(tmp_path / "saved")), weights(student)) == 0


@pytest.mark.multi_process
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    output, script = tmp_path / "result", Path(__file__).with_name("distillation_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    paths = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, str(output)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(f"{output}.{rank}") for rank in range(2)]
    expected = distributed(tmp_path / "one", batch=8)
    for result in found:
        assert largest_difference(result["weights"], expected["weights"]) < 2e-6  # float32 sums in another order
        for parts, others in zip(result["parts"], expected["parts"], strict=True):
            assert parts == pytest.approx(others, rel=1e-5)
    assert largest_difference(found[0]["weights"], found[1]["weights"]) == 0


# -- with other methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4])
def test_a_low_bit_student_of_a_pruned_network(bits, tmp_path):
    student, teacher = resnet(0), resnet(1)
    prune(student, macs=0.5, example_inputs={"pixel_values": IMAGES[:1]})
    float_bytes = sum(p.nbytes for p in student.parameters())
    trainer = trained(student, teacher, tmp_path, [QuantizationAwareTrainingCallback(weights=bits)], max_steps=2)
    assert all(type(m) is torch.nn.Conv2d for m in teacher.modules() if "Conv2d" in type(m).__name__)
    assert quantization_of(student).layers and quantization_of(teacher) is None
    trainer.save_model(str(tmp_path / "saved"))
    again = Load(tmp_path / "saved")
    assert isinstance(again.config.quantization_config, HfCompressConfig) and again.config.quantization_config.record
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES).logits, student.eval()(IMAGES).logits)
    held = sum(t.nbytes for t in (m.weight for m in student.modules() if isinstance(m, torch.nn.Conv2d)))
    saved = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert held > float_bytes / 2 and saved < float_bytes


@pytest.mark.parametrize(
    "method",
    [
        lambda: NetworkSlimmingCallback("l1", 0.05, example_inputs=IMAGES[:1]),
        lambda: SparseGroupCallback("l0", strength=1e-3, split=0.1, example_inputs=IMAGES[:1]),
        lambda: GrowingRegularizationCallback({"macs": 0.6}, example_inputs=IMAGES[:1]),
    ],
    ids=["slimming", "sparse_group", "growing"],
)
def test_methods_act_on_the_student(method, tmp_path):
    student, teacher = resnet(0), resnet(1)
    callback = method()
    trained(student, teacher, tmp_path, [callback], settings={"adaptors": True}, max_steps=2)
    scores = callback.scores(student)
    graph = find_axes(student, {"pixel_values": IMAGES[:1]})
    assert scores.keys() <= {axis.name for axis in graph} and not any("student" in name for name in scores)
    assert not any("hf_compress" in name for name in student.state_dict())


# -- logs -------------------------------------------------------------------------------------------------------------


def test_every_part_is_logged_and_reported(tmp_path):
    seen = []

    class Reporter(transformers.integrations.TensorBoardCallback):
        def __init__(self):
            pass

        def on_init_end(self, *args, **kwargs): ...
        def on_train_begin(self, *args, **kwargs): ...
        def on_train_end(self, *args, **kwargs): ...

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    settings = {"label_weight": 0.5}
    model = FeatureAffinityDistillation(resnet(0), resnet(1), **settings)
    trainer = make_trainer(
        model, [Reporter(), DistillationCallback()], tmp_path, size=SIZE, max_steps=4, logging_steps=2,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    report_first(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry, reported in zip(entries, [logs for logs in seen if "loss" in logs], strict=True):
        parts = [entry[name] for name in ("kd_loss", "affinity_loss", "label_loss")]
        assert sum(parts) == pytest.approx(entry["loss"], rel=1e-5) and all(part > 0 for part in parts)
        assert 10 * (entry["affinity/1"] + entry["affinity/2"]) == pytest.approx(entry["affinity_loss"], rel=1e-5)
        assert {"kd_loss", "affinity_loss", "label_loss", "affinity/1", "affinity/2"} <= reported.keys()
    assert not any("kd_loss" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_the_callback_refuses_another_model(tmp_path):
    with pytest.raises(MethodError, match=r"ResNetForImageClassification.*FeatureAffinityDistillation\(student"):
        make_trainer(resnet(0), [DistillationCallback()], tmp_path, size=SIZE)


# -- bad input --------------------------------------------------------------------------------------------------------


def broken(value: float):
    model = resnet(0)
    with torch.no_grad():
        model.classifier[1].weight[2, 3] = value
    return model


def frozen():
    return resnet(0).requires_grad_(False)


SHARED = resnet(0)
CASES = {
    "classes": (resnet, lambda: resnet(1, num_labels=5), {}, MethodError, ["7 classes", "5", "kd_weight=0"]),
    "order of classes": (
        lambda: resnet(0, num_labels=2, id2label={0: "a", 1: "b"}), lambda: resnet(1, num_labels=2, id2label={0: "b", 1: "a"}), {}, MethodError,
        ["a, b", "b, a", "id2label"],
    ),
    "no such module": (
        resnet, resnet, {"features": ["resnet.encoder.stage.1"]}, MethodError,
        ["resnet.encoder.stage.1", "Did you mean 'resnet.encoder.stages.1'", "resnet.embedder"],
    ),
    "no such module of the teacher": (
        resnet, vit, {"features": [(1, "vit.layer")]}, MethodError, ["teacher", "'vit.layer'", "vit.layers"],
    ),
    "no map": (resnet, resnet, {"features": ["classifier"]}, MethodError, ["classifier", "resnet.encoder.stages.0"]),
    "a module that does not run": (
        resnet, lambda: resnet(1), {"features": ["resnet.encoder.stages.0.layers"]}, MethodError,
        ["was not run", "resnet.encoder.stages.0.layers.0"],
    ),
    "no such state": (resnet, lambda: resnet(1), {"features": [7]}, MethodError, ["3 hidden_states", "no 7"]),
    "nothing named": (resnet, resnet, {"features": []}, MethodError, ["affinity_weight=0"]),
    "a strange feature": (resnet, resnet, {"features": [1.5]}, MethodError, ["1.5", "pairs"]),
    "nothing to learn": (
        resnet, resnet, {"kd_weight": 0, "affinity_weight": 0}, MethodError, ["all 0"],
    ),
    "a negative weight": (resnet, resnet, {"affinity_weight": -1}, MethodError, ["affinity_weight=-1"]),
    "a weight that is no number": (resnet, resnet, {"kd_weight": float("nan")}, MethodError, ["kd_weight=nan"]),
    "projections": (resnet, resnet, {"projections": 0}, MethodError, ["projections=0"]),
    "a norm": (resnet, resnet, {"norm": "l2"}, MethodError, ["'l2'", "squared, l1"]),
    "a loss": (resnet, resnet, {"kd_loss": "ce"}, MethodError, ["'ce'", "mse, kl"]),
    "a resizing": (resnet, resnet, {"resizing": "crop"}, MethodError, ["'crop'", "pool, interpolate"]),
    "a temperature": (resnet, resnet, {"temperature": 0}, MethodError, ["temperature=0"]),
    "a dtype": (resnet, resnet, {"teacher_dtype": "int8"}, MethodError, ["bfloat16"]),
    "student not finite": (lambda: broken(float("nan")), resnet, {}, ModelError, ["student's 'classifier.1.weight'"]),
    "teacher not finite": (resnet, lambda: broken(float("inf")), {}, ModelError, ["teacher's 'classifier.1.weight'"]),
    "the same model": (lambda: SHARED, lambda: SHARED, {}, MethodError, ["copy.deepcopy"]),
    "a missing folder": (resnet, lambda: "nowhere/at/all", {}, ModelError, ["nowhere/at/all", "save_pretrained"]),
    "no teacher": (resnet, lambda: torch.nn.Linear(2, 2), {}, ModelError, ["Linear"]),
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), resnet, {}, ModelError, ["Linear", "transformers"]),
    "image size": (
        lambda: vit(0), resnet, {"example_inputs": torch.zeros(1, 3, 24, 24)}, ModelError, ["24x24", "example_inputs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_training(case):
    student, teacher, settings, kind, words = CASES[case]
    with pytest.raises(kind) as caught:
        FeatureAffinityDistillation(student(), teacher(), **settings)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_tokens_that_cannot_be_matched_are_counted():
    """A teacher of a rectangular grid on a square image."""
    from hf_compress.distillation.features import matched

    with pytest.raises(MethodError, match=r"35 tokens\).*16 tokens on 4x4.*35 tokens of the student"):
        matched(torch.zeros(1, 35, 4), torch.zeros(1, 4, 4, 4), (32, 32), "pool", (1, "encoder"))


def test_a_student_without_gradients_is_refused():
    model = FeatureAffinityDistillation(frozen(), resnet(1)).train()
    with pytest.raises(MethodError, match="feature 1 has no gradient"):
        model(IMAGES)


def test_labels_are_asked_for_where_they_are_needed():
    model = FeatureAffinityDistillation(resnet(0), resnet(1), label_weight=1.0).train()
    with pytest.raises(MethodError, match=r"label_weight=1.0.*label_weight=0"):
        model(IMAGES)
    assert model.eval()(IMAGES).loss.isfinite()


def test_the_wrapper_itself_cannot_be_loaded():
    with pytest.raises(ModelError, match="student alone"):
        FeatureAffinityDistillation.from_pretrained("anywhere")


@pytest.mark.parametrize("search", [ArchitectureSearchCallback, WidthSearchCallback])
def test_a_student_is_not_searched(search, tmp_path):
    model = FeatureAffinityDistillation(resnet(0), resnet(1), kd_weight=0)
    with pytest.raises(MethodError, match="Search first"):
        make_trainer(model, [search()], tmp_path, size=SIZE)
