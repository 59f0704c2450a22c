"""splits: whole patients on one side, published parts kept, hospitals as unequal as wanted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preparation import splits
from preparation.datasets import Photo


def make_photos(counts, part=""):
    """Photos with `counts[grade]` images of each grade, each of another patient, without files."""
    grades = np.repeat(range(5), counts).tolist()
    return [Photo(None, grade, f"{part} {i}", part, f"{i:05d}") for i, grade in enumerate(grades)]


def grades_of(photos):
    return [sum(photo.grade == grade for photo in photos) for grade in range(5)]


def rng():
    return np.random.default_rng(0)


def photo(name, patient, part=""):
    return Photo(None, 1, patient, part, name)


def test_a_patient_of_two_parts_is_trained_on_and_the_test_part_is_left_alone():
    photos = [photo("a", "0", "train"), photo("b", "1", "train"), photo("c", "1", "val")]
    photos += [photo("d", "2", "val"), photo("e", "3", "test"), photo("f", "0", "test")]
    settled, sentences = splits.settle_parts(photos, None)
    train, val = splits.choose_validation(settled, False, rng())
    assert [each.name for each in train] == ["a", "b", "c", "f"]
    assert [each.name for each in val] == ["d"]
    assert "in two parts, training and another: 2; their images in the other, 2" in sentences[0]
    assert "1 images of the published test part are left alone" in sentences[1]


@pytest.mark.parametrize("val_part, parts", [
    (None, ["train", "val"]),  # of two parts, the one that is not trained on validates
    (0.2, ["train"]),  # whatever is held out, nothing of the test part is trained on
    (1, ["train", "test"]),
])  # fmt: skip
def test_without_a_validation_part_the_test_part_validates(val_part, parts):
    photos = [photo("a", "0", "train"), photo("b", "1", "test")]
    settled, _ = splits.settle_parts(photos, val_part)
    assert [each.part for each in settled] == parts


def test_the_patients_of_copies_are_made_one():
    photos = [photo(name, patient) for name, patient in zip("abcdef", "001123", strict=True)]
    joined, copies = splits.join_identical(photos, ["u", "x", "x", "y", "y", "z"], bool)
    assert [[each.name for each in same] for same in copies] == [["b", "c"], ["d", "e"]]
    assert len({each.patient for each in joined[:5]}) == 1 and joined[5].patient == "3"


def test_balanced_is_the_thesis_draw_from_all_parts_of_ddr():
    photos = make_photos([3000, 630, 4477, 236, 913], part="train")
    photos += make_photos([3266, 0, 0, 0, 0], part="test")
    train, val = splits.choose_validation(photos, True, rng())
    assert (len(train), len(val)) == (10_000, 2_522)
    assert grades_of(train)[0] == 5_060 and sum(grades_of(train)[1:]) == 4_940


def test_the_shared_images_have_the_grades_proportions():
    clients = splits.split(make_photos([450, 45, 324, 18, 63]), "noniid", 3, rng(), share=100)
    shared = set.intersection(*(set(client) for client in clients))
    assert len(shared) == 100
    assert np.abs(np.array(grades_of(shared)) - [50, 5, 36, 2, 7]).max() <= 1


def test_noniid_is_the_thesis_table():
    clients = splits.split(make_photos([5060, 500, 3500, 240, 700]), "noniid", 3, rng())
    assert [grades_of(client)[0] for client in clients] == [3000, 1000, 1060]
    assert [sum(grades_of(client)[1:]) for client in clients] == [500, 300, 4140]


def test_a_small_alpha_is_more_unequal_than_a_large_one():
    photos = make_photos([450, 45, 324, 18, 63])

    def spread(alpha):
        clients = splits.split(photos, "dirichlet", 4, rng(), alpha=alpha)
        assert sum(map(len, clients)) == 900 and min(map(len, clients)) >= 10
        return np.std([grades_of(client)[0] / len(client) for client in clients])

    assert spread(0.1) > 3 * spread(100)


@pytest.mark.parametrize("counts, arguments, words", [
    ([5, 0, 0, 0, 0], ("iid", 3, 1, 4), "5 training images are too few for 4 shared ones and 3"),
    ([0, 0, 3, 0, 0], ("noniid", 3), "fewer than 1 of 3 images: take fewer clients"),
    ([30, 0, 0, 0, 0], ("dirichlet", 3, 0.001), "take fewer clients or a larger --alpha"),
])  # fmt: skip
def test_too_few_images_are_refused(counts, arguments, words):
    how, num_clients, *others = arguments
    with pytest.raises(ValueError, match=words):
        splits.split(make_photos(counts), how, num_clients, rng(), *others)


EYES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=30, max_size=60)


@settings(max_examples=60, deadline=None)
@given(EYES, st.sampled_from(["iid", "noniid", "dirichlet"]), st.integers(0, 9))
def test_a_patient_is_on_one_side_and_at_one_hospital(patients, how, share):
    """Whatever the split; only the patients of shared images are at all hospitals."""
    photos = [
        Photo(None, grade, f"patient {number}", "", f"{number}_{eye}")
        for number, grades in enumerate(patients)
        for eye, grade in enumerate(grades)
    ]
    train, val = splits.choose_validation(photos, False, rng())
    assert len(train) + len(val) == len(photos) and abs(len(val) - 0.2 * len(photos)) <= 3
    try:
        clients = splits.split(train, how, 3, rng(), alpha=1.0, share=share)
    except ValueError as error:
        assert "take fewer clients" in str(error)
        return
    assert clients == splits.split(train, how, 3, rng(), alpha=1.0, share=share)
    at = [{photo.patient for photo in client} for client in clients]
    shared = at[0] & at[1] & at[2]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert at[one] & at[other] == shared
    assert not set().union(*at) & {photo.patient for photo in val}
    for client, own in zip(clients, at, strict=True):  # all photos of a patient, and each once
        assert sorted(client) == sorted(photo for photo in train if photo.patient in own)
    assert set().union(*clients) == set(train)
    assert abs(sum(photo.patient in shared for photo in train) - share) <= 3 * max(1, share)


def test_a_patient_counts_by_the_worst_grade():
    photos = [
        Photo(None, 4 if eye and number < 30 else 0, f"{number}", "", f"{number}_{eye}")
        for number in range(60)
        for eye in range(2)
    ]
    clients = splits.split(photos, "iid", 3, rng())
    assert [grades_of(client) for client in clients] == [[30, 0, 0, 0, 10]] * 3
    train, val = splits.choose_validation(photos, False, rng())
    assert grades_of(val) == [18, 0, 0, 0, 6] and len(train) == 96


@pytest.mark.parametrize("val_part, held_out", [
    (None, [10, 2, 4, 2, 2]), (0.0, [0] * 5), (0.5, [25, 5, 10, 5, 5]), (1.0, [50, 10, 20, 10, 10]),
])  # fmt: skip
def test_the_part_to_validate_on_is_what_was_meant(val_part, held_out):
    # what is asked for is held out whatever is published
    photos = make_photos([50, 10, 20, 10, 10], part="" if val_part is None else "train")
    train, val = splits.choose_validation(photos, False, rng(), val_part)
    assert grades_of(val) == held_out and len(train) == 100 - sum(held_out)


def test_none_of_the_published_training_part_is_held_out_unasked():
    photos = make_photos([50, 10, 20, 10, 10], part="train")
    with pytest.raises(ValueError, match="100 images to train on and 0 to validate.*--val-part"):
        splits.choose_validation(photos, False, rng())
