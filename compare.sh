#!/usr/bin/env bash
# Is federation worth it? The same number of passes centrally, federated on an IID and on a non-IID split, and at the
# largest client alone; writes compare.csv and, for both splits, a report with the four curves.
#   ./compare.sh                                     drawn images, 14 rounds: in ten, federation has not caught up
#   ./compare.sh --seed 1 --dataset idrid --source DIR --rounds 20 --arch vgg16 --epochs 2 --batch-size 8
# Also --image-size, --weights, --freeze-base, --no-augmentation. Flags of prepare.py go there (--num-train, --share ...).
# It works in compare-SEED/; server/ and index/ stay as they are.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")"
home=$PWD seed=0 prepare=() server=(--rounds 14) client=() pids=()
while [ $# -gt 0 ]; do
    case $1 in
    --balanced | --skip-broken) prepare+=("$1"); shift; continue ;;
    --freeze-base | --no-augmentation) client+=("$1"); shift; continue ;;
    esac
    [[ $1 = --?* && $# -gt 1 ]] || { echo "compare: error: $1 is unknown or has no value; see the head of compare.sh" >&2; exit 2; }
    if [[ $2 != [/~]* ]] && [[ $1 = --source || $1 = --weights && -e $from/$2 ]]; then set -- "$1" "$from/$2" "${@:3}"; fi
    case $1 in
    --seed) seed=$2 ;;
    --rounds | --arch | --weights) server+=("$1" "$2") ;;
    --epochs | --batch-size) client+=("$1" "$2") ;;
    --image-size) prepare+=("$1" "$2") server+=("$1" "$2") ;;
    *) prepare+=("$1" "$2") ;;
    esac
    if [ "$1 $2" = "--arch vgg16" ]; then prepare=(--image-size 224 "${prepare[@]}"); fi  # as run_local.sh does
    shift 2
done
[[ $seed =~ ^[0-9]+$ ]] || { echo "compare: error: --seed $seed is not a whole number of at least 0" >&2; exit 2; }
python=${PYTHON:-}
[ -n "$python" ] || { . ./setup.sh requirements.txt requirements-report.txt; python=$home/$python; }

trap 'trap - EXIT INT TERM; kill $(jobs -pr) 2> /dev/null || true; wait' EXIT  # by now an ended one's id may be another's
trap 'exit 130' INT
trap 'exit 143' TERM
start() { "$python" "$home/$1.py" "${@:2}" & pids+=($!); }
finish() { for _ in "${pids[@]}"; do wait -n "${pids[@]}" 2> /dev/null; done; pids=(); }  # the first that fails ends all
run() { echo "compare: $*"; start "$@"; finish; }
federated() {
    echo "compare: federated, in $PWD"
    start todoServer --listen localhost:0 --seed "$seed" "${server[@]}" > >(tee server.log)
    until address=$(sed -n 's/^server: listening on //p' server.log) && [ -n "$address" ]; do kill -0 "${pids[0]}"; sleep 0.2; done
    for name in client001 client002 client003; do
        start todoClient --name $name --server "$address" --seed "$seed" --threads $((($(getconf _NPROCESSORS_ONLN) + 2) / 3)) "${client[@]}" > $name.log
    done
    finish
}

mkdir -p "compare-$seed/preprocessed" && cd "compare-$seed" && rm -rf iid noniid && mkdir iid noniid
for split in noniid iid; do
    cd "$home/compare-$seed/$split" && ln -s ../preprocessed && touch server.log
    run prepare --seed "$seed" "${prepare[@]}" --split $split
done
run central --seed "$seed" "${server[@]}" "${client[@]}"
federated
cd ../noniid
federated
largest=$(PYTHONPATH=$home "$python" -c "import data
print(max((f'index/worker{k}.pkl' for k in (1, 2, 3)), key=lambda path: len(data.read_index(path))))")
run central --seed "$seed" --index "$largest" --out alone "${server[@]}" "${client[@]}"
cd ..
echo series,round,loss,accuracy,auc,sensitivity,specificity > compare.csv
for series in "central:iid/central" "federated IID:iid/server" "federated non-IID:noniid/server" "largest client alone:noniid/alone"; do
    tail -n +2 "${series#*:}/history.csv" | cut -d, -f1-6 | sed "s/^/${series%:*},/" | tee -a compare.csv | tail -n 1
done
cp compare.csv "$home"
for split in iid noniid; do cd "$home/compare-$seed/$split" && run report --compare ../compare.csv; done
