"""Boards for the browser: one of fabricated Results, and one of a size that nobody has yet, of plain values."""

from pathlib import Path

import numpy as np

from panfm.board.ranking import compute_borda
from panfm.board.standings import Board
from panfm.board.summary import Cell, Comparison, LeaderboardSummary, Row, Section, Standing, Task
from panfm.evaluation.results import EncoderCard
from tests.board.fabricated import GOOD, MIDDLE, RANDOM, write_trial

MALICIOUS = "<script>alert(1)</script>"
FORMULA = '=HYPERLINK("x"), 2'
PRINTED = "tbp_photodamage"  # a task with a printed number of the same metric and protocol


def write_board_results(root: Path) -> Path:
    """Five encoders; MIDDLE lacks `diagnoses`. Another protocol, fraction and kind of images are small."""
    for encoder, strength in ((GOOD, 1.6), (MIDDLE, 1.58), (MALICIOUS, 1.5), (FORMULA, 0.8), (RANDOM, 0.4)):
        write_trial(root, encoder, "lesions", strength, num_groups=90)
        write_trial(root, encoder, PRINTED, strength, classes=3, metric="weighted_f1")
        if encoder != MIDDLE:
            write_trial(root, encoder, "diagnoses", strength)
    for encoder, strength in ((GOOD, 1.6), (RANDOM, 0.4)):
        write_trial(root, encoder, "lesions", strength / 2, fraction=0.1, num_groups=90)
        write_trial(root, encoder, "lesions", strength, protocol="panderm_compat", num_groups=90)
        write_trial(root, encoder, "drawn", strength, synthetic=True, group_kind="sample")
    write_trial(root, GOOD, "lesions", 1.7, evaluated_on="development")
    return root


def fabricate_large(num_encoders: int = 200, num_tasks: int = 40, num_replicates: int = 200) -> Board:
    """A board without predictions: what is asked of it is that it stays quick."""
    rng = np.random.default_rng(0)
    strength = np.linspace(0.9, 0.1, num_encoders)[:, None] + 0.03 * rng.normal(size=(num_encoders, num_tasks))
    points = np.clip(strength, 0.02, 0.97)
    replicates = points[:, :, None] + 0.02 * rng.normal(size=(num_encoders, num_tasks, num_replicates))
    borda = compute_borda(points)
    tasks = tuple(_fabricate_task(place) for place in range(num_tasks))
    rows = tuple(_fabricate_row(place, points[place], float(borda[place])) for place in range(num_encoders))
    section = Section(False, "linear_probe", "default", 1.0, tasks, rows, rows[-1].encoder.name)
    names = tuple(row.encoder.name for row in rows)
    summary = LeaderboardSummary((section,), (), names, num_encoders * num_tasks)
    return Board(summary, (), {section.slug: replicates}, (), ())


def _fabricate_task(place: int) -> Task:
    return Task(
        name=f"task_{place:02d}", version=1, family="classification", title=f"Diagnosis number {place}",
        metric="auroc", metric_title="AUROC", metric_description="ranks a positive above a negative",
        direction="higher", classes=("no", "yes"), unit="image", num_test=1000, num_test_groups=400,
        num_rarer_groups=120, which_groups="in the rarer class", group_kind="patient", synthetic=False,
        modality="dermoscopy" if place % 2 else "clinical", licence="CC-BY-4.0", access="open", claim=True,
        claim_note=None, chance=0.5, perfect=1.0,
    )  # fmt: skip


def _fabricate_row(place: int, points: np.ndarray, borda: float) -> Row:
    card = EncoderCard(
        name=f"encoder {place:03d}", address=f"panfm:{place}", hash=f"{place:064d}", num_parameters=(place + 1) * 10**6,
        embed_dim=192, image_size=224, pooling="mean", licence="Apache-2.0", access="open",
    )  # fmt: skip
    values = [float(0.5 + point / 2) for point in points]
    cells = tuple(
        Cell(
            value, value - 0.02, min(1.0, value + 0.02), None, "bootstrap", 5, 0.01, 100, "unknown",
            Comparison(value - 0.55, value - 0.6, value - 0.5, None, "bootstrap", 0.001, 0.01), ("0" * 64,),
        )
        for value in values
    )  # fmt: skip
    score = float(points.mean())
    standing = Standing(place + 1, place + 1, place + 2, borda, score, score - 0.01, min(1.0, score + 0.01), None)
    return Row(card, cells, standing, None, None)
