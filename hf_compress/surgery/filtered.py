"""A filter over tokens: the module that stands where an attention block of a vision transformer was.

The filters are AFIDAF's (Zheng et al. 2024, arXiv 2407.12217): a group-shuffled large kernel in the image domain, then a
mask that depends on the image in the Fourier domain; see :mod:`hf_compress.models.afidaf.filters_afidaf`. The paper
trains a new network from scratch; putting its filters in place of trained attention is an extension of our own, and so
are the two parts around them:

- Patch tokens go through the filters as a map and then through one linear layer, which starts as the product of the
  attention's value and output projections: what the attention would give if every token looked at itself alone.
- Class and register tokens are on no map. They keep the attention that they had, in the same weights and to rounding
  the same numbers, at a cost that is linear in the number of tokens: with few queries, keys and values need not be
  computed for every token, since ``q (W x)`` is ``(W' q) x``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_compress.errors import DataError

Filter = Literal["afidaf", "fourier", "image"]
FILTERS: tuple[Filter, ...] = ("afidaf", "fourier", "image")
"""Both filters of AFIDAF, or one of them (the paper's ablation)."""

MOST_PREFIX_TOKENS = 64  # class, distillation and register tokens; models have up to 17
LONGEST_SIDE = 4096  # tokens of a map
_GROUPS = 8  # of channels, in the paper
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class PrefixAttention(nn.Module):
    """Multi-head attention with the first tokens as queries and all tokens as keys and values.

    Args:
        channels: of the tokens.
        num_heads, head_dim: of the attention.
        prefix: number of query tokens.
        scaling: of the scores.
        bias: whether queries have a bias. One of the keys would change all scores of a query alike, and so nothing.
    """

    def __init__(self, channels: int, num_heads: int, head_dim: int, prefix: int, scaling: float, bias: bool):
        super().__init__()
        self.prefix = prefix
        self.scaling = scaling
        self.query = nn.Linear(channels, num_heads * head_dim, bias=bias)
        # products, not grouped convolutions: of a single place, those give other roundings at other memory addresses
        self.key_weight = nn.Parameter(torch.empty(num_heads, channels, head_dim))
        self.value_weight = nn.Parameter(torch.empty(num_heads, head_dim, channels))
        self.value_bias = nn.Parameter(torch.empty(num_heads, head_dim, 1))
        self.output = nn.Linear(num_heads * head_dim, channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Float [batch, tokens, channels] -> [batch, prefix, channels]."""
        heads = self.key_weight.shape[0]
        queries = self.query(hidden_states[:, : self.prefix]).transpose(1, 2).unflatten(1, (heads, -1))
        rows = (self.key_weight @ queries).transpose(2, 3).flatten(1, 2)  # [batch, heads prefix, channels]
        weights = (rows @ hidden_states.transpose(1, 2) * self.scaling).softmax(dim=-1)
        context = (weights @ hidden_states).unflatten(1, (heads, -1)).transpose(2, 3)
        values = self.value_weight @ context + self.value_bias  # [batch, heads, head_dim, prefix]
        return self.output(values.flatten(1, 2).transpose(1, 2))


class FilteredTokens(nn.Module):
    """Filters in place of self-attention: same input, same output, no attention weights.

    Masks are ignored: filters see every token of the map, or of a window.

    Args:
        channels: of the tokens.
        filter: one of :data:`FILTERS`.
        grid: height and width of the map in tokens. Another map of the same proportions is recognised by its number of
            tokens.
        prefix: class and register tokens in front of the map.
        num_heads, head_dim, scaling, bias: of the attention that these tokens keep.
    """

    def __init__(
        self,
        channels: int,
        filter: Filter,
        grid: tuple[int, int],
        prefix: int = 0,
        *,
        num_heads: int = 1,
        head_dim: int = 1,
        scaling: float = 1.0,
        bias: bool = True,
    ):
        super().__init__()
        # late: the models import transformers, and most of surgery does without
        from hf_compress.models.afidaf.configuration_afidaf import AfidafConfig
        from hf_compress.models.afidaf.filters_afidaf import AfidafFourierFilter, AfidafImageFilter

        groups = math.gcd(_GROUPS, channels)
        self.filter: Filter = filter
        self.grid = tuple(grid)
        self.prefix_tokens = prefix
        if filter != "fourier":
            self.image = AfidafImageFilter(channels, AfidafConfig(image_projection_groups=groups))
        if filter != "image":
            self.fourier = AfidafFourierFilter(channels, groups)
        self.projection = nn.Linear(channels, channels)
        if prefix:
            self.prefix = PrefixAttention(channels, num_heads, head_dim, prefix, scaling, bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Float [batch, tokens, channels] -> the same, and no attention weights.

        Raises:
            DataError: when the tokens behind the prefix are no map of the grid's proportions.
        """
        patches = hidden_states[:, self.prefix_tokens :] if self.prefix_tokens else hidden_states
        maps = patches.transpose(1, 2).unflatten(2, self._grid_of(patches.shape[1]))
        if self.filter != "fourier":
            maps = self.image(maps)
        if self.filter != "image":
            maps = self.fourier(maps)
        output = self.projection(maps.flatten(2).transpose(1, 2))
        if self.prefix_tokens:
            output = torch.cat([self.prefix(hidden_states), output], dim=1)
        return output, None

    def _grid_of(self, tokens: int) -> tuple[int, int]:
        height, width = self.grid
        if tokens == height * width:
            return height, width
        rows = math.isqrt(int(tokens) * height // width)
        if not rows or rows * (int(tokens) // rows) != tokens or rows * width != int(tokens) // rows * height:
            before = f" behind {self.prefix_tokens} others" if self.prefix_tokens else ""
            raise DataError(
                f"{int(tokens)} tokens{before} are no map with the proportions of {height} x {width}, the one that this "
                "filter was made for. Give images with the proportions of the model's image_size."
            )
        return rows, int(tokens) // rows

    def extra_repr(self) -> str:
        return f"filter={self.filter!r}, grid={self.grid}, prefix={self.prefix_tokens}"


# -- attention blocks -----------------------------------------------------------------------------------------------


def is_attention(module: nn.Module | None) -> bool:
    """Whether a module is a plain multi-head self-attention block as transformers' vision models have them.

    Such a block has four linear layers (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``) of sizes that agree with each
    other, ``num_attention_heads`` and ``scaling``.
    """
    layers = [getattr(module, name, None) for name in _PROJECTIONS]
    if module is None or any(type(layer) is not nn.Linear for layer in layers):
        return False
    heads, scaling = getattr(module, "num_attention_heads", None), getattr(module, "scaling", None)
    query, key, value, output = layers
    inner, channels = query.weight.shape  # type: ignore[union-attr]
    if type(heads) is not int or heads < 1 or inner % heads or type(scaling) is not float or output.bias is None:  # type: ignore[union-attr]
        return False
    # where the heads together are as wide as the tokens, a filter has a bounded multiple of the block's parameters
    return inner == channels and all(layer.weight.shape == (inner, inner) for layer in (key, value, output))  # type: ignore[union-attr]


def filtered_shell(attention: nn.Module, filter: Filter, grid: tuple[int, int], prefix: int) -> FilteredTokens:
    """The module that replaces an attention block, with weights on the meta device.

    Args:
        attention: one that :func:`is_attention`.
        filter, grid, prefix: see :class:`FilteredTokens`.
    """
    query: Any = attention.q_proj
    inner, channels = query.weight.shape
    heads: int = attention.num_attention_heads  # type: ignore[assignment]
    with torch.device("meta"):
        made = FilteredTokens(
            channels, filter, grid, prefix,
            num_heads=heads, head_dim=inner // heads, scaling=attention.scaling, bias=query.bias is not None,  # type: ignore[arg-type]
        )  # fmt: skip
    made.to(query.weight.dtype).requires_grad_(query.weight.requires_grad)
    return made.train(attention.training)


@torch.no_grad()
def filtered_from(attention: nn.Module, filter: Filter, grid: tuple[int, int], prefix: int) -> FilteredTokens:
    """The module that replaces an attention block, with first weights.

    Class and register tokens come out as they did. The image filter starts as the identity, the Fourier filter close to
    it, and the linear layer behind them as the attention's value and output projections.

    Args:
        attention: one that :func:`is_attention`.
        filter, grid, prefix: see :class:`FilteredTokens`.
    """
    query, key, value, output = (getattr(attention, name) for name in _PROJECTIONS)
    weight = query.weight
    made = filtered_shell(attention, filter, grid, prefix).to_empty(device=weight.device)
    for module in made.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    if filter != "fourier":
        for parameter in made.image.projection_out.parameters():
            parameter.zero_()
    if filter != "image":
        for parameter in made.fourier.parameters():
            parameter.normal_(std=0.02)  # as in AFFNet's code
    wide = torch.promote_types(weight.dtype, torch.float32)
    made.projection.weight.copy_(output.weight.to(wide) @ value.weight.to(wide))
    shift = output.bias.to(wide)
    made.projection.bias.copy_(shift if value.bias is None else shift + output.weight.to(wide) @ value.bias.to(wide))
    if prefix:
        heads = len(made.prefix.key_weight)
        made.prefix.query.load_state_dict(query.state_dict())
        made.prefix.output.load_state_dict(output.state_dict())
        made.prefix.key_weight.copy_(key.weight.unflatten(0, (heads, -1)).transpose(1, 2))
        made.prefix.value_weight.copy_(value.weight.unflatten(0, (heads, -1)))
        bias = torch.zeros_like(output.bias) if value.bias is None else value.bias
        made.prefix.value_bias.copy_(bias.view(heads, -1, 1))
    return made


def filtered_in(model: nn.Module) -> Iterator[tuple[str, FilteredTokens]]:
    """Every filter in place of attention, by its path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, FilteredTokens))
