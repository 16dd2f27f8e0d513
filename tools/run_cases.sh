#!/usr/bin/env bash
# Run every case of a folder of field cases against this checkout: DIR/NAME/run.sh, each a few commands that
# say in their second line what is right. Prints what each says; it is for a person to compare.
#
#     tools/run_cases.sh DIR [NAME ...]
#
# VENV is the environment with fastprune (default: .venv here); T4 and T515 are folders with transformers
# 4.57.6 and 5.15.0 (tools/check_transformers.py --work DIR leaves them in DIR/transformers-VERSION).
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,9p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
cases=$(cd "$1" && pwd) || exit 2
shift
export VENV=${VENV:-$root/.venv}
[ $# -gt 0 ] || set -- $(cd "$cases" && ls -d */ | tr -d / | grep -vx common)
cd "$root"
for name in "$@"; do
  echo "== $name"
  sed -n '2,3{/^#/p}' "$cases/$name/run.sh"
  WORK=$(mktemp -d) timeout 900 bash "$cases/$name/run.sh" 2>&1 | cut -c1-240
done
