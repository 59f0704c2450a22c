"""compare.sh: four series, the same task and number of passes, and nothing left behind."""

import csv
import os
import re
import shutil
import signal
import sys

import pytest
from conftest import ROOT, Started, processes_in, until

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


@pytest.mark.slow
def test_four_series_and_two_reports(compare, tmp_path):
    process = compare(*FLAGS)
    assert process.wait(900) == 0, process.output
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "series,round,loss,accuracy,auc,sensitivity,specificity".split(",")
    names = "central", "federated IID", "federated non-IID", "largest client alone"
    assert [(row["series"], row["round"]) for row in rows] == [
        (name, number) for name in names for number in "12"
    ]
    assert all(0 <= float(row["auc"]) <= 1 for row in rows)
    where = tmp_path / "compare-3"
    images = {
        folder: {
            row["num_examples"] for row in csv.DictReader(open(where / folder / "history.csv"))
        }
        for folder in ("iid/central", "iid/server", "noniid/server", "noniid/alone")
    }
    assert images["iid/central"] == images["iid/server"] == images["noniid/server"] == {"60"}
    assert images["noniid/alone"] == {
        "31"
    }  # 6 of the healthy and 25 of the DR images are worker 3's, the most
    for split in ("iid", "noniid"):
        assert 'id="comparison"' in (where / split / "server" / "report.html").read_text()
    assert not (tmp_path / "server").exists() and not (tmp_path / "index").exists()
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
