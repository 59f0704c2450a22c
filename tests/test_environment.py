"""Where people run it: file systems without locks, and another project's Keras settings."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import client_script, server_script, start_server

from common import files
from federation import weights

# Stands for a network file system: no locks, no fsync of folders.
NETWORK_FILE_SYSTEM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

static int fails(const char *variable) {
    errno = atoi(getenv(variable));
    return -1;
}

int flock(int fd, int operation) { return fails("FLOCK_ERRNO"); }

int fsync(int fd) {
    struct stat status;
    if (fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)) return fails("FSYNC_ERRNO");
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""


@pytest.fixture
def preloaded(tmp_path):
    """preloaded(flock errno, fsync errno) -> environment of a process on such a file system."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc, to build what stands for a network file system")
    source, library = tmp_path / "network.c", tmp_path / "network.so"
    source.write_text(NETWORK_FILE_SYSTEM)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True
    )
    return lambda flock, fsync: {
        "LD_PRELOAD": str(library),
        "FLOCK_ERRNO": str(flock),
        "FSYNC_ERRNO": str(fsync),
    }


@pytest.mark.parametrize("fsync", [errno.EINVAL, errno.ENOTSUP])
def test_without_locks_and_without_fsync_of_folders(start, begun, preloaded, fsync):
    site = begun(clients=["client001"], rounds=2)
    environment = preloaded(errno.ENOLCK, fsync)
    server, address = start_server(start, site, script=server_script(site), env=environment)
    arguments = ["--name", "client001", "--server", address]
    client = start(client_script(site), *arguments, cwd=site, env=environment)
    for process in (client, server):
        assert process.wait() == 0, process.output
        assert process.output.count("warning: this file system has no locks") == 1
        assert process.output.count("warning: this file system cannot flush folders") == 1


def test_a_disk_that_fails_is_no_such_file_system(start, begun, preloaded):
    site = begun(clients=["client001"], rounds=2)
    _, address = start_server(start, site, script=server_script(site))
    arguments = ["--name", "client001", "--server", address]
    environment = preloaded(errno.ENOLCK, errno.EIO)
    client = start(client_script(site), *arguments, cwd=site, env=environment)
    assert client.wait() == 1
    assert "Input/output error" in client.lines[-1] and "Traceback" not in client.output


def write_half(path, *_, **__):
    with open(path, "wb") as file:
        file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file(client_main, served, monkeypatch):
    """The system names none where a write fails; whoever has to make room needs it."""
    run, address = served
    with monkeypatch.context() as patched:
        patched.setattr(weights, "_write", write_half)
        code, said = client_main("--server", address)
        assert code == 4 and "No space left on device: 'client001/client_weights.h5'" in said
        path = run.folder / "history.csv"
        patched.setattr(files, "publish", write_half)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            files.publish_rows(path, ["round"], [{"round": 1}])
    assert not list(Path("client001").glob(".*.tmp*"))
    assert client_main("--server", address)[0] == 0  # once there is room


FOREIGN_SETTINGS = [
    {"floatx": "float16", "image_data_format": "channels_first"},
    {"floatx": "float64", "epsilon": 0.1},
]


@pytest.mark.slow
def test_keras_settings_of_another_project_change_no_bit(start, site, tmp_path):
    results = []
    for number, settings in enumerate([None, *FOREIGN_SETTINGS]):
        home = tmp_path / f"home{number}"
        (home / ".keras").mkdir(parents=True)
        if settings:
            text = json.dumps({"backend": "torch", **settings})
            (home / ".keras" / "keras.json").write_text(text)
        folder = shutil.copytree(site, tmp_path / f"run{number}")
        environment = {**os.environ, "HOME": str(home)}
        environment.pop("KERAS_HOME", None)
        flags = ["--clients", "client001", "--rounds", "1", "--image-size", "32"]
        server, address = start_server(start, folder, *flags, env=environment)
        arguments = ["--name", "client001", "--server", address, "--threads", "1"]
        client = start("todoClient.py", *arguments, cwd=folder, env=environment)
        assert [client.wait(120), server.wait(120)] == [0, 0], client.output + server.output
        digest = files.sha256_of(folder / "server" / "server_weight.h5")
        results.append((digest, (folder / "server" / "history.csv").read_text().split(",")[1:9]))
    assert results[0] == results[1] == results[2]
