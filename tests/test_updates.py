"""Whose update pulls where, of a real training: what `weights.compare_updates` says of it.

Its formula, with numbers by hand, is in `test_weights.py`; where the numbers go and what is said of
them, in `test_rounds.py`.
"""

import shutil

import numpy as np
import pytest
from standin import read_weights

import data
import model
from federation import weights

SIZE = 32  # pixels a side
IMAGES = 48  # of each hospital


def batches_of(number, exchanged=False):
    """Images of noise, with a bright spot somewhere in those with DR."""
    rng = np.random.default_rng(number)
    healthy = np.arange(IMAGES) % 2
    images = rng.integers(60, 120, (IMAGES, SIZE, SIZE, 3), np.uint8)
    for number in np.flatnonzero(healthy == 0):
        row, column = rng.integers(0, SIZE - 4, 2)
        images[number, row : row + 4, column : column + 4] = 250
    labels = 1 - healthy if exchanged else healthy
    return data.TrainingBatches(images, labels.astype(np.float32), 8, 0, f"client{number}")


class Federation:
    """Three rounds of three hospitals, the last of which has exchanged the labels.

    updates  of each round, as `compare_updates` says
    fetched  what the last round began with, `uploads` what was sent in it
    """

    def __init__(self, folder):
        model.configure(0, 1)
        network = model.build("drcnn", SIZE)
        merged = folder / "server_weight.h5"
        model.save(network, merged)
        self.layout = weights.Layout(merged)
        self.trainable = model.trainable(network)
        self.fetched = folder / "fetched.h5"
        self.uploads = [folder / f"{number}.h5" for number in range(3)]
        self.updates = []
        hospitals = [batches_of(0), batches_of(1), batches_of(2, exchanged=True)]
        for round_number in (1, 2, 3):
            shutil.copyfile(merged, self.fetched)
            for batches, upload in zip(hospitals, self.uploads, strict=True):
                model.load(network, merged)
                model.train(network, batches, round_number, 2, report=lambda row: None)
                weights.write_tensors(upload, self.layout, model.tensors(network))
            self.updates.append(self.compare(merged, self.uploads))

    def compare(self, merged, uploads):
        sizes = [IMAGES] * len(uploads)
        _, products = weights.fedavg(uploads, sizes, self.layout, merged, self.trainable)
        return weights.compare_updates(products, sizes)

    def with_another(self, folder, change):
        """What is said of the last round where the second hospital sends other numbers.

        change  change(fetched, trained, is_trainable) -> what it sends of each tensor
        """
        merged = shutil.copyfile(self.fetched, folder / "merged.h5")
        tensors = zip(
            read_weights(self.fetched), read_weights(self.uploads[1]), self.trainable, strict=True
        )
        other = folder / "other.h5"
        weights.write_tensors(other, self.layout, [change(*each) for each in tensors])
        return self.compare(merged, [self.uploads[0], other])


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("federation"))


def test_a_hospital_with_exchanged_labels_pulls_against_the_others(federation):
    for updates in federation.updates:
        first, second, exchanged = (update["update_cosine"] for update in updates)
        assert exchanged < 0 and exchanged < min(first, second) - 0.1
        assert all(0.5 < update["update_length"] < 2 for update in updates)


def test_one_scaled_by_1000_is_so_much_longer_and_points_where_it_did(federation, tmp_path):
    def scaled(fetched, trained, is_trainable):
        return fetched + 1000 * (trained - fetched)

    as_it_was = federation.with_another(tmp_path, lambda fetched, trained, _: trained)
    updates = federation.with_another(tmp_path, scaled)
    assert updates[1]["update_length"] == pytest.approx(
        1000 * as_it_was[1]["update_length"] / as_it_was[0]["update_length"], rel=1e-3
    )
    assert updates[1]["update_cosine"] == pytest.approx(as_it_was[1]["update_cosine"], abs=1e-3)


def test_one_that_trains_nothing_has_no_length_though_its_statistics_moved(federation, tmp_path):
    assert not all(federation.trainable)

    def untrained(fetched, trained, is_trainable):
        return fetched if is_trainable else trained

    updates = federation.with_another(tmp_path, untrained)
    assert updates[1] == {"update_length": 0, "update_cosine": None}
    assert updates[0] == {
        "update_length": 1,
        "update_cosine": None,
    }  # the only one with a direction
