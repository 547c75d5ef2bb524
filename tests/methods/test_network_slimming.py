"""Network slimming under Trainer: the right gradient arrives, whatever Trainer does to gradients."""

import pytest
import torch
import transformers
from slimming_training import SCALED_INPUTS, largest_difference, make_trainer, scaled_classifier, weights
from torch import nn

from hf_compress.errors import MethodError, ModelError, NothingToShrinkError
from hf_compress.methods import L1, MCP, SCAD, Lp, NetworkSlimmingCallback, TransformedL1
from hf_compress.methods.network_slimming import unscale_gradients

PENALTIES = [L1(), Lp(0.5, epsilon=1e-4), TransformedL1(1.0), MCP(100.0), SCAD(100.0)]


class WithPenalty(transformers.Trainer):
    """The reference: the penalty is a part of the loss, and autograd does the rest."""

    penalty, strength = L1(), 0.0

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **{**kwargs, "return_outputs": False})
        return loss + self.penalty.value(model.body.gamma, self.strength).sum()


def slimmed(tmp_path, penalty="l1", strength=0.05, callbacks=(), **arguments):
    model = scaled_classifier()
    callback = NetworkSlimmingCallback(penalty, strength, example_inputs=SCALED_INPUTS)
    make_trainer(model, [callback, *callbacks], tmp_path, **arguments).train()
    return weights(model)


@pytest.mark.parametrize(
    ("penalty", "optim"), [*((penalty, "sgd") for penalty in PENALTIES), (L1(), "adamw_torch")], ids=str
)
def test_equals_the_penalty_in_the_loss(penalty, optim, tmp_path):
    strength = 0.05
    reference = scaled_classifier()
    kind = type("Reference", (WithPenalty,), {"penalty": penalty, "strength": strength})
    make_trainer(reference, [], tmp_path, trainer=kind, optim=optim, learning_rate=0.01).train()
    found = slimmed(tmp_path, penalty, strength, optim=optim, learning_rate=0.01)
    # the same mathematics in another order of operations: float32 rounding, which Adam can amplify to its step's share
    assert largest_difference(found, weights(reference)) < 2e-6
    assert largest_difference(found, slimmed(tmp_path, strength=0.0, optim=optim, learning_rate=0.01)) > 1e-4


def test_accumulated_gradients_equal_the_big_batch(tmp_path):
    big = slimmed(tmp_path, per_device_train_batch_size=8)
    accumulated = slimmed(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert largest_difference(big, accumulated) < 1e-6  # another order of float32 sums


def test_clipping_does_not_clip_the_penalty(tmp_path):
    """With the loss's gradient clipped to nothing, the scales fall by exactly lr * strength per step."""
    start = scaled_classifier().body.gamma.detach()
    found = slimmed(tmp_path, strength=0.02, max_grad_norm=1e-9, max_steps=3)
    torch.testing.assert_close(found["body.gamma"], start - 3 * 0.1 * 0.02, atol=1e-6, rtol=0)


class LossScale(transformers.TrainerCallback):
    """fp16's loss scaling on the CPU: a real GradScaler behind Accelerate's optimizer."""

    def __init__(self, trainer_of):
        self.trainer_of = trainer_of

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        from accelerate.optimizer import patch_optimizer_step

        accelerator = self.trainer_of[0].accelerator
        accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp = True
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_loss_scaling_changes_nothing(max_grad_norm, tmp_path):
    holder = []
    model = scaled_classifier()
    callback = NetworkSlimmingCallback("l1", 0.05, example_inputs=SCALED_INPUTS)
    trainer = make_trainer(model, [LossScale(holder), callback], tmp_path, max_grad_norm=max_grad_norm)
    holder.append(trainer)
    if max_grad_norm:  # Accelerate unscales only when it believes in fp16; do it where it would
        clip = trainer._clip_grad_norm
        trainer._clip_grad_norm = lambda m: (unscale_gradients(trainer.optimizer), clip(m))[1]
    trainer.train()
    plain = slimmed(tmp_path, max_grad_norm=max_grad_norm)
    assert trainer.accelerator.scaler.get_scale() == 1024.0
    assert largest_difference(weights(model), plain) < 1e-6  # the scale is a power of two; clipping order may round


def test_unscaling_twice_is_harmless():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], 0.1)
    optimizer.scaler, optimizer.optimizer = torch.amp.GradScaler("cpu", init_scale=8.0), optimizer
    optimizer.scaler.scale(parameter.sum()).backward()
    unscale_gradients(optimizer)
    unscale_gradients(optimizer)
    assert parameter.grad.tolist() == [1, 1, 1]
    unscale_gradients(torch.optim.SGD([parameter], 0.1))  # no scaler


def test_bf16_autocast(tmp_path):
    found = slimmed(tmp_path, bf16=True)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in found.values())
    assert largest_difference(found, slimmed(tmp_path)) < 0.02  # bf16 has 8 bits; six steps of lr 0.1


def test_bf16_parameters(tmp_path):
    model = scaled_classifier().to(torch.bfloat16)
    inputs = {"pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)}
    callback = NetworkSlimmingCallback("l1", 0.5, example_inputs=inputs)
    make_trainer(model, [callback], tmp_path, bf16=True).train()
    assert model.body.gamma.dtype == torch.bfloat16 and model.body.gamma.abs().max() < 0.8


def test_initial_scale(tmp_path):
    model = scaled_classifier()
    callback = NetworkSlimmingCallback("l1", 0.0, gamma_init=0.5, example_inputs=SCALED_INPUTS)
    make_trainer(model, [callback], tmp_path, learning_rate=0.0, max_steps=1).train()
    assert model.body.gamma.eq(0.5).all()


def test_axis_grouping_is_group_lasso():
    """The gradient of strength * sqrt(k) * ||g|| over the k scales of an index."""
    from families import FAMILIES

    model, inputs = FAMILIES["resnet_basic"]()
    callback = NetworkSlimmingCallback("l1", 0.3, grouping="axis", example_inputs=inputs)
    callback._validate()
    callback.scales_ = callback._scales(model)
    x = callback.scales_.read().requires_grad_()
    counts = callback.scales_.counts
    value = (0.3 * counts.sqrt() * callback.scales_.sum(x**2).sqrt()).sum()
    torch.testing.assert_close(callback._subgradient(x.detach()), torch.autograd.grad(value, x)[0])
    assert counts.max() == 3 and counts.min() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1}, MethodError, "strength=-1 is not possible"),
        ({"strength": float("nan")}, MethodError, "strength=nan"),
        ({"penalty": "l7"}, MethodError, "there is no penalty 'l7'"),
        ({"penalty": {"a": 1}}, MethodError, "there is no penalty None"),
        ({"grouping": "layer"}, MethodError, "choose 'scale' or 'axis'"),
        ({"threshold": "small"}, MethodError, "threshold='small'"),
        ({"gamma_init": -0.5}, MethodError, "gamma_init=-0.5"),
        ({"axes": "encoder.*"}, NothingToShrinkError, r"axes='encoder.\*' matches no axis .* body.gamma"),
    ],
)
def test_bad_arguments_are_refused_before_training(arguments, error, message, tmp_path):
    callback = NetworkSlimmingCallback(example_inputs=SCALED_INPUTS, **arguments)
    with pytest.raises(error, match=message):
        make_trainer(scaled_classifier(), [callback], tmp_path).train()


def test_nothing_to_shrink(tmp_path):
    from families import FAMILIES

    for family, message in {"vit": "no axis of .* has a scale", "convnext": "inexact=True"}.items():
        model, inputs = FAMILIES[family]()
        callback = NetworkSlimmingCallback(example_inputs=inputs)
        trainer = make_trainer(model, [callback], tmp_path, size=32)
        with pytest.raises(NothingToShrinkError, match=message):
            trainer.train()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad, tmp_path):
    model = scaled_classifier()
    with torch.no_grad():
        model.body.outer.weight[1, 2] = bad
    trainer = make_trainer(model, [NetworkSlimmingCallback(example_inputs=SCALED_INPUTS)], tmp_path)
    with pytest.raises(ModelError, match=r"'body.outer.weight' holds NaN"):
        trainer.train()
