#!/usr/bin/env bash
# One machine:      launch/torchrun.sh CONFIG [key=value ...] [--out RUN]
# N machines:       NNODES=N HEAD=host-of-the-first launch/torchrun.sh CONFIG ...    (the same line on each of them)
# 1 to N machines:  NNODES=1:N HEAD=... launch/torchrun.sh CONFIG ...    (any but HEAD may die or join while it runs)
#
# RANKS is the number of processes on this machine: its GPUs, or 1 where it has none. The run folder must be the same
# shared folder on every machine. The command can be started again at any time: it goes on from the newest checkpoint.
# SIGTERM and SIGUSR1 to this script save the run and end it with code 75 (docs/reliability.md has all codes).
#
# ADDRESS       how the other machines reach this one, where its host name does not say (several networks, no DNS)
# MAX_RESTARTS  how often torchrun begins anew when a rank fails; every machine counts its own. One that leaves its
#               network costs one, a machine that joins none
# RDZV_CONF     of torchrun's rendezvous: last_call_timeout=30 is how many seconds it waits for more than the fewest
set -euo pipefail

NUM_GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
RANKS=${RANKS:-$((NUM_GPUS > 0 ? NUM_GPUS : 1))}
NNODES=${NNODES:-1}
# Seconds from torchrun's signal to its SIGKILL, which must hold a step and a checkpoint (its own default is 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

SIZES=()
if [ "$NNODES" = 1 ]; then
  RENDEZVOUS=(--standalone)
else
  RENDEZVOUS=(--rdzv_backend=c10d --rdzv_endpoint="${HEAD:?host name of the first machine}:${PORT:-29400}" --rdzv_id="${RUN_ID:-panfm}")
  RENDEZVOUS+=(${ADDRESS:+"--local_addr=$ADDRESS"} ${RDZV_CONF:+"--rdzv_conf=$RDZV_CONF"})
fi
if [[ "$NNODES" == *:* ]]; then
  MAX_RESTARTS=${MAX_RESTARTS:-20}
  # Else torchrun (2.14) publishes the address of rank 0 in its first round only: who joins later waits for it in vain.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # So that a batch that does not divide over three machines is refused now, and not when the third one joins.
  SIZES=("engine.world_sizes=[$(seq -s, $((${NNODES%:*} * RANKS)) "$RANKS" $((${NNODES#*:} * RANKS)))]")
fi

torchrun --nnodes="$NNODES" --nproc_per_node="$RANKS" --max_restarts="${MAX_RESTARTS:-0}" "${RENDEZVOUS[@]}" \
  -m panfm pretrain "$@" "${SIZES[@]}" &
AGENT=$!
# torchrun would die of SIGUSR1 and, signalled, says 1 whatever its ranks said: they have saved when it is gone.
STOPPED=0
trap 'STOPPED=1; kill -TERM "$AGENT" 2>/dev/null || true' TERM USR1
trap : INT # the terminal sends it to torchrun too
CODE=0
wait "$AGENT" || CODE=$?
while kill -0 "$AGENT" 2>/dev/null; do # a signal ends `wait` before torchrun has ended
  CODE=0
  wait "$AGENT" || CODE=$?
done
if [ "$STOPPED" = 1 ] && [ "$CODE" != 0 ]; then
  CODE=75
fi
exit "$CODE"
