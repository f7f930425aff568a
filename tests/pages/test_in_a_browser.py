"""The pages in a real browser, where one is installed: no error on its console, and what clicks do."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from library.pages.page import data_url, render
from library.training.plan import Progress, make_plan
from library.training.results_page.page import Course, ResultsPage
from library.training.tracking import Ending

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1000,800",
)
NASTY = "<img src=x onerror=document.title='broken'> & </script>"
FACTS = {
    "about": [["seed", "1"]],
    "settings": {"given": [["--seed", 1, "command line"]], "defaults": [["--xformers", False]]},
    "use": [["Draw images with it", "python gen_img.py"]],
    "command": f"python train_network.py --x='{NASTY}'",
    "command_note": "note",
    "data": {
        "lines": ["2 images"],
        "groups": [{"title": "Left out (1)", "images": [{"name": NASTY, "why": "damaged", "src": None}], "more": 3}],
    },
}
# What a person does; the findings become the page's only text.
USE = """
<script>
{
const found = {}, at = which => document.querySelector(which), all = which => document.querySelectorAll(which);
found.sections = [...all("h2")].map(one => one.textContent);
found.images = all(".sheet img").length;
const curves = chart => [chart.querySelector("h3").textContent, chart.querySelectorAll("path").length];
found.curves = [...all(".chart")].map(curves);
all(".sheet td button")[0].click();
found.zoom = at("dialog").open;
found.words = at("dialog .one").textContent;
document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
found.next = at("dialog .one").textContent;
at("dialog").close();
at(".tools button").click();
all(".sheet td button")[0].click();
all(".sheet td button")[2].click();
found.compared = [at("dialog").open, at("dialog").classList.contains("comparing")];
found.compared.push([...all(".both p")].map(p => p.textContent));
at("dialog .at").value = 250;
at("dialog .at").dispatchEvent(new Event("input"));
found.edge = parseFloat(at(".edge").style.left) / at(".viewer .frame").clientWidth;
at("dialog").close();
const smoothing = at(".charts") && at(".charts").previousElementSibling.querySelector("input");
if (smoothing) {
  const before = at(".charts path:not(.faint)").getAttribute("d");
  smoothing.value = 0;
  smoothing.dispatchEvent(new Event("input"));
  found.smoothed = before !== at(".charts path:not(.faint)").getAttribute("d");
  at(".chart svg").dispatchEvent(new PointerEvent("pointermove", { clientX: 300, clientY: 300 }));
  found.pointed = at(".legend").textContent;
}
found.text = document.body.innerText;
found.title = document.title;
document.body.innerHTML = "<pre></pre>";
at("pre").textContent = "FOUND" + btoa(encodeURIComponent(JSON.stringify(found))) + "END";
}
</script>
"""


@pytest.fixture
def used(tmp_path) -> Callable[[Path], dict]:
    """What `USE` finds on a page. Whatever the browser says on its console fails the test."""

    def use(page: Path) -> dict:
        copy = page.with_name("used.html")
        text = page.read_text(encoding="utf-8")
        copy.write_text(text.replace("</body>", USE + "</body>"), encoding="utf-8")
        places = (f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri())
        done = subprocess.run([BROWSER, *FLAGS, *places], capture_output=True, text=True, timeout=240, check=False)
        assert "CONSOLE" not in done.stderr, done.stderr
        code = re.search(r"FOUND([\w+/=]+)END", done.stdout)
        assert code, done.stderr[-2000:]
        return json.loads(unquote(base64.b64decode(code[1]).decode("ascii")))

    return use


def test_the_page_of_a_run(used, tmp_path):
    plan = make_plan(10, 1, 1, steps=30, epochs=None, by_default=False)
    page = ResultsPage(tmp_path / "run.html", f"my {NASTY}", Course(plan, Progress(), False), lambda: FACTS)
    page.open()
    for step in range(1, 31):
        page.scalars(step, {"loss/current": math.sin(step) + 2, "lr/unet": 1e-4 / step, "time/step": 0.5})
        if step % 10 == 0:
            page.scalars(step, {"loss/validation": 1 / step, "loss/validation t 000-249": 2 / step})
            compared = {"base": 0.2, "difference": 1 / step - 0.2, "standard error": 0.01}
            page.scalars(step, {f"loss/validation/{name}": value for name, value in compared.items()})
            for number, words in enumerate((NASTY, "a dog")):
                image = Image.new("RGB", (96, 64), (8 * step, 80 * number, 0))
                page.image(step, f"sample/{number:02d}", image, words, tmp_path / "sample" / "a #1.png")
    (tmp_path / "run.safetensors").write_bytes(b"x" * 5_000_000)
    page.saved(30, tmp_path / "run.safetensors")
    page.ended(Ending("failed", f"no {NASTY}"))
    page.close(failed=True)
    found = used(tmp_path / "run.html")
    assert found["sections"] == [
        *("Samples", "Curves", "Saved files", "Use and repeat", "The run", "Data", "Settings"),
    ]
    assert found["images"] == 6
    assert found["curves"] == [
        *(["Loss", 2], ["Validation loss", 2], ["Validation loss by timesteps", 1]),
        ["Validation loss less that of the base", 2],  # its standard error is a band
        *(["Learning rates", 1], ["Seconds per step", 2]),
    ]
    assert found["zoom"] is True
    assert found["words"] == f"step 10, epoch 1\n{NASTY}"
    assert found["next"] == f"step 20, epoch 2\n{NASTY}"
    assert found["compared"] == [True, True, [f"step 10, epoch 1\n{NASTY}", f"step 30, epoch 3\n{NASTY}"]]
    assert 0.1 < found["edge"] < 0.45
    assert found["smoothed"] is True
    assert re.match(r"current: [\d.]+.*step \d+", found["pointed"])
    assert found["title"] == f"my {NASTY}"
    for text in (
        "failed",
        f"no {NASTY}",
        "30 of 30",
        "4.77 MiB",
        "no image",
        "and 3 more",
        "1 defaults",
        "-83.3 % ± 5.0",
    ):
        assert text in found["text"]


def test_the_page_of_a_grid(used, tmp_path):
    cells = [
        [
            {
                "src": data_url(Image.new("RGB", (64, 64), (80 * row, 80 * column, 0))),
                "name": "x",
                "facts": [f"{row} {column}", NASTY],
            }
            for column in range(2)
        ]
        for row in range(2)
    ]
    table = {
        "title": "steps: 6",
        "corner": "seed \\ scale",
        "rows": ["1", "2"],
        "columns": ["3", NASTY],
        "cells": cells,
    }
    page = tmp_path / "index.html"
    page.write_text(render("grid.html", "seed by scale", {"heading": "seed by scale", "about": "", "tables": [table]}))
    found = used(page)
    assert found["images"] == 4
    assert (found["words"], found["next"]) == (f"0 0\n{NASTY}", f"0 1\n{NASTY}")
    assert found["compared"] == [True, True, [f"0 0\n{NASTY}", f"1 0\n{NASTY}"]]
    assert "seed \\ scale" in found["text"]
