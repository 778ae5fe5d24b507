"""CLIP and SigLIP against golden numbers, against a loop over their definition, and over two ranks."""

import math
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.captions import TokenizerConfig, number_texts
from panfm.distributed import all_reduce_mean, get_rank, get_world_size
from panfm.errors import UserError
from panfm.models.text import TextConfig
from panfm.objectives.demands import (
    ObjectiveConfig,
    find_coupling,
    get_mask_config,
    get_num_views,
    get_tokenizer_config,
)
from panfm.objectives.image_text import (
    Captions,
    ImageText,
    ImageTextConfig,
    compute_image_text_loss,
)
from panfm.objectives.interface import EncodedView
from panfm.objectives.temperature import bound_log_scale
from tests.objectives.ranks_worker import take
from tests.ranks import run_ranks

needs_open_clip = pytest.mark.skipif(find_spec("open_clip") is None, reason='no open_clip: pip install "panfm[text]"')
SMALL = TextConfig(width=32, layers=1, heads=2, context_length=12)


def know(captions: list[int], lesions: list[int] | None = None, patients: list[int] | None = None) -> Captions:
    unknown = [NO_GROUP] * len(captions)
    return Captions(*(torch.tensor(values) for values in (captions, lesions or unknown, patients or unknown)))


# ------------------------------------------------------------------------------------------------ the originals


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_losses_are_the_originals(golden: Path, name: str) -> None:
    tensors = load_file(golden / f"contrastive_{name}.safetensors")
    keys = {"images": "image_features_raw", "texts": "text_features_raw", "scale": "log_logit_scale"}
    keys |= {"bias": "logit_bias"} if name == "siglip" else {}
    leaves = {short: tensors[f"in.{key}"].double().requires_grad_() for short, key in keys.items()}
    result = compute_image_text_loss(
        leaves["images"], leaves["texts"], know(list(range(8))), leaves["scale"], leaves.get("bias")
    )
    result.loss.backward()
    variant = ".no_bias" if name == "clip" else ""
    torch.testing.assert_close(result.loss, tensors[f"out64.loss{variant}"], rtol=0, atol=1e-9)
    for short, key in keys.items():
        torch.testing.assert_close(leaves[short].grad, tensors[f"grad64{variant}.{key}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_originals_numbers_in_float32_and_under_autocast(golden: Path, name: str, autocast: bool) -> None:
    tensors = load_file(golden / f"contrastive_{name}.safetensors")
    sides = (tensors[f"in.{side}_features_raw"] for side in ("image", "text"))
    bias = tensors["in.logit_bias"] if name == "siglip" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = compute_image_text_loss(*sides, know(list(range(8))), tensors["in.log_logit_scale"], bias).loss
    expected = tensors["out64.loss" if name == "siglip" else "out64.loss.no_bias"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_half_precision_and_autocast_do_not_reach_the_loss(golden: Path, name: str) -> None:
    tensors = load_file(golden / f"contrastive_{name}.safetensors")
    images, texts = (tensors[f"in.{side}_features_raw"].bfloat16() for side in ("image", "text"))
    scale, bias = tensors["in.log_logit_scale"], tensors["in.logit_bias"] if name == "siglip" else None
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute_image_text_loss(images, texts, know(list(range(8))), scale, bias).loss
    wide = None if bias is None else bias.double()
    exact = compute_image_text_loss(images.double(), texts.double(), know(list(range(8))), scale.double(), wide).loss
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(exact), abs=1e-5)


# ------------------------------------------------------------------------------------------------ who takes part


def loop(images: Tensor, texts: Tensor, known: Captions, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, list]:
    """The definition, pair by pair; also the rows whose own caption is the nearest."""
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    rows = [row for row, caption in enumerate(known.captions.tolist()) if caption != NO_GROUP]
    losses, found = [], []
    for i in rows:
        others = []
        for j in rows:
            same = {key: known_of(known, key, i) == known_of(known, key, j) is not None for key in vars(known)}
            told_apart = known_of(known, "lesions", i) is not None and known_of(known, "lesions", j) is not None
            if i == j or not (same["captions"] or same["lesions"] or (same["patients"] and not told_apart)):
                others.append(j)
        to_texts = torch.cat([images[i] @ texts[j] * scale.exp() for j in others])
        to_images = torch.cat([texts[i] @ images[j] * scale.exp() for j in others])
        own = others.index(i)
        if bias is None:
            losses.append(-(to_texts.log_softmax(0)[own] + to_images.log_softmax(0)[own]) / 2)
        else:
            signs = torch.tensor([1.0 if j == i else -1.0 for j in others])
            losses.append(-(signs * (to_texts + bias)).sigmoid().log().sum())
        if int(to_texts.argmax()) == own:
            found.append(i)
    return torch.stack(losses).mean(), found


def known_of(known: Captions, key: str, row: int) -> int | None:
    value = int(getattr(known, key)[row])
    return None if value == NO_GROUP else value


@pytest.mark.parametrize("with_bias", [False, True])
def test_pairs_that_may_belong_together_are_left_out(with_bias: bool) -> None:
    torch.manual_seed(0)
    none = NO_GROUP
    known = know(  #    twice one text;  none;  a lesion in two photographs;  patients 1 and 2
        captions=[1, 1, 2, none, 3, 4, 5, 6, 7, 8, none],
        lesions=[none, none, none, none, 7, 7, 8, 9, none, 9, 8],
        patients=[none, none, none, none, 1, 1, 1, 2, 2, 2, 1],
    )
    leaves = []
    for function in (compute_image_text_loss, loop):
        torch.manual_seed(1)
        values = [torch.randn(11, 6), torch.randn(11, 6), torch.tensor([2.0]), torch.tensor([-3.0])]
        images, texts, scale, bias = (value.double().requires_grad_() for value in values)
        answer = function(images, texts, known, scale, bias if with_bias else None)
        loss = answer[0] if function is loop else answer.loss
        loss.sum().backward()
        found = answer[1] if function is loop else answer.found.nonzero().flatten().tolist()
        leaves.append((loss.detach().reshape(()), images.grad, texts.grad, scale.grad, bias.grad, found))
        if function is compute_image_text_loss:
            assert answer.captioned.tolist() == [caption != none for caption in known.captions.tolist()]
            torch.testing.assert_close(answer.losses.sum() / 9, answer.loss.detach())
            assert not answer.losses[[3, 10]].any() and not images.grad[[3, 10]].any() and not texts.grad[3].any()
    *ours, our_found = leaves[0]
    *expected, expected_found = leaves[1]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert our_found == expected_found


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("captions", [[NO_GROUP] * 3, [5], [5, 5], [NO_GROUP, 5], [NO_GROUP]])
def test_small_and_captionless_batches_are_finite(captions: list[int], with_bias: bool) -> None:
    images, texts = (torch.randn(len(captions), 4, requires_grad=True) for _ in "it")
    bias = torch.full((1,), -10.0, requires_grad=True) if with_bias else None
    result = compute_image_text_loss(images, texts, know(captions), torch.zeros(1, requires_grad=True), bias)
    result.loss.backward()
    assert images.grad.isfinite().all() and texts.grad.isfinite().all()
    if not with_bias or set(captions) == {NO_GROUP}:
        assert float(result.loss.detach()) == 0.0  # nothing to tell it apart from
    else:
        assert float(result.loss.detach()) > 5.0  # a yes that the bias takes for a no
    assert int(result.found.sum()) == sum(caption != NO_GROUP for caption in captions)


def test_collapsed_embeddings_find_nothing_but_the_first() -> None:
    result = compute_image_text_loss(torch.ones(6, 4), torch.ones(6, 4), know(list(range(6))), torch.zeros(1))
    assert result.found.tolist() == [True] + [False] * 5
    assert float(result.loss) == pytest.approx(math.log(6), abs=1e-6)


# ------------------------------------------------------------------------------------------------ the temperature


def test_the_scale_keeps_to_its_bounds_and_comes_back_from_them() -> None:
    for start, sign, bound in ((math.log(99), 1.0, 100.0), (math.log(1.01), -1.0, 1.0)):
        log_scale = nn.Parameter(torch.tensor([start]))
        optimizer = torch.optim.SGD([log_scale], lr=0.1)
        seen = []
        for step in range(20):
            value = bound_log_scale(log_scale, lowest=0.0).exp()
            optimizer.zero_grad()
            (value.log() * (-sign if step < 10 else sign)).sum().backward()  # pushed out, then in
            optimizer.step()
            seen.append(float(value.detach()))
        assert min(seen) >= 1.0 - 1e-5 and max(seen) <= 100.0 + 1e-3
        assert seen[9] == pytest.approx(bound, rel=1e-5)
        assert abs(math.log(seen[-1] / bound)) > 0.5


# ------------------------------------------------------------------------------------------------ the module


def make_texts(rows: list[list[int]], length: int = 8) -> Tensor:
    """Token ids: start, the given ones, end, zeros; an empty list is no caption."""
    texts = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        if row:
            texts[number, : len(row) + 2] = torch.tensor([49406, *row, 49407])
    return texts


def give_texts(batch: Batch, texts: Tensor) -> Batch:
    return replace(batch, captions=number_texts(texts), texts=texts)


def encode(z: Tensor) -> EncodedView:
    """A view whose two patch tokens (behind a CLS that is not looked at) have the mean z [B, D]."""
    return EncodedView(
        torch.zeros(len(z), 3, 8, 8, dtype=torch.uint8), torch.stack([z + 100, z - 1, z + 1], dim=1), 1, None
    )


@needs_open_clip
def test_without_a_caption_the_loss_is_zero_and_every_gradient_exists(make_batch) -> None:
    for loss in ("clip", "siglip"):
        objective = ImageText(ImageTextConfig(loss=loss, output_dim=16, text=SMALL), input_dim=8)
        for size in (4, 1):
            z = torch.randn(size, 8, requires_grad=True)
            objective.zero_grad()
            output = objective((encode(z),), give_texts(make_batch(size), make_texts([[]] * size, 1)))
            output.loss.backward()
            assert float(output.loss.detach()) == 0.0
            assert float(output.metrics["share_with_caption"]) == 0.0
            assert float(output.metrics["accuracy"].count) == 0.0
            assert z.grad is not None and not z.grad.any()
            assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@needs_open_clip
def test_captionless_images_cost_nothing_and_change_nothing(make_batch) -> None:
    torch.manual_seed(0)
    objective = ImageText(ImageTextConfig(output_dim=16, text=SMALL), input_dim=8)
    seen = []
    objective.text.network.token_embedding.register_forward_hook(lambda m, inputs, output: seen.append(len(output)))
    z, rows = torch.randn(5, 8), [[10, 11], [12], [13, 14, 15]]
    batch = give_texts(make_batch(5), make_texts([rows[0], [], rows[1], rows[2], []]))
    few = give_texts(make_batch(3), make_texts(rows))
    # Three captioned images alone, then with two others between them.
    few = replace(few, **{name: getattr(batch, name)[[0, 2, 3]] for name in ("lesions", "patients", "modalities")})
    ours, alone = objective((encode(z),), batch), objective((encode(z[[0, 2, 3]]),), few)
    torch.testing.assert_close(ours.loss, alone.loss, rtol=0, atol=1e-6)
    assert seen == [3, 3]
    assert float(ours.metrics["share_with_caption"]) == pytest.approx(0.6)
    counts = {name: float(metric.count) for name, metric in ours.metrics.items() if name.startswith("loss/")}
    assert sum(counts.values()) == 3.0


@needs_open_clip
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_temperature_and_bias_start_as_published(loss: str) -> None:
    objective = ImageText(ImageTextConfig(loss=loss, output_dim=16, text=SMALL), input_dim=8)
    start = {"clip": 1 / 0.07, "siglip": 10.0}[loss]
    assert float(objective.log_scale.detach().exp()) == pytest.approx(start, rel=1e-5)
    assert (objective.bias is None) == (loss == "clip")
    assert objective.bias is None or float(objective.bias.detach()) == -10.0


# ------------------------------------------------------------------------------------------------ in a run

CLIP = {
    "kind": "image_text",
    "output_dim": 16,
    "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 12},
}
PIXELS = {"kind": "masked_image", "target": {"kind": "pixels"}, "predictor": {"width": 32, "depth": 1, "num_heads": 2}}


def caption(batch: Batch) -> Batch:
    """A text for each image but the last, each another; lesions and patients unknown."""
    texts = make_texts([[500 + number, 600 + number % 2] for number in range(batch.size - 1)] + [[]])
    unknown = torch.full((batch.size,), NO_GROUP)
    return replace(give_texts(batch, texts), lesions=unknown, patients=unknown)


@needs_open_clip
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_fixed_batch_is_learned_by_heart(build, make_batch, loss: str) -> None:
    model, batch = build(CLIP | {"loss": loss}), caption(make_batch(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    losses, found = [], []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
        accuracy = output.metrics[f"image_text_{loss}/accuracy"]
        found.append(float(accuracy.total / accuracy.count))
    assert losses[-1] < 0.2 * losses[0], losses[::10]
    assert found[0] < 0.6 and found[-1] == 1.0, found[::10]
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@needs_open_clip
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_micro_batches_have_the_gradients_of_the_whole_batch(build, make_batch, loss: str) -> None:
    whole = caption(make_batch(8))
    parts = [take(whole, slice(first, first + 2)) for first in range(0, 8, 2)]
    parts[0] = replace(parts[0], texts=parts[0].texts[:, :4])  # another longest text
    gradients = []
    for cut in (False, True):
        model = build(PIXELS, CLIP | {"loss": loss}).double()
        model.zero_grad()  # the encoder is one for both
        if cut:
            caches = model.cache_gradients([model.represent(part) for part in parts], parts)
            for part, cache in zip(parts, caches, strict=True):
                (model(part, cache).loss / len(parts)).backward()
        else:
            model(whole).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-10, msg=name)


@needs_open_clip
def test_visible_patches_are_encoded_once_for_all(build, make_batch) -> None:
    batch = caption(make_batch(4))
    for visible_only, expected in ((True, [1 + 8]), (False, [1 + 8, 1 + 16])):
        model = build(PIXELS, CLIP | {"visible_only": visible_only})
        lengths: list[int] = []
        hook = model.encoder.norm.register_forward_hook(
            lambda m, args, output, into=lengths: into.append(output.shape[1])
        )
        assert "image_text_clip/accuracy" in model(batch).metrics
        hook.remove()
        assert lengths == expected


def test_the_run_is_told_what_to_tokenise_and_that_micro_batches_will_do() -> None:
    clip, pixels = ImageTextConfig(), validate_objective(PIXELS)
    assert get_tokenizer_config([clip, pixels]) == TokenizerConfig(context_length=77)
    assert get_tokenizer_config([pixels]) is None
    assert get_mask_config([clip]) is None and get_num_views([clip]) == 1
    assert find_coupling([pixels, clip]) is None  # gradients are cached, see below
    with pytest.raises(UserError, match="context_length 12 and 77"):
        get_tokenizer_config([clip, ImageTextConfig(text=SMALL)])


def validate_objective(values: dict) -> object:
    return TypeAdapter(ObjectiveConfig).validate_python(values)


# ------------------------------------------------------------------------------------------------ ranks

NUM_ROWS = 8


def make_rank_batch() -> Batch:
    """Captions repeated, missing, of one lesion and one patient, on both sides of the cut between two ranks."""
    unknown = torch.full((NUM_ROWS,), NO_GROUP)
    batch = Batch(
        views=(),
        masks=None,
        positions=torch.arange(NUM_ROWS),
        modalities=torch.arange(NUM_ROWS) % 4,
        sources=unknown,
        lesions=torch.tensor([1, 2, NO_GROUP, 3, 2, 1, NO_GROUP, 5]),
        patients=torch.tensor([1, 1, 2, 2, 1, 1, 2, NO_GROUP]),
        visits=unknown,
    )
    return give_texts(batch, make_texts([[10, 11], [], [12], [13, 14, 15], [10, 11], [], [], [16]]))


def compute_rank_gradients(loss: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of this rank's slice of one batch, and its gradients averaged over ranks as DDP does."""
    torch.manual_seed(0)
    encoder = nn.Linear(6, 8)
    objective = ImageText(ImageTextConfig(loss=loss, output_dim=16, text=SMALL), input_dim=8)
    modules = nn.ModuleDict({"encoder": encoder, "objective": objective}).double()
    size = NUM_ROWS // get_world_size()
    rows = slice(get_rank() * size, (get_rank() + 1) * size)
    batch, pixels = make_rank_batch(), torch.randn(NUM_ROWS, 6, dtype=torch.float64)
    own = {field.name: getattr(batch, field.name) for field in fields(batch)}
    own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in own.items()}
    own["texts"] = own["texts"][:, : int(own["texts"].argmax(dim=1).max()) + 1]  # as long as this rank's longest
    output = objective((encode(encoder(pixels[rows])),), Batch(**own))
    output.loss.backward()
    gradients = {name: all_reduce_mean(parameter.grad) for name, parameter in modules.named_parameters()}
    return float(all_reduce_mean(output.loss)), gradients


def compute_gradients_of_both() -> list[tuple[float, dict[str, Tensor]]]:
    return [compute_rank_gradients(loss) for loss in ("clip", "siglip")]


@needs_open_clip
@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_the_joined_batch() -> None:
    on_ranks = run_ranks(compute_gradients_of_both, 2)
    for number, (whole_loss, whole) in enumerate(compute_gradients_of_both()):
        assert whole_loss > 0.1
        for part_loss, parts in (rank[number] for rank in on_ranks):
            assert part_loss == pytest.approx(whole_loss, abs=1e-12)
            for name, gradient in whole.items():
                torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-12)
