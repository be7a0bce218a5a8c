"""Parts shared by the HTML reports: escaping, embedded images, and the frame of a self-contained page.

Everything shown comes from files and models that nobody vouches for. Three lines of defence: every value goes through
`esc`; JSON for scripts goes through `script_json`; and the page's content security policy runs only the one script
whose hash it names, loads nothing from anywhere, and lets no form or base address out.
"""

import base64
import hashlib
import html
import io
import json
from importlib import resources
from typing import Any

from PIL import Image

# Characters that are invisible or reorder what is around them (C0 and C1 controls, zero-width and bidirectional
# marks): a report shows them as what they are, so that a completion cannot look like something else.
_ODD = {
    **{c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\t\n"},
    **{c: f"⟨U+{c:04X}⟩" for c in (*range(0x7F, 0xA0), 0x00AD, 0x061C, 0xFEFF)},
    **{c: f"⟨U+{c:04X}⟩" for c in (*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070))},
    **{c: "\ufffd" for c in range(0xD800, 0xE000)},  # lone surrogates cannot be written as UTF-8
}


def visible(value: Any) -> str:
    """`str(value)` with odd control characters as what they are, for a script that shows it as text; not HTML."""
    return str(value).translate(_ODD)


def esc(value: Any) -> str:
    """`str(value)` as HTML text or attribute value; odd control characters are made visible."""
    return html.escape(visible(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that may stand inside <script>: ASCII, with `<`, `>` and `&` as \\u escapes, so no tag can end in it.

    Raises ValueError on NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def image_uri(image: Image.Image, quality: int = 85) -> str:
    """The image as a JPEG data URI; lossless PNG at `quality` 100."""
    buffer = io.BytesIO()
    if quality >= 100:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def resource(name: str) -> str:
    """Text of a style sheet or script that lies beside this module."""
    return resources.files("tag.report").joinpath(name).read_text(encoding="utf-8")


def html_page(title: str, body: str, style: str, script: str) -> str:
    """A whole page. `title` is escaped here; `body`, `style` and `script` are ours and go in as they are.

    Raises ValueError when style or script holds a closing tag, which would end it early.
    """
    if "</style" in style.lower() or "</script" in script.lower():
        raise ValueError("a style sheet or script must not hold its own closing tag")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{esc(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
