"""Which language is a name in? An approximately normalized sequence classifier against the same with pre-norm.

    pip install 'antransformer[examples]'
    python examples/sequences.py    # under two minutes on 2 CPU cores

The data are the names of countries, regions and languages that pycountry ships, in eight languages written in Latin
letters. Each name is taken in one language only, so that what is named in the test set was never seen before. Padding
is masked.
"""

import gettext

import pycountry
import torch
import torch.nn.functional as F
from side_by_side import Contender, Split, compare, options, split
from torch import Tensor, nn

from antransformer.blocks import EncoderBlock
from antransformer.functional import normalize
from antransformer.nn import MLP, Attention, Embedding, Head

LANGUAGES = ("de", "fr", "ga", "hu", "it", "nl", "pl", "ro")
WIDTH, HEADS, LAYERS, LENGTH, NAMES = 64, 4, 2, 24, 3000
PADDING = 0
LRS = (3e-3, 1e-2, 3e-2, 1e-1)


class ApproximatelyNormalizedClassifier(nn.Module):
    """Letters in, rotary positions inside, the mean over letters out."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding = Embedding(letters, WIDTH)
        self.blocks = nn.ModuleList(
            EncoderBlock(Attention(WIDTH, HEADS, rotary=1.0), MLP(WIDTH, gated=False, activation=F.gelu))
            for _ in range(LAYERS)
        )
        self.head = Head(WIDTH, len(LANGUAGES))

    def forward(self, letters: Tensor) -> Tensor:
        """Ids (B, T), padded on the right, to logits (B, languages)."""
        x, there = self.embedding(letters), letters != PADDING
        for block in self.blocks:
            x = block(x, there[:, None, None])
        return self.head(normalize((x * there.unsqueeze(-1)).sum(1)))


class PreNormClassifier(nn.Module):
    """Torch's encoder with LayerNorm before each sublayer and at the end, and learned positions."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(letters, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(LANGUAGES))

    def forward(self, letters: Tensor) -> Tensor:
        """Ids (B, T), padded on the right, to logits (B, languages)."""
        gone = letters == PADDING
        x = self.blocks(self.embedding(letters) + self.positions.weight, src_key_padding_mask=gone)
        return self.head(x.masked_fill(gone.unsqueeze(-1), 0).sum(1) / (~gone).sum(1, keepdim=True))


def names() -> list[tuple[str, int]]:
    """Names, each in one language, with the place of that language in ``LANGUAGES``."""
    kinds = {"iso3166-1": pycountry.countries, "iso3166-2": pycountry.subdivisions, "iso639-3": pycountry.languages}
    found = {}
    for domain, entries in kinds.items():
        turned = [gettext.translation(domain, pycountry.LOCALES_DIR, [language]) for language in LANGUAGES]
        for place, english in enumerate(sorted({entry.name for entry in entries})):
            language = place % len(LANGUAGES)
            name = turned[language].gettext(english)
            if name != english:  # else nobody has translated it
                found[name] = language
    return list(found.items())


def data() -> tuple[Split, int]:
    """Ids of letters (names, length), languages, and how many letters there are."""
    known = names()
    alphabet = {
        letter: place for place, letter in enumerate(sorted({letter for name, _ in known for letter in name}), 1)
    }
    rows = [[alphabet[letter] for letter in name[:LENGTH]] for name, _ in known]
    ids = torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows])
    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:NAMES]
    targets = torch.tensor([language for _, language in known])
    return split(ids[chosen], targets[chosen], parts=(1 / 6, 1 / 3)), len(alphabet) + 1


def main() -> None:
    """Compare."""
    given = options("language of names: approximately normalized against pre-norm", epochs=6)
    found, letters = data()
    ours = Contender("anTransformer", lambda: ApproximatelyNormalizedClassifier(letters), LRS, bounded=True)
    theirs = Contender("pre-norm", lambda: PreNormClassifier(letters), LRS, weight_decay=0.1, warmup=0.1)
    compare([ours, theirs], found, given.epochs, given.seeds)


if __name__ == "__main__":
    main()
