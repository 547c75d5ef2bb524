"""How good estimates of eye openness are: as a degree, as an order, as open against closed, and equally for all skins.

The area under the curve alone does not tell a good estimate of the degree from a useless one: training on binary labels
reaches 1.0 with it. It never stands alone here.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from ..errors import DataError

CLOSED_MAX, OPEN_MIN = 0.12, 0.45  # between them is the middle, which weak labels leave out


def openness_metrics(
    predicted: np.ndarray, openness: np.ndarray, closed_max: float = CLOSED_MAX, open_min: float = OPEN_MIN
) -> dict[str, float]:
    """Figures of estimates against exact labels.

    Args:
        predicted, openness: of the same shape; entries without a label (NaN) are left out.
        closed_max, open_min: where the middle begins and ends.

    Returns:
        ``pearson``, ``spearman`` (ties share their mean rank), ``mae``, ``mae_middle`` (of closed_max < openness <
        open_min), ``bias`` (mean of predicted - openness) and ``auc`` (of open against closed, without the middle). NaN, with
        scipy's warning, for what a constant estimate or a missing class leaves undefined.

    Raises:
        DataError: when shapes differ, nothing is labelled, or an estimate is NaN.
    """
    from scipy import stats

    found, truth = (np.asarray(values, dtype=float).ravel() for values in (predicted, openness))
    if found.shape != truth.shape:
        raise DataError(f"there are {len(found)} estimates for {len(truth)} labels.")
    known = np.isfinite(truth)
    found, truth = found[known], truth[known]
    if len(truth) < 2:
        raise DataError(f"{len(truth)} eyes have an exact label; figures need two at least.")
    if not np.isfinite(found).all():
        raise DataError(f"{int((~np.isfinite(found)).sum())} of {len(found)} estimates are NaN or infinite.")
    middle = (truth > closed_max) & (truth < open_min)
    error = np.abs(found - truth)
    return {
        "pearson": float(stats.pearsonr(found, truth)[0]),
        "spearman": float(stats.spearmanr(found, truth)[0]),
        "mae": float(error.mean()),
        "mae_middle": float(error[middle].mean()) if middle.any() else math.nan,
        "bias": float((found - truth).mean()),
        "auc": area_under_curve(found, truth, closed_max, open_min),
    }


def area_under_curve(
    predicted: np.ndarray, openness: np.ndarray, closed_max: float = CLOSED_MAX, open_min: float = OPEN_MIN
) -> float:
    """Of open (openness >= open_min) against closed (<= closed_max) eyes; NaN, with a warning, when a class is missing."""
    from sklearn.metrics import roc_auc_score

    truth = np.asarray(openness, dtype=float)
    is_clear = (truth <= closed_max) | (truth >= open_min)
    is_open = truth[is_clear] >= open_min
    if is_open.all() or not is_open.any():
        warnings.warn("eyes of one class alone have no area under the curve.", UserWarning, stacklevel=2)
        return math.nan
    return float(roc_auc_score(is_open, np.asarray(predicted)[is_clear]))


def sequence_metrics(predicted: np.ndarray, tolerance: float = 0.02) -> dict[str, float]:
    """How well estimates keep the order of eyes that open step by step.

    Args:
        predicted: [sequences, steps], in the order of growing openness.
        tolerance: a step that falls by more is a violation.

    Returns:
        ``tau``: mean over all pairs of steps of the sign of their difference (Kendall's); ``violation``: share of
        neighbouring steps that fall by more than ``tolerance``.

    Raises:
        DataError: when there are fewer than two steps.
    """
    found = np.asarray(predicted, dtype=float)
    if found.ndim != 2 or found.shape[1] < 2:
        raise DataError(f"sequences have the shape {found.shape}; give [sequences, steps] with two steps at least.")
    earlier, later = np.triu_indices(found.shape[1], 1)
    return {
        "tau": float(np.sign(found[:, later] - found[:, earlier]).mean()),
        "violation": float((np.diff(found, axis=1) < -tolerance).mean()),
    }


def fairness_metrics(predicted: np.ndarray, openness: np.ndarray, melanin: np.ndarray) -> dict[str, float]:
    """Mean absolute error in the three thirds of skin tone, and the difference of the largest and the smallest.

    Args:
        predicted, openness: [eyes], labelled.
        melanin: [eyes], 0 light to 1 dark; its terciles in these eyes are the thirds.

    Returns:
        ``mae_light``, ``mae_medium``, ``mae_dark``, ``melanin_gap``.
    """
    error = np.abs(np.asarray(predicted, dtype=float).ravel() - np.asarray(openness, dtype=float).ravel())
    edges = np.quantile(melanin, [1 / 3, 2 / 3])
    third = np.searchsorted(edges, melanin)
    found = {
        f"mae_{name}": float(error[third == number].mean()) if (third == number).any() else math.nan
        for number, name in enumerate(("light", "medium", "dark"))
    }
    return {**found, "melanin_gap": max(found.values()) - min(found.values())}


def compute_openness_metrics(result: Any) -> dict[str, float]:
    """``compute_metrics`` of Trainer; needs ``label_names=["openness"]`` and :func:`openness_alone` beside it."""
    return openness_metrics(result.predictions, result.label_ids)


def openness_alone(outputs: Any, labels: Any) -> Any:
    """``preprocess_logits_for_metrics`` of Trainer: of all that the model gives, the openness."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


__all__ = [
    "area_under_curve",
    "compute_openness_metrics",
    "fairness_metrics",
    "openness_alone",
    "openness_metrics",
    "sequence_metrics",
]
