"""The training loop, the same on one device and in each of many processes (training/parallel.py)."""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from antransformer.bounds import bind
from antransformer.data import Dataset, Prefetcher, ShuffledWindows, eval_batches
from antransformer.errors import CheckpointError, DataError, DivergedError, RunStoppedError, WriteError
from antransformer.training import metrics
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import LEGACY_DEFAULTS, MUTABLE_ON_RESUME, TrainConfig, to_mapping
from antransformer.training.cost_model import throughput
from antransformer.training.device import autocast, choose_device, choose_precision
from antransformer.training.distributed.parallel import (
    SINGLE_PROCESS,
    DistributedContext,
    full_tensor,
    make_model,
    set_gradient_sync,
)
from antransformer.training.optimizer import make_optimizer
from antransformer.training.run_folder import CHECKPOINTS, open_checkpoint, run_folder_of
from antransformer.training.schedule import learning_rate

CHECKPOINT_FAILED = (
    signal.NSIG
)  # beyond all signals, which the processes tell each other of: a checkpoint could not be written


class Reporter(Protocol):
    """Hears of a run's progress; the command line shows it."""

    def step(self, step: int) -> None:
        """A step was queued on the device."""

    def line(self, line: dict[str, Any]) -> None:
        """A metrics line was written."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


@dataclass(frozen=True)
class Result:
    """How a run ended. Losses in nats per token, over the validation windows."""

    step: int
    val_loss: float
    bits_per_byte: float
    tokens_per_second: float
    checkpoint: Path


class Trainer:
    """One run, from its newest checkpoint or from the start, to its end.

    Args:
        config: complete settings.
        dataset: verified data.
        folder: the run folder, laid out by ``run.create``.
        reporter: hears of progress.
        resume: go on from the newest whole checkpoint in the folder, if there is one.
        dist_ctx: the processes that train together; the first of them writes.

    Raises:
        ConfigError: no such device, or the processes can not share a batch evenly.
        DataError: the data does not fit the model.
        CheckpointError: the checkpoint is of another model or other data.
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
        windows = ShuffledWindows(dataset.split("train"), config.model.context, config.seed)
        self.batches = Prefetcher(windows, config.batch_size, dist_ctx.data_parallel_rank, dist_ctx.data_parallel_size)
        self.validation = dataset.split("val")
        self.device = choose_device(config.device, dist_ctx.local_rank, dist_ctx.local_world_size)
        self.precision = choose_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = make_model(config, dist_ctx, self.device, self.precision)
        if config.precision == "fp8" and self.device.type == "cpu":
            reporter.note("fp8 is simulated on a CPU: its rounding is that of a GPU, its speed is not")
        self.optimizer = make_optimizer(self.model, config)
        bind(self.model, self.optimizer)
        self.loss: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(self.model.loss) if config.compile and dist_ctx.world_size == 1 else self.model.loss
        )
        self.writer = checkpoint.CheckpointWriter(
            folder / CHECKPOINTS, config.keep_checkpoints, config.keep_every, dist_ctx
        )
        self.done, self.seconds = 0, 0.0  # completed steps; time spent in them
        self.skipped = 0  # of the steps, those that changed nothing
        if resume:
            self._resume()
        if config.init is not None and not self.done:
            self._start_from(Path(config.init))
        self.peak = throughput.peak_flops(self.device, self.precision)
        self.flops_per_step = throughput.flops_per_token(config.model) * config.batch_tokens

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder / CHECKPOINTS, self.reporter.note, self.dist_ctx)
        if found is None:
            self.reporter.note(f"{self.folder}: no checkpoint yet, starting from step 0")
            return
        if found.model != self.config.model:
            raise CheckpointError(f"{found.path}: of another model than config.yaml describes")
        if found.extra.get("data") != self.dataset.digest:
            raise CheckpointError(
                f"{self.folder} was trained on other data than {self.config.data}: resume with the data it began with"
            )
        settings, seconds = found.extra.get("settings"), found.extra.get("seconds")
        skipped = found.extra.get("skipped", 0)
        if (
            not isinstance(settings, dict)
            or (type(seconds) is not float or not 0 < seconds < math.inf)
            or (type(skipped) is not int or not 0 <= skipped <= found.step)
        ):
            raise CheckpointError(f"{found.path}: what the run wrote of itself into state.json is missing or damaged")
        before = {**LEGACY_DEFAULTS, **settings}
        changed = [name for name, value in self._identity().items() if before.get(name) != value]
        if changed or found.step > self.config.steps:
            raise CheckpointError(
                f"{found.path}: written with another {changed[0] if changed else 'tokens'} than config.yaml has now: "
                "put config.yaml back as it was"
            )
        checkpoint.load_model(found, self.model)
        if skipped < found.step:  # else the optimizer had nothing to keep yet
            checkpoint.load_optimizer(found, self.model, self.optimizer)
        self.done, self.seconds, self.skipped = found.step, seconds, skipped
        self.reporter.note(f"resuming from {found.path}")

    def _start_from(self, init: Path) -> None:
        found, tokenizer = open_checkpoint(init, self.reporter.note, self.dist_ctx)
        if found.model != self.config.model:
            raise CheckpointError(f"{found.path}: of another model than the settings describe")
        if tokenizer.vocabulary() != self.dataset.tokenizer().vocabulary():
            raise DataError(
                f"{self.config.data}: prepared with another tokenizer than {init} has: prepare it with "
                f"--tokenizer {run_folder_of(found)}"
            )
        checkpoint.load_model(found, self.model)
        self.reporter.note(f"starting from the weights of {found.path}")

    def run(self, profiler: profile | None = None) -> Result:
        """Train to the end of the budget.

        Args:
            profiler: watches, and hears of the end of every step.

        Raises:
            RunStoppedError: SIGINT or SIGTERM came; the checkpoint is written.
            DivergedError: the loss, a gradient or a weight is not finite.
            WriteError, MachineError: a checkpoint, or the metrics, could not be written.
        """
        config, dist_ctx = self.config, self.dist_ctx
        log = None if dist_ctx.rank else metrics.MetricsLog(self.folder, self.done, config.tensorboard)
        pending: list[tuple[Tensor, Tensor]] = []  # not looked at yet: looking waits for the device
        started, counted = time.perf_counter(), self.done
        line: dict[str, Any] = {}
        self.reporter.step(self.done)
        try:
            with StopSignals() as stop, profiler or contextlib.nullcontext(), self.writer:
                while self.done < config.steps:
                    pending += self.update(self.done + 1)
                    self.done += 1
                    self.reporter.step(self.done)
                    if profiler is not None:
                        profiler.step()
                    last = self.done == config.steps
                    # Read once, since a signal may come at any moment; every process stops at the same step.
                    received = (
                        0
                        if last
                        else dist_ctx.all_reduce_max(CHECKPOINT_FAILED if self.writer.failed() else stop.received or 0)
                    )
                    if received == CHECKPOINT_FAILED:
                        self.writer.wait()
                    stopping = signal.Signals(received) if received else None
                    evaluate = last or (self.done % config.eval_every == 0 and not stopping)
                    due = (config.checkpoint_every, config.keep_every or config.checkpoint_every)
                    save = last or stopping or not all(self.done % every for every in due)
                    if not (evaluate or save or self.done % config.log_every == 0):
                        continue
                    measured = self._require_finite(pending)
                    elapsed = time.perf_counter() - started
                    self.seconds += elapsed
                    speed = (self.done - counted) * config.batch_tokens / elapsed
                    line = self._line(measured, speed)
                    if evaluate:
                        line |= self.evaluate()
                    self._require_finite_weights(line)
                    pending.clear()
                    if log is not None:
                        log.write(line)
                    self.reporter.line(line)
                    if save:
                        path = self._save()
                    if stopping:
                        self.writer.wait()
                        raise RunStoppedError(
                            f"stopped at step {self.done} by {stopping.name}; checkpoint written to {path}; "
                            f"go on with: antransformer train --out {self.folder} --resume",
                            stopping,
                        )
                    started, counted = time.perf_counter(), self.done
        finally:
            if log is not None:
                log.close()
        return self._result(line)

    def update(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """One optimizer step.

        Returns:
            The mean loss of this process's share of the batch, and the gradient norm of all before clipping, on the
            device; nothing where the step was skipped, and left weights and moments as they were.

        Raises:
            DivergedError: no more steps may be skipped.
        """
        config = self.config
        with record_function("data"):
            batch = self.batches.batch(step - 1)
        parts = list(zip(*(tokens.split(config.micro_batch_size) for tokens in batch), strict=True))
        total = torch.zeros((), device=self.device)
        for number, (part, target) in enumerate(parts, start=1):
            set_gradient_sync(self.model, number == len(parts))
            with autocast(self.device, self.precision):
                loss = self.loss(self._to_device(part), self._to_device(target)) * (len(part) / len(batch[0]))
            loss.backward()
            total += loss.detach()
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step, group["initial_lr"])
        skip = config.max_skipped_steps > 0 and self._skips(step, total, grad_norm)
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return [] if skip else [(total, grad_norm)]

    def _rate(self, step: int, peak: float) -> float:
        config = self.config
        return learning_rate(
            step, config.steps, peak, warmup_fraction=config.warmup_fraction, min_lr_ratio=config.min_lr_ratio
        )

    def _skips(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether all processes leave this step out, because one of them found its loss or the gradients not finite.

        They wait for the device to know that, as they do not where no step may be skipped.
        """
        finite = bool(torch.stack([loss, grad_norm]).isfinite().all())
        if not self.dist_ctx.all_reduce_max(not finite):
            return False
        allowed = self.config.max_skipped_steps
        if self.skipped == allowed:
            raise self._not_finite(f"a loss or gradient is not finite at step {step}, beyond the {allowed} to skip")
        self.skipped += 1
        self.reporter.note(f"step {step} is skipped: a loss or gradient is not finite ({self.skipped} of {allowed})")
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation loss in nats per token, and in bits per byte of the text."""
        dist_ctx, context = self.dist_ctx, self.config.model.context
        rank, size = dist_ctx.data_parallel_rank, dist_ctx.data_parallel_size
        total, count = torch.zeros((), dtype=torch.float64), 0
        batches = eval_batches(self.validation, context, self.config.micro_batch_size * size, self.config.eval_tokens)
        for tokens, targets in batches:
            mine = slice(rank, None, size) if rank < len(tokens) else slice(1)
            with autocast(self.device, self.precision):
                loss = self.model.loss(self._to_device(tokens[mine]), self._to_device(targets[mine]))
            if rank < len(tokens):  # else it only went along: the processes compute together or not at all
                total += loss.double().cpu() * tokens[mine].numel()
            count += tokens.numel()
        loss_per_token = float(dist_ctx.all_reduce_sum(total)) / (count * dist_ctx.tensor_parallel)
        tokens_per_byte = self.validation.tokens / self.validation.bytes
        return {"val_loss": loss_per_token, "bits_per_byte": loss_per_token * tokens_per_byte / math.log(2)}

    def _line(self, measured: dict[str, float], tokens_per_second: float) -> dict[str, Any]:
        alpha = metrics.mean_alpha(self.model)
        steps_per_second = tokens_per_second / self.config.batch_tokens
        return {
            "step": self.done,
            "tokens": self.done * self.config.batch_tokens,
            **measured,
            "lr": self._rate(self.done, self.config.lr),
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": steps_per_second * self.flops_per_step / self.peak if self.peak else None,
            "largest_row_norm": float(metrics.largest_row_norm(self.model)),
            "mean_alpha": None if alpha is None else float(alpha),
            "seconds": round(self.seconds, 3),
            **({"skipped": self.skipped} if self.config.max_skipped_steps else {}),
        }

    def _require_finite(self, pending: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Look at losses and gradient norms of the steps since the last line, unless all of them were skipped.

        Returns:
            The mean loss of these steps over all processes, and the gradient norm of the last.
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

    def _require_finite_weights(self, line: dict[str, Any]) -> None:
        """What the last update made of the weights, before they are written or reported."""
        for key, name in (("largest_row_norm", "largest row norm"), ("val_loss", "validation loss")):
            if not math.isfinite(line.get(key, 0.0)):
                raise self._not_finite(f"the {name} is {line[key]} at step {self.done}")

    def _not_finite(self, what: str) -> DivergedError:
        with contextlib.suppress(WriteError):
            self.writer.wait()
        good = checkpoint.newest(self.folder / CHECKPOINTS, self.reporter.note, self.dist_ctx)
        return DivergedError(
            f"{what}; last good checkpoint: {good.path if good else 'none yet'}; try a lower --lr, or another --seed"
        )

    def _identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one; the model's are compared by themselves."""
        settings = to_mapping(self.config)
        return {name: value for name, value in settings.items() if name not in (*MUTABLE_ON_RESUME, "model")}

    def _save(self) -> Path:
        extra = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "data": self.dataset.digest,
            "settings": self._identity(),
            "torch": torch.__version__,
        }
        return self.writer.save(self.done, self.model, self.optimizer, extra)

    def _result(self, line: dict[str, Any]) -> Result:
        if "val_loss" not in line:  # nothing was left to train
            line = line | self.evaluate()
        path = max(checkpoint.step_folders(self.folder / CHECKPOINTS), key=checkpoint.step_of)
        speed = self.done * self.config.batch_tokens / self.seconds
        return Result(self.done, line["val_loss"], line["bits_per_byte"], speed, path)

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.to(self.device)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is noted in ``received``; a second one takes its usual course."""

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse data with token ids that the model has no row for, or without a window of its context in a split.

    Raises:
        DataError: naming both sizes.
    """
    for split in ("train", "val"):
        ShuffledWindows(dataset.split(split), config.model.context, config.seed)
    if dataset.max_token >= config.model.vocab_size:
        raise DataError(
            f"{config.data}: token id {dataset.max_token} is outside the model's vocabulary of "
            f"{config.model.vocab_size}: set model.vocab_size to {dataset.vocab_size}, or leave it out"
        )
