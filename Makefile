# One-line aliases of course.py, which works without make: `make train ARGS="--stages 2 --micro-batches 8"`.
PYTHON ?= python3

help: ; @$(PYTHON) course.py
lab: ; $(PYTHON) course.py lab $(ARGS)
test: ; $(PYTHON) course.py test $(ARGS)
check: ; $(PYTHON) course.py check $(ARGS)
train: ; $(PYTHON) course.py train $(ARGS)
fingerprint: ; $(PYTHON) course.py fingerprint $(ARGS)
build: ; $(PYTHON) course.py build $(ARGS)
progress: ; $(PYTHON) course.py progress $(ARGS)
unit: ; $(PYTHON) course.py unit $(ARGS)
wheelhouse: ; $(PYTHON) course.py wheelhouse $(ARGS)
feedback-report: ; $(PYTHON) course.py feedback-report $(ARGS)
nbgrader: ; $(PYTHON) course.py nbgrader $(ARGS)
bench: ; $(PYTHON) course.py bench $(ARGS)
soak: ; $(PYTHON) course.py soak $(ARGS)

.PHONY: help lab test check train fingerprint build progress unit wheelhouse feedback-report nbgrader bench soak
