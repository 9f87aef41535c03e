"""The page of `nanogpt2 serve` in a browser: Debian's Chromium, driven by Playwright.

Run by .ci/run, or with -m browser; without a browser the tests fail. Every request to another host
and every error in the browser's console fails the test. The texts and figures are compared with
sample.py, generate() and the model. The README's picture is drawn where the file is absent.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from reference import ROOT

from nanogpt2 import generate, load_model, load_tokenizer, save_model

pytestmark = pytest.mark.browser

PAGE = ROOT / "nanogpt2/serve/page.html"
PICTURE = ROOT / "docs/pictures/page.png"
PARTS = ("Write", "Why", "Beams", "Inside", "Compare")
PROMPT = "The state of the Union is"
PATIENCE = 600_000  # milliseconds after which a page counts as hung, however busy the machine
SETTINGS = {"Length": "12", "Seed": "3"}


def expecting(locator):
    """Playwright's assertions, which wait for what they assert."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(locator)


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def other(tmp_path_factory, tokenizer):
    """The folder of a second model: the demo with its last layer norm changed."""
    changed = load_model("demo")
    with torch.no_grad():
        changed.ln_f.weight.mul_(torch.linspace(0.5, 1.5, changed.config.n_embd))
    folder = tmp_path_factory.mktemp("models") / "tuned"
    save_model(changed, folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def address(other):
    """The address of a server with both models."""
    command = [sys.executable, "-m", "nanogpt2.serve", "--model", "demo"]
    command += ["--compare_model", other, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise AssertionError(f"the server ended with {server.wait()}")
            # what it logs is read, so that it never waits for a reader
            with subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL):
                yield found[0] + "/"
                server.terminate()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root; no other host is ever asked for anything
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, address):
    """A function that opens the page; in the end no fault may be left in `page.faults`."""
    contexts, faults = [], []

    def note(kind, text):
        faults.append(f"{kind}: {text}")

    def ask(request):
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.netloc != urlsplit(address).netloc:
            note("another host", request.url)

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", ask)
        context.on("console", lambda m: note(m.type, m.text) if m.type == "error" else None)
        context.on("weberror", lambda error: note("script", error.error))
        page = context.new_page()
        page.faults = faults
        page.goto(address)
        expecting(page.get_by_role("tab", name="Write")).to_have_attribute("aria-selected", "true")
        expecting(page.get_by_label("Length", exact=True)).to_have_value("100")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(opened):
    return opened()


def show(page, part):
    page.get_by_role("tab", name=part, exact=True).click()


def idle(page):
    """Wait until the page is not waiting for the server."""
    page.locator("#go:enabled").wait_for(state="attached")


def write(page, prompt=PROMPT, **settings):
    """Write a text and return it with its prompt."""
    panel = page.get_by_role("tabpanel", name="Write")
    panel.get_by_label("Your beginning").fill(prompt)
    if not panel.get_by_label("Length", exact=True).is_visible():
        panel.get_by_text("Settings", exact=True).click()
    for label, value in {**SETTINGS, **settings}.items():
        panel.get_by_label(label, exact=True).fill(value)
    panel.get_by_role("button", name="Write").click()
    idle(page)
    return output(page)


def output(page):
    return page.locator("#output").text_content()


def command(page):
    """The words of the command on the page, as a shell reads them."""
    return shlex.split(page.locator("#command").text_content())


def run(words):
    """Run a command of the page and return its text."""
    assert words[:2] == ["python", "sample.py"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\n")


def token(page, n, box="#tokens"):
    """The n-th token of a strip, from 0."""
    return page.locator(f"{box} .token").nth(n)


def levels(page, box="#tokens"):
    """The strength of each token's colour: 0 to 5, negative for the colour of side A."""
    names = page.locator(f"{box} .token").evaluate_all("all => all.map((one) => one.className)")
    found = [re.findall(r"\b([hl])(\d)", name) for name in names]
    return [
        int(n) * (1 if kind == "h" else -1) for ((kind, n),) in [f or [("h", 0)] for f in found]
    ]


def distributions(model, ids, first):
    """Log-probabilities (n, V) of the tokens from `first` on."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, first - 1 : -1].log_softmax(dim=1)


def sampled(model, reader, prompt=PROMPT, **options):
    """What generate() writes with the page's defaults: ids of the prompt, new ids."""
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 3} | options
    ids = reader.encode(prompt)
    out = generate(model, torch.tensor([ids]), **({"max_new_tokens": 12} | options))
    return ids, out.sequences[0, len(ids) :].tolist()


# ---- write


def test_text_streams_and_is_the_one_of_generate(page, model, tokenizer):
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => seen.push(document.querySelector("#output").textContent))
            .observe(document.querySelector("#output"),
                { childList: true, subtree: true, characterData: true });
    }""")
    ids, new = sampled(model, tokenizer)
    assert write(page) == tokenizer.decode(ids + new)
    lengths = [len(text) for text in page.evaluate("seen")]
    assert len(set(lengths)) > 5 and lengths == sorted(lengths)
    assert "Seed 3. 12 new tokens" in page.locator("#write-status").text_content()


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (PROMPT, {}),
        ('It\'s a "test":\n$HOME `x` \\', {"Temperature": "1.3", "Top k": "0"}),
        ("- a list\n-", {"Top p": "0.5", "Repetition penalty": "1.3"}),
        ("", {"No repeats of": "2"}),
        (PROMPT, {"Stop at": ","}),
        (PROMPT, {"Temperature": "0", "Seed": ""}),
        (PROMPT, {"Seed": str(2**62 + 1)}),
    ],
    ids=["plain", "quotes", "hyphen", "empty", "stop", "greedy", "long-seed"],
)
def test_command_writes_the_same_text(page, prompt, settings):
    text = write(page, prompt, **settings)
    words = command(page)
    seed = settings.get("Seed", "3")
    if seed:
        assert words[words.index("--seed") + 1] == seed
        assert f"Seed {seed}." in page.locator("#write-status").text_content()
    assert run(words) == text
    page.get_by_role("button", name="Copy the command").click()
    assert shlex.split(page.evaluate("navigator.clipboard.readText()")) == words


def test_text_is_saved_as_a_file(page):
    text = write(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a text file").click()
    assert Path(download.value.path()).read_text(encoding="utf-8") == text


def stopped(page, after):
    """Write up to 2000 tokens, stop after some; return the text and its command's words."""
    panel = page.get_by_role("tabpanel", name="Write")
    panel.get_by_label("Length", exact=True).fill("2000")
    panel.get_by_label("Seed").fill("5")
    panel.get_by_role("button", name="Write").click()
    page.locator("#tokens .token").nth(after).wait_for(state="attached")
    page.keyboard.press("Escape")
    idle(page)
    return output(page), command(page)


def test_stop_ends_the_text_and_frees_the_model(page):
    text, words = stopped(page, 4)
    assert "stopped by you" in page.locator("#write-status").text_content()
    length = int(words[words.index("--max_new_tokens") + 1])
    assert 4 < length <= 2000
    # stopped late on a busy machine, past the context
    assert run(words) == text if length < 2000 else run(words).startswith(text)
    assert write(page) != text


def test_a_text_stopped_past_the_context_begins_its_command_s(page):
    text, words = stopped(page, 300)
    assert words[words.index("--max_new_tokens") + 1] == "2000"
    assert "goes on past" in page.locator("#command-hint").text_content()
    assert run(words).startswith(text)


def test_go_on_and_undo(page):
    first = write(page)
    page.get_by_role("button", name="Go on").click()
    idle(page)
    second = output(page)
    assert second.startswith(first) and len(second) > len(first)
    assert run(command(page)) == second
    page.get_by_role("button", name="Undo").click()
    assert output(page) == first
    page.get_by_role("button", name="Undo").click()
    assert output(page) == ""
    assert page.get_by_label("Your beginning").first.input_value() == PROMPT


def test_go_on_after_a_stop_string(page):
    first = write(page, **{"Stop at": "of"})
    page.get_by_label("Stop at").first.fill("")
    page.get_by_role("button", name="Go on").click()
    idle(page)
    second = output(page)
    assert "of" not in first.removeprefix(PROMPT)
    assert second.startswith(first + "of")
    assert run(command(page)) == second


def test_reload_finds_the_texts(page):
    first = write(page)
    second = write(page, "My fellow citizens")
    page.get_by_label("Temperature").first.fill("0.6")
    page.reload()
    expecting(page.locator("#output")).to_have_text(second)
    assert page.get_by_label("Temperature").first.input_value() == "0.6"
    page.locator("#history").get_by_role("button", name=PROMPT).click()
    assert output(page) == first
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all texts").click()
    page.reload()
    expecting(page.locator("#history-empty")).to_be_visible()
    assert output(page) == ""


def test_full_store_loses_the_oldest_texts_only(page):
    page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 2 ** 20 - 40_000))")
    for seed in range(6):
        last = write(page, Seed=str(seed), Length="20")
    kept = json.loads(page.evaluate("localStorage.getItem('nanogpt2.texts')"))["texts"]
    assert 0 < len(kept) < 6
    page.reload()
    expecting(page.locator("#output")).to_have_text(last)


def test_damaged_texts_are_left_out(page):
    written = write(page)
    for damaged in ("null", "{}", '{"id": "a", "tokens": [null]}'):
        page.evaluate(
            """(damaged) => {
                const kept = JSON.parse(localStorage.getItem("nanogpt2.texts"));
                kept.texts.unshift(JSON.parse(damaged));
                localStorage.setItem("nanogpt2.texts", JSON.stringify(kept));
            }""",
            damaged,
        )
        page.reload()
        expecting(page.locator("#output")).to_have_text(written)
        expecting(page.locator("#history button")).to_have_count(1)


def test_two_tabs_keep_all_texts(page, address):
    second = page.context.new_page()
    second.goto(address)
    expecting(second.get_by_label("Length", exact=True)).to_have_value("100")
    write(page)
    expecting(second.locator("#history button")).to_have_count(1)
    write(second, "My fellow citizens")
    expecting(page.locator("#history button")).to_have_count(2)
    page.reload()
    expecting(page.locator("#history button")).to_have_count(2)


def test_task_shows_its_template_and_searches_with_beams(page, model, tokenizer):
    page.get_by_label("Task").select_option("question-answering")
    page.get_by_label("Your beginning").first.fill("Who was Lincoln?")
    hint = page.locator("#prompt-hint").text_content()
    assert (
        "Q: Who was Lincoln?\nA:" in hint and "4 beams" in page.locator("#preset-hint").inner_text()
    )
    page.get_by_role("button", name="Write", exact=True).click()
    idle(page)
    prompt = hint.removeprefix("The model reads: ")
    ids, new = sampled(
        model,
        tokenizer,
        prompt,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        num_beams=4,
        max_new_tokens=24,
        stop_strings=["\n"],
        tokenizer=tokenizer,
    )
    assert output(page) == prompt + tokenizer.decode(new).split("\n")[0]
    assert run(command(page)) == output(page)
    show(page, "Why")
    token(page, 0).click()
    p = distributions(model, ids + new, len(ids))[0, new[0]].exp()
    assert f"rank {1 + int((distributions(model, ids + new, len(ids))[0].exp() > p).sum())} of" in (
        page.locator("#token").inner_text()
    )


def test_settings_say_their_defaults(page):
    described = {
        label: page.locator(
            "#" + page.get_by_label(label, exact=True).first.get_attribute("aria-describedby")
        )
        for label in ("Length", "Temperature", "Top k", "Top p", "Repetition penalty")
    }
    said = {
        label: hint.inner_text().rpartition("Default: ")[2] for label, hint in described.items()
    }
    assert [*said.values()] == ["100.", "0.8.", "50.", "0.95.", "1."]
    page.get_by_text("All other options").click()
    page.get_by_label("min p").fill("0.3")
    write(page)
    words = command(page)
    assert words[words.index("--min_p") + 1] == "0.3"
    page.get_by_role("button", name="Reset all").click()
    assert page.get_by_label("min p").input_value() == ""


# ---- errors


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [("Seed", "x1", "seed must be"), ("Temperature", "-1", "temperature must be")],
)
def test_wrong_setting_is_said_plainly(page, label, value, message):
    write(page, **{label: value})
    status = page.locator("#write-status").text_content()
    assert message in status.lower() and value in status
    assert output(page) == ""
    page.faults[:] = [fault for fault in page.faults if "status of 400" not in fault]


def test_busy_and_silent_server_are_said_plainly(page):
    answer = {
        "status": 429,
        "headers": {"Retry-After": "7"},
        "json": {"error": {"message": "full"}},
    }
    page.route("**/api/generate", lambda route: route.fulfill(**answer))
    write(page)
    assert "busy. Try again in 7 seconds" in page.locator("#write-status").text_content()
    page.unroute("**/api/generate")
    page.route("**/api/generate", lambda route: route.abort())
    write(page)
    assert "does not answer" in page.locator("#write-status").text_content()
    assert len(page.faults) == 2
    page.faults.clear()


def test_key_is_asked_for_and_sent(opened):
    page = opened()
    keys = []

    def locked(route):
        keys.append(route.request.headers.get("authorization"))
        right = keys[-1] == "Bearer open sesame"
        error = {"error": {"message": "the key is wrong"}}
        route.fallback() if right else route.fulfill(status=401, json=error)

    page.route("**/api/**", locked)
    page.reload()
    page.get_by_label("This server asks for its key").fill("open sesame")
    page.keyboard.press("Enter")
    page.locator("#settings input").first.wait_for()
    assert write(page).startswith(PROMPT)
    assert keys[0] is None and set(keys[1:]) == {"Bearer open sesame"}
    page.faults[:] = [fault for fault in page.faults if "status of 401" not in fault]


# ---- why


def test_colours_are_those_of_the_model(page, model, tokenizer):
    ids, new = sampled(model, tokenizer)
    logp = distributions(model, ids + new, len(ids))  # (12, V)
    chosen = logp[range(len(new)), new]
    rank = 1 + (logp > chosen[:, None]).sum(dim=1)
    entropy = -(logp.exp() * logp).sum(dim=1)
    steps = {
        "probability": (-chosen, [-math.log(p) for p in (0.5, 0.2, 0.05, 0.01, 0.001)]),
        "rank": (rank, [1, 3, 10, 50, 500]),
        "entropy": (entropy, [0.5, 1.5, 3, 4.5, 6]),
    }
    write(page)
    show(page, "Why")
    seen = set()
    for name, (values, limits) in steps.items():
        page.get_by_role("radio", name=name).check()
        assert levels(page) == [sum(value > limit for limit in limits) for value in values.tolist()]
        seen.add(tuple(levels(page)))
        legend = page.get_by_role("list", name="Legend").first.get_by_role("listitem")
        assert legend.count() == 6
    assert len(seen) == 3
    assert page.locator("#tokens").text_content().replace("⏎", "") == tokenizer.decode(ids + new)


def test_opened_token_shows_settings_and_rivals(page, model, tokenizer):
    ids, new = sampled(model, tokenizer, top_k=3)
    write(page, **{"Top k": "3"})
    show(page, "Why")
    token(page, 5).click()
    logp = distributions(model, ids + new, len(ids))[5]
    heads = page.locator("#token thead th").all_inner_texts()
    assert heads == ["token", "model", "temperature 0.8", "top k 3", "top p 0.95"]
    row = page.locator("#token tr.chosen td").all_inner_texts()
    p, cooled = logp.exp()[new[5]].item(), (logp / 0.8).softmax(dim=0)[new[5]].item()
    for cell, expected in zip(row[1:3], (p, cooled), strict=True):
        assert float(cell.split("%")[0]) == pytest.approx(100 * expected, rel=0.06)
    best = tokenizer.decode([int(logp.argmax())])
    names = page.locator("#token tbody th").all_text_contents()
    assert best in [name.partition("rank")[0] for name in names]
    # a rival that a setting excludes says so
    assert "banned" in page.locator("#token tbody").inner_text()


def test_rival_begins_a_branch_to_return_to(page, model, tokenizer):
    ids, new = sampled(model, tokenizer)
    first = write(page)
    show(page, "Why")
    token(page, 4).click()
    names = page.locator("#token tbody th").all_text_contents()
    take = page.locator("#token").get_by_role("button", name=re.compile("^Take")).first
    rival = re.search("“(.*)”", take.get_attribute("aria-label"))[1].replace("⏎", "\n")
    take.click()
    idle(page)
    second = output(page)
    kept = tokenizer.decode(ids + new[:4]) + rival
    assert second.startswith(kept) and second != first
    # generate() goes on from the same ids
    before = torch.tensor([ids + new[:4] + tokenizer.encode(rival)])
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    out = generate(model, before, max_new_tokens=12, **options)
    assert second == tokenizer.decode(out.sequences[0])
    branches = page.locator("#branches").get_by_role("button")
    assert branches.count() == 2
    assert page.locator("#branches li li").get_by_role("button").get_attribute("aria-current")
    # at the rival's place the same tokens are shown; the former one is among the rivals now
    token(page, 4).click()
    assert sorted(page.locator("#token tbody th").all_text_contents()) == sorted(names)
    assert page.locator("#token tr.chosen th").text_content().startswith(rival)
    branches.first.click()
    assert output(page) == first
    page.reload()
    show(page, "Why")
    page.locator("#branches li li").get_by_role("button").click()
    assert output(page) == second


def test_own_text_is_measured(page, model, tokenizer):
    ids = tokenizer.encode(PROMPT)
    page.get_by_label("Your beginning").first.fill(PROMPT)
    show(page, "Why")
    page.get_by_role("button", name="Measure").click()
    idle(page)
    nll = -distributions(model, ids, 1)[range(len(ids) - 1), ids[1:]].mean()
    assert f"Perplexity {nll.exp():.1f}" in page.locator("#why-status").text_content()
    assert page.locator("#tokens .token").count() == len(ids)


# ---- beams


def test_tree_of_beams(page, model, tokenizer):
    page.get_by_label("Your beginning").first.fill(PROMPT)
    show(page, "Beams")
    panel = page.get_by_role("tabpanel", name="Beams")
    panel.get_by_label("Tokens to add").fill("8")
    page.evaluate("""() => {
        window.sizes = [];
        new MutationObserver(() => sizes.push(document.querySelectorAll("#beams-tree g").length))
            .observe(document.querySelector("#beams-tree"), { childList: true });
    }""")
    panel.get_by_role("button", name="Search").click()
    idle(page)
    sizes = page.evaluate("sizes")
    assert len(sizes) >= 8 and sizes == sorted(sizes) and sizes[0] < sizes[-1]
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = generate(model, ids, num_beams=4, num_return_sequences=4, max_new_tokens=8)
    texts = panel.locator("#beams-texts .words").all_text_contents()
    assert texts[0] == tokenizer.decode(out.sequences[0])
    scores = panel.locator("#beams-texts .hint").all_inner_texts()
    assert scores[0] == f"score {out.sequences_scores[0]:.3f}".replace("-", "−")
    best = panel.locator("#beams-tree g.best text:not(.score)").all_text_contents()
    ids, new = ids[0].tolist(), out.sequences[0, ids.size(1) :].tolist()
    assert "".join(best).replace("⏎", "\n") == tokenizer.decode(new)
    # branches given up are dimmed, and the list names them all
    assert panel.locator("#beams-tree g.pruned").count() > 0
    page.get_by_text("The branches as a list").click()
    assert panel.locator("#beams-list li", has_text="given up").count() > 0


# ---- inside


def test_inside(page, tokenizer):
    text = "The unbelievable river, the river"
    show(page, "Inside")
    panel = page.get_by_role("tabpanel", name="Inside")
    panel.get_by_label("Text to look into").fill(text)
    with page.expect_response("**/api/inspect") as answer:
        panel.get_by_role("button", name="Look inside").click()
    found = answer.value.json()
    idle(page)
    assert found["ids"] == tokenizer.encode(text)
    weights = found["attention"]["weights"]
    # hovering a token colours those that it looks at
    token(page, 3, "#inside-tokens").hover()
    limits = (0.02, 0.08, 0.2, 0.4, 0.7)
    row = weights[3] + [0.0] * (len(weights) - 4)
    assert levels(page, "#inside-tokens") == [sum(w >= limit for limit in limits) for w in row]
    assert sum(row) == pytest.approx(1, abs=1e-5)
    most = max(range(4), key=lambda j: row[j])
    assert found["tokens"][most] in page.locator("#looks").text_content()
    # the same by the keyboard, for another head
    with page.expect_response("**/api/inspect") as answer:
        panel.get_by_label("Head", exact=True).select_option("2")
    idle(page)
    other = answer.value.json()["attention"]["weights"]
    assert other != weights
    token(page, 5, "#inside-tokens").focus()
    page.keyboard.press("ArrowLeft")
    row = other[4] + [0.0] * (len(weights) - 5)
    assert levels(page, "#inside-tokens") == [sum(w >= limit for limit in limits) for w in row]
    page.keyboard.press("Enter")
    idle(page)
    rows = panel.locator("#lens tbody tr")
    assert rows.count() == len(found["norms"]) == len(found["lens"])
    for layer, norms in enumerate(found["norms"]):
        assert f"{norms[4]:.1f}" in rows.nth(layer).inner_text()
        assert found["lens"][layer][4][0]["text"].strip() in rows.nth(layer).inner_text()
    assert found["tokens"][4].strip() in panel.locator("#near-title").inner_text()
    # " unbelievable" came from several merges, all shown
    merged = next(one for one in found["merges"] if "unbelievable" in one["word"])
    box = panel.locator("#merges details").nth(1)
    box.locator("summary").click()
    assert box.locator("ol li").count() == len(merged["steps"]) > 3


# ---- compare


def test_compare_colours_the_change(page, model, tokenizer, other):
    page.get_by_label("Your beginning").first.fill(PROMPT)
    show(page, "Compare")
    panel = page.get_by_role("tabpanel", name="Compare")
    panel.get_by_label("Seed").fill("3")
    panel.get_by_label("Tokens to add").fill("12")
    assert panel.get_by_label("Model", exact=True).nth(1).input_value() == other
    panel.get_by_role("button", name="Compare").click()
    idle(page)
    tuned = load_model(other)
    for side, writer in (("a", model), ("b", tuned)):
        ids, new = sampled(writer, tokenizer)
        shown = page.locator(f"#text-{side}").text_content().replace("⏎", "")
        assert shown == tokenizer.decode(ids + new)
        a, b = (distributions(m, ids + new, len(ids))[range(12), new] for m in (model, tuned))
        gains = (b - a).tolist()
        expected = [
            5 if g > 2 else 2 if g > 0.5 else -2 if g < -2 else -1 if g < -0.5 else 0 for g in gains
        ]
        assert levels(page, f"#text-{side}") == expected
    token(page, 2, "#text-b").click()
    cells = page.locator("#change tbody td").all_inner_texts()
    for cell, logp in zip(cells[::3], (a[2], b[2]), strict=True):
        assert float(cell.strip("%<")) == pytest.approx(100 * math.exp(logp), rel=0.06)


def test_compare_two_settings_of_one_model(page, model, tokenizer):
    page.get_by_label("Your beginning").first.fill(PROMPT)
    show(page, "Compare")
    panel = page.get_by_role("tabpanel", name="Compare")
    for box in panel.get_by_label("Model", exact=True).all():
        box.select_option("demo")
    for n, (temperature, top_k) in enumerate((("0.5", "0"), ("2", "2"))):
        panel.get_by_label("Temperature").nth(n).fill(temperature)
        panel.get_by_label("Top k").nth(n).fill(top_k)
        panel.get_by_label("Top p").nth(n).fill("1")
    panel.get_by_label("Tokens to add").fill("10")
    panel.get_by_label("Seed").fill("3")
    panel.get_by_role("button", name="Compare").click()
    idle(page)
    assert page.get_by_role("radio", name="the probability after the settings").is_checked()
    options = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 10}
    ids, new = sampled(model, tokenizer, **options)
    logp = distributions(model, ids + new, len(ids))
    sides = []
    for n, row in enumerate(logp):
        token(page, n, "#text-a").click()
        cells = page.locator("#change tbody td").all_inner_texts()
        cool, best = (row / 0.5).softmax(dim=0), row.topk(2).indices
        hot = (row[best] / 2).softmax(dim=0).tolist()
        expected = dict(zip(best.tolist(), hot, strict=True)).get(new[n])
        assert float(cells[2].strip("%<")) == pytest.approx(100 * cool[new[n]].item(), rel=0.06)
        if expected is None:
            assert cells[5] == "out" and levels(page, "#text-a")[n] == -2
        else:
            assert float(cells[5].strip("%<")) == pytest.approx(100 * expected, rel=0.06)
        sides.append(expected is None)
    assert {True, False} == {*sides}


# ---- for everybody


def test_keyboard_alone(page):
    focused = "document.activeElement.id"

    def tab_to(name, most=60):
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == name:
                return
        raise AssertionError(f"{name} cannot be reached")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    tab_to("prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    tab_to("set-max_new_tokens")
    page.keyboard.press("Control+A")
    page.keyboard.type("6")
    page.keyboard.press("Shift+Tab")
    while page.evaluate(focused) != "prompt":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+Enter")
    idle(page)
    assert page.locator("#tokens .token").count() == 6
    while page.evaluate(focused) != "tab-write":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "tab-why"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "token-title"
    assert page.locator("#token-title").text_content().startswith("Token 2")
    page.keyboard.press("Escape")
    assert token(page, 1).evaluate("node => node === document.activeElement")
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if (page.evaluate("document.activeElement.textContent")) == "Take":
            break
    page.keyboard.press("Enter")
    idle(page)
    assert page.locator("#branches").get_by_role("button").count() == 2


def fill_every_part(page):
    """Yield each part, filled and open."""
    write(page, PROMPT + " unbelievable", Length="30")
    page.get_by_text("The command that writes").click()
    if not page.locator("#others").is_visible():
        page.get_by_text("All other options").click()
    yield "Write"
    show(page, "Why")
    token(page, 3).click()
    page.locator("#token").get_by_role("button", name=re.compile("^Take")).first.click()
    idle(page)
    token(page, 3).click()
    yield "Why"
    for part, button in (("Beams", "Search"), ("Inside", "Look inside"), ("Compare", "Compare")):
        show(page, part)
        page.get_by_role("tabpanel").get_by_role("button", name=button, exact=True).click()
        idle(page)
        if part == "Beams":
            page.get_by_text("The branches as a list").click()
        if part == "Inside":
            page.locator("#merges summary").first.click()
        if part == "Compare":
            token(page, 2, "#text-a").click()
        yield part


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_and_nothing_is_too_wide(opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(width, scheme)
    for part in fill_every_part(page):
        found = Axe().run(page).response["violations"]
        report = [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
        assert report == [], part
        assert page.evaluate("document.documentElement.scrollWidth") <= width, part


def test_dark_and_light_differ(opened):
    papers = {
        opened(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert len(papers) == 2


# ---- safe


def test_markup_in_a_text_stays_text(page):
    nasty = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> "
    nasty += "<script>document.title = 'owned'</script>"
    text = write(page, nasty)
    assert text.startswith(nasty)
    for part in fill_every_part(page):
        assert page.locator("main img, main b, main script").count() == 0, part
    page.reload()
    show(page, "Write")
    page.locator("#history").get_by_text("<img src=x").first.wait_for()
    assert page.title() == "nanogpt2"


def test_page_sets_no_markup_and_names_no_host():
    source = PAGE.read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
    ):
        assert word not in source
    hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", source))
    # the name of SVG's namespace is no address
    assert hosts == {"www.w3.org"}
    assert len(re.findall(r"w3\.org/[\w/]*", source)) == source.count("w3.org/2000/svg")


def test_policy_allows_no_other_host(page, address):
    response = page.request.get(address)
    for policy in (
        response.headers["content-security-policy"],
        page.locator("meta[http-equiv]").get_attribute("content"),
    ):
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
        values = {value for rule in rules.values() for value in rule.split()}
        assert values <= {"'none'", "'self'", "'unsafe-inline'", "data:"}
    # a port where nobody listens: the policy refuses before anything is sent
    refused = page.evaluate("""() => new Promise((done) => {
        const refuse = (event) => done(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", refuse);
        fetch("http://127.0.0.1:9/").catch(() => {});
    })""")
    assert refused == "connect-src"
    page.faults.clear()


# ---- the README's picture


def test_picture_is_small(opened, tmp_path):
    from PIL import Image

    page = opened()
    write(page, Length="60")
    show(page, "Why")
    token(page, 9).click()
    page.mouse.move(0, 0)
    page.screenshot(path=tmp_path / "page.png")
    drawn = PICTURE if not PICTURE.exists() else tmp_path / "small.png"
    with Image.open(tmp_path / "page.png") as picture:
        # a page has few colours; a palette takes a third of the bytes
        picture.quantize(128, dither=Image.Dither.NONE).save(drawn, optimize=True)
    for path in (drawn, PICTURE):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and 10_000 < len(data) < 200_000
