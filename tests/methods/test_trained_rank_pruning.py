import copy
import math

import pytest
import torch
import transformers
from families import FAMILIES
from slimming_training import (
    SCALED_INPUTS,
    Classifier,
    Images,
    largest_difference,
    make_trainer,
    scaled_classifier,
    weights,
)
from torch import nn

from hf_compress.errors import MethodError, ModelError, NothingToShrinkError
from hf_compress.methods import NetworkSlimmingCallback, ProximalSlimmingCallback, report_first
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback
from hf_compress.surgery import decomposition
from hf_compress.surgery.decomposition import SCHEMES, fold, rank_for_energy, unfold
from hf_compress.surgery.factorize import factorize, factorize_report
from hf_compress.surgery.low_rank import numerical_rank


class Convolutions(nn.Module):
    """Without BatchNorm, so that accumulated batches are the same function of the weights as one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.plain = nn.Conv2d(6, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hidden = nn.Linear(8, 9)
        self.head = nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.tanh(self.plain(torch.tanh(self.stem(x)))))
        return self.head(torch.tanh(self.hidden(torch.tanh(self.depthwise(x)).mean((2, 3)))))


def convolutions() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Convolutions())


def pruned(folder, callback, model=None, **options):
    model = model or convolutions()
    trainer = make_trainer(model, [callback], folder, size=6, length=8, **options)
    trainer.train()
    return model, trainer


def by_hand(names, scheme, energy, period, nuclear, *, every_step=False, steps=6, lr=0.1, momentum=0.0, clip=0.0):
    """Equations 2 to 6 with LAPACK's decomposition, on the whole data as one batch; and what is cut off at the end."""
    model = convolutions()
    modules = dict(model.named_modules())
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    items = [Images(6, 8)[i] for i in range(8)]
    pixels = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([item["labels"] for item in items])
    added, ranks = {}, {}

    def truncate(name, lowest=1):
        module = modules[name]
        matrices = unfold(module.weight.detach(), scheme, getattr(module, "groups", 1))
        u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
        rank = rank_for_energy(s, energy).clamp(min=lowest)
        kept = torch.arange(s.shape[-1]) < rank[..., None]
        with torch.no_grad():
            module.weight.copy_(fold((u * (s * kept)[..., None, :]) @ vh, module.weight.shape, scheme))
        added[name] = fold((u * kept[..., None, :]) @ vh, module.weight.shape, scheme)
        ranks[name] = int(rank.max())

    for t in range(steps):
        if t % period == 0:
            for name in names:
                truncate(name)
        optimizer.zero_grad()
        model(pixels, labels)["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name in names if every_step or t % period == 0 else ():
            modules[name].weight.grad += nuclear * added[name]
        optimizer.step()
    for name in names:
        truncate(name, ranks[name])
    return weights(model)


DEFAULT_TARGETS = {
    "channel": ["body.plain", "body.grouped", "body.hidden"],  # a depthwise filter is a row already
    "spatial": ["body.plain", "body.grouped", "body.depthwise", "body.hidden"],
    "decoupled": ["body.plain", "body.grouped", "body.hidden"],
}
# float32 against float64 truncations: rounding, amplified where singular values are near each other
CLOSE = 2e-5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("nuclear_steps", ["truncation", "all"])
def test_the_update_is_the_papers(scheme, nuclear_steps, tmp_path):
    callback = TrainedRankPruningCallback(0.1, 3, scheme, 0.05, nuclear_steps=nuclear_steps)
    options = {"optim_args": "momentum=0.9", "max_steps": 8, "learning_rate": 0.05}
    model, _ = pruned(tmp_path, callback, **options)
    assert list(callback.targets_) == DEFAULT_TARGETS[scheme]
    expected = by_hand(
        callback.targets_, scheme, 0.1, 3, 0.05, every_step=nuclear_steps == "all", steps=8, lr=0.05, momentum=0.9
    )
    assert largest_difference(weights(model), expected) < CLOSE
    without = by_hand(callback.targets_, scheme, 0.1, 3, 0.0, steps=8, lr=0.05, momentum=0.9)
    assert largest_difference(weights(model), without) > 1e-3


def test_clipping_does_not_clip_the_nuclear_norm(tmp_path):
    callback = TrainedRankPruningCallback(0.1, 2, nuclear=0.1)
    model, _ = pruned(tmp_path, callback, max_grad_norm=1e-3)
    expected = by_hand(DEFAULT_TARGETS["channel"], "channel", 0.1, 2, 0.1, clip=1e-3)
    assert largest_difference(weights(model), expected) < CLOSE


@pytest.mark.parametrize("nuclear_steps", ["truncation", "all"])
def test_an_accumulation_is_one_step(nuclear_steps, tmp_path):
    results = [
        pruned(tmp_path, TrainedRankPruningCallback(0.1, 3, nuclear=0.05, nuclear_steps=nuclear_steps), **options)[0]
        for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    ]
    assert largest_difference(*map(weights, results)) < CLOSE


def test_weights_have_low_rank_at_the_forward_pass_only_then(tmp_path):
    """Where the dossier has it: the model runs with truncated weights, and leaves them in the same step."""
    model, ranks = convolutions(), []

    def look(module, args):
        if module.training:
            s = torch.linalg.svdvals(module.weight.detach().flatten(1).double())
            ranks.append(int((s > 1e-5 * s[0]).sum()))

    model.body.plain.register_forward_pre_hook(look)
    pruned(tmp_path, TrainedRankPruningCallback(0.2, 2), model, max_steps=5)
    assert all(rank < 8 for rank in ranks[::2]) and ranks[1::2] == [8, 8]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_end_at_the_ranks_of_the_last_truncation(scheme, tmp_path):
    """To the last digit: factors of these ranks are found without being asked for, and change nothing."""
    callback = TrainedRankPruningCallback(0.3, 4, scheme, targets=["body.plain", "body.hidden"])
    model, _ = pruned(tmp_path, callback, max_steps=7)
    assert callback.truncated_at_ == 4  # three steps went by since
    layers = {name: model.get_submodule(name) for name in callback.targets_}
    assert {name: numerical_rank(layer.weight, scheme, 1) for name, layer in layers.items()} == callback.ranks_
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        before = model.body(x)
        factorize(
            model, macs=1.0, scheme=scheme, targets=["body.plain", "body.hidden"], example_inputs={"pixel_values": x}
        )
        after = model.body(x)
    report = factorize_report(model)
    assert report.ranks and report.ranks.items() <= callback.ranks_.items()
    assert all(layer.lost == 0 for layer in report.layers if layer.rank)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)  # rounding of float32


def test_the_last_truncation_survives_a_checkpoint(tmp_path):
    """The last one before the checkpoint is the last of the training as well."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 7}
    whole, _ = pruned(tmp_path / "whole", TrainedRankPruningCallback(0.3, 6), **options)
    callback = TrainedRankPruningCallback(0.3, 6)
    model = convolutions()
    trainer = make_trainer(model, [callback], tmp_path / "resumed", size=6, length=8, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert callback.ranks_ and largest_difference(weights(model), weights(whole)) == 0.0


def test_the_end_loses_no_more_than_the_energy(tmp_path):
    """Where weights of a higher rank came back, as load_best_model_at_end may bring them."""

    class BringsBack(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.load_state_dict(convolutions().state_dict())

    callback = TrainedRankPruningCallback(0.1, 4, targets="body.plain")
    model = convolutions()
    trainer = make_trainer(model, [BringsBack(), callback], tmp_path, size=6, length=8, max_steps=6)
    trainer.train()
    whole, left = (unfold(m.body.plain.weight.detach().double(), "channel") for m in (convolutions(), model))
    lost = (whole - left).square().sum() / whole.square().sum()
    assert 0 < lost <= 0.1


def test_factors_are_the_gradient_of_the_nuclear_norm(tmp_path):
    """For full rank: U V^T is what autograd says; the loss's gradient is clipped away."""
    model = convolutions()
    before, weight = model.body.plain.weight.detach().clone(), model.body.plain.weight
    torch.linalg.matrix_norm(weight.flatten(1).double(), "nuc").backward()
    expected = before - 0.1 * 0.3 * weight.grad
    weight.grad = None
    # so little energy that nothing is dropped
    callback = TrainedRankPruningCallback(1e-6, nuclear=0.3, targets="body.plain")
    pruned(tmp_path, callback, model, max_steps=1, max_grad_norm=1e-9)
    torch.testing.assert_close(model.body.plain.weight.detach(), expected, atol=1e-6, rtol=0)


def test_nothing_dropped_leaves_the_weights_bit_for_bit(tmp_path):
    plain, _ = pruned(tmp_path, transformers.TrainerCallback())
    model, _ = pruned(tmp_path, TrainedRankPruningCallback(1e-9, 1))
    assert largest_difference(weights(model), weights(plain)) == 0.0


# -- steps that fp16 skips -----------------------------------------------------------------------------------------------


class SkipSome(transformers.TrainerCallback):
    """Mixed precision finds an overflow at some steps."""

    def __init__(self, skipped):
        self.skipped = skipped

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        inner, step = optimizer.optimizer, optimizer.optimizer.step

        def maybe(*args, **kwargs):
            optimizer._is_overflow = state.global_step in self.skipped
            return None if optimizer._is_overflow else step(*args, **kwargs)

        inner.step = maybe


@pytest.mark.parametrize("nuclear_steps", ["truncation", "all"])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("skipped", [{0, 1, 2}, {3}, {2, 4}])
def test_skipped_steps_do_not_count(skipped, period, nuclear_steps, tmp_path):
    """The same weights as without them: no second truncation before a step, and no subgradient lost."""
    results = []
    for skips in (set(), skipped):
        callback, model = TrainedRankPruningCallback(0.1, period, nuclear=0.05, nuclear_steps=nuclear_steps), None
        model = convolutions()
        make_trainer(
            model, [SkipSome(skips), callback], tmp_path, size=6, length=8, max_steps=6 + len(skips), logging_steps=50
        ).train()
        results.append((weights(model), callback.steps_))
    assert results[1][1] == results[0][1] == 6
    assert largest_difference(results[0][0], results[1][0]) < CLOSE  # batches are shuffled, so sums differ in order


def test_the_count_survives_skipped_steps_and_a_checkpoint(tmp_path):
    """Three of the first four steps were skipped, so the next truncation is not where global_step would have it."""
    options = {"size": 6, "length": 64, "max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = convolutions()
        callback = TrainedRankPruningCallback(0.1, 3, nuclear=0.05)
        trainer = make_trainer(model, [SkipSome({0, 2, 3}), callback], tmp_path, **options)
        trainer.train(resume_from_checkpoint=resume)
        found.append(weights(model))
        assert callback.steps_ == 6 and callback.truncated_at_ == 3
    assert largest_difference(*found) == 0.0


def test_two_callbacks_find_their_own_counts(tmp_path):
    """Trainer appends the states of callbacks of one class at every save, so the newest are at the end."""
    options = {"size": 6, "length": 64, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = convolutions()
        first = TrainedRankPruningCallback(0.1, 2, nuclear=0.05, targets="body.plain")
        second = TrainedRankPruningCallback(0.2, 3, nuclear=0.02, nuclear_steps="all", targets="Linear")
        make_trainer(model, [first, second], tmp_path, **options).train(resume_from_checkpoint=resume)
        found.append(weights(model))
        assert (first.truncated_at_, second.truncated_at_) == (6, 6) and first.steps_ == second.steps_ == 7
    assert largest_difference(*found) == 0.0


# -- which layers ---------------------------------------------------------------------------------------------------------


def found_targets(model, scheme="channel", **options):
    return set(TrainedRankPruningCallback(0.1, 2, scheme, **options).ranks(model))


def test_targets_by_class_and_pattern():
    model = convolutions()
    everything = {"body.stem", "body.plain", "body.grouped", "body.hidden", "body.head"}
    assert found_targets(model) == everything - {"body.stem", "body.head"}
    assert found_targets(model, targets=["Conv2d", nn.Linear]) == everything
    assert found_targets(model, targets=nn.Conv2d) == {"body.stem", "body.plain", "body.grouped"}
    assert found_targets(model, targets=["body.s*", "Linear"]) == {"body.stem", "body.hidden", "body.head"}
    assert found_targets(model, targets="Linear", exclude="*.head") == {"body.hidden"}
    assert found_targets(model, targets="*", exclude=nn.Linear) == {"body.stem", "body.plain", "body.grouped"}
    model.body.hidden.weight.requires_grad_(False)
    assert found_targets(model, targets="Linear") == {"body.head"}


def test_a_vit_has_its_projections_and_its_mlps():
    model, _ = FAMILIES["vit"]()
    found = found_targets(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert found == set(linear[:-1]) and len(found) > 4


@pytest.mark.parametrize("option", ["targets", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_before_training(option, tmp_path):
    callback = TrainedRankPruningCallback(0.1, **{option: ["Conv2d", "encoder.*"]})
    with pytest.raises(NothingToShrinkError, match=rf"{option}='encoder\.\*' matches no layer.*body\.stem"):
        pruned(tmp_path, callback)


def test_layers_that_cannot_be_decomposed_are_named(tmp_path):
    with pytest.raises(NothingToShrinkError, match=r"'body\.depthwise': its matrices have rank 1 already"):
        pruned(tmp_path, TrainedRankPruningCallback(0.1, targets="body.depthwise"))
    model = convolutions()
    model.body.hidden = nn.Linear(8, 8)
    model.body.other = model.body.hidden
    model.body.copy = nn.Linear(8, 8)
    model.body.copy.weight = model.body.hidden.weight
    with pytest.raises(NothingToShrinkError, match=r"'body\.copy': its weight is also 'body\.hidden\.weight'"):
        found_targets(model, targets="body.copy")
    with pytest.raises(NothingToShrinkError, match="no convolution or linear layer"):
        found_targets(Classifier(nn.Flatten()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy=0.0 .*between 0 and 1"),
        ({"energy": 1.0}, "energy=1.0"),
        ({"energy": math.nan}, "energy=nan"),
        ({"energy": True}, "energy=True"),
        ({"energy": "0.1"}, "energy='0.1'"),
        ({"period": 0}, "period=0 .*at least 1"),
        ({"period": 2.5}, "period=2.5"),
        ({"period": -3}, "period=-3"),
        ({"scheme": "tucker"}, "scheme='tucker' .*channel, spatial, decoupled"),
        ({"nuclear": -1e-4}, "nuclear=-0.0001"),
        ({"nuclear": math.inf}, "nuclear=inf"),
        ({"nuclear_steps": "never"}, "nuclear_steps='never'"),
    ],
)
def test_bad_settings_are_refused_when_the_trainer_is_made(options, message, tmp_path):
    with pytest.raises(MethodError, match=message):
        make_trainer(convolutions(), [TrainedRankPruningCallback(**options)], tmp_path)


# -- limits --------------------------------------------------------------------------------------------------------------


def test_no_layer_loses_its_last_rank(tmp_path):
    """Whatever energy is dropped, over and over."""
    callback = TrainedRankPruningCallback(0.999, 1, targets=["Conv2d", "Linear"])
    model, trainer = pruned(tmp_path, callback, max_steps=12)
    assert set(callback.ranks(model).values()) == {1}
    logged = [value for entry in trainer.state.log_history for key, value in entry.items() if key.startswith("rank/")]
    assert logged and min(logged) >= 1
    assert all(module.weight.any() for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


def test_a_nuclear_norm_that_takes_everything_is_stopped(tmp_path):
    callback = TrainedRankPruningCallback(0.1, 1, nuclear=3.0, targets="body.hidden")
    with pytest.raises(MethodError, match=r"nuclear=3.0 drives 'body\.hidden' to rank 0.*Lower nuclear"):
        pruned(tmp_path, callback, max_steps=60)


def test_layers_that_start_at_zero_may_grow(tmp_path):
    model = convolutions()
    nn.init.zeros_(model.body.head.weight)
    callback = TrainedRankPruningCallback(0.1, 2, nuclear=1e-3, targets=["body.head", "body.plain"])
    pruned(tmp_path, callback, model)
    assert model.body.head.weight.any() and model.body.head.weight.isfinite().all()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = convolutions()
    with torch.no_grad():
        model.body.plain.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"body\.plain\.weight"):
        pruned(tmp_path, TrainedRankPruningCallback(0.1), model)


@pytest.mark.filterwarnings("ignore:the decomposition:RuntimeWarning")  # squares overflow before the weights do
def test_a_training_that_diverges_names_the_layer(tmp_path):
    with pytest.raises(ModelError, match=r"'body\.plain' holds NaN.*Lower the learning rate"):
        pruned(tmp_path, TrainedRankPruningCallback(0.1, 1, targets="body.plain"), learning_rate=1e38, max_steps=20)


def test_a_failed_decomposition_is_loud_and_changes_nothing(tmp_path, monkeypatch):
    expected, _ = pruned(tmp_path, TrainedRankPruningCallback(0.1, 3, nuclear=0.05))

    def broken(matrices):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(decomposition, "_gram", broken)
    with pytest.warns(RuntimeWarning, match=r"'body\.(plain|grouped|hidden)' failed"):
        model, _ = pruned(tmp_path, TrainedRankPruningCallback(0.1, 3, nuclear=0.05))
    assert largest_difference(weights(model), weights(expected)) < CLOSE


def test_half_precision_parameters(tmp_path):
    model = convolutions().to(torch.bfloat16)
    callback = TrainedRankPruningCallback(0.1, 2, nuclear=0.05, nuclear_steps="all")
    pruned(tmp_path, callback, model, bf16=True)
    assert model.body.plain.weight.dtype == torch.bfloat16 and model.body.plain.weight.isfinite().all()


# -- what it says and leaves behind ---------------------------------------------------------------------------------------


def test_logs(tmp_path):
    callback = TrainedRankPruningCallback(0.1, 2)
    model, trainer = pruned(tmp_path, callback, learning_rate=0.0, max_steps=2, logging_steps=2)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    full = {"body.plain": 8, "body.grouped": 4, "body.hidden": 8}
    assert {key[5:] for key in entry if key.startswith("rank/")} == set(full)
    assert entry["rank_share"] == pytest.approx(sum(entry[f"rank/{k}"] / n for k, n in full.items()) / 3)
    parts = [unfold(module.weight.detach(), "channel", getattr(module, "groups", 1)) for module in (
        model.body.plain, model.body.grouped, model.body.hidden
    )]  # fmt: skip
    norm = sum(float(torch.linalg.matrix_norm(part, "nuc").sum()) for part in parts)
    assert entry["nuclear_norm"] == pytest.approx(norm, rel=1e-5)


def test_reporters_get_the_ranks(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(convolutions(), [Reporter(), TrainedRankPruningCallback(0.1, 2)], tmp_path, size=6, length=8)
    report_first(trainer)
    trainer.train()
    assert any("rank/body.plain" in logs and "rank_share" in logs for logs in seen)


def test_ranks_are_those_of_the_energy_rule(tmp_path):
    for scheme in SCHEMES:
        callback = TrainedRankPruningCallback(0.1, 2, scheme)
        model, _ = pruned(tmp_path, callback)
        modules = dict(model.named_modules())
        for energy in (None, 0.3):
            for name, rank in callback.ranks(model, energy).items():
                matrices = unfold(modules[name].weight.detach().double(), scheme, getattr(modules[name], "groups", 1))
                s = torch.linalg.svdvals(matrices)
                assert rank == int(rank_for_energy(s, energy or 0.1).max())
    with pytest.raises(MethodError, match="energy=0"):
        callback.ranks(model, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factorize_takes_the_ranks(scheme, tmp_path):
    """Two layers of these ranks are the model with its weights truncated to them."""
    model, inputs = FAMILIES["resnet_basic"]()
    callback = TrainedRankPruningCallback(0.3, 2, scheme)
    make_trainer(model, [callback], tmp_path, size=inputs.shape[-1]).train()
    model.eval()
    ranks, small = callback.ranks(model), copy.deepcopy(model)
    factorize(small, scheme=scheme, ranks=ranks)
    with torch.no_grad():
        for name, rank in ranks.items():
            weight = model.get_submodule(name).weight
            u, s, vh = decomposition.svd(unfold(weight, scheme))
            kept = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
            weight.copy_(fold(kept, weight.shape, scheme))
        # float32, and two convolutions in the place of one
        torch.testing.assert_close(small(inputs).logits, model(inputs).logits, atol=1e-4, rtol=1e-4)
    assert factorize_report(small).ranks == ranks


def test_layers_of_one_shape_are_decomposed_together(tmp_path, monkeypatch):
    from hf_compress.methods import trained_rank_pruning

    calls, svd = [], trained_rank_pruning.svd
    monkeypatch.setattr(trained_rank_pruning, "svd", lambda m, **k: (calls.append(tuple(m.shape)), svd(m, **k))[1])
    model, inputs = FAMILIES["vit"]()
    callback = TrainedRankPruningCallback(0.1, 10)
    make_trainer(model, [callback], tmp_path, size=inputs.shape[-1], max_steps=1).train()
    first, last = calls[: len(calls) // 2], calls[len(calls) // 2 :]  # before the step, and at the end
    assert first == last and len(first) <= 3 < len(callback.targets_) == sum(shape[0] for shape in first)


@pytest.mark.parametrize(
    "other",
    [
        lambda: NetworkSlimmingCallback("l1", 0.05, example_inputs=SCALED_INPUTS),
        lambda: ProximalSlimmingCallback(2.0, 1.0, example_inputs=SCALED_INPUTS),
    ],
    ids=["slimming", "proximal"],
)
def test_composes_with_methods_on_scales(other, tmp_path):
    """They act on other parameters: the order of the callbacks makes no difference."""
    found = []
    for order in (1, -1):
        model = scaled_classifier()
        callbacks = [TrainedRankPruningCallback(0.1, 2, nuclear=0.01, targets="Linear"), other()][::order]
        trainer = make_trainer(model, callbacks, tmp_path)
        trainer.train()
        assert any("rank_share" in entry and "sparsity" in entry for entry in trainer.state.log_history)
        found.append(weights(model))
    assert largest_difference(*found) == 0.0


def test_training_again_starts_again(tmp_path):
    callback = TrainedRankPruningCallback(0.1, 4, nuclear=0.05, nuclear_steps="all")
    model, trainer = pruned(tmp_path, callback)
    names = set(model.state_dict())
    trainer.train()
    assert callback.steps_ == 6 and callback.truncated_at_ == 4
    assert set(model.state_dict()) == names and not any("hf_compress" in name for name in names)


# -- what it is for --------------------------------------------------------------------------------------------------------


class Digits(torch.utils.data.Dataset):
    def __init__(self, part: slice) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[part]
        self.pixels = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
        self.labels = torch.tensor(data.target)[order]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def digits_model() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)))


def share_right(model: Classifier, data: Digits) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(data.pixels)["logits"].argmax(-1) == data.labels).float().mean())


@torch.no_grad()
def cut_to(model: nn.Module, ranks: dict[str, int]) -> None:
    for name, rank in ranks.items():
        weight = model.get_submodule(name).weight
        u, s, vh = decomposition.svd(unfold(weight, "channel"))
        weight.copy_(fold((u[:, :rank] * s[:rank]) @ vh[:rank], weight.shape, "channel"))


@pytest.mark.slow
def test_trained_ranks_survive_truncation_where_plain_training_does_not(tmp_path):
    """The paper's claim in small: at the same rank in every layer, hence the same MACs, and without fine-tuning."""
    data, test, models = Digits(slice(0, 1300)), Digits(slice(1300, None)), {}
    callback = TrainedRankPruningCallback(0.05, 5, nuclear=1e-2)
    for name, callbacks in {"plain": [], "trp": [callback]}.items():
        models[name] = digits_model()
        trainer = make_trainer(
            models[name], callbacks, tmp_path, max_steps=160, per_device_train_batch_size=32, optim_args="momentum=0.9",
            lr_scheduler_type="linear", learning_rate=0.05, logging_strategy="no",
        )  # fmt: skip
        trainer.train_dataset = data
        trainer.train()
    ranks, lost = callback.ranks(models["trp"]), {}
    assert max(ranks.values()) <= 12  # of 24
    for name, model in models.items():
        before = share_right(model, test)
        assert before > 0.97
        cut_to(model, ranks)
        lost[name] = before - share_right(model, test)
    # seen: 0.000 and 0.64
    assert lost["trp"] < 0.02 and lost["plain"] > 0.2
