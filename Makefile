.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
BUILD ?= .
# Outputs are made and compared with one thread each; two workers share the cores.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := passive
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: help book test status notebooks notebooks-all bench gpu gpu-translate lab serve links lint lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv: once, in a minute or a few"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[book,lab,test]'
	@touch $@

book: .venv/ready ## render the book into _build/html
	rm -rf "$(BUILD)/_build"
	$(BIN)/jupyter-book build . --path-output "$(BUILD)" -W -n --keep-going

test: .venv/ready lint ## run every test: package, notebooks, site
	$(BIN)/pytest -n 2 --dist loadfile --junitxml=_build/tests.xml

status: .venv/ready ## keep what the last run of all tests has found, for the page on the book's state
	$(BIN)/python tools/status.py _build/tests.xml

notebooks: .venv/ready ## run the notebooks whose text has changed and store their outputs
	$(BIN)/python tools/notebooks.py build

notebooks-all: .venv/ready ## run all notebooks anew: after a change in tfm_ref
	$(BIN)/python tools/notebooks.py build --all

bench: .venv/ready ## print how fast the package is against others, on one thread of the CPU
	$(BIN)/pytest --quiet --capture=no tests/test_speed.py

gpu: ## on CUDA, with the Python that is active: tests, then all measurements, into the folder OUT
	TFM_REF_DEVICE=cuda $(PYTHON) -m pytest -o addopts=--import-mode=importlib -k "not hopper" \
		tests/test_flash_triton.py tests/test_decode_triton.py tests/test_bench.py \
		tests/test_records.py tests/test_candidates.py tests/test_comparison.py \
		tests/test_benchmarks.py tests/test_flash.py \
		tests/test_multi_head.py tests/test_fused.py tests/conformance/test_conformance.py \
		tests/test_training.py::test_fit_on_cuda
	$(PYTHON) -m tfm_ref.benchmarks "$(or $(OUT),tfm_ref/results)"

gpu-translate: ## train the base model on Multi30k in the folder DATA, and record it in the folder OUT
	$(PYTHON) tools/translate.py "$(DATA)" --out "$(or $(OUT),_build/multi30k)"

lab: .venv/ready ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks

serve: book ## render the book and serve it on localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

links: .venv/ready ## follow every link of the book (needs the network)
	$(BIN)/jupyter-book build . --builder linkcheck

lint: .venv/ready ## check style, and that each notebook agrees with its text
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/notebooks.py check

lock: ## write the versions that are installed into constraints.txt
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## delete all that was built, the environment too
	rm -rf .venv _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
