"""What decoding, shuffling and augmenting cost a client's epoch, and how many threads three clients should have.

    python3 benchmarks/training_input.py          (needs preprocessed/ and index/: python3 prepare.py)

An epoch of the real client's pipeline against the same network on tensors that are already in memory; the pipeline alone
against Keras's ImageDataGenerator as the thesis used it; and the epoch of three clients at once, by number of threads.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import data
import model

REPEATS = 5


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epoch-with-threads", type=int, help=argparse.SUPPRESS
    )  # one of three clients at once
    arguments = parser.parse_args(argv)
    if arguments.epoch_with_threads:
        return one_of_three(arguments.epoch_with_threads)
    model.configure(0)
    records = data.read_index("index/worker1.pkl")
    images, labels = data.load_images(records, 128), data.healthy(records)
    batches = data.TrainingBatches(images, labels, 16, 0, "client001")
    epochs(batches, images, labels)
    pipelines(batches, records)
    threads()


def rate(n, function):
    """Images a second of function(), which handles n of them."""
    started = time.monotonic()
    function()
    return n / (time.monotonic() - started)


def paired(n, one, other):
    """Medians of REPEATS runs in turn, and of the ratio pair by pair."""
    pairs = [(rate(n, one), rate(n, other)) for _ in range(REPEATS)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def epochs(batches, images, labels):
    import tensorflow as tf

    network = model.build("drcnn", 128)
    # cut beforehand
    cut = [
        (
            tf.constant(images[start : start + 16] / 255.0, tf.float32),
            tf.constant(labels[start : start + 16]),
        )
        for start in range(0, len(images), 16)
    ]

    def memory():
        for pixels, healthy in cut:
            network.train_on_batch(pixels, healthy)

    model.train(network, batches, 1, 1, lambda row: None)
    memory()
    client, tensors, ratio = paired(
        len(images), lambda: model.train(network, batches, 1, 1, lambda row: None), memory
    )
    print("| an epoch of drcnn, 300 images of 128 x 128 | images a second |\n|---|---|")
    print(
        f"| a client, with augmentation | {client:.0f} |\n| tensors in memory | {tensors:.0f} |\n| ratio | {ratio:.2f} |\n"
    )


def pipelines(batches, records):
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    with tempfile.TemporaryDirectory() as folder:
        for record in records:
            place = Path(folder) / record["new_label"] / record["picture"]
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(ROOT / record["dir"])
        generator = ImageDataGenerator(
            rotation_range=360, horizontal_flip=True, vertical_flip=True, rescale=1 / 255
        )
        with contextlib.redirect_stdout(sys.stderr):  # "Found 300 images"
            flow = generator.flow_from_directory(
                folder, target_size=(128, 128), batch_size=16, class_mode="binary"
            )

        def ours():
            for _ in batches.start(1, 1).dataset:
                pass

        def thesis():
            for place in range(len(flow)):
                flow[place]

        ours()
        own, keras, ratio = paired(len(records), ours, thesis)
    print("| the input pipeline alone | images a second |\n|---|---|")
    print(f"| ours | {own:.0f} |\n| ImageDataGenerator | {keras:.0f} |\n| ratio | {ratio:.1f} |\n")


def threads():
    print("| threads of each of three clients at once | images a second, together |\n|---|---|")
    rates = {number: [] for number in sorted({1, 2, model.default_threads()})}
    for _ in range(3):
        for number, measured in rates.items():
            measured.append(three_at_once(number))
    for number, measured in rates.items():
        print(f"| {number} | {statistics.median(measured):.0f} |")


def three_at_once(number):
    """Images a second of three clients together, each with so many threads."""
    command = [sys.executable, __file__, "--epoch-with-threads", str(number)]
    clients = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for client in clients:
        client.stdout.readline()  # warm
    started = time.monotonic()
    for client in clients:
        client.stdin.close()
    images = sum(int(client.stdout.read()) for client in clients)
    return images / (time.monotonic() - started)


def one_of_three(number):
    model.configure(0, number)
    records = data.read_index("index/worker1.pkl")
    batches = data.TrainingBatches(
        data.load_images(records, 128), data.healthy(records), 16, 0, "client001"
    )
    network = model.build("drcnn", 128)
    model.train(network, batches, 1, 1, lambda row: None)
    print("warm", flush=True)
    sys.stdin.read()
    model.train(network, batches, 1, 3, lambda row: None)
    print(3 * len(records))


if __name__ == "__main__":
    main()
