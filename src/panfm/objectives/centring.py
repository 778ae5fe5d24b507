"""How a teacher's logits become probabilities that do not collapse: centring, or Sinkhorn-Knopp.

    logits [n, K] of this rank, temperature  ->  Centre.forward     ->  probabilities [n, K]    a memory of past steps
                                             ->  compute_sinkhorn   ->  probabilities [n, K]    over the n of all ranks

Left to itself the teacher gives every image the same prototype, or every prototype the same probability. Centring
subtracts the mean logits of past steps, which works against the first (the low temperature against the second).
Sinkhorn-Knopp makes the batch share the prototypes evenly, which rules out both.
"""

import torch
from torch import Tensor, nn

from panfm.distributed import all_reduce_max, all_reduce_mean
from panfm.objectives.targets import widen

SINKHORN_ITERATIONS = 3  # as published (SwAV, DINOv2)


class Centre(nn.Module):
    """The running mean of a teacher's logits (Caron et al., "Emerging properties in self-supervised ViTs", ICCV 2021).

        probabilities = softmax((logits - centre) / temperature)
        after each applied step:  centre = momentum * centre + (1 - momentum) * mean logits of the step

    The mean is over all micro batches and ranks, each row alike, so it depends on neither; a step's logits are centred
    by what came before it. (The original averages the ranks' means, which for iBOT weighs the patches of a rank that
    has few of them more.) A step without a row leaves the centre alone.
    """

    value: Tensor  # [K], saved with the teacher, not with the weights

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes), persistent=False)
        self._sums: Tensor | None = None  # [K + 1]: sum and number of the rows since begin_step

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits [n, K] -> probabilities [n, K], and remember the logits for the end of the step."""
        sums = torch.cat([logits.sum(dim=0), logits.new_full((1,), logits.shape[0])])
        self._sums = sums if self._sums is None else self._sums + sums
        return ((logits - self.value) / temperature).softmax(dim=1)

    def begin_step(self) -> None:
        """Forget what a step that was not applied has left."""
        self._sums = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centre; every rank must call it."""
        assert self._sums is not None, "no logits since begin_step"
        sums = all_reduce_mean(self._sums)  # of both parts, so that their ratio is the mean over all rows
        mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp(min=torch.finfo(sums.dtype).tiny), self.value)
        self.value.lerp_(mean, 1 - self.momentum)
        self._sums = None


@torch.no_grad()
def compute_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Sinkhorn-Knopp over the logits [n, K] of all ranks (n may differ) -> probabilities [n, K], each row summing to 1.

        Q = exp(logits / temperature); three times: each column of Q divided by its sum, then each row by its sum

    Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020. The
    originals take exp of the logits as they are, which overflows float32 from 88 * temperature on (3.5 at 0.04). Here
    each column's maximum over all ranks is subtracted first, then each row's maximum. The first step divides by the
    column sums, so the former changes nothing; the latter is given back as the first weight of the row. So no sum is
    ever 0 or infinite, whatever the logits, and Q = u * E * v is never formed: an iteration is two products of the
    matrix E with a vector.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = widen(logits) / temperature  # a copy, which the rest of this works in
        num_rows, num_columns = scaled.shape
        lowest = scaled.new_full((num_columns,), torch.finfo(scaled.dtype).min)  # of a rank without a row
        column_max = all_reduce_max(scaled.amax(dim=0) if num_rows else lowest)  # [K]
        scaled -= column_max  # nowhere above 0, and 0 somewhere in each column
        row_max = scaled.amax(dim=1) if num_rows else scaled.new_zeros(0)  # [n]
        exponentials = scaled.sub_(row_max.unsqueeze(1)).exp_()  # E [n, K]: 1 somewhere in each row
        rows = row_max.exp()  # v [n]
        for _ in range(SINKHORN_ITERATIONS):
            # Mean or sum over ranks: a factor common to all columns cancels in the rows' sums.
            columns = 1 / all_reduce_mean(rows @ exponentials)  # u [K]
            rows = 1 / (exponentials @ columns)
        return exponentials.mul_(columns).mul_(rows.unsqueeze(1))
