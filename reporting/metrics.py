"""Metrics of a screening model, with their 95 % intervals, and its thresholds. NumPy only.

The network answers P(healthy); the DR score of an image is 1 - P(healthy), and a score above the
threshold says DR. Sensitivity, specificity and AUC are those of finding DR. A metric for which a
class is missing (no healthy image, or none with DR) is nan.

Images are scored, but patients are sampled: two eyes of one patient are not two patients. So
intervals are a bootstrap over patients, and a patient either chooses the thresholds or is scored.
"""

import hashlib
from typing import NamedTuple

import numpy as np

import data

METRICS = ("accuracy", "auc", "sensitivity", "specificity")
# What `measure` gives of a task, on a model card too.
MEASURED = (
    "auc",
    "sensitivity",
    "specificity",
    "accuracy",
    "always_same",
    "sensitivity_at_90",
    "specificity_at_90",
)
# What a grade (0..4) must be at least for an image to count as positive.
# Referable DR (moderate or worse) is what screening sends to an ophthalmologist.
TASKS = {"any DR": 1, "referable DR": 2}
LEAST_SENSITIVITY = 0.85  # of a threshold that is chosen
Z = 1.96  # the normal distribution's quantile of a 95 % interval
NO_INTERVAL = (float("nan"), float("nan"))
RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50  # bounds the memory: 50 x 10,000 images are 4 MB an array


# --- the metrics ----------------------------------------------------------------------------------


def scores(p_healthy, labels, threshold=0.5):
    """loss (binary cross-entropy), accuracy, auc, sensitivity and specificity, as a dict of floats.

    p_healthy: (n,) in 0..1. labels: (n,), 1 = healthy, 0 = DR. threshold: of the DR score.
    """
    has_dr = labels < 0.5
    says_dr = 1 - p_healthy > threshold
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


def calibration(score, positive, num_bins):
    """[(mean score, part that is positive, number of images)] of groups of nearly equal size.

    The groups are of neighbouring scores: a calibrated score of 0.7 is right for 7 of 10.
    """
    groups = np.array_split(np.argsort(score, kind="stable"), num_bins)
    return [
        (float(np.mean(score[group])), float(np.mean(positive[group])), len(group))
        for group in groups
        if len(group)
    ]


# --- thresholds -----------------------------------------------------------------------------------


def choosing_half(grades, patients):
    """bool (n,): the images of those patients who choose the thresholds; the others are scored.

    grades: (n,) of the images. patients: n texts. It follows from the index alone: among the
    patients of one worst grade, sorted by the SHA-256 of their name, every second one chooses.
    """
    worst = {}
    for grade, patient in zip(grades, patients, strict=True):
        worst[patient] = max(int(grade), worst.get(patient, 0))
    choosing = set()
    for grade in set(worst.values()):
        of_grade = [patient for patient in worst if worst[patient] == grade]
        of_grade.sort(key=lambda patient: hashlib.sha256(patient.encode()).digest())
        choosing.update(of_grade[::2])
    return np.array([patient in choosing for patient in patients], bool)


def choose_threshold(score, positive):
    """The threshold of a screening test, or None where a class is missing or no threshold tells.

    Of the thresholds with a sensitivity of at least LEAST_SENSITIVITY the one with the greatest
    sensitivity + specificity (Youden 1950). It lies midway between two scores, so that rounding on
    another machine moves no image across it.
    score: (n,) in 0..1. positive: bool (n,).
    """
    if not positive.any() or positive.all():
        return None
    thresholds, false_rate, found_rate = roc(score, positive)
    enough = found_rate >= LEAST_SENSITIVITY
    youden = np.where(enough, found_rate - false_rate, -1)
    best = int(np.argmax(youden))
    if youden[best] <= 0:  # everybody is called positive, or it is no better than chance
        return None
    next_lower = thresholds[best + 1] if best + 1 < len(thresholds) else 0.0
    return float((thresholds[best] + next_lower) / 2)


# --- a whole model --------------------------------------------------------------------------------


def assess(p_healthy, records):
    """What the model card says of a model, from its answers for the validation records.

    p_healthy: (n,), what the network says. records: n records of an index.
    Returns a dict that JSON can hold: numbers of images and patients, a warning ("" where there is
    none), choosing_auc (AUC for any DR among the patients who choose: what the best round is
    chosen by), and for each of TASKS its threshold and `measured`: {metric: [value, low, high]}.
    The choosing patients choose the thresholds; all that is measured is of the other patients.
    """
    score = 1 - np.asarray(p_healthy)
    grades = np.array([record["label"] for record in records])
    patients = np.array(data.patients(records), str)
    choosing = choosing_half(grades, patients)
    tasks = {}
    for task, least_grade in TASKS.items():
        positive = grades >= least_grade
        threshold = choose_threshold(score[choosing], positive[choosing])
        measured = measure(
            score[~choosing],
            positive[~choosing],
            patients[~choosing],
            0.5 if threshold is None else threshold,
        )
        tasks[task] = {
            "threshold": threshold,  # as it is: scores can lie very close together
            "num_positive": int(positive[~choosing].sum()),
            "measured": {name: rounded(each) for name, each in measured.items()},
        }
    return {
        "num_images": len(records),
        "num_patients": len(set(patients)),
        "num_reporting_images": int((~choosing).sum()),
        "num_reporting_patients": len(set(patients[~choosing])),
        "patients_known": data.knows_patients(records),
        "choosing_auc": json_number(auc(score[choosing], (grades > 0)[choosing])),
        "warning": warning_of(tasks),
        "tasks": tasks,
    }


def warning_of(tasks):
    """Why a model must not be used to find referable DR: a sentence, or "" for no reason."""
    task = tasks["referable DR"]
    area, low, high = task["measured"]["auc"]
    sensitivity = task["measured"]["sensitivity"][0]
    specificity = task["measured"]["specificity"][0]
    if area is None:
        return (
            "it cannot be judged: the reporting half of the validation patients needs some with "
            "referable DR and some without"
        )
    if low is None or low <= 0.5:
        return (
            f"it may find nothing: the 95 % interval of its AUC for referable DR, {low} to {high}, "
            "contains 0.5 or lies below it, and 0.5 is guessing"
        )
    if task["threshold"] is None:
        return (
            f"no threshold finds {100 * LEAST_SENSITIVITY:.0f} % of those with referable DR in the "
            "choosing half of the validation patients and clears anybody"
        )
    if sensitivity == 0:
        return "it finds nobody with referable DR at its threshold"
    if specificity == 0:
        return "it calls everybody referable at its threshold"
    return ""


def rounded(each):
    return [json_number(each.value), json_number(each.low), json_number(each.high)]


def json_number(value):
    """Four decimals; None in place of nan, which is not JSON."""
    return None if np.isnan(value) else round(float(value), 4)


# --- intervals ------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A metric and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def measure(score, positive, patients, threshold=0.5, seed=0):
    """{name: Measured} of one task at one threshold, with a bootstrap over patients.

    score: (n,) in 0..1. positive: bool (n,). patients: n texts.
    auc; sensitivity, specificity and accuracy at the threshold; sensitivity_at_90 (the greatest
    sensitivity of the thresholds with a specificity of at least 90 %) and specificity_at_90, the
    reverse; always_same, the accuracy of always answering the more frequent class.
    The interval is the 2.5 to 97.5 % range of RESAMPLES sets of as many patients, drawn with
    replacement. Where all of them agree at 0 or 1, that range has no width, but our knowledge is
    not perfect: it is then Wilson's, or Newcombe's for the AUC, with the number of patients.
    """
    if not len(score):
        nothing = Measured(float("nan"), *NO_INTERVAL)
        return dict.fromkeys(MEASURED, nothing)
    names, patient_numbers = np.unique(np.array(patients, str), return_inverse=True)
    values = weighted_metrics(score, positive, threshold, np.ones((1, len(score))))
    draws = {name: [] for name in values}
    rng = np.random.default_rng(seed)
    equal = np.full(len(names), 1 / len(names))
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        times_drawn = rng.multinomial(len(names), equal, RESAMPLES_AT_ONCE)
        weights = times_drawn[:, patient_numbers]  # a patient's images come and go together
        for name, drawn in weighted_metrics(score, positive, threshold, weights).items():
            draws[name].append(drawn)
    num_positive = len(set(patient_numbers[positive]))
    num_negative = len(set(patient_numbers[~positive]))
    measured = {}
    for name, value in values.items():
        value = float(value[0])
        low, high = percentiles(np.concatenate(draws[name]))
        if low == high:
            low, high = exact_interval(name, value, num_positive, num_negative)
        measured[name] = Measured(value, low, high)
    return measured


def weighted_metrics(score, positive, threshold, weights):
    """{name: (b,)} where image i counts weights[k, i] times in sample k. weights: (b, n)."""
    of_positive = weights * positive
    of_negative = weights * ~positive
    num_positive = of_positive.sum(1)
    num_negative = of_negative.sum(1)
    above = score > threshold
    with np.errstate(invalid="ignore", divide="ignore"):  # a sample without a class gives nan
        found = of_positive[:, above].sum(1)
        false_alarms = of_negative[:, above].sum(1)
        total = num_positive + num_negative
        # the ROC curve of each sample: (b, k), from the strictest threshold on
        order = np.argsort(-score, kind="stable")
        last_of_equals = np.append(np.diff(score[order]) != 0, True)
        found_rate = np.cumsum(of_positive[:, order], 1)[:, last_of_equals] / num_positive[:, None]
        false_rate = np.cumsum(of_negative[:, order], 1)[:, last_of_equals] / num_negative[:, None]
        found_rate = np.insert(found_rate, 0, 0, 1)
        false_rate = np.insert(false_rate, 0, 0, 1)
        heights = (found_rate[:, 1:] + found_rate[:, :-1]) / 2
        both = num_positive * num_negative / (num_positive * num_negative)  # 1, or nan
        specific = false_rate <= 0.1 + 1e-9
        sensitive = found_rate >= 0.9 - 1e-9
        return {
            "auc": (np.diff(false_rate, axis=1) * heights).sum(1),
            "sensitivity": found / num_positive,
            "specificity": 1 - false_alarms / num_negative,
            "accuracy": (found + num_negative - false_alarms) / total,
            "sensitivity_at_90": np.where(specific, found_rate, 0).max(1) * both,
            "specificity_at_90": np.where(sensitive, 1 - false_rate, 0).max(1) * both,
            "always_same": np.maximum(num_positive, num_negative) / total,
        }


def percentiles(draws):
    """(low, high) of 95 % of the draws; nan where there are none that are numbers."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return NO_INTERVAL
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def exact_interval(name, value, num_positive, num_negative):
    """The interval of a metric of so many positive and negative patients, in a closed form."""
    if name == "auc":
        return auc_interval(value, num_positive, num_negative)
    if name.startswith("sensitivity"):
        return wilson(value, num_positive)
    if name.startswith("specificity"):
        return wilson(value, num_negative)
    return wilson(value, num_positive + num_negative)


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
