import errno
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from antransformer.bounds import norms
from antransformer.data import Dataset, eval_batches
from antransformer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    NewerCheckpointError,
    WriteError,
)
from antransformer.models import Decoder
from antransformer.training import run_folder as run
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.sharded_safetensors import LocalShards
from antransformer.training.device import choose_device
from antransformer.training.metrics import read_metrics
from antransformer.training.muon import Muon
from antransformer.training.optimizer import matrix_lrs
from antransformer.training.schedule import learning_rate
from antransformer.training.trainer import Trainer
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS, Notes
from helpers.trainers import losses, resume, run_until, settings, start, weights

ARCHITECTURES = ["angpt", "ngpt", "gpt+"]
OPTIMIZED = [*((name, "adam") for name in ARCHITECTURES), ("angpt", "muon"), ("gpt+", "muon")]


def test_a_line_holds_the_mean_loss_since_the_one_before(corpus, tmp_path):
    more = {"tokens": 256 * 6, "checkpoint_every": 6, "eval_every": 6}
    start(corpus, tmp_path / "each", **more).run()
    start(corpus, tmp_path / "some", log_every=3, **more).run()
    each, some = losses(tmp_path / "each"), losses(tmp_path / "some")
    assert list(some) == [3, 6]
    for step, loss in some.items():
        assert loss == pytest.approx(sum(each[number] for number in (step - 2, step - 1, step)) / 3, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_learns_and_leaves_what_it_should(corpus, tmp_path, architecture):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 60, model={"architecture": architecture}, eval_every=30)
    result = trainer.run()
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] == pytest.approx(math.log(257), rel=0.1)
    assert result.val_loss < 3.6 < lines[0]["loss"]
    assert [line["step"] for line in lines if "val_loss" in line] == [30, 60]
    last = lines[-1]
    assert last["tokens"] == 60 * 256 and last["lr"] == pytest.approx(1e-4) and last["mfu"] is None
    assert last["grad_norm"] > 0 and last["tokens_per_second"] > 0 and last["seconds"] > 0
    if architecture == "gpt+":
        assert last["mean_alpha"] is None
    else:
        assert last["largest_row_norm"] == pytest.approx(1, abs=1e-5)
        assert 0.02 < last["mean_alpha"] < 0.5
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (50, 55, 60)
    ]
    # The final checkpoint is the final model, and its bounds hold.
    restored = checkpoint.restore(checkpoint.read(result.checkpoint), torch.device("cpu"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert all(norms(bound).max() <= 1 + 1e-6 for bound in restored.bounds())


def test_validation_is_the_mean_over_its_windows_and_bits_count_bytes(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", model={"architecture": "gpt+"})
    split = Dataset.open(corpus).split("val")
    measured = trainer.evaluate()
    total, count = 0.0, 0
    for tokens, targets in eval_batches(split, 32, 1, 2048):
        total += trainer.model.loss(tokens, targets).item() * tokens.numel()
        count += tokens.numel()
    assert count == 2048
    assert measured["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(
        total / count * split.tokens / split.bytes / math.log(2), rel=1e-5
    )


def test_the_same_seed_gives_the_same_run_and_another_seed_another(corpus, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        start(corpus, tmp_path / name, tokens=256 * 5, seed=seed).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights(tmp_path / "a", 5) == weights(tmp_path / "b", 5)
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_accumulating_gradients_does_not_change_the_run(corpus, tmp_path):
    for name, micro_batch_size in (("whole", 8), ("parts", 3)):  # 3 + 3 + 2: an uneven last part counts by its size
        start(corpus, tmp_path / name, tokens=256 * 8, micro_batch_size=micro_batch_size).run()
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)
    assert parts != whole  # another order of summation: the parts were really computed one by one


def test_weight_decay_reaches_matrices_only(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", model={"architecture": "gpt+"})
    groups = trainer.optimizer.param_groups
    for group in groups:
        dims = {parameter.ndim for parameter in group["params"]}
        assert (dims, group["weight_decay"]) in (({2}, 0.1), ({1}, 0))
    sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    assert sum(sizes) == trainer.model.parameter_count()
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.95) and trainer.optimizer.defaults["eps"] == 1e-9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_have_the_rate_of_their_width_and_vectors_that_of_the_config(corpus, tmp_path, architecture):
    # Adam's first step moves every coordinate that has a gradient by the rate, of which a bound takes some back.
    more = {"warmup_fraction": 0, "weight_decay": 0, "model": {"architecture": architecture, "width": 32}}
    trainer = start(corpus, tmp_path / "run", lr_width=8, **more)
    before = {name: it.detach().clone() for name, it in trainer.model.named_parameters()}
    trainer.update(1)
    rate = learning_rate(1, 20, 1e-2)
    for name, parameter in trainer.model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        share = 1.0 if moved.ndim == 1 else 0.25 if name.startswith("blocks.") else 0.5
        assert float(moved[moved > 0].median()) == pytest.approx(share * rate, rel=0.1), name
    trainer.run()
    assert read_metrics(tmp_path / "run/metrics.jsonl")[0]["lr"] == pytest.approx(rate)


def test_muon_steps_the_matrices_of_the_blocks_and_each_has_its_own_peak(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", optimizer="muon", muon_lr=0.05, model={"architecture": "gpt+"})
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]
    decayed, others, inner = *groups[:2], groups[2] | groups[3]
    assert groups[3] == {f"blocks.{layer}.attention.qkv_proj.weight" for layer in (0, 1)}
    assert decayed == {"embedding.weight", "lm_head.weight"}
    matrices = ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    assert inner == {f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in matrices}
    assert len(decayed) + len(others) + len(inner) == len(names)
    trainer.update(15)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    share = learning_rate(15, 20, 1.0, warmup_fraction=0.1, min_lr_ratio=0.01)
    outer = matrix_lrs(trainer.config)[0]
    assert rates == pytest.approx([outer * share, trainer.config.lr * share, 0.05 * share, 0.05 * share])


def test_muon_is_torchs_with_q_k_and_v_apart():
    torch.manual_seed(0)
    heads, width, shapes = 3, 8, [(24, 40), (40, 24), (72, 24)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    # the rows of q, k and v lie head by head in ours, each in a matrix of its own in theirs
    q_k_v = ours[2].detach().view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2).unbind()
    theirs = [nn.Parameter(value.detach().clone()) for value in (*ours[:2], *q_k_v)]
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "head_dim": width}], lr=0.05, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        for weight in ours:
            weight.grad = torch.randn_like(weight)
        gradients = ours[2].grad.view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2)
        for weight, gradient in zip(theirs, (ours[0].grad, ours[1].grad, *gradients), strict=True):
            weight.grad = gradient.clone()
        muon.step()
        torchs.step()
    found = (*ours[:2], *ours[2].view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2))
    for mine, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_rate_of_muon_is_the_angle_by_which_rows_of_unit_norm_turn(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", optimizer="muon", muon_lr=0.05)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.update(1)
    for name, value in trainer.model.named_parameters():
        if name.startswith("blocks") and value.ndim == 2:
            angles = torch.cosine_similarity(value.detach(), before[name]).clamp(-1, 1).acos()
            assert angles.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.3), name


@pytest.mark.parametrize("options", OPTIMIZED, ids="-".join)
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(corpus, tmp_path, options):
    architecture, optimizer = options
    options = {"model": {"architecture": architecture}, "optimizer": optimizer}
    start(corpus, tmp_path / "unbroken", **options).run()
    broken = start(corpus, tmp_path / "broken", **options)
    run_until(broken, 13)
    assert max(losses(tmp_path / "broken")) == 12
    trainer, notes = resume(corpus, tmp_path / "broken")
    assert len(notes) == 1 and mentions(notes[0], f"{tmp_path}/broken/checkpoints/step-00000010")
    trainer.run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert weights(tmp_path / "broken", 20) == weights(tmp_path / "unbroken", 20)


def command(corpus, folder, *more):
    # One thread, as in this process: the order of summation is part of bit for bit.
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings(corpus).items() if name != "model"]
    code = (
        "import sys, torch; torch.set_num_threads(1); from antransformer.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, "train", "--out", str(folder), *options, *SMALL_OPTIONS, *more]


def wait_for_step(folder, step, process):
    until = time.monotonic() + 60
    while max(losses(folder), default=0) < step:
        assert process.poll() is None and time.monotonic() < until, "the run ended before its step"
        time.sleep(0.005)


def test_a_run_killed_at_a_random_step_resumes_to_the_unbroken_losses(corpus, tmp_path):
    length = ["--tokens", str(256 * 400), "--checkpoint-every", "20", "--eval-every", "400"]
    subprocess.run(command(corpus, tmp_path / "unbroken", *length), check=True, capture_output=True)
    seed = random.SystemRandom().randrange(10**6)
    kill_at = random.Random(seed).randrange(1, 300)
    process = subprocess.Popen(command(corpus, tmp_path / "killed", *length), stdout=subprocess.PIPE)
    wait_for_step(tmp_path / "killed", kill_at, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = max(losses(tmp_path / "killed"))
    assert reached < 400
    resumed = [*command(corpus, tmp_path / "killed", *length), "--resume"]
    output = subprocess.run(resumed, check=True, capture_output=True, text=True).stdout
    named = [int(step) for step in re.findall(r"step-(\d{8})", output)]  # the checkpoint it resumes from, and its last
    assert any(step <= reached for step in named) or reached < 25, (kill_at, output)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken"), kill_at
    assert weights(tmp_path / "killed", 400) == weights(tmp_path / "unbroken", 400), kill_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_prints_the_command_that_resumes(corpus, tmp_path, number):
    process = subprocess.Popen(
        command(corpus, tmp_path / "run", "--tokens", "2M", "--checkpoint-every", "100000", "--eval-every", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    steps = losses(tmp_path / "run")
    step = max(steps)
    assert complaint.endswith("\n") and complaint.count("\n") == 1
    assert mentions(complaint, step, number.name, f"{tmp_path}/run/checkpoints/step-{step:08d}")
    assert f" train --out {tmp_path}/run --resume" in complaint
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == step


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", log_every=4)
    loss, calls = trainer.loss, []

    def poisoned(tokens, targets):
        calls.append(1)
        return loss(tokens, targets) * (math.nan if len(calls) == 14 else 1)

    trainer.loss = poisoned
    with pytest.raises(DivergedError) as error:
        trainer.run()
    good = f"{tmp_path}/run/checkpoints/step-00000010"
    assert mentions(error.value, "loss", "nan", 14, good, "--lr", "--seed")
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000010").step == 10
    assert max(losses(tmp_path / "run")) <= 12


def test_weights_that_are_not_finite_are_never_written(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 3, checkpoint_every=1, log_every=1)
    step = trainer.optimizer.step

    def broken_step():
        step()
        if trainer.done == 1:  # the second update
            with torch.no_grad():
                trainer.model.lm_head.weight[3, 4] = math.inf

    trainer.optimizer.step = broken_step
    with pytest.raises(DivergedError) as error:
        trainer.run()
    assert mentions(error.value, "inf", 2, f"{tmp_path}/run/checkpoints/step-00000001")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]
    assert set(losses(tmp_path / "run")) == {1}


def test_a_gradient_that_is_not_finite_stops_the_run(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 5, log_every=5, checkpoint_every=5)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"\b(nan|inf)\b") as error:
        trainer.run()
    assert mentions(error.value, 1) and "grad" in str(error.value) and "step-0" not in str(error.value)


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\x00not json")


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model.safetensors", "truncated"),
        ("model.safetensors", "flipped"),
        ("optimizer.safetensors", "flipped"),
        ("optimizer.safetensors", "missing"),
        ("state.json", "missing"),
        ("state.json", "garbage"),
    ],
)
def test_a_broken_newest_checkpoint_is_named_and_passed_over(corpus, tmp_path, file, how):
    start(corpus, tmp_path / "run").run()
    unbroken = losses(tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step-00000020" / file, how)
    trainer, notes = resume(corpus, tmp_path / "run")
    broken, used = notes
    assert mentions(broken, f"{tmp_path}/run/checkpoints/step-00000020", file)
    assert ("sha256" in broken) == (how in ("truncated", "flipped"))  # only where the content is what is wrong
    assert mentions(used, f"{tmp_path}/run/checkpoints/step-00000015") and trainer.done == 15
    trainer.run()
    assert losses(tmp_path / "run") == unbroken
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000020").step == 20


def test_a_broken_checkpoint_takes_no_place_among_those_that_are_kept(corpus, tmp_path):
    start(corpus, tmp_path / "run").run()
    damage(tmp_path / "run/checkpoints/step-00000020/model.safetensors", "truncated")
    trainer, _ = resume(corpus, tmp_path / "run", keep_checkpoints=1, checkpoint_every=2)
    run_until(trainer, 17)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000016"]
    assert checkpoint.newest(tmp_path / "run/checkpoints", print).step == 16


def steps_in(folder):
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_stay_and_some_for_good(corpus, tmp_path):
    start(corpus, tmp_path / "run", checkpoint_every=4, keep_checkpoints=2, keep_every=6).run()
    assert steps_in(tmp_path / "run") == [6, 12, 18, 20]
    start(corpus, tmp_path / "all", checkpoint_every=5, keep_checkpoints=1, keep_every=5).run()
    assert steps_in(tmp_path / "all") == [5, 10, 15, 20]


def test_training_goes_on_while_a_checkpoint_is_written(corpus, tmp_path, monkeypatch):
    more = {"tokens": 256 * 12, "checkpoint_every": 5}
    start(corpus, tmp_path / "other", **more).run()
    trainer, may_write = start(corpus, tmp_path / "run", **more), threading.Event()
    write, update = LocalShards.write, trainer.update

    def wait_and_write(parts, path):
        assert may_write.wait(30), "the run waited for its checkpoint"
        return write(parts, path)

    def update_and_allow(step):
        if step == 9:
            assert steps_in(tmp_path / "run") == [-1]  # the unfinished one has no step
            may_write.set()
        return update(step)

    monkeypatch.setattr(LocalShards, "write", wait_and_write)
    trainer.update = update_and_allow
    trainer.run()
    assert steps_in(tmp_path / "run") == [5, 10, 12]
    for step in (5, 10, 12):
        assert weights(tmp_path / "run", step) == weights(tmp_path / "other", step)


def test_one_checkpoint_is_written_at_a_time(corpus, tmp_path, monkeypatch):
    write, writing = LocalShards.write, []

    def slowly(parts, path):
        writing.append(path)
        time.sleep(0.02)
        assert len(writing) == 1
        writing.pop()
        return write(parts, path)

    monkeypatch.setattr(LocalShards, "write", slowly)
    start(corpus, tmp_path / "run", tokens=256 * 6, checkpoint_every=1).run()
    assert steps_in(tmp_path / "run") == [4, 5, 6]


def test_a_write_that_failed_ends_the_run_before_the_next(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 90, checkpoint_every=45, eval_every=90)
    monkeypatch.setattr(LocalShards, "write", lambda *_: (tmp_path / "no/such/folder").touch())
    with pytest.raises(WriteError, match=os.strerror(errno.ENOENT)) as error:
        trainer.run()
    assert mentions(error.value, 45, tmp_path / "run/checkpoints")
    assert 45 <= trainer.done < 89
    assert steps_in(tmp_path / "run") == []


def killed_at(moment, folder, trainer):
    """Write a checkpoint, and be killed when the files of the folder are touched for so many times."""
    touched = []

    def watch(event, arguments):
        if any(str(folder) in str(argument) for argument in arguments):
            touched.append(event)
            if len(touched) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with checkpoint.CheckpointWriter(folder, keep=1) as writer:
        writer.save(10, trainer.model, trainer.optimizer, {})


def test_a_kill_during_a_write_leaves_nothing_that_looks_whole(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 5)
    trainer.run()
    moment, code, found = 0, None, []
    while code != 0:
        moment += 1
        folder = shutil.copytree(tmp_path / "run/checkpoints", tmp_path / str(moment))
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(moment, folder, trainer))
        process.start()
        process.join(60)
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        for path in checkpoint.step_folders(folder):
            checkpoint.read(path)
        found.append(checkpoint.newest(folder, print).step)
        checkpoint.save(folder, 15, trainer.model, trainer.optimizer, {}, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000015"]
    assert found == sorted(found) and set(found) == {5, 10}
    assert found.count(5) > 5 and found.count(10) > 3


def test_no_whole_checkpoint_is_an_error(corpus, tmp_path):
    start(corpus, tmp_path / "run", keep_checkpoints=1).run()
    damage(tmp_path / "run/checkpoints/step-00000020/model.safetensors", "truncated")
    with pytest.raises(CheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, tmp_path / "run/checkpoints") and "step-0" not in str(error.value)


def test_what_an_interrupted_write_leaves_is_no_checkpoint(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 10).run()
    folder = tmp_path / "run/checkpoints"
    (folder / "step-00000010").rename(folder / ".partial-step-00000010")
    assert checkpoint.newest(folder, print).step == 5
    trainer, _ = resume(corpus, tmp_path / "run")
    trainer.run()
    assert not list(folder.glob(".partial*"))


def test_a_checkpoint_of_a_newer_version_is_not_called_broken(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", tokens=256 * 5).run().checkpoint
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": 3}))
    with pytest.raises(NewerCheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, path, 3, checkpoint.VERSION)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 0},
        {"step": 5.5},
        {"step": -1},
        {"model": {"width": 64}},
        {"extra": None},
        {"sha256": {}},
        {"sha256": {"model.safetensors": ""}},
        {"sha256": {"model-00001-of-00002.safetensors": "", "optimizer-00001-of-00002.safetensors": ""}},
        {"sha256": {"../model.safetensors": "", "optimizer.safetensors": ""}},
    ],
)
def test_a_state_that_was_changed_is_not_believed(corpus, tmp_path, change):
    path = start(corpus, tmp_path / "run", tokens=256 * 5).run().checkpoint
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(path)
    assert type(error.value) is CheckpointError and mentions(error.value, path, "state.json")


def test_a_checkpoint_from_before_there_was_a_choice_of_optimizers_is_adams(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", tokens=256 * 5).run().checkpoint
    state = json.loads((path / "state.json").read_text())
    assert state["extra"]["settings"].pop("optimizer") == "adam"
    (path / "state.json").write_text(json.dumps(state))
    assert resume(corpus, tmp_path / "run")[0].done == 5


def test_a_run_from_before_matrices_had_a_rate_of_their_width_goes_on_with_one_rate(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", lr_width=0, tokens=256 * 5).run().checkpoint
    state, config = json.loads((path / "state.json").read_text()), tmp_path / "run/config.yaml"
    assert state["extra"]["settings"].pop("lr_width") == 0 and "lr_width: 0\n" in config.read_text()
    (path / "state.json").write_text(json.dumps(state))
    config.write_text(config.read_text().replace("lr_width: 0\n", ""))
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == 5 and {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr: 0.01", "lr: 0.02"),
        ("lr_width: 128", "lr_width: 0"),
        ("seed: 0", "seed: 1"),
        ("tokens: 1280", "tokens: 768"),
        ("optimizer: adam", "optimizer: muon"),
    ],
)
def test_a_config_that_was_edited_is_not_believed(corpus, tmp_path, old, new):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    text = (tmp_path / "run/config.yaml").read_text()
    assert old in text
    (tmp_path / "run/config.yaml").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, tmp_path / "run", old.partition(":")[0], "config.yaml")


def test_a_folder_that_a_kill_left_half_laid_out_can_be_used(corpus, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/tokenizer.json").write_text("{")
    assert start(corpus, tmp_path / "run", tokens=256).run().step == 1


def test_checkpoints_are_readable_as_the_umask_says(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", tokens=256).run().checkpoint
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_resuming_refuses_what_would_change_the_run(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    for change, parts in (
        ({"architecture": "gpt+"}, ("model.architecture", "angpt", "gpt+")),
        ({"model": {"width": 128}}, ("model.width", 64, 128)),
        ({"lr": 0.5}, ("lr", 0.01, 0.5)),
        ({"seed": 9}, ("seed", 0, 9)),
    ):
        with pytest.raises(CheckpointError) as error:
            resume(corpus, tmp_path / "run", **change)
        assert mentions(error.value, tmp_path / "run", "--out", *parts)
    trainer, _ = resume(corpus, tmp_path / "run", log_every=2, keep_checkpoints=1)
    assert trainer.config.log_every == 2 and trainer.config.lr == 0.01


def test_resuming_refuses_other_data(corpus, tmp_path):
    from antransformer.data import prepare

    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} other words " * 200)
    prepare([tmp_path / "text"], tmp_path / "other", tokenizer="byte", val_fraction=0.6)
    config = run.resumed_config(tmp_path / "run", {"data": str(tmp_path / "other")})
    with pytest.raises(CheckpointError) as error:
        Trainer(config, Dataset.open(tmp_path / "other"), tmp_path / "run", Notes(), resume=True)
    assert mentions(error.value, tmp_path / "run", tmp_path / "other")


def test_a_vocabulary_smaller_than_the_data_is_refused(corpus, tmp_path):
    with pytest.raises(DataError) as error:
        start(corpus, tmp_path / "run", model={"vocab_size": 200})
    assert mentions(error.value, corpus, "model.vocab_size", 256, 200, 257)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_disk_that_fills_up_leaves_the_older_checkpoint_whole(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run")
    run_until(trainer, 7)
    # It goes on under a limit on file sizes that the weights exceed.
    resumed = [*command(corpus, tmp_path / "run"), "--resume"]
    second = subprocess.run(resumed, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert second.returncode == 1
    complaint = second.stderr.strip()
    assert "\n" not in complaint and mentions(complaint, 10, f"{tmp_path}/run/checkpoints/step-00000005")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000005").step == 5


def test_metrics_survive_a_line_cut_off_by_a_kill(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 10).run()
    before = losses(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert losses(tmp_path / "run") == before
    resume(corpus, tmp_path / "run")[0].run()
    assert losses(tmp_path / "run") == before


def test_tensorboard_events_are_written_when_asked_for(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(corpus, tmp_path / "run", tokens=256 * 5, tensorboard=True).run()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert "val_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_bfloat16_autocast_and_compile_train_to_about_the_same_losses(corpus, tmp_path, architecture):
    model = {"architecture": architecture}
    start(corpus, tmp_path / "plain", tokens=256 * 5, model=model).run()
    start(corpus, tmp_path / "half", tokens=256 * 5, model=model, precision="bfloat16").run()
    start(corpus, tmp_path / "compiled", tokens=256 * 5, model=model, compile=True).run()
    plain = list(losses(tmp_path / "plain").values())
    assert list(losses(tmp_path / "compiled").values()) == pytest.approx(plain, rel=1e-4)
    assert list(losses(tmp_path / "half").values()) == pytest.approx(plain, rel=2e-2)


def test_8_bits_are_simulated_on_a_cpu_and_train_to_about_the_same_losses(corpus, tmp_path):
    for precision in ("bfloat16", "fp8"):
        trainer = start(corpus, tmp_path / precision, precision=precision)
        assert sum("fp8" in note.lower() for note in trainer.reporter) == (precision == "fp8")
        run_until(trainer, 15)
    trainer, _ = resume(corpus, tmp_path / "fp8")
    trainer.run()
    half, eighth = losses(tmp_path / "bfloat16"), losses(tmp_path / "fp8")
    assert all(eighth[step] == pytest.approx(half[step], rel=0.01) for step in half)
    assert half != {step: eighth[step] for step in half}
    start(corpus, tmp_path / "whole", precision="fp8").run()
    assert losses(tmp_path / "whole") == eighth


class NoHostSync(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for: values, and shapes that depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("architecture", "optimizer"), OPTIMIZED)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_a_step_does_not_wait_for_the_device(corpus, tmp_path, monkeypatch, architecture, optimizer, precision):
    trainer = start(
        corpus,
        tmp_path / "run",
        architecture=architecture,
        optimizer=optimizer,
        precision=precision,
        micro_batch_size=4,
    )
    monkeypatch.setattr("antransformer.models.decoder.check_tokens", lambda *_: None)  # looks at ids on a CPU only
    with NoHostSync():
        for step in (1, 2):
            trainer.update(step)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()


def test_products_are_whole_where_openmp_starts_fewer_threads_than_torch_counts_on():
    code = (
        "import torch; from antransformer.training.device import choose_device; choose_device('cpu');"
        "a = torch.ones(256, 256, dtype=torch.bfloat16); print((a @ a).unique().tolist(), torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[256.0] 1"


def test_no_such_device_is_named():
    assert choose_device("cpu").type == "cpu"
    for name in ("tpu", "meta", "cuda:7" if torch.cuda.device_count() < 8 else "xla"):
        with pytest.raises(ConfigError) as error:
            choose_device(name)
        assert mentions(error.value, name)


@pytest.mark.parametrize(
    ("name", "parts"), [("auto", (4, 2, "--nproc-per-node")), ("cuda", (4, 2)), ("cuda:1", ("cuda:1", 4))]
)
def test_processes_have_a_device_each(monkeypatch, name, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError) as error:
        choose_device(name, local_rank=3, local_size=4)
    assert mentions(error.value, *parts)
    assert choose_device("cpu", local_rank=3, local_size=4) == torch.device("cpu")


def test_the_trainer_holds_a_plain_decoder(corpus, tmp_path):
    assert isinstance(start(corpus, tmp_path / "run", compile=True).model, Decoder)
