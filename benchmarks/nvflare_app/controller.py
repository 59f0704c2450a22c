"""NVFlare's FedAvg on a dictionary of arrays: its own NumPy persistor knows a single array."""

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg


class NpzFedAvg(FedAvg):
    """Begins with the arrays of the file `start`, and saves each round's as a file of that kind."""

    # Each argument has a name: a job keeps no other ones.
    def __init__(self, start, num_clients, num_rounds, task_check_period):
        super().__init__(
            num_clients=num_clients,
            num_rounds=num_rounds,
            task_check_period=task_check_period,
            persistor_id="",
        )
        self.start = start

    def load_model(self):
        with np.load(self.start) as arrays:
            return FLModel(params=dict(arrays))

    def save_model_file(self, model, filepath):
        np.savez(filepath, **model.params)
