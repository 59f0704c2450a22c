"""./run_local.sh as a newcomer runs it: in a copy of the project, for real, on a small set."""

import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, Started, processes_in, until

NUM_IMAGES = 90
DATA = ["--num-clients", "2", "--image-size", "32", "--num-train", "60", "--num-val", "30"]
WITH_PACKAGES = {"PYTHON": sys.executable}  # this environment in place of a fresh .venv


def copy_of_project(folder):
    """What is in git, or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def command(*flags):
    return ["bash", "run_local.sh", *DATA, *flags]


def run(project, *flags):
    return subprocess.run(
        command(*flags),
        cwd=project,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **WITH_PACKAGES},
    )


@pytest.fixture
def project(tmp_path):
    return copy_of_project(tmp_path / "project")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(project folder, the run's CompletedProcess) after one run of two rounds."""
    project = copy_of_project(tmp_path_factory.mktemp("first") / "project")
    return project, run(project, "--rounds", "2")


@pytest.fixture(scope="module")
def interrupted_run(first_run, tmp_path_factory):
    """(project folder, the number of finished rounds) after Ctrl-C in a second, longer run."""
    project = tmp_path_factory.mktemp("interrupted") / "project"
    shutil.copytree(first_run[0], project)
    process = Started(command("--rounds", "99"), project, WITH_PACKAGES)
    process.wait_for("round 1/99: loss", 200)

    log = (project / "run_local.log").read_text()
    for flags in ([], ["--fresh"]):
        beside = run(project, *flags)
        assert beside.returncode == 1 and beside.stdout == ""
        assert re.fullmatch(
            r"\S+ \S+ run_local: error: another process works in server: wait until it ends.*\n",
            beside.stderr,
        )
    assert (project / "run_local.log").read_text().startswith(log)

    process.signal(signal.SIGINT)
    assert process.wait(30) == 130
    until(lambda: not processes_in(project), "everything that it started is gone")
    assert "server: stopping; what has arrived is kept" in process.output
    assert "server: stopping; what has arrived is kept" in (project / "run_local.log").read_text()
    state = json.loads((project / "server" / "state.json").read_text())
    return project, len(state["history"])


@pytest.fixture
def interrupted(interrupted_run, tmp_path):
    """A copy of its own: (project folder, the number of finished rounds)."""
    shutil.copytree(interrupted_run[0], tmp_path / "project")
    return tmp_path / "project", interrupted_run[1]


@pytest.mark.slow
def test_a_run_ends_with_a_table_a_report_and_the_model(first_run):
    project, shown = first_run
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert re.search(r"^ +2 +\d+\.\d{3} ", shown.stdout, re.M)
    assert "server/server_weight.h5" in shown.stdout
    assert (project / "server" / "report.html").stat().st_size > 10_000
    table = [line for line in shown.stdout.splitlines() if re.match(r"(round| +[12]) ", line)]
    assert len(table) == 3 and max(map(len, table)) <= 80
    log = (project / "run_local.log").read_text().splitlines()
    assert log and all(line in shown.stdout for line in log)


@pytest.mark.slow
def test_each_client_alone_is_compared_with_the_federation(first_run, tmp_path):
    project, shown = first_run
    assert shown.returncode == 0, shown.stdout + shown.stderr
    with open(project / "alone" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [
        "federated",
        "client001 alone (referral clinic and screening centre)",
        "client002 alone (macula clinic)",
    ]
    assert [(row["series"], row["round"]) for row in rows] == [
        (name, number) for name in names for number in "12"
    ]
    for name, images in (("client001", "40"), ("client002", "20")):
        with open(project / "alone" / name / "history.csv", newline="") as file:
            assert [row["num_examples"] for row in csv.DictReader(file)] == [images, images]
    assert 'id="brought"' in (project / "server" / "report.html").read_text()
    assert re.search(r"^ *client002 alone \(macula clinic\) +\d\.\d{3} ", shown.stdout, re.M)

    interrupted = tmp_path / "project"
    shutil.copytree(project, interrupted)
    (interrupted / "alone" / "compare.csv").unlink()
    weights = (interrupted / "server" / "server_weight.h5").read_bytes()
    again = run(interrupted, "--rounds", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "each client alone is still to come" in again.stdout
    assert "server: listening" not in again.stdout
    assert (interrupted / "alone" / "compare.csv").exists()
    assert (interrupted / "server" / "server_weight.h5").read_bytes() == weights


@pytest.mark.slow
def test_after_a_finished_run_a_new_one_gives_the_same_bits_without_drawing_again(
    first_run, tmp_path
):
    project = tmp_path / "project"
    shutil.copytree(first_run[0], project)
    weights = (project / "server" / "server_weight.h5").read_bytes()
    pictures = sorted((project / "preprocessed").glob("*/*_*.png"))
    drawn = [path.stat().st_mtime_ns for path in pictures]
    second = run(project, "--rounds", "2", "--no-alone")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "_alone: " not in second.stdout
    assert "a new run; the old one's files are moved aside" in second.stdout
    assert f"{len(drawn)} pictures are there, 0 to make" in second.stdout
    assert len(drawn) == NUM_IMAGES
    assert drawn == [path.stat().st_mtime_ns for path in pictures]
    assert (project / "server" / "server_weight.h5").read_bytes() == weights
    assert (project / "server" / "old-1" / "server_weight.h5").read_bytes() == weights


@pytest.mark.slow
def test_an_interrupted_run_refuses_other_data(interrupted):
    project, _ = interrupted
    other = run(project, "--image-size", "48")
    assert other.returncode == 1
    assert "unfinished run" in other.stderr and "--fresh" in other.stderr


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(interrupted):
    project, finished = interrupted
    rounds = finished + 2
    resumed = run(project, "--rounds", str(rounds), "--no-alone")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming the unfinished run" in resumed.stdout
    assert f"round {rounds}/{rounds}: loss" in resumed.stdout
    assert f"round {finished}/{rounds}: loss" not in resumed.stdout
    assert "a new run" not in resumed.stdout


@pytest.mark.slow
def test_a_damaged_state_is_a_sentence_and_fresh_begins_a_new_run(interrupted):
    project, _ = interrupted
    (project / "server" / "state.json").write_text("{")
    damaged = run(project)
    assert damaged.returncode == 1
    assert damaged.stderr.count("\n") == 1 and "--fresh" in damaged.stderr
    afresh = run(project, "--fresh", "--rounds", "1", "--no-alone")
    assert afresh.returncode == 0, afresh.stdout + afresh.stderr
    assert "the old run's files are in server/old-2" in afresh.stdout


@pytest.mark.slow
def test_one_that_fails_stops_the_others(project):
    (project / "todoClient.py").write_text(
        "import sys; sys.exit('broken') if 'client002' in sys.argv else sys.stdin.read()\n"
        "import signal; signal.pause()\n"
    )
    shown = run(project)
    assert shown.returncode == 1
    assert (
        "client002 ended with 1 (its words are above): stopping the others" in shown.stderr
        and "broken" in shown.stderr
    )
    assert not processes_in(project)


def drawn(project):
    """The project, with its pictures and indexes already made."""
    made = subprocess.run(
        [sys.executable, "prepare.py", *DATA], cwd=project, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return project


def test_a_server_that_ends_before_it_listens_gives_its_exit_code(project):
    (drawn(project) / "todoServer.py").write_text("import sys; print('no'); sys.exit(3)\n")
    shown = run(project)
    assert shown.returncode == 3 and "no\n" in shown.stdout
    assert (project / "run_local.log").read_text() == "no\n"


WAITING_CLIENT = """
import signal, sys
print(f"{sys.argv[2]}: I am here", flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_sigterm_ends_all_with_143(project):
    (drawn(project) / "todoClient.py").write_text(WAITING_CLIENT)
    process = Started(command(), project, WITH_PACKAGES)
    for name in ("client001", "client002"):
        process.wait_for(f"{name}: I am here", 200)
    assert len(processes_in(project)) == 4
    process.signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.lines[-1].endswith("start the server again to go on"), process.output
    assert processes_in(project) == {}


def test_ctrl_c_in_a_terminal_ends_all_with_130(project):
    """A terminal sends SIGINT to the launcher and to all that it started, at once."""
    (drawn(project) / "todoClient.py").write_text(WAITING_CLIENT)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project)
        os.environ.update(WITH_PACKAGES)
        os.execvp("bash", command())
    shown = b""
    pressed = False
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # so a terminal says that nobody holds its other end
            break
        shown += piece
        if shown.count(b": I am here") == 2 and not pressed:
            pressed = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"server: stopping; what has arrived is kept" in shown, shown
    assert b"stopping; what has arrived is kept" in (project / "run_local.log").read_bytes()
    assert processes_in(project) == {}
