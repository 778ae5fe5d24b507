#!/usr/bin/env bash
# What must be shown on GPUs and was not yet, on the machine that you have:  launch/gpu_check.sh [SHARDS ...]
#
# 1. panfm doctor on every GPU: versions, NCCL, all-reduce, disk
# 2. pytest -m gpu: losses on one GPU and on several (NCCL, ZeRO 0-3) against the CPU, resume, throughput, MFU, energy
# 3. with SHARDS: the plan of mae_vitb on all GPUs, from two real steps
#
# Everything is written under OUT, gpu_check by default. Please send that folder with an issue: it holds numbers, versions
# and the names of GPUs, no images and no paths of patients. It needs `pip install -e ".[dev]"` in a checkout.
set -uo pipefail

OUT=${OUT:-gpu_check}
NUM_GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if [ "$NUM_GPUS" = 0 ]; then
  echo "gpu_check: nvidia-smi lists no GPU; this script shows nothing without one" >&2
  exit 2
fi
mkdir -p "$OUT"
FAILED=0
RANKS=(torchrun --standalone --nproc_per_node="$NUM_GPUS" -m panfm)

"${RANKS[@]}" doctor --folder "$OUT" 2>&1 | tee "$OUT/doctor.txt" || FAILED=1
python -m pytest -m gpu -rA --junitxml="$OUT/tests.xml" 2>&1 | tee "$OUT/tests.txt" || FAILED=1
if [ "$#" -gt 0 ]; then
  LIST=$(printf '%s,' "$@")
  "${RANKS[@]}" pretrain mae_vitb data.shards="[${LIST%,}]" engine.micro_batch_size=64 \
    engine.global_batch_size=$((64 * NUM_GPUS)) --dry-run 2>&1 | tee "$OUT/plan.txt" || FAILED=1
fi
echo "gpu_check: $([ "$FAILED" = 0 ] && echo "all well" || echo "something failed"); see $OUT"
exit "$FAILED"
