"""The page at `/` in real Chromium: on the demo model's own server, and on one that says what a test needs.

The second is the same HTTP side over answers from a list: the demo neither thinks nor calls tools.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.pipeline.serve_values import Refused, Unavailable
from qnext.serve.app import make_app
from qnext.serve.settings import ServeSettings
from tests.browser import Browser, contrasts
from tests.said_server import HOSTILE, SaidBackend, serving

pytestmark = pytest.mark.thorough

HEIGHT = 800
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture
def said() -> SaidBackend:
    return SaidBackend()


class Page:
    """The page of one server, as a person uses it."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        browser.send("Page.navigate", url="about:blank")  # what the page before still asks for is over
        browser.events.clear()
        self.resize(1200, "light")
        browser.send("Page.navigate", url=url + "/")
        self.wait("document.getElementById('state')?.dataset.tone !== undefined")

    def resize(self, width: int, scheme: str) -> None:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.browser.send("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.send("Emulation.setEmulatedMedia", features=media)

    def look(self, script: str) -> Any:
        return self.browser.evaluate(script)

    def wait(self, condition: str, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.look(f"!!({condition})"):
            assert time.monotonic() < deadline, (condition, self.look("document.body.innerText"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.look(f"document.querySelector({json.dumps(selector)}).innerText"))

    def fill(self, name: str, value: str) -> None:
        self.look(f"document.getElementById('ask').elements[{json.dumps(name)}].value = {json.dumps(value)}")

    def press(self, key: str, shift: bool = False) -> None:
        codes = {"Enter": 13, "Escape": 27}
        more: dict[str, Any] = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.browser.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=8 if shift else 0,
                **(more if kind == "keyDown" else {}),
            )

    def click(self, selector: str) -> None:
        self.look(f"document.querySelector({json.dumps(selector)}).click()")

    def write(self, text: str) -> None:
        """Type a message and press Enter."""
        self.look("document.getElementById('text').focus()")
        self.browser.send("Input.insertText", text=text)
        self.press("Enter")

    def ask(self, text: str) -> str:
        """The answer to a message, once it is there."""
        answers = self.look("document.querySelectorAll('.answer').length")
        self.write(text)
        self.wait(
            f"document.querySelectorAll('.answer').length === {answers + 1} && "
            "!document.querySelector('.answer[aria-busy]')"
        )
        return str(self.look("[...document.querySelectorAll('.answer .said')].at(-1).innerText"))

    def check_quiet(self) -> None:
        """No fault was logged, and nothing was asked of anybody else."""
        events = self.browser.events
        faults = [
            e["params"] for e in events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
        assert faults == []
        asked = [
            e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"
        ]
        assert asked and all(url.startswith(self.url + "/") for url in asked), asked


# The demo's own server


@pytest.fixture(scope="module")
def demo(browser: Browser, qnext_home: Path) -> Iterator[str]:
    """The address of `qnext serve demo`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qnext", "serve", "demo", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "QNEXT_HOME": str(qnext_home)},
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def busy_slots(url: str) -> int:
    with urllib.request.urlopen(f"{url}/slots", timeout=10) as answer:
        return sum(slot["is_processing"] for slot in json.load(answer))


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.mark.engine
def test_the_demo_answers_and_its_figures_are_shown(browser: Browser, demo: str) -> None:
    page = Page(browser, demo)
    assert page.ask("hello").startswith("Hello, this is qnext's built-in demo")
    assert "t/s" in page.text(".figures") and "39 tokens" in page.text(".figures")
    assert page.ask("and again?").startswith("Hello")
    assert page.text("#model") == "qnext-demo-v1"
    assert page.look("document.querySelectorAll('#slots .bar').length") == 4
    assert "planned of" in page.text("#memory") and "Earlier prompts" in page.text("#memory")
    assert "everything on the CPU" in page.text("#plan")
    page.check_quiet()


@pytest.mark.engine
def test_stop_frees_the_slot(browser: Browser, demo: str) -> None:
    page = Page(browser, demo)
    page.write("word " * 5000)
    until(lambda: busy_slots(demo) == 1)
    page.wait("document.querySelector('#slots [data-busy=true]')")
    page.click("#stop")
    until(lambda: busy_slots(demo) == 0, 3)
    page.wait("!document.getElementById('send').hidden")
    assert "stopped" in page.text("#log .failed.note")
    assert page.ask("hello").startswith("Hello")


# What the demo does not do


def test_thinking_is_open_while_it_lasts_and_folded_after_it(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        page.look(
            """window.seen = []; new MutationObserver(() => {
                const one = document.querySelector(".thinking");
                if (one && !one.hidden) window.seen.push(one.open);
            }).observe(document.getElementById("log"), {subtree: true, childList: true})"""
        )
        page.ask("think")
        assert page.look("window.seen[0]") is True
        assert page.look("document.querySelector('.thinking').open") is False
        assert page.look("document.querySelector('.thought').textContent") == "Two and two."
        assert page.look("document.querySelector('.said').innerHTML") == (
            "<p>It is <strong>4</strong>, as <code>2 + 2</code>:</p>"
            '<pre tabindex="0" data-language="py"><code>2 + 2\n</code></pre><p>So.</p>'
        )
        assert page.text(".figures").endswith(
            "50 t/s · 5 tokens · prompt 30 tokens, 10 of them kept from before"
        )
        page.check_quiet()


def test_what_a_model_or_a_person_writes_stays_text(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        shown = page.ask(f"hostile {HOSTILE}")
        assert shown.count(HOSTILE) == 3
        assert page.text(".question") == f"hostile {HOSTILE}"
        assert page.look("document.querySelectorAll('main script, main img, #plan b').length") == 0
        assert page.look("document.title") == "said · qnext"
        blocked = "try { document.body.innerHTML = '<i></i>'; 'set' } catch (error) { error.name }"
        assert page.look(blocked) == "TypeError"


def test_calls_are_shown_and_their_results_sent(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        page.wait("!document.getElementById('tools-field').hidden")
        page.fill("tools", json.dumps(TOOLS))
        page.fill("system", "Be brief.")
        page.ask("call")
        assert page.text(".call h3") == "Calls weather"
        assert page.text(".call pre") == '{\n  "city": "Köln",\n  "days": [\n    1,\n    2\n  ]\n}'
        page.look("document.querySelector('.results textarea').value = 'rain'")
        page.click(".results button")
        page.wait("document.querySelectorAll('.answer:not([aria-busy]) .said p').length === 1")
        assert said.prompts[-1].startswith("1<|system|>Be brief.<|user|>call<|assistant|>")
        assert said.prompts[-1].endswith("<|tool|>rain<|assistant|>")
        page.check_quiet()
        page.fill("tools", "[oops")
        page.write("more")
        assert page.look("document.getElementById('settings').open") is True
        assert page.look("document.getElementById('text').value") == "more"


def test_escape_stops_and_keeps_what_was_said(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        page.write("endless")
        page.wait("document.querySelector('.said').innerText.length > 20")
        assert page.look("document.getElementById('send').hidden")
        page.press("Escape")
        page.wait("document.querySelector('.answer .end')")
        until(lambda: said.open == 0, 3)
        assert page.text(".answer .end") == "You stopped it here."
        page.look("document.getElementById('text').focus()")
        browser.send("Input.insertText", text="one")
        page.press("Enter", shift=True)
        page.ask("two")
        assert " on on<|user|>one\ntwo<|assistant|>" in said.prompts[-1]
        page.click("#new")
        page.ask("fresh")
        assert "fresh" in said.prompts[-1] and "endless" not in said.prompts[-1]
        Page(browser, url)
        assert page.look("document.querySelectorAll('article').length") == 0


def test_retry_after_is_kept_and_errors_are_words(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        said.refusals = [Unavailable("the engine starts again", 1.0)]
        began = time.monotonic()
        page.write("hello")
        page.wait("document.querySelector('.answer .note')?.innerText.includes('again in 1 second')")
        assert "The engine starts again." in page.text(".answer .note")
        page.wait("document.querySelector('.said').innerText === 'heard hello'")
        assert time.monotonic() - began >= 1
        said.refusals = [Refused("context_full", "too long", {"context": 4096})]
        page.write("longer")
        page.wait("document.querySelector('#log .failed [role=alert]')")
        assert page.text("#log .failed [role=alert]") == "Too long (context 4096)."
        page.click("#log .failed button")
        page.wait("[...document.querySelectorAll('.said')].at(-1).innerText === 'heard longer'")
        assert page.look("document.querySelectorAll('.failed').length") == 0
        said.fails_after = Unavailable("the engine died", None)
        page.write("broken")
        page.wait("document.querySelector('#log .failed [role=alert]')")
        said.fails_after = None
        page.ask("next")
        assert "broken" not in said.prompts[-1]
    page.write("anybody")
    page.wait("document.querySelector('#log .failed [role=alert]')?.innerText.includes('cannot be reached')")


def test_a_key_is_asked_for_where_the_server_wants_one(browser: Browser, said: SaidBackend) -> None:
    with serving(said, api_keys=("right key",)) as url:
        page = Page(browser, url)
        page.wait("!document.getElementById('key').hidden")

        def give(key: str) -> None:
            page.look(f"document.getElementById('key-text').value = {json.dumps(key)}")
            page.click("#key button")

        give("wrong")
        page.wait("!document.getElementById('key-error').hidden")
        give("right key")
        page.wait("document.getElementById('key').hidden")
        assert page.ask("hello") == "heard hello"
        kept = page.look("[localStorage.length, document.cookie, Object.keys(sessionStorage).join()]")
        assert kept == [0, "", "qnext-api-key"]
        page.look("sessionStorage.clear()")


WIDER = """[...document.querySelectorAll("body *")].filter((one) => one.tagName !== "PRE" &&
  one.scrollWidth > one.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(one).overflowX))"""


def test_it_is_readable_at_any_width_and_scheme(browser: Browser, said: SaidBackend) -> None:
    with serving(said) as url:
        page = Page(browser, url)
        page.wait("!document.getElementById('tools-field').hidden")
        page.fill("tools", json.dumps(TOOLS))
        page.ask("think")
        page.ask("hostile " + "x" * 300)
        page.ask("call")
        said.refusals = [Refused("context_full", "too long", {"context": 4096})]
        page.write("longer")
        page.wait("document.querySelector('#log .failed [role=alert]')")
        page.look("document.getElementById('key').hidden = false")
        for width, scheme in itertools.product((360, 1200), ("light", "dark")):
            page.resize(width, scheme)
            page.look("document.querySelectorAll('details').forEach((one) => (one.open = true))")
            assert page.look("document.documentElement.scrollWidth") <= width
            assert page.look(f"{WIDER}.map((one) => one.id || one.className)") == []
            page.look("document.getElementById('send').scrollIntoView()")
            assert page.look("document.getElementById('send').getBoundingClientRect().bottom") <= HEIGHT
            assert page.look("document.getElementById('log').clientHeight") >= 100
            found = page.look(contrasts("body *"))
            assert len(found) > 40 and found[0][0] >= 4.5, (width, scheme, found[:3])


def test_files_come_with_a_policy_and_are_sent_once() -> None:
    async def ask() -> None:
        import httpx2

        app = make_app(SaidBackend(), ServeSettings(api_keys=("key",)))
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1"
        ) as http:
            page = await http.get("/")
            assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
            policy = page.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy
            for name in ("page.css", "page.js", "answer.js", "icon.svg"):
                file = await http.get(f"/page/{name}")
                assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
                again = await http.get(f"/page/{name}", headers={"If-None-Match": file.headers["etag"]})
                assert again.status_code == 304 and not again.content
            assert (await http.head("/")).status_code == 200
            assert (await http.get("/page/page.py")).status_code == 404
            assert "/" not in (await http.get("/openapi.json", headers={"x-api-key": "key"})).json()["paths"]

    asyncio.run(ask())
