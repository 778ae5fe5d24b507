"""Gradient caching: a loss that compares all images of a step, though only a micro batch of them fits into memory.

    1. every micro batch  --no gradient-->  what the loss compares (embeddings, small)
    2. all of them joined, and gathered over ranks  ->  loss  ->  its gradient by every embedding
    3. every micro batch once more, with gradients: sum(embedding * its cached gradient)  ->  the exact gradient

Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", RepL4NLP 2021. It costs one more
forward pass of the views that are compared. Both passes must draw the same random numbers (stochastic depth).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from panfm.data.batch import Batch
from panfm.objectives.interface import EncodedView, ObjectiveOutput


@runtime_checkable
class Comparing(Protocol):
    """An objective whose loss compares the images of a batch, in two parts: each image by itself, then all together."""

    def represent(self, views: tuple[EncodedView, ...], batch: Batch) -> Tensor:
        """Encoded views (and the batch's texts) -> what is compared [V, B, D]."""

    def compare(self, embeddings: Tensor, batch: Batch) -> ObjectiveOutput:
        """All that is compared [V, B, D] -> loss; of `batch` only its numbers (ids, modalities) are there."""


@dataclass(frozen=True)
class CachedGradients:
    """The joined loss of a step, and how it pulls at one of its micro batches."""

    output: ObjectiveOutput  # of all micro batches joined, without gradient
    embeddings: Tensor  # gradient by the embeddings [V, B, D] of this micro batch
    parameters: dict[str, Tensor]  # gradient by those of the objective's parameters that compare (a temperature)
    num_micro_batches: int

    def replay(self, objective: nn.Module, embeddings: Tensor) -> ObjectiveOutput:
        """The joined loss, whose gradient is this micro batch's part of it.

        The engine averages the losses of micro batches, hence the factor; each gives its share by the parameters.
        """
        pull = self.num_micro_batches * (embeddings * self.embeddings).sum()
        for name, gradient in self.parameters.items():
            parameter = objective.get_parameter(
                name
            )  # by its name: so ZeRO 3 sees that it is used here, and gathers it
            assert parameter.shape == gradient.shape, f"{name}: {parameter.shape}"  # an empty one would broadcast
            pull = pull + (parameter * gradient).sum()
        return ObjectiveOutput(self.output.loss + (pull - pull.detach()), self.output.metrics)


def cache_gradients(
    objective: nn.Module, embeddings: Sequence[Tensor], batches: Sequence[Batch]
) -> list[CachedGradients]:
    """Compare the embeddings [V, B, D] of all micro batches (in order) of this rank and of all others; step 2 above."""
    assert isinstance(objective, Comparing)
    leaf = torch.cat(list(embeddings), dim=1).requires_grad_()
    parameters = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    output = objective.compare(leaf, _join(batches))
    # Not backward(): the engine counts on its own passes to fill the parameters' gradients.
    gradient, *rest = torch.autograd.grad(output.loss, [leaf, *parameters.values()], allow_unused=True)
    by_parameter = {name: found for name, found in zip(parameters, rest, strict=True) if found is not None}
    joined = ObjectiveOutput(output.loss.detach(), output.metrics)
    parts = gradient.split([len(batch.positions) for batch in batches], dim=1)
    return [CachedGradients(joined, part, by_parameter, len(batches)) for part in parts]


def _join(batches: Sequence[Batch]) -> Batch:
    """The numbers of several micro batches, one after the other, without pixels, masks and texts."""
    absent: dict[str, Any] = {"views": (), "masks": None, "texts": None}
    names = [field.name for field in fields(Batch) if field.name not in absent]
    names = [name for name in names if getattr(batches[0], name) is not None]
    return Batch(**absent | {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})
