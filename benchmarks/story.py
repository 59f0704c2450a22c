"""What federation brings on the synthetic hospitals: federated, central, and each hospital alone.

    python3 benchmarks/story.py            # seeds 0 to 4: half an hour on two cores
    python3 benchmarks/story.py --seeds 0

For each seed prepare.py draws three hospitals that differ. All models begin with the same weights
and train for the same number of passes over their images: the project's own training and FedAvg,
in one process, without a network. All are measured on the same patients, of all three hospitals.
The AUC is of all of them. The other numbers are for any DR, at the threshold that half of the
validation patients choose, on the other half. The last table is what is asked of the demo.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import model
from common.script import at_least, new_parser
from federation import weights
from reporting import metrics

CLIENTS = ("client001", "client002", "client003")
IMAGE_SIZE = 128
COLUMNS = ("auc", "accuracy", "sensitivity", "specificity", "calibration")


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2, 3, 4], help="(0 to 4)")
    add("--rounds", type=at_least(1), default=10, help="(10)")
    add("--epochs", type=at_least(1), default=2, help="passes over the images in a round (2)")
    add("--batch-size", type=at_least(1), default=16, help="(16)")
    add("--threads", type=at_least(0), default=0, help="of TensorFlow (0: all cores)")
    add(
        "prepare_flags",
        nargs="*",
        metavar="-- FLAGS OF PREPARE.PY",
        help="for instance: -- --num-train 900",
    )
    arguments = parser.parse_args(argv)
    model.configure(0, arguments.threads)
    here = Path.cwd()
    stories = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # the paths in an index begin where prepare.py ran
            stories.append(tell_story(seed, arguments))
            os.chdir(here)
    print(f"\n{f'of {len(stories)} seeds':60}  found  asked")
    for name, found, asked in figures(stories):
        print(f"{name:60}  {found:.3f}  {asked}")


class Story(NamedTuple):
    """What was measured with one seed: dicts with COLUMNS."""

    rounds: list  # of the federation, in order
    central: dict
    alone: list  # of each hospital


def figures(stories):
    """[(name, number, what is asked of it)] of a list of Story."""
    federated = [story.rounds[-1] for story in stories]
    aucs = np.array([measured["auc"] for measured in federated])
    central = np.array([story.central["auc"] for story in stories])
    alone = [np.mean([measured["auc"] for measured in story.alone]) for story in stories]
    falls = [
        before["auc"] - after["auc"]
        for story in stories
        for before, after in itertools.pairwise(story.rounds[3:])
    ]
    accuracy = np.mean([measured["accuracy"] for measured in federated])
    calibration = np.mean([measured["calibration"] for measured in federated])
    return [
        ("AUC below that of central, mean", np.mean(central - aucs), "at most 0.010"),
        ("AUC, lowest", aucs.min(), "at least 0.975"),
        ("AUC, largest fall in a round after the fourth", max(falls, default=0), "at most 0.015"),
        (
            "AUC above the mean of the hospitals alone, mean",
            np.mean(aucs - alone),
            "at least 0.050",
        ),
        ("accuracy at the chosen threshold, mean", accuracy, "at least 0.940"),
        ("expected calibration error, mean", calibration, "at most 0.050"),
    ]


def tell_story(seed, arguments):
    """Draw, train and measure with one seed. Returns the Story."""
    prepare = [sys.executable, str(ROOT / "prepare.py"), "--seed", str(seed)]
    prepare += ["--image-size", str(IMAGE_SIZE), *arguments.prepare_flags]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    val = data.read_index("index/val_set.pkl")
    val_images = data.load_images(val, IMAGE_SIZE)
    batches = {}
    for client in CLIENTS:
        batches[client] = batches_of(data.worker_index(client), client, seed, arguments)
    batches["central"] = batches_of("index/train_set.pkl", "central", seed, arguments)
    network = model.build("drcnn", IMAGE_SIZE, seed)
    model.save(network, "begin.h5")

    def measure(title):
        measured = measure_network(network, val_images, val)
        numbers = "  ".join(f"{measured[name]:11.3f}" for name in COLUMNS)
        print(f"{title:22}  {numbers}", flush=True)
        return measured

    print(f"\n{f'seed {seed}':22}  " + "  ".join(f"{name:>11}" for name in COLUMNS))
    rounds = []
    train_federated(network, batches, arguments, lambda title: rounds.append(measure(title)))
    train_alone(network, batches["central"], arguments)
    central = measure("central")
    alone = []
    for client in CLIENTS:
        train_alone(network, batches[client], arguments)
        alone.append(measure(f"{client} alone"))
    return Story(rounds, central, alone)


def batches_of(index, client, seed, arguments):
    records = data.read_index(index)
    images = data.load_images(records, IMAGE_SIZE)
    labels = data.healthy(records)
    return data.TrainingBatches(images, labels, arguments.batch_size, seed, client)


def train_federated(network, batches, arguments, report_round):
    """FedAvg from begin.h5; afterwards the network has the merged weights of the last round."""
    model.load(network, "begin.h5")
    model.save(network, "merged.h5")
    uploads = [f"{client}.h5" for client in CLIENTS]
    num_examples = [len(batches[client].images) for client in CLIENTS]
    for round_number in range(1, arguments.rounds + 1):
        for client, upload in zip(CLIENTS, uploads, strict=True):
            model.load(network, "merged.h5")
            model.train(network, batches[client], round_number, arguments.epochs, ignore)
            model.save(network, upload)
        layout = weights.Layout("merged.h5")
        weights.fedavg(uploads, num_examples, layout, "merged.h5", model.trainable(network))
        model.load(network, "merged.h5")
        report_round(f"federated, round {round_number}")


def train_alone(network, own_batches, arguments):
    """As many passes, in one place, from begin.h5."""
    model.load(network, "begin.h5")
    for round_number in range(1, arguments.rounds + 1):
        model.train(network, own_batches, round_number, arguments.epochs, ignore)


def ignore(row):
    """The history row of an epoch: the story is told by validation."""


def measure_network(network, images, records):
    """{name: number} of COLUMNS: the AUC of all patients, the rest of those who do not choose."""
    p_healthy = model.predict(network, images)
    any_dr = metrics.assess(p_healthy, records)["tasks"][metrics.LEARNT]
    # nan of None: of a model without a threshold, as in a first round
    at_threshold = {name: np.float64(any_dr["measured"][name][0]) for name in COLUMNS[1:4]}
    return {
        "auc": metrics.auc(1 - p_healthy, data.healthy(records) == 0),
        **at_threshold,
        "calibration": any_dr["calibration_error"],
    }


if __name__ == "__main__":
    main()
