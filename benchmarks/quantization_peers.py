"""Eight bits after training and in training: ours against NNCF and torchao, on the same float networks.

A ResNet of the size of ResNet-20 and a small vision transformer are trained on Fashion-MNIST. Then each library quantizes
weights and activations to int8 with the same calibration images, and once more with the same steps of training in low
bits. Ours and NNCF's become ONNX files that ONNX Runtime executes; torchao's are compiled by torch's own compiler, which is
what its PT2E flow is for. NNCF trains for OpenVINO, which is not measured here: what its trained networks cost in ONNX
Runtime says nothing of what they cost there. Accuracy is measured on what is executed, and all methods of one network
are timed in turns. Libraries that are not installed are left out (``pip install "hf-compress[bench]"``). Networks that are
finished stay in a JSON-lines file, so a run that was killed goes on with the next.

    python benchmarks/quantization_peers.py          # three seeds, then report
    python benchmarks/quantization_peers.py --quick  # everything once at a toy size: does it run?
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import fashion_mnist
import low_rank
import slimming_pareto
import torch
from fashion_mnist import DEFAULT_DATA, Data, data_of, normalised
from records import Record, Records, command_line, write
from slimming_pareto import Protocol, spread
from torch import Tensor, nn

from hf_compress import QuantizationAwareTrainingCallback, export_onnx
from hf_compress.export import int8_agreement, onnx_runner
from hf_compress.measurement import compare_latency
from hf_compress.measurement.latency import describe_machine

HERE = Path(__file__).resolve().parent
PROTOCOL = Protocol()
QUICK = replace(slimming_pareto.QUICK, train_images=1_000, train_steps=20, finetune_steps=4)
CALIBRATION = 256
RATES = {"resnet-20": 0.02, "vit": 2e-4}
BASELINE = "float_onnx"  # what times are compared with
Runner = Callable[[Tensor], Tensor]


class Plain(nn.Module):
    """Images to logits, the form that the other libraries trace."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


class Trained(nn.Module):
    """Logits and loss for Trainer, around a module that gives logits."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


class Outcome(NamedTuple):
    """What is executed, its bytes, and what else is recorded."""

    execute: Runner
    bytes: int
    extra: Record | None = None


class Setting:
    """One float network, its data, and how it is trained on."""

    def __init__(self, kind: str, model: nn.Module, data: Data, protocol: Protocol, seed: int, folder: Path):
        self.kind, self.data, self.protocol, self.seed, self.folder = kind, data, protocol, seed, folder
        self.float_model = model.eval()
        pixels = normalised(data.train[0][:CALIBRATION])
        self.batches = [*pixels.split(32)]

    def model(self) -> nn.Module:
        return copy.deepcopy(self.float_model)

    def finetune(self, model: nn.Module, callbacks: Any = ()) -> None:
        fashion_mnist.train(
            model, self.data, self.seed + 10_000, callbacks,  # type: ignore[arg-type]
            max_steps=self.protocol.finetune_steps, per_device_train_batch_size=self.protocol.batch_size,
            learning_rate=RATES[self.kind], lr_scheduler_type="linear", weight_decay=1e-4, max_grad_norm=1.0,
            **({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"} if self.kind == "resnet-20" else {}),
        )  # fmt: skip

    def path(self, name: str) -> Path:
        return self.folder / f"{self.kind}-{self.seed}-{name}.onnx"


# -- methods ----------------------------------------------------------------------------------------------------------


def float_onnx(setting: Setting) -> Outcome:
    path = export_onnx(setting.model(), setting.path("float"), setting.batches[0][:1], tolerance=1e-3)
    return Outcome(onnx_runner(path), path.stat().st_size)


def float_torch(setting: Setting) -> Outcome:
    plain = Plain(setting.model()).eval()
    return Outcome(torch.compile(plain), _state_bytes(plain))


def ours(setting: Setting, trains: bool) -> Outcome:
    """With how far the file agrees with PyTorch: with the model's own quantizers after training in low bits, else float."""
    model = setting.model()
    if trains:
        callback = QuantizationAwareTrainingCallback(8, 8, activation_scheme="static", skip=(), batches=setting.batches)
        setting.finetune(model, [callback])
    path = setting.path("ours-qat" if trains else "ours-ptq")
    export_onnx(model, path, setting.batches[0][:1], int8=True, calibration=setting.batches, min_agreement=0.5)
    found = int8_agreement(model, path, normalised(setting.data.test[0]))
    extra = {"agreement": found.argmax, "relative_difference": found.relative_difference}
    return Outcome(onnx_runner(path), path.stat().st_size, extra)


def nncf_after(setting: Setting) -> Outcome:
    import nncf
    import onnx

    source = export_onnx(setting.model(), setting.path("nncf-source"), setting.batches[0][:1], tolerance=1e-3)
    images = nncf.Dataset([{"pixel_values": batch.numpy()} for batch in setting.batches])
    settings = {"model_type": nncf.ModelType.TRANSFORMER} if setting.kind == "vit" else {}
    quantized = nncf.quantize(onnx.load(source), images, subset_size=len(setting.batches), **settings)
    path = setting.path("nncf-ptq")
    onnx.save(quantized, path)
    return Outcome(onnx_runner(path), path.stat().st_size)


def nncf_in(setting: Setting) -> Outcome:
    import nncf

    plain = Plain(setting.model()).eval()
    settings = {"model_type": nncf.ModelType.TRANSFORMER} if setting.kind == "vit" else {}
    quantized = nncf.quantize(plain, nncf.Dataset(setting.batches), subset_size=len(setting.batches), **settings)
    setting.finetune(Trained(quantized))
    stripped = nncf.strip(quantized.eval(), strip_format=nncf.StripFormat.NATIVE, example_input=setting.batches[0])
    path = setting.path("nncf-qat")
    images = setting.batches[0][:2]
    torch.onnx.export(
        stripped, (images,), path, input_names=["pixel_values"], output_names=["logits"], dynamo=False,
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}}, opset_version=17,
    )  # fmt: skip
    return Outcome(onnx_runner(path), path.stat().st_size)


def torchao(setting: Setting, trains: bool) -> Outcome:
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain = Plain(setting.model())
    images = (setting.batches[0],)
    dims = {"pixel_values": {0: torch.export.Dim("batch", min=2)}}
    plain.train(trains)
    exported = torch.export.export(plain, images, dynamic_shapes=dims).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=trains))
    if trains:
        prepared = prepare_qat_pt2e(exported, quantizer)
        move_exported_model_to_train(prepared)
        _no_mode_switch(prepared)
        setting.finetune(Trained(prepared))
    else:
        prepared = prepare_pt2e(exported, quantizer)
        with torch.no_grad():
            for batch in setting.batches:
                prepared(batch)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    _no_mode_switch(converted)
    return Outcome(torch.compile(converted), _state_bytes(converted))


def _no_mode_switch(module: nn.Module) -> None:
    """Exported graphs refuse ``train()`` and ``eval()``, which Trainer calls; their mode is part of the graph."""
    module.train = lambda mode=True: module  # type: ignore[method-assign, assignment]
    module.eval = lambda: module  # type: ignore[method-assign]


def _state_bytes(module: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return len(buffer.getvalue())


METHODS: dict[str, tuple[str, str, Callable[[Setting], Outcome]]] = {
    # label, the module that it needs, what quantizes
    "float_onnx": ("float, ONNX Runtime", "onnxruntime", float_onnx),
    "float_torch": ("float, torch.compile", "torch", float_torch),
    "ours_ptq": ("ours, after training", "onnxruntime", lambda setting: ours(setting, False)),
    "nncf_ptq": ("NNCF, after training", "nncf", nncf_after),
    "torchao_ptq": ("torchao, after training", "torchao", lambda setting: torchao(setting, False)),
    "ours_qat": ("ours, in training", "onnxruntime", lambda setting: ours(setting, True)),
    "nncf_qat": ("NNCF, in training", "nncf", nncf_in),
    "torchao_qat": ("torchao, in training", "torchao", lambda setting: torchao(setting, True)),
}


# -- work and report ------------------------------------------------------------------------------------------------


def accuracy(run: Runner, split: tuple[Tensor, Tensor]) -> float:
    right = 0
    with torch.no_grad():
        for pixels, labels in zip(split[0].split(250), split[1].split(250), strict=True):
            right += int((run(normalised(pixels)).argmax(-1) == labels).sum())
    return 100 * right / len(split[1])


def trained(kind: str, data: Data, protocol: Protocol, seed: int, folder: Path) -> nn.Module:
    """The float network, kept beside the records."""
    known = low_rank.KINDS[kind]
    model, file = known.build(protocol, seed), folder / f"{kind}-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        known.train(model, data, protocol, seed)
        torch.save(model.state_dict(), file)
    return model


def run(names: list[str], setting: Setting, rounds: int) -> dict[str, Record]:
    """Quantize one network in these ways, and time the results in turns with the float network of ONNX Runtime."""
    found: dict[str, Record] = {}
    runners: dict[str, Runner] = {}
    for name in names:
        torch.manual_seed(setting.seed)
        since = time.process_time()
        try:
            outcome = METHODS[name][2](setting)
            test = accuracy(outcome.execute, setting.data.test)
        except Exception as error:  # a peer that cannot do a model says so in its row
            if name.startswith(("ours", "float_onnx")):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
            continue
        runners[name] = outcome.execute
        seconds = time.process_time() - since
        found[name] = {"bytes": outcome.bytes, "cpu_seconds": seconds, "test": test, **(outcome.extra or {})}
    if BASELINE not in runners:
        runners[BASELINE] = METHODS[BASELINE][2](setting).execute
    pixels = normalised(setting.data.test[0][:64])
    for count in (1, 64):
        calls = {name: functools.partial(execute, pixels[:count]) for name, execute in runners.items()}
        times = compare_latency(calls, rounds)
        for name in found.keys() & times:
            found[name] |= {f"latency_{count}": times[name], f"speedup_{count}": times[BASELINE] / times[name]}
    return found


def table(records: list[Record]) -> str:
    lines = [
        "| model | method | top-1 % | bytes | faster, 1 image | faster, 64 images | same class as PyTorch | seeds |",
        "|---" * 8 + "|",
    ]
    for kind in low_rank.KINDS:
        for name, (label, _, _) in METHODS.items():
            found = [r for r in records if (r["model"], r["method"]) == (kind, name)]
            usable = [r for r in found if "test" in r]
            if not usable:
                reason = found[0]["failed"] if found else "not run"
                lines.append(f"| {kind} | {label} | {reason} | | | | | |")
                continue
            mean, deviation = spread([r["test"] for r in usable])
            cells = [f"{sum(r[key] for r in usable) / len(usable):.2f}x" for key in ("speedup_1", "speedup_64")]
            shares = [r["agreement"] for r in usable if "agreement" in r]
            same = f"{100 * sum(shares) / len(shares):.2f} %" if shares else "-"
            size = sum(r["bytes"] for r in usable) / len(usable)
            lines.append(
                f"| {kind} | {label} | {mean:.2f} ± {deviation:.2f} | {size:,.0f} | {cells[0]} | {cells[1]} | {same} | {len(usable)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, DEFAULT_DATA, METHODS, is_tuned=False)
    parser.add_argument("--models", nargs="+", choices=sorted(low_rank.KINDS), default=list(low_rank.KINDS))
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore")
    for noisy in ("nncf", "torchao", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    protocol = QUICK if arguments.quick else PROTOCOL
    name = "quantization_peers" + ("_quick" if arguments.quick else "")
    data = data_of(arguments, protocol.train_images)
    done, folder = Records(arguments.results / f"{name}.jsonl"), arguments.results / f"{name}.models"
    if not arguments.plot_only:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [name for name in arguments.only if importlib.util.find_spec(METHODS[name][1]) is None]
        for name in missing:
            print(f"{name}: {METHODS[name][1]} is not installed; left out")
        for seed in arguments.seeds or protocol.seeds:
            for kind in arguments.models:
                common = {"model": kind, "seed": seed}
                ready = {r["method"] for r in done.records if r.items() >= common.items() and "test" in r}
                names = [name for name in arguments.only if name not in {*missing, *ready}]  # a failure is tried again
                if names:
                    setting = Setting(kind, trained(kind, data, protocol, seed, folder), data, protocol, seed, folder)
                    for name, record in run(names, setting, 3 if arguments.quick else 15).items():
                        done.add({"model": kind, "method": name, "seed": seed, **record})
    records = done.records
    text = (
        "Top-1 is the accuracy in % of what is executed, on the 10,000 test images, mean ± standard deviation over seeds. Bytes "
        "are of the ONNX file, and of torchao's the saved state. Faster: the median time of the float network in ONNX Runtime "
        "over that of the method, taken in turns, for 1 and for 64 images. "
        f"{describe_machine()}.\n\n{table(records)}\n"
    )
    print(text)
    write(
        arguments.results / f"{name}.json",
        json.dumps({"protocol": asdict(protocol), "records": records}, indent=1) + "\n",
    )
    write(arguments.results / f"{name}.md", text)


if __name__ == "__main__":
    main()
