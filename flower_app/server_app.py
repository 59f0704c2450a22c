"""todoServer under Flower: the same first weights and evaluation; Flower averages and talks.

README.md has the commands. It needs this project's folder as its working directory and in
PYTHONPATH. Writes into flower/ the model, its card, the best round and history.csv, as todoServer
does into server/; a run is not resumed.
"""

import time
from pathlib import Path
from types import SimpleNamespace

from client_app import set_tensors, tensors_of
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import model
import todoServer
from common import files
from federation.state import HISTORY_COLUMNS

FOLDER = Path("flower")

app = ServerApp()


@app.main()
def main(grid, context):
    settings = context.run_config
    flags = ["--server-dir", str(FOLDER)]
    for name in ("rounds", "arch", "image-size", "seed", "weights"):
        if settings[name]:  # 0 and "" are todoServer's own choice
            flags += [f"--{name}", str(settings[name])]
    FOLDER.mkdir(exist_ok=True)
    arguments = todoServer.parse(flags)
    evaluator = todoServer.Evaluator(arguments)
    run = SimpleNamespace(state=todoServer.begin(arguments, evaluator), opened=time.monotonic())
    evaluator.open(run.state)
    model.load(evaluator.network, evaluator.weights_path)

    def note_clients(replies, weighted_by):
        """Called by Flower with a round's replies, before `evaluate`: who trained on how many."""
        counted = {
            reply["client"]["name"]: {
                "round": run.state.round,
                "num_examples": reply["metrics"][weighted_by],
                "file_sha256": None,  # no client's own weights are kept here
            }
            for reply in replies
        }
        run.state = run.state.changed(counted=counted)
        return MetricRecord({"clients": len(replies)})

    def evaluate(round_number, arrays):
        """Called by Flower after each round, and with round 0 before the first."""
        if round_number == 0:
            return None
        set_tensors(evaluator.network, arrays)
        model.save(evaluator.network, evaluator.weights_path)
        scores = evaluator.evaluate()
        counted = run.state.counted.values()
        now = time.monotonic()
        row = {
            "round": round_number,
            **scores,
            "clients": len(counted),
            "num_examples": sum(upload["num_examples"] for upload in counted),
            "seconds": now - run.opened,
        }
        run.opened = now
        state = run.state.changed(
            round=round_number + 1,
            weights_sha256=files.sha256_of(evaluator.weights_path),
            history=[*run.state.history, row],
        )
        files.publish_rows(FOLDER / "history.csv", HISTORY_COLUMNS, state.history)
        best, _ = evaluator.publish_result(state, row)
        run.state = state.changed(best=best)
        return MetricRecord({name: value for name, value in scores.items() if value is not None})

    num_clients = settings["num-clients"]
    # every client takes part in every round, as in todoServer; it evaluates here, not there
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        train_metrics_aggr_fn=note_clients,
    )
    first = tensors_of(evaluator.network)
    strategy.start(grid, first, run.state.rounds, evaluate_fn=evaluate)
