"""Generation: sampling, cache, prompts of different lengths, and streamed text."""

import random
import re

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from antransformer.data import Tokenizer, byte_tokenizer
from antransformer.errors import CheckpointError, ConfigError
from antransformer.inference import generate
from antransformer.inference.sampling import sample, stream_text
from antransformer.models import Cache, ModelConfig, build
from antransformer.models.registry import BUILT_IN

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(params=BUILT_IN)
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(
        architecture=request.param, vocab_size=50, width=64, layers=2, context=16, head_dim=32, rotary_fraction=1.0
    )
    return build(config).double().eval()


def continued(model, prompts, **options):
    steps = list(generate(model, prompts, **options))
    return [[step[row] for step in steps] for row in range(len(prompts))]


def test_greedy_is_the_argmax_also_beyond_the_context(model):
    [tokens] = continued(model, [[1, 2, 3]], max_new_tokens=30, temperature=0)
    sequence = [1, 2, 3, *tokens]
    for position in (3, 10, 16, 17, 32):
        visible = torch.tensor([sequence[max(0, position - 16) : position]])
        assert sequence[position] == model(visible)[0, -1].argmax().item()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_cache_changes_nothing(model, temperature):
    options = {"max_new_tokens": 25, "temperature": temperature}
    assert continued(model, PROMPTS, **options) == continued(model, PROMPTS, use_cache=False, **options)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_prompts_of_different_lengths_are_independent(model, temperature):
    options = {"max_new_tokens": 25, "temperature": temperature}
    batched = continued(model, PROMPTS, seed=7, **options)
    assert batched[0] == continued(model, PROMPTS[:1], seed=7, **options)[0]
    for number in (1, 2):
        prompts = [PROMPTS[number] if other == number else [12, 13] for other in range(number + 1)]
        assert batched[number] == continued(model, prompts, seed=7, **options)[number]
    assert len({tuple(tokens) for tokens in batched}) == 3


def test_prompts_and_consecutive_seeds_give_different_samples(model):
    prompts, options = [[1, 2, 3]] * 3, {"max_new_tokens": 12, "temperature": 1.0}
    samples = [tokens for seed in range(3) for tokens in continued(model, prompts, seed=seed, **options)]
    assert len({tuple(tokens) for tokens in samples}) == 9
    assert samples[:3] == continued(model, prompts, **options)


def test_the_seed_of_the_second_prompt_is_the_same_in_every_process(model):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    second = continued(model, [[4], [1, 2, 3]], seed=5, **options)[1]
    assert second == continued(model, [[1, 2, 3]], seed=7124615275160947, **options)[0]


@torch.no_grad()
def test_logits_with_a_cache_are_equal_for_chunks_of_any_size(model):
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    cache, parts = Cache(model, 2), []
    for chunk in tokens.split([5, 1, 4, 1, 5], dim=1):
        parts.append(model.logits(model.hidden(chunk, cache)))
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(parts, dim=1), logits)
    with pytest.raises(ValueError, match=r"\b17\b") as error:
        model.hidden(tokens[:, :1], cache)
    assert re.search(r"\b16\b", str(error.value))


def test_generation_under_autocast_from_weights_in_float32(model):
    prompts = [[1, 2, 3], [4, 5, 6]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = list(generate(model.float(), prompts, max_new_tokens=2))
    assert len(steps) == 2 and all(len(tokens) == 2 for tokens in steps)


def test_a_sequence_ends_before_its_stop_token_and_the_others_continue(model):
    plain = continued(model, PROMPTS, max_new_tokens=20, temperature=1.0)
    stop = plain[0][5]
    stopped = continued(model, PROMPTS, max_new_tokens=20, temperature=1.0, stop=[stop])
    for before, after in zip(plain, stopped, strict=True):
        end = before.index(stop) if stop in before else len(after)
        assert after == before[:end] + [None] * (len(after) - end)
    assert None in stopped[0] or len(stopped[0]) < 20


def test_ids_outside_the_tokenizer_are_never_sampled(model):
    [tokens] = continued(model, [[1]], max_new_tokens=200, temperature=5.0, vocab_size=7)
    assert max(tokens) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 1.5),
        ("seed", -1),
        ("vocab_size", 0),
        ("vocab_size", -5),
        ("prompts", [[1, 50]]),
        ("prompts", [[-1]]),
    ],
)
def test_options_out_of_range_are_refused_at_the_call(model, name, value):
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as error:
        generate(model, **{"prompts": [[1]], "max_new_tokens": 3, name: value})
    assert str(value[-1][-1] if name == "prompts" else value) in str(error.value)


@pytest.mark.parametrize(
    "prompts",
    [[], [[1], []], [1, 2], torch.tensor([1, 2]), np.array([1, 2]), torch.zeros(1, 0), torch.ones(1, 2), ["a"]],
)
def test_a_missing_or_empty_prompt_or_one_without_ids_is_refused_at_the_call(model, prompts):
    with pytest.raises(ConfigError, match=r"(?i)\bprompts?\b"):
        generate(model, prompts, max_new_tokens=3)


@pytest.mark.parametrize("convert", [torch.tensor, np.array, lambda rows: [torch.tensor(row) for row in rows]])
def test_prompts_may_be_tensors_and_arrays(model, convert):
    rows, options = [[1, 2, 3], [4, 5, 6]], {"max_new_tokens": 3, "temperature": 0}
    assert continued(model, convert(rows), **options) == continued(model, rows, **options)


@pytest.mark.parametrize("convert", [torch.tensor, np.array])
def test_stop_ids_may_be_a_tensor_or_an_array(model, convert):
    first = continued(model, [[1, 2]], max_new_tokens=1, temperature=0)[0][0]
    assert continued(model, [[1, 2]], max_new_tokens=3, temperature=0, stop=convert([first])) == [[]]


def test_stop_tokens_that_are_no_ids_are_refused(model):
    with pytest.raises(TypeError):
        generate(model, [[1, 2]], max_new_tokens=3, stop="end")


def test_broken_weights_raise(model):
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="logits"):
        continued(model, [[1]], max_new_tokens=1)


def test_sampling_follows_the_distribution_with_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]  # ids 1, 3, 0, 2 by likelihood
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **options}
        drawn = sample(logits.expand(4000, 4), generators=[generator] * 4000, **settings)
        return [(drawn == token).double().mean().item() for token in (1, 3, 0, 2)]

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(top_p=0.01) == [1, 0, 0, 0]
    # Of two tokens the first has 0.625.
    assert frequencies(top_k=2, top_p=0.6) == [1, 0, 0, 0]
    for temperature in (1e-35, 1e-40, 1e-50):
        assert frequencies(temperature=temperature) == [1, 0, 0, 0]
    squared = [0.25, 0.09, 0.0225, 0.0025]
    assert frequencies(temperature=0.5) == pytest.approx([value / sum(squared) for value in squared], abs=0.03)


def test_text_streams_in_complete_characters():
    tokenizer = byte_tokenizer()
    text = "naïve 日本 🎉!"
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text and "🎉" in pieces and len(pieces) == len(text)
    assert "".join(stream_text(tokenizer, [*b"ab", 0xF0, 0x9F])) == "ab\ufffd"


@pytest.mark.parametrize("prompt", ["abc é", "🎉", "日本", "a"])
def test_a_stream_after_a_prompt_begins_with_the_first_new_character(prompt):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(prompt)
    for text in ("x", "é日🎉", " y"):
        assert "".join(stream_text(tokenizer, tokenizer.encode(text), prompt=ids)) == text


def test_a_stream_of_invalid_bytes_is_their_text():
    tokenizer, generator = byte_tokenizer(), random.Random(0)
    # Often bytes of characters of two to four bytes, and of none.
    alphabet = [0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x8E, 0x89, 0xC3, 0xA9, 0x61, 0x20, 0xFF]
    for _ in range(300):
        ids = generator.choices(alphabet, k=generator.randint(1, 40))
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids), ids
    ids = [0xE4] * 9 + [0xB8, 0xAD, 0x61]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture
def fallback_tokenizer():
    """Tokenizer whose first 256 ids are bytes, with the decoder of Llama."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["<unk>", "</s>", "\u2581", "\u2581a", "a", "\ufffd"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    space = decoders.Replace("\u2581", " ")
    library.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["</s>"])
    return Tokenizer(library, "fallback")


def test_a_stream_of_byte_pieces_is_their_text(fallback_tokenizer):
    generator, decode = random.Random(0), fallback_tokenizer.decode
    characters = [list(text.encode()) for text in ("€", "é", "🎉", "\ufffd", " ", "日本語a")]
    mixed = [*characters, *([number] for number in range(256, 262)), [0xFF], [0xE2]]  # the last two are invalid
    after_prompt = 0
    for number in range(600):
        alphabet = mixed if number % 2 else characters
        ids = [token for part in generator.choices(alphabet, k=generator.randint(1, 20)) for token in part]
        assert "".join(stream_text(fallback_tokenizer, ids)) == decode(ids), ids
        prompt, rest = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        if decode(ids).startswith(decode(prompt)):  # otherwise the prompt ends within a character
            after_prompt += 1
            assert decode(prompt) + "".join(stream_text(fallback_tokenizer, rest, prompt)) == decode(ids), ids
    assert after_prompt > 200
    assert list(stream_text(fallback_tokenizer, [*"a€".encode(), 260, 260])) == ["a€a", "a"]


def test_an_invalid_byte_after_a_prompt_of_byte_pieces_leaves_the_prompt(fallback_tokenizer):
    prompt = list("日本語".encode())
    assert "".join(stream_text(fallback_tokenizer, [0xFF, 260], prompt)) == "\ufffda"


@pytest.mark.parametrize("ids", [[0xE2, 0x82, 0xAC] * 1000, [0xFF] * 3000, [260] * 3000, [261] * 3000])
def test_streaming_takes_time_linear_in_the_length(fallback_tokenizer, monkeypatch, ids):
    decoded, decode = [], fallback_tokenizer.decode
    monkeypatch.setattr(fallback_tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert "".join(stream_text(fallback_tokenizer, ids)) == decode(ids)
    assert sum(decoded) < 60 * len(ids)


@pytest.mark.parametrize(
    ("mark", "split", "decoder"),
    [("\u2581", pre_tokenizers.Metaspace(), decoders.Metaspace()), ("", pre_tokenizers.WhitespaceSplit(), None)],
)
def test_spaces_between_tokens_are_streamed(mark, split, decoder):
    vocabulary = {mark + word: number for number, word in enumerate(["Once", "upon", "a", "time", "</s>"])}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=mark + "a"))
    library.pre_tokenizer = split
    if decoder:
        library.decoder = decoder
    library.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(library, "words")
    ids = tokenizer.encode("Once upon a time")
    assert "".join(stream_text(tokenizer, ids)) == "Once upon a time"
    assert "".join(stream_text(tokenizer, ids[2:], prompt=ids[:2])) == " a time"
