#!/usr/bin/env bash
# All tests, three at a time; then by themselves those that compare seconds.
#   ./test.sh                                       within 5 minutes on 2 cores
#   ./test.sh --slow                                the long ones, within 20 minutes
#   ./test.sh tests/test_rounds.py -k barrier       anything else goes to pytest, as it is
set -u
cd "$(dirname "$0")"

case ${1:-} in
-h | --help)
    sed -n '2,5s/^# //p' "$0"
    exit 0
    ;;
--slow)
    which=(--slow)
    marked="slow"
    shift
    ;;
*)
    which=()
    marked="not slow"
    ;;
esac

. ./setup.sh tests/requirements.txt
if [ $# -gt 0 ]; then
    exec $python -m pytest "${which[@]}" -m "$marked" "$@"
fi
code=0
# Exit code 5 says that no test was chosen: of the slow ones none need be alone.
allow_none() {
    "$@"
    local ended=$?
    [ $ended = 5 ] || return $ended
}
# Three at a time: many wait, and others start up to four processes of their own. A file stays
# whole, because its tests share what was made for the first of them.
$python -m pytest "${which[@]}" -m "$marked and not alone" --numprocesses 3 --dist loadfile || code=$?
allow_none $python -m pytest "${which[@]}" -m "$marked and alone" || code=$?
exit $code
