"""What one of several processes does in test_training; started by torchrun.

Usage: torchrun ... distributed_run.py OUTPUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

import torch
import torch.distributed
import transformers
from slimming_training import Classifier, make_trainer
from torch import nn

from hf_compress.methods.quantization_aware_training import QuantizationAwareTrainingCallback

SCHEMES = {
    "learned": {"weights": 3, "scale": "learned"},
    "blended": {"weights": 1, "scale": "bcgd", "per_channel": False, "rho": 0.01},
    "clipped_relu": {"weights": 2, "scale": "bcgd", "activations": 4, "activation_scheme": "clipped_relu"},
    "static": {"weights": 4, "activations": 8, "activation_scheme": "static"},
}


def small_classifier() -> Classifier:
    """No BatchNorm, so that no example depends on the rest of its batch."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.Tanh(),
        nn.Linear(12, 7),
    )  # fmt: skip
    return Classifier(body)


def trained(scheme: str, folder: Path, batch: int, **arguments) -> dict:
    model = small_classifier()
    callback = QuantizationAwareTrainingCallback(**SCHEMES[scheme])
    arguments = {"max_steps": 8, **arguments}
    trainer = make_trainer(model, [callback], folder, per_device_train_batch_size=batch, **arguments)
    shadow = {}
    trainer.add_callback(_Shadow(model, shadow))
    trainer.train()
    return {"frozen": {k: v.clone() for k, v in model.state_dict().items()}, "float": shadow}


class _Shadow(transformers.TrainerCallback):
    """Keeps the float weights of the last step, which freezing replaces."""

    def __init__(self, model: nn.Module, shadow: dict) -> None:
        self.model, self.shadow = model, shadow

    def on_step_end(self, args, state, control, **kwargs):
        self.shadow.update({name: p.detach().clone() for name, p in self.model.named_parameters()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results = {scheme: trained(scheme, output.parent, batch=4, ddp_backend="gloo") for scheme in SCHEMES}
    torch.save(results, f"{output}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()
