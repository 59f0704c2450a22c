#!/usr/bin/env bash
# All tests; words are pytest's, but for --slow.
#   ./test.sh                                       the quick ones, within 4 minutes on 2 cores
#   ./test.sh --slow                                the long ones, within 15 minutes
#   ./test.sh tests/test_rounds.py -k barrier       some of them
cd "$(dirname "$0")"
. ./setup.sh tests/requirements.txt
case "$*" in
# Three at a time: many wait, and others start up to four processes of their own. A file stays
# whole, because its tests share what was made for the first of them.
"" | --slow) set -- "$@" --numprocesses 3 --dist loadfile ;;
esac
exec $python -m pytest "$@"
