#!/usr/bin/env bash
# Install whatever this machine lacks, once, and then run a command in the environment.
#
#   bash run.sh                    the main job: ResNet-32, only BatchNorm trained (with --quick if there is no CUDA GPU)
#   bash run.sh pytest             the tests, in up to four processes
#   bash run.sh python train.py …  any other command
#
# The set-up installs FFCV's system libraries (apt), creates a virtual environment, .venv, and installs requirements.txt
# in it; where it may not install system libraries, it leaves out FFCV, which only `--loader ffcv` needs. PYTHON names
# another interpreter to create it with. Commands run in this folder, wherever they are typed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'run.sh: %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

system_packages() { # prints the Debian packages that are missing for a virtual environment and for compiling FFCV
  local python version
  python=$(find_python)
  if [[ -z $python ]]; then
    echo python3 python3-venv python3-dev
  else
    version=$("$python" -c 'import sys; print("python3.%d" % sys.version_info[1])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
      || echo "$version-dev"
  fi
  command -v g++ >/dev/null || echo g++
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

apt_install() { # returns 1 if this user cannot install system packages here
  local root=()
  ((EUID == 0)) || root=(sudo -n)
  if ! command -v apt-get >/dev/null || ! "${root[@]}" true 2>/dev/null; then
    say "something is missing on this machine; run: sudo apt-get install -y $*"
    say "or, without root: conda install -c conda-forge python=3.12 cxx-compiler pkg-config opencv libjpeg-turbo"
    return 1
  fi
  say "installing $*"
  "${root[@]}" apt-get update -qq || exit
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null || exit
}

set_up() {
  if command -v flock >/dev/null; then # two simultaneous first runs set up only once
    exec 9>.setup.lock
    flock 9
    [[ "$(cat .venv/.ready 2>/dev/null)" == "$wanted" ]] && return
  fi
  local packages python left_out=nothing
  packages=$(system_packages)
  # shellcheck disable=SC2086 # one word per package
  if [[ -n $packages ]] && ! apt_install $packages; then
    grep -vqxE 'pkg-config|libopencv-dev|libturbojpeg0-dev' <<<"$packages" && exit 2 # the kernels need the others
    say "FFCV is left out for now; to add it later, remove .venv and call this again"
    left_out='ffcv|numba|opencv'
  fi
  python=$(find_python)
  if [[ -z $python ]]; then
    say "needs Python 3.11 or newer; install it, or name one: PYTHON=/path/to/python3.12 bash run.sh"
    exit 2
  fi
  say "setting up .venv, once; this takes some minutes"
  [[ -x .venv/bin/python ]] || "$python" -m venv --clear .venv
  local quiet=()
  [[ -t 1 ]] || quiet=(-qq) # show the downloads' progress in a terminal
  grep -vE "^($left_out)" requirements.txt >.venv/requirements.txt
  .venv/bin/python -m pip install "${quiet[@]}" --disable-pip-version-check -r .venv/requirements.txt
  echo "$wanted" >.venv/.ready # written last, so that an interrupted set-up is done again
}

wanted=$(cksum <requirements.txt)
[[ -x .venv/bin/python && "$(cat .venv/.ready 2>/dev/null)" == "$wanted" ]] || set_up
exec 9>&- # the command that follows must not hold the lock
export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH

if (($# == 0)); then
  set -- python train.py --arch resnet32 --mode bn_only --resume
  python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || set -- "$@" --quick
elif [[ $* == pytest ]]; then # all tests, in up to four processes with one thread each
  export OMP_NUM_THREADS=1
  set -- pytest -n auto --maxprocesses 4
fi
exec "$@"
