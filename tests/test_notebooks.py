"""The notebooks: stored state, size, a short run of every cell, exercises and their solutions."""

import ast
import re
from statistics import median

import nbformat
import pytest
from run_notebooks import (
    BOUNDS,
    ROOT,
    SHORT_MODE,
    execute,
    has_tag,
    insert_after,
    notebooks,
    out_of_bounds,
    results_of,
    text_of,
    tomllib,
)

PATHS = notebooks()
LIMITS = {                                       # code cells, code lines, median and longest cell
    "01_introduction_to_diffusers": (40, 430, 9, 25),
    "02_diffusion_models_from_scratch": (45, 620, 9, 25),
    "01_finetuning_and_guidance": (45, 560, 9, 25),
    "02_class_conditioned_diffusion_model_example": (36, 480, 9, 25),
}
IDS = [f"{path.parent.name}-{path.stem}" for path in PATHS]
every_notebook = pytest.mark.parametrize("path", PATHS, ids=IDS)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """(stub, check, solution) for each exercise: the cells and the solution's code."""
    cells = notebook.cells
    for i, cell in enumerate(cells):
        if has_tag(cell, "exercise"):
            following = next(c for c in cells[i + 1:] if c.cell_type == "code")
            assert has_tag(following, "check"), "a check cell follows each exercise"
            folded = cells[cells.index(following) + 1].source
            solution = re.search(r"```python\n(.*?)```", folded, re.DOTALL)
            assert "<details>" in folded and solution, "a folded solution follows each check"
            yield cell, following, solution.group(1)


@every_notebook
def test_stored_outputs_are_fresh_and_clean(path):
    """Executed in order from a fresh kernel, without errors, warnings or widgets, below 1 MB;
    what a cell prints stands in one piece."""
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size <= 1_000_000
    for cell in code_cells(notebook):
        assert sum(output.get("name") == "stdout" for output in cell.outputs) <= 1
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@every_notebook
def test_every_picture_has_alternative_text(path):
    for cell in read(path).cells:
        assert not re.search(r"!\[\s*\]\(", cell.source)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output.metadata.get("image/png", {}).get("alt") or output.metadata.get("alt")


@every_notebook
def test_anatomy(path):
    """One launch cell, one configuration cell, results last, five to eight exercises."""
    notebook = read(path)
    for tag in ("launch", "config", "results"):
        assert sum(has_tag(cell, tag) for cell in notebook.cells) == 1, tag
    assert has_tag(code_cells(notebook)[-1], "results")
    assert 5 <= len(list(exercises(notebook))) <= 8
    assert "pip install" not in "".join(
        c.source for c in code_cells(notebook) if not has_tag(c, "launch"))


@every_notebook
def test_stored_results_are_within_their_bounds(path):
    bounds = tomllib.loads(BOUNDS.read_text())["result"]
    name = f"{path.parent.name}/{path.name}"
    assert any(bound["notebook"] == name for bound in bounds)
    assert list(out_of_bounds(name, results_of(read(path)), bounds)) == []


@every_notebook
def test_size_is_within_its_limit(path):
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines())
             for cell in code_cells(read(path))]
    found = len(lines), sum(lines), median(lines), max(lines)
    assert all(n <= limit for n, limit in zip(found, LIMITS[path.stem], strict=True)), found


@every_notebook
def test_every_result_is_explained_in_a_text(path):
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert [name for name in results_of(notebook) if f"`{name}`" not in text] == []


@every_notebook
def test_no_private_functions_and_no_silenced_lint(path):
    code = "\n".join(cell.source for cell in code_cells(read(path)))
    assert not re.search(r"\b(torch|nn|F)(\.\w+)*\._[a-z]|noqa", code)


def functions(source):
    """The source of each function at the top level of a page or script, by name."""
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    return {node.name: ast.unparse(node) for node in ast.parse("\n".join(lines)).body
            if isinstance(node, ast.FunctionDef)}


def test_the_same_name_is_the_same_function_everywhere():
    """Whoever has read a function on one page knows it on all: notebooks and scripts."""
    homes = [("\n".join(c.source for c in code_cells(read(path)) if not has_tag(c, "exercise")),
              path.name) for path in PATHS]
    homes += [(path.read_text(), path.name) for path in sorted(ROOT.glob("unit*/*.py"))]
    first = {}
    for source, home in homes:
        for name, text in functions(source).items():
            if name in ("main", "parse_args"):
                continue
            other, where = first.setdefault(name, (text, home))
            assert text == other, f"{name} differs between {where} and {home}"


def test_launch_cell_is_the_same_everywhere():
    assert len({c.source for path in PATHS for c in read(path).cells if has_tag(c, "launch")}) == 1


def pictures_of(cell):
    return [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]


def own_deprecations(cell):
    """Deprecation warnings that a cell's own calls raised, not the inside of a library."""
    text = "".join(o.text for o in cell.get("outputs", []) if o.get("name") == "stderr")
    return [line for line in text.splitlines()
            if re.search(r"(Deprecation|Future)Warning", line) and "site-packages" not in line]


@pytest.mark.slow
@every_notebook
def test_short_run_with_every_cell_twice_with_stubs_then_with_solutions(path, tmp_path):
    """Every cell runs, twice in a row with the same figures, and calls nothing deprecated; an
    untouched stub does not pass its check, the solution does.

    All in one kernel: behind each cell stands its copy, and behind each check a copy with the
    solution in place. Cells tagged `timed` draw measured seconds, which differ.
    """
    notebook = read(path)
    insert_after(notebook, "config", SHORT_MODE)
    originals, found = code_cells(notebook), list(exercises(notebook))
    solved = []
    for _, check, solution in found:
        again = [nbformat.v4.new_code_cell(solution), nbformat.v4.new_code_cell(check.source)]
        index = notebook.cells.index(check)
        notebook.cells[index + 1:index + 1] = again
        solved.append(again[1])
    twins = []
    for cell in originals:
        twin = nbformat.v4.new_code_cell(cell.source)
        notebook.cells.insert(notebook.cells.index(cell) + 1, twin)
        twins.append(twin)
    (tmp_path / "course").symlink_to(path.parents[1])     # the launch cell looks there
    execute(notebook, tmp_path)
    for cell, twin in zip(originals, twins, strict=True):
        assert own_deprecations(cell) == []
        if not has_tag(cell, "timed"):
            assert pictures_of(cell) == pictures_of(twin), cell.source
    for (_, check, _), again in zip(found, solved, strict=True):
        lines = text_of(check).splitlines()
        assert lines and all("not attempted yet" in line for line in lines), text_of(check)
        lines = text_of(again).splitlines()
        assert lines and all(line.startswith("✓") for line in lines), text_of(again)
    assert results_of(notebook)
