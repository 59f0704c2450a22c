"""The project under Flower: a SuperLink, SuperNodes and a run, for tests and benchmarks.

The commands, and the entry in Flower's configuration, are those of flower_app/README.md.
"""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, Started, free_port, processes_in

IS_INSTALLED = importlib.util.find_spec("flwr") is not None
README = (ROOT / "flower_app" / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8000"  # there, and the port and the name of its first hospital
[CONFIGURATION] = re.findall(r"^```toml\n(.*?)^```$", README, re.M | re.S)
LINK, NODE, *_, RUN = re.findall(r"^(?:flower-|flwr ).*$", README, re.M)


class Flower:
    """A SuperLink and a SuperNode for each client, on ports of this machine, in `folder`.

    folder   has preprocessed/ and index/, as a project folder
    modules  folders whose modules go before the project's own
    more     of the processes' environment
    """

    def __init__(self, folder, clients, modules=(), **more):
        self.folder = folder
        self.processes = []
        self.home = folder / "flower-home"
        self.home.mkdir()
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",  # nothing is reported to anyone
            "PYTHONPATH": os.pathsep.join([*map(str, modules), str(ROOT)]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **more,
        }
        port = str(free_port())
        address = ADDRESS.replace("8000", port)
        (self.home / "config.toml").write_text(CONFIGURATION.replace(ADDRESS, address))
        self.link = self.start(LINK.replace("8000", port))
        self.link.wait_for("running on http", 120)
        for client in clients:
            own = NODE.replace("9101", str(free_port())).replace("client001", client)
            self.start(own.replace(ADDRESS, address))

    def start(self, command):
        self.processes.append(Started(shlex.split(command), self.folder, self.environment))
        return self.processes[-1]

    def run(self, timeout_s=1800, **settings):
        """One `flwr run` until its end; settings as in pyproject.toml, '_' for '-'."""
        words = []
        for name, value in settings.items():
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            words.append(f"{name.replace('_', '-')}={text}")
        *command, _ = shlex.split(RUN.replace("flower_app", str(ROOT / "flower_app")))
        done = subprocess.run(
            [*command, " ".join(words)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.stdout

    def stop(self):
        """End all of it, the processes that Flower has started for each of its parts too."""
        for process in self.processes:
            process.process.kill()
            process.process.wait(30)
        for pid in processes_in(self.folder):
            os.kill(pid, signal.SIGKILL)
