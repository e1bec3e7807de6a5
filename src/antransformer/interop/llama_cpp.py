"""llama.cpp in this process, through the package xllamacpp."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antransformer.errors import MachineError
from antransformer.extras import require

HOST = "127.0.0.1"
MOST_CANDIDATES = 1000  # log-probabilities in one answer


def start_server(
    file: Path, port: int = 0, exact: bool = False, threads: int | None = None, name: str | None = None
) -> Any:
    """Load a GGUF file and serve it on 127.0.0.1.

    Args:
        file: GGUF file.
        port: port; 0 chooses a free one.
        exact: compute attention in float32, with keys and values in float32, on one CPU thread.
        threads: number of CPU threads; with None and not ``exact``, llama.cpp chooses.
        name: id of the model in requests and answers; None for the name of the file without its ending.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        MachineError: llama.cpp cannot load the file.
    """
    xllamacpp = require("xllamacpp", "serve")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.model_alias = {name or file.stem}  # without it, the id is the whole path
    params.hostnames = [HOST]
    params.port, params.verbosity, params.warmup = port, -1, False
    if exact:
        # Flash attention computes in float16 on CPUs.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.n_gpu_layers, threads = 0, 1
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise MachineError(f"llama.cpp cannot load {file}: {error}") from error


def next_token_log_probabilities(
    server: Any, prompt: Sequence[int], vocab_size: int, printable: int
) -> tuple[Tensor, Tensor]:
    """Return the most likely ids [k] after a prompt, in descending order, and their log-probabilities [k].

    The answer continues the prompt with the id ``printable``, since it has no log-probabilities for the end of text or
    for a token that is not complete UTF-8. The log-probabilities do not depend on this choice.
    """
    request = {"prompt": list(prompt), "max_tokens": 1, "temperature": -1.0, "cache_prompt": False}
    forced = {"logit_bias": [[printable, 1e9]], "n_probs": min(vocab_size, MOST_CANDIDATES)}
    answer = server.handle_completions({**request, **forced})
    if "choices" not in answer:
        raise MachineError(f"llama.cpp cannot continue a prompt: {answer.get('message', answer)}")
    candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids, values = zip(*((item["id"], item["logprob"]) for item in candidates), strict=True)
    return torch.tensor(ids), torch.tensor(values, dtype=torch.float64)


def complete(server: Any, prompt: Sequence[int], count: int) -> str:
    """Return the text of ``count`` tokens after a prompt, chosen greedily and continued past any end of text.

    Raises:
        MachineError: llama.cpp does not generate that many tokens.
    """
    request = {"prompt": list(prompt), "max_tokens": count, "temperature": -1.0, "cache_prompt": False}
    answer = server.handle_completions({**request, "ignore_eos": True})
    if answer.get("usage", {}).get("completion_tokens") != count:
        raise MachineError(f"llama.cpp cannot continue a prompt by {count} tokens: {answer.get('message', answer)}")
    text: str = answer["choices"][0]["text"]
    return text


def tokenize(server: Any, text: str) -> list[int]:
    """Return the ids of a text, in which special tokens are plain text."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    # The environment may name a proxy, which cannot reach this machine's own ports.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        ids: list[int] = json.load(answer)["tokens"]
    return ids
