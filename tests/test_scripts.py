"""What a newcomer meets first: --help, the README, the mistakes, and that the house stays small."""

import re
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_names_every_flag(script):
    shown = run(sys.executable, script, "--help")
    assert shown.returncode == 0, shown.stderr
    readme = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"--[a-z][a-z-]+", shown.stdout)) - {"--help"}
    assert flags and not [flag for flag in flags if not re.search(rf"{flag}(?![a-z-])", readme)]


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]
    assert len(files) > 20 and not [path.name for path in files if path.name not in readme]


def test_help_answers_within_half_a_second():
    def seconds():
        started = time.monotonic()
        run(sys.executable, "todoServer.py", "--help")
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize(
    "given, kept",
    [
        ({}, "glibc.malloc.tcache_count=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "GLIBC_TUNABLES=glibc.malloc.check=0\0"),
    ],
)
def test_the_server_runs_with_a_small_heap_or_the_users_own_settings(start, begun, given, kept):
    server, _ = start_server(start, begun(), env=given)
    assert kept in Path(f"/proc/{server.pid}/environ").read_text() + "\0"


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
    assert re.match(
        rf"{script}: error: .* has no package '\w+': start it with .venv/bin/python", shown.stderr
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["todoServer.py", "--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["todoServer.py", "--min-clients", "2"], "--min-clients needs --round-timeout"),
        (["todoServer.py", "--clients", "a,../b"], "expected letters"),
        (["todoServer.py", "--clients", "a,a"], "expected different names"),
        (["todoServer.py", "--round-timeout", "-1"], "not a number of seconds"),
        (["todoClient.py"], "--name"),
        (["todoClient.py", "--name", "../x"], "expected letters"),
        (
            ["todoClient.py", "--name", "uppsala"],
            "ends in no number: say which images are its own with --index",
        ),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(arguments, sentence, tmp_path):
    shown = run(sys.executable, ROOT / arguments[0], *arguments[1:], cwd=tmp_path)
    assert shown.returncode == 2 and sentence in shown.stderr and "Traceback" not in shown.stderr
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--roundz", "3"], "--roundz is unknown"),
        (["--rounds"], "--rounds is unknown or has no value"),
        (["--num-clients", "0"], "--num-clients 0 is not a number above 0"),
    ],
)
def test_run_local_names_a_wrong_flag_before_it_installs(arguments, sentence, tmp_path):
    for name in ("run_local.sh", "setup.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    shown = run("bash", "run_local.sh", *arguments, cwd=tmp_path)
    assert shown.returncode == 2 and sentence in shown.stderr
    assert not (tmp_path / ".venv").exists()
