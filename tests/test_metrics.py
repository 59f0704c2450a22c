"""metrics.py: the metrics of finding DR, and intervals that hold what they promise."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from reporting import metrics

# --- the metrics ----------------------------------------------------------------------------------


@pytest.fixture
def scored():
    """P(healthy) with ties, and labels (1 = healthy), of 200 images."""
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.4).astype(np.float32)
    p_healthy = np.round(np.clip(labels * 0.3 + rng.random(200) * 0.7, 0, 1), 2)
    return p_healthy, labels


def test_metrics_are_those_of_finding_dr(scored):
    """Each by its definition, image by image and pair by pair."""
    p_healthy, labels = scored
    scores = metrics.scores(p_healthy, labels)
    pairs = list(zip(p_healthy.tolist(), labels.tolist(), strict=True))
    dr = [p for p, label in pairs if label == 0]
    healthy = [p for p, label in pairs if label == 1]
    wins = sum((p < q) + 0.5 * (p == q) for p in dr for q in healthy)
    assert scores["auc"] == pytest.approx(wins / (len(dr) * len(healthy)))
    assert scores["sensitivity"] == pytest.approx(sum(p < 0.5 for p in dr) / len(dr))
    assert scores["specificity"] == pytest.approx(sum(p >= 0.5 for p in healthy) / len(healthy))
    right = sum((p < 0.5) == (label == 0) for p, label in pairs)
    assert scores["accuracy"] == pytest.approx(right / len(pairs))
    of_the_truth = [p if label == 1 else 1 - p for p, label in pairs]
    loss = -np.mean(np.log(np.clip(of_the_truth, 1e-7, 1 - 1e-7)))
    assert scores["loss"] == pytest.approx(loss)


def test_the_roc_curve_is_the_share_at_or_above_each_threshold(scored):
    p_healthy, labels = scored
    score, has_dr = 1 - p_healthy, labels == 0
    thresholds, false_rate, sensitivity = metrics.roc(score, has_dr)
    assert thresholds[0] == np.inf and list(thresholds[1:]) == sorted(set(score), reverse=True)
    for threshold, false_part, found_part in zip(thresholds, false_rate, sensitivity, strict=True):
        assert false_part == pytest.approx(np.mean(score[~has_dr] >= threshold))
        assert found_part == pytest.approx(np.mean(score[has_dr] >= threshold))
    area = np.trapezoid(sensitivity, false_rate)
    assert area == pytest.approx(metrics.auc(score, has_dr))


def test_the_four_counts():
    says_dr = np.array([True, True, True, False, False, True])
    has_dr = np.array([True, True, False, True, False, True])
    counts = {"found": 3, "missed": 1, "false alarms": 1, "cleared": 1}
    assert metrics.confusion(says_dr, has_dr) == counts


def test_a_class_that_is_missing():
    scores = metrics.scores(np.array([0.9, 0.8]), np.array([1.0, 1.0]))
    assert scores["specificity"] == 1
    assert np.isnan(scores["auc"]) and np.isnan(scores["sensitivity"])


def test_numpy_is_all_that_it_needs():
    code = "import sys; from reporting import metrics; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for package in ("tensorflow", "keras", "sklearn", "scipy", "matplotlib", "PIL"):
        assert package not in loaded.split()


# --- their intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(found, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert metrics.wilson(found / n, n) == (
        pytest.approx(low, abs=6e-5),
        pytest.approx(high, abs=6e-5),
    )


def test_the_auc_interval_holds_what_it_promises():
    """Of 600 samples with a known AUC, about 95 % of the intervals hold it, on either side."""
    rng, truth = (
        np.random.default_rng(1),
        0.9213503964748574,
    )  # Phi(2 / sqrt 2): normal scores, 2 standard deviations apart
    ill = np.arange(90) < 40
    below = above = 0
    for _ in range(600):
        low, high = metrics.auc_interval(
            metrics.auc(rng.standard_normal(90) + 2 * ill, ill), 40, 50
        )
        below, above = below + (high < truth), above + (low > truth)
    assert 6 <= below + above <= 54  # 1 % to 9 %
    low, high = metrics.auc_interval(1.0, 40, 50)
    assert low < 0.97 and high == 1


def test_without_a_class_there_is_no_number():
    measured = metrics.measure(np.array([0.9, 0.2, 0.7]), np.ones(3))
    assert measured["accuracy"][0] == pytest.approx(2 / 3) and measured["specificity"][
        0
    ] == pytest.approx(2 / 3)
    assert np.isnan(measured["auc"]).all() and np.isnan(measured["sensitivity"]).all()
