"""service.py: what moves and what does not, who ends whom, `tell`, and gRPC's options.

A served run within this process; what an attack costs others is test_attacks.py.
"""

import contextlib
import gc
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import grpc._cython.cygrpc
import pytest
from conftest import ROOT, processes_in, until, write_weights
from hostile import replace_converter
from serving import Served, connection, refusal, serve

from common import files
from federation import service
from generated import todo_pb2, todo_pb2_grpc

CANCELLED, INVALID = "CANCELLED", "INVALID_ARGUMENT"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("service"))
    yield served
    served.close()


@pytest.fixture
def good(tmp_path, served):
    """The files of client001 and client002: others in each test, or they would be repeats."""
    seed = 100 * served.round
    return [write_weights(tmp_path / f"{k}.h5", seed + k) for k in (1, 2)]


def finish(served, *calls):
    """These deliveries are answered, and the average is that of the files in `good`."""
    assert [call.result().value for call in calls] == [1] * len(calls)
    seed = 100 * (served.round - 1)
    assert served.run.holds(("client001", 3, seed + 1), ("client002", 3, seed + 2))


def said_anew(served, monkeypatch):
    """What was said before counts no more, as when a minute has passed."""
    monkeypatch.setattr(served.run.rounds.say_of, "said", {})
    served.run.said.clear()


@pytest.fixture
def silent(served):
    """silent(method, client or None) -> a call that is opened and sends no message.

    fetched  whether its connection has fetched the weights before
    """
    over, channels = threading.Event(), []

    def nothing():
        over.wait(60)
        yield from ()

    def open_call(method, client, fetched=False):
        metadata = [("fedml-client", client)] if client else None
        channels.append(connection(served.address))
        if fetched:
            list(todo_pb2_grpc.FedMLStub(channels[-1]).getWeight(todo_pb2.void(), timeout=60))
        # as a stream, whatever the stub says: a stub cannot be silent where one message is due
        opened = channels[-1].stream_stream(f"/todoPackage.FedML/{method}")
        return opened(nothing(), metadata=metadata, timeout=60)

    yield open_call
    over.set()
    for channel in channels:
        channel.close()


def half_an_upload(served, go_on):
    """A call of client002 that sends a part, and no more until go_on is set."""

    def half():
        yield todo_pb2.modelWeight(blob=bytes(9000), clientname="client002", clientsize=3)
        go_on.wait(60)

    call = served.stub.sendWeight.future(
        half(), metadata=[("fedml-client", "client002")], timeout=60
    )
    until(lambda: call.done() or list(served.folder.rglob("*.tmp*")), "half is there")
    return call


# --- what does not move --------------------------------------------------------------------------


@pytest.mark.parametrize(("stall_s", "ends_at"), [(1, math.inf), (math.inf, 0)])
def test_an_upload_that_takes_too_long_is_ended_leaves_nothing_and_stops_no_one_else(
    served, good, monkeypatch, stall_s, ends_at
):
    """It stands still, or its time is over in all."""
    said_anew(served, monkeypatch)
    first, go_on = served.counted(good[0], "client001"), threading.Event()
    call = half_an_upload(served, go_on)
    (transfer,) = served.service.transfers
    assert transfer.stall_s == 30
    transfer.stall_s, transfer.ends_at = stall_s, ends_at
    assert refusal(call)[0] == CANCELLED
    until(lambda: served.said("client002: its upload stands still"), "it is said")
    until(lambda: not list(served.folder.rglob("*.tmp*")), "nothing is left of it")
    go_on.set()
    finish(served, first, served.send(good[1], "client002"))


def test_of_uploads_that_break_off_nothing_stays_in_memory(served):
    """gRPC counts a call against its connection until Python has forgotten it."""
    gc.disable()
    try:
        for _ in range(2 * service.CALLS_PER_CONNECTION):
            go_on = threading.Event()
            call = half_an_upload(served, go_on)
            assert call.cancel(), call.details()
            go_on.set()
            until(lambda: not list(served.folder.rglob("*.tmp*")), "nothing is left of it")
    finally:
        gc.enable()


def test_a_new_upload_ends_the_clients_own_while_it_is_converted(
    served, good, tmp_path, monkeypatch
):
    other = write_weights(tmp_path / "other.h5", 1, root="model_weights")
    with monkeypatch.context() as patch:
        replace_converter(patch, tmp_path, "time.sleep(1000)")
        converted = served.send(other, "client002")
        until(lambda: processes_in(tmp_path), "it is being converted")
    finish(served, served.send(good[0], "client001"), served.send(good[1], "client002"))
    assert refusal(converted)[0] == CANCELLED
    assert not processes_in(tmp_path)


def test_a_client_that_goes_away_after_a_complete_upload_counts(served, good):
    served.counted(good[0], "client001").cancel()
    until(lambda: served.said("client001 went away; what it delivered counts"), "noticed")
    finish(served, served.send(good[1], "client002"))


@pytest.mark.parametrize(
    ("method", "client", "fetched", "stall_s"),
    [
        ("tell", "client001", False, 1),
        ("sendWeight", None, False, 1),
        ("sendWeight", None, True, 30),  # a peer of 2020, as its connection tells
        ("sendWeight", "client001", False, 30),
    ],
)
def test_how_long_a_first_message_may_be_in_coming(
    served, silent, monkeypatch, method, client, fetched, stall_s
):
    assert service.FIRST_MESSAGE_S == 1
    monkeypatch.setattr(service, "FIRST_MESSAGE_S", 20)  # it is looked at before it is ended
    call = silent(method, client, fetched)
    (transfer,) = until(lambda: served.service.transfers.copy(), "it waits")
    assert transfer.stall_s == (20 if stall_s == 1 else stall_s)
    call.cancel()
    until(lambda: not served.service.transfers, "nothing is held")


def test_one_call_of_a_kind_a_client_and_few_of_peers_without_a_name(served, silent, monkeypatch):
    monkeypatch.setattr(service, "FIRST_MESSAGE_S", 60)

    def ended(calls):
        return [call for call in calls if call.done()]

    for method in ("tell", "sendWeight"):
        calls = [silent(method, "client001") for _ in range(3)]
        until(lambda calls=calls: len(ended(calls)) == 2, "the newer ends the older")
        until(lambda: len(served.service.transfers) == 1, "and goes on")
        for call in calls:
            call.cancel()
        until(lambda: not served.service.transfers, "the last one, too")
    said_anew(served, monkeypatch)
    unnamed = [silent("sendWeight", None) for _ in range(len(["client001", "client002"]) + 3)]
    until(lambda: len(ended(unnamed)) == 2, "two are too many")
    served.tell("client001")  # whoever is enrolled is served all the while
    assert [call.code().name for call in ended(unnamed)] == ["RESOURCE_EXHAUSTED"] * 2
    assert len(served.said("RESOURCE_EXHAUSTED")) == 1  # in a minute
    for call in unnamed:
        call.cancel()
    until(lambda: not served.service.transfers, "nothing is held")


def test_a_download_may_stand_still_for_30_s_and_one_without_a_name_has_a_total_time(served):
    def nothing(*_):
        return True

    context = SimpleNamespace(
        add_callback=nothing, is_active=nothing, send_initial_metadata=nothing
    )
    longest_s = 60 + served.service.max_bytes / service.SLOWEST_BYTES_PER_S
    for client, total_s in (("client001", math.inf), (None, longest_s)):
        caller = service.Caller(client, {}, "here", is_new=client is not None)
        download = served.service.send_weights(caller, context)
        next(download)
        (transfer,) = served.service.transfers
        assert transfer.stall_s == 30
        assert transfer.ends_at - transfer.last_progress_at == pytest.approx(total_s, abs=1)
        download.close()


def test_messages_are_counted_and_those_without_content_are_no_progress(served):
    moved = []
    transfer = SimpleNamespace(note_progress=lambda: moved.append(1))
    empty = [todo_pb2.modelWeight(clientname="client001")] * 200
    with pytest.raises(ValueError, match="in more than 10. messages"):
        list(served.service.limited(empty, transfer))
    assert not moved
    list(served.service.limited([todo_pb2.modelWeight(blob=b"x")], transfer))
    assert moved and transfer.stall_s == math.inf  # complete: what follows is ours to do


def test_calls_that_never_send_their_request_hold_no_thread(served, silent):
    """getWeight, on the wire a stream of one request: more of them than there are threads."""
    calls = [silent("getWeight", "client001") for _ in range(2 * served.service.num_threads)]
    assert served.tell("client001").run == "run0"
    for call in calls:  # answered, or ended by a newer one
        with contextlib.suppress(grpc.RpcError):
            list(call)
    assert any(call.code() == grpc.StatusCode.OK for call in calls)


def test_a_port_that_is_taken_on_one_address_of_the_host_is_taken(served):
    """localhost is 127.0.0.1 and ::1: the second would get half of the clients, in silence."""
    server, address = serve(served.run.rounds, "127.0.0.1:0")
    with pytest.raises(ValueError, match="cannot listen on .*another server"):
        serve(served.run.rounds, address.replace("127.0.0.1", "localhost"))
    server.stop(0).wait()


# --- answers -------------------------------------------------------------------------------------


def test_the_answers_metadata_and_the_weights_that_are_handed_out(served, good):
    number = str(served.round + 1)
    answers = [served.send(good[0], "client001"), served.send(good[1], "client002")]
    for answer in answers:
        assert answer.result().value == 1
        assert dict(answer.trailing_metadata()) == {"fedml-round": number}
    call = served.fetch("client001")
    told = dict(call.initial_metadata())
    assert b"".join(message.blob for message in call) == served.run.weights.read_bytes()
    expected = {"run": "run0", "round": number, "rounds": "10000"}
    expected |= {"sha256": files.sha256_of(served.run.weights)}
    expected |= {"arch": "drcnn", "image-size": "32"}
    assert told == {f"fedml-{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("arch", ["vgg16", "drcnn"])
def test_a_peer_of_2020_is_warned_of_where_it_cannot_load_the_weights(served, monkeypatch, arch):
    said_anew(served, monkeypatch)
    monkeypatch.setattr(served.run.rounds, "state", served.run.rounds.state.changed(arch=arch))
    assert list(served.stub.getWeight(todo_pb2.void(), timeout=60))
    assert bool(served.said("--arch vgg16 only")) == (arch == "drcnn")


# --- tell ----------------------------------------------------------------------------------------


def row(served):
    where = served.run.rounds.client_table.rows["client001"]
    return where["phase"], where["epoch"], where["epochs"], where["seconds_left"]


def test_tell_is_noted_and_answered_with_the_open_round(served):
    answer = served.tell("client001", "training", epoch=2, epochs=5, seconds_left=180)
    assert (answer.run, answer.round) == ("run0", served.round)
    assert row(served) == ("training", 2, 5, 180)
    served.tell("client001", "waiting")
    assert row(served) == ("waiting", None, None, None)


def test_scores_are_kept_with_the_upload_that_they_are_told_before(served, good):
    scores = {"examples": 60, "loss": 0.3, "auc": 0.9, "training_loss": 0.2}
    number = served.round
    served.tell("client001", round_number=number, scores=scores)
    served.tell("client002", run="another", round_number=number, scores=scores)
    served.tell("client002", round_number=number + 1, scores=scores)
    finish(served, served.send(good[0], "client001"), served.send(good[1], "client002"))
    counted = served.run.rounds.state.counted
    assert counted["client001"]["scores"] == scores
    assert "scores" not in counted["client002"]


BAD = {
    "NaN": {"scores": {"loss": math.nan}},
    "out of range": {"scores": {"auc": 1.5}},
    "unknown": {"scores": {"<b>": 1}},
    "10 kB": {"scores": {f"score{number:06}": 0.5 for number in range(500)}},
    "an unknown phase": {"phase": "\x1b[2Jdone" + "p" * 10_000},
    "an epoch before the first": {"epoch": -3},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_left_out_and_said_once(served, monkeypatch, kind):
    said_anew(served, monkeypatch)
    for _ in range(5):
        served.tell("client001", round_number=served.round, seconds_left=5, **BAD[kind])
    assert not served.run.rounds.scores.get("client001")
    phase = "working" if "phase" in BAD[kind] else "training"
    assert row(served) == (phase, None, None, 5)
    (line,) = served.said("left out")
    assert "client001" in line and len(line) < 300


def test_a_stranger_and_a_peer_without_a_name_have_nothing_to_tell(served):
    for client, code in (("client009", "PERMISSION_DENIED"), (None, INVALID)):
        metadata = [("fedml-client", client)] if client else None
        call = served.stub.tell.future(todo_pb2.clientStatus(), metadata=metadata, timeout=60)
        assert refusal(call)[0] == code
    assert set(served.run.rounds.client_table.rows) == {"client001", "client002"}


OPTION = re.compile(r'"(grpc\.[a-z0-9_.]+)"')


def test_grpc_knows_every_option_that_it_is_given():
    """It passes over a name that it does not know, in silence."""
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    sources = [ROOT / "todoClient.py", *(ROOT / "federation").glob("*.py")]
    names = {name for path in sources for name in OPTION.findall(path.read_text("utf-8"))}
    assert len(names) > 10
    for name in names:  # as a C text that is no other one's end
        text = name.encode() + b"\0"
        ends = [found.start() for found in re.finditer(re.escape(text), library)]
        assert any(library[end - 1 : end] not in b"._abcdefghijklmnopqrstuvwxyz" for end in ends)
