"""server/status.json and status.py: where a run is, while it runs and afterwards."""

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT, client_script, server_script, start_server, until

from federation import status as status_file


def read(folder):
    try:
        return json.loads((folder / "server" / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def show(folder, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "status.py", *arguments], cwd=folder, capture_output=True, text=True
    )


def wheres(folder):
    status = read(folder)
    return status and [client["where"] for client in status["clients"]]


def test_it_says_who_is_where_and_the_scores(start, begun):
    folder = begun(rounds=1)
    server, address = start_server(start, folder, script=server_script(folder))
    until(lambda: read(folder), "the status is there")
    status = read(folder)
    assert (status["round"], status["rounds"], status["phase"]) == (1, 1, "open")
    assert wheres(folder) == ["not seen yet", "not seen yet"]

    client = client_script(folder)
    first = start(client, "--name", "client001", "--server", address, cwd=folder)
    until(lambda: wheres(folder) == ["delivered", "not seen yet"], "client001 has delivered")
    shown = show(folder)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "run run0: drcnn, round 1/1 is open"
    assert re.match(r"client001 +delivered +4 +\d\d:\d\d:\d\d$", lines[4]), shown.stdout
    assert re.match(r"client002 +not seen yet +never$", lines[5]), shown.stdout

    second = start(client, "--name", "client002", "--server", address, cwd=folder)
    assert [each.wait(60) for each in (server, first, second)] == [0, 0, 0], server.output
    status = read(folder)
    assert status["phase"] == "over" and wheres(folder) == ["has the result"] * 2
    assert [row["round"] for row in status["history"]] == [1]
    shown = show(folder, "--once")
    assert "the run is over" in shown.stdout
    with open(folder / "server" / "history.csv", newline="") as file:
        row = next(csv.DictReader(file))
    names = ["loss", "accuracy", "auc", "sensitivity", "specificity"]
    scores = " +".join(re.escape(f"{float(row[name]):.3f}") for name in names)
    assert re.search(rf"^ +1 +{scores} +2$", shown.stdout, re.M), shown.stdout

    copied = folder / "copied.json"
    copied.write_bytes((folder / "server" / "status.json").read_bytes())
    assert "the run is over" in show(folder, copied).stdout


def test_a_stopped_and_a_killed_server_are_told(start, begun):
    folder = begun()
    server, _ = start_server(start, folder, script=server_script(folder))
    until(lambda: read(folder), "the status is there")
    server.signal(signal.SIGTERM)
    assert server.wait() == 143
    assert "round 1/2 was open when the server stopped" in show(folder).stdout

    server, _ = start_server(start, folder, script=server_script(folder))
    until(lambda: read(folder)["phase"] == "open", "it runs again")
    server.kill()
    path = folder / "server" / "status.json"
    minute_ago = time.time() - 60
    os.utime(path, (minute_ago, minute_ago))
    assert re.search(r"\d\d s ago: the server is gone, or this is a copy", show(folder).stdout)


def test_what_is_no_status_is_a_sentence(tmp_path):
    missing = show(tmp_path)
    assert missing.returncode == 1 and "there is no server/status.json" in missing.stderr
    for text in ("{", "[]", "{}", '{"version": 2}', "\xff"):
        (tmp_path / "status.json").write_text(text, encoding="latin-1")
        shown = show(tmp_path, "status.json")
        assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1, shown.stderr
        assert "status.json" in shown.stderr and "Traceback" not in shown.stderr


def test_a_terminal_is_redrawn_until_the_run_is_over(tmp_path):
    path = tmp_path / "status.json"
    status = {
        "version": status_file.STATUS_VERSION,
        "run": "1f0c2a",
        "arch": "drcnn",
        "round": 2,
        "rounds": 40,
        "phase": "open",
        "opened": time.time(),
        "clients": [
            {
                "name": "client001",
                "where": "missing",
                "last_seen": time.time(),
                "num_examples": None,
                "report": {"phase": "training", "epoch": 12, "epochs": 40, "seconds_left": 180},
            }
        ],
        "history": [],
    }

    def publish():
        path.with_suffix(".new").write_text(json.dumps(status))
        path.with_suffix(".new").rename(path)

    publish()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ.update(TERM="xterm", COLUMNS="81", LINES="20")
        os.execv(sys.executable, [sys.executable, str(ROOT / "status.py"), "status.json"])
    shown = ""
    while "3 min to go" not in shown:
        shown += os.read(terminal, 4096).decode()
    assert "training, epoch 12 of 40, 3 min to go" in shown and "\x1b" not in shown
    row = {name: 0.5 for name in status_file.HISTORY_COLUMNS} | {"clients": 1, "missing": ""}
    status["history"] = [{**row, "round": number} for number in range(1, 41)]
    status["phase"] = "over"
    publish()
    try:
        while True:
            shown += os.read(terminal, 4096).decode()
    except OSError:  # so a terminal says that nobody holds its other end
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    last = shown.split("\x1b[")[-1]
    assert last.startswith("J") and "the run is over" in last
    lines = last[1:].rstrip().split("\r\n")
    assert len(lines) <= 19 and lines[-1].startswith("   40 ") and "  ..." in lines
