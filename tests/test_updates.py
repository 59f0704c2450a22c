"""Whose update pulls where, of a real training.

The formula is `test_weights.py`; where the numbers go and what is said of them, `test_rounds.py`.
"""

import shutil

import numpy as np
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


def test_exchanged_labels_pull_against_the_others_and_moved_statistics_are_no_update(tmp_path):
    model.configure(0, 1)
    network = model.build("drcnn", SIZE)
    merged, fetched = tmp_path / "server_weight.h5", tmp_path / "fetched.h5"
    model.save(network, merged)
    layout, trainable = weights.Layout(merged), model.trainable(network)
    uploads = [tmp_path / f"{number}.h5" for number in range(3)]
    hospitals = [batches_of(0), batches_of(1), batches_of(2, exchanged=True)]

    def compare():
        _, products = weights.fedavg(uploads, [IMAGES] * 3, layout, merged, trainable)
        return weights.compare_updates(products, [IMAGES] * 3)

    for round_number in (1, 2):
        shutil.copyfile(merged, fetched)
        for batches, upload in zip(hospitals, uploads, strict=True):
            model.load(network, merged)
            model.train(network, batches, round_number, 2, report=lambda row: None)
            weights.write_tensors(upload, layout, model.tensors(network))
        updates = compare()
        first, second, exchanged = (update["update_cosine"] for update in updates)
        assert exchanged < 0 and exchanged < min(first, second) - 0.1
        assert all(0.5 < update["update_length"] < 2 for update in updates)
    # one that trained nothing: only the statistics of BatchNormalization have moved
    shutil.copyfile(fetched, merged)
    pairs = zip(read_weights(fetched), read_weights(uploads[1]), trainable, strict=True)
    untrained = [before if is_trained else after for before, after, is_trained in pairs]
    weights.write_tensors(uploads[1], layout, untrained)
    assert compare()[1] == {"update_length": 0, "update_cosine": None}
