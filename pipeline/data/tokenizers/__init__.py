"""Text to token ids and back: bytes, characters, ranks of tiktoken, and tokenizers of the Hugging Face library.

Images with captions have a tokenizer of text and one of images.
"""

# ruff: noqa: F401  these imports are the package's interface

from pipeline.data.tokenizers.characters import ByteTokenizer, Text8Tokenizer
from pipeline.data.tokenizers.fast import TOKENIZER_FILE, FastTokenizer, train_bpe
from pipeline.data.tokenizers.interface import END_OF_TEXT, INFO_FILE, Tokenizer
from pipeline.data.tokenizers.load import IMAGES_AT_ONCE, load_tokenizer, saved_tokenizer
from pipeline.data.tokenizers.pairs import PairTokenizer
from pipeline.data.tokenizers.ranks import PATTERN, RANK_FILE, BPETokenizer
