"""server/status.json: where a run is, for whoever watches it. Standard library only.

It is published whole at each change. Nothing reads it back: the run's own state is state.json.
Times are seconds since 1970 by the server's clock.
"""

import json
import threading
import time

from common.files import publish_text
from federation.rounds import HISTORY_COLUMNS

STATUS_VERSION = 1
REFRESH_S = 10  # it is written again after so long, also where nothing has changed


def status_of(rounds):
    """The status as a dict; call it with `rounds.changed` held.

    {"run": "1f0c...", "round": 3, "rounds": 10, "phase": "open", "opened": 1764080000,
     "clients": [{"name": "client001", "where": "delivered", "last_seen": 1764080012,
                  "num_examples": 300, "report": {...}}, ...],
     "history": [rows of history.csv]}
    """
    state = rounds.state
    since_epoch = time.time() - time.monotonic()  # turns a monotonic time into one of the clock
    reports = rounds.reports
    clients = []
    for name in state.clients:
        seen = rounds.last_seen.get(name)
        upload = rounds.uploads.get(name)
        client = {
            "name": name,
            "where": where(rounds, name),
            "last_seen": None if seen is None else round(seen + since_epoch),
            "num_examples": upload["num_examples"] if upload else None,
        }
        report = reports.get(name)
        if report:  # what it says of itself
            client["report"] = {**report, "heard": round(report["heard"])}
        clients.append(client)
    return {
        "version": STATUS_VERSION,
        "run": state.run,
        "arch": state.arch,
        "round": min(state.round, state.rounds),
        "rounds": state.rounds,
        "phase": phase(rounds),
        "opened": round(rounds.opened + since_epoch),
        "clients": clients,
        # None: a name that the row lacks, be it of another version, or where nobody joined or left
        "history": [
            {name: row.get(name) for name in (*HISTORY_COLUMNS, "joined", "left")}
            for row in state.history
        ],
    }


def phase(rounds):
    """Of the round: "open", "merging" or "evaluating"; "over" after the last; "stopped"."""
    if rounds.over:
        return "stopped"
    if rounds.state.frozen:
        return "merging"
    if rounds.answered < rounds.round - 1:
        return "evaluating"
    return "over" if rounds.done else "open"


def where(rounds, client):
    """Of a client: "delivered", "missing", or after the last round "has the result"."""
    if client in rounds.uploads:
        return "delivered"
    if rounds.done:
        return "has the result" if client in rounds.finished else "result is due"
    return "missing" if client in rounds.last_seen else "not seen yet"


class StatusFile:
    """Keeps server/status.json up to date."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.path = rounds.folder / "status.json"
        self.published = None  # the status that the file holds
        self.published_at = 0  # time.monotonic()
        self.writing = threading.Lock()

    def start(self):
        """From here on a thread publishes every change, and every REFRESH_S a sign of life."""
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self):
        while True:
            self.publish()
            with self.rounds.changed:
                self.rounds.changed.wait(REFRESH_S)

    def publish(self):
        """Publish the status, unless the file holds it already."""
        with self.writing:
            with self.rounds.changed:
                status = status_of(self.rounds)
            is_old = time.monotonic() - self.published_at >= REFRESH_S
            if status == self.published and not is_old:
                return
            try:
                publish_text(self.path, json.dumps(status, indent=1) + "\n")
            except OSError:
                return  # a full disk: the run says so itself, where it matters
            self.published = status
            self.published_at = time.monotonic()
