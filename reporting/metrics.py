"""Metrics of a screening model with their 95 % intervals."""

import numpy as np

import model

METRICS = ("accuracy", "auc", "sensitivity", "specificity")
Z = 1.96  # the normal distribution's quantile of a 95 % interval


def measure(p_healthy, labels):
    """{metric: (value, low, high)} from P(healthy) (n,) and labels (n,), 1 = healthy; nan where a class is absent."""
    values, n, n1 = model.scores(p_healthy, labels), len(labels), int((labels < 0.5).sum())
    ends = (
        wilson(values["accuracy"], n),
        auc_interval(values["auc"], n1, n - n1),
        wilson(values["sensitivity"], n1),
        wilson(values["specificity"], n - n1),
    )
    return {name: (values[name], *interval) for name, interval in zip(METRICS, ends, strict=True)}


def wilson(part, n):
    """(low, high) of a proportion `part` of n (Wilson 1927)."""
    n = n or np.nan
    middle, half = part + Z * Z / (2 * n), Z * np.sqrt(part * (1 - part) / n + (Z / (2 * n)) ** 2)
    return tuple(
        float(np.clip(end / (1 + Z * Z / n), 0, 1)) for end in (middle - half, middle + half)
    )


def auc_interval(auc, n1, n0):
    """(low, high) of an AUC from n1 positives and n0 negatives: all areas from which it is within 1.96 standard errors,
    these from Hanley and McNeil 1982 (Newcombe 2006, method 5). It ends at 1 and has a width even there."""
    area, more = np.linspace(0, 1, 20_001), (n1 + n0) / 2 - 1
    variance = (
        area
        * (1 - area)
        * (1 + more * (1 - area) / (2 - area) + more * area / (1 + area))
        / (n1 * n0 or np.nan)
    )
    within = area[
        abs(area - auc) <= Z * np.sqrt(variance) + 1e-4
    ]  # of a step; the variance is 0 at both ends
    return (float(within[0]), float(within[-1])) if len(within) else (np.nan, np.nan)
