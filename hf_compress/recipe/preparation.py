"""Everything that can be known before training: does the recipe fit the data, the model, the budget and this machine?

What is wrong is found here, in seconds, and said with the recipe's line; what is right is handed on to the stages.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..axes import AxisGraph, find_axes
from ..errors import DataError, HfCompressError, HubError, ModelError, NothingToShrinkError, RecipeError
from ..export.outputs import named_outputs
from ..measurement.latency_table import LatencyTable
from ..surgery import magnitude_scores
from .data import RawData, local_folder
from .schema import (
    ArchitectureSearchStage,
    Compression,
    DeriveStage,
    DistillStage,
    FactorizeStage,
    Method,
    PruneStage,
    QuantizeStage,
    Recipe,
    ReplaceAttentionStage,
    TrainedRankPruningStage,
    Training,
    bits_of_training,
    quantizes,
    scoring_stage,
)
from .source import closest
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

_NEEDED = {"export": ("onnx", "onnxscript", "onnxruntime"), "report": ("matplotlib",)}  # stage -> modules


@dataclass
class Prepared:
    """A recipe whose parts are known to fit.

    Attributes:
        model: as it is before the first stage.
        processor: the image processor that is saved beside the model.
        axes: of ``model``; None when no stage needs them.
        steps: stage index -> optimizer steps, for the stages that train.
        goals: stage index -> what a prune stage aims for, in words.
    """

    recipe: Recipe
    data: RawData[Any]
    processor: Any
    model: PreTrainedModel
    axes: AxisGraph | None
    steps: dict[int, int] = field(default_factory=dict)
    goals: dict[int, str] = field(default_factory=dict)
    _splits: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What the model does."""
        return TASKS[self.recipe.task]

    def split(self, name: str) -> Any:
        """The images of a split as the model takes them, without augmentation."""
        if name not in self._splits:
            self._splits[name] = self.task.split(self.data.splits()[name], self.processor, self.data)
        return self._splits[name]

    def training_split(self, seed: int) -> Any:
        """The training images with the recipe's augmentation."""
        return self.task.training_split(self.recipe, self.processor, self.data, seed)

    @property
    def example_inputs(self) -> dict[str, Tensor]:
        """One real image as the model takes it."""
        return {"pixel_values": self.split("validation").pixels(1)}


def prepare(recipe: Recipe) -> Prepared:
    """Load data and model, and check everything that can be checked without training.

    Raises:
        HfCompressError: the first thing that does not fit, with what to do about it.
    """
    check_installation(recipe)
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Training):
            training_arguments(recipe, index, Path("unused"))
            method_callback(recipe, index)
    data = TASKS[recipe.task].load_data(recipe)
    model = build_model(recipe, data)
    processor = build_processor(recipe, data, model)
    prepared = Prepared(recipe, data, processor, model, None)
    _check_weights(recipe, model)
    _check_images(prepared)
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Training):
            arguments = training_arguments(recipe, index, Path("unused"))
            try:
                prepared.steps[index] = number_of_steps(arguments, stage.images(len(data.train)))
            except DataError as error:
                raise DataError(f"{recipe.where('stages', index)}: {error}") from error
    for index, stage in enumerate(recipe.stages):
        if quantizes(stage):
            _check_bits(prepared, index)
        if isinstance(stage, DistillStage):
            _check_teacher(prepared, index)
    _check_search(prepared)
    needs_axes = (FactorizeStage, PruneStage, ReplaceAttentionStage, Method, TrainedRankPruningStage)
    if any(isinstance(stage, needs_axes) for stage in recipe.stages):
        prepared.axes = find_axes(model, prepared.example_inputs)
        _check_budgets(prepared)
    return prepared


def check_installation(recipe: Recipe) -> None:
    """See that optional dependencies and the Hub's token are there for the stages that need them.

    Raises:
        RecipeError, HubError: naming what is missing.
    """
    for module, install in TASKS[recipe.task].modules.items():
        if importlib.util.find_spec(module) is None:
            raise RecipeError(
                f"{recipe.where('task')}: {recipe.task} needs {module}, not installed. Run `pip install '{install}'`."
            )
    for index, stage in enumerate(recipe.stages):
        missing = [name for name in _NEEDED.get(stage.stage, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise RecipeError(
                f"{recipe.where('stages', index)}: the {stage.stage} stage needs {', '.join(missing)}, not installed. "
                f"Run `pip install {' '.join(missing)}`, or leave the stage out."
            )
        if stage.stage == "push":
            from huggingface_hub import get_token, is_offline_mode

            if is_offline_mode():
                raise HubError(
                    f"{recipe.where('stages', index)}: the push stage needs the Hub, and HF_HUB_OFFLINE is set. Unset it, "
                    "or leave the stage out."
                )
            if get_token() is None:
                raise HubError(
                    f"{recipe.where('stages', index)}: the push stage needs a token of the Hub, and there is none. Run "
                    "`hf auth login`, set HF_TOKEN, or leave the stage out."
                )


# -- training settings -------------------------------------------------------------------------------------------


def training_arguments(recipe: Recipe, index: int, folder: Path) -> TrainingArguments:
    """The TrainingArguments of one stage: the runner's defaults, under the recipe's, under the stage's.

    Raises:
        RecipeError: when TrainingArguments refuses them.
    """
    from transformers import TrainingArguments

    stage = recipe.stages[index]
    assert isinstance(stage, Training)
    given = {**recipe.training, **stage.training}
    if stage.epochs is not None:
        given["num_train_epochs"] = stage.epochs
        given.pop("max_steps", None)
    if stage.steps is not None:
        given["max_steps"] = stage.steps
    defaults: dict[str, Any] = {
        "save_strategy": "steps" if "save_steps" in given else "epoch",
        "logging_strategy": "steps" if "logging_steps" in given else "epoch",
        "report_to": "none",
        "per_device_eval_batch_size": TASKS[recipe.task].eval_batch_size,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(
            output_dir=str(folder),
            seed=recipe.seed + index,  # every stage draws its own order of the data
            remove_unused_columns=False,
            **{**defaults, **given, **TASKS[recipe.task].arguments},
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        place = ("stages", index, "training") if stage.training else ("training",)
        raise RecipeError(f"{recipe.where(*place)}: TrainingArguments refuses this: {_first_line(error)}") from error


def number_of_steps(arguments: TrainingArguments, images: int) -> int:
    """Optimizer steps of a training stage on one process."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    round_off = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = round_off(images / arguments.train_batch_size)
    return math.ceil(arguments.num_train_epochs * max(math.ceil(batches / arguments.gradient_accumulation_steps), 1))


def method_callback(recipe: Recipe, index: int, example_inputs: dict[str, Tensor] | None = None) -> Any:
    """The callback of a method's stage, or None for ordinary training.

    Raises:
        HfCompressError: when the method refuses its parameters.
    """
    stage = recipe.stages[index]
    if not isinstance(stage, Training):
        return None
    try:
        return stage.callback(example_inputs)
    except (HfCompressError, TypeError, ValueError) as error:
        raise RecipeError(f"{recipe.where('stages', index)}: {_first_line(error)}") from error


def quantization_callback(recipe: Recipe, index: int) -> Any:
    """What trains a stage in few bits, or None where its weights are float."""
    found = bits_of_training(recipe, index)
    return None if found is None else found[0].callback(found[1])


# -- model and processor ------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, data: RawData[Any]) -> PreTrainedModel:
    """The model before the first stage, with the classes of the data.

    Raises:
        ModelError, DataError: when it cannot be built, or its classes are not those of the data.
    """
    from transformers import set_seed

    set_seed(recipe.seed)  # for new weights
    model = _new_model(recipe, data) if recipe.model.config is not None else _pretrained_model(recipe, data)
    channels = _setting(model, "num_channels")
    if channels not in (None, 3):
        raise DataError(
            f"{recipe.where('model')}: the model takes images of {channels} channel(s), and images are read as RGB, as "
            "transformers.pipeline does. Use a model with num_channels 3."
        )
    return model


def _new_model(recipe: Recipe, data: RawData[Any]) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING

    task = TASKS[recipe.task]
    given = dict(recipe.model.config or {})
    kind = given.pop("model_type")
    here = ("model", "config")
    if kind not in CONFIG_MAPPING:
        raise RecipeError(
            f"{recipe.where(*here, 'model_type')}: there is no model type {kind!r}.{closest(kind, CONFIG_MAPPING.keys())}"
        )
    config_class = CONFIG_MAPPING[kind]
    if config_class not in task.model_types():
        raise RecipeError(
            f"{recipe.where(*here, 'model_type')}: {kind!r} has no model for {task.words} in transformers. Possible, for "
            f"example: {task.examples}."
        )
    usual = config_class()
    known = [name for name in dir(usual) if not name.startswith("_")]
    accepted = [*known, *inspect.signature(config_class).parameters]
    for name in given:
        if name not in accepted:
            raise RecipeError(
                f"{recipe.where(*here, name)}: {config_class.__name__} has no {name!r}.{closest(name, known)}"
            )
    names = data.label_names
    if given.get("num_labels", len(names)) != len(names):
        raise DataError(
            f"{recipe.where(*here, 'num_labels')}: {given['num_labels']} classes, but {recipe.data.name} has {len(names)}. "
            "Leave num_labels out: it follows the data."
        )
    given.pop("num_labels", None)
    size = recipe.data.image_size or data.native_size
    if "image_size" in known and "image_size" not in given and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        is_pair = height != width or isinstance(usual.image_size, (list, tuple))
        given["image_size"] = [height, width] if is_pair else height
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    try:
        config = config_class(**given, **labels)
        # transformers 5.24 iterates over it where a model type has two classes (DeiT)
        config.architectures = config.architectures or []
        return task.auto_class.from_config(config)
    except Exception as error:  # configuration classes raise anything from KeyError to RuntimeError
        raise ModelError(f"{recipe.where(*here)}: no {kind} can be built from this: {_first_line(error)}") from error


def _pretrained_model(recipe: Recipe, data: RawData[Any]) -> PreTrainedModel:
    from transformers import AutoConfig

    task = TASKS[recipe.task]
    where = recipe.where("model", "pretrained")
    place = pretrained_name(recipe)
    names = data.label_names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    try:
        config = AutoConfig.from_pretrained(place)
        config_labels = [config.id2label[i] for i in sorted(config.id2label)]
        arguments: dict[str, Any] = {}
        if recipe.model.new_head:
            arguments = {**labels, "ignore_mismatched_sizes": True}
        elif len(config_labels) != len(names):
            raise DataError(
                f"{where}: the model has {len(config_labels)} classes and {recipe.data.name} has {len(names)}. "
                "Set model.new_head: true to train a new classifier, or choose the data set that the model was made for."
            )
        elif config_labels != names and sorted(config_labels) == sorted(names):
            raise DataError(
                f"{where}: the model numbers its classes {', '.join(config_labels[:4])}, ...; {recipe.data.name} numbers "
                f"them {', '.join(names[:4])}, ... Set model.new_head: true, or relabel the data."
            )
        model, loading = task.auto_class.from_pretrained(place, output_loading_info=True, **arguments)
    except HfCompressError:
        raise
    except Exception as error:  # a missing folder, the network, a damaged file: no common class
        raise ModelError(
            f"{where}: {recipe.model.pretrained!r} cannot be loaded for {task.words}: {_first_line(error)}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing and not recipe.model.new_head:
        raise ModelError(
            f"{where}: the checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])}), which would stay random. "
            "Set model.new_head: true when they are a new classifier's, else choose a complete checkpoint."
        )
    return model


def pretrained_name(recipe: Recipe) -> str:
    """The folder of a pretrained model, or its Hub id."""
    assert recipe.model.pretrained is not None
    folder = local_folder(recipe, recipe.model.pretrained, "model", "pretrained")
    return str(folder) if folder is not None else recipe.model.pretrained


def build_processor(recipe: Recipe, data: RawData[Any], model: PreTrainedModel) -> Any:
    """The image processor: that of a pretrained model where it has one, else plain resizing and normalisation.

    Raises:
        DataError: when no image size can be found.
    """
    from transformers import AutoImageProcessor

    section, task = recipe.data, TASKS[recipe.task]
    asked: dict[str, Any] = {}
    if section.image_mean is not None:
        asked["image_mean"] = section.image_mean
    if section.image_std is not None:
        asked["image_std"] = section.image_std
    if recipe.model.pretrained is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(pretrained_name(recipe), **asked)
        except (OSError, ValueError):  # the checkpoint has none
            processor = None
        if processor is not None:
            if section.image_size is None:
                return processor
            if "height" in (processor.size or {}) or recipe.task == "object-detection":
                processor.size = {"height": section.image_size, "width": section.image_size}
                return processor
    size = section.image_size or _setting(model, "image_size") or data.native_size
    if size is None:
        raise DataError(
            f"{recipe.where('data')}: the images of {section.name} differ in size and the model names none. Set "
            "data.image_size, for example to 224."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return task.new_processor(model, size={"height": height, "width": width}, **asked)


def _setting(model: PreTrainedModel, name: str) -> Any:
    """A setting of the model's configuration or of the backbone inside it."""
    for holder in (model.config, getattr(model.config, "backbone_config", None)):
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None


# -- checks ---------------------------------------------------------------------------------------------------------


def _check_weights(recipe: Recipe, model: PreTrainedModel) -> None:
    bad = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if not bool(torch.isfinite(p).all())]
    if bad:
        origin = recipe.where("model", "pretrained" if recipe.model.pretrained else "config")
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelError(
            f"{origin}: {bad[0]}{more} of the model's weights hold NaN or infinity: the training that made them "
            "diverged. Use a checkpoint from before that."
        )


def _check_images(prepared: Prepared) -> None:
    """Run the model on two real images."""
    recipe, model = prepared.recipe, prepared.model
    pixels = prepared.split("validation").pixels(2)
    shape = "x".join(str(n) for n in pixels.shape[1:])
    try:
        with torch.no_grad():
            outputs = named_outputs(model.eval()(pixel_values=pixels))
    except Exception as error:  # every architecture complains in its own way
        named = _setting(model, "image_size")
        hint = f"Set data.image_size: {named}, which the model names." if named else "Set another data.image_size."
        raise DataError(
            f"{recipe.where('data', 'image_size')}: {type(model).__name__} cannot take images of {shape} (channels x "
            f"height x width): {_first_line(error)} {hint}"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values()):
        raise ModelError(f"{recipe.where('model')}: the model answers with NaN or infinity before any training.")


def _check_bits(prepared: Prepared, index: int) -> None:
    """See that there are layers to quantize and that skip patterns match some."""
    from ..quantization import resolve

    recipe = prepared.recipe
    found = bits_of_training(recipe, index)
    assert found is not None
    bits, scale = found
    scheme = bits.scheme(scale)
    try:
        chosen = resolve(prepared.model, scheme)
    except HfCompressError as error:
        if _has_new_modules(recipe, index):
            return  # patterns may match what is not there yet
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    parts = [f"weights of {len(chosen.layers or ())} layers in {scheme.weights} bits"] if scheme.weights else []
    parts += [f"{scheme.activation_scheme} activations in {scheme.activations} bits"] if scheme.activations else []
    prepared.goals[index] = ", ".join(parts)


def _check_teacher(prepared: Prepared, index: int) -> None:
    """Put student and teacher together as the stage will; of an earlier stage's model only the weights will differ."""
    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, DistillStage)
    try:
        if stage.teacher is None:
            teacher: Any = copy.deepcopy(prepared.model)
        else:
            place = teacher_name(recipe, index)
            _check_same_images(prepared, place)
            teacher = place
        if _has_new_modules(recipe, index):
            stage = stage.model_copy(update={"features": None})  # they may name what is not there yet
        stage.wrap(copy.deepcopy(prepared.model), teacher, prepared.example_inputs)
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error


def _has_new_modules(recipe: Recipe, index: int) -> bool:
    """Whether an earlier stage puts other modules into the model, under names that are not known yet."""
    keeps_names = (PruneStage, QuantizeStage)
    return any(isinstance(s, Compression) and not isinstance(s, keeps_names) for s in recipe.stages[:index])


def teacher_name(recipe: Recipe, index: int) -> str:
    """The folder of a distill stage's teacher, or its Hub id."""
    stage = recipe.stages[index]
    assert isinstance(stage, DistillStage) and stage.teacher is not None
    folder = local_folder(recipe, stage.teacher, "stages", index, "teacher")
    return str(folder) if folder is not None else stage.teacher


def _check_same_images(prepared: Prepared, teacher: str) -> None:
    """A teacher that was trained on images of another normalisation would be wrong about these."""
    from transformers import AutoImageProcessor

    try:
        its = AutoImageProcessor.from_pretrained(teacher)
    except (OSError, ValueError):  # the checkpoint has none
        return
    for name in ("image_mean", "image_std"):
        ours, theirs = getattr(prepared.processor, name, None), getattr(its, name, None)
        if ours is not None and theirs is not None and list(ours) != list(theirs):
            raise DataError(
                f"student and teacher see the same images, and the teacher's image processor has {name}={list(theirs)} "
                f"where the recipe's has {list(ours)}. Set data.{name} to the teacher's."
            )


def _check_search(prepared: Prepared) -> None:
    """See that there is an architecture to search, and that the network which it chooses could be built."""
    recipe, model = prepared.recipe, prepared.model
    for index, stage in enumerate(recipe.stages):
        try:
            if isinstance(stage, ArchitectureSearchStage):
                from ..methods.architecture_search import architecture_of

                architecture_of(model, stage.architecture)
            elif isinstance(stage, DeriveStage):
                derived = derive_by(stage, model)
                prepared.goals[index] = f"{type(derived).__name__}, with cells that the search chooses"
        except HfCompressError as error:
            raise type(error)(f"{recipe.where('stages', index)}: {error}") from error


def derive_by(stage: DeriveStage, model: Any) -> Any:
    """The network that a searched model chooses now.

    Raises:
        ModelError: when it is no supernet, or the stage's configuration is impossible.
    """
    if not callable(getattr(model, "derive", None)):
        raise ModelError(
            f"{type(model).__name__} has no method derive(), which makes the network that was searched. Search a supernet, "
            "for example model.config.model_type: darts_supernet."
        )
    try:
        derived = model.derive(**stage.config)
        known = [name for name in dir(type(derived.config)()) if not name.startswith("_")]
        for name in stage.config:
            if name not in [*known, "num_labels"]:
                raise ModelError(f"{type(derived.config).__name__} has no {name!r}.{closest(name, known)}")
        return derived
    except HfCompressError:
        raise
    except Exception as error:  # strict configurations raise errors of their own
        raise ModelError(f"no network can be derived with {stage.config}: {_first_line(error)}") from error


def _check_budgets(prepared: Prepared) -> None:
    """See that every prune stage has something to remove and that its budget is within reach."""
    recipe, axes, model = prepared.recipe, prepared.axes, prepared.model
    assert axes is not None
    found: dict[int, Mapping[str, Tensor]] = {}  # number of a method's stage -> the scores that it begins with
    table: LatencyTable | None = None
    for index, stage in enumerate(recipe.stages):
        here = recipe.where("stages", index)
        try:
            if isinstance(stage, Method):
                found[index] = _method_scores(prepared, index, model)
            elif isinstance(stage, TrainedRankPruningStage):
                method_callback(recipe, index).target_names(model)  # refuses patterns that match nothing
            elif isinstance(stage, FactorizeStage):
                prepared.goals[index] = _try_to_factorize(stage, prepared, model)
            elif isinstance(stage, ReplaceAttentionStage):
                prepared.goals[index], model = _try_to_replace(stage, prepared, model)
                axes, table = find_axes(model, prepared.example_inputs), None  # what later stages act on
            elif isinstance(stage, PruneStage):
                from .stages import choose

                source = scoring_stage(recipe, index) if stage.scores == "auto" else None
                scores = magnitude_scores(model, axes) if source is None else found[source]
                if stage.support:
                    assert source is not None
                    prepared.goals[index] = recipe.stages[source].decides  # type: ignore[union-attr]
                    continue
                if stage.latency is not None and table is None:
                    table = LatencyTable.for_model(model, axes, prepared.example_inputs)
                plan = choose(stage, axes, scores, dense=prepared.axes or axes, latency_table=table)
                prepared.goals[index] = _goal(stage, axes, plan, table)
        except HfCompressError as error:
            raise type(error)(f"{here}: {error}") from error


def _try_to_replace(
    stage: ReplaceAttentionStage, prepared: Prepared, model: PreTrainedModel
) -> tuple[str, PreTrainedModel]:
    """What a stage that replaces attention aims at, and a copy of the model with filters that were not matched."""
    from ..surgery import find_attention, replacement_report
    from .stages import replace_by

    blocks = len(find_attention(model, prepared.example_inputs))
    trial = copy.deepcopy(model)
    replace_by(stage, prepared, trial, images=2)
    count = len(replacement_report(trial).replaced)
    return f"filters in place of {count} of {blocks} attention blocks", trial


def _try_to_factorize(stage: FactorizeStage, prepared: Prepared, model: PreTrainedModel) -> str:
    """What a factorize stage aims at; the layers and the budget are tried on a copy."""
    from .stages import factorize_by

    trial = copy.deepcopy(model)
    if stage.macs is None and stage.params is None:
        try:
            factorize_by(stage, prepared, trial)
        except NothingToShrinkError:
            pass  # these weights are not trained yet, and trained ones may have less in their tails
        return f"each layer loses at most {stage.energy:g} of its energy"
    factorize_by(stage, prepared, trial)
    macs, params = find_axes(trial, prepared.example_inputs).cost()
    return f"to about {macs:,} MACs and {params:,} parameters"


def _method_scores(prepared: Prepared, index: int, model: PreTrainedModel) -> Mapping[str, Tensor]:
    scores = method_callback(prepared.recipe, index, prepared.example_inputs).first_scores(model)
    if not scores:
        raise NothingToShrinkError(
            f"{type(model).__name__} has no axis with a learned scale (BatchNorm or layer scale), which "
            "slimming needs. Prune by weight magnitudes instead: a prune stage without a slimming stage."
        )
    return scores


def _goal(stage: PruneStage, axes: AxisGraph, plan: Any, table: LatencyTable | None) -> str:
    macs, params = axes.cost(plan)
    left = f"to about {macs:,} MACs and {params:,} parameters"
    if stage.latency is not None and table is not None:
        asked = f"{stage.latency:g} of the time" if stage.latency <= 1 else f"{stage.latency:g} ms"
        return f"{asked}: from about {table.dense_ms:.3g} to {table.predict(plan):.3g} ms for one image, {left}"
    wanted = stage.macs or stage.params or "ratio"
    kind = "MACs" if stage.macs is not None else "parameters" if stage.params is not None else "widths"
    limit = f"{wanted:g} of the {kind}" if isinstance(wanted, float) and wanted < 1 else f"{wanted} {kind}"
    return f"{limit}: {left}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def use_all_cores() -> None:
    """Let torch use the cores that this process may use, where the user has not said how many (OMP_NUM_THREADS)."""
    if os.environ.get("OMP_NUM_THREADS"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's share of time, which torch does not see
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    torch.set_num_threads(min(cores, torch.get_num_threads()))
