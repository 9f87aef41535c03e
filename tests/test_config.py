"""The command line: every wrong use is one line, found before torch is imported."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from reference import ROOT

from nanogpt2.config import (
    DECODING_FLAGS,
    FROM_CHECKPOINT,
    MAX_SEED,
    PRESETS,
    SAMPLING_FLAGS,
    SENSIBLE_SAMPLING,
    GenerationConfig,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    parse,
)
from nanogpt2.evaluate import EvaluateConfig
from nanogpt2.quantize import QuantizeConfig


def sample(*argv):
    return parse(SampleConfig, ["--model", "demo", *argv])


def train(*argv):
    return parse(TrainConfig, ["pydocs", *argv])


def test_no_decoding_flag_samples_sensibly():
    config = sample("Hello", "--seed", "7", "--num_return_sequences=3", "--max-new-tokens", "9")
    generation = config.generation
    assert config.prompt == "Hello"
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.8, 0.95)
    assert (generation.seed, generation.num_return_sequences) == (7, 3)
    assert generation.max_new_tokens == 9


# flags that mean nothing by themselves
COMPANIONS = {
    "num_beam_groups": ["--num_beam_groups=2", "--num_beams=4", "--diversity_penalty=0.5"],
    "diversity_penalty": ["--diversity_penalty=0.5", "--num_beams=4", "--num_beam_groups=2"],
    "force_words_ids": ["--force_words_ids=[[1,2]]", "--num_beams=4"],
    "stochastic_beams": ["--stochastic_beams", "--num_beams=4"],
    "penalty_alpha": ["--penalty_alpha=0.6", "--top_k=4"],
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_flags_that_need_others(name):
    config = sample(*COMPANIONS[name]).generation
    assert getattr(config, name) != getattr(GenerationConfig(), name)
    assert not config.do_sample and config.max_new_tokens == 100


@pytest.mark.parametrize("name", [name for name in DECODING_FLAGS if name not in COMPANIONS])
def test_a_decoding_flag_switches_to_hugging_faces_defaults(name):
    values = {
        "early_stopping": "never",
        "sequence_bias": "[[[5], 1.5]]",
        "bad_words_ids": "[[5]]",
        "suppress_tokens": "[5]",
        "begin_suppress_tokens": "[5]",
        "exponential_decay_length_penalty": "[5, 1.5]",
        "force_words_ids": "[[5]]",
    }
    companions = {
        "num_beam_groups": {"num_beams": 3, "diversity_penalty": 1.5},
        "diversity_penalty": {"num_beams": 3, "num_beam_groups": 3},
        "force_words_ids": {"num_beams": 3},
        "stochastic_beams": {"num_beams": 3},
        "length_penalty": {"num_beams": 3},
        "early_stopping": {"num_beams": 3},
    }.get(name, {})
    bare = name in ("do_sample", "renormalize_logits", "stochastic_beams")
    argv = [f"--{name}"] if bare else [f"--{name}", values.get(name, "0.5")]
    known = next(f for f in fields(GenerationConfig) if f.name == name)
    if "int" in str(known.type):
        argv = [f"--{name}", "3"]
    for flag, value in companions.items():
        argv += [f"--{flag}", str(value)]
    given = companions | {name: getattr(sample(*argv).generation, name), "max_new_tokens": 100}
    assert given[name] != known.default, "the flag changed nothing"
    # a sampling flag implies sampling
    expected = GenerationConfig(**{"do_sample": name in ("do_sample", *SAMPLING_FLAGS)} | given)
    assert sample(*argv).generation == expected


def test_a_flag_that_neither_samples_nor_searches_keeps_the_default_sampling():
    """--no_repeat_ngram_size 3 alone would make the loops of greedy decoding worse."""
    for argv in (
        ["--no_repeat_ngram_size", "3"],
        ["--repetition_penalty", "1.2"],
        ["--max_length", "30"],
        ["--bad_words_ids", "[[5]]"],
        ["--min_new_tokens", "5"],
        ["--eos_token_id", "none"],
    ):
        generation = sample(*argv).generation
        shown = {name: getattr(generation, name) for name in SENSIBLE_SAMPLING}
        assert shown == SENSIBLE_SAMPLING, argv
    assert sample("--do_sample", "false", "--repetition_penalty", "2").generation.samples is False


@pytest.mark.parametrize("other", [["--do_sample", "false"], ["--num_beams", "3"]])
@pytest.mark.parametrize("flag", ["--temperature=0.7", "--top_p=0.9", "--top_k=5"])
def test_a_sampling_flag_beside_a_search_that_does_not_sample(capsys, flag, other):
    with pytest.raises(SystemExit, match="2"):
        sample(flag, *other)
    assert f"error: {flag.partition('=')[0]} must come with do_sample" in capsys.readouterr().err


# names from other programs: what is typed -> our flag and its value
TYPED = [
    (train, "--learning_rate 1e-3", "lr", 1e-3),
    (train, "--num_train_epochs 2", "epochs", 2.0),
    (train, "--max_steps 9", "steps", 9),
    (train, "--max_iters=9", "steps", 9),
    (train, "--gradient_accumulation_steps 4", "grad_accum", 4),
    (train, "--out_dir mine", "out", "mine"),
    (train, "--output-dir mine", "out", "mine"),
    (train, "--warmup_steps 3", "warmup", 3),
    (train, "--warmup_iters 3", "warmup", 3),
    (train, "--save_steps 3", "save_every", 3),
    (train, "--eval_interval 3", "eval_every", 3),
    (train, "--max_grad_norm 0.5", "grad_clip", 0.5),
    (train, "--model_name_or_path demo", "init", "demo"),
    (train, "--max_seq_length 64", "block_size", 64),
    (train, "--lora_r 4", "lora_rank", 4),
    (train, "--gradient_checkpointing", "activation_checkpointing", True),
    (sample, "--max_tokens 7", "max_new_tokens", 7),
    (sample, "--length 7", "max_new_tokens", 7),
    (sample, "--n_predict 7", "max_new_tokens", 7),
    (sample, "--num_samples 3", "num_return_sequences", 3),
    (sample, "--nsamples 3", "num_return_sequences", 3),
    (sample, "--stop ###", "stop_strings", "###"),
    (sample, "--temp 0.5", "temperature", 0.5),
    (sample, "--model_name_or_path demo", "model", "demo"),
]


@pytest.mark.parametrize(
    ("command", "typed", "name", "value"), TYPED, ids=[row[1] for row in TYPED]
)
def test_a_name_from_another_program_is_ours(command, typed, name, value):
    config = command(*typed.split())
    assert getattr(config if hasattr(config, name) else config.generation, name) == value


def test_a_word_of_two_letters_is_a_prompt():
    for word in ("Hi", "-", "in", "an", "-x"):
        assert sample(word).prompt == word


@pytest.mark.parametrize(
    "cls", [SampleConfig, TrainConfig, EvaluateConfig, QuantizeConfig], ids=lambda c: c.__name__
)
def test_every_alias_is_a_flag_and_every_hint_is_none(cls):
    more = (GenerationConfig,) if cls is SampleConfig else ()
    flags = {f.name for c in (cls, *more) for f in fields(c) if f.metadata}
    assert set(cls.ALIASES.values()) <= flags
    assert not flags & (cls.ALIASES.keys() | (cls.HINTS.keys() - {"data"}))
    # what a hint names is there
    every = {f.name for c in (SampleConfig, TrainConfig, GenerationConfig) for f in fields(c)}
    for name, hint in cls.HINTS.items():
        named = set(re.findall(r"--(\w+)", hint)) - {"nproc_per_node"}
        assert named <= every, name
        assert len(f"error: --{name} is not a flag; {hint}") <= 200
    assert not cls.ALIASES.keys() & cls.HINTS.keys()


@pytest.mark.parametrize(
    ("command", "typed", "said"),
    [
        (sample, "-n 3", "-n is not a flag; a number of texts is --num_return_sequences, of"),
        (sample, "-m demo", "-m is not a flag; the model is --model"),
        (sample, "--start Hello", "--start is not a flag; the prompt stands by itself"),
        (sample, "--frequency_penalty 1", "--frequency_penalty is not a flag; use --repetition_pe"),
        (train, "--bf16 true", "--bf16 is not a flag; use --dtype bfloat16"),
        (train, "--model gpt2", "--model is not a flag; the model to start from is --init"),
        (train, "--per_device_train_batch_size 4", "--per_device_train_batch_size is not a flag; "),
        (train, "--train_file=book.txt", "--train_file is not a flag; DATA stands by itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_with_another_meaning_is_answered_with_ours(capsys, command, typed, said):
    with pytest.raises(SystemExit, match="2"):
        command(*typed.split())
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_hyphens_equals_negations_and_the_last_wins():
    config = sample("--do-sample", "--top-k=5", "--top_k", "6", "--no_json", "--json=true")
    assert config.generation.top_k == 6 and config.json
    assert not sample("--json", "--no-json").json
    assert sample("--", "--model").prompt == "--model"
    assert sample("-").prompt == "-"
    assert sample("--eos_token_id", "1,2").generation.eos_token_id == (1, 2)
    assert sample("--eos_token_id=none").generation.eos_token_id is None
    assert GenerationConfig().eos_token_id == FROM_CHECKPOINT
    assert sample("--seed", str(MAX_SEED)).generation.seed == MAX_SEED


def test_a_flag_that_is_true_or_false_takes_either():
    assert sample("--do_sample", "true").generation.do_sample
    config = sample("--do_sample", "False", "Hello")
    assert not config.generation.do_sample and config.prompt == "Hello"
    # any other word is not the flag's
    assert sample("--json", "falsehood").prompt == "falsehood"
    assert sample("false", "--json").prompt == "false"
    assert sample("--json", "--", "true").prompt == "true"


def test_none_is_no_value_for_any_flag():
    none = sample("--preset", "dialogue", "--stop_strings", "none", "--suppress_tokens=none")
    assert none.generation.stop_strings is None and none.generation.suppress_tokens is None
    # what does not begin with [ is a text as it is
    for text in ("null", "{}", '"', "none of it"):
        assert sample("--stop_strings", text).generation.stop_strings == text
    assert sample("--stop_strings", '["none"]').generation.stop_strings == ["none"]
    assert train("--steps", "none", "--epochs", "2").epochs == 2
    assert train("--prompt", "").prompt == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "x"], "--prompt is not a flag: PROMPT stands by itself"),
        (["--prompt_fle", "x"], "did you mean --prompt_file?"),
        (["--eos_token_id", "x"], "a whole number >= -1 or several as 1,2 or none"),
        (["--eos_token_id=-1,5"], "-1 alone"),
        (["--preset", "story", "--penalty_alpha", "0.5"], "(--preset story sets it)"),
        (["--preset", "translate", "--penalty_alpha", "0.5"], "num_beams must be left out"),
        (["--no_json", "true"], "--json does"),
        (["--no_json=true"], "--json does"),
        (["--min_new_tokens", "101"], "max_new_tokens (100), not 101"),
        (["--min_length", "9", "--max_length", "8"], "max_length (8), not 9"),
        (["--bad_words_ids", "x"], "a list of lists of token ids in JSON, or none"),
    ],
    ids=str,
)
def test_errors_say_what_to_do(capsys, argv, said):
    with pytest.raises(SystemExit):
        sample(*argv)
    assert said in capsys.readouterr().err


def test_only_what_the_preset_sets_is_said_to_be_the_presets(capsys):
    with pytest.raises(SystemExit):
        sample("--preset", "story", "--penalty_alpha", "0.5", "--do_sample")
    assert "preset" not in capsys.readouterr().err
    both = ["--preset", "story", "--penalty_alpha", "0.5", "--no_do_sample"]
    assert sample(*both).generation.penalty_alpha == 0.5


def test_help_shows_a_default_where_there_is_one(capsys):
    for cls in (SampleConfig, TrainConfig):
        with pytest.raises(SystemExit):
            parse(cls, ["--help"])
    out = capsys.readouterr().out
    assert "(default: )" not in out
    assert "(default: 0.0)" in out and "(default: 0)" in out and "(default: gpt2)" in out


WRONG_SAMPLE = [
    (["--temperature", "١", "--do_sample"], "--temperature"),
    (["--temperature", "1_0", "--do_sample"], "--temperature"),
    (["--model", ""], "--model"),
    (["--compare", ""], "--compare"),
    (["--prompts", ""], "--prompts"),
    (["--prompt_file", ""], "--prompt_file"),
    (["--temperature", "-1", "--do_sample"], "--temperature"),
    (["--temperature=nan", "--do_sample"], "--temperature"),
    (["--temperature=inf", "--do_sample"], "--temperature"),
    (["--temperature", "1e999", "--do_sample"], "--temperature"),
    (["--temperature", "0.5", "--do_sample", "false"], "--temperature"),
    (["--temperature"], "--temperature"),
    (["--top_k", "-1", "--do_sample"], "--top_k"),
    (["--top_k", "2.5", "--do_sample"], "--top_k"),
    (["--top_k", "9" * 5000, "--do_sample", "--top_k", "-" + "9" * 5000], "--top_k"),
    (["--top_k", "5", "--num_beams", "2"], "--top_k"),
    (["--top_p", "1.5", "--do_sample"], "--top_p"),
    (["--top_p", "5"], "--top_p"),
    (["--repetition_penalty", "0"], "--repetition_penalty"),
    (["--no_repeat_ngram_size", "-2"], "--no_repeat_ngram_size"),
    (["--num_return_sequences", "0"], "--num_return_sequences"),
    (["--num_return_sequences", "2", "--do_sample", "false"], "--num_return_sequences"),
    (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--max_new_tokens", "ten"], "--max_new_tokens"),
    (["--max_length", "0"], "--max_length"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(MAX_SEED + 1)], "--seed"),
    (["--seed", "١"], "--seed"),
    (["--eos_token_id", "1,x"], "--eos_token_id"),
    (["--dtype", "int8"], "--dtype"),
    (["--device", "tpu"], "--device"),
    (["--json=maybe"], "--json"),
    (["--modle", "gpt2"], "--modle"),
    (["--prompt", "x"], "--prompt"),
    (["--unknown\nflag"], "--unknown"),
    (["one", "two"], "two"),
    (["one", "--prompt_file", "x"], "--prompt_file"),
    (["--model", "gpt3"], "gpt2-xl"),
    (["--model", "/nowhere/model.safetensors"], "/nowhere"),
    (["--model", __file__], "--model"),
]
WRONG_SAMPLE += [
    (["--num_beams", "2", "--num_return_sequences", "3"], "--num_return_sequences"),
    (["--num_beams", "2", "--top_k", "3"], "--top_k"),
    (["--num_beams", "0"], "--num_beams"),
    (["--early_stopping", "--num_beams", "2", "--early_stopping=maybe"], "--early_stopping"),
    (["--min_p", "2", "--do_sample"], "--min_p"),
    (["--noise", "counter"], "--noise"),
    (["--noise", "white"], "--noise"),
    (["--length_penalty", "inf", "--num_beams", "2"], "--length_penalty"),
    (["--exponential_decay_length_penalty", "5,1"], "--exponential_decay_length_penalty"),
    (["--tree"], "--tree"),
    (["--tree", "--json", "--num_beams", "2"], "--json"),
    (["--explain", "--color", "prob"], "--color"),
    (["--color", "blue"], "--color"),
    (["--preset", "novel"], "--preset"),
    (["--interactive", "--json"], "--json"),
    (["--unique"], "--unique"),
    (["--skip_bad"], "--skip_bad"),
    (["--prompts", "x", "prompt"], "--prompts"),
    (["--prompts", "x", "--unique", "--num_beams", "2"], "--unique"),
    (["--prompts", "x", "--batch_size", "0"], "--batch_size"),
    (["--compare", "gpt3"], "--compare"),
    (["--length_penalty", "2"], "--length_penalty"),
    (["--early_stopping"], "--early_stopping"),
    (["--first_sample", "7", "--seed", "1"], "--first_sample"),
    (["--max_length", "50", "--max_new_tokens", "9"], "--max_length"),
    (["--min_length", "50", "--min_new_tokens", "9"], "--min_length"),
    (["--batch_size", "3"], "--batch_size"),
    (["--output_scores"], "--output_scores"),
    (["--bad_words_ids", "[" * 400 + "]" * 400], "--bad_words_ids"),
    (["--bad_words_ids", "[" * 9000 + "]" * 9000], "--bad_words_ids"),
]
WRONG_TRAIN = [
    (["--out", ""], "--out"),
    (["--init", ""], "--init"),
    (["--steps", "5", "--warmup", "6"], "--warmup"),
    (["--grad_accum", "1" + "0" * 30], "--grad_accum"),
    (["--epochs", "1e308"], "--epochs"),
    (["--weight_decay", "1e12"], "--weight_decay"),
    (["--steps", "0"], "--steps"),
    (["--steps", "5", "--epochs", "2"], "--epochs"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--dropout", "1"], "--dropout"),
    (["--batch_size", "0"], "--batch_size"),
    (["--block_size", "0"], "--block_size"),
    (["--grad_clip", "inf"], "--grad_clip"),
    (["--keep", "0"], "--keep"),
    (["--dtype", "float64"], "--dtype"),
    (["--init", "gpt5"], "--init"),
    (["--n_layer", "2"], "--n_layer"),
    (["--tokenizer", "bytes"], "--tokenizer"),
    (["--init", "scratch", "--n_embd", "10"], "--n_embd"),
    (["--init", "scratch", "--tokenizer", "words"], "--tokenizer"),
    (["--resume", "--overwrite"], "--overwrite"),
    (["second"], "second"),
]


@pytest.mark.parametrize(
    ("call", "argv", "named"),
    [(sample, *case) for case in WRONG_SAMPLE] + [(train, *case) for case in WRONG_TRAIN],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_wrong_use_is_one_line(capsys, call, argv, named):
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error:") and err.count("\n") == 1 and len(err) <= 201
    assert named in err


@pytest.mark.parametrize(
    "argv",
    [["a\udcff"], ["x", "--out", "\udce9"], ["--\udcff\x1b"], ["x", "--init=\udc80"]],
    ids=ascii,
)
@pytest.mark.parametrize("cls", [SampleConfig, TrainConfig])
def test_bytes_that_are_not_utf8_are_refused(capsys, cls, argv):
    with pytest.raises(SystemExit) as stopped:
        parse(cls, argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "is not UTF-8" in err and err.count("\n") == 1


def test_json_with_half_a_character_is_refused(capsys):
    with pytest.raises(SystemExit):
        sample("--stop_strings", '["\\ud800"]')
    assert capsys.readouterr().err.startswith("error: --stop_strings must be ")


@pytest.mark.parametrize("argv", [[], ["/nowhere/book.txt"], [""]])
def test_the_text_must_exist(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        parse(TrainConfig, argv)
    assert stopped.value.code == 2
    assert "DATA" in capsys.readouterr().err


@pytest.mark.parametrize("cls", [SampleConfig, TrainConfig, EvaluateConfig, QuantizeConfig])
def test_help_names_every_flag(capsys, cls):
    with pytest.raises(SystemExit) as stopped:
        parse(cls, ["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    names = [f.name for f in fields(cls) if f.metadata and not f.metadata["positional"]]
    assert len(names) >= 5
    for name in names:
        assert f"  --{name}" in out
    assert max(map(len, out.splitlines())) <= 80
    # three examples, then the flags in groups
    assert all(f"  {example}\n" in out for example in cls.EXAMPLES) and len(cls.EXAMPLES) == 3
    assert all(f"\n\n{title}:\n  --{name}" in out for name, title in cls.GROUPS.items())


@pytest.mark.parametrize("script", ["sample.py", "train.py"])
@pytest.mark.parametrize("argv", [["--help"], ["--nonsense"]])
def test_the_command_line_answers_without_torch(script, argv):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(ROOT / script), *argv]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"do_sample": 1},
        {"eos_token_id": (1, "2")},
        {"num_return_sequences": 2},
        {"seed": -1},
        {"eos_token_id": (-1, 5)},
    ],
)
def test_python_is_held_to_the_same_limits(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerationConfig(**options)


def test_presets_are_the_releases():
    shapes = {name: (c.n_layer, c.n_embd, c.n_head) for name, c in PRESETS.items()}
    assert shapes == {
        "gpt2": (12, 768, 12),
        "gpt2-medium": (24, 1024, 16),
        "gpt2-large": (36, 1280, 20),
        "gpt2-xl": (48, 1600, 25),
    }
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig(n_embd=10, n_head=3)


@pytest.mark.parametrize("word", ["hi", "in", "up", "it", "as", "-", "-x", "你i"])
def test_a_prompt_of_two_letters_is_no_flag(word):
    assert parse(SampleConfig, [word]).prompt == word
