"""OpenAI's API of the server, through the package `openai` and curl; generate() is the oracle."""

import json
import math
import shutil
import subprocess

import pytest
import torch
from reference import HUNG
from serve_process import BYTES, events, save_byte_model, serving
from transformers import AutoTokenizer

from nanogpt2 import GenerationConfig, generate, load_model, open_checkpoint
from nanogpt2.checkpoints.load import load_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_byte_model(folder / "plain")
    save_byte_model(folder / "talker", seed=5, chat=True)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--model", "plain", "--compare_model", "talker") as running:
        yield running
    assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(folder):
    return load_generator(folder / "plain")


def generated(model, ids, **options):
    """The new tokens of generate(), for each text, up to its end."""
    options = {"do_sample": True, "max_new_tokens": 16} | options
    found = generate(model, torch.tensor([ids]), tokenizer=BYTES, **options).sequences
    texts = [row[len(ids) :] for row in found.tolist()]
    end = options.get("eos_token_id", model.config.eos_token_id)
    return [row[: row.index(end) + 1] if end in row else row for row in texts]


PROMPT = "abc é"


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"temperature": 0.3, "top_p": 0.8, "max_tokens": 9}, {"max_new_tokens": 9}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"n": 3, "max_tokens": 5}, {"num_return_sequences": 3, "max_new_tokens": 5}),
        ({"top_k": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {}),
        ({"num_beams": 3, "n": 2}, {"do_sample": False, "num_return_sequences": 2}),
        ({"num_beams": 3, "do_sample": True, "top_k": 9, "noise": "counter"}, {}),
        ({"penalty_alpha": 0.6, "top_k": 4}, {"do_sample": False}),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, {"do_sample": False}),
        ({"eos_token_id": None, "max_tokens": 90}, {"max_new_tokens": 90}),
        ({"logit_bias": {"97": -100.0}}, {"sequence_bias": [[[97], -100.0]]}),
        ({"prompt_lookup_num_tokens": 3, "temperature": 0}, {"do_sample": False}),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_generate(client, model, asked, options):
    theirs = ("n", "max_tokens", "logit_bias")
    own = {k: v for k, v in asked.items() if k not in ("temperature", "top_p", *theirs)}
    known = {k: v for k, v in asked.items() if k not in own}
    found = client.completions.create(model="plain", prompt=PROMPT, seed=7, extra_body=own, **known)
    same = {k: v for k, v in asked.items() if k not in theirs}
    expected = generated(model, BYTES.encode(PROMPT), **{"seed": 7} | same | options)
    assert [choice.token_ids for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [*range(len(expected))]
    for choice in found.choices:
        ended = choice.token_ids[-1] == asked.get("eos_token_id", 256)
        assert choice.text == BYTES.decode(choice.token_ids[: -1 if ended else None])
        assert choice.finish_reason == ("stop" if ended else "length")
    new = sum(map(len, expected))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, new)
    assert found.usage.total_tokens == 6 + new and found.object == "text_completion"


def test_several_prompts_as_texts_and_as_ids(client, model):
    texts = ["abc", "日本 and more", "", "abc"]
    ids = [BYTES.encode(text) or [256] for text in texts]
    for prompt in (texts, ids):
        found = client.completions.create(model="plain", prompt=prompt, seed=1, n=2)
        # a prompt's texts do not depend on the others
        expected = [generated(model, row, seed=1, num_return_sequences=2) for row in ids]
        assert [c.token_ids for c in found.choices] == [row for each in expected for row in each]
    alone = client.completions.create(model="plain", prompt=ids[1], seed=1)
    assert alone.choices[0].token_ids == generated(model, ids[1], seed=1)[0]


@pytest.mark.parametrize("places", [[5], [9, 3], [(4, 7)], [(8, 11), (20, 22)]], ids=str)
def test_a_stop_string_ends_the_text_and_is_left_out(client, model, places):
    whole = generated(model, BYTES.encode("h"), seed=3, max_new_tokens=60)[0]
    text = BYTES.decode([i for i in whole if i != 256])
    stops = [text[slice(*p)] if isinstance(p, tuple) else text[p] for p in places]
    # the first complete one ends the text
    end = min((text.index(s) + len(s), text.index(s)) for s in stops)[1]
    assert "\ufffd" not in "".join(stops) and 0 < end < len(text)
    stop = stops[0] if len(stops) == 1 else stops
    for stream in (False, True):
        options = {"model": "plain", "prompt": "h", "seed": 3, "max_tokens": 60, "stop": stop}
        found = client.completions.create(**options, stream=stream)
        choices = [c for chunk in found for c in chunk.choices] if stream else found.choices
        assert "".join(c.text for c in choices) == text[:end]
        assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2},
        {"seed": 2, "n": 3, "logprobs": 2, "max_tokens": 7},
        {"seed": 4, "temperature": 0, "n": 2, "echo": True, "logprobs": 0},
        {"seed": 5, "prompt": ["ab", "日"], "echo": True},
        {"seed": 6, "extra_body": {"num_beams": 3}, "logprobs": 1},
    ],
    ids=str,
)
def test_a_stream_is_the_whole_answer_in_pieces(client, options):
    options = {"model": "plain", "prompt": PROMPT} | options
    whole = client.completions.create(**options)
    chunks = [
        *client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    ]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [i for part in parts for i in part.token_ids] == choice.token_ids
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
        if choice.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [x for part in parts for x in getattr(part.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.4, "extra_body": {"top_k": 5}}, {"extra_body": {"num_beams": 3}}],
    ids=str,
)
def test_logprobs_are_the_models_own(client, folder, options):
    found = client.completions.create(
        model="plain", prompt=PROMPT, seed=1, echo=True, logprobs=3, max_tokens=8, **options
    )
    choice = found.choices[0]
    ids = BYTES.encode(PROMPT) + choice.token_ids
    plain = load_model(folder / "plain")
    with torch.no_grad():
        logp = plain(torch.tensor([ids]))[0].double().log_softmax(1)
    got = choice.logprobs
    assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
    own = [logp[n, i].item() for n, i in enumerate(ids[1:])]
    assert got.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    for n, top in enumerate(got.top_logprobs[1:]):
        best = logp[n].topk(3).values.tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
        assert got.token_logprobs[n + 1] in top.values() and len(top) in (3, 4)
    # the two bytes of é
    assert got.tokens[:6] == ["a", "b", "c", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert got.text_offset[:6] == [0, 1, 2, 3, 4, 4] and choice.text.startswith(PROMPT)


def test_nothing_is_written_with_max_tokens_0(client):
    found = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    assert found.choices[0].text == PROMPT and found.usage.completion_tokens == 0
    assert len(found.choices[0].logprobs.tokens) == 6


def test_best_of_returns_the_likeliest(client, model):
    options = {"seed": 9, "max_tokens": 6}
    found = client.completions.create(model="plain", prompt="ab", n=2, best_of=6, **options)
    rows = generated(model, BYTES.encode("ab"), seed=9, num_return_sequences=6, max_new_tokens=6)
    scores = []
    for row in rows:
        with torch.no_grad():
            logp = model(torch.tensor([BYTES.encode("ab") + row]))[0].log_softmax(1)
        scores.append(sum(logp[1 + n, i].item() for n, i in enumerate(row)) / len(row))
    best = sorted(range(6), key=lambda i: -scores[i])[:2]
    assert [choice.token_ids for choice in found.choices] == [rows[i] for i in best]
    assert found.usage.completion_tokens == sum(map(len, rows))


def test_the_list_of_models(client):
    assert [each.id for each in client.models.list()] == ["plain", "talker"]
    assert client.models.retrieve("talker").owned_by == "nanogpt2"
    import openai

    with pytest.raises(openai.NotFoundError, match="'nobody' is not served"):
        client.models.retrieve("nobody")


# ---- chat

MESSAGES = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "hello\nagain"},
    {"role": "assistant", "content": "ah"},
    {"role": "user", "content": [{"type": "text", "text": "é?"}]},
]
WRITTEN = "Be kind.\nYou: hello\nagain\nFriend: ah\nYou: é?\nFriend:"


def test_a_chat_continues_the_text_that_training_writes(client, folder):
    model = load_generator(folder / "talker")
    ids = BYTES.encode(WRITTEN)
    found = client.chat.completions.create(
        model="talker", messages=MESSAGES, seed=3, n=2, max_tokens=12
    )
    options = {"seed": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = generated(model, ids, stop_strings=["\nYou:"], **options)
    assert [choice.token_ids for choice in found.choices] == expected
    for choice, new in zip(found.choices, expected, strict=True):
        assert choice.message.content == BYTES.decode([i for i in new if i != 256]).strip()
        assert choice.message.role == "assistant"
    assert found.usage.prompt_tokens == len(ids)
    tokenizer = AutoTokenizer.from_pretrained(folder / "talker")
    flat = [*MESSAGES[:3], {"role": "user", "content": "é?"}]
    shown = tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)
    assert shown == WRITTEN


def test_a_streamed_chat_is_the_whole_answer_in_pieces(client):
    options = {"model": "talker", "messages": MESSAGES, "seed": 8, "max_completion_tokens": 20}
    options |= {"logprobs": True, "top_logprobs": 2, "temperature": 1.5}
    whole = client.chat.completions.create(**options).choices[0]
    parts = [
        c for chunk in client.chat.completions.create(**options, stream=True) for c in chunk.choices
    ]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason
    content = [x for part in parts if part.logprobs for x in part.logprobs.content]
    assert content == whole.logprobs.content
    assert [bytes(x.bytes) for x in content] == [BYTES.decode_bytes([i]) for i in whole.token_ids]
    assert all(len(x.top_logprobs) == 2 for x in content)
    assert all(-math.inf < x.logprob <= 0 for x in content)


def test_a_chat_ends_where_the_next_turn_begins(client):
    # a bias that lets the model write nothing else
    turn = "\nYou:"
    forced = [[[*BYTES.encode(turn[:n]), BYTES.encode(turn[n])[0]], 1e4] for n in range(1, 5)]
    extra = {"sequence_bias": [*forced, [[10], 500.0]], "do_sample": False}
    found = client.chat.completions.create(
        model="talker", messages=MESSAGES, max_tokens=30, extra_body=extra
    )
    choice = found.choices[0]
    assert choice.finish_reason == "stop" and "You" not in choice.message.content


def test_the_template_is_known_as_transformers_saves_it(folder, tmp_path):
    shutil.copytree(folder / "talker", tmp_path / "again")
    AutoTokenizer.from_pretrained(folder / "talker").save_pretrained(tmp_path / "again")
    for name, chats in ((tmp_path / "again", True), (folder / "plain", False), ("demo", False)):
        with open_checkpoint(name) as checkpoint:
            assert checkpoint.is_chat == chats
    assert (tmp_path / "again/chat_template.jinja").exists()


def test_a_model_without_the_template_has_no_chat(client):
    import openai

    with pytest.raises(openai.BadRequestError, match=r"'plain' is not a model for chat: train\.py"):
        client.chat.completions.create(model="plain", messages=MESSAGES)


# ---- wrong fields


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({}, 400, "prompt", "prompt must be a text"),
        ({"prompt": 5}, 400, "prompt", "prompt must be a text"),
        ({"prompt": ["a", 1]}, 400, "prompt", "not ['a', 1]"),
        ({"prompt": [1, 257]}, 400, "prompt", "token ids from 0 to 256"),
        ({"prompt": [[True]]}, 400, "prompt", "token ids"),
        ({"prompt": ["a"] * 257}, 400, "prompt", "256 texts at most"),
        ({"prompt": ["a"] * 129, "n": 2}, 400, "prompt", "256 texts at most"),
        ({"prompt": "a" * 20_000}, 400, "prompt", "16,384 tokens at most, not 20,000"),
        ({"prompt": "a" * 65, "echo": True, "logprobs": 1}, 400, "prompt", "64 tokens at most"),
        (
            {"prompt": ["a" * 64] * 4, "n": 60, "echo": True, "logprobs": 20, "max_tokens": 0},
            *(400, "prompt", "262,144 at most, not 322,560"),
        ),
        ({"prompt": "a", "model": "b"}, 404, "model", "the models are plain, talker"),
        ({"prompt": "a", "max_tokens": 2049}, 400, "max_tokens", "from 0 to 2048"),
        ({"prompt": "a", "max_length": 9999}, 400, "max_length", "2,048 tokens at most"),
        ({"prompt": "abc", "max_length": 3}, 400, "max_length", "must be > 3"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "a whole number"),
        ({"prompt": "a", "max_tokens": 2000, "n": 64, "logprobs": 9}, 400, "max_tokens", "262,144"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "must be a finite number >= 0"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "not 'hot'"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p", "<= 1"),
        ({"prompt": "a", "n": 65}, 400, "n", "from 1 to 64"),
        ({"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of", "from 3 to 64"),
        ({"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", "with stream"),
        ({"prompt": "a", "best_of": 2, "num_beams": 2}, 400, "best_of", "with num_beams"),
        ({"prompt": "a", "n": 3, "num_beams": 2}, 400, "n", "must be <= num_beams (2)"),
        ({"prompt": "a", "num_beams": 65}, 400, "num_beams", "64 at most"),
        ({"prompt": "a", "penalty_alpha": 0.5, "top_k": 0}, 400, "top_k", "must be > 1"),
        ({"prompt": "a", "penalty_alpha": 0.5, "top_k": 65}, 400, "top_k", "64 at most"),
        ({"prompt": "a", "num_beams": 2, "temperature": 0.5}, 400, "temperature", "do_sample"),
        ({"prompt": "a", "stop": ["", "b"]}, 400, "stop", "a text or texts"),
        ({"prompt": "a", "stop": {"b": 1}}, 400, "stop", "a text or texts"),
        ({"prompt": "a", "stop_strings": "b"}, 400, "stop_strings", "is called stop here"),
        ({"prompt": "a", "seed": -1}, 400, "seed", ">= 0"),
        ({"prompt": "a", "seed": 2**63}, 400, "seed", "<= 9223372036854775807"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs", "a whole number"),
        ({"prompt": "a", "echo": 1}, 400, "echo", "true or false"),
        ({"prompt": "a", "stream_options": {}}, 200, None, ""),
        ({"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options", "with stream"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, 400, "sequence_bias", "ids below 257"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty", "repetition_penalty"),
        ({"prompt": "a", "presence_penalty": 0, "suffix": None, "user": "x"}, 200, None, ""),
        ({"prompt": "a", "suffix": "z"}, 400, "suffix", "left out"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", "is not a field"),
        ({"prompt": "a", "output_scores": True}, 400, "output_scores", "is not a field"),
        ({"prompt": "a", "suppress_tokens": [999]}, 400, "suppress_tokens", "ids from 0 to 256"),
        ({"prompt": "a", "force_words_ids": 3, "num_beams": 2}, 400, "force_words_ids", "must"),
        ({"prompt": "a", "suppress_tokens": [*range(257)]}, 400, "do_sample", "tokens left"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named(server, body, status, param, said):
    got, headers, answer = server.ask("/v1/completions", body)
    assert (got, headers["content-type"]) == (status, "application/json")
    if status != 200:
        error = answer["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert said in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "messages must be a list"),
        ([], "messages must be a list"),
        ("hello", "messages must be a list"),
        ([5], "messages, message 1 must have a role"),
        ([{"role": "king", "content": "a"}], "role must be system, user, assistant"),
        ([{"role": "user"}], "message 1"),
        ([{"role": "user", "content": "  "}], "'content' is empty"),
        ([{"role": "user", "content": 3}], "'content' must be text"),
    ],
    ids=str,
)
def test_a_wrong_message_is_named(server, messages, said):
    body = {"model": "talker", "messages": messages}
    status, _, answer = server.ask("/v1/chat/completions", body)
    assert status == 400 and said in answer["error"]["message"]
    assert answer["error"]["param"] == "messages"


JSON = "Content-Type: application/json"


def test_curl_streams(server):
    body = json.dumps({"prompt": "abc", "max_tokens": 4, "stream": True, "seed": 1})
    done = subprocess.run(
        ["curl", "-sSN", server.url + "v1/completions", "-d", body, "-H", JSON],
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *chunks, last = events(done.stdout)
    assert last == "[DONE]"
    whole = server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 4, "seed": 1})[2]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]


def test_the_defaults_are_openais_where_openai_has_the_field():
    ours = GenerationConfig()
    assert (ours.temperature, ours.top_p, ours.num_return_sequences) == (1, 1, 1)
