"""What every method does on every model family. One line in METHODS adds a method."""

import copy
import inspect
import json

import pytest
import torch
import transformers
from families import FAMILIES
from slimming_training import Classifier, Images, largest_difference, make_trainer, weights

from hf_compress.axes import find_axes
from hf_compress.errors import NothingToShrinkError
from hf_compress.methods import (
    L1,
    MCP,
    DimensionSearchCallback,
    GrowingRegularizationCallback,
    NetworkSlimmingCallback,
    ProximalSlimmingCallback,
    TransformedL1,
    WidthSearchCallback,
)
from hf_compress.methods.sparse_group import SparseGroupCallback
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback
from hf_compress.surgery import select, shrink


def validation_images(example_inputs=None, **options):
    """The validation half of a search, as large as the model's images."""
    return Images(4 if example_inputs is None else example_inputs["pixel_values"].shape[-1], 24)


METHODS = {
    "l1": lambda **options: NetworkSlimmingCallback(L1(), 1e-2, **options),
    "group_lasso": lambda **options: NetworkSlimmingCallback("l1", 1e-2, grouping="axis", **options),
    "transformed_l1": lambda **options: NetworkSlimmingCallback(TransformedL1(0.5), 1e-2, **options),
    "mcp": lambda **options: NetworkSlimmingCallback(MCP(500.0), 1e-2, **options),
    "proximal": lambda **options: ProximalSlimmingCallback(2.0, 1.0, gamma_init=0.5, **options),
    "proximal_mcp": lambda **options: ProximalSlimmingCallback(2.0, 1.0, penalty={"name": "mcp", "a": 2.0}, **options),
    "proximal_by_scale": lambda **options: ProximalSlimmingCallback(2.0, 1.0, grouping="scale", **options),
    "sparse_group": lambda **options: SparseGroupCallback("l0", strength=1e-3, split=0.1, growth_every=1, **options),
    # the choice at step 4 falls behind the checkpoint of the interrupted run, so that the one before it must survive
    "growing": lambda **options: GrowingRegularizationCallback(
        {"macs": 0.6}, warmup=0.2, hold=0.8, lasso=1e-3, refresh=4, **options
    ),
    "search": lambda **options: DimensionSearchCallback(0.5, kinds=["channels"], **options),
    "width": lambda **options: WidthSearchCallback(0.5, validation_dataset=validation_images(**options), **options),
    "rank": lambda **options: TrainedRankPruningCallback(0.1, 2, nuclear=1e-3),  # acts on layers, not on axes
    "rank_all_steps": lambda **options: TrainedRankPruningCallback(0.1, 2, nuclear=1e-3, nuclear_steps="all"),
}


def found_by(callback, model):
    """Scores, or the ranks of layers."""
    if hasattr(callback, "scores"):
        return callback.scores(model)
    return {name: torch.tensor(rank) for name, rank in callback.ranks(model).items()}


def built(family):
    model, inputs = FAMILIES[family]()
    model = model if isinstance(model, transformers.PreTrainedModel) else Classifier(model)
    return model, {"pixel_values": inputs}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["l1", "proximal"])
def test_trained_scored_and_shrunk_or_refused(method, family, tmp_path):
    model, inputs = built(family)
    graph = find_axes(model, inputs)
    scaled = {axis.name for axis in graph if axis.scales}
    size = inputs["pixel_values"].shape[-1]
    callback = METHODS[method](inexact=True, example_inputs=inputs)
    # a rate at which no family diverges: MobileNetV2 normalises maps of one place over four examples
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    trainer = make_trainer(model, [callback], tmp_path, size=size, **arguments)
    if not scaled:
        with pytest.raises(NothingToShrinkError):
            trainer.train()
        return
    keys = set(find_axes(model, inputs).parameter_dims)
    trainer.train()
    assert set(model.state_dict()) <= keys and not any("hf_compress" in key for key in model.state_dict())
    scores = callback.scores(model)
    assert scores.keys() == scaled
    for name, score in scores.items():
        assert score.shape == (graph[name].size,) and score.dtype == torch.float32 and score.device.type == "cpu"
        assert score.isfinite().all() and score.ge(0).all() and score.ne(score[0]).any()
    plan = select(callback.axes_, scores, ratio={name: 0.3 for name in scores}, inexact=True)
    shrink(model, plan, axes=callback.axes_)
    assert find_axes(model, inputs).macs == graph.cost(plan).macs < graph.macs
    logits = model.eval()(**inputs)["logits"]
    assert logits.isfinite().all()
    # scores of the smaller model rest on its scales: those that were kept
    gamma = METHODS["l1"](inexact=True, example_inputs=inputs).scores(model)
    for name, score in callback.scores(model).items():
        assert torch.equal(score, gamma[name])
        if method == "l1" and name in plan.keep:
            assert torch.equal(score, scores[name][list(plan.keep[name])])


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("search", "width", "sparse_group", "growing") and "rank" not in m]
)
def test_scores_order_by_the_size_of_scales(method, tmp_path):
    """With one scale set to nothing, its index scores lowest; scores do not depend on signs."""
    model, inputs = built("plain_cnn")
    callback = METHODS[method](example_inputs=inputs)
    weight = model.body.features[1].weight
    with torch.no_grad():
        weight[3] = 0
    scores = callback.scores(model)
    assert scores["body.features.0"].argmin() == 3
    with torch.no_grad():
        weight.neg_()
    for name, score in callback.scores(model).items():
        assert torch.equal(score, scores[name])


@pytest.mark.parametrize("method", METHODS)
def test_arguments_survive_a_checkpoint(method):
    callback = METHODS[method](axes=("features.*", "head"), inexact=True, threshold=0.5)
    state = json.loads(json.dumps(callback.state()))
    again = type(callback).from_state(state)
    assert again.state() == callback.state() and state["attributes"] == {}
    assert set(state["args"]) == set(inspect.signature(type(callback)).parameters) - {
        "example_inputs",
        "validation_dataset",
    }
    assert copy.deepcopy(callback).state() == callback.state()


@pytest.mark.parametrize("restore", [False, True], ids=["same_callback", "restored_callback"])
@pytest.mark.parametrize(
    "method",
    ["l1", "proximal", "proximal_by_scale", "search", "width", "sparse_group", "growing", "rank", "rank_all_steps"],
)
def test_interrupted_run_ends_in_the_same_weights(method, restore, tmp_path):
    """Bit for bit. With restored callbacks, the strength comes from the checkpoint."""
    options = {
        "size": 16, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3,
        "optim_args": "momentum=0.9", "lr_scheduler_type": "linear", "learning_rate": 0.02, "max_grad_norm": 1.0,
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    model, inputs = built("plain_preactivation")
    options["size"] = inputs["pixel_values"].shape[-1]
    callback = METHODS[method](example_inputs=inputs)
    make_trainer(model, [callback], tmp_path, **options).train()
    expected, expected_scores = weights(model), found_by(callback, model)

    model, _ = built("plain_preactivation")
    callback = METHODS[method](example_inputs=inputs)
    if restore:
        callback.strength = callback.nuclear = 77.0
    trainer = make_trainer(model, [callback], tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    found = weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    if not restore:  # else the object at hand is not the one that trained
        for name, score in found_by(callback, model).items():
            assert torch.equal(score, expected_scores[name])
    if hasattr(callback, "support"):
        (acting,) = (c for c in trainer.callback_handler.callbacks if type(c) is type(callback))
        for name, mask in acting.support(model).items():
            assert torch.equal(callback.support(model)[name], mask)


@pytest.mark.parametrize(
    "method", ["l1", "proximal", "search", "width", "sparse_group", "growing", "rank", "rank_all_steps"]
)
def test_checkpoints_load_and_the_final_model_is_clean(method, tmp_path):
    model, inputs = built("resnet_basic")
    callback = METHODS[method](example_inputs=inputs)
    trainer = make_trainer(
        model, [callback], tmp_path, size=32, max_steps=2, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    load = transformers.AutoModelForImageClassification.from_pretrained
    again, report = load(tmp_path / "final", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert largest_difference(weights(again), weights(model)) == 0.0
    _, report = load(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not report["missing_keys"] and all("hf_compress_" in key for key in report["unexpected_keys"])


@pytest.mark.parametrize("method", ["l1", "proximal", "sparse_group", "growing"])
def test_resuming_on_the_same_trainer_says_what_is_lost(method, tmp_path, caplog):
    model, inputs = built("plain_cnn")
    callback = METHODS[method](example_inputs=inputs)
    trainer = make_trainer(model, [callback], tmp_path, size=16, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    transformers.utils.logging.enable_propagation()
    try:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        transformers.utils.logging.disable_propagation()
    assert ("holds no auxiliary variable" in caplog.text) == (method != "l1")
    assert not any("hf_compress" in key for key in model.state_dict())
