"""Three hospitals and a server, each in a network of its own on this machine, under mutual TLS.

One loses its line for a minute in the middle of its upload; the result has the bits of an
undisturbed run.
"""

import csv
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Started, make_data, start_server

from common import files

CLIENTS = ["client001", "client002", "client003"]
SERVER = "10.77.0.1"
ENDS_S = 400
CUT_S = 60
SLOW_UPLOADS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import todoClient
from federation import weights
weights.BLOB_BYTES = 20_000
whole = weights.blob_messages
def slowly(*arguments):
    for number, message in enumerate(whole(*arguments)):
        print("piece", number, flush=True)
        yield message
        time.sleep(0.3)
weights.blob_messages = slowly
sys.exit(todoClient.main())
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """{name: the command that runs another one in that host's network}.

    The server's network has an address that each hospital's network reaches.
    """
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command `ip`")
    prefix = f"fedml{os.getpid()}-"
    names = {name: f"{prefix}{number}" for number, name in enumerate(["server", *CLIENTS])}
    try:
        for name, space in names.items():
            made = ip("netns", "add", space)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
            assert ip("-n", space, "link", "set", "lo", "up").returncode == 0, name
        there = names["server"]
        steps = [f"-n {there} addr add {SERVER}/32 dev lo"]
        for number, name in enumerate(CLIENTS, 1):
            here = names[name]
            steps += [
                f"-n {there} link add to{number} type veth peer name line netns {here}",
                f"-n {there} addr add 10.77.{number}.1/30 dev to{number}",
                f"-n {there} link set to{number} up",
                f"-n {here} addr add 10.77.{number}.2/30 dev line",
                f"-n {here} link set line up",
                f"-n {here} route add {SERVER} via 10.77.{number}.1",
            ]
        for step in steps:
            done = ip(*step.split())
            assert done.returncode == 0, f"ip {step}: {done.stderr}"
        yield {name: ["ip", "netns", "exec", space] for name, space in names.items()}
    finally:
        for space in names.values():
            ip("netns", "del", space)


@pytest.mark.slow
def test_three_hospitals_one_of_which_loses_its_line(hosts, start, tmp_path):
    undisturbed = make_data(tmp_path / "undisturbed")
    server, address = start_server(start, undisturbed, "--rounds", "2", "--image-size", "32")
    clients = [
        start(
            "todoClient.py", "--name", name, "--server", address, "--threads", "1", cwd=undisturbed
        )
        for name in CLIENTS
    ]
    assert [process.wait(ENDS_S) for process in [*clients, server]] == [0] * 4

    site, certs, running = make_data(tmp_path / "site"), tmp_path / "certs", []
    subprocess.run(
        [ROOT / "make_certs.sh", certs, SERVER, *CLIENTS], check=True, capture_output=True
    )

    def run(name, *command):
        own = [
            "--tls-ca",
            certs / "ca.pem",
            "--tls-cert",
            certs / f"{name}.pem",
            "--tls-key",
            certs / f"{name}.key",
        ]
        running.append(Started([*hosts[name], sys.executable, *map(str, [*command, *own])], site))
        return running[-1]

    try:
        server = run(
            "server",
            ROOT / "todoServer.py",
            "--listen",
            "0.0.0.0:50051",
            "--rounds",
            "2",
            "--image-size",
            "32",
        )
        server.wait_for("listening on", ENDS_S)
        clients = [
            run(
                name,
                *["-c", SLOW_UPLOADS, "--name", name, "--server", f"{SERVER}:50051"],
                *["--threads", "1"],
                *(["--val-index", "index/val_set.pkl"] if name == "client001" else []),
            )
            for name in CLIENTS
        ]
        clients[1].wait_for("piece 3", ENDS_S)
        line = ["-n", hosts["client002"][-1], "link", "set", "line"]
        assert ip(*line, "down").returncode == 0
        cut = time.monotonic()
        server.wait_for("client002 (made no progress|went away)", ENDS_S)
        time.sleep(max(0, cut + CUT_S - time.monotonic()))
        assert "round 1/2" not in server.output
        assert ip(*line, "up").returncode == 0
        # the route went with the line
        assert (
            ip(
                "-n", hosts["client002"][-1], "route", "replace", SERVER, "via", "10.77.2.1"
            ).returncode
            == 0
        )
        assert [process.wait(ENDS_S) for process in [*clients, server]] == [0] * 4, (
            clients[1].output + server.output
        )
    finally:
        for process in running:
            if process.process.poll() is None:
                process.kill()
    assert "waiting for the server at" in clients[1].output
    results = [
        files.sha256_of(folder / "server" / "server_weight.h5") for folder in (undisturbed, site)
    ]
    assert results[0] == results[1]
    # what client001 measured has come over its line, and stands on the server's page
    rows = list(csv.DictReader((site / "server" / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["client"]) for row in rows] == [
        (str(number), "client001") for number in (0, 1, 2)
    ]
    assert all(row["examples"] == "8" and row["auc"] for row in rows)
    report = start("report.py", cwd=site)
    assert report.wait(ENDS_S) == 0, report.output
    page = (site / "server" / "report.html").read_text(encoding="utf-8")
    assert "as each hospital says of its own held-out patients" in page
