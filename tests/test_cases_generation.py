"""sample.py on inputs that went wrong in trials, and on others of their kinds."""

import io
import json
import os
import pty
import select
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from reference import ROOT

import sample
from nanogpt2.checkpoints.save import save_model
from nanogpt2.cli.output import Output
from nanogpt2.cli.prompts import read_prompts
from nanogpt2.config import GPTConfig, SampleConfig, parse
from nanogpt2.filesystem import lock
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

CASES = Path(__file__).parent / "data" / "cases"
BYTES = byte_tokenizer()
# sampling that seldom draws a text twice
WIDE = ("--do_sample", "--temperature", 9, "--max_new_tokens", 20, "--seed", 1)


def saved(folder, **ids):
    torch.manual_seed(3)
    model = GPT(GPTConfig(257, 64, 1, 2, 16, **({"bos_token_id": 256, "eos_token_id": 256} | ids)))
    for p in model.parameters():
        p.data *= 8
    save_model(model, folder, BYTES)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def run(folder, *argv):
    sample.main(parse(SampleConfig, ["--model", folder, "--max_new_tokens", "5", *map(str, argv)]))


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def refused(capsys, folder, *argv):
    """The one line of an error of use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(folder, *argv)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert error.value.code == 2 and out == "" and line.startswith("error: ") and len(line) <= 200
    return line


# ---- files of prompts


def test_blank_prompts_are_said_and_fields_are_carried(folder, capsys):
    run(folder, "--prompts", CASES / "dups.jsonl", *WIDE)
    out, err = capsys.readouterr()
    found = sorted(records(out), key=lambda r: r["line"])
    assert [(r["line"], r["id"]) for r in found] == [(1, 1), (3, 3), (5, 5)]
    assert "3 of 6 prompts are blank" in err and "lines 2, 4, 6\n" in err
    # equal prompts draw differently
    assert found[0]["prompt"] == found[1]["prompt"] and found[0]["text"] != found[1]["text"]


def test_equal_prompts_draw_differently(folder, capsys):
    run(folder, "--prompts", CASES / "same32.jsonl", *WIDE)
    assert len({str(r["token_ids"]) for r in records(capsys.readouterr().out)}) == 32


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", ""])
def test_line_ends_of_a_prompt_file(folder, capsys, tmp_path, end):
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"My fellow{end}citizens{end}".encode())
    run(folder, "--prompt_file", path, "--json")
    line_end = "\n" if end else ""
    assert records(capsys.readouterr().out)[0]["prompt"] == f"My fellow{line_end}citizens"
    run(folder, "--prompt_file", CASES / "crlf.txt", "--json")
    assert records(capsys.readouterr().out)[0]["prompt"] == "My fellow citizens"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", '{"prompt": "a", "id": 7}\n\n{"prompt": "b"}\n'),
        ("a.json", '[{"prompt": "a", "id": 7}, " ", "b"]'),
        ("a.jsonl", '\ufeff\n[\n  {\n "prompt": "a", "id": 7\n },\n " ",\n "b"\n]\n'),
        ("-", '[{"prompt": "a", "id": 7}, " ", "b"]\n'),
    ],
)
def test_prompts_in_every_form_of_json(folder, capsys, monkeypatch, tmp_path, name, data):
    monkeypatch.chdir(tmp_path)
    if name == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    else:
        Path(name).write_text(data)
    run(folder, "--prompts", name, "--in_order")
    found = records(capsys.readouterr().out)
    assert [(r["line"], r["prompt"], r.get("id")) for r in found] == [(1, "a", 7), (3, "b", None)]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_a_file_whose_lines_are_no_prompts_is_refused(folder, capsys, tmp_path, name):
    (tmp_path / name).write_text("prompt,id\na,1\n")
    assert "a prompt a line" in refused(capsys, folder, "--prompts", tmp_path / name)


@pytest.mark.parametrize(
    "line", ['{"prompt": "hi \\ud83d there"}', '"\\udc00"', '{"prompt": "a", "id": ["\\ud800"]}']
)
def test_half_a_character_is_an_error_of_its_line(folder, capsys, tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('"one"\n' + line)
    found = refused(capsys, folder, "--prompts", path)
    assert "line 2: \\ud" in found and "half a surrogate pair" in found
    run(folder, "--prompts", path, "--skip_bad")
    assert len(records(capsys.readouterr().out)) == 1
    assert "line 1: \\ud83d is half" in refused(capsys, folder, "--prompts", CASES / "sur.jsonl")


def test_a_prompt_that_is_not_utf8_is_refused(folder, capsys):
    assert refused(capsys, folder, "a\udcff").startswith(r"error: 'a\udcff' is not UTF-8")


def test_names_that_the_result_has_itself_are_said(folder, capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "score": 7, "text": "mine", "label": {"x": [1]}}\n')
    run(folder, "--prompts", path)
    out, err = capsys.readouterr()
    (found,) = records(out)
    assert found["label"] == {"x": [1]} and found["score"] is None and found["text"] != "mine"
    assert "own score, text" in err


# ---- a run that is killed


@pytest.fixture
def file(tmp_path):
    """Prompts whose lengths do not follow the order of the file."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abc"[n % 3] * (1 + 7 * n % 5) for n in range(12)))
    return path


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def killed(monkeypatch, folder, after, *argv):
    """Run, and die in the decoding of the batch after `after` batches."""
    from nanogpt2.cli import prompts

    decode, left = prompts.decode_texts, [after]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return decode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prompts, "decode_texts", dying)
        run(folder, *argv)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--in_order"],
        [
            "--do_sample",
            "--num_return_sequences",
            3,
            "--unique",
            "--top_k",
            2,
            "--max_new_tokens",
            1,
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_killed_run_continues(folder, capsys, monkeypatch, tmp_path, file, options, cut):
    argv = ["--prompts", file, "--batch_size", 2, *options]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run(folder, *argv, "--seed", 3, "--output", whole)
    # --unique decodes a batch up to ten times
    killed(
        monkeypatch, folder, 25 if "--unique" in argv else 3, *argv, "--seed", 3, "--output", part
    )
    data = part.read_bytes()
    done = records(data.decode())
    assert done and whole.read_bytes().startswith(data)
    # the kill came within a write, and the batches differ
    part.write_bytes(data[: len(data) - cut])
    run(folder, *argv, "--output", part, "--resume", "--batch_size", 5)
    capsys.readouterr()
    key = lambda record: (record["line"], record["index"])  # noqa: E731
    found, expected = (sorted(records(p.read_text()), key=key) for p in (part, whole))
    assert found == expected
    # a finished run stays as it is
    before = part.read_bytes()
    run(folder, *argv, "--output", part, "--resume")
    assert part.read_bytes() == before


def test_every_text_is_written_as_soon_as_it_is_done(folder, capsys, monkeypatch, file):
    killed(monkeypatch, folder, 4, "--prompts", file, "--batch_size", 2)
    assert len(records(capsys.readouterr().out)) >= 4


def test_a_run_continues_with_its_own_settings_only(folder, capsys, monkeypatch, tmp_path, file):
    out = tmp_path / "out.jsonl"
    argv = ["--prompts", file, "--batch_size", 2, "--do_sample", "--temperature", 0.9]
    killed(monkeypatch, folder, 2, *argv, "--output", out)
    before = out.read_bytes()
    again = [*argv, "--output", out, "--resume"]
    for flags, named in [
        (["--temperature", 0.8], "--temperature must be 0.9, as in the run to resume, not 0.8"),
        (["--seed", 5], "--seed must be "),
        (["--max_new_tokens", 7], "--max_new_tokens must be 5, "),
        (["--literal_prompt"], "--literal_prompt must be False, "),
        (["--preset", "story"], "--preset must be None, "),
    ]:
        assert named in refused(capsys, folder, *again, *flags)
    other = shutil.copytree(folder, tmp_path / "other")
    assert "--model must be " in refused(capsys, str(other), *again)
    changed = tmp_path / "changed.txt"
    changed.write_text("x\n" + file.read_text())
    assert "does not belong" in refused(capsys, folder, *again, "--prompts", changed)
    assert out.read_bytes() == before
    # more prompts at the end are done as well
    longer = tmp_path / "longer.txt"
    longer.write_text(file.read_text() + "\nnew")
    run(folder, *again, "--prompts", longer)
    assert {r["line"] for r in records(out.read_text())} == set(range(1, 14))


def test_nothing_of_the_users_is_written_over(folder, capsys, tmp_path, file):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine\n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    argv = ["--prompts", file]
    assert "exists" in refused(capsys, folder, *argv, "--output", mine)
    assert "exists" in refused(capsys, folder, *argv, "--output", tmp_path / "link")
    assert "exists" in refused(capsys, folder, *argv, "--output", tmp_path)
    assert "not a folder" in refused(capsys, folder, *argv, "--output", tmp_path / "no" / "x")
    assert "no run to resume" in refused(capsys, folder, *argv, "--output", mine, "--resume")
    assert "no run to resume" in refused(capsys, folder, *argv, "--output", "absent", "--resume")
    assert mine.read_text() == "mine\n"
    for flags in (["--resume"], ["--resume", "--prompts", file], ["--output", "x"], ["--in_order"]):
        refused(capsys, folder, *flags)
    # a path that only the attempt shows to be wrong
    long = tmp_path / ("x" * 250)
    assert "File name too long" in refused(capsys, folder, *argv, "--output", long)
    assert "File name too long" in refused(
        capsys, folder, *argv, "--output", tmp_path / ("x" * 300)
    )
    for name in ("/", ".", "a\0b"):
        assert "--output must be a file" in refused(capsys, folder, *argv, "--output", name)
    # the settings' file of the run would be another's
    for name in ("link", "own"):
        (tmp_path / f"{name}.run.json").symlink_to(tmp_path / "absent")
    (tmp_path / "own.run.json").unlink()
    for content in ("[1]", '{"mine": 1}', "mine"):
        (tmp_path / "own.run.json").write_text(content)
        assert "own.run.json" in refused(capsys, folder, *argv, "--output", tmp_path / "own")
        assert (tmp_path / "own.run.json").read_text() == content
    (tmp_path / "own.run.json").unlink()
    (tmp_path / "link").unlink()
    assert "link.run.json" in refused(capsys, folder, *argv, "--output", tmp_path / "link")
    (tmp_path / "link.run.json").unlink()
    # options that cannot run leave no file
    new = tmp_path / "new.jsonl"
    refused(capsys, folder, *argv, "--output", new, "--eos_token_id", 999)
    bans = json.dumps([*range(257)])
    refused(capsys, folder, *argv, "--output", new, "--do_sample", "--suppress_tokens", bans)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "prompts.txt"]


def test_a_second_run_does_not_write_to_the_same_file(folder, capsys, tmp_path, file):
    out = tmp_path / "out.jsonl"
    argv = ["--prompts", file, "--output", out]
    run(folder, *argv, "--seed", 3)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with lock(tmp_path / "out.jsonl.run.json"):
        assert "another run writes" in refused(capsys, folder, *argv, "--resume")
    assert out.read_bytes() == whole[: len(whole) // 2]
    config = parse(
        SampleConfig, ["--model", folder, "--max_new_tokens", "5", "--resume", *map(str, argv)]
    )
    late = Output(config, read_prompts(str(file), False)[0])
    # the other run ends after this one has read the file
    out.write_bytes(whole)
    with pytest.raises(ValueError, match="another run writes"), late:
        pass
    assert out.read_bytes() == whole
    # without its texts, the settings of a run are written anew
    out.unlink()
    run(folder, *argv, "--seed", 3)
    assert out.read_bytes() == whole


# ---- prompts


def test_the_end_token_in_a_prompt_is_one_token(folder, capsys, tmp_path):
    prompt = "a<|endoftext|>b"
    path = tmp_path / "p.txt"
    path.write_text(prompt)
    # greedy, so the text depends on the tokens alone
    greedy = ["--do_sample", "false", "--json"]
    expected = sample_greedy(folder, [97, 256, 98])
    for way in ([prompt], ["--prompts", path], ["--prompt_file", path]):
        run(folder, *way, *greedy)
        (found,) = records(capsys.readouterr().out)
        assert found["token_ids"] == expected and found["prompt"] == prompt
        run(folder, *way, *greedy, "--literal_prompt")
        (found,) = records(capsys.readouterr().out)
        assert found["token_ids"] == sample_greedy(folder, BYTES.encode(prompt)) != expected


def sample_greedy(folder, ids):
    from nanogpt2.checkpoints.load import load_model
    from nanogpt2.generation import generate

    found = generate(load_model(folder), torch.tensor([ids]), max_new_tokens=5).sequences[0]
    return found[len(ids) :].tolist()


def test_an_empty_prompt_without_a_start_token(tmp_path, capsys):
    model = saved(tmp_path / "model", bos_token_id=None)
    line = refused(capsys, model, "")
    assert line == "error: PROMPT must not be empty: the model has no bos_token_id to start from"


def test_options_beside_the_model_are_said_to_be_ignored(tmp_path, capsys):
    model = saved(tmp_path / "model")
    run(model, "a")
    assert "generation_config" not in capsys.readouterr().err
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.1}))
    (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
    run(model, "a")
    assert "generation_config.json sets temperature;" in capsys.readouterr().err


# ---- terminals

CONTROLS = "a\x1b[2Jb\x07\x9b1m\r\t\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--num_beams", 2, "--num_return_sequences", 2],
        ["--num_beams", 2, "--tree"],
        ["--explain"],
        ["--color", "prob"],
        ["--compare", "MODEL"],
    ],
    ids=str,
)
def test_control_characters_are_shown_on_a_terminal_only(folder, capsys, monkeypatch, argv):
    asked = ["--sequence_bias", "[[[27], 6e4]]", "--eos_token_id", "none"]
    argv = [folder if word == "MODEL" else word for word in argv]
    run(folder, CONTROLS, *asked, *argv)
    piped = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(folder, CONTROLS, *asked, *argv)
    seen = capsys.readouterr().out
    # ours: colours, and the tail of a line that is drawn again
    for ours in ("\x1b[0m", "\x1b[97m", "\x1b[K", "\x1b[2m"):
        seen = seen.replace(ours, "")
    while "\x1b[48;2;" in seen:
        start, _, rest = seen.partition("\x1b[48;2;")
        seen = start + rest.partition("m")[2]
    assert not {"\x1b", "\x07", "\x9b"} & {*seen}
    assert "\\x1b" in seen
    if not argv:
        assert piped.startswith(CONTROLS) and seen[1:].startswith("a\\x1b[2Jb\\x07\\x9b1m\\r\t\n")


@pytest.fixture
def terminal_of(folder):
    """Start the prompt loop in a terminal; return a function (keys, what to wait for) -> output."""
    pid, number = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
        argv = ["--interactive", "--model", folder, "--max_new_tokens", "4", "--seed", "1"]
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *argv])

    def type_(keys, awaited=None):
        os.write(number, keys)
        seen = b""
        # reading fails once the script has ended
        with suppress(OSError):
            while awaited is None or awaited not in seen:
                if not select.select([number], [], [], 10)[0]:
                    # Python's readline misses a Ctrl-C that comes just before it waits for a key
                    assert keys == b"\x03", (keys, awaited, seen)
                    os.write(number, keys)
                seen += os.read(number, 9999)
        return seen

    yield type_
    os.close(number)
    os.waitpid(pid, 0)


@pytest.mark.slow
def test_pasted_lines_are_one_turn_and_ctrl_c_keeps_the_text(terminal_of):
    # with bracketed paste on, the terminal marks what is pasted
    terminal_of(b"", b"\x1b[?2004h> ")
    terminal_of(b"\x1b[200~one\n:two\nthree\x1b[201~\r", b"\x1b[?2004h> ")
    for _ in "12":
        terminal_of(b"dropped", b"dropped")
        terminal_of(b"\x03", b"the text is kept; :quit or Ctrl-D ends)\r\n\x1b[?2004h> ")
    assert b"one\r\n:two\r\nthree" in terminal_of(b":text\r", b"\x1b[?2004h> ")
    assert b"Traceback" not in terminal_of(b":quit\r")
