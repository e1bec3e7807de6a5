"""The training loop: metrics, validation, precision, and runs that diverge."""

import math
import os
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antransformer.bounds import norms
from antransformer.data import Dataset, eval_batches
from antransformer.errors import DataError, DivergedError
from antransformer.models import Decoder, build
from antransformer.training.checkpointing import checkpoint
from antransformer.training.compilation import compiled_loss
from antransformer.training.config import resolve_config
from antransformer.training.cost_model import throughput
from antransformer.training.launch import disk_note
from antransformer.training.metrics import read_metrics
from helpers.messages import mentions
from helpers.small import SMALL
from helpers.trainers import ARCHITECTURES, OPTIMIZED, losses, resume, run_until, start, weights


def test_metrics_line_has_mean_loss_since_previous_line(corpus, tmp_path):
    more = {"tokens": 256 * 6, "checkpoint_every": 6, "eval_every": 6}
    start(corpus, tmp_path / "each", **more).run()
    start(corpus, tmp_path / "some", log_every=3, **more).run()
    each, some = losses(tmp_path / "each"), losses(tmp_path / "some")
    assert list(some) == [3, 6]
    for step, loss in some.items():
        assert loss == pytest.approx(sum(each[number] for number in (step - 2, step - 1, step)) / 3, rel=1e-6)


def test_speed_and_utilization_include_the_work_that_is_queued_on_the_device(corpus, tmp_path, monkeypatch):
    """Reading the losses waits for the device, here by a sleep, and counts as time of the steps."""
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    trainer = start(corpus, tmp_path, tokens=256 * 2)
    measure = trainer._measure

    def measure_slowly(pending):
        time.sleep(0.1)
        return measure(pending)

    trainer._measure = measure_slowly
    trainer.run()
    flops = throughput.flops_per_token(trainer.config.model)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["seconds"] >= 0.1 * line["step"]
        assert line["tokens_per_second"] <= 256 / 0.1
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e12, rel=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_run_learns_and_writes_metrics_and_checkpoints(corpus, tmp_path, architecture):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 60, model={"architecture": architecture}, eval_every=30)
    result = trainer.run()
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] == pytest.approx(math.log(257), rel=0.15)
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
    # The final checkpoint has the final weights, and its bounds hold.
    restored = checkpoint.restore(checkpoint.read(result.checkpoint), torch.device("cpu"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert all(norms(bound).max() <= 1 + 1e-6 for bound in restored.bounds())


def test_validation_loss_is_mean_over_windows_and_bits_count_bytes(corpus, tmp_path):
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


def test_seed_determines_the_run(corpus, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        start(corpus, tmp_path / name, tokens=256 * 5, seed=seed).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights(tmp_path / "a", 5) == weights(tmp_path / "b", 5)
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_gradient_accumulation_does_not_change_the_run(corpus, tmp_path):
    for name, micro_batch_size in (("full", 8), ("split", 3)):  # 3 + 3 + 2: the smaller last part has less weight
        start(corpus, tmp_path / name, tokens=256 * 8, micro_batch_size=micro_batch_size).run()
    full, split = losses(tmp_path / "full"), losses(tmp_path / "split")
    assert list(split.values()) == pytest.approx(list(full.values()), rel=1e-4)
    assert split != full  # the order of summation differs, so the parts were computed separately


def test_nan_loss_stops_the_run(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", log_every=4)
    loss, calls = trainer.loss, []

    def nan_once(tokens, targets):
        calls.extend([1] * torch.is_grad_enabled())  # validation calls it too
        return loss(tokens, targets) * (math.nan if len(calls) == 14 else 1)

    trainer.loss = nan_once
    with pytest.raises(DivergedError) as error:
        trainer.run()
    good = f"{tmp_path}/run/checkpoints/step-00000010"
    assert mentions(error.value, "loss", "nan", 14, good, "lr", "seed")
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000010").step == 10
    assert max(losses(tmp_path / "run")) <= 12


@pytest.mark.parametrize("dimensions", [1, 2])
def test_infinite_weights_are_never_saved(corpus, tmp_path, dimensions):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 3, checkpoint_every=1, log_every=1)
    step = trainer.optimizer.step

    def broken_step():
        step()
        if trainer.done == 1:  # the second update
            weight = next(weight for weight in trainer.model.parameters() if weight.ndim == dimensions)
            with torch.no_grad():
                weight.view(-1)[0] = math.inf

    trainer.optimizer.step = broken_step
    with pytest.raises(DivergedError) as error:
        trainer.run()
    assert mentions(str(error.value).lower(), "inf", 2, f"{tmp_path}/run/checkpoints/step-00000001")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]
    assert set(losses(tmp_path / "run")) == {1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_with_a_much_too_large_rate_of_the_vectors_is_diverged(corpus, tmp_path, architecture):
    trainer = start(corpus, tmp_path / "run", vector_lr=1e38, model={"architecture": architecture})
    with pytest.raises(DivergedError):
        trainer.run()
    assert not checkpoint.step_folders(tmp_path / "run/checkpoints")


def test_infinite_gradient_stops_the_run(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 5, log_every=5, checkpoint_every=5)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"\b(nan|inf)\b") as error:
        trainer.run()
    assert mentions(error.value, 1) and "grad" in str(error.value) and "step-0" not in str(error.value)


def test_data_outside_the_vocabulary_is_refused(corpus, tmp_path):
    with pytest.raises(DataError) as error:
        start(corpus, tmp_path / "run", model={"vocab_size": 200})
    assert mentions(error.value, corpus, "model.vocab_size", 256, 200, 257)


def test_a_disk_without_space_for_all_checkpoints_is_reported(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 2, checkpoint_every=1, keep_checkpoints=2)
    size = 12 * trainer.model.parameter_count()

    def note(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10 * size, free=free))
        return disk_note(trainer)

    assert note(3 * size) == ""
    assert mentions(note(3 * size - 1), "3 checkpoints", tmp_path / "run", "keep_checkpoints")
    trainer.run()  # leaves two checkpoints
    assert note(size) == "" and "1 checkpoint" in note(size - 1)


def test_metrics_are_flushed_to_the_disk_before_a_checkpoint(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 6, checkpoint_every=3)
    file, events = tmp_path / "run/metrics.jsonl", []
    fsync, save = os.fsync, trainer.writer.save

    def recorded_fsync(descriptor):
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            events.append(("flush", max(losses(tmp_path / "run"))))
        fsync(descriptor)

    def recorded_save(step, *arguments):
        events.append(("save", step))
        return save(step, *arguments)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    trainer.writer.save = recorded_save
    trainer.run()
    assert events == [("flush", 3), ("save", 3), ("flush", 6), ("save", 6)]


def test_incomplete_metrics_line_is_ignored(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 10).run()
    before = losses(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert losses(tmp_path / "run") == before
    resume(corpus, tmp_path / "run")[0].run()
    assert losses(tmp_path / "run") == before


def test_tensorboard_events_are_written(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(corpus, tmp_path / "run", tokens=256 * 5, tensorboard=True).run()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert "val_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_bfloat16_gives_about_the_same_losses(corpus, tmp_path, architecture):
    check_losses(corpus, tmp_path, architecture, 2e-2, precision="bfloat16")


@pytest.mark.parametrize("architecture", ["angpt", pytest.param("gpt+", marks=pytest.mark.slow)])
def test_compile_gives_about_the_same_losses(corpus, tmp_path, architecture):
    check_losses(corpus, tmp_path, architecture, 1e-4, compile=True)


def check_losses(corpus, folder, architecture, tolerance, **settings):
    """Compare the losses of five steps with those in float32, not compiled."""
    for name, changed in (("plain", {}), ("changed", settings)):
        start(corpus, folder / name, tokens=256 * 5, model={"architecture": architecture}, **changed).run()
    plain, other = (list(losses(folder / name).values()) for name in ("plain", "changed"))
    assert other == pytest.approx(plain, rel=tolerance)


def test_fp8_simulation_on_a_cpu_gives_about_the_same_losses(corpus, tmp_path):
    for precision in ("bfloat16", "fp8"):
        trainer = start(corpus, tmp_path / precision, precision=precision)
        assert sum("fp8" in note.lower() for note in trainer.reporter) == (precision == "fp8")
        run_until(trainer, 15)
    trainer, _ = resume(corpus, tmp_path / "fp8")
    trainer.run()
    bfloat16, fp8 = losses(tmp_path / "bfloat16"), losses(tmp_path / "fp8")
    assert all(fp8[step] == pytest.approx(bfloat16[step], rel=0.01) for step in bfloat16)
    assert bfloat16 != {step: fp8[step] for step in bfloat16}
    start(corpus, tmp_path / "uninterrupted", precision="fp8").run()
    assert losses(tmp_path / "uninterrupted") == fp8


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a GPU: on values, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("architecture", "optimizer"), OPTIMIZED)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_step_does_not_wait_for_the_device(corpus, tmp_path, monkeypatch, architecture, optimizer, precision):
    trainer = start(
        corpus,
        tmp_path / "run",
        architecture=architecture,
        optimizer=optimizer,
        precision=precision,
        micro_batch_size=4,
        ema=0.3,
    )
    monkeypatch.setattr("antransformer.models.decoder.check_tokens", lambda *_: None)  # it runs on a CPU only
    with NoHostSync():
        for step in (1, 2):
            trainer.update(step)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()


def failing_compiler(graph, inputs):
    raise RuntimeError("no compiler\nat all")


def compiler_of_training_only(graph, inputs):
    return graph if torch.is_grad_enabled() else failing_compiler(graph, inputs)


@pytest.mark.parametrize("compiler", [failing_compiler, compiler_of_training_only])
def test_a_failing_compiler_is_a_warning_and_the_run_goes_on(corpus, tmp_path, monkeypatch, compiler):
    start(corpus, tmp_path / "plain", tokens=256 * 3, compile=False).run()

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    trainer = start(corpus, tmp_path / "run", tokens=256 * 3, compile=True)
    assert [mentions(note, "torch.compile") for note in trainer.reporter] == [True]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_compiler_that_fails_for_single_blocks_is_a_warning_too():
    config = resolve_config({"model": SMALL, "batch_tokens": 64}, 257)
    model, notes = build(config.model), []
    for block in model.blocks:
        block.compile(backend=failing_compiler)
    loss = compiled_loss(model, config, torch.device("cpu"), torch.float32, 1, notes.append)
    assert len(notes) == 1
    tokens = torch.arange(8).view(1, 8)
    torch.testing.assert_close(loss(tokens, tokens), model.loss(tokens, tokens))


def test_a_run_compiles_nothing_after_its_start(corpus, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    trainer = start(corpus, tmp_path / "run", tokens=256 * 2, eval_tokens=512, compile=True)
    assert len(graphs) == 2  # with gradients and without
    trainer.run()
    assert len(graphs) == 2


def test_later_runs_of_a_process_are_compiled_too(monkeypatch):
    """torch compiles one function a few times only."""
    graphs, widths = [], (32, 64, 96)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in widths:
            config = resolve_config({"model": {**SMALL, "width": width}, "batch_tokens": 64}, 257)
            compiled_loss(build(config.model), config, torch.device("cpu"), torch.float32, 1, print)
    assert len(graphs) == 2 * len(widths)


def test_validation_uses_the_compiled_loss(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256, compile=True)
    compiled, calls = trainer.loss, []
    trainer.loss = lambda *batch: calls.append(torch.is_grad_enabled()) or compiled(*batch)
    trainer.evaluate()
    assert calls and not any(calls)


def test_compiled_trainer_has_a_plain_decoder(corpus, tmp_path):
    assert isinstance(start(corpus, tmp_path / "run", compile=True).model, Decoder)
