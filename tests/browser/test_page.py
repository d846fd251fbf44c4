"""What a person does with the page: talk, show pictures, watch, with hands or keys, on any screen.

Every test ends with no complaint in the console and no request to anywhere else (see `conftest`).
"""

from __future__ import annotations

import itertools
import time

import pytest
from page import ANSWERED, STEP, focus, forget, view

TOKEN = "a token of many words"
SCREENS = {
    "desktop-light": (1280, 800, False, False),
    "desktop-dark": (1280, 800, True, False),
    "phone-light": (360, 740, False, True),
    "phone-dark": (390, 844, True, True),
}
WRITTEN = "document.querySelector('#tokens tr.of-written td:last-child')?.innerText === 'yes'"
FRAME = "document.querySelector('#frame').src.slice(-4000)"


@pytest.fixture(params=SCREENS)
def screen(request):
    return request.param


@pytest.fixture
def tab(make_tab, address, screen):
    width, height, dark, phone = SCREENS[screen]
    return make_tab(address, width, height, dark=dark, phone=phone)


def test_chat_with_words_and_a_dropped_picture(tab, screen, picture, shoot):
    tab.wait_for("document.querySelector('#task').options.length")  # it has greeted the server
    shoot(tab, f"{screen}-welcome")
    tab.click("#words")
    tab.type("what is the goal of boxing?")
    tab.press("Enter")
    tab.wait_for(f"{ANSWERED} === 1")
    tab.drop_file("#words", picture)
    tab.wait_for("document.querySelectorAll('#attached img').length === 1")
    tab.click("#words")
    tab.type("what digit is this?")
    assert not tab.too_wide()
    tab.click("#send")
    tab.wait_for(f"{ANSWERED} === 2")
    assert tab.run("document.querySelectorAll('.turn.user img').length") == 1
    sent = tab.run("document.querySelector('.turn.user img').naturalWidth")
    assert sent == 32
    shoot(tab, f"{screen}-chat")
    assert not tab.too_wide()
    tab.click("#reset")
    assert tab.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_picture_is_captioned_where_it_is_dropped_or_pasted(make_tab, address, picture, how):
    tab = make_tab(address, 360, 740, phone=True)
    view(tab, "caption")
    tab.drop_file("#drop-zone", picture, how)
    said = tab.wait_for("document.querySelector('#captions footer button') && "
                        "document.querySelector('#captions p').textContent")  # fmt: skip
    assert said
    assert not tab.too_wide()
    tab.click("#captions footer button:last-child")
    tab.wait_for("document.querySelectorAll('#attached img').length === 1")
    assert tab.run("location.hash") == "#chat"


def tasks_of(agent):
    """Return a task of every suite of the checkpoint: of BabyAI one whose goal is near."""
    chosen = {}
    for task in sorted(agent.tasks, key=lambda t: "GoToLocal" not in t):
        chosen.setdefault(task.split("/")[0], task)
    return chosen


COUNTING = """
window.counting?.disconnect();
window.seen = [];
window.counting = new MutationObserver(() => seen.push(performance.now()));
counting.observe(document.querySelector("#frame"), {attributeFilter: ["src"]});
"""


def test_watching_ten_seconds_of_every_suite(tab, screen, agent, shoot, record_property):
    view(tab, "watch")
    for suite, task in tasks_of(agent).items():
        tab.wait_for(
            f"[...document.querySelector('#task').options].some(o => o.value === '{task}')"
        )
        tab.run(f"document.querySelector('#task').value = '{task}'")
        tab.run("document.querySelector('#task').dispatchEvent(new Event('change'))")
        tab.click("#begin")
        tab.wait_for(f"{STEP} >= 1")
        tab.run(COUNTING)
        time.sleep(10)
        seen = tab.run("seen")
        frames = len(seen) / 10
        gaps = sorted(b - a for a, b in itertools.pairwise(seen))
        record_property(f"{screen} {task}", f"{frames:.1f} frames/s")
        usual = f"half of them within {gaps[len(gaps) // 2]:.0f} ms"
        print(f"{screen} {task}: {frames:.1f} frames/s, {usual}")
        assert len(seen) > 10
        shoot(tab, f"{screen}-{suite}")
        assert not tab.too_wide()
        assert tab.run("document.querySelectorAll('#stream li').length") > 2
        tab.wait_for(WRITTEN)
        assert tab.run("document.querySelector('#scores').innerText").startswith("random")
        tab.click("#stop")
        tab.wait_for("document.querySelector('#stop').disabled")
        time.sleep(1.0)  # its process ends


def test_it_pauses_steps_restarts_and_shows_the_step_that_is_chosen(make_tab, address):
    tab = make_tab(address)
    view(tab, "watch")
    tab.wait_for("document.querySelector('#task').options.length")
    tab.click("#begin")
    tab.wait_for(f"{STEP} >= 1")
    tab.click("#pause")
    time.sleep(0.5)
    step, frame = tab.run(STEP), tab.run(FRAME)
    time.sleep(1.0)
    assert (tab.run(STEP), tab.run(FRAME)) == (step, frame)
    assert tab.run("document.querySelector('#pause').getAttribute('aria-label')") == "Go on"
    tab.run("document.querySelector('#seed').value = 12345")
    tab.click("#restart")
    tab.wait_for("document.querySelector('#fact-seed').textContent === '12345'")
    tab.click("#step")
    tab.wait_for(f"{STEP} === 1")
    tab.click("#step")
    tab.wait_for(f"{STEP} === 2")
    tab.click("#stream li:nth-child(2) button")
    assert tab.run("document.querySelector('#detail-title').textContent") == "Every token of step 1"
    tab.click("#ask")
    tab.wait_for("document.querySelectorAll('#attached img').length === 1")
    view(tab, "watch")
    tab.click("#stop")


def test_everything_is_reached_by_keys_alone(make_tab, address):
    tab = make_tab(address)
    tab.wait_for("document.querySelector('#task').options.length")
    tab.run("document.activeElement.blur()")
    order = []
    for _ in range(30):
        tab.press("Tab")
        order.append(tab.run("document.activeElement.id || document.activeElement.textContent"))
        if order[-1] == "send":
            break
        # what has the focus shows it
        assert tab.run(
            "(e => getComputedStyle(e).outlineStyle !== 'none' || e.tagName === 'TEXTAREA' || "
            "e.type === 'file')(document.activeElement)"
        ), order
    wanted = ["skip", "to-chat", "to-caption", "to-watch", "theme", "open-settings"]
    assert order[: len(wanted)] == wanted
    assert {"attach", "words", "reset", "send", "hello"} <= set(order)
    focus(tab, "open-settings")
    tab.press("Enter")
    tab.wait_for("document.querySelector('#settings').open")
    tab.press("Escape")
    tab.wait_for("!document.querySelector('#settings').open")
    assert tab.run("document.activeElement.id") == "open-settings"
    focus(tab, "theme")
    colours = []
    for _ in range(3):
        tab.press("Enter")
        colours.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    focus(tab, "to-watch")
    tab.press("Enter")
    tab.wait_for("!document.querySelector('#watch').hidden")
    focus(tab, "begin")
    tab.press("Enter")
    tab.wait_for(f"{STEP} >= 1")
    focus(tab, "pause")
    tab.press(" ")
    tab.wait_for("document.querySelector('#pause').getAttribute('aria-label') === 'Go on'")
    tab.press("Escape")
    tab.wait_for("document.querySelector('#stop').disabled")


SLOWER = """
window.kept = {slow: false, real: window.fetch.bind(window)};
window.fetch = async (...asked) => {
  if (kept.slow) await new Promise((resolve) => setTimeout(resolve, 400));
  return kept.real(...asked);
}
"""
REFUSING = """
window.fetch = async () => new Response(
  JSON.stringify({error: {message: "<b>too many</b> wait"}}), {status: 429})
"""


def test_an_answer_is_stopped_and_a_refusal_is_shown(make_tab, address):
    tab = make_tab(address)
    tab.run(SLOWER)
    focus(tab, "words")
    tab.run("kept.slow = true")
    tab.type("hello")
    tab.press("Enter")
    tab.wait_for("document.querySelector('#send').getAttribute('aria-label') === 'Stop'")
    tab.press("Escape")
    tab.wait_for("document.querySelector('#send').getAttribute('aria-label') === 'Send'")
    tab.run(REFUSING)
    tab.type("again")
    tab.press("Enter")
    said = tab.wait_for("document.querySelector('[role=alert]')?.textContent")
    assert said == "<b>too many</b> wait"
    assert tab.run("document.querySelectorAll('#turns b').length") == 0
    assert "Try again" in tab.run("document.querySelector('#turns').innerText")
    tab.run("window.fetch = kept.real")
    tab.type("once more")
    tab.press("Enter")
    tab.wait_for("document.querySelectorAll('.turn.assistant:not(.writing) footer').length === 3")
    assert "Try again" not in tab.run("document.querySelector('#turns').innerText")
    assert tab.run("document.querySelectorAll('.turn [role=alert]').length") == 1


def test_escape_leaves_the_settings_as_they_were(make_tab, address):
    tab = make_tab(address)
    focus(tab, "words")
    most = "document.querySelector('#max-tokens').value"
    for how, wanted in (("Escape", "128"), ("#close-settings", "77")):
        tab.click("#open-settings")
        tab.wait_for("document.querySelector('#settings').open")
        assert tab.run(most) == "128"
        tab.run(f"{most} = '77'")
        tab.press(how) if how == "Escape" else tab.click(how)
        tab.wait_for("!document.querySelector('#settings').open")
        tab.click("#open-settings")
        tab.wait_for("document.querySelector('#settings').open")
        assert tab.run(most) == wanted
        tab.click("#close-settings")
        tab.wait_for("!document.querySelector('#settings').open")


def test_what_people_and_models_write_stays_text(make_tab, address):
    tab = make_tab(address)
    focus(tab, "words")
    tab.type("<img src=x onerror=alert(1)> <script>alert(2)</script>")
    tab.press("Enter")
    tab.wait_for(f"{ANSWERED} === 1")
    assert tab.run("document.querySelectorAll('#turns img, #turns script').length") == 0
    assert "<script>" in tab.run("document.querySelector('.turn.user p').textContent")


def test_a_token_is_asked_for_kept_for_the_tab_and_never_in_an_address(make_tab, server):
    address = server(TOKEN)
    tab = make_tab(address)
    tab.wait_for("document.querySelector('#settings').open")
    tab.run("document.querySelector('#token').focus()")
    tab.type("another token")
    tab.press("Enter")
    tab.wait_for("document.querySelector('#token-note').textContent.includes('another token')")
    tab.run("document.querySelector('#token').value = ''")
    focus(tab, "token")
    tab.type(TOKEN)
    tab.press("Enter")
    tab.wait_for("document.querySelector('#task').options.length")
    assert tab.run("sessionStorage.getItem('gato-token')") == TOKEN
    assert TOKEN not in tab.run("JSON.stringify(localStorage)")
    view(tab, "watch")
    tab.click("#begin")
    tab.wait_for(f"{STEP} >= 1")
    tab.click("#stop")
    assert tab.requests
    assert not [r for r in tab.requests if "token" in r["url"].split("/page/")[0]]
    forget(tab, 401)
