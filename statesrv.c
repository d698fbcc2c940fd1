/*
 * statesrv - keeps the states of Terraform and OpenTofu in plain files.
 *
 *	cc -O2 -pthread -o statesrv statesrv.c && ./statesrv
 *
 * serves ./states on 127.0.0.1:8080; the README says the rest.
 *
 * On disk:
 *
 *	states/demo.tfstate	the state, byte for byte as the client sent it
 *	states/demo.lock	present = locked; the lock info, byte for byte
 *	states/demo.log		what happened to it, a JSON line an event
 *	states/team/prod.tfstate	a name with slashes is a path
 *	states/.history/demo/	earlier versions
 *	states/.tmp/		uploads in flight, swept at start
 *	states/.guard		its bytes are locked by the servers that share it
 *
 * Promises, each tested under its number by test.sh:
 *
 *	1. What was answered 200 is on disk: data, name and lock.
 *	2. A reader gets one whole version; 404 never means "could not look".
 *	3. A lock has one holder, across processes and machines.
 *	4. A write lands only under the lock's own ID, or with none when
 *	   nothing is locked; both are checked under the name's guard.
 *	5. The bytes are kept; a large body never lives in memory whole.
 *	6. Repeating a request whose answer was lost does no harm.
 *	7. Nothing is thrown away in silence: there is the history.
 *	8. Bad input is told what was wrong and stalls nobody else.
 *	9. Secrets stay in: files 0600, loopback, nothing secret in a log.
 *
 * How it works: a request is either in the loop or in one thread. The loop
 * polls, reads heads, and answers what needs no waiting. Everything else is
 * given with its connection to one thread of a pool, which does it from the
 * first line to the last. So every wait has an end, every piece of work has
 * somebody who wants it, and no lock of the program is held over a disk, but
 * for a name's own guard, and the output's where stdout is a file. To follow
 * one request, read these in order:
 *
 *	loop_turn, conn_drive, head_read, request_new, admit: in the loop
 *	GET of a small state: now_state, cache_get, conn_answer, reply_send
 *	POST: pool_give, then in a thread thread_serve, do_write; change, a
 *	first look: may it land at all? state_receive, state_check; change,
 *	now with change_prepare, guard_take, write_publish; change_end,
 *	reply_send, and at last change_free
 *
 * What it does not do: TLS (put a front before it), encryption at rest
 * (OpenTofu encrypts before it sends), workspaces (no client has them over
 * http), replication (share the directory).
 *
 * The map; each section knows only those above it:
 *
 *	limits and config
 *	types
 *	small helpers
 *	digests
 *	JSON
 *	HTTP parser
 *	names
 *	storage
 *	locks and guard
 *	users
 *	wire
 *	commits
 *	pages
 *	methods
 *	connections
 *	start and stop
 *	main
 *
 * Copyright (c) 2026 the statesrv authors
 *
 * Permission to use, copy, modify, and distribute this software for any
 * purpose with or without fee is hereby granted, provided that the above
 * copyright notice and this permission notice appear in all copies.
 *
 * THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES
 * WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
 * MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR
 * ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
 * WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
 * ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF
 * OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.
 */

#ifdef __linux__
#define _GNU_SOURCE
#elif defined(__APPLE__)
#define _DARWIN_C_SOURCE
#elif defined(__OpenBSD__)
#define _BSD_SOURCE
#else
#define _POSIX_C_SOURCE 200809L
#endif
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64			/* 2038, on 32 bits with glibc */

#include <sys/types.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>

#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __APPLE__
#include <sys/random.h>
#endif

/*
 * What other systems lack. macOS has no record locks of an open file (nor has
 * OpenBSD), no Landlock, no reads that do not wait, no sendfile of this kind,
 * no accept4, no condition that waits by the monotonic clock, and its fsync
 * does not reach the disk. Each is handled where it is used, behind #ifdef;
 * these have a plain stand-in.
 */
#ifndef MSG_MORE
#define MSG_MORE 0			/* only a hint */
#endif
#ifndef POLLRDHUP
#define POLLRDHUP 0			/* a recv tells it as well */
#endif
#ifdef __APPLE__
#define st_mtim st_mtimespec
#define st_ctim st_ctimespec
#endif

/* ==== limits and config ==================================================
 *
 * Every number of the program; those behind #ifndef can be overridden with
 * -DNAME=VALUE (the tests do, so that limits are near). And the options, which
 * main fills in and all others only read.
 *
 * What one connection may cost: 250 bytes while it is idle; HEAD_MAX and a
 * struct request from its head's first byte to its answer; a thread (some 30
 * KiB of its stack are touched) while its request waits for anything, and
 * LOCK_INFO_MAX for a small body; and of the kernel's memory UNSENT_MAX, for an
 * answer that nobody reads.
 */
#define VERSION "2.0"
#define HEAD_MAX 16384		/* bytes: request line and fields */
#define TARGET_MAX 8192		/* bytes: request target */
#define FIELDS_MAX 100		/* header fields, and trailer fields */
#define BLANKS_MAX 8		/* empty lines before a request line */
#define CHUNK_LINE_MAX 1024	/* bytes: a chunk's size and extensions */
#define SEGMENTS_MAX 32		/* of a name */
#define SEGMENT_MAX 200		/* bytes; with .tfstate below NAME_MAX */
#define NAME_LEN_MAX 1000	/* bytes: a name */
#define ID_MAX 256		/* bytes: a lock's ID */
#define LINEAGE_MAX 255		/* bytes: one that can be compared */
#define USERS_MAX 1048576	/* bytes: the users file */
#define LOCK_INFO_MAX 65536	/* bytes: the body of LOCK and UNLOCK */
#define JSON_DEPTH 1000		/* nested arrays and objects */
#ifndef ANY_OBJECT
#define ANY_OBJECT 0		/* 1: any JSON object is taken for a state */
#endif
#define HASH_MAX 16384		/* bytes: up to this MD5 is logged, unasked */
#define META_MAX 65536		/* bytes searched for serial and lineage */
#define TAIL_MAX 65536		/* bytes of a log that a page looks at */
#ifndef SMALL
#define SMALL 65536		/* bytes: the loop answers such a state */
#endif
#define CACHE_SLOTS 256		/* of them are kept in memory */
#ifndef SLOTS_MAX
#define SLOTS_MAX 16384		/* connections */
#endif
#define LISTENERS_MAX 32
#ifndef THREADS_MAX
#define THREADS_MAX 256
#endif
#ifndef THREAD_STACK
#define THREAD_STACK 262144	/* bytes, as far as touched */
#endif
#define THREAD_IDLE_MS 1000	/* milliseconds; then an idle one leaves */
#ifndef PAGES_MAX
#define PAGES_MAX 8		/* threads that make pages */
#endif
#define WAITERS_MAX 16		/* threads that wait for one name */
#define UNSENT_MAX 131072	/* bytes of an answer that wait in the kernel */
#define SEND_MAX 1048576	/* bytes in one sendfile */
#define FLAT 64			/* so many connections are simply all polled */
#define TURN_MAX 32		/* answers to one client in one turn */
#define HOT_MS 5		/* milliseconds between looks at idle ones */
#define LOG_MS 10		/* log lines may wait so long for others */
#ifndef IDLE_MS
#define IDLE_MS 120000		/* Go's client gives up its own after 90 s */
#endif
#ifndef HEAD_MS
#define HEAD_MS 20000		/* for the head, from its first byte on */
#endif
#ifndef BODY_MS
#define BODY_MS 60000		/* of silence, in a body or of a slow reader, */
#endif
#define RATE 1024		/* and so many bytes a second on average */
#ifndef DRAIN_MS
#define DRAIN_MS 10000		/* for a client to read the last answer */
#endif
#ifndef STALL_MS
#define STALL_MS 5000		/* after this a silent client makes room */
#endif
#define NEW_MS 100		/* a new connection has so long to speak */
#define QUEUE_MS 20000		/* a request waits so long for a thread */
#ifndef GUARD_MS
#define GUARD_MS 5000		/* and so long for its name */
#endif
#ifndef LOOK_MS
#define LOOK_MS 5000		/* /-/ready: a slower disk is not ready */
#endif
#define FRESH_MS 1000		/* /-/ready: so long a verdict is used */
#define DENY_MS 1000		/* a wrong secret is answered after this */
#define STOP_MS 10000		/* for what is in progress at the end */
#ifndef RESERVE
#define RESERVE 4194304		/* bytes kept free on the disk, for locks */
#endif

static struct config {
	const char *dir;		/* -d */
	const char *listen[16];		/* -l, as given */
	size_t listeners;
	const char *users;		/* -u */
	unsigned keep;			/* -k: versions */
	unsigned break_hours;		/* -b: 0 is never */
	int64_t body_max;		/* -m: bytes */
	bool strict;			/* -s */
	bool open;			/* -n */
	bool fronted;			/* -x */
	bool verbose;			/* -v */
	bool check;			/* -c */
	char **command;			/* of the wrapper, or NULL */
	const char *command_name;	/* its state */
	const char *program;		/* argv[0] */
} conf = {
	.dir = "./states",
	.keep = 30,
	.body_max = (int64_t)256 << 20,
};

/* ==== types ==============================================================
 *
 * Bytes, what is known about a state or a lock, and the request. A request
 * belongs to the loop until it is given to a thread, and from then on to that
 * thread, which frees it.
 */
struct span {				/* bytes that belong to another */
	const char *ptr;
	size_t len;
};

struct buf {				/* bytes that grow; zero is empty */
	char *data;
	size_t len, cap;
	bool failed;			/* memory ran out: contents are cut */
};

struct names {				/* a list of malloced strings */
	char **list;
	size_t n;
	bool failed;			/* memory ran out: some are missing */
};

enum method {
	M_GET, M_HEAD, M_POST, M_PUT, M_DELETE, M_LOCK, M_UNLOCK, M_OPTIONS,
	M_COUNT
};

static const char method_names[M_COUNT][8] = {
	"GET", "HEAD", "POST", "PUT", "DELETE", "LOCK", "UNLOCK", "OPTIONS"
};

/* The fields that mean something here. From F_CONNECTION on they may come
 * twice, and the last one counts, for a front adds its own at the end. */
enum field {
	F_HOST, F_LENGTH, F_CODING, F_EXPECT, F_AUTHORIZATION, F_MD5,
	F_CONNECTION, F_ACCEPT, F_ORIGIN, F_FORWARDED, F_AGENT, F_RANGE,
	F_MATCH, F_NONE_MATCH, F_UNMODIFIED, F_COUNT
};

static const char field_names[F_COUNT][20] = {
	"host", "content-length", "transfer-encoding", "expect",
	"authorization", "content-md5", "connection", "accept", "origin",
	"x-forwarded-for", "user-agent", "content-range", "if-match",
	"if-none-match", "if-unmodified-since"
};

/* What a parsed head says; the spans point into the connection's buffer. */
struct head {
	enum method method;
	int minor;			/* of HTTP/1.x: 0 or 1 */
	struct span target, host;	/* path and query, or "*" */
	struct span field[F_COUNT];	/* their values; ptr NULL: none */
	const char *why;		/* it was refused */
	int64_t length;			/* Content-Length, or -1 */
	bool chunked;
	bool close, keep_alive;		/* as Connection says */
	bool keep;			/* the client would stay connected */
};

struct hash {				/* MD5 or SHA-256 */
	void (*blocks)(uint32_t *, const unsigned char *, size_t);
	size_t size;			/* of the digest */
	uint64_t len;			/* of what was added */
	uint32_t state[8];
	unsigned char block[64];
};

/* A member of a JSON object that is asked for: what it is, by its last. */
struct member {
	const char *key;		/* in any case, as Go's clients read */
	char *to;			/* its text is copied there */
	size_t size;
	size_t len;			/* of its text; SIZE_MAX: has a NUL */
	unsigned n;			/* so many there are */
	char type;			/* 's', 'n', or another */
};

/* What is told about a state without understanding it. */
struct meta {
	char type;			/* 's'tate, 'l'ock info, 0: neither */
	const char *doubled;		/* a key that is there twice, or NULL */
	bool known;			/* has a serial */
	uint64_t serial;
	size_t lineage_len;
	char lineage[LINEAGE_MAX + 1];
	char version[32];		/* terraform_version */
};

struct lock {
	bool held;
	bool foreign;			/* made by hand: not lock info */
	bool torn;			/* a crash cut its LOCK short */
	struct timespec since;		/* the file's mtime */
	char id[ID_MAX + 1];
	char operation[64], info[256], who[128], created[64];
	char *raw;			/* the file's bytes, malloced */
	size_t len;
};

/* What a URL names, as what a page is written, what a user may do there. */
enum kind {
	K_STAR, K_STATE, K_LOCK, K_ROOT, K_VERSIONS, K_VERSION, K_LOG,
	K_HEALTHY, K_READY, K_METRICS
};
enum form { TEXT, JSON, HTML };
enum right { R_NONE, R_READ, R_PLAN, R_WRITE };

#define VERSION_ID 64			/* bytes: an earlier version's ID */

/* Where a name's files lie. */
struct place {
	int dir;			/* -1: there is none, nor any file */
	const char *leaf;		/* points into the name */
};

/* A name's guard, in the list of those that this process has or waits for. */
struct guard {
	off_t byte;			/* of .guard */
	struct guard *next;
};

/* A temporary file: an upload, a copy, a new lock. */
struct tmp {
	int fd;				/* or -1 */
	int dir;			/* where it lies */
	char name[48];			/* "": it was renamed */
};

/*
 * A change of a state or a lock, with what is left to be freed and pruned
 * after the answer. It belongs to the thread that makes the change.
 */
struct change {
	struct place place;
	struct guard guard;
	struct lock lock;		/* the lock that was found */
	struct lock asked;		/* the lock info that was sent */
	struct tmp tmp;			/* the new state, */
	struct meta meta;
	int64_t size;			/* of the body, in bytes */
	char md5[33];			/* of the body, in hex; "": unknown */
	int old;			/* the state that is there, or -1 */
	struct stat old_st;
	struct meta old_meta;
	bool equal;			/* the two have the same bytes */
	int history;			/* the history's directory, or -1 */
	struct tmp kept;		/* a second name of old, in there */
	struct names ids;		/* the versions in it, oldest first */
	bool writes;			/* changes the state: is prepared for, and
					 * logged even if it is refused */
	const char *event;		/* what was done, for the state's log */
};

struct request {
	struct conn *conn;
	struct users *users;		/* as they were when it came */
	struct change *change;		/* of the thread that has it */
	int64_t start;			/* microseconds, monotonic */

	/* what was asked */
	enum method method;
	enum kind kind;
	enum right right;		/* on that name */
	enum form form;			/* of pages, by Accept */
	bool keep, http10, expects;	/* as the head says */
	bool fronted;			/* a front speaks for the client */
	bool tls;			/* it is a TLS hello */
	bool has_id, has_md5;
	bool go;			/* sent by a Go program: terraform */
	bool bearer;			/* showed a secret, but no name */
	bool locked;			/* ?locked of the listing */
	char root[128];			/* from the URL to /: "../../" */
	char name[NAME_LEN_MAX + 1];	/* of the state, or the path */
	char version[VERSION_ID];	/* the ID of an earlier one */
	char query[256];		/* ?q= of the listing */
	char id[ID_MAX + 1];		/* lock ID: from ?ID= or the body */
	char host[256];			/* as the client calls us */
	char client[64];		/* its address */
	char user[64];
	unsigned char secret[32];	/* SHA-256 of what it showed */
	unsigned char md5[16];

	/* the body */
	int64_t length;			/* bytes still to come; -1: chunked */
	int64_t room;			/* bytes that it may still have, */
	int too_large;			/* else this is the status */
	int64_t chunk;			/* bytes still to come of a chunk */
	bool in_chunks;			/* the first chunk has begun */
	char *body;			/* a small body, or a piece; malloced */
	size_t len;			/* of body */

	/* the answer */
	int status;			/* 0: none, or none yet */
	bool cut;			/* no answer: the connection ends */
	unsigned retry;			/* Retry-After of a 503, seconds */
	const char *type;		/* Content-Type */
	bool heading;			/* a table's cells write their titles */
	struct buf head, text;
	struct span out[2];		/* of head and body: what is unsent */
	int file;			/* the body, or -1 */
	off_t off, left;		/* of the file */
	int64_t got, sent;		/* bytes, for the count */
	char why[300];			/* it was refused */
};

/* ==== small helpers ======================================================
 *
 * Clocks and a request's only wait; complain and die in the err(3) manner;
 * bytes that grow; text for people.
 */
static int64_t
clock_us(clockid_t id)
{
	struct timespec t;

	(void)clock_gettime(id, &t);	/* cannot fail for these clocks */
	return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Milliseconds: monotonic, for deadlines, and of the day, which may jump. */
#define clock_ms() (clock_us(CLOCK_MONOTONIC) / 1000)
#define time_ms() (clock_us(CLOCK_REALTIME) / 1000)

/* Waits for a descriptor, or with fd -1 only for the time, until a moment
 * (milliseconds, monotonic). No request waits elsewhere. What poll says of the
 * descriptor, or 0: it is too late. */
static short
wait_until(int fd, short events, int64_t until)
{
	struct pollfd p = { .fd = fd, .events = events };
	int64_t left;

	do {
		left = until - clock_ms();
		left = left < 0 ? 0 : left < INT_MAX ? left : INT_MAX;
		if (poll(&p, 1, (int)left) == 1)
			return p.revents;
	} while (left > 0);
	return 0;
}

/* Starts a thread, with a small stack. */
static bool
thread_start(void *(*run)(void *))
{
	pthread_attr_t attr;
	pthread_t id;
	int error;

	(void)pthread_attr_init(&attr);
	(void)pthread_attr_setstacksize(&attr, THREAD_STACK);
	(void)pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	error = pthread_create(&id, &attr, run, NULL);
	(void)pthread_attr_destroy(&attr);
	return error == 0;
}

/* The code point that s begins with, and its length; 0 if that is not UTF-8
 * (RFC 3629: no overlong forms, no surrogates, nothing past 10FFFF). */
static size_t
utf8_next(const char *s, unsigned *code)
{
	const unsigned char *p = (const unsigned char *)s;
	unsigned char low = *p == 0xe0 ? 0xa0 : *p == 0xf0 ? 0x90 : 0x80;
	unsigned char high = *p == 0xed ? 0x9f : *p == 0xf4 ? 0x8f : 0xbf;
	size_t n = *p < 0x80 ? 1 : *p < 0xc2 ? 0 : *p < 0xe0 ? 2 :
	    *p < 0xf0 ? 3 : *p < 0xf5 ? 4 : 0, i;

	*code = n == 1 ? *p : *p & (0x7fu >> n);
	for (i = 1; i < n; i++, low = 0x80, high = 0xbf) {
		if (p[i] < low || p[i] > high)
			return 0;
		*code = *code << 6 | (p[i] & 0x3f);
	}
	return n;
}

/* May a terminal or a page get it? Not what they would obey: the controls of
 * ASCII and Latin-1, and what turns the direction of a text around. */
static bool
is_shown(unsigned code)
{
	return code >= 0x20 && (code < 0x7f || code >= 0xa0) &&
	    (code < 0x2028 || code > 0x202e) &&
	    (code < 0x2066 || code > 0x2069);
}

/* Makes text from outside fit to be shown, in place: each byte that is not
 * becomes a question mark. */
static void
scrub(char *s)
{
	unsigned code;
	size_t n;

	for (; *s != '\0'; s += n) {
		if ((n = utf8_next(s, &code)) > 0 && is_shown(code))
			continue;
		n = n > 0 ? n : 1;
		memset(s, '?', n);
	}
}

/* Both stdout and stderr may be one pipe, which takes PIPE_BUF bytes when it
 * polls writable: so they are written one at a time. */
static pthread_mutex_t output = PTHREAD_MUTEX_INITIALIZER;

/* Says what is wrong on stderr; the server goes on, even if nobody reads. */
__attribute__((format(printf, 1, 2)))
static void
complain(const char *fmt, ...)
{
	char line[2048];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	scrub(line);
	(void)pthread_mutex_lock(&output);
	if ((wait_until(STDERR_FILENO, POLLOUT, 0) & POLLOUT) != 0)
		(void)fprintf(stderr, "statesrv: %s\n", line);
	(void)pthread_mutex_unlock(&output);
}

/* Ends the program: status 2 for the user's mistakes, 1 for the system's. */
#define die(status, ...) (complain(__VA_ARGS__), exit(status))

static struct span
span(const char *s)
{
	return (struct span){ s, strlen(s) };
}

/* Compares without regard to the case of ASCII letters. */
static bool
span_is(struct span s, const char *word)
{
	return s.len == strlen(word) && strncasecmp(s.ptr, word, s.len) == 0;
}

/* Copies as a string, cut to what fits, between two characters. */
static void
span_copy(char *to, size_t size, struct span s)
{
	size_t n = s.len < size ? s.len : size - 1;

	while (n > 0 && n < s.len && (s.ptr[n] & 0xc0) == 0x80)
		n--;
	if (n > 0)
		memcpy(to, s.ptr, n);
	to[n] = '\0';
}

/* Takes the next element of a list off its front, blanks around it removed;
 * false at the end. */
static bool
span_next(struct span *list, char separator, struct span *item)
{
	const char *end = list->ptr + list->len, *p = list->ptr, *q;

	if (list->len == 0)
		return false;
	if ((q = memchr(p, separator, list->len)) == NULL)
		q = end;
	list->ptr = q < end ? q + 1 : q;
	list->len = (size_t)(end - list->ptr);
	while (p < q && (*p == ' ' || *p == '\t'))
		p++;
	while (q > p && (q[-1] == ' ' || q[-1] == '\t'))
		q--;
	*item = (struct span){ p, (size_t)(q - p) };
	return true;
}

/* Makes room for n more bytes; false, and failed is set, if there is none. */
static bool
buf_room(struct buf *b, size_t n)
{
	size_t cap = b->cap > 0 ? b->cap : 256;
	char *data;

	while (cap - b->len <= n && cap < SIZE_MAX / 2)
		cap *= 2;
	data = b->failed || cap - b->len <= n ? NULL : realloc(b->data, cap);
	if (data == NULL) {
		b->failed = true;
		return false;
	}
	b->data = data;
	b->cap = cap;
	return true;
}

static void
buf_add(struct buf *b, const void *data, size_t n)
{
	if (n == 0 || (b->cap - b->len <= n && !buf_room(b, n)))
		return;
	memcpy(b->data + b->len, data, n);
	b->len += n;
	b->data[b->len] = '\0';
}

/* inline: most lengths are then known to the compiler. */
static inline void
buf_str(struct buf *b, const char *s)
{
	buf_add(b, s, strlen(s));
}

__attribute__((format(printf, 2, 3)))
static void
buf_fmt(struct buf *b, const char *fmt, ...)
{
	size_t room, n;
	va_list ap;

	do {				/* twice, if it does not fit at once */
		room = b->cap - b->len;
		va_start(ap, fmt);
		n = (size_t)vsnprintf(room > 0 ? b->data + b->len : NULL,
		    room, fmt, ap);
		va_end(ap);
	} while (n >= room && buf_room(b, n));
	if (n < room)
		b->len += n;
}

/* Appends a number, in digits at least; many times as fast as printf: every
 * answer and every log line has several. */
static void
buf_num(struct buf *b, int64_t n, int digits)
{
	char text[24], *p = text + sizeof(text);

	do {
		*--p = (char)('0' + n % 10);
		n /= 10;
	} while (--digits > 0 || n > 0);
	buf_add(b, p, (size_t)(text + sizeof(text) - p));
}

static void
buf_free(struct buf *b)
{
	free(b->data);
	*b = (struct buf){ 0 };
}

/* Appends s so that it means itself in a JSON string or in HTML, attributes
 * too; what is not UTF-8, or should not be shown, is escaped or replaced. */
static void
buf_text(struct buf *b, const char *s, enum form form)
{
	const char *quoted = form == JSON ? "\"\\" : "<>&\"'";
	unsigned code;
	size_t n;

	for (; *s != '\0'; s += n > 0 ? n : 1) {
		n = utf8_next(s, &code);
		if (n > 0 && is_shown(code) && strchr(quoted, *s) == NULL)
			buf_add(b, s, n);
		else if (form == JSON && n > 0 && is_shown(code))
			buf_fmt(b, "\\%c", *s);
		else if (form == JSON)
			buf_fmt(b, "\\u%04x", n > 0 ? code : 0xfffd);
		else if (n > 0 && is_shown(code))
			buf_fmt(b, "&#%u;", code);
		else
			buf_str(b, "?");
	}
}

/* Appends a JSON string. */
static void
buf_json(struct buf *b, const char *s)
{
	buf_str(b, "\"");
	buf_text(b, s, JSON);
	buf_str(b, "\"");
}

#define buf_html(b, s) buf_text(b, s, HTML)

/* Appends a name as part of a URL. */
static void
buf_url(struct buf *b, const char *s)
{
	for (; *s != '\0'; s++)
		if (isalnum((unsigned char)*s) || strchr("-._~/", *s) != NULL)
			buf_add(b, s, 1);
		else
			buf_fmt(b, "%%%02X", (unsigned char)*s);
}

/* Appends text, and then a word as a shell wants it. */
static void
buf_shell(struct buf *b, const char *before, const char *s)
{
	buf_str(b, before);
	buf_str(b, "'");
	for (; *s != '\0'; s++)
		buf_add(b, *s == '\'' ? "'\\''" : s, *s == '\'' ? 4 : 1);
	buf_str(b, "'");
}

/* Adds to a list, which doubles whenever its length is a power of two. */
static void
names_add(struct names *v, const char *name)
{
	char **list = v->list;

	if ((v->n & (v->n - 1)) == 0)
		list = realloc(list, (2 * v->n + 1) * sizeof(*list));
	if (list != NULL)
		v->list = list;
	if (list == NULL || (list[v->n] = strdup(name)) == NULL)
		v->failed = true;
	else
		v->n++;
}

static int
names_order(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Sorts a list, and removes what is in it twice. */
static void
names_sort(struct names *v)
{
	size_t i, n = 0;

	if (v->n > 0)
		qsort(v->list, v->n, sizeof(*v->list), names_order);
	for (i = 0; i < v->n; i++)
		if (n > 0 && strcmp(v->list[n - 1], v->list[i]) == 0)
			free(v->list[i]);
		else
			v->list[n++] = v->list[i];
	v->n = n;
}

static void
names_free(struct names *v)
{
	while (v->n > 0)
		free(v->list[--v->n]);
	free(v->list);
	*v = (struct names){ 0 };
}

/* Writes RFC 3339 in UTC with milliseconds, or in basic format, without
 * separators, as it stands in the names of versions. */
static void
time_text(char out[32], int64_t ms, bool basic)
{
	time_t t = (time_t)(ms / 1000);
	struct tm tm;

	/* strftime would look for a time zone, outside the sandbox. */
	(void)gmtime_r(&t, &tm);
	(void)snprintf(out, 32, basic ? "%04d%02d%02dT%02d%02d%02d.%03dZ" :
	    "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", (tm.tm_year + 1900) % 10000,
	    tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec,
	    (int)(ms % 1000));
}

/* Is a time later than another, or before it, or neither: 1, -1, 0. */
static int
time_order(struct timespec a, struct timespec b)
{
	if (a.tv_sec != b.tv_sec)
		return a.tv_sec > b.tv_sec ? 1 : -1;
	return (a.tv_nsec > b.tv_nsec) - (a.tv_nsec < b.tv_nsec);
}

static int
hex_value(unsigned char c)
{
	return c >= '0' && c <= '9' ? c - '0' :
	    (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* Reads up to size bytes from an offset on; how many there were, or -1. */
static ssize_t
read_at(int fd, void *data, size_t size, off_t at)
{
	size_t len = 0;
	ssize_t n = 1;

	for (; len < size && n != 0; len += n > 0 ? (size_t)n : 0) {
		n = pread(fd, (char *)data + len, size - len, at + (off_t)len);
		if (n == -1 && errno != EINTR)
			return -1;
	}
	return (ssize_t)len;
}

/* Writes all of it, whatever the interruptions; -1 with errno. */
static int
write_all(int fd, const void *data, size_t len)
{
	const char *p = data;
	ssize_t n;

	for (; len > 0; p += n, len -= (size_t)n) {
		n = write(fd, p, len);
		if (n == -1 && errno != EINTR)
			return -1;
		n = n == -1 ? 0 : n;
	}
	return 0;
}

/* Closes, and leaves errno alone: for the ways out of an error. */
static void
close_quietly(int fd)
{
	int saved = errno;

	if (fd != -1)
		(void)close(fd);
	errno = saved;
}

/* Waits until it is on the disk, not in the disk's cache. */
static int
sync_fd(int fd)
{
#ifdef __APPLE__
	if (fcntl(fd, F_FULLFSYNC) != -1)
		return 0;
#endif
	return fsync(fd);
}

/* ==== digests ============================================================
 *
 * MD5 (RFC 1321) because terraform sends Content-MD5, SHA-256 (FIPS 180-4)
 * for secrets and names, base64 (RFC 4648) for what comes in fields. Pure
 * functions, with the tables of their standards.
 */
static const uint32_t md5_table[64] = {
	0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a,
	0xa8304613, 0xfd469501, 0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be,
	0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821, 0xf61e2562, 0xc040b340,
	0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
	0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8,
	0x676f02d9, 0x8d2a4c8a, 0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c,
	0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70, 0x289b7ec6, 0xeaa127fa,
	0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
	0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92,
	0xffeff47d, 0x85845dd1, 0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1,
	0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391
};

static const uint32_t sha256_table[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
	0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
	0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
	0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
	0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
	0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
	0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
	0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
	0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
};

static inline uint32_t
load32(const unsigned char *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
	    (uint32_t)p[3] << 24;
}

static inline uint32_t
rotl(uint32_t x, int n)
{
	return x << n | x >> (32 - n);
}

/*
 * The time goes into one long chain of dependent additions: each step needs
 * the one before. So everything that does not need it is added first, and
 * the second function is a sum of two disjoint halves rather than an "or":
 * its first half is ready before the chain arrives. Step i of a round takes
 * word m * i + n.
 */
#define F1(x, y, z) ((z) ^ ((x) & ((y) ^ (z))))
#define F2(x, y, z) (((x) & (z)) + ((y) & ~(z)))
#define F3(x, y, z) ((x) ^ ((y) ^ (z)))
#define F4(x, y, z) ((y) ^ ((x) | ~(z)))
#define STEP(f, a, b, c, d, i, m, n, s) \
	(a) += load32(p + 4 * (((m) * (i) + (n)) % 16)) + md5_table[i]; \
	(a) += f(b, c, d); \
	(a) = rotl(a, s) + (b)
#define FOUR(f, i, m, n, s0, s1, s2, s3) \
	STEP(f, a, b, c, d, i, m, n, s0); \
	STEP(f, d, a, b, c, (i) + 1, m, n, s1); \
	STEP(f, c, d, a, b, (i) + 2, m, n, s2); \
	STEP(f, b, c, d, a, (i) + 3, m, n, s3)
#define ROUND(f, i, ...) \
	FOUR(f, i, __VA_ARGS__); FOUR(f, (i) + 4, __VA_ARGS__); \
	FOUR(f, (i) + 8, __VA_ARGS__); FOUR(f, (i) + 12, __VA_ARGS__)

static void
md5_blocks(uint32_t state[4], const unsigned char *p, size_t blocks)
{
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3];

	for (; blocks > 0; blocks--, p += 64) {
		ROUND(F1, 0, 1, 0, 7, 12, 17, 22);
		ROUND(F2, 16, 5, 1, 5, 9, 14, 20);
		ROUND(F3, 32, 3, 5, 4, 11, 16, 23);
		ROUND(F4, 48, 7, 0, 6, 10, 15, 21);
		a = state[0] += a;
		b = state[1] += b;
		c = state[2] += c;
		d = state[3] += d;
	}
}

static void
sha256_blocks(uint32_t state[8], const unsigned char *p, size_t blocks)
{
	uint32_t w[64], s[8], x, y;
	int i;

	for (; blocks > 0; blocks--, p += 64) {
		memcpy(w, p, 64);
		for (i = 0; i < 16; i++)
			w[i] = ntohl(w[i]);
		for (; i < 64; i++) {
			x = w[i - 15];
			y = w[i - 2];
			w[i] = (rotl(x, 25) ^ rotl(x, 14) ^ x >> 3) +
			    (rotl(y, 15) ^ rotl(y, 13) ^ y >> 10) +
			    w[i - 16] + w[i - 7];
		}
		memcpy(s, state, sizeof(s));
		for (i = 0; i < 64; i++) {
			x = rotl(s[4], 26) ^ rotl(s[4], 21) ^ rotl(s[4], 7);
			x += ((s[4] & s[5]) ^ (~s[4] & s[6])) + s[7] +
			    sha256_table[i] + w[i];
			y = rotl(s[0], 30) ^ rotl(s[0], 19) ^ rotl(s[0], 10);
			y += (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
			memmove(s + 1, s, 7 * sizeof(*s));
			s[4] += x;
			s[0] = x + y;
		}
		for (i = 0; i < 8; i++)
			state[i] += s[i];
	}
}

static const struct hash md5_start = { md5_blocks, 16, 0,
    { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476 }, { 0 } };

static const struct hash sha256_start = { sha256_blocks, 32, 0,
    { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
    0x1f83d9ab, 0x5be0cd19 }, { 0 } };

static void
hash_add(struct hash *h, const void *data, size_t n)
{
	const unsigned char *p = data;
	size_t have = (size_t)(h->len % 64), take;

	h->len += n;
	if (have > 0) {
		take = n < 64 - have ? n : 64 - have;
		memcpy(h->block + have, p, take);
		if (have + take < 64)
			return;
		h->blocks(h->state, h->block, 1);
		p += take;
		n -= take;
	}
	h->blocks(h->state, p, n / 64);
	if (n % 64 > 0)
		memcpy(h->block, p + n / 64 * 64, n % 64);
}

/* The digest, of 16 bytes or 32. Where MD5 puts the low byte of a number
 * first, SHA-256 puts the high one. */
static void
hash_end(struct hash *h, unsigned char *out)
{
	static const unsigned char pad[64] = { 0x80 };
	unsigned char size[8];
	uint64_t bits = h->len * 8;
	unsigned i, turn = h->size == 32 ? 7 : 0;

	for (i = 0; i < 8; i++)
		size[i ^ turn] = (unsigned char)(bits >> 8 * i);
	hash_add(h, pad, 1 + (119 - h->len % 64) % 64);
	hash_add(h, size, 8);
	for (i = 0; i < h->size; i++)
		out[i ^ (turn & 3)] = (unsigned char)(h->state[i / 4] >>
		    i % 4 * 8);
}

static void
sha256(const void *data, size_t n, unsigned char out[32])
{
	struct hash h = sha256_start;

	hash_add(&h, data, n);
	hash_end(&h, out);
}

/* Decodes into at most size bytes; -1 if it is not whole, padded base64. */
static ssize_t
base64_decode(struct span s, void *out, size_t size)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	    "abcdefghijklmnopqrstuvwxyz0123456789+/";
	unsigned char *to = out;
	const char *digit;
	uint32_t bits = 0;
	size_t i, n = 0, pad = 0;

	while (pad < 2 && pad < s.len && s.ptr[s.len - 1 - pad] == '=')
		pad++;
	for (i = 0; i < s.len - pad; i++) {
		digit = memchr(digits, s.ptr[i], 64);
		if (digit == NULL || (i % 4 != 0 && n == size))
			return -1;
		bits = bits << 6 | (uint32_t)(digit - digits);
		if (i % 4 != 0)
			to[n++] = (unsigned char)(bits >> (6 - 2 * (i % 4)));
	}
	/* Bits left over must be zero, or two texts would mean one thing. */
	return s.len % 4 != 0 || (bits & ((1u << 2 * pad) - 1)) != 0 ? -1 :
	    (ssize_t)n;
}

static void
hex(const unsigned char *p, size_t n, char *out)
{
	for (; n > 0; n--, p++, out += 2)
		(void)snprintf(out, 3, "%02x", *p);
}

/* ==== JSON ===============================================================
 *
 * A check that pulls a text, byte by byte, from memory or a file, and accepts
 * exactly one RFC 8259 object. The members that are asked for are found in
 * the same pass, and the MD5 is computed. Nested values are read by
 * json_value calling itself: JSON_DEPTH bounds that.
 */
struct json {
	struct member *members;		/* that are asked for */
	size_t n;			/* so many */
	unsigned brief;			/* ends when so many are found; or 0 */
	int fd;				/* the file, or -1 */
	off_t pos, max;			/* bytes had of it, and at most */
	struct hash *md5;		/* takes what is read; or NULL */
	const unsigned char *p, *end;	/* the bytes at hand */
	const char *why;		/* it is no JSON object, or NULL */
	uint64_t at;			/* at this byte */
	int error;			/* the file could not be read: errno */
	size_t len;			/* of text, and more if it was cut */
	bool nul;			/* text had a NUL; in it stands a ? */
	char text[512];			/* the string or number just read */
	unsigned char piece[8192];	/* of the file */
};

/* The next byte, not taken yet; -1 at the end. */
static int
json_peek(struct json *j)
{
	ssize_t n;

	if (j->p < j->end)
		return *j->p;
	if (j->fd == -1 || j->pos >= j->max)
		return -1;
	n = read_at(j->fd, j->piece, sizeof(j->piece), j->pos);
	if (n == -1)
		j->error = errno;
	if (n <= 0)
		return -1;
	if (j->md5 != NULL)
		hash_add(j->md5, j->piece, (size_t)n);
	j->pos += n;
	j->p = j->piece;
	j->end = j->piece + n;
	return *j->p;
}

/* Sets what is wrong, and where; returns false. */
static bool
json_wrong(struct json *j, const char *why)
{
	j->why = json_peek(j) != -1 ? why :
	    j->pos == 0 ? "is empty" : "ends too early";
	j->at = (uint64_t)(j->pos - (j->end - j->p));
	return false;
}

/* The next byte that is no white space, not taken yet. */
static int
json_skip(struct json *j)
{
	int c;

	while ((c = json_peek(j)) == ' ' || c == '\n' || c == '\t' || c == '\r')
		j->p++;
	return c;
}

/* Keeps a byte of a string or number, if there is room. */
static void
json_keep(struct json *j, unsigned c)
{
	if (j->len < sizeof(j->text))
		j->text[j->len] = (char)c;
	j->len++;
}

/* Takes bytes of a set, up to a number of them; how many there were. */
static unsigned
json_take(struct json *j, const char *set, unsigned max)
{
	unsigned n = 0;
	int c;

	for (; n < max; n++, j->p++) {
		if ((c = json_peek(j)) <= 0 || strchr(set, c) == NULL)
			break;
		json_keep(j, (unsigned)c);
	}
	return n;
}

static bool
json_number(struct json *j)
{
	static const char digits[] = "0123456789";
	bool ok;

	j->len = 0;
	(void)json_take(j, "-", 1);
	ok = json_take(j, "0", 1) > 0 || json_take(j, digits, UINT_MAX) > 0;
	if (ok && json_take(j, ".", 1) > 0)
		ok = json_take(j, digits, UINT_MAX) > 0;
	if (ok && json_take(j, "eE", 1) > 0) {
		(void)json_take(j, "+-", 1);
		ok = json_take(j, digits, UINT_MAX) > 0;
	}
	return ok || json_wrong(j, "has a malformed number");
}

/* What stands behind a backslash: a code point, which may be one half of a
 * surrogate pair. */
static bool
json_escape(struct json *j, unsigned *code)
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	int c = json_peek(j), i, v;
	const char *p = c <= 0 ? NULL : strchr(from, c);

	if (p == NULL && c != 'u')
		return json_wrong(j, "has an unknown escape in a string");
	j->p++;
	*code = p != NULL ? (unsigned)to[p - from] : 0;
	for (i = 0; p == NULL && i < 4; i++, j->p++) {
		c = json_peek(j);
		if (c == -1 || (v = hex_value((unsigned char)c)) == -1)
			return json_wrong(j, "has a bad \\u escape");
		*code = *code << 4 | (unsigned)v;
	}
	return true;
}

/* Takes a character of two to four bytes, the first of which is c. */
static bool
json_utf8(struct json *j, int c)
{
	size_t n = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4, i;
	char s[5] = "";
	unsigned code;

	for (i = 0; i < n && (c = json_peek(j)) != -1; i++, j->p++) {
		s[i] = (char)c;
		json_keep(j, (unsigned)c);
	}
	if (utf8_next(s, &code) == n)
		return true;
	(void)json_wrong(j, "has a string that is not UTF-8");
	j->at -= i;
	return false;
}

/* A string, its first quote not taken yet. RFC 8259 lets half a surrogate
 * pair pass; as text it is U+FFFD. */
static bool
json_string(struct json *j)
{
	unsigned code = 0, high = 0, n;
	int c;

	j->len = 0;
	j->nul = false;
	for (j->p++; (c = json_peek(j)) != '"'; high = c == '\\' ? high : 0) {
		if (c < 0x20)
			return json_wrong(j, "has a control character in a "
			    "string");
		if (c >= 0x80) {
			if (!json_utf8(j, c))
				return false;
			continue;
		}
		j->p++;
		if (c != '\\') {
			json_keep(j, (unsigned)c);
			continue;
		}
		if (!json_escape(j, &code))
			return false;
		if (high != 0 && code >= 0xdc00 && code <= 0xdfff) {
			j->len -= 3;	/* the U+FFFD of its first half */
			code = 0x10000 + ((high & 0x3ff) << 10) +
			    (code & 0x3ff);
		}
		high = code >= 0xd800 && code <= 0xdbff ? code : 0;
		code = (code & ~0x7ffu) == 0xd800 ? 0xfffd : code;
		j->nul |= code == 0;
		n = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
		json_keep(j, n == 0 ? (code == 0 ? '?' : code) :
		    (0xf80u >> n & 0xff) | code >> 6 * n);
		while (n-- > 0)
			json_keep(j, 0x80 | (code >> 6 * n & 0x3f));
	}
	j->p++;
	return true;
}

static int json_value(struct json *, unsigned);

/* A key and its value, which is copied if it is asked for. False too when a
 * brief look has found all. */
static bool
json_member(struct json *j, unsigned depth)
{
	struct member *m = NULL;
	size_t i, last = sizeof(j->text) - 1;
	char *s;
	int type;

	if (json_skip(j) != '"')
		return json_wrong(j, "has no key where one is due");
	if (!json_string(j))
		return false;
	j->text[j->len < last ? j->len : last] = '\0';
	while ((s = strstr(j->text, "\xc5\xbf")) != NULL) {
		*s = 's';		/* a long one, to Go as well */
		memmove(s + 1, s + 2, strlen(s + 1));
	}
	for (i = 0; depth == 1 && i < j->n; i++)
		if (strcasecmp(j->text, j->members[i].key) == 0)
			m = &j->members[i];
	if (json_skip(j) != ':')
		return json_wrong(j, "has no colon after a key");
	j->p++;
	type = json_value(j, depth + 1);
	if (type == 0 || m == NULL)
		return type != 0;
	m->type = (char)type;
	m->len = j->nul ? SIZE_MAX : j->len;
	span_copy(m->to, m->size, (struct span){ j->text,
	    j->len < last ? j->len : last });
	return m->n++ > 0 || --j->brief > 0;
}

/* A value, in others to this depth. What it was: 's' a string, 'n' a number,
 * or another letter; 0 if it is wrong. */
static int
json_value(struct json *j, unsigned depth)
{
	int open = json_skip(j), end = open == '{' ? '}' : ']', c;
	const char *word = open == 't' ? "true" :
	    open == 'f' ? "false" : "null";

	if (open == '"')
		return json_string(j) ? 's' : 0;
	if (open == '-' || (open >= '0' && open <= '9'))
		return json_number(j) ? 'n' : 0;
	if (open != '{' && open != '[') {
		for (; *word != '\0' && json_peek(j) == *word; word++)
			j->p++;
		j->len = 0;
		return *word == '\0' ? 'l' :
		    json_wrong(j, "has no value where one is due");
	}
	if (depth > JSON_DEPTH)
		return json_wrong(j, "is nested too deeply");
	j->p++;
	if ((c = json_skip(j)) != end)
		do {
			if (open == '{' ? !json_member(j, depth) :
			    json_value(j, depth + 1) == 0)
				return 0;
			c = json_skip(j);
			j->p += c == ',';
		} while (c == ',');
	if (c != end)
		return json_wrong(j, "has no comma or end where one is due");
	j->p++;
	j->len = 0;			/* it is no text */
	j->nul = false;
	return open;
}

/* Is it one whole object, and nothing else? */
static bool
json_object(struct json *j)
{
	if (json_skip(j) != '{')
		return json_wrong(j, "does not begin with {");
	return json_value(j, 1) != 0 && (json_skip(j) == -1 ||
	    json_wrong(j, "goes on after its end"));
}

/* JSON that is all at hand. */
static struct json
json_text(const void *data, size_t len, struct member *members, size_t n)
{
	const unsigned char *p = data;

	return (struct json){ .p = p, .end = p + len, .pos = (off_t)len,
	    .fd = -1, .members = members, .n = n };
}

/* A text as a whole number; false if it is none. */
static bool
whole_number(const char *text, uint64_t *n)
{
	char *end;

	errno = 0;
	*n = strtoull(text, &end, 10);
	return *end == '\0' && errno == 0 && *text >= '0' && *text <= '9';
}

/* ==== HTTP parser ========================================================
 *
 * Bytes in, spans out; no I/O, no allocation. RFC 9112 as a server, read
 * strictly: whatever two parsers could understand differently is refused,
 * and so is every bare CR or LF. Functions return NULL, or the status and
 * what is wrong. What is refused ends the connection, for nobody knows where
 * the next request would begin.
 */

/* A character of a token (RFC 9110, 5.6.2), a set with a bit for each. Always
 * inline: each byte of a name is asked for. */
__attribute__((always_inline))
static inline bool
is_token(unsigned char c)
{
	static const uint64_t set[2] = {
		0x03ff6cfa00000000, 0x57ffffffc7fffffe
	};

	return c < 128 && (set[c / 64] >> c % 64 & 1) != 0;
}

static bool
is_value(unsigned char c)		/* RFC 9110, 5.5: no CTL but HTAB */
{
	return c == '\t' || (c >= 0x20 && c != 0x7f);
}

/* Takes a token off the front of what is left of a line. */
static struct span
http_token(struct span *line)
{
	const char *p = line->ptr, *start = p, *end = p + line->len;

	while (p < end && is_token((unsigned char)*p))
		p++;
	*line = (struct span){ p, (size_t)(end - p) };
	return (struct span){ start, (size_t)(p - start) };
}

/* RFC 9110, 4.2: host [":" port]; the host a name, IPv4, or [IPv6]. */
static bool
http_host_ok(struct span h)
{
	const char *p = h.ptr, *end = p + h.len;
	char text[INET6_ADDRSTRLEN + 1];
	struct in6_addr six;
	unsigned port = 0;

	if (h.len > 0 && *p == '[') {
		while (p < end && *p != ']')
			p++;
		span_copy(text, sizeof(text), (struct span){ h.ptr + 1,
		    (size_t)(p - h.ptr - 1) });
		if (p++ == end || inet_pton(AF_INET6, text, &six) != 1)
			return false;
	} else
		while (p < end && (isalnum((unsigned char)*p) ||
		    strchr("-._~!$&'()*+,;=", *p) != NULL || (*p == '%' &&
		    end - p > 2 && isxdigit((unsigned char)p[1]) &&
		    isxdigit((unsigned char)p[2]))))
			p++;
	if (p == h.ptr || (p < end && (*p != ':' || end - p > 6)))
		return false;
	for (p++; p < end && *p >= '0' && *p <= '9'; p++)
		port = port * 10 + (unsigned)(*p - '0');
	return p >= end && port <= 65535;
}

/* Is word in a comma-separated list? With a quality of 0 it is not wanted
 * (RFC 9110, 12.4.2); other parameters do not count. */
static bool
http_lists(struct span list, const char *word)
{
	struct span item, part;
	bool wanted;

	while (span_next(&list, ',', &item)) {
		wanted = span_next(&item, ';', &part) && span_is(part, word);
		while (span_next(&item, ';', &part))
			wanted &= part.len < 3 || (*part.ptr | 32) != 'q' ||
			    part.len != 2 + strspn(part.ptr + 2, "0.");
		if (wanted)
			return true;
	}
	return false;
}

/* One field line, without its CRLF. */
static const char *
http_field(struct head *h, struct span line)
{
	const char *p, *end = line.ptr + line.len;
	struct span name = http_token(&line), value;
	size_t f = name.len < sizeof(*field_names) ? 0 : F_COUNT;

	/* obs-fold and "Name :" end here. */
	if (name.len == 0 || line.len == 0 || *line.ptr != ':')
		return "400 a field line is not: name, colon, value";
	for (p = line.ptr + 1; p < end && (*p == ' ' || *p == '\t'); p++)
		continue;
	while (end > p && (end[-1] == ' ' || end[-1] == '\t'))
		end--;
	value = (struct span){ p, (size_t)(end - p) };
	for (; p < end; p++)
		if (!is_value((unsigned char)*p))
			return "400 a field's value has a control character";
	while (f < F_COUNT && ((*name.ptr | 32) != *field_names[f] ||
	    field_names[f][name.len] != '\0' ||
	    strncasecmp(name.ptr, field_names[f], name.len) != 0))
		f++;
	if (f == F_COUNT)
		return NULL;
	if (f < F_CONNECTION && h->field[f].ptr != NULL)
		return "400 a field that may stand once stands twice";
	h->field[f] = value;
	if (f == F_CONNECTION) {	/* in whichever line it stands */
		h->close |= http_lists(value, "close");
		h->keep_alive |= http_lists(value, "keep-alive");
	}
	return NULL;
}

/* Cuts scheme and authority off an absolute-form target (RFC 9112, 3.2.2):
 * its host is the one that counts. The blank behind the target ends both. */
static const char *
http_absolute(struct head *h)
{
	const char *p = h->target.ptr;
	size_t n = strncasecmp(p, "https://", 8) == 0 ? 8 : 7;

	if (n == 7 && strncasecmp(p, "http://", 7) != 0)
		return "400 the target is no path and no URL";
	h->host = (struct span){ p + n, strcspn(p + n, "/? ") };
	n += h->host.len;
	h->target.ptr += n;
	h->target.len -= n;
	return http_host_ok(h->host) ? NULL :
	    "400 the target's host is malformed";
}

/* method SP target SP HTTP/1.x, with nothing else between. */
static const char *
http_request_line(struct head *h, struct span line)
{
	struct span word = http_token(&line);
	const char *p = line.ptr + 1, *end = line.ptr + line.len;
	size_t m = 0;

	if (word.len == 0 || line.len == 0 || *line.ptr != ' ')
		return "400 the request does not begin with a method";
	while (m < M_COUNT && (strlen(method_names[m]) != word.len ||
	    memcmp(word.ptr, method_names[m], word.len) != 0))
		m++;
	h->method = (enum method)m;
	h->target.ptr = p;
	while (p < end && *p > 0x20 && *p < 0x7f && *p != '#')
		p++;
	h->target.len = (size_t)(p - h->target.ptr);
	if (h->target.len == 0 || end - p != 9 ||
	    memcmp(p, " HTTP/", 6) != 0 || p[6] < '0' || p[6] > '9' ||
	    p[7] != '.' || p[8] < '0' || p[8] > '9')
		return "400 the request line is not: method, target, HTTP/1.1";
	if (p[6] != '1')
		return "505 the version is not HTTP/1.x";
	h->minor = p[8] == '0' ? 0 : 1;
	if (h->target.len > TARGET_MAX)
		return "414 the target is too long";
	if (m == M_COUNT)
		return "501 the method is not known here";
	if (span_is(h->target, "*"))
		return m == M_OPTIONS ? NULL : "400 only OPTIONS goes with *";
	return *h->target.ptr == '/' ? NULL : http_absolute(h);
}

/* All lines of a head, up to end; NULL: it is too large. Then the rules that
 * need the whole: RFC 9112, 3.2, 6; 9110, 10.1.1. */
static const char *
http_head(struct head *h, const char *p, size_t len, const char *end)
{
	const char *lf = memchr(p, '\n', len), *start = p, *wrong = NULL;
	const struct span *f = h->field;
	unsigned fields = 0;

	if (lf == NULL)
		return "414 the request line is too long";
	wrong = http_request_line(h, (struct span){ p, (size_t)(lf - 1 - p) });
	if (wrong == NULL && (end == NULL || end - start > HEAD_MAX))
		return "431 the head is too large";
	for (p = lf + 1; wrong == NULL && p < end - 2; p = lf + 1) {
		if (++fields > FIELDS_MAX)
			return "431 there are too many fields";
		lf = memchr(p, '\n', (size_t)(end - p));
		wrong = http_field(h, (struct span){ p, (size_t)(lf - 1 - p) });
	}
	if (wrong != NULL)
		return wrong;
	if (f[F_HOST].ptr == NULL ? h->minor == 1 : !http_host_ok(f[F_HOST]))
		return "400 Host is missing or malformed";
	if (h->host.len == 0 && f[F_HOST].ptr != NULL)
		h->host = f[F_HOST];	/* else the absolute form's, or none */
	h->keep = !h->close && (h->minor == 1 || h->keep_alive);
	/* What is too large for a number is too large a body: strtoll says so
	 * with the largest one. A line end, or a blank, ends the digits. */
	if (f[F_LENGTH].ptr != NULL) {
		if (f[F_LENGTH].len == 0 || strspn(f[F_LENGTH].ptr,
		    "0123456789") < f[F_LENGTH].len)
			return "400 Content-Length is no number";
		h->length = strtoll(f[F_LENGTH].ptr, NULL, 10);
	}
	h->chunked = f[F_CODING].ptr != NULL;
	if (h->chunked && (h->minor == 0 || h->length != -1))
		return "400 Transfer-Encoding goes neither with Content-Length "
		    "nor with HTTP/1.0";
	if (h->chunked && !span_is(f[F_CODING], "chunked"))
		return "501 the only transfer coding known is chunked";
	if (f[F_EXPECT].ptr != NULL && h->minor == 1 &&
	    !span_is(f[F_EXPECT], "100-continue"))
		return "417 only 100-continue can be expected";
	return NULL;
}

/*
 * Parses a request's head, from its first line to the empty one. Returns the
 * bytes it took, 0 if there must be more, or minus a status. *seen is how far
 * an earlier call came, so that a head sent byte by byte is not read anew
 * each time; the head must begin with its request line.
 */
static int
http_parse(const char *data, size_t len, size_t *seen, struct head *h)
{
	const char *end = NULL, *p = data + *seen, *lf, *wrong = NULL;

	*h = (struct head){ .method = M_COUNT, .length = -1, .minor = 1,
	    .host = { "", 0 } };
	for (; end == NULL && wrong == NULL && (lf = memchr(p, '\n',
	    (size_t)(data + len - p))) != NULL; p = lf + 1) {
		if (lf == data || lf[-1] != '\r')
			wrong = "400 a line does not end in CR LF";
		else if (lf - data >= 3 && lf[-2] == '\n')
			end = lf + 1;
	}
	*seen = len;
	if (wrong == NULL && end == NULL && len < HEAD_MAX)
		return 0;
	if (wrong == NULL)
		wrong = http_head(h, data, len, end);
	if (wrong == NULL)
		return (int)(end - data);
	h->why = wrong + 4;
	return -atoi(wrong);
}

/*
 * The first line of a chunk, without its CRLF (RFC 9112, 7.1): sets size, and
 * returns 0 or minus a status. Extensions mean nothing here, but each has a
 * name after its ";", and a quoted value has an end.
 */
static int
chunk_size(struct span line, uint64_t *size)
{
	const char *p = line.ptr, *end = p + line.len;
	bool quoted = false, escaped = false, named = true, begun, blank;

	for (*size = 0; p < end && hex_value((unsigned char)*p) != -1; p++)
		*size = *size << 4 | (unsigned)hex_value((unsigned char)*p);
	if (p == line.ptr)
		return -400;
	if (p - line.ptr > 15)
		return -413;
	for (begun = p == end; p < end; p++) {
		blank = *p == ' ' || *p == '\t';
		if (!is_value((unsigned char)*p) || (!blank &&
		    ((!begun && *p != ';') || (!quoted && !named &&
		    !is_token((unsigned char)*p)))))
			return -400;
		begun |= *p == ';';
		if (escaped || (quoted && *p == '\\'))
			escaped = !escaped;
		else if (*p == '"')
			quoted = !quoted;
		else if (!quoted && !blank)
			named = *p != ';';
	}
	return quoted || !named || !begun ? -400 : 0;
}

/* ==== names ==============================================================
 *
 * From a URL to what it names: decoded once, then read. All rules about
 * names are in name_wrong, and nothing reaches the disk that did not pass it.
 */
static bool
ends_in(const char *s, size_t len, const char *end)
{
	size_t n = strlen(end);

	return len >= n && memcmp(s + len - n, end, n) == 0;
}

static bool
cut_suffix(char *s, const char *suffix)
{
	size_t len = strlen(s);

	if (!ends_in(s, len, suffix))
		return false;
	s[len - strlen(suffix)] = '\0';
	return true;
}

/* YYYYMMDDTHHMMSS.mmmZ-SERIAL, the ID of an earlier version, then end. */
static bool
is_version(const char *s, const char *end)
{
	const char *form = "ddddddddTdddddd.dddZ-";
	size_t digits;

	for (; *form != '\0'; form++, s++)
		if (*form == 'd' ? !isdigit((unsigned char)*s) : *s != *form)
			return false;
	digits = strspn(s, "0123456789");
	return digits >= 1 && digits <= 20 && strcmp(s + digits, end) == 0;
}

/* On a file system that ignores the case of letters Demo and demo would be
 * one file under two guards. Set at start. */
static bool names_fold;

/*
 * NULL if name may be a state's, else what is wrong with it:
 * 1. at most 1,000 bytes; 2. UTF-8 without control characters, without
 * backslash; 3. 1 to 32 segments of 1 to 200 bytes; 4. none begins with '.'
 * or '-': so there is no "..", nothing hidden, nothing like an option;
 * 5. none ends like our own files, so no state's file is another's lock;
 * 6. the last is not "lock", which is the lock's URL;
 * 7. the first of several is not the original demo's terraform_state or
 * terraform_lock, whose URLs mean another state;
 * 8. on a file system that ignores case, only one spelling is let in.
 */
static const char *
name_wrong(const char *name)
{
	unsigned segments = 0, code;
	const char *p = name;
	size_t n;

	if (strlen(name) > NAME_LEN_MAX)
		return "a state name has 1000 bytes at most";
	for (; *p != '\0'; p += n) {
		n = utf8_next(p, &code);
		if (n == 0 || !is_shown(code) || code == '\\')
			return "a state name is UTF-8 without control "
			    "characters or backslashes";
		if (names_fold && (isupper((unsigned char)*p) || n > 1))
			return "the server's file system ignores case: no "
			    "capitals, and only ASCII, in a state name";
	}
	for (p = name;; p += n + 1) {
		n = strcspn(p, "/");
		if (n == 0 || n > SEGMENT_MAX || ++segments > SEGMENTS_MAX)
			return "a state name has 1 to 32 segments of 1 to 200 "
			    "bytes";
		if (*p == '.' || *p == '-')
			return "no segment of a state name begins with . or -";
		if (ends_in(p, n, ".lock") || ends_in(p, n, ".log") ||
		    ends_in(p, n, ".tfstate"))
			return "no segment of a state name ends in .lock, .log "
			    "or .tfstate";
		if (p[n] == '\0')
			break;
	}
	if (strcmp(p, "lock") == 0)
		return "no state is called lock: that is a lock's URL";
	return strncmp(name, "terraform_state/", 16) == 0 ||
	    strncmp(name, "terraform_lock/", 15) == 0 ? "no state name begins "
	    "with terraform_state/ or terraform_lock/" : NULL;
}

/* Undoes percent-encoding once. False for a bad escape, a NUL, or what does
 * not fit. */
static bool
url_decode(struct span s, char *out, size_t size, bool query)
{
	int high, low;
	size_t i, n;

	for (i = n = 0; i < s.len; i++, n++) {
		if (n + 1 >= size)
			return false;
		out[n] = query && s.ptr[i] == '+' ? ' ' : s.ptr[i];
		if (s.ptr[i] != '%')
			continue;
		if (s.len - i < 3 ||
		    (high = hex_value((unsigned char)s.ptr[i + 1])) == -1 ||
		    (low = hex_value((unsigned char)s.ptr[i + 2])) == -1 ||
		    (high | low) == 0)
			return false;
		out[n] = (char)(high << 4 | low);
		i += 2;
	}
	out[n] = '\0';
	return true;
}

/* What URLs begin with. A page without a name is the whole of its URL. */
static const struct route {
	const char *path;
	enum kind kind;
	bool named;
} routes[] = {
	{ "/", K_ROOT, false }, { "*", K_STAR, false },
	{ "/-/healthy", K_HEALTHY, false }, { "/-/ready", K_READY, false },
	{ "/-/metrics", K_METRICS, false },
	{ "/-/versions/", K_VERSIONS, true }, { "/-/log/", K_LOG, true },
	{ "/-/", K_STAR, true },	/* no other page */
	{ "/terraform_state/", K_STATE, true },
	{ "/terraform_lock/", K_LOCK, true }, { "/", K_STATE, true },
	{ "", K_STATE, true }
};

/*
 * Fills kind, name and version from a target's path. NULL, or what is wrong
 * with a name; *found is false if there is no such page.
 */
static const char *
name_route(struct span target, struct request *r, bool *found)
{
	const struct route *route = routes;
	char path[NAME_LEN_MAX + 64], *name, *last;
	const char *wrong;
	size_t i, ups = 0;

	*found = true;
	(void)snprintf(r->root, sizeof(r->root), "./");
	for (i = 1; i < target.len && ups < 40; i++)
		if (target.ptr[i] == '/')
			memcpy(r->root + 3 * ups++, "../", 4);
	if (!url_decode(target, path, sizeof(path), false))
		return "the URL has a bad escape or a NUL, or its state name "
		    "more than 1000 bytes";
	for (i = 0; route->path[i] != '\0' ||
	    (!route->named && path[i] != '\0');)
		if (path[i] == route->path[i])
			i++;
		else {
			route++;
			i = 0;
		}
	span_copy(r->name, sizeof(r->name), span(path));
	r->kind = route->kind;
	*found = strcmp(route->path, "/-/") != 0;
	if (!*found || !route->named)
		return NULL;
	name = path + i;
	last = strrchr(name, '/');
	if (last != NULL && r->kind == K_STATE && strcmp(last, "/lock") == 0)
		r->kind = K_LOCK;
	else if (last != NULL && r->kind == K_VERSIONS &&
	    (is_version(last + 1, "") || is_version(last + 1, ".tfstate"))) {
		r->kind = K_VERSION;
		span_copy(r->version, sizeof(r->version), span(last + 1));
		(void)cut_suffix(r->version, ".tfstate");
	} else
		last = NULL;
	if (last != NULL)
		*last = '\0';
	(void)cut_suffix(name, ".tfstate");
	if ((wrong = name_wrong(name)) == NULL)
		span_copy(r->name, sizeof(r->name), span(name));
	return wrong;
}

/*
 * Takes what we know from a target's query: ID, and for the listing q and
 * locked. NULL, or what is wrong. To a state's or a lock's URL nobody may add
 * another key: ?env=prod and ?env=dev would be one state. Only an UNLOCK with
 * one is done, so that a run that has begun ends well.
 */
static const char *
name_query(struct span query, struct request *r, bool unlock)
{
	bool strict = (r->kind == K_STATE || r->kind == K_LOCK) && !unlock;
	struct span part, key;
	char word[8];

	while (span_next(&query, '&', &part)) {
		if (!span_next(&part, '=', &key))
			continue;
		if (!url_decode(key, word, sizeof(word), true))
			word[0] = '\0';
		r->locked |= strcmp(word, "locked") == 0;
		if (r->kind == K_ROOT && strcmp(word, "q") == 0 &&
		    !url_decode(part, r->query, sizeof(r->query), true))
			return "?q= is badly escaped or longer than 255 bytes";
		if (strcmp(word, "ID") != 0 && strict)
			return "a state's URL takes no query but ?ID=, which "
			    "terraform adds: put what makes two states "
			    "different into the path, as in /NAME/dev";
		/* Two IDs, or one cut short, could open what is locked. */
		if (strcmp(word, "ID") == 0 && (r->has_id ||
		    !url_decode(part, r->id, sizeof(r->id), true)))
			return "?ID= is given twice, badly escaped, or longer "
			    "than 256 bytes";
		r->has_id |= strcmp(word, "ID") == 0;
	}
	return NULL;
}

/* ==== storage ============================================================
 *
 * A name's files lie in one directory, its place; everything is opened
 * relative to a descriptor, segment by segment, and no symbolic link is
 * followed. A safe write, in order, with what each step is for:
 *
 *	.tmp/T		written whole, synced	a crash leaves a hidden file
 *	.history/N/V	linked to N.tfstate	the old version has two names
 *	N.tfstate	.tmp/T renamed over it	readers see the old or the new
 *	directory	synced			the new name is on the disk too
 *
 * Functions return 0 or -1 with errno, like the calls that they wrap.
 */
#define STATE ".tfstate"
#define LOCK ".lock"
#define LOG ".log"
#define LEAF (SEGMENT_MAX + 16)

static struct {
	int root;			/* the directory */
	int guard;			/* .guard, opened once */
	struct stat guard_st;
	bool remote;			/* on a network file system */
	uint64_t token;			/* ours, in temporary names */
	_Atomic unsigned tmps;		/* temporary files so far */
	_Atomic bool low;		/* below the reserve */
	_Atomic bool unsynced;		/* a directory's sync has failed */
} store = { .root = -1, .guard = -1 };

static bool
same_file(const struct stat *a, const struct stat *b)
{
	return a->st_ino == b->st_ino && a->st_dev == b->st_dev;
}

static bool
unchanged(const struct stat *a, const struct stat *b)
{
	return same_file(a, b) && a->st_size == b->st_size &&
	    time_order(a->st_mtim, b->st_mtim) == 0 &&
	    time_order(a->st_ctim, b->st_ctim) == 0;
}

/* Is the states' directory still the one of its path? Link counts do not tell
 * that on overlayfs. */
static bool
store_there(void)
{
	struct stat mine, named;

	return fstat(store.root, &mine) == 0 && stat(conf.dir, &named) == 0 &&
	    same_file(&mine, &named);
}

/* Leaves ENOENT in errno only if that is the whole truth. Returns -1. */
static int
absent(void)
{
	if (errno == ENOENT)
		errno = store_there() ? ENOENT : EIDRM;
	return -1;
}

static void
dir_leave(int dir)
{
	if (dir != store.root)
		close_quietly(dir);
}

/* Syncs a directory, and asks once more: XFS, after an error of its own, says
 * that all is well, and EIO from then on. After a failure, every change syncs
 * all its directories. */
static int
dir_sync(int dir)
{
	struct stat st;

	if (sync_fd(dir) == 0 && fstat(dir, &st) == 0)
		return 0;
	store.unsynced = true;
	return -1;
}

enum enter { D_OPEN, D_MAKE, D_SYNC };

/* Finds where a name's files lie. What is missing is made by D_MAKE; for
 * D_OPEN it is no error: then dir is -1, and errno ENOENT. D_SYNC syncs each
 * directory from the root down. Left by dir_leave(p->dir). -1 with errno: then
 * dir is -1, too. */
static int
place_open(const char *name, enum enter how, struct place *p)
{
	const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	char part[NAME_MAX + 1];
	const char *slash;
	int next;

	p->dir = store.root;
	p->leaf = name;
	while (how != D_SYNC || dir_sync(p->dir) == 0) {
		if ((slash = strchr(p->leaf, '/')) == NULL)
			return 0;
		span_copy(part, sizeof(part), (struct span){ p->leaf,
		    (size_t)(slash - p->leaf) });
		p->leaf = slash + 1;
		next = openat(p->dir, part, flags);
		if (next == -1 && errno == ENOENT && how == D_MAKE &&
		    (mkdirat(p->dir, part, 0700) == 0 || errno == EEXIST))
			next = openat(p->dir, part, flags);
		dir_leave(p->dir);
		if ((p->dir = next) == -1)
			break;
	}
	dir_leave(p->dir);
	p->dir = -1;
	(void)absent();
	return how == D_OPEN && errno == ENOENT ? 0 : -1;
}

static const char *
leaf_name(char out[LEAF], const struct place *p, const char *suffix)
{
	(void)snprintf(out, LEAF, "%.200s%s", p->leaf, suffix);
	return out;
}

/* Opens an ordinary file, and nothing else: a FIFO would block, a link lead
 * elsewhere. st may be NULL. */
static int
file_open(int dir, const char *name, int how, struct stat *st)
{
	struct stat mine = { 0 };
	int fd = openat(dir, name, how | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY |
	    O_CLOEXEC, 0600);

	if (fd == -1)
		return absent();
	st = st != NULL ? st : &mine;
	if (fstat(fd, st) == 0) {
		if (S_ISREG(st->st_mode))
			return fd;
		errno = EISDIR;
	}
	close_quietly(fd);
	return -1;
}

/* Opens one of a name's files; -1 with errno, ENOENT only if there is none. */
static int
place_file(const struct place *p, const char *suffix, int how,
    struct stat *st)
{
	char leaf[LEAF];

	errno = ENOENT;
	return p->dir == -1 ? absent() :
	    file_open(p->dir, leaf_name(leaf, p, suffix), how, st);
}

/* Opens a file of a name, for reading; as place_file. */
static int
name_file(const char *name, const char *suffix, struct stat *st)
{
	struct place p;
	int fd;

	if (place_open(name, D_OPEN, &p) == -1)
		return -1;
	fd = place_file(&p, suffix, O_RDONLY, st);
	dir_leave(p.dir);
	return fd;
}

/* Closes a file that nobody is likely to read soon: its pages are better used
 * for what comes next than kept. */
static void
file_forget(int fd)
{
#ifdef POSIX_FADV_DONTNEED
	if (fd != -1)
		(void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
	close_quietly(fd);
}

/* Have two files the same bytes? No, if one cannot be read. */
static bool
file_same(int a, int b)
{
	char one[8192], two[8192];
	off_t at = 0;
	ssize_t n;

	do {
		n = read_at(a, one, sizeof(one), at);
		if (n == -1 || read_at(b, two, sizeof(two), at) != n ||
		    memcmp(one, two, (size_t)n) != 0)
			return false;
		at += n;
	} while (n > 0);
	return true;
}

/* Reads what a state says about itself; brief: no further than needed. False
 * if it is no JSON object, which j tells. */
static bool
meta_read(struct json *j, struct meta *m)
{
	char serial[24], skip[2];
	struct member k[] = {
		{ "serial", serial, sizeof(serial), 0, 0, 0 },
		{ "lineage", m->lineage, sizeof(m->lineage), 0, 0, 0 },
		{ "version", skip, sizeof(skip), 0, 0, 0 },
		{ "terraform_version", m->version, sizeof(m->version),
		    0, 0, 0 },
		{ "encrypted_data", skip, sizeof(skip), 0, 0, 0 },
		{ "id", skip, sizeof(skip), 0, 0, 0 },
	};
	size_t i;
	bool ok;

	*m = (struct meta){ 0 };
	j->members = k;
	j->n = j->brief ? 4 : 6;
	ok = json_object(j);
	m->known = k[0].type == 'n' && k[0].len < sizeof(serial) &&
	    whole_number(serial, &m->serial);
	m->lineage_len = k[1].len;
	m->type = k[2].type == 'n' || k[4].type == 's' ? 's' :
	    k[2].type == 's' || k[5].type == 's' ? 'l' : 0;
	for (i = 0; i < 5; i++)
		if (k[i].n > 1 && i != 3)
			m->doubled = k[i].key;
	return ok;
}

/* The same of a state in a file, as far as it has one. -s must know the
 * serial, wherever it stands. */
static void
meta_file(int fd, struct meta *m)
{
	struct json j = { .brief = 4, .fd = fd,
	    .max = conf.strict ? conf.body_max : META_MAX };

	(void)meta_read(&j, m);
}

/* Room on the disk, in bytes, and how much of it is kept, so that locks can be
 * released and taken when states no longer fit: at most a sixteenth. */
static int
store_room(uint64_t *room, uint64_t *reserve)
{
	struct statvfs fs;
	bool low;

	if (fstatvfs(store.root, &fs) == -1)
		return -1;
	/* Some network file systems do not tell. */
	*room = fs.f_blocks == 0 ? UINT64_MAX / 2 :
	    (uint64_t)fs.f_bavail * fs.f_frsize;
	*reserve = (uint64_t)fs.f_blocks * fs.f_frsize / 16;
	*reserve = *reserve < RESERVE ? *reserve : RESERVE;
	low = *room < *reserve;
	if (low != store.low)
		complain("%s: %s", conf.dir, low ? "the disk is nearly full, "
		    "only locks are written" : "there is room again");
	store.low = low;
	return 0;
}

/* 0 if n more bytes leave the reserve alone, else -1; errno may be ENOSPC in
 * either case. */
static int
store_fits(int64_t n)
{
	uint64_t room, reserve;

	if (store_room(&room, &reserve) == -1)
		return -1;
	errno = ENOSPC;
	return room >= reserve + (uint64_t)n ? 0 : -1;
}

/* ---- temporary files: .tmp/TOKEN-NUMBER, or .tmp-TOKEN-NUMBER elsewhere */

static void
tmp_name(struct tmp *t, int dir)
{
	*t = (struct tmp){ .fd = -1, .dir = dir };
	(void)snprintf(t->name, sizeof(t->name), ".tmp%c%016llx-%u",
	    dir == store.root ? '/' : '-', (unsigned long long)store.token,
	    store.tmps++);
}

/* Closes one, and removes it if it was not renamed. Leaves errno alone. */
static void
tmp_remove(struct tmp *t)
{
	int saved = errno;

	if (t->name[0] != '\0')
		(void)unlinkat(t->dir, t->name, 0);
	close_quietly(t->fd);
	*t = (struct tmp){ .fd = -1 };
	errno = saved;
}

/* Makes one and opens it; ended by tmp_remove, after a rename too. -1 with
 * errno: nothing is left of it. */
static int
tmp_create(struct tmp *t, int dir)
{
	const int how = O_RDWR | O_CREAT | O_EXCL;

	tmp_name(t, dir);
	t->fd = file_open(dir, t->name, how, NULL);
	if (t->fd == -1 && errno == ENOENT && dir == store.root &&
	    mkdirat(dir, ".tmp", 0700) == 0)	/* somebody tidied up */
		t->fd = file_open(dir, t->name, how, NULL);
	if (t->fd != -1)
		return 0;
	tmp_remove(t);			/* it may have been made */
	return -1;
}

static int
tmp_rename(struct tmp *t, int dir, const char *name)
{
	if (renameat(t->dir, t->name, dir, name) == -1)
		return -1;
	t->name[0] = '\0';
	return 0;
}

/* Makes one a copy of a file, synced, with the file's mtime. */
static int
tmp_copy(struct tmp *t, int dir, int fd)
{
	char piece[8192];
	struct stat st;
	off_t at = 0;
	ssize_t n;

	if (fstat(fd, &st) == -1 || tmp_create(t, dir) == -1)
		return -1;
	while ((n = read_at(fd, piece, sizeof(piece), at)) > 0 &&
	    write_all(t->fd, piece, (size_t)n) == 0)
		at += n;
	if (n == 0 && futimens(t->fd, (const struct timespec[]){ st.st_mtim,
	    st.st_mtim }) == 0 && sync_fd(t->fd) == 0)
		return 0;
	tmp_remove(t);
	return -1;
}

/* Moves one to another directory: by a copy, if that is another file system
 * or a mount point. */
static int
tmp_move(struct tmp *t, int dir)
{
	struct tmp to;

	tmp_name(&to, dir);
	if (renameat(t->dir, t->name, dir, to.name) == 0)
		to.fd = t->fd;
	else if (tmp_copy(&to, dir, t->fd) == 0)
		tmp_remove(t);
	else
		return -1;
	*t = to;
	return 0;
}

/* ---- history: .history/NAME/ID.tfstate ---- */

/* Opens a name's history, a directory of its own; or syncs it. */
static int
history_open(const char *name, enum enter how)
{
	char path[NAME_LEN_MAX + 16];
	struct place p;

	(void)snprintf(path, sizeof(path), ".history/%s/", name);
	(void)place_open(path, how, &p);
	return p.dir;
}

/* Opens an earlier version for reading. */
static int
version_open(const char *name, const char *id, struct stat *st)
{
	char path[NAME_LEN_MAX + VERSION_ID + 16];

	(void)snprintf(path, sizeof(path), ".history/%s/%s", name, id);
	return name_file(path, STATE, st);
}

static const char *
version_leaf(char out[LEAF], const char *id)
{
	return leaf_name(out, &(struct place){ .leaf = id }, STATE);
}

/* Lists the IDs in a history, oldest first; its directory stays open. */
static int
history_list(int dir, struct names *ids)
{
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), error;
	DIR *d = copy == -1 ? NULL : fdopendir(copy);
	struct dirent *e;

	if (d == NULL) {
		close_quietly(copy);
		return -1;
	}
	names_free(ids);
	while (errno = 0, (e = readdir(d)) != NULL)
		if (is_version(e->d_name, STATE) &&
		    cut_suffix(e->d_name, STATE))
			names_add(ids, e->d_name);
	error = ids->failed ? ENOMEM : errno;
	(void)closedir(d);
	names_sort(ids);
	errno = error;
	return error == 0 ? 0 : -1;
}

/* The time in a version's ID, in milliseconds; 0 if it is none. */
static int64_t
version_ms(const char *id)
{
	static const struct { int at, digits; } parts[] = {
		{ 0, 4 }, { 4, 2 }, { 6, 2 }, { 9, 2 }, { 11, 2 }, { 13, 2 },
		{ 16, 3 }
	};
	int n[7] = { 0 }, i, k;
	struct tm tm = { 0 };

	for (i = 0; i < 7 && is_version(id, ""); i++)
		for (k = 0; k < parts[i].digits; k++)
			n[i] = n[i] * 10 + (id[parts[i].at + k] - '0');
	tm.tm_year = n[0] - 1900;
	tm.tm_mon = n[1] - 1;
	tm.tm_mday = n[2];
	tm.tm_hour = n[3];
	tm.tm_min = n[4];
	tm.tm_sec = n[5];
	return i == 0 ? 0 : (int64_t)timegm(&tm) * 1000 + n[6];
}

/* The next version's ID, added to the list: the time at which it was
 * replaced, or a millisecond after the newest there is, if that is later: IDs
 * sort in the order of events whatever the clocks say. NULL: no memory. */
static const char *
history_next(struct names *ids, uint64_t serial)
{
	const int64_t end = 253402300799999;	/* of the year 9999 */
	int64_t ms = time_ms(), newest = 0;
	char when[32], id[VERSION_ID];
	size_t i;

	for (i = ids->n; i > 0 && newest == 0; i--)
		if ((newest = version_ms(ids->list[i - 1])) >= end)
			newest = 0;	/* nothing can be later than that */
	time_text(when, ms > newest ? ms : newest + 1, true);
	(void)snprintf(id, sizeof(id), "%.20s-%llu", when,
	    (unsigned long long)serial);
	names_add(ids, id);
	return ids->failed ? NULL : ids->list[ids->n - 1];
}

/*
 * Removes what is beyond -k, the oldest first; but before the others those
 * that were written under the lock that is held, except the newest of them:
 * terraform writes every 20 seconds of a long run, and these must not push out
 * what was there before it. Their mtime is later than the lock's: one file
 * system, one clock. If an ID or an mtime is later than now, clocks have
 * moved: then the oldest go.
 */
static void
history_prune(int dir, struct names *ids, const struct lock *lock)
{
	size_t excess = ids->n > conf.keep ? ids->n - conf.keep : 0, i;
	size_t own = ids->n, first = 0;
	int64_t now = time_ms();
	char leaf[LEAF], *id;
	struct stat st;

	for (i = 0; lock->held && excess > 0 && i < ids->n; i++) {
		id = ids->list[i];
		if (fstatat(dir, version_leaf(leaf, id), &st,
		    AT_SYMLINK_NOFOLLOW) == -1)
			continue;
		if (version_ms(id) > now || st.st_mtim.tv_sec > now / 1000) {
			names_sort(ids);
			break;
		}
		if (time_order(st.st_mtim, lock->since) <= 0)
			continue;
		if (own < i) {		/* the one before: to the front */
			id = ids->list[own];
			memmove(ids->list + first + 1, ids->list + first,
			    (own - first) * sizeof(id));
			ids->list[first++] = id;
		}
		own = i;
	}
	for (i = 0; i < excess; i++)
		(void)unlinkat(dir, version_leaf(leaf, ids->list[i]), 0);
}

/* ---- small states, for the loop alone ----
 *
 * What can be had without waiting for a disk: from memory that the kernel
 * says it has, or from an entry of ours, which serves as long as the name
 * leads to the same, unchanged file. A file changed less than a second ago
 * could change again within one tick, and look as before: it is never taken
 * for the same. Nor is a name with slashes, where fstatat would follow a link
 * in place of a directory.
 */
struct cached {
	char name[NAME_LEN_MAX + 1];	/* "": serves no more */
	struct stat st;
	char data[SMALL];
};

/* The state if it is small and can be had without waiting, else NULL: then a
 * thread will see to it. Valid until the next call. */
static const struct cached *
cache_get(const char *name)
{
#if defined(__linux__) && defined(RWF_NOWAIT)
	static struct cached cache[CACHE_SLOTS];
	/* struct open_how: flags, mode, resolve: NO_SYMLINKS, CACHED. */
	static const uint64_t how[3] = { O_RDONLY | O_NOFOLLOW | O_NONBLOCK |
	    O_NOCTTY | O_CLOEXEC, 0, 0x04 | 0x20 };
	char file[NAME_LEN_MAX + sizeof(STATE)];
	const char *p;
	uint32_t hash = 0;
	struct cached *c;
	struct stat st;
	int64_t now;
	bool ok;
	int fd;

	for (p = name; *p != '\0'; p++)
		hash = hash * 31 + (unsigned char)*p;
	c = &cache[hash % CACHE_SLOTS];
	(void)snprintf(file, sizeof(file), "%s" STATE, name);
	if (strcmp(c->name, name) == 0 && fstatat(store.root, file, &st,
	    AT_SYMLINK_NOFOLLOW) == 0 && unchanged(&st, &c->st))
		return c;
	c->name[0] = '\0';
	if (store.remote)
		return NULL;
	now = time_ms() / 1000;
	fd = (int)syscall(437, store.root, file, how, sizeof(how));
	ok = fd != -1 && fstat(fd, &c->st) == 0 && S_ISREG(c->st.st_mode) &&
	    c->st.st_size > 0 && c->st.st_size <= SMALL &&
	    preadv2(fd, &(struct iovec){ c->data, SMALL }, 1, 0,
	    RWF_NOWAIT) == c->st.st_size;
	close_quietly(fd);
	if (ok && strchr(name, '/') == NULL && c->st.st_ctim.tv_sec + 1 < now)
		memcpy(c->name, name, (size_t)(p - name) + 1);
	return ok ? c : NULL;
#else
	(void)name;
	return NULL;
#endif
}

/* ==== locks and guard ====================================================
 *
 * NAME.lock present = locked. Its bytes are the lock info of the holder. A
 * file that is not lock info was made by hand: a freeze, held by nobody whose
 * ID could match, until force-unlock or rm ends it. One that is empty, or
 * begins with a NUL byte, is a LOCK that a crash cut short: nobody was told of
 * it, so nobody has it.
 *
 * Who changes a name's files holds its guard. Between processes and hosts it
 * is a record lock on the byte of .guard that is the name's hash, inside the
 * process an entry in a list. No other name waits for it.
 */

/* Takes what is known of it from lock info. False if that is no JSON object,
 * which j tells, or has not one ID of a good length, without a NUL. */
static bool
lock_info(struct json *j, struct lock *l)
{
	struct member k[] = {
		{ "ID", l->id, sizeof(l->id), 0, 0, 0 },
		{ "Operation", l->operation, sizeof(l->operation), 0, 0, 0 },
		{ "Info", l->info, sizeof(l->info), 0, 0, 0 },
		{ "Who", l->who, sizeof(l->who), 0, 0, 0 },
		{ "Created", l->created, sizeof(l->created), 0, 0, 0 },
	};

	j->members = k;
	j->n = 5;
	return json_object(j) && k[0].n == 1 && k[0].type == 's' &&
	    k[0].len > 0 && k[0].len <= ID_MAX;
}

/* Reads who holds the lock, or -1: could not look. l->raw is to be freed. */
static int
lock_read(const struct place *p, struct lock *l)
{
	struct lock freeze;
	ssize_t n = -1;
	struct stat st;
	struct json j;
	unsigned code;
	size_t len;
	char *end;
	int fd;

	*l = (struct lock){ 0 };
	if ((fd = place_file(p, LOCK, O_RDONLY, &st)) == -1)
		return errno == ENOENT ? 0 : -1;
	if ((end = calloc(1, LOCK_INFO_MAX + 1)) != NULL)
		n = read_at(fd, end, LOCK_INFO_MAX, 0);
	close_quietly(fd);
	if (n == -1) {
		free(end);
		return -1;
	}
	freeze = (struct lock){ .since = st.st_mtim, .raw = end,
	    .len = (size_t)n, .held = *end != '\0', .torn = *end == '\0' };
	*l = freeze;
	j = json_text(l->raw, l->len, NULL, 0);
	if (l->torn || (st.st_size <= LOCK_INFO_MAX && lock_info(&j, l)))
		return 0;
	/* A freeze: what its first line says becomes its ID, which is all
	 * that Terraform up to 1.14 shows of a holder, and its Info. */
	*l = freeze;
	l->foreign = true;
	while ((len = utf8_next(end, &code)) > 0 && is_shown(code))
		end += len;
	span_copy(l->info, sizeof(l->info), (struct span){ l->raw,
	    (size_t)(end - l->raw) });
	(void)snprintf(l->id, sizeof(l->id), "%s",
	    l->info[strspn(l->info, " ")] != '\0' ? l->info : "made-by-hand");
	return 0;
}

/* Appends what a client in conflict is told: the holder's own bytes, or, of
 * a freeze, lock info with an ID (terraform 1.15) and without a Created, which
 * would have to be a time. */
static void
lock_tell(const struct lock *l, struct buf *b)
{
	if (!l->foreign) {
		buf_add(b, l->raw, l->len);
		return;
	}
	buf_str(b, "{\"ID\":");
	buf_json(b, l->id);
	buf_str(b, ",\"Operation\":\"\",\"Info\":");
	buf_json(b, l->info);
	buf_str(b, ",\"Who\":\"\",\"Version\":\"\",\"Path\":\"\"}");
}

static bool
lock_is(const struct lock *l, const char *id)
{
	return l->held && !l->foreign && strcmp(l->id, id) == 0;
}

/* May one who may only plan take and release it: does its operation change
 * no state? terraform console's is OperationTypeInvalid. */
static bool
lock_plans(const struct lock *l)
{
	static const char *const plans[] = { "", "OperationTypePlan",
	    "OperationTypeInvalid", "migration source state" };
	size_t i = 0;

	while (i < 4 && strcmp(l->operation, plans[i]) != 0)
		i++;
	return i < 4;
}

/* ---- the guard ---- */

/* The guards that threads have, or wait for, as they came. The first of those
 * with the same byte has it. */
static struct {
	pthread_mutex_t mutex;
	struct guard *first;
} guards = { .mutex = PTHREAD_MUTEX_INITIALIZER };

/* Locks or frees one byte of .guard; does not wait. Classic locks belong to
 * the process, and any close of .guard drops them all: it is opened once. */
static int
guard_set(short type, off_t byte)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET,
	    .l_start = byte, .l_len = 1 };
#if defined(F_OFD_SETLK) && !defined(NO_OFD)
	int how = F_OFD_SETLK, n;
#else
	int how = F_SETLK, n;
#endif

	while ((n = fcntl(store.guard, how, &l)) == -1 && errno == EINTR)
		continue;
	return n;
}

/* A server's byte, above those of all names: held while it lives. */
static off_t
guard_server_byte(uint64_t token)
{
	return (off_t)((uint64_t)1 << 62 | token >> 3);
}

/* Is the locked file still the one that other servers lock? */
static bool
guard_in_place(void)
{
	struct stat st;

	return fstatat(store.root, ".guard", &st, AT_SYMLINK_NOFOLLOW) == 0 &&
	    same_file(&st, &store.guard_st);
}

/* How many stand before it with the same byte. It joins the list, if it is
 * not in it; or leaves it. */
static unsigned
guard_before(struct guard *g, bool leave)
{
	struct guard **p;
	unsigned n = 0;

	(void)pthread_mutex_lock(&guards.mutex);
	for (p = &guards.first; *p != NULL && *p != g; p = &(*p)->next)
		n += (*p)->byte == g->byte;
	if (leave)
		*p = g->next;
	else if (*p == NULL) {
		g->next = NULL;
		*p = g;
	}
	(void)pthread_mutex_unlock(&guards.mutex);
	return n;
}

static void
guard_drop(struct guard *g)
{
	(void)guard_set(F_UNLCK, g->byte);	/* cannot fail */
	(void)guard_before(g, true);
}

/*
 * Takes a name's guard, or tries to for so many milliseconds; 0: tries once.
 * -1 with errno: ETIMEDOUT; EBUSY: too many wait for it; EIDRM: .guard was
 * removed or replaced. The byte is 62 bits of a hash, so that no two names
 * meet. It never changes, or an old and a new server would exclude nobody.
 * Ended by guard_drop; after -1 there is nothing to drop.
 */
static int
guard_take(struct guard *g, const char *name, int64_t ms)
{
	int64_t end = clock_ms() + ms, step = 1;
	unsigned char digest[32];
	unsigned before;
	bool first = true;
	int error = EAGAIN;

	sha256(name, strlen(name), digest);
	g->byte = (off_t)(((uint64_t)load32(digest) << 32 |
	    load32(digest + 4)) & (((uint64_t)1 << 62) - 1));
	for (; error == EAGAIN; step += step < 16 ? step : 0) {
		before = guard_before(g, false);
		first = first && before == 0;
		if (before == 0 && guard_set(F_WRLCK, g->byte) == 0) {
			if (guard_in_place())
				return 0;
			guard_drop(g);
			errno = EIDRM;
			return -1;
		}
		error = before > WAITERS_MAX ? EBUSY :
		    before > 0 || errno == EACCES ? EAGAIN : errno;
		if (error == EAGAIN && clock_ms() + step > end)
			error = ETIMEDOUT;
		if (error == EAGAIN)
			(void)wait_until(-1, 0, clock_ms() + step);
	}
	(void)guard_before(g, true);
	if (error == ETIMEDOUT && ms == GUARD_MS && first)	/* once */
		complain("%s: its guard cannot be had: another server on %s, "
		    "or its disk, hangs", name, conf.dir);
	errno = error;
	return -1;
}

/* Reads a lock without meaning to change it, and waits for next to nothing.
 * What looks like a freeze may be a lock whose info is being written: under
 * the guard it is whole. */
static int
lock_look(const struct place *p, const char *name, struct lock *l)
{
	int status = lock_read(p, l);
	struct guard g;

	if (l->foreign && guard_take(&g, name, 20) == 0) {
		free(l->raw);
		status = lock_read(p, l);
		guard_drop(&g);
	}
	return status;
}

/* ==== users ==============================================================
 *
 * Who may do what. A request shows a name and a secret, or a secret alone;
 * both are compared with every line, all 32 bytes of a digest each time, so
 * that neither the secret nor the existence of a user can be told from the
 * time it takes. Several lines may speak of one user: the highest permission
 * counts.
 */
struct user {
	char *name;
	unsigned char secret[32];	/* SHA-256 */
	enum right right;
	const char *pattern;
};

struct users {
	struct user *list;		/* for each pattern of each line one */
	size_t n;
	_Atomic unsigned refs;		/* requests that use it, and the loop */
	char *text;			/* the file, cut up; users point here */
};

static struct users *users;		/* NULL: everybody may do everything */

static const char right_names[][6] = { "none", "read", "plan", "write" };

/* The users as they are now; to be dropped. For the loop, which has them. */
static struct users *
users_hold(void)
{
	if (users != NULL)
		users->refs++;
	return users;
}

/* Gives a hold back; the last one frees. */
static void
users_drop(struct users *u)
{
	if (u == NULL || --u->refs > 0)
		return;
	free(u->list);
	free(u->text);
	free(u);
}

static bool
same_secret(const unsigned char *a, const unsigned char *b)
{
	unsigned diff = 0;
	size_t i;

	for (i = 0; i < 32; i++)
		diff |= a[i] ^ b[i];
	return diff == 0;
}

/* '*' any bytes, slashes too; '?' one byte. No recursion, no surprises. */
static bool
glob(const char *pattern, const char *s)
{
	const char *star = NULL, *from = NULL;

	while (*s != '\0') {
		if (*pattern == '*') {
			star = pattern++;
			from = s;
		} else if (*pattern == '?' || *pattern == *s) {
			pattern++;
			s++;
		} else if (star != NULL) {
			pattern = star + 1;
			s = ++from;
		} else
			return false;
	}
	return pattern[strspn(pattern, "*")] == '\0';
}

/* The highest permission of the lines that are the request's, on a name;
 * name NULL: on any at all. */
static enum right
user_right(const struct request *r, const char *name)
{
	enum right right = R_NONE;
	const struct user *u;
	size_t i;

	if (r->users == NULL)
		return R_WRITE;
	for (i = 0; i < r->users->n; i++) {
		u = &r->users->list[i];
		if (same_secret(u->secret, r->secret) && u->right > right &&
		    (r->bearer || strcmp(u->name, r->user) == 0) &&
		    (name == NULL || glob(u->pattern, name)))
			right = u->right;
	}
	return right;
}

/* Takes user and secret from Authorization: Basic or Bearer (RFC 7617,
 * 6750). False if it shows none. */
static bool
user_shows(struct request *r, struct span v)
{
	char text[8192], *colon;
	struct span scheme;
	ssize_t n;
	size_t i;

	(void)span_next(&v, ' ', &scheme);
	if (!span_next(&v, '\0', &v))	/* takes blanks off */
		return false;
	if (span_is(scheme, "bearer")) {
		sha256(v.ptr, v.len, r->secret);
		r->bearer = true;	/* has no name until it is known */
		for (i = 0; i < r->users->n; i++)
			if (same_secret(r->users->list[i].secret, r->secret))
				span_copy(r->user, sizeof(r->user),
				    span(r->users->list[i].name));
		return true;
	}
	n = base64_decode(v, text, sizeof(text) - 1);
	if (!span_is(scheme, "basic") || n == -1)
		return false;
	text[n] = '\0';
	colon = strchr(text, ':');
	if (strlen(text) != (size_t)n || colon == NULL || colon == text ||
	    (size_t)(colon - text) >= sizeof(r->user))
		return false;
	span_copy(r->user, sizeof(r->user), (struct span){ text,
	    (size_t)(colon - text) });
	sha256(colon + 1, strlen(colon + 1), r->secret);
	return true;
}

/* Is there something in it that no client can show? */
static bool
has_control(const char *s)
{
	while (*s != '\0' && !iscntrl((unsigned char)*s))
		s++;
	return *s != '\0';
}

/* Reads "sha256:HEX", or takes the digest of what is written. */
static bool
secret_read(const char *word, unsigned char out[32])
{
	size_t i;

	if (strncmp(word, "sha256:", 7) != 0) {
		sha256(word, strlen(word), out);
		return true;
	}
	word += 7;
	if (strlen(word) != 64 || strspn(word, "0123456789abcdefABCDEF") != 64)
		return false;
	for (i = 0; i < 64; i++)
		out[i / 2] = (unsigned char)(out[i / 2] << 4 |
		    hex_value((unsigned char)word[i]));
	return true;
}

/* A pattern that was surely meant otherwise; NULL, or what is wrong: with a
 * letter for each wildcard it is no name. */
static const char *
pattern_wrong(const char *pattern)
{
	char name[NAME_LEN_MAX + 2];
	char *p;

	if (strpbrk(pattern, ",\"'") != NULL)
		return "no commas or quotes between patterns, only blanks; ? "
		    "stands for a comma in a name";
	(void)snprintf(name, sizeof(name), "%s", pattern);
	while ((p = strpbrk(name, "*?")) != NULL)
		*p = 'x';
	return name_wrong(name);
}

/* One line, cut into words in place. NULL, or what is wrong with it, or with
 * its pattern *at. */
static const char *
user_line(struct users *u, char *line, const char **at)
{
	struct user new = { .right = R_WRITE }, *list;
	char *save = NULL, *field[4];
	const char *wrong;
	size_t i;

	for (i = 0; i < 4; i++)
		field[i] = strtok_r(i == 0 ? line : NULL, " \t\r", &save);
	if (field[0] == NULL || field[0][0] == '#')
		return NULL;
	if (strncmp(field[0], "\xef\xbb\xbf", 3) == 0)
		return "it begins with a byte order mark: save it without";
	if (field[1] == NULL || field[2] == NULL)
		return "a line is: name secret permission [pattern...]";
	if (strlen(field[0]) > 63 || strchr(field[0], ':') != NULL)
		return "a user name has 63 bytes at most, and no colon";
	if (has_control(field[0]) || has_control(field[1]))
		return "a name or a secret has a control character";
	if (!secret_read(field[1], new.secret))
		return "after sha256: come 64 hexadecimal digits";
	while (strcmp(field[2], right_names[new.right]) != 0)
		if (--new.right == R_NONE)
			return "a permission is read, plan or write";
	new.name = field[0];
	new.pattern = field[3] == NULL || *field[3] == '#' ? "*" : field[3];
	do {
		*at = new.pattern;
		if ((wrong = pattern_wrong(new.pattern)) != NULL)
			return wrong;
		list = realloc(u->list, (u->n + 1) * sizeof(*list));
		if (list == NULL)
			return "out of memory";
		list[u->n++] = new;
		u->list = list;
		new.pattern = strtok_r(NULL, " \t\r", &save);
	} while (new.pattern != NULL && *new.pattern != '#');
	*at = NULL;
	return NULL;
}

/* Reads the file of -u as a string; NULL, having complained, if it is none, or
 * u is. Once we serve, nothing may be waited for: a FIFO least of all. */
static char *
users_text(const struct users *u, const char *file)
{
	char *text = u != NULL ? malloc(USERS_MAX + 1) : NULL;
	int fd = open(file, O_RDONLY | O_CLOEXEC | O_NOCTTY |
	    (users != NULL ? O_NONBLOCK : 0));
	size_t len = 0;
	ssize_t n = -1;
	struct stat st;

	if (text != NULL && fd != -1 && fstat(fd, &st) == 0)
		while ((n = read(fd, text + len, USERS_MAX - len)) > 0)
			len += (size_t)n;
	close_quietly(fd);
	if (n == -1)
		complain("cannot read the users in %s: %s", file,
		    strerror(errno));
	else if (users != NULL && !S_ISREG(st.st_mode))
		complain("%s: it is not a file", file);
	else if (len == USERS_MAX || memchr(text, 0, len) != NULL)
		complain("%s: it is too large, or has a NUL in it", file);
	else {
		if ((st.st_mode & 077) != 0)
			complain("others can read %s: chmod 600 it", file);
		text[len] = '\0';
		return text;
	}
	free(text);
	return NULL;
}

/* The users of a file. NULL, having complained, if it is no good. */
static struct users *
users_read(const char *file)
{
	struct users *u = calloc(1, sizeof(*u));
	char *text = users_text(u, file), *rest = text, *line;
	const char *wrong = NULL, *at = NULL;
	size_t number = 0;

	if (text == NULL) {
		free(u);
		return NULL;
	}
	u->refs = 1;
	u->text = text;
	for (; wrong == NULL && (line = strsep(&rest, "\n")) != NULL; number++)
		wrong = user_line(u, line, &at);
	if (wrong == NULL && u->n > 0)
		return u;
	complain("%s, line %zu: %s%s%s", file, number, at != NULL ? at : "",
	    at != NULL ? ": " : "", wrong != NULL ? wrong :
	    "it names no user");
	users_drop(u);
	return NULL;
}

/* ==== wire ===============================================================
 *
 * One connection, as the thread sees that serves its request: what is sent
 * and received waits in wait_until, up to a deadline, and nowhere else.
 */
struct listener {
	bool local;			/* loopback */
	bool path;			/* unix socket */
	char name[128];			/* http://127.0.0.1:8080 */
};

enum conn_state {
	C_HEAD,		/* between requests, or a head is coming */
	C_DENY,		/* its answer waits for its time: see pool_relieve, too */
	C_DRAIN,	/* told all: the client may finish, and close */
	C_GONE		/* to be closed */
};

struct conn {
	int fd;
	enum conn_state state;
	const struct listener *from;
	struct request *r;		/* or NULL: between two */
	struct conn *next, *prev;	/* in the list that it is in */
	bool begun;			/* the first byte of a head is here */
	bool dry;			/* read, and poll has told of no more */
	unsigned blanks;		/* empty lines before it */
	char *in;			/* HEAD_MAX bytes, or NULL */
	size_t at, used, seen;		/* of in */
	int64_t since, active, deadline;	/* ms, monotonic */
	int64_t moved;			/* bytes since then */
	int64_t waits;			/* ms: since when for its client, or 0 */
	char peer[56];
};

/* For waits, which the loop looks at, and for the lists of the pool. */
static pthread_mutex_t conn_mutex = PTHREAD_MUTEX_INITIALIZER;

/* ---- what went wrong ---- */

/* Sets a plain answer of one line, which is also the reason in the logs, and
 * returns its status. */
__attribute__((format(printf, 3, 4)))
static int
refuse(struct request *r, int status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(r->why, sizeof(r->why), fmt, ap);
	va_end(ap);
	scrub(r->why);
	r->text.len = 0;
	r->text.failed = false;
	buf_fmt(&r->text, "%s\n", r->why);
	r->type = "text/plain; charset=utf-8";
	return r->status = status;
}

/* There will be no answer: the connection is cut, terraform sends the request
 * again. A 408 it would take for final. Returns -1, in place of a status. */
static int
cut(struct request *r, const char *why)
{
	(void)snprintf(r->why, sizeof(r->why), "%s", why);
	r->cut = true;
	return -1;
}

/* The one place where an errno becomes a status: what stands here, or 503,
 * which invites the client to try again. The first two mean that the guard was
 * not to be had: such a wait is long, and do_lock knows them by it. */
static const struct { int error, status; const char *why; } errnos[] = {
	{ ETIMEDOUT, 503, "another request for it takes too long" },
	{ EBUSY, 503, "too many requests wait for it" },
	{ EIDRM, 500, "its directory, or .guard, was removed or replaced" },
	{ ELOOP, 500, "it is a symbolic link" },
	{ ENOTDIR, 500, "a part of its path is a link, or no directory" },
	{ EISDIR, 500, "it is not an ordinary file" },
	{ ENOSPC, 507, NULL }, { EDQUOT, 507, NULL }, { EFBIG, 507, NULL },
	{ EACCES, 500, NULL }, { EROFS, 500, NULL }, { 0, 503, NULL }
};

/* Takes errno. Returns the status; complains on stderr, unless all it needs is
 * another try. */
static int
refuse_errno(struct request *r, const char *what)
{
	int error = errno;
	const char *why = strerror(error);
	size_t i = 0;

	while (errnos[i].error != 0 && errnos[i].error != error)
		i++;
	if (errnos[i].why != NULL)
		why = errnos[i].why;
	if (i < 2)
		r->retry = 10;
	else
		complain("%s: cannot %s: %s", r->name, what, why);
	return refuse(r, errnos[i].status, "cannot %s: %s", what, why);
}

/* -v: what goes over the wire, on stderr, credentials blanked. For debugging:
 * it waits for whoever reads stderr. */
static void
trace(const char *mark, const char *data, size_t len)
{
	struct span rest = { data, len }, line, name;
	const char *p, *end;
	bool secret;

	for (p = data; conf.verbose && span_next(&rest, '\n', &line);
	    p = rest.ptr) {
		end = line.ptr + line.len;
		name = line;
		(void)span_next(&line, ':', &name);
		secret = span_is(name, "authorization") ||
		    span_is(name, "proxy-authorization") ||
		    span_is(name, "cookie");
		if (secret)
			end = name.ptr + name.len;
		(void)fprintf(stderr, "%s %.*s%s\n", mark, (int)(end - p), p,
		    secret ? ": ***" : "");
	}
}

/* ---- time ---- */

/* Begins something now that the client has so long for. */
static void
conn_within(struct conn *c, int64_t now, int64_t ms)
{
	c->since = c->active = now;
	c->deadline = now + ms;
	c->moved = 0;
}

/* Bytes have come or gone: a second more for every RATE of them, so that a
 * trickle ends, but never credit for a longer silence than at first. */
static void
conn_moved(struct conn *c, size_t n)
{
	c->active = clock_ms();
	c->moved += (int64_t)n;
	c->deadline = c->since + BODY_MS + c->moved * 1000 / RATE;
	if (c->deadline > c->active + BODY_MS)
		c->deadline = c->active + BODY_MS;
}

/* After recv or send gave -1: waits for the client if that helps. False: it
 * has left, or is too slow, or had to make room for others. (Of that, the next
 * recv or send may tell first, as an end.) */
static bool
conn_wait(struct conn *c, short events)
{
	short news;

	if (errno == EINTR)
		return true;
	if (errno != EAGAIN && errno != EWOULDBLOCK)
		return false;
	(void)pthread_mutex_lock(&conn_mutex);
	c->waits = c->active;
	(void)pthread_mutex_unlock(&conn_mutex);
	news = wait_until(c->fd, events, c->deadline);
	(void)pthread_mutex_lock(&conn_mutex);
	c->waits = 0;
	(void)pthread_mutex_unlock(&conn_mutex);
	return news != 0;
}

/*
 * Is the client still there? One that has closed, or reset, will not see the
 * answer, and may have repeated the request elsewhere long ago. That one
 * which has only finished sending looks the same; nginx and Go do not tell
 * them apart, either.
 */
static bool
client_there(const struct request *r)
{
	int fd = r->conn->fd;
	short news = wait_until(fd, POLLIN | POLLRDHUP, 0);
	char byte;

	if ((news & (POLLRDHUP | POLLHUP | POLLERR)) != 0)
		return false;
	return (news & POLLIN) == 0 || recv(fd, &byte, 1, MSG_PEEK) != 0;
}

static int
refuse_gone(struct request *r)
{
	r->keep = false;
	return refuse(r, 400, "the client has closed the connection: nothing "
	    "was changed");
}

/* ---- the body ----
 *
 * Functions return 0, a status, or -1: the request was cut.
 */

/* Closes the gap that consumed bytes left at the front of the buffer. */
static void
conn_compact(struct conn *c)
{
	if (c->at == 0)
		return;
	memmove(c->in, c->in + c->at, c->used - c->at);
	c->used -= c->at;
	c->at = c->seen = 0;
}

/* Reads what comes of it into the connection's buffer. */
static int
body_more(struct request *r)
{
	static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
	struct conn *c = r->conn;
	ssize_t n = sizeof(go_on) - 1;

	/* So short a line fits, or the client has stopped reading. */
	if (r->expects && send(c->fd, go_on, (size_t)n, 0) != n)
		return cut(r, "the client has left before the body");
	r->expects = false;
	conn_compact(c);
	while ((n = recv(c->fd, c->in + c->used, HEAD_MAX - c->used, 0)) == -1)
		if (!conn_wait(c, POLLIN))
			return cut(r, clock_ms() >= c->deadline ?
			    "the body came too slowly" :
			    "the client has left in the middle of the body");
	if (n == 0)
		return refuse(r, 400, "the body is not complete");
	conn_moved(c, (size_t)n);
	c->used += (size_t)n;
	return 0;
}

/* Reads a line of a chunked body, of up to max bytes; without its CRLF. */
static int
body_line(struct request *r, size_t max, struct span *line)
{
	struct conn *c = r->conn;
	const char *lf;
	int status;

	while ((lf = memchr(c->in + c->at, '\n', c->used - c->at)) == NULL &&
	    c->used - c->at < max)
		if ((status = body_more(r)) != 0)
			return status;
	line->ptr = c->in + c->at;
	line->len = lf == NULL ? 0 : (size_t)(lf - line->ptr);
	if (line->len == 0 || line->len >= max || lf[-1] != '\r')
		return refuse(r, 400, "a line of the chunked body is too long, "
		    "or does not end in CR LF");
	c->at += line->len + 1;
	line->len--;
	return 0;
}

/* Goes on to the next chunk, or to the end of the body: trailer fields have
 * the form of the head's, and are dropped. */
static int
body_chunk(struct request *r)
{
	struct head trailer = { .length = -1 };
	const char *wrong;
	unsigned fields = 0;
	struct span line;
	uint64_t size;
	int status;

	if (r->in_chunks && (status = body_line(r, 2, &line)) != 0)
		return status;
	r->in_chunks = true;
	if ((status = body_line(r, CHUNK_LINE_MAX, &line)) != 0)
		return status;
	status = -chunk_size(line, &size);
	if (status == 413 || (status == 0 && size > (uint64_t)r->room))
		return refuse(r, r->too_large, "the body is too large");
	if (status != 0)
		return refuse(r, status, "a chunk's first line is malformed");
	r->chunk = (int64_t)size;
	r->room -= r->chunk;
	if (r->chunk > 0)
		return 0;
	while ((status = body_line(r, CHUNK_LINE_MAX, &line)) == 0 &&
	    line.len > 0) {
		if (++fields > FIELDS_MAX)
			return refuse(r, 431, "the trailer is too large");
		if ((wrong = http_field(&trailer, line)) != NULL)
			return refuse(r, 400, "%s", wrong + 4);
	}
	if (status == 0)
		r->length = 0;
	return status;
}

/* The next piece of a body, which stays in the connection's buffer until the
 * next call; an empty one at the end. */
static int
body_next(struct request *r, struct span *piece)
{
	struct conn *c = r->conn;
	int64_t *left;
	int status;

	if (r->length < 0 && r->chunk == 0 && (status = body_chunk(r)) != 0)
		return status;
	left = r->length < 0 ? &r->chunk : &r->length;
	if (*left > 0 && c->used == c->at && (status = body_more(r)) != 0)
		return status;
	piece->ptr = c->in + c->at;
	piece->len = c->used - c->at;
	if ((uint64_t)*left < piece->len)
		piece->len = (size_t)*left;
	c->at += piece->len;
	*left -= (int64_t)piece->len;
	r->got += (int64_t)piece->len;
	trace(">", piece->ptr, piece->len);
	return 0;
}

/* Reads a small body into memory, as a string. */
static int
body_whole(struct request *r)
{
	struct span piece;
	int status;

	if ((r->body = malloc(LOCK_INFO_MAX + 1)) == NULL)
		return refuse(r, 503, "out of memory");
	while ((status = body_next(r, &piece)) == 0 && piece.len > 0) {
		assert(r->len + piece.len <= LOCK_INFO_MAX);
		memcpy(r->body + r->len, piece.ptr, piece.len);
		r->len += piece.len;
	}
	r->body[r->len] = '\0';
	return status;
}

/* ==== commits ============================================================
 *
 * What a thread does to change a state or a lock, first step to last: look
 * whether it may; receive the body into a temporary file, check it there, and
 * sync it; take the name's guard; look again at the lock, and whether the
 * client is still there; only then publish; drop the guard; sync the
 * directory; append to the state's log; answer. What fails leaves state and
 * lock as they were, except where only the last sync failed: then the answer
 * is 5xx, and the client's own repetition of the request finds it done, or
 * does it again.
 *
 * Functions return 0, a status, or -1: the request was cut.
 */

/* The answer is the holder's lock info: every client knows to read it. */
static int
refuse_locked(struct request *r, int status)
{
	const struct lock *l = &r->change->lock;

	(void)refuse(r, status, l->foreign ? "frozen by hand: %s" :
	    "locked by %s", l->id);
	r->text.len = 0;
	lock_tell(l, &r->text);
	r->type = "application/json";
	return status;
}

/* ---- the state's log ---- */

static void
log_key(struct buf *b, const char *key, const char *value)
{
	if (*value == '\0')
		return;
	buf_fmt(b, ",\"%s\":", key);
	buf_json(b, value);
}

/* Appends what happened to NAME.log. Not synced: it tells of the promise, it
 * is not the promise. What was refused makes no file for a name that is
 * nobody's, and takes no room of the reserve. */
static void
log_event(struct request *r, const char *event)
{
	struct change *ch = r->change;
	const struct lock *l = &ch->lock;
	const struct lock *who = lock_is(l, r->id) ? l : &ch->asked;
	bool refused = strcmp(event, "refused") == 0;
	struct buf b = { 0 };
	char text[32];
	int fd;

	if (refused && store_fits(0) == -1)
		return;
	time_text(text, time_ms(), false);
	buf_fmt(&b, "{\"time\":\"%s\",\"event\":\"%s\",\"method\":\"%s\"",
	    text, event, method_names[r->method]);
	if (r->status != 0)		/* a repair comes before any answer */
		buf_fmt(&b, ",\"status\":%d", r->status);
	log_key(&b, "client", r->client);
	log_key(&b, "user", r->user);
	log_key(&b, "id", r->id);
	log_key(&b, "who", who->who);
	log_key(&b, "operation", who->operation);
	if (ch->meta.known)
		buf_fmt(&b, ",\"serial\":%llu",
		    (unsigned long long)ch->meta.serial);
	log_key(&b, "lineage", ch->meta.lineage);
	if (ch->size > 0)
		buf_fmt(&b, ",\"size\":%lld", (long long)ch->size);
	log_key(&b, "md5", ch->md5);
	if (ch->old_meta.known)
		buf_fmt(&b, ",\"old_serial\":%llu",
		    (unsigned long long)ch->old_meta.serial);
	log_key(&b, "old_lineage", ch->old_meta.lineage);
	if (l->held && who != l) {
		buf_fmt(&b, ",\"%s\":{\"id\":", r->status == 200 ? "broken" :
		    "holder");
		buf_json(&b, l->id);
		log_key(&b, "who", l->who);
		log_key(&b, "operation", l->operation);
		log_key(&b, "created", l->created);
		log_key(&b, "info", l->info);
		buf_str(&b, "}");
	}
	log_key(&b, "why", r->why);
	buf_str(&b, "}\n");
	if (ch->place.dir == -1)	/* refused before it was opened */
		(void)place_open(r->name, D_OPEN, &ch->place);
	fd = place_file(&ch->place, LOG, O_WRONLY | O_APPEND |
	    (refused && !l->held ? 0 : O_CREAT), NULL);
	if ((fd == -1 && errno != ENOENT) || (fd != -1 && (b.failed ||
	    write_all(fd, b.data, b.len) == -1)))
		complain("%s: cannot write its log: %s", r->name,
		    strerror(errno));
	close_quietly(fd);
	buf_free(&b);
}

/* ---- how every change is made ---- */

/* Before the guard is taken: learns of the state that is there what is to be
 * known, and gives it a second, hidden name in its history; a copy, where
 * link(2) will not. The new state is moved beside it, if need be. */
static int
change_prepare(struct request *r)
{
	struct change *ch = r->change;
	char leaf[LEAF];
	bool keep;

	file_forget(ch->old);
	tmp_remove(&ch->kept);
	ch->old_meta = (struct meta){ 0 };
	ch->old = place_file(&ch->place, STATE, O_RDONLY, &ch->old_st);
	if (ch->old == -1 && errno != ENOENT)
		return refuse_errno(r, "read the state that is there");
	if (ch->old != -1)
		meta_file(ch->old, &ch->old_meta);
	ch->equal = ch->old != -1 && ch->tmp.fd != -1 &&
	    ch->old_st.st_size == ch->size && file_same(ch->old, ch->tmp.fd);
	keep = conf.keep > 0 && ch->old != -1 && !ch->equal;
	if (ch->history == -1)
		ch->history = history_open(r->name, keep ? D_MAKE : D_OPEN);
	if (ch->history == -1 && (keep || errno != ENOENT))
		return refuse_errno(r, "open the history");
	if (keep) {
		tmp_name(&ch->kept, ch->history);
		if (linkat(ch->place.dir, leaf_name(leaf, &ch->place, STATE),
		    ch->history, ch->kept.name, 0) == -1 &&
		    tmp_copy(&ch->kept, ch->history, ch->old) == -1)
			return refuse_errno(r, "keep the earlier version");
	}
	if (ch->old != -1)		/* if it fails, nothing will fit */
		(void)fstat(ch->old, &ch->old_st);
	if (ch->tmp.fd != -1 && ch->tmp.dir != ch->place.dir &&
	    tmp_move(&ch->tmp, ch->place.dir) == -1)
		return refuse_errno(r, "put the state beside its place");
	return 0;
}

/* Under the guard: is the state still the one that was prepared for? */
static bool
change_fits(const struct change *ch)
{
	char leaf[LEAF];
	struct stat st;

	errno = ENOENT;
	if (ch->place.dir == -1 || fstatat(ch->place.dir, leaf_name(leaf,
	    &ch->place, STATE), &st, AT_SYMLINK_NOFOLLOW) == -1)
		return ch->old == -1 && errno == ENOENT;
	return ch->old != -1 && unchanged(&st, &ch->old_st);
}

static int
lock_remove(struct request *r)
{
	const struct place *p = &r->change->place;
	char leaf[LEAF];

	return unlinkat(p->dir, leaf_name(leaf, p, LOCK), 0) == 0 ? 0 :
	    refuse_errno(r, "remove the lock");
}

/* Makes a change: prepares, if it is one of a state, then publishes under the
 * guard, knowing the lock. If the state has changed in between, it is prepared
 * for again there: of many who write without a lock nobody must starve. */
static int
change(struct request *r, enum enter how, int (*publish)(struct request *))
{
	struct change *ch = r->change;
	int status = 0;

	if (ch->place.dir == -1 && place_open(r->name, how, &ch->place) == -1)
		return refuse_errno(r, "open the state's directory");
	if (ch->writes && (status = change_prepare(r)) != 0)
		return status;
	if (guard_take(&ch->guard, r->name, GUARD_MS) == -1)
		return refuse_errno(r, "guard the name");
	free(ch->lock.raw);
	if (lock_read(&ch->place, &ch->lock) == -1)
		status = refuse_errno(r, "read the lock");
	else if (ch->lock.torn && (status = lock_remove(r)) == 0)
		log_event(r, "repair");
	if (status == 0 && ch->writes && !change_fits(ch))
		status = change_prepare(r);
	if (status == 0)
		status = publish(r);
	guard_drop(&ch->guard);
	return status;
}

/*
 * The end of a change, before its answer. Syncs what was published: its
 * directory, or all from the root down to it if the name had no state before,
 * or its lock was changed, or a sync has ever failed, or nothing was to be
 * done: an earlier try may have done it and then failed here.
 */
static int
change_end(struct request *r, int status)
{
	struct change *ch = r->change;
	struct place p = { .dir = -1 };
	bool deep;

	deep = !ch->writes || ch->old == -1 || ch->equal || store.unsynced;
	if (status == 0 && ch->place.dir != -1 && (deep ?
	    place_open(r->name, D_SYNC, &p) : dir_sync(ch->place.dir)) == -1)
		status = refuse_errno(r, "sync the directory");
	dir_leave(p.dir);
	tmp_remove(&ch->tmp);
	tmp_remove(&ch->kept);
	if (status == 0)
		r->status = 200;
	if (ch->event != NULL)
		log_event(r, ch->event);
	else if (status > 0 && status != 404 && ch->writes)
		log_event(r, "refused");
	return status;
}

/* After the answer: frees, and prunes the history. */
static void
change_free(struct change *ch)
{
	if (ch->event != NULL && ch->history != -1 && (ch->ids.n > 0 ||
	    history_list(ch->history, &ch->ids) == 0))
		history_prune(ch->history, &ch->ids, &ch->lock);
	file_forget(ch->old);
	close_quietly(ch->history);
	names_free(&ch->ids);
	free(ch->lock.raw);
	dir_leave(ch->place.dir);
}

/* Is the body JSON, and has it the MD5 that was promised? */
static int
body_check(struct request *r, const struct json *j, unsigned char digest[16])
{
	errno = j->error;
	if (errno != 0)
		return refuse_errno(r, "read the state back");
	if (j->why != NULL)
		return refuse(r, 400, "the body is not a JSON object: at byte "
		    "%llu it %s", (unsigned long long)j->at, j->why);
	return r->has_md5 && memcmp(digest, r->md5, 16) != 0 ?
	    refuse(r, 400, "the body's MD5 is not its Content-MD5") : 0;
}

/* ---- LOCK and UNLOCK ---- */

/* Reads and checks a body that is lock info, and takes the ID from it. */
static int
lock_body(struct request *r)
{
	struct lock *asked = &r->change->asked;
	struct hash md5 = md5_start;
	unsigned char digest[16];
	int status = body_whole(r);
	struct json j;
	bool ok;

	if (status != 0)
		return status;
	hash_add(&md5, r->body, r->len);
	hash_end(&md5, digest);
	j = json_text(r->body, r->len, NULL, 0);
	ok = r->len == 0 || lock_info(&j, asked);
	if ((status = body_check(r, &j, digest)) != 0 || r->len == 0)
		return status;
	if (!ok)
		return refuse(r, 400, "the lock info has no ID, just one, of "
		    "1 to %d bytes", ID_MAX);
	memcpy(r->id, asked->id, sizeof(r->id));
	r->has_id = true;
	return 0;
}

/*
 * Writes the lock, and syncs it: another host that found it empty would take
 * it for none. What could not be written is removed again. What could not be
 * synced stays: a lock too many is an inconvenience, one too few a disaster.
 * One that is broken is replaced: at no moment is there none.
 */
static int
lock_write(struct request *r)
{
	const struct place *p = &r->change->place;
	bool replace = r->change->lock.held;
	struct tmp t = { .fd = -1 };
	char leaf[LEAF];
	int status = 0;

	(void)leaf_name(leaf, p, LOCK);
	if (replace)
		(void)tmp_create(&t, p->dir);
	else
		t.fd = place_file(p, LOCK, O_WRONLY | O_CREAT | O_EXCL, NULL);
	if (t.fd == -1)
		status = refuse_errno(r, "create the lock");
	else if (write_all(t.fd, r->body, r->len) == -1) {
		status = refuse_errno(r, "write the lock");
		if (!replace)
			(void)unlinkat(p->dir, leaf, 0);
	} else if (sync_fd(t.fd) == -1 ||
	    (replace && tmp_rename(&t, p->dir, leaf) == -1))
		status = refuse_errno(r, "sync the lock");
	tmp_remove(&t);
	return status;
}

/*
 * The sender has the lock, from a try that may not have got to the disk. Its
 * bytes are written anew, for a sync that failed may say 0 the next time; what
 * it is for, and since when, stays. Without room for that, what is there is
 * synced.
 */
static int
lock_again(struct request *r)
{
	const struct place *p = &r->change->place;
	const struct lock *l = &r->change->lock;
	const struct timespec times[2] = { l->since, l->since };
	struct tmp t = { .fd = -1 };
	char leaf[LEAF];
	int status = 0, fd;

	if (tmp_create(&t, p->dir) == -1 ||
	    write_all(t.fd, l->raw, l->len) == -1 ||
	    futimens(t.fd, times) == -1 || sync_fd(t.fd) == -1 ||
	    tmp_rename(&t, p->dir, leaf_name(leaf, p, LOCK)) == -1)
		status = -1;
	if (status == -1 && (errno == ENOSPC || errno == EDQUOT)) {
		fd = place_file(p, LOCK, O_RDONLY, NULL);
		status = fd == -1 ? -1 : sync_fd(fd);
		close_quietly(fd);
	}
	if (status == -1)
		status = refuse_errno(r, "sync the lock");
	tmp_remove(&t);
	return status;
}

/* Under the guard: takes the lock, if it may be had. -b breaks one that is
 * old, but never a freeze: that is somebody's word. */
static int
lock_publish(struct request *r)
{
	struct change *ch = r->change;
	const struct lock *l = &ch->lock;
	bool own = lock_is(l, r->id), stale = conf.break_hours > 0 &&
	    !l->foreign && time_ms() / 1000 - l->since.tv_sec >
	    (int64_t)conf.break_hours * 3600;
	int status;

	if (l->held && !own && (!stale || r->right < R_WRITE))
		return refuse_locked(r, 423);
	if (own && r->right < R_WRITE && !lock_plans(l))
		return refuse(r, 403, "%s may take only a plan's lock of %s",
		    r->user, r->name);
	if (!client_there(r))
		return refuse_gone(r);
	if ((status = own ? lock_again(r) : lock_write(r)) == 0)
		ch->event = l->held && !own ? "break" : "lock";
	return status;
}

/* LOCK: from its body to its answer. */
static int
do_lock(struct request *r)
{
	struct change *ch = r->change;
	int status = lock_body(r);

	if (status == 0 && r->len == 0)
		return refuse(r, 400, "LOCK wants lock info: a JSON object "
		    "with an ID");
	if (status == 0 && r->right < R_WRITE && !lock_plans(&ch->asked))
		return refuse(r, 403, "%s may lock %s to plan only, not for "
		    "%s", r->user, r->name, ch->asked.operation);
	if (status == 0)
		status = change(r, D_MAKE, lock_publish);
	/* The guard was not to be had: a lock that another holds can be told
	 * all the same, and a client that waits for it goes on waiting. */
	if (r->retry > 0 && ch->lock.raw == NULL &&
	    lock_read(&ch->place, &ch->lock) == 0 && ch->lock.held &&
	    !lock_is(&ch->lock, r->id))
		status = refuse_locked(r, 423);
	return change_end(r, status);
}

/* Under the guard: releases the lock, if it is the sender's, or if no ID is
 * told: terraform's force-unlock. By its ID, it is ended by its own run,
 * however late. */
static int
unlock_publish(struct request *r)
{
	const struct lock *l = &r->change->lock;
	/* OpenTofu 1.10 sends the ID that we made up for a freeze. */
	bool own = lock_is(l, r->id), made_up = l->foreign &&
	    strcmp(r->id, l->id) == 0 && r->right == R_WRITE;
	int status;

	if (!l->held)			/* a repetition, perhaps */
		return 0;
	if (r->has_id && !made_up && !own)
		return refuse_locked(r, 409);
	if (r->right < R_WRITE && !lock_plans(l))
		return refuse(r, 403, "%s may release only a plan's lock of "
		    "%s", r->user, r->name);
	if (!own && !client_there(r))
		return refuse_gone(r);
	if ((status = lock_remove(r)) == 0)
		r->change->event = own ? "unlock" : "force-unlock";
	return status;
}

/* ---- writes and deletes ---- */

/* Promise 4: under the lock's own ID, or with none when nothing is locked.
 * An ID whose lock is gone was broken: another run may have written. */
static int
write_allowed(struct request *r)
{
	const struct lock *l = &r->change->lock;

	if (l->held && !(r->has_id && lock_is(l, r->id)))
		return refuse_locked(r, 423);
	return l->held || !r->has_id ? 0 : refuse(r, 409, "nothing is locked: "
	    "the lock %s was broken or released", r->id);
}

/* Receives the body into a temporary file. */
static int
state_receive(struct request *r)
{
	struct change *ch = r->change;
	struct span piece;
	int status;

	if (tmp_create(&ch->tmp, store.root) == -1)
		return refuse_errno(r, "create a temporary file");
	while ((status = body_next(r, &piece)) == 0 && piece.len > 0) {
		ch->size += (int64_t)piece.len;
		if (store_fits((int64_t)piece.len) == -1 ||
		    write_all(ch->tmp.fd, piece.ptr, piece.len) == -1)
			return refuse_errno(r, "write the state");
	}
	return status;
}

/* Checks the body in one pass: its form, its MD5, and whether it can be a
 * state, for nobody wants another text in the place of one. */
static int
state_check(struct request *r)
{
	struct change *ch = r->change;
	struct meta *m = &ch->meta;
	bool hash = r->has_md5 || ch->size <= HASH_MAX;
	unsigned char digest[16];
	struct hash md5 = md5_start;
	struct json j = { .fd = ch->tmp.fd, .max = ch->size,
	    .md5 = hash ? &md5 : NULL };
	int status;

	(void)meta_read(&j, m);
	hash_end(&md5, digest);
	if ((status = body_check(r, &j, digest)) != 0)
		return status;
	if (hash)
		hex(digest, 16, ch->md5);
	if (m->doubled != NULL)
		return refuse(r, 400, "the body is no state: it has two keys "
		    "\"%s\"", m->doubled);
	if (m->type == 'l')
		return refuse(r, 400, "the body is no state: it is lock info. "
		    "lock_address points at a state's URL, with a lock_method "
		    "that writes: use LOCK, or NAME/lock");
	return m->type == 's' || ANY_OBJECT ? 0 : refuse(r, 400, "the body is "
	    "no state: it has neither a \"version\" that is a number nor "
	    "\"encrypted_data\"");
}

/* Under the guard: gives a file its ID in the history, and so makes it the
 * newest version. Syncs that, down from the root, if it is nowhere else. */
static int
history_keep(struct request *r, struct tmp *t, uint64_t serial, bool sync)
{
	struct change *ch = r->change;
	char leaf[LEAF];
	const char *id;
	int dir = -1;

	if ((t->dir != ch->history && tmp_move(t, ch->history) == -1) ||
	    history_list(ch->history, &ch->ids) == -1 ||
	    (id = history_next(&ch->ids, serial)) == NULL ||
	    tmp_rename(t, ch->history, version_leaf(leaf, id)) == -1 ||
	    (sync && (dir = history_open(r->name, D_SYNC)) == -1))
		return refuse_errno(r, "keep a version in the history");
	close_quietly(dir);
	return 0;
}

/* -s: what terraform itself would want to be asked about. */
static int
write_strict(struct request *r)
{
	const struct meta *new = &r->change->meta, *old = &r->change->old_meta;

	if (!conf.strict)
		return 0;
	if (old->known && (!new->known || new->serial < old->serial))
		return refuse(r, 409, "strict: its serial is no whole number, "
		    "or lower than the present %llu",
		    (unsigned long long)old->serial);
	if (old->lineage_len > 0 && (old->lineage_len > LINEAGE_MAX ||
	    new->lineage_len != old->lineage_len ||
	    strcmp(new->lineage, old->lineage) != 0))
		return refuse(r, 409, "strict: its lineage is '%s', the "
		    "present one is '%s'", new->lineage, old->lineage);
	return 0;
}

/* A complete state whose client is gone: these bytes may be the only copy. So
 * they go into the history, unless they are the present state, or the newest
 * version. */
static int
write_abandon(struct request *r)
{
	struct change *ch = r->change;
	int newest = -1, status;
	bool same;

	if (ch->tmp.fd == -1 || ch->equal || conf.keep == 0)
		return refuse_gone(r);
	if (ch->history == -1)
		ch->history = history_open(r->name, D_MAKE);
	if (ch->history == -1 || history_list(ch->history, &ch->ids) == -1)
		return refuse_errno(r, "keep the abandoned state");
	if (ch->ids.n > 0)
		newest = version_open(r->name, ch->ids.list[ch->ids.n - 1],
		    NULL);
	same = file_same(newest, ch->tmp.fd);
	close_quietly(newest);
	if (!same && (status = history_keep(r, &ch->tmp, ch->meta.serial,
	    true)) != 0)
		return status;
	ch->event = same ? NULL : "abandoned";
	return refuse_gone(r);
}

/*
 * Under the guard: puts the new state in its place, or, if there is none,
 * deletes the old, whose second name must be on the disk before. Else the
 * history is not synced: the promise is about the new state. A journal writes
 * both together; without one, a power cut may cost the old its second name.
 */
static int
write_publish(struct request *r)
{
	struct change *ch = r->change;
	bool delete = ch->tmp.fd == -1, kept = ch->kept.name[0] != '\0';
	int status = write_allowed(r);
	char leaf[LEAF];

	if (!client_there(r))
		return write_abandon(r);
	if (status == 0 && delete && ch->old == -1)
		return refuse(r, 404, "there is no such state");
	if (status == 0 && !delete)
		status = write_strict(r);
	if (status == 0 && kept)
		status = history_keep(r, &ch->kept, ch->old_meta.serial,
		    delete);
	if (status != 0)
		return status;
	(void)leaf_name(leaf, &ch->place, STATE);
	if ((delete ? unlinkat(ch->place.dir, leaf, 0) :
	    tmp_rename(&ch->tmp, ch->place.dir, leaf)) == 0) {
		ch->event = delete ? "delete" : "write";
		return 0;
	}
	status = refuse_errno(r, "change the state");
	if (kept)
		(void)unlinkat(ch->history, version_leaf(leaf,
		    ch->ids.list[ch->ids.n - 1]), 0);
	return status;
}

/* POST and PUT of a state: from its body to its answer. What cannot land, as
 * far as can be seen now, need not be uploaded first; the write looks again. */
static int
do_write(struct request *r)
{
	struct change *ch = r->change;
	int status = store_fits(r->length > 0 ? r->length : 0) == -1 ?
	    refuse_errno(r, "write the state") :
	    change(r, D_OPEN, write_allowed);

	ch->writes = true;
	if (status == 0)
		status = state_receive(r);
	if (status == 0)
		status = state_check(r);
	if (status == 0 && sync_fd(ch->tmp.fd) == -1)
		status = refuse_errno(r, "sync the state");
	if (status == 0)
		status = change(r, D_MAKE, write_publish);
	return change_end(r, status);
}

/*
 * UNLOCK and DELETE. With unlock_method DELETE at the state's own address,
 * terraform's unlock looks like a delete: a body, or the MD5 of an empty one,
 * gives it away, or that a Go program sent it (OpenTofu 1.8 and 1.9 send
 * nothing else): no command of terraform deletes a state.
 */
static int
do_unlock(struct request *r)
{
	int status = lock_body(r);
	bool delete = r->kind == K_STATE && r->method == M_DELETE &&
	    (status != 0 || (r->len == 0 && !r->has_md5 && !r->go));

	r->change->writes = delete;
	if (status == 0 && r->right < R_WRITE && (delete || !r->has_id))
		status = refuse(r, 403, "%s may not %s %s", r->user, delete ?
		    "delete" : "force-unlock", r->name);
	if (status == 0)
		status = change(r, D_OPEN, delete ? write_publish :
		    unlock_publish);
	return change_end(r, status);
}
/* ==== pages ==============================================================
 *
 * For people who look, and for machines that watch: the states, one state
 * with its versions, metrics. A thread makes them, because they read many
 * files. A table is written once, cell by cell, and comes out as text, JSON or
 * HTML. No page shows a value out of a state.
 */
#define STATUSES 600
static const char *const reasons[STATUSES] = {
	[0] = "-",			/* cut: no answer */
	[200] = "OK", [204] = "No Content",
	[400] = "Bad Request", [401] = "Unauthorized", [403] = "Forbidden",
	[404] = "Not Found", [405] = "Method Not Allowed", [409] = "Conflict",
	[411] = "Length Required", [412] = "Precondition Failed",
	[413] = "Content Too Large", [414] = "URI Too Long",
	[417] = "Expectation Failed", [423] = "Locked",
	[431] = "Request Header Fields Too Large",
	[500] = "Internal Server Error", [501] = "Not Implemented",
	[503] = "Service Unavailable", [505] = "HTTP Version Not Supported",
	[507] = "Insufficient Storage"
};

/* Seconds; upper ends of the duration histogram. */
static const double durations[] = {
	.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5
};
#define DURATIONS (sizeof(durations) / sizeof(*durations))

/* What is counted, by the loop and by threads, and the log's lines that are
 * not written yet. */
static struct {
	pthread_mutex_t mutex;
	uint64_t requests[M_COUNT + 1][STATUSES];	/* last row: none */
	uint64_t took[DURATIONS + 1];
	uint64_t took_us;
	uint64_t received, sent, accepted, unlogged;
	uint64_t connections, threads, pages;	/* there are now */
	struct buf log;
	char locked[ID_MAX + 1];	/* by the LOCK that came last */
} told = { .mutex = PTHREAD_MUTEX_INITIALIZER };

/* Adds to one of the counts, and returns it. */
static uint64_t
told_add(uint64_t *what, int n)
{
	uint64_t sum;

	(void)pthread_mutex_lock(&told.mutex);
	sum = *what += (uint64_t)n;
	(void)pthread_mutex_unlock(&told.mutex);
	return sum;
}

/*
 * Does somebody want the page? Else there will be none. A client that has
 * closed its connection, or has only finished sending, which looks the same,
 * has it made while nobody else wants one.
 */
static bool
page_wanted(struct request *r)
{
	if (!r->cut && told_add(&told.pages, 0) > 1 && !client_there(r))
		(void)cut(r, "nobody waits for the page");
	return !r->cut;
}

/* A page is made if there are not too many already. */
static void
page(struct request *r, int (*make)(struct request *))
{
	if (told_add(&told.pages, 1) > PAGES_MAX)
		(void)refuse(r, 503, "too many pages are being made");
	else if (page_wanted(r) && make(r) == 200 && r->text.failed)
		(void)refuse(r, 503, "no memory for the page");
	(void)told_add(&told.pages, -1);
}

/* ---- tables ---- */

static const char page_css[] =
    ":root{color-scheme:light dark}a{color:LinkText}h1{font-size:1.4rem}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;"
    "margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;padding:.4rem .8rem .4rem 0;vertical-align:top}"
    "tr{border-bottom:1px solid #8884}th,.dim{font-weight:500;color:GrayText}"
    ".n{text-align:right}th,.n,td:nth-child(4){white-space:nowrap}"
    "td:first-child{min-width:11rem}"
    ".hot{color:light-dark(#b3261e,#ff8a80)}"
    "pre{background:#8882;padding:1rem;border-radius:.4rem;overflow-x:auto}"
    "input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem}"
    ":focus-visible{outline:3px solid Highlight}"
    "@media(max-width:44rem){thead,td:empty{display:none}"
    "tr{display:flex;flex-wrap:wrap;gap:0 1rem;padding:.5rem 0}td{padding:0}"
    "td:first-child{flex-basis:100%;font-weight:600}"
    "td:not(:first-child)::before{content:attr(data-h) ' ';color:GrayText}}";

/* What stands in one place of a table. */
struct cell {
	const char *key;		/* in JSON */
	const char *title;		/* of its column; NULL: only in JSON */
	int width;			/* of text; negative: to the left */
	bool bare;			/* in JSON, it has no quotes */
	enum kind page;			/* that has it; K_STAR: both have */
	const char *raw;		/* for machines; "": it is not known */
	const char *shown;		/* for people; NULL: the same */
};

/* A member of a JSON object, with the comma that it may need before it; null
 * in place of nothing. */
static void
json_pair(struct buf *b, const char *key, const char *value, bool bare)
{
	buf_fmt(b, "%s\"%s\":", b->len > 0 && b->data[b->len - 1] == '{' ?
	    "" : ",", key);
	if (bare || *value == '\0')
		buf_str(b, *value != '\0' ? value : "null");
	else
		buf_json(b, value);
}

/* Appends what people read; in a text padded to a width. */
static void
shown(struct request *r, int width, const char *text)
{
	struct buf *b = &r->text;
	size_t from = b->len;

	if (r->form == HTML)
		buf_html(b, text);
	else
		buf_fmt(b, "%*s", width, text);
	if (r->form == TEXT && !b->failed)
		scrub(b->data + from);
}

/* Writes a cell, with a link if it is not NULL, or its title. */
static void
cell(struct request *r, const struct cell *c, const char *link)
{
	struct buf *b = &r->text;
	const char *text = r->heading ? c->title : c->shown != NULL ?
	    c->shown : c->raw;

	if (r->form == JSON && !r->heading)
		json_pair(b, c->key, c->raw, c->bare);
	if (r->form == JSON || c->title == NULL)
		return;
	if (r->form == HTML) {
		buf_fmt(b, "<t%c%s data-h=\"%s\" title=\"", r->heading ? 'h' :
		    'd', c->width > 0 ? " class=n" : "", c->title);
		buf_html(b, r->heading ? "" : c->raw);
		buf_fmt(b, "\">%s%s%s", link != NULL ? "<a href=\"" : "",
		    link != NULL ? link : "", link != NULL ? "\">" : "");
	}
	shown(r, c->width, r->form == TEXT && *text == '\0' ? "-" : text);
	buf_str(b, r->form == TEXT ? "  " : link != NULL ? "</a>" : "");
}

/* A line of the page, in words. */
static void
page_say(struct request *r, const char *class, const char *text)
{
	if (r->form == HTML)
		buf_fmt(&r->text, "<p class=\"%s\">", class);
	if (r->form != JSON) {
		shown(r, 0, text);
		buf_str(&r->text, "\n");
	}
}

/* The page's head. */
static void
page_begin(struct request *r, const char *title)
{
	static const char *const types[] = { "text/plain; charset=utf-8",
	    "application/json", "text/html; charset=utf-8" };
	struct buf *b = &r->text;

	r->status = 200;
	r->type = types[r->form];
	if (r->form != HTML)
		return;
	buf_str(b, "<!DOCTYPE html>\n<html lang=en><meta charset=utf-8>"
	    "<link rel=icon href=\"data:,\"><meta name=viewport "
	    "content=\"width=device-width,initial-scale=1\"><title>");
	buf_html(b, title);
	buf_fmt(b, "</title><style>%s</style>\n<h1>", page_css);
	if (r->kind != K_ROOT)
		buf_fmt(b, "<a href=\"%s\">States</a> / ", r->root);
	buf_html(b, title);
	buf_str(b, "</h1>\n");
}

/* ---- rows ---- */

/* A state, or a version of one, as it is shown. */
struct row {
	const char *name, *id;		/* id: "" of the present version */
	bool exists;
	bool failed;			/* it could not be looked at */
	bool deleted;			/* only the history has it */
	char serial[24], size[24], when[32];	/* "": not known */
	int64_t age;			/* seconds */
	struct meta meta;
	struct lock lock;
	char who[128], operation[64];	/* of the write */
};

/* Looks at an open file, and closes it; with fd -1 errno says whether there
 * is none. */
static void
row_file(struct row *row, int fd, const struct stat *st)
{
	row->exists = fd != -1;
	row->failed = fd == -1 && errno != ENOENT;
	if (fd == -1)
		return;
	meta_file(fd, &row->meta);
	(void)close(fd);
	if (row->meta.known)
		(void)snprintf(row->serial, sizeof(row->serial), "%llu",
		    (unsigned long long)row->meta.serial);
	(void)snprintf(row->size, sizeof(row->size), "%lld",
	    (long long)st->st_size);
	time_text(row->when, (int64_t)st->st_mtime * 1000, false);
	row->age = time_ms() / 1000 - (int64_t)st->st_mtime;
}

/* Looks at one state; -1 with errno if it could not be looked at. */
static int
row_read(struct row *row, const char *name)
{
	struct place p;
	struct stat st;
	int dir;

	*row = (struct row){ .name = name, .id = "", .failed = true };
	if (place_open(name, D_OPEN, &p) == -1)
		return -1;
	if (lock_look(&p, name, &row->lock) == -1) /* better than "unlocked" */
		row->lock = (struct lock){ .held = true, .foreign = true,
		    .info = "the lock cannot be read" };
	free(row->lock.raw);
	row_file(row, place_file(&p, STATE, O_RDONLY, &st), &st);
	dir_leave(p.dir);
	row->deleted = !row->exists && !row->failed;
	if (row->deleted && row->lock.held) {	/* or only locked so far */
		dir = history_open(name, D_OPEN);
		row->deleted = dir != -1;
		close_quietly(dir);
	}
	return row->failed ? -1 : 0;
}

/* "apply" for OperationTypeApply; other words are terraform's own. */
static void
operation_text(char out[64], const char *operation)
{
	bool type = strncmp(operation, "OperationType", 13) == 0;

	(void)snprintf(out, 64, "%s", operation + (type ? 13 : 0));
	out[0] = (char)tolower((unsigned char)out[0]);
}

/* Who holds the lock, since when, for what, and how it is released; "" if
 * nobody does. One that cannot be read has only its info. The text is b's,
 * which is to be freed. */
static const char *
lock_text(struct request *r, const struct lock *l, struct buf *b)
{
	char operation[64], since[32] = "";
	bool known = l->since.tv_sec != 0;
	struct buf release = { 0 };
	const char *const pairs[][2] = { { "id", l->id }, { "who", l->who },
	    { "operation", l->operation }, { "info", l->info },
	    { "created", l->created }, { "since", since } };
	size_t i;

	if (!l->held)
		return "";
	operation_text(operation, l->operation);
	if (known) {
		time_text(since, (int64_t)l->since.tv_sec * 1000, false);
		buf_shell(&release, "terraform force-unlock ", l->id);
	}
	if (r->form == JSON && !release.failed) {
		buf_str(b, "{");
		for (i = 0; i < 6; i++)
			json_pair(b, pairs[i][0], pairs[i][1], false);
		json_pair(b, "release", known ? release.data : "", false);
		buf_str(b, "}");
	} else if (!known)
		buf_fmt(b, "frozen: %s", l->info);
	else if (!release.failed)
		buf_fmt(b, "%s%s%s since %s%s%s; to release it: %s",
		    l->foreign ? "frozen" : *l->who != '\0' ? l->who :
		    "locked", *operation != '\0' ? ", " : "", operation, since,
		    *l->info != '\0' ? ": " : "", l->info, release.data);
	r->text.failed |= b->failed || release.failed;
	buf_free(&release);
	return r->text.failed ? "" : b->data;
}

/* Writes a row of the listing or of a state's page, or the heading. */
static void
row_put(struct request *r, const struct row *row)
{
	static const char units[][4] = { "s", "min", "h", "d" };
	static const int64_t per[] = { 60, 60, 24 };
	bool list = r->kind == K_ROOT, present = *row->id == '\0';
	char age[32] = "", until[32] = "", what[64];
	struct buf *b = &r->text, lock = { 0 }, link = { 0 };
	const char *held = lock_text(r, &row->lock, &lock);
	const char *id = present ? "present" : row->id;
	const char *done = r->form == JSON ? row->operation : what;
	const char *made = row->meta.version, *by = row->deleted ? "deleted" :
	    made;
	const char *written = list ? "modified" : "written";
	const struct cell cells[] = {
		{ "name", "State", -24, false, K_ROOT, row->name, NULL },
		{ "id", "Version", -26, false, K_VERSIONS, row->id, id },
		{ "serial", "Serial", 6, true, K_STAR, row->serial, NULL },
		{ "size", "Bytes", 9, true, K_STAR, row->size, NULL },
		{ written, "Written", -10, false, K_STAR, row->when, age },
		{ "replaced", "Replaced", -24, false, K_VERSIONS, until, NULL },
		{ "who", "By", -16, false, K_VERSIONS, row->who, NULL },
		{ "operation", "For", -8, false, K_VERSIONS, done, NULL },
		{ "terraform_version", "Terraform", -9, false, K_ROOT, made,
		    by },
		{ "lineage", NULL, 0, false, K_ROOT, row->meta.lineage, NULL },
		{ "deleted", NULL, 0, true, K_ROOT, row->deleted ? "true" :
		    "false", NULL },
		{ "lock", list ? "Lock" : NULL, -4, true, K_STAR, held, NULL },
	};
	int64_t n = row->age < 0 ? 0 : row->age;
	size_t i;

	for (i = 0; i < 3 && n >= per[i]; i++)
		n /= per[i];
	if (row->exists)
		(void)snprintf(age, sizeof(age), "%lld %s ago", (long long)n,
		    units[i]);
	if (!present)
		time_text(until, version_ms(row->id), false);
	operation_text(what, row->operation);
	buf_fmt(&link, "%s%s", r->root, list || !present ? "-/versions/" : "");
	buf_url(&link, row->name);
	buf_fmt(&link, "%s%s", present ? "" : "/", row->id);
	if (r->form != TEXT)
		buf_str(b, r->form == HTML ? "\n<tr>" : r->heading ? "[" :
		    b->len > 1 ? ",\n{" : "\n{");
	for (i = 0; i < sizeof(cells) / sizeof(*cells); i++)
		if (cells[i].page == K_STAR || cells[i].page == r->kind)
			cell(r, &cells[i], i < 2 && !r->heading ? link.data :
			    NULL);
	if (r->form == TEXT || (r->form == JSON && !r->heading))
		buf_str(b, r->form == TEXT ? "\n" : "}");
	r->heading = false;
	buf_free(&lock);
	buf_free(&link);
}

static void
table_begin(struct request *r)
{
	buf_str(&r->text, r->form == HTML ? "<table><thead>" : "");
	r->heading = true;
	row_put(r, &(struct row){ .name = "", .id = "" });
	buf_str(&r->text, r->form == HTML ? "<tbody>" : "");
}

static void
table_end(struct request *r)
{
	static const char *const ends[] = { "", "\n]\n", "</table>\n" };

	buf_str(&r->text, ends[r->form]);
}

/* ---- a walk over the names ---- */

struct walk {
	struct request *r;		/* whose names are wanted, or NULL */
	bool deleted;			/* those in the history, too */
	bool history;			/* the walk is there now */
	bool sweep;			/* remove what dead servers left */
	int error;			/* why some were not found, or 0 */
	uint64_t states, locks;
	uint64_t oldest;		/* lock's age in seconds, or 0 */
	struct names names;
	char name[NAME_LEN_MAX + 300];
};

/* Removes a temporary file of a server that is dead: it does not hold its
 * byte. token: its digits, in the file's name. */
static void
tmp_sweep(int dir, const char *file, const char *token)
{
	uint64_t t = strtoull(token, NULL, 16);
	off_t byte = guard_server_byte(t);

	if (t == store.token || guard_set(F_WRLCK, byte) == -1)
		return;
	(void)unlinkat(dir, file, 0);
	(void)guard_set(F_UNLCK, byte);
}

/* Adds a name, if it is one, and the one who asks may see it and has asked
 * for it. A state and its lock are two files of one name. */
static void
walk_add(struct walk *w, const struct stat *lock)
{
	int64_t age = lock == NULL ? 0 : time_ms() / 1000 - lock->st_mtime;
	char *p;

	for (p = w->name; names_fold && *p != '\0'; p++)
		*p = (char)tolower((unsigned char)*p);
	if (name_wrong(w->name) != NULL || (w->r != NULL &&
	    (user_right(w->r, w->name) == R_NONE ||
	    strcasestr(w->name, w->r->query) == NULL)))
		return;
	names_add(&w->names, w->name);
	w->states += lock == NULL && !w->history;
	w->locks += lock != NULL;
	if (age > (int64_t)w->oldest)
		w->oldest = (uint64_t)age;
}

/* Owns dir. w->name holds len bytes of path that lead to it. */
static void
walk_dir(struct walk *w, int dir, size_t len, unsigned depth)
{
	DIR *d = fdopendir(dir);
	struct dirent *e;
	struct stat st;
	bool found = false;
	size_t n;
	int next;

	while (d != NULL && w->error != ECANCELED &&
	    (errno = 0, e = readdir(d)) != NULL) {
		n = strlen(e->d_name);
		if (w->r != NULL && !page_wanted(w->r))
			w->error = ECANCELED;
		if (w->sweep && strncmp(e->d_name, ".tmp-", 5) == 0)
			tmp_sweep(dir, e->d_name, e->d_name + 5);
		if (e->d_name[0] == '.' || len + n + 1 >= sizeof(w->name))
			continue;
		memcpy(w->name + len, e->d_name, n + 1);
		if (w->history && is_version(e->d_name, STATE))
			found = len > 0;
		else if (!w->history && cut_suffix(w->name, STATE))
			walk_add(w, NULL);
		else if (!w->history && cut_suffix(w->name, LOCK)) {
			if (fstatat(dir, e->d_name, &st,
			    AT_SYMLINK_NOFOLLOW) == 0)
				walk_add(w, &st);
		} else if (depth < SEGMENTS_MAX && !cut_suffix(w->name, LOG)) {
			next = openat(dir, e->d_name, O_RDONLY | O_DIRECTORY |
			    O_NOFOLLOW | O_CLOEXEC);
			if (next != -1) {
				w->name[len + n] = '/';
				walk_dir(w, next, len + n + 1, depth + 1);
			} else if (errno != EACCES && errno != ENOENT &&
			    errno != ENOTDIR && errno != ELOOP)
				w->error = errno; /* a lost+found is not ours */
		}
	}
	w->error = errno != 0 && w->error == 0 ? errno : w->error;
	d == NULL ? close_quietly(dir) : (void)closedir(d);
	if (found) {
		w->name[len - 1] = '\0';
		walk_add(w, NULL);
	}
}

/* Finds all names, sorted; -1 with errno if they could not all be found. */
static int
walk_names(struct walk *w)
{
	int dir, round;

	for (round = 0; round <= (w->deleted ? 1 : 0); round++) {
		w->history = round == 1;
		dir = openat(store.root, w->history ? ".history" : ".",
		    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (dir == -1)
			return -1;
		walk_dir(w, dir, 0, 0);
	}
	names_sort(&w->names);
	errno = w->names.failed ? ENOMEM : !store_there() ? EIDRM : w->error;
	return errno == 0 ? 0 : -1;
}

/* ---- the listing ---- */

/* The rows; if asked for, those that are locked come first. */
static void
listing_rows(struct request *r, const struct names *names)
{
	struct row row;
	size_t i;
	int round;

	for (round = 0; round <= (r->locked ? 1 : 0); round++)
		for (i = 0; i < names->n && page_wanted(r); i++) {
			(void)row_read(&row, names->list[i]);
			if (!r->locked || row.lock.held == (round == 0))
				row_put(r, &row);
		}
}

static int
page_root(struct request *r)
{
	struct walk w = { .r = r, .deleted = r->query[0] != '\0' };
	struct buf *b = &r->text;

	if (walk_names(&w) == -1 && !r->cut)
		(void)refuse_errno(r, "list the states");
	else if (!r->cut) {
		page_begin(r, "States");
		if (r->form == HTML) {
			buf_fmt(b, "<p class=dim>%llu state%s, "
			    "<a href=\"?locked\">%llu locked</a><form>"
			    "<input type=search name=q aria-label=Search "
			    "placeholder=\"Search, deleted ones too\" value=\"",
			    (unsigned long long)w.states,
			    w.states == 1 ? "" : "s",
			    (unsigned long long)w.locks);
			buf_html(b, r->query);
			buf_str(b, "\"></form>\n");
		}
		table_begin(r);
		listing_rows(r, &w.names);
		table_end(r);
	}
	names_free(&w.names);
	return r->status;
}

/* ---- one state ---- */

/* Who wrote a version, and in which operation: told by the last line of the
 * end of the state's log that tells of a write of that serial and size. */
static void
row_writer(struct row *row, const struct buf *tail)
{
	struct span rest = { tail->data, tail->len }, line;
	char event[8];
	struct row w;
	struct json j;
	struct member k[] = {
		{ "event", event, sizeof(event), 0, 0, 0 },
		{ "serial", w.serial, sizeof(w.serial), 0, 0, 0 },
		{ "size", w.size, sizeof(w.size), 0, 0, 0 },
		{ "who", w.who, sizeof(w.who), 0, 0, 0 },
		{ "operation", w.operation, sizeof(w.operation), 0, 0, 0 },
	};

	while (span_next(&rest, '\n', &line)) {
		w = (struct row){ .exists = true };
		event[0] = '\0';
		j = json_text(line.ptr, line.len, k, 5);
		if (!json_object(&j) || strcmp(event, "write") != 0 ||
		    *w.serial == '\0' || strcmp(w.serial, row->serial) != 0 ||
		    strcmp(w.size, row->size) != 0)
			continue;
		memcpy(row->who, w.who, sizeof(w.who));
		memcpy(row->operation, w.operation, sizeof(w.operation));
	}
}

/* What stands above the table: the lock, and the log. */
static void
state_above(struct request *r, const struct row *row)
{
	struct buf *b = &r->text, lock = { 0 };
	const char *held = lock_text(r, &row->lock, &lock);

	if (*held != '\0')
		page_say(r, "hot", held);
	if (*held == '\0' || !row->exists)
		page_say(r, "", row->exists ? "Not locked." :
		    "There is no such state now.");
	buf_free(&lock);
	if (r->form != HTML)
		return;
	buf_fmt(b, "<p>Each version is a link to the raw state, with its "
	    "secrets; see also <a href=\"%s-/log/", r->root);
	buf_url(b, r->name);
	buf_str(b, "\">its log</a>.\n");
}

/* And below: the two lines that go back to an earlier version. Of what a Host
 * may have, only ' could leave the quotes, and nothing is markup. */
static void
state_below(struct request *r, const char *id)
{
	struct buf *b = &r->text;
	const char *scheme = r->fronted ? "https" : "http";
	const char *host = strchr(r->host, '\'') == NULL ? r->host : "HOST";

	if (r->form == JSON)
		return;
	page_say(r, "", "To go back to a version, or bring a deleted state "
	    "back, and then look at terraform plan:");
	buf_fmt(b, "%scurl -f -o old.tfstate '%s://%s/-/versions/",
	    r->form == HTML ? "<pre>" : "", scheme, host);
	buf_url(b, r->name);
	buf_fmt(b, "/%s'\ncurl -f --data-binary @old.tfstate '%s://%s/", id,
	    scheme, host);
	buf_url(b, r->name);
	buf_str(b, r->form == HTML ? "'</pre>\n" : "'\n");
}

/* The table: the present version, and the earlier ones, the newest first. */
static void
state_rows(struct request *r, struct row *row, int dir,
    const struct names *ids)
{
	struct buf tail = { 0 };
	struct stat st;
	char leaf[LEAF];
	int fd = name_file(r->name, LOG, &st);
	ssize_t n;
	size_t i;

	if (fd != -1 && buf_room(&tail, TAIL_MAX) && (n = read_at(fd, tail.data,
	    TAIL_MAX, st.st_size > TAIL_MAX ? st.st_size - TAIL_MAX : 0)) > 0)
		tail.len = (size_t)n;
	close_quietly(fd);
	table_begin(r);
	row_writer(row, &tail);
	if (row->exists)
		row_put(r, row);
	for (i = ids->n; i > 0; i--) {
		*row = (struct row){ .name = r->name, .id = ids->list[i - 1] };
		fd = file_open(dir, version_leaf(leaf, row->id), O_RDONLY, &st);
		row_file(row, fd, &st);
		row_writer(row, &tail);
		if (row->exists)
			row_put(r, row);
	}
	table_end(r);
	buf_free(&tail);
}

/* The page of one state: its lock, its versions, the way back. */
static int
page_state(struct request *r)
{
	int dir = history_open(r->name, D_OPEN);
	struct names ids = { 0 };
	struct row row;

	if (dir == -1 ? errno != ENOENT : history_list(dir, &ids) == -1)
		(void)refuse_errno(r, "read the history");
	else if (row_read(&row, r->name) == -1)
		(void)refuse_errno(r, "read the state");
	else if (!row.exists && !row.lock.held && ids.n == 0)
		(void)refuse(r, 404, "there is no such state");
	else {
		page_begin(r, r->name);
		state_above(r, &row);
		state_rows(r, &row, dir, &ids);
		if (ids.n > 0)
			state_below(r, ids.list[ids.n - 1]);
	}
	names_free(&ids);
	close_quietly(dir);
	return r->status;
}

/* ---- metrics ---- */

static void
metric(struct buf *b, const char *name, const char *type)
{
	buf_fmt(b, "# HELP statesrv_%s %s\n# TYPE statesrv_%s %s\n", name, name,
	    name, type);
}

/* What is counted one by one: requests, and how long they took. */
static void
metrics_requests(struct buf *b)
{
	static const char took[] = "http_request_duration_seconds";
	unsigned long long n = 0;
	size_t i, m;

	metric(b, "http_requests_total", "counter");
	for (m = 0; m <= M_COUNT; m++)
		for (i = 0; i < STATUSES; i++)
			if (told.requests[m][i] > 0)
				buf_fmt(b, "statesrv_http_requests_total"
				    "{method=\"%s\",status=\"%zu\"} %llu\n",
				    m < M_COUNT ? method_names[m] : "other", i,
				    (unsigned long long)told.requests[m][i]);
	metric(b, took, "histogram");
	for (i = 0; i < DURATIONS; i++)
		buf_fmt(b, "statesrv_%s_bucket{le=\"%g\"} %llu\n", took,
		    durations[i], n += told.took[i]);
	n += told.took[i];
	buf_fmt(b, "statesrv_%s_bucket{le=\"+Inf\"} %llu\n"
	    "statesrv_%s_sum %.15g\nstatesrv_%s_count %llu\n", took, n, took,
	    (double)told.took_us / 1e6, took, n);
}

static int
page_metrics(struct request *r)
{
	struct walk w = { 0 };
	int status = walk_names(&w);
	uint64_t room, reserve;
	const struct { const char *name; const uint64_t *n; } numbers[] = {
		{ "http_received_bytes_total", &told.received },
		{ "http_sent_bytes_total", &told.sent },
		{ "log_lines_lost_total", &told.unlogged },
		{ "connections_accepted_total", &told.accepted },
		{ "connections", &told.connections },
		{ "threads", &told.threads },
		{ "states", &w.states },
		{ "locks", &w.locks },
		{ "oldest_lock_age_seconds", &w.oldest },
		{ "free_bytes", &room },
		{ "reserve_bytes", &reserve },
	};
	struct buf *b = &r->text;
	size_t i;

	names_free(&w.names);
	if (status == -1 || store_room(&room, &reserve) == -1)
		return refuse_errno(r, "count the states");
	metric(b, "build_info", "gauge");
	buf_str(b, "statesrv_build_info{version=\"" VERSION "\"} 1\n");
	(void)pthread_mutex_lock(&told.mutex);
	metrics_requests(b);
	for (i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
		metric(b, numbers[i].name, strstr(numbers[i].name, "_total") ?
		    "counter" : "gauge");
		buf_fmt(b, "statesrv_%s %llu\n", numbers[i].name,
		    (unsigned long long)*numbers[i].n);
	}
	(void)pthread_mutex_unlock(&told.mutex);
	r->type = "text/plain; version=0.0.4; charset=utf-8";
	return r->status = 200;
}

/* ---- a lock, a file, and is it well? ---- */

static int
page_lock(struct request *r)
{
	struct lock l = { 0 };
	struct place p;

	if (place_open(r->name, D_OPEN, &p) == -1 ||
	    lock_look(&p, r->name, &l) == -1)
		(void)refuse_errno(r, "read the lock");
	else if (!l.held)
		(void)refuse(r, 404, "%s is not locked", r->name);
	else {
		lock_tell(&l, &r->text);
		r->type = "application/json";
		r->status = 200;
	}
	free(l.raw);
	dir_leave(p.dir);
	return r->status;
}

/*
 * Sends a file as it is: a state, a version of one, or a log. Promise 2: it is
 * whatever file the name leads to at this moment; 404 only if there is none,
 * for terraform reads that as "no state yet" and would build everything a
 * second time.
 */
static int
page_file(struct request *r)
{
	bool log = r->kind == K_LOG;
	struct stat st;

	r->file = r->kind == K_VERSION ?
	    version_open(r->name, r->version, &st) :
	    name_file(r->name, log ? LOG : STATE, &st);
	if (r->file == -1)
		return errno == ENOENT ?
		    refuse(r, 404, "there is no such %s", log ? "log" :
		    "state or version") : refuse_errno(r, "read it");
	r->type = log ? "text/plain; charset=utf-8" : "application/json";
	r->left = st.st_size;
	if (st.st_size > 0 || log)
		return r->status = 200;
	complain("%s: its file is empty", r->name);
	return refuse(r, 500, "the state's file is empty; an earlier version "
	    "may be in the history");
}

/* Answers in a word, for machines. */
static bool
now_say(struct request *r, const char *word)
{
	buf_fmt(&r->text, "%s\n", word);
	r->type = "text/plain; charset=utf-8";
	r->status = 200;
	return true;
}

/* We are alive; to OPTIONS, the head says it all. */
static bool
now_ok(struct request *r)
{
	if (r->method != M_OPTIONS)
		return now_say(r, "ok");
	r->status = 204;
	return true;
}

/* A state that can be had without waiting. */
static bool
now_state(struct request *r)
{
	const struct cached *c = cache_get(r->name);

	if (c == NULL)
		return false;
	r->type = "application/json";
	r->out[1] = (struct span){ c->data, (size_t)c->st.st_size };
	r->status = 200;
	return true;
}

/* What /-/ready last found, and whether somebody is looking now. */
static struct {
	pthread_mutex_t mutex;
	bool looking;
	int64_t begun, ended;		/* ms */
	char why[120];			/* it is not ready, or "" */
} ready = { .mutex = PTHREAD_MUTEX_INITIALIZER };

/* Looks whether states can be written, in a thread of its own, for a dying
 * disk may never answer. */
static void *
ready_look(void *unused)
{
	struct tmp t = { .fd = -1 };
	const char *why = "";

	if (!store_there() || !guard_in_place())
		why = "the states' directory, or .guard in it, was removed or "
		    "replaced";
	else if (store_fits(0) == -1 || tmp_create(&t, store.root) == -1 ||
	    sync_fd(t.fd) == -1)
		why = strerror(errno);
	tmp_remove(&t);
	(void)pthread_mutex_lock(&ready.mutex);
	ready.looking = false;
	ready.ended = clock_ms();
	(void)snprintf(ready.why, sizeof(ready.why), "%s", why);
	(void)pthread_mutex_unlock(&ready.mutex);
	return unused;
}

/*
 * Answers /-/ready from the last verdict; an old one only those who come while
 * a look is going on. Else it starts a look, and returns false: do_ready waits
 * for that.
 */
static bool
now_ready(struct request *r)
{
	int64_t now = clock_ms();
	bool stale, late, known;

	(void)pthread_mutex_lock(&ready.mutex);
	stale = ready.ended == 0 || now - ready.ended >= FRESH_MS;
	if (stale && !ready.looking) {
		ready.begun = now;
		ready.looking = thread_start(ready_look);
	}
	late = stale && (!ready.looking || now - ready.begun >= LOOK_MS);
	known = late || !stale || (ready.ended != 0 &&
	    r->start / 1000 > ready.begun);
	if (known && (late || ready.why[0] != '\0'))
		(void)refuse(r, 503, "not ready: %s", late ?
		    "the disk does not answer, or there is no "
		    "thread to ask it" : ready.why);
	else if (known)
		(void)now_say(r, "ready");
	(void)pthread_mutex_unlock(&ready.mutex);
	return known;
}

static int
do_ready(struct request *r)
{
	while (!now_ready(r))
		(void)wait_until(-1, 0, clock_ms() + 1);
	return r->status;
}
/* ==== methods ============================================================
 *
 * What each method on each kind of URL wants: a permission, a body, and a
 * function of the loop or one of a thread. A request comes in only if it is
 * found in the table, which also writes every Allow.
 */
enum body { B_NONE, B_INFO, B_STATE };

static const struct action {
	enum kind kind;
	unsigned methods;		/* a bit for each */
	enum right right;
	enum body body;
	bool page;			/* run by page() */
	bool (*now)(struct request *);	/* in the loop: false, it might wait */
	int (*run)(struct request *);	/* in a thread */
} actions[] = {
#define ON(method) (1u << (method))
#define READS (ON(M_GET) | ON(M_HEAD))
#define WRITES (ON(M_POST) | ON(M_PUT))
	{ K_STATE, READS, R_READ, B_NONE, false, now_state, page_file },
	{ K_STATE, WRITES, R_WRITE, B_STATE, false, NULL, do_write },
	{ K_STATE, ON(M_DELETE), R_PLAN, B_INFO, false, NULL, do_unlock },
	{ K_STATE, ON(M_LOCK), R_PLAN, B_INFO, false, NULL, do_lock },
	{ K_STATE, ON(M_UNLOCK), R_PLAN, B_INFO, false, NULL, do_unlock },
	{ K_LOCK, READS, R_READ, B_NONE, false, NULL, page_lock },
	{ K_LOCK, WRITES | ON(M_LOCK), R_PLAN, B_INFO, false, NULL, do_lock },
	{ K_LOCK, ON(M_DELETE) | ON(M_UNLOCK), R_PLAN, B_INFO, false, NULL,
	    do_unlock },
	{ K_ROOT, READS, R_READ, B_NONE, true, NULL, page_root },
	{ K_VERSIONS, READS, R_READ, B_NONE, true, NULL, page_state },
	{ K_VERSION, READS, R_READ, B_NONE, false, NULL, page_file },
	{ K_LOG, READS, R_READ, B_NONE, false, NULL, page_file },
	{ K_HEALTHY, READS, R_NONE, B_NONE, false, now_ok, NULL },
	{ K_READY, READS, R_NONE, B_NONE, false, now_ready, do_ready },
	{ K_METRICS, READS, R_READ, B_NONE, true, NULL, page_metrics },
	{ .methods = 0 },		/* none of these */
};
#define ACTIONS (sizeof(actions) / sizeof(*actions) - 1)

/* What a request asks for; if that is not in the table, methods is 0. */
static const struct action *
action_of(const struct request *r)
{
	static const struct action options = {
		.methods = ON(M_OPTIONS), .now = now_ok
	};
	size_t i = 0;

	if (r->method == M_OPTIONS)
		return &options;
	while (i < ACTIONS && (actions[i].kind != r->kind ||
	    (actions[i].methods & ON(r->method)) == 0))
		i++;
	return &actions[i];
}

static void
action_allow(struct buf *b, enum kind kind)
{
	unsigned m, methods = 0;
	size_t i;

	for (i = 0; i < ACTIONS; i++)
		if (actions[i].kind == kind)
			methods |= actions[i].methods;
	buf_str(b, "Allow: OPTIONS");
	for (m = 0; m < M_COUNT; m++)
		if ((methods & ON(m)) != 0)
			buf_fmt(b, ", %s", method_names[m]);
	buf_str(b, "\r\n");
}

/* localhost, a name below it, or an address: what a name that an attacker's
 * DNS points to 127.0.0.1 cannot be, for browsers take a last label of digits
 * for the end of an address. */
static bool
host_is_local(struct span h)
{
	struct span name = { NULL, 0 };

	if (h.len == 0 || *h.ptr == '[')
		return true;
	(void)span_next(&h, ':', &name);
	/* A head's line ends after it: so there is an end to the digits. */
	if (strspn(name.ptr, "0123456789.") >= name.len)
		return true;
	name.len -= name.ptr[name.len - 1] == '.';
	return span_is(name, "localhost") || (name.len > 10 &&
	    span_is((struct span){ name.ptr + name.len - 10, 10 },
	    ".localhost"));
}

/* May the user do that to the name? The text says which it is, for one who
 * wrote a pattern that does not fit. */
static int
admit_right(struct request *r)
{
	bool named = r->kind != K_ROOT && r->kind != K_STAR &&
	    r->kind < K_HEALTHY;

	r->right = user_right(r, named ? r->name : NULL);
	if (r->right >= action_of(r)->right)
		return 0;
	if (r->right == R_NONE)
		return refuse(r, 403, "the permission of %s is not for the "
		    "name %s", r->user, r->name);
	return refuse(r, 403, "%s may not %s %s: the permission is %s", r->user,
	    method_names[r->method], r->name, right_names[r->right]);
}

/* What the body's fields can be refused for. */
static int
admit_body(struct request *r, const struct head *h)
{
	const struct span *f = h->field;
	enum body body = action_of(r)->body;

	r->expects = f[F_EXPECT].ptr != NULL && h->minor == 1;
	r->length = h->chunked ? -1 : h->length > 0 ? h->length : 0;
	r->room = body == B_STATE ? conf.body_max : LOCK_INFO_MAX;
	r->too_large = body == B_INFO ? 400 : 413;
	/* RFC 9110, 13.2 and 14.5: what is asked for on a condition may not
	 * be done as if there were none. */
	if (body != B_NONE && f[F_RANGE].ptr != NULL)
		return refuse(r, 400, "Content-Range: a state is sent whole");
	if (body != B_NONE && (f[F_MATCH].ptr != NULL ||
	    f[F_NONE_MATCH].ptr != NULL || f[F_UNMODIFIED].ptr != NULL))
		return refuse(r, 412, "no If- conditions here: use the lock");
	if (body == B_STATE && !h->chunked && h->length == -1)
		return refuse(r, 411, "a state needs Content-Length or chunks");
	if (r->length > r->room)
		return refuse(r, r->too_large,
		    "the body is larger than %lld bytes", (long long)r->room);
	r->has_md5 = f[F_MD5].ptr != NULL;
	if (r->has_md5 && base64_decode(f[F_MD5], r->md5, 16) != 16)
		return refuse(r, 400, "Content-MD5 is no base64 of 16 bytes");
	return 0;
}

/*
 * Everything that a request's head can be refused for, in the order that
 * tells the least to those who do not belong: pages of other sites, then
 * strangers, then bad names, wrong methods, missing permissions, wrong
 * lengths.
 */
static int
admit(struct request *r, const struct head *h, bool guarded)
{
	struct span query = h->target, path = { NULL, 0 };
	struct span authorization = h->field[F_AUTHORIZATION];
	const char *wrong;
	bool found, unlock;
	int status;

	(void)span_next(&query, '?', &path);
	/* http://host means http://host/ */
	wrong = name_route(path.len > 0 ? path : span("/"), r, &found);
	if (guarded && !host_is_local(h->host))
		return refuse(r, 403, "the Host %s is not this machine: "
		    "without users, a loopback server answers to localhost "
		    "only. Set users (TF_HTTP_USERNAME and TF_HTTP_PASSWORD, "
		    "or -u), or -n, which lets any web page read the states",
		    r->host);
	if (h->field[F_ORIGIN].ptr != NULL && r->method != M_GET &&
	    r->method != M_HEAD && r->method != M_OPTIONS)
		return refuse(r, 403, "no web page may change a state");
	if (r->users != NULL && r->kind != K_HEALTHY && r->kind != K_READY) {
		if (authorization.ptr == NULL)
			return refuse(r, 401, "credentials are needed");
		if (!user_shows(r, authorization) ||
		    user_right(r, NULL) == R_NONE) {
			memset(r->secret, 0, sizeof(r->secret));
			return refuse(r, 401, "wrong credentials");
		}
	}
	if (wrong != NULL)
		return refuse(r, 400, "%s", wrong);
	if (!found)
		return refuse(r, 404, "there is no such page");
	unlock = r->method == M_UNLOCK || (r->method == M_DELETE &&
	    (r->kind == K_LOCK || r->go || h->field[F_MD5].ptr != NULL ||
	    h->chunked || h->length > 0));
	if ((wrong = name_query(query, r, unlock)) != NULL)
		return refuse(r, 400, "%s", wrong);
	if (action_of(r)->methods == 0)
		return refuse(r, 405, "%s does not go with this URL",
		    method_names[r->method]);
	status = admit_right(r);
	return status != 0 ? status : admit_body(r, h);
}
/* ==== connections ========================================================
 *
 * One thread polls: it accepts, reads heads, and answers what needs no
 * waiting. What may wait is given, with its connection, to a thread of the
 * pool, and the connection comes back when it is answered. So each is in one
 * list at a time, and belongs to the loop, or to the thread that has it.
 */
struct list {				/* zero is empty */
	struct conn *first, *last;
	unsigned n;
};

/*
 * The connections that the loop has, those with the latest news last. Only
 * these are polled on most turns, so that thousands of idle ones cost next to
 * nothing. An idle one has no buffer and no request.
 */
static struct {
	struct list list;
	unsigned base;			/* wake pipe and listeners */
	unsigned max;			/* connections, those in threads too */
	struct pollfd fd[1 + LISTENERS_MAX + SLOTS_MAX];
} set;

static struct {				/* guarded by conn_mutex */
	struct list queue;		/* wait for a thread */
	struct list busy;		/* have one */
	struct list back;		/* are answered */
	pthread_cond_t work;
	unsigned idle, max;		/* threads */
	int64_t stop;			/* 0, or the end of all waiting */
} pool = { .work = PTHREAD_COND_INITIALIZER };

static struct listener listeners[LISTENERS_MAX];

union address {
	struct sockaddr any;
	struct sockaddr_in four;
	struct sockaddr_in6 six;
	struct sockaddr_un path;
};

static struct {
	int wake[2];			/* a pipe: signals, or 0: see pool */
	int64_t now;			/* ms, monotonic, of this turn */
	int64_t rest;			/* no accepting until then */
	pid_t child;			/* the wrapper's command, or 0 */
	bool shares_terminal;		/* it and we, in the foreground */
	int status;			/* its exit status */
	bool log_blocks;		/* stdout is a pipe or terminal */
} loop;

static void
list_add(struct list *l, struct conn *c)
{
	c->next = NULL;
	c->prev = l->last;
	*(c->prev != NULL ? &c->prev->next : &l->first) = c;
	l->last = c;
	l->n++;
}

static void
list_remove(struct list *l, struct conn *c)
{
	*(c->prev != NULL ? &c->prev->next : &l->first) = c->next;
	*(c->next != NULL ? &c->next->prev : &l->last) = c->prev;
	l->n--;
}

/* ---- the request log ---- */

/* The second that it is, for a line of the log and for a Date. */
static __thread struct {
	time_t second;
	char log[32], date[64];
} clock_text;

/* Brings the texts up to date; the time of day, in milliseconds. */
static int64_t
clock_texts(void)
{
	static const char days[] = "SunMonTueWedThuFriSat";
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	int64_t ms = time_ms();
	time_t second = (time_t)(ms / 1000);
	struct tm tm;

	if (second == clock_text.second)
		return ms;
	clock_text.second = second;
	time_text(clock_text.log, ms, false);
	(void)gmtime_r(&second, &tm);
	(void)snprintf(clock_text.date, sizeof(clock_text.date),
	    "\r\nDate: %.3s, %02d %.3s %04d %02d:%02d:%02d GMT\r\n",
	    &days[3 * tm.tm_wday], tm.tm_mday, &months[3 * tm.tm_mon],
	    (tm.tm_year + 1900) % 10000, tm.tm_hour, tm.tm_min, tm.tm_sec);
	return ms;
}

/* Appends key=value, quoted if it must be, if there is a value. */
static void
logfmt(struct buf *b, const char *key, const char *value)
{
	const unsigned char *p = (const unsigned char *)value;

	if (*p == '\0')
		return;
	buf_str(b, key);
	while (*p > ' ' && *p != '"' && *p != '=' && *p != '\\' && *p < 0x7f)
		p++;
	if (*p == '\0')
		buf_str(b, value);
	else
		buf_json(b, value);
}

static void
log_request(const struct request *r, int64_t us, struct buf *b)
{
	static const char names[K_METRICS + 1][9] = {
		[K_LOCK] = "lock", [K_VERSIONS] = "versions",
		[K_VERSION] = "version", [K_LOG] = "log"
	};
	bool path = r->kind == K_STAR || r->kind == K_ROOT ||
	    r->kind >= K_HEALTHY;
	int64_t ms = clock_texts();

	buf_str(b, "time=");
	buf_add(b, clock_text.log, 20);
	buf_num(b, ms % 1000, 3);
	logfmt(b, "Z client=", *r->client != '\0' ? r->client : "unix");
	logfmt(b, " user=", r->user);
	buf_str(b, " method=");
	buf_str(b, r->method < M_COUNT ? method_names[r->method] : "-");
	logfmt(b, path ? " path=" : " name=", r->name);
	logfmt(b, " page=", names[r->kind]);
	buf_str(b, r->status == 0 ? " status=-" : " status=");
	if (r->status != 0)
		buf_num(b, r->status, 1);
	buf_str(b, " bytes=");
	buf_num(b, r->sent, 1);
	buf_str(b, " ms=");
	buf_num(b, us / 1000, 1);
	buf_str(b, ".");
	buf_num(b, us % 1000, 3);
	logfmt(b, " id=", r->id);
	logfmt(b, " why=", r->why);
	buf_str(b, "\n");
}

/* A request has been answered, or cut: counts and logs it. The time, in
 * milliseconds. */
static int64_t
request_told(struct request *r)
{
	int64_t now = clock_us(CLOCK_MONOTONIC), us = now - r->start;
	size_t i = 0;

	if (r->cut)
		r->status = 0;
	(void)pthread_mutex_lock(&told.mutex);
	told.requests[r->method][r->status]++;
	while (i < DURATIONS && (double)us / 1e6 > durations[i])
		i++;
	told.took[i]++;
	told.took_us += (uint64_t)us;
	told.sent += (uint64_t)r->sent;
	told.received += (uint64_t)r->got;
	if (conf.command == NULL &&	/* else stdout is the command's */
	    (r->kind != K_READY || r->status != 200))
		log_request(r, us, &told.log);
	if (r->status == 200 && action_of(r)->run == do_lock)
		(void)snprintf(told.locked, sizeof(told.locked), "%s", r->id);
	(void)pthread_mutex_unlock(&told.mutex);
	return now / 1000;
}

/*
 * Writes the log's lines: at once, or by the dozen if they come thick and
 * fast. Returns how long poll may wait; longer than a tick: a shorter timeout
 * has the processor's timer set anew on each turn, which is dear.
 *
 * A reader of stdout that does not read must not stop the server: a pipe that
 * polls writable takes PIPE_BUF at once, and what it does not take is counted
 * and dropped.
 */
static int64_t
log_flush(int64_t wait)
{
	static int64_t flushed;
	size_t at = 0, n, max;
	struct buf b = { 0 };
	int lost = 0;

	(void)pthread_mutex_lock(&told.mutex);
	max = told.log.len;
	if (wait < 0 || max > PIPE_BUF / 8 * 7 ||
	    loop.now - flushed >= LOG_MS) {
		b = told.log;
		told.log = (struct buf){ 0 };
	}
	(void)pthread_mutex_unlock(&told.mutex);
	if (b.len == 0)
		return max > 0 && wait > LOG_MS ? LOG_MS : wait;
	flushed = loop.now;
	(void)pthread_mutex_lock(&output);
	for (; at < b.len; at += n) {	/* whole lines, if they are short */
		max = b.len - at < PIPE_BUF ? b.len - at : PIPE_BUF;
		for (n = max; n > 0 && b.data[at + n - 1] != '\n';)
			n--;
		n = n > 0 ? n : max;
		if ((loop.log_blocks && (wait_until(STDOUT_FILENO, POLLOUT,
		    0) & POLLOUT) == 0) ||
		    write_all(STDOUT_FILENO, b.data + at, n) == -1)
			break;
	}
	(void)pthread_mutex_unlock(&output);
	for (; at < b.len; at++)
		lost += b.data[at] == '\n';
	if (lost > 0)
		(void)told_add(&told.unlogged, lost);
	buf_free(&b);
	return wait;
}

/* ---- answers ---- */

/* Makes the answer ready to be sent: its head, and what follows that. */
static void
reply_ready(struct request *r)
{
	struct buf *b = &r->head;

	if (r->text.failed)
		(void)refuse(r, 503, "out of memory");
	if (r->text.len > 0)
		r->out[1] = (struct span){ r->text.data, r->text.len };
	(void)pthread_mutex_lock(&conn_mutex);
	r->keep = r->keep && r->length == 0 && pool.stop == 0;
	(void)pthread_mutex_unlock(&conn_mutex);
	(void)clock_texts();
	buf_str(b, r->tls ? "HTTP/1.0 " : "HTTP/1.1 ");
	buf_num(b, r->status, 3);
	buf_str(b, " ");
	buf_str(b, reasons[r->status]);
	buf_str(b, clock_text.date);
	if (r->status != 204) {
		buf_str(b, "Content-Length: ");
		buf_num(b, (int64_t)r->out[1].len + (int64_t)r->left, 1);
		buf_str(b, "\r\n");
	}
	if (r->type != NULL) {
		buf_str(b, "Content-Type: ");
		buf_str(b, r->type);
		buf_str(b, "\r\nX-Content-Type-Options: nosniff"
		    "\r\nCache-Control: no-store\r\n");
		/* Nothing from elsewhere, no script, in nobody's frame. */
		if (strncmp(r->type, "text/html", 9) == 0)
			buf_str(b, "Content-Security-Policy: default-src "
			    "'none'; style-src 'unsafe-inline'; img-src data:; "
			    "form-action 'self'; base-uri 'none'; "
			    "frame-ancestors 'none'\r\n"
			    "Referrer-Policy: no-referrer\r\n");
	}
	if (r->status == 401)
		buf_str(b, "WWW-Authenticate: Basic realm=\"statesrv\", "
		    "charset=\"UTF-8\"\r\n");
	if (r->status == 503)
		buf_fmt(b, "Retry-After: %u\r\n", r->retry > 0 ? r->retry : 1);
	if (r->status == 405 || r->status == 204)
		action_allow(b, r->kind);
	buf_str(b, !r->keep ? "Connection: close\r\n\r\n" :
	    r->http10 ? "Connection: keep-alive\r\n\r\n" : "\r\n");
	r->out[0] = (struct span){ b->data, b->len };
	if (r->method == M_HEAD) {
		r->out[1].len = 0;
		r->left = 0;
	}
	trace("<", r->out[0].ptr, r->out[0].len);
	trace("<", r->out[1].ptr, r->out[1].len);
	r->sent = (int64_t)r->out[1].len + (int64_t)r->left;
}

/* Sends more of an answer: head and body together from memory, then what is
 * in a file; as send(2). */
static ssize_t
reply_more(struct request *r)
{
	size_t n = r->left < SEND_MAX ? (size_t)r->left : SEND_MAX, i, k;
	struct iovec v[2];
	struct msghdr m = { .msg_iov = v, .msg_iovlen = 2 };
	ssize_t sent;

	if (r->out[0].len + r->out[1].len == 0) {
#ifdef __linux__
		sent = sendfile(r->conn->fd, r->file, &r->off, n);
#else
		char piece[16384];

		n = n < sizeof(piece) ? n : sizeof(piece);
		sent = read_at(r->file, piece, n, r->off);
		if (sent > 0)
			sent = send(r->conn->fd, piece, (size_t)sent, 0);
		r->off += sent > 0 ? sent : 0;
#endif
		r->left -= sent > 0 ? sent : 0;
		return sent;
	}
	for (i = 0; i < 2; i++) {
		/* sendmsg only reads it, but iovec is older than const */
		memcpy(&v[i].iov_base, &r->out[i].ptr, sizeof(void *));
		v[i].iov_len = r->out[i].len;
	}
	/* The last answer, and the end of the connection, are one packet. */
	sent = sendmsg(r->conn->fd, &m, r->left > 0 || !r->keep ? MSG_MORE : 0);
	n = sent > 0 ? (size_t)sent : 0;
	for (i = 0; i < 2; i++, n -= k) {
		k = n < r->out[i].len ? n : r->out[i].len;
		r->out[i].ptr += k;
		r->out[i].len -= k;
	}
	return sent;
}

/* Sends the answer, or what is left of it: the only sender. 1: it is out; 0:
 * it would have to wait, and may not; -1: the client does not take it. */
static int
reply_send(struct request *r, bool may_wait)
{
	ssize_t n;

	if (r->head.failed)
		return cut(r, "out of memory");
	while (r->out[0].len + r->out[1].len > 0 || r->left > 0) {
		n = reply_more(r);
		if (n > 0 && may_wait)
			conn_moved(r->conn, (size_t)n);
		else if (n == 0)
			return cut(r, "the file has become shorter");
		else if (n == -1 && errno == EIO)
			return cut(r, "the file cannot be read");
		else if (n == -1 && !may_wait && errno == EAGAIN)
			return 0;
		else if (n == -1 && ((errno != EAGAIN && errno != EINTR) ||
		    !conn_wait(r->conn, POLLOUT)))
			return cut(r, "the client did not take the answer");
	}
	return 1;
}

/* ---- requests ---- */

/* A request whose head is complete, n bytes, or refused: minus a status. It
 * has a copy of what outlives the head. NULL if there is no memory. */
static struct request *
request_new(struct conn *c, const struct head *h, int n)
{
	struct request *r = calloc(1, sizeof(*r));
	struct span agent = h->field[F_AGENT], told_by = h->field[F_FORWARDED];
	struct span last = { NULL, 0 };
	unsigned char bytes[16];
	char text[INET6_ADDRSTRLEN];

	if (r == NULL)
		return NULL;
	r->conn = c;
	r->file = -1;
	r->method = h->method;
	r->kind = K_STAR;
	r->start = clock_us(CLOCK_MONOTONIC);
	r->fronted = c->from->path || conf.fronted;
	memcpy(r->client, c->peer, sizeof(c->peer));
	r->users = users_hold();
	if (n < 0) {
		/* Go's client, seeing HTTP/1.0, says at once what it met. */
		r->tls = c->used > 0 && *c->in == 0x16;
		r->length = -1;
		(void)refuse(r, -n, "%s", r->tls ?
		    "this is TLS, and the port speaks plain HTTP" : h->why);
		return r;
	}
	trace(">", c->in, (size_t)n);
	c->at += (size_t)n;
	r->got = n;
	r->keep = h->keep;
	r->http10 = h->minor == 0;
	r->form = http_lists(h->field[F_ACCEPT], "text/html") ? HTML :
	    http_lists(h->field[F_ACCEPT], "application/json") ? JSON : TEXT;
	r->go = agent.len >= 14 && memcmp(agent.ptr, "Go-http-client", 14) == 0;
	span_copy(r->host, sizeof(r->host), h->host);
	/* The last address that a front tells counts, if it is one. */
	while (r->fronted && span_next(&told_by, ',', &last))
		continue;
	span_copy(text, sizeof(text), last);
	if (inet_pton(AF_INET, text, bytes) == 1 ||
	    inet_pton(AF_INET6, text, bytes) == 1)
		(void)snprintf(r->client, sizeof(r->client), "%s", text);
	/* Until the body is admitted: it is there, and stays unread. */
	r->length = h->chunked || h->length > 0 ? -1 : 0;
	if (admit(r, h, c->from->local && r->users == NULL &&
	    !conf.open) == 411)
		r->length = -1;		/* who knows what comes next */
	return r;
}

static void
request_free(struct request *r)
{
	users_drop(r->users);
	buf_free(&r->head);
	buf_free(&r->text);
	close_quietly(r->file);
	free(r->body);
	free(r);
}

/* The answer is out, or nothing more will be: what becomes of the connection?
 * RFC 9112, 9.6: to close while bytes are unread, or with much unsent, would
 * reset it, and the client might lose the answer with it. */
static void
request_end(struct request *r, int sent)
{
	struct conn *c = r->conn;
	bool large = r->file != -1 || r->sent > 16384;
	int64_t now = request_told(r);
	char byte;

	c->r = NULL;
	c->begun = false;
	conn_within(c, now, r->keep ? IDLE_MS : DRAIN_MS);
	if (sent != 1)
		c->state = C_GONE;
	else if (r->keep)
		c->state = C_HEAD;
	else {
		(void)shutdown(c->fd, SHUT_WR);
		c->state = !large && r->length == 0 && c->used == c->at &&
		    recv(c->fd, &byte, 1, MSG_PEEK) != 1 ? C_GONE : C_DRAIN;
	}
}

/* ---- the pool ---- */

static void
loop_wake(char byte)
{
	(void)!write(loop.wake[1], &byte, 1);	/* a full pipe wakes, too */
}

/* Does a request from first line to last, answers it, and gives its
 * connection back before it frees and prunes. */
static void
thread_serve(struct conn *c)
{
	struct change ch = { .place.dir = -1, .tmp.fd = -1, .old = -1,
	    .kept.fd = -1, .history = -1 };
	struct request *r = c->r;
	const struct action *act;
	bool whole;

	r->change = &ch;
	conn_within(c, clock_ms(), BODY_MS);
	if (r->head.len == 0) {		/* else it is the rest of an answer */
		act = action_of(r);
		whole = r->status == 0 && (act->body != B_NONE ||
		    r->length == 0 || body_whole(r) == 0);
		if (whole && act->page)
			page(r, act->run);
		else if (whole)
			(void)(act->run != NULL ? act->run(r) : act->now(r));
		if (!r->cut)
			reply_ready(r);
		conn_within(c, clock_ms(), BODY_MS);
	}
	request_end(r, r->cut ? -1 : reply_send(r, true));
	(void)pthread_mutex_lock(&conn_mutex);
	list_remove(&pool.busy, c);
	list_add(&pool.back, c);
	if (pool.back.n == 1)
		loop_wake(0);
	(void)pthread_mutex_unlock(&conn_mutex);
	change_free(&ch);
	request_free(r);
}

/* A thread's life: it ends when there was nothing to do for a while. (If the
 * clock jumps, that is sooner or later, and does no harm.) */
static void *
pool_thread(void *unused)
{
	struct timespec until;
	struct conn *c;

	(void)pthread_mutex_lock(&conn_mutex);
	for (;;) {
		(void)clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += THREAD_IDLE_MS / 1000;
		pool.idle++;
		while (pool.queue.n == 0 && pthread_cond_timedwait(&pool.work,
		    &conn_mutex, &until) == 0)
			continue;
		pool.idle--;
		if ((c = pool.queue.first) == NULL)
			break;
		list_remove(&pool.queue, c);
		list_add(&pool.busy, c);
		(void)pthread_mutex_unlock(&conn_mutex);
		thread_serve(c);
		(void)pthread_mutex_lock(&conn_mutex);
	}
	(void)told_add(&told.threads, -1);
#ifdef __GLIBC__
	if (told.threads == 0)		/* what a flood needed is given back */
		(void)malloc_trim(0);
#endif
	(void)pthread_mutex_unlock(&conn_mutex);
	return unused;
}

/* Gives a connection, and its request, to a thread. */
static void
pool_give(struct conn *c)
{
	list_remove(&set.list, c);
	c->since = loop.now;
	(void)pthread_mutex_lock(&conn_mutex);
	list_add(&pool.queue, c);
	if (pool.queue.n > pool.idle && told.threads < pool.max &&
	    thread_start(pool_thread))
		(void)told_add(&told.threads, 1);
	(void)pthread_mutex_unlock(&conn_mutex);
	(void)pthread_cond_signal(&pool.work);
}

/* ---- a connection's life ---- */

/* Closes one; of a request that it has, or whose head has begun, is told why
 * it gets no answer. */
static void
conn_close(struct conn *c, const char *why)
{
	static const struct head begun = { .method = M_COUNT, .why = "" };

	if (c->r == NULL && c->begun)
		c->r = request_new(c, &begun, -400);
	if (c->r != NULL) {
		(void)cut(c->r, why);
		(void)request_told(c->r);
		request_free(c->r);
	}
	list_remove(&set.list, c);
	(void)close(c->fd);
	free(c->in);
	free(c);
	(void)told_add(&told.connections, -1);
}

/* Reads what has come of a head. Its length; 0: more must come, if the
 * connection is not gone; or minus a status. */
static int
head_read(struct conn *c, struct head *h)
{
	ssize_t n = 1;
	int size;

	*h = (struct head){ .method = M_COUNT, .why = "too many empty lines" };
	for (;;) {
		for (; c->used - c->at >= 2 && c->in[c->at] == '\r' &&
		    c->in[c->at + 1] == '\n'; c->at += 2)
			if (++c->blanks > BLANKS_MAX)
				return -400;
		if (c->used > c->at) {
			if (!c->begun)
				conn_within(c, loop.now, HEAD_MS);
			c->begun = true;
			conn_compact(c);
			size = *c->in == 0x16 ? -400 :
			    http_parse(c->in, c->used, &c->seen, h);
			c->blanks = size > 0 ? 0 : c->blanks;
			if (size != 0)
				return size;
		} else {
			c->at = c->used = c->seen = 0;
			c->begun = false;
		}
		if (c->dry || (c->in == NULL &&
		    (c->in = malloc(HEAD_MAX)) == NULL))
			break;
		n = recv(c->fd, c->in + c->used, HEAD_MAX - c->used, 0);
		c->dry = n < (ssize_t)(HEAD_MAX - c->used);
		if (n <= 0)
			break;
		c->used += (size_t)n;
	}
	if (c->in == NULL || n == 0 || (n == -1 && errno != EAGAIN &&
	    errno != EINTR) || (pool.stop != 0 && !c->begun))
		c->state = C_GONE;
	if (c->used == 0) {
		free(c->in);
		c->in = NULL;
	}
	return 0;
}

/* Answers a request that has its answer, without waiting. False: a thread
 * sends what the socket did not take, and has the connection. */
static bool
conn_answer(struct conn *c)
{
	struct request *r = c->r;
	int sent;

	reply_ready(r);
	sent = reply_send(r, false);
	if (sent == 0 && r->text.len == 0 && r->out[1].len > 0) {
		/* The rest is the cache's, which may drop it. */
		buf_add(&r->text, r->out[1].ptr, r->out[1].len);
		r->out[1].ptr = r->text.data;
		sent = r->text.failed ? cut(r, "out of memory") : 0;
	}
	if (sent == 0) {
		pool_give(c);
		return false;
	}
	request_end(r, sent);
	request_free(r);
	return true;
}

/* Answers a request that is quickly answered, and true; else a thread has the
 * connection, or it waits for a moment. */
static bool
conn_request(struct conn *c, bool quick)
{
	struct request *r = c->r;

	if (r->status == 401 && (*r->user != '\0' || r->bearer)) {
		c->state = C_DENY;
		conn_within(c, loop.now, DENY_MS);
		return false;
	}
	if (quick && (r->status != 0 || (r->length == 0 &&
	    action_of(r)->now != NULL && action_of(r)->now(r))))
		return conn_answer(c);
	pool_give(c);
	return false;
}

/* Does for a connection what can be done now. */
static void
conn_drive(struct conn *c)
{
	static char sink[65536];
	struct head h;
	ssize_t n;
	int size, turns;

	c->dry = false;
	for (turns = 0; c->state == C_HEAD; turns++) {
		if ((size = head_read(c, &h)) != 0)
			c->r = request_new(c, &h, size);
		if (size != 0 && c->r == NULL)
			c->state = C_GONE;
		if (c->r != NULL ? !conn_request(c, turns < TURN_MAX) :
		    c->state == C_HEAD)
			return;
	}
	for (turns = 0; c->state == C_DRAIN && turns < 16; turns++) {
		n = recv(c->fd, sink, sizeof(sink), 0);
		if (n == -1 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0)
			c->state = C_GONE;
	}
	if (c->state == C_GONE)
		conn_close(c, "the client has left");
}

/* A deadline has passed. */
static void
conn_late(struct conn *c)
{
	if (c->state != C_DENY)
		conn_close(c, c->r != NULL ? "no thread had time for the rest" :
		    "the head came too slowly");
	else if (conn_answer(c))
		conn_drive(c);
}

/*
 * Somebody waits for a thread, and all are taken: whoever has kept one waiting
 * for longest, for himself, loses his connection; one that waits for a disk,
 * a guard or a page never does. Who has waited too long for a thread is told.
 * Does still somebody wait?
 */
static bool
pool_relieve(void)
{
	int64_t oldest = loop.now - STALL_MS;
	struct conn *c, *stalled = NULL;
	bool waiting;

	(void)pthread_mutex_lock(&conn_mutex);
	waiting = pool.queue.n > pool.idle;
	for (c = waiting ? pool.busy.first : NULL; c != NULL; c = c->next)
		if (c->waits != 0 && c->waits < oldest) {
			stalled = c;
			oldest = c->waits;
		}
	if (stalled != NULL)
		(void)shutdown(stalled->fd, SHUT_RDWR);
	c = pool.queue.first;
	if (c != NULL && loop.now - c->since > QUEUE_MS)
		list_remove(&pool.queue, c);
	else
		c = NULL;
	(void)pthread_mutex_unlock(&conn_mutex);
	if (c != NULL) {
		c->active = c->deadline = loop.now;
		list_add(&set.list, c);
	}
	if (c != NULL && c->r->status == 0) {
		c->r->retry = 10;
		(void)refuse(c->r, 503, "all threads are busy");
		c->state = C_DENY;
	}
	return waiting;
}

/* ---- accepting ---- */

/* Makes room by closing the connection that is idle for longest, and for
 * so many milliseconds at least; else the listeners rest, or poll would spin
 * on what cannot be accepted. */
static bool
conn_evict(int64_t ms)
{
	struct conn *c = set.list.first;

	if (c != NULL && loop.now - c->active >= ms) {
		conn_close(c, "others needed its place");
		return true;
	}
	loop.rest = loop.now + 50;
	return false;
}

static void
address_text(const union address *a, char *out, size_t size)
{
	bool six = a->any.sa_family == AF_INET6;
	char text[INET6_ADDRSTRLEN];

	*out = '\0';
	if (a->any.sa_family != AF_UNIX && inet_ntop(a->any.sa_family, six ?
	    (const void *)&a->six.sin6_addr : (const void *)&a->four.sin_addr,
	    text, sizeof(text)) != NULL)
		(void)snprintf(out, size, six ? "[%s]:%u" : "%s:%u", text,
		    ntohs(six ? a->six.sin6_port : a->four.sin_port));
}

/* Accepts what waits on a listener, up to a number. */
static void
conn_accept(unsigned slot)
{
	int listener = set.fd[slot].fd, fd, n;
	union address peer;
	socklen_t len;
	struct conn *c;

	for (n = 0; n < 64; n++) {
		if (told.connections >= set.max && !conn_evict(NEW_MS))
			return;
		len = sizeof(peer);
		memset(&peer, 0, sizeof(peer));
#ifdef __linux__
		fd = accept4(listener, &peer.any, &len, SOCK_NONBLOCK |
		    SOCK_CLOEXEC);
#else
		fd = accept(listener, &peer.any, &len);
		(void)fcntl(fd, F_SETFL, O_NONBLOCK);
		(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
#endif
		if (fd == -1 && (errno == EINTR || errno == ECONNABORTED ||
		    ((errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
		    errno == ENOMEM) && conn_evict(1000))))
			continue;
		if (fd == -1)
			return;
		if ((c = calloc(1, sizeof(*c))) == NULL) {
			(void)close(fd);
			return;
		}
		c->fd = fd;
		c->from = &listeners[slot - 1];
		address_text(&peer, c->peer, sizeof(c->peer));
		(void)told_add(&told.connections, 1);
		(void)told_add(&told.accepted, 1);
		conn_within(c, loop.now, IDLE_MS);
		list_add(&set.list, c);
		conn_drive(c);
	}
}
/* ==== start and stop =====================================================
 *
 * The directory, the listeners, the sandbox, signals, the loop's turns, and
 * the wrapper: statesrv NAME COMMAND.
 */

/* The signals that we take; each becomes a byte in the wake pipe. As process 1
 * of a container there are no defaults: all are set. */
static const int signals[] = {
	SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGCHLD, SIGPIPE
};
#define SIGNALS (sizeof(signals) / sizeof(*signals))

/* What we change of what we were started with, for the wrapper's command. */
static struct {
	mode_t mask;
	struct rlimit files;
	struct sigaction action[SIGNALS];
} inherited;

/* Bytes that nobody can guess. */
static void
random_bytes(void *out, size_t n)
{
	if (getentropy(out, n) == -1)
		die(1, "cannot get random bytes: %s", strerror(errno));
}

/* ---- the directory ---- */

/* Makes a directory if there is none; true if there was none. */
static bool
store_mkdir(int dir, const char *name)
{
	struct stat st;

	if (mkdirat(dir, name, 0700) == 0)
		return true;
	if (errno == EACCES && dir != AT_FDCWD && fstat(dir, &st) == 0 &&
	    st.st_uid != geteuid())
		die(1, "cannot write to %s: it belongs to uid %u and this is "
		    "uid %u: chown %u it", conf.dir, (unsigned)st.st_uid,
		    (unsigned)geteuid(), (unsigned)geteuid());
	if (errno != EEXIST)
		die(1, "cannot create %s%s%s: %s", dir == AT_FDCWD ? "" :
		    conf.dir, dir == AT_FDCWD ? "" : "/", name,
		    strerror(errno));
	return false;
}

/* How many files a directory has. Of .tmp, uploads of dead servers are removed
 * on the way. */
static unsigned
store_files(const char *name, bool sweep)
{
	int dir = openat(store.root, name, O_RDONLY | O_DIRECTORY |
	    O_NOFOLLOW | O_CLOEXEC);
	DIR *d = dir == -1 ? NULL : fdopendir(dir);
	struct dirent *e;
	unsigned n = 0;

	if (d == NULL)
		die(1, "cannot open %s/%s: %s", conf.dir, name,
		    strerror(errno));
	for (; (e = readdir(d)) != NULL; n++)
		if (sweep && e->d_name[0] != '.')
			tmp_sweep(dir, e->d_name, e->d_name);
	(void)closedir(d);
	return n - 2;			/* without . and .. */
}

/* Learns of the file system: whether it ignores the case of letters, and what
 * several servers could not safely share, as far as it can be seen. */
static void
store_look(void)
{
	struct tmp t = { .fd = -1 };
	char other[sizeof(t.name)];
	struct stat st;
	size_t i;
#ifdef __linux__
	struct statfs fs;

	if (fstatfs(store.root, &fs) == 0)
		switch ((unsigned)fs.f_type) {
		case 0xff534d42: case 0xfe534d42: case 0x517b:	/* SMB */
		case 0x65735546:	/* FUSE: GlusterFS, CephFS, sshfs */
		case 0x6969:		/* NFS */
		case 0x00c36400:	/* CephFS */
			store.remote = true;
			complain("%s is on a network file system: to share it "
			    "see README, SHARING; never share SMB", conf.dir);
		}
#endif
	if (tmp_create(&t, store.root) == -1)
		return;			/* no room: /-/ready will say so */
	for (i = 0; i < sizeof(other); i++)
		other[i] = (char)toupper((unsigned char)t.name[i]);
	names_fold = fstatat(store.root, other, &st, AT_SYMLINK_NOFOLLOW) == 0;
	tmp_remove(&t);
#ifdef FOLD
	names_fold = true;
#endif
}

/* Opens the directory; true if it was made. */
static bool
store_open(void)
{
	bool created = store_mkdir(AT_FDCWD, conf.dir), new = created;
	int parent, fd;

	store.root = open(conf.dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (store.root == -1)
		die(1, "cannot open %s: %s", conf.dir, strerror(errno));
	/* What is empty, git shall not take along when it is full. */
	if (store_files(".", false) == 0 && (fd = file_open(store.root,
	    ".gitignore", O_WRONLY | O_CREAT | O_EXCL, NULL)) != -1) {
		(void)write_all(fd, "*\n", 2);
		close_quietly(fd);
	}
	new |= store_mkdir(store.root, ".tmp");
	new |= store_mkdir(store.root, ".history");
	store.guard = file_open(store.root, ".guard", O_RDWR | O_CREAT,
	    &store.guard_st);
	if (store.guard == -1)
		die(1, "cannot open %s/.guard: %s", conf.dir, strerror(errno));
	/* A new directory's own name must be on the disk as well. */
	parent = openat(store.root, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (new && (dir_sync(store.root) == -1 ||
	    (parent != -1 && dir_sync(parent) == -1)))
		complain("cannot sync %s: %s", conf.dir, strerror(errno));
	close_quietly(parent);
	random_bytes(&store.token, sizeof(store.token));
	if (guard_set(F_WRLCK, guard_server_byte(store.token)) == -1)
		die(1, "%s has no record locks (%s): choose another file "
		    "system", conf.dir, strerror(errno));
	(void)store_files(".tmp", true);
	store_look();
	return created;
}

/* ---- listeners ---- */

/* Reads HOST:PORT, [V6]:PORT, :PORT or unix:PATH. */
static socklen_t
address_read(const char *text, union address *a)
{
	const char *colon = strrchr(text, ':');
	char host[64];
	uint64_t port;

	memset(a, 0, sizeof(*a));
	if (strncmp(text, "unix:", 5) == 0) {
		if (strlen(text + 5) - 1 >= sizeof(a->path.sun_path) - 1)
			die(2, "-l %s: the path is empty or too long", text);
		a->path.sun_family = AF_UNIX;
		span_copy(a->path.sun_path, sizeof(a->path.sun_path),
		    span(text + 5));
		return (socklen_t)sizeof(a->path);
	}
	if (colon == NULL || !whole_number(colon + 1, &port) || port > 65535)
		die(2, "-l %s: want HOST:PORT, [V6]:PORT or unix:PATH, with a "
		    "port up to 65535", text);
	span_copy(host, sizeof(host), (struct span){ text,
	    (size_t)(colon - text) });
	if (inet_pton(AF_INET6, host, &a->six.sin6_addr) == 1)
		die(2, "-l %s: write [%s]:%d", text, host, (int)port);
	if (inet_pton(AF_INET6, text, &a->six.sin6_addr) == 1)
		die(2, "-l %s: write [%s]:PORT", text, text);
	if (host[0] == '[' && cut_suffix(host, "]") &&
	    inet_pton(AF_INET6, host + 1, &a->six.sin6_addr) == 1) {
		a->six.sin6_family = AF_INET6;
		a->six.sin6_port = htons((uint16_t)port);
		return (socklen_t)sizeof(a->six);
	}
	a->four.sin_family = AF_INET;
	a->four.sin_port = htons((uint16_t)port);
	if (inet_pton(AF_INET, strcmp(host, "localhost") == 0 ? "127.0.0.1" :
	    host[0] == '\0' || strcmp(host, "*") == 0 ? "0.0.0.0" : host,
	    &a->four.sin_addr) != 1)
		die(2, "-l %s: that is no address; a name is not looked up",
		    text);
	return (socklen_t)sizeof(a->four);
}

/* A socket that is connected to an address, or -1. */
static int
address_connect(const union address *a, socklen_t len)
{
	int fd = socket(a->any.sa_family, SOCK_STREAM, 0);

	if (fd == -1 || connect(fd, &a->any, len) == 0)
		return fd;
	close_quietly(fd);
	return -1;
}

/* Takes a listening socket into the poll set. */
static void
listener_add(int fd)
{
	struct listener *l = &listeners[set.base - 1];
	socklen_t len = sizeof(union address), size = sizeof(int);
	int on = 0, one = 1, unsent = UNSENT_MAX;
	union address a = { .any = { 0 } };

	if (set.base > LISTENERS_MAX)
		die(2, "too many listeners");
	if (getsockname(fd, &a.any, &len) == -1 ||
	    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) == -1 ||
	    on == 0 || fcntl(fd, F_SETFL, O_NONBLOCK) == -1 ||
	    fcntl(fd, F_SETFD, FD_CLOEXEC) == -1)
		die(1, "descriptor %d is no listener: %s", fd, strerror(errno));
	l->path = a.any.sa_family == AF_UNIX;
	l->local = a.any.sa_family == AF_INET ?
	    ntohl(a.four.sin_addr.s_addr) >> 24 == 127 :
	    !l->path && IN6_IS_ADDR_LOOPBACK(&a.six.sin6_addr);
	(void)snprintf(l->name, sizeof(l->name), l->path ? "unix:%.107s" :
	    "http://", a.path.sun_path);
	if (!l->path)
		address_text(&a, l->name + 7, sizeof(l->name) - 7);
	/* What it accepts inherits these (Linux). The second one keeps slow
	 * readers from filling the kernel's memory, which all share. */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
#ifdef TCP_NOTSENT_LOWAT
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent,
	    sizeof(unsent));
#endif
	if (!l->path && !l->local && users == NULL && !conf.open)
		die(2, "%s can be reached from other machines, and anybody "
		    "could read and write the states. Set TF_HTTP_USERNAME "
		    "and TF_HTTP_PASSWORD, or name users with -u FILE, or let "
		    "everybody in with -n", l->name);
	set.fd[set.base++] = (struct pollfd){ .fd = fd, .events = POLLIN };
}

/* Listens. A socket file that nobody listens on any more is in the way; any
 * other kind of file refuses connections, too, and is not ours to remove. */
static void
listener_open(const char *text)
{
	union address a;
	socklen_t len = address_read(text, &a);
	bool is_path = a.any.sa_family == AF_UNIX;
	int fd = -1, one = 1;
	struct stat st;

	if (is_path && (fd = address_connect(&a, len)) == -1 &&
	    errno == ECONNREFUSED && lstat(a.path.sun_path, &st) == 0 &&
	    S_ISSOCK(st.st_mode))
		(void)unlink(a.path.sun_path);
	close_quietly(fd);
	fd = socket(a.any.sa_family, SOCK_STREAM, 0);
	if (fd == -1 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one,
	    sizeof(one)) == -1 || bind(fd, &a.any, len) == -1 ||
	    listen(fd, SOMAXCONN) == -1)
		die(1, "cannot listen on %s: %s%s", text, strerror(errno),
		    errno != EADDRINUSE ? "" : is_path ? "; something is "
		    "there" : "; another server is there: choose another port "
		    "with -l");
	listener_add(fd);
}

/* Sockets that systemd holds for us, sd_listen_fds(3), or those of -l. The
 * umask is the user's own here: it says who may connect to a unix socket. */
static void
listeners_open(void)
{
	const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");
	int given = pid != NULL && n != NULL && conf.command == NULL &&
	    atol(pid) == (long)getpid() ? atoi(n) : 0, i;

	if (given < 0)
		die(2, "LISTEN_FDS=%s is no number of sockets", n);
	(void)unsetenv("LISTEN_PID");
	(void)unsetenv("LISTEN_FDS");
	(void)umask(inherited.mask);
	for (i = 0; i < given; i++)
		listener_add(3 + i);
	for (i = 0; given == 0 && i < (int)conf.listeners; i++)
		listener_open(conf.listen[i]);
	if (set.base == 1)
		listener_open(conf.command != NULL ? "127.0.0.1:0" :
		    "127.0.0.1:8080");
	(void)umask(077);
}

/* ---- limits and the sandbox ---- */

/* As many descriptors as the system gives: half of them for connections, the
 * rest for threads, which have a handful each. */
static void
limits_set(void)
{
	struct rlimit files;
	rlim_t half;

	if (getrlimit(RLIMIT_NOFILE, &files) == -1)
		die(1, "cannot read the limits: %s", strerror(errno));
	inherited.files = files;
	files.rlim_cur = files.rlim_max > SLOTS_MAX * 4 ? SLOTS_MAX * 4 :
	    files.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &files) == -1)
		files = inherited.files;
	if (files.rlim_cur < 48)
		die(1, "48 open files at least: see ulimit -n");
	half = files.rlim_cur / 2;
	pool.max = (unsigned)(half / 8 < THREADS_MAX ? half / 8 : THREADS_MAX);
	set.max = (unsigned)(half < SLOTS_MAX ? half : SLOTS_MAX);
}

/*
 * From now on the process reaches its directory and nothing else: no other
 * file, no new TCP socket, no signal to strangers. The users file may be
 * replaced by an editor, so what is allowed is to read the directory it is
 * in: give it one of its own. Landlock's numbers (kernel 5.19) are the same
 * on all machines, and its header is not.
 */
static void
sandbox(void)
{
#if defined(__linux__) && !defined(NO_SANDBOX)
	enum { WRITE = 1 << 1, READ = 1 << 2, READ_DIR = 1 << 3,
	    REMOVE = 1 << 5, MAKE_DIR = 1 << 7, MAKE_REG = 1 << 8,
	    REFER = 1 << 13, TRUNCATE = 1 << 14 };
	struct { uint64_t fs, net, scoped; } all = { 0, 0, 0 };
	struct { uint64_t allowed; int32_t fd; } __attribute__((packed)) rule;
	long abi = syscall(444, NULL, (size_t)0, 1), failed;
	char dir[PATH_MAX], *slash;
	int rules;

	(void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	(void)prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (abi < 2) {			/* 1 forbids all renames we need */
		if (conf.verbose)
			complain("no sandbox: the kernel has no Landlock");
		return;
	}
	all.fs = abi < 3 ? 0x3fff : abi < 5 ? 0x7fff : 0xffff;
	all.net = abi < 4 ? 0 : 3;	/* bind, connect */
	all.scoped = abi < 6 ? 0 : conf.command != NULL ? 1 : 3;
	rules = (int)syscall(444, &all, (size_t)(abi < 4 ? 8 : abi < 6 ? 16 :
	    24), 0);
	rule.fd = store.root;
	rule.allowed = all.fs & (WRITE | READ | READ_DIR | REMOVE | MAKE_DIR |
	    MAKE_REG | REFER | TRUNCATE);
	failed = syscall(445, rules, 1, &rule, 0);
	if (conf.users != NULL && failed == 0) {
		(void)snprintf(dir, sizeof(dir), "%s", conf.users);
		slash = strrchr(dir, '/');
		(void)snprintf(slash == NULL ? dir : slash + 1, 2, ".");
		rule.fd = open(dir, O_PATH | O_CLOEXEC);
		rule.allowed = READ;
		failed = syscall(445, rules, 1, &rule, 0);
		close_quietly(rule.fd);
	}
	if (failed != 0 || syscall(446, rules, 0) == -1)
		die(1, "cannot enter the sandbox: %s", strerror(errno));
	close_quietly(rules);
#elif defined(__OpenBSD__)
	if (unveil(conf.dir, "rwc") == -1 ||
	    (conf.users != NULL && unveil(conf.users, "r") == -1) ||
	    pledge("stdio rpath wpath cpath fattr flock inet unix proc",
	    NULL) == -1)
		die(1, "cannot enter the sandbox: %s", strerror(errno));
#endif
}

/* ---- users ---- */

/* The one user of the environment, or of the wrapper. */
static void
users_single(char *name, const char *secret)
{
	static struct user user = { .right = R_WRITE, .pattern = "*" };
	static struct users single = { &user, 1, 2, NULL };	/* never freed */

	user.name = name;
	sha256(secret, strlen(secret), user.secret);
	users = &single;
}

static void
users_start(void)
{
	static const char *const vars[] = { "TF_HTTP_USERNAME",
	    "TF_HTTP_PASSWORD" };
	char *v[2];
	int i;

	if (conf.users != NULL && (users = users_read(conf.users)) == NULL)
		exit(1);
	if (conf.users != NULL || conf.command != NULL)
		return;			/* the wrapper makes its own */
	for (i = 0; i < 2; i++)
		if ((v[i] = getenv(vars[i])) != NULL && has_control(v[i]))
			die(2, "%s has a control character in it, perhaps a "
			    "newline at its end", vars[i]);
		else if (v[i] != NULL && *v[i] == '\0')
			v[i] = NULL;
	if ((v[0] == NULL) != (v[1] == NULL))
		die(2, "%s is set and %s is not: set both, or none",
		    vars[v[0] == NULL], vars[v[0] != NULL]);
	if (v[0] == NULL)
		return;
	if (strchr(v[0], ':') != NULL || strlen(v[0]) > 63)
		die(2, "TF_HTTP_USERNAME has a colon, or more than 63 bytes: "
		    "no client could show it");
	users_single(v[0], v[1]);
}

/* SIGHUP: a file that is no good leaves the users as they were. */
static void
users_again(void)
{
	struct users *new = users_read(conf.users), *old = users;

	if (new == NULL) {
		complain("the users stay as they were");
		return;
	}
	(void)pthread_mutex_lock(&told.mutex);
	buf_str(&told.log, "statesrv: read the users again\n");
	(void)pthread_mutex_unlock(&told.mutex);
	users = new;
	users_drop(old);
}

/* ---- the wrapper ---- */

/* The command's side of the fork: it finds everything as we found it, and a
 * backend of its own in its environment. */
static void
command_exec(const char *url, const char *secret)
{
	size_t i;

#ifdef __linux__
	(void)prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
#endif
	(void)umask(inherited.mask);
	(void)setrlimit(RLIMIT_NOFILE, &inherited.files);
	for (i = 0; i < SIGNALS; i++)
		(void)sigaction(signals[i], &inherited.action[i], NULL);
	(void)setenv("TF_HTTP_ADDRESS", url, 1);
	(void)setenv("TF_HTTP_LOCK_ADDRESS", url, 1);
	(void)setenv("TF_HTTP_UNLOCK_ADDRESS", url, 1);
	(void)setenv("TF_HTTP_USERNAME", "statesrv", 1);
	(void)setenv("TF_HTTP_PASSWORD", secret, 1);
	(void)unsetenv("TF_HTTP_UPDATE_METHOD");
	(void)unsetenv("TF_HTTP_LOCK_METHOD");
	(void)unsetenv("TF_HTTP_UNLOCK_METHOD");
	(void)execvp(conf.command[0], conf.command);
	i = errno == ENOENT ? 127 : 126;
	complain("cannot run %s: %s", conf.command[0], strerror(errno));
	_exit((int)i);
}

static void
command_start(void)
{
	static char name[] = "statesrv";
	unsigned char bytes[16];
	char secret[33];
	struct buf url = { 0 };

	random_bytes(bytes, sizeof(bytes));
	hex(bytes, sizeof(bytes), secret);
	users_single(name, secret);
	buf_fmt(&url, "%s/", listeners[0].name);
	buf_url(&url, conf.command_name);
	loop.shares_terminal = isatty(STDIN_FILENO) == 1 &&
	    tcgetpgrp(STDIN_FILENO) == getpgrp();
	if (url.failed || (loop.child = fork()) == -1)
		die(1, "cannot fork: %s", strerror(errno));
	/* Both of us do this, for who knows which one runs first. */
	if (!loop.shares_terminal)
		(void)setpgid(loop.child, loop.child);
	if (loop.child == 0)
		command_exec(url.data, secret);
	/* What the terminal sends, it gets from that; else, from us. */
	if (loop.shares_terminal) {
		(void)signal(SIGINT, SIG_IGN);
		(void)signal(SIGQUIT, SIG_IGN);
	}
	buf_free(&url);
}

/* Names the lock that the command left behind, with what releases it. */
static void
command_farewell(void)
{
	struct buf b = { 0 };
	struct place p;
	struct lock l;

	if (place_open(conf.command_name, D_OPEN, &p) == -1)
		return;
	if (lock_read(&p, &l) == 0 && lock_is(&l, told.locked)) {
		buf_shell(&b, "", conf.program);
		buf_shell(&b, " -d ", conf.dir);
		buf_shell(&b, " ", conf.command_name);
		buf_shell(&b, " terraform force-unlock -force ", l.id);
		complain("%s is still locked by '%s' (%s). If nothing runs any "
		    "more, release it with", conf.command_name, l.who,
		    *l.operation != '\0' ? l.operation : "?");
		(void)fprintf(stderr, "\t%s\n", b.data);
		buf_free(&b);
	}
	free(l.raw);
	dir_leave(p.dir);
}

/* ---- signals ---- */

static void
on_signal(int sig)
{
	int saved = errno;

	loop_wake((char)sig);
	errno = saved;
}

static void
signals_set(void)
{
	struct sigaction act = { .sa_flags = SA_RESTART }, *was;
	size_t i;

	if (pipe(loop.wake) == -1)
		die(1, "cannot make a pipe: %s", strerror(errno));
	for (i = 0; i < 2; i++) {
		(void)fcntl(loop.wake[i], F_SETFL, O_NONBLOCK);
		(void)fcntl(loop.wake[i], F_SETFD, FD_CLOEXEC);
	}
	set.fd[0] = (struct pollfd){ .fd = loop.wake[0], .events = POLLIN };
	set.base = 1;
	(void)sigemptyset(&act.sa_mask);
	for (i = 0; i < SIGNALS; i++) {
		was = &inherited.action[i];
		act.sa_handler = signals[i] == SIGPIPE ? SIG_IGN : on_signal;
		(void)sigaction(signals[i], &act, was);
		if ((signals[i] == SIGQUIT && conf.command == NULL) ||
		    (signals[i] == SIGHUP && conf.users == NULL &&
		    was->sa_handler == SIG_IGN))	/* nohup */
			(void)sigaction(signals[i], was, NULL);
	}
}

/* ---- the loop ---- */

/* Stops listening, and closes the connections that ask for nothing. */
static void
loop_stop(void)
{
	struct conn *c, *next;
	unsigned i;

	(void)pthread_mutex_lock(&conn_mutex);
	pool.stop = loop.now + STOP_MS;
	(void)pthread_mutex_unlock(&conn_mutex);
	for (i = 1; i < set.base; i++)
		(void)close(set.fd[i].fd);
	set.base = 1;
	for (c = set.list.first; c != NULL; c = next) {
		next = c->next;
		conn_drive(c);
	}
}

/* The wrapper passes signals on to its command, once a second: timeout(1)
 * signals its child, and then the child's group; and a second TERM makes
 * terraform drop everything. */
static void
loop_signal(int sig)
{
	static int64_t passed;
	int status;

	if (sig == SIGCHLD) {
		if (loop.child == 0 ||
		    waitpid(loop.child, &status, WNOHANG) != loop.child)
			return;
		loop.child = 0;
		loop.status = WIFEXITED(status) ? WEXITSTATUS(status) :
		    128 + WTERMSIG(status);
		loop_stop();
	} else if (loop.child > 0) {
		if (passed != 0 && loop.now - passed < 1000)
			return;
		passed = loop.now;
		(void)kill(loop.shares_terminal ? loop.child : -loop.child,
		    sig);
	} else if (sig == SIGHUP && conf.users != NULL)
		users_again();
	else if (pool.stop != 0)
		_exit(1);
	else
		loop_stop();
}

/* What signals came, and which connections the threads give back. */
static void
loop_woken(void)
{
	struct conn *c, *next;
	char bytes[64];
	ssize_t n = read(loop.wake[0], bytes, sizeof(bytes)), i;

	for (i = 0; i < n; i++)
		if (bytes[i] != 0)
			loop_signal(bytes[i]);
	(void)pthread_mutex_lock(&conn_mutex);
	c = pool.back.first;
	pool.back = (struct list){ 0 };
	(void)pthread_mutex_unlock(&conn_mutex);
	for (; c != NULL; c = next) {
		next = c->next;
		c->active = loop.now;
		list_add(&set.list, c);
		conn_drive(c);
	}
}

/*
 * One turn: waits for news, then serves everyone who is ready once. With few
 * connections, or when none is busy, all are polled; else the busy ones are,
 * and all of them now and then, so seldom that it costs a few percent.
 */
static void
loop_turn(void)
{
	static struct conn *at[1 + LISTENERS_MAX + SLOTS_MAX];
	static int64_t next_all;
	int64_t busy = loop.now - 4 * HOT_MS, wait = HOT_MS;
	bool waiting = pool_relieve(), idle = set.list.n <= FLAT ||
	    set.list.last->active < busy;
	bool all = idle || loop.now >= next_all;
	unsigned n = set.base, i;
	struct conn *c, *prev;

	if (all) {
		next_all = loop.now + HOT_MS + set.list.n / 250;
		wait = !idle ? 0 : pool.stop != 0 ? pool.stop - loop.now :
		    INT_MAX;
	}
	if (wait > 50 && (waiting || loop.now < loop.rest))
		wait = 50;
	for (c = set.list.last; c != NULL && (all || c->active >= busy);
	    c = prev) {
		prev = c->prev;
		if (c->deadline <= loop.now) {
			conn_late(c);
			wait = 0;	/* it may have a new one */
			continue;
		}
		if (wait > c->deadline - loop.now)
			wait = c->deadline - loop.now;
		set.fd[n] = (struct pollfd){ .fd = c->fd, .events = POLLIN };
		at[n] = c;
		/* Who waits to be denied may hang up, which poll would tell
		 * for ever. */
		n += c->state != C_DENY;
	}
	for (i = 1; i < set.base; i++)
		set.fd[i].events = loop.now < loop.rest ? 0 : POLLIN;
	if (poll(set.fd, n, (int)log_flush(wait)) < 1)
		n = 0;
	loop.now = clock_ms();
	for (i = set.base; i < n; i++)
		if (set.fd[i].revents != 0) {
			at[i]->active = loop.now;
			list_remove(&set.list, at[i]);
			list_add(&set.list, at[i]);
			conn_drive(at[i]);
		}
	if (n > 0 && set.fd[0].revents != 0)
		loop_woken();
	for (i = 1; i < set.base && n > 0; i++)
		if (set.fd[i].revents != 0)
			conn_accept(i);
}

/* ---- -c ---- */

/* Asks a running server whether it is ready; the exit status. */
static int
check(const char *text)
{
	static const char ask[] = "GET /-/ready HTTP/1.1\r\nHost: localhost"
	    "\r\nConnection: close\r\n\r\n";
	struct timeval patience = { 5, 0 };
	union address a;
	socklen_t len = address_read(text, &a);
	int fd = address_connect(&a, len);
	char answer[13] = "";

	if (fd == -1 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience,
	    sizeof(patience)) == -1 ||
	    write_all(fd, ask, sizeof(ask) - 1) == -1 ||
	    recv(fd, answer, 12, MSG_WAITALL) == -1)
		die(1, "%s does not answer: %s", text, strerror(errno));
	close_quietly(fd);
	if (strcmp(answer, "HTTP/1.1 200") != 0)
		die(1, "%s is not ready", text);
	return 0;
}

/* ==== main =============================================================== */

static const char usage_text[] =
"usage: statesrv [options]                  start the server\n"
"       statesrv [options] NAME COMMAND...  run COMMAND with a server of its\n"
"                                           own, as the backend of state NAME\n"
"\n  -b HOURS  let a LOCK replace a lock older than HOURS (default: never)\n"
"  -c        ask the server at the first -l whether it is ready: exit 0 or 1\n"
"  -d DIR    directory of the states (default: %s)\n"
"  -h        show this help (--help too)\n"
"  -k N      keep N earlier versions of each state (default: %u)\n"
"  -l ADDR   listen on HOST:PORT, [IPV6]:PORT or unix:PATH (default:\n"
"            127.0.0.1:8080); may be given more than once; port 0 picks one\n"
"  -m MIB    refuse a state larger than MIB (default: %lld)\n"
"  -n        allow a public address without users, and any Host: anyone can\n"
"            read and write\n"
"  -s        strict: refuse a state with a lower serial or another lineage\n"
"  -u FILE   users, one a line: name secret permission [pattern...]\n"
"            secret: as it is, or sha256:HEX; permission: read, plan or write\n"
"  -v        show heads and bodies on stderr, the states' secrets included\n"
"  -V        show the version (--version too)\n"
"  -x        believe X-Forwarded-For: only behind a front\n\n"
"Without -u, TF_HTTP_USERNAME and TF_HTTP_PASSWORD make one user who may do\n"
"everything. Without users, a loopback address lets everyone in.\n\n"
"  statesrv                               serve ./states on this machine\n"
"  statesrv demo terraform apply          run terraform (init too) with it\n"
"  statesrv -l unix:/run/s.sock -u users  serve a team, behind TLS\n";

/* Reads an option's number, or ends the program. */
static unsigned
number(int option, unsigned min, unsigned max)
{
	uint64_t v;

	if (!whole_number(optarg, &v) || v < min || v > max)
		die(2, "-%c %s: want a number from %u to %u", option, optarg,
		    min, max);
	return (unsigned)v;
}

static void
option(int c)
{
	union address address;

	switch (c) {
	case 'b': conf.break_hours = number(c, 1, 1000000); break;
	case 'c': conf.check = true; break;
	case 'd': conf.dir = optarg; break;
	case 'k': conf.keep = number(c, 0, 1000000); break;
	case 'l':
		if (conf.listeners == 16)
			die(2, "-l can be given 16 times at most");
		(void)address_read(optarg, &address);
		conf.listen[conf.listeners++] = optarg;
		break;
	case 'm': conf.body_max = (int64_t)number(c, 1, 1 << 20) << 20; break;
	case 'n': conf.open = true; break;
	case 's': conf.strict = true; break;
	case 'u': conf.users = optarg; break;
	case 'v': conf.verbose = true; break;
	case 'V': (void)puts("statesrv " VERSION); exit(0);
	case 'x': conf.fronted = true; break;
	default:
		(void)fprintf(c == 'h' ? stdout : stderr, usage_text, conf.dir,
		    conf.keep, (long long)(conf.body_max >> 20));
		exit(c == 'h' ? 0 : 2);
	}
}

static void
options(int argc, char **argv)
{
	static const char *const tools[] = { "terraform", "tofu",
	    "terragrunt" };
	const char *wrong;
	int c;

	/* To getopt, --help is the option "-" with the argument "help". */
	while ((c = getopt(argc, argv, "+b:cd:hk:l:m:nsu:vVx-:")) != -1) {
		if (c == '-' && (c = strcmp(optarg, "help") == 0 ? 'h' :
		    strcmp(optarg, "version") == 0 ? 'V' : '?') == '?')
			complain("invalid option: --%s", optarg);
		option(c);
	}
	if (optind == argc)
		return;
	conf.command_name = argv[optind];
	conf.command = argv + optind + 1;
	for (c = 0; c < 3; c++)
		if (strcmp(conf.command_name, tools[c]) == 0)
			die(2, "the state's name comes first: statesrv NAME %s "
			    "init", tools[c]);
	if (optind + 1 == argc)
		die(2, "%s: a state's name is followed by a COMMAND; see -h",
		    conf.command_name);
	if ((wrong = name_wrong(conf.command_name)) != NULL)
		die(2, "%s: %s", conf.command_name, wrong);
	if (conf.listeners > 0 || conf.users != NULL || conf.check)
		die(2, "-c, -l and -u do not go with a COMMAND, which has a "
		    "server of its own");
}

/* Says where we are, on stdout; the wrapper's stdout is not ours. Temporary
 * files of dead servers, outside .tmp, are swept on the way. */
static void
greet(bool created)
{
	struct walk w = { .sweep = true, .deleted = true };
	char *path = realpath(conf.dir, NULL), how[32] = "created";
	const char *dir = path != NULL ? path : conf.dir;
	struct stat st;
	unsigned i;
	int fd;

	if (path != NULL)
		scrub(path);
	loop.log_blocks = fstat(STDOUT_FILENO, &st) == 0 &&
	    !S_ISREG(st.st_mode);
	if (conf.command != NULL) {
		fd = name_file(conf.command_name, STATE, NULL);
		if (fd == -1 && errno == ENOENT)
			complain("no state %s in %s yet", conf.command_name,
			    dir);
		close_quietly(fd);
	}
	if (walk_names(&w) == -1)
		complain("cannot list the states: %s", strerror(errno));
	if (!created)
		(void)snprintf(how, sizeof(how), "%llu state%s",
		    (unsigned long long)w.states, w.states == 1 ? "" : "s");
	for (i = 1; i < set.base && conf.command == NULL; i++)
		(void)printf("statesrv: %s (%s) on %s\n", dir, how,
		    listeners[i - 1].name);
	(void)fflush(stdout);
	names_free(&w.names);
	free(path);
}

int
main(int argc, char **argv)
{
	const struct rlimit none = { 0, 0 };
	bool created;
	int fd;

	do				/* or our files would become stdout */
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	close_quietly(fd);
	inherited.mask = umask(077);
	conf.program = argv[0];
	options(argc, argv);
	if (conf.check)
		return check(conf.listeners > 0 ? conf.listen[0] :
		    "127.0.0.1:8080");
#ifdef __GLIBC__
	(void)mallopt(M_ARENA_MAX, 1);	/* an arena a thread is a waste */
	(void)mallopt(M_TRIM_THRESHOLD, 4 << 20);
	(void)mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
	limits_set();
	signals_set();
	users_start();
	created = store_open();
	listeners_open();
	greet(created);
	if (conf.command != NULL)
		command_start();
	if (conf.verbose)
		complain("-v: heads and bodies will be shown, and the secrets "
		    "in the states with them");
	(void)setrlimit(RLIMIT_CORE, &none);	/* it would hold secrets */
	sandbox();
	loop.now = clock_ms();
	/* Threads may still free and prune when the last answer is out. */
	while (pool.stop == 0 || (told.connections > 0 &&
	    loop.now < pool.stop))
		loop_turn();
	(void)log_flush(-1);
	if (conf.command != NULL)
		command_farewell();
	users_drop(users);
	return loop.status;
}
