"""rounds: a client counts once a round, and nothing accepted is lost.

The same set gives the same bits, and no one waits for ever.
"""

import itertools
import json
import os
import threading
import time

import numpy as np
import pytest
from conftest import DEADLINE_S, Call, metrics, random_tensors, read_weights, until, write_weights

from common import files
from federation import rounds
from federation.rounds import HISTORY_COLUMNS, Refused, TooFewClients


def refused(call, code, *words):
    """Asserts that the call ended with this status and a sentence with these words."""
    with pytest.raises(Refused) as caught:
        call.result()
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.sentence
    return caught.value.sentence


def state_on_disk(run):
    return files.load_state(run.folder / "state.json")


def gate(run, name):
    """Holds run.merge or run.evaluate: (entered, open) events."""
    entered, opened, inner = threading.Event(), threading.Event(), getattr(run, name)

    def held(*arguments):
        entered.set()
        assert opened.wait(60)
        return inner(*arguments)

    setattr(run, name, held)
    return entered, opened


# --- the barrier ---------------------------------------------------------------------------------


def test_nobody_is_answered_before_all_have_delivered_in_any_round(make_run):
    clients = [f"client{number:03}" for number in range(1, 9)]
    run = make_run(clients=clients, rounds=6)
    together, delivered, early = threading.Barrier(len(clients)), [], []

    def client(number, name):
        for round_number in range(1, 7):
            together.wait(60)
            delivered.append(round_number)
            run.deliver(
                name, 100 * round_number + number, 1 + number, round_number=round_number
            ).result()
            if delivered.count(round_number) < len(clients):
                early.append((name, round_number))

    calls = [Call(client, number, name) for number, name in enumerate(clients)]
    for call in calls:
        call.result()
    run.coordinator.result()
    assert not early and run.rounds.state.evaluated == 6
    assert run.holds(*((name, 1 + number, 600 + number) for number, name in enumerate(clients)))
    rows = (run.folder / "history.csv").read_text().splitlines()
    assert rows[0] == ",".join(HISTORY_COLUMNS) and len(rows) == 7
    assert [row.split(",")[0] for row in rows[1:]] == list("123456")
    assert rows[1].split(",")[6:9] == ["8", "", str(sum(range(1, 9)))]


def test_the_order_of_arrival_does_not_matter(make_run):
    names, found = ["client001", "client002", "client003"], set()
    run = make_run(clients=names, rounds=6)
    for order in itertools.permutations(range(3)):
        calls = [run.deliver(names[order[0]], order[0], order[0] + 7)]
        for number in order[1:]:
            counted = order.index(number)
            until(lambda n=counted: len(run.rounds.uploads) == n, "the one before is counted")
            calls.append(run.deliver(names[number], number, number + 7))
        for call in calls:
            call.result()
        found.add(files.sha256_of(run.weights))
    assert len(found) == 1 and run.holds(
        *((name, number + 7, number) for number, name in enumerate(names))
    )


def test_even_where_a_sum_depends_on_its_order(make_run):
    names, large = (
        ["client001", "client002", "client003"],
        [np.ones_like(tensor) for tensor in random_tensors(0)],
    )
    uploads = [[1e20 * tensor for tensor in large], large, [-1e20 * tensor for tensor in large]]
    run = make_run(clients=names, rounds=6)
    for order in itertools.permutations(range(3)):
        calls = [run.delivered(names[number], uploads[number]) for number in order[:2]]
        calls.append(run.deliver(names[order[2]], uploads[order[2]]))
        for call in calls:
            call.result()
        assert not any(
            tensor.any() for tensor in read_weights(run.weights)
        )  # (1e20 + 1) - 1e20, in the names' order


def test_answers_come_only_after_evaluation_and_history(make_run):
    run = make_run(clients=["client001"])
    entered, opened = gate(run, "evaluate")
    call = run.deliver("client001", 1)
    assert entered.wait(60)
    assert state_on_disk(run)["round"] == 2 and run.holds(("client001", 1, 1)) and not call.ended
    opened.set()
    assert call.result() is False  # not the last round
    assert (
        len(state_on_disk(run)["history"]) == 1
        and (run.folder / "history.csv").read_text().count("\n") == 2
    )


# --- repeats and replacements --------------------------------------------------------------------


def test_a_repeat_counts_once_and_the_older_call_is_aborted(make_run):
    run = make_run(clients=["client001", "client002"])
    first = run.delivered("client001", 1, num_examples=5)
    second = run.delivered("client001", 1, num_examples=5)
    refused(first, "ABORTED", "client001", "again")
    assert run.said[-1].startswith(
        "round 1: client001 delivered 5 examples again, the same weights; have client001; waiting"
    )
    run.deliver("client002", 2, num_examples=3).result()
    second.result()
    assert run.holds(("client001", 5, 1), ("client002", 3, 2))
    assert (
        state_on_disk(run)["history"][0]["clients"] == 2
        and state_on_disk(run)["history"][0]["num_examples"] == 8
    )


def test_before_the_freeze_a_new_upload_replaces_the_old_one(make_run):
    run = make_run(clients=["client001", "client002"])
    first = run.delivered("client001", 1, num_examples=5)
    second = run.delivered("client001", 9, num_examples=6)
    refused(first, "ABORTED")
    assert any("replacing" in line for line in run.said)
    run.deliver("client002", 2).result()
    second.result()
    assert run.holds(("client001", 6, 9), ("client002", 1, 2))


@pytest.mark.parametrize("restarted", [False, True])
def test_after_the_merge_the_same_bytes_are_answered_and_others_are_over(make_run, restarted):
    run = make_run(clients=["client001", "client002"])
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        call.result()
    before = files.sha256_of(run.weights)
    if restarted:
        run.restart()
    run.deliver("client001", 1, round_number=1).result()
    refused(
        run.deliver("client001", 3, round_number=1),
        "FAILED_PRECONDITION",
        "client001",
        "round 1, which is over",
    )
    assert files.sha256_of(run.weights) == before and not run.rounds.uploads


def test_while_merging_the_same_bytes_wait_and_others_are_over(make_run):
    run = make_run(clients=["client001", "client002"])
    entered, opened = gate(run, "merge")
    calls = [run.deliver("client001", 1), run.deliver("client002", 2)]
    assert entered.wait(60)
    refused(run.deliver("client001", 3), "FAILED_PRECONDITION", "being merged")
    same = run.delivered("client001", 1)
    refused(calls[0], "ABORTED")
    fetch = Call(run.rounds.fetch, "client002")
    opened.set()
    for call in [same, calls[1]]:
        call.result()
    number, digest, file = fetch.result()
    with file:
        assert number == 2 and digest == files.sha256_of(run.weights)
    assert run.holds(("client001", 1, 1), ("client002", 1, 2))


def test_nobody_fetches_old_weights_under_a_new_number(make_run):
    run = make_run(clients=["client001"])
    old = files.sha256_of(run.weights)
    number, digest, file = run.rounds.fetch("client001")
    assert (number, digest) == (1, old)
    entered, opened = gate(run, "merge")
    call = run.deliver("client001", 1)
    assert entered.wait(60)
    waiting = Call(run.rounds.fetch, None)
    with pytest.raises(AssertionError, match="still waits"):
        waiting.result(0.2)
    opened.set()
    number, digest, newer = waiting.result()
    with file, newer:
        import hashlib

        assert number == 2 and hashlib.sha256(
            newer.read()
        ).hexdigest() == digest == files.sha256_of(run.weights)
        assert (
            hashlib.sha256(file.read()).hexdigest() == old
        )  # a download that began before goes on with its own file
    call.result()


def test_a_late_duplicate_of_an_answered_round_does_not_disturb_the_waiting_call(make_run):
    run = make_run(clients=["client001", "client002"])
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        call.result()
    waiting = run.delivered("client001", 3)
    run.deliver("client001", 1, round_number=1).result()
    run.deliver("client002", 4).result()
    assert waiting.result() is True


def test_a_delivery_whose_caller_has_gone_does_not_take_the_answer_from_the_next(make_run):
    run = make_run(clients=["client001", "client002"])
    waiting = run.delivered("client001", 1)
    refused(run.deliver("client001", 1, alive=lambda: False), "CANCELLED")
    run.deliver("client002", 2).result()
    waiting.result()


@pytest.mark.parametrize(
    "what", ["another run", "an earlier round", "a later round", "a round after the last"]
)
def test_what_is_for_another_run_or_round_is_refused(make_run, what):
    run = make_run(clients=["client001"], rounds=2)
    run.deliver("client001", 1).result()
    sent = {
        "another run": {"run": "other"},
        "an earlier round": {"round_number": 1},
        "a later round": {"round_number": 3},
        "a round after the last": {"round_number": 3},
    }[what]
    if what == "a round after the last":
        run.deliver("client001", 2).result()
    sentence = refused(
        run.deliver("client001", 5, **sent),
        "FAILED_PRECONDITION",
        "client001",
        "run run0",
        "fetch again",
    )
    assert ("'other'" in sentence) == (what == "another run")
    assert not run.rounds.uploads
    with pytest.raises(Refused):
        run.rounds.admit(
            "client001", sent.get("run", "run0"), sent.get("round_number", 2), "0" * 64
        )


def test_who_goes_away_after_a_complete_upload_still_counts(make_run):
    run, present = make_run(clients=["client001", "client002"]), [True]
    gone = run.delivered("client001", 1, alive=lambda: present[0])
    present[0] = False
    run.rounds.wake()
    refused(gone, "CANCELLED", "counts")
    run.deliver("client002", 2).result()
    assert run.holds(("client001", 1, 1), ("client002", 1, 2))


def test_a_late_upload_whose_caller_has_gone_does_not_replace_the_one_that_is_waited_for(make_run):
    run = make_run(clients=["client001", "client002"])
    waiting = run.delivered("client001", 2, num_examples=5)
    refused(
        run.deliver("client001", 1, num_examples=7, alive=lambda: False),
        "CANCELLED",
        "its earlier upload stays",
    )
    run.deliver("client002", 3).result()
    waiting.result()
    assert run.holds(("client001", 5, 2), ("client002", 1, 3))


def test_an_upload_that_is_in_place_though_publishing_failed_counts_as_what_it_is(
    make_run, monkeypatch
):
    """The rename was done, then the folder could not be opened or synchronized."""
    run = make_run(clients=["client001", "client002"])
    waiting, real = run.delivered("client001", 1, num_examples=5), os.open
    with monkeypatch.context() as patch:

        def out_of_files(path, *more):
            if str(path).endswith("client001"):
                raise OSError(24, "Too many open files")
            return real(path, *more)

        patch.setattr(files.os, "open", out_of_files)
        with pytest.raises(OSError):
            run.deliver("client001", 9, num_examples=50).result()
    run.merge = lambda *_: 1 / 0
    refused(run.deliver("client002", 2), "INTERNAL")
    refused(waiting, "INTERNAL")
    run.merge = run.average
    run.start()
    assert run.holds(("client001", 50, 9), ("client002", 1, 2))


# --- limits --------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time` in rounds.py: moves only when the test moves it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rounds, "time", clock)
    return clock


def test_at_the_limit_those_who_are_there_are_merged_and_the_missing_named(make_run, clock):
    run = make_run(
        clients=["client001", "client002", "client003"], min_clients=2, round_timeout_s=60
    )
    calls = [run.delivered("client003", 3, num_examples=4), run.delivered("client001", 1)]
    clock.now += 59
    run.rounds.wake()
    assert not any(call.ended for call in calls)
    clock.now += 1
    run.rounds.wake()
    for call in calls:
        call.result()
    assert run.holds(("client001", 1, 1), ("client003", 4, 3))
    row = state_on_disk(run)["history"][0]
    assert (row["clients"], row["missing"], row["num_examples"]) == (2, "client002", 5)
    assert any("without client002" in line for line in run.said)
    assert (run.folder / "history.csv").read_text().splitlines()[1].split(",")[6:9] == [
        "2",
        "client002",
        "5",
    ]
    refused(run.deliver("client002", 2, round_number=1), "FAILED_PRECONDITION", "over")


def test_a_set_that_was_frozen_at_the_limit_stays_so_after_a_crash(make_run, clock):
    run = make_run(
        clients=["client001", "client002", "client003"], min_clients=2, round_timeout_s=60
    )
    run.merge = lambda *_: 1 / 0
    calls = [run.delivered("client003", 3), run.delivered("client001", 1)]
    clock.now += 61
    run.rounds.wake()
    for call in calls:
        refused(call, "INTERNAL")
    run.merge = run.average
    run.start()
    refused(run.deliver("client002", 2, round_number=1), "FAILED_PRECONDITION", "over")
    assert run.holds(("client001", 1, 1), ("client003", 1, 3)) and run.rounds.state.round == 2


def test_at_the_limit_with_too_few_the_server_stops_and_tells_everyone(make_run, clock):
    run = make_run(
        clients=["client001", "client002", "client003"], min_clients=2, round_timeout_s=60
    )
    call = run.delivered("client001", 1)
    clock.now += 61
    run.rounds.wake()
    with pytest.raises(TooFewClients):
        run.coordinator.result()
    refused(
        call,
        "UNAVAILABLE",
        "have client001; waiting for client002, not seen yet; client003",
        "1 of at least 2",
        "60 s",
    )
    refused(run.deliver("client002", 2), "UNAVAILABLE")
    run.start()  # what was delivered is still there, and the limit counts anew
    assert set(run.rounds.uploads) == {"client001"}
    clock.now += 59
    calls = [run.deliver("client002", 2), run.deliver("client003", 3)]
    for call in calls:
        call.result()
    assert run.holds(("client001", 1, 1), ("client002", 1, 2), ("client003", 1, 3))


def test_the_limit_begins_anew_with_each_round(make_run, clock):
    run = make_run(clients=["client001", "client002"], min_clients=1, round_timeout_s=60)
    run.delivered("client001", 1)
    clock.now += 50
    run.deliver("client002", 2).result()
    until(lambda: run.rounds.opened == clock.now, "round 2 is open")
    waiting = run.delivered("client001", 3)
    clock.now += 59
    run.rounds.wake()
    assert not waiting.ended and run.rounds.state.round == 2
    clock.now += 2
    run.rounds.wake()
    assert waiting.result() is True


def test_without_a_limit_the_waiting_is_said_and_for_whom(make_run, monkeypatch):
    monkeypatch.setattr(rounds, "REPORT_EVERY_S", 0.05)
    run = make_run(clients=["client001", "client002", "client003"])
    run.delivered("client001", 1)
    run.delivered("client003", 1)
    run.rounds.last_seen["client002"] = time.monotonic() - 14
    wanted = (
        "round 1: have client001, client003; waiting for client002, last seen 14 s ago; "
        "waiting for "
    )
    until(lambda: any(line.startswith(wanted) for line in run.said), "the line that says for whom")
    assert not run.coordinator.ended


# --- restarts ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: test_crash and test_kill do it for real."""


def kill_at(monkeypatch, number, when):
    """The number-th publish from now on raises, before or after it is done; so do all later ones.

    A publish of a file or of the state. Returns an event that says that it happened.
    """
    inner, count, lock, killed = (
        files.publish,
        itertools.count(1),
        threading.Lock(),
        threading.Event(),
    )

    def publish(written, path):
        with lock:
            this = next(count)
        if this < number or (this == number and when == "after"):
            inner(written, path)
        if this >= number:
            killed.set()
            raise Killed

    for module in (files, rounds):
        monkeypatch.setattr(module, "publish", publish)
    return killed


@pytest.mark.parametrize(
    ("number", "when", "kept"),
    [(1, "before", 1), (1, "after", 1), (2, "before", 1), (2, "after", 9)],
)  # publishes: the state, then the file
def test_a_replacement_that_is_interrupted_leaves_one_of_both(
    make_run, monkeypatch, number, when, kept
):
    run = make_run(clients=["client001", "client002"])
    run.delivered("client001", 1, num_examples=5)
    with monkeypatch.context() as patch:
        kill_at(patch, number, when)
        with pytest.raises(Killed):
            run.deliver("client001", 9, num_examples=6).result()
        run.stop()
    run.start()
    assert run.rounds.uploads["client001"]["num_examples"] == {1: 5, 9: 6}[kept]
    call = run.deliver("client001", kept, num_examples={1: 5, 9: 6}[kept])
    run.deliver("client002", 2).result()
    call.result()
    assert run.holds(("client001", {1: 5, 9: 6}[kept], kept), ("client002", 1, 2))


def test_a_first_upload_that_is_interrupted_does_not_count_last_rounds_file(make_run, monkeypatch):
    run = make_run(clients=["client001", "client002"])
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        call.result()
    with monkeypatch.context() as patch:
        kill_at(patch, 2, "before")
        with pytest.raises(Killed):
            run.deliver("client001", 3).result()
        run.stop()
    run.start()
    assert state_on_disk(run)["uploads"] and not run.rounds.uploads


def test_an_interrupted_replacement_by_a_third_upload(make_run, monkeypatch):
    run = make_run(clients=["client001", "client002"])
    run.delivered("client001", 1)
    for seed in (8, 9):
        with monkeypatch.context() as patch:
            kill_at(patch, 1, "after")
            with pytest.raises(Killed):
                run.deliver("client001", seed).result()
            run.stop()
        run.start()
        assert run.rounds.uploads["client001"]["sha256"] == files.sha256_of(
            write_weights(run.folder / "one.h5", 1)
        )
    run.deliver("client002", 2).result()
    assert run.holds(("client001", 1, 1), ("client002", 1, 2))


@pytest.mark.parametrize("number", range(1, 10))
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_step_of_closing_a_round(make_run, monkeypatch, number, when):
    """Publishes from here: state and file of client002, freeze, merge, commit, history.csv, state.

    Then two of round 2.
    """
    run = make_run(clients=["client001", "client002"])
    run.delivered("client001", 1, num_examples=3)
    with monkeypatch.context() as patch:
        killed = kill_at(patch, number, when)
        try:
            run.deliver("client002", 2).result()
            run.deliver("client001", 3, round_number=2)
            run.deliver("client002", 4, round_number=2)
        except (Killed, Refused):
            pass
        assert killed.wait(60)
        run.stop()
    run.start()
    number = (
        run.rounds.state.round
    )  # 1 or 2 where both uploads were on disk and round 1 is closed as we look
    last = (
        [
            run.deliver("client001", 1, 3, round_number=1),
            run.deliver("client002", 2, round_number=1),
        ]
        if number == 1
        else []
    )
    for call in last:
        call.result()
    if number < 3:
        assert run.holds(("client001", 3, 1), ("client002", 1, 2))
    for call in [
        run.deliver("client001", 3, round_number=2),
        run.deliver("client002", 4, round_number=2),
    ]:
        assert call.result() is True
    run.coordinator.result()
    assert run.holds(("client001", 1, 3), ("client002", 1, 4))
    assert [row["round"] for row in state_on_disk(run)["history"]] == [1, 2]
    assert (run.folder / "history.csv").read_text().count("\n") == 3


def test_a_crash_between_merge_and_commit_merges_the_same_set_again(make_run):
    run = make_run(clients=["client001", "client002"])

    def merge_and_die(paths, num_examples):
        run.average(paths, num_examples)
        raise Killed

    run.merge = merge_and_die
    calls = [run.deliver("client001", 1, 5), run.deliver("client002", 2)]
    for call in calls:
        refused(call, "INTERNAL")
    merged = files.sha256_of(run.weights)
    run.merge = run.average
    run.start()
    assert files.sha256_of(run.weights) == merged == run.rounds.state.weights_sha256
    assert run.holds(("client001", 5, 1), ("client002", 1, 2)) and run.rounds.state.round == 2
    for call in [
        run.deliver("client001", 1, 5, round_number=1),
        run.deliver("client002", 2, round_number=1),
    ]:
        call.result()


@pytest.mark.parametrize("step", ["merge", "evaluate"])
def test_a_round_that_cannot_be_closed_ends_everyones_wait(make_run, step):
    run = make_run(clients=["client001", "client002"])

    def fail(*_):
        raise OSError(28, "No space left on device")

    setattr(run, step, fail)
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        refused(call, "INTERNAL", "round 1 could not be closed", "No space left", "kept")
    with pytest.raises(OSError, match="No space"):
        run.coordinator.result()
    refused(Call(run.rounds.fetch, "client001"), "INTERNAL")
    run.merge, run.evaluate = run.average, metrics
    run.start()
    run.deliver("client001", 1, round_number=1).result()
    assert (
        run.holds(("client001", 1, 1), ("client002", 1, 2))
        and len(state_on_disk(run)["history"]) == 1
    )


@pytest.mark.parametrize("name", ["state.json", "history.csv"])
def test_nobody_is_answered_when_the_history_could_not_be_written(make_run, monkeypatch, name):
    run = make_run(clients=["client001"])
    inner = files.publish

    def evaluate():
        def publish(written, path):
            if path.name == name:
                raise OSError(28, "No space left on device")
            inner(written, path)

        monkeypatch.setattr(files, "publish", publish)
        return metrics()

    run.evaluate = evaluate
    refused(run.deliver("client001", 1), "INTERNAL", "No space left")
    monkeypatch.setattr(files, "publish", inner)
    assert not state_on_disk(run)["history"] and not list(run.folder.glob(".*.tmp*"))
    run.evaluate = metrics
    run.start()
    run.deliver("client001", 1, round_number=1).result()
    assert (run.folder / "history.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("step", ["merge", "evaluate", "_freeze"])
def test_a_server_out_of_open_files_goes_on_when_they_come_back(make_run, monkeypatch, step):
    monkeypatch.setattr(rounds, "RETRY_S", 0.01)
    run, failures = make_run(clients=["client001", "client002"]), [24, 23, 24]  # EMFILE, ENFILE
    owner = run.rounds if step == "_freeze" else run
    inner = getattr(owner, step)

    def out_of_files(*arguments):
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return inner(*arguments)

    setattr(owner, step, out_of_files)
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        call.result()
    assert not failures and run.holds(("client001", 1, 1), ("client002", 1, 2))
    assert sum("Too many open files; trying again" in line for line in run.said) == 3


def test_a_signal_ends_a_server_that_is_out_of_open_files(make_run, monkeypatch):
    run = make_run(clients=["client001"])

    def out_of_files(*_):
        raise OSError(24, "Too many open files")

    run.merge = out_of_files
    call = run.deliver("client001", 1)
    until(lambda: any("trying again" in line for line in run.said), "it tries again")
    run.rounds.stop("UNAVAILABLE", "the server is stopping")
    refused(call, "UNAVAILABLE")
    with pytest.raises(Refused):
        run.coordinator.result()


@pytest.mark.parametrize("name", ["state.json", "client_weights.h5"])
def test_an_upload_that_could_not_be_stored_leaves_the_round_unharmed(make_run, monkeypatch, name):
    run = make_run(clients=["client001", "client002"])
    waiting = run.delivered("client001", 1)
    inner = files.publish

    def publish(written, path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        inner(written, path)

    with monkeypatch.context() as patch:
        for module in (files, rounds):
            patch.setattr(module, "publish", publish)
        for client in ("client001", "client002"):
            with pytest.raises(OSError, match="No space"):
                run.deliver(client, 5).result()
    assert set(run.rounds.uploads) == {"client001"} and not waiting.ended
    run.deliver("client002", 2).result()
    waiting.result()
    assert run.holds(("client001", 1, 1), ("client002", 1, 2))


def test_a_frozen_upload_that_is_gone_is_an_error_that_names_it(make_run):
    run = make_run(clients=["client001", "client002"])
    run.merge = lambda *_: 1 / 0
    for call in [run.deliver("client001", 1), run.deliver("client002", 2)]:
        refused(call, "INTERNAL")
    write_weights(run.rounds.upload_path("client002"), 7)
    with pytest.raises(ValueError, match="the weights of client002 in .* --fresh"):
        run.start()


def test_the_state_is_readable_and_versioned(make_run):
    run = make_run(clients=["client001"])
    state = json.loads((run.folder / "state.json").read_text())
    assert (
        state["version"] == files.STATE_VERSION
        and state["round"] == 1
        and state["clients"] == ["client001"]
    )


# --- peers that name no round --------------------------------------------------------------------


def test_a_silent_peer_that_was_seen_to_fetch_delivers_for_that_round(make_run):
    run = make_run(clients=["client001", "client002"], rounds=3)
    for number in (1, 2):  # it changed nothing: the same bytes in every round
        call = run.delivered("client001", 1, run=None, round_number=number)
        run.deliver("client002", number).result()
        call.result()
    run.deliver("client001", 1, run=None, round_number=2).result()  # a repeat
    refused(run.deliver("client001", 1, run=None, round_number=1), "FAILED_PRECONDITION", "over")
    assert not run.rounds.uploads and run.rounds.state.round == 3


def test_a_silent_peer_that_was_not_seen_to_fetch(make_run):
    run = make_run(clients=["client001", "client002"], rounds=3)
    call = run.delivered(
        "client001", 1, run=None, round_number=None
    )  # anything else counts for the open round
    run.deliver("client002", 2).result()
    call.result()
    run.restart()
    run.deliver("client001", 1, run=None, round_number=None).result()  # equal bytes are a repeat
    assert not run.rounds.uploads
    call = run.delivered("client001", 5, run=None, round_number=None)
    run.deliver("client002", 6).result()
    call.result()
    assert run.holds(("client001", 1, 5), ("client002", 1, 6))


def test_a_silent_peer_of_unknown_round_is_refused_where_not_all_are_required(make_run):
    run = make_run(clients=["client001", "client002"], min_clients=1, round_timeout_s=600)
    refused(
        run.deliver("client001", 1, run=None, round_number=None),
        "FAILED_PRECONDITION",
        "did not fetch",
        "open round is 1",
    )


# --- the end -------------------------------------------------------------------------------------


def test_the_end_waits_for_every_client_or_the_time(make_run):
    run = make_run(clients=["client001", "client002"], rounds=1)
    present = [True]
    gone = run.delivered("client001", 1, alive=lambda: present[0])
    present[0] = False
    run.rounds.wake()
    refused(gone, "CANCELLED")
    assert run.deliver("client002", 2).result() is True
    run.coordinator.result()
    started = time.monotonic()
    run.rounds.wait_until_all_done(0.3)
    assert time.monotonic() - started >= 0.3
    left = Call(run.rounds.wait_until_all_done, 60)
    assert run.deliver("client001", 1, round_number=1).result() is True
    for client in ("client001", "client002"):
        assert not left.ended  # an answer is not the result
        run.rounds.note_done(client)
    left.result(10)


def test_the_end_waits_as_long_as_a_client_moves(make_run):
    run = make_run(clients=["client001"], rounds=1)
    run.deliver("client001", 1).result()
    run.coordinator.result()
    left = Call(run.rounds.wait_until_all_done, 0.5)
    started = time.monotonic()
    while time.monotonic() - started < 1.5:
        run.rounds.note_progress()
        assert not left.ended
        time.sleep(0.01)
    left.result(10)
    assert "client001 did not fetch the result within 0.5 s" in run.said


def test_an_old_peer_is_done_with_its_last_answer(make_run):
    run = make_run(clients=["client001"], rounds=1)
    run.deliver("client001", 1, run=None, round_number=1).result()
    Call(run.rounds.wait_until_all_done, 60).result(10)


def test_the_result_is_handed_out_once_it_is_evaluated(make_run):
    run = make_run(clients=["client001"], rounds=1)
    gate = threading.Event()
    run.evaluate = lambda: gate.wait(DEADLINE_S) and metrics()
    call = run.deliver("client001", 1)
    until(lambda: run.rounds.done, "the round is merged")
    fetch = Call(run.rounds.fetch, "client001")
    assert not fetch.ended and run.rounds.state.evaluated == 0
    gate.set()
    number, _, file = fetch.result()
    file.close()
    assert number == 2 and run.rounds.state.evaluated == 1
    call.result()


def test_what_is_known_of_the_best_round_is_kept_and_published_before_the_history(make_run):
    run = make_run(clients=["client001"], rounds=2)
    seen = []

    def publish_result(state, row):
        rows = (run.folder / "history.csv").read_text().count("\n") - 1
        seen.append((row["round"], state.evaluated, rows, state.best))
        return {"round": row["round"], "auc": 0.5, "sha256": state.weights_sha256}

    run.rounds.publish_result = publish_result
    run.deliver("client001", 1).result()
    first = state_on_disk(run)["best"]
    assert first == {"round": 1, "auc": 0.5, "sha256": state_on_disk(run)["weights_sha256"]}
    run.deliver("client001", 2).result()
    assert seen == [(1, 0, 0, None), (2, 1, 1, first)]


@pytest.mark.parametrize("rounds_now", [None, 3])
def test_a_finished_run_answers_repeats_again_and_can_be_extended(make_run, rounds_now):
    run = make_run(clients=["client001", "client002"], rounds=2)
    for number in (1, 2):
        for call in [run.deliver("client001", number), run.deliver("client002", 7)]:
            call.result()
    run.coordinator.result()
    run.restart(rounds=rounds_now)
    last = run.deliver("client001", 2, round_number=2).result()
    assert last is (rounds_now is None)
    left = Call(run.rounds.wait_until_all_done, 60)
    number, _, file = run.rounds.fetch("client002")
    file.close()
    assert number == 3
    if rounds_now is None:
        run.coordinator.result()
        for client in ("client001", "client002"):
            run.rounds.note_done(client)
        left.result(10)
    else:
        for call in [run.deliver("client001", 8), run.deliver("client002", 9)]:
            assert call.result() is True
        for client in ("client001", "client002"):
            run.rounds.note_done(client)
        left.result(10)
        assert run.holds(("client001", 1, 8), ("client002", 1, 9))
        assert [row["round"] for row in state_on_disk(run)["history"]] == [1, 2, 3]


def test_a_shorter_run_than_was_done_is_finished(make_run):
    run = make_run(clients=["client001"], rounds=3)
    for number in (1, 2):
        run.deliver("client001", number).result()
    run.restart(rounds=1)
    run.coordinator.result()
    assert run.deliver("client001", 2, round_number=2).result() is True
    run.rounds.note_done("client001")
    Call(run.rounds.wait_until_all_done, 60).result(10)


def test_the_initial_weights_of_the_tests_are_reproducible(tmp_path):
    one, other = write_weights(tmp_path / "one.h5", 3), write_weights(tmp_path / "other.h5", 3)
    assert one.read_bytes() == other.read_bytes() and len(read_weights(one)) == 4
