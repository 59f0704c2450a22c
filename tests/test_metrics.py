"""metrics.py: the metrics of finding DR, and intervals that hold what they promise."""

import json
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


def test_sensitivity_and_specificity_are_those_at_the_threshold(scored):
    p_healthy, labels = scored
    scores = metrics.scores(p_healthy, labels, threshold=0.3)
    score = 1 - p_healthy
    assert scores["sensitivity"] == np.mean(score[labels == 0] > 0.3)
    assert scores["specificity"] == np.mean(score[labels == 1] <= 0.3)
    at_half = metrics.scores(p_healthy, labels)
    assert scores["sensitivity"] > at_half["sensitivity"]
    assert scores["loss"] == at_half["loss"] and scores["auc"] == at_half["auc"]


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


def two_eyes(seed, num_patients=60):
    """Scores of both eyes of each patient, which are alike; grades; patients."""
    rng = np.random.default_rng(seed)
    of_patient = rng.integers(0, 2, num_patients)
    patient = np.repeat(np.arange(num_patients), 2)
    shift = np.repeat(1.5 * of_patient + rng.standard_normal(num_patients), 2)
    score = 1 / (1 + np.exp(-(shift + 0.1 * rng.standard_normal(2 * num_patients) - 0.75)))
    return score, np.repeat(of_patient, 2) > 0, [f"p{number}" for number in patient]


def test_measure_gives_the_metrics_by_their_definition():
    score, positive, patients = two_eyes(0)
    measured = metrics.measure(score, positive, patients, threshold=0.4)
    says = score > 0.4
    assert measured["auc"].value == pytest.approx(metrics.auc(score, positive))
    assert measured["sensitivity"].value == pytest.approx(np.mean(says[positive]))
    assert measured["specificity"].value == pytest.approx(np.mean(~says[~positive]))
    assert measured["accuracy"].value == pytest.approx(np.mean(says == positive))
    most = max(np.mean(positive), np.mean(~positive))
    assert measured["always_same"].value == pytest.approx(most)
    cuts = [*np.unique(score), -1]
    found = {cut: np.mean(score[positive] > cut) for cut in cuts}
    cleared = {cut: np.mean(score[~positive] <= cut) for cut in cuts}
    best = max(found[cut] for cut in cuts if cleared[cut] >= 0.9)
    assert measured["sensitivity_at_90"].value == pytest.approx(best)
    best = max(cleared[cut] for cut in cuts if found[cut] >= 0.9)
    assert measured["specificity_at_90"].value == pytest.approx(best)
    for name in metrics.MEASURED:
        assert measured[name].low <= measured[name].value <= measured[name].high, name


def test_two_eyes_of_one_patient_are_not_two_patients():
    """Of 100 samples most intervals hold the truth; counted by image they would be too narrow."""
    truth = metrics.auc(*two_eyes(1000, num_patients=20_000)[:2])
    held = held_by_image = 0
    for seed in range(100):
        score, positive, patients = two_eyes(seed)
        interval = metrics.measure(score, positive, patients)["auc"]
        held += interval.low <= truth <= interval.high
        images = [str(number) for number in range(len(score))]
        interval = metrics.measure(score, positive, images)["auc"]
        held_by_image += interval.low <= truth <= interval.high
    assert held >= 88
    assert held_by_image <= held - 8


def test_an_interval_keeps_its_width_where_every_draw_agrees():
    score = np.repeat([0.1, 0.9], 20)
    patients = [f"p{number // 2}" for number in range(40)]  # 10 of either kind, two eyes each
    measured = metrics.measure(score, score > 0.5, patients)
    assert measured["sensitivity"] == (1, *metrics.wilson(1, 10))
    assert measured["specificity"] == (1, *metrics.wilson(1, 10))
    assert measured["accuracy"] == (1, *metrics.wilson(1, 20))
    assert measured["auc"] == (1, *metrics.auc_interval(1.0, 10, 10))
    assert measured["sensitivity"].low < 0.8


def test_the_same_seed_gives_the_same_intervals():
    score, positive, patients = two_eyes(3)
    measured = metrics.measure(score, positive, patients, seed=1)
    assert measured == metrics.measure(score, positive, patients, seed=1)
    assert measured != metrics.measure(score, positive, patients, seed=2)


def test_without_a_class_there_is_no_number():
    measured = metrics.measure(np.array([0.1, 0.8, 0.3]), np.zeros(3, bool), ["a", "b", "c"])
    assert measured["accuracy"].value == pytest.approx(2 / 3)
    assert measured["specificity"].value == pytest.approx(2 / 3)
    for name in ("auc", "sensitivity", "sensitivity_at_90", "specificity_at_90"):
        assert np.isnan(measured[name]).all(), name


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
    assert not (metrics.choosing_half(grades, [f"q{p}" for p in patients]) == choosing).all()


def test_the_threshold_finds_85_percent_and_then_clears_as_many_as_it_can():
    score, positive, _ = two_eyes(1, num_patients=300)
    threshold = metrics.choose_threshold(score, positive)

    def at(cut):
        return np.mean(score[positive] > cut), np.mean(score[~positive] <= cut)

    sensitivity, specificity = at(threshold)
    assert sensitivity >= 0.85
    for cut in np.unique(score):
        found, cleared = at(cut)
        assert found < 0.85 or found + cleared <= sensitivity + specificity + 1e-12
    assert threshold not in score  # midway, so that rounding moves no image across
    assert metrics.choose_threshold(score, np.ones(600, bool)) is None
    assert metrics.choose_threshold(1 - positive.astype(float), positive) is None  # the wrong way
    assert metrics.choose_threshold(np.full(600, 0.3), positive) is None


def records_of(grades):
    return [{"label": int(grade), "dir": f"{i}.png"} for i, grade in enumerate(grades)]


def test_what_a_card_says_of_a_model():
    rng = np.random.default_rng(0)
    grades = np.repeat([0, 1, 2, 3, 4], [60, 10, 30, 10, 10])
    score = 1 / (1 + np.exp(-(1.5 * grades - 2 + rng.standard_normal(120))))
    assessed = metrics.assess(1 - score, records_of(grades))
    assert assessed["warning"] == ""
    assert (assessed["num_images"], assessed["num_patients"]) == (120, 120)
    choosing = metrics.choosing_half(grades, [record["dir"] for record in records_of(grades)])
    assert assessed["num_reporting_patients"] == (~choosing).sum()
    assert assessed["choosing_auc"] == round(metrics.auc(score[choosing], grades[choosing] > 0), 4)
    for task, least_grade in metrics.TASKS.items():
        entry = assessed["tasks"][task]
        positive = grades >= least_grade
        threshold = metrics.choose_threshold(score[choosing], positive[choosing])
        assert entry["threshold"] == pytest.approx(threshold, abs=1e-6)
        found = np.mean(score[~choosing & positive] > threshold)
        assert entry["measured"]["sensitivity"][0] == pytest.approx(found, abs=1e-4)
    json.dumps(assessed, allow_nan=False)


@pytest.mark.parametrize(
    "score, grades, sentence",
    [
        (np.full(40, 0.2), np.repeat([0, 2], 20), "contains 0.5"),
        (np.repeat([0.9, 0.1], 20), np.repeat([0, 2], 20), "contains 0.5 or lies below it"),
        (np.linspace(0, 1, 40), np.zeros(40, int), "cannot be judged"),
        (np.linspace(0, 1, 40), np.repeat([0, 1], 20), "cannot be judged"),
        (np.array([0.2, 0.9]), np.array([0, 2]), "cannot be judged"),
        (np.array([0.2]), np.array([0]), "cannot be judged"),
    ],
)
def test_a_model_that_must_not_be_used(score, grades, sentence):
    assessed = metrics.assess(1 - score, records_of(grades))
    assert sentence in assessed["warning"]
    json.dumps(assessed, allow_nan=False)


@pytest.mark.parametrize("num_images", [1, 2])
def test_so_few_images_that_none_is_left_to_report_on(num_images):
    """Every patient chooses: the card says that nothing can be judged, and no round fails."""
    records = [
        {"picture": f"{n}.png", "dir": f"{n}.png", "label": 2 * n, "new_label": str(n == 0)}
        for n in range(num_images)
    ]
    found = metrics.assess(np.linspace(0.25, 0.75, num_images), records)
    assert found["num_reporting_images"] == 0
    assert found["warning"].startswith("it cannot be judged")
    measured = found["tasks"]["any DR"]["measured"]
    assert set(measured) == set(metrics.MEASURED) and measured["auc"] == [None, None, None]
