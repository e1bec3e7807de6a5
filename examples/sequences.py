"""The language of a name: an approximately normalized sequence classifier against a pre-norm one.

    pip install '.[examples]'
    python examples/sequences.py    # under two minutes on 2 CPU cores

The data are names of countries, regions and languages from pycountry, in eight languages with Latin letters. Each name
appears in one language only, so the test set holds unseen names. Padding is masked.
"""

import gettext

import pycountry
import torch
import torch.nn.functional as F
from side_by_side import Split, Variant, compare, options, split
from torch import Tensor, nn

from antransformer.blocks import EncoderBlock
from antransformer.functional import normalize
from antransformer.nn import MLP, Attention, Embedding, Head

LANGUAGES = ("de", "fr", "ga", "hu", "it", "nl", "pl", "ro")
WIDTH, HEADS, LAYERS, LENGTH, NAMES = 64, 4, 2, 24, 3000
PADDING = 0
LRS = (3e-3, 1e-2, 3e-2, 1e-1)


class ApproximatelyNormalizedClassifier(nn.Module):
    """Encoder over letters with rotary positions; classifies the mean over letters."""

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
        x, mask = self.embedding(letters), letters != PADDING
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return self.head(normalize((x * mask.unsqueeze(-1)).sum(1)))


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
        padding = letters == PADDING
        x = self.blocks(self.embedding(letters) + self.positions.weight, src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding.unsqueeze(-1), 0).sum(1) / (~padding).sum(1, keepdim=True))


def names() -> list[tuple[str, int]]:
    """Return (name, index into ``LANGUAGES``) pairs; each name appears in one language."""
    kinds = {"iso3166-1": pycountry.countries, "iso3166-2": pycountry.subdivisions, "iso639-3": pycountry.languages}
    language_of = {}
    for domain, entries in kinds.items():
        translations = [gettext.translation(domain, pycountry.LOCALES_DIR, [language]) for language in LANGUAGES]
        for index, english in enumerate(sorted({entry.name for entry in entries})):
            language = index % len(LANGUAGES)
            name = translations[language].gettext(english)
            if name != english:  # otherwise there is no translation
                language_of[name] = language
    return list(language_of.items())


def data() -> tuple[Split, int]:
    """Return letter ids (names, length) with language ids, split, and the alphabet size."""
    pairs = names()
    alphabet = {
        letter: index for index, letter in enumerate(sorted({letter for name, _ in pairs for letter in name}), 1)
    }
    rows = [[alphabet[letter] for letter in name[:LENGTH]] for name, _ in pairs]
    ids = torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows])
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:NAMES]
    targets = torch.tensor([language for _, language in pairs])
    return split(ids[chosen], targets[chosen], parts=(1 / 6, 1 / 3)), len(alphabet) + 1


def main() -> None:
    """Compare both models and print the result."""
    arguments = options("language of names: approximately normalized against pre-norm", epochs=6)
    examples, letters = data()
    bounded = Variant("anTransformer", lambda: ApproximatelyNormalizedClassifier(letters), LRS, bounded=True)
    baseline = Variant("pre-norm", lambda: PreNormClassifier(letters), LRS, weight_decay=0.1, warmup=0.1)
    compare([bounded, baseline], examples, arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()
