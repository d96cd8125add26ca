"""Puts what the stages of `benchmarks/gpu.sh` left behind into gpu-DATE.md, .json and .log."""

import argparse
import json
import shutil
import sys
from datetime import date
from pathlib import Path

from benchmarks import device
from benchmarks.measure import Row, markdown
from benchmarks.parts import load_parts, table

LOG_BYTES = 1_000_000  # of each stage, its end


def collect(work: Path) -> tuple[list[dict], list[dict]]:
    """Stages as they ended (name, result, seconds, last line of its output) and the parts that they wrote."""
    stages = []
    listing = work / "stages.tsv"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        name, result, seconds = line.split("\t")
        log = work / "logs" / f"{name}.log"
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        last = said[-1][:200] if said else ""
        stages.append({"stage": name, "result": result, "seconds": int(seconds), "said": last})
    return stages, load_parts(work / "parts")


def render(report: dict) -> str:
    about = report["machine"]
    gpu = f"{about['device']} ({about['architecture']}), driver {about['driver']}" if about["device"] else "no GPU"
    lines = [f"# {gpu}, {report['date']}", ""]
    if not report["publishable"]:
        lines += ["**Not publishable**: no GPU, a smoke run, a stage that did not end well, or a part cut short.", ""]
    lines += [
        f"torch {about['torch']}, CUDA {about['cuda']}, cuDNN {about.get('cudnn', '')}, triton {about['triton']}; "
        f"{about['processor']}, {about['cores']} cores; commit {about['commit'] or 'unknown'}; {report['seconds']} s.",
        "", table(["stage", "result", "seconds", "last line"], ([
            stage["stage"], stage["result"], str(stage["seconds"]), stage["said"].replace("|", "/")
        ] for stage in report["stages"])), "",
    ]  # fmt: skip
    rows = [Row(**row) for part in report["parts"] for row in part["rows"]]
    if rows:
        missed = sum(row.met is False for row in rows)
        lines += [f"## Against what was asked for: {missed} of {len(rows)} missed", "", markdown(rows), ""]
    for part in report["parts"]:
        lines += [f"## {part['part']}" + ("" if part["complete"] else " (cut short)"), "", part["text"], ""]
    if report["choices"]:
        lines += ["## What backend=\"auto\" follows", "", "```", *map(json.dumps, report["choices"]), "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="holds stages.tsv, logs/ and parts/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True, help="the table for backend='auto'")
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    stages, parts = collect(args.work)
    well = all(stage["result"] == "ok" for stage in stages) and all(part["complete"] for part in parts)
    machine = device.machine()
    measured = any(part["part"] == "attention" for part in parts) and args.measured.exists()
    report = {
        "date": date.today().isoformat(), "machine": machine, "seconds": args.seconds, "stages": stages,
        "publishable": well and bool(parts) and bool(machine["device"]) and not args.smoke,
        "choices": json.loads(args.measured.read_text()) if measured else [], "parts": parts,
    }  # fmt: skip
    name = "smoke" if args.smoke else "gpu"
    target = args.out / f"{name}-{report['date']}"
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(render(report) + "\n")
    with target.with_suffix(".log").open("wb") as log:
        for stage in stages:
            found = args.work / "logs" / f"{stage['stage']}.log"
            log.write(f"==== {stage['stage']}: {stage['result']}\n".encode())
            log.write(found.read_bytes()[-LOG_BYTES:] if found.exists() else b"")
    if measured and args.out.resolve() != args.measured.parent.resolve():
        shutil.copy(args.measured, args.out / f"{name}-{report['date']}-measured.json")
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
