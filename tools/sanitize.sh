#!/bin/sh
# Runs the kernel tests on a CPU build with AddressSanitizer and UndefinedBehaviorSanitizer.
# PYTHON chooses the interpreter; further arguments go to pytest.
set -eu

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
build=build/sanitize
site=$build/site

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTPRUNE_CUDA=OFF -DFASTPRUNE_WERROR=ON \
  -DFASTPRUNE_SANITIZE=address,undefined -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)"
cmake --build "$build"
rm -rf "$site"
cmake --install "$build" --prefix "$site"
cp -r fastprune/. "$site/fastprune"

# The interpreter is not built with the sanitizer, so its runtime must come first. Python and torch
# keep memory until exit: leaks are not looked for. The finder of an editable install would hide
# the sanitized module.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
exec "$PYTHON" - "$site" "$@" <<'EOF'
import sys

import pytest

site, *arguments = sys.argv[1:]
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, site)
from fastprune.kernels import _C  # noqa: E402

assert site in _C.__file__, f"{_C.__file__} is not the sanitized module"
sys.exit(pytest.main(["tests/kernels", "-q", "-p", "no:cacheprovider", *arguments]))
EOF
