"""Preview: what a run does to its own images before the encoder sees them, as one picture and a short table.

    Loader.draw            ->  the first positions of the run's stream: views and masks, bit for bit as in training
    Loader.make_view_rngs  ->  sample_views: the boxes and changes behind those views
    collect_samples  ->  PreviewSample, a few of every modality  ->  preview_page.draw_page  ->  PNG, and a table

The picture names sources and positions of the stream, no keys; but it shows pixels of patients and belongs where the
shards belong.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from panfm.data.decode import decode_rgb
from panfm.data.loader import Loader
from panfm.data.masking import MaskConfig
from panfm.data.preview_page import FINE, STORED_WIDTH, PreviewSample, describe_jitter, describe_mask, draw_page
from panfm.data.transforms import AugmentConfig, get_crop_scale, sample_views
from panfm.errors import UserError
from panfm.files import write_bytes
from panfm.shards.index import ShardSet
from panfm.shards.schema import MODALITIES, Modality

CHUNK = 32  # positions drawn at a time
MAX_POSITIONS = 2048  # looked through; a modality that the mixture draws less often than this is not shown


@dataclass(frozen=True)
class Preview:
    """The picture that was written, and what stands beside it."""

    path: Path
    table: tuple[tuple[str, ...], ...]  # a head, and a row for each modality of each source with its asked share
    missing: tuple[str, ...]  # a line for the modalities that are not in the picture, and why

    def __str__(self) -> str:
        """The table, what is missing, the path."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in self.table]
        return "\n".join([*(line.rstrip() for line in lines), *self.missing, str(self.path)])


def write_preview(
    loader: Loader,
    shard_sets: Sequence[ShardSet],
    augment: AugmentConfig,
    mask: MaskConfig | None,
    mask_grid: tuple[int, int],
    path: Path,
    *,
    per_modality: int,
    title: str,
) -> Preview:
    """Draw up to `per_modality` samples of every modality of the run as a PNG at `path`.

    loader, augment, mask, mask_grid: as the run has them; shard_sets: those that the loader reads.
    Raises UserError: a file name that does not end in .png; what drawing raises.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a preview is a PNG; give it a name that ends in .png")
    samples = collect_samples(loader, shard_sets, augment, mask_grid, per_modality)
    buffer = io.BytesIO()
    draw_page(samples, augment, mask, mask_grid, title).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return Preview(path, list_settings(loader, augment, mask, mask_grid), _explain_missing(loader, samples))


def collect_samples(
    loader: Loader,
    shard_sets: Sequence[ShardSet],
    augment: AugmentConfig,
    mask_grid: tuple[int, int],
    per_modality: int,
) -> dict[Modality, list[PreviewSample]]:
    """Take the first samples of every modality from the start of the stream, each sample once."""
    by_source = {shard_set.source: shard_set for shard_set in shard_sets}
    numbers: Counter[Modality] = Counter()
    for unit in loader.units:
        numbers[unit.section.modality] += unit.section.size
    wanted = {modality: min(per_modality, numbers[modality]) for modality in MODALITIES}
    found: dict[Modality, list[PreviewSample]] = {modality: [] for modality in MODALITIES}
    seen: set[tuple[str, int]] = set()
    for start in range(0, MAX_POSITIONS, CHUNK):
        if all(len(found[modality]) == wanted[modality] for modality in MODALITIES):
            break
        drawn = loader.draw(range(start, start + CHUNK))
        masks = drawn.batch.masks
        for number, sample in enumerate(drawn.samples):
            modality, place = sample.modality, (sample.source, sample.row)
            if place in seen or len(found[modality]) == wanted[modality]:
                continue
            seen.add(place)
            stored = Image.fromarray(decode_rgb(by_source[sample.source].read_image(sample.row)))
            size = stored.size
            stored.thumbnail((FINE * STORED_WIDTH, FINE * STORED_WIDTH), Image.Resampling.LANCZOS)
            found[modality].append(
                PreviewSample(
                    source=sample.source,
                    position=sample.position,
                    size=size,
                    stored=stored,
                    plans=tuple(sample_views(size, modality, loader.make_view_rngs(sample.position), augment)),
                    views=tuple(view[number].numpy() for view in drawn.batch.views),
                    masks=None if masks is None else masks[:, number].numpy().reshape(-1, *mask_grid),
                )
            )
    return found


def list_settings(
    loader: Loader, augment: AugmentConfig, mask: MaskConfig | None, mask_grid: tuple[int, int]
) -> tuple[tuple[str, ...], ...]:
    """The table: a head, and a row for each modality of each source."""
    rows = [("source/modality", "samples", "share", "crop scale", "colour or stain jitter", "mask")]
    for unit in loader.units:
        modality = unit.section.modality
        scales = [get_crop_scale(modality, augment)]
        if augment.local_views:
            scales.append(get_crop_scale(modality, augment, local=True))
        rows.append(
            (
                unit.section.name,
                f"{unit.section.size:,}",
                f"{unit.share:.1%}",
                ", local ".join(f"{low:g} to {high:g}" for low, high in scales),
                describe_jitter(modality, augment),
                describe_mask(mask, mask_grid),
            )
        )
    return tuple(rows)


def _explain_missing(loader: Loader, samples: Mapping[Modality, Sequence[PreviewSample]]) -> tuple[str, ...]:
    present = {modality for fact in loader.sources for modality in fact.num_by_modality}
    drawn = {unit.section.modality for unit in loader.units}
    reasons: dict[str, list[str]] = defaultdict(list)
    for modality in MODALITIES:
        if modality not in present:
            reasons["no samples"].append(modality)
        elif modality not in drawn:
            reasons["never drawn, weight 0 in the mixture"].append(modality)
        elif not samples[modality]:
            reasons[f"not among the first {MAX_POSITIONS:,} samples of the stream"].append(modality)
    return tuple(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
