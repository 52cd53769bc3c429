"""D4RL's files, fetched from a server on this machine that misbehaves in every way we know."""

import hashlib
import http.server
import io
import threading
import time

import h5py
import numpy as np
import pytest
from conftest import toy_log, write_hdf5

import data
from host import d4rl
from host.errors import UserError


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
    """A D4RL file whose host is that server: (D4rlFile, handler class, its content)."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, value in log.items():
            f[key] = value
    content = buffer.getvalue()
    handler = type("Handler", (Server,), {"content": content, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(d4rl, "STALL", 0.3)
    yield (
        d4rl.D4rlFile(
            name="toy-v2",
            url=f"http://127.0.0.1:{server.server_port}/toy.hdf5",
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            reference=(0.0, 1.0),
            limit=40,
        ),
        handler,
        content,
    )
    server.shutdown()
    server.server_close()


def left(file) -> list[str]:
    return sorted(p.name for p in d4rl.d4rl_path(file).parent.iterdir())


def test_a_download_is_verified_and_kept(served):
    file, handler, content = served
    path, checked = d4rl.download(file)
    assert path.read_bytes() == content and checked == "SHA-256 verified"
    assert left(file) == ["toy.hdf5"]
    d4rl.download(file)
    assert len(handler.asked) == 1  # the second time nothing is fetched
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256 is not the registry's"):
        d4rl.download(file)
    path.write_bytes(content[:-5])
    with pytest.raises(UserError, match="bytes instead of"):
        d4rl.download(file)


@pytest.mark.parametrize("fault, starts", [("breaks once", [0, 1000]), ("stalls once", [0, 2000])])
def test_a_broken_or_stalled_download_goes_on_by_itself_where_it_stopped(served, fault, starts):
    file, handler, content = served
    handler.fault = fault
    path, _ = d4rl.download(file)
    assert path.read_bytes() == content and left(file) == ["toy.hdf5"]
    assert [start for _, start in handler.asked] == starts


def test_what_a_killed_download_left_is_used(served):
    file, handler, content = served
    part = d4rl.d4rl_path(file).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(content[:500])
    path, _ = d4rl.download(file)
    assert path.read_bytes() == content and handler.asked == [("/toy.hdf5", 500)]


def test_a_server_that_cannot_resume_starts_over(served):
    file, handler, content = served
    part = d4rl.d4rl_path(file).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(b"y" * 500)
    handler.fault = "cannot resume"
    assert d4rl.download(file)[0].read_bytes() == content


def test_a_resumption_at_another_place_is_not_believed(served):
    file, handler, content = served
    handler.fault = "resumes elsewhere"
    with pytest.raises(d4rl.Unreachable, match="resumed at the wrong byte"):
        d4rl.download(file)
    handler.fault = None
    assert d4rl.download(file)[0].read_bytes() == content


def test_a_server_that_always_breaks_is_given_up_and_what_came_is_kept(served, monkeypatch):
    file, handler, content = served
    monkeypatch.setattr(d4rl.time, "sleep", lambda s: None)
    handler.fault = "breaks"
    path, _ = d4rl.download(file)  # every try brings another 1,000 bytes
    assert path.read_bytes() == content and len(handler.asked) > 3
    path.unlink()
    handler.fault, handler.content = "breaks", b""  # and now nothing comes any more
    part = path.with_name("toy.hdf5.part")
    part.write_bytes(content[:300])
    with pytest.raises((d4rl.Unreachable, UserError)):
        d4rl.download(file)
    assert not path.exists()


def test_redirects_are_followed_with_the_place_to_resume_at(served):
    file, handler, content = served
    part = d4rl.d4rl_path(file).with_name("toy.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(content[:500])
    handler.fault = "redirects"
    assert d4rl.download(file)[0].read_bytes() == content
    assert handler.asked[-1] == ("/elsewhere/toy.hdf5", 500)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("web page", "sends a web page"),
        ("bit flipped", "SHA-256 is not the registry's"),
        ("other size", "bytes instead of"),
        ("endless", "more than the"),
    ],
)
def test_wrong_content_is_one_clear_line_and_leaves_nothing(served, fault, message):
    file, handler, _ = served
    handler.fault = fault
    with pytest.raises(UserError, match=message) as e:
        d4rl.download(file)
    assert "\n" not in str(e.value) and left(file) == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda content: b"certainly not HDF5" * 100, "not HDF5"),
        (lambda content: content[:-3000], "cut short or damaged"),
        (lambda content: b"", "not HDF5"),
    ],
)
def test_without_size_and_hash_only_a_log_gets_its_name(served, spoil, message):
    file, handler, content = served
    file = file._replace(size=0, sha256="")
    handler.content = spoil(content)
    with pytest.raises(UserError, match=message):
        d4rl.download(file)
    assert left(file) == []


def test_without_size_and_hash_another_hdf5_file_is_refused(served, tmp_path, log):
    file, handler, _ = served
    log.pop("actions")
    handler.content = write_hdf5(tmp_path / "other.hdf5", log).read_bytes()
    with pytest.raises(UserError, match="it lacks observations, actions or rewards"):
        d4rl.download(file._replace(size=0, sha256=""))
    assert left(file) == []


def test_a_hash_that_nobody_published_is_recorded_and_holds(served, capsys):
    file, _, content = served
    file = file._replace(size=0, sha256="")
    path, checked = d4rl.download(file)
    digest = hashlib.sha256(content).hexdigest()
    assert checked == "SHA-256 recorded" and left(file) == ["toy.hdf5", "toy.hdf5.sha256"]
    assert (path.parent / "toy.hdf5.sha256").read_text() == f"{digest}  toy.hdf5\n"
    said = capsys.readouterr().err
    assert digest[:16] in said and "not encrypted" in said
    assert d4rl.download(file)[1] == "SHA-256 as recorded when it was fetched"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="not the file that was fetched"):
        d4rl.download(file)


def test_a_plain_address_is_tried_encrypted_first():
    file = d4rl.D4rlFile("toy-v2", "http://a.invalid/b/toy.hdf5", 0, "", (0.0, 1.0), 40)
    assert d4rl._sources(file, "") == [
        "https://a.invalid/b/toy.hdf5",
        "http://a.invalid/b/toy.hdf5",
    ]
    assert d4rl._sources(file, "https://one/x/ http://two")[:2] == [
        "https://one/x/toy.hdf5",
        "http://two/toy.hdf5",
    ]
    for known in d4rl.read_registry().values():
        sources = d4rl._sources(known, "")
        assert sources[0] == known.url.replace("http://", "https://") and known.url in sources
        # A copy that others keep is asked last, and only where a hash tells whether it is D4RL's
        assert sources[2:] == [f"{d4rl.SECOND}/{d4rl.d4rl_path(known).name}"] * bool(known.sha256)


@pytest.mark.parametrize("fault", ["not found", "redirects for ever"])
def test_a_host_without_the_file_is_unreachable(served, fault):
    file, handler, _ = served
    handler.fault = fault
    with pytest.raises(d4rl.Unreachable, match="cannot be fetched") as e:
        d4rl.download(file)
    assert left(file) == [] and "\n" not in str(e.value)


def test_a_mirror_by_flag_or_by_environment(served, monkeypatch):
    file, handler, content = served
    host = file.url.rsplit("/", 1)[0]
    file = file._replace(url="http://127.0.0.1:9/gone/toy.hdf5")
    with pytest.raises(d4rl.Unreachable):
        d4rl.download(file)
    monkeypatch.setenv("PGD_MIRROR", f"{host}/mirrored/")
    path, _ = d4rl.download(file)
    assert handler.asked[-1] == ("/mirrored/toy.hdf5", 0)
    path.unlink()
    d4rl.download(file, mirror=f"{host}/flag")
    assert handler.asked[-1] == ("/flag/toy.hdf5", 0)
    path.unlink()
    with pytest.raises(d4rl.Unreachable, match="no-address"):
        d4rl.download(file, mirror="no-address")
    d4rl.download(file, mirror=f"http://127.0.0.1:9/gone {host}/second")
    assert handler.asked[-1] == ("/second/toy.hdf5", 0)


def test_two_at_once_fetch_once(served):
    file, handler, content = served
    handler.fault = "stalls once"
    found = []
    threads = [threading.Thread(target=lambda: found.append(d4rl.download(file))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0][0].read_bytes() == content
    assert [start for _, start in handler.asked] == [0, 2000]


def test_an_unreachable_host_falls_back_to_a_collected_log_and_says_so(
    tmp_path, monkeypatch, capsys
):
    entry = data.resolve("hopper-random")
    file = entry.d4rl._replace(url="http://127.0.0.1:9/hopper_random-v2.hdf5")
    known = data.registry() | {"hopper-random-v2": entry._replace(d4rl=file)}
    monkeypatch.setattr(data, "registry", lambda: known)
    path = write_hdf5(tmp_path / "a.hdf5", toy_log(obs_dim=11, act_dim=3))  # hopper's dimensions
    monkeypatch.setattr(data, "collected", lambda recipe: (path, "re-collected, not D4RL's"))
    task = data.load("hopper-random")
    assert (task.source, task.kind) == ("re-collected, not D4RL's", "collect")
    assert task.name == task.load_name == "collect:hopper-random"
    np.testing.assert_array_equal(task.log["rewards"], data.read_log(path)["rewards"])
    said = capsys.readouterr().err
    assert "cannot be fetched" in said and "--dataset-path" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="cannot be fetched"):
        data.load("d4rl:hopper-random")


def test_with_downloads_off_no_server_is_asked(served, monkeypatch):
    file, handler, content = served
    monkeypatch.setenv("PGD_OFFLINE", "1")
    with pytest.raises(d4rl.Unreachable, match="toy-v2 is not on this machine, and downloads are"):
        d4rl.download(file)
    assert handler.asked == [] and not d4rl.d4rl_path(file).parent.exists()
    monkeypatch.setenv("PGD_OFFLINE", "0")
    d4rl.download(file)
    monkeypatch.setenv("PGD_OFFLINE", "1")
    assert d4rl.download(file)[0].read_bytes() == content  # what is there is used
