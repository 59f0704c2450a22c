"""Damaged input for all that reads what others wrote: wire messages, indexes, HDF5 files.

Whatever it is, the reader raises ValueError with a sentence or returns something well-formed: no
crash, no hang, no memory that grows. The HDF5 library does crash and hang on some files: that is
why a process of its own reads them. `--slow` tries many more, others each time.
"""

import base64
import contextlib
import functools
import json
import os
import pickle
import resource
import signal
import tempfile
from pathlib import Path

import pytest
from conftest import MEMORY, write_weights
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import data
from federation import convert, weights
from generated import todo_pb2

MEMORY_BYTES = 400 << 20  # that a reader may take
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1]


@pytest.fixture(scope="module", autouse=True)
def folder():
    """Files lie in the working folder; memory is bounded as long as the tests run."""
    before, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        os.chdir(name)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        address_space = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (address_space, limits[1]))
        yield
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(before)


@st.composite
def damaged(draw, contents):
    """One of these bytes with up to four damages: other bytes, a cut, a piece doubled or moved."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        piece = content[offset : offset + length]
        kind = draw(st.integers(0, 5))
        if kind == 0:
            content[offset : offset + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 1:
            number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * min(length, 8))
            content[offset : offset + length] = number.to_bytes(length, "little")
        elif kind == 2:
            del content[offset : offset + length]
        elif kind == 3:
            content[offset:offset] = piece * draw(st.sampled_from([1, 2, 50]))
        elif kind == 4:
            there = draw(st.integers(0, len(content)))
            content[there:there] = piece
        else:
            del content[offset:]
    return bytes(content)


# --- messages ------------------------------------------------------------------------------------


@st.composite
def streams(draw):
    """The messages of an upload, of which some are damaged, doubled, empty, moved or missing."""
    whole = bytes(range(256)) * draw(st.sampled_from([0, 1, 12, 40]))
    field = draw(st.sampled_from(["model", "blob"]))
    pieces = base64.b64encode(whole) if field == "model" else whole
    size = draw(st.sampled_from([3, 299, 3000]))
    messages = [
        todo_pb2.modelWeight(**{field: pieces[start : start + size]})
        for start in range(0, min(len(pieces), 60 * size), size)
    ]
    for message in messages[: None if field == "model" else 1]:
        message.clientname, message.clientsize = "client001/client_weights.h5", 3
    for _ in range(draw(st.integers(0, 3)) if messages else 0):
        position = draw(st.integers(0, len(messages) - 1))
        message = messages.pop(position)
        copies = draw(st.integers(0, 2))
        with contextlib.suppress(DecodeError):  # gRPC ends such a call itself
            if draw(st.booleans()):
                changed = draw(damaged([message.SerializeToString()]))
                message = todo_pb2.modelWeight.FromString(changed)
        messages[position:position] = [message] * copies or [todo_pb2.modelWeight()]
    return messages


@given(streams(), st.sampled_from([0, 5000, 1 << 20]))
def read_stream(messages, max_bytes):
    with contextlib.suppress(ValueError):
        for message in messages:
            weights.client_of(message.clientname)
    with contextlib.suppress(ValueError):
        weights.spool(iter(messages), Path("spooled.h5"), max_bytes)
        text = "".join(message.model for message in messages)
        expected = b"".join(message.blob for message in messages) or base64.b64decode(text)
        assert Path("spooled.h5").read_bytes() == expected and 0 < len(expected) <= max_bytes


# --- indexes -------------------------------------------------------------------------------------

COLUMNS = {
    "picture": [f"{k}.png" for k in range(40)],
    "label": [2 * (k % 2) for k in range(40)],
    "dir": [f"preprocessed/{k}.png" for k in range(40)],
    "new_label": [str(k % 2 == 0) for k in range(40)],
}
PLAIN = {"a": (1, 2.5, None, True), "b": {3, 4}, "c": [frozenset([5]), b"6", 1 << 70]}
PICKLES = [
    pickle.dumps(value, k) for value in (COLUMNS, PLAIN, os.mkdir, range(3)) for k in range(6)
]
BOMBS = [
    b"\x80\x04]r" + (0x7FFFFFFF).to_bytes(4, "little") + b".",  # a memo of 16 GB
    b"\x80\x04]p99999999999999999999\n.",
    b"\x80\x04]r\xff\xff\xff\xff.",
    b"\x80\x04})" + b"\x85" * 2_000_000 + b"K\x01s.",  # a key two million tuples deep
    b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    b"\x80\x04\x8b\xff\xff\xff\x7f.",
    b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little"),
    b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"].",
    b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little"),
    b"I" + b"9" * 1_000_000 + b"\n.",
    b"(" * 2_000_000,
    b"\x80\x04(" + b"]" + b"2" * 1_000_000 + b"l.",
    pickle.dumps({**COLUMNS, "label": [1 << 80_000] * 40}),
]


@given(damaged(PICKLES))
def read_index(content):
    path = Path("worker1.pkl")
    path.write_bytes(content)
    try:
        records = data.read_index(path)
    except ValueError as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence and len(sentence) < 1500
    else:
        assert records
        for record in records:
            assert set(record) == set(data.INDEX_COLUMNS) and 0 <= record["label"] < data.NUM_GRADES


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_a_small_index_that_costs_much_is_refused(number):
    Path("bomb.pkl").write_bytes(BOMBS[number])
    with pytest.raises(ValueError, match=r"bomb\.pkl"):
        data.read_index("bomb.pkl")


# --- weight files --------------------------------------------------------------------------------


@functools.cache
def contents():
    """Of the server's own file, and of one of another layout."""
    files = [write_weights("own.h5", 5), write_weights("other.h5", 5, root="model_weights")]
    return [file.read_bytes() for file in files]


@given(st.data())
def read_weight_file(choices):
    own, other = contents()
    layout, upload = weights.Layout("own.h5"), Path("upload.h5")
    upload.write_bytes(choices.draw(damaged([own, other])))
    with contextlib.suppress(ValueError):
        if not weights.fits(upload, layout):
            tensors = tensors_of(upload)
            with contextlib.suppress(ValueError):  # as a client, which takes what it fetched
                assert weights.fits(upload, weights.Layout(upload, tensors))
            weights.rewrite(upload, tensors, layout)
        # what was accepted has the server's layout, and its numbers are finite
        assert weights.fits(upload, layout)


def tensors_of(path):
    """Read by a process as `convert` bounds it, which is forked here: hundreds are needed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            convert.set_bounds(cpu_s=1, memory_bytes=256 << 20)
            answer = {"problem": None}
            try:
                answer["tensors"], _ = weights.contents_of(path)
            except ValueError as error:
                answer["problem"] = str(error)
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        assert -code in convert.CRASHES | {signal.SIGXCPU}, code
        raise ValueError("it crashed, or did not end")
    assert code == 0
    answer = json.loads(answer)
    if answer["problem"]:
        raise ValueError(answer["problem"])
    return [weights.Tensor(a, tuple(shape), b, c) for a, shape, b, c in answer["tensors"]]


# --- many of each --------------------------------------------------------------------------------

READERS = {read_stream: 500, read_index: 500, read_weight_file: 150}


def read_many(reader, examples, **options):
    settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.reuse, Phase.generate],
        **options,
    )(reader)()


@pytest.mark.parametrize("reader", READERS)
def test_damaged_input(reader):
    read_many(reader, READERS[reader], derandomize=True, database=None)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_much_damaged_input(reader):
    read_many(reader, 10 * READERS[reader])
