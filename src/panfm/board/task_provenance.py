"""Where a cell comes from: its Results in, hashes, versions and the command that measures it again out.

    first Result of the cell --> encoder, data, split and predictions by hash, versions, what was chosen
    all its Results --held against the shipped config--> `panfm evaluate run` with whatever differs from that

A command names no folder of this machine: shards lie where the reader has them, and of an absolute path of weights the
last part is left.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from panfm.config import load_config
from panfm.encoder.address import parse_address
from panfm.errors import UserError
from panfm.evaluation.protocol import Protocol
from panfm.evaluation.results import Result
from panfm.evaluation.run_config import EvaluateConfig, count_draws, list_recipes

SHARDS, WEIGHTS, TASKS = "SHARDS", "WEIGHTS", "TASKS"  # folders of the reader
NOT_SHOWN = ("thresholds",)  # of what was chosen: the operating points have a table
MAX_TEXT = 120  # characters of one chosen thing


@dataclass(frozen=True)
class Provenance:
    """What one encoder's row follows from. chosen, versions: name and text."""

    address: str
    encoder_hash: str
    data_hash: str
    split_hash: str
    predictions_sha256: str
    num_runs: int  # of the cell; the hash of predictions is the first run's
    versions: tuple[tuple[str, str], ...]
    chosen: tuple[tuple[str, str], ...]
    command: str | None  # None: its protocol is none of this panfm's


def describe_provenance(results: Sequence[Result], source: str | None) -> Provenance:
    """Describe a cell by its Results (draws, seeds), the first of which is detailed. source: of a shipped task."""
    first = min(results, key=lambda one: (one.draw, one.seed))
    return Provenance(
        address=hide_folders(first.encoder.address),
        encoder_hash=first.encoder.hash,
        data_hash=first.data_hash,
        split_hash=first.split_hash,
        predictions_sha256=first.predictions_sha256,
        num_runs=len(results),
        versions=tuple(sorted(first.versions.items())),
        chosen=tuple(_list_chosen(first.settings.get("chosen", {}))),
        command=write_command(results, source) if first.protocol in get_args(Protocol) else None,
    )


def write_command(results: Sequence[Result], source: str | None) -> str:
    """Write the command that measures a cell again: one task, protocol, variant and fraction, all its draws and seeds.

    source: name of the task's shard set, None for a task of the user's own folder.
    """
    first = results[0]
    address = hide_folders(first.encoder.address)
    words = ["panfm", "evaluate", "run", *_write_overrides(results)]
    if first.encoder.name == _find_name(address):
        words += ["--encoder", address]
    else:
        words.insert(3, "encoders=" + json.dumps([{"address": address, "name": first.encoder.name}]))
    words += ["--shards", f"{SHARDS}/{source}" if source else SHARDS, "--tasks", first.task]
    words += ["--protocols", first.protocol]
    if first.label_fraction > 0:  # else nothing is trained
        words += ["--fractions", f"{first.label_fraction:g}"]
    if source is None:
        words += ["--task-dir", TASKS]
    return shlex.join(words)


def hide_folders(address: str) -> str:
    """An address without absolute folders: `panfm:/data/us/first` becomes `panfm:WEIGHTS/first`."""
    return re.sub(r"(?<=[:@])[/~\\][^@?]*[/\\](?=[^/\\@?]+)", f"{WEIGHTS}/", address)


def _write_overrides(results: Sequence[Result]) -> list[str]:
    """What of the shipped config these Results were not made with, as key=value."""
    first, default = results[0], _read_default(results[0].protocol)
    changes: dict[str, Any] = {}
    seeds = sorted({one.seed for one in results})
    if seeds != list(default.seeds):
        changes["seeds"] = seeds
    num_draws = max(one.draw for one in results) + 1
    if num_draws != count_draws(default, first.label_fraction):
        changes["draws"] = num_draws
    if first.evaluated_on != default.evaluate_on:
        changes["evaluate_on"] = first.evaluated_on
    num_replicates = first.settings.get("num_replicates", default.num_replicates)
    if num_replicates != default.num_replicates:
        changes["num_replicates"] = num_replicates
    settings = getattr(default, first.protocol)
    if hasattr(settings, "variants"):
        if list(settings.variants) != [first.variant]:
            changes[f"{first.protocol}.variants"] = [first.variant]
    elif settings.variant != first.variant:
        changes[f"{first.protocol}.variant"] = first.variant
    changes |= _compare_recipe(first, default)
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _compare_recipe(first: Result, default: EvaluateConfig) -> dict[str, Any]:
    """The settings of the protocol that differ from those of the same variant, else of its default."""
    recipes = dict[str, Mapping[str, Any]]()
    for _, recipe in list_recipes(default):
        recipes[str(recipe["variant"])] = recipe
    usual = recipes.get(first.variant) or next(iter(recipes.values()))
    return {
        f"{first.protocol}.{name}": value
        for name, value in first.settings.get("recipe", {}).items()
        if name != "variant" and name in usual and json.dumps(value) != json.dumps(usual[name])
    }


@cache
def _read_default(protocol: str) -> EvaluateConfig:
    return load_config(EvaluateConfig, "default", [f"protocols={json.dumps([protocol])}"], folder="configs/evaluate")


def _find_name(address: str) -> str | None:
    """The name that `--encoder` gives; None for an address of another version."""
    try:
        return parse_address(address).name
    except UserError:
        return None


def _list_chosen(chosen: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in sorted(chosen.items()):
        if name in NOT_SHOWN or value is None:
            continue
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        lines.append((name.replace("_", " "), text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"))
    return lines
