"""The rounds of a run: the verdict, the barrier, the freeze, the merge, the answers.

Threads meet here. Each client's call stands in `deliver` until its round is evaluated; one
coordinator thread, in `run`, closes a round as soon as all uploads are there. Merging and
evaluating are handed in, so nothing here knows about weights or images. Standard library only.

Does this upload count? `verdict` answers; the first row that fits holds:

| of the server's state and the upload                             | verdict                     |
|------------------------------------------------------------------|-----------------------------|
| no round can be told                                             | refused: fetch, then send   |
| this run; this client's counted upload has this round and digest | REPEAT: answer it again     |
| the client is not, or no more, one of this run's                 | refused: PERMISSION_DENIED  |
| another run                                                      | refused: fetch again        |
| not the open round, or the last round is merged                  | refused: fetch again        |
| the open round, not frozen                                       | NEW                         |
| the open round, frozen with this client and this digest          | REPEAT                      |
| the open round, frozen without that                              | refused: it is being merged |

What is published in which order, and what a start does after a crash, stands in `federation.state`.
"""

import contextlib
import csv
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import log
from common.files import OUT_OF_FILES, first_free, publish, publish_rows, sha256_of
from federation import status
from federation.state import HISTORY_COLUMNS

REPORT_EVERY_S = 30  # how often the server says for whom it waits
RETRY_S = 1  # how soon a step is tried again for which no file could be opened
LONG_UPDATE = 5  # medians: a client whose update is longer is said
ROUNDS_AGAINST = 3  # running, in which an update points against the others': said

NEW = "new"
REPEAT = "repeat"


class Refused(Exception):
    """A call that is not served: the name of a gRPC status code, and a sentence for its caller."""

    def __init__(self, code, sentence):
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class TooFewClients(Exception):
    """--round-timeout is over, and fewer than --min-clients uploads are there."""


@dataclass(frozen=True)
class Upload:
    """A complete, checked upload."""

    client: str
    num_examples: int
    run: str | None  # as the peer names it; None: a peer of 2020, which names none
    round_number: int | None  # named, or last fetched on the same connection; None: unknown
    sha256: str  # of what was sent
    file: Path  # where it lies: a temporary file
    file_sha256: str  # of that file; another one than `sha256` where a layout was converted


def verdict(state, all_required, client, run, round_number, sha256):
    """(NEW or REPEAT, the number of the round that it is for). Raises Refused.

    state         RunState
    all_required  whether no round is ever closed without one of the clients
    run           as the peer names it; None: a peer of 2020, whose run is this one
    round_number  None where a peer of 2020 was not seen to fetch, as after a restart
    """
    counted = state.counted.get(client, {})
    if round_number is None and counted.get("sha256") == sha256:
        # Only here may the bytes alone decide: a client whose training changes nothing sends the
        # same bytes every round.
        round_number = counted["round"]
    elif round_number is None and all_required:
        round_number = state.round
    elif round_number is None:
        raise Refused(
            "FAILED_PRECONDITION",
            f"{client} did not fetch on this connection, so its round is unknown: fetch, then "
            f"send; the open round is {state.round}",
        )
    is_this_run = run in (None, state.run)
    is_counted = (counted.get("round"), counted.get("sha256")) == (round_number, sha256)
    if is_this_run and is_counted:
        return REPEAT, round_number
    if client not in state.clients:
        raise Refused(
            "PERMISSION_DENIED",
            f"{client} is not one of this run's clients, or no more: expected "
            f"{', '.join(state.clients)} (the server's --clients)",
        )
    if not is_this_run:
        raise _fetch_again(state, client, f"run {run[:40]!r}")
    if round_number != state.round or state.is_last_merged:
        raise _fetch_again(state, client, f"round {round_number}, which is not open")
    if state.frozen is None:
        return NEW, round_number
    if client in state.frozen and state.uploads[client][0]["sha256"] == sha256:
        return REPEAT, round_number
    raise _fetch_again(state, client, f"round {round_number}, which is over: it is being merged")


def _fetch_again(state, client, what):
    return Refused(
        "FAILED_PRECONDITION",
        f"{client} delivers for {what}; the server is in run {state.run}, round {state.round}: "
        "fetch again",
    )


def _remarks(counted):
    """What a person should look at in a client's counted upload: sentences without its name."""
    length = counted.get("update_length")
    if length == 0:
        yield "sends back what it fetched: it trains nothing"
    if length is not None and length > LONG_UPDATE:
        yield f"sends an update {length:.3g} times as long as the median for its examples"
    if counted["rounds_against"] >= ROUNDS_AGAINST:
        yield (
            f"pulls against the other clients for {counted['rounds_against']} rounds running: are "
            "its labels exchanged?"
        )


class Rounds:
    """All rounds of one run. Any thread may call the public methods; `open`, then `run`, only one.

    folder           where state.json, history.csv, server_weight.h5 and a folder for each client
                     lie (pathlib.Path)
    state            a RunState: a new run's, or the one that state.json holds
    merge            merge(paths, num_examples) -> (SHA-256, updates): publishes server_weight.h5;
                     of each update {"update_length", "update_cosine"}, as `weights` says
    evaluate         evaluate() -> dict: metrics of server_weight.h5
    publish_result   publish_result(state, row) -> (dict, text): publishes what is known of the
                     evaluated round `row`, and the model if it is the best; what RunState.best says
                     then, and the scores in words, for the round's line in the log
    say              say(line): the server's log
    min_clients      how many uploads are enough once the time limit is over; None: all
    round_timeout_s  the time limit of a round; 0: none
    """

    def __init__(
        self,
        folder,
        state,
        merge,
        evaluate,
        publish_result,
        say,
        min_clients=None,
        round_timeout_s=0,
    ):
        self.folder = folder
        self.state = state
        self.merge = merge
        self.evaluate = evaluate
        self.publish_result = publish_result
        self.say = say
        self.say_of = log.OncePerMinute(say)  # for lines that one peer can cause again and again
        self.given_min_clients = min_clients
        self.round_timeout_s = round_timeout_s

        # One lock for all that follows. Whoever changes something notifies, and every waiting call
        # then looks for itself whether its wait is over.
        self.changed = threading.Condition()
        self.uploads = self._uploads_on_disk()  # client -> its accepted upload for the open round
        self.waiting = {}  # client -> a token of its newest waiting call: only that one is answered
        self.client_table = status.Clients(state.clients)  # who is where
        self.scores = {}  # client -> what it measured, for its upload of the open round
        self.is_first_merge = False  # of a frozen round: server_weight.h5 is what was fetched
        self.done_clients = set()  # that have the result, or all that they can use of it
        self.stop_reason = None  # a Refused for everyone, once no round can be closed any more
        self.opened_at = time.monotonic()  # when the round opened, or the server started again
        self.last_progress_at = time.monotonic()  # when a client last made progress

    @property
    def min_clients(self):
        return self.given_min_clients or len(self.state.clients)

    @property
    def weights_path(self):
        return self.folder / "server_weight.h5"

    def upload_path(self, client):
        return self.folder / client / "client_weights.h5"

    def verdict(self, client, run, round_number, sha256):
        """`verdict` of this run; with the stop reason before it."""
        with self.changed:
            self._check_running()
            all_required = self.min_clients >= len(self.state.clients)
            return verdict(self.state, all_required, client, run, round_number, sha256)

    def _check_running(self):
        if self.stop_reason:
            raise self.stop_reason

    def _save(self, **changes):
        """Publish the state with these changes. If the write fails, self.state is unchanged."""
        state = self.state.changed(**changes)
        state.save(self.folder / "state.json")
        self.state = state

    def _uploads_on_disk(self):
        """{client: upload} of the open round, as the files are.

        The state lists one upload for a client, or two where a crash interrupted a replacement.
        The SHA-256 of the file says which of them holds, or that none does.
        """
        found = {}
        for client, uploads in self.state.uploads.items():
            sha256 = sha256_of(self.upload_path(client))
            for upload in uploads:
                if upload["file_sha256"] == sha256:
                    found[client] = upload
        return found

    # --- the coordinator -------------------------------------------------------------------------

    def open(self):
        """Finish what a crash interrupted, before anyone is served."""
        lost = set(self.state.frozen or ()) - set(self.uploads)
        if lost:
            raise ValueError(
                f"round {self.state.round} was being merged, but the weights of "
                f"{', '.join(sorted(lost))} in {self.folder} are not those that were delivered: "
                "put them back, or begin with --fresh"
            )
        if self.state.frozen:
            self._merge_and_commit()
        if self.state.evaluated < self.state.round - 1:
            self._evaluate()
        # history.csv is there from the start on; clients.csv comes after the state, so it may lack
        # a round.
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, self.state.history)
        self._publish_scores()

    def change_clients(self, names):
        """From the open round on, these clients take part. After `open`, before anyone is served.

        names  sorted
        Raises ValueError where no round is open any more.
        """
        if names == self.state.clients:
            return
        if self.state.is_last_merged:
            raise ValueError(
                f"all {self.state.rounds} rounds of the run in {self.folder} are over, and the "
                "clients of an open round only can change: give more --rounds, or leave "
                "--clients out"
            )
        for client in sorted(set(self.uploads) - set(names)):
            path = self.upload_path(client)
            aside = first_free(path.parent, "client_weights-not-counted-{}.h5")
            path.rename(aside)
            self.say(
                f"{client} takes part no more: what it had delivered for round {self.state.round} "
                f"is not counted, and lies in {aside}"
            )
        stay = {name: each for name, each in self.state.uploads.items() if name in names}
        self._save(clients=names, uploads=stay)
        self.uploads = {name: each for name, each in self.uploads.items() if name in names}
        self.client_table = status.Clients(names)
        self.say(f"from round {self.state.round} on the clients are {', '.join(names)}")

    def run(self):
        """Close one round after the other until the last.

        Raises TooFewClients, Refused where `stop` was called, or what merge and evaluate raise.
        Every waiting call has then got its answer or a refusal.
        """
        try:
            while not self.state.is_last_merged:
                self.opened_at = time.monotonic()
                for step in (
                    self._wait_and_freeze,
                    self._merge_and_commit,
                    self._evaluate,
                    self._publish_scores,
                ):
                    self._retry_when_out_of_files(step)
        except TooFewClients as error:
            self.stop("UNAVAILABLE", str(error))
            raise
        except BaseException as error:
            self.stop(
                "INTERNAL",
                f"round {self.state.evaluated + 1} could not be closed: {type(error).__name__}: "
                f"{error}; what was delivered is kept, the server stops",
            )
            raise

    def stop(self, code, sentence):
        """End every waiting call, and each that still comes; the first sentence stays."""
        with self.changed:
            if self.stop_reason is None:
                self.stop_reason = Refused(code, sentence)
            self.changed.notify_all()

    def _wait_and_freeze(self):
        # One step, under one lock: a client that delivers again where no file can be opened may
        # lose its upload until it sends it once more. The round then waits for it again.
        with self.changed:
            self._wait_for_clients()
            self._freeze()

    def _wait_for_clients(self):
        """Wait for all clients, or for enough of them at the time limit."""
        limit = self.opened_at + (self.round_timeout_s or float("inf"))
        next_report = self.opened_at + REPORT_EVERY_S
        while len(self.uploads) < len(self.state.clients):
            self._check_running()
            now = time.monotonic()
            if now >= limit and len(self.uploads) < self.min_clients:
                raise TooFewClients(
                    f"round {self.state.round}: {self.describe()}; {len(self.uploads)} of at "
                    f"least {self.min_clients} clients after {self.round_timeout_s:g} s: the "
                    "server stops, its state is kept"
                )
            if now >= limit:
                break
            if now >= next_report:
                self.say(
                    f"round {self.state.round}: {self.describe()}; waiting for "
                    f"{now - self.opened_at:.0f} s"
                )
                next_report = now + REPORT_EVERY_S
            self.changed.wait(min(next_report, limit) - now)

    def _retry_when_out_of_files(self, step):
        """step(), and once more where this machine is out of open files, until they come back.

        That is nobody's fault in this run, and each step can be repeated: a crash may interrupt it
        as well.
        """
        while True:
            try:
                return step()
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    raise
                self.say(
                    f"round {self.state.evaluated + 1}: {error}; trying again until there are some"
                )
            with self.changed:
                self.changed.wait_for(lambda: self.stop_reason, RETRY_S)
                self._check_running()

    def _freeze(self):
        """From here on the set is fixed, and a crash cannot change it."""
        self.is_first_merge = True
        self._save(
            frozen=sorted(self.uploads),
            # Of a replaced upload only the entry that holds is kept.
            uploads={client: [upload] for client, upload in self.uploads.items()},
        )

    def describe(self):
        """'have client001; waiting for client002 (working, fetched 14 s ago)', or 'have all'."""
        missing = [client for client in self.state.clients if client not in self.uploads]
        if not missing:
            return "have all"
        have = "no uploads yet"
        if self.uploads:
            have = f"have {', '.join(sorted(self.uploads))}"
        waiting_for = [f"{name} ({self.client_table.in_words(name)})" for name in missing]
        return f"{have}; waiting for {'; '.join(waiting_for)}"

    def _merge_and_commit(self):
        """Merge the frozen uploads, then open the next round: from here on they are counted."""
        number = self.state.round
        names = self.state.frozen
        num_examples = [self.uploads[name]["num_examples"] for name in names]
        # Without the lock: a merge may take long, and repeats and disconnects go on meanwhile. The
        # freeze keeps the uploads as they are.
        paths = [self.upload_path(name) for name in names]
        is_first_merge, self.is_first_merge = self.is_first_merge, False
        weights_sha256, updates = self.merge(paths, num_examples)
        if not is_first_merge:  # the file may have been the merged one already
            updates = [{} for _ in names]
        with self.changed:
            merged = {
                "round": number,
                "clients": len(names),
                "missing": " ".join(sorted(set(self.state.clients) - set(names))),
                "num_examples": sum(num_examples),
            }
            counted = dict(self.state.counted)
            for name, update in zip(names, updates, strict=True):
                against = 0
                if (update.get("update_cosine") or 0) < 0:
                    against = counted.get(name, {}).get("rounds_against", 0) + 1
                update["rounds_against"] = against
                counted[name] = {"round": number, **self.uploads[name], **update}
            self._save(
                round=number + 1,
                weights_sha256=weights_sha256,
                merged=merged,
                uploads={},
                frozen=None,
                counted=counted,
            )
            self.uploads = {}
            self.scores = {}
            self.client_table.begin_round()
            self.changed.notify_all()
        for name in names:
            for remark in _remarks(counted[name]):
                self.say(f"round {number}: warning: {name} {remark}")

    def _evaluate(self):
        """Evaluate the merged weights, write the row of the history; then answer everyone."""
        row = {**self.state.merged, **self.evaluate()}
        row["seconds"] = time.monotonic() - self.opened_at
        history = [*self.state.history, row]
        best, in_words = self.publish_result(self.state, row)
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, history)
        with self.changed:
            self._save(history=history, best=best)
            without = f", without {row['missing']}" if row["missing"] else ""
            self.say(
                f"round {row['round']}/{self.state.rounds}: {in_words}  ({row['clients']} "
                f"clients{without}, {row['num_examples']} examples, {row['seconds']:.1f} s)"
            )
            self.changed.notify_all()

    def _publish_scores(self):
        """Add to clients.csv what the clients measured, and how their updates compare."""
        with self.changed:
            self._add_scores(
                # Its row is that of the weights which it fetched, the result of the round before:
                # it scores these, and its training begins with them.
                {**upload, **upload.get("scores", {}), "client": name, "round": upload["round"] - 1}
                for name, upload in sorted(self.state.counted.items())
            )

    def _add_scores(self, rows):
        """Add to clients.csv what is not there yet of these rows, by round and client.

        Where a finished run was extended, the scores of its result are there, and what the client's
        training in the next round adds to their row is not.
        """
        path = self.folder / "clients.csv"
        there = {}
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            if lines[:1] == [",".join(status.SCORES_COLUMNS)]:
                there = {(row["round"], row["client"]): row for row in csv.DictReader(lines)}
            else:  # another program wrote it
                path.rename(first_free(self.folder, "clients-not-read-{}.csv"))
        for row in rows:
            key = (str(row["round"]), row["client"])
            there[key] = row | {name: text for name, text in there.get(key, {}).items() if text}
        if there:
            publish_rows(path, status.SCORES_COLUMNS, there.values())

    # --- what the calls of clients use -----------------------------------------------------------

    def wake(self):
        """Let every waiting call look again: whether its caller is still there."""
        with self.changed:
            self.changed.notify_all()

    def fetch(self, client, alive=lambda: True):
        """The weights of the open round: (its number, their SHA-256, the open file).

        Waits while a round is being merged: nobody gets old weights under a new number. The file is
        opened under the same lock, so it belongs to the number even if the next merge replaces it.
        The result is handed out once it is evaluated: before that it has no model card.

        client  a peer that names itself, or None
        alive   alive() says whether someone still waits for the weights
        """
        with self.changed:
            if client is not None and client not in self.state.clients:
                raise Refused(
                    "PERMISSION_DENIED",
                    f"{client} takes part in this run no more (the server's --clients)",
                )
            while self.state.frozen or (self.state.is_last_merged and not self.state.is_over):
                self._check_running()
                if not alive():
                    raise Refused("CANCELLED", f"{client or 'a peer'} went away before the weights")
                self.changed.wait()
            self._check_running()
            if client is not None:
                self.client_table.note(client, {"phase": status.FETCHED})
            return self.state.round, self.state.weights_sha256, open(self.weights_path, "rb")

    def deliver(self, upload, alive):
        """Accept a complete, checked Upload; wait until its round is evaluated.

        alive  alive() says whether someone still waits for the answer
        Raises Refused.
        """
        client = upload.client
        with self.changed:
            found, round_number = self.verdict(
                client, upload.run, upload.round_number, upload.sha256
            )
            if found == REPEAT:
                upload.file.unlink(missing_ok=True)  # a call that waits holds no room on the disk
            elif client in self.uploads and not alive():
                # A late upload of a lost connection. The one that it would replace is newer: the
                # client sent that one again and waits for its answer.
                raise Refused("CANCELLED", f"{client} went away; its earlier upload stays")
            else:
                self._accept(upload)
            self._wait_for_answer(client, round_number, alive)
            is_old_peer = upload.run is None  # it ends with this answer; a new one fetches
            if is_old_peer and self.state.is_over and alive():
                self.done_clients.add(client)
                self.changed.notify_all()

    def _accept(self, upload):
        """Make it the client's upload for the open round.

        Write the state first, listing old and new upload, then rename the file; after a crash the
        file's SHA-256 says which entry holds. The other way round, a crash between the two would
        leave a file that no entry names: an upload lost that was there before.
        """
        client = upload.client
        new = {
            "num_examples": upload.num_examples,
            "sha256": upload.sha256,
            "file_sha256": upload.file_sha256,
        }
        old = self.uploads.get(client)
        # What it measured was told once, maybe to a server before this.
        scores = self.scores.get(client) or (old or {}).get("scores")
        if scores:
            new["scores"] = scores
        self._save(uploads={**self.state.uploads, client: [old, new] if old else [new]})
        try:
            publish(upload.file, self.upload_path(client))
        except BaseException:
            # The rename may be done although a later step failed: look which upload is there.
            # Where that fails, too, none counts until the client sends it again.
            self.uploads.pop(client, None)
            self.uploads = self._uploads_on_disk()
            raise
        self.uploads[client] = new
        again = " again, replacing its earlier upload" if old else ""
        self.say_of(
            (client, self.state.round, again),
            f"round {self.state.round}: {client} delivered {new['num_examples']} examples{again}; "
            f"{self.describe()}",
        )

    def _wait_for_answer(self, client, round_number, alive):
        """Return once the round is evaluated. Raises Refused where this call is not answered."""
        token = object()
        if self.state.evaluated < round_number and alive():
            self.waiting[client] = token  # an older call of this client sees that it is replaced
        self.changed.notify_all()
        while self.state.evaluated < round_number:
            if not alive():
                raise Refused("CANCELLED", f"{client} went away; what it delivered counts")
            if self.waiting[client] is not token:
                raise Refused(
                    "ABORTED",
                    f"{client} has delivered again on another connection, which gets the answer",
                )
            self._check_running()
            self.changed.wait()

    def hear(self, client, run, round_number, where, scores):
        """A client says where it is, and what it measured. Returns the open round's number.

        run, round_number  what it works for, as it says
        where              its phase, and dict of `status.WHERE`; the phase "done" is its last word
        scores             dict of `status.SCORES`, {} where it measured nothing
        """
        with self.changed:
            self.note_progress()
            self.client_table.note(client, where)
            is_result = self.state.is_over and round_number > self.state.rounds
            if run == self.state.run and is_result:
                if where["phase"] == "done":
                    self.done_clients.add(client)
                    self.changed.notify_all()
                if scores:  # last, for a full disk may refuse them
                    self._add_scores([{"round": self.state.rounds, "client": client, **scores}])
            elif run == self.state.run and scores and round_number == self.state.round:
                self.scores[client] = scores
            return self.state.round

    def note_progress(self):
        """Bytes move, or a client tells where it is: the end of the run waits for such."""
        self.last_progress_at = time.monotonic()

    def wait_until_all_done(self, timeout_s):
        """After the last round: until every client has the result, or none moved so long."""
        with self.changed:
            self.say("the run is over; waiting until every client has the result")
            self.note_progress()
            while not self.done_clients >= set(self.state.clients):
                left_s = self.last_progress_at + timeout_s - time.monotonic()
                if left_s <= 0:
                    missing = ", ".join(sorted(set(self.state.clients) - self.done_clients))
                    self.say(
                        f"{missing} has not said that it has the result, and nothing moved for "
                        f"{timeout_s:g} s"
                    )
                    return
                self.changed.wait(left_s)
