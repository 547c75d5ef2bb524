"""Configuration of AFIDAF."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from hf_compress.errors import ModelError

SMALLEST_IMAGE = 32  # pixels: the last feature map has one place
_LARGEST = 2**16  # config.json is untrusted input; this bounds what a number in it can make us allocate

SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_sizes": [32, 64, 128, 256, 320]},
    "tiny": {"hidden_sizes": [32, 48, 96, 160, 192]},
    "extra_tiny": {"hidden_sizes": [32, 48, 64, 104, 144], "expand_ratio": 2},
    "hierarchical": {"frame": "swin", "hidden_sizes": [96, 192, 384, 768], "depths": [2, 2, 6, 2]},
}
"""Widths by name. "base" and "tiny" (T) are the paper's. "extra_tiny" is AFFNet-ET with AFIDAF's blocks and
"hierarchical" a network in the style of HAFIDAF; both are configurations of our own."""


@strict
class AfidafConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of :class:`AfidafModel`. The defaults give the paper's AFIDAF, 6,498,296 parameters for 1000 classes.

    Zheng et al. 2024, arXiv 2407.12217. Published code fixes the Fourier filter and the frame (AFFNet's). The kernels and
    groups of the image filter are a reconstruction that fits the parameter counts that the paper prints; others fit them
    as well, so they are arguments here.

    Args:
        frame: "mobile": AFFNet's, a stem, inverted residuals and three stages of blocks. "swin": Swin's frame with filters
            in place of attention, in the style of the paper's HAFIDAF, whose depths are not known: our own configuration.
        hidden_sizes: width of each stage. "mobile": five, the first at stride 2, the last three of blocks. "swin": four,
            from stride 4 on.
        depths: blocks of each stage that has blocks: three numbers, or four for "swin".
        stem_channels: width of the first convolution ("mobile").
        expand_ratio: of the inverted residuals between stages ("mobile").
        mlp_ratio: of the inverted residual inside a block, or of the MLP of "swin"; by default 2, or 4.
        mlp_groups: groups of the MLPs in each stage of "swin"; their channels are shuffled between the two layers.
        expansion_size: width of the last 1x1 convolution before pooling ("mobile"); by default four times the last stage,
            960 at most.
        use_fourier_filter: whether blocks have the filter in the Fourier domain. Off: the paper's IDAF.
        use_image_filter: whether blocks have the filter in the image domain. Off: AFFNet.
        image_filter_first: order of the two. The paper: True.
        image_filter_stages: "swin": so many stages, from the first on, have the image filter; the others the Fourier
            filter alone.
        fourier_groups: groups of channels that the mask of the Fourier filter is computed in.
        fourier_act: activation inside that mask, on real and imaginary parts.
        shrinkage: threshold of the soft shrinkage that ends the mask.
        fourier_transform: "fft"; "matrix", as products of real matrices, for runtimes without a transform; "auto": the
            matrices when exported.
        image_kernel_size, image_dilated_kernel_size, image_dilation: the two depthwise convolutions of the image filter.
        image_projection_groups: groups of its first and last 1x1 convolution; channels are shuffled after the first.
        image_pointwise_groups: groups of the 1x1 convolution between.
        hidden_act: name of the activation everywhere else.
        output_stride: 32, or 16 to keep the last stage at the resolution of the one before ("mobile"). By default 16
            under the segmentation head and 32 otherwise.
        layer_norm_eps: of the normalisation in the blocks.
        initializer_range: standard deviation of the first weights of Fourier filters and linear layers.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; any size from 32 on works.
        aspp_channels, aspp_rates, aspp_dropout: of the segmentation head.
        semantic_loss_ignore_index: label of pixels that no loss is taken at.
        detection_channels: of the levels of the detector, strides 16, 32, 64, ..., the last one pooled to one place.
        anchor_ratios: aspect ratios of anchors, each also the other way round.
        anchor_scales: smallest and largest size of anchors, relative to the image.
        matching_threshold: an anchor that overlaps an object more (intersection over union) is trained to find it.
        negatives: per positive anchor, so many hard negatives are trained on.
        out_features, out_indices: which feature maps a backbone gives, of "stem" (stride 2), "stage1" (4) to "stage4"
            (32), or of "stage1" to "stage4" for "swin"; by default the last.

    Raises:
        ModelError: naming the field that is not as said here.
    """

    model_type = "afidaf"
    keys_to_ignore_at_inference = ["loss_dict", "hidden_states"]  # noqa: RUF012

    frame: Literal["mobile", "swin"] = "mobile"
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 320)
    depths: list[int] | tuple[int, ...] = (2, 4, 3)
    stem_channels: int = 16
    expand_ratio: int | float = 4
    mlp_ratio: int | float | None = None
    mlp_groups: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    expansion_size: int | None = None
    use_fourier_filter: bool = True
    use_image_filter: bool = True
    image_filter_first: bool = True
    image_filter_stages: int = 2
    fourier_groups: int = 8
    fourier_act: str = "silu"
    shrinkage: float | int = 0.01
    fourier_transform: Literal["auto", "fft", "matrix"] = "auto"
    image_kernel_size: int = 5
    image_dilated_kernel_size: int = 7
    image_dilation: int = 3
    image_projection_groups: int = 8
    image_pointwise_groups: int = 1
    hidden_act: str = "silu"
    output_stride: int | None = None
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    num_channels: int = 3
    image_size: int = 256
    aspp_channels: int = 256
    aspp_rates: list[int] | tuple[int, ...] = (6, 12, 18)
    aspp_dropout: float | int = 0.1
    semantic_loss_ignore_index: int = 255
    detection_channels: list[int] | tuple[int, ...] = (512, 256, 256, 128, 128, 64)
    anchor_ratios: list[int | float] | tuple[int | float, ...] = (2, 3)
    anchor_scales: list[float | int] | tuple[float | int, ...] = (0.1, 1.05)
    matching_threshold: float = 0.5
    negatives: int = 3
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def of_size(cls, name: str, **changes: Any) -> "AfidafConfig":
        """The configuration of a size: one of ``SIZES``, with changes to any field.

        Raises:
            ModelError: when there is no such size.
        """
        if name not in SIZES:
            raise ModelError(f"AfidafConfig: there is no size {name!r}. Possible: {', '.join(SIZES)}.")
        return cls(**{**SIZES[name], **changes})

    def __post_init__(self, **kwargs: Any):
        for name in ("hidden_sizes", "depths", "mlp_groups", "aspp_rates", "detection_channels"):
            setattr(self, name, list(getattr(self, name)))
        self.anchor_ratios, self.anchor_scales = list(self.anchor_ratios), list(self.anchor_scales)
        is_mobile = self.frame == "mobile"
        self.mlp_ratio = (2 if is_mobile else 4) if self.mlp_ratio is None else self.mlp_ratio
        if self.expansion_size is None:
            self.expansion_size = min(4 * max(self.hidden_sizes[-1:], default=1), 960)
        self._check_sizes(is_mobile)
        self._check_groups()
        self._check_heads()
        self.stage_names = [*(["stem"] if is_mobile else []), "stage1", "stage2", "stage3", "stage4"]
        kwargs.pop("stage_names", None)  # follows from the frame; a saved configuration repeats it
        try:
            self.set_output_features_output_indices(
                out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
            )
        except ValueError as error:
            raise ModelError(
                f"AfidafConfig: {error} Possible out_features: {', '.join(self.stage_names)}, in this order."
            ) from error
        super().__post_init__(**kwargs)

    @property
    def channels(self) -> list[int]:
        """Width of the feature map of each of ``stage_names``."""
        return list(self.hidden_sizes)

    @property
    def block_channels(self) -> list[int]:
        """Width of each stage that has blocks."""
        return list(self.hidden_sizes)[-len(self.depths) :]

    def _check_sizes(self, is_mobile: bool) -> None:
        stages = (5, 3) if is_mobile else (4, 4)
        for name, count in zip(("hidden_sizes", "depths"), stages, strict=True):
            values, least = getattr(self, name), 1 if name == "hidden_sizes" else 0
            self._require(
                name, len(values) == count and all(least <= n <= _LARGEST for n in values), f"{count} positive numbers"
            )
        for name in (
            "stem_channels",
            "expansion_size",
            "num_channels",
            "aspp_channels",
            "fourier_groups",
            "image_projection_groups",
            "image_pointwise_groups",
            "image_dilation",
        ):
            self._require(name, 1 <= getattr(self, name) <= _LARGEST, f"1 to {_LARGEST}")
        for name in ("image_kernel_size", "image_dilated_kernel_size"):
            self._require(
                name, getattr(self, name) % 2 == 1 and 1 <= getattr(self, name) < 64, "an odd number below 64"
            )
        for name in ("expand_ratio", "mlp_ratio"):
            self._require(name, 0 < getattr(self, name) <= 64, "a positive number up to 64")
        for name in ("shrinkage", "layer_norm_eps", "initializer_range"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._require("image_size", SMALLEST_IMAGE <= self.image_size <= _LARGEST, f"{SMALLEST_IMAGE} pixels or more")
        strides = (None, 16, 32) if is_mobile else (None, 32)
        self._require("output_stride", self.output_stride in strides, " or ".join(str(n) for n in strides))
        if not is_mobile:
            possible = len(self.mlp_groups) == 4 and min(self.mlp_groups) >= 1
            self._require("mlp_groups", possible, "four positive numbers")
            self._require("image_filter_stages", 0 <= self.image_filter_stages <= 4, "0 to 4")

    def _check_groups(self) -> None:
        """Every stage with blocks must fall into the groups of its filters."""
        used = {
            "fourier_groups": self.use_fourier_filter,
            "image_projection_groups": self.use_image_filter,
            "image_pointwise_groups": self.use_image_filter,
        }
        for name in (name for name, is_used in used.items() if is_used):
            groups = getattr(self, name)
            for width, depth in zip(self.block_channels, self.depths, strict=True):
                if depth and width % groups:
                    raise ModelError(
                        f"AfidafConfig: a stage of {width} channels does not fall into {name}={groups}; give hidden_sizes "
                        f"that are multiples of it, or another {name}."
                    )
        for width, groups in zip(self.block_channels, self.mlp_groups, strict=False):
            if self.frame == "swin" and (width % groups or int(width * (self.mlp_ratio or 0)) % groups):
                raise ModelError(
                    f"AfidafConfig: an MLP of {width} channels does not fall into mlp_groups={groups}; give hidden_sizes "
                    "that are multiples of it, or other mlp_groups."
                )

    def _check_heads(self) -> None:
        positive = {"aspp_rates": 1, "detection_channels": 3, "anchor_ratios": 0}
        for name, least in positive.items():
            values = getattr(self, name)
            possible = len(values) >= least and all(0 < value <= _LARGEST for value in values)
            self._require(name, possible, f"{least} or more positive numbers")
        low_high = self.anchor_scales
        self._require("anchor_scales", len(low_high) == 2 and 0 < low_high[0] < low_high[1] <= 4, "two rising numbers")
        self._require("aspp_dropout", 0 <= self.aspp_dropout < 1, "0 or more and below 1")
        self._require("matching_threshold", 0 < self.matching_threshold < 1, "between 0 and 1")
        self._require("negatives", self.negatives >= 1, "1 or more")

    def _require(self, name: str, is_possible: bool, what: str) -> None:
        if not is_possible:
            raise ModelError(f"AfidafConfig: {name}={getattr(self, name)} is not possible; give {what}.")


__all__ = ["SIZES", "AfidafConfig"]
