"""The networks of the slimming papers: exact sizes, the channel selection, and everything that transformers expects."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from families import perturb
from masking import assert_close, assert_cut_equals_masked, random_keep
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_compress import Plan, find_axes, load_recipe, prune, select, shrink
from hf_compress.errors import ModelError
from hf_compress.models import AUTO_CLASSES
from hf_compress.models.slimming import PreActivation
from hf_compress.models.slimming_densenet import DenseNetConfig
from hf_compress.models.slimming_preact_resnet import PreActResNetConfig
from hf_compress.models.slimming_vgg import VggConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("**/*.yaml"))

SMALL = {
    "vgg": VggConfig(layers=[6, "M", 8, 8, "M"], num_labels=5, image_size=16),
    "densenet": DenseNetConfig(depth=10, growth_rate=4, num_labels=5, image_size=16),
    "densenet_compressed": DenseNetConfig(depth=10, growth_rate=4, compression=0.5, num_labels=5, image_size=16),
    "preact_resnet": PreActResNetConfig(depth=11, widths=[4, 6, 8], num_labels=5, image_size=16),
    "preact_resnet_deeper": PreActResNetConfig(depth=20, widths=[4, 6, 8], num_channels=1, num_labels=5, image_size=16),
}
# how many BatchNorms stand behind a channel selection
SELECTIONS = {"vgg": 0, "densenet": 9, "densenet_compressed": 9, "preact_resnet": 4, "preact_resnet_deeper": 7}


def small(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return perturb(AutoModelForImageClassification.from_config(copy.deepcopy(SMALL[name])))


def images(model: PreTrainedModel, batch: int = 2) -> Tensor:
    size = model.config.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.config.num_channels, size, size, generator=generator).to(model.dtype)


def on_meta(model_type: str, **arguments: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **arguments))


# -- sizes --------------------------------------------------------------------------------------------------------

# model type -> BatchNorm layers, their channels, index parameters, {classes: (parameters, FLOPs)}. Measured on the
# authors' public model files with their FLOP counter.
PAPER_SIZES = {
    "slimming_vgg": (16, 5504, 0, {10: (20_035_018, 797_304_842), 100: (20_081_188, 797_397_092)}),
    "slimming_densenet": (39, 9360, 9360, {10: (1_068_658, 573_052_330), 100: (1_109_788, 573_134_500)}),
    "slimming_preact_resnet": (163, 12112, 8080, {10: (1_711_338, 504_759_306), 100: (1_734_468, 504_805_476)}),
}
PAPER_CASES = [(kind, labels) for kind, sizes in PAPER_SIZES.items() for labels in sizes[3]]


def paper_flops(model: nn.Module, pixel_values: Tensor) -> int:
    """FLOPs of one image as the authors' code counts them: by module, so functional pooling does not count."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.weight[0].numel()  # kernel area x input channels
            total += 2 * kernel * output.numel()
        elif isinstance(module, nn.Linear):
            total += 2 * module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * output.numel()
        elif isinstance(module, nn.ReLU):
            total += output.numel()
        elif isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            total += inputs[0].numel()  # windows do not overlap: kernel area x outputs

    handles = [module.register_forward_hook(count) for module in model.modules()]
    model(pixel_values)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(("kind", "labels"), PAPER_CASES)
def test_sizes_are_the_papers(kind: str, labels: int) -> None:
    layers, channels, indices, totals = PAPER_SIZES[kind]
    model = on_meta(kind, num_labels=labels).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == layers and sum(norm.num_features for norm in norms) == channels
    assert sum(p.numel() for p in model.parameters() if p.dtype == torch.int64) == indices
    parameters, flops = totals[labels]
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == parameters
    assert paper_flops(model, torch.empty(1, 3, 32, 32, device="meta")) == flops


@pytest.mark.parametrize("kind", PAPER_SIZES)
def test_every_batchnorm_of_a_paper_network_is_the_scale_of_an_exact_axis(kind: str) -> None:
    layers, channels, _, totals = PAPER_SIZES[kind]
    graph = find_axes(AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=10)))
    assert graph.params == totals[10][0]
    assert not graph.without_rule
    assert len(graph) == layers and all(axis.is_exact and len(axis.scales) == 1 for axis in graph)
    assert sum(axis.size for axis in graph) == channels


# -- initialisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_are_the_papers(name: str) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(SMALL[name])
    config.scale_init = 0.25
    model = AutoModelForImageClassification.from_config(config)
    deviations = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 0.25).all()) and not module.bias.any()
        elif isinstance(module, PreActivation):
            assert torch.equal(module.index, torch.arange(module.normalization.num_features))
        elif isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            deviations.append(module.weight.detach().flatten() / (2 / fan_out) ** 0.5)
    everything = torch.cat(deviations)
    # some thousand standard normal numbers: mean and deviation within five standard errors
    assert abs(float(everything.mean())) < 5 / len(everything) ** 0.5
    assert abs(float(everything.std()) - 1) < 5 / (2 * len(everything)) ** 0.5
    weight = model.classifier.weight.detach()
    if name == "vgg":
        assert not model.classifier.bias.any() and abs(float(weight.std()) / 0.01 - 1) < 5 / (2 * weight.numel()) ** 0.5
    else:  # torch's default: uniform within 1 / sqrt(fan in)
        assert 0.8 < float(weight.abs().max()) * weight.shape[1] ** 0.5 <= 1


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: VggConfig(layers=[]), "layers"),
        (lambda: VggConfig(layers=["M"]), "layers"),
        (lambda: VggConfig(layers=[8, "P"]), "'P'"),
        (lambda: VggConfig(layers=[8, -1]), "-1"),
        (lambda: DenseNetConfig(depth=41), "3 n"),
        (lambda: DenseNetConfig(growth_rate=0), "growth_rate"),
        (lambda: DenseNetConfig(compression=2.0), "compression"),
        (lambda: PreActResNetConfig(depth=18), "9 n"),
        (lambda: PreActResNetConfig(widths=[16, 32]), "widths"),
    ],
)
def test_impossible_configurations_are_refused(build: Callable[[], object], field: str) -> None:
    with pytest.raises(ModelError, match=field):
        build()


# -- the channel selection ----------------------------------------------------------------------------------------


def test_selecting_before_the_batchnorm_is_the_papers_selection_behind_it() -> None:
    torch.manual_seed(0)
    whole = nn.BatchNorm2d(12).double()
    chosen = torch.tensor([0, 3, 4, 9, 11])
    ours = PreActivation(12).double()
    ours.normalization.load_state_dict(whole.state_dict())
    perturb(whole)
    perturb(ours)
    ours.index = nn.Parameter(chosen, requires_grad=False)
    norm = nn.BatchNorm2d(len(chosen)).double()
    for key in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, key).data.copy_(getattr(whole, key)[chosen])
    ours.normalization = norm
    x = torch.randn(4, 12, 5, 5, dtype=torch.float64)
    for training in (True, False):  # batch statistics are per channel, too
        whole.train(training)
        ours.train(training)
        papers = torch.relu(torch.index_select(whole(x), 1, chosen))
        torch.testing.assert_close(ours(x), papers, rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_cut_equals_masked(name: str, seed: int) -> None:
    model = small(name).double()
    pixels = images(model)
    graph = find_axes(model)
    assert all(axis.is_exact and len(axis.scales) == 1 for axis in graph)
    keep = random_keep(graph, seed)
    assert set(keep) == set(graph.axes)
    plain = assert_cut_equals_masked(model, graph, keep, pixels)
    small_model = shrink(
        copy.deepcopy(model), Plan({name: mask.nonzero().flatten() for name, mask in keep.items()}, graph)
    )
    with torch.no_grad():
        assert_close(small_model(pixels).logits, plain(pixels).logits)
    chosen = [module.index for module in small_model.modules() if isinstance(module, PreActivation)]
    assert len(chosen) == SELECTIONS[name]
    assert all(index.dtype == torch.int64 and not index.requires_grad for index in chosen)
    for module in small_model.modules():
        if isinstance(module, PreActivation):  # the BatchNorm is cut with the selection
            assert module.normalization.num_features == len(module.index) == len(module.normalization.running_mean)


@pytest.mark.parametrize("name", SMALL)
def test_no_layer_dies(name: str) -> None:
    """All scales of a layer are zero, and the budget is the lowest that can be reached."""
    model = small(name)
    graph = find_axes(model)
    victim = next(iter(graph))
    scores = {axis.name: torch.rand(axis.size) for axis in graph}
    scores[victim.name].zero_()
    lowest = graph.cost({axis.name: 1 for axis in graph})
    plan = select(graph, scores, macs=max(2, lowest.macs))
    assert plan.sizes[victim.name] == 1 and set(plan.sizes.values()) == {1}
    shrink(model, plan)
    assert sum(p.numel() for p in model.parameters()) == lowest.params
    assert bool(model(images(model)).logits.isfinite().all())


# -- as transformers expects --------------------------------------------------------------------------------------


def test_table_names_classes_that_exist_and_auto_classes_know_them() -> None:
    for kind, (package, config_name, models) in AUTO_CLASSES.items():
        module = import_module(package)
        config_class = getattr(module, config_name)
        assert config_class.model_type == kind and isinstance(AutoConfig.for_model(kind), config_class)
        assert {config_name, *models.values()} < set(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)
        for name in models.values():
            assert getattr(module, name).config_class is config_class
        with torch.device("meta"):
            config = config_class()
            for auto, name in models.items():
                found = getattr(transformers, auto).from_config(config)
                assert type(found).__name__ == name


def test_table_is_plain_and_a_model_can_be_imported_before_transformers() -> None:
    package, config, models = AUTO_CLASSES["slimming_densenet"]
    code = (
        "import sys; from hf_compress.models import AUTO_CLASSES; "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        f"from {package} import {models['AutoModelForImageClassification']} as Model, {config} as Config; "
        "from transformers import AutoModelForImageClassification as Auto; "
        "import torch; torch.set_default_device('meta'); assert type(Auto.from_config(Config())) is Model"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", SMALL)
def test_outputs(name: str) -> None:
    model = small(name)
    pixels, labels = images(model), torch.tensor([0, 4])
    output = model(pixels, labels=labels, output_hidden_states=True)
    assert output.logits.shape == (2, 5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert len(output.hidden_states) == (5 if name == "vgg" else 4)
    assert [state.shape[0] for state in output.hidden_states] == [2] * len(output.hidden_states)
    assert model(pixels).hidden_states is None and model(pixels).loss is None
    as_tuple = model(pixels, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    trunk = model.base_model(pixels)
    assert trunk.pooler_output.shape == (2, model.classifier.in_features)
    torch.testing.assert_close(trunk.last_hidden_state.mean((2, 3)), trunk.pooler_output)
    assert model(images(model)[:, :, :12, :12]).logits.shape == (2, 5)  # other image sizes


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_saving_and_loading(name: str, pruned: bool, tmp_path: Path) -> None:
    model = small(name)
    if pruned:
        prune(model, macs=0.5)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    assert before == {key: p.requires_grad for key, p in loaded.named_parameters()}
    assert torch.equal(loaded(images(model)).logits, model(images(model)).logits)


@pytest.mark.parametrize("convert", ["half", "to", "from_pretrained", "from_config"])
@pytest.mark.parametrize("name", ["densenet", "preact_resnet"])
def test_other_floating_point_types_leave_the_selection_alone(name: str, convert: str, tmp_path: Path) -> None:
    model = small(name)
    if convert == "half":
        changed = model.half()
    elif convert == "to":
        changed = model.to(torch.bfloat16)
    elif convert == "from_pretrained":
        model.save_pretrained(tmp_path)
        changed = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        changed = AutoModelForImageClassification.from_config(model.config, dtype=torch.bfloat16)
    assert changed.dtype in (torch.float16, torch.bfloat16)
    integers = {key for key, p in changed.named_parameters() if p.dtype == torch.int64}
    assert len(integers) == SELECTIONS[name] and all(key.endswith(".index") for key in integers)
    assert all(p.dtype == changed.dtype for key, p in changed.named_parameters() if key not in integers)
    assert changed(images(changed)).logits.dtype == changed.dtype


def test_a_selection_missing_from_a_checkpoint_selects_everything(tmp_path: Path) -> None:
    model = small("densenet")
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith(".index")}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images(model)).logits, model(images(model)).logits)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", ["vgg", "densenet", "preact_resnet"])
def test_torch_export(name: str, pruned: bool) -> None:
    model = small(name)
    if pruned:
        prune(model, macs=0.5)
    pixels = images(model, batch=3)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": images(model)}, dynamic_shapes=shapes)
    found = program.module()(pixel_values=pixels).logits
    torch.testing.assert_close(found, model(pixels).logits, rtol=1e-4, atol=1e-5)  # float32, other kernels


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", ["vgg", "densenet", "preact_resnet"])
def test_trainer(name: str, pruned: bool, tmp_path: Path) -> None:
    model = small(name)
    if pruned:
        prune(model, macs=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = Dataset.from_dict({"pixel_values": images(model, 8).tolist(), "labels": [0, 1, 2, 3] * 2}).with_format(
        "torch"
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, optim="sgd", optim_args="momentum=0.9",
        learning_rate=0.1, weight_decay=1e-2, report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    decayed, spared = ({id(p) for p in group["params"]} for group in trainer.optimizer.param_groups)
    for key, parameter in model.named_parameters():
        if parameter.dtype == torch.int64:
            assert torch.equal(parameter, before[key]) and id(parameter) not in decayed | spared
            continue
        # the papers decay BatchNorm scales as well; Trainer would spare them under the name "norm"
        assert id(parameter) in (spared if key.endswith("bias") else decayed)
        # in a pruned DenseNet, nothing may read a layer's output any more: its shifts get no gradient
        assert not torch.equal(parameter, before[key]) or (pruned and key.endswith("bias")), f"{key} was not trained"


# -- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    if path.parent.name != "papers":
        return
    assert recipe.name == path.stem
    assert "Not run here" in path.read_text(encoding="utf-8")
    # what goes over the recipe's settings into TrainingArguments is accepted there
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, **recipe.training)
    _, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert settings["momentum"] == 0.9 and settings["lr"] == recipe.training["learning_rate"]
    if not path.stem.endswith("slimming"):
        return
    config = dict(recipe.model.config or {})
    assert settings["lr"] == 0.1
    labels = int(recipe.data.name.removeprefix("uoft-cs/cifar"))
    model = on_meta(config["model_type"], num_labels=labels, **{k: v for k, v in config.items() if k != "model_type"})
    assert model.num_parameters() == PAPER_SIZES[config["model_type"]][3][labels][0]
    stages = {stage.stage: stage for stage in recipe.stages}
    schedules = [
        stage for name, stage in stages.items() if name in ("network_slimming", "proximal_slimming", "finetune")
    ]
    assert schedules and all((stage.epochs, stage.lr_milestones) == (160, [0.5, 0.75]) for stage in schedules)


def test_the_papers_networks_all_have_recipes() -> None:
    names = {path.stem for path in RECIPES if path.parent.name == "papers"}
    nets = [f"{net}_{data}" for net in ("vgg19", "densenet40", "resnet164") for data in ("cifar10", "cifar100")]
    assert {f"{net}_{method}_slimming" for net in nets for method in ("network", "proximal")} < names
