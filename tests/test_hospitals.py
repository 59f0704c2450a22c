"""Three hospitals and a server under mutual TLS: docs/hospitals.md to the letter; a lost line."""

import ast
import errno
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import CLIENTS, ROOT, SHARED, copy_of, free_port, holding, rows_of

SERVER = "10.77.0.1"
ENDS_S = 400
SLOW_UPLOADS = """
from federation import weights
weights.BLOB_BYTES = 1000
whole = weights.blob_messages
def slowly(*arguments):
    for number, message in enumerate(whole(*arguments)):
        print("piece", number, flush=True)
        yield message
        time.sleep(0.3)
weights.blob_messages = slowly
"""


def ip(words):
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True)


@pytest.fixture
def spaces():
    """{name: its network namespace}; each hospital's reaches an address in the server's."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command `ip`")
    spaces = {name: f"fedml{os.getpid()}-{name}" for name in ["server", *CLIENTS]}
    there = spaces["server"]
    made = ip(f"netns add {there}")
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    steps = [f"-n {there} link set lo up", f"-n {there} addr add {SERVER}/32 dev lo"]
    for number, name in enumerate(CLIENTS, 1):
        here = spaces[name]
        steps += [
            f"netns add {here}",
            f"-n {there} link add to{number} type veth peer name line netns {here}",
            f"-n {there} addr add 10.77.{number}.1/30 dev to{number}",
            f"-n {there} link set to{number} up",
            f"-n {here} addr add 10.77.{number}.2/30 dev line",
            f"-n {here} link set line up",
            f"-n {here} route add {SERVER} via 10.77.{number}.1",
        ]
    try:
        for step in steps:
            done = ip(step)
            assert done.returncode == 0, f"ip {step}: {done.stderr}"
        yield spaces
    finally:
        for space in spaces.values():
            ip(f"netns del {space}")


@pytest.mark.slow
def test_three_hospitals_one_of_which_loses_its_line(spaces, start, begun):
    """Under mutual TLS, each machine in a network of its own."""
    site = begun(CLIENTS, rounds=2)
    certs = site / "certs"
    make_certs = [ROOT / "make_certs.sh", certs, SERVER, *CLIENTS]
    subprocess.run(make_certs, check=True, capture_output=True)

    def run(name, script, *words):
        """On its machine, with its certificate."""
        pair = ["--tls-cert", certs / f"{name}.pem", "--tls-key", certs / f"{name}.key"]
        python = ["ip", "netns", "exec", spaces[name], sys.executable]
        return start(script, *words, "--tls-ca", certs / "ca.pem", *pair, cwd=site, python=python)

    server = holding(site, "todoServer")
    server = run("server", server, "--listen", "0.0.0.0:50051")
    server.wait_for("listening on")
    script = holding(site, "todoClient", SLOW_UPLOADS)
    words = ["--server", f"{SERVER}:50051", "--val-index", "index/val_set.pkl"]
    clients = {name: run(name, script, "--name", name, *words) for name in CLIENTS}
    line = f"-n {spaces['client002']}"
    clients["client002"].wait_for("piece 3")
    assert ip(f"{line} link set line down").returncode == 0
    server.wait_for("client002.*(stands still|went away)", ENDS_S)
    clients["client002"].wait_for("waiting for the server at", ENDS_S)
    assert "round 1/2:" not in server.output
    assert ip(f"{line} link set line up").returncode == 0
    # the route went with the line
    assert ip(f"{line} route replace {SERVER} via 10.77.2.1").returncode == 0
    codes = [process.wait(ENDS_S) for process in [*clients.values(), server]]
    assert codes == [0] * 4, clients["client002"].output + server.output
    assert [row["clients"] for row in rows_of(site / "server" / "history.csv")] == ["3", "3"]
    # what each measured has come over its line
    rows = rows_of(site / "server" / "clients.csv")
    measured = [row["round"] for row in rows if row["client"] == "client002" and row["auc"]]
    assert measured == ["0", "1", "2"]


# --- docs/hospitals.md, to the letter ------------------------------------------------------------

CHAPTER = (ROOT / "docs" / "hospitals.md").read_text(encoding="utf-8").replace("\\\n", " ")
SERVER_UNIT, CLIENT_UNIT = re.findall(r"^ExecStart=(.*)$", CHAPTER, re.M)
IDRID = SHARED / "fundus" / "idrid" / "B. Disease Grading"
NUM_NEW = 5


class Machine:
    """A clone of the project, which stands for /opt/fedml on one machine, and its data.

    name      "server", or the hospital's client
    commands  what the chapter says to give there, in its order; the first makes the pictures
    """

    def __init__(self, folder, name, port, start):
        self.folder = copy_of(folder)
        self.name = name
        self.begin = start
        kind = "server" if name == "server" else "hospital"
        self.commands = re.findall(rf"^{kind}\$ (.*)$", CHAPTER, re.M)
        (folder / ".venv").symlink_to(sys.prefix)  # the packages, in place of setup.sh
        self.here = {  # the result of two rounds is enough
            "/opt/fedml": str(folder),
            "/data/": f"{folder}/data/",
            "fl.example.org": "localhost",
            "50051": str(port),
            "--rounds 20": "--rounds 2",
        }
        if kind == "hospital":
            self.here["client001"] = name

    def start(self, command):
        """A command of the chapter as it is on this machine."""
        for there, own in self.here.items():
            command = command.replace(there, own)
        python, script, *words = shlex.split(command)
        return self.begin(self.folder / script, *words, cwd=self.folder, python=[python])

    def run(self, command):
        process = self.start(command)
        assert process.wait(ENDS_S) == 0, f"{self.name}: {command}\n{process.output}"


def give_photographs(machines):
    """To each hospital and to the server others of IDRiD's, with a table; to hospitals new ones."""
    [table] = (IDRID / "2. Groundtruths").glob("a.*.csv")
    [originals] = (IDRID / "1. Original Images").glob("a.*")
    graded = [(row["Image name"], row["Retinopathy grade"]) for row in rows_of(table)]
    random.Random(0).shuffle(graded)  # the table has them grade by grade
    for machine in machines:
        use = "held-out" if machine.name == "server" else "fundus"
        for folder, number in ((use, 60), ("new", NUM_NEW)):
            target = machine.folder / "data" / folder
            target.mkdir(parents=True)
            own, graded = graded[:number], graded[number:]
            for name, _ in own:
                shutil.copy(originals / f"{name}.jpg", target)
            if folder != "new":
                rows = ["image,grade", *map(",".join, own)]
                (target / "grades.csv").write_text("\n".join(rows) + "\n")


def give_certificates(machines, folder):
    """What section 1 makes, and each machine's three files, by its table."""
    [command] = re.findall(r"^\$ \./(make_certs.sh .*)$", CHAPTER, re.M)
    made = f"{ROOT}/{command.replace('fl.example.org', 'localhost')}"
    subprocess.run(shlex.split(made), cwd=folder, check=True, capture_output=True)
    for machine in machines:
        (machine.folder / "certs").mkdir()
        for name in ("ca.pem", f"{machine.name}.pem", f"{machine.name}.key"):
            shutil.copy(folder / "certs" / name, machine.folder / "certs")


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
        machine.run(machine.commands[0])
    running = [server.start(SERVER_UNIT)]
    running[0].wait_for("listening on", ENDS_S)
    running += [hospital.start(CLIENT_UNIT) for hospital in hospitals]
    assert [process.wait(ENDS_S) for process in running] == [0] * 4, running[0].output
    for machine in (server, hospitals[1]):  # what one hospital does at the end the others do, too
        for command in machine.commands[1:]:
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
    scored = rows_of(hospitals[1].folder / "scores.csv")
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


FIRST_CELLS = re.findall(r"^\| (.*?) \|", CHAPTER.partition("## 9.")[2], re.M)
SENTENCES = {  # of the table, each as a pattern
    sentence: re.compile(".*".join(map(re.escape, sentence.split("..."))))
    for sentence in re.findall("`(.+?)`", "\n".join(FIRST_CELLS))
}


def test_each_sentence_of_the_table_is_one_that_is_said():
    names = [*ROOT.glob("*.py"), *ROOT.glob("[cfpr]*/*.py")]
    said = {sentence_of(node) for name in names for node in nodes_of(name)}
    said.add(f"{os.strerror(errno.ENOSPC)}: ...")
    assert len(SENTENCES) > 40
    assert [each for each, row in SENTENCES.items() if not any(map(row.search, said))] == []


def test_the_table_has_every_refusal_of_server_and_client():
    raised = [
        sentence_of(argument)
        for name in OF_ROUNDS
        for node in nodes_of(name)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in REFUSALS
        for argument in node.args
    ]
    refusals = [sentence for sentence in raised if " " in sentence and re.search("[a-z]", sentence)]
    assert len(refusals) > 30
    rows = SENTENCES.values()
    assert [each for each in refusals if not any(row.search(each) for row in rows)] == []


@pytest.mark.parametrize("script, unit", [("todoServer.py", 0), ("todoClient.py", 1)])
def test_the_table_has_every_exit_code_and_what_the_unit_does_then(script, unit):
    documentation = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    codes = re.findall(r"(?<![\w-])(\d+) (?:[a-zA-Z])", documentation.partition("Exit codes:")[2])
    rows = re.findall(r"^\| (\d[\d, ]*) \| (.*?) ?\| (.*?) ?\| (.*) \|$", CHAPTER, re.M)
    told = {code: row for code, *row in rows}
    told |= {code: told["130, 143"] for code in ("130", "143")}
    stays_down = re.findall(r"^RestartPreventExitStatus=(.*)$", CHAPTER, re.M)[unit].split()
    for code in codes:
        what, again = told[code][unit], "starts it again" in told[code][2]
        if (script, code) == ("todoClient.py", "1"):
            again = False  # as its row says
        assert what and again is (code not in (*stays_down, "0", "130", "143")), code


def test_links_between_the_chapters_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"
