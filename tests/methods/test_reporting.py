"""What methods measure reaches Trainer's logs and, with report_first, its reporters."""

import pytest
import transformers
from families import FAMILIES
from slimming_training import SCALED_INPUTS, make_trainer, scaled_classifier

from hf_compress.methods import NetworkSlimmingCallback, ProximalSlimmingCallback, report_first


class Recorder(transformers.TrainerCallback):
    """A reporter: it keeps what it is given at the time it is given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def recorded(tmp_path, is_first, callback=None, **arguments):
    callback = callback or NetworkSlimmingCallback("l1", 0.5, threshold=0.1, example_inputs=SCALED_INPUTS)
    reporter, printer = Recorder(), Recorder()
    checkpoint = arguments.pop("resume", None)
    trainer = make_trainer(scaled_classifier(), [reporter, callback], tmp_path, **arguments)
    if is_first:
        report_first(trainer)
        report_first(trainer)  # calling it again changes nothing
    printing = next(c for c in trainer.callback_handler.callbacks if isinstance(c, transformers.PrinterCallback))
    printing.on_log = printer.on_log
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, reporter.seen, printer.seen


def of_training(entries):
    return [entry for entry in entries if "loss" in entry or "train_loss" in entry]


@pytest.mark.parametrize("is_first", [False, True])
def test_who_sees_what(is_first, tmp_path):
    trainer, reported, printed = recorded(tmp_path, is_first, eval_strategy="steps", eval_steps=3)
    per_axis = "sparsity/body.gamma"
    assert len(of_training(trainer.state.log_history)) == 3
    for entry in of_training(trainer.state.log_history):
        assert 0 <= entry["sparsity"] <= 1 and entry[per_axis] == entry["sparsity"]  # the only axis
    assert [entry["sparsity"] for entry in of_training(printed)] == [
        entry["sparsity"] for entry in of_training(trainer.state.log_history)
    ]
    assert not any(per_axis in entry for entry in printed)
    assert all((per_axis in entry and "sparsity" in entry) == is_first for entry in of_training(reported))
    evaluated = [entry for entry in reported + printed if "eval_loss" in entry]
    assert evaluated and not any(key.startswith("sparsity") for entry in evaluated for key in entry)


def test_sparsity_is_the_share_of_vanished_indices(tmp_path):
    """Strength 0.5 and lr 0.1 take 0.05 a step from scales spread over 0.05..1; below 0.1 counts as vanished."""
    trainer, _, _ = recorded(tmp_path, False, learning_rate=0.1)
    shares = [entry["sparsity"] for entry in of_training(trainer.state.log_history)]
    assert shares[0] < shares[1] and shares[1] == shares[2]
    gamma = trainer.model.body.gamma.detach().abs()
    assert shares[-1] == pytest.approx((gamma < 0.1).float().mean().item())


def test_overall_sparsity_weighs_indices_not_axes(tmp_path):
    model, inputs = FAMILIES["resnet_basic"]()
    callback = ProximalSlimmingCallback(2.0, 1.0, example_inputs=inputs)
    trainer = make_trainer(model, [callback], tmp_path, size=32, max_steps=2, logging_steps=1, learning_rate=0.3)
    trainer.train()
    entry = trainer.state.log_history[-1]
    sizes = {axis.name: axis.size for axis in callback.axes_ if axis.scales}
    gone = sum(entry[f"sparsity/{name}"] * size for name, size in sizes.items())
    assert 0 < entry["sparsity"] == pytest.approx(gone / sum(sizes.values()))


def test_order_survives_restored_callbacks(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    recorded(tmp_path, True, **options)
    trainer, reported, printed = recorded(tmp_path, True, resume=str(tmp_path / "checkpoint-3"), **options)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("NetworkSlimmingCallback") == 1
    assert names.index("NetworkSlimmingCallback") < names.index("Recorder") < names.index("PrinterCallback")
    assert of_training(reported) and all("sparsity/body.gamma" in entry for entry in of_training(reported))
    assert not any("sparsity/body.gamma" in entry for entry in printed)
