"""Parts of messages."""

import pytest

from antransformer.wording import counted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "shard"), "1 shard"),
        ((0, "shard"), "0 shards"),
        ((2000, "shard"), "2,000 shards"),
        ((1, "busy process", "busy processes"), "1 busy process"),
        ((2, "busy process", "busy processes"), "2 busy processes"),
    ],
)
def test_a_noun_agrees_with_its_number(arguments, text):
    assert counted(*arguments) == text
