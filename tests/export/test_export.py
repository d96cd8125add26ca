"""An exported folder says what the run says, in a process where DeepSpeed cannot be imported."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dsvlm.cli import run
from dsvlm.data.transforms import decode_image, make_decoder
from dsvlm.eval.generate import Room, question_batch
from dsvlm.export import GitProcessor, GitVlm, export_run
from dsvlm.export import hf as module
from dsvlm.export.card import task_table
from dsvlm.export.processor import encoded
from dsvlm.tasks import TASK_TYPES
from dsvlm.train.rundir import read_recipe

PROMPTS = ("where is the red circle?", "where is the blue square?", "where", "red triangle red triangle")

FRESH = """
import json, sys
from importlib.machinery import ModuleSpec

class NoDeepSpeed:  # transformers asks whether it is installed, which is fine; importing it is not
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.split(".")[0] == "deepspeed" else None
    def create_module(self, spec):
        raise ImportError("deepspeed was imported")
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, NoDeepSpeed())
from dsvlm.export import GitProcessor, GitVlm

folders, image, prompts = json.loads(sys.argv[1])
answers = {}
for folder in folders:
    model, processor = GitVlm.from_pretrained(folder).eval(), GitProcessor.from_pretrained(folder)
    answers[folder] = [processor.decode(model.generate(**processor(image, prompt))[0]) for prompt in prompts]
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 25, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def folders(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    found = {(kind, False): export_run(runs[kind], root / kind) for kind in runs}
    return found | {("llama", True): export_run(runs["llama"], root / "llama-ema", ema=True)}


def test_a_fresh_process_gives_the_answers_of_the_run(runs, folders, image, capsys):
    arguments = json.dumps([[str(f) for f in folders.values()], str(image), PROMPTS])
    done = subprocess.run([sys.executable, "-c", FRESH, arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    exported = json.loads(done.stdout)
    for (kind, ema), folder in folders.items():
        said = []
        for prompt in PROMPTS:
            capsys.readouterr()
            assert run(["generate", str(runs[kind]), str(image), prompt, "--json", *["--ema"] * ema]) == 0
            said.append(json.loads(capsys.readouterr().out)["answer"])
        assert exported[str(folder)] == said
    assert len({text for texts in exported.values() for text in texts}) > 6, "constant answers show nothing"


def test_every_tensor_is_written_whole_and_adapters_are_merged(folders):
    for folder in folders.values():
        model, report = GitVlm.from_pretrained(folder, output_loading_info=True)
        assert not any(report[f"{state}_keys"] for state in ("missing", "unexpected", "mismatched"))
        assert all(p.numel() and torch.isfinite(p).all() for p in model.parameters())
        assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("damage, error", [
    (lambda p: p.data.fill_(float("nan")), ValueError), (lambda p: setattr(p, "data", p.data[:0]), AssertionError),
])  # fmt: skip
def test_a_tensor_that_is_not_whole_is_found(runs, tmp_path, monkeypatch, damage, error):
    load = module.load_run

    def damaged(*arguments):
        recipe, codec, model = load(*arguments)
        damage(model.connector.linear.weight)
        return recipe, codec, model

    monkeypatch.setattr(module, "load_run", damaged)
    with pytest.raises(error, match="connector.linear.weight"):
        export_run(runs["opt"], tmp_path / "out")


def test_a_directory_with_files_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["export", str(runs["opt"]), str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_processor_takes_paths_bytes_and_pictures_alike(folders, image):
    processor = GitProcessor.from_pretrained(folders["opt", False])
    wanted = processor(image, PROMPTS[0])
    assert wanted["pixels"].shape == (1, 3, 20, 20) and wanted["pixels"].dtype == torch.uint8
    with Image.open(image) as picture:
        for other in (str(image), image.read_bytes(), picture):
            assert torch.equal(processor(other, PROMPTS[0])["pixels"], wanted["pixels"])
    assert processor(image, PROMPTS[0], max_new_tokens=3)["max_new_tokens"] == 3
    asked, talk = (processor(image, said)["tokens"][0].tolist() for said in ("what?", ["what?", "red", "what?"]))
    assert talk[: len(asked)] == asked and talk[-len(asked) :] == [processor.codec.eos_id, *asked[1:]]
    # 48 positions less 5 image tokens less the prompt: fewer than the 100 tokens that the recipe asks for
    assert wanted["max_new_tokens"] == 43 - wanted["tokens"].shape[1]


def test_a_sixteen_bit_picture_is_prepared_as_its_file(tmp_path):
    ramp = Image.fromarray(np.linspace(3000, 63000, 64).astype(np.uint16).reshape(8, 8))
    ramp.save(tmp_path / "ramp.png")
    wanted = decode_image((tmp_path / "ramp.png").read_bytes(), 8)
    assert np.array_equal(decode_image(encoded(ramp), 8), wanted) and wanted.min() < 20
    with pytest.raises(ValueError, match="floating-point pixels"):
        encoded(Image.new("F", (8, 8)))


def test_large_jpegs_are_decoded_as_in_training(runs, folders, tmp_path):
    coarse = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    Image.fromarray(coarse).resize((200, 200)).save(tmp_path / "large.jpg")
    data, exported = (tmp_path / "large.jpg").read_bytes(), GitProcessor.from_pretrained(folders["opt", False])
    assert not exported.settings.dct_scaling
    recipe, _, model = module.load_run(runs["opt"], "weights", module.latest_checkpoint(runs["opt"]))
    for scaling in (False, True):
        settings = module.processor_settings(replace(recipe, data=replace(recipe.data, dct_scaling=scaling)), model)
        GitProcessor(exported.codec, settings).save_pretrained(tmp_path / str(scaling))
        inputs = GitProcessor.from_pretrained(tmp_path / str(scaling))(data, PROMPTS[0])
        assert np.array_equal(inputs["pixels"][0].numpy(), make_decoder("pillow", 20, scaling)(data))
    assert not np.array_equal(make_decoder("pillow", 20, True)(data), make_decoder("pillow", 20)(data))
    path = tmp_path / "False" / "preprocessor_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "dct_scaling"}))
    assert not GitProcessor.from_pretrained(tmp_path / "False").settings.dct_scaling


def test_processor_asks_about_a_region_as_training_does(folders, image):
    processor = GitProcessor.from_pretrained(folders["opt", False])
    asked = TASK_TYPES["classify"]().question({"box": [0.1, 0.3, 0.6, 0.9]})
    room = Room(processor.settings.text_room, False)
    wanted = question_batch(processor.codec, [(asked, np.zeros((3, 20, 20), np.uint8))], room, 20)
    inputs = processor(image, "what is in the region <loc_0><loc_1><loc_2><loc_3>?")
    assert torch.equal(inputs["tokens"], wanted.tokens)


def test_processor_is_the_same_after_saving(folders, image, tmp_path):
    processor = GitProcessor.from_pretrained(folders["t5", False])
    processor.save_pretrained(tmp_path)
    again = GitProcessor.from_pretrained(tmp_path)
    assert again.settings == processor.settings
    assert torch.equal(again(image, PROMPTS[3])["tokens"], processor(image, PROMPTS[3])["tokens"])
    assert again.boxes("<loc_0><loc_1><loc_2><loc_3>") == [(0.125, 0.375, 0.625, 0.875)]
    with pytest.raises(ValueError, match="holds no preprocessor_config.json"):
        GitProcessor.from_pretrained(tmp_path / "elsewhere")


def test_generation_settings(folders):
    from transformers import GenerationConfig

    settings = GenerationConfig.from_pretrained(folders["llama", False])
    processor = GitProcessor.from_pretrained(folders["llama", False])
    assert not settings.do_sample and settings.max_new_tokens == 12
    assert settings.eos_token_id == processor.codec.eos_id != settings.pad_token_id == processor.codec.pad_id


def test_card_tells_what_is_known(runs, folders, tmp_path):
    text = (folders["llama", True] / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "dsvlm"
    for part in ("averaged (decay 0.9) weights after 7 updates", "have not been evaluated", "| locate | locate |",
                 "`where is the {name}?`", "<loc_3>"):  # fmt: skip
        assert part in body, part
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == yaml.safe_load((runs["llama"] / "recipe.yaml").read_text())


def test_card_quotes_only_the_evaluation_of_these_weights(runs, tmp_path):
    task = {"type": "locate", "metric": "mean_iou", "metrics": {"mean_iou": 0.625}, "chance": None, "samples": 9}
    for number, (step, shown) in enumerate(((7, True), (6, False))):
        result = {"step": step, "weights": "weights", "tasks": {"locate": task}}
        (runs["opt"] / "eval.json").write_text(json.dumps(result))
        text = (export_run(runs["opt"], tmp_path / str(number)) / "README.md").read_text()
        assert ("| locate | mean_iou | 0.625 |  | 9 |" in text) == shown
    (runs["opt"] / "eval.json").unlink()


def test_a_prompt_is_one_cell_of_the_card(runs):
    recipe = read_recipe(runs["opt"])
    tasks = {name: replace(task, type="vqa", prompt="Q: {question}\nA | B:") for name, task in recipe.tasks.items()}
    rows = task_table(replace(recipe, tasks=tasks))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 and "\n" not in row for row in rows)
    assert r"`Q: {question}\nA \| B:`" in rows[2]
