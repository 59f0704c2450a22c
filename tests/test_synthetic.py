"""synthetic: a seed gives the same drawing, only lesions tell the grade, a network can learn it."""

import numpy as np
import pytest

import data
import model
from preparation import synthetic
from reporting import metrics


def draw(grade, seed, image_size=128, hospital=synthetic.EQUAL_HOSPITAL):
    rng = np.random.default_rng(seed)
    return synthetic.draw(grade, rng, image_size, hospital).astype(int), rng


@pytest.mark.parametrize("hospital", [synthetic.EQUAL_HOSPITAL, *synthetic.HOSPITALS])
def test_a_seed_gives_the_same_bits_and_moves_the_random_stream_by_the_same_amount(hospital):
    """Else one picture of another grade would change every picture drawn after it."""
    next_numbers = set()
    for grade in range(5):
        image, rng = draw(grade, 7, 64, hospital)
        next_numbers.add(int(rng.integers(2**60)))
        assert (image == draw(grade, 7, 64, hospital)[0]).all()
        assert (image != draw(grade, 8, 64, hospital)[0]).any()
    assert len(next_numbers) == 1


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_eyes_of_one_seed_differ_only_where_lesions_are(grade):
    for seed in range(5):
        changed = np.abs(draw(grade, seed)[0] - draw(0, seed)[0]).max(axis=2) > 8
        assert 0 < changed.mean() < 0.15


def test_hospitals_differ_in_patients_and_cameras():
    healthy, sick = (
        [draw(grade, 0, 128, hospital)[0] for hospital in synthetic.HOSPITALS[1:]]
        for grade in (0, 3)
    )
    # deposits before all in the macula clinic, and blood, which is darker in green, in the other
    changes = [(one - other)[..., 1] for one, other in zip(sick, healthy, strict=True)]
    of_blood = [(change[np.abs(change) > 8] < 0).mean() for change in changes]
    assert of_blood[0] < 0.5 and of_blood[1] > 0.9
    light = [image[40:88, 40:88].mean(axis=(0, 1)) for image in healthy]
    assert light[1][0] / light[1][2] > 1.1 * light[0][0] / light[0][2]  # warmer


@pytest.mark.slow
def test_a_network_learns_the_lesions():
    def draw_set(count, seed):
        rng = np.random.default_rng(seed)
        grades = rng.choice(5, count, p=synthetic.GRADE_SHARES)
        return np.stack([synthetic.draw(grade, rng) for grade in grades.tolist()]), grades

    model.configure(seed=0)
    network = model.build("drcnn", 128, seed=0)
    images, grades = draw_set(900, seed=0)
    labels = (grades == 0).astype(np.float32)
    batches = data.TrainingBatches(images, labels, batch_size=16, seed=0, client="central")
    for round_number in range(1, 11):
        model.train(network, batches, round_number, 1, lambda row: None)
    images, grades = draw_set(400, seed=99)
    assert metrics.auc(1 - model.predict(network, images), grades > 0) >= 0.95
