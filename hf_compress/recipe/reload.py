"""Load a saved model the way that a stranger would, in a process of its own, and say what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

_PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
import hf_compress
from transformers import AutoModelForImageClassification

folder, pixels, logits, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForImageClassification.from_pretrained(folder).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(pixels)).logits.contiguous()}, logits)
"""


def reload_difference(folder: Path, pixel_values: Tensor, expected: Tensor) -> float:
    """The largest difference of any logit after a reload in a new process by the stock ``from_pretrained``.

    Args:
        folder: of the saved model.
        pixel_values: [n, channels, height, width].
        expected: [n, classes], the logits of the model in this process.

    Raises:
        CheckpointError: when the new process fails.
    """
    from safetensors.torch import load_file, save_file

    home = str(Path(__file__).resolve().parents[2])  # so that the new process finds this very package
    paths = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
    with tempfile.TemporaryDirectory() as temporary:
        pixels, logits = Path(temporary) / "pixels.safetensors", Path(temporary) / "logits.safetensors"
        save_file({"pixel_values": pixel_values.contiguous()}, pixels)
        command = [sys.executable, "-c", _PROGRAM, str(folder), str(pixels), str(logits), str(torch.get_num_threads())]
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"{folder} could not be loaded again in a new process: {reason}")
        found = load_file(logits)["logits"]
    return float((found - expected).abs().max())
