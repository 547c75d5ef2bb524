"""LeNet-5 and wide residual networks: the papers' sizes, initial weights, axes, and what transformers expects."""

import copy

import pytest
import torch
from families import perturb
from masking import assert_cut_equals_masked, random_keep
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_compress import find_axes, prune
from hf_compress.errors import ModelError
from hf_compress.models.lenet import LeNetConfig
from hf_compress.models.wide_resnet import WideResNetConfig

SMALL = {
    "lenet": LeNetConfig(widths=[4, 6], hidden_size=12, image_size=16, num_labels=5),
    "lenet_three": LeNetConfig(widths=[3, 4, 5], hidden_size=8, image_size=36, num_channels=3, num_labels=5),
    "wrn": WideResNetConfig(depth=10, widen_factor=1, base_width=4, image_size=16, num_labels=5),
    "wrn_deeper": WideResNetConfig(depth=16, widen_factor=2, base_width=4, image_size=16, num_channels=1, num_labels=5),
}


def small(name):
    torch.manual_seed(0)
    return perturb(AutoModelForImageClassification.from_config(copy.deepcopy(SMALL[name])))


def images(model):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    size = config.image_size
    return torch.randn(2, config.num_channels, size, size, generator=generator).to(model.dtype)


@pytest.mark.parametrize(
    ("kind", "settings", "parameters"),
    [
        ("lenet", {"num_labels": 10}, 431_080),
        ("wide_resnet", {"num_labels": 10}, 36_479_194),
        ("wide_resnet", {"num_labels": 100}, 36_536_884),
    ],
)
def test_sizes_are_the_papers(kind, settings, parameters):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **settings))
    assert model.num_parameters() == parameters


def test_regularised_layers_of_wrn_28_10_are_the_papers():
    """The first convolution of each of the 12 blocks: 16,842,240 weights, 4480 filters."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(WideResNetConfig(num_labels=10))
    first = [p for name, p in model.named_parameters() if name.endswith("convolution_in.weight")]
    assert (len(first), sum(p.numel() for p in first), sum(p.shape[0] for p in first)) == (12, 16_842_240, 4480)
    strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 4 and all(name.endswith(("convolution_out", "shortcut")) for name in strided)


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_are_the_papers(name):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(copy.deepcopy(SMALL[name]))
    scaled = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.weight.shape[0]
            scaled.append((module.weight.detach() / (2 / fan) ** 0.5).flatten())
            assert module.bias is None or float(module.bias.detach().abs().max()) < 0.05  # five deviations of 0.01
    values = torch.cat(scaled)
    # some hundred to thousand standard normal numbers: within five standard errors
    assert abs(float(values.mean())) < 5 / len(values) ** 0.5
    assert abs(float(values.std()) - 1) < 5 / (2 * len(values)) ** 0.5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SMALL)
def test_cut_equals_masked(name, seed):
    model = small(name).double()
    graph = find_axes(model)
    assert not graph.without_rule and all(axis.is_exact for axis in graph)
    assert graph.params == model.num_parameters()
    keep = random_keep(graph, seed)
    assert set(keep) == set(graph.axes)
    assert_cut_equals_masked(model, graph, keep, images(model))


@pytest.mark.parametrize("name", SMALL)
def test_outputs(name):
    model = small(name).eval()
    pixels, labels = images(model), torch.tensor([0, 4])
    output = model(pixels, labels=labels, output_hidden_states=True)
    assert output.logits.shape == (2, 5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert len(output.hidden_states) == (4 if name.startswith("wrn") else len(model.config.widths))
    as_tuple = model(pixels, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert model.base_model(pixels).pooler_output.shape == (2, model.classifier.in_features)


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_saving_and_loading(name, is_pruned, tmp_path):
    model = small(name).float().eval()
    if is_pruned:
        prune(model, macs=0.5)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(images(model)).logits, model(images(model)).logits)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: LeNetConfig(widths=[]), "widths"),
        (lambda: LeNetConfig(hidden_size=0), "hidden_size"),
        (lambda: LeNetConfig(image_size=12), "image_size=12"),
        (lambda: WideResNetConfig(depth=12), "6 n"),
        (lambda: WideResNetConfig(widen_factor=0), "widen_factor"),
        (lambda: WideResNetConfig(dropout=1.0), "dropout"),
    ],
)
def test_impossible_configurations_are_refused(build, said):
    with pytest.raises(ModelError, match=said):
        build()
