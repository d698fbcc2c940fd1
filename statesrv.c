/*
 * statesrv - keeps the states of Terraform and OpenTofu in plain files.
 *
 *	cc -O2 -pthread -o statesrv statesrv.c && ./statesrv
 *
 * serves ./states on 127.0.0.1:8080; README says the rest.
 *
 * On disk:
 *
 *	states/demo.tfstate	the state, byte for byte as the client sent it
 *	states/demo.lock	present = locked; the lock info, byte for byte
 *	states/demo.log		what happened to it, a JSON line an event
 *	states/team/prod.tfstate	a name with slashes is a path
 *	states/.history/demo/	earlier versions, hard links, newest N kept
 *	states/.tmp/		uploads in flight, swept at start
 *	states/.guard		its bytes are locked by servers that share it
 *
 * Promises, each tested under its number by test.sh:
 *
 *	1. What was answered 200 is on disk: data, name and lock.
 *	2. A reader gets one whole version; 404 never means "could not look".
 *	3. A lock has one holder, across processes and machines.
 *	4. A write lands only under the lock's own ID, or with none when
 *	   nothing is locked, checked in the same breath as it lands.
 *	5. The bytes are kept; a large body never lives in memory whole.
 *	6. Repeating a request whose answer was lost does no harm.
 *	7. Nothing is thrown away in silence: there is the history.
 *	8. Bad input is told what was wrong and stalls nobody else.
 *	9. Secrets stay in: files 0600, loopback, nothing secret in a log.
 *
 * What it does not do: TLS (put a front before it), encryption at rest
 * (OpenTofu encrypts before it sends), workspaces (no client speaks them
 * over http), replication (share the directory).
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
 *	locks
 *	users
 *	jobs
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

#include <sys/types.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>

#include <assert.h>
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
#ifndef MSG_MORE
#define MSG_MORE 0			/* a hint, where it is known */
#endif

/* ==== limits and config ==================================================
 *
 * Every number of the program, most of them to be overridden with
 * -DNAME=VALUE (the tests do, so that edges are near), and the options, which
 * main fills in and all others only read.
 *
 * What one connection may cost: 250 bytes while it is idle; HEAD_MAX and a
 * struct request while it speaks; SPOOL more while it uploads; and of the
 * kernel's memory UNSENT_MAX, for an answer that nobody reads. Descriptors:
 * its own, and one while a large state is sent or received.
 */
#define VERSION "1.0"
#ifndef HEAD_MAX
#define HEAD_MAX 16384		/* bytes: request line and fields */
#endif
#ifndef TARGET_MAX
#define TARGET_MAX 8192		/* bytes: request target */
#endif
#ifndef FIELDS_MAX
#define FIELDS_MAX 100		/* header fields, and trailer fields */
#endif
#define BLANKS_MAX 8		/* empty lines before a request line */
#ifndef CHUNK_LINE_MAX
#define CHUNK_LINE_MAX 1024	/* bytes: a chunk's size and extensions */
#endif
#define SEGMENTS_MAX 8		/* of a name */
#define SEGMENT_MAX 200		/* bytes; with .tfstate below NAME_MAX */
#define NAME_LEN_MAX 1000	/* bytes: a name */
#define ID_MAX 256		/* bytes: a lock's ID */
#define USERS_MAX 1048576	/* bytes: the users file */
#ifndef LOCK_INFO_MAX
#define LOCK_INFO_MAX 65536	/* bytes: the body of LOCK and UNLOCK */
#endif
#ifndef JSON_DEPTH
#define JSON_DEPTH 1000		/* nested arrays and objects */
#endif
#define ROWS_MAX 5000		/* of an HTML page */
#ifndef HASH_MAX
#define HASH_MAX 16384		/* bytes: up to this MD5 is logged, unasked */
#endif
#define META_MAX 65536		/* bytes searched for serial and lineage */
#define LIST_MAX 16777216	/* bytes: resources are counted up to this */
#ifndef BODY_MEM
#define BODY_MEM 65536		/* bytes: a larger state is asked for first */
#endif
#ifndef SPOOL
#define SPOOL 262144		/* bytes: it is written in pieces of this */
#endif
#ifndef CACHE_FILE
#define CACHE_FILE 65536	/* bytes: a state kept in memory, */
#endif
#ifndef CACHE_SLOTS
#define CACHE_SLOTS 1024	/* one of so many, */
#endif
#ifndef CACHE_BYTES
#define CACHE_BYTES 16777216	/* bytes: all of them */
#endif
#ifndef SLOTS_MAX
#define SLOTS_MAX 16384		/* connections */
#endif
#define LISTENERS_MAX 32
#ifndef THREADS_MAX
#define THREADS_MAX 64		/* commits side by side */
#endif
#ifndef THREAD_STACK
#define THREAD_STACK 262144	/* bytes, as far as touched */
#endif
#ifndef SEND_MAX
#define SEND_MAX 1048576	/* bytes to one client in one turn */
#endif
#ifndef UNSENT_MAX
#define UNSENT_MAX 131072	/* bytes of an answer that wait in the kernel */
#endif
#ifndef FLAT
#define FLAT 64			/* so many connections are simply all polled */
#endif
#define TURN_MAX 32		/* requests of one client in one turn */
#define HOT_MS 5		/* milliseconds: one silent so long is idle */
#define LOG_MS 10		/* log lines may wait so long for others */
#ifndef IDLE_MS
#define IDLE_MS 120000		/* Go's client gives up its own after 90 s */
#endif
#ifndef HEAD_MS
#define HEAD_MS 20000		/* for the head, from its first byte on */
#endif
#ifndef BODY_MS
#define BODY_MS 20000		/* for the body, and for taking the answer, */
#endif
#define RATE 1024		/* and a second for every RATE bytes */
#ifndef DRAIN_MS
#define DRAIN_MS 10000		/* for a client to finish speaking, or reading */
#endif
#define STALL_MS 5000		/* a silent one makes room after this */
#define DENY_MS 1000		/* a wrong secret is answered after this */
#define STOP_MS 10000		/* for what is in progress at the end */
/*
 * Bytes kept free for locks and unlocks, which need a block each, and for
 * the log lines that tell of refusals: a thousand locks' worth. Of a very
 * small file system a sixteenth will do.
 */
#ifndef RESERVE
#define RESERVE 4194304
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
 * Bytes, and the request, which travels: the loop parses it, a commit thread
 * works on it as a job, the loop answers it. At any time one of the two owns
 * it, and whoever owns it may write to it.
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

enum method {
	M_GET, M_HEAD, M_POST, M_PUT, M_DELETE, M_LOCK, M_UNLOCK, M_OPTIONS,
	M_COUNT
};

static const char method_names[M_COUNT][8] = {
	"GET", "HEAD", "POST", "PUT", "DELETE", "LOCK", "UNLOCK", "OPTIONS"
};

enum field {
	F_HOST, F_LENGTH, F_CODING, F_CONNECTION, F_EXPECT, F_AUTHORIZATION,
	F_MD5, F_ACCEPT, F_ORIGIN, F_FORWARDED, F_RANGE, F_MATCH, F_NONE_MATCH,
	F_UNMODIFIED, F_COUNT
};

/* What a parsed head says; the spans point into the connection's buffer. */
struct head {
	enum method method;
	int minor;			/* of HTTP/1.x: 0 or 1 */
	struct span target;		/* path and query, or "*" */
	struct span host;
	struct span field[F_COUNT];	/* their values; ptr NULL: none */
	const char *why;		/* it was refused */
	int64_t length;			/* Content-Length, or -1 */
	bool chunked;
	bool keep;			/* the client would stay connected */
};

/* Where a chunked body is, between two bytes of it; all zero but for room is
 * its beginning. */
struct chunks {
	enum { CH_SIZE, CH_BLANK, CH_NAME, CH_EXT, CH_QUOTE, CH_ESC,
	    CH_SIZE_LF, CH_DATA, CH_CR, CH_LF, CH_TRAILER, CH_FIELD, CH_VALUE,
	    CH_TRAILER_LF, CH_END_LF, CH_DONE } state;
	uint64_t left;			/* of the chunk */
	uint64_t room;			/* what the body may still have */
	unsigned digits, line, fields, trailer;
};

struct md5 {
	uint32_t state[4];
	uint64_t len;
	unsigned char block[64];
};

/* Keys that someone wants to know the values of; matched as Go's clients
 * do, whatever their case. */
enum word {
	W_NONE, W_ID, W_OPERATION, W_INFO, W_WHO, W_CREATED, W_SERIAL,
	W_LINEAGE, W_TERRAFORM_VERSION, W_RESOURCES, W_MODULE, W_MODE, W_TYPE,
	W_NAME, W_INSTANCES, W_INDEX_KEY, W_COUNT
};

#define JSON_WATCH 5		/* resources, [, {, instances, [, { */
#define JSON_TEXT 512		/* bytes of a value that are kept */

struct json {
	void (*on)(struct json *, char);	/* see json_tell; may be NULL */
	void *to;			/* whose business it is */
	const char *why;		/* it is not JSON, or NULL */
	uint64_t at;			/* bytes taken so far */
	int state;
	unsigned depth;
	bool key;			/* the string is a key */
	bool stop;			/* set by on(): has seen enough */
	unsigned char low, high, more;	/* of a UTF-8 sequence */
	unsigned hex, digits;		/* of a \u escape */
	unsigned surrogate;		/* its first half, or 0 */
	const char *literal;		/* what is left of true, false, null */
	enum word word[JSON_WATCH + 1];	/* the last key at each depth */
	size_t len;			/* of text, and more if it was cut */
	char text[JSON_TEXT];		/* the string or number being read */
	unsigned char nest[JSON_DEPTH / 8 + 1];	/* a bit: is an array */
};

/* What is told about a state without understanding it. */
struct meta {
	bool known;			/* serial was found */
	uint64_t serial;
	char lineage[128];
	char version[32];		/* terraform_version */
	unsigned resources;
};

struct lock {
	bool held;
	bool foreign;			/* made by hand: not lock info */
	bool torso;			/* left by one who died creating it */
	time_t since;			/* the file's mtime */
	char id[ID_MAX + 1];
	char operation[64], info[256], who[128], created[64];
	char *raw;			/* the file's bytes, malloced */
	size_t len;
};

/* What a URL names. */
enum kind {
	K_STAR, K_STATE, K_LOCK, K_ROOT, K_VERSIONS, K_VERSION, K_CHANGES,
	K_LOG, K_HEALTHY, K_READY, K_METRICS
};

enum form { TEXT, JSON, HTML };

enum right { R_NONE, R_READ, R_PLAN, R_WRITE };

#define TMP 48				/* bytes: a name in .tmp */
#define VERSION_ID 48			/* bytes: an earlier version's ID */

/* An upload: check and write go together, piece by piece. */
struct upload {
	struct md5 md5;
	struct json json;
	struct meta meta;
	bool hash;			/* MD5 is wanted */
	int fd;				/* the temporary file, or -1 */
	char tmp[TMP];			/* its name in .tmp */
	int64_t size;
	unsigned char digest[16];
};

struct after;

struct request {
	struct request *next;		/* in whichever queue it stands */
	int (*run)(struct request *);	/* what a commit thread does */
	struct after *after;		/* and leaves behind, meanwhile */
	struct conn *conn;		/* NULL: nobody waits for it */
	struct lane *lane;		/* those of its name, or NULL */
	struct users *users;		/* as they were when it came */
	int64_t start;			/* microseconds, monotonic */

	/* what was asked */
	enum method method;
	enum kind kind;
	enum right right;		/* on that name */
	enum form form;			/* of pages, by Accept */
	bool keep, http10;
	bool fronted;			/* came by a unix socket */
	bool tls;			/* or rather a TLS hello */
	bool has_id, has_md5, force;
	int64_t length;			/* of the body, or -1: chunked */
	char name[NAME_LEN_MAX + 1];	/* of the state, or the path */
	char version[VERSION_ID];	/* the ID of an earlier one */
	char query[64];			/* ?q= of the listing */
	char id[ID_MAX + 1];		/* lock ID: from ?ID= or the body */
	char host[128];			/* as the client calls us */
	char client[64];		/* its address */
	char user[64];
	unsigned char secret[32];	/* SHA-256 of what it showed */
	unsigned char md5[16];

	/* the body, or the piece of it that is at hand */
	char *body;
	size_t len, cap;
	struct upload *up;

	/* what the commit found and did, for the log */
	const char *event;
	struct meta old;
	struct lock lock;		/* the lock that stood in the way */
	struct lock asked;		/* the lock info that was sent */

	/* the answer */
	int status;
	time_t date;
	void (*tell)(struct request *);	/* the commit thread may call it */
	size_t told;			/* bytes of the head, by that */
	const char *type;
	struct span data;		/* text, or what is sent at once */
	struct buf text;
	int file;			/* or -1 */
	off_t off, left;		/* of the file */
	int64_t sent;			/* bytes of the answer's body */
	char why[200];			/* of a refusal */
};

/* ==== small helpers ======================================================
 *
 * Complain and die in the err(3) manner, bytes that grow, clocks.
 */

/* Says what is wrong on stderr; the server goes on, even if nobody reads. */
__attribute__((format(printf, 1, 2)))
static void
complain(const char *fmt, ...)
{
	struct pollfd out = { .fd = STDERR_FILENO, .events = POLLOUT };
	char line[2048];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) != 0)
		(void)fprintf(stderr, "statesrv: %s\n", line);
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

/* Copies as a string, cut to what fits. */
static void
span_copy(char *to, size_t size, struct span s)
{
	size_t n = s.len < size ? s.len : size - 1;

	if (n > 0)
		memcpy(to, s.ptr, n);
	to[n] = '\0';
}

/* Takes the next element of a comma-separated list off its front. */
static bool
span_next(struct span *list, struct span *item)
{
	const char *end, *p = list->ptr, *q;

	if (list->len == 0)
		return false;
	end = p + list->len;
	for (q = p; q < end && *q != ','; q++)
		continue;
	*list = (struct span){ q < end ? q + 1 : q, 0 };
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
	size_t cap = b->cap ? b->cap : 256;
	char *data;

	if (b->failed || n > SIZE_MAX / 4 - b->len) {
		b->failed = true;
		return false;
	}
	while (cap < b->len + n + 1)
		cap *= 2;
	if (cap == b->cap)
		return true;
	if ((data = realloc(b->data, cap)) == NULL) {
		b->failed = true;
		return false;
	}
	b->data = data;
	b->cap = cap;
	return true;
}

/* The list with room for one more than its n elements: it doubles whenever n
 * is a power of two. NULL, and the list is as it was, if memory ran out. */
static void *
grow(void *list, size_t n, size_t size)
{
	return (n & (n - 1)) != 0 ? list :
	    realloc(list, (n > 0 ? 2 * n : 1) * size);
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

/* Appends a number, in digits at least; what printf does, and many times as
 * fast: every answer and every log line has several. */
static void
buf_num(struct buf *b, int64_t n, int digits)
{
	char text[24], *p = text + sizeof(text);
	uint64_t v = n < 0 ? 0 - (uint64_t)n : (uint64_t)n;

	do {
		*--p = (char)('0' + v % 10);
		v /= 10;
	} while (--digits > 0 || v > 0);
	if (n < 0)
		*--p = '-';
	buf_add(b, p, (size_t)(text + sizeof(text) - p));
}

static void
buf_free(struct buf *b)
{
	free(b->data);
	*b = (struct buf){ 0 };
}

/* Length of the UTF-8 sequence that s begins with, or 0 (RFC 3629). */
static size_t
utf8_length(const char *s)
{
	const unsigned char *p = (const unsigned char *)s;
	unsigned char low = *p == 0xe0 ? 0xa0 : *p == 0xf0 ? 0x90 : 0x80;
	unsigned char high = *p == 0xed ? 0x9f : *p == 0xf4 ? 0x8f : 0xbf;
	size_t n = *p < 0x80 ? 1 : *p < 0xc2 ? 0 : *p < 0xe0 ? 2 :
	    *p < 0xf0 ? 3 : *p < 0xf5 ? 4 : 0, i;

	for (i = 1; i < n; i++, low = 0x80, high = 0xbf)
		if (p[i] < low || p[i] > high)
			return 0;
	return n;
}

/* Appends s as a JSON string: U+FFFD for what is not UTF-8 or was cut, and
 * nothing that a terminal would obey. */
static void
buf_json(struct buf *b, const char *s)
{
	size_t n;

	buf_str(b, "\"");
	for (; *s != '\0'; s += n > 0 ? n : 1) {
		n = utf8_length(s);
		if (n == 0)
			buf_str(b, "\\ufffd");
		else if (*s == '"' || *s == '\\')
			buf_fmt(b, "\\%c", *s);
		else if ((unsigned char)*s < 0x20 || *s == 0x7f)
			buf_fmt(b, "\\u%04x", (unsigned)*s);
		else if (n == 2 && (unsigned char)*s == 0xc2 &&
		    (unsigned char)s[1] < 0xa0)
			buf_fmt(b, "\\u%04x", (unsigned char)s[1]);
		else
			buf_add(b, s, n);
	}
	buf_str(b, "\"");
}

/* Appends s so that it means itself in HTML, in attributes too. */
static void
buf_html(struct buf *b, const char *s)
{
	for (; *s != '\0'; s++) {
		if (strchr("<>&\"'", *s) != NULL || (unsigned char)*s < 0x20)
			buf_fmt(b, "&#%u;", (unsigned char)*s);
		else
			buf_add(b, s, 1);
	}
}

/* Appends a name as part of a URL. */
static void
buf_url(struct buf *b, const char *s)
{
	static const char plain[] = "abcdefghijklmnopqrstuvwxyz"
	    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";

	for (; *s != '\0'; s++) {
		if (strchr(plain, *s) != NULL)
			buf_add(b, s, 1);
		else
			buf_fmt(b, "%%%02X", (unsigned char)*s);
	}
}

/* Appends a word as a shell wants it. */
static void
buf_shell(struct buf *b, const char *s)
{
	buf_str(b, "'");
	for (; *s != '\0'; s++)
		buf_add(b, *s == '\'' ? "'\\''" : s, *s == '\'' ? 4 : 1);
	buf_str(b, "'");
}

/* Appends fmt with strings in it: %s as it is, %j for JSON, %h for HTML, %u
 * for a URL, %q for a shell. */
static void
put_strings(struct buf *b, const char *fmt, const char *const *s)
{
	size_t n;

	for (; *fmt != '\0'; fmt += n) {
		n = *fmt == '%' ? 2 : strcspn(fmt, "%");
		if (*fmt != '%')
			buf_add(b, fmt, n);
		else
			(fmt[1] == 'j' ? buf_json : fmt[1] == 'h' ? buf_html :
			    fmt[1] == 'u' ? buf_url : fmt[1] == 'q' ?
			    buf_shell : buf_str)(b, *s++);
	}
}
#define put(b, fmt, ...) \
	put_strings(b, fmt, (const char *const[]){ __VA_ARGS__ })

static int64_t
clock_us(clockid_t id)
{
	struct timespec t;

	(void)clock_gettime(id, &t);	/* cannot fail for these clocks */
	return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
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

/* "3 days" and the like: how long ago. */
static void
age_text(char out[32], int64_t seconds)
{
	static const struct { int64_t s; const char *unit; } units[] = {
		{ 86400, "day" }, { 3600, "hour" }, { 60, "minute" },
		{ 1, "second" }
	};
	size_t i = 0;
	int64_t n;

	if (seconds < 0)
		seconds = 0;
	while (i < 3 && seconds < units[i].s)
		i++;
	n = seconds / units[i].s;
	(void)snprintf(out, 32, "%lld %s%s", (long long)n, units[i].unit,
	    n == 1 ? "" : "s");
}

static int
hex_value(unsigned char c)
{
	return c >= '0' && c <= '9' ? c - '0' :
	    (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* Writes all of it, whatever the interruptions; -1 with errno. */
static int
write_all(int fd, const void *data, size_t len)
{
	const char *p = data;
	ssize_t n;

	while (len > 0) {
		if ((n = write(fd, p, len)) == -1) {
			if (errno == EINTR)
				continue;
			return -1;
		}
		p += n;
		len -= (size_t)n;
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
 * for secrets and names, base64 (RFC 4648) for both. Pure functions.
 */
static const struct md5 md5_start = {
	{ 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476 }, 0, { 0 }
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
 * its first half is ready before the chain arrives.
 */
#define F1(x, y, z) ((z) ^ ((x) & ((y) ^ (z))))
#define F2(x, y, z) (((x) & (z)) + ((y) & ~(z)))
#define F3(x, y, z) ((x) ^ ((y) ^ (z)))
#define F4(x, y, z) ((y) ^ ((x) | ~(z)))
#define STEP(f, a, b, c, d, k, s, t) \
	(a) += load32(p + 4 * (k)) + (t); \
	(a) += f(b, c, d); \
	(a) = rotl(a, s) + (b)
#define FOUR(f, k0, k1, k2, k3, s0, s1, s2, s3, t0, t1, t2, t3) \
	STEP(f, a, b, c, d, k0, s0, t0); STEP(f, d, a, b, c, k1, s1, t1); \
	STEP(f, c, d, a, b, k2, s2, t2); STEP(f, b, c, d, a, k3, s3, t3)

static void
md5_blocks(uint32_t state[4], const unsigned char *p, size_t blocks)
{
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3];

	for (; blocks > 0; blocks--, p += 64) {
		uint32_t a0 = a, b0 = b, c0 = c, d0 = d;

		FOUR(F1, 0, 1, 2, 3, 7, 12, 17, 22,
		    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee);
		FOUR(F1, 4, 5, 6, 7, 7, 12, 17, 22,
		    0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501);
		FOUR(F1, 8, 9, 10, 11, 7, 12, 17, 22,
		    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be);
		FOUR(F1, 12, 13, 14, 15, 7, 12, 17, 22,
		    0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821);
		FOUR(F2, 1, 6, 11, 0, 5, 9, 14, 20,
		    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa);
		FOUR(F2, 5, 10, 15, 4, 5, 9, 14, 20,
		    0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8);
		FOUR(F2, 9, 14, 3, 8, 5, 9, 14, 20,
		    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed);
		FOUR(F2, 13, 2, 7, 12, 5, 9, 14, 20,
		    0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a);
		FOUR(F3, 5, 8, 11, 14, 4, 11, 16, 23,
		    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c);
		FOUR(F3, 1, 4, 7, 10, 4, 11, 16, 23,
		    0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70);
		FOUR(F3, 13, 0, 3, 6, 4, 11, 16, 23,
		    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05);
		FOUR(F3, 9, 12, 15, 2, 4, 11, 16, 23,
		    0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665);
		FOUR(F4, 0, 7, 14, 5, 6, 10, 15, 21,
		    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039);
		FOUR(F4, 12, 3, 10, 1, 6, 10, 15, 21,
		    0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1);
		FOUR(F4, 8, 15, 6, 13, 6, 10, 15, 21,
		    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1);
		FOUR(F4, 4, 11, 2, 9, 6, 10, 15, 21,
		    0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391);
		a += a0;
		b += b0;
		c += c0;
		d += d0;
	}
	state[0] = a;
	state[1] = b;
	state[2] = c;
	state[3] = d;
}

static void
md5_add(struct md5 *m, const void *data, size_t n)
{
	const unsigned char *p = data;
	size_t have = (size_t)(m->len % 64), take;

	m->len += n;
	if (have > 0) {
		take = n < 64 - have ? n : 64 - have;
		memcpy(m->block + have, p, take);
		if (have + take < 64)
			return;
		md5_blocks(m->state, m->block, 1);
		p += take;
		n -= take;
	}
	md5_blocks(m->state, p, n / 64);
	if (n % 64 > 0)
		memcpy(m->block, p + n / 64 * 64, n % 64);
}

static void
md5_end(struct md5 *m, unsigned char out[16])
{
	static const unsigned char pad[64] = { 0x80 };
	uint64_t bits = m->len * 8;
	unsigned char size[8];
	unsigned i;

	for (i = 0; i < 8; i++)
		size[i] = (unsigned char)(bits >> 8 * i);
	md5_add(m, pad, 1 + (119 - m->len % 64) % 64);
	md5_add(m, size, 8);
	for (i = 0; i < 16; i++)
		out[i] = (unsigned char)(m->state[i / 4] >> i % 4 * 8);
}

static void
sha256_block(uint32_t h[8], const unsigned char *p)
{
	static const uint32_t k[64] = {
		0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b,
		0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
		0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7,
		0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
		0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152,
		0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
		0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
		0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
		0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
		0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
		0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
		0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
		0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
	};
	uint32_t w[64], s[8], x, y;
	int i;

	for (i = 0; i < 16; i++)
		w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
		    (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
	for (; i < 64; i++) {
		x = rotl(w[i - 15], 25) ^ rotl(w[i - 15], 14) ^ w[i - 15] >> 3;
		y = rotl(w[i - 2], 15) ^ rotl(w[i - 2], 13) ^ w[i - 2] >> 10;
		w[i] = w[i - 16] + x + w[i - 7] + y;
	}
	memcpy(s, h, sizeof(s));
	for (i = 0; i < 64; i++) {
		x = s[7] + (rotl(s[4], 26) ^ rotl(s[4], 21) ^ rotl(s[4], 7)) +
		    ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
		y = (rotl(s[0], 30) ^ rotl(s[0], 19) ^ rotl(s[0], 10)) +
		    ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
		memmove(s + 1, s, 7 * sizeof(*s));
		s[4] += x;
		s[0] = x + y;
	}
	for (i = 0; i < 8; i++)
		h[i] += s[i];
}

static void
sha256(const void *data, size_t n, unsigned char out[32])
{
	uint32_t h[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
	    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
	const unsigned char *p = data;
	unsigned char tail[128] = { 0 };
	uint64_t bits = (uint64_t)n * 8;
	size_t i, rest = n % 64, end = rest < 56 ? 64 : 128;

	for (i = 0; i < n / 64; i++)
		sha256_block(h, p + 64 * i);
	if (rest > 0)
		memcpy(tail, p + n - rest, rest);
	tail[rest] = 0x80;
	for (i = 0; i < 8; i++)
		tail[end - 1 - i] = (unsigned char)(bits >> 8 * i);
	for (i = 0; i < end; i += 64)
		sha256_block(h, tail + i);
	for (i = 0; i < 32; i++)
		out[i] = (unsigned char)(h[i / 4] >> (24 - i % 4 * 8));
}

static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* Decodes into at most size bytes; -1 if it is not whole, padded base64. */
static ssize_t
base64_decode(struct span s, void *out, size_t size)
{
	unsigned char *to = out;
	const char *digit;
	uint32_t bits = 0;
	size_t i, n = 0, pad = 0;

	if (s.len % 4 != 0)
		return -1;
	while (pad < 2 && pad < s.len && s.ptr[s.len - 1 - pad] == '=')
		pad++;
	for (i = 0; i < s.len - pad; i++) {
		digit = memchr(base64_digits, s.ptr[i], 64);
		if (digit == NULL)
			return -1;
		bits = bits << 6 | (uint32_t)(digit - base64_digits);
		if (i % 4 == 0)
			continue;
		if (n == size)
			return -1;
		to[n++] = (unsigned char)(bits >> (6 - 2 * (i % 4)));
	}
	/* Bits left over must be zero, or two texts would mean one thing. */
	if (pad > 0 && (bits & (pad == 1 ? 3 : 15)) != 0)
		return -1;
	return (ssize_t)n;
}

static void
base64_encode(const unsigned char *p, size_t n, char *out)
{
	uint32_t bits;
	size_t i;

	for (i = 0; i < n; i += 3) {
		bits = (uint32_t)p[i] << 16 |
		    (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) |
		    (i + 2 < n ? p[i + 2] : 0);
		*out++ = base64_digits[bits >> 18];
		*out++ = base64_digits[bits >> 12 & 63];
		*out++ = i + 1 < n ? base64_digits[bits >> 6 & 63] : '=';
		*out++ = i + 2 < n ? base64_digits[bits & 63] : '=';
	}
	*out = '\0';
}

static void
hex(const unsigned char *p, size_t n, char *out)
{
	static const char digits[] = "0123456789abcdef";

	for (; n > 0; n--, p++) {
		*out++ = digits[*p >> 4];
		*out++ = digits[*p & 15];
	}
	*out = '\0';
}

/* ==== JSON ===============================================================
 *
 * A check that takes the text in pieces of any size and accepts exactly one
 * RFC 8259 object: no recursion, no allocation, one byte at a time but for
 * the insides of strings. What it reads on the way down to JSON_WATCH it
 * tells to on(), so that serials, lock IDs and resources are found without a
 * second pass. It never changes or keeps the text.
 */
enum {
	JS_START, JS_FIRST_KEY, JS_KEY, JS_COLON, JS_VALUE, JS_FIRST_VALUE,
	JS_NEXT, JS_STRING, JS_ESCAPE, JS_HEX, JS_UTF8, JS_MINUS, JS_ZERO,
	JS_INT, JS_POINT, JS_FRACTION, JS_E, JS_E_SIGN, JS_EXPONENT,
	JS_LITERAL, JS_END
};

static const char json_words[W_COUNT][18] = {
	[W_ID] = "id", [W_OPERATION] = "operation", [W_INFO] = "info",
	[W_WHO] = "who", [W_CREATED] = "created", [W_SERIAL] = "serial",
	[W_LINEAGE] = "lineage", [W_TERRAFORM_VERSION] = "terraform_version",
	[W_RESOURCES] = "resources", [W_MODULE] = "module", [W_MODE] = "mode",
	[W_TYPE] = "type", [W_NAME] = "name", [W_INSTANCES] = "instances",
	[W_INDEX_KEY] = "index_key"
};

/* Sets why and returns false: this is not JSON. */
static bool
json_wrong(struct json *j, const char *why)
{
	j->why = why;
	return false;
}

static bool
json_watched(const struct json *j)
{
	return j->on != NULL && j->depth <= JSON_WATCH;
}

static void
json_text(struct json *j, const void *data, size_t n)
{
	size_t room = j->len < JSON_TEXT - 1 ? JSON_TEXT - 1 - j->len : 0;

	if (n < room)
		room = n;
	if (room > 0)
		memcpy(j->text + j->len, data, room);
	j->len += n;
}

/* Appends a code point in UTF-8. */
static void
json_code(struct json *j, unsigned c)
{
	char s[4];
	size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4, i;

	for (i = n - 1; i > 0; i--, c >>= 6)
		s[i] = (char)(0x80 | (c & 0x3f));
	s[0] = (char)(n == 1 ? c : (0xf00u >> n & 0xf0) | c);
	json_text(j, s, n);
}

/*
 * Tells on() of '{' '}' '[' ']', 's' a string, 'n' a number, 'l' another
 * literal, each at the depth that it stands in, the text in j->text. The
 * word of a value is j->word[j->depth], W_NONE in an array.
 */
static void
json_tell(struct json *j, char what)
{
	if (!json_watched(j))
		return;
	j->text[j->len < JSON_TEXT ? j->len : JSON_TEXT - 1] = '\0';
	j->on(j, what);
}

static bool
json_in_array(const struct json *j)
{
	return (j->nest[j->depth / 8] >> j->depth % 8 & 1) != 0;
}

static bool
json_open(struct json *j, unsigned char c)
{
	unsigned bit;

	if (j->depth + 1 >= JSON_DEPTH)
		return json_wrong(j, "is nested too deeply");
	j->len = 0;
	json_tell(j, (char)c);
	j->depth++;
	bit = 1u << j->depth % 8;
	if (c == '[')
		j->nest[j->depth / 8] |= (unsigned char)bit;
	else
		j->nest[j->depth / 8] &= (unsigned char)~bit;
	if (j->depth <= JSON_WATCH)
		j->word[j->depth] = W_NONE;
	j->state = c == '[' ? JS_FIRST_VALUE : JS_FIRST_KEY;
	return true;
}

static bool
json_close(struct json *j, unsigned char c)
{
	if (json_in_array(j) != (c == ']'))
		return json_wrong(j, "closes what is not open");
	j->depth--;
	j->len = 0;
	json_tell(j, (char)c);
	j->state = j->depth == 0 ? JS_END : JS_NEXT;
	return true;
}

static bool
json_value(struct json *j, unsigned char c)
{
	j->len = 0;
	j->state = JS_LITERAL;
	if (c == '{' || c == '[')
		return json_open(j, c);
	if (c == '"') {
		j->key = false;
		j->state = JS_STRING;
	} else if (c == '-' || (c >= '0' && c <= '9')) {
		j->state = c == '-' ? JS_MINUS : c == '0' ? JS_ZERO : JS_INT;
		json_text(j, &c, 1);
	} else if (c == 't')
		j->literal = "rue";
	else if (c == 'f')
		j->literal = "alse";
	else if (c == 'n')
		j->literal = "ull";
	else
		return json_wrong(j, "has no value where one is due");
	return true;
}

/* The string is complete: a key, or a value. */
static void
json_string_end(struct json *j)
{
	enum word w = W_NONE;

	if (!j->key) {
		json_tell(j, 's');
		j->state = JS_NEXT;
		return;
	}
	j->state = JS_COLON;
	if (!json_watched(j))
		return;
	for (w = 1; w < W_COUNT; w++)
		if (span_is((struct span){ j->text, j->len < JSON_TEXT ?
		    j->len : 0 }, json_words[w]))
			break;
	j->word[j->depth] = w == W_COUNT ? W_NONE : w;
}

/* A byte of a string that is not plain ASCII: a quote, an escape, UTF-8. */
static bool
json_string(struct json *j, unsigned char c)
{
	if (c < 0x20)
		return json_wrong(j, "has a control character in a string");
	if (c == '"') {
		json_string_end(j);
		return true;
	}
	if (c == '\\') {
		j->state = JS_ESCAPE;
		return true;
	}
	/* RFC 3629: no overlong forms, no surrogates, nothing past 10FFFF. */
	j->low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
	j->high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
	if (c >= 0xc2 && c <= 0xdf)
		j->more = 1;
	else if (c >= 0xe0 && c <= 0xef)
		j->more = 2;
	else if (c >= 0xf0 && c <= 0xf4)
		j->more = 3;
	else
		return json_wrong(j, "has a string that is not UTF-8");
	j->state = JS_UTF8;
	json_text(j, &c, 1);
	return true;
}

static bool
json_utf8(struct json *j, unsigned char c)
{
	if (c < j->low || c > j->high)
		return json_wrong(j, "has a string that is not UTF-8");
	j->low = 0x80;
	j->high = 0xbf;
	json_text(j, &c, 1);
	if (--j->more == 0)
		j->state = JS_STRING;
	return true;
}

static bool
json_escape(struct json *j, unsigned char c)
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	const char *p = c == '\0' ? NULL : strchr(from, c);

	if (c == 'u') {
		j->state = JS_HEX;
		j->hex = j->digits = 0;
		return true;
	}
	if (p == NULL)
		return json_wrong(j, "has an unknown escape in a string");
	json_text(j, to + (p - from), 1);
	j->state = JS_STRING;
	return true;
}

/* RFC 8259 lets half a surrogate pair pass; as text it is U+FFFD. */
static bool
json_hex(struct json *j, unsigned char c)
{
	int v = hex_value(c);

	if (v == -1)
		return json_wrong(j, "has a bad \\u escape in a string");
	j->hex = j->hex << 4 | (unsigned)v;
	if (++j->digits < 4)
		return true;
	j->state = JS_STRING;
	if (j->hex >= 0xdc00 && j->hex <= 0xdfff && j->surrogate != 0) {
		j->len -= 3;		/* the U+FFFD that held its place */
		json_code(j, 0x10000 + ((j->surrogate & 0x3ff) << 10) +
		    (j->hex & 0x3ff));
		j->surrogate = 0;
		return true;
	}
	j->surrogate = j->hex >= 0xd800 && j->hex <= 0xdbff ? j->hex : 0;
	json_code(j, (j->hex & 0xf800) == 0xd800 ? 0xfffd : j->hex);
	return true;
}

/* A byte of a number; what ends it is looked at again as what follows. */
static bool
json_number(struct json *j, unsigned char c)
{
	bool digit = c >= '0' && c <= '9';
	int s = j->state, to = -1;

	if (digit && s != JS_ZERO)
		to = s == JS_MINUS ? (c == '0' ? JS_ZERO : JS_INT) :
		    s == JS_POINT ? JS_FRACTION :
		    s == JS_E || s == JS_E_SIGN ? JS_EXPONENT : s;
	else if (c == '.' && (s == JS_ZERO || s == JS_INT))
		to = JS_POINT;
	else if ((c | 32) == 'e' &&
	    (s == JS_ZERO || s == JS_INT || s == JS_FRACTION))
		to = JS_E;
	else if ((c == '+' || c == '-') && s == JS_E)
		to = JS_E_SIGN;
	if (to != -1) {
		j->state = to;
		json_text(j, &c, 1);
		return true;
	}
	if (digit || s == JS_MINUS || s == JS_POINT || s == JS_E ||
	    s == JS_E_SIGN)
		return json_wrong(j, "has a malformed number");
	json_tell(j, 'n');
	j->state = JS_NEXT;
	return true;
}

/* A byte between values: structure. White space has been skipped. */
static bool
json_between(struct json *j, unsigned char c)
{
	switch (j->state) {
	case JS_START:
		return c == '{' ? json_open(j, c) :
		    json_wrong(j, "does not begin with {");
	case JS_FIRST_KEY:
	case JS_KEY:
		if (c == '}' && j->state == JS_FIRST_KEY)
			return json_close(j, c);
		if (c != '"')
			return json_wrong(j, "has no key where one is due");
		j->key = true;
		j->len = 0;
		j->state = JS_STRING;
		return true;
	case JS_COLON:
		j->state = JS_VALUE;
		return c == ':' || json_wrong(j, "has no colon after a key");
	case JS_FIRST_VALUE:
		return c == ']' ? json_close(j, c) : json_value(j, c);
	case JS_VALUE:
		return json_value(j, c);
	case JS_NEXT:
		if (c == '}' || c == ']')
			return json_close(j, c);
		j->state = json_in_array(j) ? JS_VALUE : JS_KEY;
		return c == ',' || json_wrong(j, "has no comma or end where "
		    "one is due");
	default:
		return json_wrong(j, "goes on after its end");
	}
}

static bool
json_byte(struct json *j, unsigned char c)
{
	switch (j->state) {
	case JS_STRING:
		j->surrogate = c == '\\' ? j->surrogate : 0;
		return json_string(j, c);
	case JS_ESCAPE:
		j->surrogate = c == 'u' ? j->surrogate : 0;
		return json_escape(j, c);
	case JS_HEX:
		return json_hex(j, c);
	case JS_UTF8:
		return json_utf8(j, c);
	case JS_LITERAL:
		if (c != (unsigned char)*j->literal)
			return json_wrong(j, "has no value where one is due");
		if (*++j->literal == '\0') {
			json_tell(j, 'l');
			j->state = JS_NEXT;
		}
		return true;
	case JS_MINUS: case JS_ZERO: case JS_INT: case JS_POINT:
	case JS_FRACTION: case JS_E: case JS_E_SIGN: case JS_EXPONENT:
		if (!json_number(j, c))
			return false;
		if (j->state != JS_NEXT)
			return true;
		break;
	default:
		break;
	}
	if (c == ' ' || c == '\n' || c == '\t' || c == '\r')
		return true;
	return json_between(j, c);
}

/* The length of the run of plain bytes that a string goes on with: eight at
 * a time, by the old trick that finds a byte below n or above 127. */
static size_t
json_plain(const unsigned char *p, size_t n)
{
	const uint64_t ones = UINT64_MAX / 255, high = ones << 7;
	size_t i = 0;
	uint64_t v, quote, slash;

	for (; i + 8 <= n; i += 8) {
		memcpy(&v, p + i, 8);
		quote = v ^ ones * '"';
		slash = v ^ ones * '\\';
		if (((v | (v - ones * 0x20) | (quote - ones) |
		    (slash - ones)) & high) != 0)
			break;
	}
	while (i < n && p[i] >= 0x20 && p[i] < 0x80 && p[i] != '"' &&
	    p[i] != '\\')
		i++;
	return i;
}

/* Takes the next piece; false if the text is wrong, at byte j->at. */
static bool
json_feed(struct json *j, const void *data, size_t n)
{
	const unsigned char *p = data;
	size_t i = 0, run;

	while (i < n && !j->stop) {
		if (j->state == JS_STRING) {
			run = json_plain(p + i, n - i);
			if (run > 0) {
				j->surrogate = 0;
				if (json_watched(j))
					json_text(j, p + i, run);
				j->at += run;
				i += run;
				continue;
			}
		}
		if (p[i] == ' ' && j->state < JS_STRING)
			;		/* indentation, much of any state */
		else if (!json_byte(j, p[i]))
			return false;
		j->at++;
		i++;
	}
	return true;
}

/* True if the text was one whole object; else why is set. */
static bool
json_done(struct json *j)
{
	if (j->why == NULL && j->state != JS_END)
		j->why = j->at == 0 ? "is empty" : "ends too early";
	return j->why == NULL;
}

static void
json_keep(char *to, size_t size, const struct json *j)
{
	span_copy(to, size, (struct span){ j->text,
	    j->len < JSON_TEXT ? j->len : JSON_TEXT - 1 });
}

/* Keeps a text for show: without what a terminal would obey, which are the
 * control characters of ASCII and those of Latin-1, C2 80 to C2 9F. */
static void
json_show(char *to, size_t size, const struct json *j)
{
	json_keep(to, size, j);
	for (; *to != '\0'; to++) {
		if ((unsigned char)*to == 0xc2 && (unsigned char)to[1] < 0xa0 &&
		    to[1] != '\0')
			*to++ = ' ';
		else if ((unsigned char)*to >= 0x20 && *to != 0x7f)
			continue;
		*to = ' ';
	}
}

/* Fills a struct meta from a state. */
static void
meta_on(struct json *j, char what)
{
	struct meta *m = j->to;
	enum word w = j->word[j->depth];
	char *end;

	if (j->depth == 2 && what == '{' && j->word[1] == W_RESOURCES &&
	    json_in_array(j))
		m->resources++;
	if (j->depth != 1)
		return;
	if (w == W_SERIAL && what == 'n') {
		errno = 0;
		m->serial = strtoull(j->text, &end, 10);
		m->known = *end == '\0' && errno == 0 && *j->text != '-';
		m->serial = m->known ? m->serial : 0;
	} else if (w == W_LINEAGE && what == 's')
		json_show(m->lineage, sizeof(m->lineage), j);
	else if (w == W_TERRAFORM_VERSION && what == 's')
		json_show(m->version, sizeof(m->version), j);
}

/* As meta_on, but has seen enough with the serial and the lineage. */
static void
meta_on_brief(struct json *j, char what)
{
	struct meta *m = j->to;

	meta_on(j, what);
	j->stop = m->known && m->lineage[0] != '\0';
}

/* Fills a struct lock from lock info. An ID that is too long is none, and
 * so is one with a NUL, which would end it early. */
static void
lock_on(struct json *j, char what)
{
	struct lock *l = j->to;

	if (j->depth != 1 || what != 's')
		return;
	if (j->word[1] == W_ID) {
		l->id[0] = '\0';
		if (j->len <= ID_MAX && memchr(j->text, 0, j->len) == NULL)
			json_keep(l->id, sizeof(l->id), j);
	} else if (j->word[1] == W_OPERATION)
		json_show(l->operation, sizeof(l->operation), j);
	else if (j->word[1] == W_INFO)
		json_show(l->info, sizeof(l->info), j);
	else if (j->word[1] == W_WHO)
		json_show(l->who, sizeof(l->who), j);
	else if (j->word[1] == W_CREATED)
		json_show(l->created, sizeof(l->created), j);
}

/* ==== HTTP parser ========================================================
 *
 * Bytes in, spans out; no I/O, no allocation. RFC 9112 as a server, read
 * strictly: whatever two parsers could understand differently is refused,
 * and so is every bare CR or LF. A status returned negative ends the
 * connection, for nobody knows where the next request would begin.
 */

/* Sets of ASCII characters, a bit for each. */
static const uint64_t token_chars[2] = {	/* RFC 9110, 5.6.2: tchar */
	0x03ff6cfa00000000, 0x57ffffffc7fffffe
};
static const uint64_t host_chars[2] = {		/* RFC 3986: reg-name */
	0x2bff7ff200000000, 0x47fffffe87fffffe
};

static bool
in_set(const uint64_t set[2], unsigned char c)
{
	return c < 128 && (set[c / 64] >> c % 64 & 1) != 0;
}

static bool
is_token(unsigned char c)
{
	return in_set(token_chars, c);
}

static bool
is_value(unsigned char c)		/* RFC 9110, 5.5: no CTL but HTAB */
{
	return c == '\t' || (c >= 0x20 && c != 0x7f);
}

/* RFC 9110, 4.2: host [":" port]; the host a name, IPv4, or [IPv6]. */
static bool
http_host_ok(struct span h)
{
	const char *p = h.ptr, *end = p + h.len, *close;
	char text[INET6_ADDRSTRLEN + 1];
	struct in6_addr six;
	unsigned port = 0;

	if (h.len == 0)
		return false;
	if (*p == '[') {
		if ((close = memchr(p, ']', h.len)) == NULL)
			return false;
		span_copy(text, sizeof(text), (struct span){ p + 1,
		    (size_t)(close - p - 1) });
		if (inet_pton(AF_INET6, text, &six) != 1)
			return false;
		p = close + 1;
	} else {
		for (; p < end && in_set(host_chars, (unsigned char)*p); p++)
			if (*p == '%' && (end - p < 3 ||
			    hex_value((unsigned char)p[1]) == -1 ||
			    hex_value((unsigned char)p[2]) == -1))
				return false;
		if (p == h.ptr)
			return false;
	}
	if (p == end)
		return true;
	if (*p != ':' || end - p > 6)
		return false;
	for (p++; p < end; p++) {
		if (*p < '0' || *p > '9')
			return false;
		port = port * 10 + (unsigned)(*p - '0');
	}
	return port <= 65535;
}

/* A head that is refused: why, and minus the status. */
static int
http_bad(struct head *h, int status, const char *why)
{
	h->why = why;
	return -status;
}

/* Content-Length: digits and nothing else. */
static int
http_length(struct head *h, struct span v)
{
	for (h->length = v.len > 0 ? 0 : -1; v.len > 0; v.ptr++, v.len--) {
		if (*v.ptr < '0' || *v.ptr > '9')
			return http_bad(h, 400, "Content-Length is not a "
			    "number");
		if (h->length < INT64_MAX / 100)	/* else 413 follows */
			h->length = h->length * 10 + (*v.ptr - '0');
	}
	return h->length != -1 ? 0 :
	    http_bad(h, 400, "Content-Length is empty");
}

/* RFC 9112, 6.1 and 6.3: chunked, once and last; we know no other coding. */
static int
http_coding(struct head *h, struct span v)
{
	struct span item = { NULL, 0 };
	bool empty = v.len > 0 && v.ptr[v.len - 1] == ',';
	unsigned items = 0, chunked = 0;

	for (; span_next(&v, &item); items++) {
		chunked += span_is(item, "chunked");
		empty |= item.len == 0;
	}
	if (h->minor == 0 || h->length != -1)
		return http_bad(h, 400, "Transfer-Encoding goes neither with "
		    "Content-Length nor with HTTP/1.0");
	if (chunked != 1 || !span_is(item, "chunked") || empty)
		return http_bad(h, 400, "Transfer-Encoding does not end in "
		    "chunked");
	h->chunked = true;
	return items == 1 ? 0 : http_bad(h, 501, "the only transfer coding "
	    "known here is chunked");
}

/* Is word in a comma-separated list? Parameters after ";" do not count. */
static bool
http_lists(struct span list, const char *word)
{
	struct span item;
	const char *semi;

	while (span_next(&list, &item)) {
		if ((semi = memchr(item.ptr, ';', item.len)) != NULL)
			item.len = (size_t)(semi - item.ptr);
		if (span_is(item, word))
			return true;
	}
	return false;
}

/* The fields that mean something here. What may come twice is a list, and
 * then the last line counts, for a front adds its own at the end. */
static const struct {
	char name[20];
	unsigned char len;
	bool twice;
} http_fields[F_COUNT] = {
#define FIELD(name, twice) { name, sizeof(name) - 1, twice }
	[F_HOST] = FIELD("host", false),
	[F_LENGTH] = FIELD("content-length", false),
	[F_CODING] = FIELD("transfer-encoding", false),
	[F_CONNECTION] = FIELD("connection", true),
	[F_EXPECT] = FIELD("expect", false),
	[F_AUTHORIZATION] = FIELD("authorization", false),
	[F_MD5] = FIELD("content-md5", false),
	[F_ACCEPT] = FIELD("accept", true),
	[F_ORIGIN] = FIELD("origin", true),
	[F_FORWARDED] = FIELD("x-forwarded-for", true),
	[F_RANGE] = FIELD("content-range", true),
	[F_MATCH] = FIELD("if-match", true),
	[F_NONE_MATCH] = FIELD("if-none-match", true),
	[F_UNMODIFIED] = FIELD("if-unmodified-since", true),
};

/* One field line, without its CRLF. */
static int
http_field(struct head *h, const char *p, const char *end)
{
	struct span name = { p, 0 }, value;
	size_t i;

	while (p < end && is_token((unsigned char)*p))
		p++;
	name.len = (size_t)(p - name.ptr);
	/* obs-fold and "Name :" end here. */
	if (name.len == 0 || p == end || *p != ':')
		return http_bad(h, 400, "a field line does not begin with a "
		    "name and a colon");
	for (p++; p < end && (*p == ' ' || *p == '\t'); p++)
		continue;
	while (end > p && (end[-1] == ' ' || end[-1] == '\t'))
		end--;
	value = (struct span){ p, (size_t)(end - p) };
	for (; p < end; p++)
		if (!is_value((unsigned char)*p))
			return http_bad(h, 400, "a field's value has a "
			    "control character");
	for (i = 0; i < F_COUNT; i++)
		if (name.len == http_fields[i].len &&
		    span_is(name, http_fields[i].name))
			break;
	if (i == F_COUNT)
		return 0;
	if (h->field[i].ptr != NULL && !http_fields[i].twice)
		return http_bad(h, 400, "a field that may stand once stands "
		    "twice");
	h->field[i] = value;
	/* "close" must be seen in whichever line it stands. */
	if (i == F_CONNECTION && http_lists(value, "close"))
		h->keep = false;
	return 0;
}

/* Cuts scheme and authority off an absolute-form target (RFC 9112, 3.2.2):
 * its host is the one that counts. */
static int
http_absolute(struct head *h)
{
	const char *p = h->target.ptr, *end = p + h->target.len, *host;
	size_t scheme = h->target.len > 8 &&
	    strncasecmp(p, "https://", 8) == 0 ? 8 : 7;

	if (h->target.len <= scheme || (scheme == 7 &&
	    strncasecmp(p, "http://", 7) != 0))
		return http_bad(h, 400, "the target is no path and no URL");
	host = p += scheme;
	while (p < end && *p != '/' && *p != '?')
		p++;
	h->host = (struct span){ host, (size_t)(p - host) };
	if (!http_host_ok(h->host))
		return http_bad(h, 400, "the target's host is malformed");
	h->target = (struct span){ p, (size_t)(end - p) };
	return 0;
}

/* method SP target SP HTTP/1.x, with nothing else between. */
static int
http_request_line(struct head *h, const char *p, const char *end)
{
	const char *word = p;
	size_t m;
	int status = 0;

	while (p < end && is_token((unsigned char)*p))
		p++;
	if (p == word || p == end || *p != ' ')
		return http_bad(h, 400, "the request does not begin with a "
		    "method");
	for (m = 0; m < M_COUNT; m++)
		if (strlen(method_names[m]) == (size_t)(p - word) &&
		    memcmp(word, method_names[m], (size_t)(p - word)) == 0)
			break;
	h->method = (enum method)m;
	for (word = ++p; p < end && *p > 0x20 && *p < 0x7f && *p != '#'; p++)
		continue;
	h->target = (struct span){ word, (size_t)(p - word) };
	if (h->target.len == 0 || end - p != 9 ||
	    memcmp(p, " HTTP/", 6) != 0 || p[6] < '0' || p[6] > '9' ||
	    p[7] != '.' || p[8] < '0' || p[8] > '9')
		return http_bad(h, 400, "the request line is not: method, "
		    "target, HTTP/1.1");
	if (p[6] != '1')
		return http_bad(h, 505, "the version is not HTTP/1.x");
	h->minor = p[8] == '0' ? 0 : 1;
	if (h->target.len > TARGET_MAX)
		return http_bad(h, 414, "the target is too long");
	if (m == M_COUNT)
		return http_bad(h, 501, "the method is not known here");
	if (h->target.len == 1 && *word == '*')
		status = m == M_OPTIONS ? 0 :
		    http_bad(h, 400, "only OPTIONS goes with *");
	else if (*word != '/')
		status = http_absolute(h);
	return status;
}

/* The rules that need the whole head: RFC 9112, 3.2, 6; 9110, 10.1.1. */
static int
http_whole(struct head *h)
{
	const struct span *f = h->field;
	int status = 0;

	if (f[F_HOST].ptr == NULL ? h->minor == 1 : !http_host_ok(f[F_HOST]))
		return http_bad(h, 400, "Host is missing or malformed");
	if (h->host.len == 0)		/* else the absolute form's */
		h->host = f[F_HOST];
	if (h->minor == 0)
		h->keep = h->keep &&
		    http_lists(f[F_CONNECTION], "keep-alive");
	if (f[F_LENGTH].ptr != NULL)
		status = http_length(h, f[F_LENGTH]);
	if (status == 0 && f[F_CODING].ptr != NULL)
		status = http_coding(h, f[F_CODING]);
	if (status == 0 && f[F_EXPECT].ptr != NULL && h->minor == 1 &&
	    !span_is(f[F_EXPECT], "100-continue"))
		status = http_bad(h, 417, "only 100-continue can be expected");
	return status;
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
	const char *end = NULL, *p, *line, *lf;
	unsigned fields = 0;
	int status;

	for (p = data + *seen; (lf = memchr(p, '\n',
	    (size_t)(data + len - p))) != NULL; p = lf + 1) {
		if (lf == data || lf[-1] != '\r')
			return http_bad(h, 400, "a line does not end in CR "
			    "LF");
		if (lf - data >= 3 && lf[-2] == '\n') {
			end = lf + 1;
			break;
		}
	}
	*seen = len;
	if (end == NULL && len < HEAD_MAX)
		return 0;
	*h = (struct head){ .method = M_COUNT, .length = -1, .minor = 1,
	    .keep = true };
	if ((lf = memchr(data, '\n', len)) == NULL)
		return http_bad(h, 414, "the request line is too long");
	status = http_request_line(h, data, lf - 1);
	if (status != 0)
		return status;
	if (end == NULL || end - data > HEAD_MAX)
		return http_bad(h, 431, "the head is larger than 16 KiB");
	for (line = lf + 1; line < end - 2; line = lf + 1) {
		lf = memchr(line, '\n', (size_t)(end - line));
		if (++fields > FIELDS_MAX)
			return http_bad(h, 431, "there are more than 100 "
			    "fields");
		if ((status = http_field(h, line, lf - 1)) != 0)
			return status;
	}
	status = http_whole(h);
	return status != 0 ? status : (int)(end - data);
}

/* One byte of a chunk's first line, between its size and its LF. */
static int
chunk_size(struct chunks *c, unsigned char b)
{
	int v;

	if (++c->line > CHUNK_LINE_MAX)
		return -400;
	if (c->state == CH_QUOTE || c->state == CH_ESC) {
		if (!is_value(b))
			return -400;
		c->state = c->state == CH_ESC || (b != '"' && b != '\\') ?
		    CH_QUOTE : b == '"' ? CH_EXT : CH_ESC;
		return 0;
	}
	/* After ";" comes a name: neither "=" nor nothing. */
	if (c->state == CH_NAME && b != ' ' && b != '\t' && !is_token(b))
		return -400;
	if (b == '\r' && c->state != CH_BLANK) {
		c->state = CH_SIZE_LF;
		return c->digits > 0 ? 0 : -400;
	}
	if (c->state == CH_NAME && (b == ' ' || b == '\t'))
		return 0;
	if (c->state == CH_NAME || c->state == CH_EXT) {
		c->state = b == '"' ? CH_QUOTE : b == ';' ? CH_NAME : CH_EXT;
		return is_value(b) ? 0 : -400;
	}
	if (c->state == CH_SIZE && (v = hex_value(b)) != -1) {
		c->left = c->left << 4 | (unsigned)v;
		return ++c->digits <= 15 ? 0 : -413;
	}
	/* RFC 9112, 7.1.1: only ";" goes on, white space before it or not. */
	c->state = b == ';' ? CH_NAME : CH_BLANK;
	return c->digits > 0 && (b == ';' || b == ' ' || b == '\t') ? 0 : -400;
}

/* One byte of the trailer section: fields of the head's form, all dropped. */
static int
chunk_trailer(struct chunks *c, unsigned char b)
{
	if (++c->trailer > HEAD_MAX)
		return -431;
	switch (c->state) {
	case CH_TRAILER:
		if (b == '\r') {
			c->state = CH_END_LF;
			return 0;
		}
		if (++c->fields > FIELDS_MAX)
			return -431;
		c->state = CH_FIELD;
		return is_token(b) ? 0 : -400;
	case CH_FIELD:
		c->state = b == ':' ? CH_VALUE : CH_FIELD;
		return b == ':' || is_token(b) ? 0 : -400;
	case CH_VALUE:
		c->state = b == '\r' ? CH_TRAILER_LF : CH_VALUE;
		return b == '\r' || is_value(b) ? 0 : -400;
	case CH_TRAILER_LF:
		c->state = CH_TRAILER;
		return b == '\n' ? 0 : -400;
	default:
		c->state = CH_DONE;
		return b == '\n' ? 0 : -400;
	}
}

/*
 * Decodes a chunked body: takes from in what it can, appends the data to out
 * until that is full. Sets *used to the bytes taken; returns 0 or minus a
 * status. Whether the body is over, c->state tells: CH_DONE.
 */
static int
chunk_decode(struct chunks *c, struct span in, size_t *used, char *out,
    size_t *len, size_t cap)
{
	int status = 0;
	size_t n, i = 0;

	while (i < in.len && status == 0 && c->state != CH_DONE) {
		unsigned char b = (unsigned char)in.ptr[i];

		switch (c->state) {
		case CH_DATA:
			n = in.len - i < cap - *len ? in.len - i : cap - *len;
			n = n < c->left ? n : (size_t)c->left;
			if (n == 0)
				goto full;
			memcpy(out + *len, in.ptr + i, n);
			*len += n;
			i += n;
			if ((c->left -= n) == 0)
				c->state = CH_CR;
			continue;
		case CH_CR:
			c->state = CH_LF;
			status = b == '\r' ? 0 : -400;
			break;
		case CH_LF:
			c->state = CH_SIZE;
			c->digits = c->line = 0;
			status = b == '\n' ? 0 : -400;
			break;
		case CH_SIZE_LF:
			c->state = c->left > 0 ? CH_DATA : CH_TRAILER;
			status = b != '\n' ? -400 :
			    c->left > c->room ? -413 : 0;
			c->room -= c->left;
			break;
		case CH_SIZE: case CH_BLANK: case CH_NAME: case CH_EXT:
		case CH_QUOTE: case CH_ESC:
			status = chunk_size(c, b);
			break;
		default:
			status = chunk_trailer(c, b);
		}
		i++;
	}
full:
	*used = i;
	return status;
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

/* YYYYMMDDTHHMMSS.mmmZ-SERIAL, the ID of an earlier version, then end. */
static bool
is_version(const char *s, const char *end)
{
	static const char form[] = "ddddddddTdddddd.dddZ-";
	size_t i;

	for (i = 0; i < sizeof(form) - 1; i++)
		if (form[i] == 'd' ? s[i] < '0' || s[i] > '9' :
		    s[i] != form[i])
			return false;
	i = strspn(s + sizeof(form) - 1, "0123456789");
	return i >= 1 && i <= 20 &&
	    strcmp(s + sizeof(form) - 1 + i, end) == 0;
}

/* Rules 3 to 6, for the len bytes of one segment; NULL, or what is wrong. */
static const char *
segment_wrong(const char *s, size_t len)
{
	if (len == 0)
		return "a state name has no empty segment";
	if (len > SEGMENT_MAX)
		return "a segment of a state name has 200 bytes at most";
	if (*s == '.' || *s == '-')
		return "no segment of a state name begins with '.' or '-'";
	if (ends_in(s, len, ".lock") || ends_in(s, len, ".log") ||
	    ends_in(s, len, ".tfstate"))
		return "no segment of a state name ends in .lock, .log or "
		    ".tfstate";
	return NULL;
}

/*
 * NULL if name may be a state's, else what is wrong with it:
 * 1. at most 1,000 bytes; 2. UTF-8 without control characters, without
 * backslash; 3. 1 to 8 segments of 1 to 200 bytes; 4. none begins with '.'
 * or '-': so there is no "..", nothing hidden, nothing like an option;
 * 5. none ends like our own files, so no state's file is another's lock;
 * 6. the last is not "lock", which is the lock's URL;
 * 7. the first of several is not the original demo's terraform_state or
 * terraform_lock, whose URLs mean another state.
 */
static const char *
name_wrong(const char *name)
{
	const char *p, *segment = name, *wrong;
	unsigned segments = 0;
	size_t n;

	if (strlen(name) > NAME_LEN_MAX)
		return "a state name has 1000 bytes at most";
	for (p = name;; p += n) {
		if (*p == '/' || *p == '\0') {
			wrong = segment_wrong(segment, (size_t)(p - segment));
			if (wrong != NULL)
				return wrong;
			if (++segments > SEGMENTS_MAX)
				return "a state name has 8 segments at most";
			if (*p == '\0')
				break;
			segment = p + 1;
		}
		n = utf8_length(p);
		if (n == 0 || (unsigned char)*p < 0x20 || *p == 0x7f ||
		    *p == '\\' || (n == 2 && (unsigned char)*p == 0xc2 &&
		    (unsigned char)p[1] < 0xa0))
			return "a state name is UTF-8 without control "
			    "characters or backslashes";
	}
	if (strncmp(name, "terraform_state/", 16) == 0 ||
	    strncmp(name, "terraform_lock/", 15) == 0)
		return "no state name begins with terraform_state/ or "
		    "terraform_lock/";
	return strcmp(segment, "lock") == 0 ?
	    "no state is called lock: that is a lock's URL" : NULL;
}

/* Undoes percent-encoding once. The length, or -1 for a bad escape, a NUL,
 * or what does not fit. */
static ssize_t
url_decode(struct span s, char *out, size_t size, bool query)
{
	size_t i, n = 0;
	int high, low;

	for (i = 0; i < s.len; i++, n++) {
		if (n + 1 >= size)
			return -1;
		out[n] = s.ptr[i];
		if (query && out[n] == '+')
			out[n] = ' ';
		if (s.ptr[i] != '%')
			continue;
		if (s.len - i < 3 ||
		    (high = hex_value((unsigned char)s.ptr[i + 1])) == -1 ||
		    (low = hex_value((unsigned char)s.ptr[i + 2])) == -1 ||
		    (high | low) == 0)
			return -1;
		out[n] = (char)(high << 4 | low);
		i += 2;
	}
	out[n] = '\0';
	return (ssize_t)n;
}

/* If s begins with prefix, removes that and returns true. */
static bool
cut_prefix(char *s, const char *prefix)
{
	size_t n = strlen(prefix);

	if (strncmp(s, prefix, n) != 0)
		return false;
	memmove(s, s + n, strlen(s + n) + 1);
	return true;
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

/* What /-/... is; the name, if it has one, is left in path. False: nothing. */
static bool
page_kind(char *path, struct request *r)
{
	static const struct { const char *path; enum kind kind; } pages[] = {
		{ "healthy", K_HEALTHY }, { "ready", K_READY },
		{ "metrics", K_METRICS }, { "versions/", K_VERSIONS },
		{ "changes/", K_CHANGES }, { "log/", K_LOG }
	};
	size_t i = 0, n = sizeof(pages) / sizeof(*pages);
	char *last;

	while (i < n && !cut_prefix(path, pages[i].path))
		i++;
	if (i == n || (pages[i].kind >= K_HEALTHY && *path != '\0'))
		return false;
	r->kind = pages[i].kind;
	(void)cut_suffix(path, ".tfstate");
	last = strrchr(path, '/');
	if (r->kind != K_LOG && last != NULL && is_version(last + 1, "")) {
		(void)snprintf(r->version, sizeof(r->version), "%s", last + 1);
		*last = '\0';
		if (r->kind == K_VERSIONS)
			r->kind = K_VERSION;
		(void)cut_suffix(path, ".tfstate");
	}
	return true;
}

/*
 * Fills kind, name and version from a target's path. NULL, or what is wrong
 * with a name; *found is false if there is no such page.
 */
static const char *
name_route(struct span target, struct request *r, bool *found)
{
	char path[NAME_LEN_MAX + 64];

	*found = true;
	if (url_decode(target, path, sizeof(path), false) == -1) {
		if (target.len >= 3 * sizeof(path) ||
		    memchr(target.ptr, '%', target.len) == NULL)
			return "a state name has 1000 bytes at most";
		return "the URL has a bad escape, a NUL, or is too long";
	}
	span_copy(r->name, sizeof(r->name), span(path));
	r->kind = strcmp(path, "/") == 0 ? K_ROOT :
	    strcmp(path, "*") == 0 ? K_STAR : K_STATE;
	if (r->kind != K_STATE)
		return NULL;
	if (cut_prefix(path, "/-/")) {
		*found = page_kind(path, r);
		if (!*found || r->kind >= K_HEALTHY)
			return NULL;
	} else if (cut_prefix(path, "/terraform_lock/"))
		r->kind = K_LOCK;
	else if (!cut_prefix(path, "/terraform_state/"))
		(void)cut_prefix(path, "/");
	if (r->kind == K_STATE && strrchr(path, '/') != NULL &&
	    cut_suffix(path, "/lock"))
		r->kind = K_LOCK;
	if (r->kind == K_STATE || r->kind == K_LOCK)
		(void)cut_suffix(path, ".tfstate");
	if (name_wrong(path) != NULL)
		return name_wrong(path);
	span_copy(r->name, sizeof(r->name), span(path));
	return NULL;
}

/* Takes what we know from a target's query: ID, and q. */
static int
name_query(struct span query, struct request *r)
{
	const char *end = query.ptr + query.len, *amp, *eq;
	struct span key, value;

	for (; query.ptr < end; query.ptr = amp + 1) {
		amp = memchr(query.ptr, '&', (size_t)(end - query.ptr));
		if (amp == NULL)
			amp = end;
		eq = memchr(query.ptr, '=', (size_t)(amp - query.ptr));
		key = (struct span){ query.ptr,
		    (size_t)((eq != NULL ? eq : amp) - query.ptr) };
		value = (struct span){ eq != NULL ? eq + 1 : amp,
		    eq != NULL ? (size_t)(amp - eq - 1) : 0 };
		if (key.len == 1 && *key.ptr == 'q')
			(void)url_decode(value, r->query, sizeof(r->query),
			    true);
		if (key.len != 2 || memcmp(key.ptr, "ID", 2) != 0)
			continue;
		/* Two IDs, or one cut short, could open what is locked. */
		if (r->has_id || url_decode(value, r->id, sizeof(r->id),
		    true) == -1)
			return -1;
		r->has_id = true;
	}
	return 0;
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
	int guard;			/* .guard, for the jobs in lanes */
	bool remote;			/* on a network file system */
	uint64_t token;			/* ours, in the names of uploads */
	pthread_mutex_t mutex;		/* for what follows */
	uint64_t uploads;
	bool low;			/* below the reserve */
} store = {
	.root = -1,
	.guard = -1,
	.mutex = PTHREAD_MUTEX_INITIALIZER,
};

struct place {
	int dir;			/* -1: there is none, nor any file */
	const char *leaf;		/* points into the name */
};

static void
dir_leave(int dir)
{
	if (dir != store.root)
		close_quietly(dir);
}

/* Has the directory been removed under us, or its host been lost? Then
 * nothing can be looked up in it. */
static int
store_there(void)
{
	struct stat st;

	if (fstat(store.root, &st) == -1)
		return -1;
	errno = EIDRM;
	return st.st_nlink == 0 ? -1 : 0;
}

/* Returns -1, with ENOENT only if that is the whole truth. */
static int
errno_absent(void)
{
	if (errno == ENOENT && store_there() == 0)
		errno = ENOENT;
	return -1;
}

/* Opens one directory in another; -1 with errno. A missing one is made, if
 * so wanted, and on disk before anything in it can be. */
static int
dir_step(int dir, const char *part, bool create)
{
	const int how = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	int next;

	if (!create)
		return openat(dir, part, how);
	/* One at a time: nobody may use one whose maker has not synced it. */
	(void)pthread_mutex_lock(&store.mutex);
	next = openat(dir, part, how);
	if (next == -1 && errno == ENOENT &&
	    (mkdirat(dir, part, 0700) == 0 || errno == EEXIST)) {
		if (sync_fd(dir) == 0)
			next = openat(dir, part, how);
		else
			(void)unlinkat(dir, part, AT_REMOVEDIR);
	}
	(void)pthread_mutex_unlock(&store.mutex);
	return next;
}

/* Opens the directory that the first len bytes of path name, below base,
 * which is left if it is not the root. Left by dir_leave. */
static int
dir_enter(int base, const char *path, size_t len, bool create)
{
	char part[SEGMENT_MAX + 1];
	int dir = base, next;
	size_t n;

	while (len > 0) {
		for (n = 0; n < len && path[n] != '/'; n++)
			continue;
		span_copy(part, sizeof(part), (struct span){ path, n });
		next = dir_step(dir, part, create);
		dir_leave(dir);
		if ((dir = next) == -1)
			return errno_absent();
		n += n < len;
		path += n;
		len -= n;
	}
	return dir;
}

/* Finds where a name's files lie, or would. Left by dir_leave(p->dir). */
static int
place_open(const char *name, bool create, struct place *p)
{
	const char *slash = strrchr(name, '/');

	p->leaf = slash == NULL ? name : slash + 1;
	p->dir = dir_enter(store.root, name,
	    slash == NULL ? 0 : (size_t)(slash - name), create);
	return p->dir != -1 || (!create && errno == ENOENT) ? 0 : -1;
}

static const char *
leaf_name(char out[LEAF], const struct place *p, const char *suffix)
{
	(void)snprintf(out, LEAF, "%s%s", p->leaf, suffix);
	return out;
}

/* Opens an ordinary file, and nothing else: a FIFO would block, a link lead
 * elsewhere. st may be NULL. */
static int
file_open(int dir, const char *name, int how, struct stat *st)
{
	struct stat mine;
	int fd = openat(dir, name, how | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY |
	    O_CLOEXEC, 0600);

	if (st == NULL)
		st = &mine;
	if (fd == -1 || (how & O_EXCL) != 0)
		return fd;		/* what we created is ordinary */
	if (fstat(fd, st) == 0) {
		if (S_ISREG(st->st_mode))
			return fd;
		errno = EISDIR;
	}
	close_quietly(fd);
	return -1;
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

static int
place_file(const struct place *p, const char *suffix, int how,
    struct stat *st)
{
	char leaf[LEAF];
	int fd;

	errno = ENOENT;
	if (p->dir == -1)
		return -1;
	fd = file_open(p->dir, leaf_name(leaf, p, suffix), how, st);
	return fd == -1 ? errno_absent() : fd;
}

/* Opens a name's file for reading; -1 with errno, ENOENT only if there is
 * none. */
static int
name_file(const char *name, const char *suffix, struct stat *st)
{
	struct place p;
	int fd;

	if (place_open(name, false, &p) == -1)
		return -1;
	fd = place_file(&p, suffix, O_RDONLY, st);
	dir_leave(p.dir);
	return fd;
}

/* Reads up to size bytes from an offset on; how many there were, or -1. */
static ssize_t
read_at(int fd, void *data, size_t size, off_t at)
{
	size_t len = 0;
	ssize_t n;

	while (len < size) {
		n = pread(fd, (char *)data + len, size - len,
		    at + (off_t)len);
		if (n == -1 && errno == EINTR)
			continue;
		if (n == -1)
			return -1;
		if (n == 0)
			break;
		len += (size_t)n;
	}
	return (ssize_t)len;
}

/* Reads a file as JSON: until on() has seen enough, max bytes were read, or
 * something is wrong. */
static void
json_file(int fd, struct json *j, off_t max)
{
	char data[8192];
	off_t at = 0;
	ssize_t n;

	while (at < max && !j->stop &&
	    (n = read_at(fd, data, sizeof(data), at)) > 0 &&
	    json_feed(j, data, (size_t)n))
		at += n;
}

/* Reads what is said about a state in it: brief, only serial and lineage.
 * On anything that is not a state, what was found until then. */
static void
meta_read(int fd, struct meta *m, bool brief)
{
	struct json j = { .on = brief ? meta_on_brief : meta_on, .to = m };

	*m = (struct meta){ 0 };
	/* -s must know the serial, wherever it stands. */
	json_file(fd, &j, brief && !conf.strict ? META_MAX : INT64_MAX);
}

/*
 * Room on the disk, in bytes. A reserve is kept, so that locks can be
 * released and taken when states no longer fit.
 */
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
	if (*reserve > RESERVE)
		*reserve = RESERVE;
	low = *room < *reserve;
	(void)pthread_mutex_lock(&store.mutex);
	if (low != store.low)
		complain(low ? "%s: the disk is nearly full: %llu bytes are "
		    "left, writes are refused below %llu" : "%s: there is "
		    "room again: %llu bytes, and %llu are kept for locks",
		    conf.dir, (unsigned long long)*room,
		    (unsigned long long)*reserve);
	store.low = low;
	(void)pthread_mutex_unlock(&store.mutex);
	return 0;
}

/* 0 if n more bytes leave the reserve alone, else -1 with ENOSPC. */
static int
store_fits(int64_t n)
{
	uint64_t room, reserve;

	if (store_room(&room, &reserve) == -1)
		return -1;
	if (room >= reserve + (uint64_t)n)
		return 0;
	errno = ENOSPC;
	return -1;
}

/* A new name, .tmp/TOKEN-NUMBER. */
static void
tmp_name(char out[TMP])
{
	uint64_t number;

	(void)pthread_mutex_lock(&store.mutex);
	number = store.uploads++;
	(void)pthread_mutex_unlock(&store.mutex);
	(void)snprintf(out, TMP, ".tmp/%016llx-%llu",
	    (unsigned long long)store.token, (unsigned long long)number);
}

static int
tmp_create(struct upload *up)
{
	tmp_name(up->tmp);
	up->fd = file_open(store.root, up->tmp, O_WRONLY | O_CREAT | O_EXCL,
	    NULL);
	if (up->fd == -1 && errno == ENOENT &&	/* someone tidied up */
	    (mkdirat(store.root, ".tmp", 0700) == 0 || errno == EEXIST))
		up->fd = file_open(store.root, up->tmp,
		    O_WRONLY | O_CREAT | O_EXCL, NULL);
	return up->fd == -1 ? errno_absent() : 0;
}

static void
tmp_remove(struct upload *up)
{
	int saved = errno;

	if (up->fd != -1) {
		(void)close(up->fd);
		if (up->tmp[0] != '\0')	/* else it was renamed */
			(void)unlinkat(store.root, up->tmp, 0);
	}
	up->fd = -1;
	errno = saved;
}

/* ---- history: .history/NAME/ID.tfstate, hard links ---- */

static int
history_enter(const char *name, bool create)
{
	int dir = dir_enter(store.root, ".history", 8, create);

	return dir == -1 ? -1 : dir_enter(dir, name, strlen(name), create);
}

/*
 * Gives the present version a second name in the history, in the directory
 * dir; sets id to it. Its time is that at which it was replaced, so that
 * what comes later sorts later, whatever mtimes a cp brought along. Two in
 * one millisecond do not collide: the second is dated a little later.
 */
static int
history_link(const struct place *p, int dir, uint64_t serial, char id[LEAF])
{
	int64_t ms = clock_us(CLOCK_REALTIME) / 1000;
	char leaf[LEAF], when[32];
	int tries;

	(void)leaf_name(leaf, p, STATE);
	for (tries = 0; tries < 1000; tries++) {
		time_text(when, ms + tries, true);
		(void)snprintf(id, LEAF, "%s-%llu" STATE, when,
		    (unsigned long long)serial);
		if (linkat(p->dir, leaf, dir, id, 0) == 0)
			return 0;
		if (errno != EEXIST)
			return -1;
	}
	return -1;
}

struct name {
	char *text;
	uint64_t at, len;		/* where what it names stands */
};

struct names {
	struct name *list;
	size_t n;
	bool failed;			/* memory ran out */
};

static void
names_add(struct names *v, const char *name, uint64_t at, uint64_t len)
{
	struct name *list = grow(v->list, v->n, sizeof(*list));

	if (list == NULL || (list[v->n].text = strdup(name)) == NULL)
		v->failed = true;
	else {
		list[v->n].at = at;
		list[v->n++].len = len;
	}
	if (list != NULL)
		v->list = list;
}

static int
names_order(const void *a, const void *b)
{
	return strcmp(((const struct name *)a)->text,
	    ((const struct name *)b)->text);
}

static void
names_sort(struct names *v)
{
	if (v->n > 0)
		qsort(v->list, v->n, sizeof(*v->list), names_order);
}

static void
names_free(struct names *v)
{
	while (v->n > 0)
		free(v->list[--v->n].text);
	free(v->list);
}

/* Lists the IDs in a history, oldest first; its directory stays open. */
static int
history_list(int dir, struct names *ids)
{
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = copy == -1 ? NULL : fdopendir(copy);
	struct dirent *e;

	if (d == NULL) {
		close_quietly(copy);
		return -1;
	}
	while ((e = readdir(d)) != NULL)
		if (is_version(e->d_name, STATE) &&
		    cut_suffix(e->d_name, STATE))
			names_add(ids, e->d_name, 0, 0);
	(void)closedir(d);
	names_sort(ids);
	return 0;
}

/* Removes all but the newest keep versions, and never the one just made: a
 * clock that was set back must not lose what it should save. Owns dir. */
static void
history_prune(int dir, const char *just_made)
{
	DIR *d = fdopendir(dir);
	struct dirent *e;
	char oldest[LEAF];
	unsigned n = 0;

	if (d == NULL) {
		close_quietly(dir);
		return;
	}
	do {				/* once, unless -k was lowered */
		rewinddir(d);
		oldest[0] = '\0';
		for (n = 0; (e = readdir(d)) != NULL;) {
			if (!is_version(e->d_name, STATE))
				continue;
			n++;
			if (strcmp(e->d_name, just_made) != 0 &&
			    (*oldest == '\0' || strcmp(e->d_name, oldest) < 0))
				span_copy(oldest, LEAF, span(e->d_name));
		}
	} while (n > conf.keep && *oldest != '\0' &&
	    unlinkat(dir, oldest, 0) == 0 && n > conf.keep + 1);
	(void)closedir(d);
}

/* ---- a cache of small states, for the loop alone ----
 *
 * An entry serves as long as the name still leads to the same, unchanged
 * file, which one fstatat tells. A file changed less than a second ago is
 * never taken for the same: it could change again within one tick of the
 * file system's clock, and look as before.
 */
static struct cached {
	char name[NAME_LEN_MAX + sizeof(STATE)];
	bool fresh;			/* serves only this once */
	struct stat st;
	size_t len;
	char data[];
} *cache[CACHE_SLOTS + 1];		/* the last one never serves */
static size_t cache_bytes;

#ifdef __APPLE__
#define MTIME st_mtimespec
#define CTIME st_ctimespec
#else
#define MTIME st_mtim
#define CTIME st_ctim
#endif

static bool
same_time(struct timespec a, struct timespec b)
{
	return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

static uint32_t
hash(const char *name)
{
	uint32_t h = 2166136261u;	/* FNV-1a */

	for (; *name != '\0'; name++)
		h = (h ^ (unsigned char)*name) * 16777619u;
	return h;
}

/* In a directory fstatat would follow a link in that one's place: such names
 * are read anew each time. */
static struct cached **
cache_slot(const char *name)
{
	return &cache[strchr(name, '/') != NULL ? CACHE_SLOTS :
	    hash(name) % CACHE_SLOTS];
}

/* The entry that may be served now, or NULL. */
static const struct cached *
cache_find(const char *name)
{
	const struct cached *c = *cache_slot(name);
	size_t len = strlen(name);
	struct stat st;

	if (c == NULL || c->fresh || strncmp(c->name, name, len) != 0 ||
	    strcmp(c->name + len, STATE) != 0 ||
	    fstatat(store.root, c->name, &st, AT_SYMLINK_NOFOLLOW) == -1 ||
	    st.st_ino != c->st.st_ino || st.st_dev != c->st.st_dev ||
	    st.st_size != c->st.st_size ||
	    !same_time(st.MTIME, c->st.MTIME) ||
	    !same_time(st.CTIME, c->st.CTIME))
		return NULL;
	return c;
}

static void
cache_drop(struct cached **slot)
{
	if (*slot != NULL)
		cache_bytes -= (*slot)->len;
	free(*slot);
	*slot = NULL;
}

/* Reads a state into its slot, which others are dropped for if they must. The
 * entry, valid until the next call, or NULL with errno. */
static const struct cached *
cache_fill(const char *name, int fd, const struct stat *st)
{
	static size_t next;
	struct cached **slot = cache_slot(name), *c;
	size_t len = (size_t)st->st_size;
	ssize_t n;

	cache_drop(slot);
	while (cache_bytes > 0 && cache_bytes + len > CACHE_BYTES)
		cache_drop(&cache[next++ % (CACHE_SLOTS + 1)]);
	if ((c = malloc(sizeof(*c) + len)) == NULL)
		return NULL;
	if ((n = read_at(fd, c->data, len, 0)) != st->st_size) {
		free(c);
		errno = n == -1 ? errno : EAGAIN;	/* being edited */
		return NULL;
	}
	(void)snprintf(c->name, sizeof(c->name), "%s" STATE, name);
	/* Another host's clock says nothing about ours. */
	c->fresh = slot == &cache[CACHE_SLOTS] || store.remote ||
	    st->CTIME.tv_sec + 1 >= clock_us(CLOCK_REALTIME) / 1000000;
	c->st = *st;
	c->len = len;
	cache_bytes += len;
	*slot = c;
	return c;
}

/* ==== locks ==============================================================
 *
 * NAME.lock present = locked. Its bytes are the lock info of the holder,
 * for the conflict's answer. A file that is not lock info, made by hand or
 * torn by a crash, locks too: it is a freeze, held by nobody whose ID could
 * match, until force-unlock or rm ends it.
 */
static void
lock_free(struct lock *l)
{
	free(l->raw);
	l->raw = NULL;
}

/* A freeze: what its first line says becomes the Info that clients show. */
static void
lock_made_up(struct lock *l)
{
	const char *p = l->raw, *end = p + l->len;
	size_t n, len = 0;

	*l = (struct lock){ .held = true, .foreign = true, .torso = l->torso,
	    .since = l->since, .raw = l->raw, .len = l->len };
	(void)snprintf(l->id, sizeof(l->id), "made-by-hand");
	while (p < end && (unsigned char)*p >= ' ' && *p != 0x7f) {
		n = utf8_length(p);	/* raw ends in a NUL */
		if (n == 0 || len + n >= sizeof(l->info))
			break;
		memcpy(l->info + len, p, n);
		len += n;
		p += n;
	}
}

/* Reads who holds the lock. 0 and held or not, or -1: could not look. The
 * lock is to be freed by lock_free. */
static int
lock_read(const struct place *p, struct lock *l)
{
	struct json j = { .on = lock_on, .to = l };
	struct stat st;
	ssize_t n = -1;
	int fd;

	*l = (struct lock){ 0 };
	if ((fd = place_file(p, LOCK, O_RDONLY, &st)) == -1)
		return errno == ENOENT ? 0 : -1;
	l->held = true;
	l->since = st.st_mtime;
	/* Under the guard. A remote host's bytes may still be on their way,
	 * but not for a quarter of a minute. */
	l->torso = st.st_size == 0 && (st.st_mode & 0100) != 0 &&
	    (!store.remote || time(NULL) - l->since > 15);
	l->raw = malloc(LOCK_INFO_MAX + 1);
	if (l->raw != NULL)
		n = read_at(fd, l->raw, LOCK_INFO_MAX, 0);
	close_quietly(fd);
	if (n == -1) {
		lock_free(l);
		return -1;
	}
	l->raw[n] = '\0';
	l->len = (size_t)n;
	if (st.st_size > LOCK_INFO_MAX || !json_feed(&j, l->raw, l->len) ||
	    !json_done(&j) || l->id[0] == '\0')
		lock_made_up(l);
	return 0;
}

/* Appends what a client in conflict is told: the holder's own bytes, or, of
 * a freeze, lock info that every client can parse: terraform 1.15 wants an
 * ID, and no version takes a Created that is not a time. */
static void
lock_tell(const struct lock *l, struct buf *b)
{
	if (!l->foreign) {
		buf_add(b, l->raw, l->len);
		return;
	}
	put(b, "{\"ID\":%j,\"Operation\":\"\",\"Info\":%j,\"Who\":\"\","
	    "\"Version\":\"\",\"Path\":\"\"}", l->id, l->info);
}

static bool
lock_is(const struct lock *l, const char *id)
{
	return l->held && !l->foreign && strcmp(l->id, id) == 0;
}

/* May a LOCK break it, by -b? Never a freeze: that is somebody's word. */
static bool
lock_stale(const struct lock *l)
{
	return conf.break_hours > 0 && !l->foreign &&
	    time(NULL) - l->since > (time_t)conf.break_hours * 3600;
}

static int
lock_remove(const struct place *p)
{
	char leaf[LEAF];

	return unlinkat(p->dir, leaf_name(leaf, p, LOCK), 0);
}

/*
 * Creates the lock file; what could not be written whole is removed again.
 * Returns its descriptor, not synced yet, or -1. Until it is synced its mode
 * is 0700: so an empty one that we left by dying here, of which nobody was
 * told, is not taken for one that somebody made with touch.
 */
static int
lock_create(const struct place *p, const void *info, size_t len)
{
	char leaf[LEAF];
	int fd = openat(p->dir, leaf_name(leaf, p, LOCK), O_WRONLY | O_CREAT |
	    O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0700), saved;

	if (fd != -1 && write_all(fd, info, len) == -1) {
		saved = errno;
		(void)close(fd);
		(void)lock_remove(p);
		errno = saved;
		return -1;
	}
	return fd;
}

/* ==== users ==============================================================
 *
 * Who may do what. A request shows a name and a secret, or a secret alone;
 * both are compared with every line, all 32 bytes of a digest each time, so
 * that neither the secret nor the existence of a user can be told from the
 * time it takes. Several lines may speak of one user: the most counts.
 */
struct user {
	char *name;
	unsigned char secret[32];	/* SHA-256 */
	enum right right;
	const char *patterns;		/* and "" at the end; none means all */
};

struct users {
	struct user *list;
	size_t n;
	unsigned refs;			/* requests that use it, and the loop */
	char *text;			/* the file, cut up; users point here */
};

static struct users *users;		/* NULL: everybody may do everything */

static const char right_names[][6] = {
	[R_READ] = "read", [R_PLAN] = "plan", [R_WRITE] = "write"
};

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
	while (*pattern == '*')
		pattern++;
	return *pattern == '\0';
}

static bool
user_sees(const struct user *u, const char *name)
{
	const char *p = u->patterns;

	if (*p == '\0' || name == NULL)
		return true;
	for (; *p != '\0'; p += strlen(p) + 1)
		if (glob(p, name))
			return true;
	return false;
}

/* The right that a request has on a name; name NULL: on any at all. */
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
		if (same_secret(u->secret, r->secret) &&
		    (r->user[0] == '\0' || strcmp(u->name, r->user) == 0) &&
		    user_sees(u, name) && u->right > right)
			right = u->right;
	}
	return right;
}

/* Takes user and secret from Authorization: Basic or Bearer (RFC 7617,
 * 6750). False if it shows none. */
static bool
user_shows(struct request *r, struct span v)
{
	struct span scheme = { v.ptr, 0 };
	char text[8192], *colon;
	ssize_t n;

	for (; v.len > 0 && *v.ptr != ' '; v.ptr++, v.len--)
		scheme.len++;
	for (; v.len > 0 && *v.ptr == ' '; v.ptr++, v.len--)
		continue;
	if (span_is(scheme, "bearer")) {
		sha256(v.ptr, v.len, r->secret);
		return v.len > 0;
	}
	if (!span_is(scheme, "basic"))
		return false;
	n = base64_decode(v, text, sizeof(text) - 1);
	if (n == -1 || memchr(text, 0, (size_t)n) != NULL)
		return false;
	text[n] = '\0';
	if ((colon = strchr(text, ':')) == NULL || colon == text ||
	    (size_t)(colon - text) >= sizeof(r->user))
		return false;
	*colon++ = '\0';
	memcpy(r->user, text, (size_t)(colon - text));
	sha256(colon, strlen(colon), r->secret);
	return true;
}

/* A bearer has no name until its secret is known; the log wants one. */
static void
user_name(struct request *r)
{
	size_t i;

	for (i = 0; r->user[0] == '\0' && i < r->users->n; i++)
		if (same_secret(r->users->list[i].secret, r->secret))
			span_copy(r->user, sizeof(r->user),
			    span(r->users->list[i].name));
}

/* Reads "sha256:HEX", or takes the digest of what is written. */
static bool
secret_read(const char *word, unsigned char out[32])
{
	int high, low;
	size_t i;

	if (strncmp(word, "sha256:", 7) != 0) {
		sha256(word, strlen(word), out);
		return *word != '\0';
	}
	word += 7;
	for (i = 0; strlen(word) == 64 && i < 32; i++) {
		high = hex_value((unsigned char)word[2 * i]);
		low = hex_value((unsigned char)word[2 * i + 1]);
		if (high == -1 || low == -1)
			return false;
		out[i] = (unsigned char)(high << 4 | low);
	}
	return i == 32;
}

/* One line, cut into words in place. NULL, or what is wrong with it. */
static const char *
user_line(struct users *u, char *line)
{
	struct user *new = &u->list[u->n];
	char *save = NULL, *word, *to, *field[3] = { NULL, NULL, NULL };
	size_t i;

	for (i = 0; i < 3; i++)
		field[i] = strtok_r(i == 0 ? line : NULL, " \t\r", &save);
	if (field[0] == NULL || field[0][0] == '#')
		return NULL;
	if (field[2] == NULL)
		return "a line is: name secret right [pattern...]";
	if (strlen(field[0]) > 63 || strchr(field[0], ':') != NULL)
		return "a user name has 63 bytes at most, and no colon";
	if (!secret_read(field[1], new->secret))
		return "after sha256: come 64 hexadecimal digits";
	for (i = R_READ; i <= R_WRITE; i++)
		if (strcmp(field[2], right_names[i]) == 0)
			new->right = (enum right)i;
	if (new->right == R_NONE)
		return "a right is read, plan or write";
	new->name = field[0];
	/* Close together, where the right stood: that makes room for "". */
	new->patterns = to = field[2];
	for (; (word = strtok_r(NULL, " \t\r", &save)) != NULL &&
	    *word != '#'; to += strlen(to) + 1)
		memmove(to, word, strlen(word) + 1);
	*to = '\0';
	u->n++;
	return NULL;
}

/* Builds the table from text, which it owns from then on. NULL, having
 * complained with the line, if a line is wrong or memory short. */
static struct users *
users_parse(char *text, const char *file)
{
	struct users *u = calloc(1, sizeof(*u));
	const char *wrong = NULL;
	char *line, *next;
	size_t lines = 2, number = 0;

	for (line = text; *line != '\0'; line++)
		lines += *line == '\n';
	if (u == NULL ||
	    (u->list = calloc(lines, sizeof(*u->list))) == NULL) {
		complain("%s: out of memory", file);
		free(u);
		free(text);
		return NULL;
	}
	u->refs = 1;
	u->text = text;
	for (line = text; wrong == NULL && line != NULL; line = next) {
		number++;
		if ((next = strchr(line, '\n')) != NULL)
			*next++ = '\0';
		wrong = user_line(u, line);
	}
	if (wrong == NULL && u->n == 0)
		wrong = "it names no user";
	if (wrong == NULL)
		return u;
	if (u->n == 0 && line == NULL)
		complain("%s: %s", file, wrong);
	else
		complain("%s, line %zu: %s", file, number, wrong);
	users_drop(u);
	return NULL;
}

/* Reads the file of -u; NULL, having complained, if it is no good. */
static struct users *
users_read(const char *file)
{
	struct buf text = { 0 };
	struct stat st;
	ssize_t n = -1;
	int fd;

	/* Once we serve, nothing may be waited for: a FIFO least of all. */
	if (users != NULL && stat(file, &st) == 0 && !S_ISREG(st.st_mode)) {
		complain("%s: this is not a file", file);
		return NULL;
	}
	fd = open(file, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (fd != -1 && fstat(fd, &st) == 0 && buf_room(&text, USERS_MAX))
		while ((n = read(fd, text.data + text.len,
		    USERS_MAX - text.len)) > 0)
			text.len += (size_t)n;
	if (n == -1)
		complain("cannot read the users in %s: %s", file,
		    strerror(errno));
	else if (text.len == USERS_MAX ||
	    memchr(text.data, 0, text.len) != NULL)
		complain("%s: this is no list of users", file);
	else {
		if ((st.st_mode & 077) != 0)
			complain("others can read %s: chmod 600 it", file);
		close_quietly(fd);
		text.data[text.len] = '\0';
		return users_parse(text.data, file);
	}
	close_quietly(fd);
	buf_free(&text);
	return NULL;
}

/* ==== jobs ===============================================================
 *
 * The loop never waits for a disk: what does is a job for the commit
 * threads. Many of them, because many fsyncs in flight are folded into one
 * flush by the kernel, and one after the other they are not. Jobs of one
 * name stand in its lane and run one at a time, in order of arrival; others
 * run side by side. Between processes and hosts the guard does what the lane
 * does in here: a record lock on the byte of .guard that is the name's hash.
 */
#define LANES 256			/* buckets */

struct lane {				/* a name with a job that runs */
	struct lane *next;		/* in its bucket */
	struct request *first, **last;	/* jobs that wait for it */
	char name[];
};

/* What a job leaves to be done once its answer is on its way. */
struct after {
	int fresh;			/* a lock file, to be synced, or -1 */
	int old;			/* the replaced state, to be freed */
	int history;			/* a directory to be pruned, or -1 */
	char made[LEAF];		/* in it, just now */
	char broken[TMP];		/* where a broken lock was put */
};

static struct {
	pthread_mutex_t mutex;
	pthread_cond_t work;
	struct request *first, **last;	/* ready to run */
	struct request *done;		/* to be answered */
	struct lane *lanes[LANES];
	unsigned threads, max, idle, ready;
	uint64_t batches[8];		/* how many ran at once: 1, 2, 4... */
	uint64_t batch_sum;
	int wake[2];			/* to the loop: 'J', and signals */
} jobs = {
	.mutex = PTHREAD_MUTEX_INITIALIZER,
	.work = PTHREAD_COND_INITIALIZER,
	.last = &jobs.first,
	.wake = { -1, -1 },
};

/* ---- the guard ---- */

/*
 * Locks or frees one byte of .guard. Open file description locks where there
 * are any: classic ones take all threads for one owner and see deadlocks
 * that are none.
 */
static int
guard_set(int fd, short type, off_t byte, bool wait)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET,
	    .l_start = byte, .l_len = 1 };
#ifdef F_OFD_SETLKW
	int how = wait ? F_OFD_SETLKW : F_OFD_SETLK;
#else
	int how = wait ? F_SETLKW : F_SETLK;
#endif

	while (fcntl(fd, how, &l) == -1)
		if (errno != EINTR && errno != EDEADLK)
			return -1;
	return 0;
}

/* A name's byte: 62 bits of a hash, so that no two names meet. */
static off_t
guard_byte(const char *name)
{
	unsigned char digest[32];
	uint64_t h;

	sha256(name, strlen(name), digest);
	/* Every machine must see the same bits in the same order. */
	h = (uint64_t)load32(digest) << 32 | load32(digest + 4);
	return (off_t)(h & (((uint64_t)1 << 62) - 1));
}

/* A server's byte, above those of all names: held while it lives. */
static off_t
guard_server_byte(uint64_t token)
{
	return (off_t)((uint64_t)1 << 62 | token >> 3);
}

static int
guard_take(const char *name)
{
	struct stat st;

	if (guard_set(store.guard, F_WRLCK, guard_byte(name), true) == -1)
		return -1;
	if (fstat(store.guard, &st) == 0 && st.st_nlink > 0)
		return 0;
	/* Removed: another server would lock another file of that name. */
	(void)guard_set(store.guard, F_UNLCK, guard_byte(name), false);
	errno = EIDRM;
	return -1;
}

static void
guard_drop(const char *name)
{
	/* Cannot fail: it shortens what we hold, and needs no waiting. */
	(void)guard_set(store.guard, F_UNLCK, guard_byte(name), false);
}

/*
 * The guard for one who stands in no lane: the listing, the sweep. A
 * descriptor of its own, for to its own holder a record lock is no obstacle;
 * to close it drops the guard. -1 if it cannot be had.
 */
static int
guard_aside(const char *name)
{
	int fd = -1;

#ifdef F_OFD_SETLKW			/* else it would be our own lock */
	fd = file_open(store.root, ".guard", O_RDWR, NULL);
	if (fd != -1 &&
	    guard_set(fd, F_WRLCK, guard_byte(name), true) == -1) {
		close_quietly(fd);
		fd = -1;
	}
#else
	(void)name;
#endif
	return fd;
}

/* Reads a lock without meaning to change it. What looks like a freeze may be
 * a lock whose info is being written: under the guard it is whole. */
static int
lock_look(const struct place *p, const char *name, struct lock *l)
{
	int status = lock_read(p, l), guard;

	if (status == -1 || !l->foreign || (guard = guard_aside(name)) == -1)
		return status;
	lock_free(l);
	status = lock_read(p, l);
	close_quietly(guard);
	return status;
}

/* ---- lanes and threads ---- */

static struct lane **
lane_find(const char *name)
{
	struct lane **l;

	for (l = &jobs.lanes[hash(name) % LANES]; *l != NULL; l = &(*l)->next)
		if (strcmp((*l)->name, name) == 0)
			break;
	return l;
}

/* Puts a request into its name's lane. 1: it must wait there; 0: it is the
 * first; -1: no memory. */
static int
lane_enter(struct request *r)
{
	/* Comparing versions takes its time; nobody's writes wait for it. */
	const char *name = r->kind == K_CHANGES ? "/-/changes" : r->name;
	struct lane **at = lane_find(name), *l = *at;
	size_t size = strlen(name) + 1;

	if (l != NULL) {
		r->lane = l;
		*l->last = r;
		l->last = &r->next;
		return 1;
	}
	if ((l = malloc(sizeof(*l) + size)) == NULL)
		return -1;
	memcpy(l->name, name, size);
	l->next = NULL;
	l->first = NULL;
	l->last = &l->first;
	r->lane = *at = l;
	return 0;
}

static void
job_ready(struct request *r)
{
	r->next = NULL;
	*jobs.last = r;
	jobs.last = &r->next;
	jobs.ready++;
}

/* The job in front has left: lets the next of its name run, or ends the
 * lane. */
static void
lane_leave(struct lane *lane)
{
	struct request *r = lane->first;
	struct lane **at;

	if (r == NULL) {
		at = lane_find(lane->name);
		*at = lane->next;
		free(lane);
		return;
	}
	if ((lane->first = r->next) == NULL)
		lane->last = &lane->first;
	job_ready(r);
}

/* Hands a request back to the loop. */
static void
job_answer(struct request *r)
{
	bool wake;

	(void)pthread_mutex_lock(&jobs.mutex);
	wake = jobs.done == NULL;
	r->next = jobs.done;
	jobs.done = r;
	(void)pthread_mutex_unlock(&jobs.mutex);
	if (wake)			/* a full pipe wakes it as well */
		(void)!write(jobs.wake[1], "J", 1);
}

/* Leaves the lane of the job that is over, if there was one; returns the next
 * job. Whom lane_leave makes ready needs no signal: we are awake. */
static struct request *
job_take(struct lane *lane)
{
	struct request *r;
	unsigned i = 0;

	(void)pthread_mutex_lock(&jobs.mutex);
	if (lane != NULL)
		lane_leave(lane);
	while ((r = jobs.first) == NULL) {
		jobs.idle++;
		(void)pthread_cond_wait(&jobs.work, &jobs.mutex);
		jobs.idle--;
	}
	if ((jobs.first = r->next) == NULL)
		jobs.last = &jobs.first;
	jobs.ready--;
	if (r->lane != NULL) {
		jobs.batch_sum += jobs.threads - jobs.idle;
		while (i < 7 && 1u << i < jobs.threads - jobs.idle)
			i++;
		jobs.batches[i]++;
	}
	(void)pthread_mutex_unlock(&jobs.mutex);
	return r;
}

/* A commit thread's life: take a job, do it, answer, then clean up. */
static void *
job_thread(void *unused)
{
	struct request *r;
	struct lane *lane = NULL;

	for (;;) {
		struct after a = { -1, -1, -1, "", "" };

		r = job_take(lane);
		lane = r->lane;
		r->after = &a;
		(void)r->run(r);	/* its status is in r */
		if (r->tell != NULL)
			r->tell(r);
		job_answer(r);		/* r is the loop's again */
		close_quietly(a.fresh);
		file_forget(a.old);
		if (a.history != -1)
			history_prune(a.history, a.made);
		if (a.broken[0] != '\0')
			(void)unlinkat(store.root, a.broken, 0);
	}
	return unused;
}

/* Starts one thread more; signals are the loop's business. */
static bool
job_start_thread(void)
{
	pthread_attr_t attr;
	sigset_t all, old;
	pthread_t id;
	int error;

	(void)sigfillset(&all);
	if (pthread_attr_init(&attr) != 0)
		return false;
	(void)pthread_attr_setstacksize(&attr, THREAD_STACK);
	(void)pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	(void)pthread_sigmask(SIG_SETMASK, &all, &old);
	error = pthread_create(&id, &attr, job_thread, NULL);
	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	(void)pthread_attr_destroy(&attr);
	return error == 0;
}

/* Gives a request to the commit threads; from now on it is theirs. Ordered:
 * behind all others of its name. -1 if there is nobody to do it. */
static int
job_submit(struct request *r, int (*run)(struct request *), bool ordered)
{
	int waits = 0;

	r->run = run;
	r->next = NULL;
	r->lane = NULL;
	(void)pthread_mutex_lock(&jobs.mutex);
	if (jobs.ready >= jobs.idle && jobs.threads < jobs.max &&
	    job_start_thread())
		jobs.threads++;
	if (jobs.threads == 0)
		waits = -1;
	else if (ordered)
		waits = lane_enter(r);
	if (waits == 0)
		job_ready(r);
	(void)pthread_mutex_unlock(&jobs.mutex);
	if (waits == 0)			/* who wakes up finds the mutex free */
		(void)pthread_cond_signal(&jobs.work);
	return waits == -1 ? -1 : 0;
}

/* ==== commits ============================================================
 *
 * What a commit thread does, first step to last: check the body; write the
 * temporary file; sync it; take the name's guard; look at the lock; only
 * then publish; drop the guard; sync the directory; append to the state's
 * log; answer. What fails leaves state and lock as they were, except where
 * only the last sync failed: then the answer is 5xx, and the client's own
 * repetition of the request finds it done, or does it again.
 */

/* Sets a plain answer of one line, which is also the reason in the logs, and
 * returns its status. */
__attribute__((format(printf, 3, 4)))
static int
refuse(struct request *r, int status, const char *fmt, ...)
{
	va_list ap;
	char *p;

	va_start(ap, fmt);
	(void)vsnprintf(r->why, sizeof(r->why), fmt, ap);
	va_end(ap);
	for (p = r->why; *p != '\0'; p++)	/* one line, as promised */
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			*p = ' ';
	r->text.len = 0;
	buf_fmt(&r->text, "%s\n", r->why);
	r->type = "text/plain; charset=utf-8";
	r->status = status;
	return status;
}

/* The one place where an errno becomes a status. 503 invites the client to
 * try again, which it does twice. */
static int
refuse_errno(struct request *r, const char *what)
{
	int e = errno, status = 500;

	switch (e) {
	case ENOSPC: case EDQUOT: case EFBIG:
		status = 507;
		break;
	case EMFILE: case ENFILE: case ENOMEM: case EINTR: case EAGAIN:
	case EBUSY: case ETIMEDOUT: case ENOLCK: case EIO: case ENOTCONN:
	case ESTALE:
		status = 503;
		break;
	default:
		break;
	}
	complain("%s: cannot %s: %s", r->name, what,
	    e == EIDRM ? "the directory, or .guard in it, was removed" :
	    strerror(e));
	return refuse(r, status, "cannot %s: %s", what,
	    e == EIDRM ? "the directory was removed under the server" :
	    e == ELOOP ? "it is a symbolic link" :
	    e == EISDIR ? "it is not an ordinary file" :
	    status == 507 ? "no room is left on the disk" : strerror(e));
}

static int
done(struct request *r)
{
	r->status = 200;
	return 0;
}

/* The answer is the holder's lock info: every client knows to read it. */
static int
refuse_locked(struct request *r, int status)
{
	(void)refuse(r, status, r->lock.foreign ? "frozen by hand: %s" :
	    "locked by %s", r->lock.foreign ? r->lock.info : r->lock.id);
	r->text.len = 0;
	lock_tell(&r->lock, &r->text);
	r->type = "application/json";
	return status;
}

/* ---- the state's log ---- */

static void
log_key(struct buf *b, const char *key, const char *value)
{
	if (*value != '\0')
		put(b, ",\"%s\":%j", key, value);
}

static void
log_meta(struct buf *b, const char *prefix, const struct meta *m)
{
	char key[32];

	if (m->known)
		buf_fmt(b, ",\"%sserial\":%llu", prefix,
		    (unsigned long long)m->serial);
	(void)snprintf(key, sizeof(key), "%slineage", prefix);
	log_key(b, key, m->lineage);
}

static void
log_lock(struct buf *b, const char *key, const struct lock *l)
{
	if (!l->held)
		return;
	put(b, ",\"%s\":{\"id\":%j", key, l->id);
	log_key(b, "who", l->who);
	log_key(b, "operation", l->operation);
	log_key(b, "created", l->created);
	log_key(b, "info", l->info);
	buf_str(b, "}");
}

static void
log_line(struct request *r, const char *event, struct buf *b)
{
	const struct lock *who = r->asked.id[0] != '\0' ? &r->asked : &r->lock;
	bool broke = strcmp(event, "break") == 0 ||
	    strcmp(event, "force-unlock") == 0;
	char text[64];

	time_text(text, clock_us(CLOCK_REALTIME) / 1000, false);
	buf_fmt(b, "{\"time\":\"%s\",\"event\":\"%s\",\"method\":\"%s\","
	    "\"status\":%d", text, event, method_names[r->method], r->status);
	log_key(b, "client", r->client);
	log_key(b, "user", r->user);
	log_key(b, "id", r->id);
	if (strcmp(who->id, r->id) == 0) {
		log_key(b, "who", who->who);
		log_key(b, "operation", who->operation);
	}
	if (r->up != NULL) {
		log_meta(b, "", &r->up->meta);
		buf_fmt(b, ",\"size\":%lld", (long long)r->up->size);
		if (r->up->hash && r->status == 200) {
			hex(r->up->digest, 16, text);
			log_key(b, "md5", text);
		}
	}
	log_meta(b, "old_", &r->old);
	if (broke || !lock_is(&r->lock, r->id))
		log_lock(b, broke ? "broken" : "holder", &r->lock);
	log_key(b, "why", r->why);
	buf_str(b, "}\n");
}

/* Appends what happened to NAME.log. Not synced: it tells of the promise, it
 * is not the promise. */
static void
log_event(struct request *r, const struct place *p, const char *event)
{
	struct buf b = { 0 };
	int fd;

	log_line(r, event, &b);
	/* What was refused leaves no file for a name that is nobody's. */
	fd = place_file(p, LOG, O_WRONLY | O_APPEND |
	    (r->status == 200 || r->lock.held ? O_CREAT : 0), NULL);
	if (fd == -1 && errno == ENOENT)
		;
	else if (fd == -1 || b.failed || write_all(fd, b.data, b.len) == -1)
		complain("%s: cannot write its log: %s", r->name,
		    strerror(errno));
	close_quietly(fd);
	buf_free(&b);
}

/* ---- bodies ---- */

static int
refuse_json(struct request *r, const struct json *j)
{
	return refuse(r, 400, "the body is not a JSON object: at byte %llu "
	    "it %s", (unsigned long long)j->at, j->why);
}

static int
refuse_md5(struct request *r)
{
	return refuse(r, 400, "the body does not have the MD5 that "
	    "Content-MD5 says");
}

/* Checks and writes the piece of the state that is at hand. */
static int
upload_piece(struct request *r)
{
	struct upload *up = r->up;
	size_t n = r->len;

	r->len = 0;
	if (up->hash)
		md5_add(&up->md5, r->body, n);
	if (!json_feed(&up->json, r->body, n))
		return refuse_json(r, &up->json);
	if (store_fits((int64_t)n) == -1)
		return refuse_errno(r, "write the state");
	if (up->fd == -1 && tmp_create(up) == -1)
		return refuse_errno(r, "create a temporary file");
	if (write_all(up->fd, r->body, n) == -1)
		return refuse_errno(r, "write the state");
	up->size += (int64_t)n;
	return 0;
}

/* Takes back what was uploaded for nothing. */
static int
job_abandon(struct request *r)
{
	tmp_remove(r->up);
	return 0;
}

/* The last piece, then what only the whole can tell; then it is synced. */
static int
upload_end(struct request *r)
{
	struct upload *up = r->up;
	int status = r->len > 0 ? upload_piece(r) : 0;

	if (status != 0)
		return status;
	if (!json_done(&up->json))
		return refuse_json(r, &up->json);
	if (up->hash)
		md5_end(&up->md5, up->digest);
	if (r->has_md5 && memcmp(up->digest, r->md5, 16) != 0)
		return refuse_md5(r);
	if (sync_fd(up->fd) == -1)
		return refuse_errno(r, "sync the state");
	return 0;
}

/* Checks a body that is lock info, and takes the ID from it. */
static int
lock_info_read(struct request *r)
{
	struct json j = { .on = lock_on, .to = &r->asked };
	struct md5 md5 = md5_start;
	unsigned char digest[16];

	md5_add(&md5, r->body, r->len);
	md5_end(&md5, digest);
	if (r->has_md5 && memcmp(digest, r->md5, 16) != 0)
		return refuse_md5(r);
	if (r->len == 0)
		return 0;
	if (!json_feed(&j, r->body, r->len) || !json_done(&j))
		return refuse_json(r, &j);
	if (r->asked.id[0] == '\0')
		return refuse(r, 400, "the lock info has no ID of 1 to %d "
		    "bytes", ID_MAX);
	(void)snprintf(r->id, sizeof(r->id), "%s", r->asked.id);
	r->has_id = true;
	return 0;
}

/* ---- the deeds ----
 *
 * LOCK, UNLOCK, write and delete differ in what they want of a request and
 * in what they do under the guard. How they are done is the same, and stands
 * in commit(), below them. Each function returns 0 or the status of a
 * refusal; what a deed did is told by the event, for the log.
 */

static int
lock_prepare(struct request *r)
{
	int status = lock_info_read(r);

	if (status == 0 && r->len == 0)
		return refuse(r, 400, "LOCK wants lock info: a JSON object "
		    "with an ID");
	return status;
}

/* Reads the lock under the guard, for one who may change it. */
static int
lock_guarded(struct request *r, struct place *p)
{
	lock_free(&r->lock);
	if (lock_read(p, &r->lock) == -1)
		return refuse_errno(r, "read the lock");
	if (!r->lock.torso)
		return 0;
	complain("%s: removed an empty lock, left by a crash", r->name);
	lock_free(&r->lock);
	r->lock = (struct lock){ 0 };
	return lock_remove(p) == -1 ? refuse_errno(r, "remove a torn lock") : 0;
}

/* Puts a new lock in the place of a stale one, at no moment leaving none; the
 * old one is kept until the new one is on disk. The broken run can do no harm:
 * its ID opens nothing now. */
static int
lock_break(struct request *r, struct place *p)
{
	struct after *a = r->after;
	struct upload up = { .fd = -1 };
	char leaf[LEAF];

	(void)leaf_name(leaf, p, LOCK);
	tmp_name(a->broken);
	if (linkat(p->dir, leaf, store.root, a->broken, 0) == -1)
		a->broken[0] = '\0';	/* then it cannot be put back */
	if (tmp_create(&up) == -1 ||
	    write_all(up.fd, r->body, r->len) == -1 ||
	    sync_fd(up.fd) == -1 ||
	    renameat(store.root, up.tmp, p->dir, leaf) == -1) {
		(void)refuse_errno(r, "break the stale lock");
		tmp_remove(&up);
		return r->status;
	}
	a->fresh = up.fd;
	return 0;
}

static int
lock_publish(struct request *r, struct place *p)
{
	struct after *a = r->after;
	int status = lock_guarded(r, p);

	if (status != 0)
		return status;
	r->event = "lock";
	if (lock_is(&r->lock, r->id)) {	/* a repetition: promise 6 */
		a->fresh = place_file(p, LOCK, O_RDONLY, NULL);
		return a->fresh == -1 ? refuse_errno(r, "read the lock") : 0;
	}
	if (r->lock.held) {
		if (!lock_stale(&r->lock) || r->right < R_WRITE)
			return refuse_locked(r, 423);
		r->event = "break";
		return lock_break(r, p);
	}
	a->fresh = lock_create(p, r->body, r->len);
	if (a->fresh == -1 && errno == EEXIST &&	/* made by hand, now */
	    lock_guarded(r, p) == 0 && r->lock.held)
		return refuse_locked(r, 423);
	return a->fresh == -1 ? refuse_errno(r, "write the lock") : 0;
}

/* The lock could not be synced: nobody is told of it, so nobody has it. */
static void
lock_take_back(struct request *r, struct place *p)
{
	struct after *a = r->after;
	char leaf[LEAF];
	struct lock l;

	if (lock_is(&r->lock, r->id) || guard_take(r->name) == -1)
		return;			/* a repetition: it was there before */
	if (lock_read(p, &l) == 0 && lock_is(&l, r->id)) {
		if (a->broken[0] == '\0')
			(void)lock_remove(p);
		else if (renameat(store.root, a->broken, p->dir,
		    leaf_name(leaf, p, LOCK)) == 0)
			a->broken[0] = '\0';
	}
	lock_free(&l);
	guard_drop(r->name);
}

static int
unlock_prepare(struct request *r)
{
	int status = lock_info_read(r);

	/* An empty body is terraform's force-unlock, unless ?ID= names one. */
	r->force = r->len == 0 && !r->has_id;
	if (status == 0 && r->force && r->right < R_WRITE)
		return refuse(r, 403, "the user may not force-unlock this "
		    "state");
	return status;
}

static int
unlock_publish(struct request *r, struct place *p)
{
	int status = lock_guarded(r, p);
	bool made_up;

	if (status != 0)
		return status;
	if (!r->lock.held)		/* a repetition, perhaps */
		return 0;
	/* OpenTofu 1.10 sends the ID that we made up for a freeze. */
	made_up = r->lock.foreign && strcmp(r->id, r->lock.id) == 0 &&
	    r->right == R_WRITE;
	if (!r->force && !made_up && !lock_is(&r->lock, r->id))
		return refuse_locked(r, 409);
	r->event = r->force || made_up ? "force-unlock" : "unlock";
	return lock_remove(p) == -1 ? refuse_errno(r, "remove the lock") : 0;
}

static int
refuse_broken(struct request *r)
{
	return refuse(r, 409, "nothing is locked: the lock %s was broken or "
	    "released", r->id);
}

/* Promise 4: under the lock's own ID, or with none when nothing is locked.
 * An ID whose lock is gone was broken: another run may have written. */
static int
write_allowed(struct request *r, struct place *p)
{
	int status = lock_guarded(r, p);

	if (status != 0)
		return status;
	if (r->lock.held && !(r->has_id && lock_is(&r->lock, r->id)))
		return refuse_locked(r, 423);
	return !r->lock.held && r->has_id ? refuse_broken(r) : 0;
}

/* -s: what terraform itself would want to be asked about. */
static int
write_strict(struct request *r)
{
	const struct meta *new = &r->up->meta, *old = &r->old;

	if (old->known && !new->known)
		return refuse(r, 409, "strict: it has no whole number as its "
		    "serial");
	if (old->known && new->serial < old->serial)
		return refuse(r, 409, "strict: serial %llu is lower than the "
		    "present %llu", (unsigned long long)new->serial,
		    (unsigned long long)old->serial);
	if (old->lineage[0] != '\0' && strcmp(new->lineage, old->lineage) != 0)
		return refuse(r, 409, "strict: its lineage is '%s', the "
		    "present one is '%s'", new->lineage, old->lineage);
	return 0;
}

/* Opens what is to be replaced or deleted, reads its serial, and links it
 * into the history: a->old stays -1 if there is nothing. */
static int
old_keep(struct request *r, struct place *p)
{
	struct after *a = r->after;

	if ((a->old = place_file(p, STATE, O_RDONLY, NULL)) == -1)
		return errno == ENOENT ? 0 : refuse_errno(r, "read the state "
		    "that is there");
	meta_read(a->old, &r->old, true);
	if (conf.strict && r->up != NULL && write_strict(r) != 0)
		return r->status;
	if (conf.keep == 0)
		return 0;
	a->history = history_enter(r->name, true);
	if (a->history == -1 ||
	    history_link(p, a->history, r->old.serial, a->made) == -1)
		return refuse_errno(r, "keep the earlier version");
	return 0;
}

/* What should have followed old_keep could not be done. */
static int
old_forget(struct request *r, const char *what)
{
	int saved = errno;

	if (r->after->history != -1)
		(void)unlinkat(r->after->history, r->after->made, 0);
	errno = saved;
	return refuse_errno(r, what);
}

/*
 * The history's own directory is not synced: the promise is about the new
 * state. A journal writes both together; without one, a power cut within
 * seconds may cost the old version its second name.
 */
static int
write_publish(struct request *r, struct place *p)
{
	char leaf[LEAF];
	int status = write_allowed(r, p);

	r->event = "write";
	if (status != 0 || (status = old_keep(r, p)) != 0)
		return status;
	if (renameat(store.root, r->up->tmp, p->dir,
	    leaf_name(leaf, p, STATE)) == -1)
		return old_forget(r, "put the state in its place");
	r->up->tmp[0] = '\0';
	return 0;
}

/* Looks, and publishes, under the name's guard. */
static int
guarded(struct request *r, int (*publish)(struct request *, struct place *),
    bool create, struct place *p)
{
	int status;

	if (place_open(r->name, create, p) == -1)
		return refuse_errno(r, "open the state's directory");
	if (guard_take(r->name) == -1)
		return refuse_errno(r, "guard the name");
	status = publish(r, p);
	guard_drop(r->name);
	return status;
}

/* May a write land, as far as can be seen now? */
static int
write_look(struct request *r)
{
	struct place p;
	int status = guarded(r, write_allowed, false, &p);

	dir_leave(p.dir);
	return status;
}

/* What is wrong with a body matters only to one who might write it, however
 * the packets were cut. */
static int
write_prepare(struct request *r)
{
	int status = upload_end(r), verdict;

	verdict = status == 400 ? write_look(r) : 0;
	return verdict != 0 ? verdict : status;
}

static int
delete_prepare(struct request *r)
{
	return r->right < R_WRITE ?
	    refuse(r, 403, "the user may not delete this state") : 0;
}

/* Removes the name; its other one, in the history, is on disk before. */
static int
delete_publish(struct request *r, struct place *p)
{
	const struct after *a = r->after;
	char leaf[LEAF];
	int status = write_allowed(r, p);

	r->event = "delete";
	if (status != 0 || (status = old_keep(r, p)) != 0)
		return status;
	if (a->old == -1)
		return refuse(r, 404, "there is no such state");
	if ((a->history != -1 && sync_fd(a->history) == -1) ||
	    unlinkat(p->dir, leaf_name(leaf, p, STATE), 0) == -1)
		return old_forget(r, "remove the state");
	return 0;
}

static const struct deed {
	int (*prepare)(struct request *);
	int (*publish)(struct request *, struct place *);
	bool create;			/* the name's directory, if need be */
} deed_lock = { lock_prepare, lock_publish, true },
  deed_unlock = { unlock_prepare, unlock_publish, false },
  deed_write = { write_prepare, write_publish, true },
  deed_delete = { delete_prepare, delete_publish, false };

/*
 * A deed, first step to last. The directory is synced even if nothing was
 * there to be done: an earlier try may have done it, and its answer been
 * lost because this very sync failed.
 */
static int
commit(struct request *r, const struct deed *d)
{
	const struct after *a = r->after;
	struct place p = { .dir = -1 };
	int status = d->prepare(r);

	if (status == 0)
		status = guarded(r, d->publish, d->create, &p);
	if (status == 0 && p.dir != -1 &&
	    ((a->fresh != -1 && sync_fd(a->fresh) == -1) ||
	    sync_fd(p.dir) == -1)) {
		status = refuse_errno(r, "sync");
		if (d == &deed_lock)
			lock_take_back(r, &p);
	}
	/* Last, and not synced: between the two it would cost a journal a
	 * transaction more, and with content the mode means nothing. */
	if (a->fresh != -1)
		(void)fchmod(a->fresh, 0600);
	if (status == 0)
		(void)done(r);
	if (p.dir == -1 && status != 404)	/* refused: where is its log? */
		(void)place_open(r->name, false, &p);
	if (p.dir != -1 && status != 404 && (status != 0 || r->event != NULL))
		log_event(r, &p, status == 0 ? r->event : "refused");
	dir_leave(p.dir);
	return status;
}

static int
job_lock(struct request *r)
{
	return commit(r, &deed_lock);
}

static int
job_unlock(struct request *r)
{
	return commit(r, &deed_unlock);
}

static int
job_write(struct request *r)
{
	int status = commit(r, &deed_write);

	tmp_remove(r->up);
	return status;
}

/* With unlock_method DELETE at the state's own address, terraform's unlock
 * looks like this too: a body, or the MD5 of an empty one, gives it away. */
static int
job_delete(struct request *r)
{
	return commit(r, r->len > 0 || r->has_md5 ? &deed_unlock :
	    &deed_delete);
}

/* May a write that is about to begin go on? What is refused here need not
 * be uploaded first. The write itself will look again. */
static int
job_look(struct request *r)
{
	struct place p;
	int status = 0;

	if (store_fits(r->length > 0 ? r->length : 0) == -1)
		status = refuse_errno(r, "write the state");
	if (status == 0)
		status = write_look(r);
	if (status != 0 && place_open(r->name, false, &p) == 0) {
		log_event(r, &p, "refused");
		dir_leave(p.dir);
	}
	return status;
}

/* ==== pages ==============================================================
 *
 * For people who look, and for machines that watch: the states, a state's
 * versions, what changed, metrics. A commit thread writes them, because they
 * read many files, and they stand in lanes like everything else: there is
 * one listing at a time, however many are asked for. A table is written once
 * and comes out as text, JSON or HTML.
 */
static const char page_css[] =
    ":root{color-scheme:light dark;--dim:#666;--line:#ddd;--hot:#b3261e}"
    "@media(prefers-color-scheme:dark){:root{--dim:#999;--line:#333;"
    "--hot:#ff8a80}}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;"
    "margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.5rem}"
    "a{color:LinkText}table{border-collapse:collapse;width:100%}"
    "th{text-align:left;font-weight:500;color:var(--dim)}"
    "td,th{padding:.4rem .8rem .4rem 0;border-bottom:1px solid var(--line);"
    "vertical-align:top}"
    ".n,td:nth-child(5),td:last-child{white-space:nowrap}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}"
    ".dim{color:var(--dim)}.hot{color:var(--hot)}"
    "td:first-child{overflow-wrap:anywhere;min-width:14rem}"
    "pre{background:color-mix(in srgb,CanvasText 7%,Canvas);padding:1rem;"
    "overflow-x:auto;border-radius:.4rem}"
    "input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem .7rem;"
    "margin:.5rem 0 1rem;border:1px solid var(--dim);border-radius:.4rem;"
    "background:Canvas;color:CanvasText}"
    "a:focus-visible,input:focus-visible{outline:3px solid Highlight}"
    "@media(max-width:44rem){thead{display:none}tr{display:flex;"
    "flex-wrap:wrap;gap:0 1rem;padding:.5rem 0;"
    "border-bottom:1px solid var(--line)}td{border:0;padding:0}"
    "td:empty{display:none}"
    "td:first-child{flex-basis:100%;font-weight:600}"
    "td[data-h]:not(:first-child)::before{content:attr(data-h) ' ';color:var(--dim)}}";

static const char page_js[] =
    "const q=document.querySelector('input'),"
    "rows=[...document.querySelectorAll('tbody tr')],"
    "names=document.querySelectorAll('.name');"
    "q.addEventListener('input',()=>{const s=q.value.toLowerCase();"
    "for(const r of rows)"
    "r.hidden=!r.cells[0].textContent.toLowerCase().includes(s);"
    "for(const n of names)n.textContent="
    "(q.value.trim()||'demo').split('/').map(encodeURIComponent).join('/')"
    "});";

static void
buf_csp_hash(struct buf *b, const char *what, const char *text)
{
	unsigned char digest[32];
	char code[48];

	sha256(text, strlen(text), digest);
	base64_encode(digest, sizeof(digest), code);
	buf_fmt(b, "; %s 'sha256-%s'", what, code);
}

/* Nothing from elsewhere, no inline code but ours, in nobody's frame. */
static void
page_csp(struct buf *b)
{
	buf_str(b, "Content-Security-Policy: default-src 'none'");
	buf_csp_hash(b, "style-src", page_css);
	buf_csp_hash(b, "script-src", page_js);
	buf_str(b, "; img-src data:; form-action 'self'; base-uri 'none'; "
	    "frame-ancestors 'none'\r\nReferrer-Policy: no-referrer\r\n");
}

static void
html_begin(struct buf *b, const char *title)
{
	put(b, "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\">"
	    "<meta name=\"viewport\" content=\"width=device-width,"
	    "initial-scale=1\"><link rel=\"icon\" href=\"data:,\">"
	    "<title>%h</title><style>%s</style>\n<h1>%s%h</h1>\n", title,
	    page_css, strcmp(title, "States") == 0 ? "" :
	    "<a href=\"/\">States</a> / ", title);
}

static void
size_text(char out[32], int64_t n)
{
	static const char units[] = "KMGT";
	double v = (double)n;
	int i = -1;

	while (v >= 1000 && i < 3) {
		v /= 1024;
		i++;
	}
	if (i == -1)
		(void)snprintf(out, 32, "%lld B", (long long)n);
	else
		(void)snprintf(out, 32, "%.*f %ciB", v < 10, v, units[i]);
}

/* ---- tables ---- */

struct column {
	const char *key;		/* in JSON */
	const char *title;		/* elsewhere; NULL: only in JSON */
	int width;			/* of text; negative: to the left */
	bool number;
};

static void
page_begin(struct request *r, const char *title)
{
	static const char *const types[] = { "text/plain; charset=utf-8",
	    "application/json", "text/html; charset=utf-8" };

	r->type = types[r->form];
	if (r->form == HTML)
		html_begin(&r->text, title);
}

static void
table_begin(struct request *r, const struct column *c)
{
	struct buf *b = &r->text;

	buf_str(b, r->form == HTML ? "<table><thead><tr>" :
	    r->form == JSON ? "[" : "");
	for (; r->form != JSON && c->key != NULL; c++)
		if (c->title == NULL)
			continue;
		else if (r->form == HTML)
			buf_fmt(b, "<th%s>%s", c->number ? " class=n" : "",
			    c->title);
		else
			buf_fmt(b, "%*s  ", c->width, c->title);
	buf_str(b, r->form == HTML ? "<th></thead><tbody>\n" :
	    r->form == TEXT ? "\n" : "");
}

static void
row_begin(struct request *r, bool first)
{
	buf_str(&r->text, r->form == HTML ? "<tr>" : r->form == TEXT ? "" :
	    first ? "\n{" : ",\n{");
}

static void
row_end(struct request *r)
{
	buf_str(&r->text, r->form == JSON ? "}" : "\n");
}

/* A key of a JSON object, with the comma that it may need before it. */
static void
json_key(struct buf *b, const char *key)
{
	if (b->len > 0 && b->data[b->len - 1] != '{')
		buf_str(b, ",");
	buf_fmt(b, "\"%s\":", key);
}

/* Appends key and value; null in place of nothing. */
static void
json_member(struct buf *b, const char *key, const char *value)
{
	json_key(b, key);
	put(b, *value == '\0' ? "null" : "%j", value);
}

static void
html_link(struct buf *b, const char *base, const char *path, const char *text)
{
	put(b, "<a href=\"%s%u\">%h</a> ", base, path, text);
}

/* A cell: its value for machines, and as people like to see it. base is what
 * an HTML link to it begins with, or NULL. */
static void
cell(struct request *r, const struct column *c, const char *value,
    const char *shown, const char *base)
{
	struct buf *b = &r->text;

	if (r->form == JSON && c->number && *value != '\0') {
		json_key(b, c->key);
		buf_str(b, value);
	} else if (r->form == JSON)
		json_member(b, c->key, value);
	else if (c->title == NULL)
		return;
	else if (r->form == TEXT)
		buf_fmt(b, "%*s  ", c->width, *shown != '\0' ? shown : "-");
	else {
		put(b, "<td%s data-h=\"%s\" title=\"%h\">",
		    c->number ? " class=n" : "", c->title, value);
		if (base != NULL)
			html_link(b, base, value, shown);
		else
			buf_html(b, shown);
	}
}

static int
page_end(struct request *r)
{
	buf_str(&r->text, r->form == JSON ? "\n]\n" :
	    r->form == HTML ? "</html>\n" : "");
	return r->text.failed ?
	    refuse(r, 503, "the page does not fit in memory") : done(r);
}

/* ---- a walk over the states ---- */

/* Calls on() for each .tfstate and .lock file, name being the state's. */
struct walk {
	void (*on)(struct walk *, int dir, const char *leaf, bool is_lock);
	void *to;
	int error;			/* why some were not found, or 0 */
	struct names names;		/* for on() to collect them */
	char name[NAME_LEN_MAX + 300];
};

static void walk_dir(struct walk *, int, size_t, unsigned);

static void
walk_entry(struct walk *w, DIR *d, struct dirent *e, size_t len,
    unsigned depth)
{
	char leaf[300];
	bool is_lock;
	size_t n = strlen(e->d_name);
	int dir;

	if (e->d_name[0] == '.' || len + n > NAME_LEN_MAX)
		return;
	(void)snprintf(leaf, sizeof(leaf), "%s", e->d_name);
	memcpy(w->name + len, e->d_name, n + 1);
	is_lock = cut_suffix(w->name, LOCK);
	if (is_lock || cut_suffix(w->name, STATE)) {
		if (name_wrong(w->name) == NULL)
			w->on(w, dirfd(d), leaf, is_lock);
		return;
	}
#ifdef DT_DIR
	if (e->d_type != DT_DIR && e->d_type != DT_UNKNOWN)
		return;
#endif
	if (ends_in(leaf, n, LOG) || depth + 1 >= SEGMENTS_MAX)
		return;
	dir = openat(dirfd(d), leaf,
	    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dir == -1) {		/* a lost+found is not ours to read */
		if (errno != EACCES && errno != ENOENT && errno != ENOTDIR &&
		    errno != ELOOP)
			w->error = errno;
		return;
	}
	w->name[len + n] = '/';
	walk_dir(w, dir, len + n + 1, depth + 1);
}

/* Owns dir. w->name holds len bytes of path that lead to it. */
static void
walk_dir(struct walk *w, int dir, size_t len, unsigned depth)
{
	DIR *d = fdopendir(dir);
	struct dirent *e;

	if (d == NULL) {
		w->error = errno;
		close_quietly(dir);
		return;
	}
	while (errno = 0, (e = readdir(d)) != NULL)
		walk_entry(w, d, e, len, depth);
	if (errno != 0)
		w->error = errno;
	(void)closedir(d);
}

/* -1 with errno if they could not all be found. */
static int
walk_states(struct walk *w)
{
	int dir = openat(store.root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir == -1 || store_there() == -1) {
		close_quietly(dir);
		return -1;
	}
	walk_dir(w, dir, 0, 0);
	errno = w->error;
	return errno == 0 ? 0 : -1;
}

/* ---- the listing ---- */

/* In the order of the cells that row_cells writes. */
static const struct column listing_columns[] = {
	{ "name", "State", -24, false },
	{ "serial", "Serial", 6, true },
	{ "resources", "Resources", 9, true },
	{ "size", "Size", 9, true },
	{ "modified", "Changed", -15, false },
	{ "terraform_version", "Terraform", -9, false },
	{ "lineage", NULL, 0, false },
	{ "lock", "Lock", -4, false },
	{ NULL, NULL, 0, false }
};

/* A state, as it is shown. */
struct row {
	const char *name;
	bool exists;
	struct stat st;
	struct meta meta;
	struct lock lock;
};

static void
listing_on(struct walk *w, int dir, const char *leaf, bool is_lock)
{
	const struct request *r = w->to;

	(void)dir;
	(void)leaf;
	(void)is_lock;			/* a name may have only a lock */
	if (user_right(r, w->name) != R_NONE &&
	    strstr(w->name, r->query) != NULL)
		names_add(&w->names, w->name, 0, 0);
}

/* Looks at one state. What went away meanwhile is shown as not there. */
static void
row_read(struct row *row, const char *name)
{
	struct place p;
	int fd;

	*row = (struct row){ .name = name };
	if (place_open(name, false, &p) == -1)
		return;
	if ((fd = place_file(&p, STATE, O_RDONLY, &row->st)) != -1) {
		row->exists = true;
		meta_read(fd, &row->meta, row->st.st_size > LIST_MAX);
		close_quietly(fd);
	}
	if (lock_look(&p, name, &row->lock) == -1) /* better than "unlocked" */
		row->lock = (struct lock){ .held = true, .foreign = true,
		    .id = "unknown", .info = "the lock cannot be read" };
	dir_leave(p.dir);
}

static void
row_lock_json(struct buf *b, const struct lock *l)
{
	char since[32];

	json_key(b, "lock");
	if (!l->held) {
		buf_str(b, "null");
		return;
	}
	time_text(since, (int64_t)l->since * 1000, false);
	buf_str(b, "{");
	json_member(b, "id", l->id);
	json_member(b, "who", l->who);
	json_member(b, "operation", l->operation);
	json_member(b, "info", l->info);
	json_member(b, "created", l->created);
	put(b, ",\"since\":%j}", since);
}

/* Who holds the lock, since when and for what, in words. */
static void
row_lock(struct request *r, const struct lock *l)
{
	struct buf *b = &r->text, words = { 0 };
	char age[32], *p;

	if (r->form == JSON) {
		row_lock_json(b, l);
		return;
	}
	if (r->form == HTML)
		buf_str(b, "<td class=hot>");
	if (!l->held)
		return;
	age_text(age, time(NULL) - l->since);
	if (l->foreign)
		buf_fmt(&words, "frozen for %s: %s", age, l->info);
	else
		buf_fmt(&words, "locked by %s (%s) for %s", *l->who != '\0' ?
		    l->who : "?", *l->operation != '\0' ? l->operation : "?",
		    age);
	buf_fmt(&words, ", ID %s", l->id);
	for (p = words.data; p != NULL && *p != '\0'; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			*p = ' ';	/* an ID may have anything in it */
	if (words.failed)
		b->failed = true;
	else if (r->form == HTML)
		buf_html(b, words.data);
	else
		buf_str(b, words.data);
	buf_free(&words);
}

static void
row_cells(struct request *r, const struct row *row)
{
	const struct column *c = listing_columns;
	const struct meta *m = &row->meta;
	char serial[24] = "", resources[24] = "", bytes[24] = "", size[32] = "";
	char when[32] = "", age[48] = "";

	if (m->known)
		(void)snprintf(serial, sizeof(serial), "%llu",
		    (unsigned long long)m->serial);
	if (row->exists) {
		if (row->st.st_size <= LIST_MAX)
			(void)snprintf(resources, sizeof(resources), "%u",
			    m->resources);
		(void)snprintf(bytes, sizeof(bytes), "%lld",
		    (long long)row->st.st_size);
		size_text(size, (int64_t)row->st.st_size);
		time_text(when, (int64_t)row->st.st_mtime * 1000, false);
		age_text(age, time(NULL) - row->st.st_mtime);
		(void)snprintf(age + strlen(age), 8, " ago");
	}
	cell(r, c++, row->name, row->name, "/");
	cell(r, c++, serial, serial, NULL);
	cell(r, c++, resources, resources, NULL);
	cell(r, c++, bytes, size, NULL);
	cell(r, c++, when, age, NULL);
	cell(r, c++, m->version, m->version, NULL);
	cell(r, c++, m->lineage, m->lineage, NULL);
	row_lock(r, &row->lock);
	if (r->form == HTML) {
		buf_str(&r->text, "<td>");
		html_link(&r->text, "/-/versions/", row->name, "versions");
		html_link(&r->text, "/-/log/", row->name, "log");
	}
}

/* The block that a newcomer copies, for the name that was searched for. */
static void
html_backend(struct buf *b, const struct request *r)
{
	static const char *const lines[] = {
		"address       ", "lock_address  ", "unlock_address"
	};
	bool valid = r->query[0] != '\0' && name_wrong(r->query) == NULL;
	size_t i;

	buf_str(b, "<h2>A state of your own</h2><p>Put this into a .tf file, "
	    "then run <code>terraform init</code>. The state comes to be with "
	    "the first apply.</p>\n<pre>terraform {\n  backend \"http\" {\n");
	for (i = 0; i < 3; i++)
		put(b, "    %s = \"%s://%h/<span class=name>%u</span>\"\n",
		    lines[i], r->fronted ? "https" : "http", r->host,
		    valid ? r->query : "demo");
	put(b, "  }\n}</pre>\n<script>%s</script>", page_js);
}

static void
html_search(struct buf *b, const char *query)
{
	put(b, "<form><input type=search name=q aria-label=\"Search by "
	    "name\" placeholder=\"Search by name\" autocomplete=off "
	    "autofocus value=\"%h\"></form>\n", query);
}

static void
listing_write(struct request *r, struct names *names)
{
	struct row row;
	size_t i, shown = 0;

	page_begin(r, "States");
	if (r->form == HTML)
		html_search(&r->text, r->query);
	table_begin(r, listing_columns);
	for (i = 0; i < names->n; i++) {
		/* A state and its lock are two files of one name. */
		if (i > 0 && names_order(&names->list[i],
		    &names->list[i - 1]) == 0)
			continue;
		if (r->form == HTML && shown == ROWS_MAX)
			break;
		row_read(&row, names->list[i].text);
		row_begin(r, shown++ == 0);
		row_cells(r, &row);
		row_end(r);
		lock_free(&row.lock);
	}
	if (r->form == HTML) {
		buf_str(&r->text, "</tbody></table>\n<p class=dim>");
		buf_str(&r->text, i < names->n ? "And more: search for them." :
		    shown == 0 ? "No states here." : "");
		html_backend(&r->text, r);
	}
}

static int
page_root(struct request *r)
{
	struct walk w = { .on = listing_on, .to = r };

	if (walk_states(&w) == -1)
		(void)refuse_errno(r, "list the states");
	else {
		names_sort(&w.names);
		listing_write(r, &w.names);
		r->text.failed |= w.names.failed;
		(void)page_end(r);
	}
	names_free(&w.names);
	return r->status;
}

/* ---- versions and what changed ---- */

static const struct column version_columns[] = {
	{ "id", "Version", -32, false },
	{ "serial", "Serial", 6, true },
	{ "size", "Size", 9, true },
	{ "time", "Replaced", -24, false },
	{ NULL, NULL, 0, false }
};

/* One version: when it was replaced, and its serial, are in its ID. */
static void
version_cells(struct request *r, const char *id, int64_t bytes,
    const char *base, const char *changes)
{
	const struct column *c = version_columns;
	const char *serial = strchr(id, '-') + 1;
	char when[40], text[32], size[32];

	(void)snprintf(when, sizeof(when), "%.4s-%.2s-%.2sT%.2s:%.2s:%.7s",
	    id, id + 4, id + 6, id + 9, id + 11, id + 13);
	(void)snprintf(text, sizeof(text), "%lld", (long long)bytes);
	size_text(size, bytes);
	cell(r, c++, id, id, base);
	cell(r, c++, serial, serial, NULL);
	cell(r, c++, text, size, NULL);
	cell(r, c++, when, when, NULL);
	if (r->form == HTML) {
		buf_str(&r->text, "<td>");
		html_link(&r->text, changes, id, "changes");
	}
}

static int
page_versions(struct request *r)
{
	int dir = history_enter(r->name, false);
	struct names ids = { NULL, 0, false };
	struct buf base = { 0 }, changes = { 0 };
	char leaf[LEAF];
	struct stat st;
	size_t i;

	if (dir == -1 ? errno != ENOENT : history_list(dir, &ids) == -1) {
		close_quietly(dir);
		return refuse_errno(r, "read the history");
	}
	page_begin(r, r->name);
	if (r->form == HTML) {
		html_link(&r->text, "/", r->name, "the present state");
		html_link(&r->text, "/-/changes/", r->name, "its changes");
		html_link(&r->text, "/-/log/", r->name, "log");
	}
	put(&base, "/-/versions/%u/", r->name);
	put(&changes, "/-/changes/%u/", r->name);
	table_begin(r, version_columns);
	for (i = ids.n; i > 0; i--) {
		(void)snprintf(leaf, LEAF, "%.64s" STATE, ids.list[i - 1].text);
		if (base.failed || changes.failed ||
		    fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) == -1)
			continue;
		row_begin(r, i == ids.n);
		version_cells(r, ids.list[i - 1].text, (int64_t)st.st_size,
		    base.data, changes.data);
		row_end(r);
	}
	buf_free(&base);
	buf_free(&changes);
	names_free(&ids);
	close_quietly(dir);
	return page_end(r);
}

/* Opens an earlier version for reading. */
static int
version_open(const char *name, const char *id, struct stat *st)
{
	int dir = history_enter(name, false), fd;
	char leaf[LEAF];

	if (dir == -1)
		return -1;
	(void)snprintf(leaf, LEAF, "%.64s" STATE, id);
	fd = file_open(dir, leaf, O_RDONLY, st);
	close_quietly(dir);
	return fd;
}

/* The resource instances of a state: their addresses, and where they stand. */
struct items {
	int fd;
	struct names names;
	size_t first;			/* of the resource being read */
	uint64_t begun;			/* the instance being read */
	char module[JSON_TEXT], type[JSON_TEXT], name[JSON_TEXT];
	char key[JSON_TEXT + 8];
	bool data;
};

/* The resource is over: now all parts of its instances' addresses are
 * known, in whatever order they came. */
static void
items_name(struct items *it)
{
	struct name *name;
	struct buf b;

	for (; it->first < it->names.n; it->first++) {
		name = &it->names.list[it->first];
		b = (struct buf){ 0 };
		buf_fmt(&b, "%s%s%s%s.%s%s", it->module,
		    *it->module != '\0' ? "." : "", it->data ? "data." : "",
		    it->type, it->name, name->text);
		free(name->text);
		name->text = b.data;
		it->names.failed |= b.failed;
	}
	it->module[0] = it->type[0] = it->name[0] = '\0';
	it->data = false;
}

/* resources[i] stands at depth 2, its instances[k] at depth 4. */
static void
items_on(struct json *j, char what)
{
	struct items *it = j->to;
	enum word w = j->word[j->depth];

	if (j->word[1] != W_RESOURCES || it->names.failed)
		return;
	if (j->depth == 2 && what == '}')
		items_name(it);
	else if (j->depth == 3 && what == 's' && w == W_MODULE)
		json_show(it->module, sizeof(it->module), j);
	else if (j->depth == 3 && what == 's' && w == W_TYPE)
		json_show(it->type, sizeof(it->type), j);
	else if (j->depth == 3 && what == 's' && w == W_NAME)
		json_show(it->name, sizeof(it->name), j);
	else if (j->depth == 3 && what == 's' && w == W_MODE)
		it->data = strcmp(j->text, "data") == 0;
	if (j->depth < 4 || j->word[3] != W_INSTANCES)
		return;
	if (j->depth == 4 && what == '{') {
		it->begun = j->at;
		it->key[0] = '\0';
	} else if (j->depth == 4 && what == '}')
		names_add(&it->names, it->key, it->begun,
		    j->at + 1 - it->begun);
	else if (w == W_INDEX_KEY && (what == 's' || what == 'n'))
		(void)snprintf(it->key, sizeof(it->key), what == 's' ?
		    "[\"%s\"]" : "[%s]", j->text);
}

static void
items_free(struct items *it)
{
	names_free(&it->names);
	close_quietly(it->fd);
}

/* Finds all resource instances of the state in it->fd, sorted. A descriptor
 * of -1 is a state without any. */
static void
items_read(struct items *it)
{
	struct json j = { .on = items_on, .to = it };

	if (it->fd != -1)
		json_file(it->fd, &j, INT64_MAX);
	if (!it->names.failed)
		names_sort(&it->names);
}

/* Are two instances the same, byte for byte? */
static bool
item_same(int a, const struct name *x, int b, const struct name *y)
{
	char one[2048], two[2048];
	uint64_t at;
	size_t n;

	for (at = 0; x->len == y->len && at < x->len; at += n) {
		n = x->len - at < sizeof(one) ? (size_t)(x->len - at) :
		    sizeof(one);
		if (read_at(a, one, n, (off_t)(x->at + at)) != (ssize_t)n ||
		    read_at(b, two, n, (off_t)(y->at + at)) != (ssize_t)n ||
		    memcmp(one, two, n) != 0)
			return false;
	}
	return x->len == y->len;
}

/* Writes the addresses of one kind of change: '+', '-' or '~'. */
static void
changes_list(struct request *r, char kind, const struct items *old,
    const struct items *new)
{
	const struct names *was = &old->names, *now = &new->names;
	struct buf *b = &r->text;
	const char *address;
	size_t i = 0, k = 0;
	int side;
	char is;

	while (i < was->n || k < now->n) {
		side = i == was->n ? 1 : k == now->n ? -1 :
		    names_order(&was->list[i], &now->list[k]);
		address = (side > 0 ? now->list[k] : was->list[i]).text;
		is = side > 0 ? '+' : side < 0 ? '-' : item_same(old->fd,
		    &was->list[i], new->fd, &now->list[k]) ? '=' : '~';
		i += side <= 0;
		k += side >= 0;
		if (is != kind)
			continue;
		if (r->form == JSON)
			put(b, "%s%j", b->len > 0 &&
			    b->data[b->len - 1] == '[' ? "" : ",", address);
		else
			put(b, r->form == HTML ? "<tr><td>%s %h\n" : "%s %s\n",
			    (const char[]){ kind, '\0' }, address);
	}
}

static void
changes_write(struct request *r, const char *before, const struct items *old,
    const struct items *new)
{
	static const struct { char kind; const char *word; } kinds[] = {
		{ '+', "added" }, { '-', "removed" }, { '~', "changed" }
	};
	struct buf *b = &r->text;
	size_t i;

	page_begin(r, r->name);
	if (r->form == HTML) {
		buf_fmt(b, "<p>%s compared with %s: resources added (+), "
		    "removed (-), changed (~). ",
		    *r->version != '\0' ? r->version : "The present state",
		    *before != '\0' ? before : "nothing: no version before it is kept");
		html_link(b, "/-/versions/", r->name, "All versions");
		buf_str(b, "<table>\n");
	} else if (r->form == JSON) {
		buf_str(b, "{");
		json_member(b, "name", r->name);
		json_member(b, "id", r->version);
		json_member(b, "before", before);
	}
	for (i = 0; i < 3; i++) {
		if (r->form == JSON) {
			json_key(b, kinds[i].word);
			buf_str(b, "[");
		}
		changes_list(r, kinds[i].kind, old, new);
		if (r->form == JSON)
			buf_str(b, "]");
	}
	buf_str(b, r->form == JSON ? "}\n" : r->form == HTML ?
	    "</table></html>\n" : "");
}

/* The version before the one asked for; the present one comes last. */
static void
version_before(const struct request *r, char out[VERSION_ID])
{
	int dir = history_enter(r->name, false);
	struct names ids = { NULL, 0, false };
	size_t i;

	*out = '\0';
	if (dir != -1 && history_list(dir, &ids) == 0)
		for (i = 0; i < ids.n && (*r->version == '\0' ||
		    strcmp(ids.list[i].text, r->version) < 0); i++)
			span_copy(out, VERSION_ID, span(ids.list[i].text));
	names_free(&ids);
	close_quietly(dir);
}

/* What a version changed against the one before it. */
static int
page_changes(struct request *r)
{
	struct items old = { .fd = -1 }, new = { .fd = -1 };
	char before[VERSION_ID];
	struct stat st;

	version_before(r, before);
	new.fd = *r->version != '\0' ? version_open(r->name, r->version, &st) :
	    name_file(r->name, STATE, &st);
	if (new.fd == -1)
		return errno == ENOENT ?
		    refuse(r, 404, "there is no such version") :
		    refuse_errno(r, "read the version");
	if (*before != '\0')
		old.fd = version_open(r->name, before, &st);
	old.names.failed = *before != '\0' && old.fd == -1;
	items_read(&old);
	items_read(&new);
	if (old.names.failed || new.names.failed)
		(void)refuse(r, 503, "the states cannot be compared");
	else {
		changes_write(r, before, &old, &new);
		(void)done(r);
	}
	items_free(&old);
	items_free(&new);
	return r->status;
}

/* ---- a lock ---- */

static int
page_lock(struct request *r)
{
	struct place p;

	if (place_open(r->name, false, &p) == -1 ||
	    lock_look(&p, r->name, &r->lock) == -1)
		(void)refuse_errno(r, "read the lock");
	else if (!r->lock.held)
		(void)refuse(r, 404, "it is not locked");
	else {
		lock_tell(&r->lock, &r->text);
		r->type = "application/json";
		(void)done(r);
	}
	dir_leave(p.dir);
	return r->status;
}

/* ---- is it well? ---- */

static int
page_ready(struct request *r)
{
	struct upload up = { .fd = -1 };

	if (store_there() == 0 && store_fits(0) == 0 &&
	    tmp_create(&up) == 0) {
		tmp_remove(&up);
		buf_str(&r->text, "ready\n");
		r->type = "text/plain; charset=utf-8";
		return done(r);
	}
	(void)refuse_errno(r, "write");
	return r->status = 503;
}

/* Counts states and locks, for the metrics. */
struct census {
	uint64_t states, locks;
	time_t oldest;
};

static void
census_on(struct walk *w, int dir, const char *leaf, bool is_lock)
{
	struct census *c = w->to;
	struct stat st;

	c->states += !is_lock;
	if (!is_lock || fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) == -1)
		return;
	c->locks++;
	if (c->oldest == 0 || st.st_mtime < c->oldest)
		c->oldest = st.st_mtime;
}

static void
metric(struct buf *b, const char *name, const char *type, const char *help,
    double value)
{
	buf_fmt(b, "# HELP statesrv_%s %s\n# TYPE statesrv_%s %s\n"
	    "statesrv_%s %.10g\n", name, help, name, type, name, value);
}

/* How often something was at most each of n bounds, and above them all. */
static void
metric_histogram(struct buf *b, const char *name, const char *help,
    const double *bounds, const uint64_t *counts, size_t n, double sum)
{
	uint64_t count = 0;
	size_t i;

	buf_fmt(b, "# HELP statesrv_%s %s\n# TYPE statesrv_%s histogram\n",
	    name, help, name);
	for (i = 0; i < n; i++) {
		count += counts[i];
		buf_fmt(b, "statesrv_%s_bucket{le=\"%g\"} %llu\n", name,
		    bounds[i], (unsigned long long)count);
	}
	count += counts[n];
	buf_fmt(b, "statesrv_%s_bucket{le=\"+Inf\"} %llu\n"
	    "statesrv_%s_sum %.15g\nstatesrv_%s_count %llu\n", name,
	    (unsigned long long)count, name, sum, name,
	    (unsigned long long)count);
}

/* The part of the metrics that lies on the disk; the loop wrote the rest. */
static int
page_metrics(struct request *r)
{
	struct census c = { 0 };
	struct walk w = { .on = census_on, .to = &c };
	static const double batches[] = { 1, 2, 4, 8, 16, 32, 64 };
	uint64_t room, reserve;
	struct buf *b = &r->text;

	if (walk_states(&w) == -1 || store_room(&room, &reserve) == -1)
		return refuse_errno(r, "count the states");
	(void)pthread_mutex_lock(&jobs.mutex);
	metric_histogram(b, "commit_batch_size", "Jobs that ran side by side "
	    "when one began.", batches, jobs.batches, 7,
	    (double)jobs.batch_sum);
	(void)pthread_mutex_unlock(&jobs.mutex);
	metric(b, "states", "gauge", "States.", (double)c.states);
	metric(b, "locks", "gauge", "Locks that are held.", (double)c.locks);
	metric(b, "oldest_lock_age_seconds", "gauge",
	    "Age of the oldest lock, 0 without any.",
	    c.oldest == 0 ? 0 : (double)(time(NULL) - c.oldest));
	metric(b, "free_bytes", "gauge", "Room on the disk.", (double)room);
	metric(b, "reserve_bytes", "gauge",
	    "Room below which writes are refused.", (double)reserve);
	r->type = "text/plain; version=0.0.4; charset=utf-8";
	return done(r);
}

/* ==== methods ============================================================
 *
 * What each method on each kind of URL wants: a right, a body, and a
 * function that answers at once or a job that will. The loop lets a request
 * in only if it finds it in the table, which also writes every Allow.
 */
static const struct { int code; char reason[32]; } statuses[] = {
	{ 200, "OK" },
	{ 204, "No Content" },
	{ 400, "Bad Request" },
	{ 401, "Unauthorized" },
	{ 403, "Forbidden" },
	{ 404, "Not Found" },
	{ 405, "Method Not Allowed" },
	{ 408, "Request Timeout" },
	{ 409, "Conflict" },
	{ 411, "Length Required" },
	{ 412, "Precondition Failed" },
	{ 413, "Content Too Large" },
	{ 414, "URI Too Long" },
	{ 417, "Expectation Failed" },
	{ 423, "Locked" },
	{ 431, "Request Header Fields Too Large" },
	{ 500, "Internal Server Error" },
	{ 501, "Not Implemented" },
	{ 503, "Service Unavailable" },
	{ 505, "HTTP Version Not Supported" },
	{ 507, "Insufficient Storage" },
};
#define STATUSES (sizeof(statuses) / sizeof(*statuses))

/* Seconds; upper ends of the duration histogram. */
static const double durations[] = {
	.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5
};
#define DURATIONS (sizeof(durations) / sizeof(*durations))

/* What the loop counts. */
static struct {
	uint64_t requests[M_COUNT + 1][STATUSES];	/* last row: none */
	uint64_t took[DURATIONS + 1];
	uint64_t took_us;
	uint64_t received, sent, accepted, refusals, unlogged, connections;
} counters;

static size_t
status_index(int code)
{
	size_t i = 0;

	while (i < STATUSES && statuses[i].code != code)
		i++;
	assert(i < STATUSES);		/* every status has its reason */
	return i;
}

static int
now_ok(struct request *r)
{
	buf_str(&r->text, "ok\n");
	r->type = "text/plain; charset=utf-8";
	return done(r);
}

/* The part of the metrics that the loop knows. */
static int
now_metrics(struct request *r)
{
	static const struct {
		const char *name, *type, *help;
		const uint64_t *value;
	} plain[] = {
		{ "http_received_bytes_total", "counter", "Bytes received.",
		    &counters.received },
		{ "http_sent_bytes_total", "counter", "Bytes sent.",
		    &counters.sent },
		{ "http_refusals_total", "counter", "Requests answered with "
		    "400 or above.", &counters.refusals },
		{ "log_lines_lost_total", "counter", "Log lines dropped "
		    "because nobody read stdout.", &counters.unlogged },
		{ "connections_accepted_total", "counter", "Connections "
		    "accepted.", &counters.accepted },
		{ "connections", "gauge", "Connections now.",
		    &counters.connections },
	};
	struct buf *b = &r->text;
	size_t i, m;

	buf_str(b, "# HELP statesrv_build_info The version.\n"
	    "# TYPE statesrv_build_info gauge\n"
	    "statesrv_build_info{version=\"" VERSION "\"} 1\n"
	    "# HELP statesrv_http_requests_total Requests answered.\n"
	    "# TYPE statesrv_http_requests_total counter\n");
	for (m = 0; m <= M_COUNT; m++)
		for (i = 0; i < STATUSES; i++)
			if (counters.requests[m][i] > 0)
				buf_fmt(b, "statesrv_http_requests_total"
				    "{method=\"%s\",status=\"%d\"} %llu\n",
				    m < M_COUNT ? method_names[m] : "other",
				    statuses[i].code, (unsigned long long)
				    counters.requests[m][i]);
	metric_histogram(b, "http_request_duration_seconds", "From the first "
	    "byte to the last.", durations, counters.took, DURATIONS,
	    (double)counters.took_us / 1e6);
	for (i = 0; i < sizeof(plain) / sizeof(*plain); i++)
		metric(b, plain[i].name, plain[i].type, plain[i].help,
		    (double)*plain[i].value);
	return 0;
}

/* Promise 2: takes whatever file the name leads to at this moment; 404 only
 * if there is none, for terraform reads that as "no state yet" and would
 * build everything a second time. */
static int
now_state(struct request *r)
{
	const struct cached *c = cache_find(r->name);
	struct stat st;
	int fd;

	r->type = "application/json";
	if (c != NULL) {
		r->data = (struct span){ c->data, c->len };
		return done(r);
	}
	if ((fd = name_file(r->name, STATE, &st)) == -1)
		return errno == ENOENT ?
		    refuse(r, 404, "there is no such state") :
		    refuse_errno(r, "read the state");
	if (st.st_size == 0) {
		close_quietly(fd);
		complain("%s: its file is empty", r->name);
		return refuse(r, 500, "the state's file is empty; an earlier "
		    "version may be in the history");
	}
	if (st.st_size > CACHE_FILE) {
		r->file = fd;
		r->left = st.st_size;
		return done(r);
	}
	c = cache_fill(r->name, fd, &st);
	close_quietly(fd);
	if (c == NULL)
		return refuse_errno(r, "read the state");
	r->data = (struct span){ c->data, c->len };
	return done(r);
}

/* Sends a file as it is. */
static int
now_file(struct request *r, int fd, const struct stat *st, const char *what)
{
	if (fd == -1)
		return errno == ENOENT ?
		    refuse(r, 404, "there is no such %s", what) :
		    refuse_errno(r, "read it");
	r->file = fd;
	r->left = st->st_size;
	return done(r);
}

static int
now_version(struct request *r)
{
	struct stat st;

	r->type = "application/json";
	return now_file(r, version_open(r->name, r->version, &st), &st,
	    "version");
}

static int
now_log(struct request *r)
{
	struct stat st;

	r->type = "text/plain; charset=utf-8";
	return now_file(r, name_file(r->name, LOG, &st), &st, "log");
}

static int
now_options(struct request *r)
{
	r->status = 204;
	return 204;
}

enum body { B_NONE, B_INFO, B_STATE };

static const struct action {
	enum right right;
	enum body body;
	int (*now)(struct request *);
	int (*job)(struct request *);
} actions[K_METRICS + 1][M_COUNT] = {
	[K_STATE] = {
		[M_GET] = { R_READ, B_NONE, now_state, NULL },
		[M_HEAD] = { R_READ, B_NONE, now_state, NULL },
		[M_POST] = { R_WRITE, B_STATE, NULL, job_write },
		[M_PUT] = { R_WRITE, B_STATE, NULL, job_write },
		[M_DELETE] = { R_PLAN, B_INFO, NULL, job_delete },
		[M_LOCK] = { R_PLAN, B_INFO, NULL, job_lock },
		[M_UNLOCK] = { R_PLAN, B_INFO, NULL, job_unlock },
	},
	[K_LOCK] = {
		[M_GET] = { R_READ, B_NONE, NULL, page_lock },
		[M_HEAD] = { R_READ, B_NONE, NULL, page_lock },
		[M_POST] = { R_PLAN, B_INFO, NULL, job_lock },
		[M_PUT] = { R_PLAN, B_INFO, NULL, job_lock },
		[M_LOCK] = { R_PLAN, B_INFO, NULL, job_lock },
		[M_DELETE] = { R_PLAN, B_INFO, NULL, job_unlock },
		[M_UNLOCK] = { R_PLAN, B_INFO, NULL, job_unlock },
	},
#define PAGE(now, job) { \
	[M_GET] = { R_READ, B_NONE, now, job }, \
	[M_HEAD] = { R_READ, B_NONE, now, job } }
	[K_ROOT] = PAGE(NULL, page_root),
	[K_VERSIONS] = PAGE(NULL, page_versions),
	[K_VERSION] = PAGE(now_version, NULL),
	[K_CHANGES] = PAGE(NULL, page_changes),
	[K_LOG] = PAGE(now_log, NULL),
	[K_HEALTHY] = PAGE(now_ok, NULL),
	[K_READY] = PAGE(NULL, page_ready),
	[K_METRICS] = PAGE(now_metrics, page_metrics),
};

static const struct action *
action_of(const struct request *r)
{
	static const struct action options = {
		R_NONE, B_NONE, now_options, NULL
	};

	return r->method == M_OPTIONS ? &options :
	    &actions[r->kind][r->method];
}

static void
action_allow(struct buf *b, enum kind kind)
{
	size_t m;

	buf_str(b, "Allow: OPTIONS");
	for (m = 0; m < M_COUNT; m++)
		if (actions[kind][m].now != NULL ||
		    actions[kind][m].job != NULL)
			buf_fmt(b, ", %s", method_names[m]);
	buf_str(b, "\r\n");
}

/* "localhost", or digits and dots, or [: what a name that an attacker's DNS
 * points to 127.0.0.1 cannot be, for browsers take a last label of digits for
 * the end of an address. */
static bool
host_is_local(struct span h)
{
	size_t i = 0, len = 0;

	if (h.len == 0 || *h.ptr == '[')
		return true;
	while (len < h.len && h.ptr[len] != ':')
		len++;
	while (i < len && strchr("0123456789.", h.ptr[i]) != NULL)
		i++;
	return i == len || span_is((struct span){ h.ptr, len }, "localhost");
}

/* Who is it? 0, or 401, which says nothing of what is there. */
static int
admit_user(struct request *r, struct span authorization)
{
	if (r->users == NULL || r->kind == K_HEALTHY || r->kind == K_READY)
		return 0;
	if (authorization.ptr == NULL)
		return refuse(r, 401, "credentials are needed");
	if (!user_shows(r, authorization) || user_right(r, NULL) == R_NONE) {
		memset(r->secret, 0, sizeof(r->secret));
		return refuse(r, 401, "wrong credentials");
	}
	user_name(r);
	return 0;
}

/*
 * Everything that a request's head can be refused for, in the order that
 * tells the least to those who do not belong: pages of other sites, then
 * strangers, then bad names, wrong methods, missing rights, wrong lengths.
 */
static int
admit(struct request *r, const struct head *h, bool guarded)
{
	const struct action *act;
	struct span target = h->target, query = { NULL, 0 };
	const char *wrong, *mark;
	bool found;
	int status;

	if ((mark = memchr(target.ptr, '?', target.len)) != NULL) {
		query.ptr = mark + 1;
		query.len = (size_t)(target.ptr + target.len - query.ptr);
		target.len = (size_t)(mark - target.ptr);
	}
	if (target.len == 0)		/* http://host means http://host/ */
		target = span("/");
	wrong = name_route(target, r, &found);
	if (guarded && !host_is_local(h->host))
		return refuse(r, 403, "the Host is not this machine: without "
		    "users, a loopback server answers to localhost only");
	if (h->field[F_ORIGIN].ptr != NULL && r->method != M_GET && r->method != M_HEAD &&
	    r->method != M_OPTIONS)
		return refuse(r, 403, "no web page may change a state");
	if ((status = admit_user(r, h->field[F_AUTHORIZATION])) != 0)
		return status;
	if (wrong != NULL)
		return refuse(r, 400, "%s", wrong);
	if (!found)
		return refuse(r, 404, "there is no such page");
	if (query.ptr != NULL && name_query(query, r) == -1)
		return refuse(r, 400, "?ID= is given twice, badly escaped, or "
		    "longer than %d bytes", ID_MAX);
	act = action_of(r);
	if (act->now == NULL && act->job == NULL)
		return refuse(r, 405, "%s does not go with this URL",
		    method_names[r->method]);
	r->right = user_right(r, r->kind >= K_HEALTHY || r->kind == K_ROOT ||
	    r->kind == K_STAR ? NULL : r->name);
	if (r->right < act->right && r->kind != K_HEALTHY &&
	    r->kind != K_READY)
		return refuse(r, 403, "the user has no right to %s this",
		    method_names[r->method]);
	return 0;
}

/* Bytes that a request's body has at most. */
static int64_t
body_max(const struct request *r)
{
	return action_of(r)->body == B_STATE ? conf.body_max : LOCK_INFO_MAX;
}

/* What the body's fields can be refused for. */
static int
admit_body(struct request *r, const struct head *h)
{
	const struct action *act = action_of(r);
	int64_t max = body_max(r);

	r->length = h->chunked ? -1 : h->length > 0 ? h->length : 0;
	/* RFC 9110, 13.2 and 14.5: what is asked for on a condition may not
	 * be done as if there were none. */
	if (act->body != B_NONE && h->field[F_RANGE].ptr != NULL)
		return refuse(r, 400, "a state is written whole: there is no "
		    "use for Content-Range");
	if (act->body != B_NONE && (h->field[F_MATCH].ptr != NULL ||
	    h->field[F_NONE_MATCH].ptr != NULL ||
	    h->field[F_UNMODIFIED].ptr != NULL))
		return refuse(r, 412, "no If- conditions here: lock the state "
		    "instead");
	if (act->body == B_STATE && !h->chunked && h->length == -1)
		return refuse(r, 411, "a state comes with Content-Length or "
		    "chunked");
	if (r->length > max)
		return refuse(r, act->body == B_INFO ? 400 : 413,
		    "the body is larger than %lld bytes", (long long)max);
	if (h->field[F_MD5].ptr == NULL)
		return 0;
	r->has_md5 = true;
	if (base64_decode(h->field[F_MD5], r->md5, 16) != 16)
		return refuse(r, 400, "Content-MD5 is not the base64 of 16 "
		    "bytes");
	return 0;
}

/* Prepares an upload: what each piece of the body will be fed to. */
static int
upload_begin(struct request *r)
{
	struct upload *up = calloc(1, sizeof(*up));

	if (up == NULL)
		return refuse(r, 503, "out of memory");
	up->md5 = md5_start;
	up->json.on = meta_on;
	up->json.to = &up->meta;
	up->fd = -1;
	up->hash = r->has_md5 || r->length <= HASH_MAX;
	r->up = up;
	return 0;
}

/* ==== connections ========================================================
 *
 * One thread, one poll. A connection is in one of a few states, each with a
 * step that does what can be done now: NEXT, the state has changed, go on;
 * WAIT for the descriptor; GONE. Busy connections stand at the front of the
 * poll set, and only they are polled on most turns, so that thousands of
 * idle ones cost next to nothing. An idle one has no buffer and no request.
 */
enum step { NEXT, WAIT, GONE };

enum conn_state {
	C_HEAD,		/* between requests, or a head is coming */
	C_BODY,		/* a body is coming */
	C_JOB,		/* a commit thread has the request */
	C_DENY,		/* a wrong secret waits for its answer */
	C_REPLY,	/* the answer is going out */
	C_DRAIN,	/* told all: the client may finish, and close */
	C_COUNT
};

struct conn {
	int fd;
	unsigned slot;			/* in the poll set */
	enum conn_state state;
	bool readable;			/* poll said so; not read dry since */
	bool begun;			/* the first byte of a head is here */
	bool fronted;			/* by a unix socket */
	bool spoken;			/* the time for a PROXY line is over */
	bool guarded;			/* answers to localhost only */
	bool unread;			/* more of a body would have come */
	bool expects;			/* 100-continue is to be sent */
	unsigned blanks;		/* empty lines skipped */
	unsigned served;		/* requests */
	int64_t since;			/* ms: last change of state */
	int64_t active;			/* ms: poll last had news */
	uint64_t order;			/* that news among all */
	int64_t deadline;		/* ms */
	char *in;			/* HEAD_MAX bytes, or NULL */
	size_t at, used, seen;		/* of in */
	struct request *r;
	struct chunks chunks;
	int64_t got;			/* of the body, or sent of the answer */
	struct buf out;			/* what of the answer did not fit */
	size_t out_at;
	char peer[56];
};

static struct {
	struct pollfd fd[1 + LISTENERS_MAX + SLOTS_MAX];
	struct conn *at[1 + LISTENERS_MAX + SLOTS_MAX];	/* from base on */
	unsigned base;			/* wake pipe and listeners */
	unsigned hot;			/* end of the busy ones */
	unsigned n;
	unsigned max;			/* connections */
	unsigned peak;			/* most of them since the last trim */
} set;

static struct listener {
	bool local;			/* loopback */
	bool path;			/* unix socket */
	char name[128];
} listeners[LISTENERS_MAX];

static struct {
	int64_t us;			/* monotonic, of this turn */
	int64_t now;			/* the same in ms */
	bool stopping;
	int64_t stop;			/* when to give up waiting */
	int64_t rest;			/* no accepting until then */
	uint64_t order;			/* news so far */
	pid_t child;			/* the wrapper's command, or 0 */
	bool shares_terminal;		/* it and we, in the foreground */
	int status;			/* its exit status */
	char locked[ID_MAX + 1];	/* the lock it took last */
	struct buf log;			/* of this turn */
	bool log_blocks;		/* stdout is a pipe or terminal */
} loop;

static const struct state_row {
	enum step (*step)(struct conn *);
	short events;
	int64_t ms;			/* at most so long in that state */
} conn_states[C_COUNT];

/* ---- the poll set ---- */

static void
set_swap(unsigned a, unsigned b)
{
	struct pollfd fd = set.fd[a];
	struct conn *c = set.at[a];

	if (a == b)
		return;
	set.fd[a] = set.fd[b];
	set.at[a] = set.at[b];
	set.fd[b] = fd;
	set.at[b] = c;
	set.at[a]->slot = a;
	set.at[b]->slot = b;
}

static void
set_hot(struct conn *c)
{
	if (c->slot >= set.hot)
		set_swap(c->slot, set.hot++);
}

static void
set_cold(struct conn *c)
{
	if (c->slot < set.hot)
		set_swap(c->slot, --set.hot);
}

static void
set_add(struct conn *c)
{
	c->slot = set.n++;
	set.fd[c->slot] = (struct pollfd){ .fd = c->fd };
	set.at[c->slot] = c;
	set_hot(c);
	if (set.peak < set.n - set.base)
		set.peak = set.n - set.base;
}

static void
set_remove(struct conn *c)
{
	set_cold(c);
	set_swap(c->slot, --set.n);
}

/* ---- requests ---- */

static void
head_free(struct conn *c)
{
	free(c->in);
	c->in = NULL;
	c->at = c->used = c->seen = 0;
}

static void
request_free(struct request *r)
{
	users_drop(r->users);
	lock_free(&r->lock);
	buf_free(&r->text);
	close_quietly(r->file);
	free(r->body);
	free(r->up);
	free(r);
}

/* The request's connection is gone. An upload's file goes by a job. */
static void
request_abandon(struct request *r)
{
	r->conn = NULL;
	r->tell = NULL;
	if (r->up == NULL || r->up->fd == -1 ||
	    job_submit(r, job_abandon, false) == -1) {
		if (r->up != NULL)
			tmp_remove(r->up);
		request_free(r);
	}
}

static struct request *
request_new(struct conn *c)
{
	struct request *r = calloc(1, sizeof(*r));

	if (r == NULL)
		return NULL;
	r->conn = c;
	r->file = -1;
	r->method = M_COUNT;
	r->kind = K_STAR;
	r->start = loop.us;
	r->fronted = c->fronted;
	memcpy(r->client, c->peer, sizeof(c->peer));
	if ((r->users = users) != NULL)
		users->refs++;
	return r;
}

/* ---- the request log ---- */

/* Appends key=value, quoted if it must be. */
static void
logfmt(const char *key, const char *value)
{
	const unsigned char *p = (const unsigned char *)value;

	buf_str(&loop.log, key);
	while (*p > ' ' && *p != '"' && *p != '=' && *p != '\\' && *p < 0x7f)
		p++;
	if (*p == '\0' && *value != '\0')
		buf_str(&loop.log, value);
	else
		buf_json(&loop.log, value);
}

/* One line for a request that was answered, or whose client went away. */
static void
log_request(const struct request *r, int64_t us)
{
	static const char *const pages[K_METRICS + 1] = {
		[K_LOCK] = "lock", [K_VERSIONS] = "versions",
		[K_VERSION] = "version", [K_CHANGES] = "changes",
		[K_LOG] = "log"
	};
	static int64_t second;
	static char when[32];
	struct buf *b = &loop.log;
	int64_t ms = clock_us(CLOCK_REALTIME) / 1000;
	bool named = r->kind != K_STAR && r->kind != K_ROOT &&
	    r->kind < K_HEALTHY;

	if (conf.command != NULL)	/* stdout is the command's */
		return;
	if (ms / 1000 != second) {
		second = ms / 1000;
		time_text(when, ms, false);
	}
	buf_str(b, "time=");
	buf_add(b, when, 20);
	buf_num(b, ms % 1000, 3);
	buf_str(b, "Z client=");
	buf_str(b, *r->client != '\0' ? r->client : "unix");
	if (*r->user != '\0')
		logfmt(" user=", r->user);
	buf_str(b, " method=");
	buf_str(b, r->method < M_COUNT ? method_names[r->method] : "-");
	if (*r->name != '\0')
		logfmt(named ? " name=" : " path=", r->name);
	if (named && pages[r->kind] != NULL) {
		buf_str(b, " page=");
		buf_str(b, pages[r->kind]);
	}
	buf_str(b, " status=");
	buf_num(b, r->status, 1);
	buf_str(b, " bytes=");
	buf_num(b, r->sent, 1);
	buf_str(b, " ms=");
	buf_num(b, us / 1000, 1);
	buf_str(b, ".");
	buf_num(b, us % 1000, 3);
	if (*r->id != '\0')
		logfmt(" id=", r->id);
	if (*r->why != '\0')
		logfmt(" why=", r->why);
	buf_str(b, "\n");
}

/*
 * Writes the turn's lines. A reader of stdout that does not read must not
 * stop the server: a pipe that polls writable takes PIPE_BUF at once, and
 * what it does not take is counted and dropped.
 */
static void
log_flush(void)
{
	struct pollfd out = { .fd = STDOUT_FILENO, .events = POLLOUT };
	struct buf *b = &loop.log;
	size_t at = 0, n;

	while (at < b->len) {
		n = b->len - at;
		if (n > PIPE_BUF) {	/* whole lines, if they are short */
			for (n = PIPE_BUF; n > 0 && b->data[at + n - 1] != '\n';)
				n--;
			n = n > 0 ? n : PIPE_BUF;
		}
		if (loop.log_blocks && (poll(&out, 1, 0) != 1 ||
		    (out.revents & POLLOUT) == 0))
			break;
		if (write_all(STDOUT_FILENO, b->data + at, n) == -1)
			break;
		at += n;
	}
	for (; at < b->len; at++)
		counters.unlogged += b->data[at] == '\n';
	b->len = 0;
	b->failed = false;
}

static void
count_request(const struct request *r, int64_t us)
{
	double seconds = (double)us / 1e6;
	size_t i = 0;

	counters.requests[r->method][status_index(r->status)]++;
	counters.refusals += r->status >= 400;
	while (i < DURATIONS && seconds > durations[i])
		i++;
	counters.took[i]++;
	counters.took_us += (uint64_t)us;
}

/* A request has been answered: counts and logs it. */
static void
request_told(const struct request *r)
{
	int64_t us = clock_us(CLOCK_MONOTONIC) - r->start;

	count_request(r, us);
	log_request(r, us);
}

/* -v: what goes over the wire, on stderr, credentials blanked. */
static void
trace(const char *mark, const char *data, size_t len)
{
	const char *p = data, *end = data + len, *lf;
	size_t name;

	if (!conf.verbose)
		return;
	for (; p < end; p = lf + 1) {
		if ((lf = memchr(p, '\n', (size_t)(end - p))) == NULL)
			lf = end;
		for (name = 0; p + name < lf && p[name] != ':'; name++)
			continue;
		if (name >= 6 && (strncasecmp(p + name - 6, "cookie", 6) == 0 ||
		    (name >= 13 && strncasecmp(p + name - 13, "authorization",
		    13) == 0)))
			(void)fprintf(stderr, "%s %.*s: ***\n", mark,
			    (int)name, p);
		else
			(void)fprintf(stderr, "%s %.*s\n", mark,
			    (int)(lf - p), p);
	}
}

/* ---- a connection's life ---- */

static void
conn_go(struct conn *c, enum conn_state state)
{
	const struct state_row *row = &conn_states[state];

	c->state = state;
	if (state != C_JOB)		/* a pause in what it was doing */
		c->since = loop.now;
	c->deadline = row->ms > 0 ? loop.now + row->ms : INT64_MAX;
	set.fd[c->slot].events = row->events;
	/* A descriptor that nobody waits for would report POLLHUP for ever. */
	set.fd[c->slot].fd = row->events != 0 ? c->fd : ~c->fd;
}

/* Bytes have come or gone: a second more for every RATE of them, so that a
 * trickle ends, but never credit for a longer silence than at first. */
static void
conn_progress(struct conn *c)
{
	c->deadline = c->since + BODY_MS + c->got * 1000 / RATE;
	if (c->deadline > loop.now + BODY_MS)
		c->deadline = loop.now + BODY_MS;
}

static void
conn_close(struct conn *c)
{
	if (c->r != NULL) {
		assert(c->state != C_JOB);
		if (c->r->status != 0)	/* done, and nobody to tell it to */
			request_told(c->r);
		request_abandon(c->r);
	}
	set_remove(c);
	(void)close(c->fd);
	head_free(c);
	buf_free(&c->out);
	counters.connections--;
	free(c);
#ifdef __GLIBC__
	/* What thousands needed is given back when they are gone. */
	if (set.peak > 512 && set.n - set.base < set.peak / 8) {
		(void)malloc_trim(0);
		set.peak = 0;
	}
#endif
}

/* Runs a connection, after a step, as far as it will go now. */
static void
conn_drive(struct conn *c, enum step step)
{
	while (step == NEXT)
		step = conn_states[c->state].step(c);
	if (step == GONE)
		conn_close(c);
}

/* Reads what is there, up to size bytes: how many, 0 at the end or after an
 * error, -1 if nothing is there now. */
static ssize_t
conn_recv(struct conn *c, char *data, size_t size)
{
	ssize_t n;

	if (!c->readable)
		return -1;
	n = recv(c->fd, data, size, 0);
	if (n == -1 && (errno == EAGAIN || errno == EWOULDBLOCK ||
	    errno == EINTR)) {
		c->readable = false;
		return -1;
	}
	if (n <= 0)
		return 0;
	if ((size_t)n < size)
		c->readable = false;	/* poll will tell of more */
	counters.received += (uint64_t)n;
	return n;
}

/* The answer's fields, for any kind of answer. */
static void
reply_fields(const struct request *r, struct buf *b)
{
	static const char days[] = "SunMonTueWedThuFriSat";
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	static __thread time_t second = -1;
	static __thread char date[64];
	struct tm tm;

	if (r->date != second) {
		second = r->date;
		(void)gmtime_r(&second, &tm);
		(void)snprintf(date, sizeof(date), "\r\nDate: %.3s, %02d %.3s "
		    "%04d %02d:%02d:%02d GMT", &days[3 * tm.tm_wday],
		    tm.tm_mday, &months[3 * tm.tm_mon],
		    (tm.tm_year + 1900) % 10000, tm.tm_hour, tm.tm_min,
		    tm.tm_sec);
	}
	buf_str(b, r->tls ? "HTTP/1.0 " : "HTTP/1.1 ");
	buf_num(b, r->status, 3);
	buf_str(b, " ");
	buf_str(b, statuses[status_index(r->status)].reason);
	buf_str(b, date);
	if (r->status != 204) {
		buf_str(b, "\r\nContent-Length: ");
		buf_num(b, (int64_t)r->data.len + (int64_t)r->left, 1);
	}
	if (r->type != NULL && r->status != 204) {
		buf_str(b, "\r\nContent-Type: ");
		buf_str(b, r->type);
		buf_str(b, "\r\nX-Content-Type-Options: nosniff"
		    "\r\nCache-Control: no-store");
	}
	buf_str(b, "\r\n");
	if (r->type != NULL && strncmp(r->type, "text/html", 9) == 0)
		page_csp(b);
	if (r->status == 401)
		buf_str(b, "WWW-Authenticate: Basic realm=\"statesrv\", "
		    "charset=\"UTF-8\"\r\n");
	if (r->status == 503)
		buf_str(b, "Retry-After: 1\r\n");
	if (r->status == 405 || r->status == 204)
		action_allow(b, r->kind);
	if (!r->keep)
		buf_str(b, "Connection: close\r\n");
	else if (r->http10)
		buf_str(b, "Connection: keep-alive\r\n");
	buf_str(b, "\r\n");
}

/*
 * A commit thread tells the client that all is well, before it hands the
 * request back: as long as its connection is in C_JOB, it is the job's. That
 * saves waking the loop first, which a single client that writes feels. The
 * loop does what is left: the rest of the head, if not all fitted, and logs.
 */
static void
reply_early(struct request *r)
{
	struct buf head = { 0 };
	ssize_t n = -1;

	if (r->status != 200 || r->text.len > 0 || r->text.failed)
		return;
	r->date = time(NULL);
	reply_fields(r, &head);
	if (!head.failed)
		n = send(r->conn->fd, head.data, head.len, 0);
	r->told = n > 0 ? (size_t)n : 0;
	buf_free(&head);
}

/* Holds small packets back while pieces of a file go out. */
static void
conn_cork(const struct conn *c, int on)
{
#ifdef TCP_CORK
	(void)setsockopt(c->fd, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
#else
	(void)c;
	(void)on;
#endif
}

/* Sends head and body together; what does not fit is kept in c->out. */
static enum step
reply_send(struct conn *c, struct span head, struct span body)
{
	struct iovec v[2] = {
		{ .iov_len = head.len }, { .iov_len = body.len }
	};
	struct msghdr m = { .msg_iov = v, .msg_iovlen = 2 };
	size_t sent, skip;
	ssize_t n;

	if (head.len == 0)		/* a commit thread has sent it all */
		return NEXT;
	/* sendmsg only reads them; its iovec is from before there was const */
	memcpy(&v[0].iov_base, &head.ptr, sizeof(void *));
	memcpy(&v[1].iov_base, &body.ptr, sizeof(void *));
	/* The last answer, and the end of the connection, are one packet. */
	n = sendmsg(c->fd, &m, c->r->keep ? 0 : MSG_MORE);
	if (n == -1 && errno != EAGAIN && errno != EWOULDBLOCK &&
	    errno != EINTR)
		return GONE;
	sent = n > 0 ? (size_t)n : 0;
	counters.sent += sent;
	if (sent < head.len)
		buf_add(&c->out, head.ptr + sent, head.len - sent);
	skip = sent > head.len ? sent - head.len : 0;
	if (skip < body.len)
		buf_add(&c->out, body.ptr + skip, body.len - skip);
	return c->out.failed ? GONE : NEXT;
}

/* The request has its answer: begins to send it. */
static enum step
conn_answer(struct conn *c)
{
	static struct buf head;		/* reused: the loop is one thread */
	struct request *r = c->r;

	if (r->text.len > 0)
		r->data = (struct span){ r->text.data, r->text.len };
	if (r->text.failed) {
		(void)refuse(r, 503, "out of memory");
		r->data = (struct span){ "out of memory\n", 14 };
	}
	if (r->told == 0) {
		r->keep = r->keep && !c->unread && !loop.stopping;
		r->date = time(NULL);
	}
	head.len = 0;
	head.failed = false;
	reply_fields(r, &head);
	conn_go(c, C_REPLY);
	if (head.failed)
		return GONE;
	trace("<", head.data, head.len);
	if (r->method == M_HEAD) {
		close_quietly(r->file);
		r->file = -1;
		r->left = 0;
		r->data.len = 0;
	}
	if (r->data.len > 0)
		trace("<", r->data.ptr, r->data.len);
	r->sent = (int64_t)r->data.len + (int64_t)r->left;
	c->got = 0;
	if (r->left > 0)
		conn_cork(c, 1);
	counters.sent += r->told;
	return reply_send(c, (struct span){ head.data + r->told,
	    head.len - r->told }, r->data);
}

/* Sets a refusal that ends the connection, and answers it. */
static enum step
conn_refuse(struct conn *c, int status, const char *why)
{
	c->r->keep = false;
	c->unread = true;
	(void)refuse(c->r, status, "%s", why);
	return conn_answer(c);
}

/* Hands the request to the commit threads, and waits for them. */
static enum step
conn_submit(struct conn *c, int (*run)(struct request *), bool ordered)
{
	conn_go(c, C_JOB);
	return job_submit(c->r, run, ordered) == 0 ? WAIT :
	    conn_refuse(c, 503, "no thread to do it");
}

/* ---- C_HEAD ---- */

/* Takes over an address that a front tells, if it is one. */
static void
peer_told(char *out, size_t size, struct span address)
{
	unsigned char bytes[16];
	char text[INET6_ADDRSTRLEN];

	span_copy(text, sizeof(text), address);
	if (inet_pton(AF_INET, text, bytes) == 1 ||
	    inet_pton(AF_INET6, text, bytes) == 1)
		(void)snprintf(out, size, "%s", text);
}

/* What a front says about its client: the PROXY protocol, version 1. Only a
 * front can connect to a unix socket, by the rights of its file. */
static enum step
conn_proxy(struct conn *c)
{
	char line[108], *save = NULL, *family, *address;
	char *lf = memchr(c->in, '\n', c->used);
	size_t n = lf == NULL ? c->used : (size_t)(lf - c->in) + 1;

	if (lf == NULL && n < sizeof(line))
		return WAIT;
	if (lf == NULL || n >= sizeof(line))
		return GONE;
	span_copy(line, sizeof(line), (struct span){ c->in, n });
	(void)strtok_r(line, " \r\n", &save);	/* PROXY */
	family = strtok_r(NULL, " \r\n", &save);
	address = strtok_r(NULL, " \r\n", &save);
	if (family == NULL || (strcmp(family, "TCP4") != 0 &&
	    strcmp(family, "TCP6") != 0 && strcmp(family, "UNKNOWN") != 0))
		return GONE;
	c->spoken = true;
	(void)snprintf(c->peer, sizeof(c->peer), "unix");
	if (address != NULL)
		peer_told(c->peer, sizeof(c->peer), span(address));
	c->at = n;
	return NEXT;
}

/* Skips what may come before a request line; true if that is too much. */
static bool
conn_blanks(struct conn *c)
{
	while (c->used - c->at >= 2 && c->in[c->at] == '\r' &&
	    c->in[c->at + 1] == '\n') {
		c->at += 2;
		if (++c->blanks > BLANKS_MAX)
			return true;
	}
	return false;
}

/* Closes the gap that consumed bytes left at the front of the buffer. */
static void
conn_compact(struct conn *c)
{
	if (c->at == 0)
		return;
	memmove(c->in, c->in + c->at, c->used - c->at);
	c->used -= c->at;
	c->at = 0;
	c->seen = 0;
}

/* Copies what outlives the head, asks whether it may come in. */
static int
request_read(struct conn *c, const struct head *h)
{
	struct request *r = c->r;
	struct span last = { NULL, 0 }, list = h->field[F_FORWARDED];
	int status;

	r->method = h->method;
	r->keep = h->keep;
	r->http10 = h->minor == 0;
	r->form = http_lists(h->field[F_ACCEPT], "text/html") ? HTML :
	    http_lists(h->field[F_ACCEPT], "application/json") ? JSON : TEXT;
	span_copy(r->host, sizeof(r->host), h->host);
	while (span_next(&list, &last))
		continue;
	if (c->fronted && c->peer[0] == '\0' && last.len > 0)
		peer_told(r->client, sizeof(r->client), last);
	status = admit(r, h, c->guarded);
	return status != 0 ? status : admit_body(r, h);
}

/* A head is complete: refuse it, read its body, or do it. */
static enum step
conn_request(struct conn *c, const struct head *h)
{
	struct request *r = c->r;
	int status = request_read(c, h);

	c->chunks = (struct chunks){ .room = (uint64_t)body_max(r) };
	c->got = 0;
	c->expects = h->field[F_EXPECT].ptr != NULL && h->minor == 1;
	c->unread = h->chunked || h->length > 0;
	c->unread |= status == 411;	/* who knows what comes next */
	if (status == 401 && h->field[F_AUTHORIZATION].ptr != NULL) {
		conn_go(c, C_DENY);
		return WAIT;
	}
	if (status != 0)
		return conn_answer(c);
	conn_go(c, C_BODY);
	if (action_of(r)->body != B_STATE)
		return NEXT;
	if (upload_begin(r) != 0)
		return conn_answer(c);
	/* A body that is large, or has not begun to come, is waited for only
	 * if the write could land. */
	if (!c->expects && !h->chunked && r->length <= BODY_MEM &&
	    (c->at < c->used || r->length == 0))
		return NEXT;
	return conn_submit(c, job_look, true);
}

/* Looks at what has come: NEXT if there was a request, WAIT for more. */
static enum step
conn_parse(struct conn *c)
{
	struct head h = { .method = M_COUNT, .why = "too many empty lines" };
	enum step step;
	int n;

	if (c->fronted && !c->spoken && c->at == 0 && c->used >= 6 &&
	    memcmp(c->in, "PROXY ", 6) == 0 &&
	    (step = conn_proxy(c)) != NEXT)
		return step;
	c->spoken |= c->used >= 6;
	if (conn_blanks(c))
		n = -400;
	else {
		conn_compact(c);
		if (c->used == 0)
			return WAIT;
		n = *c->in == 0x16 ? -400 :
		    http_parse(c->in, c->used, &c->seen, &h);
	}
	if (n == 0)
		return WAIT;
	if ((c->r = request_new(c)) == NULL)
		return GONE;
	/* Go's client, seeing HTTP/1.0, says at once what is the matter. */
	c->r->tls = *c->in == 0x16;
	c->r->method = n < 0 ? h.method : M_COUNT;	/* HEAD has no body */
	if (n < 0)
		return conn_refuse(c, -n, c->r->tls ? "this is TLS, and the "
		    "port speaks plain HTTP" : h.why);
	trace(">", c->in, (size_t)n);
	c->at = (size_t)n;
	c->blanks = 0;
	return conn_request(c, &h);
}

static enum step
conn_head(struct conn *c)
{
	enum step step;
	ssize_t n;

	set.fd[c->slot].events = POLLIN;
	for (;;) {
		if (c->used == c->at)
			c->used = c->at = c->seen = 0;
		else {
			if (!c->begun)
				c->deadline = loop.now + HEAD_MS;
			c->begun = true;
			step = conn_parse(c);
			if (step != WAIT || c->state != C_HEAD)
				return step;
		}
		if (c->in == NULL && (c->in = malloc(HEAD_MAX)) == NULL)
			return GONE;
		n = conn_recv(c, c->in + c->used, HEAD_MAX - c->used);
		if (n == 0)
			return GONE;
		if (n == -1)
			break;
		c->used += (size_t)n;
	}
	if (c->used == 0)
		head_free(c);
	return WAIT;
}

/* ---- C_BODY ---- */

/* Makes room in r->body; false if memory ran out. It is full at size. */
static bool
body_room(struct request *r, size_t size)
{
	size_t cap = r->cap > 0 ? 2 * r->cap : 4096;
	char *body;

	if (r->len < r->cap)
		return true;
	if (r->cap == 0 && r->length > 0)
		cap = r->length < (int64_t)size ? (size_t)r->length : size;
	if (cap > size)
		cap = size;
	if (cap == r->cap)
		return true;
	if ((body = realloc(r->body, cap)) == NULL)
		return false;
	r->body = body;
	r->cap = cap;
	return true;
}

/* Moves body bytes from c->in to r->body; 0 or a status. */
static int
body_move(struct conn *c)
{
	struct request *r = c->r;
	struct span in = { c->in + c->at, c->used - c->at };
	size_t n = r->cap - r->len, before = r->len, used;
	int status = 0;

	if (r->length >= 0) {
		if (n > in.len)
			n = in.len;
		if ((int64_t)n > r->length - c->got)
			n = (size_t)(r->length - c->got);
		if (n > 0)
			memcpy(r->body + r->len, in.ptr, n);
		r->len += n;
		c->at += n;
	} else {
		status = -chunk_decode(&c->chunks, in, &used, r->body,
		    &r->len, r->cap);
		c->at += used;
	}
	c->got += (int64_t)(r->len - before);
	return status;
}

static bool
body_complete(const struct conn *c)
{
	return c->r->length >= 0 ? c->got == c->r->length :
	    c->chunks.state == CH_DONE;
}

/* Reads more of the body: straight to where it goes, if it is not chunked
 * and the buffer is empty. As conn_recv. */
static ssize_t
body_recv(struct conn *c)
{
	struct request *r = c->r;
	size_t n = r->cap - r->len;
	ssize_t got;

	if (r->length >= 0 && c->at == c->used && r->cap > 0) {
		if ((int64_t)n > r->length - c->got)
			n = (size_t)(r->length - c->got);
		got = conn_recv(c, r->body + r->len, n);
		if (got > 0) {
			r->len += (size_t)got;
			c->got += got;
		}
		return got;
	}
	if (c->in == NULL && (c->in = malloc(HEAD_MAX)) == NULL)
		return 0;
	conn_compact(c);
	got = conn_recv(c, c->in + c->used, HEAD_MAX - c->used);
	if (got > 0)
		c->used += (size_t)got;
	return got;
}

/* The body is there, and the action can be done. */
static enum step
body_done(struct conn *c)
{
	struct request *r = c->r;
	const struct action *act = action_of(r);

	c->unread = false;
	if (r->len > 0)
		trace(">", r->body, r->len);
	if ((act->now != NULL && act->now(r) != 0) || act->job == NULL)
		return conn_answer(c);
	r->tell = loop.stopping ? NULL : reply_early;
	return conn_submit(c, act->job, true);
}

static enum step
body_continue(struct conn *c)
{
	static const char line[] = "HTTP/1.1 100 Continue\r\n\r\n";

	c->expects = false;
	if (c->at < c->used)		/* it did not wait for our leave */
		return NEXT;
	/* So short a line fits, or the client has stopped reading. */
	return send(c->fd, line, sizeof(line) - 1, 0) ==
	    (ssize_t)sizeof(line) - 1 ? NEXT : GONE;
}

static enum step
conn_body(struct conn *c)
{
	struct request *r = c->r;
	bool state = action_of(r)->body == B_STATE;
	size_t size = state ? SPOOL : LOCK_INFO_MAX;
	ssize_t n;
	int status;

	if (c->expects && !body_complete(c) && body_continue(c) == GONE)
		return GONE;
	for (;;) {
		if (!body_complete(c) && !body_room(r, size))
			return conn_refuse(c, 503, "out of memory");
		status = c->at < c->used ? body_move(c) : 0;
		if (status == 413)
			return conn_refuse(c, state ? 413 : 400,
			    "the body is too large");
		if (status != 0)
			return conn_refuse(c, status, status == 431 ?
			    "the trailer is too large" :
			    "the chunked body is malformed");
		if (body_complete(c))
			return body_done(c);
		conn_progress(c);
		if (state && r->len == size) {
			trace(">", r->body, r->len);
			return conn_submit(c, upload_piece, false);
		}
		if (c->at < c->used)
			continue;
		if ((n = body_recv(c)) == 0)
			return conn_refuse(c, 400, "the body is not complete");
		if (n == -1)
			return WAIT;
	}
}

/* ---- C_JOB ---- */

static enum step
conn_job(struct conn *c)
{
	(void)c;
	return WAIT;
}

/* A commit thread has answered. */
static void
conn_job_done(struct request *r)
{
	struct conn *c = r->conn;
	bool goes_on = r->status == 0;
	enum step step = NEXT;
	int64_t since;

	if (c == NULL) {		/* was abandoned */
		request_free(r);
		return;
	}
	set_hot(c);
	if (goes_on && (r->run == job_look || r->run == upload_piece)) {
		since = r->run == job_look ? loop.now : c->since;
		conn_go(c, C_BODY);
		c->since = since;	/* the rate counts from the start */
		c->readable = true;
	} else
		step = conn_answer(c);
	conn_drive(c, step);
}

/* ---- C_REPLY and C_DRAIN ---- */

/* Sends from the file; as send(2). */
static ssize_t
reply_file(struct conn *c)
{
	struct request *r = c->r;
	size_t n = r->left < SEND_MAX ? (size_t)r->left : SEND_MAX;
	ssize_t sent;

#ifdef __linux__
	sent = sendfile(c->fd, r->file, &r->off, n);
#else
	static char piece[65536];

	sent = read_at(r->file, piece, n < sizeof(piece) ? n : sizeof(piece),
	    r->off);
	if (sent > 0)
		sent = send(c->fd, piece, (size_t)sent, 0);
	if (sent > 0)
		r->off += sent;
#endif
	if (sent > 0)
		r->left -= sent;
	return sent;
}

/* We are stopping, and this one asks for nothing: it may go, unless its next
 * request has come just now. */
static enum step
conn_leave(struct conn *c)
{
	enum step step;

	c->readable = true;
	step = conn_head(c);
	return step == WAIT && c->state == C_HEAD && !c->begun ? GONE : step;
}

/* RFC 9112, 9.6: to close while bytes are unread, or with much unsent, would
 * reset the connection, and the client might lose the answer with it. */
static bool
conn_may_close(const struct conn *c, bool large)
{
	char byte;

	return !large && !c->unread && c->used == c->at &&
	    recv(c->fd, &byte, 1, MSG_PEEK) != 1;
}

/* The answer is out: log it, and on to the next. */
static enum step
reply_end(struct conn *c)
{
	struct request *r = c->r;
	bool keep = r->keep, large = r->file != -1 || c->out.len > 0;

	if (r->file != -1 && keep)	/* the end uncorks it, too */
		conn_cork(c, 0);
	request_told(r);
	if (r->run == job_lock && r->status == 200)
		(void)snprintf(loop.locked, sizeof(loop.locked), "%s", r->id);
	buf_free(&c->out);
	c->out_at = 0;
	c->r = NULL;
	request_abandon(r);
	c->begun = false;
	if (keep) {
		conn_go(c, C_HEAD);
		if (loop.stopping)
			return conn_leave(c);
		if (c->used == c->at && !c->readable) {
			head_free(c);
			return WAIT;
		}
		if (++c->served % TURN_MAX != 0)
			return NEXT;
		/* The others' turn. It can be written to: so poll will bring
		 * us back at once, whatever is in the buffer. */
		set.fd[c->slot].events |= POLLOUT;
		return WAIT;
	}
	(void)shutdown(c->fd, SHUT_WR);
	if (conn_may_close(c, large))
		return GONE;
	conn_go(c, C_DRAIN);
	c->readable = true;
	return NEXT;
}

static enum step
conn_reply(struct conn *c)
{
	struct request *r = c->r;
	ssize_t n;

	if (c->out_at < c->out.len) {
		n = send(c->fd, c->out.data + c->out_at,
		    c->out.len - c->out_at, 0);
		if (n > 0)
			c->out_at += (size_t)n;
	} else if (r->left > 0) {
		if ((n = reply_file(c)) == 0)
			return GONE;	/* the file was cut off */
	} else
		return reply_end(c);
	if (n == -1)
		return errno == EAGAIN || errno == EWOULDBLOCK ||
		    errno == EINTR ? WAIT : GONE;
	counters.sent += (uint64_t)n;
	c->got += n;
	conn_progress(c);
	return c->out_at < c->out.len || r->left > 0 ? WAIT : NEXT;
}

static enum step
conn_drain(struct conn *c)
{
	static char sink[65536];
	ssize_t n;
	int turns;

	for (turns = 0; turns < 16; turns++)
		if ((n = conn_recv(c, sink, sizeof(sink))) <= 0)
			return n == 0 ? GONE : WAIT;
	return WAIT;			/* the others' turn */
}

static const struct state_row conn_states[C_COUNT] = {
	[C_HEAD]  = { conn_head,  POLLIN,  IDLE_MS  },
	[C_BODY]  = { conn_body,  POLLIN,  BODY_MS  },
	[C_JOB]   = { conn_job,   0,       0        },
	[C_DENY]  = { conn_job,   0,       DENY_MS  },
	[C_REPLY] = { conn_reply, POLLOUT, BODY_MS },
	[C_DRAIN] = { conn_drain, POLLIN,  DRAIN_MS },
};

/* A deadline has passed. */
static void
conn_late(struct conn *c)
{
	enum step step = GONE;

	if (c->state == C_DENY)
		step = conn_answer(c);
	else if (c->state == C_BODY)
		step = conn_refuse(c, 408, "the body came too slowly");
	else if (c->state == C_HEAD && c->begun &&
	    (c->r = request_new(c)) != NULL)
		step = conn_refuse(c, 408, "the head came too slowly");
	conn_drive(c, step);
}

/* ---- accepting ---- */

/* Makes room by closing the connection that is idle for longest, and for
 * so many milliseconds at least; else the listeners rest, or poll would spin
 * on what cannot be accepted. */
static bool
conn_evict(int64_t ms)
{
	struct conn *c, *oldest = NULL;
	unsigned i;

	for (i = set.base; i < set.n; i++) {
		c = set.at[i];
		/* What waits for a client in the middle of a request is not
		 * idle yet, but after a few seconds of silence. */
		if (c->state == C_JOB || ((c->state == C_BODY ||
		    c->state == C_REPLY) && loop.now - c->active < STALL_MS))
			continue;
		if (oldest == NULL || c->order < oldest->order)
			oldest = c;
	}
	if (oldest == NULL || loop.now - oldest->active < ms) {
		loop.rest = loop.now + 50;
		return false;
	}
	conn_close(oldest);
	return true;
}

static int
accept_fd(int fd, struct sockaddr_storage *peer, socklen_t *len)
{
#ifdef __linux__
	return accept4(fd, (struct sockaddr *)peer, len,
	    SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
	int c = accept(fd, (struct sockaddr *)peer, len);

	if (c != -1 && (fcntl(c, F_SETFL, O_NONBLOCK) == -1 ||
	    fcntl(c, F_SETFD, FD_CLOEXEC) == -1)) {
		close_quietly(c);
		return -1;
	}
	return c;
#endif
}

static void
peer_text(const struct sockaddr_storage *peer, char *out, size_t size)
{
	const struct sockaddr_in *four = (const void *)peer;
	const struct sockaddr_in6 *six = (const void *)peer;
	char text[INET6_ADDRSTRLEN] = "";

	*out = '\0';
	if (peer->ss_family == AF_INET &&
	    inet_ntop(AF_INET, &four->sin_addr, text, sizeof(text)) != NULL)
		(void)snprintf(out, size, "%s:%u", text,
		    ntohs(four->sin_port));
	else if (peer->ss_family == AF_INET6 &&
	    inet_ntop(AF_INET6, &six->sin6_addr, text, sizeof(text)) != NULL)
		(void)snprintf(out, size, "[%s]:%u", text,
		    ntohs(six->sin6_port));
}

static void
conn_open(int fd, const struct listener *l, const struct sockaddr_storage *p)
{
	struct conn *c = malloc(sizeof(*c));

	if (c == NULL) {
		(void)close(fd);
		return;
	}
	*c = (struct conn){ .fd = fd, .readable = true, .active = loop.now,
	    .order = ++loop.order, .fronted = l->path,
	    .guarded = l->local && users == NULL };
	peer_text(p, c->peer, sizeof(c->peer));
	counters.connections++;
	counters.accepted++;
	set_add(c);
	conn_go(c, C_HEAD);
	conn_drive(c, NEXT);
}

/* Accepts what waits on a listener, up to a number. */
static void
conn_accept(unsigned slot)
{
	struct sockaddr_storage peer;
	socklen_t len;
	int fd, n;

	for (n = 0; n < 64; n++) {
		if (set.n - set.base >= set.max && !conn_evict(0))
			return;
		len = sizeof(peer);
		memset(&peer, 0, sizeof(peer));
		fd = accept_fd(set.fd[slot].fd, &peer, &len);
		if (fd != -1) {
			conn_open(fd, &listeners[slot - 1], &peer);
			continue;
		}
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
		    errno == ENOMEM) {
			if (!conn_evict(1000))
				return;
		} else if (errno != EINTR && errno != ECONNABORTED)
			return;
	}
}

/* ==== start and stop =====================================================
 *
 * The directory, the listeners, the sandbox, signals, the loop's turns, and
 * the wrapper: statesrv NAME COMMAND.
 */

/* The signals that we take, and the byte that each is in the wake pipe. As
 * process 1 of a container there are no defaults: all are set. */
static const struct { int sig; char byte; } signals[] = {
	{ SIGTERM, 'T' }, { SIGINT, 'I' }, { SIGQUIT, 'Q' }, { SIGHUP, 'H' },
	{ SIGCHLD, 'C' }, { SIGPIPE, '\0' }
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
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);

	if (fd == -1 || read_at(fd, out, n, 0) != (ssize_t)n)
		die(1, "cannot read /dev/urandom: %s", strerror(errno));
	close_quietly(fd);
}

/* ---- the directory ---- */

/* Makes a directory if there is none; true if there was none. */
static bool
store_mkdir(int dir, const char *name)
{
	if (mkdirat(dir, name, 0700) == 0)
		return true;
	if (errno != EEXIST)
		die(1, "cannot create %s%s%s: %s", dir == AT_FDCWD ? "" :
		    conf.dir, dir == AT_FDCWD ? "" : "/", name,
		    strerror(errno));
	return false;
}

/* The history needs hard links; better to hear of it now. */
static void
store_try_link(void)
{
	struct upload up = { .fd = -1 };
	char name[sizeof(up.tmp) + 8];

	if (conf.keep == 0 || tmp_create(&up) == -1)
		return;			/* no room: /-/ready will say so */
	(void)snprintf(name, sizeof(name), "%s-link", up.tmp);
	if (linkat(store.root, up.tmp, store.root, name, 0) == 0)
		(void)unlinkat(store.root, name, 0);
	else if (errno != ENOSPC && errno != EDQUOT) {
		tmp_remove(&up);
		die(1, "%s has no hard links (%s), which the history is made "
		    "of: choose another file system, or -k 0 for no history",
		    conf.dir, strerror(errno));
	}
	tmp_remove(&up);
}

/* Removes uploads whose server is dead: it does not hold its byte. */
static void
store_sweep(void)
{
	int dir = openat(store.root, ".tmp",
	    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *d = dir == -1 ? NULL : fdopendir(dir);
	struct dirent *e;
	uint64_t token;

	if (d == NULL)
		die(1, "cannot open %s/.tmp: %s", conf.dir, strerror(errno));
	while ((e = readdir(d)) != NULL) {
		token = strtoull(e->d_name, NULL, 16);
		if (e->d_name[0] == '.' || token == store.token ||
		    guard_set(store.guard, F_WRLCK, guard_server_byte(token),
		    false) == -1)
			continue;
		(void)unlinkat(dirfd(d), e->d_name, 0);
		(void)guard_set(store.guard, F_UNLCK,
		    guard_server_byte(token), false);
	}
	(void)closedir(d);
}

#ifdef __linux__
/* What several servers could not safely share, as far as it can be seen. */
static void
store_look_at_fs(void)
{
	struct statfs fs;

	if (fstatfs(store.root, &fs) == -1)
		return;
	switch ((unsigned)fs.f_type) {
	case 0x65735546:		/* FUSE: GlusterFS, CephFS, sshfs */
	case 0x6969:			/* NFS */
	case 0x00c36400:		/* CephFS */
		store.remote = true;
		complain("%s is on a network file system: if several servers "
		    "share it, mount it without caches (README, SHARING)",
		    conf.dir);
		break;
	case 0xff534d42: case 0xfe534d42: case 0x517b:	/* SMB */
		store.remote = true;
		complain("%s is on SMB, whose locks do not reach other hosts: "
		    "do not share it", conf.dir);
		break;
	default:
		break;
	}
}
#endif

static void
store_open(void)
{
	bool new = store_mkdir(AT_FDCWD, conf.dir);
	int parent;

	store.root = open(conf.dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (store.root == -1)
		die(1, "cannot open %s: %s", conf.dir, strerror(errno));
	new |= store_mkdir(store.root, ".tmp");
	new |= store_mkdir(store.root, ".history");
	store.guard = file_open(store.root, ".guard", O_RDWR | O_CREAT, NULL);
	if (store.guard == -1)
		die(1, "cannot open %s/.guard: %s", conf.dir,
		    strerror(errno));
	/* A new directory's own name must be on the disk as well. */
	parent = openat(store.root, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (new && (sync_fd(store.root) == -1 ||
	    (parent != -1 && sync_fd(parent) == -1)))
		complain("cannot sync %s: %s", conf.dir, strerror(errno));
	close_quietly(parent);
	random_bytes(&store.token, sizeof(store.token));
	if (guard_set(store.guard, F_WRLCK, guard_server_byte(store.token),
	    false) == -1)
		die(1, "%s has no record locks (%s): choose another file "
		    "system", conf.dir, strerror(errno));
	store_sweep();
	store_try_link();
#ifdef __linux__
	store_look_at_fs();
#endif
}

/* An empty .lock is a LOCK that nobody was told of: a crash came between its
 * creation and its content. Under the guard, for another server may be in
 * just that moment. */
static void
sweep_on(struct walk *w, int dir, const char *leaf, bool is_lock)
{
	struct stat st;
	int guard;

	if (!is_lock || fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) == -1 ||
	    !S_ISREG(st.st_mode) || st.st_size > 0 ||
	    (guard = guard_aside(w->name)) == -1)
		return;
	if (fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
	    st.st_size == 0 && unlinkat(dir, leaf, 0) == 0)
		complain("%s: removed an empty lock, left by a crash",
		    w->name);
	close_quietly(guard);
}

static int
job_sweep(struct request *r)
{
	struct walk w = { .on = sweep_on };

	(void)r;
	return walk_states(&w);
}

/* ---- listeners ---- */

/* Reads HOST:PORT, [V6]:PORT, :PORT or unix:PATH. */
static socklen_t
address_read(const char *text, struct sockaddr_storage *out)
{
	struct sockaddr_in *four = (void *)out;
	struct sockaddr_in6 *six = (void *)out;
	struct sockaddr_un *path = (void *)out;
	const char *colon = strrchr(text, ':');
	char host[64], *end;
	unsigned long port;

	memset(out, 0, sizeof(*out));
	if (strncmp(text, "unix:", 5) == 0) {
		path->sun_family = AF_UNIX;
		if (strlen(text + 5) - 1 >= sizeof(path->sun_path) - 1)
			die(2, "-l %s: the path is empty or too long", text);
		(void)snprintf(path->sun_path, sizeof(path->sun_path), "%s",
		    text + 5);
		return (socklen_t)sizeof(*path);
	}
	if (colon == NULL || colon[1] < '0' || colon[1] > '9')
		die(2, "-l %s: want HOST:PORT, [V6]:PORT or unix:PATH", text);
	port = strtoul(colon + 1, &end, 10);
	if (*end != '\0' || port > 65535)
		die(2, "-l %s: a port is a number up to 65535", text);
	span_copy(host, sizeof(host), (struct span){ text,
	    (size_t)(colon - text) });
	if (host[0] == '[' && cut_suffix(host, "]")) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons((uint16_t)port);
		if (inet_pton(AF_INET6, host + 1, &six->sin6_addr) == 1)
			return (socklen_t)sizeof(*six);
	}
	four->sin_family = AF_INET;
	four->sin_port = htons((uint16_t)port);
	if (strcmp(host, "localhost") == 0)
		(void)snprintf(host, sizeof(host), "127.0.0.1");
	if (host[0] == '\0' || strcmp(host, "*") == 0)
		(void)snprintf(host, sizeof(host), "0.0.0.0");
	if (inet_pton(AF_INET, host, &four->sin_addr) != 1)
		die(2, "-l %s: %s is no address; a name is not looked up",
		    text, host);
	return (socklen_t)sizeof(*four);
}

static bool
is_loopback(const struct sockaddr_storage *a)
{
	const struct sockaddr_in *four = (const void *)a;
	const struct sockaddr_in6 *six = (const void *)a;

	return a->ss_family == AF_INET ?
	    ntohl(four->sin_addr.s_addr) >> 24 == 127 :
	    a->ss_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&six->sin6_addr);
}

/* Takes a listening socket into the poll set, and says where it listens. */
static void
listener_add(int fd)
{
	struct listener *l = &listeners[set.base - 1];
	struct sockaddr_storage a;
	const struct sockaddr_un *path = (const void *)&a;
	socklen_t len = sizeof(a), size = sizeof(int);
	int one = 1, unsent = UNSENT_MAX;

	if (set.base > LISTENERS_MAX)
		die(2, "too many listeners");
	memset(&a, 0, sizeof(a));
	if (getsockname(fd, (struct sockaddr *)&a, &len) == -1 ||
	    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &one, &size) == -1 ||
	    one == 0 ||
	    fcntl(fd, F_SETFL, O_NONBLOCK) == -1 ||
	    fcntl(fd, F_SETFD, FD_CLOEXEC) == -1)
		die(1, "descriptor %d is no listener: %s", fd,
		    strerror(errno));
	l->path = a.ss_family == AF_UNIX;
	l->local = is_loopback(&a);
	if (l->path)
		(void)snprintf(l->name, sizeof(l->name), "unix:%.107s",
		    path->sun_path);
	else {
		(void)snprintf(l->name, sizeof(l->name), "http://");
		peer_text(&a, l->name + 7, sizeof(l->name) - 7);
		/* Inherited by what it accepts (Linux). The second one keeps
		 * slow readers of large states from filling the kernel's
		 * memory, which all connections share. */
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one,
		    sizeof(one));
#ifdef TCP_NOTSENT_LOWAT
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent,
		    sizeof(unsent));
#endif
	}
	if (!l->path && !l->local && users == NULL && !conf.open)
		die(2, "%s can be reached from other machines, and anybody "
		    "could read and write the states.\nSet TF_HTTP_USERNAME "
		    "and TF_HTTP_PASSWORD, or name users with -u FILE, or let "
		    "everybody in with -n", l->name);
	set.fd[set.base++] = (struct pollfd){ .fd = fd, .events = POLLIN };
}

/* A socket file that nobody listens on any more is in the way. Any other
 * kind of file refuses connections too, and is not ours to remove. */
static void
stale_socket(const struct sockaddr_storage *a, socklen_t len)
{
	const struct sockaddr_un *path = (const void *)a;
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	struct stat st;

	if (fd != -1 && connect(fd, (const struct sockaddr *)a, len) == -1 &&
	    errno == ECONNREFUSED && lstat(path->sun_path, &st) == 0 &&
	    S_ISSOCK(st.st_mode))
		(void)unlink(path->sun_path);
	close_quietly(fd);
}

/* umask is the user's own here: it says who may connect to a unix socket. */
static void
listener_open(const char *text)
{
	struct sockaddr_storage a;
	socklen_t len = address_read(text, &a);
	int fd = socket(a.ss_family, SOCK_STREAM, 0), one = 1;

	if (a.ss_family == AF_UNIX)
		stale_socket(&a, len);
	else if (fd != -1)
		(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one,
		    sizeof(one));
	if (fd == -1 || bind(fd, (struct sockaddr *)&a, len) == -1 ||
	    listen(fd, SOMAXCONN) == -1)
		die(1, "cannot listen on %s: %s%s", text, strerror(errno),
		    errno != EADDRINUSE ? "" : a.ss_family == AF_UNIX ?
		    "; something is there" : "; another server is there: "
		    "choose another port with -l");
	listener_add(fd);
}

/* Sockets that systemd holds for us: sd_listen_fds(3). */
static int
inherited_listeners(void)
{
	const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");
	int count = 0, i;

	if (pid != NULL && n != NULL && atol(pid) == (long)getpid())
		count = atoi(n);
	if (count < 0)
		die(2, "LISTEN_FDS=%s is no number of sockets", n);
	for (i = 0; i < count; i++)
		listener_add(3 + i);
	(void)unsetenv("LISTEN_PID");
	(void)unsetenv("LISTEN_FDS");
	return count;
}

static void
listeners_open(void)
{
	size_t i;

	(void)umask(inherited.mask);
	if (conf.command != NULL)
		listener_open("127.0.0.1:0");
	else if (inherited_listeners() == 0) {
		for (i = 0; i < conf.listeners; i++)
			listener_open(conf.listen[i]);
		if (i == 0)
			listener_open("127.0.0.1:8080");
	}
	(void)umask(077);
	set.n = set.hot = set.base;
}

/* ---- limits and the sandbox ---- */

/* As many descriptors as the system gives, and slots for half of them. */
static void
limits_set(void)
{
	struct rlimit files;
	rlim_t spare;

	if (getrlimit(RLIMIT_NOFILE, &files) == -1)
		die(1, "cannot read the limits: %s", strerror(errno));
	inherited.files = files;
	files.rlim_cur = files.rlim_max;
	if (files.rlim_cur > SLOTS_MAX * 4)
		files.rlim_cur = SLOTS_MAX * 4;
	if (setrlimit(RLIMIT_NOFILE, &files) == -1)
		(void)getrlimit(RLIMIT_NOFILE, &files);
	if (files.rlim_cur < 48)
		die(1, "48 open files at least: see ulimit -n");
	spare = files.rlim_cur / 2;
	jobs.max = spare / 8 < THREADS_MAX ? (unsigned)(spare / 8) :
	    THREADS_MAX;
	/* An upload or a large answer is a second descriptor. */
	set.max = files.rlim_cur - spare < SLOTS_MAX ?
	    (unsigned)(files.rlim_cur - spare) : SLOTS_MAX;
}

#if defined(__linux__) && !defined(NO_SANDBOX)
/* Landlock (kernel 5.19): the numbers of its calls are the same everywhere,
 * and its header is not. */
struct landlock_rule {
	uint64_t allowed;
	int32_t fd;
} __attribute__((packed));

enum {
	LL_WRITE = 1 << 1, LL_READ = 1 << 2, LL_READ_DIR = 1 << 3,
	LL_REMOVE = 1 << 5, LL_MAKE_DIR = 1 << 7, LL_MAKE_REG = 1 << 8,
	LL_REFER = 1 << 13, LL_TRUNCATE = 1 << 14
};

static void
landlock_allow(int rules, int fd, uint64_t allowed)
{
	struct landlock_rule rule = { allowed, fd };

	if (fd == -1 || syscall(445, rules, 1, &rule, 0) == -1)
		die(1, "cannot set up the sandbox: %s", strerror(errno));
}

/*
 * From now on the process reaches its directory and nothing else: no other
 * file, no new TCP socket, no signal to strangers. The users file may be
 * replaced by an editor, so what is allowed is to read the directory it is
 * in: give it one of its own.
 */
static void
sandbox(void)
{
	struct { uint64_t fs, net, scoped; } set_up = { 0, 0, 0 };
	long abi = syscall(444, NULL, (size_t)0, 1);
	char dir[PATH_MAX], *slash;
	int rules, fd;

	(void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	(void)prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (abi < 2) {			/* 1 forbids all renames we need */
		if (conf.verbose)
			complain("no sandbox: the kernel has no Landlock");
		return;
	}
	set_up.fs = abi < 3 ? 0x3fff : abi < 5 ? 0x7fff : 0xffff;
	set_up.net = abi < 4 ? 0 : 3;	/* bind, connect */
	set_up.scoped = abi < 6 ? 0 : conf.command != NULL ? 1 : 3;
	rules = (int)syscall(444, &set_up, abi < 4 ? (size_t)8 :
	    abi < 6 ? (size_t)16 : (size_t)24, 0);
	landlock_allow(rules, store.root, set_up.fs & (LL_WRITE | LL_READ |
	    LL_READ_DIR | LL_REMOVE | LL_MAKE_DIR | LL_MAKE_REG | LL_REFER |
	    LL_TRUNCATE));
	if (conf.users != NULL) {
		(void)snprintf(dir, sizeof(dir), "%s", conf.users);
		slash = strrchr(dir, '/');
		(void)snprintf(slash == NULL ? dir : slash + 1, 2, ".");
		fd = open(dir, O_PATH | O_CLOEXEC);
		landlock_allow(rules, fd, LL_READ);
		close_quietly(fd);
	}
	if (syscall(446, rules, 0) == -1)
		die(1, "cannot enter the sandbox: %s", strerror(errno));
	close_quietly(rules);
}
#elif defined(__OpenBSD__)
static void
sandbox(void)
{
	if (unveil(conf.dir, "rwc") == -1 ||
	    (conf.users != NULL && unveil(conf.users, "r") == -1) ||
	    pledge("stdio rpath wpath cpath flock inet unix proc", NULL) == -1)
		die(1, "cannot enter the sandbox: %s", strerror(errno));
}
#else
static void
sandbox(void)
{
	if (conf.verbose)
		complain("no sandbox on this system");
}
#endif

/* ---- users ---- */

/* The one user of the environment, or of the wrapper. */
static struct users *
users_single(const char *name, const char *secret)
{
	struct users *u = calloc(1, sizeof(*u));

	if (u == NULL || (u->list = calloc(1, sizeof(*u->list))) == NULL ||
	    (u->text = strdup(name)) == NULL)
		die(1, "out of memory");
	u->refs = 1;
	u->n = 1;
	u->list->name = u->text;
	u->list->right = R_WRITE;
	u->list->patterns = "";
	sha256(secret, strlen(secret), u->list->secret);
	return u;
}

static void
users_start(void)
{
	const char *name = getenv("TF_HTTP_USERNAME");
	const char *secret = getenv("TF_HTTP_PASSWORD");
	bool has_name = name != NULL && *name != '\0';
	bool has_secret = secret != NULL && *secret != '\0';

	if (conf.users != NULL) {
		if ((users = users_read(conf.users)) == NULL)
			exit(1);
	} else if (conf.command != NULL) {
		return;			/* it makes its own */
	} else if (has_name != has_secret) {
		die(2, "%s is set and %s is not: set both, or none",
		    has_name ? "TF_HTTP_USERNAME" : "TF_HTTP_PASSWORD",
		    has_name ? "TF_HTTP_PASSWORD" : "TF_HTTP_USERNAME");
	} else if (has_name) {
		if (strchr(name, ':') != NULL || strlen(name) > 63)
			die(2, "TF_HTTP_USERNAME has a colon, or more than 63 "
			    "bytes: no client could show it");
		users = users_single(name, secret);
	}
}

/* SIGHUP: a file that is no good leaves the users as they were. */
static void
users_again(void)
{
	struct users *new;

	if (conf.users == NULL)
		return;
	if ((new = users_read(conf.users)) == NULL) {
		complain("the users stay as they were");
		return;
	}
	users_drop(users);
	users = new;
	buf_fmt(&loop.log, "statesrv: read %zu lines of users\n", new->n);
}

/* ---- the wrapper ---- */

/* Starts the command with a backend of its own in its environment. */
static void
command_start(void)
{
	static const char *const keys[] = { "TF_HTTP_ADDRESS",
	    "TF_HTTP_LOCK_ADDRESS", "TF_HTTP_UNLOCK_ADDRESS" };
	unsigned char bytes[16];
	char secret[33];
	struct buf url = { 0 };
	size_t i;

	random_bytes(bytes, sizeof(bytes));
	hex(bytes, sizeof(bytes), secret);
	users = users_single("statesrv", secret);
	put(&url, "%s/%u", listeners[0].name, conf.command_name);
	loop.shares_terminal = isatty(STDIN_FILENO) == 1 &&
	    tcgetpgrp(STDIN_FILENO) == getpgrp();
	if (url.failed || (loop.child = fork()) == -1)
		die(1, "cannot fork: %s", strerror(errno));
	/* Both of us do this, for who knows which one runs first. */
	if (!loop.shares_terminal)
		(void)setpgid(loop.child, loop.child);
	if (loop.child > 0) {
		/* What the terminal sends, it gets from that; else, from us. */
		if (loop.shares_terminal) {
			(void)signal(SIGINT, SIG_IGN);
			(void)signal(SIGQUIT, SIG_IGN);
		}
		buf_free(&url);
		return;
	}
#ifdef __linux__
	(void)prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
#endif
	/* It finds everything as we found it. */
	(void)umask(inherited.mask);
	(void)setrlimit(RLIMIT_NOFILE, &inherited.files);
	for (i = 0; i < SIGNALS; i++)
		(void)sigaction(signals[i].sig, &inherited.action[i], NULL);
	for (i = 0; i < 3; i++)
		(void)setenv(keys[i], url.data, 1);
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

/* The command is over: so are we, with its status. */
static bool
command_ended(void)
{
	int status;

	if (loop.child <= 0 || waitpid(loop.child, &status, WNOHANG) !=
	    loop.child)
		return false;
	loop.child = 0;
	loop.status = WIFEXITED(status) ? WEXITSTATUS(status) :
	    128 + WTERMSIG(status);
	return true;
}

/* Names the lock that the command left behind, with what releases it. */
static void
command_farewell(void)
{
	struct buf line = { 0 };
	struct place p;
	struct lock l;

	if (place_open(conf.command_name, false, &p) == -1)
		return;
	if (lock_read(&p, &l) == 0 && lock_is(&l, loop.locked)) {
		put(&line, "%q '-d' %q %q terraform force-unlock -force %q",
		    conf.program, conf.dir, conf.command_name, l.id);
		complain("%s is still locked by '%s' (%s). If nothing runs any "
		    "more, release it with\n\t%s", conf.command_name, l.who,
		    l.operation, line.data);
		buf_free(&line);
	}
	lock_free(&l);
	dir_leave(p.dir);
}

/* ---- signals ---- */

/* A signal becomes a byte in the wake pipe. */
static void
on_signal(int sig)
{
	int saved = errno;
	size_t i = 0;

	while (signals[i].sig != sig)
		i++;
	(void)!write(jobs.wake[1], &signals[i].byte, 1);
	errno = saved;
}

static void
signals_set(void)
{
	struct sigaction act = { .sa_flags = SA_RESTART };
	size_t i;

	if (pipe(jobs.wake) == -1)
		die(1, "cannot make a pipe: %s", strerror(errno));
	for (i = 0; i < 2; i++)
		if (fcntl(jobs.wake[i], F_SETFL, O_NONBLOCK) == -1 ||
		    fcntl(jobs.wake[i], F_SETFD, FD_CLOEXEC) == -1)
			die(1, "cannot set up a pipe: %s", strerror(errno));
	set.fd[0] = (struct pollfd){ .fd = jobs.wake[0], .events = POLLIN };
	set.base = 1;
	(void)sigemptyset(&act.sa_mask);
	for (i = 0; i < SIGNALS; i++) {
		act.sa_handler = signals[i].sig == SIGPIPE ? SIG_IGN :
		    on_signal;
		if (signals[i].sig != SIGQUIT || conf.command != NULL)
			(void)sigaction(signals[i].sig, &act,
			    &inherited.action[i]);
	}
}

/* Passes a signal on, once a second: timeout(1) signals its child, and then
 * the child's group; and a second TERM makes terraform drop everything. */
static void
command_signal(char c)
{
	static int64_t last;

	if (loop.now - last < 1000 && last != 0)
		return;
	last = loop.now;
	(void)kill(loop.shares_terminal ? loop.child : -loop.child,
	    c == 'H' ? SIGHUP : c == 'I' ? SIGINT : c == 'Q' ? SIGQUIT :
	    SIGTERM);
}

/* ---- the loop ---- */

static void
loop_clock(void)
{
	loop.us = clock_us(CLOCK_MONOTONIC);
	loop.now = loop.us / 1000;
}

/* Stops listening, and lets go of those who ask for nothing. */
static void
loop_stop(void)
{
	struct conn *c;
	unsigned i;

	loop.stopping = true;
	loop.stop = loop.now + STOP_MS;
	for (i = 1; i < set.base; i++) {
		(void)close(set.fd[i].fd);
		set.fd[i].fd = -1;
	}
	for (i = set.n; i > set.base; i--) {
		c = set.at[i - 1];
		if (c->state != C_HEAD || c->begun)
			continue;
		conn_drive(c, conn_leave(c));
	}
}

static void
loop_signal(char c)
{
	if (c == 'C') {
		if (command_ended())
			loop_stop();
	} else if (c == 'H' && loop.child == 0)
		users_again();
	else if (c != 'J' && loop.child > 0)
		command_signal(c);
	else if (c != 'J' && loop.stopping)
		_exit(1);
	else if (c != 'J')
		loop_stop();
}

/* What the commit threads have done, and what signals came. */
static void
loop_wake(void)
{
	struct request *r, *next;
	char bytes[64];
	ssize_t n = read(jobs.wake[0], bytes, sizeof(bytes)), i;

	for (i = 0; i < n; i++)
		loop_signal(bytes[i]);
	(void)pthread_mutex_lock(&jobs.mutex);
	r = jobs.done;
	jobs.done = NULL;
	(void)pthread_mutex_unlock(&jobs.mutex);
	for (; r != NULL; r = next) {
		next = r->next;
		conn_job_done(r);
	}
}

/* Who is late, and who is no longer busy. Returns the next deadline. */
static int64_t
loop_deadlines(void)
{
	int64_t soonest = loop.stopping ? loop.stop : INT64_MAX;
	struct conn *c;
	unsigned i;

	for (i = set.n; i > set.base; i--) {
		c = set.at[i - 1];
		if (c->deadline <= loop.now) {
			conn_late(c);
			soonest = loop.now;	/* it may have a new one */
			continue;
		}
		if (c->deadline < soonest)
			soonest = c->deadline;
		if (loop.now - c->active > 4 * HOT_MS)
			set_cold(c);
	}
	if (loop.rest > loop.now && loop.rest < soonest)
		soonest = loop.rest;
	return soonest;
}

/* Listeners are polled while they do not rest. */
static void
loop_rest(void)
{
	unsigned i;

	if (loop.rest == 0 || loop.stopping)
		return;
	for (i = 1; i < set.base; i++)
		set.fd[i].events = loop.now < loop.rest ? 0 : POLLIN;
	if (loop.now >= loop.rest)
		loop.rest = 0;
}

/*
 * Waits for news. While there are few connections, all are polled. With
 * many, the busy ones are, for HOT_MS at most, and all of them now and then:
 * so seldom that it costs a few percent. When the busy ones have fallen
 * silent, all are polled, until something happens: no idle wake-ups. Returns
 * the end of the part of the set that was polled.
 */
static unsigned
loop_poll(void)
{
	static int64_t next_all, logged;
	static bool silent = true;
	bool few = set.n - set.base <= FLAT;
	bool all = few || silent || loop.now >= next_all;
	int64_t wait = HOT_MS;
	unsigned n = set.hot;
	int got;

	loop_rest();
	if (all) {
		wait = loop_deadlines() - loop.now;
		if (!few && !silent)
			wait = 0;
		if (wait > INT_MAX)
			wait = -1;
		n = set.n;
	}
	/* Lines are written at once, or by the dozen if they come thick and
	 * fast. They wait for longer than a tick: a shorter timeout has the
	 * processor's timer set anew on each turn, which is dear. */
	if (loop.log.len > 4096 ||
	    (loop.log.len > 0 && loop.now - logged >= LOG_MS)) {
		log_flush();
		logged = loop.now;
	} else if (loop.log.len > 0 && (wait > LOG_MS || wait < 0))
		wait = LOG_MS;
	got = poll(set.fd, n, (int)wait);
	loop_clock();
	if (all)
		next_all = loop.now + HOT_MS + set.n / 250;
	silent = !all && got == 0;
	return got > 0 ? n : 0;
}

/* One turn: poll, then serve everyone who is ready once. */
static void
loop_turn(struct conn **ready)
{
	unsigned n = loop_poll(), i, count = 0;
	short news;

	for (i = set.base; i < n; i++)
		if (set.fd[i].revents != 0)
			ready[count++] = set.at[i];
	for (i = 0; i < count; i++) {
		news = set.fd[ready[i]->slot].revents;
		set.fd[ready[i]->slot].revents = 0;
		ready[i]->readable |= (news & ~POLLOUT) != 0;
		ready[i]->active = loop.now;
		ready[i]->order = ++loop.order;
		set_hot(ready[i]);
		conn_drive(ready[i], NEXT);
	}
	if (n > 0 && set.fd[0].revents != 0)
		loop_wake();
	for (i = 1; i < set.base && n > 0; i++)
		if (set.fd[i].revents != 0 && !loop.stopping)
			conn_accept(i);
}

static void
loop_run(void)
{
	static struct conn *ready[SLOTS_MAX];

	loop_clock();
	while (!loop.stopping || (set.n > set.base && loop.now < loop.stop))
		loop_turn(ready);
	if (loop.log.len > 0)
		log_flush();
}

/* ---- -c ---- */

/* Asks a running server whether it is ready; the exit status. */
static int
check(const char *text)
{
	static const char ask[] = "GET /-/ready HTTP/1.1\r\nHost: localhost"
	    "\r\nConnection: close\r\n\r\n";
	struct timeval patience = { 5, 0 };
	struct sockaddr_storage a;
	socklen_t len = address_read(text, &a);
	int fd = socket(a.ss_family, SOCK_STREAM, 0);
	char answer[13] = "";

	if (fd == -1 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience,
	    sizeof(patience)) == -1 ||
	    connect(fd, (struct sockaddr *)&a, len) == -1 ||
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
"usage: statesrv [options]                  serve\n"
"       statesrv [options] NAME COMMAND...  serve one command, as the backend\n"
"                                           of state NAME, in its environment\n"
"\n  -b HOURS  a LOCK may break another's that is older (never)\n"
"  -c        ask the server at the first -l whether it is ready: exit 0 or 1\n"
"  -d DIR    where the states live (%s)\n"
"  -h        this help\n"
"  -k N      earlier versions kept of each state (%u)\n"
"  -l ADDR   HOST:PORT, [V6]:PORT or unix:PATH, more than once if you like;\n"
"            port 0 picks one and says which (127.0.0.1:8080)\n"
"  -m MIB    largest state (%lld)\n"
"  -n        do without users where other machines can reach it\n"
"  -s        strict: refuse a lower serial or another lineage\n"
"  -u FILE   users, a line each: name secret right [pattern...]\n"
"            secret as it is or sha256:HEX; right read, plan or write\n"
"  -v        show every head and body on stderr\n"
"  -V        the version\n\n"
"Without -u, TF_HTTP_USERNAME and TF_HTTP_PASSWORD make one user.\n\n"
"  statesrv                               a laptop's backend\n"
"  statesrv demo terraform apply          without a server to start "
"(init too)\n"
"  statesrv -l unix:/run/s.sock -u users  a team's, behind TLS\n";

static void
usage(FILE *out)
{
	(void)fprintf(out, usage_text, conf.dir, conf.keep,
	    (long long)(conf.body_max >> 20));
}

/* Reads an option's number, or ends the program. */
static unsigned
number(char option, const char *text, unsigned min, unsigned max)
{
	char *end;
	unsigned long v;

	errno = 0;
	v = strtoul(text, &end, 10);
	if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 ||
	    v < min || v > max)
		die(2, "-%c %s: want a number from %u to %u", option, text,
		    min, max);
	return (unsigned)v;
}

static void
option(int c)
{
	struct sockaddr_storage address;

	switch (c) {
	case 'b': conf.break_hours = number('b', optarg, 1, 1000000); break;
	case 'c': conf.check = true; break;
	case 'd': conf.dir = optarg; break;
	case 'h': usage(stdout); exit(0);
	case 'k': conf.keep = number('k', optarg, 0, 1000000); break;
	case 'l':
		if (conf.listeners == 16)
			die(2, "-l can be given 16 times at most");
		(void)address_read(optarg, &address);
		conf.listen[conf.listeners++] = optarg;
		break;
	case 'm':
		conf.body_max = (int64_t)number('m', optarg, 1, 1 << 20) << 20;
		break;
	case 'n': conf.open = true; break;
	case 's': conf.strict = true; break;
	case 'u': conf.users = optarg; break;
	case 'v': conf.verbose = true; break;
	case 'V': (void)puts("statesrv " VERSION); exit(0);
	default: usage(stderr); exit(2);
	}
}

static void
options(int argc, char **argv)
{
	int c;

	while ((c = getopt(argc, argv, "+b:cd:hk:l:m:nsu:vV")) != -1)
		option(c);
	if (optind == argc)
		return;
	conf.command_name = argv[optind];
	conf.command = argv + optind + 1;
	if (optind + 1 == argc)
		die(2, "%s: a state's name is followed by a COMMAND; see -h",
		    conf.command_name);
	if (name_wrong(conf.command_name) != NULL)
		die(2, "%s: %s", conf.command_name,
		    name_wrong(conf.command_name));
	if (conf.listeners > 0 || conf.users != NULL || conf.check)
		die(2, "-c, -l and -u do not go with a COMMAND, which has a "
		    "server of its own");
}

/* Says where we are, on stdout; the wrapper's stdout is not ours. */
static void
greet(void)
{
	struct stat st;
	unsigned i;

	loop.log_blocks = isatty(STDOUT_FILENO) == 1 ||
	    (fstat(STDOUT_FILENO, &st) == 0 &&
	    (S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode)));
	for (i = 1; i < set.base && conf.command == NULL; i++)
		(void)printf("statesrv: listening on %s\n",
		    listeners[i - 1].name);
	(void)fflush(stdout);
}

/* Sweeps in the background: a hundred thousand names take their time. */
static void
sweep_start(void)
{
	struct request *r = calloc(1, sizeof(*r));

	if (r == NULL)
		die(1, "out of memory");
	r->file = -1;
	if (job_submit(r, job_sweep, false) == -1)
		die(1, "cannot start a thread: %s", strerror(errno));
}

int
main(int argc, char **argv)
{
	const struct rlimit none = { 0, 0 };
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
	store_open();
	listeners_open();
	if (conf.command != NULL)
		command_start();
	if (conf.verbose)
		complain("-v: heads and bodies will be shown, and the secrets "
		    "in the states with them");
	(void)setrlimit(RLIMIT_CORE, &none);	/* it would hold secrets */
	sandbox();
	sweep_start();
	greet();
	loop_run();
	if (conf.command != NULL)
		command_farewell();
	users_drop(users);
	return loop.status;
}
