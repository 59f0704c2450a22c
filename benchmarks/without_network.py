"""The real scripts with tests/standin.py in place of `model`, for the benchmarks.

    python3 benchmarks/without_network.py todoServer --listen localhost:0 --image-size 16 ...
    python3 benchmarks/without_network.py todoClient --name client001 ...

Settings come from the environment:

STANDIN_WEIGHTS   the weight file that a run begins with, and whose shapes the network has
STANDIN_GATE      1: "training" waits for a line on stdin
STANDIN_BASE64    1: a client speaks the thesis demo's base64 form, to this project's server
"""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common.script import end_script, start_script

start_script(never_waits=True)

import numpy as np
import standin

from federation import weights


def main():
    trains = standin.train

    def train(*arguments, **options):
        rows = trains(*arguments, **options)
        sys.stdin.readline()
        return rows

    if os.environ.get("STANDIN_GATE") == "1":
        standin.train = train
    if os.environ.get("STANDIN_BASE64") == "1":
        weights.blob_messages = weights.base64_messages
    standin.tensors = lambda network: [
        Moved(network.path, tensor) for tensor in weights.Layout(network.path).tensors
    ]
    sys.modules["model"] = standin
    return importlib.import_module(sys.argv[1]).main(sys.argv[2:])


class Moved:
    """A tensor of a file with a constant added, which NumPy reads when it is needed.

    A list of arrays would be a second copy of the model, beside the one that a network is.
    """

    def __init__(self, path, tensor):
        self.path = path
        self.begin = tensor.begin
        self.shape = tensor.shape

    def __array__(self, dtype=None, copy=None):
        numbers = np.fromfile(self.path, "<f4", int(np.prod(self.shape)), offset=self.begin)
        numbers += np.float32(0.001)
        return numbers.reshape(self.shape)


if __name__ == "__main__":
    end_script(main())
