"""A script: read a folder by transformers, encode the texts, score and continue the prompts.

Its arguments: the folder, a JSON job {"texts", "prompts", "new"}, the .npz file to write.
"""

import json
import sys

import numpy as np
import torch
import transformers


def main() -> None:
    """Write logits (N, V) after each prompt, tokens (N, new) padded with -1, and `encodes`."""
    folder, asked, answered = sys.argv[1:]
    with open(asked) as file:  # noqa: PTH123
        job = json.load(file)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()
    logits, tokens = [], []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits.append(model(ids).logits[0, -1].numpy())
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(1, job["new"]),
                do_sample=False,
                pad_token_id=0,
            )
        new = found[0, len(prompt) :].tolist()[: job["new"]]
        tokens.append(new + [-1] * (job["new"] - len(new)))
    encodes = True
    if job["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encodes = [
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in job["texts"]
        ] == job["ids"]
    np.savez(
        answered,
        logits=np.stack(logits),
        tokens=np.array(tokens),
        encodes=np.array(encodes),
        version=np.array(transformers.__version__),
    )


if __name__ == "__main__":
    main()
