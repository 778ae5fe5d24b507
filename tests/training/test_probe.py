from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from panfm.data.loader import DataConfig
from panfm.data.transforms import EvalTransform
from panfm.errors import UserError
from panfm.measures.knn import predict_knn
from panfm.measures.metrics import compute_metric
from panfm.shards.index import Exclusion, open_shard_set
from panfm.training.probe import Candidate, Probe, ProbeConfig, build_probe, choose_samples
from tests.ranks import run_ranks
from tests.training.conftest import build_labelled

SMALL = EvalTransform(image_size=16, resize_size=18)


def build(shards: list[Path], drawn: list[Path], excluded: Exclusion | None = None, **settings: object) -> Probe:
    config = ProbeConfig(shards=tuple(map(str, shards)), **settings)  # type: ignore[arg-type]
    return build_probe(config, DataConfig(shards=tuple(map(str, drawn))), excluded or Exclusion(), SMALL)


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3)) / 255


def test_no_patient_is_on_both_sides_and_many_take_part() -> None:
    candidates = [
        Candidate(0, row, ("clinical", "dermoscopic")[row % 2], f"group{row // 9}", "nevus") for row in range(900)
    ]
    chosen = choose_samples(candidates, 60)
    sides = {True: set(), False: set()}  # type: ignore[var-annotated]
    for one, is_tested in chosen:
        sides[is_tested].add(one.group)
    assert not sides[True] & sides[False]
    counts = Counter((one.modality, is_tested) for one, is_tested in chosen)
    assert counts == {(modality, side): 30 for modality in ("clinical", "dermoscopic") for side in (True, False)}
    assert max(Counter((one.modality, one.group) for one, _ in chosen).values()) == 1  # 100 groups for 60 images
    assert chosen == choose_samples(candidates[::-1], 60)  # the same whatever the order of the sets


def test_values_are_those_of_the_classifier_and_null_where_there_is_one_class(held_out: Path, shards: Path) -> None:
    probe = build([held_out], [shards], num_samples=60, k=5)
    values = probe.run(mean_colour)
    assert values["probe/clinical/auroc"] is None and values["probe/clinical/balanced_accuracy"] is None
    (part,) = (part for part in probe.parts if part.modality == "dermoscopic")
    features = mean_colour(probe.images).numpy()
    scores = predict_knn(features[part.train], part.train_labels, features[part.test], num_classes=2, k=5)
    for name in ("auroc", "balanced_accuracy"):
        expected = compute_metric(name, part.test_labels, scores).value
        assert values[f"probe/dermoscopic/{name}"] == expected == 1.0  # one hue a diagnosis
    assert len(part.train) + len(part.test) == 60 and not set(part.train) & set(part.test)
    assert probe.num_images == 120

    again = build([held_out], [shards], num_samples=60, k=5)
    assert torch.equal(again.images, probe.images) and again.run(mean_colour) == values
    blind = probe.run(lambda images: torch.ones(len(images), 2))
    assert blind["probe/dermoscopic/auroc"] == 0.5
    broken = probe.run(lambda images: torch.full((len(images), 2), torch.nan))
    assert set(broken.values()) == {None}


def test_images_go_through_the_evaluation_transform(held_out: Path, shards: Path) -> None:
    probe = build([held_out], [shards], num_samples=160)
    shard_set = open_shard_set(held_out)
    stored = {SMALL.apply(shard_set.read_image(row)).tobytes() for row in range(shard_set.num_samples)}
    assert {image.numpy().tobytes() for image in probe.images} == stored


def test_a_rare_class_does_not_count(tmp_path: Path, shards: Path) -> None:
    rows = [
        {
            "patient": f"rare{n}",
            "modality": "dermoscopic",
            "diagnosis": "rare" if n < 4 else ("nevus", "melanoma")[n % 2],
        }
        for n in range(60)
    ]
    (part,) = build([build_labelled(tmp_path, "rare", rows)], [shards], num_samples=60).parts
    assert part.num_classes == 2
    assert 40 <= len(part.train) + len(part.test) <= 56


def test_what_may_be_drawn_is_refused(tmp_path: Path, held_out: Path) -> None:
    """Another source with a patient of the probe; the probe's own set; the same with its groups kept out."""
    drawn = build_labelled(
        tmp_path,
        "drawn2",
        [{"patient": f"{who}", "modality": "total_body", "diagnosis": "nevus"} for who in ("held3", "other")],
    )
    with pytest.raises(UserError, match=r"2 of the 161 images chosen of held share their group_id .* of drawn2 "):
        build([held_out], [drawn], num_samples=160)
    with pytest.raises(UserError, match="no image there has the label diagnosis and is kept out of pretraining"):
        build([held_out], [held_out])
    with pytest.raises(UserError, match="has the label grade"):
        build([held_out], [drawn], label="grade")

    table = open_shard_set(held_out).table
    groups = sorted(set(table["group_id"].to_pylist()))
    excluded = Exclusion({"held": frozenset(groups[:60])})
    probe = build([held_out], [held_out], excluded, num_samples=160)
    assert probe.num_groups == 60 and probe.num_reserved == probe.num_images == 120
    # Kept out as single images only: others of their patients may be drawn.
    keys = frozenset(table["key"].to_pylist()[:50])
    with pytest.raises(UserError, match="kept out of pretraining"):
        build([held_out], [held_out], Exclusion(keys={"held": keys}))
    # Kept out with their groups, but drawn by way of another set.
    both = Exclusion({"held": frozenset(groups), "drawn2": frozenset(groups)})
    assert build([held_out], [held_out, drawn], both).num_groups == 81
    with pytest.raises(UserError, match="of drawn2"):
        build([held_out], [held_out, drawn], Exclusion({"held": frozenset(groups)}))


def run_on_a_rank(held_out: Path, shards: Path) -> tuple[int, dict[str, float | None]]:
    probe = build([held_out], [shards], num_samples=400)
    return len(probe.images), probe.run(mean_colour)


@pytest.mark.slow
def test_ranks_share_the_images_and_rank_0_judges(held_out: Path, shards: Path) -> None:
    """161 images, so that the ranks hold unequal numbers."""
    (first, values), (second, nothing) = run_ranks(run_on_a_rank, 2, held_out, shards)
    num_images, expected = run_on_a_rank(held_out, shards)
    assert num_images == 161 and (first, second) == (81, 80)
    assert values == expected and nothing == {}
