"""llama.cpp with a mapped file, through llama-cpp-python's plain functions. Started by `capped_decode`.

Runs in any Python that has llama-cpp-python; needs nothing else of this repository's requirements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.rival_replies import print_replies, rival_options

CONTEXT_LENGTH, CHUNK = 256, 64


def main() -> None:
    options = rival_options(__doc__.splitlines()[0]).parse_args()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(options.weights.encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp cannot load {options.weights}"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT_LENGTH, CHUNK, CHUNK
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, settings)
    num_logits = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    print_replies(lambda prompt: greedy(context, num_logits, prompt), options)


def greedy(context: Any, num_logits: int, prompt: list[int]) -> Iterator[int]:
    """The likeliest tokens, one after the other, without end."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    ids = prompt
    while True:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points at them
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        assert code == 0, f"llama_decode answers {code}"
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(num_logits,))
        ids = [int(logits.argmax())]
        yield ids[0]


if __name__ == "__main__":
    main()
