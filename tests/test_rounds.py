"""rounds: a client counts once a round, nothing accepted is lost, and no one waits for ever.

With real files and the real FedAvg on tiny weights. Whether an upload counts is `test_verdict.py`;
who waits, is answered or refused in any order of events, and whether the bits are right then, is
`test_any_order.py`; a crash at any publish is `test_kill.py`.
"""

import contextlib
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import Call, fail_with, random_tensors, read_weights, rows_of, until, write_weights
from serving import Peer, connection, refusal, serve

from common import files
from federation import rounds, status
from federation.rounds import REPEAT, Refused, Upload
from federation.state import RunState

A, B, C = "client001", "client002", "client003"
TRAINING = {"phase": "training"}
DISK_IS_FULL = OSError(28, "No space left on device")
OUT_OF_FILES = OSError(24, "Too many open files")


def refused(call, code, *words):
    """Asserts that the call ended with this status and a sentence with these words."""
    with pytest.raises(Refused) as caught:
        call.result()
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.sentence


def all_deliver(run, **seeds):
    """All of these deliver for the open round, and are answered."""
    calls = [run.deliver(client, seed) for client, seed in seeds.items()]
    for call in calls:
        call.result()


@contextlib.contextmanager
def publish_fails(monkeypatch, error, fails, when="before"):
    """Publishing fails where fails(path) says so, "before" or "after" the file is there."""
    inner = files.publish

    def publish(written, path):
        it_fails = fails(path)
        if not it_fails or when == "after":
            inner(written, path)
        if it_fails:
            raise error

    with monkeypatch.context() as patch:
        for module in (files, rounds):
            patch.setattr(module, "publish", publish)
        yield patch


# --- uploads -------------------------------------------------------------------------------------


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


def test_a_delivery_whose_caller_has_gone_replaces_none_and_counts_where_none_is(make_run):
    run = make_run(clients=[A, B])
    replaced = run.delivered(A, 8)
    waiting = run.delivered(A, 1, num_examples=5)
    refused(replaced, "ABORTED")
    refused(run.deliver(A, 9, alive=lambda: False), "CANCELLED", "its earlier upload stays")
    refused(run.deliver(B, 2, alive=lambda: False), "CANCELLED", "what it delivered counts")
    waiting.result()
    assert run.holds((A, 5, 1), (B, 1, 2))


@pytest.mark.parametrize(
    ("name", "when", "can_look", "counts"),
    [
        ("state.json", "before", True, "old"),
        ("client_weights.h5", "before", True, "old"),
        ("client_weights.h5", "after", True, "new"),
        ("client_weights.h5", "after", False, "none"),  # until it is seen which file is there
    ],
)
def test_an_upload_that_could_not_be_stored_counts_as_what_its_file_is(
    make_run, monkeypatch, name, when, can_look, counts
):
    run = make_run(clients=[A, B])
    waiting = run.delivered(A, 1, num_examples=5)
    with publish_fails(monkeypatch, OUT_OF_FILES, lambda path: path.name == name, when) as patch:
        if not can_look:
            patch.setattr(rounds, "sha256_of", fail_with(OUT_OF_FILES))
        with pytest.raises(OSError, match="Too many"):
            run.deliver(A, 9, num_examples=50).result()
    there = [each["num_examples"] for each in run.rounds.uploads.values()]
    assert there == {"old": [5], "new": [50], "none": []}[counts] and not waiting.ended
    run.restart()
    run.deliver(B, 2).result()
    assert run.holds((A, 5, 1) if counts == "old" else (A, 50, 9), (B, 1, 2))


def test_a_converted_upload_is_known_by_what_was_sent_and_found_by_what_lies_there(make_run):
    run = make_run(clients=[A, B])

    def send():
        path = write_weights(files.temporary(run.rounds.upload_path(A)), 1)
        upload = Upload(A, 1, "run0", 1, "of what was sent", path, files.sha256_of(path))
        return Call(run.rounds.deliver, upload, lambda: True)

    send()
    until(lambda: A in run.rounds.uploads, "it is counted")
    run.restart()
    run.deliver(B, 2).result()
    assert run.holds((A, 1, 1), (B, 1, 2))
    send().result()


# --- while a round is waited for, and closed -----------------------------------------------------


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


def test_the_log_says_for_whom_it_waits(make_run, clock):
    run = make_run(clients=[A, B, C])
    run.delivered(A, 1)
    run.rounds.fetch(B)[2].close()
    clock.move(rounds.REPORT_EVERY_S, run)
    until(lambda: "waiting for 30 s" in run.said[-1], "the line that says for whom")
    for words in (f"round 1: have {A}; waiting for", f"{B} (working, fetched", f"{C} (not seen"):
        assert words in run.said[-1]


def test_a_merge_that_fails_ends_everyones_wait_and_a_start_merges_the_same_uploads(make_run):
    run = make_run(clients=[A, B])
    run.merge = fail_with(DISK_IS_FULL)
    run.delivered(A, 8)
    for call in [run.delivered(A, 1), run.deliver(B, 2)]:
        refused(call, "INTERNAL", "round 1 could not be closed", "No space left")
    refused(Call(run.rounds.fetch, A), "INTERNAL")
    frozen = RunState.load(run.folder / "state.json")
    newest = files.sha256_of(run.rounds.upload_path(A))
    assert rounds.verdict(frozen, True, A, "run0", 1, newest) == (REPEAT, 1)
    with pytest.raises(OSError, match="No space"):
        run.coordinator.result()
    run.merge = run.average
    path = run.rounds.upload_path(B)
    delivered = path.read_bytes()
    write_weights(path, 7)
    with pytest.raises(ValueError, match=f"the weights of {B} in .* --fresh"):
        run.start()
    path.write_bytes(delivered)
    run.start()
    assert run.holds((A, 1, 1), (B, 1, 2))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_step_for_which_no_file_could_be_opened_is_done_again(
    make_run, monkeypatch, number, when
):
    run, published = make_run(clients=[A], rounds=1), itertools.count(1)
    monkeypatch.setattr(rounds, "RETRY_S", 0.001)

    def fails(_):
        is_coordinator = threading.current_thread() is run.coordinator.thread
        return is_coordinator and next(published) == number

    with publish_fails(monkeypatch, OUT_OF_FILES, fails, when):
        run.deliver(A, 1).result()
        run.coordinator.result()
    assert run.holds((A, 1, 1)) and "trying again" in str(run.said)
    assert len(rows_of(run.folder / "history.csv")) == 1
    [row] = rows_of(run.folder / "clients.csv")
    # a merge that is repeated may not see what the clients fetched
    assert bool(row["update_length"]) == (number not in (2, 3))


def test_an_upload_that_is_lost_before_the_freeze_is_waited_for_again(make_run, monkeypatch):
    run, lost = make_run(clients=[A, B], rounds=1), []
    monkeypatch.setattr(rounds, "RETRY_S", 0.001)

    def fails(path):
        is_coordinator = threading.current_thread() is run.coordinator.thread
        return is_coordinator or path.parent.name in lost

    run.delivered(A, 1)
    with publish_fails(monkeypatch, OUT_OF_FILES, fails) as patch:
        run.delivered(B, 2)
        until(lambda: "trying again" in str(run.said), "no file for the freeze")
        patch.setattr(rounds, "sha256_of", fail_with(OUT_OF_FILES))
        lost.append(A)
        with pytest.raises(OSError, match="Too many"):
            run.deliver(A, 1).result()
    run.deliver(A, 1).result()
    assert run.holds((A, 1, 1), (B, 1, 2))


def test_a_signal_ends_a_server_that_is_out_of_open_files(make_run):
    run = make_run(clients=[A])
    run.merge = fail_with(OUT_OF_FILES)
    call = run.deliver(A, 1)
    until(lambda: "trying again" in str(run.said), "it tries again")
    run.rounds.stop("UNAVAILABLE", "the server is stopping")
    refused(call, "UNAVAILABLE")
    refused(run.coordinator, "UNAVAILABLE")


# --- clients.csv ---------------------------------------------------------------------------------


def test_what_the_clients_measured_is_in_clients_csv_once_its_round_is_evaluated(
    make_run, monkeypatch
):
    run = make_run(clients=[A, B], rounds=1)
    path = run.folder / "clients.csv"
    run.rounds.hear(A, "run0", 1, TRAINING, {"auc": 0.5, "examples": 4})
    run.delivered(A, 1, num_examples=3)
    assert not path.exists()
    run.deliver(B, 2).result()
    run.coordinator.result()
    for _ in range(2):  # of the result; said twice it is there once
        run.rounds.hear(B, "run0", 2, {"phase": "scoring"}, {"auc": 0.75})
    with publish_fails(monkeypatch, DISK_IS_FULL, lambda path: True):
        with pytest.raises(OSError, match="No space"):
            run.rounds.hear(A, "run0", 2, {"phase": "done"}, {"auc": 0.25})
    assert run.rounds.done_clients == {A}  # its last word counts all the same
    names = ("round", "client", "num_examples", "auc", "examples")
    assert [[row[name] for name in names] for row in rows_of(path)] == [
        ["0", A, "3", "0.5", "4"],
        ["0", B, "1", "", ""],
        ["1", B, "", "0.75", ""],
    ]


@pytest.mark.parametrize("spoiled", [None, "round;client\n0;client001\n"])
def test_a_clients_csv_that_lacks_a_round_is_made_up_for_once(make_run, spoiled):
    """The crash came after the commit of the evaluation; or a person's program wrote the file."""
    run = make_run(clients=[A], rounds=2)
    path = run.folder / "clients.csv"
    run.rounds.hear(A, "run0", 1, TRAINING, {"auc": 0.5})
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


def test_a_run_that_is_extended_adds_its_training_to_the_row_of_the_result(make_run):
    run = make_run(clients=[A], rounds=1)
    all_deliver(run, client001=1)
    run.coordinator.result()
    run.rounds.hear(A, "run0", 2, {"phase": "done"}, {"auc": 0.75, "threshold": 0.25})
    run.restart(rounds=2)
    run.rounds.hear(A, "run0", 2, TRAINING, {"auc": 0.75, "threshold": 0.5, "training_loss": 0.125})
    run.deliver(A, 2, num_examples=3).result()
    run.coordinator.result()
    names = ("round", "auc", "threshold", "training_loss", "num_examples", "update_length")
    assert [[row[name] for name in names] for row in rows_of(run.folder / "clients.csv")] == [
        ["0", "", "", "", "1", "1.0"],
        ["1", "0.75", "0.25", "0.125", "3", "1.0"],
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
    run.rounds.hear(A, "run0", 1, TRAINING, {"auc": 0.5})
    for seed in range(4):
        all_deliver(run, client001=seed, client002=seed, client003=seed)
    run.coordinator.result()
    warnings = [line for line in run.said if "warning" in line]
    expected = [(1, C, "5.5 times"), (3, B, "trains nothing"), (4, C, "pulls against")]
    for line, (number, client, words) in zip(warnings, expected, strict=True):
        assert f"round {number}: warning: {client}" in line and words in line
    rows = rows_of(run.folder / "clients.csv")
    assert [row["auc"] for row in rows if row["client"] == A] == ["0.5", "", "", ""]
    found = [(row["update_length"], row["update_cosine"]) for row in rows if row["client"] == B]
    assert found == [
        (str(length), "" if cosine is None else str(cosine)) for length, cosine in of_b
    ]
    [*_, last] = status.status_of(run.rounds)["clients"]
    assert (last["update_length"], last["update_cosine"]) == (1.0, -0.25)


# --- the end, and what comes after it ------------------------------------------------------------


def test_the_end_waits_for_every_client_as_long_as_one_moves(make_run, clock):
    run = make_run(clients=[A, B], rounds=1)
    all_deliver(run, client001=1, client002=2)  # an answer is not the result
    run.coordinator.result()
    ending = Call(run.rounds.wait_until_all_done, 30)
    until(lambda: "waiting until every client" in run.said[-1], "the end")
    run.rounds.hear(B, "run0", 2, {"phase": "done"}, {})
    clock.now += 29
    run.rounds.note_progress()
    clock.move(29, run)
    ending.thread.join(0.05)
    assert not ending.ended
    clock.move(1, run)
    ending.result()
    assert f"{A} has not said that it has the result" in run.said[-1]
    run.rounds.hear(A, "run0", 2, {"phase": "done"}, {})
    Call(run.rounds.wait_until_all_done, 30).result()


# --- other --clients at a restart ----------------------------------------------------------------


@pytest.mark.parametrize("killed", [(), (Path, "rename"), (RunState, "save")])
def test_who_leaves_is_not_counted_and_its_upload_is_moved_aside(make_run, monkeypatch, killed):
    run = make_run(clients=[A, B], rounds=1)
    run.delivered(B, 6)
    run.stop()
    if killed:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(*killed, fail_with(DISK_IS_FULL))
            run.start(clients=[A])
    run.start(clients=[A])
    [aside] = (run.folder / B).iterdir()
    assert aside.name == "client_weights-not-counted-1.h5"
    assert aside.read_bytes() == write_weights(run.folder / "six.h5", 6).read_bytes()
    run.restart()  # who takes part is kept without the flag
    run.deliver(A, 5).result()
    assert run.holds((A, 1, 5))


def test_who_left_gets_its_last_answer_and_no_more(make_run):
    """Over the wire: the service looks at who calls, too."""
    run = make_run(clients=[A, B], rounds=3)
    all_deliver(run, client001=1, client002=2)
    run.restart(clients=[A])
    server, address = serve(run.rounds)
    peer = Peer(connection(address), B)
    two, five = [write_weights(run.folder / f"{seed}.h5", seed) for seed in (2, 5)]
    assert peer.send(two).result().value == 1
    for call in (peer.send(five, round="2"), peer.fetch()):
        code, sentence = refusal(call)
        assert code == "PERMISSION_DENIED" and "--clients" in sentence
    server.stop(0).wait()


def test_other_clients_are_refused_where_they_cannot_be(make_run):
    run = make_run(clients=[A, B], rounds=1)
    all_deliver(run, client001=1, client002=2)
    with pytest.raises(ValueError, match="all 1 rounds .* are over.*give more --rounds"):
        run.rounds.change_clients([A])
    assert RunState.load(run.folder / "state.json").clients == [A, B]
