"""Tokenizers: exact round trips, ids, and files that are refused."""

import errno
import json
import os
from pathlib import Path
from random import Random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from antransformer.data import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from antransformer.data import tokenizers as module
from antransformer.errors import DataError
from helpers.messages import mentions

BYTE = byte_tokenizer()
WORDS = ["the cat sat on the mat. 12 cats; <|endoftext|> and the dog's hat\n"] * 20
BPE = train_bpe(WORDS, 280)


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_byte_ids_are_the_bytes(text: str) -> None:
    library = BYTE._library.encode(text, add_special_tokens=False).ids  # for users of tokenizer.json
    assert BYTE.encode(text) == list(text.encode()) == library
    assert BYTE.decode(BYTE.encode(text)) == text


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_bpe_round_trips_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


def test_byte_tokenizer_describes_itself() -> None:
    assert (BYTE.name, BYTE.vocab_size, BYTE.end_of_text) == ("byte", 257, 256)
    assert BYTE.decode([104, 105, 256]) == "hi<|endoftext|>"


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_special_tokens_in_a_text_are_plain_text(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    for ids in (tokenizer.encode(text), next(tokenizer.encode_batch([text])).tolist()):
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text


def test_batches_equal_single_texts() -> None:
    texts = ["", "one", "zwei — 二", *WORDS]
    for tokenizer in (BYTE, BPE):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_bpe_is_deterministic_and_smaller_than_bytes() -> None:
    again = train_bpe(iter(WORDS), 280)
    assert again._library.to_str() == BPE._library.to_str()
    assert (BPE.vocab_size, BPE.end_of_text, BPE.name) == (280, 0, "bpe-280")
    assert len(BPE.encode(WORDS[0])) < len(WORDS[0]) / 2


def test_bpe_of_too_little_text_has_a_smaller_vocabulary() -> None:
    small = train_bpe(["abab abab"], 5000)
    assert 257 < small.vocab_size < 265
    assert small.name == f"bpe-{small.vocab_size}"


def test_bpe_stops_reading_at_the_sample_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 1000)
    read = []
    train_bpe((read.append(text) or text for text in ["é" * 100] * 50), 300)  # type: ignore[func-returns-value]
    assert len(read) == 5


def test_bpe_vocabulary_must_hold_every_byte() -> None:
    assert train_bpe(["a"], 257).vocab_size == 257
    with pytest.raises(DataError) as error:
        train_bpe(["a"], 256)
    assert mentions(str(error.value), *["256", "257"])


def test_save_and_load(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    for spec in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(spec)
        assert loaded.name == tmp_path.name
        assert loaded.encode(WORDS[0]) == BPE.encode(WORDS[0])
        assert loaded.end_of_text not in loaded.encode("<|endoftext|>")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 280
    BPE.save(tmp_path / "own.json")
    assert Tokenizer.load(tmp_path / "own.json").name == "own"


def test_padding_and_truncation_of_a_file_are_ignored(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(BYTE._library.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("abcdef") == list(b"abcdef")


def test_vocab_size_is_the_largest_id_plus_one(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 41}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.end_of_text) == (42, 41)


def named(folder: Path, *special: str, pieces: tuple[str, ...] = ()) -> Path:
    """A folder with a tokenizer of these special tokens and ordinary pieces."""
    vocabulary = {token: number for number, token in enumerate(["a", *pieces])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    library.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_the_end_of_text_is_read_from_the_files_next_to_the_tokenizer(tmp_path: Path) -> None:
    folder = named(tmp_path / "own", "</s>", "[DONE]", "[END]")
    assert load_tokenizer(folder).end_of_text == 1
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "[END]"}}))
    assert load_tokenizer(folder).end_of_text == 3
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[DONE]"}))
    loaded = load_tokenizer(folder / "tokenizer.json")
    assert loaded.end_of_text == 2
    assert load_tokenizer(folder, "[END]").end_of_text == 3
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy/tokenizer.json")  # as a run folder holds it
    assert Tokenizer.load(tmp_path / "copy/tokenizer.json").end_of_text == 2
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError) as error:
        load_tokenizer(folder)
    assert mentions(error.value, folder / "tokenizer_config.json")


def test_the_companions_of_a_linked_tokenizer_are_next_to_the_link(tmp_path: Path) -> None:
    """A hub cache has links to files whose names are hashes."""
    folder = named(tmp_path / "snapshot", "</s>", "[DONE]", "[END]")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[DONE]"}))
    (folder / "tokenizer.json").rename(tmp_path / "abc123")
    (folder / "tokenizer.json").symlink_to(tmp_path / "abc123")
    for path in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(path).end_of_text == 2 and load_tokenizer(path).name == "snapshot"


def test_only_special_tokens_end_a_text(tmp_path: Path) -> None:
    folder = named(tmp_path / "own", "[END]", pieces=("<|endoftext|>",))
    for token in (None, "<|endoftext|>", "absent"):
        with pytest.raises(DataError) as error:
            load_tokenizer(folder, token)
        assert mentions(error.value, token or "<|endoftext|>", "--end-of-text") and "[END]" in str(error.value)
    assert load_tokenizer(folder, "[END]").end_of_text == 2
    assert load_tokenizer(named(tmp_path / "both", "</s>", pieces=("<|endoftext|>",))).end_of_text == 2
    assert Tokenizer.load(folder).end_of_text == 1  # folders of older versions remain readable
    with pytest.raises(DataError) as error:
        load_tokenizer("byte", "</s>")
    assert mentions(error.value, "--end-of-text", "</s>")


@pytest.mark.parametrize("end", ["</s>", "<\u2581s>"])
def test_a_model_that_encodes_text_to_the_end_of_text_is_refused(tmp_path: Path, end: str) -> None:
    """A Unigram model may have the token as a piece, as those of SentencePiece do."""
    pieces = [("<unk>", 0.0), (end, 0.0), *((letter, -3.0) for letter in "abcd<>/s")]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    library.decoder = tokenizers.decoders.Metaspace()  # replaces U+2581 by a space
    library.add_special_tokens([end, "<end>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError) as error:
        module.load_encoder(tmp_path, end)
    assert mentions(error.value, tmp_path, "--end-of-text", 1) and "<end>" in str(error.value)
    assert module.load_encoder(tmp_path, "<end>").end_of_text == 10


def test_a_bpe_of_text_without_spaces_is_trained_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(Random(0).choices("ACGT", k=200_000))
    monkeypatch.setattr(module, "CUT_CHARACTERS", 100_000)
    dna = train_bpe([text, text, "some words " * 10], 500)
    assert dna.vocab_size == 500 and max(map(len, dna.vocabulary())) < 64
    assert len(dna.encode(text)) < len(text) / 3
    assert list(module._cut_runs(["a" * 130 + " b", "c"])) == ["a" * 64, "a" * 64, "aa b", "c"]
    assert list(module._cut_runs(["a" * 200_000, "b" * 100, "c"]))[-1] == "c"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden": 3}))
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    library.save(str(tmp_path / "endless.json"))
    for spec, facts in (
        (tmp_path / "config.json", f"{tmp_path / 'config.json'} tokenizer.json"),
        (tmp_path / "binary.json", f"{tmp_path / 'binary.json'} tokenizer.json"),
        (tmp_path, f"{tmp_path / 'tokenizer.json'} {os.strerror(errno.ENOENT)}"),
        (tmp_path / "endless.json", "endless <|endoftext|> <|end_of_text|> </s>"),
        ("gpt2", "gpt2 byte tokenizer.json"),
    ):
        with pytest.raises(DataError) as caught:
            load_tokenizer(spec)
        assert mentions(str(caught.value), *facts.split())
        assert "\n" not in str(caught.value)
