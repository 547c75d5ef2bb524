"""What differs between the tasks of a recipe: the data, the model's Auto class, batches, figures and pictures.

Everything else (stages, training, surgery, export, reload, card) asks the recipe's :class:`Task` and is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .data import ImageSplit, RawData, load_data
from .schema import EyesSection, Recipe

if TYPE_CHECKING:
    from .preparation import Prepared

_PICTURES = 3  # images on which detections are drawn


class Task(ABC):
    """One task.

    Attributes:
        name: as in the recipe, and in ``transformers.pipeline``.
        auto: end of the names of its Auto class and of its model classes.
        figures: of metrics.json, measured on images; the larger the better, and the first one decides.
        measured: what the first one is, in words.
        examples: model types, for messages.
        eval_batch_size: images that are evaluated at once.
        check_images: so many test images serve the checks of reloaded and exported models.
        modules: that it needs -> what to install.
        arguments: of TrainingArguments that it needs.
    """

    name: ClassVar[str]
    auto: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]
    measured: ClassVar[str]
    examples: ClassVar[str]
    eval_batch_size: ClassVar[int]
    check_images: ClassVar[int]
    modules: ClassVar[Mapping[str, str]] = {}
    arguments: ClassVar[Mapping[str, Any]] = {}

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return self.name.replace("-", " ")

    @property
    def auto_class(self) -> Any:
        """The Auto class of its models."""
        import transformers

        return getattr(transformers, f"AutoModel{self.auto}")

    @abstractmethod
    def model_types(self) -> Any:
        """Transformers' mapping from configurations to models of this task."""

    @abstractmethod
    def load_data(self, recipe: Recipe) -> RawData[Any]:
        """The images that a recipe names, in three splits."""

    @abstractmethod
    def split(self, raw: Any, processor: Any, data: RawData[Any]) -> Any:
        """A split as a data set of whole batches, without augmentation."""

    @abstractmethod
    def training_split(self, recipe: Recipe, processor: Any, data: RawData[Any], seed: int) -> Any:
        """The training images with the recipe's augmentation."""

    @abstractmethod
    def new_processor(self, model: Any, **settings: Any) -> Any:
        """An image processor for a model that comes without one."""

    @abstractmethod
    def evaluation(self, processor: Any) -> dict[str, Any]:
        """The arguments of Trainer by which it gives this task's figures."""

    @abstractmethod
    def measure(self, model: Any, split: Any) -> dict[str, float]:
        """The figures of a model on a split, in evaluation mode, on the best device that there is."""

    def callbacks(self, model: Any) -> list[Any]:
        """Callbacks of Trainer that this model needs for every training."""
        return []

    def notes(self, metrics: Mapping[str, Any]) -> list[str]:
        """Sentences that the model card has to say about this task's models, with the figures in ``metrics``."""
        return []

    def draw(self, prepared: Prepared, models: Mapping[str, Any], folder: Path) -> dict[str, str]:
        """Pictures of what the dense and the compressed model say.

        Returns:
            File name -> what it shows.
        """
        return {}


class ImageClassification(Task):
    """One label for an image; accuracy."""

    name = "image-classification"
    auto = "ForImageClassification"
    figures = ("accuracy",)
    measured = "accuracy"
    examples = "resnet, mobilenet_v2, convnext, vit, swin, timm_wrapper"
    eval_batch_size = 256
    check_images = 64

    def model_types(self) -> Any:
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        return MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    def load_data(self, recipe: Recipe) -> RawData[Any]:
        return load_data(recipe)

    def split(self, raw: Any, processor: Any, data: RawData[Any]) -> ImageSplit:
        return ImageSplit(raw, processor)

    def training_split(self, recipe: Recipe, processor: Any, data: RawData[Any], seed: int) -> ImageSplit:
        section = recipe.data
        return ImageSplit(
            data.train, processor, crop_padding=section.crop_padding, flip=section.horizontal_flip, seed=seed
        )

    def new_processor(self, model: Any, **settings: Any) -> Any:
        from transformers import ViTImageProcessor

        return ViTImageProcessor(**settings)  # resize, rescale, normalise

    def evaluation(self, processor: Any) -> dict[str, Any]:
        def accuracy(result: Any) -> dict[str, float]:
            return {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))}

        return {"compute_metrics": accuracy}

    def measure(self, model: Any, split: ImageSplit) -> dict[str, float]:
        right = 0
        for batch, output in _answers(model, split, self.eval_batch_size):
            right += int((output.logits.argmax(-1).cpu() == batch["labels"]).sum())
        return {"accuracy": right / len(split)}


class ObjectDetection(Task):
    """Boxes with a class; COCO's mean average precision."""

    name = "object-detection"
    auto = "ForObjectDetection"
    figures = ("map", "map_50")
    measured = "mean average precision"
    examples = "sidt, detr, conditional_detr, deformable_detr, rt_detr, yolos"
    eval_batch_size = 32
    check_images = 16
    modules: ClassVar[Mapping[str, str]] = {"pycocotools": "hf-compress[detection]"}
    arguments: ClassVar[Mapping[str, Any]] = {"eval_do_concat_batches": False}  # labels are lists

    def model_types(self) -> Any:
        from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING

        return MODEL_FOR_OBJECT_DETECTION_MAPPING

    def load_data(self, recipe: Recipe) -> RawData[Any]:
        from .detection_data import load_detection_data

        return load_detection_data(recipe)

    def split(self, raw: Any, processor: Any, data: RawData[Any]) -> Any:
        from .detection_data import DetectionSplit

        return DetectionSplit(raw, processor, len(data.label_names))

    def training_split(self, recipe: Recipe, processor: Any, data: RawData[Any], seed: int) -> Any:
        from .detection_data import DetectionSplit

        flip = recipe.data.horizontal_flip
        return DetectionSplit(data.train, processor, len(data.label_names), flip=flip, seed=seed)

    def new_processor(self, model: Any, **settings: Any) -> Any:
        from transformers import DetrImageProcessor

        return (_own_processor(model) or DetrImageProcessor)(**settings)

    def evaluation(self, processor: Any) -> dict[str, Any]:
        from ..measurement.detection import DetectionEvaluation

        evaluation = DetectionEvaluation(processor)
        return {"compute_metrics": evaluation, "preprocess_logits_for_metrics": evaluation.detections}

    def measure(self, model: Any, split: Any) -> dict[str, float]:
        from ..measurement.detection import DetectionEvaluation

        evaluation = DetectionEvaluation(split.processor)
        found, labels = [], []
        for batch, output in _answers(model, split, self.eval_batch_size):
            rows = evaluation.detections((output.logits.cpu(), output.pred_boxes.cpu()), batch["labels"])
            found.append(rows.numpy())
            labels.append(batch["labels"])
        figures = evaluation(SimpleNamespace(predictions=found, label_ids=labels))
        return {name: figures[name] for name in self.figures}

    def draw(self, prepared: Prepared, models: Mapping[str, Any], folder: Path) -> dict[str, str]:
        from ..measurement.plots_detection import draw_detections

        raw = prepared.data.test
        images = raw.read(range(min(_PICTURES, len(raw))))
        sizes = [(image.height, image.width) for image in images]
        found: dict[str, list[Any]] = {name: [] for name in models}
        for name, model in models.items():
            for image, size in zip(images, sizes, strict=True):
                pixels = prepared.processor(images=[image], return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    output = model(pixel_values=pixels)
                found[name] += prepared.processor.post_process_object_detection(
                    output, threshold=_DRAWN, target_sizes=torch.tensor([size])
                )
        names = dict(enumerate(prepared.data.label_names))
        file = folder / "detections.png"
        draw_detections(
            file, images, found["dense"], found["compressed"], names, threshold=_DRAWN, titles=("dense", "compressed")
        )
        return {
            file.name: f"What the two models find in test images; scores of {100 * _DRAWN:.0f} and more out of 100."
        }


class SemanticSegmentation(Task):
    """A class for every pixel; mean intersection over union, at the size that the model reads."""

    name = "image-segmentation"
    auto = "ForSemanticSegmentation"
    figures = ("mean_iou", "pixel_accuracy")
    measured = "mean intersection over union"
    examples = "afidaf, segformer, beit, upernet, mobilenet_v2, mobilevit"
    eval_batch_size = 16
    check_images = 8
    arguments: ClassVar[Mapping[str, Any]] = {"batch_eval_metrics": True}  # masks of all images would fill the memory

    def model_types(self) -> Any:
        from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

        return MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

    def load_data(self, recipe: Recipe) -> RawData[Any]:
        from .segmentation_data import load_segmentation_data

        return load_segmentation_data(recipe)

    def split(self, raw: Any, processor: Any, data: RawData[Any]) -> Any:
        from .segmentation_data import SegmentationSplit

        return SegmentationSplit(raw, processor, len(data.label_names))

    def training_split(self, recipe: Recipe, processor: Any, data: RawData[Any], seed: int) -> Any:
        from .segmentation_data import SegmentationSplit

        flip = recipe.data.horizontal_flip
        return SegmentationSplit(data.train, processor, len(data.label_names), flip=flip, seed=seed)

    def new_processor(self, model: Any, **settings: Any) -> Any:
        from transformers import SegformerImageProcessor

        found = _own_processor(model)
        return (found if hasattr(found, "post_process_semantic_segmentation") else SegformerImageProcessor)(**settings)

    def evaluation(self, processor: Any) -> dict[str, Any]:
        from ..measurement.segmentation import SegmentationEvaluation

        evaluation = SegmentationEvaluation()
        return {"compute_metrics": evaluation, "preprocess_logits_for_metrics": evaluation.confusion}

    def measure(self, model: Any, split: Any) -> dict[str, float]:
        from ..measurement.segmentation import confusion_matrices, segmentation_figures

        total: Any = 0
        for batch, output in _answers(model, split, self.eval_batch_size):
            total = total + confusion_matrices(output.logits.cpu(), batch["labels"]).sum(0)
        return segmentation_figures(total)

    def draw(self, prepared: Prepared, models: Mapping[str, Any], folder: Path) -> dict[str, str]:
        from ..measurement.plots_segmentation import draw_masks
        from ..measurement.segmentation import IGNORED

        raw = prepared.data.test
        places = range(min(_PICTURES, len(raw)))
        images = raw.read(places)
        labels = [np.array(mask, dtype=np.int64) for mask in raw.read_masks(places)]
        masks: dict[str, list[Any]] = {"data": [np.where(mask == raw.ignored, IGNORED, mask) for mask in labels]}
        for name, model in models.items():
            masks[name] = []
            for image in images:
                pixels = prepared.processor(images=[image], return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    logits = model(pixel_values=pixels).logits
                size = (image.height, image.width)
                resized = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                masks[name].append(resized[0].argmax(0).numpy())
        file = folder / "masks.png"
        draw_masks(file, images, masks, prepared.data.label_names)
        return {file.name: "The class of every pixel of test images: as labelled, and as the two models say."}


class EyeOpenness(Task):
    """How far an eye is open, from exact labels of rendered eyes and weak labels of others."""

    name = "eye-openness"
    auto = ""
    figures = ("agreement", "pearson", "auc")
    measured = "agreement (1 - mean absolute error)"
    examples = "eye_openness"
    eval_batch_size = 256
    check_images = 64
    arguments: ClassVar[Mapping[str, Any]] = {"label_names": ["openness"]}

    def model_types(self) -> Any:
        from ..models.eye_openness import EyeOpennessConfig, EyeOpennessForRegression

        return {EyeOpennessConfig: EyeOpennessForRegression}

    def load_data(self, recipe: Recipe) -> RawData[Any]:
        from .eye_data import load_eye_data

        return load_eye_data(recipe)

    def split(self, raw: Any, processor: Any, data: RawData[Any]) -> Any:
        from .eye_data import EyeSplit

        return EyeSplit(raw, processor)

    def training_split(self, recipe: Recipe, processor: Any, data: RawData[Any], seed: int) -> Any:
        from ..data.eyes.augmentation import EyeAugmentation
        from .eye_data import EyeSplit

        asked = recipe.data.eyes or EyesSection()
        augmentation = EyeAugmentation().times(asked.augment)
        if asked.translate is not None:
            augmentation = replace(augmentation, translate=asked.translate)
        is_still = not (asked.augment or asked.translate)
        return EyeSplit(data.train, processor, None if is_still else augmentation, seed)

    def new_processor(self, model: Any, **settings: Any) -> Any:
        from ..models.eye_openness import EyeOpennessImageProcessor

        return EyeOpennessImageProcessor(**settings)

    def callbacks(self, model: Any) -> list[Any]:
        from ..models.eye_openness import DropDomainHead, ReversalSchedule

        return [ReversalSchedule(), DropDomainHead()] if model.config.loss_weights["domain"] > 0 else []

    def evaluation(self, processor: Any) -> dict[str, Any]:
        from ..measurement.eye_openness import compute_openness_metrics, openness_alone

        return {"compute_metrics": compute_openness_metrics, "preprocess_logits_for_metrics": openness_alone}

    def measure(self, model: Any, split: Any) -> dict[str, float]:
        from ..measurement.eye_openness import fairness_metrics, openness_metrics

        predicted, openness = self._predictions(model, split)
        figures = openness_metrics(predicted, openness)
        if split.raw.melanin is not None:
            figures |= fairness_metrics(predicted, openness, split.raw.melanin)
        return {"agreement": 1 - figures["mae"], **figures}

    def _predictions(self, model: Any, split: Any) -> tuple[np.ndarray, np.ndarray]:
        """What the model says of every eye, and its label."""
        found, labels = [], []
        for batch, output in _answers(model, split, self.eval_batch_size, inputs=("pixel_values",)):
            found.append(output.openness[:, 0].float().cpu().numpy())
            labels.append(batch["openness"][:, 0].numpy())
        return np.concatenate(found), np.concatenate(labels)

    def draw(self, prepared: Prepared, models: Mapping[str, Any], folder: Path) -> dict[str, str]:
        from ..measurement.plots_eye_openness import plot_degrees

        found = {name: self._predictions(model, prepared.split("test")) for name, model in models.items()}
        plot_degrees(folder / "openness.png", found["dense"][1], {name: pair[0] for name, pair in found.items()})
        return {
            "openness.png": "Openness of the test eyes by both models against the truth: median, and 80 % of the eyes."
        }

    def notes(self, metrics: Mapping[str, Any]) -> list[str]:
        small = metrics["compressed"]
        lines = [
            "Not a medical and not a safety device. Nobody's fitness to drive or to work follows from what it says.",
            "Accuracy on real faces was not measured: training and test images are rendered, the test images in a style of "
            "which training had no exact labels. A rendered style is not the real world.",
            "Openness is relative to a person's widest opening, which a single picture does not show; a curve has to be "
            "normalised for each person.",
            "Weak points to expect: heads turned by more than 30 degrees, sunglasses, strong reflections, infrared pictures.",
        ]
        if "melanin_gap" in small:
            thirds = ", ".join(f"{name} {small[f'mae_{name}']:.3f}" for name in ("light", "medium", "dark"))
            lines.insert(
                1, f"Mean absolute error by thirds of skin tone: {thirds}; difference {small['melanin_gap']:.3f}."
            )
        return lines


_DRAWN = 0.4  # lowest score of a detection that is drawn
TASKS: dict[str, Task] = {
    task.name: task for task in (ImageClassification(), ObjectDetection(), SemanticSegmentation(), EyeOpenness())
}


def _own_processor(model: Any) -> Any:
    """The class of image processor that transformers has for a model's configuration, or None."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    kind = type(model.config)
    classes: Any = IMAGE_PROCESSOR_MAPPING[kind] if kind in IMAGE_PROCESSOR_MAPPING else {}
    return classes.get("torchvision")


@torch.no_grad()
def _answers(
    model: Any, split: Any, batch_size: int, inputs: tuple[str, ...] | None = None
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every batch of a split and what the model says about its ``inputs`` (all but the labels when not given)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    for start in range(0, len(split), batch_size):
        batch = split.__getitems__(range(start, min(start + batch_size, len(split))))
        names = [name for name in batch if name != "labels"] if inputs is None else inputs
        yield batch, model(**{name: batch[name].to(device) for name in names})
