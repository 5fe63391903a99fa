"""From text to a token store: sources, tokenizers, building and reading."""

from poisonjax.corpus.build import build, build_share
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.store import TokenSplit, TokenStore, exists
from poisonjax.corpus.tokenizer_files import load_tokenizer
from poisonjax.corpus.tokenizers import Tokenizer

__all__ = ["CorpusError", "TokenSplit", "TokenStore", "Tokenizer", "build", "build_share", "exists", "load_tokenizer"]
