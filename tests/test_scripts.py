"""What a newcomer meets first: --help, the documents, and the mistakes."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT, project_files


def run(*command, cwd=ROOT, **options):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


HELP = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"tensorflow", "keras"} & set(sys.modules)
"""


def test_every_flag_in_a_documents_command_exists_and_help_comes_without_tensorflow():
    named = defaultdict(set)  # the flags in the commands of the documents, by script
    for document in project_files("*.md"):
        for line in re.split(r"[\n`|]", (ROOT / document).read_text().replace("\\\n", " ")):
            command = line.partition(" #")[0]
            if found := re.search(r"(?:python3? |\./)((?:\w+/)*\w+\.(?:py|sh))\b(.*)", command):
                named[found[1]] |= set(re.findall(r"(?<!\S)--[a-z][a-z-]*", found[2]))
    assert len(named) > 15
    for script, flags in named.items():
        command = ["bash"] if script.endswith(".sh") else [sys.executable, "-c", HELP]
        shown = run(*command, script, "--help", env={**os.environ, "PYTHON": sys.executable})
        assert shown.returncode == 0, shown.stderr
        assert not flags - set(re.findall(r"--[a-z][a-z-]+", shown.stdout)), script


def test_the_readme_names_every_file():
    """Every entry of the root explains itself by its line in the README."""
    readme = (ROOT / "README.md").read_text()
    listed = project_files()
    assert {"LICENSE", "requirements.txt"} <= set(listed)
    names = {name.partition("/")[0] + "/" for name in listed if "/" in name}
    names |= {name for name in listed if re.fullmatch(r"\w+\.(py|sh|md|txt)|LICENSE", name)}
    names = [name for name in names if not name.startswith((".", "client00", "README"))]
    assert len(names) > 20 and [name for name in names if name not in readme] == []


def test_every_package_that_is_imported_stands_in_requirements():
    """Or comes with one that does; pandas is installed by who imports an index of the thesis."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("[cfpr]*[ng]/*.py")]
    lines = "\n".join(path.read_text() for path in files)
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", lines, re.M)) - sys.stdlib_module_names
    imported -= {name for path in files for name in (path.stem, path.parent.name)}
    imported -= {"generated", "keras", "h5py", "absl", "markupsafe", "pandas"}
    wanted = {{"grpc": "grpcio", "PIL": "pillow"}.get(name, name) for name in imported}
    assert wanted <= set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M))


def test_a_clone_of_git_for_windows_runs_in_wsl(tmp_path):
    for name in (".gitattributes", "run_local.sh"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "run_local.sh"
    for command in ("init --quiet", "config core.autocrlf true", "add .", "checkout-index --all"):
        run("git", *command.split(), cwd=tmp_path, check=True)
        if command == "add .":
            script.unlink()
    assert b"\r" not in script.read_bytes()


def test_test_sh_takes_pytests_words_and_slow(tmp_path):
    shutil.copy(ROOT / "test.sh", tmp_path)
    (tmp_path / "setup.sh").write_text("python=echo")
    for words, given in [
        ([], "-m pytest --numprocesses 3 --dist loadfile"),
        (["--slow"], "-m pytest --slow --numprocesses 3 --dist loadfile"),
        (["tests/test_rounds.py", "-k", "a b"], "-m pytest tests/test_rounds.py -k a b"),
    ]:
        assert run("bash", "test.sh", *words, cwd=tmp_path).stdout == f"{given}\n"


def test_slow_is_the_tests_marked_slow_and_no_others():
    files = ["tests/test_files.py", "tests/test_setup.py"]  # none is slow, all are
    for flags, chosen in ([], "6 deselected / 3 selected"), (["--slow"], "3 deselected / 6 sel"):
        shown = run(sys.executable, "-m", "pytest", "--collect-only", *files, *flags)
        assert chosen in shown.stdout, shown.stdout


@pytest.mark.parametrize(
    "script", ["todoClient.py", "prepare.py", "central.py", "report.py", "predict.py", "status.py"]
)  # the server needs packages only once it has a run
def test_a_missing_package_is_one_sentence_and_exit_1(script):
    shown = run(sys.executable, "-S", script)  # -S: without the environment's packages
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1, shown.stderr
    words = rf" {script}: error: .* has no package '\w+': start it with .venv/bin/python"
    assert re.search(words, shown.stderr)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("todoServer.py", "index/val_set.pkl is missing: make it with `python3 prepare.py`"),
        ("todoClient.py --name client001", "index/worker1.pkl is missing: make it with"),
        ("central.py", "index/train_set.pkl is missing: make it with"),
        ("report.py", "server/server_weight.h5 is missing: train a model first"),
    ],
)
def test_a_missing_file_is_one_sentence_and_exit_1(command, sentence, tmp_path):
    shown = run(sys.executable, *f"{ROOT}/{command}".split(), cwd=tmp_path)
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1
    assert sentence in shown.stderr and not list(tmp_path.iterdir())  # and leaves nothing behind
