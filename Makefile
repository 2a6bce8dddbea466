# make demo   a fresh machine to a driven arm: environment, packages, offscreen GL, then `vla demo`
# make test   everything the tests need (LIBERO and robosuite too), then ruff, mypy, pytest
# make clean  removes the environment and the caches, never data or results

VENV    ?= .venv
BIN     := $(VENV)/bin
PYTHONS := python3.11 python3.12 python3.10 python3.13 python3
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
BASE    := $(VENV)/.base-installed
TEST    := $(VENV)/.test-installed
USER_ID := $(shell id -u)

# Rooms that hold numpy only, and what runs beside the arm: checked strictly.
TYPED := vla/errors.py vla/types.py vla/embodiment.py vla/policy.py vla/resources.py vla/files.py vla/runtime vla/tokenizers \
         vla/cli policies/hold.py policies/parts.py policies/remote ros_nodes

.PHONY: demo test install gl libero lint types unit clean
.DEFAULT_GOAL := demo

demo: gl
	$(BIN)/vla demo $(ARGS)

install: $(BASE)

$(VENV)/bin/python:
	@for candidate in $(PYTHON) $(PYTHONS); do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "environment: $(VENV) with $$($$candidate --version)"; \
	    $$candidate -m venv $(VENV) 2>/dev/null && exit 0; \
	    rm -rf $(VENV); \
	    package=$$($$candidate -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    if [ "$(USER_ID)" = 0 ] && command -v apt-get >/dev/null; then \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$package && \
	      $$candidate -m venv $(VENV) && exit 0; \
	    fi; \
	    echo "Making $(VENV) failed. Run:  sudo apt-get update && sudo apt-get install -y $$package" >&2; exit 1; \
	  fi; \
	done; \
	echo "Python 3.10 to 3.13 is needed; none was found. Name one:  make PYTHON=/path/to/python3.11" >&2; exit 1

# torch first and alone: nothing that is installed later may choose another build of it.
$(BASE): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --upgrade pip
	$(PIP) install torch -c constraints.txt
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(TEST): $(BASE)
	$(PIP) install -e '.[test]' -c constraints.txt
	@touch $@

gl: $(BASE)
	@$(BIN)/vla doctor --only gl >/dev/null && exit 0; \
	if [ "$(USER_ID)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "offscreen GL: installing libosmesa6"; apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libosmesa6 || \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libegl1 libgl1-mesa-dri; \
	  $(BIN)/vla doctor --only gl; \
	else \
	  echo "No offscreen GL library. Run:  sudo apt-get update && sudo apt-get install -y libosmesa6" >&2; exit 1; \
	fi

# Assets come from VLA_LIBERO_ASSETS or an earlier `vla setup libero --assets DIR`, else they are downloaded. Named
# assets must work; where there are none and no network, the tests that need them are skipped and say so.
libero: $(TEST)
	@if [ -n "$$VLA_LIBERO_ASSETS" ]; then $(BIN)/vla setup libero; \
	else $(BIN)/vla setup libero --download || echo "LIBERO: no assets, its tests will be skipped"; fi

test: gl libero lint types unit

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST)
	$(BIN)/mypy $(TYPED)

unit: $(TEST)
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
