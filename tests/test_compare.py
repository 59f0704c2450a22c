"""compare.sh: four series, the same task and number of passes, and nothing left behind."""

import csv
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, Started, processes_in, until
from PIL import Image, ImageDraw

FLAGS = (
    "--seed",
    "3",
    "--num-train",
    "60",
    "--num-val",
    "30",
    "--image-size",
    "32",
    "--rounds",
    "2",
)


@pytest.fixture
def compare(tmp_path):
    """compare(flag ...) -> Started, in a copy of the project; it ends with its test."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    for room in ("generated", "common", "federation", "preparation", "reporting"):
        shutil.copytree(ROOT / room, tmp_path / room)
    started = []

    def begin(*flags):
        started.append(Started(["./compare.sh", *flags], tmp_path, {"PYTHON": sys.executable}))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.signal(signal.SIGTERM)
            each.wait()


def three_clients(folder):
    found = [pid for pid, line in processes_in(folder).items() if "todoClient.py" in line]
    return found if len(found) == 3 else None


@pytest.mark.parametrize("flags", [["--seed"], ["rounds"], ["--seed", "../../away"]])
def test_wrong_usage_is_a_sentence(compare, flags, tmp_path):
    process = compare(*flags)
    assert process.wait() == 2
    assert (
        re.match(r"\S+ \S+ compare: error: .+$", process.output) and process.output.count("\n") == 0
    )
    assert not list(tmp_path.glob("compare-*"))


def test_a_flag_that_nobody_knows_ends_it_at_once(compare, tmp_path):
    process = compare("--colour", "red")
    assert process.wait() != 0
    assert "unrecognized arguments: --colour red" in process.output
    assert not (tmp_path / "compare.csv").exists() and processes_in(tmp_path) == {}


def series_of(tmp_path):
    """The names in compare.csv, each of two rounds."""
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "series,round,loss,accuracy,auc,sensitivity,specificity".split(",")
    names = [row["series"] for row in rows if row["round"] == "1"]
    assert [(row["series"], row["round"]) for row in rows] == [
        (name, number) for name in names for number in "12"
    ]
    assert all(0 <= float(row["auc"]) <= 1 for row in rows)
    return names


def images_of(folder):
    with open(folder / "history.csv", newline="") as file:
        [number] = {row["num_examples"] for row in csv.DictReader(file)}
    return int(number)


@pytest.mark.slow
def test_the_drawn_hospitals_central_federated_and_each_alone(compare, tmp_path):
    process = compare(*FLAGS)
    assert process.wait(900) == 0, process.output
    assert series_of(tmp_path) == [
        "central",
        "federated",
        "client001 alone (screening centre)",
        "client002 alone (macula clinic)",
        "client003 alone (referral clinic)",
    ]
    where = tmp_path / "compare-3" / "hospitals"
    alone = [images_of(where / "alone" / f"client00{number}") for number in (1, 2, 3)]
    assert images_of(where / "central") == images_of(where / "server") == sum(alone) == 60
    assert 'id="brought"' in (where / "server" / "report.html").read_text()
    assert not (tmp_path / "server").exists() and not (tmp_path / "index").exists()
    assert processes_in(tmp_path) == {}


@pytest.mark.slow
def test_photographs_four_series_and_two_reports(compare, tmp_path):
    source = tmp_path / "photographs"
    source.mkdir()
    rng = np.random.default_rng(3)
    lines = ["image,label,patient"]
    for number in range(60):
        eye = Image.new("RGB", (96, 96))
        spot = tuple(int(each) for each in rng.integers(60, 200, 3))
        ImageDraw.Draw(eye).ellipse((4, 4, 92, 92), fill=spot)
        eye.save(source / f"{number}.png")
        lines.append(f"{number}.png,{number % 5},{number}")
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    process = compare("--dataset", "folder", "--source", str(source), *FLAGS[-4:])
    assert process.wait(900) == 0, process.output
    assert process.output.count("warning: drcnn begins from random weights") == 2
    assert series_of(tmp_path) == [
        "central",
        "federated IID",
        "federated non-IID",
        "largest client alone",
    ]
    where = tmp_path / "compare-0"
    folders = ("iid/central", "iid/server", "noniid/server", "noniid/alone")
    *shared, alone = [images_of(where / folder) for folder in folders]
    assert len(set(shared)) == 1 and shared[0] / 3 < alone < shared[0]
    for split in ("iid", "noniid"):
        assert 'id="brought"' in (where / split / "server" / "report.html").read_text()
    assert processes_in(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["compare.sh", "todoClient.py"])
def test_when_one_ends_early_all_end(compare, tmp_path, victim):
    """A signal to the script stops what it started; a client that is killed ends the comparison."""
    process = compare(*FLAGS[:-1], "30")
    process.wait_for(r"listening on", 300)
    clients = until(lambda: three_clients(tmp_path), "three clients run")
    if victim == "compare.sh":
        process.signal(signal.SIGTERM)
    else:
        os.kill(clients[1], signal.SIGKILL)
    assert process.wait() == (143 if victim == "compare.sh" else 137)
    assert processes_in(tmp_path) == {}
