#!/usr/bin/env bash
# All that only a GPU can show, in slices of under nine minutes each on an H200.
#
#   bash gpu.sh                        every slice that is not done yet, in order
#   bash gpu.sh SLICE ...              these, again; runs that were stopped go on
#   bash gpu.sh --list                 what the slices do, and how long they took where
#   bash gpu.sh --dry-run [SLICE ...]  the same commands on a CPU, a few steps each
#
# RESULTS [results/gpu] takes what is measured, CACHE [.gpu-cache] compiled and chosen kernels; PACK names a .tar.gz
# that both are taken from first and put into at the end of each slice, to go on with on another machine.
# DATA_DIR [data] has the images, DATA [cifar10] says which. Needs no network: without .venv, python3 is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ABOUT="tests    the tests that use a GPU
short    three epochs of ResNet-32 with empty caches and with full ones; time per kernel; the kernels chosen
speed    images/s beside what people otherwise use, batches of 128 and 1,024, bn_only and all
full     ResNet-32, bn_only, 160 epochs
seeds    eight seeds of it side by side
deep     ResNet-866, three epochs
memory   bytes kept for backward; the loaders; seconds to the first step
grid     the grid of results/, as far as time allows; call it again"
SLICES=$(awk '{print $1}' <<<"$ABOUT")

RESULTS=${RESULTS:-results/gpu} CACHE=${CACHE:-.gpu-cache}
DATA=${DATA:-cifar10} DATA_DIR=${DATA_DIR:-data}
python=python3
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
say() { printf 'gpu.sh: %s\n' "$*"; }

train() { "$python" train.py --data "$DATA" --data-dir "$DATA_DIR" --device "$device" "${few[@]}" "$@"; }
bench() { # NAME PART [OPTIONS]: the rows go to NAME.jsonl
  "$python" bench.py "$2" --data "$DATA" --data-dir "$DATA_DIR" --device "$device" --json "$RESULTS/$1.jsonl" \
    "${turns[@]}" "${@:3}"
}

tests() {
  [[ $device == cpu ]] || "$python" -c "import xdist" 2>/dev/null || collect=() # one at a time
  "$python" -m pytest -m gpu -q "${collect[@]}"
}
short() {
  rm -rf "$CACHE"
  local caches
  for caches in cold warm; do
    train --arch "$small" --epochs 3 --milestones --overwrite --out "$RESULTS/$caches"
  done
  bench profile profile --arch "$small"
  cp "$CACHE"/batchnorm-only/kernels-*.json "$RESULTS/" 2>/dev/null || say "no kernel was chosen"
}
speed() {
  local size
  for size in "${sizes[@]}"; do bench "speed-$size" speed --arch "$small" --batch-size "$size" "${impls[@]}"; done
}
full() { train --arch "$small" "${epochs[@]}" --out "$RESULTS/runs" --resume; }
seeds() { train --arch "$small" "${epochs[@]}" --seed "${eight[@]}" --out "$RESULTS/seeds" --resume; }
deep() { train --arch "$large" --epochs 3 --milestones --overwrite --out "$RESULTS/deep"; }
memory() {
  bench memory memory --arch "$small"
  bench data data
  bench startup startup --arch "$small"
}
grid() {
  local options=(--data "$DATA" --data-dir "$DATA_DIR" --device "$device" --out "$RESULTS/runs" "${few[@]}" "${epochs[@]}")
  ARCHS=${ARCHS:-$grid_archs} SEEDS=${SEEDS:-0 1 2} "$python" sweep.py "${options[@]}"
}

device=cuda small=resnet32 large=resnet866 few=() turns=() collect=(-n 8) sizes=(128 1024) epochs=()
eight=(0 1 2 3 4 5 6 7) impls=() grid_archs="resnet14 resnet32 resnet56 resnet110 resnet218" asked=() dry=() only=
for argument; do
  case $argument in
    --list)
      echo "$ABOUT"
      [[ ! -f $RESULTS/slices.txt ]] || cat "$RESULTS/slices.txt"
      exit
      ;;
    --dry-run)
      device=cpu small=resnet8 large=resnet8 few=(--train-subset 640 --batch-size 64 --dtype fp32)
      turns=(--repeats 1 --steps 1 --warm-up 1 --batch-size 16) collect=(--collect-only) sizes=(16) eight=(0 1) impls=(--impl stock amp lean)
      epochs=(--epochs 1 --milestones) grid_archs=resnet8 SEEDS=0 DATA=synthetic dry=(--dry-run)
      ;;
    --only) only=yes ;; # a slice by itself, as this script calls itself
    *)
      grep -qx -- "$argument" <<<"$SLICES" || {
        say "$argument: there is no such slice; choose from" $SLICES >&2
        exit 2
      }
      asked+=("$argument")
      ;;
  esac
done

[[ $CACHE == /* ]] || CACHE=$PWD/$CACHE
export RESULTS CACHE XDG_CACHE_HOME=$CACHE
if [[ -n $only ]]; then
  "${asked[0]}"
  exit
fi

[[ -z ${PACK:-} || ! -f $PACK ]] || tar -xzf "$PACK"
name="a CPU, in small"
if [[ $device == cuda ]]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>/dev/null) || {
    say "torch finds no CUDA GPU here; --dry-run runs the same in small on a CPU" >&2
    exit 2
  }
fi
mkdir -p "$RESULTS" "$CACHE"
if ((!${#asked[@]})); then
  for slice in $SLICES; do
    grep -qs "^$slice .*, done" "$RESULTS/slices.txt" || asked+=("$slice")
  done
fi

failed=0
for slice in "${asked[@]}"; do
  say "$slice: $(sed -n "s/^$slice *//p" <<<"$ABOUT")"
  began=$SECONDS status=done
  timeout 530 bash gpu.sh "${dry[@]}" --only "$slice" || status="stopped or failed ($?)"
  [[ $status == done ]] || failed=1
  took="$slice $((SECONDS - began)) s, $status, $(date +%F), $name"
  echo "$took" >>"$RESULTS/slices.txt"
  [[ -z ${PACK:-} ]] || tar -czf "$PACK" "$RESULTS" "$(realpath --relative-to=. "$CACHE")"
  next=$(sed -n "/^$slice\$/{n;p}" <<<"$SLICES")
  say "$took; left in $RESULTS${next:+; next: bash gpu.sh $next}"
done
exit $failed
