"""The documents name files, functions and links that exist."""

import ast
import re
from functools import cache

import pytest
from reference import ROOT
from test_layout import MAY_IMPORT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
# their paths start at the top or in nanogpt2/
STRICT = ["README.md", "CONTRIBUTING.md", "docs/architecture.md"]
FOLDERS = ["nanogpt2", "kernels", "benchmarks"]
# `train.py`, `cli/text.py: Completion`, `checkpoints/: load_model, save_model`
PLACE = re.compile(r"`(?P<path>[\w./]+(?:\.py|/))(?:: (?P<names>\w+(?:, \w+)*))?`")


def prose(document):
    """A document's text without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.M | re.S)


def places(document):
    """The (path, names) in a document's backticks, paths without `nanogpt2/`."""
    return [
        (found["path"].removeprefix("nanogpt2/"), (found["names"] or "").split(", "))
        for found in PLACE.finditer(prose(document))
    ]


def located(path, document):
    """The file or folder of a path: from the top, in nanogpt2/, or beside the document; or None."""
    folders = [ROOT, ROOT / "nanogpt2", (ROOT / document).parent]
    found = [folder / path for folder in folders if (folder / path).exists()]
    if not found and document not in STRICT and "/" not in path:
        # a page on one subject may leave the folder out
        found = [place for folder in FOLDERS for place in (ROOT / folder).rglob(path)]
    return found[0] if found else None


@cache
def names_in(path):
    """The functions, classes, methods and constants of a file, or of all files in a folder."""
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing(document):
    """The places that a document names and the source lacks."""
    gone = []
    for path, names in places(document):
        there = located(path, document)
        if there is None:
            gone.append(path)
            continue
        known = names_in(there) | {""}
        gone += [f"{path}: {n}" for n in names if n not in known]
    return gone


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_name_exists(document):
    assert places(document) or document not in STRICT
    assert not missing(document)


def test_the_readme_says_where_four_things_happen():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\*\*(.+?) here\*\*: `[\w/]+\.py: \w+`", text)) == {
        "Attention is computed",
        "Beams are chosen",
        "A checkpoint is committed",
        "int8 products are made",
    }


def test_a_missing_name_is_seen(tmp_path):
    document = tmp_path / "wrong.md"
    document.write_text(
        "`model.py: GPT, Blok`, `modell.py`, `cli/: Text, Gone`, `beam.py: best, worst`"
    )
    assert missing(document) == ["model.py: Blok", "modell.py", "cli/: Gone", "beam.py: worst"]


def test_the_tree_shows_every_file_and_folder():
    """Of nanogpt2/, and of the folders at the top."""
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text.split("```")[1]
    shown = set(re.findall(r"^  (\w[\w./]*)", tree, flags=re.M))
    there = set()
    for path in (ROOT / "nanogpt2").iterdir():
        folder = path.is_dir() and not path.is_symlink()
        # a folder that a change of branch left behind holds caches alone
        if path.suffix == ".py" or path.is_symlink() or (folder and any(path.glob("*.*"))):
            there.add(path.name + "/" * folder)
    assert shown == there - {"__init__.py", "__pycache__/"}
    assert all((ROOT / name).exists() for name in re.findall(r"^(\w[\w./]*)", tree, flags=re.M))


def test_the_floors_agree_with_the_imports_allowed():
    text = (ROOT / "docs/architecture.md").read_text()
    lines = re.findall(r"^\d\. (.*)$", text.split("## The floors")[1].split("##")[0], flags=re.M)
    floor = {name: n for n, line in enumerate(lines) for name in re.findall(r"`(\w+)`", line)}
    assert set(floor) == {module.split(".")[0] for module in MAY_IMPORT}
    for module, allowed in MAY_IMPORT.items():
        for name in allowed:
            assert floor[name.split(".")[0]] <= floor[module.split(".")[0]], (module, name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document):
    # inline code may index and call; a link's text may hold inline code
    for target in re.findall(r"\]\(([^)#]+)", re.sub(r"`[^`\n]*`", "", prose(document))):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


def test_the_first_code_block_has_two_commands():
    """`.ci/run` runs them word for word."""
    block = (ROOT / "README.md").read_text().split("```")[1]
    assert block.splitlines()[1:] == [
        'pip install -e . && python sample.py "The state of the Union is" --model demo',
        'pip install -e ".[test]" && pytest',
    ]
