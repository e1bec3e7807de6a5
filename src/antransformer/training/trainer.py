"""The training loop, for one device and for each rank of distributed training (training/distributed/)."""

import contextlib
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from antransformer.bounds import bind
from antransformer.data import Dataset, Prefetcher, Split, eval_batches
from antransformer.errors import CheckpointError, DataError, DivergedError, RunStoppedError, WriteError
from antransformer.files import quoted
from antransformer.training import extension, metrics
from antransformer.training.averaging import WeightAverage
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.compilation import Loss, compiled_loss
from antransformer.training.config import LEGACY_DEFAULTS, MUTABLE_ON_RESUME, TrainConfig, to_mapping
from antransformer.training.cost_model import throughput
from antransformer.training.data import check_data, training_windows
from antransformer.training.device import autocast, choose_device, choose_precision, precision_note
from antransformer.training.distributed.parallel import (
    SINGLE_PROCESS,
    DistributedContext,
    full_tensor,
    make_model,
    set_gradient_sync,
)
from antransformer.training.learning_rates import peak_rates
from antransformer.training.metrics import MetricsLine, MetricsLog, Validation, mixed_validation
from antransformer.training.optimizer import make_optimizer
from antransformer.training.run_folder import CHECKPOINTS, open_checkpoint, resume_command, run_folder_of
from antransformer.training.samples import samples
from antransformer.training.stop_signals import StopSignals
from antransformer.training.threads import ThreadWatch, keep_freed_memory
from antransformer.training.trackers import open_trackers

# Ranks agree on the largest number that one of them reports: 0, a signal, or this number beyond all signals.
CHECKPOINT_FAILED = signal.NSIG


class Reporter(Protocol):
    """Receives progress callbacks of a run."""

    def step(self, step: int) -> None:
        """Called before the first step, and after each step is queued on the device."""

    def metrics(self, line: MetricsLine) -> None:
        """Called after a metrics line is written."""

    def log(self, text: str) -> None:
        """Called with a message of one line."""


@dataclass(frozen=True)
class Result:
    """Outcome of a finished run.

    Attributes:
        step: number of steps.
        val_loss: validation loss in nats per token.
        bits_per_byte: validation loss in bits per byte of text.
        tokens_per_second: mean training speed of the run.
        checkpoint: folder of the final checkpoint.
        val_loss_by_source: validation loss of each source of a mixture, otherwise empty.
    """

    step: int
    val_loss: float
    bits_per_byte: float
    tokens_per_second: float
    checkpoint: Path
    val_loss_by_source: Mapping[str, float] = field(default_factory=dict)


class Measurement(TypedDict, total=False):
    """Training loss and gradient norm since the previous metrics line; empty if all steps were skipped."""

    loss: float
    grad_norm: float


class Due(NamedTuple):
    """Work after a step; all of it needs a metrics line."""

    evaluate: bool
    save: bool
    sample: bool
    log: bool


class Trainer:
    """Trains one run, from the start or from its newest checkpoint.

    Args:
        config: complete settings.
        dataset: verified data.
        folder: run folder, as made by ``create_run_folder``.
        reporter: receives progress callbacks.
        resume: whether to continue from the newest complete checkpoint in the folder, if there is one.
        dist_ctx: ranks that train together. Rank 0 writes the metrics.

    Raises:
        ConfigError: the device does not exist, or the ranks cannot divide a batch evenly.
        DataError: the data does not fit the model.
        CheckpointError: the checkpoint belongs to another model or other data.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: Path,
        reporter: Reporter,
        resume: bool = False,
        dist_ctx: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        check_data(config, dataset)
        self.dist_ctx = dist_ctx = replace(dist_ctx, tensor_parallel=config.tensor_parallel, timeout=config.timeout)
        self.config, self.dataset, self.folder, self.reporter = config, dataset, folder, reporter
        windows = training_windows(config, dataset)
        self.batches = Prefetcher(windows, config.batch_size, dist_ctx.data_parallel_rank, dist_ctx.data_parallel_size)
        self.validation = dataset.split("val")  # text for probes
        self.device = choose_device(config.device, dist_ctx.local_rank, dist_ctx.local_world_size)
        keep_freed_memory(self.device)
        self.precision = choose_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = make_model(config, dist_ctx, self.device, self.precision)
        if config.document_mask:
            self.model.end_of_text = dataset.end_of_text
        if note := precision_note(config.precision, self.device):
            reporter.log(note)
        self.optimizer = make_optimizer(self.model, config)
        bind(self.model, self.optimizer)
        self.loss: Loss = self.model.loss
        if config.compile:
            sequences = min(config.micro_batch_size, config.batch_size // self.dist_ctx.data_parallel_size)
            self.loss = compiled_loss(self.model, config, self.device, self.precision, sequences, reporter.log)
        self.writer = checkpoint.CheckpointWriter(
            folder / CHECKPOINTS, config.keep_checkpoints, config.keep_every, dist_ctx
        )
        self.done, self.seconds = 0, 0.0  # completed steps, and the time that they took
        self.skipped = 0  # completed steps that were skipped
        saved = self._resume() if resume else None
        extension.require_rewarm_step(config, self.done, folder)
        if config.init is not None and not self.done:
            self._start_from(Path(config.init))
        self.average = WeightAverage(self.model, config.ema * config.steps) if config.ema else None
        if self.average is not None and saved is not None:
            checkpoint.load_weights(saved, "average", self.average.state_dict())
            self.average.updates = self.done - self.skipped
        self.peak = throughput.peak_flops(self.device, self.precision)
        self.flops_per_step = throughput.flops_per_token(config.model) * config.batch_tokens / dist_ctx.world_size

    def _resume(self) -> Checkpoint | None:
        """Restore model and optimizer from the newest checkpoint and return it; None if there is no checkpoint."""
        newest = checkpoint.newest(self.folder / CHECKPOINTS, self.reporter.log, self.dist_ctx)
        if newest is None:
            self.reporter.log(f"{self.folder}: no checkpoint yet, starting from step 0")
            return None
        extension.require_rewarm_step(self.config, newest.step, self.folder)
        self._check_same_run(newest)
        checkpoint.load_weights(newest, "model", self.model.state_dict())
        self.done = newest.step
        self.seconds, self.skipped = newest.extra["seconds"], newest.extra.get("skipped", 0)
        if self.skipped < self.done:  # otherwise the optimizer has no state yet
            checkpoint.load_optimizer(newest, self.model, self.optimizer)
        self.reporter.log(f"resuming from {newest.path}")
        return newest

    def _check_same_run(self, saved: Checkpoint) -> None:
        """Refuse a checkpoint whose model, data or settings are not those of this run."""
        if saved.model != self.config.model:
            raise CheckpointError(f"{saved.path}: its model differs from the one in config.yaml")
        if saved.extra.get("data") != self.dataset.digest:
            raise CheckpointError(
                f"{self.folder} was trained on other data than {self.config.data}: resume with its original data"
            )
        settings, seconds = saved.extra.get("settings"), saved.extra.get("seconds")
        skipped = saved.extra.get("skipped", 0)
        if (
            not isinstance(settings, dict)
            or (type(seconds) is not float or not 0 < seconds < math.inf)
            or (type(skipped) is not int or not 0 <= skipped <= saved.step)
        ):
            raise CheckpointError(f"{saved.path}: the state of the run in state.json is missing or damaged")
        settings = {**LEGACY_DEFAULTS, **settings}
        fixed, other = self._fixed_settings(), {*MUTABLE_ON_RESUME, *extension.LENGTH_SETTINGS, "model"}
        names = [item.name for item in fields(TrainConfig) if item.name not in other]
        changed = [name for name in names if settings.get(name) != fixed.get(name)]
        if changed or not extension.extends(self.config, settings, saved.step):
            raise CheckpointError(
                f"{saved.path}: {changed[0] if changed else 'tokens'} differs from the one in config.yaml: restore "
                "config.yaml"
            )

    def _start_from(self, init: Path) -> None:
        initial, tokenizer = open_checkpoint(init, self.reporter.log, self.dist_ctx)
        if initial.model != self.config.model:
            raise CheckpointError(f"{initial.path}: its model differs from the one in the settings")
        if tokenizer.encoding_rules() != self.dataset.tokenizer().encoding_rules():
            raise DataError(
                f"{self.config.data}: its tokenizer or end-of-text token differs from {init}'s: prepare it "
                f"with --tokenizer {quoted(run_folder_of(initial))}"
            )
        checkpoint.load_weights(initial, initial.inference_kind, self.model.state_dict())
        self.reporter.log(f"starting from the weights of {initial.path}")

    def run(self, profiler: profile | None = None) -> Result:
        """Train to the end of the budget.

        Args:
            profiler: entered for the run; its ``step`` is called after each training step.

        Raises:
            RunStoppedError: SIGINT, SIGTERM or SIGHUP arrived; the checkpoint is written.
            DivergedError: the loss, a gradient or a weight is NaN or Inf.
            WriteError, MachineError: a checkpoint or the metrics could not be written.
        """
        config = self.config
        trackers = [] if self.dist_ctx.rank else open_trackers(config, self.folder, self.done)
        log = None if self.dist_ctx.rank else MetricsLog(self.folder, self.done, trackers=trackers)
        pending: list[tuple[Tensor, Tensor]] = []  # kept on the device, since reading them waits for it
        line: MetricsLine | None = None
        signals = StopSignals(None if self.dist_ctx.rank else "finishing the step and saving; Ctrl-C to stop at once")
        self.reporter.step(self.done)
        try:
            self._make_up(log)
            started, first = time.perf_counter(), self.done
            watch = ThreadWatch(self.device, self.reporter.log, compiled=self.config.compile is True)
            with signals, watch, profiler or contextlib.nullcontext(), self.writer:
                while self.done < config.steps:
                    pending += self.update(self.done + 1)
                    self.done += 1
                    watch.update()  # first, since a change of the threads changes the time left
                    self.reporter.step(self.done)
                    if profiler is not None:
                        profiler.step()
                    stopping = self._agree_to_stop(signals)
                    due = self._due(stopping)
                    if not any(due):
                        continue
                    measured = self._measure(pending)  # before the clock is read, since it waits for the device
                    pending.clear()
                    elapsed = time.perf_counter() - started
                    self.seconds += elapsed
                    line = self._line(measured, (self.done - first) * config.batch_tokens / elapsed)
                    self._report(due, line, log)
                    path = self._save() if due.save else None
                    if stopping:
                        self.writer.wait()
                        raise RunStoppedError(
                            f"stopped at step {self.done} by {stopping.name}; checkpoint saved to {path}; "
                            f"continue with: {resume_command(self.folder, self.dist_ctx)}",
                            stopping,
                        )
                    started, first = time.perf_counter(), self.done
        except KeyboardInterrupt:
            if signals.received:
                raise self._interrupted(signals.received) from None
            raise
        finally:
            if log is not None:
                log.close()
        return self._result(line)

    def _interrupted(self, received: signal.Signals) -> RunStoppedError:
        """Return the error of a second signal, which stops a run before it has saved."""
        saved = max(checkpoint.step_folders(self.folder / CHECKPOINTS), key=checkpoint.step_of, default=None)
        advice = f"continue with: {resume_command(self.folder, self.dist_ctx)}"
        if saved is None:
            outcome = "no checkpoint was written, and there is no earlier one"
        elif checkpoint.step_of(saved) == self.done:
            outcome = f"checkpoint saved to {saved}; {advice}"
        else:
            outcome = f"no checkpoint of step {self.done} was written; the newest is {saved}; {advice}"
        return RunStoppedError(f"stopped at once by a second {received.name}: {outcome}", received, at_once=True)

    def _agree_to_stop(self, signals: "StopSignals") -> signal.Signals | None:
        """Signal for which all ranks stop after this step; None to continue.

        Raises:
            WriteError: a rank could not write its part of a checkpoint.
        """
        if self.done == self.config.steps:
            return None
        # A signal may arrive at any moment, so it is read once.
        received = self.dist_ctx.all_reduce_max(CHECKPOINT_FAILED if self.writer.failed() else signals.received or 0)
        if received == CHECKPOINT_FAILED:
            self.writer.wait()
        return signal.Signals(received) if received else None

    def _due(self, stopping: signal.Signals | None) -> Due:
        """Work that is due after the completed step."""
        config, last = self.config, self.done == self.config.steps
        intervals = (config.checkpoint_every, config.keep_every or config.checkpoint_every)
        return Due(
            evaluate=last or (self.done % config.eval_every == 0 and stopping is None),
            save=last or stopping is not None or not all(self.done % interval for interval in intervals),
            sample=config.sample_every is not None and self.done % config.sample_every == 0 and stopping is None,
            log=self.done % config.log_every == 0,
        )

    def _report(self, due: Due, line: MetricsLine, log: MetricsLog | None) -> None:
        """Add what is due to a metrics line, and write it.

        Raises:
            DivergedError: a weight or the validation loss is NaN or Inf.
        """
        # The last update may have spoiled the weights, which must not be saved then.
        self._require_finite("largest row norm", line["largest_row_norm"])
        self._require_finite("mean residual step size", line["mean_alpha"] or 0.0)
        if self.dist_ctx.all_reduce_max(not metrics.has_finite_weights(self.model)):
            raise self._not_finite(f"a weight is NaN or Inf at step {self.done}")
        line.update(self._validation_and_samples(due.evaluate, due.sample))  # type: ignore[typeddict-item]
        if log is not None:
            log.write(line, flush=due.save)  # a power loss must not leave a checkpoint without its metrics
        self.reporter.metrics(line)

    def _validation_and_samples(self, evaluate: bool, sample: bool) -> dict[str, Any]:
        added: dict[str, Any] = {}
        if evaluate:
            added |= self.evaluate()
            self._require_finite("validation loss", added["val_loss"])
        if sample:
            added["samples"] = samples(self.model, self.average, self.dataset, self.dist_ctx.rank == 0)
        return added

    def _make_up(self, log: MetricsLog | None) -> None:
        """Add the validation and the samples that a stop left out to the metrics line of its step."""
        due, line = self._due(None), log.last if log is not None else {}
        missing = line.get("step") == self.done < self.config.steps
        evaluate = self.dist_ctx.all_reduce_max(missing and due.evaluate and "val_loss" not in line)
        sample = self.dist_ctx.all_reduce_max(missing and due.sample and "samples" not in line)
        added = self._validation_and_samples(bool(evaluate), bool(sample))
        if added and log is not None:
            log.complete(added)

    def update(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Take one optimizer step.

        Returns:
            Mean loss of this rank's share of the batch, and gradient norm of the full batch before clipping, on the
            device. Empty if the step was skipped, with weights and optimizer state unchanged.

        Raises:
            DivergedError: the loss or a gradient is NaN or Inf, and no more steps may be skipped.
        """
        config = self.config
        with record_function("data"):
            batch = self.batches.batch(step - 1)
        micro_batches = list(zip(*(tokens.split(config.micro_batch_size) for tokens in batch), strict=True))
        total = torch.zeros((), device=self.device)
        for number, (tokens, targets) in enumerate(micro_batches, start=1):
            set_gradient_sync(self.model, number == len(micro_batches))
            with autocast(self.device, self.precision):
                # Weighted by size, since the last micro-batch may be smaller.
                weight = len(tokens) / len(batch[0])
                loss = self.loss(self._to_device(tokens), self._to_device(targets)) * weight
            loss.backward()
            total += loss.detach()
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(step, group["initial_lr"])
        skip = config.max_skipped_steps > 0 and self._skips(step, total, grad_norm)
        if not skip:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad()
        return [] if skip else [(total, grad_norm)]

    def _skips(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether all ranks skip this step, because one of them has a NaN or Inf loss or gradient.

        This waits for the device, so it is called only if steps may be skipped.
        """
        finite = bool(torch.stack([loss, grad_norm]).isfinite().all())
        if not self.dist_ctx.all_reduce_max(not finite):
            return False
        allowed = self.config.max_skipped_steps
        if self.skipped >= allowed:
            raise self._not_finite(f"NaN or Inf loss or gradient at step {step}, after {allowed} skipped steps")
        self.skipped += 1
        self.reporter.log(f"skipped step {step}: NaN or Inf loss or gradient ({self.skipped} of {allowed})")
        return True

    @torch.no_grad()
    def evaluate(self) -> Validation:
        """Validation loss over about ``eval_tokens`` tokens of each source, in evenly spaced windows of its split.

        With ``ema`` it is the loss of the averaged weights.
        """
        splits = {name: source.split("val") for name, source in self.dataset.sources.items()}
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            losses = {name: self._validation_loss(split) for name, split in splits.items()}
        validation = mixed_validation(losses, splits, self.dataset.weights)
        return {**validation, "val_loss_by_source": losses} if len(losses) > 1 else validation

    def _validation_loss(self, split: Split) -> float:
        """Mean loss in nats per token over evenly spaced windows of a split; all ranks call this together."""
        dist_ctx, context = self.dist_ctx, self.config.model.context
        rank, size = dist_ctx.data_parallel_rank, dist_ctx.data_parallel_size
        total, count = torch.zeros((), dtype=torch.float64), 0
        sequences = min(self.config.micro_batch_size * size, self.config.batch_size)  # as many as a step may have
        batches = eval_batches(split, context, sequences, self.config.eval_tokens)
        for tokens, targets in batches:
            # A rank without a window of its own computes the first one, since sharded models need all ranks.
            share = slice(rank, None, size) if rank < len(tokens) else slice(1)
            with autocast(self.device, self.precision):
                loss = self.loss(self._to_device(tokens[share]), self._to_device(targets[share]))
            if rank < len(tokens):
                total += loss.cpu().double() * tokens[share].numel()  # in this order: MPS has no float64
            count += tokens.numel()
        return float(dist_ctx.all_reduce_sum(total)) / (count * dist_ctx.tensor_parallel)

    def _line(self, measured: Measurement, tokens_per_second: float) -> MetricsLine:
        alpha = metrics.mean_alpha(self.model)
        steps_per_second = tokens_per_second / self.config.batch_tokens
        line: MetricsLine = {
            "step": self.done,
            "tokens": self.done * self.config.batch_tokens,
            **measured,  # type: ignore[typeddict-item]  # it has no keys beyond its own
            "lr": self.config.lr_at(self.done, peak_rates(self.config).vectors),
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": steps_per_second * self.flops_per_step / self.peak if self.peak else None,
            "largest_row_norm": float(metrics.largest_row_norm(self.model)),
            "mean_alpha": None if alpha is None else float(alpha),
            "seconds": round(self.seconds, 3),
        }
        if self.config.max_skipped_steps:
            line["skipped"] = self.skipped
        return line

    def _measure(self, pending: list[tuple[Tensor, Tensor]]) -> Measurement:
        """Mean loss over all ranks and steps since the previous line, and gradient norm of the last step.

        Raises:
            DivergedError: one of them is NaN or Inf.
        """
        if not pending:
            return {}
        local_values = torch.stack([torch.stack(pair) for pair in pending])
        values = self.dist_ctx.all_reduce_sum(local_values) / self.dist_ctx.world_size
        for step, pair in enumerate(values.tolist(), self.done - len(pending) + 1):
            for name, value in zip(("loss", "gradient norm"), pair, strict=True):
                if not math.isfinite(value):
                    raise self._not_finite(f"the {name} is {value} at step {step}")
        return {"loss": float(values[:, 0].mean()), "grad_norm": float(pending[-1][1])}

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._not_finite(f"the {name} is {value} at step {self.done}")

    def _not_finite(self, problem: str) -> DivergedError:
        with contextlib.suppress(WriteError):
            self.writer.wait()
        good = checkpoint.newest(self.folder / CHECKPOINTS, self.reporter.log, self.dist_ctx)
        return DivergedError(
            f"{problem}; last good checkpoint: {good.path if good else 'none'}; try a lower lr, or another seed"
        )

    def _fixed_settings(self) -> dict[str, Any]:
        """Settings that must not change when the run resumes, without the model's."""
        settings = to_mapping(self.config)
        return {name: value for name, value in settings.items() if name not in (*MUTABLE_ON_RESUME, "model")}

    def _save(self) -> Path:
        extra = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "data": self.dataset.digest,
            "settings": self._fixed_settings(),
            "torch": torch.__version__,
        }
        average = None if self.average is None else self.average.state_dict()
        return self.writer.save(self.done, self.model, self.optimizer, extra, average)

    def _result(self, line: MetricsLine | None) -> Result:
        if line is not None and "val_loss" in line:
            validation: Validation = {"val_loss": line["val_loss"], "bits_per_byte": line["bits_per_byte"]}
            if "val_loss_by_source" in line:
                validation["val_loss_by_source"] = line["val_loss_by_source"]
        else:  # the run was already complete
            validation = self.evaluate()
        path = max(checkpoint.step_folders(self.folder / CHECKPOINTS), key=checkpoint.step_of)
        tokens_per_second = self.done * self.config.batch_tokens / self.seconds
        return Result(self.done, tokens_per_second=tokens_per_second, checkpoint=path, **validation)

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.to(self.device)
