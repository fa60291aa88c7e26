# Needs only make and Python >= 3.11. Variables: TORCH=auto|cpu|cuda (which build of PyTorch), PYTHON=... (which interpreter),
# BUDGET=5m (what quickstart and assistant may spend), TESTS=... (what `make test` runs), REV=COMMIT or SAVE=1 (for `make golden`).
TORCH ?= auto
BUDGET ?= 5m
TESTS ?=
WORKERS ?= auto
REV ?=
SAVE ?=

.PHONY: help quickstart assistant test golden lint clean

help:
	@echo "make quickstart   install into .venv, train for $(BUDGET) on the Python standard library's source, show what the model writes"
	@echo "make assistant    install into .venv, fetch SmolLM2-135M (93 MB), teach it for $(BUDGET) to answer questions about Sparing"
	@echo "make test         install into .venv-test and run the tests (TESTS='tests/data -x' narrows them)"
	@echo "make golden       compare the losses of small runs with those stored; REV=COMMIT: with a commit's; SAVE=1: store them"
	@echo "make lint         ruff, from .venv-test"
	@echo "make clean        remove the environments and caches; runs/ stays"
	@echo "variables         TORCH=auto|cpu|cuda  PYTHON=python3.12  BUDGET=5m"

# The first interpreter that is new enough; a PYTHON given by hand is the only candidate.
FIND_PYTHON = for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; python=; done; \
	[ -n "$$python" ] || { echo "sparing: needs Python 3.11 or newer ($(or $(PYTHON),python3) is older or missing); name one with make PYTHON=..." >&2; exit 2; }

# Each quickstart trains into a folder of its own: nothing is overwritten, and an interrupted one says itself how it goes on.
quickstart:
	@$(FIND_PYTHON); "$$python" tools/environment.py .venv --torch $(TORCH)
	@out=runs/quickstart; n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/quickstart-$$n; done; \
	.venv/bin/sparing train --budget $(BUDGET) --out "$$out" --samples 3

# The fetched model stays in runs/smollm2-135m for the next time.
assistant:
	@$(FIND_PYTHON); "$$python" tools/environment.py .venv --extra gguf,serve --torch $(TORCH)
	@[ -e runs/smollm2-135m/config.toml ] || { mkdir -p runs && .venv/bin/sparing fetch smollm2-135m --out runs/smollm2-135m; }
	@out=runs/assistant; n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/assistant-$$n; done; \
	.venv/bin/sparing sft runs/smollm2-135m --data recipes/assistant/questions.jsonl --budget $(BUDGET) --out "$$out" && \
	echo "to chat: .venv/bin/sparing chat $$out   in a browser: .venv/bin/sparing serve $$out"

test:
	@$(FIND_PYTHON); "$$python" tools/environment.py .venv-test --extra dev --torch $(TORCH)
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -q -n $(WORKERS) $(TESTS)

golden:
	@$(FIND_PYTHON); "$$python" tools/environment.py .venv-test --extra dev --torch $(TORCH)
	.venv-test/bin/python tools/golden.py $(if $(REV),--rev $(REV)) $(if $(SAVE),--save)

lint:
	@$(FIND_PYTHON); "$$python" tools/environment.py .venv-test --extra dev --torch $(TORCH)
	.venv-test/bin/ruff check .

clean:
	rm -rf .venv .venv-test build dist .pytest_cache .hypothesis .ruff_cache src/*.egg-info
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
