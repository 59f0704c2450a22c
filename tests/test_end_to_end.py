"""The demo as its user runs it: real processes, real training, tiny images."""

import csv
import re

import numpy as np
import pytest
from conftest import averaged, read_weights, same_bits, start_server

import model
from common import files
from federation import status
from federation.state import HISTORY_COLUMNS, RunState
from reporting import card as cards

SIZES = {"client001": 8, "client002": 10, "client003": 12}


def take_part(start, site, rounds, *arguments):
    flags = ["--rounds", rounds, "--image-size", "32", *arguments]
    server, address = start_server(start, site, *flags)
    clients = [
        start("todoClient.py", "--name", name, "--server", address, "--threads", "1", cwd=site)
        for name in SIZES
    ]
    assert [process.wait(400) for process in [server, *clients]] == [0, 0, 0, 0], server.output
    return server, clients


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_demo(start, site):
    server, clients = take_part(start, site, 2)
    assert "has not said" not in server.output  # each client told its last word
    state = RunState.load(site / "server" / "state.json")
    assert state.is_over and state.clients == list(SIZES)
    history = rows_of(site / "server" / "history.csv")
    assert tuple(history[0]) == tuple(HISTORY_COLUMNS)
    counted = [[row[name] for name in ("round", "clients", "num_examples")] for row in history]
    assert counted == [["1", "3", "30"], ["2", "3", "30"]]
    # FedAvg of the three uploads, by hand
    uploads = []
    for name, size in SIZES.items():
        own = site / name / "client_weights.h5"
        kept = site / "server" / name / "client_weights.h5"
        assert own.read_bytes() == kept.read_bytes()
        trained = [
            (row["round"], row["num_examples"]) for row in rows_of(site / name / "history.csv")
        ]
        assert trained == [("1", str(size)), ("2", str(size))]
        uploads.append((name, size, read_weights(kept)))
    result = site / "server" / "server_weight.h5"
    assert same_bits(read_weights(result), averaged(uploads))
    assert not same_bits(read_weights(result), uploads[0][2])
    assert state.weights_sha256 == files.sha256_of(result)
    # the model card, the best round, and what each client takes home
    card = cards.read(result)
    assert (card["weights_sha256"], card["round"], card["clients"]) == (
        state.weights_sha256,
        2,
        SIZES,
    )
    best = cards.read(site / "server" / "best_weight.h5")
    assert (best["round"], best["choosing_auc"]) == (state.best["round"], state.best["auc"])
    for name in SIZES:
        assert cards.read(site / name / "server_weight.h5") == card
    found, _ = status.read(site / "server" / "status.json")
    assert [client["is_done"] for client in found["clients"]] == [True] * 3
    # plain Keras loads it
    model.configure(0, 1)
    network = model.build("drcnn", 32, seed=9)
    network.load_weights(str(result))
    assert all(np.isfinite(weight).all() for weight in network.get_weights())
    # what a person reads: no line of a library, none without its author
    for process in [server, *clients]:
        authors = [re.match(r"[-\d]{10} [:\d]{8} (\w+): ", line) for line in process.lines]
        assert all(each and each[1] in ("server", *SIZES) for each in authors), process.output


@pytest.mark.slow
def test_twice_the_same_run_is_the_same_bits(start, site):
    digests = []
    for flags in ([], [], ["--seed", "1"]):
        take_part(start, site, 3, "--fresh", *flags)
        digests.append(files.sha256_of(site / "server" / "server_weight.h5"))
    assert digests[0] == digests[1] != digests[2]
