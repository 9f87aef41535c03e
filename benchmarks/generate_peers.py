"""Arms of bench_generate: ours, transformers, CTranslate2, llama.cpp and nanoGPT's cacheless loop.

All use the same weights: each is made from a folder that `nanogpt2.save_model` wrote and offers

    generate(prompt, new, seed, **options)    the ids of `new` tokens that follow the prompt's ids
    steps(prompt, new, seed, **options)       the seconds of each step, the prompt's reading first;
                                              None where the library does not say when a step ends

The options have transformers' names. A constructor raises MissingError, with a one-line reason, if
a library is not installed or cannot do the task. Libraries are imported only when an arm is made,
because memory is measured above that of `import torch`.

Arms that are timed side by side run `Apart`. With CTranslate2's threads in the same process, OpenMP
lets torch's threads sleep between any two operations, and a step of ours took twice as long.

CTranslate2's converter reads transformers' folder itself; llama.cpp's file is written as by
`nanogpt2 export`.
"""

import importlib
import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

# our names -> GGUF's, inside and outside the layers


class MissingError(Exception):
    """Raised with the reason if an arm cannot be made here."""


class DiedError(Exception):
    """Raised if the process of an arm has ended by itself."""


def need(module: str):
    """Import an optional module. Raises MissingError if the module is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingError("not installed") from None


class Apart:
    """An arm in its own daemon process, with as many threads as this process."""

    def __init__(self, factory: Callable, folder: Path) -> None:
        """factory: makes the arm from the folder; its exceptions are raised here."""
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._arm = f"{factory}"
        arguments = (theirs, factory, folder, torch.get_num_threads())
        spawn.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        self._answer()

    def generate(self, *arguments, **options) -> list[int]:
        self._pipe.send(("generate", arguments, options))
        return self._answer()

    def steps(self, *arguments, **options) -> list[float] | None:
        self._pipe.send(("steps", arguments, options))
        return self._answer()

    def _answer(self):
        try:
            found = self._pipe.recv()
        except EOFError:
            raise DiedError(f"the process of {self._arm} has died") from None
        if isinstance(found, Exception):
            raise found
        return found


def _serve(pipe, factory: Callable, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        arm = factory(folder)
        pipe.send(None)
        while True:
            name, arguments, options = pipe.recv()
            pipe.send(getattr(arm, name)(*arguments, **options))
    except EOFError:
        pass  # the parent process has ended
    except Exception as error:
        # forward every exception to the parent process, which raises it
        pipe.send(error)


class Clock:
    """A stopping criterion that ends nothing, for ours and transformers': it notes each step."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, ids: Tensor, scores: object, **kwargs) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def steps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]


class Ours:
    """nanogpt2.generate; `quantize` is load_generator's, `noise` an option of generate."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: str = "float32",
        quantize: str | None = None,
        noise: str = "hf",
        compiled: bool = False,
    ) -> None:
        """compiled: as after `nanogpt2 tune --compile`, else as before it."""
        from nanogpt2 import load_generator
        from nanogpt2.cpu import native
        from nanogpt2.cpu.malloc import large_blocks_apart

        if compiled:
            native.compile_library()
        self._as_told = (
            nullcontext if compiled else partial(patch.object, native, "library", lambda: None)
        )
        with self._as_told(), large_blocks_apart():  # as sample.py does
            self.model = load_generator(folder, device, dtype, quantize)
        self.noise = noise

    def generate(self, prompt: list[int], new: int, seed: int = 0, **options) -> list[int]:
        from nanogpt2 import generate

        with self._as_told():
            found = generate(
                self.model,
                torch.tensor([prompt]),
                max_new_tokens=new,
                seed=seed,
                noise=self.noise,
                **options,
            )
        return found.sequences[0, len(prompt) :].tolist()

    def steps(self, *arguments, **options) -> list[float]:
        clock = Clock()
        self.generate(*arguments, **options, stopping_criteria=[clock])
        return clock.steps()

    @torch.no_grad()
    def cache(self, prompt: list[int], new: int, **options) -> object:
        """The cache after prefill of a prompt, with room for `new` tokens."""
        from nanogpt2 import GenerationConfig
        from nanogpt2.generation.engine import Engine
        from nanogpt2.generation.request import prepare

        config = GenerationConfig(max_new_tokens=new, **options)
        device = self.model.wte.weight.device
        request = prepare(self.model.config, device, config, torch.tensor([prompt]))
        engine = Engine(self.model, request)
        engine.next_scores(request.ids.repeat_interleave(request.rows, dim=0))
        weights = ("_model", "_layers", "_prepared")
        return {name: x for name, x in vars(engine.decoder).items() if name not in weights}


class Transformers:
    """GPT2LMHeadModel.generate; `static`: a fixed-size cache and, on a GPU, a compiled model."""

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

    def steps(self, prompt: list[int], new: int, seed: int = 0, **options) -> list[float]:
        clock = Clock()
        torch.manual_seed(seed)
        self._output(prompt, new, **options, stopping_criteria=[clock])
        return clock.steps()

    def cache(self, prompt: list[int], new: int, **options) -> object:
        """The cache after a prompt and `new` tokens."""
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
    """nanoGPT's loop, which rereads the whole text for every token. One row, greedy or top-k."""

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
    """CTranslate2's Generator, greedy or with beams, on the output of its own converter."""

    def __init__(self, folder: Path, weights: str = "float32") -> None:
        library = need("ctranslate2")
        made = folder / "ctranslate2"
        if not made.exists():
            need("transformers")
            # convert in a subprocess, to keep its threads out of this process
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
            min_length=new,  # so that no row ends early
            max_length=new,
            include_prompt_in_result=False,
        )
        return found.sequences_ids[0]

    def steps(self, *arguments, **options) -> None:
        # its callback is not called with beams
        return None


class LlamaCpp:
    """llama.cpp through llama-cpp-python, greedy, one row; `weights` is float32 or Q8_0."""

    def __init__(self, folder: Path, weights: str = "float32") -> None:
        library = need("llama_cpp")
        need("gguf")
        from nanogpt2.export import gguf_file
        from nanogpt2.export.run import opened

        made = folder / weights
        if not made.exists():
            made.mkdir()
            gguf_file.write(opened(str(folder), "gguf", weights.lower()), made)
        threads = torch.get_num_threads()
        self.model = library.Llama(
            str(made / gguf_file.FILE),
            n_ctx=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def generate(self, prompt: list[int], new: int, seed: int = 0) -> list[int]:
        # reset, or generation would continue the last call's text
        self.model.reset()
        tokens: Iterator[int] = self.model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(new), strict=False)]
