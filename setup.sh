# Makes .venv and installs the given requirement files, where that was not done yet.
#   bash setup.sh requirements.txt requirements-report.txt
# The other scripts source it; afterwards $python is the environment's interpreter.

python=.venv/bin/python
wanted=$(cat "$@" | cksum)
stamp=.venv/.installed-$(echo "$*" | cksum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing $* into .venv (a minute or two)"
    [ -x .venv/bin/pip ] || python3 -m venv .venv || {
        echo "setup: error: python3 cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
        exit 1
    }
    $python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || {
        echo "setup: error: pip could not install $*; its words are above" >&2
        exit 1
    }
    echo "$wanted" > "$stamp"
fi
