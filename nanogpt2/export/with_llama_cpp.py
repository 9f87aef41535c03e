"""A script: read a GGUF file by llama.cpp, continue the prompts greedily.

Its arguments: the folder, a JSON job {"prompts", "new", "context"}, the .npz file to write.
xllamacpp is llama.cpp's server as a package with a compiled wheel.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp


def main() -> None:
    """Write tokens (N, new), -1 behind a text that ended."""
    folder, asked, answered = sys.argv[1:]
    job = json.loads(Path(asked).read_text())
    options = xllamacpp.CommonParams()
    options.model.path = str(Path(folder) / "model.gguf")
    options.n_ctx, options.n_parallel, options.warmup = job["context"], 1, False
    # its threads wait by spinning, which stalls beside other programs
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    # the cache's default of 16 bits would differ from the model by more than the weights do
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(options)
    tokens = np.full((len(job["prompts"]), job["new"]), -1)
    for n, prompt in enumerate(job["prompts"]):
        found = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": job["new"],
                "temperature": 0.0,
                "cache_prompt": False,
                # the ids: the text leaves out bytes that are no UTF-8
                "return_tokens": True,
                "verbose": True,
            }
        )
        if "__verbose" not in found:
            raise SystemExit(f"{found}")
        new = found["__verbose"]["tokens"]
        tokens[n, : len(new)] = new
    np.savez(answered, tokens=tokens, version=np.array(version("xllamacpp")))


if __name__ == "__main__":
    main()
