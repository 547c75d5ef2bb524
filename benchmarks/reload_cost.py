"""What a compressed checkpoint costs to load, against the dense one, and what importing the package costs.

``from_pretrained`` maps the file and reads no weight on a CPU: its own time is the building of modules. What a user waits
for is the model with its weights in memory, so that is taken too, by reading one number of every page.

Every figure is taken in a fresh process, dense and compressed in turn; printed are medians and their ratios.

    python benchmarks/reload_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import json
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
start = time.perf_counter()
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])
built = time.perf_counter() - start
for tensor in model.state_dict().values():
    tensor.flatten()[:: 4096 // tensor.element_size()].sum()
ready = time.perf_counter() - start
# not getrusage: it counts what the parent held when it started this process
print(built, ready, re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


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
    parser.add_argument("--quick", action="store_true", help="two rounds instead of nine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reload_cost.json")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 9
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
            taken: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, place in kinds.items():
                    taken[kind].append(fresh(LOAD, str(place), tiny))
            for position, unit in enumerate(
                ("from_pretrained (s)", "load with weights read (s)", "peak memory of the process (KiB)")
            ):
                middle = {kind: statistics.median(row[position] for row in rows) for kind, rows in taken.items()}
                results |= {f"{model} {kind} {unit}": value for kind, value in middle.items()}
                results[f"{model} {unit} compressed / dense"] = middle["compressed"] / middle["dense"]
    for name, value in results.items():
        print(f"{name:55s} {value:12.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rounds": rounds, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
