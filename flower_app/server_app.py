"""todoServer under Flower: the same network, schedule and evaluation; Flower averages and talks.

README.md has the commands. It needs this project's folder as its working directory and in
PYTHONPATH. Writes into flower/ what todoServer writes into server/, but for what a restart needs.
"""

import time
from pathlib import Path
from types import SimpleNamespace

from client_app import set_tensors, tensors_of
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import model
from common import files
from federation.state import HISTORY_COLUMNS
from todoServer import Evaluator

FOLDER = Path("flower")

app = ServerApp()


@app.main()
def main(grid, context):
    settings = context.run_config
    arch = model.ARCHS[settings["arch"]]
    weights = settings["weights"] or arch.weights
    # what `Evaluator` takes from a server's state
    run = SimpleNamespace(
        arch=settings["arch"],
        image_size=settings["image-size"] or arch.image_size,
        run=f"{context.run_id:x}",
        rounds=settings["rounds"],
        seed=settings["seed"],
        weights=weights,
        freeze_base=arch.freezes_base(weights),
        best=None,
    )
    FOLDER.mkdir(exist_ok=True)
    evaluator = Evaluator(SimpleNamespace(server_dir=FOLDER, index_dir=Path("index")))
    evaluator.open(run)
    model.configure(run.seed, settings["threads"])
    evaluator.network = model.build(run.arch, run.image_size, run.seed)
    model.initialize(evaluator.network, run.weights)
    history = []
    opened = [time.monotonic()]  # of each round

    def note_clients(replies, weighted_by):
        """Called by Flower with a round's replies, before `evaluate`: who trained on how many."""
        run.counted = {
            reply["client"]["name"]: {
                "round": len(history) + 1,
                "num_examples": reply["metrics"][weighted_by],
                "sha256": None,  # no client's own weights are kept here
            }
            for reply in replies
        }
        return MetricRecord({"clients": len(replies)})

    def evaluate(round_number, arrays):
        """Called by Flower after each round, and with round 0 before the first."""
        if round_number == 0:
            return None
        set_tensors(evaluator.network, arrays)
        model.save(evaluator.network, evaluator.weights_path)
        run.weights_sha256 = files.sha256_of(evaluator.weights_path)
        scores = evaluator.evaluate()
        opened.append(time.monotonic())
        row = {
            "round": round_number,
            **scores,
            "clients": len(run.counted),
            "num_examples": sum(upload["num_examples"] for upload in run.counted.values()),
            "seconds": opened[-1] - opened[-2],
        }
        history.append(row)
        files.publish_rows(FOLDER / "history.csv", HISTORY_COLUMNS, history)
        run.best, _ = evaluator.publish_result(run, row)
        return MetricRecord({name: value for name, value in scores.items() if value is not None})

    num_clients = settings["num-clients"]
    # every client takes part in every round, as in todoServer; it evaluates here, not there
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        train_metrics_aggr_fn=note_clients,
    )
    strategy.start(grid, tensors_of(evaluator.network), run.rounds, evaluate_fn=evaluate)
