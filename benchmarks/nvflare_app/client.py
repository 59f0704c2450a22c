"""A client's script under NVFlare: nothing is trained, a constant is added to each number.

It says that it has arrived with a file, and begins when another one is there, as
benchmarks/untrained/model.py does under Flower.
"""

import sys
import time
from pathlib import Path

import numpy as np
import nvflare.client as flare

LOOK_EVERY_S = 0.005

folder = Path(sys.argv[1])
flare.init()
while flare.is_running():
    model = flare.receive()
    number = model.current_round + 1  # NVFlare's first is 0
    (folder / f"arrived-{number}-{flare.get_site_name()}").touch()
    while not (folder / f"go-{number}").exists():
        time.sleep(LOOK_EVERY_S)
    trained = {name: values + np.float32(0.001) for name, values in model.params.items()}
    flare.send(flare.FLModel(params=trained))
