"""central.py: the same start as the server's, the same training as a client's, the same history."""

import csv

import pytest

import central
import data
import model
import todoClient
import todoServer
from common import files
from federation import rounds


@pytest.fixture
def here(site, monkeypatch):
    """In a project folder with a tiny data set and its train_set.pkl."""
    workers = [data.read_index(site / "index" / f"worker{k}.pkl") for k in (1, 2, 3)]
    data.write_index(site / "index" / "train_set.pkl", sum(workers, []))
    monkeypatch.chdir(site)
    return site


def run(*flags):
    return central.main(["--image-size", "16", "--rounds", "2", *flags])


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_starts_from_the_servers_weights(here, monkeypatch):
    monkeypatch.setattr(model, "train", lambda *arguments, **more: [])
    assert run("--seed", "7") == 0
    (here / "server").mkdir()
    todoServer.begin(todoServer.parse(["--image-size", "16", "--seed", "7"]))
    assert files.sha256_of("central/central_weight.h5") == files.sha256_of(
        "server/server_weight.h5"
    )
    assert run("--seed", "8") == 0
    assert files.sha256_of("central/central_weight.h5") != files.sha256_of(
        "server/server_weight.h5"
    )
    assert run("--seed", "8", "--weights", "server/server_weight.h5") == 0
    assert files.sha256_of("central/central_weight.h5") == files.sha256_of(
        "server/server_weight.h5"
    )


def test_it_trains_as_a_client_trains(here):
    """FedAvg with one client and central training are the same computation, to the bit."""
    assert (
        run(
            "--epochs",
            "2",
            "--batch-size",
            "4",
            "--out",
            "client001",
            "--index",
            "index/worker1.pkl",
        )
        == 0
    )
    flags = [
        "--name",
        "client001",
        "--client-dir",
        "federated",
        "--epochs",
        "2",
        "--batch-size",
        "4",
    ]
    (here / "federated").mkdir()
    client = todoClient.Site(todoClient.parse(flags))
    model.configure(0)
    model.save(model.build("drcnn", 16, 0), client.weights)
    for number in (1, 2):
        task = {"run": "r", "round": number, "rounds": 2, "arch": "drcnn", "image_size": 16}
        todoClient.train(client, {**todoClient.SEED_TASK, **task})
    assert files.sha256_of("client001/central_weight.h5") == files.sha256_of(client.weights)


def test_the_history_is_the_servers_kind_and_says_what_the_weights_do(here):
    assert run() == 0
    rows = history(here / "central")
    assert list(rows[0]) == rounds.HISTORY_COLUMNS
    assert [
        (row["round"], row["clients"], row["missing"], row["num_examples"]) for row in rows
    ] == [("1", "1", "", "30"), ("2", "1", "", "30")]
    val = data.read_index("index/val_set.pkl")
    network = model.build("drcnn", 16)
    model.load(network, "central/central_weight.h5")
    for name, value in model.evaluate(
        network, data.load_images(val, 16), data.healthy(val)
    ).items():
        assert float(rows[-1][name]) == pytest.approx(value, abs=1e-6), name


def test_one_workers_index_is_a_client_alone(here, monkeypatch):
    monkeypatch.setattr(
        model,
        "train",
        lambda network, batches, *more, **names: trained_on.append(len(batches.images)),
    )
    trained_on = []
    assert run("--index", "index/worker2.pkl", "--out", "alone") == 0
    assert {row["num_examples"] for row in history(here / "alone")} == {"10"} and trained_on == [
        10,
        10,
    ]


def test_freezing_is_for_vgg16(here, capsys):
    assert run("--freeze-base") == 1
    assert (
        "--freeze-base and ImageNet weights are for --arch vgg16 and lite0"
        in capsys.readouterr().err
    )


def test_a_missing_index_is_one_sentence(here, capsys):
    assert run("--index", "index/worker9.pkl") == 1
    error = capsys.readouterr().err
    assert " central: error: index/worker9.pkl is missing" in error and error.count("\n") == 1
