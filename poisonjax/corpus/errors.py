"""The error of this package."""


class CorpusError(ValueError):
    """A source, a tokenizer or a token store can't be used; the message says what, where and the remedy."""
