"""The export to ONNX that docs/generation.md shows, run by onnxruntime."""

import re

import pytest
import torch
from reference import ROOT

from nanogpt2.config import GPTConfig
from nanogpt2.model import GPT

SHAPES = [(1, 1), (2, 2), (3, 7), (1, 16)]


def documented():
    """The code blocks of the docs' section, with tiny models for gpt2."""
    text = (ROOT / "docs/generation.md").read_text().split("## ONNX")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [0, 1], ids=["dynamo", "the older exporter"])
def test_every_shape_has_the_models_logits(tmp_path, monkeypatch, block):
    import onnxruntime

    shape = GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=3, n_embd=24)
    model = GPT(shape).eval()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt2.load_model", lambda name: model, raising=False)
    exec(documented()[block], {})
    session = onnxruntime.InferenceSession("gpt2.onnx")
    for size in SHAPES:
        ids = torch.randint(11, size)
        with torch.no_grad():
            expected = model(ids)
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
