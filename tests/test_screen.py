"""What a terminal shows of a run: whole lines above, one line a client below, redrawn in place."""

import json
import os
import pty
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common.screen import bar, describe

COLUMNS = 80
BAR_LINE = re.compile(
    r"client00[12]   round \d/3  epoch 1/1  \[#*-*\] +\d+%  loss \d\.\d{3}|"
    r"client00[12]   round \d/3  waiting for the others"
)

SERVER = """
import sys, time
print("2026-11-25 10:00:00 server: listening on localhost:1", flush=True)
for number in range(60):
    words = "of the server, which is longer than a terminal is wide"
    print(f"2026-11-25 10:00:00 server: line {number} {words}", flush=True)
    time.sleep(0.01)
"""

CLIENT = """
import sys, time
name = sys.argv[sys.argv.index("--name") + 1]
sys.path.insert(0, ROOT)
from common import progress
progress.SHORTEST_PAUSE_S = 0
print(f"2026-11-25 10:00:00 {name}: a line of its own", flush=True)
for number in (1, 2, 3):
    for step in range(1, 41):
        progress.tell_step(round=number, rounds=3, epoch=1, epochs=1, step=step, steps=40, loss=0.5)
        time.sleep(0.004)
    print(f"2026-11-25 10:00:00 {name}: round {number}/3: epoch 1/1  loss 0.5", flush=True)
    progress.tell("waiting", round=number, rounds=3)
progress._write(["not", "a", "report"])
progress._write({"phase": "training", "round": "x"})
"""

LAUNCH = """
import sys
sys.path.insert(0, ROOT)
import launch
from pathlib import Path
from common.script import start_script, end_script
start_script()
launch.PROJECT = Path.cwd()
processes = launch.Processes("run_local")
processes.python = sys.executable
launch.federate(processes, ["client001", "client002"], [], [], launch.PROJECT, "server.log")
processes.stop()
print("the table", flush=True)
end_script(0)
"""


class Terminal:
    """As much of a terminal as `Screen` uses: rows, cursor up, erase from the cursor to the end."""

    def __init__(self):
        self.rows = [""]
        self.row = 0
        self.column = 0

    def feed(self, text):
        for piece in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", text):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row += 1
                if self.row == len(self.rows):
                    self.rows.append("")
            elif piece.endswith("A") and piece.startswith("\x1b"):
                self.row -= int(piece[2:-1] or 1)
                assert self.row >= 0
            elif piece == "\x1b[J":
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            else:
                self.write(piece)

    def write(self, text):
        for letter in text:
            if self.column == COLUMNS:  # it breaks the line
                self.feed("\r\n")
            row = self.rows[self.row]
            self.rows[self.row] = (
                row[: self.column].ljust(self.column) + letter + row[self.column + 1 :]
            )
            self.column += 1


@pytest.fixture
def project(tmp_path):
    (tmp_path / "todoServer.py").write_text(SERVER)
    (tmp_path / "todoClient.py").write_text(f"ROOT = {str(ROOT)!r}\n{CLIENT}")
    (tmp_path / "launching.py").write_text(f"ROOT = {str(ROOT)!r}\n{LAUNCH}")
    return tmp_path


def in_terminal(folder, term):
    """(exit code, [text piece by piece]) of launching.py in a terminal of 80 columns."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM=term, COLUMNS=str(COLUMNS + 1))
        os.execv(sys.executable, [sys.executable, "launching.py"])
    pieces = []
    while True:
        try:
            pieces.append(os.read(fd, random.choice([50, 500, 5000])))
        except OSError:  # so a terminal says that nobody holds its other end
            break
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), [piece.decode() for piece in pieces]


def test_one_line_a_client_below_whole_lines_of_the_server(project):
    code, pieces = in_terminal(project, "xterm")
    assert code == 0
    terminal = Terminal()
    longest_block = 0
    frames = re.split(r"(?<=\n)(?=\x1b)", "".join(pieces))
    for frame in frames:
        terminal.feed(frame)
        block = [row for row in terminal.rows if "[" in row or "waiting for the others" in row]
        assert all(BAR_LINE.fullmatch(row) for row in block), block
        names = [row[:9] for row in block]
        assert names == sorted(set(names))  # never two lines of one client
        longest_block = max(longest_block, len(block))
    assert longest_block == 2
    assert len(frames) > 100

    shown = "".join(row if len(row) == COLUMNS else row + "\n" for row in terminal.rows)
    lines = shown.rstrip().splitlines()
    ours = [line for line in lines if "server: line" in line]
    assert [int(re.search(r"line (\d+) of", line)[1]) for line in ours] == list(range(60))
    assert all(line.endswith("than a terminal is wide") for line in ours)
    for name in ("client001", "client002"):
        assert lines.count(f"2026-11-25 10:00:00 {name}: a line of its own") == 1
    assert "epoch 1/1" not in shown  # neither bars are left, nor lines that a bar said before
    assert lines[-1] == "the table" and lines[-2].strip() != ""


@pytest.mark.parametrize("kind", ["dumb terminal", "pipe"])
def test_a_log_has_lines_only(project, kind):
    if kind == "pipe":
        shown = subprocess.run(
            [sys.executable, "launching.py"], cwd=project, capture_output=True, text=True
        ).stdout
    else:
        shown = "".join(in_terminal(project, "dumb")[1])
    assert "\x1b" not in shown and "[#" not in shown
    assert shown.count("epoch 1/1  loss 0.5") == 6
    assert shown.count("server: line") == 60


def test_bars_and_words_fit_80_columns():
    assert bar(0, 19).startswith("[--------------]   0%")
    assert bar(19, 19) == "[##############] 100%"
    report = {"phase": "training", "round": 100, "rounds": 100, "epoch": 10, "epochs": 10}
    line = describe("client001 alone", {**report, "step": 19, "steps": 19, "loss": 12.34567})
    assert len(line) <= 80 and line.endswith("[##############] 100%  loss 12.346")
    assert describe("client001", {"phase": "loading"}) == "client001   loading images"
    for wrong in ({}, [], {"phase": "dancing"}, {"phase": "training", "round": "1", "rounds": 2}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            describe("client001", json.loads(json.dumps(wrong)))
