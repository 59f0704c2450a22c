"""Where a run is: its round, its clients and its scores, from server/status.json.

    python3 status.py                       # on a terminal it redraws until the run is over
    python3 status.py copied/status.json    # a copy, on any machine
    python3 status.py --once

Needs only Python's standard library.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from common.log import fail
from common.screen import Screen
from common.script import end_script, exit_on_signals, start_script
from federation import progress

LOOK_EVERY_S = 1
LATE_S = 30
STATUS_VERSION = 1
SCORES = ["loss", "accuracy", "auc", "sensitivity", "specificity"]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=Path("server/status.json"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    arguments = parser.parse_args(argv)
    try:
        return watch(arguments.file, arguments.once)
    except (ValueError, OSError) as error:
        return fail("status", error)


def watch(path, once):
    """Show the status; on a terminal, again at each change until the run is over."""
    screen = Screen()
    shown = None
    while True:
        status, written = read_status(path)
        if not screen.redraws or once:
            print("\n".join(lines_of(status, written)))
            return 0
        is_late = time.time() - written > LATE_S
        if (written, is_late) != shown:
            rows = shutil.get_terminal_size().lines - 1
            screen.show(fitted(lines_of(status, written), rows))
            shown = written, is_late
        if status["phase"] in ("over", "stopped"):
            return 0
        time.sleep(LOOK_EVERY_S)


def read_status(path):
    """(status, when it was written: seconds since 1970). Raises ValueError where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            status = json.load(file)
            written = os.fstat(file.fileno()).st_mtime
        version = status["version"]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: a server writes it when it runs") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not a server's status.json") from None
    if version != STATUS_VERSION:
        raise ValueError(f"{path} has version {version}, this program reads {STATUS_VERSION}")
    return status, written


def lines_of(status, written):
    """The status as text, at most 80 columns wide."""
    lines = [
        f"run {status['run']}: {status['arch']}, round {status['round']}/{status['rounds']} "
        f"{PHASES[status['phase']]}",
        f"written at {clock(written)}" + lateness(status, written),
        "",
        f"{'client':<14} {'where':<37} {'images':>8} {'last seen':>17}",
    ]
    for client in status["clients"]:
        images = "" if client["num_examples"] is None else client["num_examples"]
        heard = client.get("report", {}).get("heard")
        seen = clock(max(filter(None, [client["last_seen"], heard]), default=None))
        lines.append(f"{client['name'][:14]:<14} {where(client):<37} {images:>8} {seen:>17}")
    if status["history"]:
        lines += ["", " ".join(["round", *(f"{name:>11}" for name in SCORES), "  clients"])]
    for row in status["history"]:
        scores = " ".join(f"{row[name]:11.3f}" for name in SCORES)
        lines.append(f"{row['round']:>5} {scores}   {row['clients']}")
        # Beneath, because names are long and a terminal has 80 columns.
        words = [f"without {row['missing']}"] if row["missing"] else []
        words += [f"{row[what]} {what}" for what in ("joined", "left") if row.get(what)]
        if words:
            lines.append(f"      {', '.join(words)}"[:80])
    return lines


PHASES = {
    "open": "is open",
    "merging": "is being merged",
    "evaluating": "is being evaluated",
    "over": "was the last: the run is over",
    "stopped": "was open when the server stopped",
}


def lateness(status, written):
    """A server writes every 10 s, also where nothing has changed."""
    late_s = time.time() - written
    if late_s <= LATE_S or status["phase"] in ("over", "stopped"):
        return ""
    return f", {late_s:.0f} s ago: the server is gone, or this is a copy"


def where(client):
    """Where a client is, in words: what it reports itself, or what the server knows of it."""
    report = client.get("report")
    if report is None or client["where"] != "missing":
        return client["where"]
    return progress.in_words(report)[:37]


def clock(seconds):
    """Date and time of day; the same day's date is left out."""
    if seconds is None:
        return "never"
    local = time.localtime(seconds)
    is_today = time.strftime("%Y-%m-%d", local) == time.strftime("%Y-%m-%d")
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", local)


def fitted(lines, rows):
    """The lines that fit a terminal: of a long history the newest rounds."""
    if len(lines) <= rows:
        return lines
    table = next(i for i, line in enumerate(lines) if line.startswith("round "))
    head = lines[: table + 1]
    room = max(1, rows - len(head) - 1)
    return [*head, "  ...", *lines[-room:]][:rows]


if __name__ == "__main__":
    start_script()
    exit_on_signals("status", "stopped; the run goes on")
    end_script(main())
