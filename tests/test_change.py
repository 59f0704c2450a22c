"""docs/change.md: each recipe is applied to a copy of the project and does what it says."""

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, copy_of, make_data, start_server
from eyes import eye

from reporting.metrics import TASKS

TEXT = (ROOT / "docs" / "change.md").read_text(encoding="utf-8")
ENDS_S = 400


def block(heading, kind):
    """The text of the block of this kind below a heading: "diff", or "" for commands."""
    part = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = dict(re.findall(r"^```(\w*)\n(.*?)^```$", part, re.M | re.S))
    return found[kind]


def commands_of(heading):
    """The commands below a heading, one a line, as they are given in a project's folder."""
    lines = block(heading, "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


def changed(folder, heading):
    """A copy of the project with the patch of this recipe, to which its context must fit."""
    patch = ["patch", "-p1", "--fuzz=0"]
    subprocess.run(patch, cwd=copy_of(folder), input=block(heading, "diff"), text=True, check=True)
    return folder


def run(folder, *command):
    """What a Python command says in this folder; it ends with 0."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_another_network_is_trained(tmp_path):
    folder = changed(tmp_path / "project", "Another network")
    site = make_data(tmp_path / "site", images=4, clients=1)
    flags = "--arch shallow --image-size 16 --rounds 1 --index index/worker1.pkl"
    run(site, folder / "central.py", *flags.split())
    card = json.loads((site / "central" / "central_weight.json").read_text())
    assert card["arch"] == "shallow" and "shallow 96" in run(folder, "todoServer.py", "--help")


def test_another_disease_has_other_words_everywhere(tmp_path):
    folder = changed(tmp_path / "project", "Another disease")
    source = folder / "DIR"
    source.mkdir()
    rows = ["image,label"]
    for number in range(24):
        eye(grade=2 * (number % 2), seed=number).save(source / f"{number:02}.png")
        rows.append(f"{number:02}.png,{number % 2}")
    (source / "labels.csv").write_text("\n".join(rows))
    [command] = commands_of("Another disease")
    assert "glaucoma" in run(folder, *command, "--val-part", "0.5", "--image-size", "32")
    page = run(folder, "-c", PAGE_OF_ANSWERS)
    assert "Screening for glaucoma" in page and "no glaucoma" in page
    assert not re.search(r"\bDR\b|retinopathy|referable", page)


def test_the_words_of_the_disease_stand_in_one_place():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[cfpr]*/*.py")]:
        nodes = ast.walk(ast.parse(path.read_text()))
        words = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert path.name == "metrics.py" or not words & set(TASKS), path


# The page of a model that knows the grades, and what warns of one that does not.
PAGE_OF_ANSWERS = """
from types import SimpleNamespace

import numpy as np

import data
from report import Model, Run
from reporting import card as cards, metrics
from reporting.page import Page

val = data.read_index("index/val_set.pkl")
grades = np.array([record["label"] for record in val])
state = SimpleNamespace(
    arch="lite0", image_size=32, run="run0", rounds=1, seed=0, weights="none",
    weights_sha256="0", counted={},
)
row = {"round": 1, "clients": 3, "num_examples": 9, "loss": 0.5, "accuracy": 0.5, "auc": 0.5}
def model_of(kind, p_healthy):
    assessed = metrics.assess(p_healthy, val)
    card = cards.make(state, row, cards.read_prepared("index"), "1", assessed)
    return Model(kind, kind, "weights.h5", {**card, "by_round": [cards.round_of(card)]}, p_healthy)
knows, guesses = 0.9 - 0.4 * grades, np.full(len(val), 0.5)
run = Run(model_of("federated", knows), val, cards.read_prepared("index"))
run.others = [model_of("alone", guesses)]
print(Page(run).html(), run.others[0].card["warning"], cards.summary(run.federated.card))
"""


def run_federation(start, folder, server_words, clients):
    """A server's command and a command for each client, to their end. Returns the card."""
    script, *flags = server_words
    server, address = start_server(start, folder, "--rounds", "1", *flags, script=folder / script)
    processes = [server]
    for script, *flags in clients:
        flags += ["--server", address, "--threads", "1"]
        processes.append(start(folder / script, *flags, cwd=folder))
    codes = [process.wait(ENDS_S) for process in processes]
    assert codes == [0] * len(processes), server.output
    return json.loads((folder / "server" / "server_weight.json").read_text())


@pytest.mark.slow
def test_five_clients_take_part(start, tmp_path):
    folder = copy_of(tmp_path / "project")
    prepare, server, client = commands_of("Five clients")
    run(folder, *prepare, *"--num-train 25 --num-val 20 --image-size 32".split())
    names = [f"client{number:03}" for number in range(1, 6)]
    clients = [[name if word == "client005" else word for word in client] for name in names]
    card = run_federation(start, folder, [*server, "--image-size", "32"], clients)
    assert sorted(card["clients"]) == names


@pytest.mark.slow
def test_clients_follow_the_servers_image_size(start, tmp_path):
    folder = copy_of(tmp_path / "project")
    commands = commands_of("Another image size")
    prepare, server = [[word.replace("256", "32") for word in words] for words in commands]
    run(folder, *prepare, *"--num-train 12 --num-val 20".split())
    clients = [["todoClient.py", "--name", f"client00{number}"] for number in (1, 2, 3)]
    card = run_federation(start, folder, server, clients)
    assert card["image_size"] == card["prepared_image_size"] == 32


DISTANCE_FROM_START = """
import numpy as np
import data, model
model.configure(0, 1)
network = model.build("drcnn", 16)
first = network.get_weights()
images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
for model.MU in (0, 100):
    network.set_weights(first)
    model.compiled(network)
    batches = data.TrainingBatches(images, np.arange(8) % 2, 4, 0, "client001")
    for round_number in (1, 2):  # the second with what the first has left behind
        start = [np.array(variable) for variable in network.trainable_variables]
        model.train(network, batches, round_number, 2, report=lambda row: None)
    pairs = zip(start, network.trainable_variables)
    print(sum(np.square(variable - old).sum() for old, variable in pairs))
"""


def test_fedprox_stays_nearer_to_where_the_round_began(tmp_path):
    folder = changed(tmp_path / "project", "FedProx")
    without, with_it = map(float, run(folder, "-c", DISTANCE_FROM_START).split())
    assert 0 < with_it < without / 2


MEDIAN_OF_THREE = """
import sys
from pathlib import Path
sys.path.append("tests")
import numpy as np
from standin import read_weights, write_weights
from federation import weights
paths = [write_weights(Path(f"{number}.h5"), number) for number in range(3)]
layout = weights.Layout(paths[0])
merged = write_weights(Path("merged.h5"), 9)
weights.fedavg(paths, [1, 1, 1_000_000], layout, merged, [True] * len(layout.tensors))
for merged, *three in zip(*map(read_weights, ["merged.h5", *paths])):
    assert np.array_equal(merged, np.median(three, axis=0)), merged
"""


def test_another_average_is_the_one_that_is_published(tmp_path):
    run(changed(tmp_path / "project", "Another average"), "-c", MEDIAN_OF_THREE)
