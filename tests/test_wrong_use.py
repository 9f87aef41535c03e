"""Wrong uses of train.py and sample.py: one table, one test a script.

Each answers with one line on stderr, exits with 2 and writes nothing. evaluate's wrong uses are in
test_evaluate.py, quantize's in test_quantize.py.
"""

import gzip
import io
import json
import shutil
import struct
import sys
from dataclasses import dataclass

import pytest
import torch
from reference import TINY
from safetensors.torch import save_file
from test_train import SMALL, run

import sample
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import SampleConfig, TrainConfig, parse
from nanogpt2.config.flags import MOST
from nanogpt2.data.shards import write_shard
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer


@dataclass(frozen=True)
class Case:
    """A command line, and what the line of the error names.

    parsed: the command line itself is wrong, which must be said before anything is read.
    where: the folder of `place` to stand in.
    """

    argv: list[str]
    named: str | list[str]
    parsed: bool = False
    where: str = "."

    def __str__(self):
        return ascii(" ".join([*([] if self.where == "." else [self.where]), *self.argv]))


# ---- one flag whose value is wrong

TOO_MUCH = str(MOST + 1)
# what each kind of flag cannot be, whatever its range
NO_NUMBER = ["many", "0x10", "1e", "--lr", "1,5"]
NO_COUNT = [*NO_NUMBER, "1.5", "1e3", "nan", TOO_MUCH]
NO_RATE = [*NO_NUMBER, "nan", "inf", "-inf", "1e10"]

TRAIN_FLAGS = {
    "keep": (NO_COUNT, ["0", "-1"]),
    "epochs": (NO_RATE, ["0", "-0.5"]),
    "steps": (NO_COUNT, ["0", "-5"]),
    "batch_size": (NO_COUNT, ["0", "-8"]),
    "grad_accum": (NO_COUNT, ["0", "-1"]),
    "block_size": (NO_COUNT, ["0", "7", "-16"]),
    "patience": (NO_COUNT, ["0", "-1"]),
    "lr": (NO_RATE, ["-1e-4"]),
    "warmup": (NO_COUNT, ["-1"]),
    "weight_decay": (NO_RATE, ["-0.1"]),
    "grad_clip": (NO_RATE, ["-1"]),
    "dropout": (NO_RATE, ["-0.1", "1", "1.5"]),
    "ema": (NO_RATE, ["-0.1", "1"]),
    "lora_rank": (NO_COUNT, ["-1"]),
    "lora_alpha": (NO_RATE, ["0", "-1"]),
    "n_layer": (NO_COUNT, ["0", "1001"]),
    "n_head": (NO_COUNT, ["0"]),
    "n_embd": (NO_COUNT, ["0"]),
    "seed": (NO_NUMBER, ["-1", str(2**63), "1.5"]),
    "eval_every": (NO_COUNT, ["0"]),
    "save_every": (NO_COUNT, ["0"]),
    "sample_every": (NO_COUNT, ["0"]),
    "task": ([], ["translate", "LM", ""]),
    "optimizer": ([], ["sgd", ""]),
    "schedule": ([], ["step", "Cosine"]),
    "device": ([], ["gpu", "cuda:-1"]),
    "dtype": ([], ["fp16", "int8", "float64"]),
    "kernels": ([], ["cuda", "Triton", ""]),
    "tokenizer": ([], ["words", ""]),
    "resume": ([], ["yes", "1"]),
    "tensorboard": ([], ["maybe"]),
    "text_column": ([], [""]),
    "label_column": ([], [""]),
    "encoding": ([], ["", "utf-9", "rot13", "base64"]),
    "skip_bad": ([], ["yes"]),
    "validation": ([], [""]),
    "init": ([], [""]),
    "out": ([], [""]),
}
SAMPLE_FLAGS = {
    "batch_size": (NO_COUNT, ["0"]),
    "max_new_tokens": (NO_COUNT, ["-3"]),
    "min_new_tokens": (NO_COUNT, ["-1"]),
    "num_beams": (NO_COUNT, ["-2"]),
    "num_return_sequences": (NO_COUNT, ["-1"]),
    "top_p": (NO_RATE, ["-0.1", "1.1"]),
    "typical_p": (NO_RATE, ["0", "1.1"]),
    "repetition_penalty": (NO_RATE, ["-1"]),
    "penalty_alpha": (NO_RATE, ["1.1", "-0.1"]),
    "max_time": (NO_RATE, ["0", "-1"]),
    "no_repeat_ngram_size": (NO_COUNT, ["-1"]),
    "kernels": ([], ["cuda", "Triton", ""]),
}


def flag_cases(flags, argv, needed):
    """needed: the flags without which a flag is wrong whatever its value."""
    return [
        Case([*argv, *needed.get(name, []), *spelled(name, value)], f"--{name}", parsed=True)
        for name, (kind, own) in flags.items()
        for value in [*kind, *own]
    ]


def spelled(name, value):
    # a flag in a value's place stands apart
    return [f"--{name}", value] if value == "--lr" else [f"--{name}={value}"]


SCRATCH = ["--init", "scratch"]
OF_A_NEW_MODEL = ["n_layer", "n_head", "n_embd", "tokenizer"]
NEEDED_BY_TRAIN = dict.fromkeys(OF_A_NEW_MODEL, SCRATCH)
NEEDED_BY_TRAIN |= {"lora_alpha": ["--lora_rank", "2"]}
NEEDED_BY_SAMPLE = {name: ["--do_sample"] for name in ("top_p", "typical_p")}
NEEDED_BY_SAMPLE |= {"batch_size": ["--prompts", "x"]}

# ---- flags of train.py that clash

CLASHES = [
    (["--lora_rank", "8", "--init", "scratch"], "--lora_rank"),
    (["--lora_alpha", "16"], "--lora_alpha"),
    (["--lora_alpha", "16", "--lora_rank", "0"], "--lora_alpha"),
    (["--fsdp"], "torchrun"),
    (["--fsdp", "--lora_rank", "4"], "--fsdp"),
    (["--label_column", "kind"], "--task classify"),
    (["--label_column", "kind", "--task", "chat"], "--task classify"),
    (["--text_column", "body", "--task", "chat"], "--text_column"),
    (["--prompt", "Once", "--task", "classify"], "--prompt"),
    (["--sample_every", "5", "--task", "classify"], "--sample_every"),
    (["--steps", "5", "--epochs", "2"], "--epochs"),
    (["--steps", "5", "--warmup", "6"], "--warmup"),
    (["--resume", "--overwrite"], "--overwrite"),
    (["--n_layer", "2"], "--init scratch"),
    (["--n_head", "2"], "--init scratch"),
    (["--n_embd", "8"], "--init scratch"),
    (["--tokenizer", "gpt2"], "--init scratch"),
    (["--init", "scratch", "--n_head", "3"], "--n_embd"),
    (["--patience", "2", "--eval_every", "50", "--steps", "20"], "--patience"),
    (["--patience", "3", "--eval_every", "10", "--steps", "20"], "--patience"),
    (["--stesp", "5"], "--steps"),
    (["--learning_rate", "-5"], "--lr"),
    (["--data", "book.txt"], "DATA"),
    (["-x"], "second DATA"),
    (["--no_lr"], "--no_lr"),
    (["--no_resume", "true"], "--no_resume"),
    (["--no_compile=1"], "--no_compile"),
    (["--batch_size"], "--batch_size"),
    (["--init"], "--init"),
    (["--init", "gpt2-small"], "--init"),
    (["--init", "openai-community/"], "--init"),
]

# ---- files, by name: everything wrong that a file can be


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD_CHAT = {"prompt": "Hello", "completion": " you"}
GOOD_LABEL = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
TEXT = "A sheep jumped over the fence. " * 60


def files():
    """Everything wrong that a file can be, by name."""
    packed = gzip.compress(TEXT.encode())
    classify = lines(*GOOD_LABEL)
    return {
        "book.txt": TEXT,
        "empty.txt": "",
        "blank.txt": " \n\t\n",
        "short.txt": "too short",
        "latin1.txt": (TEXT + "café").encode("latin-1"),
        "utf16.txt": TEXT.encode("utf-16") + b"\0",
        "cut.txt.gz": packed[: len(packed) // 2],
        "plain.txt.gz": TEXT,
        "plain.txt.zst": TEXT,
        "broken.parquet": b"PAR1 no more",
        "broken.jsonl": lines({"text": TEXT}) * 2 + '{"text": "no end\n',
        "array.jsonl": lines([1, 2]),
        "number.jsonl": lines({"text": 5}),
        "null.jsonl": lines({"text": TEXT}, {"text": None}),
        "no_text.jsonl": lines({"title": "a", "body": TEXT}),
        "no_rows.jsonl": "\n\n",
        "latin1.jsonl": lines({"text": TEXT}).encode() + b'{"text": "caf\xe9"}\n',
        "no_text.csv": "title,body\na,b\n",
        "ragged.csv": "text,label\na,b\na,b,c\n",
        "twice.csv": "text,text\na,b\n",
        "quote.csv": 'text,label\n"ab,c\n',
        "swallowed.csv": 'text,label\n"a,b\nc,d\n',
        "header.csv": "text,label\n",
        "ragged.tsv": "text\tlabel\na\n",
        "text.tokens": TEXT,
        "chat.jsonl": lines(*[GOOD_CHAT] * 20),
        "no_completion.jsonl": lines(GOOD_CHAT, {"prompt": "Hello", "answer": "you"}),
        "empty_completion.jsonl": lines(GOOD_CHAT, {"prompt": "Hello", "completion": " "}),
        "no_messages.jsonl": lines({"messages": []}),
        "text_messages.jsonl": lines({"messages": "Hello"}),
        "no_role.jsonl": lines({"messages": [{"content": "Hello"}]}),
        "bad_role.jsonl": lines(messages(("robot", "Hello"), ("assistant", "you"))),
        "no_answer.jsonl": lines(messages(("user", "Hello"))),
        "word_messages.jsonl": lines({"messages": ["Hello"]}),
        "one_chat.jsonl": lines(GOOD_CHAT),
        "classify.jsonl": classify,
        "one_label.jsonl": lines(*[{"text": "a", "label": "x"}] * 9),
        "no_label.jsonl": lines(*GOOD_LABEL, {"text": "a", "kind": "x"}),
        "blank_label.jsonl": lines(*GOOD_LABEL, {"text": "a", "label": " "}),
        "list_label.jsonl": lines(*GOOD_LABEL, {"text": "a", "label": [0.5]}),
        "null_label.jsonl": lines(*GOOD_LABEL, {"text": "a", "label": None}),
        "cut.json": '[{"text": "a"},\n{"text": "b"}\n',
        "two.jsonl": lines(*GOOD_LABEL[:2]),
        "other_label.jsonl": lines({"text": "a", "label": "unheard of"}),
        "unlabelled.csv": "text,kind\na,b\n",
        "word.pdf": "%PDF",
        "pickle.bin": b"\x80\x04.",
        "cut.safetensors": b"\x08\0\0\0\0\0\0\0{}",
        "settings.json": "{}",
    }


# ---- data, with SMALL's model

CHAT, LABELS = ["--task", "chat"], ["--task", "classify"]
BAD_DATA = [
    (["missing.txt"], ["DATA", "'missing.txt'", "pydocs"]),
    (["missing/*.txt"], ["DATA", "missing/*.txt"]),
    (["a\0b"], "DATA"),
    (["nothing"], ["DATA", "'nothing'", ".jsonl"]),
    (["pdfs"], ["DATA", "'pdfs'", ".parquet"]),
    (["pdfs/*.txt"], "DATA"),
    (["empty.txt"], ["DATA", "'empty.txt' is empty"]),
    (["blank.txt"], ["DATA", "'blank.txt' is empty"]),
    (["short.txt"], ["DATA", "10 tokens", "90"]),
    (["latin1.txt"], ["DATA", "0xe9", "offset 1863", "--encoding cp1252"]),
    (["utf16.txt"], ["DATA", "UTF-16", "offset"]),
    (["cut.txt.gz"], ["DATA", "cut.txt.gz", "damaged"]),
    (["plain.txt.gz"], ["DATA", "plain.txt.gz", "damaged"]),
    (["plain.txt.zst"], ["DATA", "plain.txt.zst", "damaged"]),
    (["broken.parquet"], ["DATA", "broken.parquet", "Parquet"]),
    (["broken.jsonl"], ["DATA", "line 3", "no end"]),
    (["array.jsonl"], ["line 1", "not a JSON object", "[1, 2]"]),
    (["number.jsonl"], ["line 1", "'text' must be text", "5"]),
    (["null.jsonl"], ["line 2", "'text' must be text", "None"]),
    (["no_text.jsonl"], ["no column 'text'", "'title', 'body'"]),
    (["no_rows.jsonl"], ["DATA", "'no_rows.jsonl' is empty"]),
    (["latin1.jsonl"], ["0xe9", "offset"]),
    (["no_text.csv"], ["line 2", "no column 'text'", "'title', 'body'"]),
    (["ragged.csv"], ["line 3", "3 fields, not 2"]),
    (["twice.csv"], ["line 1", "twice"]),
    (["quote.csv"], ["line 2", "malformed"]),
    (["swallowed.csv"], ["DATA 'swallowed.csv' line 2 opens a quote", "line 3"]),
    (["cut.json"], ["DATA 'cut.json' is not JSON Lines or an array", "line 2"]),
    (["latin1.txt", "--encoding", "ascii"], ["DATA", "not ASCII", "0xe9", "offset 1863"]),
    (["header.csv"], "'header.csv' is empty"),
    (["ragged.tsv"], ["line 2", "1 fields, not 2"]),
    (["text.tokens"], ["text.tokens", "not a token file"]),
    (["outside.tokens"], ["token id 257", "vocabulary of 257"]),
    (["cut.tokens"], ["cut.tokens", "bytes"]),
    (["flipped.tokens"], ["flipped.tokens", "SHA-256"]),
    (["version.tokens"], ["version 9"]),
    (["tokens/*.tokens"], ["DATA", ".tokens file among others"]),
    (["chat.jsonl", "--text_column", "content"], ["no column 'content'", "'prompt'"]),
    (["good.tokens", *CHAT], ["good.tokens", "chat needs .jsonl"]),
    (["good.tokens", *LABELS], ["good.tokens", "classify needs .jsonl"]),
    (["book.txt", *CHAT], ["'book.txt' is text", "chat needs .jsonl"]),
    (["pydocs", *CHAT], ["DATA", "is text", "chat needs"]),
    (["no_completion.jsonl", *CHAT], ["line 2", "no column 'completion'", "'answer'"]),
    (["empty_completion.jsonl", *CHAT], ["line 2", "'completion' is empty"]),
    (["no_messages.jsonl", *CHAT], ["line 1", "'messages'", "list"]),
    (["text_messages.jsonl", *CHAT], ["line 1", "'messages'", "Hello"]),
    (["word_messages.jsonl", *CHAT], ["message 1", "role", "Hello"]),
    (["no_role.jsonl", *CHAT], ["message 1", "no column 'role'", "'content'"]),
    (["bad_role.jsonl", *CHAT], ["message 1", "robot", "assistant"]),
    (["no_answer.jsonl", *CHAT], ["line 1", "last message", "user's"]),
    (["broken.jsonl", *CHAT], ["line 1", "no column 'prompt'", "'text'"]),
    (["one_chat.jsonl", *CHAT], ["too few records", "--validation"]),
    (["no_text.csv", *CHAT], ["no column 'prompt'", "'title'"]),
    (["one_label.jsonl", *LABELS], ["one label alone, 'x'", "two are needed"]),
    (["book.txt", *LABELS], "one label alone"),
    (["pydocs", *LABELS], "one label alone"),
    (["no_label.jsonl", *LABELS], ["line 21", "no column 'label'", "'text', 'kind'"]),
    (["unlabelled.csv", *LABELS], ["line 2", "no column 'label'", "'text', 'kind'"]),
    (["blank_label.jsonl", *LABELS], ["line 21", "'label' is empty"]),
    (["list_label.jsonl", *LABELS], ["line 21", "'label'", "0.5", "--skip_bad"]),
    (["null_label.jsonl", *LABELS], ["line 21", "'label'", "None"]),
    (["two.jsonl", *LABELS], ["too few records", "--validation"]),
    (["classify.jsonl", *LABELS, "--label_column", "kind"], ["no column 'kind'", "'label'"]),
    (["classify.jsonl", *LABELS, "--text_column", "body"], ["no column 'body'", "'text'"]),
]
BAD_VALIDATION = [
    (["book.txt", "--validation", "missing.txt"], ["--validation", "'missing.txt'"]),
    (["book.txt", "--validation", "pdfs"], ["--validation", "'pdfs'"]),
    (["book.txt", "--validation", "empty.txt"], "'empty.txt' is empty"),
    (["book.txt", "--validation", "latin1.txt"], ["latin1.txt", "offset 1863"]),
    (["book.txt", "--validation", "short.txt"], ["--block_size", "<= 9", "short.txt", "16"]),
    (["book.txt", "--validation", "broken.jsonl"], "line 3"),
    (["book.txt", "--validation", "outside.tokens"], "token id 257"),
    (["chat.jsonl", *CHAT, "--validation", "book.txt"], "'book.txt' is text"),
    (["chat.jsonl", *CHAT, "--validation", "no_answer.jsonl"], "last message"),
    (
        ["classify.jsonl", *LABELS, "--validation", "other_label.jsonl"],
        ["other_label.jsonl", "labels unseen in training", "'unheard of'"],
    ),
    (["classify.jsonl", *LABELS, "--validation", "no_label.jsonl"], "no column 'label'"),
]

# ---- models and folders

BAD_MODELS = [
    (["--init", "missing"], ["--init", "'missing'", "gpt2-xl"]),
    (["--init", "book.txt"], ["--init", "safetensors"]),
    (["--init", "pickle.bin"], ["--init", "pickle"]),
    (["--init", "settings.json"], ["--init", "safetensors"]),
    (["--init", "cut.safetensors"], ["--init", "cut.safetensors"]),
    (["--init", "strange.safetensors"], ["--init", "strange.safetensors"]),
    (["--init", "nothing"], ["--init", "nothing"]),
    (["--init", "no_weights"], ["--init", "no_weights"]),
    (["--init", "odd"], ["--init", "odd"]),
    (["--init", "theirs"], ["--init", "theirs"]),
    (["--init", "no_tokenizer"], ["vocabulary"]),
    (["--init", "model", "--block_size", "33"], ["--block_size", "<= 32", "33"]),
    (["--init", "model", "--validation", "short.txt"], ["--block_size", "<= 9", "short.txt", "32"]),
    (["--init", "classifier"], ["--init", "classifier", "--task classify"]),
    (["--init", "classifier", *CHAT], ["--init", "classifier", "--task classify"]),
    (["--init", "classifier", *LABELS], ["labels unseen in training", "'a', 'b'"]),
    (["--init", "model", "--device", "mps"], ["--device", "mps"]),
    (["--init", "model", "--out", "book.txt"], ["--out", "'book.txt' is a file"]),
    (["--init", "model", "--out", "book.txt/out"], ["--out", "book.txt/out"]),
    (["--init", "model", "--out", "theirs"], ["--out", "model.safetensors", "--overwrite"]),
    (["--init", "theirs", "--out", "theirs", "--overwrite"], ["--out", "--init"]),
    (["--init", "model", "--out", "missing", "--resume"], ["--out", "no run to --resume"]),
    (["--init", "model", "--out", "theirs", "--resume"], ["--out", "no run to --resume"]),
    (["--init", "model", "--block_size", "32", "--epochs", "1e-9", "--warmup", "9"], "--warmup"),
]

# ---- a run that is to go on otherwise

OTHERWISE = {
    "init": "model",
    "task": "chat",
    "validation": "book.txt",
    "text_column": "body",
    "epochs": "4",
    "steps": "9",
    "batch_size": "2",
    "grad_accum": "3",
    "block_size": "8",
    "patience": "3",
    "optimizer": "muon",
    "lr": "0.5",
    "schedule": "wsd",
    "warmup": "2",
    "weight_decay": "0.5",
    "grad_clip": "0.5",
    "dropout": "0.5",
    "ema": "0.5",
    "seed": "5",
    "dtype": "bfloat16",
    "n_layer": "3",
    "n_head": "1",
    "n_embd": "32",
    "tokenizer": "gpt2",
}
RECORDS = ["", "{}", "[]", "not json", '{"config": 5}', '{"config": {}, "digests": {}}']


def source_for(argv):
    return f"{argv[argv.index('--task') + 1]}.jsonl" if "--task" in argv else "book.txt"


def resumed(name, value):
    # a new model's flags stand beside --init scratch alone
    beside = SCRATCH if name in OF_A_NEW_MODEL else []
    argv = ["chat.jsonl" if name == "task" else "book.txt", *beside, f"--{name}", value, "--resume"]
    return Case(argv, ["--out", f"--{name}", value], where="stopped")


ADAPTER = ["book.txt", "--init", "base", "--lora_rank", "2", "--steps", "4", "--save_every", "2"]

# ---- the table

TRAIN = [
    *flag_cases(TRAIN_FLAGS, ["pydocs"], NEEDED_BY_TRAIN),
    *(Case(["pydocs", *argv], named, parsed=True) for argv, named in CLASHES),
    *(
        Case([*argv, *SMALL, "--steps", "2"], named)
        for argv, named in [*BAD_DATA, *BAD_VALIDATION, (["-"], ["DATA", "is empty"])]
    ),
    *(Case([source_for(argv), *argv], named) for argv, named in BAD_MODELS),
    *(resumed(name, value) for name, value in OTHERWISE.items()),
    Case(
        ["other.txt", "--resume"],
        ["--resume", "holds a run on another data than 'other.txt'"],
        where="stopped",
    ),
    *(
        Case(["pydocs", "--resume"], ["--out", "run.json", "damaged"], where=f"record{i}")
        for i in range(len(RECORDS))
    ),
    # LoRA's weights belong to the very model that they were trained on
    Case(
        [*ADAPTER, "--resume"],
        ["--resume", "another init than 'base' is now"],
        where="adapter",
    ),
]
LENS = ["--model", "model", "--lens"]
# the inside of the model: what the command line itself forbids, then what takes files to know
BAD_LOOKS = [
    (["--lens"], ["PROMPT is missing", "--lens", "--prompt_file"]),
    (["", "--tokens"], ["PROMPT is missing", "--tokens"]),
    (["Hi", "--attention=3"], ["--attention", "LAYER.HEAD", "'3'"]),
    (["Hi", "--attention", "-1.0"], ["--attention", "LAYER.HEAD", "'-1.0'"]),
    (["Hi", "--attention", "9" * 5000 + ".0"], ["--attention", "LAYER.HEAD", "..."]),
    (["Hi", "--attention=head"], ["--attention", "LAYER.HEAD", "'head'"]),
    (["Hi", "--attention", "head"], ["'head' is a second PROMPT"]),
    (["Hi", "--html", "new.html"], ["--html", "--attention, --lens or --tokens"]),
    (["Hi", "--lens", "--html="], ["--html", "empty"]),
    (["Hi", "--lens", "--html"], ["--html", "value"]),
    *(
        (["Hi", "--attention", *words], [words[0], "left out", "--attention"])
        for words in (
            ["--json"],
            ["--explain"],
            ["--tree"],
            ["--interactive"],
            ["--color", "rank"],
            ["--compare", "demo"],
            ["--temperature", "2"],
            ["--max_new_tokens", "5"],
            ["--num_beams", "2"],
            ["--seed", "5"],
        )
    ),
    (["--prompts", "book.txt", "--lens"], ["--prompts", "left out", "--lens"]),
    (["Hi", "--classify", "--lens", "--model", "classifier"], ["--lens", "left out"]),
]
BAD_LOOKS_AT_FILES = [
    (["Hi", "--model", "classifier", "--lens"], ["--model", "classifier"]),
    (["Hi", "--model", "missing", "--tokens"], ["--model", "missing"]),
    (["Hi", "--model", "no_tokenizer", "--tokens"], ["--model", "vocabulary"]),
    (["Hi", "--model", "model", "--attention", "1.0"], ["--attention", "0 to 0", "1.0"]),
    (["Hi", "--model", "model", "--attention", "0.2"], ["--attention", "0 to 1", "0.2"]),
    (["x" * 33, *LENS], ["PROMPT", "32", "33"]),
    (["--prompt_file", "empty.txt", *LENS], ["--prompt_file 'empty.txt' is empty"]),
    (["-", *LENS], "PROMPT is empty"),
    (["Hi", *LENS, "--html", "book.txt"], ["--html", "'book.txt' exists"]),
    (["Hi", *LENS, "--html", "model"], ["--html", "folder 'model'"]),
    (["Hi", *LENS, "--html", "new.html/"], ["--html", "folder 'new.html/'"]),
    (["Hi", *LENS, "--html", "missing/new.html"], ["--html", "'missing' is not a folder"]),
    (["Hi", *LENS, "--html", "/dev/null"], ["--html", "'/dev/null' is no regular file"]),
    (["Hi", *LENS, "--html", "n" * 300], ["--html", "too long"]),
]
SAMPLE = [
    *flag_cases(SAMPLE_FLAGS, ["--model", "demo"], NEEDED_BY_SAMPLE),
    *(
        Case(argv, named)
        for argv, named in [
            (["Hi", "--model", "missing"], ["--model", "missing"]),
            (["Hi", "--model", "pickle.bin"], ["--model", "pickle"]),
            (["Hi", "--model", "book.txt"], ["--model", "safetensors"]),
            (["Hi", "--model", "nothing"], ["--model", "nothing"]),
            (["Hi", "--model", "no_weights"], ["--model", "no_weights"]),
            (["Hi", "--model", "odd"], ["--model", "odd"]),
            (["Hi", "--model", "theirs"], ["--model", "theirs"]),
            (["Hi", "--model", "cut.safetensors"], ["--model", "cut.safetensors"]),
            (["Hi", "--model", "strange.safetensors"], ["--model", "strange.safetensors"]),
            (["Hi", "--model", "classifier"], ["--model", "classifier"]),
            (["Hi", "--model", "model", "--compare", "classifier"], ["--compare", "classifier"]),
            (["Hi", "--model", "model", "--compare", "odd"], ["--compare", "odd"]),
            (["Hi", "--model", "model", "--max_length", "2"], "--max_length"),
            (["Hi", "--model", "model", "--eos_token_id", "257"], "--eos_token_id"),
            (["Hi", "--model", "model", "--pad_token_id", "257"], "--pad_token_id"),
            (["--prompt_file", "latin1.txt", "--model", "model"], ["--prompt_file", "offset 1863"]),
            (["--prompt_file", "missing", "--model", "model"], ["--prompt_file", "missing"]),
            (["--prompts", "broken.jsonl", "--model", "model"], ["--prompts", "line 1"]),
            (["--prompts", "missing.jsonl", "--model", "model"], ["--prompts", "missing"]),
            (["--prompts", "array.jsonl", "--model", "model"], ["--prompts", "line 1"]),
            (["--prompts", "latin1.txt", "--model", "model"], ["--prompts", "1863"]),
            *BAD_LOOKS_AT_FILES,
        ]
    ),
    *(Case(["--model", "demo", *argv], named, parsed=True) for argv, named in BAD_LOOKS),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder full of what cannot be used, and one text and one model that can."""
    place = tmp_path_factory.mktemp("place")
    for name, content in files().items():
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("nothing", "pdfs", "no_weights", "theirs", "odd"):
        (place / name).mkdir()
    (place / "pdfs/a.pdf").write_text("%PDF")
    (place / "theirs/model.safetensors").write_bytes(b"precious")
    (place / "odd/config.json").write_text("not json")
    (place / "odd/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (place / "no_weights/config.json").write_text("{}")
    ids = torch.randint(256, (500,)).numpy()
    write_shard(place / "outside.tokens", [*ids, 257])
    write_shard(place / "good.tokens", ids)
    good = (place / "good.tokens").read_bytes()
    (place / "cut.tokens").write_bytes(good[:-3])
    (place / "flipped.tokens").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (place / "version.tokens").write_bytes(good[:8] + struct.pack("<I", 9) + good[12:])
    (place / "tokens").mkdir()
    for name in ("a.tokens", "b.tokens"):
        (place / "tokens" / name).write_bytes(good)
    torch.manual_seed(0)
    end = byte_tokenizer().end_of_text
    shape = {"vocab_size": 257, "block_size": 32, "bos_token_id": end, "eos_token_id": end}
    model = GPT(type(TINY)(n_layer=1, n_head=2, n_embd=8, **shape))
    save_model(model, place / "model", byte_tokenizer())
    save_model(GPTClassifier(model, ("x", "y")), place / "classifier", byte_tokenizer())
    save_model(GPT(TINY), place / "no_tokenizer")
    save_file({"some": torch.zeros(2)}, place / "strange.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        stopped_run(place, patch)
        changed_base(place, patch)
    for i, content in enumerate(RECORDS):
        (place / f"record{i}/out").mkdir(parents=True)
        (place / f"record{i}/out/run.json").write_text(content)
    return place


def stopped_run(place, patch):
    """A finished run of 4 steps, its last checkpoint gone, can be resumed."""
    (place / "stopped").mkdir()
    patch.chdir(place / "stopped")
    for name in ("book.txt", "chat.jsonl"):
        shutil.copy(place / name, name)
    shutil.copytree(place / "model", "model")
    assert run("book.txt", *SMALL, "--steps", "4", "--save_every", "2") == 0
    shutil.rmtree("out/checkpoints/step-4")
    (place / "stopped/other.txt").write_text(TEXT + "!")


def changed_base(place, patch):
    """An adapter's run could be resumed, if its model were still the same."""
    where = place / "adapter"
    where.mkdir()
    patch.chdir(where)
    shutil.copy(place / "book.txt", "book.txt")
    model = GPT(type(TINY)(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=8))
    save_model(model, where / "base", byte_tokenizer())
    assert run(*ADAPTER) == 0
    shutil.rmtree("out/checkpoints/step-4")
    with torch.no_grad():
        model.wte.weight[0, 0] += 1
    save_model(model, where / "base", byte_tokenizer())


def everything(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def before(place):
    return everything(place)


@pytest.fixture
def check(capsys, place, before, monkeypatch):
    """Run one case: its exit status, its one line, and that nothing was written."""

    def check(case, config, start):
        monkeypatch.chdir(place / case.where)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stopped:
            parse(config, case.argv)
            assert not case.parsed, "the command line was taken"
            sys.exit(start())
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, (out, err)
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 201
        for part in [case.named] if isinstance(case.named, str) else case.named:
            assert part in err, err
        assert everything(place) == before

    return check


@pytest.mark.parametrize("case", TRAIN, ids=str)
def test_train(check, case):
    check(case, TrainConfig, lambda: run(*case.argv))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_sample(check, case):
    check(case, SampleConfig, lambda: sample.main(parse(SampleConfig, case.argv)))
