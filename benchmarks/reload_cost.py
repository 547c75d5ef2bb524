"""What a compressed checkpoint costs to load, against the dense one, and what importing the package costs.

``from_pretrained`` maps the file and reads no weight on a CPU: its own time is the building of modules. What a user waits
for is the model with its weights in memory, so that is taken too, by reading one number of every page; from the page
cache, as in every load but the first, and from the disk, as in the first after a download or a restart.

Every figure is taken in a fresh process, dense and compressed in turn; printed are medians and the medians of the ratios
of the rounds.

    python benchmarks/reload_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = {
    "import transformers": "import transformers",
    "import hf_compress": "import hf_compress",
    "import transformers, hf_compress": "import transformers, hf_compress",
}
TIME_IMPORT = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"
LOAD = """
import re, sys, time
import torch, hf_compress, transformers
transformers.AutoModelForImageClassification.from_pretrained(sys.argv[2])  # a tiny model pays for the imports
start, processor = time.perf_counter(), time.process_time()
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])
built = time.perf_counter() - start
for tensor in model.state_dict().values():
    tensor.flatten()[:: 4096 // tensor.element_size()].sum()
ready, processor = time.perf_counter() - start, time.process_time() - processor
# not getrusage: it counts what the parent held when it started this process
print(built, ready, processor, re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


UNITS = (
    "from_pretrained (s)",
    "load with weights read (s)",
    "load with weights read (processor s)",
    "peak memory of the process (KiB)",
)
FROM_DISK = "load with weights read from disk (s)"


def forget(folder: Path) -> None:
    """Drop the weights' files from the page cache (Linux)."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fresh(script: str, *arguments: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return [float(word) for word in run.stdout.split()]


def checkpoints(root: Path) -> dict[str, dict[str, Path]]:
    """architecture -> {"dense": folder, "compressed": folder}, and a tiny one for warming up."""
    import torch
    import transformers

    import hf_compress

    configs = {
        "tiny": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
        "resnet-50": transformers.ResNetConfig(),
        "vit-base": transformers.ViTConfig(),
    }
    found: dict[str, dict[str, Path]] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageClassification.from_config(config)
        found[name] = {"dense": root / name / "dense", "compressed": root / name / "compressed"}
        model.save_pretrained(found[name]["dense"])
        hf_compress.prune(model, ratio=0.3).save_pretrained(found[name]["compressed"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of fifteen")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reload_cost.json")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 15
    results: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, statement in IMPORTS.items():
            samples[name] += fresh(TIME_IMPORT.format(statement))
    for name, values in samples.items():
        results[f"{name} (s)"] = statistics.median(values)
    with tempfile.TemporaryDirectory() as folder:
        models = checkpoints(Path(folder))
        tiny = str(models.pop("tiny")["dense"])
        for model, kinds in models.items():
            taken: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
            for turn in range(rounds):
                for kind in list(kinds)[:: 1 if turn % 2 == 0 else -1]:
                    for unit, value in zip(UNITS, fresh(LOAD, str(kinds[kind]), tiny), strict=True):
                        taken[kind].setdefault(unit, []).append(value)
                    if hasattr(os, "posix_fadvise"):
                        forget(kinds[kind])
                        taken[kind].setdefault(FROM_DISK, []).append(fresh(LOAD, str(kinds[kind]), tiny)[1])
            for unit in taken["dense"]:
                results |= {f"{model} {kind} {unit}": statistics.median(taken[kind][unit]) for kind in kinds}
                ratios = [a / b for a, b in zip(taken["compressed"][unit], taken["dense"][unit], strict=True)]
                results[f"{model} {unit} compressed / dense"] = statistics.median(ratios)
    for name, value in results.items():
        print(f"{name:55s} {value:12.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rounds": rounds, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
