#!/usr/bin/env bash
# The whole demo on this machine: packages, images, one server, its clients, the result.
#   ./run_local.sh                        ten rounds on synthetic images
#   ./run_local.sh --help                 all flags
#   PYTHON=/path/to/python ./run_local.sh   an interpreter that has the packages, instead of .venv
here=$(dirname "$0")
trap 'exit 130' INT # of set-up too: one of its processes may take Ctrl-C for itself
if [ -z "$PYTHON" ]; then
    (cd "$here" && bash setup.sh) || exit
    PYTHON=$here/.venv/bin/python
    unset PYTHONHOME # as in setup.sh
fi
# Ctrl-C waits until launch.py can answer it: while Python starts it would be a traceback.
# Not every env can make it wait: coreutils before 8.31 (RHEL 8, Ubuntu 20.04), Ubuntu 25.10.
waits="env --block-signal=INT"
$waits true 2> /dev/null || waits=
exec $waits "$PYTHON" "$here/launch.py" "$@"
