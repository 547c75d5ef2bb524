"""How many rendered eyes a second one core gives, and how a training step of the small network compares.

Processor time of one thread is taken, so that what else the machine does counts little; every figure is the median over
the rounds, whose cases take turns. ``--sheet`` writes the contact sheet of the documentation instead.

    OMP_NUM_THREADS=1 python benchmarks/eye_renderer.py [--quick] [--output FILE]
    python benchmarks/eye_renderer.py --sheet docs/eye_openness_rendered.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_compress.data.eyes import (
    EyeRenderer,
    MixedEyes,
    SyntheticEyes,
    WeakEyes,
    contact_sheet,
    eye_collator,
    render_faces,
)
from hf_compress.measurement import describe_machine
from hf_compress.models.eye_openness import EyeOpennessConfig, EyeOpennessForRegression

FLOOR = 1000  # samples a second that style "a" is meant to reach


def training_step() -> Callable[[int], None]:
    """Forward and backward pass of the tiny network on a fixed batch."""
    model = EyeOpennessForRegression(EyeOpennessConfig(backbone="tiny"))
    batch = eye_collator(SyntheticEyes(64).__getitems__(range(64)))

    def run(count: int) -> None:
        for _ in range(max(1, count // 64)):
            model.zero_grad()
            model(**batch).loss.backward()

    return run


def cases() -> dict[str, Callable[[int], object]]:
    """name -> a function that makes so many samples."""
    a, mild, hard = SyntheticEyes(), WeakEyes(100_000), WeakEyes(100_000, renderer=EyeRenderer("b", "hard"))
    mixed = MixedEyes(a, mild)
    return {
        "a, batches of 64": lambda count: [a.__getitems__(range(i, i + 64)) for i in range(0, count, 64)],
        "a, batches of 256": lambda count: [a.__getitems__(range(i, i + 256)) for i in range(0, count, 256)],
        "a, one at a time": lambda count: [a[i] for i in range(count)],
        "b, mild": lambda count: mild.__getitems__(range(count)),
        "b, hard": lambda count: hard.__getitems__(range(count)),
        "a and b mixed 1 : 1": lambda count: mixed.__getitems__(range(count // 2)),
        "frames of a face, 240 x 320": lambda count: render_faces(0, np.full((count // 16, 2), 0.8)),
        "training step of the tiny network": training_step(),
    }


def write_sheet(path: Path) -> None:
    """Style a at the left; b, b under the hard shift, and a face at the right. One eye a row, openness 0 to 1."""
    gap = 8
    drawn = [EyeRenderer("b").sequence(1, 3, 7), EyeRenderer("b", "hard").sequence(1, 2, 7)]
    openness = [(o, o) for o in (0.0, 0.4, 0.9)]
    face = render_faces(4, openness, size=(114, 114), motion=0.0).frames
    blocks = [
        contact_sheet(EyeRenderer().sequence(41, 8, 7)["images"], zoom=1),
        *(contact_sheet(block["images"], zoom=1) for block in drawn),
        contact_sheet(face[None], zoom=1),
    ]
    right = [(0, blocks[1]), (blocks[1].height + gap, blocks[2])]
    right.append((sum(block.height + gap for block in blocks[1:3]), blocks[3]))
    left = blocks[0].width + gap
    height = max(blocks[0].height, right[-1][0] + blocks[3].height)
    whole = Image.new("RGB", (left + max(block.width for block in blocks[1:]), height), "white")
    whole.paste(blocks[0], (0, 0))
    for top, block in right:
        whole.paste(block, (left, top))
    partial = path.with_name(f".{path.name}.partial")
    # noise does not compress; 32 levels a channel are enough to see what is drawn
    whole.point(lambda level: min(255, level // 8 * 8 + level // 32)).save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures mean nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "eye_renderer.json")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet and stop")
    arguments = parser.parse_args()
    if arguments.sheet:
        write_sheet(arguments.sheet)
        return
    torch.set_num_threads(1)
    rounds, count = (1, 256) if arguments.quick else (7, 1024)
    makers = cases()
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for maker in makers.values():
        maker(64)  # first calls allocate
    for _ in range(rounds):
        for name, maker in makers.items():
            start = time.process_time()
            maker(count)
            made = count // 16 if name.startswith("frames") else count
            rates[name].append(made / (time.process_time() - start))
    result = {
        "machine": describe_machine(),
        "rounds": rounds,
        "samples": count,
        "floor": FLOOR,
        "per_second": {n: {"median": statistics.median(r), "worst": min(r), "best": max(r)} for n, r in rates.items()},
    }
    print(result["machine"])
    for name, found in result["per_second"].items():
        print(f"{name:36} {found['median']:8.0f} a second ({found['worst']:.0f} to {found['best']:.0f})")
    print(f"style a against the floor of {FLOOR}: {result['per_second']['a, batches of 64']['median'] / FLOOR:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, arguments.output)


if __name__ == "__main__":
    main()
