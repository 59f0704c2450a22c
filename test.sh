#!/usr/bin/env bash
# All tests.
#   ./test.sh                                       within 8 minutes on 2 cores
#   ./test.sh --slow                                the long ones, within 30 minutes
#   ./test.sh tests/test_rounds.py -k barrier       anything else goes to pytest
set -u
cd "$(dirname "$0")"

case ${1:-} in
-h | --help)
    sed -n '2,5s/^# //p' "$0"
    exit 0
    ;;
--slow)
    which=(--slow -m slow)
    shift
    ;;
*) which=(-m "not slow") ;;
esac

. ./setup.sh requirements.txt requirements-report.txt requirements-pretrained.txt requirements-test.txt
exec $python -m pytest "${which[@]}" "$@"
