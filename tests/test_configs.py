"""The shipped pretraining configs are documents: each can be trained as it stands, and its header says what follows."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from panfm.config import load_config, merge
from panfm.data.masking import num_hidden
from panfm.files import CHECKOUT, list_resources
from panfm.objectives.demands import get_mask_config, get_num_views, takes_local_views
from panfm.training.engine import compute_num_micro_batches
from panfm.training.flops import RunCost, compute_hours, compute_run_cost
from panfm.training.plan import PretrainConfig, check_accumulation, check_config

CONFIGS = list_resources("configs/pretrain")
RECIPES = sorted((CHECKOUT / "benchmarks" / "recipes").glob("*.yaml"))
REQUIRED = ("Command", "Hardware", "Hours", "Expected")
HOURS = re.compile(
    r"([\d.]+) \(computed: ([\d.e]+) operations on (\d+) (\w+) at an assumed (\d+) % of ([\d.e]+) a second\)"
)
MODEL = re.compile(r"([\d.]+) M parameters shipped, ([\d.]+) M thrown away")
PEAKS = {"H100": 989e12, "A100": 312e12}  # bf16 without sparsity, operations a second
# Where a value of PanDerm's recipe comes from; what is only how we compute it is `ours`.
ORIGIN = re.compile(r"\b(published|guess|difference|ours)\b", re.IGNORECASE)


def load(name: str) -> PretrainConfig:
    overrides = ["data.shards=[demo]"] if name == "demo" else []  # which the demo gives
    return load_config(PretrainConfig, name, overrides, folder="configs/pretrain")


@cache
def count(name: str) -> RunCost:
    config = load(name)
    if any(objective.kind == "image_text" for objective in config.objectives):
        pytest.importorskip("open_clip")
    return compute_run_cost(config)


def read_header(path: Path) -> dict[str, str]:
    """The fields of the comment at the top: `# Name:  text`, going on in lines that are indented further."""
    fields: dict[str, str] = {}
    name = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if found := re.match(r"# ([A-Z][a-z ]+):\s+(.*)", line):
            name = found[1]
            fields[name] = found[2]
        elif name is not None and line.startswith("#    "):
            fields[name] += " " + line[1:].strip()
        else:
            name = None
    return fields


def read_ranks(text: str) -> dict[int, int]:
    """`1, 2 at engine.micro_batch_size=64; 4 at 32` -> {1: 64, 2: 64, 4: 32}."""
    ranks = {}
    for part in re.sub(r"\(.*?\)", "", text).replace("engine.micro_batch_size=", "").split(";"):
        sizes, micro_batch_size = part.split(" at ")
        ranks |= {int(size): int(micro_batch_size) for size in sizes.split(",")}
    return ranks


@pytest.mark.parametrize("name", CONFIGS)
def test_config_can_be_trained_as_it_stands(name: str) -> None:
    config = load(name)
    check_config(config, "auto")
    assert config.augment.views == get_num_views(config.objectives), "views that no objective looks at cost decoding"
    assert bool(config.augment.local_views) == takes_local_views(config.objectives)
    mask = get_mask_config(config.objectives)
    if mask is not None:
        cost = count(name)
        assert cost.num_heads > 0
        side = config.encoder.image_size // (config.encoder.patch_size or 16)
        hidden = num_hidden(mask, (side, side))
        assert 0 < hidden < side * side
        assert abs(hidden / side**2 - mask.ratio) < 0.02, "a grid this small rounds the ratio away"
    pairs = [objective for objective in config.objectives if objective.kind == "contrastive"]
    if any(pair.positives == "lesion" and pair.num_views == 1 for pair in pairs):
        assert config.mixture.group_share > 0, "no image would have a positive"


@pytest.mark.parametrize("name", CONFIGS)
def test_header_says_what_it_must(name: str) -> None:
    fields = read_header(CONFIGS[name])
    assert [key for key in REQUIRED if not fields.get(key)] == []
    assert name in fields["Command"]
    for key in ("Command", "One node", "Nodes"):
        for named in re.findall(r"panfm pretrain (?:data\S+ )?(\w+)", fields.get(key, "")):
            assert named == name, f"{key} is that of {named}"


@pytest.mark.parametrize("name", [name for name, path in CONFIGS.items() if "Model" in read_header(path)])
def test_model_has_the_parameters_that_the_header_says(name: str) -> None:
    found = MODEL.match(read_header(CONFIGS[name])["Model"])
    assert found is not None
    cost = count(name)
    assert (float(found[1]), float(found[2])) == (round(cost.num_encoder / 1e6, 1), round(cost.num_heads / 1e6, 1))


@pytest.mark.parametrize("name", [name for name, path in CONFIGS.items() if "computed" in read_header(path)["Hours"]])
def test_hours_follow_from_the_config(name: str) -> None:
    found = HOURS.match(read_header(CONFIGS[name])["Hours"])
    assert found is not None, "the header's hours are not written as the others' are"
    hours, operations, utilisation, peak = (float(found[number]) for number in (1, 2, 5, 6))
    assert peak == PEAKS[found[4]]
    total = count(name).total_flops
    assert operations == pytest.approx(total, rel=0.02)
    expected = compute_hours(total, num_devices=int(found[3]), peak_flops=peak, utilisation=utilisation / 100)
    assert hours == pytest.approx(expected, rel=0.05, abs=0.05)


@pytest.mark.parametrize("name", [name for name, path in CONFIGS.items() if "Ranks" in read_header(path)])
def test_batches_divide_over_the_ranks_that_the_header_names(name: str) -> None:
    config, fields = load(name), read_header(CONFIGS[name])
    ranks = read_ranks(fields["Ranks"])
    assert next(iter(ranks.values())) == config.engine.micro_batch_size, "the first is the config's own"
    for world_size, micro_batch_size in ranks.items():
        changed = replace(config, engine=replace(config.engine, micro_batch_size=micro_batch_size))
        assert compute_num_micro_batches(changed.engine, world_size) >= 1
        check_accumulation(changed, world_size)
        if config.mixture.group_share:
            assert micro_batch_size % config.mixture.group_size == 0
    for key in ("Command", "One node", "Nodes"):
        text = fields.get(key, "")
        for command in filter(None, re.split(r"(?=torchrun )", text)):
            processes = re.search(r"--nproc_per_node=(\d+)", command)
            if processes is None or "global_batch_size" in command:
                continue
            nodes = re.search(r"--nnodes=(\d+)", command)
            micro = re.search(r"engine\.micro_batch_size=(\d+)", command)
            world_size = int(processes[1]) * int(nodes[1] if nodes else 1)
            assert ranks[world_size] == int(micro[1] if micro else config.engine.micro_batch_size), command


def test_every_value_of_panderm_says_where_it_comes_from() -> None:
    """Each line with a value, or the comment right above it, says published, guess, difference or ours."""
    lines = CONFIGS["panderm_vitl"].read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("mixture:")))
    stop = lines.index(next(line for line in lines if line.startswith("checkpoint:")))
    above, silent = "", []
    for line in lines[start:stop]:
        content, _, comment = line.partition("#")
        if not content.strip():
            above += comment
            continue
        has_value = re.search(r":\s+\S", content) and "kind: masked_image" not in content
        if has_value and not ORIGIN.search(comment + above):
            silent.append(line.strip())
        above = ""
    assert silent == []


def test_panderm_is_the_published_recipe() -> None:
    """The values that are known (Yan et al., Nature Medicine 2025, methods)."""
    config = load("panderm_vitl")
    (objective,) = config.objectives
    assert (config.encoder.name, config.encoder.image_size) == ("vit_large_patch16_224", 224)
    assert config.engine.global_batch_size == 4 * 480
    assert (config.schedule.total_samples, config.schedule.warmup_samples) == (500 * 2_149_706, 20 * 2_149_706)
    assert (config.optim.base_lr, config.optim.lr_scaling) == (1.5e-3, "none")
    assert objective.mask.ratio == 0.5
    assert "clip" in objective.target.address
    assert "image_size=196" in objective.target.address


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "common"], ids=lambda path: path.stem)
def test_benchmark_recipes_share_what_they_must(path: Path) -> None:
    """Recipes at equal time are worth comparing only where encoder, images and batch are the same."""
    config = load_config(PretrainConfig, path)
    check_config(config, "auto")
    check_accumulation(config, 1)
    common = yaml.safe_load((path.parent / "common.yaml").read_text(encoding="utf-8"))
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert own["base"] == "common.yaml"
    shared = merge(common, {key: value for key, value in own.items() if key != "base"})
    for section in ("data", "engine", "schedule", "monitor", "checkpoint", "tracking"):
        assert shared[section] == common[section], f"{path.name} changes {section}"
    assert config.encoder.name == common["encoder"]["name"]
    assert config.encoder.init is None, "weights from elsewhere make no fair row"
