"""The rounds of a run: the barrier, the freeze, the merge, the answers. Standard library only.

Threads meet here. Each client's call stands in `deliver` until its round is over; one coordinator
thread, in `run`, closes a round as soon as all uploads are there. Merging and evaluating are handed
in, so nothing here knows about weights or images.

What is published in which order, and what a start does after a crash, stands in `federation.state`.
"""

import errno
import threading
import time

from common.files import first_free, publish, publish_rows, sha256_of
from federation import progress
from federation.state import file_sha256_of, new_upload

HISTORY_COLUMNS = (
    "round,loss,accuracy,auc,sensitivity,specificity,clients,missing,num_examples,seconds"
).split(",")
REPORT_EVERY_S = 30  # how often the server says for whom it waits
RETRY_S = 1  # how soon a step is tried again for which no file could be opened
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # of this process, of this machine


class Refused(Exception):
    """A call that is not served: the name of a gRPC status code, and a sentence for its caller."""

    def __init__(self, code, sentence):
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class TooFewClients(Exception):
    """--round-timeout is over, and fewer than --min-clients uploads are there."""


class Rounds:
    """All rounds of one run. Any thread may call the public methods; `open`, then `run`, only one.

    folder           where state.json, history.csv, server_weight.h5 and a folder for each client
                     lie (pathlib.Path)
    state            a RunState: a new run's, or the one that state.json holds
    merge            merge(paths, num_examples) -> SHA-256: publishes server_weight.h5
    evaluate         evaluate() -> dict: metrics of server_weight.h5
    publish_result   publish_result(state, row) -> dict: publishes what is known of the evaluated
                     round `row`, and the model if it is the best; what RunState.best says then
    min_clients      how many uploads are enough once the time limit is over; None: all
    round_timeout_s  the time limit of a round; 0: none
    say              say(line): the server's log
    """

    def __init__(
        self,
        folder,
        state,
        merge,
        evaluate,
        min_clients=None,
        round_timeout_s=0,
        say=print,
        publish_result=lambda state, row: None,
    ):
        self.folder = folder
        self.state = state
        self.merge = merge
        self.evaluate = evaluate
        self.publish_result = publish_result
        self.given_min_clients = min_clients
        self.round_timeout_s = round_timeout_s
        self.say = say

        # One lock for all that follows. Whoever changes something notifies, and every waiting call
        # then looks for itself whether its wait is over.
        self.changed = threading.Condition()
        self.uploads = self._uploads_on_disk()  # client -> its accepted upload for the open round
        self.waiting = {}  # client -> a token of its newest waiting call: only that one is answered
        self.last_seen = {}  # client -> time.monotonic()
        self.heard = {}  # client -> (time.monotonic(), progress), what it said of itself
        self.finished = set()  # clients that have the result, or all that they can use of it
        self.over = None  # a Refused for everyone, once no round can be closed any more
        self.opened = time.monotonic()  # when the round opened, or the server started again
        self.moved = time.monotonic()  # when a client last made progress, at the end of the run

    # --- what the state says ---------------------------------------------------------------------

    @property
    def clients(self):
        return self.state.clients

    @property
    def min_clients(self):
        return self.given_min_clients or len(self.clients)

    @property
    def round(self):
        return self.state.round

    @property
    def done(self):
        """Whether the last round is merged (its evaluation may still run)."""
        return self.state.is_over

    @property
    def is_evaluating_last(self):
        return self.done and self.answered < self.state.rounds

    @property
    def answered(self):
        """The last round whose uploads may be answered with 1."""
        return self.state.evaluated

    @property
    def weights_path(self):
        return self.folder / "server_weight.h5"

    def upload_path(self, client):
        return self.folder / client / "client_weights.h5"

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
                if file_sha256_of(upload) == sha256:
                    found[client] = upload
        return found

    # --- the coordinator -------------------------------------------------------------------------

    def open(self):
        """Finish what a crash interrupted, before anyone is served."""
        lost = set(self.state.frozen or ()) - set(self.uploads)
        if lost:
            raise ValueError(
                f"round {self.round} was being merged, but the weights of {', '.join(sorted(lost))}"
                f" in {self.folder} are not those that were delivered: put them back, or begin with"
                " --fresh"
            )
        if self.state.frozen:
            self._merge_and_commit()
        if self.answered < self.round - 1:
            self._evaluate()
        # The crash may have come between the last state and its history.csv.
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, self.state.history)
        self._publish_scores()

    def change_clients(self, names):
        """From the open round on, these clients take part. After `open`, before anyone is served.

        names  sorted
        Raises ValueError where no round is open any more.
        """
        joined = sorted(set(names) - set(self.clients))
        left = sorted(set(self.clients) - set(names))
        if joined or left:
            if self.done:
                raise ValueError(
                    f"all {self.state.rounds} rounds of the run in {self.folder} are over, and the "
                    "clients of an open round only can change: give more --rounds, or leave "
                    "--clients out"
                )
            change = {"round": self.round, "joined": joined, "left": left}
            stay = {name: each for name, each in self.state.uploads.items() if name in names}
            self._save(clients=names, uploads=stay, membership=[*self.state.membership, change])
            self.uploads = {name: each for name, each in self.uploads.items() if name in names}
            if joined:
                self.say(f"{', '.join(joined)} joined in round {self.round}")
            if left:
                self.say(f"{', '.join(left)} left in round {self.round}")
        self._move_uncounted_aside()

    def _move_uncounted_aside(self):
        """Of clients that left: an upload that no round counts. A crash may have come before it."""
        for client, round_number in self.state.left.items():
            path = self.upload_path(client)
            sha256 = sha256_of(path)
            counted = self.state.counted.get(client)
            if not sha256 or (counted and file_sha256_of(counted) == sha256):
                continue
            aside = first_free(path.parent, "client_weights-not-counted-{}.h5")
            path.rename(aside)
            self.say(
                f"{client} left in round {round_number}: what it had delivered for it is not "
                f"counted, and lies in {aside}"
            )

    def check_has_not_left(self, client):
        """Raises Refused for a client that took part once, and does no more."""
        if client in self.state.left:
            raise Refused(
                "PERMISSION_DENIED",
                f"{client} left in round {self.state.left[client]} (the server's --clients), so "
                "there is nothing for it to do any more",
            )

    def run(self):
        """Close one round after the other until the last.

        Raises TooFewClients, Refused where `stop` was called, or what merge and evaluate raise.
        Every waiting call has then got its answer or a refusal.
        """
        try:
            while not self.done:
                self._wait_for_clients()
                for step in (self._freeze, self._merge_and_commit, self._evaluate):
                    self._do(step)
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
        """End every waiting call, and each that still comes; the first sentence stays."""
        with self.changed:
            if self.over is None:
                self.over = Refused(code, sentence)
            self.changed.notify_all()

    def _wait_for_clients(self):
        """Wait for all clients, or for enough of them at the time limit."""
        self.opened = time.monotonic()
        reported = self.opened
        limit = float("inf")
        if self.round_timeout_s:
            limit = self.opened + self.round_timeout_s
        with self.changed:
            while len(self.uploads) < len(self.clients):
                if self.over:
                    raise self.over
                now = time.monotonic()
                if now >= limit:
                    self._check_enough_clients()
                    break
                if now - reported >= REPORT_EVERY_S:
                    waited_s = now - self.opened
                    self.say(f"round {self.round}: {self.describe()}; waiting for {waited_s:.0f} s")
                    reported = now
                next_event = min(reported + REPORT_EVERY_S, limit)
                self.changed.wait(max(0.01, next_event - now))

    def _do(self, step):
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
                self.say(f"round {self.answered + 1}: {error}; trying again until there are some")
            with self.changed:
                if self.changed.wait_for(lambda: self.over, RETRY_S):
                    raise self.over

    def _freeze(self):
        """From here on the set is fixed, and a crash cannot change it."""
        with self.changed:
            self._save(
                frozen=sorted(self.uploads),
                # Of a replaced upload only the entry that holds is kept.
                uploads={client: [upload] for client, upload in self.uploads.items()},
            )

    def _check_enough_clients(self):
        """Raises TooFewClients where the time limit is over without --min-clients uploads."""
        if len(self.uploads) < self.min_clients:
            raise TooFewClients(
                f"round {self.round}: {self.describe()}; {len(self.uploads)} of at least "
                f"{self.min_clients} clients after {self.round_timeout_s:g} s: the server stops, "
                "its state is kept"
            )

    def describe(self):
        """'have client001, client003; waiting for client002, last seen 14 s ago', or 'have all'."""
        missing = [client for client in self.clients if client not in self.uploads]
        if not missing:
            return "have all"
        have = "no uploads yet"
        if self.uploads:
            have = f"have {', '.join(sorted(self.uploads))}"
        return f"{have}; waiting for {'; '.join(map(self._when_seen, missing))}"

    def _when_seen(self, client):
        if client in self.heard:
            heard, told = self.heard[client]
            quiet_s = time.monotonic() - heard
            if quiet_s > progress.QUIET_S:
                return f"{client} (not heard for {progress.duration(quiet_s)})"
            return f"{client} ({progress.in_words(told)}, heard {quiet_s:.0f} s ago)"
        seen = self.last_seen.get(client)
        if seen is None:
            return f"{client}, not seen yet"
        return f"{client}, last seen {time.monotonic() - seen:.0f} s ago"

    def _merge_and_commit(self):
        """Merge the frozen uploads, then open the next round: from here on they are counted."""
        started = time.monotonic()
        number = self.round
        names = self.state.frozen
        num_examples = [self.uploads[name]["num_examples"] for name in names]
        # Without the lock: a merge may take long, and repeats and disconnects go on meanwhile. The
        # freeze keeps the uploads as they are.
        weights_sha256 = self.merge([self.upload_path(name) for name in names], num_examples)
        with self.changed:
            closing = {
                **self._who_came_and_went(number),
                "round": number,
                "clients": len(names),
                "missing": " ".join(sorted(set(self.clients) - set(names))),
                "num_examples": sum(num_examples),
                "wait_seconds": started - self.opened,
                "merge_seconds": time.monotonic() - started,
            }
            counted = dict(self.state.counted)
            for name, upload in self.uploads.items():
                counted[name] = {"round": number, **upload}
                # The next round's waiting is not told by what a client said in this one.
                self.heard.pop(name, None)
            client_scores = [
                *self.state.client_scores,
                # A client scores the weights that it fetched, the result of the round before.
                *(
                    _scores_row(number - 1, name, upload)
                    for name, upload in sorted(self.uploads.items())
                    if upload.get("metrics")
                ),
            ]
            self._save(
                client_scores=client_scores,
                round=number + 1,
                weights_sha256=weights_sha256,
                closing=closing,
                uploads={},
                frozen=None,
                counted=counted,
            )
            self.uploads = {}
            self._publish_scores()
            self.changed.notify_all()

    def _who_came_and_went(self, round_number):
        """For a row of the history: {"joined": "client004", "left": "client002"}, if any did."""
        told = {}
        for what in ("joined", "left"):
            changes = [each for each in self.state.membership if each["round"] == round_number]
            names = sorted({name for change in changes for name in change[what]})
            if names:
                told[what] = " ".join(names)
        return told

    def _publish_scores(self):
        """server/clients.csv, whole from the state; none where no client measures anything."""
        if self.state.client_scores:
            publish_rows(
                self.folder / "clients.csv", progress.SCORES_COLUMNS, self.state.client_scores
            )

    def _evaluate(self):
        """Evaluate the merged weights, write the row of the history; then answer everyone."""
        started = time.monotonic()
        row = {**self.state.closing, **self.evaluate()}
        now = time.monotonic()
        row["evaluate_seconds"] = now - started
        row["seconds"] = now - self.opened
        history = [*self.state.history, row]
        best = self.publish_result(self.state, row)
        publish_rows(self.folder / "history.csv", HISTORY_COLUMNS, history)
        with self.changed:
            self._save(history=history, best=best)
            self.say(self._round_line(row))
            self.changed.notify_all()

    def _round_line(self, row):
        without = ""
        if row["missing"]:
            without = f", without {row['missing']}"
        return (
            f"round {row['round']}/{self.state.rounds}: loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.3f}  AUC {row['auc']:.3f}  "
            f"sensitivity {row['sensitivity']:.3f}  specificity {row['specificity']:.3f}  "
            f"({row['clients']} clients{without}, {row['num_examples']} examples, "
            f"{row['seconds']:.1f} s)"
        )

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
            self.check_has_not_left(client)
            while (self.state.frozen or self.is_evaluating_last) and not self.over:
                if not alive():
                    raise Refused("CANCELLED", f"{client or 'a peer'} went away before the weights")
                self.changed.wait()
            if self.over:
                raise self.over
            return self.round, self.state.weights_sha256, open(self.weights_path, "rb")

    def admit(self, client, run, round_number, sha256):
        """Refuse an upload that cannot count, before a byte of it is received.

        A peer that names no run, or announces no SHA-256, is judged in `deliver`.
        """
        with self.changed:
            if run is not None and sha256 is not None:
                self._is_repeat(client, run, round_number, sha256)

    def deliver(
        self,
        client,
        num_examples,
        sha256,
        written,
        run,
        round_number,
        alive,
        file_sha256=None,
        metrics=None,
    ):
        """Accept a complete, checked upload that lies in the file `written`; wait for its round.

        sha256             of what was sent
        file_sha256        of what lies in the file, where that was converted
        run, round_number  as the peer names them; None where unknown
        alive              alive() says whether someone still waits for the answer
        metrics            what the client measured (dict), as progress.METRICS_LIMITS names it
        Returns whether that was the last of all rounds. Raises Refused.
        """
        with self.changed:
            if round_number is None:
                round_number = self._round_of_silent_peer(client, sha256)
            if self._is_repeat(client, run, round_number, sha256):
                written.unlink(missing_ok=True)  # a call that waits holds no room on the disk
            else:
                if client in self.uploads and not alive():
                    # A late upload of a lost connection. The one that it would replace is newer:
                    # the client sent that one again and waits for its answer.
                    raise Refused("CANCELLED", f"{client} went away; its earlier upload stays")
                upload = new_upload(num_examples, sha256, file_sha256 or sha256, metrics)
                self._accept(client, upload, written)
            self._wait_for_answer(client, round_number, alive)
            done = self.done
            is_old_peer = run is None  # it ends with this answer; a new one fetches the result
            if done and is_old_peer and alive():
                self.leave(client)
            return done

    def _wait_for_answer(self, client, round_number, alive):
        """Return once the round is evaluated. Raises Refused where this call is not answered."""
        token = object()
        if self.answered < round_number and alive():
            self.waiting[client] = token  # an older call of this client sees that it is replaced
        self.changed.notify_all()
        while self.answered < round_number:
            if not alive():
                raise Refused("CANCELLED", f"{client} went away; what it delivered counts")
            if self.waiting[client] is not token:
                raise Refused(
                    "ABORTED",
                    f"{client} has delivered again on another connection, which gets the answer",
                )
            if self.over:
                raise self.over
            self.changed.wait()

    def note_heard(self, client, told):
        """A client said where it is. told: from progress.parse_progress."""
        with self.changed:
            self.heard[client] = (time.monotonic(), told)
            self.note_progress()
            self.changed.notify_all()

    @property
    def reports(self):
        """What clients said of themselves: {client: progress and "heard", time.time() of then}."""
        now = time.monotonic()
        return {
            client: {**told, "heard": time.time() - (now - heard)}
            for client, (heard, told) in list(self.heard.items())
        }

    def will_score_result(self, client):
        """Whether a client that has fetched the result will say how it scores it.

        Whoever scored what it fetched before its last upload does.
        """
        has_scored = "examples" in self.state.counted.get(client, {}).get("metrics", {})
        return has_scored and not self._has_scored_result(client)

    def _has_scored_result(self, client):
        last = self.state.rounds
        return any(
            row["client"] == client and row["round"] == last for row in self.state.client_scores
        )

    def note_result_scores(self, client, metrics):
        """A client says how the result scores on its own images: all that it stayed for."""
        with self.changed:
            if metrics and not self._has_scored_result(client):
                row = _scores_row(self.state.rounds, client, {"metrics": metrics})
                self._save(client_scores=[*self.state.client_scores, row])
                self._publish_scores()
                self.say(f"{client} scored the result: {_in_words(metrics)}")
            self.leave(client)

    def leave(self, client):
        """A client has all that it came for: the result, or of an old peer its last answer."""
        with self.changed:
            self.finished.add(client)
            self.changed.notify_all()

    def note_progress(self):
        """A client is still moving: the end of the run waits for it."""
        self.moved = time.monotonic()

    def wait_until_all_left(self, timeout_s):
        """After the last round: until every client has left, or none moved for `timeout_s`."""
        with self.changed:
            self.say("the run is over; waiting until every client has fetched the result")
            self.note_progress()
            while not self.finished >= set(self.clients):
                left_s = self.moved + timeout_s - time.monotonic()
                if left_s <= 0:
                    missing = ", ".join(sorted(set(self.clients) - self.finished))
                    self.say(f"{missing} did not fetch the result within {timeout_s:g} s")
                    return
                self.changed.wait(left_s)

    def _round_of_silent_peer(self, client, sha256):
        """The round of an upload by a peer that names none, and was not seen to fetch.

        That happens when the server was restarted in between. Equal bytes are then a repeat of what
        was counted. Only here may the bytes alone decide: a client whose training changes nothing
        sends the same bytes every round.
        """
        counted = self.state.counted.get(client)
        if counted and counted["sha256"] == sha256:
            return counted["round"]
        self.check_has_not_left(client)
        if self.min_clients < len(self.clients):
            # A round may have been closed without this client: its upload may be for that one.
            raise Refused(
                "FAILED_PRECONDITION",
                f"{client} did not fetch on this connection, so its round is unknown: fetch, "
                f"then send; the open round is {self.round}",
            )
        return self.round

    def _is_repeat(self, client, run, round_number, sha256):
        """Whether the server has this very upload already, and only an answer is due.

        False: it is new, and for the open round. Raises Refused for what cannot count.
        """
        if self.over:
            raise self.over
        is_this_run = run in (None, self.state.run)
        counted = self.state.counted.get(client)
        same = counted and counted["round"] == round_number and counted["sha256"] == sha256
        if same and is_this_run:
            return True
        self.check_has_not_left(client)
        if not is_this_run:
            raise self._not_for_now(client, f"run {run[:40]!r}")
        if round_number < self.round:
            raise self._not_for_now(client, f"round {round_number}, which is over")
        if round_number > self.round or self.done:
            raise self._not_for_now(client, f"round {round_number}, which is not open")
        if not self.state.frozen:
            return False
        if client in self.uploads and self.uploads[client]["sha256"] == sha256:
            return True
        raise self._not_for_now(client, f"round {round_number}, which is over (being merged)")

    def _not_for_now(self, client, what):
        return Refused(
            "FAILED_PRECONDITION",
            f"{client} delivers for {what}; the server is in run {self.state.run}, "
            f"round {self.round}: fetch again",
        )

    def _accept(self, client, upload, written):
        """Make the upload in the file `written` the client's upload for the open round.

        Write the state first, listing old and new upload, then rename the file; after a crash the
        file's SHA-256 says which entry holds. The other way round, a crash between the two would
        leave a file that no entry names: an upload lost that was there before.
        """
        old = self.uploads.get(client)
        same_bytes = old is not None and file_sha256_of(old) == file_sha256_of(upload)
        listed = [upload]
        if old is not None and not same_bytes:
            listed = [old, upload]
        self._save(uploads={**self.state.uploads, client: listed})
        if not same_bytes:
            try:
                publish(written, self.upload_path(client))
            except BaseException:
                # The rename may be done although a later step failed: look which upload is there.
                self.uploads = self._uploads_on_disk()
                raise
        self.uploads[client] = upload
        again = ""
        if same_bytes:
            again = " again, the same weights"
        elif old is not None:
            again = " again, replacing its earlier upload"
        self.say(
            f"round {self.round}: {client} delivered {upload['num_examples']} examples{again}; "
            f"{self.describe()}"
        )


def _scores_row(round_number, client, upload):
    """A row of clients.csv; what was not measured is empty."""
    empty = dict.fromkeys(progress.SCORES_COLUMNS, "")
    row = {"round": round_number, "client": client, "num_examples": upload.get("num_examples", "")}
    return {**empty, **row, **upload["metrics"]}


def _in_words(metrics):
    """'examples 60, loss 0.31, auc 0.9'."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
