"""Continue a text with a GPT-2: python sample.py "Once upon a time".

The command line -> the prompt -> the model and its tokenizer -> text, printed token by token.
Supporting code (streaming beams, many prompts, the prompt loop) lives in nanogpt2/cli/.
"""

import sys
from dataclasses import replace
from statistics import mean

from nanogpt2 import terminal
from nanogpt2.config import SampleConfig, fail, parse, usage_error
from nanogpt2.config.presets import TASKS

if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    with terminal.checked_output():
        terminal.prepare()
        CONFIG = parse(SampleConfig, sys.argv[1:])
        if CONFIG.list_presets:
            rows = [["preset", "what it does"], *([name, t.about] for name, t in TASKS.items())]
            terminal.write(terminal.table(rows) + "\n")
            sys.exit()
        from nanogpt2.checkpoints.folder import digest_ahead

        digest_ahead(CONFIG.model)  # while torch loads

from nanogpt2 import ops
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.cli import text
from nanogpt2.cli.classify import show_labels
from nanogpt2.cli.compare import show_comparison
from nanogpt2.cli.decode import OutputSink, decode_texts, note_dropped, note_outgrown
from nanogpt2.cli.explain import draw, shade
from nanogpt2.cli.inspect import show_inside
from nanogpt2.cli.interactive import Conversation, run_interactive
from nanogpt2.cli.output import Output
from nanogpt2.cli.prompts import read_prompt, read_prompts, show_prompts
from nanogpt2.cli.tree import BeamTree
from nanogpt2.cpu.malloc import large_blocks_apart
from nanogpt2.devices import choose_device
from nanogpt2.generation.explain import explain
from nanogpt2.generation.replay import describe
from nanogpt2.generation.text import pieces, request_for
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


def main(config: SampleConfig) -> None:
    """Read the prompt, load the model, print the texts."""
    template = TASKS[config.preset].template if config.preset else "{}"
    with usage_error("PROMPT" if config.prompt_file is None else "--prompt_file"):
        prompt = read_prompt(config.prompt, config.prompt_file)
    with usage_error("--device"):
        device = choose_device(config.device, config.threads)
    with usage_error():
        ops.choose_kernels(config.kernels, device)
    if config.classify:
        show_labels(config, device, prompt)
        return
    if config.inspects:
        show_inside(config, device, prompt, template)
        return
    with usage_error("--prompts"):
        lines, about_blanks = read_prompts(config.prompts, config.skip_bad, template)
    with usage_error():
        # without --seed draw one, so that every text can be reproduced
        output = Output(config, lines)
    options, literal = replace(config.generation, seed=output.seed), config.literal_prompt
    config = replace(config, generation=options)
    how = (device, config.dtype, config.quantize, config.kernels)
    with usage_error("--model"), open_checkpoint(config.model) as checkpoint, large_blocks_apart():
        tokenizer, model = checkpoint.tokenizer, checkpoint.generator(*how)
    terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    terminal.note(text.ignored(model))
    try:
        if config.interactive:
            run_interactive(Conversation(model, tokenizer, options, template, literal), prompt)
        elif config.prompts is not None:
            show_prompts(config, model, tokenizer, lines, output, about_blanks)
        elif config.compare is not None:
            with usage_error("--compare"), open_checkpoint(config.compare) as checkpoint:
                with large_blocks_apart():
                    other = checkpoint.generator(*how)
                if checkpoint.tokenizer != tokenizer:
                    raise ValueError(f"{config.compare!r} has another vocabulary than --model")
            show_comparison(config, model, other, tokenizer, template.format(prompt))
        else:
            show_texts(config, model, tokenizer, template.format(prompt))
    except ValueError as error:
        # the request is checked before anything is printed
        fail(f"{error}" if f"{error}".startswith("PROMPT") else f"--{error}")
    except (MemoryError, FloatingPointError) as error:
        fail(str(error), code=1)
    terminal.note(output.about_seed())
    terminal.note(text.about_speed(model) if config.verbose else "")


def show_texts(config: SampleConfig, model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    """Print the prompt and its texts: stream the first one, then print the others.

    Raises ValueError for a prompt that leaves no room for new tokens, and for a wrong option.
    """
    request = request_for(model, tokenizer, [prompt], config.generation, config.literal_prompt)
    note_dropped(request, model.config.block_size)
    streams = not (config.json or config.explain or config.color)
    tree = BeamTree(request.prompt_length) if config.tree else None
    screen = terminal.Screen() if streams and tree is None else None
    count = config.generation.num_return_sequences
    openings = [f"--- {i + 1} of {count} ---\n" if count > 1 else "" for i in range(count)]
    show = OutputSink(screen, openings[0] + prompt, tree=tree)
    (texts,) = decode_texts(model, tokenizer, request, show)
    if screen is not None:
        screen.write("\n")
    note_outgrown(request, model.config.block_size, texts)
    if tree is not None:
        terminal.write(tree.draw(tokenizer) + "\n")
    for index, found in enumerate(texts):
        completion = found.completion
        record = text.as_json(prompt, index, completion, found.score, config.generation.seed)
        if streams and (tree is not None or index > 0):
            terminal.write(openings[index] + text.shown(record["text"]) + "\n")
        if streams:
            continue
        why = []
        if config.explain or config.color:
            terminal.note_once(describe(model, request))
            why = [*explain(model, request, completion.token_ids, tokenizer, found.avoided)]
        if config.color:
            shades = [shade(token, config.color, model.config.vocab_size) for token in why]
            painted = (
                terminal.paint(text.shown(piece), mean(shades[tokens]))
                for piece, tokens in pieces(tokenizer, completion)
            )
            terminal.write(openings[index] + text.shown(prompt) + "".join(painted) + "\n")
        elif config.explain and not config.json:
            terminal.write(openings[index] + "\n\n".join(map(draw, why)) + "\n")
        else:
            record |= {"explain": [token.as_json() for token in why]} if why else {}
            terminal.write(text.as_line(record))


if __name__ == "__main__":
    terminal.loaded()
    with terminal.checked_output():
        main(CONFIG)
