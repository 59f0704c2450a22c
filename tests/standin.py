"""Weight files without Keras, and a stand-in for `model`: the real scripts run without TensorFlow.

Tests and benchmarks share it. STANDIN_WEIGHTS in the environment is the weight file that a run
begins with, and whose shapes the network has.
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from common.files import replacing
from common.log import say
from federation import weights

# --- weight files -------------------------------------------------------------------------------

SHAPES = [  # of the tiny weight file that most tests use
    ("conv1", (3, 3, 3, 2)),
    ("norm1", (2,)),
    ("healthy", (2, 1)),
    ("healthy", (1,)),
]


def shapes_of_size(megabytes):
    """Shapes of 32 tensors with so many bytes; the largest has 30 % of them, as VGG16's has."""
    elements = int(megabytes * 1e6 / 4)
    rows = int(elements * 0.3) // 256
    others = (elements - rows * 256) // 31
    return [("layer0", (rows, 256))] + [(f"layer{number}", (others,)) for number in range(1, 32)]


def random_tensors(seed, shapes=SHAPES):
    """float32 arrays of `shapes`, which follow from the seed."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _, shape in shapes]


def write_weights(path, tensors=0, shapes=SHAPES, root=""):
    """A weight file in Keras's layout; equal tensors are equal bytes. Returns the path.

    tensors  a list of arrays, or the seed of random ones
    root     "" is the layout of Keras 2's save_weights, "model_weights" that of model.save
    """
    if isinstance(tensors, int):
        tensors = random_tensors(tensors, shapes)
    layers = list(dict.fromkeys(name for name, _ in shapes))
    with h5py.File(path, "w") as file:
        base = file.require_group(root) if root else file
        base.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            own = [
                tensor for (name, _), tensor in zip(shapes, tensors, strict=True) if name == layer
            ]
            names = [f"{layer}/weight{number}" for number in range(len(own))]
            group = base.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, tensor in zip(names, own, strict=True):
                group.create_dataset(name, data=tensor)
    return Path(path)


def read_weights(path):
    """The tensors of a Keras weight file, in order: read here once more, without weights.py."""
    with h5py.File(path, "r") as file:
        base = file if "layer_names" in file.attrs else file["model_weights"]
        return [
            base[layer][weight][()]
            for layer in base.attrs["layer_names"]
            for weight in base[layer].attrs["weight_names"]
        ]


# --- in place of `model`: the same functions, without a network ----------------------------------

ARCHS = {
    name: SimpleNamespace(image_size=size, weights="none", freezes_base=lambda weights: False)
    for name, size in {"drcnn": 128, "vgg16": 224}.items()
}


def configure(seed, threads=None):
    pass


def default_threads():
    return 1


def build(arch, image_size, seed=0):
    return SimpleNamespace(name=arch, input_shape=(None, image_size, image_size, 3), path=None)


def initialize(network, source):
    pass


def shapes(network):
    """Those of STANDIN_WEIGHTS; where nothing is said, whatever was loaded last is right.

    A server merges before it has loaded anything.
    """
    path = network.path or "server/server_weight.h5"
    return weights.Layout(os.environ.get("STANDIN_WEIGHTS", path)).shapes


def trainable(network):
    return [True for _ in shapes(network)]


def load(network, path, tensors=None):
    network.path = path
    weights.check_shapes(tensors or weights.Layout(path).tensors, shapes(network))


def default_epochs(network):
    return 1


def train(network, batches, round_number, epochs, report, progress=None, first_rate=None):
    say("standin", "training now")
    measured = {"loss": 0.0, "accuracy": 0.0, "num_examples": 1, "seconds": 0.0}
    return [{"round": round_number, "epoch": 1, **measured}]


def save(network, path):
    """Round 1's weights; a client saves with `weights.write_tensors`."""
    with replacing(path) as written:
        shutil.copyfile(os.environ["STANDIN_WEIGHTS"], written)


def tensors(network):
    """Training adds a constant to every number."""
    return [tensor + np.float32(0.001) for tensor in read_weights(network.path)]


def metrics():
    """An evaluation of nothing."""
    return {"loss": 0.5, "accuracy": 0.75, "auc": 0.875, "sensitivity": 1.0, "specificity": 0.5}


def predict(network, images):
    """P(healthy) of each image: as many numbers, which say nothing."""
    return np.linspace(0.25, 0.75, len(images), dtype=np.float32)
