"""watch.py: what its page shows, and that it serves nothing else, to nobody else."""

import http.client
import os
import shutil
import socket
import threading

import pytest
from test_report import Page

import watch
from checkpoints import read_config
from console import RunError

KEY = "a-key"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, with its figures, of which none is older than the run."""
    shutil.copytree(trained.run, tmp_path / "run")
    shutil.copytree(trained.images, tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        os.utime(path)
    return tmp_path / "run"


@pytest.fixture
def port(run):
    """The port of a server of that run."""
    with watch.make_server(watch.LiveView(run, run.with_name("images")), KEY, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port, path=f"/{KEY}/", method="GET", **headers):
    """Return the status, the headers and the content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def page_of(port):
    status, _, content = get(port)
    assert status == 200
    return Page(content.decode())


def test_the_page_shows_curves_and_figures(port):
    page = page_of(port)
    assert page.all("h1")[0]["text"] == "run"
    assert "refiner update 6 of 6" in page.all("p")[1]["text"]
    titles = [own["text"] for own in page.all("figcaption")]
    assert titles[0] == "VQ-VAE: reconstruction loss" and titles[-1] == "Refiner: flow loss"
    sources = [own["attributes"]["src"].partition("?")[0] for own in page.all("img")]
    assert sources == ["reconstructions.png", "refinement.png"]
    assert all(own["attributes"]["alt"] for own in page.all("img"))


def test_figures_are_served_as_they_are(port, run):
    for name in ("reconstructions.png", "refinement.png"):
        status, headers, content = get(port, f"/{KEY}/{name}?7")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert content == (run.with_name("images") / name).read_bytes()


def test_the_page_follows_the_training(port, run):
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("")
    assert "Nothing is logged yet" in page_of(port).all("p")[1]["text"]
    log.write_text("".join(line for line in lines if '"vqvae"' in line))
    page = page_of(port)
    assert "vqvae update 12 of 12" in page.all("p")[1]["text"]
    assert not any("Refiner" in own["text"] for own in page.all("figcaption"))
    (run.with_name("images") / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert len(page_of(port).all("img")) == 3


def test_figures_of_an_earlier_run_are_not_shown(port, run):
    begun = (run / "config.json").stat().st_mtime
    os.utime(run.with_name("images") / "refinement.png", (begun - 60, begun - 60))
    assert len(page_of(port).all("img")) == 1


def test_files_that_cannot_be_read_are_said(port, run):
    (run / "metrics.jsonl").write_text('{"stage": "vq')  # just being written
    page = page_of(port)
    assert "metrics.jsonl line 1 cannot be used" in page.all("p")[1]["text"]
    (run / "config.json").unlink()
    assert "no config.json" in page_of(port).all("p")[1]["text"]


def test_the_report_is_served_once_it_is_there(port, run):
    assert get(port, f"/{KEY}/report.html")[0] == 404
    assert not page_of(port).all("a")
    (run / "report.html").write_text("<p>a report")
    status, headers, content = get(port, f"/{KEY}/report.html")
    assert (status, content) == (200, b"<p>a report")
    assert headers["Content-Security-Policy"].startswith("sandbox allow-scripts; default-src 'none'")
    (link,) = page_of(port).all("a")
    assert link["attributes"]["href"] == "report.html"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/reconstructions.png",
        "/other-key/",
        f"/{KEY}",
        f"/{KEY}/config.json",
        f"/{KEY}/vqvae.safetensors",
        f"/{KEY}/metrics.jsonl",
        f"/{KEY}/data.json",
        f"/{KEY}/vqvae_loss.png",
        f"/{KEY}/.",
        f"/{KEY}/../run/config.json",
        f"/{KEY}/../images/",
        f"/{KEY}/%2e%2e/run/config.json",
        f"/{KEY}/..%2frun%2fconfig.json",
        f"/{KEY}//etc/passwd",
        f"/{KEY}/reconstructions.png/",
        f"/{KEY}/reconstructions.png%00",
        f"http://127.0.0.1/{KEY}/",
        "//[",
        "*",
    ],
)
def test_nothing_else_is_served(port, path):
    status, _, content = get(port, path)
    assert status == 404
    assert b"format" not in content and b"config.json" not in content


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_other_methods_are_refused(port, method):
    assert get(port, method=method)[0] == 501


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("localhost:9000", 200),  # forwarded by ssh
        ("localhost", 200),
        ("evil.example:8765", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("evil.example@127.0.0.1", 403),
        ("[::1]:8765", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(port, host, status):
    assert get(port, Host=host)[0] == status


def test_only_this_machine_is_listened_to(port):
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", port)) == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", port)) != 0  # an address of this machine, but not the one that is bound


@pytest.mark.parametrize("name", ["reconstructions.png", "report.html"])
def test_links_are_not_followed(port, run, name):
    folder = run if name == "report.html" else run.with_name("images")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(run / "config.json")
    assert get(port, f"/{KEY}/{name}")[0] == 404


@pytest.mark.parametrize("content", [b"a secret", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_only_pngs_of_bounded_size_are_served(port, run, monkeypatch, content):
    monkeypatch.setattr(watch, "MAX_FILE", 100)
    (run.with_name("images") / "refinement.png").write_bytes(content)
    assert get(port, f"/{KEY}/refinement.png")[0] == 404


def test_names_are_text(port, run):
    hostile = "<script>alert(1)<"
    with watch.make_server(watch.LiveView(run, run), KEY, 0):
        pass
    shutil.copytree(run, run.with_name(hostile))
    page = Page(watch.LiveView(run.with_name(hostile), run).answer("").content.decode())
    assert page.all("h1")[0]["text"] == hostile
    assert len(page.all("script")) == 1


def test_a_run_is_only_read(port, run):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
    page_of(port)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == before


def test_the_command_says_where_to_look(trained, monkeypatch, capsys):
    monkeypatch.setattr(watch.ThreadingHTTPServer, "serve_forever", lambda self: None)
    watch.main(["--run", str(trained.run), "--port", "0"])
    address, run = capsys.readouterr().out.split(" shows ")
    key = address.split("/")[3]
    assert address == f"http://127.0.0.1:{address.split(':')[2].partition('/')[0]}/{key}/" and len(key) >= 22
    assert run.startswith(str(trained.run))
    watch.main(["--run", str(trained.run), "--port", "0"])
    assert key not in capsys.readouterr().out


def test_the_folder_of_figures_is_that_of_the_training(trained):
    assert read_config(trained.run).options.images == trained.images


def test_a_port_in_use_is_a_users_mistake(trained):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"--port {port}: Address already in use; choose another"):
            watch.main(["--run", str(trained.run), "--port", str(port)])


def test_the_page_refreshes_itself(browser, port, run):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"http://127.0.0.1:{port}/{KEY}/")
    assert len(browser.find_elements("tag name", "img")) == 2
    (run.with_name("images") / "refinement.png").unlink()
    browser.execute_script("refresh()")
    WebDriverWait(browser, 5, 0.02).until(lambda _: len(browser.find_elements("tag name", "img")) == 1)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= browser.execute_script("return window.innerWidth")
    assert browser.execute_script("return document.querySelector('img').naturalWidth") > 0
    assert browser.get_log("browser") == []
