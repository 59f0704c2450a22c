"""The project under Flower: a SuperLink, SuperNodes and a run, for tests and benchmarks."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, Started, free_port, processes_in

IS_INSTALLED = importlib.util.find_spec("flwr") is not None


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
        address = f"127.0.0.1:{free_port()}"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\n'
            "insecure = true\n"
        )
        host, port = address.split(":")
        link = self.start(
            "flower-superlink",
            "--insecure",
            "--disable-runtime-dependency-installation",
            *("--host", host, "--port", port),
        )
        link.wait_for("running on http", 120)
        for client in clients:
            self.start(
                "flower-supernode",
                *("--insecure", "--superlink", address),
                *("--port", str(free_port())),
                *("--node-config", f'name="{client}"'),
            )
        self.link = link

    def start(self, *command):
        self.processes.append(Started(list(command), self.folder, self.environment))
        return self.processes[-1]

    def run(self, timeout_s=600, **settings):
        """One `flwr run` until its end; settings as in pyproject.toml, '_' for '-'."""
        words = []
        for name, value in settings.items():
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            words.append(f"{name.replace('_', '-')}={text}")
        done = subprocess.run(
            ["flwr", "run", str(ROOT / "flower_app"), "here", "--stream"]
            + ["--run-config", " ".join(words)],
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
