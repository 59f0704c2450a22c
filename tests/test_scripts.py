"""What a newcomer meets first: --help, the documents, and the mistakes."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, start_server

SCRIPTS = ["todoServer.py", "todoClient.py", "prepare.py", "central.py", "report.py", "predict.py"]


def run(*command, cwd=ROOT, **options):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]


def commands_in(document):
    """[(script, [flag, ...])] of every command in the document: python3 X.py ..., ./X.sh ..."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    found = []
    for line in re.split(r"[\n`|]", text):
        line = line.partition(" #")[0]
        command = re.search(r"(?:python3? |\./)((?:\w+/)*\w+\.(?:py|sh))\b(.*)", line)
        if command:
            found.append((command[1], re.findall(r"(?<!\S)--[a-z][a-z-]*", command[2])))
    return found


@functools.cache
def flags_of(script):
    """Every flag that its --help names."""
    return set(re.findall(r"--[a-z][a-z-]+", help_of(script)))


def help_of(script):
    command = ["bash", script] if script.endswith(".sh") else [sys.executable, script]
    shown = run(*command, "--help", env={**os.environ, "PYTHON": sys.executable})
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_in_a_documents_commands_exists(document):
    commands = commands_in(document)
    wrong = [
        f"{script} {flag}"
        for script, flags in commands
        for flag in flags
        if flag not in flags_of(script)
    ]
    assert wrong == []
    assert commands or document == "docs/security.md"


@pytest.mark.parametrize("script", [*SCRIPTS, "run_local.sh"])
def test_every_flag_has_its_help(script):
    """All flags are what --help says: each with words of its own."""
    shown = help_of(script)
    options = shown[shown.index("\noptions:") :]
    flags = re.split(r"\n  (?=-)", options)[1:]
    assert len(flags) > 1
    assert [flag for flag in flags if not re.search(r"( {2,}|\n {6,})\S", flag)] == []


def test_the_readme_names_every_file():
    """Every entry of the root explains itself by its line in the README."""
    readme = (ROOT / "README.md").read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.md")]
    names = [path.name for path in files if path.name != "README.md"]
    listed = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    rooms = {name.partition("/")[0] + "/" for name in listed if "/" in name}
    names += [room for room in rooms if not room.startswith((".", "client00"))]
    assert len(names) > 20 and [name for name in names if name not in readme] == []


def fastest_s(*command):
    """Seconds of the fastest of several starts: what else the machine does only adds to them."""
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert run(sys.executable, *command).returncode == 0
        seconds.append(time.monotonic() - started)
    return min(seconds)


@pytest.mark.alone
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_soon(script):
    """As a ratio to an empty Python: gRPC, NumPy and Pillow cost 10 to 30, TensorFlow 200 more."""
    assert fastest_s(script, "--help") / fastest_s("-c", "pass") < 60


@pytest.mark.parametrize(
    "module",
    [
        "todoServer",
        "todoClient",
        "federation.service",
        "federation.rounds",
        "data",
        "prepare",
        "model",
    ],
)
def test_tensorflow_loads_only_when_it_is_needed(module):
    shown = run(
        sys.executable,
        "-c",
        f"import sys, {module}; sys.exit(bool({{'tensorflow', 'keras'}} & set(sys.modules)))",
    )
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("script", SCRIPTS[1:])  # the server needs packages only once it has a run
def test_a_missing_package_is_one_sentence_and_exit_1(script):
    shown = run(sys.executable, "-S", script)  # -S: without the environment's packages
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1, shown.stderr
    assert re.search(
        rf" {script}: error: .* has no package '\w+': start it with .venv/bin/python", shown.stderr
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["todoServer.py"], "index/val_set.pkl is missing: make it with `python3 prepare.py`"),
        (
            ["todoClient.py", "--name", "client001"],
            "index/worker1.pkl is missing: make it with `python3 prepare.py`",
        ),
        (["central.py"], "is missing: make it with"),
        (["report.py"], "server"),
    ],
)
def test_a_missing_file_is_one_sentence_and_exit_1(arguments, sentence, tmp_path):
    shown = run(sys.executable, ROOT / arguments[0], *arguments[1:], cwd=tmp_path)
    assert shown.returncode == 1 and sentence in shown.stderr and "Traceback" not in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_two_signals_at_once_end_a_server(start, begun):
    """Ctrl-C reaches the server by the terminal, and run_local.sh ends it too."""
    folder = begun()
    for _ in range(8):
        server, _ = start_server(start, folder)
        server.signal(signal.SIGINT)
        server.signal(signal.SIGTERM)
        assert server.wait(10) in (130, 143)
        assert "what has arrived is kept" in server.lines[-1]
