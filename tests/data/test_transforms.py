"""transforms: what each step does to known pixels, and that the generator given is the only source of chance."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from panfm.config import to_plain, validate
from panfm.data.decode import DecodeError
from panfm.data.transforms import (
    LUMA,
    OPTICAL_DENSITY,
    STAINS,
    AugmentConfig,
    EvalTransform,
    augment_view,
    augment_views,
    get_crop_scale,
    jitter_colour,
    jitter_stain,
    sample_box,
)
from panfm.errors import UserError
from panfm.shards.schema import MODALITIES

STILL = AugmentConfig(
    image_size=32,
    crop_scale=(1.0, 1.0),
    total_body_crop_scale=(1.0, 1.0),
    histopathology_crop_scale=(1.0, 1.0),
    aspect_ratio=1.0,
    flips=False,
    rotations=False,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    white_balance=0.0,
    stain=0.0,
    stain_shift=0.0,
)


def switch_on(**fields: object) -> AugmentConfig:
    return validate(AugmentConfig, {**to_plain(STILL), **fields}, where="test")


@pytest.fixture
def png(make_picture: Callable, make_bytes: Callable) -> bytes:
    return make_bytes(make_picture(5, 32, 32), "PNG")


@pytest.fixture
def pixels(make_picture: Callable) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(make_picture(5, 32, 32)).transpose(2, 0, 1))


@pytest.mark.parametrize("modality", MODALITIES)
def test_with_everything_off_a_view_is_the_image(modality: str, png: bytes, pixels: np.ndarray) -> None:
    view = augment_view(png, modality, np.random.default_rng(0), STILL)
    assert view.dtype == np.uint8 and view.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(view, pixels)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_same_generator_gives_the_same_views_and_another_gives_others(modality: str, png: bytes) -> None:
    config = AugmentConfig(image_size=24)
    first, second = augment_views(png, modality, [np.random.default_rng(1), np.random.default_rng(2)], config)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(augment_view(png, modality, np.random.default_rng(2), config), second)


def test_flips_and_turns_are_the_eight_of_the_square(png: bytes, pixels: np.ndarray) -> None:
    config = switch_on(flips=True, rotations=True)
    expected = {
        np.ascontiguousarray(np.rot90(base, turns, axes=(1, 2))).tobytes()
        for base in (pixels, pixels[:, :, ::-1])
        for turns in range(4)
    }
    seen = {augment_view(png, "clinical", np.random.default_rng(seed), config).tobytes() for seed in range(80)}
    assert seen == expected and len(expected) == 8


def test_colour_jitter_is_the_affine_map_that_it_says(pixels: np.ndarray) -> None:
    config = switch_on(brightness=0.2, contrast=0.3, saturation=0.4, white_balance=0.1)
    draws = 2 * np.random.default_rng(7).random(6) - 1
    image = pixels.astype(np.float64)
    grey = np.tensordot(LUMA, image, axes=1)
    image = grey + (1 + 0.4 * draws[2]) * (image - grey)  # saturation
    image *= ((1 + 0.2 * draws[0]) * (1 + 0.1 * draws[3:6]))[:, None, None]  # exposure and white balance
    mean_grey = np.tensordot(LUMA, image, axes=1).mean()
    image = mean_grey + (1 + 0.3 * draws[1]) * (image - mean_grey)  # contrast
    found = jitter_colour(pixels, np.random.default_rng(7), config)
    assert np.abs(found - np.clip(image, 0, 255)).max() <= 0.51
    assert np.abs(found.astype(int) - pixels).mean() > 2


def test_colour_jitter_never_turns_the_hue() -> None:
    red = np.zeros((3, 8, 8), dtype=np.uint8)
    red[0] = 160
    red[1:] = 60
    config = switch_on(brightness=0.2, contrast=0.2, saturation=0.15)
    for seed in range(50):
        jittered = jitter_colour(red, np.random.default_rng(seed), config).astype(int)
        assert (jittered[0] > jittered[1] + 50).all() and (np.abs(jittered[1] - jittered[2]) <= 1).all()


def test_stain_jitter_scales_one_stain_and_leaves_the_others() -> None:
    haematoxylin = np.exp(-0.8 * STAINS[0]) * 256 - 1  # a pixel that holds 0.8 of the first stain alone
    view = np.round(haematoxylin).astype(np.uint8)[:, None, None].repeat(4, axis=1).repeat(4, axis=2)
    config = switch_on(stain=0.2)
    draws = 2 * np.random.default_rng(3).random(6) - 1
    jittered = jitter_stain(view, np.random.default_rng(3), config)
    amounts = np.linalg.solve(STAINS.T, OPTICAL_DENSITY[jittered[:, 0, 0]].astype(np.float64))
    np.testing.assert_allclose(amounts, [0.8 * (1 + 0.2 * draws[0]), 0, 0], atol=0.015)
    shifted = jitter_stain(view, np.random.default_rng(3), switch_on(stain_shift=0.1))
    amounts = np.linalg.solve(STAINS.T, OPTICAL_DENSITY[shifted[:, 0, 0]].astype(np.float64))
    np.testing.assert_allclose(amounts, np.array([0.8, 0, 0]) + 0.1 * draws[3:], atol=0.02)


def test_histopathology_gets_stain_and_cameras_get_colour(png: bytes, pixels: np.ndarray) -> None:
    for modality in MODALITIES:
        colour = augment_view(png, modality, np.random.default_rng(0), switch_on(brightness=0.3))
        stain = augment_view(png, modality, np.random.default_rng(0), switch_on(stain=0.3))
        is_slide = modality == "histopathology"
        assert np.array_equal(colour, pixels) == is_slide
        assert np.array_equal(stain, pixels) != is_slide


def test_boxes_keep_to_the_scale_of_their_modality() -> None:
    config = AugmentConfig(total_body_crop_scale=(0.6, 0.9))
    rng = np.random.default_rng(0)
    for modality, low, high in (("total_body", 0.6, 0.9), ("dermoscopic", 0.3, 1.0)):
        areas = []
        for _ in range(500):
            x0, y0, x1, y1 = sample_box((200, 150), get_crop_scale(modality, config), 4 / 3, 128, rng)
            assert 0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 150
            assert 0.7 < (x1 - x0) / (y1 - y0) < 1.42
            areas.append((x1 - x0) * (y1 - y0) / 30_000)
        assert low * 0.97 < min(areas) < low + 0.08 and max(areas) < high * 1.03
        assert max(areas) > high - 0.12


def test_boxes_of_large_images_lie_on_whole_scaled_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        box = sample_box((3001, 2003), (0.5, 1.0), 4 / 3, 128, rng)
        assert all(edge % 8 == 0 for edge in box)
        assert box[2] <= 3001 and box[3] <= 2003
    assert sample_box((5, 200), (0.9, 1.0), 4 / 3, 8, rng)[2] <= 5  # no aspect fits: clipped


def test_bytes_that_do_not_decode_are_said(png: bytes) -> None:
    with pytest.raises(DecodeError, match="truncated"):
        augment_view(png[: len(png) // 2], "clinical", np.random.default_rng(0), STILL)


def test_config_values_out_of_range_are_named() -> None:
    for key, value in (("brightness", 1.0), ("crop_scale", (0.0, 1.0)), ("views", 0), ("hue", 0.1)):
        with pytest.raises(UserError, match=key):
            validate(AugmentConfig, {key: value}, where="test")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_transform_is_resize_then_centre_crop(
    interpolation: str, make_picture: Callable, make_bytes: Callable
) -> None:
    from torchvision.transforms import v2

    picture = make_picture(6, 201, 150)
    transform = EvalTransform(image_size=56, resize_size=64, interpolation=interpolation)
    reference = v2.Compose([v2.Resize(64, v2.InterpolationMode(interpolation)), v2.CenterCrop(56)])
    found = transform.apply(make_bytes(picture, "PNG"))
    assert found.shape == (3, 56, 56) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(reference(picture)).transpose(2, 0, 1))


def test_evaluation_transform_leaves_an_image_of_the_right_size_alone(png: bytes, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(EvalTransform(image_size=32, resize_size=32).apply(png), pixels)


def test_normalisation_and_plain_form() -> None:
    transform = EvalTransform(32, 36, "bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = transform.normalise(images).view(-1)
    torch.testing.assert_close(found, torch.tensor([-2.5, -0.8, 1.4]))
    assert found.dtype == torch.float32
    plain = transform.to_plain()
    assert plain["mean"] == [0.5, 0.4, 0.3]
    assert EvalTransform.from_plain(plain) == transform


def test_small_images_are_enlarged(make_bytes: Callable) -> None:
    view = augment_view(
        make_bytes(Image.new("RGB", (9, 7), (9, 99, 199)), "PNG"), "clinical", np.random.default_rng(0), STILL
    )
    assert view.shape == (3, 32, 32)
    assert view.reshape(3, -1).min(axis=1).tolist() == [9, 99, 199] == view.reshape(3, -1).max(axis=1).tolist()
