"""Three hospitals and a server under mutual TLS: docs/hospitals.md to the letter; a lost line."""

import ast
import csv
import errno
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Started, copy_of, free_port, make_data, start_server

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
    """Each machine in a network of its own; the result has the bits of an undisturbed run."""
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
        server.wait_for("client002.*(stands still|went away)", ENDS_S)
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
    rows = [row for row in rows if row["client"] == "client001"]
    assert [(row["round"], row["client"]) for row in rows] == [
        (str(number), "client001") for number in (0, 1, 2)
    ]
    assert all(row["examples"] == "8" and row["auc"] for row in rows)
    report = start("report.py", cwd=site)
    assert report.wait(ENDS_S) == 0, report.output
    page = (site / "server" / "report.html").read_text(encoding="utf-8")
    assert "as each hospital says of its own held-out patients" in page


# --- docs/hospitals.md, to the letter ------------------------------------------------------------

CHAPTER = (ROOT / "docs" / "hospitals.md").read_text(encoding="utf-8").replace("\\\n", " ")
SERVER_UNIT, CLIENT_UNIT = re.findall(r"^ExecStart=(.*)$", CHAPTER, re.M)
IDRID = Path(__file__).parents[2] / "shared/fundus/idrid/B. Disease Grading"
NUM_PHOTOGRAPHS = 60  # of each machine
NUM_NEW = 5


def commands_on(machine):
    """What the chapter says to give there, in its order."""
    return re.findall(rf"^{machine}\$ (.*)$", CHAPTER, re.M)


class Machine:
    """A clone of the project, which stands for /opt/fedml on one machine, and its data.

    name  "server", or the hospital's client
    """

    def __init__(self, folder, name, port):
        self.folder = copy_of(folder)
        self.name = name
        self.port = port
        (folder / ".venv").symlink_to(sys.prefix)  # the packages, in place of setup.sh

    def words(self, command):
        """A command of the chapter as it is on this machine: the result of two rounds is enough."""
        here = {
            "/opt/fedml": str(self.folder),
            "/data/": f"{self.folder}/data/",
            "fl.example.org": "localhost",
            "50051": str(self.port),
            "--rounds 20": "--rounds 2",
        }
        if self.name != "server":
            here["client001"] = self.name
        for there, own in here.items():
            command = command.replace(there, own)
        return shlex.split(command)

    def start(self, command):
        return Started(self.words(command), self.folder)

    def run(self, command):
        process = self.start(command)
        assert process.wait(ENDS_S) == 0, f"{self.name}: {command}\n{process.output}"


def give_photographs(machines):
    """To each hospital and to the server others of IDRiD's, with a table; to hospitals new ones."""
    with open(next((IDRID / "2. Groundtruths").glob("a.*.csv")), encoding="utf-8-sig") as file:
        graded = [(row["Image name"], row["Retinopathy grade"]) for row in csv.DictReader(file)]
    [originals] = (IDRID / "1. Original Images").glob("a.*")
    random.Random(0).shuffle(graded)  # the table has them grade by grade
    graded = iter(graded)
    for machine in machines:
        use = "held-out" if machine.name == "server" else "fundus"
        for folder, number in ((use, NUM_PHOTOGRAPHS), ("new", NUM_NEW)):
            target = machine.folder / "data" / folder
            target.mkdir(parents=True)
            rows = ["image,grade"]
            for _ in range(number):
                name, grade = next(graded)
                shutil.copy(originals / f"{name}.jpg", target)
                rows.append(f"{name},{grade}")
            if folder != "new":
                (target / "grades.csv").write_text("\n".join(rows) + "\n")


def give_certificates(machines, folder):
    """What section 1 makes, and each machine's three files, by its table."""
    shutil.copy(ROOT / "make_certs.sh", folder)
    [command] = re.findall(r"^\$ (\./make_certs.sh .*)$", CHAPTER, re.M)
    made = command.replace("fl.example.org", "localhost")
    subprocess.run(shlex.split(made), cwd=folder, check=True, capture_output=True)
    for machine in machines:
        certs = machine.folder / "certs"
        certs.mkdir()
        for name in ("ca.pem", f"{machine.name}.pem", f"{machine.name}.key"):
            shutil.copy(folder / "certs" / name, certs)


@pytest.mark.slow
@pytest.mark.skipif(not IDRID.is_dir(), reason="the photographs are not here: ../shared/fundus")
def test_the_chapter_works_to_the_letter(tmp_path):
    port = free_port()
    machines = [Machine(tmp_path / name, name, port) for name in ("server", *CLIENTS)]
    give_photographs(machines)
    give_certificates(machines, tmp_path)
    server, *hospitals = machines
    for machine in machines:
        for command in commands_on("server" if machine is server else "hospital"):
            if "prepare.py" in command:
                machine.run(command)
    running = [server.start(SERVER_UNIT)]
    try:
        running[0].wait_for("listening on", ENDS_S)
        running += [hospital.start(CLIENT_UNIT) for hospital in hospitals]
        assert [process.wait(ENDS_S) for process in running] == [0] * 4, running[0].output
    finally:
        for process in running:
            if process.process.poll() is None:
                process.kill()
    for machine in machines:
        for command in commands_on("server" if machine is server else "hospital"):
            if "prepare.py" not in command:
                machine.run(command)

    assert (server.folder / "server" / "report.html").exists()
    for hospital in hospitals:
        own = hospital.folder / hospital.name
        card = json.loads((own / "server_weight.json").read_text())
        trained = [card[name] for name in ("arch", "image_size", "initial_weights")]
        assert trained == ["lite0", 448, "imagenet"] and card["preprocessing"] == "colour"
        page = (own / "report.html").read_text(encoding="utf-8")
        assert f"held-out patients of {hospital.name}" in page and "fine-tuned here" in page
        assert "There are too few patients" in page  # and not: the model must not be used
        scored = list(csv.DictReader((hospital.folder / "scores.csv").open(encoding="utf-8-sig")))
        assert len(scored) == NUM_NEW and all(row["score"] for row in scored)


# --- what it says ... ----------------------------------------------------------------------------

OF_ROUNDS = ["todoServer.py", "todoClient.py", "federation/rounds.py", "federation/service.py"]
REFUSALS = ("Refused", "ValueError", "GaveUp", "TooFewClients", "RoundClosed")


def sentence_of(node):
    """The text of a string in the code, "..." for what differs; "" for all else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence_of(part) or "..." for part in node.values)
    return ""


def nodes_of(name):
    return ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))


def rows_of_section_9():
    """[the sentences in the first cell, as patterns] of each row."""
    rows = re.findall(r"^\| (.*?) \|", CHAPTER.partition("## 9.")[2], re.M)
    sentences = [sentence for row in rows for sentence in re.findall("`(.+?)`", row)]
    return {
        sentence: re.compile(".*".join(map(re.escape, sentence.split("..."))))
        for sentence in sentences
    }


def test_each_sentence_of_the_table_is_one_that_is_said():
    names = [*ROOT.glob("*.py"), *ROOT.glob("[cf]*/*.py")]
    said = {sentence_of(node) for name in names for node in nodes_of(name)}
    said.add(f"{os.strerror(errno.ENOSPC)}: ...")
    rows = rows_of_section_9()
    assert len(rows) > 40
    assert [row for row, pattern in rows.items() if not any(map(pattern.search, said))] == []


def test_the_table_has_every_refusal_of_server_and_client():
    raised = [
        sentence_of(argument)
        for name in OF_ROUNDS
        for node in nodes_of(name)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in REFUSALS
        for argument in node.args
    ]
    refusals = [sentence for sentence in raised if " " in sentence and re.search("[a-z]", sentence)]
    patterns = rows_of_section_9().values()
    assert len(refusals) > 30
    assert [each for each in refusals if not any(row.search(each) for row in patterns)] == []


@pytest.mark.parametrize("script, unit", [("todoServer.py", 0), ("todoClient.py", 1)])
def test_the_table_has_every_exit_code_and_what_the_unit_does_then(script, unit):
    documentation = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    codes = re.findall(r"(?<![\w-])(\d+) (?:[a-zA-Z])", documentation.partition("Exit codes:")[2])
    rows = re.findall(r"^\| (\d[\d, ]*) \| (.*?) ?\| (.*?) ?\| (.*) \|$", CHAPTER, re.M)
    told = {code: row for code, *row in rows}
    told |= {code: told["130, 143"] for code in ("130", "143")}
    stays_down = re.findall(r"^RestartPreventExitStatus=(.*)$", CHAPTER, re.M)[unit].split()
    for code in codes:
        what = told[code][unit]
        again = "starts it again" in told[code][2] and not (
            script == "todoClient.py" and code == "1"
        )
        assert what and again is (code not in (*stays_down, "0", "130", "143")), code
