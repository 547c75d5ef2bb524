"""Quantization-aware training with the stock Trainer: mathematics, interruption, distribution, checkpoints."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from quantized_run import SCHEMES, small_classifier, trained
from slimming_training import Classifier, largest_difference, make_trainer, weights

import hf_compress
from hf_compress.axes import find_axes
from hf_compress.errors import DataError, MethodError, ModelError
from hf_compress.hub import HfCompressConfig
from hf_compress.methods import NetworkSlimmingCallback
from hf_compress.methods.quantization_aware_training import QuantizationAwareTrainingCallback
from hf_compress.quantization import fake_quantized, quantization_of, quantize

Callback = QuantizationAwareTrainingCallback
Load = transformers.AutoModelForImageClassification.from_pretrained


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7, hidden_act="relu"
    )
    return transformers.ResNetForImageClassification(config)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))

# -- one step, by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.25])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_the_papers(rho, decay, tmp_path):
    """w <- (1 - rho) w + rho Q(w) - lr (gradient at Q(w) + decay * blended w), with SGD."""
    model = small_classifier()
    twin = copy.deepcopy(model)
    callback = Callback(weights=1, scale="bcgd", per_channel=False, rho=rho, skip="last")
    seen = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.update({name: p.detach().clone() for name, p in model.named_parameters()})

    arguments = {"max_steps": 1, "per_device_train_batch_size": 64, "weight_decay": decay}
    trainer = make_trainer(model, [callback, Look()], tmp_path, **arguments)
    trainer.train()
    items = [trainer.train_dataset[i] for i in range(64)]
    raw = {name: p.detach().clone() for name, p in twin.named_parameters()}
    chosen = [f"body.{i}.weight" for i in (0, 2, 5)]
    with torch.no_grad():
        for name in chosen:
            twin.get_parameter(name).copy_(raw[name].sign() * raw[name].abs().mean())
    x, y = torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])
    twin(x, y)["loss"].backward()
    for name, parameter in twin.named_parameters():
        blended = raw[name] + (rho * (parameter.detach() - raw[name]) if name in chosen else 0)
        decayed = decay if not name.endswith("bias") else 0
        expected = blended - 0.1 * (parameter.grad + decayed * blended)
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-6)
    for name in chosen:  # and at the end Q(w) takes the place of w
        assert torch.equal(model.get_parameter(name), fake_quantized(seen[name], 1, "bcgd", None))


def test_gradient_of_the_resolution_is_clamped_after_the_sum(tmp_path):
    model = small_classifier()
    callback = Callback(activations=4, activation_scheme="clipped_relu")
    seen = []

    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            alpha = model.body[1].hf_compress_alpha
            seen.append((alpha.detach().clone(), alpha.grad.clone()))

    class Inflate(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            model.body[1].hf_compress_alpha.grad.fill_(-70.0)

    make_trainer(model, [Inflate(), callback, Spoil()], tmp_path, max_steps=2, learning_rate=0.01).train()
    assert seen[0][1] == -1 and seen[1][0] - seen[0][0] == pytest.approx(0.01)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_learned_steps_are_clipped_by_a_norm_of_their_own(accumulated, tmp_path):
    """Trainer clips the weights as it would without them, and both kinds end at the norm that is allowed at most."""
    grads: dict[float, dict[str, torch.Tensor]] = {}
    for most in (0.0, 0.01):
        model = small_classifier()
        found = grads[most] = {}

        class Look(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=model, found=found, **kwargs):
                found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        callback = Callback(8, 8, activation_scheme="static", skip=())
        options = {"max_steps": 1, "max_grad_norm": most, "gradient_accumulation_steps": accumulated}
        make_trainer(model, [callback, Look()], tmp_path, **options).train()
        assert not any(p._backward_hooks for p in model.parameters())

    def norm(of: dict[str, torch.Tensor], learned: bool) -> torch.Tensor:
        held = [g.flatten() for name, g in of.items() if ("hf_compress_" in name) == learned]
        return torch.cat(held).norm()

    free, clipped = grads[0.0], grads[0.01]
    assert norm(free, True) > 0.1 and norm(free, False) > 0.1  # both have something to clip
    for learned in (True, False):
        # torch adds 1e-6 to the norm, and what is left of the steps adds a thousandth of their norm to the weights'
        assert norm(clipped, learned) == pytest.approx(
            0.01, rel=2e-4 + 1e-6 * float(norm(free, True) / norm(free, False)) ** 2
        )
    for name, gradient in free.items():
        size = norm(free, "hf_compress_" in name)
        torch.testing.assert_close(clipped[name] / 0.01, gradient / size, rtol=1e-3, atol=1e-5)


def test_a_run_that_broke_off_leaves_nothing_behind_for_the_next(tmp_path):
    """Its hooks go, else gradients of learned steps would be made small twice and large once."""
    model, counts = small_classifier(), []

    class Break(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    class Count(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            learned = [p for name, p in model.named_parameters() if name.endswith("hf_compress_step")]
            counts.extend(len(p._backward_hooks) for p in learned)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, [Callback(8), Break()], tmp_path, max_steps=2).train()
    make_trainer(model, [Callback(8), Count()], tmp_path, max_steps=1).train()
    assert counts and set(counts) == {1}
    assert not any(p._backward_hooks for p in model.parameters())


def test_all_passes_use_the_quantized_weights_and_evaluation_is_of_the_final_model(tmp_path):
    model = resnet()
    arguments = {"size": 16, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(model, [Callback(weights=2)], tmp_path, **arguments)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    for path in quantization_of(model).layers:
        weight = model.get_submodule(path).weight
        assert all(len(row.unique()) <= 3 for row in weight) and type(model.get_submodule(path)) is nn.Conv2d


def test_it_learns(tmp_path):
    """One-bit weights and four-bit activations fit what they are shown."""
    losses = {}
    for name, callbacks in {
        "float": [],
        "low": [Callback(weights=1, activations=4, activation_scheme="clipped_relu")],
    }.items():
        arguments = {
            "size": 16,
            "length": 16,
            "max_steps": 40,
            "per_device_train_batch_size": 16,
            "learning_rate": 0.05,
        }
        trainer = make_trainer(resnet(), callbacks, tmp_path, **arguments)
        trainer.train()
        losses[name] = trainer.state.log_history[-2]["loss"]
    assert losses["float"] < 0.8 and losses["low"] < 0.8  # chance: log 7 = 1.95


# -- interruption and checkpoints ---------------------------------------------------------------------------------

OPTIONS = {
    "size": 16, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3,
    "optim_args": "momentum=0.9", "lr_scheduler_type": "linear", "learning_rate": 0.02, "max_grad_norm": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("restore", [False, True], ids=["same_callback", "restored_callback"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "dynamic"])
def test_interrupted_run_ends_in_the_same_weights(scheme, restore, tmp_path):
    """Bit for bit."""
    arguments = SCHEMES.get(scheme, {"weights": 4, "activations": 8})
    options = {**OPTIONS, "restore_callback_states_from_checkpoint": restore}
    model = resnet()
    make_trainer(model, [Callback(**arguments)], tmp_path, **options).train()
    expected = weights(model)
    model = resnet(seed=1)
    trainer = make_trainer(model, [Callback(**arguments)], tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoints_load_as_what_they_stand_for_and_the_final_model_is_packed(scheme, tmp_path):
    model = resnet()
    trainer = make_trainer(model, [Callback(**SCHEMES[scheme])], tmp_path, **OPTIONS)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again, report = Load(tmp_path / "final", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again, IMAGES), logits(model, IMAGES))
    # the last checkpoint was written before the float weights gave way
    from_checkpoint, report = Load(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(from_checkpoint, IMAGES), logits(model, IMAGES))
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size  # noqa: E731
    assert size("final") < 0.75 * size("checkpoint-6")
    from_checkpoint.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "final" / "model.safetensors"
    ).read_bytes()


def test_the_best_checkpoint_is_what_is_frozen(tmp_path):
    model = resnet()
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = make_trainer(model, [Callback(weights=4)], tmp_path, **{**OPTIONS, **arguments, "optim_args": None})
    trainer.train()
    best = Load(trainer.state.best_model_checkpoint)
    assert torch.equal(logits(best, IMAGES), logits(model, IMAGES))


def test_training_goes_on_from_a_packed_model(tmp_path):
    model = quantize(resnet(), HfCompressConfig(weights=4, scale="learned"))
    model.save_pretrained(tmp_path / "packed")
    model = Load(tmp_path / "packed").train()
    before = logits(model, IMAGES)
    trainer = make_trainer(model, [Callback(weights=4)], tmp_path, size=16, max_steps=2)
    torch.testing.assert_close(logits(model, IMAGES), before, rtol=1e-4, atol=1e-4)
    raw = {
        path: model.get_submodule(path)._parameters["weight"].detach().clone() for path in quantization_of(model).layers
    }
    trainer.train()
    assert all(not torch.equal(model.get_submodule(path).weight, weight) for path, weight in raw.items())
    trainer.save_model(str(tmp_path / "trained"))
    assert torch.equal(logits(Load(tmp_path / "trained"), IMAGES), logits(model, IMAGES))
    with pytest.raises(MethodError, match="Make a new Trainer"):
        trainer.train()
    with pytest.raises(ModelError, match=r"in another way \(weights=4"):
        make_trainer(model, [Callback(weights=2)], tmp_path, size=16)


# -- composition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet_basic", "vit"])
def test_pruned_then_trained_in_low_bits_then_reloaded(family, tmp_path):
    model, x = FAMILIES[family]()
    hf_compress.prune(model, macs=0.6, example_inputs=x[:1])
    macs = find_axes(model, x[:1]).macs
    arguments = {"size": x.shape[-1], "max_steps": 2, "learning_rate": 0.01}
    trainer = make_trainer(model, [Callback(weights=4, activations=8)], tmp_path, **arguments)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again, report = Load(tmp_path / "final", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again, x), logits(model, x))
    assert find_axes(again, x[:1]).macs == macs


def test_factorized_then_trained_in_low_bits_then_reloaded(tmp_path):
    factorize = pytest.importorskip("hf_compress.surgery.factorize").factorize
    model, x = FAMILIES["vit"]()
    factorize(model, energy=0.5)
    trainer = make_trainer(model, [Callback(weights=4)], tmp_path, size=x.shape[-1], max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again, report = Load(tmp_path / "final", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize("order", [1, -1])
def test_with_network_slimming_in_the_same_run(order, tmp_path):
    model = resnet()
    inputs = {"pixel_values": IMAGES[:1]}
    slimming = NetworkSlimmingCallback("l1", 1e-2, example_inputs=inputs)
    callbacks = [Callback(weights=4), slimming][::order]
    make_trainer(model, callbacks, tmp_path, size=16, max_steps=2).train()
    assert slimming.scores(model)
    model.dequantize()
    hf_compress.prune(model, scores=slimming.scores(model), macs=0.7, example_inputs=inputs)
    assert logits(model, IMAGES).isfinite().all()


def test_gradient_checkpointing_and_bfloat16(tmp_path):
    model, x = FAMILIES["vit"]()
    arguments = {
        "bf16": True,
        "gradient_checkpointing": True,
        "size": x.shape[-1],
        "max_steps": 2,
        "learning_rate": 0.01,
    }
    callback = Callback(weights=4, activations=8, activation_scheme="static")
    trainer = make_trainer(model, [callback], tmp_path, **arguments)
    before = weights(model)
    trainer.train()
    after = weights(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith("hf_compress_range"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16(tmp_path):
    model = resnet()
    callback = Callback(weights=4, activations=4, activation_scheme="clipped_relu")
    trainer = make_trainer(model, [callback], tmp_path, size=16, max_steps=3, fp16=True, use_cpu=False)
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


# -- accumulation and processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accumulated_batches_equal_one_batch(scheme, tmp_path):
    """On the float weights: at a border between two codes a rounding error of the gradient decides."""
    whole = trained(scheme, tmp_path, batch=8)
    parts = trained(scheme, tmp_path, batch=4, gradient_accumulation_steps=2)
    # float32 sums in another order over 8 steps; a gradient whose code flips by one rounding is of the order of lr / 100
    assert largest_difference(parts["float"], whole["float"]) < 2e-5


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found; one launch for all, since it takes seconds."""
    output = tmp_path_factory.mktemp("distributed") / "result"
    script = Path(__file__).with_name("quantized_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = str(script.parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, str(output)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{output}.{rank}") for rank in range(2)]


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_equal_one(scheme, processes, tmp_path):
    expected = trained(scheme, tmp_path, batch=8)
    for found in processes:
        assert largest_difference(found[scheme]["float"], expected["float"]) < 2e-5
    assert largest_difference(processes[0][scheme]["frozen"], processes[1][scheme]["frozen"]) == 0.0


# -- arguments and refusals ---------------------------------------------------------------------------------------


def test_arguments_survive_a_checkpoint():
    callback = Callback(weights=1, activations=4, scale="bcgd", per_channel=False, skip=("last", "*.x"), rho=1e-5)
    state = json.loads(json.dumps(callback.state()))
    again = Callback.from_state(state)
    assert again.state() == callback.state() and state["attributes"] == {}
    assert set(state["args"]) == set(inspect.signature(Callback).parameters) - {"batches"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to quantize"),
        ({"weights": 9}, "weights=9"),
        ({"weights": 4, "rho": -1}, "rho"),
        ({"weights": 4, "rho": 2}, "rho"),
        ({"weights": 4, "rho": float("nan")}, "rho"),
        ({"weights": 4, "calibration_images": 0}, "calibration_images"),
        ({"weights": 4, "skip": "*.nothing"}, "matches no layer"),
        ({"weights": 4, "skip": "*"}, "leaves none"),
    ],
)
def test_arguments_are_refused_when_the_trainer_is_made(arguments, message, tmp_path):
    model = resnet()
    before = [type(module) for module in model.modules()]
    with pytest.raises(MethodError, match=message):
        make_trainer(model, [Callback(**arguments)], tmp_path, size=16)
    assert [type(module) for module in model.modules()] == before


def test_values_that_are_not_finite(tmp_path):
    model = resnet()
    trainer = make_trainer(model, [Callback(weights=4)], tmp_path, size=16)
    with torch.no_grad():
        model.get_submodule(quantization_of(model).layers[0])._parameters["weight"].fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        trainer.train()


def test_no_images_to_calibrate_on(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    callback = Callback(activations=4, activation_scheme="static")
    trainer = make_trainer(resnet(), [callback], tmp_path, size=16)
    trainer.train_dataset = Stream()
    with pytest.raises(DataError, match="has no length"):
        trainer.train()
    callback = Callback(activations=4, activation_scheme="static", batches=[])
    with pytest.raises(DataError, match="there are none"):
        make_trainer(resnet(), [callback], tmp_path, size=16).train()


def test_model_init_needs_a_scheme_that_learns_nothing(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    data = make_trainer(resnet(), [], tmp_path, size=16).train_dataset
    for scale, is_fine in (("least_squares", True), ("learned", False)):
        trainer = transformers.Trainer(
            None,
            arguments,
            model_init=lambda: resnet(),
            train_dataset=data,
            callbacks=[Callback(weights=4, scale=scale)],
        )
        if is_fine:
            trainer.train()
            assert quantization_of(trainer.model).format == "packed"
        else:
            with pytest.raises(MethodError, match="model_init"):
                trainer.train()


def test_any_module_can_be_trained(tmp_path):
    model = Classifier(FAMILIES["plain_cnn"]()[0])
    make_trainer(model, [Callback(weights=2)], tmp_path, size=16, max_steps=2).train()
    assert quantization_of(model).format == "packed"


def test_calibration_on_data_that_hands_over_whole_batches(tmp_path):
    """As a DataLoader does, which prefers __getitems__."""

    class Whole(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitems__(self, indices):
            return {"pixel_values": torch.randn(len(indices), 3, 16, 16), "labels": torch.zeros(len(indices)).long()}

    model = resnet()
    callback = Callback(activations=8, activation_scheme="static")
    trainer = make_trainer(model, [callback], tmp_path, max_steps=1, remove_unused_columns=False)
    trainer.train_dataset, trainer.data_collator = Whole(), lambda batch: batch
    trainer.train()
    ranges = [p for name, p in model.named_parameters() if name.endswith("hf_compress_range")]
    assert ranges and all(not torch.equal(found, torch.tensor([-1.0, 1.0])) for found in ranges)
