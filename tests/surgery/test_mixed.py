"""``mix_attention`` and ``settle_attention``: candidates side by side, searched by the ordinary callback, and one stays."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from masking import assert_close
from reloading import LOAD_ALL
from test_replace import BUILDERS, batches, wide_vit
from torch import Tensor, nn

from hf_compress import (
    ArchitectureSearchCallback,
    HfCompressConfig,
    factorize,
    find_axes,
    mix_attention,
    prune,
    quantize,
    replace_attention,
    settle_attention,
)
from hf_compress.errors import BudgetError, DataError, MethodError, ModelError, NothingToShrinkError
from hf_compress.measurement.cost import count_macs
from hf_compress.surgery import find_attention, record_of, replacement_report
from hf_compress.surgery.mixed import MixedAttention, mixed_in


def set_weights(model: nn.Module, *values: float) -> None:
    """The softmax of every mixture's row."""
    for mixture in mixed_in(model).values():
        mixture.alpha.data.copy_(torch.tensor([values], dtype=torch.float64).clamp_min(1e-30).log())


@pytest.mark.parametrize("family", BUILDERS)
def test_a_mixture_is_the_weighted_sum_of_its_candidates(family: str) -> None:
    model, x = BUILDERS[family]()
    model, x = model.double(), x.double()
    dense = copy.deepcopy(model)
    replaced = {kind: replace_attention(copy.deepcopy(model), filter=kind) for kind in ("afidaf", "image")}
    blocks = find_attention(model, x)
    mix_attention(model, filters=["afidaf", "image"])
    assert list(mixed_in(model)) == [block.name for block in blocks]
    with torch.no_grad():
        for values, expected in (
            ((1.0, 0.0, 0.0), dense),
            ((0.0, 1.0, 0.0), replaced["afidaf"]),
            ((0.0, 0.0, 1.0), replaced["image"]),
        ):
            set_weights(model, *values)
            assert_close(model(x).logits, expected(x).logits, 1e-12)  # float64; the others have weights of 1e-30
        set_weights(model, 0.5, 0.3, 0.2)
        for block in blocks:
            mixture = model.get_submodule(block.name)
            assert isinstance(mixture, MixedAttention)
            calls: dict[str, Tensor] = {}
            parts = {"attention": mixture.attention, **mixture.filters, "whole": mixture}
            handles = [
                part.register_forward_hook(lambda m, a, output, key=key, calls=calls: calls.__setitem__(key, output[0]))
                for key, part in parts.items()
            ]
            model(x)
            for handle in handles:
                handle.remove()
            total = 0.5 * calls["attention"] + 0.3 * calls["afidaf"] + 0.2 * calls["image"]
            assert_close(calls["whole"], total, 1e-12)


@pytest.mark.parametrize("family", BUILDERS)
def test_what_settles_is_what_replacing_gives_and_reloads(family: str, tmp_path: Path) -> None:
    model, x = BUILDERS[family]()
    names = [block.name for block in find_attention(model, x)]
    expected = replace_attention(copy.deepcopy(model), names[0], "fourier")
    mix_attention(model, filters=("image", "fourier"), seed=0)
    for name, mixture in mixed_in(model).items():
        mixture.alpha.data[0] = torch.tensor([0.0, -1.0, 2.0] if name == names[0] else [1.0, 0.5, 0.9])
    settle_attention(model)
    assert not mixed_in(model) and record_of(model) == record_of(expected)
    report = replacement_report(model)
    assert report.replaced == names[:1]
    assert [row.preference for row in report.rows] == pytest.approx([2.0] + [-0.1] * (len(names) - 1), abs=1e-6)
    assert "preference" in str(report)
    with torch.no_grad():
        logits = model(x).logits
    model.save_pretrained(tmp_path / "model")
    torch.save((x, logits), tmp_path / "expected.pt")
    run = subprocess.run([sys.executable, "-c", LOAD_ALL, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    small = prune(model, ratio=0.3, example_inputs=x)  # and goes on like any other
    assert find_axes(small, x).params < find_axes(expected, x).params


def test_a_budget_takes_the_blocks_that_the_search_gives_up_most_easily() -> None:
    model = wide_vit()
    dense = count_macs(model)
    names = [block.name for block in find_attention(model)]
    mix_attention(model)
    for name, value in zip(names, (-1.0, -3.0, -0.5), strict=True):  # attention is the favourite in all three
        model.get_submodule(name).alpha.data[0, 1] = value
    assert replacement_report(settle_attention(copy.deepcopy(model))).replaced == []
    assert replacement_report(settle_attention(copy.deepcopy(model), count=1)).replaced == [names[2]]
    two = settle_attention(copy.deepcopy(model), count=2)
    assert replacement_report(two).replaced == [names[0], names[2]]
    share = count_macs(two) / dense
    assert replacement_report(settle_attention(copy.deepcopy(model), macs=share + 1e-6)).replaced == [
        names[0],
        names[2],
    ]
    with pytest.raises(BudgetError, match="cannot be reached"):
        settle_attention(model, macs=0.01)
    assert list(mixed_in(model)) == names  # still there, to be settled otherwise
    settle_attention(model, count=3)
    assert not mixed_in(model)


def test_filters_are_matched_first() -> None:
    model = wide_vit()
    teacher = copy.deepcopy(model)
    mix_attention(model, batches=batches(2), match_steps=30, filters="afidaf")
    plain = mix_attention(copy.deepcopy(teacher))

    def distance(mixed: nn.Module) -> float:
        set_weights(mixed, 0.0, 1.0)
        x = batches(2)[1]["pixel_values"]
        with torch.no_grad():
            return float((mixed.eval()(x).logits - teacher(x).logits).square().mean())

    assert distance(model) < distance(plain)


class Labelled(torch.utils.data.Dataset):
    """Random images with the classes that a model gives them, when it is made to tell them apart."""

    def __init__(self, model: nn.Module, length: int = 64) -> None:
        draw = torch.Generator().manual_seed(5)
        self.images = torch.randn(length, 3, 32, 32, generator=draw)
        with torch.no_grad():
            logits = model.eval()(self.images).logits
            factor = 5 / logits.std(0).mean()
            model.classifier.weight *= factor
            model.classifier.bias.copy_(factor * (model.classifier.bias - logits.mean(0)))
            self.labels = model.eval()(self.images).logits.argmax(-1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.images[i], "labels": int(self.labels[i])}


def searched(model: nn.Module, data: Labelled, method: str, folder: Path, **arguments: Any) -> transformers.Trainer:
    search = ArchitectureSearchCallback(method, architecture_lr=0.1)  # type: ignore[arg-type]
    defaults = {
        "max_steps": 8, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 1e-6, "max_grad_norm": 0.0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 2, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    training = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return transformers.Trainer(model, training, train_dataset=search.halve(data), callbacks=[search])


@pytest.mark.parametrize("method", ["rarts", "darts"])
@pytest.mark.parametrize("good", ["attention", "afidaf"])
def test_the_search_finds_the_candidate_that_works(method: str, good: str, tmp_path: Path) -> None:
    """The labels are those of one candidate; in one block the other one is scrambled, and the weights hardly move.

    In Swin, whose logits see every token: a ViT's see the class token alone, which filters leave as it is.
    """
    model, _ = BUILDERS["swin"]()
    mix_attention(model)
    set_weights(model, *((1.0, 0.0) if good == "attention" else (0.0, 1.0)))
    data = Labelled(model)
    mixture = list(mixed_in(model).values())[-1]
    mixture.alpha.data.zero_()
    scrambled = mixture.filters["afidaf"].projection if good == "attention" else mixture.attention.o_proj
    torch.manual_seed(0)
    torch.nn.init.normal_(scrambled.weight, std=2.0)
    trainer = searched(model, data, method, tmp_path, max_steps=20)
    trainer.train()
    first, second = mixture.alpha.detach()[0].tolist()
    assert abs(first - second) > 0.5 and (first > second) == (good == "attention")
    assert mixture.alpha.requires_grad  # an ordinary parameter again
    logged = [entry["architecture"] for entry in trainer.state.log_history if "architecture" in entry]
    assert [*logged[-1]] == [f"{name}.alpha" for name in mixed_in(model)]
    settle_attention(model)
    assert len(replacement_report(model).replaced) == (0 if good == "attention" else 3)


def test_an_interrupted_search_goes_on_to_the_same_variables(tmp_path: Path) -> None:
    def start(folder: Path, **arguments: Any) -> tuple[nn.Module, transformers.Trainer]:
        model, _ = BUILDERS["swin"]()
        data = Labelled(model)
        return model, searched(mix_attention(model), data, "rarts", folder, **arguments)

    whole, trainer = start(tmp_path / "whole")
    trainer.train()
    _, trainer = start(tmp_path / "part", save_strategy="steps", save_steps=4)
    trainer.train()
    again, trainer = start(tmp_path / "part")
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"filters": "linear"}, MethodError, "filters='linear' is not possible; give one or more of 'afidaf'"),
        ({"filters": []}, MethodError, "filters=[] is not possible"),
        ({"layers": "auto"}, MethodError, "is for replace_attention"),
        ({"layers": "decoder.*"}, MethodError, "matches nothing. The attention blocks of this model are vit.layers.0"),
        ({"match_steps": -1}, MethodError, "-1 steps of matching"),
        ({"batches": []}, DataError, "batches is empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], kind: type, message: str) -> None:
    model = wide_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=message.replace("*", r"\*").replace("[", r"\[")):
        mix_attention(model, **arguments)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [prune, partial(factorize, macs=0.8), partial(quantize, config=HfCompressConfig(weights=4)), replace_attention],
)
def test_a_model_whose_search_has_not_ended_is_not_changed_otherwise(change: Any) -> None:
    model = mix_attention(wide_vit())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="End its search by settle_attention first"):
        change(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    prune(settle_attention(model), ratio=0.3)


def test_what_cannot_be_mixed_or_settled_is_refused() -> None:
    with pytest.raises(NothingToShrinkError, match="no attention block that a filter can stand in for"):
        mix_attention(nn.Sequential(nn.Linear(3, 3)), example_inputs=torch.zeros(1, 3))
    model = wide_vit()
    with pytest.raises(ModelError, match="holds no mixture"):
        settle_attention(model)
    mix_attention(model)
    with pytest.raises(ModelError, match="holds mixtures already"):
        mix_attention(model)
    with pytest.raises(MethodError, match="got count and latency"):
        settle_attention(model, count=1, latency=0.5)
    next(iter(mixed_in(model).values())).alpha.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="are not finite"):
        settle_attention(model)
    assert len(mixed_in(model)) == 3
    pruned = wide_vit()
    prune(pruned, ratio=0.3)
    with pytest.raises((ModelError, NothingToShrinkError), match="pruned"):
        mix_attention(pruned)
