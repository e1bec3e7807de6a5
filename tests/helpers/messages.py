"""What a message must carry: names, paths and numbers, whatever its wording."""

import re
from pathlib import Path


def mentions(text, *parts):
    """Whether a text holds each of these options, keys, paths and numbers as a word of its own.

    Numbers are not looked for inside paths, and 10,000 is the number 10000.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", str(text))
    without_paths = re.sub(r"(?<!\w)/\S+", "", text)
    for part in parts:
        place = text if isinstance(part, str | Path) else without_paths
        word = re.escape(re.sub(r"(?<=\d),(?=\d{3})", "", str(part)))
        if not re.search(rf"(?<!\w)(?<!\w-)(?<!\d\.){word}(?![\w+]|-\w|\.\d)", place):
            return False
    return True
