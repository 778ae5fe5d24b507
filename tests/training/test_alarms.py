import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panfm.config import load_config
from panfm.models.vit import EncoderConfig, build_vit, encode_visible
from panfm.training.alarms import Alarm, AlarmConfig, Alarms, compute_advice
from panfm.training.monitor import compute_feature_std_ratio, compute_pooled_features, compute_rankme
from panfm.training.plan import PretrainConfig

ADVICE = dict.fromkeys(
    ("feature_std_ratio", "rankme", "teacher_information", "target_std", "loss", "grad_norm"), "change something"
)


def ring(records: list[dict[str, Any]], **settings: Any) -> list[list[Alarm]]:
    alarms = Alarms(AlarmConfig(**settings), ADVICE)
    return [alarms.judge(record) for record in records]


def make_healthy(num: int = 200) -> list[dict[str, Any]]:
    """A run that learns: noisy falling loss, warm-up of the gradient, RankMe that first falls, a sharpening teacher."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(num):
        progress = number / num
        record: dict[str, Any] = {
            "step": 10 * (number + 1),
            "loss": (0.4 + 0.6 * math.exp(-5 * progress)) * rng.uniform(0.85, 1.15),
            "grad_norm": (0.3 + min(number, 10) / 5) * rng.uniform(0.6, 2.0),
            "self_distillation/teacher_information": 0.25 + progress,
            "self_distillation/teacher_entropy": 1 - 0.97 * progress,  # near 0 at the end: sure, but not of the same
            "masked_image/target_std": 0.9,
            "drawn": {"ham10000/dermoscopic": 10},
        }
        if number % 20 == 19:
            record |= {"rankme": 11 - 8 * math.sin(math.pi * progress), "feature_std_ratio": 0.6 - 0.35 * progress}
        records.append(record)
    return records


def test_a_healthy_run_rings_nothing() -> None:
    assert not any(ring(make_healthy()))


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("feature_std_ratio", 0.012),  # measured: an objective that pulls views together and pushes nothing apart
        ("rankme", 1.3),
        ("self_distillation/teacher_information", 0.01),
        ("self_distillation/ibot_teacher_information", 0.01),
        ("masked_image/target_std", 0.05),
    ],
)
def test_a_collapse_rings_after_patience_looks_and_again(metric: str, value: float) -> None:
    records = [*make_healthy(40), *({"step": 410 + 10 * n, metric: value} for n in range(7))]
    rung = ring(records, patience=3)
    assert [index for index, alarms in enumerate(rung) if alarms] == [42, 45]
    (first,), (second,) = rung[42], rung[45]
    assert (first.metric, first.since, first.is_new) == (metric, 410, True)
    assert (second.since, second.is_new) == (410, False)
    assert f"{metric} {value:.3g} is below monitor.alarm.min_" in first.text and first.text.endswith("change something")


def train(spread: bool) -> list[dict[str, Any]]:
    """Pull two views of each of 16 images together; with `spread` also push different images apart."""
    coarse = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    views = [F.interpolate(coarse.roll(turn, dims=3), (32, 32), mode="bilinear") * 255 for turn in (0, 1)]
    vit = build_vit(EncoderConfig(name="test_vit", image_size=32, patch_size=8), seed=0)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-2)
    records = []
    for step in range(40):
        tokens = encode_visible(vit, torch.cat(views) / 128 - 1, None)
        x, y = F.normalize(tokens[:, 1:].mean(dim=1), dim=1).chunk(2)
        loss = F.cross_entropy(10 * x @ y.T, torch.arange(16)) if spread else (x - y).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            features = compute_pooled_features(vit, views[0].to(torch.uint8), lambda images: images / 128 - 1)
            ratio, rankme = compute_feature_std_ratio(features), compute_rankme(features)
            records.append({"step": step + 1, "feature_std_ratio": ratio, "rankme": rankme})
    return records


def test_an_encoder_that_collapses_rings_and_one_that_learns_does_not() -> None:
    rung = [alarm.metric for alarms in ring(train(spread=False)) for alarm in alarms]
    assert {"feature_std_ratio", "rankme"} <= set(rung)
    assert not any(ring(train(spread=True)))


def test_one_good_look_begins_the_count_anew() -> None:
    values = [0.01, 0.01, 0.5, 0.01, 0.01, 0.01]
    rung = ring([{"step": n, "feature_std_ratio": value} for n, value in enumerate(values)], patience=3)
    assert [len(alarms) for alarms in rung] == [0, 0, 0, 0, 0, 1] and rung[-1][0].since == 3


def test_looks_without_a_value_neither_count_nor_clear() -> None:
    values = [0.01, None, 0.01, math.nan, 0.01]
    rung = ring([{"step": n, "feature_std_ratio": value} for n, value in enumerate(values)], patience=3)
    assert [len(alarms) for alarms in rung] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("level", [1.0, -1.0])  # a sum with KoLeo in it may be negative
def test_a_loss_that_rises_by_its_own_size_rings_and_a_flat_one_does_not(level: float) -> None:
    noise = np.random.default_rng(1).uniform(0.9, 1.1, 60)
    flat = [{"step": n, "loss": level * float(value)} for n, value in enumerate(noise)]
    assert not any(ring(flat))
    rising = [{"step": 60 + n, "loss": level + 0.15 * n} for n in range(12)]
    rung = [alarms for alarms in ring([*flat, *rising]) if alarms]
    assert rung and rung[0][0].metric == "loss" and rung[0][0].since > 60
    assert "monitor.alarm.max_loss_rise (1)" in rung[0][0].text
    assert not any(ring([*flat, *rising], max_loss_rise=3.0))


def test_exploding_gradients_ring_and_one_spike_does_not() -> None:
    norms = [1.0 + 0.1 * (n % 5) for n in range(40)]
    assert not any(ring([{"step": n, "grad_norm": norm} for n, norm in enumerate([*norms, 500.0, *norms])]))
    rung = ring([{"step": n, "grad_norm": norm} for n, norm in enumerate([*norms, 40.0, 80.0, 160.0])])
    assert [len(alarms) for alarms in rung[-3:]] == [0, 0, 1] and "its median of 1.2" in rung[-1][0].text


def test_a_resumed_run_rings_where_the_unbroken_one_does() -> None:
    """What was logged before is handed to new alarms, as pretrain does with metrics.jsonl."""
    records = [*make_healthy(40), *({"step": 410 + n, "loss": 0.9 + 0.3 * n, "rankme": 1.1} for n in range(8))]
    unbroken = ring(records)
    for cut in (3, 41, 42, 45):
        resumed = Alarms(AlarmConfig(), ADVICE)
        for record in records[:cut]:
            resumed.judge(record)
        assert [resumed.judge(record) for record in records[cut:]] == unbroken[cut:]


def test_advice_names_a_key_and_a_value(config: Path) -> None:
    settings = load_config(PretrainConfig, config)
    advice = compute_advice(settings)
    assert advice.keys() == {"feature_std_ratio", "rankme", "loss", "grad_norm"}
    assert "optim.base_lr=0.005 (it is 0.01)" in advice["rankme"]
    assert "schedule.warmup_samples=64 (it is 32)" in advice["loss"]
    assert "engine.clip_grad_norm=1.0 (it is 3)" in advice["grad_norm"]

    distil = "objectives=[{kind: self_distillation, centring: %s, teacher_temperature: 0.08, ema: {momentum: 0.9}}]"
    mean = compute_advice(load_config(PretrainConfig, config, [distil % "mean", "augment.views=2"]))
    assert "centring: sinkhorn_knopp in objectives[0] (it is mean)" in mean["teacher_information"]
    sinkhorn = compute_advice(load_config(PretrainConfig, config, [distil % "sinkhorn_knopp", "augment.views=2"]))
    assert "teacher_temperature: 0.06 in objectives[0] (it is 0.08)" in sinkhorn["teacher_information"]

    latent = "objectives=[{kind: masked_image, target: {kind: ema_teacher, ema: {momentum: 0.9}}}]"
    own = compute_advice(load_config(PretrainConfig, config, [latent, "engine.clip_grad_norm=0.5"]))
    assert "ema.momentum: 0.975 in the target of objectives[0] (it is 0.9)" in own["target_std"]
    assert "optim.base_lr=0.005" in own["grad_norm"]  # clipping is tight already
