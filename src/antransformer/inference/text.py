"""Continue a text with a trained model, one piece at a time."""

import logging
from collections.abc import Iterator
from typing import Any

from antransformer.data import Tokenizer
from antransformer.errors import ConfigError
from antransformer.inference.folding import folded_where_possible
from antransformer.inference.sampling import generate, stream_text
from antransformer.models import Decoder

LOG = logging.getLogger(__name__)


def continue_text(model: Decoder, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces, until the model ends the document or ``max_new_tokens``.

    Args:
        model: in evaluation mode; it is folded first where that is possible.
        tokenizer: the model's.
        prompt: start of a document; empty starts a new one.
        sampling: options of ``generate``.

    Raises:
        ConfigError: the prompt is not UTF-8 text, or a sampling option is out of range.
        CheckpointError: the logits are not finite.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not UTF-8 text") from error
    model = folded_where_possible(model)
    prompt_ids = tokenizer.encode(prompt)
    # In training an end-of-text token precedes every document, so it marks the start of this one.
    ids = [tokenizer.end_of_text, *prompt_ids]
    if len(ids) > model.config.context:
        LOG.warning(
            f"the prompt has {len(ids):,} tokens but the context is {model.config.context:,}: only the last are used"
        )
    steps = generate(model, [ids], vocab_size=tokenizer.vocab_size, stop=[tokenizer.end_of_text], **sampling)
    tokens = (token for step in steps for token in step if token is not None)
    return stream_text(tokenizer, tokens, prompt_ids)
