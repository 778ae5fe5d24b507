"""What of an encoder learns in a fine-tuning, and at which rate: all of it, its last blocks, or a low-rank change.

    network -> choose_trained (full, lora, last_blocks) -> build_optimizer (a rate a layer) -> ... -> merge_lora

Works on every timm model: token models and CNNs alike. Layers are those that timm itself counts (group_matcher).
"""

from typing import Any, Literal, cast

import torch
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import RMSpropTF, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.utils import parametrize

from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError

Trained = Literal["full", "lora", "last_blocks"]
BatchNorm = nn.modules.batchnorm._BatchNorm
RESIDUAL_NAMES = ("drop_path", "drop_path1", "drop_path2")  # what timm calls the place in a residual block


class LowRankUpdate(nn.Module):
    """LoRA (Hu 2022, arXiv 2106.09685) as a parametrization: W -> W + (alpha / rank) up @ down, in W's own shape.

    up [out, rank] begins at zero, so the first step sees the encoder as it was. A convolution is taken as the matrix
    [out, in * kernel]. A parametrization rather than a layer around the layer, because several models read
    `module.weight` themselves (BEiT and EVA join it with a bias of their own): a layer around it would be passed by.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        num_out, num_in = weight.shape[0], weight[0].numel()
        rank = min(rank, num_out, num_in)
        self.down = nn.Parameter(torch.empty(rank, num_in, device=weight.device))
        self.up = nn.Parameter(torch.zeros(num_out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its change, in the weight's shape."""
        # Outside autocast: what is merged at the end is then what was trained, not its half-precision neighbour.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).view_as(weight)


def choose_trained(
    network: EncoderNetwork, trained: Trained, *, lora_rank: int, lora_alpha: float, num_last_blocks: int
) -> None:
    """Set in place which parameters learn; for `lora` the low-rank factors are added and learn alone.

    Raises UserError where the model has nothing to adapt, or timm names no layers of it.
    """
    network.requires_grad_(trained == "full")
    if trained == "lora":
        targets = _find_lora_targets(network)
        if not targets:
            raise UserError(
                f"{network.where}: {type(network.model).__name__} has no linear layer and no undivided convolution, so "
                f"finetune.train (lora) has nothing to adapt; use full or last_blocks"
            )
        for module, name in targets:
            parametrize.register_parametrization(
                module, name, LowRankUpdate(getattr(module, name), lora_rank, lora_alpha)
            )
    elif trained == "last_blocks":
        _free_last_blocks(network, num_last_blocks)


def merge_lora(network: nn.Module) -> None:
    """Write the low-rank change into the weights and take the factors out; a network without them stays as it is."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _find_lora_targets(network: EncoderNetwork) -> list[tuple[nn.Module, str]]:
    """The projections of attention and MLP; in models of feature maps also convolutions that mix all channels."""
    targets: list[tuple[nn.Module, str]] = []
    for module in network.model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            targets.append((module, "in_proj_weight"))
        is_map = isinstance(module, nn.Conv2d) and module.groups == 1 and not network.is_token_model
        if isinstance(module, nn.Linear) or is_map:
            targets.append((module, "weight"))
    return targets


def _free_last_blocks(network: EncoderNetwork, num_last_blocks: int) -> None:
    """Let the last blocks learn, and what is behind them. A block is a layer of timm's that holds a weight matrix."""
    model = network.model
    if not hasattr(model, "group_matcher"):
        raise UserError(
            f"{network.where}: timm names no layers of {type(model).__name__}, so finetune.train (last_blocks) cannot "
            f"tell its last ones; use full or lora"
        )
    layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    # A layer of a norm alone (behind the pooling) is no block.
    blocks = sorted({layer for name, layer in layer_of.items() if parameters[name].ndim > 1})
    first = blocks[-min(num_last_blocks, len(blocks))]
    for name, parameter in parameters.items():
        parameter.requires_grad_(layer_of[name] >= first)


def set_drop_path(network: EncoderNetwork, rate: float) -> None:
    """Leave out residual branches at random in training: linearly from 0 in the first block to `rate` in the last.

    Huang 2016, arXiv 1603.09382. Raises UserError for a model without residual blocks.
    """
    if rate == 0:
        return
    blocks = [module for module in network.model.modules() if any(hasattr(module, name) for name in RESIDUAL_NAMES)]
    if not blocks:
        raise UserError(
            f"{network.where}: {type(network.model).__name__} has no residual branches that can be left out; "
            f"finetune.drop_path ({rate:g}) must be 0 for it"
        )
    for depth, block in enumerate(blocks):
        for name in RESIDUAL_NAMES:
            if hasattr(block, name):
                setattr(block, name, DropPath(rate * depth / max(len(blocks) - 1, 1)))


def set_train_mode(network: nn.Module, batch_norm: Literal["frozen", "trained"]) -> None:
    """Train mode; batch norms keep their statistics, unless they are to follow and their own scale learns."""
    network.train()
    for module in network.modules():
        if isinstance(module, BatchNorm):
            learns = any(parameter.requires_grad for parameter in module.parameters())
            module.train(batch_norm == "trained" and learns)


def build_optimizer(
    network: EncoderNetwork,
    head: nn.Linear,
    *,
    optimizer: Literal["adamw", "rmsprop"],
    base_lr: float,
    layer_decay: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """One group a layer: base_lr for head and last layer, times layer_decay for each further down; none if frozen.

    rmsprop is TensorFlow's, with the constants of Esteva et al. 2017: decay 0.9, momentum 0.9, epsilon 0.1 inside the
    root.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        network.model, weight_decay=weight_decay, layer_decay=layer_decay
    )
    for group in groups:
        # timm scales from its last layer, which here is the last block: that learns at the rate of the head.
        group["lr"] = base_lr * group.pop("lr_scale")
    groups.append({"params": [head.weight], "lr": base_lr, "weight_decay": weight_decay})
    groups.append({"params": [head.bias], "lr": base_lr, "weight_decay": 0.0})
    if optimizer == "rmsprop":
        return cast(torch.optim.Optimizer, RMSpropTF(groups, alpha=0.9, momentum=0.9, eps=0.1))
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))
