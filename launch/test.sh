#!/usr/bin/env bash
# Run every test that needs no GPU, two files at a time. Arguments go to pytest (-n 0: one at a time).
#
#   bash launch/test.sh              all but those that take long
#   bash launch/test.sh --long       those alone: every fault, with figures into docs/reliability.md; an hour and
#                                    more, on a machine that has nothing else to do
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
ensure_venv dev
# The tests run several ranks on one host, which need not have a GPU for each.
export CUDA_VISIBLE_DEVICES=
if [ "${1:-}" = --long ]; then
  shift
  failed=0
  .venv/bin/python -m pytest -m long --durations=0 "$@" || failed=$?
  .venv/bin/python tests/fault_results.py
  exit "$failed"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile -m "not gpu and not multi_gpu and not long" "$@"
