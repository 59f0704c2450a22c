"""fundus: a seed gives the same drawing, only lesions tell the grade, a network can learn it."""

import numpy as np
import pytest

import model
from preparation import fundus
from reporting import metrics


def drawn_set(count, seed, image_size=128, lesions=True):
    """`count` images in the grades' proportions: uint8 (n, size, size, 3), and grades int (n,)."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(5, count, p=fundus.GRADE_SHARES)
    images = [fundus.draw(int(grade), rng, image_size, lesions)[0] for grade in grades]
    return np.stack(images), grades


def healthy_image(seed, image_size=128):
    return fundus.draw(0, np.random.default_rng(seed), image_size)[0]


def test_image_and_mask_have_the_requested_size():
    for image_size in (32, 128):
        image, mask = fundus.draw(4, np.random.default_rng(0), image_size)
        assert image.shape == (image_size, image_size, 3) and image.dtype == np.uint8
        assert mask.shape == (image_size, image_size) and mask.dtype == bool


def test_the_same_seed_gives_the_same_bits():
    for grade in range(5):
        image, mask = fundus.draw(grade, np.random.default_rng(7), 64)
        same_image, same_mask = fundus.draw(grade, np.random.default_rng(7), 64)
        assert (image == same_image).all() and (mask == same_mask).all()
    assert (image != fundus.draw(4, np.random.default_rng(8), 64)[0]).any()


def test_the_grade_does_not_move_the_random_stream():
    """Else one picture of another grade would change every picture drawn after it."""
    next_numbers = set()
    for grade in range(5):
        rng = np.random.default_rng(3)
        fundus.draw(grade, rng, 32)
        next_numbers.add(int(rng.integers(2**60)))
    assert len(next_numbers) == 1


@pytest.mark.parametrize("grade", [-1, 5, 1.5, "2"])
def test_a_grade_that_does_not_exist_is_refused(grade):
    with pytest.raises(ValueError, match="there is no grade"):
        fundus.draw(grade, np.random.default_rng(0), 32)


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_without_lesions_it_is_the_healthy_picture_and_differs_only_where_lesions_are(grade):
    for seed in range(5):
        healthy = healthy_image(seed)
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
    areas = []
    for grade in range(5):
        areas.append(np.mean([fundus.draw(grade, rng, 64)[1].mean() for _ in range(25)]))
    assert areas[0] == 0
    for less, more in zip(areas[:-1], areas[1:], strict=True):
        assert more > 1.1 * less, areas


def test_it_looks_like_a_fundus_photograph():
    for seed in range(20):
        image = healthy_image(seed).astype(float)
        # black around the field of view
        assert image[:4, :4].max() < 30 and image[-4:, -4:].max() < 30
        red, green, blue = image[32:96, 32:96].mean(axis=(0, 1))
        assert red > green > blue
        # one side has the optic disc, the brightest thing in the picture
        left = image[48:80, 8:60, 1].max()
        right = image[48:80, 68:120, 1].max()
        assert abs(left - right) > 5


def test_left_and_right_eyes_are_drawn():
    disc_on_the_right = 0
    for seed in range(60):
        green = healthy_image(seed, 64)[24:40, :, 1]
        if green[:, 34:].max() > green[:, :30].max():
            disc_on_the_right += 1
    assert 15 < disc_on_the_right < 45


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
def test_colour_thumbnails_do_not_tell_the_grade(count, size):
    """8 x 8 pixels are too few to see a lesion: who can tell the grade there has seen something
    else that should not be there."""
    images, grades = drawn_set(count, seed=1, image_size=size)
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
    """Trained on the drawn set, drcnn tells the grades; without lesions, it can only guess."""
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
        return metrics.auc(1 - model.predict(network, images), grades > 0)

    assert auc(lesions=True) >= 0.95
    assert abs(auc(lesions=False) - 0.5) <= 0.1
