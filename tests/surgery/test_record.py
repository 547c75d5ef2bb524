"""The record of a checkpoint is hostile until proven otherwise: whatever it says, the answer is quick, small and clear."""

from __future__ import annotations

import copy
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

import hf_compress
from hf_compress.axes.attributes import SIZE_ATTRIBUTES
from hf_compress.errors import HfCompressError, RecordError
from hf_compress.surgery import Record, record_of, remove_blocks, replace_attention
from hf_compress.surgery.factorize import factorize
from hf_compress.surgery.skeleton import RECORD_VERSION, apply_record, named_tensors, without_followers

SECONDS, MEGABYTES = 1.0, 100


@pytest.fixture(scope="module", params=["vit", "regnet_y"])
def honest(request: pytest.FixtureRequest) -> tuple[transformers.PretrainedConfig, type, dict[str, Any]]:
    """A configuration, its model class, and the record of a pruned model of it, which names shapes and attributes."""
    model, x = FAMILIES[request.param]()
    config = copy.deepcopy(model.config)
    hf_compress.prune(model, ratio=0.5, example_inputs=x[:1])
    record = record_of(model).to_json()
    assert record["shapes"] and record["attributes"]
    return config, type(model), record


@pytest.fixture(scope="module")
def shorter() -> tuple[transformers.PretrainedConfig, type, dict[str, Any]]:
    """The same of a model that has also lost whole blocks, from two lists."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=12, depths=[3, 4], num_heads=[2, 3], window_size=4, num_labels=7
    )
    model = transformers.SwinForImageClassification(copy.deepcopy(config))
    hf_compress.prune(model, ratio=0.5)
    blocks = [FIRST_LIST + ".1", SECOND_LIST + ".0", SECOND_LIST + ".2"]
    record = record_of(remove_blocks(model, blocks)).to_json()
    assert record["version"] == 2 and record["shapes"] and record["attributes"]
    assert record["removed"] == {FIRST_LIST: [1], SECOND_LIST: [0, 2]}
    return config, type(model), record


@pytest.fixture(scope="module")
def in_factors() -> tuple[transformers.PretrainedConfig, type, dict[str, Any]]:
    """The same of a model of which layers are in two factors, by all three schemes, grouped ones too."""
    model, x = FAMILIES["regnet_y"]()
    config = copy.deepcopy(model.config)
    hf_compress.prune(model, ratio=0.2, example_inputs=x[:1])
    ranks = {DECOUPLED: ("decoupled", 2), SPATIAL: ("spatial", 4), CHANNEL: ("channel", 4)}
    factorize(model, ranks=ranks, example_inputs=x[:1])
    hf_compress.prune(model, ratio=0.3, example_inputs=x[:1])
    record = record_of(model).to_json()
    assert record["version"] == 3 and record["shapes"] and record["attributes"]
    assert record["factorized"] == {path: {"scheme": how[0], "rank": how[1]} for path, how in ranks.items()}
    assert sizes(record, f"{SPATIAL}.second.weight")[1] == 3  # the rank is an axis, which was pruned
    return config, type(model), record


@pytest.fixture(scope="module")
def with_filters() -> tuple[transformers.PretrainedConfig, type, dict[str, Any]]:
    """The same of a model with filters in place of attention, one of whose layers is in two factors."""
    model, x = FAMILIES["vit"]()
    config = copy.deepcopy(model.config)
    replace_attention(model)
    factorize(model, ranks={FILTERED + ".projection": 4}, example_inputs=x[:1])
    hf_compress.prune(model, ratio=0.4, example_inputs=x[:1])
    record = record_of(model).to_json()
    assert record["version"] == 4 and record["factorized"]
    assert record["filtered"] == {name: {"filter": "afidaf", "grid": [4, 4], "prefix": 1} for name in (FILTERED, OTHER)}
    assert f"{FILTERED}.prefix.key_weight" in record["shapes"]
    return config, type(model), record


FILTERED, OTHER = "vit.layers.0.attention", "vit.layers.1.attention"
CHANNEL, SPATIAL, DECOUPLED = (
    f"regnet.{path}.convolution"
    for path in ("embedder.embedder", "encoder.stages.0.layers.0.layer.1", "encoder.stages.1.layers.1.layer.1")
)
FIRST_LIST, SECOND_LIST = "swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"


def skeleton(config: transformers.PretrainedConfig, kind: type) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def sizes(record: dict[str, Any], name: str) -> list[int | None]:
    return [None if size == "-" else int(size) for size in record["shapes"][name].split("x")]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a record could have touched."""
    found: dict[str, Any] = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                found[f"{path}:{name}"] = repr(value)
    return found


def try_record(config: transformers.PretrainedConfig, kind: type, data: Any) -> str:
    """Read and apply a record; returns the error's text, or nothing when it was accepted."""
    model = skeleton(config, kind)
    before = state_of(model)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        apply_record(model, Record.from_json(data))
        message = ""
    except RecordError as error:
        message = str(error)
        assert len(message) < 1000 and message.startswith("record")
    finally:
        elapsed, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert elapsed < SECONDS and peak < MEGABYTES * 1e6
    after = state_of(model)
    removed, factorized, filtered = (not message and data.get(name) for name in ("removed", "factorized", "filtered"))
    if removed or factorized or filtered:  # names have moved, so they cannot be compared one by one
        assert factorized or filtered or len(after) < len(before)
        dense = sum(p.numel() for p in skeleton(config, kind).parameters())
        # the factors of a full rank have at most twice the numbers of their layer; filters of 24 channels have 3 * 24**2
        # + 90 * 24 more than attention, of which this model has two
        more = 2 * (3 * 24**2 + 90 * 24) if filtered else 0
        assert sum(p.numel() for p in model.parameters()) < (2 if factorized else 1) * dense + more
        before = after
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if message:
        assert not changed, "a refused record must leave the model as it was"
    for key in changed:  # what an accepted record changed is a tensor, or an attribute that holds a size
        path, _, attribute = key.partition(":")
        assert not attribute or attribute in SIZE_ATTRIBUTES, key
        if not attribute and path in before:
            assert all(new <= old for new, old in zip(after[path], before[path], strict=True))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), "memory was taken"
    return message


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _set(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(record: dict[str, Any], value: Any) -> None:
        holder = record
        for key in path[:-1]:
            holder = holder[_first(holder) if key == "*" else key]
        holder[_first(holder) if path[-1] == "*" else path[-1]] = value

    return change


def _first(holder: dict[str, Any]) -> str:
    return next(iter(holder))


BAD_VALUES = [-1, 0, 10**30, 2**63, 1.5, True, None, "8", "", {}, [[]], float("nan"), float("inf"), [], nested(200)]
PLACES = {
    "version": _set("version"),
    "a field": _set("shapes"),
    "a shape": _set("shapes", "*"),
    "attributes": _set("attributes"),
    "a module's attributes": _set("attributes", "*"),
    "an attribute": _set("attributes", "*", "*"),
    "biases": _set("biases"),
}


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("place", PLACES)
def test_wrong_values_are_refused(honest: Any, place: str, value: Any) -> None:
    config, kind, record = honest
    record = copy.deepcopy(record)
    PLACES[place](record, value)
    # a field that says nothing is a smaller record: its tensors will not fit the checkpoint, which loading reports
    says_nothing = [] if place == "biases" else {}
    if place in ("version", "a shape", "an attribute") or value != says_nothing:
        assert try_record(config, kind, record)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "", ".", "..", "classifier", "a" * 10**6, "__class__", "vit.__dict__", "x\x00y", "os.system"],
    ids=lambda name: repr(name)[:16],
)
@pytest.mark.parametrize("place", ["shapes", "attributes", "biases"])
def test_unknown_names_are_refused(honest: Any, place: str, name: str) -> None:
    config, kind, record = honest
    record = copy.deepcopy(record)
    if place == "biases":
        record["biases"].append(name)
    else:
        record[place][name] = [4] if place == "shapes" else {"out_features": 4}
    assert try_record(config, kind, record)


@pytest.mark.parametrize("name", ["forward", "training", "__class__", "_parameters", "weight", "config", "eps", "bias"])
def test_attributes_outside_the_vocabulary_are_refused(honest: Any, name: str) -> None:
    config, kind, record = honest
    record = copy.deepcopy(record)
    path = next(path for path, _ in skeleton(config, kind).named_modules() if path)
    record["attributes"].setdefault(path, {})[name] = 1
    assert "not an attribute that holds a size" in try_record(config, kind, record)


def test_larger_than_dense_is_refused(honest: Any) -> None:
    config, kind, record = honest
    dense = {name: list(tensor.shape) for name, tensor in skeleton(config, kind).named_parameters()}
    for name in record["shapes"]:
        if name in dense:
            changed = copy.deepcopy(record)
            changed["shapes"][name] = "x".join(map(str, [dense[name][0] + 1, *dense[name][1:]]))
            assert "more than" in try_record(config, kind, changed)


def test_shapes_that_say_nothing_are_refused(honest: Any) -> None:
    config, kind, record = honest
    record = copy.deepcopy(record)
    name = next(iter(record["shapes"]))
    whole = len(sizes(record, name))
    for says_nothing in ("x".join("-" * whole), [None] * whole):
        record["shapes"][name] = says_nothing
        assert "no dimension that differs" in try_record(config, kind, record)


@pytest.mark.parametrize(
    "text",
    ["0x-", "08x-", "-8x-", "8x", "x8", "8xx-", "8X-", " 8x-", "8x-\n", "8.0x-", "1e2x-", "٨x-", "8*-", "8x--", "+8x-"]
    + ["x".join("8" * 17), "8" * 19 + "x-", "8" * 10**6, "8x-" * 10**5],
    ids=lambda text: repr(text)[:12],
)
def test_shapes_that_are_not_written_as_sizes_are_refused(honest: Any, text: str) -> None:
    config, kind, record = honest
    record = copy.deepcopy(record)
    record["shapes"][_first(record["shapes"])] = text
    assert "sizes with x between them" in try_record(config, kind, record)


def test_shapes_in_lists_are_read_too(honest: Any) -> None:
    record = honest[2]
    in_lists = {**record, "shapes": {name: sizes(record, name) for name in record["shapes"]}}
    assert Record.from_json(in_lists) == Record.from_json(record)


def followed(config: transformers.PretrainedConfig, kind: type, record: dict[str, Any]) -> dict[str, int]:
    """Bias or statistics of a layer whose weight the record names -> their length in the resized model."""
    model = apply_record(skeleton(config, kind), Record.from_json(record))
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    ends = ("bias", "running_mean", "running_var")
    names = [f"{name[: -len('weight')]}{end}" for name in record["shapes"] if name.endswith(".weight") for end in ends]
    return {name: shapes[name][0] for name in names if name in shapes}


def test_what_follows_from_a_weight_is_not_listed(honest: Any) -> None:
    config, kind, record = honest
    found = followed(config, kind, record)
    dense = {name: tuple(tensor.shape) for name, tensor in named_tensors(skeleton(config, kind))}
    assert not set(found) & set(record["shapes"])
    assert any(length < dense[name][0] for name, length in found.items())


def test_a_record_that_lists_what_follows_says_the_same(honest: Any) -> None:
    """Early checkpoints do."""
    config, kind, record = honest
    dense = {name: tuple(tensor.shape) for name, tensor in named_tensors(skeleton(config, kind))}
    vectors = {name: n for name, n in followed(config, kind, record).items() if n != dense[name][0]}
    explicit = {**record, "shapes": {**record["shapes"], **{name: str(n) for name, n in vectors.items()}}}
    built = [
        {name: tuple(tensor.shape) for name, tensor in named_tensors(apply_record(skeleton(config, kind), how))}
        for how in (Record.from_json(record), Record.from_json(explicit))
    ]
    assert built[0] == built[1]
    model = apply_record(skeleton(config, kind), Record.from_json(record))
    assert without_followers(model, Record.from_json(explicit)) == Record.from_json(record)


def test_tensors_of_one_layer_must_agree(honest: Any) -> None:
    config, kind, record = honest
    name, length = next((name, n) for name, n in followed(config, kind, record).items() if n > 1)
    record = copy.deepcopy(record)
    record["shapes"][name] = str(length - 1)
    assert "does not agree" in try_record(config, kind, record)


class Shares(nn.Module):
    """Two layers with one bias, and a layer whose bias is no bias of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.second.bias = self.first.bias
        self.own.bias = nn.Parameter(torch.zeros(3))


def test_a_shared_bias_follows_once_and_an_unusual_one_not() -> None:
    shapes = {"first.weight": "5x-", "second.weight": "5x-", "own.weight": "5x-"}
    model = apply_record(Shares(), Record.from_json({"version": 1, "shapes": shapes}))
    assert model.first.bias is model.second.bias and len(model.first.bias) == 5 and len(model.own.bias) == 3
    assert (model.first.out_features, model.second.out_features, model.own.out_features) == (5, 5, 5)
    shapes["second.weight"] = "4x-"
    untouched = Shares()
    with pytest.raises(RecordError, match="does not agree"):
        apply_record(untouched, Record.from_json({"version": 1, "shapes": shapes}))
    assert untouched.first.weight.shape == (6, 4)
    del shapes["second.weight"]  # the other layer with this bias stays as it is, which cannot be
    with pytest.raises(RecordError, match="does not agree"):
        apply_record(untouched, Record.from_json({"version": 1, "shapes": shapes}))


def test_unknown_fields_newer_versions_and_floods_are_refused(honest: Any) -> None:
    config, kind, record = honest
    assert "not known" in try_record(config, kind, {**record, "code": "import os"})
    assert "Upgrade" in try_record(config, kind, {**record, "version": RECORD_VERSION + 1})
    assert "more than" in try_record(config, kind, {**record, "shapes": {str(i): [1] for i in range(150_000)}})
    assert "more than" in try_record(config, kind, {**record, "biases": [str(i) for i in range(150_000)]})


# -- removed blocks -----------------------------------------------------------------------------------------------


def test_an_honest_record_of_removed_blocks_is_accepted(shorter: Any) -> None:
    config, kind, record = shorter
    assert not try_record(config, kind, record)
    assert Record.from_json(json.loads(json.dumps(record))).to_json() == record


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("place", [("removed",), ("removed", "*"), ("removed", "*", 0)], ids=len)
def test_wrong_values_of_removed_blocks_are_refused(shorter: Any, place: tuple[Any, ...], value: Any) -> None:
    config, kind, record = shorter
    record = copy.deepcopy(record)
    _set(*place)(record, value)
    if place == ("removed",) and value == {}:
        try_record(config, kind, record)  # a smaller record: its tensors will not fit the checkpoint
    elif place[-1] == 0 and type(value) is int and value == 0:
        assert not try_record(config, kind, record)  # another block of the same shapes is a record like any other
    else:
        assert try_record(config, kind, record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SECOND_LIST: [0, 2, 2]}, "greater than the position before"),
        ({SECOND_LIST: [2, 0]}, "greater than the position before"),
        ({SECOND_LIST: [0, 4]}, "out of range; the list has 4 entries"),
        ({SECOND_LIST: [10**18]}, "out of range"),
        ({SECOND_LIST: [0, 1, 2, 3]}, "at least one of 4 must stay"),
        ({FIRST_LIST: list(range(10_000))}, "out of range"),
        ({FIRST_LIST: list(range(150_000))}, "1 to 100000 positions"),
        ({FIRST_LIST: ["1"]}, "must be a position"),
        ({FIRST_LIST: [True]}, "must be a position"),
        ({FIRST_LIST: {"1": 1}}, "must be a list"),
        ({"swin": [0]}, "of no list of modules"),
        ({"classifier": [0]}, "of no list of modules"),
        ({"": [0]}, "of no list of modules"),
        ({FIRST_LIST + ".1": [0]}, "of no list of modules"),
        ({"../../etc/passwd": [0]}, "of no list of modules"),
        ({"swin.encoder.layers.0.__dict__": [0]}, "of no list of modules"),
        ({"a" * 10**6: [0]}, "of no list of modules"),
        ({str(i): [0] for i in range(150_000)}, "more than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_removals_that_cannot_be_are_refused(shorter: Any, change: dict[str, Any], message: str) -> None:
    config, kind, record = shorter
    assert message in try_record(config, kind, {**record, "removed": {**record["removed"], **change}})


def test_names_speak_of_the_model_after_the_removals(shorter: Any) -> None:
    """A block that is gone has no tensors to speak of, and the model comes back when the sizes do not fit."""
    config, kind, record = shorter
    name = next(name for name in record["shapes"] if name.startswith(SECOND_LIST))
    for gone in (SECOND_LIST + ".2", SECOND_LIST + ".3"):  # two of four are left
        changed = copy.deepcopy(record)
        changed["shapes"][gone + name[len(SECOND_LIST) + 2 :]] = record["shapes"][name]
        assert "of no parameter or buffer" in try_record(config, kind, changed)
    changed = copy.deepcopy(record)
    changed["attributes"][SECOND_LIST + ".3.attention"] = {"num_attention_heads": 1}
    assert "of no module" in try_record(config, kind, changed)


def test_the_first_version_knows_no_removals_and_is_written_without_them(honest: Any, shorter: Any) -> None:
    assert honest[2]["version"] == 1 and "removed" not in honest[2]
    config, kind, record = shorter
    assert "not known" in try_record(config, kind, {**record, "version": 1})
    config, kind, record = honest
    assert not try_record(config, kind, {**record, "version": 2})  # a later writer may say so


def test_random_mutations_of_removed_blocks_end_well(shorter: Any) -> None:
    assert _refused_of_mutated(shorter, "removed", 50, seed=1) > 25


# -- layers in two factors ----------------------------------------------------------------------------------------


def test_an_honest_record_of_factors_is_accepted(in_factors: Any) -> None:
    config, kind, record = in_factors
    assert not try_record(config, kind, record)
    assert Record.from_json(json.loads(json.dumps(record))).to_json() == record
    for version in (1, 2):
        assert "not known" in try_record(config, kind, {**record, "version": version})


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("place", ["", "a layer", "scheme", "rank"])
def test_wrong_values_of_factors_are_refused(in_factors: Any, place: str, value: Any) -> None:
    config, kind, record = in_factors
    path = {"": [], "a layer": ["*"], "scheme": ["*", "scheme"], "rank": ["*", "rank"]}[place]
    record = copy.deepcopy(record)
    _set("factorized", *path)(record, value)
    assert try_record(config, kind, record)  # the shapes name factors that would not exist


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CHANNEL: {"scheme": "tucker", "rank": 2}}, "must be one of channel, spatial, decoupled"),
        ({CHANNEL: {"scheme": "__class__", "rank": 2}}, "must be one of channel, spatial, decoupled"),
        ({CHANNEL: {"scheme": "channel", "rank": 9}}, "more than the 8"),
        ({SPATIAL: {"scheme": "spatial", "rank": 25}}, "more than the 24"),
        ({DECOUPLED: {"scheme": "decoupled", "rank": 9}}, "more than the 8"),
        ({CHANNEL: {"scheme": "channel", "rank": 10**18}}, "more than the 8"),
        ({CHANNEL: {"scheme": "channel"}}, "exactly the entries"),
        ({CHANNEL: {"scheme": "channel", "rank": 2, "code": "import os"}}, "exactly the entries"),
        ({CHANNEL: ["channel", 2]}, "must be a JSON object"),
        ({CHANNEL + ".first": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"regnet": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"regnet.embedder.embedder.normalization": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"../../etc/passwd": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"regnet.__dict__": {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({"a" * 10**6: {"scheme": "channel", "rank": 1}}, "of no plain linear layer"),
        ({str(i): {"scheme": "channel", "rank": 1} for i in range(150_000)}, "more than"),
    ],
    ids=lambda value: str(value)[-50:],
)
def test_factors_that_cannot_be_are_refused(in_factors: Any, change: dict[str, Any], message: str) -> None:
    config, kind, record = in_factors
    assert message in try_record(config, kind, {**record, "factorized": {**record["factorized"], **change}})


def test_shared_layers_are_not_put_in_factors() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    with pytest.raises(RecordError, match="reached under another name"):
        apply_record(model, Record(factorized={"a": ("channel", 2)}))
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear
    odd = nn.ModuleDict({"a": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), "b": nn.Linear(4, 1)})
    for name, message in (("a", "no plain linear layer"), ("b", "rank 1 already")):
        with pytest.raises(RecordError, match=message):
            apply_record(odd, Record(factorized={name: ("channel", 1)}))


def test_sizes_that_do_not_fit_the_factors_leave_the_model_as_it_was(in_factors: Any) -> None:
    config, kind, record = in_factors
    for name, shape in (
        (f"{SPATIAL}.first.weight", [1000, None, None, None]),
        (f"{SPATIAL}.second.weight", [None, 5, None, None]),
        (f"{SPATIAL}.weight", [4, None, None, None]),
    ):
        changed = copy.deepcopy(record)
        changed["shapes"][name] = shape
        assert try_record(config, kind, changed)


def test_random_mutations_of_factors_end_well(in_factors: Any) -> None:
    assert _refused_of_mutated(in_factors, "factorized", 60, seed=2) > 30


# -- filters in place of attention --------------------------------------------------------------------------------


def test_an_honest_record_of_filters_is_accepted(with_filters: Any) -> None:
    config, kind, record = with_filters
    assert not try_record(config, kind, record)
    assert Record.from_json(json.loads(json.dumps(record))).to_json() == record
    for version in (1, 2, 3):
        assert "not known" in try_record(config, kind, {**record, "version": version})


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("place", ["", "a block", "filter", "grid", "a side", "prefix"])
def test_wrong_values_of_filters_are_refused(with_filters: Any, place: str, value: Any) -> None:
    config, kind, record = with_filters
    path = {"": [], "a block": ["*"], "a side": ["*", "grid", 0]}.get(place, ["*", place])
    record = copy.deepcopy(record)
    _set("filtered", *path)(record, value)
    # (place "prefix", value 0): class tokens without attention, whose tensors the shapes name
    assert try_record(config, kind, record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FILTERED: {"filter": "attention", "grid": [4, 4], "prefix": 1}}, "must be one of afidaf, fourier, image"),
        ({FILTERED: {"filter": "__class__", "grid": [4, 4], "prefix": 1}}, "must be one of afidaf, fourier, image"),
        ({FILTERED: {"filter": "afidaf", "grid": [4, 10**18], "prefix": 1}}, "a height and a width from 1 to 4096"),
        ({FILTERED: {"filter": "afidaf", "grid": [4, 4, 4], "prefix": 1}}, "a height and a width from 1 to 4096"),
        ({FILTERED: {"filter": "afidaf", "grid": {"0": 4, "1": 4}, "prefix": 1}}, "a height and a width"),
        ({FILTERED: {"filter": "afidaf", "grid": [4, 4], "prefix": 10**9}}, "a number of tokens from 0 to 64"),
        ({FILTERED: {"filter": "afidaf", "grid": [4, 4]}}, "exactly the entries"),
        ({FILTERED: {"filter": "afidaf", "grid": [4, 4], "prefix": 1, "channels": 10**6}}, "exactly the entries"),
        ({FILTERED: "afidaf"}, "must be a JSON object"),
        *(
            ({name: {"filter": "afidaf", "grid": [4, 4], "prefix": 1}}, "of no plain attention block")
            for name in (
                "",
                "vit",
                "classifier",
                "vit.layers.0",
                "../../etc/passwd",
                "vit.__dict__",
            )
        ),
        ({FILTERED + ".q_proj": {"filter": "afidaf", "grid": [4, 4], "prefix": 1}}, "holds another one of this list"),
        ({"a" * 10**6: {"filter": "afidaf", "grid": [4, 4], "prefix": 1}}, "of no plain attention block"),
        ({str(i): {"filter": "afidaf", "grid": [4, 4], "prefix": 1} for i in range(150_000)}, "more than"),
    ],
    ids=lambda value: str(value)[-50:],
)
def test_filters_that_cannot_be_are_refused(with_filters: Any, change: dict[str, Any], message: str) -> None:
    config, kind, record = with_filters
    assert message in try_record(config, kind, {**record, "filtered": {**record["filtered"], **change}})


def test_shared_attention_is_not_replaced(with_filters: Any) -> None:
    config, kind, _ = with_filters
    model = skeleton(config, kind)
    model.vit.layers[1].attention = shared = model.vit.layers[0].attention
    with pytest.raises(RecordError, match="reached under another name"):
        apply_record(model, Record(filtered={FILTERED: ("afidaf", (4, 4), 1)}))
    assert model.vit.layers[0].attention is shared


def test_sizes_that_do_not_fit_the_filters_leave_the_model_as_it_was(with_filters: Any) -> None:
    config, kind, record = with_filters
    for name, shape in (
        (f"{FILTERED}.prefix.key_weight", [1000, None, None]),
        (f"{FILTERED}.image.dilated.weight", [None, None, 9, 9]),
        (f"{FILTERED}.q_proj.weight", [4, None]),
    ):
        changed = copy.deepcopy(record)
        changed["shapes"][name] = shape
        assert try_record(config, kind, changed)


def test_random_mutations_of_filters_end_well(with_filters: Any) -> None:
    assert _refused_of_mutated(with_filters, "filtered", 60, seed=3) > 30


def test_random_mutations_end_well(honest: Any) -> None:
    """Any change anywhere: refused, or accepted as some other record that only makes sizes smaller."""
    config, kind, record = honest
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        changed = copy.deepcopy(record)
        for _ in range(draw.randint(1, 3)):
            _mutate(changed, draw)
        refused += bool(try_record(config, kind, changed))
    assert refused > 75  # the mutations are such that most cannot be right


def _refused_of_mutated(honest: Any, field: str, count: int, seed: int) -> int:
    """How many are refused of records with a mutation in a field and up to two more anywhere."""
    config, kind, record = honest
    draw = random.Random(seed)
    refused = 0
    for _ in range(count):
        changed = copy.deepcopy(record)
        _mutate(changed[field], draw)
        for _ in range(draw.randint(0, 2)):
            _mutate(changed, draw)
        refused += bool(try_record(config, kind, changed))
    return refused


def _mutate(record: dict[str, Any], draw: random.Random) -> None:
    holder: Any = record
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(holder[key], (dict, list)) and draw.random() < 0.8:
            holder = holder[key]
            continue
        value = draw.choice([*BAD_VALUES, 1, 3, [1, 2, 3], {"weight": 1}, "classifier", "3x-", "1"])
        if isinstance(holder, dict) and draw.random() < 0.3:
            holder[draw.choice(["../x", "weight", "forward", key * 2, key.upper()])] = holder.pop(key)
        else:
            holder[key] = value
        return


# -- through the front door ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, x = FAMILIES["resnet_basic"]()
    hf_compress.prune(model, macs=0.7, example_inputs=x[:1])
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(record=None), None),
        (lambda q: q.update(record=[]), "record"),
        (lambda q: q.update(code="import os"), "'code' is not known"),
        (lambda q: q["record"].update(version=7), "Upgrade hf_compress"),
        (lambda q: q["record"]["shapes"].update({"no.such.weight": [4]}), "no parameter or buffer"),
        (
            lambda q: q["record"]["shapes"].update({_first(q["record"]["shapes"]): nested(200)}),
            "positive integer|1 to 16",
        ),
        (lambda q: q["record"]["attributes"].update({"resnet": {"forward": 1}}), "not an attribute that holds a size"),
    ],
)
def test_from_pretrained_says_what_is_wrong(checkpoint: Path, tmp_path: Path, change: Any, message: str | None) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = time.perf_counter()
    # without a record the skeleton is dense, and the loader says which tensors do not fit
    expected = (HfCompressError, message) if message else ((RuntimeError, RecordError), "mismatch|do not belong")
    with pytest.raises(expected[0], match=expected[1]):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert time.perf_counter() - started < 5  # of which the model itself takes most


def test_duplicate_keys_cannot_smuggle(checkpoint: Path, tmp_path: Path) -> None:
    """JSON's last value counts, and it is the one that is checked."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    assert text.count('"version": 1') == 1
    (tmp_path / "config.json").write_text(text.replace('"version": 1', '"version": 1, "version": -5'))
    with pytest.raises(RecordError, match="version"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


def test_nesting_too_deep_for_json_is_refused_by_the_reader(checkpoint: Path, tmp_path: Path) -> None:
    """transformers reads config.json before anybody is asked; its reader gives up on such depth by itself."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "config.json").write_text(text.replace('"version": 1', f'"version": {deep}'))
    with pytest.raises((RecursionError, OSError, RecordError)):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
