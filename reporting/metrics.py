"""Metrics of a screening model, with their 95 % intervals. NumPy only.

The network answers P(healthy); the DR score of an image is 1 - P(healthy), and a score above 0.5
says DR. Sensitivity, specificity and AUC are those of finding DR. A metric for which a class is
missing (no healthy image, or none with DR) is nan.
"""

import numpy as np

METRICS = ("accuracy", "auc", "sensitivity", "specificity")
Z = 1.96  # the normal distribution's quantile of a 95 % interval
NO_INTERVAL = (np.nan, np.nan)


# --- the metrics ----------------------------------------------------------------------------------


def scores(p_healthy, labels):
    """loss (binary cross-entropy), accuracy, auc, sensitivity and specificity, as a dict of floats.

    p_healthy: (n,) in 0..1. labels: (n,), 1 = healthy, 0 = DR.
    """
    has_dr = labels < 0.5
    says_dr = p_healthy < 0.5
    p = np.clip(p_healthy, 1e-7, 1 - 1e-7)  # as Keras clips, so that the loss is Keras's
    return {
        "loss": float(-np.mean(np.where(has_dr, np.log(1 - p), np.log(p)))),
        "accuracy": float(np.mean(says_dr == has_dr)),
        "auc": auc(1 - p_healthy, has_dr),
        "sensitivity": share(says_dr[has_dr]),
        "specificity": share(~says_dr[~has_dr]),
    }


def share(true_or_false):
    """The part of a bool array that is True; nan for an empty one."""
    if not len(true_or_false):
        return float("nan")
    return float(np.mean(true_or_false))


def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    score: (n,). positive: bool (n,). Rank-sum form (Hanley and McNeil 1982).
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1; equal scores share their mean
    above = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def roc(score, positive):
    """The ROC curve: (thresholds, false positive rate, sensitivity), each (k,).

    From the strictest threshold, infinity, at which nobody is positive, down to the lowest score.
    An image is positive where its score is at or above the threshold. Both classes must be there.
    """
    thresholds = np.append(np.inf, np.unique(score)[::-1])
    return (
        thresholds,
        share_at_or_above(score[~positive], thresholds),
        share_at_or_above(score[positive], thresholds),
    )


def share_at_or_above(score, thresholds):
    """The part of `score` (n,) that is at or above each of `thresholds` (k,): (k,)."""
    below = np.searchsorted(np.sort(score), thresholds, side="left")
    return 1 - below / len(score)


def confusion(says_dr, has_dr):
    """How many images the model found, missed, called DR by mistake, and cleared."""
    return {
        "found": int(np.sum(says_dr & has_dr)),
        "missed": int(np.sum(~says_dr & has_dr)),
        "false alarms": int(np.sum(says_dr & ~has_dr)),
        "cleared": int(np.sum(~says_dr & ~has_dr)),
    }


# --- their intervals ------------------------------------------------------------------------------


def measure(p_healthy, labels):
    """{metric: (value, low, high)} for METRICS; labels (n,): 1 = healthy."""
    values = scores(p_healthy, labels)
    num_dr = int((labels < 0.5).sum())
    num_healthy = len(labels) - num_dr
    intervals = {
        "accuracy": wilson(values["accuracy"], len(labels)),
        "auc": auc_interval(values["auc"], num_dr, num_healthy),
        "sensitivity": wilson(values["sensitivity"], num_dr),
        "specificity": wilson(values["specificity"], num_healthy),
    }
    return {name: (values[name], *intervals[name]) for name in METRICS}


def wilson(part, n):
    """(low, high) of a proportion `part` of n (Wilson 1927); it has a width even at 0 and at 1."""
    if not n or np.isnan(part):
        return NO_INTERVAL
    scale = 1 + Z**2 / n
    middle = (part + Z**2 / (2 * n)) / scale
    half_width = Z * np.sqrt(part * (1 - part) / n + (Z / (2 * n)) ** 2) / scale
    return float(max(0, middle - half_width)), float(min(1, middle + half_width))


def auc_interval(area, num_positive, num_negative):
    """(low, high) of an AUC: all areas from which it is within 1.96 standard errors.

    The standard errors are Hanley and McNeil's (1982); inverting the test in this way is method 5
    of Newcombe (2006). The interval ends at 1 and has a width even there.
    """
    if not num_positive or not num_negative or np.isnan(area):
        return NO_INTERVAL
    possible = np.linspace(0, 1, 20_001)
    more = (num_positive + num_negative) / 2 - 1
    of_positives = more * (1 - possible) / (2 - possible)
    of_negatives = more * possible / (1 + possible)
    variance = possible * (1 - possible) * (1 + of_positives + of_negatives)
    standard_error = np.sqrt(variance / (num_positive * num_negative))
    # 1e-4 is two steps of `possible`: at 0 and at 1 the standard error itself is 0
    within = possible[abs(possible - area) <= Z * standard_error + 1e-4]
    return float(within[0]), float(within[-1])
