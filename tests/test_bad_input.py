"""Nothing bad gets in: each row of the table is refused with its status code and a sentence.

It leaves every file as it was, and the round's merged weights are what they would have been.
"""

import base64
import re
import threading
import time

import grpc
import h5py
import numpy as np
import pytest
from conftest import Run, random_tensors, until, write_weights
from hostile import many_names, replace_converter
from serving import serve
from standin import SHAPES

import todoServer
from common import files
from federation import convert, service, streams, weights
from generated import todo_pb2, todo_pb2_grpc

MAX_EXAMPLES = 1000
NAME = "client002/client_weights.h5"


class Served:
    """A run of 10,000 rounds for two clients behind a real server, and a channel to it."""

    def __init__(self, folder):
        self.folder = folder
        self.run = Run(folder / "server", ["client001", "client002"], rounds=10_000)
        servicer = todoServer.FedMLServicer(self.run.rounds, MAX_EXAMPLES)
        servicer.calls.max_bytes *= 3  # room for bad files, which HDF5 lets grow
        self.server, self.address = service.create_server(servicer, "localhost:0")
        self.channel = grpc.insecure_channel(self.address, [("grpc.max_send_message_length", -1)])
        self.stub = todo_pb2_grpc.FedMLStub(self.channel)

    def send(self, path, client, metadata=None, num_examples=3):
        """A future: the answer to a whole, good upload."""
        named = (
            [
                ("fedml-client", client),
                ("fedml-run", "run0"),
                ("fedml-round", str(self.run.rounds.round)),
                ("fedml-sha256", files.sha256_of(path)),
            ]
            if metadata is None
            else metadata
        )
        return self.stub.sendWeight.future(
            weights.blob_messages(path, client, num_examples), metadata=named, timeout=60
        )

    def counted(self, path, client):
        """The same, once the upload is counted and its call waits."""
        waiting = self.run.rounds.waiting
        before, call = waiting.get(client), self.send(path, client)
        until(lambda: waiting.get(client) is not before, f"{client} is counted")
        return call

    def tree(self):
        """Every file below and beside the server's folder with its bytes."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }

    def half_sent(self):
        """Whether a part of an upload of client002 lies on the disk."""
        return any(
            path.stat().st_size for path in (self.folder / "server" / "client002").glob(".*.tmp*")
        )

    def close(self):
        self.run.stop()
        self.channel.close()
        self.server.stop(0).wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("bad_input"))
    yield served
    served.close()


# --- good and bad weight files --------------------------------------------------------------------


def edited(change, **options):
    """A maker of files: a good one, in which change(h5py.File) was made."""

    def make(path):
        write_weights(path, 77, **options)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def with_value(value, shape=SHAPES):
    def make(path):
        tensors = random_tensors(77)
        tensors[2][1, 0] = value
        write_weights(path, tensors)

    return make


def replaced(name, **options):
    """The dataset `name` is another one, made with create_dataset(**options)."""

    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return edited(change)


def linked(link):
    def change(file):
        del file["healthy/healthy/weight0"]
        file["healthy/healthy/weight0"] = link

    return edited(change)


def with_virtual_dataset(file):
    layout = h5py.VirtualLayout((2, 1), "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2, 1))
    del file["healthy/healthy/weight0"]
    file.create_virtual_dataset("healthy/healthy/weight0", layout)


def with_unknown_filter(file):
    space, plist = h5py.h5s.create_simple((2, 1)), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2, 1))
    plist.set_filter(32_123, h5py.h5z.FLAG_OPTIONAL, ())
    del file["healthy/healthy/weight0"]
    dataset = h5py.Dataset(
        h5py.h5d.create(file["healthy/healthy"].id, b"weight0", h5py.h5t.IEEE_F32LE, space, plist)
    )
    dataset.id.write_direct_chunk((0, 0), b"\x00" * 8, 0)


def attribute(name, value, group="/"):
    return edited(lambda file: file[group].attrs.__setitem__(name, value))


def damaged(change):
    def make(path):
        write_weights(path, 77)
        path.write_bytes(change(path.read_bytes()))

    return make


def cut(part):
    return damaged(lambda whole: whole[: int(part * len(whole))])


def padded(path):
    """A good file, larger than it should be."""
    write_weights(path, 77)
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size * 4)


W = "healthy/healthy/weight0"
FILES = {  # row: (maker, sentence); all are INVALID_ARGUMENT
    "random bytes": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(15_000)),
        "not a whole HDF5",
    ),
    "text": (lambda path: path.write_text("hello " * 99), "not a whole HDF5"),
    **{f"truncated at {part}/20": (cut(part / 20), "cut short|0 bytes") for part in range(20)},
    "one byte short": (damaged(lambda whole: whole[:-1]), "cut short"),
    "more than 1.1 times the model": (
        padded,
        "larger than [0-9,]+ bytes, the most that is accepted",
    ),
    "another shape": (
        replaced(W, data=np.zeros((3, 1), "f4")),
        r"'healthy'.*shape \(3, 1\), expected \(2, 1\)",
    ),
    "a transposed shape": (replaced(W, data=np.zeros((1, 2), "f4")), r"shape \(1, 2\)"),
    "a huge declared shape": (
        replaced(W, shape=(1 << 40, 1), dtype="f4"),
        r"shape \(1099511627776, 1\)",
    ),
    "a huge chunked shape": (
        replaced(W, shape=(1 << 40, 1), dtype="f4", chunks=(1, 1)),
        r"shape \(1099511627776, 1\)",
    ),
    "no shape": (replaced(W, data=h5py.Empty("f4")), "shape None"),
    "fewer layers": (lambda path: write_weights(path, 77, SHAPES[:2]), "2 tensors, the model 4"),
    "more layers": (
        lambda path: write_weights(path, 77, [*SHAPES, ("more", (2,))]),
        "5 tensors, the model 4",
    ),
    "no layers": (lambda path: write_weights(path, [], []), "0 tensors, the model 4"),
    "NaN": (with_value(np.nan), "'healthy'.* nan"),
    "infinity": (with_value(np.inf), "'healthy'.* inf"),
    "minus infinity": (with_value(-np.inf), "'healthy'.* -inf"),
    "integers": (replaced(W, data=np.zeros((2, 1), "i4")), "dtype int32, expected float32"),
    "doubles": (replaced(W, data=np.zeros((2, 1), "f8")), "dtype float64"),
    "half precision": (replaced(W, data=np.zeros((2, 1), "f2")), "dtype float16"),
    "big endian": (replaced(W, data=np.zeros((2, 1), ">f4")), "dtype >f4"),
    "objects": (replaced(W, shape=(2, 1), dtype=h5py.string_dtype()), "dtype object"),
    "references": (replaced(W, shape=(2, 1), dtype=h5py.ref_dtype), "dtype object"),
    "records": (replaced(W, shape=(2, 1), dtype=[("a", "f4"), ("b", "f4")]), "dtype"),
    "an external link": (linked(h5py.ExternalLink("/etc/passwd", "x")), "is a link"),
    "an external link to a good file": (
        linked(h5py.ExternalLink("../client001/client_weights.h5", W)),
        "is a link",
    ),
    "a soft link": (linked(h5py.SoftLink("/norm1/norm1/weight0")), "is a link"),
    "a dangling link": (linked(h5py.SoftLink("/nowhere")), "is a link|not in the file"),
    "external storage": (
        replaced(W, shape=(2, 1), dtype="f4", external=[("/etc/passwd", 0, 8)]),
        "outside the file",
    ),
    "a virtual dataset": (edited(with_virtual_dataset), "virtual"),
    "compressed": (replaced(W, data=np.zeros((2, 1), "f4"), compression="gzip"), "compressed"),
    "an unknown filter": (edited(with_unknown_filter), "chunked"),
    "a group in place of a tensor": (
        edited(lambda file: (file.pop(W), file.create_group(W))),
        "not a dataset",
    ),
    "a tensor in place of a layer": (
        edited(lambda file: (file.pop("norm1"), file.create_dataset("norm1", data=1.0))),
        "'norm1' is not a group",
    ),
    "a layer that is missing": (
        edited(lambda file: file.pop("norm1")),
        "'norm1' is named but not in the file",
    ),
    "a tensor that is missing": (
        edited(lambda file: file.pop(W)),
        "weight0' is named but not in the file",
    ),
    "no list of layers": (
        edited(lambda file: file.attrs.pop("layer_names")),
        "no attribute 'layer_names'",
    ),
    "no list of weights": (
        edited(lambda file: file["norm1"].attrs.pop("weight_names")),
        "no attribute 'weight_names'",
    ),
    "a list that is a number": (attribute("layer_names", 4), "expected a list of names"),
    "a list of numbers": (attribute("layer_names", np.zeros(3)), "expected a list of names"),
    "a list of 10,001 names": (
        attribute("layer_names", np.zeros(10_001, "S1")),
        "expected a list of names",
    ),
    "a name that leads upwards": (
        attribute("weight_names", [b"../norm1"], "norm1"),
        "named but not in the file",
    ),
    "an absolute name": (
        attribute("weight_names", [b"/norm1"], "norm1"),
        "named but not in the file",
    ),
    "a name that is empty": (
        attribute("layer_names", [b"", b"norm1", b"healthy"]),
        "named but not in the file",
    ),
    "the same layer twice": (
        attribute("layer_names", [b"norm1", b"norm1", b"healthy"]),
        r"'norm1'.*shape \(2,\)|tensors",
    ),
}


# --- bad streams ----------------------------------------------------------------------------------


def message(**fields):
    return todo_pb2.modelWeight(**{"clientname": NAME, "clientsize": 3, **fields})


def text(path):
    return base64.b64encode(path.read_bytes()).decode()


def renamed(name):
    return lambda path: weights.base64_messages(path, name, 3)


def sized(size):
    return lambda path: weights.base64_messages(path, NAME, size)


def in_two(**later):
    """The good file as two messages, of which the second has other fields."""

    def make(path):
        whole = path.read_bytes()
        return [message(blob=whole[:9000]), message(blob=whole[9000:], **later)]

    return make


STREAMS = {  # row: (good file -> messages, status code, sentence)
    "unknown client": (
        renamed("client009"),
        "PERMISSION_DENIED",
        "'client009' is not one of this run's: expected client001, ",
    ),
    "unknown client, old form": (
        renamed("client009/client_weights.h5"),
        "PERMISSION_DENIED",
        "'client009'",
    ),
    "../x": (renamed("../x"), "INVALID_ARGUMENT", r"client name '\.\./x' .* is refused"),
    "up and in again": (renamed("client002/../client001"), "INVALID_ARGUMENT", "client name"),
    "a path beyond the old form": (
        renamed("client002/state.json"),
        "INVALID_ARGUMENT",
        "client name",
    ),
    "a deeper path": (renamed("a/client002/client_weights.h5"), "INVALID_ARGUMENT", "client name"),
    "an absolute path": (
        renamed("/etc/client002"),
        "INVALID_ARGUMENT",
        "client name '/etc/client002'",
    ),
    "the dots": (renamed(".."), "INVALID_ARGUMENT", "client name"),
    "an empty name": (renamed(""), "INVALID_ARGUMENT", r"client name '' \(0 characters\)"),
    "an empty name, old form": (renamed("/client_weights.h5"), "INVALID_ARGUMENT", "client name"),
    "a name of 10 kB": (
        lambda path: [message(clientname="x" * 10_000, blob=path.read_bytes())],
        "INVALID_ARGUMENT",
        r"\(10000 characters\)",
    ),
    "a name with a zero byte": (renamed("client002\0"), "INVALID_ARGUMENT", "client name"),
    "a name with a line end": (renamed("client002\n"), "INVALID_ARGUMENT", "client name"),
    "a name that only looks the same": (renamed("ⅽlient002"), "INVALID_ARGUMENT", "client name"),
    "no examples": (
        sized(0),
        "INVALID_ARGUMENT",
        "client002 says it has 0 examples, expected 1 to 1000",
    ),
    "minus five examples": (sized(-5), "INVALID_ARGUMENT", "-5 examples"),
    "more than --max-examples": (
        sized(1001),
        "INVALID_ARGUMENT",
        "1001 examples, .*--max-examples",
    ),
    "empty stream": (lambda path: [], "INVALID_ARGUMENT", "empty stream"),
    "empty messages": (
        lambda path: [message(), message()],
        "INVALID_ARGUMENT",
        "client002: .*0 bytes",
    ),
    "not base64": (
        lambda path: [message(model="äöü" + text(path))],
        "INVALID_ARGUMENT",
        "client002: .* not base64",
    ),
    "base64 with a blank": (
        lambda path: [message(model=text(path)[:400] + " " + text(path)[400:])],
        "INVALID_ARGUMENT",
        "not base64|middle of a group",
    ),
    "base64 that ends within a group": (
        lambda path: [message(model=text(path)[:-401])],
        "INVALID_ARGUMENT",
        "ends in the middle of a group of 4",
    ),
    "base64 behind its end": (
        lambda path: [message(model="AA=="), message(model=text(path))],
        "INVALID_ARGUMENT",
        "behind its end",
    ),
    "base64 behind its end, in one piece": (
        lambda path: [message(model="AA==" + text(path))],
        "INVALID_ARGUMENT",
        "base64",
    ),
    "base64, then bytes": (
        lambda path: [message(model=text(path)), message(blob=b"x")],
        "INVALID_ARGUMENT",
        "mixed",
    ),
    "bytes, then base64": (
        lambda path: [message(blob=path.read_bytes()), message(model="AAAA")],
        "INVALID_ARGUMENT",
        "mixed",
    ),
    "both in one message": (
        lambda path: [message(blob=path.read_bytes(), model=text(path))],
        "INVALID_ARGUMENT",
        "mixed",
    ),
    "another name later": (
        in_two(clientname="client001"),
        "INVALID_ARGUMENT",
        "goes on as 'client001'",
    ),
    "another size later": (
        in_two(clientsize=4),
        "INVALID_ARGUMENT",
        "with 3 examples and goes on as .* with 4",
    ),
    "a message of 3 MB": (
        lambda path: [message(blob=b"x" * 3_000_000)],
        "RESOURCE_EXHAUSTED",
        "larger than max",
    ),
    "an endless stream": (
        lambda path: (message(blob=b"x" * 1000) for _ in range(1 << 30)),
        "INVALID_ARGUMENT",
        "larger than",
    ),
}

OTHERS = {  # row: (metadata that differs, status code, sentence); file and messages are good
    "wrong run": (
        {"fedml-run": "0123"},
        "FAILED_PRECONDITION",
        "client002 delivers for run '0123'; the server is in run run0",
    ),
    "a run of 5 kB": ({"fedml-run": "x" * 5000}, "FAILED_PRECONDITION", "for run 'x{40}'"),
    "an earlier round": (
        {"fedml-round": "0"},
        "FAILED_PRECONDITION",
        "round 0, which is over; the server is in .* round",
    ),
    "a later round": (
        {"fedml-round": "123456"},
        "FAILED_PRECONDITION",
        "round 123456, which is not open",
    ),
    "a round that is no number": (
        {"fedml-round": "one"},
        "INVALID_ARGUMENT",
        "fedml-round is 'one'",
    ),
    "a negative round": ({"fedml-round": "-1"}, "INVALID_ARGUMENT", "fedml-round is '-1'"),
    "a round of 10 digits": ({"fedml-round": "1" * 10}, "INVALID_ARGUMENT", "fedml-round"),
    "no round": ({"fedml-round": None}, "INVALID_ARGUMENT", "fedml-round is ''"),
    "wrong hash": (
        {"fedml-sha256": "0" * 64},
        "INVALID_ARGUMENT",
        "client002: .* SHA-256 [0-9a-f]{16}.*, announced was 0{16}",
    ),
    "an empty hash": ({"fedml-sha256": ""}, "INVALID_ARGUMENT", "SHA-256"),
    "in the name of another": (
        {"fedml-client": "client001"},
        "PERMISSION_DENIED",
        "client001 sent weights in the name of",
    ),
    "unknown in the metadata": (
        {"fedml-client": "client009"},
        "PERMISSION_DENIED",
        "'client009' is not one",
    ),
    "a path in the metadata": ({"fedml-client": "../client002"}, "PERMISSION_DENIED", "is not one"),
}
TABLE = {
    **{row: ("file", *what) for row, what in FILES.items()},
    **{row: ("stream", *what) for row, what in STREAMS.items()},
    **{row: ("metadata", *what) for row, what in OTHERS.items()},
}
assert len(TABLE) == len(FILES) + len(STREAMS) + len(OTHERS) > 25


@pytest.mark.parametrize("row", TABLE)
def test_bad_input_is_refused_and_the_round_goes_on(served, tmp_path, row):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (1, 2)]
    first = served.counted(good[0], "client001")
    before, number = served.tree(), served.run.rounds.round
    kind, *what = TABLE[row]
    if kind == "file":
        what[0](tmp_path / "bad.h5")
        call, code, sentence = (
            served.send(tmp_path / "bad.h5", "client002"),
            "INVALID_ARGUMENT",
            "client002: .*" + what[1],
        )
    elif kind == "stream":
        messages, code, sentence = what
        call = served.stub.sendWeight.future(iter(messages(good[1])), timeout=60)
    else:
        changes, code, sentence = what
        named = {
            "fedml-client": "client002",
            "fedml-run": "run0",
            "fedml-round": str(number),
            "fedml-sha256": files.sha256_of(good[1]),
            **changes,
        }
        call = served.send(
            good[1],
            "client002",
            [(key, value) for key, value in named.items() if value is not None],
        )
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert caught.value.code().name == code, caught.value
    assert re.search(sentence, caught.value.details(), re.DOTALL), caught.value.details()
    assert len(caught.value.details()) < 800 and "Exception calling" not in caught.value.details()
    assert served.tree() == before
    assert not first.done() and served.run.rounds.round == number
    second = served.send(good[1], "client002")
    assert first.result().value == second.result().value == 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


def test_a_client_that_is_not_enrolled_gets_no_weights(served):
    with pytest.raises(grpc.RpcError) as caught:
        list(
            served.stub.getWeight(
                todo_pb2.void(), metadata=[("fedml-client", "client009")], timeout=60
            )
        )
    assert (
        caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        and "client009" in caught.value.details()
    )


@pytest.mark.parametrize(
    ("failure", "code", "sentence"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "INVALID_ARGUMENT", "crashed, twice"),
        ("while True: pass", "INVALID_ARGUMENT", "cannot be read within 1 s"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "INTERNAL", "ended by SIGKILL; send again"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "INTERNAL", "stands still; send again"),
        ("raise MemoryError", "INTERNAL", "exit code 1; send again"),
    ],
)
def test_whose_fault_it_is_that_a_file_cannot_be_converted(
    tmp_path, monkeypatch, failure, code, sentence
):
    """HDF5 crashes on some files and hangs on others; and a process may be killed from outside."""
    replace_converter(
        monkeypatch,
        tmp_path,
        f"""
from federation import convert
bounds = convert.set_bounds
def fail(*limits):
    bounds(*limits)
    if os.path.exists({str(tmp_path / "fails")!r}):
        {failure}
convert.set_bounds = fail
""",
    )
    monkeypatch.setattr(convert, "WALL_S", 1 if "SIGSTOP" in failure else 300)
    monkeypatch.setattr(convert, "CPU_S", 1)
    good, other = write_weights(tmp_path / "good.h5", 1), tmp_path / "other.h5"
    write_weights(other, 2, root="model_weights")
    (tmp_path / "fails").touch()
    served = Served(tmp_path / "served")
    try:
        first = served.counted(good, "client001")
        before = served.tree()
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                served.send(other, "client002").result()
            assert caught.value.code().name == code
            assert re.search(f"client002: .*{sentence}", caught.value.details())
            assert served.tree() == before
        (tmp_path / "fails").unlink()
        assert served.send(other, "client002").result().value == first.result().value == 1
        assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))
    finally:
        served.close()


def test_files_with_a_few_changed_bytes_never_harm(tmp_path):
    """Whatever the damage: refused, or the server's layout with finite numbers."""
    good = write_weights(tmp_path / "good.h5", 5)
    layout = weights.Layout(good)
    converters = convert.Converters(layout)
    rng, refused = np.random.default_rng(3), 0
    for _ in range(30):
        damage = bytearray(good.read_bytes())
        for position in rng.integers(len(damage), size=rng.integers(1, 4)):
            damage[position] = rng.integers(256)
        (tmp_path / "bad.h5").write_bytes(damage)
        try:
            if not weights.inspect(tmp_path / "bad.h5", layout)[1]:
                converters.convert("client001", tmp_path / "bad.h5")
            assert weights.inspect(tmp_path / "bad.h5", layout)[1] is True
        except ValueError as error:
            refused += 1
            assert str(error)
    assert 1 < refused < 30


def test_no_file_from_outside_is_opened_with_hdf5_in_the_servers_process(tmp_path, monkeypatch):
    """Uploads of any layout, good and bad: h5py sees the server's own file only."""
    served = Served(tmp_path / "served")
    opened = []

    class Guarded(h5py.File):
        def __init__(self, path, *arguments, **options):
            opened.append(str(path))
            assert str(path) == str(served.run.weights), path
            super().__init__(path, *arguments, **options)

    own = write_weights(tmp_path / "own.h5", 1)
    other = write_weights(tmp_path / "other.h5", 2, root="model_weights")
    (tmp_path / "bad.h5").write_text("hello " * 999)
    many_names(tmp_path / "hostile.h5")
    try:
        monkeypatch.setattr(h5py, "File", Guarded)
        for path in (tmp_path / "bad.h5", tmp_path / "hostile.h5"):
            with pytest.raises(grpc.RpcError) as caught:
                served.send(path, "client002").result()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        calls = [served.send(own, "client001"), served.send(other, "client002")]
        assert [call.result().value for call in calls] == [1, 1]
        monkeypatch.undo()
        assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))
        assert set(opened) <= {str(served.run.weights)}
    finally:
        served.close()


def test_a_repeat_of_a_converted_upload_is_recognised_by_what_was_sent(served, tmp_path):
    """Its file has other bytes; the same SHA-256 of the same round waits, and gets the answer."""
    own = write_weights(tmp_path / "own.h5", 1)
    other = write_weights(tmp_path / "other.h5", 2, root="model_weights")
    number = served.run.rounds.round
    first = served.counted(other, "client002")
    assert served.run.rounds.uploads["client002"]["sha256"] == files.sha256_of(other)
    stored = served.folder / "server" / "client002" / "client_weights.h5"
    assert stored.read_bytes() == write_weights(tmp_path / "expected.h5", 2).read_bytes()
    again = served.counted(other, "client002")
    assert first.exception().code() == grpc.StatusCode.ABORTED
    assert served.send(own, "client001").result().value == again.result().value == 1
    repeat = {"fedml-client": "client002", "fedml-run": "run0", "fedml-round": str(number)}
    repeat["fedml-sha256"] = files.sha256_of(other)
    assert served.send(other, "client002", list(repeat.items())).result().value == 1
    assert served.run.rounds.round == number + 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


# --- a full disk, a lame stream -------------------------------------------------------------------


def test_a_refusal_of_any_length_keeps_its_code(served, tmp_path):
    """gRPC would make RESOURCE_EXHAUSTED of an answer above its limit, for which a client ends."""
    path = tmp_path / "long.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["layer_names"] = np.array([b"A" * 10_000])
    with pytest.raises(grpc.RpcError) as caught:
        served.send(path, "client001").result()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert re.fullmatch("client001: 'A{1900,} \\.\\.\\.", caught.value.details())
    assert max(map(len, served.run.said)) < 2100


def test_weights_that_are_gone_while_serving_are_told_to_both_sides(served):
    away = served.run.weights.rename(served.run.weights.with_suffix(".away"))
    with pytest.raises(grpc.RpcError) as caught:
        list(
            served.stub.getWeight(
                todo_pb2.void(), metadata=[("fedml-client", "client001")], timeout=60
            )
        )
    assert (
        caught.value.code() == grpc.StatusCode.INTERNAL
        and "could not read or store a file" in caught.value.details()
    )
    away.rename(served.run.weights)
    assert "server_weight.h5" in served.run.said[-1] and served.run.said[-1].endswith("(INTERNAL)")


def test_a_full_disk_ends_the_upload_with_a_sentence_and_the_round_goes_on(
    served, tmp_path, monkeypatch
):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (3, 4)]
    first = served.counted(good[0], "client001")
    before = served.tree()

    def spool(messages, path, max_bytes, look):
        next(iter(messages))
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "spool", spool)
        with pytest.raises(grpc.RpcError) as caught:
            served.send(good[1], "client002").result()
    assert caught.value.code() == grpc.StatusCode.INTERNAL and "client002" in caught.value.details()
    assert "No space left on device" in caught.value.details() and served.tree() == before
    assert served.send(good[1], "client002").result().value == first.result().value == 1
    assert served.run.holds(("client001", 3, 3), ("client002", 3, 4))


class Halves:
    """A stream that stops in the middle until it is let go."""

    def __init__(self, path, client):
        self.sent, self.go_on = threading.Event(), threading.Event()
        self.whole, self.client = path.read_bytes(), client

    def __iter__(self):
        yield todo_pb2.modelWeight(blob=self.whole[:9000], clientname=self.client, clientsize=3)
        self.sent.set()
        self.go_on.wait(60)
        yield todo_pb2.modelWeight(blob=self.whole[9000:])


def test_a_stalled_upload_is_ended_and_stops_no_one_else(served, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "STALL_S", 2)
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (5, 6)]
    stream, started = Halves(good[1], "client002"), time.monotonic()
    stalled = served.stub.sendWeight.future(
        iter(stream), metadata=[("fedml-client", "client002")], timeout=60
    )
    assert stream.sent.wait(60)
    first = served.counted(good[0], "client001")
    with pytest.raises(grpc.RpcError) as caught:
        stalled.result()
    assert caught.value.code() == grpc.StatusCode.CANCELLED and 2 <= time.monotonic() - started < 20
    stream.go_on.set()
    until(
        lambda: any("client002 made no progress for 2 s" in line for line in served.run.said),
        "the line that says so",
    )
    assert served.send(good[1], "client002").result().value == first.result().value == 1
    assert served.run.holds(("client001", 3, 5), ("client002", 3, 6))


def test_a_new_upload_ends_the_clients_own_half_sent_one(served, tmp_path):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (7, 8)]
    first, stream = served.send(good[0], "client001"), Halves(good[1], "client002")
    stalled = served.stub.sendWeight.future(
        iter(stream), metadata=[("fedml-client", "client002")], timeout=60
    )
    assert stream.sent.wait(60)
    until(served.half_sent, "the first half has arrived")
    assert served.send(good[1], "client002").result().value == first.result().value == 1
    assert stalled.exception(timeout=20).code() == grpc.StatusCode.CANCELLED  # not after STALL_S
    stream.go_on.set()
    assert served.run.holds(("client001", 3, 7), ("client002", 3, 8))


def test_who_says_nothing_holds_a_thread_no_longer_than_that(served, monkeypatch):
    monkeypatch.setattr(service, "FIRST_MESSAGE_S", 1)
    silent = threading.Event()

    def nothing():
        silent.wait(60)
        yield from ()

    call = served.stub.sendWeight.future(nothing(), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    silent.set()
    assert caught.value.code() == grpc.StatusCode.CANCELLED


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(served, tmp_path):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (9, 10)]
    first = served.counted(good[0], "client001")
    before, stream = served.tree(), Halves(good[1], "client002")
    call = served.stub.sendWeight.future(
        iter(stream), metadata=[("fedml-client", "client002")], timeout=60
    )
    assert stream.sent.wait(60)
    until(served.half_sent, "the first half has arrived")
    call.cancel()
    stream.go_on.set()
    until(lambda: served.tree() == before, "nothing is left of it")
    assert served.send(good[1], "client002").result().value == first.result().value == 1


def test_a_client_that_goes_away_after_a_complete_upload_counts(served, tmp_path):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (11, 12)]
    gone, number = served.counted(good[0], "client001"), served.run.rounds.round
    gone.cancel()
    until(
        lambda: any(
            "client001 went away; what it delivered counts" in line for line in served.run.said
        ),
        "noticed",
    )
    assert (
        served.send(good[1], "client002").result().value == 1
        and served.run.rounds.round == number + 1
    )
    assert served.run.holds(("client001", 3, 11), ("client002", 3, 12))


@pytest.mark.parametrize(
    ("form", "seeds"),  # others each time: equal bytes would be a repeat
    [("{}/client_weights", (15, 16)), ("./{}/client_weights.h5", (17, 18))],
)
def test_a_peer_of_2020_names_itself_by_a_path_in_any_of_its_forms(served, tmp_path, form, seeds):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in seeds]
    first = served.counted(good[0], "client001")
    content = good[1].read_bytes()
    message = todo_pb2.modelWeight(
        model=base64.b64encode(content), clientname=form.format("client002"), clientsize=3
    )
    assert served.stub.sendWeight(iter([message]), timeout=60).value == first.result().value == 1
    assert served.run.holds(("client001", 3, seeds[0]), ("client002", 3, seeds[1]))


@pytest.mark.parametrize("arch", ["vgg16", "drcnn"])
def test_what_a_peer_without_a_name_fetches_is_logged(served, monkeypatch, arch):
    monkeypatch.setattr(served.run.rounds, "state", served.run.rounds.state.changed(arch=arch))
    before = len(served.run.said)
    assert list(served.stub.getWeight(todo_pb2.void(), timeout=60))
    said = served.run.said[before:]
    number = served.run.rounds.round
    assert re.fullmatch(
        rf"a peer without a name \(ipv\d:.*\) fetches the weights of round {number}", said[0]
    )
    warned = any(
        "can load the weights of --arch vgg16 only, and this run's are drcnn" in line
        for line in said
    )
    assert warned == (arch == "drcnn")


def test_a_second_server_on_the_port_is_refused(served):
    with pytest.raises(ValueError, match="cannot listen on .*: is another server running there"):
        serve(served.run.rounds, served.address)


def test_the_answers_metadata(served, tmp_path):
    good = [write_weights(tmp_path / f"{seed}.h5", seed) for seed in (13, 14)]
    number = served.run.rounds.round
    answers = [
        served.send(path, client)
        for path, client in zip(good, ("client001", "client002"), strict=True)
    ]
    for answer in answers:
        assert answer.result().value == 1
        assert dict(answer.trailing_metadata())["fedml-round"] == str(number + 1)
        assert "fedml-done" not in dict(answer.trailing_metadata())
    call = served.stub.getWeight(
        todo_pb2.void(), metadata=[("fedml-client", "client001"), ("fedml-accept", "blob")]
    )
    told = dict(call.initial_metadata())
    (tmp_path / "got.h5").write_bytes(b"".join(message.blob for message in call))
    assert (
        told["fedml-run"] == "run0"
        and told["fedml-round"] == str(number + 1)
        and told["fedml-rounds"] == "10000"
    )
    assert (
        told["fedml-sha256"]
        == files.sha256_of(tmp_path / "got.h5")
        == files.sha256_of(served.run.weights)
    )
