"""Chromium, driven through a pipe: a tab is opened, looked at, clicked and typed into.

The browser's own protocol (DevTools) in JSON, each message ended by a zero byte; nothing else is
needed, so that any Chromium or Chrome of a machine will do.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
from mimetypes import guess_type
from pathlib import Path
from queue import Queue
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-extensions", "--remote-debugging-pipe"),
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
SECONDS = 30.0
ALL = "(selector => [...document.querySelectorAll(selector)])"


class Chromium:
    """A browser without a window, until it is closed."""

    def __init__(self, path: str, profile: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()

        def hand_over() -> None:  # in the browser's process, before it begins
            os.dup2(os.dup(theirs_in), 103)
            os.dup2(os.dup(theirs_out), 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        command = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=hand_over, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self._lock, self._count = threading.Lock(), 0
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers."""
        with self._lock:
            self._count += 1
            number = self._count
            answer = self._answers[number] = Queue()
            message = {"id": number, "method": method, "params": parameters}
            message |= {"sessionId": session} if session else {}
            os.write(self._out, json.dumps(message).encode() + b"\0")
        found = answer.get(timeout=SECONDS)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    def _listen(self) -> None:
        rest = b""
        while part := os.read(self._in, 1 << 20):
            *messages, rest = (rest + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._tabs:
                    self._tabs[message["sessionId"]].hear(message["method"], message["params"])

    def open(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> Tab:
        """Return a new tab of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        scale = 2 if phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        tab.call("Emulation.setDeviceMetricsOverride", **size)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[colours])
        return tab

    def close(self) -> None:
        """End it."""
        os.close(self._out)  # which it takes as a sign
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Tab:
    """One page, what it complained of and what it asked for."""

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session
        self.complaints: list[str] = []
        self.requests: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers about this tab."""
        return self._browser.call(method, self._session, **parameters)

    def hear(self, method: str, told: dict[str, Any]) -> None:
        """Take a message of the browser."""
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", details).get("description", "?"))
        elif method == "Runtime.consoleAPICalled" and told["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.complaints.append(str([a.get("value") for a in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            entry = told["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')[:200]}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"])

    def go(self, address: str) -> None:
        """Open an address and wait until its scripts have begun."""
        self.call("Page.navigate", url=address)
        self.wait_for("document.documentElement?.dataset.ready !== undefined")

    def run(self, expression: str) -> Any:
        """Return the value of JavaScript."""
        found = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = SECONDS) -> Any:
        """Return the value of JavaScript once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} was not true in {seconds:g} s")
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a hand does."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def _middle(self, selector: str) -> tuple[float, float]:
        x, y = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2] }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return x, y

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key of `KEYS`."""
        about = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"Enter": "\r", " ": " "}.get(key)
        down = about | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose_file(self, selector: str, *paths: Path) -> None:
        """Choose files as with the dialog of an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def drop_file(self, selector: str, path: Path, kind: str = "drop") -> None:
        """Drop a file onto an element, or paste it there."""
        about = f"'{path.name}', {{type: '{guess_type(path)[0]}'}}"
        content = base64.b64encode(path.read_bytes()).decode()
        event = {
            "drop": "new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: held})",
            "paste": (
                "new ClipboardEvent('paste', {bubbles: true, cancelable: true, "
                "clipboardData: held})"
            ),
        }[kind]
        self.run(
            f"(() => {{ const bytes = Uint8Array.from(atob('{content}'), c => c.charCodeAt(0)); "
            f"const held = new DataTransfer(); "
            f"held.items.add(new File([bytes], {about})); "
            f"document.querySelector({json.dumps(selector)}).dispatchEvent({event}) }})()"
        )

    def drag_text(self, selector: str, text: str) -> None:
        """Drag text from elsewhere onto the middle of an element, as a hand does."""
        x, y = self._middle(selector)
        data = {"items": [{"mimeType": "text/plain", "data": text}], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def too_wide(self) -> list[str]:
        """Return what reaches beyond the right edge and cannot be scrolled to by itself."""
        return self.run(
            f"{ALL}('body *').filter(e => e.checkVisibility() && !e.closest('.wide, dialog, "
            f".unseen, .skip, .symbols') && e.getBoundingClientRect().right > innerWidth + 1)"
            f".map(e => e.tagName + '#' + e.id + '.' + e.className)"
        )

    def picture(self, path: Path) -> None:
        """Write a screenshot."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)
