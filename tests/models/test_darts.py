"""DARTS: the published sizes, the genotype rule, and a supernet that computes what a plain one does."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import perturb
from huggingface_hub.errors import StrictDataclassError
from masking import assert_cut_equals_masked, random_keep
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compress import DropPathScheduleCallback, export_onnx, find_axes, prune
from hf_compress.errors import MethodError, ModelError
from hf_compress.export.onnx import onnx_difference
from hf_compress.models.darts import (
    DartsConfig,
    DartsForImageClassification,
    DartsSupernetConfig,
    DartsSupernetForImageClassification,
    all_cells,
    parameter_free_share,
    random_genotype,
)
from hf_compress.models.darts.depthwise_darts import DepthwiseFunction, depthwise, join_phases, split_phases
from hf_compress.models.darts.genotype_darts import DARTS_V2, OPERATORS, check_genotype, choose, edges_of
from hf_compress.models.darts.modeling_darts import DartsCell
from hf_compress.models.darts.operations_darts import DartsDropPath
from hf_compress.models.darts.supernet_darts import DartsMixedConvolutions, DartsMixedNodes

GENOTYPE = {
    "normal": [[["sep_conv_3x3", 0], ["max_pool_3x3", 1]], [["skip_connect", 0], ["dil_conv_5x5", 2]]],
    "reduce": [[["avg_pool_3x3", 0], ["skip_connect", 1]], [["sep_conv_5x5", 2], ["dil_conv_3x3", 1]]],
}
SMALL = {
    "cifar": {"num_cells": 4, "width": 8, "image_size": 16},
    "imagenet": {"num_cells": 4, "width": 8, "image_size": 64, "stem": "imagenet"},
    "auxiliary": {"num_cells": 3, "width": 6, "image_size": 16, "auxiliary_weight": 0.4, "drop_path_rate": 0.2},
    "odd": {"num_cells": 3, "width": 5, "image_size": 14, "num_channels": 1},
}
SEARCHED = {
    "three nodes": {"num_cells": 3, "width": 4, "image_size": 14, "nodes": 3},
    "imagenet": {"num_cells": 3, "width": 4, "image_size": 64, "nodes": 2, "stem": "imagenet"},
    "without reduction": {"num_cells": 2, "width": 3, "image_size": 8, "nodes": 2, "reduction_cells": []},
    "few operators": {"num_cells": 3, "width": 4, "image_size": 8, "nodes": 2,
                      "operators": ["skip_connect", "dil_conv_3x3", "none"]},
}  # fmt: skip


def small(name: str) -> DartsForImageClassification:
    torch.manual_seed(0)
    return perturb(DartsForImageClassification(DartsConfig(genotype=GENOTYPE, num_labels=5, **SMALL[name])))


def supernet(name: str, dtype: torch.dtype = torch.float64) -> DartsSupernetForImageClassification:
    torch.manual_seed(0)
    config = DartsSupernetConfig(num_labels=5, initial_alpha=1.0, **SEARCHED[name])
    return DartsSupernetForImageClassification(config).to(dtype).train()


def images(model: nn.Module, batch: int = 4) -> Tensor:
    shape = batch, model.config.num_channels, model.config.image_size, model.config.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(model.dtype)


LABELS = torch.tensor([0, 4, 2, 1])


@pytest.fixture(scope="module")
def search_step():
    """The benchmark that holds the plain implementation."""
    path = Path(__file__).parents[2] / "benchmarks" / "search_step.py"
    spec = importlib.util.spec_from_file_location("search_step", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"num_labels": 10}, 3_349_342),  # Liu et al. 2019: 3.3 M
        ({"num_labels": 1000, "num_cells": 14, "width": 48, "stem": "imagenet", "image_size": 224}, 4_718_752),  # 4.7 M
    ],
)
def test_sizes_are_the_papers(settings: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model("darts", **settings))
        helped = DartsForImageClassification(DartsConfig(auxiliary_weight=0.4, **settings))
    assert model.num_parameters() == parameters
    head = helped.auxiliary_head
    channels = 4 * (144 if settings["num_labels"] == 10 else 192)
    norm = 2 * 768 if settings["num_labels"] == 10 else 0  # the ImageNet head has no second BatchNorm
    expected = channels * 128 + 2 * 128 + 128 * 768 * 4 + norm + 769 * settings["num_labels"]
    assert sum(p.numel() for p in head.parameters()) == helped.num_parameters() - parameters == expected


def test_imagenet_network_costs_less_than_the_paper_says() -> None:
    """Liu et al. 2019 print 574 M multiply-adds and do not say of what; convolutions and the linear layer have 530 M."""
    from hf_compress.measurement import count_macs

    config = DartsConfig(num_labels=1000, num_cells=14, width=48, stem="imagenet", image_size=224)
    with torch.device("meta"):
        model = DartsForImageClassification(config).eval()
        macs = count_macs(model, {"pixel_values": torch.empty(1, 3, 224, 224)})
    assert macs == 529_911_552


def test_search_network_is_the_papers() -> None:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(DartsSupernetConfig(num_labels=10))
    alphas = model.architecture_parameters()
    assert {kind: tuple(alpha.shape) for kind, alpha in alphas.items()} == {"normal": (14, 8), "reduce": (14, 8)}
    assert model.supernet.kinds == ["normal", "normal", "reduce", "normal", "normal", "reduce", "normal", "normal"]
    assert model.num_parameters() - 2 * 14 * 8 == 1_930_618
    assert len({id(alpha) for alpha in alphas.values()} & {id(p) for p in model.parameters()}) == 2


def test_initial_weights_are_torchs_defaults() -> None:
    torch.manual_seed(0)
    config = DartsSupernetConfig(num_cells=2, width=16, initial_alpha=1e-3, num_labels=3)
    model = DartsSupernetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, DartsMixedConvolutions):
            kernel = module.depthwise.shape[-1]
            for parameter, bound in ((module.depthwise, 1 / kernel), (module.pointwise, module.channels**-0.5)):
                assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound  # hundreds of uniform numbers
                assert abs(float(parameter.detach().std()) / (bound / 3**0.5) - 1) < 0.1
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < float(module.weight.detach().abs().max()) <= bound
    alphas = torch.cat([alpha.detach().flatten() for alpha in model.architecture_parameters().values()])
    assert 0.8e-3 < float(alphas.std()) < 1.2e-3  # 224 normal numbers


# -- genotypes ----------------------------------------------------------------------------------------------------


def test_rule_by_hand() -> None:
    """Two nodes; the best of "none" never counts, and of node 1's three edges the weakest goes."""
    operators = ["none", "skip_connect", "sep_conv_3x3"]
    weights = [
        [0.8, 0.05, 0.15],  # 0 -> 0
        [0.1, 0.5, 0.4],  # 1 -> 0
        [0.0, 0.3, 0.7],  # 0 -> 1
        [0.6, 0.3, 0.1],  # 1 -> 1
        [0.2, 0.4, 0.4],  # 2 -> 1, a tie: the earlier operator
    ]
    assert choose(weights, 2, operators) == [
        [["skip_connect", 1], ["sep_conv_3x3", 0]],
        [["sep_conv_3x3", 0], ["skip_connect", 2]],
    ]
    assert choose(weights, 2, operators, edges_per_node=1) == [[["skip_connect", 1]], [["sep_conv_3x3", 0]]]
    equal = [[0.2, 0.4, 0.4]] * 5  # the earlier edges
    assert [[source for _, source in node] for node in choose(equal, 2, operators)] == [[0, 1], [0, 1]]


def test_supernet_derives_the_published_cells() -> None:
    """Architecture parameters that favour DARTS's published genotype, in the published order, give it back."""
    model = DartsSupernetForImageClassification(DartsSupernetConfig(num_cells=3, width=2, num_labels=3))
    edges = edges_of(4)
    with torch.no_grad():
        for kind, alpha in model.architecture_parameters().items():
            alpha[:, OPERATORS.index("none")] = 9.0  # must not count
            for target, node in enumerate(DARTS_V2[kind]):
                for place, (operator, source) in enumerate(node):
                    alpha[edges.index((source, target)), OPERATORS.index(operator)] = 8.0 - place
    assert model.genotype() == DARTS_V2
    derived = model.derive(num_cells=20, width=36, num_labels=10)
    assert derived.config.genotype == DARTS_V2 and derived.num_parameters() == 3_349_342
    assert derived.config.reductions == [6, 13] and derived.training == model.training


@pytest.mark.parametrize("name", SEARCHED)
def test_derived_network_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = supernet(name, torch.float32)
    model.config.id2label[0] = "boot"
    derived = model.derive()
    for field in ("num_cells", "width", "stem", "image_size", "num_channels"):
        assert getattr(derived.config, field) == getattr(model.config, field)
    assert derived.config.reductions == model.config.reductions and derived.config.id2label[0] == "boot"
    x = images(derived)
    derived(x, labels=LABELS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in derived.parameters())
    derived.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is DartsForImageClassification and torch.equal(loaded(x).logits, derived(x).logits)


def test_small_space_is_enumerated_and_drawn_from() -> None:
    operators = ["none", "skip_connect", "sep_conv_3x3"]
    cells = list(all_cells(2, operators))
    # node 0: both inputs, 2^2 operators; node 1: 3 pairs of 3 nodes, 2^2 operators
    assert len(cells) == 4 * 12 == len({json.dumps(cell) for cell in cells})
    assert len(list(all_cells(2, operators, edges_per_node=1))) == 4 * 6
    check_genotype({"normal": cells[5], "reduce": cells[7]})
    drawn = [random_genotype(2, operators, seed=seed) for seed in range(40)]
    assert all(check_genotype(genotype) == genotype and genotype["normal"] in cells for genotype in drawn)
    assert random_genotype(seed=3) == random_genotype(seed=3) and len({json.dumps(g) for g in drawn}) > 30
    assert parameter_free_share(DARTS_V2) == 10 / 16


@pytest.mark.parametrize(
    ("genotype", "said"),
    [
        ("normal", "must be"),
        ({"normal": GENOTYPE["normal"]}, 'no cell "reduce"'),
        ({**GENOTYPE, "upsample": []}, "normal, reduce"),
        ({**GENOTYPE, "normal": []}, "1 to 32 nodes"),
        ({**GENOTYPE, "normal": [[]]}, r"normal\[0\]"),
        ({**GENOTYPE, "normal": [[["sep_conv_7x7", 0]]]}, "max_pool_3x3, avg_pool_3x3, skip_connect, sep_conv_3x3"),
        ({**GENOTYPE, "normal": [[["none", 0]]]}, "no such operator"),
        ({**GENOTYPE, "normal": [[[["none"], 0]]]}, "no such operator"),
        ({**GENOTYPE, "normal": [[["skip_connect", 2]]]}, "from 0 to 1"),
        ({**GENOTYPE, "normal": [[["skip_connect", True]]]}, "from 0 to 1"),
        ({**GENOTYPE, "normal": [[["skip_connect", 0], ["skip_connect", 0]]]}, "second edge"),
        ({**GENOTYPE, "normal": [["skip_connect", 0]]}, "must be an edge"),
        ({**GENOTYPE, "normal": [[["skip_connect", 0]] * 3]}, "1 to 2 edges"),
        ({**GENOTYPE, "normal": [[["skip_connect", 0]]] * 33}, "1 to 32 nodes"),
    ],
)
def test_malformed_genotypes_are_refused(genotype: object, said: str, tmp_path: Path) -> None:
    with pytest.raises((ModelError, StrictDataclassError), match=said if isinstance(genotype, dict) else "genotype"):
        DartsConfig(genotype=genotype)
    if isinstance(genotype, dict):  # also as a config.json from anywhere
        small("cifar").config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | {"genotype": genotype}))
        with pytest.raises(ModelError, match=said):
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (DartsConfig, {"num_cells": 0}, "num_cells"),
        (DartsConfig, {"num_cells": 10**9}, "num_cells"),
        (DartsConfig, {"width": -1}, "width"),
        (DartsConfig, {"width": 7, "stem": "imagenet"}, "even"),
        (DartsConfig, {"stem": "mnist"}, "stem"),
        (DartsConfig, {"reduction_cells": [3, 2]}, "reduction_cells"),
        (DartsConfig, {"reduction_cells": [20]}, "reduction_cells"),
        (DartsConfig, {"num_cells": 40, "reduction_cells": list(range(30))}, "reduction_cells"),
        (DartsConfig, {"drop_path_rate": 1.0}, "drop_path_rate"),
        (DartsConfig, {"auxiliary_weight": float("nan")}, "auxiliary_weight"),
        (DartsSupernetConfig, {"operators": ["none"]}, "other than"),
        (DartsSupernetConfig, {"operators": ["sep_conv_3x3", "conv_3x3"]}, "dil_conv_5x5"),
        (DartsSupernetConfig, {"operators": ["sep_conv_3x3", "sep_conv_3x3"]}, "twice"),
        (DartsSupernetConfig, {"nodes": 0}, "nodes"),
        (DartsSupernetConfig, {"edges_per_node": 0}, "edges_per_node"),
        (DartsSupernetConfig, {"initial_alpha": -1.0}, "initial_alpha"),
        (DartsSupernetConfig, {"pruned_operators": {"normal": [[14, "none"]]}}, "0 to 13"),
        (DartsSupernetConfig, {"pruned_operators": {"normal": [[0, "conv"]]}}, "sep_conv_3x3"),
        (DartsSupernetConfig, {"pruned_operators": {"other": []}}, "cell type"),
        (DartsSupernetConfig, {"pruned_operators": {"normal": [[0, name] for name in OPERATORS[1:]]}}, "left"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(kind: type, fields: dict, said: str) -> None:
    with pytest.raises((ModelError, StrictDataclassError), match=said):
        kind(**fields)


def test_nan_architecture_parameters_are_refused() -> None:
    model = supernet("few operators")
    with torch.no_grad():
        model.architecture_parameters()["normal"][0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        model.derive()


# -- the supernet against a plain one -----------------------------------------------------------------------------


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    output = model(x, labels=LABELS)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    cells = {name: p.grad for name, p in model.named_parameters() if ".nodes." not in name}
    return found | {f"gradient of {name}": grad for name, grad in cells.items()}


WAYS = [
    *((name, None) for name in SEARCHED),
    *(("without reduction", way) for way in ("composed", "grouped", "separate")),
    *(("imagenet", way) for way in ("composed", "grouped", "separate")),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_supernet_is_the_plain_one(
    name: str, dtype: torch.dtype, tolerance: float, way: str | None, search_step
) -> None:
    """Outputs, all gradients and running statistics."""
    ours = supernet(name, dtype)
    for module in ours.modules():
        if isinstance(module, DartsMixedConvolutions):
            module.way = way
    plain = search_step.plain(ours)
    x = images(ours)
    found, expected = run(ours, x), run(plain, x)
    nodes = [(a.nodes, b.nodes) for a, b in zip(ours.supernet.cells, plain.supernet.cells, strict=True)]
    for number, (a, b) in enumerate(nodes):
        for place, (here, there) in enumerate(search_step.pairs(a, b)):
            if here.is_floating_point():
                found[f"{number}.{place}"], expected[f"{number}.{place}"] = here.detach(), there.detach()
        for place, (here, there) in enumerate(search_step.gradients(a, b)):
            found[f"{number}.{place}.gradient"], expected[f"{number}.{place}.gradient"] = here, there
    assert found.keys() == expected.keys() and len(found) > 50
    for key, value in expected.items():
        # absolute for numbers below 1, as float32 rounds the sums of larger ones that gradients are made of
        bound = max(1.0, float(value.abs().max()))
        assert float((found[key] - value).abs().max()) <= tolerance * bound, key
    for model in (ours, plain):
        model.eval()
    torch.testing.assert_close(ours(x).logits, plain(x).logits, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", SEARCHED)
def test_pruned_operators_have_no_weight_no_cost_and_no_gradient(name: str, search_step) -> None:
    model = supernet(name)
    before = model.operator_weights()
    count = model.prune_operators(0.15)
    assert count == sum(map(len, model.config.pruned_operators.values())) > 0
    for kind, weights in model.operator_weights().items():
        assert torch.allclose(weights.sum(1), torch.ones_like(weights.sum(1)))
        gone = weights == 0
        assert bool((before[kind][gone] < 0.15).all())
        assert torch.allclose(weights, torch.where(gone, 0.0, before[kind]) / (~gone * before[kind]).sum(1, True))
    # the plain supernet computes everything, times zero where pruned
    plain = search_step.plain(model)
    x = images(model)
    found, expected = run(model, x), run(plain, x)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-10)
    for kind, alpha in model.architecture_parameters().items():
        theirs = plain.architecture_parameters()[kind].grad
        torch.testing.assert_close(alpha.grad, theirs, rtol=0, atol=1e-10)
        assert not alpha.grad[model.operator_weights()[kind] == 0].any()
    assert model.genotype() == plain.genotype()
    assert model.prune_operators(0.0) == count  # what is gone stays gone
    edges = len(edges_of(model.config.nodes)) * len(model.architecture_parameters())
    model.prune_operators(1.0)
    # one is left of each edge, and "none" is not it
    assert sum(int((w > 0).sum()) for w in model.operator_weights().values()) == edges


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_supernet_saves_and_loads(name: str, is_pruned: bool, tmp_path: Path) -> None:
    model = perturb(supernet(name, torch.float32))
    if is_pruned:
        model.prune_operators(0.15)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and type(loaded) is DartsSupernetForImageClassification
    x = images(model)
    assert torch.equal(loaded(x).logits, model(x).logits) and loaded.genotype() == model.genotype()
    assert loaded.config.pruned_operators == model.config.pruned_operators


def test_parts_of_the_search_cell() -> None:
    generator = torch.Generator().manual_seed(0)
    for kernel in (3, 5):
        for stride in (1, 2):
            for height, width in ((6, 4), (5, 3)):
                x = torch.randn(2, 2, height, width, dtype=torch.float64, generator=generator, requires_grad=True)
                weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64, generator=generator, requires_grad=True)
                apply = lambda x, w, stride=stride: DepthwiseFunction.apply(x, w, stride)  # noqa: E731
                expected = F.conv2d(x, weight, None, stride, kernel // 2, 1, 2)
                torch.testing.assert_close(apply(x, weight), expected)
                assert torch.autograd.gradcheck(apply, (x, weight))
                dilated = F.conv2d(x, weight, None, stride, 2 * (kernel // 2), 2, 2)
                if stride == 2:
                    torch.testing.assert_close(depthwise(x[:, :, ::2, ::2], weight), dilated)
                elif height % 2 == 0:
                    torch.testing.assert_close(join_phases(depthwise(split_phases(x), weight)), dilated)
                    assert torch.equal(join_phases(split_phases(x)), x)


def test_second_derivatives_through_the_fast_depthwise_convolution() -> None:
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    for kernel in (3, 5):
        weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, w: DepthwiseFunction.apply(x, w, 1), (x, weight))


def test_an_unknown_output_size_is_refused_by_no_operator() -> None:
    """Cells with a single node and a single operator, at odd and even sizes."""
    for operator in OPERATORS[1:]:
        for stride_cells in ([], [0]):
            config = DartsSupernetConfig(
                nodes=1, operators=[operator], num_cells=1, width=3, reduction_cells=stride_cells, num_labels=3
            )
            model = DartsSupernetForImageClassification(config).train()
            for size in (8, 9):
                assert bool(model(torch.randn(2, 3, size, size)).logits.isfinite().all())
            assert model.derive()(torch.randn(2, 3, 9, 9)).logits.shape == (2, 3)


# -- as transformers expects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_outputs(name: str) -> None:
    model = small(name)
    x = images(model)
    output = model(x, labels=LABELS, output_hidden_states=True)
    assert output.logits.shape == (4, 5) and len(output.hidden_states) == model.config.num_cells + 1
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, LABELS))  # evaluation: no auxiliary loss
    assert (output.auxiliary_logits is not None) == (name == "auxiliary")
    assert model(x).hidden_states is None and model(x).loss is None
    as_tuple = model(x, labels=LABELS, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    trunk = model.base_model(x)
    torch.testing.assert_close(trunk.last_hidden_state.mean((2, 3)), trunk.pooler_output)


def test_auxiliary_loss_is_added_while_training() -> None:
    model = small("auxiliary").train()
    for module in model.modules():
        if isinstance(module, DartsDropPath):
            module.drop_prob = 0.0
    output = model(images(model), labels=LABELS)
    expected = F.cross_entropy(output.logits, LABELS) + 0.4 * F.cross_entropy(output.auxiliary_logits, LABELS)
    torch.testing.assert_close(output.loss, expected)
    assert model.remove_auxiliary_head()(images(model)).auxiliary_logits is None
    assert model.config.auxiliary_weight == 0


def test_drop_path_keeps_the_mean_and_drops_whole_examples() -> None:
    torch.manual_seed(0)
    layer = DartsDropPath(0.25).train()
    output = layer(torch.ones(4000, 2, 3, 3))
    assert output.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(output.amax((1, 2, 3)), output.amin((1, 2, 3)))
    assert abs(float(output.mean()) - 1) < 0.05  # five standard errors
    assert torch.equal(layer.eval()(output), output)


@pytest.mark.parametrize("kind", ["derived", "supernet"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    model = small("auxiliary").double().train() if kind == "derived" else supernet("three nodes")
    other = copy.deepcopy(model)
    other._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=reentrant))
    cells = [module for module in other.modules() if isinstance(module, DartsCell)]
    assert cells and all(cell.gradient_checkpointing for cell in cells)
    x = images(model)
    for each in (model, other):
        torch.manual_seed(5)  # of drop path
        each(x, labels=LABELS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)  # float64, another order of sums
    for (name, here), there in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(here, there), name  # the statistics were updated once


@pytest.mark.parametrize("kind", ["derived", "supernet"])
def test_bfloat16(kind: str) -> None:
    model = (small("cifar") if kind == "derived" else supernet("three nodes", torch.float32)).train()
    reference = model(images(model)).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(images(half), labels=LABELS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)
    # 8 bits of mantissa through ten layers
    assert float((output.logits.float() - reference).detach().abs().mean()) < 0.1 * float(
        reference.detach().abs().max()
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(model), labels=LABELS).loss
    loss.backward()
    assert bool(loss.isfinite())


@pytest.mark.parametrize("kind", ["derived", "supernet"])
def test_torch_export(kind: str) -> None:
    model = small("auxiliary") if kind == "derived" else perturb(supernet("few operators", torch.float32))
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": images(model, 2)}, dynamic_shapes=shapes)
    found = program.module()(pixel_values=images(model, 3)).logits
    torch.testing.assert_close(found, model(images(model, 3)).logits, rtol=1e-4, atol=1e-5)  # float32, other kernels


@pytest.mark.slow
def test_compiled_supernet_computes_the_same() -> None:
    torch.manual_seed(0)
    config = DartsSupernetConfig(num_labels=5, num_cells=2, width=4, image_size=8, nodes=1, initial_alpha=1.0)
    model = DartsSupernetForImageClassification(config).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(images(model), labels=LABELS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)  # float32, other kernels


# -- with the rest of the package ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SMALL)
def test_cut_equals_masked(name: str, seed: int) -> None:
    model = small(name).double()
    graph = find_axes(model)
    assert not graph.without_rule and all(axis.is_exact for axis in graph)
    assert graph.params == model.num_parameters()
    keep = random_keep(graph, seed)
    assert_cut_equals_masked(model, graph, keep, images(model))


def test_pruned_with_its_auxiliary_head_it_still_trains(tmp_path: Path) -> None:
    model = small("auxiliary")
    prune(model, macs=0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images(model)).logits, model(images(model)).logits)
    loss = loaded.train()(images(model), labels=LABELS).loss
    loss.backward()
    assert bool(loss.isfinite()) and loaded.auxiliary_head.classifier.weight.grad is not None


def test_onnx_of_a_pruned_network(tmp_path: Path) -> None:
    model = small("cifar")
    prune(model, macs=0.5)
    path = export_onnx(model, tmp_path / "model.onnx", images(model, 2))
    assert onnx_difference(model, path, images(model, 3)) < 2e-5  # float32 in another order of summation


class Rates(TrainerCallback):
    """What drop path's rate is in every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(next(m.drop_prob for m in kwargs["model"].modules() if isinstance(m, DartsDropPath)))


def train(model: nn.Module, folder: Path, callbacks: list, **arguments: object) -> Trainer:
    data = Dataset.from_dict({"pixel_values": images(model, 8).tolist(), "labels": [0, 1, 2, 3] * 2}).with_format(
        "torch"
    )
    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.05, optim="sgd", report_to="none",
        use_cpu=True, logging_strategy="no", save_strategy="epoch", **arguments,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


def test_drop_path_rises_with_the_epochs_and_resumes(tmp_path: Path) -> None:
    rates = Rates()
    whole = small("auxiliary")
    trainer = train(whole, tmp_path / "whole", [DropPathScheduleCallback(), rates], num_train_epochs=4)
    # the model's 0.2 would be reached after the last epoch
    assert rates.seen == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1, 0.15, 0.15])
    assert next(m.drop_prob for m in whole.modules() if isinstance(m, DartsDropPath)) == 0.2
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (8, 5)  # the auxiliary logits are left out
    rates, again = Rates(), small("auxiliary")
    train(
        again, tmp_path / "again", [DropPathScheduleCallback(), rates], num_train_epochs=4,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
    )  # fmt: skip
    assert rates.seen == pytest.approx([0.1, 0.1, 0.15, 0.15])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(MethodError, match="drop_path_rate"):
        train(small("cifar"), tmp_path / "none", [DropPathScheduleCallback()], max_steps=1)


def test_supernet_is_trained_by_trainer(tmp_path: Path) -> None:
    model = supernet("three nodes", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tmp_path, [], max_steps=2, max_grad_norm=5.0)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert isinstance(model.supernet.cells[0].nodes, DartsMixedNodes)
