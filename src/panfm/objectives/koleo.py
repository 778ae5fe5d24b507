"""KoLeo: a regulariser that spreads the images of a batch over the sphere.

    features [B, D] of each rank  ->  compute_koleo  ->  losses [B]

lightly's KoLeoLoss has the same numbers for one process and was not taken: it looks at its own rank only, and images
that are the same to the bit send it a gradient of 1e7 along a direction that means nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from panfm.distributed import gather_with_gradient, get_rank
from panfm.objectives.targets import widen

EPS = 1e-8
IDENTICAL = 1e-6  # distance on the sphere under which float32 does not tell two images apart


def compute_koleo(features: Tensor) -> Tensor:
    """Loss of each of this rank's features [B, D] (B alike on all ranks) against those of all ranks -> [B].

        x = f / |f|;  j(i) = argmax over j != i of x_i . x_j;  loss_i = -log(|x_i - x_j(i) + eps| + eps),  eps = 1e-8

    Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, as in DINOv2, which takes the mean of it
    over the images of each rank by itself. Here the neighbours come from all ranks, with exact gradients through both
    ends of a pair under the averaging that DDP and DeepSpeed do: so the number of ranks does not change the loss.
    Float32 or wider. Images that are the same have their loss but no gradient: there is no direction that parts them.
    A single image has no neighbour: its loss is 0, with its gradient path in place.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(widen(features), dim=1, eps=EPS)  # [B, D]
        others = gather_with_gradient(x)  # [world_size * B, D]
        if len(others) < 2:
            return (x * 0).sum(dim=1)
        with torch.no_grad():
            cosines = x @ others.T
            rows = torch.arange(len(x), device=x.device)
            cosines[rows, rows + get_rank() * len(x)] = -2.0  # not its own neighbour
            nearest = cosines.argmax(dim=1)
        distances = (x - others[nearest] + EPS).norm(dim=1)
        distances = torch.where(distances > IDENTICAL, distances, distances.detach())
        return -(distances + EPS).log()
