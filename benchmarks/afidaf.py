"""AFIDAF in five parts: its filters against attention, its networks against others, filters in a trained transformer, low
bits.

* block: one pair of filters, and the module that takes the place of an attention block, against that attention block
  (scaled dot-product attention of torch) at 14 to 112 tokens a side and equal width: time, memory, MACs, and where the
  lines cross. No training.
* classification: AFIDAF, its two ablations (AFF: Fourier filter alone; IDAF: image filter alone), MobileViT, SwiftFormer
  (for the class of EfficientFormer, which transformers has no more) and a ViT of equal parameters, on Fashion-MNIST at 64
  pixels, from scratch, equal steps and batches. The paper's claim to check: AFIDAF is above AFF and IDAF.
* scenes: AFIDAF, AFF and IDAF with their detection and segmentation heads on composed scenes of digits: the same claim.
* vit: a trained ViT with half and all of its attention replaced, matched and fine-tuned, against the same model fine-tuned
  as long: accuracy, MACs, and time at two resolutions.
* quantized: AFIDAF with weights and activations of few bits, after training and with training on in these bits, against the
  same training in float; and with the spectral weights alone rounded, which quantize() leaves in float.

Zheng et al. 2024, arXiv 2407.12217. Whatever is finished stays in a JSON-lines file, so a run that was killed goes on
where it stopped. Learning rates were not tuned; all networks of a part share one.

    python benchmarks/afidaf.py block
    python benchmarks/afidaf.py classification    # three seeds; and: scenes, vit, quantized
    python benchmarks/afidaf.py vit --seeds 1     # another process, into the same file
    python benchmarks/afidaf.py scenes --plot-only
    python benchmarks/afidaf.py vit --quick       # everything once at a toy size: does it run?
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
import transformers
from fashion_mnist import DEFAULT_DATA, Data, accuracy, load_data
from records import Record, Records, write
from sidt import Rendered
from slimming_pareto import spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_compress import QuantizationAwareTrainingCallback, Scenes, quantize, replace_attention
from hf_compress.data.collating import detection_collator
from hf_compress.hub import HfCompressConfig
from hf_compress.measurement import compare_latency, count_macs, describe_machine
from hf_compress.measurement.detection import DetectionEvaluation
from hf_compress.measurement.segmentation import SegmentationEvaluation
from hf_compress.models.afidaf import (
    AfidafConfig,
    AfidafForImageClassification,
    AfidafForObjectDetection,
    AfidafForSemanticSegmentation,
    AfidafImageProcessor,
)
from hf_compress.models.afidaf.filters_afidaf import AfidafFourierFilter, AfidafImageFilter
from hf_compress.surgery import replacement_report
from hf_compress.surgery.filtered import filtered_from

HERE = Path(__file__).resolve().parent
FILTERS: dict[str, dict[str, bool]] = {
    "AFIDAF": {},
    "AFF": {"use_image_filter": False},
    "IDAF": {"use_fourier_filter": False},
}


@dataclass(frozen=True)
class Protocol:
    """What all networks of a part share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    sides: tuple[int, ...] = (14, 28, 56, 64, 112)
    width: int = 192
    rounds: int = 9
    params: int = 400_000
    train_images: int = 55_000
    test_images: int = 10_000
    steps: int = 1_200
    batch_size: int = 64
    learning_rate: float = 1e-3
    scenes: int = 4_000
    test_scenes: int = 500
    scene_steps: int = 1_200
    scene_batch_size: int = 16
    vit_steps: int = 1_800
    match_steps: int = 300
    calibration_images: int = 1_024
    finetune_steps: int = 600

    def schedule(self, steps: int, rate: float, batch_size: int) -> dict[str, Any]:
        """AdamW with warm-up and a cosine, as TrainingArguments."""
        return {
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 20,
            "weight_decay": 0.05,
        }


QUICK = Protocol(
    (0,), (14, 28), 32, 2, 120_000, 256, 200, 3, 16, scenes=32, test_scenes=16, scene_steps=3, scene_batch_size=8,
    vit_steps=4, match_steps=3, calibration_images=32, finetune_steps=2,
)  # fmt: skip


class Bench(Records):
    """Runs what is not yet among the records of its part."""

    def __init__(self, part: str, protocol: Protocol, file: Path):
        super().__init__(file, part=part)
        self.protocol = protocol


# -- block ------------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once; what an operator needs within itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in old and key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key, size)
        return output

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Maps(nn.Module):
    """AFIDAF's two filters as they stand in its own blocks, on [batch, tokens, channels]."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.side = side
        self.filters = nn.Sequential(AfidafImageFilter(channels, AfidafConfig()), AfidafFourierFilter(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.filters(tokens.transpose(1, 2).unflatten(2, (self.side, -1))).flatten(2).transpose(1, 2)


class First(nn.Module):
    """A block that returns its output alone."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(tokens)[0]


def cpu_ms(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of one call, the median of so many turns: other programs on the machine take no part in it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, call in calls.items():
                start, count, spent = time.process_time(), 0, 0.0
                while spent < 0.02:
                    call()
                    count, spent = count + 1, time.process_time() - start
                if number:  # the first turn warms up
                    times[name].append(1000 * spent / count)
    return {name: statistics.median(values) for name, values in times.items()}


def block(bench: Bench) -> None:
    protocol = bench.protocol
    width = protocol.width
    config = ViTConfig(hidden_size=width, num_attention_heads=width // 32, attn_implementation="sdpa")
    for side in protocol.sides:
        if bench.has(side=side, width=width, threads=torch.get_num_threads()):
            continue
        torch.manual_seed(0)
        attention = transformers.ViTModel(config).layers[0].attention.eval()
        contenders = {
            "attention": First(attention),
            "filters": Maps(width, side),
            "replacement": First(filtered_from(attention, "afidaf", (side, side), 0)),
        }
        tokens = torch.randn(1, side * side, width)
        record: Record = {"side": side, "width": width, "threads": torch.get_num_threads()}
        for name, module in contenders.items():
            module.eval().requires_grad_(False)
            record[f"{name}_macs"] = count_macs(module, (tokens,))
            with torch.inference_mode(), PeakBytes() as memory:
                module(tokens)
            record[f"{name}_bytes"] = memory.peak
        calls = {name: (lambda module=module, tokens=tokens: module(tokens)) for name, module in contenders.items()}
        record |= {f"{name}_ms": ms for name, ms in cpu_ms(calls, protocol.rounds).items()}
        bench.add({**record, "machine": describe_machine()})


def block_table(bench: Bench) -> str:
    lines = [
        "| tokens a side | MACs: attention | filters | replacement | CPU ms: attention | filters | replacement | "
        "MB: attention | filters | replacement |",
        "|--:|" + "--:|" * 9,
    ]
    rows = sorted(bench.records, key=lambda row: row["side"])
    names = ("attention", "filters", "replacement")
    for row in rows:
        cells = [f"{row[f'{n}_macs'] / 1e6:,.1f} M" for n in names]
        cells += [f"{row[f'{n}_ms']:.2f}" for n in names]
        cells += [f"{row[f'{n}_bytes'] / 2**20:.2f}" for n in names]
        lines.append(f"| {row['side']} | {' | '.join(cells)} |")
    for what, key in (("MACs", "macs"), ("time", "ms")):
        for name in names[1:]:
            faster = [row["side"] for row in rows if row[f"{name}_{key}"] < row[f"attention_{key}"]]
            first = next(
                (s for i, s in enumerate(sorted(faster)) if all(r["side"] in faster for r in rows if r["side"] >= s)),
                None,
            )
            said = f"from {first} tokens a side on" if first else "at no size measured"
            lines.append(f"\n{what}: the {name} {'are' if name == 'filters' else 'is'} below attention {said}.")
    if rows:
        lines.append(f"\nWidth {rows[0]['width']}, one image, {rows[0]['threads']} thread(s), {rows[0]['machine']}.")
    return "\n".join(lines)


# -- classification ---------------------------------------------------------------------------------------------------


def widths(base: tuple[int, ...], scale: float, multiple: int = 8) -> list[int]:
    return [max(multiple, round(width * scale / multiple) * multiple) for width in base]


def afidaf_config(scale: float, **changes: Any) -> AfidafConfig:
    sizes = widths((16, 24, 48, 64, 96), scale)
    return AfidafConfig(
        stem_channels=16, hidden_sizes=sizes, depths=[1, 2, 1], expand_ratio=2, image_size=64, **changes
    )


def _vit(scale: float) -> PreTrainedModel:
    (width,) = widths((64,), scale)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=6, num_attention_heads=4, intermediate_size=3 * width, image_size=64,
        patch_size=8, num_channels=1, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _mobilevit(scale: float) -> PreTrainedModel:
    config = transformers.MobileViTConfig(
        hidden_sizes=widths((32, 48, 64), scale), neck_hidden_sizes=widths((16, 16, 24, 48, 64, 80, 128), scale),
        num_attention_heads=4, image_size=64, num_channels=1, num_labels=10,
    )  # fmt: skip
    return transformers.MobileViTForImageClassification(config)


def _swiftformer(scale: float) -> PreTrainedModel:
    config = transformers.SwiftFormerConfig(
        image_size=64, depths=[1, 1, 2, 1], embed_dims=widths((24, 32, 64, 96), scale), num_channels=1, num_labels=10
    )
    return transformers.SwiftFormerForImageClassification(config)


NETWORKS: dict[str, Callable[[float], PreTrainedModel]] = {
    **{
        name: lambda scale, flags=flags: AfidafForImageClassification(
            afidaf_config(scale, num_channels=1, num_labels=10, **flags)
        )
        for name, flags in FILTERS.items()
    },
    "MobileViT": _mobilevit,
    "SwiftFormer": _swiftformer,
    "ViT": _vit,
}


def matched(build: Callable[[float], PreTrainedModel], params: int) -> float:
    """The scale of widths with the nearest number of parameters; widths move in steps, so it is not met exactly."""

    def size(scale: float) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(scale).parameters())

    scales = [0.25 + 0.05 * step for step in range(76)]
    return min(scales, key=lambda scale: abs(size(scale) - params))


def resized(data: Data, size: int, test_images: int) -> Data:
    """The images at another size, as bytes."""

    def part(split: tuple[Tensor, Tensor], most: int) -> tuple[Tensor, Tensor]:
        pixels = [
            F.interpolate(chunk.float(), size=(size, size), mode="bilinear", align_corners=False).round().byte()
            for chunk in split[0][:most].split(2_000)
        ]
        return torch.cat(pixels), split[1][:most]

    return Data(part(data.train, 60_000), part(data.validation, test_images), part(data.test, test_images))


def classification(bench: Bench, source: str) -> None:
    protocol = bench.protocol
    data = resized(load_data(source, protocol.train_images), 64, protocol.test_images)
    scales = {name: matched(build, protocol.params) for name, build in NETWORKS.items()}
    image = torch.randn(1, 1, 64, 64)
    for seed in protocol.seeds:
        wanted = [name for name in NETWORKS if not bench.has(network=name, seed=seed)]
        if not wanted:
            continue
        models = {name: build(scales[name]).eval() for name, build in NETWORKS.items()}
        calls = {name: functools.partial(model, pixel_values=image) for name, model in models.items()}
        times = compare_latency(calls, protocol.rounds)
        for name in wanted:
            torch.manual_seed(seed)
            model = NETWORKS[name](scales[name])
            since = time.process_time()
            schedule = protocol.schedule(protocol.steps, protocol.learning_rate, protocol.batch_size)
            fashion_mnist.train(model, data, seed, **schedule)
            seconds = time.process_time() - since
            bench.add(
                {
                    "network": name, "seed": seed, "accuracy": accuracy(model, data.test), "steps": protocol.steps,
                    "params": sum(p.numel() for p in model.parameters()), "cpu_seconds": seconds, "ms": times[name],
                    "time": times[name] / times["ViT"], "macs": count_macs(model, {"pixel_values": image}),
                }
            )  # fmt: skip


# -- scenes -------------------------------------------------------------------------------------------------------------


class Masks(Dataset[dict[str, Tensor]]):
    """Scenes as batches of images in [0, 1] and masks, kept as bytes."""

    def __init__(self, scenes: Scenes):
        from torchvision.transforms.functional import pil_to_tensor

        pairs = [(scene["image"], scene["segmentation"]) for scene in scenes]
        self.pixels = torch.stack([pil_to_tensor(image) for image, _ in pairs])
        self.labels = torch.stack([pil_to_tensor(mask)[0] for _, mask in pairs])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[indices].float() / 255, "labels": self.labels[indices].long()}


HEADS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "detection": (
        AfidafForObjectDetection,
        {"detection_channels": [64, 64, 48, 48], "anchor_scales": [0.15, 0.8], "num_labels": 10},
    ),
    "segmentation": (
        AfidafForSemanticSegmentation,
        {"aspp_channels": 64, "aspp_rates": [1, 2, 3], "num_labels": 11},  # wider rates would reach beyond 8 x 8 places
    ),
}


def scenes(bench: Bench, source: str) -> None:
    protocol = bench.protocol
    lengths = {"train": protocol.scenes, "test": protocol.test_scenes}
    settings: dict[str, Any] = {"source": source, "size": 128, "items": (1, 3), "scale": (0.3, 0.5)}
    made = {split: Scenes(split, length, **settings) for split, length in lengths.items()}
    processor = AfidafImageProcessor(size={"height": 128, "width": 128})
    for task, (kind, head) in HEADS.items():
        wanted = [(n, s) for s in protocol.seeds for n in FILTERS if not bench.has(task=task, network=n, seed=s)]
        if not wanted:
            continue
        is_detection = task == "detection"
        splits: dict[str, Any] = {n: Rendered(s) if is_detection else Masks(s) for n, s in made.items()}
        evaluation: Any = DetectionEvaluation(processor) if is_detection else SegmentationEvaluation()
        for name, seed in wanted:
            torch.manual_seed(seed)
            model = kind(afidaf_config(1.0, **head, **FILTERS[name]))
            since = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                arguments: dict[str, Any] = {
                    "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
                    "remove_unused_columns": False, "dataloader_drop_last": True, "per_device_eval_batch_size": 50,
                    "eval_do_concat_batches": not is_detection, "batch_eval_metrics": not is_detection,
                    "seed": seed, "data_seed": seed,
                    **protocol.schedule(protocol.scene_steps, protocol.learning_rate, protocol.scene_batch_size),
                }  # fmt: skip
                trainer = Trainer(
                    model,
                    TrainingArguments(folder, **arguments),
                    train_dataset=splits["train"],
                    data_collator=detection_collator(processor, 10) if is_detection else fashion_mnist.as_batch,
                    compute_metrics=evaluation,
                    preprocess_logits_for_metrics=evaluation.detections if is_detection else evaluation.confusion,
                )
                trainer.train()
                trainer.args.dataloader_drop_last = False
                figures = trainer.evaluate(splits["test"])
            metric = "eval_map" if is_detection else "eval_mean_iou"
            image = {"pixel_values": torch.zeros(1, 3, 128, 128)}
            bench.add(
                {
                    "task": task, "network": name, "seed": seed, "accuracy": 100 * figures[metric],
                    "params": sum(p.numel() for p in model.parameters()), "macs": count_macs(model.cpu(), image),
                    "cpu_seconds": time.process_time() - since, "steps": protocol.scene_steps,
                }
            )  # fmt: skip


# -- vit ----------------------------------------------------------------------------------------------------------------


def vit(bench: Bench, source: str) -> None:
    protocol = bench.protocol
    ways = ("dense", "half", "all")
    if all(bench.has(way=way, seed=seed) for way in ways for seed in protocol.seeds):
        return
    data = resized(load_data(source, protocol.train_images), 56, protocol.test_images)
    for seed in protocol.seeds:
        wanted = [way for way in ways if not bench.has(way=way, seed=seed)]
        if not wanted:
            continue
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=192, image_size=56,
            patch_size=4, num_channels=1, num_labels=10, attn_implementation="sdpa",
        )  # fmt: skip
        trained = ViTForImageClassification(config)
        fashion_mnist.train(trained, data, seed, **protocol.schedule(protocol.vit_steps, 1e-3, protocol.batch_size))
        start = accuracy(trained, data.test)
        images = fashion_mnist.Images(*data.train, seed=seed)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        parts = chosen[: protocol.calibration_images].split(protocol.batch_size)
        batches = [images.__getitems__(part.tolist()) for part in parts]
        for way in wanted:
            model = copy.deepcopy(trained)
            record: Record = {"way": way, "seed": seed, "trained": start}
            if way != "dense":
                layers: dict[str, Any] = {"layers": "auto", "count": 3} if way == "half" else {"layers": "all"}
                replace_attention(model, batches=batches, match_steps=protocol.match_steps, seed=seed, **layers)
                report = replacement_report(model)
                errors = [row.error for row in report.rows if row.filter and row.error is not None]
                record |= {"matched": accuracy(model, data.test), "error": statistics.fmean(errors)}
                record["layers"] = [int(name.split(".")[2]) for name in report.replaced]
            schedule = protocol.schedule(protocol.finetune_steps, 5e-4, protocol.batch_size)
            fashion_mnist.train(model, data, seed + 1_000, **schedule)
            record |= {"accuracy": accuracy(model, data.test), "params": sum(p.numel() for p in model.parameters())}
            model.eval()
            for size in (56, 112):
                inputs = {"pixel_values": torch.randn(1, 1, size, size), "interpolate_pos_encoding": size != 56}
                record[f"macs_{size}"] = count_macs(Keywords(model, size != 56), (inputs["pixel_values"],))
                calls = {
                    name: (lambda other=other, inputs=inputs: other(**inputs))
                    for name, other in (("dense", trained.eval()), ("small", model))
                }
                times = compare_latency(calls, protocol.rounds)
                record[f"ms_{size}"], record[f"time_{size}"] = times["small"], times["small"] / times["dense"]
            bench.add(record)


class Keywords(nn.Module):
    """A ViT that takes images of any size by position."""

    def __init__(self, model: nn.Module, is_other_size: bool):
        super().__init__()
        self.model, self.is_other_size = model, is_other_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels, interpolate_pos_encoding=self.is_other_size).logits


# -- quantized ----------------------------------------------------------------------------------------------------------

BITS = {"int8": (8, 8), "4 bits, activations 8": (4, 8)}


@torch.no_grad()
def round_spectral_weights(model: nn.Module, bits: int) -> None:
    """Round the weights of Fourier filters, in place, to so many bits with one scale for each output."""
    most = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, AfidafFourierFilter):
            for weight in (module.weight_in, module.weight_out):
                scale = weight.abs().amax(dim=(2, 3), keepdim=True).clamp_min(1e-12) / most
                weight.copy_((weight / scale).round() * scale)


def quantized(bench: Bench, source: str) -> None:
    protocol = bench.protocol
    ways = ["float", "float, trained on", "spectral weights, 8 bits", "spectral weights, 4 bits"]
    ways += [f"{name}, {how}" for name in BITS for how in ("after training", "trained on in these bits")]
    if all(bench.has(way=way, seed=seed) for way in ways for seed in protocol.seeds):
        return
    data = resized(load_data(source, protocol.train_images), 64, protocol.test_images)
    for seed in protocol.seeds:
        wanted = [way for way in ways if not bench.has(way=way, seed=seed)]
        if not wanted:
            continue
        torch.manual_seed(seed)
        trained = AfidafForImageClassification(afidaf_config(1.0, num_channels=1, num_labels=10))
        schedule = protocol.schedule(protocol.steps, protocol.learning_rate, protocol.batch_size)
        fashion_mnist.train(trained, data, seed, **schedule)
        batches = [{"pixel_values": fashion_mnist.normalised(data.train[0][:256])}]
        shorter = protocol.schedule(protocol.finetune_steps, 3e-4, protocol.batch_size)
        for way in wanted:
            model = copy.deepcopy(trained)
            bits = next((value for name, value in BITS.items() if way.startswith(name)), None)
            if bits is None:
                if "spectral" in way:
                    round_spectral_weights(model, int(way.split()[-2]))
                elif way != "float":
                    fashion_mnist.train(model, data, seed + 1_000, **shorter)
            elif way.endswith("after training"):
                weights, activations = bits
                config = HfCompressConfig(weights=weights, activations=activations, activation_scheme="static")
                quantize(model, config, batches)
            else:
                callback = QuantizationAwareTrainingCallback(*bits, activation_scheme="static", batches=batches)
                fashion_mnist.train(model, data, seed + 1_000, [callback], **shorter)
            bench.add({"way": way, "seed": seed, "accuracy": accuracy(model, data.test), "steps": protocol.steps})


def quantized_table(bench: Bench) -> str:
    lines = ["| AFIDAF | accuracy, % (mean, std) | seeds |", "|---|--:|--:|"]
    for (way,), rows in groups(bench.records, "way"):
        lines.append(f"| {way} | {mean_of(rows, 'accuracy')} | {len(rows)} |")
    return "\n".join(lines)


# -- report -------------------------------------------------------------------------------------------------------------


def groups(records: list[Record], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Record]]]:
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    yield from found.items()


def mean_of(records: list[Record], key: str, digits: int = 2) -> str:
    values = [record[key] for record in records if key in record]
    if not values:
        return "-"
    mean, deviation = spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def network_table(bench: Bench) -> str:
    """Of classification and of scenes; and the paper's ordering, seed by seed."""
    records, lines = [{"task": "classification", **record} for record in bench.records], []
    metric = {"classification": "accuracy", "detection": "mAP", "segmentation": "mIoU"}
    lines = [
        "| task | network | score, % (mean, std) | seeds | parameters | MACs | time of one image, ViT = 1 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (task, name), rows in groups(records, "task", "network"):
        first = rows[0]
        lines.append(
            f"| {task} ({metric[task]}) | {name} | {mean_of(rows, 'accuracy')} | {len(rows)} | {first['params'] / 1e3:,.0f} k | "
            f"{first['macs'] / 1e6:,.1f} M | {mean_of(rows, 'time')} |"
        )
    for (task,), rows in groups(records, "task"):
        by_seed = {seed[0]: {r["network"]: r["accuracy"] for r in found} for seed, found in groups(rows, "seed")}
        whole = {seed: scores for seed, scores in by_seed.items() if FILTERS.keys() <= scores.keys()}
        for other in ("AFF", "IDAF"):
            differences = [scores["AFIDAF"] - scores[other] for scores in whole.values()]
            if differences:
                ahead = sum(difference > 0 for difference in differences)
                lines.append(
                    f"\n{task}: AFIDAF minus {other} {statistics.fmean(differences):+.2f} points, ahead at {ahead} of "
                    f"{len(differences)} seeds."
                )
    return "\n".join(lines)


def vit_table(bench: Bench) -> str:
    lines = [
        "| attention replaced | accuracy, % (mean, std) | after matching | output error | parameters | MACs at 56 px | 112 px | "
        "time against dense at 56 px | 112 px |",
        "|---|" + "--:|" * 8,
    ]
    for (way,), rows in groups(bench.records, "way"):
        name = {"dense": "none, fine-tuned as long", "half": "3 of 6", "all": "6 of 6"}[way]
        cells = [mean_of(rows, "accuracy"), mean_of(rows, "matched"), mean_of(rows, "error", 3)]
        cells += [
            f"{rows[0]['params'] / 1e3:,.0f} k",
            *(f"{rows[0][f'macs_{size}'] / 1e6:,.1f} M" for size in (56, 112)),
        ]
        cells += [mean_of(rows, f"time_{size}") for size in (56, 112)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[..., None], Callable[[Bench], str]]] = {
    "block": (block, block_table),
    "classification": (classification, network_table),
    "scenes": (scenes, network_table),
    "vit": (vit, vit_table),
    "quantized": (quantized, quantized_table),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--data", default=DEFAULT_DATA, help="Fashion-MNIST: a folder or a Hub id")
    parser.add_argument("--items", default="digits", help="what scenes are composed of")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot-only", action="store_true", help="the table again from what is finished")
    parser.add_argument("--quick", action="store_true", help="everything once at a toy size")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    protocol = QUICK if arguments.quick else Protocol()
    if arguments.seeds:
        protocol = replace(protocol, seeds=tuple(arguments.seeds))
    with tempfile.TemporaryDirectory() as scratch, threads(arguments.threads):
        results = Path(scratch) if arguments.quick else arguments.results
        run, table = PARTS[arguments.part]
        bench = Bench(arguments.part, protocol, results / "afidaf.jsonl")
        if not arguments.plot_only:
            sources = {"block": (), "scenes": (arguments.items,)}.get(arguments.part, (arguments.data,))
            run(bench, *sources)
        text = table(bench)
        print(text)
        write(results / f"afidaf_{arguments.part}.md", text + "\n")


if __name__ == "__main__":
    main()
