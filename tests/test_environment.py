"""Where people run it: file systems without locks, and another project's Keras settings."""

import errno
import json
import os
import shutil
import subprocess

import pytest
from conftest import client_script, server_script, start_server

from common import files

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


def run_to_its_end(start, site, environment=None):
    """(server, client) after a whole run, both with 0."""
    server, address = start_server(start, site, script=server_script(site), env=environment)
    arguments = ["--name", "client001", "--server", address]
    client = start(client_script(site), *arguments, cwd=site, env=environment)
    assert [client.wait(), server.wait()] == [0, 0], client.output + server.output
    return server, client


@pytest.mark.parametrize("fsync", ["EINVAL", "ENOTSUP"])
def test_without_locks_and_without_fsync_of_folders(start, begun, preloaded, fsync):

    site = begun(clients=["client001"], rounds=2)
    environment = preloaded(errno.ENOLCK, getattr(errno, fsync))
    for process in run_to_its_end(start, site, environment):
        assert process.output.count("files: warning: this file system has no locks") == 1
        assert process.output.count("files: warning: this file system cannot flush folders") == 1


def test_a_disk_that_fails_is_no_such_file_system(start, begun, preloaded):

    site = begun(clients=["client001"], rounds=2)
    environment = preloaded(errno.ENOLCK, errno.EIO)
    _, address = start_server(start, site, script=server_script(site))
    arguments = ["--name", "client001", "--server", address]
    client = start(client_script(site), *arguments, cwd=site, env=environment)
    assert client.wait() == 1
    assert "Input/output error" in client.lines[-1] and "Traceback" not in client.output


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
        weights = files.sha256_of(folder / "server" / "server_weight.h5")
        results.append((weights, (folder / "server" / "history.csv").read_text().split(",")[1:9]))
    assert results[0] == results[1] == results[2]
