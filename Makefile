PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
ENGINE := $(OUT)/demo/engine
DEMO_RUN := $(BIN)/goc-run $(ENGINE) --num-images 40 --seed 1

.PHONY: demo test check format bench clean

demo: $(VENV)/installed  ## export the shipped checkpoint, run it without cache and with GOC, show the pictures
	$(BIN)/goc-export examples/mnist/dit_mnist.pt -o $(ENGINE) --num-heads 4 --plan none --plan fora:2 --plan fora:2+gc:1.0 --max-batch 40 --force
	$(DEMO_RUN) --plan none --output $(OUT)/demo/no-cache.png
	$(DEMO_RUN) --plan fora:2+gc:1.0 --output $(OUT)/demo/goc.png --report $(OUT)/demo/goc.json
	$(BIN)/python examples/show.py $(OUT)/demo/goc.png

test: $(VENV)/installed  ## run every test
	$(BIN)/python -m pytest

check: $(VENV)/installed  ## lint, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(ENGINE)/manifest.json  ## plans of the demo model side by side
	$(BIN)/goc-bench $(ENGINE)

$(ENGINE)/manifest.json:
	$(MAKE) demo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export,plot,dev]'
	@mkdir -p $(OUT)/demo
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
