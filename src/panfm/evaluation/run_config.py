"""What `panfm evaluate run` is told: encoders, shards, tasks, protocols, label fractions, and the settings of each.

configs/evaluate/NAME.yaml + options of the command -> EvaluateConfig -> run.run_evaluation
"""

import os
from typing import Any, Literal, get_args

from pydantic import Field

from panfm.config import config_class, to_plain
from panfm.errors import UserError
from panfm.evaluation.case_fusion import CaseFusionConfig
from panfm.evaluation.change import ChangeConfig
from panfm.evaluation.compat import Dinov2CompatConfig, PandermCompatConfig
from panfm.evaluation.finetune_recipes import FinetuneConfig, describe_recipe
from panfm.evaluation.knn import KnnConfig
from panfm.evaluation.linear_probe import LinearProbeConfig
from panfm.evaluation.metadata_fusion import MetadataFusionConfig
from panfm.evaluation.out_of_distribution import OutOfDistributionConfig
from panfm.evaluation.protocol import EvaluatedOn, Protocol
from panfm.evaluation.prototype import PrototypeConfig
from panfm.evaluation.regression import OrdinalConfig, RegressionConfig
from panfm.evaluation.retrieval import RetrievalConfig
from panfm.evaluation.segmentation import SegmentationConfig
from panfm.evaluation.site_effect import LeaveInstitutionOutConfig
from panfm.evaluation.slides import SlidesConfig
from panfm.evaluation.survival import SurvivalConfig
from panfm.evaluation.ugly_duckling import UglyDucklingConfig
from panfm.evaluation.zero_shot import ZeroShotConfig

# Hours for one encoder, or comparable with a publication only: measured where somebody asks for it.
ASKED_BY_NAME: tuple[Protocol, ...] = ("finetune", "panderm_compat", "dinov2_compat")
DRAWS = 10
MANY_DRAWS = 20
FEW_LABELS = 0.05


@config_class
class EncoderEntry:
    """An encoder and the name that it carries on the board."""

    address: str
    """panfm:DIR, timm:NAME, timm:NAME@FILE, timm:NAME@random:SEED, hf:DIR; parameters after `?`."""
    name: str | None = None
    """Unique among the encoders; null = made from the address."""
    licence: str | None = None
    """Of the weights, as the board shows it; null = what the weights' origin declares, if it does."""
    access: Literal["open", "request", "private"] | None = None
    """Who can get the weights: anybody, who asks, nobody else. null = not declared."""


@config_class
class EvaluateConfig:
    """One evaluation run."""

    encoders: tuple[EncoderEntry | str, ...]
    """Addresses, or {address, name, licence, access}."""
    shards: tuple[str, ...]
    """Folders of shard sets, one source each."""
    tasks: Literal["all"] | tuple[str, ...] = "all"
    """all = every known task on a source among the shards; else names or paths of cards."""
    task_dir: str | None = None
    """Folder with task cards of your own; they win over shipped ones of the same name."""
    protocols: Literal["all"] | tuple[Protocol, ...] = ("linear_probe", "knn")
    """all = every protocol that a task's family is measured by, save fine-tuning and the published ones; or names:
    linear_probe, knn, prototype (frozen features), finetune (the whole encoder is trained), metadata_fusion (frozen
    features beside age, sex, anatomic site and tabular columns, with its baselines); panderm_compat and
    dinov2_compat compute what those publications do, to compare with their numbers, and are ranked by themselves."""
    fractions: tuple[float, ...] = (0.1, 1.0)
    """Shares of the training GROUPS (patients) whose labels are used, each in (0, 1]: 0.01, 0.05, 0.1, 0.25, 0.5, 1."""
    draws: int | None = Field(default=None, ge=1)
    """Random choices of labels at each fraction below 1; all labels can be chosen in one way only. null = 10, and 20 at
    5 % and below, where the choice matters more than anything else."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the optimisation. kNN has none, and the probe's only cuts its folds: both use the first."""
    evaluate_on: EvaluatedOn = "test"
    """test: train + val folds -> test fold. development: train fold -> val fold, to choose recipes with."""
    num_replicates: int = Field(default=2000, ge=100)
    """Patient-clustered bootstrap replicates behind each interval."""
    out: str = "results"
    """Folder of the Result files."""
    cache_dir: str = "cache/features"
    """Folder of the cached features, keyed by encoder hash and data hash."""
    device: str = "auto"
    """auto = the GPU where there is one, else the CPU; or a torch device."""
    batch_size: int = Field(default=64, ge=1)
    """Images at once while encoding."""
    workers: int = Field(default=1, ge=0)
    """Threads that decode ahead of the encoder; fine-tuning has its own."""
    executor: Literal["local", "processes", "dask"] = "local"
    """local = one trial after the other, each on all cores; processes = several at once, which is faster where trials
    are many and small; dask = on a running cluster, whose workers see the same folders."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that measure at once (executor: processes), the cores shared among them; null = one a core. Encoding
    stays in one."""
    scheduler: str | None = None
    """Address of the cluster's scheduler, or its file (executor: dask)."""
    linear_probe: LinearProbeConfig = LinearProbeConfig()
    """Settings of protocol linear_probe."""
    knn: KnnConfig = KnnConfig()
    """Settings of protocol knn."""
    prototype: PrototypeConfig = PrototypeConfig()
    """Settings of protocol prototype."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Settings of protocol finetune."""
    metadata_fusion: MetadataFusionConfig = MetadataFusionConfig()
    """Settings of protocol metadata_fusion."""
    panderm_compat: PandermCompatConfig = PandermCompatConfig()
    """Settings of protocol panderm_compat."""
    dinov2_compat: Dinov2CompatConfig = Dinov2CompatConfig()
    """Settings of protocol dinov2_compat."""
    ugly_duckling: UglyDucklingConfig = UglyDucklingConfig()
    """Settings of protocol ugly_duckling."""
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    """Settings of protocol zero_shot."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Settings of protocol retrieval."""
    out_of_distribution: OutOfDistributionConfig = OutOfDistributionConfig()
    """Settings of protocol out_of_distribution."""
    survival: SurvivalConfig = SurvivalConfig()
    """Settings of protocol survival."""
    change: ChangeConfig = ChangeConfig()
    """Settings of protocol change."""
    slides: SlidesConfig = SlidesConfig()
    """Settings of protocol slides."""
    segmentation: SegmentationConfig = SegmentationConfig()
    """Settings of protocol segmentation."""
    ordinal: OrdinalConfig = OrdinalConfig()
    """Settings of protocol ordinal."""
    regression: RegressionConfig = RegressionConfig()
    """Settings of protocol regression."""
    leave_institution_out: LeaveInstitutionOutConfig = LeaveInstitutionOutConfig()
    """Settings of protocol leave_institution_out."""
    case_fusion: CaseFusionConfig = CaseFusionConfig()
    """Settings of protocol case_fusion."""


def list_recipes(config: EvaluateConfig) -> list[tuple[Protocol, dict[str, Any]]]:
    """Every protocol with its settings as plain values, as often as it has variants."""
    recipes: list[tuple[Protocol, dict[str, Any]]] = []
    for protocol in list_protocols(config):
        if protocol == "finetune":  # a variant changes settings
            recipes += [(protocol, describe_recipe(config.finetune, name)) for name in config.finetune.variants]
            continue
        settings = to_plain(getattr(config, protocol))
        variants = settings.pop("variants", None) or [settings["variant"]]
        recipes += [(protocol, {**settings, "variant": variant}) for variant in variants]
    return recipes


def list_protocols(config: EvaluateConfig) -> tuple[Protocol, ...]:
    """The protocols of a run by name."""
    if config.protocols != "all":
        return config.protocols
    return tuple(name for name in get_args(Protocol) if name not in ASKED_BY_NAME)


def count_processes(config: EvaluateConfig) -> int:
    """How many processes measure at once on this machine."""
    return (config.processes or os.cpu_count() or 1) if config.executor == "processes" else 1


def count_draws(config: EvaluateConfig, fraction: float) -> int:
    """How many choices of labels are measured at a fraction."""
    if fraction in (0, 1):  # nothing is trained; all labels can be chosen in one way only
        return 1
    return config.draws or (MANY_DRAWS if fraction <= FEW_LABELS else DRAWS)


def check_config(config: EvaluateConfig) -> None:
    """Refuse a run without anything to measure, and fractions that are none (UserError)."""
    way_out = "give --encoder ADDRESS" if not config.encoders else "give --shards DIR" if not config.shards else ""
    for key in ("encoders", "shards", "protocols", "fractions", "seeds"):
        if not getattr(config, key):
            raise UserError(f"{key} is empty; an evaluation needs at least one{': ' if way_out else ''}{way_out}")
    for fraction in config.fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"fractions ({fraction:g}): a label fraction is above 0 and at most 1, for example 0.1")


def get_entries(config: EvaluateConfig) -> list[EncoderEntry]:
    """The encoders as entries, in their order."""
    return [EncoderEntry(address=entry) if isinstance(entry, str) else entry for entry in config.encoders]
