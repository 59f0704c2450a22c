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
from pathlib import Path

import pytest
from conftest import ROOT, copy_of, free_port, holding, make_data, start_server

from common import files

CLIENTS = ["client001", "client002", "client003"]
SERVER = "10.77.0.1"
ENDS_S = 400
SLOW_UPLOADS = """
from federation import weights
weights.BLOB_BYTES = 20_000
whole = weights.blob_messages
def slowly(*arguments):
    for number, message in enumerate(whole(*arguments)):
        print("piece", number, flush=True)
        yield message
        time.sleep(0.3)
weights.blob_messages = slowly
"""


def client(name, address):
    return ["todoClient.py", "--name", name, "--server", address, "--threads", "1"]


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
    undisturbed, site, certs = (tmp_path / name for name in ("undisturbed", "site", "certs"))
    flags = ["--rounds", "2", "--image-size", "32"]
    server, address = start_server(start, make_data(undisturbed), *flags)
    clients = [start(*client(name, address), cwd=undisturbed) for name in CLIENTS]
    assert [process.wait(ENDS_S) for process in [*clients, server]] == [0] * 4

    make_data(site)
    make_certs = [ROOT / "make_certs.sh", certs, SERVER, *CLIENTS]
    subprocess.run(make_certs, check=True, capture_output=True)

    def run(name, *command):
        """On its machine, with its certificate; `start` runs what Python is given."""
        pair = ["--tls-cert", certs / f"{name}.pem", "--tls-key", certs / f"{name}.key"]
        words = [*command, "--tls-ca", certs / "ca.pem", *pair]
        in_its_network = [*hosts[name], sys.executable]
        return start(*words, cwd=site, python=in_its_network)

    server = run("server", "todoServer.py", "--listen", "0.0.0.0:50051", *flags)
    server.wait_for("listening on", ENDS_S)
    slow_uploads = holding(site, "todoClient", SLOW_UPLOADS)
    val_index = {"client001": ["--val-index", "index/val_set.pkl"]}
    clients = [
        run(name, slow_uploads, *client(name, f"{SERVER}:50051")[1:], *val_index.get(name, []))
        for name in CLIENTS
    ]
    clients[1].wait_for("piece 3", ENDS_S)
    of_client002 = ["-n", hosts["client002"][-1]]
    assert ip(*of_client002, "link", "set", "line", "down").returncode == 0
    server.wait_for("client002.*(stands still|went away)", ENDS_S)
    clients[1].wait_for("waiting for the server at", ENDS_S)
    assert "round 1/2" not in server.output
    assert ip(*of_client002, "link", "set", "line", "up").returncode == 0
    # the route went with the line
    assert ip(*of_client002, *f"route replace {SERVER} via 10.77.2.1".split()).returncode == 0
    codes = [process.wait(ENDS_S) for process in [*clients, server]]
    assert codes == [0] * 4, clients[1].output + server.output
    results = [
        files.sha256_of(folder / "server" / "server_weight.h5") for folder in (undisturbed, site)
    ]
    assert results[0] == results[1]
    # what client001 measured has come over its line
    rows = list(csv.DictReader((site / "server" / "clients.csv").read_text().splitlines()))
    measured = [row["round"] for row in rows if row["client"] == "client001" and row["auc"]]
    assert measured == ["0", "1", "2"]


# --- docs/hospitals.md, to the letter ------------------------------------------------------------

CHAPTER = (ROOT / "docs" / "hospitals.md").read_text(encoding="utf-8").replace("\\\n", " ")
SERVER_UNIT, CLIENT_UNIT = re.findall(r"^ExecStart=(.*)$", CHAPTER, re.M)
IDRID = Path(__file__).parents[2] / "shared/fundus/idrid/B. Disease Grading"
NUM_PHOTOGRAPHS = 60  # of each machine
NUM_NEW = 5


def commands_on(machine):
    """What the chapter says to give there, in its order; the first makes the pictures."""
    kind = "server" if machine.name == "server" else "hospital"
    return re.findall(rf"^{kind}\$ (.*)$", CHAPTER, re.M)


class Machine:
    """A clone of the project, which stands for /opt/fedml on one machine, and its data.

    name  "server", or the hospital's client
    """

    def __init__(self, folder, name, port, start):
        self.folder = copy_of(folder)
        self.name = name
        self.port = port
        self.begin = start
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
        python, script, *words = self.words(command)
        return self.begin(self.folder / script, *words, cwd=self.folder, python=[python])

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
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not IDRID.is_dir(), reason="the photographs are not here: ../shared/fundus")
def test_the_chapter_works_to_the_letter(start, tmp_path):
    port = free_port()
    machines = [Machine(tmp_path / name, name, port, start) for name in ("server", *CLIENTS)]
    give_photographs(machines)
    give_certificates(machines, tmp_path)
    server, *hospitals = machines
    for machine in machines:
        machine.prepare, *machine.later = commands_on(machine)
        machine.run(machine.prepare)
    running = [server.start(SERVER_UNIT)]
    running[0].wait_for("listening on", ENDS_S)
    running += [hospital.start(CLIENT_UNIT) for hospital in hospitals]
    assert [process.wait(ENDS_S) for process in running] == [0] * 4, running[0].output
    for machine in (server, hospitals[1]):  # what one hospital does at the end the others do, too
        for command in machine.later:
            machine.run(command)

    page = (server.folder / "server" / "report.html").read_text(encoding="utf-8")
    assert "as each hospital says of its own held-out patients" in page
    for hospital in hospitals:
        card = json.loads((hospital.folder / hospital.name / "server_weight.json").read_text())
        trained = [card[name] for name in ("arch", "image_size", "initial_weights")]
        assert trained == ["lite0", 448, "imagenet"] and card["preprocessing"] == "colour"
    page = (hospitals[1].folder / "client002" / "report.html").read_text(encoding="utf-8")
    assert "held-out patients of client002" in page and "fine-tuned here" in page
    assert "There are too few patients" in page  # and not: the model must not be used
    scored = list(csv.DictReader((hospitals[1].folder / "scores.csv").open(encoding="utf-8-sig")))
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


def test_links_between_the_chapters_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"
