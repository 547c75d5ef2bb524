"""What every architecture is checked for: cut equals masked, reloads, trains, exports.

Run as a program, this file is the other process in which shrunk models are loaded again: it reads names of folders from
its input and writes what it found as JSON, one line each.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests, for the command line; pytest has it

from masking import largest_difference, random_keep, tensors_of, zero_at_producers

import hf_compress
from hf_compress.axes import AxisGraph, find_axes
from hf_compress.recipe.reload import in_own_memory
from hf_compress.surgery import Plan, Record, apply_record, record_of, shrink

Built = tuple[nn.Module, dict[str, Tensor]]
Build = Callable[[], Built]

CHECKS = ("masked", "reload", "train", "onnx")
EXACT = 1e-9  # float64 through at most a few hundred operators: rounding stays near 1e-13 of the largest value
EXACT_FLOAT32 = 1e-5  # the same where the architecture itself computes in float32
SHARE = 0.3


@dataclass(frozen=True)
class Outcome:
    """What the checks of one architecture found.

    Attributes:
        name: of the architecture.
        axes, exact: number of axes, and of those that are exact.
        params: parameters of the small model that was checked.
        exact_share: share of the parameters that lie on an exact axis, that is, disappear as all exact axes shrink to
            nothing. ``share``: the same of all axes.
        results: check -> "" when it passed, else the reason why not. A check that does not apply is missing.
        notes: check -> what to know about a check that passed or does not apply.
        difference: largest difference between cut and masked model, relative to the largest value of each output.
        whole: why the rest stays whole or is not exact.
    """

    name: str
    axes: int = 0
    exact: int = 0
    params: int = 0
    exact_share: float = 0.0
    share: float = 0.0
    results: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0
    whole: str = ""

    @property
    def failed(self) -> dict[str, str]:
        """Check -> reason, of those that failed."""
        return {check: reason for check, reason in self.results.items() if reason}


def check(name: str, build: Build, onnx: bool = False, reloader: Reloader | None = None) -> Outcome:
    """Run all checks of one architecture.

    Cut equals masked: 30 % of every exact axis, chosen at random, in float64, all tensors of the output. The other
    checks take a float32 model that has lost 30 % of every axis, those that are not exact included.

    Args:
        name: of the architecture.
        build: makes the model (float32, evaluation mode) and its keyword inputs, a batch of two.
        onnx: whether to export as well (up to a minute).
        reloader: the process that loads models again; without one, that check is left out.
    """
    with quiet():
        model, inputs = build()
        graph = find_axes(model, inputs)
        exact = {axis.name: 0 for axis in graph if axis.is_exact}
        every = {axis.name: 0 for axis in graph}
        results: dict[str, str] = {}
        notes: dict[str, str] = {}
        difference = 0.0
        if exact:
            try:
                difference, results["masked"], notes["masked"] = _cut_equals_masked(model, inputs, graph)
            except Exception as error:
                results["masked"] = _said(error)
        else:
            notes["masked"] = "no exact axis"

        small = None
        try:
            small = shrink(copy.deepcopy(model), _plan(graph, inexact=True), axes=graph)
        except Exception as error:
            results["reload"] = f"shrink: {_said(error)}"
        if small is not None:
            if reloader is not None:
                try:
                    failure, notes["reload"] = reloader.check(model, small, inputs)
                except Exception as error:
                    failure = _said(error)
                if failure or not notes["reload"]:
                    results["reload"] = failure
            if onnx:
                failure, notes["onnx"] = _exports(model, small, inputs)
                if failure or not notes["onnx"]:
                    results["onnx"] = failure
            try:
                results["train"] = _trains(model, small, inputs)
            except Exception as error:
                results["train"] = _said(error)
        params = graph.params
        return Outcome(
            name=name,
            axes=len(graph),
            exact=len(exact),
            params=params,
            exact_share=1 - graph.cost(exact).params / params,
            share=1 - graph.cost(every).params / params,
            results=results,
            notes={key: note for key, note in notes.items() if note},
            difference=difference,
            whole=_why_whole(graph),
        )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _plan(graph: AxisGraph, inexact: bool = False) -> Plan:
    keep = random_keep(graph, seed=0, share=SHARE, inexact=inexact)
    return Plan({name: tuple(mask.nonzero().flatten().tolist()) for name, mask in keep.items()})


_TRIVIAL = {"kernel size", "model output", "model input", "size 1", "spatial", "fixed"}


def _why_whole(graph: AxisGraph) -> str:
    """The most frequent reasons why parameters stay whole, and why axes are not exact."""
    inexact = Counter(reason for axis in graph for reason in axis.reasons).most_common(3)
    whole = Counter({reason: count for reason, count in graph.fixed.items() if reason not in _TRIVIAL}).most_common(3)
    parts = []
    if inexact:
        parts.append("not exact: " + ", ".join(f"{reason} ({count} axes)" for reason, count in inexact))
    if whole:
        parts.append("whole: " + ", ".join(f"{reason} ({count} dimensions)" for reason, count in whole))
    if graph.without_rule:
        parts.append("no rule: " + ", ".join(f"{name} (in {path})" for name, path in graph.without_rule.items()))
    return "; ".join(parts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and logging; operators without a rule are part of the outcome."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


# -- cut equals masked --------------------------------------------------------------------------------------------


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _cut_equals_masked(model: nn.Module, inputs: dict[str, Tensor], graph: AxisGraph) -> tuple[float, str, str]:
    """The difference, why it is too large or proves nothing, and what to know about it."""
    plan = _plan(graph)
    model, note, tolerance = copy.deepcopy(model).double(), "", EXACT
    wide = _double(inputs)
    watch = _Narrowing()
    try:
        with watch:
            dense = _run(copy.deepcopy(model), wide)  # copies, for models that cache what they made of parameters
        if watch.operator:
            note, tolerance = f"computes in float32 ({watch.operator})", EXACT_FLOAT32
    except RuntimeError as error:
        if "dtype" not in str(error) and "type" not in str(error):
            raise
        model, wide = model.float(), inputs
        note, tolerance = f"runs in float32 only ({_said(error)})", EXACT_FLOAT32
        dense = _run(copy.deepcopy(model), wide)
    masked = _run(zero_at_producers(copy.deepcopy(model), graph, plan.masks(graph)), wide)
    small = shrink(copy.deepcopy(model), plan, axes=graph)
    difference = largest_difference(_run(small, wide), masked)
    if graph.cost(plan).params != sum(p.numel() for p in small.parameters()):
        return difference, "the parameters are not as many as the axes say", note
    if not difference <= tolerance:
        return difference, f"differs from the masked model by {difference:.1e}", note
    if largest_difference(dense, masked) < 100 * tolerance:
        return difference, "masking changed nothing, so the comparison proves nothing", note
    return difference, "", note if difference > EXACT else ""


class _Narrowing(TorchDispatchMode):
    """Notes the first operator that makes float32 of float64."""

    operator = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.operator and isinstance(output, Tensor) and output.dtype == torch.float32:
            if any(isinstance(item, Tensor) and item.dtype == torch.float64 for item in args):
                self.operator = func.__name__.partition(".")[0].strip("_")
        return output


# -- training -----------------------------------------------------------------------------------------------------


def _trains(model: nn.Module, small: nn.Module, inputs: dict[str, Tensor]) -> str:
    """One SGD step on the mean square of all outputs; what learns in the dense model must learn in the small one."""
    learned = _step(copy.deepcopy(model), inputs)
    found = _step(small, inputs)
    if isinstance(found, str):
        return found
    if isinstance(learned, str):
        return f"the dense model does not train: {learned}"
    return "" if found == learned else f"no gradient for {sorted(learned ^ found)[:3]}"


def _step(model: nn.Module, inputs: dict[str, Tensor]) -> set[str] | str:
    """Names of the parameters that got a gradient, or what went wrong."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = [t for t in tensors_of(model(**inputs)) if t.requires_grad]
    if not outputs:
        return "no output has a gradient"
    loss = sum(t[t.isfinite()].square().mean() for t in outputs)
    loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    infinite = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if infinite:
        return f"the gradient of {infinite[0]} is not finite"
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if all(torch.equal(p, before[name]) for name, p in model.named_parameters()):
        return "no weight changed"
    return with_gradient


# -- loading again ------------------------------------------------------------------------------------------------

AUTO_CLASSES = (
    "AutoModelForImageClassification AutoModelForObjectDetection AutoModelForSemanticSegmentation "
    "AutoModelForInstanceSegmentation AutoModelForUniversalSegmentation AutoModelForZeroShotImageClassification "
    "AutoModelForZeroShotObjectDetection AutoModelForDepthEstimation AutoModelForImageToImage AutoModelForMaskGeneration "
    "AutoModel"
).split()
"""Tried in this order. Without AutoBackbone, which takes every name for one on the Hub, local folders too."""


def auto_class_of(model: nn.Module) -> str:
    """The stock Auto class that loads a model; its own class where no Auto class does."""
    for name in AUTO_CLASSES:
        mapped = getattr(transformers, name)._model_mapping.get(type(model.config), None)
        classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
        if type(model) is classes[0]:
            return name
    return type(model).__name__


class Reloader:
    """Another process that loads what is saved here, started once for many models. A context manager."""

    def __enter__(self) -> Reloader:
        self.folder = Path(tempfile.mkdtemp(prefix="coverage-"))
        self.process: subprocess.Popen[str] | None = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None:
            self.process.communicate()  # the end of its input ends it
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, dense: nn.Module, small: nn.Module, inputs: dict[str, Tensor]) -> tuple[str, str]:
        """What differs in a loaded shrunk model, "" if every output is the same bit for bit; a note if no check applies.

        A module that is no model of transformers is rebuilt from its dense form and the record.
        """
        failure = self._ask(dense, small, inputs)
        if not failure:
            return "", ""
        expected = self._ask(dense, dense, inputs)
        return ("", f"the dense model does not reload either: {expected}") if expected else (failure, "")

    def _ask(self, dense: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> str:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            auto, folder = "", Path(name)
            if isinstance(model, transformers.PreTrainedModel):
                auto = auto_class_of(model)
                model.save_pretrained(folder)
            else:
                torch.save((dense, record_of(model) or Record(), model.state_dict()), folder / "module.pt")
            expected = list(tensors_of(_run(copy.deepcopy(model).eval(), inputs)))
            torch.save((inputs, expected), folder / "expected.pt")
            print(json.dumps([auto, name]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            return json.loads(answer).replace(name, "FOLDER") if answer else "the other process died"


def _reload(auto: str, folder: Path) -> str:
    inputs, expected = torch.load(folder / "expected.pt")
    if auto:
        kind = getattr(transformers, auto)
        model, info = kind.from_pretrained(str(folder), output_loading_info=True)
        if any(info.values()):
            return f"{auto} says {info}"[:300]
    else:
        dense, record, state = torch.load(folder / "module.pt", weights_only=False)
        model = apply_record(dense, record)
        model.load_state_dict(state)
    found = list(tensors_of(_run(in_own_memory(model.eval()), inputs)))
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)):
        return ""
    return f"loaded by {auto}, the outputs differ by {largest_difference(found, expected):.1e}"


def _serve() -> None:
    """Answer one line of JSON for every line read, until the input ends."""
    answers = sys.stdout
    for line in sys.stdin:
        auto, folder = json.loads(line)
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            try:
                answer = _reload(auto, Path(folder))
            except Exception as error:
                answer = _said(error)
        print(json.dumps(answer), file=answers, flush=True)


# -- ONNX ---------------------------------------------------------------------------------------------------------


class _OneOutput(nn.Module):
    """A model of one image batch and one tensor: all outputs side by side, all further inputs constant.

    Outputs that do not grow with the batch, such as anchors that all images share, are left out.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        super().__init__()
        self.model = model
        self.main = next(iter(inputs))
        self.dtype = inputs[self.main].dtype  # exported models take floats, and some of these want token numbers
        for name, value in inputs.items():
            if name != self.main:
                self.register_buffer(f"input_{name}", value[:1].clone(), persistent=False)
        self.further = [name for name in inputs if name != self.main]
        with torch.no_grad():
            one, two = (self._outputs(inputs[self.main][:count]) for count in (1, 2))
        self.taken = [
            b.is_floating_point() and b.dim() > 1 and len(b) == 2 * len(a) for a, b in zip(one, two, strict=True)
        ]

    def _outputs(self, x: Tensor) -> list[Tensor]:
        further = {}
        for name in self.further:
            value = getattr(self, f"input_{name}")
            further[name] = value.expand(x.shape[0], *value.shape[1:])
        return list(tensors_of(self.model(**{self.main: x.to(self.dtype)}, **further)))

    def forward(self, x: Tensor) -> Tensor:
        outputs = zip(self._outputs(x), self.taken, strict=True)
        return torch.cat([tensor.flatten(1) for tensor, is_taken in outputs if is_taken], dim=1)


def _exports(model: nn.Module, small: nn.Module, inputs: dict[str, Tensor]) -> tuple[str, str]:
    """Why the small model does not export although the dense one does, and a note if neither does."""
    failure = _export(small, inputs)
    if not failure:
        return "", ""
    dense = _export(model, inputs)
    return (failure, "") if not dense else ("", f"the dense model does not export either: {dense}")


def _export(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        wrapped = _OneOutput(copy.deepcopy(model).eval(), inputs).eval()
        example = next(iter(inputs.values())).float()
        # float32 sums in another order, on values that random networks let grow
        scale = max([1.0, *(float(t[t.isfinite()].abs().max()) for t in [wrapped(example)] if t.numel())])
        try:
            hf_compress.export_onnx(
                wrapped, Path(folder) / "model.onnx", (example,), check_inputs=(example,), tolerance=1e-3 * scale
            )
        except Exception as error:
            return re.sub(r"\S*\.onnx\b", "the file", _said(error).replace(folder, "FOLDER"))
    return ""


# -- many at once, for the command --------------------------------------------------------------------------------

Row = tuple[str, str, Outcome, float]
"""Module, architecture, what was found, seconds."""

_reloader: Reloader | None = None


def architectures(module: str) -> dict[str, Build]:
    """The ``ARCHITECTURES`` of one of the modules beside this one."""
    return import_module(module).ARCHITECTURES


def start_worker() -> None:
    """Prepare a process of a pool for :func:`run`."""
    global _reloader
    torch.set_num_threads(1)
    _reloader = Reloader().__enter__()
    Finalize(None, _reloader.__exit__, exitpriority=1)


def run(module: str, name: str, onnx: bool) -> Row:
    """The checks of one architecture; whatever goes wrong is part of the outcome."""
    start = time.perf_counter()
    try:
        outcome = check(name, architectures(module)[name], onnx, _reloader)
    except Exception as error:
        outcome = Outcome(name, results={"build": _said(error)})
    return module, name, outcome, time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    _serve()
