"""AFIDAF's Fourier filter against a straightforward implementation of the same formula, on the CPU.

The plain one computes the mask as AFFNet's published code does, in eight grouped products of real and imaginary parts; the
filter here computes it in two complex ones, on the spectrum as the transform leaves it. Both are timed in turns at the
widths and resolutions of the three stages of AFIDAF at 256 x 256 pixels, in inference and for a forward and backward pass,
after their results were compared. Printed are medians in ms, the ratio (plain / ours), the ratio summed over the nine
filters of the network, and, for a small AFIDAF as a whole, ONNX Runtime against PyTorch.

    python benchmarks/afidaf_filter.py [--quick] [--threads N] [--compiled] [--onnx] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_compress.measurement import compare_latency, describe_machine
from hf_compress.models.afidaf.filters_afidaf import AfidafFourierFilter

STAGES = {"stride 8": (128, 32, 2), "stride 16": (256, 16, 4), "stride 32": (320, 8, 3)}  # channels, side, filters


class PlainFilter(nn.Module):
    """The formula as it is written, with the weights of a filter."""

    def __init__(self, filter: AfidafFourierFilter):
        super().__init__()
        self.w1, self.w2 = (
            nn.Parameter(weight.detach().permute(3, 0, 2, 1).contiguous())
            for weight in (filter.weight_in, filter.weight_out)
        )
        self.b1, self.b2 = (
            nn.Parameter(bias.detach().permute(2, 0, 1)[..., None, None].contiguous())
            for bias in (filter.bias_in, filter.bias_out)
        )
        self.shrinkage = filter.shrinkage

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        spectrum = torch.fft.rfft2(x, dim=(2, 3), norm="ortho")
        groups, size = self.w1.shape[1:3]
        z = spectrum.reshape(batch, groups, size, height, width // 2 + 1)
        equation = "bkihw,kio->bkohw"
        real = F.silu(
            torch.einsum(equation, z.real, self.w1[0]) - torch.einsum(equation, z.imag, self.w1[1]) + self.b1[0]
        )
        imaginary = F.silu(
            torch.einsum(equation, z.imag, self.w1[0]) + torch.einsum(equation, z.real, self.w1[1]) + self.b1[1]
        )
        mask_real = (
            torch.einsum(equation, real, self.w2[0]) - torch.einsum(equation, imaginary, self.w2[1]) + self.b2[0]
        )
        mask_imaginary = (
            torch.einsum(equation, imaginary, self.w2[0]) + torch.einsum(equation, real, self.w2[1]) + self.b2[1]
        )
        parts = F.softshrink(torch.stack([mask_real, mask_imaginary], dim=-1), self.shrinkage)
        mask = torch.view_as_complex(parts).reshape(batch, channels, height, width // 2 + 1)
        return torch.fft.irfft2(mask * spectrum, s=(height, width), dim=(2, 3), norm="ortho") + x


def training_ms(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of several turns, each a forward and backward pass."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(channels: int, side: int, batch: int, rounds: int, is_compiled: bool) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    ours = AfidafFourierFilter(channels)
    plain = PlainFilter(ours)
    x = torch.randn(batch, channels, side, side)
    with torch.no_grad():
        difference = float((ours(x) - plain(x)).abs().max())
    if not difference < 1e-5:  # float32
        raise SystemExit(f"the two filters differ by {difference:.1e}")
    filters: dict[str, Any] = {"plain": plain, "ours": ours}
    if is_compiled:
        filters["ours, compiled"] = torch.compile(ours)

    def step(module: Any, image: Tensor) -> Callable[[], None]:
        def run() -> None:
            module(image).sum().backward()

        return run

    inference = compare_latency({name: (lambda module=module: module(x)) for name, module in filters.items()}, rounds)
    image = x.clone().requires_grad_()
    training = training_ms({name: step(module, image) for name, module in filters.items()}, 3 * rounds)
    return {"inference": inference, "training": training}


def onnx_ratio(rounds: int) -> dict[str, float]:
    """Milliseconds of one image of 128 x 128 in PyTorch and in ONNX Runtime, of AFIDAF-T."""
    from hf_compress import export_onnx
    from hf_compress.export import onnx_runner
    from hf_compress.models.afidaf import AfidafConfig, AfidafForImageClassification

    torch.manual_seed(0)
    model = AfidafForImageClassification(AfidafConfig.of_size("tiny", num_labels=10, image_size=128)).eval()
    x = torch.randn(1, 3, 128, 128)
    with tempfile.TemporaryDirectory() as folder:
        run = onnx_runner(export_onnx(model, Path(folder) / "afidaf.onnx"))
        return compare_latency({"PyTorch": lambda: model(x), "ONNX Runtime": lambda: run(x)}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch of one, few rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--onnx", action="store_true", help="also a whole network in ONNX Runtime")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "afidaf_filter.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 15
    results: dict[str, Any] = {"machine": describe_machine(), "threads": arguments.threads, "ms": {}, "ratio": {}}
    print(f"{'batch':>5}  {'filter':24}{'mode':12}{'plain':>9}{'ours':>9}{'ratio':>8}")
    for batch in (1,) if arguments.quick else (1, 8):
        total: dict[str, dict[str, float]] = {}
        for stage, (channels, side, filters) in STAGES.items():
            found = compare(channels, side, batch, rounds, arguments.compiled)
            results["ms"][f"batch {batch}, {stage}"] = found
            for mode, ms in found.items():
                sums = total.setdefault(mode, {})
                for name, value in ms.items():
                    sums[name] = sums.get(name, 0.0) + filters * value
                label = f"{channels} x {side} x {side}"
                show(batch, label, mode, ms)
        for mode, ms in total.items():
            show(batch, "all nine of a network", mode, ms)
            results["ratio"][f"batch {batch}, {mode}"] = ms["plain"] / ms["ours"]
    if arguments.onnx:
        results["onnx"] = ms = onnx_ratio(rounds)
        print(
            f"AFIDAF-T at 128 x 128: PyTorch {ms['PyTorch']:.1f} ms, ONNX Runtime {ms['ONNX Runtime']:.1f} ms, "
            f"ratio {ms['PyTorch'] / ms['ONNX Runtime']:.2f}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, arguments.output)


def show(batch: int, label: str, mode: str, ms: dict[str, float]) -> None:
    extra = f"   compiled {ms['ours, compiled']:.2f}" if "ours, compiled" in ms else ""
    print(
        f"{batch:5}  {label:24}{mode:12}{ms['plain']:9.2f}{ms['ours']:9.2f}{ms['plain'] / ms['ours']:8.2f}{extra}",
        flush=True,
    )


if __name__ == "__main__":
    main()
