"""Continue from published weights: every key accounted for, nothing re-initialised in silence.

    state_dict under its publisher's names, encoder  ->  fit_weights  ->  the encoder holds them, InitReport says how

Understood are the names of timm (an export of panfm, too), MAE, DINOv2, DINOv3, BEiT, CAE and PanDerm. A weight that is
missing, unknown or of another shape is an error, with two exceptions: what the caller allows by name to stay random
(registers that are added), and what only pretraining or a classifier had and an encoder has not (IGNORED).

timm's own `checkpoint_filter_fn` converts the same files and was not taken: it forgives (it leaves out DINOv3's biases
where the model has none, whatever their values, and takes the position embedding of a model with other prefix tokens
for another grid) and does not say what it did. The tests hold this file to it where both can read a checkpoint.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from panfm.errors import UserError
from panfm.models.vit import Vit, get_patch_grid

How = Literal["copied", "renamed", "resized", "converted", "random", "ignored"]
ANCHOR = "patch_embed.proj.weight"  # every ViT has it, under every publisher's name: what stands before it is a prefix
FEW = 4  # faults that an error names
WAY_OUT = (
    "the weights must be those of encoder.name, patch_size, num_registers and layer_scale; what may stay random is "
    "named in encoder.init_random"
)

# Other publishers' names for weights that are the same; the first that the encoder has is taken.
RENAMES = (
    (r"gamma_([12])$", r"ls\1.gamma"),  # BEiT, CAE, PanDerm -> timm's VisionTransformer
    (r"ls([12])\.gamma$", r"gamma_\1"),  # DINOv3 -> timm's Eva
    (r"^(register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
    (r"mlp\.w12\.", "mlp.fc1."),  # DINOv2's gated MLP
    (r"mlp\.w1\.", "mlp.fc1_g."),  # DINOv3's
    (r"mlp\.w2\.", "mlp.fc1_x."),
    (r"mlp\.w3\.", "mlp.fc2."),
    (r"^fc_norm\.", "norm."),  # a final norm that stood behind the pooling
)

# What published checkpoints hold besides the encoder, and why it is left out.
IGNORED = (
    (r"^decoder_|^decoder\.", "the decoder of pretraining"),
    (r"^mask_token$", "stood for hidden patches in pretraining"),
    (r"^(head|head_dist|fc|lm_head|dino_head|ibot_head|attn_pool|pre_logits)\.", "a head"),
    (r"^local_cls_norm\.", "the norm of DINOv3's local crops"),
    (r"^rope(_embed)?\.(?!freqs$)", "rotary positions are computed"),
    (r"attn\.qkv\.bias_mask$", "applied to attn.qkv.bias"),
    (r"attn\.relative_position_index$", "a table of indices"),
)
# Of these, what timm's own files have, too.
_ALSO_OF_TIMM = frozenset({RENAMES[0][0], RENAMES[1][0], r"^fc_norm\.", IGNORED[2][0]})


@dataclass(frozen=True)
class WeightEntry:
    """What became of one key: of the encoder, or (ignored) of the file."""

    name: str
    how: How
    detail: str = ""  # where it came from, from which to which size, why it was ignored


@dataclass(frozen=True)
class InitReport:
    """What became of every key of a start from weights."""

    source: str  # the encoder address or file, as the config names it
    entries: tuple[WeightEntry, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of keys by what became of them."""
        return dict(Counter(entry.how for entry in self.entries))

    def to_lines(self) -> list[str]:
        """The report for a reader: the counts, then all that was not merely copied, blocks taken together."""
        lines = [f"start from {self.source}: {', '.join(f'{number} {how}' for how, number in self.counts.items())}"]
        groups = Counter(
            (entry.how, re.sub(r"blocks\.\d+\.", "blocks.*.", entry.name), re.sub(r"\.\d+\.", ".*.", entry.detail))
            for entry in self.entries
            if entry.how != "copied"
        )
        for (how, name, detail), number in groups.items():
            lines.append(f"  {how} {name}{f' (x {number})' if number > 1 else ''}{f': {detail}' if detail else ''}")
        return lines

    def to_plain(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"source": self.source, "counts": self.counts, "weights": [asdict(entry) for entry in self.entries]}


def fit_weights(
    vit: Vit,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    random: Collection[str] = (),
    grid: tuple[int, int] | None = None,
    way_out: str = WAY_OUT,
) -> InitReport:
    """Copy a published state_dict into the encoder; its position embedding and patches are resized to the encoder's.

    source: what to call it in errors and in the report.
    random: weights that it may lack and that stay as they are, by name or by a part of it ("reg_token", "ls1").
    grid: rows and columns of its position embedding; None: square.
    way_out: what an error tells the user to do.
    Raises UserError, and leaves the encoder alone, where a weight is missing, unknown, of another shape, not finite.
    """
    own = vit.state_dict()
    fit = _Fit()
    given = _select(weights, source, fit)
    unknown: list[str] = []
    for name, tensor in given.items():
        if name in own:
            fit.take(name, tensor, "copied")
        elif (new := _rename(name, own, given)) is not None:
            fit.take(new, tensor, "renamed", f"from {name}")
        elif not _convert_bias(name, given, own, fit):
            unknown.append(name)
    _fit_positions(vit, fit, grid)
    _fit_patches(vit, fit)
    fitted = fit.tensors

    missing = [name for name in own if name not in fitted]
    allowed = [name for name in missing if any(part == name or part in name.split(".") for part in random)]
    for name in allowed:
        fit.take(name, own[name], "random", "allowed by encoder.init_random")
    faults = [f"{name} is missing" for name in missing if name not in allowed]
    faults += [f"{name} is unknown to the encoder" for name in unknown]
    faults += [
        f"{part} of encoder.init_random names no weight that is missing"
        for part in random
        if not any(part == name or part in name.split(".") for name in allowed)
    ]
    faults += [
        f"{name} is {list(tensor.shape)} where the encoder has {list(own[name].shape)}"
        for name, tensor in fitted.items()
        if tensor.shape != own[name].shape
    ]
    faults += [f"{name} is not finite" for name, tensor in fitted.items() if not bool(torch.isfinite(tensor).all())]
    if faults:
        more = f" (and {len(faults) - FEW} more)" if len(faults) > FEW else ""
        raise UserError(f"{source}: {'; '.join(faults[:FEW])}{more}; {way_out}")
    vit.load_state_dict(fitted)
    order = [*own, *(name for name in fit.entries if name not in own)]
    return InitReport(source, tuple(fit.entries[name] for name in order))


def has_published_names(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict is under another publisher's names than timm's, or holds what only pretraining had."""
    if not any(name.endswith(ANCHOR) for name in weights):
        return False
    patterns = [pattern for pattern, _ in (*RENAMES, *IGNORED) if pattern not in _ALSO_OF_TIMM]
    return ANCHOR not in weights or any(re.search(pattern, name) for pattern in patterns for name in weights)


class _Fit:
    """What has been found for the encoder so far, and what became of each key."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, WeightEntry] = {}

    def take(self, name: str, tensor: Tensor, how: How, detail: str = "") -> None:
        self.tensors[name] = tensor
        self.entries[name] = WeightEntry(name, how, detail)

    def ignore(self, name: str, why: str) -> None:
        self.entries[name] = WeightEntry(name, "ignored", why)


def _select(weights: Mapping[str, Tensor], source: str, fit: _Fit) -> dict[str, Tensor]:
    """The encoder's own weights, without the one prefix (encoder., backbone., module., ...) that they share.

    What lies beside the prefix, and what IGNORED lists, is left out; masks of biases (DINOv3) are applied on the way.
    """
    prefixes = [name.removesuffix(ANCHOR) for name in weights if name.endswith(ANCHOR)]
    if len(prefixes) != 1 or (prefixes[0] and not prefixes[0].endswith(".")):
        held = f"holds {len(prefixes)} encoders ({', '.join(prefixes)})" if prefixes else f"has no {ANCHOR}"
        raise UserError(
            f"{source}: {held}, so it is no checkpoint of one ViT (it begins with {', '.join(list(weights)[:3])}); "
            "give the weights of one encoder, under the names of timm, MAE, DINOv2, DINOv3 or PanDerm"
        )
    (prefix,) = prefixes
    kept: dict[str, Tensor] = {}
    for full_name, tensor in weights.items():
        name = full_name.removeprefix(prefix)
        why = next((why for pattern, why in IGNORED if re.search(pattern, name)), None)
        if not full_name.startswith(prefix):
            fit.ignore(full_name, f"beside the encoder, whose names begin with {prefix}")
        elif why is not None:
            fit.ignore(full_name, why)
        elif (mask := weights.get(f"{full_name}_mask")) is not None:
            kept[name] = torch.where(mask == 0, torch.zeros_like(tensor), tensor)
        else:
            kept[name] = tensor
    return kept


def _rename(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The encoder's name of a weight under another publisher's, if nothing else has that name."""
    for pattern, replacement in RENAMES:
        new = re.sub(pattern, replacement, name)
        if new != name and new in own and new not in given:
            return new
    return None


def _convert_bias(name: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor], fit: _Fit) -> bool:
    """Biases of queries and values: one vector in some models, two in others; that of the keys is always zero."""
    stem, _, last = name.rpartition("attn.")
    fused, q_name, v_name = (f"{stem}attn.{part}" for part in ("qkv.bias", "q_bias", "v_bias"))
    if last in ("q_bias", "v_bias") and fused in own and q_name in given and v_name in given:
        q, v = given[q_name], given[v_name]
        fit.take(fused, torch.cat([q, torch.zeros_like(q), v]), "converted", f"{q_name}, zero, {v_name}")
        return True
    if last != "qkv.bias":
        return False
    q, k, v = given[name].chunk(3)
    if q_name in own and not bool(k.any()):
        fit.take(q_name, q, "converted", f"first third of {name}")
        fit.take(v_name, v, "converted", f"last third of {name}")
        return True
    if q_name not in own and not bool(given[name].any()):
        fit.ignore(name, "zero everywhere, and the encoder has no such bias")
        return True
    return False


def _fit_positions(vit: Vit, fit: _Fit, grid: tuple[int, int] | None) -> None:
    """Bring the table of positions to the encoder's layout (rows of prefix tokens) and grid.

    Rows of prefix tokens that the encoder's table has not are added to those tokens; rows that it has more are zero:
    either way the network computes what it did.
    """
    table = fit.tensors.get("pos_embed")
    if table is None or table.ndim != 3:
        return
    prefix = [name for name in ("cls_token", "reg_token") if name in fit.tensors]
    num_prefix = sum(fit.tensors[name].shape[1] for name in prefix)
    wanted = 0 if vit.no_embed_class else vit.num_prefix_tokens
    target = get_patch_grid(vit)
    found = _find_prefix_rows(table.shape[1], {wanted, 0, int("cls_token" in prefix), num_prefix}, grid, target)
    if found is None:
        return  # the shapes will not agree, and that is named
    num_rows, grid = found
    rows, patches = table[:, :num_rows], table[:, num_rows:]
    done: list[str] = []
    if num_rows and not wanted:
        for name in prefix:
            own_rows, rows = rows.tensor_split([fit.tensors[name].shape[1]], dim=1)
            if own_rows.shape[1]:
                fit.take(name, fit.tensors[name] + own_rows, "converted", "its rows of pos_embed are added")
        done.append("rows of prefix tokens moved into the tokens")
    elif num_rows < wanted:
        rows = torch.cat([rows, rows.new_zeros(1, wanted - num_rows, rows.shape[2])], dim=1)
        done.append(f"rows of zero for {wanted - num_rows} prefix tokens")
    if grid != target:
        patches = resample_abs_pos_embed(patches, list(target), list(grid), num_prefix_tokens=0)
        done.append(f"from {grid[0]} x {grid[1]} to {target[0]} x {target[1]} patches")
    if done:
        how: How = "resized" if grid != target else "converted"
        fit.take("pos_embed", torch.cat([rows, patches], dim=1), how, "; ".join(done))


def _find_prefix_rows(
    num_rows: int, choices: set[int], grid: tuple[int, int] | None, target: tuple[int, int]
) -> tuple[int, tuple[int, int]] | None:
    """How many of the rows of a position table belong to prefix tokens, and the grid of the others."""
    if grid is not None:
        return (num_rows - math.prod(grid), grid) if num_rows - math.prod(grid) in choices else None
    fits = [number for number in choices if num_rows - number == math.prod(target)]
    if len(fits) == 1:
        return fits[0], target
    sides = {number: math.isqrt(num_rows - number) for number in choices if num_rows > number}
    squares = [number for number, side in sides.items() if side**2 == num_rows - number]
    if len(squares) != 1:
        return None
    return squares[0], (sides[squares[0]], sides[squares[0]])


def _fit_patches(vit: Vit, fit: _Fit) -> None:
    """Resize the filters of the patch embedding, so that a resized patch gives the same token (FlexiViT, CVPR 2023)."""
    weight, own = fit.tensors.get(ANCHOR), vit.patch_embed.proj.weight
    if weight is not None and weight.ndim == 4 and weight.shape[:2] == own.shape[:2] and weight.shape != own.shape:
        detail = f"from patches of {' x '.join(map(str, weight.shape[2:]))} to {' x '.join(map(str, own.shape[2:]))}"
        fit.take(ANCHOR, resample_patch_embed(weight, list(own.shape[2:])), "resized", detail)
