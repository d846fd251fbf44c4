"""What tests of the page look at, and what a person does on it again and again."""

from __future__ import annotations

from chromium import Tab

ANSWERED = "document.querySelectorAll('.turn.assistant:not(.writing) footer span').length"
STEP = "Number(document.querySelector('#fact-step').textContent)"
GREETED = "document.querySelector('#task').options.length"


def view(tab: Tab, name: str) -> None:
    """Go to a view by its link."""
    tab.click(f"#to-{name}")
    tab.wait_for(f"!document.querySelector('#{name}').hidden")


def focus(tab: Tab, id: str) -> None:
    """Give an element the focus."""
    tab.run(f"document.getElementById('{id}').focus()")


def say(tab: Tab, text: str) -> None:
    """Type a message and send it by the key."""
    focus(tab, "words")
    if text:
        tab.type(text)
    tab.press("Enter")


def text_of(tab: Tab, selector: str) -> str:
    """Return what an element says."""
    return tab.run(f"document.querySelector('{selector}').textContent")


def forget(tab: Tab, status: int) -> None:
    """Forget the console's lines about an answer that the server is meant to give."""
    tab.complaints[:] = [c for c in tab.complaints if f"status of {status}" not in c]
