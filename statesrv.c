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
 *	states/demo.lock	not empty = locked; the lock info, byte for byte
 *	states/demo.log		what happened to it, one JSON line per event
 *	states/team/prod.tfstate	a name with slashes is a path
 *	states/.history/demo/	earlier versions
 *	states/.tmp/		uploads in flight, swept at start
 *	states/.guard		its bytes are locked by servers that share it
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
 * first line to the last. Every wait for a client, a guard or a thread has an
 * end. A wait for a disk may have none: it holds its thread and the guard of
 * its name, but no mutex, except for the log's if stdout or stderr is a file.
 * To follow one request, read:
 *
 *	in the loop: loop_turn, conn_accept, conn_drive, head_next,
 *		request_new, admit
 *	GET of a small state, in the loop: quick_state, reply_send
 *	POST, in a thread: pool_give, thread_serve, do_write, and there
 *		lock_look, write_allowed: is it refused anyway?
 *		state_receive, state_check
 *		change_begin: change_prepare, guard_take, lock_read
 *		write_publish: client_gone, write_allowed, history_keep
 *		change_end, reply_send, history_prune
 *	LOCK, in a thread: do_lock, lock_body, change_begin, lock_write,
 *		change_end, reply_send
 *
 * What it does not do: TLS (put a reverse proxy before it), encryption at rest
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

#define _GNU_SOURCE			/* for Linux; BSDs hide nothing */
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64			/* for times after 2038 */

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
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/*
 * What other systems lack. macOS has no record locks of an open file (nor has
 * OpenBSD), no Landlock, no reads that do not wait, no sendfile of this kind,
 * no accept4, and its fsync does not reach the disk. Each is handled where it
 * is used, behind #ifdef; these have a plain stand-in. (It has no condition
 * that waits by the monotonic clock either: pool_thread does without.)
 */
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <malloc.h>
#else		/* what a BSD accepts inherits the listener's O_NONBLOCK */
#define accept4(fd, peer, len, how) accept(fd, peer, len)
#define prctl(...) 0
#endif
#ifdef __APPLE__
#include <sys/random.h>
#define st_mtim st_mtimespec
#define st_ctim st_ctimespec
#define fsync(fd) (fcntl(fd, F_FULLFSYNC) != -1 ? 0 : fsync(fd))
#endif
#ifndef MSG_MORE
#define MSG_MORE 0			/* only a hint */
#endif
#ifndef POLLRDHUP
#define POLLRDHUP 0			/* a recv tells it as well */
#endif

/* ==== limits and config ==================================================
 *
 * The limits and the times; those behind #ifndef can be overridden with
 * -DNAME=VALUE (the tests do, so that limits are near). And the options, which
 * are set at start and then only read.
 *
 * What one connection may cost: 200 bytes while it is idle; HEAD_MAX and a
 * struct request from its head's first byte to its answer; a thread (some 30
 * KiB of its stack are touched) while its request waits for anything, and
 * LOCK_INFO_MAX for a small body; and of the kernel's memory UNSENT_MAX, for an
 * answer that nobody reads.
 */
#define VERSION "2.0"
#define HEAD_MAX 16384		/* bytes: request line and fields */
#define TARGET_MAX 8192		/* bytes: request target */
#define FIELDS_MAX 100		/* header fields, and trailer fields */
#define CHUNK_LINE_MAX 1024	/* bytes: a chunk's size and extensions */
#define SEGMENTS_MAX 32		/* of a name */
#define SEGMENT_MAX 200		/* bytes; with .tfstate below NAME_MAX */
#define NAME_LEN_MAX 1000	/* bytes: a name */
#define ID_MAX 256		/* bytes: a lock's ID */
#define VERSION_ID 64		/* bytes: an earlier version's ID */
#define SERIAL_MAX 20		/* digits: a longer serial is not known */
#define LINEAGE_MAX 255		/* bytes: -s cannot compare a longer one */
#define USERS_MAX 1048576	/* bytes: the users file */
#define LOCK_INFO_MAX 65536	/* bytes: the body of LOCK and UNLOCK */
#define JSON_DEPTH 1000		/* nested arrays and objects */
#define META_MAX 65536		/* bytes searched for serial and lineage */
#define TAIL_MAX 65536		/* bytes of a log that a page looks at */
#define COLUMN_MAX 120		/* bytes: a text table's first column */
#ifndef SMALL
#define SMALL 65536		/* bytes: the loop answers a state up to this */
#endif
#define CACHE_SLOTS 256		/* small states that are kept in memory */
#define HEAD_ROOM 1024		/* bytes: an answer's head, nearly always */
#ifndef SLOTS_MAX
#define SLOTS_MAX 16384		/* connections */
#endif
#define LISTENERS_MAX 32
#ifndef THREADS_MAX
#define THREADS_MAX 256
#endif
#ifndef THREAD_STACK
#define THREAD_STACK 524288	/* bytes: JSON_DEPTH values need 290 KB when
				 * clang does not optimize; only touched
				 * pages cost memory */
#endif
#define THREAD_IDLE 1		/* seconds; then an idle one leaves */
#ifndef PAGES_MAX
#define PAGES_MAX 8		/* threads that make pages */
#endif
#define WAITERS_MAX 16		/* threads that wait for one name */
#define UNSENT_MAX 131072	/* bytes of an answer that wait in the kernel */
#define SEND_MAX 1048576	/* bytes in one sendfile */
#define FLAT 64			/* with no more, all are always polled */
#define TURN_MAX 32		/* answers to one client in one turn */
#define HOT_MS 5		/* between polls of the idle ones, at least */
#define LOG_MS 10		/* log lines are collected for so long */
#define LOG_MAX 65536		/* bytes of log kept while nobody reads it */
#ifndef IDLE_MS
#define IDLE_MS 120000		/* Go's client gives up its own after 90 s */
#endif
#ifndef HEAD_MS
#define HEAD_MS 20000		/* for the head, from its first byte on */
#endif
#ifndef BODY_MS
#define BODY_MS 60000		/* of silence; on average 1,000 bytes/s */
#endif
#ifndef DRAIN_MS
#define DRAIN_MS 10000		/* for a client to read the last answer */
#endif
#ifndef STALL_MS
#define STALL_MS 5000		/* after this a silent client makes room */
#endif
#define NEW_MS 100		/* a new connection has so long to speak */
#define QUEUE_MS 20000		/* a request waits so long for a thread */
#ifndef GUARD_MS
#define GUARD_MS 5000		/* a request waits so long for its guard */
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
	const char *listen[LISTENERS_MAX];	/* -l, or the default */
	size_t listeners;		/* number of -l given */
	const char *users;		/* -u */
	unsigned keep;			/* -k: versions */
	unsigned break_hours;		/* -b: 0 is never */
	int64_t body_max;		/* -m: bytes */
	bool strict;			/* -s */
	bool open;			/* -n */
	bool fronted;			/* -x */
	bool verbose;			/* -v */
	bool check;			/* -c */
	bool fold;			/* the file system ignores case */
	char **command;			/* of the wrapper, or NULL */
	const char *command_name;	/* its state */
	const char *program;		/* argv[0] */
} conf = {
	.dir = "./states",
	.listen = { "127.0.0.1:8080" },
	.keep = 30,
	.body_max = (int64_t)256 << 20,
};

/* ==== types ==============================================================
 *
 * Bytes, what is known about a state or a lock, and the request: whoever
 * has it, the loop or a thread, answers and frees it.
 */
struct buf {				/* bytes that grow; zero is empty */
	char *data;
	size_t len, cap;
	bool failed;			/* memory ran out: bytes are missing */
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

static const char method_names[M_COUNT + 1][8] = {
	"GET", "HEAD", "POST", "PUT", "DELETE", "LOCK", "UNLOCK", "OPTIONS", "-"
};

/* The fields that mean something here. From F_CONNECTION on they may come
 * twice, and the last one counts, for a front adds its own at the end; but of
 * Connection and Accept all count, which are lists. */
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

/* What a parsed head says; its strings lie in http_parse's copy of it. */
struct head {
	enum method method;
	int minor;			/* of HTTP/1.x: 0 or 1 */
	char *target;			/* path and query, or "*" */
	const char *host;		/* or "" */
	char *field[F_COUNT];		/* their values, or NULL */
	const char *why;		/* it is refused, with its status */
	int64_t length;			/* Content-Length, or -1 */
	unsigned fields;		/* their number */
	const char *connection[2];	/* close, keep-alive: see http_lists */
	const char *accept[2];		/* HTML, JSON */
};

struct hash {				/* MD5 or SHA-256 */
	void (*mix)(uint32_t *, const unsigned char *);	/* takes 64 bytes */
	size_t size;			/* of the digest */
	uint64_t len;			/* of what was added */
	uint32_t state[8];
	unsigned char block[64];
};

/* A member of a JSON object that is asked for. Its text is copied to a field of
 * a struct, cut to fit, or nowhere (0, 0). If it stands there more than once,
 * its last value counts. */
struct member {
	const char *key;		/* in any case, as Go's clients read */
	size_t at, size;		/* of the field: see FIELD */
};

#define FIELD(type, field) offsetof(type, field), sizeof(((type *)0)->field)
#define MEMBERS_MAX 7		/* asked for at once */

/* What a state's JSON says about itself. */
struct meta {
	char type;			/* 's'tate, 'l'ock info, 0: neither */
	const char *doubled;		/* a key that is there twice, or NULL */
	char serial[24];		/* a whole number; "": not known */
	char lineage[LINEAGE_MAX + 2];	/* full: it is longer, and cut */
	char version[32];		/* terraform_version */
};

struct lock {
	bool held;
	bool frozen;			/* made by hand: not lock info */
	struct timespec since;		/* the file's mtime */
	char id[ID_MAX + 1];
	char operation[64], info[256], who[128], created[64];
	char *raw;			/* the file's bytes, malloced; or NULL.
					 * Without held: a torn lock */
};

/* What a URL names, as what a page is written, what a user may do there. */
enum kind {
	K_NONE, K_ROOT, K_HEALTHY, K_READY, K_METRICS,	/* K_NONE: no page */
	K_STATE, K_LOCK, K_VERSIONS, K_VERSION, K_LOG	/* have a name */
};
enum form { TEXT, JSON, HTML, SHELL };	/* SHELL: only for buf_text */
enum right { R_NONE, R_READ, R_PLAN, R_WRITE };

/* A temporary file: an upload, a copy, a new lock. */
struct tmp {
	int fd;				/* or -1 */
	int dir;			/* where it lies */
	char name[48];			/* "": it was renamed */
};

/* A change of a state or a lock, with what is left to be freed and pruned after
 * the answer. It belongs to the thread that makes the change. */
struct change {
	int dir;			/* where the name's files lie, or -1 */
	struct lock lock;		/* the lock that was found */
	struct lock asked;		/* the lock info that was sent */
	struct tmp tmp;			/* the new state; fd -1: a delete */
	struct meta meta;		/* what it says about itself */
	int64_t size;			/* of the body, in bytes */
	char md5[33];			/* of the body, in hex; "": unknown */
	int old;			/* the state that is there, or -1 */
	struct stat old_st;
	struct meta old_meta;
	int old_error;			/* why it could not be read, or 0 */
	bool equal;			/* the two have the same bytes */
	int history;			/* the history's directory, or -1 */
	struct tmp kept;		/* old's second name, or copy, there */
	struct names ids;		/* the versions in it, oldest first */
	bool writes;			/* changes the state: is prepared for,
					 * and logged even if it is refused */
	const char *event;		/* what was done, for the state's log */
};

struct request {
	struct conn *conn;
	struct change *change;		/* of the thread that has it */
	int64_t start;			/* microseconds, monotonic */

	/* what was asked */
	enum method method;
	enum kind kind;
	enum right right;		/* on that name */
	enum form form;			/* of pages, by Accept */
	bool keep, expects;		/* as the head says */
	bool tls;			/* it begins like a TLS connection */
	bool fronted;			/* a front speaks for the client */
	bool has_id, has_md5;
	bool go;			/* by User-Agent a Go program */
	bool bearer;			/* showed a secret, but no name */
	bool locked;			/* ?locked of the listing */
	char root[128];			/* from the URL to /: "../../" */
	char name[NAME_LEN_MAX + 64];	/* of the state, or the path */
	char version[VERSION_ID];	/* an earlier one's ID: K_VERSION */
	char query[256];		/* ?q= of the listing */
	char id[ID_MAX + 1];		/* lock ID: from ?ID= or the body */
	char host[256];			/* as the client calls us */
	char client[64];		/* its address */
	char user[64];
	unsigned char secret[32];	/* SHA-256 of what it showed */
	unsigned char md5[16];

	/* the body */
	int64_t length;			/* bytes to come, of it or of a chunk;
					 * -1: a chunk's first line is next */
	int64_t room;			/* bytes that it may still have */
	int too_large;			/* the status, if it has more */
	bool in_chunks;			/* the first chunk has begun */
	struct buf body;		/* lock info; not a state */

	/* the answer */
	int status;			/* 0: none yet; -1: there is none, the
					 * connection is cut */
	const char *type;		/* Content-Type, perhaps more fields */
	bool heading;			/* a table's cells write their titles */
	int width;			/* of a text table's first column */
	struct buf text;		/* its body, or else: */
	struct iovec cached;		/* a state in the cache; or */
	int file;			/* a file, or -1: there is none */
	off_t off, left;		/* sent of the file, and still to be */
	struct buf out;			/* head and text */
	size_t gone;			/* so much of out and cached is sent */
	int64_t got, sent;		/* bytes, for the log and the metrics */
	char why[300];			/* it was refused */
};

/* ==== small helpers ======================================================
 *
 * Clocks and a request's only wait; complain and die in the err(3) manner;
 * bytes that grow; text for people.
 */
#define time_us(t) ((int64_t)(t).tv_sec * 1000000 + (t).tv_nsec / 1000)

static int64_t
clock_us(clockid_t id)
{
	struct timespec t;

	(void)clock_gettime(id, &t);	/* cannot fail for these clocks */
	return time_us(t);
}

/* Milliseconds: monotonic, for deadlines, and of the day, which may jump. */
#define clock_ms() (clock_us(CLOCK_MONOTONIC) / 1000)
#define time_ms() (clock_us(CLOCK_REALTIME) / 1000)

/* Waits until a descriptor is ready or a moment (milliseconds, monotonic) has
 * come; with fd -1 only for the moment. No request waits elsewhere. Returns
 * poll's revents, or 0 if the time is up. */
static short
wait_until(int fd, short events, int64_t until)
{
	struct pollfd p = { .fd = fd, .events = events };
	int64_t left;

	do {
		left = until - clock_ms();
		if (poll(&p, 1, left > 0 ? (int)left : 0) == 1)
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
	static const unsigned least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	unsigned c = (unsigned char)*s;
	size_t i, n = c < 0x80 ? 1 : c < 0xc0 ? 0 : c < 0xe0 ? 2 :
	    c < 0xf0 ? 3 : c < 0xf8 ? 4 : 0;

	*code = n == 1 ? c : c & (0x7fu >> n);
	for (i = 1; i < n && (s[i] & 0xc0) == 0x80; i++)
		*code = *code << 6 | (s[i] & 0x3f);
	return i < n || *code < least[n] || *code >> 11 == 0x1b ||
	    *code > 0x10ffff ? 0 : n;
}

/* The length of the character that s begins with, if it may be shown on a
 * terminal or a page, else 0. The controls of ASCII and Latin-1 may not, nor
 * what changes the direction of the text: such text can lie. */
static size_t
shown_next(const char *s)
{
	unsigned code;
	size_t n = utf8_next(s, &code);

	return code < 0x20 || (code >= 0x7f && code < 0xa0) ||
	    code == 0x61c || code == 0x200e || code == 0x200f ||
	    (code >= 0x2028 && code <= 0x202e) ||
	    (code >= 0x2066 && code <= 0x2069) ? 0 : n;
}

/* Makes text from outside fit to be shown, in place: each byte that is not
 * becomes a question mark. */
static void
scrub(char *s)
{
	size_t n;

	for (; *s != '\0'; s += n > 0 ? n : 1)
		if ((n = shown_next(s)) == 0)
			*s = '?';
}

/* Both stdout and stderr may be one pipe, which takes PIPE_BUF bytes when it
 * polls writable: so they are written one at a time. The mutex also protects
 * the lines of the log that are not written yet. */
static pthread_mutex_t output = PTHREAD_MUTEX_INITIALIZER;

/* Protects the lists that threads share, of guards and of connections, and what
 * is in pool. */
static pthread_mutex_t list_mutex = PTHREAD_MUTEX_INITIALIZER;

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

/* Takes blanks off both ends, in place. */
static char *
trim(char *s)
{
	size_t n;

	s += strspn(s, " \t");
	for (n = strlen(s); n > 0 && strchr(" \t", s[n - 1]) != NULL;)
		s[--n] = '\0';
	return s;
}

/* Takes a suffix off, in place. Was it there? */
static bool
cut_suffix(char *s, const char *suffix)
{
	size_t n = strlen(s), len = strlen(suffix);
	bool found = n >= len && strcmp(s + n - len, suffix) == 0;

	if (found)
		s[n - len] = '\0';
	return found;
}

/* '*' any bytes, slashes too; '?' one byte. No recursion, no surprises.
 * (musl's fnmatch would bring 16 KiB of tables with it.) */
static bool
glob(const char *p, const char *s)
{
	const char *star = NULL, *from = NULL;

	while (*s != '\0')
		if (*p == '*') {
			star = ++p;
			from = s;
		} else if (*p == '?' || *p == *s) {
			p++;
			s++;
		} else if (star != NULL) {
			p = star;
			s = ++from;
		} else
			return false;
	return p[strspn(p, "*")] == '\0';
}

/* Makes room for n more bytes; false, and failed is set, if there is none. */
static bool
buf_room(struct buf *b, size_t n)
{
	size_t cap = 2 * (b->len + n) + 256;
	char *data = b->failed || cap < b->len + n ? NULL :	/* too large */
	    realloc(b->data, cap);

	b->failed = data == NULL;
	if (b->failed)
		return false;
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

static void
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

/* Appends text, and then a number (not negative) of at least that many digits.
 * Much faster than printf: every answer and every log line has several. */
static void
buf_num(struct buf *b, const char *before, int64_t n, int digits)
{
	char text[24], *p = text + sizeof(text);

	do {
		*--p = (char)('0' + n % 10);
		n /= 10;
	} while (--digits > 0 || n > 0);
	buf_str(b, before);
	buf_add(b, p, (size_t)(text + sizeof(text) - p));
}

/* Appends s as plain text, as a JSON string with its quotes, as HTML (also for
 * attributes), or as a word for the shell. What is not UTF-8, or may not be
 * shown, is escaped or replaced, but for the shell. */
static void
buf_text(struct buf *b, const char *s, enum form form)
{
	static const char *const quoted[] = { "", "\"\\", "<>&\"'", "'" };
	const char *quote = form == JSON ? "\"" : form == SHELL ? "'" : "";
	unsigned code;
	size_t n;

	buf_str(b, quote);
	for (; *s != '\0'; s += n > 0 ? n : 1) {
		n = form == SHELL ? 1 : shown_next(s);
		if (n > 0 && strchr(quoted[form], *s) == NULL)
			buf_add(b, s, n);
		else if (n > 0)
			buf_fmt(b, form == JSON ? "\\%c" : form == HTML ?
			    "&#%d;" : "'\\%c'", *s);
		else if (form == JSON && (n = utf8_next(s, &code)) > 0)
			buf_fmt(b, "\\u%04x", code);
		else
			buf_str(b, form == JSON ? "\\ufffd" : "?");
	}
	buf_str(b, quote);
}

/* Appends a member to a JSON object that is open; bare: its value is JSON
 * already. Nothing, if the value is "" or b is empty: memory ran out before. */
static void
buf_pair(struct buf *b, const char *key, const char *value, bool bare)
{
	if (b->len == 0 || *value == '\0')
		return;
	buf_fmt(b, "%s\"%s\":", b->data[b->len - 1] == '{' ? "" : ",", key);
	if (bare)
		buf_str(b, value);
	else
		buf_text(b, value, JSON);
}

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

/* Adds a copy to a list; it doubles whenever its length is a power of two. */
static void
names_add(struct names *v, const char *name)
{
	char **list = (v->n & (v->n - 1)) != 0 ? v->list :
	    realloc(v->list, (2 * v->n + 1) * sizeof(*list));

	if (list != NULL)
		v->list = list;
	if (list == NULL || (list[v->n] = strdup(name)) == NULL)
		v->failed = true;
	else
		v->n++;
}

static int
names_compare(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

static void
names_sort(struct names *v)
{
	if (v->n > 0)
		qsort(v->list, v->n, sizeof(*v->list), names_compare);
}

/* Writes a time as RFC 3339, in UTC, with milliseconds; basic: without
 * separators, as in a version's ID. */
static void
time_text(char out[32], int64_t ms, bool basic)
{
	time_t t = (time_t)(ms / 1000);
	struct tm tm;

	/* strftime would read a time zone file, outside the sandbox. */
	(void)gmtime_r(&t, &tm);
	(void)snprintf(out, 32, basic ? "%04d%02d%02dT%02d%02d%02d.%03dZ" :
	    "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", (tm.tm_year + 1900) % 10000,
	    tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec,
	    (int)(ms % 1000));
}

/* A text of digits as a number; the largest there is, if it is larger; -1 if it
 * is none. */
static int64_t
whole_number(const char *s)
{
	return *s != '\0' && s[strspn(s, "0123456789")] == '\0' ?
	    strtoll(s, NULL, 10) : -1;
}

static int
hex_value(int c)
{
	return !isxdigit(c) ? -1 : c <= '9' ? c - '0' : (c | 32) - 'a' + 10;
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
	size_t done = 0;
	ssize_t n;

	for (; done < len; done += n > 0 ? (size_t)n : 0) {
		n = write(fd, (const char *)data + done, len - done);
		if (n == -1 && errno != EINTR)
			return -1;
	}
	return 0;
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

#define rotl(x, n) ((x) << (n) | (x) >> (32 - (n)))

/* Each step waits for the one before. So what does not need it is added first,
 * and F2 is a sum of two disjoint halves rather than an "or": its first half
 * is ready earlier. Step i of a round takes word m * i + n. */
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
md5_mix(uint32_t state[4], const unsigned char *p)
{
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3];

	ROUND(F1, 0, 1, 0, 7, 12, 17, 22);
	ROUND(F2, 16, 5, 1, 5, 9, 14, 20);
	ROUND(F3, 32, 3, 5, 4, 11, 16, 23);
	ROUND(F4, 48, 7, 0, 6, 10, 15, 21);
	state[0] += a;
	state[1] += b;
	state[2] += c;
	state[3] += d;
}

static void
sha256_mix(uint32_t state[8], const unsigned char *p)
{
	uint32_t w[64], s[8], x, y;
	int i;

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

static const struct hash md5_start = { md5_mix, 16, 0,
    { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476 }, { 0 } };

static const struct hash sha256_start = { sha256_mix, 32, 0,
    { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
    0x1f83d9ab, 0x5be0cd19 }, { 0 } };

static void
hash_add(struct hash *h, const void *data, size_t n)
{
	const unsigned char *p = data;
	size_t have, take;

	for (; n > 0; n -= take, p += take, h->len += take) {
		have = (size_t)(h->len % 64);
		take = n < 64 - have ? n : 64 - have;
		memcpy(h->block + have, p, take);
		if (have + take == 64)
			h->mix(h->state, h->block);
	}
}

/* The digest, of 16 bytes or 32. Where MD5 puts the low byte of a number
 * first, SHA-256 puts the high one. */
static void
hash_end(struct hash *h, unsigned char *out)
{
	static const unsigned char pad[64] = { 0x80 };
	uint64_t bits = h->len * 8;
	unsigned i, turn = h->size == 32 ? 7 : 0;

	hash_add(h, pad, 1 + (119 - h->len % 64) % 64);
	for (i = 0; i < 8; i++)
		h->block[56 + (i ^ turn)] = (unsigned char)(bits >> 8 * i);
	h->mix(h->state, h->block);
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

/* Decodes into at most size bytes, perhaps in place; -1 if it is not whole,
 * padded base64. */
static ssize_t
base64_decode(const char *s, void *out, size_t size)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	    "abcdefghijklmnopqrstuvwxyz0123456789+/";
	size_t len = strspn(s, digits), pad = strlen(s + len), i, n = 0;
	unsigned char *to = out;
	uint32_t bits = 0;

	if (pad > 2 || strspn(s + len, "=") != pad || (len + pad) % 4 != 0 ||
	    len * 3 / 4 > size)
		return -1;
	for (i = 0; i < len; i++) {
		bits = bits << 6 | (uint32_t)(strchr(digits, s[i]) - digits);
		if (i % 4 != 0)
			to[n++] = (unsigned char)(bits >> (6 - 2 * (i % 4)));
	}
	/* Bits left over must be zero, or two texts would mean one thing. */
	return (bits & ((1u << 2 * pad) - 1)) != 0 ? -1 : (ssize_t)n;
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
	const struct member *members;	/* that are asked for */
	size_t n;			/* their number */
	char *to;			/* the struct that takes their texts */
	struct {			/* what was found of each */
		size_t len;		/* of its text, before the cut */
		unsigned n;		/* how often it stands there */
		char type;		/* 's', 'n', or another */
	} found[MEMBERS_MAX];
	unsigned brief;			/* ends after finding that many; or 0 */
	int fd;				/* the file, unless max is 0 */
	off_t pos, max;			/* bytes had of it, and at most */
	struct hash *md5;		/* takes what is read; or NULL */
	const unsigned char *p, *end;	/* the bytes at hand */
	const char *why;		/* it is no JSON object, or NULL */
	uint64_t at;			/* at this byte */
	int error;			/* the file could not be read: errno */
	size_t len;			/* of text, and more if it was cut */
	char text[512];			/* the string or number just read; a
					 * NUL in it is 0xff, which is no UTF-8
					 * and so nothing else */
	unsigned char piece[8192];	/* of the file */
};

/* Reads more of the file. Its next byte, not taken yet; -1 at the end. */
static int
json_more(struct json *j)
{
	ssize_t n;

	if (j->pos >= j->max)
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

/* The next byte, not taken yet; -1 at the end. */
static inline int
json_peek(struct json *j)
{
	return j->p < j->end ? *j->p : json_more(j);
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

/* Takes the bytes of a string that need no decoding: most of a state is such.
 * Were there any? Eight are looked at together: what is not plain, or is above
 * the first such, sets the high bit of its byte. */
static bool
json_plain(struct json *j)
{
	const uint64_t each = UINT64_MAX / 255;
	size_t room = j->len < sizeof(j->text) ? sizeof(j->text) - j->len : 0;
	const unsigned char *p = j->p;
	uint64_t w;
	size_t n;

	for (; j->end - p >= 8; p += 8) {
		memcpy(&w, p, 8);
		if (((w | (w - each * ' ') | ((w ^ each * '"') - each) |
		    ((w ^ each * '\\') - each)) & each * 0x80) != 0)
			break;
	}
	while (p < j->end && *p >= 0x20 && *p < 0x80 && *p != '"' &&
	    *p != '\\')
		p++;
	n = (size_t)(p - j->p);
	if (room > 0)
		memcpy(j->text + j->len, j->p, n < room ? n : room);
	j->len += n;
	j->p = p;
	return n > 0;
}

/* Takes bytes of a set, up to a number of them. Were there any? */
static bool
json_take(struct json *j, const char *set, unsigned max)
{
	unsigned n = 0;
	int c;

	for (; n < max; n++, j->p++) {
		if ((c = json_peek(j)) <= 0 || strchr(set, c) == NULL)
			break;
		json_keep(j, (unsigned)c);
	}
	return n > 0;
}

static bool
json_number(struct json *j)
{
	static const char digits[] = "0123456789";
	bool ok;

	j->len = 0;
	(void)json_take(j, "-", 1);
	ok = json_take(j, "0", 1) || json_take(j, digits, UINT_MAX);
	if (ok && json_take(j, ".", 1))
		ok = json_take(j, digits, UINT_MAX);
	if (ok && json_take(j, "eE", 1)) {
		(void)json_take(j, "+-", 1);
		ok = json_take(j, digits, UINT_MAX);
	}
	return ok || json_wrong(j, "has a malformed number");
}

/* What stands behind a backslash: a code point, which may be one half of a
 * surrogate pair. */
static bool
json_escape(struct json *j, unsigned *code)
{
	static const char from[] = "\"\\/bfnrtu", to[] = "\"\\/\b\f\n\r\t";
	int c = json_peek(j), n = c == 'u' ? 4 : 0, v;
	const char *p = c <= 0 ? NULL : strchr(from, c);

	if (p == NULL)
		return json_wrong(j, "has an unknown escape in a string");
	*code = (unsigned)to[p - from];	/* for u: its NUL, then 4 digits */
	for (j->p++; n > 0; n--, j->p++) {
		if ((v = hex_value(json_peek(j))) == -1)
			return json_wrong(j, "has a bad \\u escape");
		*code = *code << 4 | (unsigned)v;
	}
	return true;
}

/* The rest of a character of two to four bytes, the first of which is code. */
static bool
json_utf8(struct json *j, unsigned *code)
{
	char s[5] = { (char)*code };
	size_t n = 1;

	while (n < 4 && (json_peek(j) & 0xc0) == 0x80)
		s[n++] = (char)*j->p++;
	if (utf8_next(s, code) == n)
		return true;
	(void)json_wrong(j, "has a string that is not UTF-8");
	j->at -= n;
	return false;
}

/* A string, its first quote not taken yet. RFC 8259 lets half a surrogate
 * pair pass; as text it is U+FFFD. */
static bool
json_string(struct json *j)
{
	static const unsigned lead[] = { 0, 0xc0, 0xe0, 0xf0 };
	unsigned code, high = 0, n;
	int c;

	j->len = 0;
	for (j->p++; (c = json_peek(j)) != '"';) {
		if (json_plain(j)) {
			high = 0;
			continue;
		}
		if (c < 0x20)
			return json_wrong(j, "has a control character in a "
			    "string");
		j->p++;
		code = (unsigned)c;
		if ((c == '\\' && !json_escape(j, &code)) ||
		    (c >= 0x80 && !json_utf8(j, &code)))
			return false;
		if (high != 0 && code >> 10 == 0x37) {
			j->len -= 3;	/* the U+FFFD of its first half */
			code = (high << 10) + code - 0x35fdc00;
		}
		high = code >> 10 == 0x36 ? code : 0;
		code = code >> 11 == 0x1b ? 0xfffd : code;
		n = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
		json_keep(j, code == 0 ? 0xff : lead[n] | code >> 6 * n);
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
	size_t i, m = j->n, len, last = sizeof(j->text) - 1;
	char *s;
	int type;

	if (json_skip(j) != '"')
		return json_wrong(j, "has no key where one is due");
	if (!json_string(j))
		return false;
	j->text[j->len < last ? j->len : last] = '\0';
	while (depth == 1 && (s = strstr(j->text, "\xc5\xbf")) != NULL) {
		*s = 's';		/* U+017F: Go takes it for s */
		memmove(s + 1, s + 2, strlen(s + 1));
	}
	for (i = 0; depth == 1 && i < j->n; i++)
		if (strcasecmp(j->text, j->members[i].key) == 0)
			m = i;
	if (json_skip(j) != ':')
		return json_wrong(j, "has no colon after a key");
	j->p++;
	type = json_value(j, depth + 1);
	if (type == 0 || m == j->n)
		return type != 0;
	len = type == 's' || type == 'n' ? j->len : 0;
	j->text[len < last ? len : last] = '\0';
	(void)snprintf(j->to + j->members[m].at, j->members[m].size, "%s",
	    j->text);
	j->found[m].type = (char)type;
	j->found[m].len = len;
	return j->found[m].n++ > 0 || --j->brief > 0;	/* 0 wraps: reads all */
}

/* A value that stands at this depth. Returns what it was: 's' a string, 'n' a
 * number, another letter, or 0 if it is wrong. */
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
		return *word == '\0' ? 'l' :
		    json_wrong(j, "has no value where one is due");
	}
	if (depth > JSON_DEPTH)
		return json_wrong(j, "is nested too deeply");
	j->p++;
	for (c = json_skip(j); c != end; j->p += c == ',') {
		if (open == '{' ? !json_member(j, depth) :
		    json_value(j, depth + 1) == 0)
			return 0;
		c = json_skip(j);
		if (c != ',' && c != end)
			return json_wrong(j, "has no comma or end where one "
			    "is due");
	}
	j->p++;
	return open;
}

/* Is it one whole object, and nothing else? Finds n members of it, whose texts
 * go to fields of a struct. */
static bool
json_object(struct json *j, const struct member *members, size_t n, void *to)
{
	j->members = members;
	j->n = n;
	j->to = to;
	if (json_skip(j) != '{')
		return json_wrong(j, "does not begin with {");
	return json_value(j, 1) != 0 && (json_skip(j) == -1 ||
	    json_wrong(j, "goes on after its end"));
}

/* JSON that is all at hand. */
static struct json
json_text(const void *data, size_t len)
{
	const unsigned char *p = data;

	return (struct json){ .p = p, .end = p + len, .pos = (off_t)len };
}

/* ==== HTTP parser ========================================================
 *
 * Bytes in, strings out; no I/O, no allocation. RFC 9112 as a server, read
 * strictly: whatever two parsers could understand differently is refused,
 * and so is every bare CR or LF. Functions return NULL, or the status and
 * what is wrong. What is refused ends the connection, for nobody knows where
 * the next request would begin.
 */

/* RFC 9110, 5.5: a value has no control characters but HTAB. */
static bool
http_value_ok(const char *s)
{
	while (*s == '\t' || ((unsigned char)*s >= ' ' && *s != 0x7f))
		s++;
	return *s == '\0';
}

/* The length of the token that s begins with (RFC 9110, 5.6.2). */
static size_t
http_token(const char *s)
{
	size_t n = 0;

	while (isalnum((unsigned char)s[n]) || (s[n] != '\0' &&
	    strchr("!#$%&'*+-.^_`|~", s[n]) != NULL))
		n++;
	return n;
}

/* RFC 9110, 4.2: host [":" port]; the host a name, IPv4, or [IPv6]. */
static bool
http_host_ok(const char *h)
{
	size_t n = 0;

	if (*h == '[') {
		n = 1 + strspn(h + 1, "0123456789abcdefABCDEF:.");
		if (h[n++] != ']' || n < 4)
			return false;
	} else
		while (isalnum((unsigned char)h[n]) || h[n] == '-' ||
		    h[n] == '.' || h[n] == '_')
			n++;
	return n > 0 && (h[n] == '\0' || (h[n] == ':' && strlen(h + n) <= 6 &&
	    h[n + 1 + strspn(h + n + 1, "0123456789")] == '\0'));
}

/* Cuts up a comma-separated list, and notes the quality that each of two words
 * has in it: "1" if none is given; it stays NULL if the word is not there, or
 * not wanted, with 0.000 at most (RFC 9110, 12.4.2). Other parameters mean
 * nothing. */
static void
http_lists(char *list, const char *const words[2], const char *quality[2])
{
	char *item, *word, *parameter;
	const char *q;
	int i;

	while ((item = strsep(&list, ",")) != NULL) {
		word = trim(strsep(&item, ";"));
		for (q = "1"; item != NULL;) {
			parameter = trim(strsep(&item, ";"));
			if (strncasecmp(parameter, "q=", 2) == 0)
				q = parameter + 2;
		}
		for (i = 0; i < 2; i++)
			if (strcasecmp(word, words[i]) == 0 &&
			    q[strspn(q, "0.")] != '\0')
				quality[i] = q;
	}
}

/* Cuts off a line's end; false if that is not CR LF, or a NUL comes first. */
static bool
http_line(char *line, char *lf)
{
	if (lf == line || lf[-1] != '\r')
		return false;
	lf[-1] = '\0';
	return line + strlen(line) == lf - 1;
}

/* One field line, cut up in place. */
static const char *
http_field(struct head *h, char *line)
{
	static const char *const connections[] = { "close", "keep-alive" };
	static const char *const types[] = { "text/html", "application/json" };
	size_t n = http_token(line), f = 0;

	/* obs-fold and "Name :" end here. */
	if (n == 0 || line[n] != ':')
		return "400 a field line is not: name, colon, value";
	line[n] = '\0';
	if (!http_value_ok(line + n + 1))
		return "400 a field's value has a control character";
	if (++h->fields > FIELDS_MAX)
		return "431 there are too many fields";
	while (f < F_COUNT && ((*line | 32) != *field_names[f] ||
	    strcasecmp(line, field_names[f]) != 0))
		f++;
	if (f == F_COUNT)
		return NULL;
	if (f < F_CONNECTION && h->field[f] != NULL)
		return "400 a field that may stand once stands twice";
	h->field[f] = trim(line + n + 1);
	if (f == F_CONNECTION)		/* in whichever line it stands */
		http_lists(h->field[f], connections, h->connection);
	if (f == F_ACCEPT)
		http_lists(h->field[f], types, h->accept);
	return NULL;
}

/* Cuts scheme and authority off an absolute-form target (RFC 9112, 3.2.2):
 * its host is the one that counts, and moves to where the scheme was. */
static const char *
http_absolute(struct head *h)
{
	char *p = h->target;
	size_t n = strncasecmp(p, "https://", 8) == 0 ? 8 : 7, len;

	if (n == 7 && strncasecmp(p, "http://", 7) != 0)
		return "400 the target is no path and no URL";
	len = strcspn(p + n, "/?");
	h->target = p + n + len;
	h->host = memmove(p, p + n, len);
	p[len] = '\0';
	return http_host_ok(h->host) ? NULL :
	    "400 the target's host is malformed";
}

/* method SP target SP HTTP/1.x, with nothing else between. */
static const char *
http_request_line(struct head *h, char *line)
{
	size_t n = http_token(line), m = 0;
	char *p = line + n + 1;

	if (n == 0 || line[n] != ' ')
		return "400 the request does not begin with a method";
	line[n] = '\0';
	while (m < M_COUNT && strcmp(line, method_names[m]) != 0)
		m++;
	h->method = (enum method)m;
	h->target = p;
	while (*p > 0x20 && *p < 0x7f && *p != '#')
		p++;
	if (p == h->target || !glob(" HTTP/?.?", p) ||
	    !isdigit((unsigned char)p[6]) || !isdigit((unsigned char)p[8]))
		return "400 the request line is not: method, target, HTTP/1.1";
	if (p[6] != '1')
		return "505 the version is not HTTP/1.x";
	h->minor = p[8] == '0' ? 0 : 1;
	if (p - h->target > TARGET_MAX)
		return "414 the target is too long";
	if (m == M_COUNT)
		return "501 no such method: see update_method, lock_method "
		    "and unlock_method";
	*p = '\0';
	if (strcmp(h->target, "*") == 0)
		return m == M_OPTIONS ? NULL : "400 only OPTIONS goes with *";
	return *h->target == '/' ? NULL : http_absolute(h);
}

/* The rules that need the whole head: RFC 9112, 3.2, 6; 9110, 10.1.1. */
static const char *
http_whole(struct head *h)
{
	char *const *f = h->field, *length = f[F_LENGTH];

	if (f[F_HOST] == NULL ? h->minor == 1 : !http_host_ok(f[F_HOST]))
		return "400 Host is missing or malformed";
	if (*h->host == '\0' && f[F_HOST] != NULL)
		h->host = f[F_HOST];	/* else the absolute form's, or none */
	if (length != NULL && (h->length = whole_number(length)) == -1)
		return "400 Content-Length is no number";
	if (f[F_CODING] != NULL && (h->minor == 0 || h->length != -1))
		return "400 Transfer-Encoding goes neither with Content-Length "
		    "nor with HTTP/1.0";
	if (f[F_CODING] != NULL && strcasecmp(f[F_CODING], "chunked") != 0)
		return "501 the only transfer coding known is chunked";
	if (f[F_EXPECT] != NULL && h->minor == 1 &&
	    strcasecmp(f[F_EXPECT], "100-continue") != 0)
		return "417 only 100-continue can be expected";
	return NULL;
}

/* Parses a request's head, from its first line to the empty one. Returns the
 * bytes it took, 0 if there must be more, or -1 if it is refused: see h->why.
 * The strings of h serve until the next call, which only the loop makes. */
static int
http_parse(const char *data, size_t len, struct head *h)
{
	static char copy[HEAD_MAX];
	char *line, *lf;

	memcpy(copy, data, len);
	*h = (struct head){ .method = M_COUNT, .length = -1, .minor = 1,
	    .host = "" };
	if (len > 0 && *data == 0x16)
		h->why = "400 this is TLS, and the port speaks plain HTTP";
	for (line = copy; h->why == NULL; line = lf + 1) {
		lf = memchr(line, '\n', (size_t)(copy + len - line));
		if (lf == NULL) {
			h->why = line > copy ? "431 the head is too large" :
			    "414 the request line is too long";
			return len < HEAD_MAX ? 0 : -1;
		}
		if (!http_line(line, lf))
			h->why = "400 a line does not end in CR LF, or has a "
			    "NUL in it";
		else if (line == copy)
			h->why = http_request_line(h, line);
		else if (*line != '\0')
			h->why = http_field(h, line);
		else if ((h->why = http_whole(h)) == NULL)
			return (int)(lf + 1 - copy);
	}
	return -1;
}

/* The first line of a chunk (RFC 9112, 7.1): sets size; too large a number is
 * the largest. False if it is malformed. Extensions mean nothing here, but each
 * has a name after its ";", and a quoted value ends; a backslash, which nobody
 * sends, is refused. */
static bool
chunk_size(const char *line, int64_t *size)
{
	const char *p = line + strspn(line, "0123456789abcdefABCDEF");
	bool quoted = false, named = true;

	*size = strtoll(line, NULL, 16);
	if (p == line || !http_value_ok(p) ||
	    (*p != '\0' && p[strspn(p, " \t")] != ';'))
		return false;
	for (; *p != '\0'; p++) {
		if (!quoted && (*p == ' ' || *p == '\t'))
			continue;
		if (*p == '\\' || (!named && http_token(p) == 0))
			return false;
		if (*p == '"')
			quoted = !quoted;
		else if (!quoted)
			named = *p != ';';
	}
	return named && !quoted;
}

/* ==== names ==============================================================
 *
 * From a URL to what it names: decoded once, then read. All rules about
 * names are in name_wrong, and nothing reaches the disk that did not pass it.
 */

/* YYYYMMDDTHHMMSS.mmmZ-SERIAL, the ID of an earlier version, then end. */
static bool
is_version(const char *s, const char *end)
{
	const char *shape = "00000000T000000.000Z-";
	size_t n;

	for (; *shape != '\0'; shape++, s++)
		if (*shape != (isdigit((unsigned char)*s) ? '0' : *s))
			return false;
	n = strspn(s, "0123456789");
	return n > 0 && n <= SERIAL_MAX && strcmp(s + n, end) == 0;
}

/*
 * NULL if name may be a state's, else what is wrong with it:
 * 1. it has 1 to 32 segments of 1 to 200 bytes, and 1,000 bytes in all;
 * 2. it is UTF-8 without backslash, and without what shown_next refuses;
 * 3. no segment begins with '.' or '-': so there is no "..", nothing hidden,
 * nothing like an option; 4. none ends like our own files, so no state's file
 * is another's lock; 5. its URL means nothing else: /terraform_state/NAME and
 * /terraform_lock/NAME are other names of NAME, and NAME/lock is its lock;
 * 6. on a file system that ignores case, only one spelling is let in: Demo and
 * demo would be one file under two guards.
 */
static const char *
name_wrong(const char *name)
{
	char part[SEGMENT_MAX + 1];
	unsigned segments = 0;
	const char *p = name;
	size_t n;

	for (; *p != '\0'; p += n) {
		n = shown_next(p);
		if (n == 0 || *p == '\\')
			return "a state name is UTF-8 without control "
			    "characters, marks of direction or backslashes";
		if (conf.fold && (isupper((unsigned char)*p) || n > 1))
			return "the server's file system ignores case: no "
			    "capitals, and only ASCII, in a state name";
	}
	for (p = name; segments == 0 || p[-1] != '\0'; p += n + 1) {
		n = strcspn(p, "/");
		if (n == 0 || n > SEGMENT_MAX || ++segments > SEGMENTS_MAX ||
		    strlen(name) > NAME_LEN_MAX)
			return "a state name has 1 to 32 parts of 1 to 200 "
			    "bytes between single slashes, no slash at its "
			    "end, and 1000 bytes in all";
		*stpncpy(part, p, n) = '\0';
		if (*p == '.' || *p == '-' || cut_suffix(part, ".lock") ||
		    cut_suffix(part, ".log") || cut_suffix(part, ".tfstate"))
			return "no part of a state name begins with . or -, or "
			    "ends in .lock, .log or .tfstate";
	}
	return strcmp(part, "lock") == 0 ||
	    strncmp(name, "terraform_state/", 16) == 0 ||
	    strncmp(name, "terraform_lock/", 15) == 0 ? "no state is called "
	    "lock, terraform_state/... or terraform_lock/...: such URLs mean "
	    "another" : NULL;
}

/* Undoes percent-encoding once; in a query '+' is a blank. False for a bad
 * escape, a NUL, or what does not fit. */
static bool
url_decode(const char *s, char *out, size_t size, bool query)
{
	int high, low;

	for (; *s != '\0' && size > 1; s++, out++, size--) {
		*out = query && *s == '+' ? ' ' : *s;
		if (*s != '%')
			continue;
		high = hex_value((unsigned char)s[1]);
		low = high == -1 ? -1 : hex_value((unsigned char)s[2]);
		if ((high | low) <= 0)		/* no digit, or a NUL */
			return false;
		*out = (char)(high << 4 | low);
		s += 2;
	}
	*out = '\0';
	return *s == '\0';
}

/* Which path means what; the first pattern that fits counts, and a name begins
 * at its '*'. The path of http://host is empty, and OPTIONS may ask for "*". */
static const struct route {
	const char *path;
	enum kind kind;
} routes[] = {
	{ "/-/healthy", K_HEALTHY }, { "/-/ready", K_READY },
	{ "/-/metrics", K_METRICS }, { "/-/versions/*", K_VERSIONS },
	{ "/-/log/*", K_LOG }, { "/-/*", K_NONE }, { "/", K_ROOT },
	{ "/terraform_state/*", K_STATE }, { "/terraform_lock/*", K_LOCK },
	{ "/*", K_STATE }, { "", K_ROOT }, { "*", K_NONE }
};

/* Fills kind, name and version from a target's path; K_NONE: there is no such
 * page. NULL, or what is wrong with a name. */
static const char *
name_route(const char *target, struct request *r)
{
	const struct route *route = routes;
	char *name, *last;
	const char *wrong, *slash = target;
	size_t ups = 0;			/* number of ../: 40 fit into root */

	memcpy(r->root, "./", 3);
	while (ups < 40 && *slash != '\0' &&
	    (slash = strchr(slash + 1, '/')) != NULL)
		memcpy(r->root + 3 * ups++, "../", 4);
	if (!url_decode(target, r->name, sizeof(r->name), false))
		return "the URL has a bad escape or a NUL, or its state name "
		    "more than 1000 bytes";
	while (!glob(route->path, r->name))
		route++;
	r->kind = route->kind;
	if (r->kind < K_STATE)
		return NULL;
	name = r->name + strcspn(route->path, "*");
	(void)cut_suffix(name, ".tfstate");
	last = strrchr(name, '/');
	if (last != NULL && (r->kind == K_STATE ? strcmp(last, "/lock") == 0 :
	    r->kind == K_VERSIONS && is_version(last + 1, ""))) {
		r->kind = r->kind == K_STATE ? K_LOCK : K_VERSION;
		(void)snprintf(r->version, sizeof(r->version), "%s", last + 1);
		*last = '\0';
		(void)cut_suffix(name, ".tfstate");
	}
	if ((wrong = name_wrong(name)) == NULL)
		memmove(r->name, name, strlen(name) + 1);
	return wrong;
}

/* Takes what we know from a target's query: ID, and for the listing q and
 * locked. NULL, or what is wrong: a state's or a lock's URL may have no other
 * key, for ?env=prod and ?env=dev would be one state. An unlock may have any,
 * so that a run that has begun can end. */
static const char *
name_query(char *query, struct request *r)
{
	bool unlock = r->method == M_UNLOCK || (r->method == M_DELETE &&
	    (r->kind == K_LOCK || r->go || r->has_md5 || r->length > 0));
	bool strict = (r->kind == K_STATE || r->kind == K_LOCK) && !unlock, id;
	char *value, *key;

	while ((value = strsep(&query, "&")) != NULL) {
		if (*value == '\0')
			continue;
		key = strsep(&value, "=");
		value = value != NULL ? value : key + strlen(key);
		id = strcmp(key, "ID") == 0;
		if (strict && !id)
			return "a state's URL takes no query but ?ID=: put "
			    "what makes two states different into the path, "
			    "as in /NAME/dev";
		/* Two IDs, or one cut short, could open what is locked. */
		if (id && (r->has_id ||
		    !url_decode(value, r->id, sizeof(r->id), true)))
			return "?ID= is given twice, badly escaped, or longer "
			    "than 256 bytes";
		if (r->kind == K_ROOT && strcasecmp(key, "q") == 0 &&
		    !url_decode(value, r->query, sizeof(r->query), true))
			return "?q= is badly escaped or longer than 255 bytes";
		r->has_id |= id;
		r->locked |= strcasecmp(key, "locked") == 0;
	}
	return NULL;
}

/* ==== storage ============================================================
 *
 * A name's files lie in one directory; everything is opened relative to a
 * descriptor, segment by segment, and no symbolic link is followed. A safe
 * write, in order, with what each step is for:
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

static struct {
	int root;			/* the directory */
	int guard;			/* .guard, opened once */
	bool remote;			/* a network file system: there the loop
					 * reads no states, for it might wait */
	bool apart;			/* .tmp is another file system */
	uint64_t token;			/* ours, in temporary names */
	_Atomic unsigned tmps;		/* temporary files so far */
	_Atomic bool low;		/* below the reserve */
	_Atomic bool unsynced;		/* a directory's sync has failed */
} store = { .root = -1, .guard = -1 };

/* Closes, but never the root, and leaves errno alone. */
static void
close_quietly(int fd)
{
	int saved = errno;

	if (fd != -1 && fd != store.root)
		(void)close(fd);
	errno = saved;
}

static bool
unchanged(const struct stat *a, const struct stat *b)
{
	return a->st_ino == b->st_ino && a->st_dev == b->st_dev &&
	    a->st_size == b->st_size &&
	    time_us(a->st_mtim) == time_us(b->st_mtim) &&
	    time_us(a->st_ctim) == time_us(b->st_ctim);
}

/* Is an open file still the one that a path leads to? If not, errno is EIDRM;
 * if that could not be looked up, it tells why. */
static bool
file_is(int fd, int dir, const char *path, int flag)
{
	struct stat mine, named;
	bool found = fstat(fd, &mine) == 0 &&
	    fstatat(dir, path, &named, flag) == 0;

	if (found || errno == ENOENT)
		errno = EIDRM;
	return found && mine.st_ino == named.st_ino &&
	    mine.st_dev == named.st_dev;
}

/* Is our directory still the one at -d? (On overlayfs the link count of a
 * removed directory does not tell.) */
#define store_there() file_is(store.root, AT_FDCWD, conf.dir, 0)

/* Opens an ordinary file, or, with O_DIRECTORY, a directory, and nothing else:
 * a FIFO would block, a link lead elsewhere. dir -1: it does not exist (openat
 * says EBADF); st may be NULL. -1 with errno: ENOENT only if there is none, for
 * only a missing state may be a 404; EIDRM if our whole directory is gone, or
 * why that could not be seen. */
static int
file_open(int dir, const char *name, int how, struct stat *st)
{
	struct stat mine = { 0 };
	int fd = openat(dir, name, how | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY |
	    O_CLOEXEC, 0600);

	st = st != NULL ? st : &mine;
	if (fd != -1 && fstat(fd, st) == 0) {
		if ((how & O_DIRECTORY) != 0 || S_ISREG(st->st_mode))
			return fd;
		errno = EISDIR;
	} else if (fd == -1 && (errno == ENOENT || dir == -1) && store_there())
		errno = ENOENT;
	close_quietly(fd);
	return -1;
}

/* Syncs a directory, and asks it once more: when XFS has shut itself down, an
 * fsync may return 0 all the same, but every later call fails with EIO. */
static int
dir_sync(int dir)
{
	struct stat st;

	if (fsync(dir) == 0 && fstat(dir, &st) == 0)
		return 0;
	store.unsynced = true;
	return -1;
}

enum { D_OPEN = 0, D_MAKE = 1, D_SYNC = 2, D_HISTORY = 4 };

/* Opens the directory that a path's last segment is in ("a/" means a itself);
 * with D_HISTORY, that of a name's earlier versions: .history/NAME/ID.tfstate.
 * What is missing is made by D_MAKE; D_SYNC syncs each directory above it, but
 * not itself. -1 with errno. */
static int
dir_open(const char *path, unsigned how)
{
	char copy[NAME_LEN_MAX + 80], *rest = copy, *part;
	int dir = store.root, next;

	(void)snprintf(copy, sizeof(copy), (how & D_HISTORY) != 0 ?
	    ".history/%s/" : "%s", path);
	while (dir != -1) {
		part = strsep(&rest, "/");
		if (rest == NULL)
			return dir;
		if ((how & D_SYNC) != 0 && dir_sync(dir) == -1)
			break;
		next = file_open(dir, part, O_DIRECTORY, NULL);
		if (next == -1 && errno == ENOENT && (how & D_MAKE) != 0 &&
		    (mkdirat(dir, part, 0700) == 0 || errno == EEXIST))
			next = file_open(dir, part, O_DIRECTORY, NULL);
		close_quietly(dir);
		dir = next;
	}
	close_quietly(dir);
	return -1;
}

/* What one of a name's files is called in its directory; valid until the
 * thread's next call. */
static const char *
leaf_name(const char *name, const char *suffix)
{
	static __thread char leaf[SEGMENT_MAX + 16];
	const char *slash = strrchr(name, '/');

	(void)snprintf(leaf, sizeof(leaf), "%.*s%s", SEGMENT_MAX,
	    slash != NULL ? slash + 1 : name, suffix);
	return leaf;
}

/* Opens one of a name's files, or its earlier version id, if that is not "". */
static int
name_file(const char *name, const char *id, const char *suffix, int how,
    struct stat *st)
{
	bool old = *id != '\0';
	int dir = dir_open(name, old ? D_HISTORY : D_OPEN);
	int fd = dir == -1 ? -1 : file_open(dir, leaf_name(old ? id : name,
	    suffix), how, st);

	close_quietly(dir);
	return fd;
}

/* Have two files the same bytes? No, if one cannot be read. */
static bool
same_bytes(int a, int b)
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

/* Reads what a state says about itself; with j->brief 4, no further than the
 * first four keys need. A file that is not there (fd -1) says nothing. */
static void
meta_read(struct json *j, struct meta *m)
{
	static const struct member k[] = {
		{ "serial", FIELD(struct meta, serial) },
		{ "lineage", FIELD(struct meta, lineage) },
		{ "version", 0, 0 },
		{ "terraform_version", FIELD(struct meta, version) },
		{ "encrypted_data", 0, 0 },
		{ "id", 0, 0 },
	};
	size_t i;

	*m = (struct meta){ 0 };
	/* What is wrong with it, j tells. */
	(void)json_object(j, k, j->brief > 0 ? j->brief : 6, m);
	if (j->found[0].type != 'n' || j->found[0].len > SERIAL_MAX ||
	    strspn(m->serial, "0123456789") != j->found[0].len)
		m->serial[0] = '\0';
	m->type = j->found[2].type == 'n' || j->found[4].type == 's' ? 's' :
	    j->found[2].type == 's' || j->found[5].type == 's' ? 'l' : 0;
	for (i = 0; i < 5; i++)
		if (j->found[i].n > 1 && i != 3)
			m->doubled = k[i].key;
}

/* 0 if a directory's disk has room for n more bytes and for the reserve, so
 * that locks can still be written when states no longer fit; else -1 with
 * errno. n may be -1: a chunk's length is not known yet. Complains when the
 * reserve of the root's disk is hit. */
static int
store_fits(int dir, int64_t n)
{
	struct statvfs fs;
	uint64_t room, reserve;
	bool low;

	if (fstatvfs(dir, &fs) == -1)
		return -1;
	reserve = (uint64_t)fs.f_blocks * fs.f_frsize / 16;
	reserve = reserve < RESERVE ? reserve : RESERVE;
	/* Some network file systems do not tell. */
	room = fs.f_blocks == 0 ? UINT64_MAX :
	    (uint64_t)fs.f_bavail * fs.f_frsize;
	low = room < reserve || (fs.f_favail < 64 &&
	    fs.f_favail < fs.f_files / 16);	/* the same for files */
	if (dir == store.root && atomic_exchange(&store.low, low) != low)
		complain("%s: %s", conf.dir, low ? "the disk is nearly full, "
		    "only locks are written" : "there is room again");
	errno = ENOSPC;
	return !low && room - reserve >= (uint64_t)(n > 0 ? n : 0) ? 0 : -1;
}

/* ---- temporary files: .tmp/TOKEN-NUMBER, or .tmp-TOKEN-NUMBER elsewhere */

static void
tmp_name(struct tmp *t, int dir)
{
	*t = (struct tmp){ .fd = -1, .dir = dir };
	(void)snprintf(t->name, sizeof(t->name), ".tmp%c%016llx-%u",
	    dir == store.root && !store.apart ? '/' : '-',
	    (unsigned long long)store.token, store.tmps++);
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

/* Makes one and opens it; -1 with errno. Ended by tmp_remove, whatever has
 * become of it: it may be there after an error, too. */
static int
tmp_create(struct tmp *t, int dir)
{
	tmp_name(t, dir);
	t->fd = file_open(dir, t->name, O_RDWR | O_CREAT | O_EXCL, NULL);
	if (t->fd == -1 && errno == ENOENT) {	/* .tmp was removed */
		(void)mkdirat(store.root, ".tmp", 0700);
		t->fd = file_open(dir, t->name, O_RDWR | O_CREAT | O_EXCL,
		    NULL);
	}
	return t->fd != -1 ? 0 : -1;
}

/* Makes one a copy of a file, synced, with its mtime; -1: nothing is left. The
 * name goes first: NFS may have made it, though a link or a rename failed. */
static int
tmp_copy(struct tmp *t, int dir, int fd)
{
	char piece[8192];
	struct stat st;
	off_t at = 0;
	ssize_t n = -1;

	tmp_remove(t);
	if (fstat(fd, &st) == 0 && store_fits(dir, st.st_size) == 0 &&
	    tmp_create(t, dir) == 0)
		while ((n = read_at(fd, piece, sizeof(piece), at)) > 0 &&
		    write_all(t->fd, piece, (size_t)n) == 0)
			at += n;
	if (n == 0 && futimens(t->fd, (const struct timespec[]){ st.st_mtim,
	    st.st_mtim }) == 0 && fsync(t->fd) == 0)
		return 0;
	tmp_remove(t);
	return -1;
}

/* Moves one to another directory, still hidden: by a copy, if that is another
 * file system or a mount point. */
static int
tmp_move(struct tmp *t, int dir)
{
	struct tmp to;

	if (t->dir == dir)
		return 0;
	tmp_name(&to, dir);
	if (renameat(t->dir, t->name, dir, to.name) == 0)
		to.fd = t->fd;
	else if (errno == EXDEV && tmp_copy(&to, dir, t->fd) == 0)
		tmp_remove(t);
	else
		return -1;
	*t = to;
	return 0;
}

/* Makes one a name's file, in place of what was there. */
static int
tmp_rename(struct tmp *t, int dir, const char *name, const char *suffix)
{
	if (tmp_move(t, dir) == -1 ||
	    renameat(dir, t->name, dir, leaf_name(name, suffix)) == -1)
		return -1;
	t->name[0] = '\0';
	return 0;
}

/* ---- history ---- */

/* Lists the IDs in a history, oldest first; the caller frees them. */
static int
history_list(int dir, struct names *ids)
{
	int copy = file_open(dir, ".", O_DIRECTORY, NULL), error;
	DIR *d = copy == -1 ? NULL : fdopendir(copy);
	struct dirent *e;

	while (d != NULL && (errno = 0, e = readdir(d)) != NULL)
		if (is_version(e->d_name, STATE) &&
		    cut_suffix(e->d_name, STATE))
			names_add(ids, e->d_name);
	error = ids->failed ? ENOMEM : errno;
	if (d != NULL)
		(void)closedir(d);
	else
		close_quietly(copy);
	names_sort(ids);
	errno = error;
	return error == 0 ? 0 : -1;
}

/* The time in a version's ID, in milliseconds. */
static int64_t
version_ms(const char *id)
{
	int date = atoi(id), hms = atoi(id + 9);
	int month = date / 100 % 100, day = date % 100;
	struct tm tm = {		/* by hand, even month 0 may be there */
		.tm_year = date / 10000 - 1900,
		.tm_mon = month > 0 ? month - 1 : 0,
		.tm_mday = day > 0 ? day : 1, .tm_hour = hms / 10000,
		.tm_min = hms / 100 % 100, .tm_sec = hms % 100
	};

	return (int64_t)timegm(&tm) * 1000 + atoi(id + 16);
}

/*
 * Removes what is beyond -k, the oldest first; but before the others those
 * that were written under the lock that is held, except the newest of them:
 * terraform writes every 20 seconds of a long run, and these must not push out
 * what was there before it. Their mtime is later than the lock's: one file
 * system, one clock. If an ID or an mtime is later than now, clocks have
 * moved: then simply the oldest go.
 */
static void
history_prune(int dir, const struct names *ids, const struct lock *lock)
{
	size_t n = ids->n, excess = n > conf.keep ? n - conf.keep : 0;
	size_t newest = 0, i;
	int64_t now = time_ms();
	bool moved = n > 0 && version_ms(ids->list[n - 1]) > now;
	enum { FIND_NEWEST, OF_THE_RUN, ALL } round =
	    lock->held && !moved ? FIND_NEWEST : ALL;
	const char *leaf;
	struct stat st;

	for (; round <= ALL; round++)
		for (i = 0; i < n && excess > 0; i++) {
			leaf = leaf_name(ids->list[i], STATE);
			if (*ids->list[i] == '\0' || (round < ALL &&
			    (fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) ==
			    -1 || time_us(st.st_mtim) <= time_us(lock->since))))
				continue;
			if (round == FIND_NEWEST) {
				moved |= st.st_mtim.tv_sec > now / 1000;
				newest = moved ? 0 : i;	/* 0: none go */
			} else if (round == ALL || i < newest) {
				(void)unlinkat(dir, leaf, 0);
				*ids->list[i] = '\0';
				excess--;
			}
		}
}

/* ==== locks and guard ====================================================
 *
 * NAME.lock not empty = locked. Its bytes are the lock info of the holder. A
 * file that is not lock info was made by hand: a freeze, held by nobody whose
 * ID could match, until force-unlock or rm ends it. One that is empty, or
 * begins with a NUL byte, is a LOCK that a crash cut short: nobody was told of
 * it, so nobody has it.
 *
 * Who changes a name's files holds its guard. Between processes and hosts it
 * is a record lock on the byte of .guard that is the name's hash, inside the
 * process an entry in a list. No other name waits for it.
 */

/* Reads lock info. False if it is no JSON object (then j->why says so), or has
 * not exactly one ID of 1 to ID_MAX bytes without a NUL. */
static bool
lock_info(struct json *j, struct lock *l)
{
	static const struct member k[] = {
		{ "ID", FIELD(struct lock, id) },
		{ "Operation", FIELD(struct lock, operation) },
		{ "Info", FIELD(struct lock, info) },
		{ "Who", FIELD(struct lock, who) },
		{ "Created", FIELD(struct lock, created) },
	};

	return json_object(j, k, 5, l) && j->found[0].n == 1 &&
	    j->found[0].type == 's' && j->found[0].len > 0 &&
	    j->found[0].len <= ID_MAX && strchr(l->id, 0xff) == NULL;
}

/* Reads who holds the lock from a file that was just opened (-1: errno is why),
 * and closes it; -1 with errno. Frees l->raw; the caller frees the new one. */
static int
lock_read(int fd, struct lock *l)
{
	struct stat st;
	ssize_t n = -1;
	struct json j;

	free(l->raw);
	*l = (struct lock){ 0 };
	if (fd == -1)
		return errno == ENOENT ? 0 : -1;
	l->raw = calloc(1, LOCK_INFO_MAX + 1);
	if (l->raw != NULL && fstat(fd, &st) == 0)
		n = read_at(fd, l->raw, LOCK_INFO_MAX, 0);
	close_quietly(fd);
	if (n == -1)
		return -1;
	l->since = st.st_mtim;
	l->held = *l->raw != '\0';	/* else it is torn */
	j = json_text(l->raw, (size_t)n);
	if (!l->held || lock_info(&j, l))
		return 0;
	/* A freeze: what its first line says becomes its ID, which is all
	 * that Terraform up to 1.14 shows of a holder, and its Info. */
	l->frozen = true;
	*l->operation = *l->who = *l->created = '\0';
	(void)snprintf(l->info, sizeof(l->info), "%s", l->raw);
	l->info[strcspn(l->info, "\r\n")] = '\0';
	scrub(l->info);
	(void)snprintf(l->id, sizeof(l->id), "%s",
	    l->info[strspn(l->info, " ?")] != '\0' ? l->info : "made-by-hand");
	return 0;
}

static bool
lock_is(const struct lock *l, const char *id)
{
	return l->held && !l->frozen && strcmp(l->id, id) == 0;
}

/* ---- the guard ---- */

/* The guards that threads have or wait for, in the order of arrival. A thread
 * has one at most. The first of those with the same byte has it. */
static struct guard {
	bool taken;
	off_t byte;			/* of .guard */
	struct guard *next;
} *guards;
static __thread struct guard guard;	/* this thread's */

/* Locks or frees one byte of .guard; does not wait. With classic locks any
 * close of .guard would drop them all: it is opened once. */
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
	if (n == -1 && errno == EACCES)	/* some say so; POSIX lets them */
		errno = EAGAIN;
	return n;
}

/* A server's byte, above those of all names: held while it lives. */
#define guard_server_byte(token) ((off_t)((uint64_t)1 << 62 | (token) >> 3))

/* Is the locked file still the one that other servers lock? */
#define guard_in_place() (store_there() && \
	file_is(store.guard, store.root, ".guard", AT_SYMLINK_NOFOLLOW))

/* Puts our guard at the end of the list, if it is not in it, or takes it out.
 * Returns how many before it have the same byte. */
static unsigned
guard_queue(bool leave)
{
	struct guard **p;
	unsigned n = 0;

	(void)pthread_mutex_lock(&list_mutex);
	for (p = &guards; *p != NULL && *p != &guard; p = &(*p)->next)
		n += (*p)->byte == guard.byte;
	*p = leave ? guard.next : &guard;
	(void)pthread_mutex_unlock(&list_mutex);
	return n;
}

static void
guard_drop(void)
{
	if (!guard.taken)
		return;
	(void)guard_set(F_UNLCK, guard.byte);	/* cannot fail */
	(void)guard_queue(true);
	guard.taken = false;
}

/*
 * Takes a name's guard, or gives up after ms milliseconds.
 * -1 with errno: EAGAIN, at once if too many wait for it and ms is no more than
 * GUARD_MS; EIDRM: .guard was removed or replaced; or another. The byte is 62
 * bits of a hash, so that no two names meet. It never changes, or an old and a
 * new server would exclude nobody. Ended by guard_drop, which after -1 does
 * nothing.
 */
static int
guard_take(const char *name, int64_t ms)
{
	int64_t end = clock_ms() + ms, step = 1;
	unsigned char digest[32];
	unsigned before;
	bool first = true;
	int error;

	sha256(name, strlen(name), digest);
	guard = (struct guard){ .byte = (off_t)(((uint64_t)load32(digest) <<
	    32 | load32(digest + 4)) & (((uint64_t)1 << 62) - 1)) };
	for (;; step += step < 16 ? step : 0) {
		before = guard_queue(false);
		first = first && before == 0;
		guard.taken = before == 0 &&
		    guard_set(F_WRLCK, guard.byte) == 0 && guard_in_place();
		if (guard.taken)
			return 0;
		error = before > 0 ? EAGAIN : errno;
		if (error != EAGAIN || (before > WAITERS_MAX &&
		    ms <= GUARD_MS) || clock_ms() + step > end)
			break;
		(void)wait_until(-1, 0, clock_ms() + step);
	}
	if (error != EAGAIN)		/* NFS may have it all the same */
		(void)guard_set(F_UNLCK, guard.byte);
	(void)guard_queue(true);
	if (error == EAGAIN && ms == GUARD_MS && first)	/* not each waiter */
		complain("%s: its guard cannot be had: another server on %s, "
		    "or its disk, hangs", name, conf.dir);
	errno = error;
	return -1;
}

/* Reads a lock without keeping its guard; a thread that has one may not call
 * this. What looks like a freeze may be a lock that is being written: if the
 * guard can be had at once, it is read again. The caller frees l->raw. */
static int
lock_look(const char *name, struct lock *l)
{
	int status = lock_read(name_file(name, "", LOCK, O_RDONLY, NULL), l);

	if (l->frozen && guard_take(name, 0) == 0)
		status = lock_read(name_file(name, "", LOCK, O_RDONLY, NULL),
		    l);
	guard_drop();
	return status;
}

/* ==== users ==============================================================
 *
 * Who may do what. A request shows a secret, perhaps with a name. The secret is
 * compared with every line's, all 32 bytes of a digest, and the name only where
 * it is the same: so the time that this takes tells neither a secret nor
 * whether a user exists.
 */
struct user {
	const char *name, *pattern;
	unsigned char secret[32];	/* SHA-256 */
	enum right right;
};

struct users {
	size_t n;
	struct user list[USERS_MAX / 64];	/* one for each pattern */
	char text[USERS_MAX + 1];	/* the file, cut up; they point here */
};

/* NULL at the start. With none, everybody may do everything. Only the
 * loop replaces them; under the mutex, for a listing's thread reads them. */
static struct users user_lists[2], *users;
static pthread_mutex_t users_mutex = PTHREAD_MUTEX_INITIALIZER;

static const char right_names[][6] = { "none", "read", "plan", "write" };

/* The highest permission, on a name, of the lines with the request's user and
 * secret; name NULL: on any name. Sets r->user, for a Bearer secret comes
 * without one. */
static enum right
user_right(struct request *r, const char *name)
{
	const struct user *u;
	enum right right;
	unsigned diff, i;

	(void)pthread_mutex_lock(&users_mutex);
	right = users->n == 0 ? R_WRITE : R_NONE;
	for (u = users->list; u < users->list + users->n; u++) {
		for (i = diff = 0; i < 32; i++)
			diff |= u->secret[i] ^ r->secret[i];
		if (diff != 0 || (!r->bearer && strcmp(u->name, r->user) != 0))
			continue;
		(void)snprintf(r->user, sizeof(r->user), "%s", u->name);
		if (u->right > right && (name == NULL ||
		    glob(u->pattern, name)))
			right = u->right;
	}
	(void)pthread_mutex_unlock(&users_mutex);
	return right;
}

/* Takes user and secret from Authorization: Basic or Bearer (RFC 7617,
 * 6750). False if it shows none, or v is NULL. */
static bool
user_shows(struct request *r, char *v)
{
	const char *scheme = strsep(&v, " ");
	size_t len;
	ssize_t n;

	if (v == NULL || *(v = trim(v)) == '\0')
		return false;
	if (strcasecmp(scheme, "bearer") == 0) {
		sha256(v, strlen(v), r->secret);
		return r->bearer = true;
	}
	n = base64_decode(v, v, strlen(v));	/* in place */
	v[n == -1 ? 0 : n] = '\0';
	len = strcspn(v, ":");
	if (strcasecmp(scheme, "basic") != 0 || v[len] != ':' ||
	    len >= sizeof(r->user))
		return false;
	memcpy(r->user, v, len);
	sha256(v + len + 1, (size_t)n - len - 1, r->secret);
	return true;
}

/* What no client could show: NULL, or what is wrong with it. */
static const char *
user_wrong(const char *name, const char *secret)
{
	if (*name == '\0' || *secret == '\0')
		return "one of them is empty: set both, or none";
	if (strlen(name) > 63 || strchr(name, ':') != NULL)
		return "a user name has 63 bytes at most, and no colon";
	return http_value_ok(name) && http_value_ok(secret) &&
	    strchr(name, '\t') == NULL && strchr(secret, '\t') == NULL ? NULL :
	    "a name or a secret has a control character, perhaps a newline at "
	    "its end";
}

/* A pattern that was surely meant otherwise; NULL, or what is wrong: with a
 * letter for each wildcard it is no name. */
static const char *
pattern_wrong(const char *pattern)
{
	char name[NAME_LEN_MAX + 2], *p;

	if (*pattern == '!' || strpbrk(pattern, ",\"'") != NULL)
		return "a pattern has no commas or quotes, nor excludes by !: "
		    "? stands for one in a name";
	(void)snprintf(name, sizeof(name), "%s", pattern);
	for (p = name; *p != '\0'; p++)
		if (*p == '*' || *p == '?' || (conf.fold &&
		    (isupper((unsigned char)*p) || (*p & 0x80) != 0)))
			*p = 'x';	/* if we fold, it matches nothing */
	return name_wrong(name);
}

/* One line, cut into words in place. NULL, or what is wrong with it; *at is
 * the user, or the pattern, whose fault that is. */
static const char *
user_line(struct users *u, char *line, const char **at)
{
	static const char digits[] = "0123456789abcdefABCDEF";
	struct user new = { .right = R_WRITE };
	char *save = NULL, *field[4];
	const char *wrong;
	bool all;			/* no pattern, perhaps a comment */
	size_t i;

	for (i = 0; i < 4; i++)
		field[i] = strtok_r(i == 0 ? line : NULL, " \t\r", &save);
	if (field[0] == NULL || field[0][0] == '#')
		return NULL;
	*at = new.name = field[0];
	if (strncmp(field[0], "\xef\xbb\xbf", 3) == 0)
		return "it begins with a byte order mark: save it without";
	if (field[1] == NULL || field[2] == NULL)
		return "a line is: name secret permission [pattern...]";
	if ((wrong = user_wrong(field[0], field[1])) != NULL)
		return wrong;
	if (strncmp(field[1], "sha256:", 7) != 0)
		sha256(field[1], strlen(field[1]), new.secret);
	else if (strlen(field[1]) != 71 || strspn(field[1] + 7, digits) != 64)
		return "after sha256: come 64 hexadecimal digits";
	else
		for (i = 0; i < 64; i++)
			new.secret[i / 2] = (unsigned char)(new.secret[i / 2] <<
			    4 | hex_value(field[1][7 + i]));
	while (strcmp(field[2], right_names[new.right]) != 0)
		if (--new.right == R_NONE)
			return "a permission is read, plan or write";
	all = field[3] == NULL || *field[3] == '#';
	if (all && field[3] != NULL && strchr(field[3], '*') != NULL) {
		*at = field[3];		/* else it would give all names */
		return "a comment has a blank behind its #, a pattern no #";
	}
	new.pattern = all ? "*" : field[3];
	for (; new.pattern != NULL && *new.pattern != '#';
	    new.pattern = all ? NULL : strtok_r(NULL, " \t\r", &save)) {
		*at = new.pattern;
		if ((wrong = pattern_wrong(new.pattern)) != NULL)
			return wrong;
		if (u->n == USERS_MAX / 64)
			return "there are too many users and patterns";
		u->list[u->n++] = new;
	}
	return NULL;
}

/* Reads the users of -u. False, having complained: the file is no good, and
 * the users stay as they were. A pipe is read only at the start: later, the
 * loop may not wait for one. */
static bool
users_read(void)
{
	struct users *u = &user_lists[users == user_lists];
	int fd = open(conf.users, O_RDONLY | O_CLOEXEC | O_NOCTTY |
	    (users != NULL ? O_NONBLOCK : 0));
	const char *wrong, *at = NULL;
	char *text = u->text, *line;
	size_t number = 0, len = 0;
	ssize_t n = 0;
	struct stat st;

	wrong = fd == -1 || fstat(fd, &st) == -1 ? strerror(errno) :
	    users != NULL && !S_ISREG(st.st_mode) ? "it is not a file" : NULL;
	while (wrong == NULL && (n = read(fd, text + len, USERS_MAX - len)) > 0)
		len += (size_t)n;
	text[len] = '\0';
	if (wrong == NULL && (n == -1 || len == USERS_MAX ||
	    strlen(text) != len))
		wrong = "it cannot be read, is too large, or has a NUL in it";
	if (wrong == NULL && (st.st_mode & 077) != 0)
		complain("others can read %s: chmod 600 it", conf.users);
	close_quietly(fd);
	u->n = 0;
	for (; wrong == NULL && (line = strsep(&text, "\n")) != NULL; number++)
		wrong = user_line(u, line, &at);
	if (wrong == NULL && u->n == 0)
		wrong = "it names no user";
	if (wrong == NULL) {
		(void)pthread_mutex_lock(&users_mutex);
		users = u;
		(void)pthread_mutex_unlock(&users_mutex);
	} else if (at != NULL)
		complain("%s, line %zu: %s: %s", conf.users, number, at, wrong);
	else
		complain("cannot use the users file %s: %s", conf.users, wrong);
	return wrong == NULL;
}

/* Takes the user that is in the environment, if there is one. For the wrapper's
 * command one is made and put there. */
static void
users_environment(void)
{
	const char *name, *secret, *wrong;
	unsigned char bytes[16];
	char text[33];

	users = user_lists;
	if (conf.command != NULL) {
		if (getentropy(bytes, sizeof(bytes)) == -1)
			die(1, "cannot make a password: %s", strerror(errno));
		hex(bytes, sizeof(bytes), text);
		if (setenv("TF_HTTP_USERNAME", "statesrv", 1) == -1 ||
		    setenv("TF_HTTP_PASSWORD", text, 1) == -1)
			die(1, "out of memory");
	}
	name = getenv("TF_HTTP_USERNAME");
	secret = getenv("TF_HTTP_PASSWORD");
	name = name != NULL ? name : "";
	secret = secret != NULL ? secret : "";
	if (*name == '\0' && *secret == '\0')
		return;
	if ((wrong = user_wrong(name, secret)) != NULL)
		die(2, "TF_HTTP_USERNAME and TF_HTTP_PASSWORD: %s", wrong);
	users->list[0] = (struct user){ name, "*", { 0 }, R_WRITE };
	sha256(secret, strlen(secret), users->list[0].secret);
	users->n = 1;
}

/* ==== wire ===============================================================
 *
 * One connection, as the thread that serves its request sees it. Functions,
 * here and for commits, return the request's status: 0 is none yet, and -1
 * means that the request was cut.
 */
struct conn {
	int fd;
	struct request *r;		/* or NULL: between two; in the loop's
					 * list it waits for its deadline */
	struct conn *next, *prev;	/* in the list that it is in, if any */
	bool ending;			/* the last answer is sent, or cut */
	bool lingers;			/* then wait for the client to close */
	char *in;			/* HEAD_MAX bytes, or NULL */
	size_t at, used;		/* of in */
	size_t fresh;			/* bytes of the last recv */
	bool begun;			/* a head: its deadline is set */
	int64_t since, active, deadline;	/* ms: see conn_moved */
	const char *why;		/* the loop ended its thread's wait */
	char peer[56];			/* ADDRESS:PORT; "": a unix socket */
};

struct list {				/* zero is empty */
	struct conn *first, *last;
	unsigned n;
};

/* The connections whose thread waits for the client, the longest wait first. */
static struct list conn_waiting;

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

/* Makes the answer one plain line (also 200 "ok"), and returns the status. The
 * logs show the line as the reason, if the status is not 200. */
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

/* There will be no answer: the status is -1, and the connection is cut, so that
 * terraform sends the request again. It would take a 408 for final. */
#define cut(r, why) refuse(r, -1, "%s", why)

/* The one place where an errno becomes a status: what stands here, or 503,
 * which invites the client to try again. */
static const struct { int error, status; const char *why; } errnos[] = {
	{ EIDRM, 500, "its directory, or .guard, was removed or replaced: "
	    "start statesrv again" },
	{ ELOOP, 500, "it is a symbolic link" },
	{ ENOTDIR, 500, "a part of its path is a link, or no directory" },
	{ EISDIR, 500, "it is not an ordinary file" },
	{ ENXIO, 500, "it is a socket, not a file" },
	{ ENOSPC, 507, NULL }, { EDQUOT, 507, NULL }, { EFBIG, 507, NULL },
	{ EACCES, 500, NULL }, { EROFS, 500, NULL }, { 0, 503, NULL }
};

/* Refuses because of errno, complains on stderr, and returns the status. */
static int
refuse_errno(struct request *r, const char *what)
{
	size_t i = 0;

	while (errnos[i].error != 0 && errnos[i].error != errno)
		i++;
	(void)refuse(r, errnos[i].status, "cannot %s: %s", what,
	    errnos[i].why != NULL ? errnos[i].why : strerror(errno));
	complain("%s: %s", r->name, r->why);
	return r->status;
}

/* -v: what goes over the wire, on stderr, credentials blanked. For debugging:
 * it waits for whoever reads stderr. */
static void
trace(const char *mark, const char *data, size_t len)
{
	static const char *const secrets[] = { "cookie:", "authorization:",
	    "proxy-authorization:" };
	const char *lf, *end;
	size_t i, n, shown;

	if (!conf.verbose || len == 0)
		return;
	for (end = data + len; data < end; data = lf + 1) {
		lf = memchr(data, '\n', (size_t)(end - data));
		lf = lf != NULL ? lf : end;
		shown = n = (size_t)(lf - data);
		for (i = 0; i < 3; i++)
			if (n > strlen(secrets[i]) && strncasecmp(data,
			    secrets[i], strlen(secrets[i])) == 0)
				shown = strlen(secrets[i]);
		(void)fprintf(stderr, "%s %.*s%s\n", mark, (int)shown, data,
		    shown < n ? " ***" : "");
	}
}

/* Gives the client ms milliseconds from now for what comes next. */
static void
conn_within(struct conn *c, int64_t ms)
{
	c->since = c->active = clock_ms();
	c->deadline = c->since + ms;
}

/* n bytes have come or gone: the deadline is a millisecond later for each, so
 * that a trickle ends, but never more than BODY_MS from now. */
static void
conn_moved(struct conn *c, size_t n)
{
	c->active = clock_ms();
	c->since += (int64_t)n;
	c->deadline = BODY_MS + (c->since < c->active ? c->since : c->active);
}

/* After recv or send gave -1: waits until the client is ready. False: it has
 * left or is too slow. (If pool_relieve shuts the connection down meanwhile,
 * this returns true: the next recv returns 0, a send fails, c->why tells.) */
static bool
conn_wait(struct conn *c, short events)
{
	short news;

	if (errno != EAGAIN)
		return errno == EINTR;
	(void)pthread_mutex_lock(&list_mutex);
	list_add(&conn_waiting, c);
	(void)pthread_mutex_unlock(&list_mutex);
	news = wait_until(c->fd, events, c->deadline);
	(void)pthread_mutex_lock(&list_mutex);
	list_remove(&conn_waiting, c);
	(void)pthread_mutex_unlock(&list_mutex);
	return news != 0;
}

/* Is the client still there? One that has closed, or reset, will not see the
 * answer, and may have repeated the request elsewhere long ago. One that has
 * only finished sending looks the same, to nginx and Go as well. */
static bool
client_there(const struct request *r)
{
	char byte;

	return wait_until(r->conn->fd, POLLRDHUP, 0) == 0 &&
	    recv(r->conn->fd, &byte, 1, MSG_PEEK) != 0;
}

/* For a client that is gone nothing is changed: the status, else 0. */
static int
client_gone(struct request *r)
{
	if (client_there(r))
		return 0;
	r->keep = false;
	return refuse(r, 400, "the client has closed the connection: neither "
	    "state nor lock was changed");
}

/* Reads what has come, behind what is left in the buffer; as recv(2). */
static ssize_t
conn_recv(struct conn *c)
{
	ssize_t n;

	memmove(c->in, c->in + c->at, c->used - c->at);
	c->used -= c->at;
	c->at = 0;
	n = recv(c->fd, c->in + c->used, HEAD_MAX - c->used, 0);
	c->fresh = n > 0 ? (size_t)n : 0;
	c->used += c->fresh;
	return n;
}

/* Waits for more of the body. */
static int
body_more(struct request *r)
{
	static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
	struct conn *c = r->conn;
	ssize_t n;

	if (r->expects)			/* if that fails, the recv will tell */
		(void)send(c->fd, go_on, sizeof(go_on) - 1, 0);
	r->expects = false;
	while ((n = conn_recv(c)) == -1)
		if (!conn_wait(c, POLLIN))
			return cut(r, clock_ms() >= c->deadline ?
			    "the body came too slowly" :
			    "the client has left in the middle of the body");
	if (n == 0)
		return c->why != NULL ? cut(r, c->why) :
		    refuse(r, 400, "the body is not complete");
	conn_moved(c, (size_t)n);
	return 0;
}

/* Reads a line of a chunked body, of up to max bytes; without its CRLF. */
static int
body_line(struct request *r, size_t max, char **line)
{
	struct conn *c = r->conn;
	char *lf;

	while ((lf = memchr(c->in + c->at, '\n', c->used - c->at)) == NULL &&
	    c->used - c->at < max)
		if (body_more(r) != 0)
			return r->status;
	*line = c->in + c->at;
	if (lf == NULL || lf >= *line + max || !http_line(*line, lf))
		return refuse(r, 400, "a line of the chunked body is too long, "
		    "or does not end in CR LF");
	c->at = (size_t)(lf + 1 - c->in);
	return 0;
}

/* Goes on to the next chunk, or to the end of the body: trailer fields have
 * the form of the head's, and are dropped. */
static int
body_chunk(struct request *r)
{
	struct head trailer = { 0 };
	const char *wrong;
	char *line;
	int64_t size;

	if ((r->in_chunks && body_line(r, 2, &line) != 0) ||	/* CR LF */
	    body_line(r, CHUNK_LINE_MAX, &line) != 0)
		return r->status;
	r->in_chunks = true;
	if (!chunk_size(line, &size))
		return refuse(r, 400, "a chunk's first line is malformed");
	if (size > r->room)
		return refuse(r, r->too_large, "the body is too large");
	r->room -= size;
	while (size == 0 && body_line(r, CHUNK_LINE_MAX, &line) == 0 &&
	    *line != '\0')
		if ((wrong = http_field(&trailer, line)) != NULL)
			return refuse(r, atoi(wrong), "%s", wrong + 4);
	if (r->status == 0)
		r->length = size;
	return r->status;
}

/* Finds the next piece of the body, which lies in the connection's buffer until
 * the next call. Returns its length; 0 at the end; or -1: see r->status. */
static ssize_t
body_next(struct request *r, const char **piece)
{
	struct conn *c = r->conn;
	size_t n;

	if ((r->length < 0 && body_chunk(r) != 0) ||
	    (r->length > 0 && c->used == c->at && body_more(r) != 0))
		return -1;
	*piece = c->in + c->at;
	n = c->used - c->at;
	if ((uint64_t)r->length < n)
		n = (size_t)r->length;
	c->at += n;
	r->got += (int64_t)n;
	r->length -= (int64_t)n;
	if (r->length == 0 && r->in_chunks && n > 0)
		r->length = -1;		/* that was one chunk */
	trace(">", *piece, n);
	return (ssize_t)n;
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
 */

/* Answers with who holds the lock, in the form that every client reads: the
 * holder's own bytes; for a freeze, lock info with an ID (terraform 1.15 needs
 * one) and without Created, which would have to be a time. */
static int
lock_tell(struct request *r, int status)
{
	const struct lock *l = &r->change->lock;

	(void)refuse(r, status, "locked by %s", l->id);
	r->text.len = 0;
	buf_str(&r->text, l->frozen ? "{" : l->raw);
	if (l->frozen) {
		buf_pair(&r->text, "ID", l->id, false);
		buf_pair(&r->text, "Info", l->info, false);
		buf_str(&r->text, "}");
	}
	r->type = "application/json";
	return status;
}

/* ---- the state's log ---- */

/* Appends a line about what happened, and who holds a lock that is not the
 * sender's. */
static void
log_line(struct buf *b, const struct request *r, const char *event)
{
	const struct change *ch = r->change;
	const struct lock *l = &ch->lock;
	const struct lock *who = lock_is(l, r->id) ? l : &ch->asked;
	char when[32];

	time_text(when, time_ms(), false);
	buf_fmt(b, "{\"time\":\"%s\",\"event\":\"%s\",\"method\":\"%s\"",
	    when, event, method_names[r->method]);
	if (r->status != 0)		/* a repair comes before any answer */
		buf_num(b, ",\"status\":", r->status, 1);
	buf_pair(b, "client", r->client, false);
	buf_pair(b, "user", r->user, false);
	buf_pair(b, "id", r->id, false);
	buf_pair(b, "who", who->who, false);
	buf_pair(b, "operation", who->operation, false);
	buf_pair(b, "serial", ch->meta.serial, true);
	buf_pair(b, "lineage", ch->meta.lineage, false);
	if (ch->size > 0)
		buf_num(b, ",\"size\":", ch->size, 1);
	buf_pair(b, "md5", ch->md5, false);
	buf_pair(b, "old_serial", ch->old_meta.serial, true);
	buf_pair(b, "old_lineage", ch->old_meta.lineage, false);
	buf_pair(b, "why", r->why, false);
	if (l->held && who != l) {
		buf_str(b, r->status == 200 ? ",\"broken\":{" :
		    ",\"holder\":{");
		buf_pair(b, "id", l->id, false);
		buf_pair(b, "who", l->who, false);
		buf_pair(b, "operation", l->operation, false);
		buf_pair(b, "info", l->info, false);
		buf_pair(b, "created", l->created, false);
		buf_str(b, "}");
	}
	buf_str(b, "}\n");
}

/* Appends what happened to NAME.log. event NULL: a write was refused; that
 * makes no log for a name that has none and is not locked, and takes no room
 * from the reserve. Not synced: no promise depends on it. */
static void
log_event(struct request *r, const char *event)
{
	bool refused = event == NULL;
	struct buf b = { 0 };
	struct stat st;
	char last;
	int fd;

	if (refused && store_fits(store.root, 0) == -1)
		return;
	log_line(&b, r, refused ? "refused" : event);
	fd = name_file(r->name, "", LOG, O_RDWR | O_APPEND | (refused &&
	    !r->change->lock.held ? 0 : O_CREAT), &st);
	if (fd != -1 && read_at(fd, &last, 1, st.st_size - 1) == 1 &&
	    last != '\n')
		(void)write_all(fd, "\n", 1);	/* it was cut short */
	if (fd == -1 ? errno != ENOENT : b.failed ||
	    write_all(fd, b.data, b.len) == -1)
		complain("%s: cannot write its log: %s", r->name,
		    strerror(errno));
	close_quietly(fd);
	free(b.data);
}

/* ---- how every change is made ---- */

/* Called before the guard is taken, and again under it, where it does nothing
 * if that same state is still there. Opens the present state, reads what it
 * says, and gives it a second, hidden name in the history (or copies it there,
 * if link(2) fails). */
static int
change_prepare(struct request *r)
{
	struct change *ch = r->change;
	struct stat st = { 0 };
	int fd = file_open(ch->dir, leaf_name(r->name, STATE), O_RDONLY, &st);
	struct json j = { .brief = 4, .fd = fd, .max = conf.strict ?
	    conf.body_max : META_MAX };
	bool keep;

	if (fd == -1 && errno != ENOENT)
		return refuse_errno(r, "read the state that is there");
	if (fd != -1 && ch->old != -1 && unchanged(&st, &ch->old_st)) {
		close_quietly(fd);
		return 0;
	}
	close_quietly(ch->old);
	tmp_remove(&ch->kept);
	ch->old = fd;
	meta_read(&j, &ch->old_meta);
	ch->old_error = fd != -1 ? j.error : 0;
	ch->equal = st.st_size == ch->size && same_bytes(fd, ch->tmp.fd);
	keep = conf.keep > 0 && fd != -1 && !ch->equal;
	if (ch->history == -1)
		ch->history = dir_open(r->name, D_HISTORY | (keep ? D_MAKE :
		    D_OPEN));
	if (ch->history == -1 && (keep || errno != ENOENT))
		return refuse_errno(r, "open the history");
	if (keep) {
		tmp_name(&ch->kept, ch->history);
		if (linkat(ch->dir, leaf_name(r->name, STATE),
		    ch->history, ch->kept.name, 0) == -1 &&
		    tmp_copy(&ch->kept, ch->history, fd) == -1)
			return refuse_errno(r, "keep the earlier version");
	}
	if ((fd != -1 && fstat(fd, &ch->old_st) == -1) ||
	    (ch->tmp.fd != -1 && tmp_move(&ch->tmp, ch->dir) == -1))
		return refuse_errno(r, "put the state beside its place");
	return 0;
}

static int
lock_remove(struct request *r)
{
	return unlinkat(r->change->dir, leaf_name(r->name, LOCK), 0) == 0 ? 0 :
	    refuse_errno(r, "remove the lock");
}

/*
 * Begins a change: takes the guard, and reads the lock. make: a missing
 * directory is made. If another write came in between, the change is prepared
 * again: so of many who write without a lock nobody starves. The directories
 * above are synced first, so that nobody finds a state or a lock in one that is
 * not on the disk. A write needs that only if there is no state yet, or if an
 * earlier try may have ended between its rename and its sync: the state has the
 * same bytes, or a sync has failed. thread_serve calls change_end, also after
 * an error: until then the guard is ours.
 */
static int
change_begin(struct request *r, bool make)
{
	struct change *ch = r->change;
	int dir = -1;

	ch->dir = dir_open(r->name, make ? D_MAKE : D_OPEN);
	if (ch->dir == -1 && (make || errno != ENOENT))
		return refuse_errno(r, "open the state's directory");
	if (ch->writes && change_prepare(r) != 0)
		return r->status;
	if (ch->dir != -1 && (!ch->writes || ch->old == -1 || ch->equal ||
	    store.unsynced) && (dir = dir_open(r->name, D_SYNC)) == -1)
		return refuse_errno(r, "sync the directories above");
	close_quietly(dir);
	/* A state whose client is gone may be the only copy: it waits on. */
	if (guard_take(r->name, GUARD_MS) == -1 && (errno != EAGAIN ||
	    ch->tmp.fd == -1 || conf.keep == 0 || client_there(r) ||
	    guard_take(r->name, 4 * GUARD_MS) == -1)) {
		if (errno != EAGAIN)
			return refuse_errno(r, "guard the name");
		(void)refuse(r, 503, "cannot guard the name: too many requests "
		    "wait for it, or one takes too long");
		/* A LOCK (it makes, and does not write) can be told all the
		 * same that another holds the lock: a client with -lock-timeout
		 * then tries again. */
		return make && !ch->writes &&
		    lock_look(r->name, &ch->lock) == 0 && ch->lock.held &&
		    !lock_is(&ch->lock, r->id) ? lock_tell(r, 423) : r->status;
	}
	if (lock_read(file_open(ch->dir, leaf_name(r->name, LOCK), O_RDONLY,
	    NULL), &ch->lock) == -1)
		return refuse_errno(r, "read the lock");
	if (ch->lock.raw != NULL && !ch->lock.held && lock_remove(r) == 0)
		log_event(r, "repair");		/* it was torn */
	return r->status == 0 && ch->writes ? change_prepare(r) : r->status;
}

/* Ends a change; does nothing for other requests. Drops the guard, syncs the
 * directory (after a 404, too: an earlier try may have deleted the state, and
 * failed here), and makes the status 0 a 200. */
static void
change_end(struct request *r)
{
	struct change *ch = r->change;

	guard_drop();
	if ((r->status == 0 || (ch->writes && r->status == 404)) &&
	    ch->dir != -1 && dir_sync(ch->dir) == -1)
		(void)refuse_errno(r, "sync the directory");
	tmp_remove(&ch->tmp);
	tmp_remove(&ch->kept);
	if (r->status == 0)
		r->status = 200;
	if (ch->event != NULL || (ch->writes && r->status > 200 &&
	    r->status != 404))
		log_event(r, ch->event);
}

/* Is the body a JSON object, and is its MD5 the one in Content-MD5, if that was
 * sent? Then a state's is noted for the log, if j computed it. */
static int
body_check(struct request *r, const struct json *j, struct hash *md5)
{
	unsigned char digest[16];

	hash_end(md5, digest);
	errno = j->error;
	if (errno != 0)
		return refuse_errno(r, "read the state back");
	if (j->why != NULL)
		return refuse(r, 400, "the body is not a JSON object: at byte "
		    "%llu it %s", (unsigned long long)j->at, j->why);
	if (r->has_md5 && memcmp(digest, r->md5, 16) != 0)
		return refuse(r, 400, "the body's MD5 is not its Content-MD5");
	if (j->md5 != NULL)
		hex(digest, 16, r->change->md5);
	return 0;
}

/* ---- LOCK and UNLOCK ---- */

/* Reads and checks a body that is lock info, or may be empty, and takes the ID
 * from it. */
static int
lock_body(struct request *r, bool may_be_empty)
{
	struct lock *asked = &r->change->asked;
	struct hash md5 = md5_start;
	const char *piece;
	struct json j;
	ssize_t n;
	bool ok;

	(void)buf_room(&r->body, 0);	/* there is some, even if it is empty */
	while ((n = body_next(r, &piece)) > 0)
		buf_add(&r->body, piece, (size_t)n);
	if (r->body.failed)
		return refuse(r, 503, "out of memory");
	if (r->status != 0)
		return r->status;
	hash_add(&md5, r->body.data, r->body.len);
	j = json_text(r->body.data, r->body.len);
	ok = (may_be_empty && r->body.len == 0) || lock_info(&j, asked);
	if (body_check(r, &j, &md5) != 0 || r->body.len == 0)
		return r->status;
	if (!ok)
		return refuse(r, 400, "lock info has one ID, of 1 to %d bytes",
		    ID_MAX);
	memcpy(r->id, asked->id, sizeof(r->id));
	r->has_id = true;
	return 0;
}

/* A user with the permission to plan may take and release only locks whose
 * operation changes no state. terraform console's is OperationTypeInvalid. */
static int
lock_allowed(struct request *r, const struct lock *l)
{
	const char *what = l->operation;

	return r->right == R_WRITE || *what == '\0' ||
	    strcmp(what, "OperationTypePlan") == 0 ||
	    strcmp(what, "OperationTypeInvalid") == 0 ||
	    strcmp(what, "migration source state") == 0 ? 0 : refuse(r, 403,
	    "%s may lock %s to plan only, not for %s", r->user, r->name, what);
}

/*
 * Writes the lock, and syncs it under the guard: another host that found it
 * empty would take it for none. If it could not be written, it is removed
 * again. If it could not be synced, it stays: a lock too many is an
 * inconvenience, one too few a disaster. A lock that is there, to be broken or
 * the sender's own, is replaced by a rename: at no moment is there none. The
 * sender's own is written anew, with its bytes and its time: after an fsync
 * that failed, the next may return 0 for a file that is not on the disk. If
 * there is no room for a second file, the one that is there is synced.
 */
static int
lock_write(struct request *r, bool own)
{
	int dir = r->change->dir, error;
	const struct lock *l = &r->change->lock;
	const char *info = own ? l->raw : r->body.data;
	struct tmp t = { .fd = -1 };
	bool ok = false;

	if (l->held)
		(void)tmp_create(&t, dir);
	else
		t.fd = file_open(dir, leaf_name(r->name, LOCK), O_WRONLY |
		    O_CREAT | O_EXCL, NULL);
	if (t.fd != -1 && write_all(t.fd, info, strlen(info)) == 0)
		ok = (!own || futimens(t.fd, (const struct timespec[]){
		    l->since, l->since }) == 0) && fsync(t.fd) == 0 &&
		    (!l->held || tmp_rename(&t, dir, r->name, LOCK) == 0);
	else if (t.fd != -1 && !l->held) {
		error = errno;
		(void)unlinkat(dir, leaf_name(r->name, LOCK), 0);
		errno = error;
	}
	tmp_remove(&t);
	if (!ok && own && (errno == ENOSPC || errno == EDQUOT)) {
		t.fd = file_open(dir, leaf_name(r->name, LOCK), O_RDONLY,
		    NULL);
		ok = t.fd != -1 && fsync(t.fd) == 0;
		close_quietly(t.fd);
	}
	return ok ? 0 : refuse_errno(r, "write the lock");
}

/* Takes the lock, if it is free. With -b a user who may write breaks an old
 * one, but never a freeze: somebody made that by hand. */
static int
do_lock(struct request *r)
{
	const struct lock *l = &r->change->lock;
	bool own, stale;

	if (lock_body(r, false) != 0 ||
	    lock_allowed(r, &r->change->asked) != 0 ||
	    change_begin(r, true) != 0)
		return r->status;
	own = lock_is(l, r->id);
	stale = conf.break_hours > 0 && !l->frozen && time_ms() / 1000 -
	    l->since.tv_sec > (int64_t)conf.break_hours * 3600;
	if (l->held && !own && (!stale || r->right < R_WRITE))
		return lock_tell(r, 423);
	if ((!own || lock_allowed(r, l) == 0) && client_gone(r) == 0 &&
	    lock_write(r, own) == 0)
		r->change->event = l->held && !own ? "break" : "lock";
	return r->status;
}

/* ---- writes and deletes ---- */

/* Promise 4: under the lock's own ID, or with none when nothing is locked.
 * An ID whose lock is gone was broken: another run may have written. */
static int
write_allowed(struct request *r)
{
	const struct lock *l = &r->change->lock;

	if (l->held && !(r->has_id && lock_is(l, r->id)))
		return lock_tell(r, 423);
	return l->held || !r->has_id ? 0 : refuse(r, 409, "nothing is locked "
	    "here: the lock %s was broken or released, or lock_address names "
	    "another state", r->id);
}

/* Checks the body in one pass: that it is JSON, its MD5, and whether it can be
 * a state: no other text may take the place of one. Then syncs it. */
static int
state_check(struct request *r)
{
	struct change *ch = r->change;
	struct meta *m = &ch->meta;
	struct hash md5 = md5_start;
	struct json j = { .fd = ch->tmp.fd, .max = ch->size,
	    .md5 = r->has_md5 ? &md5 : NULL };

	meta_read(&j, m);
	if (body_check(r, &j, &md5) != 0)
		return r->status;
	if (m->doubled != NULL)
		return refuse(r, 400, "the body is no state: it has two keys "
		    "\"%s\"", m->doubled);
	if (m->type != 's')
		return refuse(r, 400, "the body is no state: it has neither a "
		    "\"version\" that is a number nor \"encrypted_data\"%s",
		    m->type == 'l' ? ", but looks like lock info: lock_address "
		    "has a lock_method that writes: use LOCK, or NAME/lock" :
		    "");
	return fsync(ch->tmp.fd) == 0 ? 0 :
	    refuse_errno(r, "sync the state");
}

/* Receives the body into a temporary file, checks and syncs it. */
static int
state_receive(struct request *r)
{
	struct change *ch = r->change;
	const char *piece = "";
	ssize_t n = 0;

	if (tmp_create(&ch->tmp, store.root) == -1)
		return refuse_errno(r, "create a temporary file");
	do {				/* is there room for all of it? */
		if (store_fits(store.root, r->length + n) == -1 ||
		    write_all(ch->tmp.fd, piece, (size_t)n) == -1)
			return refuse_errno(r, "write the state");
		ch->size += n;
	} while ((n = body_next(r, &piece)) > 0);
	return n == -1 ? r->status : state_check(r);
}

/* Under the guard: moves a file into the history, as the newest version. Its ID
 * is the time at which it comes there, or a millisecond after the newest ID
 * there is, if that is later: IDs sort in the order of events whatever the
 * clocks say. sync: the history must be on the disk before the answer, for the
 * bytes are nowhere else. */
static int
history_keep(struct request *r, struct tmp *t, const char *serial, bool sync)
{
	const int64_t end = 253370764800000;	/* ms: the year 9999 */
	struct change *ch = r->change;
	int64_t ms = time_ms(), newest = 0;
	char when[32], id[VERSION_ID];
	int dir = -1;
	size_t i;

	for (i = ch->ids.n; i > 0 && newest == 0; i--)
		if ((newest = version_ms(ch->ids.list[i - 1])) >= end)
			newest = 0;	/* there must be room behind it */
	time_text(when, ms > newest ? ms : newest + 1, true);
	(void)snprintf(id, sizeof(id), "%.20s-%.20s", when,
	    *serial != '\0' ? serial : "0");
	names_add(&ch->ids, id);
	if (ch->ids.failed || (ch->history == -1 &&
	    (ch->history = dir_open(r->name, D_HISTORY | D_MAKE)) == -1) ||
	    tmp_rename(t, ch->history, id, STATE) == -1 ||
	    (sync && (dir_sync(ch->history) == -1 ||
	    (dir = dir_open(r->name, D_HISTORY | D_SYNC)) == -1)))
		return refuse_errno(r, "keep a version in the history");
	close_quietly(dir);
	return 0;
}

/* -s: refuses what terraform state push, without -force, refuses. */
static int
write_strict(struct request *r)
{
	const struct meta *new = &r->change->meta, *old = &r->change->old_meta;
	size_t n = strlen(new->serial), digits = strlen(old->serial);
	/* JSON numbers have no zeros in front: the longer one is larger. */
	bool lower = n < digits || (n == digits && strcmp(new->serial,
	    old->serial) < 0);
	bool other = *old->lineage != '\0' &&
	    strcmp(new->lineage, old->lineage) != 0;

	errno = r->change->old_error;
	if (errno != 0)			/* or any serial would follow */
		return refuse_errno(r, "read the state that is there");
	if (strlen(new->lineage) > LINEAGE_MAX)
		return refuse(r, 400, "-s: the new lineage is longer than %d "
		    "bytes", LINEAGE_MAX);
	return !lower && !other ? 0 : refuse(r, 409, "-s: the new serial '%s' "
	    "and lineage '%s' do not follow the present '%s' and '%s'",
	    new->serial, new->lineage, old->serial, old->lineage);
}

/*
 * Under the guard: puts the new state in its place, or, without a new one,
 * deletes the old: then the history is synced first. For a write it is not: the
 * promise is about the new state. On a file system with a journal both reach
 * the disk together; without one, a power cut may lose the earlier version. But
 * a copy is synced: it may be on another file system than the state.
 * A complete state whose client is gone may be the only copy: it goes into the
 * history (not with -k 0), unless it is equal to the present one, or to the
 * newest version: a client that repeats it must not push the others out.
 */
static int
write_publish(struct request *r)
{
	struct change *ch = r->change;
	bool delete = ch->tmp.fd == -1, kept = ch->kept.name[0] != '\0', same;
	struct stat st;
	int newest = -1;

	if (ch->history != -1 && history_list(ch->history, &ch->ids) == -1)
		return refuse_errno(r, "read the history");
	/* A crash may have left it there, before the state was replaced. */
	if (kept && !delete && ch->ids.n > 0 && file_is(ch->old, ch->history,
	    leaf_name(ch->ids.list[ch->ids.n - 1], STATE), AT_SYMLINK_NOFOLLOW))
		kept = false;
	if (client_gone(r) != 0) {
		if (ch->ids.n > 0)
			newest = file_open(ch->history,
			    leaf_name(ch->ids.list[ch->ids.n - 1], STATE),
			    O_RDONLY, NULL);
		same = ch->equal || same_bytes(newest, ch->tmp.fd);
		close_quietly(newest);
		if (!delete && !same && conf.keep > 0 &&
		    history_keep(r, &ch->tmp, ch->meta.serial, true) == 0)
			ch->event = "abandoned";
		return r->status;
	}
	if (write_allowed(r) != 0 || (conf.strict && !delete &&
	    write_strict(r) != 0))
		return r->status;
	if (delete && ch->old == -1)
		return refuse(r, 404, "there is no such state");
	if (kept)
		(void)history_keep(r, &ch->kept, ch->old_meta.serial, delete ||
		    ch->kept.fd != -1);		/* a copy */
	if (r->status == 0 && (ch->old != -1 ? !file_is(ch->old, ch->dir,
	    leaf_name(r->name, STATE), AT_SYMLINK_NOFOLLOW) : fstatat(ch->dir,
	    leaf_name(r->name, STATE), &st, AT_SYMLINK_NOFOLLOW) == 0))
		(void)refuse(r, 503, "cannot find what was there a moment ago: "
		    "nothing was changed, except by hand");
	if (r->status == 0 && (delete ?
	    unlinkat(ch->dir, leaf_name(r->name, STATE), 0) :
	    tmp_rename(&ch->tmp, ch->dir, r->name, STATE)) == -1)
		(void)refuse_errno(r, "change the state");
	/* If it failed, the version goes again: a repetition would add one. But
	 * NFS may call failed what it has done: then the version stays. */
	if (r->status == 0)
		ch->event = delete ? "delete" : "write";
	else if (kept && ch->kept.name[0] == '\0' && file_is(ch->old, ch->dir,
	    leaf_name(r->name, STATE), AT_SYMLINK_NOFOLLOW))
		(void)unlinkat(ch->history,
		    leaf_name(ch->ids.list[ch->ids.n - 1], STATE), 0);
	return r->status;
}

/* POST and PUT of a state. The lock is looked at first, so that a write that
 * will be refused is not uploaded in vain. But if its client is gone, nobody is
 * there to be refused, and the state is received all the same, as the copy that
 * write_publish keeps. */
static int
do_write(struct request *r)
{
	r->change->writes = true;
	if (lock_look(r->name, &r->change->lock) == -1)
		return refuse_errno(r, "read the lock");
	if (write_allowed(r) != 0 && (conf.keep == 0 || client_there(r)))
		return r->status;
	r->status = 0;
	if (state_receive(r) == 0 && change_begin(r, true) == 0)
		(void)write_publish(r);
	return r->status;
}

/*
 * UNLOCK and DELETE. With unlock_method DELETE at the state's own address,
 * terraform's unlock looks like a delete. It is an unlock if it has a body or a
 * Content-MD5, or comes from a Go program (OpenTofu 1.8 and 1.9 send neither):
 * no command of terraform deletes a state. An unlock releases the lock, if it
 * is the sender's, or if no ID was sent: that is terraform's force-unlock. The
 * sender's own is released even if the client is gone.
 */
static int
do_unlock(struct request *r)
{
	const struct lock *l = &r->change->lock;
	bool wrong = lock_body(r, true) != 0, delete = r->kind == K_STATE &&
	    r->method == M_DELETE &&
	    (wrong || (r->body.len == 0 && !r->has_md5 && !r->go));
	bool own, made_up;

	r->change->writes = delete;	/* a wrong DELETE is logged, too */
	if (!wrong && r->right < R_WRITE && (delete || !r->has_id))
		return refuse(r, 403, "%s may not delete or force-unlock %s",
		    r->user, r->name);
	if (wrong || change_begin(r, false) != 0)
		return r->status;
	if (delete)
		return write_publish(r);
	own = lock_is(l, r->id);
	/* OpenTofu 1.10 sends the ID that we made up for a freeze. */
	made_up = l->frozen && strcmp(r->id, l->id) == 0 &&
	    r->right == R_WRITE;
	if (l->held && r->has_id && !made_up && !own)
		return lock_tell(r, 409);
	if (l->held && lock_allowed(r, l) == 0 &&
	    (own || client_gone(r) == 0) && lock_remove(r) == 0)
		r->change->event = own ? "unlock" : "force-unlock";
	return r->status;		/* 0 too if nothing is locked */
}

/* ==== pages ==============================================================
 *
 * What is asked for with GET: tables of the states and of a state's versions,
 * metrics, files as they are, and whether the server is well. A table is
 * written once, cell by cell, and comes out as text, JSON or HTML; it shows no
 * value out of a state. Threads make pages; the loop calls what is quick_...
 */
#define STATUSES 600		/* below it are all that we answer */
#define DURATIONS 6		/* of the histogram: 0.1 ms, 1 ms, ... 10 s */

/* What the metrics count; and the lines of the log that are not written yet. */
static struct {
	_Atomic unsigned long requests[M_COUNT + 1][STATUSES];	/* 0: was cut */
	_Atomic unsigned long took[DURATIONS + 1], took_us, received, sent;
	_Atomic unsigned unlogged;
	_Atomic unsigned connections, threads, pages;	/* there are now */
	struct buf log;
	char locked[ID_MAX + 1];	/* the ID of the last LOCK */
} stats;

/* Is the page still wanted? Not, if its client has closed the connection (or
 * looks like that: see client_there), and others wait for pages. */
static bool
page_wanted(struct request *r)
{
	if (r->status != -1 && stats.pages > 1 && !client_there(r))
		(void)cut(r, "nobody waits for the page");
	return r->status != -1;
}

/* ---- three forms ---- */

/* Appends the one of three texts that belongs to the page's form. */
static void
put(struct request *r, const char *text, const char *json, const char *html)
{
	buf_str(&r->text, r->form == TEXT ? text : r->form == JSON ? json :
	    html);
}

/* Appends a cell. In JSON: key and raw; null, if raw is "". In text and HTML:
 * shown, or raw if that is NULL; in the heading row, title. The title is padded
 * to the width of its column; a blank at its beginning means a number, or true
 * or false: no quotes in JSON. A title of "" or " ": it is in JSON only. */
static void
cell(struct request *r, const char *key, const char *title, const char *raw,
    const char *shown)
{
	struct buf *b = &r->text;
	int width = (int)strlen(title);
	bool number = *title == ' ';
	size_t from = b->len;

	shown = r->heading ? title : shown != NULL ? shown : raw;
	if (r->form == JSON)
		buf_pair(b, key, *raw != '\0' ? raw : "null",
		    number || *raw == '\0');
	else if (width > 1 && r->form == HTML) {
		buf_fmt(b, "<t%c data-h=\"%s\" title=\"", r->heading ? 'h' :
		    'd', title);
		buf_text(b, raw, HTML);
		buf_str(b, "\">");
		buf_text(b, shown, HTML);
	} else if (width > 1) {
		buf_fmt(b, "%*s  ", number ? width : -width, *shown != '\0' ?
		    shown : "-");
		if (!b->failed)
			scrub(b->data + from);
	}
}

static const char page_head[] = "<!DOCTYPE html>\n<html lang=en><meta "
    "charset=utf-8><link rel=icon href=\"data:,\"><meta name=viewport "
    "content=\"width=device-width,initial-scale=1\"><style>"
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;"
    "max-width:72rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;width:100%}"
    "tr{border-bottom:1px solid #8884}"
    "td,th{text-align:left;padding:.4rem 1rem .4rem 0;min-width:4.5rem;"
    "vertical-align:top}td:first-child{min-width:11rem}"
    ":is(td,th):nth-child(2),:is(td,th):nth-child(3){text-align:right}"
    "td:nth-child(n+2):nth-child(-n+4){white-space:nowrap}"
    "th{font-weight:500;color:GrayText;white-space:nowrap}"
    "pre{overflow-x:auto}.hot{color:light-dark(#b3261e,#ff8a80)}"
    "input{font:inherit;width:100%;box-sizing:border-box;padding:.4rem}"
    "@media(max-width:44rem){th,td:empty{display:none}"
    "td{padding:0;min-width:0}tr{display:flex;flex-wrap:wrap;gap:0 1rem}"
    "td:first-child{flex-basis:100%;font-weight:600;padding-top:.5rem}"
    "td+td::before{content:attr(data-h) ' ';color:GrayText}}"
    "</style>\n<title>States: ";

static void
page_begin(struct request *r)
{
	static const char *const types[] = { "text/plain; charset=utf-8",
	    "application/json", "text/html; charset=utf-8"
	    /* Nothing from elsewhere, no script, in nobody's frame. */
	    "\r\nContent-Security-Policy: default-src 'none'; style-src "
	    "'unsafe-inline'; img-src data:; form-action 'self'; base-uri "
	    "'none'; frame-ancestors 'none'\r\nReferrer-Policy: no-referrer" };
	struct buf *b = &r->text;

	r->status = 200;
	r->type = types[r->form];
	if (r->form != HTML)
		return;
	buf_str(b, page_head);
	buf_text(b, r->name, HTML);
	buf_fmt(b, "</title>\n<h1><a href=\"%s\">States</a>: ", r->root);
	buf_text(b, r->name, HTML);
	buf_str(b, "</h1>\n");
}

/* ---- rows ---- */

/* A state, or an earlier version of one. "": it is not known. */
struct row {
	const char *name, *id;		/* id: "" of the present version */
	char size[24], when[32], age[32];	/* "": there is no file */
	char until[32];			/* it came into the history */
	struct meta meta;
	bool deleted;			/* only the history has it */
	struct lock lock;		/* of the present version */
	char who[128], operation[64];	/* of the write */
};

/* Looks at a version, and at the lock of the present one (its raw is freed
 * already); -1 with errno if the version could not be looked at. */
static int
row_read(struct row *row, const char *name, const char *id)
{
	static const char units[][4] = { "s", "min", "h", "d" };
	static const int64_t per[] = { 60, 60, 24, INT64_MAX };
	struct stat st;
	int64_t age;
	int fd, i;

	*row = (struct row){ .name = name, .id = id };
	if (*id == '\0' && lock_look(name, &row->lock) == -1)
		row->lock = (struct lock){ .raw = row->lock.raw,
		    .held = true,	/* perhaps */
		    .info = "the lock cannot be read" };
	free(row->lock.raw);
	if (*id != '\0')
		time_text(row->until, version_ms(id), false);
	fd = name_file(name, id, STATE, O_RDONLY, &st);
	if (fd == -1 && errno == ENOENT) {
		fd = dir_open(name, D_HISTORY);
		row->deleted = fd != -1;
		close_quietly(fd);
		return 0;
	}
	if (fd == -1)
		return -1;
	meta_read(&(struct json){ .brief = 4, .fd = fd, .max = META_MAX },
	    &row->meta);
	(void)close(fd);
	(void)snprintf(row->size, sizeof(row->size), "%lld",
	    (long long)st.st_size);
	time_text(row->when, time_us(st.st_mtim) / 1000, false);
	age = time_ms() / 1000 - (int64_t)st.st_mtime;
	for (i = 0; age >= per[i]; i++)
		age /= per[i];
	(void)snprintf(row->age, sizeof(row->age), "%d %s ago",
	    age > 0 ? (int)age : 0, units[i]);
	return 0;
}

/* "apply" for OperationTypeApply; other words are terraform's own. */
static void
operation_text(char out[64], const char *operation)
{
	bool type = strncmp(operation, "OperationType", 13) == 0;

	(void)snprintf(out, 64, "%s", operation + (type ? 13 : 0));
	if (strcmp(out, "Invalid") == 0)
		(void)snprintf(out, 64, "import or console");
	out[0] = (char)tolower((unsigned char)out[0]);
}

/* Shows who holds the lock, since when, for what, and the command that releases
 * it: as a cell of the listing, as JSON, or as a line above the versions. */
static void
row_lock(struct request *r, const struct row *row)
{
	const struct lock *l = &row->lock;
	struct buf b = { 0 };
	char what[64], since[32] = "";
	const char *words;

	operation_text(what, l->operation);
	if (*l->id != '\0') {		/* else nobody, or it cannot be read */
		time_text(since, time_us(l->since) / 1000, false);
		if (r->form != JSON)
			buf_fmt(&b, "%s%s%s since %s%s%s; %s: ",
			    l->frozen ? "frozen" : *l->who != '\0' ? l->who :
			    "locked", *what != '\0' ? ", " : "", what, since,
			    *l->info != '\0' ? ": " : "", l->info,
			    l->frozen ? "to end it" :
			    "if nothing runs any more, release it");
		buf_str(&b, "terraform force-unlock ");
		buf_str(&b, *l->id == '-' ? "-- " : "");
		buf_text(&b, l->id, SHELL);
	}
	words = b.len > 0 ? b.data : r->form == JSON ? "" : l->info;
	if (r->form == JSON && l->held) {
		buf_str(&r->text, ",\"lock\":{");
		cell(r, "id", "", l->id, NULL);
		cell(r, "who", "", l->who, NULL);
		cell(r, "operation", "", l->operation, NULL);
		cell(r, "info", "", l->info, NULL);
		cell(r, "created", "", l->created, NULL);
		cell(r, "since", "", since, NULL);
		cell(r, "release", "", words, NULL);
		buf_str(&r->text, "}");
	} else if (r->form == JSON || r->kind == K_ROOT)
		cell(r, "lock", "Lock", words, NULL);
	else {
		put(r, "", "", l->held ? "<p class=hot>" : "<p>");
		if (*row->size == '\0')
			buf_str(&r->text, "There is no such state now. ");
		buf_text(&r->text, l->held ? words : "Not locked.", r->form);
		buf_str(&r->text, "\n");
	}
	r->text.failed |= b.failed;
	free(b.data);
}

/* Writes a row of the listing or of a state's page; one without a name: the
 * titles, which JSON has not. */
static void
row_put(struct request *r, const struct row *row)
{
	bool list = r->kind == K_ROOT, old = *row->id != '\0';
	const char *first = list ? row->name : old ? row->id : "present";
	const struct names *names = &r->change->ids;	/* of all rows */
	char what[64], title[COLUMN_MAX + 1];
	struct buf *b = &r->text;
	size_t i, n;

	r->heading = *row->name == '\0';
	if (r->heading && r->form == JSON)
		return;
	for (i = 0; r->heading && r->form == TEXT && i < names->n; i++) {
		n = strlen(names->list[i]);
		if (n <= COLUMN_MAX && (int)n > r->width)
			r->width = (int)n;
	}
	(void)snprintf(title, sizeof(title), "%-*s", r->width,
	    list ? "State" : "Version");
	put(r, "", b->len == 0 ? "[\n{" : ",\n{", r->heading ?
	    "<table><tr>" : "<tr>");
	if (r->form == HTML && !r->heading) {
		buf_fmt(b, "<td><a href=\"%s%s", r->root, list || old ?
		    "-/versions/" : "");
		buf_url(b, row->name);
		buf_fmt(b, "%s%s\">", old ? "/" : "", row->id);
		buf_text(b, first, HTML);
		buf_str(b, "</a>");
	} else
		cell(r, list ? "name" : "id", title, list ? first : row->id,
		    first);
	cell(r, "serial", " Serial", row->meta.serial, NULL);
	cell(r, "size", "    Bytes", row->size, NULL);
	cell(r, list ? "modified" : "written", "Written   ", row->when,
	    row->age);
	if (list) {
		cell(r, "terraform_version", "Terraform", row->meta.version,
		    row->deleted ? "deleted" : NULL);
		cell(r, "lineage", "", row->meta.lineage, NULL);
		cell(r, "deleted", " ", row->deleted ? "true" : "false", NULL);
	} else {
		cell(r, "replaced", "", row->until, NULL);
		cell(r, "who", "By              ", row->who, NULL);
		operation_text(what, row->operation);
		cell(r, "operation", "For     ", r->form == JSON ?
		    row->operation : what, NULL);
	}
	if (list || r->form == JSON)
		row_lock(r, row);
	put(r, "\n", "}", "</td>\n");
}

/* ---- a walk over the names ---- */

struct walk {
	struct request *r;		/* that lists them, or NULL: a count */
	bool sweep;			/* remove what dead servers left */
	bool history, uploads;		/* it walks .history, .tmp */
	int error;			/* why some were not found, or 0 */
	unsigned files;			/* that are not hidden */
	unsigned states, locks;
	char name[NAME_LEN_MAX + 300];
};

/* Removes a temporary file, if the server whose token is in its name is dead:
 * a server holds its own byte of .guard while it lives. */
static void
tmp_sweep(int dir, const char *file)
{
	uint64_t token = strtoull(file + strspn(file, ".tmp-"), NULL, 16);
	off_t byte = guard_server_byte(token);

	if (token == store.token || guard_set(F_WRLCK, byte) == -1)
		return;
	(void)unlinkat(dir, file, 0);
	(void)guard_set(F_UNLCK, byte);
}

/* Is w->name a name that the user may see, and the search finds? Then it is
 * listed: twice, if it has a state and a lock. */
static bool
walk_add(struct walk *w)
{
	char *p;

	for (p = w->name; conf.fold && *p != '\0'; p++)
		*p = (char)tolower((unsigned char)*p);
	if (name_wrong(w->name) != NULL || (w->r != NULL &&
	    (user_right(w->r, w->name) == R_NONE ||
	    strcasestr(w->name, w->r->query) == NULL)))
		return false;
	if (w->r != NULL)
		names_add(&w->r->change->ids, w->name);
	return true;
}

/* Adds what is in a directory; w->name holds len bytes of path that lead
 * there. */
static void
walk_dir(struct walk *w, int parent, const char *entry, size_t len,
    unsigned depth)
{
	int dir = file_open(parent, entry, O_DIRECTORY, NULL);
	DIR *d = dir == -1 ? NULL : fdopendir(dir);
	struct dirent *e;
	bool found = false;
	size_t n;

	while (d != NULL && (w->r == NULL || page_wanted(w->r)) &&
	    (errno = 0, e = readdir(d)) != NULL) {
		n = strlen(e->d_name);
		if (w->sweep && (strncmp(e->d_name, ".tmp-", 5) == 0 ||
		    (w->uploads && e->d_name[0] != '.')))
			tmp_sweep(dir, e->d_name);
		if (w->uploads || e->d_name[0] == '.' ||
		    len + n + 1 >= sizeof(w->name))
			continue;
		w->files++;
		memcpy(w->name + len, e->d_name, n + 1);
		if (w->history && is_version(e->d_name, STATE))
			found = len > 0;
		else if (!w->history && cut_suffix(w->name, STATE))
			w->states += walk_add(w);
		else if (!w->history && cut_suffix(w->name, LOCK))
			w->locks += walk_add(w);
		else if (depth < SEGMENTS_MAX && !cut_suffix(w->name, LOG)) {
			w->name[len + n] = '/';
			walk_dir(w, dir, e->d_name, len + n + 1, depth + 1);
		}
	}
	/* Other files, and directories that we may not read, are not ours; and
	 * what has vanished meanwhile is no error. */
	if (errno != 0 && errno != ENOENT && (depth == 0 || (errno != EACCES &&
	    errno != ENOTDIR && errno != ELOOP)))
		w->error = errno;
	if (d != NULL)
		(void)closedir(d);
	else
		close_quietly(dir);
	if (found) {
		w->name[len - 1] = '\0';
		(void)walk_add(w);
	}
}

/* Finds the names of states and locks ("."), those with a ".history", or the
 * uploads in ".tmp". -1 with errno if not all could be found. */
static int
walk_names(struct walk *w, const char *top)
{
	w->history = strcmp(top, ".history") == 0;
	w->uploads = strcmp(top, ".tmp") == 0;
	walk_dir(w, store.root, top, 0, 0);
	errno = store_there() ? w->error : errno;
	return errno == 0 ? 0 : -1;
}

/* ---- the listing, and one state ---- */

/* The search, and the states; if asked for, those that are locked first. */
static int
page_root(struct request *r)
{
	struct walk w = { .r = r };
	struct names *names = &r->change->ids;	/* freed with that */
	struct buf *b = &r->text;
	int round = r->locked ? 0 : 1;
	struct row row;
	size_t i;

	if (walk_names(&w, ".") == -1 || (*r->query != '\0' &&
	    walk_names(&w, ".history") == -1) || r->status != 0)
		return r->status != 0 ? r->status :
		    refuse_errno(r, "list the states");
	names_sort(names);
	page_begin(r);
	b->failed |= names->failed;
	if (r->form == HTML) {
		buf_str(b, "<form><input type=search name=q aria-label=Search "
		    "placeholder=\"Search, deleted ones too\" value=\"");
		buf_text(b, r->query, HTML);
		buf_fmt(b, "\"></form><p>States: %u, <a href=\"?locked\">"
		    "locked: %u</a>\n", w.states, w.locks);
	}
	row_put(r, &(struct row){ .name = "", .id = "" });
	for (; round < 2; round++)
		for (i = 0; i < names->n && page_wanted(r); i++) {
			if (i > 0 && strcmp(names->list[i - 1],
			    names->list[i]) == 0)
				continue;
			(void)row_read(&row, names->list[i], "");
			if (!r->locked || row.lock.held == (round == 0))
				row_put(r, &row);
		}
	put(r, "", b->len == 0 ? "[]\n" : "\n]\n", "</table>\n");
	return r->status;
}

/* Finds out who wrote a version, and in which operation: from the last line in
 * the last TAIL_MAX bytes of the log with a write of that serial and size, from
 * before it was replaced. */
static void
row_find_writer(struct row *row)
{
	struct writer {
		char time[32], event[8], serial[24], size[24], who[128], op[64];
	} w;
	static const struct member k[] = {
		{ "time", FIELD(struct writer, time) },
		{ "event", FIELD(struct writer, event) },
		{ "serial", FIELD(struct writer, serial) },
		{ "size", FIELD(struct writer, size) },
		{ "user", FIELD(struct writer, who) },	/* or, later: */
		{ "who", FIELD(struct writer, who) },
		{ "operation", FIELD(struct writer, op) },
	};
	char *tail = malloc(TAIL_MAX), *line = tail, *lf;
	struct stat st;
	int fd = name_file(row->name, "", LOG, O_RDONLY, &st);
	ssize_t n = fd == -1 || tail == NULL ? 0 : read_at(fd, tail, TAIL_MAX,
	    st.st_size > TAIL_MAX ? st.st_size - TAIL_MAX : 0);
	struct json j;

	for (; n > 0 && (lf = memchr(line, '\n', (size_t)(tail + n - line))) !=
	    NULL; line = lf + 1) {
		memset(&w, 0, sizeof(w));
		j = json_text(line, (size_t)(lf - line));
		if (json_object(&j, k, 7, &w) &&
		    strcmp(w.event, "write") == 0 &&
		    (*row->until == '\0' || strcmp(w.time, row->until) < 0) &&
		    *w.serial != '\0' && strcmp(w.size, row->size) == 0 &&
		    strcmp(w.serial, row->meta.serial) == 0) {
			memcpy(row->who, w.who, sizeof(w.who));
			memcpy(row->operation, w.op, sizeof(w.op));
		}
	}
	close_quietly(fd);
	free(tail);
}

/* The page of one state: its lock, its versions, the newest first, and the two
 * lines that go back to an earlier one. A Host has no quotes and no markup; an
 * HTTP/1.0 request may have none. */
static int
page_state(struct request *r)
{
	const char *scheme = r->fronted ? "https" : "http";
	const char *host = *r->host != '\0' ? r->host : "HOST";
	const char *user = *r->user != '\0' ? " -u NAME" : "";
	int log = name_file(r->name, "", LOG, O_RDONLY, NULL);
	struct buf *b = &r->text, url = { 0 };
	struct names *ids = &r->change->ids;	/* freed with that */
	int dir = r->change->history = dir_open(r->name, D_HISTORY);
	struct row row;
	size_t i;

	close_quietly(log);		/* it was only looked for */
	if (dir == -1 ? errno != ENOENT : history_list(dir, ids) == -1)
		return refuse_errno(r, "read the history");
	if (row_read(&row, r->name, "") == -1)
		return refuse_errno(r, "read the state");
	if (*row.size == '\0' && !row.lock.held && ids->n == 0)
		return refuse(r, 404, "there is no such state");
	page_begin(r);
	buf_url(&url, r->name);
	if (r->form != JSON)
		row_lock(r, &row);
	if (r->form == HTML)
		buf_str(b, "<p>Each version is a link to the raw state, with "
		    "its secrets.\n");
	if (r->form == HTML && log != -1)
		buf_fmt(b, "See also <a href=\"%s-/log/%s\">its log</a>.\n",
		    r->root, url.data);
	row_put(r, &(struct row){ .name = "", .id = "" });
	for (i = ids->n; page_wanted(r); i--) {
		row_find_writer(&row);
		/* A version that cannot be read is there all the same. */
		if (*row.size != '\0' || (*row.id != '\0' && !row.deleted) ||
		    (r->form == JSON && row.lock.held))
			row_put(r, &row);
		if (i == 0)
			break;
		(void)row_read(&row, r->name, ids->list[i - 1]);
	}
	put(r, "", b->len == 0 ? "[]\n" : "\n]\n", "</table>\n<p>");
	if (r->form != JSON && ids->n > 0)
		buf_fmt(b, "To go back to a version, or bring a deleted state "
		    "back, and then look at terraform plan%s:\n%scurl -f%s -o "
		    "old.tfstate '%s://%s/-/versions/%s/%s'\ncurl -f%s "
		    "--data-binary @old.tfstate '%s://%s/%s'\n",
		    conf.strict ? " (-s refuses a lower serial)" : "",
		    r->form == HTML ? "<pre>" : "", user, scheme, host,
		    url.data, ids->list[ids->n - 1], user, scheme, host,
		    url.data);
	b->failed |= url.failed;
	free(url.data);
	return r->status;
}

/* ---- metrics ---- */

/* Writes a metric's type and its value; -1: several follow, with labels. */
static void
metric(struct buf *b, const char *name, int64_t n)
{
	buf_fmt(b, "# HELP statesrv_%s %s\n# TYPE statesrv_%s %s\n", name, name,
	    name, strstr(name, "_total") != NULL ? "counter" :
	    strstr(name, "_seconds") != NULL ? "histogram" : "gauge");
	if (n >= 0)
		buf_fmt(b, "statesrv_%s %lld\n", name, (long long)n);
}

static int
page_metrics(struct request *r)
{
	static const char *const ends[DURATIONS + 1] = { "0.0001", "0.001",
	    "0.01", "0.1", "1", "10", "+Inf" };
	static const char took[] = "http_request_duration_seconds";
	struct walk w = { 0 };
	struct buf *b = &r->text;
	unsigned long n;
	size_t i, m;

	if (walk_names(&w, ".") == -1)
		return refuse_errno(r, "count the states");
	metric(b, "http_received_bytes_total", (int64_t)stats.received);
	metric(b, "http_sent_bytes_total", (int64_t)stats.sent);
	metric(b, "log_lines_lost_total", stats.unlogged);
	metric(b, "connections", stats.connections);
	metric(b, "threads", stats.threads);
	metric(b, "states", w.states);
	metric(b, "locks", w.locks);
	metric(b, "http_requests_total", -1);
	for (m = 0; m <= M_COUNT; m++)
		for (i = 0; i < STATUSES; i++)
			if ((n = stats.requests[m][i]) > 0)
				buf_fmt(b, "statesrv_http_requests_total"
				    "{method=\"%s\",status=\"%zu\"} %lu\n",
				    m < M_COUNT ? method_names[m] : "other", i,
				    n);
	metric(b, took, -1);
	for (i = 0, n = 0; i <= DURATIONS; i++)
		buf_fmt(b, "statesrv_%s_bucket{le=\"%s\"} %lu\n", took,
		    ends[i], n += stats.took[i]);
	buf_fmt(b, "statesrv_%s_sum %.15g\nstatesrv_%s_count %lu\n", took,
	    (double)stats.took_us / 1e6, took, n);
	r->type = "text/plain; version=0.0.4; charset=utf-8";
	return r->status = 200;
}

/* ---- a lock, and a file ---- */

static int
page_lock(struct request *r)
{
	if (lock_look(r->name, &r->change->lock) == -1)
		return refuse_errno(r, "read the lock");
	if (!r->change->lock.held)
		return refuse(r, 404, "%s is not locked", r->name);
	return lock_tell(r, 200);
}

/* Sends a file as it is: a state, a version of one, or a log. 404 only if there
 * is none: terraform reads that as "no state yet" and would build everything a
 * second time. */
static int
page_file(struct request *r)
{
	bool log = r->kind == K_LOG;
	struct stat st;

	r->file = name_file(r->name, r->version, log ? LOG : STATE, O_RDONLY,
	    &st);
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

/*
 * A small state that can be had without reading a disk, else 0: from memory
 * that the kernel says it has, or from an entry of ours, which serves as long
 * as the name leads to that same, unchanged file. A file changed less than a
 * second ago could change again within one tick, and look as before: it is
 * never taken for the same. Nor is a name with slashes, where fstatat would
 * follow a link in place of a directory.
 */
static int
quick_state(struct request *r)
{
#if defined(__linux__) && defined(RWF_NOWAIT)
	static struct cached {
		bool serves;		/* while the file is as it was */
		struct stat st;
		char data[SMALL];
	} cache[CACHE_SLOTS], *c;
	/* For openat2 (437): flags, mode, resolve: NO_XDEV (what is mounted
	 * below may be a network's), NO_SYMLINKS, CACHED. */
	static const uint64_t how[3] = { O_RDONLY | O_NOFOLLOW | O_NONBLOCK |
	    O_NOCTTY | O_CLOEXEC, 0, 0x01 | 0x04 | 0x20 };
	char file[sizeof(r->name) + sizeof(STATE)];
	const char *p;
	uint32_t hash = 0;
	struct stat st;
	int64_t now;
	bool ok;
	int fd;

	for (p = r->name; *p != '\0'; p++)
		hash = hash * 31 + (unsigned char)*p;
	c = &cache[hash % CACHE_SLOTS];
	(void)stpcpy(stpcpy(file, r->name), STATE);
	ok = c->serves && strchr(r->name, '/') == NULL && fstatat(store.root,
	    file, &st, AT_SYMLINK_NOFOLLOW) == 0 && unchanged(&st, &c->st);
	if (!ok && !store.remote) {
		now = time_ms() / 1000;
		fd = (int)syscall(437, store.root, file, how, sizeof(how));
		ok = fd != -1 && fstat(fd, &c->st) == 0 &&
		    S_ISREG(c->st.st_mode) && c->st.st_size > 0 &&
		    c->st.st_size <= SMALL && preadv2(fd, &(struct iovec){
		    c->data, SMALL }, 1, 0, RWF_NOWAIT) == c->st.st_size;
		close_quietly(fd);
		c->serves = ok && c->st.st_ctim.tv_sec + 1 < now;
	}
	if (ok) {
		r->type = "application/json";
		r->cached = (struct iovec){ c->data, (size_t)c->st.st_size };
		r->status = 200;
	}
#endif
	return r->status;
}

/* ---- is it well? ---- */

/* We are alive. To OPTIONS the answer is the Allow field. */
static int
quick_ok(struct request *r)
{
	if (r->method != M_OPTIONS)
		return refuse(r, 200, "ok");
	return r->status = 204;
}

/* What /-/ready last found; main has the first look, before it listens. */
static struct {
	_Atomic bool looking;		/* somebody is */
	_Atomic unsigned at;		/* ms: when that began, or ended */
	_Atomic int error;		/* errno; 0: it is ready */
} ready;

/* Looks whether states can be written. After the start a thread of its own
 * does, for a dying disk may never answer it. */
static void *
ready_look(void *unused)
{
	struct tmp t = { .fd = -1 };

	ready.error = guard_in_place() && store_fits(store.root, 0) == 0 &&
	    tmp_create(&t, store.root) == 0 && fsync(t.fd) == 0 &&
	    dir_sync(store.root) == 0 ? 0 : errno;
	tmp_remove(&t);
	ready.at = (unsigned)clock_ms();
	ready.looking = false;
	return unused;
}

/* Answers with the last result, if that is new or somebody looks. Else starts a
 * look, and returns 0: so only the first who asks waits for it, in a thread. */
static int
quick_ready(struct request *r)
{
	bool looking = ready.looking;	/* read before at, which is set first */
	unsigned now = (unsigned)clock_ms(), age = now - ready.at;
	int error = looking && age >= LOOK_MS ? ETIMEDOUT : ready.error;

	if (!looking && age >= FRESH_MS) {
		ready.at = now;
		if (!atomic_exchange(&ready.looking, true) &&
		    !thread_start(ready_look)) {
			ready.error = EAGAIN;
			ready.looking = false;
		}
		return 0;
	}
	if (error == 0)
		return refuse(r, 200, "ready");
	return refuse(r, 503, "not ready: %s", error == ETIMEDOUT ?
	    "the disk does not answer in time" : error == EIDRM ?
	    "the states' directory, or .guard in it, was removed or replaced: "
	    "start statesrv again" :
	    strerror(error));
}

/* Waits for the result of a look. */
static int
do_ready(struct request *r)
{
	do				/* it waits first: it began the look */
		while (ready.looking &&
		    (unsigned)clock_ms() - ready.at < LOOK_MS)
			(void)wait_until(-1, 0, clock_ms() + 1);
	while (quick_ready(r) == 0);
	return r->status;
}

/* ==== methods ============================================================
 *
 * What each method on each kind of URL wants: a permission, and a function of
 * the loop or one of a thread. What needs R_WRITE has a state as its body, what
 * needs R_PLAN has lock info or nothing, the rest has none. A request is let in
 * only if it is in the table, which makes Allow, too. All return the status.
 */
static const struct action {
	enum kind kind;
	unsigned methods;		/* a bit for each */
	enum right right;
	bool page;			/* at most PAGES_MAX at a time */
	int (*quick)(struct request *);	/* in the loop; 0: it would wait */
	int (*run)(struct request *);	/* in a thread */
} actions[] = {
#define ON(method) (1u << (method))
#define READS (ON(M_GET) | ON(M_HEAD))
#define WRITES (ON(M_POST) | ON(M_PUT))
#define ENDS (ON(M_DELETE) | ON(M_UNLOCK))
	{ K_STATE, READS, R_READ, false, quick_state, page_file },
	{ K_STATE, WRITES, R_WRITE, false, NULL, do_write },
	{ K_STATE, ON(M_LOCK), R_PLAN, false, NULL, do_lock },
	{ K_STATE, ENDS, R_PLAN, false, NULL, do_unlock },
	{ K_LOCK, READS, R_READ, false, NULL, page_lock },
	{ K_LOCK, WRITES | ON(M_LOCK), R_PLAN, false, NULL, do_lock },
	{ K_LOCK, ENDS, R_PLAN, false, NULL, do_unlock },
	{ K_ROOT, READS, R_READ, true, NULL, page_root },
	{ K_VERSIONS, READS, R_READ, true, NULL, page_state },
	{ K_VERSION, READS, R_READ, false, NULL, page_file },
	{ K_LOG, READS, R_READ, false, NULL, page_file },
	{ K_HEALTHY, READS, R_NONE, false, quick_ok, quick_ok },
	{ K_READY, READS, R_NONE, false, quick_ready, do_ready },
	{ K_METRICS, READS, R_READ, true, NULL, page_metrics },
	/* OPTIONS goes with every URL; the last row also means "not found" */
	{ K_NONE, ON(M_OPTIONS), R_NONE, false, quick_ok, quick_ok },
};

/* What a request asks for, or the last one of the table. */
static const struct action *
action_of(const struct request *r)
{
	const struct action *a = actions;

	while (a->kind != K_NONE && (a->kind != r->kind ||
	    (a->methods & ON(r->method)) == 0))
		a++;
	return a;
}

static void
action_allow(struct buf *b, enum kind kind)
{
	struct request ask = { .kind = kind };

	buf_str(b, "\r\nAllow: OPTIONS");
	for (; ask.method < M_OPTIONS; ask.method++)
		if ((action_of(&ask)->methods & ON(ask.method)) != 0)
			buf_fmt(b, ", %s", method_names[ask.method]);
}

/* Is a Host localhost, a name below it, or an address? An attacker can let his
 * own name point to 127.0.0.1 (DNS rebinding), but it will be none of these. */
static bool
host_is_local(const char *h)
{
	size_t n = http_token(h);	/* no port, and no [address] */

	if (strspn(h, "0123456789.") >= n)
		return true;
	n -= h[n - 1] == '.';
	return (n == 9 && strncasecmp(h, "localhost", n) == 0) || (n > 10 &&
	    strncasecmp(h + n - 10, ".localhost", 10) == 0);
}

/* Checks the user's permission for the name, and the fields about the body. */
static int
admit_action(struct request *r, const struct head *h)
{
	char *const *f = h->field;
	enum right wants = action_of(r)->right;
	bool state = wants == R_WRITE, chunked = f[F_CODING] != NULL;

	r->right = user_right(r, r->kind >= K_STATE ? r->name : NULL);
	if (r->right < wants)
		return r->right == R_NONE ? refuse(r, 403, "the permission of "
		    "%s is not for the name %s", r->user, r->name) :
		    refuse(r, 403, "%s may not %s %s: the permission is %s",
		    r->user, method_names[r->method], r->name,
		    right_names[r->right]);
	/* A stranger's body would take a thread; a Go client's was meant to be
	 * written: terraform would take 200 for it as done. */
	if (wants < R_PLAN && r->length != 0 && (wants == R_NONE || r->go))
		return refuse(r, 400, "no body goes with this request: see "
		    "update_method, lock_method and unlock_method");
	r->expects = f[F_EXPECT] != NULL && h->minor == 1;
	/* A state without a length may have a body all the same. */
	r->length = h->length == -1 && !chunked && !state ? 0 : h->length;
	r->room = state ? conf.body_max : LOCK_INFO_MAX;
	r->too_large = wants == R_PLAN ? 400 : 413;
	/* RFC 9110, 13.2 and 14.5: what is asked for on a condition may not
	 * be done as if there were none. */
	if (wants >= R_PLAN && (f[F_RANGE] != NULL || f[F_MATCH] != NULL ||
	    f[F_NONE_MATCH] != NULL || f[F_UNMODIFIED] != NULL))
		return refuse(r, f[F_RANGE] != NULL ? 400 : 412, "no "
		    "Content-Range and no If- conditions here: use the lock");
	if (r->length == -1 && !chunked)
		return refuse(r, 411, "a state needs Content-Length or chunks");
	if (r->length > r->room)
		return refuse(r, r->too_large, "the body is larger than %lld "
		    "bytes", (long long)r->room);
	if (r->has_md5 && base64_decode(f[F_MD5], r->md5, 16) != 16)
		return refuse(r, 400, "Content-MD5 is no base64 of 16 bytes");
	return 0;
}

/* Everything that a request's head can be refused for, in the order that tells
 * the least to those who do not belong: pages of other sites, then strangers,
 * then bad names, wrong methods, missing permissions, wrong lengths. */
static int
admit(struct request *r, const struct head *h)
{
	char *const *f = h->field, *query = h->target;
	const char *wrong = name_route(strsep(&query, "?"), r);

	/* Then, as listener_add sees to it, TCP comes by loopback only. */
	if (users->n == 0 && !conf.open && *r->conn->peer != '\0' &&
	    !host_is_local(h->host))
		return refuse(r, 403, "the Host %s is not this machine: set "
		    "users (-u, or TF_HTTP_USERNAME and TF_HTTP_PASSWORD), or "
		    "-n, which lets any web page read the states", r->host);
	if (f[F_ORIGIN] != NULL && action_of(r)->right >= R_PLAN)
		return refuse(r, 403, "no web page may change a state");
	if (users->n > 0 && r->kind != K_HEALTHY && r->kind != K_READY &&
	    (!user_shows(r, f[F_AUTHORIZATION]) ||
	    user_right(r, NULL) == R_NONE))
		return refuse(r, 401, f[F_AUTHORIZATION] == NULL ?
		    "credentials are needed" : "wrong credentials");
	if (wrong == NULL && r->kind == K_NONE && r->method != M_OPTIONS)
		return refuse(r, 404, "there is no such page");
	if (wrong != NULL || (wrong = name_query(query, r)) != NULL)
		return refuse(r, 400, "%s", wrong);
	if ((action_of(r)->methods & ON(r->method)) == 0)
		return refuse(r, 405, "%s does not go with this URL",
		    method_names[r->method]);
	return admit_action(r, h);
}

/* ==== connections ========================================================
 *
 * The loop, which does not wait, and the pool of threads, which may. Each
 * connection is in one list at a time, and belongs to the loop, or to the
 * thread that has it.
 */

/* The connections that the loop has, the one with the latest news last: see
 * loop_turn. An idle one has no buffer and no request. */
static struct {
	struct list list;
	unsigned base;			/* wake pipe and listeners */
	unsigned max;			/* connections, those in threads too */
	struct pollfd fd[1 + LISTENERS_MAX + SLOTS_MAX];
} polled;

static struct {
	struct list queue;		/* wait for a thread */
	struct list back;		/* answered; both under list_mutex */
	pthread_cond_t work;
	unsigned idle, max;		/* threads */
	bool full;			/* no more could be started */
} pool = { .work = PTHREAD_COND_INITIALIZER };

/* Where we listen: http://127.0.0.1:8080, unix:PATH. */
static char listeners[LISTENERS_MAX][128];

union address {
	struct sockaddr any;
	struct sockaddr_in four;
	struct sockaddr_in6 six;
	struct sockaddr_un path;
};

static struct {
	int wake[2];			/* a pipe: a signal's number; 0: look
					 * into pool.back */
	int64_t now;			/* ms, monotonic, of this turn */
	int64_t news;			/* of the last turn with some */
	int64_t pause;			/* until then nothing is accepted */
	int64_t end;			/* not 0: nothing new is begun, and at
					 * this time the process ends */
	pid_t child;			/* the wrapper's command, or 0 */
	bool shares_terminal;		/* it and we, in the foreground */
	int status;			/* its exit status */
} loop;

/* ---- the request log ---- */

/* What each line of the log and each head begins with, made once a second. */
static __thread struct {
	time_t second;
	char log[32], head[160];
} clock_text;

/* Brings the texts up to date; the time of day, in milliseconds. */
static int64_t
clock_texts(void)
{
	int64_t ms = time_ms();
	time_t second = (time_t)(ms / 1000);
	char text[32];
	struct tm tm;

	if (second == clock_text.second)
		return ms;
	clock_text.second = second;
	time_text(text, ms, false);	/* 2026-11-26T13:48:01.000Z */
	(void)snprintf(clock_text.log, sizeof(clock_text.log), "time=%.20s",
	    text);
	(void)gmtime_r(&second, &tm);
	(void)asctime_r(&tm, text);	/* Thu Nov 26 13:48:01 2026 */
	(void)snprintf(clock_text.head, sizeof(clock_text.head),
	    "\r\nDate: %.3s, %02d %.3s %.4s %.8s GMT\r\nCache-Control: no-store"
	    "\r\nX-Content-Type-Options: nosniff", text, tm.tm_mday, text + 4,
	    text + 20, text + 11);
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
		buf_text(b, value, JSON);
}

static void
log_request(const struct request *r, int64_t us, struct buf *b)
{
	static const char pages[K_LOG + 1][9] = {
		[K_LOCK] = "lock", [K_VERSIONS] = "versions",
		[K_VERSION] = "version", [K_LOG] = "log"
	};
	int64_t ms = clock_texts();

	buf_num(b, clock_text.log, ms % 1000, 3);
	logfmt(b, "Z client=", *r->client != '\0' ? r->client : "unix");
	logfmt(b, " user=", r->user);
	logfmt(b, " method=", method_names[r->method]);
	logfmt(b, r->kind >= K_STATE ? " name=" : " path=", r->name);
	logfmt(b, " page=", pages[r->kind]);
	if (r->status == -1)
		buf_str(b, " status=-");
	else
		buf_num(b, " status=", r->status, 1);
	buf_num(b, " bytes=", r->sent, 1);
	buf_num(b, " ms=", us / 1000, 1);
	buf_num(b, ".", us % 1000, 3);
	logfmt(b, " id=", r->id);
	logfmt(b, " why=", r->status == 200 ? "" : r->why);
	buf_str(b, "\n");
}

/* Counts and logs a request that has been answered or cut. */
static void
request_count(struct request *r)
{
	int64_t us = clock_us(CLOCK_MONOTONIC) - r->start;
	int64_t top = 100;		/* of the first time's bucket */
	int64_t unsent = r->left + (r->gone < r->out.len ?
	    (int64_t)(r->out.len - r->gone) : 0);
	size_t i = 0;

	r->sent -= unsent < r->sent ? unsent : r->sent;
	(void)pthread_mutex_lock(&output);
	stats.requests[r->method][r->status == -1 ? 0 : r->status]++;
	for (; i < DURATIONS && us > top; i++)
		top *= 10;
	stats.took[i]++;
	stats.took_us += (unsigned long)us;
	stats.sent += (unsigned long)r->sent;
	stats.received += (unsigned long)r->got;
	if (stats.log.len > LOG_MAX)
		stats.unlogged++;
	else if (conf.command == NULL &&	/* whose stdout it is */
	    (r->kind != K_READY || r->status != 200))
		log_request(r, us, &stats.log);
	if (r->status == 200 && r->method == M_LOCK)
		(void)snprintf(stats.locked, sizeof(stats.locked), "%s", r->id);
	(void)pthread_mutex_unlock(&output);
}

/*
 * Writes the lines of the log: at once, or, if the last ones were written less
 * than LOG_MS ago, together with those that follow. Takes how long poll would
 * wait, and returns how long it may, so that no line waits for longer. wait -1:
 * the server ends, write all.
 *
 * A reader of stdout that does not read must not stop the server: a pipe that
 * polls writable takes PIPE_BUF at once; the rest waits, up to LOG_MAX.
 */
static int64_t
log_flush(int64_t wait)
{
	static int64_t next;		/* ms: few lines wait until then */
	struct buf *b = &stats.log;
	size_t n, max;
	ssize_t sent = 1;

	(void)pthread_mutex_lock(&output);
	if (b->len > 0 && (wait < 0 || loop.now >= next ||
	    b->len > PIPE_BUF / 8 * 7)) {
		while (b->len > 0 && sent > 0 && (wait_until(STDOUT_FILENO,
		    POLLOUT, 0) & POLLOUT) != 0) {
			max = b->len < PIPE_BUF ? b->len : PIPE_BUF;
			/* Whole lines, if they fit: stderr may be there. */
			for (n = max; n > 0 && b->data[n - 1] != '\n';)
				n--;
			sent = write(STDOUT_FILENO, b->data, n > 0 ? n : max);
			n = sent > 0 ? (size_t)sent : 0;
			b->len -= n;
			memmove(b->data, b->data + n, b->len);
		}
		/* If nobody reads, there is no hurry. */
		next = loop.now + (b->len > 0 ? 10 * LOG_MS : LOG_MS);
	}
	b->failed = false;
	wait = b->len > 0 && wait > next - loop.now ? next - loop.now : wait;
	(void)pthread_mutex_unlock(&output);
	return wait;
}

/* ---- answers ---- */

static const char status_lines[][36] = {
	"200 OK", "204 No Content", "400 Bad Request", "401 Unauthorized",
	"403 Forbidden", "404 Not Found", "405 Method Not Allowed",
	"409 Conflict", "411 Length Required", "412 Precondition Failed",
	"413 Content Too Large", "414 URI Too Long", "417 Expectation Failed",
	"423 Locked", "431 Request Header Fields Too Large",
	"500 Internal Server Error", "501 Not Implemented",
	"503 Service Unavailable", "505 HTTP Version Not Supported",
	"507 Insufficient Storage"
};

/* Makes the answer ready to be sent: all but what is in the cache or a file. */
static void
reply_ready(struct request *r)
{
	struct buf *b = &r->out;
	size_t i = 0;

	if (r->text.failed)
		(void)refuse(r, 503, "out of memory");
	r->keep = r->keep && r->length == 0;
	r->sent = (int64_t)(r->text.len + r->cached.iov_len) + r->left;
	(void)buf_room(b, HEAD_ROOM + r->text.len + r->cached.iov_len);
	(void)clock_texts();
	/* Go's client, seeing HTTP/1.0, says at once that it spoke TLS. */
	buf_str(b, r->tls ? "HTTP/1.0 " : "HTTP/1.1 ");
	for (; atoi(status_lines[i]) != r->status; i++)
		assert(i + 1 < sizeof(status_lines) / sizeof(*status_lines));
	buf_str(b, status_lines[i]);
	buf_str(b, clock_text.head);
	if (r->status != 204)
		buf_num(b, "\r\nContent-Length: ", r->sent, 1);
	if (r->type != NULL) {
		buf_str(b, "\r\nContent-Type: ");
		buf_str(b, r->type);
	}
	if (r->status == 401)
		buf_str(b, "\r\nWWW-Authenticate: Basic realm=\"statesrv\", "
		    "charset=\"UTF-8\"");
	if (r->status == 503)
		buf_str(b, "\r\nRetry-After: 10");
	if (r->status == 405 || r->status == 204)
		action_allow(b, r->kind);
	buf_str(b, r->keep ? "\r\nConnection: keep-alive\r\n\r\n" :
	    "\r\nConnection: close\r\n\r\n");
	if (r->method == M_HEAD) {
		r->sent = r->left = 0;
		r->cached.iov_len = 0;
	} else
		buf_add(b, r->text.data, r->text.len);
	free(r->text.data);		/* a page may be large */
	r->text = (struct buf){ 0 };
	if (b->failed)
		(void)cut(r, "out of memory");
	trace("<", b->data, b->len);
	trace("<", r->cached.iov_base, r->cached.iov_len);
}

/* Sends the next piece of an answer; as send(2). */
static ssize_t
reply_piece(struct request *r)
{
	size_t n = r->out.len - r->gone;
	struct iovec v[2] = { { r->out.data + r->gone, n }, r->cached };
	struct msghdr m = { .msg_iov = v, .msg_iovlen = 2 };
	char piece[16384];
	ssize_t sent;

	if (n > 0) {
		/* The last answer and the connection's end are one packet. */
		sent = sendmsg(r->conn->fd, &m, r->left > 0 || !r->keep ?
		    MSG_MORE : 0);
		r->gone += sent > 0 ? (size_t)sent : 0;
		/* Copy the rest: later the slot may have another state. */
		if (sent != (ssize_t)(n + r->cached.iov_len))
			buf_add(&r->out, r->cached.iov_base,
			    r->cached.iov_len);
		assert(!r->out.failed);	/* there was room */
		r->cached.iov_len = 0;
		return sent;
	}
	n = r->left < SEND_MAX ? (size_t)r->left : SEND_MAX;
#ifdef __linux__
	if (!conf.verbose) {
		sent = sendfile(r->conn->fd, r->file, &r->off, n);
		r->left -= sent > 0 ? sent : 0;
		if (sent != -1 || errno != EINVAL)
			return sent;	/* else the file system has none */
	}
#endif
	n = n < sizeof(piece) ? n : sizeof(piece);
	sent = read_at(r->file, piece, n, r->off);
	if (sent > 0)
		sent = send(r->conn->fd, piece, (size_t)sent, 0);
	if (sent > 0) {
		trace("<", piece, (size_t)sent);
		r->off += sent;
		r->left -= sent;
	}
	return sent;
}

/* Sends the answer, or what is left of it, and ends the request. False: not all
 * is sent, for that would have to wait, and may_wait is false. */
static bool
reply_send(struct request *r, bool may_wait)
{
	struct conn *c = r->conn;
	ssize_t sent;

	if (r->out.len == 0 && r->status != -1)
		reply_ready(r);
	while (r->status != -1 && (r->gone < r->out.len || r->left > 0)) {
		sent = reply_piece(r);
		if (sent > 0)
			conn_moved(c, (size_t)sent);
		else if (sent == -1 && errno == EAGAIN && !may_wait)
			return false;
		else if (sent == 0 || errno == EIO || errno == ESTALE)
			(void)cut(r, "the file cannot be read to its end");
		else if (!conn_wait(c, POLLOUT))
			(void)cut(r, c->why != NULL ? c->why :
			    "the client did not take the answer");
	}
	request_count(r);
	c->r = NULL;
	/* RFC 9112, 9.6: closing while bytes are unread, or with much unsent,
	 * would reset the connection, and the client might lose the answer
	 * with it: so we stop sending, and read on until the client closes. */
	c->ending = r->status == -1 || !r->keep;
	c->lingers = r->file != -1 || r->sent > 16384 || r->length != 0;
	conn_within(c, c->ending ? DRAIN_MS : IDLE_MS);
	if (c->ending)
		(void)shutdown(c->fd, r->status == -1 ? SHUT_RDWR : SHUT_WR);
	return true;
}

/* ---- requests ---- */

/* Makes a request of a head of n bytes, or of one that was refused: n is -1.
 * Copies what is needed later. NULL if there is no memory. */
static struct request *
request_new(struct conn *c, const struct head *h, int n)
{
	const char *agent = h->field[F_AGENT], *last = "";
	char *front = h->field[F_FORWARDED], *item;
	struct request *r = calloc(1, sizeof(*r));

	if (r == NULL)
		return NULL;
	r->conn = c;
	r->file = -1;
	r->method = h->method;
	r->start = clock_us(CLOCK_MONOTONIC);
	r->fronted = *c->peer == '\0' || conf.fronted;
	memcpy(r->client, c->peer, sizeof(c->peer));
	/* Until the body is admitted: it is there, and stays unread. */
	r->length = n < 0 || h->field[F_CODING] != NULL ? -1 :
	    h->length > 0 ? h->length : 0;
	if (n < 0) {
		r->tls = c->used > c->at && c->in[c->at] == 0x16;
		(void)refuse(r, atoi(h->why), "%s", h->why + 4);
		return r;
	}
	/* (Not a refused one: a secret may stand anywhere in that.) */
	trace(">", c->in + c->at, (size_t)n);
	c->at += (size_t)n;
	r->got = n;
	r->keep = loop.end == 0 && h->connection[0] == NULL &&
	    (h->connection[1] != NULL || h->minor == 1);
	r->form = h->accept[0] != NULL && (h->accept[1] == NULL ||
	    strcmp(h->accept[0], h->accept[1]) >= 0) ? HTML :
	    h->accept[1] != NULL ? JSON : TEXT;
	r->has_md5 = h->field[F_MD5] != NULL;
	r->go = agent != NULL && strncmp(agent, "Go-http-client", 14) == 0;
	(void)strncat(r->host, h->host, sizeof(r->host) - 1);
	/* The last address that a front tells counts, if it is one. */
	while (r->fronted && (item = strsep(&front, ",")) != NULL)
		last = trim(item);
	if (*last != '\0' &&
	    last[strspn(last, "0123456789abcdefABCDEF.:")] == '\0')
		(void)snprintf(r->client, sizeof(r->client), "%s", last);
	(void)admit(r, h);
	return r;
}

static void
request_free(struct request *r)
{
	free(r->out.data);
	free(r->text.data);
	close_quietly(r->file);
	free(r->body.data);
	free(r);
}

/* ---- the pool ---- */

/* Does a request, answers it, gives the connection back to the loop, and only
 * then frees and prunes. */
static void
thread_serve(struct conn *c)
{
	struct change ch = { .dir = -1, .tmp.fd = -1, .old = -1,
	    .kept.fd = -1, .history = -1 };
	struct request *r = c->r;
	const struct action *act = action_of(r);
	const char *piece;

	r->change = &ch;
	conn_within(c, BODY_MS);
	/* The body of a GET is read, too, though nobody wants it. */
	while (r->status == 0 && act->right < R_PLAN &&
	    body_next(r, &piece) > 0)
		continue;
	if (act->page && ++stats.pages > PAGES_MAX && r->status == 0)
		(void)refuse(r, 503, "too many pages are being made");
	if (r->status == 0 && (!act->page || page_wanted(r)))
		(void)act->run(r);	/* else there is an answer */
	change_end(r);
	stats.pages -= act->page;
	conn_within(c, BODY_MS);
	(void)reply_send(r, true);
	(void)pthread_mutex_lock(&list_mutex);
	list_add(&pool.back, c);
	if (pool.back.n == 1)
		(void)!write(loop.wake[1], "", 1);
	(void)pthread_mutex_unlock(&list_mutex);
	if (ch.event != NULL)
		history_prune(ch.history, &ch.ids, &ch.lock);
	close_quietly(ch.old);
	close_quietly(ch.history);
	while (ch.ids.n > 0)
		free(ch.ids.list[--ch.ids.n]);
	free(ch.ids.list);
	free(ch.lock.raw);
	close_quietly(ch.dir);
	request_free(r);
}

/* A thread's life: it ends when there was nothing to do for a while. (If the
 * clock jumps, that is sooner or later, and does no harm.) */
static void *
pool_thread(void *unused)
{
	struct timespec until;
	struct conn *c;

	(void)pthread_mutex_lock(&list_mutex);
	for (;;) {
		(void)clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += THREAD_IDLE;
		pool.idle++;
		while (pool.queue.n == 0 && pthread_cond_timedwait(&pool.work,
		    &list_mutex, &until) == 0)
			continue;
		pool.idle--;
		if ((c = pool.queue.first) == NULL)
			break;
		list_remove(&pool.queue, c);
		(void)pthread_mutex_unlock(&list_mutex);
		thread_serve(c);
		(void)pthread_mutex_lock(&list_mutex);
	}
	stats.threads--;
	(void)pthread_mutex_unlock(&list_mutex);
#ifdef M_ARENA_MAX
	if (stats.threads == 0)		/* what a flood needed is given back */
		(void)malloc_trim(0);
#endif
	return unused;
}

/* Gives a connection, and its request, to a thread. */
static void
pool_give(struct conn *c)
{
	list_remove(&polled.list, c);
	c->deadline = loop.now + QUEUE_MS;
	(void)pthread_mutex_lock(&list_mutex);
	list_add(&pool.queue, c);
	if (pool.queue.n > pool.idle) {
		pool.full = stats.threads >= pool.max ||
		    !thread_start(pool_thread);
		stats.threads += pool.full ? 0 : 1;
	}
	(void)pthread_mutex_unlock(&list_mutex);
	(void)pthread_cond_signal(&pool.work);
}

/*
 * If a request waits and all threads are taken, the client that its thread has
 * waited for longest loses its connection, after STALL_MS of silence, or if it
 * is that far behind the least rate: see conn_moved. (A thread that waits for a
 * disk or a guard is left alone.) A request that has waited QUEUE_MS for a
 * thread comes back to the loop: see conn_late. Shortly before the server ends
 * all lose it, and all come back. Returns whether a request waits.
 */
static bool
pool_relieve(void)
{
	bool ends = loop.end != 0 && loop.now > loop.end - STOP_MS / 20;
	bool waiting, stalls;
	struct conn *c;

	(void)pthread_mutex_lock(&list_mutex);
	waiting = pool.queue.n > pool.idle;
	if (waiting && pool.full && stats.threads < pool.max)
		stats.threads += thread_start(pool_thread);	/* try again */
	for (c = conn_waiting.first; c != NULL; c = c->next) {
		stalls = waiting && pool.full && c == conn_waiting.first &&
		    c->deadline - BODY_MS < loop.now - STALL_MS;
		if (!ends && !stalls)
			break;
		c->why = ends ? "the server stops" : "others need its thread";
		(void)shutdown(c->fd, SHUT_RDWR);
	}
	while ((c = pool.queue.first) != NULL &&
	    (ends || c->deadline <= loop.now)) {
		list_remove(&pool.queue, c);
		list_add(&polled.list, c);
		c->active = loop.now;
	}
	(void)pthread_mutex_unlock(&list_mutex);
	return waiting;
}

/* ---- a connection's life ---- */

/* Closes a connection. If it has a request, or half a head, the log says why
 * that gets no answer. */
static void
conn_close(struct conn *c, const char *why)
{
	static const struct head begun = { .method = M_COUNT, .why = "400 " };

	if (c->r == NULL && c->used > 0 && !c->ending)
		c->r = request_new(c, &begun, -1);
	if (c->r != NULL) {
		(void)cut(c->r, why);
		request_count(c->r);
		request_free(c->r);
	}
	list_remove(&polled.list, c);
	(void)close(c->fd);
	free(c->in);
	free(c);
	stats.connections--;
}

/* Reads what has come, once: poll tells if there is more. False: close it, for
 * the client has left, or nothing has come and nothing more is wanted. */
static bool
conn_read(struct conn *c)
{
	ssize_t n;

	if (c->in == NULL && (c->in = malloc(HEAD_MAX)) == NULL)
		return false;
	if (c->ending)
		c->at = c->used;	/* nobody wants it */
	n = conn_recv(c);		/* a full one was a head, or refused */
	c->lingers |= n > 0;
	return n > 0 || (n == -1 && (errno == EAGAIN || errno == EINTR) &&
	    (c->ending ? c->lingers : loop.end == 0 || c->used > 0));
}

/* Parses the next head in the buffer: its length, -1 if it is refused, or 0 if
 * it is not all there: then it gets a deadline, and is parsed again when a
 * line's end has come; at each byte of a trickle would be too much work. */
static int
head_next(struct conn *c, struct head *h)
{
	int size = 0;

	/* Old clients send an empty line behind a body (RFC 9112, 2.2). */
	if (c->used - c->at >= 2 && memcmp(c->in + c->at, "\r\n", 2) == 0)
		c->at += 2;
	if (c->used == c->at || c->ending)
		c->at = c->used = 0;
	else if (!c->begun || c->used == HEAD_MAX ||
	    memchr(c->in + c->used - c->fresh, '\n', c->fresh) != NULL)
		size = http_parse(c->in + c->at, c->used - c->at, h);
	if (size == 0 && c->used > 0 && !c->begun)
		conn_within(c, HEAD_MS);
	c->begun = size == 0 && c->used > 0;
	return size;
}

/* Serves a connection that has news, or whose request is due, as far as it can
 * without waiting. The rest is a thread's, perhaps only what the socket did not
 * take; but strangers get one for /-/ready only. A wrong secret's answer waits
 * for a deadline. */
static void
conn_drive(struct conn *c)
{
	bool stays = c->r != NULL || conn_read(c), shows, stranger;
	unsigned turns = 0;
	struct request *r;
	struct head h;
	int size = 0;

	c->active = loop.news = loop.now;
	list_remove(&polled.list, c);
	list_add(&polled.list, c);
	while (c->r != NULL || ((size = head_next(c, &h)) != 0 &&
	    (c->r = request_new(c, &h, size)) != NULL)) {
		r = c->r;
		shows = *r->user != '\0' || r->bearer;
		stranger = users->n > 0 && (r->status == 401 || !shows);
		if (r->status == 401 && shows && c->deadline > loop.now) {
			conn_within(c, DENY_MS);
			return;
		}
		if ((turns < TURN_MAX || stranger) && r->status == 0 &&
		    r->length == 0 && action_of(r)->quick != NULL)
			(void)action_of(r)->quick(r);
		if (turns++ == TURN_MAX && stranger && r->status != 0) {
			c->deadline = loop.now;	/* it goes on next turn */
			return;
		}
		if (turns > TURN_MAX || r->status == 0 ||
		    !reply_send(r, false)) {
			if (stranger && r->status != 0)
				conn_close(c, "without credentials, no thread "
				    "waits for its client");
			else
				pool_give(c);
			return;
		}
		request_free(r);
	}
	if (!stays || size != 0 || (c->ending && !conn_read(c)))
		conn_close(c, size != 0 ? "out of memory" :
		    "the client has left");
	else if (c->used == 0) {
		free(c->in);
		c->in = NULL;
	}
}

/* A deadline has passed: of a head, an idle or an ending connection, or of an
 * answer that is due now, a 401 or one that was put off to this turn; or no
 * thread was free, perhaps for the rest of an answer. */
static void
conn_late(struct conn *c)
{
	struct request *r = c->r;

	if (r != NULL && r->status == 0)
		(void)refuse(r, 503, stats.threads > 0 ?
		    "all threads are busy" : "no thread can be started: see "
		    "ulimit -u, or a limit of pids");
	if (r == NULL || r->out.len > 0)
		conn_close(c, r != NULL ? "no thread had time for the rest" :
		    "the head came too slowly");
	else
		conn_drive(c);
}

/* ---- accepting ---- */

/* Writes an address and its port; nothing, if it is a unix socket's. */
static void
address_text(const union address *a, char *out, size_t size)
{
	bool six = a->any.sa_family == AF_INET6;
	char text[INET6_ADDRSTRLEN];

	if (inet_ntop(a->any.sa_family, six ?
	    (const void *)&a->six.sin6_addr : (const void *)&a->four.sin_addr,
	    text, sizeof(text)) != NULL)
		(void)snprintf(out, size, six ? "[%s]:%u" : "%s:%u", text,
		    ntohs(six ? a->six.sin6_port : a->four.sin_port));
}

/*
 * Accepts what waits on a listener, up to a number: poll tells if there is
 * more, also after an error. If there is no room, closes the connection that
 * has been silent for longest, unless even that one is new. Then the listeners
 * are not polled for a while, or poll would return at once, again and again,
 * for what cannot be accepted.
 */
static void
conn_accept(int listener)
{
	bool full = stats.connections >= polled.max;
	union address peer = { .any = { 0 } };
	struct conn *c;
	int fd, n;

	for (n = 0; n < 64 && stats.connections < polled.max; n++) {
		fd = accept4(listener, &peer.any,
		    &(socklen_t){ sizeof(peer) }, SOCK_NONBLOCK);
		full = fd == -1 && (errno == EMFILE || errno == ENFILE ||
		    errno == ENOBUFS || errno == ENOMEM);
		if (fd == -1 || (c = calloc(1, sizeof(*c))) == NULL) {
			close_quietly(fd);
			break;
		}
		c->fd = fd;
		address_text(&peer, c->peer, sizeof(c->peer));
		stats.connections++;
		conn_within(c, IDLE_MS);
		list_add(&polled.list, c);
		conn_drive(c);
	}
	if (full && (c = polled.list.first) != NULL &&
	    loop.now - c->active >= NEW_MS)
		conn_close(c, "others needed its place");
	else if (full)
		loop.pause = loop.now + 50;
}

/* ==== start and stop =====================================================
 *
 * The directory, the listeners, the sandbox, signals, the loop's turns, and
 * the wrapper: statesrv NAME COMMAND.
 */

/* ---- what we were started with ---- */

/* The signals that we handle; each becomes a byte in the wake pipe, but the
 * last two are ignored. Process 1 of a container has no defaults. */
static const int signals[] = {
	SIGHUP, SIGTERM, SIGINT, SIGQUIT, SIGCHLD, SIGPIPE, SIGXFSZ, 0
};

/* What we change and the wrapper's command gets back as it was. */
static struct {
	mode_t mask;
	void (*action[NSIG])(int);	/* of a signal */
} inherited;

static void
on_signal(int sig)
{
	int saved = errno;
	char byte = (char)sig;

	(void)!write(loop.wake[1], &byte, 1);	/* a full pipe wakes, too */
	errno = saved;
}

/* Sets the signal handlers, and raises the limit of open files: half of it is
 * for connections, the rest for threads, which need a few each. Not for the
 * wrapper: its command would inherit the limit. */
static void
loop_start(void)
{
	struct rlimit files;
	rlim_t half;
	const int *s;

	(void)getrlimit(RLIMIT_NOFILE, &files);
	half = files.rlim_cur / 2;
	files.rlim_cur = files.rlim_max > SLOTS_MAX * 4 ? SLOTS_MAX * 4 :
	    files.rlim_max;
	if (conf.command == NULL && setrlimit(RLIMIT_NOFILE, &files) == 0)
		half = files.rlim_cur / 2;
	pool.max = (unsigned)(half / 8 < THREADS_MAX ? half / 8 : THREADS_MAX);
	polled.max = (unsigned)(half < SLOTS_MAX ? half : SLOTS_MAX);
	if (half < 24 || pipe(loop.wake) == -1)
		die(1, "48 open files at least: see ulimit -n");
	(void)fcntl(loop.wake[0], F_SETFD, FD_CLOEXEC);
	(void)fcntl(loop.wake[1], F_SETFD, FD_CLOEXEC);
	(void)fcntl(loop.wake[1], F_SETFL, O_NONBLOCK);
	polled.fd[0] = (struct pollfd){ .fd = loop.wake[0], .events = POLLIN };
	polled.base = 1;
	for (s = signals; *s != 0; s++)
		inherited.action[*s] = signal(*s, *s == SIGPIPE ||
		    *s == SIGXFSZ ? SIG_IGN : on_signal);
	if (conf.users == NULL && inherited.action[SIGHUP] == SIG_IGN)
		(void)signal(SIGHUP, SIG_IGN);	/* nohup */
}

/* ---- the directory ---- */

/* Opens the directory; true if it was made. */
static bool
store_open(void)
{
	bool created = mkdir(conf.dir, 0700) == 0;
	struct stat st, other;
	int tmp, history, dir, error;

	if ((!created && errno != EEXIST) || (store.root = open(conf.dir,
	    O_RDONLY | O_DIRECTORY | O_CLOEXEC)) == -1 ||
	    (tmp = dir_open(".tmp/", D_MAKE)) == -1 ||
	    (history = dir_open(".history/", D_MAKE)) == -1 ||
	    (store.guard = file_open(store.root, ".guard", O_RDWR | O_CREAT,
	    NULL)) == -1) {
		error = errno;
		if (error == EACCES && stat(conf.dir, &st) == 0 &&
		    st.st_uid != geteuid())
			die(1, "cannot write to %s, or to .tmp, .history or "
			    ".guard in it: %s belongs to uid %u and this is "
			    "uid %u: chown %u it, with -R", conf.dir, conf.dir,
			    (unsigned)st.st_uid, (unsigned)geteuid(),
			    (unsigned)geteuid());
		die(1, "cannot open %s, or .tmp, .history or .guard in it: %s",
		    conf.dir, strerror(error));
	}
	/* A mount point below, or a subvolume. */
	store.apart = (renameat(store.root, ".tmp/-", store.root, ".tmp-") ==
	    -1 && errno == EXDEV) || (fstat(store.root, &st) == 0 &&
	    fstat(tmp, &other) == 0 && st.st_dev != other.st_dev);
	close_quietly(tmp);
	close_quietly(history);
	/* Its own name must be on the disk as well; a directory above that we
	 * may not read, or that has no sync, is hardly where we made it. */
	dir = dir_open("../", D_SYNC);
	if (dir == -1 ? created || errno != EACCES :
	    fsync(dir) == -1 && (created || errno != EINVAL))
		complain("cannot sync %s: %s", conf.dir, strerror(errno));
	close_quietly(dir);
	if (getentropy(&store.token, sizeof(store.token)) == -1 ||
	    guard_set(F_WRLCK, guard_server_byte(store.token)) == -1)
		die(1, "%s has no record locks (%s): choose another file "
		    "system", conf.dir, strerror(errno));
	conf.fold = fstatat(store.root, ".GUARD", &st, 0) == 0;
#ifdef FOLD
	conf.fold = true;
#endif
#ifdef __linux__
	struct statfs fs = { 0 };

	(void)fstatfs(store.root, &fs);
	switch ((unsigned)fs.f_type) {
	case 0xff534d42: case 0xfe534d42: case 0x517b:	/* SMB */
	case 0x6969: case 0x65735546: case 0x00c36400:	/* NFS, FUSE, CephFS */
	case 0x01021997: case 0x5346414f:		/* 9P, AFS */
		store.remote = true;
		complain("%s is on a network file system: to share it see "
		    "README, SHARING; never share SMB", conf.dir);
	}
#endif
	return created;
}

/* ---- listeners ---- */

/* A socket that is bound to HOST:PORT, [V6]:PORT, :PORT or unix:PATH, or else
 * connected to it; or -1. A socket file that nobody listens on any more is in
 * the way; any other file refuses connections, too, and stays. */
static int
address_open(const char *text, bool listens)
{
	union address a = { .path = { 0 } };
	const char *colon = strrchr(text, ':');
	int64_t port = colon != NULL ? whole_number(colon + 1) : -1;
	struct stat st;
	socklen_t len;
	char host[64];
	int fd, one = 1;

	if (port > 65535)
		port = -1;
	(void)snprintf(host, sizeof(host), "%.*s",
	    port != -1 ? (int)(colon - text) : 0, text);
	if (inet_pton(AF_INET6, host, &a.six.sin6_addr) == 1)
		die(2, "-l %s: write [%s]:%d", text, host, (int)port);
	if (strncmp(text, "unix:", 5) == 0 && text[5] != '\0' &&
	    strlen(text + 5) < sizeof(a.path.sun_path)) {
		a.path.sun_family = AF_UNIX;
		memcpy(a.path.sun_path, text + 5, strlen(text + 5));
		len = sizeof(a.path);
		if (listens && address_open(text, false) == -1 &&
		    errno == ECONNREFUSED && lstat(text + 5, &st) == 0 &&
		    S_ISSOCK(st.st_mode))
			(void)unlink(text + 5);
	} else if (host[0] == '[' && cut_suffix(host, "]") &&
	    inet_pton(AF_INET6, host + 1, &a.six.sin6_addr) == 1) {
		a.six.sin6_family = AF_INET6;
		a.six.sin6_port = htons((uint16_t)port);
		len = sizeof(a.six);
	} else if (port != -1 && inet_pton(AF_INET,
	    strcmp(host, "localhost") == 0 ? "127.0.0.1" :
	    host[0] == '\0' || strcmp(host, "*") == 0 ? "0.0.0.0" : host,
	    &a.four.sin_addr) == 1) {
		a.four.sin_family = AF_INET;
		a.four.sin_port = htons((uint16_t)port);
		len = sizeof(a.four);
	} else
		die(2, "-l %s: want HOST:PORT, [IPV6]:PORT or unix:PATH; HOST "
		    "is localhost or an address, PORT 65535 at most", text);
	if ((fd = socket(a.any.sa_family, SOCK_STREAM, 0)) == -1)
		return -1;
	(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO,	/* for connect */
	    &(struct timeval){ .tv_sec = 5 }, sizeof(struct timeval));
	if ((listens ? bind(fd, &a.any, len) : connect(fd, &a.any, len)) == 0)
		return fd;
	close_quietly(fd);
	return -1;
}

/* Listens on a socket, and takes it into the poll set. */
static void
listener_add(int fd, const char *text)
{
	char *name = listeners[polled.base - 1];
	union address a = { .any = { 0 } };

	if (fd == -1 || listen(fd, SOMAXCONN) == -1 ||
	    getsockname(fd, &a.any, &(socklen_t){ sizeof(a) }) == -1 ||
	    fcntl(fd, F_SETFL, O_NONBLOCK) == -1 ||
	    fcntl(fd, F_SETFD, FD_CLOEXEC) == -1)
		die(1, "cannot listen on %s: %s%s", text, strerror(errno),
		    errno == EADDRINUSE ? "; choose another with -l" : "");
	(void)snprintf(name, sizeof(*listeners), a.any.sa_family == AF_UNIX ?
	    "unix:%.107s" : "http://", a.path.sun_path);
	address_text(&a, name + 7, sizeof(*listeners) - 7);
	/* What it accepts inherits these (Linux). The second one keeps slow
	 * readers from filling the kernel's memory, which all share. */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 },
	    sizeof(int));
#ifdef TCP_NOTSENT_LOWAT
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT,
	    &(int){ UNSENT_MAX }, sizeof(int));
#endif
	if (users->n == 0 && !conf.open && glob("http:*", name) &&
	    !glob("http://127.*", name) && !glob("http://[::1]:*", name))
		die(2, "%s is open to other machines. Set TF_HTTP_USERNAME and "
		    "TF_HTTP_PASSWORD, or name users with -u FILE, or let "
		    "everybody read and write with -n", name);
	polled.fd[polled.base++].fd = fd;	/* loop_turn sets events */
}

/* Sockets that systemd holds for us, sd_listen_fds(3), or those of -l. */
static void
listeners_open(void)
{
	const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");
	int given = pid != NULL && n != NULL && conf.command == NULL &&
	    atol(pid) == (long)getpid() ? atoi(n) : 0, i;

	if (given < 0 || given > LISTENERS_MAX)
		die(2, "LISTEN_FDS=%s: want %d at most", n, LISTENERS_MAX);
	/* The user's own says who may connect to a unix socket. */
	(void)umask(inherited.mask);
	for (i = 0; i < given; i++)
		listener_add(3 + i, "a socket of LISTEN_FDS");
	for (i = 0; given == 0 && (i == 0 || i < (int)conf.listeners); i++)
		listener_add(address_open(conf.listen[i], true),
		    conf.listen[i]);
	(void)umask(077);
}

/* ---- the sandbox ---- */

/*
 * From now on the process reaches its directory and nothing else: no other
 * file, no new TCP socket, no signal to strangers. The users file may be
 * replaced by an editor, so what is allowed is to read the directory it is in
 * (and that of the file it links to): give it one of its own. Landlock's
 * numbers (kernel 5.19) are the same on all machines, and its header is not.
 */
static void
sandbox(void)
{
	bool ok = true;
#if defined(__linux__) && !defined(NO_SANDBOX)
	enum { WRITE = 1 << 1, READ = 1 << 2, READ_DIR = 1 << 3,
	    REMOVE = 1 << 5, MAKE_DIR = 1 << 7, MAKE_REG = 1 << 8,
	    REFER = 1 << 13, TRUNCATE = 1 << 14 };
	struct { uint64_t fs, net, scoped; } all = { 0, 0, 0 };
	struct { uint64_t allowed; int32_t fd; } __attribute__((packed)) rule;
	long abi = syscall(444, NULL, (size_t)0, 1);
	char dir[PATH_MAX];
	int rules, i;

	(void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	(void)prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (abi < 2)			/* 1 forbids all renames we need */
		return;
	all.fs = abi < 3 ? 0x3fff : abi < 5 ? 0x7fff : 0xffff;
	all.net = abi < 4 ? 0 : 3;	/* bind, connect */
	all.scoped = abi < 6 ? 0 : conf.command != NULL ? 1 : 3;
	rules = (int)syscall(444, &all, sizeof(all), 0);
	rule.fd = store.root;
	rule.allowed = all.fs & (WRITE | READ | READ_DIR | REMOVE | MAKE_DIR |
	    MAKE_REG | REFER | TRUNCATE);
	ok = syscall(445, rules, 1, &rule, 0) == 0;
	for (i = 0; conf.users != NULL && ok && i < 2; i++) {
		if (i == 0 || realpath(conf.users, dir) == NULL)
			(void)snprintf(dir, sizeof(dir), "%s", conf.users);
		rule.fd = open(dirname(dir), O_PATH | O_CLOEXEC);
		rule.allowed = READ;
		ok = syscall(445, rules, 1, &rule, 0) == 0;
		close_quietly(rule.fd);
	}
	ok = ok && syscall(446, rules, 0) == 0;
	close_quietly(rules);
#elif defined(__OpenBSD__)
	ok = unveil(conf.dir, "rwc") == 0 &&
	    (conf.users == NULL || unveil(conf.users, "r") == 0) &&
	    pledge("stdio rpath wpath cpath fattr flock inet unix proc",
	    NULL) == 0;
#endif
	if (!ok)
		die(1, "cannot enter the sandbox: %s", strerror(errno));
}

/* ---- the wrapper ---- */

/* The command's side of the fork: it finds everything as we found it, but for
 * 0 to 2, if they were closed. */
static void
command_exec(void)
{
	const int *s;
	int status;

	(void)prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
	(void)umask(inherited.mask);
	for (s = signals; *s != 0; s++)
		(void)signal(*s, inherited.action[*s]);
	(void)execvp(conf.command[0], conf.command);
	status = errno == ENOENT ? 127 : 126;
	complain("cannot run %s: %s", conf.command[0], strerror(errno));
	_exit(status);
}

/* Starts the command, with a backend of its own in its environment. */
static void
command_start(void)
{
	int tty = open("/dev/tty", O_RDONLY | O_CLOEXEC);
	struct buf url = { 0 };

	buf_fmt(&url, "%s/", listeners[0]);
	buf_url(&url, conf.command_name);
	loop.shares_terminal = tcgetpgrp(tty) == getpgrp();
	close_quietly(tty);
	(void)unsetenv("TF_HTTP_UPDATE_METHOD");
	(void)unsetenv("TF_HTTP_LOCK_METHOD");
	(void)unsetenv("TF_HTTP_UNLOCK_METHOD");
	if (url.failed || setenv("TF_HTTP_ADDRESS", url.data, 1) == -1 ||
	    setenv("TF_HTTP_LOCK_ADDRESS", url.data, 1) == -1 ||
	    setenv("TF_HTTP_UNLOCK_ADDRESS", url.data, 1) == -1 ||
	    (loop.child = fork()) == -1)
		die(1, "cannot fork: %s", strerror(errno));
	free(url.data);
	/* Both of us do this, for who knows which one runs first. */
	if (!loop.shares_terminal)
		(void)setpgid(loop.child, loop.child);
	if (loop.child == 0)
		command_exec();
	/* In the foreground the command gets the terminal's own signals. */
	if (loop.shares_terminal) {
		(void)signal(SIGINT, SIG_IGN);
		(void)signal(SIGQUIT, SIG_IGN);
	}
}

/* Names the lock that the command left behind, with what releases it. */
static void
command_farewell(void)
{
	struct buf b = { 0 };
	struct lock l = { 0 };

	if (lock_look(conf.command_name, &l) == 0 &&
	    lock_is(&l, stats.locked)) {
		buf_text(&b, conf.program, SHELL);
		buf_str(&b, " -d ");
		buf_text(&b, conf.dir, SHELL);
		buf_str(&b, " ");
		buf_text(&b, conf.command_name, SHELL);
		buf_str(&b, " terraform force-unlock -force ");
		buf_text(&b, l.id, SHELL);
		complain("%s is still locked. If nothing runs any more, "
		    "release it, in the directory of its .tf, with",
		    conf.command_name);
		(void)fprintf(stderr, "\t%s\n", b.data);
		free(b.data);
	}
	free(l.raw);
}

/* ---- the loop ---- */

/* Stops listening, after which loop_turn closes the idle connections; a second
 * time, ends the process at once. The wrapper passes signals on to its command,
 * each once a second: timeout(1) signals its child, and then the child's group,
 * and a second TERM makes terraform drop everything. */
static void
loop_signal(int sig)
{
	static int64_t passed[NSIG];	/* ms */
	pid_t pid;
	int status;

	if (sig == SIGCHLD) {
		if (loop.child == 0 ||
		    waitpid(loop.child, &status, WNOHANG) != loop.child)
			return;
		loop.child = 0;
		(void)signal(SIGINT, on_signal);
		loop.status = WIFEXITED(status) ? WEXITSTATUS(status) :
		    128 + WTERMSIG(status);
	} else if (loop.child > 0) {
		if (loop.now - passed[sig] < 1000)
			return;
		passed[sig] = loop.now;
		pid = loop.shares_terminal ? loop.child : -loop.child;
		(void)kill(pid, sig);
		(void)kill(pid, SIGCONT);	/* the terminal may stop it */
		return;
	} else if (sig == SIGHUP && conf.users != NULL) {
		if (!users_read())
			complain("the users stay as they were");
		return;
	}
	if (sig == SIGHUP && loop.end == 0)
		complain("SIGHUP ends a server without -u");
	if (loop.end != 0) {
		(void)log_flush(-1);
		_exit(conf.command != NULL ? loop.status : 1);
	}
	loop.end = loop.now + STOP_MS;
	while (polled.base > 1)
		(void)close(polled.fd[--polled.base].fd);
}

/* Handles the signals that came, and takes back the threads' connections. */
static void
loop_woken(void)
{
	struct conn *c, *next;
	char bytes[64];
	ssize_t n = read(loop.wake[0], bytes, sizeof(bytes)), i;

	for (i = 0; i < n; i++)
		if (bytes[i] != 0)
			loop_signal(bytes[i]);
	(void)pthread_mutex_lock(&list_mutex);
	c = pool.back.first;
	pool.back = (struct list){ 0 };
	(void)pthread_mutex_unlock(&list_mutex);
	for (; c != NULL; c = next) {
		next = c->next;
		list_add(&polled.list, c);
		conn_drive(c);
	}
}

/* One turn: waits for news, then serves each connection that has some, once.
 * All are polled if they are few, or none is busy. Else only the busy ones are,
 * at the list's end, and all so seldom that it costs a few percent. */
static void
loop_turn(void)
{
	static struct conn *at[1 + LISTENERS_MAX + SLOTS_MAX];
	static int64_t next_all;
	int64_t busy = loop.now - 4 * HOT_MS;
	bool waiting = pool_relieve();
	bool idle = polled.list.n <= FLAT || loop.news < busy;
	bool all = idle || loop.now >= next_all;
	int64_t wait = idle ? INT_MAX : all ? 0 : HOT_MS;
	unsigned n = polled.base, i;
	struct conn *c, *prev;

	if (all)
		next_all = loop.now + HOT_MS + polled.list.n / 250;
	if (wait > 50 && (waiting || loop.end != 0 || loop.now < loop.pause))
		wait = 50;
	for (c = polled.list.last; c != NULL && (all || c->active >= busy);
	    c = prev) {
		prev = c->prev;
		if (c->deadline <= loop.now) {
			conn_late(c);
			wait = 0;	/* it may have a new one */
			continue;
		}
		if (wait > c->deadline - loop.now)
			wait = c->deadline - loop.now;
		polled.fd[n] = (struct pollfd){ .fd = c->fd, .events = POLLIN };
		at[n] = c;
		/* One that waits for its answer is not polled: if its client
		 * hung up, poll would say so again and again. */
		n += c->r == NULL;
	}
	for (i = 1; i < polled.base; i++)
		polled.fd[i].events = loop.now < loop.pause ? 0 : POLLIN;
	if (poll(polled.fd, n, (int)log_flush(wait)) == -1)
		n = 0;
	loop.now = clock_ms();
	for (i = polled.base; i < n; i++)
		if (polled.fd[i].revents != 0 || loop.end != 0)
			conn_drive(at[i]);
	for (i = polled.base - 1; i > 0 && n > 0; i--)
		if (polled.fd[i].revents != 0)
			conn_accept(polled.fd[i].fd);
	if (n > 0 && polled.fd[0].revents != 0)
		loop_woken();
}

/* ---- -c ---- */

/* Asks a running server whether it is ready; the exit status. */
static int
check(const char *text)
{
	int fd = address_open(text, false);
	char answer[1024] = "";
	const char *reason;

	(void)signal(SIGPIPE, SIG_IGN);
	if (fd == -1 || dprintf(fd, "GET /-/ready HTTP/1.0\r\n\r\n") < 0)
		die(1, "%s does not answer: %s", text, strerror(errno));
	if (wait_until(fd, POLLIN, clock_ms() + 5000) != 0)
		(void)recv(fd, answer, sizeof(answer) - 1, 0);
	if (strncmp(answer, "HTTP/1.1 200", 12) == 0)
		return 0;
	reason = strstr(answer, "not ready: ");
	reason = reason != NULL ? reason : "no statesrv, or too slow\n";
	complain("%s is %.*s", text, (int)strcspn(reason, "\n"), reason);
	return 1;
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
"  -x        believe X-Forwarded-For on TCP, too: only behind a proxy\n\n"
"Without -u, TF_HTTP_USERNAME and TF_HTTP_PASSWORD make one user who may do\n"
"everything. Without users, a loopback address lets everyone in.\n";

/* Reads an option's number, or ends the program. */
static unsigned
number(int option, unsigned min, unsigned max)
{
	int64_t v = whole_number(optarg);

	if (v < min || v > max)
		die(2, "-%c %s: want a number from %u to %u", option, optarg,
		    min, max);
	return (unsigned)v;
}

static void
option(int c)
{
	/* To getopt, --help is the option "-" with the argument "help". */
	if (c == '-')
		c = strcmp(optarg, "help") == 0 ? 'h' :
		    strcmp(optarg, "version") == 0 ? 'V' : '-';
	switch (c) {
	case 'b': conf.break_hours = number(c, 1, 1000000); break;
	case 'c': conf.check = true; break;
	case 'd': conf.dir = optarg; break;
	case 'k': conf.keep = number(c, 0, 1000000); break;
	case 'l':
		if (conf.listeners == LISTENERS_MAX)
			die(2, "-l can be given %d times at most",
			    LISTENERS_MAX);
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
		if (c == '-')
			complain("invalid option: --%s", optarg);
		(void)fprintf(c == 'h' ? stdout : stderr, usage_text, conf.dir,
		    conf.keep, (long long)(conf.body_max >> 20));
		exit(c == 'h' ? 0 : 2);
	}
}

static void
options(int argc, char **argv)
{
	const char *wrong;
	int c;

	while ((c = getopt(argc, argv, "+b:cd:hk:l:m:nsu:vVx-:")) != -1)
		option(c);
	if (optind == argc)
		return;
	if (conf.listeners > 0 || conf.users != NULL || conf.check)
		die(2, "-c, -l and -u do not go with a COMMAND");
	conf.listen[0] = "127.0.0.1:0";
	conf.command_name = argv[optind];
	conf.command = argv + optind + 1;
	if (strcmp(conf.command_name, "terraform") == 0 ||
	    strcmp(conf.command_name, "tofu") == 0 ||
	    strcmp(conf.command_name, "terragrunt") == 0)
		die(2, "the state's name comes first: statesrv NAME %s init",
		    conf.command_name);
	if (optind + 1 == argc || argv[optind + 1][0] == '-')
		die(2, "%s: options come first, then a state's name, then a "
		    "COMMAND; see -h", conf.command_name);
	if ((wrong = name_wrong(conf.command_name)) != NULL)
		die(2, "%s: %s", conf.command_name, wrong);
}

/* Looks over the directory: removes temporary files of dead servers; an empty
 * one gets a .gitignore, so that nobody commits states by accident. Then says
 * on stdout where we listen; but the wrapper's stdout is its command's. */
static void
tidy_and_greet(bool created)
{
	struct walk w = { .sweep = true };
	char dir[PATH_MAX], how[32];
	int fd = -1;
	unsigned i;

	if (realpath(conf.dir, dir) == NULL)
		(void)snprintf(dir, sizeof(dir), "%s", conf.dir);
	scrub(dir);
	if (conf.command != NULL && (fd = name_file(conf.command_name, "",
	    STATE, O_RDONLY, NULL)) == -1 && errno == ENOENT)
		complain("no state %s in %s yet", conf.command_name, dir);
	close_quietly(fd);
	if (walk_names(&w, ".") == -1 || walk_names(&w, ".history") == -1 ||
	    walk_names(&w, ".tmp") == -1)
		complain("cannot list the states: %s", strerror(errno));
	else if (w.files == 0 && (fd = file_open(store.root, ".gitignore",
	    O_WRONLY | O_CREAT | O_EXCL, NULL)) != -1) {
		if (write_all(fd, "*\n", 2) == -1)
			(void)unlinkat(store.root, ".gitignore", 0);
		close_quietly(fd);
	}
	(void)snprintf(how, sizeof(how), created ? "created" : "%u state%s",
	    w.states, w.states == 1 ? "" : "s");
	for (i = 1; i < polled.base && conf.command == NULL; i++)
		(void)printf("statesrv: %s (%s) on %s\n", dir, how,
		    listeners[i - 1]);
	(void)fflush(stdout);
}

/* A terminal polls writable when one byte has room: without a reader it would
 * stop us. Opened anew it does not block, for us alone; another user's can be
 * opened as /dev/tty only (and not behind su -c, which has none). -v may wait,
 * and the wrapper's output is its command's. */
static void
terminal_open(void)
{
	const int how = O_WRONLY | O_NONBLOCK | O_NOCTTY;
	const char *name;
	int fd, tty;

	for (fd = 1; fd <= (conf.verbose ? 1 : 2); fd++) {
		if (conf.command != NULL || (name = ttyname(fd)) == NULL)
			continue;
		tty = open(name, how);
		if (tty == -1 && tcgetsid(fd) == getsid(0))
			tty = open("/dev/tty", how);
		if (tty != -1)
			(void)dup2(tty, fd);
		close_quietly(tty);
	}
}

int
main(int argc, char **argv)
{
	const struct rlimit none = { 0, 0 };
	bool created;
	int fd;

	do				/* 0 to 2 may be closed: take them */
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	close_quietly(fd);
	conf.program = argv[0];
	options(argc, argv);
	if (conf.check)
		return check(conf.listen[0]);
	terminal_open();
#ifdef M_ARENA_MAX
	(void)mallopt(M_ARENA_MAX, 1);	/* an arena a thread is a waste */
	(void)mallopt(M_TRIM_THRESHOLD, 4 << 20);
	(void)mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
	inherited.mask = umask(077);
	loop_start();
	if (conf.users == NULL)
		users_environment();
	else if (!users_read())
		exit(1);
	created = store_open();		/* sets fold, for the names' rules */
	if (conf.command != NULL && name_wrong(conf.command_name) != NULL)
		die(2, "%s: %s", conf.command_name,
		    name_wrong(conf.command_name));
	(void)ready_look(NULL);
	listeners_open();
	tidy_and_greet(created);
	if (conf.command != NULL)
		command_start();
	(void)pthread_sigmask(SIG_SETMASK, &(sigset_t){ 0 }, NULL);
	if (conf.verbose)
		complain("-v shows heads and bodies, with their secrets");
	(void)setrlimit(RLIMIT_CORE, &none);	/* it would hold secrets */
	sandbox();
	loop.now = clock_ms();
	/* A thread that still frees or prunes is not waited for. */
	while (loop.end == 0 || (stats.connections > 0 && loop.now < loop.end))
		loop_turn();
	while (polled.list.first != NULL)
		conn_close(polled.list.first, "the server stops");
	(void)log_flush(-1);
	if (conf.command != NULL)
		command_farewell();
	return loop.status;
}
