"""The model card: what the model was trained to do, how well it does it, and how to load it."""

import json

import yaml

from dsvlm.config import Recipe, TaskConfig
from dsvlm.data.boxes import location_tokens
from dsvlm.train.build import task_types

USE = '''```python
from dsvlm.export import GitProcessor, GitVlm

model = GitVlm.from_pretrained("PATH/OF/THIS/FOLDER").eval()
processor = GitProcessor.from_pretrained("PATH/OF/THIS/FOLDER")
text = processor.decode(model.generate(**processor("image.png", PROMPT))[0])
boxes = processor.boxes(text)  # x0, y0, x1, y1 as shares of the image's width and height
```'''

TURNS = "text, turn by turn: PROMPT may be a list, questions and answers so far"


def model_card(recipe: Recipe, step: int, weights: str, evaluated: dict | None, versions: dict[str, str]) -> str:
    """The text of README.md.

    weights: "weights" or "ema"; evaluated: what eval.json holds about these weights, or None.
    """
    head = {"library_name": "dsvlm", "pipeline_tag": "image-text-to-text", "tags": sorted(task_tags(recipe))}
    kind = f"averaged (decay {recipe.optim.ema})" if weights == "ema" else "last"
    prompts = [kind.prompt for kind in task_types(recipe).values()]
    example = next((p for p in prompts if "{" not in p), prompts[0])
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {recipe.name}", "",
        f"A vision-language model (GIT: CLIP vision tower, projection, {recipe.model.decoder.kind} decoder) trained by "
        f"dsvlm on {len(recipe.tasks)} task{'s' * (len(recipe.tasks) > 1)}. "
        f"These are the {kind} weights after {step:,} updates.",
        "", "## Use", "", USE.replace("PROMPT", json.dumps(example)), "",
        "Decoding is greedy. Prompts should read like the templates below: the model has seen no others.",
        "", "## Tasks", "", *task_table(recipe), "",
        f"Regions are written as four location tokens x0 y0 x1 y1, from `{location_tokens(recipe.text.bins)[0]}` to "
        f"`{location_tokens(recipe.text.bins)[-1]}`, shared by both axes.",
        "", "## Evaluation", "", *evaluation(evaluated),
        "", "## Limits", "",
        "Nothing beyond the figures above was measured: not robustness, bias or safety, nor images unlike those of "
        "the training shards.",
        "", "## Training recipe", "", "```yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).strip(), "```", "",
        "Written with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", "",
    ])  # fmt: skip


def task_tags(recipe: Recipe) -> set[str]:
    names = {
        "caption": "image-captioning", "vqa": "visual-question-answering", "classify": "region-classification",
        "locate": "visual-grounding", "detect": "object-detection", "pair": "image-text-classification",
        "conversation": "visual-dialogue",
    }  # fmt: skip
    return {names[task.type] for task in recipe.tasks.values()}


def task_table(recipe: Recipe) -> list[str]:
    rows = ["| task | type | prompt | answer |", "|---|---|---|---|"]
    types = task_types(recipe)
    for name, task in recipe.tasks.items():
        prompt = types[name].prompt.replace("\n", "\\n").replace("|", "\\|")  # one row, four cells
        rows.append(f"| {name} | {task.type} | `{prompt}` | {answer_form(task)} |")
    return rows


def answer_form(task: TaskConfig) -> str:
    forms = {"locate": "location tokens", "detect": "names, each with location tokens", "conversation": TURNS}
    return f"one of {task.classes} classes, by a head of its own" if task.classes else forms.get(task.type, "text")


def evaluation(result: dict | None) -> list[str]:
    if result is None:
        return ["These weights have not been evaluated (`dsvlm eval`)."]
    rows = ["| task | metric | score | chance | samples |", "|---|---|---|---|---|"]
    for name, task in result["tasks"].items():
        for metric, value in task["metrics"].items():
            known = metric == task["metric"] and task["chance"] is not None
            guess, score = f"{task['chance']:.3f}" if known else "", "-" if value is None else f"{value:.3f}"
            rows.append(f"| {name} | {metric} | {score} | {guess} | {task['samples']} |")
    return [*rows, "", "On the first samples of each task's validation set. Chance: the best guess without the image."]
