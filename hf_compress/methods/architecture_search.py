"""Architecture search on the ordinary Trainer: RARTS, and DARTS of both orders.

The mathematics, its sources and what is reconstruction are in :mod:`.relaxed_search`. The defaults of the architecture's
optimizer are those of the DARTS authors' code.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_compress.errors import MethodError, ModelError

from .architecture_state import (
    NAME,
    ArchitectureState,
    Optimizer,
    average,
    frozen_statistics,
    state_in,
    take_statistics_of_first,
)
from .axis_callback import check_finite, check_number
from .data_halves import ValidationBatches, split_halves
from .relaxed_search import Passes, add_coupling, second_order_gradient, squared_distance, squared_norm
from .trained_model import trained_model

logger = logging.get_logger(__name__)

SearchMethod = Literal["rarts", "darts", "darts-second-order"]
METHODS = ("rarts", "darts", "darts-second-order")
_NOT_SAVED = ("validation_dataset", "example_inputs")
#: alphas of at most so many entries are kept in Trainer's log history
_LOGGED_ENTRIES = 4096

# The validation half of a model's search. By model, because Trainer may replace the callback by a new object on resume.
_VALIDATION: WeakKeyDictionary[nn.Module, tuple[Any, int | None]] = WeakKeyDictionary()


class ArchitectureSearchCallback(TrainerCallback, ExportableState):
    """Search an architecture while Trainer trains the network that contains all of them.

    The network is any module with architecture parameters: those that its method ``architecture_parameters()`` gives
    (name -> parameter), else those that the same method of modules inside gives (see :func:`hf_compress.mix_attention`), or
    those whose names match ``architecture``. Trainer's optimizer, schedule and clipping are for
    the weights; this callback steps the architecture. Of one data set, Trainer gets the training half and this callback
    keeps the validation half::

        search = ArchitectureSearchCallback("rarts", split=0.5)
        trainer = Trainer(model, args, train_dataset=search.halve(dataset), callbacks=[search])
        trainer.train()
        discrete = model.derive()

    Every optimizer step is one iteration. With the weights y of Trainer's model, of which ``"rarts"`` has a second copy w:

    * ``"rarts"``: w steps down ``L_val(w, alpha) + beta/2 ||w - y||^2``, then y down ``lambda L_train(y, alpha) +
      beta/2 ||y - w||^2`` at the new w, then alpha down ``L_val + lambda L_train``, either at the new weights
      (``passes="fresh"``, four forward and backward passes altogether) or with the gradients that the weights' passes gave
      on the way (``"shared"``, two passes). w has Trainer's optimizer too, with a state of its own.
    * ``"darts"``: y steps down L_train, then alpha down L_val, two passes.
    * ``"darts-second-order"``: alpha's gradient goes through one inner step of y on the same batch, whose length is the
      learning rate; five passes.

    Batches of both halves have the same size; with gradient accumulation a step takes equally many of both. Each copy has
    its own BatchNorm statistics, and counts only the passes that its weights are stepped with. Clipping is for each copy
    by itself, before the coupling is added and lambda multiplied.

    A checkpoint holds the second copy and the state of alpha's optimizer as ``hf_compress_architecture_search``, so that
    an interrupted run goes on to the very same weights; when training ends they leave, and the model has the weights y.
    Memory: two copies of weights, gradients and optimizer state, and the activations of one.

    Args:
        method: see above.
        split: share of the data set for training, in :meth:`halve`.
        split_seed: which items that is.
        training_weight: lambda, above 0; or a pair (first, last) between which it moves geometrically over the training.
        coupling: beta, above 0; likewise a pair. Plain steps of length lr need ``lr * coupling`` below 2.
        passes: of ``"rarts"``, see above. Shared ones cost half and bear smaller steps (see
            :class:`.relaxed_search.RelaxedSearch`); with the learning rates of DARTS, steps are small.
        architecture: glob pattern or patterns of the architecture parameters' names; None asks the model.
        architecture_lr: learning rate of alpha, constant.
        architecture_optimizer: ``"adam"``, or ``"sgd"`` for plain gradient steps.
        architecture_betas: of Adam.
        architecture_weight_decay: l2, added to alpha's gradient.
        warmup: steps before alpha moves; below 1, a share of all steps.
        validation_dataset: the validation half, for data that comes in two parts; :meth:`halve` sets it otherwise. Not
            saved in checkpoints.

    Attributes:
        axis_metrics_: what was last logged for single variables.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, a missing or unused half,
            or a Trainer setting that this cannot work with.
        ModelError: at the start of training, when the model has no architecture parameters, or no trained weights.
        DataError: from :meth:`halve`, when a half would be empty.
    """

    axis_metrics_: dict[str, float]
    _training_size: int | None = None
    _handles: Sequence[Any] = ()

    def __init__(
        self,
        method: SearchMethod = "rarts",
        *,
        split: float = 0.5,
        split_seed: int = 0,
        training_weight: float | Sequence[float] = 1.0,
        coupling: float | Sequence[float] = 1.0,
        passes: Passes = "shared",
        architecture: str | Sequence[str] | None = None,
        architecture_lr: float = 3e-4,
        architecture_optimizer: Optimizer = "adam",
        architecture_betas: Sequence[float] = (0.5, 0.999),
        architecture_weight_decay: float = 1e-3,
        warmup: float = 0.0,
        validation_dataset: Any = None,
    ) -> None:
        self.method = method
        self.split = split
        self.split_seed = split_seed
        self.training_weight = training_weight
        self.coupling = coupling
        self.passes = passes
        self.architecture = architecture
        self.architecture_lr = architecture_lr
        self.architecture_optimizer = architecture_optimizer
        self.architecture_betas = architecture_betas
        self.architecture_weight_decay = architecture_weight_decay
        self.warmup = warmup
        self.validation_dataset = validation_dataset

    # -- data -----------------------------------------------------------------------------------------------------

    def halve(self, dataset: Any) -> Any:
        """The training half, for Trainer; the validation half stays here. Before the Trainer is made.

        Args:
            dataset: of ``datasets``, or any other with a length.

        Raises:
            DataError: when a half would be empty, or the data set has no length.
            MethodError: for a share out of range.
        """
        self._check_split()
        training, self.validation_dataset = split_halves(dataset, self.split, self.split_seed)
        self._training_size = len(training)
        return training

    # -- Trainer hooks --------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        self._validate()
        if trained_model(kwargs) is not model:
            raise MethodError(
                f"{type(self).__name__} steps by the model's own loss, which a student under a teacher does not have. Search "
                "first, and distil the network that was found."
            )
        if self.validation_dataset is not None:
            _VALIDATION[model] = self.validation_dataset, self._training_size
        try:
            self.attach(model)
        except ModelError:
            pass  # on_train_begin reports it; a Trainer that only evaluates has no need of it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._validate()
        self._check_settings(args)
        self._stop_watching()
        search = self.attach(model)
        check_finite(model)
        self._batches = self._validation_batches(args, kwargs["train_dataloader"], model)
        self._model, self._search = model, search
        self._alphas = [dict(model.named_parameters())[name] for name in search.names]
        if state.global_step > 0 and not search.is_training:
            logger.warning(
                f"{type(self).__name__}: the checkpoint holds no state of this search, so its second copy and the "
                "architecture's optimizer start anew. Resume with the callback arguments of the interrupted run."
            )
        search.start(model, self._alphas)
        self._weights, self._training_weights = search.pairs(model)
        self._check_optimizer(optimizer)
        self._device, self._is_bf16 = args.device, bool(getattr(args, "bf16", False))
        self._accumulation, self._max_norm = args.gradient_accumulation_steps, args.max_grad_norm or 0.0
        is_share = 0 < self.warmup < 1
        self._warmup_steps = round(self.warmup * state.max_steps if is_share else self.warmup)
        self._seen: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._count = 0
        self._captured: list[Tensor | None] = [None] * len(self._alphas)
        self.axis_metrics_ = {}
        self._is_own_pass = False
        handles: list[Any] = [
            model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            model.register_forward_hook(self._see_loss),
        ]
        if self._is_shared:
            for i, alpha in enumerate(self._alphas):
                alpha.requires_grad_(True)
                handles.append(alpha.register_post_accumulate_grad_hook(self._capture(i)))
                alpha.requires_grad_(False)
        self._handles = handles

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen, self._losses = [], []
        self._halves: list[Mapping[str, Any]] = []
        self._captured = [None] * len(self._alphas)
        if self._is_shared and self._moves(state):
            self._require_gradients(True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._require_gradients(False)
        if not self._losses:
            raise MethodError(
                f"{type(self).__name__} saw no loss in what {type(self._model).__name__} returned for a training batch. It "
                "needs the model's own loss: leave out compute_loss_func, and give labels to the model."
            )
        self._note("training_loss", torch.stack(self._losses).mean())
        if self.method == "rarts":
            self._step_weights(state, kwargs["optimizer"])
        else:
            gradients = [y.grad for y in self._training_weights if y.grad is not None]
            self._norms["training_weights"] = squared_norm(gradients).sqrt()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._moves(state) and not self._is_shared:
            self._step_architecture(self._fresh_gradients(state, kwargs["optimizer"]), state)
        self._seen, self._halves = [], []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the training logs: the losses, F, ||w - y||, norms of gradients, and the architecture's entropy.

        ``state.log_history`` also gets the architecture's matrices themselves, as ``architecture``.
        """
        logs: dict[str, Any] = kwargs["logs"]
        if not ("loss" in logs or "train_loss" in logs) or not self._handles or not self._count:
            return
        found = self._metrics(state)
        self._sums, self._count = {}, 0
        logs.update(found)
        state.log_history[-1].update(found)
        values = {
            n: alpha.detach() for n, alpha in zip(self._search.names, self._alphas, strict=True) if alpha.ndim > 1
        }
        if values and sum(alpha.numel() for alpha in values.values()) <= _LOGGED_ENTRIES:
            entries: Any = {name: alpha.float().tolist() for name, alpha in values.items()}
            state.log_history[-1]["architecture"] = entries

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._stop_watching()
        self.detach(model)
        self._seen, self._alphas, self._weights, self._training_weights = [], [], [], []
        self._captured, self._losses = [], []

    # -- the search's state in the model --------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> ArchitectureState:
        """Give a model the state of the search. The Trainer's creation does it; do it before making an optimizer by hand.

        Raises:
            ModelError: when the model has no architecture parameters.
            MethodError: when it carries the state of another search.
        """
        present = state_in(model)
        found = self._architecture(model)
        with_copy = self.method == "rarts"
        if present is None:
            present = ArchitectureState(model, found, with_copy, self._shared_objects(model))
            present.attach(model)
        elif present.names != list(found) or (present.network is not None) != with_copy:
            raise MethodError(
                "the model already carries the state of another search, from another ArchitectureSearchCallback or an "
                "interrupted one. Use one callback, or end the search with its detach(model)."
            )
        return present

    def detach(self, model: nn.Module) -> None:
        """End the search: take its state out of the model, which keeps the weights y. The end of training does it."""
        present = state_in(model)
        if present is not None:
            present.detach_from(model)

    def state(self) -> dict[str, Any]:
        """The constructor's arguments as JSON data; Trainer makes a new callback from them when it resumes."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        for name in _NOT_SAVED:
            arguments.pop(name, None)
        for name, value in arguments.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                arguments[name] = list(value)
        return {"args": arguments, "attributes": {}}

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _architecture(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Name in the model -> architecture variable."""
        return architecture_of(model, self.architecture)

    def _shared_objects(self, model: nn.Module) -> list[Any]:
        """What the second copy shares with the model beside the architecture."""
        return []

    def _after_architecture_step(self, state: TrainerState) -> None:
        """Called when alpha has been stepped."""

    # -- one iteration ----------------------------------------------------------------------------------------------

    @property
    def _is_shared(self) -> bool:
        return self.method == "rarts" and self.passes == "shared"

    def _moves(self, state: TrainerState) -> bool:
        return state.global_step >= self._warmup_steps

    def _step_weights(self, state: TrainerState, optimizer: Any) -> None:
        """Step w, and make y's gradient that of F. Trainer steps y next."""
        strength, beta = self._number("training_weight", state), self._number("coupling", state)
        w, y = self._weights, self._training_weights
        network = self._search.network
        assert network is not None
        take_statistics_of_first(network)
        inputs: list[Tensor] = [*w, *self._alphas] if self._is_shared and self._moves(state) else list(w)
        gradients = self._gradients(network, self._validation(state), inputs, "validation_loss")
        of_alpha = gradients[len(w) :]
        gradients = gradients[: len(w)]
        if self._max_norm > 0:
            factor = self._max_norm / (squared_norm(gradients).sqrt() + 1e-6)  # as torch's clip_grad_norm_
            torch._foreach_mul_(gradients, factor.clamp(max=1.0))
        add_coupling(gradients, w, y, beta)
        # Trainer's optimizer leaves alone what has no gradient, so it steps w now and y when Trainer calls it
        aside = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
        for parameter, _ in aside:
            parameter.grad = None
        for parameter, gradient in zip(w, gradients, strict=True):
            parameter.grad = gradient
        getattr(optimizer, "optimizer", optimizer).step()
        self._norms["weights"] = squared_norm(gradients).sqrt()
        for parameter, kept in aside:
            parameter.grad = kept
        for parameter in w:
            parameter.grad = None
        del gradients
        trained = [(a, b, b.grad) for a, b in zip(w, y, strict=True) if b.grad is not None]
        of_y = [gradient for _, _, gradient in trained]
        if strength != 1:
            torch._foreach_mul_(of_y, strength)
        add_coupling(of_y, [b for _, b, _ in trained], [a for a, _, _ in trained], beta)
        self._norms["training_weights"] = squared_norm(of_y).sqrt()
        if of_alpha:
            captured = [
                torch.zeros_like(alpha) if found is None else found
                for alpha, found in zip(self._alphas, self._captured, strict=True)
            ]
            average(captured)
            torch._foreach_add_(of_alpha, captured, alpha=strength)
            self._step_architecture(of_alpha, state)

    def _fresh_gradients(self, state: TrainerState, optimizer: Any) -> list[Tensor]:
        """The gradient of alpha at the weights that the step has led to, on the batches of the step."""
        training, validation = self._seen, self._validation(state)
        if self.method == "rarts":
            network = self._search.network
            assert network is not None
            with frozen_statistics(self._model):
                gradients = self._gradients(network, validation, self._alphas)
                at_y = self._gradients(self._model, training, self._alphas)
            torch._foreach_add_(gradients, at_y, alpha=self._number("training_weight", state))
            return gradients
        xi = self._inner_step(optimizer) if self.method == "darts-second-order" else 0.0
        with frozen_statistics(self._model):
            return second_order_gradient(
                lambda inputs: self._gradients(self._model, training, inputs),
                lambda inputs: self._gradients(self._model, validation, inputs, "validation_loss"),
                self._training_weights,
                self._alphas,
                xi,
            )

    def _step_architecture(self, gradients: list[Tensor], state: TrainerState) -> None:
        betas = self.architecture_betas
        self._search.step(
            self._alphas,
            gradients,
            self.architecture_optimizer,
            self.architecture_lr,
            (betas[0], betas[1]),
            self.architecture_weight_decay,
        )
        self._norms["architecture"] = squared_norm(gradients).sqrt()
        self._after_architecture_step(state)

    def _gradients(
        self, network: nn.Module, batches: Sequence[Mapping[str, Any]], inputs: Sequence[Tensor], name: str = ""
    ) -> list[Tensor]:
        """Gradients of the mean loss on batches, over all processes; the mean itself is logged as ``name``."""
        total: list[Tensor] = []
        losses = []
        self._require_gradients(True)
        self._is_own_pass = True
        try:
            for batch in batches:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
                    loss = _loss_of(network(**batch))
                if loss is None:
                    raise MethodError(f"{type(network).__name__} returned no loss for a batch of the validation half.")
                loss = loss / len(batches)
                found = torch.autograd.grad(loss, list(inputs), allow_unused=True, materialize_grads=True)
                losses.append(loss.detach())
                if not total:
                    # autograd may hand out one tensor twice, and the sums are changed in place
                    total = (
                        list(found) if len({f.data_ptr() for f in found}) == len(found) else [f.clone() for f in found]
                    )
                else:
                    torch._foreach_add_(total, list(found))
                del found, loss
        finally:
            self._is_own_pass = False
            self._require_gradients(False)
        average(total)
        if name:
            self._note(name, torch.stack(losses).sum())
        return total

    def _validation(self, state: TrainerState) -> list[Mapping[str, Any]]:
        """As many batches of the validation half as Trainer's step had of the training half."""
        if not self._halves:  # a step's own and its fresh passes have the same
            first = state.global_step * self._accumulation
            found = [self._batches.get(first + i) for i in range(len(self._losses))]
            self._halves = [send_to_device(batch, self._device) for batch in found]
        return self._halves

    def _number(self, name: str, state: TrainerState) -> float:
        """lambda or beta of this step."""
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return float(value)
        share = min(state.global_step / max(state.max_steps - 1, 1), 1.0)
        return float(value[0]) ** (1 - share) * float(value[1]) ** share

    def _inner_step(self, optimizer: Any) -> float:
        """xi: the learning rate of the weights."""
        first = self._training_weights[0]
        for group in optimizer.param_groups:
            if any(parameter is first for parameter in group["params"]):
                return float(group["lr"])
        return 0.0

    # -- watching Trainer's passes ----------------------------------------------------------------------------------

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        is_asked_for_again = not self._is_shared and self.method != "darts"
        if is_asked_for_again and module.training and not self._is_own_pass:
            if args:
                names = list(inspect.signature(module.forward).parameters)
                kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            self._seen.append({name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    def _see_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and not self._is_own_pass and (loss := _loss_of(output)) is not None:
            self._losses.append(loss.detach().float())

    def _capture(self, i: int) -> Any:
        """Trainer's passes give alpha's gradient too; it is put where clipping and the optimizer do not see it."""

        def capture(alpha: Tensor) -> None:
            gradient, alpha.grad = alpha.grad, None
            if gradient is not None:
                before = self._captured[i]
                self._captured[i] = gradient if before is None else before + gradient

        return capture

    def _require_gradients(self, value: bool) -> None:
        for alpha in self._alphas:
            alpha.requires_grad_(value)

    def _stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    # -- logs -------------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._count += name == "training_loss"

    def _metrics(self, state: TrainerState) -> dict[str, float]:
        """What is logged: means since the last log, and the rest as it is now."""
        means = {name: total / self._count for name, total in self._sums.items()}
        average([*means.values()])
        found = {f"search_{name}": value for name, value in means.items()}
        found |= {f"search_gradient_{name}": norm for name, norm in self._norms.items()}
        if self.method == "rarts":
            squared = squared_distance(self._weights, self._training_weights).float()
            found["search_distance"] = squared.sqrt()
            strength, beta = self._number("training_weight", state), self._number("coupling", state)
            if "validation_loss" in means:
                found["search_objective"] = (
                    means["validation_loss"] + strength * means["training_loss"] + beta / 2 * squared
                )
        entropies = [_entropy(alpha.detach()) for alpha in self._alphas if alpha.ndim > 1]
        if entropies:
            found["architecture_entropy"] = torch.cat(entropies).mean()
        values = torch.stack([value.to(self._device, torch.float32) for value in found.values()]).tolist()
        return dict(zip(found, values, strict=True))  # the one synchronisation with the device

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check_split(self) -> None:
        check_number("split", self.split, minimum=0, is_open=True)
        if self.split >= 1:
            raise MethodError(f"split={self.split!r} is not possible: it is the training half's share, below 1.")

    def _validate(self) -> None:
        """Check the constructor's arguments."""
        if self.method not in METHODS:
            raise MethodError(f"there is no method {self.method!r}; choose among {', '.join(METHODS)}.")
        if self.passes not in ("fresh", "shared"):
            raise MethodError(f"passes={self.passes!r} is not possible; choose 'fresh' or 'shared'.")
        if self.architecture_optimizer not in ("adam", "sgd"):
            raise MethodError(
                f"architecture_optimizer={self.architecture_optimizer!r} is not possible; choose 'adam' or 'sgd'."
            )
        self._check_split()
        for name in ("training_weight", "coupling"):
            value = getattr(self, name)
            numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            if len(numbers) not in (1, 2) or (isinstance(value, Sequence) and len(numbers) != 2):
                raise MethodError(f"{name}={value!r} is not possible: give a number, or a pair (first, last).")
            for number in numbers:
                check_number(name, number, minimum=0, is_open=True)
        check_number("architecture_lr", self.architecture_lr, minimum=0, is_open=True)
        check_number("architecture_weight_decay", self.architecture_weight_decay, minimum=0)
        check_number("warmup", self.warmup, minimum=0)
        betas = self.architecture_betas
        if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
            raise MethodError(f"architecture_betas={betas!r} is not possible: give Adam's two numbers.")
        for beta in betas:
            check_number("architecture_betas", beta, minimum=0)
            if beta >= 1:
                raise MethodError(f"architecture_betas={betas!r} is not possible: they must be below 1.")

    def _check_settings(self, args: TrainingArguments) -> None:
        name = type(self).__name__
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise MethodError(f"{name} cannot hold its second copy under DeepSpeed or FSDP; use DDP (plain torchrun).")
        if getattr(args, "n_gpu", 1) > 1:
            raise MethodError(
                f"{name} is not supported by torch.nn.DataParallel (one process, several GPUs). Start with torchrun, one "
                "process for each GPU."
            )
        if getattr(args, "fp16", False):
            raise MethodError(f"{name} takes passes of its own, whose loss fp16 does not scale. Use bf16, or float32.")
        if getattr(args, "label_smoothing_factor", 0):
            raise MethodError(
                f"{name} needs the loss that the model itself returns. Set label_smoothing_factor=0, or smooth in the model."
            )

    def _check_optimizer(self, optimizer: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not self._training_weights:
            raise ModelError(
                f"{type(self._model).__name__} has no weights to train beside its architecture parameters."
            )
        if any(id(parameter) not in held for parameter in self._weights):
            raise MethodError(
                "the optimizer does not train the second copy of the weights. Make a new Trainer for every search; when "
                "you make the optimizer yourself, call callback.attach(model) before."
            )

    def _validation_batches(self, args: TrainingArguments, loader: Any, model: nn.Module) -> ValidationBatches:
        dataset, training_size = self.validation_dataset, self._training_size
        if dataset is None:
            dataset, training_size = _VALIDATION.get(model, (None, None))
        if dataset is None:
            raise MethodError(
                f"{type(self).__name__} has no validation half. Give Trainer train_dataset=search.halve(dataset) instead of "
                "the data set, or this callback validation_dataset=."
            )
        if len(dataset) == 0:
            raise MethodError("validation_dataset= is empty.")
        trained_on = getattr(loader, "dataset", None)
        if training_size is not None and trained_on is not None and len(trained_on) != training_size:
            raise MethodError(
                f"Trainer trains on {len(trained_on)} items, and not on the training half of {training_size}. Give it what "
                "search.halve(dataset) returned."
            )
        columns = getattr(trained_on, "column_names", None)
        if columns is not None and hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns([name for name in dataset.column_names if name in columns])
        return ValidationBatches(
            dataset,
            args.train_batch_size,
            loader.collate_fn,
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            args.world_size,
            args.dataloader_num_workers,
        )


def _has_architecture(module: nn.Module) -> bool:
    return callable(getattr(module, "architecture_parameters", None))


def _inner_architectures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that have an architecture of their own, such as mixtures of operators, by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if path.partition(".")[0] != NAME and _has_architecture(module)
    }


def architecture_of(model: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The architecture parameters of a model, under their names in the model.

    Args:
        model: with a method ``architecture_parameters()``, or modules with one inside, or any with ``patterns``.
        patterns: glob pattern or patterns of names.

    Raises:
        ModelError: when there are none, or one that is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    if patterns is not None:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        found = {
            name: parameter
            for name, parameter in parameters.items()
            if not name.startswith(f"{NAME}.") and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
        }
        if not found:
            raise ModelError(
                f"architecture={patterns!r} matches no parameter of {type(model).__name__}; the first are: "
                f"{', '.join(list(parameters)[:6])}."
            )
        return found
    holders = {"": model} if _has_architecture(model) else _inner_architectures(model)
    if not holders:
        raise ModelError(
            f"{type(model).__name__} has no method architecture_parameters(), nor has a module in it, so there is no "
            "architecture to search. Name its parameters with architecture=, or search its widths with WidthSearchCallback."
        )
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for path, holder in holders.items():
        for label, parameter in holder.architecture_parameters().items():  # type: ignore[operator]
            if id(parameter) not in name_of:
                raise ModelError(
                    f"architecture_parameters() of {type(holder).__name__} gives {label!r}, which is no parameter of the "
                    f"model{f' ({path})' if path else ''}."
                )
            found[name_of[id(parameter)]] = parameter
    if not found:
        raise ModelError(f"architecture_parameters() of {type(model).__name__} is empty: there is nothing to search.")
    return found


def _loss_of(output: Any) -> Tensor | None:
    """The loss in what a model returned, or None."""
    if isinstance(output, Mapping):
        return output.get("loss")
    return output[0] if isinstance(output, tuple) and output and output[0].ndim == 0 else None


def _entropy(alpha: Tensor) -> Tensor:
    """[rows]: the entropy, in nats, of the softmax over the last dimension."""
    logs = alpha.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).flatten()
