"""todoServer under Flower: the same network, schedule and evaluation; Flower averages and talks.

    flower-superlink --insecure --disable-runtime-dependency-installation    # in the project folder
    flwr run flower_app

It needs this project's folder as its working directory and in PYTHONPATH. Writes
flower/server_weight.h5 and flower/history.csv.
"""

import time
from pathlib import Path

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import data
import model
from common import files

FOLDER = Path("flower")
HISTORY_COLUMNS = ["round", "loss", "accuracy", "auc", "sensitivity", "specificity", "seconds"]

app = ServerApp()


@app.main()
def main(grid, context):
    settings = context.run_config
    image_size = settings["image-size"] or model.ARCHS[settings["arch"]].image_size
    validation = data.read_index("index/val_set.pkl")
    images = data.load_images(validation, image_size)
    labels = data.healthy(validation)
    model.configure(settings["seed"], settings["threads"])
    network = model.build(settings["arch"], image_size, settings["seed"])
    model.initialize(network, settings["weights"])
    FOLDER.mkdir(exist_ok=True)
    history = []
    opened = time.monotonic()

    def evaluate(round_number, arrays):
        """Called by Flower after each round, and with round 0 before the first."""
        nonlocal opened
        if round_number > 0:
            set_tensors(network, arrays)
            model.save(network, FOLDER / "server_weight.h5")
            scores = model.evaluate(network, images, labels)
            now = time.monotonic()
            history.append({"round": round_number, **scores, "seconds": now - opened})
            files.publish_rows(FOLDER / "history.csv", HISTORY_COLUMNS, history)
            opened = now
            return MetricRecord(scores)
        return None

    num_clients = settings["num-clients"]
    # every client takes part in every round, as in todoServer; it evaluates here, not there
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients
    )
    strategy.start(grid, tensors_of(network), settings["rounds"], evaluate_fn=evaluate)


def tensors_of(network):
    """The network's weights as Flower sends them, in the order of the weight file."""
    return ArrayRecord([variable.numpy() for variable in model.tensors(network)])


def set_tensors(network, arrays):
    for variable, array in zip(model.tensors(network), arrays.to_numpy_ndarrays(), strict=True):
        variable.assign(array)
