#!/usr/bin/env bash
# Set everything up and run the main job: a tiny trained checkpoint on 2 ranks, its prompts from
# examples/, a table of answers at the end. With --recurrentgemma it is the RecurrentGemma, else the
# Persimmon. Further arguments go to `tprt generate`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
model=tiny output=quickstart
rest=()
for argument; do
  case $argument in
    --recurrentgemma) model=tiny-recurrentgemma output=quickstart-recurrentgemma ;;
    *) rest+=("$argument") ;;
  esac
done
ensure_venv
mkdir -p out
exec .venv/bin/tprt generate --config "configs/$model.yaml" --nproc 2 --show \
  --output "out/$output.jsonl" ${rest[@]+"${rest[@]}"}
