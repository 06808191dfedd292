"""report.html: whole without a network, safe with anybody's text, and alive in a real browser (headless Chromium)."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape

from tpu_tune import config as configuration
from tpu_tune.curves.report import page, write_report
from tpu_tune.curves.runs import read_run
from tpu_tune.curves.svg_chart import thin

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> & 'x'"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
    "--window-size=1300,1600", "--virtual-time-budget=2000",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    """The browser; on CI it has to be there (launch/test.sh installs it)."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("no Chromium here; apt-get install chromium")
    assert found, "CI needs a Chromium; apt-get install chromium"
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run directory with everything in it, as training leaves it, and with hostile text."""
    place = tmp_path_factory.mktemp("runs") / "a <b> & run"
    place.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for step in range(1, 101):
        loss = 2 + 2 * np.exp(-step / 8) + 0.05 * random.standard_normal()
        rows.append(
            {
                "step": step,
                "epoch": step / 50,
                "loss": loss,
                "learning_rate": 1e-4,
                "grad_norm": 1.0,
                "token_accuracy": 0.5,
                "num_tokens": 100 * step,
                "tokens_per_second": 50.0 if step > 1 else None,
            }
        )
        if step % 20 == 0:
            rows.append(
                {"step": step, "eval_loss": 2.1 + 0.01 * np.exp(-step), "eval_token_accuracy": 0.4, "eval_runtime": 1.5}
            )
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration.default()
    config.lora.rank, config.model.path, config.data.columns = 17, EVIL, {"q": "input"}
    (place / "config.json").write_text(json.dumps(configuration.to_dict(config)))
    data = {"format": "messages", "rows": 1234, "used_target_tokens": 777, "dropped": {"empty": 3}, "bad_examples": []}
    summary = {"total_steps": 100, "data": {"train": data}, "device_peak_bytes": 5_320_000_000, "devices": "1 x v5e"}
    (place / "summary.json").write_text(json.dumps(summary))
    samples = [{"step": 0, "prompt": EVIL, "answer": "before it"}, {"step": 100, "prompt": EVIL, "answer": "after it"}]
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (place / "checkpoints" / "100").mkdir(parents=True)
    return place


@pytest.fixture(scope="module")
def report(directory):
    run = read_run(directory)
    return page([run], [run.diagnosis()])


def dumped(chromium, text, tmp_path, *flags):
    """The page's DOM after its scripts have run."""
    file = tmp_path / "report.html"
    file.write_text(text)
    words = [chromium, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{file}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout


def test_it_holds_all_that_was_promised(report):
    for text in (
        "well-fit",
        "generalization gap",
        "What to try",
        "lora.rank",
        "<td>17</td>",
        "1,234",
        "tokens with a loss",
        "777",
        "empty: 3",
        "before it",
        "after it",
        "5.32 GB",
        "1 x v5e",
        "perplexity",
        "token accuracy",
        "gradient norm",
        "tokens a second, median",
        "smoothed over 19 points",
    ):
        assert text in report, text
    assert report.count('<svg class="chart"') == 6
    assert "learning_rate" not in report.split("Configuration, where")[1]  # it is the default's


def test_it_needs_nothing_from_outside(report):
    outside = re.findall(
        r"""(?:src|href|action|data|poster)\s*=\s*["'][^"']+|url\((?!#clip)|@import|<link|<iframe|fetch\(""", report
    )
    assert not [found for found in outside if not found.startswith("data-")], outside
    assert re.findall(r"https?://[^\s\"'<]+", report) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert "default-src 'none'" in report


def test_hostile_text_stays_text(report):
    assert report.count("<script") == 2 and "<img" not in report and str(escape(EVIL)) in report
    assert "<title>a &lt;b&gt; &amp; run</title>" in report


def test_a_wild_loss_and_an_empty_run_are_drawn(tmp_path):
    rows = [{"step": s, "loss": 10.0 ** (30 if s == 3 else 0)} for s in range(1, 40)]
    for name, found in (("wild", rows), ("short", [{"step": 1, "loss": 2.0}]), ("none", [{"step": 1, "loss": None}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        run = read_run(tmp_path / name)
        text = page([run], [run.diagnosis()])
        drawn = text.split("<script>")[0]  # with the numbers for the script
        assert "nan" not in drawn.lower() and "Infinity" not in drawn and run.diagnosis().verdict in text


def test_thinning_keeps_what_stands_out():
    values = np.zeros(50_000)
    values[[777, 31_234]] = 9, -9
    kept = thin(values, 1000)
    assert len(kept) <= 1000 and {777, 31_234} <= set(kept) and (np.diff(kept) > 0).all()
    assert np.array_equal(thin(values[:1000], 1000), np.arange(1000))


def test_the_file_is_written_whole_or_not_at_all(directory, tmp_path):
    run = read_run(directory)
    write_report([run, run], [run.diagnosis()] * 2, tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text().endswith("</html>\n")


def test_hovering_shows_the_values_in_a_browser(chromium, report, directory, tmp_path):
    probe = """<script>addEventListener("load", () => {
      const svg = document.querySelector("svg.chart");
      const chart = JSON.parse(document.getElementById("charts").textContent)[0];
      const frame = svg.getBoundingClientRect(), said = {};
      const at = (step) => frame.left + (chart.box[0] + (step - chart.xRange[0]) / (chart.xRange[1] - chart.xRange[0])
        * chart.box[2]) / 560 * frame.width;
      const box = document.getElementById("values");
      said.before = box.hidden;
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: at(40.3), clientY: frame.top + 50}));
      said.values = [...box.children].map((line) => line.textContent);
      said.shown = !box.hidden && box.getBoundingClientRect().width > 50;
      said.cross = svg.querySelectorAll(".hover .cross").length;
      svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      said.next = box.children[0].textContent;
      svg.dispatchEvent(new PointerEvent("pointerleave"));
      said.after = box.hidden;
      const seen = (name) => getComputedStyle(svg.querySelector(name)).display !== "none";
      for (const mode of ["raw", "smooth", "both"]) {
        document.querySelector(`label[for=show-${mode}]`).click();
        said[mode] = [seen(".raw"), seen(".smooth")];
      }
      said.title = document.title;
      const out = document.createElement("pre");
      out.id = "said";
      out.textContent = JSON.stringify(said);
      document.body.append(out);
    });</script></body>"""
    dom = dumped(chromium, report.replace("</body>", probe), tmp_path)
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)[1]))
    losses = pd.Series([row["loss"] for row in read_run(directory).metrics if "loss" in row])
    smoothed = losses.rolling(5, center=True).median().rolling(19, center=True).mean()

    def words(value):
        return str(float(f"{float(f'{value:.6g}'):.5g}"))  # six digits are in the page, five are shown

    assert said["before"] and said["after"] and said["shown"] and said["cross"] == 1
    assert said["values"] == [
        "loss at step 40",
        f"train: {words(losses[39])}, smoothed {words(smoothed[39])}",
        "eval: 2.1",
    ]
    assert said["next"] == "loss at step 41"
    assert (said["raw"], said["smooth"], said["both"]) == ([True, False], [False, True], [True, True])
    assert said["title"] == "a <b> & run"  # no text of the run has become a script


def test_without_scripts_the_report_is_whole(chromium, report, tmp_path):
    dom = dumped(chromium, report.replace("script-src 'unsafe-inline'", "script-src 'none'"), tmp_path)
    assert 'id="values" hidden=""' in dom
    assert dom.count("<polyline") == report.count("<polyline") >= 6 and "generalization gap" in dom
