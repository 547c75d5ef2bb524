import copy
import gc
import weakref

import datasets
import pytest
import torch
import transformers
from search_training import Mixed, losses_of, mixed, search_trainer
from slimming_training import Images, largest_difference, weights
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from hf_compress.errors import DataError, MethodError, ModelError
from hf_compress.methods import ArchitectureSearchCallback, report_first
from hf_compress.methods.architecture_state import NAME, state_in
from hf_compress.methods.relaxed_search import BilevelSearch, RelaxedSearch, squared_distance
from hf_compress.models.darts import DartsSupernetConfig, DartsSupernetForImageClassification

# float32 sums in another order over a few steps
CLOSE = 5e-6
PLAIN = {"architecture_optimizer": "sgd", "architecture_lr": 0.5, "architecture_weight_decay": 0.0}
WHOLE = {"per_device_train_batch_size": 16, "max_steps": 5}  # each half of 32 items in one batch
METHODS = {
    "shared": {"method": "rarts", "passes": "shared"},
    "fresh": {"method": "rarts", "passes": "fresh"},
    "darts": {"method": "darts"},
    "second_order": {"method": "darts-second-order"},
}


def searched(folder, callback, model=None, **options):
    model = model or mixed()
    trainer = search_trainer(model, callback, folder, **options)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("passes", ["fresh", "shared"])
def test_rarts_on_trainer_is_the_solver(passes, tmp_path):
    """Trainer's steps, with momentum, against RelaxedSearch on the same halves; lambda and beta move."""
    numbers = {"training_weight": (0.5, 2.0), "coupling": (1.0, 3.0)}
    callback = ArchitectureSearchCallback(passes=passes, **numbers, **PLAIN)
    model, copies = mixed(), {}
    validation, training, start, architecture = losses_of(mixed(), callback)

    class Last(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            network = state_in(kwargs["model"]).network
            copies.update({name: p.detach().clone() for name, p in network.named_parameters()})

    trainer = search_trainer(model, callback, tmp_path, optim_args="momentum=0.9", **WHOLE)
    trainer.add_callback(Last())
    trainer.train()
    sgd = {"lr": 0.1, "momentum": 0.9}
    solver = RelaxedSearch(
        validation, training, list(start.values()), list(architecture.values()),
        training_weight=lambda t: 0.5 * 4 ** (t / 4), coupling=lambda t: 3 ** (t / 4),
        weights_step=lambda block: torch.optim.SGD(block, **sgd),
        training_weights_step=lambda block: torch.optim.SGD(block, **sgd),
        architecture_step=0.5, architecture_passes=passes,
    )  # fmt: skip
    solver.run(5)
    found = weights(model)
    for (name, w), y in zip(start.items(), solver.training_weights, strict=True):
        torch.testing.assert_close(found[name], y.detach(), atol=CLOSE, rtol=0)
        torch.testing.assert_close(copies[name], w.detach(), atol=CLOSE, rtol=0)
    torch.testing.assert_close(found["alphas"], solver.architecture[0].detach(), atol=CLOSE, rtol=0)
    moved = (solver.architecture[0] - mixed().alphas).abs().max()
    assert moved > 1000 * CLOSE and largest_difference(copies, {k: found[k] for k in copies}) > 1000 * CLOSE


@pytest.mark.parametrize("order", ["darts", "second_order"])
def test_darts_on_trainer_is_the_solver(order, tmp_path):
    """Trainer steps weights first, the solver (as the authors) the architecture: the same alternation, begun elsewhere."""
    callback = ArchitectureSearchCallback(**METHODS[order], **PLAIN)
    validation, training, start, architecture = losses_of(mixed(), callback)
    model, _ = searched(tmp_path, callback, **WHOLE)
    solver = BilevelSearch(
        validation, training, list(start.values()), list(architecture.values()),
        inner_step=0.1 if order == "second_order" else 0.0, weights_step=0.1, architecture_step=0.5,
    )  # fmt: skip
    from hf_compress.methods import relaxed_search

    # the first step in weights alone
    _, gradients, _ = relaxed_search._evaluated(training, solver.weights, solver.architecture)
    relaxed_search._step(solver._weights_optimizer, solver.weights, gradients)
    solver.run(5)
    found = weights(model)
    # the finite difference divides rounding errors of gradients by 2 epsilon
    close = 1e-4 if order == "second_order" else CLOSE
    torch.testing.assert_close(found["alphas"], solver.architecture[0].detach(), atol=close, rtol=0)
    assert (found["alphas"] - mixed().alphas).abs().max() > 30 * close
    # the solver has taken one more step in the weights
    _, trainer_model = None, mixed()
    callback = ArchitectureSearchCallback(**METHODS[order], **PLAIN)
    again, _ = searched(tmp_path, callback, trainer_model, **{**WHOLE, "max_steps": 6})
    for name, w in zip(start, solver.weights, strict=True):
        torch.testing.assert_close(weights(again)[name], w.detach(), atol=close, rtol=0)


def test_second_order_differs_from_first_by_the_mixed_derivative(tmp_path):
    first, second = (
        weights(searched(tmp_path, ArchitectureSearchCallback(**METHODS[name], **PLAIN), **WHOLE)[0])["alphas"]
        for name in ("darts", "second_order")
    )
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_an_accumulation_is_one_step(method, tmp_path):
    results = [
        weights(searched(tmp_path, ArchitectureSearchCallback(**METHODS[method], **PLAIN), **options)[0])
        for options in (WHOLE, {**WHOLE, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    ]
    close = 1e-4 if method == "second_order" else CLOSE
    assert largest_difference(*results) < close
    assert largest_difference(results[0], weights(mixed())) > 100 * close


def test_adam_is_torchs(tmp_path):
    """The architecture's optimizer keeps its state in buffers; it is torch.optim.Adam."""
    callback = ArchitectureSearchCallback(architecture_lr=0.01, architecture_weight_decay=0.1)
    validation, training, start, architecture = losses_of(mixed(), callback)
    model, _ = searched(tmp_path, callback, **WHOLE)
    solver = RelaxedSearch(
        validation, training, list(start.values()), list(architecture.values()), architecture_passes="shared",
        weights_step=0.1, training_weights_step=0.1,
        architecture_step=lambda block: torch.optim.Adam(block, lr=0.01, betas=(0.5, 0.999), weight_decay=0.1),
    )  # fmt: skip
    solver.run(5)
    # Adam divides gradients by their size, and so their rounding errors
    torch.testing.assert_close(weights(model)["alphas"], solver.architecture[0].detach(), atol=1e-4, rtol=0)
    assert (weights(model)["alphas"] - mixed().alphas).abs().max() > 0.02


def test_each_copy_is_clipped_by_itself(tmp_path):
    callback = ArchitectureSearchCallback(**PLAIN, coupling=2.0)
    validation, training, start, architecture = losses_of(mixed(), callback)
    model, _ = searched(tmp_path, callback, **{**WHOLE, "max_steps": 1}, max_grad_norm=0.01)
    solver = RelaxedSearch(
        validation, training, list(start.values()), list(architecture.values()), coupling=2.0,
        weights_step=0.1, training_weights_step=0.1, architecture_step=0.5, architecture_passes="shared",
    )  # fmt: skip
    y0 = [y.detach().clone() for y in solver.training_weights]
    gradients = []
    for loss in (validation, training):
        found = torch.autograd.grad(loss(y0_ := [y.requires_grad_() for y in y0], solver.architecture), y0_)
        size = torch.stack([g.norm() for g in found]).norm()
        gradients.append([g * (0.01 / size) for g in found])
    for name, y, at_w, at_y in zip(start, y0, *gradients, strict=True):
        w = y - 0.1 * at_w
        expected = y - 0.1 * (at_y + 2.0 * (y - w))
        torch.testing.assert_close(weights(model)[name], expected.detach(), atol=1e-7, rtol=0)
    # alpha's gradient is not clipped
    solver.step()
    torch.testing.assert_close(weights(model)["alphas"], solver.architecture[0].detach(), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_ends_in_the_same_weights(method, tmp_path):
    """Bit for bit, with momentum, a schedule and two epochs in between."""
    options = {
        "max_steps": 7, "save_strategy": "steps", "save_steps": 3, "optim_args": "momentum=0.9",
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }  # fmt: skip

    def make():
        return ArchitectureSearchCallback(**METHODS[method], architecture_lr=0.01, coupling=(0.5, 2.0), warmup=2)

    model, _ = searched(tmp_path, make(), mixed(with_norm=True), **options)
    expected = weights(model)
    again = mixed(with_norm=True)
    trainer = search_trainer(again, make(), tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = weights(again)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(expected["alphas"], mixed().alphas)


def test_a_replaced_callback_goes_on(tmp_path):
    """With restored callbacks, Trainer makes a new object, which finds the validation half and the arguments."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "restore_callback_states_from_checkpoint": True,
    }
    expected = weights(searched(tmp_path, ArchitectureSearchCallback(architecture_lr=0.01), **options)[0])
    model = mixed()
    trainer = search_trainer(model, ArchitectureSearchCallback(architecture_lr=0.5), tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(model), expected) == 0.0


def test_copies_keep_their_own_statistics_and_count_only_their_own_steps(tmp_path):
    seen = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model = kwargs["model"]
            copied = state_in(model).network
            seen["model"], seen["copy"] = (copy.deepcopy(m.norm.state_dict()) for m in (model, copied))

    for passes in ("shared", "fresh"):
        trainer = search_trainer(mixed(with_norm=True), ArchitectureSearchCallback(passes=passes), tmp_path)
        trainer.add_callback(Look())
        trainer.train()
        assert seen["model"]["num_batches_tracked"] == seen["copy"]["num_batches_tracked"] == 6
        assert (seen["model"]["running_mean"] - seen["copy"]["running_mean"]).abs().max() > 1e-4
    for order in ("darts", "second_order"):
        model, _ = searched(tmp_path, ArchitectureSearchCallback(**METHODS[order]), mixed(with_norm=True))
        assert model.norm.num_batches_tracked == 6


def test_the_two_copies_share_one_architecture_and_the_final_model_is_clean(tmp_path):
    model, names = mixed(), {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            network = state_in(kwargs["model"]).network
            assert network.alphas is kwargs["model"].alphas and "alphas" not in dict(network.named_parameters())
            names.update(dict(kwargs["model"].named_parameters()))

    trainer = search_trainer(model, ArchitectureSearchCallback(), tmp_path, save_strategy="steps", save_steps=6)
    trainer.add_callback(Look())
    trainer.train()
    assert sum(name.startswith(NAME) for name in names) == len(list(mixed().parameters())) - 1
    assert weights(model).keys() == weights(mixed()).keys() and model.alphas.requires_grad
    assert not model._ddp_params_and_buffers_to_ignore
    assert state_in(model) is None


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, size: int) -> None:
        self.now -= size


def peak(folder, make, callback, batch) -> int:
    settings = {"optim_args": "momentum=0.9", "per_device_train_batch_size": batch, "max_steps": 2}
    with Peak() as measured:
        model = make()
        is_plain = callback is None
        callback = callback or ArchitectureSearchCallback()
        trainer = search_trainer(model, callback, folder, **settings)
        if is_plain:
            trainer.callback_handler.callbacks.remove(callback)
            callback.detach(model)
        gc.collect()
        measured.peak = measured.now
        trainer.train()
    return measured.peak


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["heavy_weights", "heavy_activations"])
def test_memory(method, kind, tmp_path):
    """Twice the weights with what training adds to each (gradient, momentum), and the activations of one model."""

    def make():
        torch.manual_seed(0)
        return Mixed(width=96 if kind == "heavy_weights" else 24)

    batch = 1 if kind == "heavy_weights" else 16
    size = sum(p.numel() * p.element_size() for p in make().parameters())
    plain = peak(tmp_path, make, None, batch)
    found = peak(tmp_path, make, ArchitectureSearchCallback(**METHODS[method]), batch)
    activations = plain - 3 * size
    assert (activations < 0.2 * size) if kind == "heavy_weights" else (activations > 1.5 * size)
    assert found <= 2.1 * 3 * size + activations
    if method != "darts":
        assert found > 4 * size + activations  # the second copy is really counted


def test_logs_reach_the_reporters_and_the_history(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = ArchitectureSearchCallback(training_weight=2.0, coupling=3.0, architecture_lr=0.05)
    model = mixed()
    trainer = search_trainer(model, callback, tmp_path, logging_steps=3)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    report_first(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "search_objective" in entry]
    assert len(entries) >= 2 and len([logs for logs in seen if "search_objective" in logs]) == len(entries)
    for entry in entries[:2]:
        assert entry["search_objective"] == pytest.approx(
            entry["search_validation_loss"] + 2 * entry["search_training_loss"] + 1.5 * entry["search_distance"] ** 2,
            rel=1e-5,
        )
        assert entry["search_training_loss"] == pytest.approx(entry["loss"], rel=1e-4)  # Trainer rounds it
        assert entry["search_distance"] > 0 and 0 < entry["architecture_entropy"] <= 1.0986124  # log 3
        for block in ("weights", "training_weights", "architecture"):
            assert entry[f"search_gradient_{block}"] > 0
    assert torch.equal(torch.tensor(entries[-1]["architecture"]["alphas"]), model.alphas.detach())


def test_the_logged_distance_is_that_of_the_copies(tmp_path):
    found = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            search = state_in(kwargs["model"])
            found.append(float(squared_distance(*search.pairs(kwargs["model"])).sqrt()))

    trainer = search_trainer(mixed(), ArchitectureSearchCallback(), tmp_path, logging_steps=1)
    trainer.add_callback(Look())
    trainer.train()
    logged = [entry["search_distance"] for entry in trainer.state.log_history if "search_distance" in entry]
    assert logged == pytest.approx(found, rel=1e-6) and found[0] < found[-1]


def test_warmup_leaves_the_architecture_alone(tmp_path):
    for method in METHODS.values():
        model, _ = searched(tmp_path, ArchitectureSearchCallback(**method, warmup=1.0 * 6), max_steps=6)
        assert torch.equal(model.alphas, mixed().alphas)


def test_halves_share_no_item_and_miss_none():
    callback = ArchitectureSearchCallback(split=0.3, split_seed=4)
    training = callback.halve(Images(4, 50))
    assert (len(training), len(callback.validation_dataset)) == (15, 35)
    assert sorted([*training.indices, *callback.validation_dataset.indices]) == list(range(50))
    table = datasets.Dataset.from_dict({"labels": list(range(50)), "other": ["x"] * 50})
    half = callback.halve(table)
    assert isinstance(half, datasets.Dataset)
    assert sorted([*half["labels"], *callback.validation_dataset["labels"]]) == list(range(50))
    assert half["labels"] == training.indices


def test_a_datasets_half_loses_the_columns_that_trainer_drops(tmp_path):
    data = Images(4, 32)
    columns = {name: [data[i][name] for i in range(32)] for name in ("pixel_values", "labels")}
    table = datasets.Dataset.from_dict({**columns, "name": ["x"] * 32}).with_format("torch")
    callback, model = ArchitectureSearchCallback(**PLAIN), mixed()
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no"
    )
    transformers.Trainer(model, options, train_dataset=callback.halve(table), callbacks=[callback]).train()
    assert not torch.equal(model.alphas, mixed().alphas)


class Unreadable(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {}


@pytest.mark.parametrize(("split", "length"), [(0.01, 32), (0.99, 32), (0.5, 1)])
def test_an_empty_half_is_refused(split, length):
    with pytest.raises(DataError, match=r"split=.* leaves the (training|validation) half empty"):
        ArchitectureSearchCallback(split=split).halve(Images(4, length))


def test_data_without_a_length_is_refused():
    with pytest.raises(DataError, match="without a length"):
        ArchitectureSearchCallback().halve(Unreadable())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 7)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_models_that_cannot_be_searched_are_refused_before_training(tmp_path):
    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            searched(tmp_path, ArchitectureSearchCallback(**options), model)

    refused(ModelError, "architecture_parameters", Plain())
    refused(ModelError, "matches no parameter", mixed(), architecture="betas*")
    foreign = mixed()
    foreign.architecture_parameters = lambda: {"x": nn.Parameter(torch.zeros(2))}
    refused(ModelError, "no parameter of the model", foreign)
    foreign.architecture_parameters = dict
    refused(ModelError, "is empty", foreign)
    broken = mixed()
    broken.stem.weight.data[0] = float("nan")
    refused(ModelError, "NaN", broken)
    fixed = mixed()
    for name, parameter in fixed.named_parameters():
        parameter.requires_grad_(name == "alphas")
    refused(ModelError, "no weights to train", fixed)


def test_a_missing_or_unused_half_is_refused(tmp_path):
    callback = ArchitectureSearchCallback()
    with pytest.raises(MethodError, match="no validation half"):
        search_trainer(mixed(), callback, tmp_path, halve=False).train()
    callback.halve(Images(4, 32))
    with pytest.raises(MethodError, match="trains on 32 items, and not on the training half of 16"):
        search_trainer(mixed(), callback, tmp_path, halve=False).train()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nas"},
        {"split": 1.0},
        {"split": 0},
        {"training_weight": 0},
        {"coupling": (1.0, 2.0, 3.0)},
        {"coupling": "1"},
        {"coupling": (1.0, -1.0)},
        {"passes": "none"},
        {"architecture_lr": 0.0},
        {"architecture_optimizer": "lbfgs"},
        {"architecture_betas": (0.5,)},
        {"architecture_betas": (0.5, 1.0)},
        {"architecture_weight_decay": -1},
        {"warmup": -1},
    ],
    ids=str,
)
def test_arguments_that_are_refused(options, tmp_path):
    with pytest.raises(MethodError, match=next(iter(options))):
        search_trainer(
            mixed(), ArchitectureSearchCallback(**options, validation_dataset=Images(4)), tmp_path, halve=False
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"fsdp": True}, "DDP"), ({"fp16": True}, "bf16")],
)
def test_trainer_settings_that_are_refused(setting, message, tmp_path):
    callback = ArchitectureSearchCallback()
    trainer = search_trainer(mixed(), callback, tmp_path)
    for name, value in setting.items():
        setattr(trainer.args, name, value)
    state, control = trainer.state, trainer.control
    with pytest.raises(MethodError, match=message):
        callback.on_train_begin(
            trainer.args, state, control, model=trainer.model, optimizer=None, train_dataloader=None
        )


def test_an_optimizer_made_before_the_search_is_refused(tmp_path):
    callback, model = ArchitectureSearchCallback(), mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = search_trainer(model, callback, tmp_path)
    trainer.optimizer = optimizer
    with pytest.raises(MethodError, match=r"attach\(model\)"):
        trainer.train()


def test_a_second_search_on_one_model_is_refused_and_one_after_the_other_is_not(tmp_path):
    model = mixed()
    search_trainer(model, ArchitectureSearchCallback(), tmp_path)
    callback = ArchitectureSearchCallback("darts")
    with pytest.raises(MethodError, match="state of another search"):
        search_trainer(model, callback, tmp_path)
    callback.detach(model)
    searched(tmp_path, callback, model)
    searched(tmp_path, ArchitectureSearchCallback(), model)
    assert state_in(model) is None


def test_resuming_without_the_searchs_state_says_so(tmp_path, caplog):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    searched(tmp_path, ArchitectureSearchCallback("darts"), **options)
    transformers.utils.logging.enable_propagation()
    try:
        trainer = search_trainer(mixed(), ArchitectureSearchCallback(), tmp_path, **options)
        trainer.model._keys_to_ignore_on_save = None  # Trainer asks a PreTrainedModel for it
        # the second copy has no state in that optimizer's checkpoint
        (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
        file = tmp_path / "checkpoint-1" / "model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({name: value for name, value in load_file(file).items() if "hf_compress" not in name}, file)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        transformers.utils.logging.disable_propagation()
    assert "holds no state of this search" in caplog.text


def test_patterns_name_the_architecture_of_any_model(tmp_path):
    model = mixed()
    del type(model).architecture_parameters
    try:
        searched(tmp_path, ArchitectureSearchCallback(architecture="alph*", architecture_lr=0.05), model)
    finally:
        Mixed.architecture_parameters = lambda self: {"alphas": self.alphas}
    assert (model.alphas - mixed().alphas).abs().max() > 0.05


def test_arguments_survive_a_checkpoint():
    import json

    callback = ArchitectureSearchCallback(coupling=(1.0, 5.0), architecture=("a", "b"), validation_dataset=[1])
    state = json.loads(json.dumps(callback.state()))
    again = ArchitectureSearchCallback.from_state(state)
    assert again.state() == callback.state() and "validation_dataset" not in state["args"]


def supernet() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = DartsSupernetConfig(
        num_cells=2, nodes=1, width=4, stem_multiplier=1, num_labels=7, image_size=8, reduction_cells=[1]
    )
    return DartsSupernetForImageClassification(config)


@pytest.mark.parametrize("method", METHODS)
def test_a_transformers_supernet_is_searched_resumed_and_derived(method, tmp_path):
    """Trainer loads the best checkpoint and resumes; the final model is an ordinary one that derives another."""
    options = {"size": 8, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim_args": "momentum=0.9"}

    def make():
        return ArchitectureSearchCallback(**METHODS[method], architecture_lr=0.1)

    model, trainer = searched(tmp_path, make(), supernet(), **options, eval_strategy="steps", eval_steps=2)
    expected = weights(model)
    assert expected.keys() == weights(supernet()).keys()
    again = supernet()
    resumed = search_trainer(again, make(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(again), expected) == 0.0
    trainer.save_model(str(tmp_path / "final"))
    loaded, report = DartsSupernetForImageClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert loaded.genotype() == model.genotype()
    for alpha, first in zip(
        model.architecture_parameters().values(), supernet().architecture_parameters().values(), strict=True
    ):
        assert (alpha - first).abs().max() > 0.1
    history = [entry for entry in trainer.state.log_history if "architecture" in entry]
    assert history[-1]["architecture"].keys() == {"supernet.alphas.normal", "supernet.alphas.reduce"}
    discrete = model.derive(num_cells=3)
    out = discrete(pixel_values=torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert discrete.config.genotype == model.genotype()


def test_a_model_trained_in_bf16_before_has_a_copy_of_its_own(tmp_path):
    """Accelerate leaves the instance a forward of its own; the copy's must run the copy."""
    model = mixed()
    options = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        bf16=True,
    )
    transformers.Trainer(model, options, train_dataset=Images(4, 32)).train()
    assert "forward" in vars(model)  # else there is nothing to test
    searched(tmp_path, ArchitectureSearchCallback(architecture_lr=0.1), model, bf16=True)
    moved = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            network = state_in(model).network
            pixels = torch.randn(4, 3, 4, 4)
            moved.append((network(pixels)["logits"] - model(pixels)["logits"]).abs().max().item())

    trainer = search_trainer(model, ArchitectureSearchCallback(), tmp_path, bf16=True, learning_rate=0.5)
    trainer.add_callback(Look())
    trainer.train()
    assert moved[-1] > 1e-2  # two networks answer
    network_gets_gradients = [
        e["search_gradient_weights"] for e in trainer.state.log_history if "search_objective" in e
    ]
    assert all(norm > 0 for norm in network_gets_gradients)


class Recorded(Images):
    def __init__(self, *args):
        super().__init__(*args)
        self.asked: list[int] = []

    def __getitem__(self, i):
        self.asked.append(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_goes_once_through_both_halves(method, accumulation, tmp_path):
    data, callback = Recorded(4, 32), ArchitectureSearchCallback(**METHODS[method])
    options = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    half = callback.halve(data)
    transformers.Trainer(mixed(), options, train_dataset=half, callbacks=[callback]).train()
    validation = callback.validation_dataset.indices
    for part in (half.indices, validation):
        asked = [i for i in data.asked if i in part]
        first, second = asked[:16], asked[16:]
        assert sorted(first) == sorted(second) == sorted(part)
        assert first != second  # another order


def test_a_loss_that_the_model_does_not_return_is_refused_in_the_first_step(tmp_path):
    """It cannot be known before: the callback does not see Trainer's loss function."""
    callback, model = ArchitectureSearchCallback(), mixed()
    trainer = search_trainer(model, callback, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: nn.functional.cross_entropy(outputs["logits"], labels)
    with pytest.raises(MethodError, match="compute_loss_func"):
        trainer.train()
    assert torch.equal(model.stem.weight, mixed().stem.weight)
