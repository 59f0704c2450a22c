"""fundus: the drawing is the same for a seed, shows a grade by lesions only, and a network can learn it."""

import numpy as np
import pytest

import model
from preparation import fundus
from reporting import metrics


def drawn_set(count, seed, image_size=128, lesions=True):
    """`count` images in the grades' proportions: uint8 (n, size, size, 3) and grades int (n,)."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(5, count, p=fundus.GRADE_SHARES)
    return np.stack(
        [fundus.draw(int(grade), rng, image_size, lesions)[0] for grade in grades]
    ), grades


def test_image_and_mask_have_the_asked_size():
    for image_size in (32, 128):
        image, mask = fundus.draw(4, np.random.default_rng(0), image_size)
        assert image.shape == (image_size, image_size, 3) and image.dtype == np.uint8
        assert mask.shape == (image_size, image_size) and mask.dtype == bool


def test_the_same_seed_gives_the_same_bits():
    for grade in range(5):
        first, second = (fundus.draw(grade, np.random.default_rng(7), 64) for _ in range(2))
        assert (first[0] == second[0]).all() and (first[1] == second[1]).all()
    assert (first[0] != fundus.draw(4, np.random.default_rng(8), 64)[0]).any()


def test_the_grade_does_not_move_the_random_stream():
    after = []
    for grade in range(5):
        rng = np.random.default_rng(3)
        fundus.draw(grade, rng, 32)
        after.append(rng.integers(2**60))
    assert len(set(after)) == 1


@pytest.mark.parametrize("grade", [-1, 5, 1.5, "2"])
def test_a_grade_that_does_not_exist_is_refused(grade):
    with pytest.raises(ValueError, match="there is no grade"):
        fundus.draw(grade, np.random.default_rng(0), 32)


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_without_lesions_it_is_the_healthy_picture_and_differs_only_where_lesions_are(grade):
    for seed in range(5):
        healthy, _ = fundus.draw(0, np.random.default_rng(seed))
        without, empty = fundus.draw(grade, np.random.default_rng(seed), lesions=False)
        sick, mask = fundus.draw(grade, np.random.default_rng(seed))
        assert (without == healthy).all() and not empty.any() and mask.any()
        changed = np.abs(sick.astype(int) - healthy).max(axis=2)
        near = np.zeros_like(mask)  # the lens blurs a lesion over the neighbouring pixels
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                near |= np.roll(mask, (dy, dx), (0, 1))
        assert changed[~near].max() <= 8
        assert changed[mask].mean() > 10


def test_lesion_area_grows_with_the_grade():
    rng = np.random.default_rng(0)
    areas = [
        np.mean([fundus.draw(grade, rng, 64)[1].mean() for _ in range(25)]) for grade in range(5)
    ]
    assert areas[0] == 0
    assert all(more > 1.1 * less for less, more in zip(areas, areas[1:], strict=False)), areas


def test_it_looks_like_a_fundus_photograph():
    for seed in range(20):
        image = fundus.draw(0, np.random.default_rng(seed))[0].astype(float)
        assert (
            image[:4, :4].max() < 30 and image[-4:, -4:].max() < 30
        )  # black around the field of view
        middle = image[32:96, 32:96].mean(axis=(0, 1))
        assert middle[0] > middle[1] > middle[2]  # red above green above blue
        left, right = image[48:80, 8:60, 1].max(), image[48:80, 68:120, 1].max()
        assert abs(left - right) > 5  # one side has the optic disc


def test_left_and_right_eyes_are_drawn():
    eyes = [
        fundus.draw(0, np.random.default_rng(seed), 64)[0][24:40].astype(float)
        for seed in range(60)
    ]
    on_the_right = sum(eye[:, 34:, 1].max() > eye[:, :30, 1].max() for eye in eyes)
    assert 15 < on_the_right < 45


@pytest.mark.parametrize("count, size", [(300, 32), pytest.param(900, 128, marks=pytest.mark.slow)])
def test_colour_thumbnails_do_not_tell_the_grade(count, size):
    """Ridge-penalised logistic regression on 8 x 8 colour thumbnails, fitted by Newton's method."""
    images, grades = drawn_set(count, seed=1, image_size=size)
    fitting = count * 2 // 3
    thumbnails = (
        images.reshape(count, 8, size // 8, 8, size // 8, 3).mean(axis=(2, 4)).reshape(count, -1)
    )
    thumbnails = (thumbnails - thumbnails[:fitting].mean(axis=0)) / (
        thumbnails[:fitting].std(axis=0) + 1e-6
    )
    features, target = np.hstack([thumbnails, np.ones((count, 1))]), grades > 0
    for penalty in (1.0, 30.0, 300.0):
        weights = np.zeros(features.shape[1])
        for _ in range(15):
            fitted = 1 / (1 + np.exp(-np.clip(features[:fitting] @ weights, -30, 30)))
            slope = features[:fitting].T @ (fitted - target[:fitting]) + penalty * weights
            curvature = (features[:fitting].T * (fitted * (1 - fitted))) @ features[:fitting]
            weights -= np.linalg.solve(curvature + penalty * np.eye(len(weights)), slope)
        assert metrics.auc(features[fitting:] @ weights, target[fitting:]) <= 0.65


@pytest.mark.slow
def test_a_network_learns_the_lesions_and_nothing_else():
    """Trained on the drawn set, drcnn tells the grades; on the same images without lesions it guesses."""
    import data

    model.configure(seed=0)
    network = model.build("drcnn", 128, seed=0)
    images, grades = drawn_set(900, seed=0)
    records = [{"new_label": str(grade == 0)} for grade in grades]
    batches = data.TrainingBatches(
        images, data.healthy(records), batch_size=16, seed=0, client="central"
    )
    for round_number in range(1, 11):
        model.train(network, batches, round_number, 1, lambda row: None)

    def auc(lesions):
        images, grades = drawn_set(400, seed=99, lesions=lesions)
        healthy = np.concatenate(
            [network(batch, training=False)[:, 0] for batch in data.evaluation_batches(images)]
        )
        return metrics.auc(1 - healthy, grades > 0)

    assert auc(lesions=True) >= 0.95
    assert abs(auc(lesions=False) - 0.5) <= 0.1
