"""The pages in a browser: keys, widths, colours. The tests without one are in test_report.py and test_inspect.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_report import build_run

from browser import Browser, chromium
from rto.inspection.page import write_inspection
from rto.inspection.reading import Inspection, Shown
from rto.inspection.statistics import Rewarded
from rto.report.page import write_report
from rto.report.sheet import Titled, render_sheet

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")

STEP = "document.querySelector('.heat output').innerText"


def test_a_pair_is_stepped_through_by_keyboard_button_and_click(tmp_path: Path) -> None:
    """Both sides at once; the shorter one says that it has ended. Model text is text for the script, too."""
    sides = {
        "chosen": Rewarded(pieces=("<b>a</b>", " b", "c"), labels=("", "", ""), rewards=np.array([0.5, -0.25, 1.0])),
        "rejected": Rewarded(pieces=("x", ""), labels=("", "<eos>"), rewards=np.array([-0.004, 0.0])),
    }
    shown = [Shown(prompt="p", sides=sides)] * 2
    path = write_inspection(Inspection(source="s", data="d", pairs=None, credit=None, shown=shown), tmp_path / "out")
    with Browser(tmp_path / "chromium") as page:
        page.open(path.as_uri(), width=360, dark=True)
        assert page.js("document.documentElement.scrollWidth") <= 360
        page.js("document.querySelector('.heat').focus()")
        said = []
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"):
            page.press(key)
            said.append(page.js(STEP))
        first = "chosen, token 1 of 3: “<b>a</b>” +0.50\nrejected, token 1 of 2: “x” −0.00"
        last = "chosen, token 3 of 3: “c” +1.00\nrejected, ended after 2"
        assert said == [
            first,
            "chosen, token 2 of 3: “b” −0.25\nrejected, token 2 of 2: “<eos>” +0.00",
            first,
            last,
            last,
            first,
        ]
        assert page.js("document.querySelectorAll('.here').length") == 2
        page.js("document.querySelectorAll('.heat')[0].querySelector('button[data-step=\"1\"]').click()")
        assert page.js(STEP).startswith("chosen, token 2 of 3")
        page.js("document.querySelectorAll('.heat')[1].querySelectorAll('.tokens')[0].children[2].click()")
        assert page.js("document.querySelectorAll('.heat output')[1].innerText") == last
        assert page.js(STEP).startswith("chosen, token 2 of 3")  # each pair has its own place
        page.js("document.querySelector('.numbers input').click()")
        beside = "getComputedStyle(document.querySelector('.tokens span'), '::after').content"
        assert "+0.50" in page.js(f"document.querySelector('.tokens span').title + {beside}")
        assert page.complaints == []


def contrast(page: Browser, element: str) -> float:
    """WCAG's ratio of an element's text to the first opaque colour behind it."""
    script = """(() => {
      const colour = (text) => text.match(/[\\d.]+/g).map(Number);
      const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      let element = document.querySelector(ELEMENT);
      const ink = light(colour(getComputedStyle(element).color));
      const back = () => colour(getComputedStyle(element).backgroundColor);
      while (back()[3] === 0) element = element.parentElement;
      const [low, high] = [ink, light(back())].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    })()"""
    return page.js(script.replace("ELEMENT", json.dumps(element)))


def test_text_is_readable_in_light_and_dark(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    path = write_report(run)
    with Browser(tmp_path / "chromium") as page:
        paper = []
        for dark in (False, True):
            page.open(path.as_uri(), width=360, dark=dark)
            paper.append(page.js("getComputedStyle(document.body).backgroundColor"))
            for element in (
                "p",
                ".note",
                "td",
                "h2",
                ".prompt",
                ".tokens .p10",
                ".tokens .n10",
                ".tokens .p1",
                "code",
            ):
                assert contrast(page, element) > 4.5, element  # WCAG 2 AA
            assert page.js("document.documentElement.scrollWidth") <= 360
        assert paper[0] == "rgb(255, 255, 255)"
        assert paper[1] != paper[0]
        assert page.complaints == []


def test_a_wide_table_is_whole_on_paper(tmp_path: Path) -> None:
    """A page of paper cannot be scrolled: a table of a study with the longest cells that one had."""
    row = ["RTO (REINFORCE++)", *["−0.000 ± 0.000"] * 5, "0.00673", "1 min 16 s"]
    names = ["method", "gold", "win rate vs SFT (%)", "KL", "length", "gold − PPO", "p (Holm)", "time a seed"]
    (tmp_path / "page.html").write_text(
        render_sheet(title="x", kind="study", tables=[Titled(title="y", rows=[names, row])])
    )
    with Browser(tmp_path / "chromium") as page:
        page.open((tmp_path / "page.html").as_uri(), width=739)  # of US letter, between Chromium's margins
        page.ask("Emulation.setEmulatedMedia", media="print")
        assert page.js("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
        assert page.js("document.querySelector('table').scrollWidth <= document.body.clientWidth")
        assert page.js("document.documentElement.scrollWidth") <= 739
