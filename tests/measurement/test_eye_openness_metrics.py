"""Figures of openness against examples that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_compress.errors import DataError
from hf_compress.measurement.eye_openness import (
    area_under_curve,
    fairness_metrics,
    openness_metrics,
    sequence_metrics,
)


def test_spearman_shares_ranks_among_ties() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5, so 4.5 / sqrt(22.5)."""
    found = openness_metrics(np.array([0.1, 0.2, 0.2, 0.9]), np.array([0.0, 0.2, 0.5, 0.8]))
    assert found["spearman"] == pytest.approx(4.5 / math.sqrt(22.5), abs=1e-12)
    assert found["mae"] == pytest.approx((0.1 + 0 + 0.3 + 0.1) / 4)
    assert found["mae_middle"] == pytest.approx(0.0) and found["bias"] == pytest.approx(-0.025)


def test_area_under_the_curve() -> None:
    assert area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.1, 0.5, 0.9])) == 0.75
    with_middle = area_under_curve(np.array([0.1, 0.4, 0.99, 0.35, 0.8]), np.array([0.0, 0.1, 0.3, 0.5, 0.9]))
    assert with_middle == 0.75  # the eye in the middle is neither
    with pytest.warns(UserWarning, match="one class"):
        assert math.isnan(area_under_curve(np.array([0.1, 0.2]), np.array([0.6, 0.9])))


def test_a_constant_estimate_has_no_correlation_and_raises_nothing() -> None:
    with pytest.warns(Warning):
        found = openness_metrics(np.full(4, 0.5), np.array([0.0, 0.1, 0.6, 0.9]))
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])
    assert found["mae"] == pytest.approx(0.35) and found["auc"] == 0.5


def test_entries_without_a_label_are_left_out() -> None:
    truth = np.array([0.0, 0.3, np.nan, 0.9])
    assert openness_metrics(np.array([0.1, 0.3, np.nan, 0.8]), truth)["mae"] == pytest.approx(0.2 / 3)
    for predicted, labels in (([0.1, np.nan], [0.2, 0.3]), ([0.1], [0.2, 0.3]), ([0.1, 0.2], [np.nan, 0.3])):
        with pytest.raises(DataError):
            openness_metrics(np.array(predicted), np.array(labels))


def test_order_in_a_sequence() -> None:
    assert sequence_metrics(np.array([[0.0, 0.5, 1.0]])) == {"tau": 1.0, "violation": 0.0}
    assert sequence_metrics(np.array([[0.5, 0.49, 0.4]])) == {"tau": -1.0, "violation": 0.5}
    assert sequence_metrics(np.array([[0.0, 0.2, 0.1]]))["tau"] == pytest.approx(1 / 3)
    with pytest.raises(DataError):
        sequence_metrics(np.zeros(5))


def test_thirds_of_skin_tone() -> None:
    melanin = np.array([0.1, 0.0, 0.5, 0.4, 0.9, 1.0])
    error = np.array([0.1, 0.1, 0.2, 0.0, 0.3, 0.3])
    found = fairness_metrics(error, np.zeros(6), melanin)
    assert found == pytest.approx({"mae_light": 0.1, "mae_medium": 0.1, "mae_dark": 0.3, "melanin_gap": 0.2})
