"""Feature-affinity assisted distillation (FAQD): a student under a frozen teacher, as one model for the stock Trainer.

Source: Li, Yang, Yin, Qi & Xin 2023, arXiv 2302.10899, and its released code, where ``kd_weight`` is KD_coef,
``affinity_weight`` is fa_coef and ``label_weight`` is label_coef. The losses, and where they differ from that code, are in
:mod:`hf_compress.distillation.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_compress.axes.finding import Inputs, example_inputs_for, run_model, undisturbed
from hf_compress.distillation.features import RESIZINGS, Feature, Pair, chosen, matched, pairs_from, run
from hf_compress.distillation.losses import (
    LOGIT_LOSSES,
    NORMS,
    LogitLoss,
    Norm,
    affinity,
    as_wide,
    box_distillation,
    fast_feature_affinity,
    feature_affinity,
    foreground,
    full_precision,
    logit_distillation,
)
from hf_compress.errors import MethodError, ModelError
from hf_compress.hub.loading import load_as_saved

from .axis_callback import check_number
from .checkpoint_names import own_names_in_checkpoints

ADAPTORS = "hf_compress_adaptors"
_STUDENT = "student."


class FeatureAffinityDistillation(PreTrainedModel):
    """Student and teacher, whose forward pass returns the loss that the student is trained with.

    The loss is ``kd_weight`` times the distance of the logits, plus ``affinity_weight`` times the sum over features of the
    distance of their affinities, plus ``label_weight`` times the student's own loss; of detectors also ``box_weight``
    times the distance of the boxes. Classifiers, segmenters, detectors and regressors with ``logits`` will do. Pass it to
    ``Trainer`` as the model; with ``label_weight=0`` labels are not read, and the data need not have any. Train in low bits by adding
    :class:`~hf_compress.QuantizationAwareTrainingCallback`, and have the parts of the loss logged by
    :class:`~hf_compress.DistillationCallback`; both, like all callbacks of this package, act on the student.

    Everything but the forward pass is the student's: parameters, state dict, configuration, ``save_pretrained``, which
    writes an ordinary checkpoint of the student. The teacher is no submodule. It is held in evaluation mode without
    gradients, and moves to the device of the images when it is first needed there.

    ``student`` is trained in place. In evaluation the random projection is the same at every call. FSDP and DeepSpeed are
    not supported.

    Args:
        student: the model to train, in any state: new, trained, pruned, or quantized.
        teacher: a model, or its folder or Hub id.
        kd_weight, affinity_weight, label_weight: weights of the three terms, at least 0. The released code has 1, 0.1
            and 0 (or 0.3 with labels), where its affinity is ``norm="l1"`` summed over a batch of 100, so that its 0.1
            corresponds to 10 here.
        box_weight: of what detectors return as ``pred_boxes``, see :func:`~.losses.box_distillation`. Rows are compared one
            by one, so both need the same grid of points, or the student has to come from its teacher. 5 is what DETR gives
            this distance in its own loss; not in the paper, which has no detectors.
        kd_loss, temperature: see :func:`~.losses.logit_distillation`.
        fast: random projection instead of the exact affinity loss.
        projections, norm: see :func:`~.losses.fast_feature_affinity`.
        features: what is compared: numbers of ``hidden_states`` or names of modules, for both models or as pairs
            (student's, teacher's). By default up to four hidden states at equal relative depths, the last one among them;
            for ResNets these are the outputs of the stages, as in the paper.
        resizing: for maps of different sizes: ``pool`` averages the larger one down; ``interpolate`` resizes the teacher's
            to the student's (the paper's code).
        adaptors: pass the student's features through a linear layer for every pixel, and ReLU, first. Trained with the
            student, present in checkpoints, and left out of the finished model when DistillationCallback is used. The
            paper's code has them, and trains them in half of its scripts.
        teacher_dtype: for example ``torch.bfloat16``; that of the checkpoint when not given.
        example_inputs: an image [1, channels, height, width] to try both models on; made by the student's configuration
            when not given.

    Attributes:
        student: the model that is trained.
        teacher: the frozen one.
        pairs: (student's, teacher's) feature, for every pair that is compared.

    Raises:
        MethodError: for a number out of range, features that do not exist (the message lists those that do) or cannot be
            matched, or models of different classes.
        ModelError: when a model cannot be loaded or run, or holds weights that are not finite.
    """

    main_input_name = "pixel_values"
    input_modalities = "image"
    accepts_loss_kwargs = False  # the mean over micro-batches is Trainer's work
    # whether these are possible was settled when the student was made
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    student: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | str | Path,
        *,
        kd_weight: float = 1.0,
        affinity_weight: float = 10.0,
        label_weight: float = 0.0,
        box_weight: float = 5.0,
        kd_loss: LogitLoss = "mse",
        temperature: float = 3.0,
        fast: bool = True,
        projections: int = 15,
        norm: Norm = "squared",
        features: Any = None,
        resizing: str = "pool",
        adaptors: bool = False,
        teacher_dtype: torch.dtype | str | None = None,
        example_inputs: Inputs = None,
    ):
        weights = {"kd_weight": kd_weight, "affinity_weight": affinity_weight, "label_weight": label_weight}
        for name, weight in {**weights, "box_weight": box_weight}.items():
            check_number(name, weight, minimum=0)
        check_number("temperature", temperature, minimum=0, is_open=True)
        check_number("projections", projections, minimum=1)
        if not any(weights.values()):
            raise MethodError("kd_weight, affinity_weight and label_weight are all 0: there is nothing to learn from.")
        for name, value, known in (
            ("kd_loss", kd_loss, LOGIT_LOSSES), ("norm", norm, NORMS), ("resizing", resizing, RESIZINGS)
        ):  # fmt: skip
            if value not in known:
                raise MethodError(f"{name}={value!r} is not known; give one of {', '.join(known)}.")
        pairs = pairs_from(features) if affinity_weight else []
        if not isinstance(student, PreTrainedModel):
            raise ModelError(
                f"the student is a {type(student).__name__}; it must be a model of transformers (timm models: "
                "TimmWrapperForImageClassification)."
            )
        super().__init__(student.config)
        self.student = student
        self.kd_weight, self.affinity_weight, self.label_weight = kd_weight, affinity_weight, label_weight
        self.box_weight = box_weight
        self.kd_loss, self.temperature = kd_loss, temperature
        self.fast, self.projections, self.norm = fast, projections, norm
        self.resizing = resizing
        self._held = (_loaded_teacher(teacher, teacher_dtype),)  # in a tuple it is no submodule
        self.supports_gradient_checkpointing = student.supports_gradient_checkpointing
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._register_state_dict_hook(_as_students)
        self.register_load_state_dict_pre_hook(_for_student)
        self._check_models()
        channels = self._try(pairs, example_inputs)
        self.finish()
        if adaptors and self.pairs:
            setattr(student, ADAPTORS, nn.ModuleList(Adaptor(count) for count in channels).to(student.device))

    # -- what Trainer and transformers ask for ----------------------------------------------------------------------

    @property
    def teacher(self) -> Any:
        return self._held[0]

    @property
    def config(self) -> Any:
        """The student's, which quantization replaces when it begins and ends."""
        return self.student.config if "student" in self._modules else self._first_config

    @config.setter
    def config(self, config: Any) -> None:
        if "student" in self._modules:
            self.student.config = config  # type: ignore[assignment]
        else:
            self._first_config = config

    def forward(self, pixel_values: Tensor, labels: Any = None, pixel_mask: Tensor | None = None, **others: Any) -> Any:
        """The student's output, with the loss of distillation.

        Args:
            pixel_values: float [batch, channels, height, width].
            labels: what the student takes; read only with ``label_weight`` above 0.
            pixel_mask: of detectors that take padded images: [batch, height, width].
            others: labels of other names that the student takes.

        Raises:
            MethodError: when ``label_weight`` is above 0 and there are no labels in training.
        """
        parts: dict[str, Tensor] = {}
        shared = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        given = {} if labels is None else {"labels": labels}
        given |= {name: value for name, value in others.items() if value is not None}
        has_labels = bool(self.label_weight and given)
        if self.label_weight and not given and self.training:
            raise MethodError(
                f"label_weight={self.label_weight} needs labels, and the batch has none. Set label_weight=0 to train "
                "without, or keep the data's label column."
            )
        ours, outputs = self._features_of(self.student, 0, pixel_values, **shared, **(given if has_labels else {}))
        with torch.no_grad():
            theirs, expected = self._features_of(self._teacher_on(pixel_values), 1, pixel_values, **shared)
        if self.kd_weight:
            distance = logit_distillation(outputs.logits, expected.logits, self.kd_loss, self.temperature)
            parts["kd_loss"] = self.kd_weight * distance
        if self.box_weight and self.compares_boxes:
            confidence = foreground(expected.logits, len(self.teacher.config.id2label))
            parts["box_loss"] = self.box_weight * box_distillation(outputs.pred_boxes, expected.pred_boxes, confidence)
        adaptors: Any = getattr(self.student, ADAPTORS, None)
        generator = None if self.training else torch.Generator(pixel_values.device).manual_seed(0)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        distances = []
        for index, pair in enumerate(self.pairs):
            if self.training and torch.is_grad_enabled() and not ours[index].requires_grad:
                raise MethodError(
                    f"the student's feature {pair[0]!r} has no gradient: it is frozen, or inside a reentrant gradient "
                    "checkpoint. Choose another one, or pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            mine, its = matched(ours[index], theirs[index], size, self.resizing, pair)
            mine = mine if adaptors is None else adaptors[index](mine)
            distances.append(self._distance(mine, its, generator))
        if distances:
            parts["affinity_loss"] = self.affinity_weight * torch.stack(distances).sum()
        if has_labels and outputs.loss is not None:
            parts["label_loss"] = self.label_weight * as_wide(outputs.loss)
        if self.training:
            details = zip([_name(*pair) for pair in self.pairs], distances, strict=True)
            self._note({**parts, **{f"affinity/{name}": value for name, value in details}})
        loss = torch.stack([*parts.values()]).sum() if parts else None  # evaluation by labels alone, and there are none
        return type(outputs)(**{**outputs, "loss": loss})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the student as the ordinary checkpoint that its own ``save_pretrained`` writes.

        Under the parameter names that the model itself has, from which an interrupted training resumes.
        """
        with own_names_in_checkpoints(self.student):
            return self.student.save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(
            "distillation saves the student alone. Load it with its own class, and make a new "
            "FeatureAffinityDistillation(student, teacher) to train on."
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        return self.student.tie_weights(*args, **kwargs)

    # -- for callbacks and pictures -----------------------------------------------------------------------------------

    @property
    def hf_compress_student(self) -> nn.Module:
        """What methods of this package act on instead of this model."""
        return self.student

    def take_parts(self) -> dict[str, Tensor]:
        """The mean of every part of the loss over the training passes since the last call; scalars on the device.

        ``kd_loss``, ``box_loss``, ``affinity_loss`` and ``label_loss`` with their weights, so that they add up to the
        loss; and ``affinity/<feature>`` for every feature, without one.
        """
        found = {name: value / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return found

    def finish(self) -> None:
        """Leave the student as anybody else would have it: without adaptors."""
        if hasattr(self.student, ADAPTORS):
            delattr(self.student, ADAPTORS)

    @torch.no_grad()
    def affinities(self, pixel_values: Tensor, index: int = -1) -> tuple[Tensor, Tensor]:
        """Pixel by pixel cosines of student and teacher, in evaluation mode.

        Args:
            pixel_values: [batch, channels, height, width].
            index: of the pair of features.

        Returns:
            two tensors [batch, n, n].
        """
        pair = self.pairs[index]
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        with undisturbed(self.student):
            _, ours = run(self.student, [pair[0]], "student", pixel_values)
            teacher = self._teacher_on(pixel_values)
            _, theirs = run(teacher, [pair[1]], "teacher", pixel_values.to(teacher.dtype))
            mine, its = matched(ours[0], theirs[0], size, self.resizing, pair)
            return affinity(mine), affinity(its)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _features_of(self, model: Any, side: int, pixel_values: Tensor, **inputs: Any) -> tuple[list[Tensor], Any]:
        features: list[Feature] = [pair[side] for pair in self.pairs]
        outputs, found = run(model, features, ("student", "teacher")[side], pixel_values.to(model.dtype), **inputs)
        return found, outputs

    def _teacher_on(self, pixel_values: Tensor) -> Any:
        teacher = self.teacher
        if teacher.device != pixel_values.device:
            teacher.to(pixel_values.device)
        return teacher

    def _distance(self, ours: Tensor, theirs: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.fast:
            return fast_feature_affinity(ours, theirs, self.projections, self.norm, generator=generator)
        return feature_affinity(ours, theirs, self.norm)

    def _note(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._count += 1

    def _check_models(self) -> None:
        student, teacher = self.student, self.teacher
        shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
        if student is teacher or shared:
            raise MethodError(
                "student and teacher are the same model, or share weights, so the teacher would change. Pass "
                "copy.deepcopy(model) as one of them."
            )
        for whose, model in (("student", student), ("teacher", teacher)):
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if not bool(tensor.isfinite().all()):
                    raise ModelError(
                        f"the {whose}'s {name!r} holds NaN or infinite values. Load or train the {whose} again."
                    )
        if self.kd_weight:
            _check_classes(student.config, teacher.config)

    def _try(self, pairs: list[Pair] | None, example_inputs: Inputs) -> list[int]:
        """Run both models on an image; settle the pairs of features.

        Returns:
            the number of channels of every feature of the student.
        """
        if example_inputs is None:  # a configuration that names no size stands for 224, and its model takes any
            images = [example_inputs_for(model)["pixel_values"] for model in (self.student, self.teacher)]
            image = min(images, key=torch.numel)
        else:
            image = first_tensor(example_inputs)
        size = (image.shape[-2], image.shape[-1])
        self.pairs = []
        with undisturbed(self.student), undisturbed(self.teacher), torch.no_grad():
            image = image[:1].to(self.student.device)
            outputs = {}
            for whose, model in (("student", self.student), ("teacher", self._teacher_on(image))):
                try:
                    outputs[whose] = run_model(model, {"pixel_values": image.to(model.dtype)})
                except Exception as error:
                    raise ModelError(
                        f"the {whose} {type(model).__name__} cannot take an image of {size[0]}x{size[1]} "
                        f"({type(error).__name__}: {error}). Student and teacher see the same images; pass example_inputs "
                        "with one of the size that you train on."
                    ) from error
            if self.kd_weight:
                ours, theirs = (getattr(output, "logits", None) for output in outputs.values())
                if ours is None or theirs is None:
                    raise ModelError("kd_weight above 0 needs models that return logits. Set kd_weight=0.")
                logit_distillation(ours, theirs, self.kd_loss, self.temperature)
            self.compares_boxes = self.kd_weight > 0 and all("pred_boxes" in output for output in outputs.values())
            if pairs is None:
                counts = [
                    len(_states(model, whose, image))
                    for model, whose in ((self.student, "student"), (self.teacher, "teacher"))
                ]
                pairs = chosen(*counts)
            self.pairs = pairs
            mine, _ = self._features_of(self.student, 0, image)
            its, _ = self._features_of(self.teacher, 1, image)
            found = [matched(a, b, size, self.resizing, pair) for a, b, pair in zip(mine, its, pairs, strict=True)]
        return [feature.shape[-1] for feature, _ in found]


class Adaptor(nn.Module):
    """A linear layer for every pixel and ReLU: what the released code calls an adaptor, a 1x1 convolution.

    No ``nn.Linear``, so that no method takes it for a layer of the student.
    """

    def __init__(self, channels: int):
        super().__init__()
        bound = channels**-0.5  # torch's default for a linear layer and for a 1x1 convolution
        self.weight = nn.Parameter(torch.empty(channels, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, n, channels] -> the same."""
        with full_precision(pixels):
            return torch.relu(as_wide(pixels) @ self.weight.mT + self.bias)


class DistillationCallback(TrainerCallback, ExportableState):
    """Log the parts of the loss of :class:`FeatureAffinityDistillation`, and leave a clean student when training ends.

    ``kd_loss``, ``box_loss``, ``affinity_loss`` and ``label_loss`` go to Trainer's logs, as means since the last log and
    over processes, with their weights; the affinity loss of every feature goes to ``state.log_history``, without one. For reporters
    (TensorBoard and the like) call :func:`hf_compress.report_first`.

    Raises:
        MethodError: when the Trainer is made with another model.
    """

    def __init__(self) -> None:
        self.axis_metrics_: dict[str, float] = {}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _distillation(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _distillation(kwargs["model"])
        if getattr(args, "deepspeed", None) or any(hasattr(p, "to_local") for p in model.parameters()):
            raise MethodError("distillation reads the student's features in place; use DDP, not DeepSpeed or FSDP.")
        model.take_parts()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        parts = _distillation(kwargs["model"]).take_parts()
        if not parts:
            return
        values = torch.stack([*parts.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        found = dict(zip(parts, values.tolist(), strict=True))
        overall = {name: value for name, value in found.items() if "/" not in name}
        self.axis_metrics_ = {name: value for name, value in found.items() if "/" in name}
        logs.update(overall)
        state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _distillation(kwargs["model"]).finish()

    def state(self) -> dict[str, Any]:
        """Nothing: it takes no arguments."""
        return {"args": {}, "attributes": {}}


def _distillation(model: Any) -> FeatureAffinityDistillation:
    if not isinstance(model, FeatureAffinityDistillation):
        raise MethodError(
            f"the Trainer's model is a {type(model).__name__}; pass FeatureAffinityDistillation(student, teacher) to it."
        )
    return model


def _loaded_teacher(teacher: Any, dtype: torch.dtype | str | None) -> Any:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise MethodError(f"teacher_dtype={dtype!r} is not possible; give torch.bfloat16, for example.")
    if isinstance(teacher, (str, Path)):
        try:
            teacher = load_as_saved(teacher)
        except ModelError as error:
            raise ModelError(
                f"the teacher: {error} Pass a folder that save_pretrained wrote, a Hub id, or the model itself."
            ) from error
    elif not isinstance(teacher, PreTrainedModel):
        raise ModelError(
            f"the teacher is a {type(teacher).__name__}; it must be a model of transformers, or its folder."
        )
    return teacher.to(dtype).requires_grad_(False).eval()


def _check_classes(student: Any, teacher: Any) -> None:
    ours, theirs = student.id2label or {}, teacher.id2label or {}
    if len(ours) != len(theirs):
        raise MethodError(
            f"the student has {len(ours)} classes and the teacher {len(theirs)}, so their logits cannot be compared. Use a "
            "teacher of the same classes, or kd_weight=0 to compare features alone."
        )
    names = [[str(labels[key]) for key in sorted(labels)] for labels in (ours, theirs)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise MethodError(
            f"student and teacher number the same classes differently ({', '.join(names[0][:3])}, ... and "
            f"{', '.join(names[1][:3])}, ...). Give both models' configurations the same id2label."
        )


def first_tensor(inputs: Any) -> Tensor:
    """The images among example inputs of any form."""
    if isinstance(inputs, Tensor):
        return inputs
    return next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))


def _states(model: Any, whose: str, image: Tensor) -> list[Any]:
    """All hidden states."""
    image = image.to(model.dtype)
    states = list(getattr(model(image, output_hidden_states=True), "hidden_states", None) or ())
    if len(states) < 2:
        run(model, [1], whose, image)  # raises, and says which modules there are instead
    return states


def _name(student: Feature, teacher: Feature) -> str:
    return str(student) if student == teacher else f"{student}-{teacher}"


def _as_students(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Drop the wrapper's part of all names in a state dict."""
    for name in list(state):
        if name.startswith(prefix + _STUDENT):
            state[prefix + name.removeprefix(prefix + _STUDENT)] = state.pop(name)


def _for_student(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in list(state):
        if name.startswith(prefix):
            state[prefix + _STUDENT + name.removeprefix(prefix)] = state.pop(name)


__all__ = ["ADAPTORS", "Adaptor", "DistillationCallback", "FeatureAffinityDistillation"]
