"""The round: who has arrived, the barrier, the freeze, the resume. Standard library only.

Merging and evaluating are handed in. The state is one JSON file; every step of a round is a publish of a file or of
the state, so that a server killed between any two goes on where it was:

    upload    state names it as a candidate, then its file is renamed into place   (repeated for each client)
    freeze    state names the set: nothing is accepted for this round any more
    merge     server_weight.h5                                                     (again, the same bits, after a crash)
    commit    state opens the next round
    evaluate  state gets the history row, history.csv follows; then everyone is answered
"""

import threading
import time
from collections import OrderedDict

from files import publish, publish_rows, save_state, sha256_of

HISTORY_COLUMNS = ("round,loss,accuracy,auc,sensitivity,specificity,clients,missing,num_examples,seconds").split(",")
REPORT_EVERY_S = 30
REMEMBERED_CONNECTIONS = 1000


class Refused(Exception):
    """What a caller is told instead of an answer: the name of a gRPC status code and a sentence."""

    def __init__(self, code, sentence):
        super().__init__(sentence)
        self.code, self.sentence = code, sentence


class TooFewClients(Exception):
    """The time limit is over and fewer than the minimum number of clients are there."""


def new_state(run, clients, rounds, weights_sha256, **choices):
    """The state of a run before its first round; `choices` (arch, seed ...) are kept to be compared at a restart."""
    return {"run": run, "clients": sorted(clients), **choices, "rounds": rounds, "round": 1, "weights_sha256": weights_sha256,
            "uploads": {}, "frozen": None, "counted": {}, "history": []}


class Rounds:
    """All rounds of one run. Public methods may be called from any thread; `open`, then `run`, from one of their own.

    folder      where state.json, history.csv and a folder a client lie (pathlib.Path)
    state       from `new_state`, or the state file's
    merge       merge(paths, num_examples) -> SHA-256: publishes the merged weights
    evaluate    evaluate() -> dict of the metrics of the merged weights
    """

    def __init__(self, folder, state, merge, evaluate, min_clients=None, round_timeout_s=0, say=print):
        self.folder, self.state, self.merge, self.evaluate, self.say = folder, state, merge, evaluate, say
        self.clients = state["clients"]
        self.min_clients = min_clients or len(self.clients)
        self.round_timeout_s = round_timeout_s
        self.changed = threading.Condition()
        self.waiting = {}  # client -> the ticket of its newest waiting call
        self.fetched = OrderedDict()  # connection -> round it last fetched, for peers that name no round
        self.last_seen = {}  # client -> time.monotonic()
        self.finished = set()  # clients that have their last answer
        self.over = None  # a Refused for everyone who waits, once there is nothing left to wait for
        self.opened = time.monotonic()
        self.uploads = self._uploads_on_disk()

    # --- what the state says ---

    @property
    def round(self):
        return self.state["round"]

    @property
    def done(self):
        """Whether the last round is merged (its evaluation may still run)."""
        return self.round > self.state["rounds"]

    @property
    def answered(self):
        """The last round that is merged, on disk, evaluated and in the history: the last that may be answered with 1."""
        return len(self.state["history"])

    def upload_path(self, client):
        return self.folder / client / "client_weights.h5"

    def _save(self):
        save_state(self.folder / "state.json", self.state)

    def _uploads_on_disk(self):
        """{client: upload} of the open round: of each client's candidates the one whose bytes are in its file."""
        found = {}
        for client, candidates in self.state["uploads"].items():
            digest = sha256_of(self.upload_path(client))
            for upload in candidates:
                if upload["sha256"] == digest:
                    found[client] = upload
        return found

    # --- the coordinator ---

    def open(self):
        """Finishes what a crash interrupted, before anyone is served: the same set gives the same bits."""
        if self.state["frozen"]:
            self._merge_and_commit()
        if self.answered < self.round - 1:
            self._evaluate()
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, self.state["history"])

    def run(self):
        """Closes one round after the other until the last. Raises TooFewClients, or what merge and evaluate raise."""
        try:
            while not self.done:
                self._wait_for_clients()
                self._merge_and_commit()
                self._evaluate()
        except TooFewClients as error:
            self.stop("UNAVAILABLE", str(error))
            raise
        except BaseException as error:
            self.stop("INTERNAL", f"round {self.round} could not be closed: {type(error).__name__}: {error}; "
                                  "what was delivered is kept, the server stops")
            raise

    def stop(self, code, sentence):
        """Ends every waiting call with this."""
        with self.changed:
            self.over = self.over or Refused(code, sentence)
            self.changed.notify_all()

    def _wait_for_clients(self):
        """Until all are there, or the limit is reached with enough; then freezes the set."""
        self.opened = reported = time.monotonic()
        with self.changed:
            while len(self.uploads) < len(self.clients):
                if self.over:
                    raise self.over
                now = time.monotonic()
                if self.round_timeout_s and now - self.opened >= self.round_timeout_s:
                    if len(self.uploads) >= self.min_clients:
                        break
                    raise TooFewClients(f"round {self.round}: {self.describe()}; {len(self.uploads)} of at least "
                                        f"{self.min_clients} clients after {self.round_timeout_s:g} s: the server stops, its "
                                        "state is kept")
                if now - reported >= REPORT_EVERY_S:
                    self.say(f"round {self.round}: {self.describe()}; waiting for {now - self.opened:.0f} s")
                    reported = now
                until = [reported + REPORT_EVERY_S] + [self.opened + self.round_timeout_s] * bool(self.round_timeout_s)
                self.changed.wait(max(0.01, min(until) - now))
            self.state["uploads"] = {client: [upload] for client, upload in self.uploads.items()}
            self.state["frozen"] = sorted(self.uploads)
            self._save()

    def describe(self):
        """'have client001, client003; waiting for client002, last seen 14 s ago', or 'have all'."""
        def seen(client):
            if client not in self.last_seen:
                return f"{client}, not seen yet"
            return f"{client}, last seen {time.monotonic() - self.last_seen[client]:.0f} s ago"

        missing = [seen(client) for client in self.clients if client not in self.uploads]
        if not missing:
            return "have all"
        return f"have {', '.join(sorted(self.uploads)) or 'no one'}; waiting for {'; '.join(missing)}"

    def _merge_and_commit(self):
        started = time.monotonic()
        names, number = self.state["frozen"], self.round
        uploads = [self.uploads[name] for name in names]
        digest = self.merge([self.upload_path(name) for name in names], [upload["num_examples"] for upload in uploads])
        with self.changed:
            self.state["closing"] = {  # what the history row needs, should a crash come before the evaluation
                "round": number, "clients": len(names), "missing": " ".join(sorted(set(self.clients) - set(names))),
                "num_examples": sum(upload["num_examples"] for upload in uploads),
                "wait_seconds": started - self.opened, "merge_seconds": time.monotonic() - started}
            for name, upload in zip(names, uploads, strict=True):
                self.state["counted"][name] = {"round": number, **upload}
            self.state.update(round=number + 1, weights_sha256=digest, uploads={}, frozen=None)
            self.uploads = {}
            self._save()
            self.changed.notify_all()

    def _evaluate(self):
        started = time.monotonic()
        row = {**self.state["closing"], **self.evaluate()}
        row["evaluate_seconds"] = time.monotonic() - started
        row["seconds"] = time.monotonic() - self.opened
        with self.changed:
            self.state["history"].append(row)
            self._save()
            publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, self.state["history"])
            missing = f", without {row['missing']}" if row["missing"] else ""
            self.say(f"round {row['round']}/{self.state['rounds']}: loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
                     f"AUC {row['auc']:.3f}  sensitivity {row['sensitivity']:.3f}  specificity {row['specificity']:.3f}  "
                     f"({row['clients']} clients{missing}, {row['num_examples']} examples, {row['seconds']:.1f} s)")
            self.changed.notify_all()

    # --- what the servicer calls ---

    def see(self, client):
        with self.changed:
            self.last_seen[client] = time.monotonic()

    def wake(self):
        with self.changed:
            self.changed.notify_all()

    def fetch(self, path, client, connection):
        """The weights of the open round: (round number, SHA-256, open file). Waits while a round is being merged.

        client  a peer that names itself, or None: then its `connection` is remembered, since it names no round either
        """
        with self.changed:
            while self.state["frozen"] and not self.over:
                self.changed.wait()
            if self.over:
                raise self.over
            if client is None:
                self.fetched[connection] = self.round
                self.fetched.move_to_end(connection)
                while len(self.fetched) > REMEMBERED_CONNECTIONS:
                    self.fetched.popitem(last=False)
            elif self.done:
                self._finish(client)
            return self.round, self.state["weights_sha256"], open(path, "rb")

    def admit(self, client, run, round_number, sha256):
        """Refuses, before a byte is stored, an upload that cannot count; a peer that names no round is judged later."""
        with self.changed:
            if run is not None and sha256 is not None:
                self._judge(client, run, round_number, sha256)

    def deliver(self, client, num_examples, sha256, written, run, round_number, connection, alive):
        """Counts a complete, checked upload lying in the file `written`, and waits for the end of its round.

        run, round_number  as the peer names them; run is None for a peer that names none
        alive              alive() says whether someone still waits for the answer
        Returns whether the round is answered (False: nobody listens any more). Raises Refused.
        """
        with self.changed:
            if run is None:
                round_number = self._round_of_silent_peer(client, connection, sha256)
            if self._judge(client, run, round_number, sha256) == "new":
                self._accept(client, num_examples, sha256, written)
            ticket = self.waiting[client] = object()
            self.changed.notify_all()
            while self.answered < round_number:
                if self.waiting[client] is not ticket:
                    raise Refused("ABORTED", f"{client} has delivered again on another connection, which gets the answer")
                if self.over:
                    raise self.over
                if not alive():
                    return False
                self.changed.wait()
            if round_number == self.state["rounds"] and alive():
                self._finish(client)
            return True

    def _finish(self, client):
        self.finished.add(client)
        self.changed.notify_all()

    def wait_until_all_left(self, timeout_s):
        """After the last round: until every client has its last answer, or the time is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.finished >= set(self.clients), timeout_s)

    def _round_of_silent_peer(self, client, connection, sha256):
        """The thesis demo's client names no round: its upload belongs to what the same connection last fetched. Without a
        fetch seen (a restart in between), equal bytes are a repeat; the bytes alone must not decide otherwise, since a
        client that changed nothing sends the same every round."""
        if connection in self.fetched:
            return self.fetched[connection]
        counted = self.state["counted"].get(client)
        if counted and counted["sha256"] == sha256:
            return counted["round"]
        if self.min_clients < len(self.clients):
            raise Refused("FAILED_PRECONDITION", f"{client} did not fetch on this connection, so its round is unknown: fetch, "
                                                 f"then send; the open round is {self.round}")
        return self.round

    def _judge(self, client, run, round_number, sha256):
        """'new' or 'repeat'. Raises Refused for what cannot count, or not any more."""
        now = f"run {self.state['run']}, round {self.round}"
        if self.over:
            raise self.over
        if run is not None and run != self.state["run"]:
            raise Refused("FAILED_PRECONDITION", f"{client} delivers for run {run[:40]!r}; the server is in {now}: fetch again")
        counted = self.state["counted"].get(client)
        if counted and counted["round"] == round_number and counted["sha256"] == sha256:
            return "repeat"
        if round_number != self.round or self.done:
            raise Refused("FAILED_PRECONDITION", f"{client} delivers for round {round_number}, which is "
                          f"{'over' if round_number < self.round else 'not open'}; the server is in {now}: fetch again")
        if self.state["frozen"]:
            if client in self.uploads and self.uploads[client]["sha256"] == sha256:
                return "repeat"
            raise Refused("FAILED_PRECONDITION", f"{client} delivers for round {round_number}, which is over (being merged); "
                                                 f"the server is in {now}: fetch again")
        return "new"

    def _accept(self, client, num_examples, sha256, written):
        """State first, with the old upload still a candidate; then the file. Whichever a crash leaves, its entry is there."""
        upload = {"num_examples": num_examples, "sha256": sha256}
        old = self.uploads.get(client)
        keep_file = old is not None and old["sha256"] == sha256
        self.state["uploads"][client] = [old, upload] if old and not keep_file else [upload]
        self._save()
        if not keep_file:
            publish(written, self.upload_path(client))
        self.uploads[client] = upload
        again = " again, replacing its earlier upload" if old else ""
        self.say(f"round {self.round}: {client} delivered {num_examples} examples{again}; {self.describe()}")
