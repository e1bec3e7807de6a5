"""Tokenizers in GGUF: a byte-level BPE with a pre-tokenizer that llama.cpp knows."""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError

LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
IGNORES_MERGES = {"gpt-2": False, "llama-bpe": True}  # how llama.cpp encodes a pre-token that is in the vocabulary
MATCHING_FLAGS = ("lstrip", "rstrip", "single_word")  # of added tokens; llama.cpp does not have them
ADVICE = "use --format exaone4 (anGPT) or qwen3 (GPT+), whose folder has the tokenizer.json"

# Token types of the format
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class GGUFTokenizer:
    """Vocabulary as llama.cpp reads it.

    Attributes:
        pre: name of the pre-tokenizer.
        tokens: text of every id of the model, in the byte-level alphabet.
        types: type of every id.
        merges: merges in order, as "left right".
        normalizes: whether the tokenizer normalizes to NFC, which llama.cpp does not.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    normalizes: bool


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> GGUFTokenizer:
    """Convert a tokenizer for a model with ``vocab_size`` ids.

    Raises:
        CheckpointError: llama.cpp would encode texts in another way. ``where`` names the checkpoint.
    """
    content = json.loads(tokenizer.to_json())
    model, normalizer = content["model"], content.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{where}: its tokenizer is not a byte-level BPE: {ADVICE}")
    if normalizer and normalizer["type"] != "NFC":
        raise CheckpointError(
            f"{where}: llama.cpp cannot apply the tokenizer's normalizer {normalizer['type']}: {ADVICE}"
        )
    pre = pre_tokenizer(content["pre_tokenizer"])
    # A byte tokenizer has no merges, so a split changes no ids.
    pre = pre or ("gpt-2" if not model["merges"] and is_byte_level(content["pre_tokenizer"]) else None)
    if pre is None:
        raise CheckpointError(f"{where}: llama.cpp does not know the pre-tokenizer of its tokenizer: {ADVICE}")
    if bool(model.get("ignore_merges")) != IGNORES_MERGES[pre] and not merges_make_every_token(content):
        raise CheckpointError(f"{where}: the merges of its tokenizer do not make every token of it: {ADVICE}")
    added = {token["id"]: token for token in content["added_tokens"]}
    for token in added.values():
        # No text is encoded to a special token.
        if not token["special"] and any(token[flag] for flag in MATCHING_FLAGS):
            raise CheckpointError(
                f"{where}: llama.cpp would match the added token {token['content']!r} elsewhere: {ADVICE}"
            )
    names = {number: text for text, number in tokenizer.vocabulary().items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [token_type(number, names, added) for number in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # llama.cpp requires a merge. This one never applies, since no text has a character of these tokens.
    merges = merges or [f"{tokens[tokenizer.end_of_text]} {tokens[tokenizer.end_of_text]}"]
    return GGUFTokenizer(pre, tokens, types, merges, bool(normalizer))


def token_type(number: int, names: dict[int, str], added: dict[int, Any]) -> int:
    """Return the type of an id. Added tokens that are not special are found before the text is split."""
    if number not in names:
        return UNUSED
    if number not in added:
        return NORMAL
    return CONTROL if added[number]["special"] else USER_DEFINED


def is_byte_level(content: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer maps bytes to characters and adds no space."""
    return bool(content) and content["type"] == "ByteLevel" and not content["add_prefix_space"]  # type: ignore[index]


def pre_tokenizer(content: dict[str, Any] | None) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer, or None if it has none."""
    if content and content["type"] == "Sequence" and len(content["pretokenizers"]) == 2:
        split, last = content["pretokenizers"]
        pattern = split.get("pattern", {}).get("Regex")
        isolated = split.get("behavior") == "Isolated" and not split.get("invert")
        if pattern == LLAMA3_PATTERN and isolated and is_byte_level(last) and not last["use_regex"]:
            return "llama-bpe"
    return "gpt-2" if content and is_byte_level(content) and content["use_regex"] else None


def merges_make_every_token(content: dict[str, Any]) -> bool:
    """Whether merging the characters of each token gives this token, except for added tokens."""
    model, added = content["model"], {token["content"] for token in content["added_tokens"]}
    alone = tokenizers.Tokenizer.from_str(json.dumps({"model": {**model, "ignore_merges": False}})).model
    return all(len(alone.tokenize(token)) == 1 for token in model["vocab"] if token not in added)
