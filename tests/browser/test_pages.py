"""What a reader sees of a real run: its page in MLflow, and its report."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.generation.inspection import inspect
from model.generation.sampling import Sampling
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.text_page import records, write_page
from pretrain.inference.trained import Trained
from pretrain.run.run_summary import load, verdict
from pretrain.tracking.mlflow_state import SERVED, State
from pretrain.tracking.mlflow_store import connect
from tests.browser.conftest import Browser
from tests.browser.mlflow_page import drawn, mlflow_server
from tests.model.helpers import build, open_masks, small
from tests.runs import ROOT, SMALL, duet

DESK, PHONE = 1280, 390
SECTION = '[data-testid="experiment-view-compare-runs-section-header"]'


@pytest.fixture(scope="module")
def run_dir(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracked run; asks for the browser first, since without one there is nothing to train for."""
    folder = tmp_path_factory.mktemp("pages")
    data, run = folder / "data", folder / "runs" / "small"
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    cadence = ["train.steps=40", "train.log_every=5", "train.eval_every=10", "train.sample_tokens=20"]
    for command in (
        ["data", "build", "data/characters", source, f"data.path={data}"],
        ["train", *SMALL, f"data.path={data}", f"run.dir={run}", *cadence, "tracking.mode=online", "--ranks", "2"],
        ["report", str(run)],
    ):
        done = duet(*command)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def server(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` over the store that the run was tracked in."""
    with mlflow_server(run_dir.parent / "mlflow.db", tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def test_the_runs_page_is_in_order_and_the_experiment_leads_to_it(browser: Browser, server: str, run_dir: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    state = State.load(run_dir)
    assert state and state.page(run_dir)
    browser.look(DESK, dark=False)
    browser.open(str(state.page(run_dir)).replace(SERVED, server))
    shown = drawn(browser)
    assert [name for name in shown[: shown.index("loss/train")] if not name.startswith("loss/")] == []
    headers = browser.run(f"[...document.querySelectorAll('{SECTION}')].map(s => s.innerText.split('\\n')[0].trim())")
    order = ["loss", "optim", "speed", "training data", "training health", "training masks", "usage"]
    shown_as = [re.sub(r"\s*\(\d+\)$", "", header) for header in headers]
    assert shown_as == [*order, "Model metrics"], "the last one is MLflow's own, and empty"
    run = connect(f"sqlite:///{run_dir.parent / 'mlflow.db'}").get_run(state.run_id)
    masks = [name for name in run.data.metrics if name.startswith("training masks/")]
    assert 5 <= len(masks) <= 10
    assert " train " in run.data.tags["mlflow.source.name"]

    up = f"//a[contains(@href, '/experiments/{state.experiment_id}/runs') and not(contains(@href, '{state.run_id}'))]"
    browser.driver.find_elements("xpath", up)[-1].click()
    link = f"document.querySelector('a[href*=\"{state.run_id}\"]')"
    WebDriverWait(browser.driver, 60).until(lambda _: browser.run(f"{link} !== null"))
    assert f"/experiments/{state.experiment_id}/runs?" in browser.run("location.href"), "not the page about traces"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_report_is_whole_at_every_width_and_in_every_light(
    browser: Browser, run_dir: Path, width: int, dark: bool
) -> None:
    browser.look(width, dark=dark)
    assert browser.open((run_dir / "report.html").as_uri()) == [], "nothing comes from the network"
    lines = browser.run("[...document.querySelectorAll('.verdict')].map(line => line.innerText)")
    assert tuple(lines) == verdict(load(run_dir))
    assert browser.run("document.querySelector('.verdict').getBoundingClientRect().bottom") < 400, "on top"
    assert_pictures_render(browser)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    cells = browser.run("[...document.querySelectorAll('td:first-child')].map(cell => cell.clientWidth)")
    assert cells
    assert min(cells) > 100, "names are not broken into letters"
    ink, paper = (brightness(browser, name) for name in ("color", "backgroundColor"))
    assert (ink > 180 and paper < 60) if dark else (ink < 60 and paper > 180)


def test_a_chart_tells_values_zooms_and_comes_back(browser: Browser, run_dir: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.look(DESK, dark=False)
    browser.open((run_dir / "report.html").as_uri())
    [box] = browser.driver.find_elements("xpath", "//figure[figcaption='Loss']/div[@class='chart']")
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    ticks = (
        "[...document.querySelector('.chart').querySelectorAll('text[text-anchor=middle]')].map(t => +t.textContent)"
    )
    whole = browser.run(ticks)
    ActionChains(browser.driver).move_to_element(box).perform()
    tip = browser.run("document.querySelector('.tip').innerText").split("\n")
    step = int(tip[0].removeprefix("step "))
    [loss] = [p.value for p in load(run_dir).points["loss/train"] if p.step == step]
    assert [line for line in tip if line.startswith("training")] == [f"training {float(f'{loss:.4g}'):g}"]
    ActionChains(browser.driver).move_to_element(box).click_and_hold().move_by_offset(80, 0).release().perform()
    zoomed = browser.run(ticks)
    assert min(zoomed) > min(whole) and max(zoomed) < max(whole)
    ActionChains(browser.driver).double_click(box).perform()
    assert browser.run(ticks) == whole


def test_several_runs_are_a_table_and_overlays(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    done = duet("report", str(run_dir), str(run_dir), "--out", str(page))
    assert done.returncode == 0, done.stderr
    browser.look(PHONE, dark=False)
    assert browser.open(page.as_uri()) == []
    assert browser.run("document.querySelectorAll('table')[0].rows.length") == 3
    names = browser.run("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.name').length)")
    assert all(number >= 2 for number in names), "every line has a name"
    assert_pictures_render(browser)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "a wide table scrolls by itself"


def test_a_page_that_is_not_whole_is_noticed(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    page, absent = tmp_path / "broken.html", "http://127.0.0.1:9/picture.png"
    first, rest = (run_dir / "report.html").read_text().rsplit('src="data:image/png;base64,', 1)
    page.write_text(f'{first}src="{absent}" alt="{rest}')
    assert browser.open(page.as_uri()) == [absent]
    with pytest.raises(AssertionError, match="rendered"):
        assert_pictures_render(browser)


class TextPage(NamedTuple):
    """A page, and what it was made of."""

    url: str
    trained: Trained
    texts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def text_page(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextPage:
    """Of a text that fits the context of 16 and of one that does not."""
    trained = open_trained(run_dir)
    for name, parameter in open_masks(trained.model).named_parameters():
        if "qkv" in name or "query" in name:
            parameter.data *= 4  # so that tokens and heads differ, as after a long training
    settings = Settings(Sampling(temperature=0.7, top_k=50), tokens=9)
    continuation = Continuation(trained, ["The", "</script><i> Contributor\n"], settings, recorded=True)
    list(continuation.pieces())
    found = records(trained, continuation, attention=True)
    page = tmp_path_factory.mktemp("text") / "page.html"
    write_page(page, found)
    return TextPage(page.as_uri(), trained, found)


SPANS = "[...document.querySelectorAll('{} .tokens span')]"


def shades(browser: Browser, place: str) -> list[float]:
    """How dark the tokens of a part of the page are, 0 to 1."""
    found: list[float] = browser.run(f"{SPANS.format(place)}.map(s => Number(s.style.getPropertyValue('--v')))")
    return found


def between(values: list[float]) -> list[float]:
    """From the smallest, 0, to the largest, 1."""
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_generated_text_is_readable_at_every_width_and_in_every_light(
    browser: Browser, text_page: TextPage, width: int, dark: bool
) -> None:
    url, _, found = text_page
    browser.look(width, dark=dark)
    assert browser.open(url) == [], "nothing comes from the network"
    assert browser.run("document.title") == f"{found[0]['model']['run']}, step 40"
    for number, text in enumerate(found):
        browser.run(f"(document.getElementById('pick').value = {number}, showText({number}))")
        shown = browser.run(f"{SPANS.format('#reading')}.map(s => s.textContent.replaceAll('↵\\n', '\\n'))")
        assert shown == [token["text"] or token["piece"] for token in text["tokens"]]
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        boxes = browser.run(f"{SPANS.format('')}.map(s => s.getBoundingClientRect().right)")
        assert max(boxes) <= width, "long tokens and rows of spaces break"
        assert browser.run("document.getElementById('limits').hidden") == (number == 0)
        density = shades(browser, "#reading")
        assert min(density) == 0
        assert max(density) == 1
    assert "gates and attention are shown of the last 16" in browser.run("document.getElementById('limits').innerText")
    assert browser.run("document.querySelector('#pick').options[1].text").startswith("2: </script><i> Contributor")
    ink, paper = (brightness(browser, name) for name in ("color", "backgroundColor"))
    assert (ink > 180 and paper < 60) if dark else (ink < 60 and paper > 180)


def test_a_token_shows_what_it_attends_to_and_how_likely_it_was(browser: Browser, text_page: TextPage) -> None:
    """In every stream, layer and head what the model does, computed beside the page."""
    url, trained, [text, _] = text_page
    exact: dict[str, Tensor] = {}
    inspect(trained.model, torch.tensor([t["id"] for t in text["tokens"]]), exact.__setitem__)
    browser.look(DESK, dark=False)
    browser.open(url)
    for at in (7, 4):
        browser.driver.find_elements("css selector", "#text span")[at].click()
        for kind in ("enc_sa", "dec_sa", "cross"):
            weights = torch.stack([exact[f"{kind}/00"].mean(0)[at], exact[f"{kind}/00"][1, at]])
            mean, head = (weights / weights.amax(1, keepdim=True)).tolist()
            assert max(abs(a - b) for a, b in zip(mean, head, strict=True)) > 0.1, "else nothing is told apart"
            place = f'[data-kind="{kind}"]'
            assert shades(browser, place) == pytest.approx(mean, abs=0.03)
            browser.run(
                f"(select => (select.value = 1, select.dispatchEvent(new Event('change'))))"
                f"(document.querySelector('{place} select'))"
            )
            assert shades(browser, place) == pytest.approx(head, abs=0.03)
            browser.run(f"(document.querySelector('{place} select').value = -1)")
    token = text["tokens"][4]
    card = browser.run("document.getElementById('token').innerText")
    assert f"({token['log_probability']:.3f} nats)" in card
    assert [other["piece"] in card for other in token["likeliest"]] == [True] * 5
    assert f"{text['density']['dec_ff/00'][4]:.2f}" in card
    browser.driver.switch_to.active_element.send_keys("\ue014")  # the right arrow
    assert "6 of 12" in browser.run("document.getElementById('token').innerText")
    assert browser.run("document.querySelector('#text .chosen').dataset.at") == "5"
    choices = browser.run("[...document.getElementById('shade').options].map(o => o.value)")
    assert choices == ["density:", "density:enc_ff", "density:dec_ff", "surprise:", "none:"]
    for choice, expected in (
        ("density:dec_ff", text["density"]["dec_ff/00"]),
        ("surprise:", [-token["log_probability"] for token in text["tokens"][1:]]),
    ):
        browser.run(f"(document.getElementById('shade').value = '{choice}', showShade())")
        found = shades(browser, "#reading")[-len(expected) :]
        assert found == pytest.approx(between(expected), abs=1e-4)


def test_a_model_of_one_stream_without_gates_says_so(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    tokenizer = open_trained(run_dir).tokenizer
    shape = small("decoder_only", vocab_size=tokenizer.vocab_size, learned_dropout={"enabled": False})
    trained = Trained(build(shape).eval(), tokenizer, "causal", "plain", 0)
    continuation = Continuation(trained, ["The"], Settings(Sampling(), tokens=4), recorded=True)
    list(continuation.pieces())
    write_page(tmp_path / "page.html", records(trained, continuation, attention=True))
    browser.look(PHONE, dark=True)
    assert browser.open((tmp_path / "page.html").as_uri()) == []
    assert "This model has no gates" in browser.run("document.getElementById('reading').innerText")
    assert browser.run("[...document.querySelectorAll('.panel h3')].map(h => h.innerText)") == [
        "What the model attends to"
    ]
    assert max(shades(browser, '[data-kind="dec_sa"]')) == 1
    assert browser.run("document.getElementById('shade').value") == "surprise:"
    assert browser.run("document.getElementById('layer').options.length") == 2


def test_steps_of_a_token_and_what_became_of_drafts_are_shown(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    tokenizer = open_trained(run_dir).tokenizer
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "learned_dropout": {"enabled": False}}
    halts = small("decoder_only", recurrence={"steps": 4, "halt": True, "halt_bias": 0}, **shape)
    models = {"causal": halts, "continuation": small("draft_and_verify", **shape)}
    found = {}
    browser.look(DESK, dark=False)
    for objective, config in models.items():
        trained = Trained(open_masks(build(config)).eval(), tokenizer, objective, "plain", 0)
        continuation = Continuation(trained, ["The"], Settings(Sampling(), tokens=9), recorded=True)
        list(continuation.pieces())
        [found[objective]] = records(trained, continuation, attention=True)
        write_page(tmp_path / f"{objective}.html", [found[objective]])
    browser.open((tmp_path / "causal.html").as_uri())
    assert browser.run("document.getElementById('shade').value") == "steps:"
    assert shades(browser, "#reading") == pytest.approx(between(found["causal"]["steps"]), abs=1e-4)
    browser.open((tmp_path / "continuation.html").as_uri())
    drafts = [(token["id"], token["draft"]["id"]) for token in found["continuation"]["tokens"] if token.get("draft")]
    kept = sum(token == draft for token, draft in drafts)
    assert 0 < kept < len(drafts)
    classes = browser.run(f"{SPANS.format('#reading')}.map(span => [...span.classList])")
    counts = [sum(of in names for names in classes) for of in ("kept", "corrected")]
    assert counts == [kept, len(drafts) - kept]
    passes = found["continuation"]["passes"]
    told = (
        f"verify: {passes['drafts']} drafts and {passes['writes']} passes of the other decoder; {kept} drafted tokens"
    )
    assert told in browser.run("document.getElementById('ending').innerText")


def assert_pictures_render(browser: Browser) -> None:
    """Those that are pictures, and the charts that took the places of the others."""
    sizes = browser.run("[...document.images].map(i => [i.complete ? i.naturalWidth : 0, i.clientWidth, i.offsetTop])")
    assert all(natural > 0 and shown > 100 for natural, shown, _ in sizes), f"not all pictures are rendered: {sizes}"
    lines = browser.run("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('path').length)")
    assert len(lines) > 6 and all(lines), "each chart has its curves"


def brightness(browser: Browser, name: str) -> float:
    """Of a colour of the page, 0 to 255."""
    text: str = browser.run(f"getComputedStyle(document.body).{name}")
    return sum(float(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")) / 3
