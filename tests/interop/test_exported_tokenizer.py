"""Tokenizers of exported folders."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antransformer.data import Tokenizer, byte_tokenizer, train_bpe
from antransformer.interop.export import export
from antransformer.training.run_folder import open_checkpoint
from helpers.exported import exported, make_run

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TEXTS = [
    "",
    "to be or not to be",
    " naïve 日本 🎉!\r\n\t x's 'm .\x00",
    "a <|endoftext|> b",
    "e\u0301 \u00e9 \ufffd \u200d\U0001f469",
    "trailing  ",
    "\xff \u0178 <|antransformer_pad|>",
]


def with_affixes():
    """Tokenizer whose post-processor adds a token before every text, as in many published files."""
    from tokenizers import processors

    tokenizer = train_bpe(TEXTS * 3, 270)
    tokenizer._library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.end_of_text)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=[byte_tokenizer, lambda: train_bpe(TEXTS * 3, 270), with_affixes])
def tokenizers(request, tmp_path_factory):
    """Our tokenizer, and the exported one loaded by transformers."""
    ours = request.param()
    folder = exported(tmp_path_factory.mktemp("tokenizer"), tokenizer=ours, model={"vocab_size": 270})[1]
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_has_our_ids_and_round_trips(tokenizers):
    ours, theirs = tokenizers
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text != theirs.pad_token_id
    assert theirs.decode([ours.end_of_text, *ours.encode("x")], skip_special_tokens=True) == "x"
    batch = theirs(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0].tolist() == sorted(batch.attention_mask[0].tolist())  # padded on the left
    assert theirs.model_max_length == 48


def test_an_end_of_text_token_that_is_decoded_to_another_text_keeps_its_id(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    library = Library(models.BPE({"<unk>": 0, end: 1, "\u2581": 2, "a": 3, "b": 4}, [], unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["<unk>", end])
    ours = Tokenizer(library, "metaspace", end)
    folder = exported(tmp_path, tokenizer=ours, model={"vocab_size": 5})[1]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.decode([1]) != end
    assert theirs.eos_token_id == theirs.bos_token_id == 1 and len(theirs) == 5


def test_the_class_of_the_tokenizer_exists_in_older_transformers(tmp_path):
    _, native = exported(tmp_path)
    make_run(tmp_path / "gpt+", "gpt+")
    export(*open_checkpoint(tmp_path / "gpt+"), tmp_path / "qwen3", format="qwen3")
    for folder in (native, tmp_path / "qwen3"):
        content = json.loads((folder / "tokenizer_config.json").read_text())
        assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs("to be").input_ids == [*b"to be"] and theirs.eos_token_id == 256
    config = json.loads((tmp_path / "qwen3/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_byte_tokenizer(bytes_of_transformers, text):
    ids = bytes_of_transformers(text).input_ids
    assert ids == list(text.encode()) and bytes_of_transformers.decode(ids) == text


@pytest.fixture(scope="module")
def bytes_of_transformers(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(exported(tmp_path_factory.mktemp("bytes"))[1])


def test_tokens_that_were_added_after_the_pad_token_keep_their_ids(tmp_path):
    folder = exported(tmp_path, model={"vocab_size": 300})[1]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    theirs.add_tokens(["<plain>"])
    theirs.save_pretrained(tmp_path / "tuned")
    ours = Tokenizer.load(tmp_path / "tuned", end_of_text="<|endoftext|>")
    for name in ("<|user|>", "<plain>"):
        assert ours.vocabulary()[name] == theirs.convert_tokens_to_ids(name) > theirs.pad_token_id == 257


@pytest.mark.parametrize(("rows", "pad"), [(257, 0xFF), (300, 257)])
def test_a_collator_masks_padding_and_not_the_end_of_text(tmp_path, rows, pad):
    folder = exported(tmp_path, model={"vocab_size": rows})[1]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.pad_token_id == pad != theirs.eos_token_id
    assert transformers.AutoConfig.from_pretrained(folder).pad_token_id == pad
    end = theirs.eos_token_id
    batch = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)([[*b"to be", end], [*b"be", end]])
    assert batch["labels"].tolist() == [[*b"to be", end], [-100, -100, -100, *b"be", end]]
    assert theirs.decode([pad, *b"x"], skip_special_tokens=True) == "x"
    again = Tokenizer.load(folder)
    assert again.vocabulary() == byte_tokenizer().vocabulary() and again.encode("\xff x") == [*"\xff x".encode()]
