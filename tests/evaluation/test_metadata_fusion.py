"""Metadata beside features: what is read, that missing tells nothing, and the baselines that are always beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from panfm.config import validate
from panfm.evaluation.metadata import Metadata, encode_metadata, encode_missingness, read_metadata
from panfm.evaluation.metadata_fusion import MetadataFusionConfig, score_metadata_fusion
from panfm.evaluation.protocol import Trial, build_trial
from panfm.evaluation.results import EncoderCard, read_results
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.shards.index import ShardSet

CARD = {
    "columns": {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold", "age": "age",
        "sex": "sex", "anatomic_site": "site", "institution": "hospital", "phototype": "skin",
    },
    "tabular": ["diameter", "itch"],
    "values": {"sex": {"f": "female", "m": "male"}},
}  # fmt: skip
MakeTask = Callable[..., TaskCard]


def tell(row: dict[str, str]) -> None:
    """Metadata of the archive: age is written down, and high, where a melanoma is; the rest says nothing."""
    number = int(row["file"].removesuffix(".jpg"))
    is_melanoma = row["colour"] == "melanoma"
    row |= {
        "age": str(60 + number % 7) if is_melanoma else "",
        "sex": "fm"[number % 2],
        "site": ("back", "arm", "")[number % 3],
        "hospital": "A" if is_melanoma else "B",
        "diameter": str(number % 5),
        "itch": ("yes", "no", "")[number % 3],
        "skin": str(1 + number % 6),
    }


@pytest.fixture
def told(build_clinic: Callable[..., ShardSet]) -> ShardSet:
    return build_clinic(tell, **CARD)


def make_trial(card: TaskCard, shard_set: ShardSet, variant: str) -> Trial:
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    return build_trial(
        card, load_split(card, shard_set), encoder, shard_set, protocol="metadata_fusion",
        recipe={"variant": variant}, evaluated_on="test", label_fraction=1.0, draw=0, seed=0, num_replicates=100,
    )  # fmt: skip


def test_institution_and_device_are_never_read_and_phototype_only_when_asked(told: ShardSet) -> None:
    rows = np.arange(len(told.table))
    assert set(read_metadata(told, rows).columns) == {"age", "sex", "anatomic_site", "diameter", "itch"}
    assert set(read_metadata(told, rows, with_phototype=True).numbers) == {"age", "diameter", "phototype"}


def test_unknown_is_the_training_mean_and_nothing_is_learned_from_other_rows() -> None:
    numbers = {"age": np.array([30.0, 50.0, np.nan, 90.0]), "constant": np.array([1.0, 1.0, 1.0, 2.0])}
    metadata = Metadata(numbers, {"sex": ["f", "m", None, "x"], "site": ["arm", None, "arm", "leg"]}, num_rows=4)
    encoded = encode_metadata(metadata, train=np.array([0, 1, 2]))
    # age by the mean 40 and deviation 10 of training; sex f and m, each centred on its share of one half; the constant
    # and the one site that training has say nothing; x was not seen in training.
    np.testing.assert_allclose(encoded, [[-1, 0.5, -0.5], [1, -0.5, 0.5], [0, 0, 0], [5, 0, 0]])
    np.testing.assert_allclose(encode_missingness(metadata), [[1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]])


def test_that_age_was_written_down_is_seen_by_the_baseline_only(told: ShardSet, make_task: MakeTask) -> None:
    card = make_task()
    aurocs = {}
    for variant in ("missingness", "metadata"):
        trial = make_trial(card, told, variant)
        noise = np.random.default_rng(0).normal(size=(len(trial.split.labels), 3)).astype(np.float32)
        scored = score_metadata_fusion(trial, noise, told, MetadataFusionConfig())
        aurocs[variant] = compute_metric("auroc", trial.split.labels[trial.test], scored.scores).value
        assert "institution" not in scored.chosen["columns"]
    assert aurocs["missingness"] == 1.0
    assert aurocs["metadata"] < 0.8  # every known age is that of a melanoma, and unknown ones are as high on average


def test_image_and_metadata_are_joined(told: ShardSet, make_task: MakeTask) -> None:
    trial = make_trial(make_task(), told, "default")
    labels = trial.split.labels
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    features[:, 1] = labels  # the image says it all
    scored = score_metadata_fusion(trial, features, told, MetadataFusionConfig())
    assert compute_metric("auroc", labels[trial.test], scored.scores).value == 1.0
    assert scored.chosen["num_encoded"] == 1 + 1 + 2 + 2 + 2  # age, diameter, sex, anatomic site, itch


def test_a_run_measures_the_baselines_beside_it_and_says_where_nothing_is_known(
    told: ShardSet, build_clinic: Callable[..., ShardSet], make_task: MakeTask, tmp_path: Path
) -> None:
    bare = build_clinic(name="bare")
    (tmp_path / "tasks").mkdir()
    for source in ("clinic", "bare"):
        card = make_task(name=f"{source}_diagnosis", source=source)
        (tmp_path / "tasks" / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))
    values = {
        "encoders": ["timm:test_vit@random:0?image_size=32"], "shards": [str(told.path), str(bare.path)],
        "task_dir": str(tmp_path / "tasks"), "out": str(tmp_path / "results"), "fractions": [1.0], "device": "cpu",
        "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "protocols": ["metadata_fusion"],
    }  # fmt: skip
    summary = run_evaluation(validate(EvaluateConfig, values, where="test"))
    found = {(result.task, result.variant) for _, result in read_results([tmp_path / "results"])}
    assert found == {("clinic_diagnosis", variant) for variant in ("default", "metadata", "missingness")}
    failure = next(failure for failure in summary.failures if "(metadata)" in failure.what)
    assert failure.task == "bare_diagnosis" and "nothing for metadata_fusion (metadata)" in failure.message
    again = run_evaluation(validate(EvaluateConfig, values, where="test"))
    assert again.num_skipped == 3 and again.written == ()
