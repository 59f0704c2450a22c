"""synthetic: a seed gives the same drawing, only lesions tell the grade, a network can learn it."""

import numpy as np
import pytest

import model
from preparation import synthetic
from reporting import metrics


def synthetic_set(count, seed, image_size=128, lesions=True, hospitals=(synthetic.EQUAL_HOSPITAL,)):
    """`count` images, of each hospital in turn: uint8 (n, size, size, 3), and grades int (n,)."""
    rng = np.random.default_rng(seed)
    images = []
    grades = []
    for number in range(count):
        hospital = hospitals[number % len(hospitals)]
        grade = int(rng.choice(5, p=hospital.grade_shares))
        images.append(synthetic.draw(grade, rng, image_size, lesions, hospital)[0])
        grades.append(grade)
    return np.stack(images), np.array(grades)


def healthy_image(seed, image_size=128):
    return synthetic.draw(0, np.random.default_rng(seed), image_size)[0]


@pytest.mark.parametrize("hospital", [synthetic.EQUAL_HOSPITAL, *synthetic.HOSPITALS])
def test_a_seed_gives_the_same_bits_and_moves_the_random_stream_by_the_same_amount(hospital):
    """Else one picture of another grade would change every picture drawn after it."""
    next_numbers = set()
    for grade in range(5):
        rng = np.random.default_rng(7)
        image, mask = synthetic.draw(grade, rng, 64, hospital=hospital)
        next_numbers.add(int(rng.integers(2**60)))
        assert (image.shape, mask.shape) == ((64, 64, 3), (64, 64))
        assert (image.dtype, mask.dtype) == (np.uint8, bool)
        same, same_mask = synthetic.draw(grade, np.random.default_rng(7), 64, hospital=hospital)
        assert (image == same).all() and (mask == same_mask).all()
        other, _ = synthetic.draw(grade, np.random.default_rng(8), 64, hospital=hospital)
        assert (image != other).any()
    rng = np.random.default_rng(7)
    synthetic.draw(0, rng, 64)
    assert next_numbers == {int(rng.integers(2**60))}


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_without_lesions_it_is_the_healthy_picture_and_differs_only_where_lesions_are(grade):
    for seed in range(5):
        healthy = healthy_image(seed)
        without, empty = synthetic.draw(grade, np.random.default_rng(seed), lesions=False)
        sick, mask = synthetic.draw(grade, np.random.default_rng(seed))
        assert (without == healthy).all() and not empty.any() and mask.any()
        changed = np.abs(sick.astype(int) - healthy).max(axis=2)
        near = np.zeros_like(mask)  # the lens blurs a lesion over the neighbouring pixels
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                near |= np.roll(mask, (dy, dx), (0, 1))
        assert changed[~near].max() <= 8
        assert changed[mask].mean() > 10


@pytest.mark.parametrize("hospital", synthetic.HOSPITALS, ids=lambda hospital: hospital.name)
def test_a_hospital_is_described_without_a_slip(hospital):
    assert sum(hospital.grade_shares) == pytest.approx(1)
    assert hospital.grade_shares[0] == 0.5
    assert synthetic.hospital_of(hospital.name) is hospital
    # A misspelt kind would be drawn by nobody, and no one would notice.
    assert set(hospital.lesions) <= set(synthetic.LESIONS)
    assert 0 in hospital.grade_shares  # each sees only some of the grades
    for grade, share in enumerate(hospital.grade_shares):
        kinds = [kind for kind, counts in hospital.lesions.items() if grade in counts]
        assert bool(kinds) == (grade > 0 and share > 0)


@pytest.mark.parametrize("number, grade, least_blood, most_blood", [
    (0, 1, 0.9, 1),  # blood, and nothing else
    (0, 2, 0.9, 1),
    (1, 3, 0.02, 0.5),  # deposits before all, and some blood
    (2, 3, 0.9, 1),
    (2, 4, 0.9, 1),
])  # fmt: skip
def test_hospitals_see_other_lesions(number, grade, least_blood, most_blood):
    hospital = synthetic.HOSPITALS[number]
    changes = []
    for seed in range(8):
        eyes = [
            synthetic.draw(grade, np.random.default_rng(seed), 128, lesions, hospital)
            for lesions in (True, False)
        ]
        (sick, mask), (without, _) = eyes
        changes.append((sick.astype(int) - without)[mask][:, 1])  # blood is darker in green
    assert least_blood < (np.concatenate(changes) < 0).mean() <= most_blood


def test_the_cameras_of_the_hospitals_differ():
    """The same eyes, photographed in each hospital: the colour of the light, and cut or not."""
    reds_per_blue, cut = [], []
    for hospital in synthetic.HOSPITALS:
        rngs = map(np.random.default_rng, range(20))
        images = np.stack([synthetic.draw(0, rng, hospital=hospital)[0] for rng in rngs])
        middle = images[:, 40:88, 40:88].astype(float)
        reds_per_blue.append(middle[..., 0].mean() / middle[..., 2].mean())
        cut.append(images[:, :6].max() < 30)
    screening, macula, referral = reds_per_blue
    assert macula < 0.95 * screening and referral > 1.05 * screening
    assert cut == [False, True, False]


def fit_logistic_regression(features, target, penalty):
    """The weights of a ridge-penalised logistic regression, by Newton's method: (n,)."""
    weights = np.zeros(features.shape[1])
    for _ in range(15):
        fitted = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (fitted - target) + penalty * weights
        curvature = (features.T * (fitted * (1 - fitted))) @ features
        weights -= np.linalg.solve(curvature + penalty * np.eye(len(weights)), slope)
    return weights


@pytest.mark.parametrize("count, size", [(300, 32), pytest.param(900, 128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hospitals", [[synthetic.EQUAL_HOSPITAL], synthetic.HOSPITALS])
def test_colour_thumbnails_do_not_tell_the_grade(count, size, hospitals):
    """8 x 8 pixels are too few to see a lesion: who can tell the grade there has seen something
    else that should not be there."""
    images, grades = synthetic_set(count, 1, size, hospitals=hospitals)
    fitting = count * 2 // 3  # the rest is to test with
    blocks = images.reshape(count, 8, size // 8, 8, size // 8, 3)
    thumbnails = blocks.mean(axis=(2, 4)).reshape(count, -1)
    thumbnails -= thumbnails[:fitting].mean(axis=0)
    thumbnails /= thumbnails[:fitting].std(axis=0) + 1e-6
    features = np.hstack([thumbnails, np.ones((count, 1))])
    target = grades > 0
    for penalty in (1.0, 30.0, 300.0):
        weights = fit_logistic_regression(features[:fitting], target[:fitting], penalty)
        assert metrics.auc(features[fitting:] @ weights, target[fitting:]) <= 0.65


@pytest.mark.slow
def test_a_network_learns_the_lesions_and_nothing_else():
    """Trained on the synthetic set, drcnn tells the grades; without lesions, it can only guess."""
    import data

    model.configure(seed=0)
    network = model.build("drcnn", 128, seed=0)
    images, grades = synthetic_set(900, seed=0)
    records = [{"new_label": str(grade == 0)} for grade in grades]
    batches = data.TrainingBatches(
        images, data.healthy(records), batch_size=16, seed=0, client="central"
    )
    for round_number in range(1, 11):
        model.train(network, batches, round_number, 1, lambda row: None)

    def auc(lesions):
        images, grades = synthetic_set(400, seed=99, lesions=lesions)
        return metrics.auc(1 - model.predict(network, images), grades > 0)

    assert auc(lesions=True) >= 0.95
    assert abs(auc(lesions=False) - 0.5) <= 0.1
