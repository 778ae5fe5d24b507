"""LoRA on a clinic's own images: the encoder changes a little (low rank), together with a linear head.

    files, labels --light augmentation--> copy of the encoder + head --cross-entropy, 15 epochs--> merged copy + head

The settings are those of the recipe `lora` of the protocol `finetune`: the number of epochs is fixed beforehand, the
head starts as the linear probe on the frozen features (Kumar et al. 2022). The change is written into the weights, so
that the encoder that is exported has no more parts than before.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from panfm.clinic.recipes import Floats, Ints, Learned, Recipe, widen_scale
from panfm.data.transforms import AugmentConfig, augment_view
from panfm.encoder.embedding import iterate_features
from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError
from panfm.evaluation.finetune import FinetuneConfig, resolve_recipe
from panfm.evaluation.finetune_network import build_optimizer, choose_trained, merge_lora, set_train_mode
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
    device = encoder.device
    augment = AugmentConfig(
        image_size=encoder.image_size, crop_scale=config.crop_scale, histopathology_crop_scale=config.crop_scale
    )
    # The factors are drawn from torch's own generator: seeded here, and put back afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = copy.deepcopy(encoder.module).float()
        choose_trained(
            network,
            config.train,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            num_last_blocks=config.num_last_blocks,
        )
        head = _build_head(start).to(device)
        optimizer = build_optimizer(
            network,
            head,
            optimizer=config.optimizer,
            base_lr=config.base_lr,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        peak_lrs = [group["lr"] for group in optimizer.param_groups]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        data = [path.read_bytes() for path in paths]  # a clinic's few labels: compressed, they fit into memory
        num_batches = math.ceil(len(data) / config.batch_size)
        num_steps, warmup = config.epochs * num_batches, round(config.warmup_epochs * num_batches)
        order_rng = np.random.Generator(np.random.PCG64([seed, len(data)]))
        step = 0
        set_train_mode(network, config.batch_norm)
        with progress_bar("LoRA", num_steps, unit="steps") as advance:
            for epoch in range(config.epochs):
                for places in np.array_split(order_rng.permutation(len(data)), num_batches):
                    share = (
                        (step + 1) / warmup
                        if step < warmup
                        else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))
                    )
                    for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                        group["lr"] = peak_lr * share
                    views = np.stack(
                        [
                            augment_view(
                                data[place], kind, np.random.Generator(np.random.PCG64([seed, epoch, place])), augment
                            )
                            for place in places.tolist()
                        ]
                    )
                    images = encoder.transform.normalise(torch.from_numpy(views).to(device))
                    loss = F.cross_entropy(head(network(images)), torch.from_numpy(labels[places]).to(device))
                    if not torch.isfinite(loss):
                        raise UserError(
                            f"--method lora: the loss is {loss.item()} at step {step}; use --method probe, or lower "
                            "--epochs"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    if config.max_grad_norm is not None:
                        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    step += 1
                    advance(note=f"loss {loss.item():.3f}")
        merge_lora(network)
    network.eval().requires_grad_(False)
    return network, head


def _build_head(probe: Probe) -> nn.Linear:
    """A probe on standardised features as a linear head on the features themselves."""
    weight = probe.weight / probe.scale  # [K, D]
    bias = probe.bias - weight @ probe.mean
    head = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head
