"""The verbs prepare and generate, and the way from text to text with train in between."""

import pytest

from antransformer.cli import main
from antransformer.inference import generate
from antransformer.training.metrics import read_metrics
from helpers.commands import TEN_STEPS, write_documents
from helpers.messages import mentions


@pytest.mark.parametrize("tokenizer", [[], ["--bpe-vocab-size", "300"]])
def test_prepare_train_generate(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text")
    assert main(["prepare", "text", "--out", "data/mine", "--val-fraction", "0.4", *tokenizer]) == 0
    out = capsys.readouterr().out
    first, *_, last = out.splitlines()
    assert "bpe-" in first if tokenizer else mentions(first, *["data/mine", "byte", "257"])
    assert last.split()[-4:] == ["antransformer", "train", "--data", "data/mine"]
    assert main(["train", "--data", "data/mine", "--architecture", "gpt+", *TEN_STEPS]) == 0
    out = capsys.readouterr().out
    *_, line = read_metrics(tmp_path / "runs/gpt+-nano/metrics.jsonl")
    assert mentions(out, *f"10/10 {line['val_loss']:.4f} {line['bits_per_byte']:.4f}".split())
    assert main(["generate", "--checkpoint", "runs/gpt+-nano", "--prompt", "to be", "--max-new-tokens", "20"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("to be") and len(first) > 10
    checkpoint = sorted((tmp_path / "runs/gpt+-nano/checkpoints").iterdir())[-1]
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "to be", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == first  # the same seed


def test_generate_folds_an_angpt_to_the_same_text_and_warns_of_a_long_prompt(trained, capsys, monkeypatch):
    words = ["generate", "--checkpoint", str(trained), "--prompt", "x = 1\n" * 10, "--max-new-tokens", "40"]
    kinds = []

    def spied(model, *arguments, **options):
        kinds.append(type(model).__name__)
        return generate(model, *arguments, **options)

    monkeypatch.setattr("antransformer.inference.text.generate", spied)
    assert main(words) == 0
    folded = capsys.readouterr()
    assert folded.out.startswith("x = 1\n" * 10) and len(folded.out) > 70
    assert folded.err.count("\n") == 1 and mentions(
        folded.err, *["61", "32"]
    )  # 60 bytes and the start of the text; the context
    monkeypatch.setattr("antransformer.inference.text.folded_where_possible", lambda model: model)
    assert main(words) == 0
    assert capsys.readouterr().out == folded.out
    assert kinds == ["FoldedAnGPT", "AnGPT"]
