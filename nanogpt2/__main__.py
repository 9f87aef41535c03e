"""nanogpt2 COMMAND ...: the scripts from any folder, also as `python -m nanogpt2 COMMAND ...`.

nanogpt2/train.py and nanogpt2/sample.py are links to the two scripts at the top of the repository.
This file knows no flag of theirs.
"""

import runpy
import sys

from nanogpt2 import __version__

COMMANDS = {
    "sample": "continue a text: nanogpt2 sample 'Once upon a time' --model demo",
    "train": "train or fine-tune: nanogpt2 train book.txt --init demo --out out",
    "evaluate": "measure a model: nanogpt2 evaluate book.txt --model out",
    "quantize": "narrow the weights: nanogpt2 quantize out --out out-int8",
    "export": "write it for other programs: nanogpt2 export out --to gguf --out g",
    "tune": "time a model's products on this machine: nanogpt2 tune gpt2",
    "serve": "answer over HTTP, with a page: nanogpt2 serve --model demo",
}
# what other programs call them
OTHER_NAMES = {
    **dict.fromkeys(("run", "generate", "chat", "complete", "completion", "infer"), "sample"),
    **dict.fromkeys(("finetune", "fine-tune", "fine_tune", "sft", "create"), "train"),
    **dict.fromkeys(("eval", "test", "perplexity", "benchmark", "lm_eval"), "evaluate"),
    **dict.fromkeys(("compress", "int8"), "quantize"),
    **dict.fromkeys(("convert", "gguf", "onnx", "to_hf"), "export"),
    **dict.fromkeys(("server", "api", "http", "web", "ui", "gui", "app"), "serve"),
}


def main() -> None:
    """Run the command that the command line names."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"nanogpt2 {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        print("nanogpt2 COMMAND [flags]\n")
        for name, about in COMMANDS.items():
            print(f"  {name:<10}{about}")
        print("\nnanogpt2 COMMAND --help lists its flags; nanogpt2 --version prints the version.")
        return
    if words[0] not in COMMANDS:
        from nanogpt2.config.flags import fail, show

        wanted = OTHER_NAMES.get(words[0])
        more = f"; {COMMANDS[wanted]}" if wanted else f"; the commands are {', '.join(COMMANDS)}"
        fail(f"{show(words[0])} is not a command{more}")
    # the module reads the words after its name
    sys.argv = words
    runpy.run_module(f"nanogpt2.{words[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
