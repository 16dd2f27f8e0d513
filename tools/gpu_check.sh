#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show: build, GPU tests, sanitizers,
# benchmarks. Takes under ten minutes on an H200 and needs no network.
#
#   tools/gpu_check.sh [STEP...]    results in $OUT (default gpu-results); all steps by default
#
# Needs nvcc, cmake, ninja, torch, transformers, peft, pybind11 and scikit-build-core. Packages that
# are missing there (gguf, pyarrow) may lie as wheels in .whl/,
# and so may fastprune itself, which is then not built.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-gpu-results} PYTHONUNBUFFERED=1
mkdir -p "$OUT" build/gpu
steps=" ${*:-build tests sanitize kernels prune} "

# step NAME SECONDS LOG: runs on after a failure, so that one run shows them all.
step() {
  local name=$1 limit=$2 log=$3 begin=$SECONDS status
  [[ $steps == *" $name "* ]] || return 0
  timeout "$limit" bash -c "$name" >"$OUT/$log" 2>&1
  status=$?
  printf '%-12s status %3d %4d s\n' "$name" $status $((SECONDS - begin)) | tee -a "$OUT/summary.txt"
  [ $status -eq 0 ] || tail -n 25 "$OUT/$log"
}

# What .whl/ brings is not built again; nor is a driver newer than its sources.
build() {
  if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install --quiet --no-index --no-deps .whl/*.whl || return
  fi
  if ! compgen -G '.whl/fastprune-*.whl' >/dev/null; then
    python3 -m pip install --no-build-isolation --no-deps \
      --config-settings=cmake.define.FASTPRUNE_CUDA=ON \
      --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch" . || return
  fi
  [ -x build/gpu/driver ] && [ -z "$(find csrc tools/gpu_driver.cu -newer build/gpu/driver)" ] ||
    nvcc -std=c++17 -O3 -arch="sm_$arch" -lineinfo --expt-relaxed-constexpr -Icsrc \
      -o build/gpu/driver tools/gpu_driver.cu csrc/cuda/*.cu csrc/core/check.cpp || return
  python3 -P -m fastprune info
}

# -P: what was installed, not the source folder, which holds no compiled module.
tests() {
  python3 -P -m pytest tests -m cuda -q -p no:cacheprovider --continue-on-collection-errors \
    -W default
}

sanitize() {
  local tool
  for tool in memcheck racecheck initcheck; do
    time compute-sanitizer --tool $tool --error-exitcode 9 build/gpu/driver || return
  done
}

kernels() { python3 -P bench/gpu_kernels.py --json "$OUT/gpu_kernels.json"; }
prune() { python3 -P bench/gpu_prune.py --json "$OUT/gpu_prune.json"; }
export -f build tests sanitize kernels prune

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader >"$OUT/summary.txt"
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
export arch
step build 150 build.log
step tests 150 tests.log &  # nothing here is timed
step sanitize 150 sanitize.log
wait
step kernels 150 gpu_kernels.txt
step prune 70 gpu_prune.txt
cat "$OUT/summary.txt"
! grep -q 'status *[1-9]' "$OUT/summary.txt"
