#!/usr/bin/env bash
# Run every test that needs no GPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
ensure_venv dev
# The tests run several ranks on one host, which need not have a GPU for each.
export CUDA_VISIBLE_DEVICES=
exec .venv/bin/python -m pytest -m "not gpu and not multi_gpu" "$@"
