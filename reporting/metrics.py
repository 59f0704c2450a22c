"""Reporting: the metrics of a screening model, their 95 % intervals, its thresholds.

No file is read or written in here, no sentence made but a card's warning, and nothing but NumPy and
`data` imported, so that a server has its scores without a package for drawing.

The network answers P(healthy). The DR score of an image is 1 - P(healthy), recalibrated for a task
where enough patients tell how (`recalibrated`), and a score above the threshold says DR.
Sensitivity, specificity and AUC are those of finding DR. A metric for which a class is missing (no
healthy image, or none with DR) is nan in here, and None in what goes into a file.

Images are scored, but patients are sampled: two eyes of one patient are not two patients. So
intervals are a bootstrap over patients, and a patient either chooses the thresholds or is scored.
"""

import hashlib
from functools import partial
from typing import NamedTuple

import numpy as np

import data

# What `measure` gives of a task, on a model card too.
MEASURED = ("auc", "sensitivity", "specificity", "accuracy")
# What is looked for, in the words of each page and line; docs/change.md tells of another disease.
DISEASE = "diabetic retinopathy (DR)"
# What a grade (0..4) must be at least for an image to count as positive.
# Referable DR (moderate or worse) is what screening sends to an ophthalmologist.
TASKS = {"any DR": 1, "referable DR": 2}
LEARNT = min(TASKS, key=TASKS.get)  # what the network learns to tell from grade 0
TASK = max(TASKS, key=TASKS.get)  # what the verdict, the warning and predict.py are about
LEAST_SENSITIVITY = 0.85  # of a threshold that is chosen
# With fewer patients who have it, or who have it not, a difference of two models is not judged and
# no score recalibrated: the interval of a sensitivity that was measured on twenty patients is 0.3
# to 0.4 wide.
FEWEST_PATIENTS = 20
LEAST_P = 1e-7  # as Keras clips: the logarithm of an answer of 0 or 1 is finite then
NEWTON_STEPS = 25
CALIBRATION_GROUPS = 5
Z = 1.96  # the normal distribution's quantile of a 95 % interval
NO_INTERVAL = (float("nan"), float("nan"))
NO_WIDTH = 1e-9  # draws that agree differ by rounding: an area of 1 may be 0.9999999999999999
RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50  # bounds the memory: 50 x 10,000 images are 4 MB an array


# --- the metrics ----------------------------------------------------------------------------------


def scores(p_healthy, labels, threshold=0.5):
    """loss (binary cross-entropy), accuracy, auc, sensitivity and specificity, as a dict.

    Each is a float, or None where it cannot be measured: a class is missing, the model answers NaN.
    p_healthy: (n,) in 0..1. labels: (n,), 1 = healthy, 0 = DR. threshold: of the DR score.
    """
    has_dr = labels < 0.5
    p = np.clip(p_healthy, LEAST_P, 1 - LEAST_P)  # so that the loss is Keras's
    measured = weighted_metrics(1 - p_healthy, has_dr, threshold, np.ones((1, len(labels))))
    values = dict(zip(MEASURED, measured[:, 0], strict=True))
    values["loss"] = -np.mean(np.where(has_dr, np.log(1 - p), np.log(p)))
    is_model = not answers_nan(p_healthy)
    return {
        name: float(value) if is_model and not np.isnan(value) else None
        for name, value in values.items()
    }


def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    score: (n,). positive: bool (n,).
    """
    if positive.all() or not positive.any():  # of no images, too
        return float("nan")
    curve = weighted_roc(score, positive, np.ones((1, len(score))))
    return float(area_under(curve)[0])


def roc(score, positive):
    """The ROC curve: (thresholds, false positive rate, sensitivity), each (k,).

    From the strictest threshold, infinity, at which nobody is positive, down to the lowest score.
    An image is positive where its score is at or above the threshold. Both classes must be there.
    """
    false_rate, found_rate = weighted_roc(score, positive, np.ones((1, len(score))))
    return np.append(np.inf, np.unique(score)[::-1]), false_rate[0], found_rate[0]


def calibration(score, positive):
    """[(mean score, part that is positive, positions of the images)] of CALIBRATION_GROUPS groups.

    They are equal, of neighbouring scores: a calibrated score of 0.7 is right for 7 of 10.
    """
    groups = np.array_split(np.argsort(score, kind="stable"), CALIBRATION_GROUPS)
    return [
        (float(np.mean(score[group])), float(np.mean(positive[group])), group)
        for group in groups
        if len(group)
    ]


def calibration_error(score, positive):
    """The expected calibration error in the groups of `calibration` (Naeini et al. 2015), 0..1."""
    if not len(score):
        return float("nan")
    groups = calibration(score, positive)
    return sum(len(group) * abs(part - mean) for mean, part, group in groups) / len(score)


def of_people(sensitivity, specificity, num_positive, num_negative):
    """What screening finds among so many people with and without it: a dict.

    found, missed and false alarms are numbers of people; PPV, the part of those who are called
    that has it, and NPV, the part of those who are cleared that has it not, are in 0..1 (nan where
    nobody is called, or cleared).
    """
    found = sensitivity * num_positive
    cleared = specificity * num_negative
    missed = num_positive - found
    false_alarms = num_negative - cleared
    return {
        "found": found,
        "missed": missed,
        "false alarms": false_alarms,
        "PPV": found / (found + false_alarms) if found + false_alarms else float("nan"),
        "NPV": cleared / (cleared + missed) if cleared + missed else float("nan"),
    }


# --- scores that are probabilities ----------------------------------------------------------------


def recalibrate(p_healthy, positive, patients):
    """[slope, intercept] of `recalibrated` that fit these answers best; None where there are none.

    Platt, "Probabilistic Outputs for Support Vector Machines", 1999: logistic regression on the
    logit of the answer, with his smoothed targets, by Newton's method. There are none with fewer
    than FEWEST_PATIENTS patients of a class, or where the answers do not rise with it (slope <= 0).
    p_healthy: (n,) in 0..1. positive: bool (n,). patients: n texts.
    """
    if min(patients_by_class(positive, patients)) < FEWEST_PATIENTS:
        return None
    num_positive, num_negative = positive.sum(), (~positive).sum()
    target = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    terms = np.stack([logit(1 - p_healthy), np.ones(len(positive))])  # (2, n)

    def loss(line):
        """The cross-entropy of these targets: log(1 + exp(x)) - target x, convex in `line`."""
        x = line @ terms
        return np.sum(np.logaddexp(0, x) - target * x)

    line = np.array([0.0, np.log((num_positive + 1) / (num_negative + 1))])
    for _ in range(NEWTON_STEPS):
        p = sigmoid(line @ terms)
        gradient = terms @ (p - target)
        hessian = (terms * p * (1 - p)) @ terms.T
        step = np.linalg.lstsq(hessian, gradient)[0]  # also where all answers are the same
        while loss(line - step) > loss(line):
            step = step / 2  # far from the minimum a whole step can go beyond it
        line = line - step
    return line.tolist() if line[0] > 0 else None


def recalibrated(p_healthy, calibration):
    """The DR score, (n,) in 0..1, of answers P(healthy): a probability, with a calibration.

    calibration: [slope, intercept] of `recalibrate`, or None: the score is then 1 - P(healthy).
    The slope is positive, so the ranking, and with it the AUC, stays.
    """
    if calibration is None:
        return 1 - p_healthy
    slope, intercept = calibration
    return sigmoid(slope * logit(1 - p_healthy) + intercept)


def logit(p):
    p = np.clip(p, LEAST_P, 1 - LEAST_P)
    return np.log(p / (1 - p))


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))  # without overflow


def patients_by_class(positive, patients):
    """(number of patients with a positive image, number of those without one)."""
    patients = np.array(patients, str)
    num_positive = len(set(patients[positive]))
    return num_positive, len(set(patients)) - num_positive


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


def choose_threshold(score, positive, least_sensitivity=LEAST_SENSITIVITY):
    """The threshold of a screening test, or None where a class is missing or no threshold tells.

    Of the thresholds with a sensitivity of at least `least_sensitivity` the one with the greatest
    sensitivity + specificity (Youden 1950). It lies midway between two scores, so that rounding on
    another machine moves no image across it.
    score: (n,) in 0..1. positive: bool (n,).
    """
    if not positive.any() or positive.all():
        return None
    thresholds, false_rate, found_rate = roc(score, positive)
    enough = found_rate >= least_sensitivity - 1e-9  # 0.9 of 10 may be a little less than 9
    youden = np.where(enough, found_rate - false_rate, -1)
    best = int(np.argmax(youden))
    if youden[best] <= 0:  # everybody is called positive, or it is no better than chance
        return None
    # there is a next one: at the lowest threshold everybody is positive
    return float((thresholds[best] + thresholds[best + 1]) / 2)


# --- a whole model --------------------------------------------------------------------------------


def assess(p_healthy, records, chosen=None):
    """What the model card says of a model, from its answers for the validation records.

    p_healthy: (n,), what the network says. records: n records of an index.
    chosen: the `tasks` of a card whose thresholds and calibrations other patients have chosen.
    Returns a dict that JSON can hold: numbers of images and patients, a warning ("" where there is
    none), choosing_auc (AUC for any DR among the patients who choose: what the best round is
    chosen by), and for each of TASKS its calibration and the error that is left of it, its
    threshold and `measured`, {metric: [value, low, high]}.
    The choosing patients choose calibrations and thresholds; all that is measured is of the other
    patients. Of a model that answers NaN nothing is chosen or measured.
    """
    p_healthy = np.asarray(p_healthy)
    grades = np.array([record["label"] for record in records])
    patients = np.array(data.patients(records), str)
    choosing = choosing_half(grades, patients)
    num_nan = int(np.isnan(p_healthy).sum())
    chooses, reports = choosing & (num_nan == 0), ~choosing & (num_nan == 0)
    tasks = {}
    for task, least_grade in TASKS.items():
        positive = grades >= least_grade
        if chosen is None:
            calibration = recalibrate(p_healthy[chooses], positive[chooses], patients[chooses])
            score = recalibrated(p_healthy, calibration)
            threshold = choose_threshold(score[chooses], positive[chooses])
        else:
            calibration, threshold = chosen[task]["calibration"], chosen[task]["threshold"]
            score = recalibrated(p_healthy, calibration)
        at = 0.5 if threshold is None else threshold
        measured = measure(score[reports], positive[reports], patients[reports], at)
        if threshold is None:  # it calls nobody: the score alone is measured
            measured = {**dict.fromkeys(MEASURED, NOT_MEASURED), "auc": measured["auc"]}
        tasks[task] = {
            "calibration": calibration,
            "threshold": threshold,  # as it is: scores can lie very close together
            "num_positive": int(positive[~choosing].sum()),
            "calibration_error": json_number(calibration_error(score[reports], positive[reports])),
            "measured": {name: rounded(each) for name, each in measured.items()},
        }
    return {
        "num_images": len(records),
        "num_patients": len(set(patients)),
        "num_reporting_images": int((~choosing).sum()),
        "num_reporting_patients": len(set(patients[~choosing])),
        "num_nan": num_nan,
        "patients_known": data.knows_patients(records),
        "choosing_auc": json_number(auc(1 - p_healthy[chooses], (grades > 0)[chooses])),
        "warning": answers_nan(p_healthy) or warning_of(tasks),
        "tasks": tasks,
    }


def answers_nan(p_healthy):
    """'it answers NaN for 24 of 24 images'; '' for a model that does not."""
    num_nan = int(np.isnan(p_healthy).sum())
    return f"it answers NaN for {num_nan} of {len(p_healthy)} images" if num_nan else ""


def warning_of(tasks):
    """Why a model must not be used for TASK: a sentence, or "" for no reason."""
    task = tasks[TASK]
    area, low, high = task["measured"]["auc"]
    sensitivity = task["measured"]["sensitivity"][0]
    specificity = task["measured"]["specificity"][0]
    if area is None:
        return (
            "it cannot be judged: the reporting half of the validation patients needs some with "
            f"{TASK} and some without"
        )
    if low <= 0.5:
        return (
            f"it may find nothing: the 95 % interval of its AUC for {TASK}, {low} to {high}, "
            "contains 0.5 or lies below it, and 0.5 is guessing"
        )
    if task["threshold"] is None:
        return (
            f"no threshold finds {100 * LEAST_SENSITIVITY:.0f} % of those with {TASK} in the "
            "choosing half of the validation patients and clears anybody"
        )
    if sensitivity == 0:
        return f"it finds nobody with {TASK} at its threshold"
    if specificity == 0:
        return f"it calls everybody {TASK} at its threshold"
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


NOT_MEASURED = Measured(float("nan"), *NO_INTERVAL)


def measure(score, positive, patients, threshold):
    """{name: Measured} of one task at one threshold, with a bootstrap over patients.

    score: (n,) in 0..1. positive: bool (n,). patients: n texts.
    The AUC, and at the threshold sensitivity, specificity and accuracy. Where all sets of patients
    agree at 0 or 1, their range has no width, but our knowledge is not perfect: the interval is
    then Wilson's, or Newcombe's for the AUC, with the number of patients.
    """
    if not len(score):
        return dict.fromkeys(MEASURED, NOT_MEASURED)
    patients = np.array(patients, str)
    num_positive = len(set(patients[positive]))
    num_negative = len(set(patients[~positive]))
    measured = {}
    found = bootstrap(partial(weighted_metrics, score, positive, threshold), patients)
    for name, each in zip(MEASURED, found, strict=True):
        if each.high - each.low < NO_WIDTH:
            ends = exact_interval(name, each.value, num_positive, num_negative, len(set(patients)))
            each = Measured(each.value, *ends)
        measured[name] = each
    return measured


def bootstrap(metrics_of, patients):
    """[Measured] of metrics_of(weights (b, n)) -> (k, b): k metrics in b sets of patients.

    The interval is the 2.5 to 97.5 % range of RESAMPLES sets of as many patients, drawn with
    replacement.
    """
    values = metrics_of(np.ones((1, len(patients))))[:, 0]
    drawn = np.concatenate([metrics_of(weights) for weights in samples(patients)], axis=1)
    return [
        Measured(float(value), *percentiles(draws))
        for value, draws in zip(values, drawn, strict=True)
    ]


def percentiles(draws):
    """(low, high) of 95 % of the draws; nan where there are none that are numbers."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return NO_INTERVAL
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def samples(patients):
    """Yields RESAMPLES sets of patients, drawn with replacement, RESAMPLES_AT_ONCE at a time.

    As weights (b, n): how often each image counts. A patient's images come and go together.
    """
    names, patient_numbers = np.unique(np.array(patients, str), return_inverse=True)
    rng = np.random.default_rng(0)  # the same patients, the same interval
    equal = np.full(len(names), 1 / len(names))
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        times_drawn = rng.multinomial(len(names), equal, RESAMPLES_AT_ONCE)
        yield times_drawn[:, patient_numbers]


def weighted_metrics(score, positive, threshold, weights):
    """(k, b): those of MEASURED, where image i counts weights[b, i] times. weights: (b, n)."""
    right = (weights * ((score > threshold) == positive)).sum(1)
    rates = weighted_rates(score > threshold, positive, weights)
    area = area_under(weighted_roc(score, positive, weights))
    return np.stack([area, *rates, right / weights.sum(1)])


def weighted_rates(says_dr, positive, weights):
    """(sensitivity, specificity), each (b,), in each sample; nan where a class is missing."""
    with np.errstate(invalid="ignore"):
        sensitivity = (weights * (says_dr & positive)).sum(1) / (weights * positive).sum(1)
        specificity = (weights * (~says_dr & ~positive)).sum(1) / (weights * ~positive).sum(1)
    return sensitivity, specificity


def weighted_roc(score, positive, weights):
    """The ROC curve of each sample: (false positive rate, sensitivity), each (b, k).

    From the strictest threshold, at which nobody is positive, down to the lowest score; nan where
    a class is missing.
    """
    order = np.argsort(-score, kind="stable")
    last_of_equals = np.append(np.diff(score[order]) != 0, True)[: len(score)]
    rates = []
    for of_class in (weights * ~positive, weights * positive):
        counted = np.cumsum(of_class[:, order], 1)[:, last_of_equals]
        with np.errstate(invalid="ignore"):
            rates.append(np.insert(counted / counted[:, -1:], 0, 0, 1))
        rates[-1][of_class.sum(1) == 0] = np.nan
    return tuple(rates)


def area_under(curve):
    """(b,): the area under each curve of `weighted_roc`, by the trapezoidal rule."""
    false_rate, found_rate = curve
    return np.trapezoid(found_rate, false_rate, axis=1)


def sensitivity_where(curve, specificity):
    """(b,): the greatest sensitivity at a threshold with at least this specificity.

    curve: of `weighted_roc`. specificity: a number, or (b,), one for each sample.
    """
    false_rate, found_rate = curve
    least = np.broadcast_to(specificity, len(false_rate))[:, None]
    # 1e-9, because 1 - 0.9 is not 0.1
    allowed = false_rate <= 1 - least + 1e-9
    best = np.where(allowed, found_rate, 0).max(1)
    return np.where(np.isnan(false_rate + found_rate).any(1), np.nan, best)


# --- two models -----------------------------------------------------------------------------------


def auc_difference(score, other, positive, patients):
    """Measured: the AUC of `score` less that of `other`, of the same images (n,)."""

    def difference(weights):
        areas = [area_under(weighted_roc(each, positive, weights)) for each in (score, other)]
        return areas[0] - areas[1]

    return paired(difference, patients, len(set(patients)))


def mean_difference(values, other, patients):
    """Measured: the mean of values (n,) less that of others of the same images."""
    differences = np.asarray(values, float) - other
    return paired(
        lambda weights: weights @ differences / weights.sum(1), patients, len(set(patients))
    )


def sensitivity_difference(score, threshold, other, positive, patients):
    """Measured: the sensitivity of `score` at its threshold less that of `other`.

    Over the same images (n,), and at the same specificity: `other` gets the threshold that finds
    most at the specificity which `score` has in the same sample (as in Robin et al. 2011, pROC).
    So a model that only calls more people does not look better.
    positive: bool (n,). patients: n texts.
    """

    def difference(weights):
        sensitivity, specificity = weighted_rates(score > threshold, positive, weights)
        curve = weighted_roc(other, positive, weights)
        return sensitivity - sensitivity_where(curve, specificity)

    return paired(difference, patients, len(set(np.array(patients, str)[positive])))


def paired(difference, patients, num_patients):
    """Measured, of a function difference(weights (b, n)) -> (b,), by a paired bootstrap.

    Both models are looked at in the same sets of patients (Efron and Tibshirani 1993, chapter 13).
    Where all sets agree, the interval would have no width: it then reaches as far to either side
    as the part of patients on whom they may differ after all, Wilson's bound for none of
    `num_patients`.
    """
    if not len(patients):
        return NOT_MEASURED
    [found] = bootstrap(lambda weights: difference(weights)[None], patients)
    if not found.high - found.low < NO_WIDTH:  # or it is nan
        return found
    _, unseen = wilson(0, num_patients)
    return Measured(found.value, max(-1.0, found.value - unseen), min(1.0, found.value + unseen))


# --- in a closed form -----------------------------------------------------------------------------


def exact_interval(name, value, num_positive, num_negative, num_patients):
    """The interval of a metric of so many positive and negative patients, in a closed form.

    num_patients: of both; who has an eye with and one without it is one of them.
    """
    if name == "auc":
        return auc_interval(value, num_positive, num_negative)
    of_class = {"sensitivity": num_positive, "specificity": num_negative}
    return wilson(value, of_class.get(name, num_patients))


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
