"""The EMA teacher: a float32 moving average of the student, which says what the student should predict.

    student (inside the engine)  --after each applied step-->  teacher = m * teacher + (1 - m) * student

The teacher is no part of the module tree that DeepSpeed wraps: it is not trained, not sharded, not in the engine's own
files. It is whole on every rank, and so must the student be while it is followed: under ZeRO 3, which shards the
student's parameters, `update` runs inside of `Engine.gather(students)`. Each rank averages for itself and all have the
same teacher to the bit. In bfloat16 a step of (1 - m) of the difference is mostly rounded away (100 steps at m = 0.9995
move it by a fiftieth of what they should), hence float32 always. lightly's update_momentum leaves buffers and the state
aside.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class

Module = TypeVar("Module", bound=nn.Module)


@config_class
class EmaConfig:
    """How slowly the teacher follows the student. A run has one teacher, so all its objectives say the same."""

    momentum: float = Field(default=0.994, ge=0.0, le=1.0)
    """Share of the old teacher that an update keeps, at the first step (DINOv2's ViT-L: 0.994). The teacher is about
    1 / (1 - momentum) steps behind: a run of a few hundred steps wants 0.9."""
    final_momentum: float = Field(default=1.0, ge=0.0, le=1.0)
    """The same at the last step, reached along half a cosine: the teacher comes to rest as the run ends."""
    export: Literal["teacher", "student"] = "teacher"
    """Which of the two is in a checkpoint's encoder.safetensors, hence measured and shared. DINO, iBOT and DINOv2 ship
    the teacher, which as an average over steps is the better one; student for runs too short for it to catch up."""


def compute_momentum(config: EmaConfig, step: int, num_steps: int) -> float:
    """Momentum of the update after optimizer step `step` (0-based) of a run of `num_steps`."""
    progress = min(step / max(num_steps - 1, 1), 1.0)
    return config.final_momentum - (config.final_momentum - config.momentum) * (1 + math.cos(math.pi * progress)) / 2


class EmaTeacher:
    """Moving averages of some of the student's modules, by name; see the docstring of this file."""

    def __init__(self, config: EmaConfig, num_steps: int) -> None:
        self.config = config
        self.num_steps = num_steps
        self._pairs: dict[str, tuple[nn.Module, nn.Module]] = {}  # name -> (student, teacher)

    def follow(self, name: str, student: Module) -> Module:
        """Begin a moving average of `student` at its present weights, and return it: frozen, float32, in eval mode."""
        teacher = copy.deepcopy(student).float().requires_grad_(False).eval()
        self._pairs[name] = (student, teacher)
        return teacher

    @property
    def students(self) -> list[nn.Module]:
        """The modules whose weights `update` reads."""
        return [student for student, _ in self._pairs.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the student, once after optimizer step `step`; buffers are copied."""
        weight = 1 - compute_momentum(self.config, step, self.num_steps)
        for student, teacher in self._pairs.values():
            averages: list[Tensor] = list(teacher.parameters())
            others = [new.detach().to(old.dtype) for old, new in zip(averages, student.parameters(), strict=True)]
            torch._foreach_lerp_(averages, others, weight)
            for own, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
                own.copy_(buffer)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor in place: what `nn.Module.to` does for the modules of a tree."""
        for _, teacher in self._pairs.values():
            teacher._apply(function)

    def get_state(self) -> dict[str, Tensor]:
        """The tensors themselves, as name.key."""
        states = {name: teacher.state_dict() for name, (_, teacher) in self._pairs.items()}
        return {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}


def find_misfit(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    """What keeps `saved` from taking the place of the tensors in `own`: a name or a shape; None: nothing."""
    for name, tensor in own.items():
        if name not in saved:
            return f"{name} is missing"
        if tensor.shape != saved[name].shape:
            return f"{name} is {tuple(saved[name].shape)} where this run has {tuple(tensor.shape)}"
    unknown = [name for name in saved if name not in own]
    return f"{unknown[0]} is unknown to this run" if unknown else None
