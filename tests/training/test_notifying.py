"""--notify: the message that a run sends, to a server on this machine, and what is said of URLs that are none."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from library.errors import UserError
from library.options import validation
from library.options.parsing import parse_options
from library.registry import groups_for
from library.runtime.logs import LOGGER
from library.training.notifying import Notifier
from library.training.tracking import Ending, Tracker, loggable

pytest.importorskip("apprise")


@pytest.fixture
def server():
    """What apprise's json:// sends: a URL to send to, and the messages that have arrived."""
    arrived = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            refused = "refuse-all" in self.path or ("refuse-attachments" in self.path and body["attachments"])
            if not refused:
                arrived.append({**body, "path": self.path})
            self.send_response(500 if refused else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"json://me:secret-of-mine@127.0.0.1:{http.server_port}", arrived
        http.shutdown()


def options(*urls: str):
    flags = ["--output_dir=out", "--output_name=a/flower", "--network_module=networks.lora"]
    return parse_options(groups_for("sd", "network"), [*flags, f"--notify={' '.join(urls)}"])


def run(opts, work, enabled=True):
    with Notifier(opts, enabled) as notifier, Tracker({"--notify": notifier}) as tracker:
        work(tracker)


def test_a_run_that_is_done_says_so_with_its_last_image(server, tmp_path):
    url, arrived = server
    Image.new("RGB", (8, 8), "red").save(tmp_path / "last.png")

    def work(tracker):
        tracker.scalars(7, {"loss/average": 0.125})
        tracker.image(7, "sample/00", Image.new("RGB", (8, 8)), "a cat", tmp_path / "last.png")
        tracker.saved(7, tmp_path / "flower.safetensors")
        tracker.saved(7, tmp_path / "flower-state")
        tracker.ended(Ending("done", ""))

    run(options(url), work)
    (message,) = arrived
    assert message["title"] == "flower: done"
    lines = message["message"].splitlines()
    assert lines[0].startswith("7 steps in 0:00:0")
    assert lines[1:] == ["average loss 0.1250", f"saved last: {tmp_path / 'flower.safetensors'}"]
    assert [one["filename"] for one in message["attachments"]] == ["last.png"]


@pytest.mark.parametrize(
    ("error", "title", "first"),
    [
        (UserError("the disk is full"), "flower: failed", "the disk is full"),
        (RuntimeError("two\nlines"), "flower: failed", "two"),
        (KeyboardInterrupt(), "flower: stopped", "at once; what was saved before is whole"),
    ],
)
def test_a_run_that_ends_otherwise_says_how(server, error, title, first):
    url, arrived = server

    def work(tracker):
        raise error

    with pytest.raises(type(error)):
        run(options(url), work)
    (message,) = arrived
    assert (message["title"], message["message"].splitlines()[0]) == (title, first)


def test_what_fails_before_there_is_a_tracker_is_sent_too(server):
    url, arrived = server
    with pytest.raises(UserError), Notifier(options(url)):
        raise UserError("the model cannot be read")
    assert [message["title"] for message in arrived] == ["flower: failed"]


def test_one_message_by_one_process_and_none_without_a_run(server):
    url, arrived = server
    run(options(url), lambda tracker: tracker.ended(Ending("done", "")), enabled=False)
    run(options(url), lambda tracker: None)  # as with --debug_dataset
    assert arrived == []


def test_a_service_that_refuses_costs_a_warning(server, tmp_path, caplog):
    url, arrived = server
    LOGGER.propagate = True
    Image.new("RGB", (8, 8), "red").save(tmp_path / "last.png")

    def work(tracker):
        tracker.image(7, "sample/00", Image.new("RGB", (8, 8)), "a cat", tmp_path / "last.png")
        tracker.ended(Ending("done", ""))

    run(options(f"{url}/refuse-all", f"{url}/refuse-attachments", f"{url}/good"), work)
    assert [(message["path"], len(message["attachments"])) for message in arrived] == [
        ("/refuse-attachments", 0),
        ("/good", 1),
    ]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["--notify: the message to URL 1 of 3 could not be sent"]


def test_urls_are_checked_at_the_start_and_shown_nowhere():
    opts = options("json://me:secret-of-mine@127.0.0.1", "nonsense://secret-of-mine", "secret-of-mine")
    lines = [line for line in validation.problems(opts, _traits()) if "--notify" in line]
    assert len(lines) == 2
    assert lines[0].startswith("--notify: URL 2, nonsense://... is none that apprise can use")
    assert lines[1].startswith("--notify: URL 3 is none that apprise can use")
    assert "secret" not in str(lines)
    assert "notify" not in loggable(opts)


def _traits():
    from library.families.registry import FAMILIES

    return FAMILIES["sd"].traits


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = [line for line in validation.problems(options("json://x"), _traits()) if "--notify" in line]
    assert "needs the package apprise, which is not installed; run: " in line
    assert "requirements/notify.txt" in line
