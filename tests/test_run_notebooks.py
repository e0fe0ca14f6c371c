"""The runner behind `make course`: it must fail when a cell or a result does."""

import re
import sys

import nbformat
import pytest
import run_notebooks

BOUND = {"notebook": "unit1/a.ipynb", "name": "loss", "low": 0.1, "high": 0.2, "why": "measured"}


@pytest.mark.parametrize("results, problems", [
    ({"loss": 0.15}, []),
    ({"loss": 0.3}, ["loss = 0.3 is outside 0.1 to 0.2 (measured)"]),
    ({"loss": float("nan")}, ["loss = nan is outside 0.1 to 0.2 (measured)"]),
    ({}, ["loss is missing"]),
])
def test_results_are_held_to_their_bounds(results, problems):
    assert list(run_notebooks.out_of_bounds("unit1/a.ipynb", results, [BOUND])) == problems
    assert list(run_notebooks.out_of_bounds("unit1/b.ipynb", results, [BOUND])) == []


def notebook_with(source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["results"]})
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.slow
@pytest.mark.parametrize("source, status, sentence", [
    ("print('loss: 0.15')", 0, "loss"),
    ("print('loss: 0.5')", 1, "FAILED unit1/a.ipynb: loss = 0.5 is outside"),
    ("1 / 0", 1, "FAILED unit1/a.ipynb: a cell failed"),
])
def test_exit_status(tmp_path, monkeypatch, capsys, source, status, sentence):
    (tmp_path / "unit1").mkdir()
    path = tmp_path / "unit1" / "a.ipynb"
    nbformat.write(notebook_with(source), path)
    bounds = tmp_path / "bounds.toml"
    bounds.write_text('[[result]]\nnotebook = "unit1/a.ipynb"\nname = "loss"\n'
                      'low = 0.1\nhigh = 0.2\nwhy = "measured"\n')
    monkeypatch.setattr(run_notebooks, "BOUNDS", bounds)
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    monkeypatch.setattr("sys.argv", ["run_notebooks.py", str(path)])
    assert run_notebooks.main() == status
    shown = capsys.readouterr()
    assert sentence in shown.out + shown.err
    assert re.match(r"unit1/a: \d+ s\n", shown.out)          # no terminal: one line a notebook
    assert (tmp_path / "build" / "index.html").exists()


@pytest.mark.slow
def test_on_a_terminal_the_progress_is_one_line_rewritten(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.ipynb"
    nbformat.write(notebook_with("print('loss: 0.15')"), path)
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_notebooks.run(path)
    assert re.fullmatch(r"(\r\S+/a: cell \d/2, \d+ s){2}\n", capsys.readouterr().out)
