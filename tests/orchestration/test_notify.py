"""Messages to webhooks: JSON, tried again, never a reason to fail, and no token in a log."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ado_tasks.orchestration import notify


@pytest.fixture
def listener():
    """A webhook that refuses the first message and takes the others."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.met += 1
            if server.met == 1:
                self.send_error(503)
                return
            server.heard.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.met, server.heard = 0, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_message_is_tried_again_and_arrives_once(listener, monkeypatch):
    monkeypatch.setattr(notify.time, "sleep", lambda seconds: None)
    url = f"http://127.0.0.1:{listener.server_port}/hook"
    assert notify.tell([url], "refused", "worse", run="x") == 1
    assert listener.heard == [{"event": "refused", "text": "worse", "run": "x"}]


def test_nobody_there_is_a_warning_without_the_token(monkeypatch, caplog):
    monkeypatch.setattr(notify.time, "sleep", lambda seconds: None)
    assert notify.tell(["http://127.0.0.1:9/hook?token=hidden", "no url"], "late", "x") == 0
    assert "not told: http://127.0.0.1:9/hook" in caplog.text
    assert "hidden" not in caplog.text
