"""What one of several processes does in test_multi_process; started by torchrun.

Usage: torchrun ... distributed_run.py OUTPUT
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed
from search_training import mixed, search_trainer
from slimming_training import SCALED_INPUTS, Images, make_trainer, scaled_classifier

from hf_compress.methods import (
    ArchitectureSearchCallback,
    DimensionSearchCallback,
    GrowingRegularizationCallback,
    NetworkSlimmingCallback,
    ProximalSlimmingCallback,
    WidthSearchCallback,
)
from hf_compress.methods.sparse_group import SparseGroupCallback
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback

METHODS = {
    "l1": lambda: NetworkSlimmingCallback("l1", 0.05, example_inputs=SCALED_INPUTS),
    "group": lambda: NetworkSlimmingCallback("l1", 0.05, grouping="axis", example_inputs=SCALED_INPUTS),
    "search": lambda: DimensionSearchCallback(0.5, 0.4, 0, kinds="mlp", min_keep=1, example_inputs=SCALED_INPUTS),
    "sparse_group": lambda: SparseGroupCallback("l0", strength=2e-2, split=0.5, example_inputs=SCALED_INPUTS),
    # strong, and at its strongest from the first step on where steps are not counted
    "growing": lambda: GrowingRegularizationCallback(
        {"macs": 0.6}, 2.0, warmup=0, hold=0.1, lasso=0.05, refresh=5, example_inputs=SCALED_INPUTS
    ),
    "proximal": lambda: ProximalSlimmingCallback(2.0, 1.0, example_inputs=SCALED_INPUTS),
    # settings whose singular values are well apart where they are cut, so that rounding is not amplified
    "rank": lambda: TrainedRankPruningCallback(0.2, 5, nuclear=1e-3, targets="Linear"),
    "rank_all": lambda: TrainedRankPruningCallback(0.2, 5, nuclear=1e-3, nuclear_steps="all", targets="Linear"),
}

_SEARCH = {"architecture_optimizer": "sgd", "architecture_lr": 0.5, "coupling": (0.5, 2.0)}
SEARCHES = {
    "shared": lambda: ArchitectureSearchCallback("rarts", passes="shared", **_SEARCH),
    "fresh": lambda: ArchitectureSearchCallback("rarts", passes="fresh", **_SEARCH),
    "darts": lambda: ArchitectureSearchCallback("darts", **_SEARCH),
    "second_order": lambda: ArchitectureSearchCallback("darts-second-order", **_SEARCH),
    "width": lambda: WidthSearchCallback(
        1.0, 0.4, warmup=0, min_keep=1, example_inputs=SCALED_INPUTS, **{**_SEARCH, "architecture_lr": 0.1}
    ),
}


def searched(method: str, folder: Path, batch: int, **arguments) -> dict:
    model, callback = scaled_classifier() if method == "width" else mixed(), SEARCHES[method]()
    trainer = search_trainer(
        model, callback, folder, per_device_train_batch_size=batch, max_steps=8, logging_steps=4, max_grad_norm=0.5,
        optim_args="momentum=0.9", gradient_accumulation_steps=2, **arguments,
    )  # fmt: skip
    trainer.train()
    log = [entry["search_validation_loss"] for entry in trainer.state.log_history if "search_validation_loss" in entry]
    return {"weights": model.state_dict(), "log": log}


def scores(callback, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the method found: scores, or ranks."""
    if hasattr(callback, "scores"):
        return callback.scores(model)
    return {name: torch.tensor([float(rank)]) for name, rank in callback.ranks(model).items()}


def trained(method: str, folder: Path, batch: int, **arguments) -> dict:
    model, callback = scaled_classifier(), METHODS[method]()
    trainer = make_trainer(
        model, [callback], folder, per_device_train_batch_size=batch, max_steps=12, logging_steps=4, **arguments
    )
    trainer.train()
    log = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    return {"weights": model.state_dict(), "scores": scores(callback, model), "sparsity": log}


def stepped(method: str, is_sharded: bool) -> dict:
    """Six full-batch steps by hand; sharded by FSDP2 over all processes, or whole."""
    model, callback = scaled_classifier(), METHODS[method]()
    state = SimpleNamespaceState()
    callback.on_init_end(SimpleNamespace(), state, None, model=model)
    if is_sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    hooks = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(SimpleNamespace(), state, None, **hooks)
    items = [Images(4)[i] for i in range(8)]
    batch = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
    for _ in range(6):
        optimizer.zero_grad()
        callback.on_step_begin(SimpleNamespace(), state, None, **hooks)
        model(**batch)["loss"].backward()
        callback.on_pre_optimizer_step(SimpleNamespace(), state, None, **hooks)
        optimizer.step()
        callback.on_optimizer_step(SimpleNamespace(), state, None, **hooks)
    callback.on_train_end(SimpleNamespace(), state, None, **hooks)
    full = {name: value.full_tensor() if is_sharded else value for name, value in model.state_dict().items()}
    return {"weights": full, "scores": scores(callback, model), "sparsity": []}


class SimpleNamespaceState:
    global_step = 0
    epoch = 0.0
    max_steps = 6


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results = {("ddp", method): trained(method, output.parent, batch=4, ddp_backend="gloo") for method in METHODS}
    results |= {("sharded", method): stepped(method, is_sharded=True) for method in METHODS}
    results |= {("search", method): searched(method, output.parent, batch=2, ddp_backend="gloo") for method in SEARCHES}
    torch.save(results, f"{output}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()
