"""A plain text scored by lm_eval, as the reference for ``antransformer.evaluate(run, texts=...)``."""

from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import ConfigurableTask

from antransformer.interop import lm_eval_adapter
from antransformer.interop.evaluate import Result, parse_scores
from antransformer.interop.export import transformers_model, transformers_tokenizer
from antransformer.interop.local_tasks import documents
from antransformer.training.run_folder import open_checkpoint

AGGREGATIONS = {
    "word_perplexity": weighted_perplexity,
    "byte_perplexity": weighted_perplexity,
    "bits_per_byte": "bits_per_byte",
}


def score_text(run, path, batch_size=8, progress=lambda done, total: None):
    """Result of lm_eval for the documents of a file, with the metrics of its task wikitext."""
    config = {
        "task": str(path),
        "custom_dataset": lm_eval_adapter.loader(documents(path)),
        "test_split": "local",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in AGGREGATIONS.items()
        ],
    }
    manager = lm_eval_adapter.task_manager(False)
    tasks = lm_eval_adapter.with_defaults(manager.load([ConfigurableTask(config=config)]))
    checkpoint, tokenizer = open_checkpoint(run)
    model = transformers_model(checkpoint, tokenizer)
    scorer = lm_eval_adapter.Scorer(model, transformers_tokenizer(tokenizer, checkpoint.model.context), batch_size)
    scores = list(parse_scores(scorer.score(tasks, None, progress)))
    return Result(str(path), str(path), scores, scorer.total, scorer.cut)
