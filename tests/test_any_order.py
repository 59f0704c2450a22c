"""rounds, in any order: what the oracle says, and its bits.

Arrivals, repeats, changed bytes, late and early rounds, other runs, old peers, disconnects, held
merges, time limits, restarts, clients that leave and join, and crashes at any publish, over several
rounds.
"""

import csv
import errno
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conftest import (
    CLIENTS,
    DEADLINE_S,
    MEMORY,
    Call,
    Run,
    averaged,
    metrics,
    random_tensors,
    read_weights,
    same_bits,
    until,
    write_weights,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_verdict import Story

from common import files
from federation import rounds
from federation.rounds import NEW, REPEAT, Refused, TooFewClients
from federation.state import RunState


@cache
def digest(seed):
    with tempfile.TemporaryDirectory() as folder:
        return files.sha256_of(write_weights(Path(folder) / "upload.h5", seed))


class Oracle:
    """What the server must do, and where it must be. An upload is (num_examples, seed).

    Whether an upload counts, the oracle of test_verdict.py says.
    """

    def __init__(self, rounds, minimum):
        self.rounds = rounds
        self.given_minimum = minimum
        self.clients = list(CLIENTS)
        self.closed = []  # [{client: upload}, ...] of the merged rounds
        self.rows = []  # (round, clients, missing, num_examples) of these
        self.evaluated = 0
        self.frozen = False
        self.uploads = {}  # of the open round
        self.weights = random_tensors(1000)

    def __repr__(self):
        return str({name: value for name, value in vars(self).items() if name != "weights"})

    @property
    def round(self):
        return len(self.closed) + 1

    @property
    def minimum(self):
        return self.given_minimum or len(self.clients)

    @property
    def is_last_merged(self):
        return self.round > self.rounds

    @property
    def waits(self):
        """Whether the coordinator waits for uploads."""
        return not self.is_last_merged and not self.frozen and self.evaluated == self.round - 1

    @property
    def hands_out(self):
        """Whether a fetch is answered: not while a round merges, the result once it is scored."""
        return not self.frozen and (not self.is_last_merged or self.evaluated == self.rounds)

    def last_counted(self, client):
        """(round, upload) of the client's last merged upload, or None."""
        found = [(n, each[client]) for n, each in enumerate(self.closed, 1) if client in each]
        return found[-1] if found else None

    def change_clients(self, names):
        """From the open round on; what was frozen has been merged before."""
        self.clients = sorted(names)
        self.uploads = {name: each for name, each in self.uploads.items() if name in names}

    def deliver(self, client, upload, run, number):
        """(number of the round it is for, and "waits", "answered" or the status code)."""

        def seeds(uploads):
            return {name: seed for name, (_, seed) in uploads.items()}

        story = Story(
            [seeds(uploads) for uploads in self.closed],
            self.evaluated,
            seeds(self.uploads),
            self.frozen,
            self.clients,
            self.rounds,
        )
        all_required = self.minimum >= len(self.clients)
        found, number = story.expects(all_required, client, run, number, upload[1])
        if found == NEW:
            self.uploads[client] = upload
        elif found != REPEAT:
            return number, found
        return number, "answered" if number <= self.evaluated else "waits"

    def advance(self, merge, evaluate):
        """What the coordinator does now, as far as it is let."""
        self.frozen = self.frozen or (self.waits and len(self.uploads) == len(self.clients))
        if self.frozen and merge:
            self.weights = averaged(
                [(client, n, random_tensors(seed)) for client, (n, seed) in self.uploads.items()]
            )
            missing = " ".join(sorted(set(self.clients) - set(self.uploads)))
            num_examples = sum(n for n, _ in self.uploads.values())
            self.rows.append((self.round, len(self.uploads), missing, num_examples))
            self.closed.append(self.uploads)
            self.uploads = {}
            self.frozen = False
        if self.evaluated < self.round - 1 and evaluate:
            self.evaluated += 1
            self.advance(merge, evaluate)


class Killed(BaseException):
    """kill -9, as far as a thread can have it."""


@dataclass
class Delivery:
    """One call of a client, for the round with this number."""

    client: str
    number: int
    present: bool = True
    replaced: bool = False
    call: Call | None = None

    def alive(self):
        return self.present


class AnyOrder(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.now = 0.0  # rounds.py's clock
        self.real = (os.fsync, files.publish, rounds.publish, rounds.time, rounds.RETRY_S)
        os.fsync = lambda _: None  # a crash of the machine is not what is tried here
        files.publish = rounds.publish = self.publish
        rounds.time = self
        rounds.RETRY_S = 0.001
        self.fuse, self.burnt = None, False
        # Which publish of the coordinator fails, and whether "before" or "after" it is done.
        self.out_of_files = None

    def monotonic(self):
        return self.now

    def publish(self, written, path):
        if self.burnt:
            raise Killed
        if self.out_of_files and threading.current_thread() is self.run.coordinator.thread:
            number, when = self.out_of_files
            self.out_of_files = (number - 1, when) if number > 1 else None
            if when == "after" or number > 1:
                self.real[1](written, path)
            if number > 1:
                return
            raise OSError(errno.EMFILE, "Too many open files")
        if self.fuse:
            self.fuse = (self.fuse[0] - 1, self.fuse[1])
            self.burnt = self.fuse[0] == 0
        if not self.burnt or self.fuse[1] == "after":
            self.real[1](written, path)
        if self.burnt:
            raise Killed

    @initialize(number=st.integers(2, 4), minimum=st.sampled_from([1, 2, None, None]))
    def begin(self, number, minimum):
        limit = {"min_clients": minimum, "round_timeout_s": 60} if minimum else {}
        self.oracle = Oracle(number, minimum)
        self.gates = {"merge": True, "evaluate": True}
        self.deliveries, self.fetches = [], []
        self.run = Run(self.folder, CLIENTS, number, **limit)
        self.opened()

    def opened(self):
        """A new life of the server: its merge and evaluation are held while the gate is closed."""
        dead = self.dead = []

        def gated(name, inner):
            def step(*arguments):
                until(lambda: self.gates[name] or dead, f"{name} is let through", 10 * DEADLINE_S)
                if dead:
                    raise Killed
                self.now += 1
                return inner(*arguments)

            return step

        self.run.merge = gated("merge", self.run.average)
        self.run.evaluate = gated("evaluate", metrics)

    # --- what happens ---

    @rule(
        client=st.sampled_from(CLIENTS),
        num_examples=st.integers(1, 9),
        seed=st.integers(0, 2),
        peer=st.sampled_from(["new", "new", "silent", "unseen"]),
        what=st.sampled_from(
            ["fresh", "fresh", "fresh", "repeat", "repeat", "late", "early", "other run"]
        ),
    )
    def deliver(self, client, num_examples, seed, peer, what):
        number = self.oracle.round + {"late": -1, "early": 1}.get(what, 0)
        if what == "repeat" and self.oracle.last_counted(client):
            number, (num_examples, seed) = self.oracle.last_counted(client)
        number = None if peer == "unseen" else number
        run = None if peer != "new" else "other" if what == "other run" else "run0"
        if peer == "new":
            self.run.rounds.hear(client, run, number, {"phase": "waiting"}, {"auc": 0.5})
        for_round, expected = self.oracle.deliver(client, (num_examples, seed), run, number)
        delivery = Delivery(client, for_round)
        call = delivery.call = self.run.deliver(
            client, seed, num_examples, run, number, delivery.alive
        )
        if expected == "waits":
            for other in self.deliveries:
                other.replaced |= other.client == client and other.number > self.oracle.evaluated
            self.deliveries.append(delivery)
        elif expected == "answered":
            call.result()
        else:
            self.refused(call, expected)
        self.settle()

    @precondition(lambda self: self.oracle.frozen)
    @rule(
        client=st.sampled_from(CLIENTS),
        seed=st.integers(0, 2),
        peer=st.sampled_from(["new", "silent", "unseen"]),
    )
    def deliver_while_merging(self, client, seed, peer):
        self.deliver(client, 3, seed, peer, "fresh")

    @rule(
        clients=st.permutations(CLIENTS), seeds=st.lists(st.integers(0, 2), min_size=3, max_size=3)
    )
    def all_deliver_at_once(self, clients, seeds):
        """Without waiting for one another.

        Who had delivered repeats: a change would or would not be before the freeze.
        """
        if self.oracle.waits:
            for other in self.deliveries:
                other.replaced = True
            number = self.oracle.round
            uploads = dict(self.oracle.uploads)
            for client, seed in zip(clients, seeds, strict=True):
                if client not in self.oracle.clients:
                    continue
                upload = uploads.get(client, (seed + 1, seed))
                self.oracle.deliver(client, upload, "run0", number)
                delivery = Delivery(client, number)
                self.deliveries.append(delivery)
                delivery.call = self.run.deliver(
                    client, upload[1], upload[0], "run0", number, delivery.alive
                )
        self.settle(at_once=True)

    @rule(known=st.booleans())
    def fetch(self, known):
        self.fetches.append(Call(self.run.rounds.fetch, self.oracle.clients[0] if known else None))
        self.settle()

    @precondition(lambda self: self.deliveries)
    @rule(number=st.integers(0, 9))
    def somebody_goes_away(self, number):
        gone = self.deliveries.pop(number % len(self.deliveries))
        gone.present = False
        self.run.rounds.wake()
        self.refused(gone.call, "CANCELLED")
        self.settle()

    @rule(
        name=st.sampled_from(["merge", "evaluate"]),
        seeds=st.lists(st.integers(0, 2), min_size=3, max_size=3),
        complete=st.sampled_from([True, True, False]),
    )
    def hold(self, name, seeds, complete):
        """The merge or the evaluation takes long: of this round, or of the next complete one."""
        self.gates[name] = False
        if complete:
            self.all_deliver_at_once(CLIENTS, seeds)

    @rule(number=st.integers(1, 6), when=st.sampled_from(["before", "after"]))
    def run_out_of_files(self, number, when):
        """A publish of the coordinator fails: it tries again, and nobody notices."""
        self.out_of_files = (number, when)

    @precondition(lambda self: not all(self.gates.values()))
    @rule(name=st.sampled_from(["merge", "evaluate"]))
    def let_go(self, name):
        self.gates[name] = True
        self.settle()

    @precondition(lambda self: self.oracle.given_minimum)
    @rule(held=st.booleans())
    def time_is_over(self, held):
        self.gates["merge"] &= not held
        self.now += 61
        self.run.rounds.wake()
        if self.oracle.waits and len(self.oracle.uploads) < self.oracle.minimum:
            with pytest.raises(TooFewClients):
                self.run.coordinator.result()
            for delivery in self.deliveries:
                self.refused(delivery.call, "UNAVAILABLE")
            self.restart()
        elif self.oracle.waits:
            self.oracle.frozen = True
            self.settle()

    @rule(
        more=st.sampled_from([0, 0, 1]),
        clients=st.none() | st.lists(st.sampled_from(CLIENTS), min_size=2, unique=True),
    )
    def restart(self, more=0, clients=None):
        """kill -9, and started again; --rounds extends a finished run, --clients names others."""
        self.dead.append(True)
        self.run.stop()
        for call in [delivery.call for delivery in self.deliveries] + self.fetches:
            call.thread.join(DEADLINE_S)
            assert call.ended
        self.deliveries, self.fetches = [], []
        self.gates = {"merge": True, "evaluate": True}
        self.fuse, self.burnt, self.out_of_files = None, False, None
        self.opened()
        if self.oracle.rounds < 5:
            self.oracle.rounds += more
        self.oracle.advance(merge=True, evaluate=True)  # all that is frozen, with the old clients
        if clients and not self.oracle.is_last_merged:
            self.oracle.change_clients(clients)
        self.run.start(rounds=self.oracle.rounds, clients=self.oracle.clients)
        self.settle()

    @rule(
        client=st.sampled_from(CLIENTS),
        num_examples=st.integers(1, 9),
        seed=st.integers(0, 2),
        publishes=st.sampled_from([1, 1, 2, 2, 3, 4, 5, 6, 7, 8]),
        when=st.sampled_from(["before", "after"]),
        replace=st.booleans(),
    )
    def crash_while_delivering(self, client, num_examples, seed, publishes, when, replace):
        """The server dies at a publish of this delivery, or of the round that it closes."""
        if replace and self.oracle.uploads:
            client = min(self.oracle.uploads)
        elif client not in self.oracle.clients:
            client = self.oracle.clients[0]
        self.gates = {"merge": True, "evaluate": True}
        self.settle()
        before = self.oracle.uploads.get(client)
        self.fuse = (publishes, when)
        call = self.run.deliver(client, seed, num_examples)
        until(lambda: self.burnt or call.ended or self.quiet(client, seed), "it died, or did not")
        self.dead.append(True)
        self.run.stop()
        self.fuse, self.burnt = None, False
        call.thread.join(DEADLINE_S)
        # accepted, or as if it had never come: what is on disk says which; there is no third
        state = RunState.load(self.folder / "state.json")
        there = files.sha256_of(self.run.rounds.upload_path(client)) == digest(seed)
        named = (num_examples, digest(seed)) in [
            (upload["num_examples"], upload["sha256"]) for upload in state.uploads.get(client, [])
        ]
        accepted = state.round > self.oracle.round or (there and named)
        if accepted and not self.oracle.is_last_merged:
            self.oracle.deliver(client, (num_examples, seed), "run0", self.oracle.round)
        else:
            assert self.oracle.uploads.get(client) == before
        self.restart()

    def quiet(self, client, seed):
        """Whether the delivery is counted and more are awaited."""
        there = self.run.rounds.uploads
        return (
            client in there
            and len(there) < len(self.oracle.clients)
            and self.run.rounds.waiting.get(client) is not None
        )

    # --- and what must hold ---

    def refused(self, call, code):
        with pytest.raises(Refused) as caught:
            call.result()
        assert caught.value.code == code, caught.value

    def settle(self, at_once=False):
        """The server gets where the oracle is; the calls that it says have ended, and no other."""
        oracle, run = self.oracle, self.run
        oracle.advance(self.gates["merge"], self.gates["evaluate"])

        def where():
            state = run.rounds.state
            uploads = {
                client: (upload["num_examples"], upload["sha256"])
                for client, upload in run.rounds.uploads.items()
            }
            return state.round, state.evaluated, bool(state.frozen), uploads

        expected = {client: (n, digest(seed)) for client, (n, seed) in oracle.uploads.items()}
        until(
            lambda: where() == (oracle.round, oracle.evaluated, oracle.frozen, expected),
            lambda: (
                f"the server is at {where()}, the oracle at {oracle}; "
                f"{run.said}, {run.coordinator.error}"
            ),
            20,
        )
        if oracle.waits:
            until(lambda: run.rounds.opened_at == self.now, "the round is open", 20)
        for delivery in list(self.deliveries):
            if delivery.replaced and at_once:  # aborted, or answered just before
                delivery.call.thread.join(DEADLINE_S)
                assert delivery.call.ended and (
                    delivery.call.error is None or delivery.call.error.code == "ABORTED"
                )
                self.deliveries.remove(delivery)
            elif delivery.replaced:
                self.refused(delivery.call, "ABORTED")
                self.deliveries.remove(delivery)
            elif delivery.number <= oracle.evaluated:
                delivery.call.result()
                self.deliveries.remove(delivery)
            else:
                assert not delivery.call.ended, (delivery.call.value, delivery.call.error)
        if not oracle.hands_out:
            assert not any(call.ended for call in self.fetches)
        else:
            for call in self.fetches:
                number, sha256, file = call.result()
                with file:
                    assert (number, sha256) == (oracle.round, files.sha256_of(run.weights))
            self.fetches = []
        if not oracle.frozen:
            assert same_bits(read_weights(run.weights), oracle.weights)
        state = RunState.load(self.folder / "state.json")
        assert state.round == oracle.round and bool(state.frozen) == oracle.frozen
        rows = [
            (row["round"], row["clients"], row["missing"], row["num_examples"])
            for row in state.history
        ]
        assert rows == oracle.rows[: oracle.evaluated]
        assert (self.folder / "history.csv").read_text().count("\n") == 1 + oracle.evaluated
        self.check_scores()
        for client, (_, seed) in oracle.uploads.items():
            assert files.sha256_of(run.rounds.upload_path(client)) == digest(seed)

    def check_scores(self):
        """clients.csv has a client once a round, and nothing of a round that is not evaluated."""
        path = self.folder / "clients.csv"
        if path.exists():
            with open(path, newline="") as file:
                found = [(int(row["round"]), row["client"]) for row in csv.DictReader(file)]
            assert len(set(found)) == len(found), found
            assert all(number <= self.run.rounds.state.evaluated for number, _ in found), found

    def teardown(self):
        """The run goes on to its end, and everyone gets an answer."""
        try:
            if hasattr(self, "run"):
                self.finish()
        finally:
            self.dead.append(True)
            self.run.stop()
            os.fsync, files.publish, rounds.publish, rounds.time, rounds.RETRY_S = self.real
            shutil.rmtree(self.folder)

    def finish(self):
        self.gates = {"merge": True, "evaluate": True}
        self.settle()
        while not self.oracle.is_last_merged:
            for client in self.oracle.clients:
                if client not in self.oracle.uploads:
                    self.deliver(client, 5, 1, "new", "fresh")
        self.run.coordinator.result()
        left = Call(self.run.rounds.wait_until_all_done, 60)
        for client in self.oracle.clients:
            self.run.rounds.fetch(client)[2].close()
            number = self.oracle.rounds + 1
            self.run.rounds.hear(client, "run0", number, {"phase": "done"}, {})
        left.result(20)


def run_machine(examples, **options):
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],
            **options,
        ),
    )  # a failure that is a wait shrinks for hours


def test_any_order():
    run_machine(45, derandomize=True, database=None)


@pytest.mark.slow
def test_any_order_for_long():
    run_machine(400)
