PYTHON ?= python3
VENV ?= .venv
OUT ?= out
FUZZ_SECONDS ?= 600
BIN := $(VENV)/bin
ENGINE := $(OUT)/demo/engine
EMOJI := $(OUT)/demo/emoji
DRAWN := fox pizza rocket penguin ladybug whale hamburger panda
SUITE := $(BIN)/python benchmarks/suite.py --output $(OUT)/bench
UNCACHED := pytorch none,torch.compile,diffusers,one graph,ours none
WORK ?= $(OUT)/gpu
# GPU targets install nothing and need no network: they take $(VENV) if it is there, else $(PYTHON) as it is.
HERE = $(if $(VENV),$(or $(wildcard $(BIN)/python),$(if $(filter file,$(origin VENV)),$(PYTHON),$(error VENV=$(VENV) has no bin/python))),$(PYTHON))
ON_GPU = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(HERE)
GPU_OPTIONS = $(if $(DRY),--dry) $(if $(REPORTS),--output $(REPORTS)) $(ARGS)

.PHONY: demo test fuzz test-gpu bench-gpu check format bench bench-full clean

demo: $(VENV)/installed  ## export two shipped models, draw digits and emoji, compare no cache, plain reuse and GOC
	$(BIN)/goc-export examples/mnist/dit_mnist.pt -o $(ENGINE) --num-heads 4 --plan none --plan fora:2 --plan fora:2+goc --cfg-scale 4 --max-batch 40 --force
	$(BIN)/goc-run $(ENGINE) --plan fora:2+goc --num-images 40 --seed 7 --output $(OUT)/demo/goc.png --report $(OUT)/demo/goc.json
	$(BIN)/goc-export examples/emoji/pixart_emoji.safetensors -o $(EMOJI) --num-heads 6 --sampler dpm++ --prediction x0 --text-encoder examples/emoji/text_encoder --captions examples/emoji/prompts.txt --plan none --plan fora:2 --plan fora:2+goc --cfg-scale 2 --force
	$(BIN)/python examples/compare.py $(EMOJI) $(DRAWN:%=--prompt "a %") --cfg-scale 2 --seed 7 --output $(OUT)/demo/comparison.png

test: $(VENV)/installed  ## run every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 5

fuzz: demo  ## mutants of every kind of file, for minutes; nothing but an error of ours may come out
	$(BIN)/python -m tests.fuzz.run $(ENGINE) --seconds $(FUZZ_SECONDS)

test-gpu:  ## what needs a CUDA device, in 4 minutes (docs/gpu.md); DRY=1: without one
	@$(ON_GPU) benchmarks/on_gpu/ready.py $@
	$(ON_GPU) -m tests.on_gpu $(GPU_OPTIONS)

bench-gpu:  ## what a CUDA device does with DiT-XL/2 beside PyTorch, in 6 minutes; DRY=1: a tiny model on the CPU
	@$(ON_GPU) benchmarks/on_gpu/ready.py $@
	$(ON_GPU) benchmarks/gpu.py $(if $(DRY),,--work $(WORK)) $(GPU_OPTIONS)

check: $(VENV)/installed  ## lint, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench-installed  ## beside PyTorch, torch.compile, diffusers and one ONNX graph: minutes
	$(SUITE) --model demo --batch 1 --batch 4 --batch 16
	$(SUITE) --model S/2 --batch 1 --batch 4

bench-full: bench  ## and DiT-B/2, DiT-XL/2, bigger batches, and scaling curves: hours
	$(SUITE) --model S/2 --batch 16 --steps 4 --rounds 2
	$(SUITE) --model B/2 --batch 1 --steps 10 --rounds 2
	$(SUITE) --model B/2 --batch 4 --steps 2 --rounds 7 --only '$(UNCACHED),ours fora:2+gc'
	$(SUITE) --model B/2 --batch 16 --steps 2 --rounds 2 --only '$(UNCACHED),ours fora:2+gc'
	$(SUITE) --model XL/2 --batch 1 --rounds 2
	$(SUITE) --model XL/2 --batch 4 --steps 2 --rounds 2 --only '$(UNCACHED),ours fora:2+gc'
	$(SUITE) --model XL/2 --batch 16 --steps 2 --rounds 1 --only 'pytorch none,one graph,ours none,ours fora:2+gc'
	$(BIN)/python benchmarks/scaling.py --output $(OUT)/bench

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export,plot,dev]'
	@mkdir -p $(OUT)/demo
	touch $@

$(VENV)/bench-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export,plot,dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
