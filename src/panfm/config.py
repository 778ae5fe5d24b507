"""Runs as documents: YAML + `key.sub=value` -> frozen, strict pydantic dataclasses; the run keeps the resolved copy.

    base.yaml <- run.yaml <- key.sub=value ...   ->   one frozen config object   ->   run/config.yaml

A config class sits beside the code that it configures and is declared with `@config_class`. Unknown keys, wrong types
and missing values are a UserError that names the key, its value, the rule and the nearest known key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from panfm.errors import UserError
from panfm.files import find_resource, write_text

Config = TypeVar("Config")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config_class(cls: type[Config]) -> type[Config]:
    """Make a class a frozen keyword-only pydantic dataclass that refuses unknown keys (values only, no behaviour)."""
    strict = ConfigDict(extra="forbid", arbitrary_types_allowed=False, use_attribute_docstrings=True)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=strict)  # type: ignore[return-value]


def load_config(kind: type[Config], path: str | Path, overrides: Iterable[str] = (), folder: str = "configs") -> Config:
    """Read a YAML file (and the one that its `base:` names), apply `key.sub=value` overrides, validate as `kind`.

    `path` is a file, or the name of a shipped one in `folder`. A `base` is looked up beside the file first; a base
    may not have a base of its own.
    """
    file = find_resource(folder, path)
    values = read_yaml(file)
    if (base := values.pop("base", None)) is not None:
        beside = file.parent / str(base)
        parent = read_yaml(beside if beside.is_file() else find_resource(folder, str(base)))
        if "base" in parent:
            raise UserError(f"{file}: its base {base} has a base of its own; one level is allowed, merge the two")
        values = merge(parent, values)
    for override in overrides:
        values = merge(values, parse_override(override))
    return validate(kind, values, where=str(file))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; anything else is a UserError."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level is a {type(values).__name__}; it must be a mapping of keys to values")
    return values


def parse_override(text: str) -> dict[str, Any]:
    """Turn `optim.base_lr=1e-3` into `{"optim": {"base_lr": 0.001}}`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r}: it must look like key.sub=value, for example optim.base_lr=1e-3")
    try:
        result = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value {value!r} is not valid YAML; quote it") from None
    for part in reversed(parts):
        result = {part: result}
    return result  # type: ignore[no-any-return]


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`: mappings are merged key by key, everything else (lists too) is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def validate(kind: type[Config], values: Any, where: str) -> Config:
    """Validate plain values as `kind`; the first fault becomes one line that names `where`, key, value and rule."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_describe(kind, error)}") from None


def to_plain(config: Any) -> Any:
    """Turn a config object back into plain dicts, lists and scalars, as YAML and JSON hold them."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def write_config(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def _describe(kind: type, error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    # An unknown key explains the missing one beside it, so it is named first.
    fault = next((f for f in faults if f["type"] in ("unexpected_keyword_argument", "extra_forbidden")), faults[0])
    key = ".".join(str(part) for part in fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, fault["loc"][:-1])
        near = get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key} (value {fault['input']!r}); {hint}{more}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key} is missing; it has no default, so it must be set{more}"
    message = fault["msg"].removeprefix("Value error, ")
    # A rule over several fields has no key: its input is the whole document, and its message names what it is about.
    return f"{key} ({fault['input']!r}): {message}{more}" if key else f"{message}{more}"


def _known_keys(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """The field names of the config class at `location` inside `kind`, as far as its annotations tell."""
    for part in location:
        candidates = [kind, *getattr(kind, "__args__", ())]
        for candidate in candidates:
            if is_dataclass(candidate) and str(part) in {f.name for f in fields(candidate)}:
                kind = candidate.__annotations__[str(part)]
                break
            if str(part) in getattr(candidate, "model_fields", {}):
                kind = candidate.model_fields[str(part)].annotation
                break
    for candidate in [kind, *getattr(kind, "__args__", ())]:
        if is_dataclass(candidate):
            return [f.name for f in fields(candidate)]
        if hasattr(candidate, "model_fields"):
            return list(candidate.model_fields)
    return []
