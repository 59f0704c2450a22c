"""Hospitals come and go: --clients with other names at a restart, and kills in between.

The server is a real process; the clients are the wire alone. The oracle is FedAvg, written again.
"""

import csv

import grpc
import pytest
from conftest import (
    averaged,
    free_port,
    holding,
    random_tensors,
    read_weights,
    same_bits,
    server_script,
    start_server,
    until,
    write_weights,
)

import status
from common import files
from federation import weights
from federation.rounds import Refused
from federation.state import RunState
from generated import todo_pb2, todo_pb2_grpc

A, B, C, D = "client001", "client002", "client003", "client004"


class Federation:
    """The server of a run in `site`; `start` begins or restarts it with these clients."""

    def __init__(self, start, site):
        self.start_process = start
        self.site = site
        self.server = None

    def start(self, *clients, script=None):
        flags = ["--clients", ",".join(clients)] if clients else []
        self.server, self.address = start_server(
            self.start_process, self.site, *flags, script=script or server_script(self.site)
        )

    def kill(self):
        self.server.kill()

    @property
    def state(self):
        return RunState.load(self.site / "server" / "state.json")

    def call(self, client, seed, round_number):
        """A future: the client's upload for this round, as a client of ours sends it."""
        path = write_weights(self.site / f"{client}-{seed}.h5", seed)
        stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(self.address))
        metadata = (
            ("fedml-client", client),
            ("fedml-run", "run0"),
            ("fedml-round", str(round_number)),
            ("fedml-sha256", files.sha256_of(path)),
        )
        messages = weights.blob_messages(path, client, seed)
        return stub.sendWeight.future(messages, metadata=metadata, timeout=60)

    def fetch(self, client):
        stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(self.address))
        return list(stub.getWeight(todo_pb2.void(), metadata=(("fedml-client", client),)))

    def round(self, number, **seeds):
        """All of these deliver, and are answered."""
        calls = [self.call(client, seed, number) for client, seed in seeds.items()]
        for call in calls:
            assert call.result().value == 1
        assert self.holds(**seeds)

    def holds(self, **seeds):
        """Whether the weights are FedAvg over these; a client has as many examples as its seed."""
        uploads = [(client, seed, random_tensors(seed)) for client, seed in seeds.items()]
        path = self.site / "server" / "server_weight.h5"
        return same_bits(read_weights(path), averaged(uploads))


@pytest.fixture
def federation(start, begun):
    return Federation(start, begun(clients=[A, B, C], rounds=7))


def test_one_joins_and_one_leaves_with_its_upload_waiting_and_the_server_is_killed(federation):
    run = federation
    run.start()
    run.round(1, client001=1, client002=2, client003=3)
    run.round(2, client001=4, client002=5, client003=6)

    # D joins in round 3, for which A has delivered already.
    waiting = run.call(A, 7, 3)
    run.server.wait_for(f"round 3: {A} delivered")
    run.kill()
    assert isinstance(waiting.exception(), grpc.RpcError)
    run.start(A, B, C, D)
    assert f"{D} joined in round 3" in run.server.output
    calls = [run.call(client, seed, 3) for client, seed in ((B, 8), (C, 9))]
    run.server.wait_for(rf"have {A}, {B}, {C}; waiting for {D}")
    run.kill()  # and once more; who takes part is kept without the flag
    for call in calls:
        assert isinstance(call.exception(), grpc.RpcError)
    run.start()
    again = run.call(A, 7, 3)
    assert run.call(D, 10, 3).result().value == 1 == again.result().value
    assert run.holds(client001=7, client002=8, client003=9, client004=10)
    run.round(4, client001=1, client002=2, client003=3, client004=4)

    # C leaves in round 5, in which its upload waits.
    waiting = run.call(C, 11, 5)
    run.server.wait_for(f"round 5: {C} delivered")
    run.kill()
    assert isinstance(waiting.exception(), grpc.RpcError)
    run.start(A, B, D)
    aside = run.site / "server" / C / "client_weights-not-counted-1.h5"
    assert f"{C} left in round 5" in run.server.output
    assert str(aside.relative_to(run.site)) in run.server.output
    assert same_bits(read_weights(aside), random_tensors(11))
    assert run.call(C, 3, 4).result().value == 1  # what was counted is answered, as ever
    # One after the other: a client's newer upload cancels its older one.
    for seed, number in ((11, 5), (12, 5), (4, 4)):
        refused = run.call(C, seed, number)
        assert refused.code() == grpc.StatusCode.PERMISSION_DENIED
        assert f"{C} left in round 5" in refused.details()
    with pytest.raises(grpc.RpcError, match="left in round 5"):
        run.fetch(C)
    run.round(5, client001=5, client002=6, client004=7)
    run.kill()
    run.start()
    run.round(6, client001=8, client002=9, client004=10)
    rows = {row["round"]: row for row in run.state.history}
    assert [rows[number]["clients"] for number in range(1, 7)] == [3, 3, 4, 4, 3, 3]
    assert {number: row["joined"] for number, row in rows.items() if "joined" in row} == {3: D}
    assert {number: row["left"] for number, row in rows.items() if "left" in row} == {5: C}
    with open(run.site / "server" / "history.csv", newline="") as file:
        assert [row["clients"] for row in csv.DictReader(file)] == ["3", "3", "4", "4", "3", "3"]

    def shown():
        return status.lines_of(*status.read_status(run.site / "server" / "status.json"))

    def beneath(number):
        """What status.py says beneath the row of this round."""
        rows = [line.startswith(f"{number:>5} ") for line in shown()]
        return [*shown(), ""][rows.index(True) + 1]

    until(lambda: shown()[-1].startswith("    6 "), "the status has round 6")
    assert (beneath(3), beneath(5)) == ("      client004 joined", "      client003 left")
    assert beneath(4).startswith("    5 ") and beneath(6) == ""


def test_what_is_frozen_is_merged_with_the_old_names_first(federation):
    """Killed between the freeze and the merge, and started again without one that was frozen."""
    run = federation
    stands_still = (
        "from federation import weights",
        "def fedavg(*_, **__):",
        "    while True: time.sleep(1)",
        "weights.fedavg = fedavg",
        "import standin",
        'sys.modules["model"] = standin',
    )
    run.start(script=holding(run.site, "todoServer", *stands_still))
    calls = [run.call(client, seed, 1) for client, seed in ((A, 1), (B, 2), (C, 3))]
    until(lambda: run.state.frozen, "round 1 is frozen")
    run.kill()
    for call in calls:
        assert isinstance(call.exception(), grpc.RpcError)
    run.start(A, D)
    assert run.holds(client001=1, client002=2, client003=3)
    assert f"{B}, {C} left in round 2" in run.server.output
    assert run.call(B, 2, 1).result().value == 1
    assert not list((run.site / "server").glob("*/client_weights-not-counted*"))
    run.round(2, client001=4, client004=5)


def test_a_crash_between_the_state_and_the_file_is_made_up_for(federation):
    run = federation
    run.start()
    waiting = run.call(C, 3, 1)  # a future that nobody holds is cancelled
    run.server.wait_for(f"round 1: {C} delivered")
    run.kill()
    assert isinstance(waiting.exception(), grpc.RpcError)
    patch = (
        "from federation import rounds",
        "rounds.Rounds._move_uncounted_aside = lambda self: sys.exit(9)",
        "import standin",
        'sys.modules["model"] = standin',
    )
    script = holding(run.site, "todoServer", *patch)
    address = f"localhost:{free_port()}"
    flags = ["--listen", address, "--clients", f"{A},{B}"]
    assert run.start_process(script, *flags, cwd=run.site).wait() == 9
    assert run.state.left == {C: 1} and C not in run.state.uploads
    run.start()
    assert (run.site / "server" / C / "client_weights-not-counted-1.h5").exists()
    run.round(1, client001=1, client002=2)


def test_one_that_left_may_join_again(federation):
    run = federation
    for names in ((A, B), (A, B, C)):
        run.start(*names)
        run.kill()
    assert run.state.left == {} and run.state.clients == [A, B, C]
    run.start()
    run.round(1, client001=1, client002=2, client003=3)
    [row] = run.state.history
    assert (row["joined"], row["left"]) == (C, C)


def test_min_clients_is_checked_against_the_new_number(federation):
    flags = ["--listen", f"localhost:{free_port()}", "--clients", f"{A},{B}"]
    flags += ["--round-timeout", "60", "--min-clients", "3"]
    before = (federation.site / "server" / "state.json").read_bytes()
    script = server_script(federation.site)
    server = federation.start_process(script, *flags, cwd=federation.site)
    assert server.wait() == 1
    assert "--min-clients 3 is more than the run's 2 clients" in server.output
    assert (federation.site / "server" / "state.json").read_bytes() == before


def test_the_clients_of_a_finished_run_stay(make_run):
    run = make_run(clients=[A, B], rounds=1)
    for call in [run.deliver(A, 1), run.deliver(B, 2)]:
        call.result()
    with pytest.raises(ValueError, match="all 1 rounds .* are over.*give more --rounds"):
        run.rounds.change_clients([A])
    assert run.rounds.clients == [A, B]


def test_the_last_one_that_was_awaited_leaves_and_the_round_is_closed(make_run):
    """The others' uploads are all there then."""
    run = make_run(clients=[A, B, C], rounds=2)
    run.delivered(A, 1)
    run.delivered(B, 2)
    run.stop()
    run.start(clients=[A, B])
    until(lambda: run.rounds.answered == 1, "round 1 is closed")
    assert run.holds((A, 1, 1), (B, 1, 2))
    with pytest.raises(Refused, match="left in round 1"):
        run.deliver(C, 3).result()
