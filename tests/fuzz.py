"""Damaged input for all that reads what others wrote: wire messages, indexes, HDF5 files.

    python3 tests/fuzz.py --inputs 120000        # or --seconds 300; --seed N for others
    python3 tests/fuzz.py --only chunks,index

Each input follows from the seed and its number. Whatever it is, the reader raises ValueError with a
sentence or returns something well-formed: no crash, no hang, no file that is left, no memory that
grows. The HDF5 library does crash and hang on some files; that is why they are read in
a process of their own, and such ends are counted here. The default tests run a short one.
"""

import argparse
import base64
import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import write_weights
from google.protobuf.message import DecodeError

import data
from federation import convert, weights
from generated import todo_pb2

MEMORY_BYTES = 600 << 20
SHARES = {"chunks": 0.45, "index": 0.4, "hdf5": 0.15}  # of the inputs
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
INTERESTING += [1 << 40, (1 << 64) - 1]


def mutated(rng, content, others=()):
    """One to eight damages: another byte, bit or number, a cut, a piece doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        offset = rng.randrange(len(content) + 1)
        length = rng.choice([1, 2, 4, 8, rng.randrange(1, 200)])
        match rng.randrange(7):
            case 0:
                content[offset : offset + 1] = bytes([rng.randrange(256)])
            case 1 if offset < len(content):
                content[offset] ^= 1 << rng.randrange(8)
            case 2:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(INTERESTING) % (1 << 8 * size)
                content[offset : offset + size] = number.to_bytes(
                    size, rng.choice(["little", "big"])
                )
            case 3:
                del content[offset : offset + length]
            case 4:
                content[offset:offset] = content[offset : offset + length] * rng.choice([1, 2, 50])
            case 5:
                other = rng.choice([content, *others])
                start = rng.randrange(len(other) + 1)
                content[offset:offset] = other[start : start + length]
            case 6:
                del content[rng.choice([offset, len(content) - min(length, len(content))]) :]
    return bytes(content)


class Chunks:
    """weights.spool on streams whose messages were damaged, or cut, ordered or named otherwise."""

    def __init__(self, folder):
        self.path = folder / "spooled.h5"
        self.content = write_weights(folder / "good.h5", 3).read_bytes()

    def stream(self, rng):
        size = rng.choice([3, 299, 3000, 4000])
        whole = self.content[: rng.choice([0, 10, 3000, len(self.content)])]
        base64_form = rng.random() < 0.6
        pieces = base64.b64encode(whole) if base64_form else whole
        pieces = [pieces[start : start + size] for start in range(0, len(pieces), size)][:60]
        messages = [
            todo_pb2.modelWeight(**{"model" if base64_form else "blob": piece}) for piece in pieces
        ]
        for message in messages[: None if base64_form else 1]:
            message.clientname, message.clientsize = "client001/client_weights.h5", 3
        for _ in range(rng.choice([0, 0, 1, 3])):
            if not messages:
                break
            position = rng.randrange(len(messages))
            match rng.randrange(5):
                case 0:
                    messages.insert(rng.randrange(len(messages)), messages.pop(position))
                case 1:
                    messages.insert(position, messages[rng.randrange(len(messages))])
                case 2:
                    messages[position] = todo_pb2.modelWeight()
                case 3:
                    messages.pop(position)
                case 4:
                    damaged = mutated(rng, messages[position].SerializeToString())
                    with contextlib.suppress(DecodeError):  # gRPC ends such a call itself
                        messages[position] = todo_pb2.modelWeight.FromString(damaged)
        return messages

    def __call__(self, rng):
        messages, most = self.stream(rng), rng.choice([0, 5000, 1 << 20])
        if messages:
            with contextlib.suppress(ValueError):
                weights.client_of(messages[0].clientname)
        digest = weights.spool(iter(messages), self.path, most)
        blobs = b"".join(message.blob for message in messages)
        expected = blobs or base64.b64decode(
            "".join(message.model for message in messages), validate=True
        )
        assert self.path.read_bytes() == expected and digest == hashlib.sha256(expected).hexdigest()
        assert 0 < len(expected) <= most


class Index:
    """data.read_index on damaged pickles of every protocol, and on a few that are bombs."""

    def __init__(self, folder):
        self.path, n = folder / "worker1.pkl", 40
        columns = {
            "picture": [f"{k}.png" for k in range(n)],
            "label": [2 * (k % 2) for k in range(n)],
            "dir": [f"preprocessed/{k}.png" for k in range(n)],
            "new_label": [str(k % 2 == 0) for k in range(n)],
        }
        plain = {"a": (1, 2.5, None, True), "b": {3, 4}, "c": [frozenset([5]), b"6", 1 << 70]}
        values = [columns, columns, columns, plain, os.mkdir, range(3)]
        self.seeds = [pickle.dumps(value, k) for value in values for k in range(6)]
        self.bombs = [
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
            pickle.dumps({**columns, "label": [1 << 80_000] * n}),
            pickle.dumps({**columns, "dir": ["a" * 1_000_000] * n}),
        ]

    def __call__(self, rng):
        damaged = mutated(rng, rng.choice(self.seeds), self.seeds)
        self.path.write_bytes(self.bombs.pop() if self.bombs else damaged)
        try:
            records = data.read_index(self.path)
        except ValueError as error:
            sentence = str(error)
            assert str(self.path) in sentence and "\n" not in sentence and len(sentence) < 1500
            raise
        assert records
        for record in records:
            assert set(record) == set(data.INDEX_COLUMNS) and 0 <= record["label"] < data.NUM_GRADES


class Hdf5:
    """What is done with an upload, on damaged weight files; HDF5 in a process of its own."""

    def __init__(self, folder):
        self.path = folder / "upload.h5"
        own = write_weights(folder / "good_hdf5.h5", 5)
        other = write_weights(folder / "other_hdf5.h5", 5, root="model_weights")
        self.seeds = [own.read_bytes(), other.read_bytes()]
        self.layout = weights.Layout(own)
        self.crashed = 0

    def __call__(self, rng):
        self.path.write_bytes(mutated(rng, rng.choice(self.seeds)))
        if weights.fits(self.path, self.layout):
            return
        tensors = self.tensors()
        with contextlib.suppress(ValueError):  # as a client, which takes what it fetched as it is
            layout = weights.Layout(self.path, tensors)
            assert weights.fits(self.path, layout)
        weights.rewrite(self.path, tensors, self.layout)
        # what was accepted has the server's layout, and its numbers are finite
        assert weights.fits(self.path, self.layout)

    def tensors(self):
        """Of the file. Raises ValueError where the process says that, crashes or is ended."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                convert.set_bounds(cpu_s=1, memory_bytes=256 << 20)
                try:
                    answer = {"tensors": weights.tensors_of(self.path), "problem": None}
                except ValueError as error:
                    answer = {"problem": str(error)}
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
            self.crashed += 1
            raise ValueError("it crashed, or did not end")
        assert code == 0
        answer = json.loads(answer)
        if answer["problem"]:
            raise ValueError(answer["problem"])
        return [weights.Tensor(a, tuple(shape), b, c) for a, shape, b, c in answer["tensors"]]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SHARES))
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name) / "a" / "scratch"
        scratch.mkdir(parents=True)
        os.chdir(scratch)
        kinds = {"chunks": Chunks, "index": Index, "hdf5": Hdf5}
        targets = {key: kinds[key](scratch) for key in arguments.only.split(",")}
        files = {*os.listdir(scratch), "upload.h5", "worker1.pkl", "spooled.h5"}
        counts = run(targets, arguments)
        assert set(os.listdir(scratch)) <= files and os.listdir(scratch.parent) == ["scratch"]
        os.chdir("/")
    # its own: ru_maxrss begins with the parent's
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    assert peak < MEMORY_BYTES, f"peak memory {peak:,} bytes"
    for key in targets:
        print(f"{key}: {counts[key, 'accepted']} accepted, {counts[key, 'refused']} refused")
    if "hdf5" in targets:
        print(f"{targets['hdf5'].crashed} crashes or hangs of HDF5, contained")
    print(json.dumps({"inputs": counts.total(), "peak_mb": peak >> 20}))


def run(targets, arguments):
    """{(target, "accepted" or "refused"): how many}."""
    counts, ends_at = collections.Counter(), time.monotonic() + arguments.seconds
    for number in range(arguments.inputs):
        rng = random.Random(f"{arguments.seed} {number}")
        key = rng.choices(list(targets), [SHARES[key] for key in targets])[0]
        if time.monotonic() > ends_at:
            break
        faulthandler.dump_traceback_later(200, exit=True)  # what waits for ever ends here
        try:
            targets[key](rng)
            counts[key, "accepted"] += 1
        except ValueError:
            counts[key, "refused"] += 1
        except BaseException:
            print(f"--seed {arguments.seed}, input {number} ({key})", flush=True)
            raise
    faulthandler.cancel_dump_traceback_later()
    return counts


if __name__ == "__main__":
    main()
