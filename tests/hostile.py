"""Hostile text in every field, and a page as a browser would take it apart."""

import base64
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from typing import Any

# Breaks out of text, of an attribute in either quotes, of a script, a style and a comment; hides and reorders.
BREAKOUTS = (
    "<img src=x onerror='window.hacked=1'>",
    '"\' onmouseover=window.hacked=2 x="',
    "</script><script>window.hacked=3</script>",
    "</style></title></textarea></select><svg onload=window.hacked=4>",
    "--><iframe srcdoc='<script>parent.hacked=5</script>'></iframe>",
    "javascript:window.hacked=6",
    "\u202e\u2066\u200b\x00\x07&lt;b&gt;&#60;",
    "${window.hacked=7}{title}%s",
)
HOSTILE = "".join(BREAKOUTS)
HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\x00-\x08]")  # what must never stand in a page as it is


class Poison:
    """Puts `HOSTILE` with a mark of its own, `[[7]]`, in place of strings; `marks` says of which."""

    def __init__(self, keep: Collection[str] = ()) -> None:
        self.keep = set(keep)  # names of fields that the readers let through in a few spellings only
        self.marks: dict[str, str] = {}

    def text(self, where: str) -> str:
        """A hostile string, no two alike."""
        mark = f"[[{len(self.marks)}]]"
        self.marks[mark] = where
        return mark + HOSTILE

    def __call__(self, value: Any, where: str = "") -> Any:
        """A copy with every string in it replaced, in dataclasses, lists and as values of mappings."""
        if isinstance(value, str):
            return self.text(where)
        if is_dataclass(value):
            changes = {f.name: getattr(value, f.name) for f in fields(value) if f.init and f.name not in self.keep}
            return replace(value, **{name: self(part, f"{where}.{name}") for name, part in changes.items()})
        if isinstance(value, dict):
            return {k: v if k in self.keep else self(v, f"{where}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(part, f"{where}[]") for part in value)
        return value


class Page(HTMLParser):
    """Elements, attributes, text and data of a page; `problems` lists what hostile text would bring about."""

    TAGS = frozenset(
        "html head meta title style body script noscript div header main section article aside footer nav details "
        "summary h1 h2 h3 h4 p ul ol li dl dt dd table thead tbody tr th td form label input output select option "
        "button textarea fieldset legend progress template kbd b i em strong small sup sub mark span br hr img svg g "
        "rect text line path circle polyline figure figcaption code pre a".split()
    )

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.problems: list[str] = []
        self.text, self.scripts, self.data = "", [], ""
        self._inside: tuple[str, dict] | None = None
        self.policy = ""
        self.feed(source)
        self.close()
        if HIDDEN.search(source):
            self.problems.append("characters that hide or reorder what is around them")
        allowed = re.findall(r"'sha256-([^']+)'", self.policy)
        found = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in self.scripts]
        if len(found) != 1 or found != allowed:
            self.problems.append(f"{len(found)} scripts, the policy allows {len(allowed)}")
        for part in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
            if part not in self.policy:
                self.problems.append(f"no {part} in the policy")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.TAGS:
            self.problems.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or name in ("srcdoc", "formaction", "action", "ping"):
                self.problems.append(f"<{tag} {name}>")
            if name in ("src", "href", "xlink:href", "data") and not re.match(
                r"data:image/(png|jpeg);base64,|#", value or ""
            ):
                self.problems.append(f"<{tag} {name}={(value or '')[:40]}>")
            if name == "style" and re.search(r"url\(|expression|@import|</", value or ""):
                self.problems.append(f"<{tag} style={value[:40]}>")
            self.text += f" {value}" if name in ("title", "aria-label", "alt", "placeholder", "value") else ""
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self._inside = (tag, given) if tag in ("script", "style") else None
        if tag == "script" and given.get("type") != "application/json":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data
        elif self._inside[0] == "script" and self._inside[1].get("type") == "application/json":
            try:
                self.data += json.dumps(json.loads(data), ensure_ascii=False)
            except ValueError:
                self.problems.append("a block of data that is no JSON")
        elif self._inside[0] == "script":
            self.scripts[-1] += data

    def shows(self, mark: str) -> bool:
        """Whether the string of that mark is on the page, as text or as data for the script."""
        return mark in self.text or mark in self.data


def marks_shown(page: Page, poison: Poison) -> set[str]:
    """Fields whose text the page shows: without any, its test would prove nothing."""
    return {where for mark, where in poison.marks.items() if page.shows(mark)}
