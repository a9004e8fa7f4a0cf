"""Watch a training in a browser: its curves and slices, on a page that brings itself up to date.

    python watch.py --run runs/default

The command only reads files, so it can be started and stopped at any time. The page is reachable from this machine
alone, at an address that holds a key, because other users of the machine can reach the port. To see it from another
machine: ssh -L 8765:127.0.0.1:8765 MACHINE, and the same address there.
"""

import base64
import hashlib
import secrets
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from charts import element
from checkpoints import read_bytes, read_config, read_curves, read_log
from config import RunConfig
from console import Parser, RunError, nonempty, number, printable, run_command, say
from report import TEMPLATE as REPORT_TEMPLATE
from report import curve_charts, to_html

TEMPLATE = Path(__file__).resolve().parent / "watch.html"
FIGURES = {
    "reconstructions.png": "Validation slices, their reconstructions, and the differences",
    "refinement.png": "Validation slices, decoded, and refined twice",
    "samples.png": "Samples",
}
HOSTS = ("127.0.0.1", "localhost")
MAX_FILE = 1 << 25  # bytes of a figure or a report that is served
PNG = b"\x89PNG\r\n\x1a\n"
TIMEOUT = 10  # seconds for a request to arrive


class WatchOptions(Namespace):
    """Options of watch.py."""

    run: Path
    images: Path | None
    port: int


class Answer(NamedTuple):
    """What is sent for a request."""

    kind: str  # media type
    content: bytes
    policy: str  # what the content may load and run


def parse_options(arguments: Sequence[str] | None) -> WatchOptions:
    """Parse the command line."""
    parser = Parser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("--run", type=nonempty(Path), default=Path("runs/default"), help="run directory (default: %(default)s)")
    add("--images", type=nonempty(Path), help="folder of figures (default: that of the training)")
    add("--port", type=number(int, 0, 65535), default=8765, help="0 for any free one (default: %(default)s)")
    return parser.parse_args(arguments, WatchOptions())


# ---------------------------------------------------------------- page


class LiveView:
    """The pages of one run.

    Args:
        run: The run directory.
        images: The folder of figures; those that are older than the run are of another one.
    """

    def __init__(self, run: Path, images: Path):
        self.run, self.images = run, images

    def answer(self, name: str) -> Answer | None:
        """Return the page (""), the report, or a figure by its name; None for anything else, or if it is not there."""
        if name == "":
            return self.page()
        if name == "report.html":
            # Of a run that may come from others: it runs its script, but as a page of no origin that loads nothing.
            policy = "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            return read_file(self.run / name, "text/html", policy + "script-src 'unsafe-inline'")
        if name in FIGURES:
            made = read_file(self.images / name, "image/png", "default-src 'none'")
            return made if made and made.content.startswith(PNG) else None
        return None

    def page(self) -> Answer:
        """Return the page of the training; an error of a file that is just being written ends with the next page."""
        template = TEMPLATE.read_text(encoding="utf-8")
        script = between(template, "<script>", "</script>")
        try:
            parts = dict(self.sections(read_config(self.run)))
        except (RunError, OSError) as error:
            parts = {"status": [str(error)], "curves": [], "figures": []}
        parts |= {"name": [printable(self.run.resolve().name)]}
        texts = {key: "\n".join(map(to_html, own)) for key, own in parts.items()}
        texts["style"] = between(REPORT_TEMPLATE.read_text(encoding="utf-8"), "<style>", "</style>")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
        content = Template(template).substitute(texts).encode()
        return Answer("text/html; charset=utf-8", content, f"{policy}script-src 'sha256-{digest}'")

    def sections(self, config: RunConfig) -> Iterator[tuple[str, Sequence[str | Element]]]:
        """Yield the name and the content of each place in the template. Raises RunError."""
        curves = {stage: read_curves(self.run, stage) for stage in ("vqvae", "prior", "refiner")}
        yield "status", [*self.status(config)]
        yield "curves", [element("div", *curve_charts(curves, config), class_="charts")]
        yield "figures", [*self.figures()]

    def status(self, config: RunConfig) -> Iterator[str | Element]:
        """Yield how far the training is, and a link to its report once it is evaluated."""
        lines, options = read_log(self.run), config.options
        totals = {"vqvae": options.updates, "prior": options.prior_updates, "refiner": options.refiner_updates}
        if lines:
            seconds = max(0, time.time() - (self.run / "metrics.jsonl").stat().st_mtime)
            of = f"{lines[-1].stage} update {lines[-1].update} of {totals.get(lines[-1].stage, 0)}"
            yield f"Last logged {seconds:.0f} s ago: {of}. "
        else:
            yield "Nothing is logged yet. "
        if self.answer("report.html"):
            yield element("a", "Report of the evaluation", href="report.html")

    def figures(self) -> Iterator[Element]:
        """Yield the figures of this run that are there."""
        begun = (self.run / "config.json").stat().st_mtime
        for name, text in FIGURES.items():
            path = self.images / name
            if path.is_file() and path.stat().st_mtime >= begun:
                source = f"{name}?{path.stat().st_mtime_ns}"  # so that a browser fetches it again once it has changed
                yield element("h3", text)
                yield element("img", src=source, alt=text, class_="plot")


def read_file(path: Path, kind: str, policy: str) -> Answer | None:
    """Return a file, or None if there is none that can be served: a link could lead anywhere."""
    try:
        return None if path.is_symlink() else Answer(kind, read_bytes(path, MAX_FILE), policy)
    except (OSError, ValueError):
        return None


def between(text: str, start: str, end: str) -> str:
    """Return what stands between two marks of a text."""
    return text.partition(start)[2].partition(end)[0]


# ---------------------------------------------------------------- server


class Handler(BaseHTTPRequestHandler):
    """Answers requests for the pages of one run, at /KEY/NAME, and none else.

    A request must name this machine as its host: otherwise a page from elsewhere, whose name was made to point here
    (DNS rebinding), could read the answers.
    """

    timeout = TIMEOUT
    server_version, sys_version = "ProstateVQ", ""

    def __init__(self, view: LiveView, key: str, *given: Any):
        self.view, self.key = view, key
        super().__init__(*given)

    def handle(self) -> None:
        """Handle a connection, which the browser may close at any time."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer a request."""
        if self.headers.get("Host", "").partition(":")[0] not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        start, path = f"/{self.key}/", self.path.partition("?")[0]
        answer = self.view.answer(path.removeprefix(start)) if path.startswith(start) else None
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", answer.kind),
            ("Content-Length", str(len(answer.content))),
            ("Content-Security-Policy", answer.policy),
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *given: Any) -> None:
        """Print nothing."""


def make_server(view: LiveView, key: str, port: int) -> ThreadingHTTPServer:
    """Return a server of a run on this machine alone. Raises RunError if the port is in use."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, view, key))
    except OSError as error:
        raise RunError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python watch.py`."""
    options = parse_options(arguments)
    config = read_config(options.run)
    key = secrets.token_urlsafe(16)
    with make_server(LiveView(options.run, options.images or Path(config.options.images)), key, options.port) as server:
        say(f"http://127.0.0.1:{server.server_port}/{key}/ shows {options.run}; Ctrl-C ends it")
        server.serve_forever()


if __name__ == "__main__":
    run_command(main)
