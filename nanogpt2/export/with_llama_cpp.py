"""A script: read a GGUF file by llama.cpp, continue the prompts greedily.

Its arguments: the folder, a JSON job {"prompts", "new", "context"}, the .npz file to write.
xllamacpp is llama.cpp's server as a package with a compiled wheel.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp


def main() -> None:
    """Write tokens and their log-probabilities, both (N, new): -1 and NaN where a text ended."""
    folder, asked, answered = sys.argv[1:]
    job = json.loads(Path(asked).read_text())
    options = xllamacpp.CommonParams()
    options.model.path = str(Path(folder) / "model.gguf")
    options.n_ctx, options.n_parallel, options.warmup = job["context"], 1, False
    # the cache's default of 16 bits would differ from the model by more than the weights do
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(options)
    tokens = np.full((len(job["prompts"]), job["new"]), -1)
    logprobs = np.full(tokens.shape, np.nan)
    for n, prompt in enumerate(job["prompts"]):
        found = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": job["new"],
                "temperature": 0.0,
                "n_probs": 1,
                "cache_prompt": False,
            }
        )
        if "choices" not in found:
            raise SystemExit(f"{found}")
        steps = found["choices"][0]["logprobs"]["content"]
        tokens[n, : len(steps)] = [step["id"] for step in steps]
        logprobs[n, : len(steps)] = [step["logprob"] for step in steps]
    np.savez(answered, tokens=tokens, logprobs=logprobs, version=np.array(version("xllamacpp")))


if __name__ == "__main__":
    main()
