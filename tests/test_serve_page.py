"""suture serve: a browser on its page."""

import re
import subprocess

import pytest
from browser import CHROMIUM
from serving import LETTERS, greedy, served, wait
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

OUTER = """<!doctype html><meta charset="utf-8">
<style>body { margin: 0 } iframe { border: 0; width: 900px; height: 640px; display: block }</style>
<iframe src="/"></iframe>
<script>
const wait = holds => new Promise(done => { const look = () => holds() ? done() : setTimeout(look, 20); look(); });
const find = id => document.querySelector("iframe").contentDocument.getElementById(id);
(async () => {
  await wait(() => find("model") && find("model").textContent === "small");
  find("tokens").value = "12";
  for (const said of ["<b>hello</b> there", "and once more"]) {
    find("said").value = said;
    find("send").click();
    await wait(() => !find("send").disabled);
  }
  const page = document.querySelector("iframe").contentDocument;
  await fetch("/found", {method: "POST", body: JSON.stringify({
    lines: [...page.querySelectorAll("#talk p")].map(line => [line.className, line.textContent]), told: find("told").textContent,
    bold: page.querySelectorAll("#talk b").length, wide: page.documentElement.scrollWidth > page.documentElement.clientWidth})});
})();
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.seconds
def test_the_page_in_a_browser(tmp_path):
    """Two turns; the page tells what it shows. What is said is no markup."""
    told = []

    async def found(request):
        told.append(await request.json())
        return Response()

    more = [Route("/outer", lambda request: HTMLResponse(OUTER)), Route("/found", found, methods=["POST"])]
    with served(more=more) as server:
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800", f"{server.url}/outer",
        ]  # fmt: skip
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait(lambda: told, 60)
        finally:
            browser.terminate()
            browser.wait()
    (page,) = told
    first = greedy("user: bhellob there\n", 12).partition(LETTERS[-1])[0]
    assert [kind for kind, _ in page["lines"]] == ["user", "assistant"] * 2
    assert [text for _, text in page["lines"][:3]] == ["<b>hello</b> there", first, "and once more"]
    assert re.match(
        r"\d+ tokens, \d+ a second, the first after \d+ ms; \d+ of the prompt's \d+ tokens were in the", page["told"]
    )
    assert page["bold"] == 0
    assert not page["wide"]
