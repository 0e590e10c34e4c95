"""Text: documents out of files, tokenizers, and the cache of tokens that training reads."""

__all__ = [
    "documents",
    "protocol",
    "token_cache",
    "tokenizers",
]
