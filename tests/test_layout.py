"""The house: who may import whom, and what must not exist."""

import ast
import re
import subprocess
import sys

import pytest
from reference import ROOT

# module -> what of ours it may import; a name stands for the module and everything under it
MAY_IMPORT = {
    "config": ["config", "memory", "terminal"],
    "added_tokens": [],
    "tokenizer": ["added_tokens"],
    "library_tokenizer": ["added_tokens", "tokenizer"],
    "kv_cache": ["ops"],
    "memory": [],
    "threads": [],
    "terminal": ["memory", "threads"],
    "filesystem": ["terminal"],
    "metrics": [],
    "kernels": [],
    "atomic": [],
    "devices": ["memory", "threads"],
    "download": [],
    "inspect": ["model", "ops", "tokenizer"],
    "hub": ["terminal", "atomic", "download", "filesystem"],
    "repository": ["terminal", "atomic", "download", "filesystem", "hub"],
    "chunked_loss": ["config"],
    "ops": ["config", "kernels", "chunked_loss"],
    "model": ["config", "ops", "kv_cache"],
    "classifier": ["devices", "ops", "model"],
    "cpu": [
        "atomic",
        "chunked_loss",
        "classifier",
        "config",
        "cpu",
        "kv_cache",
        "model",
        "ops",
        "threads",
    ],
    "cuda": ["cuda", "kernels", "kv_cache", "model", "ops", "terminal"],
    "checkpoints": [
        "added_tokens",
        "atomic",
        "checkpoints",
        "classifier",
        "config",
        "cpu",
        "devices",
        "filesystem",
        "hub",
        "library_tokenizer",
        "memory",
        "model",
        "terminal",
        "repository",
        "tokenizer",
    ],
    "generation": [
        "config",
        "cpu",
        "cuda",
        "devices",
        "generation",
        "kv_cache",
        "model",
        "ops",
        "tokenizer",
    ],
    "cli": [
        "atomic",
        "checkpoints",
        "classifier",
        "cli",
        "config",
        "cpu",
        "data",
        "generation",
        "metrics",
        "filesystem",
        "generation",
        "inspect",
        "memory",
        "model",
        "ops",
        "terminal",
        "tokenizer",
    ],
    "data": [
        "atomic",
        "config",
        "data",
        "filesystem",
        "hub",
        "terminal",
        "threads",
        "tokenizer",
    ],
    "training": [
        "atomic",
        "checkpoints",
        "chunked_loss",
        "classifier",
        "config",
        "cpu",
        "devices",
        "filesystem",
        "memory",
        "metrics",
        "model",
        "ops",
        "terminal",
        "tokenizer",
        "training",
    ],
    "__main__": ["config"],
    "training.snapshot": ["generation"],
    "evaluation": [
        "classifier",
        "config",
        "data",
        "evaluation",
        "generation",
        "metrics",
        "model",
        "tokenizer",
    ],
    "training.prepare": ["data"],
    "serve": [
        "checkpoints",
        "config",
        "cpu",
        "data",
        "devices",
        "generation",
        "inspect",
        "memory",
        "model",
        "ops",
        "serve",
        "terminal",
        "tokenizer",
    ],
    "export": [
        "checkpoints",
        "config",
        "cpu",
        "export",
        "filesystem",
        "metrics",
        "model",
        "terminal",
        "tokenizer",
    ],
    "evaluate": [
        "checkpoints",
        "classifier",
        "config",
        "data",
        "devices",
        "evaluation",
        "model",
        "ops",
        "terminal",
        "tokenizer",
    ],
    "tune": ["checkpoints", "config", "cpu", "devices", "terminal"],
    "quantize": [
        "checkpoints",
        "config",
        "cpu",
        "data",
        "evaluation",
        "metrics",
        "model",
        "terminal",
        "tokenizer",
    ],
}
LONGEST = {"train.py": 250, "sample.py": 150, "nanogpt2/model.py": 250}


def our_imports(path):
    """The modules of ours that a file imports, wherever in it, without `nanogpt2.`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "nanogpt2":
                names = [f"nanogpt2.{a.name}" for a in node.names if a.name != "__version__"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [name for name in names if name.split(".")[0] in ("nanogpt2", "kernels", "tests")]
    return found


def sources():
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        # nanogpt2/train.py and sample.py are links to the scripts
        if not path.is_symlink()
        and path.relative_to(ROOT).parts[0] in ("nanogpt2", "kernels", "train.py", "sample.py")
        and "kernels" not in path.relative_to(ROOT).parts[1:]
    ]


def is_lower(module, name):
    """In the same folder: generation/__init__ may import its siblings, they not it."""
    return module == name or name.startswith(module + ".")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("train", "sample"):
        assert not [name for name in our_imports(path) if "kernels" in name]
        return
    if path.name == "__init__.py" and len(parts) == 2:
        # the package itself imports nothing until a name is used; its `if TYPE_CHECKING` is exempt
        return
    module = parts[1] if parts[0] == "nanogpt2" else "kernels"
    for name in our_imports(path):
        inner = name.removeprefix("nanogpt2.")
        allowed = MAY_IMPORT[module] + MAY_IMPORT.get(".".join(parts[1:]), [])
        assert any(is_lower(module, inner) for module in allowed), f"{path}: {name}"


def test_the_table_names_every_module():
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "nanogpt2" and parts[1] != "__init__":
            assert parts[1] in MAY_IMPORT


def test_siblings_form_no_cycle():
    for folder in (p for p in (ROOT / "nanogpt2").rglob("*") if p.is_dir() and any(p.glob("*.py"))):
        files = {p.stem: our_imports(p) for p in folder.glob("*.py")}
        prefix = ".".join(folder.relative_to(ROOT).parts) + "."
        graph = {
            stem: {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            for stem, names in files.items()
        }
        while graph:
            leaves = [stem for stem, below in graph.items() if not below & graph.keys()]
            assert leaves, f"a cycle in {folder}: {graph}"
            for leaf in leaves:
                del graph[leaf]


def test_kernels_is_a_symlink_without_init():
    assert (ROOT / "nanogpt2/kernels").is_symlink()
    assert (ROOT / "nanogpt2/kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


def test_nobody_imports_kernels_by_its_folder():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "venv", "build"} & set(path.relative_to(ROOT).parts):
            assert not [n for n in our_imports(path) if n.split(".")[0] == "kernels"], path


@pytest.mark.parametrize("name", LONGEST)
def test_a_file_to_read_in_one_sitting(name):
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST[name]


def test_no_docstring_points_at_another():
    """An override says @override and has no docstring; its base class has it."""
    stubs = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*sources(), *sorted((ROOT / "kernels").glob("*.py"))]
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.match(r"""\s*(""\"|\#\ )See [A-Z]""", line)
    ]
    assert not stubs, "\n".join(stubs)


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, nanogpt2, nanogpt2.config, nanogpt2.terminal, nanogpt2.training.run_folder;"
        "assert not {'torch', 'numpy', 'triton', 'tiktoken'} & set(sys.modules);"
        "assert 'generate' in dir(nanogpt2)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_digesting_ahead_imports_no_torch():
    """sample.py calls it while torch loads, so it must come without torch."""
    code = (
        "import sys; from nanogpt2.checkpoints.folder import digest_ahead; digest_ahead('demo');"
        "assert not {'torch', 'numpy', 'triton', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there():
    import nanogpt2

    for name in nanogpt2.__all__:
        assert getattr(nanogpt2, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = nanogpt2.nothing
