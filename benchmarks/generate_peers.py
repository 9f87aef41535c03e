"""Who continues a text beside us, on the same weights: transformers, CTranslate2, llama.cpp, and
nanoGPT's way without a cache.

Each is made from a folder that `nanogpt2.save_model` wrote and offers

    generate(prompt, new, seed, **options)    the ids of `new` tokens after those of a prompt

where the options have transformers' names. A constructor raises MissingError, with a line for the
person, where a library is not installed or cannot do it. Nothing is imported before it is needed:
memory is measured above what `import torch` takes.

Arms that are timed beside one another live `Apart`. CTranslate2's threads in the same process make
OpenMP let torch's sleep between any two operations, and a step of ours took twice as long.

Sources: CTranslate2's converter reads transformers' folder itself. For llama.cpp a GGUF file is
written here, by the format's specification (ggml docs/gguf.md) and the names of the gguf package.
"""

import importlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# ours -> GGUF's, for the layers and for what stands around them
GGUF_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


class MissingError(Exception):
    """An arm that cannot be made here, and why."""


def need(module: str):
    """Import what may not be installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingError("not installed") from None


class Apart:
    """An arm in a process of its own, with as many threads as this one; it ends with this one."""

    def __init__(self, factory: Callable, folder: Path) -> None:
        """factory: makes the arm from the folder; what it raises is raised here."""
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._arm = f"{factory}"
        arguments = (theirs, factory, folder, torch.get_num_threads())
        spawn.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        self._answer()

    def generate(self, *arguments, **options) -> list[int]:
        self._pipe.send((arguments, options))
        return self._answer()

    def _answer(self):
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self._arm} has died") from None
        if isinstance(found, Exception):
            raise found
        return found


def _serve(pipe, factory: Callable, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        arm = factory(folder)
        pipe.send(None)
        while True:
            arguments, options = pipe.recv()
            pipe.send(arm.generate(*arguments, **options))
    except EOFError:
        pass  # the process that asked is gone
    except Exception as error:
        # of whatever kind: it is raised where the arm was asked
        pipe.send(error)


class Ours:
    """nanogpt2.generate; `quantize` is load_generator's, `noise` an option of generate."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: str = "float32",
        quantize: str | None = None,
        noise: str = "hf",
    ) -> None:
        from nanogpt2 import load_generator
        from nanogpt2.cpu.malloc import large_blocks_apart

        with large_blocks_apart():  # as sample.py does
            self.model = load_generator(folder, device, dtype, quantize)
        self.noise = noise

    def generate(self, prompt: list[int], new: int, seed: int = 0, **options) -> list[int]:
        from nanogpt2 import generate

        found = generate(
            self.model,
            torch.tensor([prompt]),
            max_new_tokens=new,
            seed=seed,
            noise=self.noise,
            **options,
        )
        return found.sequences[0, len(prompt) :].tolist()

    @torch.no_grad()
    def cache(self, prompt: list[int], new: int, **options) -> object:
        """What is kept of a prompt that has been read, with room for `new` tokens."""
        from nanogpt2 import GenerationConfig
        from nanogpt2.generation.engine import Engine
        from nanogpt2.generation.request import prepare

        config = GenerationConfig(max_new_tokens=new, **options)
        device = self.model.wte.weight.device
        request = prepare(self.model.config, device, config, torch.tensor([prompt]))
        engine = Engine(self.model, request)
        engine.next_scores(request.ids.repeat_interleave(request.rows, dim=0))
        weights = ("_model", "_layers")
        return {name: x for name, x in vars(engine.decoder).items() if name not in weights}


class Transformers:
    """GPT2LMHeadModel.generate; `static` with a cache of fixed size, which it compiles on a GPU."""

    def __init__(
        self, folder: Path, device: str = "cpu", dtype: str = "float32", static: bool = False
    ) -> None:
        transformers = need("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model.to(device).eval()
        self.more = {"cache_implementation": "static"} if static else {}

    def generate(self, prompt: list[int], new: int, seed: int = 0, **options) -> list[int]:
        torch.manual_seed(seed)
        return self._output(prompt, new, **options).sequences[0, len(prompt) :].tolist()

    def cache(self, prompt: list[int], new: int, **options) -> object:
        """What is kept of a text of a prompt and `new` tokens."""
        return self._output(prompt, new, **options).past_key_values

    def _output(self, prompt: list[int], new: int, **options):
        ids = torch.tensor([prompt], device=self.model.device)
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            pad_token_id=0,  # no row ends early
            return_dict_in_generate=True,
            **self.more,
            **options,
        )


class WithoutCache:
    """nanoGPT's way: the whole text is read again for every token. One row, greedy or top-k."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from benchmarks.peers import NanoGPT

        self.model, self.device = NanoGPT(folder, device).model.eval(), device

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        new: int,
        seed: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
    ) -> list[int]:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.device)
        for _ in range(new):
            logits = self._last_logits(ids)  # (1, V)
            if do_sample:
                logits = logits / temperature
                logits[logits < logits.topk(top_k)[0][:, -1:]] = -torch.inf
                token = torch.multinomial(logits.softmax(1), 1)
            else:
                token = logits.argmax(1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
        return ids[0, len(prompt) :].tolist()

    def _last_logits(self, ids: Tensor) -> Tensor:
        model = self.model
        h = model.wte(ids) + model.wpe(torch.arange(ids.size(1), device=ids.device))  # (1, T, C)
        for layer in model.h:
            h = layer(h)
        return F.linear(model.ln_f(h[:, -1]), model.wte.weight)


CONVERT = """
import sys
from ctranslate2.converters import TransformersConverter
TransformersConverter(sys.argv[1]).convert(sys.argv[2])
"""


class CTranslate2:
    """Its Generator, greedy or with beams, on what its own converter makes of the folder."""

    def __init__(self, folder: Path, weights: str = "float32") -> None:
        library = need("ctranslate2")
        made = folder / "ctranslate2"
        if not made.exists():
            need("transformers")
            # apart, or its threads would come beside torch's
            program = [sys.executable, "-c", CONVERT, str(folder), str(made)]
            subprocess.run(program, check=True, stderr=subprocess.DEVNULL)
        self.generator = library.Generator(
            str(made), compute_type=weights, intra_threads=torch.get_num_threads()
        )
        self.tokens = json.loads((made / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompt: list[int], new: int, seed: int = 0, num_beams: int = 1) -> list[int]:
        (found,) = self.generator.generate_batch(
            [[self.tokens[i] for i in prompt]],
            beam_size=num_beams,
            min_length=new,  # no end before
            max_length=new,
            include_prompt_in_result=False,
        )
        return found.sequences_ids[0]


class LlamaCpp:
    """llama.cpp through llama-cpp-python, greedy, one row; `weights` is float32 or Q8_0."""

    def __init__(self, folder: Path, weights: str = "float32") -> None:
        library = need("llama_cpp")
        file = folder / f"{weights}.gguf"
        if not file.exists():
            write_gguf(folder, file, weights)
        threads = torch.get_num_threads()
        self.model = library.Llama(
            str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def generate(self, prompt: list[int], new: int, seed: int = 0) -> list[int]:
        # or it would go on from the last call's text
        self.model.reset()
        tokens: Iterator[int] = self.model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(new), strict=False)]


def write_gguf(folder: Path, file: Path, weights: str) -> None:
    """Write a folder's model as llama.cpp's format, its matrices in float32 or Q8_0."""
    gguf = need("gguf")
    from nanogpt2 import load_model

    model = load_model(folder)
    c = model.config
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    writer.add_token_merges([line for line in merges if not line.startswith("#version")])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.bos_token_id)
    for name, tensor in gguf_tensors(model.state_dict().items()):
        array = tensor.detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if weights == "Q8_0" and array.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our names -> GGUF's. Its matrices are [out, in] as ours are, and the head is tied as well."""
    for name, tensor in state:
        place, _, kind = name.rpartition(".")
        if place.startswith("h."):
            _, layer, part = place.split(".", 2)
            yield f"blk.{layer}.{GGUF_NAMES[part]}.{kind}", tensor
        else:
            yield f"{GGUF_NAMES[place]}.{kind}", tensor
