"""Starts NVFlare's server and clients on this machine and submits the job; then it ends.

    python3 job.py FOLDER CLIENTS ROUNDS PORT CHECK-S REQUEST-S

FOLDER has start.npz, and NVFLARE_POC_WORKSPACE is a folder that does not exist yet. The server
looks each CHECK-S seconds whether a round is over, a client asks for the next after REQUEST-S.
"""

import os
import sys
from pathlib import Path

import nvflare.lighter
from controller import NpzFedAvg
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.base_fed_job import BaseFedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.poc_env import PocEnv

folder, clients, rounds, port, check_s, request_s = sys.argv[1:]

# What `nvflare poc prepare` begins with, on another port: HTTP and mutual TLS.
project = Path(nvflare.lighter.__file__).with_name("dummy_project.yml").read_text()
workspace = Path(os.environ["NVFLARE_POC_WORKSPACE"])
workspace.mkdir()
(workspace / "project.yml").write_text(project.replace("8002", port))

job = BaseFedJob(name="untrained", min_clients=int(clients))
job.to_server(NpzFedAvg(f"{folder}/start.npz", int(clients), int(rounds), float(check_s)))
job.to_server({"server": {"task_request_interval": float(request_s)}})
script = Path(__file__).with_name("client.py")
job.to_clients(ScriptRunner(str(script), folder, framework=FrameworkType.NUMPY))
PocEnv(num_clients=int(clients)).deploy(job)
