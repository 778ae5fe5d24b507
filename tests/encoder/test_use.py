"""Three lines of Python, patch tokens, attention maps, and a pipeline of scikit-learn."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from panfm.encoder import PanfmFeatures, load_encoder
from panfm.errors import UserError

VIT = "timm:test_vit@random:0?image_size=48"  # 3 x 3 patches of 16
CNN = "timm:test_resnet@random:0?image_size=48"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(6):
        pixels = rng.integers(0, 80, (60, 52, 3), dtype=np.uint8) + np.uint8(120 * (number % 2))
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_patch_tokens_stand_where_their_patches_are(paths: list[Path]) -> None:
    encoder = load_encoder(VIT)
    tokens = encoder.embed_tokens(paths, batch_size=4)
    assert tokens.shape == (6, 3, 3, 64)
    images = torch.from_numpy(np.stack([encoder.transform.apply(path.read_bytes()) for path in paths]))
    np.testing.assert_allclose(tokens.reshape(6, 9, 64), encoder.forward_tokens(images)[:, 1:].numpy(), atol=1e-5)
    maps = load_encoder(CNN).embed_tokens(paths)
    assert maps.shape[:3] == (6, 3, 3)


def test_attention_maps_are_the_class_tokens_weights_on_the_patches(paths: list[Path]) -> None:
    encoder = load_encoder(VIT)
    maps = encoder.attention_maps(paths, batch_size=4)
    block = encoder.module.model.blocks[-1]
    heads, width = block.attn.num_heads, 64
    assert maps.shape == (6, heads, 3, 3)
    # By hand: softmax of queries and keys of what reaches the last block.
    images = torch.from_numpy(np.stack([encoder.transform.apply(path.read_bytes()) for path in paths]))
    model = encoder.module.model
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(encoder._prepare(images))))
        for earlier in model.blocks[:-1]:
            x = earlier(x)
        q, k, _ = block.attn.qkv(block.norm1(x)).reshape(6, 10, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        weights = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)[:, :, 0, 1:]
    np.testing.assert_allclose(maps.reshape(6, heads, 9), weights.numpy(), atol=1e-5)
    np.testing.assert_allclose(load_encoder(f"{VIT}&dtype=bf16").attention_maps(paths), maps, atol=0.02)
    with pytest.raises(UserError, match="ResNet has no attention to show; take a ViT"):
        load_encoder(CNN).attention_maps(paths)
    with pytest.raises(UserError, match="no images are given"):
        encoder.attention_maps([])


def test_a_pipeline_of_scikit_learn(paths: list[Path]) -> None:
    labels = [number % 2 for number in range(6)]
    features = PanfmFeatures(VIT, batch_size=4)
    pipeline = clone(make_pipeline(features, LogisticRegression())).fit(paths, labels)
    assert pipeline.predict([str(path) for path in paths]).tolist() == labels
    step = pipeline[0]
    np.testing.assert_allclose(step.transform(np.array(paths, dtype=object)[:, None]), load_encoder(VIT).embed(paths))
    assert len(step.get_feature_names_out()) == 64
    written = pickle.dumps(step)
    assert len(written) < 10_000  # the address, not the weights
    np.testing.assert_allclose(pickle.loads(written).transform(paths), step.transform(paths))
    with pytest.raises(UserError, match="takes paths of image files, one a row"):
        features.transform(np.zeros((2, 3)))
