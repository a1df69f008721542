# One-line aliases of course.py, which works without make: `make train ARGS="--stages 2 --micro-batches 8"`.
PYTHON ?= python3

help: ; @$(PYTHON) course.py
lab: ; $(PYTHON) course.py lab $(ARGS)
test: ; $(PYTHON) course.py test $(ARGS)
check: ; $(PYTHON) course.py check $(ARGS)
train: ; $(PYTHON) course.py train $(ARGS)
fingerprint: ; $(PYTHON) course.py fingerprint $(ARGS)
build: ; $(PYTHON) course.py build $(ARGS)
bench: ; $(PYTHON) course.py bench $(ARGS)
soak: ; $(PYTHON) course.py soak $(ARGS)

.PHONY: help lab test check train fingerprint build bench soak
