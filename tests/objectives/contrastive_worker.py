"""One rank of test_contrastive: the gradient of this rank's slice of one batch, averaged over ranks as DDP does.

Rank 0 writes {"loss", "gradients"} to the path that is its argument. Ranks hold unequal numbers of anchors with a
positive: lesions are spread so that some have their only mate on the other rank.
"""

import sys
from dataclasses import fields

import torch
from timm.models.vision_transformer import VisionTransformer

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import MaskConfig
from panfm.distributed import all_reduce_mean, get_rank, get_world_size, is_main, process_group
from panfm.objectives.contrastive import ContrastiveConfig
from panfm.objectives.masked_image import MaskedImageConfig, PredictorConfig
from panfm.objectives.pretraining import build_pretraining_model
from panfm.objectives.targets import PixelTargetConfig


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = 8
    unknown = torch.full((size,), NO_GROUP)
    return Batch(
        views=tuple(torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator) for _ in "01"),
        masks=torch.rand(2, size, 16, generator=generator).argsort(dim=2) < 8,
        positions=torch.arange(size),
        modalities=unknown,
        sources=unknown,
        lesions=torch.tensor([1, 1, 2, 3, 2, 4, NO_GROUP, 5]),
        patients=torch.tensor([1, 1, 2, 2, 2, 6, NO_GROUP, 6]),
        visits=unknown,
    )


def take(batch: Batch, rows: slice) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    views, masks = tuple(view[rows] for view in values.pop("views")), values.pop("masks")[:, rows]
    return Batch(views=views, masks=masks, **{name: value[rows] for name, value in values.items()})


def main() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    objectives = [
        MaskedImageConfig(
            mask=MaskConfig(kind="random", ratio=0.5), target=PixelTargetConfig(), predictor=PredictorConfig(depth=1)
        ),
        ContrastiveConfig(positives="lesion", num_views=1, hidden_dim=32, output_dim=16),
        ContrastiveConfig(positives="views", hidden_dim=32, output_dim=16, visible_only=False),
    ]
    model = build_pretraining_model(
        vit, objectives, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), teachers={}
    ).double()
    with process_group(torch.device("cpu")):
        size = 8 // get_world_size()
        output = model(take(make_batch(), slice(get_rank() * size, (get_rank() + 1) * size)))
        output.loss.backward()
        gradients = {name: all_reduce_mean(parameter.grad) for name, parameter in model.named_parameters()}
        loss = all_reduce_mean(output.loss)
        if is_main():
            torch.save({"loss": float(loss), "gradients": gradients}, sys.argv[1])


if __name__ == "__main__":
    main()
