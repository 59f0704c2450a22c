"""Weight files: cut into messages, joined, checked, averaged. HDF5 and NumPy, no TensorFlow.

A weight file has Keras's `.h5` layout: the attribute `layer_names` and, in the group of each layer,
`weight_names`. They lie at the root (`save_weights` of Keras 2) or under `model_weights`
(`model.save`). Weights are matched by order and shape; the names of layers may differ.

All files of a run have one layout, that of the server's first file: a client writes its numbers
into the file that it fetched. So an upload must equal the server's own file byte for byte outside
the tensors. That can be checked while it arrives (`Inspection`), without a second reading and
without HDF5, which is not safe to open hostile files with. What is laid out otherwise goes through
`convert.py`.
"""

import base64
import binascii
import hashlib
import os
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import h5py
import numpy as np

from common.files import replacing
from common.script import CLIENT_NAME
from generated import todo_pb2

BLOB_BYTES = 1 << 20  # of one message: the fastest here, 256 KiB and 4 MiB are slower

# The thesis demo cuts its base64 text after so many characters, and its peers accept no message
# that holds more than so many bytes of anything else.
SEED_CHARACTERS = 100_000
SEED_EXTRA_BYTES = 45
SEED_FILE_NAME = "client_weights.h5"
# The thesis's text has the name without its extension.
SEED_FILE_NAMES = (SEED_FILE_NAME, "client_weights")

SLAB_ELEMENTS = 1 << 16  # tensors are read in slabs: memory does not follow the model's size
MOST_NAMES = 10_000  # of layers, of one layer's weights and of all tensors, that a file may list
NUMBER_BYTES = 4  # float32


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
    """'client001' from the wire's 'client001', or from what peers of 2020 send.

    They send a path on the server: 'client001/client_weights.h5' as the thesis's code has it,
    'client001/client_weights' as its text, and either of them behind './'.
    Raises ValueError for anything else: the name is also the name of a folder.
    """
    name = clientname
    folder, slash, file_name = clientname.removeprefix("./").partition("/")
    if slash and file_name in SEED_FILE_NAMES:
        name = folder
    if not CLIENT_NAME.fullmatch(name):
        raise ValueError(
            f"client name {clientname[:80]!r} ({len(clientname)} characters) is refused: expected "
            "letters, digits, '.', '_', '-' (at most 64), "
            f"with '/{SEED_FILE_NAME}' behind it or nothing"
        )
    return name


def spool(messages, path, max_bytes, look=None):
    """Write a stream of messages to `path` as it arrives; returns the SHA-256 of the file.

    look: called with each piece of the file (bytes), in order.

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
            if look is not None:
                look(piece)
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
    with _trusted(path) as file:
        return [(layer, dataset.shape) for layer, _, dataset in tensors(file)]


@contextmanager
def _trusted(path):
    """An open HDF5 file of our own, or of the user's. Raises ValueError."""
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ValueError(
            f"{path} cannot be used: there is no such file, or it is no HDF5 weight file"
        ) from None
    try:
        with file:
            yield file
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


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
            dataset = _member(group, weight)
            if not isinstance(dataset, h5py.Dataset):
                raise ValueError(f"layer {layer[:80]!r} ({weight[:80]!r}) is not a dataset")
            found.append((layer, weight, dataset))
            # a list may name the same group again and again: a small file of very many tensors
            if len(found) > MOST_NAMES:
                raise ValueError(f"the file lists more than {MOST_NAMES:,} tensors")
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
            raise ValueError(f"{path!r} is a link: expected the weights themselves")
        group = group[name]
    return group


def check(path, expected):
    """Raise ValueError, naming layer and reason, unless `path` holds what the model needs.

    expected: [(layer name, shape)] of the receiver's own model, see `shapes_of`. The file must hold
    finite float32 tensors of these shapes, in this order. They are read one slab at a time.

    Returns where each tensor begins (bytes from the start of the file), in order.
    """
    offsets = []
    try:
        with h5py.File(path, "r") as file:
            found = tensors(file)
            if len(found) != len(expected):
                raise ValueError(f"the file has {len(found)} tensors, the model {len(expected)}")
            for (layer, weight, dataset), (own_layer, shape) in zip(found, expected, strict=True):
                where = f"layer {layer[:80]!r} ({weight[:80]!r}; here {own_layer!r})"
                _check_storage(where, dataset, shape)
                _check_numbers(where, path, dataset.id.get_offset(), shape)
                offsets.append(dataset.id.get_offset())
        return offsets
    except (ValueError, MemoryError):
        raise
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    # HDF5 reports damage in many classes of exceptions; all of them mean the same here
    except Exception as error:
        raise ValueError(
            f"not a whole HDF5 weight file ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def _check_storage(where, dataset, shape):
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
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        for _, count in _slabs(shape):
            slab = np.fromfile(file, "<f4", count)
            if len(slab) != count:
                raise ValueError(f"{where} ends in the middle: the file is cut short")
            value = first_not_finite(slab)
            if value is not None:
                raise ValueError(f"{where} holds {value}: only finite numbers are averaged")


def _slabs(shape):
    """[(first element, number of elements)] of the slabs of a tensor."""
    size = int(np.prod(shape))
    return [(first, min(SLAB_ELEMENTS, size - first)) for first in range(0, size, SLAB_ELEMENTS)]


# --- one layout ---------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where a tensor lies in a file: float32 numbers, one behind the other, in C order."""

    layer: str
    shape: tuple
    begin: int  # bytes from the start of the file
    end: int


class Layout:
    """What lies where in the server's own weight file, and so in every file of its run.

    tensors    [Tensor], in Keras's order
    outside    [(begin, bytes)]: all that lies between the tensors, before and behind them
    size       of the file, in bytes
    """

    def __init__(self, path):
        """Describe the trusted file `path`. Raises ValueError where it has no plain tensors."""
        self.tensors = []
        with _trusted(path) as file:
            for layer, weight, dataset in tensors(file):
                # a dataset without a shape is refused by the comparison with ()
                _check_storage(f"layer {layer!r} ({weight!r})", dataset, dataset.shape or ())
                begin = dataset.id.get_offset()
                end = begin + dataset.size * NUMBER_BYTES
                self.tensors.append(Tensor(layer, dataset.shape, begin, end))
        self.size = os.path.getsize(path)
        self.outside = []
        with open(path, "rb") as file:
            position = 0
            for tensor in self.in_file_order():
                if tensor.begin < position:
                    raise ValueError(f"{path} cannot be used: two tensors share the same bytes")
                file.seek(position)
                self.outside.append((position, file.read(tensor.begin - position)))
                position = tensor.end
            file.seek(position)
            self.outside.append((position, file.read()))

    @property
    def shapes(self):
        """[(layer name, shape)] of every tensor, as `check` expects it."""
        return [(tensor.layer, tensor.shape) for tensor in self.tensors]

    def in_file_order(self):
        """The tensors as they follow each other in the file."""
        return sorted(self.tensors, key=lambda tensor: tensor.begin)


class Inspection:
    """Compares a file with the server's layout while its pieces arrive; they may end anywhere.

    Outside the tensors every byte must be that of the server's file. Inside, the first number that
    is not finite is noted. The verdict falls when the file is complete: see `fits`.
    """

    def __init__(self, layout):
        self.layout = layout
        self.position = 0  # bytes seen so far
        self.differs = False  # outside the tensors
        self.not_finite = None  # (layer name, value) of the first such number
        self._parts = self._all_parts()
        self._part = next(self._parts)
        self._begun_number = b""  # the bytes of a number that the last piece ended in

    def _all_parts(self):
        """(end, expected bytes or None, layer name or None) of all parts of the file, in order."""
        tensors = iter(self.layout.in_file_order())
        for begin, expected in self.layout.outside:
            yield begin + len(expected), expected, None
            tensor = next(tensors, None)
            if tensor is not None:
                yield tensor.end, None, tensor.layer

    def look(self, piece):
        """The next bytes of the file."""
        piece = memoryview(piece)
        while len(piece) and not self.differs:
            if self._part is None:
                self.differs = True  # the file goes on behind the end of the server's
                return
            end, expected, layer = self._part
            inside, piece = piece[: end - self.position], piece[end - self.position :]
            if expected is not None:
                begin = len(expected) - (end - self.position)
                self.differs = inside != expected[begin : begin + len(inside)]
            else:
                self._look_at_numbers(inside, layer)
            self.position += len(inside)
            if self.position == end:
                self._part = next(self._parts, None)

    def _look_at_numbers(self, content, layer):
        if self.not_finite is not None:
            return
        if self._begun_number:
            missing = NUMBER_BYTES - len(self._begun_number)
            self._begun_number += bytes(content[:missing])
            content = content[missing:]
            if len(self._begun_number) < NUMBER_BYTES:
                return
            self._note(np.frombuffer(self._begun_number, "<f4"), layer)
        whole = len(content) // NUMBER_BYTES * NUMBER_BYTES
        self._begun_number = bytes(content[whole:])
        if whole:
            self._note(np.frombuffer(content[:whole], "<f4"), layer)

    def _note(self, numbers, layer):
        value = first_not_finite(numbers)
        if value is not None and self.not_finite is None:
            self.not_finite = (layer, value)

    def fits(self):
        """The verdict on the complete file: True if it has the server's layout, False if another.

        Raises ValueError for a file in the server's layout that is cut short or has a number that
        is not finite.
        """
        if self.differs:
            return False
        if self.position < self.layout.size:
            raise ValueError(
                f"the file is cut short: it has {self.position:,} of {self.layout.size:,} bytes"
            )
        if self.not_finite is not None:
            raise not_finite(*self.not_finite)
        return True


def first_not_finite(numbers):
    """The first NaN or infinity of a float32 array, or None."""
    if not numbers.size:
        return None
    if not numbers.flags.aligned:
        numbers = numbers.copy()  # NumPy is ten times slower on numbers between two words
    # Both hand a NaN on. Two passes without a temporary array are faster than np.isfinite.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(numbers.min()) and np.isfinite(numbers.max())
    return None if finite else numbers[~np.isfinite(numbers)][0]


def not_finite(layer, value):
    return ValueError(f"layer {layer!r} holds {value}: only finite numbers are averaged")


def inspect(path, layout):
    """(SHA-256 of a file that lies on the disk, whether it fits). Raises ValueError like `fits`."""
    inspection = Inspection(layout)
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(BLOB_BYTES):
            digest.update(piece)
            inspection.look(piece)
    return digest.hexdigest(), inspection.fits()


def write_tensors(path, tensors):
    """Publish `path` anew, with other numbers in its tensors. Returns the SHA-256.

    path     a weight file, fetched from the server; what lies outside its tensors stays
    tensors  arrays in Keras's order, or what NumPy makes an array of: Keras's variables

    Raises ValueError where they are not of the file's shapes or not finite; then `path` stays.
    """
    layout = Layout(path)
    source = {}
    for tensor, values in zip(layout.tensors, tensors, strict=True):
        if tuple(values.shape) != tensor.shape:
            raise ValueError(
                f"layer {tensor.layer!r} has shape {tuple(values.shape)}, "
                f"that of {path} has {tensor.shape}"
            )
        source[tensor] = values

    def numbers_of(tensor):
        # one array at a time: the client holds the network already
        numbers = np.ascontiguousarray(source[tensor], "<f4")
        value = first_not_finite(numbers)
        if value is not None:
            raise not_finite(tensor.layer, value)
        yield numbers

    with replacing(path) as written:
        return _write(written, layout, numbers_of)


def _write(path, layout, numbers_of):
    """Write a file of this layout from front to back; returns its SHA-256.

    numbers_of: numbers_of(tensor) gives float32 arrays that are the tensor, one behind the other.
    """
    digest = hashlib.sha256()
    tensors = iter(layout.in_file_order())
    with open(path, "wb") as file:
        for _, outside in layout.outside:
            file.write(outside)
            digest.update(outside)
            tensor = next(tensors, None)
            if tensor is not None:
                for numbers in numbers_of(tensor):
                    file.write(numbers)
                    digest.update(numbers)
    return digest.hexdigest()


# --- FedAvg -------------------------------------------------------------------------------------


def fedavg(paths, num_examples, layout, target):
    """Federated averaging: w = sum(n_k w_k) / sum(n_k), published as `target`.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", algorithm 1. In float64, one slab of one tensor at a time, cast to float32 once.

    paths         files of the server's layout, in the order of their clients' names
    num_examples  n_k, the number of training examples of each
    layout        Layout of these files and of the result

    Returns the SHA-256 of the result.
    """
    total_examples = sum(num_examples)
    # One set of buffers for the whole merge: memory that is given back and taken again costs as
    # much time as the arithmetic.
    numbers = np.empty(SLAB_ELEMENTS, "<f4")
    product = np.empty(SLAB_ELEMENTS, np.float64)
    total = np.empty(SLAB_ELEMENTS, np.float64)

    def averages(tensor):
        for first, count in _slabs(tensor.shape):
            total[:count] = 0
            for n, upload in zip(num_examples, uploads, strict=True):
                _read(upload, tensor.begin + first * NUMBER_BYTES, numbers[:count])
                np.multiply(numbers[:count], n, out=product[:count], dtype=np.float64)
                total[:count] += product[:count]
            total[:count] /= total_examples
            numbers[:count] = total[:count]
            yield numbers[:count]

    with replacing(target) as merged, ExitStack() as stack:
        uploads = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
        return _write(merged, layout, averages)


def _read(file, offset, numbers):
    """Fill the array `numbers` from a file that was checked before."""
    if os.preadv(file.fileno(), [numbers], offset) != numbers.nbytes:
        raise OSError(f"{file.name} is shorter than it was when it was checked")
