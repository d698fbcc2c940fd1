#!/usr/bin/env bash
# test.sh - what statesrv promises, tried out.
#
#	./test.sh                the whole suite, against two builds (make test)
#	./test.sh NAME...        only the tests whose names contain one of NAMEs
#	./test.sh list           the names
#	./test.sh crash ROUNDS   kill -9 under load, that many times
#	./test.sh fuzz SECONDS   each fuzzing harness for that long
#	./test.sh bench          ratios to nginx, in one interleaved run
#
# One function per behaviour, named as a sentence. Each runs alone, in an
# empty directory, as a subshell under set -e: the first command that fails
# fails it. A test that needs a tool calls need first, which says SKIP out
# loud when the tool is missing. After each test that started a server, the
# server must still answer and must have complained of nothing, unless the
# test says grumbles.
#
# STATESRV=FILE tests that binary and builds none.  JOBS=N runs N at a time.

# Functions are called by name, some arguments are optional, words in single
# quotes are for another shell, and a file's name is no reading of it:
# shellcheck disable=SC2317,SC2119,SC2120,SC2016,SC2094,SC2015

set -u
here=$(cd "$(dirname "$0")" && pwd)
: "${JOBS:=4}" "${PATIENCE:=20}"
unset TF_HTTP_ADDRESS TF_HTTP_USERNAME TF_HTTP_PASSWORD http_proxy HTTP_PROXY

# ---- the tools every test is written with --------------------------------

# need TOOL...: the test is skipped, aloud, where a tool is missing.
need() {
	local tool
	for tool; do
		command -v "$tool" >/dev/null || skip "no $tool here"
	done
}

skip() {
	echo "$*" >"$T/skipped"
	exit 77
}

# grumbles: this test provokes complaints on the server's stderr.
grumbles() {
	: >"$T/grumbles"
}

# fail WORDS: the test ends here, with what the server said last.
fail() {
	echo "FAILED: $*" >&2
	exit 1
}

# want WHAT EXPECTED GOT
want() {
	[ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
}

# has FILE PATTERN: an extended regular expression that must occur in it.
has() {
	grep -q -E -- "$2" "$1" || fail "no /$2/ in $1: $(head -c 600 "$1")"
}

hasnt() {
	! grep -q -E -- "$2" "$1" || fail "/$2/ in $1: $(head -c 600 "$1")"
}

# until_true COMMAND...: waits for it, PATIENCE seconds at most.
until_true() {
	local end=$((SECONDS + PATIENCE))
	until "$@"; do
		[ "$SECONDS" -lt "$end" ] || fail "waited in vain for: $*"
		sleep 0.02
	done
}

# serve [OPTION...]: a server on ./states and a port of the kernel's choice.
# Sets PID, PORT, URL. A second server: serve_as NAME [OPTION...], which
# writes NAME.log and NAME.err and sets the same three.
serve() {
	serve_as server -d states "$@"
}

serve_as() {
	local name=$1
	shift
	: >"$name.log"
	"$STATESRV" -l 127.0.0.1:0 "$@" >"$name.log" 2>"$name.err" &
	PID=$!
	echo "$PID" | tee -a "$T/servers" >>"$T/pids"
	until_true listening "$name"
	PORT=$(sed -n 's|.*listening on http://127.0.0.1:\([0-9]*\).*|\1|p' \
		"$name.log" | head -1)
	URL=http://127.0.0.1:$PORT
}

listening() {
	grep -q 'listening on' "$1.log" && return
	kill -0 "$PID" 2>/dev/null || fail "$1: $(cat "$1.err")"
	return 1
}

# halt [SIGNAL [PID]]: ends the server, sets STATUS to its exit status.
halt() {
	kill "-${1:-TERM}" "${2:-$PID}"
	STATUS=0
	wait "${2:-$PID}" 2>/dev/null || STATUS=$?
}

# ask METHOD PATH [BODY [CURL OPTION...]]: one request by curl. Sets STATUS
# (the HTTP status); the answer's body is in ./answer, its head in ./head.
# BODY is sent byte for byte; @FILE sends a file; '' sends none.
ask() {
	local method=$1 path=$2 body=${3-} how=(-X "$1")
	shift $(($# > 3 ? 3 : $#))
	[ "$method" != HEAD ] || how=(-I)
	[ -z "$body" ] || how+=(--data-binary "$body")
	: >answer
	STATUS=$(curl -sS --path-as-is -g -m "$PATIENCE" -o answer -D head \
		-w '%{http_code}' -H 'Expect:' "${how[@]}" "$@" "$URL$path") ||
		fail "curl $method $path: exit $?"
}

# expect STATUS METHOD PATH [BODY [CURL OPTION...]]: ask, and check.
expect() {
	local status=$1
	shift
	ask "$@"
	want "$1 $2" "$status" "$STATUS"
}

# info ID [WHO]: lock info as terraform sends it.
info() {
	printf '{"ID":"%s","Operation":"OperationTypeApply","Info":"","Who":"%s","Version":"1.11.4","Created":"2026-11-22T13:21:24.079813084Z","Path":""}' \
		"$1" "${2:-test@here}"
}

# state SERIAL [LINEAGE]: a small state as terraform writes it.
state() {
	printf '{\n  "version": 4,\n  "terraform_version": "1.11.4",\n  "serial": %s,\n  "lineage": "%s",\n  "outputs": {},\n  "resources": [],\n  "check_results": null\n}\n' \
		"$1" "${2:-3f7d1c7e-0000-4000-8000-000000000000}"
}

# raw [SECONDS]: stdin goes to the server byte for byte, what comes back
# before it closes (or the seconds are over) goes to stdout.
raw() {
	exec 9<>"/dev/tcp/127.0.0.1/$PORT" || return
	cat >&9
	timeout "${1:-$PATIENCE}" cat <&9 || :
	exec 9>&-
}

# raw_status: the status of the first answer to the bytes on stdin, which
# should end with a request that closes, or be wrong enough to be closed on.
raw_status() {
	raw "$@" | head -1 | cut -d ' ' -f 2
}
# ---- HTTP: what one request gets, and whether the connection lives on -----
#
# Most of it is tables. On the left of a line stand the statuses of all the
# answers, as a regular expression; on the right, after a tab, the bytes, in
# printf's notation with ~ for CR LF. A request that closes is sent right
# behind, so "400" says that the connection ended there, "200 200" that it
# lived on, and a third status would be a request that was smuggled in.

# cases [HEAD]: runs the table on stdin, HEAD before the bytes of each line.
# Each answer is dated (RFC 9110 6.6.1), and the last one says that it is the
# last (RFC 9112 9.6).
cases() {
	local status bytes got n=0 bad=0 last=GET
	last+=' /-/healthy HTTP/1.1~Host: localhost~Connection: close~~'
	local date='^Date: [A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} '
	date+='[0-9]{2}:[0-9]{2}:[0-9]{2} GMT.$'
	while IFS=$'\t' read -r status bytes; do
		case $status in '' | '#'*) continue ;; esac
		n=$((n + 1))
		bytes=${1-}$bytes$last
		printf '%b' "${bytes//'~'/'\r\n'}" | raw >answers
		got=$(statuses)
		if ! [[ $got =~ ^($status)$ ]]; then
			echo "expected $status, got $got: ${bytes:0:300}"
		elif [ "$(grep -a -c -E "$date" answers)" != \
			"$(wc -w <<<"${got#100 }")" ]; then
			echo "an answer without its date: ${bytes:0:300}"
		elif [ "$(grep -a -c '^Connection: close.$' answers)" != 1 ] &&
			[[ $bytes != *HTTP/1.0~* ]]; then
			echo "the last answer should say close, only it: ${bytes:0:300}"
		else
			continue
		fi
		bad=$((bad + 1))
	done
	[ "$n" -gt 0 ] || fail "an empty table"
	[ "$bad" = 0 ] || fail "$bad of $n cases"
}

# statuses: of all the answers in ./answers, in one line.
statuses() {
	grep -a -o 'HTTP/1\.[01] [0-9][0-9][0-9] ' answers | cut -c 10-12 |
		paste -s -d ' '
}

# served: a server that has a small state, x.
served() {
	serve
	expect 200 PUT /x '{"serial":1}'
}

# RFC 9112 2.3 and 3: method SP target SP version, each to the letter;
# methods are case-sensitive, and one that nobody knows is 501.
test_a_request_line_is_read_to_the_letter() {
	served
	cases <<'END'
# single spaces, nothing before, between or behind
200 200	GET /x HTTP/1.1~Host: localhost~~
400	GET  /x HTTP/1.1~Host: localhost~~
400	GET /x  HTTP/1.1~Host: localhost~~
400	GET /x HTTP/1.1 ~Host: localhost~~
400	 GET /x HTTP/1.1~Host: localhost~~
400	GET\t/x HTTP/1.1~Host: localhost~~
400	GET /x\tHTTP/1.1~Host: localhost~~
400	GET /x\x0bHTTP/1.1~Host: localhost~~
400	GET /x y HTTP/1.1~Host: localhost~~
400	GET HTTP/1.1~Host: localhost~~
400	GET  HTTP/1.1~Host: localhost~~
400	/x HTTP/1.1~Host: localhost~~
400	GET /x~Host: localhost~~
400	GET /x ~Host: localhost~~
400	GET~Host: localhost~~
400	   ~Host: localhost~~
400	GET /x HTTP/1.1\rHost: localhost~~
400	GET /x HTTP/1.1\r~Host: localhost~~
400	GET /x HTTP/1.1\nHost: localhost~~
400	GET /x HTTP/1.1\nHost: localhost\n\n
400	GET\x00 /x HTTP/1.1~Host: localhost~~
400	\x80\x81\x82\x83~~
# empty lines before it (RFC 9112 2.2): one at least, not without end
200 200	~GET /x HTTP/1.1~Host: localhost~~
200 200|400	~~~GET /x HTTP/1.1~Host: localhost~~
200 200|400	\nGET /x HTTP/1.1~Host: localhost~~
400	\rGET /x HTTP/1.1~Host: localhost~~
400	 ~GET /x HTTP/1.1~Host: localhost~~
200 200 200	GET /x HTTP/1.1~Host: localhost~~~GET /x HTTP/1.1~Host: localhost~~
# versions: 1.x is 1.1, other majors are 505, other spellings are not HTTP
200 200	GET /x HTTP/1.2~Host: localhost~~
200 200	GET /x HTTP/1.9~Host: localhost~~
505	GET /x HTTP/2.0~Host: localhost~~
505	GET /x HTTP/3.0~Host: localhost~~
505	GET /x HTTP/9.9~Host: localhost~~
505|400	GET /x HTTP/0.9~Host: localhost~~
505|400	PRI * HTTP/2.0~~SM~~
400	GET /x HTTP/1~Host: localhost~~
400	GET /x HTTP/1.~Host: localhost~~
400	GET /x HTTP/.1~Host: localhost~~
400	GET /x HTTP/11~Host: localhost~~
400	GET /x HTTP/1.10~Host: localhost~~
400	GET /x HTTP/01.1~Host: localhost~~
400	GET /x HTTP/1.01~Host: localhost~~
400	GET /x HTTP/1.1x~Host: localhost~~
400	GET /x HTTP/1,1~Host: localhost~~
400	GET /x HTTP/1 .1~Host: localhost~~
400	GET /x HTTP /1.1~Host: localhost~~
400	GET /x HTTP/+1.1~Host: localhost~~
400	GET /x http/1.1~Host: localhost~~
400	GET /x HTTPS/1.1~Host: localhost~~
400	GET /x HTTP/A.B~Host: localhost~~
400	GET /x XTTP/1.1~Host: localhost~~
400	GET /x FTP/1.1~Host: localhost~~
# methods: tokens, case-sensitive
501( 200)?	get /x HTTP/1.1~Host: localhost~~
501( 200)?	Get /x HTTP/1.1~Host: localhost~~
501( 200)?	PATCH /x HTTP/1.1~Host: localhost~~
501( 200)?	TRACE /x HTTP/1.1~Host: localhost~~
501( 200)?	PROPFIND /x HTTP/1.1~Host: localhost~~
501( 200)?	G /x HTTP/1.1~Host: localhost~~
501( 200)?	GETT /x HTTP/1.1~Host: localhost~~
501( 200)?	LOCKS /x HTTP/1.1~Host: localhost~~
501( 200)?	UNLOC /x HTTP/1.1~Host: localhost~~
501( 200)?	X-$!#%&'*+.^_`| /x HTTP/1.1~Host: localhost~~
501( 200)?|40[05]	CONNECT localhost:80 HTTP/1.1~Host: localhost:80~~
400	G(T /x HTTP/1.1~Host: localhost~~
400	GE:T /x HTTP/1.1~Host: localhost~~
400	"GET" /x HTTP/1.1~Host: localhost~~
400	G\xc3\x89T /x HTTP/1.1~Host: localhost~~
400	{} /x HTTP/1.1~Host: localhost~~
END
}

# RFC 9112 3.2: a path, a URL, or for OPTIONS the star; RFC 3986 2.1 and 3.3:
# what a path is made of. What is decoded is decoded once.
test_the_target_is_a_path_a_url_or_a_star() {
	served
	cases <<'END'
200 200	GET http://localhost/x HTTP/1.1~Host: localhost~~
200 200	GET HTTP://LocalHost:8080/x HTTP/1.1~Host: localhost:8080~~
200 200	GET http://127.0.0.1/x?a=b HTTP/1.1~Host: 127.0.0.1~~
200 200	GET http://localhost HTTP/1.1~Host: localhost~~
200 200	GET http://localhost?a=b HTTP/1.1~Host: localhost~~
200 200	GET http://localhost/x HTTP/1.0~Connection: keep-alive~~
# the URL's host counts, not the field's (3.2.2); the field is still needed
200 200|40[03]	GET http://localhost/x HTTP/1.1~Host: other.example~~
40[03]( 200)?	GET http://other.example/x HTTP/1.1~Host: localhost~~
400	GET http://localhost/x HTTP/1.1~~
400	GET http:///x HTTP/1.1~Host: localhost~~
400	GET http:/x HTTP/1.1~Host: localhost~~
400	GET http://u:p@localhost/x HTTP/1.1~Host: localhost~~
400	GET http://localhost:x/x HTTP/1.1~Host: localhost~~
400	GET http://localhost\\x HTTP/1.1~Host: localhost~~
400	GET ftp://localhost/x HTTP/1.1~Host: localhost~~
400	GET localhost/x HTTP/1.1~Host: localhost~~
400	GET x HTTP/1.1~Host: localhost~~
400	GET ?x HTTP/1.1~Host: localhost~~
400	GET %2Fx HTTP/1.1~Host: localhost~~
400	GET .. HTTP/1.1~Host: localhost~~
# the star is for OPTIONS only, and alone
204 200	OPTIONS * HTTP/1.1~Host: localhost~~
204 200	OPTIONS /x HTTP/1.1~Host: localhost~~
400	GET * HTTP/1.1~Host: localhost~~
400	OPTIONS *x HTTP/1.1~Host: localhost~~
400	OPTIONS ** HTTP/1.1~Host: localhost~~
# bytes that no URL has
400	GET /x#y HTTP/1.1~Host: localhost~~
400	GET /x\x00 HTTP/1.1~Host: localhost~~
400	GET /x\x01 HTTP/1.1~Host: localhost~~
400	GET /x\x7f HTTP/1.1~Host: localhost~~
400	GET /x?\x00 HTTP/1.1~Host: localhost~~
400	GET /\xc3\xa9 HTTP/1.1~Host: localhost~~
400	GET /x?\xff HTTP/1.1~Host: localhost~~
# escapes: two digits, decoded once, in the path as in the ID
200 200	GET /%78 HTTP/1.1~Host: localhost~~
200 200	GET /x.tfstate HTTP/1.1~Host: localhost~~
200 200	GET /x? HTTP/1.1~Host: localhost~~
200 200	GET /x?a=b&c HTTP/1.1~Host: localhost~~
404 200	GET /%2578 HTTP/1.1~Host: localhost~~
400( 200)?	GET /% HTTP/1.1~Host: localhost~~
400( 200)?	GET /%7 HTTP/1.1~Host: localhost~~
400( 200)?	GET /%7g HTTP/1.1~Host: localhost~~
400( 200)?	GET /%%78 HTTP/1.1~Host: localhost~~
400( 200)?	GET /%u0078 HTTP/1.1~Host: localhost~~
400( 200)?	GET /%+8 HTTP/1.1~Host: localhost~~
400( 200)?	GET /x%00 HTTP/1.1~Host: localhost~~
400( 200)?	GET /x%0d%0a HTTP/1.1~Host: localhost~~
400( 200)?	GET /x%0aX:%20y HTTP/1.1~Host: localhost~~
400( 200)?	PUT /x?ID=%zz HTTP/1.1~Host: localhost~Content-Length: 2~~{}
400( 200)?	GET //x HTTP/1.1~Host: localhost~~
400( 200)?	GET ///etc/passwd HTTP/1.1~Host: localhost~~
END
}

# RFC 9112 3.2, RFC 9110 7.2: Host once, and well formed.
test_host_is_given_once_and_well_formed() {
	served
	cases <<'END'
200 200	GET /x HTTP/1.1~Host: localhost~~
200 200	GET /x HTTP/1.1~Host:localhost~~
200 200	GET /x HTTP/1.1~hOST: \t localhost \t ~~
200 200	GET /x HTTP/1.1~Host: LOCALHOST:80~~
200 200	GET /x HTTP/1.1~Host: 127.0.0.1:65535~~
200 200	GET /x HTTP/1.1~Host: [::1]~~
200 200	GET /x HTTP/1.1~Host: [::1]:8080~~
200 200|400	GET /x HTTP/1.1~Host: localhost:~~
200 200	GET /x HTTP/1.0~Connection: keep-alive~~
400	GET /x HTTP/1.1~~
400	GET /x HTTP/1.1~X: y~~
400	GET /x HTTP/1.1~Host: localhost~Host: localhost~~
400	GET /x HTTP/1.1~Host: localhost~Host: other.example~~
400	GET /x HTTP/1.1~Host: localhost~X: y~host:~~
400	GET /x HTTP/1.0~Host: localhost~Host: localhost~~
40[03]	GET /x HTTP/1.1~Host:~~
400	GET /x HTTP/1.1~Host: local host~~
400	GET /x HTTP/1.1~Host: localhost, localhost~~
40[03]( 200)?	GET /x HTTP/1.1~Host: localhost,other.example~~
400	GET /x HTTP/1.1~Host: u@localhost~~
400	GET /x HTTP/1.1~Host: localhost/~~
400	GET /x HTTP/1.1~Host: localhost/x~~
400	GET /x HTTP/1.1~Host: localhost?x~~
400	GET /x HTTP/1.1~Host: localhost#x~~
400	GET /x HTTP/1.1~Host: http://localhost~~
400	GET /x HTTP/1.1~Host: localhost\\x~~
400	GET /x HTTP/1.1~Host: localhost:x~~
400	GET /x HTTP/1.1~Host: localhost:-1~~
400	GET /x HTTP/1.1~Host: localhost:80:80~~
400	GET /x HTTP/1.1~Host: :80~~
400	GET /x HTTP/1.1~Host: [::1~~
400	GET /x HTTP/1.1~Host: [::1]x~~
400	GET /x HTTP/1.1~Host: []~~
400	GET /x HTTP/1.1~Host: ::1~~
400	GET /x HTTP/1.1~Host: "localhost"~~
400	GET /x HTTP/1.1~Host: <localhost>~~
400	GET /x HTTP/1.1~Host: local\xc3\xa9host~~
400	GET /x HTTP/1.1~Host: %~~
400	GET /x HTTP/1.1~Host: localhost%4~~
400	GET /x HTTP/1.1~Host: h%zz~~
# a name that some page's owner may point at us (DNS rebinding)
403( 200)?	GET /x HTTP/1.1~Host: other.example~~
403( 200)?	GET /x HTTP/1.1~Host: localhost.other.example~~
403( 200)?	GET /x HTTP/1.1~Host: 127.0.0.1.other.example~~
END
}

# RFC 9112 5, RFC 9110 5.5 and 5.6.2: names are tokens, right before a colon;
# values have no control bytes; lines end in CR LF and are never folded.
test_a_field_line_has_one_reading() {
	served
	cases <<'END'
200 200	GET /x HTTP/1.1~Host: localhost~X: y~~
200 200	GET /x HTTP/1.1~Host: localhost~X:~~
200 200	GET /x HTTP/1.1~Host: localhost~X: \t ~~
200 200	GET /x HTTP/1.1~Host: localhost~X: a\tb: c~~
200 200	GET /x HTTP/1.1~Host: localhost~X: \x80\xc3\xa9\xff~~
200 200	GET /x HTTP/1.1~Host: localhost~!#$%&'*+-.^_`|\x7e09Az: y~~
200 200	GET /x HTTP/1.1~X: y~X: y~Host: localhost~~
400	GET /x HTTP/1.1~Host : localhost~~
400	GET /x HTTP/1.1~Host\t: localhost~~
400	GET /x HTTP/1.1~Host: localhost~X : y~~
400	GET /x HTTP/1.1~Host: localhost~: y~~
400	GET /x HTTP/1.1~Host: localhost~X y: z~~
400	GET /x HTTP/1.1~Host: localhost~X~~
400	GET /x HTTP/1.1~Host: localhost~X=y~~
400	GET /x HTTP/1.1~ Host: localhost~~
400	GET /x HTTP/1.1~ ~Host: localhost~~
400	GET /x HTTP/1.1~\tX: y~Host: localhost~~
# folded (5.2)
400	GET /x HTTP/1.1~Host: localhost~ X: y~~
400	GET /x HTTP/1.1~Host: localhost~X: y~ z~~
400	GET /x HTTP/1.1~Host: localhost~X: y~\tz~~
400	GET /x HTTP/1.1~Host: localhost~X:~ y~~
400	GET /x HTTP/1.1~Host:~ localhost~~
400	GET /x HTTP/1.1~Host: localhost~X: y~ ~~
# not tokens
400	GET /x HTTP/1.1~Host: localhost~X(: y~~
400	GET /x HTTP/1.1~Host: localhost~[X]: y~~
400	GET /x HTTP/1.1~Host: localhost~X@: y~~
400	GET /x HTTP/1.1~Host: localhost~X/Y: y~~
400	GET /x HTTP/1.1~Host: localhost~"X": y~~
400	GET /x HTTP/1.1~Host: localhost~X\x00: y~~
400	GET /x HTTP/1.1~Host: localhost~X\x7f: y~~
400	GET /x HTTP/1.1~Host: localhost~X\xc3\xab: y~~
# not values
400	GET /x HTTP/1.1~Host: localhost~X: a\x00b~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x01b~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x08b~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x0bb~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x0cb~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x1bb~~
400	GET /x HTTP/1.1~Host: localhost~X: a\x7fb~~
# not lines
400	GET /x HTTP/1.1~Host: localhost~X: a\rb~~
400	GET /x HTTP/1.1~Host: localhost~X: a\r~~
400	GET /x HTTP/1.1~Host: localhost~X: a\r\r\n~
400	GET /x HTTP/1.1~Host: localhost~X: a\nY: b~~
400	GET /x HTTP/1.1~Host: localhost\nX: a~~
400	GET /x HTTP/1.1~Host: localhost\n\n
400	GET /x HTTP/1.1~Host: localhost~\n
400	GET /x HTTP/1.1~Host: localhost~\r\r\n
400	GET /x HTTP/1.1~Host: localhost~\n~
END
}

# RFC 9110 8.6, RFC 9112 6.3: digits, once, without overflow. What is legal
# and yet read in two ways by others may be refused.
test_a_content_length_is_digits_given_once() {
	served
	cases <<'END'
200 200	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~~{}
200 200	PUT /y HTTP/1.1~Host: localhost~content-LENGTH:2~~{}
200 200	PUT /y HTTP/1.1~Host: localhost~Content-Length: \t2 \t ~~{}
200 200	PUT /y HTTP/1.1~Host: localhost~Content-Length: 3~~{}\x20
200 200|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 02~~{}
200 200|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0000000000000000000000002~~{}
200 200|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Content-Length: 2~~{}
200 200|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2, 2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Content-Length: 3~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 3~Content-Length: 2~~{}\x20
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~X: y~content-length: 02~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2, 3~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2,~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2;2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2 2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 1 2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length:~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: +2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: -2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: -0~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0x2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0o2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2.0~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2e0~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2a~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: a~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: "2"~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2_0~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: \x0b2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2\x00~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: \xef\xbc\x92~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length : 2~~{}
400	PUT /y HTTP/1.1~Host: localhost~Content-Length:~ 2~~{}
# 2^63, 2^64 - 1, 2^64 + 2, and worse
413|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 4294967298~~{}
413|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 9223372036854775808~~{}
413|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 18446744073709551615~~{}
413|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 18446744073709551618~~{}
413|400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 99999999999999999999999999~~{}
413|400	GET /x HTTP/1.1~Host: localhost~Content-Length: 18446744073709551616~~
# no length at all: no body (6.3), which is nothing to store
411( 400)?	PUT /y HTTP/1.1~Host: localhost~~{}
411( 200)?	PUT /y HTTP/1.1~Host: localhost~~
411( 200)?	POST /y HTTP/1.1~Host: localhost~~
411( 400)?	PUT /y HTTP/1.1~Host: localhost~Content_Length: 2~~{}
411( 400)?	PUT /y HTTP/1.1~Host: localhost~Content-Length-X: 2~~{}
400( 200)?	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0~~
END
}

# RFC 9112 6.1 and 7: chunked and nothing else, once, and never beside a
# length or in HTTP/1.0.
test_a_transfer_coding_is_chunked_and_alone() {
	served
	cases <<'END'
200 200	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~2~{}~0~~
200 200	PUT /y HTTP/1.1~Host: localhost~TRANSFER-ENCODING:CHUNKED~~2~{}~0~~
200 200	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: \tchunked ~~2~{}~0~~
200 200|400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked,~~2~{}~0~~
200 200|400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: , chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~Content-Length: 12~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 12~Transfer-Encoding: chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0~Transfer-Encoding: chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Transfer-Encoding: identity~~{}
400|501	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Transfer-Encoding: xchunked~~{}
400|501	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Transfer-Encoding:~~{}
400	PUT /y HTTP/1.0~Host: localhost~Transfer-Encoding: chunked~~2~{}~0~~
400	PUT /y HTTP/1.0~Connection: keep-alive~Transfer-Encoding: chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding : chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding:~ chunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~Transfer-Encoding: chunked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~Transfer-Encoding: identity~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: identity~transfer-encoding: chunked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked, chunked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked, identity~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: gzip, chunked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: gzip~~{}
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: identity~~{}
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunkedx~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: xchunked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chun ked~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked;q=1~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: "chunked"~~2~{}~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding:~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: \x0bchunked~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked\x0c~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked\x00~~2~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~X: y\rTransfer-Encoding: chunked~~2~{}~0~~
411( 400)?	PUT /y HTTP/1.1~Host: localhost~Transfer_Encoding: chunked~~{}
END
}

# RFC 9112 7.1: hexadecimal sizes, CR LF after each, extensions ignored,
# trailers read and dropped; the numbers do not overflow.
test_chunks_are_read_to_the_letter() {
	served
	local head='PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~'
	cases "$head" <<'END'
200 200	2~{}~0~~
200 200	1~{~1~}~0~~
200 200	00000002~{}~0000~~
200 200	a~{"a":"bc"}~0~~
200 200	A~{"a":"bc"}~0~~
200 200	0A~{"a":"bc"}~0~~
400( 200)?	0~~
# extensions (7.1.1)
200 200	2;x~{}~0;y~~
200 200	2;x=y~{}~0~~
200 200	2;x=y;z="a;b"~{}~0~~
200 200	2 ; x = y~{}~0~~
200 200	2\t;x~{}~0 ;y~~
400	2 x~{}~0~~
400	2 2~{}~0~~
400	2;~{}~0~~
400	2;;x~{}~0~~
400	2;=x~{}~0~~
400	2;x=\x00~{}~0~~
400	2;x\ny~{}~0~~
400	2;x\ry~{}~0~~
# trailers (7.1.2), which change nothing any more
200 200	2~{}~0~X: y~~
200 200	2~{}~0~X: y~Y: z~~
200 200|400	2~{}~0~Content-Length: 5~~
200 200|400	2~{}~0~Transfer-Encoding: chunked~~
200 200|400	2~{}~0~Host: other.example~~
200 200|400	2~{}~0~Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==~~
400	2~{}~0~X : y~~
400	2~{}~0~X~~
400	2~{}~0~: y~~
400	2~{}~0~X: y~ z~~
400	2~{}~0~X: \x00~~
400	2~{}~0~X: y\n~
400	2~{}~0~\n
400	2~{}~0\n~
# sizes that are none
400	0x2~{}~0~~
400	+2~{}~0~~
400	-2~{}~0~~
400	 2~{}~0~~
400	2 ~{}~0~~
400	\t2~{}~0~~
400	2_0~{}~0~~
400	g~{}~0~~
400	2h~{}~0~~
400	;x~{}~0~~
400	~{}~0~~
400	~2~{}~0~~
400	{}
# ends that are none, sizes that lie
400	2\n{}~0~~
400	2\r{}~0~~
400	2\r\r\n{}~0~~
400	2~{}\n0~~
400	2~{}\r0~~
400	2~{}0~~
400	2~{} ~0~~
400	2~{}~~0~~
400	1~{}~0~~
400	3~{}~0~~
400	2~{}~00x~~
# sizes that wrap around: 2^64 + 2, 2^63 + 2, -1
413|400	10000000000000002~{}~0~~
413|400	8000000000000002~{}~0~~
413|400	FFFFFFFFFFFFFFFF~{}~0~~
413|400	FFFFFFFFFFFFFFFFFFFFFFFF~{}~0~~
# more than -m, known before the first byte of it has come
413	20000000~
END
	# Without bound they would be a way to keep us busy for nothing.
	local long
	for long in "2;$(printf 'x%.0s' {1..40000})~{}~0~~" \
		"$(printf '0%.0s' {1..40000})2~{}~0~~" \
		"2~{}~0~X: $(printf 'x%.0s' {1..40000})~~" \
		"2~{}~0~$(printf 'X: y~%.0s' {1..400})~"; do
		printf '400|413|431\t%s\n' "$long"
	done >table
	cases "$head" <table
}

# What looks like a second request inside the first one's body, or inside
# what only one of two parsers takes for a body (RFC 9112 11.2), is no request.
test_no_request_hides_in_another() {
	served
	local hidden='DELETE /x HTTP/1.1~Host: localhost~~' n=39
	sed "s|%HIDDEN|$hidden|g; s|%N|$n|g; s|%H|$(printf %x "$n")|g" >table \
		<<'END'
# bodies that mean nothing are read and dropped, or refused
200 200|400	GET /x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
200 200|400	HEAD /x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
204 200|400	OPTIONS /x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
404 200|40[04]	GET /none HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
200 200|400	GET / HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
200 200|400	GET /x HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~%H~%HIDDEN~0~~
405( 200)?|400	PUT / HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
501( 200)?|400	PATCH /x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
501( 200)?|400	TRACE /x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
400( 200)?	PUT /../x HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
400( 200)?	PUT /y HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
400( 200)?	LOCK /y HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
200 200|40[09]( 200)?	UNLOCK /y HTTP/1.1~Host: localhost~Content-Length: %N~~%HIDDEN
200 200|400	GET /x HTTP/1.1~Host: localhost~Connection: Upgrade~Upgrade: h2c~Content-Length: %N~~%HIDDEN
40[03]( 200)?	GET /x HTTP/1.1~Host: other.example~Content-Length: %N~~%HIDDEN
417( 200)?	PUT /x HTTP/1.1~Host: localhost~Expect: more~Content-Length: %N~~%HIDDEN
# CL.TE, TE.CL, TE.TE, CL.0, 0.CL
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 44~Transfer-Encoding: chunked~~0~~%HIDDEN
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~Content-Length: 4~~%H~%HIDDEN~0~~
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~Transfer-encoding: cow~~0~~%HIDDEN
400|501	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: cow~Transfer-Encoding: chunked~~0~~%HIDDEN
400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 5~Transfer-Encoding : chunked~~0~~%HIDDEN
400	GET /x HTTP/1.1~Host: localhost~Content-Length: %N~Content-Length: 0~~%HIDDEN
400	GET /x HTTP/1.1~Host: localhost~X: y\nContent-Length: %N~~%HIDDEN
400	GET /x HTTP/1.1~Host: localhost~ Content-Length: %N~~%HIDDEN
400	GET /x HTTP/1.1~Host: localhost~X: y\r~%HIDDEN
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~2;\n%HIDDEN~{}~0~~
400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~0\n~%HIDDEN
END
	cases <table
	want "the state that was not to be deleted" '{"serial":1}' \
		"$(cat states/x.tfstate)"
	expect 404 GET /y
}

# RFC 9110 10.1.1 and 7.6.1, RFC 9112 9.3 and 9.6: expectations, and the
# tokens of Connection, whatever their case and place in the list.
test_a_connection_lives_until_one_side_says_close() {
	served
	cases <<'END'
200	GET /x HTTP/1.1~Host: localhost~Connection: close~~
200	GET /x HTTP/1.1~Host: localhost~Connection: CLOSE~~
200	GET /x HTTP/1.1~Host: localhost~Connection: keep-alive, close~~
200	GET /x HTTP/1.1~Host: localhost~Connection: x,close,y~~
200	GET /x HTTP/1.1~Host: localhost~Connection: , close ,~~
200	GET /x HTTP/1.1~Host: localhost~Connection: keep-alive~Connection: close~~
200	PUT /y HTTP/1.1~Host: localhost~Connection: close~Content-Length: 2~~{}
404	GET /none HTTP/1.1~Host: localhost~Connection: close~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection: keep-alive~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection: closed~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection: not-close~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection:~~
200 200	GET /x HTTP/1.1~Host: localhost~X-Connection: close~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection: Upgrade~Upgrade: websocket~~
200 200	GET /x HTTP/1.1~Host: localhost~Connection: Upgrade, HTTP2-Settings~Upgrade: h2c~HTTP2-Settings: AAMAAABk~~
404 200	GET /none HTTP/1.1~Host: localhost~~
404 200	DELETE /none HTTP/1.1~Host: localhost~~
405 200	DELETE / HTTP/1.1~Host: localhost~~
# HTTP/1.0 closes unless asked, and knows no 100
200	GET /x HTTP/1.0~~
200	GET /x HTTP/1.0~Host: localhost~~
200	GET /x HTTP/1.0~Connection: close~~
	200	GET /x HTTP/1.0~Connection: close, keep-alive~~
200	GET /x HTTP/1.0~Connection: close~Connection: keep-alive~~
200 200	GET /x HTTP/1.0~Connection: Keep-Alive~~
200 200	GET /x HTTP/1.0~Connection: x, keep-alive~~
200	PUT /y HTTP/1.0~Content-Length: 2~~{}
200 200	PUT /y HTTP/1.0~Connection: keep-alive~Content-Length: 2~~{}
200	PUT /y HTTP/1.0~Expect: 100-continue~Content-Length: 2~~{}
411	PUT /y HTTP/1.0~~{}
# expectations
(100 )?200 200	PUT /y HTTP/1.1~Host: localhost~Expect: 100-continue~Content-Length: 2~~{}
(100 )?200 200	PUT /y HTTP/1.1~Host: localhost~Expect: 100-Continue~Content-Length: 2~~{}
200 200	GET /x HTTP/1.1~Host: localhost~Expect: 100-continue~~
417( 200)?	GET /x HTTP/1.1~Host: localhost~Expect: miracle~~
417( 200)?	GET /x HTTP/1.1~Host: localhost~Expect: 100-continue, miracle~~
417( 200)?	PUT /y HTTP/1.1~Host: localhost~Expect: 200-ok~Content-Length: 2~~{}
400( 200)?	PUT /../y HTTP/1.1~Host: localhost~Expect: 100-continue~Content-Length: 2~~{}
405( 200)?	PUT / HTTP/1.1~Host: localhost~Expect: 100-continue~Content-Length: 2~~{}
# what we do not do, and say nothing about
200 200	GET /x HTTP/1.1~Host: localhost~Range: bytes=0-1~~
200 200	GET /x HTTP/1.1~Host: localhost~TE: trailers~Accept-Encoding: gzip~~
END
	# A 1.0 client that asked to stay is told that it may (9.3).
	printf 'GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n' |
		raw | sed '/^.$/q' >answers
	has answers '^Connection: [Kk]eep-[Aa]live'
}

# RFC 9110 15.5.15, RFC 6585 5: a head has at most 16 KiB, 100 fields, and a
# target of 8 KiB; right below each bound all is well.
test_heads_beyond_the_limits_are_refused() {
	served
	local a
	a=$(head -c 40000 /dev/zero | tr '\0' a)
	{
		printf '200 200\tGET /x?%s HTTP/1.1~Host: localhost~~\n' "${a:0:8000}"
		printf '414\tGET /x?%s HTTP/1.1~Host: localhost~~\n' \
			"${a:0:8200}" "${a:0:17000}" "$a"
		printf '414\tGET http://localhost/%s HTTP/1.1~Host: localhost~~\n' "$a"
		printf '200 200\tGET /x HTTP/1.1~Host: localhost~X: %s~~\n' \
			"${a:0:16000}"
		printf '431\tGET /x HTTP/1.1~Host: localhost~X: %s~~\n' \
			"${a:0:16400}" "$a"
		printf '431|400\tGET /x HTTP/1.1~Host: localhost~%s: y~~\n' "$a"
		printf '200 200\tGET /x HTTP/1.1~Host: localhost~%s~\n' \
			"$(printf 'X: y~%.0s' {1..99})"
		printf '431\tGET /x HTTP/1.1~Host: localhost~%s~\n' \
			"$(printf 'X: y~%.0s' {1..100})" \
			"$(printf 'X: y~%.0s' {1..1000})" \
			"$(printf 'X: y~%.0s' {1..10000})"
		printf '400|414|431|501\t%s /x HTTP/1.1~Host: localhost~~\n' "$a"
		printf '400|414|431|505\tGET /x HTTP/%s~Host: localhost~~\n' "$a"
		printf '400|431\tGET /x HTTP/1.1~Host: %s~~\n' "$a"
		printf '400|414|431\t%s\n' "$a" "$(tr a '~' <<<"$a")" \
			"$(tr a ' ' <<<"$a")"
	} >table
	cases <table
}

# 413 beyond -m, before the body is sent where its length is given, else as
# soon as it is too long; at the bound it is stored. LOCK has 64 KiB.
test_bodies_beyond_the_limits_are_refused() {
	serve -m 1
	{ printf '{"a":"'; head -c $((1048576 - 8)) /dev/zero | tr '\0' a
		printf '"}'; } >fits
	{ cat fits; printf ' '; } >over
	expect 200 PUT /x @fits
	cmp fits states/x.tfstate
	expect 200 PUT /y @fits -H 'Transfer-Encoding: chunked'
	cmp fits states/y.tfstate
	expect 413 PUT /x @over
	has answer .
	expect 413 POST /x @over
	expect 413 PUT /z @over -H 'Transfer-Encoding: chunked'
	expect 404 GET /z
	cmp fits states/x.tfstate
	want "before the body" 413 "$(printf 'PUT /x HTTP/1.1\r\n%s\r\n%s\r\n\r\n' \
		'Host: localhost' 'Content-Length: 1048577' | raw_status)"
	{ info me; head -c 70000 /dev/zero | tr '\0' ' '; } >long
	expect 400 LOCK /x @long
	expect 400 LOCK /x @long -H 'Transfer-Encoding: chunked'
	expect 200 PUT /x '{}'
}

# RFC 9110 15.5.6 and 9.3.7: a known method in the wrong place is told what
# is right there; OPTIONS says the same without a complaint, or a body.
test_a_wrong_method_is_told_the_right_ones() {
	served
	local url method kind wrong allowed status
	while read -r kind url; do
		wrong='' allowed='DELETE GET HEAD LOCK OPTIONS POST PUT UNLOCK'
		if [ "$kind" = page ]; then
			wrong='POST PUT DELETE LOCK UNLOCK' allowed='GET HEAD OPTIONS'
		fi
		for method in OPTIONS $wrong; do
			status=405
			[ "$method" != OPTIONS ] || status=204
			expect "$status" "$method" "$url"
			want "Allow of $method $url" "$allowed" "$(sed -n \
				's/^Allow: \(.*\).$/\1/p' head | tr ',' '\n' |
				tr -d ' ' | sort | paste -s -d ' ')"
		done
		ask OPTIONS "$url"
		hasnt head '^Content-Length:'
		want "body of OPTIONS $url" 0 "$(stat -c %s answer)"
	done <<'END'
state /x
state /none
state /a/b
lock /x/lock
lock /terraform_lock/x
page /
page /-/healthy
page /-/ready
page /-/metrics
page /-/versions/x
page /-/versions/x/20260101T000000.000Z-1
page /-/changes/x
page /-/log/x
END
}

# RFC 9110 9.3.2: the head of GET, and not one byte more.
test_head_is_get_without_the_body() {
	served
	local url
	for url in /x /none / /-/healthy /-/versions/x /-/log/x '/..'; do
		ask GET "$url"
		grep -v -i '^date:' head >wanted
		ask HEAD "$url"
		grep -v -i '^date:' head >got
		cmp wanted got
	done
	printf 'HEAD /%s HTTP/1.1\r\nHost: localhost\r\n\r\n' x none x >bytes
	printf 'HEAD / HTTP/1.0\r\n\r\n' >>bytes
	raw <bytes >answers
	want statuses '200 404 200 200' "$(statuses)"
	! grep -a -v -E '^(HTTP/1\.1 [0-9]{3} .*|[A-Z][A-Za-z-]*: .*|).$' answers ||
		fail "more than a head"
}

# RFC 9110 10.1.1: "100 Continue" when, and only when, the body will be read.
test_100_continue_is_said_only_when_the_body_will_be_read() {
	serve -m 1
	expect 200 LOCK /locked "$(info me)"
	local line url length status
	while read -r status url length; do
		exec 8<>"/dev/tcp/127.0.0.1/$PORT"
		printf 'PUT %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n%s %s\r\n\r\n' \
			"$url" 'Expect: 100-continue' 'Content-Length:' "$length" >&8
		read -r -t "$PATIENCE" line <&8
		want "PUT $url, $length bytes" "$status" "$(cut -d ' ' -f 2 <<<"$line")"
		if [ "$status" = 100 ]; then
			read -r -t "$PATIENCE" line <&8
			want "what follows 100" $'\r' "$line"
			printf '{}' >&8
			read -r -t "$PATIENCE" line <&8
			want "after the body" 200 "$(cut -d ' ' -f 2 <<<"$line")"
		fi
		exec 8>&-
	done <<'END'
100 /x 2
423 /locked 2
100 /locked?ID=me 2
423 /locked?ID=you 2
409 /x?ID=other 2
413 /x 1048577
400 /../x 2
405 /-/healthy 2
END
	# No body, no leave to send it.
	for line in 'GET /x HTTP/1.1' 'UNLOCK /x HTTP/1.1' \
		'PUT /x HTTP/1.1\r\nContent-Length: 0'; do
		printf '%b\r\nHost: localhost\r\n%s\r\n%s\r\n\r\n' "$line" \
			'Expect: 100-continue' 'Connection: close' | raw >answers
		hasnt answers '^HTTP/1.1 100'
	done
	# curl waits a second for it, and then sends unasked.
	curl -sS -X PUT --data-binary "$(state 7)" -H 'Expect: 100-continue' \
		-D head "$URL/x"
	has head '^HTTP/1.1 100'
	has head '^HTTP/1.1 200'
}

# DESIGN, PROTOCOL 8: TLS at the plain port. Without a quick answer terraform
# waits 33 seconds and then speaks of a handshake timeout.
test_a_tls_hello_gets_a_plain_answer() {
	serve
	local hello
	for hello in '\x16' '\x16\x03\x01\x02\x00\x01' \
		"\\x16\\x03\\x01$(printf '\\xff%.0s' {1..600})"; do
		printf '%b' "$hello" | raw >answers
		has answers '^HTTP/1\.0 400 '
	done
	# Behind a whole request it is an error like any other.
	printf 'GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n\x16\x03\x01' |
		raw >answers
	want statuses '200 400' "$(statuses)"
	need openssl
	openssl s_client -connect "127.0.0.1:$PORT" </dev/null >tls 2>&1 || :
	has tls 'wrong version number|packet length|http request'
	expect 200 GET /-/healthy
}

# ---- HTTP: how the bytes come ---------------------------------------------

# wire HOW <bytes >answers: what bash's /dev/tcp cannot do.
#	split	each split in two, one connection each; the first part is read
#		by the server before the second is sent. One answer is printed,
#		after "same", or the two that differ
#	drip	byte by byte, each read before the next is sent
#	half	all of it, then no more (shutdown)
#	blind	all of it before anything is read, whatever the server says
#	reset	all of it, and a reset once the server has read it
#	bite	all of it, a reset after the first bytes of the answer
wire() {
	[ -x wire.bin ] || "${CC:-cc}" -o wire.bin -x c - <<'END'
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 16, ANSWER = 1 << 20 };
static unsigned port;

static int
dial(void)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	to.sin_port = htons((in_port_t)port);
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
		perror("connect");
		exit(1);
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
	return fd;
}

/* How much the server has not read yet, connections not accepted too. */
static bool
unread(void)
{
	FILE *f = fopen("/proc/net/tcp", "r");
	unsigned local, queue;
	char line[512];
	bool found = false;

	while (f != NULL && fgets(line, sizeof line, f) != NULL)
		if (sscanf(line, "%*d: %*8x:%x %*8x:%*x %*x %*8x:%x",
		    &local, &queue) == 2 && local == port && queue > 0)
			found = true;
	if (f != NULL)
		fclose(f);
	return found;
}

static void
put(int fd, const char *bytes, size_t n)
{
	ssize_t sent;

	for (; n > 0; bytes += sent, n -= (size_t)sent)
		if ((sent = send(fd, bytes, n, MSG_NOSIGNAL)) <= 0)
			return;		/* refused early: the answer says why */
}

/* All there is to read; its dates are made alike. */
static size_t
take(int fd, char *answer)
{
	size_t n = 0;
	ssize_t got;
	char *d;

	while (n < ANSWER - 1 &&
	    (got = read(fd, answer + n, ANSWER - 1 - n)) > 0)
		n += (size_t)got;
	answer[n] = '\0';
	for (d = answer; (d = strstr(d, "\r\nDate: ")) != NULL; d += 8)
		memset(d + 8, 'D', strcspn(d + 8, "\r"));
	close(fd);
	return n;
}

static void
cut(int fd)
{
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 },
	    sizeof(struct linger));
	close(fd);
}

static int
split(const char *bytes, size_t n)
{
	static char whole[ANSWER], parts[ANSWER];
	int fd[BATCH];
	size_t at, i, batch, len, got;

	put(fd[0] = dial(), bytes, n);
	len = take(fd[0], whole);
	for (at = 1; at < n; at += batch) {
		batch = n - at < BATCH ? n - at : BATCH;
		for (i = 0; i < batch; i++)
			put(fd[i] = dial(), bytes, at + i);
		while (unread())
			usleep(1000);
		for (i = 0; i < batch; i++)
			put(fd[i], bytes + at + i, n - at - i);
		for (i = 0; i < batch; i++) {
			got = take(fd[i], parts);
			if (got == len && memcmp(parts, whole, len) == 0)
				continue;
			printf("split at %zu:\n%s\ninstead of:\n%s\n", at + i,
			    parts, whole);
			return 1;
		}
	}
	printf("same\n%s", whole);
	return 0;
}

int
main(int argc, char **argv)
{
	static char answer[ANSWER];
	char *bytes = NULL;
	size_t n = 0, cap = 0, i;
	ssize_t got = 1;
	int fd;

	for (; got > 0 && argc == 3; n += (size_t)got) {
		if (cap - n < 4096)
			bytes = realloc(bytes, cap = cap * 2 + 65536);
		got = read(0, bytes + n, cap - n);
	}
	port = (unsigned)atoi(argv[2]);
	if (strcmp(argv[1], "split") == 0)
		return split(bytes, n);
	fd = dial();
	if (strcmp(argv[1], "drip") == 0) {
		for (i = 0; i < n; i++) {
			put(fd, bytes + i, 1);
			while (unread())
				usleep(100);
		}
	} else {
		put(fd, bytes, n);
	}
	if (strcmp(argv[1], "half") == 0)
		shutdown(fd, SHUT_WR);
	if (strcmp(argv[1], "reset") == 0) {
		while (unread())
			usleep(1000);
		cut(fd);
	} else if (strcmp(argv[1], "bite") == 0) {
		(void)!read(fd, answer, 1000);
		cut(fd);
	} else {
		fwrite(answer, 1, take(fd, answer), stdout);
	}
	return 0;
}
END
	./wire.bin "$1" "$PORT"
}

# descriptors: how many the server has open. connected N: true when it holds N
# connections, its listener aside. swept: true when no upload is left.
descriptors() {
	find "/proc/$PID/fd" -mindepth 1 | wc -l
}

connected() {
	[ "$(find "/proc/$PID/fd" -lname 'socket:*' | wc -l)" = $(($1 + 1)) ]
}

swept() {
	[ -z "$(find states/.tmp -type f)" ]
}

# requests: one file a kind of request, in requests/, each ending in one that
# closes, with the statuses of its answers on the first line.
requests() {
	local name status bytes
	mkdir requests
	while IFS=$'\t' read -r name status bytes; do
		printf '%b' "${bytes//'~'/'\r\n'}" >"requests/$name"
		echo "$status" >"requests/$name.status"
	done <<'END'
get	200	GET /x?a=b HTTP/1.1~Host: localhost~Connection: close~~
url	200	GET http://localhost/%78 HTTP/1.1~Host: localhost~Connection: close~~
list	200	GET / HTTP/1.1~Host: localhost~Accept: application/json~Connection: close~~
put	200	~PUT /y HTTP/1.1~Host: localhost~Connection: close~Content-Length: 14~~{"serial": 42}
md5	200	POST /y HTTP/1.1~Host: localhost~Connection: close~Content-MD5: mZFLkyvTelC5g8XnyQrpOw==~Content-Length: 2~~{}
chunked	200	PUT /y HTTP/1.1~Host: localhost~Connection: close~Transfer-Encoding: chunked~~5;a="b"~{"ser~9~ial": 43}~0;c~D: e~F: g~~
empty	200	UNLOCK /y HTTP/1.1~Host: localhost~Connection: close~Transfer-Encoding: chunked~~0~~
lock	200	LOCK /z HTTP/1.1~Host: localhost~Connection: close~Content-Length: 12~~{"ID":"abc"}
three	200 404 200	HEAD /x HTTP/1.1~Host: localhost~~GET /none HTTP/1.1~Host: localhost~~GET /x HTTP/1.0~~
old	200	GET /x HTTP/1.0~~
version	505	GET /x HTTP/2.0~Host: localhost~~
colon	400	GET /x HTTP/1.1~Host: localhost~X : y~~
twice	400	PUT /y HTTP/1.1~Host: localhost~Content-Length: 2~Content-Length: 3~~{}
json	400	PUT /y HTTP/1.1~Host: localhost~Connection: close~Content-Length: 5~~[1,2]
md5-wrong	400	PUT /y HTTP/1.1~Host: localhost~Connection: close~Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==~Content-Length: 2~~{}
chunk-bad	400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~2~{}x~0~~
held	423	PUT /held HTTP/1.1~Host: localhost~Connection: close~Content-Length: 5~~[1,2]
name	400	GET /%2e%2e/x HTTP/1.1~Host: localhost~Connection: close~~
none	404	GET /none HTTP/1.1~Host: localhost~Connection: close~~
END
}

# Wherever the packets are cut, the answer is the same, byte for byte.
test_every_split_of_a_request_gets_the_same_answer() {
	need "${CC:-cc}"
	served
	expect 200 LOCK /held "$(info me)"
	requests
	local name
	for name in requests/*[!s]; do
		wire split <"$name" >answers ||
			fail "${name##*/}: $(head -c 1500 answers)"
		want "${name##*/}" "$(cat "$name.status")" "$(statuses)"
	done
}

# The slowest split of all.
test_a_request_may_come_byte_by_byte() {
	need "${CC:-cc}"
	served
	requests
	local name
	for name in get put chunked three; do
		wire drip <"requests/$name" >answers
		want "$name" "$(cat "requests/$name.status")" "$(statuses)"
	done
}

# RFC 9112 9.3.2: pipelined requests are answered in their order, though
# writes go through other threads and reads do not.
test_a_thousand_requests_in_one_packet_are_answered_in_order() {
	serve
	local i body
	for i in {0..9}; do
		expect 200 PUT "/s$i" "{\"serial\":$i}"
	done
	for i in {1..1000}; do
		body='{"serial":'$((i * 7 % 10))'}'
		if [ $((i % 50)) = 0 ]; then
			printf 'PUT /s%d HTTP/1.1\r\nHost: localhost\r\n%s: %d\r\n\r\n%s' \
				$((i * 7 % 10)) Content-Length ${#body} "$body"
			echo "" >&3
		else
			printf 'GET /s%d HTTP/1.1\r\nHost: localhost\r\n\r\n' \
				$((i * 7 % 10))
			echo $((i * 7 % 10)) >&3
		fi
	done >bytes 3>order.wanted
	printf 'GET /none HTTP/1.0\r\n\r\n' >>bytes
	raw <bytes >answers
	want answers 1001 "$(statuses | wc -w)"
	sed -n '/^$/d; s/^{"serial":\([0-9]\)}.*/\1/p' answers >order
	grep . order.wanted | cmp - order
}

# A write and a read of it in one packet: the read sees the write.
test_a_get_behind_a_put_in_one_packet_sees_it() {
	serve
	local i
	for i in {10..40}; do
		printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s%s' \
			'Content-Length: 13' "{\"serial\":$i}" \
			$'GET /x HTTP/1.0\r\n\r\n' | raw >answers
		want statuses '200 200' "$(statuses)"
		has answers "^\\{\"serial\":$i\\}"
	done
	# The whole of an apply in one packet, and a refusal behind it.
	{
		printf 'LOCK /y HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s' \
			'Content-Length: 10' '{"ID":"a"}'
		printf 'POST /y?ID=a HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s' \
			'Content-Length: 12' '{"serial":1}'
		printf 'GET /y HTTP/1.1\r\nHost: localhost\r\n\r\n'
		printf 'UNLOCK /y HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s' \
			'Content-Length: 10' '{"ID":"a"}'
		printf 'POST /y?ID=a HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s' \
			'Content-Length: 12' '{"serial":2}'
		printf 'DELETE /y HTTP/1.1\r\nHost: localhost\r\n\r\n'
		printf 'GET /y HTTP/1.1\r\nHost: localhost\r\n\r\n'
		printf 'nonsense\r\n\r\n'
	} | raw >answers
	want 'an apply' '200 200 200 200 409 200 404 400' "$(statuses)"
}

# A client that has said all may close its side and still read (RFC 9112 9.6).
test_a_request_is_answered_after_a_half_close() {
	need "${CC:-cc}"
	served
	local big=/big
	{ printf '{"a":"'; head -c 3000000 /dev/zero | tr '\0' a
		printf '"}'; } >body
	expect 200 PUT "$big" @body
	printf 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n' | wire half >answers
	want get 200 "$(statuses)"
	has answers serial
	printf 'PUT /y HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n{}' \
		'Content-Length: 2' | wire half >answers
	want put 200 "$(statuses)"
	printf 'GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n' x none x |
		wire half >answers
	want three '200 404 200' "$(statuses)"
	printf 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n' | wire half >answers
	# Half a request and no more to come: nothing was asked.
	printf 'GET /x HTTP/1.1\r\nHost: loc' | wire half >answers
	[[ "$(statuses)" =~ ^(400|408|)$ ]] || fail "half a head: $(statuses)"
	printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n{' \
		'Content-Length: 2' | wire half >answers
	[[ "$(statuses)" =~ ^(400|408|)$ ]] || fail "half a body: $(statuses)"
	printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n2\r\n{}\r\n' \
		'Transfer-Encoding: chunked' | wire half >answers
	[[ "$(statuses)" =~ ^(400|408|)$ ]] || fail "no last chunk: $(statuses)"
	want "the state" '{"serial":1}' "$(cat states/x.tfstate)"
}

# PEERS 7, 26: a client that resets in the middle of a body or an answer
# leaves the old state, no upload, no open file, and no trace in the log of
# complaints.
test_a_reset_leaves_nothing_behind() {
	need "${CC:-cc}"
	serve
	local before i chunks
	{ printf '{"a":"'; head -c 8000000 /dev/zero | tr '\0' a
		printf '"}'; } >body
	expect 200 PUT /x @body
	expect 200 GET /x
	until_true connected 0
	before=$(descriptors)
	printf -v chunks '%x\r\n' 4000000
	for i in 1 2 3 4 5; do
		{ printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n' \
			'Content-Length: 8000000'; head -c $((i * 900000)) body; } |
			wire reset
		{ printf 'PUT /y HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s' \
			'Transfer-Encoding: chunked' "$chunks"
			head -c $((i * 700000)) body; } | wire reset
		printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n{"a' \
			'Content-Length: 8000' | wire reset
		printf 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n' | wire bite
		printf 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n' | wire reset
		printf 'GET /x HTTP/1.1\r\nHost: loc' | wire reset
		wire reset </dev/null
	done
	until_true connected 0
	until_true swept
	want descriptors "$before" "$(descriptors)"
	cmp body states/x.tfstate
	expect 404 GET /y
	want "files" ./x.log,./x.tfstate, \
		"$(cd states && find . -type f ! -path './.*' | sort | tr '\n' ,)"
}

# PROTOCOL 8: closing on a client that is still sending resets the connection
# before it reads why; so what was refused is answered, and drained a while.
test_an_early_refusal_is_read_by_a_client_still_sending_40_mb() {
	need "${CC:-cc}"
	serve -m 38
	expect 200 LOCK /locked "$(info me)"
	head -c 40000000 /dev/zero | tr '\0' ' ' >body
	local url status
	while read -r status url; do
		[ "$url" = /x ] || head -c 39000000 /dev/zero | tr '\0' ' ' >body
		{ printf 'PUT %s HTTP/1.1\r\nHost: localhost\r\n%s %d\r\n\r\n' "$url" \
			'Content-Length:' "$(stat -c %s body)"; cat body; } |
			wire blind >answers
		want "blind PUT $url" "$status" "$(statuses)"
		{ printf 'PUT %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%x\r\n' \
			"$url" 'Transfer-Encoding: chunked' "$(stat -c %s body)"
			cat body; printf '\r\n0\r\n\r\n'; } | wire blind >answers
		want "blind chunked PUT $url" "$status" "$(statuses)"
		expect "$status" PUT "$url" @body
		has answer .
	done <<'END'
413 /x
423 /locked
409 /y?ID=gone
400 /..
405 /
END
}

# ---- HTTP: clients that mean no good --------------------------------------

# hold N [BYTES]: N more connections, BYTES (as printf's %b) sent on each,
# kept open in HELD; an answer is never read. let_go: ends them all.
HELD=()
hold() {
	local i fd
	trap '' PIPE
	for ((i = 0; i < $1; i++)); do
		exec {fd}<>"/dev/tcp/127.0.0.1/$PORT"
		HELD+=("$fd")
		[ -z "${2-}" ] || printf '%b' "$2" >&"$fd" || :
	done
}

let_go() {
	local fd
	for fd in ${HELD+"${HELD[@]}"}; do
		exec {fd}>&-
	done
	HELD=()
}

# room N: the test needs descriptors for N connections on either side.
room() {
	local most
	most=$(ulimit -H -n)
	[ "$most" = unlimited ] || [ "$most" -ge $(($1 + 200)) ] ||
		skip "only $most descriptors here"
	ulimit -S -n $(($1 + 200))
}

# memory: what the server has resident, in KiB; sanitizers keep what is freed
# and have no say in it. ticks: its processor time so far.
memory() {
	awk '/^VmRSS/ { print $2 }' "/proc/$PID/status"
}

sanitized() {
	grep -q __asan_init "$STATESRV"
}

grew() {
	local now
	now=$(memory)
	sanitized || [ $((now - $1)) -le "$2" ] ||
		fail "memory grew from $1 to $now KiB, not by $2 at most"
}

ticks() {
	awk '{ print $14 + $15 }' "/proc/$PID/stat"
}

# big MIB: a state of that size, in ./body.
big() {
	{ printf '{"a":"'; head -c $(($1 * 1048576)) /dev/zero | tr '\0' a
		printf '"}'; } >body
}

# DESIGN: an idle connection holds no buffer, is looked at seldom, and costs
# nothing: five percent of a processor for a thousand would be too much.
# Afterwards memory and descriptors are what they were.
test_a_thousand_idle_connections_cost_nothing() {
	room 1100
	served
	local before kib from
	hold 100 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	expect 200 GET /x
	let_go
	until_true connected 0
	before=$(descriptors) kib=$(memory)
	hold 500
	hold 500 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	until_true connected 1000
	expect 200 GET /x
	grew "$kib" 4096
	from=$(ticks)
	sleep 3		# the span that is measured
	[ $(($(ticks) - from)) -le $((3 * $(getconf CLK_TCK) / 20)) ] ||
		fail "$(($(ticks) - from)) ticks in 3 seconds, and all idle"
	expect 200 PUT /x '{"serial":2}'
	let_go
	until_true connected 0
	want descriptors "$before" "$(descriptors)"
	grew "$kib" 1024
}

# RFC 9112 9.6: to close with bytes unread resets the connection, and takes
# what is still on its way along. An empty line too many is enough for that.
test_a_last_answer_is_whole_though_bytes_follow_the_request() {
	served
	local head
	big 4
	expect 200 PUT /big @body
	for head in 'HTTP/1.0\r\n' \
		'HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'; do
		{
			printf 'GET /big %b\r\n' "$head"
			sleep 0.1
			printf '\r\n'
			sleep 0.1
		} | raw >answers
		tail -c "$(wc -c <body)" answers >rest
		same body rest
	done
	# a refusal, too, whose body was read and whose next bytes were not
	{
		printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
		printf 'Content-Length: 100005\r\n\r\nwrong%0*d\r\n' 100000 0
	} | raw >answers
	want "the refusal" 400 "$(statuses)"
}

# What nobody reads waits in its file, not in the memory that all connections
# of the machine share (promise 8).
test_an_unread_answer_waits_in_its_file() {
	served
	local port
	[ -r /proc/net/tcp ] || skip 'no /proc/net/tcp'
	big 8
	expect 200 PUT /big @body
	hold 5 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	port=$(printf '0100007F:%04X' "$PORT")
	queues() { # bytes of each answer that the kernel has; read at one go,
		# for the table of all connections of the machine moves
		local state queue
		grep -F " $port " /proc/net/tcp >lines || :
		while read -r _ _ _ state queue _; do
			[ "$state" != 01 ] || echo $((16#${queue%%:*}))
		done <lines | sort -n
	}
	waiting() { [ "$(queues | tail -1)" -gt 0 ]; }
	until_true waiting
	for _ in {1..50}; do
		[ "$(queues | tail -1)" -lt 1000000 ] || fail "$(queues)"
		sleep 0.02
	done
	let_go
}

# Half a head, half a body, answers that nobody reads: each holds a bounded
# piece of memory, nobody else waits, and nothing stays behind.
test_slow_clients_stall_nobody() {
	room 400
	served
	local before kib i
	big 8
	expect 200 PUT /big @body
	expect 200 GET /big
	until_true connected 0
	before=$(descriptors) kib=$(memory)
	hold 100 'GET /x HTTP/1.1\r\nHost: loc'
	hold 50 'PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{'
	hold 50 'PUT /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{'
	hold 50 'PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n{'
	hold 50 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	hold 50 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n\x00'
	for i in {2..9}; do
		expect 200 PUT /x "{\"serial\":$i}"
		expect 200 GET /x
		want body "{\"serial\":$i}" "$(cat answer)"
	done
	expect 200 GET /big
	cmp body answer
	expect 200 PUT /big '{}'
	grew "$kib" 16384
	# Who began to read the old state gets the old state, whole (promise 2).
	i=${HELD[250]}
	printf 'GET /none HTTP/1.0\r\n\r\n' >&"$i"
	timeout "$PATIENCE" cat <&"$i" >answers
	want "the slow reader" '200 404' "$(statuses)"
	[ "$(stat -c %s answers)" -gt "$(stat -c %s body)" ] || fail "cut short"
	let_go
	until_true connected 0
	until_true swept
	want descriptors "$before" "$(descriptors)"
	grew "$kib" 8192
}

# One client that asks without end, and one that never reads either, leave
# the others their turn, and do not fill the memory.
test_a_flood_of_requests_leaves_the_others_their_turn() {
	served
	local kib i
	kib=$(memory)
	for i in 1 2 3; do
		exec 8<>"/dev/tcp/127.0.0.1/$PORT"
		yes $'GET /x HTTP/1.1\r\nHost: localhost\r\n\r' >&8 2>/dev/null &
		echo $! >>"$T/pids"
		[ "$i" = 3 ] || cat <&8 >/dev/null &
		echo $! >>"$T/pids"
		exec 8>&-
	done
	for i in {1..20}; do
		expect 200 PUT /x "{\"serial\":$i}"
		expect 200 GET /x
	done
	grew "$kib" 4096
}

# hasty [-DNAME=VALUE...]: the next serve takes a build whose deadlines are a
# second, or what is given.
hasty() {
	need "${CC:-cc}"
	"${CC:-cc}" -std=c11 -w -O1 -pthread -DIDLE_MS=1000 -DHEAD_MS=1000 \
		-DBODY_MS=1000 -DREPLY_MS=1000 -DDRAIN_MS=1000 "$@" \
		-o hasty "$here/statesrv.c"
	# shellcheck disable=SC2030,SC2031
	STATESRV=./hasty
}

# trickle BYTES COUNT: that many bytes at a time, ten times a second.
trickle() {
	local i piece
	printf -v piece '%*s' "$1" ''
	for ((i = 0; i < $2; i++)); do
		printf '%s' "$piece" || return 0
		sleep 0.1
	done
}

# slowly: as raw, for a stdin that takes its time: it is read meanwhile.
slowly() {
	exec 8<>"/dev/tcp/127.0.0.1/$PORT"
	cat <&0 >&8 2>/dev/null &
	echo $! >>"$T/pids"
	timeout "$PATIENCE" cat <&8 || :
	exec 8>&-
}

# PEERS 20: every wait has an end, which single bytes do not push away: for a
# head, a body, a reader, a refused client, and between requests. A body that
# comes at 1 KiB/s may take its time.
test_every_wait_for_a_client_has_an_end() {
	hasty
	served
	local head='PUT /y HTTP/1.1\r\nHost: localhost\r\n'
	printf 'GET /x HTT' | raw >answers
	want 'half a head' 408 "$(statuses)"
	{ printf 'GET /x HTTP/1.1\r\nX: y'; trickle 1 40; } | slowly >answers
	want 'a trickled head' 408 "$(statuses)"
	printf '%bContent-Length: 9\r\n\r\n{' "$head" | raw >answers
	want 'half a body' 408 "$(statuses)"
	printf '%bTransfer-Encoding: chunked\r\n\r\n9\r\n{' "$head" |
		raw >answers
	want 'half a chunk' 408 "$(statuses)"
	{ printf '%bContent-Length: 999\r\n\r\n{' "$head"; trickle 1 40; } |
		slowly >answers
	want 'a trickled body' 408 "$(statuses)"
	printf '' | raw >answers
	want 'an idle connection' '' "$(cat answers)"
	printf 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n' | raw >answers
	want 'one that is idle again' 200 "$(statuses)"
	{ printf '%bContent-Length: 50002\r\n\r\n{' "$head"; trickle 2500 20
		printf '}GET /none HTTP/1.0\r\n\r\n'; } | slowly >answers
	want 'a body in its time' '200 404' "$(statuses)"
	big 16
	expect 200 PUT /big @body
	hold 5 '\x16'
	hold 5 'PUT /.. HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n'
	hold 5 'PUT /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n'
	until_true connected 0
	until_true swept
	# A good start is no credit for hours of silence.
	{ printf '%bContent-Length: 9999999\r\n\r\n{' "$head"
		trickle 1000000 5; } | slowly >answers
	want 'a body that stalls' 408 "$(statuses)"
	hold 5 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	until_true connected 0
	let_go
}

# When all slots are taken, the connection that is idle for longest makes
# room; one that is in the middle of something does not.
test_when_all_slots_are_taken_the_idlest_makes_room() {
	room 200
	hasty -DSLOTS_MAX=16 -DIDLE_MS=60000 -DBODY_MS=60000
	served
	local busy idle last line
	hold 1 'PUT /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{'
	busy=${HELD[0]}
	hold 1
	idle=${HELD[1]}
	hold 100 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	last=${HELD[101]}
	expect 200 GET /x
	timeout "$PATIENCE" cat <&"$idle" >answers ||
		fail "the idlest lives on"
	want 'what the idlest was told' '' "$(cat answers)"
	printf '}' >&"$busy"
	read -r -t "$PATIENCE" line <&"$busy"
	want 'the busy one' $'HTTP/1.1 200 OK\r' "$line"
	printf 'GET /none HTTP/1.0\r\n\r\n' >&"$last"
	timeout "$PATIENCE" cat <&"$last" >answers
	want 'the last to come' '200 404' "$(statuses)"
	[ "$(descriptors)" -lt 80 ] || fail "$(descriptors) descriptors"
	let_go
	until_true connected 0
}

# Out of descriptors: accepting rests instead of spinning, those who are
# served stay served, and room is made for who comes.
test_running_out_of_descriptors_does_not_spin() {
	need prlimit
	room 400
	grumbles
	served
	local from limit before
	until_true connected 0
	before=$(descriptors)
	limit=$((before + 12))
	prlimit --pid "$PID" --nofile="$limit:$limit"
	hold 100
	expect 200 GET /-/healthy
	from=$(ticks)
	sleep 2		# the span that is measured
	[ $(($(ticks) - from)) -le $((2 * $(getconf CLK_TCK) / 4)) ] ||
		fail "$(($(ticks) - from)) ticks in 2 seconds, and all idle"
	expect 200 GET /-/healthy
	let_go
	until_true connected 0
	expect 200 PUT /x '{"serial":2}'
	want descriptors "$before" "$(descriptors)"
}

# Where the limit is low from the start, the connections leave enough for the
# files: what is asked on one of them can still be done.
test_connections_leave_descriptors_for_the_files() {
	room 400
	printf '#!/bin/sh\nulimit -n 64\nexec "%s" "$@"\n' "$STATESRV" >limited
	chmod +x limited
	# shellcheck disable=SC2030,SC2031
	STATESRV=./limited
	served
	hold 200
	expect 200 GET /x
	expect 200 PUT /x '{"serial":2}'
	expect 200 LOCK /x '{"ID":"me"}'
	expect 200 GET /x/lock
	let_go
	until_true connected 0
	expect 200 UNLOCK /x '{"ID":"me"}'
}

# ---- names: from a URL to a file, and to no other ------------------------

# DESIGN, "On disk": what a name may be, and where it lies.
test_a_name_is_a_path_below_the_directory() {
	serve
	local url file long seg200 n=0
	printf -v seg200 'a%.0s' {1..200}
	long=$seg200/$seg200/$seg200/$seg200/${seg200:0:196}
	while read -r url file; do
		n=$((n + 1))
		expect 200 PUT "$url" "{\"at\":$n}"
		want "the file of $url" "{\"at\":$n}" \
			"$(cat "states/$file.tfstate")"
		expect 200 GET "$url"
		want "GET $url" "{\"at\":$n}" "$(cat answer)"
		expect 200 LOCK "$url" '{"ID":"me"}'
		want "the lock of $url" '{"ID":"me"}' "$(cat "states/$file.lock")"
		expect 200 UNLOCK "$url" '{"ID":"me"}'
	done <<END
/a a
/a.tfstate a
/%61 a
/a/b a/b
/a%2Fc a/c
/a%2fd.tfstate a/d
/1/2/3/4/5/6/7/8 1/2/3/4/5/6/7/8
/terraform_state/t t
/terraform_state/t/u t/u
/lock/x lock/x
/locks locks
/a.b.c a.b.c
/a..b a..b
/a. a.
/a- a-
/a~ a~
/%7E ~
/a%20b a b
/a+b a+b
/%2578 %78
/%252e%252e%252fx %2e%2e%2fx
/%C3%A9 é
/%F0%9F%94%92 🔒
/*%3F%22%27%24(x)%3B& *?"'\$(x);&
/tfstate tfstate
/log log
/x.tfstate.bak x.tfstate.bak
/$seg200 $seg200
/$long $long
END
}

# PEERS 15, 16, 17: no spelling leads out of the directory, onto our own
# files, or two names to one file; by no method, and in no dialect.
test_a_bad_name_is_refused_before_anything_is_opened() {
	serve
	local url method long seg201
	printf -v seg201 'a%.0s' {1..201}
	printf -v long '/%s' "${seg201:1}"{,,,} "${seg201:0:197}"
	mkdir outside
	echo '{"out":"side"}' >outside/x.tfstate
	echo '{"ID":"them"}' >outside/x.lock
	: >before
	find . ! -path './states/*' ! -name answer ! -name head | sort >before
	while read -r url; do
		for method in GET PUT DELETE LOCK UNLOCK; do
			case $method in
			GET) ask GET "$url" ;;
			*LOCK) ask "$method" "$url" '{"ID":"them"}' ;;
			*) ask "$method" "$url" '{"ID":"them"}' ;;
			esac
			want "$method $url" 400 "$STATUS"
			[ "$(wc -l <answer)" = 1 ] || fail "one line, not $(cat answer)"
		done
	done <<END
/..
/.
/../outside/x
/./outside/x
/a/../../outside/x
/a/..
/a/.
/a/./b
/%2e%2e/outside/x
/%2E%2E%2Foutside%2Fx
/.%2e/outside/x
/..%2foutside/x
/a%2f..%2f..%2foutside%2fx
/..%5coutside%5cx
/a%5cb
/..%00/outside/x
/x%00
/x%00.tfstate
/a%01b
/a%0ab
/a%0d
/a%09b
/a%1b%5b2J
/a%7fb
/%c0%ae%c0%ae/outside/x
/%c0%af
/%e0%80%ae%e0%80%ae/outside/x
/%f0%80%80%ae
/%c3
/%c3%28
/%e2%82
/%ed%a0%80
/%f4%90%80%80
/%f8%88%80%80%80
/%ff
/%80
/.x
/.guard
/.tmp/x
/.history/x/y
/a/.b
/%2ehidden
/-x
/a/-x
/%2dx
/x.lock
/x.log
/x.lock.tfstate
/x.log.tfstate
/x.tfstate.tfstate
/x.lock/y
/x.log/y
/x.tfstate/y
/.tfstate
/a/.tfstate
//
//a
/a//b
/a/
/%2f
/%2fa
/a%2f
/lock
/lock/lock
/a/lock/lock
/../lock
/terraform_state/
/terraform_state/..
/terraform_state/%2e%2e%2foutside%2fx
/terraform_lock/../outside/x
/terraform_lock/
/1/2/3/4/5/6/7/8/9
/$seg201
/a/$seg201
$long
END
	find . ! -path './states/*' ! -name answer ! -name head | sort | cmp - before
	want "in the directory" "" "$(find states -type f ! -name .guard)"
	want "outside" '{"out":"side"}' "$(cat outside/x.tfstate)"
	for url in versions log changes; do
		expect 400 GET "/-/$url/../outside/x"
		expect 400 GET "/-/$url/%2e%2e%2foutside%2fx"
		expect 400 GET "/-/$url/.tmp"
		ask GET "/-/$url/x/..%2f..%2f..%2foutside%2fx"
		[[ $STATUS =~ ^40[04]$ ]] || fail "an ID that climbs: $STATUS"
		ask GET "/-/$url/x/../../../outside/x.tfstate"
		[[ $STATUS =~ ^40[04]$ ]] || fail "an ID that climbs: $STATUS"
	done
}

# No symbolic link is followed, neither at the end of a path nor on its way:
# what it points to is neither read nor written, nor taken for "no state".
test_no_symbolic_link_is_followed() {
	grumbles
	serve
	local name
	mkdir -p outside/dir states/.history/hist outside/hist
	echo '{"out":"side"}' | tee outside/s.tfstate outside/dir/x.tfstate
	echo '{"ID":"them"}' >outside/s.lock
	ln -s "$PWD/outside/s.tfstate" states/file.tfstate
	ln -s ../outside/none states/dangling.tfstate
	ln -s "$PWD/outside/dir" states/dir
	ln -s "$PWD/outside/none" states/gone
	ln -s loop states/loop
	ln -s "$PWD/outside/none" states/held.lock
	ln -s "$PWD/outside/s.lock" states/theirs.lock
	ln -s "$PWD/outside/log" states/logged.log
	rmdir states/.history/hist
	ln -s "$PWD/outside/hist" states/.history/hist
	find outside -type f -exec md5sum {} + >before
	for name in file dangling dir/x gone/x loop/x; do
		ask GET "/$name"
		[[ $STATUS =~ ^50[0-9]$ ]] || fail "GET $name: $STATUS"
		hasnt answer side
		ask LOCK "/$name" '{"ID":"me"}'
		ask PUT "/$name?ID=me" '{"serial":1}'
		ask UNLOCK "/$name" '{"ID":"me"}'
		ask DELETE "/$name"
	done
	for name in held theirs; do
		ask LOCK "/$name" '{"ID":"me"}'
		[ "$STATUS" != 200 ] || fail "LOCK $name, whose lock is a link"
		ask PUT "/$name" '{"serial":1}'
		[ "$STATUS" != 200 ] || fail "PUT $name, whose lock is a link"
		ask UNLOCK "/$name" '{"ID":"them"}'
	done
	for name in logged hist; do
		ask PUT "/$name" '{"serial":1}'
		ask PUT "/$name" '{"serial":2}'
		ask GET "/-/log/$name"
		ask GET "/-/versions/$name"
	done
	expect 200 GET /
	hasnt answer 'side|them'
	find outside -type f -exec md5sum {} + | cmp - before
	want "new files outside" "" "$(find outside -newer before -type f)"
	expect 200 PUT /fine '{}'
}

# A FIFO, a directory, a socket where a file should be: nothing hangs, and
# nothing is taken for "no state" or for "not locked".
test_what_is_no_file_is_no_state_and_no_lock() {
	grumbles
	serve
	local kind name
	mkfifo states/fifo.tfstate states/fifo2.lock states/fifo3.log
	mkdir states/dir.tfstate states/dir2.lock states/dir3.log
	: >states/empty.tfstate
	for name in fifo dir empty; do
		expect 500 GET "/$name"
		ask LOCK "/$name" '{"ID":"me"}'
		ask PUT "/$name?ID=me" '{"serial":1}'
		ask UNLOCK "/$name" '{"ID":"me"}'
		ask GET "/-/versions/$name"
		ask DELETE "/$name"
	done
	for kind in fifo dir; do
		ask LOCK "/${kind}2" '{"ID":"me"}'
		[ "$STATUS" != 200 ] || fail "LOCK, and the .lock is a $kind"
		ask PUT "/${kind}2" '{"serial":1}'
		[ "$STATUS" != 200 ] || fail "PUT, and the .lock is a $kind"
		ask GET "/${kind}2/lock"
		ask UNLOCK "/${kind}2" '{"ID":"me"}'
		ask PUT "/${kind}3" '{"serial":1}'
		ask GET "/-/log/${kind}3"
	done
	# A plain file in the place of a directory.
	echo >states/plain
	ask GET /plain/x
	[[ $STATUS =~ ^(404|50[0-9])$ ]] || fail "GET below a file: $STATUS"
	ask PUT /plain/x '{}'
	[ "$STATUS" != 200 ] || fail "PUT below a file"
	expect 200 GET / '' -H 'Accept: application/json'
	expect 200 PUT /fine '{}'
	expect 200 GET /fine
}

# ---- the pure parts: parser, chunks, JSON, names, digests ------------------
#
# A C program that includes the server's source. All input lies in blocks of
# exactly its size, so that the sanitizers see a byte read too far.

# with_source: C that includes the server, its main aside, and then stdin.
with_source() {
	printf '#define main statesrv_main\n#include "%s/statesrv.c"\n' "$here"
	cat <<'END'
#undef main

/* A copy in a block of its own that ends where the bytes do. */
static char *
exact(const void *data, size_t len)
{
	char *copy = malloc(len);

	if (len > 0)
		memcpy(copy, data, len);
	return copy;
}
END
	cat
}

units_source() {
	with_source <<'END'

static unsigned bad, checks;

/* What failed, and on what bytes. */
static void
must(bool ok, const char *what, const char *data, size_t len)
{
	checks++;
	if (ok || bad++ >= 20)
		return;
	printf("%s: ", what);
	for (; len > 0; len--, data++)
		printf(*data >= ' ' && *data <= '~' ? "%c" : "\\x%02x",
		    (unsigned char)*data);
	printf("\n");
}

#define CASE(s) { s, sizeof(s) - 1 }
struct bytes { const char *s; size_t n; };

/* ---- JSON ---- */

static void
see_all(struct json *j, char what)
{
	lock_on(j, what);
}

static bool
json_pieces(struct json *j, const char *s, size_t n, size_t cut, size_t step)
{
	size_t i, len;
	char *piece;
	bool ok = true;

	for (i = 0; i < n && ok; i += len) {
		len = i == 0 && cut > 0 ? cut : step;
		len = len < n - i ? len : n - i;
		piece = exact(s + i, len);
		ok = json_feed(j, piece, len);
		free(piece);
	}
	return json_done(j);
}

/* The same verdict, at the same byte, however the text is cut. */
static void
json_case(bool want, const char *s, size_t n)
{
	static struct lock l;
	struct json whole = { .on = see_all, .to = &l };
	size_t cut;

	must(json_pieces(&whole, s, n, 0, n + 1) == want,
	    want ? "JSON refused" : "JSON taken", s, n);
	for (cut = 0; cut < n; cut++) {
		struct json j = { .on = see_all, .to = &l };

		(void)json_pieces(&j, s, n, cut, cut == 0 ? 1 : n);
		must(j.at == whole.at && j.why == whole.why,
		    "JSON cut is another", s, n);
	}
}

/* As a value in an object, in an array, between spaces, as a first half. */
static void
json_values(bool want, const struct bytes *v)
{
	static const char *const around[] = { "{\"a\":%}", "{\"a\":[%]}",
	    "{\"a\":[0,%,{}]}", "{\"a\" : % ,\"b\":0}\n", "{\"b\":{\"a\":%}}" };
	char doc[4096];
	size_t i, n, before;

	for (; v->s != NULL; v++)
		for (i = 0; i < sizeof(around) / sizeof(*around); i++) {
			before = strcspn(around[i], "%");
			n = strlen(around[i]) - before - 1;
			memcpy(doc, around[i], before);
			memcpy(doc + before, v->s, v->n);
			memcpy(doc + before + v->n, around[i] + before + 1, n);
			json_case(want, doc, before + v->n + n);
		}
}

static const struct bytes json_good_values[] = {
	CASE("0"), CASE("-0"), CASE("1"), CASE("-1"), CASE("10"), CASE("-123"),
	CASE("0e+1"), CASE("0e1"), CASE("0E0"), CASE("1E22"), CASE("1E-2"),
	CASE("1E+2"), CASE("123e45"), CASE("123.456e78"), CASE("123.456789"),
	CASE("20e1"), CASE("1.0"), CASE("-1.5"), CASE("0.1"), CASE("1.10"),
	CASE("-0.000000000000000000000000000000000000000000000000000000001"),
	CASE("12345678901234567890"), CASE("123123e100000"), CASE("-1e+9999"),
	CASE("0.4e00669999999999999999999999999999999999999999999999999999999"),
	CASE("true"), CASE("false"), CASE("null"), CASE("[]"), CASE("{}"),
	CASE("[[]]"), CASE("[{}]"), CASE("{\"\":0}"), CASE("[ ]"), CASE("{ }"),
	CASE("[1\n]"), CASE(" [1]"), CASE("[1,null,null,null,2]"),
	CASE("[1, 2 , 3]"), CASE("{\"a\":1,\"a\":1}"),
	CASE("{\"x\":[{\"id\":\"x\"}], \"id\":\"y\"}"),
	CASE("{\"min\": -1.0e+28, \"max\": 1.0e+28}"),
	CASE("\"\""), CASE("\" \""), CASE("\"asd\""), CASE("\"a/*b*/c\""),
	CASE("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\""), CASE("\"\\\\\\\\\\\"\""),
	CASE("\"\\u0060\\u012a\\u12AB\""), CASE("\"\\u0000\""),
	CASE("\"\\u0022\""), CASE("\"\\u005C\""), CASE("\"\\uFFFF\""),
	CASE("\"\\uD801\\udc37\""), CASE("\"\\ud83d\\ude39\\ud83d\\udc8d\""),
	CASE("\"\\uDBFF\\uDFFE\""), CASE("\"\\u200B\\u2064\\uFDD0\\uFFFE\""),
	CASE("\"\\uA66D\""), CASE("\"\\u0821\""), CASE("\"\\\\u0000\""),
	CASE("\"\\\\a\""), CASE("\"\\\\n\""), CASE("\"new\\u000Aline\""),
	CASE("\"\x7f\""), CASE("\"\xc2\x80\""), CASE("\"\xdf\xbf\""),
	CASE("\"\xe0\xa0\x80\""), CASE("\"\xe2\x80\xa8\xe2\x80\xa9\""),
	CASE("\"\xed\x9f\xbf\xee\x80\x80\""), CASE("\"\xef\xbf\xbf\""),
	CASE("\"\xef\xbb\xbf\""), CASE("\"\xf0\x90\x80\x80\""),
	CASE("\"\xf4\x8f\xbf\xbf\""), CASE("\"\xf0\x9f\x94\x92 \xcf\x80\""),
	/* Half a pair is grammar all the same (RFC 8259, 8.2). */
	CASE("\"\\uDADA\""), CASE("\"\\uD888\\u1234\""), CASE("\"\\uDd1ea\""),
	CASE("\"\\uD800\\n\""), CASE("\"\\uD800\\uD800\\uDC00\""),
	CASE("\"\\uDFAA\""), CASE("\"\\uD800abc\""),
	{ NULL, 0 }
};

static const struct bytes json_bad_values[] = {
	/* numbers */
	CASE("-"), CASE("+1"), CASE("++1"), CASE("+Inf"), CASE("-01"),
	CASE("-1.0."), CASE("-2."), CASE(".-1"), CASE(".2e-3"), CASE("0.1.2"),
	CASE("0.3e"), CASE("0.3e+"), CASE("0.e1"), CASE("0e"), CASE("0e+"),
	CASE("0E"), CASE("0E+"), CASE("1.0e"), CASE("1.0e+"), CASE("1.0e-"),
	CASE("1eE2"), CASE("1 000.0"), CASE("2.e+3"), CASE("2.e-3"),
	CASE("2.e3"), CASE("9.e+"), CASE("1+2"), CASE("0x1"), CASE("0x42"),
	CASE("Inf"), CASE("Infinity"), CASE("-Infinity"), CASE("-foo"),
	CASE("- 1"), CASE("-012"), CASE("012"), CASE("00"), CASE("-.123"),
	CASE("1ea"), CASE("1."), CASE(".123"), CASE("1.2a-3"), CASE("-1x"),
	CASE("1.8011670033376514H-308"), CASE("NaN"), CASE("-NaN"),
	CASE("123\xe5"), CASE("1e1\xe5"), CASE("0\xe5"), CASE("1_0"),
	CASE("1e1.5"), CASE("1/2"), CASE("\xef\xbc\x91"), CASE("1\x00"),
	/* words */
	CASE("tru"), CASE("fals"), CASE("nul"), CASE("True"), CASE("NULL"),
	CASE("truee"), CASE("nulll"), CASE("true false"), CASE("undefined"),
	CASE("t"), CASE("a\xe5"), CASE("*"), CASE("truth"), CASE("n"),
	/* strings */
	CASE("\""), CASE("\"\"\""), CASE("\"a"), CASE("\"\\\""), CASE("'a'"),
	CASE("abc"), CASE("\"x\" 1"), CASE("\"a\nb\""), CASE("\"\t\""),
	CASE("\"\x1f\""), CASE("\"a\x00" "a\""), CASE("\"\\x00\""),
	CASE("\"\\a\""), CASE("\"\\'\""), CASE("\"\\0\""), CASE("\"\\ \""),
	CASE("\"\\\t\""), CASE("\"\\\x00\""), CASE("\"\\\n\""),
	CASE("\"\\u\""), CASE("\"\\u0\""), CASE("\"\\u00\""),
	CASE("\"\\u00A\""), CASE("\"\\uqqqq\""), CASE("\"\\u00g0\""),
	CASE("\"\\U0041\""), CASE("\"\\u 041\""), CASE("\"\\u+041\""),
	CASE("\"\\uD834\\uDd\""), CASE("\"\\uD800\\u\""),
	CASE("\"\\uD800\\u1\""), CASE("\"\\uD800\\u1x\""),
	CASE("\"\\uD800\\\""), CASE("\"\\{[\\\""), CASE("\"\\\\\\\""),
	CASE("\\u0020\"a\""), CASE("\"a\"b\""), CASE("\xe2\x80\x9c" "a\""),
	/* UTF-8 (RFC 3629) */
	CASE("\"\xff\""), CASE("\"\xe5\""), CASE("\"\x81\""), CASE("\"\x80\""),
	CASE("\"\xc0\xaf\""), CASE("\"\xc1\xbf\""), CASE("\"\xc3\""),
	CASE("\"\xc3(\""), CASE("\"\xe0\xff\""), CASE("\"\xe0\x80\xaf\""),
	CASE("\"\xe0\x9f\xbf\""), CASE("\"\xe2\x82\""), CASE("\"\xe2(\xac\""),
	CASE("\"\xed\xa0\x80\""), CASE("\"\xed\xbf\xbf\""),
	CASE("\"\xf0\x80\x80\xaf\""), CASE("\"\xf0\x8f\xbf\xbf\""),
	CASE("\"\xf0\x9f\x98\""), CASE("\"\xf0\x9f(\x80\""),
	CASE("\"\xf4\x90\x80\x80\""), CASE("\"\xf4\xbf\xbf\xbf\""),
	CASE("\"\xf5\x80\x80\x80\""), CASE("\"\xf8\x88\x80\x80\x80\""),
	CASE("\"\xfc\x83\xbf\xbf\xbf\xbf\""), CASE("\"\\\xe5\""),
	CASE("\"\\u\xe5\""), CASE("\"\\\xf0\x9f\x8c\x80\""),
	/* arrays */
	CASE("["), CASE("]"), CASE("[1"), CASE("[1,"), CASE("[1,]"),
	CASE("[1,,]"), CASE("[1,,2]"), CASE("[,1]"), CASE("[,]"), CASE("[1 2]"),
	CASE("[1:2]"), CASE("[1]]"), CASE("[[1]"), CASE("[3[4]]"),
	CASE("[1}"), CASE("[x"), CASE("[\"\": 1]"), CASE("[*]"), CASE("[-]"),
	CASE("[\"\",]"), CASE("[1\n,1\n,1"), CASE("[\"a\",\n4\n,1,"),
	CASE("[{]"), CASE("[{}"), CASE("[\x0c]"), CASE("[\xe2\x81\xa0]"),
	CASE("[<null>]"), CASE("[\\n]"), CASE("['"), CASE("[\"a\"x"),
	CASE("[1,\n1\n,1,]"), CASE("[\"a\\f\"]]"), CASE("[\v\"a\"]"),
	/* objects */
	CASE("{"), CASE("}"), CASE("{]"), CASE("{[: \"x\"}"), CASE("{\"x\"}"),
	CASE("{\"x\", null}"), CASE("{\"x\"::1}"), CASE("{\"a\" b}"),
	CASE("{\"a\":"), CASE("{:1}"), CASE("{1:1}"), CASE("{null:null}"),
	CASE("{9999E9999:1}"), CASE("{'a':0}"), CASE("{a:1}"),
	CASE("{\"a\":0,}"), CASE("{\"a\":0,,}"), CASE("{,\"a\":0}"),
	CASE("{\"a\":1,,\"b\":2}"), CASE("{\"a\":1 \"b\":2}"),
	CASE("{\"a\":1;\"b\":2}"), CASE("{\"a\":1:2}"), CASE("{\"a\" 1}"),
	CASE("{\"a\":\"b\"/**/}"), CASE("{\"a\":\"b\"}//"), CASE("{\"a\":a}"),
	CASE("{\"a\":\"a"), CASE("{\"a\""), CASE("{\"a"), CASE("{\"a\":1]"),
	CASE("{\"\\uD800\\\":1}"), CASE("{\"\xe5\":1}"), CASE("{[]:1}"),
	CASE("{\"a\":{\"b\":1}"), CASE("{ \"a\" : \"b\" } #"), CASE("{*}"),
	CASE("{\xf0\x9f\x87\xa8}"), CASE("{{}}"), CASE("{\"a\"}:1"),
	/* nothing, and what is no white space */
	CASE("/**/0"), CASE("\xc2\xa0" "0"),
	CASE("\xef\xbb\xbf" "0"), CASE("\x0b" "0"), CASE("0\x0c"),
	CASE("0\xe2\x80\xa8"), CASE("\x00" "0"), CASE("#0"),
	{ NULL, 0 }
};

/* Whole texts: an object, and nothing else. */
static const struct bytes json_good_texts[] = {
	CASE("{}"), CASE(" {}"), CASE("{} "), CASE("\r\n\t {}\r\n\t "),
	CASE("{\"a\":0}"), CASE("{ \"a\"\n:\r0\t}"), { NULL, 0 }
};

static const struct bytes json_bad_texts[] = {
	CASE("{\"a\":}"), CASE("{\"a\": }"), CASE("{\"a\":[0,]}"),
	CASE(""), CASE(" "), CASE("\n"), CASE("[]"), CASE("[{}]"), CASE("0"),
	CASE("\"{}\""), CASE("null"), CASE("true"), CASE("{"), CASE("}"),
	CASE("{}}"), CASE("{}{}"), CASE("{} {}"), CASE("{},{}"), CASE("{}0"),
	CASE("{}#"), CASE("{}//"), CASE("{};"), CASE("{}\x00"), CASE("\x00{}"),
	CASE("{\x00}"), CASE("\xef\xbb\xbf{}"), CASE("\xef\xbb{}"),
	CASE("\xff\xfe{\x00}\x00"), CASE("\xfe\xff\x00{\x00}"),
	CASE("{\x00}\x00"), CASE("\x0c{}"), CASE("{}\x0b"), CASE("(){}"),
	CASE("5985\r\n{"), CASE("<html></html>"), CASE("a: b"), { NULL, 0 }
};

static void
json_depth(void)
{
	static const char *const open[] = { "[", "{\"a\":" };
	char *text = malloc(100000), close[2];
	size_t i, n, depth;

	for (i = 0; i < 2; i++)
		for (depth = 1; depth <= 10001; depth *= 10) {
			close[i] = i == 0 ? ']' : '}';
			n = (size_t)sprintf(text, "{\"a\":");
			for (size_t d = 1; d < depth; d++)
				n += (size_t)sprintf(text + n, "%s", open[i]);
			n += (size_t)sprintf(text + n, "%s", i ? "{}" : "[]");
			for (size_t d = 1; d < depth; d++)
				text[n++] = close[i];
			text[n++] = '}';
			struct json j = { 0 };
			must(json_pieces(&j, text, n, 0, n) ==
			    (depth < JSON_DEPTH - 2), "depth", text, 9);
		}
	free(text);
}

/* Every byte in a string, and at every distance from its ends: strings are
 * read by eight bytes at a time. */
static void
json_bytes(void)
{
	char doc[64];
	size_t at, len, n;
	int b;

	for (b = 0; b < 256; b++)
		for (len = 1; len < 20; len++)
			for (at = 0; at < len; at++) {
				n = (size_t)sprintf(doc, "{\"");
				memset(doc + n, 'x', len);
				doc[n + at] = (char)b;
				n += len;
				n += (size_t)sprintf(doc + n, "\":0}");
				struct json j = { 0 };
				must(json_pieces(&j, doc, n, 0, n) ==
				    (b >= 0x20 && b < 0x80 && b != '"' &&
				    b != '\\'), "byte in a string", doc, n);
			}
}

/* What is found in a text, wherever it stands and however it is cut. */
static void
json_finds(void)
{
	static const struct {
		const char *text, *id, *lineage;
		bool known;
		uint64_t serial;
	} cases[] = {
		{ "{\"serial\":7,\"lineage\":\"x\"}", "", "x", true, 7 },
		{ "{\"lineage\":\"x\",\"serial\":7}", "", "x", true, 7 },
		{ "{ \"serial\" :\n7 , \"ID\" : \"i\" }", "i", "", true, 7 },
		{ "{\"serial\":0}", "", "", true, 0 },
		{ "{\"serial\":18446744073709551615}", "", "", true,
		    18446744073709551615u },
		{ "{\"serial\":18446744073709551616}", "", "", false, 0 },
		{ "{\"serial\":-1}", "", "", false, 0 },
		{ "{\"serial\":1.5}", "", "", false, 0 },
		{ "{\"serial\":\"7\"}", "", "", false, 0 },
		{ "{\"serial\":null,\"lineage\":null}", "", "", false, 0 },
		{ "{\"serial\":[7],\"lineage\":[\"x\"]}", "", "", false, 0 },
		{ "{\"a\":{\"serial\":7,\"ID\":\"i\"}}", "", "", false, 0 },
		{ "{\"a\":[{\"serial\":7}],\"serial\":8}", "", "", true, 8 },
		{ "{\"a\":{\"ID\":\"no\"},\"ID\":\"i\"}", "i", "", false, 0 },
		{ "{\"a\":\"ID\",\"b\":\"serial\"}", "", "", false, 0 },
		{ "{\"ID\":\"a\\u0062\\n\\\"\"}", "ab\n\"", "", false, 0 },
		{ "{\"ID\":\"\\ud83d\\ude39\"}", "\xf0\x9f\x98\xb9", "", false, 0 },
		{ "{\"\\u0049D\":\"i\"}", "i", "", false, 0 },
		{ "{\"ID\":\"\"}", "", "", false, 0 },
		{ "{\"ID\":1}", "", "", false, 0 },
		{ "{\"ID\":\"a\\u0000b\"}", "", "", false, 0 },
		{ "{\"IDx\":\"i\",\"xID\":\"i\"}", "", "", false, 0 },
	};
	const char *text;
	size_t i, cut, n;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		text = cases[i].text;
		n = strlen(text);
		for (cut = 0; cut < n; cut++) {
			struct lock l = { .held = false };
			struct meta m = { .known = false };
			struct json j = { .on = lock_on, .to = &l };
			struct json k = { .on = meta_on, .to = &m };

			must(json_pieces(&j, text, n, cut, cut ? n : 1) &&
			    strcmp(l.id, cases[i].id) == 0, "ID", text, n);
			must(json_pieces(&k, text, n, cut, cut ? n : 1) &&
			    m.known == cases[i].known &&
			    (!m.known || m.serial == cases[i].serial) &&
			    strcmp(m.lineage, cases[i].lineage) == 0,
			    "serial or lineage", text, n);
		}
	}
}

static void
table_json(void)
{
	const struct bytes *t;

	json_values(true, json_good_values);
	json_values(false, json_bad_values);
	for (t = json_good_texts; t->s != NULL; t++)
		json_case(true, t->s, t->n);
	for (t = json_bad_texts; t->s != NULL; t++)
		json_case(false, t->s, t->n);
	json_depth();
	json_bytes();
	json_finds();
}

/* ---- heads ---- */

/* Its answer to the first n bytes of a text in a block of just that size. */
static int
parse(const char *s, size_t n, struct head *h)
{
	size_t seen = 0;
	char *copy = exact(s, n);
	int status = http_parse(copy, n, &seen, h);

	free(copy);
	return status;
}

/* Each prefix says "more", the whole its length, whatever follows; bytes that
 * come one by one are the same. want < 0: minus a status, in the end. */
static void
parse_case(int want, const char *s, size_t n)
{
	char *longer = malloc(n + 8), *grown = malloc(HEAD_MAX + 9);
	size_t i, seen = 0;
	struct head h;
	int status = 0;

	memcpy(longer, s, n);
	memcpy(longer + n, "GET / HT", 8);
	must(parse(s, n, &h) == want, "head", s, n);
	if (want > 0)
		must(parse(longer, n + 8, &h) == want, "head and more", s, n);
	for (i = 1; i < n && n < 1000; i++) {
		status = parse(s, i, &h);
		must(status == 0 || (want < 0 && status < 0), "prefix", s, i);
	}
	for (i = 1; i <= n && n < 1000 && status == 0; i++) {
		memcpy(grown, s, i);
		status = http_parse(grown, i, &seen, &h);
	}
	must(n >= 1000 || status == want, "byte by byte", s, n);
	free(longer);
	free(grown);
}

#define HOST "Host: localhost\r\n"

static void
table_heads(void)
{
	static const struct bytes good[] = {
		CASE("GET / HTTP/1.1\r\n" HOST "\r\n"),
		CASE("GET / HTTP/1.0\r\n\r\n"),
		CASE("LOCK /a/b?ID=c HTTP/1.1\r\nHost:[::1]:1\r\nA:\r\nB: \t\r\n\r\n"),
		CASE("OPTIONS * HTTP/1.1\r\n" HOST "\r\n"),
		CASE("GET http://a.b/c HTTP/1.1\r\n" HOST "\r\n"),
		CASE("PUT / HTTP/1.1\r\n" HOST "Content-Length: 9223372036854775807\r\n\r\n"),
		CASE("PUT / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n"),
	};
	static const struct { int status; struct bytes b; } wrong[] = {
		{ -400, CASE("GET / HTTP/1.1\n" HOST "\r\n") },
		{ -400, CASE("\nGET / HTTP/1.1\r\n" HOST "\r\n") },
		{ -400, CASE(" GET / HTTP/1.1\r\n" HOST "\r\n") },
		{ -400, CASE("GET / HTTP/1.1\r\n" HOST "A: b\r\n c\r\n\r\n") },
		{ -400, CASE("GET / HTTP/1.1\r\n\r\n") },
		{ -400, CASE("\r\n\r\n") },
		{ -400, CASE("GET\r\n\r\n") },
		{ -400, CASE("G\r\n\r\n") },
		{ -505, CASE("GET / HTTP/2.0\r\n" HOST "\r\n") },
		{ -501, CASE("get / HTTP/1.1\r\n" HOST "\r\n") },
		{ -417, CASE("GET / HTTP/1.1\r\n" HOST "Expect: x\r\n\r\n") },
		{ -400, CASE("GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n") },
	};
	static char big[HEAD_MAX + 64];
	struct head h;
	size_t i, n;
	int b;

	for (i = 0; i < sizeof(good) / sizeof(*good); i++)
		parse_case((int)good[i].n, good[i].s, good[i].n);
	for (i = 0; i < sizeof(wrong) / sizeof(*wrong); i++)
		parse_case(wrong[i].status, wrong[i].b.s, wrong[i].b.n);
	/* Every byte in every place: method, target, name, value. */
	for (b = 0; b < 256; b++) {
		bool token = b != 0 && strchr("!#$%&'*+-.^_`|~0123456789abcdef"
		    "ghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", b) != NULL;

		n = (size_t)sprintf(big, "G%cT / HTTP/1.1\r\n" HOST "\r\n", b);
		must(parse(big, n, &h) == (b == 'E' ? (int)n :
		    token ? -501 : -400), "method", big, n);
		n = (size_t)sprintf(big, "GET /%c HTTP/1.1\r\n" HOST "\r\n", b);
		must((parse(big, n, &h) == (int)n) ==
		    (b > 0x20 && b < 0x7f && b != '#'), "target", big, n);
		n = (size_t)sprintf(big, "GET / HTTP/1.1\r\n" HOST "A%cB: c\r\n\r\n",
		    b);
		must((parse(big, n, &h) == (int)n) == (token || b == ':'),
		    "field name", big, n);
		n = (size_t)sprintf(big, "GET / HTTP/1.1\r\n" HOST "A: b%cc\r\n\r\n",
		    b);
		must((parse(big, n, &h) == (int)n) ==
		    (b == '\t' || (b >= ' ' && b != 0x7f)), "value", big, n);
	}
	/* The bounds, to the byte. */
	for (i = HEAD_MAX - 1; i <= HEAD_MAX + 1; i++) {
		n = (size_t)sprintf(big, "GET / HTTP/1.1\r\n" HOST "A: ");
		memset(big + n, 'b', i - n);
		memcpy(big + i - 4, "\r\n\r\n", 4);
		must(parse(big, i, &h) == (i <= HEAD_MAX ? (int)i : -431),
		    "length of the head", big, 20);
	}
	for (i = TARGET_MAX - 1; i <= TARGET_MAX + 1; i++) {
		n = (size_t)sprintf(big, "GET /");
		memset(big + n, 'b', i - 1);
		n += i - 1;
		n += (size_t)sprintf(big + n, " HTTP/1.1\r\n" HOST "\r\n");
		must(parse(big, n, &h) == (i <= TARGET_MAX ? (int)n : -414),
		    "length of the target", big, 20);
	}
	for (i = FIELDS_MAX - 1; i <= FIELDS_MAX + 1; i++) {
		n = (size_t)sprintf(big, "GET / HTTP/1.1\r\n" HOST);
		for (size_t f = 1; f < i; f++)
			n += (size_t)sprintf(big + n, "A: b\r\n");
		n += (size_t)sprintf(big + n, "\r\n");
		must(parse(big, n, &h) == (i <= FIELDS_MAX ? (int)n : -431),
		    "number of fields", big, 20);
	}
	/* Lengths around 2^63 and 2^64 are huge, never small or negative. */
	for (i = 0; i < 20; i++) {
		n = (size_t)sprintf(big, "PUT / HTTP/1.1\r\n" HOST
		    "Content-Length: %s%zu\r\n\r\n", i < 10 ?
		    "922337203685477580" : "1844674407370955161", i % 10);
		b = parse(big, n, &h);
		must(b == -400 || b == -413 || (b == (int)n &&
		    h.length >= INT64_MAX / 1000), "huge length", big, n);
	}
}

/* ---- chunks ---- */

/* Decodes with the input cut at cut and out filled cap bytes at a time; the
 * data is appended to *data. A status, or 0; *used is what was taken. */
static int
decode(const char *s, size_t n, size_t cut, size_t cap, char *data,
    size_t *len, size_t *used)
{
	struct chunks c = { .room = UINT64_MAX };
	size_t end = cut > 0 ? cut : n, took, got;
	char *in, *out;
	int status = 0;

	*used = *len = 0;
	while (status == 0 && c.state != CH_DONE && *used < n) {
		in = exact(s + *used, end - *used);
		out = malloc(cap);
		got = 0;
		status = chunk_decode(&c, (struct span){ in, end - *used },
		    &took, out, &got, cap);
		memcpy(data + *len, out, got);
		*len += got;
		*used += took;
		free(in);
		free(out);
		if (*used == end)
			end = cut == 0 ? n : *used < n ? end + 1 : n;
		else if (took == 0 && got == 0 && status == 0)
			return 1;	/* it would never end */
	}
	return c.state == CH_DONE || status != 0 ? status : 2;
}

static void
table_chunks(void)
{
	static const struct { int status; struct bytes in, out; } cases[] = {
		{ 0, CASE("0\r\n\r\n"), CASE("") },
		{ 0, CASE("3\r\nabc\r\n0\r\n\r\n"), CASE("abc") },
		{ 0, CASE("03\r\nabc\r\n2\r\nde\r\n000\r\n\r\n"), CASE("abcde") },
		{ 0, CASE("a\r\n0123456789\r\n0\r\n\r\n"), CASE("0123456789") },
		{ 0, CASE("A\r\n0\r\n\r\n56789\r\n0\r\n\r\n"), CASE("0\r\n\r\n56789") },
		{ 0, CASE("1;a\r\nx\r\n1;b=c;d=\"\\\"\r\n;\"\r\ny\r\n0\r\n\r\n"), CASE("") },
		{ 0, CASE("1;a=\"\\\"q\\\\\";b\r\nx\r\n0;e\r\n\r\n"), CASE("x") },
		{ 0, CASE("1\r\nx\r\n0\r\nA: b\r\nC:\r\n\r\n"), CASE("x") },
		{ 2, CASE("3\r\nabc\r\n0\r\n"), CASE("abc") },
		{ 2, CASE("3\r\nab"), CASE("ab") },
		{ 2, CASE("3"), CASE("") },
		{ -400, CASE("3\r\nabc0\r\n\r\n"), CASE("abc") },
		{ -400, CASE("3\r\nabc\n0\r\n\r\n"), CASE("abc") },
		{ -400, CASE("3\nabc\r\n0\r\n\r\n"), CASE("") },
		{ -400, CASE("0\r\nA : b\r\n\r\n"), CASE("") },
		{ -400, CASE("\r\n"), CASE("") },
		{ -400, CASE("x\r\n"), CASE("") },
	};
	static char data[4096];
	size_t i, cut, cap, len, used, n;
	struct bytes in;
	int b, status;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		in = cases[i].in;
		for (cut = 0; cut <= in.n; cut++)
			for (cap = 1; cap < 16; cap++) {
				status = decode(in.s, in.n, cut, cap, data,
				    &len, &used);
				if (i == 5) {	/* CR LF in quotes: no */
					must(status == -400, "quoted CR LF",
					    in.s, in.n);
					continue;
				}
				must(status == cases[i].status &&
				    len == cases[i].out.n && memcmp(data,
				    cases[i].out.s, len) == 0, "chunks",
				    in.s, in.n);
				must(status != 0 || used == in.n,
				    "end of the chunks", in.s, in.n);
			}
		/* What follows is the next request's. */
		n = in.n;
		memcpy(data + 2048, in.s, n);
		memcpy(data + 2048 + n, "GET /", 5);
		if (cases[i].status == 0 && i != 5)
			must(decode(data + 2048, n + 5, 0, 64, data, &len,
			    &used) == 0 && used == n, "what follows", in.s, n);
	}
	/* Every byte in every place. */
	for (b = 0; b < 256; b++) {
		bool digit = b != 0 &&
		    strchr("0123456789abcdefABCDEF", b) != NULL;

		n = (size_t)sprintf(data + 2048, "0%cb\r\n", b);
		status = decode(data + 2048, n, 0, 64, data, &len, &used);
		must((status >= 0) == (digit || b == ';'), "size",
		    data + 2048, n);
		n = (size_t)sprintf(data + 2048, "1;a%cb\r\n", b);
		status = decode(data + 2048, n, 0, 64, data, &len, &used);
		must((status >= 0) == (b == '\t' || (b >= ' ' && b != 0x7f &&
		    b != '"')), "extension", data + 2048, n);
		n = (size_t)sprintf(data + 2048, "0\r\nA: b%cc\r\n\r\n", b);
		status = decode(data + 2048, n, 0, 64, data, &len, &used);
		must((status == 0) == (b == '\t' || (b >= ' ' && b != 0x7f)),
		    "trailer", data + 2048, n);
	}
	/* Lines that never end, and sizes that do not fit. */
	n = CHUNK_LINE_MAX + 2;
	for (i = 0; i < 3; i++) {
		char *flood = malloc(2 * HEAD_MAX);

		memset(flood, i == 2 ? 'a' : i == 1 ? '0' : 'f', 2 * HEAD_MAX);
		if (i == 2)
			memcpy(flood, "0\r\n", 3);
		status = decode(flood, 2 * HEAD_MAX, 0, 64, data, &len, &used);
		must(status < 0, "flood", flood, 16);
		free(flood);
	}
}

/* ---- names ---- */

/* RFC 3629, written down once more, in another way. */
static bool
utf8_valid(const unsigned char *p, size_t n)
{
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	uint32_t c;
	size_t len, i;

	for (; n > 0; p += len, n -= len) {
		len = *p < 0x80 ? 1 : *p >= 0xf8 ? 0 : *p >= 0xf0 ? 4 :
		    *p >= 0xe0 ? 3 : *p >= 0xc0 ? 2 : 0;
		if (len == 0 || len > n)
			return false;
		c = len == 1 ? *p : *p & (0xffu >> (len + 1));
		for (i = 1; i < len; i++) {
			if ((p[i] & 0xc0) != 0x80)
				return false;
			c = c << 6 | (p[i] & 0x3f);
		}
		if (c < least[len] || c > 0x10ffff ||
		    (c >= 0xd800 && c <= 0xdfff) || c < 0x20 ||
		    (c >= 0x7f && c < 0xa0))
			return false;	/* control characters, too */
	}
	return true;
}

/* Where a target leads: its kind, and the name in *r; -1, it is refused. */
static int
route(const char *target, size_t n, struct request *r)
{
	char *copy = exact(target, n);
	bool found;
	const char *wrong;

	memset(r, 0, sizeof(*r));
	wrong = name_route((struct span){ copy, n }, r, &found);
	free(copy);
	return wrong != NULL ? -1 : found ? (int)r->kind : -2;
}

static void
table_names(void)
{
	static const struct { const char *target; int kind; const char *name; }
	cases[] = {
		{ "/", K_ROOT, NULL }, { "*", K_STAR, NULL },
		{ "/a", K_STATE, "a" }, { "/a/b", K_STATE, "a/b" },
		{ "/a%2fb", K_STATE, "a/b" }, { "/a.tfstate", K_STATE, "a" },
		{ "/%61%2Etfstate", K_STATE, "a" }, { "/a+b", K_STATE, "a+b" },
		{ "/a/lock", K_LOCK, "a" }, { "/a/b/lock", K_LOCK, "a/b" },
		{ "/a%2flock", K_LOCK, "a" }, { "/a.tfstate/lock", K_LOCK, "a" },
		{ "/lock/a", K_STATE, "lock/a" }, { "/a/locks", K_STATE, "a/locks" },
		{ "/terraform_state/a/b", K_STATE, "a/b" },
		{ "/terraform_lock/a/b", K_LOCK, "a/b" },
		{ "/api/v4/projects/4/terraform/state/p/lock", K_LOCK,
		    "api/v4/projects/4/terraform/state/p" },
		{ "/-/versions/a/b", K_VERSIONS, "a/b" },
		{ "/-/versions/a/20260102T030405.006Z-7", K_VERSION, "a" },
		{ "/-/versions/a/20260102T030405.006Z-7.tfstate", K_VERSION, "a" },
		{ "/-/versions/a/20260102T030405.006Z-", K_VERSIONS,
		    "a/20260102T030405.006Z-" },
		{ "/-/log/a/b", K_LOG, "a/b" }, { "/-/changes/a", K_CHANGES, "a" },
		{ "/-/healthy", K_HEALTHY, NULL }, { "/-/ready", K_READY, NULL },
		{ "/-/metrics", K_METRICS, NULL },
		{ "/-/none", -2, NULL }, { "/-/versions", -2, NULL },
		{ "/-", -1, NULL }, { "//", -1, NULL }, { "/a/", -1, NULL },
		{ "/a/lock/lock", -1, NULL }, { "/lock", -1, NULL },
		{ "/terraform_lock/lock", -1, NULL }, { "/..", -1, NULL },
		{ "/-/log/..", -1, NULL }, { "/-/log/", -1, NULL },
		{ "/-/versions/20260102T030405.006Z-7", K_VERSIONS,
		    "20260102T030405.006Z-7" },
		{ "/a%", -1, NULL }, { "/a%2", -1, NULL }, { "/a%2g", -1, NULL },
		{ "/a%00", -1, NULL }, { "/a%00b/c", -1, NULL },
	};
	static struct request r;
	char target[16384];
	unsigned char raw[4];
	size_t i, n;
	int a, b, kind;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		n = strlen(cases[i].target);
		kind = route(cases[i].target, n, &r);
		must(kind == cases[i].kind, "route", cases[i].target, n);
		must(cases[i].name == NULL || strcmp(r.name, cases[i].name) == 0,
		    "name", cases[i].target, n);
	}
	/* Every pair of bytes, escaped: UTF-8, and no control characters. */
	for (a = 0; a < 256; a++)
		for (b = 0; b < 256; b++) {
			raw[0] = 'x';
			raw[1] = (unsigned char)a;
			raw[2] = (unsigned char)b;
			raw[3] = 'x';
			n = (size_t)sprintf(target, "/x%%%02x%%%02Xx", a, b);
			kind = route(target, n, &r);
			if (a == '/' || b == '/')
				continue;
			must((kind == K_STATE) == (utf8_valid(raw, 4) &&
			    a != '\\' && b != '\\'), "escapes", target, n);
			must(kind != K_STATE || memcmp(r.name, raw, 4) == 0,
			    "decoded", target, n);
		}
	/* Lengths: of a segment, of all, and far beyond, plain and escaped. */
	for (n = 199; n <= 202; n++) {
		memset(target, 'a', n);
		target[0] = '/';
		must((route(target, n, &r) == K_STATE) == (n <= 201),
		    "length of a segment", target, 5);
	}
	for (n = 999; n <= 1003; n++) {
		memset(target, 'a', n);
		for (i = 0; i < n; i += 190)
			target[i] = '/';
		must((route(target, n, &r) == K_STATE) == (n <= 1001),
		    "length of a name", target, 5);
	}
	for (n = 1003; n < 8190; n += 3) {
		memset(target, 'a', n);
		target[0] = '/';
		must(route(target, n, &r) == -1, "far too long", target, 5);
		for (i = 1; i + 2 < n; i += 3)
			memcpy(target + i, "%61", 3);
		(void)route(target, n, &r);
	}
	n = 0;
	for (i = 1; i <= 9; i++) {
		n += (size_t)sprintf(target + n, "/s");
		must((route(target, n, &r) == K_STATE) == (i <= 8),
		    "segments", target, n);
	}
}

/* ---- digests ---- */

static void
table_digests(void)
{
	/* RFC 1321, A.5; FIPS 180-4 examples; RFC 4648, 10. */
	static const char *const md5s[][2] = {
		{ "", "d41d8cd98f00b204e9800998ecf8427e" },
		{ "a", "0cc175b9c0f1b6a831c399e269772661" },
		{ "abc", "900150983cd24fb0d6963f7d28e17f72" },
		{ "message digest", "f96b697d7cb7938d525a2f31aaf161d0" },
		{ "abcdefghijklmnopqrstuvwxyz", "c3fcd3d76192e4007dfb496cca67e13b" },
		{ "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
		    "d174ab98d277d9f5a5611c2c9f419d9f" },
		{ "1234567890123456789012345678901234567890123456789012345678901234"
		    "5678901234567890", "57edf4a22be3c955ac49da2e2107b67a" },
	}, *const shas[][2] = {
		{ "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
		{ "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
		{ "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
		    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" },
		{ "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno"
		    "ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
		    "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1" },
	}, *const base64s[][2] = { { "", "" }, { "f", "Zg==" }, { "fo", "Zm8=" },
	    { "foo", "Zm9v" }, { "foob", "Zm9vYg==" }, { "fooba", "Zm9vYmE=" },
	    { "foobar", "Zm9vYmFy" }, { "\xfb\xff\xbf", "+/+/" },
	}, *const no_base64[] = { "Z", "Zg", "Zg=", "=", "==", "====", "Z===",
	    "Zh==", "Zm9=", "Zm8=Zm8=", "Zm 9v", " Zg==", "Zg==\n", "-_-_",
	    "Zg=a", "Zm9v=", "Zm9vYg=\x80" };
	unsigned char out[32];
	char text[128], *copy;
	struct md5 m;
	size_t i, n, cut;

	for (i = 0; i < sizeof(md5s) / sizeof(*md5s); i++)
		for (n = strlen(md5s[i][0]), cut = 0; cut <= n; cut++) {
			m = md5_start;
			copy = exact(md5s[i][0], cut);
			md5_add(&m, copy, cut);
			free(copy);
			copy = exact(md5s[i][0] + cut, n - cut);
			md5_add(&m, copy, n - cut);
			free(copy);
			md5_end(&m, out);
			hex(out, 16, text);
			must(strcmp(text, md5s[i][1]) == 0, "MD5",
			    md5s[i][0], n);
		}
	for (i = 0; i < sizeof(shas) / sizeof(*shas); i++) {
		n = strlen(shas[i][0]);
		copy = exact(shas[i][0], n);
		sha256(copy, n, out);
		free(copy);
		hex(out, 32, text);
		must(strcmp(text, shas[i][1]) == 0, "SHA-256", shas[i][0], n);
	}
	for (i = 0; i < sizeof(base64s) / sizeof(*base64s); i++) {
		n = strlen(base64s[i][0]);
		copy = exact(base64s[i][1], strlen(base64s[i][1]));
		must(base64_decode((struct span){ copy, strlen(base64s[i][1]) },
		    out, n) == (ssize_t)n &&
		    memcmp(out, base64s[i][0], n) == 0, "base64",
		    base64s[i][1], strlen(base64s[i][1]));
		must(n == 0 || base64_decode((struct span){ copy,
		    strlen(base64s[i][1]) }, out, n - 1) == -1,
		    "base64 that does not fit", base64s[i][1], 4);
		free(copy);
		base64_encode((const unsigned char *)base64s[i][0], n, text);
		must(strcmp(text, base64s[i][1]) == 0, "to base64",
		    base64s[i][0], n);
	}
	for (i = 0; i < sizeof(no_base64) / sizeof(*no_base64); i++)
		must(base64_decode(span(no_base64[i]), out, sizeof(out)) == -1,
		    "no base64", no_base64[i], strlen(no_base64[i]));
}

/* ---- turns ---- */

/* However much one client has asked, in one turn everybody gets his. */
static void
table_turns(void)
{
	static const char ask[] = "GET /-/healthy HTTP/1.1\r\n" HOST "\r\n";
	static struct conn *ready[64];
	static char *quiet[] = { NULL }, answers[1 << 20];
	struct sockaddr_storage nobody = { .ss_family = AF_UNSPEC };
	struct listener l = { .local = false };
	static char many[2000 * sizeof(ask)];
	int a[2], b[2], size = 1 << 20, i;
	ssize_t n;

	conf.command = quiet;		/* no request log */
	limits_set();
	signals_set();
	set.n = set.hot = set.base;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, a) == -1 ||
	    socketpair(AF_UNIX, SOCK_STREAM, 0, b) == -1)
		abort();
	for (i = 0; i < 2; i++) {
		(void)setsockopt(a[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
		(void)fcntl(a[i], F_SETFL, O_NONBLOCK);
		(void)fcntl(b[i], F_SETFL, O_NONBLOCK);
	}
	conn_open(a[0], &l, &nobody);
	conn_open(b[0], &l, &nobody);
	for (i = 0; i < 2000; i++)
		memcpy(many + i * (sizeof(ask) - 1), ask, sizeof(ask) - 1);
	n = send(a[1], many, 2000 * (sizeof(ask) - 1), 0);
	n = send(b[1], ask, sizeof(ask) - 1, 0);
	loop_turn(ready);
	n = recv(b[1], answers, sizeof(answers), 0);
	must(n > 0, "the other was served", "", 0);
	i = (int)(n > 0 ? recv(a[1], answers, sizeof(answers), 0) / n : 0);
	must(i >= 1 && i <= 512, "one client, in one turn", ask, 16);
	if (i > 512)
		return;
	loop_turn(ready);
	must(recv(a[1], answers, sizeof(answers), 0) > 0,
	    "and in the next", ask, 16);
}

int
main(void)
{
	table_json();
	table_heads();
	table_chunks();
	table_names();
	table_digests();
	table_turns();
	printf("%u of %u checks failed\n", bad, checks);
	return bad > 0;
}
END
}

# RFC 8259, 9112, 3629, 1321, 4648, FIPS 180-4: the tables above, the kinds of
# JSONTestSuite among them, each text also cut at every byte.
test_the_pure_parts_pass_their_tables() {
	need "${CC:-cc}"
	local how=(-std=c11 -w -g -O1 -pthread
		"-fsanitize=address,undefined" -fno-sanitize-recover=undefined)
	echo "int main(void) { return 0; }" >none.c
	"${CC:-cc}" "${how[@]}" -o none none.c || skip "no sanitizers here"
	units_source >units.c
	"${CC:-cc}" "${how[@]}" -o units units.c
	./units || fail "the tables"
}

# ---- fuzzing ---------------------------------------------------------------
#
# ./test.sh fuzz SECONDS: each harness for that long, with limits so small
# that they are reached; what is said twice must agree. Kept are only crashes.

fuzz_source() {
	with_source <<'END'

/* A byte to choose from, off the end of the input. */
static unsigned
choose(const uint8_t **data, size_t *n)
{
	return *n > 0 ? (*data)[--*n] : 0;
}

#if defined(FUZZ_HEAD)
/* The parser: whole, and grown byte by byte, it must say the same; its spans
 * lie in the input. */
static void
inside(struct span s, const char *data, size_t n)
{
	assert(s.len == 0 || strncmp(s.ptr, "/", s.len) == 0 ||
	    (s.ptr >= data && s.ptr + s.len <= data + n));
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	char *whole = exact(data, n), *piece;
	struct head h, g;
	size_t seen = 0, i;
	int status, part = 0;

	status = http_parse(whole, n, &seen, &h);
	assert(status <= (int)n && (status >= 0 || status <= -400));
	if (status > 0) {
		inside(h.target, whole, n);
		inside(h.host, whole, n);
		assert(h.length >= -1 && !(h.chunked && h.length != -1));
		assert(memcmp(whole + status - 4, "\r\n\r\n", 4) == 0);
	}
	for (seen = 0, i = 1; i <= n && part == 0; i++) {
		piece = exact(data, i);
		part = http_parse(piece, i, &seen, &g);
		free(piece);
	}
	/* Cut short by its limits it may be refused for another reason. */
	assert((part > 0) == (status > 0) && (part <= 0 || part == status));
	free(whole);
	return 0;
}

#elif defined(FUZZ_CHUNKS)
/* The decoder: in one piece, and in pieces into small buffers, the same. */
static int
decode(const uint8_t *data, size_t n, size_t step, size_t cap, char *out,
    size_t *len, size_t *used)
{
	struct chunks c = { .room = UINT64_MAX };
	char *in, *some;
	size_t took, got, size;
	int status = 0;

	*len = *used = 0;
	while (status == 0 && c.state != CH_DONE && *used < n) {
		size = step < n - *used ? step : n - *used;
		in = exact(data + *used, size);
		some = exact(data, cap < n ? cap : n);
		got = 0;
		status = chunk_decode(&c, (struct span){ in, size }, &took,
		    some, &got, cap < n ? cap : n);
		assert(took <= size && (took > 0 || got > 0 || status != 0));
		memcpy(out + *len, some, got);
		*len += got;
		*used += took;
		free(in);
		free(some);
	}
	return status != 0 ? status : c.state == CH_DONE;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	unsigned step = choose(&data, &n) % 32 + 1;
	unsigned cap = choose(&data, &n) % 32 + 1;
	char *a = malloc(n), *b = malloc(n);
	size_t alen, blen, aused, bused;
	int whole = decode(data, n, n, n, a, &alen, &aused);

	assert(whole == decode(data, n, step, cap, b, &blen, &bused));
	assert(alen == blen && aused == bused && memcmp(a, b, alen) == 0);
	free(a);
	free(b);
	return 0;
}

#elif defined(FUZZ_JSON)
/* The check: cut anywhere, it says the same and finds the same. */
static bool
feed(struct json *j, const uint8_t *data, size_t n, size_t step)
{
	size_t i, size;
	bool ok = true;
	char *piece;

	for (i = 0; i < n && ok; i += size) {
		size = step < n - i ? step : n - i;
		piece = exact(data + i, size);
		ok = json_feed(j, piece, size);
		free(piece);
	}
	return json_done(j);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	unsigned step = choose(&data, &n) % 16 + 1;
	struct lock l = { .held = false }, k = { .held = false };
	struct meta m = { .known = false }, o = { .known = false };
	struct json a = { .on = lock_on, .to = &l };
	struct json b = { .on = lock_on, .to = &k };
	struct json c = { .on = meta_on, .to = &m };
	struct json d = { .on = meta_on, .to = &o }, e = { .on = NULL };
	bool ok = feed(&a, data, n, n);

	assert(ok == feed(&b, data, n, step) && a.at == b.at &&
	    a.why == b.why && memcmp(&l, &k, sizeof(l)) == 0);
	assert(ok == feed(&c, data, n, n) && ok == feed(&d, data, n, step));
	assert(memcmp(&m, &o, sizeof(m)) == 0 && c.at == a.at);
	assert(ok == feed(&e, data, n, step) && e.at == a.at);
	return 0;
}

#elif defined(FUZZ_URL)
/* From URL to name: what comes out is a name, and safe to open. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct request r;
	char *target = exact(data, n), *query = memchr(target, '?', n);
	size_t path = query != NULL ? (size_t)(query - target) : n;
	bool found;
	const char *wrong;

	memset(&r, 0, sizeof(r));
	wrong = name_route((struct span){ target, path }, &r, &found);
	if (wrong == NULL && found && r.kind != K_ROOT && r.kind != K_STAR &&
	    r.kind < K_HEALTHY) {
		assert(name_wrong(r.name) == NULL && r.name[0] != '/');
		assert(strstr(r.name, "..") != r.name &&
		    strstr(r.name, "/.") == NULL && strstr(r.name, "//") == NULL);
		assert(r.kind != K_VERSION || is_version(r.version, ""));
	}
	if (query != NULL)
		(void)name_query((struct span){ query + 1, n - path - 1 }, &r);
	assert(strlen(r.id) <= ID_MAX);
	free(target);
	return 0;
}

#elif defined(FUZZ_BASIC)
/* Authorization, and the users file. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct request r;
	char *value = exact(data, n), *text = calloc(1, n + 1);
	unsigned char out[96];
	char back[160];
	struct users *u;
	ssize_t got;

	memset(&r, 0, sizeof(r));
	if (user_shows(&r, (struct span){ value, n }))
		assert(strlen(r.user) < sizeof(r.user));
	got = base64_decode((struct span){ value, n }, out, sizeof(out));
	if (got >= 0) {			/* one text, one meaning */
		base64_encode(out, (size_t)got, back);
		assert(strlen(back) == n && memcmp(back, value, n) == 0);
	}
	memcpy(text, data, n);
	if ((u = users_parse(text, "fuzz")) != NULL) {
		r.users = u;
		(void)user_right(&r, "a/b");
		user_name(&r);
		users_drop(u);
	}
	free(value);
	return 0;
}

#elif defined(FUZZ_WIRE)
/*
 * A whole connection: the input goes over a socket pair to the real state
 * machine and the real commit threads, on a directory of its own; once in one
 * piece, once in pieces. What comes back must be whole answers, the same.
 */
#include <ftw.h>
#include <sys/ioctl.h>

static int
remove_one(const char *path, const struct stat *st, int type, struct FTW *f)
{
	(void)st;
	(void)type;
	if (f->level > 0 && strcmp(path, "states/.guard") != 0 &&
	    strcmp(path, "states/.tmp") != 0 &&
	    strcmp(path, "states/.history") != 0)
		(void)remove(path);
	return 0;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	conf.dir = "states";
	conf.body_max = 4096;
	limits_set();
	signals_set();
	store_open();
	set.n = set.hot = set.base;
	loop.now = clock_us(CLOCK_MONOTONIC) / 1000;
	return 0;
}

/* What has come back so far. */
static void
gather(int fd, struct buf *b)
{
	char some[65536];
	ssize_t n;

	while ((n = recv(fd, some, sizeof(some), MSG_DONTWAIT)) > 0)
		buf_add(b, some, (size_t)n);
}

/* Turns the loop until the connection waits for us, or is gone. */
static void
turns(int fd, struct buf *answers)
{
	static struct conn *ready[64];
	struct conn *c;
	int unread = 1;

	while (set.n > set.base) {
		c = set.at[set.base];
		(void)ioctl(c->fd, FIONREAD, &unread);
		if (c->state != C_JOB && c->state != C_REPLY && unread == 0)
			break;
		loop_turn(ready);
		gather(fd, answers);
	}
	gather(fd, answers);
}

/* One connection's life; its answers are appended to *answers. */
static void
talk(const uint8_t *data, size_t n, unsigned step, unsigned how,
    struct buf *answers)
{
	struct sockaddr_storage nobody = { .ss_family = AF_UNSPEC };
	struct listener l = { .local = how & 1, .path = how & 2 };
	int fd[2];
	size_t i, size;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == -1)
		abort();
	(void)fcntl(fd[0], F_SETFL, O_NONBLOCK);
	conn_open(fd[0], &l, &nobody);
	for (i = 0; i < n; i += size) {
		size = step < n - i ? step : n - i;
		if (send(fd[1], data + i, size, MSG_NOSIGNAL) == -1)
			break;
		turns(fd[1], answers);
		step = step * 1103515245 + 12345;
		step = step % 97 + 1;
	}
	(void)shutdown(fd[1], SHUT_WR);
	while (set.n > set.base) {	/* the end is news, too */
		static struct conn *ready[64];

		loop_turn(ready);
		gather(fd[1], answers);
	}
	gather(fd[1], answers);
	(void)close(fd[1]);
	loop.log.len = 0;
}

/* Checks that there are whole answers, and writes down their statuses. */
static void
statuses_of(struct buf *answers, char *out, size_t size)
{
	char *p, *end, *body, *length;
	long n;

	*out = '\0';
	if (answers->len == 0)
		return;
	p = answers->data;
	end = p + answers->len;
	while (p < end) {
		assert(strncmp(p, "HTTP/1.", 7) == 0);
		body = strstr(p, "\r\n\r\n");
		assert(body != NULL);
		if (strlen(out) + 5 < size)
			(void)snprintf(out + strlen(out), 5, "%.4s", p + 9);
		body[2] = '\0';
		length = strstr(p, "Content-Length: ");
		n = length == NULL ? 0 : atol(length + 16);
		assert(length != NULL || strncmp(p + 9, "204", 3) == 0 ||
		    strncmp(p + 9, "100", 3) == 0);
		p = body + 4;
		/* HEAD has none: the next answer begins, or that was all. */
		if (n > 0 && p < end && strncmp(p, "HTTP/1.", 7) != 0) {
			assert(end - p >= n);
			p += n;
		}
	}
}

static bool
was_cut(const struct buf *b)
{
	return b->len > 0 &&
	    memmem(b->data, b->len, "body is not complete", 20) != NULL;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static uint64_t commits;
	struct buf whole = { 0 }, parts = { 0 };
	unsigned how = choose(&data, &n), step = choose(&data, &n) + 1;
	char a[4096], b[4096];
	int times;
	bool cut;

	for (times = 0; times < 2; times++) {
		if (jobs.batch_sum != commits)
			(void)nftw("states", remove_one, 8, FTW_DEPTH | FTW_PHYS);
		commits = jobs.batch_sum;
		talk(data, n, times == 0 ? (unsigned)n + 1 : step, how,
		    times == 0 ? &whole : &parts);
	}
	/* Whose body is cut off may have been refused before that. */
	cut = was_cut(&whole) || was_cut(&parts);
	statuses_of(&whole, a, sizeof(a));
	statuses_of(&parts, b, sizeof(b));
	/* Who waits is told to continue, who does not is not. A write that is
	 * refused ends the connection if its body had not begun to come. */
	n = strlen(a) < strlen(b) ? strlen(a) : strlen(b);
	if (cut && n >= 4)
		n -= 4;
	if (strstr(a, "100") == NULL && strstr(b, "100") == NULL &&
	    (memcmp(a, b, n) != 0 || (strlen(a) != strlen(b) && !cut &&
	    (n == 0 || a[n - 4] != '4')))) {
		fprintf(stderr, "whole:%s\nparts:%s\n", a, b);
		abort();
	}
	assert(set.n == set.base);
	buf_free(&whole);
	buf_free(&parts);
	return 0;
}
#endif
END
}

# fuzz_seeds: what to start from, and the words to try, in ./seeds and ./words.
fuzz_seeds() {
	local name _status bytes word
	mkdir -p seeds
	requests
	rm -f requests/*.status
	mv requests/* seeds
	rmdir requests
	while IFS=$'\t' read -r name _status bytes; do
		printf '%b' "${bytes//'~'/'\r\n'}" >"seeds/$name"
	done <<'END'
chunks	-	3;a="b"~abc~0~D: e~~
json	-	{"serial":1,"ID":"\\u00e9","lineage":"x","a":[1.5e-3,true,null,"\\ud83d\\ude39"]}
url	-	/a/b%2fc.tfstate?ID=x%20y&q=z
version	-	/-/versions/a/20260102T030405.006Z-7
basic	-	Basic YTpi
users	-	a b read x*\nc sha256:00 write # d\n
proxy	-	PROXY TCP4 1.2.3.4 5.6.7.8 9 10~GET /x HTTP/1.1~Host: a~~
apply	-	LOCK /a HTTP/1.1~Host: a~Content-Length: 10~~{"ID":"i"}PUT /a?ID=i HTTP/1.1~Host: a~Content-Length: 12~~{"serial":1}GET /a HTTP/1.1~Host: a~~UNLOCK /a HTTP/1.1~Host: a~Transfer-Encoding: chunked~~0~~DELETE /a HTTP/1.1~Host: a~~
END
	for word in 'GET ' 'HEAD ' 'PUT /a' 'POST /a?ID=i' 'LOCK ' 'UNLOCK ' \
		'DELETE ' 'OPTIONS * ' ' HTTP/1.1\x0d\x0a' ' HTTP/1.0\x0d\x0a' \
		'Host: a\x0d\x0a' 'Content-Length: 2\x0d\x0a\x0d\x0a{}' '\x0d\x0a\x0d\x0a' \
		'Transfer-Encoding: chunked\x0d\x0a' 'Connection: close\x0d\x0a' \
		'Connection: keep-alive\x0d\x0a' 'Expect: 100-continue\x0d\x0a' \
		'Content-MD5: mZFLkyvTelC5g8XnyQrpOw==\x0d\x0a' 'Origin: a\x0d\x0a' \
		'Accept: text/html\x0d\x0a' 'Accept: application/json\x0d\x0a' \
		'/-/versions/a' '/-/metrics' '/-/ready' '/-/log/a' '/-/changes/a' \
		'/terraform_state/' '/terraform_lock/' '/lock' '.tfstate' '%2f' \
		'{\"ID\":\"i\"}' '{\"serial\":1}' '0\x0d\x0a\x0d\x0a' 'Bearer ' 'sha256:'; do
		printf '"%s"\n' "$word"
	done >words
}

# fuzz_all SECONDS: builds each harness, runs it that long, says how often it
# was called and how much of the code that it aims at it has been through.
# 1 if any found something; what crashed it is then kept, and named.
fuzz_all() {
	local seconds=${1:-60} top name of found=0 flags total part
	command -v clang >/dev/null || { echo "fuzz: SKIP, no clang here"; return; }
	top=$(mktemp -d -p /dev/shm fuzz.XXXXXX 2>/dev/null || mktemp -d)
	cd "$top" || return
	fuzz_source >fuzz.c
	fuzz_seeds
	printf '%-8s %12s %9s  %s\n' harness calls edges 'lines of its target'
	while read -r name of; do
		flags=(-std=c11 -w -g -O1 -pthread "-DFUZZ_${name^^}" -DSLOTS_MAX=16
			-DHEAD_MAX=1024 -DTARGET_MAX=256 -DFIELDS_MAX=8 -DBODY_MEM=64
			-DSPOOL=128 -DHASH_MAX=96 -DLOCK_INFO_MAX=256 -DJSON_DEPTH=12
			-DCHUNK_LINE_MAX=64 -DCACHE_FILE=32 -DRESERVE=0 -DTHREADS_MAX=2
			-DNO_SANDBOX)
		mkdir -p "$name" "$name.d"
		clang "${flags[@]}" -fno-sanitize-recover=undefined \
			-fsanitize=fuzzer,address,undefined -o "$name.fuzz" fuzz.c &&
			clang "${flags[@]}" -fprofile-instr-generate -fcoverage-mapping \
				-fsanitize=fuzzer -o "$name.lines" fuzz.c || return
		(cd "$name.d" && exec "../$name.fuzz" -max_total_time="$seconds" \
			-max_len=4096 -dict=../words -print_final_stats=1 -timeout=20 \
			-artifact_prefix="$top/" "../$name" ../seeds) >"$name.log" 2>&1 || {
			found=1
			echo "$name: FAILED, see $top/$name.log"
			grep -a -m 3 -E 'ERROR|Assertion|runtime error|Test unit' "$name.log"
		}
		(cd "$name.d" && LLVM_PROFILE_FILE=../$name.raw exec "../$name.lines" \
			-runs=0 -timeout=60 "../$name") >/dev/null 2>&1
		llvm-profdata merge -o "$name.prof" "$name.raw" 2>/dev/null &&
			llvm-cov report "$name.lines" -instr-profile="$name.prof" \
				-show-functions "$here/statesrv.c" >"$name.cov" 2>/dev/null
		read -r total part < <(awk -v of="^(.*:)?($of)" '$1 ~ of {
			all += $5; missed += $6 } END { print all + 0, all - missed }' \
			"$name.cov")
		printf '%-8s %12s %9s  %s of %s\n' "$name" \
			"$(sed -n 's/^stat::number_of_executed_units: *//p' "$name.log")" \
			"$(grep -a -o 'cov: [0-9]*' "$name.log" | tail -1 | cut -c 6-)" \
			"$part" "$total"
	done <<'END'
head http_|on_[a-z]|is_token|is_value|span_
chunks chunk_
json json_|meta_on|lock_on
url name_|url_|segment_|page_kind|utf8_|is_version|cut_
basic user_|users_parse|secret_|base64_|glob
wire conn_|body_|reply_|request_|admit|name_|http_|chunk_
END
	cd "$here" || return
	[ "$found" = 1 ] || rm -rf "$top"
	return "$found"
}

# ---- files, URLs, answers, promises: by curl -----------------------------
#
# What DESIGN's tables say, row by row. "PEERS bug N" marks the test against
# a fault that other servers of this kind have.

# body_md5 FILE: its Content-MD5, base64 of the sixteen bytes.
body_md5() {
	# shellcheck disable=SC2059
	printf "$(md5sum <"$1" | cut -c 1-32 | sed 's/../\\x&/g')" | base64
}

# same FILE FILE...: all the same bytes.
same() {
	local one=$1 other
	shift
	for other; do
		cmp "$one" "$other" || fail "$other differs from $one"
	done
}

# holds FILE TEXT: that text, newlines at its end aside.
holds() {
	want "$1" "$2" "$(cat "$1")"
}

# json FILE [FILTER WANTED]: is JSON, and the filter gives that, if jq is here.
json() {
	command -v jq >/dev/null || return 0
	jq . "$1" >/dev/null 2>&1 || fail "$1 is not JSON: $(head -c 400 "$1")"
	[ $# -lt 3 ] || want "$1: $2" "$3" "$(jq -rc "$2" "$1")"
}

# events NAME: what its log tells happened, in one line.
events() {
	sed -n 's/.*"event":"\([a-z-]*\)".*/\1/p' "states/$1.log" | xargs
}

# together FILE...: sends curl's config files at the same moment, each one
# request. Their statuses (and what else they write out) go to stdout.
together() {
	local f
	for f; do
		[ "$f" = "$1" ] || echo next
		cat "$f" && echo silent
	done >together.cfg
	curl -s -Z --parallel-immediate --parallel-max $# -K together.cfg
}

# head_of METHOD PATH FIELD...: a request's head, for raw to send.
head_of() {
	printf '%s\r\n' "$1 $2 HTTP/1.1" 'Host: localhost' "${@:3}" ''
}

# versions NAME: the files of its history, oldest first.
versions() {
	find "states/.history/$1" -maxdepth 1 -name '*.tfstate' 2>/dev/null |
		sort
}

has_versions() {
	[ "$(versions "$1" | wc -l)" = "$2" ]
}

# Issue 2.2: the demo's dialect, GitLab's, Terraform's own, and what lies
# between; each takes the lock, is met by it, writes under it, lets it go.
test_every_dialect_works() {
	local n=0 lock lurl write surl unlock uurl file
	local p=/api/v4/projects/42/terraform/state
	serve
	while read -r lock lurl write surl unlock uurl file <&3; do
		n=$((n + 1))
		state "$n" >sent
		expect 404 GET "$surl"
		expect 200 "$lock" "$lurl" "$(info "run $n")"
		expect 423 "$lock" "$lurl" "$(info other)"
		same answer "states/$file.lock"
		expect 200 GET "${surl%.tfstate}/lock"
		same answer "states/$file.lock"
		expect 423 "$write" "$surl" @sent
		expect 200 "$write" "$surl?ID=run+$n" @sent
		same sent "states/$file.tfstate"
		expect 409 "$unlock" "$uurl" "$(info other)"
		same answer "states/$file.lock"
		expect 200 "$unlock" "$uurl" "$(info "run $n")"
		[ ! -e "states/$file.lock" ] || fail "$file is still locked"
		expect 200 GET "$surl"
		same sent answer
	done 3<<-EOF
		LOCK /a POST /a UNLOCK /a a
		LOCK /b PUT /b UNLOCK /b b
		PUT /terraform_lock/c POST /terraform_state/c DELETE /terraform_lock/c c
		POST $p/prod/lock POST $p/prod DELETE $p/prod/lock ${p#/}/prod
		PUT /e/lock PUT /e DELETE /e/lock e
		LOCK /f/lock POST /f UNLOCK /f/lock f
		LOCK /terraform_lock/g/h PUT /terraform_state/g/h UNLOCK /terraform_lock/g/h g/h
		LOCK /i POST /i DELETE /i i
		LOCK /j%2Fk POST /j%2fk UNLOCK /j%2Fk j/k
		LOCK /l.tfstate POST /l.tfstate UNLOCK /l.tfstate l
		LOCK /terraform_state/m POST /terraform_state/m UNLOCK /terraform_state/m m
		POST /n%2flock POST /n DELETE /n%2Flock n
	EOF
}

# All the URLs of one state are that state, with one lock between them.
test_the_dialects_share_one_state_and_one_lock() {
	local url
	serve
	state 1 >sent
	expect 200 POST /team/prod @sent
	expect 200 PUT /terraform_lock/team/prod "$(info one)"
	for url in /team/prod /team%2Fprod /team/prod.tfstate /te%61m/prod \
		/terraform_state/team/prod '/team/prod?x=1&y='; do
		expect 200 GET "$url"
		same sent answer
		expect 423 LOCK "$url" "$(info two)"
	done
	expect 200 DELETE /team/prod/lock "$(info one)"
	expect 404 GET /terraform_lock/team/prod
}

# PROTOCOL 2: the client sorts its query, so ID stands anywhere in it;
# unknown keys, and keys that look like it, are nothing to us.
test_the_id_is_found_anywhere_in_the_query() {
	local query
	serve
	expect 200 LOCK /demo "$(info me)"
	for query in 'ID=me' 'A=2&ID=me&x=1' '&ID=me&' 'x&y=&ID=me'; do
		expect 200 POST "/demo?$query" "$(state 1)"
	done
	for query in 'id=me' 'XID=me' 'IDX=me' 'x=ID=me' 'ID%3Dme' 'ID' 'ID=' \
		'ID=m' 'ID=mee' 'ID=ME' 'ID=me+' 'ID=%20me'; do
		expect 423 POST "/demo?$query" "$(state 2)"
	done
	holds states/demo.tfstate "$(state 1)"
	# two of them, or a bad escape, could be read in two ways
	for query in 'ID=me&ID=you' 'ID=you&ID=me' 'ID=me%' 'ID=me%4' \
		'ID=me%00'; do
		ask POST "/demo?$query" "$(state 2)"
		[ "$STATUS" != 200 ] || fail "?$query was taken"
	done
	holds states/demo.tfstate "$(state 1)"
}

# An ID is opaque text: what JSON spells and what the query spells must meet
# after decoding, and only then (url.Values.Encode writes a blank as plus).
test_odd_ids_match_only_themselves() {
	local id query wrong
	serve
	while read -r id query wrong <&3; do
		expect 200 LOCK /demo "{\"Who\":\"ID\",\"ID\":\"$id\"}"
		expect 423 POST "/demo?ID=$wrong" "$(state 1)"
		expect 200 POST "/demo?ID=$query" "$(state 1)"
		expect 200 UNLOCK /demo "{\"ID\":\"$id\"}"
	done 3<<-'EOF'
		a\u0020b a+b a%2Bb
		a\u0020b a%20b a%2520b
		a+b a%2Bb a+b
		a&b=c;d a%26b%3Dc%3Bd a&b=c;d
		100% 100%25 100%2525
		%41 %2541 %41
		\"quoted\" %22quoted%22 quoted
		back\\slash back%5Cslash back%5C%5Cslash
		\/a\/b /a/b %5C/a/b
		e:@!$'()*,/? e:@!$'()*,/? e
		caf\u00e9 caf%C3%A9 cafe
		café caf%c3%a9 caf%E9
		\ud800 %EF%BF%BD ?
		\ud83d\ude00 %F0%9F%98%80 %F0%9F%98%81
		-- -- -
	EOF
	# a NUL inside must not cut the comparison short
	ask LOCK /demo '{"ID":"a\u0000b"}'
	[ "$STATUS" = 400 ] || expect 423 POST '/demo?ID=a' "$(state 1)"
}

# PEERS bug 1, promise 3: of 200 clients that LOCK at once, one is told 200;
# PEERS bug 6, 9 and 28: the others get the winner's info, whole.
test_of_200_simultaneous_locks_one_wins() {
	local i name won
	serve
	for name in red green team/blue; do
		for i in $(seq 200); do
			info "$name-$i" >"body.$i"
			printf '%s\n' "url=$URL/$name" request=LOCK "output=got.$i" \
				"data-binary=@body.$i" "write-out=\"%{http_code} $i\\n\"" \
				>"cfg.$i"
		done
		together cfg.* >statuses
		want "$name: winners" 1 "$(grep -c '^200 ' statuses)"
		want "$name: losers" 199 "$(grep -c '^423 ' statuses)"
		won=$(sed -n 's/^200 //p' statuses)
		same "body.$won" "states/$name.lock"
		rm -f "got.$won"
		same "body.$won" got.*
		rm -f got.*
	done
}

# PEERS bug 14, promise 6: the LOCK whose answer was lost is sent again.
# PEERS bug 28: a LOCK that fails leaves the holder's as it was.
test_the_same_lock_again_is_granted() {
	serve
	info mine holder@far >mine
	expect 200 LOCK /demo @mine
	want "length of the answer" 0 "$(wc -c <answer)"
	expect 200 LOCK /demo @mine
	expect 423 LOCK /demo "$(info yours)"
	same mine answer states/demo.lock
	has head '[Cc]ontent-[Tt]ype: application/json'
	expect 200 LOCK /demo @mine
	same mine states/demo.lock
}

# The lock is kept as it was sent, spaces, order, unknown keys and all.
test_the_lock_info_is_kept_byte_for_byte() {
	serve
	{
		printf '\r\n { "Who" : "a\\\\b@c", "x":{"ID":"no"},'
		printf '"y":[1.10,"ID"],\n "ID"\t: "w\\u00e9" } \n'
	} >sent
	expect 200 LOCK /demo @sent
	same sent states/demo.lock
	expect 200 GET /demo/lock
	same sent answer
	expect 423 POST /demo "$(state 1)"
	same sent answer
	expect 409 UNLOCK /demo "$(info other)"
	same sent answer
	expect 200 POST '/demo?ID=w%C3%A9' "$(state 1)"
	same sent states/demo.lock
}

# What LOCK takes: a JSON object with a string ID of 1 to 256 bytes, at most
# 64 KiB of it. Anything else is 400, with the reason, and locks nothing.
test_a_lock_needs_an_id() {
	local body
	serve
	while IFS= read -r body <&3; do
		expect 400 LOCK /demo "$body"
		want "lines for $body" 1 "$(wc -l <answer)"
		[ ! -e states/demo.lock ] || fail "locked by $body"
	done 3<<-'EOF'
		x
		{
		{"ID":"a"
		{"ID":"a"}x
		[{"ID":"a"}]
		"ID"
		null
		{}
		{"ID":""}
		{"ID":5}
		{"ID":null}
		{"ID":["a"]}
		{"ID":{"ID":"a"}}
		{"Info":{"ID":"a"}}
		{'ID':'a'}
		{"ID":"a",}
	EOF
	expect 400 LOCK /demo
	expect 400 LOCK /demo @/dev/null
	expect 400 LOCK /demo "$(info "$(printf 'x%.0s' {1..257})")"
	printf '{"ID":"a","Info":"%*s"}' 65516 '' >big
	want "size of the largest info" 65536 "$(wc -c <big)"
	printf ' ' | cat big - >bigger
	expect 400 LOCK /demo @bigger
	expect 400 LOCK /demo @bigger -H 'Transfer-Encoding: chunked'
	[ ! -e states/demo.lock ] || fail "one of them locked"
	expect 200 LOCK /demo @big
	expect 423 LOCK /demo "$(info b)"
	same big answer
	expect 200 UNLOCK /demo @big
	expect 200 LOCK /demo "$(info "$(printf 'x%.0s' {1..256})")"
	expect 200 POST "/demo?ID=$(printf 'x%.0s' {1..256})" "$(state 1)"
}

# PEERS bug 4 and 5, promise 6: who releases a lock, and with which body.
# Terraform's force-unlock is an empty chunked body, old OpenTofu's none at
# all, new OpenTofu's an object with only the ID.
test_what_releases_a_lock() {
	local status left method body
	serve
	while IFS='|' read -r status left method body <&3; do
		rm -f states/demo.lock
		expect 200 LOCK /demo "$(info mine)"
		case $body in
		chunked) set -- '' -H 'Transfer-Encoding: chunked' \
			-H 'Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg==' -d '' ;;
		zero) set -- @/dev/null ;;
		*) set -- "$body" ;;
		esac
		expect "$status" "$method" /demo/lock "$@"
		[ "$status" != 409 ] || same answer states/demo.lock
		want "$method $body: locks left" "$left" \
			"$(find states -name demo.lock | wc -l)"
		[ "$left" = 1 ] ||
			expect 200 "$method" /demo/lock "$@" # again
	done 3<<-EOF
		200|0|UNLOCK|$(info mine)
		200|0|DELETE|$(info mine)
		200|0|UNLOCK|{"ID":"mine"}
		200|0|UNLOCK|{"ID":"mine","Operation":"","Info":"","Who":"","Version":"","Created":"0001-01-01T00:00:00Z","Path":""}
		200|0|UNLOCK|chunked
		200|0|UNLOCK|zero
		200|0|UNLOCK|
		200|0|DELETE|chunked
		200|0|DELETE|
		409|1|UNLOCK|$(info other)
		409|1|UNLOCK|{"ID":"min"}
		409|1|DELETE|{"ID":"MINE"}
		400|1|UNLOCK|{}
		400|1|UNLOCK|{"ID":""}
		400|1|UNLOCK|mine
		400|1|UNLOCK|{"ID":"mine"
		400|1|DELETE|[]
	EOF
	# on what was never there, and it makes nothing
	expect 200 UNLOCK /never "$(info mine)"
	expect 200 UNLOCK /never
	[ -z "$(find states -name 'never.[lt][of][cs]*')" ] ||
		fail "an UNLOCK made a file"
}

# PROTOCOL 12: unlock_method = DELETE with the state's own URL is an UNLOCK:
# lock info in the body, or (force-unlock) the MD5 of nothing in the head.
test_delete_with_lock_info_is_an_unlock() {
	local body
	serve
	expect 200 POST /demo "$(state 1)"
	expect 200 LOCK /demo "$(info mine)"
	expect 409 DELETE /demo "$(info other)"
	expect 200 DELETE /demo "$(info mine)"
	expect 200 LOCK /demo "$(info mine)"
	expect 200 DELETE /demo '' -H 'Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg=='
	for body in '{}' '{"serial":1}' x ' '; do
		expect 400 DELETE /demo "$body"
	done
	expect 200 GET /demo
	want events "write lock refused unlock lock force-unlock refused refused refused refused" \
		"$(events demo)"
}

# PEERS bug 13 and 25, promise 1: a lock outlives the server, and ages never.
test_locks_survive_a_restart() {
	serve
	info mine >mine
	expect 200 LOCK /team/prod @mine
	expect 200 POST '/team/prod?ID=mine' "$(state 1)"
	halt
	want "exit status" 0 "$STATUS"
	touch -d '400 days ago' states/team/prod.lock
	serve
	expect 423 LOCK /team/prod "$(info other)"
	same mine answer
	expect 423 POST /team/prod "$(state 2)"
	expect 200 POST '/team/prod?ID=mine' "$(state 2)"
	expect 200 LOCK /team/prod @mine
	expect 200 UNLOCK /team/prod @mine
	expect 200 LOCK /team/prod "$(info other)"
}

# DESIGN "On disk": an empty .lock found at start is a LOCK that nobody was
# told of: removed, and reported. Leftovers of uploads are swept.
test_the_start_repairs_what_a_crash_left() {
	grumbles
	mkdir -p states/.tmp states/team
	: >states/team/prod.lock
	info kept >states/kept.lock
	echo half >states/.tmp/upload
	serve
	until_true grep -q team/prod server.err
	hasnt server.err kept
	[ ! -e states/team/prod.lock ] || fail "the empty lock is still there"
	want "left in .tmp" "" "$(find states/.tmp -type f)"
	expect 200 LOCK /team/prod "$(info mine)"
	expect 423 LOCK /kept "$(info mine)"
}

# A .lock made by hand freezes the state: LOCK and every write get made-up
# lock info that all clients can read (an ID, no Created); only force-unlock
# or rm ends it, -b never does.
test_a_lock_file_made_by_hand_freezes_the_state() {
	local line id
	serve -b 1
	while IFS= read -r line <&3; do
		rm -f states/demo.*
		state 1 >states/demo.tfstate
		# shellcheck disable=SC2059
		printf "$line" >states/demo.lock
		touch -d '5 hours ago' states/demo.lock
		expect 423 LOCK /demo "$(info mine)"
		json answer 'has("Created")' false
		has answer '"ID": *"[^"]'
		hasnt answer Created
		id=$(sed 's/.*"ID": *"\([^"]*\)".*/\1/' answer | head -1)
		expect 423 POST /demo "$(state 2)"
		expect 423 POST "/demo?ID=mine" "$(state 2)"
		expect 423 POST "/demo?ID=$id" "$(state 2)"
		expect 423 DELETE /demo
		expect 423 LOCK /demo "$(info "$id")"
		expect 409 UNLOCK /demo "$(info mine)"
		json answer 'has("Created")' false
		holds states/demo.tfstate "$(state 1)"
		expect 200 GET /demo
		expect 200 UNLOCK /demo
		expect 200 POST /demo "$(state 2)"
	done 3<<-'EOF'
		frozen for the audit\n

		say \\"no\\"\\\\ <b>&\tnow\nsecond line
		\xff\xfe\x01binary\x00x
		{"ID":5}
		{"ID":"torn","Who":"a@b
		[]
	EOF
	echo 'frozen for the audit' >states/demo.lock
	expect 423 LOCK /demo "$(info mine)"
	has answer '"Info": *"frozen for the audit"'
	rm states/demo.lock
	expect 200 LOCK /demo "$(info mine)"
}

# Issue 4.10: -b lets a LOCK break an old lock. The broken run can do no
# harm: its writes meet the new lock (423), or none at all (409), promise 4.
test_b_breaks_only_old_locks() {
	serve -b 2
	expect 200 POST /demo "$(state 1)"
	expect 200 LOCK /demo "$(info slow slow@far)"
	expect 423 LOCK /demo "$(info fresh)"
	touch -d '90 minutes ago' states/demo.lock
	expect 423 LOCK /demo "$(info fresh)"
	touch -d '3 hours ago' states/demo.lock
	expect 200 LOCK /demo "$(info slow slow@far)" # its own: not broken
	touch -d '3 hours ago' states/demo.lock
	expect 200 POST '/demo?ID=slow' "$(state 2)"
	expect 200 LOCK /demo "$(info fresh)"
	holds states/demo.lock "$(info fresh)"
	expect 423 POST '/demo?ID=slow' "$(state 3)"
	expect 409 UNLOCK /demo "$(info slow)"
	expect 200 UNLOCK /demo "$(info fresh)"
	expect 409 POST '/demo?ID=slow' "$(state 3)"
	holds states/demo.tfstate "$(state 2)"
	has states/demo.log '"event":"break".*"broken":\{"id":"slow","who":"slow@far","operation":"OperationTypeApply","created":"2026-11-22T13:21:24.079813084Z"\}'
	halt
	serve # the default is never
	expect 200 LOCK /demo "$(info old)"
	touch -d '3000 days ago' states/demo.lock
	expect 423 LOCK /demo "$(info fresh)"
}

# PEERS bug 2, 3 and 24, promise 4: which write lands. PEERS bug 12: what
# was answered 200 was stored, what was not was not.
test_a_write_lands_only_under_its_own_lock() {
	local held query status method url
	serve
	state 1 >old
	state 2 >new
	while read -r held query status <&3; do
		for method in 'POST /t/demo' 'PUT /terraform_state/t/demo'; do
			url=${method#* }
			rm -f states/t/demo.lock
			expect 200 POST "$url" @old
			[ "$held" = - ] || expect 200 LOCK "$url" "$(info "$held")"
			expect "$status" "${method% *}" "$url${query#-}" @new
			case $status in
			200) same new states/t/demo.tfstate ;;
			423) same answer states/t/demo.lock ;;&
			*) same old states/t/demo.tfstate ;;
			esac
			expect 200 GET "$url"
			same answer states/t/demo.tfstate
		done
	done 3<<-'EOF'
		- - 200
		- ?x=1 200
		- ?ID=gone 409
		- ?ID= 409
		- ?ID 409
		mine ?ID=mine 200
		mine - 423
		mine ?ID= 423
		mine ?ID=other 423
		mine ?ID=mine%20 423
	EOF
	rm states/t/demo.lock
	ask POST /t/demo?ID=gone @new
	[ "$(wc -l <answer)" = 1 ] || fail "no reason: $(cat answer)"
}

# A write that its head already condemns is refused before its body is read
# (PEERS bug 20): these heads promise a megabyte and send none.
test_a_refusal_does_not_wait_for_the_body() {
	local status method url length
	serve -m 1
	expect 200 LOCK /held "$(info mine)"
	while read -r status method url length <&3; do
		want "$method $url" "$status" "$(head_of "$method" "$url" \
			"Content-Length: $length" | raw_status)"
	done 3<<-'EOF'
		423 POST /held 1000000
		423 PUT /held?ID=other 1000000
		409 POST /free?ID=gone 1000000
		413 POST /free 1048577
		400 LOCK /free 65537
		400 POST /.x 1000000
		405 POST / 1000000
	EOF
}

# Promise 4, PEERS bug 18: DELETE obeys the lock, deletes one state only, and
# that into the history.
test_delete_moves_one_state_into_the_history() {
	serve
	state 1 >sent
	expect 404 DELETE /team
	expect 200 POST /team/prod @sent
	expect 200 POST /team/prod/eu @sent
	expect 404 DELETE /team
	expect 200 LOCK /team/prod "$(info mine)"
	expect 423 DELETE /team/prod
	same answer states/team/prod.lock
	expect 423 DELETE '/team/prod?ID=other'
	expect 200 GET /team/prod
	expect 200 DELETE '/team/prod?ID=mine'
	expect 404 GET /team/prod
	expect 404 DELETE '/team/prod?ID=mine'
	expect 200 UNLOCK /team/prod "$(info mine)"
	same sent "$(versions team/prod)"
	expect 200 GET /team/prod/eu
	expect 200 POST /team/prod @sent # and back
	ask DELETE '/team/prod?ID=gone'
	[ "$STATUS" != 200 ] || fail "deleted under a broken lock"
	expect 200 DELETE /terraform_state/team/prod
	want versions 2 "$(versions team/prod | wc -l)"
}

# Promise 5, PEERS bug 10: no byte is touched, whichever way it came. The
# last two stream through a file.
test_what_was_sent_is_what_is_served() {
	local f
	serve
	printf '{"b":1.10,"a":12345678901234567890,"e":1E+400,"z":-0.0,"a":2}' >s1
	printf ' {\r\n\t"k": "\\u00e9\\/\xc3\xa9\\ud83d\\ude00",\r\n"":[ ] }\r\n\n' >s2
	printf '{}' >s3
	printf '{"serial":7,"lineage":"x","meta":{"k":"v"},"encrypted_data":"QUJD","encryption_version":"v0"}' >s4
	{ printf '{"x":"' && head -c 49152 /dev/urandom | base64 -w 0 &&
		printf '"}'; } >s5
	{ printf '{"x":"' && head -c 3000000 /dev/urandom | base64 -w 0 &&
		printf '"}\n\n'; } >s6
	for f in s1 s2 s3 s4 s5 s6; do
		expect 200 POST "/s/$f" @"$f" -H "Content-MD5: $(body_md5 "$f")"
		expect 200 GET "/s/$f"
		same "$f" answer "states/s/$f.tfstate"
		has head "^[Cc]ontent-[Ll]ength: $(stat -c %s "$f")"
		expect 200 HEAD "/s/$f"
		has head "^[Cc]ontent-[Ll]ength: $(stat -c %s "$f")"
		expect 200 PUT "/c/$f" @"$f" -H 'Transfer-Encoding: chunked' \
			-H "Content-MD5: $(body_md5 "$f")"
		same "$f" "states/c/$f.tfstate"
	done
}

# Promise 5: a large body never lives in memory whole.
test_memory_does_not_grow_with_the_state() {
	local before
	serve
	{ printf '{"x":"' && head -c 64M /dev/zero | tr '\0' x &&
		printf '"}'; } >big
	expect 200 POST /small "$(state 1)"
	expect 200 GET /small
	before=$(awk '/VmHWM/ { print $2 }' "/proc/$PID/status")
	expect 200 POST /big @big
	expect 200 GET /big
	same big answer
	expect 200 DELETE /big
	[ "$(awk '/VmHWM/ { print $2 }' "/proc/$PID/status")" -lt \
		$((before + 12000)) ] || fail "memory grew by more than 12 MB"
}

# Content-MD5 is verified on state and lock, small and large, framed either
# way; wrong or unreadable is 400 and changes nothing.
test_content_md5_is_checked() {
	local size md5 framing
	serve
	state 1 >s1
	state 2 >s2
	{ state 3 && printf '%*s' 200000 ''; } >s3
	expect 200 POST /demo @s1
	for size in s2 s3; do
		for framing in X-None:x 'Transfer-Encoding: chunked'; do
			while IFS= read -r md5 <&3; do
				expect 400 POST /demo @"$size" -H "$framing" \
					-H "Content-MD5: $md5"
				has answer MD5
				same s1 states/demo.tfstate
			done 3<<-EOF
				$(body_md5 s1)
				1B2M2Y8AsgTpgAmY7PhCfg==
				$(md5sum <"$size" | cut -c 1-32)
				$(body_md5 "$size")=
				$(body_md5 "$size" | cut -c 1-20)
				$(body_md5 "$size" | tr -d =)
				!$(body_md5 "$size" | cut -c 2-)
			EOF
		done
	done
	expect 200 POST /demo @s3 -H "content-md5: $(body_md5 s3)"
	same s3 states/demo.tfstate
	info mine >mine
	expect 400 LOCK /demo @mine -H "Content-MD5: $(body_md5 s1)"
	[ ! -e states/demo.lock ] || fail "locked in spite of the MD5"
	expect 200 LOCK /demo @mine -H "Content-MD5: $(body_md5 mine)"
	expect 400 UNLOCK /demo @mine -H "Content-MD5: $(body_md5 s1)"
	same mine states/demo.lock
	expect 200 UNLOCK /demo @mine -H "Content-MD5: $(body_md5 mine)"
}

# Promise 8, PEERS bug 7 and 19: a body that is not one JSON object is 400,
# says at which byte, and the old state stays, in a small body or a large.
test_a_body_that_is_no_json_object_is_refused() {
	local at body padded
	serve
	state 1 >old
	expect 200 POST /demo @old
	while IFS='|' read -r at body <&3; do
		# shellcheck disable=SC2059
		printf "$body" >body
		expect 400 POST /demo @body
		has answer "byte $at([^0-9]|\$)"
		want "lines for $body" 1 "$(wc -l <answer)"
		# the same, far into a body that goes through a file
		{ printf '%*s' 100000 '' && cat body; } >padded
		padded=$((at + 100000))
		expect 400 POST /demo @padded
		has answer "byte $padded([^0-9]|\$)"
		same old states/demo.tfstate
	done 3<<-'EOF'
		0|
		0|[]
		0|null
		0|"x"
		0|17
		0|hello
		0|\xef\xbb\xbf{}
		1|{
		1|{,}
		6|{"a":1
		7|{"a":1,
		2|{}x
		3|{} {}
		7|{"a":1,}
		6|{"a":01}
		5|{"a":.5}
		8|{"a":truE}
		6|{"a":"\x01"}
		6|{"a":"\xff"}
		7|{"a":"\\x"}
	EOF
	expect 400 POST /demo @/dev/null
	same old states/demo.tfstate
	want "files left behind" "" "$(find states/.tmp -type f)"
}

# PEERS bug 7: a client that goes away in the middle of its body leaves the
# old state, and no upload, behind.
test_an_upload_that_breaks_off_changes_nothing() {
	local size
	serve
	state 1 >old
	expect 200 POST /demo @old
	for size in 60 70000 5000000; do
		{
			head_of POST /demo "Content-Length: $size"
			printf '{"x":"'
			head -c $((size / 2)) /dev/zero | tr '\0' x
		} >half
		exec 8<>"/dev/tcp/127.0.0.1/$PORT"
		cat half >&8
		exec 8>&-
		{
			head_of POST /demo 'Transfer-Encoding: chunked'
			printf '8\r\n{"x":1}\n\r\n'
		} >half
		exec 8<>"/dev/tcp/127.0.0.1/$PORT"
		cat half >&8
		exec 8>&-
	done
	until_true no_uploads
	expect 200 GET /demo
	same old answer states/demo.tfstate
	hasnt server.log 'method=(POST|PUT).*status=200.*method=POST'
}

no_uploads() {
	[ -z "$(find states/.tmp -type f)" ]
}

# 411 without a length, 413 over -m: told, and the old state stays.
test_sizes_are_limited_and_the_limit_is_told() {
	serve -m 1
	state 1 >old
	expect 200 POST /demo @old
	expect 411 POST /demo
	expect 411 PUT /demo
	{ printf '{"x":"' && head -c 1048568 /dev/zero | tr '\0' x &&
		printf '"}'; } >fits
	want "size" 1048576 "$(wc -c <fits)"
	expect 200 POST /fits @fits
	expect 200 POST /fits @fits -H 'Transfer-Encoding: chunked'
	echo >>fits
	expect 413 POST /demo @fits
	has answer '1 MiB|1048576'
	expect 413 POST /demo @fits -H 'Transfer-Encoding: chunked'
	same old states/demo.tfstate
	want "files left behind" "" "$(find states/.tmp -type f)"
}

# Promise 2, PEERS bug 11: 404 means that there is no such file, and nothing
# else; terraform would take it for "no state yet". A GET makes nothing.
test_only_an_absent_file_is_404() {
	grumbles
	mkdir -p states elsewhere
	state 1 >elsewhere/state.tfstate
	: >states/empty.tfstate
	mkdir states/folder.tfstate
	mkfifo states/fifo.tfstate
	ln -s ../elsewhere/state.tfstate states/link.tfstate
	ln -s nowhere states/dangling.tfstate
	ln -s loop.tfstate states/loop.tfstate
	ln -s ../elsewhere states/out
	serve
	for name in empty folder fifo link dangling loop out/state; do
		expect 500 GET "/$name"
		want "lines for $name" 1 "$(wc -l <answer)"
		hasnt answer lineage
	done
	ask POST /out/state "$(state 2)"
	ask POST /link "$(state 2)"
	ask LOCK /out/new "$(info x)"
	ask DELETE /out/state
	want "outside" state.tfstate "$(ls -A elsewhere)"
	holds elsewhere/state.tfstate "$(state 1)"
	find states >before
	expect 404 GET /no/such/state
	expect 404 GET /no
	expect 404 HEAD /no/such/state
	expect 404 GET /no/lock
	expect 404 GET /-/versions/no/20260101T000000.000Z-1
	expect 404 DELETE /no/such/state
	find states >after
	same before after
}

# The directory may be edited by hand: what is there is what is served.
test_a_state_copied_in_is_served_at_once() {
	serve
	mkdir -p states/team
	state 5 >states/team/prod.tfstate
	expect 200 GET /team/prod
	same states/team/prod.tfstate answer
	state 6 >new
	cp new states/team/prod.tfstate
	expect 200 GET /team/prod
	same new answer
	expect 200 POST /team/prod "$(state 7)"
	same new "$(versions team/prod)"
	rm states/team/prod.tfstate
	expect 404 GET /team/prod
	echo 'not json' >states/odd.tfstate
	expect 200 GET /odd
	same states/odd.tfstate answer
}

# Promise 6: lost answers are asked for again: every repeat says 200.
test_repeats_do_no_harm() {
	local i
	serve
	for i in 1 2 3; do
		expect 200 LOCK /demo "$(info mine)"
	done
	for i in 1 2 3; do
		expect 200 POST '/demo?ID=mine' "$(state 4)"
	done
	for i in 1 2 3; do
		expect 200 UNLOCK /demo "$(info mine)"
	done
	holds states/demo.tfstate "$(state 4)"
	has states/demo.log '"event":"lock"'
}

# PEERS bug 29 and 30: twenty names at once mix nothing up, and a write does
# not sweep away a lock taken meanwhile.
test_requests_at_once_do_not_mix() {
	local i
	serve
	for i in $(seq 20); do
		state "$i" "lineage-$i" >"body.$i"
		info "run-$i" >"lock.$i"
		expect 200 LOCK "/t/$i" @"lock.$i"
		printf '%s\n' "url=$URL/t/$i?ID=run-$i" request=POST \
			"data-binary=@body.$i" "write-out=\"%{http_code} $i\\n\"" \
			>"cfg.$i"
		printf '%s\n' "url=$URL/t/$i" request=LOCK "data-binary=@lock.$i" \
			output=/dev/null "write-out=\"%{http_code} $i\\n\"" >"cfg.$i.b"
		printf '%s\n' "url=$URL/t/$i" request=POST "data-binary=@body.1" \
			output=/dev/null "write-out=\"%{http_code} x\\n\"" >"cfg.$i.c"
	done
	together cfg.* >statuses
	want "writes and locks done" 40 "$(grep -c '^200 [0-9]' statuses)"
	want "foreign writes refused" 20 "$(grep -c '^423 x' statuses)"
	for i in $(seq 20); do
		same "body.$i" "states/t/$i.tfstate"
		same "lock.$i" "states/t/$i.lock"
		expect 200 GET "/t/$i"
		same "body.$i" answer
	done
}

# PEERS bug 9: under a stream of locks and unlocks, whoever looks sees no
# lock or a whole one. (In a build whose commit threads write slowly.)
test_nobody_sees_half_a_lock() {
	local i busy
	need "${CC:-cc}"
	cat >slow.c <<-'EOF'
		#define _GNU_SOURCE
		#include <sys/syscall.h>
		#include <unistd.h>
		ssize_t slow_write(int fd, const void *p, size_t n)
		{
			if (getpid() != syscall(SYS_gettid))
				usleep(5000);
			return write(fd, p, n);
		}
	EOF
	"${CC:-cc}" -std=c11 -Dwrite=slow_write -c "$here/statesrv.c"
	"${CC:-cc}" -std=c11 -pthread -o slow slow.c statesrv.o
	STATESRV=./slow serve
	for i in 1 2 3 4; do
		info "run-$i" >"body.$i"
	done
	(
		for _ in 1 2 3 4 5; do
			for i in 1 2 3 4; do
				for how in LOCK UNLOCK LOCK UNLOCK; do
					printf '%s\n' "url=$URL/demo" "request=$how" \
						"data-binary=@body.$i" output=/dev/null next
				done
			done
			printf 'url=%s/-/healthy\noutput=/dev/null\n' "$URL"
			echo next
		done | sed '$d' >storm
		curl -s -K storm
	) &
	busy=$!
	echo "$busy" >>"$T/pids"
	while kill -0 "$busy" 2>/dev/null; do
		ask GET /
		hasnt answer frozen
		ask GET /demo/lock
		[ "$STATUS" != 404 ] || continue
		has answer 'run-[1-4]'
		same answer "body.$(sed 's/.*run-\(.\).*/\1/' answer)"
	done
	wait "$busy"
}

# "On disk": the names that are taken, and the file each becomes. A name is
# decoded once; a plus is a plus.
test_names_become_paths() {
	local url file long=
	serve
	long=$(printf 'n%.0s' {1..200})
	while read -r url file <&3; do
		expect 200 POST "$url" "$(state 1)"
		[ -f "states/$file.tfstate" ] || fail "$url: no $file"
		expect 200 LOCK "$url" "$(info x)"
		[ -f "states/$file.lock" ] || fail "$url: no $file.lock"
		expect 200 GET "$url?q=1"
	done 3<<-EOF
		/a.b a.b
		/a-b_c~d a-b_c~d
		/a+b a+b
		/%2541 %41
		/x%3Fy%23z x?y#z
		/a:b@c,d;e=f a:b@c,d;e=f
		/%C3%A9t%c3%a9 été
		/été/x été/x
		/1/2/3/4/5/6/7/8 1/2/3/4/5/6/7/8
		/$long $long
		/a/$long/b a/$long/b
		/locks locks
		/lock/x lock/x
		/Lockfile.LOCK Lockfile.LOCK
		/tfstate tfstate
		/terraform_states/x terraform_states/x
	EOF
}

# PEERS bug 15, 16 and 17: names that would meet, hide, or climb are refused
# by every method before anything is opened, in every spelling.
test_bad_names_are_refused() {
	local url method long
	mkdir states
	state 1 >outside.tfstate
	serve
	long=$(printf 'n%.0s' {1..201})
	find states >before
	while read -r url <&3; do
		for method in GET POST LOCK UNLOCK DELETE; do
			ask "$method" "$url" "$(info x)"
			case $STATUS in
			400 | 414) ;;
			404 | 405) [ "$method$url" != GET/lock ] || continue ;;&
			*) fail "$method $url: $STATUS" ;;
			esac
		done
	done 3<<-EOF
		/..
		/../outside
		/a/../../outside
		/%2e%2e/outside
		/%2E%2e%2foutside
		/a%2f..%2f..%2foutside
		/..%5coutside
		/a%5cb
		/.
		/a/./b
		/a//b
		/a/
		/a%2F
		//a
		/%2Fetc/passwd
		/.hidden
		/a/.hidden/b
		/.tmp/x
		/.history/x
		/.guard
		/-x
		/a/-x
		/a.lock
		/a.log
		/a.log.tfstate
		/a.lock/b
		/a.tfstate/b
		/a.tfstate.tfstate
		/a%00b
		/a%00.tfstate
		/a%0ab
		/a%0D%0Ab
		/a%7fb
		/a%1b
		/%ff
		/%c0%af
		/%c0%ae%c0%ae/x
		/%ed%a0%80
		/%f5%80%80%80
		/a%
		/a%4
		/a%zz
		/%u0041
		/1/2/3/4/5/6/7/8/9
		/$long
		/a/$long
		/${long:1}/${long:1}/${long:1}/${long:1}/${long:1}
		/terraform_state/../x
		/terraform_lock/%2e%2e/x
		/terraform_state/.x
	EOF
	find states >after
	same before after
}

# What is not a state, and what a method may not do: never a redirect.
test_wrong_urls_and_methods_are_told() {
	local status method url
	serve
	expect 200 POST /demo "$(state 1)"
	while read -r status method url <&3; do
		expect "$status" "$method" "$url"
		case $status in
		405 | 204) has head '^[Aa]llow: .*GET' ;;
		esac
		hasnt head '^[Ll]ocation:'
		[ "$status" != 204 ] || hasnt head '^[Cc]ontent-[Ll]ength: [1-9]'
	done 3<<-'EOF'
		204 OPTIONS /demo
		204 OPTIONS /demo/lock
		204 OPTIONS /
		204 OPTIONS /-/healthy
		405 DELETE /
		405 POST /
		405 LOCK /
		405 PUT /-/healthy
		405 DELETE /-/versions/demo
		405 LOCK /-/metrics
		405 UNLOCK /-/log/demo
		501 PATCH /demo
		501 PATCH /
		501 get /demo
		501 PROPFIND /demo
		404 GET /-/nothing
		404 GET /-/
		400 GET /-/versions/demo/../demo
		404 GET /-/versions/demo/20260101T000000.000Z-1
		200 HEAD /
		200 HEAD /-/healthy
		200 GET /?anything=goes
		200 GET /demo?ID=x
	EOF
	expect 204 OPTIONS /demo
	for method in GET HEAD POST PUT DELETE LOCK UNLOCK; do
		has head "^[Aa]llow:.*$method"
	done
}

# Every refusal says why: one plain line to the client (the holder's JSON for
# 423), the same in the request log.
test_every_refusal_says_why() {
	local status method url body
	serve
	expect 200 LOCK /held "$(info mine)"
	while read -r status method url body <&3; do
		expect "$status" "$method" "$url" "$body"
		until_true grep -Eq \
			"method=($method|-) .*status=$status .*why=\"[^\"]" server.log
		case $status in
		423) same answer states/held.lock ;;
		*)
			want "lines" 1 "$(wc -l <answer)"
			has head '^[Cc]ontent-[Tt]ype: text/plain'
			;;
		esac
	done 3<<-'EOF'
		404 GET /none
		400 GET /.x
		405 DELETE /
		501 PATCH /none
		400 POST /none nonsense
		409 POST /none?ID=gone {}
		423 POST /held {}
		423 LOCK /held {"ID":"other"}
		400 LOCK /none {}
		411 POST /none
		404 DELETE /none
	EOF
	# RFC 9110 13.2 and 14.5: not done as if there were no condition
	expect 412 PUT /none {} -H 'If-None-Match: *'
	expect 412 DELETE /none '' -H 'If-Match: "x"'
	expect 412 LOCK /none "$(info i)" -H 'If-Unmodified-Since: today'
	expect 400 PUT /none {} -H 'Content-Range: bytes 0-1/9'
	expect 404 GET /none '' -H 'If-None-Match: *'
}

# Promise 7: what is replaced or deleted is in the history, the newest -k.
# The present one is not counted.
test_the_history_keeps_the_newest() {
	local i
	serve -k 3
	for i in 1 2 3 4 5 6; do
		expect 200 POST /team/prod "$(state "$i")"
	done
	until_true has_versions team/prod 3 # pruned behind the answer
	i=3
	versions team/prod >files
	while read -r file; do
		holds "$file" "$(state $i)"
		[[ ${file##*/} =~ ^20[0-9]{6}T[0-9]{6}\.[0-9]{3}Z-$i\.tfstate$ ]] ||
			fail "odd name $file"
		i=$((i + 1))
	done <files
	echo mine >states/.history/team/prod/notes # nobody else's to prune
	echo mine >states/.history/team/prod/keep.tfstate
	expect 200 DELETE /team/prod
	until_true has_versions team/prod 4
	holds states/.history/team/prod/notes mine
	holds states/.history/team/prod/keep.tfstate mine
	rm states/.history/team/prod/keep.tfstate
	want "the deleted one" 6 \
		"$(versions team/prod | tail -1 | sed 's/.*-\(.*\).tfstate/\1/')"
	cp "$(versions team/prod | head -1)" states/team/prod.tfstate # the way back
	expect 200 GET /team/prod
	holds answer "$(state 4)"
}

# -k 0 keeps none; fewer than before is obeyed at the next write; serials
# that are absent or odd make a file name all the same.
test_the_history_obeys_k_and_any_serial() {
	local body
	serve
	for body in '{"serial":-1}' '{"serial":1e3}' '{"serial":"../../x"}' \
		'{"serial":123456789012345678901234567890}' '{"serial":{}}' \
		'{}' '{"serial":1.5,"lineage":7}' '{"a":{"serial":3}}'; do
		expect 200 POST /demo "$body"
	done
	want versions 7 "$(versions demo | wc -l)"
	want "strays" "" "$(find . -name 'x*')"
	expect 200 GET /-/versions/demo '' -H 'Accept: application/json'
	json answer length 7
	halt
	serve -k 2
	expect 200 POST /demo "$(state 9)"
	until_true has_versions demo 2
	halt
	serve -k 0
	expect 200 POST /other "$(state 1)"
	expect 200 POST /other "$(state 2)"
	expect 200 DELETE /other
	want versions "" "$(versions other)"
}

# Issue 4.2: writes in one millisecond do not collide: all are kept.
test_writes_in_one_millisecond_are_all_kept() {
	local i
	serve -k 100
	for i in $(seq 40); do
		state 1 "lineage-$i-" >"body.$i"
		printf '%s\n' "url=$URL/demo" request=POST \
			"data-binary=@body.$i" "write-out=%{http_code}\\n" >"cfg.$i"
	done
	together cfg.* >statuses
	want "writes done" 40 "$(grep -c '^200$' statuses)"
	want "states there" 40 "$(cat states/demo.tfstate \
		states/.history/demo/*.tfstate | grep -o 'lineage-[0-9]*-' |
		sort -u | wc -l)"
}

# The history over HTTP: the list, newest first, and one, byte for byte;
# `a` and `a/b` do not meet in it (PEERS bug 15).
test_versions_are_listed_and_served() {
	local i id
	grumbles # a link is in the way
	serve
	for i in 1 2 3; do
		expect 200 POST /a "$(state $i)"
		expect 200 POST /a/b "$(state 1$i)"
	done
	expect 200 GET /-/versions/a '' -H 'Accept: application/json'
	json answer 'map(.serial)' '[2,1]'
	json answer '.[0].size' 180
	json answer '.[0].time[:2]' 20
	want "versions of a" 2 "$(grep -o '"id":' answer | wc -l)"
	expect 200 GET /-/versions/a
	id=$(grep -o '20[0-9]*T[0-9.]*Z-2' answer | head -1)
	holds "states/.history/a/$id.tfstate" "$(state 2)"
	for i in "a/$id" "a/$id.tfstate" "%61/$id"; do
		expect 200 GET "/-/versions/$i"
		holds answer "$(state 2)"
	done
	expect 404 GET "/-/versions/b/$id"
	expect 404 GET "/-/versions/a/b/$id"
	expect 404 GET "/-/versions/a/${id}0"
	expect 200 GET /-/versions/a/b '' -H 'Accept: application/json'
	json answer 'map(.serial)' '[12,11]'
	for i in 1 2; do	# the largest serial there is
		expect 200 POST /large "$(state 18446744073709551615)"
	done
	id=$(basename "$(versions large)" .tfstate)
	expect 200 GET "/-/versions/large/$id"
	holds answer "$(state 18446744073709551615)"
	echo secret >outside.tfstate
	ln -s ../../../outside.tfstate \
		states/.history/a/20260101T000000.000Z-1.tfstate
	ask GET /-/versions/a/20260101T000000.000Z-1
	[ "$STATUS" != 200 ] || fail "a link out of the tree was followed"
	expect 200 GET /-/log/a
	same states/a.log answer
}

# resource TYPE NAME VALUE [MODULE [KEY]]: one resource of a state.
resource() {
	printf '{%s"mode":"managed","type":"%s","name":"%s","provider":"p","instances":[{%s"attributes":{"v":%s}}]}' \
		"${4:+\"module\":\"$4\",}" "$1" "$2" "${5:+\"index_key\":$5,}" "$3"
}

# Issue 6.3: what a version changed against the one before: by address.
test_changes_are_told_by_address() {
	local a b
	serve
	a=$(resource t one 1),$(resource t two 2)
	b=$(resource t one 9),$(resource t three 3 module.m '"k"')
	expect 200 POST /demo "{\"version\":4,\"serial\":1,\"resources\":[$a]}"
	expect 200 POST /demo "{\"version\":4,\"serial\":2,\"resources\":[$b]}"
	expect 200 GET /-/changes/demo '' -H 'Accept: application/json'
	json answer '.name, .added, .removed, .changed' 'demo
["module.m.t.three[\"k\"]"]
["t.two"]
["t.one"]'
	expect 200 GET /-/changes/demo
	has answer '^\+ module\.m\.t\.three\["k"\]$'
	has answer '^- t\.two$'
	has answer '^~ t\.one$'
	a=$(versions demo | head -1)
	a=${a##*/}
	expect 200 GET "/-/changes/demo/${a%.tfstate}"
	has answer '^\+ t\.one$'
	has answer '^\+ t\.two$'
	hasnt answer '^[-~]'
	expect 404 GET /-/changes/none
	expect 404 GET /-/changes/demo/20260101T000000.000Z-1
	# states that only look like states are no reason to fall over
	for b in '{"resources":5}' '{"resources":[5,{},{"type":{}}]}' '{}' \
		'{"resources":[{"type":"t","name":"n","instances":"x"}]}'; do
		expect 200 POST /demo "$b"
		expect 200 GET /-/changes/demo
	done
}

# Issue 4.3: the state's log tells a retrospective who did what, when, under
# which lock, and what was answered.
test_the_states_log_tells_the_story() {
	local n=0 pattern
	serve
	state 1 >s1
	expect 200 POST /team/prod @s1
	expect 200 LOCK /team/prod "$(info run-1 ann@laptop)"
	expect 423 LOCK /team/prod "$(info run-2 bob@ci)"
	expect 200 POST '/team/prod?ID=run-1' "$(state 2)"
	expect 423 POST '/team/prod?ID=run-2' "$(state 3)"
	expect 400 POST '/team/prod?ID=run-1' '{"serial":'
	expect 200 UNLOCK /team/prod "$(info run-1 ann@laptop)"
	expect 200 LOCK /team/prod "$(info run-3)"
	expect 200 UNLOCK /team/prod
	expect 409 POST '/team/prod?ID=run-3' "$(state 3)"
	expect 200 DELETE /team/prod
	while IFS= read -r pattern <&3; do
		n=$((n + 1))
		sed -n "${n}p" states/team/prod.log >line
		json line
		has line "$pattern"
		has line '^\{"time":"20[-0-9T:.]*Z",.*"client":"127.0.0.1:[0-9]+"'
	done 3<<-EOF
		"event":"write","method":"POST","status":200.*"serial":1,"lineage":"3f7d1c7e-.*"size":$(wc -c <s1),"md5":"$(md5sum <s1 | cut -c 1-32)"
		"event":"lock","method":"LOCK","status":200.*"id":"run-1","who":"ann@laptop","operation":"OperationTypeApply"
		"event":"refused","method":"LOCK","status":423.*"id":"run-2","who":"bob@ci".*"why":"
		"event":"write",.*"id":"run-1".*"serial":2.*"old_serial":1,"old_lineage":"3f7d1c7e
		"event":"refused","method":"POST","status":423.*"id":"run-2".*"why":"
		"event":"refused","method":"POST","status":400.*"id":"run-1".*"why":".*byte
		"event":"unlock","method":"UNLOCK","status":200.*"id":"run-1","who":"ann@laptop"
		"event":"lock",.*"id":"run-3"
		"event":"force-unlock",.*"status":200.*"broken":\{"id":"run-3","who":"test@here","operation":"OperationTypeApply","created":"2026-11-22T13:21:24.079813084Z"
		"event":"refused",.*"status":409.*"id":"run-3".*"why":"
		"event":"delete","method":"DELETE","status":200.*"old_serial":2
	EOF
	want "lines" "$n" "$(wc -l <states/team/prod.log)"
}

# Whatever a client puts in its lock info, its query or its name, a log line
# stays one line of valid JSON, and one line of logfmt.
test_hostile_text_stays_inside_its_log_line() {
	local n id
	serve
	n=$(wc -l <server.log)
	for id in 'a\n{\"event\":\"delete\"}' 'a\" b=\"c' '\u001b[31m' '\u2028' \
		'\ud83d\ude00' "back\\\\"; do
		ask LOCK /demo "{\"ID\":\"$id\",\"Who\":\"$id\",\"Operation\":\"$id\"}"
		ask LOCK /demo "$(info other)"
		ask UNLOCK /demo
		n=$((n + 3))
	done
	ask POST '/demo?ID=a%0ab%22%20status=200' '{}' -A $'x\ty' -e 'http://"'
	ask GET /demo '' -u $'a\nb" x=y:z' -H 'X-Forwarded-For: 6.6.6.6'
	ask GET '/a%22%20why=%22b'
	ask GET '/a%0ab'
	n=$((n + 4))
	until_true log_has_lines "$n"
	want "lines in the request log" "$n" "$(wc -l <server.log)"
	hasnt server.log '^[^st]|6\.6\.6\.6'
	LC_ALL=C hasnt server.log '[[:cntrl:]]'
	LC_ALL=C hasnt states/demo.log '[[:cntrl:]]|"event":"delete"'
	while IFS= read -r line; do
		json <(printf '%s\n' "$line")
	done <states/demo.log
}

log_has_lines() {
	[ "$(wc -l <server.log)" -ge "$1" ]
}

# Issue 6.4: one line a request, in logfmt.
test_the_request_log_is_one_line_each() {
	local n=1 pattern
	echo 'ci pass write' >users
	chmod 600 users
	serve -u users
	expect 200 POST /team/prod "$(state 1)" -u ci:pass
	expect 200 LOCK /team/prod "$(info run-1)" -u ci:pass
	expect 200 GET /team/prod '' -u ci:pass
	expect 423 POST '/team/prod?ID=other' "$(state 2)" -u ci:pass
	expect 200 GET /-/healthy
	expect 401 GET /team/prod
	expect 200 GET / '' -u ci:pass
	until_true log_has_lines 8
	while IFS= read -r pattern <&3; do
		n=$((n + 1))
		sed -n "${n}p" server.log >line
		has line "^time=20[-0-9]+T[0-9:]+\.[0-9]{3}Z client=127.0.0.1:[0-9]+ $pattern\$"
	done 3<<-EOF
		user=ci method=POST name=team/prod status=200 bytes=[0-9]+ ms=[0-9]+\.[0-9]+
		user=ci method=LOCK name=team/prod status=200 bytes=[0-9]+ ms=[0-9.]+ id=run-1
		user=ci method=GET name=team/prod status=200 bytes=$(wc -c <states/team/prod.tfstate) ms=[0-9.]+
		user=ci method=POST name=team/prod status=423 bytes=[0-9]+ ms=[0-9.]+ id=other why=".*"
		method=GET path=/-/healthy status=200 bytes=[0-9]+ ms=[0-9.]+
		method=GET name=team/prod status=401 bytes=[0-9]+ ms=[0-9.]+ why=".*"
		user=ci method=GET path=/ status=200 bytes=[0-9]+ ms=[0-9.]+
	EOF
}

# Promise 9, PEERS bug 22: neither a state nor a credential in any log.
test_no_secret_reaches_a_log() {
	printf 'ann hunter2 write\nbob sha256:%s read\n' \
		"$(printf swordfish | sha256sum | cut -c 1-64)" >users
	chmod 600 users
	serve -u users
	state 1 | sed 's/{}/{"p":{"value":"opensesame"}}/' >sent
	expect 200 POST /demo @sent -u ann:hunter2
	expect 400 POST /demo '{"x":"opensesame"' -u ann:hunter2
	expect 400 POST /demo opensesame -u ann:hunter2
	expect 400 LOCK /demo '{"opensesame":1}' -u ann:hunter2
	expect 200 GET /demo '' -H 'Authorization: Bearer hunter2'
	expect 401 GET /demo '' -H 'Authorization: Bearer hunter22'
	expect 200 GET /demo '' -u bob:swordfish
	expect 403 POST /demo @sent -u bob:swordfish
	expect 401 GET /demo '' -H 'Authorization: hunter2'
	ask GET /demo '' --request-target \
		"http://ann:hunter2@127.0.0.1:$PORT/demo"
	cat server.log server.err states/*.log >logs
	hasnt logs 'hunter2|opensesame|swordfish|sha256|[Bb]earer|[Bb]asic'
	hasnt logs "$(printf ann:hunter2 | base64)"
	! tr '\0' '\n' <"/proc/$PID/cmdline" | grep -q hunter2 ||
		fail "secret in argv"
}

# -v shows heads and bodies, says at start that it does, blanks credentials.
test_v_shows_the_protocol_without_credentials() {
	grumbles
	echo 'ann hunter2 write' >users
	chmod 600 users
	serve -v -u users
	cp server.err first
	expect 200 POST /demo "$(state 77)" -u ann:hunter2 -H 'X-Mine: yes'
	expect 200 GET /demo '' -H 'authorization:Bearer hunter2'
	expect 401 GET /demo '' -H 'Authorization: Weird hunter2 hunter2' \
		-H 'Proxy-Authorization: Basic hunter2'
	has server.err 'POST /demo HTTP/1.1'
	has server.err 'X-Mine: yes'
	has server.err '"serial": 77'
	has server.err 'HTTP/1.1 200'
	has server.err '[Aa]uthorization:'
	hasnt server.err "$(printf ann:hunter2 | base64)"
	hasnt server.err hunter2
	[ -s first ] || fail "-v did not say what it will show"
}

# -s: a lower serial or another lineage is 409 (issue 4.10); without it both
# land, as `state push -force` needs (PROTOCOL 7).
test_strict_refuses_what_goes_back() {
	local status serial lineage
	serve -s
	expect 200 POST /demo "$(state 5 L)"
	while read -r status serial lineage <&3; do
		expect "$status" POST /demo "$(state "$serial" "$lineage")"
		[ "$status" = 200 ] || holds states/demo.tfstate "$(state 5 L)"
	done 3<<-'EOF'
		409 4 L
		409 0 L
		409 6 M
		409 5 M
		200 5 L
	EOF
	expect 200 LOCK /demo "$(info mine)"
	expect 409 POST '/demo?ID=mine' "$(state 4 L)"
	expect 423 POST '/demo?ID=other' "$(state 4 L)"
	expect 200 POST '/demo?ID=mine' "$(state 10 L)"
	expect 409 POST '/demo?ID=mine' "$(state 9 L)"
	expect 200 POST /new "$(state 0)"
	expect 200 POST /sealed '{"encrypted_data":"QQ==","meta":{}}'
	expect 200 POST /sealed '{"encrypted_data":"Qg==","meta":{}}'
	halt
	serve
	expect 200 UNLOCK /demo
	expect 200 POST /demo "$(state 1 M)"
}

# Promise 9: files 0600, directories 0700, whatever the umask.
test_files_are_private_whatever_the_umask() {
	local mask
	for mask in 000 022 077 777; do
		umask "$mask"
		serve
		umask 022
		expect 200 POST /team/prod "$(state 1)"
		expect 200 POST /team/prod "$(state 2)"
		expect 200 LOCK /team/prod "$(info mine)"
		expect 200 DELETE '/team/prod?ID=mine'
		expect 200 POST /x "$(state 1)"
		want "umask $mask: odd files" "" \
			"$(find states -type f ! -perm 600)"
		want "umask $mask: odd directories" "" \
			"$(find states -type d ! -perm 700)"
		[ -f states/team/prod.log ] || fail "no log"
		[ -f states/.guard ] || fail "no guard"
		[ ! -s states/.guard ] || fail "the guard is not empty"
		halt
		rm -rf states
	done
}

# team_users: the users file that the tests on rights share.
team_users() {
	cat >users <<-EOF
		# who       secret   right   patterns

		ann s3cret write
		bob sha256:$(printf b0b | sha256sum | cut -c 1-64)  read team/*
		pia	pl4n	plan	team/* solo
		eve sha256:$(printf Eve | sha256sum | cut -c 1-64 | tr a-f A-F) write eve-*-x
	EOF
	chmod 600 users
}

# Issue 7.1: each right, each pattern, by every method, dialect and spelling.
# The rows run in order; $1 is who:password.
test_rights_and_patterns() {
	local status who method url body
	team_users
	serve -u users
	for url in team/prod team/a/b other/x solo; do
		expect 200 POST "/$url" "$(state 1)" -u ann:s3cret
	done
	while read -r status who method url body <&3; do
		case $body in
		state) body=$(state 2) ;;
		id) body=$(info mine) ;;
		md5) set -- -H 'Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg==' ;;
		esac
		[ "$body" = md5 ] && body='' || set --
		ask "$method" "$url" "$body" -u "$who" "$@"
		want "$who $method $url" "$status" "$STATUS"
		[ "$status" != 403 ] || hasnt answer 'lineage|"ID"'
	done 3<<-'EOF'
		200 bob:b0b GET /team/prod
		200 bob:b0b HEAD /team%2Fprod
		200 bob:b0b GET /team/a/b
		200 bob:b0b GET /terraform_state/team/prod.tfstate
		404 bob:b0b GET /team/none
		404 bob:b0b GET /team/prod/lock
		404 bob:b0b GET /terraform_lock/team/prod
		200 bob:b0b GET /-/versions/team/prod
		200 bob:b0b GET /-/log/team/prod
		200 bob:b0b GET /-/changes/team/prod
		403 bob:b0b GET /other/x
		403 bob:b0b HEAD /other/x
		403 bob:b0b GET /other%2fx
		403 bob:b0b GET /%6fther/x.tfstate
		403 bob:b0b GET /terraform_state/other/x
		403 bob:b0b GET /terraform_lock/other/x
		403 bob:b0b GET /other/x/lock
		403 bob:b0b GET /-/versions/other/x
		403 bob:b0b GET /-/log/other/x
		403 bob:b0b GET /-/changes/other/x
		403 bob:b0b GET /team
		403 bob:b0b GET /teams/x
		403 bob:b0b GET /my/team/prod
		400 bob:b0b GET /team/../other/x
		400 bob:b0b GET /team/%2e%2e%2fother/x
		403 bob:b0b POST /team/prod state
		403 bob:b0b PUT /terraform_state/team/prod state
		403 bob:b0b LOCK /team/prod id
		403 bob:b0b POST /team/prod/lock id
		403 bob:b0b UNLOCK /team/prod id
		403 bob:b0b UNLOCK /team/prod
		403 bob:b0b DELETE /team/prod
		403 bob:b0b DELETE /team/prod/lock id
		200 pia:pl4n GET /team/prod
		200 pia:pl4n LOCK /team/prod id
		423 pia:pl4n LOCK /team/prod {"ID":"other"}
		403 pia:pl4n POST /team/prod?ID=mine state
		403 pia:pl4n PUT /team/prod?ID=mine state
		403 pia:pl4n DELETE /team/prod?ID=mine
		403 pia:pl4n UNLOCK /team/prod
		403 pia:pl4n DELETE /team/prod md5
		403 pia:pl4n DELETE /team/prod/lock
		409 pia:pl4n UNLOCK /team/prod {"ID":"other"}
		200 pia:pl4n UNLOCK /team/prod id
		200 pia:pl4n PUT /terraform_lock/solo id
		403 pia:pl4n DELETE /terraform_lock/solo
		403 pia:pl4n POST /terraform_state/solo?ID=mine state
		200 pia:pl4n DELETE /terraform_lock/solo id
		200 pia:pl4n LOCK /solo id
		200 pia:pl4n DELETE /solo id
		403 pia:pl4n LOCK /other/x id
		403 pia:pl4n LOCK /solo2 id
		403 pia:pl4n POST /team/prod state
		200 eve:Eve POST /eve-1-x state
		200 eve:Eve POST /eve-a/b-x state
		200 eve:Eve DELETE /eve-a/b-x
		403 eve:Eve POST /eve-x state
		403 eve:Eve POST /eve-1-xy state
		403 eve:Eve GET /team/prod
		200 ann:s3cret LOCK /other/x id
		200 ann:s3cret UNLOCK /other/x
		200 ann:s3cret DELETE /other/x
		401 bob:s3cret GET /team/prod
		401 BOB:b0b GET /team/prod
		401 ann: GET /team/prod
		401 :s3cret GET /team/prod
	EOF
	holds states/team/prod.tfstate "$(state 1)"
}

# A plan user's LOCK does not break an old lock even under -b.
test_a_plan_user_breaks_no_lock() {
	team_users
	serve -b 1 -u users
	expect 200 LOCK /solo "$(info old)" -u ann:s3cret
	touch -d '9 hours ago' states/solo.lock
	ask LOCK /solo "$(info new)" -u pia:pl4n
	[[ $STATUS = 423 || $STATUS = 403 ]] || fail "plan broke it: $STATUS"
	holds states/solo.lock "$(info old)"
	expect 200 LOCK /solo "$(info new)" -u ann:s3cret
}

# How one may say who one is: Basic, Bearer, in any case; nothing else, and
# nothing twice. All else is 401 with the challenge (PEERS bug 21).
test_ways_to_say_who_one_is() {
	local status how
	team_users
	printf 'col a:b:c write\n' >>users
	serve -u users
	while read -r status how <&3; do
		expect "$status" GET / '' -H "Authorization: $how"
		[ "$status" = 200 ] ||
			has head '^WWW-Authenticate: Basic realm='
	done 3<<-EOF
		200 Basic $(printf ann:s3cret | base64)
		200 BASIC $(printf ann:s3cret | base64)
		200 Basic $(printf col:a:b:c | base64)
		200 Bearer s3cret
		200 bearer b0b
		401 Basic $(printf ann:s3cret | base64 | tr -d =)!
		401 Basic $(printf 'ann:s3cret\0' | base64)
		401 Basic $(printf 'ann:s3cret\0x' | base64)
		401 Basic $(printf 'ann\0:s3cret' | base64)
		401 Basic $(printf anns3cret | base64)
		401 Basic
		401 Bearer
		401 Bearer S3CRET
		401 Bearer s3cret ann
		401 ann:s3cret
		200 Basic  $(printf ann:s3cret | base64)
	EOF
	expect 401 GET /
	ask GET / '' -H 'Authorization: Bearer wrong' \
		-H 'Authorization: Bearer s3cret'
	[ "$STATUS" != 200 ] || fail "two Authorizations, and one was taken"
	has server.log 'status=401'
	# the hash is not the secret
	expect 401 GET / '' -u "bob:$(printf b0b | sha256sum | cut -c 1-64)"
	expect 401 GET / '' -u "bob:sha256:$(printf b0b | sha256sum | cut -c 1-64)"
}

# PEERS bug 20 and 21: 401 and 403 come before anything is read or looked
# up: existing or not, locked or not, the answer is the same; no page but the
# two health checks is open.
test_existence_does_not_leak() {
	local method page name who body
	team_users
	serve -u users
	expect 200 POST /other/here "$(state 1)" -u ann:s3cret
	expect 200 LOCK /other/here "$(info x)" -u ann:s3cret
	for who in X: Authorization:\ Bearer\ b0b; do
		for method in GET HEAD POST PUT LOCK UNLOCK DELETE; do
			for page in / /terraform_state/ /terraform_lock/; do
				for name in here gone; do
					body=$(info y)
					[ $method != HEAD ] || body=
					ask $method "${page}other/$name" "$body" -H "$who"
					sed "/^Date/d; s/$name/NAME/g" head answer >"$name"
				done
				same here gone
				has here '^HTTP/1.1 40[13]'
			done
		done
		for page in versions log changes; do
			for name in here gone; do
				ask GET "/-/$page/other/$name" '' -H "$who"
				sed "/^Date/d; s/$name/NAME/g" head answer >"$name"
			done
			same here gone
			has here '^HTTP/1.1 40[13]'
		done
	done
	want "traces of strangers" "" "$(find states -name 'gone*')"
	for page in / /-/metrics /-/nothing /-/ /nothing /x/lock /favicon.ico; do
		expect 401 GET "$page"
	done
	expect 200 GET /-/healthy
	expect 200 GET /-/ready
	want "401 for a body that never comes" 401 \
		"$(head_of POST /x 'Content-Length: 900000' | raw_status)"
}

# The listing shows only what the user may read.
test_the_listing_is_filtered() {
	team_users
	serve -u users
	expect 200 POST /team/prod "$(state 1)" -u ann:s3cret
	expect 200 POST /other/x "$(state 1)" -u ann:s3cret
	expect 200 LOCK /other/locked "$(info holder-id)" -u ann:s3cret
	for accept in text/plain application/json text/html; do
		expect 200 GET / '' -u bob:b0b -H "Accept: $accept"
		has answer 'team/prod'
		hasnt answer 'other|holder-id'
		expect 200 GET / '' -u ann:s3cret -H "Accept: $accept"
		has answer 'other/x'
	done
}

# Issue 7.1: SIGHUP reads the users again; a broken file keeps the old ones
# and says where it is wrong. A server without users does not mind it.
test_sighup_reads_the_users_again() {
	grumbles
	team_users
	serve -u users
	expect 200 GET / '' -u ann:s3cret
	sed -i 's/s3cret/ch4nged/' users
	kill -HUP "$PID"
	until_true lets_in ann:ch4nged
	expect 401 GET / '' -u ann:s3cret
	want "complaints" "" "$(cat server.err)"
	printf 'ann again write\n\nbob broken\n' >users
	kill -HUP "$PID"
	until_true grep -Eq '(users:|line )3' server.err
	expect 200 GET / '' -u ann:ch4nged
	expect 401 GET / '' -u ann:again
	rm users
	: >server.err
	kill -HUP "$PID"
	until_true grep -q users server.err
	expect 200 GET / '' -u ann:ch4nged
	halt
	serve_as plain -d states
	kill -HUP "$PID"
	expect 200 GET /
}

lets_in() {
	ask GET / '' -u "$1"
	[ "$STATUS" = 200 ]
}

# A users file with a mistake is refused at start, with its line (PEERS bug
# 21: never "open, because it could not be read").
test_a_broken_users_file_is_told_with_its_line() {
	local line
	while IFS= read -r line <&3; do
		printf '# first\nann s3cret write\n%b\n' "$line" >users
		chmod 600 users
		refuses 1 '(users:|line )3' -u users
		hasnt err 's3cret|hunter2'
	done 3<<-'EOF'
		bob
		bob hunter2
		bob hunter2 admin
		bob hunter2 Write
		bob sha256: write
		bob sha256:abc write
		bob sha256:zz23456789012345678901234567890123456789012345678901234567890123 write
		b:b hunter2 write
	EOF
	: >users
	refuses 1 users -u users
	refuses 1 users -u no/such/users
	refuses 1 . -u .
}

# refuses STATUS PATTERN OPTION...: does not start, exits with that status
# and says that. (A STATUS of - is any but 0.)
refuses() {
	local status=$1 pattern=$2 got=0
	shift 2
	timeout "$PATIENCE" "$STATESRV" "$@" >out 2>err </dev/null || got=$?
	[ "$got" != 124 ] || fail "statesrv $*: it started"
	[ "$got" -lt 124 ] && [ "$got" != 0 ] || fail "statesrv $*: exit $got"
	[ "$status" = - ] || want "statesrv $*: exit" "$status" "$got"
	has err "$pattern"
	want "statesrv $*: on stdout" "" "$(cat out)"
}

# A users file that others can read is told, and works.
test_a_users_file_others_can_read_is_told() {
	local mode
	grumbles
	for mode in 640 604; do
		team_users
		chmod "$mode" users
		serve -u users
		has server.err 'read.* users'
		expect 200 GET / '' -u ann:s3cret
		halt
	done
	chmod 600 users
	serve -u users
	want "complaints" "" "$(cat server.err)"
}

# Issue 7.6: a wrong secret is answered late, and logged with the client's
# address; meanwhile others are served. (Ten wrong ones; some of them must
# still be waiting when a right one has been answered.)
test_a_wrong_password_delays_nobody_else() {
	local i try
	team_users
	serve -u users
	for try in 1 2 3 4 5; do
		rm -f done.*
		for i in 1 2 3 4 5 6; do
			(
				curl -s -o /dev/null -u "ann:guess$i" "$URL/" || :
				: >"done.$i"
			) &
			echo $! >>"$T/pids"
		done
		expect 200 GET / '' -u ann:s3cret
		[ "$(find . -name 'done.*' | wc -l)" -lt 6 ] && break
		[ "$try" -lt 5 ] || fail "no delay, or everybody waits"
	done
	until_true guesses_done
	until_true grep -Eq \
		'client=127.0.0.1:[0-9]+ .*status=401 .*why="' server.log
	hasnt server.log 'guess'
}

guesses_done() {
	[ "$(find . -name 'done.*' | wc -l)" = 6 ]
}

# PEERS bug 21: TF_HTTP_USERNAME and TF_HTTP_PASSWORD make a user with all
# rights; half of the pair, or a name that Basic cannot carry, is refused,
# not ignored; empty is not set.
test_credentials_from_the_environment() {
	local name pass
	export TF_HTTP_USERNAME=tf TF_HTTP_PASSWORD='p:%ss'
	serve
	expect 401 GET /demo
	expect 200 POST /demo "$(state 1)" -u 'tf:p:%ss'
	expect 200 DELETE /demo '' -u 'tf:p:%ss'
	! grep -q 'p:%ss' "/proc/$PID/cmdline" || fail "secret in argv"
	while IFS='|' read -r name pass <&3; do
		unset TF_HTTP_USERNAME TF_HTTP_PASSWORD
		[ "$name" = - ] || export TF_HTTP_USERNAME=$name
		[ "$pass" = - ] || export TF_HTTP_PASSWORD=$pass
		refuses - 'TF_HTTP_(USERNAME|PASSWORD)' -l 127.0.0.1:0 -d other
	done 3<<-'EOF'
		tf|-
		-|pass
		tf|
		|pass
		a:b|pass
	EOF
	export TF_HTTP_USERNAME='' TF_HTTP_PASSWORD=''
	serve_as open -d states
	expect 404 GET /demo
}

# Issue 7.2: an address that is not loopback needs users, or -n; the message
# says the ways out. The names that mean loopback are loopback.
test_a_public_address_needs_users() {
	local addr
	for addr in 0.0.0.0:0 '[::]:0'; do
		refuses - TF_HTTP_USERNAME -l "$addr" -d states
		has err '-u'
		has err '-n'
	done
	for addr in 192.0.2.1:0 '*:0' :0; do
		refuses - . -l "$addr" -d states
	done
	refuses - . -l 127.0.0.1:0 -l 0.0.0.0:0 -d states
	serve -l localhost:0 -l 127.1.2.3:0 -l unix:sock
	want listeners 4 "$(grep -c 'listening on' server.log)"
	[ -S sock ] || fail "no unix socket"
	halt
	team_users
	unshare -rn true 2>/dev/null || return 0 # nobody else's network
	unshare -rn "$STATESRV" -n -l 0.0.0.0:0 -d states >n.log 2>n.err &
	echo $! >>"$T/pids"
	unshare -rn "$STATESRV" -u users -l '0.0.0.0:0' -d states >u.log 2>u.err &
	echo $! >>"$T/pids"
	until_true grep -q 'listening on' n.log
	until_true grep -q 'listening on' u.log
	rm -f n.err # it may warn
}

# Issue 7.2: a web page cannot change anything (Origin), nor read by DNS
# rebinding (Host), on a loopback listener without users.
test_web_pages_are_kept_out() {
	local method host
	serve
	expect 200 POST /demo "$(state 1)"
	for method in POST PUT DELETE LOCK UNLOCK; do
		for host in http://evil.example null http://localhost:8080; do
			expect 403 $method /demo "$(info x)" -H "Origin: $host"
		done
		expect 403 $method /demo/lock "$(info x)" -H 'Origin: null'
	done
	expect 200 GET /demo '' -H 'Origin: http://evil.example'
	hasnt head '^[Aa]ccess-[Cc]ontrol'
	ask OPTIONS /demo '' -H 'Origin: http://evil.example' \
		-H 'Access-Control-Request-Method: PUT'
	hasnt head '^[Aa]ccess-[Cc]ontrol'
	for host in evil.example "evil.example:$PORT" localhost.evil.example \
		127.0.0.1.evil.example xlocalhost; do
		expect 403 GET /demo '' -H "Host: $host"
		expect 403 POST /demo "$(state 2)" -H "Host: $host"
		expect 403 GET / '' -H "Host: $host"
		hasnt answer lineage
	done
	expect 403 GET /demo '' --request-target 'http://evil.example/demo'
	for host in localhost "localhost:$PORT" LocalHost 127.0.0.1 127.9.9.9:1 \
		'[::1]:80' 192.0.2.7; do
		expect 200 GET /demo '' -H "Host: $host"
	done
	holds states/demo.tfstate "$(state 1)"
	halt
	team_users
	serve -u users # who has a password is no web page
	expect 404 GET /none '' -H 'Host: states.example' -u ann:s3cret
	expect 403 POST /x "$(state 1)" -u ann:s3cret -H 'Origin: http://a.b'
}

need_landlock() {
	need "${CC:-cc}"
	printf 'int main(void) { return syscall(444, 0, 0, 1) < 2; }\n' >probe.c
	"${CC:-cc}" -w -include unistd.h -D_DEFAULT_SOURCE -o probe probe.c
	./probe || skip "no Landlock in this kernel"
}

# Issue 7.3: once it runs, the server can open nothing outside, whatever
# makes it try; here its own users file, swapped for a link.
test_shipped_a_link_in_place_of_the_users_file_is_not_followed() {
	need_landlock
	grumbles
	mkdir conf outside
	team_users
	mv users conf
	echo 'mallory inside write' >outside/users
	chmod 600 outside/users
	serve -u conf/users
	grep -q '^NoNewPrivs:.*1' "/proc/$PID/status" ||
		skip "a build without the sandbox"
	ln -sf ../outside/users conf/users
	kill -HUP "$PID"
	until_true grep -q users server.err
	expect 401 GET / '' -u mallory:inside
	expect 200 GET / '' -u ann:s3cret
}

# The same from inside: a build whose poll (the loop's) and fsync (a commit
# thread's) first try what an intruder would. Only what is in the directory
# may succeed.
test_the_running_server_can_reach_nothing_outside() {
	grumbles # the spy's report
	cat >spy.c <<-'EOF'
		#define _GNU_SOURCE
		#include <arpa/inet.h>
		#include <errno.h>
		#include <fcntl.h>
		#include <poll.h>
		#include <stdio.h>
		#include <sys/syscall.h>
		#include <unistd.h>
		static int may_connect(void)
		{
			struct sockaddr_in a = { .sin_family = AF_INET };
			a.sin_port = htons(1);
			a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
			return syscall(444, 0, 0, 1) >= 4 && (connect(socket(AF_INET,
			    SOCK_STREAM, 0), (void *)&a, sizeof(a)) == 0 ||
			    errno != EACCES);
		}
		static void try(const char *who)
		{
			dprintf(2, "%s: own %d read %d create %d exec %d link %d "
			    "connect %d\n", who, open("states/.guard", O_RDONLY) >= 0,
			    open("outside", O_RDONLY) >= 0 ||
			    open("/etc/passwd", O_RDONLY) >= 0,
			    open("new", O_WRONLY | O_CREAT, 0600) >= 0,
			    execl("/bin/true", "true", (char *)NULL) == 0,
			    link("outside", "states/x.tfstate") == 0, may_connect());
		}
		int spy_poll(struct pollfd *p, nfds_t n, int ms)
		{
			static int done;
			if (!done++)
				try("loop");
			return poll(p, n, ms);
		}
		int spy_fsync(int fd)
		{
			static int done;
			if (getpid() != syscall(SYS_gettid) && !done++)
				try("commit");
			return fsync(fd);
		}
	EOF
	need_landlock
	"${CC:-cc}" -std=c11 -Dpoll=spy_poll -Dfsync=spy_fsync -c "$here/statesrv.c"
	"${CC:-cc}" -std=c11 -pthread -o spied spy.c statesrv.o
	echo secret >outside
	STATESRV=./spied serve
	expect 200 POST /demo "$(state 1)"
	for who in loop commit; do
		has server.err \
			"$who: own 1 read 0 create 0 exec 0 link 0 connect 0"
	done
	has "/proc/$PID/status" '^NoNewPrivs:.*1'
}

# Issue 7.3: a core would hold secrets.
test_core_dumps_are_off() {
	ulimit -S -c unlimited 2>/dev/null || :
	serve
	has "/proc/$PID/limits" '^Max core file size +0 +0 '
}

# PEERS bug 27, issue 6.7: every option is looked at, a wrong one is told
# by its letter or its value; the user's mistake exits 2, the system's 1.
test_usage_mistakes_are_told() {
	local options pattern
	while IFS='|' read -r options pattern <&3; do
		# shellcheck disable=SC2086
		refuses 2 "$pattern" -l 127.0.0.1:0 -d states $options
		has err '^(usage|statesrv):'
	done 3<<-'EOF'
		-X|X
		-b|b
		-b x|-b.*x
		-b -1|-b.*-1
		-b 1h|-b.*1h
		-b 99999999999999999999|-b
		-k|k
		-k x|-k.*x
		-k -1|-k.*-1
		-k 3x|-k.*3x
		-m 0|-m.*0
		-m x|-m.*x
		-m -5|-m.*-5
		-m 99999999999999999999|-m
		-l 8080|8080
		-l 127.0.0.1|127.0.0.1
		-l 127.0.0.1:|127.0.0.1:
		-l 127.0.0.1:65536|65536
		-l 127.0.0.1:x|127.0.0.1:x
		-l [::1]|::1
		-l [::1:80|::1
		-l unix:|unix
	EOF
	echo >file
	serve_as other -d states
	refuses 1 "127.0.0.1:$PORT.*[Aa]ddress.*in use" \
		-d states2 -l "127.0.0.1:$PORT"
	refuses 1 'file' -l 127.0.0.1:0 -d file
	refuses 1 'no/such' -l 127.0.0.1:0 -d no/such/dir
	refuses 1 'no/such' -l unix:no/such/sock -d states2
}

# Issue 6.7: -h fits a screen, on stdout; -V is one line.
test_help_fits_a_screen() {
	"$STATESRV" -h >help 2>err
	"$STATESRV" -V >version 2>>err
	want stderr "" "$(cat err)"
	want "lines of -V" 1 "$(wc -l <version)"
	has version '^statesrv [0-9]'
	[ "$(wc -l <help)" -ge 24 ] && [ "$(wc -l <help)" -le 40 ] ||
		fail "-h has $(wc -l <help) lines"
	hasnt help '.{81}|	'
	for option in b c d h k l m n s u v V; do
		has help "(^| )-$option"
	done
	has help 'terraform apply'
}

# -d makes the directory, private, where it was told to.
test_d_names_the_directory() {
	serve_as one -d "./deep states"
	expect 200 POST /demo "$(state 1)"
	holds "deep states/demo.tfstate" "$(state 1)"
	want "mode" 700 "$(stat -c %a 'deep states')"
	[ ! -e states ] || fail "./states was made"
}

# The listing: JSON for a program, a table for a person, nothing left out: a
# state, a foreign file, a lock without state, a frozen one.
test_the_listing() {
	serve
	expect 200 GET / '' -H 'Accept: application/json'
	json answer . '[]'
	expect 200 POST /team/prod "{\"version\":4,\"serial\":7,\"lineage\":\"L\",\"terraform_version\":\"1.11.4\",\"resources\":[$(resource t a 1),$(resource t b 2)]}"
	expect 200 LOCK /team/prod \
		"$(info run-1 ann@laptop | sed 's/"Info":""/"Info":"why not"/')"
	expect 200 LOCK /fresh "$(info run-2)"
	expect 200 POST /been "$(state 1)"
	expect 200 DELETE /been
	echo 'by hand' >states/odd.tfstate
	echo 'frozen "here"' >states/odd.lock
	echo x >states/README
	expect 200 GET / '' -H 'Accept: application/json'
	has head '^[Cc]ontent-[Tt]ype: application/json'
	json answer 'map(.name)|sort' '["fresh","odd","team/prod"]'
	json answer '.[]|select(.name=="team/prod")|[.serial,.lineage,.terraform_version,.resources,.size]' \
		"[7,\"L\",\"1.11.4\",2,$(stat -c %s states/team/prod.tfstate)]"
	json answer '.[]|select(.name=="team/prod")|.lock|[.id,.who,.operation,.info,.created]' \
		'["run-1","ann@laptop","OperationTypeApply","why not","2026-11-22T13:21:24.079813084Z"]'
	json answer '.[]|select(.name=="team/prod")|.modified[:3], .lock.since[:3]' '202
202'
	json answer '.[]|select(.name=="fresh")|[.serial,.size,.modified,.lock.id]' \
		'[null,null,null,"run-2"]'
	json answer '.[]|select(.name=="odd")|[.serial,.size,.lock.info]' \
		'[null,8,"frozen \"here\""]'
	has answer '"name": *"team/prod"'
	expect 200 GET /
	has head '^[Cc]ontent-[Tt]ype: text/plain'
	has answer '^team/prod +7 .*ann@laptop'
	has answer '^fresh '
	has answer '^odd .*frozen'
	hasnt answer '^(been|README|\.)'
	want "columns of serials that line up" 1 "$(awk 'NR == 1 { at = index($0,
		$2) } { print substr($0, at - 1, 1) == " " }' answer | sort -u)"
	expect 200 GET / '' -H 'Accept: text/html,application/xhtml+xml,*/*;q=0.8'
	has head '^[Cc]ontent-[Tt]ype: text/html'
}

# Prometheus' text format: each family with HELP and TYPE, counters named
# _total, buckets that add up.
test_metrics_are_well_formed() {
	serve
	expect 200 POST /secret-name "$(state 1)"
	expect 200 LOCK /secret-name "$(info x)"
	expect 423 POST /secret-name "$(state 2)"
	expect 404 GET /none
	expect 200 GET /-/metrics
	has head '^[Cc]ontent-[Tt]ype: text/plain; version=0.0.4'
	awk '
	/^# HELP / { help[$3] = 1; next }
	/^# TYPE / { type[$3] = $4; next }
	!/^[a-z_]+(\{([a-z_]+="[^"]*",?)*\})? [-+0-9.eInfNa]+$/ { print "odd: " $0 }
	{
		name = $1; sub(/\{.*/, "", name); family = name
		if (!(family in type)) sub(/_(bucket|sum|count)$/, "", family)
		if (!help[family] || !type[family]) print "undeclared: " $0
		if (type[family] == "counter" && name !~ /_total$/)
			print "counter without _total: " name
		if (seen[$1]++) print "twice: " $1
		if (name ~ /_bucket$/) {
			key = $1; sub(/le="[^"]*"/, "", key)
			if ($2 + 0 < last[key] + 0) print "falls: " $0
			last[key] = $2
		}
	}
	END { if (NR < 20) print "only " NR " lines" }' answer >odd
	want "oddities" "" "$(cat odd)"
	has answer '^statesrv_[a-z_]*requests_total\{.*\} [0-9]'
	has answer '^statesrv_[a-z_]*_bucket\{.*le="\+Inf"\} [1-9]'
	has answer '^statesrv_[a-z_]*lock[a-z_]* 1$'
	has answer '^statesrv_states 1$'
	hasnt answer 'secret-name|none'
}

# PEERS bug 23: the set of series is bounded: no names, no methods or paths
# of a client's invention.
test_metrics_do_not_grow_with_what_is_asked() {
	local i
	serve
	for i in 1 2; do
		ask POST "/state-$i" "$(state 1)"
		ask GET "/state-$i"
		ask GET "/-/page-$i"
		ask "METHOD$i" /
		ask PATCH /
	done
	expect 200 GET /-/metrics
	sed '/^#/d; s/ .*//' answer | sort >before
	for i in $(seq 3 30); do
		ask POST "/state-$i" "$(state 1)"
		ask GET "/state-$i"
		ask GET "/-/page-$i"
		ask "METHOD$i" /
	done
	expect 200 GET /-/metrics
	sed '/^#/d; s/ .*//' answer | sort >after
	same before after
	hasnt answer 'state-|page-|METHOD[0-9]'
}

# /-/healthy: alive; /-/ready: able to write. -c asks for the binary itself.
test_health_can_be_asked() {
	grumbles
	serve
	expect 200 GET /-/healthy
	expect 200 GET /-/ready
	want answer ready "$(cat answer)"
	"$STATESRV" -c -l "127.0.0.1:$PORT" || fail "-c: exit $?"
	rm -rf states
	expect 503 GET /-/ready
	want "lines of why" 1 "$(wc -l <answer)"
	expect 200 GET /-/healthy
	STATUS=0
	"$STATESRV" -c -l "127.0.0.1:$PORT" 2>c.txt || STATUS=$?
	want "-c, not ready" 1 "$STATUS"
	halt
	STATUS=0
	"$STATESRV" -c -l "127.0.0.1:$PORT" 2>c.txt || STATUS=$?
	want "-c, nobody there" 1 "$STATUS"
}

# Promise 8, PEERS bug 19: whatever comes in whichever place gets a 4xx, and
# the same process serves on.
test_bad_input_never_ends_the_process() {
	local method url body
	serve
	expect 200 POST /demo "$(state 1)"
	expect 200 LOCK /demo "$(info x)"
	head -c 3000 /dev/urandom >noise
	printf '[%.0s' {1..5000} >deep
	{ printf '{"a":%.0s' {1..2500}; printf '{"ID":"a"%.0s' {1..900}; } >deeper
	for method in GET POST PUT DELETE LOCK UNLOCK OPTIONS; do
		for url in /demo /demo/lock /none '/demo?ID=x' / /-/metrics; do
			for body in @noise @deep @deeper '{"ID":{}}' '"' '{"serial":' ; do
				ask $method "$url" "$body"
				[ "$STATUS" -lt 500 ] || fail "$method $url: $STATUS"
			done
		done
	done
	expect 200 GET /demo
	want "the process" "$PID" "$(jobs -p)"
}

# PEERS bug 26: descriptors come back, from answers and from refusals.
test_no_descriptor_is_left_open() {
	local before i
	serve -k 2
	[ -r "/proc/$PID/fd" ] || skip "cannot look into the process"
	ask_all_sorts
	before=$(open_files)
	for i in 1 2 3 4; do
		ask_all_sorts
	done
	until_true open_at_most "$before"
}

ask_all_sorts() {
	ask POST /demo "$(state 1)"
	ask POST /demo '{'
	ask POST /demo '{"x":1' -H 'Content-MD5: x'
	ask LOCK /demo "$(info x)"
	ask LOCK /demo "$(info y)"
	ask POST /demo "$(state 2)"
	ask GET /demo
	ask HEAD /demo
	ask GET /none
	ask GET /
	ask GET /-/versions/demo
	ask GET /-/changes/demo
	ask GET /-/log/demo
	ask GET /-/metrics
	ask UNLOCK /demo "$(info y)"
	ask UNLOCK /demo
	ask DELETE /demo
	ask DELETE /demo
	head -c 200000 /dev/zero | tr '\0' ' ' >blanks
	ask POST /demo @blanks
	curl -s -m 0.05 -o /dev/null -T - "$URL/demo" <blanks || :
}

open_files() {
	find "/proc/$PID/fd" -mindepth 1 2>/dev/null | wc -l
}

open_at_most() {
	[ "$(open_files)" -le "$1" ]
}

# ---- what attacking it found, kept as tests --------------------------------

# RFC 9110, 9.3.2: also a malformed HEAD gets no body, which would be taken
# for the next answer.
test_a_refused_head_has_no_body() {
	local line
	serve
	while read -r line; do
		printf 'HEAD /demo HTTP/1.1\r\n%b\r\n\r\n' "$line" | raw >answers
		has answers '^HTTP/1.1 [45]'
		[ -z "$(sed '1,/^\r$/d' answers)" ] || fail "$line: $(cat answers)"
	done <<-'EOF2'
	Host: a\r\nHost: b
	Host: a\r\nExpect: x
	Host: a\r\nX : y
	Host: a\r\nTransfer-Encoding: gzip, chunked
	EOF2
}

# Promise 8: a body that ends before its length is told so, and logged.
test_a_body_cut_short_is_told() {
	need "${CC:-cc}"
	serve
	cat >half.c <<-'EOF2'
	#include <arpa/inet.h>
	#include <stdlib.h>
	#include <string.h>
	#include <unistd.h>
	int main(int n, char **a) {
		struct sockaddr_in s = { .sin_family = AF_INET };
		char b[4096]; ssize_t got; int fd = socket(AF_INET, SOCK_STREAM, 0);
		s.sin_port = htons((unsigned short)atoi(a[n - 1]));
		s.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		if (connect(fd, (struct sockaddr *)&s, sizeof(s))) return 1;
		while ((got = read(0, b, sizeof(b))) > 0) if (write(fd, b, (size_t)got) < 0) return 1;
		shutdown(fd, SHUT_WR);
		while ((got = read(fd, b, sizeof(b))) > 0) if (write(1, b, (size_t)got) < 0) return 1;
		return 0;
	}
	EOF2
	"${CC:-cc}" -o half half.c
	printf 'POST /h HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"a"' |
		./half "$PORT" >answers
	# the Host is no address: loopback without users says so first
	has answers '^HTTP/1.1 403'
	printf 'POST /h HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"a"' |
		./half "$PORT" >answers
	has answers '^HTTP/1.1 400'
	has answers 'not complete'
	until_true grep -q 'name=h status=400' server.log
	[ ! -e states/h.tfstate ] || fail 'stored'
}

# Long lines, nobody reading stdout or stderr, descriptors closed at start:
# nothing that has to do with logs stalls or confuses the server.
test_logs_stall_nothing() {
	local long i
	grumbles
	: >states.err
	mkdir states
	: >states/empty.tfstate
	mkfifo out err
	# opened, and never read
	sh -c 'exec sleep 60' <out &
	echo $! >>"$T/pids"
	sh -c 'exec sleep 60' <err &
	echo $! >>"$T/pids"
	PORT=0
	"$STATESRV" -d states -l unix:sock >out 2>err &
	echo $! >>"$T/pids"
	until_true [ -S sock ]
	long=$(printf '%%01%.0s' {1..900})
	for ((i = 0; i < 40; i++)); do
		curl -sS -m "$PATIENCE" --unix-socket sock -o /dev/null \
			"http://localhost/$long" "http://localhost/empty" \
			"http://localhost/empty" "http://localhost/empty"
	done
	curl -sS -f -m "$PATIENCE" --unix-socket sock \
		http://localhost/-/healthy >/dev/null
	"$STATESRV" -d states -l unix:two <&- >&- 2>&- &
	echo $! >>"$T/pids"
	until_true [ -S two ]
	curl -sS -f -m "$PATIENCE" --unix-socket two \
		--data-binary '{"serial":1}' http://localhost/demo
	want 'the state' '{"serial":1}' "$(cat states/demo.tfstate)"
}

# A FIFO in the place of the users file, a link in the place of a directory
# that was served before: neither is waited for nor followed.
test_what_is_put_in_the_place_of_files_is_not_followed() {
	grumbles
	printf 'ann %s write\n' "$(printf 'x%.0s' {1..900})" >users
	chmod 600 users
	serve -u users
	local ann=(-u "ann:$(printf 'x%.0s' {1..900})")
	expect 200 POST /team/prod "$(state 1)" "${ann[@]}"
	rm users
	mkfifo users
	kill -HUP "$PID"
	until_true grep -q 'not a file' server.err
	touch -d '1 hour ago' states/team/prod.tfstate
	sleep 1.1			# old enough for a cache
	expect 200 GET /team/prod '' "${ann[@]}"
	mv states/team elsewhere
	ln -s ../elsewhere states/team
	expect 500 GET /team/prod '' "${ann[@]}"
}

# Two names for one thing are one too many; and a refusal leaves no file.
test_a_refusal_leaves_no_trace_of_a_name() {
	serve
	expect 400 POST /terraform_state/terraform_state/x "$(state 1)"
	expect 400 POST /ghost garbage
	expect 400 LOCK /ghost garbage
	expect 409 POST '/ghost?ID=%0aX-Evil:%20y%1b' "$(state 1)"
	want 'lines of the refusal' 1 "$(wc -l <answer)"
	want 'files' '' "$(find states -name 'ghost*' -o -name 'terraform*')"
}

# What a client sends is cut and shown, and the JSON stays JSON.
test_what_is_cut_stays_utf8() {
	local e
	need iconv
	e=$(printf 'é%.0s' {1..300})
	serve
	expect 200 POST /demo "{\"serial\":1,\"lineage\":\"a$e\"}"
	expect 200 LOCK /demo "{\"ID\":\"1\",\"Who\":\"a$e\",\"Info\":\"$e\"}"
	expect 200 GET / '' -H 'Accept: application/json'
	iconv -f utf-8 -t utf-8 answer >/dev/null || fail 'the listing'
	expect 423 POST '/demo?ID=%ff' "$(state 1)"
	iconv -f utf-8 -t utf-8 states/demo.log >/dev/null || fail 'the log'
}

# The address that a front tells is told at the beginning or not at all.
test_a_proxy_line_is_the_first_or_none() {
	need socat
	serve -l unix:sock
	printf 'GET /one HTTP/1.1\r\nHost: a\r\n\r\nPROXY TCP4 6.6.6.6 1.1.1.1 1 2\r\nGET /two HTTP/1.0\r\n\r\n' |
		socat -t 5 - UNIX-CONNECT:sock >answers
	want statuses '404 400' "$(sed -n 's/^HTTP[^ ]* \([0-9]*\).*/\1/p' answers |
		xargs)"
	hasnt server.log '6\.6\.6\.6'
	printf 'PROXY TCP9 6.6.6.6 1.1.1.1 1 2\r\nGET /x HTTP/1.0\r\n\r\n' |
		socat -t 5 - UNIX-CONNECT:sock >answers
	want 'the answer to nonsense' '' "$(cat answers)"
}

# ---- the real terraform ---------------------------------------------------
#
# Configurations of terraform_data alone, so that nothing is downloaded; a
# command takes some 50 ms. Where a resource has to take its time, it makes
# the file `started' and waits for the file `go'.

# terraform_here: terraform as a machine of its own has it; and what it would
# try again after a second, it tries again at once.
terraform_here() {
	need terraform
	unset "${!TF_@}"
	: >"$T/terraformrc"
	export TF_CLI_CONFIG_FILE=$T/terraformrc CHECKPOINT_DISABLE=1 \
		TF_IN_AUTOMATION=1 TF_CLI_ARGS=-no-color TF_HTTP_RETRY_WAIT_MIN=0
}

# backend DIR LINE...: the backend block of the configuration in DIR.
backend() {
	local dir=$1
	shift
	mkdir -p "$dir"
	{
		printf 'terraform {\n  backend "http" {\n'
		printf '    %s\n' "$@"
		printf '  }\n}\n'
	} >"$dir/backend.tf"
}

# aim DIR NAME [BASE]: the block as most people have it.
aim() {
	local at=${3:-$URL}/$2
	backend "$1" "address = \"$at\"" "lock_address = \"$at\"" \
		"unlock_address = \"$at\""
}

# resources DIR: one resource and one output, of variable v.
resources() {
	mkdir -p "$1"
	cat >"$1/main.tf" <<-'EOF'
	variable "v" {
	  default = "1"
	}
	resource "terraform_data" "a" {
	  input = var.v
	}
	output "v" {
	  value = terraform_data.a.output
	}
	EOF
}

# project DIR NAME [BASE]: a configuration in DIR whose state is NAME.
project() {
	resources "$1"
	aim "$@"
	works "$1" init
}

# slow DIR: its applies wait, half done, for DIR/go, half a minute at most.
slow() {
	cat >"$1/slow.tf" <<-'EOF'
	resource "terraform_data" "slow" {
	  triggers_replace = terraform_data.a.output
	  provisioner "local-exec" {
	    command = "touch started; timeout 30 sh -c 'until [ -e go ]; do sleep 0.05; done'"
	  }
	}
	EOF
}

# tf DIR WORDS...: terraform there. Sets STATUS; what it says is in DIR.out.
tf() {
	local dir=$1
	shift
	STATUS=0
	terraform "-chdir=$dir" "$@" >"$dir.out" 2>&1 </dev/null || STATUS=$?
}

works() {
	tf "$@"
	[ "$STATUS" = 0 ] || fail "terraform $*: $(tail -n 20 "$1.out")"
}

fails() {
	tf "$@"
	[ "$STATUS" = 1 ] || fail "terraform $*: exit $STATUS"
}

# begin DIR WORDS...: terraform beside us, with pid RUN. ended [RUN]: waits.
begin() {
	local dir=$1
	shift
	terraform "-chdir=$dir" "$@" >"$dir.out" 2>&1 </dev/null &
	RUN=$!
	echo "$RUN" >>"$T/pids"
}

ended() {
	STATUS=0
	wait "${1:-$RUN}" || STATUS=$?
}

# serial NAME, lineage NAME: of the state on disk; of ./FILE, if there is one.
serial() {
	field "$1" 's/^ *"serial": *\([0-9]*\).*/\1/p'
}

lineage() {
	field "$1" 's/^ *"lineage": *"\([^"]*\)".*/\1/p'
}

field() {
	local file=states/$1.tfstate
	[ -e "$file" ] || file=$1
	sed -n "$2" "$file"
}

# unlocked NAME, locked NAME
unlocked() {
	[ ! -e "states/$1.lock" ]
}

locked() {
	[ -e "states/$1.lock" ]
}

# PROTOCOL section 6: each command, its exit status, what it asks besides
# GETs (of which newer versions send more), and that it leaves no lock.
test_every_command_of_terraform_works_and_asks_what_it_should() {
	local status verbs words mark before
	terraform_here
	serve
	resources work
	aim work demo
	# shellcheck disable=SC2317
	asked() {
		[ "$verbs" = "$(tail -n "+$((mark + 1))" server.log |
			sed -n 's/.* method=\([A-Z]*\) .*/\1/p' | grep -v GET |
			paste -sd ' ')" ]
	}
	while IFS='|' read -r status verbs words; do
		mark=$(wc -l <server.log)
		before=$(serial demo 2>/dev/null) || before=0
		# shellcheck disable=SC2086
		tf work $words
		[ "$STATUS" = "$status" ] ||
			fail "$words: exit $STATUS: $(cat work.out)"
		until_true asked
		unlocked demo || fail "$words: left the lock"
		[[ $verbs != *POST* ]] ||
			want "$words: serial" $((before + 1)) "$(serial demo)"
	done <<-'EOF'
	0||init
	2|LOCK UNLOCK|plan -detailed-exitcode
	0|LOCK POST UNLOCK|apply -auto-approve
	0|LOCK UNLOCK|apply -auto-approve
	0|LOCK UNLOCK|plan -detailed-exitcode
	0||plan -lock=false
	0|LOCK UNLOCK|plan -out=saved -var v=2
	0|LOCK POST UNLOCK|apply saved
	1|LOCK UNLOCK|apply saved
	0|LOCK UNLOCK|refresh -var v=2
	0|LOCK UNLOCK|console
	0||output -raw v
	0||show
	0||show saved
	0||graph
	0||providers
	0||validate
	0||state list
	0||state show terraform_data.a
	0||state pull
	0|LOCK UNLOCK|state mv -dry-run terraform_data.a terraform_data.b
	0|LOCK POST UNLOCK|state mv terraform_data.a terraform_data.b
	0|LOCK POST UNLOCK|state mv terraform_data.b terraform_data.a
	0|LOCK POST UNLOCK|taint terraform_data.a
	0|LOCK POST UNLOCK|untaint terraform_data.a
	1|LOCK UNLOCK|untaint terraform_data.a
	0|LOCK POST UNLOCK|apply -auto-approve -replace=terraform_data.a
	0|LOCK POST UNLOCK|state rm terraform_data.a
	0|LOCK POST UNLOCK|import terraform_data.a an-id
	0|POST|apply -auto-approve -lock=false
	0|UNLOCK|force-unlock -force no-such-lock
	0||workspace show
	1||workspace new other
	0|LOCK POST UNLOCK|destroy -auto-approve
	0||init -reconfigure
	EOF
	want 'resources left' '' "$(terraform -chdir=work state list)"
}

# Promise 5, PEERS 10: what lies in the file is what terraform reads back,
# and a big integer does not make every later plan a change.
test_terraform_reads_back_the_bytes_it_wrote() {
	terraform_here
	serve
	project work demo
	cat >work/more.tf <<-'EOF'
	output "big" {
	  value = [12345678901234567890, 1.10, "a<b>&\u00e4\n", null]
	}
	EOF
	works work apply -auto-approve
	works work plan -detailed-exitcode
	terraform -chdir=work state pull | cmp - <(cat states/demo.tfstate; echo)
	has states/demo.tfstate '12345678901234567890'
}

# DESIGN, URLs; issue 2 item 2. Every dialect goes through a session: apply,
# a second one under a lock seen on disk, one that meets a lock held by
# somebody else, and force-unlock, which sends an empty body in each.
test_every_dialect_has_a_whole_session() {
	local name at lock unlock more d n=0
	local demo=4cdd0c76-d78b-11e9-9bea-db9cd8374f3a
	local gitlab=api/v4/projects/42/terraform/state/prod
	terraform_here
	serve
	while IFS='|' read -r name at lock unlock more; do
		n=$((n + 1)) d=d$n
		resources "$d"
		backend "$d" "address = \"$URL/$at\"" \
			"lock_address = \"$URL/$lock\"" \
			"unlock_address = \"$URL/$unlock\"" "${more//; /$'\n'}"
		works "$d" init
		works "$d" apply -auto-approve
		want "$at: serial" 1 "$(serial "$name")"
		slow "$d"
		begin "$d" apply -auto-approve -var v=2
		until_true test -e "$d/started"
		locked "$name" || fail "$at: applied without a lock"
		touch "$d/go"
		ended
		want "$at: second apply" 0 "$STATUS"
		want "$at: serial" 2 "$(serial "$name")"
		unlocked "$name" || fail "$at: not unlocked"

		info "holder-$n" >"states/$name.lock"
		fails "$d" apply -auto-approve -var v=3
		has "$d.out" "holder-$n"
		want "$at: serial under a lock" 2 "$(serial "$name")"
		works "$d" force-unlock -force "holder-$n"
		unlocked "$name" || fail "$at: force-unlock did nothing"
		[ -s "states/$name.tfstate" ] || fail "$at: state deleted"
		works "$d" destroy -auto-approve -var v=2
		unlocked "$name" || fail "$at: destroy left the lock"
	done <<-EOF
	own|own|own|own|
	team/prod/net|team/prod/net|team/prod/net|team/prod/net|
	dot|dot.tfstate|dot|dot.tfstate|
	a/b|a%2Fb|a%2Fb|a%2fb|
	query|query?x=1&A=2|query?x=1|query?Z=1|
	put|put|put|put|update_method = "PUT"
	delete|delete|delete|delete|unlock_method = "DELETE"
	child|child|child/lock|child/lock|lock_method = "PUT"
	mixed|mixed|terraform_lock/mixed|mixed/lock|
	$demo|terraform_state/$demo|terraform_lock/$demo|terraform_lock/$demo|lock_method = "PUT"; unlock_method = "DELETE"
	$gitlab|$gitlab|$gitlab/lock|$gitlab/lock|lock_method = "POST"; unlock_method = "DELETE"; retry_wait_min = 5
	EOF
	want 'dialects tried' 11 "$n"
}

# ---- terraform on a bad line ----------------------------------------------

# fault METHOD N HOW: a proxy, at $LINE, one request a connection. It does to
# the Nth request with METHOD what HOW says: drop, the server's answer is lost;
# 503, it is replaced; cut, half of the request reaches the server; flip, one
# bit of the body is another. It keeps requests in NUMBER.METHOD, and makes
# `hit'.
fault() {
	[ -x ./faulty ] || faulty_line
	rm -f hit line [0-9]*.[A-Z]*
	./faulty "$PORT" "$@" >line &
	echo $! >>"$T/pids"
	until_true test -s line
	LINE=http://127.0.0.1:$(cat line)
}

faulty_line() {
	need "${CC:-cc}"
	cat >faulty.c <<-'EOF'
	#include <arpa/inet.h>
	#include <signal.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <string.h>
	#include <sys/socket.h>
	#include <unistd.h>

	static char b[1 << 20];
	static struct sockaddr_in at;

	static int
	tcp(int port, int (*how)(int, const struct sockaddr *, socklen_t))
	{
		int s = socket(AF_INET, SOCK_STREAM, 0);

		at.sin_family = AF_INET;
		at.sin_port = htons((unsigned short)port);
		at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		if (s < 0 || how(s, (struct sockaddr *)&at, sizeof(at)) != 0)
			return perror("faulty"), -1;
		return s;
	}

	/* whole: b has the head and as much body as the head announces. */
	static int
	whole(size_t n)
	{
		char *end, *p;

		b[n] = 0;
		if ((end = strstr(b, "\r\n\r\n")) == NULL)
			return 0;
		end += 4;
		if ((p = strstr(b, "Content-Length: ")) != NULL && p < end)
			return (size_t)(end - b) + strtoul(p + 16, NULL, 10) <= n;
		if ((p = strstr(b, "chunked")) != NULL && p < end)
			return strcmp(b + n - 5, "0\r\n\r\n") == 0;
		return 1;
	}

	/* gather: reads up to a whole request, or to the end of the answer. */
	static size_t
	gather(int s, int request)
	{
		size_t n = 0;
		ssize_t r;

		while ((r = read(s, b + n, sizeof(b) - 1 - n)) > 0)
			if (whole(n += (size_t)r) && request)
				return n;
		return request ? 0 : n;
	}

	static void
	put(int s, const char *p, size_t n)
	{
		if (write(s, p, n) != (ssize_t)n)
			perror("faulty: write");
	}

	int
	main(int argc, char **argv)
	{
		static const char gone[] = "HTTP/1.1 503 Gone\r\n"
		    "Connection: close\r\nContent-Length: 0\r\n\r\n";
		int l = tcp(0, bind), nth = atoi(argv[3]), c, s, hit, k = 0;
		size_t n, line, word = strlen(argv[2]);
		char name[64], how = argv[argc - 1][0];
		socklen_t len = sizeof(at);
		FILE *f;

		signal(SIGPIPE, SIG_IGN);
		if (l < 0 || listen(l, 8) != 0 ||
		    getsockname(l, (struct sockaddr *)&at, &len) != 0)
			return 1;
		printf("%d\n", ntohs(at.sin_port));
		fflush(stdout);
		while ((c = accept(l, NULL, NULL)) >= 0) {
			if ((n = gather(c, 1)) == 0 ||
			    (s = tcp(atoi(argv[1]), connect)) < 0) {
				close(c);
				continue;
			}
			hit = strncmp(b, argv[2], word) == 0 && b[word] == ' ' &&
			    --nth == 0;
			if (hit)
				fclose(fopen("hit", "w"));
			snprintf(name, sizeof(name), "%d.%.*s", ++k,
			    (int)strcspn(b, " "), b);
			if ((f = fopen(name, "w")) != NULL) {
				fwrite(b, 1, n, f);
				fclose(f);
			}
			if (hit && how == 'f')
				strstr(b, "\"lineage\"")[12] ^= 1;
			line = strcspn(b, "\n") + 1;
			put(s, b, line);
			put(s, "Connection: close\r\n", 19);
			put(s, b + line, (n - line) / (hit && how == 'c' ? 2 : 1));
			if (!hit || how != 'c')
				n = gather(s, 0);
			close(s);
			if (!hit || how == 'f')
				put(c, b, n);
			else if (how == '5')
				put(c, gone, sizeof(gone) - 1);
			close(c);
		}
		return 0;
	}
	EOF
	"${CC:-cc}" -D_XOPEN_SOURCE=700 -o faulty faulty.c
}

# Promise 6; PROTOCOL sections 4 and 14; PEERS 14. terraform repeats what it
# got no answer to, and none of its verbs may mind; Connection: close at each.
test_a_lost_answer_is_not_noticed_by_an_apply() {
	local method nth how name
	terraform_here
	serve
	while read -r method nth how; do
		fault "$method" "$nth" "$how"
		name=$method-$nth-$how
		project "$name" "$name" "$LINE"
		works "$name" apply -auto-approve
		works "$name" apply -auto-approve -var v=2
		[ -e hit ] || fail "$name: the fault did not happen"
		want "$name: serial" 2 "$(serial "$name")"
		unlocked "$name" || fail "$name: the lock is left"
		works "$name" plan -detailed-exitcode -var v=2
	done <<-'EOF'
	GET 1 drop
	GET 2 503
	LOCK 1 drop
	LOCK 1 503
	LOCK 2 drop
	POST 1 drop
	POST 1 503
	POST 1 cut
	POST 2 drop
	POST 2 503
	POST 2 cut
	UNLOCK 1 drop
	UNLOCK 2 503
	EOF
}

# The same for the other way to be rid of a lock.
test_a_lost_answer_is_not_noticed_by_force_unlock() {
	terraform_here
	serve
	fault UNLOCK 1 drop
	project work demo "$LINE"
	expect 200 LOCK /demo "$(info holder)"
	works work force-unlock -force holder
	[ -e hit ] || fail 'the fault did not happen'
	unlocked demo
}

# DESIGN, POST: a body changed on its way is refused by its Content-MD5, and
# nothing is lost: not the old state, and not the new one on the client.
test_a_bit_flipped_on_the_way_is_refused_by_content_md5() {
	terraform_here
	serve
	fault POST 2 flip
	project work demo "$LINE"
	works work apply -auto-approve
	cp states/demo.tfstate old
	fails work apply -auto-approve -var v=2
	has work.out 'HTTP error: 400'
	cmp old states/demo.tfstate
	unlocked demo
	works work state push errored.tfstate
	works work plan -detailed-exitcode -var v=2
}

# PROTOCOL 2: the traffic really carries MD5s, the log tells the same sum,
# and the lock lies on disk as it was sent.
test_content_md5_of_real_traffic_is_that_of_the_bytes() {
	local f sum
	terraform_here
	need openssl
	serve
	fault NONE 1 drop
	project work demo "$LINE"
	slow work
	begin work apply -auto-approve
	until_true test -e work/started
	cp states/demo.lock held
	touch work/go
	ended
	want apply 0 "$STATUS"
	for f in *.LOCK *.POST *.UNLOCK; do
		sed -n '1,/^\r$/!p' "$f" >body
		sum=$(sed -n 's/^content-md5: \(.*\)\r$/\1/Ip;/^\r$/q' "$f")
		want "$f" "$sum" "$(openssl md5 -binary body | base64)"
		case $f in
		*.POST) cmp body states/demo.tfstate ;;
		*) cmp body held ;;
		esac
	done
	has states/demo.log "\"md5\": *\"$(md5sum <states/demo.tfstate |
		cut -d ' ' -f 1)\""
}

# Issue 4 item 9, PEERS 13: the lock and the half-written history of a run
# outlive the server, stopped or killed; terraform tries again meanwhile.
test_a_restart_under_a_running_apply_is_not_noticed() {
	local how v=0 one
	terraform_here
	unset TF_HTTP_RETRY_WAIT_MIN
	serve
	project work demo
	slow work
	for how in TERM KILL; do
		v=$((v + 1))
		rm -f work/started work/go
		begin work apply -auto-approve -var "v=$v"
		until_true test -e work/started
		halt "$how"
		[ "$how" = KILL ] || want 'server, stopped' 0 "$STATUS"
		locked demo || fail "$how: the lock went with the server"
		touch work/go
		one=$PORT
		serve -l "127.0.0.1:$one"
		PORT=$one URL=http://127.0.0.1:$one
		ended
		want "$how: apply" 0 "$STATUS"
		want "$how: serial" "$v" "$(serial demo)"
		unlocked demo || fail "$how: the lock is left"
	done
}

# ---- terraform and the lock -----------------------------------------------

# PEERS 6, PROTOCOL 5: who holds it is told; what reads goes on; what would
# write without the lock is refused, and terraform keeps it in a file.
test_a_held_lock_stops_writers_and_not_readers() {
	terraform_here
	serve
	project work demo
	works work apply -auto-approve
	cp states/demo.tfstate old
	expect 200 LOCK /demo "$(info by-somebody-else)"
	fails work plan
	has work.out 'Error acquiring the state lock'
	has work.out 'by-somebody-else'
	hasnt work.out 'unmarshal'
	works work plan -lock=false
	works work output
	works work state list
	works work state pull
	works work init -reconfigure
	fails work apply -auto-approve -lock=false -var v=2
	has work.out 'HTTP error: 423'
	[ -s work/errored.tfstate ] || fail 'no errored.tfstate'
	cmp old states/demo.tfstate
	expect 200 UNLOCK /demo "$(info by-somebody-else)"
	works work state push errored.tfstate
	works work plan -detailed-exitcode -var v=2
}

# DESIGN, on disk: a lock made by hand freezes the state, and terraform can
# read the answer; rm, or force-unlock, ends it.
test_terraform_respects_a_lock_made_by_hand() {
	terraform_here
	serve
	project work demo
	works work apply -auto-approve
	echo 'frozen for the audit' >states/demo.lock
	fails work apply -auto-approve -var v=2
	has work.out 'already locked: ID=..*'
	hasnt work.out 'unmarshal'
	fails work apply -auto-approve -var v=2 -lock=false
	want serial 1 "$(serial demo)"
	rm states/demo.lock
	works work apply -auto-approve -var v=2
	echo 'frozen again' >states/demo.lock
	works work force-unlock -force whatever
	works work apply -auto-approve -var v=3
}

# PROTOCOL 5: -lock-timeout polls, and gets the lock when it is released.
test_lock_timeout_waits_for_the_lock() {
	terraform_here
	serve
	project work demo
	expect 200 LOCK /demo "$(info holder)"
	begin work apply -auto-approve -lock-timeout=60s
	until_true grep -q 'method=LOCK .*status=423' server.log
	[ ! -e states/demo.tfstate ] || fail 'written under a foreign lock'
	expect 200 UNLOCK /demo "$(info holder)"
	ended
	want apply 0 "$STATUS"
	want serial 1 "$(serial demo)"
	unlocked demo
}

# Issue 2 item 1; promises 3 and 4. Each of twelve runs adds one to a number
# that it reads from the state: an update that is lost is a number too low.
test_twelve_applies_at_once_lose_no_update() {
	local i run runs=()
	terraform_here
	serve -k 12
	mkdir -p states
	aim w1 n
	cat >w1/main.tf <<-EOF
	data "terraform_remote_state" "before" {
	  backend = "http"
	  config = {
	    address = "$URL/n"
	  }
	}
	output "n" {
	  value = data.terraform_remote_state.before.outputs.n + 1
	}
	EOF
	state 0 | sed 's/"outputs": {}/"outputs": {"n": {"value": 0, "type": "number"}}/' \
		>states/n.tfstate
	works w1 init
	for i in {2..12}; do cp -r w1 "w$i"; done
	for i in {1..12}; do
		begin "w$i" apply -auto-approve -lock-timeout=300s
		runs+=("$RUN")
	done
	for run in "${runs[@]}"; do
		ended "$run"
		want "one of twelve" 0 "$STATUS"
	done
	want serial 12 "$(serial n)"
	want 'the number' 12 "$(terraform -chdir=w1 output n)"
	want versions 12 "$(find states/.history/n -name '*.tfstate' | wc -l)"
	unlocked n
}

# Three without -lock-timeout while one is under way: told, and harmless.
test_applies_without_lock_timeout_fail_while_one_runs() {
	local i
	terraform_here
	serve
	project w0 demo
	for i in 1 2 3; do cp -r w0 "w$i"; done
	slow w0
	begin w0 apply -auto-approve
	until_true test -e w0/started
	for i in 1 2 3; do
		fails "w$i" apply -auto-approve -var "v=$i"
		has "w$i.out" 'Error acquiring the state lock'
	done
	touch w0/go
	ended
	want 'the first' 0 "$STATUS"
	want serial 1 "$(serial demo)"
}

# Issue 2 item 1. One configuration, the names from the environment.
test_twenty_names_at_once_do_not_meet() {
	local i run runs=()
	terraform_here
	serve
	resources w0
	backend w0
	TF_HTTP_ADDRESS=$URL/x works w0 init
	for i in {1..20}; do
		cp -r w0 "w$i"
		export TF_HTTP_ADDRESS=$URL/team/n$i
		export TF_HTTP_LOCK_ADDRESS=$TF_HTTP_ADDRESS \
			TF_HTTP_UNLOCK_ADDRESS=$TF_HTTP_ADDRESS
		begin "w$i" apply -auto-approve -var "v=value-$i"
		runs+=("$RUN")
	done
	for run in "${runs[@]}"; do
		ended "$run"
		want "one of twenty" 0 "$STATUS"
	done
	for i in {1..20}; do
		want "n$i" 1 "$(serial "team/n$i")"
		has "states/team/n$i.tfstate" "\"value\": \"value-$i\""
		unlocked "team/n$i"
	done
}

# PROTOCOL 5: a console holds the lock as long as it lives.
test_console_holds_the_lock_for_its_whole_life() {
	terraform_here
	serve
	project work demo
	works work apply -auto-approve
	mkfifo keys
	terraform -chdir=work console <keys >said 2>&1 &
	RUN=$!
	echo "$RUN" >>"$T/pids"
	exec 8>keys
	until_true locked demo
	fails work plan
	echo terraform_data.a.output >&8
	exec 8>&-
	ended
	want console 0 "$STATUS"
	has said '^"1"$'
	unlocked demo
}

# Issue 4 item 9, PROTOCOL 5. The lock of a killed run stays, is told, and
# terraform's empty force-unlock ends it; the log says whose it was.
test_a_killed_apply_leaves_a_lock_that_force_unlock_ends() {
	local id
	terraform_here
	serve
	project work demo
	works work apply -auto-approve
	slow work
	begin work apply -auto-approve -var v=2
	until_true test -e work/started
	kill -9 "$RUN"
	ended
	touch work/go
	id=$(sed 's/.*"ID":"\([^"]*\)".*/\1/' states/demo.lock)
	fails work apply -auto-approve -var v=2
	has work.out "ID=$id"
	want serial 1 "$(serial demo)"
	works work force-unlock -force "$id"
	unlocked demo
	has states/demo.log "\"event\": *\"force-unlock\".*$id"
	works work apply -auto-approve -var v=2
	want serial 2 "$(serial demo)"
}

# PROTOCOL 5 and 7: on Ctrl-C terraform writes what it did, and unlocks.
test_an_interrupted_apply_saves_and_unlocks() {
	terraform_here
	serve
	project work demo
	slow work
	begin work apply -auto-approve
	until_true test -e work/started
	kill -INT "$RUN"
	ended
	touch work/go
	want 'interrupted apply' 1 "$STATUS"
	unlocked demo
	[ ! -e work/errored.tfstate ] || fail 'its write was refused'
	has states/demo.tfstate '"name": "a"'
	works work apply -auto-approve
}

# Promise 4, PROTOCOL rule 4: a run whose lock was broken writes no more, be
# the state free since or in other hands. It keeps its work in a file.
test_a_run_whose_lock_was_broken_cannot_write() {
	local since status
	terraform_here
	serve
	for since in free taken; do
		project "$since" "$since"
		works "$since" apply -auto-approve
		cp -r "$since" other
		slow "$since"
		begin "$since" apply -auto-approve -var v=lost
		until_true test -e "$since/started"
		works other force-unlock -force whatever
		works other apply -auto-approve -var v=kept
		cp "states/$since.tfstate" kept
		status=409
		if [ "$since" = taken ]; then
			status=423
			expect 200 LOCK /taken "$(info next)"
		fi
		touch "$since/go"
		ended
		want "$since: apply" 1 "$STATUS"
		has "$since.out" "HTTP error: $status"
		cmp kept "states/$since.tfstate"
		[ -s "$since/errored.tfstate" ] || fail 'no errored.tfstate'
		has "states/$since.log" '"event": *"refused"'
		rm -r other
	done
	want 'the lock' "$(info next)" "$(cat states/taken.lock)"
}

# ---- terraform and the state ----------------------------------------------

# PROTOCOL 7, PEERS 12: -force is terraform's word, and the wire does not
# show it; -s is for those who want no such thing. terraform adds one to the
# serial of what it pushes.
test_state_push_force_may_go_back_and_change_lineage() {
	local lineage=11111111-2222-4333-8444-555555555555
	terraform_here
	serve
	project work demo
	works work apply -auto-approve
	cp states/demo.tfstate first
	works work apply -auto-approve -var v=2
	works work apply -auto-approve -var v=3
	fails work state push ../first
	want serial 3 "$(serial demo)"
	works work state push -force ../first
	want serial 2 "$(serial demo)"
	works work plan -detailed-exitcode
	state 7 "$lineage" >foreign
	fails work state push ../foreign
	works work state push -force ../foreign
	want 'foreign one' "$lineage 8" "$(lineage demo) $(serial demo)"
	unlocked demo
}

# DESIGN, -s. terraform shows the refusal, and lets the lock go.
test_strict_refuses_a_forced_push() {
	terraform_here
	serve -s
	project work demo
	works work apply -auto-approve
	cp states/demo.tfstate first
	works work apply -auto-approve -var v=2
	works work apply -auto-approve -var v=3
	state 7 11111111-2222-4333-8444-555555555555 >foreign
	for f in first foreign; do
		fails work state push -force "../$f"
		has work.out 'HTTP error: 409'
		want serial 3 "$(serial demo)"
		unlocked demo
	done
	works work apply -auto-approve -var v=4
	want serial 4 "$(serial demo)"
}

# Promise 7: a deleted or overwritten state comes back, in terraform's hands.
test_an_earlier_version_is_pushed_back() {
	terraform_here
	serve
	project work demo
	works work apply -auto-approve -var v=good
	works work apply -auto-approve -var v=bad
	works work state push -force "$(echo "$T"/states/.history/demo/*-1.tfstate)"
	works work plan -detailed-exitcode -var v=good
	expect 200 DELETE /demo
	cp "$(find states/.history/demo -name '*-1.tfstate' | tail -n 1)" \
		states/demo.tfstate
	works work plan -detailed-exitcode -var v=good
}

# PROTOCOL 7: after 20 s each change is written, under the same ID.
test_a_long_apply_writes_in_between() {
	terraform_here
	serve
	project work demo
	cat >work/long.tf <<-'EOF'
	resource "terraform_data" "b" {
	  depends_on = [terraform_data.a]
	  provisioner "local-exec" {
	    command = "sleep 21"
	  }
	}
	resource "terraform_data" "c" {
	  depends_on = [terraform_data.b]
	  provisioner "local-exec" {
	    command = "timeout 30 sh -c 'until [ -e go ]; do sleep 0.05; done'"
	  }
	}
	EOF
	begin work apply -auto-approve
	PATIENCE=40 until_true test -s states/demo.tfstate
	locked demo || fail 'no lock'
	has states/demo.tfstate '"name": "b"'
	hasnt states/demo.tfstate '"name": "c"'
	expect 200 GET /demo
	cmp answer states/demo.tfstate
	touch work/go
	ended
	want apply 0 "$STATUS"
	has states/demo.tfstate '"name": "c"'
	unlocked demo
	grep 'method=POST' server.log | sed 's/.* id=\([^ ]*\).*/\1/' >ids
	[ "$(wc -l <ids)" -ge 2 ] || fail 'one write only'
	want 'IDs of its writes' 1 "$(sort -u ids | wc -l)"
}

# Promise 5, PEERS limits: 60 MB go up and come down, the same bytes.
test_a_state_of_60_megabytes_is_pushed_and_pulled() {
	terraform_here
	serve
	project work demo
	{
		state 5 | sed '/"outputs"/,$d'
		printf '  "outputs": {\n    "big": {\n      "value": "'
		head -c 60000000 /dev/zero | tr '\0' x
		printf '",\n      "type": "string"\n    }\n  },\n'
		printf '  "resources": [],\n  "check_results": null\n}\n'
	} >big
	works work state push ../big
	terraform -chdir=work state pull | cmp - <(cat states/demo.tfstate; echo)
	[ "$(wc -c <states/demo.tfstate)" -gt 60000000 ] || fail 'too short'
	unlocked demo
}

# PROTOCOL 8: refused at its head, and terraform gets to read the number.
test_too_large_a_state_is_refused_so_that_terraform_can_tell() {
	terraform_here
	serve -m 1
	project work demo
	works work apply -auto-approve
	{
		state 9 "$(lineage demo)" | sed '/"outputs"/,$d'
		printf '"outputs": {"big": {"type": "string", "value": "'
		head -c 40000000 /dev/zero | tr '\0' x
		printf '"}}, "resources": []}\n'
	} >big
	fails work state push ../big
	has work.out 'HTTP error: 413'
	want serial 1 "$(serial demo)"
	unlocked demo
	want 'times sent' 1 "$(grep -c 'status=413' server.log)"
}

# Issue 2 item 1: GET alone, also while the other is locked; and a state that
# is not there is said not to be, not taken for an empty one.
test_remote_state_is_read_from_another_configuration() {
	terraform_here
	serve
	project work demo
	works work apply -auto-approve -var v=seen
	expect 200 LOCK /demo "$(info holder)"
	mkdir reader
	cat >reader/main.tf <<-EOF
	variable "name" {}
	data "terraform_remote_state" "it" {
	  backend = "http"
	  config = {
	    address = "$URL/\${var.name}"
	  }
	}
	output "got" {
	  value = data.terraform_remote_state.it.outputs.v
	}
	EOF
	works reader init
	works reader apply -auto-approve -var name=demo
	want got seen "$(terraform -chdir=reader output -raw got)"
	fails reader apply -auto-approve -var name=other
	has reader.out 'Unable to find remote state'
}

# Issue 6 item 6: in from a local file, on to another name, out again. What
# it holds stays, each source stays, no lock stays. (Not the lineage: 1.11
# makes a new one where it finds no state.)
test_a_state_moves_from_local_to_http_to_http_to_local() {
	local at
	terraform_here
	serve
	resources work
	works work init
	works work apply -auto-approve -var v=moved
	moved() {
		works work init -migrate-state -force-copy
		works work plan -detailed-exitcode -var v=moved
	}
	for at in first team/second; do
		aim work "$at"
		moved
		has "states/$at.tfstate" '"value": "moved"'
	done
	rm -f work/backend.tf work/terraform.tfstate*
	moved
	has work/terraform.tfstate '"value": "moved"'
	[ -s states/team/second.tfstate ] || fail 'the source is gone'
	want 'locks left' '' "$(find states -name '*.lock')"
}

# Issue 6 item 6: the .stateserver directory of the demo this grew out of,
# with or without an ending, re-sorted and on one line as that wrote it.
test_states_of_the_original_demo_are_copied_in() {
	local from id
	terraform_here
	need jq
	serve
	project work source
	works work apply -auto-approve
	mkdir .stateserver
	jq -Sc . states/source.tfstate >.stateserver/one.tfstate
	jq -S . states/source.tfstate >.stateserver/two
	for from in one.tfstate two; do
		id=${from%.tfstate}
		cp ".stateserver/$from" "states/$id.tfstate"
		resources "$id"
		backend "$id" "address = \"$URL/terraform_state/$id\"" \
			"lock_address = \"$URL/terraform_lock/$id\"" \
			"unlock_address = \"$URL/terraform_lock/$id\"" \
			'lock_method = "PUT"' 'unlock_method = "DELETE"'
		works "$id" init
		works "$id" plan -detailed-exitcode
		works "$id" apply -auto-approve -var v=2
		want "$id" 2 "$(serial "$id")"
	done
}

# PROTOCOL 8 and 9: https to the plain port is told at once, in words.
test_terraform_told_to_speak_tls_hears_what_is_wrong() {
	terraform_here
	serve
	resources work
	backend work "address = \"${URL/http/https}/demo\""
	fails work init
	has work.out 'server gave HTTP response to HTTPS client'
}

# DESIGN, rights: terraform's own variables, and an account that may plan.
test_credentials_and_rights_as_terraform_meets_them() {
	terraform_here
	printf 'ci right plan\nadmin strong write\n' >users
	chmod 600 users
	serve -u users
	resources work
	aim work demo
	fails work init
	has work.out 'requires auth'
	export TF_HTTP_USERNAME=ci TF_HTTP_PASSWORD=right
	works work init
	works work plan
	unlocked demo
	fails work apply -auto-approve
	has work.out 'HTTP error: 403'
	unlocked demo
	[ ! -e states/demo.tfstate ] || fail 'ci may not write'
	TF_HTTP_USERNAME=admin TF_HTTP_PASSWORD=strong \
		works work apply -auto-approve
	fails work force-unlock -force whatever
	TF_HTTP_PASSWORD=wrong fails work plan
	has work.out 'requires auth'
}

# PROTOCOL 10: no `version', no `resources', and not one byte touched.
test_an_encrypted_opentofu_state_passes_untouched() {
	local id=5c8a7d3e-0000-4000-8000-00000000000f
	serve
	printf '{"serial":3,"lineage":"%s","meta":{"key_provider.pbkdf2.k":"eyJzYWx0Ijoi"},"encrypted_data":"%s","encryption_version":"v0"}' \
		"$id" "$(head -c 3000 /dev/urandom | base64 -w 0)" >sealed
	sed 's/"serial":3,"lineage":"[^"]*",//' sealed >alpha
	expect 200 LOCK /demo "$(info "$id")"
	for f in sealed alpha sealed; do
		expect 200 POST "/demo?ID=$id" @$f -H 'Content-Type: application/json' \
			-H "Content-MD5: $(openssl md5 -binary $f | base64)" \
			-H 'X-From-Headers: opentofu'
		cmp $f states/demo.tfstate
		expect 200 GET /demo
		cmp $f answer
	done
	expect 200 UNLOCK /demo "$(info "$id")"
	for f in / /-/versions/demo /-/changes/demo; do
		expect 200 GET "$f" '' -H 'Accept: application/json'
		hasnt answer encrypted_data
	done
	expect 200 GET / '' -H 'Accept: application/json'
	has answer '"serial": *3[,}]'
}

# ---- one command: statesrv NAME COMMAND... --------------------------------

# wrap COMMAND...: statesrv demo COMMAND... on ./states. Sets STATUS; what
# came out is in ./out and ./err.
wrap() {
	STATUS=0
	"$STATESRV" -d states demo "$@" >out 2>err || STATUS=$?
}

# Issue 6 item 1: a port and a password for the run, in the environment; what
# the command prints is all that is printed.
test_the_wrapper_hands_its_command_address_and_password() {
	local first=''
	need curl
	for _ in 1 2; do
		# shellcheck disable=SC2016
		wrap sh -c 'env | grep "^TF_HTTP_" | sort
			curl -sS -o /dev/null -w "%{http_code}\n" "$TF_HTTP_ADDRESS"
			curl -sS -o /dev/null -w "%{http_code}\n" \
			-u "$TF_HTTP_USERNAME:$TF_HTTP_PASSWORD" "$TF_HTTP_ADDRESS"'
		want "status" 0 "$STATUS"
		want "stderr" '' "$(cat err)"
		sed 's/:[0-9][0-9]*\/demo$/:PORT\/demo/
			s/\(PASSWORD\|USERNAME\)=..*/\1=SOME/' out >got
		diff got - <<-'EOF'
		TF_HTTP_ADDRESS=http://127.0.0.1:PORT/demo
		TF_HTTP_LOCK_ADDRESS=http://127.0.0.1:PORT/demo
		TF_HTTP_PASSWORD=SOME
		TF_HTTP_UNLOCK_ADDRESS=http://127.0.0.1:PORT/demo
		TF_HTTP_USERNAME=SOME
		401
		404
		EOF
		grep PASSWORD out >password
		[ "$(wc -c <password)" -ge 33 ] || fail 'a short password'
		[ "$(cat password)" != "$first" ] || fail 'the same password again'
		first=$(cat password)
	done
}

# The status is the command's, as a shell would tell it.
test_the_wrapper_exits_as_its_command_did() {
	local status command
	while read -r status command; do
		wrap sh -c "$command"
		want "$command" "$status" "$STATUS"
	done <<-'EOF'
	0 exit 0
	7 exit 7
	143 kill -TERM $$
	137 kill -KILL $$
	EOF
	wrap ./no-such-command
	want 'no such command' 127 "$STATUS"
	has err 'no-such-command'
}

test_the_wrapper_leaves_stdin_and_stdout_to_its_command() {
	echo 'yes, really' | "$STATESRV" -d states demo cat >out 2>err
	want stdout 'yes, really' "$(cat out)"
	want stderr '' "$(cat err)"
}

# A signal to statesrv alone is passed on; one to the whole group, as systemd
# and CI runners send it, is not doubled: the second one tells terraform to
# drop everything, state and lock. statesrv waits for what comes of it.
test_a_signal_reaches_the_wrapped_command_once() {
	local signal to
	need setsid
	signalled_job
	for signal in TERM HUP INT; do
		for to in '' -; do
			rm -f ready count
			setsid env --default-signal "$STATESRV" -d states demo \
				bash job >out 2>err &
			PID=$!
			echo "$PID" >>"$T/pids"
			until_true test -e ready
			halt "$signal" "$to$PID"
			wait "$PID" || STATUS=$?
			want "$signal to $to$PID: status" 5 "$STATUS"
			want "$signal to $to$PID" "$signal" "$(cat count)"
		done
	done
}

# signalled_job: ./job counts signals, and gives a second one time to come.
# It spins, so that two are not taken for one.
signalled_job() {
	cat >job <<-'EOF'
	for s in TERM HUP INT; do trap "echo $s >>count" $s; done
	[ ! -t 0 ] || touch terminal
	touch ready
	until [ -s count ] || [ $SECONDS -gt 20 ]; do :; done
	for i in {1..10}; do sleep 0.02; done
	touch over
	exit 5
	EOF
}

# Ctrl-C in a terminal, which both of them have.
# Whoever runs the tests in the background may have SIGINT ignored.
test_ctrl_c_reaches_the_wrapped_command_once() {
	need script
	signalled_job
	{
		until_true test -e ready
		printf '\003'
		until_true test -e over
	} | SHELL=/bin/sh script -qec "exec env --default-signal=INT \
		'$STATESRV' -d states demo bash job" /dev/null >out 2>&1 || STATUS=$?
	want status 5 "${STATUS-0}"
	[ -e terminal ] || fail 'the command has no terminal'
	want signals INT "$(cat count)"
}

# What is set for the server's sake is not the command's: umask, ignored
# signals, limits, descriptors, new privileges. What it was given, it keeps.
test_the_wrapped_command_finds_its_own_surroundings() {
	[ -e /proc/self/status ] || skip 'no /proc here'
	cat >job <<-'EOF'
	grep -E '^(Sig(Ign|Blk)|Cap...|NoNewPrivs|Seccomp|Umask)' /proc/self/status
	ulimit -S -a
	ulimit -H -a
	ls /proc/self/fd
	pwd
	nice
	env | grep -v -e ^TF_HTTP_ -e ^_= | sort
	touch ../outside.$$ && rm ../outside.$$
	EOF
	umask 027
	trap '' HUP USR1
	mkdir down
	cd down || exit
	bash ../job </dev/null >plain 2>&1
	"$STATESRV" -d states demo bash ../job </dev/null >wrapped 2>&1
	diff plain wrapped
}

# Two runs, two ports, `backend "http" {}', and nothing to set up again.
test_the_wrapper_carries_a_whole_terraform_session() {
	terraform_here
	resources work
	backend work
	wrap terraform -chdir=work init
	want init 0 "$STATUS"
	wrap terraform -chdir=work apply -auto-approve
	want apply 0 "$STATUS"
	wrap terraform -chdir=work plan -detailed-exitcode -var v=2
	want 'plan, changes' 2 "$STATUS"
	echo yes | TF_IN_AUTOMATION='' "$STATESRV" -d states demo \
		terraform -chdir=work apply -var v=2 >out 2>err
	want serial 2 "$(serial demo)"
	want locks '' "$(find states -name '*.lock')"
	want mode 600 "$(stat -c %a states/demo.tfstate)"
	wrap terraform -chdir=work destroy -auto-approve
	want destroy 0 "$STATUS"
	want stderr '' "$(cat err)"
}

# Two servers on one directory see each other's locks.
test_the_wrapper_works_beside_another_server() {
	terraform_here
	serve
	resources work
	backend work
	wrap terraform -chdir=work init
	expect 200 LOCK /demo "$(info beside)"
	wrap terraform -chdir=work apply -auto-approve
	want 'apply, locked' 1 "$STATUS"
	has err 'ID=beside'
	expect 200 UNLOCK /demo "$(info beside)"
	slow work
	"$STATESRV" -d states demo terraform -chdir=work apply -auto-approve \
		>out 2>err &
	RUN=$!
	echo "$RUN" >>"$T/pids"
	until_true test -e work/started
	expect 423 LOCK /demo "$(info beside)"
	expect 423 POST /demo "$(state 1)"
	touch work/go
	ended
	want 'apply, free' 0 "$STATUS"
	expect 200 GET /demo
	cmp answer states/demo.tfstate
}

# A lock left behind is named, with the line that releases it: we run that.
test_the_wrapper_names_a_lock_that_is_left_behind() {
	terraform_here
	resources work
	slow work
	backend work
	cd work || exit
	wrap terraform init
	"$STATESRV" -d states demo sh -c \
		'terraform apply -auto-approve & echo $! >run; wait' >out 2>err &
	RUN=$!
	echo "$RUN" >>"$T/pids"
	until_true test -e started
	kill -9 "$(cat run)"
	touch go
	ended
	locked demo || fail 'nothing left behind'
	has err "$(sed 's/.*"ID":"\([^"]*\)".*/\1/' states/demo.lock)"
	PATH=$(dirname "$STATESRV"):$PATH
	sh -c "$(tail -n 1 err)" </dev/null >out 2>&1 ||
		fail "$(tail -n 1 err): $(cat out)"
	unlocked demo || fail "that line released nothing: $(cat err)"
}

# That line is for a shell, whatever the lock info and the names hold.
test_the_line_that_releases_a_lock_is_quoted() {
	local id="a'b; touch pwned; '\$(touch pwned)"
	printf '{"ID":"%s","Who":"\\u001b[31m\\n\\tred"}' "$id" >lock
	mkdir bin
	# shellcheck disable=SC2016
	printf '#!/bin/sh\nshift $(($# - 1))\nprintf %%s "$1" >said\n' \
		>bin/terraform
	chmod +x bin/terraform
	PATH=$T/bin:$(dirname "$STATESRV"):$PATH
	# shellcheck disable=SC2016
	"$STATESRV" -d "it's here" "my ain't" sh -c 'curl -sS -f -X LOCK -d @lock \
		-u "$TF_HTTP_USERNAME:$TF_HTTP_PASSWORD" "$TF_HTTP_ADDRESS"' 2>err
	want 'lines on stderr' 2 "$(wc -l <err)"
	hasnt err "$(printf '\033')"
	sh -c "$(tail -n 1 err)" 2>/dev/null || :
	[ ! -e pwned ] || fail 'it ran what the ID said'
	want 'the ID' "$id" "$(cat said)"
}

# The example in the tree runs as it is, port aside.
test_demo_tf_runs_as_it_stands() {
	terraform_here
	serve
	mkdir work
	sed "s|http://127.0.0.1:8080|$URL|" "$here/demo.tf" >work/demo.tf
	works work init
	works work apply -auto-approve
	[ -s states/demo.tfstate ] || fail 'no state of the name demo'
	works work plan -detailed-exitcode
	works work destroy -auto-approve
	unlocked demo
	terraform fmt -check "$here/demo.tf"
}

# ---- durability: crashes, faults, order, several servers ------------------
#
# Promises 1 to 4, 6 and 7, proven by breaking things: kill -9, failing
# system calls, full and broken disks, two servers on one directory, one of
# them on a replicated file system that loses a replica.

# load_client: builds ./load, clients that remember what they were told.
#
#	load crash CLIENT PORTFILE [check]	until the server dies
#	load race CLIENT SECONDS PORTFILE...	a counter under a lock
#	load torn ROUNDS PORTFILE		a writer and three readers
#
# The port is read anew for each connection: servers come back elsewhere.
load_client() {
	cat >load.c <<'C'
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BIG = 1 << 20, NAMES = 3 };

static const char *port_file;
static int conn = -1;			/* kept alive between requests */
static char answer[BIG], body[BIG];	/* the last answer, a state to send */
static size_t answer_len, body_len;

static void
fail(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf(" (pid %d); last answer: %.200s\n", getpid(), answer);
	exit(1);
}

/* ---- one request: its status, or 0 if no whole answer came ---- */

static int
dial(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET };
	struct timeval patience = { 30, 0 };
	FILE *f = fopen(port_file, "r");
	unsigned port = 0;

	if (f == NULL || fscanf(f, "%u", &port) != 1)
		port = 0;
	if (f != NULL)
		fclose(f);
	a.sin_port = htons((uint16_t)port);
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	conn = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(conn, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	return port == 0 ? -1 : connect(conn, (void *)&a, sizeof(a));
}

static int
lost(void)
{
	if (errno == EAGAIN)
		fail("no answer in 30 seconds");
	close(conn);
	conn = -1;
	return 0;
}

static int
ask(const char *method, const char *path, const void *data, size_t len)
{
	char head[1024], *end = NULL, *field;
	size_t got = 0, want = SIZE_MAX;
	ssize_t n;

	if (conn == -1 && dial() == -1)
		return lost();
	n = snprintf(head, sizeof(head), "%s %s HTTP/1.1\r\nHost: localhost\r\n"
	    "Accept: application/json\r\nContent-Length: %zu\r\n\r\n",
	    method, path, len);
	answer[0] = '\0';
	if (send(conn, head, (size_t)n, MSG_NOSIGNAL |
	    (len > 0 ? MSG_MORE : 0)) != n ||
	    (len > 0 && send(conn, data, len, MSG_NOSIGNAL) != (ssize_t)len))
		return lost();
	while (got < want) {
		n = recv(conn, answer + got, BIG - 1 - got, 0);
		if (n <= 0)
			return n == 0 ? (errno = 0, lost()) : lost();
		answer[got += (size_t)n] = '\0';
		if (end != NULL || (end = strstr(answer, "\r\n\r\n")) == NULL)
			continue;
		field = strcasestr(answer, "\r\nContent-Length:");
		want = (size_t)(end + 4 - answer) + (field == NULL ||
		    field > end ? 0 : strtoul(field + 17, NULL, 10));
	}
	n = atoi(answer + 9);
	*end = '\0';
	if (strcasestr(answer, "\r\nConnection: close") != NULL) {
		close(conn);
		conn = -1;
	}
	answer_len = got - (size_t)(end + 4 - answer);
	memmove(answer, end + 4, answer_len + 1);
	return (int)n;
}

static int
ask_text(const char *method, const char *path, const char *text)
{
	return ask(method, path, text, strlen(text));
}

/* ---- states that can be told whole from torn ---- */

static void
state_make(unsigned serial)
{
	static const size_t sizes[] = { 300, 20000, 66000, 300000, 1000, 9 };
	size_t n = sizes[serial % 6];

	body_len = (size_t)sprintf(body, "{\"version\":4,\"serial\":%u,"
	    "\"lineage\":\"load\",\"pad\":\"", serial);
	memset(body + body_len, 'a' + (int)(serial % 26), n);
	body_len += n;
	body_len += (size_t)sprintf(body + body_len, "\",\"end\":%u}\n",
	    serial);
}

/* The serial of the state in answer; a torn one ends the test. */
static unsigned
state_whole(const char *where)
{
	unsigned serial;

	if (sscanf(answer, "{\"version\":4,\"serial\":%u", &serial) != 1)
		fail("%s: not a state", where);
	state_make(serial);
	if (answer_len != body_len || memcmp(answer, body, body_len) != 0)
		fail("%s: torn: %zu bytes", where, answer_len);
	return serial;
}

static uint64_t
hash(const char *p, size_t n)			/* FNV-1a; 0 is no state */
{
	uint64_t h = 14695981039346656037u;

	while (n-- > 0)
		h = (h ^ (unsigned char)*p++) * 1099511628211u;
	return h;
}

/* ---- crash: names of its own, and all that was acknowledged ---- */

struct name {
	char path[64], lock[64];	/* lock: the ID that holds it, or "" */
	unsigned serial, replaced;	/* replaced: is in the history */
	uint64_t hash;			/* of the state; 0: there is none */
	char pending;			/* P D L U: no answer came, or 0 */
	unsigned new_serial;
	uint64_t new_hash;
	char new_lock[64];
};

static struct {
	unsigned serial, id;
	struct name name[NAMES];
} know;
static const char *client;

static void
save(void)
{
	char file[64];
	FILE *f;

	snprintf(file, sizeof(file), "know.%s", client);
	f = fopen(file, "w");
	if (f == NULL || fwrite(&know, sizeof(know), 1, f) != 1 ||
	    fclose(f) != 0)
		fail("%s: %s", file, strerror(errno));
}

static void
load(void)
{
	char file[64];
	FILE *f;

	snprintf(file, sizeof(file), "know.%s", client);
	if ((f = fopen(file, "r")) != NULL) {
		if (fread(&know, sizeof(know), 1, f) != 1)
			fail("%s: cut", file);
		fclose(f);
		return;
	}
	for (int i = 0; i < NAMES; i++)
		snprintf(know.name[i].path, sizeof(know.name[i].path),
		    i == 0 ? "/deep/er/%s" : "/c%s-%d", client, i);
}

/* The server is dead, or not: then the answer must be one of the two. */
static int
must(int status, int one, int other, const char *what, const char *path)
{
	if (status == 0) {
		save();
		exit(0);
	}
	if (status != one && status != other)
		fail("%s %s: %d", what, path, status);
	return status;
}

static const char *
with(const struct name *n, const char *child, const char *id)
{
	static char path[256];

	snprintf(path, sizeof(path), "%s%s%s%s", n->path, child,
	    id[0] == '\0' ? "" : "?ID=", id);
	return path;
}

static const char *
info(const char *id)
{
	static char text[256];

	snprintf(text, sizeof(text), "{\"ID\":\"%s\",\"Operation\":\"crash\","
	    "\"Who\":\"load\",\"Created\":\"2026-11-22T13:21:24Z\"}", id);
	return text;
}

/* Sends what is pending, and takes the answer's word for it. */
static void
deed(struct name *n)
{
	int status;

	switch (n->pending) {
	case 'P':
		state_make(n->new_serial);
		status = ask("POST", with(n, "", n->lock), body, body_len);
		must(status, 200, 200, "POST", n->path);
		n->replaced = n->hash != 0 && n->hash != n->new_hash ?
		    n->serial : n->replaced;
		n->serial = n->new_serial;
		n->hash = n->new_hash;
		break;
	case 'D':
		status = ask("DELETE", with(n, "", n->lock), "", 0);
		must(status, 200, n->hash == 0 ? 404 : 200, "DELETE", n->path);
		n->replaced = n->hash != 0 ? n->serial : n->replaced;
		n->hash = 0;
		break;
	case 'L':
		status = ask_text("LOCK", n->path, info(n->new_lock));
		must(status, 200, 200, "LOCK", n->path);
		strcpy(n->lock, n->new_lock);
		break;
	case 'U':
		status = ask_text("UNLOCK", n->path, info(n->new_lock));
		must(status, 200, 200, "UNLOCK", n->path);
		n->lock[0] = '\0';
		break;
	}
	n->pending = 0;
}

/* After a restart: what was acknowledged is in force; what was on its way
 * was done or was not. Then the request is repeated: promise 6. */
static void
verify(struct name *n)
{
	const char *path = n->path;
	uint64_t h = 0;
	char id[64] = "", text[64];
	const char *p;

	if (must(ask("GET", path, "", 0), 200, 404, "GET", path) == 200) {
		state_whole(path);
		h = hash(answer, answer_len);
	}
	if (h != n->hash && !(n->pending == 'P' && h == n->new_hash) &&
	    !(n->pending == 'D' && h == 0))
		fail("%s: acknowledged %u (%llx), pending %c %u, but there is "
		    "%llx", path, n->serial, (unsigned long long)n->hash,
		    n->pending ? n->pending : '-', n->new_serial,
		    (unsigned long long)h);
	if (h != n->hash && n->hash != 0)
		n->replaced = n->serial;
	if (h != n->hash && h != 0)
		n->serial = n->new_serial;
	n->hash = h;
	path = with(n, "/lock", "");
	if (must(ask("GET", path, "", 0), 200, 404, "GET", path) == 200 &&
	    sscanf(answer, "{\"ID\":\"%60[^\"]", id) != 1)
		fail("%s: not lock info", path);
	if (strcmp(id, n->lock) != 0 &&
	    !(n->pending == 'L' && strcmp(id, n->new_lock) == 0) &&
	    !(n->pending == 'U' && id[0] == '\0'))
		fail("%s: acknowledged '%s', pending %c, but there is '%s'",
		    path, n->lock, n->pending ? n->pending : '-', id);
	strcpy(n->lock, id);
	if (n->replaced != 0) {
		snprintf(text, sizeof(text), "/-/versions%s", n->path);
		must(ask("GET", text, "", 0), 200, 200, "GET", text);
		snprintf(text, sizeof(text), "\"serial\":%u", n->replaced);
		p = strstr(answer, text);
		if (p == NULL || strchr(",}", p[strlen(text)]) == NULL)
			fail("%s: %u is not in the history", path,
			    n->replaced);
	}
	deed(n);
}

/* A refusal: nothing changes, which the next verify() will see. */
static void
trespass(struct name *n)
{
	int held = n->lock[0] != '\0';

	state_make(++know.serial);
	must(ask("POST", with(n, "", "nobody"), body, body_len),
	    held ? 423 : 409, 0, "POST by nobody", n->path);
	if (!held)
		return;
	must(ask_text("LOCK", n->path, info("other")), 423, 0,
	    "LOCK by another", n->path);
	must(ask_text("UNLOCK", n->path, info("other")), 409, 0,
	    "UNLOCK by another", n->path);
	must(ask("DELETE", with(n, "", ""), "", 0), 423, 0,
	    "DELETE without ID", n->path);
}

static void
step(struct name *n)
{
	int dice = rand() % 100;
	char path[64];

	if (dice < 40) {
		n->new_serial = ++know.serial;
		state_make(n->new_serial);
		n->new_hash = hash(body, body_len);
		n->pending = 'P';
	} else if (dice < 75) {
		n->pending = n->lock[0] == '\0' ? 'L' : 'U';
		if (n->pending == 'L')
			snprintf(n->new_lock, sizeof(n->new_lock), "%s-%u",
			    client, ++know.id);
	} else if (dice < 82)
		n->pending = 'D';
	else if (dice < 90)
		trespass(n);
	else {
		snprintf(path, sizeof(path), "/c%d-%d", rand() % 4,
		    1 + rand() % (NAMES - 1));
		if (must(ask("GET", path, "", 0), 200, 404, "GET", path) == 200)
			state_whole(path);
	}
	deed(n);
}

static int
crash(int check)
{
	load();
	for (int i = 0; i < NAMES; i++)
		verify(&know.name[i]);
	save();
	while (!check)
		step(&know.name[rand() % NAMES]);
	return 0;
}

/* ---- race: a lock, a counter in the state, several servers ---- */

static struct shared {
	atomic_int holder;		/* who was told 200 for a LOCK */
	atomic_uint count;		/* the serial that must be there */
} *shared;
static char **ports;
static int servers;

/* Asks any server, again until one answers and knows. */
static int
insist(const char *method, const char *path, const char *data, size_t len,
    int *doubt)
{
	static char copy[BIG];
	int status, tries = 0;

	memcpy(copy, data, len);
	do {
		if (tries++ > 0)
			usleep(20000);
		if (tries > 1500)
			fail("%s %s: nobody answers", method, path);
		if (conn != -1 && rand() % 2 == 0) {
			close(conn);
			conn = -1;
		}
		if (conn == -1)
			port_file = ports[rand() % servers];
		status = ask(method, path, copy, len);
		*doubt |= tries > 1 || status == 0 || status >= 500;
	} while (status == 0 || status >= 500);
	return status;
}

static int
race(int me, int seconds)
{
	unsigned mine = 0, refused = 0, serial;
	char id[64], path[96], lock[256];
	time_t end = time(NULL) + seconds;
	int doubt, status, expected;

	for (unsigned turn = 0; time(NULL) < end; turn++) {
		snprintf(id, sizeof(id), "r%d-%u", me, turn);
		snprintf(path, sizeof(path), "/race?ID=%s", id);
		strcpy(lock, info(id));
		doubt = 0;
		status = insist("LOCK", "/race", lock, strlen(lock), &doubt);
		if (status == 423) {
			refused++;
			usleep((useconds_t)(rand() % 30000));
			continue;
		}
		expected = 0;
		if (status != 200)
			fail("LOCK: %d", status);
		if (!atomic_compare_exchange_strong(&shared->holder, &expected,
		    me))
			fail("two holders: %d and %d", expected, me);
		serial = shared->count;
		status = insist("GET", "/race", "", 0, &doubt);
		if (status != (serial == 0 ? 404 : 200) ||
		    (serial != 0 && state_whole("/race") != serial))
			fail("%s: lost update: %d, not serial %u", id, status,
			    serial);
		state_make(9999996 + serial);
		status = insist("POST", "/race?ID=nobody", body, body_len,
		    &doubt);
		if (status != 423)
			fail("%s: POST under a foreign lock: %d", id, status);
		state_make(serial + 1);
		status = insist("POST", path, body, body_len, &doubt);
		if (status != 200)
			fail("%s: POST under its own lock: %d", id, status);
		shared->count = serial + 1;
		mine++;
		shared->holder = 0;
		doubt = 0;
		status = insist("UNLOCK", "/race", lock, strlen(lock), &doubt);
		if (status != 200 && !(doubt && status == 409))
			fail("%s: UNLOCK: %d", id, status);
		if (rand() % 3 > 0)
			continue;
		status = insist("POST", path, body, body_len, &doubt);
		if (status != 409 && status != 423)
			fail("%s: POST under a released lock: %d", id, status);
	}
	printf("%u %u\n", mine, refused);
	return 0;
}

/* ---- torn: six sizes in turn, read meanwhile ---- */

static int
torn(unsigned rounds)
{
	unsigned seen = 0, last, serial = 0, changes = 0;
	int readers = 3, status, bad = 0;
	pid_t writer = getpid();

	state_make(1);
	if (ask("POST", "/torn", body, body_len) != 200)
		fail("first POST");
	close(conn);
	conn = -1;
	while (readers > 0 && fork() != 0)
		readers--;
	if (readers == 0) {
		for (unsigned i = 2; i <= rounds; i++) {
			state_make(i);
			if (ask("POST", "/torn", body, body_len) != 200)
				fail("POST %u", i);
		}
		while (wait(&status) > 0)
			bad |= status;
		return bad != 0;
	}
	for (last = 0; serial < rounds && getppid() == writer; seen++) {
		if ((status = ask("GET", "/torn", "", 0)) != 200)
			fail("GET: %d", status);
		serial = state_whole("/torn");
		if (serial < last)
			fail("%u after %u", serial, last);
		changes += serial != last;
		last = serial;
	}
	printf("%u reads, %u versions\n", seen, changes);
	return 0;
}

int
main(int argc, char **argv)
{
	int fd;

	(void)argc;
	setvbuf(stdout, NULL, _IOLBF, 0);
	srand((unsigned)(getpid() ^ time(NULL)));
	alarm(120);
	if (strcmp(argv[1], "crash") == 0) {
		client = argv[2];
		port_file = argv[3];
		return crash(argv[4] != NULL);
	}
	if (strcmp(argv[1], "torn") == 0) {
		port_file = argv[3];
		return torn((unsigned)atoi(argv[2]));
	}
	fd = open("shared", O_RDWR | O_CREAT, 0600);
	if (fd == -1 || ftruncate(fd, sizeof(*shared)) == -1 ||
	    (shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
	    MAP_SHARED, fd, 0)) == MAP_FAILED)
		fail("shared");
	ports = argv + 4;
	servers = argc - 4;
	return race(atoi(argv[2]), atoi(argv[3]));
}
C
	${CC:-cc} -std=gnu11 -O1 -Wall -o load load.c
}

# port_to FILE: tells the clients where the server is now.
port_to() {
	echo "$PORT" >"$1.new"
	mv "$1.new" "$1"
}

# strays: what has no business in ./states: nothing, always.
strays() {
	find states -type f ! -name '*.tfstate' ! -name '*.lock' \
		! -name '*.log' ! -path 'states/.guard' ! -path 'states/.tmp/*'
}

no_uploads_left() {
	[ -z "$(ls -A states/.tmp)" ]
}

# crash_rounds N: N times, clients load a server that is killed at a random
# moment. After each restart every acknowledged write, lock and unlock must
# be in force, what was on its way done or not done, and nothing left over.
crash_rounds() {
	local round client clients
	load_client
	for ((round = 1; round <= $1; round++)); do
		serve_as "crash$((round % 2))" -d states
		no_uploads_left || fail "round $round: $(ls -A states/.tmp)"
		want "round $round, strays" '' "$(strays)"
		port_to port
		clients=()
		for client in 0 1 2 3; do
			./load crash $client port >load.$client &
			clients+=($!)	# they end with the server
		done
		sleep "0.$((RANDOM % 4))$((RANDOM % 10))"
		halt KILL
		for client in 0 1 2 3; do
			wait "${clients[client]}" ||
				fail "round $round: $(cat load.$client)"
		done
	done
	serve_as last -d states
	port_to port
	for client in 0 1 2 3; do
		./load crash $client port check || fail "in the end"
	done
	until_true no_uploads_left
	want "strays" '' "$(strays)"
	! grep -v 'removed an empty lock' ./*.err || fail "see above"
}

# ./test.sh crash ROUNDS
crash() {
	crash_rounds "${1:-100}" && echo "$1 rounds survived"
}

# Promise 1 and 6: kill -9 at any moment under load.
test_what_was_answered_200_survives_kill_9() {
	need "${CC:-cc}"
	grumbles			# of empty locks, and nothing else
	crash_rounds 10
}

# Promise 2: a reader gets one whole version, whatever is written meanwhile
# (PEERS bug 7: most file servers fail this).
test_readers_see_one_whole_version_while_it_is_replaced() {
	need "${CC:-cc}"
	load_client
	serve
	port_to port
	./load torn 120 port || fail "see above"
	want "versions kept" 30 "$(find states/.history/torn -type f | wc -l)"
}

# An upload that is cut off leaves the old state, and nothing in .tmp: a
# small one (memory) and a large one (disk).
test_an_upload_cut_short_changes_nothing() {
	local size
	serve
	state 1 >one
	for size in 1000 600000; do
		expect 200 POST /s @one
		{
			printf 'POST /s HTTP/1.1\r\nHost: localhost\r\n'
			printf 'Content-Length: %s\r\n\r\n{"a":"' $size
			head -c $((size - 100)) /dev/zero | tr '\0' x
		} >part
		exec 9<>"/dev/tcp/127.0.0.1/$PORT"
		cat part >&9
		[ $size = 1000 ] || until_true upload_begun
		exec 9>&-
		until_true no_uploads_left
		cmp states/s.tfstate one
	done
}

upload_begun() {
	! no_uploads_left
}

# ---- the order on disk ----

# spy OPTION...: strace watches the server until unspy; needs the right to.
spy() {
	: >spy.out
	strace -f -y -s 256 -o trace "$@" -p "$PID" 2>spy.out &
	SPY=$!				# it ends with the server, at the latest
	until_true spying
}

spying() {
	grep -q attached spy.out && return
	! grep -q -i "permitted" spy.out || skip "strace may not attach"
	kill -0 "$SPY" 2>/dev/null || fail "$(cat spy.out)"
	return 1
}

unspy() {
	local late
	kill -TERM "$SPY" 2>/dev/null || :
	# strace 6.1 may wait for a thread of a process that was killed
	{ sleep 10 && kill -9 "$SPY"; } 2>/dev/null &
	late=$!
	wait "$SPY" 2>/dev/null || :
	kill "$late" 2>/dev/null || :
}

# steps: the trace in words, in the order in which the steps were finished;
# an answer counts from when it was begun.
steps() {
	awk '
	{ thread = $1; what = "" }
	/ resumed>/ {
		sub(/.* resumed>/, "")
		$0 = part[thread] $0
	}
	/<unfinished/ && !/ (sendto|sendmsg|writev)\(/ {
		part[thread] = $0
		sub(/<unfinished.*/, "", part[thread])
		next
	}
	/write.*\/\.tmp\// { what = "write" }
	/write.*\.lock>/ { what = "write" }
	/fsync.*<[^>]*states(\/[^.>]*)?>/ { what = "dirsync" }
	/fsync.*<[^>]*\.history/ { what = "dirsync" }
	/fsync.*(\/\.tmp\/|\.lock>)/ { what = "sync" }
	/openat.*\.lock"/ { what = /O_EXCL/ ? "create" : "look" }
	/fcntl.*SETLKW.*F_WRLCK/ { what = "guard" }
	/fcntl.*SETLK.*F_UNLCK/ { what = "drop" }
	/linkat/ { what = "link" }
	/unlinkat/ { what = "unlink" }
	/renameat/ { what = "rename" }
	/mkdirat/ && / = 0/ { what = "mkdir" }
	/"HTTP\/1.1 200/ { what = "200" }
	/"HTTP\/1.1 [^2]/ { what = "refusal" }
	what != "" { printf "%s%s", sep, what; sep = " " }
	what == "200" { exit }' trace
}

# Promise 1: the data, then its name, then the directory, and only then 200;
# and the guard spans the look at the lock and the publishing, no sync of
# the data. Each line: the request, and the steps it must consist of.
test_nothing_is_answered_before_it_is_on_disk() {
	local what method path body steps
	need strace
	serve
	state 1 >one
	expect 200 POST /s @one
	expect 200 POST /s @one		# .history/s is there from now on
	info L >mine
	while IFS='|' read -r what method path body steps; do
		spy -e trace=file,desc,network
		expect 200 "$method" "$path" "$body"
		until_true answered
		unspy
		[[ $(steps) =~ ^(look )?($steps)$ ]] ||
			fail "$what: $(steps), should be: $steps"
	done <<-'END'
	lock|LOCK|/s|@mine|(guard look create write drop sync |write sync guard look link (unlink )?drop (unlink )?)dirsync 200
	the same|LOCK|/s|@mine|(write sync )?guard look (look )?drop (sync )?(unlink )?dirsync 200
	write|POST|/s?ID=L|@one|write sync guard look link rename drop dirsync 200
	unlock|UNLOCK|/s|@mine|guard look unlink drop dirsync 200
	again|UNLOCK|/s|@mine|guard look drop dirsync 200
	delete|DELETE|/s||guard look link (dirsync )?unlink drop dirsync 200
	first|POST|/a/b|@one|write sync mkdir dirsync guard look rename drop dirsync 200
	second|POST|/a/b|@one|write sync guard look (mkdir dirsync )+link rename drop dirsync 200
	END
}

answered() {
	grep -q '"HTTP/1.1 200' trace
}

# ---- faults ----

fault_files() {
	state 1 >old
	state 2 >new
	info L >mine
	info S >stale
	printf '{"serial":3,"pad":"%0*d"}' 90000 7 >large
	printf '{"serial":4,"pad":"%0*d"}' 90000 8 >big
}

# A deed's world: ./old is the state, ./mine the lock; then the deed, asked of
# the server; then whether it was done, seen in the files.
fault_world() {
	rm -f states/s.lock
	cat old >states/s.tfstate
	case $1 in
	first) rm states/s.tfstate ;;
	write | unlock | relock | look) cat mine >states/s.lock ;;
	list)
		cat mine >states/s.lock
		mkdir -p states/t
		cat old >states/t/u.tfstate
		;;
	break)
		cat stale >states/s.lock
		touch -d '3 hours ago' states/s.lock
		;;
	big) cat big >states/s.tfstate ;;
	esac
}

fault_deed() {
	local how
	case $1 in
	write) how=(POST '/s?ID=L' @new) ;;
	large) how=(POST /s @large) ;;
	first) how=(POST /s @new) ;;
	lock | relock | break) how=(LOCK /s @mine) ;;
	unlock) how=(UNLOCK /s @mine) ;;
	delete) how=(DELETE /s) ;;
	read | big) how=(GET /s) ;;
	look) how=(GET /s/lock) ;;
	list) how=(GET /) ;;
	esac
	STATUS=$(curl -sS -m "$PATIENCE" -o answer -H Expect: -X "${how[0]}" \
		${how[2]:+--data-binary "${how[2]}"} -w '%{http_code}' \
		"$URL${how[1]}" 2>curl.err) || STATUS="cut after $STATUS"
}

fault_done() {
	case $1 in
	write | first) cmp -s states/s.tfstate new ;;
	large) cmp -s states/s.tfstate large ;;
	lock | relock | break) cmp -s states/s.lock mine ;;
	unlock) [ ! -e states/s.lock ] ;;
	delete) [ ! -e states/s.tfstate ] ;;
	read) cmp -s answer old ;;
	big) cmp -s answer big ;;
	look) cmp -s answer mine ;;
	list) # whole: with less, a state or a lock would seem to be gone
		grep -q '^t/u ' answer &&
			grep -q -E '^s .*(ID L|cannot be read)' answer
		;;
	esac
}

# Nothing of the deed, and nothing else, may have changed.
fault_undone() {
	local before=old lock=
	case $1 in
	write | unlock | relock | look | list) lock=mine ;;
	break) lock=stale ;;
	first) before= ;;
	big) before=big ;;
	esac
	as_it_was states/s.tfstate "$before" && as_it_was states/s.lock "$lock"
}

as_it_was() {
	[ -n "$2" ] || { [ ! -e "$1" ] && return; }
	cmp -s "$1" "$2"
}

# fault_sites DEED: its system calls that work on ./states, each as the how
# manieth call of that name in its thread, and the errors to try. A large
# upload is two jobs, in one thread or two: its write calls (another is to the
# pipe that wakes the loop) cannot be told apart by counting.
fault_sites() {
	fault_world "$1"
	spy -e trace=file,desc,network,futex
	fault_deed "$1"
	until_true at_rest		# there is work after the answer, too
	unspy
	awk -v dir="<$PWD/states" '
	BEGIN {
		e["openat"] = "EMFILE EIO ENOSPC"
		e["write"] = e["mkdirat"] = "ENOSPC EDQUOT EIO EINTR"
		e["fsync"] = "EIO ENOSPC EINTR"
		e["linkat"] = e["renameat"] = e["unlinkat"] = "ENOSPC EIO"
		e["fcntl"] = "EINTR ENOLCK EIO"
		e["pread64"] = e["read"] = e["sendfile"] = "EIO EINTR"
		e["newfstatat"] = e["fstat"] = e["fstatfs"] = "EIO"
		e["getdents64"] = "EIO"
		e["accept4"] = "EMFILE EINTR"
		e["sendto"] = e["recvfrom"] = "EINTR"
	}
	/resumed>|^[0-9]+ +[-+]/ { next }
	{
		call = $2
		sub(/\(.*/, "", call)
		n = ++count[$1, call]
		if (call in e && (index($0, dir) || /accept4|sendto|recvfrom/))
			for (i = split(e[call], es, " "); i > 0; i--)
				if (!seen[call, n, es[i]]++)
					print call, n, es[i]
	}' trace | if [ "$1" = large ]; then grep -v ^write; else cat; fi
}

# at_rest: every thread of the server waits for something to do.
at_rest() {
	awk '{ last[$1] = $0 }
	END { for (t in last) if (last[t] !~ / (futex|poll)\(/) exit 1 }' trace
}

# Promise 1 and 8: each system call of each deed fails in turn. There is an
# answer; it is 200 only if the thing is done; else the old state and lock
# are as they were, except that after a failing sync of the directory nobody
# can know; the same request then says 200; nothing is left in .tmp.
test_every_failing_system_call_is_survived() {
	local deed call n error site
	need strace
	serve -k 2 -b 1
	grumbles
	fault_files
	for deed in write large first lock relock break unlock delete read big \
		look list; do
		for n in 1 2 3 4; do	# the history is full, threads started
			fault_world $deed
			fault_deed $deed
			want "$deed, no fault" 200 "$STATUS"
		done
		fault_sites $deed >sites
		[ -s sites ] || fail "$deed: no system calls: $(cat trace)"
		while read -r call n error; do
			site="$deed, $call $n is $error"
			fault_world $deed
			spy -e trace="$call" \
				-e inject="$call:error=$error:when=$n"
			fault_deed $deed
			unspy
			fault_judge $deed
		done <sites
		cat sites >>all.sites
	done
	[ "$(wc -l <all.sites)" -gt 100 ] || fail "few faults: $(cat all.sites)"
	[ ! -e blamed ] || fail "$(cat blamed)"
}

fault_judge() {
	local status=$STATUS
	case $status in
	200) fault_done "$1" || blame "200, but it is not done" ;;
	5??) grep -q '^cannot .' answer || blame "says: $(cat answer)" ;;
	'cut after 200') [ "$1" = big ] || blame "$(cat curl.err)" ;;
	*) blame "$status: $(cat answer curl.err)" ;;
	esac
	if [ "$status" != 200 ] && ! fault_undone "$1" &&
		! { [ "$call" = fsync ] && fault_done "$1"; }; then
		blame "$status, but the old is gone"
	fi
	fault_deed "$1"
	fault_repeated "$1" "$status"
	[ "$call" = unlinkat ] || no_uploads_left || blame "$(ls states/.tmp)"
	rm -f states/.tmp/*
	ask GET /-/ready
	[ "$STATUS" = 200 ] || blame "not ready: $(cat answer)"
}

# What the same request must get once the trouble is over.
fault_repeated() {
	case $1$STATUS in
	delete404) ;;
	*200) fault_done "$1" || blame "$2, then 200, but not done" ;;
	*) blame "$2, then $STATUS: $(cat answer)" ;;
	esac
}

blame() {
	echo "$site: $*" >>blamed
}

# A lock that was created, and whose server died before it could write it: the
# one leftover that can be seen. Its mode tells it from one made by hand.
torso() {
	[ -n "$(find states -name '*.lock' -empty -perm 0700)" ]
}

# Promise 1, 3 and 6: of two servers on one directory, one is killed on
# entering each system call by which a deed changes something. What is left is
# the old or the new, and the other server, which has not restarted, does the
# client's repetition of the request.
test_a_server_killed_at_any_step_leaves_the_other_no_trap() {
	local deed call n site other victim
	need strace
	grumbles
	fault_files
	serve_as survivor -d states -k 2 -b 1
	other=$URL
	for deed in write large first lock break unlock delete; do
		serve_as "sample$deed" -d states -k 2 -b 1
		fault_sites $deed | awk '/openat|write|sync|link|rename|mkdir|\
fcntl/ { print $1, $2 }' | uniq >sites
		halt
		while read -r call n; do
			site="$deed, killed at $call $n"
			serve_as victim -d states -k 2 -b 1
			victim=$PID
			no_uploads_left || blame "not swept"
			fault_world $deed
			spy -e trace="$call" -e inject="$call:signal=KILL:when=$n"
			fault_deed $deed
			unspy
			halt KILL "$victim" 2>/dev/null || :	# or it is
			want "$site, strays" '' "$(strays)"
			fault_done $deed || fault_undone $deed || torso ||
				blame "neither old nor new"
			URL=$other
			fault_deed $deed
			fault_repeated $deed dead
		done <sites
		cat sites >>all.sites
	done
	[ "$(wc -l <all.sites)" -gt 30 ] || fail "few: $(cat all.sites)"
	[ ! -e blamed ] || fail "$(cat blamed)"
}

# A short write, then EFBIG and SIGXFSZ: a file size limit does what a full
# disk does, in the middle of a file.
test_a_short_write_is_a_refused_write() {
	ulimit -S -f 64
	grumbles
	serve
	ulimit -S -f unlimited
	state 1 >one
	info L >mine
	printf '{"serial":2,"pad":"%0*d"}' 300000 7 >big
	expect 200 POST /s @one
	expect 200 LOCK /s @mine
	expect 507 POST '/s?ID=L' @big
	cmp states/s.tfstate one
	cmp states/s.lock mine
	no_uploads_left || fail "left: $(ls states/.tmp)"
	expect 200 POST '/s?ID=L' @one
	expect 200 UNLOCK /s @mine
}

# apart FLAGS FUNCTION: runs it in namespaces of its own (unshare's flags),
# as root there: its mounts and processes end with it, however it ends.
apart() {
	local rc=0 flags=(--mount --pid --fork --kill-child --mount-proc "$1")
	need unshare
	[ "$(id -u)" = 0 ] || flags+=(--map-root-user)
	unshare "${flags[@]}" true 2>/dev/null || skip "no namespaces here"
	mkdir apart
	{
		declare -f
		declare -p here PATIENCE STATESRV
		echo "set -eu; T=$PWD/apart; cd '$PWD'; $2"
	} >apart.sh
	unshare "${flags[@]}" bash apart.sh &
	echo $! >>"$T/pids"
	wait $! || rc=$?
	[ $rc != 77 ] || mv apart/skipped "$T/skipped"
	return $rc
}

# Issue 4, full disks: writes are refused while locks still work; stderr and
# /-/ready tell of it, once each way; freed space ends it.
test_a_full_disk_refuses_writes_and_keeps_the_locks() {
	grumbles
	apart --mount full_disk
}

full_disk() {
	local n status
	mkdir states
	mount -t tmpfs -o size=2m tmpfs states || skip "no tmpfs here"
	serve
	printf '{"serial":1,"pad":"%0*d"}' 100000 0 >big
	info L >mine
	for ((n = 1; n < 30; n++)); do
		ask POST "/s$n" @big
		[ "$STATUS" = 200 ] || break
	done
	want "write that does not fit" 507 "$STATUS"
	has answer 'no room'
	[ $n -gt 10 ] || fail "full after $n writes"
	[ ! -e "states/s$n.tfstate" ] || fail "refused, but it is there"
	want "strays" '' "$(strays)"
	expect 200 LOCK /s1 @mine
	expect 507 POST '/s1?ID=L' @big
	until_true no_uploads_left
	cmp states/s1.tfstate big
	# Somebody else eats into the reserve, and then takes all of it.
	fill_all_but 40
	expect 507 POST '/s1?ID=L' '{"serial":2}'
	expect 503 GET /-/ready
	expect 503 GET /-/ready
	has answer 'room|full'
	want "told once" 1 "$(grep -c 'nearly full' server.err)"
	expect 200 UNLOCK /s1 @mine
	expect 200 LOCK /s2 @mine
	expect 200 UNLOCK /s2 @mine
	expect 200 LOCK /s3 @mine
	fill_all_but 0
	expect 507 LOCK /s1 @mine
	[ ! -e states/s1.lock ] || fail "refused, but there is a lock"
	expect 200 UNLOCK /s3 @mine
	expect 200 UNLOCK /s3 @mine
	[ ! -e states/s3.lock ] || fail "the lock is still there"
	expect 200 GET /s3
	cmp answer big
	rm states/filler.log states/s4.tfstate states/s5.tfstate
	expect 200 GET /-/ready
	want "told once" 1 "$(grep -c 'room again' server.err)"
	expect 200 LOCK /s1 @mine
	expect 200 POST '/s1?ID=L' '{"serial":2}'
	want "strays" '' "$(strays)"
}

# fill_all_but KIB: of the file system under ./states.
fill_all_but() {
	local free
	free=$(df --output=avail -k states | tail -1)
	head -c $(((free - $1) * 1024)) /dev/zero >>states/filler.log
	[ "$1" -gt 0 ] || ! echo >>states/filler.log || fill_all_but 0
}

# Issue 4: the disk breaks and the kernel makes the file system read-only:
# what is there is read, writes and locks are refused, nothing is lost.
test_a_broken_disk_is_read_and_not_written() {
	need mkfs.ext4
	[ "$(id -u)" = 0 ] || skip "needs root"
	grumbles
	apart --mount broken_disk
}

broken_disk() {
	local dev
	mkdir states
	truncate -s 16m disk
	mkfs.ext4 -q disk
	mount -o loop,errors=remount-ro disk states || skip "no loop device"
	rmdir states/lost+found
	serve
	state 1 >one
	info L >mine
	expect 200 POST /s @one
	expect 200 LOCK /s @mine
	dev=$(findmnt -n -o SOURCE states)
	echo broken >"/sys/fs/ext4/${dev#/dev/}/trigger_fs_error"
	until_true read_only
	local deed method path body
	while read -r method path body; do
		ask "$method" "$path" "$body"
		[[ $STATUS = 5* ]] || fail "$method $path: $STATUS"
		has answer 'cannot .*Read-only'
		cmp states/s.lock mine
		cmp states/s.tfstate one
	done <<-'END'
	POST /s?ID=L {"serial":2}
	POST /new {"serial":2}
	LOCK /new {"ID":"M"}
	LOCK /s @mine
	UNLOCK /s @mine
	DELETE /s?ID=L
	END
	expect 503 GET /-/ready
	expect 200 GET /s
	cmp answer one
	expect 200 GET /s/lock
	expect 423 LOCK /s '{"ID":"M"}'
	want "what is there" 's.lock s.log s.tfstate' "$(cd states && echo *)"
}

read_only() {
	! touch states/probe 2>/dev/null
}

# Promise 2: 404 never means "could not look". The directory is moved, and
# nobody notices; it is removed, and no state becomes "no state yet".
test_a_directory_removed_under_the_server_is_no_404() {
	local method path body
	grumbles
	serve
	state 1 >one
	expect 200 POST /team/s @one
	expect 200 POST /s @one
	mv states elsewhere
	expect 200 GET /team/s
	mv elsewhere states
	expect 200 POST /s @one
	rm -rf states
	while read -r method path body; do
		ask "$method" "$path" "$body"
		[[ $STATUS = 5* ]] || fail "$method $path: $STATUS"
		has answer '^cannot .*removed'
	done <<-'END'
	GET /s
	GET /team/s
	GET /other
	GET /s/lock
	GET /-/log/s
	GET /-/versions/s
	POST /s {"serial":2}
	POST /new/s {"serial":2}
	LOCK /s {"ID":"L"}
	UNLOCK /s {"ID":"L"}
	DELETE /s
	GET /-/ready
	END
	expect 200 GET /-/healthy
	[ ! -e states ] || fail "it made a new directory in silence"
}

# What servers share is .guard: a second file of that name guards nothing.
test_a_guard_removed_under_the_server_stops_writes() {
	grumbles
	serve
	state 1 >one
	expect 200 POST /s @one
	rm states/.guard
	ask POST /s '{"serial":2}'
	[[ $STATUS = 5* ]] || fail "POST without a guard: $STATUS"
	ask LOCK /s '{"ID":"L"}'
	[[ $STATUS = 5* ]] || fail "LOCK without a guard: $STATUS"
	cmp states/s.tfstate one
	[ ! -e states/s.lock ] || fail "a lock without a guard"
	expect 200 GET /s
}

# ---- several servers on one directory ----

# contend SECONDS PAUSE DIR DIR [AT_HALF_TIME]: a server on each of two
# directories which are one; six clients increment a counter in a state under
# its lock, through either; every PAUSE seconds one of the servers is killed
# and comes back elsewhere.
contend() {
	local seconds=$1 dirs=("$3" "$4") half=${5:-:} end client pids=()
	local client_pids=() which=0 n=0 mine=0 all=0
	load_client
	for which in 0 1; do
		serve_as "s$which" -d "${dirs[which]}"
		pids[which]=$PID
		port_to "port.$which"
	done
	for client in 1 2 3 4 5 6; do
		./load race $client "$seconds" port.0 port.1 >race.$client &
		client_pids+=($!)
		echo $! >>"$T/pids"
	done
	end=$((SECONDS + seconds / 2))
	while racing; do
		sleep "$2"
		which=$((1 - which))
		halt KILL "${pids[which]}"
		serve_as "s$which.$((++n))" -d "${dirs[which]}"
		pids[which]=$PID
		port_to "port.$which"
		[ "$SECONDS" -lt $end ] || { $half && half=:; }
	done
	for client in 1 2 3 4 5 6; do
		wait "${client_pids[client - 1]}" ||
			fail "client $client: $(cat race.$client)"
		read -r mine _ <race.$client
		all=$((all + mine))
	done
	[ $all -gt 10 ] || fail "only $all turns"
	expect 404 GET /race/lock
	expect 200 GET /race
	has answer "\"serial\":$all,"
	echo "$all turns: $(cat race.?)"
}

racing() {
	local client
	for client in "${client_pids[@]}"; do
		! kill -0 "$client" 2>/dev/null || return 0
	done
	return 1
}

# Promise 3 and 4 across processes: no lock has two holders, no update is
# lost, nothing lands under a foreign or a released lock.
test_two_servers_share_a_directory() {
	need "${CC:-cc}"
	contend 5 0.4 states states
	until_true no_uploads_left
	want "strays" '' "$(strays)"
}

# Promise 4 across processes, in its narrowest gap: one server has looked at
# the lock and is about to rename (strace holds it there); meanwhile the lock
# is broken and taken through the other. That must wait, or the write must
# fail: what the new holder reads does not change under it.
test_no_write_lands_under_a_lock_taken_through_another_server() {
	local post
	need strace
	state 1 >one
	state 2 >two
	serve_as other -d states
	URL_OTHER=$URL
	serve_as slow -d states
	expect 200 POST /s @one
	expect 200 LOCK /s "$(info L)"
	spy -e trace=renameat,renameat2,linkat \
		-e inject=renameat,renameat2:delay_enter=1500000:when=1
	ask POST '/s?ID=L' @two -o post -D post.head &
	post=$!
	until_true grep -q linkat trace
	URL=$URL_OTHER
	expect 200 UNLOCK /s
	expect 200 LOCK /s "$(info M)"
	expect 200 GET /s
	cp answer read
	wait $post || fail "the POST: $(cat post)"
	unspy
	expect 200 GET /s
	cmp answer read || fail "it changed under the lock M"
	want "holder" "$(info M)" "$(cat states/s.lock)"
}

# The same on GlusterFS, replica 3, mounted twice as the README says; one
# replica is killed meanwhile. All of it lives in namespaces: its daemons,
# its mounts, its files and its network end with them.
test_two_servers_share_a_replicated_file_system() {
	need "${CC:-cc}" glusterd gluster mount.glusterfs ip
	[ "$(id -u)" = 0 ] || skip "needs root"
	[ -c /dev/fuse ] || skip "no /dev/fuse"
	grumbles
	apart --net shared_by_gluster
	want "processes left" '' "$(pgrep -f "$PWD/brick" || :)"
	hasnt /proc/self/mountinfo "$PWD"
}

shared_by_gluster() {
	local dir
	replicated_volume
	for dir in a b; do
		mkdir $dir
		mount -t glusterfs -o "direct-io-mode=enable,$(printf %s, \
			{attribute,entry,negative}-timeout=0)" \
			192.0.2.1:/shared $dir
	done
	mkdir a/states
	contend 12 1.5 a/states b/states lose_a_replica
	for dir in a b; do
		want "uploads left in $dir" '' "$(ls -A $dir/states/.tmp)"
	done
	cp answer last
	lose_the_quorum
}

replicated_volume() {
	local dir bricks=() set
	ip link set lo up
	ip addr add 192.0.2.1/32 dev lo		# RFC 5737: of no network
	for dir in /run /var/lib/glusterd /var/log/glusterfs; do
		mkdir -p $dir
		mount -t tmpfs tmpfs $dir
	done
	mkdir /run/gluster
	glusterd
	until_true gluster --mode=script volume list >/dev/null 2>&1
	for dir in 1 2 3; do
		bricks+=("192.0.2.1:$PWD/brick$dir")
	done
	gluster --mode=script volume create shared replica 3 "${bricks[@]}" \
		force
	# Caches above the replicas: of names, of contents, of writes.
	for set in stat-prefetch quick-read open-behind write-behind; do
		until_true gluster --mode=script volume set shared \
			performance.$set off
	done
	until_true gluster --mode=script volume start shared force
}

lose_a_replica() {
	kill -9 "$(cat /run/gluster/vols/shared/*brick2.pid)"
}

# One replica of three is not enough: all is refused, and nothing is 404.
# When they are back, all is as it was.
lose_the_quorum() {
	local method path body
	kill -9 "$(cat /run/gluster/vols/shared/*brick3.pid)"
	while read -r method path body; do
		ask "$method" "$path" "$body"
		[[ $STATUS = 5* ]] || fail "$method $path: $STATUS"
	done <<-'END'
	GET /race
	GET /other
	POST /race {"serial":0}
	LOCK /race {"ID":"M"}
	GET /-/ready
	END
	until_true gluster --mode=script volume start shared force
	until_true unlocked_again
	expect 200 GET /-/ready
	expect 404 GET /other
	expect 200 GET /race
	cmp answer last
	expect 200 LOCK /race '{"ID":"M"}'
	expect 200 POST '/race?ID=M' '{"serial":0}'
}

# The replica that was lost first still has a lock, long since released.
unlocked_again() {
	ask GET /race/lock
	[ "$STATUS" != 200 ] || fail "a released lock is back: $(cat answer)"
	[ "$STATUS" = 404 ]
}

# ---- stopping and starting ----

# begin_upload FD NAME: half of a state is sent, on a descriptor of its own.
begin_upload() {
	eval "exec $1<>/dev/tcp/127.0.0.1/$PORT"
	{
		printf 'POST /%s HTTP/1.1\r\nHost: localhost\r\n' "$2"
		printf 'Content-Length: %s\r\n\r\n' "$(wc -c <whole)"
		cat half.1
	} >&"$1"
}

# end_upload FD: sends the rest; what the server said, at once or later.
end_upload() {
	cat half.2 >&"$1"
	timeout "$PATIENCE" head -1 <&"$1" | tr -d '\r'
	eval "exec $1>&-"
}

halves() {
	printf '{"serial":1,"pad":"%0*d' "$1" 0 >half.1
	printf '%0*d"}' "$1" 0 >half.2
	cat half.1 half.2 >whole
}

deaf() {
	! (exec 8<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null
}

# Issue 4: SIGTERM during 50 uploads: those complete, small and large; who
# comes later is refused; the exit status is 0.
test_sigterm_lets_uploads_finish() {
	local fd
	serve
	halves 200
	for ((fd = 100; fd < 125; fd++)); do begin_upload $fd "small$fd"; done
	halves 300000
	for ((fd = 125; fd < 150; fd++)); do begin_upload $fd "large$fd"; done
	until_true uploads_begun 25
	kill -TERM "$PID"
	until_true deaf
	kill -0 "$PID" || fail "gone, with uploads under way"
	for ((fd = 125; fd < 150; fd++)); do
		want "upload $fd" 'HTTP/1.1 200 OK' "$(end_upload $fd)"
		cmp whole states/large$fd.tfstate
	done
	halves 200
	for ((fd = 100; fd < 125; fd++)); do
		want "upload $fd" 'HTTP/1.1 200 OK' "$(end_upload $fd)"
		cmp whole states/small$fd.tfstate
	done
	STATUS=0
	wait "$PID" || STATUS=$?
	want "exit status" 0 "$STATUS"
	no_uploads_left || fail "left: $(ls states/.tmp)"
}

uploads_begun() {
	[ "$(find states/.tmp -type f | wc -l)" -ge "$1" ]
}

# Who was told 200 on a connection that stays may ask again at once: that is
# answered, although SIGTERM came before the loop had heard of the first. Its
# wake-up is held back here, so that it is so each time.
test_a_request_behind_an_early_answer_is_answered_at_the_end() {
	need strace
	local line n
	serve
	exec 9<>"/dev/tcp/127.0.0.1/$PORT"
	put() {
		printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n'
		printf '{"serial":%d}' "$1"
	}
	for n in 1 2 3; do
		[ $n != 2 ] || spy -e trace=write -e inject=write:delay_enter=300000
		put $n >&9
		[ $n != 3 ] || kill -TERM "$PID"
		read -r -t "$PATIENCE" line <&9 || line='no answer'
		want "write $n" $'HTTP/1.1 200 OK\r' "$line"
		while [ "$line" != $'\r' ]; do
			read -r -t "$PATIENCE" line <&9 || break
		done
	done
	exec 9>&-
	grumbles			# a leak check cannot be made under strace
	wait "$PID" || :
	unspy
	want state '{"serial":3}' "$(cat states/x.tfstate)"
}

# A second SIGTERM does not wait, and its exit status says so.
test_a_second_sigterm_exits_at_once() {
	serve
	halves 300000
	begin_upload 100 s
	until_true uploads_begun 1
	kill -TERM "$PID"
	until_true deaf
	kill -0 "$PID" || fail "gone, with an upload under way"
	halt TERM
	[ "$STATUS" != 0 ] || fail "exit status 0, with an upload under way"
	exec 100>&-
	[ ! -e states/s.tfstate ] || fail "half a state is there"
	serve_as next -d states
	no_uploads_left || fail "not swept: $(ls states/.tmp)"
}

# Temporary files of a server that is dead are swept by the next to start;
# those of a living one on the same directory are not.
test_only_a_dead_servers_uploads_are_swept() {
	local dead living
	halves 300000
	serve_as dead -d states
	begin_upload 100 dead
	until_true uploads_begun 1
	dead=$(ls states/.tmp)
	halt KILL
	cp "states/.tmp/$dead" kept
	serve_as living -d states
	no_uploads_left || fail "the dead one's upload is still there"
	cp kept "states/.tmp/$dead"
	begin_upload 101 living
	until_true uploads_begun 2
	living=$(find states/.tmp -type f ! -name "$dead" -printf '%f\n')
	serve_as third -d states
	want "uploads left" "$living" "$(ls states/.tmp)"
	want "the living upload" 'HTTP/1.1 200 OK' "$(end_upload 101)"
	cmp whole states/living.tfstate
	no_uploads_left
}

# An empty .lock at start is a LOCK that nobody was told of: it is removed
# and reported (PEERS bug 9). One that says something stays.
test_an_empty_lock_is_removed_at_start() {
	grumbles
	mkdir -p states/team
	touch states/torn.lock states/team/torn.lock
	echo 'frozen for the audit' >states/frozen.lock
	info L >states/held.lock
	serve
	until_true test ! -e states/torn.lock -a ! -e states/team/torn.lock
	until_true grep -q '^statesrv: team/torn: .*empty lock' server.err
	until_true grep -q '^statesrv: torn: .*empty lock' server.err
	want "complaints" 2 "$(wc -l <server.err)"
	expect 200 LOCK /torn "$(info M)"
	expect 423 LOCK /frozen "$(info M)"
	expect 423 LOCK /held "$(info M)"
	expect 200 LOCK /held "$(info L)"
}

# ---- what stands around the server ----------------------------------------
#
# Fronts that speak TLS, systemd, a container engine, a browser: each is
# started for real where it is installed. The configurations are not written
# here but taken from the README, so that what it shows is what was tried.

# recipe FILE: the text that the README shows under the line "# FILE".
recipe() {
	awk -v head="# $1" '
		!/^[ \t]/ && NF { on = 0 }
		{ sub(/^(\t|    )/, "") }
		/^# [^ ]*[.\/][^ ]*$/ { on = $0 == head }
		on' "$here/README" >recipe
	[ -s recipe ] || fail "the README has no $1"
	cat recipe
}

# behind FILE OPTION...: a server on ./sock; the README's FILE in ./front,
# for paths here and $FRONT, a port that was free a moment ago. (A socket's
# path has room for 107 bytes, hence the short way to this directory.)
behind() {
	local file=$1 dir=/proc/$BASHPID/cwd
	shift
	serve_as probe -d probe
	FRONT=$PORT
	halt
	serve -l unix:sock "$@"
	recipe "$file" | sed "s|/etc/statesrv/|$T/|g; s|/run/statesrv.sock|$dir/sock|
		s|states.example.org {|localhost:$FRONT {|; s|states.example.org|localhost|
		s|\<443\>|127.0.0.1:$FRONT|" >front
	recipe certificates.sh | sed 's|states.example.org|localhost|' >make-certs
	bash -e make-certs 2>openssl.out || fail "$(cat openssl.out)"
	URL=https://localhost:$FRONT
}

# front COMMAND...: starts it, waits until it takes connections.
front() {
	"$@" >front.out 2>&1 &
	echo $! >>"$T/pids"
	until_true front_is_up
}

front_is_up() {
	(: <>"/dev/tcp/127.0.0.1/$FRONT") 2>/dev/null
}

# mtls METHOD PATH [BODY [OPTION...]]: ask, with a client certificate.
mtls() {
	ask "$1" "$2" "${3-}" --cacert ca.crt --cert client.crt --key client.key \
		"${@:4}"
}

# What must hold behind any front: terraform's whole round, TLS and client
# certificate from the environment; force-unlock's empty chunked body; an
# early answer to a large upload; the client's address, which it cannot forge.
lives_behind_the_front() {
	local id=11111111-2222-4333-8444-555555555555 mark
	resources work
	backend work
	recipe client.sh | sed "s|states.example.org|localhost:$FRONT|" >env.sh
	# shellcheck source=/dev/null
	. ./env.sh
	works work init
	works work apply -auto-approve
	has states/demo.tfstate '"serial": 1,'
	works work apply -auto-approve -var v=2
	until_true grep -q -E "client=127\.0\.0\.1[: ](.* )?method=POST .*status=200" \
		server.log

	mtls LOCK /demo "$(info "$id")"
	want "LOCK" 200 "$STATUS"
	fails work apply -auto-approve -var v=3
	has work.out "$id"
	{ state 9 && head -c 20000000 /dev/zero | tr '\0' ' '; } >large
	# HTTP/1.1, for curl may lose an answer of HTTP/2 that comes that early.
	mtls POST /demo @large --http1.1 -H 'X-Forwarded-For: 192.0.2.66'
	want "a large upload without the lock" 423 "$STATUS"
	has answer "$id"
	hasnt server.log '192\.0\.2\.66'
	mtls GET /demo/lock
	want "the lock" 200 "$STATUS"
	works work force-unlock -force "$id"
	[ ! -e states/demo.lock ] || fail "force-unlock did not"
	mtls POST /demo @large
	want "a large upload" 200 "$STATUS"
	cmp large states/demo.tfstate

	unset TF_HTTP_CLIENT_CERTIFICATE_PEM TF_HTTP_CLIENT_PRIVATE_KEY_PEM
	export TF_HTTP_RETRY_MAX=0
	mark=$(wc -l <server.log)
	fails work plan
	curl -s --cacert ca.crt "$URL/demo" >answer 2>&1 || :
	hasnt answer lineage
	want "lines in the log without a certificate" "$mark" "$(wc -l <server.log)"
}

# Issue 7.4: the smallest front, with the PROXY protocol to a unix socket.
test_terraform_lives_behind_stunnel_with_client_certificates() {
	need terraform stunnel4 openssl
	terraform_here
	behind /etc/stunnel/statesrv.conf
	sed -i '1i foreground = yes' front
	front stunnel4 front
	lives_behind_the_front
}

# Issue 7.4: a front that tells the client's address in X-Forwarded-For.
test_terraform_lives_behind_nginx_with_client_certificates() {
	need terraform nginx openssl
	terraform_here
	behind /etc/nginx/conf.d/statesrv.conf
	mkdir tmp
	cat >nginx.conf <<-EOF
	daemon off;
	master_process off;
	pid nginx.pid;
	error_log stderr;
	events {}
	http {
		access_log off;
		client_body_temp_path tmp/1;
		proxy_temp_path tmp/2;
		fastcgi_temp_path tmp/3;
		uwsgi_temp_path tmp/4;
		scgi_temp_path tmp/5;
		include $T/front;
	}
	EOF
	front nginx -p "$T" -c nginx.conf
	lives_behind_the_front
	want "states left in nginx's files" "" "$(find tmp -type f)"
}

# Issue 7.4: a front that would fetch its certificates by itself.
test_terraform_lives_behind_caddy_with_client_certificates() {
	need terraform caddy openssl
	terraform_here
	behind /etc/caddy/Caddyfile
	sed -i "1i {\nadmin off\nauto_https off\ndefault_bind 127.0.0.1\n}" front
	export HOME=$T XDG_DATA_HOME=$T XDG_CONFIG_HOME=$T
	front caddy run --config front --adapter caddyfile
	lives_behind_the_front
}

# DESIGN, Decisions: who the client is, is believed from a unix socket's
# peer alone: the PROXY line, or the last element of X-Forwarded-For.
test_the_clients_address_is_believed_on_a_unix_socket_alone() {
	local path header told
	serve -l unix:sock
	while IFS='|' read -r path header told; do
		expect 404 GET "/$path" '' -H "$header" --unix-socket sock
		until_true grep -q "name=$path " server.log
		has server.log "client=$told.* name=$path "
	done <<-'EOF'
	one|X-Forwarded-For: 192.0.2.7|192\.0\.2\.7
	two|X-Forwarded-For: 192.0.2.66, 192.0.2.7|192\.0\.2\.7
	v6|x-forwarded-for: 2001:db8::7|\[?2001:db8::7
	junk|X-Forwarded-For: <script> why="no"|unix
	last|X-Forwarded-For: 192.0.2.66, unix:|unix
	none|X-Other: 192.0.2.66|unix
	EOF
	expect 404 GET /proxied '' --unix-socket sock --haproxy-protocol \
		-H 'X-Forwarded-For: 192.0.2.66' # the PROXY line is the front's
	expect 404 GET /tcp '' -H 'X-Forwarded-For: 192.0.2.66'
	want "a PROXY line on a TCP port" 400 "$(raw_status <<-'EOF'
	PROXY TCP4 192.0.2.66 192.0.2.8 5 6
	GET / HTTP/1.0

	EOF
	)"
	until_true grep -q 'name=tcp ' server.log
	has server.log 'client=127\.0\.0\.1:[0-9]+ .* name=tcp '
	hasnt server.log '192\.0\.2\.66|script'
}

# a_starter: ./starter ADDRESS PID COMMAND... passes a TCP and a unix socket
# as systemd does, with the PID it was told, or its own for 0.
a_starter() {
	need "${CC:-cc}"
	"${CC:-cc}" -x c -o starter - <<-'EOF'
	#include <arpa/inet.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <string.h>
	#include <sys/socket.h>
	#include <sys/un.h>
	#include <unistd.h>

	int
	main(int argc, char **argv)
	{
		struct sockaddr_in in = { .sin_family = AF_INET };
		struct sockaddr_un un = { .sun_family = AF_UNIX };
		int a = socket(AF_INET, SOCK_STREAM, 0);
		int b = socket(AF_UNIX, SOCK_STREAM, 0);
		char pid[16];

		if (argc < 4 || inet_pton(AF_INET, argv[1], &in.sin_addr) != 1)
			return 2;
		strcpy(un.sun_path, "passed");
		if (bind(a, (void *)&in, sizeof in) || listen(a, 99) ||
		    bind(b, (void *)&un, sizeof un) || listen(b, 99) ||
		    dup2(a, 13) < 0 || dup2(b, 4) < 0 || dup2(13, 3) < 0)
			return 2;
		snprintf(pid, sizeof pid, "%d", (int)getpid());
		setenv("LISTEN_PID", atoi(argv[2]) ? argv[2] : pid, 1);
		setenv("LISTEN_FDS", "2", 1);
		execv(argv[3], argv + 3);
		return 2;
	}
	EOF
}

# started NAME ARGUMENT...: a server by the starter, with NAME.log, NAME.err.
started() {
	local name=$1
	shift
	rm -f passed
	: >"$name.log"
	./starter "$@" >"$name.log" 2>"$name.err" &
	PID=$!
	echo "$PID" >>"$T/pids"
}

# Issue 7.5, sd_listen_fds(3): passed sockets are used as they are and no
# other; those meant for another process are left alone; what a public
# address needs, a passed one needs too.
test_sockets_passed_by_systemd_are_used_as_they_are() {
	a_starter
	started server 127.0.0.1 0 "$STATESRV" -d states
	until_true listening server
	want "listeners" 2 "$(grep -c 'listening on' server.log)"
	has server.log 'listening on unix:.*passed'
	URL=$(sed -n 's/.*listening on \(http:.*\)/\1/p' server.log)
	expect 200 POST /demo "$(state 1)"
	expect 200 GET /demo '' --unix-socket passed
	halt
	want "exit status" 0 "$STATUS"
	[ -S passed ] || fail "the socket was systemd's, and it is gone"

	started other 127.0.0.1 1 "$STATESRV" -d states -l 127.0.0.1:0
	until_true listening other
	want "listeners of its own" 1 "$(grep -c 'listening on' other.log)"
	halt

	started public 0.0.0.0 0 "$STATESRV" -d states
	STATUS=0
	wait "$PID" || STATUS=$?
	want "a public socket without users" 1 "$((STATUS != 0))"
	has public.err 'TF_HTTP_USERNAME'
	rm public.err
}

# Issue 7.5: systemd has nothing to say against the units, and little is
# left open by them (0 is locked up, 10 is anything goes).
test_the_units_of_the_readme_please_systemd_analyze() {
	need systemd-analyze
	recipe /etc/systemd/system/statesrv.socket >statesrv.socket
	recipe /etc/systemd/system/statesrv.service |
		sed "s|/usr/local/bin/statesrv|$STATESRV|" >statesrv.service
	systemd-analyze verify --man=no ./statesrv.socket >verify 2>&1 ||
		fail "$(cat verify)"
	hasnt verify 'statesrv\.'
	systemd-analyze security --offline=yes --threshold=10 \
		./statesrv.service >security 2>&1 || fail "$(tail -n 3 security)"
}

# Issue 7.5: the units themselves, under a systemd of our own that sees the
# machine's files through an overlay. In there, as root: a write, a restart
# on the held socket, another user who may not connect, a stop.
test_the_units_of_the_readme_serve_under_systemd() {
	local etc=upper/etc/systemd/system
	need systemd-nspawn unshare
	[ "$(id -u)" = 0 ] || skip "only root may start a systemd"
	mkdir -p $etc/statesrv.service.d upper/usr/local/bin upper/etc/statesrv \
		work root told
	printf '[Service]\nEnvironment=ASAN_OPTIONS=detect_leaks=0\n' \
		>$etc/statesrv.service.d/sanitized.conf # has no ptrace(2) there
	recipe /etc/systemd/system/statesrv.socket >$etc/statesrv.socket
	recipe /etc/systemd/system/statesrv.service >$etc/statesrv.service
	cp "$STATESRV" upper/usr/local/bin/statesrv
	(umask 077 && echo 'ci hunter2 write' >upper/etc/statesrv/users)
	printf '[Unit]\nRequires=statesrv.socket\nWants=try.service\n' \
		>$etc/try.target
	cat >$etc/try.service <<-'EOF'
	[Unit]
	After=statesrv.socket
	[Service]
	Type=oneshot
	ExecStart=-/bin/sh /try
	ExecStopPost=/bin/systemctl exit 0
	EOF
	cat >upper/try <<-'EOF'
	exec >/told/all 2>&1
	ask() {
		curl -s -m 9 --unix-socket /run/statesrv.sock -o /told/answer \
			-w '%{http_code}\n' "$@"
	}
	ask -u ci:hunter2 -d '{"serial": 7}' http://states/team/prod
	ask http://states/team/prod
	systemctl restart statesrv.service
	ask -u ci:hunter2 http://states/team/prod
	setpriv --reuid nobody --clear-groups \
		curl -s --unix-socket /run/statesrv.sock http://states/-/ready
	echo "exit $?"
	stat -L -c %a /var/lib/statesrv /var/lib/statesrv/team/prod.tfstate
	systemctl stop statesrv.socket statesrv.service
	systemctl show -p Result --value statesrv.service
	journalctl -q -o cat -u statesrv.service >/told/journal
	EOF
	unshare --mount bash -e >nspawn.out 2>&1 <<-'EOF' || :
	mount -t tmpfs none /run
	mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root
	SYSTEMD_LOG_LEVEL=err timeout 60 systemd-nspawn -q -D root \
		--bind "$PWD/told:/told" --link-journal=no --private-network \
		--register=no --keep-unit --console=pipe \
		/lib/systemd/systemd --unit=try.target </dev/null
	EOF
	rmdir /sys/fs/cgroup/{,*/}{payload/*,payload,supervisor} 2>/dev/null || :
	[ -e told/all ] || skip "no systemd starts here: $(tail -n 1 nspawn.out)"
	want "what was told inside" "200 401 200 exit 7 700 600 success" \
		"$(xargs <told/all)"
	want "the state" '{"serial": 7}' "$(cat told/answer)"
	has told/journal 'method=POST name=team/prod status=200'
}

# engine: a docker engine in name spaces of its own: its network, mounts and
# processes end with it. From here on curl and terraform run on its machine.
engine() {
	need docker dockerd unshare nsenter ip pgrep musl-gcc
	[ "$(id -u)" = 0 ] || skip "only root may start dockerd"
	unset "${!DOCKER_@}"
	DOCKER=$(mktemp -d) # a short name, for sockets
	export DOCKER_HOST=unix://$DOCKER/socket
	unshare --net --mount --pid --fork --kill-child --mount-proc bash -c '
		for dir in /run /opt /etc/docker; do
			[ ! -d $dir ] || mount -t tmpfs none $dir
		done
		ip link set lo up
		exec dockerd "$@"' - -H "$DOCKER_HOST" --data-root "$DOCKER/data" \
		--exec-root "$DOCKER/exec" --pidfile "$DOCKER/pid" \
		--cgroup-parent "/${DOCKER##*/}" >dockerd.log 2>&1 &
	ENGINE=$!
	echo "$ENGINE" >>"$T/pids"
	trap engine_ends EXIT
	until_true engine_is_up
	INSIDE=$(pgrep -P "$ENGINE")
	curl() { nsenter -t "$INSIDE" -n curl "$@"; }
	terraform() { nsenter -t "$INSIDE" -n terraform "$@"; }
	URL=http://127.0.0.1:8080
	mkdir source
	cp "$here/statesrv.c" "$here/Makefile" source
	make -C source image >make.out 2>&1 || fail "$(cat make.out)"
}

engine_ends() {
	kill -9 "$ENGINE"
	wait "$ENGINE" || :
	until_true cgroups_gone "*/${DOCKER##*/}*"
	rm -rf "$DOCKER"
} 2>/dev/null

# cgroups_gone PATTERN: removes the empty ones, true if none is left.
cgroups_gone() {
	find /sys/fs/cgroup -depth -type d -path "$1" -exec rmdir {} + || :
	[ -z "$(find /sys/fs/cgroup -type d -path "$1")" ]
}

engine_is_up() {
	docker info >/dev/null 2>&1 && return
	kill -0 "$ENGINE" 2>/dev/null ||
		skip "no dockerd starts here: $(tail -n 1 dockerd.log)"
	return 1
}

# container OPTION... [-- ARGUMENT...]: the image as `states', on 8080.
container() {
	local options=()
	while [ $# -gt 0 ] && [ "$1" != -- ]; do
		options+=("$1")
		shift
	done
	docker run -d --pull never --name states -p 127.0.0.1:8080:8080 \
		"${options[@]}" statesrv "${@:2}" >id
	until_true answers
}

answers() {
	curl -s -o /dev/null "$URL/-/ready"
}

health_is() {
	[ "$(docker inspect -f '{{.State.Health.Status}}' states)" = "$1" ]
}

# Issue 6.2: small; says what to do when nobody is let in; the README's
# command as a user of any number; healthy by its own account; terraform on
# the host; and a stop under load in good time, with nothing lost.
test_source_makes_an_image_that_serves_and_stops_with_nothing_lost() {
	local n=1
	terraform_here
	engine
	[ "$(docker image inspect -f '{{.Size}}' statesrv)" -lt 200000 ] ||
		fail "$(docker images)"
	docker run --rm --pull never statesrv >out.txt 2>&1 &&
		fail "it let anyone in"
	has out.txt 'TF_HTTP_USERNAME'

	recipe docker.sh | sed 's/docker run/& --pull never/' >run.sh
	mkdir states
	chown 12345:12345 states
	id() { echo 12345; }
	# shellcheck source=/dev/null
	. ./run.sh >id
	unset -f id
	until_true answers
	expect 401 GET /demo
	export TF_HTTP_USERNAME=me TF_HTTP_PASSWORD=secret
	resources work
	backend work "address = \"$URL/demo\"" "lock_address = \"$URL/demo\"" \
		"unlock_address = \"$URL/demo\""
	works work init
	works work apply -auto-approve
	want "owner and mode" "12345 600" "$(stat -c '%u %a' states/demo.tfstate)"
	expect 200 LOCK /held "$(info held)" -u me:secret
	until_true health_is healthy

	while state $n | curl -s -f -u me:secret --data-binary @- "$URL/busy"; do
		echo $n >acknowledged
		n=$((n + 1))
	done &
	until_true test -s acknowledged
	docker stop -t 3 states >id # and then it would be killed: status 137
	wait $!
	want "exit status" 0 "$(docker inspect -f '{{.State.ExitCode}}' states)"
	[ "$(serial busy)" -ge "$(cat acknowledged)" ] ||
		fail "$(cat acknowledged) was acknowledged, $(serial busy) is there"
	docker start states >id
	until_true answers
	expect 423 LOCK /held "$(info other)" -u me:secret
	works work plan -detailed-exitcode
}

# Issue 6.2: users from a mounted secret, nothing else writable, no rights,
# as the README's compose.yaml has it.
test_source_makes_an_image_for_the_compose_file_of_the_readme() {
	compose() { docker compose "$@"; }
	docker compose version >/dev/null 2>&1 ||
		{ need docker-compose && compose() { docker-compose "$@"; }; }
	engine
	recipe compose.yaml >compose.yaml
	mkdir states
	(umask 077 && printf 'ann s3cret write\nbob hush read\n' >users)
	chown 1000:1000 states users
	compose up -d >compose.out 2>&1 || fail "$(cat compose.out)"
	until_true answers
	expect 200 POST /team/prod "$(state 1)" -u ann:s3cret
	expect 403 POST /team/prod "$(state 2)" -u bob:hush
	expect 200 GET /team/prod '' -u bob:hush
	expect 401 GET /team/prod
	want "owner" 1000 "$(stat -c %u states/team/prod.tfstate)"
	compose logs >logs 2>&1
	has logs 'user=bob method=POST name=team/prod status=403'
	hasnt logs 's3cret|hush'
	compose down >compose.out 2>&1 || fail "$(cat compose.out)"
	has states/team/prod.tfstate '"serial": 1,'
}

writes_are() {
	docker logs states >logs
	[ "$(grep -c 'user=ci method=POST .*status=200' logs)" = "$1" ]
}

# Issue 6.2: what the README's CI jobs run, with the variables they set, on
# a container that got the same variables, as their services do.
test_source_makes_an_image_for_the_ci_jobs_of_the_readme() {
	local job
	terraform_here
	engine
	for job in .github/workflows/apply.yml .github/workflows/try.yml \
		.gitlab-ci.yml; do
		unset "${!TF_HTTP_@}"
		# shellcheck disable=SC2016
		recipe $job | sed 's|https://states.example.org|http://127.0.0.1:8080|
			s|http://states:|http://127.0.0.1:|
			s|\${{ secrets.STATES_PASSWORD }}|hunter2|' >job.yml
		sed -n 's/^ *\(TF_HTTP_[A-Z_]*\): \(.*\)/export \1=\2/p' job.yml >env.sh
		sed -n 's/^ *- \(run: \)*\(terraform .*\)/\2/p' job.yml >commands
		# shellcheck source=/dev/null
		. ./env.sh
		container -e TF_HTTP_USERNAME -e TF_HTTP_PASSWORD
		rm -rf work
		resources work
		backend work
		while read -r _ command; do
			# shellcheck disable=SC2086
			works work $command </dev/null
		done <commands
		until_true writes_are "$(grep -c -E 'apply|destroy' commands)"
		docker rm -f -v states >id
	done
}

# browser: a chromium with an empty profile, spoken to over its DevTools
# pipe. In it no name but loopback's leads anywhere, evil.example to us.
browser() {
	need chromium jq setsid stdbuf
	mkfifo to from
	exec 7<>to 8<>from
	HOME=$T setsid chromium --headless --no-sandbox --disable-gpu --disable-quic \
		--no-first-run --disable-background-networking \
		--disable-component-update --disable-sync --disable-breakpad \
		--host-resolver-rules='MAP evil.example 127.0.0.1,MAP * ~NOTFOUND,EXCLUDE 127.0.0.1' \
		--user-data-dir="$T/profile" --remote-debugging-pipe about:blank \
		3<&7 4>&8 >chromium.out 2>&1 &
	CHROMIUM=$!
	trap 'kill -9 -- "-$CHROMIUM"' EXIT
	stdbuf -o0 tr '\0' '\n' <&8 >events &
	echo $! >>"$T/pids"
	SESSION=''
	devtools Target.createTarget '{"url":"about:blank"}'
	devtools Target.attachToTarget \
		"$(jq -c '.result + {flatten: true}' reply)"
	SESSION=$(jq -c '{sessionId: .result.sessionId}' reply)
	devtools Page.enable
	devtools Runtime.enable
	devtools Log.enable
	devtools Network.enable
}

# devtools METHOD [PARAMETERS]: the answer is in ./reply.
devtools() {
	CALL=$((${CALL:-0} + 1))
	jq -nc --arg method "$1" --argjson params "${2:-{\}}" \
		--argjson id "$CALL" "{id: \$id, method: \$method, params: \$params}
			+ ${SESSION:-{\}}" | tr '\n' '\0' >&7
	until_true replied
}

replied() {
	grep "^{\"id\":$CALL," events >reply
}

# js EXPRESSION: sets VALUE to what it is worth in the page.
js() {
	devtools Runtime.evaluate "$(jq -nc --arg e "$1" \
		'{expression: $e, returnByValue: true, awaitPromise: true}')"
	hasnt reply exceptionDetails
	VALUE=$(jq -r .result.result.value reply)
}

# shows EXPECTED EXPRESSION
shows() {
	js "$2"
	want "$2" "$1" "$VALUE"
}

# visit URL: until it is there, whole.
visit() {
	devtools Page.navigate "{\"url\": \"$1\"}"
	until_true arrived "$1"
}

arrived() {
	js 'document.readyState + " " + location.href'
	[ "$VALUE" = "complete $1" ]
}

# no_complaint: nothing on the console, nothing asked of another server.
no_complaint() {
	want "what was on the console" "" "$(jq -c 'select(.method ==
		"Log.entryAdded" or .method == "Runtime.consoleAPICalled" or
		.method == "Runtime.exceptionThrown").params' events)"
	want "what was asked elsewhere" "" "$(jq -r 'select(.method ==
		"Network.requestWillBeSent").params.request.url' events |
		grep -v -e "^$URL/" -e '^data:')"
}

# quoted TEXT: as it stands in a JSON or JavaScript string.
quoted() {
	jq -n --arg text "$1" '$text'
}

# Issue 6.3: names, holders, versions and addresses that would be markup or
# script are shown as they are and do nothing; each link on each page leads
# somewhere; nothing comes from elsewhere, nothing is complained of.
test_the_pages_show_hostile_text_and_stay_calm() {
	local name evil='<img src=//evil.example/ onerror=document.title=1>'
	local names=("<img src=x onerror=document.title=1>" "\"'><b id=x>"
		'&lt;b&gt;' 'a?b#c' '100%25 & more' 'javascript:alert(1)'
		'{{7*7}}' $'\u202Edemo' 'data:text/html,x' 'ünï/cödé')
	browser
	serve
	for name in "${names[@]}"; do
		name=$(jq -nr --arg n "$name" '$n | split("/") | map(@uri) | join("/")')
		ask POST "/$name" "$(jq -nc --arg e "$evil" '{serial: 1,
			terraform_version: $e, resources: []}')"
		want "/$name" 200 "$STATUS"
		ask POST "/$name" "$(jq -nc --arg e "$evil" '{serial: 2,
			terraform_version: $e, resources: [{mode: "managed",
			type: $e, name: $e, instances: [{index_key: $e}]}]}')"
	done
	ask LOCK /a%3Fb%23c "$(jq -nc --arg e "$evil" '{ID: $e, Who: $e,
		Operation: $e, Info: $e}')"
	want "LOCK" 200 "$STATUS"
	echo "$evil" >states/frozen.lock

	visit "$URL/"
	for name in "${names[@]}" frozen; do
		shows true "[...document.links].some(a =>
			a.textContent == $(quoted "$name"))"
	done
	shows true "document.body.innerText.split($(quoted "$evil")).length > 4"
	js '[...document.links].map(a => a.href).join("\n")'
	grep -v /frozen <<<"$VALUE" >links
	while read -r name; do
		want "$name" 200 "$(curl -s -o answer -w '%{http_code}' "$name")"
	done <links
	sed -n '\|/-/versions/|{ p; s//\/-\/changes\//p; }' links >pages
	echo "$URL/?q=%3Cimg%20src=x%3E" >>pages
	while read -r name; do
		visit "$name"
		shows 0 'document.querySelectorAll(`img, iframe, object, embed,
			script[src], link[href^=http], #x`).length'
		shows false 'document.title == "1"'
		[[ $name != */-/changes/* ]] ||
			shows true "document.body.innerText.includes($(quoted "$evil"))"
	done <pages
	no_complaint
}

# Issue 6.3: search as you type; the block to copy follows it; the keyboard
# gets everywhere; narrow, dark, without scripts, and with a thousand states.
test_the_page_is_good_to_use() {
	local n light visible='[...document.querySelectorAll("tbody tr")].filter(
		row => row.checkVisibility()).length'
	browser
	serve
	expect 200 POST /web/shop "$(state 1)"
	expect 200 LOCK /web/shop "$(info 4711 ann@build)"
	mkdir -p states/many
	for n in {001..998}; do
		printf '{"serial": 1}' >states/many/state-"$n".tfstate
	done
	visit "$URL/"
	shows 999 "$visible"
	shows true 'document.body.innerText.includes("ann@build")'
	shows search document.activeElement.type
	devtools Input.insertText '{"text": "Many/state-77"}'
	shows 10 "$visible"
	js 'document.querySelector("input").select()'
	devtools Input.insertText '{"text": "web/new"}'
	shows 0 "$visible"
	shows true "[...document.querySelectorAll('pre')].some(
		pre => pre.innerText.includes('\"$URL/web/new\"'))"
	visit "$URL/?q=web"
	shows 1 "$visible"
	for n in web/shop versions log; do
		devtools Input.dispatchKeyEvent \
			'{"type": "keyDown", "key": "Tab", "code": "Tab"}'
		shows "$n" document.activeElement.textContent
	done

	devtools Emulation.setDeviceMetricsOverride \
		'{"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": true}'
	shows 320 'document.scrollingElement.scrollWidth'
	js 'getComputedStyle(document.body).color'
	light=$VALUE
	devtools Emulation.setEmulatedMedia '{"features":
		[{"name": "prefers-color-scheme", "value": "dark"}]}'
	js 'getComputedStyle(document.body).color'
	[ "$VALUE" != "$light" ] || fail "$light on dark, too"
	devtools Emulation.setScriptExecutionDisabled '{"value": true}'
	visit "$URL/?q=state-99"
	shows 9 "$visible"
	no_complaint
}

# Issue 7.2: what a page of somebody else's can do from a real browser, and
# one whose name leads to us: nothing.
test_other_sites_can_do_nothing_through_a_browser() {
	local how there
	browser
	serve_as other -d other
	there=$URL
	serve
	expect 200 POST /demo "$(state 1)"
	cp states/demo.tfstate before
	devtools Page.setBypassCSP '{"enabled": true}'
	for how in "'POST', mode: 'no-cors'" "'POST'" "'PUT'" "'DELETE'" "'LOCK'"; do
		visit "$there/"
		js "fetch('$URL/demo', {method: $how, body: '{\"serial\": 66}'})
			.then(r => 'an answer: ' + r.type, e => 'refused')"
		[[ $VALUE == refused || $how == *no-cors* ]] || fail "$how: $VALUE"
	done
	has server.log 'method=POST .*status=403'
	visit "$there/"
	js "document.body.innerHTML = \`<form method=post enctype=text/plain
		action=$URL/demo><input name='{\"a\": \"' value='\"}'></form>\`;
		document.forms[0].submit()"
	until_true arrived "$URL/demo"
	visit "http://evil.example:$PORT/demo"
	shows false 'document.body.innerText.includes("lineage")'
	shows true 'fetch("/demo").then(r => r.status == 403)'
	cmp before states/demo.tfstate
	[ ! -e states/demo.lock ] || fail "somebody took the lock"
}

# state_of SIZE: a state of that many bytes.
state_of() {
	printf '{"serial": 1, "x": "'
	head -c $(($1 - 22)) /dev/zero | tr '\0' x
	printf '"}'
}

# Issue 3.2: what comes right behind a body is answered, whatever the body's
# size; wrk found one that filled the head's buffer and hung up on the next.
test_a_request_right_behind_a_body_is_answered() {
	local size
	serve
	for size in 100 16000 16384 20000 65536 65537 300000; do
		{
			printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n'
			printf 'Content-Length: %d\r\n\r\n' $size
			state_of $size
			printf 'GET /x HTTP/1.1\r\nHost: localhost\r\n'
			printf 'Connection: close\r\n\r\n'
		} | raw >answers
		want "answers to $size bytes and what came behind" 2 \
			"$(grep -a -o 'HTTP/1.1 200 OK' answers | wc -l)"
		tail -c $size answers | cmp - states/x.tfstate
	done
}

# Issue 6.4: Prometheus' own checker has nothing to say.
test_promtool_is_content_with_the_metrics() {
	need promtool
	serve
	expect 200 POST /demo "$(state 1)"
	expect 200 LOCK /demo "$(info x)"
	expect 423 POST /demo "$(state 2)"
	expect 400 POST /other "no JSON"
	expect 200 GET /-/metrics
	promtool check metrics <answer >promtool 2>&1 || fail "$(cat promtool)"
	want "what promtool says" "" "$(cat promtool)"
}

# ---- ./test.sh bench ------------------------------------------------------
#
# What a user would notice, beside nginx (one process, no access log, sendfile,
# PUT by its dav module). statesrv syncs each write before it answers and keeps
# the version before; nginx does neither. Turn about, three rounds, ratios of
# medians: absolute figures say more about the machine than about a server.

bench() {
	local tool
	for tool in nginx wrk curl taskset; do
		command -v $tool >/dev/null ||
			{ echo "SKIP bench: no $tool here" && return; }
	done
	if [ "$(id -u)" != 0 ]; then
		(bench_here)
	else # with a loopback of our own, that nothing else paces
		export STATESRV here PATIENCE
		unshare --net bash <(
			declare -f
			echo 'set -u; ip link set lo up'
			echo 'echo reno >/proc/sys/net/ipv4/tcp_congestion_control'
			echo bench_here
		)
	fi
}

bench_here() {
	local round
	T=$(mktemp -d)
	cd "$T" || return
	trap 'kill "$(<statesrv.pid)" "$(<nginx.pid)"; rm -rf "$T"' EXIT
	bench_prepare
	for round in 1 2 3; do
		echo "round $round of 3" >&2
		bench_round
	done
	bench_table
}

bench_prepare() {
	local size
	mkdir -p www/tmp states/tmp
	for size in 4096 65536 1048576 209715200; do
		state_of $size >states/get$size.tfstate
		ln states/get$size.tfstate www/get$size
	done
	serve_as one -d one
	BENCH_NGINX=$PORT
	serve_as two -d two
	kill "$(head -1 pids)" "$PID"
	wait
	cat >nginx.conf <<-EOF
	daemon off; master_process off; pid pid; error_log stderr crit;
	events { worker_connections 4096; }
	http {
		access_log off; sendfile on; tcp_nopush on; client_max_body_size 0;
		keepalive_requests 1000000000; client_body_temp_path www/tmp;
		proxy_temp_path tmp; fastcgi_temp_path tmp;
		uwsgi_temp_path tmp; scgi_temp_path tmp;
		server {
			listen 127.0.0.1:$BENCH_NGINX backlog=4096;
			root $T/www; dav_methods PUT;
		}
	}
	EOF
	cat >put.lua <<-'EOF'
	local size, n, requests = tonumber(os.getenv("SIZE")), 0, {}
	local names = size > 100000 and 32 or 256
	wrk.method = "PUT"
	function init()
		local body = '{"serial": 1, "x": "' .. ("x"):rep(size - 22) .. '"}'
		for i = 1, names do
			requests[i] = wrk.format(nil, "/put" .. size .. "-" .. i, nil, body)
		end
	end
	function request()
		n = n % names + 1
		return requests[n]
	end
	EOF
}

# bench_up SERVER: started anew; "start" is the time to its first answer.
bench_up() {
	local from line
	[ ! -s "$1.pid" ] || { kill "$(<"$1.pid")" && wait "$(<"$1.pid")"; } || :
	rm -rf states/put* states/.history www/put*
	from=${EPOCHREALTIME/./}
	case $1 in
	statesrv) "$STATESRV" -d states -l "127.0.0.1:$PORT" >/dev/null & ;;
	nginx) nginx -p "$T" -c nginx.conf & ;;
	esac
	echo $! >"$1.pid"
	until { exec 9<>"/dev/tcp/127.0.0.1/$2"; } 2>/dev/null; do :; done
	printf 'GET /get4096 HTTP/1.0\r\n\r\n' >&9
	read -r line <&9
	echo "start to first answer, time|$1|$((${EPOCHREALTIME/./} - from))" >>rates
	exec 9>&-
	[[ $line == *200* ]] || fail "$1: $line"
}

bench_round() {
	local row size connections what server port url pid
	for server in statesrv nginx; do
		[ $server = nginx ] && port=$BENCH_NGINX || port=$PORT
		bench_up "$server" "$port"
	done
	while IFS='|' read -r row size connections what <&3; do
		for server in statesrv nginx; do
			[ $server = nginx ] && port=$BENCH_NGINX || port=$PORT
			url=http://127.0.0.1:$port
			pid=$(<"$server.pid")
			"bench_$what" >>rates
		done
	done 3<<-'EOF'
	GET 4 KiB, 1 connection|4096|1|alone
	GET 4 KiB, 64 connections|4096|64|get
	GET 64 KiB, 16 connections|65536|16|get
	GET 1 MiB, 16 connections|1048576|16|get
	GET 4 KiB, a connection each, 16 at once|4096|16|new
	GET 4 KiB, 4 connections, beside 16 writers|4096|4|beside
	write 4 KiB, 1 connection|4096|1|put
	write 4 KiB, 16 connections|4096|16|put
	write 4 KiB, 64 connections|4096|64|put
	write 64 KiB, 16 connections|65536|16|put
	write 1 MiB, 16 connections|1048576|16|put
	peak memory, 200 MiB up and down|209715200|1|memory
	EOF
}

# bench_wrk OPTION...: requests a second, if each was answered well.
bench_wrk() {
	SIZE=$size wrk -t 1 -c "$connections" -d 1 "$@" "$url/get$size" >wrk.out
	! grep -e Non-2xx -e 'Socket errors' wrk.out >&2 || row="$row ($server ERRED)"
	awk -v row="$row|$server|" '/^Requests\/sec/ { print row $2 }' wrk.out
}

bench_get() { bench_wrk; }
bench_put() { bench_wrk -s put.lua; }
bench_new() { bench_wrk -H 'Connection: close'; }

# Server and load on one processor: else it is the waking up that is measured.
bench_alone() {
	taskset -apc 0 "$pid" >/dev/null
	taskset -c 0 wrk -t 1 -c 1 -d 1 "$url/get$size" |
		awk -v row="$row|$server|" '/^Requests\/sec/ { print row $2 }'
	taskset -apc "0-$(($(nproc) - 1))" "$pid" >/dev/null
}

bench_beside() {
	SIZE=4096 wrk -t 1 -c 16 -d 2 -s put.lua "$url" >/dev/null &
	sleep 0.5
	bench_wrk
	wait $!
}

bench_memory() {
	bench_up "$server" "$port"
	pid=$(<"$server.pid")
	curl -s -f -o /dev/null -T "www/get$size" "$url/big"
	curl -s -f -o /dev/null "$url/big"
	awk -v row="$row|$server|" '/^VmHWM/ { print row $2 }' "/proc/$pid/status"
}

bench_table() {
	printf 'binary, bytes|%s|%s\n' \
		statesrv "$(stat -L -c %s "$STATESRV")" \
		nginx "$(stat -L -c %s "$(command -v nginx)")" >>rates
	echo "statesrv / nginx"
	sort -t '|' -k 3n rates | awk -F '|' '
	NR == FNR { if (!seen[$1]++) row[++rows] = $1; next }
	{ key = $1 FS $2; value[key, ++n[key]] = $3 }
	function median(key) { return value[key, int((n[key] + 1) / 2)] }
	END { for (r = 1; r <= rows; r++) printf "%9.2f  %s\n",
		median(row[r] FS "statesrv") / median(row[r] FS "nginx"),
		row[r] }' rates -
}

# ---- the source itself -----------------------------------------------------

# The map in the opening comment is the banner titles, in their order.
test_source_map_names_the_sections() {
	sed -n 's/^\/\* ==== \(.*[^ =]\) =*\( \*\/\)*$/\1/p' \
		"$here/statesrv.c" >banners
	sed -n '/^ \* The map;/,/^ \* Copyright/s/^ \*	\(.*\)/\1/p' \
		"$here/statesrv.c" >map
	[ "$(wc -l <map)" -gt 10 ] || fail 'no map'
	diff map banners
}

# No promise without a test that says its number.
test_source_has_a_test_for_each_promise() {
	local n
	for n in 1 2 3 4 5 6 7 8 9; do
		has "$here/test.sh" "[Pp]romise $n"
	done
}

# Warnings are errors, under every compiler there is, and in C99.
test_source_is_clean_under_every_compiler() {
	local cc
	for cc in gcc clang musl-gcc; do
		need $cc
		CC=$cc build out -O2
		CC=$cc build out -O2 -std=c99
	done
}

# The program as it is shipped: less than 100 KiB, or 200 KiB with its libc.
test_source_is_a_small_program() {
	need gcc musl-gcc
	CC=musl-gcc build out "${shipped[@]}" -static -s
	[ "$(wc -c <out)" -lt 204800 ] || fail "static: $(wc -c <out) bytes"
	[ "$(uname -m)" = x86_64 ] || return 0
	CC=gcc build out "${shipped[@]}" -s
	[ "$(wc -c <out)" -lt 102400 ] || fail "dynamic: $(wc -c <out) bytes"
}

test_source_is_clean_under_cppcheck_and_shellcheck() {
	need cppcheck shellcheck
	cppcheck -q --std=c11 --enable=warning,performance,portability \
		--inline-suppr --error-exitcode=1 "$here/statesrv.c"
	shellcheck "$here/test.sh" "$here/.ci/run"
}

# Nothing is read before it was written, nothing is lost, nothing is read
# after it was freed.
test_valgrind_finds_nothing() {
	need valgrind
	grumbles
	printf '#!/bin/sh\nexec valgrind -q --error-exitcode=99 \\\n%s \\\n%s' \
		' --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite' \
		" '$work/release' \"\$@\"" >watched
	chmod +x watched
	[ -x "$work/release" ] || build "$work/release" "${shipped[@]}"
	echo 'ann s3cret write' >users
	chmod 600 users
	STATESRV=./watched PATIENCE=60
	serve -u users -k 2
	local auth=(-u ann:s3cret) i
	for i in 1 2 3 4; do
		expect 200 LOCK /team/a "$(info me)" "${auth[@]}"
		expect 200 POST '/team/a?ID=me' "$(state $i)" "${auth[@]}"
		expect 423 LOCK /team/a "$(info you)" "${auth[@]}"
		expect 200 UNLOCK /team/a "$(info me)" "${auth[@]}"
	done
	head -c 300000 /dev/zero | tr '\0' ' ' | sed 's/^/{/;s/$/}/' >big
	expect 200 PUT /big @big "${auth[@]}"
	expect 200 PUT /big @big "${auth[@]}" -H 'Transfer-Encoding: chunked'
	expect 400 PUT /big '{"a":' "${auth[@]}"
	expect 401 GET /big
	expect 401 GET /big '' -u ann:wrong
	for i in / /-/metrics /-/ready /-/versions/team/a /-/changes/team/a \
		/-/log/team/a /big /team/a; do
		expect 200 GET $i '' "${auth[@]}" -H 'Accept: text/html'
		expect 200 GET $i '' "${auth[@]}" -H 'Accept: application/json'
	done
	expect 200 DELETE /team/a '' "${auth[@]}"
	kill -HUP "$PID"
	halt
	want "exit status: $(cat server.err)" 0 "$STATUS"
	hasnt server.err '^=='
}

# ---- the builds ------------------------------------------------------------

# The warnings that the program is clean with, under every compiler.
wide='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
	-Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings -Wcast-qual
	-Wformat=2 -Wundef -Wvla -Werror'

# The Makefile's own flags.
read -r -a shipped < <(sed -n 's/^CFLAGS = //p' "$here/Makefile")

# build OUTPUT FLAG...: with all warnings, as errors.
build() {
	local out=$1
	shift
	# shellcheck disable=SC2086 # the flags are words
	${CC:-cc} -std=c11 $wide -pthread "$@" -o "$out" "$here/statesrv.c"
}

# The two builds under test: as it is shipped, and with sanitizers and all
# limits so near that growing and refusing happens all the time.
build_both() {
	build "$work/release" "${shipped[@]}" &&
		build "$work/sanitized" -O1 -g -DNO_SANDBOX -DBODY_MEM=512 \
			-DSPOOL=4096 -DCACHE_FILE=256 -DCACHE_SLOTS=2 -DCACHE_BYTES=400 \
			-DFLAT=2 \
			-DTHREADS_MAX=3 -DSEND_MAX=8192 -DTHREAD_STACK=1048576 \
			-fsanitize=address,undefined -fno-sanitize-recover=all
}

# ---- the runner ------------------------------------------------------------

# run_one TEST: in a directory of its own; leaves its result beside that.
run_one() {
	local rc=0 result=fail body watch
	T=$work/run/$BUILD.$1
	mkdir "$T"
	(
		exec </dev/null >"$T.out" 2>&1
		set -e
		cd "$T"
		"$1"
		settle
	) &
	body=$!
	{ sleep 500 && pkill -9 -P $body; } 2>/dev/null & # what hangs has failed
	watch=$!
	wait $body || rc=$?
	{ pkill -P $watch; kill $watch; wait $watch; } 2>/dev/null
	reap
	[ $rc != 0 ] || result=ok
	[ $rc != 77 ] || result=skip
	case $result in
	ok) echo "ok    $BUILD $1" ;;
	skip) echo "SKIP  $BUILD $1: $(cat "$T/skipped")" ;;
	fail)
		echo "FAIL  $BUILD $1"
		tail -n 20 "$T.out" | sed 's/^/	/'
		;;
	esac
	rm -rf "$T"
	echo $result >"$T.result"
}

# settle: what must be true after every test that started a server: it stops
# when told to, with status 0, and has complained of nothing.
settle() {
	local pid complaint
	[ -s servers ] || return 0
	while read -r pid; do
		kill -TERM "$pid" 2>/dev/null || continue
		STATUS=0
		wait "$pid" 2>/dev/null || STATUS=$?
		[ "$STATUS" = 127 ] || # somebody else's child
			want "exit status after SIGTERM" 0 "$STATUS"
	done <servers
	[ -e grumbles ] && return
	for complaint in *.err; do
		[ ! -s "$complaint" ] || fail "stderr: $(cat "$complaint")"
	done
}

# reap: nothing that a test started outlives it. A number may belong to
# another process by now: only what works in our directory is ours.
reap() {
	local pid
	[ -s "$T/pids" ] || return 0
	while read -r pid; do
		case $(readlink "/proc/$pid/cwd") in
		"$T" | "$T"/*) kill -9 "$pid" ;;
		esac
	done <"$T/pids" 2>/dev/null
}

all_tests() {
	declare -F | sed -n 's/^declare -f \(test_.*\)/\1/p'
}

# chosen WORD...: the tests whose names contain one of the words, or all.
chosen() {
	local t word
	for t in $(all_tests); do
		[ $# -gt 0 ] || echo "$t"
		for word; do
			[[ $t != *"$word"* ]] || { echo "$t" && break; }
		done
	done
}

# run_all WORD...: on each build, JOBS tests at a time. What tests the source,
# or the sandbox, which only the first has, runs once.
run_all() {
	local t given=${STATESRV-} running=0
	for BUILD in ${given:+given} ${given:-release sanitized}; do
		[ "$BUILD" != "$given" ] || continue
		STATESRV=${given:-$work/$BUILD}
		for t in $(chosen "$@"); do
			[[ $BUILD != sanitized || ! $t =~ ^test_(source|shipped)_ ]] ||
				continue
			if [ "$running" -ge "$JOBS" ]; then
				wait -n
				running=$((running - 1))
			fi
			run_one "$t" &
			running=$((running + 1))
		done
	done
	wait
}

count() {
	cat "$work"/run/*.result 2>/dev/null | grep -c "^$1$"
}

main() {
	local failed
	work=$(mktemp -d "${TMPDIR:-/tmp}/statesrv-test.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	mkdir "$work/run"
	case ${1-} in
	list) all_tests | sed 's/^test_//' && return ;;
	esac
	[ -n "${STATESRV-}" ] || build_both || exit 1
	case ${1-} in
	crash | fuzz)
		STATESRV=${STATESRV:-$work/release}
		T=$work/run/$1
		mkdir "$T" && cd "$T" || exit 1
		case $1 in
		crash) crash "${2-100}" ;;
		fuzz) fuzz_all "${2-60}" ;;
		esac
		exit
		;;
	bench) STATESRV=${STATESRV:-$work/release} && bench && return ;;
	esac
	run_all "$@"
	failed=$(count fail)
	[ "$failed" = 0 ] || {
		echo "failed:"
		grep -l '^fail$' "$work"/run/*.result |
			sed 's|.*/run/\(.*\).result|	\1|'
	}
	echo "$(count ok) passed, $failed failed, $(count skip) skipped"
	[ "$failed" = 0 ]
}

main "$@"
