"""LoRA on a clinic's own images: the encoder changes a little (low rank), together with a linear head.

    files, labels --light augmentation--> copy of the encoder + head --cross-entropy, 15 epochs--> merged copy + head

The settings are those of the recipe `lora` of the protocol `finetune`: the number of epochs is fixed beforehand, the
head starts as the linear probe on the frozen features (Kumar et al. 2022). The change is written into the weights, so
that the encoder that is exported has no more parts than before.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from panfm.clinic.recipes import Floats, Ints, Learned, Recipe, widen_scale
from panfm.data.transforms import augment_view
from panfm.encoder.embedding import iterate_features
from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.evaluation.finetune_network import merge_lora
from panfm.evaluation.finetune_recipes import FinetuneConfig, resolve_recipe
from panfm.evaluation.finetune_training import Stream, build_augment, build_head, copy_network, train_network
from panfm.measures.probe import CONSTANT_SPREAD, Probe, fit_probe_cv
from panfm.progress import progress_bar
from panfm.shards.schema import Modality


def build_lora_recipe(
    encoder: Encoder,
    paths: Sequence[Path],
    features: NDArray[np.floating],
    labels: Ints,
    groups: NDArray,
    *,
    num_classes: int,
    modality: str | None,
    seed: int,
    epochs: int,
    workers: int = 1,
) -> Recipe:
    """The recipe for images `paths` [N] with their frozen features [N, D], on which the head starts.

    modality: decides on the augmentation; what panfm does not know is treated as clinical.
    """
    config = replace(resolve_recipe(FinetuneConfig(), "lora"), epochs=epochs)
    values = np.asarray(features, dtype=np.float64)
    kind = cast(Modality, modality) if modality in get_args(Modality) else "clinical"

    def learn(train: Ints, test: Ints, like: Learned | None) -> Learned:
        del like  # all is settled beforehand
        start = fit_probe_cv(values[train], labels[train], groups[train], num_classes=num_classes, seed=seed).probe
        network, head = _train(encoder, [paths[place] for place in train], labels[train], start, kind, config, seed)
        adapted = replace(encoder, module=network)
        found = embed_files(adapted, [paths[place] for place in np.concatenate([train, test])], workers)
        learned_from, to_score = found[: len(train)], found[len(train) :]
        mean, spread = learned_from.mean(axis=0), learned_from.std(axis=0)
        scale = np.where(spread > CONSTANT_SPREAD * np.abs(mean), spread, 1.0)
        scale[scale == 0] = 1.0
        weight = head.weight.detach().double().cpu().numpy()
        bias = head.bias.detach().double().cpu().numpy()
        chosen: dict[str, float | int | str] = {"epochs": epochs, "rank": config.lora_rank}
        learned = Learned(mean, scale, weight * scale, bias + weight @ mean, learned_from, to_score, chosen, network)
        return widen_scale(learned)

    return Recipe(learn, chooses=False)


def embed_files(encoder: Encoder, paths: Sequence[Path], workers: int = 1) -> Floats:
    """Compute features of files [N, D], as float64."""
    if not paths:
        return np.empty((0, encoder.embed_dim))
    batches = []
    with progress_bar("embed", len(paths)) as advance:
        for batch in iterate_features(encoder, [path.read_bytes for path in paths], [str(path) for path in paths],
                                      workers=workers):  # fmt: skip
            batches.append(batch)
            advance(len(batch))
    return np.concatenate(batches).astype(np.float64)


def _train(
    encoder: Encoder,
    paths: Sequence[Path],
    labels: Ints,
    start: Probe,
    kind: Modality,
    config: FinetuneConfig,
    seed: int,
) -> tuple[EncoderNetwork, nn.Linear]:
    """Train a copy of the encoder's network with a head that starts as the probe; both come back in eval mode."""
    data = [path.read_bytes() for path in paths]  # a clinic's few labels: compressed, they fit into memory
    augment = build_augment(encoder, config)
    num_batches = math.ceil(len(data) / config.batch_size)  # an epoch
    order_rng = np.random.Generator(np.random.PCG64([seed, len(data)]))

    def view(epoch: int, place: int) -> torch.Tensor:
        rng = np.random.Generator(np.random.PCG64([seed, epoch, place]))
        return torch.from_numpy(augment_view(data[place], kind, rng, augment))

    def draw_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in range(config.epochs):
            for places in np.array_split(order_rng.permutation(len(data)), num_batches):
                yield torch.stack([view(epoch, place) for place in places.tolist()]), torch.from_numpy(labels[places])

    stream = Stream(
        draw_batches(),
        config.epochs * num_batches,
        seed=seed,
        description="LoRA",
        name="--method lora",
        way_out="use --method probe, or lower --epochs",
    )
    # The factors are drawn from torch's own generator: seeded here, and put back afterwards.
    with torch.random.fork_rng(devices=[encoder.device] if encoder.device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = copy_network(encoder, config)
        head = build_head(start).to(encoder.device)
        train_network(network, head, stream, encoder, config)
        merge_lora(network)
    network.eval().requires_grad_(False)
    return network, head
