"""central.py: the same start as the server's, the same training as a client's, the same history."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import read_weights, rows_of, same_bits

import central
import data
import model
import predict
import report
import todoClient
import todoServer
from common import files
from federation import rounds, weights
from reporting import card as cards
from reporting import metrics


@pytest.fixture
def here(site, monkeypatch):
    """In a project folder with a tiny data set and its train_set.pkl."""
    workers = [data.read_index(site / "index" / f"worker{k}.pkl") for k in (1, 2, 3)]
    data.write_index(site / "index" / "train_set.pkl", sum(workers, []))
    monkeypatch.chdir(site)
    return site


@pytest.fixture
def trained(monkeypatch):
    """What is asked of model.train: (images, round, epochs) of each call, in place of training."""
    calls = []

    def train(network, batches, round_number, epochs, **more):
        calls.append((len(batches.images), round_number, epochs))

    monkeypatch.setattr(model, "train", train)
    return calls


def run(*flags):
    return central.main(["--image-size", "16", "--rounds", "2", *flags])


def server_begins(*flags):
    """(its flags, its Evaluator, its state) of a server that begins a run in this folder."""
    Path("server").mkdir(exist_ok=True)
    arguments = todoServer.parse(["--image-size", "16", *flags])
    evaluator = todoServer.Evaluator(arguments)
    return arguments, evaluator, todoServer.begin(arguments, evaluator)


def test_it_starts_from_the_servers_weights(here, trained):
    server_begins("--seed", "7")
    of_server = files.sha256_of("server/server_weight.h5")
    assert run("--seed", "7") == 0
    assert files.sha256_of("central/central_weight.h5") == of_server


@pytest.mark.parametrize("arch", ["drcnn", "lite0"])
def test_it_trains_as_a_client_trains(here, arch):
    """FedAvg with one client and central training are the same computation, to the bit."""
    freezes_base = arch == "lite0"
    flags = ["--epochs", "2", "--batch-size", "4", "--learning-rate", "0.01"]
    own = ["--arch", arch, "--weights", "none", "--out", "client001"]
    own += ["--freeze-base", "--no-augmentation"] if freezes_base else []
    assert run(*flags, *own, "--index", "index/worker1.pkl") == 0
    (here / "federated").mkdir()
    name = ["--name", "client001", "--client-dir", "federated"]
    client = todoClient.Site(todoClient.parse([*name, *flags]))
    model.configure(0)
    client.begin_run("r")
    model.save(model.build(arch, 16, 0), client.weights_path)
    client.layout = weights.Layout(client.weights_path)
    task = {"run": "r", "rounds": 2, "arch": arch, "image_size": 16, "freeze_base": freezes_base}
    for number in (1, 2):
        todoClient.train(client, {**todoClient.TASK_OF_2020, **task, "round": number})
    # by their numbers: the files of a frozen network are laid out otherwise
    assert same_bits(read_weights("client001/central_weight.h5"), read_weights(client.weights_path))
    kept = [(here / folder / "features.npz").exists() for folder in ("client001", "federated")]
    assert kept == [freezes_base] * 2


def test_history_and_card_say_what_the_weights_do(here):
    assert run() == 0
    rows = rows_of("central/history.csv")
    assert list(rows[0]) == rounds.HISTORY_COLUMNS
    assert [(row["round"], row["num_examples"]) for row in rows] == [("1", "30"), ("2", "30")]
    val = data.read_index("index/val_set.pkl")
    network = model.build("drcnn", 16)
    model.load(network, "central/central_weight.h5")
    measured = metrics.scores(model.predict(network, data.load_images(val, 16)), data.healthy(val))
    assert {name: float(rows[-1][name]) for name in measured} == pytest.approx(measured, abs=1e-6)
    card = cards.read("central/central_weight.h5")
    assert card["clients"] == {"central": 30}
    assert [row["round"] for row in card["by_round"]] == [1, 2]


def test_a_server_keeps_what_a_frozen_base_makes_of_its_images(here, monkeypatch):
    """Also for its next run: --fresh leaves the file, which is as good for that."""
    measured = []
    for _ in range(2):
        # the second moves what lies there aside
        _, evaluator, state = server_begins("--arch", "lite0", "--weights", "none")
        evaluator.open(state.changed(freeze_base=True))
        measured.append(evaluator.evaluate())
        monkeypatch.setattr(model, "features", None)  # from here on none are computed
    assert (here / "server" / "old-1" / "state.json").exists()
    assert measured[0] == measured[1]
    val = evaluator.validation
    answers = model.predict(evaluator.network, data.load_images(val, 16))
    assert measured[0] == pytest.approx(metrics.scores(answers, data.healthy(val)), abs=1e-6)


def test_the_best_round_is_the_one_that_those_who_choose_find_best(here, monkeypatch):
    """Of those who are scored it would be another."""
    _, evaluator, state = server_begins()
    evaluator.open(state)
    val = evaluator.validation
    right = data.healthy(val)
    choosing = metrics.choosing_half([each["label"] for each in val], data.patients(val))
    for number, is_right in enumerate((~choosing, choosing, ~choosing), start=1):
        answers = np.where(is_right, right, 1 - right)
        monkeypatch.setattr(model, "predict", lambda *_, answers=answers: answers)
        row = {"round": number, "clients": 3, "num_examples": 30, **evaluator.evaluate()}
        best, _ = evaluator.publish_result(state, row)
        state = state.changed(best=best)
    assert state.best["round"] == cards.read("server/best_weight.h5")["round"] == 2


def test_a_merged_model_that_answers_nan_is_no_model(here, monkeypatch, capsys):
    """Said with whose update is why; never the best, never a verdict, and nan is in no file."""
    said = []
    monkeypatch.setattr(todoServer, "say", said.append)
    arguments, evaluator, state = server_begins("--rounds", "1")
    uploads = {}
    for client in state.clients:
        path = here / "server" / client / "client_weights.h5"
        path.parent.mkdir()
        shutil.copy("server/server_weight.h5", path)
        if client == "client002":
            with h5py.File(path, "r+") as file:
                for _, name, dataset in weights.datasets(file):
                    if name.endswith("norm5/moving_variance"):
                        dataset[...] = -100
        digest = files.sha256_of(path)
        uploads[client] = [{"num_examples": 10, "sha256": digest, "file_sha256": digest}]
    state = state.changed(uploads=uploads, frozen=state.clients)
    todoServer.open_rounds(arguments, state, evaluator)
    line = next(line for line in said if line.startswith("round 1/1"))
    assert "the merged model answers NaN for 8 of 8 images" in line and "client001" not in line
    assert "update of client002 holds a negative moving variance" in line
    assert not (here / "server" / "best_weight.h5").exists()
    for path in (here / "server").glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # called for NaN
    [row] = rows_of("server/history.csv")
    assert row["round"] == "1" and row["auc"] == row["loss"] == ""
    assert predict.main(["preprocessed/0003.png", "--threshold", "0.5"]) == 1
    assert report.main([]) == 1
    assert capsys.readouterr().err.count("must not be used: it answers NaN for 8 of 8 images") == 2


def test_a_hospital_alone_is_scored_now_and_then(here, trained):
    own = ["--index", "index/worker2.pkl", "--out", "alone"]
    assert run("--rounds", "5", "--score-every", "2", *own) == 0
    assert trained == [(10, number, 1) for number in range(1, 6)]
    assert [row["round"] for row in rows_of("alone/history.csv")] == ["2", "4", "5"]


@pytest.mark.parametrize(
    "flags, calls",
    [
        (["--like"], [(30, 1, 1), (30, 2, 1)]),
        (["--seed", "6", "--fine-tune"], [(30, 3, 2)]),  # whatever the seed is
    ],
)
def test_settings_come_from_a_card(here, trained, flags, calls):
    """As in that run; or on from its weights, and at the learning rate of its next round."""
    assert run("--seed", "5") == 0
    assert central.main([*flags, "central/central_weight.h5", "--out", "other"]) == 0
    made = [files.sha256_of(f"{name}/central_weight.h5") for name in ("central", "other")]
    assert made[0] == made[1]
    assert trained[2:] == calls


def test_what_cannot_be_is_one_sentence(here, trained, capsys):
    assert run("--freeze-base") == 1
    assert "--freeze-base and ImageNet weights are for --arch vgg16" in capsys.readouterr().err
    assert run() == 0
    assert run("--weights", "central/central_weight.h5", "--out", "tuned") == 0
    # it began from a file, which its card can only name
    capsys.readouterr()
    assert run("--like", "tuned/central_weight.h5", "--out", "alone/client001") == 1
    said = capsys.readouterr().err
    # in the name of its rounds: by it run_local.sh finds its last words in the log
    assert " alone/client001: error: " in said and "name it with --weights" in said
    with pytest.raises(SystemExit):
        run("--fine-tune", "central/central_weight.h5", "--weights", "none")
    assert "leave out --weights" in capsys.readouterr().err
