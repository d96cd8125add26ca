"""Labels: only the target, exactly one EOS; no prompt, image or padding in the loss, also when pad is EOS."""

import pytest

from dsvlm.data.encode import IGNORE, encode_record, encode_sample, masked_sample
from dsvlm.data.reader import BadSample
from dsvlm.data.sample import Boxes, Image, Sample, Text
from dsvlm.data.tokenizer import (
    TextCodec,
    add_locations,
    load_tokenizer,
    prompt_segments,
    spoken_segments,
    train_tokenizer,
)  # fmt: skip
from dsvlm.tasks import TASK_TYPES

WORDS = ["what colour is the circle?", "red", "blue", "where is the red square?", "a red circle, a blue square"] * 20
SAMPLE = Sample((Image(), Text("what colour is the circle?"), Text("red", loss=True)))


@pytest.fixture(scope="module")
def codec():
    return train_tokenizer(WORDS, 48, 8)


def test_decoder_targets_are_the_next_tokens_of_the_answer(codec):
    row = encode_sample(SAMPLE, codec, 64, encoder_decoder=False)
    assert len(row.tokens) == len(row.targets) and row.images == 1
    learnt = [(i, t) for i, t in enumerate(row.targets) if t != IGNORE]
    assert [t for _, t in learnt] == [row.tokens[i + 1] for i, _ in learnt[:-1]] + [codec.eos_id]
    assert codec.decode([t for _, t in learnt]) == "red"
    assert row.tokens.count(codec.eos_id) == 1 and row.tokens[-1] == codec.eos_id
    assert row.tokens[0] == codec.bos_id and row.count == len(learnt)


def said(*texts: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


def test_conversations_learn_every_answer_with_its_end(codec):
    make = TASK_TYPES["conversation"]().sample
    row = encode_record(said("what colour?", "red", "where is?", "a square", "is it?", "blue"), make, codec, 64,
                        encoder_decoder=False)  # fmt: skip
    learnt = [t for t in row.targets if t != IGNORE]
    answers = [codec.encode(Text(text), first=False) for text in ("red", "a square", "blue")]
    assert learnt == [i for answer in answers for i in (*answer, codec.eos_id)] and row.count == len(learnt)
    assert all(t in (IGNORE, row.tokens[i + 1]) for i, t in enumerate(row.targets[:-1])) and row.targets[-1] == IGNORE
    questions = [codec.encode(Text(text), first=False) for text in ("where is?", "is it?")]
    assert [row.ids[first:end] for first, end in row.silent] == questions
    assert codec.decode(row.ids) == "what colour? red where is? a square is it? blue"


def test_a_typed_conversation_has_the_ids_of_training(codec):
    texts = ("what colour?", "red", "where is?", "a square")
    row = encode_record(said(*texts), TASK_TYPES["conversation"]().sample, codec, 64, encoder_decoder=False)
    asked = Sample(spoken_segments(texts[:3]), label=0)
    typed = encode_sample(asked, codec, 64, encoder_decoder=False)
    assert typed.ids == row.ids[: len(typed.ids)] and len(typed.ids) == row.silent[0][1]
    assert spoken_segments("where is?") == spoken_segments(["where is?"]) == prompt_segments("where is?")
    with pytest.raises(BadSample, match="an encoder-decoder answers once"):
        encode_sample(asked, codec, 64, encoder_decoder=True)
    for wrong in ([], texts[:2], ("a", " ", "b"), ("a", "b", "")):
        with pytest.raises(ValueError, match=f"prompt: {len(wrong)} texts; give a question, or"):
            spoken_segments(wrong)


def test_a_conversation_of_one_turn_is_a_question_and_its_answer(codec):
    for prompt in (None, "say {%s} now"):
        talk = TASK_TYPES["conversation"](prompt and prompt % "text")
        vqa = TASK_TYPES["vqa"](prompt and prompt % "question")
        rows = [
            encode_record(record, kind.sample, codec, 64, encoder_decoder=False)
            for kind, record in ((talk, said("red?", "blue")), (vqa, {"question": "red?", "answer": "blue"}))
        ]
        assert rows[0] == rows[1] and rows[0].silent == ()


@pytest.mark.parametrize("texts, words", [
    (("red?", "blue", "red?"), "alternate"), (("red?", ""), "answer without text"),
    (("<image> red? <image>", "blue"), "several images"), (("red? " * 60, "blue", "red?", "blue"), "max_length"),
])  # fmt: skip
def test_conversations_that_cannot_teach(codec, texts, words):
    with pytest.raises(BadSample, match=words):
        encode_record(said(*texts), TASK_TYPES["conversation"]().sample, codec, 64, encoder_decoder=False)


def test_a_conversation_that_is_too_long_loses_its_last_turns(codec):
    make, whole = TASK_TYPES["conversation"]().sample, []
    for turns in range(1, 6):
        record = said(*("what is red?", "a blue square") * turns)
        whole.append(encode_record(record, make, codec, 999, encoder_decoder=False))
    for limit in range(len(whole[0].ids), len(whole[4].ids) + 1):
        cut = encode_record(record, make, codec, limit, encoder_decoder=False)
        assert cut == max((row for row in whole if len(row.ids) <= limit), key=lambda row: len(row.ids))


def test_a_last_answer_without_ids_is_nothing_to_predict(codec):
    segments = (Text("red"), Text("blue", loss=True), Text("red"), Text("", loss=True))
    with pytest.raises(BadSample, match="the last answer is empty"):
        encode_sample(Sample(segments), codec, 64, encoder_decoder=False)


def test_pad_equal_to_eos_keeps_one_eos(codec):
    codec.tokenizer.pad_token = codec.tokenizer.eos_token
    try:
        same = TextCodec(codec.tokenizer, 8)
        assert same.pad_id == same.eos_id
        row = encode_sample(SAMPLE, same, 64, encoder_decoder=False)
        assert [t for t in row.targets if t != IGNORE].count(same.eos_id) == 1
    finally:
        codec.tokenizer.pad_token = "<pad>"


def test_encoder_decoder(codec):
    row = encode_sample(SAMPLE, codec, 64, encoder_decoder=True)
    assert codec.decode(row.tokens) == "what colour is the circle?"
    assert row.answer == [codec.pad_id, *row.targets[:-1]] and row.targets[-1] == codec.eos_id


def test_boxes_are_location_tokens_in_prompt_and_target(codec):
    box = Boxes(((0.1, 0.1, 0.9, 0.9),))
    target = Boxes(((0.1, 0.1, 0.9, 0.9),), loss=True)
    row = encode_sample(Sample((Text("where is"), box, target)), codec, 64, encoder_decoder=False)
    ids = row.tokens[-5:-1]
    assert all(i >= codec.first_location for i in ids) and row.tokens[-9:-5] == ids
    assert [t for t in row.targets if t != IGNORE] == [*ids, codec.eos_id]


@pytest.mark.parametrize(
    "sample, limit, reason",
    [
        (Sample((Text("a prompt"),)), 64, "nothing to predict"),
        (Sample((Text("red"), Text("", loss=True))), 64, "nothing to predict"),
        (SAMPLE, 5, "max_length"),
    ],
)
def test_samples_that_cannot_teach(codec, sample, limit, reason):
    with pytest.raises(BadSample, match=reason):
        encode_sample(sample, codec, limit, encoder_decoder=False)


def test_head_samples_have_a_label_and_no_text_target(codec):
    row = encode_sample(Sample((Image(), Text("red")), label=2), codec, 64, encoder_decoder=False)
    assert row.label == 2 and row.count == 1 and set(row.targets) == {IGNORE}


def deep(levels: int) -> list:
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("name, record", [
    ("pair", {"text": "red", "label": float("inf")}), ("pair", {"text": deep(5000), "label": 0}),
    ("locate", {"name": "red", "boxes": [[0, 0, 10**400, 1]]}), ("caption", {"caption": "a \ud800 dog"}),
    ("vqa", {"question": "a \ud800 dog", "answer": "red"}), ("caption", {"caption": 5}), ("caption", {}),
])  # fmt: skip
def test_records_that_do_not_fit_are_masked(codec, name, record):
    with pytest.raises(BadSample, match="does not fit the task"):
        encode_record(record, TASK_TYPES[name]().sample, codec, 64, encoder_decoder=False, classes=2)


def test_no_error_of_a_template_ends_a_run(codec):
    def overflow(record):
        return Sample((Image(),), label=int(float("inf")))

    with pytest.raises(BadSample, match="OverflowError"):
        encode_record({}, overflow, codec, 64, encoder_decoder=False)


def test_masked_rows_have_no_target(codec):
    assert masked_sample(codec, False).count == masked_sample(codec, True).count == 0


def test_training_a_vocabulary_is_reproducible_and_survives_saving(codec, tmp_path):
    again = train_tokenizer(WORDS, 48, 8)
    assert again.hash() == codec.hash()
    codec.save(tmp_path)
    loaded = load_tokenizer(tmp_path, 8)
    assert loaded.hash() == codec.hash() and (loaded.eos_id, loaded.pad_id) == (codec.eos_id, codec.pad_id)
    assert load_tokenizer(tmp_path, 12).size == codec.size + 4


def test_a_trained_vocabulary_knows_its_texts_as_they_are_written():
    texts = ["10 m\u00b2, \u00bd of it", "two\nlines\there", "Cafe\u0301", "a\u00a0b", "\u4f60\uff0c\u597d\uff01"]
    codec = train_tokenizer(texts * 20, 100, 8)
    for text in texts:
        assert codec.decode(codec.encode(Text(text), first=True)) == text


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        load_tokenizer(tmp_path / "none", 8)


def test_a_tokenizer_that_is_not_whole(codec, tmp_path):
    """Transformers makes an empty one of a checkpoint without its vocabulary: texts without ids, or of unknown ones."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="text.tokenizer: .* holds no vocabulary; download its tokenizer.json"):
        load_tokenizer(tmp_path, 8)
    codec.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="text.tokenizer: .* cannot be loaded: .*Git LFS"):
        load_tokenizer(tmp_path, 8)


def test_ids_with_holes():
    """tokenizers gives the number of tokens to the next one, whatever has it already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def made(*ids):
        words = models.WordLevel(dict(zip(("<unk>", "</s>", "dog", "cat"), ids, strict=True)), unk_token="<unk>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>")
        add_locations(tokenizer, 4)
        return TextCodec(tokenizer, 4)

    assert (made(0, 1, 2, 3).size, made(0, 1, 2, 9).size) == (8, 10)
    with pytest.raises(ValueError, match=r"tokenizer: <loc_1> would have the id of 'cat' \(5\).*holes"):
        made(0, 1, 2, 5)


def byte_level_codec():
    """A vocabulary in the way of GPT-2 and OPT: bytes, the space kept with the word behind it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(WORDS, vocab_size=300, special_tokens=["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="</s>", pad_token="</s>")
    add_locations(tokenizer, 8)
    return TextCodec(tokenizer, 8)


def test_targets_begin_as_in_a_text_where_a_space_is_added_to_every_text():
    """LLaMA's normaliser, as in checkpoints whose tokenizer is of no class of its own."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(("<unk>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581b"))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    add_locations(tokenizer, 8)
    codec = TextCodec(tokenizer, 8)
    row = encode_sample(Sample((Text("a b"), Text("b a", loss=True))), codec, 64, encoder_decoder=False)
    assert row.ids[1:-1] == codec.tokenizer("a b b a", add_special_tokens=False)["input_ids"]


def test_byte_level_targets_start_with_their_space():
    codec = byte_level_codec()
    assert codec.space == " "
    row = encode_sample(SAMPLE, codec, 64, encoder_decoder=False)
    whole = codec.tokenizer.encode("what colour is the circle? red", add_special_tokens=False)
    assert row.tokens[1:-1] == whole


@pytest.fixture(params=["sentencepiece", "byte level"])
def either(request, codec):
    return codec if request.param == "sentencepiece" else byte_level_codec()


def test_control_tokens_spelt_in_the_data_are_text(either):
    for caption in ("a red </s> square <pad>", "<s>a</s>b", "red</s>"):
        sample = Sample((Image(), Text("</s> red <pad>"), Text(caption, loss=True)))
        row = encode_sample(sample, either, 128, encoder_decoder=False)
        control = {either.bos_id, either.eos_id, either.pad_id}
        assert row.tokens[0] == either.bos_id and row.tokens[-1] == either.eos_id
        assert not control & set(row.tokens[1:-1])
        targets = [t for t in row.targets if t != IGNORE]
        assert targets[-1] == either.eos_id and not control & set(targets[:-1]) and len(targets) > 1


def test_workers_encode_alike(either):
    """Without offsets, as a process does that keeps to one thread."""
    texts = ["red", "", " ", "what colour?", "a red </s> square <pad>", "<loc_0><loc_7> red <loc_3>", "r\u00e9d \u732b"]
    plain, worker = either.encoder(), either.encoder()
    worker.one_thread = True
    for first in (True, False):
        assert [plain.encode(Text(t), first) for t in texts] == [worker.encode(Text(t), first) for t in texts]
    for encoder in (plain, worker):
        with pytest.raises(TypeError, match="no text in Unicode"):
            encoder.encode(Text("half of a pair: \ud83d"), first=True)
        for no_text in (5, None, b"red"):
            with pytest.raises(TypeError, match="no text in Unicode"):
                encoder.encode(Text(no_text), first=True)


def test_location_tokens_are_one_id_each(either):
    wanted = [either.first_location + i for i in (0, 7, 3, 3)]
    assert either.encode(Text("<loc_0><loc_7><loc_3><loc_3>"), first=False) == wanted
    assert either.encode(Boxes(((0.05, 0.9, 0.4, 0.99),)), first=False)[:2] == wanted[:2]


def ids_of(codec, segments) -> list[int]:
    return encode_sample(Sample(tuple(segments), label=0), codec, 64, encoder_decoder=False).tokens


@pytest.mark.parametrize("prompt, typed", [
    ("what is in the region {box}?", "what is in the region <loc_0><loc_1><loc_5><loc_6>?"),
    ("what is in the region {box}?", " what is in the region  <loc_0> <loc_1> <loc_5> <loc_6> ?"),
    ("{box} is what?", "<loc_0><loc_1><loc_5><loc_6> is what?"),
    ("is it red", "is it red"),
])  # fmt: skip
def test_a_typed_prompt_has_the_ids_of_the_template(either, prompt, typed):
    asked = TASK_TYPES["classify"](prompt).question({"box": [0.01, 0.2, 0.7, 0.8]})
    assert ids_of(either, prompt_segments(typed)) == ids_of(either, asked)


def test_an_empty_prompt_has_no_segments():
    assert prompt_segments("  ") == ()
