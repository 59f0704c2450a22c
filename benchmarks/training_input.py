"""What decoding, shuffling and augmenting cost a client's epoch; how many threads clients need.

    python3 prepare.py                       # makes the preprocessed/ and index/ that this needs
    pip install scipy                        # for the rotation of Keras's ImageDataGenerator
    python3 benchmarks/training_input.py

Three comparisons: an epoch of the real client's pipeline against the same network on tensors that
are already in memory; the pipeline alone against Keras's ImageDataGenerator as the thesis used it;
the epoch of three clients at once, by number of threads, and without oneDNN's kernels.
"""

import argparse
import contextlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import model
from common.script import new_parser

REPEATS = 5
IMAGE_SIZE = 128
BATCH = 16


def main(argv=None):
    parser = new_parser(__doc__)
    # this script starts itself as one of three clients at once
    parser.add_argument("--epoch-with-threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)  # where preprocessed/ and index/ lie
    if arguments.epoch_with_threads:
        run_one_of_three(arguments.epoch_with_threads)
        return
    if importlib.util.find_spec("scipy") is None:
        parser.error("Keras's ImageDataGenerator rotates with scipy: pip install scipy")
    model.configure(0)
    records = data.read_index("index/worker1.pkl")
    images = data.load_images(records, IMAGE_SIZE)
    labels = data.healthy(records)
    batches = data.TrainingBatches(images, labels, BATCH, 0, "client001")
    compare_epochs(batches, images, labels)
    compare_pipelines(batches, records)
    compare_threads()


def images_per_second(n, function):
    """The rate of function(), which handles n images."""
    started = time.monotonic()
    function()
    return n / (time.monotonic() - started)


def in_turn(n, one, other):
    """Medians over REPEATS pairs: the rates of both, and of one over the other pair by pair."""
    pairs = [(images_per_second(n, one), images_per_second(n, other)) for _ in range(REPEATS)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def compare_epochs(batches, images, labels):
    import tensorflow as tf

    network = model.build("drcnn", IMAGE_SIZE)
    ready = []
    for first in range(0, len(images), BATCH):
        pixels = tf.constant(images[first : first + BATCH], tf.float32)
        ready.append((pixels, tf.constant(labels[first : first + BATCH])))

    def from_pipeline():
        model.train(network, batches, 1, 1, lambda row: None)

    def from_memory():
        for pixels, healthy in ready:
            network.train_on_batch(pixels, healthy)

    from_pipeline()  # both compile on first use
    from_memory()
    pipeline, memory, ratio = in_turn(len(images), from_pipeline, from_memory)
    print(f"| an epoch of drcnn, {len(images)} images of 128 x 128 | images a second |")
    print("|---|---|")
    print(f"| a client, with augmentation | {pipeline:.0f} |")
    print(f"| tensors in memory | {memory:.0f} |")
    print(f"| ratio | {ratio:.2f} |\n")


def compare_pipelines(batches, records):
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    with tempfile.TemporaryDirectory() as folder:
        for record in records:  # the generator wants a folder a class
            link = Path(folder) / record["new_label"] / record["picture"]
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(ROOT / record["dir"])
        generator = ImageDataGenerator(
            rotation_range=360, horizontal_flip=True, vertical_flip=True, rescale=1 / 255
        )
        with contextlib.redirect_stdout(sys.stderr):  # "Found 300 images"
            thesis_batches = generator.flow_from_directory(
                folder, (IMAGE_SIZE, IMAGE_SIZE), batch_size=BATCH, class_mode="binary"
            )

        def ours():
            for _ in batches.start(1, 1).dataset:
                pass

        def thesis():
            for number in range(len(thesis_batches)):
                thesis_batches[number]

        ours()
        own, keras, ratio = in_turn(len(records), ours, thesis)
    print("| the input pipeline alone | images a second |\n|---|---|")
    print(f"| ours | {own:.0f} |\n| ImageDataGenerator | {keras:.0f} |\n| ratio | {ratio:.1f} |\n")


def compare_threads():
    print("| three clients at once, each with | images a second, together |\n|---|---|")
    without = {"TF_ENABLE_ONEDNN_OPTS": "0"}
    ways = {"1 thread": (1, {}), "2 threads": (2, {}), "1 thread, without oneDNN": (1, without)}
    rates = {name: [] for name in ways}
    for _ in range(3):
        for name, (threads, environment) in ways.items():
            rates[name].append(rate_of_three(threads, environment))
    for name, measured in rates.items():
        print(f"| {name} | {statistics.median(measured):.0f} |")


def rate_of_three(threads, environment):
    """Images a second of three clients together, each with these threads and variables."""
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, "--epoch-with-threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for _ in range(3)
    ]
    for client in clients:
        client.stdout.readline()  # it has warmed up
    started = time.monotonic()
    for client in clients:
        client.stdin.close()
    images = sum(int(client.stdout.read()) for client in clients)
    return images / (time.monotonic() - started)


def run_one_of_three(threads):
    """Warm up, wait until stdin ends, train three epochs, print the number of images seen."""
    model.configure(0, threads)
    records = data.read_index("index/worker1.pkl")
    images = data.load_images(records, IMAGE_SIZE)
    batches = data.TrainingBatches(images, data.healthy(records), BATCH, 0, "client001")
    network = model.build("drcnn", IMAGE_SIZE)
    model.train(network, batches, 1, 1, lambda row: None)
    print("warm", flush=True)
    sys.stdin.read()
    model.train(network, batches, 1, 3, lambda row: None)
    print(3 * len(records))


if __name__ == "__main__":
    main()
