"""Parts of messages."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 shard, 2,000 shards; ``plural`` for nouns that do not only add an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
