"""./run_local.sh as a newcomer runs it: in a copy of the project, on a small set."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import Started, copy_of, new_run, processes_in, until
from standin import write_weights

from common import files

DATA = ["--num-clients", "2", "--image-size", "32", "--num-train", "60", "--num-val", "30"]
WITH_PACKAGES = {"PYTHON": sys.executable}  # this environment in place of a fresh .venv
COMMAND = ["./run_local.sh", *DATA]
ENDS_S = 900


def run(project, *flags, script="./run_local.sh"):
    return subprocess.run(
        [script, *DATA, *flags],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        env={**os.environ, **WITH_PACKAGES},
    )


def until_gone(project):
    until(lambda: processes_in(project) == {}, "everything that it started is gone")


def round_lines(shown):
    return re.findall(r"^round (\d+/\d+): AUC \S+  sensitivity \S+  specificity \S+$", shown, re.M)


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(project folder, the run's CompletedProcess) after one run of two rounds."""
    project = copy_of(tmp_path_factory.mktemp("first") / "project")
    return project, run(project, "--rounds", "2", script="./compare.sh")


@pytest.mark.slow
def test_a_run_shows_each_step_each_round_and_one_table(first_run):
    project, shown = first_run
    assert shown.returncode == 0, shown.stdout + shown.stderr
    steps = ["1/4 packages", "2/4 images", "3/4 federation", "4/4 each"]
    assert re.findall(r"^\d/4 \w+", shown.stdout, re.M) == steps
    assert round_lines(shown.stdout) == ["1/2", "2/2"]
    for name in ("federated", "client002 (macula clinic) alone", "all images in one place"):
        assert re.search(rf"^{re.escape(name)} +\d\.\d{{3}} ", shown.stdout, re.M), name
    assert f"file://{project}/server/report.html" in shown.stdout
    assert "\x1b" not in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if line.strip()]
    assert len(set(lines)) == len(lines)
    folders = ("alone/client001", "alone/client002", "central")
    beside = [json.loads((project / each / "central_weight.json").read_text()) for each in folders]
    assert [card["num_examples"] for card in beside] == [40, 20, 60]


@pytest.mark.slow
def test_a_run_without_its_page_gets_only_that(first_run, tmp_path):
    project = shutil.copytree(first_run[0], tmp_path / "project")
    (project / "server" / "report.html").unlink()
    state = (project / "server" / "state.json").read_bytes()
    again = run(project, "--rounds", "2", "--no-alone")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (project / "server" / "report.html").exists() and not (project / "alone").exists()
    assert (project / "server" / "state.json").read_bytes() == state


@pytest.mark.slow
def test_after_a_finished_run_a_new_one_begins_and_when_stopped_is_resumed(first_run, tmp_path):
    project = shutil.copytree(first_run[0], tmp_path / "project")
    weights = (project / "server" / "server_weight.h5").read_bytes()
    process = Started([*COMMAND, "--rounds", "99", "--no-alone"], project, WITH_PACKAGES)
    process.wait_for("round 1/99: AUC", ENDS_S)
    process.signal(signal.SIGINT)
    assert process.wait() == 130, process.output
    until_gone(project)
    assert (project / "server" / "old-1" / "server_weight.h5").read_bytes() == weights
    done = len(json.loads((project / "server" / "state.json").read_text())["history"])
    resumed = run(project, "--rounds", str(done + 1), "--no-alone")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert round_lines(resumed.stdout) == [f"{done + 1}/{done + 1}"]


# --- how it begins and ends: with scripts that only wait -----------------------------------------

WAITING_SERVER = """
    import signal
    from pathlib import Path
    from federation import status
    client = {"name": "client002", "last_seen": None, "num_examples": None, "is_done": False}
    said = {"run": "r", "arch": "drcnn", "round": 1, "rounds": 2, "phase": "open", "history": []}
    version = {"version": status.STATUS_VERSION}
    status.write(Path("server"), {**version, **said, "clients": [client]})
    print("2026-01-01 00:00:00 server: listening on localhost:1", flush=True)
    signal.pause()
"""
WAITING_CLIENT = """
    import signal, sys
    from pathlib import Path
    Path(sys.argv[2], "here").touch()
    signal.pause()
"""
FAILING_CLIENT = """
    import signal, sys
    print(f"2026-01-01 00:00:00 {sys.argv[2]}: my last word", flush=True)
    sys.exit(7) if sys.argv[2] == "client002" else signal.pause()
"""


def replace_main(project, script, body):
    """What the script does when it is run; imported, it has the flags that it had."""
    path = project / script
    path.write_text(
        f"if __name__ == '__main__':\n{textwrap.dedent(body)}".replace("\n", "\n    ")
        + "\n"
        + path.read_text()
    )


@pytest.fixture
def waiting(copy_of_project):
    """A project whose images need no preparing, and whose server and clients only wait."""
    prepared = {"num_clients": 2, "worker_hospitals": {"worker2": "macula clinic"}}
    (copy_of_project / "index" / "prepared.json").write_text(json.dumps(prepared))
    replace_main(copy_of_project, "prepare.py", "\nimport sys\nsys.exit('--seed' in sys.argv)\n")
    replace_main(copy_of_project, "todoServer.py", WAITING_SERVER)
    replace_main(copy_of_project, "todoClient.py", WAITING_CLIENT)
    return copy_of_project


def all_started(project):
    return all((project / name / "here").exists() for name in ("client001", "client002"))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_however_it_ends_nothing_that_it_started_goes_on(waiting, number, code):
    process = Started(COMMAND, waiting, WITH_PACKAGES)
    until(lambda: all_started(waiting), "all are started")
    process.signal(number)
    assert process.wait() == code
    until_gone(waiting)


def test_in_a_terminal_the_clients_are_a_table_and_ctrl_c_ends_all(waiting):
    """A terminal sends SIGINT to the launcher and to all that it started, at once; here twice.

    Of an earlier run, or another commit, nothing is drawn.
    """
    (waiting / "server" / "status.json").write_text('{"version": 1}')
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(waiting)
        os.environ.update(WITH_PACKAGES, TERM="xterm", COLUMNS="100")
        os.execvp(COMMAND[0], COMMAND)
    shown, pressed = b"", False
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # so a terminal says that nobody holds its other end
            break
        if b"not seen yet" in shown and all_started(waiting) and not pressed:
            pressed = True
            os.write(terminal, b"\x03\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"client002 (macula clinic)  not seen yet" in shown and b"Traceback" not in shown
    assert b"\nstopped; the same command goes on" in shown
    until_gone(waiting)


def test_ctrl_c_during_the_imports_is_no_traceback(copy_of_project):
    process = Started(COMMAND, copy_of_project, WITH_PACKAGES)
    maps = Path(f"/proc/{process.pid}/maps")
    until(lambda: "_multiarray_umath" in maps.read_text(), "it imports NumPy")
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and "Traceback" not in process.output


def test_one_that_fails_ends_all_and_its_last_words_are_shown(waiting):
    replace_main(waiting, "todoClient.py", FAILING_CLIENT)
    shown = run(waiting)
    assert shown.returncode == 7
    assert "client002: my last word\n" in shown.stdout and "client001: my" not in shown.stdout
    assert "client002 ended with 7" in shown.stderr
    until_gone(waiting)


def test_a_server_that_ends_before_it_listens_gives_its_exit_code(waiting):
    replace_main(waiting, "todoServer.py", "\nprint('a traceback')\nraise SystemExit(3)\n")
    shown = run(waiting)
    assert shown.returncode == 3 and shown.stdout.endswith("\na traceback\n")


def test_an_unfinished_run_is_gone_on_with_or_refused_in_a_sentence(waiting):
    state = waiting / "server" / "state.json"
    weights = write_weights(waiting / "server" / "server_weight.h5", 1)
    new_run(["client001", "client002"], 2, weights).save(state)
    other = run(waiting, "--seed", "1")
    assert other.returncode == 1 and "unfinished run of other images" in other.stderr
    state.write_text("{")
    damaged = run(waiting)
    assert damaged.returncode == 1
    assert damaged.stderr.count("\n") == 1 and "--fresh" in damaged.stderr
    process = Started([*COMMAND, "--fresh"], waiting, WITH_PACKAGES)
    process.wait_for("3/4 federation")
    process.signal(signal.SIGTERM)
    assert process.wait() == 143
    until_gone(waiting)


@pytest.mark.parametrize("folder", [".", "server"])
def test_a_folder_in_use_is_told(folder, copy_of_project):
    with files.alone_in(copy_of_project / folder):
        beside = run(copy_of_project)
    assert beside.returncode == 1 and "2/4" not in beside.stdout
    assert "another process works in" in beside.stderr
    assert f"(process {os.getpid()})" in beside.stderr
