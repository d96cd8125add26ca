"""The rules of the house: imports go one way, heavy ones wait until they are needed, files stay short."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsvlm import config_checks, config_schedule
from dsvlm.config import apply_override, parse_recipe
from dsvlm.schedule import shares
from dsvlm.schedule.plan import ROUND_KINDS, STRATEGIES, Schedule, Stream
from dsvlm.tasks import TASK_TYPES

ROOT = Path(__file__).resolve().parents[1]
# A package imports itself and what stands left of it; the top-level modules count as packages.
ORDER = ("config", "data", "tasks", "schedule", "ops", "model", "train", "eval", "export", "preflight", "cli")
SAME_AS = {f"config_{part}": "config" for part in ("build", "checks", "schedule", "yaml")}
TORCH_IN_DATA = {"dsvlm/data/collate.py", "dsvlm/data/loader.py"}
HEAVY = ("torch", "transformers", "deepspeed", "peft", "numpy", "pyarrow", "PIL", "sentencepiece", "tokenizers")

SOURCES = sorted((ROOT / "dsvlm").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
CODE = SOURCES + TOOLS + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(nodes, package: tuple[str, ...]) -> list[tuple[str, int]]:
    """(dotted name, line) of each import; `from a import b` gives `a.b`, for b may be a module."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], node.module or "") if node.level else ())
            found += [(f"{base or node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def all_imports(path: Path) -> list[tuple[str, int]]:
    return imports_of(ast.walk(ast.parse(path.read_text())), path.relative_to(ROOT).parent.parts)


def top_imports(path: Path) -> list[tuple[str, int]]:
    """Imports that run when the module is imported: not those inside functions or `if TYPE_CHECKING`."""
    pending, run = list(ast.parse(path.read_text()).body), []
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        run.append(node)
        pending += ast.iter_child_nodes(node)
    return imports_of(run, path.relative_to(ROOT).parent.parts)


def part_of(dotted: str) -> str | None:
    """The package of a name inside dsvlm; None for the bare package, such as its version."""
    parts = dotted.split(".")
    part = SAME_AS.get(parts[1], parts[1]) if len(parts) > 1 else None
    return part if part in ORDER else None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "dsvlm").parts
    own = parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        allowed = {"train", "cli"} if own == "__main__" else set()
    else:
        own = SAME_AS.get(own, own)
        assert own in ORDER, f"{name_of(path)} has no place in the order of imports"
        allowed = set(ORDER[: ORDER.index(own) + 1])
    for dotted, line in all_imports(path):
        if dotted.split(".")[0] == "dsvlm" and part_of(dotted):
            assert part_of(dotted) in allowed, f"{name_of(path)}:{line} imports {dotted}, which stands right of it"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_imports_wait(path):
    top = {dotted.split(".")[0] for dotted, _ in top_imports(path)}
    assert "deepspeed" not in top, "deepspeed looks for its devices when it is imported: import it inside a function"
    if path.is_relative_to(ROOT / "dsvlm/data") and name_of(path) not in TORCH_IN_DATA:
        assert "torch" not in top, "shards are made on nodes that have no torch"
    if path.is_relative_to(ROOT / "dsvlm/schedule"):
        assert top <= {*sys.stdlib_module_names, "numpy", "dsvlm"}, "the schedule is integers only"


@pytest.mark.parametrize("path", TOOLS, ids=name_of)
def test_tools_import_data_only(path):
    for dotted, line in all_imports(path):
        root = dotted.split(".")[0]
        assert root in sys.stdlib_module_names or dotted.startswith("dsvlm.data."), f"line {line}: {dotted}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_are_short_and_plain(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    assert path.parent.name not in ("utils", "common", "misc")


def loaded_by(*command: str) -> set[str]:
    """Top-level names of the modules that a command of dsvlm has imported when it ends."""
    code = (
        "import json, sys, atexit; from dsvlm.__main__ import main; sys.argv = ['dsvlm', *sys.argv[1:]];"
        "atexit.register(lambda: print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr));"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("train", "--help"), ("data", "convert", "--help")])
def test_help_is_light(command):
    assert not loaded_by(*command) & set(HEAVY)


def test_help_is_light_means_something(tmp_path):
    """The probe sees what a command does import."""
    arguments = ("data", "convert", "scenes", "--out", str(tmp_path), "--samples", "1", "--val-samples", "0")
    loaded = loaded_by(*arguments)
    assert {"PIL", "pyarrow"} <= loaded
    assert not loaded & {"torch", "transformers", "deepspeed"}


# config_checks names what other packages define: it stands left of them, and must not wait for torch.
def allowed_by_checks(raw: dict, override: str) -> set[str]:
    """The values that the checks of a recipe name when they refuse another one."""
    raw = copy.deepcopy(raw)
    apply_override(raw, f"{override}=nothing-of-the-kind")
    with pytest.raises(ValueError, match="is none of") as error:
        parse_recipe(raw)
    return set(str(error.value).split(" is none of ")[1].partition(" (did")[0].split(", "))


@pytest.fixture
def raw():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 20, "patch_size": 10}
    return {
        "name": "names", "data": {"root": "data"}, "text": {"vocab_size": 64, "bins": 8, "max_length": 48},
        "model": {"vision": {"config": sizes}, "decoder": {"kind": "opt", "config": {"hidden_size": 16}}},
        "tasks": {"match": {"type": "pair", "classes": 2, "shards": "match", "samples": 2}}, "schedule": {"steps": 3},
    }  # fmt: skip


def test_names_of_task_types_agree():
    assert config_checks.TASK_TYPES == tuple(TASK_TYPES)


def test_names_of_strategies_agree(raw):
    assert allowed_by_checks(raw, "schedule.strategy") == set(STRATEGIES)
    assert allowed_by_checks(raw, "schedule.rounds") == set(ROUND_KINDS)
    streams = (Stream("match", (8,), 2, 1),)
    for strategy in STRATEGIES:
        drawn = {"unified": {"samples": 4}, "per_rank": {"samples": 4, "chunk": 2}}.get(strategy, {})
        for rounds in ROUND_KINDS:
            raw["schedule"] = {"steps": 3, "strategy": strategy, "rounds": rounds, **drawn}
            config, schedule = parse_recipe(raw).schedule, Schedule(0, strategy, streams, rounds, **drawn)
            assert config.strategy == strategy and schedule.rounds == rounds
            assert config.mixes == schedule.mixes
    assert config_schedule.LONGEST_CYCLE == shares.LONGEST_CYCLE


def test_names_of_decoder_kinds_agree(raw):
    from dsvlm.model.backbone import KINDS

    assert allowed_by_checks(raw, "model.decoder.kind") == set(KINDS)
