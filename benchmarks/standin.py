"""The real scripts without training and evaluation: everything but TensorFlow.

    python3 benchmarks/standin.py todoServer --listen localhost:0 ...     (BENCHMARK_WEIGHTS: the file to start from)
    python3 benchmarks/standin.py todoClient --name client001 ...

In place of `model` stands this module: "training" reads every tensor with h5py, adds a constant and writes the file.
BENCHMARK_BASE64=1 makes a client speak the seed's base64 form to this server.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np

from common.files import publish, temporary
from common.script import keep_heap_small
from federation import weights

ARCHS = {"drcnn": 128, "vgg16": 224}


def make_weights(path, megabytes):
    """A weight file in Keras's layout, of 32 tensors; the largest has 30 % of the bytes, as VGG16's has."""
    elements = int(megabytes * 1e6 / 4)
    largest = int(elements * 0.3) // 256
    sizes = [(largest, 256)] + [((elements - largest * 256) // 31,)] * 31
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [f"layer{number}".encode() for number in range(len(sizes))]
        for number, shape in enumerate(sizes):
            group = file.create_group(f"layer{number}")
            group.attrs["weight_names"] = [b"kernel"]
            group["kernel"] = rng.standard_normal(shape, np.float32)


def add_constant(path, target, constant=0.001):
    shutil.copyfile(path, target)
    with h5py.File(target, "r+") as file:
        for *_, dataset in weights.tensors(file):
            dataset[...] = dataset[()] + np.float32(constant)


def configure(seed, threads=None):
    pass


def default_threads():
    return 1


def build(arch, image_size, seed=0):
    return SimpleNamespace(name=arch, input_shape=(None, image_size, image_size, 3), weights=None)


def initialize(network, source):
    pass


def shapes(network):
    return weights.shapes_of(os.environ["BENCHMARK_WEIGHTS"])


def load(network, path):
    weights.check(path, shapes(network))
    network.path = path


def train(network, batches, round_number, epochs, report):
    return [
        {
            "round": round_number,
            "epoch": 1,
            "loss": 0.0,
            "accuracy": 0.0,
            "num_examples": 1,
            "seconds": 0.0,
        }
    ]


def save(network, path):
    written = temporary(path)
    if hasattr(network, "path"):
        add_constant(network.path, written)
    else:
        shutil.copyfile(os.environ["BENCHMARK_WEIGHTS"], written)
    publish(written, path)


def evaluate(network, images, labels):
    return dict.fromkeys(("loss", "accuracy", "auc", "sensitivity", "specificity"), 0.0)


def main():
    if sys.argv[1] == "todoServer":
        keep_heap_small()  # as the real one does
    sys.modules["model"] = sys.modules[__name__]
    script = importlib.import_module(sys.argv[1])
    if os.environ.get("BENCHMARK_BASE64") == "1":
        weights.blob_messages = weights.base64_messages
    sys.exit(script.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
