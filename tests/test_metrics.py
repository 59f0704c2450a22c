"""metrics.py: the metrics of finding DR, their intervals, and scores that are probabilities."""

import json

import numpy as np
import pytest

from reporting import card as cards
from reporting import metrics


def two_models(seed, n):
    """Scores of two models, which look at the same images, and which of them are ill."""
    rng = np.random.default_rng(seed)
    ill = np.arange(n) % 2 == 0
    shared = rng.standard_normal(n)
    good = 2 * ill + shared + 0.5 * rng.standard_normal(n)
    poor = 1.5 * ill + shared + 0.5 * rng.standard_normal(n)
    return good, poor, ill


def names(n):
    return np.arange(n).astype(str)


def records_of(grades):
    return [{"label": int(grade), "dir": f"{i}.png"} for i, grade in enumerate(grades)]


def test_metrics_are_those_of_finding_dr():
    """Each by its definition, image by image and pair by pair; of one class there is none."""
    threshold, rng = 0.3, np.random.default_rng(0)
    labels = (rng.random(200) < 0.4).astype(np.float32)  # 1 = healthy
    p_healthy = np.round(np.clip(labels * 0.3 + rng.random(200) * 0.7, 0, 1), 2)  # with ties
    dr, healthy = 1 - p_healthy[labels == 0], 1 - p_healthy[labels == 1]
    wins = sum((p > q) + 0.5 * (p == q) for p in dr for q in healthy)
    of_the_truth = np.clip(np.concatenate([dr, 1 - healthy]), 1e-7, 1 - 1e-7)
    assert metrics.scores(p_healthy, labels, threshold) == pytest.approx(
        {
            "auc": wins / (len(dr) * len(healthy)),
            "sensitivity": np.mean(dr > threshold),
            "specificity": np.mean(healthy <= threshold),
            "accuracy": ((dr > threshold).sum() + (healthy <= threshold).sum()) / 200,
            "loss": -np.mean(np.log(of_the_truth)),
        }
    )
    one_class = metrics.scores(p_healthy, np.ones(200), threshold)
    assert [name for name, value in one_class.items() if value is None] == ["auc", "sensitivity"]


def test_the_calibration_error_is_the_mean_distance_of_groups_from_the_line():
    score = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 10)
    positive = np.arange(50) % 10 < 10 * score  # exactly as many as the score says
    assert metrics.calibration_error(score, positive) < 1e-9
    error = metrics.calibration_error(1 - score, positive)
    assert error == pytest.approx(np.mean(abs(1 - 2 * score)))


# --- intervals ------------------------------------------------------------------------------------


def test_wilson_as_published():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert metrics.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=6e-5)
    assert metrics.wilson(0, 20) == pytest.approx((0, 0.1611), abs=6e-5)


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
    """With the same eye twice the interval is that of once."""
    _, score, ill = two_models(0, 60)
    once = metrics.measure(score, ill, names(60), 1)
    twice = metrics.measure(score.repeat(2), ill.repeat(2), names(60).repeat(2), 1)
    assert {name: pytest.approx(each) for name, each in once.items()} == twice


def test_an_interval_keeps_its_width_where_every_draw_agrees():
    score = np.repeat([0.1, 0.9], 20)
    patients = np.repeat(names(20), 2)  # 10 of either kind, two eyes each
    measured = metrics.measure(score, score > 0.5, patients, 0.5)
    assert measured["sensitivity"] == measured["specificity"] == (1, *metrics.wilson(1, 10))
    assert measured["auc"] == (1, *metrics.auc_interval(1.0, 10, 10))
    one_ill_eye_each = metrics.measure(score, score > 0.5, np.tile(names(20), 2), 0.5)
    assert one_ill_eye_each["accuracy"] == (1, *metrics.wilson(1, 20))
    found = metrics.sensitivity_difference(score, 0.5, score, score > 0.5, patients)
    unseen = metrics.wilson(0, 10)[1]  # two models that never differ may differ on others
    assert found == (0, -unseen, unseen)


def test_an_area_of_1_keeps_its_interval_where_it_is_rounded():
    """Of 4 and 6 images that are told apart some draws have an area of 0.9999999999999999."""
    positive = np.repeat([True, False], [4, 6])
    score = np.concatenate([np.linspace(0.6, 0.9, 4), np.linspace(0.1, 0.4, 6)])
    measured = metrics.measure(score, positive, names(10), 0.5)["auc"]
    assert measured.value == pytest.approx(1) and measured.low < 0.9


def test_the_difference_of_two_models_at_the_same_specificity():
    """By its definition; of 40 samples most intervals hold the truth, narrow as they are paired."""
    good, poor, ill = two_models(9, 200_000)
    cut = np.quantile(poor[~ill], np.mean(good[~ill] <= 1))
    truth = np.mean(good[ill] > 1) - np.mean(poor[ill] > cut)
    true_area = metrics.auc(good, ill) - metrics.auc(poor, ill)
    held, held_areas, widths, widths_of_one = 0, 0, [], []
    for seed in range(40):
        good, poor, ill = two_models(seed, 120)
        found = metrics.sensitivity_difference(good, 1, poor, ill, names(120))
        held += found.low <= truth <= found.high
        area = metrics.auc_difference(good, poor, ill, names(120))
        held_areas += area.low <= true_area <= area.high
        widths.append(area.high - area.low)
        _, low, high = metrics.measure(poor, ill, names(120), 1)["auc"]
        widths_of_one.append(high - low)
    assert held >= 36 and held_areas >= 36 and np.mean(widths) < np.mean(widths_of_one)
    cuts = [cut for cut in [*poor, -9] if np.mean(poor[~ill] > cut) <= np.mean(good[~ill] > 1)]
    best = max(np.mean(poor[ill] > cut) for cut in cuts)
    assert found.value == pytest.approx(np.mean(good[ill] > 1) - best)
    assert area.value == pytest.approx(metrics.auc(good, ill) - metrics.auc(poor, ill))


# --- thresholds and probabilities -----------------------------------------------------------------


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


def test_the_threshold_finds_so_many_and_then_clears_as_many_as_it_can():
    _, score, positive = two_models(1, 600)
    score, least = score.clip(-3, 5) / 10 + 0.4, 0.99
    threshold = metrics.choose_threshold(score, positive, least)

    def at(cut):
        return np.mean(score[positive] > cut), np.mean(score[~positive] <= cut)

    assert at(threshold)[0] >= least
    for cut in np.unique(score):
        assert at(cut)[0] < least or sum(at(cut)) <= sum(at(threshold)) + 1e-12
    assert threshold not in score  # midway, so that rounding moves no image across
    assert metrics.choose_threshold(score, np.ones(600, bool)) is None
    assert metrics.choose_threshold(1 - positive.astype(float), positive) is None  # the wrong way
    assert metrics.choose_threshold(np.full(600, 0.3), positive) is None


def test_recalibrated_scores_are_probabilities_and_keep_their_order():
    """Answers whose logit is stretched and moved: on other patients, the scores are right again."""
    rng = np.random.default_rng(0)
    truth = rng.random(4000)
    positive = rng.random(4000) < truth
    p_healthy = 1 - 1 / (1 + np.exp(-(0.3 * np.log(truth / (1 - truth)) - 2)))
    p_healthy[:2] = 0.0, 1.0  # these are clipped
    fits, other = np.arange(4000) < 2000, np.arange(4000) >= 2000
    line = metrics.recalibrate(p_healthy[fits], positive[fits], names(2000))
    score = metrics.recalibrated(p_healthy, line)
    assert metrics.calibration_error(score[other], positive[other]) < 0.03
    assert metrics.calibration_error(1 - p_healthy[other], positive[other]) > 0.2
    assert (np.argsort(score) == np.argsort(-p_healthy)).all() and np.isfinite(score).all()


@pytest.mark.parametrize("width, num_wrong", [(3, 0), (60, 3)])
def test_the_recalibration_is_platts(width, num_wrong):
    """No line near it fits his smoothed targets better, also where the classes are apart."""
    n, num_positive = 2000, 1900
    positive = np.arange(n) < num_positive
    x = np.where(positive, width, -width) * (1 + np.arange(n) / n)
    x[:num_wrong] *= -1  # a whole step of Newton's method goes far beyond the minimum here
    p_healthy = 1 / (1 + np.exp(x))
    slope, intercept = metrics.recalibrate(p_healthy, positive, names(n))
    target = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (n - num_positive + 2))

    def loss(*line):
        score = metrics.recalibrated(p_healthy, line)
        return -np.mean(target * np.log(score) + (1 - target) * np.log(1 - score))

    for factor, more in ((0.99, 0), (1.01, 0), (1, -0.01), (1, 0.01)):
        assert loss(slope, intercept) < loss(slope * factor, intercept + more)


@pytest.mark.parametrize(
    "num_positive, num_negative, direction, has_one",
    [(20, 20, 1, True), (19, 40, 1, False), (40, 19, 1, False), (20, 20, -1, False)],
)
def test_too_few_patients_or_a_falling_line_are_no_recalibration(
    num_positive, num_negative, direction, has_one
):
    positive = np.repeat([True, False], [2 * num_positive, 2 * num_negative])
    patients = np.repeat(names(num_positive + num_negative), 2)  # two eyes of each
    p_healthy = 0.5 - 0.2 * direction * (positive - 0.5)
    line = metrics.recalibrate(p_healthy, positive, patients)
    assert (line is not None) == has_one
    if not has_one:
        assert (metrics.recalibrated(p_healthy, line) == 1 - p_healthy).all()


# --- what a card says -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 0.3])
def test_one_half_chooses_and_the_other_is_scored(given):
    """What others have chosen stays; the AUC is that of the network's own answers."""
    grades = np.repeat([0, 1, 2, 3, 4], [60, 10, 30, 10, 10])
    noise = np.random.default_rng(0).standard_normal(120)
    p_healthy = 1 / (1 + np.exp(1.5 * grades - 2 + noise))
    chosen = {"threshold": given, "calibration": [0.8, 0.3]}
    assessed = metrics.assess(
        p_healthy, records_of(grades), given and dict.fromkeys(metrics.TASKS, chosen)
    )
    patients = np.array([record["dir"] for record in records_of(grades)])
    chooses = metrics.choosing_half(grades, patients)
    assert assessed["num_reporting_patients"] == (~chooses).sum()
    area = metrics.auc(1 - p_healthy[chooses], grades[chooses] > 0)
    assert assessed["choosing_auc"] == round(area, 4)
    for task, least_grade in metrics.TASKS.items():
        entry, positive = assessed["tasks"][task], grades >= least_grade
        score = cards.score(assessed, task, p_healthy)
        if given is None:
            line = metrics.recalibrate(p_healthy[chooses], positive[chooses], patients[chooses])
            threshold = metrics.choose_threshold(score[chooses], positive[chooses])
            chosen = {"threshold": threshold, "calibration": line}
        assert {name: entry[name] for name in chosen} == chosen
        found = np.mean(score[~chooses & positive] > entry["threshold"])
        assert entry["measured"]["sensitivity"][0] == pytest.approx(found, abs=1e-4)
        area = metrics.auc(1 - p_healthy[~chooses], positive[~chooses])
        assert entry["measured"]["auc"][0] == pytest.approx(area, abs=1e-4)


@pytest.mark.parametrize(
    "score, grades, sentence",
    [
        (np.full(40, 0.2), np.repeat([0, 2], 20), "contains 0.5"),
        (np.array([0.2, 0.9]), np.array([0, 2]), "cannot be judged"),  # each patient chooses
        (np.append(np.linspace(0, 1, 39), np.nan), np.repeat([0, 2], 20), "NaN for 1 of 40"),
    ],
)
def test_a_model_that_must_not_be_used(score, grades, sentence):
    """Of one that answers NaN nothing at all is chosen or measured; nan is in no card."""
    assessed = metrics.assess(1 - score, records_of(grades))
    scores = metrics.scores(1 - score, (grades == 0).astype(float))
    assert sentence in assessed["warning"]
    json.dumps([assessed, scores], allow_nan=False)
    assert assessed["num_nan"] == np.isnan(score).sum()
    if assessed["num_nan"]:
        assert set(scores.values()) == {assessed["choosing_auc"]} == {None}
        for entry in assessed["tasks"].values():
            measured = sum(entry["measured"].values(), [])
            assert {entry["calibration"], entry["threshold"], *measured} == {None}
