# `make` alone lists the targets. All packages are installed in .venv/ (tests: .venv-compat/ too).

PYTHON ?= python3
DOCKER ?= docker
BIN := .venv/bin
PYTEST := -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-compat finetune chat webui test test-fast test-all test-compat \
	lint lock lock-check audit audit-if-online clean docker-build docker-run docker-finetune image-test

# $(call quote,TEXT): TEXT as one word of the shell.
quote = '$(subst ','\'',$(1))'

# $(call timed,NAME,COMMAND): run a command between a heading and its seconds; fail if it fails.
define timed
	@echo; echo "== $(1)"; start=$$(date +%s); $(2) && echo "== $(1): $$(($$(date +%s) - start)) s"
endef

# One thread for each test process: with more threads than cores, torch is several times slower.
test-all test-fast test-compat: export OMP_NUM_THREADS = 1

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' Makefile | awk '{ printf "  %s %-15s", $$1, $$2; $$1 = $$2 = ""; print }'

setup: ## everything into .venv/ (TORCH_INDEX=URL: torch from there, remembered)
	@$(PYTHON) scripts/setup.py

setup-dev:
	@$(PYTHON) scripts/setup.py --extras dev

# `exec`: without a shell between make and the program, the program handles Ctrl-C.
finetune: setup ## fine-tune (RECIPE=recipes/NAME.yaml, SET="lora.rank=32 train.epochs=1")
	@exec $(BIN)/jetson-ft train$(if $(RECIPE), $(call quote,$(RECIPE)))$(foreach set,$(SET), --set $(call quote,$(set)))

chat: setup ## chat with the newest adapter (RUN=NAME: with that run's)
	@exec $(BIN)/jetson-ft chat$(if $(RUN), $(call quote,$(RUN)))

webui: setup ## the page on http://127.0.0.1:7860 (HOST=0.0.0.0: for the network, with a token)
	@exec $(BIN)/jetson-ft webui$(if $(HOST), --host $(call quote,$(HOST)))

# $(profile): the name of a file of build arguments, PROFILE or the one for this board's JetPack.
profile = $(or $(PROFILE),$(shell docker/profile.sh),$(error no profile for this board))
build_arguments = $(shell grep -v '^#' $(or $(wildcard docker/$(profile).env),$(error docker/$(profile).env not found)))

# ARGS adds build arguments: ARGS="PIP_INDEX_URL=https://…".
docker-build: export IMAGE ?= jetson-ft:$(profile)
docker-build: ## the container image (PROFILE=jp7: JetPack 7.2, ARGS="NAME=VALUE …": docs/docker.md)
	@exec $(DOCKER) build --file docker/Dockerfile --tag "$$IMAGE" \
		$(foreach arg,$(build_arguments) $(ARGS),--build-arg $(call quote,$(arg))) \
		--build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' jetson_ft/__init__.py)" \
		--build-arg REVISION="$$(git rev-parse --verify --quiet HEAD)" .

docker-run docker-finetune: export HOST := $(HOST)
docker-run docker-finetune: export IMAGE ?= jetson-ft:$(profile)
docker-run docker-finetune: export DOCKER := $(DOCKER)
docker-run: ## the page from the image (HOST=0.0.0.0: for the network, with a token)
	@exec docker/run.sh webui

docker-finetune: ## fine-tune in the image (RECIPE=NAME, SET="lora.rank=32 train.epochs=1")
	@exec docker/run.sh train$(if $(RECIPE), $(call quote,$(RECIPE)))$(foreach set,$(SET), --set $(call quote,$(set)))

image-test: ## build the image on a substitute for its base and use it (root, buildah; PROFILE=jp7, ARCH=arm64)
	@exec $(PYTHON) scripts/image_test.py $(if $(PROFILE),--profile $(call quote,$(PROFILE))) $(if $(ARCH),--arch $(call quote,$(ARCH)))

# In parallel, because they wait for different things: the package index, the processor, the disk.
# BESIDE names targets to make beside the last suite; .ci/run does so with image-test.
together := --no-print-directory --jobs=3 --output-sync=target
test: setup-dev ## everything CI runs
	@$(MAKE) $(together) lint lock-check audit-if-online setup-compat
	@$(MAKE) --no-print-directory test-all
	@$(MAKE) $(if $(BESIDE),$(together),--no-print-directory) test-compat $(BESIDE)

setup-compat:
	@$(PYTHON) scripts/setup.py --extras dev --compat

test-fast: setup-dev ## the tests that take seconds
	$(call timed,fast tests,$(BIN)/python $(PYTEST) -m "not slow")

test-all: setup-dev
	$(call timed,tests,$(BIN)/python $(PYTEST))

# Only the packages differ from test-all, so fewer random examples are enough, and what is
# the same with any packages is not repeated.
test-compat: setup-compat ## the fast tests once more with JetPack 6's packages (transformers 5.20.2, numpy 1.26)
	$(call timed,fast tests with JetPack 6's packages,.venv-compat/bin/python $(PYTEST) -m "not slow and not any_packages" --hypothesis-profile=brief)

lint: setup-dev ## style, types, import directions, declared packages, Dockerfile
	$(call timed,ruff,$(BIN)/ruff check && $(BIN)/ruff format --check)
	$(call timed,mypy,$(BIN)/mypy)
	$(call timed,import directions,$(BIN)/lint-imports --no-logo)
	$(call timed,declared packages,$(BIN)/deptry .)
	$(call timed,Dockerfile and shell scripts,$(BIN)/hadolint docker/Dockerfile && $(if $(filter x86_64,$(shell uname -m)),$(BIN)/shellcheck docker/*.sh .ci/run,true))

# Needs only uv: with broken pins, `make setup` fails until they are fixed.
lock: ## update the pins in constraints/ (UPGRADE=1: the newest versions that fit)
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q uv -c constraints/cpu.txt; }
	@$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

audit: setup-dev ## known holes in the pinned packages (needs a network; exit code 2 without one)
	@$(BIN)/python scripts/audit.py

# Without a network a line "SKIPPED …" says so; .ci/run repeats it at the end of the log.
audit-if-online: setup-dev
	$(call timed,known holes,$(BIN)/python scripts/audit.py --allow-offline)

lock-check: setup-dev
	$(call timed,pins,$(BIN)/python scripts/lock.py --check)

clean: ## remove the environments and caches (runs/ and downloaded models stay)
	@rm -rf .venv .venv-compat .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
