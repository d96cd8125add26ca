"""The command line: one table of commands; what a command needs is imported when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsvlm import __version__

EXAMPLES = """With DSVLM_TRACEBACK=1 in the environment an error shows where it was raised.

examples:
  dsvlm train quickstart --nproc 2
  dsvlm plan quickstart --world-size 16 --steps 0:4
  dsvlm eval runs/quickstart --json
  dsvlm generate runs/quickstart image.png "where is the red square?"
  dsvlm export runs/quickstart out/
"""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a path that ends in .yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field, e.g. tasks.vqa.weight=0.5"
    )


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe, or go on with it where it stopped",
        description="Trains a recipe. Started again with the same recipe, it goes on from the last checkpoint. "
        "Ended by a signal it saves, and returns 0.",
        epilog="example: dsvlm train quickstart --nproc 2 --set schedule.steps=100 --set output=runs/short",
    )
    add_recipe(parser)
    parser.add_argument("--nproc", type=int, default=0, help="ranks to start on this machine (default: be one rank)")
    parser.add_argument("--print-run-dir", action="store_true", help="print where the run will be written, and end")
    parser.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    from dsvlm.config import load_recipe
    from dsvlm.train.launch import launch

    recipe = load_recipe(args.recipe, args.set)
    if args.print_run_dir:
        print(recipe.run_dir)
        return 0
    if args.nproc < 0:
        raise ValueError(f"--nproc {args.nproc}: expected at least 1")
    if args.nproc:
        from dsvlm.train.build import plan_run
        from dsvlm.train.engine import read_ds_config
        from dsvlm.train.rundir import check_start

        # What is wrong with the recipe, the shards or the run directory is said once, before ranks start.
        check_start(plan_run(recipe))
        read_ds_config(recipe)
        arguments = ["train", args.recipe, *(part for override in args.set for part in ("--set", override))]
        return launch(arguments, args.nproc, recipe.run_dir)
    from dsvlm.train.loop import train

    return train(recipe)


def add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show what a run will do, from the manifests alone",
        description="Prints tasks, micro-steps, digest and idle share of steps, and for the whole run epochs, repeats, "
        "idle share, padding (where lengths are known), open shards and reads; from manifests, without a GPU.",
        epilog="example: dsvlm plan quickstart --world-size 16384 --steps 0:4 --json",
    )
    add_recipe(parser)
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks (default 1)")
    parser.add_argument("--steps", default="0:10", metavar="A:B", help="steps A to B - 1 (default 0:10)")
    parser.add_argument("--json", action="store_true", help='print one JSON object: {"steps": [...], "run": {...}}')
    parser.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> int:
    import json

    from dsvlm.config import load_recipe
    from dsvlm.preflight.commands import check_world_size, parse_steps
    from dsvlm.preflight.summary import plan_summary, render
    from dsvlm.schedule import preview

    recipe = load_recipe(args.recipe, args.set)
    steps = parse_steps(args.steps, recipe.schedule.steps)
    check_world_size(args.world_size)
    rows, run = plan_summary(recipe, args.world_size, steps)
    print(json.dumps({"steps": rows, "run": run}) if args.json else f"{preview.render(rows)}\n\n{render(run)}")
    return 0


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="directory that dsvlm train wrote")


def add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="use the averaged weights (optim.ema)")


def add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a run on its validation sets",
        description="Answers validation samples; prints each task's metrics, chance beside them; writes RUN/eval.json "
        "and every answer into RUN/eval_samples.jsonl.",
        epilog="example: dsvlm eval runs/quickstart --tasks question,locate --samples 100 --json",
    )
    add_run(parser)
    parser.add_argument("--tasks", default="", metavar="A,B", help="tasks (default: all with a validation set)")
    parser.add_argument("--samples", type=int, metavar="N", help="per task (default: the recipe's eval.samples)")
    add_ema(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    import json

    from dsvlm.eval.evaluate import evaluate, render

    tasks = [name for name in args.tasks.split(",") if name]
    result = evaluate(args.run_dir, tasks, args.samples, args.ema, progress=sys.stderr.isatty())
    written = f"written: {args.run_dir / 'eval.json'}, {args.run_dir / 'eval_samples.jsonl'}"
    print(json.dumps(result) if args.json else f"{render(result)}\n{written}")
    return 0


def add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="ask a run about an image",
        description="Prints the model's answer to a prompt, and the boxes in the answer.",
        epilog='example: dsvlm generate runs/quickstart image.png "where is the red square?" --draw boxes.png',
    )
    add_run(parser)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="PNG, JPEG or WebP file")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="+",
        help="a question; or a conversation so far, questions and answers in turn, up to a question",
    )  # fmt: skip
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the image with the boxes drawn on it")
    add_ema(parser)
    parser.add_argument("--json", action="store_true", help="print the answer and its boxes as one JSON object")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    from dsvlm.eval.generate import generate

    return generate(args.run_dir, args.image, args.prompt, as_json=args.json, draw=args.draw, ema=args.ema)


def add_report(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's report as one HTML file",
        description="Writes RUN/report.html: loss curves, scores and answers of the last evaluation, throughput.",
        epilog="example: dsvlm report runs/quickstart",
    )
    add_run(parser)
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    from dsvlm.eval.report import write_report

    print(write_report(args.run_dir))
    return 0


def add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run as a Hugging Face folder",
        description="Writes weights (LoRA merged), tokenizer, processor and model card, which says how "
        "dsvlm.export.GitVlm loads them.",
        epilog="example: dsvlm export runs/quickstart out/",
    )
    add_run(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="new or empty directory")
    add_ema(parser)
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    from dsvlm.export.hf import export_run

    print(export_run(args.run_dir, args.out, args.ema))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvlm",
        description="Trains vision-language models on many tasks: one recipe, the same training on any number of GPUs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dsvlm {__version__}")
    # The deepspeed launcher puts this before the command; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_train(commands)
    add_plan(commands)
    add_eval(commands)
    add_generate(commands)
    add_report(commands)
    add_export(commands)
    from dsvlm.data.commands import add_data_parser
    from dsvlm.preflight.commands import add_preflight_parsers

    add_preflight_parsers(add_data_parser(commands))
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs one command; a user's mistake, or a file that cannot be had, is one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        return 0  # the reader, `head` for one, has seen enough
    except KeyboardInterrupt:
        print("dsvlm: interrupted", file=sys.stderr)
        return 130  # as shells tell a death by that signal
    except (ValueError, OSError) as error:
        if "DSVLM_TRACEBACK" in os.environ:
            raise
        if not getattr(error, "told", False):  # rank 0 raises the same, and says it once
            print(f"dsvlm: error: {error}", file=sys.stderr)
        return 2
