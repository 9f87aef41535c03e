"""The targets of an export: the types they store, the shapes they hold, the packages they need.

A field of config.json that a format has no place for must have GPT-2's own value. Imports no torch.

Sources: llama.cpp src/models/gpt2.cpp; nanoGPT model.py; llm.c train_gpt2.py; transformers'
modeling_gpt2.py.
"""

from dataclasses import dataclass

from nanogpt2.config import GPTConfig
from nanogpt2.config.flags import show

# where shapes of GPT-2 differ, and OpenAI's value
SHAPE = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
WIDE = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """A format. The first of `dtypes` is the default; `holds`: the fields that may have any value.

    needs: packages to import. module: what writes and checks it, in nanogpt2.export.
    """

    module: str
    dtypes: tuple[str, ...]
    holds: tuple[str, ...]
    needs: tuple[str, ...] = ()


TARGETS = {
    "hf": Target("hf_folder", WIDE, tuple(SHAPE)),
    "gguf": Target(
        "gguf_file",
        (*WIDE, "q8_0"),
        ("n_inner", "layer_norm_epsilon", "tie_word_embeddings"),
        ("gguf",),
    ),
    "onnx": Target("onnx_file", ("float32",), tuple(SHAPE), ("onnx", "onnxscript", "onnxruntime")),
    # its GELU is exact, and a tanh one is close to that: run.py notes it
    "nanogpt": Target("nanogpt_file", ("float32",), ("activation_function",)),
    "llmc": Target("llmc_file", ("float32", "bfloat16"), ()),
}


def refuse(config: GPTConfig, to: str) -> None:
    """Raise ValueError for the first field whose value the target cannot hold."""
    for name, plain in SHAPE.items():
        value = getattr(config, name, plain)
        if name == "n_inner" and value == 4 * config.n_embd:
            value = plain
        if value != plain and name not in TARGETS[to].holds:
            raise ValueError(f"has {name} {show(value)}, which --to {to} cannot hold")
