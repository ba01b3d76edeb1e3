# make demo   set everything up in .venv and run the main job on the toy data
# make test   the tests; make check: ruff and mypy; make test-slow: those that
#             take minutes, such as the demonstration
# make benchmark  time and memory beside stock Detectron2, and docs/performance.md: 20 minutes
# make paper  the paper's experiments in miniature, 10 to 20 minutes, into docs/paper.md
# make docs   the documentation as a site in output/site
# make setup  only the installation; DETECTRON2=source builds upstream Detectron2 from GitHub

VENV ?= .venv
DETECTRON2 ?= wheel
PRETRAINED ?= yes
ifeq ($(PRETRAINED),yes)
RUN := output/demo
WEIGHTS := $(RUN)/pretraining/model_final.pth
else
RUN := output/demo-from-scratch
WEIGHTS := ""
endif
# The first Python that the requirements were locked for; if there is none, install.py says so.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3.10 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
	2>/dev/null && { echo $$name; exit; }; done; echo python3)
IN_VENV := $(VENV)/bin/python
CONFIG := configs/faster_rcnn_X_26_8x4d_FPN_toy.yaml

.PHONY: setup demo test test-slow smoke paper check benchmark docs clean

setup:
	@$(PYTHON) tools/install.py --folder $(VENV) --detectron2 $(DETECTRON2)

demo: setup
	rm -rf $(RUN)
	$(IN_VENV) tools/make_toy_coco.py
ifeq ($(PRETRAINED),yes)
	$(IN_VENV) tools/pretrain.py --recipe toy --output $(RUN)/pretraining
endif
	$(IN_VENV) tools/train_net.py --config-file $(CONFIG) \
		MODEL.WEIGHTS $(WEIGHTS) OUTPUT_DIR $(RUN)
	$(IN_VENV) tools/train_net.py --config-file $(CONFIG) --eval-only \
		MODEL.WEIGHTS $(RUN)/model_final.pth OUTPUT_DIR $(RUN)
	$(IN_VENV) tools/report.py $(RUN)

test: setup
	$(IN_VENV) -m pytest

test-slow: setup
	$(IN_VENV) -m pytest -m slow --timeout=1800

# A quick check of an installation, about a minute.
smoke: setup
	$(IN_VENV) -m pytest tests/test_install.py tests/test_config.py tests/modeling/test_resnext.py \
		tests/engine/test_recorded_config.py

benchmark: setup
	$(IN_VENV) tools/benchmark.py --output output/benchmark
	$(IN_VENV) tools/benchmark.py --output output/benchmark --page docs/performance.md

paper: setup
	$(IN_VENV) tools/paper.py --run output/paper --output docs

docs: setup
	$(IN_VENV) -m mkdocs build --quiet

check: setup
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

clean:
	rm -rf $(VENV) output build dist *.egg-info
