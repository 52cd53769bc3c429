"""D4RL's files, fetched from a server on this machine that misbehaves in every way we know."""

import hashlib
import http.server
import io
import threading
import time

import h5py
import pytest

import data


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` under any path, with one fault at a time."""

    content = b""
    fault = None
    asked: list  # (path, first byte asked for)

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append((self.path, start))
        fault = self.fault
        if fault == "redirects" and not self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", f"/elsewhere{self.path}")
            self.end_headers()
            return
        if fault == "redirects for ever":
            self.send_response(302)
            self.send_header("Location", self.path + "x")
            self.end_headers()
            return
        if fault == "not found":
            self.send_error(404)
            return
        if fault == "cannot resume":
            start = 0
        body = b"<html>moved</html>" if fault == "web page" else self.content[start:]
        if fault == "bit flipped":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "other size":
            body = body + b"more"
        self.send_response(206 if start else 200)
        if start:
            at = start + 7 if fault == "resumes elsewhere" else start
            self.send_header("Content-Range", f"bytes {at}-{len(self.content) - 1}/*")
        if fault == "web page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if fault != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "endless":
            body = body * 3
        if fault in ("breaks once", "breaks") and (fault == "breaks" or len(self.asked) == 1):
            body = body[:1000]
        if fault in ("stalls once", "resumes elsewhere") and len(self.asked) == 1:
            self.wfile.write(body[:2000])
            self.wfile.flush()
            time.sleep(1.0)
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch, log):
    """A D4RL entry whose host is that server: (entry, handler class, file content)."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, value in log.items():
            f[key] = value
    content = buffer.getvalue()
    handler = type("Handler", (Server,), {"content": content, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(data, "STALL", 0.3)
    row = {
        "url": f"http://127.0.0.1:{server.server_port}/toy.hdf5",
        "bytes": str(len(content)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    yield data.Entry("toy-v2", None, None, d4rl=row), handler, content
    server.shutdown()
    server.server_close()


def left(entry) -> list[str]:
    return sorted(p.name for p in data.d4rl_path(entry).parent.iterdir())


def test_a_download_is_verified_and_kept(served):
    entry, handler, content = served
    path, checked = data.download(entry)
    assert path.read_bytes() == content and checked == "SHA-256 verified"
    assert left(entry) == ["toy.hdf5"]
    data.download(entry)
    assert len(handler.asked) == 1  # the second time nothing is fetched
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(data.DataError, match="another SHA-256"):
        data.download(entry)
    path.write_bytes(content[:-5])
    with pytest.raises(data.DataError, match="bytes instead of"):
        data.download(entry)


@pytest.mark.parametrize("fault, starts", [("breaks once", [0, 1000]), ("stalls once", [0, 2000])])
def test_a_broken_or_stalled_download_goes_on_by_itself_where_it_stopped(served, fault, starts):
    entry, handler, content = served
    handler.fault = fault
    path, _ = data.download(entry)
    assert path.read_bytes() == content and left(entry) == ["toy.hdf5"]
    assert [start for _, start in handler.asked] == starts


def test_what_a_killed_download_left_is_used(served):
    entry, handler, content = served
    part = data.d4rl_path(entry).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(content[:500])
    path, _ = data.download(entry)
    assert path.read_bytes() == content and handler.asked == [("/toy.hdf5", 500)]


def test_a_server_that_cannot_resume_starts_over(served):
    entry, handler, content = served
    part = data.d4rl_path(entry).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(b"y" * 500)
    handler.fault = "cannot resume"
    assert data.download(entry)[0].read_bytes() == content


def test_a_resumption_at_another_place_is_not_believed(served):
    entry, handler, content = served
    handler.fault = "resumes elsewhere"
    with pytest.raises(data.Unreachable, match="resumed at another place"):
        data.download(entry)
    handler.fault = None
    assert data.download(entry)[0].read_bytes() == content


def test_a_server_that_always_breaks_is_given_up_and_what_came_is_kept(served, monkeypatch):
    entry, handler, content = served
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    handler.fault = "breaks"
    path, _ = data.download(entry)  # every try brings another 1,000 bytes
    assert path.read_bytes() == content and len(handler.asked) > 3
    path.unlink()
    handler.fault, handler.content = "breaks", b""  # and now nothing comes any more
    part = path.with_name("toy.hdf5.part")
    part.write_bytes(content[:300])
    with pytest.raises((data.Unreachable, data.DataError)):
        data.download(entry)
    assert not path.exists()


def test_redirects_are_followed_with_the_place_to_resume_at(served):
    entry, handler, content = served
    part = data.d4rl_path(entry).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(content[:500])
    handler.fault = "redirects"
    assert data.download(entry)[0].read_bytes() == content
    assert handler.asked[-1] == ("/elsewhere/toy.hdf5", 500)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("web page", "sends a web page"),
        ("bit flipped", "another SHA-256"),
        ("other size", "bytes instead of"),
        ("endless", "more than the"),
    ],
)
def test_wrong_content_is_one_clear_line_and_leaves_nothing(served, fault, message):
    entry, handler, _ = served
    handler.fault = fault
    with pytest.raises(data.DataError, match=message) as e:
        data.download(entry)
    assert "\n" not in str(e.value) and left(entry) == []


def test_without_size_and_hash_what_is_not_hdf5_is_refused(served):
    entry, handler, content = served
    entry = entry._replace(d4rl=entry.d4rl | {"bytes": "", "sha256": ""})
    assert data.download(entry)[1] == "no hash known"
    data.d4rl_path(entry).unlink()
    handler.content = b"certainly not HDF5" * 100
    with pytest.raises(data.DataError, match="not HDF5"):
        data.download(entry)
    assert left(entry) == []


@pytest.mark.parametrize("fault", ["not found", "redirects for ever"])
def test_a_host_without_the_file_is_unreachable(served, fault):
    entry, handler, _ = served
    handler.fault = fault
    with pytest.raises(data.Unreachable, match="cannot be fetched") as e:
        data.download(entry)
    assert left(entry) == [] and "\n" not in str(e.value)


def test_a_mirror_by_flag_or_by_environment(served, monkeypatch):
    entry, handler, content = served
    host = entry.d4rl["url"].rsplit("/", 1)[0]
    entry = entry._replace(d4rl=entry.d4rl | {"url": "http://127.0.0.1:9/gone/toy.hdf5"})
    with pytest.raises(data.Unreachable):
        data.download(entry)
    monkeypatch.setenv("PGD_MIRROR", f"{host}/mirrored/")
    path, _ = data.download(entry)
    assert handler.asked[-1] == ("/mirrored/toy.hdf5", 0)
    path.unlink()
    data.download(entry, mirror=f"{host}/flag")
    assert handler.asked[-1] == ("/flag/toy.hdf5", 0)
    path.unlink()
    with pytest.raises(data.Unreachable, match="no-address"):
        data.download(entry, mirror="no-address")


def test_two_at_once_fetch_once(served):
    entry, handler, content = served
    handler.fault = "stalls once"
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.download(entry))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0][0].read_bytes() == content
    assert [start for _, start in handler.asked] == [0, 2000]


def test_an_unreachable_host_falls_back_to_a_collected_log_and_says_so(monkeypatch, capsys):
    entry = data.resolve("hopper-random")
    row = entry.d4rl | {"url": "http://127.0.0.1:9/hopper_random-v2.hdf5"}
    entry = entry._replace(d4rl=row)
    monkeypatch.setattr(data, "load_collected", lambda e: ("the log", "re-collected, not D4RL's"))
    found = data._load_by_name(entry, "auto")
    assert found == ("the log", "re-collected, not D4RL's", "collect")
    said = capsys.readouterr().err
    assert "cannot be fetched" in said and "--dataset-path" in said and said.count("\n") == 1
    with pytest.raises(data.DataError, match="cannot be fetched"):
        data._load_by_name(entry, "d4rl")
