"""Task types: templates are data, prompts and targets, parsing and scores with asymmetric fixtures."""

import pytest

from dsvlm.config import RECIPES, load_recipe
from dsvlm.data.boxes import encode_box
from dsvlm.data.sample import Boxes, Image, Text
from dsvlm.data.tokenizer import prompt_segments
from dsvlm.tasks import TASK_TYPES

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
RECORDS = {
    "caption": {"caption": "a red circle"},
    "vqa": {"question": "what colour?", "answer": "red"},
    "classify": {"box": list(LEFT), "name": "dog"},
    "locate": {"name": "dog", "boxes": [list(LEFT), list(RIGHT)]},
    "detect": {"objects": [{"name": "dog", "box": list(LEFT)}, {"name": "cat", "box": list(RIGHT)}]},
    "pair": {"text": "a dog", "label": 1},
    "conversation": {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]},
}


@pytest.mark.parametrize("name", TASK_TYPES)
def test_question_is_the_sample_without_its_target(name):
    kind = TASK_TYPES[name]()
    sample = kind.sample(RECORDS[name])
    question = kind.question(RECORDS[name])
    assert isinstance(question[0], Image)
    assert sample.segments[: len(question)] == question
    assert not any(getattr(s, "loss", False) for s in question)
    target = sample.segments[len(question) :]
    assert all(s.loss for s in target)
    assert bool(target) != (sample.label is not None)


ASKED = {
    "caption": (Text("describe the image"),), "vqa": (Text("what colour?"),), "locate": (Text("where is the dog?"),),
    "classify": (Text("what is in the region"), Boxes((LEFT,)), Text("?")), "detect": (Text("list all objects"),),
    "pair": (Text("a dog"),), "conversation": (Text("what?"),),
}  # fmt: skip


@pytest.mark.parametrize("recipe", [None, *sorted(path.stem for path in RECIPES.glob("*.yaml"))])
def test_prompts_of_task_types_and_shipped_recipes_read_as_they_always_did(recipe):
    """Their ids are in trained models."""
    if recipe is None:
        types = {name: (name, None) for name in TASK_TYPES}
    else:
        types = {name: (task.type, task.prompt) for name, task in load_recipe(recipe).tasks.items()}
    for name, prompt in types.values():
        assert TASK_TYPES[name](prompt).question(RECORDS[name]) == (Image(), *ASKED[name])


@pytest.mark.parametrize("name, prompt, record, text", [
    ("vqa", "Question: {question}\nAnswer:", {"question": "red?"}, "Question: red?\nAnswer:"),
    ("vqa", "  {question} \n", {"question": " what? "}, "what?"),
    ("vqa", "say {{yes}} or no: {question}", {"question": "red?"}, "say {yes} or no: red?"),
    ("locate", "({name})", {"name": "cat"}, "(cat)"),
    ("locate", "where is the {name}?", {"name": ".NET"}, "where is the .NET?"),
    ("locate", "{name}s and  {name}", {"name": "cat"}, "cats and  cat"),
])  # fmt: skip
def test_a_template_is_read_as_it_is_written_and_as_it_would_be_typed(name, prompt, record, text):
    question = TASK_TYPES[name](prompt).question(record)
    assert question == (Image(), Text(text)) == (Image(), *prompt_segments(text))


def test_templates_can_be_replaced_and_are_checked():
    kind = TASK_TYPES["locate"]("find every {name} here")
    assert kind.question({"name": "dog", "boxes": []})[1] == Text("find every dog here")
    with pytest.raises(ValueError, match=r"no field \{nmae\}.*name"):
        TASK_TYPES["locate"]("find {nmae}")
    for prompt in ("{question", "question}", "{question}}"):
        with pytest.raises(ValueError, match=r"prompt '.*question.*'.*; close each { that opens a field"):
            TASK_TYPES["vqa"](prompt)
    for name, asked in (("question", ":>10"), ("question", "!r"), ("question", "!s:<4"), ("box", ":.2f")):
        with pytest.raises(ValueError, match=rf"{{{name}{asked}}} asks for a format, .*; write {{{name}}}$"):
            TASK_TYPES["classify" if name == "box" else "vqa"](f"see {{{name}{asked}}} here")
    region = TASK_TYPES["classify"]().question(RECORDS["classify"])
    assert region[1:] == (Text("what is in the region"), Boxes((LEFT,)), Text("?"))


def test_task_types_know_whether_they_have_boxes():
    assert [name for name, kind in TASK_TYPES.items() if kind().has_boxes] == ["classify", "locate", "detect"]
    assert not TASK_TYPES["classify"]("what is it?").has_boxes


def test_a_perfect_answer_scores_one():
    codes = [encode_box(box, 16) for box in (LEFT, RIGHT)]
    answers = {
        "caption": "a red circle", "vqa": "Red", "classify": "dog", "locate": "".join(codes),
        "detect": f"dog{codes[0]} cat {codes[1]}", "pair": "1",
        "conversation": "red",
    }  # fmt: skip
    for name, answer in answers.items():
        kind = TASK_TYPES[name]()
        score = kind.score([answer], [RECORDS[name]], 16)
        assert score[kind.metric] > 0.8, (name, score)
        worse = kind.score([answer, "nonsense"], [RECORDS[name]] * 2, 16)
        assert worse[kind.metric] < score[kind.metric], name


def test_detection_counts_names_and_missed_objects():
    kind, record = TASK_TYPES["detect"](), RECORDS["detect"]
    left, right = encode_box(LEFT, 16), encode_box(RIGHT, 16)
    assert kind.score([f"cat{left} dog{right}"], [record], 16)["f1"] == 0
    assert kind.score([f"dog{left}"], [record], 16)["f1"] == pytest.approx(2 / 3)
    assert kind.score([f"dog{left} dog{left} cat{right}"], [record], 16)["f1"] == pytest.approx(4 / 5)
    assert [name for name, _ in kind.parse(f"dog<loc_1> cat{left}<loc_1> dog{left}{left}", 16)] == ["cat", "dog", ""]
    assert kind.parse(f"dog{left} cat<loc_1>", 16) == [("dog", pytest.approx(kind.parse(f"dog{left}", 16)[0][1]))]


@pytest.mark.parametrize("name", ["dog", "a<b", "<3", "<loc_>", "two\nlines", "a  b", "big red dog"])
def test_any_name_is_found_in_its_own_target(name):
    kind = TASK_TYPES["detect"]()
    record = {"objects": [{"name": name, "box": list(LEFT)}, {"name": "cat", "box": list(RIGHT)}]}
    answer = " ".join(
        s.text if isinstance(s, Text) else "".join(encode_box(box, 16) for box in s.boxes) for s in kind.target(record)
    )
    assert kind.score([answer], [record], 16)["f1"] == 1
    assert kind.score([answer.replace(" <loc_", "<loc_")], [record], 16)["f1"] == 1


@pytest.mark.parametrize("value", [None, True, ["red"], {"a": 1}])
def test_a_field_that_is_neither_text_nor_a_number_is_no_prompt(value):
    with pytest.raises(TypeError, match="question: .* is neither text nor a number"):
        TASK_TYPES["vqa"]().question({"question": value})
    assert TASK_TYPES["vqa"]().question({"question": 5})[1] == Text("5")


def test_word_f1_is_not_symmetric_in_its_arguments_by_accident():
    score = TASK_TYPES["caption"]().score(["red"], [{"caption": "a red circle"}], 16)
    assert score["word_f1"] == pytest.approx(0.5) and score["exact"] == 0


def test_chance_is_the_most_frequent_training_answer_to_the_same_question():
    kind = TASK_TYPES["vqa"]()
    train = [{"question": "q", "answer": a} for a in ("red", "red", "blue")] + [{"question": "p", "answer": "no"}]
    test = [{"question": "q", "answer": "blue"}, {"question": "q", "answer": "red"}, {"question": "p", "answer": "no"},
            {"question": "new", "answer": "red"}]  # fmt: skip
    assert kind.chance(train, test) == 0.5


@pytest.mark.parametrize("label, known", [(1, 1), (0, 0), (1.0, 1), (-0.0, 0)])
def test_a_label_is_the_same_class_in_training_truth_score_and_chance(label, known):
    kind, record = TASK_TYPES["pair"](), {"text": "a dog", "label": label}
    assert kind.sample(record).label == known and type(kind.sample(record).label) is int
    assert kind.truth(record) == str(known) and kind.score([str(known)], [record], 16) == {"accuracy": 1}
    assert kind.chance([{"label": known}] * 2, [record]) == 1


@pytest.mark.parametrize("label", [True, "01", "1", 1.7, float("inf"), float("nan"), None, [1]])
def test_a_label_that_is_no_whole_number_is_an_error(label):
    kind, record = TASK_TYPES["pair"](), {"text": "a dog", "label": label}
    for use in (kind.sample, kind.truth, lambda r: kind.score(["1"], [r], 16), lambda r: kind.chance([r], [r])):
        with pytest.raises(ValueError, match="is no class: store a whole number"):
            use(record)


def test_a_pair_without_a_text_is_not_asked_about_none():
    with pytest.raises(TypeError, match="text: None is neither text nor a number"):
        TASK_TYPES["pair"]().sample({"text": None, "label": 1})


def test_a_conversation_is_asked_for_its_last_answer():
    said = [("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "A {dog}."), ("human", "Why?"),
            ("gpt", "Ears.")]  # fmt: skip
    record = {"conversations": [{"from": role, "value": text} for role, text in said]}
    kind = TASK_TYPES["conversation"]("USER: {text} ASSISTANT:")
    asked = (Image(), Text("Be brief."), Text("USER: What? ASSISTANT:"), Text("A {dog}.", loss=True),
             Text("USER: Why? ASSISTANT:"))  # fmt: skip
    assert kind.question(record) == asked and kind.sample(record).segments == (*asked, Text("Ears.", loss=True))
    assert kind.truth(record) == "Ears." and kind.score(["ears."], [record], 16) == {"word_f1": 1, "exact": 1}
    with pytest.raises(ValueError, match="it has no {text}"):
        TASK_TYPES["conversation"]("describe the image")
