"""The index of a data set, and batches of images from it.

An index (`index/worker1.pkl`) is a pickle of a dict of lists of one length. The n-th entries of the
lists belong to one image and make up a *record*; n is the position of the record.
  picture    "000123.png"
  label      grade 0..4 (0 = no DR ... 4 = proliferative DR)
  dir        "preprocessed/3f9a.../000123.png", the path of the file from the project root
  new_label  'True' = healthy (grade 0), 'False' = DR. Keras sorts the names of the classes,
             so the network's output is P(healthy).
  patient    "p0017", the same for all images of one patient, and never what the source calls it.
             Without this column nobody knows: each image counts as its own patient.
A pickle can run code when it is read. So an index is read with an unpickler that admits plain
containers, strings and numbers, and nothing else. No layer and no flag is known in here: what a
network makes of a batch is model.py's.
"""

import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from common import log
from common.files import move_aside, replacing, sha256_of, temporary

INDEX_COLUMNS = {"picture": str, "label": int, "dir": str, "new_label": str}
OPTIONAL_COLUMNS = {"patient": str}
NUM_GRADES = 5
MAX_INDEX_BYTES = 64 << 20  # enough for half a million images
MAX_PICKLE_TUPLES = 1000  # an index needs none; a hostile pickle nests them
# Decoded images that take more than this lie in a file, and the operating system keeps in memory
# what fits.
MEMORY_BYTES = 4 << 30
# Pixels that go through a network at once where nothing is trained: what the layers of a lite0 make
# of so many takes half a gigabyte. At most MOST_AT_ONCE images.
PIXELS_AT_ONCE = 32 * 224 * 224
MOST_AT_ONCE = 32
MAX_NPY_HEADER = 1000  # bytes before the numbers in a member of a .npz file


class NotPlain(pickle.UnpicklingError):
    """The pickle holds something else than plain containers, strings and numbers."""


class PlainUnpickler(pickle.Unpickler):
    """Admits what the pickle format itself can say: dict, list, tuple, set, str, int, float ...

    Everything else in a pickle is a class or a function that is looked up by its name: refused
    here; or an object outside the pickle: Python's own unpickler knows none.
    """

    def find_class(self, module, name):
        raise NotPlain(
            f"it holds {f'{module}.{name}'[:200]!r}, and only plain lists, strings and numbers "
            "are admitted"
        )


def load_plain(content):
    """The plain value that a pickle (bytes) holds.

    Raises NotPlain, or whatever a damaged pickle raises.
    """
    refuse_costly(content)
    return PlainUnpickler(io.BytesIO(content)).load()


def refuse_costly(content):
    """Raise NotPlain if a pickle (bytes) is made to cost memory or to crash Python."""
    num_tuples = 0
    for position, (operation, argument, _) in enumerate(pickletools.genops(content)):
        # A deeply nested tuple as a key of a dict crashes Python when it is hashed.
        num_tuples += operation.name.startswith("TUPLE")
        # A PUT stores a value under a number in the unpickler's memo, and the memo is as long as
        # its largest number. An honest pickle counts up from 0, so the number is never above the
        # position of the operation itself.
        costly_put = operation.name.endswith("PUT") and argument > position
        # LONG holds a number of any length; one of many digits cannot even be printed.
        long_number = operation.name in ("LONG", "LONG4")
        if num_tuples > MAX_PICKLE_TUPLES or costly_put or long_number:
            raise NotPlain(f"it is made to cost memory or a crash (operation {operation.name})")


def worker_index(client, index_dir="index"):
    """The index that `client` trains on by default: client007 has index/worker7.pkl.

    None for a name that ends in no number.
    """
    number = re.search(r"\d+$", client)
    return Path(index_dir) / f"worker{int(number[0])}.pkl" if number else None


def index_columns(names):
    """The columns of an index: all of INDEX_COLUMNS, and those of OPTIONAL_COLUMNS in `names`."""
    return [*INDEX_COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in names)]


def write_index(path, records):
    """Write `records`, dicts with the keys of INDEX_COLUMNS and perhaps "patient", as an index."""
    names = index_columns(records[0])
    columns = {name: [record[name] for record in records] for name in names}
    with replacing(path) as written:
        written.write_bytes(pickle.dumps(columns, protocol=4))


def read_index(path):
    """Read an index into a list of records, dicts with the keys of INDEX_COLUMNS.

    They have the key "patient", too, if the index has that column.
    Raises ValueError, one sentence with the path, on anything that is not a well-formed index.
    """
    columns = read_columns(path)
    check_columns(path, columns)
    names = index_columns(columns)
    rows = zip(*(columns[name] for name in names), strict=True)
    records = [dict(zip(names, row, strict=True)) for row in rows]
    for record in records:
        check_record(path, record)
    return records


def patients(records):
    """The patient of each record, a list of str; the image itself where the index does not tell."""
    return [record.get("patient", record["dir"]) for record in records]


def knows_patients(records):
    """Whether the index of these records tells the patients."""
    return all("patient" in record for record in records)


def read_columns(path):
    """What the pickle of an index holds, whatever it is.

    Raises ValueError if it cannot or must not be read.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise NotPlain("it is no file")  # of a pipe, the end would never come
        with open(path, "rb") as file:
            content = file.read(MAX_INDEX_BYTES + 1)
        if len(content) > MAX_INDEX_BYTES:
            raise NotPlain(f"it is larger than {MAX_INDEX_BYTES:,} bytes")
        return load_plain(content)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: make it with `python3 prepare.py`") from None
    except NotPlain as error:
        raise ValueError(
            f"{path} is refused: {error}; make it anew with `python3 prepare.py`, or import an "
            "index that you trust with `python3 prepare.py --index-from`"
        ) from None
    except Exception as error:
        # A damaged or hostile pickle can raise nearly anything, and all of it means "not an index".
        reason = f"{path} is not a readable pickle ({type(error).__name__})"
        raise ValueError(f"{reason}: make it with `python3 prepare.py`") from None


def check_columns(path, columns):
    """Raise ValueError unless `columns` is a dict of lists of one length and the right types."""
    expected = ", ".join(INDEX_COLUMNS)
    if not isinstance(columns, dict):
        raise ValueError(
            f"{path} holds a {type(columns).__name__}, expected a dict of the columns {expected}"
        )
    kinds = {**INDEX_COLUMNS, **OPTIONAL_COLUMNS}
    for name in index_columns(columns):
        kind = kinds[name]
        if name not in columns:
            raise ValueError(f"{path} has no column {name!r}, expected {expected}")
        values = columns[name]
        # type(), not isinstance(): True is an int for isinstance().
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise ValueError(f"{path}: column {name!r} must be a list of {kind.__name__}")
    lengths = {name: len(columns[name]) for name in index_columns(columns)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{path}: the columns have different lengths: {lengths}")
    if lengths["dir"] == 0:
        raise ValueError(f"{path} is empty: an index needs at least one image")


def check_record(path, record):
    """Raise ValueError if a record of the index `path` leaves the project or contradicts itself."""
    picture = PurePosixPath(record["dir"])
    if picture.is_absolute() or ".." in picture.parts or "\0" in record["dir"]:
        raise ValueError(
            f"{path}: 'dir' {record['dir'][:200]!r} leaves the project folder: expected a path "
            "below it"
        )
    if not 0 <= record["label"] < NUM_GRADES:
        raise ValueError(
            f"{path}: label {record['label']} of {record['dir']!r} is no grade, expected "
            f"0..{NUM_GRADES - 1}"
        )
    if record["new_label"] != str(record["label"] == 0):
        raise ValueError(
            f"{path}: new_label {record['new_label'][:20]!r} of {record['dir']!r} contradicts its "
            f"grade {record['label']}: 'True' is healthy (grade 0), 'False' is DR"
        )
    if record.get("patient") == "":  # all whom nobody knows would count as one
        raise ValueError(
            f"{path}: {record['dir']!r} has an empty patient: expected a name, and "
            "one of its own where nobody knows"
        )


def healthy(records):
    """float32 (n,): 1 = healthy, 0 = DR; what the network learns to say."""
    return np.array([record["new_label"] == "True" for record in records], np.float32)


def images_for(records, image_size, folder, on_features, name="features"):
    """What a network is trained on or scored with: the images of `records`, or their Features.

    on_features  whether its base is frozen, and sees the images as they are
    Features are kept in folder/NAME.npz. Of images, what does not fit into memory lies in a file in
    `folder`, too. Raises ValueError naming an image that is missing, OSError.
    """
    if on_features:
        return Features(records, image_size, Path(folder) / f"{name}.npz")
    return load_images(records, image_size, temporary(Path(folder) / "images"))


def load_images(records, image_size, spill=None):
    """Decode every image of `records` once: uint8 (n, image_size, image_size, 3), RGB.

    spill: path of a file that holds what does not fit into memory; None: all in memory.
    Raises ValueError naming a missing or unreadable image, or where there is no room for them.
    """
    images = room_for((len(records), image_size, image_size, 3), spill)

    def decode(position):
        images[position] = load_image(records[position]["dir"], image_size)

    # Threads are enough: Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(records))):
            pass  # taking the result raises what decode raised
    return images


def room_for(shape, spill=None):
    """An array for images: uint8 of this shape, in memory or in the file `spill`.

    Raises ValueError where there is no room for it.
    """
    needed = math.prod(shape)
    in_memory = min(MEMORY_BYTES, available_memory())
    if spill is None or needed <= in_memory:
        return np.empty(shape, np.uint8)
    try:
        with open(spill, "w+b") as file:
            # All of it now: where a mapped file has no room later, the process is killed.
            os.posix_fallocate(file.fileno(), 0, needed)
            # The mapping keeps the content of the file alive without a name. So nothing of it
            # stays behind, however this process ends.
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise ValueError(
            f"{shape[0]} images of {shape[1]} x {shape[2]} pixels take {needed / 1e9:.1f} GB: more "
            f"than fits into memory ({in_memory / 1e9:.1f} GB), and than the disk of "
            f"{spill.parent} has ({error.strerror}): expected smaller images, or more room"
        ) from None
    finally:
        spill.unlink(missing_ok=True)


def available_memory():
    """Bytes that new processes may take, as Linux estimates it; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else math.inf


def load_image(path, image_size):
    """One image, uint8 (image_size, image_size, 3). Raises ValueError if it cannot be read."""
    from preparation.photos import open_image  # here: the index alone needs no Pillow

    return np.asarray(open_image(path).resize((image_size, image_size)))


class Pictures:
    """The images of an index, decoded each time when they are asked for.

    pictures[8:16] is uint8 (8, size, size, 3). For who looks at each image once: all of them need
    not be in memory at the same time.
    """

    def __init__(self, records, image_size):
        self.records = records
        self.shape = (len(records), image_size, image_size, 3)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, chosen):
        return load_images(self.records[chosen], self.shape[1])

    def digest(self):
        """Of all files, in their order. Raises ValueError where one is missing, OSError."""
        digest = hashlib.sha256()
        for record in self.records:
            sha256 = sha256_of(record["dir"])
            if not sha256:
                raise ValueError(f"{record['dir']} is missing")
            digest.update(sha256.encode())
        return digest.hexdigest()


class Features:
    """What the base of a network makes of pictures, in place of their images: float32 (n, ...).

    As long as base and pictures are the same, it is the same: so `model.on_features` computes it
    once, and it is kept in a file (.npz) for the next start. Of one network.
    """

    def __init__(self, records, image_size, path):
        self.pictures = Pictures(records, image_size)
        self.pictures_digest = self.pictures.digest()
        self.path = path
        self.array = None  # once they are computed or read
        self.made_from = None  # digests of the base and the pictures that made the array
        self.head = None  # keras.Model, kept here by model.on_features: the layers after the base

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, chosen):
        return self.array[chosen]

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def update(self, base_digest, shape, compute):
        """Make the array what this base gives: it may be that already, or in the file.

        base_digest  what tells this base from others, a str
        shape        of an image's features
        compute      compute(pictures) -> float32 (n, *shape)
        """
        made_from = f"{base_digest} {self.pictures_digest}"
        if self.made_from == made_from:
            return
        self.array = self._read(made_from, (len(self), *shape))
        if self.array is None:
            self.array = compute(self.pictures)
            with replacing(self.path) as written:
                np.savez(written, made_from=made_from, features=self.array)
        self.made_from = made_from

    def _read(self, made_from, shape):
        """The array in the file; None where there is no file, or one of another base or pictures.

        What is no file of features is moved aside.
        """
        if not self.path.exists():
            return None
        try:
            if not (self.path.is_file() and zipfile.is_zipfile(self.path)):
                raise ValueError("it is no .npz file")
            with np.load(self.path, allow_pickle=False) as file:
                # Before they are unpacked: a small file can hold zeros without end.
                sizes = {member.filename: member.file_size for member in file.zip.infolist()}
                if sizes["made_from.npy"] > MAX_NPY_HEADER:
                    raise ValueError("it does not say what made it")
                if str(file["made_from"]) != made_from:
                    return None
                if sizes["features.npy"] > 4 * math.prod(shape) + MAX_NPY_HEADER:
                    raise ValueError("it is too large")
                array = file["features"]
            if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"expected finite numbers, float32 {shape}")
            return array
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            aside = move_aside(self.path.parent, [self.path])
            reason = f"{type(error).__name__}: {log.plain(error)}"
            log.say("features", f"{self.path} is no file of features ({reason}): moved to {aside}")
            return None


class TrainingBatches:
    """Endless epochs of augmented batches from images in memory, or of features.

    The order and the augmentation of an epoch follow from (seed, client, round, epoch) alone:
    NumPy draws them and TensorFlow only applies them. So neither the number of threads nor an
    earlier crash can change them. One tf.data pipeline serves all rounds of a client.
    """

    def __init__(self, images, labels, batch_size, seed, client, augment=True):
        """images: uint8 (n, size, size, 3), or Features, which are passed on as they are.

        labels: float32 (n,). client: its name.
        """
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.client_number = zlib.crc32(client.encode())
        self.augment = augment
        self.round_number = 0
        self.epoch = 0

    def start(self, round_number, epoch):
        """Chooses which epoch the next pass over `dataset` is."""
        self.round_number = round_number
        self.epoch = epoch
        return self

    def _epoch(self):
        """Yields (images, labels, transforms) for each batch of the chosen epoch."""
        rng = np.random.default_rng([self.seed, self.client_number, self.round_number, self.epoch])
        order = rng.permutation(len(self.images))
        transforms = random_transforms(rng, len(order), self.images.shape[1])
        for start in range(0, len(order), self.batch_size):
            end = start + self.batch_size  # the last batch may be smaller; it counts too
            chosen = order[start:end]
            yield self.images[chosen], self.labels[chosen], transforms[start:end]

    @property
    def steps(self):
        """Batches in an epoch, for Keras's steps_per_epoch.

        It is given there because fit begins one epoch too many of a data set that knows its length.
        """
        return math.ceil(len(self.images) / self.batch_size)

    @cached_property
    def dataset(self):
        """tf.data.Dataset of (images (b, size, size, 3), 0 to 255, and float32 (b,)).

        The images are float32 where they were augmented, as they are otherwise.
        """
        import tensorflow as tf

        raw = tf.data.Dataset.from_generator(
            self._epoch,
            output_signature=(
                tf.TensorSpec((None, *self.images.shape[1:]), self.images.dtype),
                tf.TensorSpec((None,), tf.float32),
                tf.TensorSpec((None, 2, 3), tf.float32),
            ),
        )
        # XLA makes one loop of it: six times faster than operation by operation
        compiled_resample = tf.function(resample, jit_compile=True)

        def prepare(images, labels, transforms):
            if self.augment:
                images = compiled_resample(images, transforms)
            return images, labels

        batches = raw.map(prepare, num_parallel_calls=2, deterministic=True).prefetch(2)
        options = tf.data.Options()
        # Autotune's thread sleeps for seconds, and the end of every epoch would wait for it.
        options.autotune.enabled = False
        return batches.with_options(options)


def random_transforms(rng, n, image_size):
    """The thesis's augmentation, n times: a rotation over 360° and both flips about the centre.

    Returns float32 (n, 2, 3): output pixel (x, y) is taken from input transform @ (x, y, 1).
    """
    angle = rng.uniform(0, 2 * np.pi, n)
    flips = rng.choice([-1.0, 1.0], (2, n))  # of x, of y
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = flips[..., None] * rotation.swapaxes(1, 2)  # (2, n, 2): row, image, column
    centre = (image_size - 1) / 2
    shift = centre * (1 - linear.sum(-1, keepdims=True))  # so that the centre stays where it is
    return np.concatenate([linear, shift], -1).swapaxes(0, 1).astype(np.float32)


def resample(images, transforms):
    """Images (b, size, size, 3) through transforms (b, 2, 3): float32, the same shape.

    Bilinear, the edge repeated outside: what tf.raw_ops.ImageProjectiveTransformV3 does. That works
    the geometry out anew for every channel; this, compiled, takes a tenth of its time.
    """
    import tensorflow as tf

    size = images.shape[1]
    pixel_range = tf.range(size, dtype=tf.float32)
    x, y = tf.meshgrid(pixel_range, pixel_range)  # (size, size) each

    def source_of(axis):
        """Of each output pixel's source: the pixel before (int32), and how far behind it."""
        a, b, c = tf.unstack(transforms[:, axis, :, None, None], axis=1)  # (b, 1, 1) each
        source = tf.clip_by_value(a * x + b * y + c, 0, size - 1)  # (b, size, size)
        before = tf.minimum(tf.floor(source), size - 2)
        return tf.cast(before, tf.int32), source - before

    column, right = source_of(0)
    row, down = source_of(1)
    right = right[..., None]
    down = down[..., None]
    pixels = tf.reshape(images, (-1, images.shape[3]))
    number = tf.range(tf.shape(images)[0])[:, None, None]
    upper_left = (number * size + row) * size + column  # position in `pixels`

    def neighbour(distance):
        return tf.cast(tf.gather(pixels, upper_left + distance), tf.float32)

    top = neighbour(0) * (1 - right) + neighbour(1) * right
    bottom = neighbour(size) * (1 - right) + neighbour(size + 1) * right
    return top * (1 - down) + bottom * down


def evaluation_batches(images):
    """The images as they are, in order, without augmentation, as many at a time as memory holds.

    images: (n, size, size, 3), or features (n, ...).
    """
    pixels = math.prod(images.shape[1:3])
    batch_size = min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // pixels))
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]
