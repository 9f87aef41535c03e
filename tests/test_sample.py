"""sample.py from its users' side."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from reference import HUNG, ROOT, run_script

import sample
from nanogpt2 import terminal
from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GPTConfig, SampleConfig, parse
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.generation import generate
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

BLOCK = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small byte-level model: random, so that its bytes seldom make characters."""
    torch.manual_seed(3)
    config = GPTConfig(257, BLOCK, 2, 2, 16, bos_token_id=256, eos_token_id=256)
    model = GPT(config)
    for p in model.parameters():
        p.data *= 8
    path = tmp_path_factory.mktemp("model")
    save_model(model, path, byte_tokenizer())
    return str(path)


def run(folder, *argv):
    sample.main(parse(SampleConfig, ["--model", folder, *argv]))


def run_json(capsys, folder, *argv):
    run(folder, "--json", *argv)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_tells_everything(capsys, folder):
    first, second = run_json(
        capsys,
        folder,
        "Hello",
        "--num_return_sequences",
        "2",
        "--seed",
        "5",
        "--max_new_tokens",
        "9",
    )
    assert list(first) == [
        "prompt",
        "index",
        "text",
        "completion",
        "token_ids",
        "score",
        "finish_reason",
        "seed",
    ]
    assert (first["index"], second["index"], first["seed"], first["score"]) == (0, 1, 5, None)
    for found in (first, second):
        assert found["text"] == "Hello" + found["completion"]
        ids = [i for i in found["token_ids"] if i != 256]
        assert found["completion"] == byte_tokenizer().decode(ids)
        assert len(found["token_ids"]) <= 9
    ids = torch.tensor([byte_tokenizer().encode("Hello")])
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "num_return_sequences": 2}
    expected = generate(load_model(folder), ids, seed=5, max_new_tokens=9, **options).sequences
    for row, found in zip(expected[:, 5:].tolist(), (first, second), strict=True):
        assert row[: len(found["token_ids"])] == found["token_ids"]


def test_a_seed_of_its_own_can_be_used_again(capsys, folder):
    (first,) = run_json(capsys, folder, "Hello")
    (again,) = run_json(capsys, folder, "Hello", "--seed", str(first["seed"]))
    (other,) = run_json(capsys, folder, "Hello")
    assert first == again and first["seed"] != other["seed"]


GREEDY = ["--do_sample=false", "--max_new_tokens", "8"]


def test_a_text_that_ends_says_so(capsys, folder):
    (free,) = run_json(capsys, folder, "Hi", "--eos_token_id=none", *GREEDY)
    assert free["finish_reason"] == "length" and len(free["token_ids"]) == 8
    stop = free["token_ids"][3]
    (ended,) = run_json(capsys, folder, "Hi", f"--eos_token_id={stop}", *GREEDY)
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]
    assert ended["completion"] == byte_tokenizer().decode(ended["token_ids"][:-1])


def test_text_is_streamed(monkeypatch, folder):
    pieces = []
    monkeypatch.setattr(terminal, "write", pieces.append)
    run(folder, "Hello", "--max_new_tokens", "20", "--seed", "1", "--eos_token_id=none")
    assert len(pieces) > 20 and pieces[0].startswith("Hello") and pieces[-1] == "\n"


@pytest.mark.parametrize("seed", range(5))
def test_the_shown_text_is_the_text_in_json(capsys, folder, seed):
    argv = ["日本 🙂", "--seed", str(seed), "--max_new_tokens", "30", "--num_return_sequences", "3"]
    texts = [found["text"] for found in run_json(capsys, folder, *argv)]
    run(folder, *argv)
    shown = capsys.readouterr().out
    expected = [f"--- {i + 1} of 3 ---\n{text}\n" for i, text in enumerate(texts)]
    assert shown == "".join(expected)


def test_prompts_from_a_file_and_from_standard_input(capsys, folder, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufefftwo\nlines é\n".encode())
    argv = ["--max_new_tokens", "3", "--seed", "0"]
    (by_argument,) = run_json(capsys, folder, "two\nlines é", *argv)
    (by_file,) = run_json(capsys, folder, "--prompt_file", str(path), *argv)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("two\nlines é\n".encode())))
    (by_stdin,) = run_json(capsys, folder, "-", *argv)
    assert by_argument == by_file == by_stdin


def test_an_empty_prompt_starts_a_text(capsys, folder):
    (found,) = run_json(capsys, folder, "", "--max_new_tokens", "5", "--eos_token_id=none")
    assert found["text"] == found["completion"] and len(found["token_ids"]) == 5
    run(folder, "--max_new_tokens", "5")


@pytest.mark.parametrize(("length", "new", "dropped"), [(100, 10, 46), (54, 10, 0), (500, 99, 468)])
def test_a_prompt_longer_than_the_context_is_kept_working(capsys, folder, length, new, dropped):
    argv = ["x" * length, "--max_new_tokens", str(new), "--eos_token_id=none", "--json"]
    run(folder, *argv)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(found["token_ids"]) == new and found["prompt"] == "x" * length
    if dropped:
        assert f"the first {dropped} are dropped" in err and err.count("\n") == 1
    else:
        assert err == ""


def test_greedy_is_generates(capsys, folder):
    argv = ["Hello", "--do_sample=false", "--no_repeat_ngram_size", "2", "--max_new_tokens", "12"]
    (found,) = run_json(capsys, folder, *argv)
    ids = torch.tensor([byte_tokenizer().encode("Hello")])
    expected = generate(load_model(folder), ids, max_new_tokens=12, no_repeat_ngram_size=2)
    assert found["token_ids"] == expected.sequences[0, 5:].tolist()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["Hello", "--max_length", "5"], "--max_length"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file"),
        (["--prompt_file", "."], "--prompt_file"),
        (["--prompt_file", "latin1.txt"], "offset 3"),
        (["Hello", "--model", "broken"], "model.safetensors"),
        (["Hello", "--model", "empty"], "model.safetensors"),
        (["Hello", "--device", "mps"], "--device"),
        (["Hello", "--stop_strings", ""], "--stop_strings"),
        (["Hello", "--stop_strings", '["a", ""]'], "--stop_strings"),
        (["Hello", "--bad_words_ids", "[[257]]"], "--bad_words_ids"),
        (["Hello", "--suppress_tokens", "[-1]"], "--suppress_tokens"),
        (["Hello", "--forced_bos_token_id", "300"], "--forced_bos_token_id"),
        (["Hello", "--force_words_ids", "[[999]]", "--num_beams", "2"], "--force_words_ids"),
        (["Hello", "--eos_token_id", "999"], "--eos_token_id"),
        (["Hello", "--suppress_tokens", str([*range(257)]), "--do_sample"], "--do_sample"),
        (["Hello", "--temperature", "1e-320", "--do_sample"], "--do_sample"),
        (["Hello", "--sequence_bias", "[[[5], 1e39]]"], "--sequence_bias"),
        (["Hello", "--sequence_bias", "[[[5], NaN]]"], "--sequence_bias"),
        (["Hello", "--sequence_bias", "[[[5], 1" + "0" * 400 + "]]"], "--sequence_bias"),
        (["Hello", "--suppress_tokens", "[" * 100_000], "--suppress_tokens"),
        (["Hello", "--exponential_decay_length_penalty", "[Infinity, 1]"], "--exponential"),
        (["Hello", "--length_penalty", "1e300", "--num_beams", "2"], "--length_penalty"),
        (["Hello", "--bad_words_ids", "[[1]"], "--bad_words_ids"),
        (["Hello", "--num_beams", "1000000000"], "--num_beams"),
        (["Hello", "--num_return_sequences", "1000000000"], "--num_return_sequences"),
        (["Hello", "--max_new_tokens", "1000000000000"], "--max_new_tokens"),
        (["Hello", "--num_beams", "65281", "--do_sample"], "2^24"),
        (["Hello", "--pad_token_id", "257"], "--pad_token_id"),
        (["Hello", "--suppress_tokens", "5", "--forced_eos_token_id", "5"], "--forced_eos"),
        (["Hello", "--stop_strings", '["\\ud800"]'], "--stop_strings"),
        (["Hello", "--sequence_bias", '[[["5"], 2]]'], "--sequence_bias"),
        (["Hello", "--exponential_decay_length_penalty", '"12"'], "--exponential"),
        (["Hello", "--min_length", "106"], "--min_length"),
        (["Hello", "--min_new_tokens", "36", "--max_length", "40"], "--min_new_tokens"),
        (["--prompts", "nowhere.txt"], "--prompts"),
        (["--prompts", "broken.jsonl"], "line 2"),
        (["--prompts", "late.txt", "--max_length", "9"], "--prompts 'late.txt' line 3: max_length"),
        (["--prompts", "late.txt", "--max_length", "1"], "--max_length must be > "),
        (["--prompts", ""], "--prompts"),
        (["--prompt_file", ""], "--prompt_file"),
        (["Hello", "--compare", ""], "--compare"),
        (["Hello", "--model", ""], "--model"),
        (["--prompt", "Hello"], "PROMPT"),
        (["Hello", "--interactive", "--num_return_sequences", "3"], "--num_return_sequences"),
        (["Hello", "--interactive", "--max_length", "3"], "--max_length"),
        (["Hello", "--compare", "nowhere"], "--compare"),
        (["Hello", "--compare", "demo"], "--compare"),
    ],
    ids=str,
)
def test_wrong_use(capsys, folder, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "late.txt").write_text("a\n\nmuch too long\nb\n")
    (tmp_path / "broken.jsonl").write_text('"a"\n{"prompt": 3}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(SystemExit) as stopped:
        run(folder, *argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 201
    assert named in err


def test_a_failure_after_the_first_token_is_not_wrong_use(capsys, folder):
    """Three tokens are allowed, each once, so the fourth step fails."""
    banned = str([i for i in range(257) if not 97 <= i <= 99])
    argv = ["Hello", "--do_sample", "--suppress_tokens", banned, "--no_repeat_ngram_size", "1"]
    with pytest.raises(SystemExit) as stopped:
        run(folder, *argv, "--eos_token_id=none")
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert sorted(out) == sorted("Helloabc") and out.startswith("Hello")
    assert err.startswith("error: do_sample must have tokens left") and err.count("\n") == 1


@pytest.mark.parametrize("K", ["1", "3"])
@pytest.mark.parametrize("look", ["--no_json", "--json", "--explain"])
def test_a_broken_model_is_one_line(capfd, tmp_path, folder, look, K):
    model = load_model(folder)
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    save_model(model, tmp_path / "nan", byte_tokenizer())
    with pytest.raises(SystemExit) as stopped:
        run(str(tmp_path / "nan"), "Hello", "--num_beams", K, look)
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: the model's scores") and err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(capfd, folder, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(CPUDecoder, "logits", fail)
    with pytest.raises(SystemExit) as stopped:
        run(folder, "Hello")
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: out of memory: lower --num_beams")


def test_other_errors_are_not_taken_for_it(folder, monkeypatch):
    monkeypatch.setattr(CPUDecoder, "logits", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(folder, "Hello")


def test_beams_have_scores(capsys, folder):
    argv = ["Hello", "--num_beams", "3", "--num_return_sequences", "2", "--max_new_tokens", "6"]
    first, second = run_json(capsys, folder, *argv)
    assert first["score"] >= second["score"]
    ids = torch.tensor([byte_tokenizer().encode("Hello")])
    expected = generate(load_model(folder), ids, num_beams=3, max_new_tokens=6)
    assert first["score"] == pytest.approx(expected.sequences_scores[0].item(), abs=1e-5)


def test_stop_strings_end_and_are_cut_off(capsys, folder):
    argv = ["Hi", "--do_sample=false", "--max_new_tokens", "20", "--eos_token_id=none"]
    (free,) = run_json(capsys, folder, *argv)
    stop = free["completion"][5]
    (ended,) = run_json(capsys, folder, *argv, "--stop_strings", stop)
    assert ended["finish_reason"] == "stop" and stop not in ended["completion"]
    assert ended["completion"] == free["completion"][: free["completion"].index(stop)]


def test_many_prompts(capsys, folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n"a longer second"\nbroken\n"three"\n')
    argv = ["--prompts", str(path), "--max_new_tokens", "4", "--num_return_sequences", "2"]
    run(folder, *argv, "--skip_bad", "--unique", "--batch_size", "2", "--seed", "1", "--in_order")
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [f["prompt"] for f in found] == [
        p for p in ("one", "a longer second", "three") for _ in "12"
    ]
    assert "skipped" in err and "line 3" in err


def test_a_preset_sets_template_and_decoding(capsys, folder):
    (found,) = run_json(capsys, folder, "Who?", "--preset", "question-answering")
    assert found["prompt"].endswith("Q: Who?\nA:") and found["score"] is not None
    assert "\n" not in found["completion"] and len(found["token_ids"]) <= 24
    (found,) = run_json(capsys, folder, "Who?", "--preset", "summarise", "--max_new_tokens", "3")
    assert found["prompt"] == "Who?\nTL;DR:" and len(found["token_ids"]) == 3


def test_presets_are_listed_at_once(tmp_path):
    ran = run_script("sample.py", "--list_presets", cwd=tmp_path)
    assert ran.returncode == 0 and ran.stderr == b""
    for name in ("story", "dialogue", "poem", "question-answering", "summarise", "translate"):
        assert name in ran.stdout.decode()


def test_explanations(capsys, folder):
    argv = ["Hello", "--max_new_tokens", "3", "--seed", "1", "--eos_token_id=none", "--do_sample"]
    (found,) = run_json(capsys, folder, "--explain", *argv)
    assert [why["chosen"]["token"] for why in found["explain"]] == found["token_ids"]
    run(folder, "--explain", *argv)
    assert capsys.readouterr().out.count("entropy") == 3
    run(folder, "--color", "prob", *argv)
    assert capsys.readouterr().out.count("\x1b[48;2;") == 3
    run(folder, "Hello", "--tree", "--num_beams", "3", "--max_new_tokens", "4")
    assert "ended, score" in capsys.readouterr().out


def test_groups_are_explained(capsys, folder):
    argv = ["Hello", "--max_new_tokens", "3", "--eos_token_id=none", "--num_beams", "4"]
    argv += ["--num_beam_groups", "2", "--diversity_penalty", "9", "--num_return_sequences", "4"]
    found = run_json(capsys, folder, "--explain", *argv)
    changed = []
    for text in found:
        for why in text["explain"]:
            assert why["stages"] == ["raw", "diversity_penalty"]
            raw, penalised = why["chosen"]["probabilities"]
            changed.append(raw != pytest.approx(penalised, abs=1e-6))
    # the first group has no penalty, the others do
    assert set(changed) == {True, False}


def test_two_models_side_by_side(capsys, folder):
    argv = ["Hello", "--max_new_tokens", "3", "--seed", "1", "--compare", folder]
    run(folder, *argv)
    out = capsys.readouterr().out
    assert f"--- A: {folder} ---" in out and f"--- B: {folder} ---" in out
    (found,) = run_json(capsys, folder, *argv)
    assert [text["gain"] for text in found["texts"]] == [0, 0]
    (found,) = run_json(capsys, folder, *argv, "--num_return_sequences", "3")
    assert [text["index"] for text in found["texts"]] == [0, 1, 2] * 2
    plain = run_json(capsys, folder, *argv[:-2], "--num_return_sequences", "3")
    for text, expected in zip(found["texts"], plain * 2, strict=True):
        assert text["token_ids"] == expected["token_ids"]
        assert len(text["token_ids"]) == len(text["logp_a"]) == len(text["kl"])
        assert text["text"] == expected["completion"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("look", [["--color", "rank"], ["--compare"]], ids=str)
def test_coloured_text_is_the_plain_text(capsys, folder, look, seed):
    look = [*look, folder] if look == ["--compare"] else look
    argv = ["Hi", "--seed", str(seed), "--max_new_tokens", "20", "--stop_strings", '["q", "M"]']
    (plain,) = run_json(capsys, folder, *argv)
    run(folder, *argv, *look)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    if look[0] == "--color":
        assert shown == plain["text"] + "\n"
    else:
        assert shown.startswith(f"Hi\n--- A: {folder} ---\n{plain['completion']}\n\ntoken ")


def test_json_is_json(capsys, folder):
    """An impossible beam has a score that is not finite."""
    argv = ["Hello", "--num_beams", "3", "--num_return_sequences", "3", "--max_new_tokens", "1"]
    argv += ["--suppress_tokens", str([i for i in range(257) if i != 97]), "--renormalize_logits"]
    run(folder, *argv, "--json")
    for line in capsys.readouterr().out.splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_the_loop(folder, tmp_path):
    lines = b"Hello\nab\xff\n:set temperature 0\n again\n:undo\n:text\n:nonsense\n"
    argv = ["--interactive", "--model", folder, "--max_new_tokens", "4", "--seed", "1"]
    ran = run_script("sample.py", "Opening", *argv, cwd=tmp_path, stdin=lines)
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr
    assert ran.stdout.decode().startswith("Opening") and b":nonsense" in ran.stderr
    assert ran.stderr.count(b"error: ") == 2 and b"byte 0xff" in ran.stderr


def test_a_text_that_outgrows_the_context_says_so(capsys, folder):
    run(folder, "Hello", "--max_new_tokens", "90", "--eos_token_id=none", "--json")
    out, err = capsys.readouterr()
    assert len(json.loads(out)["token_ids"]) == 90
    assert "outgrew the context of 64" in err and err.count("\n") == 1


def test_standard_input_that_is_not_utf8(folder, tmp_path):
    ran = run_script("sample.py", "-", "--model", folder, cwd=tmp_path, stdin=b"ab\xff")
    assert ran.returncode == 2 and b"standard input" in ran.stderr and b"offset 2" in ran.stderr


def test_a_terminal_without_the_characters(folder, tmp_path):
    argv = ["日本", "--model", folder, "--seed", "0", "--max_new_tokens", "9"]
    ran = run_script("sample.py", *argv, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0 and ran.stdout.startswith(b"??") and ran.stderr == b""


def test_a_full_device_is_one_line(folder, tmp_path):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        command = [sys.executable, str(ROOT / "sample.py"), "Hello", "--model", folder]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.startswith(b"error: ") and ran.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ("Hello --max_new_tokens 2 --seed 1 <&-", 0, ""),
        ("- --max_new_tokens 2 --seed 1 <&-", 0, ""),
        ("--interactive --seed 1 <&-", 0, ":help lists the commands\n"),
        ("Hello --max_new_tokens 2 2>&-", 0, ""),
        ("Hello >&-", 1, "error: standard output is closed\n"),
        ("Hello >&- 2>&- <&-", 1, ""),
        ("--help >&-", 1, "error: standard output is closed\n"),
        ("--help >/dev/full", 1, "error: [Errno 28] No space left on device"),
        ("--list_presets >/dev/full", 1, "error: [Errno 28] No space left on device"),
        (
            "Hello --max_new_tokens 2 --json >/dev/full",
            1,
            "error: [Errno 28] No space left on device",
        ),
        (
            "Hello --max_new_tokens 2 --interactive >/dev/full",
            1,
            "error: [Errno 28] No space left on device",
        ),
    ],
)
def test_closed_and_full_streams(folder, tmp_path, arguments, code, error):
    script = f"{sys.executable} -W error {ROOT / 'sample.py'} --model {folder} {arguments}"
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    ran = subprocess.run(
        ["bash", "-c", script], capture_output=True, cwd=tmp_path, text=True, env=environment
    )
    assert ran.returncode == code
    assert ran.stderr.startswith(error) and ran.stderr.count("\n") == bool(error)


def started(folder, tmp_path):
    """Start the script on an endless text; return its process after the first output."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "sample.py"), "Hello", "--model", folder),
            *("--max_new_tokens", "1000000", "--eos_token_id=none"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.read(5) == b"Hello"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_quietly(folder, tmp_path, number, code):
    process = started(folder, tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=HUNG)
    assert process.returncode == code and err == b""


def test_a_closed_pipe_ends_it_quietly(folder, tmp_path):
    process = started(folder, tmp_path)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=HUNG) == -signal.SIGPIPE


def test_the_demo_model_continues_a_text(tmp_path):
    """The README's first command, from any folder, without a network."""
    argv = ["The state of the Union is", "--model", "demo", "--seed", "0"]
    ran = run_script("sample.py", *argv, cwd=tmp_path)
    assert ran.returncode == 0 and ran.stderr == b""
    words = ran.stdout.decode().split()
    assert words[:6] == ["The", "state", "of", "the", "Union", "is"] and len(words) > 20


@pytest.mark.parametrize("options", [[], ["--num_beams", "3", "--do_sample"]])
def test_a_text_needs_no_compiler(folder, options):
    """Torch imports it for the oddest things, and it takes as long as torch itself."""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch._dynamo', 'sympy', 'triton', 'huggingface_hub'} & set(sys.modules)"
    )
    argv = ["Hello", "--model", folder, "--max_new_tokens", "3", *options]
    command = [sys.executable, "-W", "error", "-c", code, str(ROOT / "sample.py"), *argv]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


# ways to run without a seed -> True if the texts depend on one that is stated nowhere else
SEEDS = [
    ([], True),
    (["--explain"], True),
    (["--color", "prob"], True),
    (["--compare"], True),
    (["--num_beams", "3", "--do_sample", "--tree"], True),
    (["--num_beams", "3", "--stochastic_beams"], True),
    (["--num_return_sequences", "2"], True),
    (["--interactive"], True),
    (["--interactive", "--do_sample", "false"], True),
    (["--do_sample", "false"], False),
    (["--num_beams", "3", "--tree"], False),
    (["--temperature", "0"], False),
    (["--json"], False),
    (["--explain", "--json"], False),
    (["--compare", "--json"], False),
    (["--prompts"], False),
]


@pytest.mark.parametrize(("argv", "is_said"), SEEDS, ids=lambda value: str(value))
def test_a_seed_that_was_drawn_is_said(capsys, monkeypatch, tmp_path, folder, argv, is_said):
    def run_once(*more):
        monkeypatch.setattr(sys, "stdin", io.StringIO("and\n:retry\n"))
        words = [*argv, *more, "--max_new_tokens", "9"]
        if "--compare" in argv:
            words.insert(words.index("--compare") + 1, folder)
        if "--prompts" in argv:
            (tmp_path / "p.txt").write_text("Hello\n")
            words.insert(words.index("--prompts") + 1, str(tmp_path / "p.txt"))
        before = signal.getsignal(signal.SIGINT)
        try:
            run(folder, *([] if "--prompts" in argv else ["Hello"]), *words)
        finally:
            signal.signal(signal.SIGINT, before)
        return capsys.readouterr()

    out, err = run_once()
    said = re.findall(r"note: --seed (\d+) writes this again\n", err)
    assert len(said) == is_said
    if is_said:
        assert run_once("--seed", said[0]) == (out, re.sub("note: --seed .*\n", "", err))
