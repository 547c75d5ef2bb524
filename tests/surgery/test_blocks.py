"""Removing a block is passing it over: found without knowing the model, exact, refused where it cannot hold, reloadable."""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES, images, perturb
from masking import zero_at_producers
from torch import Tensor, nn

import hf_compress
from hf_compress.axes import Cost, find_axes
from hf_compress.errors import BudgetError, DataError, MethodError, ModelError, NothingToShrinkError, PlanError
from hf_compress.recipe.reload import in_own_memory
from hf_compress.surgery import Plan, Record, apply_record, record_of, shrink
from hf_compress.surgery.blocks import Block, block_scores, find_blocks, remove_blocks, select_blocks

Built = tuple[nn.Module, Tensor]


def _deeper(kind: type[nn.Module], config: transformers.PretrainedConfig, size: int = 32) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        return perturb(kind(copy.deepcopy(config))), images(size)

    return build


_SMALL = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32, "patch_size": 8}

DEEPER: dict[str, Callable[[], Built]] = {
    "vit": _deeper(
        transformers.ViTForImageClassification, transformers.ViTConfig(num_hidden_layers=5, num_labels=7, **_SMALL)
    ),
    "swin": _deeper(
        transformers.SwinForImageClassification,
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=12, depths=[2, 4], num_heads=[2, 3], window_size=4, num_labels=7
        ),
    ),
    "resnet": _deeper(
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic", num_labels=7
        ),
    ),
    "segformer": _deeper(
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 3, 1], num_attention_heads=[1, 2, 2, 4], num_labels=7
        ),
        64,
    ),
    "timm_vit": FAMILIES["timm_vit"],
    "mobilenet_v2": FAMILIES["mobilenet_v2"],
    "convnext": FAMILIES["convnext"],
    "levit": MORE_FAMILIES["levit"],
    "swinv2": MORE_FAMILIES["swinv2"],
    "mobilevit": MORE_FAMILIES["mobilevit"],
    "timm_mobilenetv3": MORE_FAMILIES["timm_mobilenetv3"],
}  # fmt: skip


def detr() -> Built:
    """Layers that normalise behind the sum, on a backbone with residual blocks and frozen norms."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    return perturb(transformers.DetrForObjectDetection(config)), images(64)


def double(built: Built) -> Built:
    return built[0].double(), built[1].double()


def passed_over(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """What the dense model computes when the named blocks return their input: written without the package's help."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        return model(pixel_values=x).logits


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=x).logits


def some_of(blocks: Sequence[Block], seed: int) -> list[str]:
    """A random choice that leaves one entry in every list."""
    draw = random.Random(seed)
    chosen: list[str] = []
    left = {block.name.rpartition(".")[0]: block.siblings for block in blocks}
    for block in draw.sample(list(blocks), len(blocks)):
        holder = block.name.rpartition(".")[0]
        if left[holder] > 1 and (not chosen or draw.random() < 0.6):
            left[holder] -= 1
            chosen.append(block.name)
    return chosen


# -- finding ------------------------------------------------------------------------------------------------------


def names_of(built: Built) -> list[str]:
    model, x = built
    return [block.name for block in find_blocks(model, x[:1])]


def test_known_architectures_give_the_blocks_that_a_reader_would_name() -> None:
    assert names_of(DEEPER["vit"]()) == [f"vit.layers.{i}" for i in range(5)]
    stage = "swin.encoder.layers.{}.blocks.{}"
    assert names_of(DEEPER["swin"]()) == [stage.format(i, j) for i, depth in enumerate([2, 4]) for j in range(depth)]
    # the first of stage 1 halves the image and doubles the channels
    layer = "resnet.encoder.stages.{}.layers.{}"
    assert names_of(DEEPER["resnet"]()) == [layer.format(i, j) for i in (0, 1) for j in range(3) if (i, j) != (1, 0)]
    found = names_of(DEEPER["segformer"]())
    assert len(found) == 5  # two stages have one block only, which must stay
    # attention that normalises behind its sum returns something else than its input when its weights are zero
    assert names_of(detr()) == [
        f"model.backbone.model.encoder.stages.{i}.layers.{j}" for i in (0, 1) for j in range(2) if (i, j) != (1, 0)
    ]
    for family in ("plain_cnn", "plain_dense", "timm_densenet"):
        assert names_of(FAMILIES[family]()) == []


@pytest.mark.parametrize("family", DEEPER)
def test_finding_leaves_the_model_as_it_was_and_gives_true_costs(family: str) -> None:
    model, x = DEEPER[family]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    blocks = find_blocks(model, x)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # nor does anything stay that transformers installs in a first pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    dense = find_axes(model, x[:1]).cost()
    for block in blocks:
        assert block.params > 0 and block.macs > 0
    names = some_of(blocks, 0)
    chosen = [block for block in blocks if block.name in names]
    remove_blocks(model, chosen, example_inputs=x)
    smaller = find_axes(model, x[:1]).cost()
    assert dense.params - smaller.params == sum(block.params for block in chosen)
    assert dense.macs - smaller.macs == sum(block.macs for block in chosen)
    assert all(module.training for module in model.modules())


class Toy(nn.Module):
    """Residual layers in a list; ``use`` says how the list is walked."""

    def __init__(self, use: str = "iterate", depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.use = use
        self.stem = nn.Linear(3, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.gains = nn.Parameter(torch.arange(1.0, depth + 1))
        self.head = nn.Linear(width, 2)
        if use == "tied":
            self.head = nn.Linear(width, width)
            self.layers[1].inner.weight = self.head.weight
        if use == "twice":
            self.layers.append(self.layers[0])

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if self.use == "by number":
            for i in range(len(self.gains)):
                x = self.layers[i](x)
        elif self.use == "zipped":
            for layer, gain in zip(self.layers, self.gains, strict=False):
                x = layer(x) * gain
        elif self.use == "last":
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i == len(self.gains) - 1:
                    x = x * 2
        elif self.use == "all states":
            states = []
            for layer in self.layers:
                states.append(x := layer(x))
            return {"logits": self.head(x), "states": states}
        else:
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


def toy(use: str = "iterate") -> Built:
    torch.manual_seed(0)
    return double((Toy(use).eval(), torch.randn(2, 3)))


def test_shared_things_are_counted_and_left_alone() -> None:
    model, x = toy("tied")
    one, two = find_blocks(model, x)[:2]
    assert one.params - two.params == 36  # the matrix that the head has as well stays with it
    model, x = toy("twice")
    assert [block.name for block in find_blocks(model, x)] == ["layers.1", "layers.2", "layers.3"]


def test_what_does_more_than_add_is_no_block() -> None:
    """Gates, norms, plain layers, layers without parameters and layers that see only zeros."""

    class Gate(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.inner(x))

    class Post(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.inner(x))

    class Offset(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x) + 1e-6

    for kind in (Gate, Post, Offset, lambda width: nn.Linear(width, width), lambda width: nn.ReLU()):
        model, x = toy()
        model.layers[2] = kind(6).double()
        assert [block.name for block in find_blocks(model, x)] == ["layers.0", "layers.1", "layers.3"]
    model, x = toy()
    model.stem.bias.data.zero_()
    assert "layers.0" not in [block.name for block in find_blocks(model, torch.zeros_like(x))]


# -- removing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", DEEPER)
def test_removed_equals_passed_over(family: str, seed: int) -> None:
    model, x = double(DEEPER[family]())
    names = some_of(find_blocks(model, x[:1]), seed)
    dense = run(model, x)
    expected = passed_over(model, names, x)
    assert remove_blocks(model, names, example_inputs=x[:1]) is model
    found = run(model, x)
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert float((found - dense).abs().max()) > 1e-9 * float(dense.abs().max())  # they did something


def test_other_outputs_are_right_as_well() -> None:
    model, x = double(DEEPER["vit"]())
    remove_blocks(model, ["vit.layers.1", "vit.layers.3"])
    assert model.config.quantization_config["record"]["removed"] == {"vit.layers": [1, 3]}
    model.set_attn_implementation("eager")
    output = model(pixel_values=x, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    model.train()
    model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_plain_modules_hold_their_record_themselves() -> None:
    model, x = toy()
    dense = copy.deepcopy(model)
    remove_blocks(model, "layers.2", example_inputs=x)
    assert record_of(model) == Record(removed={"layers": (2,)})
    assert apply_record(dense, record_of(model)) is dense
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(x), model(x))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("by number", r"fails \(.*out of range"),
        ("zipped", "differs by"),
        ("last", "differs by"),
        ("all states", "returns 4 tensors in place of 5"),
    ],
)
def test_models_that_number_their_layers_are_refused_and_unchanged(use: str, message: str) -> None:
    model, x = toy(use)
    before = [(name, id(module)) for name, module in model.named_modules()]
    assert "layers.1" not in [block.name for block in find_blocks(model, x)]
    with pytest.raises(ModelError, match=message):
        remove_blocks(model, ["layers.1"], example_inputs=x)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert record_of(model) is None


def test_a_backbone_that_names_its_stages_by_number_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, image_size=32, patch_size=8,
        out_features=["stage2", "stage4"],
    )  # fmt: skip
    model = perturb(transformers.Dinov2Backbone(config))
    assert find_blocks(model) == []
    with pytest.raises(ModelError, match="in place of"):
        remove_blocks(model, ["encoder.layer.0"])
    assert len(model.encoder.layer) == 4


def test_wrong_names_are_refused() -> None:
    model, _ = DEEPER["swin"]()
    first = "swin.encoder.layers.0.blocks.{}"
    for names, message in (
        ([first.format(0), first.format(1)], "would lose all 2"),
        (["swin.encoder.layers.0"], "no block that can be removed"),
        (["nothing"], "the model has 6"),
        ("swin", "no block"),
        ([first.format("00")], "no block"),
    ):
        with pytest.raises(PlanError, match=message):
            remove_blocks(model, names)
    assert record_of(model) is None
    remove_blocks(model, [])
    assert record_of(model) is None
    remove_blocks(model, [first.format(0), first.format(0)])  # named twice is named
    with pytest.raises(PlanError, match="no block"):  # the last one of its list is none any more
        remove_blocks(model, [first.format(0)])


# -- records compose ----------------------------------------------------------------------------------------------


def random_step(model: nn.Module, x: Tensor, draw: random.Random) -> str:
    """Blocks or widths, as they come."""
    blocks = find_blocks(model, x[:1])
    names = some_of(blocks, draw.randrange(1000))[:2]
    if names and draw.random() < 0.6:
        remove_blocks(model, names, example_inputs=x[:1])
        return "blocks"
    hf_compress.prune(
        model,
        scores="random",
        ratio=0.2,
        fold_shift=draw.random() < 0.5,
        inexact=draw.random() < 0.3,
        example_inputs=x[:1],
    )
    return "widths"


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "timm_vit", "mobilenet_v2", "levit", "segformer"])
def test_any_order_of_blocks_and_widths_reloads_bit_for_bit(family: str, tmp_path: Path) -> None:
    draw = random.Random(family)
    model, x = DEEPER[family]()
    kind = type(model)
    steps = []
    for step in range(5):
        steps.append(random_step(model, x, draw))
        if step == 2:  # a reloaded model is taken further like any other
            model.save_pretrained(tmp_path / "half")
            model = in_own_memory(kind.from_pretrained(tmp_path / "half").eval())
    assert {"blocks", "widths"} <= set(steps)
    model.save_pretrained(tmp_path / "model")
    again, info = kind.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(run(in_own_memory(again), x), run(model, x))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()
    # the record alone: LeViT's own part of config.json grows with every save
    written = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("model", "again")
    ]
    assert written[0] == written[1]


def test_a_new_process_with_the_stock_class_gives_the_same_logits(tmp_path: Path) -> None:
    model, x = DEEPER["swin"]()
    hf_compress.prune(model, macs=0.8)
    remove_blocks(model, ["swin.encoder.layers.1.blocks.0", "swin.encoder.layers.0.blocks.1"])
    remove_blocks(model, ["swin.encoder.layers.1.blocks.1"])
    assert model.config.quantization_config["record"]["removed"] == {
        "swin.encoder.layers.0.blocks": [1],
        "swin.encoder.layers.1.blocks": [0, 2],  # as the configuration builds them
    }
    model.save_pretrained(tmp_path / "model")
    torch.save((x, run(model, x)), tmp_path / "expected.pt")
    script = """
import sys, torch, hf_compress
from hf_compress.recipe.reload import in_own_memory
from transformers import AutoModelForImageClassification
x, logits = torch.load(sys.argv[1] + "/expected.pt")
model = in_own_memory(AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/model"))
with torch.no_grad():
    print(torch.equal(model(x).logits, logits))
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "True", result.stderr[-2000:]


class Nested(nn.Module):
    """Lists within lists, for records alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(nn.Linear(1 + i, 1 + 10 * j + k) for k in range(3))) for j in range(4))
            for i in range(5)
        )


def layout(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("seed", range(60))
def test_merging_records_is_applying_one_after_the_other(seed: int) -> None:
    draw = random.Random(seed)
    model, merged = Nested(), Record()
    for _ in range(draw.randint(2, 5)):
        lists = {
            name: module for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
        }
        removed = {}
        for name in draw.sample(list(lists), min(len(lists), draw.randint(0, 3))):
            size = len(lists[name])
            if size > 1:
                removed[name] = tuple(sorted(draw.sample(range(size), draw.randint(1, size - 1))))
        step = Record(removed=removed)
        apply_record(model, step)
        shapes = {}
        for name, parameter in model.named_parameters():
            if draw.random() < 0.1 and parameter.dim() == 2 and parameter.shape[1] > 1:
                shapes[name] = (None, draw.randint(1, parameter.shape[1] - 1))
        step = Record(shapes, {}, (), removed)
        apply_record(model, Record(shapes))
        merged = merged.merge(step)
    data = merged.to_json()
    assert Record.from_json(data) == merged and data["version"] == (2 if merged.removed else 1)
    assert layout(apply_record(Nested(), Record.from_json(data))) == layout(model)


# -- scores and selection -----------------------------------------------------------------------------------------


def labelled(x: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": x * factor, "labels": torch.tensor([1, 2])} for factor in (1.0, -0.5)]


def test_loss_score_is_the_increase_of_the_loss_without_the_block() -> None:
    model, x = double(DEEPER["vit"]())
    blocks = find_blocks(model, x)
    scores = block_scores(model, blocks, labelled(x), method="loss")
    for block in blocks:
        smaller = remove_blocks(copy.deepcopy(model), [block], example_inputs=x)
        with torch.no_grad():
            expected = sum(float(smaller(**b).loss - model(**b).loss) for b in labelled(x)) / 2
        assert scores[block.name] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", ["vit", "resnet", "swin", "segformer"])
def test_similarity_score_is_one_minus_the_cosine_of_input_and_output(family: str) -> None:
    model, x = double(DEEPER[family]())
    blocks = find_blocks(model, x)
    seen: dict[str, list[float]] = {block.name: [] for block in blocks}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            a, b = args[0].flatten(1), (output[0] if isinstance(output, tuple) else output).flatten(1)
            seen[name] += (1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).tolist()

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in seen]
    for factor in (1.0, -0.5):
        run(model, x * factor)
    for handle in handles:
        handle.remove()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    runs = [{"pixel_values": x * factor} for factor in (1.0, -0.5)]
    model.train()
    scores = block_scores(model, blocks, runs)
    assert model.training and [len(module._forward_hooks) for module in model.modules()] == hooks
    for name, values in seen.items():
        assert scores[name] == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-12)
    assert set(block_scores(model, blocks)) == set(scores)  # on noise, without any batch


def test_a_block_that_does_nothing_scores_zero_and_goes_first() -> None:
    model, x = double(DEEPER["vit"]())
    for linear in (model.vit.layers[2].attention.o_proj, model.vit.layers[2].mlp.fc2):
        linear.weight.data.zero_(), linear.bias.data.zero_()
    blocks, dense = find_blocks(model, x), run(model, x)
    for method in ("similarity", "loss"):
        scores = block_scores(model, blocks, labelled(x), method=method)
        assert abs(scores["vit.layers.2"]) < 1e-12
        magnitudes = {name: abs(score) for name, score in scores.items()}
        assert select_blocks(blocks, magnitudes, find_axes(model, x[:1]), macs=0.9) == ["vit.layers.2"]
    remove_blocks(model, ["vit.layers.2"])
    torch.testing.assert_close(run(model, x), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_selection_meets_the_budget_with_nothing_to_spare(seed: int) -> None:
    draw = random.Random(seed)
    blocks = [
        Block(f"{holder}.{i}", draw.randint(1, 50), draw.randint(1, 50), size)
        for holder, size in (("a", 3), ("b.c", 4), ("d", 2))
        for i in range(size)
    ]
    scores = {block.name: draw.uniform(-0.2, 1) for block in blocks}
    dense = Cost(600, 700)
    given = {kind: draw.uniform(0.55, 1) for kind in draw.choice([("macs",), ("params",), ("macs", "params")])}
    cheapest = {  # all but the cheapest of every list may go; for two budgets this is only a bound
        kind: sum(
            sum(costs) - min(costs)
            for costs in ([getattr(b, kind) for b in blocks if b.name.startswith(h)] for h in ("a", "b", "d"))
        )
        for kind in given
    }

    def meets(names: Sequence[str]) -> bool:
        gone = [block for block in blocks if block.name in names]
        return all(
            getattr(dense, kind) - sum(getattr(b, kind) for b in gone) <= share * getattr(dense, kind)
            for kind, share in given.items()
        )

    try:
        names = select_blocks(blocks, scores, dense, **given)
    except BudgetError as error:
        assert "at the least" in str(error)
        # greedy keeps a block of every list that it ranks highest, not the cheapest
        assert any((1 - share) * getattr(dense, kind) > cheapest[kind] - 50 * 3 for kind, share in given.items())
        return
    assert meets(names)
    for holder, size in (("a", 3), ("b.c", 4), ("d", 2)):
        assert sum(name.startswith(f"{holder}.") for name in names) < size
    for fewer in itertools.combinations(names, max(len(names) - 1, 0)):
        assert not names or not meets(fewer)
    assert names == select_blocks(blocks, scores, dense, **given)


def test_depth_then_widths_meet_one_budget() -> None:
    model, x = DEEPER["vit"]()
    axes = find_axes(model, x[:1])
    blocks = find_blocks(model, x)
    target = 0.5 * axes.macs
    remove_blocks(model, select_blocks(blocks, block_scores(model, blocks), axes, macs=0.75))
    assert target < find_axes(model, x[:1]).macs <= 0.75 * axes.macs
    hf_compress.prune(model, macs=target)  # above 1 is absolute
    assert find_axes(model, x[:1]).macs <= target
    assert torch.isfinite(run(model, x)).all()


def test_wrong_arguments_are_named() -> None:
    model, x = DEEPER["vit"]()
    blocks = find_blocks(model, x)
    dense = find_axes(model, x[:1]).cost()
    scores = block_scores(model, blocks)
    with pytest.raises(MethodError, match="'similarity', 'loss'"):
        block_scores(model, blocks, method="taylor")
    with pytest.raises(MethodError, match="need batches"):
        block_scores(model, blocks, method="loss")
    for method in ("similarity", "loss"):
        with pytest.raises(DataError, match="empty"):
            block_scores(model, blocks, [], method=method)
        with pytest.raises(ModelError, match="failed on"):
            block_scores(model, blocks, [{"pixels": 1}], method=method)
        with pytest.raises(ModelError, match=r"score of block|loss of batch"):
            block_scores(
                model, blocks, [{"pixel_values": x * float("nan"), "labels": torch.tensor([0, 1])}], method=method
            )
    with pytest.raises(BudgetError, match="no budget"):
        select_blocks(blocks, scores, dense)
    with pytest.raises(BudgetError, match=r"macs can be 0\.\d+ of the dense"):
        select_blocks(blocks, scores, dense, macs=0.01)
    with pytest.raises(BudgetError, match="not a budget"):
        select_blocks(blocks, scores, dense, macs=-1)
    with pytest.raises(NothingToShrinkError, match="no block"):
        select_blocks([], {}, dense, macs=0.5)
    assert select_blocks(blocks, scores, dense, macs=1.0) == []
    with pytest.raises(ModelError, match="failed on the example inputs"):
        find_blocks(model, torch.zeros(1, 5, 7, 7))


# -- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "swin", "timm_vit", "detr"])
def test_whole_heads_go_down_to_one(family: str) -> None:
    model, x = double(detr() if family == "detr" else FAMILIES[family]())
    axes = find_axes(model, x[:1])
    heads = [axis for axis in axes if axis.name.endswith(":heads")]
    assert len(heads) >= 2 and all(axis.is_exact and axis.size > 1 for axis in heads)
    keep = {axis.name: (i % axis.size,) for i, axis in enumerate(heads)}
    plan = Plan(keep)
    dense = run(model, x)
    expected = run(zero_at_producers(copy.deepcopy(model), axes, plan.masks(axes)), x)
    shrink(model, plan, axes=axes)
    found = run(model, x)
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert float((found - dense).abs().max()) > 1e-6 * float(dense.abs().max())
    after = find_axes(model, x[:1])  # one head is no axis any more, or one of size 1
    assert all(after[axis.name].size == 1 for axis in heads if axis.name in after)
