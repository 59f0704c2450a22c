"""Weight files: cut into messages, joined, checked, averaged. HDF5 and NumPy, no TensorFlow.

A weight file has Keras's `.h5` layout: the attribute `layer_names` and, in the group of each layer,
`weight_names`. They lie at the root (`save_weights` of Keras 2) or under `model_weights`
(`model.save`). Weights are matched by order and shape; the names of layers may differ.

All files of a run have one layout, that of the server's first file: a client writes its numbers
into the file that it fetched. So an upload must equal the server's own file byte for byte outside
the tensors (`fits`), which is checked without HDF5: that is not safe to open hostile files with.
What is laid out otherwise goes through `convert.py`.
"""

import base64
import errno
import hashlib
import json
import math
import os
import statistics
from contextlib import ExitStack
from typing import NamedTuple

import h5py
import numpy as np

from common.files import naming, replacing
from common.script import CLIENT_NAME
from generated import todo_pb2

BLOB_BYTES = 1 << 20  # of one message: the fastest here, 256 KiB and 4 MiB are slower
MOST_MESSAGE_BYTES = 2 << 20  # that either end takes

# The thesis demo cuts its base64 text after so many characters, and its peers accept no message
# that holds more than so many bytes of anything else.
OLD_PEERS_CHARACTERS = 100_000
OLD_PEERS_EXTRA_BYTES = 45
OLD_PEERS_FILE_NAME = "client_weights.h5"
# The thesis's text, other than its code, has the name without its extension.
OLD_PEERS_FILE_NAMES = (OLD_PEERS_FILE_NAME, "client_weights")

SLAB_ELEMENTS = 1 << 16  # tensors are read in slabs: memory does not follow the model's size
MOST_NAMES = 10_000  # of layers, of one layer's weights and of all tensors, that a file may list
NUMBER_BYTES = 4  # float32
MOST_OUTSIDE_BYTES = 256 << 20  # of a file, beside its tensors: a layout keeps them in memory
LONGEST = 1e19  # update whose length is told: the square of a longer one is no float32
LEAST_DIRECTION = 1e-6  # square of the length of a sum that still points somewhere


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
    characters = OLD_PEERS_CHARACTERS - max(0, extra_bytes - OLD_PEERS_EXTRA_BYTES)
    piece_bytes = characters // 4 * 3
    with _opened(path_or_file) as file:
        while piece := file.read(piece_bytes):
            text = base64.b64encode(piece)
            yield todo_pb2.modelWeight(model=text, clientname=clientname, clientsize=clientsize)


def _opened(path_or_file):
    """The open file: who reads it closes it, though its owner may close it once more."""
    return path_or_file if hasattr(path_or_file, "read") else open(path_or_file, "rb")


# --- messages -> file ---------------------------------------------------------------------------


def client_of(clientname):
    """'client001' from the wire's 'client001', or from what peers of 2020 send.

    They send a path on the server: 'client001/client_weights.h5' as the thesis's code has it,
    'client001/client_weights' as its text, and either of them behind './'.
    Raises ValueError for anything else: the name is also the name of a folder.
    """
    name = clientname
    folder, slash, file_name = clientname.removeprefix("./").partition("/")
    if slash and file_name in OLD_PEERS_FILE_NAMES:
        name = folder
    if not CLIENT_NAME.fullmatch(name):
        raise ValueError(
            f"client name {clientname[:80]!r} ({len(clientname)} characters) is refused: expected "
            "letters, digits, '.', '_', '-' (at most 64), "
            f"with '/{OLD_PEERS_FILE_NAME}' behind it or nothing"
        )
    return name


def spool(messages, path, max_bytes):
    """Write a stream of messages to `path` as it arrives; returns the SHA-256 of the file.

    Raises ValueError: another client or size within the stream, base64 and bytes mixed, bad base64,
    more than `max_bytes`, nothing at all.
    """
    digest = hashlib.sha256()
    written = 0
    with naming(path), open(path, "wb") as file:
        for piece in joined(messages):
            written += len(piece)
            if written > max_bytes:
                raise ValueError(
                    f"the file is larger than {max_bytes:,} bytes, "
                    "the most that is accepted for this model"
                )
            digest.update(piece)
            file.write(piece)
            del piece  # the next may be long in coming: hold no memory until then
    if not written:
        raise ValueError("the stream holds no weights (0 bytes)")
    return digest.hexdigest()


def joined(messages):
    """Yields the bytes of the file that a stream of messages is, a piece for each message.

    The first message says whose stream it is. One base64 text is cut anywhere, so a piece need not
    be decodable by itself: what is left over of a group of 4 characters waits for the next piece.
    Raises ValueError.
    """
    sender = None  # (clientname, clientsize) of the first message
    has_text = has_bytes = False
    left_over = ""  # at most 3 characters
    text_ended = False  # whether the padding ('=') that ends a base64 text was seen
    for message in messages:
        sender = sender or (message.clientname, message.clientsize)
        # a later message may leave both out
        if message.clientname not in ("", sender[0]) or message.clientsize not in (0, sender[1]):
            raise ValueError(
                f"the stream began as {sender[0][:80]!r} with {sender[1]} examples and goes on as "
                f"{message.clientname[:80]!r} with {message.clientsize}: "
                "one upload is of one client"
            )
        has_text = has_text or bool(message.model)
        has_bytes = has_bytes or bool(message.blob)
        if has_text and has_bytes:
            raise ValueError("base64 and bytes are mixed in one stream")
        piece = message.blob
        if message.model:
            if text_ended:
                raise ValueError("the base64 text goes on behind its end ('=')")
            piece, left_over, text_ended = _decoded(left_over + message.model)
        del message
        yield piece
        del piece  # as in `spool`
    if left_over:
        raise ValueError(
            "the base64 text ends in the middle of a group of 4 "
            f"({len(left_over)} characters left over)"
        )


def _decoded(text):
    """(bytes, what is left over of a group of 4 characters, whether padding ends the text)."""
    whole = len(text) // 4 * 4
    text, left_over = text[:whole], text[whole:]
    try:
        # without validate=True, what is not base64 would be skipped in silence
        return base64.b64decode(text, validate=True), left_over, text.endswith("=")
    except ValueError as error:  # of characters that are no ASCII, or its own binascii.Error
        raise ValueError(f"the text is not base64: {error}") from None


# --- what is in a file --------------------------------------------------------------------------


class NotFinite(ValueError):
    """A tensor holds NaN or infinity."""


class Tensor(NamedTuple):
    """Where a tensor lies in a file: float32 numbers, one behind the other, in C order."""

    layer: str
    shape: tuple
    begin: int  # bytes from the start of the file
    end: int


def contents_of(path):
    """([Tensor] in Keras's order, `digest_of_layers`) of a weight file.

    HDF5 reads it, so it must be trusted. A file from outside is read by a bounded process, which
    calls this: `convert.contents_of`.
    Raises ValueError where it is no whole weight file, OSError for faults of this machine.
    """
    try:
        with h5py.File(path, "r") as file:
            tensors = [_tensor_of(*each) for each in datasets(file)]
            return tensors, digest_of_layers(file.attrs.get("model_config"))
    except (ValueError, MemoryError):
        raise
    # HDF5 reports damage in many classes of exceptions; all of them mean the same here
    except Exception as error:
        # It leaves the number of the system's error where that was the cause: too many open files,
        # a disk that cannot be read. That is no fault of the file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(
            f"not a whole HDF5 weight file ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def digest_of_layers(model_config):
    """Of the layers of a model in Keras's JSON: their classes and settings, but not their names.

    Files of networks with and without a layer that has no weights load into each other in silence;
    this tells them apart. Settings that are switches, or made of parts (initializers, types), are
    left out: these differ between versions of Keras, and by what is frozen.
    None where a file does not say its model's layers (None), or not in this form.
    """
    try:
        layers = [
            (
                layer["class_name"],
                sorted(
                    (name, value)
                    for name, value in layer["config"].items()
                    if name != "name" and type(value) in (int, float, str, list)
                ),
            )
            for layer in json.loads(model_config)["config"]["layers"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return hashlib.sha256(json.dumps(layers).encode()).hexdigest()


def datasets(file):
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
            raise ValueError(f"layer {layer[:80]!r} is not a group")
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
    """A list attribute of Keras's layout.

    Whatever else a hostile file has there, the process that reads it is bounded; and what is read
    as a name must then be in the file.
    """
    if attribute not in group.attrs:
        raise ValueError(
            f"group {group.name[:80]!r} has no attribute {attribute!r}: not a Keras weight file"
        )
    # h5py gives fixed-length strings as bytes, those of variable length as str
    return [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in np.ravel(group.attrs[attribute])
    ]


def _member(group, path):
    """What lies at `path` below `group`, by hard links only: no other file is ever opened."""
    for name in path.split("/"):
        if not isinstance(group, h5py.Group) or name not in group:
            raise ValueError(f"{path[:80]!r} is named but not in the file")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path[:80]!r} is a link: expected the weights themselves")
        group = group[name]
    return group


def _tensor_of(layer, weight, dataset):
    where = f"layer {layer[:80]!r} ({weight[:80]!r})"
    if dataset.dtype != np.dtype("<f4"):
        raise ValueError(f"{where} has dtype {dataset.dtype}, expected float32")
    begin = dataset.id.get_offset()
    if begin is None:  # HDF5 has an offset for nothing but what lies there in one piece
        raise ValueError(
            f"{where} is stored chunked, compressed, virtual, outside the file or not at all: "
            "expected plain storage, as Keras writes"
        )
    return Tensor(layer[:80], dataset.shape, begin, begin + dataset.size * NUMBER_BYTES)


def has_negative_variance(path):
    """Whether a weight file holds a negative moving variance: its square root is NaN.

    No training makes one, so who sent it did something else. HDF5 reads it: it must be of the
    server's layout.
    """
    with h5py.File(path, "r") as file:
        return any(
            weight.rpartition("/")[2].startswith("moving_variance") and (dataset[()] < 0).any()
            for _, weight, dataset in datasets(file)
        )


def check_shapes(tensors, expected):
    """Raise ValueError unless these tensors have the shapes of the model, in its order.

    expected  [(layer name, shape)] of the receiver's own model
    """
    if len(tensors) != len(expected):
        raise ValueError(f"the file has {len(tensors)} tensors, the model {len(expected)}")
    for tensor, (layer, shape) in zip(tensors, expected, strict=True):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"layer {tensor.layer!r} (here {layer!r}) has shape {tuple(tensor.shape)}, "
                f"expected {tuple(shape)}"
            )


def check_places(path, tensors):
    """Raise ValueError unless each of these tensors lies in the file, as long as its shape says.

    HDF5 does not look when it opens a file, and who read a hostile one may say anything.
    """
    size = os.path.getsize(path)
    for tensor in tensors:
        whole_numbers = (*tensor.shape, tensor.begin, tensor.end)
        if (
            any(type(number) is not int or number < 0 for number in whole_numbers)
            or tensor.end - tensor.begin != math.prod(tensor.shape) * NUMBER_BYTES
            or tensor.end > size
        ):
            raise ValueError(f"layer {tensor.layer!r} does not lie in the file as its shape says")


def numbers(path, tensors):
    """Yields each of these tensors of a file: float32 arrays of their shapes. Raises ValueError."""
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors:
            whole = np.empty(tensor.shape, "<f4")
            _read(file, tensor, 0, whole)
            check_finite(whole, tensor.layer)
            yield whole


def _finite_slabs(file, tensor):
    """Yields the numbers of a tensor in slabs, which share one array. Raises ValueError."""
    slab = np.empty(SLAB_ELEMENTS, "<f4")
    for first, count in _slabs(tensor.shape):
        _read(file, tensor, first, slab[:count])
        check_finite(slab[:count], tensor.layer)
        yield slab[:count]


def _slabs(shape):
    """[(first element, number of elements)] of the slabs of a tensor."""
    size = math.prod(shape)
    return [(first, min(SLAB_ELEMENTS, size - first)) for first in range(0, size, SLAB_ELEMENTS)]


def _read(file, tensor, first, numbers):
    """Fill the array `numbers` from a tensor, beginning with number `first`. Raises ValueError."""
    offset = tensor.begin + first * NUMBER_BYTES
    if os.preadv(file.fileno(), [numbers], offset) != numbers.nbytes:
        raise ValueError(f"layer {tensor.layer!r} ends in the middle: the file is cut short")


def check_finite(numbers, layer):
    """Raise NotFinite where a float32 array holds NaN or infinity."""
    if not numbers.size:
        return
    # Both hand a NaN on. Two passes without a temporary array are faster than np.isfinite.
    with np.errstate(invalid="ignore"):
        if np.isfinite(numbers.min()) and np.isfinite(numbers.max()):
            return
    value = numbers[~np.isfinite(numbers)][0]
    raise NotFinite(f"layer {layer!r} holds {value}: only finite numbers are averaged")


# --- one layout ---------------------------------------------------------------------------------


class Layout:
    """What lies where in the server's own weight file, and so in every file of its run.

    tensors    [Tensor], in Keras's order; `in_file_order` as they follow each other in the file
    layers     digest of the layers that it describes, from `digest_of_layers`
    outside    [(begin, bytes)]: all that lies between the tensors, before and behind them
    size       of the file, in bytes
    """

    def __init__(self, path, tensors=None, layers=None):
        """Describe the file `path`.

        tensors  where they lie in it; None: the file is trusted, and HDF5 reads both here
        Raises ValueError where it has no plain tensors.
        """
        try:
            if tensors is None:
                tensors, layers = contents_of(path)
            check_places(path, tensors)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
        self.tensors = tensors
        self.in_file_order = sorted(self.tensors, key=lambda tensor: tensor.begin)
        self.layers = layers
        self.size = os.path.getsize(path)
        of_tensors = sum(tensor.end - tensor.begin for tensor in self.tensors)
        if self.size - of_tensors > MOST_OUTSIDE_BYTES:
            raise ValueError(
                f"{path} cannot be used: {self.size - of_tensors:,} of its bytes are no weights, "
                f"expected at most {MOST_OUTSIDE_BYTES:,}"
            )
        self.outside = []
        with open(path, "rb") as file:
            position = 0
            for tensor in self.in_file_order:
                if tensor.begin < position:
                    raise ValueError(
                        f"{path} cannot be used: layer {tensor.layer!r} shares its bytes with "
                        "another tensor"
                    )
                file.seek(position)
                self.outside.append((position, file.read(tensor.begin - position)))
                position = tensor.end
            file.seek(position)
            self.outside.append((position, file.read()))

    @property
    def shapes(self):
        """[(layer name, shape)] of every tensor, as `check_shapes` expects it."""
        return [(tensor.layer, tensor.shape) for tensor in self.tensors]


def fits(path, layout):
    """Whether a file from outside has this layout: the same bytes outside the tensors.

    It is read once, in slabs. Not by a memory map: its pages count as resident memory, and a read
    error is a signal that ends the process.

    Raises ValueError for a file of this layout that is cut short, or holds what is not finite.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for begin, expected in layout.outside:
            file.seek(begin)
            # of a file that ends here, what is there has to be the same
            if size > layout.size or file.read(len(expected)) != expected[: max(0, size - begin)]:
                return False
        if size < layout.size:
            raise ValueError(f"the file is cut short: it has {size:,} of {layout.size:,} bytes")
        for tensor in layout.in_file_order:
            for _ in _finite_slabs(file, tensor):
                pass
    return True


def rewrite(path, tensors, layout):
    """Publish the file `path`, whose tensors lie as they say, anew in this layout.

    Returns the SHA-256. Raises ValueError where its numbers cannot be used.
    """
    check_shapes(tensors, layout.shapes)
    check_places(path, tensors)
    source = dict(zip(layout.tensors, tensors, strict=True))
    with open(path, "rb", buffering=0) as file, replacing(path) as written:
        return _write(written, layout, lambda tensor: _finite_slabs(file, source[tensor]))


def write_tensors(path, layout, arrays):
    """Publish `path` as a file of this layout with these numbers. Returns the SHA-256.

    arrays  in Keras's order and of the layout's shapes, as what `model.load` took from such a file;
            or what NumPy makes an array of: Keras's variables
    Raises NotFinite; then `path` stays.
    """
    source = dict(zip(layout.tensors, arrays, strict=True))

    def numbers_of(tensor):
        # one array at a time: the client holds the network already
        numbers = np.ascontiguousarray(source[tensor], "<f4")
        check_finite(numbers, tensor.layer)
        yield numbers

    with replacing(path) as written:
        return _write(written, layout, numbers_of)


def _write(path, layout, numbers_of):
    """Write a file of this layout from front to back; returns its SHA-256.

    numbers_of: numbers_of(tensor) gives float32 arrays that are the tensor, one behind the other.
    """
    digest = hashlib.sha256()
    tensors = iter(layout.in_file_order)
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


def fedavg(paths, num_examples, layout, target, trainable):
    """Federated averaging: w = sum(n_k w_k) / sum(n_k), published as `target`.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", algorithm 1. In float64, one slab of one tensor at a time, cast to float32 once.

    paths         files of the server's layout, in the order of their clients' names
    num_examples  n_k, the number of training examples of each
    layout        Layout of these files and of the result
    target        where the result goes; until then it is what the clients fetched
    trainable     of each tensor of the layout, whether it is trained (bool)

    Returns the SHA-256 of the result, and for `compare_updates` the scalar products of all pairs of
    updates (what was sent, less what was fetched) over the trainable tensors: float64 (n, n).
    """
    total_examples = sum(num_examples)
    products = np.zeros((len(paths), len(paths)))
    is_trainable = dict(zip(layout.tensors, trainable, strict=True))
    # One set of buffers for the whole merge: memory that is given back and taken again costs as
    # much time as the arithmetic.
    numbers = np.empty((len(paths), SLAB_ELEMENTS), "<f4")
    merged = np.empty(SLAB_ELEMENTS, "<f4")
    product = np.empty(SLAB_ELEMENTS, np.float64)
    total = np.empty(SLAB_ELEMENTS, np.float64)

    def averages(tensor):
        for first, count in _slabs(tensor.shape):
            slab = numbers[:, :count]
            for upload, row in zip(uploads, slab, strict=True):
                _read(upload, tensor, first, row)
            total[:count] = 0
            for n, row in zip(num_examples, slab, strict=True):
                product[:count] = row
                product[:count] *= n
                total[:count] += product[:count]
            total[:count] /= total_examples
            if is_trainable[tensor]:
                _read(fetched, tensor, first, merged[:count])
                _add_products(products, slab, merged[:count])
            merged[:count] = total[:count]
            yield merged[:count]

    with replacing(target) as written, ExitStack() as stack:
        fetched, *uploads = [
            stack.enter_context(open(path, "rb", buffering=0)) for path in (target, *paths)
        ]
        return _write(written, layout, averages), products


def _add_products(products, slab, fetched):
    """Add to (n, n) what these numbers (n, count) add to the products; the slab is used up."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a client that sends 1e38
        slab -= fetched
        for number, row in enumerate(slab):
            products[number, : number + 1] += slab[: number + 1] @ row
            products[: number + 1, number] = products[number, : number + 1]


def compare_updates(products, num_examples):
    """Whose update pulls where: [{"update_length", "update_cosine"}] of the clients.

    update_length  for its number of steps, relative to the median: 1 is as long as the others. The
                   length grows as the square root of the number of steps: with Adam, and measured
                   (12 to 200 images of one network: within 0.7 and 1.1). The server does not know
                   the steps; of clients that make as many passes over batches of one size, they go
                   by the number of examples.
    update_cosine  with the mean of the other clients' updates, each at unit length. The merged
                   update would not do, for it holds the client's own: with it, even a hospital
                   with exchanged labels has a positive one.

    A number is None where there is none: what is 0 has no direction.
    """
    lengths = np.nan_to_num(np.sqrt(np.diagonal(products)), nan=LONGEST, posinf=LONGEST)
    per_step = (lengths / np.sqrt(num_examples)).tolist()
    # of two the shorter, so that the longer one can stand out
    median = statistics.median_low([length for length in per_step if length] or [1.0])
    has_direction = (lengths > 0) & (lengths < LONGEST)
    cosines = np.zeros_like(products)
    there = np.ix_(has_direction, has_direction)
    cosines[there] = products[there] / np.outer(lengths, lengths)[there]
    # |sum of the others|^2 is the sum of all pairs, less those of this client
    with_all = cosines.sum(axis=1)
    of_others = cosines.sum() - 2 * with_all + 1
    return [
        {
            "update_length": length / median,
            "update_cosine": float((with_all[number] - 1) / math.sqrt(of_others[number]))
            if has_direction[number] and of_others[number] > LEAST_DIRECTION
            else None,
        }
        for number, length in enumerate(per_step)
    ]
