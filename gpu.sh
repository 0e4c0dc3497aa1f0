#!/usr/bin/env bash
# Run everything that needs a GPU, in slices of under nine minutes each on an H200.
#
#   bash gpu.sh                        all slices that are not done yet, in order
#   bash gpu.sh SLICE ...              these slices, again; interrupted runs resume
#   bash gpu.sh --list                 what each slice does, how long it took, and on which device
#   bash gpu.sh --dry-run [SLICE ...]  the same commands on a CPU, with a few steps each
#
# Measurements go to RESULTS [results/gpu], and compiled and chosen kernels to CACHE [.gpu-cache]. PACK names a .tar.gz
# from which both are unpacked at the start and into which both are packed after each slice, to continue on another
# machine. DATA_DIR [data] has the images of DATA [cifar10]. No network is needed. Without .venv, python3 is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ABOUT="tests    the most telling tests of the kernels: bf16, whole steps, captured graphs, sums, batch and head
short    three epochs of ResNet-32 with empty and with full caches; time per kernel; the chosen kernels
speed    images/s next to the usual alternatives, batches of 128, bn_only and all
large    images/s in batches of 1,024
full     ResNet-32, bn_only, 160 epochs
seeds    the same, eight seeds side by side
deep     ResNet-866, three epochs
memory   bytes kept for the backward pass; images/s of the loaders
startup  seconds to the first step, with empty and with full caches
rest     all other tests that use a GPU
grid     the grid of results/, as far as time allows; call it again to continue"
SLICES=$(awk '{print $1}' <<<"$ABOUT")
MOST="captured or two_steps_and or bfloat16-8 or passes_are_tritons or head_gives or batch_of_resident or many_programs"

RESULTS=${RESULTS:-results/gpu} CACHE=${CACHE:-.gpu-cache}
DATA=${DATA:-cifar10} DATA_DIR=${DATA_DIR:-data}
python=python3
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
say() { printf 'gpu.sh: %s\n' "$*"; }

train() { "$python" train.py --data "$DATA" --data-dir "$DATA_DIR" --device "$device" "${few[@]}" "$@"; }
bench() { # NAME PART [OPTIONS]: write the rows to NAME.jsonl
  "$python" bench.py "$2" --data "$DATA" --data-dir "$DATA_DIR" --device "$device" --json "$RESULTS/$1.jsonl" \
    "${turns[@]}" "${@:3}"
}

tests() {
  [[ $device == cpu ]] || "$python" -c "import xdist" 2>/dev/null || collect=() # without xdist, one test at a time
  "$python" -m pytest -m gpu -q "${collect[@]}" -k "${1:-$MOST}"
}
rest() { tests "not ($MOST)"; }
short() {
  rm -rf "$CACHE"
  local caches
  for caches in cold warm; do
    train --arch "$small" --epochs 3 --milestones --overwrite --out "$RESULTS/$caches"
  done
  bench profile profile --arch "$small"
  cp "$CACHE"/batchnorm-only/kernels-*.json "$RESULTS/" 2>/dev/null || say "no kernel was chosen"
}
speed() { bench "speed-${1:-$batch}" speed --arch "$small" --batch-size "${1:-$batch}" "${impls[@]}"; }
large() { speed "$large_batch"; }
full() { train --arch "$small" "${epochs[@]}" --out "$RESULTS/runs" --resume; }
seeds() { train --arch "$small" "${epochs[@]}" --seed "${eight[@]}" --out "$RESULTS/seeds" --resume; }
deep() { train --arch "$deepest" --epochs 3 --milestones --overwrite --out "$RESULTS/deep"; }
memory() {
  bench memory memory --arch "$small"
  bench data data
}
startup() { bench startup startup --arch "$small" --repeats 1; }
grid() {
  local options=(--data "$DATA" --data-dir "$DATA_DIR" --device "$device" --out "$RESULTS/runs" "${few[@]}" "${epochs[@]}")
  ARCHS=${ARCHS:-$grid_archs} SEEDS=${SEEDS:-0 1 2} "$python" sweep.py "${options[@]}"
}

device=cuda small=resnet32 deepest=resnet866 few=() turns=() collect=(-n 8) batch=128 large_batch=1024 epochs=()
eight=(0 1 2 3 4 5 6 7) impls=() grid_archs="resnet14 resnet32 resnet56 resnet110 resnet218" asked=() dry=() only=
for argument; do
  case $argument in
    --list)
      echo "$ABOUT"
      [[ ! -f $RESULTS/slices.txt ]] || cat "$RESULTS/slices.txt"
      exit
      ;;
    --dry-run)
      device=cpu small=resnet8 deepest=resnet8 few=(--train-subset 640 --batch-size 64 --dtype fp32)
      turns=(--repeats 1 --steps 1 --warm-up 1 --batch-size 16) collect=(--collect-only) batch=16 large_batch=32 eight=(0 1) impls=(--impl stock amp lean)
      epochs=(--epochs 1 --milestones) grid_archs=resnet8 SEEDS=0 DATA=synthetic dry=(--dry-run)
      ;;
    --only) only=yes ;; # internal: this script calls itself for each slice
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
  trap : TERM # at the time limit, wait until the running command has saved its state
  "${asked[0]}"
  exit
fi

[[ -z ${PACK:-} || ! -f $PACK ]] || tar -xzf "$PACK"
"$python" -c "import bench, pytest, sweep" || {
  say "$python lacks packages; pip install -r requirements.txt" >&2
  exit 2
}
name="a CPU, at a small scale"
if [[ $device == cuda ]]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>/dev/null) || {
    say "torch finds no CUDA GPU here; --dry-run runs the same at a small scale on a CPU" >&2
    exit 2
  }
fi
mkdir -p "$RESULTS" "$CACHE"
if ((!${#asked[@]})); then
  for slice in $SLICES; do
    grep -qs "^$slice .*, done" "$RESULTS/slices.txt" || asked+=("$slice")
  done
fi

# Triton's intermediate files are twice the size of the kernels, and are not read again.
not_packed=(--exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' --exclude='*.source')
failed=0
for slice in "${asked[@]}"; do
  say "$slice: $(sed -n "s/^$slice *//p" <<<"$ABOUT")"
  began=$SECONDS status=done
  timeout -k 20 530 bash gpu.sh "${dry[@]}" --only "$slice" || status="stopped or failed ($?)"
  [[ $status == done ]] || failed=1
  took="$slice $((SECONDS - began)) s, $status, $(date +%F), $name"
  echo "$took" >>"$RESULTS/slices.txt"
  [[ -z ${PACK:-} ]] || tar -czf "$PACK" "${not_packed[@]}" "$RESULTS" "$(realpath --relative-to=. "$CACHE")"
  next=$(sed -n "/^$slice\$/{n;p}" <<<"$SLICES")
  say "$took; left in $RESULTS${next:+; next: bash gpu.sh $next}"
done
exit $failed
