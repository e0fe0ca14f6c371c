"""Run the notebooks top to bottom, render them to build/ and hold their results to their bounds.

`make course` runs this; `make store` runs it with --store, which also keeps the executed
outputs in the repository. The tests import it to run notebooks in a short mode.
"""

import argparse
import base64
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from pages import page

try:
    import tomllib
except ModuleNotFoundError:                      # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
BOUNDS = ROOT / "tests" / "expected_results.toml"
SHORT_MODE = """
for _name, _value in vars(config).items():
    if _name.endswith("_steps"):
        setattr(config, _name, min(_value, 4))
    elif _name.endswith("_samples"):
        setattr(config, _name, min(_value, 64))
if hasattr(config, "pictures"):
    config.pictures = min(config.pictures or 520, 520)      # a quarter of them can be measured
"""
PEAK_MEMORY = """
import resource as _resource
print(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def notebooks():
    return sorted(ROOT.glob("unit*/*.ipynb"))


def has_tag(cell, tag):
    return tag in cell.metadata.get("tags", [])


def source_with(text, notebook):
    """Source of the one code cell of `notebook` that contains `text`."""
    found = [c.source for c in notebook.cells if c.cell_type == "code" and text in c.source]
    assert len(found) == 1, text
    return found[0]


def insert_after(notebook, tag, source):
    """Add a code cell behind the one tagged `tag`."""
    index = next(i for i, cell in enumerate(notebook.cells) if has_tag(cell, tag))
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))


def text_of(cell):
    """Everything that a cell printed to standard output."""
    return "".join(o.text for o in cell.get("outputs", []) if o.get("name") == "stdout")


def execute(notebook, folder, on_cell=None, profile="quick"):
    """Run every cell of `notebook` in `folder`; the kernel starts with this interpreter's path."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    os.environ["COURSE_PROFILE"] = profile
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", coalesce_streams=True,
                            resources={"metadata": {"path": str(folder)}}, on_cell_start=on_cell)
    client.execute()
    return notebook


def results_of(notebook):
    """The `name: value` lines of the cell tagged `results`, as a dict of floats."""
    cell = next(cell for cell in notebook.cells if has_tag(cell, "results"))
    pairs = (line.split(":", 1) for line in text_of(cell).splitlines() if ":" in line)
    return {name.strip(): float(value) for name, value in pairs}


def out_of_bounds(name, results, bounds):
    """One sentence for each expected result of notebook `name` that is missing or outside."""
    for bound in bounds:
        if bound["notebook"] != name:
            continue
        value = results.get(bound["name"])
        if value is None:
            yield f"{bound['name']} is missing"
        elif not bound["low"] <= value <= bound["high"]:
            yield (f"{bound['name']} = {value:g} is outside {bound['low']:g} to "
                   f"{bound['high']:g} ({bound['why']})")


def clean(notebook):
    """Leave only what a reader should see: no progress bars, widgets or warnings."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and
                            "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                        "language": "python"},
                         "language_info": {"name": "python"}}
    return notebook


def export_figures(notebook):
    """Write the picture of each cell that names a file in its `figure` metadata."""
    for cell in notebook.cells:
        if "figure" in cell.metadata:
            shown = [o.data for o in cell.outputs if "image/png" in o.get("data", {})]
            (ROOT / cell.metadata["figure"]).write_bytes(base64.b64decode(shown[0]["image/png"]))


def render(notebook, name):
    BUILD.mkdir(exist_ok=True)
    (BUILD / name).write_text(page(notebook), encoding="utf-8")


def run(path, store=False):
    """Run one notebook; returns (seconds, peak GiB, results), or raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK_MEMORY))
    total = len(notebook.cells)
    name = f"{path.parent.name}/{path.stem}"
    terminal = sys.stdout.isatty()               # only there can a line be rewritten
    started = time.time()

    def report(cell, cell_index):
        print(f"\r{name}: cell {cell_index + 1}/{total}, {time.time() - started:.0f} s",
              end="", flush=True)

    if not terminal:
        print(f"{name}: ", end="", flush=True)
    try:
        execute(notebook, path.parent, on_cell=report if terminal else None)
    finally:
        seconds = time.time() - started
        print("" if terminal else f"{seconds:.0f} s", flush=True)
    peak = float(text_of(notebook.cells.pop()))
    clean(notebook)
    render(notebook, f"{path.parent.name}-{path.stem}.html")
    if store:
        nbformat.write(notebook, path)
        export_figures(notebook)
    return seconds, peak, results_of(notebook)


def write_index(rows):
    items = "\n".join(f'<li><a href="{path.parent.name}-{path.stem}.html">'
                      f"{path.parent.name}: {path.stem.replace('_', ' ')}</a>, {seconds:.0f} s</li>"
                      for path, seconds, *_ in rows)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "index.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Diffusion models course'
        f"</title><h1>Diffusion models course</h1><ul>{items}</ul></html>\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks, all unless given")
    parser.add_argument("--store", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--figures", action="store_true",
                        help="only write the picture files from the stored outputs")
    args = parser.parse_args()
    if args.figures:
        for path in notebooks():
            export_figures(nbformat.read(path, as_version=4))
        return 0
    bounds = tomllib.loads(BOUNDS.read_text()).get("result", [])
    rows, failures = [], []
    for path in [p.resolve() for p in args.paths] or notebooks():
        name = f"{path.parent.name}/{path.name}"
        try:
            seconds, peak, results = run(path, args.store)
        except CellExecutionError as error:
            failures.append(f"{name}: a cell failed\n{error}")
            continue
        rows.append((path, seconds, peak, results))
        failures += [f"{name}: {problem}" for problem in out_of_bounds(name, results, bounds)]
    write_index(rows)
    for path, seconds, peak, results in rows:
        print(f"\n{path.parent.name}/{path.name}: {seconds:.0f} s, peak memory {peak:.2f} GiB")
        for key, value in results.items():
            print(f"  {key:<32} {value:g}")
    print("\nRendered pages: build/index.html")
    for failure in failures:
        print(f"\nFAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
