"""The text side of a run: one Hugging Face tokenizer, loaded or trained, with the run's location tokens."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsvlm.data.boxes import encode_box, location_tokens
from dsvlm.data.sample import Boxes, Text
from dsvlm.data.words import plain_words, splits_at_spaces

LOCATIONS = re.compile(r"((?:<loc_\d+>\s*)+)")  # a run of location tokens
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # files' names
KNOWN, KNOWN_WORDS = 4096, 2**15  # texts and words whose ids are kept: the first to come
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0..3 of a trained vocabulary


class Encoder:
    """Text and location tokens to ids: the half of a codec that processes which only read need, light to load.

    backend: a `tokenizers.Tokenizer` that knows the location tokens of `bins` bins; control: ids that no text may have;
    space: what stands before a segment that is not its row's first.
    """

    def __init__(self, backend, bins: int, *, bos_id: int, eos_id: int, pad_id: int, control: set[int], space: str):
        self.backend, self.bins, self.space = backend, bins, space
        self.bos_id, self.eos_id, self.pad_id, self.control = bos_id, eos_id, pad_id, control
        self.known: dict[str, list[int]] = {}  # ids of texts: prompts and short answers come again and again
        self.words: dict[str, list[int]] | None = {} if splits_at_spaces(backend) else None  # and of words
        self.one_thread = False  # whether this process has told tokenizers to start none: batches would

    def encode(self, segment: Text | Boxes, first: bool) -> list[int]:
        """Ids of one segment (read-only), without special tokens; `first`: nothing stands before it in its row."""
        if isinstance(segment, Boxes):
            text = "".join(encode_box(box, self.bins) for box in segment.boxes)
        else:
            glued = first or LOCATIONS.match(segment.text)  # as in a Boxes segment
            text = segment.text if glued else self.space + segment.text
        # A "</s>" that stands in the data is text, not the end of the sequence. Unigram vocabularies hold it as a piece
        # like any other, and find it all the same: it is left out.
        ids = self.known.get(text)
        if ids is None:
            ids = self.ids_of(text)
            if not self.control.isdisjoint(ids):
                ids = [i for i in ids if i not in self.control]
            if len(self.known) < KNOWN and len(text) <= 100:
                self.known[text] = ids
        return ids

    def ids_of(self, text: str) -> list[int]:
        """Ids as the backend gives them: from those of known words where they are the same, which is much faster."""
        words = plain_words(text) if self.words is not None and isinstance(text, str) else None
        if words is None:
            return self.asked(text)
        ids = []
        for word in words:
            if (found := self.words.get(word)) is None:
                found = self.asked(word)
                if len(self.words) < KNOWN_WORDS and len(word) <= 32:
                    self.words[word] = found
            ids += found
        return ids

    def asked(self, text: str) -> list[int]:
        """Ids from the backend itself; TypeError, in the same words in every process, for what is no text."""
        self.backend.encode_special_tokens = True
        try:
            if self.one_thread:  # without offsets, which nobody wants: faster by a quarter, but only batches can
                return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise TypeError(f"{text!r:.80} is no text in Unicode") from None


class TextCodec(Encoder):
    """Text and location tokens to ids and back.

    tokenizer: a Hugging Face fast tokenizer that knows the location tokens of `bins` bins.
    """

    def __init__(self, tokenizer, bins: int):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no end-of-sequence token, so no answer could end; set eos_token in it")
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        control = {bos, eos, pad} - {tokenizer.unk_token_id}
        # Byte-level vocabularies keep the space with the word that follows it; SentencePiece adds it by itself, and
        # LLaMA's form of it another one to any that is there.
        alone, spaced, pair = map(tokenizer.tokenize, ("a", " a", "a a"))
        self.prepends = alone != spaced and alone + alone == pair
        space = " " if alone != spaced and not self.prepends else ""
        backend = tokenizer.backend_tokenizer
        super().__init__(backend, bins, bos_id=bos, eos_id=eos, pad_id=pad, control=control, space=space)
        vocab = tokenizer.get_vocab()
        self.size = 1 + max(vocab.values())  # more than there are tokens where ids leave holes
        self.first_location = vocab[location_tokens(bins)[0]]
        # tokenizers counts tokens for the next id: where ids leave holes, that may be another token's
        places = {vocab[token]: token for token in location_tokens(bins)}
        if twice := next((token for token, i in vocab.items() if places.get(i, token) != token), None):
            raise ValueError(
                f"tokenizer: {places[vocab[twice]]} would have the id of {twice!r} ({vocab[twice]}), for the ids of "
                "its vocabulary leave holes; number them without"
            )

    def encoder(self) -> Encoder:
        """The half that turns text into ids."""
        ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id, "control": self.control}
        return Encoder(self.backend, self.bins, **ids, space=self.space)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens dropped, location tokens kept."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def hash(self) -> str:
        """sha256 of the tokenizer's whole definition: part of a run's identity."""
        form = " prepends" * self.prepends  # earlier versions put a space of their own before segments there, too
        return hashlib.sha256((self.tokenizer.backend_tokenizer.to_str() + form).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)


def prompt_segments(text: str) -> tuple[Text, ...]:
    """A typed prompt as a template's segments, so that it has the ids of training: location tokens stand apart.

    Spaces around and within a run of location tokens, and at the prompt's ends, are dropped.
    """
    parts = [part.strip() for part in LOCATIONS.split(text)]
    return tuple(Text("".join(part.split()) if LOCATIONS.match(part) else part) for part in parts if part)


def spoken_segments(prompt: str | Sequence[str]) -> tuple[Text, ...]:
    """What was said up to an answer: a question, or questions and answers in turn, from a question to a question.

    Answers carry `loss`, as in training: an end-of-sequence token stands behind each.
    """
    said = [prompt] if isinstance(prompt, str) else [*prompt]
    if len(said) % 2 == 0 or not all(text.strip() for text in said[1:]):
        raise ValueError(f"prompt: {len(said)} texts; give a question, or questions and answers in turn that end with "
                         "a question, none of them empty")  # fmt: skip
    return tuple(
        segment._replace(loss=place % 2 == 1) for place, text in enumerate(said) for segment in prompt_segments(text)
    )


def load_tokenizer(directory: str | Path, bins: int) -> TextCodec:
    """Reads a local Hugging Face tokenizer and adds the location tokens it lacks."""
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise ValueError(f"text.tokenizer: {directory} is not a directory; give a local tokenizer, or 'train'")
    try:  # custom code would be asked about at the terminal
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library knows no other
        raise ValueError(
            f"text.tokenizer: {directory} cannot be loaded: {' '.join(str(error).split()):.300}; download it whole "
            "(files of Git LFS may be pointers), with its tokenizer.json"
        ) from error
    # Where the vocabulary is not, Transformers makes an empty one: texts would have no ids, or all the same.
    names = {*tokenizer.vocab_files_names.values(), *VOCABULARIES}
    if not any((Path(directory) / name).is_file() for name in names):
        raise ValueError(f"text.tokenizer: {directory} holds no vocabulary; download its tokenizer.json, too")
    if not tokenizer.is_fast:
        raise ValueError(f"text.tokenizer: {directory} has no fast tokenizer (tokenizer.json); convert it first")
    add_locations(tokenizer, bins)
    return TextCodec(tokenizer, bins)


def train_tokenizer(texts: Iterable[str], vocab_size: int, bins: int) -> TextCodec:
    """Trains a SentencePiece unigram vocabulary on texts, in their order; the same texts give the same vocabulary."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram", vocab_size=vocab_size,
        hard_vocab_limit=False, character_coverage=1.0, num_threads=1, minloglevel=2,
        normalization_rule_name="identity",  # the backend below normalises nothing: what is read is what is learnt
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<s>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    pad, bos, eos, unk = SPECIALS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    add_locations(tokenizer, bins)
    return TextCodec(tokenizer, bins)


def add_locations(tokenizer, bins: int) -> None:
    from tokenizers import AddedToken

    # Not special: they are words of an answer, and decoding must keep them.
    tokens = [AddedToken(token, normalized=False, special=False) for token in location_tokens(bins)]
    tokenizer.add_tokens(tokens)


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory holds a tokenizer, in any of Hugging Face's formats."""
    return any((Path(directory) / name).is_file() for name in VOCABULARIES)


def tokenizer_has_locations(directory: str | Path, bins: int) -> bool:
    """Whether a tokenizer has the location tokens of `bins` bins of its own; added tokens are in one of these files."""
    paths = [Path(directory) / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")]
    last = f'"{location_tokens(bins)[-1]}"'
    return any(last in path.read_text(encoding="utf-8") for path in paths if path.is_file())
