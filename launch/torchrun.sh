#!/usr/bin/env bash
# Run a tprt command as several ranks, on this host or on several.
#
#   bash launch/torchrun.sh --nproc 4 -- generate --config C.yaml --output OUT.jsonl
#   bash launch/torchrun.sh --nproc 8 --nnodes 2 --head node-a --interface eth0 -- generate ...   # on both hosts
#
# --help lists the rest. What is different from plain torchrun:
#
# - Stores listen on one address: loopback for one host, that of --head for several, where its port and one
#   that the system chooses must be open to the other hosts. torchrun's own listen on every address, whatever
#   they are given. Ranks speak over --interface (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where not set).
#   Nothing there asks for a password: between hosts, use a network of your own.
# - The exit code is the job's (README.md), where torchrun's is 1 for everything. OUT.status.json has it too.
# - --max-restarts K: after a lost rank or a bug, not after wrong settings, failed records, a full disk or a
#   signal, all ranks are started again, up to K times. The job goes on from its journal, so nothing finished
#   is computed twice. With several hosts, give each the same K.
# - SIGTERM, SIGINT and SIGUSR1 reach the ranks, which leave the job resumable (143, 130).
#
# PYTHON names the interpreter (.venv's by default), OMP_NUM_THREADS the threads of each rank.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Of a peer that has ended torch prints a stack of C++; the ranks say which one it was.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec "$python" -m tprt.distributed.launcher "$@"
