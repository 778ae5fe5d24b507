#!/usr/bin/env bash
# One machine:   launch/torchrun.sh CONFIG [key=value ...] [--out RUN]
# N machines:    NNODES=N HEAD=host-of-the-first launch/torchrun.sh CONFIG ...    (the same line on each of them)
#
# RANKS is the number of processes on this machine: its GPUs, or 1 where it has none. The run folder must be the same
# shared folder on every machine. The command can be started again at any time: it goes on from the newest checkpoint.
set -euo pipefail

NUM_GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
RANKS=${RANKS:-$((NUM_GPUS > 0 ? NUM_GPUS : 1))}
NNODES=${NNODES:-1}

if [ "$NNODES" = 1 ]; then
  RENDEZVOUS=(--standalone)
else
  RENDEZVOUS=(--rdzv_backend=c10d --rdzv_endpoint="${HEAD:?host name of the first machine}:${PORT:-29400}" --rdzv_id="${RUN_ID:-panfm}")
fi

exec torchrun --nnodes="$NNODES" --nproc_per_node="$RANKS" "${RENDEZVOUS[@]}" -m panfm pretrain "$@"
