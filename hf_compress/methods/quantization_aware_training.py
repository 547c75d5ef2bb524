"""Quantization-aware training: low-bit weights and activations in every pass, float weights in the optimizer.

Sources: BinaryConnect (Courbariaux et al. 2015, arXiv 1511.00363); blended coarse gradient descent (Yin et al. 2019,
arXiv 1808.05240); the students of FAQD (Li et al. 2023, arXiv 2302.10899); learned step size (Esser et al. 2020,
arXiv 1902.08153).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_compress.errors import DataError, MethodError, ModelError
from hf_compress.quantization.calibration import calibrate
from hf_compress.quantization.layers import ALPHA, BOUNDS, STEP, freeze, quantization_of, unfreeze
from hf_compress.quantization.post_training import attach, begin
from hf_compress.quantization.scheme import SKIP_WORDS, Quantization
from hf_compress.quantization.storage import check_finite

from .axis_callback import check_number
from .network_slimming import unscale_gradients
from .trained_model import trained_model

_UNCALIBRATED = "hf_compress_is_uncalibrated"
_CALIBRATION_BATCH = 32
# Trainer clips gradients by one norm over all parameters. Those of learned steps and ranges are sums over whole channels and
# layers, and would fill it alone and slow the weights down. So they count 1/1024 until that clipping is over, and are then
# clipped by a norm of their own: of channels whose weights almost vanish they are huge.
_UNTIL_CLIPPED = 2.0**-10
_HOOKS = "hf_compress_gradient_hooks"  # on the model: those of a run that was broken off are found by the next callback


class QuantizationAwareTrainingCallback(TrainerCallback, ExportableState):
    """Train a model in low bits with the ordinary Trainer.

    From the creation of the Trainer on, forward passes (of training and of evaluation) use the quantized weights and
    activations; the optimizer updates float weights with the gradient taken at the quantized ones. When training ends
    the quantized weights take the place of the float ones, and ``save_model`` writes them at their real size.
    Checkpoints written before that hold the float weights, from which training resumes, and load with
    ``from_pretrained`` as the quantized model that they stand for. ``max_grad_norm`` clips the gradients of learned steps
    and ranges by a norm of their own.

    Args:
        weights, activations, scale, per_channel, activation_scheme, skip: see
            :class:`hf_compress.quantization.Quantization`. The papers: ``scale="bcgd", per_channel=False,
            activation_scheme="clipped_relu", skip="last"``.
        rho: before every step, float weights move this part of the way to the quantized ones. Paper: rho, 1e-5 in
            BCGD; 0 is BinaryConnect and FAQD. 0 to 1.
        calibration_images: for "static" and "clipped_relu": from how many training images the first ranges come.
        batches: calibration batches to use instead, as for :func:`hf_compress.quantization.quantize`. Not saved in
            checkpoints.

    Raises:
        MethodError: when the Trainer is made or training starts: for an argument out of range, a skip pattern that
            matches nothing, or a way to distribute that is not supported (DeepSpeed, FSDP).
        DataError: at the start of training, when there is no image to calibrate on.
        ModelError: when weights are not finite, or the model is quantized in another way already.
    """

    def __init__(
        self,
        weights: int | str | None = None,
        activations: int | None = None,
        *,
        scale: str = "learned",
        per_channel: bool = True,
        activation_scheme: str = "dynamic",
        skip: str | Sequence[str] = SKIP_WORDS,
        rho: float = 0.0,
        calibration_images: int = 256,
        batches: Iterable[Any] | None = None,
    ) -> None:
        self.weights = weights
        self.activations = activations
        self.scale = scale
        self.per_channel = per_channel
        self.activation_scheme = activation_scheme
        self.skip = skip
        self.rho = rho
        self.calibration_images = calibration_images
        self.batches = batches

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin(trained_model(kwargs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        if getattr(args, "deepspeed", None) or any(hasattr(p, "to_local") for p in model.parameters()):
            raise MethodError(f"{type(self).__name__} needs whole weights, which DeepSpeed and FSDP cut up; use DDP.")
        self._begin(model)
        check_finite(model)
        _check_is_optimized(model, kwargs.get("optimizer"))
        _remove_hooks(model)
        learned = _parameters(model, STEP, BOUNDS)
        vars(model)[_HOOKS] = [p.register_hook(_kept_small) for p in learned if p.requires_grad]
        if vars(model).pop(_UNCALIBRATED, False) and state.global_step == 0:
            with _same_random_state():
                batches = self._batches(kwargs["train_dataloader"]) if self.batches is None else self.batches
                calibrate(model, batches, batch_statistics=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        scheme = quantization_of(model)
        if scheme is None:
            return
        learned = _parameters(model, STEP, BOUNDS)
        if gradients := _gradients(learned):
            torch._foreach_mul_(gradients, 1 / _UNTIL_CLIPPED)
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
        if alphas := _gradients(_parameters(model, ALPHA)):
            unscale_gradients(kwargs["optimizer"])
            torch._foreach_clamp_max_(alphas, 1.0)
            torch._foreach_clamp_min_(alphas, -1.0)
        if self.rho:
            with torch.no_grad():
                for path in scheme.layers or ():
                    module = model.get_submodule(path)
                    module._parameters["weight"].lerp_(module.weight, self.rho)  # type: ignore[union-attr, arg-type]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        _remove_hooks(model)
        if quantization_of(model) is not None:
            attach(freeze(model))

    def state(self) -> dict[str, Any]:
        """The constructor's arguments as JSON data; Trainer makes a new callback from them when it resumes."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        arguments.pop("batches")
        if not isinstance(self.skip, str):
            arguments["skip"] = list(self.skip)
        return {"args": arguments, "attributes": {}}

    def _begin(self, model: nn.Module) -> None:
        """Put the model into the training state, wherever it is now."""
        check_number("rho", self.rho, minimum=0)
        check_number("calibration_images", self.calibration_images, minimum=1)
        if self.rho > 1:
            raise MethodError(f"rho={self.rho!r} is not possible: it is a part, from 0 to 1.")
        asked = Quantization(
            self.weights, self.scale, self.per_channel, self.activations, self.activation_scheme, self.skip  # type: ignore[arg-type]
        )  # fmt: skip
        held = quantization_of(model)
        if held is None:
            begin(model, asked)
            if asked.needs_batches:
                vars(model)[_UNCALIBRATED] = True
        elif not asked.asks_for_the_same(held):
            raise ModelError(
                f"{type(model).__name__} is quantized in another way (weights={held.weights}, activations="
                f"{held.activations}, scale={held.scale!r}). Call model.dequantize() first, or ask for the same."
            )
        elif held.format == "packed":
            unfreeze(model)
        attach(model)

    def _batches(self, dataloader: Any) -> Iterator[Any]:
        """The first training images, without a move of the sampler; the same in every process."""
        dataset = getattr(dataloader, "dataset", None)
        try:
            count = min(len(dataset), int(self.calibration_images))  # type: ignore[arg-type]
        except TypeError:
            raise DataError(
                "the training data has no length, so the first ranges of activations cannot be taken from it. Pass "
                "batches= with a few hundred images, or use activation_scheme='dynamic'."
            ) from None
        for start in range(0, count, _CALIBRATION_BATCH):
            numbers = range(start, min(count, start + _CALIBRATION_BATCH))
            whole = getattr(dataset, "__getitems__", None)  # what a DataLoader prefers too
            items = whole([*numbers]) if whole is not None else [dataset[i] for i in numbers]  # type: ignore[index]
            yield dataloader.collate_fn(items)


def _kept_small(gradient: Tensor) -> Tensor:
    return gradient * _UNTIL_CLIPPED


def _remove_hooks(model: nn.Module) -> None:
    for handle in vars(model).pop(_HOOKS, ()):
        handle.remove()


def _parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """What quantizers learn, of these kinds."""
    scheme = quantization_of(model)
    assert scheme is not None
    paths = sorted({*(scheme.layers or ()), *(scheme.activation_layers or ())})
    found = [model.get_submodule(path)._parameters.get(name) for path in paths for name in names]
    return [parameter for parameter in found if parameter is not None]


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _check_is_optimized(model: nn.Module, optimizer: Any) -> None:
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    scheme = quantization_of(model)
    assert scheme is not None
    for path in {*(scheme.layers or ()), *(scheme.activation_layers or ())}:
        for name, parameter in model.get_submodule(path)._parameters.items():
            is_ours = name == "weight" or name.startswith("hf_compress_")
            if is_ours and parameter is not None and parameter.requires_grad and id(parameter) not in held:
                raise MethodError(
                    f"the optimizer does not hold {path}.{name}: the model changed its state after the Trainer was made "
                    f"(it was trained before, or comes from model_init). Make a new Trainer; with scale='learned' or "
                    "trained activations, pass model= instead of model_init=."
                )


@contextmanager
def _same_random_state() -> Iterator[None]:
    """What runs inside draws random numbers that no one else misses."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
