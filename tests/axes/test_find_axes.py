"""What ``find_axes`` promises: masked dense models equal cut models, counts equal independent counts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.utils.benchmark
from families import FAMILIES, MORE_FAMILIES, perturb
from masking import assert_close, assert_cut_equals_masked, cut, logits, random_keep, zero_at_producers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_compress.axes import find_axes
from hf_compress.errors import ModelError, PlanError

ALL = {**FAMILIES, **MORE_FAMILIES}
WITHOUT_EXACT_AXES = {"convnextv2"}  # its response normalisation takes a mean over the units of the MLP


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ALL)
def test_cut_equals_masked(family: str, seed: int) -> None:
    model, x = ALL[family]()
    model, x = model.double(), x.double()
    graph = find_axes(model, x[:1])
    keep = random_keep(graph, seed)
    assert bool(keep) != (family in WITHOUT_EXACT_AXES)
    if not keep:
        return
    # 1e-9 of the largest logit: float64 rounding through at most a few dozen layers stays below 1e-12
    assert_cut_equals_masked(model, graph, keep, x)


@pytest.mark.parametrize("family", ALL)
def test_inexact_axes_can_be_cut_as_well(family: str) -> None:
    model, x = ALL[family]()
    graph = find_axes(model, x)
    keep = random_keep(graph, seed=0, inexact=True)
    cut(model, graph, keep)
    with torch.no_grad():
        assert logits(model(x)).isfinite().all()
    cost = graph.cost({name: int(mask.sum()) for name, mask in keep.items()})
    assert cost.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_independent_counts(family: str) -> None:
    model, x = FAMILIES[family]()
    if hasattr(model, "set_attn_implementation") and family in ("vit", "swin"):
        model.set_attn_implementation("eager")  # the FLOP counter does not know the CPU kernel of fused attention
    graph = find_axes(model, x[:1])
    assert graph.params == sum(p.numel() for p in model.parameters())
    if family == "timm_vit":
        return  # fused attention cannot be switched off by the wrapper; its parameters are checked above
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x[:1])
    assert graph.macs == counter.get_total_flops() // 2


def summary(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Axis name -> size and fate."""
    return {a.name: f"{a.size} {'exact' if a.is_exact else '+'.join(a.reasons)}" for a in find_axes(model, x)}


def test_axes_of_a_vit() -> None:
    found = summary(*FAMILIES["vit"]())
    expected = {"vit.embeddings.cls_token": "24 statistics"}  # the residual width, which every LayerNorm averages over
    for i in range(2):
        layer = f"vit.layers.{i}"
        expected |= {
            f"{layer}.attention.q_proj:heads": "3 exact",
            f"{layer}.attention.q_proj:head_dim": "8 exact",
            f"{layer}.attention.v_proj:value_dim": "8 exact",
            f"{layer}.mlp.fc1": "40 exact",
        }
    assert found == expected


@pytest.mark.parametrize("family", ["vit", "swin", "dinov2", "clip", "hiera"])
def test_names_do_not_depend_on_the_attention_implementation(family: str) -> None:
    model, x = ALL[family]()
    model.set_attn_implementation("eager")
    assert summary(model, x) == summary(*ALL[family]())


def test_axes_of_a_timm_vit() -> None:
    # fused attention computes 1 / sqrt(head_dim) at run time; the projection of the query makes up for the change
    found = summary(*FAMILIES["timm_vit"]())
    assert found.pop("timm_model.cls_token") == "24 statistics"
    assert found == {
        f"timm_model.blocks.{i}.{name}": fate
        for i in range(2)
        for name, fate in {"attn.qkv:heads": "3 exact", "attn.qkv:head_dim": "8 exact", "mlp.fc1": "96 exact"}.items()
    }


def test_axes_of_a_resnet() -> None:
    found = summary(*FAMILIES["resnet_bottleneck"]())
    assert all(fate.endswith("exact") for fate in found.values())
    residual = [name for name in found if name.endswith("shortcut.convolution")]
    inside = [name for name in found if ".layers." in name and ".layer." in name]
    # one axis for each residual stream, two for each bottleneck block, one for the stem
    assert len(found) == 9 and len(inside) + len(residual) == 8


def test_axes_of_swin_and_convnext() -> None:
    swin = summary(*FAMILIES["swin"]())
    assert {name: fate for name, fate in swin.items() if not fate.endswith("exact")} == {
        "swin.embeddings.patch_embeddings.projection": "12 statistics",
        "swin.encoder.layers.0.downsample.reduction": "24 statistics",
    }
    # removing a head also removes its column of the relative position bias table
    model, x = FAMILIES["swin"]()
    heads = find_axes(model, x)["swin.encoder.layers.0.blocks.0.attention.q_proj:heads"]
    assert any("relative_position_bias_table" in member.parameter for member in heads.members)
    convnext = summary(*FAMILIES["convnext"]())
    assert sum(fate.endswith("exact") for fate in convnext.values()) == 5  # the MLP of each block
    assert sum(fate.endswith("statistics") for fate in convnext.values()) == 4  # the width of each stage


def test_sizes_that_share_an_attribute_are_tied() -> None:
    model, x = FAMILIES["vit"]()
    tied = find_axes(model, x).sizes_tied
    prefix = "vit.layers.0.attention"
    assert (f"{prefix}.q_proj:head_dim", f"{prefix}.v_proj:value_dim") in tied


class Tampering(nn.Module):
    """Leaves traces of its forward pass wherever it can, and may fail at the end."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}
        self.log: list[str] = []
        self.num_heads, self.fails, self.last = 6, fails, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.count += torch.rand(1)
        self.cache["bias"] = self.first.bias * 2
        self.log.append("called")
        self.last, self.seen_width = x, x.shape[-1]
        if self.fails:
            raise RuntimeError("as asked")
        return self.second(x.view(-1, self.num_heads))


def state_of(model: nn.Module) -> list[object]:
    attributes = [
        (name, type(value), value)
        for module in model.modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, str, type(None))) or name in ("log", "cache")
    ]
    return [repr(attributes), [t.tolist() for t in model.state_dict().values()], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_also_after_a_failure(fails: bool) -> None:
    model = Tampering(fails).train()
    model.cache["bias"] = torch.ones(6)
    before, hooks = state_of(model), len(torch.nn.modules.module._global_forward_hooks)
    cached = model.cache["bias"]
    if fails:
        with pytest.raises(ModelError, match="as asked"):
            find_axes(model, torch.randn(1, 4, generator=torch.Generator()))
    else:
        find_axes(model, torch.randn(1, 4, generator=torch.Generator()))
    assert state_of(model) == before
    assert model.cache["bias"] is cached and model.last is None and not hasattr(model, "seen_width")
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks and model.training


def test_model_of_transformers_is_untouched() -> None:
    model, x = FAMILIES["swin"]()
    model.train()
    before = state_of(model)
    find_axes(model, x)
    assert state_of(model) == before and all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_the_same_axes(dtype: torch.dtype) -> None:
    model, x = FAMILIES["vit"]()
    assert summary(model.to(dtype), x.to(dtype)) == summary(*FAMILIES["vit"]())


@pytest.mark.parametrize("family", ["resnet_bottleneck", "vit", "plain_dense"])
def test_meta_device_finds_the_same_axes(family: str) -> None:
    model, x = FAMILIES[family]()
    assert summary(model.to("meta"), x.to("meta")) == summary(*FAMILIES[family]())


def test_compiled_models_are_watched_as_they_were_written() -> None:
    model, x = FAMILIES["plain_cnn"]()
    expected = summary(model, x)
    model.compile(backend="eager")
    assert summary(model, x) == expected
    wrapped = torch.compile(FAMILIES["plain_cnn"]()[0], backend="eager")
    assert summary(wrapped, x) == {f"_orig_mod.{name}": fate for name, fate in expected.items()}


def test_hooks_of_users_run_and_stay() -> None:
    model, x = FAMILIES["plain_cnn"]()
    called = []
    handle = model.features[1].register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    assert summary(model, x) == summary(FAMILIES["plain_cnn"]()[0], x) and called
    handle.remove()


def test_inputs_as_tensor_tuple_dict_and_batch_are_the_same() -> None:
    model, x = FAMILIES["vit"]()
    graphs = [find_axes(model, inputs) for inputs in (x[:1], x, (x,), {"pixel_values": x}, None)]
    assert len({str(graph) for graph in graphs}) == 1  # sizes, fates, parameters and MACs
    with pytest.raises(ModelError, match=r"first dimensions \[2, 3\]"):
        find_axes(model, {"pixel_values": x, "bool_masked_pos": torch.zeros(3, 16)})


def test_shared_modules_are_counted_once_and_cut_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again = self.block
            self.tied = nn.Linear(8, 8)
            self.tied.weight = self.block.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in (self.block, self.again, self.tied):
                x = x + torch.relu(layer(x))
            return self.head(x)

    model, x = perturb(Shared()).double(), torch.randn(2, 4, dtype=torch.float64)
    graph = find_axes(model, x)
    assert [axis.size for axis in graph] == [8]
    assert graph.params == sum(p.numel() for p in model.parameters())
    small = assert_cut_equals_masked(model, graph, random_keep(graph, 0), x)
    assert small.tied.weight is small.block.weight is small.again.weight


def test_axes_with_a_buffer_as_producer_mask_the_buffer() -> None:
    class Frozen(nn.Module):
        """As DETR's FrozenBatchNorm2d: a scale and a shift that are buffers."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("shift", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x) + self.shift))

    model = Frozen().double()
    (axis,) = find_axes(model, torch.randn(1, 4, dtype=torch.float64))
    assert {member.parameter for member in axis.producers} == {"first.weight", "first.bias", "shift"}


def test_cost_is_cheap() -> None:
    model, x = ALL["mobilevit"]()
    graph = find_axes(model, x)
    sizes = {axis.name: max(1, axis.size // 2) for axis in graph}
    timer = torch.utils.benchmark.Timer("graph.cost(sizes)", globals={"graph": graph, "sizes": sizes})
    assert timer.timeit(50).mean < 1e-3  # measured: about 0.05 ms for these 62 axes


def test_operator_without_a_rule_freezes_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.linalg.matrix_exp(self.first(x).unsqueeze(-1) @ torch.ones(1, 6))[..., 0])

    model = nn.Sequential(nn.Identity(), Odd(), nn.Identity())
    with pytest.warns(UserWarning) as warned:
        graph = find_axes(model, torch.randn(1, 4))
    assert [str(w.message) for w in warned] == [
        "no rule for: linalg_matrix_exp (in 1); the axes they touch stay whole."
    ]
    assert len(graph) == 0 and graph.without_rule == {"linalg_matrix_exp": "1"}


def test_code_that_cannot_be_watched_freezes_what_it_may_have_read() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(_twice_sigmoid)

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.later = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.later(self.second(scripted(self.first(x))))

    with pytest.warns(UserWarning, match=r"no rule for: code that cannot be watched \(compiled or scripted\)"):
        graph = find_axes(Scripted(), torch.randn(1, 4))
    assert "first" not in graph and "later.0" in graph


def _twice_sigmoid(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(x)


def test_sigmoid_between_layers_is_not_called_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (axis,) = find_axes(model, torch.randn(1, 4))
    assert not axis.is_exact and axis.reasons == ("offset",)


def test_unusable_inputs_and_unknown_axes_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ModelError, match="example_inputs"):
        find_axes(model)
    with pytest.raises(ModelError, match="failed on the example inputs"):
        find_axes(model, torch.randn(1, 5))
    with pytest.raises(PlanError, match="no axis is called 'nope'"):
        find_axes(model, torch.randn(1, 4))["nope"]


class Heads(nn.Module):
    """Two heads for two kinds of image, a third for training only, and a parameter for nothing."""

    def __init__(self, auxiliary: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.heads = nn.ModuleDict({"bright": self._head(), "dark": self._head()})
        self.auxiliary = auxiliary
        self.mask_token = nn.Parameter(torch.randn(1, 8))

    @staticmethod
    def _head() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = torch.relu(self.stem(x))
        result = self.heads["bright" if x.mean() > 0 else "dark"](features).mean((2, 3))
        return (result, self.auxiliary(features.mean((2, 3)))) if self.training else result


def test_heads_that_did_not_run_follow_those_that_did() -> None:
    model = perturb(Heads(nn.Linear(8, 2))).double()
    bright = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    graph = find_axes(model, bright)
    keep = random_keep(graph, seed=0)
    assert sorted(keep) == ["heads.bright.0", "stem"]
    assert {m.parameter for m in graph["stem"].members} >= {"heads.dark.0.weight", "auxiliary.weight"}
    assert {(m.parameter, m.dim) for m in graph["heads.bright.0"].producers} >= {("heads.dark.0.weight", 0)}
    assert ("heads.dark.3.weight", 1) not in {(m.parameter, m.dim) for m in graph["heads.bright.0"].producers}
    assert {m.parameter for m in graph["heads.bright.0"].scales} == {"heads.bright.1.weight", "heads.dark.1.weight"}
    assert graph.fixed["parameter that the forward pass does not read"] == 1  # mask_token
    small = assert_cut_equals_masked(model, graph, keep, bright)
    with torch.no_grad():
        masked = zero_at_producers(copy.deepcopy(model), graph, keep)
        assert_close(small(-bright), masked(-bright))
    assert len(small.train()(bright)) == 2


def test_a_training_pass_that_fails_keeps_what_it_would_have_read() -> None:
    class NeedsLabels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("labels are missing")

    model = Heads(NeedsLabels())
    graph = find_axes(model, torch.rand(1, 3, 8, 8))
    assert sorted(axis.name for axis in graph) == ["heads.bright.0", "stem"]
    assert not any(m.parameter.startswith("auxiliary") for axis in graph for m in axis.members)
