"""preview: the picture shows what the loader feeds, where it was cut, and no one's name."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.data.decode import open_image
from panfm.data.loader import DataConfig, Loader, LoaderState, build_loader
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig
from panfm.data.preview import collect_samples, write_preview
from panfm.data.preview_page import HIDDEN, PreviewSample, _draw_boxes, _lay_mask, describe_views, draw_page
from panfm.data.transforms import AugmentConfig, CameraJitter, ViewPlan, render_views
from panfm.errors import UserError
from panfm.shards.index import open_shard_set

AUGMENT = AugmentConfig(image_size=32, views=2, local_views=3, local_size=16)
MASK = MaskConfig(kind="block", ratio=0.5)
GRID = (4, 4)


def build(*folders: Path, mixture: MixtureConfig | None = None) -> Loader:
    return build_loader(
        DataConfig(shards=tuple(map(str, folders)), workers=0),
        mixture or MixtureConfig(),
        AUGMENT,
        mask=MASK,
        mask_grid=GRID,
        seed=3,
        global_batch_size=8,
        micro_batch_size=8,
        excluded={},
    )


@pytest.fixture
def loader(alpha: Path, beta: Path) -> Iterator[Loader]:
    with build(alpha, beta) as built:
        yield built


def test_samples_are_the_first_of_their_modality_and_what_training_gets(
    loader: Loader, alpha: Path, beta: Path
) -> None:
    sets = {"alpha": open_shard_set(alpha), "beta": open_shard_set(beta)}
    found = collect_samples(loader, tuple(sets.values()), AUGMENT, GRID, 4)
    assert {modality: len(samples) for modality, samples in found.items()} == {
        "clinical": 4,
        "dermoscopic": 4,
        "total_body": 0,
        "histopathology": 4,
    }
    stream = loader.iterate(LoaderState(0, ((0, 0),)), rank=0, world_size=1)
    batches = [next(stream)[0] for _ in range(8)]
    seen = set()
    for modality, samples in found.items():
        for sample in samples:
            batch, place = batches[sample.position // 8], sample.position % 8
            assert len(sample.views) == len(sample.plans) == 5
            for view, other in zip(sample.views, batch.views, strict=True):
                np.testing.assert_array_equal(view, other[place].numpy())
            np.testing.assert_array_equal(sample.masks.reshape(2, -1), batch.masks[:, place].numpy())
            row = loader.draw(range(sample.position, sample.position + 1)).samples[0].row
            seen.add((sample.source, row))
            assert sets[sample.source].table["modality"][row].as_py() == modality
            stored = open_image(sets[sample.source].read_image(row))
            for view, again in zip(sample.views, render_views(stored, sample.plans), strict=True):
                np.testing.assert_array_equal(view, again)  # the boxes and changes on the page made these pixels
    assert len(seen) == 12


def test_a_sample_that_is_drawn_twice_is_shown_once(alpha: Path) -> None:
    with build(alpha, mixture=MixtureConfig(group_share=0.5)) as loader:  # groups repeat what single draws had
        found = collect_samples(loader, [open_shard_set(alpha)], AUGMENT, GRID, 25)["dermoscopic"]
        rows = [loader.draw(range(sample.position, sample.position + 1)).samples[0].row for sample in found]
    assert len(found) == 25 == len(set(rows))


def test_the_picture_and_its_table(loader: Loader, alpha: Path, beta: Path, tmp_path: Path) -> None:
    sets = [open_shard_set(alpha), open_shard_set(beta)]
    path = tmp_path / "page.png"
    preview = write_preview(loader, sets, AUGMENT, MASK, GRID, path, per_modality=2, title="A title")
    said = str(preview)
    assert sorted(row[:3] for row in preview.table[1:]) == [
        ("alpha/clinical", "20", "29.9%"),
        ("alpha/dermoscopic", "40", "59.7%"),
        ("beta/histopathology", "7", "10.4%"),
    ]
    assert preview.table[1][3:] == (
        "0.3 to 1, local 0.05 to 0.3",
        "brightness ± 20 %, contrast ± 20 %, saturation ± 15 %, white balance ± 5 %",
        "block 0.5, 8 of 4 x 4 patches",
    )
    assert preview.table[3][4] == "stains ± 15 %, density ± 0.02"
    assert preview.missing == ("no samples: total_body",) and said.splitlines()[-1] == str(path)
    with Image.open(path) as page:
        assert page.format == "PNG" and page.mode == "RGB" and not page.info
        height = page.height
    for shard_set in sets:
        for column in ("key", "patient_id", "group_id"):
            assert not any(name in said for name in shard_set.table[column].to_pylist())
    write_preview(loader, sets, AUGMENT, MASK, GRID, path, per_modality=1, title="A title")
    with Image.open(path) as page:
        assert 0.4 * height < page.height < 0.75 * height  # half of the rows, the same heads
    with pytest.raises(UserError, match=r"page.jpg: a preview is a PNG"):
        write_preview(loader, sets, AUGMENT, MASK, GRID, tmp_path / "page.jpg", per_modality=1, title="")


def test_a_modality_that_the_mixture_never_draws_is_said(alpha: Path, tmp_path: Path) -> None:
    mixture = MixtureConfig(weighting="explicit", over="modality", weights={"dermoscopic": 1.0, "clinical": 0.0})
    with build(alpha, mixture=mixture) as loader:
        preview = write_preview(
            loader, [open_shard_set(alpha)], AUGMENT, MASK, GRID, tmp_path / "a.png", per_modality=1, title=""
        )
    assert preview.missing == (
        "never drawn, weight 0 in the mixture: clinical",
        "no samples: total_body, histopathology",
    )


def make_sample(size: tuple[int, int], box: tuple[int, int, int, int]) -> PreviewSample:
    grey = Image.new("RGB", size, (120, 120, 120))
    plan = ViewPlan(box, 32, False, 0, CameraJitter(1.0, 1.0, 1.0, (1.0, 1.0, 1.0)))
    return PreviewSample(
        "alpha", 0, size, grey, (plan,), (np.zeros((3, 32, 32), np.uint8),), np.eye(4, dtype=bool)[None]
    )


def test_boxes_are_drawn_where_the_views_were_cut() -> None:
    shown = np.asarray(_draw_boxes(make_sample((400, 200), (100, 50, 300, 150)), 1, 160)).astype(int)
    assert shown.shape[:2] == (160, 320)  # 0.8 of the image
    changed = np.argwhere(np.abs(shown - 120).max(axis=2) > 20)
    assert changed.min(axis=0).tolist() == [40, 80] and changed.max(axis=0).tolist() == [119, 239]
    assert np.abs(shown[60:100, 100:220] - 120).max() < 3  # nothing inside


def test_hidden_patches_are_greyed_and_visible_ones_are_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (120, 120, 3), dtype=np.uint8)
    hidden = rng.random((3, 5)) < 0.5
    found = np.asarray(_lay_mask(Image.fromarray(picture), hidden)).astype(int)
    where = hidden.repeat(40, axis=0).repeat(24, axis=1)
    np.testing.assert_array_equal(found[~where], picture[~where])
    assert np.abs(found[where] - HIDDEN).max() < 40


def test_the_line_of_a_modality_names_what_is_on_and_nothing_else() -> None:
    assert "stains ± 15 %" in describe_views("histopathology", AUGMENT)
    assert "brightness" not in describe_views("histopathology", AUGMENT)
    assert "(local: 20 % to 60 %)" in describe_views("total_body", AUGMENT)
    plain = AugmentConfig(flips=False, rotations=False, brightness=0, contrast=0, saturation=0, white_balance=0)
    line = describe_views("clinical", plain)
    assert "colour unchanged" in line and "mirrored" not in line and "local" not in line


def test_a_page_without_masks_or_local_views_is_narrower() -> None:
    sample = make_sample((64, 48), (0, 0, 32, 32))
    samples = {"clinical": [sample], "dermoscopic": [], "total_body": [], "histopathology": []}
    augment = AugmentConfig(image_size=32, flips=False, rotations=False, brightness=0, contrast=0, saturation=0)
    masked = draw_page(samples, augment, MASK, GRID, "t")
    plain = draw_page(samples, augment, None, GRID, "t")
    assert plain.width < masked.width and plain.height == masked.height
