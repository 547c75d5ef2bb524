"""Trained rank pruning: weights are truncated to a low rank again and again while they are trained.

Source: Xu et al. 2020, "TRP: Trained Rank Pruning for Efficient Deep Neural Networks" (arXiv 2004.14566), and the
authors' code. With period m and D the truncation of the unfolded weights by an energy rule, equations 2 to 6 are

    W <- D(W) before every m-th step, and that step's gradient is taken there;  grad += lambda U_k V_k^T
"""

from __future__ import annotations

import fnmatch
import inspect
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_compress.errors import MethodError, NothingToShrinkError
from hf_compress.surgery.decomposition import (
    DECOMPOSABLE,
    Method,
    Scheme,
    can_decompose,
    check_scheme,
    fold,
    full_rank,
    rank_for_energy,
    svd,
    unfold,
)

from .axis_callback import check_finite, check_number
from .network_slimming import unscale_gradients
from .scales import _as, _local, _whole
from .trained_model import trained_model

logger = logging.get_logger(__name__)

NuclearSteps = Literal["truncation", "all"]
#: below this energy, singular values are kept that the Gram matrix in float32 does not resolve; see decomposition.svd
_COARSE_ENERGY = 1e-3
#: elements of one batched decomposition
_BATCH_ELEMENTS = 2**26


@dataclass(frozen=True)
class _Layer:
    name: str
    weight: nn.Parameter
    scheme: Scheme
    groups: int

    @property
    def full_rank(self) -> int:
        return full_rank(self.weight.shape, self.scheme, self.groups)

    def matrices(self) -> Tensor:
        """[b, m, n], in float32 or wider. A collective operation when the weight is sharded."""
        matrices = unfold(_whole(self.weight.detach()), self.scheme, self.groups)
        matrices = matrices.float() if matrices.dtype in (torch.float16, torch.bfloat16) else matrices
        return matrices if matrices.ndim == 3 else matrices[None]

    def folded(self, matrices: Tensor) -> Tensor:
        return fold(matrices[0] if len(matrices) == 1 else matrices, self.weight.shape, self.scheme)


class TrainedRankPruningCallback(TrainerCallback, ExportableState):
    """Train weights to a low rank, so that replacing layers by their factors afterwards needs no fine-tuning.

    The model keeps its layers while it trains. Before the forward pass of every ``period``-th optimizer step (the first
    included), the singular values of every target that carry the least energy are set to zero; the gradient is taken at
    the truncated weights and the optimizer steps from them. Momentum is left alone, as in the authors' code. At the end
    of training, what the steps since the last truncation have added to its ranks is taken away, as long as that is within
    ``energy``; so the weights are of low rank to the last digit, and ``factorize`` finds ranks that lose nothing. (The
    authors' code leaves the weights where the last step put them, and the paper does not say how it truncates at the end.)
    :meth:`ranks` says which ranks the energy rule would keep.

    Steps are counted where the optimizer really stepped: the batches of an accumulation are one, and a step that fp16's
    loss scaler skipped is none, so weights are never truncated twice without a step between.

    The nuclear norm's subgradient is added to the gradients after all-reduce and clipping and before the optimizer step,
    so it goes through the optimizer (momentum, Adam's normalisation) like the loss's gradient, and is not part of the
    reported loss.

    Several processes share the decompositions: each does some of the layers and sends what it found to the others, so
    that all go on with the same weights.

    Args:
        energy: share of the squared singular values that a truncation may drop, in (0, 1). Paper: e; 0.02 on CIFAR-10 and
            0.005 on ImageNet (the authors' code: 0.1).
        period: optimizer steps from one truncation to the next, at least 1. Paper: m; 20 where it is stated.
        scheme: how a convolution becomes a matrix, see :mod:`hf_compress.surgery.decomposition`. Paper: "channel" is
            TRP1, "spatial" is TRP2; "decoupled" is the ND of the authors' code. Linear layers are the same for all.
        nuclear: strength of the nuclear norm, at least 0; 0 leaves it out. Paper: lambda; 3e-4.
        nuclear_steps: "truncation" adds its subgradient at steps that truncate, as the authors' code does; "all" at every
            step, with the factors of the last truncation. These are as large as the weights and are in the checkpoints.
        targets: which layers: class names ("Conv1d", "Conv2d", "Linear"), the classes, glob patterns of module names, or
            several of them, where one that fits is enough. None is every convolution and linear layer except the first
            convolution and the last linear layer, which the paper leaves out too.
        exclude: which of them to leave out, given likewise.

    Attributes:
        targets_: names of the layers acted on, from the start of training on.
        steps_: optimizer steps taken.
        ranks_: layer -> rank that the last truncation kept; for several matrices the largest.
        axis_metrics_: what was last logged for single layers: "rank/NAME".

    Raises:
        MethodError: when the Trainer is made, for an argument out of range; during training, when the nuclear norm has
            driven a layer to zero.
        NothingToShrinkError: at the start of training, when no layer that can be decomposed matches.
        ModelError: when weights are not finite.
    """

    targets_: tuple[str, ...] = ()
    steps_: int = 0
    truncated_at_: int = -1
    ranks_: dict[str, int]
    axis_metrics_: dict[str, float]

    def __init__(
        self,
        energy: float = 0.02,
        period: int = 20,
        scheme: Scheme = "channel",
        nuclear: float = 0.0,
        *,
        nuclear_steps: NuclearSteps = "truncation",
        targets: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
        exclude: str | type[nn.Module] | Sequence[str | type[nn.Module]] = (),
    ) -> None:
        self.energy = energy
        self.period = period
        self.scheme = scheme
        self.nuclear = nuclear
        self.nuclear_steps = nuclear_steps
        self.targets = targets
        self.exclude = exclude
        self.ranks_ = {}
        self._layers: list[_Layer] = []
        self._subgradients: list[Tensor] | None = None
        self._metrics: dict[str, float] = {}

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module = trained_model(kwargs)
        self._validate()
        if self._needs_buffer:
            try:
                layers = self._find(model)
            except NothingToShrinkError:
                return  # on_train_begin reports it; a Trainer that only evaluates has no need of it
            # Here, so that resuming fills it from the checkpoint; NaN says that nothing did.
            _register(model, layers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        self._validate()
        if getattr(args, "deepspeed", None):
            raise MethodError(f"{type(self).__name__} cannot reach parameters under DeepSpeed; use DDP or FSDP2.")
        check_finite(model)
        self._layers = self._find(model)
        self.targets_ = tuple(layer.name for layer in self._layers)
        self._alive: set[str] = set()
        self._subgradients = None
        self._metrics, self.axis_metrics_ = {}, {}
        self._restore_count(state)
        if self._needs_buffer:
            self._restore_subgradients(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._layers and self.steps_ % self.period == 0 and self.steps_ != self.truncated_at_:
            self._truncate(trained_model(kwargs), kwargs["optimizer"])
            self.truncated_at_ = self.steps_

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._subgradients is None:
            return
        unscale_gradients(kwargs["optimizer"])
        for layer, subgradient in zip(self._layers, self._subgradients, strict=True):
            if layer.weight.grad is not None:
                _local(layer.weight.grad).add_(_as(subgradient, layer.weight), alpha=self.nuclear)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            return  # the weights are as they were truncated, and their subgradient still waits for a step
        self.steps_ += 1
        if self.nuclear_steps == "truncation":
            self._subgradients = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what the last truncation found to the training logs; the ranks of layers to ``state.log_history``."""
        logs: dict[str, float] = kwargs["logs"]
        if self._metrics and ("loss" in logs or "train_loss" in logs):
            logs.update(self._metrics)
            state.log_history[-1].update({**self._metrics, **self.axis_metrics_})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        if self._layers and self.ranks_ and self.steps_ != self.truncated_at_:
            self._truncate(model)
        _unregister(model, self._layers)
        self._layers, self._subgradients = [], None  # they hold the parameters

    # -- results --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def target_names(self, model: nn.Module) -> list[str]:
        """Names of the layers that training would act on.

        Raises:
            MethodError: for an argument out of range.
            NothingToShrinkError: when no layer that can be decomposed matches.
        """
        self._validate()
        return [layer.name for layer in self._find(model)]

    def ranks(self, model: nn.Module, energy: float | None = None) -> dict[str, int]:
        """The rank that the energy rule keeps of every target.

        Args:
            model: the trained model, not wrapped.
            energy: share that may be dropped; by default that of the training.

        Returns:
            Module name -> rank, from 1 to the layer's full rank; for several matrices (groups, decoupling) the largest.

        Raises:
            NothingToShrinkError: when no layer that can be decomposed matches.
        """
        self._validate()
        layers = self._find(model)
        share = self.energy if energy is None else energy
        _check_energy(share)
        ranks: dict[str, int] = {}
        for batch in _batches(layers):
            _, values, _ = svd(torch.cat([layer.matrices() for layer in batch]), method=self._method(batch, share))
            found = rank_for_energy(values, share).view(len(batch), -1).amax(1).tolist()
            ranks.update((layer.name, rank) for layer, rank in zip(batch, found, strict=True))
        return {layer.name: ranks[layer.name] for layer in layers}

    def state(self) -> dict[str, Any]:
        """The arguments, and how far the count of steps is; Trainer stores them in its checkpoints."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        if self.targets is not None:
            arguments["targets"] = _names(self.targets)
        arguments["exclude"] = _names(self.exclude)
        taken = {"steps_": self.steps_, "truncated_at_": self.truncated_at_, "ranks_": self.ranks_}
        return {"args": arguments, "attributes": taken if self.truncated_at_ >= 0 else {}}

    # -- one truncation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _truncate(self, model: nn.Module, optimizer: Any = None) -> None:
        """Replace the weights by their truncation, and find the subgradients there.

        Without an optimizer it is the last one: to the ranks of the one before, unless that would lose more than the
        energy rule allows (``load_best_model_at_end`` may have brought weights of higher rank). Nothing follows that would
        need the subgradients or the metrics, so these stay those of the one before.
        """
        layers, is_last = self._layers, optimizer is None
        device = layers[0].weight.device
        # per layer: rank, nuclear norm, largest singular value
        facts = torch.zeros(len(layers), 3, dtype=torch.float64, device=device)
        subgradients: list[Tensor | None] = [None] * len(layers)
        place = {layer.name: i for i, layer in enumerate(layers)}
        processes, own = _processes()
        shares = _shared(layers, processes)
        for process, share in enumerate(shares):
            for batch in _batches(share):
                matrices = torch.cat([layer.matrices() for layer in batch])
                if process == own:
                    truncated, directions, facts_of_batch = self._decomposed(matrices, batch, is_last)
                    facts[[place[layer.name] for layer in batch]] = facts_of_batch.to(device)
                else:
                    truncated = torch.empty_like(matrices)
                    directions = torch.empty_like(matrices) if self.nuclear else None
                for tensor in (truncated, directions):
                    if processes > 1 and tensor is not None:
                        torch.distributed.broadcast(tensor, src=process)
                for i, layer in enumerate(batch):
                    part = slice(i * len(matrices) // len(batch), (i + 1) * len(matrices) // len(batch))
                    weight = layer.folded(truncated[part]).to(layer.weight.dtype)
                    _local(layer.weight.detach()).copy_(_as(weight, layer.weight))
                    if directions is not None:
                        subgradients[place[layer.name]] = layer.folded(directions[part]).to(layer.weight.dtype)
        if is_last:
            return
        if processes > 1:
            torch.distributed.all_reduce(facts)
        self._note(facts.tolist(), optimizer)
        if self.nuclear:
            self._subgradients = [tensor for tensor in subgradients if tensor is not None]
            if self._needs_buffer:
                _buffer(model, layers).copy_(torch.cat([tensor.flatten().to(device) for tensor in self._subgradients]))

    def _decomposed(self, matrices: Tensor, batch: list[_Layer], is_last: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """The truncated matrices, the subgradients of the nuclear norm, and per layer what _truncate collects."""
        names = [layer.name for layer in batch for _ in range(len(matrices) // len(batch))]
        u, s, vh = svd(matrices, method="gram64" if is_last else self._method(batch, self.energy), names=names)
        ranks = rank_for_energy(s, self.energy)
        if is_last:
            ranks = torch.maximum(ranks, torch.tensor([self.ranks_[name] for name in names], device=ranks.device))
        lowest, highest = int(ranks.min()), int(ranks.max())
        kept = torch.arange(s.shape[-1], device=s.device) < ranks[:, None]
        # From the side with fewer components. Where nothing is dropped, the weights stay as they are to the last bit.
        from_rest = lowest > s.shape[-1] // 2
        span = slice(lowest, None) if from_rest else slice(highest)
        part = u[..., span] * (~kept if from_rest else kept)[:, None, span] @ (s[:, span, None] * vh[:, span])
        truncated = matrices - part if from_rest else part
        directions = (u[..., :highest] * kept[:, None, :highest]) @ vh[:, :highest] if self.nuclear else None
        nuclear_norms = (s * kept).double()
        facts = torch.stack(
            [
                ranks.double().view(len(batch), -1).amax(1),
                nuclear_norms.view(len(batch), -1).sum(1),
                s[:, 0].double().view(len(batch), -1).amax(1),
            ],
            dim=1,
        )
        return truncated, directions, facts

    def _note(self, facts: list[list[float]], optimizer: Any) -> None:
        """Keep what is logged, and stop when the nuclear norm has taken a layer's last rank."""
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for layer, (_, _, largest) in zip(self._layers, facts, strict=True):
            step = self.nuclear * rates.get(id(layer.weight), 0.0)
            if largest > step:
                self._alive.add(layer.name)
            elif self.nuclear and (largest > 0 or layer.name in self._alive):  # else initialised with zeros
                raise MethodError(
                    f"nuclear={self.nuclear!r} drives {layer.name!r} to rank 0: its largest singular value is "
                    f"{largest:.2g}, and one step of the penalty takes away {step:.2g}. Lower nuclear, or leave the layer "
                    "out with exclude=."
                )
        self.ranks_ = {layer.name: int(rank) for layer, (rank, _, _) in zip(self._layers, facts, strict=True)}
        self.axis_metrics_ = {f"rank/{name}": float(rank) for name, rank in self.ranks_.items()}
        shares = [self.ranks_[layer.name] / layer.full_rank for layer in self._layers]
        self._metrics = {"rank_share": sum(shares) / len(shares), "nuclear_norm": sum(norm for _, norm, _ in facts)}

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _needs_buffer(self) -> bool:
        return self.nuclear > 0 and self.nuclear_steps == "all"

    def _method(self, batch: list[_Layer], energy: float) -> Method:
        # on GPUs, matrix products in float32 may be TF32, which the Gram matrix does not bear
        is_coarse = energy >= _COARSE_ENERGY and batch[0].weight.device.type != "cuda"
        return "gram" if is_coarse else "gram64"

    def _validate(self) -> None:
        _check_energy(self.energy)
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise MethodError(f"period={self.period!r} is not possible: it must be a whole number of at least 1.")
        check_scheme(self.scheme)
        check_number("nuclear", self.nuclear, minimum=0)
        if self.nuclear_steps not in ("truncation", "all"):
            raise MethodError(f"nuclear_steps={self.nuclear_steps!r} is not possible; choose 'truncation' or 'all'.")

    def _find(self, model: nn.Module) -> list[_Layer]:
        """The targets, each weight once."""
        candidates = {name: module for name, module in model.named_modules() if isinstance(module, DECOMPOSABLE)}
        excluded = _names(self.exclude)
        _check_patterns("exclude", excluded, candidates)
        if self.targets is None:
            chosen = _without_ends(candidates)
        else:
            wanted = _names(self.targets)
            _check_patterns("targets", wanted, candidates)
            chosen = {name: module for name, module in candidates.items() if _matches(name, module, wanted)}
        chosen = {name: module for name, module in chosen.items() if not _matches(name, module, excluded)}
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        layers, reasons = [], []
        for name, module in chosen.items():
            reason = can_decompose(module, self.scheme)
            if reason is None and not isinstance(module.weight, nn.Parameter):
                reason = "its weight is computed from other parameters"
            elif reason is None and not module.weight.requires_grad:
                reason = "its weight is frozen"
            elif reason is None and len(owners[id(module.weight)]) > 1:
                reason = f"its weight is also {next(o for o in owners[id(module.weight)] if o != f'{name}.weight')!r}"
            if reason is None:
                layers.append(_Layer(name, module.weight, self.scheme, getattr(module, "groups", 1)))  # type: ignore[arg-type]
            else:
                reasons.append(f"{name!r}: {reason}")
        if not layers:
            why = f" ({'; '.join(reasons[:3])})" if reasons else ""
            raise NothingToShrinkError(
                f"{type(model).__name__} has no convolution or linear layer whose rank {type(self).__name__} could lower "
                f"with targets={self.targets!r}, exclude={self.exclude!r}{why}."
            )
        return layers

    def _restore_count(self, state: TrainerState) -> None:
        """Take up the count of steps from the checkpoint that the training goes on from."""
        self.steps_, self.truncated_at_, self.ranks_ = state.global_step, -1, {}
        if state.global_step == 0:
            return
        stored = (getattr(state, "stateful_callbacks", None) or {}).get(type(self).__name__, [])
        entries = [entry for entry in (stored if isinstance(stored, list) else [stored]) if entry["attributes"]]
        own = self.state()["args"]
        # Trainer appends to such lists at every save, so the last is the newest. What is not in the count: after a step
        # that the loss scaler skipped, a checkpoint keeps the truncated weights but not the subgradient that waited.
        for entry in [*entries[-1:], *[entry for entry in entries if entry["args"] == own]][-1:]:
            for name, value in entry["attributes"].items():
                setattr(self, name, value)

    def _restore_subgradients(self, model: nn.Module) -> None:
        stored = model._buffers.get(_name(self._layers))
        if stored is None or stored.numel() != sum(layer.weight.numel() for layer in self._layers):
            _register(model, self._layers)
        elif not stored.isnan().any():
            pieces = stored.split([layer.weight.numel() for layer in self._layers])
            self._subgradients = [
                piece.view(layer.weight.shape) for piece, layer in zip(pieces, self._layers, strict=True)
            ]
            return
        if self.steps_ > 0:
            logger.warning(
                f"{type(self).__name__}: the checkpoint holds no factors for these layers, so the nuclear norm acts again "
                "from the next truncation on. Resume with a new Trainer, made with the same callback arguments."
            )


# -- choosing layers --------------------------------------------------------------------------------------------------


def _check_energy(energy: Any) -> None:
    if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy < 1:
        raise MethodError(
            f"energy={energy!r} is not possible: it is the share that may be dropped, between 0 and 1, for example 0.02."
        )


def _names(patterns: str | type[nn.Module] | Sequence[str | type[nn.Module]]) -> list[str]:
    listed = [patterns] if isinstance(patterns, (str, type)) else list(patterns)
    return [pattern.__name__ if isinstance(pattern, type) else pattern for pattern in listed]


_CLASSES = {kind.__name__: kind for kind in DECOMPOSABLE}


def _matches(name: str, module: nn.Module, patterns: list[str]) -> bool:
    return any(
        isinstance(module, _CLASSES[pattern]) if pattern in _CLASSES else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def _check_patterns(argument: str, patterns: list[str], candidates: dict[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(_matches(name, module, [pattern]) for name, module in candidates.items()):
            raise NothingToShrinkError(
                f"{argument}={pattern!r} matches no layer. It can be one of {', '.join(_CLASSES)}, or a pattern of module "
                f"names; the first of these are: {', '.join(list(candidates)[:6]) or 'none'}."
            )


def _without_ends(candidates: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """All but the first convolution and the last linear layer."""
    convolutions = [name for name, module in candidates.items() if not isinstance(module, nn.Linear)]
    linear = [name for name, module in candidates.items() if isinstance(module, nn.Linear)]
    ends = {*convolutions[:1], *linear[-1:]}
    return {name: module for name, module in candidates.items() if name not in ends}


# -- sharing the work ---------------------------------------------------------------------------------------------------


def _processes() -> tuple[int, int]:
    """How many processes there are, and which this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def _shared(layers: list[_Layer], processes: int) -> list[list[_Layer]]:
    """The layers that each process decomposes; about equally much work, the same answer on all of them."""
    shares: list[list[_Layer]] = [[] for _ in range(processes)]
    work = [0] * processes
    for layer in sorted(layers, key=lambda layer: -layer.weight.numel() * layer.full_rank):
        least = work.index(min(work))
        shares[least].append(layer)
        work[least] += layer.weight.numel() * layer.full_rank
    return shares


def _batches(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Layers whose matrices have the same shape, as many as fit into one decomposition."""
    alike: dict[tuple[Any, ...], list[_Layer]] = {}
    for layer in layers:
        shape = unfold(torch.empty(layer.weight.shape, device="meta"), layer.scheme, layer.groups).shape
        alike.setdefault((shape, layer.weight.dtype, layer.weight.device), []).append(layer)
    for group in alike.values():
        size = max(1, _BATCH_ELEMENTS // group[0].weight.numel())
        for start in range(0, len(group), size):
            yield group[start : start + size]


# -- the buffer that holds the subgradients while training, for nuclear_steps="all" --------------------------------------


def _name(layers: list[_Layer]) -> str:
    # by content: two callbacks on different layers have different buffers, and a replaced callback finds its own
    return f"hf_compress_nuclear_{zlib.crc32(chr(10).join(layer.name for layer in layers).encode()):08x}"


def _buffer(model: nn.Module, layers: list[_Layer]) -> Tensor:
    buffer = model._buffers[_name(layers)]
    assert buffer is not None
    return buffer


def _register(model: nn.Module, layers: list[_Layer]) -> None:
    size = sum(layer.weight.numel() for layer in layers)
    weight = layers[0].weight
    nothing = torch.full((size,), float("nan"), dtype=weight.dtype, device=weight.device)
    name = _name(layers)
    model.register_buffer(name, nothing)
    # every process computes it; DistributedDataParallel would send it around before every forward pass
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, name]  # type: ignore[assignment]


def _unregister(model: nn.Module, layers: list[_Layer]) -> None:
    name = _name(layers)
    if name in model._buffers:
        delattr(model, name)
        model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            other
            for other in model._ddp_params_and_buffers_to_ignore  # type: ignore[union-attr]
            if other != name
        ]
