"""Text: documents out of files, tokenizers, and the cache of tokens that training reads."""

__all__ = [
    "chat_template",
    "conversations",
    "documents",
    "packing",
    "pieces",
    "protocol",
    "token_cache",
    "tokenizers",
    "windows",
]
