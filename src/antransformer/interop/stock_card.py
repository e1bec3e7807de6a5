"""Model card of a folder in a standard architecture: how to run it in each engine, and what fine-tuning loses."""

from collections.abc import Sequence
from pathlib import Path

from antransformer.data import Tokenizer
from antransformer.interop.model_card import EVALUATION, EXPERIMENT, evaluation_rows, model_facts, training_facts
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.defaults import parameter_count
from antransformer.training.run_folder import run_folder_of

LABELS = {"exaone4": "EXAONE-4", "qwen3": "Qwen3"}

PAGE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- antransformer
- {architecture}
---

# {name}

A language model with {parameters:,} parameters, trained with antransformer
([arXiv:2505.22014](https://arxiv.org/abs/2505.22014)). It continues text. It was not trained to follow instructions.

Only the layout of the tensors is that of {label}. The weights are this model's own: nothing in this folder comes from
the makers of {label}, and their licence does not apply to it.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```

| engine | command |
|---|---|
| vLLM | `vllm serve {name} --dtype {dtype}` |
| MLX | `mlx_lm.generate --model {name} --prompt Once` |
| llama.cpp | `llama-server -m {name}.gguf`, with the file of `antransformer export --format gguf` |
| ollama | `ollama create {name} -f Modelfile`, where the Modelfile is `FROM ./{name}.gguf` |

The model was trained on sequences of up to {context:,} tokens. In training, `{end}` (id {end_id}) separated documents.
Put this id before a prompt that begins a document. The tokenizer adds no tokens.

The export was {verification}.
{limits}
## Training

| | |
|---|---|
{facts}
{evaluation}{experiment}"""

LIMITS = """
This folder is for inference. The interpolation of the residual stream is multiplied into the weights, and the bounds on
the norms of weight rows no longer hold, so fine-tuning it would not be training with the method. Fine-tune the folder
of `antransformer export --format native`. The root of the epsilon of all norms is large on purpose. Load the weights
in float32 or bfloat16; for float16 export with `--dtype float16`, which chooses scales that do not overflow.
"""


def stock_card(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    name: str,
    dtype: str,
    layout: str,
    verification: str,
    summary: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """Return the text of README.md.

    Args:
        checkpoint: verified checkpoint.
        tokenizer: tokenizer of its run.
        name: name of the model.
        dtype: dtype of the exported weights.
        layout: exaone4 or qwen3.
        verification: result of the check of the weights.
        summary: summary of the experiment that the run belongs to.
        figures: file names of the experiment's figures.

    Raises:
        CheckpointError: evaluation.json is broken.
    """
    config, folder = checkpoint.model, run_folder_of(checkpoint)
    facts = [*model_facts(config, tokenizer, dtype), *training_facts(checkpoint, folder)]
    rows = list(evaluation_rows(folder, checkpoint.step))
    images = "".join(f"\n![{Path(figure).stem}]({figure})\n" for figure in figures)
    return PAGE.format(
        name=name,
        architecture=config.architecture,
        label=LABELS[layout],
        dtype=dtype,
        parameters=parameter_count(config),
        context=config.context,
        end=tokenizer.decode([tokenizer.end_of_text]),
        end_id=tokenizer.end_of_text,
        verification=verification,
        limits=LIMITS if layout == "exaone4" else "",
        facts="\n".join(f"| {label} | {text} |" for label, text in facts),
        evaluation=EVALUATION.format(rows="\n".join(rows)) if rows else "",
        experiment=EXPERIMENT.format(summary=summary, figures=images) if summary else "",
    )
