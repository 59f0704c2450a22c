#!/usr/bin/env bash
# All tests.  ./test.sh: within 8 minutes on 2 cores.  ./test.sh --slow: the long ones, within 30.
# Anything else goes to pytest: ./test.sh tests/test_rounds.py -k barrier
set -u
cd "$(dirname "$0")"
. ./setup.sh requirements.txt requirements-report.txt requirements-test.txt
which=(-m "not slow")
if [ "${1:-}" = --slow ]; then which=(--slow -m slow); shift; fi
exec $python -m pytest "${which[@]}" "$@"
