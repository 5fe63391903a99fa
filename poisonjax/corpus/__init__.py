"""From text to a token store: sources, tokenizers, building and reading."""

from poisonjax.corpus.build import build, build_share, require_unchanged
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import Exclusions, read_exclusions
from poisonjax.corpus.sources import first_texts, open_source
from poisonjax.corpus.split import SPLITS, TokenSplit
from poisonjax.corpus.store import TokenStore, exists, open_store
from poisonjax.corpus.tokenizer_files import load_tokenizer
from poisonjax.corpus.tokenizers import Tokenizer

__all__ = [
    "SPLITS",
    "CorpusError",
    "Exclusions",
    "TokenSplit",
    "TokenStore",
    "Tokenizer",
    "build",
    "build_share",
    "exists",
    "first_texts",
    "load_tokenizer",
    "open_source",
    "open_store",
    "read_exclusions",
    "require_unchanged",
]
