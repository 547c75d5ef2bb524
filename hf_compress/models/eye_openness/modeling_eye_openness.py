"""A small network that says how far an eye is open, trained by exact labels of rendered eyes and open/closed of real ones.

The setting is that of Mequanint et al. 2019 (arXiv 1910.10845). Their network and losses are not public: architecture,
objective and defaults are a design of this package, consistent with the abstract. Domain batch normalisation: Chang et al.
2019 (arXiv 1906.03950); adversarial domain head: Ganin et al. 2016 (arXiv 1505.07818).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from hf_compress.errors import DataError, ModelError

from .configuration_eye_openness import PRESETS, EyeOpennessConfig
from .loss_eye_openness import (
    binary_loss,
    interval_loss,
    kappa_of,
    link_logit,
    masked_mean,
    ranking_loss,
    raw_kappa,
    regression_loss,
    reversal_strength,
    reverse_gradient,
    uncertainty_loss,
)

_CONTRAST_FLOOR = 0.05  # added to an image's deviation, so that near-empty crops are not amplified
_DOMAIN_HIDDEN = 64
_TIMM_ARGUMENTS = (  # that would read files, fetch, or change what comes out
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "features_only",
    "num_classes", "in_chans", "global_pool",
)  # fmt: skip


@dataclass
class EyeOpennessOutput(ModelOutput):
    """What the model says about eyes.

    Attributes:
        loss: of the labels that were given.
        losses: its parts before their weights, detached.
        openness: [batch, eyes]: vertical aperture of the lids over this person's largest one, 0 to 1. A relaxed open eye
            is about 0.75 to 0.85.
        logits: [batch, eyes]: of the openness.
        aperture_ratio: [batch, eyes]: vertical aperture over the distance of the corners, about 0 to 0.45.
        open_probability: [batch, eyes]: that an annotator calls the eye open.
        log_scale: [batch, eyes]: logarithm of the expected absolute error of the openness.
        hidden_states: what every layer gives.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    openness: Tensor | None = None
    logits: Tensor | None = None
    aperture_ratio: Tensor | None = None
    open_probability: Tensor | None = None
    log_scale: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class DomainBatchNorm2d(nn.Module):
    """A BatchNorm for each domain; every image goes through that of its own.

    Args:
        channels: of the images.
        domains: how many.
        inference_domain: whose BatchNorm serves images without a domain.
    """

    def __init__(self, channels: int, domains: int, inference_domain: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(domains))
        self.inference_domain = inference_domain

    def forward(self, hidden_states: Tensor, domain_ids: Tensor | None = None) -> Tensor:
        """Float [batch, channels, height, width] and int64 [batch] -> normalised, of the same shape."""
        if domain_ids is None:
            return self.norms[self.inference_domain](hidden_states)
        order = domain_ids.argsort(stable=True)
        parts = hidden_states[order].split(torch.bincount(domain_ids, minlength=len(self.norms)).tolist())
        done = [norm(part) for norm, part in zip(self.norms, parts, strict=True) if len(part)]
        return torch.cat(done)[order.argsort()]


class EyeOpennessLayer(nn.Module):
    """Convolution of 3x3, BatchNorm, ReLU."""

    def __init__(self, before: int, after: int, stride: int, config: EyeOpennessConfig):
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm: nn.Module = (
            DomainBatchNorm2d(after, config.num_domains, int(config.inference_domain or 0))
            if config.domain_batch_norm
            else nn.BatchNorm2d(after)
        )

    def forward(self, hidden_states: Tensor, domain_ids: Tensor | None = None) -> Tensor:
        """[batch, before, height, width] -> [batch, after, height / stride, width / stride]."""
        hidden_states = self.convolution(hidden_states)
        if isinstance(self.norm, DomainBatchNorm2d):
            return F.relu(self.norm(hidden_states, domain_ids))
        return F.relu(self.norm(hidden_states))


class EyeOpennessBackbone(nn.Module):
    """The convolutions of a preset, and what they give pooled as the head wants it."""

    def __init__(self, config: EyeOpennessConfig):
        super().__init__()
        preset = PRESETS[config.backbone]
        channels = [config.num_channels, *preset["channels"]]
        self.layers = nn.ModuleList(
            EyeOpennessLayer(before, after, stride, config)
            for before, after, stride in zip(channels, channels[1:], preset["strides"], strict=False)
        )
        self.pooling = preset["pooling"]
        height, width = config.image_size  # type: ignore[misc]
        for stride in preset["strides"]:
            height, width = math.ceil(height / stride), math.ceil(width / stride)
        places = {"none": height * width, "width": height, "2x3": 6}[self.pooling]
        self.num_channels, self.num_features = channels[-1], channels[-1] * places

    def forward(self, pixel_values: Tensor, domain_ids: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Standardised images -> features for the head [batch, features], and the output of every layer.

        The height is never averaged out: where the lid stands is what the head has to know.
        """
        hidden_states, collected = pixel_values, []
        for layer in self.layers:
            hidden_states = layer(hidden_states, domain_ids)
            collected.append(hidden_states)
        if self.pooling == "width":
            hidden_states = hidden_states.mean(-1)
        elif self.pooling == "2x3":
            hidden_states = F.adaptive_avg_pool2d(hidden_states, (2, 3))
        return hidden_states.flatten(1), tuple(collected)


class EyeOpennessTimmBackbone(nn.Module):
    """A convolutional network of timm with random weights, without its pooling and classifier."""

    def __init__(self, config: EyeOpennessConfig):
        super().__init__()
        import timm

        name, arguments = config.backbone.removeprefix("timm/"), config.backbone_kwargs or {}
        refused = sorted(set(arguments) & set(_TIMM_ARGUMENTS))
        if refused:
            raise ModelError(f"EyeOpennessConfig: backbone_kwargs must not have {', '.join(refused)}; leave them out.")
        if not timm.is_model(name):
            raise ModelError(
                f"EyeOpennessConfig: timm has no model {name!r}; timm.list_models() names those that it has."
            )
        try:
            self.network = timm.create_model(
                name, pretrained=False, num_classes=0, in_chans=config.num_channels, **arguments
            )
            with torch.no_grad():
                probe = torch.zeros(1, config.num_channels, *config.image_size, device="cpu")  # type: ignore[misc]
                features = _without_changing(self.network, probe)
        except ModelError:
            raise
        except Exception as error:  # timm's models raise anything
            raise ModelError(
                f"EyeOpennessConfig: timm's {name} cannot be built for this image size: {error}"
            ) from error
        if features.ndim != 4:
            raise ModelError(
                f"EyeOpennessConfig: timm's {name} gives {features.ndim - 1} dimensions and not [channels, height, width]. "
                "Choose a convolutional network, such as timm/mobilenetv3_small_050."
            )
        self.num_channels, self.num_features = features.shape[1], features[0].numel()

    def forward(self, pixel_values: Tensor, domain_ids: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`EyeOpennessBackbone.forward`; the only layer's output is the last one."""
        network: Any = self.network
        features = network.forward_features(pixel_values)
        return features.flatten(1), (features,)


def _without_changing(network: Any, images: Tensor) -> Tensor:
    """Features in evaluation mode, on whatever device the parameters are being built."""
    device = next(network.parameters()).device
    was_training = network.training
    features: Tensor = network.eval().forward_features(images.to(device))
    network.train(was_training)
    return features


class EyeOpennessPreTrainedModel(PreTrainedModel):
    """Initialisation (torch's own of convolutions and linear layers) and what transformers wants to know."""

    config: EyeOpennessConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    accepts_loss_kwargs = False  # every part of the loss is a mean over its own entries

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, EyeOpennessForRegression) and self.config.weak_objective == "link":
            init.constant_(module.link_slope, raw_kappa(float(self.config.link_kappa)))
            theta = float(self.config.link_theta)
            init.constant_(module.link_place, math.log(theta / (1 - theta)))


class EyeOpennessForRegression(EyeOpennessPreTrainedModel):
    """How far eyes are open.

    Images are float in 0..1; the model standardises each by its own mean and deviation, so exposure cannot matter and an
    exported file needs no other preprocessing.

    Attributes:
        adversarial_strength: lambda of the gradient reversal; :class:`ReversalSchedule` raises it while training.
    """

    def __init__(self, config: EyeOpennessConfig):
        super().__init__(config)
        is_preset = config.backbone in PRESETS
        self.backbone = EyeOpennessBackbone(config) if is_preset else EyeOpennessTimmBackbone(config)
        outputs = config.num_eyes * (1 + config.predict_aperture + config.predict_uncertainty)
        self.hidden = nn.Linear(self.backbone.num_features, int(config.head_hidden or 1))
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(int(config.head_hidden or 1), outputs)
        self.adversarial_strength = 1.0
        if self._weights["domain"] > 0:
            self.domain_hidden = nn.Linear(self.backbone.num_channels, _DOMAIN_HIDDEN)
            self.domain_output = nn.Linear(_DOMAIN_HIDDEN, 1 if config.num_domains == 2 else config.num_domains)
        if config.weak_objective == "link":
            self.link_slope = nn.Parameter(torch.zeros(()))
            self.link_place = nn.Parameter(torch.zeros(max(config.num_domains - 1, 1)))
        self.post_init()

    @property
    def _weights(self) -> dict[str, float]:
        weights: dict[str, Any] = self.config.loss_weights or {}
        return weights

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        openness: Tensor | None = None,
        aperture_ratio: Tensor | None = None,
        eye_state: Tensor | None = None,
        domain_ids: Tensor | None = None,
        sample_weight: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> EyeOpennessOutput:
        """How far eyes are open, and the loss of what labels there are. A batch may mix both kinds of labels.

        Args:
            pixel_values: float [batch, channels, height, width], 0 to 1.
            openness: float [batch, eyes] (or [batch] for one eye); NaN where there is no exact label.
            aperture_ratio: likewise.
            eye_state: int64, of the same shape: 1 open, 0 closed, -100 unlabelled.
            domain_ids: int64 [batch], 0 for rendered images.
            sample_weight: float [batch], 0 or more.
            output_hidden_states: whether to return every layer's output.
            return_dict: False gives a tuple.

        Raises:
            DataError: for images of another size and domains that the configuration does not have.
        """
        config = self.config
        if list(pixel_values.shape[1:]) != [config.num_channels, *config.image_size]:  # type: ignore[misc]
            raise DataError(
                f"images are {'x'.join(map(str, pixel_values.shape[1:]))} (channels x height x width), and this model takes "
                f"{'x'.join(map(str, [config.num_channels, *config.image_size]))}. "  # type: ignore[misc]
                "Use EyeOpennessImageProcessor."
            )
        if config.num_domains == 1:
            domain_ids = None  # there is nothing that could differ between domains
        if domain_ids is not None:
            domain_ids = domain_ids.reshape(-1)
            if bool((domain_ids < 0).any()) or bool((domain_ids >= config.num_domains).any()):
                raise DataError(
                    f"domain_ids has {sorted(set(domain_ids.tolist()))}, and this model has num_domains={config.num_domains}."
                )
        output, features, hidden_states = self._predict(pixel_values, domain_ids)
        eyes = config.num_eyes
        logits, *others = output.split(eyes, dim=1)
        found = EyeOpennessOutput(openness=logits.sigmoid(), logits=logits)
        if config.predict_aperture:
            found.aperture_ratio = others.pop(0).sigmoid()
        if config.predict_uncertainty:
            found.log_scale = others.pop(0).clamp(-7, 1)
        found.open_probability = self._open_logit(logits.sigmoid(), domain_ids).sigmoid()
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        found.hidden_states = hidden_states if wanted else None
        domain_logits = None
        if self._weights["domain"] > 0 and (self.training or domain_ids is not None):
            reversed_features = reverse_gradient(features, self.adversarial_strength)
            domain_logits = self.domain_output(F.relu(self.domain_hidden(reversed_features)))
        if any(labels is not None for labels in (openness, aperture_ratio, eye_state)):
            labels = {
                name: value.reshape(-1, eyes)
                for name, value in (
                    ("openness", openness),
                    ("aperture_ratio", aperture_ratio),
                    ("eye_state", eye_state),
                )
                if value is not None
            }
            with torch.autocast(pixel_values.device.type, enabled=False):
                parts = self._losses(found, labels, domain_ids, domain_logits, sample_weight)
            if self.training and self._weights["consistency"] > 0:
                parts["consistency"] = self._consistency(pixel_values, domain_ids, found.openness)
            found.loss = torch.stack([self._weights[name] * value for name, value in parts.items()]).sum()
            found.losses = {name: value.detach() for name, value in parts.items()}
        return found

    def _predict(self, images: Tensor, domain_ids: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The head's outputs [batch, outputs], pooled features of the trunk [batch, channels], every layer's output."""
        features, hidden_states = self.backbone(_standardise(images), domain_ids)
        output = self.output(self.dropout(F.relu(self.hidden(features))))
        # only the domain head reads them, and a watched forward pass should not meet what nobody reads
        pooled = hidden_states[-1].mean((2, 3)) if self._weights["domain"] > 0 else features
        return output, pooled, hidden_states

    def _open_logit(self, openness: Tensor, domain_ids: Tensor | None) -> Tensor:
        """Logit of "open": one theta for each real domain; rendered images take that of the first."""
        config = self.config
        if config.weak_objective != "link":
            return link_logit(openness, float(config.link_kappa), float(config.link_theta))
        places = self.link_place.sigmoid()
        if domain_ids is None:
            return link_logit(
                openness, kappa_of(self.link_slope), places[max(int(config.inference_domain or 0) - 1, 0)]
            )
        return link_logit(openness, kappa_of(self.link_slope), places[(domain_ids - 1).clamp(min=0)][:, None])

    def _losses(
        self,
        found: EyeOpennessOutput,
        labels: dict[str, Tensor],
        domain_ids: Tensor | None,
        domain_logits: Tensor | None,
        sample_weight: Tensor | None,
    ) -> dict[str, Tensor]:
        config, weights = self.config, self._weights
        assert found.openness is not None and found.logits is not None
        beta, s, z = float(config.smooth_l1_beta), found.openness.float(), found.logits.float()
        weight = None if sample_weight is None else sample_weight.float().reshape(-1, 1).expand_as(s)
        parts: dict[str, Tensor] = {}
        if "openness" in labels:
            parts["synthetic"] = regression_loss(s, labels["openness"], beta, weight=weight)
            if found.log_scale is not None:
                parts["uncertainty"] = uncertainty_loss(s, labels["openness"], found.log_scale.float())
        if "aperture_ratio" in labels and found.aperture_ratio is not None:
            parts["aperture"] = regression_loss(
                found.aperture_ratio.float(), labels["aperture_ratio"], beta, 2.0, weight
            )
        if "eye_state" in labels:
            state = labels["eye_state"]
            if config.weak_objective == "interval":
                slack = float(config.interval_slack)
                limits = float(config.closed_max) + slack, float(config.open_min) - slack
                parts["weak"] = interval_loss(s, state, *limits, beta, weight)
            else:
                logit = z if config.weak_objective == "bce" else self._open_logit(s, domain_ids)
                parts["weak"] = binary_loss(logit, state, weight)
            if weights["rank"] > 0:
                parts["rank"] = ranking_loss(s, state, float(config.rank_margin))
        if domain_ids is not None and domain_logits is not None:
            if domain_logits.shape[1] == 1:
                parts["domain"] = F.binary_cross_entropy_with_logits(domain_logits.float()[:, 0], domain_ids.float())
            else:
                parts["domain"] = F.cross_entropy(domain_logits.float(), domain_ids)
        return parts or {"synthetic": z.sum() * 0.0}

    def _consistency(self, images: Tensor, domain_ids: Tensor | None, openness: Tensor | None) -> Tensor:
        """Mean |s(x) - s(x')|, x' with another gamma and noise; of real images where the domain is known."""
        assert openness is not None
        gamma = torch.empty(len(images), 1, 1, 1, device=images.device, dtype=images.dtype).uniform_(0.7, 1.4)
        changed = (images.clamp(0, 1) + 1e-3) ** gamma + 0.02 * torch.randn_like(images)
        other = self._predict(changed, domain_ids)[0][:, : self.config.num_eyes].sigmoid()
        real = torch.ones_like(openness, dtype=torch.bool) if domain_ids is None else (domain_ids > 0)[:, None]
        return masked_mean((openness - other).abs(), real.expand_as(openness))

    def merge_domains(self, domain: int | None = None) -> "EyeOpennessForRegression":
        """Keep one domain's BatchNorm as the ordinary one, in place; for what is pruned, quantized or shipped.

        Args:
            domain: the one to keep; the configuration's ``inference_domain`` when not given.

        Raises:
            ModelError: when the model has no such domain.
        """
        chosen = int(self.config.inference_domain or 0) if domain is None else domain
        if not 0 <= chosen < self.config.num_domains:
            raise ModelError(f"there is no domain {chosen}; this model has num_domains={self.config.num_domains}.")
        for layer in self.modules():
            if isinstance(layer, EyeOpennessLayer) and isinstance(layer.norm, DomainBatchNorm2d):
                layer.norm = layer.norm.norms[chosen]
        self.config.domain_batch_norm = False
        self.config.inference_domain = chosen
        return self

    def drop_domain_head(self) -> "EyeOpennessForRegression":
        """Remove the adversarial domain head, which only training needs, in place."""
        if self._weights["domain"] > 0:
            del self.domain_hidden, self.domain_output
            self.config.loss_weights = {**self._weights, "domain": 0.0}
        return self


def _standardise(images: Tensor) -> Tensor:
    """(x - mean) / (deviation + 0.05) of each image, over all channels and places."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    # the tiny number keeps the gradient of a constant image finite
    deviation = (centred.square().mean((1, 2, 3), keepdim=True) + 1e-12).sqrt()
    return centred / (deviation + _CONTRAST_FLOOR)


class ReversalSchedule(TrainerCallback):
    """Raise the gradient reversal from 0 to nearly 1 over the training: lambda_p of arXiv 1505.07818."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _trained(kwargs).adversarial_strength = reversal_strength(state.global_step / max(state.max_steps, 1))


class DropDomainHead(TrainerCallback):
    """Take the domain head out of the model when training ends: it is for training alone, and would be saved."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _trained(kwargs).drop_domain_head()


def _trained(kwargs: dict[str, Any]) -> Any:
    from hf_compress.methods.trained_model import trained_model  # not to load all methods with the model

    return trained_model(kwargs)


__all__ = [
    "DomainBatchNorm2d",
    "DropDomainHead",
    "EyeOpennessForRegression",
    "EyeOpennessOutput",
    "EyeOpennessPreTrainedModel",
    "ReversalSchedule",
]
