"""The demo as its user runs it: real processes, real training, tiny images."""

import csv
import hashlib
import json
import re

import numpy as np
import pytest
from conftest import averaged, read_weights, same_bits, start_server

from federation import rounds
from reporting import card as cards

CLIENTS = ["client001", "client002", "client003"]


def take_part(start, site, rounds_, *arguments):
    server, address = start_server(
        start, site, "--rounds", rounds_, "--image-size", "32", *arguments
    )
    clients = [
        start("todoClient.py", "--name", name, "--server", address, "--threads", "1", cwd=site)
        for name in CLIENTS
    ]
    assert [process.wait(400) for process in [server, *clients]] == [0, 0, 0, 0], server.output
    return server, clients


def test_the_demo(start, site):
    server, clients = take_part(start, site, 2)
    # the files of DESIGN 3
    history = list(csv.DictReader((site / "server" / "history.csv").open()))
    metrics = "loss,accuracy,auc,sensitivity,specificity"
    columns = f"round,{metrics},clients,missing,num_examples,seconds"
    assert list(history[0]) == columns.split(",")
    assert [
        (row["round"], row["clients"], row["missing"], row["num_examples"]) for row in history
    ] == [("1", "3", "", "30"), ("2", "3", "", "30")]
    state = json.loads((site / "server" / "state.json").read_text())
    assert (
        state["round"] == 3
        and state["clients"] == CLIENTS
        and list(history[0]) == rounds.HISTORY_COLUMNS
    )
    uploads = []
    for name, size in zip(CLIENTS, (8, 10, 12), strict=True):
        assert (site / name / "client_weights.h5").read_bytes() == (
            site / "server" / name / "client_weights.h5"
        ).read_bytes()
        own = list(csv.DictReader((site / name / "history.csv").open()))
        trained = [(row["round"], row["epoch"], row["num_examples"]) for row in own]
        assert trained == [("1", "1", str(size)), ("2", "1", str(size))]
        uploads.append((name, size, read_weights(site / "server" / name / "client_weights.h5")))
    # FedAvg of the three uploads, by hand
    merged = read_weights(site / "server" / "server_weight.h5")
    assert same_bits(merged, averaged(uploads))
    assert not same_bits(merged, uploads[0][2])
    assert (
        state["weights_sha256"]
        == hashlib.sha256((site / "server" / "server_weight.h5").read_bytes()).hexdigest()
    )
    # the model card, the best round, and what each client takes home
    card = json.loads((site / "server" / "server_weight.json").read_text())
    assert (card["weights_sha256"], card["round"]) == (state["weights_sha256"], 2)
    assert card["clients"] == {"client001": 8, "client002": 10, "client003": 12}
    best = cards.read(site / "server" / "best_weight.h5")
    assert state["best"] == {
        "round": best["round"],
        "auc": best["choosing_auc"],
        "sha256": best["weights_sha256"],
    }
    for name in CLIENTS:
        assert cards.read(site / name / "server_weight.h5") == card
    for process in clients:
        assert "with its model card client00" in process.lines[-1], process.output
    # and plain Keras loads it
    import model

    model.configure(0, 1)
    network = model.build("drcnn", 32, seed=9)
    network.load_weights(str(site / "server" / "server_weight.h5"))
    assert all(np.isfinite(weight).all() for weight in network.get_weights())
    # what a person reads: no line of a library, none without its author
    for process in [server, *clients]:
        authors = [re.match(r"[-\d]{10} [:\d]{8} (\w+): ", line) for line in process.lines]
        assert all(each and each[1] in ("server", *CLIENTS) for each in authors), process.output
    assert "round 2/2: loss" in server.output and "waiting for" in server.output


@pytest.mark.slow
def test_twice_the_same_run_is_the_same_bits(start, site):
    digests = []
    for _ in range(2):
        take_part(start, site, 3, "--fresh")
        digests.append((site / "server" / "server_weight.h5").read_bytes())
    assert digests[0] == digests[1]
    take_part(start, site, 3, "--fresh", "--seed", "1")
    assert (site / "server" / "server_weight.h5").read_bytes() != digests[0]
