"""rounds, in any order: the server does what an oracle says, and has its bits.

Arrivals, repeats, changed bytes, late and early rounds, other runs, old peers, disconnects, held
merges, time limits, restarts, clients that leave and join, over several rounds. A crash within a
step is `test_kill.py`.
"""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conftest import (
    CLIENTS,
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

from common import files
from federation import rounds
from federation.rounds import Refused, TooFewClients
from federation.state import RunState


@cache
def digest(seed):
    with tempfile.TemporaryDirectory() as folder:
        return files.sha256_of(write_weights(Path(folder) / "upload.h5", seed))


def end_of(call):
    """Waits for it: "answered", or the status code of its refusal."""
    try:
        call.result()
    except Refused as error:
        return error.code
    return "answered"


class Oracle:
    """The run as people would remember it: who delivered what in which round.

    An upload is (num_examples, seed). Written from the promises, not from the table of the verdict.
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
        """(round, upload) of the client's last merged upload; (None, None) where there is none."""
        found = [(n, each[client]) for n, each in enumerate(self.closed, 1) if client in each]
        return found[-1] if found else (None, None)

    def deliver(self, client, upload, run, number):
        """(number of the round it is for, and "waits", "answered" or the status code)."""
        last, counted = self.last_counted(client)
        is_last = counted is not None and counted[1] == upload[1]
        if number is None:
            if not is_last and self.minimum < len(self.clients):
                return None, "FAILED_PRECONDITION"
            number = last if is_last else self.round
        is_open = run != "other" and number == self.round and not self.is_last_merged
        if run != "other" and is_last and number == last:
            pass  # what was counted stays answered
        elif client not in self.clients:
            return number, "PERMISSION_DENIED"
        elif not is_open:
            return number, "FAILED_PRECONDITION"
        elif not self.frozen:
            self.uploads[client] = upload
        elif client not in self.uploads or self.uploads[client][1] != upload[1]:
            return number, "FAILED_PRECONDITION"
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


SEEDS = st.integers(0, 2)


class AnyOrder(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.now = 0.0  # rounds.py's clock
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(rounds, "time", self)

    def monotonic(self):
        return self.now

    @initialize(number=st.integers(2, 4), minimum=st.sampled_from([1, 2, None, None]))
    def begin(self, number, minimum):
        limit = {"min_clients": minimum, "round_timeout_s": 60} if minimum else {}
        self.oracle = Oracle(number, minimum)
        self.run = Run(self.folder, CLIENTS, number, **limit)
        self.opened()

    def opened(self):
        """A new life of the server: its merge and evaluation are held while the gate is closed."""
        dead = self.dead = []
        self.gates = {"merge": True, "evaluate": True}
        self.deliveries, self.fetches = [], []

        def gated(name, inner):
            def step(*arguments):
                until(lambda: self.gates[name] or dead, f"{name} is let through", 600)
                if dead:
                    raise SystemExit
                self.now += 1
                return inner(*arguments)

            return step

        self.run.merge = gated("merge", self.run.average)
        self.run.evaluate = gated("evaluate", metrics)

    # --- what happens ---

    def begin_call(self, client, upload, run, number):
        """(the delivery, what the oracle says of it)."""
        for_round, expected = self.oracle.deliver(client, upload, run, number)
        delivery = Delivery(client, for_round)
        if expected == "waits":
            for other in self.deliveries:
                other.replaced |= other.client == client and other.number > self.oracle.evaluated
            self.deliveries.append(delivery)
        num_examples, seed = upload
        delivery.call = self.run.deliver(client, seed, num_examples, run, number, delivery.alive)
        return delivery, expected

    @rule(
        client=st.sampled_from(CLIENTS),
        upload=st.tuples(st.integers(1, 9), SEEDS),
        peer=st.sampled_from(["new", "new", "silent", "unseen"]),
        what=st.sampled_from(["fresh"] * 3 + ["repeat"] * 2 + ["late", "early", "other run"]),
    )
    def deliver(self, client, upload, peer, what):
        number = self.oracle.round + {"late": -1, "early": 1}.get(what, 0)
        if what == "repeat" and self.oracle.last_counted(client)[0]:
            number, upload = self.oracle.last_counted(client)
        number = None if peer == "unseen" else number
        run = None if peer != "new" else "other" if what == "other run" else "run0"
        delivery, expected = self.begin_call(client, upload, run, number)
        if expected != "waits":
            assert end_of(delivery.call) == expected
        self.settle()

    @rule(clients=st.permutations(CLIENTS), seeds=st.lists(SEEDS, min_size=3, max_size=3))
    def all_deliver_at_once(self, clients, seeds):
        """Without waiting for one another.

        Who had delivered repeats: a change would or would not be before the freeze.
        """
        if self.oracle.waits:
            number = self.oracle.round
            for client, seed in zip(clients, seeds, strict=True):
                if client in self.oracle.clients:
                    upload = self.oracle.uploads.get(client, (seed + 1, seed))
                    self.begin_call(client, upload, "run0", number)
        self.settle()

    @rule(known=st.booleans())
    def fetch(self, known):
        client = self.oracle.clients[0] if known else None
        self.fetches.append(Call(self.run.rounds.fetch, client))
        if not self.oracle.hands_out:  # who does not wait any more holds nothing
            assert end_of(Call(self.run.rounds.fetch, client, lambda: False)) == "CANCELLED"
        self.settle()

    @precondition(lambda self: self.deliveries)
    @rule(number=st.integers(0, 9))
    def somebody_goes_away(self, number):
        gone = self.deliveries.pop(number % len(self.deliveries))
        gone.present = False
        self.run.rounds.wake()
        assert end_of(gone.call) == "CANCELLED"
        self.settle()

    @rule(
        name=st.sampled_from(["merge", "evaluate"]),
        seeds=st.lists(SEEDS, min_size=3, max_size=3),
        complete=st.sampled_from([True, True, False]),
    )
    def hold(self, name, seeds, complete):
        """The merge or the evaluation takes long: of this round, or of the next complete one."""
        self.gates[name] = False
        if complete:
            self.all_deliver_at_once(CLIENTS, seeds)

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
            assert {end_of(delivery.call) for delivery in self.deliveries} <= {"UNAVAILABLE"}
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
            assert end_of(call) in ("UNAVAILABLE", "INTERNAL")
        self.opened()
        oracle = self.oracle
        if oracle.rounds < 5:
            oracle.rounds += more
        oracle.advance(merge=True, evaluate=True)  # all that is frozen, with the old clients
        if clients and not oracle.is_last_merged:
            oracle.clients = sorted(clients)
            oracle.uploads = {
                name: each for name, each in oracle.uploads.items() if name in clients
            }
        self.run.start(rounds=oracle.rounds, clients=oracle.clients)
        self.settle()

    # --- and what must hold ---

    def settle(self):
        """The server gets where the oracle is; the calls that it says have ended, and no other."""
        oracle, run = self.oracle, self.run
        oracle.advance(self.gates["merge"], self.gates["evaluate"])
        uploads = {client: (n, digest(seed)) for client, (n, seed) in oracle.uploads.items()}
        expected = oracle.round, oracle.evaluated, oracle.frozen, uploads

        def where():
            state = run.rounds.state
            uploads = {
                client: (upload["num_examples"], upload["sha256"])
                for client, upload in run.rounds.uploads.items()
            }
            return state.round, state.evaluated, bool(state.frozen), uploads

        until(
            lambda: where() == expected,
            lambda: f"it is at {where()}, not at {expected}: {run.said}, {run.coordinator.error}",
            20,
        )
        if oracle.waits:
            until(lambda: run.rounds.opened_at == self.now, "the round is open", 20)
        self.check_calls()
        if not oracle.frozen:
            assert same_bits(read_weights(run.weights), oracle.weights)
        state = RunState.load(self.folder / "state.json")
        assert state.changed(rounds=oracle.rounds) == run.rounds.state
        rows = [
            (row["round"], row["clients"], row["missing"], row["num_examples"])
            for row in state.history
        ]
        assert rows == oracle.rows[: oracle.evaluated]
        assert (self.folder / "history.csv").read_text().count("\n") == 1 + oracle.evaluated
        for client, (_, sha256) in uploads.items():
            assert files.sha256_of(run.rounds.upload_path(client)) == sha256

    def check_calls(self):
        waiting = []
        for delivery in self.deliveries:
            if delivery.replaced:  # or it was answered just before
                assert end_of(delivery.call) in ("ABORTED", "answered")
            elif delivery.number <= self.oracle.evaluated:
                assert end_of(delivery.call) == "answered"
            else:
                waiting.append(delivery)
        self.deliveries = waiting
        if self.oracle.hands_out:
            for call in self.fetches:
                number, sha256, file = call.result()
                with file:
                    assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
                assert (number, sha256) == (self.oracle.round, files.sha256_of(self.run.weights))
            self.fetches = []
        assert not any(call.ended for call in [each.call for each in waiting] + self.fetches)

    def teardown(self):
        """The run goes on to its end, and everyone gets an answer."""
        try:
            if hasattr(self, "run"):
                self.finish()
        finally:
            self.dead.append(True)
            self.run.stop()
            self.patch.undo()
            shutil.rmtree(self.folder)

    def finish(self):
        self.gates = {"merge": True, "evaluate": True}
        self.settle()
        while not self.oracle.is_last_merged:
            for client in self.oracle.clients:
                if client not in self.oracle.uploads:
                    self.deliver(client, (5, 1), "new", "fresh")
        self.run.coordinator.result()


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
