"""Weight files: cut into messages, joined, checked, averaged. HDF5 and NumPy, no TensorFlow.

A weight file has Keras's `.h5` layout: `layer_names` and, in each layer's group, `weight_names`, at the root
(`save_weights` of Keras 2) or under `model_weights` (`model.save`). Weights are matched by order and shape.
Everything that comes over the wire is hostile until `check` has passed it.
"""

import base64
import binascii
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import h5py
import numpy as np

from common.files import replacing, sha256_of
from common.script import CLIENT_NAME
from generated import todo_pb2

BLOB_BYTES = 1 << 20  # the fastest piece on the wire (DESIGN: 256 KiB and 4 MiB are slower)
SEED_CHARACTERS = 100_000  # the thesis demo cuts its base64 text here ...
SEED_EXTRA_BYTES = 45  # ... and accepts at most this much of anything else in a message
SLAB_ELEMENTS = (
    1 << 20
)  # tensors are read and averaged in slabs of this size: memory does not follow the model
SEED_FILE_NAME = "client_weights.h5"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHECK_S = 20  # and a second for each 10 MB: what checking a file may take


# --- file -> messages ---------------------------------------------------------------------------------------------


def blob_messages(path_or_file, clientname="", clientsize=0):
    """The file's bytes in pieces of 1 MiB, behind a first message that only names the client: the server looks at the
    name before it takes anything large."""
    if clientname:
        yield todo_pb2.modelWeight(clientname=clientname, clientsize=clientsize)
    with _opened(path_or_file) as file:
        for _ in range(0, os.fstat(file.fileno()).st_size, BLOB_BYTES):
            yield todo_pb2.modelWeight(blob=file.read(BLOB_BYTES))


def base64_messages(path_or_file, clientname="", clientsize=0):
    """The file as the thesis demo sends it: one base64 text in pieces of 100,000 characters, name and size in each.

    75,000 bytes are 100,000 characters, so each piece is encoded by itself and the text never exists as a whole.
    A name too long for the demo's message limit gets shorter pieces.
    """
    extra = (
        todo_pb2.modelWeight(clientname=clientname, clientsize=clientsize).ByteSize() + 4
    )  # + header of `model`
    characters = SEED_CHARACTERS - max(0, extra - SEED_EXTRA_BYTES)
    with _opened(path_or_file) as file:
        while piece := file.read(characters // 4 * 3):
            yield todo_pb2.modelWeight(
                model=base64.b64encode(piece), clientname=clientname, clientsize=clientsize
            )


@contextmanager
def _opened(path_or_file):
    if hasattr(path_or_file, "read"):
        yield path_or_file
    else:
        with open(path_or_file, "rb") as file:
            yield file


# --- messages -> file ---------------------------------------------------------------------------------------------


def client_of(clientname):
    """'client001' from the wire's 'client001' or the demo's 'client001/client_weights.h5'. Raises ValueError otherwise."""
    name = clientname.removesuffix("/" + SEED_FILE_NAME)
    if not CLIENT_NAME.fullmatch(name):
        raise ValueError(
            f"client name {clientname[:80]!r} ({len(clientname)} characters) is refused: expected letters, "
            f"digits, '.', '_', '-' (at most 64), with '/{SEED_FILE_NAME}' behind it or nothing"
        )
    return name


def spool(messages, path, max_bytes):
    """Writes a stream of messages to `path` as it arrives; returns the SHA-256 of what was written.

    A piece of base64 need not be decodable by itself: the remainder of 4 characters is carried on.
    Raises ValueError: another client or size within the stream, bad base64, more than `max_bytes`, nothing at all.
    """
    first, kind, carry, padded, written, digest = None, None, "", False, 0, hashlib.sha256()
    with open(path, "wb") as file:
        for message in messages:
            name, size = first = first or (message.clientname, message.clientsize)
            if message.clientname not in ("", name) or message.clientsize not in (0, size):
                raise ValueError(
                    f"the stream began as {name[:80]!r} with {size} examples and goes on as "
                    f"{message.clientname[:80]!r} with {message.clientsize}: one upload is of one client"
                )
            kind = kind or ("base64" if message.model else "bytes" if message.blob else None)
            if message.blob if kind == "base64" else message.model:
                raise ValueError("base64 and bytes are mixed in one stream")
            piece = message.blob
            if message.model:
                if padded:
                    raise ValueError("the base64 text goes on behind its end ('=')")
                text = carry + message.model
                carry = text[len(text) // 4 * 4 :]
                piece, padded = _decoded(text[: len(text) - len(carry)])
            written += len(piece)
            if written > max_bytes:
                raise ValueError(
                    f"the file is larger than {max_bytes:,} bytes, the most that is accepted for this model"
                )
            digest.update(piece)
            file.write(piece)
            message = piece = None  # while the next is waited for, no memory is held
    if carry:
        raise ValueError(
            f"the base64 text ends in the middle of a group of 4 ({len(carry)} characters left over)"
        )
    if not written:
        raise ValueError("the stream holds no weights (0 bytes)")
    return digest.hexdigest()


def _decoded(text):
    try:
        return base64.b64decode(text, validate=True), text.endswith("=")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the text is not base64: {error}") from None


# --- what is in a file --------------------------------------------------------------------------------------------


def _names(group, attribute):
    """A list attribute of Keras's layout, read only after its type and size were looked at."""
    if attribute not in group.attrs:
        raise ValueError(
            f"group {group.name!r} has no attribute {attribute!r}: not a Keras weight file"
        )
    found = group.attrs.get_id(attribute)
    # a model without weights writes an empty list, which NumPy makes a float array
    if (
        len(found.shape) != 1
        or found.shape[0] > 10_000
        or (found.dtype.kind not in "SO" and found.shape[0])
    ):
        raise ValueError(
            f"attribute {attribute!r} of {group.name!r} is {found.dtype} {found.shape}, expected a list of names"
        )
    names = group.attrs[attribute]
    return [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names
    ]


def _member(group, path):
    """What lies at `path` below `group`, by hard links only: nothing outside the file is ever opened."""
    for name in path.split("/"):
        if not isinstance(group, h5py.Group) or name in ("", ".", "..") or name not in group:
            raise ValueError(f"{path!r} is named but not in the file")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(
                f"{path!r} is a link to another place: expected the weights themselves"
            )
        group = group[name]
    return group


def tensors(file):
    """[(layer name, weight name, dataset)] of an open HDF5 file, in Keras's order. Raises ValueError."""
    root = file
    if "layer_names" not in file.attrs and "model_weights" in file:
        root = _member(file, "model_weights")
    found = []
    for layer in _names(root, "layer_names"):
        group = _member(root, layer)
        if not isinstance(group, h5py.Group):
            raise ValueError(f"layer {layer!r} is not a group")
        for weight in _names(group, "weight_names"):
            found.append((layer, weight, _member(group, weight)))
    return found


def shapes_of(path):
    """[(layer name, shape)] of every tensor of a trusted file, in order: what `check` compares with. Raises ValueError."""
    try:
        with h5py.File(path, "r") as file:
            return [(layer, dataset.shape) for layer, _, dataset in tensors(file)]
    except OSError:
        raise ValueError(
            f"{path} cannot be used: there is no such file, or it is no HDF5 weight file"
        ) from None


def check(path, expected):
    """Raises ValueError, naming layer and reason, unless `path` holds finite float32 tensors of the `expected` shapes.

    expected: [(layer name, shape)], of the receiver's own model. Reads one slab at a time.
    """
    try:
        with h5py.File(path, "r") as file:
            found = tensors(file)
            if len(found) != len(expected):
                raise ValueError(f"the file has {len(found)} tensors, the model {len(expected)}")
            for (layer, weight, dataset), (own_layer, shape) in zip(found, expected, strict=True):
                where = f"layer {layer[:80]!r} ({weight[:80]!r}; here {own_layer!r})"
                _check_storage(where, dataset, shape)
                offset = dataset.id.get_offset()
                for first, count in _slabs(shape):
                    slab = np.fromfile(path, "<f4", count, offset=offset + 4 * first)
                    if len(slab) != count:
                        raise ValueError(f"{where} ends in the middle: the file is cut short")
                    if not np.isfinite(slab).all():
                        bad = slab[~np.isfinite(slab)][0]
                        raise ValueError(f"{where} holds {bad}: only finite numbers are averaged")
    except ValueError:
        raise
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (
        Exception
    ) as error:  # HDF5 reports damage in many classes; all of them mean the same here
        raise ValueError(
            f"not a whole HDF5 weight file ({type(error).__name__}: {str(error)[:200]})"
        ) from None


class Checker:
    """`check` in a process of its own, kept for the next file: on a damaged file the HDF5 library itself can crash, or never
    return (1 in 1500 files with one changed byte did, h5py 3.14)."""

    def __init__(self, expected):
        self.expected, self.process, self.lock = expected, None, threading.Lock()

    def __call__(self, path):
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__, json.dumps(self.expected)],
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": ROOT},
                    start_new_session=True,
                )  # Ctrl-C in a terminal is not for it
            limit = threading.Timer(CHECK_S + os.path.getsize(path) / 1e7, self.process.kill)
            limit.start()
            try:
                print(json.dumps(str(path)), file=self.process.stdin, flush=True)
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            limit.cancel()
            if not answer:
                self.process.wait()
        sentence = json.loads(
            answer
            or '"not a whole HDF5 weight file (the library that reads it crashed or did not end)"'
        )
        if sentence:
            raise ValueError(sentence)

    @staticmethod
    def serve(expected):
        """The other process: paths on stdin, on stdout what is wrong with each, or null."""
        for line in sys.stdin:
            sentence = None
            try:
                check(json.loads(line), expected)
            except ValueError as error:
                sentence = str(error)
            print(json.dumps(sentence), flush=True)


def _check_storage(where, dataset, shape):
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{where} is not a dataset")
    if dataset.dtype != np.dtype("<f4"):
        raise ValueError(f"{where} has dtype {dataset.dtype}, expected float32")
    if dataset.shape != tuple(shape):
        raise ValueError(f"{where} has shape {dataset.shape}, expected {tuple(shape)}")
    layout = dataset.id.get_create_plist().get_layout()
    if layout != h5py.h5d.CONTIGUOUS or dataset.external or dataset.id.get_offset() is None:
        raise ValueError(
            f"{where} is stored chunked, compressed, virtual, outside the file or not at all: expected plain "
            "storage, as Keras writes"
        )


def _slabs(shape):
    """[(first element, number of elements)] of a tensor, cut so that memory does not follow its size."""
    size = int(np.prod(shape))
    return [(first, min(SLAB_ELEMENTS, size - first)) for first in range(0, size, SLAB_ELEMENTS)]


# --- FedAvg -------------------------------------------------------------------------------------------------------


def fedavg(paths, num_examples, layout, target):
    """Federated averaging (McMahan et al. 2017, algorithm 1): w = sum(n_k w_k) / sum(n_k); publishes `target`.

    paths         checked weight files, in the order of their clients' names
    num_examples  n_k, the number of training examples of each
    layout        the server's own weight file, whose layout the result takes (may be `target` itself)
    float64, one slab of one tensor at a time, cast to float32 once. Returns the SHA-256 of the result.
    """
    with replacing(target) as merged:
        shutil.copyfile(layout, merged)
        with ExitStack() as stack:
            result = stack.enter_context(open(merged, "r+b", buffering=0))
            uploads = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
            # plain files and offsets: an HDF5 library that holds 48 files open holds 70 MB
            for (_, shape), own, *offsets in zip(
                shapes_of(merged), _offsets(merged), *map(_offsets, paths), strict=True
            ):
                for first, count in _slabs(shape):
                    total = np.zeros(count, np.float64)
                    for n, file, offset in zip(num_examples, uploads, offsets, strict=True):
                        file.seek(offset + 4 * first)
                        total += n * np.fromfile(file, "<f4", count).astype(np.float64)
                    result.seek(own + 4 * first)
                    result.write((total / sum(num_examples)).astype("<f4").tobytes())
        return sha256_of(merged)


def _offsets(path):
    """Where in the file each tensor begins, in order."""
    with h5py.File(path, "r") as file:
        return np.array([dataset.id.get_offset() for *_, dataset in tensors(file)])


if __name__ == "__main__":
    Checker.serve(json.loads(sys.argv[1]))
