"""Eye openness: what weak labels of another style are worth, against which baseline, for whom, and after compression.

Models of one size are trained on rendered eyes (style "a", exact labels) and on eyes of another style ("b") that are only
labelled open or closed, and tested on the degree in style "b", mild and under a hard shift of the camera. Rows:

- ``a_only``: no weak labels;
- ``bce``: weak labels as targets of a cross-entropy, the naive use of them;
- ``interval``: the interval hinge; ``plain`` and ``strong``: the same without augmentation and with all of it;
- ``no_slack``: the interval hinge at the limits themselves;
- ``adversarial``: the interval hinge and a domain head behind a gradient reversal;
- ``reference``: trained on style "b" with exact labels, except between 0.12 and 0.45, where weak labels have nothing either;
- ``ear``: no network: the eye aspect ratio from true landmarks with noise, scaled to openness on style "a".

All trainings of one seed have the same initial weights, steps, schedule and eyes. The strength of the augmentation was chosen
by the error in the style of the exact labels, the slack on other eyes of the style of the test, with a seed that is not
reported. The ladder takes the model of ``interval`` under the mild shift to a quarter of its MACs, to weights of 4 bits, and
to int8 in ONNX Runtime. Finished rows stay in a JSON-lines file, so a run that was killed goes on; trained models are kept
beside it, under ``runs/``.

    python benchmarks/eye_openness.py              # three seeds, both shifts, the ladder
    python benchmarks/eye_openness.py --seeds 0 --shifts mild --only interval ladder
    python benchmarks/eye_openness.py --plot-only  # tables again from what is finished
    python benchmarks/eye_openness.py --quick      # everything once at a toy size: does it run?
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from records import Record, read_records, write
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress import export_onnx, find_axes, magnitude_scores, quantize, select, shrink
from hf_compress.data.eyes import EyeRenderer, SyntheticEyes, WeakEyes, eye_aspect_ratio
from hf_compress.data.eyes.augmentation import EyeAugmentation
from hf_compress.export.int8 import export_int8_onnx
from hf_compress.export.onnx import onnx_outputs
from hf_compress.hub import HfCompressConfig
from hf_compress.measurement import checkpoint_bytes, compare_latency, describe_machine
from hf_compress.measurement.eye_openness import fairness_metrics, openness_metrics, sequence_metrics
from hf_compress.methods.quantization_aware_training import QuantizationAwareTrainingCallback
from hf_compress.models.eye_openness import EyeOpennessConfig, EyeOpennessForRegression, ReversalSchedule

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Method:
    """A way of training, a row of the tables.

    Attributes:
        settings: of the configuration.
        exact, weak: which style has exact labels, and whether there are weak ones.
        augment: strength of the augmentation.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    exact: str = "a"
    weak: bool = True
    augment: float = 0.4


METHODS = {
    "a_only": Method(weak=False),
    "bce": Method({"weak_objective": "bce", "loss_weights": {"weak": 0.1}}),
    "interval": Method(),
    "no_slack": Method({"interval_slack": 0.0}),
    "plain": Method(augment=0.0),
    "strong": Method(augment=1.0),
    "adversarial": Method({"num_domains": 2, "loss_weights": {"domain": 0.05}}),
    "reference": Method(exact="b", weak=False),
}
SHIFTS = ("mild", "hard")
NOISES = (0.0, 0.5, 1.0)  # standard deviation of landmarks, pixels of a crop 48 wide
FIGURES = (
    "pearson",
    "spearman",
    "mae",
    "mae_middle",
    "pearson_middle",
    "bias",
    "auc",
    "tau",
    "violation",
    "melanin_gap",
)


@dataclass(frozen=True)
class Protocol:
    """Sizes and lengths of everything.

    Attributes:
        synthetic, weak, test, sequences: numbers of eyes (of sequences of 15).
        steps, batch: of training; a batch has so many eyes of each source.
        finetune: steps after cutting, and again for 4 bits.
    """

    synthetic: int = 20_480
    weak: int = 6000
    test: int = 3000
    sequences: int = 100
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 4e-3
    finetune: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    backbone: str = "tiny"


QUICK = replace(
    Protocol(),
    synthetic=256,
    weak=128,
    test=200,
    sequences=4,
    steps=6,
    batch=16,
    finetune=4,
    seeds=(0,),
    backbone="nano",
)


# -- eyes -----------------------------------------------------------------------------------------------------------


@dataclass
class Eyes:
    """Pictures as bytes [n, 3, height, width], openness and aperture ratio [n], and what else is known of them."""

    pixels: Tensor
    openness: Tensor
    aperture_ratio: Tensor
    melanin: np.ndarray
    landmarks: np.ndarray

    @classmethod
    def of(cls, found: dict[str, np.ndarray]) -> Eyes:
        pixels = torch.from_numpy(found["images"].reshape(-1, *found["images"].shape[-3:]).transpose(0, 3, 1, 2).copy())
        openness, aperture = (
            torch.from_numpy(found[name].reshape(-1)).float() for name in ("openness", "aperture_ratio")
        )
        return cls(pixels, openness, aperture, found["melanin"].reshape(-1), found["landmarks"].reshape(-1, 8, 2))


class Data:
    """All eyes of the benchmark, rendered when they are first asked for. They are the same for every training seed."""

    def __init__(self, protocol: Protocol):
        self.protocol, self._made = protocol, {}

    def _get(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> Eyes:
        if name not in self._made:
            self._made[name] = Eyes.of(make())
        return self._made[name]

    def _even(self, renderer: EyeRenderer, seed: int, count: int) -> dict[str, np.ndarray]:
        label = SyntheticEyes(1, exactly_closed=0, exactly_open=0).label
        return renderer.render(seed, indices=np.arange(count), label=label)

    def synthetic(self) -> Eyes:
        return self._get("synthetic", lambda: EyeRenderer().render(1000, self.protocol.synthetic))

    def weak(self, shift: str) -> Eyes:
        label = WeakEyes(1).label
        indices = np.arange(self.protocol.weak)
        return self._get(f"weak {shift}", lambda: EyeRenderer("b", shift).render(1001, indices=indices, label=label))

    def test(self, shift: str) -> Eyes:
        return self._get(f"test {shift}", lambda: self._even(EyeRenderer("b", shift), 1002, self.protocol.test))

    def in_domain(self) -> Eyes:
        return self._get("in domain", lambda: self._even(EyeRenderer(), 1003, self.protocol.test // 3))

    def sequences(self, shift: str) -> Eyes:
        return self._get(
            f"sequences {shift}", lambda: EyeRenderer("b", shift).sequence(1004, self.protocol.sequences, 15)
        )


class Batches(Dataset[dict[str, Tensor]]):
    """Batches of exactly labelled and of weakly labelled eyes in equal numbers.

    Item ``i`` stands for a place of the stream; which eyes it shows, and how they are changed, follows one generator, so that
    two trainings with one seed see the same.
    """

    def __init__(self, exact: Eyes, weak: Eyes | None, items: int, seed: int, augment: float, exact_domain: int = 0):
        self.exact, self.weak, self.items, self.exact_domain = exact, weak, items, exact_domain
        self.augmentation = EyeAugmentation().times(augment) if augment else None
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.items

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        parts = []
        for eyes, is_exact in ((self.exact, True), (self.weak, False)):
            if eyes is None:
                continue
            chosen = torch.randint(len(eyes.openness), (len(indices),), generator=self.generator)
            unknown = torch.full((len(indices),), float("nan"))
            openness = eyes.openness[chosen]
            state = (openness > 0.3).long()
            parts.append(
                {
                    "pixel_values": eyes.pixels[chosen].float() / 255,
                    "openness": openness if is_exact else unknown,
                    "aperture_ratio": eyes.aperture_ratio[chosen] if is_exact else unknown,
                    "eye_state": torch.full_like(state, -100) if is_exact else state,
                    "domain_ids": torch.full_like(state, self.exact_domain if is_exact else 1),
                }
            )
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.augmentation is not None:
            batch["pixel_values"] = self.augmentation(batch["pixel_values"], self.generator)
        return batch


def as_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


# -- training -------------------------------------------------------------------------------------------------------


def build(protocol: Protocol, method: Method, seed: int) -> EyeOpennessForRegression:
    torch.manual_seed(seed)
    return EyeOpennessForRegression(EyeOpennessConfig(backbone=protocol.backbone, **method.settings))


def batches(data: Data, method: Method, shift: str, steps: int, seed: int) -> Batches:
    items = steps * data.protocol.batch
    weak = data.weak(shift) if method.weak else None
    if method.exact == "b":
        return Batches(data.weak(shift), weak, items, seed, method.augment, exact_domain=1)
    return Batches(data.synthetic(), weak, items, seed, method.augment)


def train(
    model: EyeOpennessForRegression,
    dataset: Batches,
    protocol: Protocol,
    seed: int,
    learning_rate: float,
    bf16: bool,
    callbacks: Iterable[TrainerCallback] = (),
) -> None:
    """AdamW and a cosine from a fifth of warm-up, by the ordinary Trainer."""
    steps = len(dataset) // protocol.batch
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=protocol.batch, learning_rate=learning_rate,
            weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=steps // 5, bf16=bf16, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            label_names=["openness"], seed=seed, data_seed=seed,
        )  # fmt: skip
        given = [ReversalSchedule(), *callbacks]
        Trainer(model, arguments, train_dataset=dataset, data_collator=as_batch, callbacks=given).train()
    extract_model_from_parallel(
        model, keep_fp32_wrapper=False
    )  # bf16 leaves autocast around forward, which exports would see
    model.eval()


Predict = Callable[[Tensor], Tensor]


def of_model(model: EyeOpennessForRegression) -> Predict:
    def predict(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(pixel_values=pixels).openness[:, 0]

    return predict


def of_file(path: Path) -> Predict:
    run = onnx_outputs(path)
    return lambda pixels: run(pixels)["openness"][:, 0]


def figures(predict: Predict, data: Data, shift: str) -> Record:
    """All figures on the held-out style, and the error in the style of the exact labels."""

    def on(eyes: Eyes) -> np.ndarray:
        return torch.cat([predict(part.float() / 255) for part in eyes.pixels.split(250)]).numpy()

    test = data.test(shift)
    found, truth = on(test), test.openness.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a toy run may give a constant
        row: Record = openness_metrics(found, truth)
        middle = (truth > 0.12) & (truth < 0.45)
        row["pearson_middle"] = float(np.corrcoef(found[middle], truth[middle])[0, 1])
        row |= fairness_metrics(found, truth, test.melanin)
        row |= sequence_metrics(on(data.sequences(shift)).reshape(-1, 15))
        inside = openness_metrics(on(data.in_domain()), data.in_domain().openness.numpy())
    return {**row, "mae_in_domain": inside["mae"], "pearson_in_domain": inside["pearson"]}


def aspect_ratio(data: Data, shift: str, noise: float, seed: int) -> Record:
    """The eye aspect ratio of landmarks with noise, brought to openness by a line that is fitted on style "a"."""
    draw = np.random.default_rng(seed)

    def ratio(eyes: Eyes) -> np.ndarray:
        return eye_aspect_ratio(eyes.landmarks + noise * draw.standard_normal(eyes.landmarks.shape))

    line = np.polyfit(ratio(data.synthetic()), data.synthetic().openness.numpy(), 1)
    test = data.test(shift)
    found = np.clip(np.polyval(line, ratio(test)), 0, 1)
    steps = np.clip(np.polyval(line, ratio(data.sequences(shift))), 0, 1).reshape(-1, 15)
    truth = test.openness.numpy()
    middle = (truth > 0.12) & (truth < 0.45)
    row: Record = {**openness_metrics(found, truth), **fairness_metrics(found, truth, test.melanin)}
    row["pearson_middle"] = float(np.corrcoef(found[middle], truth[middle])[0, 1])
    return {**row, **sequence_metrics(steps)}


# -- the ladder -----------------------------------------------------------------------------------------------------


def ladder(data: Data, folder: Path, seed: int, bf16: bool) -> list[Record]:
    """From the trained model to a quarter of its MACs, 4 bits and int8; every step with its figures, bytes and times."""
    protocol, shift = data.protocol, "mild"
    dense = EyeOpennessForRegression.from_pretrained(folder / f"interval-{shift}-{seed}").eval()
    pixels = data.test(shift).pixels[:64].float() / 255
    calibration = [part.float() / 255 for part in data.weak(shift).pixels[:256].split(32)]
    calibration += [part.float() / 255 for part in data.synthetic().pixels[:256].split(32)]
    rows: list[Record] = []
    runners: dict[str, Path] = {}

    def add(step: str, model: EyeOpennessForRegression | None, file: Path | None, stored: int, macs: int) -> None:
        predict = of_file(file) if model is None and file is not None else of_model(model)  # type: ignore[arg-type]
        rows.append({"step": step, "macs": macs, "bytes": stored, **figures(predict, data, shift)})
        if file is not None:
            runners[step] = file

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)

        def saved(model: EyeOpennessForRegression, name: str) -> int:
            model.save_pretrained(place / name)
            return int(checkpoint_bytes(place / name))

        macs = find_axes(dense).macs
        add("float", dense, export_onnx(dense, place / "float.onnx"), saved(dense, "float"), macs)
        small = EyeOpennessForRegression.from_pretrained(folder / f"interval-{shift}-{seed}")
        axes = find_axes(small)
        shrink(small, select(axes, magnitude_scores(small, axes), macs=0.25), axes=axes)
        longer = EyeOpennessForRegression.from_pretrained(folder / f"interval-{shift}-{seed}")
        for model in (small, longer):
            more = batches(data, METHODS["interval"], shift, protocol.finetune, seed + 100)
            train(model, more, protocol, seed, protocol.learning_rate / 2, bf16)
        add("float, trained on like the quarter", longer, None, saved(longer, "longer"), macs)
        fewer = find_axes(small).macs
        add("quarter", small, export_onnx(small, place / "quarter.onnx"), saved(small, "quarter"), fewer)
        for name, model, cost in (("int8", dense, macs), ("quarter, int8", small, fewer)):
            file = export_int8_onnx(model, place / f"{name}.onnx", calibration=calibration, check_inputs=pixels)
            add(name, None, file, file.stat().st_size, cost)
        again = EyeOpennessForRegression.from_pretrained(place / "quarter")
        callback = QuantizationAwareTrainingCallback(weights=4)
        more = batches(data, METHODS["interval"], shift, protocol.finetune, seed + 200)
        train(again, more, protocol, seed, protocol.learning_rate / 8, bf16, [callback])
        add("quarter, 4-bit", again, None, saved(again, "4-bit"), fewer)
        direct = quantize(
            EyeOpennessForRegression.from_pretrained(place / "quarter").eval(), HfCompressConfig(weights=4)
        )
        add("quarter, 4-bit without training", direct, None, saved(direct, "4-bit-direct"), fewer)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        calls = {}
        for name, file in runners.items():
            run = onnx_outputs(file)
            calls[f"{name}/1"] = _caller(run, pixels[:1])
            calls[f"{name}/64"] = _caller(run, pixels)
        times = compare_latency(calls, rounds=15)
        torch.set_num_threads(threads)
    for row in rows:
        if row["step"] in runners:
            row["latency_ms"] = times[f"{row['step']}/1"]
            row["eyes_per_second"] = 64e3 / times[f"{row['step']}/64"]
    return rows


def _caller(run: Callable[[Tensor], Any], pixels: Tensor) -> Callable[[], Any]:
    return lambda: run(pixels)


# -- rows and tables ------------------------------------------------------------------------------------------------


def run(
    data: Data, file: Path, folder: Path, seeds: Iterable[int], shifts: Iterable[str], only: Sequence[str], bf16: bool
) -> None:
    def finished() -> set[tuple[Any, ...]]:
        return {(row["part"], row["shift"], row["seed"]) for row in read_records(file)}

    def keep(part: str, shift: str, seed: int, started: float, rows: list[Record]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            for row in rows:
                seconds = time.process_time() - started
                lines.write(
                    json.dumps(
                        {"part": part, "shift": shift, "seed": seed, "bf16": bf16, "cpu_seconds": seconds, **row}
                    )
                    + "\n"
                )
        print(
            f"{part}, {shift}, seed {seed}: "
            + "; ".join(f"{row.get('step', '')} MAE {row['mae']:.4f}" for row in rows),
            flush=True,
        )

    for seed in seeds:
        for shift in shifts:
            for name, method in METHODS.items():
                if name not in only or (name, shift, seed) in finished():
                    continue
                started = time.process_time()
                model = build(data.protocol, method, seed)
                stream = batches(data, method, shift, data.protocol.steps, seed)
                train(model, stream, data.protocol, seed, data.protocol.learning_rate, bf16)
                if name == "interval":
                    model.save_pretrained(folder / f"interval-{shift}-{seed}")
                keep(name, shift, seed, started, [figures(of_model(model), data, shift)])
            for noise in NOISES:
                if "ear" in only and (f"ear {noise:g}", shift, seed) not in finished():
                    started = time.process_time()
                    keep(f"ear {noise:g}", shift, seed, started, [aspect_ratio(data, shift, noise, seed)])
        has_model = (folder / f"interval-mild-{seed}").is_dir()
        if "ladder" in only and has_model and ("ladder", "mild", seed) not in finished():
            started = time.process_time()
            keep("ladder", "mild", seed, started, ladder(data, folder, seed, bf16))


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    mean = statistics.mean(known)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def report(file: Path, results: Path, name: str, protocol: Protocol) -> None:
    records = read_records(file)
    if not records:
        print("nothing to report yet")
        return
    parts = [*METHODS, *(f"ear {noise:g}" for noise in NOISES)]
    lines = []
    for shift in SHIFTS:
        lines += [f"### {shift.capitalize()} shift, held-out style", ""]
        lines.append("| training | " + " | ".join(FIGURES) + " | mae in domain | seeds |")
        lines.append("|:--|" + "--:|" * (len(FIGURES) + 2))
        for part in parts:
            rows = [row for row in records if (row["part"], row["shift"]) == (part, shift)]
            if rows:
                cells = [spread([row.get(key, float("nan")) for row in rows]) for key in (*FIGURES, "mae_in_domain")]
                lines.append(f"| {part} | {' | '.join(cells)} | {len(rows)} |")
        lines.append("")
    steps: dict[str, list[Record]] = {}
    for row in records:
        if row["part"] == "ladder":
            steps.setdefault(row["step"], []).append(row)
    if steps:
        lines += ["### Compression, mild shift", ""]
        lines.append("| step | mae | mae_middle | auc | MACs | bytes | ONNX, ms at batch 1 | eyes per second | seeds |")
        lines.append("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
        for step, rows in steps.items():
            cells = [spread([row[key] for row in rows]) for key in ("mae", "mae_middle", "auc")]
            numbers = [f"{statistics.mean(row[key] for row in rows):,.0f}" for key in ("macs", "bytes")]
            timed = [row for row in rows if "latency_ms" in row]
            times = (
                [
                    f"{statistics.mean(r['latency_ms'] for r in timed):.3f}",
                    f"{statistics.mean(r['eyes_per_second'] for r in timed):,.0f}",
                ]
                if timed
                else ["-", "-"]
            )
            lines.append(f"| {step} | {' | '.join([*cells, *numbers, *times])} | {len(rows)} |")
        lines.append("")
    seconds = {(row["part"], row["shift"], row["seed"]): row["cpu_seconds"] for row in records}
    text = (
        f"{sum(seconds.values()) / 60:.0f} minutes of one CPU core in all; times on {describe_machine()}; mean ± standard "
        f"deviation over training seeds, with the same eyes.\n\n" + "\n".join(lines)
    )
    print(text)
    write(results / f"{name}.json", json.dumps({"protocol": asdict(protocol), "records": records}, indent=1) + "\n")
    write(results / f"{name}.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--models", type=Path, default=HERE.parent / "runs" / "eye_openness_benchmark")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, "ear", "ladder"], default=[*METHODS, "ear", "ladder"])
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: a smoke test, results mean nothing")
    parser.add_argument("--plot-only", action="store_true", help="tables from what is finished")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="train under autocast in bfloat16; twice as fast where the CPU has it"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # it would tell of every folded shift
    protocol, name = (QUICK, "eye_openness_quick") if arguments.quick else (Protocol(), "eye_openness")
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"{name}.jsonl"
    folder = arguments.models / name
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.plot_only:
        seeds = arguments.seeds or protocol.seeds
        run(Data(protocol), file, folder, seeds, arguments.shifts, arguments.only, arguments.bf16)
    report(file, arguments.results, name, protocol)


if __name__ == "__main__":
    main()
