"""Conversations as others write them, and what is said about those that cannot be learnt."""

import pytest

from dsvlm.data.turns import read_turns


def said(*texts: str, roles=("human", "gpt")) -> list[dict]:
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def test_llava_and_openai_say_the_same():
    llava = [{"from": "system", "value": "Be brief."}, *said("<image>\nWhat is it?", "A dog.", "Why?", "It barks.")]
    openai = [{"role": "system", "content": "Be brief."},
              {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
              {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
              {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It barks."}]  # fmt: skip
    wanted = "Be brief.", [("What is it?", "A dog."), ("Why?", "It barks.")]
    assert read_turns(llava) == read_turns(openai) == wanted


def test_texts_are_as_written_but_for_the_mark_of_the_image():
    assert read_turns(said(" a  b\n", " c ", "d\n<image>", "e"))[1] == [(" a  b\n", " c "), ("d", "e")]
    assert read_turns(said("<image>", "a dog"))[1] == [("", "a dog")]
    assert read_turns(said("hi<image>there  you", "a"))[1][0][0] == "hi there  you"
    assert read_turns(said("what?", "the tag <image> and <image>"))[1][0][1] == "the tag <image> and <image>"


@pytest.mark.parametrize("turns, words", [
    (None, "no list"), ([], "no list"), ("a", "no list"), ({"from": "human"}, "no list"),
    (["a"], "no object"), ([{"value": "a"}], "role None"), ([{"from": "bot", "value": "a"}], "'bot'"),
    ([{"from": ["human"], "value": "a"}], "role"), ([{"from": "human"}], "without text"),
    ([{"from": "human", "value": 7}], "without text"), ([{"role": "user", "content": [{"type": "audio"}]}], "'audio'"),
    ([{"role": "user", "content": ["a"]}], "None"), ([{"role": "user", "content": [{"type": "text"}]}], "'text'"),
    (said("a"), "alternate"), (said("a", "b", "c"), "alternate"), (said("a", "b", roles=("gpt", "human")), "alternate"),
    (said("a", "b", roles=("human", "human")), "alternate"), ([{"from": "system", "value": "a"}], "alternate"),
    ([*said("a", "b"), {"from": "system", "value": "s"}, *said("a", "b")], "alternate"),
    (said("a", " "), "answer without text"), (said("a", "b", "<image>", "c"), "question without text"),
    (said("<image> <image>", "b"), "several images"), (said("<image>", "b", "<image> c", "d"), "several images"),
])  # fmt: skip
def test_turns_that_cannot_be_learnt(turns, words):
    with pytest.raises(ValueError, match=words):
        read_turns(turns)
