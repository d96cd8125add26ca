"""`dsvlm data lengths | preview | bench | simulate`: what a recipe will do to its data, known before it is trained."""

import argparse
import json
import os
import re
from pathlib import Path

from dsvlm.data.commands import add_json, progress_of

TOLD = 20  # masked samples that are printed
MOST_RANKS = 2**31
_EXAMPLE = argparse.RawDescriptionHelpFormatter


def add_preflight_parsers(commands) -> None:
    """Add the commands to the table of `dsvlm data`; each sets `run`: function(args) -> exit code."""
    for name, (add, text) in _COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text, formatter_class=_EXAMPLE))


def _add_preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="RECIPE|DIR", help="recipe (name or .yaml), or directory of a shard set")
    _add_set(parser)
    parser.add_argument("--steps", metavar="A:B", help="steps A to B - 1 (default 0:2)")
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="shown of each task (default 6)")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="page to write (default preview.html)")
    parser.add_argument("--tokenizer", metavar="DIR", help="another vocabulary than the recipe's")
    parser.epilog = "example:\n  %(prog)s quickstart --steps 0:4 --out preview.html\n\nexit code 1: samples are masked"
    add_json(parser)
    parser.set_defaults(run=_preview)


def _preview(args: argparse.Namespace) -> int:
    from dsvlm.preflight.preview import preview
    from dsvlm.preflight.shards import preview_shards

    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}: expected at least 1")
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"--out {args.out}: no file can be written there; choose one in an existing directory")
    if _is_shard_set(args.subject):
        if args.set or args.steps or args.tokenizer:
            raise ValueError("--set, --steps and --tokenizer: a shard set has none of these; give a recipe")
        report = preview_shards(args.subject, args.samples, args.out, progress_of(args))
    else:
        planned = _planned(args.subject, args.set)
        steps = parse_steps(args.steps or "0:2", planned.recipe.schedule.steps)
        report = preview(planned, steps, args.samples, args.out, args.tokenizer, progress_of(args))
    if args.json:
        print(json.dumps(report))
    else:
        for entry in report["masked"][:TOLD]:
            print(f"masked: task {entry['task']}, {entry['where']}: {entry['reason']}")
        if len(report["masked"]) > TOLD:
            print(f"masked: {len(report['masked']) - TOLD} more, which --json lists")
        print(report["page"])
    return 1 if report["masked"] else 0


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one alone)")
    parser.epilog = "example:\n  %(prog)s quickstart --workers 8"
    add_json(parser)
    parser.set_defaults(run=_lengths)


def _lengths(args: argparse.Namespace) -> int:
    from dsvlm.preflight.lengths import lengths, render

    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: expected at least 0")
    rows = lengths(_planned(args.recipe, args.set), args.workers)
    print(json.dumps(rows) if args.json else render(rows))
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="DIR|RECIPE", help="directory of a shard set, or a recipe (name or .yaml)")
    _add_set(parser)
    parser.add_argument("--workers", metavar="N,N", help="loader processes to try, of a recipe (default 0,1,2)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each row (default 3)")
    parser.add_argument("--image-size", type=int, metavar="P", help="pixels of a side (default: the recipe's, or 224)")
    parser.epilog = "example:\n  %(prog)s quickstart --workers 0,2,4\n\nexit code 1: damaged samples were met"
    add_json(parser)
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from dsvlm.preflight.bench import bench_directory, bench_recipe, render

    if not 0 < args.seconds <= 600:
        raise ValueError(f"--seconds {args.seconds}: expected more than 0 and at most 600")
    if args.image_size is not None and not 1 <= args.image_size <= 4096:
        raise ValueError(f"--image-size {args.image_size}: expected 1 to 4096 pixels")
    if _is_shard_set(args.subject):
        if args.workers or args.set:
            raise ValueError("--workers and --set: a shard set has no loader of its own; give a recipe")
        report = bench_directory(args.subject, args.image_size or 224, args.seconds, progress_of(args))
    else:
        workers = _numbers("--workers", args.workers or "0,1,2")
        planned = _planned(args.subject, args.set)
        report = bench_recipe(planned, args.image_size, workers, args.seconds, progress_of(args))
    print(json.dumps(report) if args.json else render(report))
    return 1 if report["damaged"] else 0


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks of the run")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--node", type=int, default=0, help="the node to look at (default 0, the first)")
    parser.add_argument("--steps", default="0:200", metavar="A:B", help="steps A to B - 1 (default 0:200)")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="of one request to the store (default 30)")
    parser.add_argument("--mb-per-s", type=float, default=200.0, help="of one stream from the store (default 200)")
    parser.add_argument("--cache-mb", type=int, help="of the node (default: the recipe's data.remote_cache_mb)")
    parser.add_argument("--step-seconds", type=float, help="time of one update, for the store to keep up with")
    parser.epilog = "example:\n  %(prog)s quickstart --world-size 64 --step-seconds 1.5\n\nexit code 1: findings"
    add_json(parser)
    parser.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from dsvlm.preflight.simulate import Cluster, Store, render, simulate

    check_world_size(args.world_size)
    cluster, planned = Cluster(args.world_size, args.ranks_per_node, args.node), _planned(args.recipe, args.set)
    cache = planned.recipe.data.remote_cache_mb if args.cache_mb is None else args.cache_mb
    store = Store(args.latency_ms, args.mb_per_s, cache, args.step_seconds)
    steps = parse_steps(args.steps, planned.recipe.schedule.steps)
    report = simulate(planned, cluster, store, steps, progress_of(args))
    print(json.dumps(report) if args.json else render(report))
    return 1 if report["findings"] else 0


def _is_shard_set(subject: str) -> bool:
    from dsvlm.data.manifest import is_url

    return is_url(subject) or Path(subject).is_dir()


def _planned(recipe: str, overrides: list[str]):
    from dsvlm.config import load_recipe
    from dsvlm.train.build import plan_run
    from dsvlm.train.rundir import check_new_run

    planned = plan_run(load_recipe(recipe, overrides))
    check_new_run(planned.recipe)
    return planned


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a path that ends in .yaml")
    _add_set(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field, e.g. schedule.block=64"
    )


def parse_steps(text: str, last: int) -> range:
    """Steps of `A:B`, those past the recipe's last one left out; ValueError when none is left."""
    found = re.fullmatch("([0-9]{1,18}):([0-9]{1,18})", text)
    low, high = map(int, found.groups()) if found else (0, 0)
    if low >= high:
        raise ValueError(f"--steps {text}: expected A:B with A < B, for example 0:10")
    if low >= last:
        raise ValueError(f"--steps {text}: the recipe has {last} steps (schedule.steps), counted from 0")
    return range(low, min(high, last))


def check_world_size(world_size: int) -> None:
    if not 1 <= world_size <= MOST_RANKS:
        raise ValueError(f"--world-size {world_size}: use at least 1 and at most {MOST_RANKS}")


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise ValueError(f"{option} {text}: expected numbers with commas between them, for example 0,1,2")
    return [int(part) for part in parts]


_COMMANDS = {
    "lengths": (_add_lengths, "count the tokens of every sample, for a recipe that cuts its windows by length"),
    "preview": (_add_preview, "write a page of what the model will see: images, boxes, tokens, where the loss is"),
    "bench": (_add_bench, "measure how fast this machine reads, decodes and batches, and what limits it"),
    "simulate": (_add_simulate, "show what one node of a large run will read, from the manifests alone"),
}
