"""Masks are read by their kind, pixels are counted at the mask's own resolution, and the heads learn a dark lesion."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.dense import PlaceMaps, compute_maps, open_maps
from panfm.evaluation.families import SegmentationTarget
from panfm.evaluation.masks import read_regions
from panfm.evaluation.protocol import Material
from panfm.evaluation.segmentation import (
    SegmentationConfig,
    _draw_batches,
    _read_targets,
    compute_loss,
    find_regions,
    score_segmentation,
)
from panfm.evaluation.segmentation_heads import LinearHead, PyramidHead
from panfm.evaluation.splits import load_split
from panfm.measures.by_family import compute_point
from panfm.measures.outcomes import Outcome
from panfm.shards.index import ShardSet
from tests.evaluation.lesion_archive import HEIGHT, WIDTH, make_card, make_material, make_trial

LESION = SegmentationTarget(structures=("lesion",))
BOTH = SegmentationTarget(structures=("lesion", "core"), overlapping=True)
APART = SegmentationTarget(structures=("rim", "middle", "core"))
FAST = {"num_steps": 60, "batch_size": 8, "target_size": 16, "width": 8, "linear_rate": 0.02, "upernet_rate": 0.02}


@pytest.fixture(scope="module")
def material(lesions: ShardSet) -> Material:
    return make_material(lesions)


def read_bits(lesions: ShardSet, row: int) -> np.ndarray:
    data = lesions.read_mask(row)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_mask_is_one_region_a_structure(lesions: ShardSet) -> None:
    bits = read_bits(lesions, 0)
    assert set(np.unique(bits)) == {0, 1, 3}
    np.testing.assert_array_equal(read_regions(lesions, 0, LESION), bits[None] > 0)
    np.testing.assert_array_equal(read_regions(lesions, 0, BOTH), [bits > 0, bits == 3])
    np.testing.assert_array_equal(read_regions(lesions, 0, APART), [bits == 1, bits == 2, bits == 3])
    with pytest.raises(UserError, match=r"has the value 3; 2 structures have values up to 2"):
        read_regions(lesions, 0, SegmentationTarget(structures=("rim", "middle")))
    with pytest.raises(UserError, match="has the value 3; 1 structures have bits up to 1"):
        read_regions(lesions, 0, SegmentationTarget(structures=("lesion",), overlapping=True))


def test_regions_lie_where_the_grid_says() -> None:
    logits = torch.full((1, 2, 4), -1.0)
    logits[0, 0, 1] = 1.0  # the cell of the upper half, second quarter from the left
    found = find_regions(logits, (40, 80), exclusive=False)[0]
    rows, columns = np.nonzero(found)
    assert found[10, 30] and abs(columns.mean() - 29.5) < 1 and rows.max() < 20
    three = torch.stack(
        [torch.full((2, 2), 0.5), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0], [0, 1]])]
    )
    background_first = find_regions(three, (2, 2), exclusive=True)
    np.testing.assert_array_equal(background_first, [[[False, False], [False, False]], [[True, False], [False, True]]])


def test_the_loss_is_cross_entropy_and_dice() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 3, generator=rng)
    truth = torch.rand(2, 2, 3, 3, generator=rng) / 2
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    t = truth.numpy().astype(np.float64)
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = [(2 * (p[:, s] * t[:, s]).sum() + 1) / (p[:, s].sum() + t[:, s].sum() + 1) for s in range(2)]
    assert compute_loss(logits, truth, exclusive=False).item() == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-5)
    exclusive = torch.cat([torch.randn(2, 1, 3, 3, generator=rng), logits], dim=1)
    e = np.exp(exclusive.numpy().astype(np.float64))
    p = e / e.sum(axis=1, keepdims=True)
    shares = np.concatenate([1 - t.sum(axis=1, keepdims=True), t], axis=1)
    entropy = -(shares * np.log(p)).sum(axis=1).mean()
    dice = [(2 * (p[:, s + 1] * t[:, s]).sum() + 1) / (p[:, s + 1].sum() + t[:, s].sum() + 1) for s in range(2)]
    assert compute_loss(exclusive, truth, exclusive=True).item() == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-5)


def test_targets_are_the_shares_of_cells(lesions: ShardSet, material: Material) -> None:
    truth = _read_targets(np.array([4]), material, BOTH, 8).numpy() / 255
    bits = read_bits(lesions, 4)
    assert truth.shape == (1, 2, 8, 8)
    for s, region in enumerate((bits > 0, bits == 3)):
        cells = region.reshape(8, HEIGHT // 8, 8, WIDTH // 8).mean(axis=(1, 3))
        np.testing.assert_allclose(truth[0, s], cells, atol=0.5 / 255 + 1e-6)


def test_maps_do_not_depend_on_what_is_kept(lesions: ShardSet, material: Material) -> None:
    kept, computed = PlaceMaps(lesions, "several", 1 << 20), PlaceMaps(lesions, "several", 0)
    rows = np.array([7, 2, 7, 11])
    first = kept.read(material.encoder, rows)
    again = kept.read(material.encoder, rows[::-1])
    assert [values.shape for values in first] == [(4, 64, 4, 4)] * 4
    for a, b, c in zip(first, again, computed.read(material.encoder, rows), strict=True):
        assert torch.equal(a, b.flip(0)) and torch.equal(a[0], a[2]) and not torch.equal(a[0], a[1])
        torch.testing.assert_close(a, c)
    assert len(kept._kept) == 3 and len(computed._kept) == 0
    size = 4 * 64 * 16 * 2
    bounded = PlaceMaps(lesions, "several", 2 * size + 1)
    bounded.read(material.encoder, rows)
    assert list(bounded._kept) == [7, 2] and bounded._num_bytes == 2 * size
    same = open_maps(material.encoder, lesions, "last", 100)
    assert open_maps(material.encoder, lesions, "last", 100) is same
    assert open_maps(material.encoder, lesions, "several", 100) is not same


def test_the_whole_image_is_seen_and_not_its_centre_alone(lesions: ShardSet, material: Material) -> None:
    encoder = material.encoder
    image = Image.open(io.BytesIO(lesions.read_image(3))).convert("RGB")
    squeezed = image.resize((64, 64), Image.Resampling[encoder.transform.interpolation.upper()])
    (expected,) = compute_maps(encoder, torch.from_numpy(np.array(squeezed).transpose(2, 0, 1)[None].copy()), "last")
    (found,) = PlaceMaps(lesions, "last", 0).read(encoder, [3])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # half precision


def test_a_place_sees_its_part_of_the_whole_image(lesions: ShardSet) -> None:
    """Nothing is cropped, and places stand where they look: a change at the edge changes the places at the edge."""
    encoder = make_material(lesions, address="timm:test_resnet@random:0?image_size=64").encoder
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    images[1, :, :, 56:] = 255
    (maps,) = compute_maps(encoder, images, "last")
    change = (maps[1] - maps[0]).abs().sum(dim=(0, 1))  # [w]
    assert change[-1] > 2 * change[0]
    several = compute_maps(encoder, images, "several")
    assert [values.shape[-1] for values in several] == sorted((v.shape[-1] for v in several), reverse=True)
    assert len(several) == 4


@pytest.mark.parametrize("overlapping", [True, False])
def test_the_linear_head_finds_the_lesion_at_the_masks_resolution(
    lesions: ShardSet, material: Material, overlapping: bool
) -> None:
    target = {"structures": ["lesion", "core"], "overlapping": True} if overlapping else {"structures": ["lesion"]}
    card = make_card("segmentation", target, "jaccard")
    split = load_split(card, lesions)
    trial = make_trial(card, split, material, "linear")
    config = validate(SegmentationConfig, FAST, where="test")
    scored = score_segmentation(trial, material, config)
    S = len(card.target.structures)
    assert scored.scores.shape == (len(trial.test), 2 * S) and scored.targets is not None
    for place, row in enumerate(split.rows[trial.test]):
        bits = read_bits(lesions, int(row))
        assert bits.shape == (HEIGHT, WIDTH)
        assert scored.targets[place].tolist() == [(bits > 0).sum(), (bits == 3).sum()][:S]
    shared, predicted = scored.scores[:, :S], scored.scores[:, S:]
    assert (shared <= np.minimum(predicted, scored.targets)).all()
    outcome = Outcome(split.labels[trial.test], scored.scores, split.groups[trial.test], scored.targets)
    jaccard = compute_point("segmentation", "jaccard", outcome).value
    # A random encoder, places of 16 x 12 pixels; the core is smaller than one. Blind guesses reach 0.1.
    assert jaccard is not None and jaccard > (0.3 if overlapping else 0.5)
    again = score_segmentation(trial, material, config)
    np.testing.assert_array_equal(again.scores, scored.scores)


def test_the_pyramid_head_learns_and_sees_every_depth(lesions: ShardSet, material: Material) -> None:
    card = make_card("segmentation", {"structures": ["rim", "middle", "core"]}, "dice")
    split = load_split(card, lesions)
    trial = make_trial(card, split, material, "upernet", label_fraction=0.5)
    long, short = (
        score_segmentation(trial, material, validate(SegmentationConfig, FAST | {"num_steps": steps}, where="test"))
        for steps in (40, 1)
    )
    assert long.chosen["final_loss"] < 0.7 * short.chosen["final_loss"]
    head = PyramidHead([8, 16, 16, 32], 4, width=8, side=8).train()
    maps = [torch.randn(2, C, n, n, requires_grad=True) for C, n in ((8, 16), (16, 8), (16, 4), (32, 2))]
    head(maps).sum().backward()
    assert head(maps).shape == (2, 4, 8, 8)
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in maps)


def test_the_head_standardises_by_all_of_training(material: Material) -> None:
    head = LinearHead([3], 1).train()
    batches = [torch.randn(4, 3, 5, 5) * 7 + 2, torch.randn(4, 3, 5, 5) * 7 + 4]
    for batch in batches:
        head([batch])
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    torch.testing.assert_close(head.standardise.running_mean, means)


def test_each_image_comes_once_before_one_comes_twice() -> None:
    config = validate(SegmentationConfig, {"num_steps": 9, "batch_size": 4}, where="test")
    places = np.concatenate(list(_draw_batches(12, 3, config)))
    assert len(places) == 36
    for start in range(0, 36, 12):
        assert sorted(places[start : start + 12]) == list(range(12))


def test_a_diverging_head_is_an_error(lesions: ShardSet, material: Material) -> None:
    card = make_card("segmentation", {"structures": ["lesion"]}, "dice")
    trial = make_trial(card, load_split(card, lesions), material, "linear")
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+; lower segmentation.linear_rate"):
        score_segmentation(trial, material, validate(SegmentationConfig, FAST | {"linear_rate": 1e38}, where="test"))
