"""Damaged input for what reads others' files: indexes, weight files.

Whatever it is, the reader raises ValueError with a sentence or returns something well-formed: no
crash, no hang, no memory that grows. The HDF5 library does crash and hang on some files: that is
why a process of its own reads them. `--slow` tries many more, others each time.
"""

import contextlib
import os
import pickle
import resource
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import MEMORY, write_weights
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import data
from federation import convert, weights

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
    """One of these bytes with up to four damages: another number, a cut, a piece more or less."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * min(length, 8))
        kind = draw(st.sampled_from(["number", "number", "less", "more", "cut"]))
        if kind == "number":
            content[offset : offset + length] = number.to_bytes(length, "little")
        elif kind == "less":
            del content[offset : offset + length]
        elif kind == "more":
            piece = content[offset : offset + length] * draw(st.sampled_from([1, 50]))
            there = draw(st.integers(0, len(content)))
            content[there:there] = piece
        else:
            del content[offset:]
    return bytes(content)


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
BOMBS = {
    "a key two million tuples deep": b"\x80\x04})" + b"\x85" * 2_000_000 + b"K\x01s.",
    "a million lists deep": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a text of 4 EB": b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little"),
    "a number of 24,000 digits": pickle.dumps({**COLUMNS, "label": [1 << 80_000] * 40}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_index_that_costs_much_is_refused(bomb):
    Path("bomb.pkl").write_bytes(BOMBS[bomb])
    with pytest.raises(ValueError, match=r"bomb\.pkl"):
        data.read_index("bomb.pkl")


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


# --- weight files --------------------------------------------------------------------------------


def forked(path, _):
    """In place of `convert._run`: a process that is forked, since hundreds are needed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with os.fdopen(writer, "w") as sys.stdout:
                convert.main(path, 1, convert.MEMORY_BYTES)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), answer


@given(st.data())
def read_weight_file(choices):
    own, other = write_weights("own.h5", 5), write_weights("other.h5", 5, root="model_weights")
    layout, upload = weights.Layout(own), Path("upload.h5")
    upload.write_bytes(choices.draw(damaged([own.read_bytes(), other.read_bytes()])))
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ValueError):
        patch.setattr(convert, "_run", forked)
        if not weights.fits(upload, layout):
            tensors, _ = convert.contents_of(upload)
            with contextlib.suppress(ValueError):  # as a client, which takes what it fetched
                assert weights.fits(upload, weights.Layout(upload, tensors))
            weights.rewrite(upload, tensors, layout)
        # what was accepted has the server's layout, and its numbers are finite
        assert weights.fits(upload, layout)


# --- many of each --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "examples"),
    [
        (read_index, 500),
        (read_weight_file, 150),
        pytest.param(read_index, 5000, marks=pytest.mark.slow),
        pytest.param(read_weight_file, 1500, marks=pytest.mark.slow),
    ],
)
def test_damaged_input(request, reader, examples):
    is_slow = request.config.getoption("--slow")
    settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.reuse, Phase.generate],
        derandomize=not is_slow,
    )(reader)()
