"""The command line of `nanogpt2 export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nanogpt2.config import check_model, usage_error
from nanogpt2.config.flags import MISSING, check, flag
from nanogpt2.export.targets import TARGETS

DTYPES = tuple(dict.fromkeys(dtype for target in TARGETS.values() for dtype in target.dtypes))
# llama.cpp's and torch's names
SPELLED = {
    "f32": "float32",
    "fp32": "float32",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "q8": "q8_0",
}


@dataclass(frozen=True)
class ExportConfig:
    """nanogpt2 export MODEL --to TARGET --out DIR: write a model for other programs.

    MODEL is gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo or a path. TARGET: hf is a folder for
    transformers, vLLM and CTranslate2; gguf for llama.cpp and Ollama; onnx for onnxruntime; nanogpt
    for nanoGPT, llmc for llm.c. What was written is read back, compared with the model, and run by
    the other program where that is installed. DIR appears once it has passed.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "nanogpt2 export out --to gguf --out out-gguf --dtype q8_0",
        "nanogpt2 export gpt2 --to onnx --out gpt2-onnx",
        "nanogpt2 export demo --to hf --out demo-folder --dtype bfloat16",
    )
    GROUPS: ClassVar[dict[str, str]] = {"to": "what is written", "json": "output"}
    ALIASES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("output", "output_dir", "out_dir", "outfile", "save_dir", "o"), "out"),
        **dict.fromkeys(("outtype", "ftype", "type", "torch_dtype", "precision"), "dtype"),
        **dict.fromkeys(("format", "target", "framework", "export_format"), "to"),
    }
    HINTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("model_name", "model_name_or_path", "model_path", "m"),
            "MODEL stands by itself: export out --to gguf --out out-gguf",
        ),
        **dict.fromkeys(
            ("quantize", "quantization", "load_in_8bit", "int8"),
            "use --to gguf --dtype q8_0; int8 for nanogpt2 is `nanogpt2 quantize`",
        ),
        **dict.fromkeys(("gguf", "onnx", "hf"), "use --to gguf, onnx, hf, nanogpt or llmc"),
        **dict.fromkeys(("device", "cuda"), "an export runs on the CPU"),
        **dict.fromkeys(("task", "opset"), "export has one task, text with a cache, and opset 20"),
        **dict.fromkeys(
            ("force", "overwrite"), "nothing is overwritten: --out is a folder that is not there"
        ),
        "threads": "set them before the command: OMP_NUM_THREADS=4",
    }
    SECOND: ClassVar[str] = "the folder to write is --out"
    model: str = flag(MISSING, "the model", positional=True)
    to: str | None = flag(None, "the program to write for", choices=tuple(TARGETS))
    out: str | None = flag(None, "a new folder")
    dtype: str | None = flag(
        None, "the weights' type (default: float32); q8_0 is gguf's", choices=DTYPES
    )
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        check(self)
        if self.to is None:
            raise ValueError(f"to must be given: one of {', '.join(TARGETS)}")
        allowed = TARGETS[self.to].dtypes
        if self.dtype is not None and self.dtype not in allowed:
            raise ValueError(
                f"dtype must be {' or '.join(allowed)} with --to {self.to}, not {self.dtype}"
            )
        if self.out is None:
            raise ValueError("out must be given: a new folder")
        parent = Path(self.out).parent
        if not parent.is_dir():
            raise ValueError(f"out must be in a folder that is there, not in {str(parent)!r}")
        try:
            Path(self.out).lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ValueError(f"out {error}") from None
        raise ValueError(f"out must be a folder that is not there yet, not {self.out!r}")

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "ExportConfig":
        """Build the configuration from the flags that were given."""
        if "dtype" in given and given["dtype"] is not None:
            dtype = given["dtype"].lower()
            given["dtype"] = SPELLED.get(dtype, dtype)
        config = cls(**given)
        with usage_error("MODEL"):
            check_model(config.model)
        return config
