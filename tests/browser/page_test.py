"""The page of attention in a real browser: it opens, answers to mouse and keys, loads nothing."""

import re
import shutil

import numpy as np
import pytest

from qkv_jax.viz import AttentionView, PageTable, attention_page

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
L, N, T, H = 3, 4, 9, 6
WORDS = ["私", "は", "学校", "に", "行く", " the", "\n", "<b>", "猫"]


def causal(length, seed=0, layers=L, heads=N):
    rng = np.random.RandomState(seed)
    raw = np.tril(rng.rand(layers, heads, length, length) ** 6 + 1e-6)
    return (raw / raw.sum(-1, keepdims=True)).astype("f")


def views():
    rng = np.random.RandomState(1)
    q, k = rng.randn(2, L, T, N, H)
    cross = rng.dirichlet(np.ones(T), (2, 1, 4)).astype("f")
    measures = {"entropy, nats": rng.rand(L, N), "induction": np.full((L, N), np.nan)}
    return [
        AttentionView("decoder", causal(T), WORDS, q=q, k=k, measures=measures),
        AttentionView("cross", cross, ["to", "the", "school", "end"], WORDS),
    ]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install -r requirements-browser.txt"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs an installed browser: one of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        # As root, which many containers run tests as, Chromium starts without its sandbox alone.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page, and at the end checks that it complained of nothing and loaded nothing else."""
    contexts, said, asked = [], [], []

    def opened(html, **options):
        path = tmp_path / f"page_{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    assert said == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == len(contexts)
    for context in contexts:
        context.close()


def test_hovering_a_token_tells_what_it_looks_at(opened):
    page = opened(attention_page(views(), title="Attention"))
    assert page.locator("#grid canvas").count() == L * N
    row = page.locator(".queries .row").nth(4)
    row.hover()
    weights = causal(T)[0, 0, 4]
    tip = page.locator("#tip").inner_text().splitlines()
    assert tip[0] == "行く (5) looks at"
    best = int(weights.argmax())
    assert tip[1].endswith(f"{WORDS[best]} ({best + 1})")
    assert abs(float(tip[1].split()[0]) / 100 - weights[best]) < 0.01
    lines = page.locator(".lines line").count()
    assert 1 <= lines <= 5
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden() and page.locator(".lines line").count() > lines


def test_clicking_and_keys_choose_heads_layers_and_pictures(opened):
    page = opened(attention_page(views(), title="Attention"))
    chosen = page.locator("#chosen")
    page.locator('#grid button[data-at="2.1"]').click()
    assert chosen.inner_text() == "decoder, layer 3, head 2"
    for key, wanted in [
        ("ArrowRight", "layer 3, head 3"), ("ArrowDown", "layer 1, head 3"),
        ("ArrowUp", "layer 3, head 3"), ("ArrowLeft", "layer 3, head 2"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert chosen.inner_text() == f"decoder, {wanted}"
    for key, what in [("2", ".map canvas"), ("3", ".text"), ("4", ".strip"), ("1", ".lines")]:
        page.keyboard.press(key)
        page.wait_for_selector(f".panel {what}")
    page.keyboard.press("c")
    assert page.locator(".panel").count() == 2
    assert chosen.inner_text() == "decoder, layer 3, head 2 beside decoder, layer 3, head 3"
    page.keyboard.press("c")
    page.keyboard.press("3")
    assert "What “猫” (9) looks at" in page.locator(".panel").inner_text()
    page.keyboard.press("[")
    page.keyboard.press("d")
    assert "Who looks at" in page.locator(".panel").inner_text()
    assert page.locator("#measures td").first.inner_text() == "entropy, nats"


def test_a_pair_of_tokens_shows_its_product(opened):
    page = opened(attention_page(views(), title="Attention"))
    page.keyboard.press("4")
    page.locator(".panel select").nth(0).select_option("6")
    page.locator(".panel select").nth(1).select_option("2")
    view = views()[0]
    product = float(np.dot(view.q[0, 6, 0], view.k[0, 2, 0]))
    page.wait_for_selector(".strip canvas")
    text = page.locator(".panel").inner_text()
    shown, error = map(float, re.search(r"q · k = (\S+) ± (\S+);", text).groups())
    assert shown == pytest.approx(product, abs=2 * error) and 0 < error < 0.1


def test_heads_that_share_keys_show_the_same(opened):
    q, k = np.random.RandomState(2).randn(2, L, T, N, H)
    k = k[:, :, : N // 2]
    page = opened(attention_page([AttentionView("shared", causal(T), WORDS, q=q, k=k)], title="t"))
    page.locator('#grid button[data-at="2.1"]').click()
    page.keyboard.press("4")
    page.wait_for_selector(".strip canvas")
    shown = re.search(r"q · k = (\S+) ± (\S+);", page.locator(".panel").inner_text())
    product = np.dot(q[2, T - 1, 1], k[2, T - 1, 0])  # heads 1 and 2 read the first keys
    assert float(shown[1]) == pytest.approx(product, abs=2 * float(shown[2]))


def test_attention_to_another_text_has_two_texts(opened):
    page = opened(attention_page(views(), title="Attention"))
    page.locator("#view").select_option("1")
    assert page.locator("#chosen").inner_text() == "cross, layer 1, head 1"
    assert page.locator(".queries .row").count() == 4
    assert page.locator(".keys .row").count() == T
    page.keyboard.press("4")
    assert "no queries and keys" in page.locator(".panel").inner_text()


def test_what_cannot_be_seen_is_written_as_in_python(opened):
    words = [
        "\u202eabc",
        "\u200b",
        "\x00",
        "👩\u200d🚀",
        "می\u200cخواهم",
        "\u200d",
        "",
        "\u3000\xa0",
    ]
    page = opened(attention_page([AttentionView("t", causal(len(words)), words)], title="t"))
    rows = [row.replace("\u2068", "").replace("\u2069", "") for row in
            page.locator(".queries .row").all_inner_texts()]  # fmt: skip
    assert rows == ["\\u202eabc", "\\u200b", "\\x00", *words[3:5], "\\u200d", "∅", "\\u3000\\xa0"]
    page.keyboard.press("3")
    assert page.locator(".word").first.inner_text() == "\\u202eabc"


def test_a_number_after_a_word_from_right_to_left_stays_after_it(opened):
    words = ["שלום", "مرحبا", "the"]
    table = PageTable("Lens", "note", ["after", "next"], [["1", f"{word} 10 %"] for word in words])
    page = opened(attention_page([AttentionView("t", causal(3), words)], title="t", tables=[table]))
    for cell in page.locator("#tables td:last-child").all():
        places = cell.evaluate("""cell => {
          const text = cell.firstChild, at = text.data.indexOf("10"), range = new Range();
          const left = (from) => {
            range.setStart(text, from); range.setEnd(text, from + 1);
            return range.getBoundingClientRect().left;
          };
          return [left(1), left(at)];
        }""")  # fmt: skip
        assert places[0] < places[1]
    page.keyboard.press("3")
    first, second = (page.locator(".word").nth(i).bounding_box()["x"] for i in (0, 1))
    assert first > second  # the text itself runs from right to left


@pytest.mark.parametrize("width", [390, 1400])
def test_the_labels_of_a_map_are_no_larger_than_its_cells(opened, width):
    words = ["とんと", "見当"] * 14
    page = opened(
        attention_page([AttentionView("t", causal(28), words)], title="t"),
        viewport={"width": width, "height": 800},
    )
    page.keyboard.press("2")
    cell = page.locator(".map canvas").bounding_box()["height"] / 28
    size = page.locator(".side span").first.evaluate(
        "e => parseFloat(getComputedStyle(e).fontSize)"
    )
    assert 9 <= size <= 11 and size < cell


def test_a_long_text_is_folded_and_unfolds(opened):
    words = [f"w{i}" for i in range(200)]
    page = opened(attention_page([AttentionView("long", causal(200), words)], title="Long"))
    rows = page.locator(".queries .row")
    assert rows.count() < 40 and page.locator(".queries .fold").count() == 12
    page.locator(".queries .fold").first.click()
    assert page.locator(".queries .fold").count() == 11
    assert "w3" in page.locator(".queries").inner_text()


def test_a_row_of_a_table_opens_its_token(opened):
    table = PageTable("Worst", "note", ["place", "token"], [["3", "x"], ["6", "y"]], [2, 5])
    page = opened(attention_page(views()[:1], title="Attention", tables=[table]))
    page.locator("tr.opens").nth(0).click()
    assert page.locator(".queries .row.chosen").inner_text() == "学校"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(opened, scheme, width):
    page = opened(
        attention_page(views(), title="Attention of a model with a long name " * 3),
        color_scheme=scheme, viewport={"width": width, "height": 800},
    )  # fmt: skip
    for key in "1234":
        page.keyboard.press(key)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
