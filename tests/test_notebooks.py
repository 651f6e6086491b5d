"""That the check of the notebooks (nbval and notebooks/conftest.py) fails where it should, and what they may hold."""

import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
DRAW = """import matplotlib.pyplot as plt
figure, ax = plt.subplots(figsize=(3, 2))
ax.plot({data})
ax.set_title("{title}")
plt.show()
print("~ share {share}, exact {exact}")
print("count {count}")"""
AS_IT_WAS = {"data": "[1, 3, 2]", "title": "accuracy", "share": 0.5, "exact": 1, "count": 7}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with an executed notebook of one cell, and the notebooks' conftest."""
    folder = tmp_path_factory.mktemp("notebooks")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DRAW.format(**AS_IT_WAS))])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    nbformat.write(notebook, folder / "one.ipynb")
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(NOTEBOOKS / name, folder)
    return folder


@pytest.mark.parametrize("change, fails_with", [
    ({"share": 0.52}, None), ({"share": 0.6}, "share 0.6"), ({"count": 8}, "count 8"),
    ({"data": "[1, 2, 3]"}, "the picture differs"), ({"title": "loss per image and step"}, "the picture differs"),
    ("cleared", "never run"),
], ids=str)
def test_a_change_is_found(stored, tmp_path, change, fails_with):
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    notebook = nbformat.read(tmp_path / "one.ipynb", 4)
    if change == "cleared":
        notebook.cells[0].execution_count, notebook.cells[0].outputs = None, []  # nbval alone lets this pass
    else:
        notebook.cells[0].source = DRAW.format(**AS_IT_WAS | change)
    nbformat.write(notebook, tmp_path / "one.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env",
         "--nbval-sanitize-with", "sanitize.cfg", "--rootdir", tmp_path, "-c", "/dev/null", "one.ipynb"],
        cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (fails_with is None), done.stdout
    assert fails_with is None or fails_with in done.stdout


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_what_a_notebook_holds(path):
    text, notebook = path.read_text(), nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(text) < 1.5e6 and len(notebook.cells) <= 12
    assert notebook.cells[0].cell_type == "markdown" and code[0].source.startswith("LIVE = False")
    assert not re.search(r"/(work|root|home|tmp)/|\d\d:\d\d:\d\d", re.sub(r'"image/png": "[^"]*"', "", text))
    for cell in code:
        assert cell.execution_count, "not run"
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
