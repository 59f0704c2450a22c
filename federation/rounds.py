"""The round: who has arrived, the barrier, the freeze, the resume. Standard library only.

Merging and evaluating are handed in. The state is one JSON file; every step of a round is a publish of a file or of
the state, so that a server killed between any two goes on where it was:

    upload    state names it as a candidate, then its file is renamed into place   (repeated for each client)
    freeze    state names the set: nothing is accepted for this round any more
    merge     server_weight.h5                                                     (again, the same bits, after a crash)
    commit    state opens the next round
    evaluate  history.csv gets its row, then the state; then everyone is answered
"""

import threading
import time

from common.files import publish, publish_rows, save_state, sha256_of

HISTORY_COLUMNS = (
    "round,loss,accuracy,auc,sensitivity,specificity,clients,missing,num_examples,seconds"
).split(",")
REPORT_EVERY_S = 30


class Refused(Exception):
    """What a caller is told instead of an answer: the name of a gRPC status code and a sentence."""

    def __init__(self, code, sentence):
        super().__init__(sentence)
        self.code, self.sentence = code, sentence


class TooFewClients(Exception):
    """The time limit is over and fewer than the minimum number of clients are there."""


def new_state(run, clients, rounds, weights_sha256, **choices):
    """The state of a run before its first round; `choices` (arch, seed ...) are kept to be compared at a restart."""
    return {
        "run": run,
        "clients": sorted(clients),
        **choices,
        "rounds": rounds,
        "round": 1,
        "weights_sha256": weights_sha256,
        "uploads": {},
        "frozen": None,
        "counted": {},
        "history": [],
    }


class Rounds:
    """All rounds of one run. Public methods may be called from any thread; `open`, then `run`, from one of their own.

    folder      where state.json, history.csv and a folder a client lie (pathlib.Path)
    state       from `new_state`, or the state file's
    merge       merge(paths, num_examples) -> SHA-256: publishes the merged weights
    evaluate    evaluate() -> dict of the metrics of the merged weights
    """

    def __init__(
        self, folder, state, merge, evaluate, min_clients=None, round_timeout_s=0, say=print
    ):
        self.folder, self.state, self.merge, self.evaluate, self.say = (
            folder,
            state,
            merge,
            evaluate,
            say,
        )
        self.clients = state["clients"]
        self.min_clients = min_clients or len(self.clients)
        self.round_timeout_s = round_timeout_s
        self.changed = threading.Condition()
        self.waiting = {}  # client -> the ticket of its newest waiting call
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

    def _save(self, **changes):
        """Publishes the state with these changes; what could not be written does not hold either."""
        state = {**self.state, **changes}
        save_state(self.folder / "state.json", state)
        self.state = state

    def _uploads_on_disk(self):
        """{client: upload} of the open round: of each client's candidates the one whose bytes are in its file."""
        digests = {client: sha256_of(self.upload_path(client)) for client in self.state["uploads"]}
        return {
            client: upload
            for client, candidates in self.state["uploads"].items()
            for upload in candidates
            if upload["sha256"] == digests[client]
        }

    # --- the coordinator ---

    def open(self):
        """Finishes what a crash interrupted, before anyone is served: the same set gives the same bits."""
        if lost := set(self.state["frozen"] or ()) - set(self.uploads):
            raise ValueError(
                f"round {self.round} was being merged, but the weights of {', '.join(sorted(lost))} in "
                f"{self.folder} are not those that were delivered: put them back, or begin with --fresh"
            )
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
            self.stop(
                "INTERNAL",
                f"round {self.answered + 1} could not be closed: {type(error).__name__}: {error}; "
                "what was delivered is kept, the server stops",
            )
            raise

    def stop(self, code, sentence):
        """Ends every waiting call with this."""
        with self.changed:
            self.over = self.over or Refused(code, sentence)
            self.changed.notify_all()

    def _wait_for_clients(self):
        """Until all are there, or the limit is reached with enough; then freezes the set."""
        self.opened = reported = time.monotonic()
        limit = self.opened + (self.round_timeout_s or float("inf"))
        with self.changed:
            while len(self.uploads) < len(self.clients):
                if self.over:
                    raise self.over
                now = time.monotonic()
                if now >= limit and len(self.uploads) >= self.min_clients:
                    break
                if now >= limit:
                    raise TooFewClients(
                        f"round {self.round}: {self.describe()}; {len(self.uploads)} of at least "
                        f"{self.min_clients} clients after {self.round_timeout_s:g} s: the server stops, its "
                        "state is kept"
                    )
                if now - reported >= REPORT_EVERY_S:
                    self.say(
                        f"round {self.round}: {self.describe()}; waiting for {now - self.opened:.0f} s"
                    )
                    reported = now
                self.changed.wait(max(0.01, min(reported + REPORT_EVERY_S, limit) - now))
            self._save(
                frozen=sorted(self.uploads),
                uploads={client: [upload] for client, upload in self.uploads.items()},
            )

    def describe(self):
        """'have client001, client003; waiting for client002, last seen 14 s ago', or 'have all'."""

        def seen(client):
            at = self.last_seen.get(client)
            return f"{client}, " + (
                "not seen yet" if at is None else f"last seen {time.monotonic() - at:.0f} s ago"
            )

        missing = "; ".join(seen(client) for client in self.clients if client not in self.uploads)
        return (
            f"have {', '.join(sorted(self.uploads)) or 'no one'}; waiting for {missing}"
            if missing
            else "have all"
        )

    def _merge_and_commit(self):
        started = time.monotonic()
        number, names = self.round, self.state["frozen"]
        num_examples = [self.uploads[name]["num_examples"] for name in names]
        digest = self.merge([self.upload_path(name) for name in names], num_examples)
        with self.changed:
            closing = {  # what the history row needs, should a crash come before the evaluation
                "round": number,
                "clients": len(names),
                "missing": " ".join(sorted(set(self.clients) - set(names))),
                "num_examples": sum(num_examples),
                "wait_seconds": started - self.opened,
                "merge_seconds": time.monotonic() - started,
            }
            counted = {name: {"round": number, **upload} for name, upload in self.uploads.items()}
            self._save(
                round=number + 1,
                weights_sha256=digest,
                closing=closing,
                uploads={},
                frozen=None,
                counted={**self.state["counted"], **counted},
            )
            self.uploads = {}
            self.changed.notify_all()

    def _evaluate(self):
        started = time.monotonic()
        row = {**self.state["closing"], **self.evaluate()}
        now = time.monotonic()
        history = [
            *self.state["history"],
            {**row, "evaluate_seconds": now - started, "seconds": now - self.opened},
        ]
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, history)
        with self.changed:
            self._save(history=history)
            missing = f", without {row['missing']}" if row["missing"] else ""
            self.say(
                f"round {row['round']}/{self.state['rounds']}: loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
                f"AUC {row['auc']:.3f}  sensitivity {row['sensitivity']:.3f}  specificity {row['specificity']:.3f}  "
                f"({row['clients']} clients{missing}, {row['num_examples']} examples, {now - self.opened:.1f} s)"
            )
            self.changed.notify_all()

    # --- what the servicer calls ---

    def wake(self):
        with self.changed:
            self.changed.notify_all()

    def fetch(self, path, client):
        """The weights of the open round: (round number, SHA-256, open file). Waits while a round is being merged.
        client: a peer that names itself, or None."""
        with self.changed:
            while self.state["frozen"] and not self.over:
                self.changed.wait()
            if self.over:
                raise self.over
            if self.done:
                self.finished.add(client)
                self.changed.notify_all()
            return self.round, self.state["weights_sha256"], open(path, "rb")

    def admit(self, client, run, round_number, sha256):
        """Refuses, before a byte is stored, an upload that cannot count; a peer that names no round is judged later."""
        with self.changed:
            if run is not None and sha256 is not None:
                self._judge(client, run, round_number, sha256)

    def deliver(self, client, num_examples, sha256, written, run, round_number, alive):
        """Counts a complete, checked upload lying in the file `written`, and waits for the end of its round.

        run, round_number  as the peer names them; None where unknown
        alive              alive() says whether someone still waits for the answer
        Returns whether that was the last of all rounds. Raises Refused.
        """
        with self.changed:
            if round_number is None:
                round_number = self._round_of_silent_peer(client, sha256)
            if self._judge(client, run, round_number, sha256) == "new":
                if client in self.uploads and not alive():
                    raise Refused("CANCELLED", f"{client} went away; its earlier upload stays")
                self._accept(client, num_examples, sha256, written)
            if self.answered < round_number and alive():
                ticket = self.waiting[client] = object()
            self.changed.notify_all()
            while self.answered < round_number:
                if not alive():
                    raise Refused("CANCELLED", f"{client} went away; what it delivered counts")
                if self.waiting[client] is not ticket:
                    raise Refused(
                        "ABORTED",
                        f"{client} has delivered again on another connection, which gets the answer",
                    )
                if self.over:
                    raise self.over
                self.changed.wait()
            if self.done and alive():
                self.finished.add(client)
                self.changed.notify_all()
            return self.done

    def wait_until_all_left(self, timeout_s):
        """After the last round: until every client has its last answer, or the time is over."""
        with self.changed:
            self.say(
                f"the run is over; staying up to {timeout_s:g} s, until all have their last answer"
            )
            self.changed.wait_for(lambda: self.finished >= set(self.clients), timeout_s)

    def _round_of_silent_peer(self, client, sha256):
        """The round of an upload by a peer that names none and was not seen to fetch (a restart in between): equal bytes
        are a repeat. The bytes alone must not decide otherwise: a client that changed nothing sends the same every round."""
        counted = self.state["counted"].get(client)
        if counted and counted["sha256"] == sha256:
            return counted["round"]
        if self.min_clients < len(self.clients):
            raise Refused(
                "FAILED_PRECONDITION",
                f"{client} did not fetch on this connection, so its round is unknown: fetch, "
                f"then send; the open round is {self.round}",
            )
        return self.round

    def _judge(self, client, run, round_number, sha256):
        """'new' or 'repeat'. Raises Refused for what cannot count, or not any more."""

        def refused(what):
            return Refused(
                "FAILED_PRECONDITION",
                f"{client} delivers for {what}; the server is in run {self.state['run']}, "
                f"round {self.round}: fetch again",
            )

        if self.over:
            raise self.over
        if run not in (None, self.state["run"]):
            raise refused(f"run {run[:40]!r}")
        counted = self.state["counted"].get(client)
        if counted and (counted["round"], counted["sha256"]) == (round_number, sha256):
            return "repeat"
        if round_number != self.round or self.done:
            raise refused(
                f"round {round_number}, which is {'over' if round_number < self.round else 'not open'}"
            )
        if not self.state["frozen"]:
            return "new"
        if client in self.uploads and self.uploads[client]["sha256"] == sha256:
            return "repeat"
        raise refused(f"round {round_number}, which is over (being merged)")

    def _accept(self, client, num_examples, sha256, written):
        """State first, with the old upload still a candidate; then the file. Whichever a crash leaves, its entry is there."""
        upload = {"num_examples": num_examples, "sha256": sha256}
        old = self.uploads.get(client)
        keep_file = old is not None and old["sha256"] == sha256
        candidates = [old, upload] if old and not keep_file else [upload]
        self._save(uploads={**self.state["uploads"], client: candidates})
        if not keep_file:
            try:
                publish(written, self.upload_path(client))
            except BaseException:
                self.uploads = self._uploads_on_disk()  # it may be in place all the same
                raise
        self.uploads[client] = upload
        again = (
            ""
            if not old
            else " again, the same weights"
            if keep_file
            else " again, replacing its earlier upload"
        )
        self.say(
            f"round {self.round}: {client} delivered {num_examples} examples{again}; {self.describe()}"
        )
