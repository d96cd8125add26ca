"""From plain values to dataclasses, strictly: unknown and missing keys and wrong types are errors with their path."""

import dataclasses
import types
import typing
from difflib import get_close_matches

from dsvlm.config_yaml import check_plain


def build(kind: type, value, path: str):
    """Turns a raw YAML value into `kind`, strictly: unknown keys, missing keys and wrong types are errors."""
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, path)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else build(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong_type(path, "a list", value)
        return tuple(build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            raise wrong_type(path, "a mapping with at least one entry", value)
        for key in value:
            if not isinstance(key, str):
                raise wrong_type(f"a key of {path}", "text", key)
        return {key: build(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind is dict:
        if not isinstance(value, dict):
            raise wrong_type(path, "a mapping", value)
        check_plain(path, value)
        return value
    if kind is float:
        return build_float(value, path)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong_type(path, {int: "an integer", str: "text", bool: "true or false"}[kind], value)
    return value


def build_float(value, path: str) -> float:
    text = isinstance(value, str) and value.isascii()  # YAML 1.1 reads 1e-4 as text
    try:
        if text or isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise wrong_type(path, "a number", value)


def build_dataclass(kind: type, value, path: str):
    if not isinstance(value, dict):
        raise wrong_type(path or "recipe", "a mapping", value)
    hints = typing.get_type_hints(kind)
    where = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"{where}{key}: unknown key{nearest(str(key), hints)}; known here: {', '.join(hints)}")
    for spec in dataclasses.fields(kind):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and spec.name not in value:
            raise ValueError(f"{where}{spec.name}: missing; add it to the recipe")
    return kind(**{key: build(hints[key], item, f"{where}{key}") for key, item in value.items()})


def wrong_type(path: str, expected: str, value) -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {value!r:.80} ({type(value).__name__})")


def nearest(name: str, known) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    found = get_close_matches(name, [str(k) for k in known], n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
