"""`dsvlm data convert | index | verify | info`, and the same commands as files in tools/; imports stay light."""

import argparse
import json
import sys
from pathlib import Path

from dsvlm.data.convert import coco, llava, scenes, webdataset
from dsvlm.data.fields import RECORDS

SOURCES = {
    "coco": (coco, "COCO's own JSON files and photographs",
             "--images train2017 --captions captions_train2017.json --instances instances_train2017.json --out coco"),
    "llava": (llava, "LLaVA's instruction data: conversations in JSON and their images",
              "llava_v1_5_mix665k.json --images playground/data --out data/llava"),
    "webdataset": (webdataset, "WebDataset sources that can only be read in order (pipe:, compressed tars)",
                   "'pipe:aws s3 cp s3://bucket/{000..099}.tar.gz - | gunzip' --type caption --out captions"),
    "scenes": (scenes, "drawn scenes of coloured shapes, made on the spot", "--out data/scenes"),
}


def add_data_parser(subparsers):
    """Add `data` and its subcommands, and return their table; each sets `run`: function(args) -> exit code."""
    parser = subparsers.add_parser(
        "data", help="make, index and check shards", formatter_class=_EXAMPLE,
        description="Makes shards of datasets, indexes those of other tools, checks and describes them. Needs no GPU.",
        epilog="examples:\n  %(prog)s convert scenes --out data/scenes\n  %(prog)s verify data/scenes/train/caption")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add, text) in _COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text, formatter_class=_EXAMPLE))
    return commands


def run_tool(name: str, argv=None) -> int:
    """The main function of tools/NAME.py: one data command as a program; 2 for an error of the user."""
    add, text = _COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"tools/{name}.py", description=text, formatter_class=_EXAMPLE)
    add(parser)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _add_convert(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(metavar="SOURCE", required=True)
    for name, (source, text, example) in SOURCES.items():
        sub = sources.add_parser(name, help=text, description=text, formatter_class=_EXAMPLE,
                                 epilog=f"example:\n  %(prog)s {example}")
        source.add_arguments(sub)
        add_json(sub)
        sub.set_defaults(run=_convert, source=source)
    parser.epilog = f"example:\n  %(prog)s scenes {SOURCES['scenes'][2]}"


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="WebDataset tars or parquet files, paths or URLs")
    parser.add_argument("--out", type=Path, help="write a shard set that trains the files where they lie")
    parser.add_argument("--type", help=f"task type of the set: {', '.join(RECORDS)}")
    parser.add_argument("--field", action="append", default=[], metavar="KEY=PLACE",
                        help="where a key of the record is: an extension (caption=txt), a key of a JSON member "
                             "(question=json:qa.0.question), a column of a parquet file (question=query)")
    parser.add_argument("--image", help="extension or column of the image, where samples have several")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read shards (default: 1)")
    parser.description = ("Indexes shards of other tools; the files are left as they are. Without --out each tar gets "
                          "an index beside it. With --out the directory becomes a shard set: give it to a task. "
                          "Members of one key are one sample, wherever in their tar they lie; a member that comes "
                          "twice is an error.")
    parser.epilog = ("examples:\n  %(prog)s laion/*.tar --type caption --out laion/set\n"
                     "  %(prog)s vqa-*.parquet --type vqa --image image --field question=query --out vqa-set\n"
                     "  %(prog)s https://host/a-0.tar https://host/a-1.tar --type caption --out a-set")
    add_json(parser)
    parser.set_defaults(run=_index)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="directory of a shard set, or its URL")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.epilog = "example:\n  %(prog)s data/scenes/train/caption --decode"
    add_json(parser)
    parser.set_defaults(run=_verify)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="directory of a shard set, or its URL")
    parser.epilog = "example:\n  %(prog)s data/scenes/train/caption"
    add_json(parser)
    parser.set_defaults(run=_info)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option of commands that report."""
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")


def _convert(args: argparse.Namespace) -> int:
    report = args.source.run(args, progress_of(args))
    if not _print_json(args, report):
        for path, shards in _shard_sets(report):
            _say(f"{args.out / path}: {shards['samples']} samples, {shards['shards']} shards, {shards['bytes']} bytes")
        for reason, count in report.get("skipped", {}).items():
            if count:
                _say(f"skipped, {reason.replace('_', ' ')}: {count}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from dsvlm.data.index import write_index
    from dsvlm.data.manifest import is_parquet, is_url
    from dsvlm.data.scans import check_distinct, each

    bar = progress_of(args)
    if args.out is not None:
        return _index_set(args, bar)
    for option in ("type", "field", "image"):
        if getattr(args, option):
            raise ValueError(f"--{option} is part of a shard set: give --out DIR too")
    for shard in args.shards:
        if is_url(shard) or is_parquet(shard):
            raise ValueError(f"{shard} cannot have an index beside it: give --out DIR and --type")
    check_distinct(args.shards)
    report = each(write_index, args.shards, args.workers, bar)
    if not _print_json(args, report):
        for entry in report:
            _say(f"{entry['index']}: {entry['samples']} samples, members {', '.join(entry['members'])}")
        _print_gathered(sum(entry["gathered"] for entry in report))
    return 0


def _index_set(args: argparse.Namespace, bar) -> int:
    from dsvlm.data.adopt import index_set

    if args.type is None:
        raise ValueError("--type is needed with --out: which task the samples are for")
    report = index_set(args.shards, args.type, args.out, args.field, args.image, bar, args.workers)
    if not _print_json(args, report):
        _say(f"{args.out}: {report['samples']} samples, {report['shards']} shards, {report['bytes']} bytes, "
             f"members {', '.join(report['members'])}")
        for key, place in report["fields"].items():
            _say(f"{key:14} {place}")
        _print_gathered(report["gathered"])
    return 0


def _print_gathered(samples: int) -> None:
    if samples:
        _say(f"{samples} samples were gathered by key: others lie between their members. Here they are whole; what "
             "reads these tars in order, as webdataset does, has parts of them")


def _verify(args: argparse.Namespace) -> int:
    from dsvlm.data.verify import verify

    report = verify(args.directory, args.decode, progress_of(args))
    if not _print_json(args, report):
        for problem in report["problems"]:
            _say(problem)
        for sample in report["damaged"]:
            _say(f"{sample['shard']}:{sample['key']}: {sample['reason']}")
        _say(f"{args.directory}: {report['samples']} samples, {len(report['damaged'])} damaged, "
             f"{len(report['problems'])} other problems")
    return 1 if report["problems"] or report["damaged"] else 0


def _info(args: argparse.Namespace) -> int:
    from dsvlm.data.verify import describe

    report = describe(args.directory)
    if not _print_json(args, report):
        for name, value in report.items():
            _say(f"{name:14} {value if isinstance(value, str | int) else to_json(value)}")
    return 0


def _print_json(args: argparse.Namespace, report) -> bool:
    if args.json:
        print(to_json(report, sort_keys=True))
    return args.json


def to_json(value, **options) -> str:
    """JSON that every parser takes: what is no number, which Python spells as NaN, becomes text."""
    try:
        return json.dumps(json.loads(json.dumps(value), parse_constant=str), **options)
    except RecursionError:
        raise ValueError("the manifest or a record is nested too deeply to print: convert the data again") from None


def _say(text: str) -> None:
    """Print a line; names in it come from shards, and must not command the terminal."""
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text))


def progress_of(args: argparse.Namespace):
    """A progress bar on stderr, where that is a terminal and the report is for people; elsewhere the items alone."""
    if args.json or not sys.stderr.isatty():
        return lambda items, **_: items
    from tqdm import tqdm

    return tqdm


def _shard_sets(report: dict, path: Path = Path()) -> list[tuple[Path, dict]]:
    """Every shard set of a converter's report with its path below --out."""
    if "shards" in report:
        return [(path, report)]
    nested = report.get("tasks", report)
    return [found for name, value in nested.items() for found in _shard_sets(value, path / name)]


_EXAMPLE = argparse.RawDescriptionHelpFormatter
_COMMANDS = {
    "convert": (_add_convert, "turn a dataset into shards"),
    "index": (_add_index, "write an index next to each WebDataset tar of another tool"),
    "verify": (_add_verify, "check every byte of a shard set and name the damaged samples"),
    "info": (_add_info, "print what a shard set holds"),
}
