import http.client
import io
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from tests.view.made import answers, parsed, picture, run, sha256
from vlmfix.view.folders import read_sheet
from vlmfix.view.server import SheetServer


@contextmanager
def serving(folder, size=2):
    with SheetServer(read_sheet([folder]), size) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Client(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


class Client:
    def __init__(self, port):
        self.port = port

    def get(self, path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            return response.status, response.getheader("Content-Type"), response.read()
        finally:
            connection.close()

    def page(self, path):
        status, kind, content = self.get(path)
        assert (status, kind) == (200, "text/html; charset=utf-8"), content
        return parsed(content.decode())


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    told = []
    for number, colour in enumerate(("red", "green", "blue", "black", "white")):
        picture(pictures / f"{number}.png", colour)
        told.append((f"{number}.png", "What?", f"Number {number}.", {"finish": "length" if number > 1 else "eos"}))
    (tmp_path / "secret.txt").write_text("secret")
    picture(tmp_path / "secret.png", "pink")
    picture(pictures / "unnamed.png", "pink")
    told.append(("../secret.png", "What?", "Out.", {"sha256": sha256(tmp_path / "secret.png")}))
    return run(tmp_path / "run", pictures, told)


def test_every_picture_is_seen_page_by_page(folder):
    with serving(folder) as client:
        seen = []
        for number in (1, 2, 3):
            page = client.page(f"/?page={number}")
            assert f"page {number} of 3" in page.text
            for image in page.all("img"):
                status, kind, content = client.get(image.attributes["src"])
                seen.append(image.attributes["alt"])
                if seen[-1] == "../secret.png":
                    assert (status, kind) == (410, "image/svg+xml; charset=utf-8")
                    assert b"leads out of the folder" in content
                else:
                    assert (status, kind) == (200, "image/jpeg")
                    assert Image.open(io.BytesIO(content)).size == (30, 20)
        assert seen == ["../secret.png", *(f"{number}.png" for number in range(5))]


def test_filters_and_searches_are_of_all_pages(folder):
    with serving(folder) as client:
        assert answers(client.page("/?show=cut&page=2")) == [["Number 4."]]
        assert answers(client.page("/?show=cut&find=NUMBER+3")) == [["Number 3."]]
        page = client.page("/?find=%3Cscript%3E%22nothing")
        assert answers(page) == []
        (field,) = [field for field in page.all("input") if field.attributes["name"] == "find"]
        assert field.attributes["value"] == '<script>"nothing'
        following = [
            link.attributes["href"]
            for link in client.page("/?show=cut&find=number").all("a")
            if "rel" in link.attributes
        ]
        assert following == ["?show=cut&find=number&page=2"]
        assert answers(client.page("/" + following[0])) == [["Number 4."]]
        assert answers(client.page("/?page=99999999999999999999")) == [["Number 3."], ["Number 4."]]


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/picture/../../secret.txt",
        "/picture/..%2f..%2fsecret.txt",
        "/picture/%2e%2e/secret.png",
        "/picture/unnamed.png",
        "/picture/0.png",
        "/picture/6",
        "/picture/-1",
        "/picture/",
        "/picture/%c2%b2",
        "/picture/" + "9" * 5000,
        "/run.json",
        "/?show=nonsense",
        "/?page=x",
        "//etc/passwd",
        "/favicon.ico",
    ],
)
def test_nothing_else_is_served(folder, path):
    with serving(folder) as client:
        assert client.get(path) == (404, "text/plain; charset=utf-8", b"there is no such page\n")


def test_only_this_machine_is_answered(folder):
    with serving(folder) as client:
        assert client.get("/", Host="example.org")[0] == 403
        assert client.get("/", Host=f"localhost:{client.port}")[0] == 200
        assert client.get("/", method="POST")[0] == 501
    with SheetServer(read_sheet([folder]), 2) as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert server.server_address[0] == "127.0.0.1"


def test_a_picture_that_changes_while_it_is_served_is_not_shown(folder, tmp_path):
    with serving(folder) as client:
        assert client.get("/picture/1")[0] == 200
        picture(tmp_path / "pictures" / "0.png", "yellow")
        status, _, content = client.get("/picture/1")
        assert (status, b"was changed since" in content) == (410, True)
        (tmp_path / "pictures" / "0.png").unlink()
        assert b"no longer where it was" in client.get("/picture/1")[2]


def test_out_and_serve_exclude_each_other(vlmfix, folder, tmp_path):
    code, _, err = vlmfix("view", folder, "--serve", "--out", tmp_path / "x.html")
    assert (code, "--serve and --out are both given" in err) == (2, True)
