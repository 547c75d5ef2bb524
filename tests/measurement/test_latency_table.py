"""The table of times: sizes follow the axes, predictions follow the times, and the file survives what files meet."""

from __future__ import annotations

import copy
import json
import math
import random
import time
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES
from torch import nn

from hf_compress.axes import find_axes
from hf_compress.errors import PlanError
from hf_compress.measurement import latency_table, operator_times
from hf_compress.measurement.latency_table import LatencyTable
from hf_compress.measurement.operator_times import Grid, OperatorTimes
from hf_compress.measurement.workload import Law, Operation, Profile, record
from hf_compress.surgery import Plan, shrink

ALL = {**FAMILIES, **MORE_FAMILIES}
FEW = ["resnet_bottleneck", "mobilenet_v2", "regnet_x", "vit", "swin", "convnext", "timm_densenet", "levit", "swinv2"]


def random_plan(axes, seed: int) -> Plan:
    draw = random.Random(seed)
    counts = {axis.name: draw.randint(1, axis.size) for axis in axes}
    for tied in axes.sizes_tied:
        counts.update(dict.fromkeys(tied, counts[tied[0]]))
    return Plan(
        {name: tuple(sorted(draw.sample(range(axes[name].size), count))) for name, count in counts.items()}, axes
    )


def value(law: Law, sizes: dict[str, int]) -> float:
    return sum(coefficient * math.prod(sizes[name] for name in monomial) for monomial, coefficient in law)


def sizes_of(operations: list[Operation], sizes: dict[str, int]) -> list[tuple[object, ...]]:
    return [(o.kind, *(value(law, sizes) for law in o.sizes)) for o in operations if o.kind != "other"]


def faked(sizes: tuple[int, ...]) -> float:
    """Milliseconds of an operator on a machine that takes a constant and a time per multiply-accumulate."""
    return 0.01 + 1e-3 * math.prod(sizes)


@pytest.fixture
def fake_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Operators take ``faked`` milliseconds, every call in the model takes 1 ms, 0.25 of them for being a call."""

    class OneEach(dict):
        def get(self, key, default=None):
            return 1.0

    monkeypatch.setattr(operator_times, "time_calls", lambda calls, device: {key: faked(key) for key in calls})
    monkeypatch.setattr(latency_table, "_call_overhead", lambda device: 0.25)
    monkeypatch.setattr(latency_table, "profile", lambda model, inputs: Profile(OneEach(), 2.0))
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("family", sorted(ALL))
def test_sizes_of_every_call_are_those_of_the_shrunk_model(family: str) -> None:
    model, x = ALL[family]()
    axes = find_axes(model, x[:1])
    operations = record(model, axes, x[:1])
    assert any(operation.kind != "other" for operation in operations)
    plan = random_plan(axes, 1)
    whole = {axis.name: axis.size for axis in axes}
    expected = sizes_of(operations, {**whole, **plan.sizes})
    small = shrink(copy.deepcopy(model), plan)
    shrunk_axes = find_axes(small, x[:1])
    shrunk = record(small, shrunk_axes, x[:1])
    assert sizes_of(shrunk, {axis.name: axis.size for axis in shrunk_axes}) == expected


@pytest.mark.parametrize("family", FEW)
def test_prediction_is_the_sum_over_calls(family: str, fake_machine: Path) -> None:
    """Where times are linear in every width, interpolation is exact; widths between blocks take the block's time."""
    model, x = ALL[family]()
    axes = find_axes(model, x[:1])
    table = LatencyTable.for_model(model, axes, x)
    operations = record(model, axes, x[:1])
    whole = {axis.name: axis.size for axis in axes}
    for seed in range(5):
        kept = random_plan(axes, seed).sizes if seed else {}
        expected = 2.0
        for operation in operations:
            sizes = [value(law, {**whole, **kept}) for law in operation.sizes]
            dense = [round(value(law, whole)) for law in operation.sizes]
            varying = [i for i, law in enumerate(operation.sizes) if any(m for m, _ in law)]
            if operation.kind != "other" and 0 < len(varying) <= 3:
                grid = Grid.of(operation.kind, operation.settings, dense, varying)
                for place, block in zip(varying, grid.blocks, strict=True):
                    sizes[place] = min(math.ceil(sizes[place] / block) * block, dense[place])
                expected += faked(tuple(sizes)) / faked(tuple(dense))
            else:
                work = value(operation.work, whole)  # nothing to do for an empty tensor
                expected += 0.25 + 0.75 * (value(operation.work, {**whole, **kept}) / work if work else 1.0)
        # times are kept to 7 decimals, a hundredth of the smallest of them at most
        assert table.predict(kept) == pytest.approx(expected, rel=1e-4)
        if not kept:
            assert table.dense_ms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_a_curve_is_many_predictions(family: str, fake_machine: Path) -> None:
    model, x = ALL[family]()
    axes = find_axes(model, x[:1])
    table = LatencyTable.for_model(model, axes, x)
    for axis in axes:
        counts = sorted({1, axis.size // 3 or 1, axis.size // 2 or 1, axis.size})
        found = table.curve([axis.name], counts)
        assert found.tolist() == pytest.approx([table.predict({axis.name: count}) for count in counts], rel=1e-9)
        assert all(a <= b + 1e-9 for a, b in zip(found, found[1:], strict=False))  # the faked times never fall


def test_a_width_between_blocks_takes_its_factor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def time_calls(calls, device):
        return {key: faked(key) * (1.2 if key[-1] % 16 else 1.0) * 16 * math.ceil(key[-1] / 16) for key in calls}

    monkeypatch.setattr(operator_times, "time_calls", time_calls)
    grid = Grid.of("linear", (True,), (10, 32, 128), (2,))
    found = OperatorTimes(torch.device("cpu"), torch.float32, tmp_path).get([grid])[grid]
    assert grid.widths[0][0] == 16 and grid.widths[0][-1] == 128 and all(w % 16 == 0 for w in grid.widths[0])
    # the faked time of 122 is 122/128 of that of 128, times the factor; that of a smaller probe is less
    assert found.unaligned[0] == pytest.approx(1.2 * 122 / 128, rel=0.08)


def real_table(folder: Path) -> tuple[nn.Module, torch.Tensor, LatencyTable]:
    model, x = FAMILIES["resnet_basic"]()
    return model, x, LatencyTable.for_model(model, find_axes(model, x[:1]), x, folder=folder)


def test_times_are_measured_once_and_name_the_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, table = real_table(tmp_path)
    (file,) = tmp_path.iterdir()  # and no partial file beside it
    content = json.loads(file.read_text())
    assert content["hardware"]["threads"] == torch.get_num_threads()
    assert content["hardware"]["torch"] == torch.__version__ and content["hardware"]["dtype"] == "float32"
    assert str(content["hardware"]["processor"]) in table.hardware
    assert 0 < table.timed_share < 1 and 0 < table.predict({axis: 1 for axis in table.names}) < table.dense_ms

    def refuse(self, grid):
        raise AssertionError("measured again")

    monkeypatch.setattr(OperatorTimes, "_measure", refuse)
    real_table(tmp_path)
    half = copy.deepcopy(model).double()
    with pytest.raises(AssertionError, match="measured again"):  # another dtype is another machine
        LatencyTable.for_model(half, find_axes(half, x[:1].double()), x.double(), folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 99, "hardware": {}, "times": {}}',
        "\x00\xff",
        "cut",
        "nan",
        "list",
    ],
)
def test_a_damaged_file_is_measured_again_with_a_warning(content: str, tmp_path: Path, fake_machine: Path) -> None:
    grid = Grid.of("linear", (False,), (4, 32, 64), (1, 2))
    cpu = torch.device("cpu")
    times = OperatorTimes(cpu, torch.float32, tmp_path)
    good = times.get([grid])
    written = times.path.read_text()
    broken = {
        "cut": written[: len(written) // 2],
        "nan": written.replace('"ms": [', '"ms": [NaN, '),
        "list": written.replace('"ms"', '"other"'),
    }.get(content, content)
    times.path.write_text(broken, encoding="utf-8")
    with pytest.warns(UserWarning, match="measured again"):
        again = OperatorTimes(cpu, torch.float32, tmp_path).get([grid])
    assert again == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OperatorTimes(cpu, torch.float32, tmp_path).get([grid]) == good


def test_two_writers_keep_both_results(fake_machine: Path) -> None:
    grids = [Grid.of("linear", (False,), (4, 32, out), (2,)) for out in (32, 64)]
    cpu = torch.device("cpu")
    first, second = (OperatorTimes(cpu, torch.float32) for _ in range(2))
    first.get(grids[:1])
    second.get(grids[1:])
    assert first.path.parent == fake_machine / "latency"
    assert set(json.loads(first.path.read_text())["times"]) == {grid.key for grid in grids}


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, fake_machine: Path) -> None:
    (tmp_path / "file").write_text("")
    grid = Grid.of("linear", (False,), (4, 32, 64), (2,))
    with pytest.warns(UserWarning, match="could not be kept"):
        times = OperatorTimes(torch.device("cpu"), torch.float32, tmp_path / "file" / "below").get([grid])
    assert len(times[grid].ms) == len(grid.points())


@pytest.mark.parametrize(
    ("kind", "settings", "sizes", "shape"),
    [
        ("linear", (True,), (7, 5, 3), (7, 3)),
        ("conv", (9, 8, 3, 3, (2, 2), (1, 1), (1, 1), True, False), (1, 1, 4, 6), (1, 6, 5, 4)),
        ("conv", (9, 8, 3, 3, (1, 1), (1, 1), (1, 1), False, True), (2, 8, 1, 1), (2, 8, 9, 8)),
        ("conv", (9, 8, 1, 1, (1, 1), (0, 0), (1, 1), False, False), (1, 3, 2, 5), (1, 15, 9, 8)),
        ("attention", ("none", False), (3, 5, 7, 4, 6), (1, 3, 5, 6)),
        ("attention", ("shared", False), (3, 5, 7, 4, 4), (1, 3, 5, 4)),
        ("attention", ("own", False), (3, 5, 7, 4, 4), (1, 3, 5, 4)),
        ("matmul", (), (3, 5, 7, 4), (3, 5, 4)),
    ],
)
def test_operators_are_built_as_described(kind, settings, sizes, shape) -> None:
    memory = operator_times._Memory(torch.device("cpu"), torch.float32)
    assert operator_times._BUILDERS[kind](memory, settings, sizes)().shape == shape


def test_axes_of_another_model_are_refused(fake_machine: Path) -> None:
    model, x = FAMILIES["resnet_basic"]()
    axes = find_axes(model, x[:1])
    shrink(model, random_plan(axes, 0))
    with pytest.raises(PlanError, match="do not belong"):
        LatencyTable.for_model(model, axes, x)
    table = LatencyTable.for_model(model, find_axes(model, x[:1]), x)
    with pytest.raises(PlanError, match="no axis"):
        table.predict({"nothing": 1})


def test_the_model_is_left_as_it_was(fake_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the real profile
    model, x = FAMILIES["resnet_basic"]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(model._forward_hooks), len(model._forward_pre_hooks)]
    LatencyTable.for_model(model, find_axes(model, x[:1]), x, folder=fake_machine)
    assert model.training and [len(model._forward_hooks), len(model._forward_pre_hooks)] == hooks
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_prediction_takes_less_than_a_millisecond(fake_machine: Path) -> None:
    model, x = FAMILIES["swin"]()
    table = LatencyTable.for_model(model, find_axes(model, x[:1]), x)
    kept = {name: 1 for name in table.names}
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        table.predict(kept)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 1e-3  # the fastest: other work on the machine can only add
