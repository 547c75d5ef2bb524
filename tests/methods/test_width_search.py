"""Widths of ordinary models as the architecture of a search."""

import copy
import json

import pytest
import torch
import transformers
from families import FAMILIES
from search_training import search_trainer
from slimming_training import SCALED_INPUTS, Classifier, Images, largest_difference, scaled_classifier, weights

from hf_compress.axes import find_axes
from hf_compress.errors import BudgetError, MethodError, NothingToShrinkError
from hf_compress.methods import WidthSearchCallback, report_first
from hf_compress.methods.architecture_state import state_in
from hf_compress.methods.dimension_scores import scores_in
from hf_compress.surgery import select, shrink

FAST = {"architecture_lr": 0.2, "warmup": 0.0, "min_keep": 1}


def searched(folder, callback, model=None, **options):
    model = model or scaled_classifier()
    trainer = search_trainer(model, callback, folder, **options)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("method", ["rarts", "darts", "darts-second-order"])
def test_scores_reach_zero_and_removal_changes_nothing(method, tmp_path):
    callback = WidthSearchCallback(3.0, 0.5, method, example_inputs=SCALED_INPUTS, **FAST)
    model, _ = searched(tmp_path, callback, max_steps=12)
    assert weights(model).keys() == weights(scaled_classifier()).keys()
    (scores,) = callback.scores(model).values()
    plan = callback.plan(model)
    (kept,) = plan.keep.values()
    assert len(kept) == 12 and sorted((scores > 0).nonzero().flatten().tolist()) == list(kept)
    pixels = torch.stack([Images(4)[i]["pixel_values"] for i in range(8)])
    before = model(pixels)["logits"]
    shrink(model, plan, example_inputs=SCALED_INPUTS)
    assert model.body.inner.out_features == 12
    torch.testing.assert_close(model(pixels)["logits"], before, atol=1e-6, rtol=0)


def test_the_copies_share_the_scores_and_multiply_each_its_own_weights(tmp_path):
    model, checked = scaled_classifier(), []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            network = state_in(model).network
            alpha = scores_in(model).norm[0]
            assert scores_in(network).norm[0] is alpha and not list(scores_in(network).parameters())
            assert scores_in(network).graph is scores_in(model).graph
            pixels = torch.stack([Images(4)[i]["pixel_values"] for i in range(4)])
            for each in (model, network):
                hidden = each.body.gamma * torch.tanh(each.body.inner(pixels.flatten(1)))
                torch.testing.assert_close(
                    each(pixels)["logits"], each.body.outer.bias + (alpha * hidden) @ each.body.outer.weight.T
                )
            checked.append(largest_difference(*({"w": m.body.outer.weight} for m in (model, network))))

    trainer = search_trainer(model, WidthSearchCallback(example_inputs=SCALED_INPUTS, **FAST), tmp_path)
    trainer.add_callback(Look())
    trainer.train()
    assert len(checked) == 6 and checked[-1] > 1e-3
    assert scores_in(model) is None and state_in(model) is None


@pytest.mark.parametrize(
    "family", ["resnet_basic", "mobilenet_v2", "timm_resnet", "vit", "convnext", "plain_preactivation"]
)
def test_any_model_with_axes_is_searched_and_shrunk(family, tmp_path):
    model, inputs = FAMILIES[family]()
    model = model if isinstance(model, transformers.PreTrainedModel) else Classifier(model)
    inputs = {"pixel_values": inputs}
    graph = find_axes(model, inputs)
    callback = WidthSearchCallback(0.5, example_inputs=inputs, **FAST)
    names = set(weights(model))
    searched(
        tmp_path, callback, model, size=inputs["pixel_values"].shape[-1], max_steps=2, per_device_train_batch_size=4,
        learning_rate=0.01,
    )  # fmt: skip
    assert set(weights(model)) == names
    scores = callback.scores(model)
    assert scores.keys() == {axis.name for axis in graph if axis.is_exact}
    plan = select(graph, scores, macs=0.7)
    shrink(model, plan, axes=graph, example_inputs=inputs)
    assert find_axes(model, inputs).macs == graph.cost(plan).macs <= 0.7 * graph.macs
    assert model.eval()(**inputs)["logits"].isfinite().all()


@pytest.mark.parametrize("passes", ["shared", "fresh"])
@pytest.mark.parametrize("restore", [False, True], ids=["same_callback", "restored_callback"])
def test_interrupted_run_ends_in_the_same_weights(passes, restore, tmp_path):
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim_args": "momentum=0.9", "max_grad_norm": 1.0,
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip

    def make(strength):
        return WidthSearchCallback(strength, 0.4, passes=passes, example_inputs=SCALED_INPUTS, **FAST)

    first = make(1.0)
    expected = weights(searched(tmp_path, first, **options)[0])
    model, callback = scaled_classifier(), make(77.0 if restore else 1.0)
    trainer = search_trainer(model, callback, tmp_path, **options)
    model._keys_to_ignore_on_save = None
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(model), expected) == 0.0
    assert callback.plan(model).keep.keys() == {"body.gamma"}


def test_checkpoints_of_a_transformers_model_load_and_the_final_one_is_clean(tmp_path):
    model, inputs = FAMILIES["resnet_basic"]()
    callback = WidthSearchCallback(0.5, example_inputs={"pixel_values": inputs}, **FAST)
    _, trainer = searched(
        tmp_path, callback, model, size=32, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "final"))
    load = transformers.AutoModelForImageClassification.from_pretrained
    again, report = load(tmp_path / "final", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert largest_difference(weights(again), weights(model)) == 0.0
    _, report = load(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not report["missing_keys"] and all("hf_compress_" in key for key in report["unexpected_keys"])


def test_sparsity_is_logged(tmp_path):
    callback = WidthSearchCallback(3.0, 0.5, example_inputs=SCALED_INPUTS, **FAST)
    model = scaled_classifier()
    trainer = search_trainer(model, callback, tmp_path, max_steps=12, logging_steps=1)
    report_first(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sparsity" in entry]
    assert entries[0]["sparsity"] < entries[-1]["sparsity"] == 0.5
    assert entries[-1]["sparsity_mlp"] == entries[-1]["sparsity/body.gamma"] == 0.5
    assert all("search_objective" in entry and "architecture" not in entry for entry in entries[:-1])


def test_arguments_survive_a_checkpoint():
    callback = WidthSearchCallback({"mlp": 0.5}, {"macs": 0.5}, penalty={"name": "mcp", "a": 2.0}, kinds=("mlp", "qk"))
    state = json.loads(json.dumps(callback.state()))
    assert WidthSearchCallback.from_state(state).state() == callback.state()
    assert copy.deepcopy(callback).state() == callback.state() and "example_inputs" not in state["args"]


def test_what_cannot_be_searched_is_refused_before_training(tmp_path):
    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            searched(tmp_path, WidthSearchCallback(example_inputs=SCALED_INPUTS, **options))

    refused(MethodError, "no axis of kind 'heads'", kinds="heads")
    refused(NothingToShrinkError, "matches no axis", axes="none*")
    refused(BudgetError, "macs", target={"macs": 1e-6})
    refused(MethodError, "strength", strength=-1.0)
    refused(MethodError, "below 1", target=1.5)

    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(48, 7)

        def forward(self, x):
            return self.head(x.flatten(1))

    with pytest.raises(NothingToShrinkError):
        searched(tmp_path, WidthSearchCallback(example_inputs=SCALED_INPUTS), Classifier(Nothing()))
