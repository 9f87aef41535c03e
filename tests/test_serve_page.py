"""The page's endpoints; what generate(), the searches and nanogpt2.inspect give is the oracle."""

import math

import pytest
import torch
from serve_process import BYTES, save_byte_model, serving

from nanogpt2 import GenerationConfig, generate, inspect, load_model
from nanogpt2.checkpoints.load import load_generator
from nanogpt2.config import decoding_options
from nanogpt2.generation.explain import explain
from nanogpt2.generation.request import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_byte_model(folder / "a")
    save_byte_model(folder / "b", seed=4)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--model", "a", "--compare_model", "b") as running:
        yield running
    assert "Traceback" not in running.log()


PROMPT = "abc é"
IDS = BYTES.encode(PROMPT)


def new_tokens(folder, name="a", **options):
    model = load_generator(folder / name)
    return generate(model, torch.tensor([IDS]), **options).sequences[0, len(IDS) :].tolist()


def test_the_page_is_sent_with_a_policy(server):
    status, headers, html = server.ask("/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert html.lower().startswith("<!doctype html>")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "http" not in policy


def test_what_is_served_is_described(server):
    status, _, about = server.ask("/api/models")
    assert status == 200
    assert [model["name"] for model in about["models"]] == ["a", "b"]
    assert (
        about["models"][0] | {"n_layer": 2, "block_size": 64, "chat": False} == about["models"][0]
    )
    options = {option["name"]: option for option in about["options"]}
    assert {*options} == {name for name in vars(GenerationConfig()) if name != "output_scores"}
    defaults = vars(decoding_options({}))
    for name, option in options.items():
        value = defaults[name]
        assert option["default"] == (list(value) if isinstance(value, tuple) else value)
    assert options["temperature"]["kind"] == "float" and options["temperature"]["low"] == 0
    assert options["top_k"]["kind"] == "int" and options["top_k"]["none"]
    assert options["noise"]["choices"] == ["hf", "counter"]
    assert options["do_sample"]["kind"] == "bool" and options["bad_words_ids"]["kind"] == "json"
    assert about["limits"]["max_new_tokens"] == 2048


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"seed": 3, "max_new_tokens": 9}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95}),
        (
            {"seed": 4, "top_k": 5, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
            | {"max_new_tokens": 9},
            {},
        ),
        ({"do_sample": False, "max_new_tokens": 12}, {"do_sample": False}),
        ({"do_sample": False, "penalty_alpha": 0.5, "top_k": 4, "max_new_tokens": 5}, {}),
    ],
    ids=str,
)
def test_each_token_of_a_text_is_explained(server, folder, options, same):
    sent = {"prompt": PROMPT, "options": options, "alternatives": 3}
    start, *tokens, end = server.stream("/api/generate", sent)
    expected = new_tokens(folder, **({"do_sample": True} | same | options))
    assert [token["id"] for token in tokens] == end["ids"] == expected
    assert (start["ids"], start["dropped"], start["model"]) == (IDS, 0, "a")
    assert "".join(token["piece"] for token in tokens) + end["piece"] == end["text"]
    if "seed" in options:
        assert start["seed"] == end["seed"] == options["seed"]
    # the explanation of the finished text
    model = load_model(folder / "a")
    config = decoding_options(options)
    request = prepare(model.config, torch.device("cpu"), config, torch.tensor([IDS]))
    why = explain(model, request, expected, BYTES, alternatives=3)
    for token, one in zip(tokens, why, strict=True):
        assert tuple(token["stages"]) == one.stages
        assert token["entropy"] == pytest.approx(one.entropy, abs=1e-4)
        assert token["rank"] == one.chosen.rank
        assert token["logprob"] == pytest.approx(math.log(one.chosen.probabilities[0]), abs=1e-3)
        assert token["probabilities"] == pytest.approx(one.chosen.probabilities, abs=1e-5)
        assert [x["id"] for x in token["runners_up"]] == [c.token for c in one.runners_up]
        for each in (token, *token["runners_up"]):
            assert len(each["scores"]) == len(each["probabilities"]) == len(token["stages"])
            for score, p in zip(each["scores"], each["probabilities"], strict=True):
                assert (score is None) == (p == 0)


def test_a_text_goes_on_from_a_rival(server):
    options = {"seed": 3, "max_new_tokens": 6}
    start, *tokens, _ = server.stream("/api/generate", {"prompt": PROMPT, "options": options})
    rival = tokens[2]["runners_up"][0]["id"]
    ids = [*start["ids"], tokens[0]["id"], tokens[1]["id"], rival]
    again, *more, _ = server.stream("/api/generate", {"ids": ids, "options": options})
    assert again["ids"] == ids and len(more) == 6


def test_the_prompts_tokens_beyond_the_context_are_counted(server):
    sent = {"prompt": "a" * 70, "options": {"max_new_tokens": 4}}
    start, *_ = server.stream("/api/generate", sent)
    assert (start["dropped"], start["room"]) == (70 - 64 + 4, 64 + 1 - 70)


def test_the_tree_of_beams_grows_to_the_texts(server, folder):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    start, *steps, end = server.stream("/api/beams", {"prompt": PROMPT, "options": options})
    model = load_generator(folder / "a")
    found = generate(model, torch.tensor([IDS]), **options)
    assert start["type"] == "start" and len(end["texts"]) == 2
    for text, row, score in zip(end["texts"], found.sequences, found.sequences_scores, strict=True):
        assert text["ids"] == row[len(IDS) :].tolist()[: len(text["ids"])]
        assert text["score"] == pytest.approx(score.item(), abs=1e-5)
    parents, tokens, alive = {0: None}, {}, [0]
    for number, step in enumerate(steps, start=1):
        assert step["step"] == number
        for node in step["nodes"]:
            assert node["parent"] in parents and node["node"] not in parents
            parents[node["node"]], tokens[node["node"]] = node["parent"], node["token"]
        finished = [each["node"] for each in step["finished"]]

        def above(node):
            while node is not None:
                yield node
                node = parents[node]

        kept = {each for node in (*step["alive"], *finished) for each in above(node)}
        assert step["pruned"] == [node for node in alive if node not in kept and node]
        alive = step["alive"]
        assert len(alive) <= 3 and {*alive, *finished} <= {*parents}
    for text in end["texts"]:
        path = [tokens[node] for node in above(text["node"]) if node]
        assert path[::-1] == text["ids"]


def test_looking_inside(server, folder):
    kinds = ["attention", "lens", "norms", "neighbours", "merges"]
    sent = {"text": PROMPT, "kinds": kinds, "layer": 1, "head": 1, "k": 3, "token": 98}
    status, _, found = server.ask("/api/inspect", sent)
    assert status == 200 and found["ids"] == IDS
    model = load_model(folder / "a")
    maps = inspect.attention_maps(model, IDS)[1, 1]
    for t, row in enumerate(found["attention"]["weights"]):
        assert row == pytest.approx(maps[t, : t + 1].tolist(), abs=2e-5)
    guesses = inspect.logit_lens(model, IDS, 3)
    assert [[[c["id"] for c in at] for at in layer] for layer in found["lens"]] == (
        guesses.ids.tolist()
    )
    assert len(found["norms"]) == 3 and len(found["norms"][0]) == len(IDS)
    near = inspect.token_neighbours(model, 98, 3)
    assert [each["id"] for each in found["neighbours"]["nearest"]] == [each.token for each in near]
    assert "".join(word["word"] for word in found["merges"]) == PROMPT
    assert found["merges"][0]["steps"] == [["a", "b", "c"]]
    only = server.ask("/api/inspect", {"ids": IDS, "kinds": ["norms"]})[2]
    assert {*only} == {"ids", "tokens", "norms"} and only["norms"] == found["norms"]


def test_the_merges_of_a_word_end_with_its_tokens(folder, tmp_path):
    with serving(tmp_path, "--model", "demo", "--port", "0", log="demo.log") as server:
        sent = {"text": "Once upon unbelievably", "kinds": ["merges"]}
        found = server.ask("/api/inspect", sent)[2]
    for word in found["merges"]:
        first, *_, last = word["steps"]
        assert all(len(part) == 1 for part in first)
        for before, after in zip(word["steps"], word["steps"][1:], strict=False):
            assert len(after) == len(before) - 1 and "".join(after) == "".join(before)
        assert "".join(last).replace("Ġ", " ") == word["word"]
    ends = [part for word in found["merges"] for part in word["steps"][-1]]
    assert [end.replace("Ġ", " ") for end in ends] == found["tokens"]


def test_two_models_write_from_one_seed(server, folder):
    options = {"temperature": 0.7, "max_new_tokens": 6}
    sides = {"a": {"model": "a", "options": options}, "b": {"model": "b", "options": options}}
    start, *tokens, end = server.stream("/api/compare", {"prompt": PROMPT, "seed": 5} | sides)
    assert start["seed"] == 5 and start["b"]["model"] == "b"
    models = {name: load_model(folder / name) for name in "ab"}
    for text in end["texts"]:
        side = text["side"]
        assert text["ids"] == new_tokens(folder, side, do_sample=True, seed=5, **options)
        assert text["ids"] == [t["id"] for t in tokens if t["side"] == side]
        with torch.no_grad():
            rows = torch.tensor([IDS + text["ids"]])
            logps = {name: m(rows)[0].double().log_softmax(1) for name, m in models.items()}
        for n, token in enumerate(text["tokens"]):
            at = len(IDS) - 1 + n
            for name, logp in logps.items():
                assert token[name]["logprob"] == pytest.approx(
                    logp[at, token["id"]].item(), abs=1e-4
                )
                assert token[name]["rank"] == 1 + int((logp[at] > logp[at, token["id"]]).sum())
            a, b = logps["a"][at], logps["b"][at]
            assert token["kl"] == pytest.approx((b.exp() * (b - a)).sum().item(), abs=1e-4)


def test_two_settings_of_one_model(server):
    sides = {"a": {"options": {"top_k": 1}}, "b": {"options": {"temperature": 1.5, "top_k": 0}}}
    _, *_, end = server.stream("/api/compare", {"prompt": PROMPT, "seed": 5} | sides)
    for text in end["texts"]:
        for token in text["tokens"]:
            assert token["a"]["logprob"] == pytest.approx(token["b"]["logprob"], abs=1e-6)
            assert token["kl"] == pytest.approx(0, abs=1e-6)
            banned = token["a"]["rank"] > 1
            assert token["a"]["processed"] == (None if banned else 0.0)
            assert token["b"]["processed"] < 0


def test_a_text_is_scored(server, folder):
    status, _, found = server.ask("/api/score", {"text": PROMPT, "alternatives": 2})
    with torch.no_grad():
        logp = load_model(folder / "a")(torch.tensor([IDS]))[0].double().log_softmax(1)
    assert status == 200 and found["ids"] == IDS
    first, *others = found["tokens"]
    assert first["logprob"] is None and first["runners_up"] == []
    total = 0.0
    for n, token in enumerate(others):
        own = logp[n, token["id"]].item()
        total += own
        assert token["logprob"] == pytest.approx(own, abs=1e-4)
        assert token["rank"] == 1 + int((logp[n] > own + 1e-9).sum())
        entropy = -(logp[n].exp() * logp[n]).sum().item()
        assert token["entropy"] == pytest.approx(entropy, abs=1e-4)
        best = [i for i in logp[n].topk(3).indices.tolist() if i != token["id"]][:2]
        assert [each["id"] for each in token["runners_up"]][: len(best)] == best
    assert found["logprob"] == pytest.approx(total, abs=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(-total / len(others)), rel=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("generate", {}, "prompt or ids must be given"),
        ("generate", {"prompt": "a", "ids": [1]}, "prompt or ids must be given, and one of both"),
        ("generate", {"prompt": 3}, "prompt must be a text"),
        ("generate", {"ids": [300]}, "ids must be a list of token ids from 0 to 256"),
        ("generate", {"prompt": "a", "options": {"num_beams": 2}}, "num_beams must be 1 here"),
        ("generate", {"prompt": "a", "options": {"top_q": 2}}, "'top_q' is not an option"),
        ("generate", {"prompt": "a", "options": {"top_p": 2}}, "top_p must be"),
        ("generate", {"prompt": "a", "options": 5}, "options must be an object"),
        ("generate", {"prompt": "a", "alternatives": 21}, "alternatives must be"),
        ("generate", {"prompt": "a", "options": {"max_new_tokens": 2049}}, "must add 2,048"),
        ("beams", {"prompt": "a", "options": {"num_beams": 1}}, "num_beams must be above 1"),
        ("beams", {"prompt": "a", "options": {"top_k": 1}}, "top_k must come with do_sample"),
        ("inspect", {"text": "a"}, "kinds must be a list of some of attention, lens"),
        ("inspect", {"text": "a", "kinds": ["soul"]}, "kinds must be"),
        ("inspect", {"text": "a", "kinds": [["lens"]]}, "kinds must be"),
        ("inspect", {"text": "a", "kinds": ["neighbours"]}, "token must be given"),
        ("inspect", {"text": "a", "kinds": ["norms"], "layer": 2}, "layer must be"),
        ("inspect", {"text": "", "kinds": ["norms"]}, "text must have 1 to 64 tokens, not 0"),
        ("score", {"text": "a" * 65}, "text must have 1 to 64 tokens, not 65"),
        ("compare", {"prompt": "a", "a": 3}, "a must be an object"),
        ("compare", {"prompt": "a", "a": {"x": 1}}, "'x' is not a field"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(server, path, body, said):
    status, _, answer = server.ask(f"/api/{path}", body)
    assert status == 400 and said in answer["error"]["message"]
