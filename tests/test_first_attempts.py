"""A hundred first attempts: what is typed, with names from other programs, and what happens.

The names are those of transformers, nanoGPT, gpt-2-simple, llama.cpp, ollama, OpenAI and
lm-evaluation-harness. An attempt works, and the row names a flag of ours and its value; or it is
answered, and the row names a part of the answer, which a flag or a command to type stands in.
"""

import shlex
import sys

import pytest

from nanogpt2 import __main__ as commands
from nanogpt2.config import SampleConfig, TrainConfig, parse
from nanogpt2.evaluate import EvaluateConfig
from nanogpt2.quantize import QuantizeConfig

CLASSES = {
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "evaluate": EvaluateConfig,
    "quantize": QuantizeConfig,
}

# what is typed -> {flag: value} where it works
WORKS = [
    # transformers, run_clm.py
    ("train.py book.txt --learning_rate 5e-5", {"lr": 5e-5}),
    ("train.py book.txt --num_train_epochs 1", {"epochs": 1.0}),
    ("train.py book.txt --model_name_or_path demo --output_dir o", {"init": "demo", "out": "o"}),
    ("train.py book.txt --max_steps 50 --warmup_steps 5", {"steps": 50, "warmup": 5}),
    ("train.py book.txt --gradient_accumulation_steps 8", {"grad_accum": 8}),
    ("train.py book.txt --lr_scheduler_type linear", {"schedule": "linear"}),
    ("train.py book.txt --weight_decay 0.01 --max_grad_norm 1.0", {"weight_decay": 0.01}),
    ("train.py mails.csv --text_column_name body", {"text_column": "body"}),
    ("train.py book.txt --save_steps 100 --save_total_limit 3", {"save_every": 100, "keep": 3}),
    ("train.py book.txt --gradient_checkpointing", {"activation_checkpointing": True}),
    ("train.py book.txt --max_seq_length 64", {"block_size": 64}),
    ("train.py book.txt --torch_compile false --dtype=bfloat16", {"compile": False}),
    ("train.py book.txt --early_stopping_patience 3", {"patience": 3}),
    ("train.py book.txt --seed 42 --batch-size 4", {"seed": 42, "batch_size": 4}),
    # nanoGPT
    ("train.py book.txt --device=cpu --compile=False", {"device": "cpu", "compile": False}),
    ("train.py book.txt --max_iters=200 --eval_interval=20", {"steps": 200, "eval_every": 20}),
    ("train.py book.txt --out_dir=o --batch_size=12", {"out": "o", "batch_size": 12}),
    ("train.py book.txt --init=scratch --n_layer=2 --n_head=2 --n_embd=8", {"n_layer": 2}),
    # peft, gpt-2-simple, llama.cpp
    ("train.py book.txt --lora_r 8 --lora_alpha 16", {"lora_rank": 8, "lora_alpha": 16}),
    ("train.py book.txt --steps 10 --sample_every 5 --save_every 5", {"sample_every": 5}),
    ("train.py book.txt --ctx-size 128", {"block_size": 128}),
    ("train.py book.txt --num_epochs 2", {"epochs": 2.0}),
    # sampling: transformers
    ("sample.py Hi --max_new_tokens 5 --do_sample --top_k 5", {"do_sample": True, "top_k": 5}),
    ("sample.py Hi --temperature 0.7", {"temperature": 0.7, "do_sample": True}),
    ("sample.py Hi --top_p 0.9", {"top_p": 0.9, "do_sample": True}),
    ("sample.py Hi --length 20 --k 40", {"max_new_tokens": 20, "top_k": 40}),
    ("sample.py Hi --num_beams 5 --no_repeat_ngram_size 2", {"num_beams": 5}),
    ("sample.py Hi --do_sample True --seed 42", {"do_sample": True, "seed": 42}),
    ("sample.py Hi --stop_token END", {"stop_strings": "END"}),
    ("sample.py Hi --model_name_or_path demo", {"model": "demo"}),
    ("sample.py Hi --threads 8", {"threads": 8}),
    ("sample.py Hi --verbose", {"verbose": True}),
    ("train.py book.txt --threads 4", {"threads": 4}),
    # nanoGPT, gpt-2-simple
    ("sample.py Hi --num_samples=2 --max_new_tokens=9", {"num_return_sequences": 2}),
    ("sample.py Hi --nsamples 2 --length 9", {"num_return_sequences": 2, "max_new_tokens": 9}),
    ("sample.py Hi --model_name demo", {"model": "demo"}),
    ("sample.py Hi --model distilgpt2", {"model": "distilgpt2"}),
    ("sample.py Hi --model microsoft/DialoGPT-small", {"model": "microsoft/DialoGPT-small"}),
    (
        "train.py book.txt --model_name_or_path openai-community/gpt2",
        {"init": "openai-community/gpt2"},
    ),
    # llama.cpp, ollama
    ("sample.py Hi --n-predict 9 --temp 0.5", {"max_new_tokens": 9, "temperature": 0.5}),
    ("sample.py --file a.txt", {"prompt_file": "a.txt"}),
    ("sample.py Hi --min-p 0.05 --top-k 20", {"min_p": 0.05, "top_k": 20}),
    ("sample.py Hi --num_predict 9", {"max_new_tokens": 9}),
    ("sample.py --interactive", {"interactive": True}),
    # OpenAI
    ("sample.py Hi --max_tokens 9 --stop END", {"max_new_tokens": 9, "stop_strings": "END"}),
    ("sample.py Hi --max_completion_tokens 9", {"max_new_tokens": 9}),
    # measuring and narrowing
    ("evaluate book.txt --model_name_or_path demo", {"model": "demo"}),
    ("evaluate book.txt --per_device_eval_batch_size 4", {"batch_size": 4}),
    ("evaluate a.jsonl --tasks lambada --max_eval_samples 9", {"task": "lambada", "limit": 9}),
    ("evaluate book.txt --max_seq_length 64 --doc_stride 32", {"block_size": 64, "stride": 32}),
    ("evaluate book.txt --ctx-size 64", {"block_size": 64}),
    ("evaluate mails.csv --text_column_name body", {"text_column": "body"}),
    ("quantize demo --output_dir o", {"out": "o"}),
    ("quantize demo --outfile o --outtype fp16", {"out": "o", "quantize": "fp16"}),
]

# what is typed -> a part of the answer
ANSWERED = [
    # transformers
    ("train.py --train_file book.txt", "DATA stands by itself: train.py book.txt"),
    ("train.py book.txt --validation_file v.txt", "use --validation FILE"),
    ("train.py book.txt --do_train", "train.py always trains"),
    ("train.py book.txt --do_eval", "--eval_every evaluates"),
    ("train.py book.txt --per_device_train_batch_size 4", "--batch_size counts all devices'"),
    ("train.py book.txt --per_device_eval_batch_size 4", "evaluations use --batch_size"),
    ("train.py book.txt --overwrite_output_dir", "use --overwrite"),
    ("train.py book.txt --resume_from_checkpoint o/checkpoint-5", "use --resume: it goes on in"),
    ("train.py book.txt --fp16", "use --dtype float16"),
    ("train.py book.txt --bf16 True", "use --dtype bfloat16"),
    ("train.py book.txt --logging_steps 10", "every step is logged in metrics.jsonl"),
    ("train.py book.txt --evaluation_strategy steps", "use --eval_every"),
    ("train.py book.txt --load_best_model_at_end", "checkpoints/best"),
    ("train.py book.txt --report_to wandb", "use --tensorboard"),
    ("train.py book.txt --warmup_ratio 0.1", "--warmup counts steps"),
    (
        "train.py book.txt --lr_scheduler_type constant_with_warmup",
        "one of cosine, linear, constant",
    ),
    ("train.py --dataset_name wikitext", "DATA stands by itself"),
    ("train.py book.txt --push_to_hub", "the folder --out loads in transformers"),
    ("train.py book.txt --deepspeed ds.json", "torchrun --nproc_per_node=N train.py DATA --fsdp"),
    ("train.py book.txt --init distillgpt2", "did you mean distilgpt2?"),
    # nanoGPT
    ("train.py config/train_shakespeare_char.py", "is not a file, a folder or a known text"),
    ("train.py book.txt --init_from=gpt2", "use --init gpt2"),
    ("train.py --dataset=shakespeare", "DATA stands by itself"),
    ("train.py book.txt --lr_decay_iters=2000", "the --schedule falls over all --steps"),
    ("train.py book.txt --min_lr=1e-4", "falls to 0"),
    ("train.py book.txt --eval_iters=20", "every evaluation reads all validation data"),
    ("train.py book.txt --n_layer=6", "--init scratch"),
    ("train.py book.txt --wandb_log=True", "use --tensorboard"),
    # gpt-2-simple, peft, llama.cpp
    ("train.py finetune book.txt", "is a second DATA; one is allowed (several files: a folder"),
    ("train.py book.txt b.txt", "or a glob in quotes: 'texts/*.txt'"),
    ("train.py --data book.txt", "DATA stands by itself: train.py book.txt"),
    ("train.py book.txt --run_name run1", "the run's folder is --out"),
    ("train.py book.txt --restore_from latest", "use --resume, or --init FOLDER"),
    ("train.py book.txt --use_peft", "use --lora_rank 8"),
    ("train.py book.txt --load_in_4bit", "--lora_rank 8 needs less memory"),
    ("train.py book.txt --model gpt2", "the model to start from is --init"),
    ("train.py", "DATA is missing: a file, a folder"),
    ("train.py bok.txt", "is not a file, a folder or a known text (pydocs, shakespeare)"),
    # sampling
    ("sample.py --prompt 'Once upon'", 'stands by itself: python sample.py "Once upon a time"'),
    ("sample.py Once upon a time", "is it in quotes?"),
    ("sample.py run gpt2", "The model is --model NAME"),
    ("sample.py --start='Once upon'", "the prompt stands by itself"),
    ("sample.py --init_from=gpt2-xl --start=Hi", "the model is --model gpt2-xl"),
    ("sample.py --out_dir=o", "the model is --model FOLDER"),
    ("sample.py Hi --model DialoGPT-small", "USER/NAME of the hub"),
    ("sample.py --run_name run1", "the model is --model FOLDER"),
    ("sample.py Hi --prefix x", "the prompt stands by itself"),
    ("sample.py Hi --truncate '<|endoftext|>'", "use --stop_strings"),
    ("sample.py -m demo -p Hi", "the model is --model"),
    ("sample.py -p Hi", "the prompt stands by itself"),
    ("sample.py -f a.txt", "use --prompt_file FILE"),
    ("sample.py Hi -n 5", "a number of texts is --num_return_sequences, of tokens"),
    ("sample.py Hi --n 5", "a number of texts is --num_return_sequences, of tokens"),
    ("sample.py Hi --ctx-size 512", "the context is the model's"),
    ("sample.py Hi --n-gpu-layers 99", "use --device cuda"),
    ("sample.py Hi -ngl 99", "use --device cuda"),
    ("sample.py Hi --num_thread 8", "use --threads"),
    ("sample.py Hi --repeat-penalty 1.1", "use --repetition_penalty"),
    ("sample.py Hi --ignore-eos", "use --eos_token_id none"),
    ("sample.py -cnv", "use --interactive --preset dialogue"),
    ("sample.py Hi --format json", "use --json"),
    ("sample.py Hi --num_ctx 512", "the context is the model's"),
    ("sample.py Hi --system kind", "GPT-2 has no system prompt"),
    ("sample.py Hi --frequency_penalty 1", "use --repetition_penalty"),
    ("sample.py Hi --best_of 5", "use --num_return_sequences, or --num_beams"),
    ("sample.py Hi --logprobs 5", "use --explain"),
    ("sample.py Hi --logit_bias '{}'", "use --sequence_bias"),
    ("sample.py Hi --stream", "text is streamed already"),
    ("sample.py Hi --no_cuda", "use --device cpu"),
    ("sample.py Hi --temprature 1", "did you mean --temperature?"),
    ("sample.py Hi --temperature 0.7 --do_sample false", "must come with do_sample"),
    # measuring and narrowing
    ("evaluate --file book.txt", "stands by itself: python -m nanogpt2.evaluate book.txt"),
    ("evaluate --model_args pretrained=gpt2", "the model is --model NAME or FOLDER"),
    ("evaluate book.txt --fp16_full_eval", "use --dtype float16"),
    ("evaluate book.txt --num_fewshot 5", "without examples in the prompt"),
    ("evaluate book.txt --output_path o.json", "--json > figures.json"),
    ("evaluate book.txt --tasks lambada_openai", "one of perplexity, lambada, hellaswag, classify"),
    ("evaluate --model demo", "FILE is missing"),
    ("quantize --model demo", "MODEL stands by itself: python -m nanogpt2.quantize gpt2 --out"),
    ("quantize demo o int8", "the folder to write is --out"),
    ("quantize demo --bits 8", "use --quantize int8 or fp16"),
    ("quantize demo --outtype q4_0", "one of fp16, int8"),
    ("quantize demo", "out must be given, or text"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "b.txt", "mails.csv", "a.jsonl", "a.txt"):
        (tmp_path / name).write_text("once upon a time\n")


def test_there_are_a_hundred():
    assert len({typed for typed, _ in [*WORKS, *ANSWERED]}) >= 100


@pytest.mark.parametrize(("typed", "flags"), WORKS, ids=[typed for typed, _ in WORKS])
def test_an_attempt_that_works(here, typed, flags):
    script, *argv = shlex.split(typed)
    config = parse(CLASSES[script], argv)
    found = {name: getattr(config, name, None) for name in flags}
    if script == "sample.py":
        found = {n: getattr(config.generation, n, found[n]) for n in flags}
    assert found == flags


@pytest.mark.parametrize(("typed", "said"), ANSWERED, ids=[typed for typed, _ in ANSWERED])
def test_an_attempt_that_is_answered(here, capsys, typed, said):
    script, *argv = shlex.split(typed)
    with pytest.raises(SystemExit) as stopped:
        parse(CLASSES[script], argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    # nothing of the answer is cut off
    assert len(err) <= 201 and not err.endswith("...\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("nanogpt2 run gpt2", "nanogpt2 sample 'Once upon a time' --model demo"),
        ("nanogpt2 finetune book.txt", "nanogpt2 train book.txt"),
        ("nanogpt2 generate", "nanogpt2 sample"),
        ("nanogpt2 eval book.txt", "nanogpt2 evaluate book.txt --model out"),
        ("nanogpt2 server", "nanogpt2 serve --model demo"),
        ("nanogpt2 pull gpt2", "the commands are sample, train, evaluate, quantize"),
        ("nanogpt2 'Once upon a time'", "the commands are sample, train, evaluate, quantize"),
    ],
)
def test_a_command_of_another_program(capsys, monkeypatch, typed, said):
    monkeypatch.setattr(sys, "argv", shlex.split(typed))
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "prompt", ["Hi", "i", "-", "- a list", "-1", "n", "Oi", "m", "-- x", "-2 °C"]
)
def test_a_short_prompt_is_no_flag(prompt):
    assert parse(SampleConfig, ["--model", "demo", "--", prompt]).prompt == prompt
    if not prompt.startswith("--"):
        assert parse(SampleConfig, ["--model", "demo", prompt]).prompt == prompt
