"""Data of a run: checked against its model, and divided into training batches."""

from antransformer.data import Dataset, ShuffledWindows
from antransformer.data.batches import Windows
from antransformer.data.mixed_windows import MixedWindows, Stage
from antransformer.data.mixture import Mixture
from antransformer.errors import DataError
from antransformer.files import quoted
from antransformer.training.config import TrainConfig


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Check that the data fits the model.

    Raises:
        DataError: a token id is outside the vocabulary, a split is shorter than one window of the context, or
            documents have to be kept apart and a split has no end-of-text token.
    """
    for source in dataset.sources.values():
        for name, split in source.splits.items():
            ShuffledWindows(split, config.model.context, config.seed)
            if config.document_mask and not split.documents:
                raise DataError(
                    f"{source.path}: document_mask needs end-of-text tokens, and the {name} split has none: leave it "
                    "out, or prepare the data with its own tokenizer"
                )
    if dataset.max_token >= config.model.vocab_size:
        advice = f"set model.vocab_size to {dataset.vocab_size}, or leave it out"
        if config.init:  # its vocabulary cannot change
            advice = f"prepare the data with --tokenizer {quoted(config.init)}"
        raise DataError(
            f"{config.data}: token id {dataset.max_token} is outside the model's vocabulary of "
            f"{config.model.vocab_size}: {advice}"
        )


def epochs_note(config: TrainConfig, dataset: Dataset) -> str:
    """Say how often a run reads its text, if more than once; a mixture reads each source at its own rate."""
    epochs = config.steps * config.batch_tokens / dataset.split("train").tokens
    if epochs <= 1 or isinstance(dataset, Mixture):
        return ""
    return f", {epochs:,.1f} epochs of {dataset.split('train').tokens:,} tokens"


def training_windows(config: TrainConfig, dataset: Dataset) -> Windows:
    """Windows of every step, as a function of the seed; raises the errors of ``ShuffledWindows``."""
    windows = [
        ShuffledWindows(source.split("train"), config.model.context, config.seed, config.shuffle)
        for source in dataset.sources.values()
    ]
    if not isinstance(dataset, Mixture):
        return windows[0]
    starts = (0, config.data_from_step * config.batch_size)
    stages = [Stage(start, weights) for start, weights in zip(starts, dataset.stages, strict=False)]
    return MixedWindows(windows, stages, config.seed)
