"""That the check of the notebooks (nbval and notebooks/conftest.py) fails where it should, and what they may hold."""

import copy
import importlib.util
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
print("~ share {share}, exact {exact}", "~ more 1", "count {count}", sep=chr(10))"""
AS_IT_WAS = {"data": "[1, 3, 2]", "title": "accuracy", "share": 0.5, "exact": 1, "count": 7}


CHANGES = {  # what is changed -> what the failure says of it
    "nothing": ({}, None), "rounding": ({"share": 0.52}, None), "share": ({"share": 0.6}, "share 0.6"),
    "count": ({"count": 8}, "count 8"), "data": ({"data": "[1, 2, 3]"}, "the picture differs"),
    "title": ({"title": "loss per image and step"}, "the picture differs"), "cleared": ({}, "never run"),
    "split": ({}, None),  # a flush between the two lines: nothing is wrong
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What pytest says of a notebook of one cell after each of the changes, {name: text}."""
    folder = tmp_path_factory.mktemp("notebooks")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DRAW.format(**AS_IT_WAS))])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    for name, (change, _) in CHANGES.items():
        changed = copy.deepcopy(notebook)
        changed.cells[0].source = DRAW.format(**AS_IT_WAS | change)
        if name == "cleared":  # nbval alone lets this pass
            changed.cells[0].execution_count, changed.cells[0].outputs = None, []
        if name == "split":
            printed = next(o for o in changed.cells[0].outputs if o.output_type == "stream")
            lines = printed.text.splitlines(keepends=True)
            printed.text = lines[0]
            changed.cells[0].outputs.append(nbformat.from_dict(printed | {"text": "".join(lines[1:])}))
        nbformat.write(changed, folder / f"{name}.ipynb")
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(NOTEBOOKS / name, folder)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null", folder],
        cwd=folder, capture_output=True, text=True)
    parts = re.split(r"^_+ (\w+)\.ipynb::Cell 0 _+$", done.stdout, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) | {"passed": re.search(r"(\d+) passed", done.stdout)[1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(report, name):
    _, fails_with = CHANGES[name]
    assert (name in report) == (fails_with is not None)
    assert fails_with is None or fails_with in report[name]
    assert report["passed"] == "3"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_what_a_notebook_holds(path):
    text, notebook = path.read_text(), nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(text) < 1.5e6 and len(notebook.cells) <= 12
    assert notebook.cells[0].cell_type == "markdown" and "FIGURES = None" in code[0].source
    assert not re.search(r"/(work|root|home|tmp)/|\d\d:\d\d:\d\d", re.sub(r'"image/png": "[^"]*"', "", text))
    for cell in code:
        assert cell.execution_count, "not run"
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)


def test_the_saved_figures_are_those_of_the_notebooks():
    spec = importlib.util.spec_from_file_location("notebooks_conftest", NOTEBOOKS / "conftest.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    shown = {}
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if name := re.search(r'show\.finish\(figure, "([\w-]+)"', cell.source):
                shown[name[1]], = check.pictures_in(cell.outputs)
    saved = {path.stem: path.read_bytes() for path in (NOTEBOOKS / "figures").glob("*.png")}
    in_readme = re.findall(r"notebooks/figures/([\w-]+)\.png", (NOTEBOOKS.parent / "README.md").read_text())
    assert in_readme and set(in_readme) <= saved.keys() <= shown.keys()
    for name, png in saved.items():
        check.check_picture(png, shown[name])
