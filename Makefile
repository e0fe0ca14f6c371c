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
	$(BIN)/python -m pytest -m "not launch"

# the tests with the lowest versions that requirements.txt allows, and with the newest
test-lowest: INSTALL := --resolution lowest-direct
test-lowest test-latest:
	$(PYTHON) -m venv --clear build/$@
	build/$@/bin/python -m pip install --quiet uv
	build/$@/bin/uv pip install --quiet --python build/$@/bin/python --only-binary :all: \
		$(INSTALL) -r requirements.txt -r tests/requirements.txt
	build/$@/bin/uv pip freeze --python build/$@/bin/python > build/$@.txt
	build/$@/bin/python -m pytest -m "not launch"

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

# write the pictures that the pages use from the notebooks' stored outputs
figures: $(VENV)/installed
	$(BIN)/python tests/run_notebooks.py --figures

$(VENV)/installed: requirements.txt tests/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt \
		-c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build
