"""Load a saved model the way that a stranger would, in a process of its own, and say what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
import hf_compress
import transformers
from hf_compress.recipe.reload import in_own_memory

folder, auto_class, pixels, outputs, threads, *names = sys.argv[1:]
torch.set_num_threads(int(threads))
model = in_own_memory(getattr(transformers, auto_class).from_pretrained(folder).eval())
with torch.no_grad():
    found = model(**load_file(pixels))
save_file({name: found[name].contiguous() for name in names}, outputs)
"""


def in_own_memory(model: nn.Module) -> nn.Module:
    """Copy the parameters and buffers of a model, in place, out of the checkpoint's file, which is mapped into memory.

    In the file they begin at any eighth byte, and on some CPUs a convolution rounds its last bit by where its weights
    begin; that holds for every model of transformers and says nothing about a checkpoint. Outputs that are to be compared
    bit for bit are computed with weights that begin where those of a trained model do.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def reload_difference(
    folder: Path,
    pixel_values: Tensor,
    expected: Mapping[str, Tensor],
    auto_class: str = "AutoModelForImageClassification",
) -> float:
    """The largest difference of any output after a reload in a new process by the stock ``from_pretrained``.

    Args:
        folder: of the saved model.
        pixel_values: [n, channels, height, width].
        expected: name of an output (``logits``, ``pred_boxes``) -> what it is in this process.
        auto_class: transformers' class that loads it.

    Raises:
        CheckpointError: when the new process fails.
    """
    from safetensors.torch import load_file, save_file

    home = str(Path(__file__).resolve().parents[2])  # so that the new process finds this very package
    paths = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
    with tempfile.TemporaryDirectory() as temporary:
        pixels, outputs = Path(temporary) / "pixels.safetensors", Path(temporary) / "outputs.safetensors"
        save_file({"pixel_values": pixel_values.contiguous()}, pixels)
        arguments = [str(folder), auto_class, str(pixels), str(outputs), str(torch.get_num_threads()), *expected]
        command = [sys.executable, "-c", _PROGRAM, *arguments]
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"{folder} could not be loaded again in a new process: {reason}")
        found = load_file(outputs)
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
