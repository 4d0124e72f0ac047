"""What the configuration's dataclasses say about themselves: keys, types, bounds, choices and meanings.

It is not the configuration: it knows no key by name. Invariant: every complaint names the full key, the value, and what
would be right.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ..errors import ConfigError

NUMBER = re.compile(r"([+-]?\d[\d_]*\.?\d*(?:e\+?\d{1,2})?)\s*((?:[KMBT]i?)?)")
FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Bi": 2**30, "Ti": 2**40}
EXPECTED = {
    int: "a whole number (1500, 64K, 1.5B and 32Ki are understood)",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def option(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field with its one-line meaning and its rules: choices, at_least, at_most, above."""
    metadata = {"help": meaning, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """One key of the configuration; `name` has `[]` after a list whose elements have keys of their own."""

    name: str
    type: str
    default: Any
    meaning: str


def keys_of(schema: type, prefix: str = "") -> list[Key]:
    """Every key under `schema`, in order."""
    keys: list[Key] = []
    for entry, hint in _fields(schema):
        name = f"{prefix}{entry.name}"
        element = _element(hint)
        if dataclasses.is_dataclass(hint):
            keys += keys_of(typing.cast(type, hint), f"{name}.")
        elif element and dataclasses.is_dataclass(element):
            keys.append(Key(name, "list", _default(entry), _meaning(schema, entry)))
            keys += keys_of(typing.cast(type, element), f"{name}[].")
        else:
            keys.append(Key(name, _type_name(hint), _default(entry), _meaning(schema, entry)))
    return keys


def fit(schema: type, value: Any, key: str = "", *, names: Sequence[str]) -> dict[str, Any]:
    """The mapping with each value checked against its type and `1.5B`-style numbers expanded.

    Raises ConfigError for an unknown key, with the nearest of the known `names`, and for a value of another type.
    Values that hold an interpolation `${...}` pass as they are.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{key or 'the configuration'} is {value!r}; it must hold keys and values.")
    hints = {entry.name: hint for entry, hint in _fields(schema)}
    fitted = {}
    for name, item in value.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise ConfigError(_unknown(full, names))
        fitted[name] = _fit_value(hints[name], item, full, names)
    return fitted


def count_of(value: int | float | str, key: str) -> int:
    """The whole number that `value` means: 1500, 1.5K, 64Ki, 1e9."""
    match = NUMBER.fullmatch(str(value).strip())
    exact = Decimal(match[1].replace("_", "")) * FACTORS[match[2]] if match else None
    if exact is None or exact != int(exact):
        raise ConfigError(f"{key} is {value!r}; it must be {EXPECTED[int]}.")
    return int(exact)


def problems_of(config: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each value outside the bounds or choices of its field."""
    for entry in dataclasses.fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from problems_of(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from problems_of(item, f"{name}.{index}.")
        else:
            yield from _broken_rules(name, value, entry.metadata)


def nearest(key: str, names: Sequence[str]) -> str | None:
    """The known key that was most likely meant: the same last word elsewhere first, then the most similar."""
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    for word, known in ((key, same_leaf), (key, names)):
        if found := difflib.get_close_matches(word, known, n=1, cutoff=0.75 if known is names else 0.0):
            return found[0]
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    found = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)
    return leaves[found[0]] if found else None


def _fields(schema: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(schema)
    return [(entry, hints[entry.name]) for entry in dataclasses.fields(schema)]


def _element(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


def _type_name(hint: Any) -> str:
    element = _element(hint)
    return f"list[{element.__name__}]" if element else hint.__name__


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def _meaning(schema: type, entry: dataclasses.Field[Any]) -> str:
    """The field's own text, else its line in the Attributes of the class's docstring."""
    if "help" in entry.metadata:
        return entry.metadata["help"]
    found = re.search(rf"^\s+{entry.name}: (.+?)(?=^\s+\w+: |^\s*$|\Z)", schema.__doc__ or "", re.M | re.S)
    return " ".join(found.group(1).split()).partition(". ")[0].rstrip(".") if found else ""


def _unknown(key: str, names: Sequence[str]) -> str:
    generic = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    near = nearest(generic, names)
    index = re.search(r"\.(\d+)\.", key)
    shown = near.replace("[]", f".{index.group(1)}" if index else ".0", 1) if near else None
    return f"unknown key {key}; did you mean {shown}?" if shown else f"unknown key {key}; see `longscan config --keys`."


def _fit_value(hint: Any, value: Any, key: str, names: Sequence[str]) -> Any:
    if isinstance(value, str) and "${" in value:
        return value
    if dataclasses.is_dataclass(hint):
        return fit(typing.cast(type, hint), value, key, names=names)
    element = _element(hint)
    if element is None:
        return _scalar(hint, value, key)
    if not isinstance(value, list):
        raise ConfigError(f"{key} is {value!r}; it must be a list.")
    return [_fit_value(element, item, f"{key}.{index}", names) for index, item in enumerate(value)]


def _scalar(hint: type, value: Any, key: str) -> Any:
    """The value as `hint`; a number is never made of a bool, nor a bool of anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str and (number or isinstance(value, str)):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and number:
        return float(value)
    if hint is int and (number or isinstance(value, str)):
        return count_of(value, key)
    raise ConfigError(f"{key} is {value!r}; it must be {EXPECTED[hint]}.")


def _broken_rules(name: str, value: Any, rules: Any) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}; it must be a finite number"
        return
    if "choices" in rules and value not in rules["choices"]:
        known = ", ".join(choice or '""' for choice in rules["choices"])
        yield f"{name} is {value!r}; it must be one of {known}"
    if "at_least" in rules and value < rules["at_least"]:
        yield f"{name} is {value}; it must be at least {rules['at_least']}"
    if "at_most" in rules and value > rules["at_most"]:
        yield f"{name} is {value}; it must be at most {rules['at_most']}"
    if "above" in rules and value <= rules["above"]:
        yield f"{name} is {value}; it must be above {rules['above']}"
