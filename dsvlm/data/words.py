"""Words of a text that have the same ids alone as in the text, so that those met before need no tokenizer."""


def plain_words(text: str) -> list[str] | None:
    """The words of a plain text, each with the space before it; None when the text is none.

    Plain: printable ASCII without two spaces in a row or one at the end, and without what may begin an added token.
    """
    if not (text.isascii() and text.isprintable()) or "<" in text:
        return None
    words = text.replace(" ", "\n ").split("\n")
    return None if " " in words else words


def splits_at_spaces(backend) -> bool:
    """Whether a `tokenizers.Tokenizer` gives a plain text the ids of its words, one after the other.

    Metaspace replaces spaces and splits there; GPT-2's expression, which ByteLevel has, takes one space only as the
    first character of a piece. Models see one piece at a time; added tokens are looked for in the whole text.
    """
    from tokenizers import normalizers, pre_tokenizers

    cut, model, normalizer = backend.pre_tokenizer, backend.model, backend.normalizer
    splits = isinstance(cut, pre_tokenizers.Metaspace) and cut.split
    splits = splits or (isinstance(cut, pre_tokenizers.ByteLevel) and cut.use_regex)
    same = normalizer is None or isinstance(normalizer, (normalizers.NFC, normalizers.NFKC))  # ASCII stays what it is
    random = any(getattr(model, name, None) for name in ("dropout", "alpha", "nbest_size"))
    added = backend.get_added_tokens_decoder().values()
    seen = all(token.special or token.content.startswith("<") for token in added)  # special ones are text to us
    return splits and same and seen and not (random or backend.truncation or backend.padding)
