# make up      a whole grid on this machine, with PocketBase deployed by a signed contract
# make test    all tests
# make help    the rest

export GOTOOLCHAIN = local
export CGO_ENABLED ?= 0
DIR ?=
HOLDFAST = bin/holdfast $(if $(DIR),--dir $(DIR))
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 20s

.PHONY: help
help: ## say what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: up
up: setup build images ## start a grid and deploy PocketBase on it
	$(HOLDFAST) up --detach
	$(HOLDFAST) deploy examples/pocketbase/compose.yaml --yes --wait
	@echo; $(HOLDFAST) status

.PHONY: down
down: ## end the grid; its data stays
	@[ -x bin/holdfast ] && $(HOLDFAST) down || true

.PHONY: clean
clean: ## end the grid and remove its data and what was built
	@[ -x bin/holdfast ] && $(HOLDFAST) down --data || true
	rm -rf bin

.PHONY: setup
setup:
	@scripts/setup.sh

.PHONY: setup-test
setup-test:
	@scripts/setup.sh test

.PHONY: build
build: bin/holdfast-runsc ## build bin/holdfast and bin/holdfast-runsc
	go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/holdfast ./cmd/holdfast

# gVisor takes minutes to compile, and changes with its module only.
bin/holdfast-runsc: runsc/go.mod runsc/go.sum runsc/main.go
	cd runsc && go build -trimpath -ldflags "-s -w" -o ../bin/holdfast-runsc .
	@touch $@

# What tests play against an S3 server. versitygw and mc change with their modules only.
.PHONY: s3tools
s3tools: bin/versitygw bin/mc bin/s3clients ## build the S3 clients and the peer that tests execute

bin/versitygw: tools/s3/go.mod tools/s3/go.sum
	cd tools/s3 && go build -trimpath -ldflags "-s -w" -o ../../$@ github.com/versity/versitygw/cmd/versitygw
	@touch $@

bin/mc: tools/s3/mc/go.mod tools/s3/mc/go.sum
	cd tools/s3/mc && go build -trimpath -ldflags "-s -w" -o ../../../$@ github.com/minio/mc
	@touch $@

bin/s3clients: tools/s3/go.mod tools/s3/go.sum $(wildcard tools/s3/clients/*.go)
	cd tools/s3 && go build -trimpath -ldflags "-s -w" -o ../../$@ ./clients
	@touch $@

.PHONY: images
images: ## build the images of the examples
	cd examples/images && go run ./build

.PHONY: image
image: build ## build what a node boots, in bin/image
	bin/holdfast image build --out bin/image

.PHONY: vm
vm: setup-test build images ## boot a node in an emulated machine, once: deploy on it, cut its power, boot it again
	scripts/vm.sh

.PHONY: check
check: setup-test build lint ## build, vet, staticcheck, unit tests: what every commit passes
	go test -short ./...

.PHONY: lint
lint: ## gofmt, vet and staticcheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "gofmt: $$out"; exit 1; }
	go vet ./...
	cd tools && go build -o ../bin/staticcheck honnef.co/go/tools/cmd/staticcheck
	bin/staticcheck ./...

.PHONY: test
test: setup-test build images s3tools lint ## everything but the long forms
	scripts/test.sh

.PHONY: test-long
test-long: setup-test build images s3tools lint ## everything, long forms too
	HOLDFAST_LONG=1 scripts/test.sh -timeout 60m

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME
	scripts/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: build images ## compare with peers; prints JSON lines
	@for b in bench/*/run.sh; do $$b; done
