"""The command line of `nanogpt2 serve`."""

from dataclasses import dataclass
from typing import Any, ClassVar

from nanogpt2.config import DEVICES, DTYPES, KERNELS, SCHEMES, check_model, usage_error
from nanogpt2.config.flags import check, flag

LOOPBACK = "127.0.0.1"
LEAST_KEY = 8  # characters


@dataclass(frozen=True)
class ServeConfig:
    """python -m nanogpt2.serve [flags]: a GPT-2 over HTTP, with OpenAI's API, and a page.

    Open http://127.0.0.1:8000/ in a browser, or give OpenAI's client the base_url
    http://127.0.0.1:8000/v1. One request runs at a time. Nobody outside this machine can connect,
    unless --host and --api_key are given.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "python -m nanogpt2.serve --model demo",
        "python -m nanogpt2.serve --model out --compare_model gpt2",
        "python -m nanogpt2.serve --host 0.0.0.0 --api_key A-LONG-SECRET",
    )
    GROUPS: ClassVar[dict[str, str]] = {
        "model": "the model",
        "host": "who may connect",
        "max_tokens": "limits",
    }
    ALIASES: ClassVar[dict[str, str]] = {
        "model_name_or_path": "model",
        "model_name": "model",
        "compare": "compare_model",
        "torch_dtype": "dtype",
        "quantization": "quantize",
        "listen": "host",
        "server_name": "host",  # gradio
        "server_port": "port",
        "p": "port",
    }
    HINTS: ClassVar[dict[str, str]] = {
        "m": "the model is --model",
        "served_model_name": "a model is called what --model says",
        **dict.fromkeys(
            ("max_model_len", "ctx_size", "n_ctx", "c"),
            "the context is the model's; the oldest tokens are dropped",
        ),
        **dict.fromkeys(
            ("max_num_seqs", "parallel", "np", "workers", "num_workers"),
            "one request runs at a time; --queue N may wait",
        ),
        **dict.fromkeys(
            ("allowed_origins", "cors", "cors_allow_origins", "allow_credentials", "allowed_hosts"),
            "no page of another site may call the server",
        ),
        **dict.fromkeys(
            ("ssl_keyfile", "ssl_certfile", "ssl_key_file", "ssl_cert_file"),
            "put a proxy that speaks TLS before the server",
        ),
        **dict.fromkeys(("tensor_parallel_size", "tp"), "the server runs on one device"),
        "share": "use --host 0.0.0.0 --api_key A-LONG-SECRET",
        "api_keys": "use --api_key A-LONG-SECRET",
        "chat_template": "the model's own is used; train.py --task chat writes it",
        "n_predict": "a request says max_tokens; --max_tokens is the most",
        "threads": "set them before the command: OMP_NUM_THREADS=4",
        "ngl": "use --device cuda: all layers go there",
        "n_gpu_layers": "use --device cuda: all layers go there",
        "gpu": "use --device cuda",
        "cpu": "use --device cpu",
        "fp16": "use --dtype float16, or --quantize fp16 on a CPU",
        "load_in_8bit": "use --quantize int8",
        "seed": "each request has its own: seed",
        "temperature": "each request has its own: temperature",
        "open": "open the address that is printed",
        "reload": "start the server again",
    }
    SECOND: ClassVar[str] = "the model is --model NAME"
    model: str = flag(
        "gpt2",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, USER/NAME of the hub, or a path: a folder, "
        "or a file of safetensors, PyTorch (.bin, .pt) or llm.c",
    )
    compare_model: str | None = flag(
        None, "a second model, to compare with; it answers requests too"
    )
    device: str = flag("auto", "where to run", choices=DEVICES)
    dtype: str = flag("float32", "the weights' type", choices=DTYPES)
    quantize: str | None = flag(None, "narrow the weights, on a CPU", choices=SCHEMES)
    kernels: str = flag("auto", "the implementation; auto: triton on a GPU", choices=KERNELS)
    host: str = flag(LOOPBACK, "the address to listen on; any but this needs --api_key")
    port: int = flag(8000, "the port; 0 is any free one", low=0, high=65535)
    api_key: str | None = flag(None, "what a client must send as Authorization: Bearer KEY")
    max_tokens: int = flag(2048, "the most new tokens of a text", low=1)
    queue: int = flag(64, "requests that may wait; a further one is answered 429", low=1)

    def __post_init__(self) -> None:
        check(self)
        if self.quantize and self.dtype != "float32":
            raise ValueError(f"quantize must come with dtype float32, not {self.dtype}")
        if self.host != LOOPBACK and self.api_key is None:
            raise ValueError(f"host must be {LOOPBACK} without --api_key, not {self.host!r}")
        key = self.api_key
        if key is not None and not (len(key) >= LEAST_KEY and key.isascii() and key.isprintable()):
            raise ValueError(f"api_key must be {LEAST_KEY} or more plain characters")
        if key is not None and " " in key:
            raise ValueError("api_key must not contain a space")
        if self.model == self.compare_model:
            raise ValueError(f"compare_model must be another model than --model, {self.model!r}")

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "ServeConfig":
        """Build the configuration from the flags that were given."""
        for name in ("model", "compare_model"):
            with usage_error(f"--{name}"):
                check_model("gpt2" if given.get(name) is None else given[name])
        return cls(**given)
