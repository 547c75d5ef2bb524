"""PrunedViT: the checks that transformers makes on its own models, the paper's sizes, and conversion without a change."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import MORE_FAMILIES, perturb
from huggingface_hub.errors import StrictDataclassError
from masking import assert_close, assert_cut_equals_masked, random_keep, zero_at_producers
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress import Plan, export_onnx, find_axes, prune, shrink
from hf_compress.errors import ModelError
from hf_compress.export.onnx import onnx_difference
from hf_compress.models.pruned_vit import (
    PrunedViTBackbone,
    PrunedViTConfig,
    PrunedViTForImageClassification,
    PrunedViTModel,
    to_pruned_vit,
)
from hf_compress.models.pruned_vit.modeling_pruned_vit import PrunedViTDropPath, PrunedViTLayerNorm
from hf_compress.recipe.reload import in_own_memory

# no two widths alike, so that a transposed or exchanged dimension cannot pass
WIDTHS = {
    "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": [2, 3], "qk_dims": [6, 4], "v_dims": [5, 7],
    "intermediate_sizes": [24, 17], "attention_scales": [0.25, 0.5], "image_size": 32, "patch_size": 8,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "distilled": {"use_distillation_token": True, "classifier_pooling": "cls_distillation", "qkv_bias": False},
    "registers": {
        "num_register_tokens": 3, "use_swiglu_ffn": True, "layer_scale_init_value": 0.5, "classifier_pooling": "cls_mean",
        "interpolate_pos_encoding": True, "antialias_pos_encoding": True,
    },
    "narrow": {"norm_width": 28, "pooler_output_size": 9},
    "oblong": {"image_size": [32, 48], "patch_size": [8, 16], "num_channels": 1, "use_distillation_token": True},
}  # fmt: skip
CLASSES = (PrunedViTModel, PrunedViTForImageClassification, PrunedViTBackbone)


def config_of(variant: str, **changes: object) -> PrunedViTConfig:
    return PrunedViTConfig(**{**WIDTHS, "num_labels": 7, **copy.deepcopy(VARIANTS[variant]), **changes})


def build(variant: str, kind: type = PrunedViTForImageClassification, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return perturb(kind(config_of(variant, **changes)))


def images(model: PreTrainedModel, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.config.num_channels, *(size or model.config.image_hw))
    return torch.randn(shape, generator=generator).to(model.dtype)


def first(output: object) -> Tensor:
    """The main tensor of any of the three classes' outputs."""
    for name in ("logits", "feature_maps", "last_hidden_state"):
        if name in output:
            return output[name][0] if name == "feature_maps" else output[name]
    raise AssertionError(output)


# -- configuration ------------------------------------------------------------------------------------------------


def test_default_is_vit_base() -> None:
    with torch.device("meta"):
        ours = PrunedViTForImageClassification(PrunedViTConfig(num_labels=1000))
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    assert ours.num_parameters() == theirs.num_parameters() == 86_567_656
    assert ours.config.qk_dims == ours.config.v_dims == [64] * 12 and ours.config.intermediate_sizes == [3072] * 12
    assert ours.config.attention_scales == [64**-0.5] * 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_survives_json(variant: str, tmp_path: Path) -> None:
    config = config_of(variant, out_features=["stage1"], drop_path_rate=[0.0, 0.25])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PrunedViTConfig and again.out_features == ["stage1"] and again.out_indices == [1]
    assert again.to_diff_dict() == config.to_diff_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["qk_dims"] == [6, 4] and written["model_type"] == "pruned_vit"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.0),
        ("hidden_size", -20),
        ("hidden_size", True),
        ("hidden_size", "20"),
        ("num_attention_heads", [2, 0]),
        ("num_attention_heads", [2]),
        ("qk_dims", [6, 4, 4]),
        ("qk_dims", [6, 10**12]),
        ("qk_dims", [6, None]),
        ("v_dims", {"0": 3}),
        ("intermediate_sizes", [24, -1]),
        ("attention_scales", [0.5, math.nan]),
        ("attention_scales", [0.5, 0.0]),
        ("attention_scales", [0.5]),
        ("norm_width", 19),
        ("image_size", [32, 32, 32]),
        ("image_size", 4),
        ("patch_size", 0),
        ("num_channels", 0),
        ("num_register_tokens", -1),
        ("pooler_output_size", 0),
        ("classifier_pooling", "max"),
        ("classifier_pooling", "cls_distillation"),
        ("layer_scale_init_value", math.inf),
        ("layer_norm_eps", -1e-6),
        ("initializer_range", math.nan),
        ("hidden_dropout_prob", 1.0),
        ("attention_probs_dropout_prob", -0.1),
        ("drop_path_rate", [0.1, math.nan]),
        ("drop_path_rate", [0.1]),
        ("out_features", ["stage3"]),
    ],
)
def test_impossible_configurations_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=field if value != 4 else "patch_size"):
        config_of("plain", **{field: value})


def test_heads_that_do_not_divide_the_width_need_their_dimensions() -> None:
    with pytest.raises(ValueError, match="qk_dims"):
        PrunedViTConfig(hidden_size=20, num_attention_heads=3)


@pytest.mark.parametrize("field", ["hidden_act", "pooler_act"])
def test_unknown_activations_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='nonsense'"):
        build("narrow", PrunedViTModel, **{field: "nonsense"})


# -- sizes: dossier of the reconstruction, all inner dimensions of DeiT cut alike ------------------------------------

DEIT = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
SIZES = {  # (width, classes) -> millions of parameters with 100, 80 and 60 % of the dimensions
    ("ti", 1000): (5.717, 4.654, 3.587),
    ("s", 1000): (22.051, 17.796, 13.541),
    ("s", 100): (21.704, 17.449, 13.194),
    ("b", 1000): (86.568, 69.560, 52.572),
}


@pytest.mark.parametrize("share", [100, 80, 60])
@pytest.mark.parametrize(("width", "labels"), SIZES)
def test_sizes_of_pruned_deit(width: str, labels: int, share: int) -> None:
    hidden, heads = DEIT[width]
    layers = 12
    # so many attention dimensions in each layer on average; whole dimensions of all heads go to some layers or others
    total = layers * round(hidden * share / 100)
    assert total % heads == 0
    less, more = divmod(total // heads, layers)
    dims = [less + 1] * more + [less] * (layers - more)
    mlp = round(4 * hidden * share / 100)
    config = PrunedViTConfig(
        hidden_size=hidden, num_attention_heads=heads, qk_dims=dims, intermediate_sizes=mlp, num_labels=labels
    )
    with torch.device("meta"):
        model = PrunedViTForImageClassification(config)
    attention, hidden_units = sum(dims) * heads, sum(config.intermediate_sizes)
    formula = (
        attention * (4 * hidden + 3) + layers * hidden  # q, k, v, o
        + hidden_units * (2 * hidden + 1) + layers * hidden  # fc1, fc2
        + (2 * layers + 1) * 2 * hidden  # norms
        + hidden * (1 + 197) + (3 * 16 * 16 + 1) * hidden  # class token, positions, patches
        + (hidden + 1) * labels
    )  # fmt: skip
    assert model.num_parameters() == formula
    assert round(formula / 1e6, 3) == SIZES[width, labels][(100 - share) // 20]


# -- initialisation -------------------------------------------------------------------------------------------------


def expected_start(name: str, config: PrunedViTConfig) -> float | None:
    """The constant that a parameter starts with; None where it is random."""
    if name.endswith("bias"):
        return 0.0
    if "layernorm" in name:
        return 1.0
    return config.layer_scale_init_value if "layer_scale" in name else None


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised(variant: str, kind: type, tmp_path: Path) -> None:
    config = config_of(variant, initializer_range=0.125)
    torch.manual_seed(0)
    built = kind(config)
    # loading a checkpoint without a single weight initialises every parameter on its own
    config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = kind.from_pretrained(tmp_path)
    for model in (built, loaded):
        for name, parameter in model.named_parameters():
            constant = expected_start(name, config)
            if constant is not None:
                assert bool((parameter == constant).all()), name
                continue
            # truncated normal at two units of torch's, not of the deviation: five standard errors
            mean, deviation = float(parameter.detach().mean()), float(parameter.detach().std())
            assert abs(mean) < 5 * 0.125 / parameter.numel() ** 0.5, name
            assert abs(deviation / 0.125 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_with_zero_deviation(variant: str) -> None:
    """As transformers tests it: with all ranges near zero, every parameter's mean is 0 or 1."""
    changes = {"layer_scale_init_value": 1e-10} if variant == "registers" else {}
    model = PrunedViTForImageClassification(config_of(variant, initializer_range=1e-10, **changes))
    for name, parameter in model.named_parameters():
        assert round(float(parameter.detach().mean()), 9) in (0.0, 1.0), name


# -- forward pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_and_hidden_states(variant: str) -> None:
    model = build(variant, attn_implementation="eager")
    config, pixels = model.config, images(model)
    grid = [image // patch for image, patch in zip(config.image_hw, config.patch_hw, strict=True)]
    tokens = 1 + config.use_distillation_token + config.num_register_tokens + grid[0] * grid[1]
    for module in (model, model.pruned_vit):
        output = module(pixels, output_attentions=True, output_hidden_states=True)
        assert [tuple(a.shape) for a in output.attentions] == [(2, heads, tokens, tokens) for heads in (2, 3)]
        assert all(torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5) for a in output.attentions)  # softmax, float32
        assert [tuple(h.shape) for h in output.hidden_states] == [(2, tokens, 20)] * 3
        plain = module(pixels)
        assert plain.attentions is None and plain.hidden_states is None
        assert torch.equal(first(plain), first(output))
    model.config.output_hidden_states = True
    assert len(model(pixels).hidden_states) == 3
    trunk = model.pruned_vit(pixels, output_hidden_states=True)
    torch.testing.assert_close(model.pruned_vit.layernorm(trunk.hidden_states[-1]), trunk.last_hidden_state)
    states = model(pixels, output_hidden_states=True).hidden_states
    states[0].retain_grad()
    model(pixels, output_hidden_states=True)  # another call does not disturb the first
    states[-1].sum().backward()
    assert states[0].grad is not None and bool(states[0].grad.any())


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tuples_determinism_and_inputs(variant: str, kind: type) -> None:
    model = build(variant, kind)
    pixels = images(model)
    with torch.no_grad():
        output = model(pixels)
        assert torch.equal(first(output), first(model(pixels)))
        for got, expected in zip(model(pixels, return_dict=False), output.to_tuple(), strict=True):
            for a, b in zip(got, expected, strict=True):  # a tensor, or a tuple of feature maps
                assert torch.equal(a, b)
        one = first(model(pixels[:1]))
    torch.testing.assert_close(one, first(output)[:1], rtol=1e-4, atol=1e-5)  # float32, another batch size
    assert model.main_input_name == "pixel_values"
    assert model.get_input_embeddings() is model.base_model.embeddings.patch_embeddings
    assert not list(model.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_sdpa_and_a_flash_kernel_agree(variant: str) -> None:
    model = build(variant).double()
    pixels = images(model)

    def flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: object) -> object:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]  # such kernels know one head dimension only
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash)
    logits = {}
    try:
        with torch.no_grad():
            for implementation in ("eager", "sdpa", "flash_stand_in"):
                model.config._attn_implementation = implementation
                logits[implementation] = model(pixels).logits
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_stand_in")
    assert_close(logits["eager"], logits["sdpa"], 1e-12)  # float64 rounding
    assert_close(logits["flash_stand_in"], logits["sdpa"], 1e-12)
    assert build(variant).config._attn_implementation == "sdpa"


def test_attention_is_what_it_says() -> None:
    """One layer against loops over heads, with the scale of the configuration and not that of the width."""
    model = build("plain").double().requires_grad_(False)
    layer = model.pruned_vit.layers[1].attention
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    parts = []
    for head in range(3):
        q, k = (p.weight[4 * head : 4 * head + 4] for p in (layer.q_proj, layer.k_proj))
        qb, kb = (p.bias[4 * head : 4 * head + 4] for p in (layer.q_proj, layer.k_proj))
        logits = (x @ q.T + qb) @ (x @ k.T + kb).transpose(1, 2) * 0.5
        values = x @ layer.v_proj.weight[7 * head : 7 * head + 7].T + layer.v_proj.bias[7 * head : 7 * head + 7]
        parts.append(logits.softmax(-1) @ values)
    expected = torch.cat(parts, -1) @ layer.o_proj.weight.T + layer.o_proj.bias
    assert_close(layer(x)[0], expected, 1e-12)
    layer.scaling = 4**-0.5 / 2
    with torch.no_grad():
        assert (layer(x)[0] - expected).abs().max() > 1e-3


def test_narrow_norm_is_the_wide_one_on_masked_input() -> None:
    norm = perturb(PrunedViTLayerNorm(config_of("narrow"))).double()
    x = 3 + 2 * torch.randn(4, 5, 20, dtype=torch.float64)
    wide = nn.functional.layer_norm(nn.functional.pad(x, (0, 8)), (28,), eps=norm.eps)[..., :20]
    assert_close(norm(x), wide * norm.weight + norm.bias, 1e-13)
    ordinary = nn.functional.layer_norm(x, (20,), norm.weight, norm.bias, norm.eps)
    assert (norm(x) - ordinary).abs().max() > 0.1
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), norm.double()(x.bfloat16().double()), 0.02)  # 8 bits of mantissa, three roundings


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    path, x = PrunedViTDropPath(0.25).train(), torch.ones(4000, 3, 2)
    y = path(x)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert bool((y == y[:, :1, :1]).all())  # whole examples
    assert abs(float(y.mean()) - 1) < 5 * (1 / 3 / 4000) ** 0.5  # variance p / (1 - p) = 1/3; five standard errors
    assert path.eval()(x) is x
    model = build("plain", drop_path_rate=[0.0, 0.5])
    assert [layer.drop_path.rate for layer in model.pruned_vit.layers] == [0.0, 0.5]


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_image_sizes(variant: str) -> None:
    model = build(variant)
    height, width = model.config.image_hw
    other = images(model, size=(height + 16, width + 32))
    with torch.no_grad():
        logits = model(other, interpolate_pos_encoding=True).logits
        assert logits.shape == (2, 7) and bool(logits.isfinite().all())
        if variant == "registers":
            assert torch.equal(model(other).logits, logits)
            with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
                model(other, interpolate_pos_encoding=False)
        else:
            with pytest.raises(ValueError, match=f"{height + 16} x {width + 32} pixels.*{height} x {width}"):
                model(other)
        same = images(model)
        assert torch.equal(model(same, interpolate_pos_encoding=True).logits, model(same).logits)
    embeddings = model.pruned_vit.embeddings
    first_patch = embeddings.num_positioned_tokens
    with torch.no_grad():
        embeddings.position_embeddings[:, first_patch:] = torch.arange(20.0)
        wider = embeddings._positions((7, 3))
    assert wider.shape == (1, first_patch + 21, 20)
    torch.testing.assert_close(wider[:, :first_patch], embeddings.position_embeddings[:, :first_patch])
    torch.testing.assert_close(wider[0, first_patch:], torch.arange(20.0).expand(21, 20))  # a constant stays constant
    rows, columns = embeddings.grid
    with torch.no_grad():  # what depends on the row alone goes on doing so
        by_row = torch.arange(float(rows)).repeat_interleave(columns)
        embeddings.position_embeddings[:, first_patch:] = by_row[:, None]
        taller = embeddings._positions((7, 3))[0, first_patch:, 0].unflatten(0, (7, 3))
    torch.testing.assert_close(taller, taller[:, :1].expand(7, 3))
    assert bool((taller[1:, 0] > taller[:-1, 0]).all())


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        ("single_label_classification", 7, torch.tensor([0, 6])),
        ("multi_label_classification", 7, torch.eye(7)[:2]),
        ("regression", 1, torch.tensor([[0.5], [-2.0]])),
    ],
)
def test_losses_and_gradients_for_every_problem_type(problem: str, classes: int, labels: Tensor) -> None:
    losses: dict[str, Callable] = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": lambda logits, labels: nn.functional.mse_loss(logits.squeeze(), labels.squeeze()),
    }
    for variant in VARIANTS:
        model = build(variant, problem_type=problem, num_labels=classes).train()
        output = model(images(model), labels=labels)
        torch.testing.assert_close(output.loss, losses[problem](output.logits, labels))
        output.loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
        # a bias of the keys adds the same to all logits of a query, which the softmax does not see
        assert [name for name in without if "k_proj.bias" not in name] == []
    assert build("plain")(images(build("plain"))).loss is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(variant: str, reentrant: bool) -> None:
    gradients = []
    for on in (False, True):
        model = build(variant, drop_path_rate=0.3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
        assert model.supports_gradient_checkpointing
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(5)
        model(images(model), labels=torch.tensor([1, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # recomputed in the same order; the masks of dropout are drawn again from the same state
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# -- backbone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbone_contract(variant: str) -> None:
    model = build(variant, PrunedViTBackbone, out_features=["stem", "stage2"])
    pixels = images(model)
    grid = tuple(image // patch for image, patch in zip(model.config.image_hw, model.config.patch_hw, strict=True))
    assert model.stage_names == ["stem", "stage1", "stage2"] and model.channels == [20, 20]
    assert model.out_features == ["stem", "stage2"] and model.out_indices == [0, 2]
    output = model(pixels)
    assert [tuple(m.shape) for m in output.feature_maps] == [(2, 20, *grid)] * 2
    assert output.hidden_states is None and output.attentions is None
    full = model(pixels, output_hidden_states=True)
    assert len(full.hidden_states) == 3
    first_patch = model.pruned_vit.embeddings.num_tokens
    for got, state in zip(output.feature_maps, (full.hidden_states[0], full.hidden_states[2]), strict=True):
        patches = model.pruned_vit.layernorm(state)[:, first_patch:]
        assert torch.equal(got[:, :, 1, 0], patches[:, grid[1]])  # row by row
    model.config._attn_implementation = "eager"
    assert len(model(pixels, output_attentions=True).attentions) == 2

    flat = build(variant, PrunedViTBackbone, reshape_hidden_states=False, apply_layernorm=False)
    assert flat.out_features == ["stage2"]
    output = flat(pixels, output_hidden_states=True)
    assert torch.equal(output.feature_maps[0], output.hidden_states[-1])
    flat.out_features = ["stage1"]
    assert torch.equal(flat(pixels).feature_maps[0], output.hidden_states[1])

    height, width = model.config.image_hw
    (bigger, _) = model(images(model, size=(height + 16, width + 16)), interpolate_pos_encoding=True).feature_maps
    assert bigger.shape[2:] == ((height + 16) // model.config.patch_hw[0], (width + 16) // model.config.patch_hw[1])


def test_backbone_serves_a_detector() -> None:
    """AutoBackbone.from_config is how transformers' detectors take one."""
    backbone = config_of("plain", out_indices=[1, 2])
    assert type(AutoBackbone.from_config(backbone)) is PrunedViTBackbone
    config = transformers.UperNetConfig(
        backbone_config=config_of("plain", num_hidden_layers=4, num_attention_heads=2, qk_dims=4, v_dims=4,
                                  intermediate_sizes=8, attention_scales=0.5, out_indices=[1, 2, 3, 4]),
        hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8, num_labels=3, use_auxiliary_head=False,
    )  # fmt: skip
    segmenter = transformers.UperNetForSemanticSegmentation(config).eval()
    assert type(segmenter.backbone) is PrunedViTBackbone
    assert segmenter(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3, 32, 32)


# -- saving, loading, exporting -------------------------------------------------------------------------------------

AUTO = {
    PrunedViTModel: AutoModel,
    PrunedViTForImageClassification: AutoModelForImageClassification,
    PrunedViTBackbone: PrunedViTBackbone,  # AutoBackbone.from_pretrained takes no local folder
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_is_the_same(variant: str, kind: type, tmp_path: Path) -> None:
    model = build(variant, kind)
    model.save_pretrained(tmp_path)
    again, report = AUTO[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is kind and not any(
        report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    pixels = images(model)
    with torch.no_grad():
        assert torch.equal(first(again(pixels)), first(model(pixels)))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_classifier_backbone_and_base_share_checkpoints(tmp_path: Path) -> None:
    model = build("registers")
    model.save_pretrained(tmp_path)
    pixels = images(model)
    state = model.pruned_vit(pixels).last_hidden_state
    assert torch.equal(PrunedViTModel.from_pretrained(tmp_path)(pixels).last_hidden_state, state)
    backbone = PrunedViTBackbone.from_pretrained(tmp_path, reshape_hidden_states=False)
    assert torch.equal(backbone(pixels).feature_maps[0], state)
    model.pruned_vit.save_pretrained(tmp_path / "base")
    other = PrunedViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert torch.equal(other.pruned_vit(pixels).last_hidden_state, state) and other.classifier.out_features == 3
    wide = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=11, ignore_mismatched_sizes=True)
    assert wide(pixels).logits.shape == (2, 11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    height, width = model.config.image_hw
    pixels = images(model, size=(height + 16, width + 16))
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            half.config._attn_implementation = implementation
            logits = half(pixels, interpolate_pos_encoding=True).logits  # float32 images are cast
            assert logits.dtype == torch.bfloat16
            # eight bits of mantissa through two layers
            assert_close(logits.float(), model(pixels, interpolate_pos_encoding=True).logits, 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            assert bool(model(images(model)).logits.isfinite().all())
    half.train()(images(half), labels=torch.tensor([0, 1])).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)


def test_code_travels_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People without hf_compress load it with trust_remote_code; here its import is an error."""
    for kind, auto in (
        (PrunedViTConfig, "AutoConfig"),
        (PrunedViTModel, "AutoModel"),
        (PrunedViTForImageClassification, "AutoModelForImageClassification"),
    ):
        monkeypatch.setattr(kind, "_auto_class", None)  # so that it is put back afterwards
        kind.register_for_auto_class(auto)
    for kind in (PrunedViTModel, PrunedViTForImageClassification):
        folder = tmp_path / kind.__name__
        model = build("registers", kind)
        model.save_pretrained(folder)
        torch.save((images(model), first(model(images(model))).detach()), folder / "expected.pt")
        assert {p.name for p in folder.glob("*.py")} == {"configuration_pruned_vit.py", "modeling_pruned_vit.py"}
    script = tmp_path / "load.py"
    script.write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'hf_compress':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForImageClassification\n"
        "for auto, folder in ((AutoModel, 'PrunedViTModel'), "
        "(AutoModelForImageClassification, 'PrunedViTForImageClassification')):\n"
        "    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)\n"
        "    assert type(config).__module__.startswith('transformers_modules.'), type(config)\n"
        "    model = auto.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    assert type(model).__module__.startswith('transformers_modules.'), type(model)\n"
        "    pixels, expected = torch.load(folder + '/expected.pt')\n"
        "    assert torch.equal(model(pixels)[0], expected)\n"
        "    model.save_pretrained(folder + '/again')\n"
        "    assert type(auto.from_pretrained(folder + '/again', trust_remote_code=True)(pixels)) is not None\n"
        "assert not any(name.partition('.')[0] == 'hf_compress' for name in sys.modules)\n"
        "print('loaded')\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("loaded"), done.stderr[-3000:]


@pytest.mark.parametrize("variant", ["registers", "narrow"])
def test_torch_export_and_compile(variant: str) -> None:
    model = build(variant)
    pixels = images(model)
    with torch.no_grad():
        expected = model(pixels).logits
        free = {"pixel_values": {0: torch.export.Dim("batch")}}
        program = torch.export.export(model, (), {"pixel_values": pixels}, dynamic_shapes=free, strict=False).module()
        torch.testing.assert_close(program(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)  # float32
        more = images(model, batch=5)
        torch.testing.assert_close(program(pixel_values=more).logits, model(more).logits, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    for variant in ("registers", "narrow"):
        model = build(variant)
        path = export_onnx(model, tmp_path / f"{variant}.onnx")
        assert onnx_difference(model, path, images(model, batch=5)) < 1e-4


# -- shrinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_axes_are_found_and_cut_exactly(variant: str, seed: int, tmp_path: Path) -> None:
    model = build(variant).double()
    pixels = images(model)
    graph = find_axes(model)
    assert not graph.without_rule and not graph.sizes_tied
    exact = [axis for axis in graph if axis.is_exact]
    assert len(exact) == 8  # heads, qk dimensions, v dimensions and MLP of two layers
    keep = random_keep(graph, seed)
    plain = assert_cut_equals_masked(model, graph, keep, pixels)
    small = shrink(copy.deepcopy(model), Plan({name: mask.nonzero().flatten() for name, mask in keep.items()}, graph))
    with torch.no_grad():
        expected = plain(pixels).logits
        assert_close(small(pixels).logits, expected)
        small.save_pretrained(tmp_path / "recorded")
        recorded = in_own_memory(
            AutoModelForImageClassification.from_pretrained(tmp_path / "recorded", dtype=torch.float64)
        )
        assert torch.equal(recorded(pixels).logits, small(pixels).logits)
        # the widths go from the record into the configuration
        free = to_pruned_vit(recorded)
        assert getattr(free.config, "quantization_config", None) is None
        assert free.config.qk_dims != model.config.qk_dims and free.config.attention_scales == [0.25, 0.5]
        assert_close(free(pixels).logits, expected)
        free.save_pretrained(tmp_path / "free")
        again = in_own_memory(AutoModelForImageClassification.from_pretrained(tmp_path / "free", dtype=torch.float64))
        assert torch.equal(again(pixels).logits, free(pixels).logits)
    again.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.parametrize("variant", ["plain", "narrow", "registers"])
def test_cutting_the_residual_stream_is_masking_it(variant: str) -> None:
    model = build(variant).double()
    pixels = images(model)
    graph = find_axes(model)
    (residual,) = [axis for axis in graph if not axis.is_exact]
    mask = torch.ones(20, dtype=torch.bool)
    mask[[0, 3, 4, 11, 19]] = False
    small = shrink(copy.deepcopy(model), Plan({residual.name: mask.nonzero().flatten()}, graph))
    masked = zero_at_producers(copy.deepcopy(model), graph, {residual.name: mask})
    with torch.no_grad():
        expected = masked(pixels).logits
        assert_close(small(pixels).logits, expected, 1e-12)
        free = to_pruned_vit(small)
        assert free.config.hidden_size == 15 and free.config.norm_width == (28 if variant == "narrow" else 20)
        assert_close(free(pixels).logits, expected, 1e-12)


# -- conversion -----------------------------------------------------------------------------------------------------

_TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8, "num_labels": 7,
}  # fmt: skip
_DINO = {**{k: v for k, v in _TINY.items() if k != "intermediate_size"}, "mlp_ratio": 2, "layerscale_value": 0.5}

SOURCES: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_TINY)),
    "vit_without_bias": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(qkv_bias=False, **_TINY)),
    "vit_oblong": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**_TINY, "image_size": [16, 32], "patch_size": [8, 4], "hidden_act": "relu"})
    ),
    "vit_without_labels": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**_TINY, "num_labels": 0})
    ),
    "vit_base": lambda: transformers.ViTModel(transformers.ViTConfig(pooler_output_size=9, **_TINY)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**_TINY)),
    "deit_distilled": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**_TINY)),
    "deit_base": lambda: transformers.DeiTModel(transformers.DeiTConfig(**_TINY)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_DINO)),
    "dinov2_swiglu": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(use_swiglu_ffn=True, use_mask_token=False, **_DINO)
    ),
    "dinov2_base": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**_DINO)),
    "dinov2_backbone": lambda: transformers.Dinov2Backbone(
        transformers.Dinov2Config(out_features=["stage1", "stage2"], **_DINO)
    ),
    "registers": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(drop_path_rate=0.1, **_DINO)
    ),
    "registers_none": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(num_register_tokens=0, **_DINO)
    ),
    "registers_backbone": lambda: transformers.Dinov2WithRegistersBackbone(
        transformers.Dinov2WithRegistersConfig(apply_layernorm=False, reshape_hidden_states=False, **_DINO)
    ),
}


def source(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return perturb(SOURCES[name]()).double()


def source_images(model: PreTrainedModel, size: tuple[int, int] | None = None) -> Tensor:
    edge = model.config.image_size
    return torch.randn(2, 3, *(size or ((edge, edge) if isinstance(edge, int) else edge)), dtype=torch.float64)


def assert_same_outputs(got: object, expected: object, tolerance: float) -> None:
    assert set(got) == set(expected) - {"cls_logits", "distillation_logits"}  # DeiT's teacher output has these, too
    for key in got:
        pairs = zip(got[key], expected[key], strict=True)
        for a, b in pairs if isinstance(expected[key], tuple) else [(got[key], expected[key])]:
            assert_close(a, b, tolerance)


@pytest.mark.parametrize("name", SOURCES)
def test_conversion_changes_no_output(name: str, tmp_path: Path) -> None:
    model = source(name)
    pixels = source_images(model)
    graph = find_axes(model)
    layers = {"0": 0.2, "1": 0.5}  # another share in each layer
    sizes = {}
    for axis in graph:
        share = next((s for layer, s in layers.items() if f".{layer}." in f".{axis.name}"), 0.0)
        if axis.is_exact and share:
            sizes[axis.name] = torch.arange(axis.size - max(1, int(share * axis.size)))
    for tied in graph.sizes_tied:  # transformers' attention knows one head dimension
        for other in tied[1:]:
            sizes[other] = sizes[tied[0]]
    for cut in (False, True):
        if cut:
            shrink(model, Plan(sizes, graph))
        model.requires_grad_(True)
        frozen = next(n for n, _ in model.named_parameters() if "fc2.bias" in n or "down_proj.bias" in n)
        model.get_parameter(frozen).requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        ours = to_pruned_vit(model)
        with torch.no_grad():
            expected, got = model(pixels, output_hidden_states=True), ours(pixels, output_hidden_states=True)
        assert_same_outputs(got, expected, 1e-12)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not ours.training and ours.dtype == torch.float64
        assert sum(not p.requires_grad for p in ours.parameters()) == 1
        assert getattr(ours.config, "id2label", None) == model.config.id2label
        assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in model.parameters()}
    config = ours.config
    assert config.qk_dims[0] > config.qk_dims[1] and config.intermediate_sizes[0] > config.intermediate_sizes[1]
    assert config.attention_scales == [8**-0.5] * 2  # the dense model's
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        again = in_own_memory(type(ours).from_pretrained(tmp_path, dtype=torch.float64))
        assert_same_outputs(again(pixels, output_hidden_states=True), got, 0.0)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers", "dinov2_backbone"])
def test_conversion_keeps_interpolation(name: str) -> None:
    model = source(name)
    pixels = source_images(model, (48, 24))
    arguments = {"interpolate_pos_encoding": True} if name in ("vit", "deit") else {}
    with torch.no_grad():
        expected, got = model(pixels, **arguments), to_pruned_vit(model)(pixels, **arguments)
    # DINOv2 interpolates in float32, whatever its dtype
    assert_same_outputs(got, expected, 1e-12 if arguments else 1e-5)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers"])
def test_residual_stream_with_the_dense_norm(name: str) -> None:
    model = source(name)
    pixels = source_images(model)
    graph = find_axes(model)
    residual = next(axis for axis in graph if "statistics" in axis.reasons)
    mask = torch.ones(24, dtype=torch.bool)
    mask[[1, 2, 13, 22]] = False
    masked = zero_at_producers(copy.deepcopy(model), graph, {residual.name: mask})
    small = shrink(model, Plan({residual.name: mask.nonzero().flatten()}, graph))
    ordinary, exact = to_pruned_vit(small), to_pruned_vit(small, norm_width=24)
    assert ordinary.config.norm_width is None and exact.config.norm_width == 24 and exact.config.hidden_size == 20
    with torch.no_grad():
        assert_close(ordinary(pixels).logits, small(pixels).logits, 1e-12)
        assert_close(exact(pixels).logits, masked(pixels).logits, 1e-12)
        assert (ordinary(pixels).logits - exact(pixels).logits).abs().max() > 1e-3


def test_conversion_after_prune_with_a_budget() -> None:
    model = source("vit")
    prune(model, macs=0.6)
    pixels = source_images(model)
    with torch.no_grad():
        assert_close(to_pruned_vit(model)(pixels).logits, model(pixels).logits, 1e-12)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_model_without_one_of_its_layers(name: str) -> None:
    model = source(name)
    layers = model.vit.layers if name == "vit" else model.dinov2.encoder.layer
    del layers[1]
    pixels = source_images(model)
    ours = to_pruned_vit(model)
    assert ours.config.num_hidden_layers == 1 and ours.config.stage_names == ["stem", "stage1"]
    with torch.no_grad():
        assert_close(ours(pixels).logits, model(pixels).logits, 1e-12)
    again = build("registers", drop_path_rate=[0.1, 0.2])
    del again.pruned_vit.layers[0]
    less = to_pruned_vit(again)
    assert less.config.drop_path_rate == [0.2] and less.config.num_attention_heads == [3]
    with torch.no_grad():
        assert torch.equal(less(images(again)).logits, again(images(again)).logits)


def test_a_bias_in_one_layer_only() -> None:
    model = source("vit_without_bias")
    layer = model.vit.layers[1].attention
    layer.v_proj.bias = nn.Parameter(torch.randn(24, dtype=torch.float64))
    pixels = source_images(model)
    ours = to_pruned_vit(model)
    with torch.no_grad():
        assert_close(ours(pixels).logits, model(pixels).logits, 1e-12)


def test_what_cannot_be_converted_is_refused() -> None:
    beit = MORE_FAMILIES["beit"]()[0]
    with pytest.raises(ModelError, match=r"Beit.*ViTForImageClassification"):
        to_pruned_vit(beit)
    with pytest.raises(ModelError, match="ViTForMaskedImageModeling"):
        to_pruned_vit(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**_TINY)))
    model = source("vit")
    model.vit.layers[0].mlp.register_parameter("score", nn.Parameter(torch.ones(40)))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.score"):
        to_pruned_vit(model)
    model = source("vit")
    model.vit.layers[0].attention.num_attention_heads = 5
    with pytest.raises(ModelError, match="24 outputs for 5 heads"):
        to_pruned_vit(model)
    model = source("vit")
    model.vit.layers[0] = nn.Identity()
    with pytest.raises(ModelError, match="attention"):
        to_pruned_vit(model)
    model = source("vit")
    model.vit.layers[0].attention.k_proj = nn.Linear(24, 21).double()
    with pytest.raises(ModelError, match=r"k_proj"):
        to_pruned_vit(model)
    with pytest.raises(ModelError, match="norm_width"):
        to_pruned_vit(source("vit"), norm_width=3)


def test_converted_model_in_the_mode_of_its_source() -> None:
    assert to_pruned_vit(source("vit").train()).training
    eager = source("registers")
    eager.set_attn_implementation("eager")
    ours = to_pruned_vit(eager)
    assert ours.config._attn_implementation == "eager"
    with torch.no_grad():
        assert len(ours(source_images(eager), output_attentions=True).attentions) == 2
