"""The table at the end of a run: dense against compressed."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

_SHARES = ("accuracy", "map", "map_50", "mean_iou", "pixel_accuracy")
_PLAIN = ("mae", "pearson", "auc")
_ROWS = (
    ("accuracy", "accuracy (test images)"),
    ("map", "mAP (test images)"),
    ("map_50", "mAP at overlap 0.5"),
    ("mean_iou", "mIoU (test images)"),
    ("pixel_accuracy", "pixel accuracy"),
    ("mae", "mean absolute error"),
    ("pearson", "correlation (Pearson)"),
    ("auc", "open against closed (AUC)"),
    ("params", "parameters"),
    ("macs", "MACs, one image"),
    ("weights_bits", "bits of weights"),
    ("activations_bits", "bits of activations"),
    ("bytes", "bytes on disk"),
    ("latency_ms", "PyTorch, ms per image"),
    ("onnx_latency_ms", "ONNX Runtime, ms per image"),
)


def comparison(metrics: dict[str, Any], title: str) -> Group:
    """Dense against compressed with ratios, for rich's console; fits into 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("dense", "compressed", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, label in _ROWS:
        if key not in metrics["dense"]:
            continue  # another task's
        dense, small = metrics["dense"][key], metrics["compressed"][key]
        if dense is None or small is None:
            table.add_row(label, "-", "-", "not exported")
        else:
            table.add_row(label, _number(key, dense), _number(key, small), _change(key, dense, small))
    what = "largest difference of any logit" + (" or box" if "map" in metrics["dense"] else "")
    lines = [f"reloaded in a new process: {what} {_difference(metrics['reload_max_abs_diff'])}"]
    if metrics["onnx_max_abs_diff"] is not None:
        lines.append(f"ONNX against PyTorch: {what} {_difference(metrics['onnx_max_abs_diff'])}")
    int8 = metrics.get("int8")
    if int8 is not None:
        times = metrics["dense"]["onnx_latency_ms"], int8["latency_ms"]
        change = _change("int8_ms", *times)
        speed = "as fast as" if change == "the same" else f"{change} than"
        key, label = next((key, label) for key, label in _ROWS if key in int8)
        lines.append(
            f"ONNX in int8: {label} {_number(key, int8[key])}; {times[1]:.3f} ms per image, {speed} dense float; {agreement(int8)}"
        )
    return Group(table, Text("\n".join(lines), style="dim"))


def agreement(int8: dict[str, Any]) -> str:
    """How an int8 file answers against PyTorch, in words."""
    if int8["argmax"] is None:
        return (
            f"outputs differ from PyTorch's by {100 * int8['relative_difference']:.1f} % on average over "
            f"{int8['images']} test images"
        )
    return f"the same class as PyTorch for {100 * int8['argmax']:.1f} % of {int8['images']} test images"


def _number(key: str, value: float) -> str:
    if key in _SHARES:
        return f"{100 * value:.2f} %"
    if key in _PLAIN:
        return f"{value:.4f}"
    return f"{value:.3f}" if key.endswith("_ms") else f"{value:,}"


def _change(key: str, dense: float, small: float) -> str:
    if key in _SHARES:
        return f"{100 * (small - dense):+.2f} points"
    if key in _PLAIN:
        return f"{small - dense:+.4f}"
    share = small / dense if dense else 1.0
    verb = "faster" if key.endswith("_ms") else "smaller"
    opposite = "slower" if verb == "faster" else "larger"
    factor, word = (1 / share, verb) if share <= 1 else (share, opposite)
    return f"{factor:.2f}x {word}" if round(factor, 2) != 1 else "the same"


def _difference(value: float) -> str:
    return "0 (bit-identical)" if value == 0 else f"{value:.1e}"
