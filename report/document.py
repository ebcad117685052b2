"""One HTML file that loads nothing: the head, style and content security policy of each report.

    text = document("Energy landscapes", "step_500", fill("page.html", parts))

What comes from data – names, log lines – passes `report.text.html` first; the policy lets no script
run but the one that is given, and nothing be loaded."""
import base64
import hashlib
import re
from pathlib import Path

from report.text import html


HERE = Path(__file__).parent


def document(heading, name, main, script="", data=""):
    """A page as text. name: text, of a folder; main: HTML; script: JavaScript, with data, its JSON,
    in the element `content`."""
    policy = scripts = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"; script-src 'sha256-{digest}'"
        scripts = (f'<script type="application/json" id="content">{data}</script>\n'
                   f"<script>{script}</script>\n")
    return fill("document.html", {
        "policy": policy, "name": html(name), "subject": heading.lower(), "heading": heading,
        "style": read("page.css"), "main": main, "scripts": scripts})


def fill(template, parts):
    """A file of this folder with parts {name: HTML} in place of {{name}}: in one pass, so that what
    is put in is not searched for places again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], read(template))


def read(name):
    """The text of a file of this folder."""
    return (HERE / name).read_text(encoding="utf-8")
