"""`rto watch`: what it answers, and what a browser shows while a trainer trains."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from browser import Browser, chromium
from rto import cli
from rto.alarms import Bounds
from rto.report.watch import Watched, serve

browser = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


@contextmanager
def served(folder: Path, **kwargs: Any) -> Iterator[str]:
    server = serve(Watched(folder, **kwargs))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, dict(reply.headers), reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def row(i: int, **own: float) -> str:
    return json.dumps({"step": i, "episodes": 8 * i, "kl": 0.5 * i, "completions/mean_length": 10.0, **own}) + "\n"


def test_a_page_is_sent_again_when_a_file_has_changed(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(row(1) + row(2))
    with served(tmp_path) as url:
        status, headers, page = get(url)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "KL against prompts used" in page
        assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
        assert get(url, If_None_Match=headers["ETag"])[0] == 304
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(row(3, kl=9.0) + '{"step": 4, "epi')  # the trainer is writing a line at this moment
        status, later, page = get(url, If_None_Match=headers["ETag"])
        assert status == 200
        assert later["ETag"] != headers["ETag"]
        assert "to 9." in page


def test_nobody_but_this_machine_s_browser_is_answered(tmp_path: Path) -> None:
    """A site whose name is made to lead here sends its own name; there is one page, and nothing can be sent to it."""
    with served(tmp_path) as url:
        for host, status in (("evil.example", 403), ("localhost.evil.example:80", 403), ("127.0.0.1:9", 200)):
            assert get(url, Host=host)[0] == status
        for path in ("log.jsonl", "../", "%2e%2e/", "index.html"):
            assert get(url + path)[0] == 404
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(url, data=b"x", timeout=30)


def test_a_folder_that_goes_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with served(folder) as url:
        assert get(url)[0] == 200
        folder.rmdir()
        (tmp_path / "log.jsonl").write_text("")
        assert get(url)[0] in (200, 503)


def test_alarms_of_every_stage_are_shown(tmp_path: Path) -> None:
    """Of preference learning and of reward modelling, which have no rollouts, by the name of the stage."""
    for stage, rows in {
        "dpo": [{"step": 10, "loss": 0.6, "logratio/chosen": -0.8}],
        "reward": [{"step": 10, "loss": 0.1, "accuracy": 0.95}, {"step": 10, "eval_loss": 0.9, "eval_accuracy": 0.55}],
    }.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(tmp_path) as url:
        page = get(url)[2]
    assert page.count('class="alarm"') == 2
    assert "fall of the preferred completions" in page
    assert "accuracy on training pairs less that on held-out pairs: 0.4, bound 0.3" in page


def test_alarms_have_the_bounds_that_were_given(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("".join(row(i) for i in range(1, 9)))
    with served(tmp_path) as url:
        assert "None: the last 5 rollouts" in get(url)[2]
    with served(tmp_path, bounds=Bounds(kl=0.1)) as url:
        page = get(url)[2]
    assert "KL from the reference, nats a token: 0.3, bound 0.1." in page  # (4 … 8) / 2 / 10 on average
    assert "raise kl_coef" in page


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "nowhere is not a run folder"),
        ([".", "--kl", "high"], "--kl: invalid"),
        ([".", "--every", "0"], "--every: 0 is not above 0"),
        ([".", "--prot", "1"], "did you mean --port?"),
        ([".", "--window", "0"], "window is at least 1"),
    ],
)
def test_bad_input_ends_in_a_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", *args]) == 2
    line = capsys.readouterr().err
    assert says in line
    assert line.count("\n") == 1


def test_every_bound_is_a_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Watched] = []

    def stopped(watched: Watched, port: int) -> Any:
        seen.append(watched)
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("rto.report.watch.serve", stopped)
    flags = [word for i, field in enumerate(fields(Bounds)) for word in (f"--{field.name}", str(i + 1))]
    assert cli.main(["watch", str(tmp_path), *flags]) == 2
    assert cli.main(["watch", str(tmp_path), "--kl", "none"]) == 2
    assert seen[0].bounds == Bounds(**{field.name: i + 1 for i, field in enumerate(fields(Bounds))})
    assert seen[1].bounds == Bounds(kl=None)


class Look(TrainerCallback):
    """Looks at the page of a run from within it: opens it after the second rollout, and looks again after the last."""

    def __init__(self, page: Browser, url: str) -> None:
        self.page, self.url, self.seen = page, url, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Once a rollout. What a curve ends with stands in its label for those who cannot see it."""
        if "episodes" not in logs:
            return
        self.seen += 1
        if self.seen == 2:
            self.page.open(self.url, width=360)
        if self.seen in (2, 4):
            label = "document.querySelector('svg[aria-label^=\"KL against\"]')?.getAttribute('aria-label') ?? ''"
            self.page.until(f"({label}).endsWith('to {logs['kl']:.3g}.')")
            newest = f"step {state.global_step - args.updates_per_rollout}"
            assert newest in self.page.js("document.querySelector('main').innerText")
            assert self.page.js("document.documentElement.scrollWidth") <= 360


@browser
def test_the_page_grows_while_a_run_goes_on(
    trainer: Callable, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A trainer trains, a page of it is open in a browser, and nobody touches either."""
    (tmp_path / "run").mkdir()
    built = trainer(total_episodes=32)
    with Browser(tmp_path_factory.mktemp("chromium")) as page:
        with served(tmp_path / "run", every=0.2) as url:
            look = Look(page, url)
            built.add_callback(look)
            built.train()
            assert look.seen == 4
        page.until("document.querySelector('#status').innerText.includes('rto watch has ended')")
        assert [c for c in page.complaints if "ERR_CONNECTION" not in c] == []
