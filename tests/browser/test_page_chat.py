"""A conversation on the page where something goes another way than it should.

What is too long, a picture that is not read yet, more than the model remembers, a name not learnt.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from page import ANSWERED, GREETED, focus, forget, say, text_of, view
from PIL import Image

ALERT = "document.querySelector('.turn:last-child [role=alert]')?.textContent"
NOTICE = "document.querySelector('#dropped:not([hidden])')?.textContent"
ATTACHED = "document.querySelectorAll('#attached img').length"
SENT = "document.querySelectorAll('.turn.user img').length"
SLOW_PICTURES = """
window.kept = window.createImageBitmap.bind(window);
window.createImageBitmap = async (...given) => {
  await new Promise((resolve) => setTimeout(resolve, 400));
  return kept(...given);
}
"""


@pytest.fixture
def tab(make_tab, address):
    tab = make_tab(address)
    tab.wait_for(GREETED)
    return tab


@pytest.fixture
def make_picture(tmp_path):
    """Return what writes a picture of so many pixels."""

    def make(width, height, name="picture.png"):
        shade = np.arange(width * height * 3).reshape(height, width, 3) % 256
        Image.fromarray(shade.astype(np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def no_picture(tmp_path):
    path = tmp_path / "words.pdf"
    path.write_bytes(b"%PDF")
    return path


def asked(tab):
    """Return the messages of the newest request for an answer."""
    bodies = [r["postData"] for r in tab.requests if r["url"].endswith("/chat/completions")]
    return json.loads(bodies[-1])["messages"]


def test_a_message_that_was_refused_does_not_stay_in_the_conversation(tab):
    say(tab, "red " * 3000)
    assert "Use fewer words" in tab.wait_for(ALERT)
    tab.click("button.again")
    tab.wait_for(f"!{ALERT}")
    assert "Use fewer words" in tab.wait_for(ALERT)
    assert len(asked(tab)) == 1
    say(tab, "hello")
    tab.wait_for(f"{ANSWERED} === 1")
    assert asked(tab) == [{"role": "user", "content": "hello"}]
    first, second = tab.run("[...document.querySelectorAll('.turn.user')].map(e => e.innerText)")
    assert "not part of the conversation" in first
    assert second == "hello"
    forget(tab, 400)


def test_a_message_waits_for_a_picture_that_is_being_read(tab, make_picture):
    tab.run(SLOW_PICTURES)
    tab.choose_file("#attach", make_picture(32, 32))
    say(tab, "what is this?")
    tab.press("Enter")  # once more, for nothing is seen to happen
    tab.wait_for(f"{ANSWERED} === 1")
    assert tab.run(SENT) == 1
    assert tab.run(ATTACHED) == 0
    assert [part["type"] for part in asked(tab)[0]["content"]] == ["image_url", "text"]


def test_a_message_does_not_go_without_the_picture_that_cannot_be_read(tab, no_picture):
    tab.run(SLOW_PICTURES)
    tab.choose_file("#attach", no_picture)
    say(tab, "what is this?")
    tab.wait_for(f"{NOTICE}?.includes('words.pdf is no picture')")
    assert tab.run("document.querySelectorAll('.turn').length") == 0
    assert tab.run("document.querySelector('#words').value") == "what is this?"


def test_a_picture_that_is_being_read_does_not_come_into_the_next_conversation(tab, make_picture):
    tab.run(SLOW_PICTURES)
    tab.choose_file("#attach", make_picture(32, 32))
    say(tab, "what is this?")
    tab.click("#reset")
    tab.run("new Promise((resolve) => setTimeout(resolve, 600))")
    assert tab.run(ATTACHED) == 0
    assert tab.run("document.querySelectorAll('.turn').length") == 0


def test_a_photo_is_sent_no_larger_than_the_model_can_use(tab, make_picture):
    tab.choose_file("#attach", make_picture(1200, 600))
    tab.wait_for(ATTACHED)
    say(tab, "")
    tab.wait_for(f"{ANSWERED} === 1")
    size = "(e => [e.naturalWidth, e.naturalHeight])(document.querySelector('.turn.user img'))"
    assert tab.run(size) == [256, 128]


def test_turns_that_were_left_out_are_told_and_not_sent_again(tab):
    for count in range(1, 40):
        say(tab, "red green blue ball box door " * 5)
        tab.wait_for(f"{ANSWERED} === {count}")
        if tab.run(NOTICE):
            break
    left_out = len(asked(tab)) // 2  # of these some, at most all but the last
    say(tab, "red")
    tab.wait_for(f"{ANSWERED} === {count + 1}")
    assert len(asked(tab)) < 2 * count + 1
    told = text_of(tab, "#dropped")
    gone = (2 * count + 1 - len(asked(tab))) // 2
    assert 1 <= gone <= left_out
    assert "left out" in told
    number = 1 if told.startswith("The oldest turn was") else int(told.split()[1])
    assert number >= gone
    assert tab.run("document.querySelectorAll('.turn.user').length") == count + 1
    tab.click("#reset")
    assert not tab.run(NOTICE)
    say(tab, "red")
    tab.wait_for(f"{ANSWERED} === 1")
    assert len(asked(tab)) == 1
    assert not tab.run(NOTICE)


def test_turns_with_more_pictures_than_a_request_may_hold_are_left_out(tab, address, make_picture):
    tab.run("localStorage.setItem('gato-settings', JSON.stringify({maxTokens: 1}))")
    tab.go(address)
    tiny = [make_picture(16, 16, f"{i}.png") for i in range(33)]
    # one that is refused for itself leaves the conversation as it was
    for some, sent in ((20, [20]), (33, [33]), (12, [20, 12]), (1, [12, 1])):
        tab.choose_file("#attach", *tiny[:some])
        tab.wait_for(f"{ATTACHED} === {some}")
        say(tab, "red")
        tab.wait_for("!document.querySelector('.turn.writing')")
        refused = "at most 32 images" in (tab.run(ALERT) or "")
        assert refused == (some == 33)
        assert bool(tab.run(NOTICE)) == (some == 1)
        assert [len(m["content"]) - 1 for m in asked(tab) if m["role"] == "user"] == sent
    assert "The oldest turn was left out" in text_of(tab, "#dropped")
    assert tab.run(SENT) == 66
    forget(tab, 400)


@pytest.fixture
def ungreeted(make_tab, server):
    """Return a tab of a server whose token was not given when it asked."""
    tab = make_tab(server("a token"))
    tab.wait_for("document.querySelector('#settings').open")
    tab.press("Escape")
    tab.wait_for("document.querySelector('#model').textContent")
    yield tab
    forget(tab, 401)


def test_the_model_is_asked_by_its_name_though_the_greeting_failed(ungreeted):
    tab = ungreeted
    say(tab, "hello")
    tab.wait_for("document.querySelector('#settings').open")
    focus(tab, "token")
    tab.type("a token")
    tab.press("Enter")
    tab.wait_for(f"{ANSWERED} === 1")
    assert not tab.run(ALERT)
    tab.wait_for(GREETED)  # and the rest of the greeting has been made up for
    assert text_of(tab, "#model") == tab.run("fetch('v1/models', {headers: {Authorization: "
        "'Bearer a token'}}).then((r) => r.json()).then((d) => d.data[0].id)")  # fmt: skip


def test_an_answer_is_stopped_while_the_name_is_not_known(ungreeted):
    tab = ungreeted
    tab.run("window.fetch = () => new Promise(() => {})")
    say(tab, "hello")
    tab.wait_for("document.querySelector('#send').getAttribute('aria-label') === 'Stop'")
    tab.press("Escape")
    tab.wait_for("document.querySelector('#send').getAttribute('aria-label') === 'Send'")


def test_text_is_dragged_into_the_message(tab):
    tab.drag_text("#words", "dragged words")
    tab.wait_for("document.querySelector('#words').value === 'dragged words'")
    # elsewhere a link that is dropped would lead away from the conversation
    dropped = (
        "(where => document.querySelector(where).dispatchEvent(new DragEvent('drop', "
        "{bubbles: true, cancelable: true, dataTransfer: new DataTransfer()})))"
    )
    assert tab.run(f"{dropped}('#words')")
    assert not tab.run(f"{dropped}('#conversation')")


def test_a_dropped_file_that_is_no_picture_is_told(tab, no_picture):
    tab.drop_file("#words", no_picture)
    assert "words.pdf is no picture" in tab.wait_for(NOTICE)
    view(tab, "caption")
    tab.drop_file("#drop-zone", no_picture)
    said = tab.wait_for("document.querySelector('#captions [role=alert]')?.textContent")
    assert "words.pdf is no picture" in said


def test_the_settings_as_at_first_are_not_kept_on_escape(tab):
    most = "document.querySelector('#max-tokens').value"

    def with_settings(*clicks, close, put=None):
        tab.click("#open-settings")
        tab.wait_for("document.querySelector('#settings').open")
        before = tab.run(most)
        if put:
            tab.run(f"{most} = '{put}'")
        for selector in clicks:
            tab.click(selector)
        tab.press(close) if close == "Escape" else tab.click(close)
        tab.wait_for("!document.querySelector('#settings').open")
        return before

    assert with_settings(close="#close-settings", put="77") == "128"
    assert with_settings("#defaults", close="Escape") == "77"
    assert with_settings("#defaults", close="#close-settings") == "77"
    assert with_settings(close="Escape") == "128"
