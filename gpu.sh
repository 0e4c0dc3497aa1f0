#!/usr/bin/env bash
# Run everything that needs a GPU, in slices of under nine minutes each on an H200.
#
#   bash gpu.sh                        all slices that are not done yet, in order
#   bash gpu.sh SLICE ...              these slices, again; interrupted runs resume
#   bash gpu.sh --list                 what each slice does, how long it took, and on which device
#   bash gpu.sh --dry-run [SLICE ...]  the same commands on a CPU, with a few steps each
#
# Measurements and what each slice prints go to RESULTS [results/gpu], and compiled and chosen kernels to CACHE
# [.gpu-cache]; a dry run has folders of its own. PACK names a folder for archives of both: they are unpacked at the start
# and written after each slice, to continue on another machine. At SIGINT or SIGTERM, as from `timeout 500 bash gpu.sh`,
# the running slice saves its state, and the archives are written. DATA_DIR [data] has the images of DATA [cifar10].
# GIT_COMMIT names the commit where the repository does not. No network is needed. Without .venv, python3 is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ABOUT="smoke    which kernels this GPU runs; a short epoch in each kind of training
tests    the most telling tests of the kernels: bf16, whole steps, captured graphs, sums, batch and head
short    three epochs of ResNet-32 with empty and with full caches; time per kernel; the chosen kernels
full     ResNet-32, bn_only, 160 epochs
speed    images/s next to the usual alternatives, batches of 128, bn_only and all
large    images/s in batches of 1,024
seeds    like full, with eight seeds side by side
deep     ResNet-866, three epochs
memory   bytes kept for the backward pass; images/s of the loaders
startup  seconds to the first step, with empty and with full caches
rest     all other tests that use a GPU
grid     the grid of results/, as far as time allows; call it again to continue"
SLICES=$(awk '{print $1}' <<<"$ABOUT")
MOST="captured_block or two_steps_and or bfloat16-8 or passes_are_tritons or head_gives or batch_of_resident"
MOST+=" or kernel_for or many_programs or order_in_which"

DATA=${DATA:-cifar10} DATA_DIR=${DATA_DIR:-data}
python=python3
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
say() { printf 'gpu.sh: %s\n' "$*"; }

train() { "$python" train.py --data "$DATA" --data-dir "$DATA_DIR" --device "$device" "${few[@]}" "$@"; }
bench() { # NAME PART [OPTIONS]: write the rows to NAME.jsonl
  "$python" bench.py "$2" --data "$DATA" --data-dir "$DATA_DIR" --device "$device" --json "$RESULTS/$1.jsonl" \
    "${turns[@]}" "${@:3}"
}

smoke() {
  "$python" -W always -c "
import sys, kernels
passes = kernels.passes_for(sys.argv[1])
print('kernels:', passes.name, '(dependent launch)' if getattr(passes, 'pdl', False) else '')" "$device"
  local mode
  for mode in bn_only random all; do
    train --arch resnet8 --mode "$mode" --train-subset 640 --epochs 1 --milestones --overwrite --out "$RESULTS/smoke"
  done
}
pytest_gpu() {
  [[ $device == cpu ]] || "$python" -c "import xdist" 2>/dev/null || collect=() # without xdist, one test at a time
  "$python" -m pytest -m gpu -q "${collect[@]}" "$@"
}
tests() { pytest_gpu -k "$MOST" tests/test_kernels_{cuda,sums,triton}.py tests/test_step_triton.py; }
rest() { pytest_gpu -k "not ($MOST)"; }
short() {
  local caches folder=$CACHE/short # of its own, so that the other slices keep theirs
  rm -rf "$folder"
  for caches in cold warm; do
    XDG_CACHE_HOME=$folder train --arch "$small" --epochs 3 --milestones --overwrite --out "$RESULTS/$caches"
  done
  cp "$folder"/batchnorm-only/kernels-*.{json,log} "$RESULTS/" 2>/dev/null || say "no kernel was chosen"
  rm -rf "$folder"
  bench profile profile --arch "$small"
}
compare() { bench "speed-$1-$2" speed --arch "$small" --batch-size "$1" "${@:3}"; } # BATCH-SIZE NAME OPTIONS
speed() { # [BATCH-SIZE]
  local size=${1:-$batch} mode
  for mode in bn_only all; do compare "$size" "$mode" --mode "$mode" "${impls[@]}"; done
  [[ $device == cpu ]] || for mode in bn_only all; do # last, in case PyTorch cannot capture such a step
    compare "$size" "$mode-graphed" --mode "$mode" --impl compiled graphed lean
  done
}
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

device=cuda small=resnet32 deepest=resnet866 few=() turns=(--repeats 3) collect=(-n 8) batch=128 large_batch=1024
epochs=() eight=(0 1 2 3 4 5 6 7) impls=(--impl stock stock_workers amp compiled plain lean recompute) asked=() dry=()
grid_archs="resnet14 resnet32 resnet56 resnet110 resnet218" only= list=
for argument; do
  case $argument in
    --list) list=yes ;;
    --dry-run)
      device=cpu small=resnet8 deepest=resnet8 few=(--train-subset 640 --batch-size 64 --dtype fp32)
      turns=(--repeats 1 --steps 1 --warm-up 1 --batch-size 16) collect=(--collect-only) batch=16
      large_batch=32 eight=(0 1) impls=(--impl stock amp lean) epochs=(--epochs 1 --milestones)
      grid_archs=resnet8 SEEDS=0 DATA=synthetic dry=(--dry-run)
      RESULTS=${RESULTS:-runs/gpu-dry-run/results} CACHE=${CACHE:-runs/gpu-dry-run/cache}
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

RESULTS=${RESULTS:-results/gpu} CACHE=${CACHE:-.gpu-cache}
if [[ -n $list ]]; then
  echo "$ABOUT"
  [[ ! -f $RESULTS/slices.txt ]] || cat "$RESULTS/slices.txt"
  exit
fi
[[ $CACHE == /* ]] || CACHE=$PWD/$CACHE
export RESULTS CACHE XDG_CACHE_HOME=$CACHE
if [[ -n $only ]]; then
  trap : TERM # at the time limit, wait until the running command has saved its state
  "${asked[0]}"
  exit
fi

mkdir -p "$RESULTS" "$CACHE" ${PACK:+"$PACK"}
declare -A packed=([results]=$RESULTS [cache]=$CACHE)
archives=(${PACK:+results cache})
for archive in "${archives[@]}"; do
  [[ ! -f $PACK/$archive.tar.gz ]] ||
    tar -xzf "$PACK/$archive.tar.gz" -C "${packed[$archive]}" --no-same-owner \
      --keep-newer-files --warning=no-ignore-newer ||
    say "$PACK/$archive.tar.gz is damaged; what could be read of it is used" >&2
done
# Triton's intermediate files are twice the size of the kernels, and are not read again; nor does `deep` resume.
not_packed=(--exclude={'*.ttir','*.ttgir','*.llir','*.ptx','*.source','./deep/*/last.pt'})
pack() {
  local archive
  for archive in "${archives[@]}"; do
    mkdir -p "${packed[$archive]}"
    (trap '' INT TERM && exec tar -czf "$PACK/$archive.part" -C "${packed[$archive]}" "${not_packed[@]}" .) ||
      say "${packed[$archive]}: could not all be packed" >&2
    mv "$PACK/$archive.part" "$PACK/$archive.tar.gz"
  done
}

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
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=unknown
  name+=", driver ${driver%%$'\n'*}"
fi
name+=", ${GIT_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo commit unknown)}"
if ((!${#asked[@]})); then
  for slice in $SLICES; do
    grep -qs "^$slice .*, done" "$RESULTS/slices.txt" || asked+=("$slice")
  done
fi

failed=0 stopped= running=
stop() {
  stopped=yes
  [[ -z $running ]] || kill -TERM "$running" 2>/dev/null || :
}
trap stop INT TERM
for slice in "${asked[@]}"; do
  [[ -z $stopped ]] || break
  say "$slice: $(sed -n "s/^$slice *//p" <<<"$ABOUT")"
  case $slice in smoke | tests) longest=240 ;; *) longest=530 ;; esac # seconds that a hang may cost
  began=$SECONDS ended=0
  # A signal for this script's process group must end neither the slice before it has saved, nor what it prints.
  exec {log}> >(trap '' INT TERM && exec tee -a "$RESULTS/$slice.log")
  writer=$!
  timeout -k 20 "$longest" bash gpu.sh "${dry[@]}" --only "$slice" >&"$log" 2>&1 {log}>&- &
  running=$!
  [[ -z $stopped ]] || stop
  wait $running || ended=$?
  while kill -0 $running 2>/dev/null; do # the first `wait` ends at a signal
    wait $running && ended=0 || ended=$?
  done
  running=
  exec {log}>&-
  timeout 5 tail --pid="$writer" -f /dev/null || : # until the log is written, unless some process holds it open
  status=done
  ((!ended)) || status="stopped or failed ($ended)" failed=1
  took="$slice $((SECONDS - began)) s, $status, $(date +%F), $name"
  echo "$took" >>"$RESULTS/slices.txt"
  pack
  next=$(sed -n "/^$slice\$/{n;p}" <<<"$SLICES")
  say "$took; left in $RESULTS${next:+; next: bash gpu.sh $next}"
done
[[ -z $stopped ]] || failed=1
exit $failed
