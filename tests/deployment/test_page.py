"""The page of `zoo serve`, of the real server, in the system's Chromium."""

from __future__ import annotations

import base64
import functools
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser import ARGUMENTS, WATCH, chromium_path, serving
from PIL import Image

from zoo.deployment.bundle import list_bundles, open_bundle, seal
from zoo.deployment.card import card_text
from zoo.deployment.facts import CardFacts
from zoo.files import home

pytestmark = pytest.mark.slow  # processes and servers of their own

api = pytest.importorskip("playwright.sync_api")
api.expect.set_options(timeout=60_000)  # two cores may be shared by many

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
TOKEN = "a-token-of-the-tests-0123456789"
ASKED = "#verdict:is([data-state=answer], [data-state=refer])"
FAILED = "#verdict[data-state=error]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium_path()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(_bundled_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the bundle of `tiny`, and `hostile`: a copy whose names are markup and whose data are medical."""
    folder = tmp_path_factory.mktemp("served") / "home"
    shutil.copytree(_bundled_template / "models" / "bundles", folder / "models" / "bundles")
    (name,) = list_bundles(home(folder))
    copy = folder / "models" / "bundles" / "hostile"
    shutil.copytree(folder / "models" / "bundles" / name, copy)
    record = open_bundle(copy).record
    classes = [HOSTILE, "b <b>bold</b>", "c"]
    assert record.rules.conformal is not None
    conformal = record.rules.conformal.model_copy(update={"coverage": 0.77})
    rules = record.rules.model_copy(update={"conformal": conformal})
    record = record.model_copy(
        update={"name": "hostile", "classes": classes, "dataset": HOSTILE, "medical": True, "negative_class": None}
    ).model_copy(update={"rules": rules})
    facts = CardFacts(HOSTILE, classes, summary=HOSTILE, medical=True, floors=[{"name": HOSTILE, "val_top1": 0.25}])
    (copy / "card.md").write_text(card_text(record, facts), encoding="utf-8")
    seal(copy, record)
    return folder


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    """Where both bundles are served, `tiny`'s first."""
    plain = next(name for name in list_bundles(home(models)) if name != "hostile")
    with serving(models, plain, "hostile") as url:
        yield url


@pytest.fixture(scope="module")
def guarded(models: Path) -> Iterator[str]:
    """Where one bundle is served to those who know the token, in bodies of 1 MiB at the most."""
    with serving(models, "hostile", "--max-body-mb", "1", ZOO_TOKEN=TOKEN) as url:
        yield url


@pytest.fixture(scope="module")
def image(image_folder: Path) -> Path:
    return image_folder / "malignant" / "case 03.png"


class Tab:
    """A page of the browser, and all that was said and asked for while it was open."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.url = url
        self.context = browser.new_context(**settings)
        self.context.add_init_script(WATCH)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.said: list[str] = []
        self.asked: list[Any] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", self._note)
        self.choosers: list[Any] = []
        self.page.on("filechooser", self._choose)  # from the start: a dialog that nobody awaits would open for real

    def _note(self, request: Any) -> None:
        self.asked.append(request)

    def _choose(self, chooser: Any) -> None:
        self.choosers.append(chooser)

    def chooser(self, act: Callable[[], Any]) -> Any:
        """Return the file dialog that an act opens."""
        before = len(self.choosers)
        act()
        for _ in range(1200):
            if len(self.choosers) > before:
                return self.choosers[-1]
            self.page.wait_for_timeout(50)
        raise AssertionError("no file dialog was opened")

    def open(self) -> Any:
        self.page.goto(self.url)
        self.page.wait_for_selector("body:not(.loading) #facts dd")
        return self.page

    def give(self, *files: Path | dict[str, Any], until: str = ASKED) -> None:
        self.page.set_input_files("#file", list(files))
        self.page.wait_for_selector(until)

    def predictions(self) -> list[Any]:
        return [each for each in self.asked if each.method == "POST"]

    def check(self, expected: int = 0) -> None:
        """Nothing went wrong in silence: no word on the console but of `expected` refusals, no foreign address."""
        refusals = [line for line in self.said if "Failed to load resource" in line]
        assert [line for line in self.said if line not in refusals] == []
        assert len(refusals) == expected, refusals
        assert self.page.evaluate("noted.stopped") == []
        foreign = {urlsplit(each.url).netloc for each in self.asked if not each.url.startswith(("blob:", "data:"))}
        assert foreign <= {urlsplit(self.url).netloc}


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    """A tab with the page of both bundles, which in the end must have been quiet."""
    found = Tab(browser, address)
    found.open()
    yield found
    found.check()
    found.context.close()


def _text(page: Any, selector: str) -> str:
    return str(page.inner_text(selector)).strip()


def _transfer(page: Any, files: list[tuple[str, bytes]]) -> Any:
    """Return a DataTransfer that holds files, made in the page as a drop or a paste has it."""
    return page.evaluate_handle(
        """(files) => { const made = new DataTransfer();
        for (const [name, text] of files) {
          const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
          made.items.add(new File([bytes], name, { type: "image/png" }));
        } return made; }""",
        [[name, base64.b64encode(data).decode()] for name, data in files],
    )


def _answer(address: str, image: Path, model: str | None = None) -> dict[str, Any]:
    query = {"model": model} if model else {}
    sent = {"content": image.read_bytes(), "headers": {"Content-Type": "image/png"}}
    found = httpx.post(f"{address}/predict", params=query, **sent).raise_for_status().json()  # type: ignore[arg-type]
    return dict(found["predictions"][0])


def test_a_chosen_image_is_answered_as_the_server_says_and_its_name_stays_here(tab, address, image):
    tab.give(image)
    said, page = _answer(address, image), tab.page
    scores = {
        row.locator("th").inner_text().strip(): row.locator("td.value").inner_text()
        for row in page.locator("#scores tbody tr").all()
    }
    assert set(scores) == set(said["scores"])
    assert list(scores) == sorted(said["scores"], key=lambda name: -said["scores"][name])
    for name, score in said["scores"].items():
        assert scores[name] == f"{score:.2f}" or scores[name] in (">0.99", "<0.01")
    assert _text(page, "#label").startswith(said["label"])
    assert page.get_attribute("#verdict", "data-state") == ("refer" if said["refer"] else "answer")
    assert ("Refer to a human" in _text(page, "#refer")) == said["refer"]
    members = [
        row.locator("th").inner_text().strip() for row in page.locator("#scores tbody tr:has-text('in set')").all()
    ]
    assert sorted(members) == sorted(said["prediction_set"])
    for name in said["prediction_set"]:
        assert name in _text(page, "#set")
    assert len(tab.predictions()) == 1
    assert page.evaluate("noted.sent") == [["files", "image", image.stat().st_size]]
    assert image.stem not in tab.predictions()[0].url
    assert page.get_attribute("#picture", "src").startswith("blob:")
    assert page.locator("#picture").is_visible() and not page.locator("#drop").is_visible()


def test_images_can_be_dropped_anywhere_and_pasted(tab, image):
    page, data = tab.page, image.read_bytes()
    for target in ("#drop", "footer, body"):
        page.dispatch_event(target, "dragenter", {"dataTransfer": _transfer(page, [("a.png", data)])})
        assert page.locator("body.dragging").count() == 1
        page.dispatch_event(target, "drop", {"dataTransfer": _transfer(page, [("a.png", data)])})
        assert page.locator("body.dragging").count() == 0
        page.wait_for_selector(ASKED)
    api.expect(page.locator("#history li")).to_have_count(2)
    page.dispatch_event("body", "drop", {"dataTransfer": _transfer(page, [("b.png", data), ("c.png", data)])})
    api.expect(page.locator("#history li .said", has_text=re.compile(r"\d"))).to_have_count(4)
    page.evaluate_handle(
        """(transfer) => document.body.dispatchEvent(new ClipboardEvent("paste",
        { clipboardData: transfer, bubbles: true, cancelable: true }))""",
        _transfer(page, [("d.png", data)]),
    )
    api.expect(page.locator("#history li")).to_have_count(5)
    page.wait_for_selector(ASKED)
    page.dispatch_event("body", "drop", {"dataTransfer": _transfer(page, [])})
    assert _text(page, "#fault") == "No image was in what you gave."


def test_everything_can_be_done_with_the_keyboard(tab, image):
    page = tab.page
    for key in ("Enter", "Space"):
        assert page.evaluate("document.getElementById('drop').checkVisibility()")
        page.focus("#drop")
        chosen = tab.chooser(functools.partial(page.keyboard.press, key))
        assert chosen.is_multiple()
        chosen.set_files(image)
        page.wait_for_selector(ASKED)
        assert page.evaluate("document.activeElement.id") == "choose"  # not lost with the drop zone
        page.focus("#clear")
        page.keyboard.press("Enter")
    tab.give(image, image)
    api.expect(page.locator("#history li .said", has_text=re.compile(r"\d"))).to_have_count(2)
    page.focus(".skip")
    assert page.locator(".skip").bounding_box()["x"] >= 0
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "BODY":
            break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
    for name in ("model", "choose", "shown", "strength", "clear", "BUTTON", "SUMMARY"):
        assert name in reached
    before = page.input_value("#strength")
    page.focus("#strength")
    page.keyboard.press("ArrowRight")
    assert int(page.input_value("#strength")) > int(before)
    page.focus("#history li:last-child button")
    page.keyboard.press("Enter")
    assert page.get_attribute("#history li:last-child button", "aria-current") == "true"
    assert page.evaluate("document.activeElement.closest('li') !== null")
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.locator("#card").is_visible()


def test_the_map_lies_on_the_image_and_can_be_taken_off(tab, image):
    page = tab.page
    painted = """() => { const map = document.getElementById("map"), copy = new OffscreenCanvas(map.width, map.height);
      const context = copy.getContext("2d", { willReadFrequently: true });
      context.drawImage(map, 0, 0);
      return context.getImageData(0, 0, copy.width, copy.height).data.some((each) => each > 0); }"""
    assert not page.evaluate(painted) and page.is_disabled("#shown")
    tab.give(image)
    assert page.evaluate(painted) and page.is_enabled("#shown")
    assert "What spoke for" in _text(page, "#looking-text")
    page.uncheck("#shown")
    assert not page.evaluate(painted)
    page.check("#shown")
    page.fill("#strength", "0")
    assert not page.evaluate(painted)


def test_the_history_is_of_this_tab_and_leaves_nothing(tab, image, image_folder):
    page = tab.page
    tab.give(image, image_folder / "benign" / "case 01.png")
    api.expect(page.locator("#history li .said", has_text=re.compile(r"\d"))).to_have_count(2)
    newest, count = _text(page, "#label"), len(tab.predictions())
    page.click("#history li:last-child button")
    assert _text(page, "#label") in page.locator("#history li:last-child").inner_text()
    page.click("#history li:first-child button")
    assert _text(page, "#label") == newest
    assert len(tab.predictions()) == count  # an answer that is known is not asked for again
    assert page.evaluate("noted.blobs.size") == 4
    kept = "[localStorage.length, sessionStorage.length, document.cookie.length]"
    assert page.evaluate(kept) == [0, 0, 0]
    page.click("#clear")
    assert page.evaluate("noted.blobs.size") == 0
    assert page.locator("#history li").count() == 0 and page.locator("#drop").is_visible()
    assert page.is_disabled("#clear") and page.evaluate("document.activeElement.id") == "drop"
    page.reload()
    page.wait_for_selector("body:not(.loading) #facts dd")
    assert page.locator("#history li").count() == 0


def test_images_that_come_while_one_is_asked_about_wait_for_their_turn(tab, image, image_folder):
    page, held = tab.page, []
    page.route("**/predict?*", lambda route: held.append(route) if not held else route.continue_())
    page.set_input_files("#file", image)
    api.expect(page.locator("#label")).to_have_text("Asking the model")
    page.set_input_files("#file", [image_folder / "normal" / "case 01.png", image_folder / "benign" / "case 02.png"])
    page.wait_for_timeout(200)
    assert len(tab.predictions()) == 1
    held[0].continue_()
    answered = page.locator("#history li .said", has_text=re.compile(r"\d"))
    api.expect(answered).to_have_count(3)
    assert [text.split(". ")[1] for text in page.locator("#history .name").all_inner_texts()] == [
        "case 02.png",
        "case 01.png",
        "case 03.png",
    ]
    assert len(tab.predictions()) == 3


def test_another_model_is_asked_about_the_image_that_is_being_asked_about(tab, image):
    page, held = tab.page, []
    page.route("**/predict?*", lambda route: held.append(route) if not held else route.continue_())
    page.set_input_files("#file", image)
    api.expect(page.locator("#label")).to_have_text("Asking the model")
    page.select_option("#model", "hostile")
    page.wait_for_selector(ASKED)
    assert page.locator("#history li").count() == 1
    assert "model=hostile" in tab.predictions()[-1].url and len(tab.predictions()) == 2
    tab.said.clear()


def test_an_answer_keeps_the_words_and_the_name_of_the_model_that_gave_it(tab, image):
    page = tab.page
    plain = page.input_value("#model")
    tab.give(image)
    tab.give(image)
    api.expect(page.locator("#history .by")).to_have_text([plain, plain])
    before = _text(page, "#set-note")
    assert "in 90 % of images" in before and page.locator("#device").is_hidden()
    page.select_option("#model", "hostile")  # asked about the second image alone
    api.expect(page.locator("#history .by")).to_have_text(["hostile", plain])
    page.wait_for_selector(ASKED)
    assert "in 77 % of images" in _text(page, "#set-note") and page.locator("#device").is_visible()
    page.locator("#history button").nth(1).click()
    assert _text(page, "#set-note") == before
    page.locator("#history button").nth(0).click()
    page.select_option("#model", plain)
    api.expect(page.locator("#history .by")).to_have_text([plain, plain])


def test_an_answer_of_a_medical_model_warns_whatever_model_is_chosen(tab, image):
    page = tab.page
    plain = page.input_value("#model")
    page.select_option("#model", "hostile")
    page.wait_for_selector("#device:visible")
    tab.give(image)
    tab.give(image)
    api.expect(page.locator("#history .by")).to_have_text(["hostile", "hostile"])
    page.select_option("#model", plain)
    api.expect(page.locator("#history .by")).to_have_text([plain, "hostile"])
    api.expect(page.locator("#device")).to_be_hidden()
    page.locator("#history button").nth(1).click()
    assert page.locator("#device").is_visible()


def test_only_so_many_images_are_kept(tab, image):
    tab.page.dispatch_event("body", "drop", {"dataTransfer": _transfer(tab.page, [("x.png", image.read_bytes())] * 27)})
    api.expect(tab.page.locator("#history li .name").first).to_have_text(re.compile("^27"))
    tab.page.wait_for_selector(ASKED)
    assert tab.page.locator("#history li").count() == 24
    assert tab.page.evaluate("noted.blobs.size") == 48


def test_an_image_that_the_browser_cannot_show_has_a_placeholder_and_its_map(tab, image, tmp_path):
    file = tmp_path / "scan.tif"
    Image.open(image).save(file)
    tab.give(file)
    page = tab.page
    assert page.locator("#placeholder").is_visible() and not page.locator("#picture").is_visible()
    assert "TIFF" in _text(page, "#placeholder-text") and page.is_enabled("#shown")
    assert page.locator("#history .none").inner_text() == "TIFF"
    tab.give(image)
    assert page.locator("#picture").is_visible() and not page.locator("#placeholder").is_visible()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.png", b"no image at all", "This kind of file is not read here."),
        ("cut.png", None, "This image cannot be read."),
        ("empty.png", b"", "."),
    ],
)
def test_what_is_no_image_is_said_in_words(browser, address, image, name, data, said):
    tab = Tab(browser, address)
    page = tab.open()
    data = image.read_bytes()[:900] if data is None else data
    tab.give({"name": name, "mimeType": "image/png", "buffer": data}, until=FAILED)
    assert said in _text(page, "#refer") and _text(page, "#label") == "No answer"
    assert "The server says:" in _text(page, "#refer")
    assert page.locator("#again").is_visible()
    tab.give(image)
    assert not page.locator("#again").is_visible()
    tab.check(expected=1)
    tab.context.close()


def test_a_busy_server_is_asked_again_when_it_says(tab, image):
    page, calls = tab.page, []

    def busy(route: Any) -> None:
        calls.append(route)
        if len(calls) == 1:
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"error": "busy"})
        else:
            route.continue_()

    page.route("**/predict?*", busy)
    page.set_input_files("#file", image)
    api.expect(page.locator("#refer")).to_have_text("Asking again in 1 s (try 2 of 5).")
    page.wait_for_selector(ASKED)
    assert len(calls) == 2
    tab.said.clear()


def _hold(page: Any) -> Callable[[int], Any]:
    """Keep all predictions back; return `held(number)`, which waits for so many and returns the last of them."""
    routes: list[Any] = []

    def keep(route: Any) -> None:
        routes.append(route)

    page.route("**/predict?*", keep)

    def held(number: int) -> Any:
        for _ in range(1200):
            if len(routes) >= number:
                return routes[number - 1]
            page.wait_for_timeout(50)
        raise AssertionError(f"{len(routes)} were asked")

    return held


BUSY = {"status": 503, "headers": {"Retry-After": "1"}, "json": {"error": "busy"}}


def test_an_image_that_waits_is_said_to_wait_where_it_is_chosen_and_nowhere_else(tab, image):
    page = tab.page
    tab.give(image)
    before, state = _text(page, "#verdict"), page.get_attribute("#verdict", "data-state")
    held = _hold(page)
    page.set_input_files("#file", image)
    held(1).fulfill(**BUSY)
    api.expect(page.locator("#refer")).to_have_text("Asking again in 1 s (try 2 of 5).")
    second = held(2)
    page.locator("#history button").nth(1).click()
    assert _text(page, "#verdict") == before
    page.evaluate(
        """() => { window.heard = []; const box = document.getElementById("verdict");
        const all = { childList: true, subtree: true, characterData: true, attributes: true };
        new MutationObserver(() => heard.push(box.textContent)).observe(box, all); }"""
    )
    second.fulfill(**BUSY)
    third = held(3)
    assert page.evaluate("heard") == [] and _text(page, "#verdict") == before
    page.locator("#history button").nth(0).click()
    assert _text(page, "#refer") == "Asking again in 1 s (try 3 of 5)."
    assert page.get_attribute("#verdict", "data-state") == "busy"
    page.locator("#history button").nth(1).click()
    third.continue_()
    api.expect(page.locator("#history li .said", has_text=re.compile(r"\d"))).to_have_count(2)
    assert (_text(page, "#verdict"), page.get_attribute("#verdict", "data-state")) == (before, state)
    page.locator("#history button").nth(0).click()
    assert page.get_attribute("#verdict", "data-state") in ("answer", "refer")
    tab.said.clear()


def test_an_image_that_is_asked_about_anew_waits_for_its_turn_and_can_be_stopped(tab, image):
    page = tab.page
    held = _hold(page)
    page.set_input_files("#file", image)
    held(1).abort()
    page.wait_for_selector(FAILED)
    page.set_input_files("#file", image)
    held(2)
    page.locator("#history button").nth(1).click()
    assert "cannot be reached" in _text(page, "#refer")
    page.click("#again")
    assert _text(page, "#label") == "Waiting its turn" and not page.locator("#again").is_visible()
    page.locator("#history button").nth(0).click()
    assert _text(page, "#label") == "Asking the model"
    page.locator("#history button").nth(1).click()
    page.click("#stop")
    api.expect(page.locator("#refer")).to_have_text("Stopped.")
    api.expect(page.locator("#history li .said")).to_have_text(["No answer", "No answer"])
    page.unroute("**/predict?*")
    page.click("#again")
    page.wait_for_selector(ASKED)
    tab.said.clear()


def test_waiting_can_be_stopped_and_a_server_that_left_is_said(tab, image):
    page = tab.page
    page.route("**/predict?*", lambda route: route.fulfill(status=503, headers={"Retry-After": "50"}, json={}))
    page.set_input_files("#file", image)
    api.expect(page.locator("#refer")).to_contain_text("Asking again in 50 s")
    page.click("#stop")
    api.expect(page.locator("#refer")).to_have_text("Stopped.")
    page.unroute("**/predict?*")
    page.route("**/predict?*", lambda route: route.abort())
    page.click("#again")
    api.expect(page.locator("#refer")).to_contain_text("The server cannot be reached")
    page.unroute("**/predict?*")
    page.click("#again")
    page.wait_for_selector(ASKED)
    tab.said.clear()


def test_the_token_is_asked_for_and_kept_in_memory_alone(browser, guarded, image):
    tab = Tab(browser, guarded)
    page = tab.page
    page.goto(guarded)
    page.wait_for_selector("#token-box[open]")
    assert page.evaluate("document.activeElement.id") == "token"
    page.fill("#token", "wrong-token-wrong-token")
    page.keyboard.press("Enter")
    api.expect(page.locator("#token-text")).to_contain_text("not accepted")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.loading) #facts dd")
    assert not page.locator("#token-box").is_visible()
    tab.give(image)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]") == [
        0,
        0,
        "",
        f"{guarded}/",
    ]
    assert page.input_value("#token") == ""
    assert all(TOKEN not in each.url for each in tab.asked)
    tab.check(expected=2)
    page.reload()
    page.wait_for_selector("#token-box[open]")
    page.click("#token-cancel")
    api.expect(page.locator("#refer")).to_have_text("The server wants its token.")
    tab.context.close()


def test_a_body_that_is_too_large_is_said(browser, guarded):
    tab = Tab(browser, guarded)
    page = tab.page
    page.goto(guarded)
    page.wait_for_selector("#token-box[open]")
    page.fill("#token", TOKEN)
    page.click("#token-form button[type=submit]")
    page.wait_for_selector("body:not(.loading) #facts dd")
    tab.give({"name": "x.png", "mimeType": "image/png", "buffer": b"\x89PNG" + bytes(2 << 20)}, until=FAILED)
    assert "too large" in _text(page, "#refer")
    tab.context.close()


def test_names_and_cards_of_others_are_text(tab, image):
    page = tab.page
    name = '<svg onload="document.title=1">.png'
    page.select_option("#model", "hostile")
    api.expect(page.locator("#title")).to_have_text(HOSTILE)
    tab.give({"name": name, "mimeType": "image/png", "buffer": image.read_bytes()})
    page.click("summary")
    assert HOSTILE in page.locator("#scores").inner_text()
    assert name in page.locator("#history").inner_text()
    card = page.locator("#card")
    assert HOSTILE in card.inner_text() and "b <b>bold</b>" in card.inner_text()
    assert "\\" not in card.inner_text()
    assert card.locator("table").count() >= 2 and card.locator("h4").count() >= 5 and card.locator("li").count() > 5
    assert card.locator("code").inner_text() == "sha256sum -c SHA256SUMS"
    assert page.locator("img[src=x], main b, svg[onload]").count() == 0
    assert page.title() == f"{HOSTILE} · zoo"


def test_the_notice_stands_where_the_model_is_medical_and_only_there(tab, image):
    page = tab.page
    assert not page.locator("#device").is_visible()
    tab.give(image)
    before = len(tab.predictions())
    page.select_option("#model", "hostile")
    api.expect(page.locator("#device")).to_contain_text("Not a medical device.")
    api.expect(page.locator("#label")).to_contain_text(re.compile("<img|<b>|^c"))  # asked again of the other model
    assert len(tab.predictions()) == before + 1 and "model=hostile" in tab.predictions()[-1].url
    page.select_option("#model", index=0)
    api.expect(page.locator("#device")).to_be_hidden()


def test_the_models_scores_say_whose_they_are(tab, address):
    facts = httpx.get(f"{address}/model").raise_for_status().json()
    for split, words in (("test", "on test"), ("val", "on validation")):
        said = tab.page.locator(f"#facts div:has(dt:text('{words}')) dd").inner_text()
        assert said.startswith(f"{facts[split]['balanced_accuracy']:.3f} [")
        assert said.endswith(f", of {facts[f'{split}_of']}")
    assert facts["test_of"] != facts["val_of"]


def test_scores_are_not_rounded_to_certainty(tab, image):
    row = {
        "index": 0,
        "label": "normal",
        "scores": {"benign": 0.0004, "malignant": 0.0, "normal": 0.9996},
        "prediction_set": [],
        "refer": True,
        "refer_reason": "no class fits",
        "activation_map": None,
        "activation_box": None,
        "error": None,
    }
    answer = {"model": "m", "predictions": [row], "not_a_medical_device": True}
    tab.page.route("**/predict?*", lambda route: route.fulfill(json=answer))
    tab.give(image)
    assert _text(tab.page, "#label") == "normal >0.99"
    assert _text(tab.page, "#refer") == "Refer to a human: no class fits"
    assert tab.page.locator("#scores td.value").all_inner_texts() == [">0.99", "<0.01", "0.00"]
    assert tab.page.locator("#device").is_visible()
    assert tab.page.is_disabled("#shown")


# Contrast of every visible text with the ground that it stands on (WCAG 2.2, relative luminance).
CONTRAST = """() => {
  const linear = (part) => part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const parts = (text) => { const found = text.match(/[\\d.]+/g).map(Number); return [...found, 1].slice(0, 4); };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const [r, g, b, a] = parts(getComputedStyle(each).backgroundColor);
      if (a > 0.85) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const left_out = "script, noscript, .unseen, .skip, :disabled";
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest(left_out)) continue;
    const one = light(parts(getComputedStyle(element).color)), other = light(ground(element));
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, address, image, scheme):
    tab = Tab(browser, address, color_scheme=scheme)
    page = tab.open()
    grounds = []
    for until, files in (("#drop", ()), (ASKED, (image,)), (FAILED, ({"name": "x", "mimeType": "", "buffer": b"x"},))):
        if files:
            tab.give(*files, until=until)
        found = page.evaluate(CONTRAST)
        assert len(found) > 20
        assert min(found)[0] >= 4.5, min(found)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.select_option("#model", "hostile")
    page.wait_for_selector("#device:not([hidden])")
    page.click("summary")
    assert min(page.evaluate(CONTRAST))[0] >= 4.5
    darkness = sum(map(int, re.findall(r"\d+", grounds[0])[:3])) / 3
    assert darkness < 60 if scheme == "dark" else darkness > 200
    tab.context.close()


def test_it_fits_a_phone(browser, address, image):
    tab = Tab(
        browser, address, viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, is_mobile=True
    )
    page = tab.open()
    page.select_option("#model", "hostile")
    tab.give(image)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in page.locator("button:visible, select:visible, summary:visible").all():
        assert control.bounding_box()["height"] >= 44, control.inner_text()
    assert page.locator("#camera").is_visible()
    assert page.get_attribute("#photo", "capture") == "environment"
    assert ".dcm" in page.get_attribute("#file", "accept")
    tab.chooser(lambda: page.tap("#camera")).set_files(image)
    api.expect(page.locator("#history li")).to_have_count(2)
    answer, picture = page.locator("#verdict").bounding_box(), page.locator("#stage").bounding_box()
    assert answer["y"] > picture["y"] + picture["height"]
    tab.check()
    tab.context.close()


def test_nothing_moves_while_an_answer_comes(tab, image):
    before = tab.page.evaluate("noted.moved")
    tab.give(image)
    tab.page.wait_for_timeout(300)
    assert before < 0.001 and tab.page.evaluate("noted.moved") < 0.001  # parts of pixels, where letters differ in width


def test_who_wants_less_motion_gets_none(browser, address):
    tab = Tab(browser, address, reduced_motion="reduce")
    page = tab.open()
    durations = page.evaluate(
        """() => [...document.querySelectorAll("*")].map((each) => getComputedStyle(each).transitionDuration)
        .filter((each) => each !== "0s")"""
    )
    assert durations == []
    tab.context.close()


def test_a_screen_reader_finds_names_landmarks_and_the_answer(tab, image):
    page = tab.page
    tab.give(image)
    nodes = tab.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node.get("ignored")]
    by_role: dict[str, list[str]] = {}
    for node in shown:
        by_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    controls = ("button", "checkbox", "slider", "combobox", "link", "DisclosureTriangle", "table", "image")
    for role in controls:
        assert by_role.get(role), role
        assert all(name.strip() for name in by_role[role]), (role, by_role[role])
    assert len(by_role["main"]) == len(by_role["banner"]) == 1
    assert {"Image", "Answer", "Where the network looked", "History of this tab", "Model"} <= set(by_role["region"])
    status = page.locator("[role=status]")
    assert status.get_attribute("aria-live") == "polite" and status.get_attribute("aria-atomic") == "true"
    assert _text(page, "#label") in status.inner_text() and _text(page, "#refer") in status.inner_text()
    assert page.get_attribute("html", "lang") == "en"
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].filter((e) => e.checkVisibility()).map((e) => +e.tagName[1])"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_live_region_says_that_it_works_and_then_the_answer(tab, image):
    page = tab.page
    page.evaluate(
        """() => { window.heard = []; const box = document.getElementById("verdict");
        const all = { childList: true, subtree: true, characterData: true };
        new MutationObserver(() => heard.push(box.textContent.trim())).observe(box, all); }"""
    )
    tab.give(image)
    heard = page.evaluate("heard")
    assert any("Asking the model" in each for each in heard)
    assert _text(page, "#refer") in heard[-1]


def test_the_files_need_nothing_from_elsewhere():
    folder = Path(__file__).parents[2] / "zoo" / "deployment" / "server" / "page"
    files = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert set(files) == {"index.html", "page.css", "page.js", "markdown.js"}
    for name, text in files.items():
        assert not re.search(r"https?://|//cdn|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\bsrc=)", files["index.html"])
