# make course: run every notebook · make lab: open JupyterLab · make test: run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: course lab test bench figures store clean

course: $(VENV)/installed
	$(BIN)/python tests/run_notebooks.py

lab: $(VENV)/installed
	$(BIN)/jupyter lab

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

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
