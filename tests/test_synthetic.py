"""synthetic: a seed gives the same drawing, only lesions tell the grade, a network can learn it."""

import numpy as np
import pytest

import data
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


def test_a_seed_gives_the_same_bits_and_moves_the_random_stream_by_the_same_amount():
    """Else one picture of another grade would change every picture drawn after it."""
    next_numbers = set()
    for hospital in (synthetic.EQUAL_HOSPITAL, *synthetic.HOSPITALS):
        for grade in range(5):
            rng = np.random.default_rng(7)
            image, mask = synthetic.draw(grade, rng, 64, hospital=hospital)
            next_numbers.add(int(rng.integers(2**60)))
            same, same_mask = synthetic.draw(grade, np.random.default_rng(7), 64, hospital=hospital)
            assert (image == same).all() and (mask == same_mask).all()
            other, _ = synthetic.draw(grade, np.random.default_rng(8), 64, hospital=hospital)
            assert (image != other).any()
    assert len(next_numbers) == 1


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_without_lesions_it_is_the_healthy_picture_and_differs_only_where_lesions_are(grade):
    for seed in range(5):
        healthy, _ = synthetic.draw(0, np.random.default_rng(seed))
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
    assert sum(hospital.grade_shares) == pytest.approx(1) and hospital.grade_shares[0] == 0.5
    # A misspelt kind would be drawn by nobody, and no one would notice.
    assert set(hospital.lesions) <= set(synthetic.LESIONS)
    for grade, share in enumerate(hospital.grade_shares):
        kinds = [kind for kind, counts in hospital.lesions.items() if grade in counts]
        assert bool(kinds) == (grade > 0 and share > 0)


@pytest.mark.parametrize("number, least_blood, most_blood", [
    (1, 0.02, 0.5),  # deposits before all, and some blood
    (2, 0.9, 1),
])  # fmt: skip
def test_hospitals_see_other_lesions(number, least_blood, most_blood):
    hospital = synthetic.HOSPITALS[number]
    changes = []
    for seed in range(8):
        (sick, mask), (without, _) = (
            synthetic.draw(3, np.random.default_rng(seed), 128, lesions, hospital)
            for lesions in (True, False)
        )
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


def test_colour_thumbnails_do_not_tell_the_grade():
    """8 x 8 pixels are too few to see a lesion: what tells the grade there should not be there."""
    images, grades = synthetic_set(450, 1, 32)
    thumbnails = images.reshape(450, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(450, -1)
    features = (thumbnails - thumbnails.mean(axis=0)) / thumbnails.std(axis=0).clip(1e-6)
    target = grades > 0
    known, asked = slice(0, 300), slice(300, None)
    for penalty in (30.0, 300.0):  # ridge regression
        curvature = features[known].T @ features[known] + penalty * np.eye(features.shape[1])
        weights = np.linalg.solve(curvature, features[known].T @ (target[known] - 0.5))
        assert metrics.auc(features[asked] @ weights, target[asked]) <= 0.65


@pytest.mark.slow
def test_a_network_learns_the_lesions_and_nothing_else():
    """Trained on the synthetic set, drcnn tells the grades; without lesions, it can only guess."""
    model.configure(seed=0)
    network = model.build("drcnn", 128, seed=0)
    images, grades = synthetic_set(900, seed=0)
    labels = (grades == 0).astype(np.float32)
    batches = data.TrainingBatches(images, labels, batch_size=16, seed=0, client="central")
    for round_number in range(1, 11):
        model.train(network, batches, round_number, 1, lambda row: None)

    def auc(lesions):
        images, grades = synthetic_set(400, seed=99, lesions=lesions)
        return metrics.auc(1 - model.predict(network, images), grades > 0)

    assert auc(lesions=True) >= 0.95
    assert abs(auc(lesions=False) - 0.5) <= 0.1
