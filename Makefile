# make course: run every notebook · make lab: open JupyterLab · make test: run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: course lab test test-lowest test-latest test-launch bench figures store slug clean

course: $(VENV)/installed
	$(BIN)/python tools/run_notebooks.py

lab: $(VENV)/installed
	$(BIN)/jupyter lab

test: $(VENV)/installed                          # two files at a time, each on one core
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the tests with the lowest versions that requirements.txt allows and this Python has wheels of
test-lowest: $(BIN)/uv
	$(PYTHON) -m venv --clear build/$@
	$(BIN)/uv pip compile --quiet --no-deps --only-binary :all: --resolution lowest \
		--python build/$@/bin/python requirements.txt tests/requirements.txt \
		--output-file build/$@.txt
	$(BIN)/uv pip install --quiet --python build/$@/bin/python -r build/$@.txt
	build/$@/bin/python -m pytest

# the tests with the newest versions
test-latest: $(BIN)/uv
	$(PYTHON) -m venv --clear build/$@
	$(BIN)/uv pip install --quiet --python build/$@/bin/python \
		-r requirements.txt -r tests/requirements.txt
	build/$@/bin/python -m pytest

# the notebooks' first cell for real: empty folder, bare and hosted Python; downloads gigabytes
test-launch: $(VENV)/installed
	$(BIN)/python -m pytest -m launch -rP --durations=0

# write the repository's address anew everywhere: make slug REPO=owner/name
slug: $(VENV)/installed
	$(BIN)/python tools/slug.py "$(REPO)"

# imports, sampling, training, loading, memory beside plain loops; a table, no verdict
bench: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python tools/bench.py

# run the notebooks and keep their outputs in the repository
store: $(VENV)/installed
	$(BIN)/python tools/run_notebooks.py --store

# write the pictures that the pages use, from the notebooks' stored outputs and from code
figures: $(VENV)/installed
	$(BIN)/python tools/run_notebooks.py --figures
	$(BIN)/python tools/draw_figures.py

$(VENV)/installed: requirements.txt tests/requirements.txt constraints.txt | $(BIN)/uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python \
		-r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@

# installs in a fraction of pip's time
$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv -c constraints.txt

clean:
	rm -rf $(VENV) build
