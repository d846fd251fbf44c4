"""Watching on the page: one task after the other, its speed, its seed and its table of tokens."""

from __future__ import annotations

import json

import pytest
from page import GREETED, STEP, text_of, view

TABLE = "[...document.querySelectorAll('#tokens td:first-child')].map(e => e.textContent).join(' ')"
BEGUN_ANEW = """
new Promise((told) => {
  const repaint = window.requestAnimationFrame.bind(window);
  let pending = 0;
  window.requestAnimationFrame = (draw) => {
    pending += 1;
    repaint(() => { pending -= 1; draw(); });
  };
  const title = () => document.querySelector("#detail-title").textContent;
  const seen = new MutationObserver(() => {
    // a step whose picture is not painted and whose table is not drawn yet
    const step = document.querySelector("#fact-step").textContent;
    if (!pending || title().endsWith(` ${step}`)) return;
    seen.disconnect();
    window.fetch = () => new Promise(() => {});
    document.querySelector("#begin").click();
    setTimeout(() => told({
      title: title(),
      rows: document.querySelectorAll("#tokens tr").length,
      lines: document.querySelectorAll("#stream li").length,
      hidden: document.querySelector("#frame").hidden,
      ask: document.querySelector("#ask").disabled,
    }), 600);
  });
  seen.observe(document.querySelector("#fact-step"), {childList: true});
})
"""


@pytest.fixture
def tab(make_tab, address):
    tab = make_tab(address)
    tab.wait_for(GREETED)
    view(tab, "watch")
    yield tab
    tab.run("document.querySelector('#stop').click()")


def bodies(tab):
    """Return what was asked of the server about what is watched."""
    return [json.loads(r["postData"]) for r in tab.requests if "/v1/watch" in r["url"]]


def test_a_new_task_begins_without_the_tokens_and_the_picture_of_the_old_one(tab):
    tab.click("#begin")
    tab.wait_for(f"{STEP} >= 1")
    empty = {"title": "Every token of a step", "rows": 0, "lines": 0, "hidden": True, "ask": True}
    assert tab.run(BEGUN_ANEW) == empty


def test_the_table_is_of_the_step_in_its_title_when_it_is_opened(tab):
    tab.click("#begin")
    tab.wait_for(f"{STEP} >= 1")
    tab.click("#pause")
    tab.wait_for("document.querySelector('#pause').getAttribute('aria-label') === 'Go on'")
    tab.run("document.querySelector('#seed').value = 5")
    tab.click("#restart")
    tab.wait_for("document.querySelector('#fact-seed').textContent === '5'")
    tab.click("#step")
    tab.wait_for("document.querySelector('#detail-title').textContent.endsWith('step 1')")
    before = tab.run(TABLE)
    tab.click("#detail-title")
    tab.wait_for("!document.querySelector('#detail').open")
    tab.click("#step")
    tab.wait_for("document.querySelector('#detail-title').textContent.endsWith('step 2')")
    tab.click("#detail-title")
    tab.wait_for("document.querySelector('#detail').open")
    tab.wait_for(f"({TABLE}) !== '{before}'")
    opened = tab.run(TABLE)
    tab.click("#stream li:first-child button")
    assert text_of(tab, "#detail-title") == "Every token of step 2"
    assert tab.run(TABLE) == opened


def test_the_speed_that_was_chosen_is_kept_until_another_task_is(tab):
    choose = (
        "((id, value) => { const e = document.getElementById(id); e.value = value; "
        "e.dispatchEvent(new Event('change')) })"
    )
    own = tab.run("document.querySelector('#rate').value")
    tab.run(f"{choose}('rate', '1')")
    tab.click("#begin")
    tab.wait_for("document.querySelector('#fact-seed').textContent.match(/[0-9]/)")
    tab.click("#begin")
    tab.wait_for("document.querySelector('#fact-seed').textContent.match(/[0-9]/)")
    assert own != "1"
    assert [body["rate"] for body in bodies(tab)][-2:] == [1, 1]
    # a task that is chosen while another is played has its own speed
    other = "[...document.querySelector('#task').options].findLast(o => !o.disabled).value"
    assert tab.run(f"{other} !== document.querySelector('#task').value")
    tab.run(f"{choose}('task', {other})")
    tab.click("#begin")
    tab.wait_for("document.querySelector('#fact-seed').textContent.match(/[0-9]/)")
    assert bodies(tab)[-1]["rate"] != 1


@pytest.mark.parametrize("wrong", ["-5", "1.5", ""])
def test_a_seed_that_is_none_restarts_nothing(tab, wrong):
    tab.click("#begin")
    tab.wait_for(f"{STEP} >= 1")
    count = len(bodies(tab))
    tab.run(f"document.querySelector('#seed').value = '{wrong}'")
    tab.click("#restart")
    assert tab.run("document.activeElement.id") == "seed"  # beside which the browser says it
    tab.click("#begin")
    assert len(bodies(tab)) == count
    tab.run("document.querySelector('#seed').value = '7'")
    tab.click("#restart")
    tab.wait_for("document.querySelector('#fact-seed').textContent === '7'")


def test_everything_is_reached_on_the_smallest_phone(make_tab, address):
    tab = make_tab(address, 320, 568, phone=True)
    tab.wait_for(GREETED)
    assert not tab.too_wide()
    for name in ("caption", "watch"):
        view(tab, name)
        assert not tab.too_wide()
