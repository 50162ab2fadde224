# make build   both programs into bin/
# make demo    the whole road once, on a simulated host
# make test    formatting, linters, fuzzing, all tests with the race detector
# make torture every operation failing, random walks and killed processes, for TORTURE=10m
# make bench   speeds and sizes, as ratios to other tools; IMAGES="a.raw b.raw" measures
#              given states of one disk, BENCH=--json prints objects; then what a
#              repository of SCALE=4096 GiB costs (6 GB in TMPDIR; SCALE=0 leaves it out)
# make tools   the linters and govc, into .cache/tools
# make clean   removes bin/ and .cache/

GO      ?= go
TOOLS   := $(CURDIR)/.cache/tools
# Version information comes from git; where git cannot be asked (a copy of the
# tree, another owner) the build goes on without it.
VCS     := -buildvcs=$(shell git -C '$(CURDIR)' status >/dev/null 2>&1 && echo true || echo false)

GOLANGCI_LINT_VERSION := v2.15.0
GOFUMPT_VERSION       := v0.12.0
# The newest that exists as a module of its own; a judge of the simulated host.
GOVC_VERSION          := v0.30.4

SCALE   ?= 4096

export PATH := $(TOOLS):$(PATH)

.PHONY: all build demo test lint fuzz torture bench tools clean

all: build

build:
	CGO_ENABLED=0 $(GO) build $(VCS) -trimpath -o bin/hikae ./cmd/hikae
	CGO_ENABLED=0 $(GO) build $(VCS) -trimpath -o bin/esxisim ./cmd/esxisim

demo: build
	@bash contrib/demo.sh

# The tests come last, so that their summary is what one sees.
test: lint
	@bash .ci/test.sh

lint:
	@bash .ci/lint.sh

fuzz:
	@bash .ci/fuzz.sh

torture:
	@TORTURE='$(TORTURE)' bash .ci/torture.sh

bench: build
	CGO_ENABLED=0 $(GO) build $(VCS) -trimpath -o bin/hikaebench ./cmd/hikaebench
	@IMAGES='$(IMAGES)' bin/hikaebench $(BENCH)
	@[ '$(SCALE)' = 0 ] || HIKAE_SCALE='$(SCALE)' $(GO) test -run '^$$' -bench Scale -benchtime 1x -timeout 60m ./repo

tools:
	@mkdir -p '$(TOOLS)'
	GOBIN='$(TOOLS)' $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	GOBIN='$(TOOLS)' $(GO) install mvdan.cc/gofumpt@$(GOFUMPT_VERSION)
	GOBIN='$(TOOLS)' $(GO) install github.com/vmware/govmomi/govc@$(GOVC_VERSION)

clean:
	rm -rf bin .cache
