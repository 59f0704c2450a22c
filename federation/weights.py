"""Weight files: cut into messages, joined, checked, averaged. HDF5 and NumPy, no TensorFlow.

A weight file has Keras's `.h5` layout: the attribute `layer_names` and, in the group of each layer,
`weight_names`. They lie at the root (`save_weights` of Keras 2) or under `model_weights`
(`model.save`). Weights are matched by order and shape; the names of layers may differ.

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

BLOB_BYTES = 1 << 20  # of one message: the fastest here, 256 KiB and 4 MiB are slower

# The thesis demo cuts its base64 text after so many characters, and its peers accept no message
# that holds more than so many bytes of anything else.
SEED_CHARACTERS = 100_000
SEED_EXTRA_BYTES = 45
SEED_FILE_NAME = "client_weights.h5"

SLAB_ELEMENTS = 1 << 20  # tensors are read in slabs: memory does not follow the model's size
MOST_NAMES = 10_000  # of layers, or of one layer's weights, that a file may list
CHECK_S = 20  # and a second for each 10 MB: how long the check of a file may take
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# --- file -> messages ---------------------------------------------------------------------------


def blob_messages(path_or_file, clientname="", clientsize=0):
    """The file's bytes in pieces of 1 MiB, behind a first message that only names the client.

    So the server sees the name before it takes anything large.
    """
    if clientname:
        yield todo_pb2.modelWeight(clientname=clientname, clientsize=clientsize)
    with _opened(path_or_file) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(0, size, BLOB_BYTES):
            yield todo_pb2.modelWeight(blob=file.read(BLOB_BYTES))


def base64_messages(path_or_file, clientname="", clientsize=0):
    """The file as the thesis demo sends it: one base64 text in pieces of 100,000 characters.

    Name and size are in each message. 75,000 bytes are 100,000 characters, so each piece is
    encoded by itself and the text never exists as a whole. A name that is too long for the demo's
    message limit gets shorter pieces.
    """
    empty = todo_pb2.modelWeight(clientname=clientname, clientsize=clientsize)
    extra_bytes = empty.ByteSize() + 4  # 4: what stands before `model` in the message
    characters = SEED_CHARACTERS - max(0, extra_bytes - SEED_EXTRA_BYTES)
    piece_bytes = characters // 4 * 3
    with _opened(path_or_file) as file:
        while piece := file.read(piece_bytes):
            text = base64.b64encode(piece)
            yield todo_pb2.modelWeight(model=text, clientname=clientname, clientsize=clientsize)


@contextmanager
def _opened(path_or_file):
    """The open file; one that came open is left to its owner to close."""
    if hasattr(path_or_file, "read"):
        yield path_or_file
    else:
        with open(path_or_file, "rb") as file:
            yield file


# --- messages -> file ---------------------------------------------------------------------------


def client_of(clientname):
    """'client001' from the wire's 'client001' or the demo's 'client001/client_weights.h5'.

    Raises ValueError for anything else: the name is also the name of a folder.
    """
    name = clientname.removesuffix("/" + SEED_FILE_NAME)
    if not CLIENT_NAME.fullmatch(name):
        raise ValueError(
            f"client name {clientname[:80]!r} ({len(clientname)} characters) is refused: expected "
            "letters, digits, '.', '_', '-' (at most 64), "
            f"with '/{SEED_FILE_NAME}' behind it or nothing"
        )
    return name


def spool(messages, path, max_bytes):
    """Write a stream of messages to `path` as it arrives; returns the SHA-256 of the file.

    Raises ValueError: another client or size within the stream, base64 and bytes mixed, bad base64,
    more than `max_bytes`, nothing at all.
    """
    joiner = Joiner()
    digest = hashlib.sha256()
    written = 0
    with open(path, "wb") as file:
        for message in messages:
            piece = joiner.bytes_of(message)
            written += len(piece)
            if written > max_bytes:
                raise ValueError(
                    f"the file is larger than {max_bytes:,} bytes, "
                    "the most that is accepted for this model"
                )
            digest.update(piece)
            file.write(piece)
            message = piece = None  # the next may be long in coming: hold no memory until then
    joiner.finish()
    if not written:
        raise ValueError("the stream holds no weights (0 bytes)")
    return digest.hexdigest()


class Joiner:
    """Turns the messages of one stream into the bytes of its file, one message after the other.

    The first message says whose stream it is, and the first with content whether it is base64 or
    bytes. One base64 text is cut anywhere, so a piece need not be decodable by itself: what is left
    over of a group of 4 characters is kept for the next piece.
    """

    def __init__(self):
        self.sender = None  # (clientname, clientsize) of the first message
        self.form = None  # "base64" or "bytes"
        self.left_over = ""  # at most 3 characters
        self.text_ended = False  # whether the padding ('=') that ends a base64 text was seen

    def bytes_of(self, message):
        """The next bytes of the file. Raises ValueError."""
        self._check_sender(message)
        self._check_form(message)
        if message.model:
            return self._decode(message.model)
        return message.blob

    def finish(self):
        """Call after the last message. Raises ValueError where the stream must not end here."""
        if self.left_over:
            raise ValueError(
                "the base64 text ends in the middle of a group of 4 "
                f"({len(self.left_over)} characters left over)"
            )

    def _check_sender(self, message):
        if self.sender is None:
            self.sender = (message.clientname, message.clientsize)
        name, size = self.sender
        # a later message may leave both out
        if message.clientname not in ("", name) or message.clientsize not in (0, size):
            raise ValueError(
                f"the stream began as {name[:80]!r} with {size} examples and goes on as "
                f"{message.clientname[:80]!r} with {message.clientsize}: "
                "one upload is of one client"
            )

    def _check_form(self, message):
        if self.form is None and message.model:
            self.form = "base64"
        elif self.form is None and message.blob:
            self.form = "bytes"
        if (message.model and self.form == "bytes") or (message.blob and self.form == "base64"):
            raise ValueError("base64 and bytes are mixed in one stream")

    def _decode(self, text):
        if self.text_ended:
            raise ValueError("the base64 text goes on behind its end ('=')")
        text = self.left_over + text
        whole = len(text) // 4 * 4
        self.left_over = text[whole:]
        text = text[:whole]
        self.text_ended = text.endswith("=")
        try:
            # without validate=True, what is not base64 would be skipped in silence
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"the text is not base64: {error}") from None


# --- what is in a file --------------------------------------------------------------------------


def shapes_of(path):
    """[(layer name, shape)] of the tensors of a trusted file, in order: what `check` compares with.

    Raises ValueError.
    """
    try:
        with h5py.File(path, "r") as file:
            return [(layer, dataset.shape) for layer, _, dataset in tensors(file)]
    except OSError:
        raise ValueError(
            f"{path} cannot be used: there is no such file, or it is no HDF5 weight file"
        ) from None


def tensors(file):
    """[(layer name, weight name, dataset)] of an open HDF5 file, in Keras's order.

    Raises ValueError.
    """
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


def _names(group, attribute):
    """A list attribute of Keras's layout; its type and size are looked at before it is read."""
    if attribute not in group.attrs:
        raise ValueError(
            f"group {group.name!r} has no attribute {attribute!r}: not a Keras weight file"
        )
    found = group.attrs.get_id(attribute)
    is_list = len(found.shape) == 1 and found.shape[0] <= MOST_NAMES
    # a model without weights writes an empty list, which NumPy makes a float array
    is_text = found.dtype.kind in "SO" or found.shape == (0,)
    if not is_list or not is_text:
        raise ValueError(
            f"attribute {attribute!r} of {group.name!r} is {found.dtype} {found.shape}, "
            "expected a list of names"
        )
    return [_text(name) for name in group.attrs[attribute]]


def _text(name):
    """h5py gives fixed-length strings as bytes, those of variable length as str."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _member(group, path):
    """What lies at `path` below `group`, by hard links only: no other file is ever opened."""
    for name in path.split("/"):
        if not isinstance(group, h5py.Group) or name in ("", ".", "..") or name not in group:
            raise ValueError(f"{path!r} is named but not in the file")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(
                f"{path!r} is a link to another place: expected the weights themselves"
            )
        group = group[name]
    return group


# --- the check ----------------------------------------------------------------------------------


def check(path, expected):
    """Raise ValueError, naming layer and reason, unless `path` holds what the model needs.

    expected: [(layer name, shape)] of the receiver's own model, see `shapes_of`. The file must hold
    finite float32 tensors of these shapes, in this order. They are read one slab at a time.
    """
    try:
        with h5py.File(path, "r") as file:
            found = tensors(file)
            if len(found) != len(expected):
                raise ValueError(f"the file has {len(found)} tensors, the model {len(expected)}")
            for (layer, weight, dataset), (own_layer, shape) in zip(found, expected, strict=True):
                where = f"layer {layer[:80]!r} ({weight[:80]!r}; here {own_layer!r})"
                _check_storage(where, dataset, shape)
                _check_numbers(where, path, dataset.id.get_offset(), shape)
    except ValueError:
        raise
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    # HDF5 reports damage in many classes of exceptions; all of them mean the same here
    except Exception as error:
        raise ValueError(
            f"not a whole HDF5 weight file ({type(error).__name__}: {str(error)[:200]})"
        ) from None


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
            f"{where} is stored chunked, compressed, virtual, outside the file or not at all: "
            "expected plain storage, as Keras writes"
        )


def _check_numbers(where, path, offset, shape):
    """Read past HDF5: from plain storage the numbers can be read as they lie in the file."""
    for first, count in _slabs(shape):
        slab = np.fromfile(path, "<f4", count, offset=offset + 4 * first)
        if len(slab) != count:
            raise ValueError(f"{where} ends in the middle: the file is cut short")
        finite = np.isfinite(slab)
        if not finite.all():
            raise ValueError(f"{where} holds {slab[~finite][0]}: only finite numbers are averaged")


def _slabs(shape):
    """[(first element, number of elements)] of the slabs of a tensor."""
    size = int(np.prod(shape))
    return [(first, min(SLAB_ELEMENTS, size - first)) for first in range(0, size, SLAB_ELEMENTS)]


class Checker:
    """`check` in a process of its own, which is kept for the next file.

    On a damaged file the HDF5 library itself can crash or never return (1 in 1500 files with one
    changed byte did, h5py 3.14), and that must not end the server.
    """

    def __init__(self, expected):
        self.expected = expected
        self.process = None
        self.lock = threading.Lock()

    def __call__(self, path):
        """Raise ValueError as `check` does, or where the process crashed or did not end."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            answer = self._ask(path)
        if not answer:
            raise ValueError(
                "not a whole HDF5 weight file (the library that reads it crashed or did not end)"
            )
        sentence = json.loads(answer)
        if sentence:
            raise ValueError(sentence)

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(self.expected)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": ROOT},
            start_new_session=True,  # Ctrl-C in a terminal is for the server, not for this one
        )

    def _ask(self, path):
        """The answer as a line of JSON; "" where the process ended without one."""
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
        return answer

    @staticmethod
    def serve(expected):
        """The other process: paths on stdin; on stdout what is wrong with each, or null."""
        for line in sys.stdin:
            sentence = None
            try:
                check(json.loads(line), expected)
            except ValueError as error:
                sentence = str(error)
            print(json.dumps(sentence), flush=True)


# --- FedAvg -------------------------------------------------------------------------------------


def fedavg(paths, num_examples, layout, target):
    """Federated averaging: w = sum(n_k w_k) / sum(n_k), published as `target`.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", algorithm 1. In float64, one slab of one tensor at a time, cast to float32 once.

    paths         checked weight files, in the order of their clients' names
    num_examples  n_k, the number of training examples of each
    layout        the server's own weight file, whose layout the result takes (may be `target`)

    Returns the SHA-256 of the result.
    """
    total_examples = sum(num_examples)
    with replacing(target) as merged:
        shutil.copyfile(layout, merged)
        with ExitStack() as stack:
            # Plain files and offsets: an HDF5 library that holds 48 files open holds 70 MB.
            result = stack.enter_context(open(merged, "r+b", buffering=0))
            uploads = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
            shapes = [shape for _, shape in shapes_of(merged)]
            own_offsets = _offsets(merged)
            upload_offsets = zip(*map(_offsets, paths), strict=True)
            for shape, own, offsets in zip(shapes, own_offsets, upload_offsets, strict=True):
                for first, count in _slabs(shape):
                    total = np.zeros(count, np.float64)
                    for n, file, offset in zip(num_examples, uploads, offsets, strict=True):
                        file.seek(offset + 4 * first)
                        total += n * np.fromfile(file, "<f4", count).astype(np.float64)
                    result.seek(own + 4 * first)
                    result.write((total / total_examples).astype("<f4").tobytes())
        return sha256_of(merged)


def _offsets(path):
    """Where in the file each tensor begins, in bytes, in order."""
    with h5py.File(path, "r") as file:
        return [dataset.id.get_offset() for *_, dataset in tensors(file)]


if __name__ == "__main__":
    Checker.serve(json.loads(sys.argv[1]))
