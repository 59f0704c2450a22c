"""Who is where: one table of a run's clients, one file of it, one picture of it.

The server notes here what it sees of its clients and what they say of themselves. None of that is
trusted: it is shown, it decides nothing. `Clients` is the table, server/status.json the file, and
`draw` the picture, for whoever watches a run. Times are seconds since 1970 by the server's clock.
"""

import json
import math
import os
import time

from common.files import temporary
from common.log import plain
from federation.state import HISTORY_COLUMNS

SHORTEST_PAUSE_S = 2  # between two writings of the file
LONGEST_PAUSE_S = 10  # it is written again after so long, also where nothing has changed
LATE_S = 30  # a file that is older is a copy, or its server is gone
QUIET_S = 30  # a client that has told where it is, and then nothing for so long, may be stopped

FETCHED = "fetched"  # a client's phase until it tells one of its own, which an old peer never does
PHASES = ("loading", "training", "scoring", "waiting", "done")
WHERE = {  # what a client says of where it is, beside its phase: (least, most)
    "epoch": (1, 1_000_000),
    "epochs": (1, 1_000_000),
    "seconds_left": (0, 10_000_000),
}
NOWHERE = dict.fromkeys(("phase", *WHERE))
SCORES = {  # what a client measured: (least, most)
    "examples": (1, 999_999_999),
    "loss": (0, 1_000_000),
    "auc": (0, 1),
    "threshold": (0, 1),  # of the score, for the two that follow
    "sensitivity": (0, 1),
    "specificity": (0, 1),
    "training_loss": (0, 1_000_000),
    "training_seconds": (0, 10_000_000),
}
UPDATE = ["update_length", "update_cosine"]  # as weights.compare_updates says
SCORES_COLUMNS = ["round", "client", "num_examples", *SCORES, *UPDATE]


def within(values, limits):
    """(what is known and within its limits, texts of what is not)."""
    # Of the unknown one is enough: a report of 2 MB has room for 130,000.
    unknown = [name for name in values if name not in limits][:1]
    problems = [f"{name[:30]!r} is not known" for name in unknown]
    good = {}
    for name, (least, most) in limits.items():
        if name not in values:
            continue
        value = values[name]
        if least <= value <= most:  # NaN is not
            good[name] = int(value) if name == "examples" else value
        else:
            problems.append(f"{name} is {value}, expected {least} to {most}")
    return good, problems


class Clients:
    """The table: what is known of each client in this round.

    Any thread may note something: no row comes or goes, and what one says is shown and no more.

    rows  client -> {"last_seen": time or None}, and where it was then: its phase, and `WHERE`
    """

    def __init__(self, names):
        self.rows = {name: {"last_seen": None, **NOWHERE} for name in names}

    def begin_round(self):
        """Where they were is of the round that is over."""
        for row in self.rows.values():
            row.update(NOWHERE)

    def note(self, client, where=None):
        """It calls: its last sign of life is now, and maybe where it is: its phase, and `WHERE`."""
        if client in self.rows:
            said = NOWHERE | where if where else {}
            self.rows[client].update(said, last_seen=time.time())

    def in_words(self, client):
        return in_words(self.rows[client], time.time())


def in_words(row, now):
    """'training, epoch 2 of 5, 3 min to go, heard 4 s ago': a row of the table in words."""
    if row.get("is_done"):
        return "has the result"
    if row.get("num_examples"):
        return "delivered"
    if row["last_seen"] is None:
        return "not seen yet"
    quiet_s = now - row["last_seen"]
    if row["phase"] is None:
        return f"last seen {duration(quiet_s)} ago"
    if row["phase"] == FETCHED:
        return f"working, fetched {duration(quiet_s)} ago"
    if quiet_s > QUIET_S:
        return f"not heard for {duration(quiet_s)}"
    return f"{_phase(row)}, heard {duration(quiet_s)} ago"


def _phase(row):
    words = [row["phase"]]
    if row["epoch"] and row["epochs"]:
        words.append(f"epoch {row['epoch']} of {row['epochs']}")
    if row["seconds_left"]:
        words.append(f"{duration(row['seconds_left'])} to go")
    return ", ".join(words)


def duration(seconds):
    """'8 s', '14 min', '3 h'."""
    if seconds < 100:
        return f"{max(0, seconds):.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


# --- the file ------------------------------------------------------------------------------------


def status_of(rounds):
    """The status of these `Rounds` as a dict of JSON values."""
    with rounds.changed:
        state = rounds.state
        clients = [
            {
                "name": name,
                **row,
                "num_examples": rounds.uploads.get(name, {}).get("num_examples"),
                # of its last update that was merged
                **{column: state.counted.get(name, {}).get(column) for column in UPDATE},
                "is_done": name in rounds.done_clients,
            }
            for name, row in rounds.client_table.rows.items()
        ]
        return {
            "run": state.run,
            "arch": state.arch,
            "round": min(state.evaluated + 1, state.rounds),
            "rounds": state.rounds,
            "phase": phase_of(rounds),
            "clients": clients,
            "history": [{name: row[name] for name in HISTORY_COLUMNS} for row in state.history],
        }


def phase_of(rounds):
    """Of the round: "open", "frozen" or "merged"; "over" after the last; "stopped"."""
    state = rounds.state
    if rounds.stop_reason:
        return "stopped"
    if state.frozen:
        return "frozen"
    if state.evaluated < state.round - 1:
        return "merged"
    return "over" if state.is_over else "open"


def follow(rounds):
    """Keep server/status.json up to date, for ever: for a thread of its own."""
    written, written_at = None, -math.inf
    while True:
        status = status_of(rounds)
        now = time.monotonic()
        if status != written or now - written_at >= LONGEST_PAUSE_S:
            write(rounds.folder, status)
            written, written_at = status, now
        time.sleep(SHORTEST_PAUSE_S)


def write(folder, status):
    """Write status.json: without fsync, for no start goes by it."""
    path = folder / "status.json"
    written = temporary(path)
    try:
        written.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)  # a full disk: the run says so itself, where it matters


def read(path):
    """(what a status.json says, when it was written). Raises ValueError or OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            status = json.load(file)
            written = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: a server writes it when it runs") from None
    except (ValueError, IsADirectoryError):
        raise ValueError(f"{path} is not a server's status.json") from None
    return status, written


# --- the picture ---------------------------------------------------------------------------------

PHASES_OF_A_ROUND = {
    "open": "is open",
    "frozen": "is being merged",
    "merged": "is being evaluated",
    "over": "was the last: the run is over",
    "stopped": "was open when the server stopped",
}
ROUND_COLUMNS = ("round", "auc", "sensitivity", "specificity", "accuracy", "loss", "clients")


def draw(status, written, most_rounds=None, names=None):
    """The status as a rich renderable: the round, the clients, and the last `most_rounds` rounds.

    written  when it was written
    names    {client: what it is called}, where it has another name beside its own
    """
    # not at the top: the server draws nothing, and its rounds need the standard library only
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = time.time()
    is_ended = status["phase"] in ("over", "stopped")
    title = plain(
        f"run {status['run']}: {status['arch']}, round {status['round']}/{status['rounds']} "
        f"{PHASES_OF_A_ROUND[status['phase']]}"
    )
    if now - written > LATE_S and not is_ended:
        title += f"\nwritten {duration(now - written)} ago: the server is gone, or this is a copy"
    clients = Table("client", "where", "images", "update", "cosine", box=None, pad_edge=False)
    for row in status["clients"]:
        numbers = [row.get(name) for name in ("num_examples", *UPDATE)]
        numbers = ["" if number is None else _cell(number) for number in numbers]
        # What others write stays text: without markup, and without control characters.
        name = (names or {}).get(row["name"], row["name"])
        clients.add_row(Text(plain(name)), Text(plain(in_words(row, now))), *numbers)
    # The log and the page have other numbers of the same round: at the threshold of its card.
    title_of_rounds = "what the network learns, of all validation images, at a score of 0.5"
    rounds = Table(*ROUND_COLUMNS, "missing", box=None, pad_edge=False, title=title_of_rounds)
    rounds.title_justify, rounds.title_style = "left", ""
    first = 0 if most_rounds is None else max(0, len(status["history"]) - most_rounds)
    for row in status["history"][first:]:
        cells = [_cell(row[name]) for name in ROUND_COLUMNS]
        rounds.add_row(*cells, Text(plain(row["missing"])))
    return Group(Text(title), "", clients, *(["", rounds] if rounds.row_count else []))


def _cell(value):
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
