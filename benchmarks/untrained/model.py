"""In place of the project's model.py in benchmarks/peers.py, for Flower: nothing is trained.

The "network" is so many float32 numbers (UNTRAINED_MEGABYTES); "training" adds a constant to each.
It says that it has arrived with a file, and begins when another one is there, so that the benchmark
can run a round of this and a round of that in turn.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import standin

from common import files

ARCHS = {
    "drcnn": SimpleNamespace(image_size=128, weights="none", freezes_base=lambda weights: False)
}
LOOK_EVERY_S = 0.005


class Variable:
    """What Flower's app uses of a Keras variable."""

    def __init__(self, shape):
        self.values = np.zeros(shape, np.float32)

    def numpy(self):
        return self.values

    def assign(self, values):
        self.values = values


def configure(seed, threads=None):
    pass


def initialize(network, source):
    pass


def build(arch, image_size, seed=0):
    shapes = standin.shapes_of_size(float(os.environ["UNTRAINED_MEGABYTES"]))
    return SimpleNamespace(shapes=shapes, variables=[Variable(shape) for _, shape in shapes])


def tensors(network):
    return network.variables


def default_epochs(network):
    return 1


def train(network, batches, round_number, epochs):
    Path(f"arrived-{round_number}-{os.getpid()}").touch()
    while not Path(f"go-{round_number}").exists():
        time.sleep(LOOK_EVERY_S)
    for variable in network.variables:
        variable.assign(variable.numpy() + np.float32(0.001))
    return [{"loss": 0.0}]


def predict(network, images):
    return np.full(len(images), 0.5)


def load(network, path):
    """Nothing: the numbers in the file are those of the network, of the first one too."""


def save(network, path):
    with files.replacing(path) as written:
        values = [variable.numpy() for variable in network.variables]
        standin.write_weights(written, values, network.shapes)
