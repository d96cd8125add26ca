"""Where the keys of a record lie in samples that another tool wrote: `caption=txt`, `question=json:qa.0.question`."""

import json
from collections.abc import Callable

# Record keys of each task type, with the places that are tried when the user names none.
RECORDS = {
    "caption": {"caption": ("txt", "json:caption")},
    "vqa": {"question": ("json:question",), "answer": ("json:answer",)},
    "classify": {"box": ("json:box",), "name": ("json:name",)},
    "locate": {"name": ("json:name",), "boxes": ("json:boxes",)},
    "detect": {"objects": ("json:objects",)},
    "pair": {"text": ("txt", "json:text"), "label": ("cls", "json:label")},
    "conversation": {"conversations": ("json:conversations",)},
}
KINDS = {"label": int, "box": list, "boxes": list, "objects": list, "conversations": list}      # the others are text
NAMES = {int: "an integer", list: "a list", str: "text"}
OPTIONAL = "source"                                                          # id in the source data, of any type


def choose_fields(task_type: str, given: list[str], members, columns: bool = False) -> dict[str, str]:
    """Record key -> place, from `KEY=PLACE` arguments and the defaults of the task type.

    members: extensions that occur (columns of a parquet file when `columns`; then a place is COLUMN or COLUMN:PATH).
    ValueError names a key that the type has not, a place that nothing has, or a key without a place.
    """
    if task_type not in RECORDS:
        raise ValueError(f"--type {task_type!r} is none of {', '.join(RECORDS)}")
    wanted, fields = RECORDS[task_type], {}
    for argument in given:
        key, sign, place = argument.partition("=")
        if not (key and sign and place):
            raise ValueError(f"--field {argument!r}: expected KEY=PLACE, such as {next(iter(wanted))}=txt")
        if key not in wanted and key != OPTIONAL:
            raise ValueError(f"--field {argument}: a {task_type} record has {', '.join(wanted)}, and {OPTIONAL}")
        if place.partition(":")[0] not in members:
            raise ValueError(f"--field {argument}: no sample has {place.partition(':')[0]!r}; there are "
                             f"{', '.join(sorted(members))}")
        fields[key] = place
    for key, places in wanted.items():
        if columns:
            places = (key,)
        found = next((place for place in places if place.partition(":")[0] in members), None)
        if fields.setdefault(key, found) is None:
            raise ValueError(f"--field {key}=...: needed, since no sample has {' or '.join(places)}; there are "
                             f"{', '.join(sorted(members))}")
    return fields


def make_record(fields: dict[str, str], read: Callable[[str], bytes]) -> dict:
    """The record of one sample; read: extension -> payload. ValueError says which field does not fit."""
    payloads: dict[str, bytes] = {}
    parsed: dict[str, object] = {}
    record = {}
    for key, place in fields.items():
        extension, colon, path = place.partition(":")
        if extension not in payloads:
            payloads[extension] = read(extension)
        if not colon and KINDS.get(key, str) is str:
            value = decode(payloads[extension], extension).strip()
        else:
            if extension not in parsed:
                parsed[extension] = load_json(payloads[extension], extension)
            value = follow(parsed[extension], path)
        record[key] = checked(key, place, value)
    return record


def follow(value, path: str):
    """The part of a JSON value at a dotted path (`qa.0.question`); ValueError when it has no such part."""
    for step in filter(None, path.split(".")):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"no {step!r} of {path!r}") from None
    return value


def checked(key: str, place: str, value):
    """The value of a record key, if it is of the key's type."""
    kind = KINDS.get(key, str)
    if key != OPTIONAL and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{key} ({place}) is {shortened(value)}, not {NAMES[kind]}")
    if not is_unicode(value):
        raise ValueError(f"{key} ({place}) is {shortened(value)}: half a character, which UTF-8 cannot write")
    return value


def is_unicode(value) -> bool:
    """Whether all text of a JSON value can be written: JSON may spell halves of characters, as "\\ud800"."""
    left = [value]                                # not a call for each: a value may be nested deeply
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return False
    return True


def decode(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8-sig")           # editors of Windows put a mark before the text
    except UnicodeDecodeError as error:
        raise ValueError(f"{extension} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def load_json(data: bytes, extension: str):
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{extension} is not JSON ({error})") from None


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
