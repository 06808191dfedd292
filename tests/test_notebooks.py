"""The notebooks run from top to bottom, here on a CPU with the quickstart's model, and show what they say."""

from __future__ import annotations

import configparser
import functools
import json
import pathlib
import shutil
import subprocess

import pytest
from helpers_training import write_rows, write_tiny_llama

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

PROJECT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
STEPS = 3


def texts(notebook):
    """All that a run notebook printed, and its Markdown outputs."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", "") or output.get("data", {}).get("text/markdown", ""))
    return "\n".join(found)


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def fill_in(notebook, before, after):
    """Change one line of one cell, as a user does."""
    (cell,) = [cell for cell in notebook.cells if f"\n{before}  #" in f"\n{cell.source}"]
    cell.source = cell.source.replace(before, after)


def test_there_are_the_five_that_the_readme_names():
    names = ["00_quickstart", "colab_gpu_qlora", "colab_tpu_qlora", "kaggle_gpu_qlora", "kaggle_tpu_qlora"]
    assert [path.stem for path in NOTEBOOKS] == names
    readme = (PROJECT / "README.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:  # a magic is not Python
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        compile(source, f"{path.name} {cell.id}", "exec")


def test_all_share_their_first_cells():
    """Where the project is, and the one line that installs it."""
    code = [[cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"] for path in NOTEBOOKS]
    assert all(cells[:2] == code[0][:2] for cells in code)
    assert code[0][1] == '%run "{PROJECT}/launch/notebook_install.py"'


@pytest.mark.parametrize("kind", ["git address", "zip", "folder", "around it", "nowhere"])
def test_the_project_is_found_where_source_says(kind, tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    (project / "notebooks").mkdir()
    shutil.copy(PROJECT / "launch" / "notebook_install.py", project / "launch")
    (tmp_path / "session").mkdir()
    monkeypatch.chdir(project / "notebooks" if kind == "around it" else tmp_path / "session")
    source = ""
    if kind == "git address":
        run = functools.partial(subprocess.run, cwd=project, check=True, capture_output=True)
        run(["git", "init", "--quiet"])
        run(["git", "add", "."])
        run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", "a"])
        source = f"file://{project}"
    elif kind == "zip":
        source = shutil.make_archive("uploaded", "zip", tmp_path, "project")  # a folder in it, as GitHub's has
    elif kind == "folder":
        source = str(project)
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    fill_in(notebook, 'SOURCE = ""', f"SOURCE = {source!r}")
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    if kind == "nowhere":
        with pytest.raises(RuntimeError, match="write its git address into SOURCE"):
            exec(cell, {})
        return
    for _ in range(2):  # the cell may be run again
        names = {}
        exec(cell, names)
        assert (names["PROJECT"] / "launch" / "notebook_install.py").is_file()


def executed(path, folder, monkeypatch, *changes):
    """A notebook after a run in a folder, on the CPU, with some lines changed as a user does."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' eight virtual devices would share two cores
    monkeypatch.delenv("MPLBACKEND", raising=False)  # Agg would show no figure
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    notebook = nbformat.read(path, as_version=4)
    fill_in(notebook, 'SOURCE = ""', f"SOURCE = {str(PROJECT)!r}")  # the notebook itself runs elsewhere, as on Colab
    fill_in(notebook, "STEPS = -1", f"STEPS = {STEPS}")
    for before, after in changes:
        fill_in(notebook, before, after)
    kernel = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=kernel).execute()
    return notebook


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "colab_gpu_qlora" else [])
        for path in NOTEBOOKS
        if not path.stem.startswith("kaggle")
    ],
)
def test_a_notebook_runs_from_top_to_bottom(path, smollm2_gguf, chatterbot_dir, tmp_path, monkeypatch):
    notebook = executed(path, tmp_path, monkeypatch)
    said = texts(notebook)
    assert "SmolLM2-135M-Instruct" in said
    assert "rules of thumb" in said and "peak" in said  # the plan's table
    assert f"finished: {STEPS} of {STEPS} steps" in said
    assert said.count("> What is AI?") == 1 and "| What is AI? |" in said  # answers before, and beside those after
    assert len(images(notebook)) >= 3  # the plan, curves.png, the figure under it; the quickstart draws its data too

    (out,) = tmp_path.glob("output/*")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS and all(0 < loss < 10 for loss in losses)
    assert any("eval_loss" in row for row in rows)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (out / "adapter").iterdir()}
    assert (out / "adapter.zip").stat().st_size > 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "hours", "planned"),
    [("tpu", "9.0", "qwen3-32b (qwen3) on v5e-8: 8 devices"), ("gpu", "12.0", "qwen3-14b (qwen3) on t4 x2: 2 devices")],
)
def test_a_kaggle_notebook_stops_in_time_and_goes_on_in_the_next_session(kind, hours, planned, tmp_path, monkeypatch):
    """With a tiny model and rows of its own, which are attached as a user's are."""
    model = write_tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    rows = write_rows(tmp_path / "rows.jsonl", 200)
    own = (('MODEL = ""', f"MODEL = {str(model)!r}"), ('DATA = ""', f"DATA = {str(rows)!r}"))
    path = PROJECT / "notebooks" / f"kaggle_{kind}_qlora.ipynb"
    sessions = [tmp_path / "first", tmp_path / "second"]
    for folder in sessions:
        folder.mkdir()
    over = (f"SESSION_HOURS = {hours}", "SESSION_HOURS = 0.0")  # the clock stops it after one step
    said = texts(executed(path, sessions[0], monkeypatch, over, *own))
    assert planned in said
    assert "starting anew" in said and f"not done yet: step 1 of {STEPS}" in said
    assert said.count("> What is AI?") == 1  # the model as it was
    assert not (sessions[0] / "output" / f"kaggle-{kind}" / "adapter").exists()

    shutil.copytree(sessions[0] / "output", sessions[1] / "input" / "my-notebook" / "output")
    notebook = executed(path, sessions[1], monkeypatch, *own)
    said, out = texts(notebook), sessions[1] / "output" / f"kaggle-{kind}"
    assert f"going on from input/my-notebook/output/kaggle-{kind}, step 1" in said
    assert f"finished: {STEPS} of {STEPS} steps" in said and "| What is AI? |" in said
    assert len(images(notebook)) >= 4  # two plans, curves.png, the figure under it
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert (out / "adapter.zip").is_file()


def test_a_run_is_taken_up_from_what_is_attached(tmp_path, capsys):
    from tpu_tune import notebook

    for name, steps in (("old/kaggle-tpu", ["50"]), ("new/output/kaggle-tpu", ["50", "100"]), ("new/other", ["900"])):
        for step in steps:
            (tmp_path / "input" / name / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "input" / name / "config.json").write_text(name)
    out = tmp_path / "working" / "kaggle-tpu"
    assert notebook.take_up(str(tmp_path / "input"), str(out)) == 100
    assert (out / "config.json").read_text() == "new/output/kaggle-tpu"
    (out / "checkpoints" / "150").mkdir()
    assert notebook.take_up(str(tmp_path / "input"), str(out)) == 150  # what this session has is not replaced
    assert notebook.take_up(str(tmp_path / "nothing"), str(tmp_path / "anew")) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in said] == ["going", "going", "no"]


def test_what_is_installed_is_pinned_within_what_the_project_needs():
    """Every pin is of a version that setup.cfg allows, and of a package that it, or jax with it, installs."""
    from packaging.requirements import Requirement

    settings = configparser.ConfigParser()
    settings.read(PROJECT / "setup.cfg")
    needed = {
        Requirement(line.split("#")[0]).name: Requirement(line.split("#")[0])
        for line in settings["options"]["install_requires"].splitlines()
        if line.split("#")[0].strip()
    }
    lines = (PROJECT / "launch" / "notebook_versions.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"jax", "flax", "optax", "orbax-checkpoint", "transformers"} <= pins.keys()
    for name, version in pins.items():
        assert name in needed or name.startswith(("jax", "libtpu")), name
        assert name not in needed or version in needed[name].specifier, name
    assert {pins[name] for name in pins if name.startswith("jax")} == {pins["jax"]}


def test_hours_left_are_counted_from_when_the_session_began(monkeypatch):
    from tpu_tune import notebook

    began = notebook.psutil.Process().create_time()
    monkeypatch.setattr(notebook.time, "time", lambda: began + 2 * 3600)
    assert notebook.hours_left(9.0, 0.75) == pytest.approx(6.25)
    assert 0 < notebook.hours_left(2.0) < 1e-3  # over, which must not read as no limit
