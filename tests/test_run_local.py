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
from conftest import Started, copy_of, processes_in, until

from common import files

DATA = ["--num-clients", "2", "--image-size", "32", "--num-train", "60", "--num-val", "30"]
WITH_PACKAGES = {"PYTHON": sys.executable}  # this environment in place of a fresh .venv
COMMAND = ["./run_local.sh", *DATA]


def run(project, *flags, script="./run_local.sh"):
    return subprocess.run(
        [script, *DATA, *flags],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **WITH_PACKAGES},
    )


def round_lines(shown):
    return re.findall(r"^round (\d+/\d+): AUC \S+  sensitivity \S+  specificity \S+$", shown, re.M)


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(project folder, the run's CompletedProcess) after one run of two rounds."""
    project = copy_of(tmp_path_factory.mktemp("first") / "project")
    return project, run(project, "--rounds", "2")


@pytest.fixture(scope="module")
def stopped_run(first_run, tmp_path_factory):
    """(project folder, the number of finished rounds) after Ctrl-C in a second, longer run."""
    project = tmp_path_factory.mktemp("stopped") / "project"
    shutil.copytree(first_run[0], project)
    process = Started([*COMMAND, "--rounds", "99"], project, WITH_PACKAGES)
    process.wait_for("round 1/99: AUC", 300)
    process.signal(signal.SIGINT)
    assert process.wait() == 130, process.output
    assert processes_in(project) == {}
    return project, len(json.loads((project / "server" / "state.json").read_text())["history"])


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of its own: (project folder, the number of finished rounds)."""
    shutil.copytree(stopped_run[0], tmp_path / "project")
    return tmp_path / "project", stopped_run[1]


@pytest.mark.slow
def test_a_run_shows_each_step_each_round_and_one_table(first_run):
    project, shown = first_run
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert re.findall(r"^\d/4 \w+", shown.stdout, re.M) == [
        "1/4 packages",
        "2/4 images",
        "3/4 federation",
        "4/4 each",
    ]
    assert round_lines(shown.stdout) == ["1/2", "2/2"]
    assert shown.stdout.count("\nfederated ") == 1
    assert re.search(r"^client002 \(macula clinic\) alone +\d\.\d{3} ", shown.stdout, re.M)
    assert f"file://{project}/server/report.html" in shown.stdout
    assert "\x1b" not in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if line.strip()]
    assert len(set(lines)) == len(lines)


@pytest.mark.slow
def test_each_hospital_alone_trains_on_its_own_images(first_run):
    project, _ = first_run
    cards = [project / "alone" / f"client00{k}" / "central_weight.json" for k in (1, 2)]
    assert [json.loads(card.read_text())["num_examples"] for card in cards] == [40, 20]


@pytest.mark.slow
def test_after_a_finished_run_a_new_one_gives_the_same_bits_from_the_same_pictures(
    first_run, tmp_path
):
    project = tmp_path / "project"
    shutil.copytree(first_run[0], project)
    weights = (project / "server" / "server_weight.h5").read_bytes()
    pictures = sorted((project / "preprocessed").glob("*/*_*.png"))
    made_at = [path.stat().st_mtime_ns for path in pictures]
    second = run(project, "--rounds", "2", "--no-alone")
    assert second.returncode == 0, second.stdout + second.stderr
    assert len(made_at) == 90
    assert made_at == [path.stat().st_mtime_ns for path in pictures]
    assert (project / "server" / "server_weight.h5").read_bytes() == weights
    assert (project / "server" / "old-1" / "server_weight.h5").read_bytes() == weights
    assert not (project / "alone").exists()


@pytest.mark.slow
def test_a_run_without_its_comparison_gets_only_that(first_run, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(first_run[0], project)
    (project / "server" / "report.html").unlink()
    state = (project / "server" / "state.json").read_bytes()
    again = run(project, "--rounds", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (project / "server" / "report.html").exists()
    assert (project / "server" / "state.json").read_bytes() == state


@pytest.mark.slow
def test_a_stopped_run_is_resumed(stopped):
    project, done = stopped
    resumed = run(project, "--rounds", str(done + 1), "--no-alone")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert round_lines(resumed.stdout) == [f"{done + 1}/{done + 1}"]


@pytest.mark.slow
def test_a_stopped_run_refuses_other_images(stopped):
    other = run(stopped[0], "--image-size", "48")
    assert other.returncode == 1
    assert "unfinished run" in other.stderr and "--fresh" in other.stderr


@pytest.mark.slow
def test_a_damaged_state_is_a_sentence_and_fresh_begins_a_new_run(stopped):
    project, _ = stopped
    (project / "server" / "state.json").write_text("{")
    damaged = run(project)
    assert damaged.returncode == 1
    assert damaged.stderr.count("\n") == 1 and "--fresh" in damaged.stderr
    afresh = run(project, "--fresh", "--rounds", "1", "--no-alone")
    assert afresh.returncode == 0, afresh.stdout + afresh.stderr
    assert (project / "server" / "old-2").is_dir()


@pytest.mark.slow
def test_compare_also_trains_on_all_images_in_one_place(first_run, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(first_run[0], project)
    shown = run(project, "--rounds", "1", "--no-alone", script="./compare.sh")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    card = json.loads((project / "central" / "central_weight.json").read_text())
    assert card["num_examples"] == 60
    assert "\nall images in one place " in shown.stdout
    assert "all images in one place" in (project / "server" / "report.html").read_text()


# --- how it ends: with scripts that only wait -----------------------------------------------------

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
    replace_main(copy_of_project, "prepare.py", "\nraise SystemExit(0)\n")
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
    until(lambda: processes_in(waiting) == {}, "everything that it started is gone")


def test_in_a_terminal_the_clients_are_a_table_and_ctrl_c_ends_all(waiting):
    """A terminal sends SIGINT to the launcher and to all that it started, at once."""
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
            os.write(terminal, b"\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"client002 (macula clinic)  not seen yet" in shown and b"Traceback" not in shown
    assert processes_in(waiting) == {}


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
    assert processes_in(waiting) == {}


def test_a_server_that_ends_before_it_listens_gives_its_exit_code(waiting):
    replace_main(waiting, "todoServer.py", "\nprint('a traceback')\nraise SystemExit(3)\n")
    shown = run(waiting)
    assert shown.returncode == 3 and shown.stdout.endswith("\na traceback\n")


@pytest.mark.parametrize("folder", [".", "server"])
def test_a_folder_in_use_is_told_with_the_process(folder, copy_of_project):
    with files.alone_in(copy_of_project / folder):
        beside = run(copy_of_project)
    assert beside.returncode == 1 and "2/4" not in beside.stdout
    assert "another process works in" in beside.stderr
