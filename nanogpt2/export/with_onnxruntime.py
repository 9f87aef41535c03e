"""A script: run model.onnx by onnxruntime: a prompt, then one token a step with the cache.

Its arguments: the folder, a JSON job {"prompts", "tokens"}, the .npz file to write. tokens: those
that follow each prompt; the last one is not read.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    """Write logits, float32 (all tokens, V): those after the prompt and each token but the last."""
    folder, asked, answered = sys.argv[1:]
    job = json.loads(Path(asked).read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    # weights packed anew for speed would take the model's memory twice
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
    logits = []
    for prompt, tokens in zip(job["prompts"], job["tokens"], strict=True):
        cache = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in past.items()}
        start = 0
        for new in [prompt, *([token] for token in tokens[:-1])]:
            end = start + len(new)
            inputs = {
                "input_ids": np.array([new]),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(start, end)[None],
            }
            found = session.run(None, inputs | cache)
            logits.append(found[0][0, -1])
            cache = dict(zip(past, found[1:], strict=True))
            start = end
    np.savez(answered, logits=np.stack(logits), version=np.array(onnxruntime.__version__))


if __name__ == "__main__":
    main()
