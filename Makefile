# make course: run every notebook · make lab: open JupyterLab · make test: run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: course lab test test-lowest test-latest test-launch bench figures store slug clean

course: $(VENV)/installed
	$(BIN)/python tests/run_notebooks.py

lab: $(VENV)/installed
	$(BIN)/jupyter lab

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# the tests with the lowest versions that requirements.txt allows and this Python has wheels of
test-lowest: build/uv/bin/uv
	$(PYTHON) -m venv --clear build/$@
	build/uv/bin/uv pip compile --quiet --no-deps --only-binary :all: --resolution lowest \
		--python build/$@/bin/python requirements.txt tests/requirements.txt \
		--output-file build/$@.txt
	build/uv/bin/uv pip install --quiet --python build/$@/bin/python -r build/$@.txt
	build/$@/bin/python -m pytest

# the tests with the newest versions
test-latest: build/uv/bin/uv
	$(PYTHON) -m venv --clear build/$@
	build/uv/bin/uv pip install --quiet --python build/$@/bin/python \
		-r requirements.txt -r tests/requirements.txt
	build/$@/bin/python -m pytest

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv

# the notebooks' first cell for real: empty folder, bare and hosted Python; downloads gigabytes
test-launch: $(VENV)/installed
	$(BIN)/python -m pytest -m launch -rP --durations=0

# write the repository's address anew everywhere: make slug REPO=owner/name
slug: $(VENV)/installed
	$(BIN)/python tests/slug.py "$(REPO)"

# times and memory of the notebooks and helpers; a table, no verdict
bench: $(VENV)/installed
	$(BIN)/python tests/bench.py

# run the notebooks and keep their outputs in the repository
store: $(VENV)/installed
	$(BIN)/python tests/run_notebooks.py --store

# write the pictures that the pages use, from the notebooks' stored outputs and from code
figures: $(VENV)/installed
	$(BIN)/python tests/run_notebooks.py --figures
	$(BIN)/python tests/draw_figures.py

$(VENV)/installed: requirements.txt tests/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt \
		-c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build
