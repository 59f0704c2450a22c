"""rounds: a client counts once a round, nothing accepted is lost, and no one waits for ever.

With real files and the real FedAvg on tiny weights. Whether an upload counts is `test_verdict.py`;
what comes in any order, and a crash at any publish, is `test_any_order.py`; `test_kill.py` kills
processes.
"""

import csv
import hashlib
import itertools
import threading

import grpc
import numpy as np
import pytest
from conftest import Call, metrics, random_tensors, read_weights, until, write_weights
from serving import serve

from common import files
from federation import rounds, status, weights
from federation.rounds import Refused
from federation.state import RunState
from generated import todo_pb2, todo_pb2_grpc

A, B, C = "client001", "client002", "client003"
DISK_IS_FULL = OSError(28, "No space left on device")
OUT_OF_FILES = OSError(24, "Too many open files")


def refused(call, code, *words):
    """Asserts that the call ended with this status and a sentence with these words."""
    with pytest.raises(Refused) as caught:
        call.result()
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.sentence


def still_waits(call):
    call.thread.join(0.05)
    return not call.ended


def all_deliver(run, **seeds):
    """All of these deliver for the open round, and are answered."""
    calls = [run.deliver(client, seed) for client, seed in seeds.items()]
    for call in calls:
        call.result()


def state_on_disk(run):
    return RunState.load(run.folder / "state.json")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def has_result(run, client):
    """It says its last word: that it has the result."""
    run.rounds.hear(client, "run0", run.rounds.state.rounds + 1, {"phase": "done"}, {})


def gate(run, name):
    """Holds run.merge or run.evaluate: (entered, opened) events."""
    entered, opened, inner = threading.Event(), threading.Event(), getattr(run, name)

    def held(*arguments):
        entered.set()
        assert opened.wait(60)
        return inner(*arguments)

    setattr(run, name, held)
    return entered, opened


def fail_with(error):
    def fail(*_):
        raise error

    return fail


def patch_publish(monkeypatch, publish):
    for module in (files, rounds):
        monkeypatch.setattr(module, "publish", publish)


def full_disk_for(name):
    """A publish that fails for files of this name."""
    inner = files.publish

    def publish(written, path):
        if path.name == name:
            raise DISK_IS_FULL
        inner(written, path)

    return publish


# --- the barrier ---------------------------------------------------------------------------------


def test_the_order_of_arrival_gives_the_same_bits(make_run):
    names = [A, B, C]
    ones = [np.ones_like(tensor) for tensor in random_tensors(0)]
    uploads = [[factor * tensor for tensor in ones] for factor in (1e20, 1, -1e20)]
    run = make_run(clients=names, rounds=6)
    for order in itertools.permutations(range(3)):
        calls = [run.delivered(names[number], uploads[number]) for number in order[:2]]
        calls.append(run.deliver(names[order[2]], uploads[order[2]]))
        for call in calls:
            call.result()
        # (1e20 + 1) - 1e20 in the order of the names; any other order may give 1.
        assert not any(tensor.any() for tensor in read_weights(run.weights))


def test_answers_and_the_result_come_only_after_evaluation_and_history(make_run):
    run = make_run(clients=[A], rounds=1)
    entered, opened = gate(run, "evaluate")
    call = run.deliver(A, 1)
    assert entered.wait(60)
    assert state_on_disk(run).round == 2 and run.holds((A, 1, 1))
    fetch = Call(run.rounds.fetch, A)
    assert still_waits(call) and still_waits(fetch)
    opened.set()
    call.result()
    number, _, file = fetch.result()
    file.close()
    assert number == 2 and state_on_disk(run).is_over
    assert len(rows_of(run.folder / "history.csv")) == 1


# --- repeats and replacements --------------------------------------------------------------------


def test_nobody_fetches_old_weights_under_a_new_number(make_run):
    run = make_run(clients=[A])
    old = files.sha256_of(run.weights)
    number, digest, file = run.rounds.fetch(A)
    assert (number, digest) == (1, old)
    entered, opened = gate(run, "merge")
    call = run.deliver(A, 1)
    assert entered.wait(60)
    fetch = Call(run.rounds.fetch, None)
    gone = Call(run.rounds.fetch, None, lambda: False)
    refused(gone, "CANCELLED")
    assert still_waits(fetch)
    opened.set()
    number, digest, newer = fetch.result()
    with file, newer:
        assert (number, digest) == (2, files.sha256_of(run.weights))
        assert hashlib.sha256(newer.read()).hexdigest() == digest
        # A download that began before goes on with its own file.
        assert hashlib.sha256(file.read()).hexdigest() == old
    call.result()


@pytest.mark.parametrize("seed", [1, 9])
def test_a_late_delivery_whose_caller_has_gone_changes_nothing(make_run, seed):
    run = make_run(clients=[A, B])
    replaced = run.delivered(A, 8)
    waiting = run.delivered(A, 1, num_examples=5)
    refused(replaced, "ABORTED")
    refused(run.deliver(A, seed, num_examples=5, alive=lambda: False), "CANCELLED")
    entered, opened = gate(run, "merge")
    last = run.deliver(B, 2)
    assert entered.wait(60)
    refused(run.deliver(A, 1, alive=lambda: False), "CANCELLED")  # a repeat of what is merged
    opened.set()
    last.result()
    waiting.result()
    assert run.holds((A, 5, 1), (B, 1, 2))


@pytest.mark.parametrize("name", ["state.json", "client_weights.h5"])
def test_an_upload_that_could_not_be_stored_leaves_the_round_unharmed(make_run, monkeypatch, name):
    run = make_run(clients=[A, B])
    waiting = run.delivered(A, 1)
    with monkeypatch.context() as patch:
        patch_publish(patch, full_disk_for(name))
        for client in (A, B):
            with pytest.raises(OSError, match="No space"):
                run.deliver(client, 5).result()
    assert set(run.rounds.uploads) == {A} and not waiting.ended
    run.deliver(B, 2).result()
    waiting.result()
    assert run.holds((A, 1, 1), (B, 1, 2))


@pytest.mark.parametrize("can_look", [True, False])
def test_a_rename_that_was_done_though_publishing_failed(make_run, monkeypatch, can_look):
    """The new upload counts as what it is; where that cannot be seen, none until the next one."""
    run, inner = make_run(clients=[A, B]), files.publish
    run.delivered(A, 1, num_examples=5)

    def publish(written, path):
        inner(written, path)
        if path.name == "client_weights.h5":
            raise OUT_OF_FILES

    with monkeypatch.context() as patch:
        patch_publish(patch, publish)
        if not can_look:
            patch.setattr(rounds, "sha256_of", fail_with(OUT_OF_FILES))
        with pytest.raises(OSError, match="Too many"):
            run.deliver(A, 9, num_examples=50).result()
    assert [each["num_examples"] for each in run.rounds.uploads.values()] == [50] * can_look
    if not can_look:
        run.delivered(A, 9, num_examples=50)
    run.deliver(B, 2).result()
    assert run.holds((A, 50, 9), (B, 1, 2))


# --- limits --------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time` in rounds.py: moves only when the test moves it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def move(self, seconds, run):
        self.now += seconds
        run.rounds.wake()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rounds, "time", clock)
    return clock


def test_at_the_limit_those_who_are_there_are_merged_and_the_missing_named(make_run, clock):
    run = make_run(clients=[A, B, C], min_clients=2, round_timeout_s=60)
    calls = [run.delivered(C, 3, num_examples=4), run.delivered(A, 1)]
    clock.move(59, run)
    assert all(map(still_waits, calls))
    clock.move(1, run)
    for call in calls:
        call.result()
    assert run.holds((A, 1, 1), (C, 4, 3))
    [row] = rows_of(run.folder / "history.csv")
    assert (row["clients"], row["missing"], row["num_examples"]) == ("2", B, "5")
    assert any(f"without {B}" in line for line in run.said)
    run.deliver(C, 3, num_examples=4, round_number=1).result()  # it counted


def test_the_log_says_for_whom_it_waits(make_run, clock):
    run = make_run(clients=[A, B, C])
    run.delivered(A, 1)
    run.rounds.fetch(B)[2].close()
    clock.move(rounds.REPORT_EVERY_S, run)
    until(lambda: "waiting for 30 s" in run.said[-1], "the line that says for whom")
    for words in (f"round 1: have {A}; waiting for", f"{B} (working, fetched", f"{C} (not seen"):
        assert words in run.said[-1]


# --- restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["merge", "evaluate", "history.csv", "state.json"])
def test_a_round_that_cannot_be_closed_ends_everyones_wait(make_run, monkeypatch, step):
    run = make_run(clients=[A, B])
    with monkeypatch.context() as patch:
        if step in ("merge", "evaluate"):
            patch.setattr(run, step, fail_with(DISK_IS_FULL))
        else:
            fill = full_disk_for(step)
            patch.setattr(run, "evaluate", lambda: patch_publish(patch, fill) or metrics())
        for call in [run.deliver(A, 1), run.deliver(B, 2)]:
            refused(call, "INTERNAL", "round 1 could not be closed", "No space left")
        with pytest.raises(OSError, match="No space"):
            run.coordinator.result()
        refused(Call(run.rounds.fetch, A), "INTERNAL")
    assert not state_on_disk(run).history and not list(run.folder.glob(".*.tmp*"))
    run.start()
    run.deliver(A, 1, round_number=1).result()
    assert run.holds((A, 1, 1), (B, 1, 2))
    assert len(rows_of(run.folder / "history.csv")) == 1
    # a merge that is repeated may not see what the clients fetched
    lengths = [row["update_length"] for row in rows_of(run.folder / "clients.csv")]
    assert len(lengths) == 2 and all(lengths) == (step != "merge")


def test_a_signal_ends_a_server_that_is_out_of_open_files(make_run):
    run = make_run(clients=[A])
    run.merge = fail_with(OUT_OF_FILES)
    call = run.deliver(A, 1)
    until(lambda: "trying again" in str(run.said), "it tries again")
    run.rounds.stop("UNAVAILABLE", "the server is stopping")
    refused(call, "UNAVAILABLE")
    refused(run.coordinator, "UNAVAILABLE")


def test_a_frozen_upload_that_is_gone_is_an_error_that_names_it(make_run):
    run = make_run(clients=[A, B])
    run.merge = fail_with(DISK_IS_FULL)
    for call in [run.deliver(A, 1), run.deliver(B, 2)]:
        refused(call, "INTERNAL")
    write_weights(run.rounds.upload_path(B), 7)
    with pytest.raises(ValueError, match=f"the weights of {B} in .* --fresh"):
        run.start()


# --- what is known of a round --------------------------------------------------------------------


def test_the_best_round_is_published_before_the_history_and_kept(make_run):
    run = make_run(clients=[A], rounds=2)
    seen = []

    def publish_result(state, row):
        rows = len(rows_of(run.folder / "history.csv"))
        seen.append((row["round"], state.evaluated, rows, state.best))
        return {"round": row["round"], "auc": 0.5, "sha256": state.weights_sha256}, "AUC 0.5"

    run.rounds.publish_result = publish_result
    all_deliver(run, client001=1)
    first = state_on_disk(run).best
    assert first == {"round": 1, "auc": 0.5, "sha256": state_on_disk(run).weights_sha256}
    all_deliver(run, client001=2)
    assert seen == [(1, 0, 0, None), (2, 1, 1, first)]


def test_what_the_clients_measured_is_in_clients_csv_once_its_round_is_evaluated(
    make_run, monkeypatch
):
    run = make_run(clients=[A, B], rounds=1)
    path = run.folder / "clients.csv"
    run.rounds.hear(A, "run0", 1, {"phase": "training"}, {"auc": 0.5, "examples": 4})
    run.rounds.hear(A, "run0", 2, {"phase": "training"}, {"auc": 0.1})  # of no open round
    run.rounds.hear(B, "other", 1, {"phase": "training"}, {"auc": 0.1})  # of another run
    run.delivered(A, 1, num_examples=3)
    assert not path.exists()
    run.deliver(B, 2).result()
    run.coordinator.result()
    for _ in range(2):  # of the result; said twice it is there once
        run.rounds.hear(B, "run0", 2, {"phase": "scoring"}, {"auc": 0.75})
    with monkeypatch.context() as patch:
        patch_publish(patch, full_disk_for("clients.csv"))
        with pytest.raises(OSError, match="No space"):
            run.rounds.hear(A, "run0", 2, {"phase": "done"}, {"auc": 0.25})
    assert run.rounds.done_clients == {A}  # its last word counts all the same
    names = ("round", "client", "num_examples", "auc", "examples")
    assert [[row[name] for name in names] for row in rows_of(path)] == [
        ["0", A, "3", "0.5", "4"],
        ["0", B, "1", "", ""],
        ["1", B, "", "0.75", ""],
    ]


def test_whose_update_pulls_where_is_kept_and_what_stands_out_is_said(make_run):
    run = make_run(clients=[A, B, C], rounds=4)
    of_b = [(1.5, -0.1), (1.5, -0.2), (0.0, None), (1.5, -0.2)]
    of_c = [(5.5, 0.5), (1.0, -0.25), (1.0, -0.25), (1.0, -0.25)]
    rounds_of_pairs = iter(zip(of_b, of_c, strict=True))

    def merge(paths, num_examples):
        pairs = ((1.0, 0.5), *next(rounds_of_pairs))
        updates = [{"update_length": one, "update_cosine": other} for one, other in pairs]
        return run.average(paths, num_examples)[0], updates

    run.merge = merge
    for seed in range(4):
        all_deliver(run, client001=seed, client002=seed, client003=seed)
    run.coordinator.result()
    warnings = [line for line in run.said if "warning" in line]
    expected = [(1, C, "5.5 times"), (3, B, "trains nothing"), (4, C, "pulls against")]
    for line, (number, client, words) in zip(warnings, expected, strict=True):
        assert f"round {number}: warning: {client}" in line and words in line
    found = [row for row in rows_of(run.folder / "clients.csv") if row["client"] == B]
    assert [(row["update_length"], row["update_cosine"]) for row in found] == [
        ("1.5", "-0.1"),
        ("1.5", "-0.2"),
        ("0.0", ""),
        ("1.5", "-0.2"),
    ]
    [*_, last] = status.status_of(run.rounds)["clients"]
    assert (last["update_length"], last["update_cosine"]) == (1.0, -0.25)


@pytest.mark.parametrize("spoiled", [None, "round;client\n0;client001\n", '"' + 200_000 * "x"])
def test_a_clients_csv_that_lacks_a_round_is_made_up_for_once(make_run, spoiled):
    """The crash came after the commit of the evaluation; or a person's program wrote the file."""
    run = make_run(clients=[A], rounds=2)
    path = run.folder / "clients.csv"
    run.rounds.hear(A, "run0", 1, {"phase": "training"}, {"auc": 0.5})
    all_deliver(run, client001=1)
    until(path.exists, "the row of round 1")
    path.unlink()
    if spoiled:
        path.write_text(spoiled)
    for _ in range(2):
        run.restart()
        assert [(row["round"], row["auc"]) for row in rows_of(path)] == [("0", "0.5")]
    aside = list(run.folder.glob("clients-not-read-*.csv"))
    assert [each.read_text() for each in aside] == ([spoiled] if spoiled else [])


# --- the end, and what comes after it ------------------------------------------------------------


def test_the_end_waits_for_every_client_as_long_as_one_moves(make_run, clock):
    run, present = make_run(clients=[A, B], rounds=1), [True]
    gone = run.delivered(A, 1, alive=lambda: present[0])
    present[0] = False
    run.rounds.wake()
    refused(gone, "CANCELLED", "counts")
    run.deliver(B, 2).result()
    run.coordinator.result()
    assert run.holds((A, 1, 1), (B, 1, 2))
    ending = Call(run.rounds.wait_until_all_done, 30)
    until(lambda: "waiting until every client" in run.said[-1], "the end")
    run.deliver(A, 1, round_number=1).result()  # an answer is not the result
    has_result(run, B)
    clock.now += 29
    run.rounds.note_progress()
    clock.move(29, run)
    assert still_waits(ending)
    clock.move(1, run)
    ending.result()
    assert f"{A} has not said that it has the result" in run.said[-1]
    ending = Call(run.rounds.wait_until_all_done, 30)
    has_result(run, A)
    ending.result()


def test_an_old_peer_has_all_that_it_can_use_with_its_last_answer(make_run):
    run = make_run(clients=[A], rounds=1)
    run.deliver(A, 1, run=None, round_number=1).result()
    Call(run.rounds.wait_until_all_done, 60).result(10)


# --- other --clients at a restart ----------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_who_leaves_is_not_counted_and_its_upload_is_moved_aside(make_run, monkeypatch, killed):
    run = make_run(clients=[A, B, C], rounds=3)
    all_deliver(run, client001=1, client002=2, client003=3)
    run.delivered(A, 4)
    run.delivered(C, 6)
    run.stop()
    if killed:  # between the move and the state
        with monkeypatch.context() as patch:
            patch_publish(patch, full_disk_for("state.json"))
            with pytest.raises(OSError, match="No space"):
                run.start(clients=[A, B])
        assert state_on_disk(run).clients == [A, B, C]
    run.start(clients=[A, B])
    aside = run.folder / C / "client_weights-not-counted-1.h5"
    assert [*(run.folder / C).iterdir()] == [aside]
    assert aside.read_bytes() == write_weights(run.folder / "six.h5", 6).read_bytes()
    run.restart()  # who takes part is kept without the flag
    run.deliver(B, 5).result()
    assert run.holds((A, 1, 4), (B, 1, 5))
    run.restart(clients=[A, B, C])  # it may join again
    all_deliver(run, client001=7, client002=8, client003=9)
    assert run.holds((A, 1, 7), (B, 1, 8), (C, 1, 9))
    assert [row["clients"] for row in state_on_disk(run).history] == [3, 2, 3]


def test_who_left_gets_its_last_answer_and_no_more(make_run):
    """Over the wire: the service looks at who calls, too."""
    run = make_run(clients=[A, B], rounds=3)
    all_deliver(run, client001=1, client002=2)
    run.restart(clients=[A])
    server, address = serve(run.rounds)
    stub = todo_pb2_grpc.FedMLStub(grpc.insecure_channel(address))

    def sends(client, seed, number):
        path = write_weights(run.folder / f"{seed}.h5", seed)
        metadata = [("fedml-client", client), ("fedml-run", "run0"), ("fedml-round", str(number))]
        return stub.sendWeight(weights.blob_messages(path, client, 1), metadata=metadata)

    assert sends(B, 2, 1).value == 1
    for call in (
        lambda: sends(B, 5, 1),
        lambda: sends(B, 5, 2),
        lambda: sends("client009", 5, 2),
        lambda: list(stub.getWeight(todo_pb2.void(), metadata=[("fedml-client", B)])),
    ):
        with pytest.raises(grpc.RpcError, match="--clients") as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    server.stop(0).wait()


def test_other_clients_are_refused_where_they_cannot_be(make_run):
    run = make_run(clients=[A, B], rounds=1)
    all_deliver(run, client001=1, client002=2)
    with pytest.raises(ValueError, match="all 1 rounds .* are over.*give more --rounds"):
        run.rounds.change_clients([A])
    assert run.rounds.state.clients == [A, B]
