"""service.py: what moves and what does not, who ends whom, `tell`, and how calls are registered.

A served run within this process; what an attack costs others is test_attacks.py.
"""

import contextlib
import math
import re
import threading
from pathlib import Path

import grpc._cython.cygrpc
import pytest
from conftest import ROOT, same_bits, until, write_weights
from serving import Served, refusal, serve
from standin import read_weights

from common import files
from federation import service, status
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


def finish(served, good, first=None):
    """client002 delivers, client001 did (its call is `first`) or does: the average is theirs."""
    calls = [first or served.send(good[0], "client001"), served.send(good[1], "client002")]
    assert [call.result().value for call in calls] == [1] * len(calls)
    seed = 100 * (served.round - 1)
    assert served.run.holds(("client001", 3, seed + 1), ("client002", 3, seed + 2))


class Halves:
    """A stream that stops behind its first half until it is let go."""

    def __init__(self, path, client):
        self.sent, self.go_on = threading.Event(), threading.Event()
        self.whole, self.client = path.read_bytes(), client

    def __iter__(self):
        yield todo_pb2.modelWeight(blob=self.whole[:9000], clientname=self.client, clientsize=3)
        self.sent.set()
        self.go_on.wait(60)
        yield todo_pb2.modelWeight(blob=self.whole[9000:])


@pytest.fixture
def half(served, good):
    """(stream, call): client002's upload stands still, half of it lies on the server's disk."""
    stream = Halves(good[1], "client002")
    metadata = [("fedml-client", "client002")]
    call = served.stub.sendWeight.future(iter(stream), metadata=metadata, timeout=60)
    folder = served.folder / "server" / "client002"
    until(lambda: any(each.stat().st_size for each in folder.glob(".*.tmp*")), "half is there")
    yield stream, call
    stream.go_on.set()


def is_done(call):
    return call.done()


def has_ended(call):
    """Whether a streamed answer has ended, after reading what is there."""
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    return call.done()


def nothing(over):
    """A stream without a message, until the event comes."""
    over.wait(60)
    yield from ()


@pytest.fixture
def silent(served):
    """silent(method, client or None) -> a call that is opened and sends no message."""
    over, channels = threading.Event(), []
    # as streams, whatever the stub says: a stub cannot be silent where one message is due
    kinds = {"getWeight": "stream_stream", "sendWeight": "stream_unary", "tell": "stream_unary"}

    def open_call(method, client):
        path = f"/todoPackage.FedML/{method}"
        metadata = [("fedml-client", client)] if client else None
        # each on its own connection, which takes few calls at a time
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels.append(grpc.insecure_channel(served.address, options))
        if kinds[method] == "stream_stream":
            return channels[-1].stream_stream(path)(nothing(over), metadata=metadata, timeout=60)
        opened = channels[-1].stream_unary(path)
        return opened.future(nothing(over), metadata=metadata, timeout=60)

    yield open_call
    over.set()
    for channel in channels:
        channel.close()


# --- what does not move --------------------------------------------------------------------------


def test_an_upload_that_stands_still_is_ended_and_stops_no_one_else(
    served, good, half, monkeypatch
):
    first = served.counted(good[0], "client001")
    monkeypatch.setattr(service, "STALL_S", 1)
    (transfer,) = served.service.transfers
    transfer.stall_s = 1
    assert refusal(half[1])[0] == CANCELLED
    assert until(lambda: served.said("client002: its upload stands still"), "it is said")
    finish(served, good, first)


def test_a_new_upload_ends_the_clients_own_half_sent_one(served, good, half):
    finish(served, good)
    assert refusal(half[1])[0] == CANCELLED


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(served, good, half):
    first = served.counted(good[0], "client001")
    half[1].cancel()
    half[0].go_on.set()
    until(lambda: not list(served.folder.rglob("*.tmp*")), "nothing is left of it")
    finish(served, good, first)


def test_a_client_that_goes_away_after_a_complete_upload_counts(served, good):
    served.counted(good[0], "client001").cancel()
    until(lambda: served.said("client001 went away; what it delivered counts"), "noticed")
    number = served.round
    assert served.send(good[1], "client002").result().value == 1
    seeds = 100 * number + 1, 100 * number + 2
    assert served.run.holds(("client001", 3, seeds[0]), ("client002", 3, seeds[1]))


@pytest.mark.parametrize(
    ("method", "client"), [("sendWeight", None), ("tell", "client001"), ("tell", None)]
)
def test_who_says_nothing_is_ended_after_a_second(served, silent, method, client):
    """An enrolled client's upload may wait for its first message as long as for any other."""
    code, _ = refusal(silent(method, client))
    assert code in (CANCELLED, INVALID)
    until(lambda: not served.service.transfers, "nothing is held")
    assert service.FIRST_MESSAGE_S == 1 < service.STALL_S


def test_one_call_of_a_kind_a_client_and_few_of_peers_without_a_name(served, silent, monkeypatch):
    monkeypatch.setattr(service, "FIRST_MESSAGE_S", 60)
    for method in ("tell", "sendWeight"):
        calls = [silent(method, "client001") for _ in range(5)]
        until(lambda calls=calls: sum(map(is_done, calls)) == 4, "the newer ends the older")
        until(lambda: len(served.service.transfers) == 1, "and goes on")
        (last,) = [call for call in calls if not call.done()]
        last.cancel()
        until(lambda: not served.service.transfers, "the last one, too")
    unnamed = [silent("sendWeight", None) for _ in range(served.service.max_unnamed + 2)]
    until(lambda: sum(map(is_done, unnamed)) == 2, "two are too many")
    ended = [call.code().name for call in unnamed if call.done()]
    assert ended == ["RESOURCE_EXHAUSTED"] * 2
    served.tell("client001")  # whoever is enrolled is served all the while
    for call in unnamed:
        call.cancel()
    until(lambda: not served.service.transfers, "nothing is held")


def test_a_peer_without_a_name_has_a_total_time_and_a_client_has_not(served):
    with served.service.moving("client001", "download", None) as named:
        assert named.ends_at == math.inf
    with served.service.moving(None, "download", None) as unnamed:
        longest_s = 60 + served.service.max_bytes / service.SLOWEST_BYTES_PER_S
        left_s = unnamed.ends_at - unnamed.last_moved
        assert left_s == pytest.approx(longest_s, abs=1)


def test_calls_that_never_send_their_request_hold_no_thread(served, silent):
    """getWeight, on the wire a stream of one request: more of them than there are threads."""
    calls = [silent("getWeight", "client001") for _ in range(2 * served.service.num_threads)]
    assert served.tell("client001").run == "run0"
    until(lambda: all(map(has_ended, calls)), "each is answered, or ended by a newer one")
    assert any(call.code() == grpc.StatusCode.OK for call in calls)


def test_a_server_that_serves_no_one_without_a_name_says_what_helps(served):
    server, address = serve(served.run.rounds, serve_unnamed=False)
    with grpc.insecure_channel(address) as channel:
        stub = todo_pb2_grpc.FedMLStub(channel)
        code, sentence = refusal(stub.getWeight(todo_pb2.void(), timeout=60))
    server.stop(0).wait()
    assert code == "UNAUTHENTICATED" and "--insecure" in sentence and "--tls-ca" in sentence


def test_a_second_server_on_the_port_is_refused(served):
    with pytest.raises(ValueError, match="cannot listen on .*another server"):
        serve(served.run.rounds, served.address)


# --- answers -------------------------------------------------------------------------------------


def test_the_answers_metadata_and_the_weights_that_are_handed_out(served, good, tmp_path):
    number = served.round
    answers = [served.send(good[0], "client001"), served.send(good[1], "client002")]
    for answer in answers:
        assert answer.result().value == 1
        assert dict(answer.trailing_metadata()) == {"fedml-round": str(number + 1)}
    call = served.fetch("client001")
    told = dict(call.initial_metadata())
    (tmp_path / "got.h5").write_bytes(b"".join(message.blob for message in call))
    digest = files.sha256_of(tmp_path / "got.h5")
    assert same_bits(read_weights(tmp_path / "got.h5"), read_weights(served.run.weights))
    expected = {"run": "run0", "round": str(number + 1), "rounds": "10000", "sha256": digest}
    expected |= {"arch": "drcnn", "image-size": "32"}
    assert told == {f"fedml-{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("arch", ["vgg16", "drcnn"])
def test_a_peer_of_2020_is_warned_of_where_it_cannot_load_the_weights(served, monkeypatch, arch):
    state = served.run.rounds.state
    monkeypatch.setattr(served.run.rounds, "state", state.changed(arch=arch))
    monkeypatch.setattr(served.run.rounds.say_of, "said", {})
    before = len(served.said("--arch vgg16 only"))
    assert list(served.stub.getWeight(todo_pb2.void(), timeout=60))
    assert len(served.said("--arch vgg16 only")) - before == (arch == "drcnn")


# --- tell ----------------------------------------------------------------------------------------


def row(served, client="client001"):
    return served.run.rounds.client_table.rows[client]


def test_tell_is_noted_and_answered_with_the_open_round(served):
    answer = served.tell("client001", "training", epoch=2, epochs=5, seconds_left=180)
    assert (answer.run, answer.round) == ("run0", served.round)
    where = row(served)
    assert (where["phase"], where["epoch"], where["epochs"]) == ("training", 2, 5)
    assert (
        status.where(where, where["last_seen"])
        == "training, epoch 2 of 5, 3 min to go, heard 0 s ago"
    )
    served.tell("client001", "waiting")
    assert (row(served)["phase"], row(served)["epoch"]) == ("waiting", None)


def test_scores_are_kept_with_the_upload_that_they_are_told_before(served, good):
    scores = {"examples": 60, "loss": 0.3, "auc": 0.9, "training_loss": 0.2}
    number = served.round
    served.tell("client001", round_number=number, scores=scores)
    served.tell("client002", run="another", round_number=number, scores=scores)
    served.tell("client002", round_number=number + 1, scores=scores)
    finish(served, good)
    counted = served.run.rounds.state.counted
    assert counted["client001"]["scores"] == scores
    assert "scores" not in counted["client002"]


BAD_SCORES = {
    "NaN": {"loss": math.nan},
    "infinity": {"loss": math.inf},
    "out of range": {"auc": 1.5},
    "less than nothing": {"examples": -1},
    "unknown": {"<b>": 1},
    "10 kB": {f"score{number:06}": 0.5 for number in range(500)},
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_what_cannot_be_a_score_is_left_out_and_said_once(served, monkeypatch, kind):
    monkeypatch.setattr(served.run.rounds.say_of, "said", {})
    before = len(served.said("left out"))
    for _ in range(5):
        served.tell("client002", round_number=served.round, scores=BAD_SCORES[kind])
    assert not served.run.rounds.scores.get("client002")
    (line,) = served.said("left out")[before:]
    assert "client002" in line and len(line) < 300


def test_an_unknown_phase_is_shown_as_working_and_said_once(served, monkeypatch):
    monkeypatch.setattr(served.run.rounds.say_of, "said", {})
    before = len(served.said("left out"))
    for phase in ("", "\x1b[2Jdone", "p" * 10_000):
        served.tell("client001", phase, epoch=-3, seconds_left=2**31 - 1)
        assert (row(served)["phase"], row(served)["epoch"]) == ("working", None)
    assert len(served.said("left out")) == before + 1
    assert "client001" not in served.run.rounds.done_clients


def test_a_stranger_and_a_peer_without_a_name_have_nothing_to_tell(served):
    for client, code in (("client009", "PERMISSION_DENIED"), (None, INVALID)):
        metadata = [("fedml-client", client)] if client else None
        call = served.stub.tell.future(todo_pb2.clientStatus(), metadata=metadata, timeout=60)
        assert refusal(call)[0] == code
    assert set(served.run.rounds.client_table.rows) == {"client001", "client002"}


# --- how methods are registered ------------------------------------------------------------------


def test_a_method_that_does_not_exist_is_unimplemented(served):
    call = served.channel.unary_unary("/todoPackage.FedML/other").future(b"", timeout=60)
    assert refusal(call)[0] == "UNIMPLEMENTED"


def test_every_method_of_the_contract_is_served(served):
    methods = todo_pb2.DESCRIPTOR.services_by_name["FedML"].methods_by_name
    for name in methods:
        opened = served.channel.stream_stream(f"/todoPackage.FedML/{name}")
        metadata = [("fedml-client", "client009")]
        assert refusal(opened(iter([b""]), metadata=metadata, timeout=60))[0] == "PERMISSION_DENIED"


OPTION = re.compile(r'"(grpc\.[a-z0-9_.]+)"')


def test_grpc_knows_every_option_that_it_is_given():
    """It passes over a name that it does not know, in silence."""
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("[!g]*/*.py")]
    sources += [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    names = {name for source in sources for name in OPTION.findall(source)}
    assert len(names) > 10
    for name in names:  # as a C text that is no other one's end
        assert re.search(rb"(?<![a-z._])" + re.escape(name).encode() + rb"\0", library), name
