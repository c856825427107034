"""The page and the command."""

import numpy as np
import pytest

from rto.theory import __main__ as command
from rto.theory.page import PALETTE, Section, Table, canvas, mean_error, plot, render, typeset
from rto.theory.runner import write
from rto.theory.studies import STUDIES, identities


def section(**kwargs):
    figure = canvas()
    figure.subplots().plot([0, 1], [1, 0], color=PALETTE["token"])
    picture = plot(figure, name="line", statement="S <1>", caption="C & D")
    table = Table(caption="T", header=("a <b>",), rows=(("1 < 2",),))
    words = {"key": "k", "title": "Title", "statement": "x < y", "reading": ("r",), "findings": ("f & g",)}
    return Section(**{**words, "plots": (picture,), "tables": (table,), "checks": {"c": True}, **kwargs})


def test_page_is_escaped_and_self_contained():
    page = render([section()], seed=3, quick=False)
    assert "x &lt; y" in page
    assert "f &amp; g" in page
    assert "a &lt;b&gt;" in page
    assert "<1>" not in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "Seed 3." in page


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("π_ref(y|x)", "π<sub>ref</sub>(y|x)"),
        ("A^{min(ξ+1, H)}", "A<sup>min(ξ+1, H)</sup>"),
        ("E_{d^π}KL", "E<sub>d<sup>π</sup></sub>KL"),
        ("|D|^-0.98 here", "|D|<sup>-0.98</sup> here"),
        ("`a_b` < V*(s_h)", "<code>a_b</code> &lt; V*(s<sub>h</sub>)"),
    ],
)
def test_typesetting(text, html):
    assert typeset(text) == html


def test_mean_and_error_to_the_errors_second_digit():
    assert mean_error(np.array([1.0, 2.0, 3.0, 4.0])) == "2.50 ± 0.65"
    assert mean_error(np.array([0.001, 0.0012])) == "0.00110 ± 0.00010"


def test_a_failed_check_shows_and_fails_the_command(tmp_path, monkeypatch, capsys):
    for checks, code in (({"c": True}, 0), ({"c": True, "d": False}, 1)):
        done = [section(checks=checks)]
        monkeypatch.setattr(command, "run_all", lambda *a, done=done: done)
        assert command.main(["--output_dir", str(tmp_path / str(code))]) == code
        page = (tmp_path / str(code) / "index.html").read_text(encoding="utf-8")
        assert ("FAILS" in page) == bool(code)
        assert ("FAILS" in capsys.readouterr().out) == bool(code)
        assert (tmp_path / str(code) / "line.png").read_bytes().startswith(b"\x89PNG")


def test_figures_stay_small(tmp_path):
    done = identities.study(0, quick=True)
    assert all(done.checks.values())
    write([done], tmp_path, seed=0, quick=True)
    assert all(f.stat().st_size < 150_000 for f in tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STUDIES))
def test_every_check_of_every_study_holds(name):
    done = STUDIES[name](0, True)
    assert done.checks
    assert all(done.checks.values()), done.checks


@pytest.mark.slow
def test_the_command_runs_studies_in_processes(tmp_path):
    assert command.main(["--output_dir", str(tmp_path), "--quick", "--only", "identities"]) == 0
    assert (tmp_path / "index.html").stat().st_size > 50_000
