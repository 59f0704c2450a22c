#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it, and other such files, where that is not done yet.
#   bash setup.sh
#   bash setup.sh tests/requirements.txt
# Other scripts source it; afterwards $python is the interpreter in .venv.

python=.venv/bin/python
unset PYTHONHOME # of another Python: with it, .venv's has no packages, or does not start
# Otherwise Ctrl-C that ends a check in here would be an answer: .venv is broken, so away with it.
trap 'exit 130' INT

setup_fail() {
    echo "setup: error: $*" >&2
    exit 1
}

# Whether .venv was made where it is: the programs in it have the path of that folder in their first
# line, so that a moved or copied .venv runs another one's.
venv_is_in_place() {
    ! grep -s "^command = " .venv/pyvenv.cfg | grep -qvF " $(readlink -f .venv)"
}

# The version too: after an upgrade of the machine's Python, .venv has none of its packages.
what_is_wanted() {
    echo "$($python -V 2>&1), $(cat "$@" | cksum)"
}

# TensorFlow's version in requirements.txt is made for no other Python.
can_make_venv() {
    python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        setup_fail "python3 is $(python3 -V 2>&1), expected Python 3.11 to 3.13: install one," \
            "make .venv with it (python3.13 -m venv .venv), and start this again"
}

set_up() {
    local stamp
    if [ -e .venv ] || [ -L .venv ]; then
        $python -c "" 2> /dev/null && venv_is_in_place || {
            can_make_venv # asked first: where memory is short no Python starts, and .venv is whole
            echo "setup: .venv was moved, or its Python is gone: making it again"
            rm -rf .venv
        }
    fi
    stamp=.venv/.installed-$(echo "$*" | cksum | cut -d' ' -f1)
    [ "$(cat "$stamp" 2> /dev/null)" != "$(what_is_wanted "$@")" ] || return 0
    $python -m pip --version > /dev/null 2>&1 || {
        can_make_venv
        python3 -m venv .venv ||
            setup_fail "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"
    }
    echo "setup: installing $* into .venv (a minute or two)"
    $python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") ||
        setup_fail "pip could not install $*; its own words are above"
    what_is_wanted "$@" > "$stamp"
}

set_up requirements.txt "$@" # read as a whole: bash, interrupted while it reads, names a missing ')'
