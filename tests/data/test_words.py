"""Ids put together from those of words are the tokenizer's own, and no tokenizer that joins words is taken for one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dsvlm.data.tokenizer import Encoder, add_locations
from dsvlm.data.words import plain_words, splits_at_spaces

TEXTS = ["what colour is the circle?", "it's red, isn't it?", "12 red squares_here", "a  b", "don't go"] * 20


def bpe(cut, normalizer=None, **options) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer, backend.normalizer = cut, normalizer
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    for name, value in options.items():
        setattr(backend.model, name, value)
    return backend


def unigram(cut) -> Tokenizer:
    scores = {"<unk>": 0.0, "\u2581": -2.0, "_": -2.0, "\u2581red": -3.0, "re": -4.0, "d": -4.0, "a": -3.0, "'": -5.0}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    backend.pre_tokenizer = cut
    return backend


SEPARABLE = {
    "as trained here": unigram(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "space before the first word only": unigram(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "space before none": unigram(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "another sign for spaces": unigram(pre_tokenizers.Metaspace(replacement="_")),
    "GPT-2, OPT": bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "a space in front": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normalised first": bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
}
JOINING = {
    "LLaMA": bpe(None, normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])),
    "spaces kept": unigram(pre_tokenizers.Metaspace(split=False)),
    "no expression": bpe(pre_tokenizers.ByteLevel(use_regex=False)),
    "at random": bpe(pre_tokenizers.ByteLevel(), dropout=0.5),
    "another text": bpe(pre_tokenizers.ByteLevel(), normalizers.Replace("d a", "x")),
    "several": bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
}


def encoder(backend: Tokenizer) -> Encoder:
    add_locations(backend, 8)
    return Encoder(backend, 8, bos_id=1, eos_id=2, pad_id=1, control=set(), space=" ")


@pytest.fixture(scope="module", params=SEPARABLE)
def separable(request):
    return encoder(SEPARABLE[request.param])


WORDS = ("red", "a", "'s", "don't", "12", "?!", "_", "\u2581", "<loc_3>", "<unk>")
PIECES = st.sampled_from([*WORDS, " ", " ", "  ", "\n"])


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=12))
def test_ids_are_those_of_the_whole_text(separable, text):
    for _ in range(2):  # words unknown, then known
        assert separable.ids_of(text) == separable.backend.encode(text, add_special_tokens=False).ids, text


def test_words_are_met_again(separable):
    assert plain_words("a red  a") is None and plain_words(" a red") == ["", " a", " red"]
    separable.ids_of("a new red word")
    assert {"a", " new", " red", " word"} <= set(separable.words)


@pytest.mark.parametrize("name", JOINING)
def test_tokenizers_that_look_past_spaces_are_asked_for_whole_texts(name):
    assert encoder(JOINING[name]).words is None


def test_added_words_truncation_and_padding_belong_to_the_whole_text():
    for change in (
        lambda backend: backend.add_tokens([AddedToken("red square", special=False)]),
        lambda backend: backend.enable_truncation(4),
        lambda backend: backend.enable_padding(),
    ):
        backend = unigram(pre_tokenizers.Metaspace())
        assert splits_at_spaces(backend)
        change(backend)
        assert not splits_at_spaces(backend)


def test_kept_words_are_bounded(separable, monkeypatch):
    monkeypatch.setattr("dsvlm.data.tokenizer.KNOWN_WORDS", len(separable.words) + 1)
    before = len(separable.words)
    separable.ids_of("these are words that were never met here " + 40 * "x")
    assert len(separable.words) == before + 1
