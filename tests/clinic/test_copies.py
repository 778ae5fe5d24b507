"""One photograph under two patients: found however it was changed, and held together wherever folds are made."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from panfm.clinic.copies import find_copies, hold_together


def draw(seed: int) -> Image.Image:
    """Pattern at several scales, as skin has it."""
    rng = np.random.default_rng(seed)
    total = np.full((240, 320, 3), 128.0)
    for step, contrast in ((64, 40), (16, 25), (4, 15)):
        coarse = rng.normal(0, contrast, (240 // step, 320 // step, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., channel]).resize((320, 240), Image.Resampling.BICUBIC) for channel in range(3)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


CHANGES = {
    "smaller": lambda image: image.resize((200, 150)),
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.rotate(90, expand=True),
    "cropped": lambda image: image.crop((3, 2, 318, 238)),
    "brighter": lambda image: image.point(lambda value: min(255, value + 25)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_under_another_patient_is_found(change: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for number, path in enumerate(paths):
        image = CHANGES[change](draw(2)) if number == 6 else draw(number)
        image.save(path, quality=75)
    Image.new("L", (64, 64)).save(paths[7])  # nothing to recognise
    groups = [f"p{number}" for number in range(8)]
    assert find_copies(paths, groups) == [(2, 6)]
    groups[6] = "p2"  # a patient's own copies are nobody's loss
    assert find_copies(paths, groups) == []


def test_what_is_joined_by_a_chain_is_one_group() -> None:
    groups = ("a", "b", "c", "d", "a", "e")
    assert hold_together(groups, []) == groups
    assert hold_together(groups, [(4, 1), (1, 2)]) == ("a", "a", "a", "d", "a", "e")
    assert hold_together(groups, [(0, 1), (3, 5)]) == ("a", "a", "c", "d", "a", "d")
