"""The pad token of exported tokenizers, which training does not have."""

import json
from typing import Any

import tokenizers

PAD_TOKEN = "<|antransformer_pad|>"
UNUSED_BYTE = "ÿ"  # 0xFF in the alphabet of byte-level encodings


def with_pad_token(library: tokenizers.Tokenizer, rows: int) -> tokenizers.Tokenizer:
    """Return a copy of a tokenizer with ``PAD_TOKEN``, if an id is free that already has a row in the embedding.

    The id is the first one that the tokenizer does not have, if the model has a row for it. Otherwise, in a byte-level
    encoding, it is the id of byte 0xFF: text in UTF-8 never contains this byte, so neither encoded text nor the
    function of the model changes. A new row would change it, since its logit is part of the softmax.

    Args:
        library: tokenizer; it is copied unchanged if it has ``PAD_TOKEN`` already.
        rows: vocabulary size of the model.
    """
    if library.token_to_id(PAD_TOKEN) is not None:
        return tokenizers.Tokenizer.from_str(library.to_str())
    content = json.loads(library.to_str())
    free = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if free >= rows:
        model = content["model"]
        vocabulary, byte_level = model["vocab"], "ByteLevel" in json.dumps(content["pre_tokenizer"])
        merged = any(UNUSED_BYTE in "".join(merge) for merge in model.get("merges", ()))
        if not byte_level or merged or UNUSED_BYTE not in vocabulary:
            return tokenizers.Tokenizer.from_str(library.to_str())
        free = vocabulary[PAD_TOKEN] = vocabulary.pop(UNUSED_BYTE)
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    content["added_tokens"].append({"id": free, "content": PAD_TOKEN, "special": True, **flags})
    return from_content(content)


def without_pad_token(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer with the effect of ``with_pad_token`` undone; any other tokenizer as it is.

    The pad token stays if other tokens were added after it, since they would get other ids.
    """
    number = library.token_to_id(PAD_TOKEN)
    if number is None:
        return library
    content = json.loads(library.to_str())
    if PAD_TOKEN not in content["model"]["vocab"] and number < max(token["id"] for token in content["added_tokens"]):
        return library
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != PAD_TOKEN]
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict) and PAD_TOKEN in vocabulary:
        vocabulary[UNUSED_BYTE] = vocabulary.pop(PAD_TOKEN)
    return from_content(content)


def from_content(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a parsed tokenizer.json."""
    return tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
