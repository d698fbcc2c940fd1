# make, make run, make test, make demo, make static, make image, make install

CC = cc
# Small, and as fast: nearly all of its time is the kernel's.
CFLAGS = -Os -fno-plt -fno-asynchronous-unwind-tables
PREFIX = /usr/local
DOCKER = docker
# The first of these that is here runs the demo.
TF = terraform tofu

# Who links without shared libraries: musl if it is here, else libc's archive;
# for make image ARCH=arm64 and the like one of Debian's cross compilers. On a
# Mac, or for others, give STATIC_CC='zig cc -target aarch64-linux-musl'.
CC_ = $$(command -v musl-gcc || echo $(CC))
CC_amd64 = x86_64-linux-gnu-gcc
CC_arm = arm-linux-gnueabihf-gcc
CC_arm64 = aarch64-linux-gnu-gcc
CC_riscv64 = riscv64-linux-gnu-gcc
CC_s390x = s390x-linux-gnu-gcc
STATIC_CC = $(CC_$(ARCH))
STATIC = $(STATIC_CC) $(CFLAGS) -static -s -pthread $(LDFLAGS) statesrv.c

all: statesrv

statesrv: statesrv.c Makefile
	$(CC) $(CFLAGS) -pthread $(LDFLAGS) -o $@ statesrv.c

# One file that runs on any Linux of its processor, in the place of the other.
static: statesrv.c
	$(STATIC) -o statesrv

run: statesrv
	./statesrv

test:
	./test.sh

install: statesrv
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 statesrv $(DESTDIR)$(PREFIX)/bin/statesrv

clean:
	rm -f statesrv

# A static binary and an empty directory, for docker or podman: no base image,
# no Dockerfile. /states is open to all, so that any -u may have a volume there.
image: statesrv.c
	d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && arch=$(ARCH) && \
	: $${arch:=$$(uname -m | sed 's/x86_64/amd64/;s/aarch64/arm64/')} && \
	$(STATIC) -o "$$d/statesrv" && cd "$$d" && mkdir -m 777 states && \
	tar --owner=0 --group=0 -cf layer.tar statesrv states && \
	printf '%s' '[{"Config":"config.json","Layers":["layer.tar"],' \
	    '"RepoTags":["statesrv:latest"]}]' >manifest.json && \
	printf '%s' '{"os":"linux","architecture":"' "$$arch" '",' \
	    '"rootfs":{"type":"layers","diff_ids":["sha256:' \
	    "$$(sha256sum layer.tar | cut -d ' ' -f 1)" '"]},"config":{' \
	    '"Entrypoint":["/statesrv","-d","/states","-l","0.0.0.0:8080"],' \
	    '"Healthcheck":{"Interval":5000000000,"Timeout":4000000000,' \
	    '"Test":["CMD","/statesrv","-c","-l","127.0.0.1:8080"]},' \
	    '"ExposedPorts":{"8080/tcp":{}},"Volumes":{"/states":{}}}}' >config.json && \
	tar -cf - manifest.json config.json layer.tar | $(DOCKER) load

# demo.tf from nothing to nothing, in a directory of its own.
demo: statesrv
	@here=$$(pwd); tmp=$$(mktemp -d) && cp demo.tf "$$tmp" || exit 1; pid=; \
	unset TF_HTTP_USERNAME TF_HTTP_PASSWORD; \
	export TF_CLI_ARGS=-no-color; \
	trap 'kill $$pid 2>/dev/null; wait; rm -rf "$$tmp"' EXIT; \
	trap 'exit 1' HUP INT TERM; \
	say() { printf '\n\033[1m=== %s\033[0m\n' "$$*"; }; \
	run() { printf '$$ %s\n' "$$*"; "$$@" || exit 1; }; \
	lock() { printf '$$ curl -X %s -d %s %s\n' "$$1" "'$$who'" "$$at/demo"; \
		curl -sS -f -X "$$1" -d "$$who" "$$at/demo" || exit 1; }; \
	at=http://127.0.0.1:8080; who='{"ID":"1","Who":"a colleague"}'; \
	for tf in $(TF); do command -v $$tf >/dev/null && break; done; \
	for tool in $$tf curl; do \
		command -v $$tool >/dev/null || \
		{ echo "make demo needs curl and one of: $(TF)"; exit 1; }; \
	done; \
	cd "$$tmp"; \
	say 'the server'; \
	echo '$$ ./statesrv -d states &'; \
	"$$here/statesrv" -d states >log & pid=$$!; \
	until grep ' on http' log; do \
		sleep 0.1; kill -0 $$pid 2>/dev/null || exit 1; \
	done; \
	say "$$tf, with its state on the server"; \
	run $$tf init; \
	run $$tf apply -auto-approve; \
	say 'the state is a file'; \
	run ls -l states; run cat states/demo.tfstate; \
	say 'somebody takes the lock, and a second run meets it'; \
	lock LOCK; run cat states/demo.lock; echo; \
	echo "$$ $$tf apply -auto-approve -var greeting=goodbye"; \
	! $$tf apply -auto-approve -var greeting=goodbye || exit 1; \
	echo '(refused, as it should be)'; \
	lock UNLOCK; \
	run $$tf apply -auto-approve -var greeting=goodbye; \
	say 'the states, and the page of one: its versions, and the way back'; \
	run curl -sS $$at/; run curl -sS $$at/-/versions/demo; \
	run cat states/demo.log; \
	say 'and back to nothing'; \
	run $$tf destroy -auto-approve; \
	echo '$$ kill %1'; kill $$pid; wait $$pid; \
	say 'the server stopped with status '$$?', and this was its log'; cat log

.PHONY: all static run test demo image install clean
