"""Continue a text with a GPT-2: python sample.py "Once upon a time".

The command line -> the model and its tokenizer -> the prompt -> text, as it is made. What is not
the lesson (streaming beams, many prompts, the prompt loop) is in nanogpt2/cli/.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from nanogpt2 import terminal
from nanogpt2.config import SampleConfig, fail, parse, wrong_use
from nanogpt2.presets import TASKS

if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    terminal.prepare()
    CONFIG = parse(SampleConfig, sys.argv[1:])
    if CONFIG.list_presets:
        print(
            terminal.table([["preset", "what it does"], *((n, t.about) for n, t in TASKS.items())])
        )
        sys.exit()

from nanogpt2.cli import compare, text
from nanogpt2.cli.interactive import Conversation, run_interactive
from nanogpt2.cli.one import Show, decode_texts, note_dropped, note_outgrown, request_for
from nanogpt2.cli.prompts import Job, read_prompts, run_prompts
from nanogpt2.generation.explain import colour, draw, explain
from nanogpt2.generation.tree import BeamTree
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer
from nanogpt2.weights import choose_device, load_model, load_tokenizer


def main(config: SampleConfig) -> None:
    """Read the prompt, load the model, print the texts."""
    prompts = read(config)
    with wrong_use("--device"):
        device = choose_device(config.device)
    with wrong_use("--model"):
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, device, config.dtype)
    # a seed of our own where none is given, so that any text can be made again
    seed = config.generation.seed
    options = replace(
        config.generation, seed=int.from_bytes(os.urandom(7)) if seed is None else seed
    )
    config = replace(config, generation=options)
    template = TASKS[config.preset].template if config.preset else "{}"
    try:
        if config.interactive:
            run_interactive(Conversation(model, tokenizer, options, template), prompts[0])
            return
        prompts = [template.format(prompt) for prompt in prompts]
        if config.prompts is not None:
            job = Job(config.batch_size, config.unique)
            for found in run_prompts(model, tokenizer, prompts, options, job):
                print(json.dumps(found), flush=True)
        elif config.compare is not None:
            with wrong_use("--compare"):
                other = load_model(config.compare, device, config.dtype)
                if load_tokenizer(config.compare) is not tokenizer:
                    raise ValueError(f"{config.compare!r} has another vocabulary than --model")
            show_comparison(config, model, other, tokenizer, prompts[0])
        else:
            show_texts(config, model, tokenizer, prompts[0])
    except ValueError as error:
        fail(f"--{error}")
    except OSError as error:
        # what could not be written is not tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail(str(error), code=1)


def read(config: SampleConfig) -> list[str]:
    """Return the prompts: one, unless --prompts is given."""
    if config.prompts is not None:
        with wrong_use("--prompts"):
            return read_prompts(config.prompts, config.skip_bad)
    if config.prompt_file is None and config.prompt != "-":
        return [config.prompt]
    with wrong_use("PROMPT" if config.prompt_file is None else "--prompt_file"):
        where = config.prompt_file or "standard input"
        data = Path(where).read_bytes() if config.prompt_file else sys.stdin.buffer.read()
        try:
            return [data.decode("utf-8").removeprefix("\ufeff").removesuffix("\n")]
        except UnicodeDecodeError as error:
            byte = data[error.start]
            raise ValueError(
                f"{where!r} is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
            ) from None


def show_texts(config: SampleConfig, model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    """Print the prompt and its texts: the first one as it is made, the others after it.

    Raises ValueError for a prompt that leaves no room, and for an option that cannot be.
    """
    request = request_for(model, tokenizer, [prompt], config.generation)
    note_dropped(request, model.config.block_size)
    streams = not (config.json or config.explain or config.color)
    tree = BeamTree(request.prompt_length) if config.tree else None
    screen = terminal.Screen() if streams and tree is None else None
    count = config.generation.num_return_sequences
    openings = [f"--- {i + 1} of {count} ---\n" if count > 1 else "" for i in range(count)]
    show = Show(screen, openings[0] + prompt, tree=tree)
    (texts,) = decode_texts(model, tokenizer, [prompt], request, show)
    if screen is not None:
        screen.write("\n")
    note_outgrown(request, model.config.block_size, texts)
    if tree is not None:
        terminal.write(tree.draw(tokenizer) + "\n")
    for index, found in enumerate(texts):
        completion = found.completion
        record = text.as_json(prompt, index, completion, found.score, config.generation.seed)
        if streams and (tree is not None or index > 0):
            terminal.write(openings[index] + record["text"] + "\n")
        if streams:
            continue
        why = []
        if config.explain or config.color:
            why = [*explain(model, request, completion.token_ids, tokenizer)]
        if config.color:
            shades = (colour(token, config.color, model.config.vocab_size) for token in why)
            terminal.write(openings[index] + prompt + "".join(shades) + "\n")
        elif config.explain and not config.json:
            terminal.write(openings[index] + "\n\n".join(map(draw, why)) + "\n")
        else:
            record |= {"explain": [token.as_json() for token in why]} if why else {}
            print(json.dumps(record))


def show_comparison(
    config: SampleConfig, model: GPT, other: GPT, tokenizer: Tokenizer, prompt: str
) -> None:
    """Print what both models make of the prompt, and what each thinks of both texts."""
    names = (f"A: {config.model}", f"B: {config.compare}")
    texts = compare.compare(model, other, tokenizer, prompt, config.generation)
    if config.json:
        print(json.dumps(compare.as_json(prompt, names, texts, config.generation.seed)))
    else:
        terminal.write(prompt + "\n" + compare.draw(tokenizer, names, texts) + "\n")


if __name__ == "__main__":
    main(CONFIG)
