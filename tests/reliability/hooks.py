"""What the tested processes do beyond `panfm pretrain`, as the environment says: take longer, or hang, at a step.

    PANFM_TEST_STEP_SECONDS=0.2     every step takes so much longer: a second machine has time to join
    PANFM_TEST_HANG=1:17            rank 1 sleeps for ever before step 17 (counted from 0)

The loop asks `compute_lr` once a step, so that is what is wrapped. Forked ranks call `install`; ranks that torchrun
starts get it by sitecustomize.py, which lies beside this file and whose folder the harness puts on PYTHONPATH.
"""

import os
import time
from collections.abc import Callable
from typing import Any


def wrap(compute_lr: Callable[..., float]) -> Callable[..., float]:
    """compute_lr with the delays that the environment asks for."""
    seconds = float(os.environ.get("PANFM_TEST_STEP_SECONDS", "0"))
    rank, _, step = os.environ.get("PANFM_TEST_HANG", "-1:-1").partition(":")
    hangs_at = int(step) if os.environ.get("RANK", "0") == rank else -1

    def compute(optim: Any, schedule: Any, step: int, batch_size: int) -> float:
        time.sleep(seconds)
        while step == hangs_at:
            time.sleep(1)
        return compute_lr(optim, schedule, step, batch_size)

    return compute


def install() -> None:
    """Wrap it where the loop finds it."""
    from panfm.training import pretrain

    pretrain.compute_lr = wrap(pretrain.compute_lr)
