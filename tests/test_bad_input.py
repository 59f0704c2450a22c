"""Nothing bad gets in: each row is refused with its status code and a sentence.

It leaves every file as it was, and the round's merged weights are what they would have been. What
is wrong within a weight file is told without a server (`FILES`); what is wrong with a stream or its
metadata by a real one. The rest: whose fault a failure is, and no HDF5 from outside in the server.
"""

import base64
import errno
import re

import h5py
import numpy as np
import pytest
from conftest import write_weights
from hostile import many_names
from serving import Served, refusal
from standin import SHAPES, random_tensors

from common import files
from federation import convert, weights
from generated import todo_pb2

NAME = "client002/client_weights.h5"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("bad_input"), max_examples=1000)
    yield served
    served.close()


@pytest.fixture
def good(tmp_path):
    """The files of client001 and client002."""
    return [write_weights(tmp_path / f"good{seed}.h5", seed) for seed in (1, 2)]


# --- weight files --------------------------------------------------------------------------------


def edited(change):
    """A maker of files: a good one, in which change(h5py.File) was made."""

    def make(path):
        write_weights(path, 77)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def with_value(value):
    def make(path):
        tensors = random_tensors(77)
        tensors[2][1, 0] = value
        write_weights(path, tensors)

    return make


W = "healthy/healthy/weight0"  # float32 (2, 1)


def replaced(name=W, **options):
    """The dataset `name` is another one, made with create_dataset(**options)."""

    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return edited(change)


def linked(link):
    def change(file):
        del file[W]
        file[W] = link

    return edited(change)


def with_virtual_dataset(file):
    layout = h5py.VirtualLayout((2, 1), "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2, 1))
    del file[W]
    file.create_virtual_dataset(W, layout)


def attribute(name, value, group="/"):
    return edited(lambda file: file[group].attrs.__setitem__(name, value))


def cut(part):
    def make(path):
        content = write_weights(path, 77).read_bytes()
        path.write_bytes(content[: int(part * len(content))])

    return make


def at_an_absurd_offset(path):
    """Its header says that a tensor lies where no file has bytes."""
    content = write_weights(path, 77, root="model_weights").read_bytes()
    begin = weights.Layout(path).tensors[2].begin
    address = begin.to_bytes(8, "little")
    assert content.count(address) == 1
    path.write_bytes(content.replace(address, (2**64 - 16).to_bytes(8, "little")))


NO_FILE = "not a whole HDF5"
LIST = "named but not in the file|not a whole HDF5"
NOWHERE = "named but not in the file"
HUGE = r"shape \(1099511627776, 1\)"
FILES = {  # row: (maker, keyword of the sentence)
    "random bytes": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(15_000)),
        NO_FILE,
    ),
    "cut in the middle": (cut(0.5), "cut short"),
    "another shape": (replaced(data=np.zeros((3, 1), "f4")), r"'healthy'.*\(3, 1\), expected"),
    "a huge shape": (replaced(shape=(1 << 40, 1), dtype="f4"), HUGE + "|not at all"),
    "a huge chunked shape": (replaced(shape=(1 << 40, 1), dtype="f4", chunks=(1, 1)), "chunked"),
    "an absurd offset": (at_an_absurd_offset, "does not lie in the file|" + NO_FILE),
    "fewer layers": (lambda path: write_weights(path, 77, SHAPES[:2]), "2 tensors, the model 4"),
    "more layers": (
        lambda path: write_weights(path, 77, [*SHAPES, ("more", (2,))]),
        "5 tensors, the model 4",
    ),
    "NaN": (with_value(np.nan), "'healthy'.* nan"),
    "infinity": (with_value(np.inf), "'healthy'.* inf"),
    "integers": (replaced(data=np.zeros((2, 1), "i4")), "int32, expected float32"),
    "references": (replaced(shape=(2, 1), dtype=h5py.ref_dtype), "object"),
    "an external link": (linked(h5py.ExternalLink("/etc/passwd", "x")), "is a link"),
    "a soft link": (linked(h5py.SoftLink("/norm1/norm1/weight0")), "is a link"),
    "external storage": (
        replaced(shape=(2, 1), dtype="f4", external=[("/etc/passwd", 0, 8)]),
        "outside the file",
    ),
    "a virtual dataset": (edited(with_virtual_dataset), "virtual"),
    "compressed": (replaced(data=np.zeros((2, 1), "f4"), compression="gzip"), "compressed"),
    "a group in place of a tensor": (
        edited(lambda file: (file.pop(W), file.create_group(W))),
        "not a dataset",
    ),
    "a tensor in place of a layer": (replaced("norm1", data=1.0), "'norm1' is not a group"),
    "a layer that is missing": (edited(lambda file: file.pop("norm1")), "'norm1' is " + NOWHERE),
    "a tensor that is missing": (edited(lambda file: file.pop(W)), "weight0' is " + NOWHERE),
    "no list of layers": (
        edited(lambda file: file.attrs.pop("layer_names")),
        "no attribute 'layer_names'",
    ),
    "no list of weights": (
        edited(lambda file: file["norm1"].attrs.pop("weight_names")),
        "no attribute 'weight_names'",
    ),
    "a list that is a number": (attribute("layer_names", 4), LIST),
    "a list of 10,001 names": (attribute("layer_names", np.zeros(10_001, "S1")), LIST),
    "a name that leads upwards": (attribute("weight_names", [b"../norm1"], "norm1"), NOWHERE),
    "a layer twice": (
        attribute("layer_names", [b"norm1", b"norm1", b"healthy"]),
        r"'norm1'.*shape \(2,\)",
    ),
}


@pytest.mark.parametrize("row", FILES)
def test_a_bad_file_is_never_brought_into_the_layout(tmp_path, row):
    """What the server and the bounded process do with an upload, in this process."""
    layout = weights.Layout(write_weights(tmp_path / "own.h5", 0))
    write_weights(tmp_path / "good1.h5", 1)
    make, sentence = FILES[row]
    upload = tmp_path / "upload.h5"
    make(upload)
    before = upload.read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        if not weights.fits(upload, layout):
            weights.rewrite(upload, weights.contents_of(upload)[0], layout)
    assert len(str(caught.value)) < 800
    assert upload.read_bytes() == before


# --- streams and metadata ------------------------------------------------------------------------


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


DENIED, INVALID = "PERMISSION_DENIED", "INVALID_ARGUMENT"
STREAMS = {  # row: (good file -> messages, status code, keyword of the sentence)
    "unknown client": (renamed("client009"), DENIED, "'client009' is not one.*client001, "),
    "up and in again": (renamed("client002/../client001"), INVALID, "client name"),
    "a path beyond the old form": (renamed("client002/state.json"), INVALID, "client name"),
    "a name of 10 kB": (
        lambda path: [message(clientname="x" * 10_000, blob=path.read_bytes())],
        INVALID,
        r"\(10000 characters\)",
    ),
    "a name that only looks the same": (renamed("ⅽlient002"), INVALID, "client name"),
    "no examples": (sized(0), INVALID, "client002 says it has 0 examples, expected 1 to 1000"),
    "more than --max-examples": (sized(1001), INVALID, "1001 examples, .*--max-examples"),
    "an empty stream": (lambda path: [], INVALID, "empty stream"),
    "not base64": (lambda path: [message(model="ä" + text(path))], INVALID, "not base64"),
    "base64 that ends within a group": (
        lambda path: [message(model=text(path)[:-401])],
        INVALID,
        "middle of a group of 4",
    ),
    "base64, then bytes": (
        lambda path: [message(model=text(path)), message(blob=b"x")],
        INVALID,
        "mixed",
    ),
    "another name later": (in_two(clientname="client001"), INVALID, "goes on as 'client001'"),
    "another size later": (in_two(clientsize=4), INVALID, "with 3 examples and goes on.* with 4"),
    "a message of 3 MB": (
        lambda path: [message(blob=b"x" * 3_000_000)],
        "RESOURCE_EXHAUSTED",
        "larger than max",
    ),
    "an endless stream": (
        lambda path: (message(blob=b"x" * 1000) for _ in range(1 << 30)),
        INVALID,
        "larger than [0-9,]+ bytes, the most",
    ),
    "not a number": (
        lambda path: weights.blob_messages(with_nan(path), "client002", 3),
        INVALID,
        "client002: layer 'healthy' holds nan",
    ),
}


def with_nan(path):
    bad = path.with_name("nan.h5")
    with_value(np.nan)(bad)
    return bad


CLOSED = "FAILED_PRECONDITION"
METADATA = {  # row: (what differs, status code, keyword of the sentence); all else is good
    "another run": ({"run": "0123"}, CLOSED, "for run '0123'; the server is in run run0"),
    "an earlier round": ({"round": "0"}, CLOSED, "round 0, which is not open"),
    "a later round": ({"round": "123456"}, CLOSED, "round 123456, which is not open"),
    "a round that is no number": ({"round": "one"}, INVALID, "fedml-round is 'one'"),
    "a round of 10 digits": ({"round": "1" * 10}, INVALID, "fedml-round"),
    "no round": ({"round": None}, INVALID, "fedml-round is ''"),
    "another digest": ({"sha256": "0" * 64}, INVALID, "client002: .*announced was 0{16}"),
    "in the name of another": ({"client": "client001"}, DENIED, "client001 sent weights in the"),
    "a path in the metadata": ({"client": "../client002"}, DENIED, "is not one"),
}


@pytest.mark.parametrize("row", [*STREAMS, *METADATA])
def test_bad_input_is_refused_and_the_round_goes_on(served, good, row):
    first = served.counted(good[0], "client001")
    before, number = served.tree(), served.round
    what, code, sentence = (STREAMS | METADATA)[row]
    if row in STREAMS:
        call = served.stub.sendWeight.future(iter(what(good[1])), timeout=60)
    else:
        call = served.send(good[1], "client002", **what)
    found, details = refusal(call)
    assert found == code and re.search(sentence, details, re.DOTALL), (found, details)
    assert len(details) < 800 and "Exception calling" not in details
    assert {path: served.tree().get(path) for path in before} == before
    assert not list(served.folder.rglob("*.tmp*"))
    assert not first.done() and served.round == number
    assert served.send(good[1], "client002").result().value == first.result().value == 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


def test_a_client_that_is_not_enrolled_gets_no_weights(served):
    assert refusal(served.fetch("client009"))[0] == DENIED


def test_a_refusal_of_any_length_keeps_its_code(served, monkeypatch, good):
    """gRPC would make RESOURCE_EXHAUSTED of an answer above its limit, for which a client ends."""

    def fail(*arguments):
        raise ValueError("A" * 20_000)

    monkeypatch.setattr(weights, "fits", fail)
    code, details = refusal(served.send(good[0], "client001"))
    assert code == INVALID and details.startswith("client001: AAAA") and len(details) < 2100


# --- whose fault it is ---------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {  # row: (what fails, how, status code)
    "a file that crashes HDF5": ((convert, "convert"), ValueError("crashed, twice"), INVALID),
    "a process that was killed": ((convert, "convert"), ChildProcessError("code -9"), "INTERNAL"),
    "a full disk": ((weights, "spool"), FULL, "INTERNAL"),
    "out of open files": ((weights, "spool"), OSError(errno.EMFILE, "files"), "INTERNAL"),
    "a disk that cannot be read": ((weights, "fits"), OSError(errno.EIO, "I/O"), "INTERNAL"),
    "out of memory": ((weights, "fits"), MemoryError(), "INTERNAL"),
    "a full disk for the state": ((files, "save_state"), FULL, "INTERNAL"),
    "a full disk for the upload": ((files, "publish"), FULL, "INTERNAL"),
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_fault_of_the_machine_is_told_as_ours(tmp_path, good, monkeypatch, row):
    """And the next upload counts, though the state may list the one that failed."""
    served = Served(tmp_path / "served")
    other = write_weights(tmp_path / "other.h5", 2, root="model_weights")
    (module, name), error, code = FAULTS[row]

    def fail(*arguments):
        raise error

    try:
        first = served.counted(good[0], "client001")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            if (module, name) == (files, "publish"):
                patch.setattr("federation.rounds.publish", fail)
            found, details = refusal(served.send(other, "client002"))
        assert found == code and (str(error) or "MemoryError") in details, details
        assert not list(served.folder.rglob("*.tmp*"))
        assert served.send(other, "client002").result().value == first.result().value == 1
        assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))
    finally:
        served.close()


def test_weights_that_are_gone_while_serving_are_told_to_both_sides(served):
    away = served.run.weights.rename(served.run.weights.with_suffix(".away"))
    code, details = refusal(served.fetch("client001"))
    away.rename(served.run.weights)
    assert code == "INTERNAL" and "server_weight.h5" in details
    assert any(line.endswith("(INTERNAL)") for line in served.said("server_weight.h5"))


# --- HDF5 from outside ---------------------------------------------------------------------------


def test_no_file_from_outside_is_opened_with_hdf5_in_the_servers_process(
    served, good, tmp_path, monkeypatch
):
    """Uploads of any layout, good and bad; and a repeat of one that was converted is known."""
    other = write_weights(tmp_path / "other.h5", 2, root="model_weights")
    many_names(tmp_path / "hostile.h5")
    opened = set()  # by whoever merges, the server's own file
    h5py_file = h5py.File
    monkeypatch.setattr(
        h5py, "File", lambda path, *mode: opened.add(path) or h5py_file(path, *mode)
    )
    number = served.round
    assert refusal(served.send(tmp_path / "hostile.h5", "client002"))[0] == INVALID
    first = served.counted(other, "client002")
    again = served.counted(other, "client002")
    assert refusal(first)[0] == "ABORTED"
    assert served.run.rounds.uploads["client002"]["sha256"] == files.sha256_of(other)
    assert served.send(good[0], "client001").result().value == again.result().value == 1
    assert served.send(other, "client002", round=str(number)).result().value == 1
    assert opened <= {served.run.weights}
    assert served.round == number + 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))
