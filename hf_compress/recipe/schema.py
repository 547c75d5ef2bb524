"""What a recipe may say.

A recipe is one YAML file: a model, data, training defaults and a list of stages. Every section is a pydantic model that
refuses unknown fields; messages name the file, the line and the field, and suggest the field that was meant.

Training settings are those of :class:`transformers.TrainingArguments`, by their own names and types; nothing is renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from .source import Source, closest, dotted, read_source

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]

# Settings of TrainingArguments that a recipe says elsewhere, or that the runner needs for itself.
_RESERVED = {
    "output_dir": "use the recipe's `output`",
    "seed": "use the recipe's `seed`",
    "resume_from_checkpoint": "an interrupted run resumes by itself: start the same command again",
    "do_train": "use a `train` stage",
    "do_eval": "every training stage is evaluated at its end",
    "do_predict": "use a `report` stage",
    "save_total_limit": "the runner keeps the last complete checkpoint, and the best one where Trainer tracks it",
    "push_to_hub": "use a `push` stage",
    "hub_model_id": "use a `push` stage",
    "hub_token": "set the environment variable HF_TOKEN",
    "save_only_model": "it would make resuming impossible",
    "restore_callback_states_from_checkpoint": "the runner builds the callbacks from the recipe",
    "remove_unused_columns": "the data pipeline hands over exactly what the model takes",
}


class Section(BaseModel):
    """A part of a recipe: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=False)


class ModelSection(Section):
    """Which model to start from.

    Attributes:
        config: ``model_type`` and the arguments of that configuration class: a new model with random weights.
        pretrained: a folder or a Hub id.
        new_head: give a pretrained model a new classifier when its number of classes is not that of the data.
    """

    config: dict[str, Any] | None = None
    pretrained: str | None = None
    new_head: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSection:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("give exactly one of `config` (a new model) and `pretrained` (a folder or a Hub id)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` needs a `model_type`, for example resnet, vit or convnext")
        if self.new_head and self.config is not None:
            raise ValueError("`new_head` is for `pretrained` models; a model built from `config` fits the data anyway")
        return self


class ScenesSection(Section):
    """Scenes composed from real images, for detection and segmentation without a download; see
    :class:`hf_compress.data.Scenes`.

    Attributes:
        source: where the items come from: ``digits``, or an image classification data set (a folder or a Hub id).
        train, validation, test: number of scenes of each split.
        size: height and width in pixels.
        seed: other scenes of the same items; does not follow the recipe's seed.
        items: fewest and most items in a scene.
        scale: smallest and largest longer side of an item, as a share of ``size``.
        rotation: items are turned by up to so many degrees either way.
        max_hidden: an item of which a larger share is hidden has no label.
    """

    source: str = "digits"
    train: Positive = 2000
    validation: Positive = 200
    test: Positive = 400
    size: Positive = 128
    seed: Annotated[int, Field(ge=0)] = 0
    items: tuple[Positive, Positive] = (1, 6)
    scale: tuple[float, float] = (0.2, 0.5)
    rotation: float = 30.0
    max_hidden: float = 0.6


class EyesSection(Section):
    """Rendered eyes for eye openness; see :mod:`hf_compress.data.eyes`.

    Attributes:
        train: eyes with exact labels.
        weak: eyes of the other style with the label open or closed alone; 0 for none.
        folder: a folder of yours with ``open/`` and ``closed/``, in place of ``weak``.
        validation: eyes in the style of ``train``, with exact labels.
        test: eyes of the other style, with exact labels.
        shift: ``mild``, or ``hard`` for a coarse, grey, noisy camera in the other style.
        closed_share: of ``weak``.
        seed: other eyes; does not follow the recipe's seed.
        augment: how much training crops are moved, turned and changed as by other cameras, 0 (not at all) to 1; 1 is for
            long trainings.
        translate: up to this share of width and height training crops are moved; by ``augment`` when not given. Eyes that a
            face detector finds need about 0.2, eyes whose places are known much less.
    """

    train: Positive = 20_480
    weak: Annotated[int, Field(ge=0)] = 6000
    folder: str | None = None
    validation: Positive = 1000
    test: Positive = 2000
    shift: Literal["mild", "hard"] = "mild"
    closed_share: Share = 0.4
    seed: Annotated[int, Field(ge=0)] = 0
    augment: Annotated[float, Field(ge=0, le=1)] = 0.4
    translate: Annotated[float, Field(ge=0, le=0.5)] | None = None


class DataSection(Section):
    """Which images to train and test on.

    Attributes:
        name: ``digits`` (in scikit-learn, no download) or, for detection and segmentation, ``scenes``; a Hub id; a local folder
            for ``datasets.load_dataset``, or one with annotation files in COCO's format.
        subset: the data set's configuration name, where it has several.
        image_column, label_column: found by their type when not given.
        objects_column: of detection: boxes and classes of each image; found when not given.
        box_format: of the boxes in that column: ``xywh`` as in COCO (left, top, width, height) or ``xyxy`` (corners).
        mask_column: of segmentation: pictures with the class of every pixel; found by its name when not given.
        class_names: of segmentation: the classes in the order of their numbers; numbers, up to the highest in the training
            masks, when not given.
        ignore_label: of segmentation: value of a mask's pixels that have no label.
        scenes: what ``name: scenes`` composes.
        eyes: what ``name: rendered_eyes`` renders, for eye openness.
        train_split, validation_split, test_split: names of splits; found when not given.
        validation_share: share of the training images held out when the data set has no validation split.
        test_share: the same for the test split.
        split_seed: what is held out depends on this alone, not on the recipe's seed.
        train_limit, validation_limit, test_limit: use so many images (chosen by ``split_seed``) at most.
        image_size: height and width in pixels that images are resized to; that of the model, or of the data, if not given.
        image_mean, image_std: per channel, of values in [0, 1].
        crop_padding: training images are shifted by up to so many pixels (zero padding, random crop); for classification.
        horizontal_flip: half of the training images are mirrored.
    """

    name: str
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    objects_column: str | None = None
    box_format: Literal["xywh", "xyxy"] = "xywh"
    mask_column: str | None = None
    class_names: Annotated[list[str], Field(min_length=2, max_length=255)] | None = None
    ignore_label: Annotated[int, Field(ge=0, le=65535)] = 255
    scenes: ScenesSection | None = None
    eyes: EyesSection | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    validation_share: Share = 0.1
    test_share: Share = 0.2
    split_seed: int = 0
    train_limit: Positive | None = None
    validation_limit: Positive | None = None
    test_limit: Positive | None = None
    image_size: Positive | None = None
    image_mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    image_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = None
    crop_padding: Annotated[int, Field(ge=0)] = 0
    horizontal_flip: bool = False


class Training(Section):
    """What every stage that trains may say.

    Attributes:
        epochs, steps: how long; at most one of the two, else ``training`` decides.
        training: TrainingArguments of this stage, over the recipe's ``training``.
        lr_milestones: shares of the stage after which the learning rate is multiplied by ``lr_decay``, as in the slimming
            papers ([0.5, 0.75]); replaces ``lr_scheduler_type``, which has no such schedule.
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    lr_milestones: list[Share] | None = None
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        return self

    def callback(self, example_inputs: Any = None) -> Any:
        """What acts on this training, as a callback for Trainer; None for ordinary training.

        Args:
            example_inputs: as for :func:`hf_compress.find_axes`.

        Raises:
            HfCompressError: when the method refuses its parameters.
        """
        return None

    def images(self, available: int) -> int:
        """How many of the training images one epoch goes through."""
        return available


class TrainStage(Training):
    """Ordinary training.

    Attributes:
        drop_path_schedule: raise the rates of the model's drop paths linearly from 0, as DARTS does.
    """

    stage: Literal["train"]
    drop_path_schedule: bool = False

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.DropPathScheduleCallback() if self.drop_path_schedule else None


class FinetuneStage(Training):
    """Ordinary training of what is left after pruning."""

    stage: Literal["finetune"]


class Method(Training):
    """Training with a method of this package, whose scores a later prune stage ranks by.

    Attributes:
        decides: what goes with ``support: true``, in words; empty for a method that only ranks.
    """

    decides: ClassVar[str] = ""


class Slimming(Method):
    """What both slimming methods may say.

    Attributes:
        grouping: ``scale``: every scale on its own; ``axis``: the scales of an index together (channels of a residual
            stream then vanish as a whole); that of the method when not given.
        gamma_init: value given to all scales before the stage; 0.5 in the papers. They stay as they are when not given.
    """

    grouping: Literal["scale", "axis"] | None = None
    gamma_init: float | None = None


class NetworkSlimmingStage(Slimming):
    """Training with a sparsity penalty on the axes' scales (Liu et al. 2017; Bui et al. 2021 for the others).

    Attributes:
        penalty: l1, lp, transformed_l1, mcp or scad.
        parameters: the penalty's own constants, for example ``{p: 0.5}`` or ``{a: 1.0}``.
        strength: weight of the penalty. Paper: lambda.
    """

    stage: Literal["network_slimming"]
    penalty: str = "l1"
    parameters: dict[str, float] = Field(default_factory=dict)
    strength: Annotated[float, Field(ge=0)] = 1e-4

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.NetworkSlimmingCallback(
            methods.penalty_from(self.penalty, **self.parameters),
            self.strength,
            grouping=self.grouping or "scale",
            gamma_init=self.gamma_init,
            example_inputs=example_inputs,
        )


class ProximalSlimmingStage(Slimming):
    """Training by proximal network slimming (Bui et al. 2023).

    Attributes:
        strength: weight of the l1 norm. Paper: lambda.
        coupling: weight of the quadratic that ties the scales to their sparse copy. Paper: beta.
        penalty, parameters: another penalty in place of the l1 norm, as in ``network_slimming``; not in the paper.
    """

    decides: ClassVar[str] = "what the slimming stage leaves at zero goes"

    stage: Literal["proximal_slimming"]
    strength: Annotated[float, Field(ge=0)]
    coupling: Annotated[float, Field(gt=0)]
    penalty: str = "l1"
    parameters: dict[str, float] = Field(default_factory=dict)

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.ProximalSlimmingCallback(
            self.strength,
            self.coupling,
            penalty=methods.penalty_from(self.penalty, **self.parameters),
            grouping=self.grouping or "axis",
            gamma_init=self.gamma_init,
            example_inputs=example_inputs,
        )


class GrowingRegularizationStage(Method):
    """Training towards a budget, by a decay that grows on what would be removed (see ``GrowingRegularizationCallback``).

    Attributes:
        target: what ``support: true`` removes in the next prune stage: a budget such as ``{macs: 0.5}``, or the share of
            indices that goes.
        strength: the largest factor of the decay.
        warmup, hold: shares of all steps between which the decay grows from 0 to ``strength``.
        lasso: weight of a penalty on the norms of all groups, up to ``hold``; not with Adam.
        refresh: steps from one choice of what goes to the next.
        axes: glob pattern or patterns of axis names; all when not given.
        inexact: also act on axes whose removal is not exactly masking.
        min_keep: the fewest indices of an axis.
        round_to: with a budget, kept widths are multiples of this.
    """

    decides: ClassVar[str] = "what the target of the stage names goes"

    stage: Literal["growing_regularization"]
    target: float | dict[str, float]
    strength: Annotated[float, Field(gt=0)] = 0.3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    hold: Annotated[float, Field(gt=0, le=1)] = 0.5
    lasso: Annotated[float, Field(ge=0)] = 0.0
    refresh: Positive = 20
    axes: str | list[str] | None = None
    inexact: bool = False
    min_keep: Positive = 1
    round_to: Positive = 1

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.GrowingRegularizationCallback(
            self.target,
            self.strength,
            warmup=self.warmup,
            hold=self.hold,
            lasso=self.lasso,
            refresh=self.refresh,
            axes=self.axes,
            inexact=self.inexact,
            min_keep=self.min_keep,
            round_to=self.round_to,
            example_inputs=example_inputs,
        )


class DimensionSearchStage(Method):
    """Training that searches which dimensions the model needs (SiDT; see ``DimensionSearchCallback``).

    Attributes:
        strength: weight of the penalty, or kind -> weight.
        target: what ``support: true`` removes in the next prune stage: a share of the dimensions of each kind, kind ->
            share, or a budget such as ``{macs: 0.6}``; what became zero when not given.
        warmup: steps before the penalty begins; below 1, a share of all steps.
        hold: share of all steps after which what the target removes is zero, for a target in shares.
        penalty, parameters: as in ``network_slimming``.
        kinds: qk, v, mlp, heads, residual, channels; qk, v and mlp when not given.
        inexact: also search axes whose removal is not exactly masking (the residual width).
        min_keep: the fewest indices of an axis, or kind -> number.
        lr_factor: scores learn with this multiple of the learning rate.
    """

    decides: ClassVar[str] = "what the target of the search names goes"

    stage: Literal["dimension_search"]
    strength: float | dict[str, float] = 1.0
    target: float | dict[str, float] | None = None
    warmup: Annotated[float, Field(ge=0)] = 0.1
    hold: Annotated[float, Field(gt=0, le=1)] | None = None
    penalty: str = "l1"
    parameters: dict[str, float] = Field(default_factory=dict)
    kinds: list[str] | None = None
    inexact: bool = False
    min_keep: Positive | dict[str, Positive] | None = None
    lr_factor: Annotated[float, Field(gt=0)] = 10.0

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.DimensionSearchCallback(
            self.strength,
            self.target,
            self.warmup,
            hold=self.hold,
            penalty=methods.penalty_from(self.penalty, **self.parameters),
            kinds=self.kinds,
            inexact=self.inexact,
            min_keep=self.min_keep,
            lr_factor=self.lr_factor,
            example_inputs=example_inputs,
        )


class Halves(Training):
    """What both searches that split the training images into two halves may say.

    Attributes:
        method: ``rarts``, ``darts`` or ``darts-second-order``.
        split: share of the training images in the training half.
        training_weight: lambda of RARTS, or first and last of a schedule.
        coupling: beta of RARTS; likewise.
        passes: ``shared`` (two passes in a step) or ``fresh`` (four), of RARTS.
        architecture_lr: learning rate of the architecture variables.
        warmup: steps before they move; below 1, a share of all steps.
    """

    method: Literal["rarts", "darts", "darts-second-order"] = "rarts"
    split: Share = 0.5
    training_weight: PositiveNumber | tuple[PositiveNumber, PositiveNumber] = 1.0
    coupling: PositiveNumber | tuple[PositiveNumber, PositiveNumber] = 1.0
    passes: Literal["shared", "fresh"] = "shared"
    architecture_lr: PositiveNumber = 3e-4
    warmup: Annotated[float, Field(ge=0)] = 0.0

    def images(self, available: int) -> int:
        from ..methods.data_halves import half_sizes

        return half_sizes(available, self.split)[0]


class ArchitectureSearchStage(Halves):
    """Training of a supernet that searches its architecture; a ``derive`` stage behind it makes the discrete network (see
    ``ArchitectureSearchCallback``).

    Attributes:
        architecture: glob pattern or patterns of the architecture parameters' names; those that the model names when not
            given.
        architecture_weight_decay: of the architecture variables.
    """

    stage: Literal["architecture_search"]
    architecture: str | list[str] | None = None
    architecture_weight_decay: Annotated[float, Field(ge=0)] = 1e-3

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.ArchitectureSearchCallback(
            self.method,
            split=self.split,
            training_weight=self.training_weight,
            coupling=self.coupling,
            passes=self.passes,
            architecture=self.architecture,
            architecture_lr=self.architecture_lr,
            architecture_weight_decay=self.architecture_weight_decay,
            warmup=self.warmup,
        )


class WidthSearchStage(Halves, Method):
    """Training that searches widths with the solver of the architecture search (see ``WidthSearchCallback``).

    Attributes:
        strength: weight of the penalty, or kind -> weight.
        target: as in ``dimension_search``.
        penalty, parameters, kinds, inexact, min_keep: likewise; without kinds, all axes whose removal is exact.
    """

    decides: ClassVar[str] = "what the target of the search names goes"

    stage: Literal["width_search"]
    strength: float | dict[str, float] = 1.0
    target: float | dict[str, float] | None = None
    penalty: str = "l1"
    parameters: dict[str, float] = Field(default_factory=dict)
    kinds: list[str] | None = None
    inexact: bool = False
    min_keep: Positive | dict[str, Positive] | None = None
    architecture_lr: PositiveNumber = 0.01
    warmup: Annotated[float, Field(ge=0)] = 0.1

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.WidthSearchCallback(
            self.strength,
            self.target,
            self.method,
            split=self.split,
            training_weight=self.training_weight,
            coupling=self.coupling,
            passes=self.passes,
            architecture_lr=self.architecture_lr,
            warmup=self.warmup,
            penalty=methods.penalty_from(self.penalty, **self.parameters),
            kinds=self.kinds,
            inexact=self.inexact,
            min_keep=self.min_keep,
            example_inputs=example_inputs,
        )


class SparseGroupStage(Method):
    """Training to zero weights and zero groups of weights (see ``SparseGroupCallback``).

    Attributes:
        element: penalty on single weights: l0, l1, tl1, l1-l2, scad, null, or a mapping with its parameters.
        group: ``l2,1``, or null.
        strength, split: lambda and beta of the paper, over the number of training images.
        growth, growth_every: ``split`` is multiplied by ``growth`` after every ``growth_every`` epochs.
        slices: ``auto``, ``producers`` or ``readers``: which weights make up a group.
        axes: glob pattern or patterns of axis names; all when not given.
        inexact: also act on axes whose removal is not exactly masking.
    """

    decides: ClassVar[str] = "the groups that became zero go"

    stage: Literal["sparse_group"]
    element: str | dict[str, Any] | None = "l0"
    group: str | None = "l2,1"
    strength: Annotated[float, Field(ge=0)] = 1e-5
    split: Annotated[float, Field(gt=0)] = 1e-3
    growth: Annotated[float, Field(ge=1)] = 1.25
    growth_every: Annotated[float, Field(gt=0)] = 20
    slices: Literal["auto", "producers", "readers"] = "auto"
    axes: str | list[str] | None = None
    inexact: bool = False

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.SparseGroupCallback(
            self.element,
            self.group,
            self.strength,
            self.split,
            self.growth,
            growth_every=self.growth_every,
            slices=self.slices,
            axes=self.axes,
            inexact=self.inexact,
            example_inputs=example_inputs,
        )


class TrainedRankPruningStage(Training):
    """Training to low rank; a ``factorize`` stage behind it replaces layers (see ``TrainedRankPruningCallback``).

    Attributes:
        energy: share of a layer's squared singular values that a truncation may drop.
        period: optimizer steps from one truncation to the next.
        scheme: channel, spatial or decoupled.
        nuclear: strength of the nuclear norm.
        nuclear_steps: ``truncation`` or ``all``: at which steps its subgradient is added.
        targets: class names or glob patterns of layers; all but the first convolution and the last linear layer when not
            given.
        exclude: which of them to leave out, given likewise.
    """

    stage: Literal["trained_rank_pruning"]
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.02
    period: Positive = 20
    scheme: Literal["channel", "spatial", "decoupled"] = "channel"
    nuclear: Annotated[float, Field(ge=0)] = 0.0
    nuclear_steps: Literal["truncation", "all"] = "truncation"
    targets: list[str] | None = None
    exclude: list[str] = Field(default_factory=list)

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.TrainedRankPruningCallback(
            self.energy,
            self.period,
            self.scheme,
            self.nuclear,
            nuclear_steps=self.nuclear_steps,
            targets=self.targets,
            exclude=tuple(self.exclude),
        )


class Compression(Section):
    """A stage that makes the model smaller: models before the first one are dense."""


class Bits(Section):
    """In how many bits weights and activations are held; see :class:`hf_compress.quantization.Quantization`.

    Attributes:
        weights: 1 to 8, ``binary`` or ``ternary``; float when not given.
        activations: 1 to 8; float when not given.
        scale: least_squares, learned, bcgd or bcgd_numel; ``least_squares`` after training and ``learned`` in it when not
            given.
        per_channel: one scale for every output channel, else one for a tensor.
        activation_scheme: dynamic, static or clipped_relu.
        skip: what stays float: first, last, positions, and glob patterns of module names.
        calibration_images: training images that the ranges of static and clipped_relu activations come from.
        rho: in training, see :class:`hf_compress.QuantizationAwareTrainingCallback`.
    """

    weights: int | str | None = None
    activations: int | None = None
    scale: str | None = None
    per_channel: bool = True
    activation_scheme: str = "dynamic"
    skip: str | list[str] = Field(default_factory=lambda: ["first", "last", "positions"])
    calibration_images: Positive = 256
    rho: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Bits:
        self.scheme()  # refuses what cannot be
        return self

    def scheme(self, scale: str = "least_squares") -> Any:
        """As a :class:`~hf_compress.quantization.Quantization`; ``scale`` stands where the recipe names none."""
        from ..quantization import Quantization

        skip: Any = self.skip
        return Quantization(
            self.weights,  # type: ignore[arg-type]
            self.scale or scale,
            self.per_channel,
            self.activations,
            self.activation_scheme,
            skip,
        )

    def callback(self, scale: str) -> Any:
        """What trains a model in these bits."""
        from .. import methods

        return methods.QuantizationAwareTrainingCallback(
            self.weights,
            self.activations,
            scale=self.scale or scale,
            per_channel=self.per_channel,
            activation_scheme=self.activation_scheme,
            skip=self.skip,
            rho=self.rho,
            calibration_images=self.calibration_images,
        )


class QuantizeStage(Bits, Compression):
    """Hold the model in few bits, without training. Stages behind it that train do so in these bits (QAT)."""

    stage: Literal["quantize"]


class DistillStage(Training):
    """Training under a teacher, without labels unless they get a weight (FAQD; see ``FeatureAffinityDistillation``).

    Attributes:
        teacher: a folder or a Hub id; or
        teacher_stage: name or number (from 0) of an earlier stage, whose model is the teacher.
        student: ``last`` trains the model of the stage before; ``start`` the one from before the first stage.
        quantize: train in these bits.
        kd_weight, affinity_weight, label_weight, box_weight, kd_loss, temperature, fast, projections, norm, features, resizing,
            adaptors, teacher_dtype: as for ``FeatureAffinityDistillation``.
    """

    stage: Literal["distill"]
    teacher: str | None = None
    teacher_stage: str | int | None = None
    student: Literal["last", "start"] = "last"
    quantize: Bits | None = None
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    affinity_weight: Annotated[float, Field(ge=0)] = 10.0
    label_weight: Annotated[float, Field(ge=0)] = 0.0
    box_weight: Annotated[float, Field(ge=0)] = 5.0
    kd_loss: Literal["mse", "kl"] = "mse"
    temperature: Annotated[float, Field(gt=0)] = 3.0
    fast: bool = True
    projections: Positive = 15
    norm: Literal["squared", "l1"] = "squared"
    features: list[int | str | list[int | str]] | None = None
    resizing: Literal["pool", "interpolate"] = "pool"
    adaptors: bool = False
    teacher_dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @model_validator(mode="after")
    def _one_teacher(self) -> DistillStage:
        if (self.teacher is None) == (self.teacher_stage is None):
            raise ValueError(
                "give exactly one of `teacher` (a folder or a Hub id) and `teacher_stage` (an earlier stage)"
            )
        return self

    def callback(self, example_inputs: Any = None) -> Any:
        from .. import methods

        return methods.DistillationCallback()

    def wrap(self, student: Any, teacher: Any, example_inputs: Any = None) -> Any:
        """Student and teacher as one model for Trainer.

        Raises:
            HfCompressError: when the two do not go together.
        """
        from .. import methods

        names = (
            "kd_weight",
            "affinity_weight",
            "label_weight",
            "box_weight",
            "kd_loss",
            "temperature",
            "fast",
            "projections",
            "norm",
        )
        settings = {name: getattr(self, name) for name in (*names, "features", "resizing", "adaptors", "teacher_dtype")}
        return methods.FeatureAffinityDistillation(student, teacher, example_inputs=example_inputs, **settings)


class DeriveStage(Compression):
    """Make the network that an architecture search has chosen, with new weights.

    Attributes:
        config: fields of the new network's configuration that differ from the supernet's, for example
            ``{num_cells: 20, width: 36}``.
    """

    stage: Literal["derive"]
    config: dict[str, Any] = Field(default_factory=dict)


class FactorizeStage(Compression):
    """Replace layers by two factors of low rank (see :func:`hf_compress.factorize`).

    Attributes:
        energy: the largest share of its squared singular values that a layer may lose; with a budget a limit for every layer.
        macs, params: budget: a share of the dense model (below 1) or an absolute number.
        scheme: channel, spatial or decoupled for all layers, or ``best`` of them for each.
        calibration_images: factors that keep the outputs on so many training images instead of the weights; 0 for weights.
        targets: class names or glob patterns of layers; all when not given.
    """

    stage: Literal["factorize"]
    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    macs: Annotated[float, Field(gt=0)] | None = None
    params: Annotated[float, Field(gt=0)] | None = None
    scheme: Literal["best", "channel", "spatial", "decoupled"] = "best"
    calibration_images: Annotated[int, Field(ge=0)] = 256
    targets: list[str] | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> FactorizeStage:
        if self.macs is not None and self.params is not None:
            raise ValueError("give `macs` or `params`, not both")
        if self.energy is None and self.macs is None and self.params is None:
            raise ValueError("give `macs` or `params` (a budget), or `energy` (the most that a layer may lose)")
        return self


class ReplaceAttentionStage(Compression):
    """Put AFIDAF's filters in place of attention (see :func:`hf_compress.replace_attention`); finetune afterwards.

    Attributes:
        layers: ``all``, ``auto``, or glob patterns of modules that are or hold attention blocks.
        filter: ``afidaf``, or one of its two filters alone: ``fourier`` or ``image``.
        count, macs, latency: budget, with ``layers: auto``: a number of blocks; multiply-accumulates, as a share of the dense
            model (up to 1) or a number; time for one image on this machine, as a share of the model that enters the stage
            (up to 1) or in milliseconds.
        calibration_images: so many training images to match the filters on, and to measure the loss on with ``auto``.
        match_steps: steps of matching the filters to the attention, on 32 images each.
        learning_rate: of matching.
    """

    stage: Literal["replace_attention"]
    layers: str | Annotated[list[str], Field(min_length=1)] = "all"
    filter: Literal["afidaf", "fourier", "image"] = "afidaf"
    count: Positive | None = None
    macs: Annotated[float, Field(gt=0)] | None = None
    latency: Annotated[float, Field(gt=0)] | None = None
    calibration_images: Positive = 512
    match_steps: Annotated[int, Field(ge=0)] = 200
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3

    @model_validator(mode="after")
    def _one_choice(self) -> ReplaceAttentionStage:
        given = [name for name in ("count", "macs", "latency") if getattr(self, name) is not None]
        if self.layers == "auto" and len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(f"`layers: auto` needs exactly one of `count`, `macs` and `latency`; {found}")
        if self.layers != "auto" and given:
            raise ValueError(f"`{given[0]}` chooses layers, so it needs `layers: auto`")
        return self


class PruneStage(Compression):
    """Choose what to keep and remove the rest.

    Attributes:
        macs, params: budget: a share of the dense model (below 1) or an absolute number.
        latency: budget: a share of the dense model's predicted time for one image, or milliseconds (above 1). Predicted from
            times measured on this machine, so another machine may choose other widths.
        ratio: share of indices to remove from every axis, or ``{pattern of axis names: share}``.
        support: remove exactly what the last proximal_slimming stage set to zero, or what the ``target`` of the last
            growing_regularization, dimension_search or width_search stage says.
        scores: ``auto`` takes the scores of the last method stage, or weight magnitudes when there was none.
        round_to: kept widths are multiples of this.
        min_keep: at least so many indices stay on every axis.
        inexact: also prune axes where removal is not exactly masking (normalisation over the axis).
        fold_shift: carry the constant that a removed BatchNorm channel emits into the next layer's bias.
    """

    stage: Literal["prune"]
    macs: Annotated[float, Field(gt=0)] | None = None
    params: Annotated[float, Field(gt=0)] | None = None
    latency: Annotated[float, Field(gt=0)] | None = None
    ratio: Annotated[float, Field(ge=0, lt=1)] | dict[str, Annotated[float, Field(ge=0, lt=1)]] | None = None
    support: bool = False
    scores: Literal["auto", "magnitude"] = "auto"
    round_to: Positive = 1
    min_keep: Positive = 1
    inexact: bool = False
    fold_shift: bool = True

    @model_validator(mode="after")
    def _one_budget(self) -> PruneStage:
        given = [name for name in ("macs", "params", "latency", "ratio") if getattr(self, name) is not None]
        given += ["support"] if self.support else []
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(f"give exactly one of `macs`, `params`, `latency`, `ratio` and `support: true`; {found}")
        if self.support and self.scores != "auto":
            raise ValueError("`support: true` takes its zeros from the slimming stage; leave out `scores`")
        return self


class ExportStage(Section):
    """Write model.onnx and compare it with the PyTorch model on test images.

    Attributes:
        tolerance: largest difference of any output (a logit, or a box as a share of the image) that is accepted.
        int8: also write model_int8.onnx, which is compared with PyTorch and evaluated on test images.
        calibration_images: training images that the ranges of its activations come from.
        min_agreement: smallest accepted agreement: share of test images, or of their pixels, with the same class; of
            detectors and regressors 1 less the relative difference of outputs.
    """

    stage: Literal["export"]
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    int8: bool = False
    calibration_images: Positive = 256
    min_agreement: Annotated[float, Field(gt=0, le=1)] = 0.9


class ReportStage(Section):
    """Measure dense against compressed; write metrics.json, the plots and the model card.

    Attributes:
        title: of the model card.
        dense: which stage's model is the dense one, by name or number; if not given, the unpruned stage that is best on the
            validation images (accuracy, or mean average precision).
        latency_rounds: how often the two models take turns while they are timed.
    """

    stage: Literal["report"]
    title: str | None = None
    dense: str | int | None = None
    latency_rounds: Positive = 15


class PushStage(Section):
    """Upload the finished folder to the Hub.

    Attributes:
        repo: ``user/name`` of the repository.
    """

    stage: Literal["push"]
    repo: Annotated[str, Field(pattern=r"^[^/\s]+(/[^/\s]+)?$")]
    private: bool = False


Stage = Annotated[
    TrainStage
    | FinetuneStage
    | NetworkSlimmingStage
    | ProximalSlimmingStage
    | GrowingRegularizationStage
    | DimensionSearchStage
    | ArchitectureSearchStage
    | WidthSearchStage
    | SparseGroupStage
    | TrainedRankPruningStage
    | DistillStage
    | DeriveStage
    | FactorizeStage
    | ReplaceAttentionStage
    | PruneStage
    | QuantizeStage
    | ExportStage
    | ReportStage
    | PushStage,
    Field(discriminator="stage"),
]
STAGES: dict[str, type[Section]] = {
    "train": TrainStage,
    "network_slimming": NetworkSlimmingStage,
    "proximal_slimming": ProximalSlimmingStage,
    "growing_regularization": GrowingRegularizationStage,
    "dimension_search": DimensionSearchStage,
    "architecture_search": ArchitectureSearchStage,
    "width_search": WidthSearchStage,
    "sparse_group": SparseGroupStage,
    "trained_rank_pruning": TrainedRankPruningStage,
    "derive": DeriveStage,
    "factorize": FactorizeStage,
    "replace_attention": ReplaceAttentionStage,
    "prune": PruneStage,
    "finetune": FinetuneStage,
    "distill": DistillStage,
    "quantize": QuantizeStage,
    "export": ExportStage,
    "report": ReportStage,
    "push": PushStage,
}
MODEL_STAGES = tuple(name for name, kind in STAGES.items() if issubclass(kind, (Training, Compression)))
"""Those that change the model."""


class Recipe(Section):
    """One run: a model, data and the stages between them and a smaller model.

    Attributes:
        name: of the run; the default output is ``runs/<name>``.
        task: what the model does: ``image-classification``, ``object-detection``, ``image-segmentation`` (semantic) or
            ``eye-openness``.
        description: a sentence or two for the model card.
        seed: of weights, data order and augmentation.
        output: folder of the result, relative to the working directory.
        training: TrainingArguments of all training stages.
        stages: in order.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Literal["image-classification", "object-detection", "image-segmentation", "eye-openness"] = (
        "image-classification"
    )
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output: str | None = None
    model: ModelSection
    data: DataSection
    training: dict[str, Any] = Field(default_factory=dict)
    stages: Annotated[list[Stage], Field(min_length=1)]

    _source: Source | None = PrivateAttr(default=None)

    def where(self, *location: str | int) -> str:
        """File, line and field of a value, for the start of a message."""
        return self._source.where(*location) if self._source else f"field {dotted(location)}"

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe's file, where it came from a file."""
        return self._source.folder if self._source else None

    def as_yaml(self) -> str:
        """The recipe after all overrides, without ``output``; defaults are left out."""
        content = self.model_dump(mode="json", exclude_unset=True, exclude={"output"})
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, its content as plain data, or a recipe.
        overrides: ``a.b=c`` assignments; ``stages.train.epochs=2`` and ``stages.0.epochs=2`` both work.

    Raises:
        RecipeError: naming file, line and field of everything that is wrong.
    """
    if isinstance(recipe, Recipe):
        source = Source(recipe._source.name if recipe._source else "recipe", recipe.model_dump(exclude_unset=True))
        if recipe._source:
            source.folder, source.positions = recipe._source.folder, dict(recipe._source.positions)
    elif isinstance(recipe, Mapping):
        source = Source("recipe", _copy(dict(recipe)))
    else:
        source = read_source(Path(recipe))
    stages = source.data.get("stages")
    if isinstance(stages, list):  # `- export` is short for `- stage: export`
        stages[:] = [{"stage": entry} if isinstance(entry, str) else entry for entry in stages]
    source.override(overrides)
    try:
        loaded = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(_message(source, detail) for detail in error.errors())) from None
    loaded._source = source
    checks = (_task_problems, _training_problems, _order_problems)
    problems = [problem for check in checks for problem in check(loaded)]
    if problems:
        raise RecipeError("\n".join(problems))
    return loaded


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _message(source: Source, detail: ErrorDetails) -> str:
    location = list(detail["loc"])
    owner: type[Section] | None = Recipe
    if len(location) > 2 and location[0] == "stages":
        owner = STAGES.get(str(location[2]))
        del location[2]  # pydantic puts the stage's name after its number
        owner = Bits if location[2:3] == ["quantize"] and len(location) > 3 else owner
    elif len(location) > 1:
        sections: dict[str, type[Section]] = {"model": ModelSection, "data": DataSection}
        owner = sections.get(str(location[0]))
        parts: dict[str, type[Section]] = {"scenes": ScenesSection, "eyes": EyesSection}
        if location[0] == "data" and len(location) > 2:
            owner = parts.get(str(location[1]), owner)
    kind = detail["type"]
    known = list(owner.model_fields) if owner else []
    if kind == "extra_forbidden":
        text = f"unknown field.{closest(location[-1], known)} Possible: {', '.join(known)}."
    elif kind == "missing":
        text = f"required, and missing.{_misspelt(source, location, known)}"
    elif kind == "union_tag_invalid":
        tag = detail.get("ctx", {}).get("tag")
        text = f"there is no stage {tag!r}.{closest(tag, STAGES)} Possible: {', '.join(STAGES)}."
    elif kind == "union_tag_not_found":
        text = f"every entry says which stage it is, as `stage: train`. Possible: {', '.join(STAGES)}."
    else:
        reason = detail["msg"].removeprefix("Value error, ")
        received = detail["input"]
        shown = "" if isinstance(received, (dict, list)) else f" (received {received!r})"
        near = closest(received, str(detail["ctx"]["expected"]).split("'")[1::2]) if kind == "literal_error" else ""
        text = f"{reason[:1].lower()}{reason[1:]}{shown}.{near}"
    return f"{source.where(*location)}: {text}"


def _misspelt(source: Source, location: list[str | int], known: list[str]) -> str:
    holder: Any = source.data
    for part in location[:-1]:
        holder = holder[part]
    extra = [str(key) for key in holder if key not in known] if isinstance(holder, dict) else []
    near = closest(location[-1], extra)
    return near.replace("Did you mean", "Is it").replace("?", ", misspelt?") if near else ""


@functools.cache
def _argument_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_argument_types()[name], config=ConfigDict(arbitrary_types_allowed=True))


def _training_problems(recipe: Recipe) -> list[str]:
    """Every training setting by name and type; ranges are TrainingArguments' own business, at the start of the run."""
    found: list[tuple[tuple[str | int, ...], Any]] = [(("training", name), v) for name, v in recipe.training.items()]
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Training):
            found += [(("stages", index, "training", name), value) for name, value in stage.training.items()]
    problems = []
    for location, value in found:
        name = str(location[-1])
        if name in _RESERVED:
            text = f"is not set here; {_RESERVED[name]}."
        elif name not in _argument_types():
            possible = [known for known in _argument_types() if known not in _RESERVED]
            text = f"unknown; `training` takes the fields of transformers.TrainingArguments.{closest(name, possible)}"
        else:
            try:
                _adapter(name).validate_python(value)
                continue
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                text = f"{reason[:1].lower()}{reason[1:]} (received {value!r})."
        problems.append(f"{recipe.where(*location)}: {text}")
    return problems


def _task_problems(recipe: Recipe) -> list[str]:
    """Fields that mean nothing for the recipe's task."""
    return _eye_problems(recipe) if recipe.task == "eye-openness" else _data_problems(recipe)


def _data_problems(recipe: Recipe) -> list[str]:
    """Fields of the data that mean nothing for a classifier or a detector."""
    given, name = recipe.data.model_fields_set, recipe.data.name
    if name == "rendered_eyes" or "eyes" in given:
        field = "name" if name == "rendered_eyes" else "eyes"
        return [
            f"{recipe.where('data', field)}: rendered eyes are for the task eye-openness; the recipe's is {recipe.task}."
        ]
    of_detection = dict.fromkeys(("objects_column", "box_format"), "there are no boxes")
    of_segmentation = dict.fromkeys(("mask_column", "class_names", "ignore_label"), "there are no masks")
    reasons = {
        "image-classification": {
            **dict.fromkeys((*of_detection, "scenes"), "images of this task have one label and no boxes"),
            **of_segmentation,
        },
        "object-detection": {
            "crop_padding": "it would move objects out of the image",
            "label_column": "boxes and classes are in objects_column",
            **of_segmentation,
        },
        "image-segmentation": {
            "crop_padding": "images and masks are resized together and not shifted",
            "label_column": "classes are in mask_column",
            **of_detection,
        },
    }[recipe.task]
    problems = {f: f"is not for {recipe.task}: {reason}. Leave it out." for f, reason in reasons.items() if f in given}
    is_classification = recipe.task == "image-classification"
    if name == ("scenes" if is_classification else "digits"):
        others = "object-detection and image-segmentation" if is_classification else "image-classification"
        problems["name"] = (
            f"{name!r} is for {others}; the recipe's task is {recipe.task}. Set task, or choose other data."
        )
    elif not is_classification and name != "scenes" and "scenes" in given:
        problems["scenes"] = "says what `name: scenes` composes, and other data are named. Leave one of the two out."
    elif recipe.task == "image-segmentation" and name == "scenes":
        known = "scenes know their own classes and masks. Leave it out."
        problems |= {field: f"is not for scenes: {known}" for field in of_segmentation if field in given}
    return [f"{recipe.where('data', field)}: {text}" for field, text in problems.items()]


def _eye_problems(recipe: Recipe) -> list[str]:
    """Fields that mean nothing for eye openness, whose data come from ``data.eyes`` alone."""
    possible = {"name", "eyes", "split_seed", "train_limit", "validation_limit", "test_limit"}
    problems = {
        field: f"is not for eye-openness. Leave it out; `eyes` says what is rendered. Possible: {', '.join(sorted(possible))}."
        for field in sorted(recipe.data.model_fields_set - possible)
    }
    if recipe.data.name != "rendered_eyes":
        problems["name"] = (
            f"{recipe.data.name!r} is not for eye-openness: eyes are rendered. Set `name: rendered_eyes`, and give open and "
            "closed eyes of your own with `eyes: {folder: ...}`."
        )
    eyes = recipe.data.eyes
    if eyes is not None and eyes.folder is not None and "weak" in eyes.model_fields_set:
        problems["eyes"] = "has both `weak` and `folder`; the folder takes the place of the rendered weak labels."
    return [f"{recipe.where('data', field)}: {text}" for field, text in problems.items()]


def _order_problems(recipe: Recipe) -> list[str]:
    """Stages that come in an order that cannot work."""
    problems = []
    names = [stage.stage for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        here = recipe.where("stages", index)
        before = names[:index]
        finished = next((name for name in before if name not in MODEL_STAGES), None)
        if stage.stage in MODEL_STAGES and finished:
            problems.append(
                f"{here}: {stage.stage} changes the model after {finished}, which would describe another model. "
                f"Move {finished} behind the last of: {', '.join(MODEL_STAGES)}."
            )
        if stage.stage in ("export", "report", "push") and stage.stage in before:
            problems.append(f"{here}: a recipe has one {stage.stage} stage.")
        if stage.stage == "export" and "report" in before:
            problems.append(f"{here}: report measures the exported file, so export comes before report.")
        if isinstance(stage, DeriveStage) and "architecture_search" not in before:
            problems.append(f"{here}: derive needs an architecture_search stage before it, which chooses the network.")
        if "derive" in before and isinstance(stage, (Compression, Method, ArchitectureSearchStage)):
            problems.append(
                f"{here}: {stage.stage} would work on a network that is not known before derive has run. Run it in another "
                "recipe, with `model.pretrained` the result of this one."
            )
        smaller = next((name for name in before if name in ("prune", "factorize")), None)
        if isinstance(stage, ReplaceAttentionStage) and smaller:
            problems.append(
                f"{here}: filters take the place of whole attention blocks, and {smaller} leaves parts of them. Move "
                f"replace_attention before {smaller}; what stands there then can be pruned and factorised."
            )
        if isinstance(stage, PruneStage) and stage.support and scoring_stage(recipe, index) is None:
            deciding = " or ".join(n for n, kind in STAGES.items() if issubclass(kind, Method) and kind.decides)
            problems.append(
                f"{recipe.where('stages', index, 'support')}: needs a {deciding} stage before it, with neither prune nor "
                "factorize in between. Add one, or give a budget (`macs: 0.5`)."
            )
        if isinstance(stage, ReportStage) and stage.dense is not None:
            problems += _dense_problems(recipe, index, stage)
        problems += _bit_problems(recipe, index)
    return problems


def _bit_problems(recipe: Recipe, index: int) -> list[str]:
    """What cannot come after the model is quantized, and teachers that are not there."""
    stage = recipe.stages[index]
    here, problems = recipe.where("stages", index), []
    earlier = next((n for n in range(index) if quantizes(recipe.stages[n])), None)
    if earlier is not None:
        name = f"stage {earlier} ({recipe.stages[earlier].stage})"
        if quantizes(stage):
            problems.append(f"{here}: {name} quantizes the model already. Leave one of the two out.")
        elif stage.stage in MODEL_STAGES and not isinstance(stage, (TrainStage, FinetuneStage, DistillStage)):
            problems.append(
                f"{here}: {stage.stage} needs float weights, and {name} quantizes them. Move it before that stage."
            )
    if isinstance(stage, DistillStage):
        if stage.teacher_stage is not None and teacher_number(recipe, index) is None:
            options = [f"{n} ({s.stage})" for n, s in enumerate(recipe.stages[:index]) if s.stage in MODEL_STAGES]
            problems.append(
                f"{recipe.where('stages', index, 'teacher_stage')}: {stage.teacher_stage!r} is not one earlier stage with a "
                f"model. Possible: {', '.join(options) or 'none'}."
            )
        if stage.student == "start" and any(isinstance(other, Compression) for other in recipe.stages[:index]):
            problems.append(
                f"{recipe.where('stages', index, 'student')}: `start` would undo the compression of earlier stages. Leave it "
                "out, or move the distill stage before them."
            )
    return problems


def compresses(stage: Section) -> bool:
    """Whether the model of a stage is not dense any more."""
    return isinstance(stage, Compression) or quantizes(stage)


def quantizes(stage: Section) -> bool:
    """Whether a stage leaves a quantized model where it found a float one."""
    return isinstance(stage, QuantizeStage) or (isinstance(stage, DistillStage) and stage.quantize is not None)


def bits_of_training(recipe: Recipe, index: int) -> tuple[Bits, str] | None:
    """The bits that a stage trains in, and the rule for scales where they name none; None for float weights."""
    for number in range(index, -1, -1):
        stage = recipe.stages[number]
        if isinstance(stage, QuantizeStage):
            return stage, "least_squares"
        if isinstance(stage, DistillStage) and stage.quantize is not None:
            return stage.quantize, "learned"
    return None


def teacher_number(recipe: Recipe, index: int) -> int | None:
    """Number (from 1) of the stage whose model is the teacher of the distill stage at ``index``; None without one."""
    wanted = recipe.stages[index].teacher_stage  # type: ignore[union-attr]
    found = [
        number
        for number, other in enumerate(recipe.stages[:index], 1)
        if other.stage in MODEL_STAGES and wanted in (number - 1, other.stage)
    ]
    return found[0] if len(found) == 1 else None


def _dense_problems(recipe: Recipe, index: int, stage: ReportStage) -> list[str]:
    names: list[str] = [other.stage for other in recipe.stages]
    pruned = next((i for i, other in enumerate(recipe.stages) if compresses(other)), len(names))
    usable = [number for number, name in enumerate(names[:pruned]) if name in MODEL_STAGES]
    where = recipe.where("stages", index, "dense")
    if isinstance(stage.dense, int):
        wanted = [stage.dense] if stage.dense in usable else []
    else:
        wanted = [number for number in usable if names[number] == stage.dense]
    if len(wanted) == 1:
        return []
    options = ", ".join(f"{number} ({names[number]})" for number in usable) or "none"
    return [f"{where}: {stage.dense!r} is not one stage before the model gets smaller. Possible: {options}."]


def scoring_stage(recipe: Recipe, index: int) -> int | None:
    """The method stage whose scores a prune stage at ``index`` uses, or None for weight magnitudes."""
    stage = recipe.stages[index]
    for number in range(index - 1, -1, -1):
        other = recipe.stages[number]
        if isinstance(other, Compression):  # its axes are others, or have other indices
            return None
        if isinstance(other, Method):
            is_undecided = isinstance(stage, PruneStage) and stage.support and not other.decides
            return None if is_undecided else number
    return None
