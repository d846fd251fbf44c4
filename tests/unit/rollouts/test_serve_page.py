"""The web page: what is served of it, what it may do, and that its files keep to that."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from gato.envs.readers.reader import LONGEST
from gato.rollouts import serve_page
from gato.rollouts.serve_guard import OPEN, OPEN_BELOW
from gato.rollouts.serve_limits import Settings

FOLDER = Path(__file__).parents[3] / "rollouts" / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
TEXTS = {name: (FOLDER / name).read_text() for name in FILES}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=[Mount("/", serve_page.router())]))


class Page(HTMLParser):
    """Every element of the page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(TEXTS[serve_page.INDEX])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag


ELEMENTS = Page().elements
IDS = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_with_its_type_and_the_policy(client, name):
    path = "/" if name == serve_page.INDEX else f"/page/{name}"
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.text == TEXTS[name]
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    wanted = kinds.get(name.rpartition(".")[2], "image/svg+xml")
    assert answer.headers["content-type"].split(";")[0] == wanted
    assert answer.headers["x-content-type-options"] == "nosniff"
    rules = dict(r.split(" ", 1) for r in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["img-src"] == "'self' data: blob:"
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/page/", "/page/index.html", "/page/../watch.py", "/page/%2e%2e/agent.py", "/page/x"]
)
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


def test_the_page_needs_no_token_and_its_addresses_are_those_that_are_open():
    assert {"/", "/favicon.ico"} <= set(OPEN)
    assert OPEN_BELOW == f"/{serve_page.FOLDER}/"


def test_every_id_is_there_once_and_every_one_that_a_script_asks_for_exists():
    assert len(IDS) == len(set(IDS))
    asked = {
        found for name in SCRIPTS for found in re.findall(r"byId\(\"([^\"]+)\"\)", TEXTS[name])
    }
    assert len(asked) > 40
    assert asked <= set(IDS), asked - set(IDS)
    # those that are made up of parts
    views = re.search(r"const VIEWS = \[(.*?)\]", TEXTS["app.js"])
    lists = [views, *(re.search(rf"const {n} = \[(.*?)\]", TEXTS["watch.js"]) for n in NAMES)]
    for found in lists:
        assert set(re.findall(r"\"([^\"]+)\"", found[1])) <= set(IDS)
    assert {f"to-{view}" for view in re.findall(r"\"([^\"]+)\"", views[1])} <= set(IDS)
    computed = [m for n in SCRIPTS for m in re.findall(r"byId\(([^\"].*?)\)", TEXTS[n])]
    assert set(computed) == {"id", "fact", "view", "`to-${view}`"}


NAMES = ("BUTTONS", "FACTS")


def test_every_drawing_that_is_used_is_defined():
    defined = {i.removeprefix("icon-") for i in IDS if i.startswith("icon-")}
    used = {n for text in TEXTS.values() for n in re.findall(r"#icon-([a-z]+)", text)}
    for name in SCRIPTS:
        used |= set(re.findall(r"(?:icon|roundButton)\(\"([a-z]+)\"", TEXTS[name]))
    assert used == defined


def test_labels_and_names_refer_to_what_is_there():
    for tag, attributes in ELEMENTS:
        for reference in ("for", "aria-labelledby", "aria-controls"):
            assert set((attributes.get(reference) or "").split()) <= set(IDS), (tag, attributes)
        if tag == "button":
            assert attributes.get("type") in ("button", "submit"), attributes


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_loaded_from_elsewhere(name):
    allowed = "http://www.w3.org/2000/svg"
    text = TEXTS[name].replace(allowed, "")
    assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text)
    assert not re.findall(r"@import|url\(|@font-face|integrity=|crossorigin", text)
    for found in re.findall(r"(?:^import|} from|^export .* from) ?[^;]*?\"([^\"]+)\"", text, re.M):
        assert re.fullmatch(r"\./[a-z]+\.js", found)
        assert found[2:] in FILES


FORBIDDEN = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"),
    *(
        "DOMParser",
        "createContextualFragment",
        "setHTML",
        "srcdoc",
        "javascript:",
        "document.cookie",
    ),
    *("importScripts", "serviceWorker", "WebSocket", "sendBeacon", "EventSource", "XMLHttpRequest"),
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_markup_and_only_this_server_is_asked(name):
    assert not [word for word in FORBIDDEN if word in TEXTS[name]]
    asked = re.findall(r"(?:request|getJson)\(\s*[\"`]([^\"`]*)", TEXTS[name])
    assert all(path.startswith("v1/") for path in asked), asked
    if name != "api.js":
        assert "fetch(" not in TEXTS[name]


def test_the_token_is_kept_for_the_tab_and_sent_in_a_header_alone():
    api = TEXTS["api.js"]
    assert "sessionStorage.setItem(TOKEN" in api
    assert "headers.Authorization = `Bearer ${given}`" in api
    assert not re.search(r"[?&]token", "".join(TEXTS.values()))
    assert all("localStorage" not in TEXTS[n] for n in SCRIPTS if n != "settings.js")
    kept = re.search(r"const FIRST = \{(.*?)\}", TEXTS["settings.js"])
    assert "token" not in kept[1].lower().replace("maxtokens", "")


def test_pictures_are_sent_as_the_model_can_use_and_as_many_as_the_server_takes():
    side = int(re.search(r"const LARGEST = (\d+);", TEXTS["pictures.js"])[1])
    most = int(re.search(r"const MOST_PICTURES = (\d+);", TEXTS["chat.js"])[1])
    assert side == 2 * LONGEST
    assert most == Settings.images
    assert most * side * side <= Settings.image_pixels
    in_base64 = most * side * side * 3 * 4 // 3  # pixels that nothing is saved of
    assert in_base64 < Settings.body_bytes / 1.5


def test_no_style_and_no_script_stands_in_the_markup():
    for tag, attributes in ELEMENTS:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "style"
        assert tag != "script" or attributes == {"type": "module", "src": "page/app.js"}
