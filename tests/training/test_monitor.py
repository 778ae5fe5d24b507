import math

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor

from panfm.models.vit import EncoderConfig, build_vit, encode_visible
from panfm.training.monitor import (
    compute_alignment,
    compute_attention,
    compute_attention_entropy,
    compute_feature_std_ratio,
    compute_pooled_features,
    compute_rankme,
    compute_uniformity,
    evaluating,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def halve(images: Tensor) -> Tensor:
    return images / 128 - 1


def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    singular_values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    left, _ = torch.linalg.qr(draw(10, 4))
    right, _ = torch.linalg.qr(draw(4, 4, seed=1))
    features = left @ torch.diag(singular_values) @ right
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert compute_rankme(features) == pytest.approx(expected, rel=1e-5)


def test_rankme_of_collapsed_and_of_full_features() -> None:
    assert compute_rankme(torch.ones(8, 4)) == pytest.approx(1.0, abs=1e-4)
    assert compute_rankme(torch.eye(4)) == pytest.approx(4.0, abs=1e-4)


def test_std_ratio_of_collapsed_and_of_spread_features() -> None:
    assert compute_feature_std_ratio(torch.ones(8, 4)) == pytest.approx(0.0, abs=1e-7)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert compute_feature_std_ratio(corners) == pytest.approx(1.0)
    assert compute_feature_std_ratio(100 * corners) == pytest.approx(1.0)  # the scale of features does not matter


def test_alignment_and_uniformity_against_a_double_loop() -> None:
    features, mates = draw(7, 5), draw(7, 5, seed=1)
    x, y = ([(row / row.norm()).tolist() for row in rows] for rows in (features, mates))
    distances = [math.dist(a, b) ** 2 for a, b in zip(x, y, strict=True)]
    assert compute_alignment(features, mates) == pytest.approx(sum(distances) / 7, rel=1e-6)
    terms = [math.exp(-2 * math.dist(x[i], x[j]) ** 2) for i in range(7) for j in range(7) if i != j]
    assert compute_uniformity(features) == pytest.approx(math.log(sum(terms) / len(terms)), rel=1e-6)


def test_alignment_and_uniformity_of_extremes() -> None:
    features = draw(6, 3)
    assert compute_alignment(features, 3 * features) == pytest.approx(0.0, abs=1e-12)
    assert compute_alignment(features, -features) == pytest.approx(4.0)
    assert compute_uniformity(torch.ones(6, 3)) == pytest.approx(0.0, abs=1e-12)
    assert compute_uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8.0)  # one pair, 2 apart


def test_attention_entropy_of_one_token_of_all_and_of_half() -> None:
    one, even, half = torch.zeros(1, 1, 8), torch.full((1, 1, 8), 1 / 8), torch.zeros(1, 1, 8)
    one[..., 3] = 1.0
    half[..., :4] = 1 / 4
    assert compute_attention_entropy(one) == 0.0
    assert compute_attention_entropy(even) == pytest.approx(1.0)
    assert compute_attention_entropy(half) == pytest.approx(math.log(4) / math.log(8))
    both = torch.cat([one, even], dim=1)  # two heads
    assert compute_attention_entropy(both) == pytest.approx(0.5)


def test_undefined_is_none() -> None:
    bad = torch.full((3, 2), math.nan)
    assert compute_rankme(torch.zeros(3, 2)) is None
    assert compute_rankme(bad) is None
    assert compute_feature_std_ratio(torch.full((3, 2), math.inf)) is None
    assert compute_alignment(torch.ones(3, 2), bad) is None
    assert compute_uniformity(bad) is None and compute_uniformity(torch.ones(1, 2)) is None
    assert compute_attention_entropy(torch.full((1, 1, 4), math.nan)) is None


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [("test_vit", 8), ("test_vit3", 8), ("vit_small_patch16_dinov3", 16)],
)
def test_attention_is_what_the_fused_kernel_multiplies_values_by(name: str, patch_size: int) -> None:
    """With CLS, without any prefix token, and with rotary positions behind CLS and registers."""
    vit = build_vit(EncoderConfig(name=name, image_size=32, patch_size=patch_size), seed=0)
    images = draw_images(2)
    weights = compute_attention(vit, images, halve)  # [2, heads, T]
    assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:2]), atol=1e-5)

    attention = vit.blocks[-1].attn
    given: dict[str, Tensor] = {}
    handle = attention.register_forward_hook(
        lambda _, args, kwargs, output: given.update(x=args[0], output=output, **kwargs), with_kwargs=True
    )
    with evaluating(vit):
        encode_visible(vit, images, None, halve)
        attention.fused_attn = True
        attention(given["x"], **({"rope": given["rope"]} if isinstance(vit, Eva) else {}))
        handle.remove()
        bias = None if attention.qkv.bias is None else attention.qkv.bias
        if isinstance(vit, Eva) and attention.q_bias is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        values = torch.nn.functional.linear(given["x"], attention.qkv.weight, bias)
        values = values.chunk(3, dim=-1)[2].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [2, heads, T, d]
        looked = torch.einsum("nht,nhtd->nhd", weights, values).flatten(1)
        expected = attention.proj(attention.norm(looked))
    rows = given["output"][:, :1] if vit.cls_token is not None else given["output"][:, vit.num_prefix_tokens :]
    assert torch.allclose(expected, rows.mean(dim=1), atol=1e-5)


def test_a_look_leaves_modes_hooks_and_random_numbers_alone() -> None:
    vit = build_vit(EncoderConfig(name="test_vit", image_size=32, drop_path_rate=0.5), seed=0)
    vit.train()
    vit.blocks[0].eval()  # a part in another mode than the whole
    modes = [part.training for part in vit.modules()]
    state = torch.get_rng_state()
    features = compute_pooled_features(vit, draw_images(3), halve)
    compute_attention(vit, draw_images(3), halve)
    assert [part.training for part in vit.modules()] == modes
    assert not vit.blocks[-1].attn._forward_pre_hooks and not vit.blocks[-1].attn.attn_drop._forward_hooks
    assert torch.equal(torch.get_rng_state(), state) and not features.requires_grad
    assert torch.equal(features, compute_pooled_features(vit, draw_images(3), halve))  # no drop-path in it
