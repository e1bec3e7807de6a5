"""Mistakes of a newcomer: the message names what would be right, and nothing is left behind."""

import shutil

import pytest
from tokenizers import normalizers

from antransformer.api.training import NOT_IN_A_FILE
from antransformer.cli import main
from antransformer.data import Dataset, Tokenizer, prepare
from antransformer.errors import ConfigError, DataError, MissingExtraError
from antransformer.settings import NAMES_ELSEWHERE
from antransformer.training.config import resolve_config
from antransformer.training.data import check_data
from antransformer.training.run_folder import require_empty, with_initial_model
from helpers.commands import TEN_STEPS, refused
from helpers.messages import mentions
from helpers.trainers import start


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--width", "--model.width"),
        ("--head-dim", "--model.head-dim"),
        ("--learning-rate", "--lr"),
        ("--learning_rate", "--lr"),
        ("--batch-size", "--batch-tokens"),
        ("--n_layer", "--model.layers"),
        ("--block_size", "--context"),
        ("--output-dir", "--out"),
        ("--lrr", "--lr"),
        ("--modle.width", "--model.width"),
    ],
)
def test_an_unknown_option_names_the_one_that_is_meant(option, meant, capsys):
    assert main(["train", option, "8"]) == 2
    assert mentions(capsys.readouterr().err.replace("?", " "), option, meant)


@pytest.mark.parametrize(
    "words", ["prepare --inptu a.txt --outt D", "generate --checkpiont=runs/a", "export --fromat x"]
)
def test_an_unknown_option_is_named_before_those_that_are_missing(words, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert mentions(error, words.split()[1].partition("=")[0]) and "required" not in error


@pytest.mark.parametrize("words", ["--resume train", "--data data/mine train", "--preset=pico train", "--dry-run"])
def test_an_option_before_the_verb_is_named_with_its_place(words, capsys):
    assert main(words.split()) == 2
    option = words.split()[0].partition("=")[0]
    assert mentions(capsys.readouterr().err, f"antransformer VERB {option}")


def test_a_folder_is_no_config_file(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert mentions(capsys.readouterr().err, str(tmp_path), "config.yaml")


def test_an_option_that_is_no_setting_is_refused_in_a_config_file(tmp_path, capsys):
    for name in NOT_IN_A_FILE:
        (tmp_path / "mine.yaml").write_text(f"{name}: 1\n")
        message = refused(["train", "--config", tmp_path / "mine.yaml"], capsys)
        assert mentions(message, tmp_path / "mine.yaml", name, f"--{name}") and "?" not in message


def test_a_run_whose_data_moved_names_the_option_for_the_new_path(corpus, tmp_path, capsys):
    data, run = shutil.copytree(corpus, tmp_path / "data"), tmp_path / "run"
    assert main(["train", "--data", str(data), "--out", str(run), *TEN_STEPS]) == 0
    moved = data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert mentions(refused(["train", "--out", run, "--resume"], capsys), data, run, "--data")
    assert mentions(refused(["train", "--out", run, "--resume", "--data", "nowhere"], capsys), "nowhere")
    assert main(["train", "--out", str(run), "--resume", "--data", str(moved)]) == 0


def test_inputs_after_val_inputs_are_named_as_validation_text(tmp_path, capsys):
    out = tmp_path / "data"
    assert mentions(
        refused(["prepare", "--val-inputs", "a.txt", "b.txt", "--out", out], capsys), "INPUT", "--val-inputs"
    )
    assert "--val-inputs" not in refused(["prepare", "--out", out], capsys)


def test_an_unknown_key_names_the_one_that_is_meant():
    for key, meant in (("width", "model.width"), ("n_embd", "model.width"), ("max_steps", "tokens"), ("lrr", "lr")):
        with pytest.raises(ConfigError) as error:
            resolve_config({key: 8}, 257)
        assert mentions(str(error.value).replace("?", " "), key, meant)


def test_names_of_other_programs_stand_for_settings_that_exist(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for meant in set(NAMES_ELSEWHERE.values()):
        assert f"--{meant.replace('_', '-')} " in text or f"--{meant.replace('_', '-')}\n" in text, meant


@pytest.mark.parametrize("tracker", ["--tensorboard", "--track=wandb"])
def test_a_missing_tracker_is_found_before_the_folder_is_made(corpus, tmp_path, capsys, monkeypatch, tracker):
    def missing(module, extra):
        raise MissingExtraError(module, extra)

    monkeypatch.setattr("antransformer.training.trackers.require", missing)
    out = tmp_path / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), tracker, *TEN_STEPS]) == 2
    assert "antransformer[track]" in capsys.readouterr().err and not out.exists()


def test_a_size_that_differs_from_the_initial_model_names_the_setting_to_leave_out(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256, batch_tokens=256).run()
    for settings, name in (({"preset": "nano"}, "preset"), ({"model": {"layers": 4}}, "model.layers")):
        with pytest.raises(ConfigError) as error:
            with_initial_model({"init": str(tmp_path / "run"), **settings}, print)
        assert str(error.value).endswith(f" {name}")


def test_the_advice_for_data_of_another_tokenizer_works(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256, batch_tokens=256).run()
    text, val = tmp_path / "text.txt", tmp_path / "val.txt"
    text.write_text("some words and more words\n" * 400)
    val.write_text("some more words\n" * 100)
    run = str(tmp_path / "run")
    prepare([text], tmp_path / "other", bpe_vocab_size=260, val_inputs=[val])
    settings = with_initial_model(
        {"init": run, "data": str(tmp_path / "other"), "tokens": 256, "batch_tokens": 256}, print
    )
    dataset = Dataset.open(tmp_path / "other")
    with pytest.raises(DataError) as error:
        check_data(resolve_config(settings, dataset.vocab_size), dataset)
    assert mentions(str(error.value), "--tokenizer", run) and "model.vocab_size" not in str(error.value)
    prepare([text], tmp_path / "fitting", tokenizer=run, val_inputs=[val])
    dataset = Dataset.open(tmp_path / "fitting")
    check_data(resolve_config(settings, dataset.vocab_size), dataset)


@pytest.mark.parametrize("other", ["normalizer", "end of text"])
def test_an_initial_model_of_another_tokenizer_with_the_same_vocabulary_is_refused(corpus, tmp_path, other):
    run, added = tmp_path / "run", "<|user|>"
    path = start(corpus, run, tokens=256, batch_tokens=256, model={"vocab_size": 258}).run().checkpoint
    tokenizer = Tokenizer.load(run)
    tokenizer._library.add_special_tokens([added])
    tokenizer.save(run / "tokenizer.json")
    (tmp_path / "text.txt").write_text("some words and more words\n" * 400)
    (tmp_path / "val.txt").write_text("some more words\n" * 100)
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer=str(run), val_inputs=[tmp_path / "val.txt"])
    more = {"tokens": 256, "batch_tokens": 256, "init": str(path), "model": {"vocab_size": 258}}
    start(tmp_path / "data", tmp_path / "tuned", **more)
    if other == "normalizer":
        tokenizer._library.normalizer = normalizers.Lowercase()
    else:
        tokenizer.end_of_text = tokenizer.vocabulary()[added]
    tokenizer.save(run / "tokenizer.json")
    assert Tokenizer.load(run).vocabulary() == Dataset.open(tmp_path / "data").tokenizer().vocabulary()
    with pytest.raises(DataError) as error:
        start(tmp_path / "data", tmp_path / "refused", **more)
    assert mentions(str(error.value), "--tokenizer", str(run))


def test_a_folder_of_text_and_an_exported_model_are_recognized(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("text")
    assert main(["train", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")]) == 2
    assert mentions(capsys.readouterr().err, "antransformer", "prepare", str(tmp_path / "text"))
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.safetensors").touch()
    assert main(["generate", "--checkpoint", str(exported)]) == 2
    assert mentions(capsys.readouterr().err, "antransformer", "import", str(exported))


def test_prepared_data_is_no_checkpoint(corpus, capsys):
    assert main(["generate", "--checkpoint", str(corpus)]) == 2
    error = capsys.readouterr().err
    assert mentions(error, str(corpus), "data") and not mentions(error, "compare")


def test_only_a_verb_that_resumes_is_advised_to_resume_in_an_occupied_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="--resume"):
        require_empty(tmp_path)
    with pytest.raises(ConfigError) as error:
        require_empty(tmp_path, resumable=False)
    assert "--resume" not in str(error.value)


def test_a_sampling_option_out_of_range_names_the_range(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256, batch_tokens=256).run()
    for option, value, bound in (("--temperature", "-1.5", 0), ("--top-p", "1.5", 1)):
        assert main(["generate", "--checkpoint", str(tmp_path / "run"), option, value]) == 2
        assert mentions(capsys.readouterr().err, option.removeprefix("--").replace("-", "_"), value, bound)
