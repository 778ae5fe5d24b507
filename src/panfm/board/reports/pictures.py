"""`panfm report --pictures ENCODER`: what the features of an encoder look like on shard sets.

    encoder x rows --compute_features--> features [N, D] --PCA, UMAP--> places [N, 2] --levels--> scatter plots, CSV
                                                  `--cosine, other groups only--> neighbours (`neighbours`, with images)

Coordinates leave without keys and in an order of their own; levels that few patients have share one grey. A cloud that
falls apart by institution or modality says what an encoder has learned besides disease. UMAP keeps neighbours, not
distances: the size of a cloud and the gap between two mean nothing (McInnes, Healy, Melville, arXiv:1802.03426).
"""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.board.figures import make_spec
from panfm.board.reports.document import (
    NO_DIAGNOSIS,
    Document,
    Figure,
    Paragraph,
    Section,
    Table,
    format_csv,
    render_html,
    render_markdown,
    write_files,
)
from panfm.board.reports.model_card_facts import describe_address
from panfm.board.vega import SERIES, SOFT, render_svg
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.evaluation.subgroup_columns import read_levels
from panfm.features import compute_features
from panfm.files import write_text
from panfm.measures.subgroups import MIN_SHOWN_GROUPS
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
OTHER = "others, and unknown"
MAX_LEVELS = len(SERIES)  # a ninth colour could not be told from the rest
PLACE_DIGITS = 3  # the last bits of a decomposition depend on the machine
UMAP_NEIGHBOURS = 15


@dataclass(frozen=True)
class Points:
    """Images with their features, unit length, [N, D]; owners: (shard set, row) of each."""

    values: Floats
    groups: NDArray[np.str_]
    owners: tuple[tuple[int, int], ...]
    columns: Mapping[str, tuple[str | None, ...]]  # modality, institution, phototype, and labels: a level each


@dataclass(frozen=True)
class Projection:
    """Places [N, 2] and what the axes are."""

    name: str
    title: str
    places: Floats
    note: str


def check_umap() -> None:
    """Raise UserError where umap-learn is not installed."""
    if importlib.util.find_spec("umap") is None:
        raise UserError(
            "UMAP pictures need umap-learn, which is not installed; install it with: pip install 'panfm[pictures]', or "
            "leave --umap out (PCA is always drawn)"
        )


def collect_points(
    encoder: Encoder,
    shard_sets: Sequence[ShardSet],
    *,
    num_points: int,
    seed: int,
    labels: Sequence[str] = (),
    keys: Sequence[str] = (),
    cache_dir: str | Path,
) -> Points:
    """Compute the features of `num_points` random images (or all, where there are fewer), and of those in `keys`.

    labels: names of labels to colour by; none: the one that most images have. Every shard set gives its share.

    Raises UserError for a label or a key that no image has.
    """
    total = sum(shard_set.num_samples for shard_set in shard_sets)
    values, groups, owners = [], [], []
    columns: dict[str, list[str | None]] = {}
    names = list(labels) or _find_common_label(shard_sets)
    wanted = set(keys)
    for number, shard_set in enumerate(shard_sets):
        share = round(shard_set.num_samples * min(1.0, num_points / total))
        drawn = np.random.default_rng([seed, number]).permutation(shard_set.num_samples)[: max(1, share)]
        named = [row for row, key in enumerate(shard_set.table["key"].to_pylist()) if key in wanted]
        rows = np.unique(np.concatenate([drawn, np.asarray(named, dtype=np.int64)]))
        wanted -= {shard_set.table["key"][row].as_py() for row in named}
        found = compute_features(encoder, shard_set, rows, cache_dir=cache_dir).values.astype(np.float64)
        values.append(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
        table = shard_set.table.take(rows)
        groups += [f"{shard_set.card.namespace}/{group}" for group in table["group_id"].to_pylist()]
        owners += [(number, int(row)) for row in rows]
        columns.setdefault("source", []).extend([shard_set.source] * len(rows))
        for attribute in ("modality", "institution", "phototype"):
            columns.setdefault(attribute, []).extend(read_levels(table, attribute))
        held = [dict(pairs) for pairs in table["labels"].to_pylist()]
        for name in names:
            columns.setdefault(f"label {name}", []).extend(one.get(name) for one in held)
    if wanted:
        raise UserError(
            f"--query {min(wanted)}: no image of these shard sets has this key; name a key of samples.parquet"
        )
    if missing := [name for name in labels if not any(columns[f"label {name}"])]:
        raise UserError(f"--label {missing[0]}: no image drawn here has this label; `panfm shards inspect` lists them")
    return Points(
        np.concatenate(values),
        np.array(groups, dtype=np.str_),
        tuple(owners),
        {name: tuple(levels) for name, levels in columns.items()},
    )


def _find_common_label(shard_sets: Sequence[ShardSet]) -> list[str]:
    counts: Counter[str] = Counter()
    for shard_set in shard_sets:
        for name, values in shard_set.index["num_labels"].items():
            counts[name] += sum(values.values())
    return [min(counts, key=lambda name: (-counts[name], name))] if counts else []


# ------------------------------------------------------------------------------------------------ projections


def project_pca(values: Floats) -> Projection:
    """The two directions of most variance; each points to where its largest weight is positive."""
    centred = values - values.mean(axis=0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
    places = np.zeros((len(values), 2))
    places[:, : len(directions)] = centred @ (directions * signs[:, None]).T
    shares = spread[:2] ** 2 / max(float((spread**2).sum()), 1e-300)
    said = " and ".join(f"{100 * share:.0f} %" for share in shares)
    return Projection("pca", "PCA", places.round(PLACE_DIGITS), f"The two axes hold {said} of the variance.")


def project_umap(values: Floats, seed: int) -> Projection:
    """UMAP by cosine distance, the same for the same seed on one machine. Raises UserError without umap-learn."""
    check_umap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow is not there, that a seed makes it run on one core
        import umap

        model = umap.UMAP(n_neighbors=min(UMAP_NEIGHBOURS, len(values) - 1), metric="cosine", random_state=seed)
        places = np.asarray(model.fit_transform(values), dtype=np.float64)
    note = "Neighbours are kept, distances are not: the size of a cloud and the gap between two mean nothing."
    return Projection("umap", "UMAP", places.round(PLACE_DIGITS), note)


# ------------------------------------------------------------------------------------------------ drawings


def merge_few(levels: Sequence[str | None], groups: NDArray[np.str_]) -> list[str]:
    """Levels that can be shown: those of MIN_SHOWN_GROUPS groups or more, the largest eight; all else is OTHER."""
    members: dict[str, set[str]] = {}
    for level, group in zip(levels, groups.tolist(), strict=True):
        if level is not None:
            members.setdefault(level, set()).add(group)
    kept = sorted(
        (name for name, those in members.items() if len(those) >= MIN_SHOWN_GROUPS),
        key=lambda name: (-len(members[name]), name),
    )[:MAX_LEVELS]
    return [level if level in kept else OTHER for level in levels]


def draw_points(projection: Projection, column: str, levels: Sequence[str]) -> Figure:
    """Draw one projection coloured by one attribute; its CSV holds x, y and the level, in the order of x."""
    rows: list[dict[str, Any]] = [
        {"x": float(x), "y": float(y), "level": level}
        for (x, y), level in sorted(zip(projection.places.tolist(), levels, strict=True))
    ]
    counts = Counter(levels)
    names = sorted(counts, key=lambda name: (name == OTHER, -counts[name], name))
    colours = [SOFT if name == OTHER else SERIES[place] for place, name in enumerate(names)]
    axis = {"type": "quantitative", "axis": {"labels": False, "ticks": False, "grid": False}}
    spec = make_spec(
        {
            "width": 520,
            "height": 420,
            "mark": {"type": "point", "filled": True, "size": 16, "opacity": 0.65},
            "encoding": {
                "x": {**axis, "field": "x", "title": f"{projection.title} 1"},
                "y": {**axis, "field": "y", "title": f"{projection.title} 2"},
                "color": {
                    "field": "level", "type": "nominal", "title": None,
                    "scale": {"domain": names, "range": colours},
                },
            },
        },
        f"{projection.title} of features, one point an image, coloured by {column}: {', '.join(names)}.",
        {"rows": rows},
    )  # fmt: skip
    slug = "-".join("".join(sign if sign.isalnum() else " " for sign in column.lower()).split())
    title = f"{projection.title}, coloured by {column}. {projection.note}"
    numbers = format_csv(("x", "y", "level"), ([row["x"], row["y"], row["level"]] for row in rows))
    return Figure(f"{projection.name}-{slug}", title, str(spec["description"]), render_svg(spec), numbers)


def build_pictures(encoder: Encoder, points: Points, projections: Sequence[Projection]) -> Document:
    """Put the drawings on a page: a section an attribute that has at least two levels to show."""
    sections, single = [], []
    for column, levels in points.columns.items():
        shown = merge_few(levels, points.groups)
        if len(set(shown)) < 2:
            single.append((column, "no level has enough patients" if set(shown) == {OTHER} else f"all {shown[0]}"))
            continue
        sections.append(
            Section(f"By {column}", tuple(draw_points(projection, column, shown) for projection in projections))
        )
    about = Paragraph(
        f"{len(points.groups):,} images drawn at random, features of {encoder.embed_dim} numbers at unit length. A "
        f"level of fewer than {MIN_SHOWN_GROUPS} patients, lesions or slides is among '{OTHER}'."
    )
    rest = (Table(("Attribute", "Why it is not drawn"), tuple(single)),) if single else ()
    return Document(
        title=f"Features of {encoder.name}",
        lead="What the encoder puts beside what. A picture is for looking, not for proof: compare encoders by results.",
        cautions=(NO_DIAGNOSIS,),
        sections=(Section("What is drawn", (about, *rest)), *sections),
        footer=f"Written by panfm report --pictures {describe_address(encoder.address)}.",
    )


def write_pictures(document: Document, out: Path) -> None:
    """Write pictures.md, pictures.html and figures/ into the folder `out`."""
    write_files(document, out)
    write_text(out / "pictures.md", render_markdown(document))
    write_text(out / "pictures.html", render_html(document))
