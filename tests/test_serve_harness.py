"""lm-evaluation-harness over the server: the likelihoods that it gets through transformers.

The harness brings forty packages, so it is installed in a folder of its own at test time, held to
one release, behind all that is installed already.
"""

import json
import os
import subprocess
import sys

import pytest
from reference import HUNG, ROOT
from serve_process import serving

from nanogpt2 import load_model, save_model

HARNESS = "lm-eval[api]==0.4.13"
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
QUESTIONS = [
    ("The cat sat on the", ["mat", "government of the people", "of"], 0),
    ("Once upon a", ["time", "table"], 0),
    ("The President of the United", ["States", "apples and pears"], 0),
    ("one two three", ["four", "zebra", "two one"], 0),
    ("It was the best of", ["times", "it"], 0),
]
RUN = """
import json, sys
sys.path.append(sys.argv[1])
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model=sys.argv[2], model_args=sys.argv[3], tasks=["choices"], log_samples=True, batch_size=2,
    task_manager=TaskManager(include_path="."),
)
rows = [[doc["doc_id"], doc["filtered_resps"]] for doc in found["samples"]["choices"]]
open(sys.argv[4], "w").write(json.dumps([sorted(rows), found["results"]["choices"]]))
"""


def evaluated(folder, site, kind, arguments):
    """What the harness finds: each question's (log-likelihood, is greedy), and the metrics."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, site, kind, arguments, f"{kind}.json"],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{kind}.json").read_text())


@pytest.mark.slow
def test_the_harness_measures_the_same_as_through_transformers(tmp_path):
    site = str(tmp_path / "site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, HARNESS]
    subprocess.run(pip, check=True)
    save_model(load_model("demo"), tmp_path / "demo-folder")
    (tmp_path / "choices.yaml").write_text(TASK)
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs, their_metrics = evaluated(
        tmp_path, site, "hf", "pretrained=demo-folder,dtype=float32,device=cpu"
    )
    with serving(tmp_path, "--model", "demo-folder") as server:
        arguments = (
            f"model=demo-folder,base_url={server.url}v1/completions,tokenizer=demo-folder,"
            "tokenizer_backend=huggingface,max_length=256,num_concurrent=1"
        )
        ours, our_metrics = evaluated(tmp_path, site, "local-completions", arguments)
    assert len(ours) == len(theirs) == len(QUESTIONS)
    for (number, found), (same, expected) in zip(ours, theirs, strict=True):
        assert number == same and len(found) == len(QUESTIONS[number][1])
        for (logprob, is_greedy), (their_logprob, their_greedy) in zip(
            found, expected, strict=True
        ):
            assert float(logprob) == pytest.approx(float(their_logprob), abs=1e-3)
            assert is_greedy == their_greedy
    assert our_metrics == their_metrics
