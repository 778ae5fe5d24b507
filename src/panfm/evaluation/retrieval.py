"""Protocol `retrieval`: which image of a gallery shows the lesion of this one? Nothing is trained.

    images in folds -> build_queries: one unit a query with a partner in its fold
    query and gallery features -> cosine -> rank of the best-placed partner, size of the gallery: scores [M, 2]

Three kinds of task: the same lesion (or patient) in another modality, the same lesion at later visits, the caption of
an image, which needs the encoder's text tower. A query's gallery is all that belongs on that side of the patients
(groups) who ask in its fold: no image of another fold is in it, so a test never looks at training images.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.families import RetrievalTarget
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.splits import Split
from panfm.evaluation.task_rows import select_rows
from panfm.evaluation.tasks import TaskCard
from panfm.evaluation.text_tower import load_text_side
from panfm.shards.index import ShardSet

Similarity = Literal["cosine", "centred"]
CHUNK_VALUES = 8_000_000  # similarities held at once: 64 MB
TIE = 1e-9  # equal images differ by the rounding of a matrix product


@config_class
class RetrievalConfig:
    """Settings of retrieval."""

    variants: tuple[Similarity, ...] = ("cosine", "centred")
    """cosine = of the features as they are; centred = first the mean of each side is subtracted (of images outside of
    the fold that is scored): two modalities differ by a shift that says nothing about the lesion."""


@dataclass(frozen=True)
class Sides:
    """Which rows may ask and which may answer, among N rows. names: [N], equal for partners.

    is_query, is_answer: bool [N]; a row can be both (an image and its caption).
    """

    rows: NDArray[np.int64]
    names: NDArray[np.str_]
    is_query: NDArray[np.bool_]
    is_answer: NDArray[np.bool_]


def build_queries(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Make one unit of each image that asks and has a partner in its fold; targets [N, 1]: how many partners.

    Raises UserError where no image has a partner.
    """
    target = card.target
    assert isinstance(target, RetrievalTarget)
    sides = find_sides(target, shard_set, split.rows)
    places = list(zip(split.folds.tolist(), sides.names.tolist(), strict=True))
    answers = Counter(place for place, is_answer in zip(places, sides.is_answer, strict=True) if is_answer)
    num_partners = np.array([answers[place] for place in places], dtype=np.int64)
    if target.match == "caption":
        num_partners = np.minimum(num_partners, 1)  # equal captions are one answer
    kept = np.flatnonzero(sides.is_query & (num_partners > 0))
    num_alone = int((sides.is_query & (num_partners == 0)).sum())
    if len(kept) == 0:
        raise UserError(
            f"task {card.name} on {shard_set.path}: none of {num_alone} images ({target.query}) has a partner "
            f"({target.gallery} of the same {target.match}) in its fold; use more images, or another task"
        )
    note = f"{num_alone} queries ({target.query}) without a partner ({target.gallery})" if num_alone else None
    return replace(
        split.take(kept, f"queries {target.model_dump_json()}", note),
        members=tuple(split.rows[kept][:, None]),
        targets=num_partners[kept, None].astype(np.float64),
    )


def find_sides(target: RetrievalTarget, shard_set: ShardSet, rows: NDArray[np.int64]) -> Sides:
    """Tell which of `rows` ask, which answer, and what partners share: the lesion, the patient, the caption."""
    if target.match == "caption":
        captions = [shard_set.read_caption(int(row)) for row in rows]
        there = np.array([caption is not None for caption in captions], dtype=bool)
        return Sides(rows, np.array([caption or "" for caption in captions], dtype=np.str_), there, there)
    table = shard_set.table.select([f"{target.match}_id", "modality", "visit_day"]).take(pa.array(rows))
    names = np.array([name or "" for name in table.column(0).to_pylist()], dtype=np.str_)
    there = names != ""
    if target.query == "first_visit":
        days = np.array([np.nan if day is None else day for day in table.column("visit_day").to_pylist()])
        known = there & ~np.isnan(days)
        first: dict[str, float] = {}
        for name, day in zip(names[known].tolist(), days[known].tolist(), strict=True):
            first[name] = min(day, first.get(name, day))
        first_day = np.array([first.get(name, np.nan) for name in names.tolist()])
        return Sides(rows, names, known & (days == first_day), known & (days > first_day))
    modality = np.array(table.column("modality").to_pylist(), dtype=np.str_)
    return Sides(rows, names, there & (modality == target.query), there & (modality == target.gallery))


def score_retrieval(trial: Trial, material: Material, config: RetrievalConfig) -> Scored:
    """Rank each query's gallery; scores [M, 2]: rank of the best-placed partner (1 = first), size of the gallery.

    targets [M, 1]: partners in the gallery. Raises UserError for captions where the encoder has no text tower.
    """
    target = trial.card.target
    assert isinstance(target, RetrievalTarget)
    rows = select_rows(trial.card, material.shard_set)
    asked = np.isin(rows.groups, trial.split.groups[trial.test])  # rows of the groups that ask
    sides = find_sides(target, material.shard_set, rows.rows)
    answers = np.flatnonzero(asked & sides.is_answer)
    if target.match == "caption":  # equal captions are one answer
        answers = answers[np.unique(sides.names[answers], return_index=True)[1]]
    queries = trial.split.rows[trial.test]
    name_of_row = dict(zip(sides.rows.tolist(), sides.names.tolist(), strict=True))
    names = np.array([name_of_row[row] for row in queries.tolist()], dtype=np.str_)

    embed_query, embed_answer = _choose_embedding(target, trial, material, sides)
    of_queries, of_answers = embed_query(queries), embed_answer(sides.rows[answers])
    if trial.recipe["variant"] == "centred":
        outside = ~asked
        of_queries = of_queries - _compute_mean(embed_query, sides.rows[outside & sides.is_query], trial)
        of_answers = of_answers - _compute_mean(embed_answer, sides.rows[outside & sides.is_answer], trial)
    ranks, num_partners = rank_partners(of_queries, of_answers, names, sides.names[answers])
    sizes = np.full(len(ranks), float(len(answers)))
    return Scored(np.stack([ranks, sizes], axis=1), {"gallery_size": len(answers)}, targets=num_partners[:, None])


def rank_partners(
    queries: NDArray[np.floating],
    answers: NDArray[np.floating],
    query_names: NDArray[np.str_],
    answer_names: NDArray[np.str_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rank the best-placed answer of the query's own name by cosine: ranks [M], and how many partners there are [M].

    queries: [M, D]. answers: [G, D]. Other partners do not stand in the way; strangers as similar count half.
    """
    of_queries, of_answers = _normalise(queries), _normalise(answers)
    ranks, num_partners = np.empty(len(query_names)), np.empty(len(query_names))
    chunk = max(1, CHUNK_VALUES // max(1, len(answer_names)))
    for start in range(0, len(query_names), chunk):
        part = slice(start, start + chunk)
        similarity = of_queries[part] @ of_answers.T  # [m, G]
        is_partner = query_names[part, None] == answer_names
        best = np.where(is_partner, similarity, -np.inf).max(axis=1, keepdims=True)
        others = np.where(is_partner, -np.inf, similarity)
        nearer, equal = (others > best + TIE).sum(axis=1), (np.abs(others - best) <= TIE).sum(axis=1)
        ranks[part], num_partners[part] = 1 + nearer + equal / 2, is_partner.sum(axis=1)
    assert (num_partners > 0).all(), "a query without a partner has no rank"
    return ranks, num_partners


Embed = Callable[[NDArray[np.int64]], NDArray[np.float64]]


def _choose_embedding(target: RetrievalTarget, trial: Trial, material: Material, sides: Sides) -> tuple[Embed, Embed]:
    """How rows become vectors [n, D] of length 1, as queries and as answers."""
    if target.match != "caption":

        def embed(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            return _normalise(material.features[rows])

        return embed, embed
    text = load_text_side(material.encoder, trial.card.name)
    caption_of = dict(zip(sides.rows.tolist(), sides.names.tolist(), strict=True))

    def embed_image(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return text.embed_features(material.features[rows]).astype(np.float64)

    def embed_caption(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return text.embed_texts([caption_of[row] for row in rows.tolist()]).astype(np.float64)

    return embed_image, embed_caption


def _compute_mean(embed: Embed, rows: NDArray[np.int64], trial: Trial) -> NDArray[np.float64]:
    if len(rows) == 0:
        raise UserError(
            f"task {trial.card.name}: no image outside of the scored fold to take a mean of; use "
            "retrieval.variants=[cosine]"
        )
    return np.asarray(embed(rows).mean(axis=0))


def _normalise(values: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = np.asarray(values, dtype=np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))
