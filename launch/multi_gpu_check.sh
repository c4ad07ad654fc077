#!/usr/bin/env bash
# The checks of launch/gpu_check.sh that need several GPUs, on N of them (default: 2): tests over NCCL,
# latency of all-reduces, decode, prefill and throughput at TP=N. Files in $OUT or out/multi_gpu_check.
#
#   launch/multi_gpu_check.sh [--cpu] [N] [tests|allreduce|decode|prefill|throughput|all ...]
set -euo pipefail
case ${OUT:-/} in /*) ;; *) export OUT=$PWD/$OUT ;; esac
cd "$(dirname "$0")/.."
. launch/python.sh
ranks=2 rest=()
for argument in "$@"; do
  if [[ $argument =~ ^[0-9]+$ ]]; then ranks=$argument; else rest+=("$argument"); fi
done
if [ "$ranks" -lt 2 ]; then
  echo "multi_gpu_check: $ranks ranks; 2 or more. One GPU is launch/gpu_check.sh's business" >&2
  exit 2
fi
exec "$python" -m tprt.bench.gpu_check --ranks "$ranks" ${rest[@]+"${rest[@]}"}
