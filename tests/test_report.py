"""report.py and report.html: what the page holds, what it never holds, and how its viewer behaves in a browser."""

import base64
import hashlib
import io
import math
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import report
import train
from checkpoints import describe_code
from report import Evidence, HeldOutSlices, SampleSlices
from tables import MEMBERSHIP_ROWS, NETWORK_ROWS, SAMPLE_ROWS, SLICE_ROWS

ATTACKS = ("likelihood", "calibrated", "guide", "min_k", "neighbourhood", "reconstruction", "refiner", "samples")
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its text, and that of its descendants."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attributes):
        made = {"tag": tag, "attributes": dict(attributes), "text": ""}
        self.elements.append(made)
        if tag not in self.VOID:
            self.open.append(made)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def all(self, tag, class_=None):
        return [
            own
            for own in self.elements
            if own["tag"] == tag and (class_ is None or class_ in (own["attributes"].get("class") or "").split())
        ]

    def images(self):
        """The pixels of all embedded PNGs, as slices (H, W) uint8."""
        prefix = "data:image/png;base64,"
        sources = [own["attributes"]["src"] for own in self.all("img")]
        assert all(source.startswith(prefix) for source in sources)
        pictures = [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(prefix)))) for source in sources]
        assert all(picture.mode == "L" for picture in pictures)
        return [np.asarray(picture).T for picture in pictures]


def section(rows, numbers):
    """An object of evaluation.json with a value of its own for each row, by section."""
    made = {}
    for row in rows:
        value = next(numbers)
        made.setdefault(row.section, {})[row.key] = (value, value + 0.1) if "interval" in row.key else value
    return made


@pytest.fixture
def results():
    """The content of an evaluation.json in which no two values are equal."""
    numbers = iter(np.random.default_rng(0).permutation(np.linspace(0.1, 0.8, 1000)).tolist())
    comparisons = [section(SAMPLE_ROWS, numbers) for _ in range(4)]
    return {
        "settings": {
            "split": "test",
            "heldout_slices": 20,
            "heldout_slices_in_all": 20,
            "heldout_cases": 12,
            "training_slices": 240,
            "training_slices_searched": 240,
            "training_cases": 30,
            "samples": 64,
            "samples_compared": 64,
            "seed": 7,
            "temperature": 0.9,
            "top_p": 0.995,
            "guidance": 1.0,
            "refiner_noise": 1.0,
        },
        **section(NETWORK_ROWS, numbers),
        "training": section(NETWORK_ROWS, numbers),
        **comparisons[0],
        **dict(zip(("decoder_alone", "prior_alone", "baseline"), comparisons[1:])),
        "slices": {
            name: section(SLICE_ROWS, numbers)["slices"] for name in ("samples", "reconstructions", "heldout_slices")
        },
        "incoherent_by_height": {"low": 0.0625, "middle": 0.0, "high": 0.25},
        "called_copies": [{"sample": 3, "training_slice": "case_017/slice_3.nii.gz", "score": 9.0}],
        "membership": {
            "patients": 12,
            "slices": 20,
            "attacks": {name: section(MEMBERSHIP_ROWS, numbers)["attack"] for name in ATTACKS},
        },
    }


def slices_of(count, size, seed):
    """Discs on black with the noise of a scanner, rounded to 256 grey levels: (n, H, W) in [-1, 1]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    discs = np.array([rows**2 + columns**2 < radius for radius in random.uniform(0.3, 0.9, count)])
    values = discs * 0.9 - 0.8 + random.normal(0, 0.06, discs.shape)
    return np.round((values.clip(-1, 1) + 1) * 127.5) / 127.5 - 1


def evidence_of(count=6, size=(64, 32), phantom=True, real=True):
    """What a report draws; the evidence of patients without real slices if `real` is false."""
    curve = ([1, 2, 3], [0.5, 0.3, 0.2])
    names = {"vqvae": ("reconstruction_loss", "perplexity"), "prior": ("bits_per_code",), "refiner": ("flow_loss",)}
    curves = {
        stage: {(split, name): curve for name in of for split in ("train", "validate")} for stage, of in names.items()
    }
    samples = SampleSlices(
        slices_of(count, size, 0),
        np.arange(count) + 10,
        np.append(np.linspace(0, 1, count - 1), math.nan),
        np.arange(count) / 10,
        np.arange(count) == 1,
        np.arange(count) == 2,
        slices_of(count, size, 1) if real else None,
    )
    held_out = HeldOutSlices(*(slices_of(6, size, seed) for seed in (2, 3, 4))) if real else None
    rates = dict.fromkeys(ATTACKS, (np.array([0, 0, 0.5, 1]), np.array([0, 0.25, 1, 1])))
    distances = {"samples": np.linspace(0.1, 0.3, 9), "test slices": np.linspace(0.2, 0.4, 9)}
    return Evidence(curves, samples, held_out, phantom, distances, rates)


@pytest.fixture
def write(tmp_path, results, run_config):
    """Write a report; return its path."""

    def make(evidence=None, name="demo", config=None, **options):
        path = tmp_path / "report.html"
        config = config or run_config(**{"data": "phantom"} | options)
        report.write_report(path, name, config, results, evidence or evidence_of())
        return path

    return make


def commands_of(page):
    """The command lines of a page, each as one text."""
    return [own["text"].strip() for own in page.all("code") if own["text"].startswith(("python ", "git "))]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere(write):
    path = write()
    page, text = read(path), path.read_text(encoding="utf-8")
    references = [
        value
        for own in page.elements
        for name, value in own["attributes"].items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    ]
    assert references
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in references)
    assert not page.all("link") and not page.all("iframe") and not page.all("object")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    targets = {own["attributes"].get("id") for own in page.elements}
    assert {value[1:] for value in references if value.startswith("#")} <= targets


def test_only_the_script_of_the_template_may_run(write):
    page = read(write())
    (script,) = page.all("script")
    (policy,) = (own["attributes"]["content"] for own in page.all("meta") if "http-equiv" in own["attributes"])
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_names_and_options_are_text(write, run_config):
    config = run_config(data="phantom").model_copy(
        update={"libraries": {HOSTILE: HOSTILE}, "git_revision": HOSTILE, "fingerprint": HOSTILE, "command": [HOSTILE]}
    )
    page = read(write(name=HOSTILE, config=config))
    assert len(page.all("script")) == 1
    assert page.all("h1")[0]["text"] == HOSTILE
    assert page.all("title")[0]["text"] == f"{HOSTILE}: ProstateVQ report"
    cells = [own["text"] for own in page.all("td")]
    assert f"{HOSTILE} {HOSTILE}" in cells
    assert commands_of(page)[0] == f"git checkout {shlex.quote(HOSTILE)}"


def test_names_that_are_not_utf8_are_written(write):
    assert read(write(name="run\udcff\n")).all("h1")[0]["text"] == "run\\udcff\\n"


def test_tables_equal_evaluation_json(write, results):
    page = read(write())
    cells = [own["text"] for own in page.all("td") if "data-column" in own["attributes"]]
    expected = []
    columns = [results, *(results[name] for name in ("decoder_alone", "prior_alone", "baseline"))]
    for rows, of in (
        (NETWORK_ROWS, [results, results["training"]]),
        (SAMPLE_ROWS, columns),
        (SLICE_ROWS, [{"slices": own} for own in results["slices"].values()]),
        (MEMBERSHIP_ROWS, [{"attack": own} for own in results["membership"]["attacks"].values()]),
    ):
        for row in rows:
            for values in (column[row.section][row.key] for column in of):
                parts = values if isinstance(values, tuple) else (values,)
                expected.append("-".join(f"{part:{row.format}}" for part in parts))
    assert cells == expected
    text = "".join(own["text"] for own in page.all("main"))
    assert all(row.sentence in text for row in (*NETWORK_ROWS, *SAMPLE_ROWS, *SLICE_ROWS, *MEMBERSHIP_ROWS))
    assert "SSIM of reconstructions" in text and f"{results['reconstructions']['ssim']:.3f}" in text


def test_values_that_are_unknown_are_drawn_and_written(write, results):
    results["samples"]["ms_ssim_diversity"] = results["baseline"]["samples"]["coverage_by_patient"] = math.nan
    page = read(write())
    assert "unknown" in [own["text"] for own in page.all("text")]
    drawn = [own["attributes"] for own in page.elements if own["tag"] in ("svg", "rect", "line", "polyline", "text")]
    assert not any("nan" in value for attributes in drawn for value in attributes.values())


def test_slices_are_embedded_as_they_are(write):
    evidence = evidence_of()
    expected = [*evidence.samples.slices, *evidence.samples.nearest]
    expected += [own for column in zip(*evidence.held_out) for own in column]
    similar = evidence.samples.scores.argsort()[::-1][: report.PAIRS]
    expected += [of[i] for i in similar for of in (evidence.samples.slices, evidence.samples.nearest)]
    images = read(write(evidence)).images()
    assert len(images) == len(expected)
    for image, slice_ in zip(images, expected):
        np.testing.assert_array_equal(image, np.round((slice_ + 1) * 127.5))


def test_slices_keep_their_proportions(write, run_config):
    """Pixels of 0.8 x 1.6 mm: the second axis, which is drawn downwards, is stretched."""
    affine = [[0.8, 0, 0, 0], [0, 1.6, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]
    config = run_config(data="phantom").model_copy(update={"affine": affine})
    sizes = {(own["attributes"]["width"], own["attributes"]["height"]) for own in read(write(config=config)).all("img")}
    assert sizes == {("64", "64")}


def test_sides_are_spoken_of_where_slices_have_them(write, run_config):
    """Not in sagittal slices, whose affine follows."""
    assert "anterior on top" in read(write()).all("main")[0]["text"]
    sagittal = [[0, 0, 3, 0], [0.8, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 1]]
    config = run_config(data="phantom").model_copy(update={"affine": sagittal})
    assert "anterior on top" not in read(write(config=config)).all("main")[0]["text"]


def test_a_report_of_patients_has_samples_only(write):
    evidence = evidence_of(phantom=False, real=False)
    page = read(write(evidence, data="/secret/patients"))
    assert len(page.images()) == len(evidence.samples.slices)
    text = "".join(own["text"] for own in page.all("main"))
    assert "This page shows samples only." in text
    assert "they show patients" in text


def test_a_report_says_whether_it_shows_patients(write):
    assert "nobody is shown" in read(write()).all("main")[0]["text"]
    shown = read(write(evidence_of(phantom=False), data="/secret/patients")).all("main")[0]["text"]
    assert "This page shows slices of patients" in shown


def test_no_path_and_no_name_of_a_data_file_is_written(write, run_config):
    config = run_config(data="/secret/patients", init="/secret/init", run="/secret/run", images="/secret/images")
    config = config.model_copy(update={"command": ["/secret/train.py", "--data=/secret/patients"]})
    for real in (True, False):
        path = write(evidence_of(phantom=False, real=real), config=config)
        text = path.read_text(encoding="utf-8")
        assert "secret" not in text and "case_017" not in text
        assert any(line.endswith("--init INIT --data DATA --run RUN") for line in commands_of(read(path)))


def test_a_run_on_a_table_is_not_one_on_the_phantom(write, run_config):
    page = read(write(evidence_of(phantom=False), config=run_config(data="phantom", table="/secret/slices.csv")))
    assert "a folder of slices" in [own["text"] for own in page.all("td")]
    assert any(line.endswith("--table TABLE --run RUN") for line in commands_of(page))
    assert "secret" not in page.all("main")[0]["text"]


def test_the_command_trains_with_the_same_options(write, run_config, tmp_path):
    given = {"preset": "demo", "data": "/secret", "slice_size": [64, 32], "adam_beta1": 0.8, "updates": 9, "seed": 3}
    config = run_config(**given)
    command = next(line for line in commands_of(read(write(config=config))) if "train.py" in line)
    parsed = train.parse_options(shlex.split(command)[2:])
    folders = {name: getattr(parsed, name) for name in ("data", "run", "images", "device")}
    assert parsed == config.options.model_copy(update=folders)
    assert parsed.data == "DATA"


def test_samples_are_drawn_again_with_their_settings(write):
    lines = commands_of(read(write()))
    settings = "--run RUN --num 64 --seed 7 --temperature 0.9 --top-p 0.995 --guidance 1.0 --refiner-noise 1.0"
    assert f"python evaluate.py --split test {settings}" in lines
    assert f"python predict.py {settings} --out SAMPLES" in lines


def test_a_missing_log_is_said(write):
    page = read(write(evidence_of()._replace(curves={})))
    assert "metrics.jsonl, is missing" in page.all("main")[0]["text"]


def test_pictures_and_charts_have_texts(write):
    page = read(write())
    charts = [own["attributes"] for own in page.all("svg") if own["attributes"].get("role") == "img"]
    assert len(charts) == 4 + 6 + 2  # curves, comparisons, distances and attacks
    assert all(own["aria-label"] for own in charts)
    assert any("lowest validation 0.2 at update 3" in own["aria-label"] for own in charts)
    assert all("alt" in own["attributes"] for own in page.all("img"))
    assert all(own["text"].strip() for own in page.all("button", "slice")[:6])


def test_marks_name_copies_and_incoherent_samples(write):
    captions = [own["text"] for own in read(write()).all("button", "slice")]
    assert captions[:3] == [
        "Sample 10, height 0.00",
        "Sample 11, height 0.25 (called a copy)",
        "Sample 12, height 0.50 (incoherent anatomy)",
    ]
    assert captions[5] == "Sample 15, height unknown"


def test_64_samples_at_full_size_take_less_than_6_mb(write):
    assert write(evidence_of(64, (256, 128))).stat().st_size < 6e6


@pytest.mark.parametrize(
    ("count", "pixels", "shown"), [(200, 256 * 128, 64), (5, 64, 5), (64, 1024**2, 2), (9, 2048**2, 1), (0, 64, 0)]
)
def test_few_large_samples_are_shown(count, pixels, shown):
    assert report.shown_samples(count, pixels) == shown


def test_the_template_needs_no_library(write):
    """The code that wrote the page is named, by the versions in config.json."""
    text = read(write()).all("main")[0]["text"]
    assert f"torch {describe_code()['libraries']['torch']}" in text


# ---------------------------------------------------------------- in a browser


@pytest.fixture(params=[390, 1440])
def opened(request, browser, write):
    """The report in a window of this width; ends with the test that nothing was logged."""
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(write().as_uri())
    yield browser
    assert browser.get_log("browser") == []


def grey(browser, canvas):
    """Mean grey level of a canvas."""
    source = browser.execute_script("return document.getElementById(arguments[0]).toDataURL()", canvas)
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return np.asarray(picture)[..., 0].mean()


def text_of(browser, name):
    return browser.find_element("id", name).text


def wait_for(browser, name, text):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 5, 0.02).until(lambda _: text_of(browser, name) == text)


def open_sample(browser, number):
    browser.find_elements("css selector", "#sheet .slice")[number].click()
    wait_for(browser, "index-text", f"{number + 1}/6")


def test_the_page_is_not_wider_than_the_window(opened, request):
    width = opened.execute_script("return document.documentElement.scrollWidth")
    assert width <= request.node.callspec.params["opened"]


def test_arrow_keys_change_the_sample(opened):
    from selenium.webdriver.common.keys import Keys

    open_sample(opened, 2)
    assert text_of(opened, "viewer-title") == "Sample 12, height 0.50, similarity 0.2, incoherent anatomy"
    for key, text in ((Keys.ARROW_RIGHT, "4/6"), (Keys.ARROW_UP, "5/6"), (Keys.ARROW_LEFT, "4/6")):
        opened.switch_to.active_element.send_keys(key)
        wait_for(opened, "index-text", text)
    slider = opened.find_element("id", "index")
    slider.send_keys(Keys.END)
    wait_for(opened, "index-text", "6/6")
    slider.send_keys(Keys.ARROW_RIGHT)  # stays
    wait_for(opened, "index-text", "6/6")
    slider.send_keys(Keys.ESCAPE)
    assert not opened.find_element("id", "viewer").is_displayed()
    assert "Sample 15" in opened.switch_to.active_element.text


def test_dragging_changes_window_and_level(opened):
    from selenium.webdriver import ActionChains

    open_sample(opened, 0)
    before, difference = grey(opened, "own"), grey(opened, "difference")
    own = opened.find_element("id", "own")
    ActionChains(opened).click_and_hold(own).move_by_offset(-20, -30).release().perform()
    assert (text_of(opened, "window-text"), text_of(opened, "level-text")) == ("236", "113")
    assert grey(opened, "own") > before + 5
    assert grey(opened, "difference") == difference
    ActionChains(opened).double_click(own).perform()
    wait_for(opened, "window-text", "256")
    assert text_of(opened, "level-text") == "128"
    assert grey(opened, "own") == before
    ActionChains(opened).click_and_hold(own).move_by_offset(30, 0).release().perform()
    opened.find_element("id", "reset").click()
    wait_for(opened, "window-text", "256")


def test_the_viewer_shows_slices_and_their_difference_as_they_are(opened):
    samples = evidence_of().samples
    open_sample(opened, 4)
    own, other = (np.round((of[4] + 1) * 127.5) for of in (samples.slices, samples.nearest))
    assert grey(opened, "own") == pytest.approx(own.mean(), abs=1e-3)
    assert grey(opened, "other") == pytest.approx(other.mean(), abs=1e-3)
    expected = (255 * abs(own - other) / report.COPY_LIMIT).clip(max=255).mean()
    assert grey(opened, "difference") == pytest.approx(expected, abs=0.5)  # the canvas rounds each pixel
    caption = opened.find_element("id", "difference").get_attribute("aria-label")
    assert f"mean {abs(own - other).mean():.1f} grey levels" in caption


def test_an_original_is_shown_alone(opened):
    opened.execute_script("document.querySelector('#original-0').closest('button').click()")
    wait_for(opened, "viewer-title", "Held-out slice 1, original")
    assert opened.find_element("id", "own").is_displayed()
    assert not opened.find_element("id", "other").is_displayed()
