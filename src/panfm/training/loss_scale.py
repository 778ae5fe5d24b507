"""The factor of the loss under fp16: gradients too small for half precision are lifted into it, and put back after.

    LossScale, whether the gradient overflowed  ->  compute_next_loss_scale  ->  LossScale of the next step

A pure function of what happened, the same on every rank, whose state a checkpoint holds. Factors are powers of two, so
that they change no digit. torch's GradScaler was not taken: under ZeRO DeepSpeed 0.19.8 steps one for each parameter
group by itself, so that one group may be updated with another factor than its gradient has, or be left out alone, and
clips the gradient before the factor is taken off.
"""

from dataclasses import dataclass

INITIAL = 2.0**16
SMALLEST = 1.0  # an overflow without any factor is not the factor's fault
LARGEST = 2.0**24
GROWTH_STEPS = 2000  # applied steps in a row after which a larger factor is tried, as in torch's GradScaler


@dataclass(frozen=True)
class LossScale:
    """The factor, and how many steps in a row have been applied with it."""

    value: float = INITIAL
    num_applied: int = 0


def compute_next_loss_scale(scale: LossScale, *, overflowed: bool) -> LossScale:
    """Half of it after a gradient that was not finite; twice of it where all went well for long."""
    if overflowed:
        return LossScale(max(scale.value / 2, SMALLEST))
    if scale.num_applied + 1 >= GROWTH_STEPS:
        return LossScale(min(scale.value * 2, LARGEST))
    return LossScale(scale.value, scale.num_applied + 1)
