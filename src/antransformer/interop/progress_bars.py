"""Progress bars of transformers, which this package turns off while it loads or saves a model."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """While entered, transformers shows no progress bars."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
