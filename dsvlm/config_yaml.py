"""YAML as recipes use it: what JSON can hold, every key once and text."""

import math
import re

import yaml

DEEPEST = 32  # levels of a value in a free part of a recipe; one that holds itself has more
KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
KNOWN = tuple(f"tag:yaml.org,2002:{kind}" for kind in KINDS)
TEXT, MERGE, INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int"
DECIMAL = re.compile("0|-?[1-9][0-9]*")


class RecipeLoader(yaml.SafeLoader):
    """Refuses what SafeLoader takes without a word: a key that comes twice, a key or a value that JSON cannot hold.

    Keys that are integers, such as those of `id2label`, are text.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == INTEGER and DECIMAL.fullmatch(key.value):
                key.tag = TEXT  # as JSON keeps it, and Transformers' id2label takes it
            if key.tag not in (TEXT, MERGE):
                raise ValueError(f"line {line}: the key {shown(key)} is no text; put it in quotes")
            if key.value in lines:
                raise ValueError(
                    f"line {line}: the key {key.value!r} is in line {lines[key.value]} already; remove one"
                )
            lines[key.value] = line
        return node

    def refuse(self, node):
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise ValueError(
            f"line {node.start_mark.line + 1}: {shown(node)} is of type {kind}, which no field takes; "
            "put it in quotes if it is text"
        )

    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in KNOWN} | {None: refuse}


def shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def read_yaml(text: str | bytes):
    """The value of one YAML document; ValueError, in one line, when it is none that a recipe may have."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except (LookupError, TypeError) as error:
        raise ValueError(f"a value does not fit its tag: {error!r}") from None


def check_plain(path: str, value, depth: int = 0) -> None:
    """Whether JSON can hold a value of a free part of the recipe, such as the configuration of a model."""
    if depth > DEEPEST:
        raise ValueError(f"{path[:80]}...: nested more than {DEEPEST} deep, or holds itself; write it out")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: the key {key!r} is no text; put it in quotes")
            check_plain(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(f"{path}[{index}]", item, depth + 1)
    elif not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{path}: {value!r:.80} is no value that JSON can hold; give a finite number or text")
