"""The page at `/`, as a person meets it in Chromium, and the endpoints that it needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goc_deploy
from tests.conftest import MNIST, Command
from tests.goc_deploy.serving.running import GENERATE, HEADERS, TOKEN, Running, pixels

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

EMOJI = MNIST.parent / "emoji"
SECONDS = 120_000  # milliseconds that a run may take on a busy machine
FAILED_REQUEST = "Failed to load resource: the server responded with a status of"


@pytest.fixture(scope="module")
def emoji_engine(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The shipped PixArt that draws emoji."""
    directory = tmp_path_factory.mktemp("emoji") / "emoji"
    model = ("--num-heads", 6, "--sampler", "dpm++", "--prediction", "x0", "--cfg-scale", 2)
    text = ("--text-encoder", EMOJI / "text_encoder", "--plan", "none", "--plan", "fora:2")
    command("goc-export", EMOJI / "pixart_emoji.safetensors", "-o", directory, *model, *text)
    return directory


@pytest.fixture(scope="module")
def server(
    demo_engine: Path, emoji_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(demo_engine, folder / "digits")
    goc_deploy.add_plan(folder / "digits", "fora:3+lagrange:2,level=residual")
    running = Running(folder / "digits", emoji_engine, "--backend", "onnxruntime")
    running.wait()
    yield running
    assert running.stop() == (0, "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="install playwright (`pip install playwright`)"
    )
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("install chromium (`apt-get install chromium`)")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class Person:
    """A tab of the browser, which remembers what its console shows."""

    def __init__(self, browser: Any, url: str) -> None:
        self.context = browser.new_context(viewport={"width": 1100, "height": 1000})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(url)
        self.page.get_by_label("Bearer token").fill(TOKEN)
        self.page.keyboard.press("Enter")
        self.page.get_by_text("Ready.").wait_for()
        (refused,) = self.errors  # the question whether a token is needed
        assert f"{FAILED_REQUEST} 401" in refused
        self.errors.clear()

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def choose(self, **values: str) -> None:
        for name, value in values.items():
            if name in ("model", "left", "right"):
                place = {"model": "#model", "left": "#plan-0", "right": "#plan-1"}[name]
                self.page.locator(place).select_option(value)
            else:
                self.page.locator(f"#{name}").fill(value)


@pytest.fixture
def person(server: Running, browser: Any) -> Iterator[Person]:
    visitor = Person(browser, server.url)
    yield visitor
    visitor.context.close()
    assert visitor.errors == []


WATCH = """() => {
  window.seen = [];
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      const side = [...document.querySelectorAll("#pair section")].findIndex((one) =>
        one.contains(target));
      const now = target.matches("rect.now") && target.getAttribute("visibility") === "visible";
      if (now) seen.push([side, "step", Number(target.getAttribute("x"))]);
      if (target.matches("img")) seen.push([side, "picture", target.alt]);
    }
  }).observe(document.querySelector("#pair"), { subtree: true, attributeFilter: ["x", "alt"] });
}"""


def test_previews_appear_and_the_step_moves_over_the_heat_map(person: Person) -> None:
    page = person.page
    person.choose(model="digits", seed="5", left="none", right="fora-2", **{"class": "3"})
    page.evaluate(WATCH)
    page.get_by_role("button", name="Draw both").click()
    page.locator("#comparison").wait_for()
    seen = page.evaluate("seen")
    for side, plan in enumerate(("none", "fora-2")):
        steps = [value for at, what, value in seen if (at, what) == (side, "step")]
        assert steps == sorted(steps)
        assert len(set(steps)) > 1
        pictures = [value for at, what, value in seen if (at, what) == (side, "picture")]
        assert pictures[0] == f"preview of {plan}"
        assert pictures[-1] == f"3, drawn with {plan}"
    assert [at for at, *_ in seen] == sorted(at for at, *_ in seen)  # the left one comes first


def test_a_person_compares_two_plans_of_a_class(person: Person, server: Running) -> None:
    page = person.page
    person.choose(model="digits", seed="5", left="none", right="fora-2", **{"class": "3"})
    page.locator("#class").press("Enter")
    page.locator("#comparison").wait_for()
    for place, plan in enumerate(("none", "fora-2")):
        panel = page.locator("#pair section").nth(place)
        assert panel.locator(".step").inner_text() == "20 of 20"
        assert re.fullmatch(r"[\d.]+ m?s", panel.locator(".time").inner_text())
        body = {"model": "digits", "prompt": "3", "seed": 5, "plan": plan}
        answer = server.client.post(GENERATE, json=body).json()["data"][0]["b64_json"]
        source = panel.get_by_role("img", name=f"3, drawn with {plan}").get_attribute("src")
        assert (pixels(source.partition(",")[2]) == pixels(answer)).all()
    assert re.fullmatch(r"[\d.]+ \u00d7", page.locator("#speed-up").inner_text())
    assert re.fullmatch(r"[\d.]+ %", page.locator("#difference").inner_text())
    assert page.get_by_role("img", name="Difference picture").is_visible()
    assert page.get_by_role("status").filter(has_text="Finished. Speed-up").is_visible()


def test_a_person_draws_what_a_prompt_names(person: Person) -> None:
    page = person.page
    person.choose(model="emoji", prompt="a cute fox", negative="a pizza", guidance="2", seed="7")
    assert not page.locator("#class").is_visible()
    page.get_by_role("button", name="Draw both").click()
    page.locator("#comparison").wait_for()
    with np.load(EMOJI / "pictures.npz") as known:
        names, pictures = list(known["names"]), known["images"].astype(np.float32)
    for plan in ("none", "fora-2"):
        drawn = page.get_by_role("img", name=f"a cute fox, drawn with {plan}")
        source = drawn.get_attribute("src")
        difference = pictures - pixels(source.partition(",")[2])
        assert names[int((difference**2).sum(axis=(1, 2, 3)).argmin())] == "fox"


def test_an_error_of_the_server_is_shown_in_words(person: Person) -> None:
    page = person.page
    person.choose(model="digits", **{"class": "a cat"})
    page.get_by_role("button", name="Draw both").click()
    page.get_by_role("alert").filter(has_text="must be a whole number").wait_for()
    assert page.locator("#class").get_attribute("aria-invalid") == "true"
    (refused,) = person.errors
    assert f"{FAILED_REQUEST} 400" in refused
    person.errors.clear()
    person.choose(seed="x", **{"class": "1"})
    page.get_by_role("button", name="Draw both").click()
    page.get_by_role("alert").filter(has_text='The seed must be a number, not "x".').wait_for()


def test_cancel_ends_the_request_on_the_server(person: Person, server: Running) -> None:
    def cancelled() -> int:
        return server.client.get("/metrics").text.count('outcome="cancelled"')

    assert not cancelled()
    page = person.page
    person.choose(model="digits", left="none", **{"class": "1"})
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "digits", "prompt": "1", "plan": "none", "n": 16}
        busy = pool.submit(server.client.post, GENERATE, json=body)  # the page waits for it
        page.get_by_role("button", name="Draw both").click()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled.").wait_for()
        assert busy.result().status_code == 200
    assert page.get_by_role("button", name="Draw both").is_enabled()
    assert not page.locator("#comparison").is_visible()
    assert not page.get_by_role("alert").is_visible()
    deadline = time.monotonic() + 60
    while not cancelled() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cancelled()


def test_the_page_allows_only_its_own_script_and_style(server: Running) -> None:
    answer = httpx.get(server.url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for element in ("script", "style"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)="(?!data:)|\son\w+=|\sstyle=""", answer.text)


def test_plans_are_described_for_a_choice(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/plans").status_code == 401
    digits, emoji = server.client.get("/v1/plans").json()["data"]
    assert (digits["id"], digits["takes"], digits["classes"], digits["side"]) == (
        *("digits", "class"),
        *(10, 28),
    )
    assert (emoji["takes"], emoji["classes"]) == ("prompt", 0)
    assert digits["default_plan"] == "fora-2"
    none, reuse, gradient, residual = digits["plans"]
    units = len(digits["units"])
    assert none["actions"] == ["C" * units] * 20
    assert reuse["actions"] == ["C" * units, "R" * units] * 10
    assert set("".join(gradient["actions"])) == {"C", "R", "P"}
    assert (reuse["computed_units"], reuse["all_units"]) == (10 * units, 20 * units)
    assert (reuse["level"], gradient["prediction"]) == ("unit", "gradient")
    assert (residual["level"], residual["prediction"]) == ("residual", "Lagrange")
    letters = ["C", "R", "R", "C", "P", "P", "C"]
    assert residual["actions"][:7] == [letter * units for letter in letters]


def test_a_stream_has_an_event_after_every_step(server: Running) -> None:
    body = {"model": "digits", "prompt": "3", "stream": True, "step_events": True, "seed": 5}
    answer = server.client.post(GENERATE, json={**body, "step_previews": 4, "plan": "fora:2"})
    events = [json.loads(part) for part in re.findall("^data: (.*)$", answer.text, re.MULTILINE)]
    assert [event["type"] for event in events] == [
        *["goc.step"] * 20,
        "image_generation.completed",
    ]
    steps = events[:-1]
    assert [(event["step"], event["steps"]) for event in steps] == [(i, 20) for i in range(20)]
    assert [event["kind"] for event in steps] == ["full", "collapsed"] * 10
    assert [event["step"] for event in steps if "b64_json" in event] == [3, 7, 11, 15]
    assert events[-1]["seconds"] > 0
    refused = server.client.post(GENERATE, json={**body, "step_previews": 51}, headers=HEADERS)
    assert refused.status_code == 400
