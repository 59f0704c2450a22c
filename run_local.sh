#!/usr/bin/env bash
# The whole demo on this machine: set-up, data, one server, its clients, the result.
#   ./run_local.sh                        ten rounds on drawn images
#   ./run_local.sh --rounds 20 --seed 1
#   ./run_local.sh --dataset idrid --source DIR
# A run that was stopped is gone on with; after a finished one, or with --fresh, a new one begins.
set -u
from=$PWD
cd "$(dirname "$0")"

usage() {
    echo "usage: ./run_local.sh [--fresh] [--rounds N] [--seed N] [--dataset NAME] [--source DIR] [--split NAME]
       [--skip-broken] [--arch drcnn|vgg16] [--image-size PIXELS] [--num-clients N] [--epochs N] [--batch-size N]"
}

prepare=() server=() client=() fresh="" clients=3
while [ $# -gt 0 ]; do
    case $1 in
    --fresh) fresh=--fresh; shift; continue ;;
    --skip-broken) prepare+=("$1"); shift; continue ;;
    -h | --help) usage; exit 0 ;;
    esac
    [ $# -gt 1 ] || { echo "run_local: error: $1 is unknown or has no value" >&2; usage >&2; exit 2; }
    if [[ $1 = --source && $2 != [/~]* ]]; then set -- "$1" "$from/$2" "${@:3}"; fi
    case $1 in
    --dataset | --source | --split) prepare+=("$1" "$2") ;;
    --rounds | --arch) server+=("$1" "$2") ;;
    --epochs | --batch-size) client+=("$1" "$2") ;;
    --num-clients) clients=$2; prepare+=("$1" "$2") ;;
    --image-size) prepare+=("$1" "$2"); server+=("$1" "$2") ;;
    --seed) prepare+=("$1" "$2"); server+=("$1" "$2"); client+=("$1" "$2") ;;
    *) echo "run_local: error: $1 is unknown" >&2; usage >&2; exit 2 ;;
    esac
    # vgg16 looks at 224 pixels unless told otherwise
    if [ "$1 $2" = "--arch vgg16" ]; then prepare=(--image-size 224 "${prepare[@]}"); fi
    shift 2
done
[[ $clients =~ ^[1-9][0-9]*$ ]] || { echo "run_local: error: --num-clients $clients is not a number above 0" >&2; exit 2; }
names=$(seq -f 'client%03g' -s, 1 "$clients")

. ./setup.sh requirements.txt requirements-report.txt

# A finished run makes room for a new one; an unfinished one goes on, on the data that it began with.
state=$($python -c "
from common import files
from common import script
import sys
try:
    with files.alone_in('server'):
        state = None if sys.argv[1:] else files.load_state('server/state.json', ('rounds', 'history'))
except ValueError as error:
    sys.exit(script.fail('run_local', error))
print('none' if state is None else 'finished' if len(state['history']) >= state['rounds'] else 'open')" $fresh) || exit 1
if [ "$state" = open ] && [ -z "$fresh" ]; then
    if ! why=$($python prepare.py --check "${prepare[@]}"); then
        echo "run_local: error: server/ holds an unfinished run, but $why; go on with the same choices, or begin with --fresh" >&2
        exit 1
    fi
    echo "run_local: going on with the unfinished run in server/"
else
    $python prepare.py "${prepare[@]}" || exit $?  # pictures that are there are kept
    [ "$state" = none ] || { fresh=--fresh; echo "run_local: a new run; the old one's files are moved aside"; }
fi

pids=()
stop() {
    trap - EXIT INT TERM
    kill "${pids[@]}" 2> /dev/null
    wait
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop $?' EXIT

log=run_local.log  # not in server/: --fresh moves away what is there
: > $log
$python todoServer.py --listen localhost:0 --clients "$names" $fresh "${server[@]}" > >(tee -ai $log) 2>&1 &  # -i: Ctrl-C is not for tee, the server has a last line
pids+=($!)
until address=$(sed -n 's/^server: listening on //p' $log) && [ -n "$address" ]; do
    kill -0 "${pids[0]}" 2> /dev/null || { wait "${pids[0]}"; stop $?; }
    sleep 0.2
done
threads=$((($(getconf _NPROCESSORS_ONLN) + clients - 1) / clients))  # they share this machine
for name in ${names//,/ }; do
    $python todoClient.py --name "$name" --server "$address" --threads "$threads" "${client[@]}" &
    pids+=($!)
done

# All end by themselves with 0; the first that ends otherwise ends all.
while [ ${#pids[@]} -gt 0 ]; do
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            running+=("$pid")
            continue
        fi
        wait "$pid" && continue
        code=$?
        echo "run_local: a process ended with $code (its words are above): stopping the others" >&2
        stop $code
    done
    pids=("${running[@]}")
    sleep 0.2
done

echo
$python -c "
import csv
rows = list(csv.DictReader(open('server/history.csv')))
names = ['round', 'loss', 'accuracy', 'auc', 'sensitivity', 'specificity', 'num_examples', 'seconds']
print('  '.join(f'{name:>12}' for name in names))
for row in rows:
    print('  '.join(f'{float(row[name]):12.3f}' if '.' in row[name] else f'{row[name]:>12}' for name in names))"
echo
echo "model    server/server_weight.h5     history  server/history.csv     log  $log"
$python report.py
