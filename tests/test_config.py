from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Literal

import pytest
import yaml

from panfm.config import config_class, load_config, merge, parse_override, to_plain, write_config
from panfm.errors import UserError


@config_class
class Optim:
    base_lr: float
    kind: Literal["adamw", "sgd"] = "adamw"


@config_class
class Run:
    optim: Optim
    steps: int = 10
    names: tuple[str, ...] = ()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml_base_and_overrides_are_laid_over_each_other_in_that_order(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "optim: {base_lr: 1.0, kind: sgd}\nsteps: 1\nnames: [a, b]\n")
    run = write(tmp_path / "run.yaml", "base: base.yaml\noptim: {base_lr: 2.0}\nnames: [c]\n")
    config = load_config(Run, run, ["steps=7", "optim.base_lr=3.5"])
    assert config == Run(optim=Optim(base_lr=3.5, kind="sgd"), steps=7, names=("c",))


def test_the_written_copy_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = Run(optim=Optim(base_lr=1e-3), names=("x",))
    write_config(config, tmp_path / "copy.yaml")
    assert load_config(Run, tmp_path / "copy.yaml") == config
    assert yaml.safe_load((tmp_path / "copy.yaml").read_text()) == to_plain(config)


def test_a_config_cannot_be_changed_after_loading() -> None:
    config = Optim(base_lr=1.0)
    with pytest.raises(FrozenInstanceError):
        config.base_lr = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("optim: {base_lr: 1}\nstep: 3\n", [], r"unknown key step \(value 3\); did you mean steps\?"),
        ("optim: {base_lr: 1, momentum: 3}\n", [], r"unknown key optim.momentum .*known keys: base_lr, kind"),
        ("optim: {base_lr: fast}\n", [], r"optim.base_lr \('fast'\): Input should be a valid number"),
        ("optim: {base_lr: 1, kind: lion}\n", [], r"optim.kind \('lion'\): Input should be 'adamw' or 'sgd'"),
        ("steps: 3\n", [], r"optim is missing"),
        ("- 1\n", [], r"top level is a list; it must be a mapping"),
        ("a: [1\n", [], r"not valid YAML"),
        ("optim: {base_lr: 1}\n", ["steps"], r"override 'steps': it must look like key.sub=value"),
        ("optim: {base_lr: 1}\n", ["=3"], r"it must look like key.sub=value"),
        ("base: other.yaml\n", [], r"other.yaml: no such file"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_with_key_value_and_rule(
    tmp_path: Path, text: str, overrides: list[str], said: str
) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(UserError, match=said) as caught:
        load_config(Run, path, overrides)
    assert "\n" not in str(caught.value)


def test_a_base_of_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "steps: 1\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match="one level is allowed"):
        load_config(Run, write(tmp_path / "c.yaml", "base: b.yaml\n"))


def test_override_values_are_yaml() -> None:
    assert parse_override("a.b=[1, x]") == {"a": {"b": [1, "x"]}}
    assert parse_override("a=") == {"a": None}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
