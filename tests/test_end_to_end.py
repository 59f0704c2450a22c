"""The demo as its user runs it: real processes, real training, tiny images."""

import re

import keras
import numpy as np
import pytest
from conftest import averaged, read_weights, rows_of, same_bits, start_server

from common import files
from federation.state import HISTORY_COLUMNS
from reporting import card as cards

SIZES = {"client001": 8, "client002": 10, "client003": 12}


def take_part(start, site, *flags):
    server, address = start_server(start, site, "--image-size", "32", *flags)
    clients = [
        start("todoClient.py", "--name", name, "--server", address, "--threads", "1", cwd=site)
        for name in SIZES
    ]
    assert [process.wait(400) for process in [server, *clients]] == [0, 0, 0, 0], server.output
    return [server, *clients]


def test_the_demo(start, site):
    processes = take_part(start, site, "--rounds", "2")
    assert "has not said" not in processes[0].output  # each client told its last word
    history = rows_of(site / "server" / "history.csv")
    assert list(history[0]) == list(HISTORY_COLUMNS)
    counted = [[row[name] for name in ("round", "clients", "num_examples")] for row in history]
    assert counted == [["1", "3", "30"], ["2", "3", "30"]]
    # FedAvg of the three uploads, by hand
    uploads = []
    for name, size in SIZES.items():
        own = site / name / "client_weights.h5"
        assert own.read_bytes() == (site / "server" / name / own.name).read_bytes()
        trained = rows_of(site / name / "history.csv")
        assert [row["num_examples"] for row in trained] == [str(size)] * 2
        uploads.append((name, size, read_weights(own)))
    result = site / "server" / "server_weight.h5"
    assert same_bits(read_weights(result), averaged(uploads))
    # its card, which each client takes home with it
    card = cards.read(result)
    assert (card["round"], card["clients"]) == (2, SIZES)
    assert [cards.read(site / name / "server_weight.h5") for name in SIZES] == [card] * 3
    assert cards.read(site / "server" / "best_weight.h5")["round"] in (1, 2)
    # plain Keras loads it
    loaded = keras.models.load_model(result).get_weights()
    assert all(np.isfinite(weight).all() for weight in loaded)
    # what a person reads: no line of a library, none without its author
    for process in processes:
        authors = [re.match(r"[-\d]{10} [:\d]{8} (\w+): ", line) for line in process.lines]
        assert all(each and each[1] in ("server", *SIZES) for each in authors), process.output


@pytest.mark.slow
def test_twice_the_same_run_is_the_same_bits(start, site):
    digests = []
    for seed in ("0", "0", "1"):
        take_part(start, site, "--rounds", "3", "--fresh", "--seed", seed)
        digests.append(files.sha256_of(site / "server" / "server_weight.h5"))
    assert digests[0] == digests[1] != digests[2]
