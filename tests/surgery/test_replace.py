"""``replace_attention``: filters where attention was, in four families; what must stay the same does, and it all reloads."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES, images, perturb
from masking import assert_close, assert_cut_equals_masked, random_keep
from reloading import LOAD_ALL
from torch import Tensor, nn

from hf_compress import export_onnx, factorize, find_axes, match_blocks, prune, remove_blocks, replace_attention
from hf_compress.errors import BudgetError, DataError, MethodError, ModelError, NothingToShrinkError
from hf_compress.export.onnx import onnx_difference
from hf_compress.hub import HfCompressConfig
from hf_compress.measurement.cost import count_macs
from hf_compress.quantization import quantize
from hf_compress.surgery import Record, apply_record, find_attention, record_of, replacement_report
from hf_compress.surgery.filtered import (
    FILTERS,
    FilteredTokens,
    filtered_from,
    filtered_in,
    filtered_shell,
    is_attention,
)
from hf_compress.surgery.shrink import attach_record

BUILDERS = {name: {**FAMILIES, **MORE_FAMILIES}[name] for name in ("vit", "deit", "swin", "dinov2", "dinov2_registers")}
GRIDS = {"vit": (4, 4), "deit": (4, 4), "swin": (4, 4), "dinov2": (4, 4), "dinov2_registers": (4, 4)}
PREFIXES = {"vit": 1, "deit": 2, "swin": 0, "dinov2": 1, "dinov2_registers": 5}


def wide_vit(**changes: Any) -> nn.Module:
    """A ViT whose map is large enough for filters to save MACs."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 64,
        "patch_size": 4, "num_labels": 5, **changes,
    }  # fmt: skip
    return perturb(transformers.ViTForImageClassification(transformers.ViTConfig(**settings)))


def batches(count: int = 2, size: int = 64, labels: int | None = 5) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        batch = {"pixel_values": torch.randn(4, 3, size, size, generator=draw)}
        if labels:
            batch["labels"] = torch.randint(labels, (4,), generator=draw)
        found.append(batch)
    return found


def attention_calls(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every attention block reads and gives."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: found.setdefault(name, (args[0], output[0])))
        for name, module in model.named_modules()
        if is_attention(module)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", BUILDERS)
def test_blocks_are_found_with_their_maps(family: str) -> None:
    model, x = BUILDERS[family]()
    before = copy.deepcopy(model.state_dict())
    found = find_attention(model, x)
    assert [block.name for block in found] == [name for name, m in model.named_modules() if is_attention(m)]
    assert {block.grid for block in found} == {GRIDS[family]}
    assert {block.prefix for block in found} == {PREFIXES[family]}
    if family == "swin":  # 16 x 16 patches in windows of 4 x 4; the second stage has a quarter of them
        assert [block.windows for block in found] == [16, 16, 4]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", BUILDERS)
def test_prefix_tokens_keep_their_attention(family: str) -> None:
    model, x = BUILDERS[family]()
    model, x = model.double(), x.double()
    for name, (tokens, expected) in attention_calls(model, x).items():
        prefix = PREFIXES[family]
        made = filtered_from(model.get_submodule(name), "afidaf", GRIDS[family], prefix).double()
        with torch.no_grad():
            found, weights = made(tokens)
        assert weights is None and found.shape == expected.shape
        # the same products in another order; nothing here drops to float32
        assert_close(found[:, :prefix], expected[:, :prefix], 1e-12) if prefix else None
        assert not torch.allclose(found[:, prefix:], expected[:, prefix:])


def test_first_weights_are_values_of_the_token_itself() -> None:
    """Identity filters leave the product of value and output projection; the image filter starts as the identity."""
    model, x = BUILDERS["swin"]()
    for name, (tokens, _) in attention_calls(model, x).items():
        attention = model.get_submodule(name)
        made = filtered_from(attention, "image", (4, 4), 0)
        with torch.no_grad():
            expected = attention.o_proj(attention.v_proj(tokens))
            assert_close(made(tokens)[0], expected, 1e-5)  # float32


def test_a_prefix_attends_to_all_tokens_and_patches_see_no_prefix() -> None:
    torch.manual_seed(0)
    attention = BUILDERS["vit"]()[0].vit.layers[0].attention
    made = perturb(filtered_from(attention, "afidaf", (3, 5), 2))
    tokens = torch.randn(2, 17, 24, requires_grad=True)
    output = made(tokens)[0]
    assert output.shape == (2, 17, 24)
    (gradient,) = torch.autograd.grad(output[0, :2].sum(), tokens, retain_graph=True)
    assert (gradient[0].abs().sum(1) > 0).all() and not gradient[1].any()
    (gradient,) = torch.autograd.grad(output[0, 2:].square().sum(), tokens)
    assert not gradient[0, :2].any() and (gradient[0, 2:].abs().sum(1) > 0).all()


def test_filtered_tokens_are_rows_of_the_map() -> None:
    """What the tokens hold goes to the filters as a map, row by row, and comes back in the same order."""
    made = FilteredTokens(8, "image", (3, 4))
    seen: list[Tensor] = []
    made.image.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    tokens = torch.arange(2 * 12 * 8.0).view(2, 12, 8)
    output = made(tokens)[0]
    assert torch.equal(seen[0], tokens.view(2, 3, 4, 8).permute(0, 3, 1, 2))
    with torch.no_grad():
        maps = made.image(seen[0])
        assert_close(output, made.projection(maps.permute(0, 2, 3, 1)).flatten(1, 2), 1e-6)


@pytest.mark.parametrize("tokens", [12, 48, 108, 3, 5])
def test_maps_of_the_same_proportions_are_recognised(tokens: int) -> None:
    made = FilteredTokens(8, "afidaf", (2, 6))
    if tokens == 5:  # a prime number
        with pytest.raises(DataError, match="proportions of 2 x 6"):
            made(torch.randn(1, tokens, 8))
    else:
        assert made(torch.randn(1, tokens, 8))[0].shape == (1, tokens, 8)
    with pytest.raises(DataError, match="behind 1 others"):
        FilteredTokens(8, "afidaf", (2, 6), 1)(torch.randn(1, 12, 8))


@pytest.mark.parametrize("filter", FILTERS)
def test_parts_of_the_filters(filter: str) -> None:
    model, x = BUILDERS["vit"]()
    replace_attention(model, filter=filter)  # type: ignore[arg-type]
    blocks = dict(filtered_in(model))
    assert len(blocks) == 2 and all(block.filter == filter for block in blocks.values())
    assert all(hasattr(block, "image") == (filter != "fourier") for block in blocks.values())
    assert all(hasattr(block, "fourier") == (filter != "image") for block in blocks.values())
    with torch.no_grad():
        assert model(x).logits.shape == (2, 7)


# -- an ordinary model afterwards -----------------------------------------------------------------------------------


def test_reloads_in_a_new_process(tmp_path: Path) -> None:
    """Bit for bit, through the stock ``from_pretrained``; also pruned, factorised and with a block less."""
    folders = []
    for family in BUILDERS:
        for change in ("plain", "changed"):
            model, x = BUILDERS[family]()
            names = [block.name for block in find_attention(model)]
            if change == "plain":
                replace_attention(model, names[:1], "image" if family == "deit" else "afidaf")
            else:
                if family == "swin":  # the others have as few blocks as there may be
                    remove_blocks(model, ["swin.encoder.layers.0.blocks.0"])
                replace_attention(model)
                prune(model, ratio=0.3)
                projection = next(iter(dict(filtered_in(model)))) + ".projection"
                factorize(model, ranks={projection: 3})
                prune(model, ratio={"*.mlp.*": 0.3})
                assert record_of(model).version == 4  # type: ignore[union-attr]
            perturb(model)
            model.save_pretrained(tmp_path / f"{family}-{change}" / "model")
            with torch.no_grad():
                torch.save((x, model(x).logits), tmp_path / f"{family}-{change}" / "expected.pt")
            folders.append(str(tmp_path / f"{family}-{change}"))
    run = subprocess.run([sys.executable, "-c", LOAD_ALL, *folders], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and f"all {len(folders)}" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("family", BUILDERS)
def test_cut_equals_masked(family: str) -> None:
    """Everything that is exact in the model stays so: heads of class tokens, groups of the spectrum, MLPs."""
    model, x = BUILDERS[family]()
    replace_attention(model)
    model, x = perturb(model).double(), x.double()
    graph = find_axes(model, x[:1])
    inside = [axis for axis in graph if ".attention." in axis.name]
    assert {axis.name.rpartition(".attention.")[2] for axis in inside} >= {"fourier.weight_in"}
    if PREFIXES[family]:
        assert any("prefix" in axis.name for axis in inside)
    for seed in range(2):
        assert_cut_equals_masked(model, graph, random_keep(graph, seed), x)


def test_a_record_can_be_applied_to_a_model_on_a_device() -> None:
    model, _ = BUILDERS["vit"]()
    replace_attention(model)
    prune(model, ratio=0.3)
    again = apply_record(BUILDERS["vit"]()[0], record_of(model))
    assert not any(parameter.is_meta for parameter in again.parameters())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in again.named_parameters()} == shapes
    model.load_state_dict(again.state_dict())


def test_replaced_twice_and_in_a_shorter_model(tmp_path: Path) -> None:
    model = wide_vit()
    x = images(64)
    replace_attention(model, "vit.layers.0")
    remove_blocks(model, ["vit.layers.1"])
    replace_attention(model, "vit.layers.1.attention", "fourier")  # the third one as built
    assert record_of(model).removed == {"vit.layers": (1,)}
    assert record_of(model).filtered == {
        "vit.layers.0.attention": ("afidaf", (16, 16), 1),
        "vit.layers.1.attention": ("fourier", (16, 16), 1),
    }
    remove_blocks(model, ["vit.layers.0"])
    assert record_of(model).to_json()["filtered"] == {
        "vit.layers.0.attention": {"filter": "fourier", "grid": [16, 16], "prefix": 1}
    }
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    with pytest.raises(NothingToShrinkError, match="but 1 in whose place filters stand already"):
        replace_attention(model)


@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_onnx(family: str, tmp_path: Path) -> None:
    model, x = BUILDERS[family]()
    replace_attention(model, find_attention(model)[-1].name)
    perturb(model)
    path = export_onnx(model, tmp_path / "model.onnx", x)
    for batch in (1, 3):
        # float32, and the transform as a product of matrices
        assert onnx_difference(model, path, torch.randn(batch, 3, 32, 32)) < 1e-4


def test_trains_in_half_precision_and_with_checkpointing() -> None:
    model, x = BUILDERS["dinov2_registers"]()
    replace_attention(model)
    model.train()
    labels = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=labels).loss
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if ".attention." in n
    )
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, labels=labels).loss.backward()
    assert all(torch.allclose(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    half, _ = BUILDERS["vit"]()
    replace_attention(half.bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(x.bfloat16()).logits.isfinite().all()


def test_images_of_another_size() -> None:
    model = wide_vit()
    replace_attention(model)
    with torch.no_grad():
        assert model(images(32), interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_quantized_to_eight_bits(tmp_path: Path) -> None:
    model = wide_vit()
    replace_attention(model, "vit.layers.1")
    quantize(model, HfCompressConfig(weights=8).quantization)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(images(64)).logits, model(images(64)).logits, 1e-6)


# -- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_matching_brings_the_outputs_closer(family: str) -> None:
    model, _ = BUILDERS[family]()
    teacher = copy.deepcopy(model)
    given = batches(2, 32, None)
    replace_attention(model)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if ".attention." not in n}
    state = {n: t.clone() for n, t in teacher.state_dict().items()}
    errors = match_blocks(model, teacher, given, steps=40, learning_rate=5e-3)
    assert set(errors) == set(dict(filtered_in(model)))
    assert all(after < 0.7 * before for before, after in errors.values()), errors
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert all(torch.equal(t, state[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])
    # the error is what it says: of one block, on the teacher's own inputs
    name, (_, after) = next(iter(errors.items()))
    parts = [attention_calls(teacher, batch["pixel_values"])[name] for batch in given]
    distance, variance = 0.0, 0.0
    with torch.no_grad():
        for tokens, expected in parts:
            distance += float((model.get_submodule(name)(tokens)[0] - expected).square().mean())
            variance += float((expected - expected.mean((0, 1))).square().mean())
    assert after == pytest.approx(distance / variance, rel=1e-4)  # float32 sums


def test_matching_while_replacing_is_the_same() -> None:
    first, second = BUILDERS["vit"]()[0], BUILDERS["vit"]()[0]
    teacher = copy.deepcopy(first)
    replace_attention(first, batches=batches(2, 32, None), match_steps=3)
    replace_attention(second)
    errors = match_blocks(second, teacher, batches(2, 32, None), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    rows = replacement_report(first).rows
    assert {row.block.name: (row.first_error, row.error) for row in rows} == errors
    assert "output error" in str(replacement_report(first))


# -- which layers ---------------------------------------------------------------------------------------------------


def test_layers_by_name() -> None:
    for layers, expected in (
        ("vit.layers.1", [1]),
        ("vit.layers.*.attention", [0, 1, 2]),
        (["vit.layers.0", "vit.layers.2.attention"], [0, 2]),
    ):
        model = wide_vit()
        replace_attention(model, layers)
        assert list(dict(filtered_in(model))) == [f"vit.layers.{n}.attention" for n in expected]


def test_auto_takes_the_block_that_matters_least() -> None:
    model = wide_vit()
    dense = copy.deepcopy(model)
    replace_attention(model, "auto", count=1, batches=batches(), match_steps=2)
    report = replacement_report(model)
    increases = {row.block.name: row.loss_increase for row in report.rows}
    by_hand = {}
    for name in increases:
        one = copy.deepcopy(dense)
        # all blocks draw their first weights in turn, so those of the others are not wanted but drawn
        replace_attention(one, "all", batches=batches(), match_steps=2)
        for other, module in dense.named_modules():
            if is_attention(module) and other != name:
                one.vit.layers[int(other.split(".")[2])].attention = copy.deepcopy(module)
        with torch.no_grad():
            by_hand[name] = sum(float(one(**b).loss - dense(**b).loss) for b in batches()) / 2
    assert report.replaced == [min(by_hand, key=by_hand.get)]  # type: ignore[arg-type]
    # differences of losses near 1.6 in float32
    assert all(increases[name] == pytest.approx(by_hand[name], abs=1e-5) for name in by_hand)


def test_a_budget_of_macs_is_met() -> None:
    model = wide_vit()
    dense = count_macs(model)
    copied = copy.deepcopy(model)
    replace_attention(copied)
    lowest = count_macs(copied) / dense
    asked = (1 + 2 * lowest) / 3  # two of the three blocks
    replace_attention(model, "auto", macs=asked + 1e-6, batches=batches(1), match_steps=0)
    report = replacement_report(model)
    assert len(report.replaced) == 2
    assert count_macs(model) <= dense * (asked + 1e-6)
    saved = sum(row.macs - row.filter_macs for row in report.rows if row.filter is not None)
    assert dense - count_macs(model) == saved
    with pytest.raises(BudgetError, match=f"the lowest is {lowest:.3f} of the model's"):
        replace_attention(wide_vit(), "auto", macs=lowest * 0.9, batches=batches(1), match_steps=0)


def test_a_budget_of_time() -> None:
    model = wide_vit()
    replace_attention(model, "auto", latency=1.0, batches=batches(1), match_steps=0)
    assert replacement_report(model).replaced == []  # met as it is
    assert all(row.ms > 0 and row.filter_ms > 0 for row in replacement_report(model).rows)
    with pytest.raises(BudgetError, match=r"latency=0\.01 cannot be reached"):
        replace_attention(model, "auto", latency=0.01, batches=batches(1), match_steps=0)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"filter": "linear"}, MethodError, "filter='linear' is not known; give one of 'afidaf', 'fourier', 'image'"),
        ({"layers": "vit.layers.*.mlp"}, MethodError, "matches modules, but none that is or holds an attention block"),
        ({"layers": "decoder.*"}, MethodError, "matches nothing. The attention blocks of this model are vit.layers.0"),
        ({"layers": []}, MethodError, "layers is empty"),
        ({"layers": "auto"}, MethodError, "needs exactly one of count=, macs= and latency=; got none"),
        ({"layers": "auto", "count": 1, "macs": 0.5}, MethodError, "got count and macs"),
        ({"layers": "auto", "count": 1}, MethodError, "needs batches="),
        ({"layers": "all", "count": 1}, MethodError, 'needs layers="auto"'),
        ({"layers": "auto", "count": 0, "batches": []}, MethodError, "count=0 is not a number of blocks"),
        ({"layers": "auto", "count": 9, "batches": []}, BudgetError, "the model has 3 attention blocks"),
        ({"layers": "auto", "latency": -1.0, "batches": []}, BudgetError, "latency=-1.0 is not a budget"),
        ({"layers": "auto", "macs": 0.0, "batches": []}, BudgetError, "macs=0.0 is not a budget"),
        ({"match_steps": -1}, MethodError, "-1 steps of matching"),
        ({"learning_rate": 0.0}, MethodError, "learning_rate=0.0"),
        ({"batches": []}, DataError, "batches is empty"),
        ({"batches": [torch.zeros(1, 3, 64, 64)]}, DataError, "each batch must be a dict"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], kind: type, message: str) -> None:
    model = wide_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=message.replace("*", r"\*").replace("[", r"\[")):
        replace_attention(model, **arguments)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert record_of(model) is None


def test_models_that_cannot_be_replaced() -> None:
    with pytest.raises(NothingToShrinkError, match="has no attention block that a filter can stand in for"):
        replace_attention(FAMILIES["resnet_basic"]()[0])
    pruned, _ = BUILDERS["vit"]()
    prune(pruned, ratio=0.3)
    with pytest.raises(NothingToShrinkError, match="pruned or factorised is none: replace attention first"):
        replace_attention(pruned)
    attach_record(model := wide_vit(), Record({"vit.layers.1.attention.q_proj.weight": (16, None)}))
    with pytest.raises(ModelError, match=r"'vit\.layers\.1\.attention' was pruned or factorised before"):
        replace_attention(model)
    factorised = wide_vit()
    factorize(factorised, ranks={"vit.layers.1.mlp.fc1": 2})
    replace_attention(factorised)  # another layer was, which does not matter
    quantized = wide_vit()
    quantize(quantized, HfCompressConfig(weights=8).quantization)
    with pytest.raises(ModelError, match="quantized"):
        replace_attention(quantized)
    with pytest.raises(ModelError, match="nothing was replaced in this"):
        replacement_report(wide_vit())
    with pytest.raises(ModelError, match="has no filters in place of attention"):
        match_blocks(wide_vit(), wide_vit(), batches())
    model = wide_vit()
    replace_attention(model)
    with pytest.raises(ModelError, match=r"the teacher has no attention at 'vit\.layers\.0\.attention'"):
        match_blocks(model, model, batches())


def test_tokens_that_are_no_map() -> None:
    """Order and number of tokens are seen by running the model, whatever its name is."""
    for change, message in (
        (
            lambda module, args, tokens: tokens.flip(1),
            "not 1 class and register tokens and then the patches row by row",
        ),
        (lambda module, args, tokens: tokens.roll(-1, 1), "not 1 class and register tokens"),
        (lambda module, args, tokens: tokens[:, :14], "neither the 4 x 4 patches of the image"),
    ):
        model, _ = BUILDERS["vit"]()
        model.vit.embeddings.register_forward_hook(change)
        with pytest.raises(ModelError, match=message):
            replace_attention(model)
    text = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(NothingToShrinkError, match="LlamaModel has no attention block"):
        replace_attention(text, example_inputs={"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_shells_hold_no_more_than_promised() -> None:
    """A checkpoint's record can make a model larger by a bounded factor alone."""
    for channels, heads in ((8, 1), (24, 3), (33, 3), (64, 4), (100, 4), (192, 3)):
        config = transformers.ViTConfig(hidden_size=channels, num_attention_heads=heads, num_hidden_layers=1)
        with torch.device("meta"):
            attention = transformers.ViTModel(config).layers[0].attention
        for filter in FILTERS:
            shell = filtered_shell(attention, filter, (4, 4), 1)
            assert all(parameter.is_meta for parameter in shell.parameters())
            size = sum(parameter.numel() for parameter in shell.parameters())
            assert size <= 3 * sum(parameter.numel() for parameter in attention.parameters()) + 90 * channels


def test_a_record_of_filters_survives_json() -> None:
    record = Record(filtered={"a.b": ("afidaf", (3, 4), 2)})
    assert Record.from_json(record.to_json()) == record and record.version == 4 and bool(record)
