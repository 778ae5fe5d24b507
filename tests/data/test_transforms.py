"""transforms: what each step does to known pixels, and that the generator given is the only source of chance."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from panfm.config import to_plain, validate
from panfm.data.decode import DecodeError, open_image
from panfm.data.transforms import (
    LUMA,
    STAINS,
    AugmentConfig,
    CameraJitter,
    EvalTransform,
    StainJitter,
    apply_camera_jitter,
    apply_stain_jitter,
    augment_view,
    augment_views,
    get_crop_scale,
    render_views,
    sample_box,
    sample_view,
    sample_views,
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
    config = AugmentConfig(image_size=24, views=2)
    first, second = augment_views(png, modality, [np.random.default_rng(1), np.random.default_rng(2)], config)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(augment_view(png, modality, np.random.default_rng(2), config), second)


def test_the_plan_says_all_that_is_done(png: bytes, pixels: np.ndarray) -> None:
    config = AugmentConfig(image_size=24, views=3, local_views=2, local_size=16)
    rngs = [[np.random.default_rng(seed) for seed in range(5)] for _ in range(2)]
    plans = sample_views((32, 32), "clinical", rngs[0], config)
    views = augment_views(png, "clinical", rngs[1], config)
    for plan, view in zip(plans, views, strict=True):
        left, top, right, bottom = plan.box
        crop = Image.fromarray(pixels.transpose(1, 2, 0)[top:bottom, left:right])
        crop = crop.resize((plan.size, plan.size), Image.Resampling.BICUBIC)
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.mirrored else crop
        crop = crop.rotate(90 * plan.quarter_turns)
        expected = apply_camera_jitter(np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1)), plan.jitter)
        assert np.abs(expected.astype(int) - view).max() <= 2  # two bicubic kernels round apart by one


def test_local_views_come_last_smaller_and_from_the_same_decode(
    monkeypatch: pytest.MonkeyPatch, make_picture: Callable, make_bytes: Callable
) -> None:
    data = make_bytes(make_picture(3, 300, 200))
    decode, calls = simplejpeg.decode_jpeg, []
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *given, **named: calls.append(1) or decode(*given, **named))
    config = AugmentConfig(image_size=64, views=2, local_views=3, local_size=32)
    assert config.num_views == 5
    rngs = [np.random.default_rng(seed) for seed in range(5)]
    views = augment_views(data, "dermoscopic", rngs, config)
    assert [view.shape for view in views] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 3
    assert len(calls) == 1


def test_every_view_of_a_large_jpeg_agrees_with_a_full_decode(make_picture: Callable, make_bytes: Callable) -> None:
    # Large and local crops want different scales inside the DCT; one decode must serve the finest of them.
    data = make_bytes(make_picture(4, 1601, 1203), quality=90)
    config = switch_on(
        views=2, local_views=4, local_size=16, image_size=64, crop_scale=(0.3, 1.0), local_crop_scale=(0.02, 0.1)
    )
    whole = Image.open(io.BytesIO(data))
    for seed in range(3):
        plans = sample_views(whole.size, "clinical", [np.random.default_rng((seed, n)) for n in range(6)], config)
        for plan, view in zip(plans, render_views(open_image(data), plans), strict=True):
            expected = whole.resize((plan.size, plan.size), Image.Resampling.BICUBIC, box=plan.box)
            error = np.mean((np.asarray(expected).transpose(2, 0, 1).astype(float) - view) ** 2)
            assert 10 * np.log10(255**2 / error) > 35


def test_flips_and_turns_are_the_eight_of_the_square(png: bytes, pixels: np.ndarray) -> None:
    config = switch_on(flips=True, rotations=True)
    expected = {
        np.ascontiguousarray(np.rot90(base, turns, axes=(1, 2))).tobytes()
        for base in (pixels, pixels[:, :, ::-1])
        for turns in range(4)
    }
    seen = {augment_view(png, "clinical", np.random.default_rng(seed), config).tobytes() for seed in range(80)}
    assert seen == expected and len(expected) == 8


def test_camera_jitter_is_the_affine_map_that_it_says(pixels: np.ndarray) -> None:
    jitter = CameraJitter(exposure=1.2, contrast=0.7, saturation=1.4, balance=(1.1, 0.95, 1.02))
    image = pixels.astype(np.float64)
    grey = np.tensordot(LUMA, image, axes=1)
    image = grey + 1.4 * (image - grey)  # saturation
    image *= 1.2 * np.array([1.1, 0.95, 1.02])[:, None, None]  # exposure and white balance
    mean_grey = np.tensordot(LUMA, image, axes=1).mean()
    image = mean_grey + 0.7 * (image - mean_grey)  # contrast
    found = apply_camera_jitter(pixels, jitter)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    assert np.abs(found - np.clip(image, 0, 255)).max() <= 0.51
    assert np.abs(found.astype(int) - pixels).mean() > 2
    np.testing.assert_array_equal(apply_camera_jitter(pixels, CameraJitter(1.0, 1.0, 1.0, (1.0, 1.0, 1.0))), pixels)


def test_jitter_draws_fill_the_range_that_the_config_names() -> None:
    config = AugmentConfig(brightness=0.3, contrast=0.25, saturation=0.1, white_balance=0.05, stain=0.4)
    rng = np.random.default_rng(0)
    cameras = [sample_view((64, 48), "dermoscopic", rng, config).jitter for _ in range(500)]
    stains = [sample_view((64, 48), "histopathology", rng, config).jitter for _ in range(500)]
    drawn = np.array([(j.exposure, j.contrast, j.saturation, *j.balance) for j in cameras])
    np.testing.assert_allclose(drawn.min(axis=0), 1 - np.array([0.3, 0.25, 0.1, 0.05, 0.05, 0.05]), atol=0.006)
    np.testing.assert_allclose(drawn.max(axis=0), 1 + np.array([0.3, 0.25, 0.1, 0.05, 0.05, 0.05]), atol=0.006)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.15
    drawn = np.array([(*j.factors, *j.shifts) for j in stains])
    np.testing.assert_allclose(drawn.max(axis=0), [1.4] * 3 + [0.02] * 3, atol=0.008)
    np.testing.assert_allclose(drawn.min(axis=0), [0.6] * 3 + [-0.02] * 3, atol=0.008)


def test_camera_jitter_never_turns_the_hue() -> None:
    red = np.zeros((3, 8, 8), dtype=np.uint8)
    red[0] = 160
    red[1:] = 60
    config = switch_on(brightness=0.2, contrast=0.2, saturation=0.15)
    for seed in range(50):
        jitter = sample_view((8, 8), "clinical", np.random.default_rng(seed), config).jitter
        jittered = apply_camera_jitter(red, jitter).astype(int)
        assert (jittered[0] > jittered[1] + 50).all() and (np.abs(jittered[1] - jittered[2]) <= 1).all()


# Ruifrok and Johnston 2001 as scikit-image publishes them (skimage.color.rgb_from_hed): not normalised.
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def test_stain_jitter_is_deconvolution_factor_and_convolution_of_every_colour() -> None:
    steps = np.arange(0, 256, 15)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=0).reshape(3, -1)  # the whole cube of colours
    factors = np.array([1.15, 0.9, 1.05])
    expected = []
    for colour in colours.T:  # one at a time, as the papers write it
        density = -np.log((colour + 0.5) / 256)
        amounts = np.linalg.solve(RGB_FROM_HED.T, density)
        expected.append(256 * np.exp(-(RGB_FROM_HED.T @ (factors * amounts))) - 0.5)
    view = colours.astype(np.uint8).reshape(3, len(steps), -1)
    found = apply_stain_jitter(view, StainJitter(tuple(factors), (0.0, 0.0, 0.0))).reshape(3, -1)
    assert np.abs(found - np.clip(np.array(expected).T, 0, 255)).max() <= 0.51
    np.testing.assert_array_equal(apply_stain_jitter(view, StainJitter((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))), view)


def test_stain_jitter_moves_one_stain_and_leaves_the_others() -> None:
    density = 0.8 * RGB_FROM_HED[0] / np.linalg.norm(RGB_FROM_HED[0])  # a pixel that holds 0.8 of haematoxylin alone
    view = np.round(np.exp(-density) * 256 - 0.5).astype(np.uint8)[:, None, None].repeat(4, axis=1)

    def measure(jittered: np.ndarray) -> np.ndarray:
        return np.linalg.solve(STAINS.T, -np.log((jittered[:, 0, 0] + 0.5) / 256))

    stronger = apply_stain_jitter(view, StainJitter((1.2, 0.7, 1.3), (0.0, 0.0, 0.0)))
    np.testing.assert_allclose(measure(stronger), [0.96, 0, 0], atol=0.015)
    shifted = apply_stain_jitter(view, StainJitter((1.0, 1.0, 1.0), (0.1, -0.05, 0.07)))
    np.testing.assert_allclose(measure(shifted), [0.9, -0.05, 0.07], atol=0.015)


def test_stain_jitter_keeps_glass_white_and_loses_no_tissue() -> None:
    # Tissue is what its stains leave of white light; glass is what has none.
    amounts = np.stack(np.meshgrid([0.15, 0.5, 1.2], [0.1, 0.4, 0.9], [0.0, 0.05, 0.2]), axis=-1).reshape(-1, 3)
    tissue = np.round(256 * np.exp(-amounts @ STAINS) - 0.5).astype(np.uint8).T.reshape(3, 3, -1)
    white, black = np.full((3, 2, 2), 255, dtype=np.uint8), np.zeros((3, 2, 2), dtype=np.uint8)
    for seed in range(300):
        jitter = sample_view((8, 8), "histopathology", np.random.default_rng(seed), AugmentConfig()).jitter
        glass = apply_stain_jitter(white, jitter)
        assert glass.min() >= 244 and np.ptp(glass) <= 8
        assert apply_stain_jitter(black, jitter).max() <= 4
        jittered = apply_stain_jitter(tissue, jitter)
        assert jittered.min() > 0 and jittered.max() < 255  # nothing is cut off at either end


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


def test_a_box_that_does_not_fit_is_drawn_again() -> None:
    rng = np.random.default_rng(
        0
    )  # upright boxes of three quarters of a 4 : 3 image do not fit; clipped ones are small
    boxes = np.array([sample_box((400, 300), (0.75, 0.8), 4 / 3, 224, rng) for _ in range(300)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 120_000
    assert (areas < 0.74).mean() < 0.02 and areas.max() < 0.81  # ten misses in a row are clipped


def test_total_body_crops_hold_the_middle_of_the_tile() -> None:
    # 15 mm on 300 pixels: the config promises that the 5 mm in the middle are in every crop, whole.
    config, rng = AugmentConfig(), np.random.default_rng(0)
    boxes = np.array([sample_view((300, 300), "total_body", rng, config).box for _ in range(3000)])
    assert boxes[:, :2].max() <= 100 and boxes[:, 2:].min() >= 200
    sides = np.array([sample_view((300, 300), "total_body", rng, config, local=True).box for _ in range(500)])
    areas = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1]) / 300**2
    assert 0.19 < areas.min() < 0.23 and 0.57 < areas.max() < 0.61


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
    with pytest.raises(UserError, match=r"local_crop_scale .*must be \[smallest, largest\]; try \[0.1, 0.5\]"):
        validate(AugmentConfig, {"local_crop_scale": [0.5, 0.1]}, where="test")


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
