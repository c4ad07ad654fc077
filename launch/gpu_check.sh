#!/usr/bin/env bash
# Everything that needs a GPU, in stages of less than nine minutes each; a JSON file per stage in $OUT
# (default out/gpu_check, out/gpu_check_cpu for --cpu) and a table at the end. Fails if a stage failed; later ones run all the same.
#
#   launch/gpu_check.sh [--cpu] [tests|kernels|decode|sparse|bytes|prefill|throughput|startup|ranks|recurrent|tune|all ...]
#
# --cpu runs the same commands at toy sizes without a GPU. Nothing is installed: PYTHON (default: that of
# .venv, else python3) must have torch, triton, transformers, sentencepiece and pytest. TPRT_COMMIT names the
# commit where the repository's own history is not there.
set -euo pipefail
case ${OUT:-/} in /*) ;; *) export OUT=$PWD/$OUT ;; esac
cd "$(dirname "$0")/.."
. launch/python.sh
exec "$python" -m tprt.bench.gpu_check "$@"
