"""Protocol `finetune`: the encoder itself is trained on the labelled images, with a linear head.

    stored images -> light augmentation, mixing -> encoder (a copy) -> head -> cross-entropy -> optimizer -> the copy
    test images -> the encoder's own evaluation transform -> softmax (mean over views) -> scores [M, K]

The number of epochs is fixed in advance: no epoch is picked on the val or test fold. The head starts as the linear
probe on the frozen features (LP-FT, Kumar et al. 2022, arXiv 2202.10054): with few labels a random head would first
distort the features that it is meant to refine.

One run measures several recipes, a variant on the board each: `variants` names them, `recipes` says in what each
differs from the settings beside it.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.evaluation.finetune_images import TestImages, TrainImages, plan_batches, turn_views
from panfm.evaluation.finetune_network import merge_lora
from panfm.evaluation.finetune_recipes import FinetuneConfig, resolve_recipe
from panfm.evaluation.finetune_training import (
    Stream,
    build_augment,
    build_head,
    choose_autocast,
    copy_network,
    train_network,
)
from panfm.evaluation.linear_probe import LinearProbeConfig, describe_fit, fit_linear_probe
from panfm.evaluation.protocol import Scored, Trial
from panfm.progress import progress_bar
from panfm.shards.index import ShardSet


def score_finetune(
    trial: Trial,
    features: NDArray[np.float32],
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> Scored:
    """Fine-tune a copy of the encoder on the trial's labelled images and score its test part.

    features: [N, D] frozen features of all images of the split, for the head's start. The same trial, config and
    number of threads give the same scores. Raises UserError if the loss is no longer finite, and for a recipe that the
    encoder's architecture does not allow.
    """
    config = resolve_recipe(config, trial.recipe["variant"])
    # Stochastic depth and the data loader draw from torch's own generator: seeded here, and put back afterwards.
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(trial.seed)
        network = copy_network(encoder, config)
        head, chosen = _start_head(trial, features, config)
        head.to(encoder.device)
        class_weight = _compute_class_weight(trial).to(encoder.device) if config.balance == "loss" else None
        stream = _plan_training(trial, encoder, shard_set, config)
        chosen |= train_network(network, head, stream, encoder, config, class_weight)
        merge_lora(network)
        scores = _score(network, head, trial, encoder, shard_set, config)
    return Scored(scores=scores, chosen=chosen)


def _start_head(
    trial: Trial, features: NDArray[np.float32], config: FinetuneConfig
) -> tuple[nn.Linear, dict[str, Any]]:
    """The head as it starts, and how it was fitted."""
    if config.head == "linear_probe":
        fit = fit_linear_probe(trial, features, LinearProbeConfig())
        return build_head(fit.probe), {"head": describe_fit(fit)}
    head = nn.Linear(features.shape[1], trial.num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head, {}


def _plan_training(trial: Trial, encoder: Encoder, shard_set: ShardSet, config: FinetuneConfig) -> Stream:
    batches = list(
        plan_batches(
            trial,
            epochs=config.epochs,
            batch_size=config.batch_size,
            balanced=config.balance == "sampler",
            min_batch=2 if config.batch_norm == "trained" else 1,  # one image has no spread to normalise by
        )
    )
    images = TrainImages(trial, shard_set, build_augment(encoder, config))
    return Stream(
        DataLoader(images, batch_sampler=batches, num_workers=config.workers),
        len(batches),
        seed=trial.seed,
        description=f"fine-tune on {trial.card.name}",
        name=f"fine-tuning {trial.encoder.name} on {trial.card.name}",
        way_out=f"lower finetune.base_lr ({config.base_lr:g})",
    )


@torch.inference_mode()
def _score(
    network: EncoderNetwork,
    head: nn.Linear,
    trial: Trial,
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> NDArray[np.float64]:
    """Return probabilities [M, K] of the trial's test part, under the encoder's evaluation transform."""
    device, autocast = encoder.device, choose_autocast(config.precision, encoder.device)
    network.eval()
    images = TestImages(trial, shard_set, encoder)
    scores = []
    with progress_bar(f"score {trial.card.name}", len(images)) as advance:
        for views in DataLoader(images, batch_size=2 * config.batch_size, num_workers=config.workers):
            normalised = encoder.transform.normalise(views.to(device))
            probabilities = []
            for turned in turn_views(normalised, config.test_views):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    logits = head(network(turned))
                probabilities.append(logits.double().softmax(dim=1))
            scores.append(torch.stack(probabilities).mean(dim=0).cpu().numpy())
            advance(len(views))
    return np.concatenate(scores)


def _compute_class_weight(trial: Trial) -> torch.Tensor:
    """1 / (labelled images of the class), with mean 1 over the images; 0 for a class without any: float32 [K]."""
    counts = np.bincount(trial.split.labels[trial.train], minlength=trial.num_classes)
    inverse = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / (counts > 0).sum(), 0.0)
    return torch.tensor(inverse, dtype=torch.float32)
