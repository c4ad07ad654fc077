#!/usr/bin/env bash
# Set everything up and run the main job: the tiny trained checkpoint on 2 ranks, prompts from
# examples/prompts.jsonl, a table of answers at the end. Further arguments go to `tprt generate`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
ensure_venv
mkdir -p out
exec .venv/bin/tprt generate --config configs/tiny.yaml --nproc 2 --show \
  --output out/quickstart.jsonl "$@"
