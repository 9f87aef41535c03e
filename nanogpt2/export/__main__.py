"""python -m nanogpt2.export: read the command line, find the packages, then load the model."""

import sys
from importlib.util import find_spec

from nanogpt2 import terminal
from nanogpt2.config import fail, parse
from nanogpt2.export.options import ExportConfig
from nanogpt2.export.targets import TARGETS


def main() -> None:
    """Export a model."""
    with terminal.checked_output():
        terminal.prepare()
        config = parse(ExportConfig, sys.argv[1:])
        assert config.to is not None
        missing = [name for name in TARGETS[config.to].needs if find_spec(name) is None]
        if missing:
            fail(f"--to {config.to} needs {', '.join(missing)}: pip install 'nanogpt2[export]'")
        from nanogpt2.export.run import export

        terminal.loaded()
        export(config)


if __name__ == "__main__":
    main()
