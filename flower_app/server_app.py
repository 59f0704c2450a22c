"""todoServer under Flower: the same network, schedule and evaluation; Flower averages and talks.

README.md has the commands. It needs this project's folder as its working directory and in
PYTHONPATH. Writes flower/server_weight.h5 with its model card and flower/history.csv.
"""

import time
from pathlib import Path
from types import SimpleNamespace

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import data
import model
from common import files
from federation.rounds import HISTORY_COLUMNS
from reporting import card as cards
from reporting import metrics

FOLDER = Path("flower")
VAL_PATH = Path("index/val_set.pkl")

app = ServerApp()


@app.main()
def main(grid, context):
    settings = context.run_config
    arch = model.ARCHS[settings["arch"]]
    # what `cards.make` takes from a server's state
    run = SimpleNamespace(
        arch=settings["arch"],
        image_size=settings["image-size"] or arch.image_size,
        run=f"{context.run_id:x}",
        rounds=settings["rounds"],
        seed=settings["seed"],
        weights=settings["weights"] or arch.weights,
        counted={},
    )
    evaluator = Evaluator(run, settings["threads"])
    num_clients = settings["num-clients"]
    # every client takes part in every round, as in todoServer; it evaluates here, not there
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        train_metrics_aggr_fn=evaluator.note_clients,
    )
    strategy.start(grid, tensors_of(evaluator.network), run.rounds, evaluate_fn=evaluator.evaluate)


class Evaluator:
    """Scores the merged model of each round, and publishes it as todoServer does."""

    def __init__(self, run, threads):
        self.run = run
        self.validation = data.read_index(VAL_PATH)
        self.images = data.load_images(self.validation, run.image_size)
        model.configure(run.seed, threads)
        self.network = model.build(run.arch, run.image_size, run.seed)
        model.initialize(self.network, run.weights)
        FOLDER.mkdir(exist_ok=True)
        self.history = []
        self.opened = time.monotonic()

    def note_clients(self, replies, weighted_by):
        """Called by Flower with a round's replies, before `evaluate`: who trained on how many."""
        self.trained = {reply["client"]["name"]: reply["metrics"][weighted_by] for reply in replies}
        return MetricRecord({weighted_by: sum(self.trained.values())})

    def evaluate(self, round_number, arrays):
        """Called by Flower after each round, and with round 0 before the first."""
        if round_number == 0:
            return None
        path = FOLDER / "server_weight.h5"
        set_tensors(self.network, arrays)
        model.save(self.network, path)
        self.run.weights_sha256 = files.sha256_of(path)
        self.run.counted = {
            name: {"round": round_number, "num_examples": num_examples}
            for name, num_examples in self.trained.items()
        }
        p_healthy = model.predict(self.network, self.images)
        scores = metrics.scores(p_healthy, data.healthy(self.validation))
        now = time.monotonic()
        row = {
            "round": round_number,
            **scores,
            "clients": len(self.trained),
            "num_examples": sum(self.trained.values()),
            "seconds": now - self.opened,
        }
        self.opened = now
        self.history.append(row)
        files.publish_rows(FOLDER / "history.csv", HISTORY_COLUMNS, self.history)
        card = cards.make(
            self.run,
            row,
            cards.read_prepared(VAL_PATH.parent),
            files.sha256_of(VAL_PATH),
            metrics.assess(p_healthy, self.validation),
        )
        cards.publish(path, card)
        measured = {name: value for name, value in scores.items() if value is not None}
        return MetricRecord(measured)


def tensors_of(network):
    """The network's weights as Flower sends them, in the order of the weight file."""
    return ArrayRecord([variable.numpy() for variable in model.tensors(network)])


def set_tensors(network, arrays):
    for variable, array in zip(model.tensors(network), arrays.to_numpy_ndarrays(), strict=True):
        variable.assign(array)
