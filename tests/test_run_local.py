"""./run_local.sh as a newcomer runs it: in a copy of the project, for real, on a small set."""

import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, Started, processes_in, until

CHOICES = ["--rounds", "2", "--num-clients", "2", "--image-size", "32"]


@pytest.fixture
def project(tmp_path):
    """A copy of what is in git, with this environment instead of a fresh one."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    needed = ["requirements.txt", "requirements-report.txt"]
    stamp = subprocess.run(
        [
            "bash",
            "-c",
            f"cat {' '.join(needed)} | cksum; echo '{' '.join(needed)}' | cksum | cut -d' ' -f1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    (tmp_path / ".venv" / f".installed-{stamp[1]}").write_text(stamp[0] + "\n")
    return tmp_path


def run(project, *arguments):
    command = ["bash", "run_local.sh", *CHOICES, *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_twice_then_interrupted_then_gone_on_with(project):
    first = run(project)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (
        re.search(r"^ +2 +\d+\.\d{3} ", first.stdout, re.M)
        and "server/server_weight.h5" in first.stdout
    )
    assert (project / "server" / "report.html").stat().st_size > 10_000
    weights = (project / "server" / "server_weight.h5").read_bytes()

    pictures = sorted((project / "preprocessed" / "synthetic").glob("*_*.png"))
    drawn = [path.stat().st_mtime_ns for path in pictures if path.name != "contact_sheet.png"]
    second = run(project)  # finished: a new run, without drawing again, the same bits
    assert (
        second.returncode == 0 and "a new run; the old one's files are moved aside" in second.stdout
    )
    assert f"{len(drawn)} pictures are there, 0 to make" in second.stdout and len(drawn) > 1000
    assert drawn == [
        path.stat().st_mtime_ns for path in pictures if path.name != "contact_sheet.png"
    ]
    assert (project / "server" / "server_weight.h5").read_bytes() == weights
    assert (project / "server" / "old-1" / "server_weight.h5").read_bytes() == weights

    third = Started(["bash", "run_local.sh", *CHOICES, "--rounds", "3"], project)
    third.wait_for("round 1/3: loss", 200)
    log = (project / "run_local.log").read_text()
    for flags in ([], ["--fresh"]):
        beside = run(project, *flags)
        assert beside.returncode == 1 and beside.stdout == ""
        assert re.fullmatch(
            "run_local: error: another process works in server: wait until it ends.*\n",
            beside.stderr,
        )
    assert (project / "run_local.log").read_text().startswith(log)
    third.signal(signal.SIGINT)
    assert third.wait(30) == 130
    until(lambda: not processes_in(project), "everything that it started is gone")

    other = run(project, "--image-size", "48")
    assert other.returncode == 1 and "unfinished run" in other.stderr and "--fresh" in other.stderr

    gone_on = run(project, "--rounds", "3")
    assert gone_on.returncode == 0, gone_on.stdout + gone_on.stderr
    assert (
        "going on with the unfinished run" in gone_on.stdout and "round 3/3: loss" in gone_on.stdout
    )
    assert "a new run" not in gone_on.stdout

    (project / "server" / "state.json").write_text("{")
    damaged = run(project)
    assert (
        damaged.returncode == 1
        and damaged.stderr.count("\n") == 1
        and "or start the server with --fresh" in damaged.stderr
    )
    afresh = run(project, "--fresh", "--rounds", "1")
    assert afresh.returncode == 0 and "the old run's files are in server/old-3" in afresh.stdout


@pytest.mark.slow
def test_one_that_fails_stops_the_others(project):
    (project / "todoClient.py").write_text(
        "import sys; sys.exit('broken') if 'client002' in sys.argv else sys.stdin.read()\n"
        "import signal; signal.pause()\n"
    )
    shown = run(project)
    assert (
        shown.returncode == 1
        and "ended with 1 (its words are above): stopping the others" in shown.stderr
    )
    assert not processes_in(project)
