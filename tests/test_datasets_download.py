"""Tests of datasets/download.py: only complete, verified archives are kept, and silent sites time out."""

import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    OFFICIAL_CIFAR100,
    ROWS,
    change_set,
    expected_images,
    pack,
    silent,
    tiny_cifar10,
    tiny_cifar100,
    write_python,
    write_python100,
)

import data
from datasets import download

pytestmark = pytest.mark.usefixtures("small_and_offline")


class Site(http.server.ThreadingHTTPServer):
    """A loopback site with one file.

    Each entry of `breaks` is a number of bytes after which one answer breaks off or, with `stalls`, first
    stalls. Later answers are complete.
    """

    daemon_threads = True

    def __init__(self, content: bytes, breaks=(), stalls=False):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.breaks, self.stalls = content, list(breaks), stalls
        self.asked = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self):
        site = self.server
        site.asked += 1
        self.do_HEAD()
        breaks = site.breaks.pop(0) if site.breaks else None
        self.wfile.write(site.content[:breaks])
        self.wfile.flush()
        if breaks and site.stalls:
            time.sleep(3)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> bytes:
    folder = write_python(tmp_path / "elsewhere" / "cifar-10-batches-py", tiny_cifar10())
    content = pack(tmp_path / "elsewhere" / "x.tar.gz", folder).read_bytes()
    checksum = hashlib.md5(content).hexdigest()
    change_set(monkeypatch, "cifar10", archives={"cifar-10-python.tar.gz": checksum})
    return content


@pytest.fixture
def serve(monkeypatch):
    sites = []

    def start(*options, **named) -> Site:
        sites.append(Site(*options, **named))
        url = f"http://127.0.0.1:{sites[-1].server_port}/cifar-10-python.tar.gz"
        change_set(monkeypatch, "cifar10", url=url)
        return sites[-1]

    yield start
    for site in sites:
        site.shutdown()
        site.server_close()


def test_the_archive_of_cifar100_is_downloaded_and_its_checksum_verified(tmp_path, monkeypatch, serve):
    official = OFFICIAL_CIFAR100
    assert official.url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert official.archives["cifar-100-python.tar.gz"] == "eb9058c3a382ffc7106e4002c42a8d85"
    folder = write_python100(tmp_path / "elsewhere" / "cifar-100-python", tiny_cifar100())
    content = pack(tmp_path / "elsewhere" / "x.tar.gz", folder).read_bytes()
    url = f"http://127.0.0.1:{serve(content).server_port}/cifar-100-python.tar.gz"
    change_set(monkeypatch, "cifar100", url=url)
    with pytest.raises(data.DataError, match="checksum"):
        data.open_dataset("cifar100", tmp_path / "data", say=silent)
    archives = {"cifar-100-python.tar.gz": hashlib.md5(content).hexdigest()}
    change_set(monkeypatch, "cifar100", archives=archives)
    dataset = data.open_dataset("cifar100", tmp_path / "data", say=silent)
    assert dataset.title == "CIFAR-100" and names_in(tmp_path / "data") == {*archives, "beton"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_download_gets_its_final_name_and_is_readable_by_everybody(tmp_path, archive, serve):
    serve(archive)
    dataset = data.open_dataset("cifar10", tmp_path / "data", say=silent)
    np.testing.assert_array_equal(dataset.train.images, expected_images(tiny_cifar10()))
    assert names_in(tmp_path / "data") == {"cifar-10-python.tar.gz", "beton"}
    file = tmp_path / "data" / "cifar-10-python.tar.gz"
    assert file.read_bytes() == archive and file.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("stalls", [False, True])
def test_an_incomplete_download_never_gets_the_final_name(tmp_path, archive, serve, monkeypatch, stalls):
    monkeypatch.setattr(download, "PATIENCE_S", 0.5)
    site = serve(archive, breaks=[2000], stalls=stalls)
    with pytest.raises(data.DataError, match="--data-dir"):
        data.open_dataset("cifar10", tmp_path / "data", say=silent)
    assert names_in(tmp_path / "data") == {"beton"}
    data.open_dataset("cifar10", tmp_path / "data", say=silent)
    assert site.asked == 2 and "cifar-10-python.tar.gz" in names_in(tmp_path / "data")


def test_a_download_with_a_wrong_checksum_is_removed(tmp_path, archive, serve):
    serve(archive[:-1] + b"?")
    with pytest.raises(data.DataError, match="checksum"):
        data.open_dataset("cifar10", tmp_path / "data", say=silent)
    assert not list(tmp_path.glob("data/cifar*"))


@pytest.mark.parametrize("length", [500, 10**6])
@pytest.mark.parametrize("name", ["tmp123", "cifar-10-python.tar.gz"])
def test_leftovers_of_an_earlier_download_are_replaced(tmp_path, archive, serve, name, length):
    unfinished = tmp_path / "data" / "cifar-10-python.tar.gz.download"
    unfinished.mkdir(parents=True)
    (unfinished / name).write_bytes(b"?" * length)
    serve(archive)
    assert len(data.open_dataset("cifar10", tmp_path / "data", say=silent).train.labels) == 5 * ROWS
    assert names_in(tmp_path / "data") == {"cifar-10-python.tar.gz", "beton"}


def given_up_after(tmp_path) -> float:
    start = time.monotonic()
    with pytest.raises(data.DataError) as error:
        data.open_dataset("cifar10", tmp_path / "data", say=silent)
    for way in ("--data-dir", "--data FOLDER", "--data synthetic"):
        assert way in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    return time.monotonic() - start


def test_a_site_that_does_not_answer_times_out(tmp_path, monkeypatch):
    assert download.PATIENCE_S < 10
    monkeypatch.setattr(download, "PATIENCE_S", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        change_set(monkeypatch, "cifar10", url=f"http://127.0.0.1:{deaf.getsockname()[1]}/x.tar.gz")
        assert given_up_after(tmp_path) < 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    assert given_up_after(tmp_path) < 2


def test_a_refused_connection_fails_at_once(tmp_path):
    assert given_up_after(tmp_path) < 2


def test_nothing_is_downloaded_if_download_is_false(tmp_path, archive, serve):
    site = serve(archive)
    with pytest.raises(data.DataError, match="--data synthetic"):
        data.open_dataset("cifar10", tmp_path / "data", download=False, say=silent)
    assert site.asked == 0 and not (tmp_path / "data").exists()


def test_the_first_line_of_the_message_names_an_unreachable_site(small_and_offline, tmp_path):
    with pytest.raises(data.DataError) as told:
        data.open_dataset("cifar10", tmp_path, say=lambda line: None)
    why, mend = str(told.value).splitlines()  # --quick shows only the first
    assert why == f"cifar10 cannot be downloaded (no connection to 127.0.0.1:9); looked in {tmp_path}."
    assert "--data-dir FOLDER" in mend and "--data synthetic" in mend
