"""metrics.py: the metrics of finding DR, and intervals that hold what they promise."""

import json

import numpy as np
import pytest

from reporting import card as cards
from reporting import metrics


@pytest.fixture
def scored():
    """P(healthy) with ties, and labels (1 = healthy), of 200 images."""
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.4).astype(np.float32)
    p_healthy = np.round(np.clip(labels * 0.3 + rng.random(200) * 0.7, 0, 1), 2)
    return p_healthy, labels


def two_eyes(seed, num_patients=60):
    """Scores of both eyes of each patient, which are alike; grades; patients."""
    rng = np.random.default_rng(seed)
    of_patient = rng.integers(0, 2, num_patients)
    patient = np.repeat(np.arange(num_patients), 2)
    shift = np.repeat(1.5 * of_patient + rng.standard_normal(num_patients), 2)
    score = 1 / (1 + np.exp(-(shift + 0.1 * rng.standard_normal(2 * num_patients) - 0.75)))
    return score, np.repeat(of_patient, 2) > 0, [f"p{number}" for number in patient]


def records_of(grades):
    return [{"label": int(grade), "dir": f"{i}.png"} for i, grade in enumerate(grades)]


# --- the metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_metrics_are_those_of_finding_dr(scored, threshold):
    """Each by its definition, image by image and pair by pair."""
    p_healthy, labels = scored
    scores = metrics.scores(p_healthy, labels, threshold)
    dr, healthy = 1 - p_healthy[labels == 0], 1 - p_healthy[labels == 1]
    wins = sum((p > q) + 0.5 * (p == q) for p in dr for q in healthy)
    assert scores["auc"] == pytest.approx(wins / (len(dr) * len(healthy)))
    assert scores["sensitivity"] == np.mean(dr > threshold)
    assert scores["specificity"] == np.mean(healthy <= threshold)
    right = (dr > threshold).sum() + (healthy <= threshold).sum()
    assert scores["accuracy"] == pytest.approx(right / 200)
    of_the_truth = np.concatenate([dr, 1 - healthy])
    loss = -np.mean(np.log(np.clip(of_the_truth, 1e-7, 1 - 1e-7)))
    assert scores["loss"] == pytest.approx(loss)


def test_measure_gives_the_metrics_by_their_definition():
    score, positive, patients = two_eyes(0)
    measured = metrics.measure(score, positive, patients, threshold=0.4)
    says = score > 0.4
    expected = {
        "auc": metrics.auc(score, positive),
        "sensitivity": np.mean(says[positive]),
        "specificity": np.mean(~says[~positive]),
        "accuracy": np.mean(says == positive),
    }
    assert {name: each.value for name, each in measured.items()} == pytest.approx(expected)
    assert set(measured) == set(metrics.MEASURED)
    assert all(each.low <= each.value <= each.high for each in measured.values())


def test_without_a_class_there_is_no_number():
    measured = metrics.measure(np.array([0.1, 0.8, 0.3]), np.zeros(3, bool), ["a", "b", "c"])
    assert measured["accuracy"].value == measured["specificity"].value == pytest.approx(2 / 3)
    for name in ("auc", "sensitivity"):
        assert np.isnan(measured[name]).all(), name


def test_the_calibration_error_is_the_mean_distance_of_groups_from_the_line():
    score = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 10)
    positive = np.arange(50) % 10 < 10 * score  # exactly as many as the score says
    assert metrics.calibration_error(score, positive) < 1e-9
    error = metrics.calibration_error(score / 2, positive)
    assert error == pytest.approx(np.mean(score / 2))


# --- their intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, n, low, high", [(81, 263, 0.2553, 0.3662), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_as_published(found, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert metrics.wilson(found / n, n) == pytest.approx((low, high), abs=6e-5)


def test_the_auc_interval_holds_what_it_promises():
    """Of 600 samples with a known AUC, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    truth = 0.9213503964748574  # Phi(2 / sqrt 2): normal scores, 2 standard deviations apart
    ill = np.arange(90) < 40
    areas = [metrics.auc(rng.standard_normal(90) + 2 * ill, ill) for _ in range(600)]
    intervals = np.array([metrics.auc_interval(area, 40, 50) for area in areas])
    held = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    assert 0.91 <= held.mean() <= 0.99


def test_two_eyes_of_one_patient_are_not_two_patients():
    """Of 100 samples most intervals hold the truth; counted by image they would be too narrow."""
    truth = metrics.auc(*two_eyes(1000, num_patients=20_000)[:2])
    held = held_by_image = 0
    for seed in range(100):
        score, positive, patients = two_eyes(seed)
        interval = metrics.measure(score, positive, patients)["auc"]
        held += interval.low <= truth <= interval.high
        interval = metrics.measure(score, positive, [str(n) for n in range(len(score))])["auc"]
        held_by_image += interval.low <= truth <= interval.high
    assert held >= 88
    assert held_by_image <= held - 8


def test_an_interval_keeps_its_width_where_every_draw_agrees():
    score = np.repeat([0.1, 0.9], 20)
    patients = [f"p{number // 2}" for number in range(40)]  # 10 of either kind, two eyes each
    measured = metrics.measure(score, score > 0.5, patients)
    assert measured["sensitivity"] == measured["specificity"] == (1, *metrics.wilson(1, 10))
    assert measured["auc"] == (1, *metrics.auc_interval(1.0, 10, 10))


# --- two models -----------------------------------------------------------------------------------


def test_the_difference_of_two_models_at_the_same_specificity(scored):
    score, positive = 1 - scored[0], scored[1] == 0
    other = np.random.default_rng(3).random(200)
    patients = [str(n) for n in range(200)]
    found = metrics.sensitivity_difference(score, 0.4, other, positive, patients)
    allowed = np.mean(score[~positive] > 0.4)  # false alarms
    cuts = [cut for cut in [*other, -1] if np.mean(other[~positive] > cut) <= allowed]
    best = max(np.mean(other[positive] > cut) for cut in cuts)
    assert found.value == pytest.approx(np.mean(score[positive] > 0.4) - best)
    assert metrics.auc_difference(score, other, positive, patients).value == pytest.approx(
        metrics.auc(score, positive) - metrics.auc(other, positive)
    )


def test_the_interval_of_a_difference_holds_what_it_promises():
    """Of 100 samples of two models that look at the same patients, most hold the truth."""

    def two_models(rng, n):
        ill = np.arange(n) % 2 == 0
        shared = rng.standard_normal(n)
        good = 2 * ill + shared + 0.5 * rng.standard_normal(n)
        poor = 1.5 * ill + shared + 0.5 * rng.standard_normal(n)
        return good, poor, ill

    good, poor, ill = two_models(np.random.default_rng(9), 1_000_000)
    cut = np.quantile(poor[~ill], np.mean(good[~ill] <= 1))
    truth = np.mean(good[ill] > 1) - np.mean(poor[ill] > cut)
    held = 0
    for seed in range(100):
        good, poor, ill = two_models(np.random.default_rng(seed), 120)
        found = metrics.sensitivity_difference(good, 1, poor, ill, [str(n) for n in range(120)])
        held += found.low <= truth <= found.high
    assert held >= 88


def test_two_models_that_never_differ_may_differ_on_others():
    score = np.repeat([0.1, 0.9], 30)
    patients = [str(n) for n in range(60)]
    found = metrics.sensitivity_difference(score, 0.5, score, score > 0.5, patients)
    unseen = metrics.wilson(0, 30)[1]
    assert found == (0, -unseen, unseen)


# --- thresholds -----------------------------------------------------------------------------------


def test_the_halves_follow_from_the_index_and_keep_patients_whole():
    rng = np.random.default_rng(5)
    patients = [f"p{number // 2:03}" for number in range(200)]
    grades = rng.integers(0, 5, 200)
    choosing = metrics.choosing_half(grades, patients)
    assert (choosing[::2] == choosing[1::2]).all()  # both eyes of a patient
    worst = np.maximum(grades[::2], grades[1::2])
    for grade in range(5):
        of_grade = choosing[::2][worst == grade]
        assert abs(of_grade.sum() - (~of_grade).sum()) <= 1
    order = rng.permutation(200)
    again = metrics.choosing_half(grades[order], [patients[i] for i in order])
    assert (again == choosing[order]).all()


def test_the_threshold_finds_85_percent_and_then_clears_as_many_as_it_can():
    score, positive, _ = two_eyes(1, num_patients=300)
    threshold = metrics.choose_threshold(score, positive)

    def at(cut):
        return np.mean(score[positive] > cut), np.mean(score[~positive] <= cut)

    assert at(threshold)[0] >= 0.85
    for cut in np.unique(score):
        assert at(cut)[0] < 0.85 or sum(at(cut)) <= sum(at(threshold)) + 1e-12
    assert threshold not in score  # midway, so that rounding moves no image across
    assert metrics.choose_threshold(score, np.ones(600, bool)) is None
    assert metrics.choose_threshold(1 - positive.astype(float), positive) is None  # the wrong way
    assert metrics.choose_threshold(np.full(600, 0.3), positive) is None


def of_others(threshold):
    return {"threshold": threshold, "calibration": [0.8, 0.3]}


@pytest.mark.parametrize(
    "given", [None, {"any DR": of_others(0.3), "referable DR": of_others(None)}]
)
def test_what_a_card_says_of_a_model(given):
    """What others have chosen stays; without a threshold, a score is called above 0.5."""
    rng = np.random.default_rng(0)
    grades = np.repeat([0, 1, 2, 3, 4], [60, 10, 30, 10, 10])
    p_healthy = 1 / (1 + np.exp(1.5 * grades - 2 + rng.standard_normal(120)))
    assessed = metrics.assess(p_healthy, records_of(grades), given)
    patients = np.array([record["dir"] for record in records_of(grades)])
    choosing = metrics.choosing_half(grades, patients)
    assert assessed["num_reporting_patients"] == (~choosing).sum()
    area = metrics.auc(1 - p_healthy[choosing], grades[choosing] > 0)
    assert assessed["choosing_auc"] == round(area, 4)
    for task, least_grade in metrics.TASKS.items():
        entry = assessed["tasks"][task]
        positive = grades >= least_grade
        if given:
            assert (entry["calibration"], entry["threshold"]) == (
                [0.8, 0.3],
                given[task]["threshold"],
            )
        else:
            line = metrics.recalibrate(p_healthy[choosing], positive[choosing], patients[choosing])
            assert entry["calibration"] == line
        score = cards.score({"tasks": assessed["tasks"]}, task, p_healthy)
        if not given:
            chosen = metrics.choose_threshold(score[choosing], positive[choosing])
            assert entry["threshold"] == chosen
        found = np.mean(score[~choosing & positive] > (entry["threshold"] or 0.5))
        assert entry["measured"]["sensitivity"][0] == pytest.approx(found, abs=1e-4)
        area = metrics.auc(1 - p_healthy[~choosing], positive[~choosing])
        assert entry["measured"]["auc"][0] == pytest.approx(area, abs=1e-4)


# --- scores that are probabilities ----------------------------------------------------------------


def test_recalibrated_scores_are_probabilities_and_keep_their_order():
    """Answers whose logit is stretched and moved: on other patients, the scores are right again."""
    rng = np.random.default_rng(0)
    truth = rng.random(4000)
    positive = rng.random(4000) < truth
    p_healthy = 1 - 1 / (1 + np.exp(-(0.3 * np.log(truth / (1 - truth)) - 2)))
    p_healthy[0], positive[0] = 0.0, True  # P(healthy) of exactly 0 is clipped
    fits, other = np.arange(4000) < 2000, np.arange(4000) >= 2000
    patients = np.arange(4000).astype(str)
    line = metrics.recalibrate(p_healthy[fits], positive[fits], patients[fits])
    score = metrics.recalibrated(p_healthy[other], line)
    assert metrics.calibration_error(score, positive[other]) < 0.03
    assert metrics.calibration_error(1 - p_healthy[other], positive[other]) > 0.2
    assert (np.argsort(score) == np.argsort(-p_healthy[other])).all()
    assert np.isfinite(metrics.recalibrated(p_healthy, line)).all()


@pytest.mark.parametrize("width", [0.1, 3, 60])
def test_the_recalibration_is_platts(width):
    """No line near it fits his smoothed targets better, also where the classes are apart."""
    positive = np.arange(60) < 25
    p_healthy = 1 / (1 + np.exp(np.where(positive, width, -width) * (1 + np.arange(60) / 60)))
    line = metrics.recalibrate(p_healthy, positive, np.arange(60).astype(str))
    target = np.where(positive, 26 / 27, 1 / 37)

    def loss(slope, intercept):
        score = metrics.recalibrated(p_healthy, [slope, intercept])
        return -np.mean(target * np.log(score) + (1 - target) * np.log(1 - score))

    slope, intercept = line
    for factor, more in ((0.999, 0), (1.001, 0), (1, -0.001), (1, 0.001)):
        assert loss(slope, intercept) < loss(slope * factor, intercept + more)


@pytest.mark.parametrize(
    "num_positive, num_negative, direction, has_one",
    [(20, 20, 1, True), (19, 40, 1, False), (40, 19, 1, False), (20, 20, -1, False)],
)
def test_too_few_patients_or_a_falling_line_are_no_recalibration(
    num_positive, num_negative, direction, has_one
):
    positive = np.repeat([True, False], [2 * num_positive, 2 * num_negative])
    patients = (np.arange(len(positive)) // 2).astype(str)  # two eyes of each
    p_healthy = 0.5 - 0.2 * direction * (positive - 0.5)
    line = metrics.recalibrate(p_healthy, positive, patients)
    assert (line is not None) == has_one
    if not has_one:
        assert (metrics.recalibrated(p_healthy, line) == 1 - p_healthy).all()


@pytest.mark.parametrize("num_nan", [1, 40])
def test_of_a_model_that_answers_nan_nothing_is_measured(num_nan):
    p_healthy = np.linspace(0, 1, 40)
    p_healthy[:num_nan] = np.nan
    assessed = metrics.assess(p_healthy, records_of(np.repeat([0, 2], 20)))
    assert assessed["warning"] == f"it answers NaN for {num_nan} of 40 images"
    assert assessed["num_nan"] == num_nan and assessed["choosing_auc"] is None
    for entry in assessed["tasks"].values():
        assert (entry["calibration"], entry["threshold"]) == (None, None)
        assert set(sum(entry["measured"].values(), [])) == {None}
    scores = metrics.scores(p_healthy, np.repeat([1.0, 0.0], 20))
    assert set(scores.values()) == {None}
    json.dumps([assessed, scores], allow_nan=False)


@pytest.mark.parametrize(
    "score, grades, sentence",
    [
        (np.full(40, 0.2), np.repeat([0, 2], 20), "contains 0.5"),
        (np.repeat([0.9, 0.1], 20), np.repeat([0, 2], 20), "contains 0.5 or lies below it"),
        (np.linspace(0, 1, 40), np.repeat([0, 1], 20), "cannot be judged"),
        (np.array([0.2, 0.9]), np.array([0, 2]), "cannot be judged"),  # each patient chooses
        (np.array([0.2]), np.array([0]), "cannot be judged"),
    ],
)
def test_a_model_that_must_not_be_used(score, grades, sentence):
    assessed = metrics.assess(1 - score, records_of(grades))
    assert sentence in assessed["warning"]
    json.dumps(assessed, allow_nan=False)
