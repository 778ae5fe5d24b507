"""`panfm select`: which unlabelled images to label next, and why each.

    encoder or classifier folder, images --embed--> features [N, D] --choose_images--> Picks --> OUT, a table to fill in

Images are drawn one after another. The chance of each is its squared distance to the nearest image that has a label or
was drawn before (k-means++, Arthur and Vassilvitskii 2007), so that what is rare in the archive is not missed and
nothing is labelled twice; a near-duplicate of those is never drawn, and a patient gives at most `per_patient` images.
With a classifier, `by="uncertainty"` multiplies the distance by its doubt, as BADGE does (Ash et al. 2020): this finds
more images of a rare class, but the classifiers fitted on them were no better in our experiment (docs/monitoring.md).
So that is not the default.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from panfm.clinic.images import Embedded, ImageList, embed_images, find_images, hash_images
from panfm.errors import UserError
from panfm.files import write_text
from panfm.shards.duplicates import ALIKE_DISTANCE
from panfm.shards.hash_search import orient_hashes
from panfm_predict import PredictError, load_classifier
from panfm_predict.card import WARNING
from panfm_predict.folder import CARD

Floats = NDArray[np.float64]
By = Literal["diversity", "uncertainty", "random"]
NEAR_DUPLICATE = 0.97  # cosine of standardised features: crops and copies of one photograph, rarely two of a lesion


@dataclass(frozen=True)
class Pick:
    """One image to label. row: its place. similarity: cosine to the nearest labelled or earlier one, None: the first.

    doubt: 1 less the difference of the two highest probabilities, None without a classifier.
    """

    row: int
    similarity: float | None
    doubt: float | None


@dataclass(frozen=True)
class Selection:
    """What was proposed; how many images could not be, as near-duplicates or of a patient with enough; and which were
    not read.
    """

    images: ImageList
    picks: tuple[Pick, ...]
    num_near_duplicates: int
    num_capped: int
    failed: tuple[str, ...]


def select(
    model: str,
    places: Sequence[str | Path],
    out: Path,
    *,
    num: int = 50,
    labelled: Path | None = None,
    per_patient: int = 2,
    by: By = "diversity",
    device: str = "cpu",
    threads: int = 0,
    seed: int = 0,
) -> Selection:
    """Choose `num` images to label and write the table `out`: image, patient, label (empty), reason.

    model: an encoder address, or a classifier folder, which `by="uncertainty"` needs. labelled: a table of images that
    have labels; proposed images are unlike them, and images of it are not proposed.

    Raises UserError, before anything is computed where that can be told.
    """
    folder = Path(model)
    is_classifier = (folder / CARD).is_file()
    if by == "uncertainty" and not is_classifier:
        raise UserError(f"--by uncertainty: {model} is no classifier folder; run `panfm adapt` first, or leave it out")
    if out.exists():
        raise UserError(f"--out {out}: exists, and labels may have been filled in; name a new file")
    images = find_images(places)
    known = find_images([labelled]) if labelled is not None else None
    probabilities = None
    try:
        if is_classifier:
            classifier = load_classifier(folder, threads)
            embedded = embed_images(classifier.embed, images)
            z = classifier.head.standardise(embedded.features)
            answers = classifier.predict_features(embedded.features)
            probabilities = np.array([[one.probabilities[name] for name in classifier.classes] for one in answers])
            known_embedded = None if known is None else embed_images(classifier.embed, known)
            known_z = None if known_embedded is None else classifier.head.standardise(known_embedded.features)
        else:
            embedded, z, known_embedded, known_z = _embed_plainly(model, images, known, device)
    except PredictError as error:
        raise UserError(str(error)) from None
    groups = np.array(images.groups)[embedded.rows]
    chosen, num_near, num_capped = choose_images(
        z,
        groups,
        num,
        labelled=known_z,
        hashes=hash_images(images, embedded.rows),
        labelled_hashes=None if known is None or known_embedded is None else hash_images(known, known_embedded.rows),
        doubts=None if probabilities is None else compute_doubts(probabilities),
        per_patient=per_patient,
        by=by,
        seed=seed,
    )
    picks = tuple(Pick(int(embedded.rows[pick.row]), pick.similarity, pick.doubt) for pick in chosen)
    write_text(out, _format_table(images, picks, out.parent, by))
    return Selection(images, picks, num_near, num_capped, embedded.failed)


def choose_images(
    z: NDArray[np.floating],
    groups: NDArray,
    num: int,
    *,
    labelled: NDArray[np.floating] | None = None,
    hashes: NDArray[np.uint8] | None = None,
    labelled_hashes: NDArray[np.uint8] | None = None,
    doubts: Floats | None = None,
    per_patient: int = 2,
    by: By = "diversity",
    seed: int = 0,
) -> tuple[list[Pick], int, int]:
    """Choose up to `num` of the images with standardised features [N, D] and patients [N], the first drawn first.

    labelled: [L, D]. hashes: perceptual, [N, 32], [L, 32]: a copy that the encoder takes for something else is one too.
    doubts: [N]. Returns the picks, and how many images were near-duplicates of what is labelled or
    chosen, and how many of a patient who had enough. Fewer than `num` are chosen where no others are left.
    """
    unit = _normalise(z)
    nearest = np.full(len(unit), -np.inf)  # cosine to the nearest labelled or chosen
    if labelled is not None and len(labelled):
        nearest = (unit @ _normalise(labelled).T).max(axis=1)
    is_near = nearest >= NEAR_DUPLICATE
    if hashes is not None and labelled_hashes is not None:
        for known_hash in labelled_hashes:
            is_near |= find_alike(hashes, known_hash)
    is_free, is_capped = ~is_near, np.zeros(len(unit), dtype=bool)
    weights = doubts if by == "uncertainty" and doubts is not None else np.ones(len(unit))
    rng = np.random.Generator(np.random.PCG64(seed))
    picks: list[Pick] = []
    while len(picks) < num and is_free.any():
        # Before anything is labelled or chosen all are equally far.
        distances = np.ones(len(unit)) if by == "random" or not np.isfinite(nearest[0]) else np.maximum(1 - nearest, 0)
        chances = np.where(is_free, distances * np.maximum(weights, 1e-6), 0.0)
        row = int(rng.choice(len(unit), p=chances / chances.sum()))
        similarity = float(nearest[row]) if np.isfinite(nearest[row]) else None
        picks.append(Pick(row, similarity, None if doubts is None else float(doubts[row])))
        own = unit @ unit[row]
        nearest = np.maximum(nearest, own)
        is_free[row] = False
        close = own >= NEAR_DUPLICATE
        if hashes is not None:
            close |= find_alike(hashes, hashes[row])
        close &= is_free
        is_near |= close
        is_free &= ~close
        if sum(groups[pick.row] == groups[row] for pick in picks) >= per_patient:
            full = is_free & (groups == groups[row])
            is_capped |= full
            is_free &= ~full
    return picks, int(is_near.sum()), int(is_capped.sum())


def find_alike(hashes: NDArray[np.uint8], one: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which images with perceptual hashes [N, 32] are copies of `one` [32], also turned or mirrored: [N]."""
    if not one.any():  # nothing to recognise: such hashes are all alike
        return np.zeros(len(hashes), dtype=bool)
    oriented = orient_hashes(one[None]).reshape(-1, hashes.shape[1])  # [8, 32]
    differing = np.unpackbits(hashes[None] ^ oriented[:, None], axis=2).sum(axis=2)  # [8, N]
    return np.asarray(differing.min(axis=0) <= ALIKE_DISTANCE)


def compute_doubts(probabilities: Floats) -> Floats:
    """Compute the doubt [N] of probabilities [N, K]: 1 less the difference of the two highest (margin), 0 to 1."""
    ordered = np.sort(probabilities, axis=1)
    return np.asarray(1 - (ordered[:, -1] - ordered[:, -2]))


def explain(pick: Pick, by: By) -> str:
    """Say in one sentence why an image is proposed."""
    if pick.similarity is None:
        said = "the first, drawn at random"
    elif by == "random":
        said = "drawn at random"
    elif pick.similarity < 0.2:
        said = f"unlike all that is labelled or chosen (similarity {pick.similarity:.2f})"
    elif pick.similarity < 0.6:
        said = f"somewhat unlike what is labelled or chosen (similarity {pick.similarity:.2f})"
    else:
        said = f"drawn by chance among those that resemble others (similarity {pick.similarity:.2f})"
    if pick.doubt is not None:
        words = "undecided" if pick.doubt >= 0.7 else "not sure" if pick.doubt >= 0.3 else "sure"
        said += f"; the classifier is {words} (doubt {pick.doubt:.2f})"
    return said


def _embed_plainly(
    address: str, images: ImageList, known: ImageList | None, device: str
) -> tuple[Embedded, Floats, Embedded | None, Floats | None]:
    """Features of an encoder, standardised by the pool's own mean and spread."""
    import torch

    from panfm.encoder.load import load_encoder
    from panfm_predict.transform import prepare

    encoder = load_encoder(address, device=device)

    def embed(stored: Sequence[bytes]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.stack([prepare(data, encoder.transform) for data in stored]))
        return np.asarray(encoder.forward(pixels).float().cpu().numpy())

    embedded = embed_images(embed, images)
    values = embedded.features.astype(np.float64)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    scale = np.where(spread > 1e-8 * max(float(np.abs(values).max()), 1e-8), spread, 1.0)
    if known is None:
        return embedded, (values - mean) / scale, None, None
    known_embedded = embed_images(embed, known)
    return embedded, (values - mean) / scale, known_embedded, (known_embedded.features - mean) / scale


def _format_table(images: ImageList, picks: Sequence[Pick], base: Path, by: By) -> str:
    """The table that `panfm adapt` reads once `label` is filled in; paths start at the table where they can."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    has_patients = images.grouping == "patient"
    table.writerow(["image", *(["patient"] if has_patients else []), "label", "reason", "warning"])
    for pick in picks:
        path = images.paths[pick.row].resolve()
        shown = path.relative_to(base.resolve()) if path.is_relative_to(base.resolve()) else path
        own = [images.groups[pick.row]] if has_patients else []
        table.writerow([str(shown), *own, "", explain(pick, by), WARNING])
    return text.getvalue()


def _normalise(z: NDArray[np.floating]) -> Floats:
    values = np.asarray(z, dtype=np.float64)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
