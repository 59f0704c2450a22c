#!/usr/bin/env bash
# Makes .venv and installs the given requirement files into it, where that was not done yet.
#   bash setup.sh requirements.txt requirements-report.txt
# Other scripts source it; afterwards $python is the interpreter in .venv.

python=.venv/bin/python
# Otherwise Ctrl-C that ends a check in here would be an answer: .venv is broken, so away with it.
trap 'exit 130' INT

setup_fail() {
    echo "setup: error: $*" >&2
    exit 1
}

# Whether the interpreter of .venv runs, and lies where it was made: the programs in .venv/bin have
# the path of that folder in their first line, so that a moved or copied .venv runs another one's.
venv_works() {
    $python - 2> /dev/null <<'END'
import os
import re

made_in = None
if os.path.exists(".venv/pyvenv.cfg"):
    settings = open(".venv/pyvenv.cfg").read()
    made_in = re.search(r"^command = .* -m venv (?:--\S+ )*(.+)$", settings, re.MULTILINE)
raise SystemExit(made_in is not None and not os.path.samefile(made_in[1], ".venv"))
END
}

if [ -e .venv ] || [ -L .venv ]; then
    venv_works || {
        echo "setup: .venv was moved, or its Python is gone: making it again"
        rm -rf .venv
    }
fi
# The version too: after an upgrade of the machine's Python, .venv has none of its packages.
wanted="$($python -V 2>&1), $(cat "$@" | cksum)"
stamp=.venv/.installed-$(echo "$*" | cksum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        setup_fail "python3 is $(python3 -V 2>&1); expected Python 3.11 or later"
    echo "setup: installing $* into .venv (a minute or two)"
    $python -m pip --version > /dev/null 2>&1 || python3 -m venv .venv ||
        setup_fail "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"
    $python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") ||
        setup_fail "pip could not install $*; its own words are above"
    echo "$($python -V 2>&1), $(cat "$@" | cksum)" > "$stamp"
fi
