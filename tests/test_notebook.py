"""A notebook: the model continues a text, and the result shows itself."""

import pytest

CELLS = [
    "from nanogpt2 import generate, load_model, load_tokenizer\n"
    'model, tok = load_model("demo"), load_tokenizer("demo")',
    'generate(model, ["My fellow", "<The state"], tokenizer=tok, max_new_tokens=5, seed=1)',
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_result_is_shown_in_a_notebook(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[0].outputs == []
    [shown] = notebook.cells[1].outputs
    assert shown["data"]["text/plain"].startswith("GenerationOutput(2 of ")
    html = shown["data"]["text/html"]
    assert html.count("<p ") == 2 and ">My fellow" in html and ">&lt;The state" in html
