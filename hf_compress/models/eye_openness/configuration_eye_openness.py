"""Configuration of the eye openness model."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"channels": (8, 12, 16, 24), "strides": (2, 2, 1, 2), "pooling": "width", "head_hidden": 16},
    "tiny": {"channels": (16, 32, 48, 64, 96), "strides": (1, 2, 2, 1, 2), "pooling": "none", "head_hidden": 64},
    "tiny-pool": {"channels": (16, 32, 48, 64, 96), "strides": (1, 2, 2, 1, 2), "pooling": "2x3", "head_hidden": 64},
}
"""Backbones of this package: widths and strides of their 3x3 convolutions, what is pooled before the head (nothing, the
width alone, or to 2x3 places), and the hidden units of the head."""

LOSSES = {
    "synthetic": 1.0,
    "aperture": 0.5,
    "weak": 1.0,
    "rank": 0.0,
    "domain": 0.0,
    "consistency": 0.0,
    "uncertainty": 0.1,
}
"""Name of a part of the objective -> its weight where a configuration does not name it."""

WEAK_OBJECTIVES = ("interval", "link", "bce")


@strict
class EyeOpennessConfig(PreTrainedConfig):
    """Configuration of :class:`EyeOpennessForRegression`.

    Args:
        backbone: ``nano``, ``tiny`` or ``tiny-pool`` (see :data:`PRESETS`), or ``timm/NAME`` for a convolutional
            network of timm.
        backbone_kwargs: of ``timm.create_model``.
        image_size: height and width of an image; (32, 48), and (64, 96) for timm, when not given.
        num_channels: channels of an image.
        num_eyes: numbers per image: 1 for crops of one eye; 2 (left, right) for crops of a face.
        head_hidden: units of the head's hidden layer; the preset's own when not given, 64 for timm.
        dropout: before the last layer.
        predict_aperture: a second output, aperture over the distance of the corners.
        predict_uncertainty: a further output, the logarithm of the expected absolute error.
        num_domains: of the training images: 0 is rendered, the others are real (or a held-out style).
        domain_batch_norm: statistics, scales and shifts of BatchNorm for each domain; presets only.
        inference_domain: whose BatchNorm serves images without a ``domain_ids``; the last one when not given.
        closed_max, open_min: what a weak label says: closed is ``openness <= closed_max``, open is
            ``openness >= open_min``. Both are assumptions about annotators. Dossier: tau_c, tau_o.
        interval_slack: how far beyond these a prediction may be before the interval hinge acts: about the error of the model.
            With 0 it pulls whatever errs past a limit and nothing that errs within, which bends the scale: eyes near
            ``closed_max`` come out too closed, eyes near ``open_min`` too open.
        weak_objective: ``interval`` (the hinge that knows these two numbers), ``link`` (a logistic link between openness
            and label, learnt), ``bce`` (openness as the probability of "open"; a control, it spoils the degree).
        link_kappa, link_theta: slope and place of the link, where ``open_probability`` is 0.5; starting values when learnt.
        rank_margin: an open eye is to be so much more open than a closed one, for the part ``rank``.
        loss_weights: weights of the parts of the objective, over those of :data:`LOSSES`; 0 leaves a part out.
        smooth_l1_beta: where the smooth l1 of the regressions turns from a parabola to a line.

    Raises:
        ModelError: when a value is impossible.
    """

    model_type = "eye_openness"
    keys_to_ignore_at_inference = ["losses", "hidden_states"]  # noqa: RUF012

    backbone: str = "tiny"
    backbone_kwargs: dict[str, Any] | None = None
    image_size: int | list[int] | tuple[int, ...] | None = None
    num_channels: int = 3
    num_eyes: int = 1
    head_hidden: int | None = None
    dropout: float | int = 0.0
    predict_aperture: bool = True
    predict_uncertainty: bool = False
    num_domains: int = 1
    domain_batch_norm: bool = False
    inference_domain: int | None = None
    closed_max: float | int = 0.12
    open_min: float | int = 0.45
    interval_slack: float | int = 0.1
    weak_objective: str = "interval"
    link_kappa: float | int = 12.0
    link_theta: float | int = 0.28
    rank_margin: float | int = 0.3
    loss_weights: dict[str, float | int] | None = None
    smooth_l1_beta: float | int = 0.05

    def __post_init__(self, **kwargs: Any):
        preset = PRESETS.get(self.backbone)
        if preset is None and not (self.backbone.startswith("timm/") and len(self.backbone) > 5):
            raise ModelError(
                f"EyeOpennessConfig: backbone={self.backbone!r} is not possible; give {', '.join(PRESETS)}, or timm/NAME "
                "with the name of a model of timm."
            )
        size = self.image_size if self.image_size is not None else ((32, 48) if preset else (64, 96))
        self.image_size = [size, size] if isinstance(size, int) else list(size)
        self.backbone_kwargs = dict(self.backbone_kwargs or {})
        if self.head_hidden is None:
            self.head_hidden = preset["head_hidden"] if preset else 64
        if self.inference_domain is None:
            self.inference_domain = self.num_domains - 1
        given = dict(self.loss_weights or {})
        unknown = sorted(set(given) - set(LOSSES))
        self.loss_weights = {name: float(given.get(name, weight)) for name, weight in LOSSES.items()}
        smallest = math.prod(preset["strides"]) if preset else 8
        possible = {
            "backbone_kwargs": (not (preset and self.backbone_kwargs), "nothing: they are for timm's models"),
            "image_size": (
                len(self.image_size) == 2 and all(smallest <= side <= 1024 for side in self.image_size),
                f"height and width, {smallest} to 1024",
            ),
            "num_channels": (1 <= self.num_channels <= 16, "1 to 16"),
            "num_eyes": (1 <= self.num_eyes <= 2, "1 or 2"),
            "head_hidden": (1 <= self.head_hidden <= 2**14, f"1 to {2**14}"),
            "dropout": (0 <= self.dropout < 1, "0 to 1"),
            "num_domains": (1 <= self.num_domains <= 64, "1 to 64"),
            "domain_batch_norm": (bool(preset) or not self.domain_batch_norm, "False for timm's models"),
            "inference_domain": (0 <= self.inference_domain < self.num_domains, f"0 to {self.num_domains - 1}"),
            "closed_max": (0 <= self.closed_max < self.open_min, f"0 to open_min={self.open_min}"),
            "open_min": (self.open_min <= 1, "up to 1"),
            "interval_slack": (
                0 <= self.interval_slack < (self.open_min - self.closed_max) / 2,
                f"0 to {(self.open_min - self.closed_max) / 2:g}, half of what is between closed_max and open_min",
            ),
            "weak_objective": (self.weak_objective in WEAK_OBJECTIVES, " or ".join(WEAK_OBJECTIVES)),
            "link_kappa": (4 <= self.link_kappa <= 40, "4 to 40"),
            "link_theta": (0 < self.link_theta < 1, "between 0 and 1"),
            "rank_margin": (0 < self.rank_margin <= 1, "up to 1"),
            "loss_weights": (
                not unknown and all(0 <= weight < math.inf for weight in self.loss_weights.values()),
                f"{', '.join(LOSSES)} with weights of 0 or more" + (f", not {', '.join(unknown)}" if unknown else ""),
            ),
            "smooth_l1_beta": (0 < self.smooth_l1_beta < math.inf, "a positive number"),
        }
        for name, (is_possible, what) in possible.items():
            if not is_possible:
                raise ModelError(f"EyeOpennessConfig: {name}={getattr(self, name)} is not possible; give {what}.")
        if self.loss_weights["domain"] > 0 and self.num_domains < 2:
            raise ModelError(
                "EyeOpennessConfig: loss_weights['domain'] needs num_domains of 2 or more: there is nothing to tell apart."
            )
        super().__post_init__(**kwargs)


__all__ = ["LOSSES", "PRESETS", "EyeOpennessConfig"]
