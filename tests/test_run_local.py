"""./run_local.sh as a newcomer runs it: in a copy of the project, on a small set."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE_S, copy_of, new_run, processes_in, until
from standin import write_weights

from common import files
from federation.state import HISTORY_COLUMNS
from reporting.metrics import TASK

DATA = ["--num-clients", "2", "--image-size", "32", "--num-train", "60", "--num-val", "30"]
WITH_PACKAGES = {"PYTHON": sys.executable}  # this environment in place of a fresh .venv


def run(project, *flags, script="./run_local.sh"):
    return subprocess.run(
        [script, *DATA, *flags],
        cwd=project,
        capture_output=True,
        text=True,
        env={**os.environ, **WITH_PACKAGES},
    )


def begin_run(start, project):
    return start(project / "run_local.sh", *DATA, cwd=project, env=WITH_PACKAGES, python=())


def until_gone(project):
    until(lambda: processes_in(project) == {}, "everything that it started is gone")


@pytest.mark.slow
def test_a_run_shows_each_step_each_round_and_one_table(tmp_path):
    project = copy_of(tmp_path / "project")
    shown = run(project, "--rounds", "2", script="./compare.sh")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    steps = ["1/4 packages", "2/4 images", "3/4 federation", "4/4 each"]
    assert re.findall(r"^\d/4 \w+", shown.stdout, re.M) == steps
    rounds = r"^round (\d/2): AUC 0\S+  sensitivity \d\S+  specificity \d\S+$"
    assert re.findall(rounds, shown.stdout, re.M) == ["1/2", "2/2"]
    for name in ("federated", "client002 (macula clinic) alone", "all images in one place"):
        assert re.search(rf"^{re.escape(name)} +\d\.\d{{3}} ", shown.stdout, re.M), name
    lines = [line for line in shown.stdout.splitlines() if line.strip()]
    assert len(set(lines)) == len(lines) and "\x1b" not in shown.stdout
    folders = ("alone/client001", "alone/client002", "central")
    beside = [json.loads((project / each / "central_weight.json").read_text()) for each in folders]
    assert [card["num_examples"] for card in beside] == [40, 20, 60]
    assert f"file://{project}/server/report.html" in shown.stdout


# --- how it begins and ends: with scripts that only say or wait ----------------------------------

WAITING_SERVER = """
    import signal
    from pathlib import Path
    from federation import status
    client = {"name": "client002", "last_seen": None, "num_examples": None, "is_done": False}
    said = {"run": "r", "arch": "drcnn", "round": 1, "rounds": 2, "phase": "open", "history": []}
    status.write(Path("server"), {**said, "clients": [client]})
    print("2026-01-01 00:00:00 server: listening on localhost:1", flush=True)
    signal.pause()
"""
WAITING_CLIENT = """
    import signal, sys
    from pathlib import Path
    Path(sys.argv[2], "here").touch()
    signal.pause()
"""
ENDING_SERVER = """
    import sys
    print("a new run" if "--fresh" in sys.argv else "the run goes on")
    sys.exit(print("2026-01-01 00:00:00 server: listening on localhost:1"))
"""
FAILING_CLIENT = """
    import signal, sys
    print(f"2026-01-01 00:00:00 {sys.argv[2]}: my last word", flush=True)
    sys.exit(7) if sys.argv[2] == "client002" else signal.pause()
"""


def replace_main(project, script, body):
    """What the script does when it is run; imported, it has the flags that it had."""
    path = project / script
    path.write_text(f"if __name__ == '__main__':{body}\n{path.read_text()}")


@pytest.fixture
def copied(tmp_path):
    return copy_of(tmp_path / "project")


@pytest.fixture
def waiting(copied):
    """A project whose images need no preparing, and whose server and clients only wait."""
    prepared = {"num_clients": 2, "worker_hospitals": {"worker2": "macula clinic"}}
    (copied / "index" / "prepared.json").write_text(json.dumps(prepared))
    replace_main(copied, "prepare.py", "\n    import sys; sys.exit('--seed' in sys.argv)")
    replace_main(copied, "todoServer.py", WAITING_SERVER)
    replace_main(copied, "todoClient.py", WAITING_CLIENT)
    return copied


def all_started(project):
    return all((project / name / "here").exists() for name in ("client001", "client002"))


def begin(project, num_done):
    """There is a run of two rounds in the project, of which so many are over."""
    own = write_weights(project / "server" / "server_weight.h5", 1)
    row = {**dict.fromkeys(HISTORY_COLUMNS), "clients": 2, "missing": "", "num_examples": 2}
    history = [{**row, "round": number} for number in range(1, num_done + 1)]
    state = new_run(["client001", "client002"], 2, own)
    state.changed(round=num_done + 1, history=history).save(project / "server" / "state.json")


@pytest.mark.parametrize(
    "num_done, has_page, server, rounds",
    [
        (1, False, "the run goes on\n", ["2/2: no model: it answers NaN"]),
        (2, True, "a new run\n", ["1/2: AUC 0.500", "2/2: no model: it answers NaN"]),
        (2, False, None, []),  # the page only
    ],
)
def test_a_run_is_gone_on_with_and_a_new_one_begins_after_its_page(
    waiting, num_done, has_page, server, rounds
):
    replace_main(waiting, "todoServer.py", ENDING_SERVER)
    replace_main(waiting, "todoClient.py", "\n    raise SystemExit")
    replace_main(waiting, "report.py", "\n    raise SystemExit(print('the page'))")
    begin(waiting, num_done)
    scores = dict.fromkeys(("auc", "sensitivity", "specificity"), 0.5)
    card = {"round": 2, "rounds": 2, "num_nan": 1, "warning": "it answers NaN"}
    card["by_round"] = [{"round": number, TASK: scores} for number in (1, 2)]
    (waiting / "server" / "server_weight.json").write_text(json.dumps(card))
    (waiting / "server" / "status.json").write_text('{"version": 1}')  # of another commit
    if has_page:
        (waiting / "server" / "report.html").touch()
    shown = run(waiting, "--no-alone")
    assert shown.returncode == 0 and shown.stdout.endswith("\nthe page\n"), shown.stderr
    assert re.findall("^round (.*?)(?:  .*)?$", shown.stdout, re.M) == rounds
    log = waiting / "run_local.log"
    assert server in log.read_text() if server else not log.exists()


def test_each_hospital_alone_is_trained_as_the_federation_was(waiting):
    replace_main(waiting, "todoServer.py", ENDING_SERVER)
    replace_main(waiting, "todoClient.py", "\n    raise SystemExit")
    replace_main(waiting, "central.py", "\n    import sys; sys.exit(print('alone', *sys.argv))")
    replace_main(waiting, "report.py", "\n    raise SystemExit")
    begin(waiting, 2)
    card = {"round": 2, "rounds": 2, "by_round": []}
    (waiting / "server" / "server_weight.json").write_text(json.dumps(card))
    page, log = waiting / "server" / "report.html", waiting / "run_local.log"
    page.touch()
    assert run(waiting, "--epochs", "3").returncode == 0  # a new one
    page.unlink()  # as if it had been killed before its page
    said = log.read_text()
    own = waiting / "alone" / "other_network" / "central_weight.h5"
    own.parent.mkdir(parents=True)
    own.touch()
    other = run(waiting, "--epochs", "4")
    assert other.returncode == 1 and log.read_text() == said
    assert "'--epochs 3'" in other.stderr and "'--epochs 4'" in other.stderr
    longer = run(waiting, "--epochs", "3", "--rounds", "5")
    assert longer.returncode == 0 and "the run goes on\n" in log.read_text()
    assert own.exists()  # central.py --out alone/other_network
    alone = re.findall("^alone .*", log.read_text(), re.M)
    assert len(alone) == 4
    assert all("--epochs 3" in words and "--rounds" not in words for words in alone)


def test_an_unfinished_run_of_other_images_or_a_damaged_one_is_refused_in_a_sentence(waiting):
    begin(waiting, 1)
    other = run(waiting, "--seed", "1")
    assert other.returncode == 1 and "unfinished run of other images" in other.stderr
    (waiting / "server" / "state.json").write_text("{")
    damaged = run(waiting)
    assert damaged.returncode == 1
    assert damaged.stderr.count("\n") == 1 and "--fresh" in damaged.stderr


def test_a_run_that_ended_before_its_server_held_it_is_not_gone_on_with(waiting):
    """The run before it is still there: it would go on with the other's flags of training."""
    begin(waiting, 1)
    replace_main(waiting, "todoClient.py", "\n    raise SystemExit")
    replace_main(waiting, "todoServer.py", "\n    raise SystemExit(3)")
    assert run(waiting, "--fresh", "--epochs", "5").returncode == 3
    replace_main(waiting, "todoServer.py", ENDING_SERVER)
    gone_on = run(waiting, "--epochs", "5")
    assert gone_on.returncode == 1 and "begin with --fresh" in gone_on.stderr


def test_another_env_another_pythons_home_and_a_zip_without_executable_bits(copied, tmp_path):
    """And wrong usage is one line, before any image is made."""
    old_env = tmp_path / "bin" / "env"
    old_env.parent.mkdir()
    old_env.write_text("#!/bin/sh\nexit 125\n")  # as one that knows no --block-signal
    old_env.chmod(0o755)
    (copied / ".venv").symlink_to(sys.prefix)
    (copied / "setup.sh").write_text("")
    (copied / "run_local.sh").chmod(0o644)
    environment = {**os.environ, "PATH": f"{old_env.parent}:{os.environ['PATH']}"}
    environment |= {"PYTHON": "", "PYTHONHOME": "/nowhere"}
    command = ["bash", "compare.sh", "--colour", "red"]
    shown = subprocess.run(command, cwd=copied, env=environment, capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stdout == ""
    assert re.fullmatch(r".*--colour red; ./run_local.sh --help names the flags\n", shown.stderr)


@pytest.mark.parametrize("folder", [".", "server"])
def test_a_folder_in_use_is_told(folder, copied):
    with files.alone_in(copied / folder):
        beside = run(copied)
    assert beside.returncode == 1 and "2/4" not in beside.stdout
    assert "another process works in" in beside.stderr
    assert f"(process {os.getpid()})" in beside.stderr


@pytest.mark.parametrize(
    "script, body, code, words",
    [
        ("todoClient.py", FAILING_CLIENT, 7, "client002: my last word"),
        ("todoServer.py", "\n    raise SystemExit(print('a traceback') or 3)", 3, "a traceback"),
    ],
)
def test_one_that_fails_ends_all_and_its_last_words_are_shown(waiting, script, body, code, words):
    replace_main(waiting, script, body)
    shown = run(waiting)
    assert shown.returncode == code
    assert shown.stdout.endswith(f"{words}\n") and "listening" not in shown.stdout
    assert f"ended with {code}" in shown.stderr
    until_gone(waiting)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_however_it_ends_nothing_that_it_started_goes_on(start, waiting, number, code):
    process = begin_run(start, waiting)
    until(lambda: all_started(waiting), "all are started")
    process.signal(number)
    assert process.wait() == code
    until_gone(waiting)


LEADER = """
import os, signal, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # so its session gets this terminal's Ctrl-C
signal.signal(signal.SIGINT, lambda number, frame: None)
code = os.spawnvp(os.P_WAIT, sys.argv[1], sys.argv[1:])
os.write(1, b"all is read")  # with its end the terminal loses what is not read yet
os.read(0, 1)
os._exit(code)
"""


def test_in_a_terminal_the_clients_are_a_table_and_ctrl_c_ends_all(waiting, on_a_terminal):
    """A terminal sends SIGINT to the launcher and to all that it started, at once; here twice.

    Of an earlier run, or another commit, nothing is drawn.
    """
    (waiting / "server" / "status.json").write_text("{}")
    command = [sys.executable, "-c", LEADER, "./run_local.sh", *DATA]
    leader, terminal = on_a_terminal(command, waiting, COLUMNS="100", **WITH_PACKAGES)
    shown, pressed = b"", False
    while b"all is read" not in shown:
        shown += os.read(terminal, 4096)
        if b"not seen yet" in shown and all_started(waiting) and not pressed:
            pressed = True
            os.write(terminal, b"\x03\x03")
    os.write(terminal, b"\n")
    assert leader.wait(DEADLINE_S) == 130
    os.close(terminal)
    assert b"client002 (macula clinic)  not seen yet" in shown and b"Traceback" not in shown
    assert b"stopped; the same command goes on" in shown
    assert b"\x1b[?25h" in shown  # the cursor is there again
    until_gone(waiting)


def test_ctrl_c_during_the_imports_is_no_traceback(start, copied):
    process = begin_run(start, copied)
    maps = Path(f"/proc/{process.pid}/maps")
    until(lambda: "_multiarray_umath" in maps.read_text(), "it imports NumPy")
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and "Traceback" not in process.output
