"""`RUN/report.html`: what was trained and what came of it, on one page without anything from outside."""

import json
import math
import re
from html import escape
from pathlib import Path
from statistics import median

import yaml

from dsvlm.config import Recipe
from dsvlm.data.files import write_file
from dsvlm.eval.charts import Series, legend, line_chart, sparkline
from dsvlm.eval.evaluate import versions
from dsvlm.eval.gallery import CARDS, gallery
from dsvlm.eval.style import stylesheet
from dsvlm.train.checkpoint import complete_checkpoints
from dsvlm.train.metrics import read_lines
from dsvlm.train.rundir import read_recipe


def write_report(run_dir: Path) -> Path:
    """Writes the report from metrics.jsonl, and from eval.json and eval_samples.jsonl when they are there.

    Raises ValueError when the directory is not a run or has no update yet.
    """
    run_dir = Path(run_dir)
    recipe = read_recipe(run_dir)
    rows = read_lines(run_dir / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run_dir}: metrics.jsonl holds no update yet; train first")
    result = read_result(run_dir)
    sections = [
        heading(recipe, rows, result),
        results(result, run_dir),
        curves(recipe, rows),
        answers(recipe, result, read_lines(run_dir / "eval_samples.jsonl")),
        efficiency(rows),
        routing(rows),
        whole_recipe(recipe),
    ]
    path = run_dir / "report.html"
    write_file(path, page(f"{recipe.name}: training report", sections).encode())
    return path


def read_result(run_dir: Path) -> dict | None:
    path = run_dir / "eval.json"
    return json.loads(path.read_text()) if path.exists() else None


def page(title: str, sections: list[str], style: str = "") -> str:
    """A whole page; style: rules after those of the report."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{stylesheet()}{style}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def heading(recipe: Recipe, rows: list[dict], result: dict | None) -> str:
    vision, decoder = recipe.model.vision, recipe.model.decoder
    done, planned = rows[-1]["step"] + 1, recipe.schedule.steps
    skipped = sum(row.get("skipped", 0) for row in rows)
    facts = {
        "updates": f"{done:,}" + ("" if done == planned else f" of {planned:,}")
        + (f", {skipped:,} skipped: no finite gradient" if skipped else ""),
        "samples": f"{sum(row['samples'] for row in rows):,}, {sum(row['masked'] for row in rows):,} masked",
        "time": duration(sum(row["seconds"] for row in rows)),
        "strategy": f"{recipe.schedule.strategy}, {len(recipe.tasks)} tasks",
        "ranks": f"{ranks(recipe.run_dir)}, ZeRO-{recipe.train.zero}, {recipe.train.dtype}",
        "vision": vision.pretrained or sizes(vision.config),
        "decoder": f"{decoder.kind}: {decoder.pretrained or sizes(decoder.config)}",
        "versions": ", ".join(f"{k} {v}" for k, v in (result["versions"] if result else versions()).items()),
    }
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<h1>{escape(recipe.name)}</h1>\n<p class='note'>Training report</p>\n<dl>{items}</dl>"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def ranks(run_dir: Path) -> str:
    """Ranks that wrote the newest checkpoint, from its files' names."""
    for checkpoint in reversed(complete_checkpoints(run_dir)):
        files = json.loads((checkpoint / "COMPLETE.json").read_text())["files"]
        found = {int(match[1]) for name in files if (match := re.search(r"-of-(\d+)\.safetensors$", name))}
        if found:
            return f"{max(found)} rank{'s' * (max(found) > 1)}"
    return "ranks unknown"


def sizes(config: dict) -> str:
    shown = {"image_size": "px", "patch_size": "px patches", "num_hidden_layers": "layers", "hidden_size": "wide"}
    return ", ".join(f"{config[key]} {unit}" for key, unit in shown.items() if key in config) or "new"


def results(result: dict | None, run_dir: Path) -> str:
    if result is None:
        command = f"<code>dsvlm eval {escape(str(run_dir))}</code>"
        return f"<h2>Results</h2><p class='note'>Not evaluated yet: {command}, then make this report again.</p>"
    body = "".join(result_row(name, task) for name, task in result["tasks"].items())
    kind = "averaged weights" if result["weights"] == "ema" else "weights"
    return (
        "<h2>Results on validation samples</h2>"
        f"<p class='note'>The {kind} of step {result['step']:,}, greedy answers. The mark on a bar is chance: what the "
        "best guess without looking at the image scores.</p><div class='scroll'><table><thead><tr><th>task</th>"
        "<th>metric</th><th class='number'>score</th><th></th><th class='number'>chance</th><th>also</th>"
        f"<th class='number'>samples</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def result_row(name: str, task: dict) -> str:
    score, chance = task["metrics"][task["metric"]], task["chance"]
    mark = "" if chance is None else f'<b style="left:calc({100 * chance:.1f}% - 1px)"></b>'
    also = ", ".join(f"{words(k)} {figure(v)}" for k, v in task["metrics"].items() if k != task["metric"])
    samples = f"{task['samples']:,}" + (f" ({task['skipped']} skipped)" if task["skipped"] else "")
    return (
        f"<tr><td><strong>{escape(name)}</strong></td><td>{escape(words(task['metric']))}</td>"
        f"<td class='number'>{figure(score)}</td>"
        f"<td><div class='bar'><i style='width:{100 * (score or 0):.1f}%'></i>{mark}</div></td>"
        f"<td class='number'>{figure(chance)}</td><td>{escape(also)}</td>"
        f"<td class='number'>{samples}</td></tr>"
    )


def figure(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3f}"


def words(metric: str) -> str:
    return metric.replace("_", " ").replace("iou", "IoU").replace("f1", "F1")


def curves(recipe: Recipe, rows: list[dict]) -> str:
    series = []
    for name in recipe.tasks:
        points = [(row["step"], row["task_loss"].get(name)) for row in rows]
        # a task may be absent from a window, or have diverged
        points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if points:
            series.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    if not series:
        return "<h2>Training loss per task</h2><p class='note'>No update has a finite loss: the run has diverged.</p>"
    return (
        "<h2>Training loss per task</h2><p class='note'>Mean cross-entropy per target token, in nats: smoothed lines "
        f"over the values of single updates.</p>{legend([s.name for s in series])}"
        f"<div class='panel'>{line_chart(series, 'update', 'loss')}</div>"
    )


def answers(recipe: Recipe, result: dict | None, rows: list[dict]) -> str:
    if result is None:
        return ""
    parts = [
        "<h2>Answers on images it never saw</h2>"
        f"<p class='note'>The first {CARDS} validation samples of each task, not chosen.</p>"
    ]
    for name, task in result["tasks"].items():
        mine = [row for row in rows if row["task"] == name]
        share = f"{escape(words(task['metric']))} {figure(task['metrics'][task['metric']])}"
        parts.append(f"<h3>{escape(name)}<small>{share} on {task['samples']} samples</small></h3>")
        parts.append(gallery(recipe, name, task["metric"], mine))
    return "\n".join(parts)


def efficiency(rows: list[dict]) -> str:
    tiles = [
        tile(rows, "tokens_per_s", "text tokens per second", "{:,.0f}"),
        tile(rows, "seconds", "seconds per update", "{:.3f}"),
        tile(rows, "useful_tokens", "positions that are not padding", "{:.1%}", top=1.0),
        tile(rows, "data_wait", "of the time spent waiting for data", "{:.1%}", top=1.0),
    ]
    return (
        "<h2>Padding and throughput</h2><p class='note'>Medians over all updates; the small charts run from the first "
        f"update to the last, from 0 up.</p><div class='tiles'>{''.join(tiles)}</div>"
    )


def routing(rows: list[dict]) -> str:
    """Two charts for each layer of experts and modality; empty for a model without experts."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("moe_load", ())))
    if not names:
        return ""
    tiles = []
    for name in names:
        mine = [
            {"step": row["step"], "kept": row["moe_success"][name], "busiest": row["moe_busiest"][name]}
            for row in rows if name in row.get("moe_load", ())
        ]  # fmt: skip
        tiles.append(tile(mine, "kept", f"of the choices served, {name}", "{:.1%}", top=1.0))
        tiles.append(tile(mine, "busiest", f"busiest expert's load, {name}", "{:.2f}"))
    bad = sum(count for row in rows for count in row.get("moe_bad_tokens", {}).values())
    first = next((row["step"] for row in rows if any(row.get("moe_bad_tokens", {}).values())), None)
    note = f"<p><b>{bad:,} tokens had logits that are NaN or infinite, from step {first} on.</b></p>" if bad else ""
    return (
        "<h2>Expert routing</h2><p class='note'>Medians over all updates. Served: choices that got a row at their "
        "expert. Load: what the busiest expert was asked for, over the mean of all; 1 is balance.</p>"
        f"{note}<div class='tiles'>{''.join(tiles)}</div>"
    )


def tile(rows: list[dict], key: str, label: str, form: str, top: float | None = None) -> str:
    ys = [row[key] for row in rows]
    series = Series(label, [row["step"] for row in rows], ys)
    return (
        f"<div class='panel tile'><p class='value'>{form.format(median(ys))}</p><p>{escape(label)}</p>"
        f"{sparkline(series, top)}</div>"
    )


def whole_recipe(recipe: Recipe) -> str:
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, default_flow_style=None, width=100)
    return f"<h2>Recipe</h2><details><summary>all fields</summary><pre>{escape(text)}</pre></details>"
