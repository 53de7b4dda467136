# Programs are built into bin/. The demo lives in .demo/, and what tests keep is in .test/.

GOOS    := $(shell go env GOOS)
GOARCH  := $(shell go env GOARCH)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

# The server is for Linux; elsewhere there is the CLI.
PROGRAMS := ./cmd/shed $(if $(filter linux,$(GOOS)),./cmd/shed-server)

# Tests make images and kernels once and keep them here.
CACHE := $(CURDIR)/.test/cache

FUZZTIME ?= 10s

# Such as -image full, for the figures of that image.
BENCHFLAGS ?=

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## Install what shed-server needs and this machine lacks (apt-get)
	@scripts/deps

.PHONY: build
build: ## Build the programs into bin/
	go build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ $(PROGRAMS)
	CGO_ENABLED=0 GOOS=linux go build -trimpath -ldflags '-s -w' -o bin/shed-agent-linux-$(GOARCH) ./cmd/shed-agent

.PHONY: demo
demo: ## Start a server with one shed, all of it below .demo/
	@scripts/demo up

.PHONY: demo-down
demo-down: ## End the demo and remove all of it
	@scripts/demo down

.PHONY: test
test: ## Run all tests, those that boot VMs and build images too
	@scripts/deps test
	SHED_TEST_BUILD=1 SHED_TEST_CACHE=$(CACHE) go test -count=1 -timeout 20m ./...

.PHONY: test-race
test-race: ## Run the tests that boot no VM under the race detector
	@scripts/deps test
	go test -race -timeout 20m . ./cmd/... ./internal/...

.PHONY: lint
lint: ## Check format, vet, staticcheck and which package may import which
	@files=$$(gofmt -l *.go */); test -z "$$files" || { echo "not formatted with gofmt: $$files"; exit 1; }
	go vet ./...
	GOOS=darwin go vet . ./cmd/shed ./internal/api ./internal/sshd
	go tool staticcheck ./...
	go test -count=1 ./internal/deptest

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (10s)
	@scripts/fuzz $(FUZZTIME)

.PHONY: bench
bench: build ## Measure what users wait for
	@scripts/deps bench
	go run ./test/bench $(BENCHFLAGS)

.PHONY: clean
clean: ## Remove what was built and what tests keep
	rm -rf bin .test
