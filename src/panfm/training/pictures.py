"""Pictures of what the encoder makes of an image: what it sees, what it fills in, what it tells apart, where it looks.

    Loader                      ->  choose_examples  ->  one image of each modality, with its mask: the same every time
    examples, PretrainingModel  ->  compute_panels   ->  uint8 panels [S, S, 3] by title
    panels                      ->  draw_sheet       ->  one PNG: a row for each modality, a column for each panel

Panels: the image; what is visible of it; for a pixel target the prediction pasted into the hidden places; the patch
tokens' first three principal components as red, green and blue; the attention of the last block laid over the image. A
picture names modalities and steps, never a key.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from panfm.data.decode import DecodeError
from panfm.data.loader import Loader
from panfm.data.transforms import EvalTransform
from panfm.models.vit import encode_visible, split_mask
from panfm.objectives.masked_image import MaskedPixels
from panfm.objectives.pretraining import PixelNormaliser, PretrainingModel
from panfm.objectives.targets import NORM_EPS, compute_pixel_targets
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.schema import MODALITIES
from panfm.training.monitor import compute_attention, evaluating

Panel = NDArray[np.uint8]  # [S, S, 3]
GREY = 128  # of what is hidden
MIN_SIDE = 192  # pixels of a drawn panel: smaller images are enlarged by a whole factor
GAP, HEADER, MARGIN = 10, 58, 14  # pixels
NUM_DRAWN = 32  # positions of the stream that are drawn at once in the search for examples
MAX_POSITIONS = 1024  # and in all
MAX_HEAT = 4  # times the mean attention: where the heat scale ends
HEAT_SHARE = 0.65  # of heat in what is laid over the grey image
# Dark blue over violet and orange to pale yellow: steps of even lightness, also for colour-blind eyes.
HEAT = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)


@dataclass(frozen=True)
class Examples:
    """The images that are drawn time and again: the first of each modality in the run's own stream."""

    modalities: tuple[str, ...]
    images: Tensor  # uint8 [N, 3, S, S], by the evaluation transform: a random crop may show nothing but skin
    masks: Tensor | None  # bool [N, num_patches], True = hidden; None: no objective hides patches
    are_open: bool  # every one is of a source whose card says `access: open`


def choose_examples(loader: Loader, transform: EvalTransform) -> Examples:
    """Look through the first positions of the stream for one example of each modality.

    They follow from the seed, so that every picture of a run shows the same ones, resumed or not. A modality of which
    less than one image in MAX_POSITIONS is drawn may be left out.
    """
    wanted = {modality for source in loader.sources for modality in source.num_by_modality}
    paths = {fact.source: fact.path for fact in loader.sources}
    shard_sets: dict[str, ShardSet] = {}
    found: dict[str, tuple[NDArray[np.uint8], Tensor | None]] = {}
    for start in range(0, MAX_POSITIONS, NUM_DRAWN):
        drawn = loader.draw(range(start, start + NUM_DRAWN))
        for number, sample in enumerate(drawn.samples):
            if sample.modality in found:
                continue
            if sample.source not in shard_sets:
                shard_sets[sample.source] = open_shard_set(paths[sample.source], ())
            mask = None if drawn.batch.masks is None else drawn.batch.masks[0][number]
            with suppress(DecodeError):  # the loader reports it
                image = transform.apply(shard_sets[sample.source].read_image(sample.row))
                found[sample.modality] = (image, mask)
        if wanted <= found.keys():
            break
    modalities = tuple(name for name in MODALITIES if name in found)
    images, masks = zip(*(found[name] for name in modalities), strict=True)
    return Examples(
        modalities,
        torch.from_numpy(np.stack(images)),
        None if masks[0] is None else torch.stack(masks),
        are_open=all(shard_set.card.access == "open" for shard_set in shard_sets.values()),
    )


def compute_panels(model: PretrainingModel, examples: Examples) -> list[dict[str, Panel]]:
    """The panels of each example by title, in the order in which they are drawn; images at the encoder's own size."""
    device = next(model.parameters()).device
    encoder = model.exported_encoder
    images = examples.images.to(device)
    columns: dict[str, Sequence[Panel]] = {"image": [_to_panel(image) for image in images]}
    if examples.masks is not None:
        masks = examples.masks.to(device)
        columns["visible"] = [_to_panel(image) for image in hide(images, masks, encoder.patch_embed.patch_size)]
        for objective in model.objectives.values():
            if isinstance(objective, MaskedPixels):
                filled = fill_in(model, objective, images, masks)
                columns["filled in"] = [_to_panel(image) for image in filled]
                break
    with evaluating(encoder):
        tokens = encode_visible(encoder, images, None, model.normalise)[:, encoder.num_prefix_tokens :].float()
    side = images.shape[-1]
    rows = side // encoder.patch_embed.patch_size[0]
    columns["tokens, PCA as RGB"] = [_enlarge(compute_token_colours(one, rows), side) for one in tokens]
    attention = compute_attention(encoder, images, model.normalise)  # [N, heads, T]
    patches = attention[:, :, encoder.num_prefix_tokens :].mean(dim=1)  # [N, num_patches]
    columns[f"attention, 0 to {MAX_HEAT} x its mean"] = [
        lay_over(image, one.unflatten(0, (rows, -1))) for image, one in zip(images, patches, strict=True)
    ]
    return [{title: panels[number] for title, panels in columns.items()} for number in range(len(images))]


def hide(images: Tensor, masks: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Paint the hidden patches grey: images uint8 [N, 3, H, W], masks bool [N, num_patches]."""
    return torch.where(_to_pixels(masks, images, patch_size), torch.full_like(images, GREY), images)


def fill_in(model: PretrainingModel, objective: MaskedPixels, images: Tensor, masks: Tensor) -> Tensor:
    """Paste what the decoder predicts into the hidden patches of images uint8 [N, 3, H, W].

    Where the target was standardised patch by patch, a prediction gets back the mean and the deviation of its true
    patch, as in MAE's own pictures: the decoder was never asked for them.
    """
    size = objective.patch_size
    split = split_mask(masks)
    with evaluating(model):
        visible = encode_visible(model.encoder, images, split, model.normalise)
        predicted = objective.decoder(visible, split).float()  # [N, hidden, p * p * 3]
    grid = (images.shape[2] // size[0], images.shape[3] // size[1])
    if objective.patch_normalise:
        true = compute_pixel_targets(images, split.hidden, size, model.normalise, patch_normalise=False)
        variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
        predicted = predicted * (variance + NORM_EPS).sqrt() + mean
    patches = predicted.new_zeros((len(images), masks.shape[1], predicted.shape[2]))  # [N, num_patches, p * p * 3]
    patches = patches.scatter(1, split.hidden.unsqueeze(-1).expand_as(predicted), predicted)
    pixels = _denormalise(_join(patches, grid, size), model.normalise)
    return torch.where(_to_pixels(masks, images, size), pixels, images)


def compute_token_colours(tokens: Tensor, rows: int) -> Panel:
    """Colour patch tokens [num_patches, D] by their first three principal components -> uint8 [rows, columns, 3].

    Each component is stretched over its own range, one value in fifty cut off at either end. Its sign is such that the
    sum of cubes is positive, so that what is rare in the image (a lesion on skin) is bright at every step.
    """
    centred = torch.nan_to_num(tokens.double() - tokens.double().mean(dim=0))
    components = torch.linalg.svd(centred, full_matrices=False)[2][:3]  # [3, D], or fewer of a tiny image
    scores = centred @ components.T  # [num_patches, 3]
    scores = scores * torch.where((scores**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=scores.dtype, device=scores.device), dim=0)
    shares = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(tokens), 3), 0.5, dtype=shares.dtype)
    colours[:, : shares.shape[1]] = shares.cpu()
    panel: Panel = (colours * 255 + 0.5).to(torch.uint8).unflatten(0, (rows, -1)).numpy()
    return panel


def lay_over(image: Tensor, weights: Tensor) -> Panel:
    """Lay attention weights [rows, columns] as heat over the grey image uint8 [3, H, W] -> uint8 [H, W, 3].

    The scale is fixed, from 0 to MAX_HEAT times the mean weight: an encoder that looks everywhere alike gives an even
    picture, where a scale from the least to the most would show noise as structure.
    """
    weights = torch.nan_to_num(weights.float())
    shares = weights / weights.mean().clamp(min=1e-12) / MAX_HEAT
    size = (image.shape[1], image.shape[2])
    heat = interpolate(shares[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).cpu().numpy()
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, stops, [stop[channel] for stop in HEAT]) for channel in range(3)], axis=-1)
    grey = image.float().mean(dim=0).cpu().numpy()[..., None]
    return ((1 - HEAT_SHARE) * grey + HEAT_SHARE * colours + 0.5).astype(np.uint8)


def draw_sheet(panels: Sequence[dict[str, Panel]], names: Sequence[str], title: str) -> Image.Image:
    """Lay out panels: a row for each of `names`, a column for each title; small ones enlarged by a whole factor."""
    side = next(iter(panels[0].values())).shape[0]
    side *= -(-MIN_SIDE // side)
    titles = list(panels[0])
    label = 118  # pixels for the names at the left
    width = MARGIN + label + len(titles) * (side + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, HEADER + len(panels) * (side + GAP) - GAP + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    pen.text((MARGIN, 10), title, fill="#111111", font=bold)
    for column, name in enumerate(titles):
        pen.text((MARGIN + label + column * (side + GAP), HEADER - 9), name, fill="#444444", font=plain, anchor="ls")
    for row, (one, name) in enumerate(zip(panels, names, strict=True)):
        top = HEADER + row * (side + GAP)
        pen.text((MARGIN, top + side / 2), name.replace("_", " "), fill="#111111", font=plain, anchor="lm")
        for column, panel in enumerate(one.values()):
            enlarged = Image.fromarray(panel).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + label + column * (side + GAP), top))
    return sheet


def _to_panel(image: Tensor) -> Panel:
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def _enlarge(panel: Panel, side: int) -> Panel:
    return np.asarray(Image.fromarray(panel).resize((side, side), Image.Resampling.BICUBIC))


def _to_pixels(masks: Tensor, images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Masks of patches [N, num_patches] as masks of pixels [N, 1, H, W]."""
    rows = images.shape[2] // patch_size[0]
    grid = masks.unflatten(1, (rows, -1))
    pixels: Tensor = grid.repeat_interleave(patch_size[0], dim=1).repeat_interleave(patch_size[1], dim=2)
    return pixels.unsqueeze(1)


def _join(patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patches by rows, each (row, column, channel), [N, num_patches, p * p * 3] -> images [N, 3, H, W]."""
    blocks = patches.unflatten(2, (*size, 3)).unflatten(1, grid)  # [N, rows, columns, p, p, 3]
    images: Tensor = blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return images


def _denormalise(images: Tensor, normalise: PixelNormaliser) -> Tensor:
    pixels = torch.nan_to_num((images - normalise.shift) / normalise.scale)
    return pixels.round().clamp(0, 255).to(torch.uint8)
