"""What a newcomer meets first: --help, the documents, and the mistakes."""

import functools
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, start_server

SCRIPTS = ["todoServer.py", "todoClient.py", "prepare.py", "central.py", "report.py", "predict.py"]
DOCUMENTS = ["README.md", "benchmarks/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in ROOT.glob("docs/*.md")]


def run(*command, cwd=ROOT, **options):
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


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


HELP = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"tensorflow", "keras"} & set(sys.modules)
"""


@functools.cache
def help_of(script):
    """What --help says; a script of ours answers before it loads what takes seconds."""
    command = ["bash"] if script.endswith(".sh") else [sys.executable, "-c", HELP]
    shown = run(*command, script, "--help", env={**os.environ, "PYTHON": sys.executable})
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_in_a_documents_commands_exists(document):
    commands = commands_in(document)
    assert commands or document == "docs/security.md"
    for script, flags in commands:
        assert not set(flags) - set(re.findall(r"--[a-z][a-z-]+", help_of(script))), script


@pytest.mark.parametrize("script", [*SCRIPTS, "run_local.sh"])
def test_every_flag_has_its_help(script):
    """All flags are what --help says: each with words of its own."""
    flags = re.split(r"\n  (?=-)", help_of(script).partition("\noptions:")[2])[1:]
    assert len(flags) > 1
    assert [flag for flag in flags if not re.search(r"( {2,}|\n {6,})\S", flag)] == []


def test_the_readme_names_every_file():
    """Every entry of the root explains itself by its line in the README."""
    readme = (ROOT / "README.md").read_text()
    listed = run("git", "ls-files").stdout.splitlines()
    names = {name.partition("/")[0] + "/" for name in listed if "/" in name}
    names |= {name for name in listed if re.fullmatch(r"\w+\.(py|sh|md)", name)}
    names = [name for name in names if not name.startswith((".", "client00", "README"))]
    assert len(names) > 20 and [name for name in names if name not in readme] == []


@pytest.mark.parametrize("script", SCRIPTS[1:])  # the server needs packages only once it has a run
def test_a_missing_package_is_one_sentence_and_exit_1(script):
    shown = run(sys.executable, "-S", script)  # -S: without the environment's packages
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1, shown.stderr
    words = rf" {script}: error: .* has no package '\w+': start it with .venv/bin/python"
    assert re.search(words, shown.stderr)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("todoServer.py", "index/val_set.pkl is missing: make it with `python3 prepare.py`"),
        ("todoClient.py --name client001", "index/worker1.pkl is missing: make it with"),
        ("central.py", "is missing: make it with"),
        ("report.py", "server"),
    ],
)
def test_a_missing_file_is_one_sentence_and_exit_1(arguments, sentence, tmp_path):
    script, *flags = arguments.split()
    shown = run(sys.executable, ROOT / script, *flags, cwd=tmp_path)
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1
    assert sentence in shown.stderr and "Traceback" not in shown.stderr


def test_two_signals_at_once_end_a_server(start, begun):
    """Ctrl-C reaches the server by the terminal, and run_local.sh ends it too."""
    folder = begun()
    for _ in range(8):
        server, _ = start_server(start, folder)
        server.signal(signal.SIGINT)
        server.signal(signal.SIGTERM)
        assert server.wait() in (130, 143)
        assert "what has arrived is kept" in server.lines[-1]
