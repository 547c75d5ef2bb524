"""Eyes and the ordinary Trainer: mixed batches arrive whole, and a resumed run ends in the same weights."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_compress.data.eyes import MixedEyes, SyntheticEyes, WeakEyes, eye_collator
from hf_compress.models.eye_openness import EyeOpennessConfig, EyeOpennessForRegression


def train(folder, model, dataset, resume=None, steps=6, **arguments):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "save_strategy": "steps",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        **arguments,
    }
    trainer = Trainer(model, TrainingArguments(max_steps=steps, **settings), eye_collator, dataset)
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EyeOpennessForRegression(EyeOpennessConfig(backbone="nano", num_domains=2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.multi_process)])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, model, workers):
    mixed = MixedEyes(SyntheticEyes(64), WeakEyes(10), length=64)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["domain_ids"].tolist()), with_kwargs=True
    )
    again = copy.deepcopy(model)
    whole = train(tmp_path / "a", model, mixed, dataloader_num_workers=workers)
    assert seen == [[0, 1] * 4] * 6  # groups arrive whole, at the ratio
    resumed = train(tmp_path / "b", again, mixed, tmp_path / "a" / "checkpoint-3", dataloader_num_workers=workers)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_stream_trains_too(tmp_path, model):
    before = copy.deepcopy(model.state_dict())
    after = train(tmp_path, model, SyntheticEyes(40).as_dataset(), steps=2)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
