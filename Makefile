# make, make run, make test, make demo, make static, make image, make install

CC = cc
# Small, and as fast: nearly all of its time is the kernel's.
CFLAGS = -Os -fno-plt -fno-asynchronous-unwind-tables
PREFIX = /usr/local
DOCKER = docker

all: statesrv

statesrv: statesrv.c Makefile
	$(CC) $(CFLAGS) -pthread $(LDFLAGS) -o $@ statesrv.c

# One file that runs anywhere, in the place of the other: by musl if it is here, else by libc's archive.
static: statesrv.c
	cc=$$(command -v musl-gcc || echo $(CC)) && \
	$$cc $(CFLAGS) -static -s -pthread $(LDFLAGS) -o statesrv statesrv.c

run: statesrv
	./statesrv

test:
	./test.sh

install: statesrv
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 statesrv $(DESTDIR)$(PREFIX)/bin/statesrv

clean:
	rm -f statesrv

# The static binary and an empty directory, for docker or podman: no base
# image, no Dockerfile. /states is open to all, so that any -u may have a
# volume there.

image: static
	d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && mkdir "$$d/states" && \
	cp statesrv "$$d" && strip "$$d/statesrv" && chmod 1777 "$$d/states" && \
	tar -C "$$d" --owner=0 --group=0 -c . | $(DOCKER) import \
	    -c 'ENTRYPOINT ["/statesrv","-d","/states","-l","0.0.0.0:8080"]' \
	    -c 'HEALTHCHECK --interval=5s --timeout=4s CMD ["/statesrv","-c","-l","127.0.0.1:8080"]' \
	    -c 'EXPOSE 8080' -c 'VOLUME /states' - statesrv

# demo.tf from nothing to nothing, in a directory of its own.
demo: statesrv
	@here=$$(pwd); tmp=$$(mktemp -d) && cp demo.tf "$$tmp" || exit 1; pid=; \
	unset TF_HTTP_USERNAME TF_HTTP_PASSWORD; \
	export TF_CLI_ARGS=-no-color; \
	trap 'kill $$pid 2>/dev/null; wait; rm -rf "$$tmp"' EXIT; \
	trap 'exit 1' HUP INT TERM; \
	say() { printf '\n\033[1m=== %s\033[0m\n' "$$*"; }; \
	run() { printf '$$ %s\n' "$$*"; "$$@" || exit 1; }; \
	lock() { printf '$$ curl -X %s -d %s %s\n' "$$1" "'$$who'" "$$at"; \
		curl -sS -f -X "$$1" -d "$$who" "$$at" || exit 1; }; \
	at=http://127.0.0.1:8080/demo; who='{"ID":"1","Who":"a colleague"}'; \
	for tool in terraform curl; do \
		command -v $$tool >/dev/null || \
		{ echo "make demo needs $$tool"; exit 1; }; \
	done; \
	cd "$$tmp"; \
	say 'the server'; \
	echo '$$ ./statesrv -d states &'; \
	"$$here/statesrv" -d states >log & pid=$$!; \
	until grep -q 'listening on' log; do \
		sleep 0.1; kill -0 $$pid 2>/dev/null || exit 1; \
	done; \
	say 'terraform, with its state on the server'; \
	run terraform init; \
	run terraform apply -auto-approve; \
	say 'the state is a file'; \
	run ls -l states; run cat states/demo.tfstate; \
	say 'somebody takes the lock, and a second run meets it'; \
	lock LOCK; run cat states/demo.lock; echo; \
	echo '$$ terraform apply -auto-approve -var greeting=goodbye'; \
	! terraform apply -auto-approve -var greeting=goodbye || exit 1; \
	echo '(refused, as it should be)'; \
	lock UNLOCK; \
	run terraform apply -auto-approve -var greeting=goodbye; \
	say 'what happened, and the earlier versions'; \
	run curl -sS http://127.0.0.1:8080/; \
	run cat states/demo.log; run find states/.history -type f; \
	say 'and back to nothing'; \
	run terraform destroy -auto-approve; \
	echo '$$ kill %1'; kill $$pid; wait $$pid; \
	say 'the server stopped with status '$$?', and this was its log'; cat log

.PHONY: all static run test demo image install clean
