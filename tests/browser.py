"""Chromium without a window, for what a page looks like at a width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# The page runs no script of its own (its Content-Security-Policy), so one outside looks into the frame.
OUTER = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<iframe width="{width}" height="900" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(each => each.open = true);
  const wide = [...page.querySelectorAll("body *")].filter(each => each.getBoundingClientRect().right > {width} + 0.5 && !each.closest("svg"));
  const scrolls = [...page.querySelectorAll("body *")].filter(each => each.scrollWidth > each.clientWidth + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(each).overflowX));
  document.querySelector("#found").textContent = JSON.stringify({{
    scroll_width: page.documentElement.scrollWidth, client_width: page.documentElement.clientWidth,
    wide: wide.map(each => each.outerHTML.slice(0, 120)), scrolls: scrolls.map(each => each.outerHTML.slice(0, 120)),
    verdict_bottom: page.querySelector("h1 .pill").getBoundingClientRect().bottom,
    headings: [...page.querySelectorAll("h2")].map(each => each.textContent.trim().replace(/\\s+/g, " ")),
  }});
}}
</script>
"""


def look(page: str, width: int, folder: Path) -> dict:
    """What is where on the page in a window of this width, all that is folded opened."""
    outer = folder / f"outer-{width}.html"
    outer.write_text(OUTER.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 50},1000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
