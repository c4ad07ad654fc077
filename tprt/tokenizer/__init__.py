"""Text to token ids and back, over a sentencepiece model file; the chat formats.

Knows no model, no rank and no tensor.
"""

from tprt.tokenizer.chat import render_chat
from tprt.tokenizer.detokenizer import Detokenizer
from tprt.tokenizer.sentencepiece_model import END_OF_TEXT, MAX_MODEL_BYTES, NAMED_SPECIALS
from tprt.tokenizer.tokenizer import (
    MEGATRON_VOCAB_MULTIPLE,
    BosPolicy,
    Tokenizer,
    check_vocab,
    eos_warnings,
)

__all__ = [
    "END_OF_TEXT",
    "MAX_MODEL_BYTES",
    "MEGATRON_VOCAB_MULTIPLE",
    "NAMED_SPECIALS",
    "BosPolicy",
    "Detokenizer",
    "Tokenizer",
    "check_vocab",
    "eos_warnings",
    "render_chat",
]
