"""`quartet export --push_to_hub`: what the hub's API gets, and what is refused before anything is written."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from local_server import serving

from grpo.cli.parse import main
from grpo.train import train
from policies.files import hub

REPO = "someone/words"


class _Hub(BaseHTTPRequestHandler):
    """Answers as the recorded API of the hub does, with every file in the commit itself."""

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), self.path.partition("?")[0]
        hub_, status, said = self.server, 200, {}
        hub_.seen.append((self.command, path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_good" and self.command != "HEAD":
            status, said = 401, {"error": "Invalid username or password."}
        elif path == "/api/whoami-v2":
            said = {"type": "user", "name": "someone", "auth": {"type": "access_token"}}
        elif path in hub_.refuses:
            status, said = 403, {"error": "You have read access only"}
        elif path == "/api/repos/create":
            said = {"url": f"{hub_.url}/{REPO}", "name": REPO, "id": "1"}
        elif path.endswith("/preupload/main"):
            as_usual = {"uploadMode": "regular", "shouldIgnore": False}
            said = {"files": [{"path": f["path"]} | as_usual for f in json.loads(body)["files"]]}
        elif path.endswith("/commit/main"):
            said = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{hub_.url}/{REPO}/commit/{'c' * 40}"}
        elif path.startswith("/api/models/"):
            said = {"id": REPO, "sha": "a" * 40, "siblings": []}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_POST = do_HEAD = do_PUT = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def the_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen, server.refuses, server.url = [], set(), f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.unreachable.cache_clear()
    with serving(server):
        yield server
    hub.unreachable.cache_clear()


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "run"
    train(micro_config(folder, steps=1))
    return folder


def committed(server) -> dict[str, bytes]:
    [body] = [body for _, path, _, body in server.seen if path == f"/api/models/{REPO}/commit/main"]
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_an_export_is_pushed_whole_with_its_card(the_hub, run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--push_to_hub", REPO]) == 0
    sent = committed(the_hub)
    assert sent == {
        str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert {"config.json", "README.md", "run/config.yaml", "model.safetensors"} <= set(sent)
    assert f'from_pretrained("{REPO}")' in sent["README.md"].decode()
    [made] = [json.loads(body) for _, path, _, body in the_hub.seen if path == "/api/repos/create"]
    assert (made["name"], made["organization"], made["visibility"]) == ("words", "someone", "private")
    assert f"pushed to {the_hub.url}/{REPO}" in capsys.readouterr().out


def test_without_a_folder_nothing_is_left(the_hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["export", str(run), "--push_to_hub", REPO]) == 0
    assert "README.md" in committed(the_hub)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_none_is_refused(the_hub, run, capsys):
    for arguments, message in (
        (["--push_to_hub", "words"], "'words' has no owner: write OWNER/NAME"),
        (["--push_to_hub", "a/b/c"], "'a/b/c' is no name of a repository"),
        ([], "name the folder to write, DST, or a repository: --push_to_hub OWNER/NAME"),
    ):
        assert main(["export", str(run), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert the_hub.seen == []


def test_nothing_is_written_without_a_network_or_a_token(the_hub, run, tmp_path, monkeypatch, capsys):
    command = ["export", str(run), str(tmp_path / "out"), "--push_to_hub", REPO]
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert main(command) == 1
    assert "the hub does not know who you are" in capsys.readouterr().err
    hub.unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(command) == 1
    assert "HF_HUB_OFFLINE is set, so nothing is fetched. Leave it out" in capsys.readouterr().err
    hub.unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(command) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_the_hub_is_told_and_the_folder_kept(the_hub, run, tmp_path, capsys):
    the_hub.refuses.add("/api/repos/create")
    the_hub.refuses.add(f"/api/models/{REPO}/preupload/main")
    assert main(["export", str(run), str(tmp_path / "out"), "--push_to_hub", REPO]) == 1
    said = capsys.readouterr().err
    assert "the hub refused it: " in said
    assert "403" in said
    assert said.rstrip().endswith(f"the export is in {tmp_path / 'out'}")
    assert (tmp_path / "out/README.md").is_file()
