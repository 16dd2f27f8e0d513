#!/bin/sh
# Runs the CPU kernels built with sanitizers.
#
#   tools/sanitize.sh [tests] [ARGUMENT...]    the kernel tests: AddressSanitizer, UBSan
#   tools/sanitize.sh fuzz [ARGUMENT...]       tools/fuzz_kernels: AddressSanitizer, UBSan
#   tools/sanitize.sh threads [ARGUMENT...]    tools/fuzz_kernels on plain threads: ThreadSanitizer
#
# PYTHON chooses the interpreter; further arguments go to pytest or tools/fuzz_kernels.
set -eu

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
what=tests
case ${1-} in tests | fuzz | threads) what=$1; shift ;; esac
case $what in
  threads) sanitizers=thread libraries=libtsan.so build=build/sanitize-thread ;;
  *) sanitizers=address,undefined libraries='libasan.so libubsan.so' build=build/sanitize ;;
esac
site=$build/site

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTPRUNE_CUDA=OFF \
  -DFASTPRUNE_SANITIZE=$sanitizers -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)"
cmake --build "$build"
rm -rf "$site"
cmake --install "$build" --prefix "$site"
cp -r fastprune/. "$site/fastprune"
if [ $what = threads ]; then
  ${CXX:-g++} -std=c++17 -g -fPIC -shared -fsanitize=thread -o "$build/parallel_for.so" \
    tools/fuzz_kernels/parallel_for.cpp
  # torch's own threads would be unknown to the sanitizer, so torch has one.
  set -- --parallel-for "$PWD/$build/parallel_for.so" --threads 1 --large 0.5 "$@"
fi

# The interpreter is not built with the sanitizer, so its runtime must come first. Python and torch
# keep memory until exit: leaks are not looked for. The finder of an editable install would hide
# the sanitized module.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1:abort_on_error=1
preload=
for library in $libraries; do preload="$preload $(gcc -print-file-name=$library)"; done
export LD_PRELOAD="$preload"
exec "$PYTHON" - "$site" $what "$@" <<'EOP'
import runpy
import sys

import pytest

site, what, *arguments = sys.argv[1:]
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, site)
from fastprune.kernels import _C  # noqa: E402

assert site in _C.__file__, f"{_C.__file__} is not the sanitized module"
if what == "tests":
    sys.exit(pytest.main(["tests/kernels", "-q", "-p", "no:cacheprovider", *arguments]))
sys.argv = ["tools/fuzz_kernels", *arguments]
runpy.run_path("tools/fuzz_kernels", run_name="__main__")
EOP
