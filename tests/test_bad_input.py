"""Nothing bad gets in: each row is refused with its status code and a sentence.

It leaves every file as it was, and the round's merged weights are what they would have been. What
is wrong within a weight file is told without a server (`FILES`; also test_weights.py), what is
wrong with a stream or its metadata by a real one. The rest: whose fault a failure is, and no HDF5
from outside in the server.
"""

import errno
import re

import h5py
import numpy as np
import pytest
from conftest import fail_with, write_weights
from hostile import many_names
from serving import Served, refusal
from standin import random_tensors

from common import files
from federation import convert, weights
from generated import todo_pb2

NAME = "client002/client_weights.h5"


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path / "served", max_examples=1000)
    yield served
    served.close()


@pytest.fixture
def good(tmp_path):
    """The files of client001 and client002."""
    return [write_weights(tmp_path / f"good{seed}.h5", seed) for seed in (1, 2)]


# --- weight files --------------------------------------------------------------------------------

W = "healthy/healthy/weight0"  # float32 (2, 1)


def replaced(name=W, **options):
    """The dataset `name` is another one, made with create_dataset(**options)."""

    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change


def with_link(file):
    del file[W]
    file[W] = h5py.ExternalLink("/etc/passwd", "x")


def with_virtual_dataset(file):
    layout = h5py.VirtualLayout((2, 1), "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2, 1))
    del file[W]
    file.create_virtual_dataset(W, layout)


FILES = {  # row: (change of a good file, keyword of the sentence)
    "another shape": (replaced(data=np.zeros((3, 1), "f4")), r"'healthy'.*\(3, 1\), expected"),
    "a huge shape": (replaced(shape=(1 << 40, 1), dtype="f4"), "not at all"),
    "a virtual dataset": (with_virtual_dataset, "virtual"),
    "external storage": (
        replaced(shape=(2, 1), dtype="f4", external=[("/etc/passwd", 0, 8)]),
        "outside the file",
    ),
    "an external link": (with_link, "is a link"),
    "integers": (replaced(data=np.zeros((2, 1), "i4")), "int32, expected float32"),
    "a group in place of a tensor": (
        lambda file: (file.pop(W), file.create_group(W)),
        "not a dataset",
    ),
    "a tensor in place of a layer": (replaced("norm1", data=1.0), "'norm1' is not a group"),
    "a layer that is missing": (lambda file: file.pop("norm1"), "'norm1' is named but not in"),
    "no list of layers": (lambda file: file.attrs.pop("layer_names"), "no attribute 'layer_names'"),
    "fewer layers": (
        lambda file: file.attrs.update(layer_names=[b"conv1", b"norm1"]),
        "2 tensors, the model 4",
    ),
}


@pytest.mark.parametrize("row", FILES)
def test_a_bad_file_is_never_brought_into_the_layout(tmp_path, row):
    """What the server and the bounded process do with an upload, in this process."""
    layout = weights.Layout(write_weights(tmp_path / "own.h5", 0))
    change, sentence = FILES[row]
    upload = write_weights(tmp_path / "upload.h5", 77)
    with h5py.File(upload, "r+") as file:
        change(file)
    before = upload.read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        if not weights.fits(upload, layout):
            weights.rewrite(upload, weights.contents_of(upload)[0], layout)
    assert len(str(caught.value)) < 800
    assert upload.read_bytes() == before


# --- streams and metadata ------------------------------------------------------------------------


def base64_of(client=NAME, size=3):
    return lambda path: weights.base64_messages(path, client, size)


def blobs(content, client=NAME, times=1):
    message = todo_pb2.modelWeight(clientname=client, clientsize=3, blob=content)
    return lambda path: (message for _ in range(times))


def with_nan(path):
    tensors = random_tensors(77)
    tensors[2][1, 0] = np.nan
    return weights.blob_messages(write_weights(path, tensors), "client002", 3)


DENIED, INVALID = "PERMISSION_DENIED", "INVALID_ARGUMENT"
STREAMS = {  # row: (a file of client002 -> messages, status code, keyword of the sentence)
    "unknown client": (base64_of("client009"), DENIED, "'client009' is not one.*client001, "),
    "a name of 10 kB": (blobs(b"x", "x" * 10_000), INVALID, r"client name .*\(10000 characters\)"),
    "no examples": (base64_of(size=0), INVALID, "client002 says it has 0 .*, expected 1 to 1000"),
    "more than --max-examples": (base64_of(size=1001), INVALID, "1001 examples, .*--max-examples"),
    "an empty stream": (lambda path: [], INVALID, "empty stream"),
    "a message of 3 MB": (blobs(bytes(3_000_000)), "RESOURCE_EXHAUSTED", "larger than max"),
    "an endless stream": (blobs(bytes(1000), times=1 << 30), INVALID, "larger than .*, the most"),
    "not a number": (with_nan, INVALID, "client002: layer 'healthy' holds nan"),
}
METADATA = {  # row: (what differs, status code, keyword of the sentence); all else is good
    "another run": ({"run": "0123"}, "FAILED_PRECONDITION", "'0123'; the server is in run run0"),
    "a round of 10 digits": ({"round": "1" * 10}, INVALID, "fedml-round"),
    "no round": ({"round": None}, INVALID, "fedml-round is ''"),
    "another digest": ({"sha256": "0" * 64}, INVALID, "client002: .*announced was 0{16}"),
    "in the name of another": ({"client": "client001"}, DENIED, "client001 sent weights in the"),
}


@pytest.mark.parametrize("row", [*STREAMS, *METADATA])
def test_bad_input_is_refused_and_the_round_goes_on(served, good, tmp_path, row):
    first = served.counted(good[0], "client001")
    before = served.tree()
    what, code, sentence = (STREAMS | METADATA)[row]
    if row in STREAMS:
        call = served.stub.sendWeight.future(
            iter(what(write_weights(tmp_path / "bad.h5", 2))), timeout=60
        )
    else:
        call = served.send(good[1], "client002", **what)
    found, details = refusal(call)
    assert found == code and re.search(sentence, details, re.DOTALL), (found, details)
    assert len(details) < 800 and "Exception calling" not in details
    assert {path: served.tree().get(path) for path in before} == before
    assert not list(served.folder.rglob("*.tmp*"))
    assert not first.done()
    assert served.send(good[1], "client002").result().value == first.result().value == 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


def test_a_refusal_of_any_length_keeps_its_code(served, monkeypatch, good):
    """gRPC would make RESOURCE_EXHAUSTED of an answer above its limit, for which a client ends."""
    monkeypatch.setattr(weights, "fits", fail_with(ValueError("A" * 20_000)))
    code, details = refusal(served.send(good[0], "client001"))
    assert code == INVALID and details.startswith("client001: AAAA") and len(details) < 2100


# --- whose fault it is ---------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (convert, "convert", ChildProcessError("code -9")),
        (weights, "spool", FULL),
        (weights, "fits", MemoryError("none left")),
        (files, "save_state", FULL),
    ],
)
def test_a_fault_of_the_machine_is_told_as_ours(
    served, tmp_path, good, monkeypatch, module, name, error
):
    """And the next upload counts, though the state may list the one that failed."""
    other = write_weights(tmp_path / "other.h5", 2, root="model_weights")
    first = served.counted(good[0], "client001")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_with(error))
        found, details = refusal(served.send(other, "client002"))
    assert found == "INTERNAL" and str(error) in details
    assert not list(served.folder.rglob("*.tmp*"))
    assert served.send(other, "client002").result().value == first.result().value == 1
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))


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
    assert refusal(served.send(tmp_path / "hostile.h5", "client002"))[0] == INVALID
    second = served.counted(other, "client002")
    assert served.run.rounds.uploads["client002"]["sha256"] == files.sha256_of(other)
    assert served.send(good[0], "client001").result().value == second.result().value == 1
    assert served.send(other, "client002", round="1").result().value == 1
    assert opened <= {served.run.weights}
    assert served.run.holds(("client001", 3, 1), ("client002", 3, 2))
