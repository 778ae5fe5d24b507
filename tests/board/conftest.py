"""Real archives for the board: those that the protocols are tested on."""

from tests.evaluation.conftest import clinic, give_make_task

__all__ = ["clinic", "give_make_task"]
