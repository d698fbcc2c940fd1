#!/usr/bin/env bash
# test.sh - what statesrv promises, tried out.
#
#	./test.sh                the whole suite, against two builds (make test)
#	./test.sh NAME...        only the tests whose names contain one of NAMEs
#	./test.sh list           the names
#	./test.sh crash ROUNDS   two servers killed and stopped under load, and
#	                         the record of it checked, that many rounds
#	./test.sh fuzz SECONDS   each fuzzing harness for that long
#	./test.sh bench          ratios to nginx, in one interleaved run
#
# One function per behaviour, named as a sentence. Each runs alone, in an empty
# directory, as a subshell under set -e: the first command that fails fails it.
# After it each server that it started must end well, and must have complained
# of nothing, unless the test says grumbles.
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
	PORT=$(sed -n 's|^statesrv: .* on http://127.0.0.1:\([0-9]*\)$|\1|p' "$name.log" | head -1)
	URL=http://127.0.0.1:$PORT
}

listening() {
	grep -q '^statesrv: .* on [hu]' "$1.log" && return
	kill -0 "$PID" 2>/dev/null || fail "$1: $(cat "$1.err")"
	return 1
}

# through WORDS: from here on a server is started by what a shell runs so.
through() {
	printf '#!/bin/sh\n%s "$@"\n' "$1" >through
	chmod 755 through
	STATESRV=$PWD/through
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

# rows [CURL OPTION...]: requests by curl, one a line on stdin, in order:
#	status user method url [body [<tab> pattern]]
# status is a regular expression, user is NAME:SECRET or - for none. The body
# is -, for none; state:N, a state of that serial; info:ID, lock info;
# md5, no body but the MD5 of none; or the bytes themselves. The answer must
# match the pattern, an extended regular expression; ! before it: must not.
rows() {
	local status who method url body pattern n=0 how
	while read -r status who method url body <&3; do
		case $status in '' | '#'*) continue ;; esac
		n=$((n + 1))
		pattern=
		[[ $body != *$'\t'* ]] || { pattern=${body#*$'\t'} && body=${body%%$'\t'*}; }
		how=("$@")
		[ "$who" = - ] || how+=(-u "$who")
		case $body in
		-) body= ;;
		state:*) body=$(state "${body#state:}") ;;
		info:*) body=$(info "${body#info:}") ;;
		md5) body= && how+=(-H 'Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg==') ;;
		esac
		ask "$method" "$url" "$body" "${how[@]}"
		[[ $STATUS =~ ^($status)$ ]] ||
			fail "$who $method $url $body: expected $status, got $STATUS: $(head -c 300 answer)"
		case $pattern in
		'') ;;
		!*) hasnt answer "${pattern#!}" ;;
		*) has answer "$pattern" ;;
		esac
	done 3<&0
	[ "$n" -gt 0 ] || fail "an empty table"
}

# raw [SECONDS]: stdin goes to the server byte for byte, what comes back
# before it closes (or the seconds are over) goes to stdout.
raw() {
	exec 9<>"/dev/tcp/127.0.0.1/$PORT" || return
	cat >&9
	timeout "${1:-$PATIENCE}" cat <&9 || :
	exec 9>&-
}

# ---- HTTP: what one request gets, and whether the connection lives on -----
#
# Most of it is tables: on the left the statuses of all the answers, a regular
# expression; after a tab the bytes, as printf has them, with ~ for CR LF. A
# request that closes is sent behind them: "400" says that the connection ended,
# "200 200" that it lived on; a third would be a request that was smuggled in.

# cases [HEAD]: runs the table on stdin, HEAD before the bytes of each line. Each answer is dated
# (RFC 9110 6.6.1), and the last one says that it is the last (RFC 9112 9.6).
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
		elif [ "$(grep -a -c -E "$date" answers)" != "$(wc -w <<<"${got#100 }")" ]; then
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
	grep -a -o 'HTTP/1\.[01] [0-9][0-9][0-9] ' answers | cut -c 10-12 | paste -s -d ' '
}

# served: a server that has a small state, x.
served() {
	serve
	expect 200 PUT /x '{"version":4,"serial":1}'
}

# each: many cases from a short table. A line on stdin is a template (=, tab,
# bytes with a %s) or has statuses and, after tabs, values; every value makes
# a case in the last template. STATE is a state of 13 bytes, <> is nothing.
each() {
	local status line template value values
	while IFS=$'\t' read -r status line; do
		case $status in '' | '#'*) continue ;; =) template=$line && continue ;; esac
		IFS=$'\t' read -r -a values <<<"$line"
		for value in "${values[@]}"; do
			value=${template/'%s'/"${value/#<>/}"}
			printf '%s\t%s\n' "$status" "${value//STATE/'{"version":4}'}"
		done
	done >each
	cases <each
}

# RFC 9112 2.3 and 3: method SP target SP version, each to the letter. One
# empty line may stand before it. 1.x is read as 1.1, other majors are 505;
# methods are case-sensitive, and one that nobody knows is 501. The target is a
# path, a URL, or for OPTIONS the star; what is escaped in it is decoded once.
test_a_request_line_is_read_to_the_letter() {
	served
	each <<'END'
=	%s~Host: localhost~~
200 200	GET /x HTTP/1.1	~GET /x HTTP/1.1
200 200|400	~~~GET /x HTTP/1.1	\nGET /x HTTP/1.1
200 200 200	GET /x HTTP/1.1~Host: localhost~~~GET /x HTTP/1.1
400	GET  /x HTTP/1.1	GET /x  HTTP/1.1	GET /x HTTP/1.1\x20	\x20GET /x HTTP/1.1
400	GET\t/x HTTP/1.1	GET /x\tHTTP/1.1	GET /x\x0bHTTP/1.1	GET /x y HTTP/1.1
400	GET HTTP/1.1	GET\x20 HTTP/1.1	/x HTTP/1.1	GET /x	GET /x\x20	GET	\x20 \x20
400	GET\x00 /x HTTP/1.1	GET /x HTTP/1.1\r	\x80\x81\x82\x83~	\x20~GET /x HTTP/1.1
400	GET /x HTTP/1.1\rX: y	GET /x HTTP/1.1\nX: y	GET /x HTTP/1.1\nX: y\n\n	\rGET /x HTTP/1.1
=	GET /x %s~Host: localhost~~
200 200	HTTP/1.2	HTTP/1.9
505	HTTP/2.0	HTTP/3.0	HTTP/9.9	HTTP/0.9	HTTP/2.0~~SM~
400	HTTP/1	HTTP/1.	HTTP/.1	HTTP/11	HTTP/1.10	HTTP/01.1	HTTP/1.01	HTTP/1.1x
400	HTTP/1,1	HTTP/1 .1	HTTP /1.1	HTTP/+1.1	HTTP/A.B	http/1.1	HTTPS/1.1	FTP/1.1
=	%s /x HTTP/1.1~Host: localhost~~
501( 200)?	get	Get	PATCH	TRACE	PROPFIND	G	GETT	LOCKS	UNLOC	CONNECT	X-$!#%&'*+.^_`|
400	G(T	GE:T	"GET"	G\xc3\x89T	{}
=	%s HTTP/1.1~Host: localhost~~
200 200	GET http://localhost/x	GET HTTP://LocalHost:8080/x	GET http://127.0.0.1/x?ID=b	GET http://localhost	GET http://localhost?a=b
40[03]( 200)?	GET http://other.example/x
400	GET http:///x	GET http:/x	GET http://u:p@localhost/x	GET http://localhost:x/x
400	GET http://localhost\\x	GET ftp://localhost/x	GET localhost/x	GET x	GET ?x	GET %2Fx
204 200	OPTIONS *	OPTIONS /x
400	GET *	OPTIONS *x	OPTIONS **	GET ..
400	GET /x#y	GET /x\x00	GET /x\x01	GET /x\x7f	GET /x?\x00	GET /\xc3\xa9	GET /x?\xff
200 200	GET /%78	GET /x.tfstate	GET /x?	GET /x?ID=%78
404 200	GET /%2578
400( 200)?	GET /%	GET /%7	GET /%7g	GET /%%78	GET /%u0078	GET /%+8	GET /x?ID=%zz
400( 200)?	GET /x%00	GET /x%0d%0a	GET /x%0aX:%20y	GET //x	GET ///etc/passwd	GET /x?a=b
END
}

# RFC 9112 5, RFC 9110 5.5, 5.6.2 and 7.2: names are tokens, right before a
# colon; values have no control bytes; lines end in CR LF and are never folded.
# Host is given once, well formed, and no name that a web page may point at us.
test_a_field_line_has_one_reading() {
	served
	each <<'END'
=	GET /x HTTP/1.1~Host: %s~~
200 200	localhost	LOCALHOST:80	127.0.0.1:65535	[::1]	[::1]:8080	localhost.	app.localhost
200 200	127.9.9.9:1	192.0.2.7	A.b.LOCALHOST.:1
40[03]( 200)?	<>	localhost,other.example
400	local host	localhost, localhost	u@localhost	localhost/	localhost/x	localhost?x
400	localhost#x	http://localhost	localhost\\x	localhost:x	localhost:-1	localhost:80:80
400	:80	[::1	[::1]x	[]	::1	"localhost"	<localhost>	local\xc3\xa9host	%	localhost%4	h%zz
403( 200)?	other.example	localhost.other.example	127.0.0.1.other.example	notlocalhost
=	GET /x HTTP/%s~~
200 200	1.1~Host:localhost	1.1~hOST: \t localhost \t\x20	1.0~Connection: keep-alive
400	1.1	1.1~X: y	1.1~Host: localhost~Host: localhost	1.1~Host: localhost~X: y~host:
400	1.1~Host: localhost~Host: other.example	1.0~Host: localhost~Host: localhost
=	GET http://localhost/x HTTP/%s~~
200 200	1.0~Connection: keep-alive	1.1~Host: other.example
400	1.1
=	GET /x HTTP/1.1~Host: localhost~%s~~
200 200	X: y	X:	X: \t\x20	X: a\tb: c	X: \x80\xc3\xa9\xff	!#$%&'*+-.^_`|\x7e09Az: y
400	X : y	: y	X y: z	X	X=y	\x20	\x20X: y	X: y~ z	X: y~\tz	X:~ y	X: y~\x20
400	X(: y	[X]: y	X@: y	X/Y: y	"X": y	X\x00: y	X\x7f: y	X\xc3\xab: y
400	X: a\x00b	X: a\x01b	X: a\x08b	X: a\x0bb	X: a\x0cb	X: a\x1bb	X: a\x7fb
400	X: a\rb	X: a\r	X: a\r\r\n	X: a\nY: b	\n	\r\r\n	\n~
=	GET /x HTTP/1.1~%s~~
200 200	X: y~X: y~Host: localhost
400	Host : localhost	Host\t: localhost	\x20Host: localhost	\x20~Host: localhost
400	\tX: y~Host: localhost	Host:~ localhost	Host: localhost\nX: a	Host: localhost\n\n
END
}

# RFC 9110 8.6, RFC 9112 6.1, 6.3 and 7: a length is digits, once, without
# overflow (2^32 + 13, 2^63, 2^64 - 1, 2^64 + 13, and worse); no length is no
# body. A coding is chunked, once, and never beside a length or in HTTP/1.0.
test_the_length_of_a_body_is_told_in_one_way() {
	served
	each <<'END'
=	PUT /y HTTP/1.1~Host: localhost~%s~~STATE
200 200	Content-Length: 13	content-LENGTH:13	Content-Length: \t13 \t\x20
400	Content-Length: 13~Content-Length: 13	Content-Length: 13~Content-Length: 14
400	Content-Length: 13~X: y~content-length: 013	Content-Length : 13	Content-Length:~ 13
411( 400)?	X: y	Content_Length: 13	Content-Length-X: 13
=	PUT /y HTTP/1.1~Host: localhost~Content-Length: %s~~STATE
200 200|400	013	0000000000000000000000013	13, 13
400	13, 14	13,	13;13	13 13	1 3	<>	+13	-13	-0	0xd	0o15	13.0	1.3e1	13a	a	"13"
400	13_0	\x0b13	13\x00	\xef\xbc\x91\xef\xbc\x93
413|400	4294967309	9223372036854775808	18446744073709551615	18446744073709551629	99999999999999999999999999
=	%s~~
200 200	PUT /y HTTP/1.1~Host: localhost~Content-Length: 14~~STATE\x20GET / HTTP/1.0
411( 200)?	PUT /y HTTP/1.1~Host: localhost	POST /y HTTP/1.1~Host: localhost
400( 200)?	PUT /y HTTP/1.1~Host: localhost~Content-Length: 0
413|400	GET /x HTTP/1.1~Host: localhost~Content-Length: 18446744073709551616
=	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding%s~~d~STATE~0~~
200 200	: chunked	:CHUNKED	: \tchunked\x20
200 200|400|501	: chunked,	: , chunked
400	: chunked~Content-Length: 12	: \x0bchunked	: chunked\x0c	: chunked\x00	 : chunked	:~ chunked
400|501	: chunked, chunked	: chunked, identity	: gzip, chunked	: chunkedx	: xchunked	: chun ked
400|501	: chunked;q=1	: "chunked"	:	: gzip	: identity	: chunked~Transfer-Encoding: chunked
400|501	: chunked~Transfer-Encoding: identity	: identity~transfer-encoding: chunked
411( 400)?	-X: chunked
=	PUT /y HTTP/%s~~d~STATE~0~~
400	1.1~Host: localhost~Content-Length: 0~Transfer-Encoding: chunked
400	1.1~Host: localhost~X: y\rTransfer-Encoding: chunked
400|501	1.1~Host: localhost~Content-Length: 23~Transfer-Encoding: identity	1.1~Host: localhost~Content-Length: 23~Transfer-Encoding:
400	1.0~Host: localhost~Transfer-Encoding: chunked
400	1.0~Connection: keep-alive~Transfer-Encoding: chunked
END
}

# RFC 9112 7.1: hexadecimal sizes that do not wrap around, CR LF after each,
# extensions ignored, trailers read and dropped. No line is endless.
test_chunks_are_read_to_the_letter() {
	served
	local long
	long=$(printf '0%.0s' {1..40000})
	sed "s/LONG/$long/; s/TRAILER/$(printf 'X: y~%.0s' {1..400})/" >table <<'END'
=	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~%s
200 200	1~{~c~"version":4}~0~~	a~{"version"~3~:4}~0~~	A~{"version"~3~:4}~0~~
400( 200)?	0~~
400	d\nSTATE~0~~	d\rSTATE~0~~	d\r\r\nSTATE~0~~	d~STATE\n0~~	d~STATE\r0~~	d~STATE0~~
400	d~STATE ~0~~	d~STATE~~0~~	c~STATE~0~~	e~STATE~0~~	d~STATE~00x~~
413	20000000~
=	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~%s~STATE~0~~
200 200	d	D	0D	0000000d	d;x	d;x=y	d;x=y;z="a;b"	d ; x = y	d\t;x
400	d x	d d	d;	d;;x	d;=x	d;x=\x00	d;x\ny	d;x\ry	d;x="\\\r"	d;x="a	d;x=y;	d;a;(
400	0xd	+d	-d	\x20d	d\x20	\td	d_0	g	dh	;x	<>	~d	STATE
413|400	1000000000000000d	800000000000000d	FFFFFFFFFFFFFFFF	FFFFFFFFFFFFFFFFFFFFFFFF
400|413|431	d;LONG	LONGd
=	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~d~STATE~%s~
200 200	0~	0000~	0;y~	0 ;y~	0~X: y~	0~X: y~Y: z~
200 200|400	0~Content-Length: 5~	0~Transfer-Encoding: chunked~	0~Host: other.example~	0~Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==~
400	0~X : y~	0~X~	0~: y~	0~X: y~ z~	0~X: \x00~	0~X: y\n	0~\n	0\n
400|413|431	0~X: LONG~	0~TRAILER
END
	each <table
}

# What looks like a second request inside the first one's body, or inside
# what only one of two parsers takes for a body (RFC 9112 11.2), is no request.
test_no_request_hides_in_another() {
	served
	sed 's/HIDDEN/DELETE \/x HTTP\/1.1~Host: localhost~~/' >table <<'END'
=	%s HTTP/1.1~Host: localhost~Content-Length: 39~~HIDDEN
200 200|400	GET /x	HEAD /x	GET /
204 200|400	OPTIONS /x
404 200|40[04]	GET /none
405( 200)?|400	PUT /
501( 200)?|400	PATCH /x	TRACE /x
400( 200)?	PUT /../x	PUT /y	LOCK /y
200 200|40[09]( 200)?	UNLOCK /y
=	GET /x HTTP/1.1~%s~HIDDEN~0~~
200 200|400	Host: localhost~Transfer-Encoding: chunked~~27
=	GET /x HTTP/1.1~%s~~HIDDEN
200 200|400	Host: localhost~Connection: Upgrade~Upgrade: h2c~Content-Length: 39
40[03]( 200)?	Host: other.example~Content-Length: 39
417( 200)?	Host: localhost~Expect: more~Content-Length: 39
400	Host: localhost~Content-Length: 39~Content-Length: 0	Host: localhost~X: y\r~X:
400	Host: localhost~X: y\nContent-Length: 39	Host: localhost~ Content-Length: 39
=	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding%s~HIDDEN~0~~
400	: chunked~Content-Length: 4~~27	: chunked~~2;\n	: chunked~~0\n
400	 : chunked~Content-Length: 5~~0~	:chunked~Content-Length: 44~~0~
400|501	: chunked~Transfer-encoding: cow~~0~	: cow~Transfer-Encoding: chunked~~0~
END
	each <table
	rows <<<$'200 - GET /x -\t^{"version":4,"serial":1}$\n404 - GET /y -'
}

# RFC 9110 10.1.1 and 7.6.1, RFC 9112 9.3 and 9.6: expectations, and the tokens of Connection,
# whatever their case and place in the list. HTTP/1.0 closes unless asked, and knows no 100.
test_a_connection_lives_until_one_side_says_close() {
	local line
	served
	expect 200 LOCK /held "$(info me)"
	each <<'END'
=	GET /x HTTP/1.1~Host: localhost~%s~~
200	Connection: close	Connection: CLOSE	Connection: keep-alive, close	Connection: x,close,y
200	Connection: , close ,	Connection: keep-alive~Connection: close
200 200	Connection: keep-alive	Connection: closed	Connection: not-close	Connection:
200 200	X-Connection: close	Connection: Upgrade~Upgrade: websocket	Expect: 100-continue	Connection: Upgrade, HTTP2-Settings~Upgrade: h2c~HTTP2-Settings: AAMAAABk
417( 200)?	Expect: miracle	Expect: 100-continue, miracle
200 200	Range: bytes=0-1	TE: trailers~Accept-Encoding: gzip
=	GET /x HTTP/1.0~%s~
200	<>	Host: localhost~	Connection: close~	Connection: close, keep-alive~	Connection: close~Connection: keep-alive~
200 200	Connection: Keep-Alive~	Connection: x, keep-alive~
=	PUT %s~Content-Length: 13~~STATE
200	/y HTTP/1.1~Host: localhost~Connection: close	/y HTTP/1.0	/y HTTP/1.0~Expect: 100-continue
200 200	/y HTTP/1.0~Connection: keep-alive
(100 )?200 200	/y HTTP/1.1~Host: localhost~Expect: 100-continue
(100 )?200 200	/y HTTP/1.1~Host: localhost~Expect: 100-Continue
417( 200)?	/y HTTP/1.1~Host: localhost~Expect: 200-ok
=	PUT %s HTTP/1.1~Host: localhost~Expect: 100-continue~Content-Length: 13~~STATE
400( 200)?	/../x
405( 200)?	/	/-/healthy
409( 200)?	/x?ID=a
423( 200)?	/held	/held?ID=you
=	%s~~
404	GET /none HTTP/1.1~Host: localhost~Connection: close
404 200	GET /none HTTP/1.1~Host: localhost	DELETE /none HTTP/1.1~Host: localhost
405 200	DELETE / HTTP/1.1~Host: localhost
=	%s HTTP/1.1~Host: localhost~Expect: 100-continue~Content-Length: 0~~
200 200	GET /x	UNLOCK /x
400( 200)?	PUT /y	LOCK /y
END
	# "100 Continue" is there before the body is.
	exec 8<>"/dev/tcp/127.0.0.1/$PORT"
	printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n%s\r\n\r\n' \
		'Content-Length: 13' >&8
	read -r -t "$PATIENCE" line <&8
	want "before the body" $'HTTP/1.1 100 Continue\r' "$line"
	printf '{"version":4}' >&8
	{ read -r -t "$PATIENCE" && read -r -t "$PATIENCE" line; } <&8
	want "after the body" $'HTTP/1.1 200 OK\r' "$line"
	# A 1.0 client that asked to stay is told that it may (9.3).
	printf 'GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n' |
		raw | sed '/^.$/q' >answers
	has answers '^Connection: [Kk]eep-[Aa]live'
}

# RFC 9110 15.5.15, RFC 6585 5: a head has at most 16 KiB, 100 fields, and a
# target of 8 KiB; at each bound all is well.
test_heads_beyond_the_limits_are_refused() {
	served
	local a
	a=$(printf 'a%.0s' {1..40000})
	fields() { printf 'X: y~%.0s' $(seq "$1"); }
	cases <<END
200 200	GET /?${a:0:8190} HTTP/1.1~Host: localhost~~
414	GET /?${a:0:8191} HTTP/1.1~Host: localhost~~
200 200	GET /x HTTP/1.1~Host: localhost~X: ${a:0:16343}~~
431	GET /x HTTP/1.1~Host: localhost~X: ${a:0:16344}~~
200 200	GET /x HTTP/1.1~Host: localhost~$(fields 99)~
431	GET /x HTTP/1.1~Host: localhost~$(fields 100)~
400|414|431|501	$a /x HTTP/1.1~Host: localhost~~
400|431	GET /x HTTP/1.1~Host: $a~~
400|414|431	$a
400|414|431	${a//a/'~'}
END
}

# 413 beyond -m, before the body is sent where its length is given, else as soon as
# it is too long; at the bound it is stored. JSON may be nested a thousand deep, and
# not once more: each build's stack has room.
test_bodies_beyond_the_limits_are_refused() {
	serve -m 1
	local n
	printf '{"version":4%1048563s}' '' >fits
	printf '{"version":4%1048564s}' '' >over
	nest() { printf '%s"a":%s0%s}' "$1" "$(printf "$2%.0s" $(seq "$4"))" \
		"$(printf "$3%.0s" $(seq "$4"))"; }
	for n in 999 1000 170000; do
		nest '{"version":4,' '[' ']' $n >arrays.$n
		nest '{"version":4,' '{"a":' '}' $n >objects.$n
		nest '{"ID":"me",' '[' ']' $n >lock.$n
	done
	for n in 'X: y' 'Transfer-Encoding: chunked'; do
		rows -H "$n" <<'END'
200 - PUT /x @fits
413 - PUT /x @over	.
413 - POST /w @over
200 - PUT /y @arrays.999
200 - PUT /y @objects.999
200 - LOCK /z @lock.999
400 - PUT /y @arrays.1000	at byte [0-9]+ .*dee?p
400 - PUT /y @objects.1000	at byte [0-9]+ .*dee?p
400 - LOCK /y @lock.1000
400 - PUT /y @arrays.170000
400 - PUT /y @objects.170000
END
		cmp fits states/x.tfstate
		cmp objects.999 states/y.tfstate
	done
	expect 404 GET /w
	printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n' | raw >answers
	want "before the body" 413 "$(statuses)"
	! command -v clang >/dev/null || { CC=clang build plain -O0 && STATESRV=./plain serve; }
	rows <<<'200 - PUT /y @objects.999' # the widest stack: clang that does not optimize
}

# RFC 9110 12.4.2 and 12.5.1: what is accepted with quality 0 is not accepted.
test_accept_is_read_with_its_qualities() {
	served
	local type accept
	while IFS=$'\t' read -r type accept; do
		rows -i -H "Accept: $accept" <<<"200 - GET / -	^Content-Type: $type"
	done <<'END'
text/plain	*/*
text/plain	application/json;q=0, image/png
text/plain	application/json ; Q=0.000, */*
text/plain	text/html;q=0.0
application/json	text/html;q=0.5, application/json;q=0.9
text/plain	xapplication/json, text/htmlx
application/json	image/png , Application/JSON; charset=utf-8 ;q=0.5
text/html	text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8
text/html	text/html, application/json;q=0
END
	rows -i -H 'Accept: application/json' -H 'Accept: */*' <<<$'200 - GET / -\tapplication/json'
}

# RFC 9110 15.5.6 and 9.3.7: a known method in the wrong place is told what
# is right there; OPTIONS says the same without a complaint, or a body.
test_a_wrong_method_is_told_the_right_ones() {
	served
	local url method
	for url in /x /none /a/b /x/lock /terraform_lock/x; do
		echo "204 - OPTIONS $url -	^Allow: OPTIONS, GET, HEAD, POST, PUT, DELETE, LOCK, UNLOCK.$"
	done | rows -i
	for url in / /-/healthy /-/ready /-/metrics /-/log/x /-/versions/x \
		/-/versions/x/20260101T000000.000Z-1; do
		echo "204 - OPTIONS $url -	!^Content-Length:"
		for method in OPTIONS POST PUT DELETE LOCK UNLOCK; do
			echo "204|405 - $method $url -	^Allow: OPTIONS, GET, HEAD.$"
		done
	done | rows -i
}

# RFC 9110 9.3.2: the head of GET, and not one byte more.
test_head_is_get_without_the_body() {
	served
	local url
	for url in /x /none '/?q=none' /-/healthy /-/versions/x /-/log/x '/..'; do
		printf '%s %s HTTP/1.0\r\n\r\n' GET "$url" | raw | sed '/^.$/q; /^Date:/d' >wanted
		printf '%s %s HTTP/1.0\r\n\r\n' HEAD "$url" | raw | sed '/^Date:/d' | cmp - wanted
	done
}

# TLS at the plain port. Without a quick answer terraform waits 33 seconds and
# then speaks of a handshake timeout. Behind a request it is plain 400.
test_a_tls_hello_gets_a_plain_answer() {
	need openssl
	serve
	printf '\x16' | raw >answers
	has answers '^HTTP/1\.0 400 '
	printf 'GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n\x16\x03\x01' | raw >answers
	want statuses '200 400' "$(statuses)"
	openssl s_client -connect "127.0.0.1:$PORT" </dev/null >tls 2>&1 || :
	has tls 'wrong version number|packet length|http request'
}

# ---- HTTP: how the bytes come ---------------------------------------------

# wire HOW [N] <bytes >answers: what bash's /dev/tcp cannot do.
#	cut N	N bytes, and after a moment the others
#	drip	byte by byte
#	half	all of it, its end and the end of all in one packet
#	all	all of it before anything is read, whatever the server says
#	reset	all of it, and after a moment a reset
#	bite	all of it, and a reset after the first bytes of the answer
wire() {
	[ -x wire.bin ] || "${CC:-cc}" -o wire.bin -x c - <<'END'
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static char bytes[1 << 26];

int
main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, how = argv[1][0];
	size_t n = fread(bytes, 1, sizeof bytes, stdin), at, len;
	ssize_t got = 1;

	to.sin_port = htons((in_port_t)atoi(argv[2]));
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0)
		return 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	for (at = 0; at < n && got > 0; at += (size_t)got) {
		len = how == 'd' ? 1 :
		    how == 'c' && at == 0 ? (size_t)atoi(argv[3]) : n - at;
		if (at > 0 && (how == 'c' || how == 'd'))
			usleep(1000);
		got = send(fd, bytes + at, len,
		    MSG_NOSIGNAL | (how == 'h' ? MSG_MORE : 0));
	}
	if (how == 'h')
		shutdown(fd, SHUT_WR);
	if (how == 'r')
		usleep(20000);
	if (how == 'b')
		got = read(fd, bytes, 1000);
	if (how == 'r' || how == 'b')
		return setsockopt(fd, SOL_SOCKET, SO_LINGER,
		    &(struct linger){ 1, 0 }, sizeof(struct linger));
	while ((got = read(fd, bytes, sizeof bytes)) > 0)
		fwrite(bytes, 1, (size_t)got, stdout);
	return 0;
}
END
	./wire.bin "$1" "$PORT" "${2-}"
}

# request: bytes of requests. A line on stdin has a method, a URL, and a body.
request() {
	local method url body
	while read -r method url body; do
		printf '%s %s HTTP/1.1\r\nHost: localhost\r\n' "$method" "$url"
		[ -z "$body" ] || printf 'Content-Length: %d\r\n' ${#body}
		printf '\r\n%s' "$body"
	done
}

# requests: files in requests/, each with a last request that closes; prints names and statuses.
requests() {
	local name status bytes
	mkdir requests
	while IFS=$'\t' read -r name status bytes; do
		printf '%b' "${bytes//'~'/'\r\n'}" >"requests/$name"
		echo "$name $status"
	done <<'END'
url	200	GET http://localhost/%78?ID=b HTTP/1.1~Host: localhost~Connection: close~~
put	200	~PUT /y HTTP/1.1~Host: localhost~Connection: close~Content-Length: 14~~{"version": 4}
md5	200	POST /y HTTP/1.0~Content-MD5: wPReNO1gxuZgxc0LKSxbnA==~Content-Length: 13~~{"version":4}
chunked	200	PUT /y HTTP/1.1~Host: localhost~Connection: close~Transfer-Encoding: chunked~~5;a="b"~{"ver~9~sion": 4}~0;c~D: e~F: g~~
empty	200	UNLOCK /y HTTP/1.1~Host: localhost~Connection: close~Transfer-Encoding: chunked~~0~~
lock	200	LOCK /z HTTP/1.0~Content-Length: 12~~{"ID":"abc"}
three	200 404 200	HEAD /x HTTP/1.1~Host: localhost~~GET /none HTTP/1.1~Host: localhost~~GET /x HTTP/1.0~~
version	505	GET /x HTTP/2.0~Host: localhost~~
json	400	PUT /y HTTP/1.0~Content-Length: 5~~[1,2]
chunk	400	PUT /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~2~{}x~0~~
held	423	PUT /held HTTP/1.1~Host: localhost~Connection: close~Content-Length: 5~~[1,2]
END
}

# Wherever the packets are cut, even after each byte, the answer is the same.
test_every_split_of_a_request_gets_the_same_answer() {
	need "${CC:-cc}"
	served
	expect 200 LOCK /held "$(info me)"
	local name status at
	requests >all
	while read -r name status; do
		wire all <"requests/$name" >answers
		want "$name" "$status" "$(statuses)"
		sed 's/^Date: .*//' answers >whole
		wire drip <"requests/$name" | sed 's/^Date: .*//' | cmp - whole
		for ((at = 1; at < $(wc -c <"requests/$name"); at++)); do
			wire cut $at <"requests/$name" | sed 's/^Date: .*//' | cmp -s - whole ||
				fail "$name, cut at $at"
		done
	done <all
}

# RFC 9112 9.3.2: pipelined requests are answered in their order, and a read
# sees the write before it, whoever does the one and the other.
test_requests_in_one_packet_are_answered_in_their_order() {
	serve
	local i name now=()
	for i in {1..1000}; do
		name=$((i * 7 % 10))
		if [ "$i" -lt 11 ] || [ $((i % 50)) -lt 10 ]; then
			now[name]=$i
			echo "PUT /s$name {\"version\":4,\"serial\":$i}"
		fi
		echo "GET /s$name"
		echo "${now[name]}" >&3
	done 3>wanted | request >bytes
	{ cat bytes && printf 'GET /none HTTP/1.0\r\n\r\n'; } | raw >answers
	want 'the last answer' 404 "$(statuses | grep -o '...$')"
	grep -a -o '"serial":[0-9]*' answers | cut -c 10- | cmp - wanted
	request >bytes <<'END'
LOCK /y {"ID":"a"}
POST /y?ID=a {"version":4}
GET /y
UNLOCK /y {"ID":"a"}
DELETE /y
GET /y
END
	{ cat bytes && printf 'nonsense\r\n\r\n'; } | raw >answers
	want 'an apply' '200 200 200 200 200 404 400' "$(statuses)"
}

# A client that has closed its side may still read (RFC 9112 9.6), or may be
# gone: it is answered what it asks, and changes nothing, but for an UNLOCK
# by ID, which can end its own run only. Its state is kept in the history.
test_a_half_closed_client_may_read_and_not_write() {
	need "${CC:-cc}"
	served
	local status ask
	rows <<<$'200 - LOCK /held info:me\n200 - LOCK /free info:me'
	printf '{"version":4%3000000s}' '' >body
	expect 200 PUT /big @body
	request <<<$'GET /x\nHEAD /none\nGET /x' | wire half >answers
	want 'three at once' '200 404 200' "$(statuses)"
	printf 'GET /x HTTP/1.1\r\nHost: loc' | wire half >answers
	[[ $(statuses) =~ ^(400)?$ ]] || fail "half a head: $(statuses)"
	while read -r status ask; do
		request <<<"$ask" | if [[ $ask == *half* ]]; then head -c -1; else cat; fi |
			wire half >answers
		want "$ask" "$status" "$(statuses)"
	done <<'END'
200 GET /x
200 GET /
404 GET /none
200 GET /big
400 PUT /x {"version":4}
400 PUT /x {"version":4,"half":1}
400 POST /y {"version":4}
400 LOCK /y {"ID":"a"}
400 LOCK /y {"ID":"half"}
400 POST /y/lock {"ID":"a"}
400 DELETE /x
400 UNLOCK /held
200 UNLOCK /free {"ID":"me"}
END
	rows <<'END'
200 - GET /x -	"serial":1}$
404 - GET /y -
404 - GET /y/lock -
200 - GET /held/lock -	"me"
404 - GET /free/lock -
END
	want 'what was written for nobody' '{"version":4}' "$(cat states/.history/y/*)"
}

# connected N: true when the server holds N connections, its listener aside.
connected() {
	[ "$(find "/proc/$PID/fd" -lname 'socket:*' | wc -l)" = $(($1 + 1)) ]
}

descriptors() {
	find "/proc/$PID/fd" -mindepth 1 | wc -l
}

# A client that resets in the middle of a body or of an answer leaves the old
# state, no upload, no open file, and no complaint.
test_a_reset_leaves_nothing_behind() {
	need "${CC:-cc}"
	serve
	local before i head='PUT /x HTTP/1.1\r\nHost: localhost\r\n'
	printf '{"version":4%8000000s}' '' >body
	every '200 - @@' 'PUT /x @body' 'GET /x -'
	until_true connected 0
	before=$(descriptors)
	for i in 1 2 3 4 5; do
		{ printf '%bContent-Length: 8000000\r\n\r\n' "$head"
			head -c $((i * 900000)) body; } | wire reset
		{ printf '%bTransfer-Encoding: chunked\r\n\r\n3D0900\r\n' "${head/x/y}"
			head -c $((i * 700000)) body; } | wire reset
		printf '%bContent-Length: 8000\r\n\r\n{"v' "$head" | wire reset
		request <<<"GET /x" | wire bite
		request <<<"GET /x" | wire reset
		printf 'GET /x HTTP/1.1\r\nHost: loc' | wire reset
		wire reset </dev/null
	done
	until_true connected 0
	until_true no_uploads_left
	until_true eval '[ "$(descriptors)" = "$before" ]'
	cmp body states/x.tfstate
	want "files" ./x.log,./x.tfstate, \
		"$(cd states && find . -type f ! -path './.*' | sort | tr '\n' ,)"
}

# Closing on a client that is still sending would reset the connection before
# it reads why: what was refused is answered, and read to its end for a while.
test_an_early_refusal_is_read_by_a_client_still_sending_40_mb() {
	need "${CC:-cc}"
	serve -m 38
	expect 200 LOCK /locked "$(info me)"
	local url status size framing
	while read -r status url size; do
		printf '%*s\r\n0\r\n\r\n' "$size" '' >body
		for framing in "Content-Length: $(wc -c <body)\r\n" \
			"Transfer-Encoding: chunked\r\n\r\n$(printf %x "$size")"; do
			{ printf '%b' "PUT $url HTTP/1.1\r\nHost: localhost\r\n$framing\r\n"
				cat body; } | wire all >answers
			want "PUT $url, $framing" "$status" "$(statuses)"
		done
		expect "$status" PUT "$url" @body
	done <<'END'
413 /x 40000000
423 /locked 39000000
400 /.. 39000000
END
}

# ---- HTTP: clients that mean no good --------------------------------------

# hold N [BYTES]: N more connections, BYTES (as printf's %b) sent on each,
# kept open in FDS; an answer is never read. let_go: ends them all.
hold() {
	local i fd
	ulimit -S -n "$(ulimit -H -n)"
	trap '' PIPE
	for ((i = 0; i < $1; i++)); do
		exec {fd}<>"/dev/tcp/127.0.0.1/$PORT"
		FDS+=("$fd")
		printf '%b' "${2-}" >&"$fd" || :
	done
}

let_go() {
	hang_up
	until_true connected 0
}

# grew KIB FROM: memory grew by so much at most; sanitizers have no say in it.
grew() {
	grep -q __asan_init "$STATESRV" || [ "$(kib VmRSS)" -le $(($1 + $2)) ] ||
		fail "memory grew from $2 to $(kib VmRSS) KiB, not by $1 at most"
}

# calm SECONDS PERCENT: it uses less than that of a processor meanwhile.
calm() {
	local ticks
	ticks=$(awk '{ print $14 + $15 }' "/proc/$PID/stat")
	sleep "$1"
	ticks=$(($(awk '{ print $14 + $15 }' "/proc/$PID/stat") - ticks))
	[ $ticks -le $(($1 * $2 * $(getconf CLK_TCK) / 100)) ] || fail "$ticks ticks, and all idle"
}

# big MIB: a state of that size, in ./body and as /big.
big() {
	printf "{\"version\":4%$(($1 * 1048576 - 13))s}" '' >body
	expect 200 PUT /big @body
}

# hasty [-DNAME=VALUE...]: what is served has deadlines of a second, or these.
hasty() {
	need "${CC:-cc}"
	"${CC:-cc}" -std=c11 -w -O1 -pthread -DIDLE_MS=1000 -DHEAD_MS=1000 \
		-DBODY_MS=1000 -DDRAIN_MS=1000 "$@" -o hasty "$here/statesrv.c"
	# shellcheck disable=SC2030,SC2031
	STATESRV=./hasty
}

# trickle BYTES COUNT: that many bytes at a time, ten times a second.
trickle() {
	local i
	for ((i = 0; i < $2; i++)); do
		printf '%*s' "$1" '' || return 0
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

# An idle connection holds no buffer, is looked at seldom, and costs nothing:
# five percent of a processor for a thousand would be too much. Afterwards
# memory and descriptors are what they were.
test_a_thousand_idle_connections_cost_nothing() {
	served
	local before kib
	hold 100 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	let_go
	before=$(descriptors) kib=$(kib VmRSS)
	hold 500
	hold 500 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	until_true connected 1000
	expect 200 GET /x
	grew 4096 "$kib"
	calm 3 5
	expect 200 PUT /x "$(state 2)"
	hold 500 'PUT /.x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{'
	grew 4096 "$kib"		# nor has one that was refused a buffer
	spy -e trace=poll,ppoll		# requests in threads do not have all of them polled
	curl -sS -o /dev/null "$URL/x/lock?ID=[1-200]"
	unspy
	[ "$(grep -c ', 10[0-9][0-9], ' trace)" -lt 100 ] || fail 'all are polled for each request'
	let_go
	until_true eval '[ "$(descriptors)" = "$before" ]'
	grew 1024 "$kib"
}

# RFC 9112 9.6: to close with bytes unread resets the connection, and takes
# what is still on its way along; an empty line too many is enough for that.
# What nobody reads waits in its file, not in the kernel's memory (promise 8).
test_a_last_answer_is_whole_and_an_unread_one_waits_in_its_file() {
	[ -r /proc/net/tcp ] || skip 'no /proc/net/tcp'
	served
	local head
	big 8
	for head in 'HTTP/1.0\r\n' 'HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'; do
		{ printf 'GET /big %b\r\n' "$head"; sleep 0.1; printf '\r\n'; sleep 0.1; } |
			raw >answers
		tail -c "$(wc -c <body)" answers | cmp - body
	done
	# a refusal, too, whose body was read and whose next bytes were not
	printf 'PUT /x HTTP/1.1\r\nHost: localhost\r\n%s\r\n%s\r\n\r\nwrong%0*d\r\n' \
		'Connection: close' 'Content-Length: 100005' 100000 0 | raw >answers
	want "the refusal" 400 "$(statuses)"
	hold 5 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	queue() { # the most that the kernel has of an answer
		echo $((16#$(awk -v "port=0100007F:$(printf %04X "$PORT")" '
			$2 == port && $4 == "01" { print substr($5, 1, 8) }' /proc/net/tcp |
			sort | tail -1)))
	}
	until_true eval '[ "$(queue)" -gt 0 ]'
	for _ in {1..50}; do
		[ "$(queue)" -lt 1000000 ] || fail "$(queue) bytes in the kernel"
		sleep 0.02
	done
}

# Half a head, half a body, answers that nobody reads: each holds a bounded
# piece of memory, nobody else waits, and nothing stays behind. Who began to
# read the old state gets the old state, whole (promise 2).
test_slow_clients_stall_nobody() {
	served
	local before kib i head='PUT /x HTTP/1.1\r\nHost: localhost\r\n'
	big 8
	hold 1 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	expect 200 PUT /big "$(state 1)"
	printf 'GET /none HTTP/1.0\r\n\r\n' >&"${FDS[0]}"
	timeout "$PATIENCE" cat <&"${FDS[0]}" >answers
	want "the slow reader" '200 404' "$(statuses)"
	[ "$(wc -c <answers)" -gt "$(wc -c <body)" ] || fail "cut short"
	expect 200 PUT /big @body
	let_go
	before=$(descriptors) kib=$(kib VmRSS)
	for i in {2..6}; do
		hold 20 'GET /x HTTP/1.1\r\nHost: loc'
		hold 1 "${head}Content-Length: 99\r\n\r\n{"
		hold 1 "${head}Transfer-Encoding: chunked\r\n\r\n99\r\n{"
		hold 1 "${head}Content-Length: 999999\r\n\r\n{"
		hold 1 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n\x00'
		rows <<<$'200 - PUT /x state:'"$i"$'\n200 - GET /x -\t"serial": '"$i,"
	done
	expect 200 GET /big
	cmp body answer
	grew 16384 "$kib"
	let_go
	until_true no_uploads_left
	until_true eval '[ "$(descriptors)" = "$before" ]'
	grew 8192 "$kib"
}

# When every thread waits for a client, the one that has been silent longest
# makes room: stalled uploads, lock infos and readers, more than threads, do
# not keep a LOCK waiting. Who sends on, if slowly, is let be.
test_silent_clients_do_not_use_up_the_threads() {
	hasty -DTHREADS_MAX=4 -DSTALL_MS=500 -DBODY_MS=60000 -DHEAD_MS=60000
	served
	local bytes host='HTTP/1.1\r\nHost: localhost\r\n'
	big 8
	{ printf '%b{"version":4' "PUT /slow ${host}Content-Length: 75013\r\n\r\n"
		trickle 2500 30
		printf '}GET /none HTTP/1.0\r\n\r\n'; } | slowly >slow &
	for bytes in "PUT /y ${host}Content-Length: 99\r\n\r\n{" \
		"POST /y ${host}Transfer-Encoding: chunked\r\n\r\n9" \
		"LOCK /y ${host}Content-Length: 99\r\n\r\n{" "GET /big $host\r\n"; do
		hold 8 "$bytes"
		rows <<<$'200 - LOCK /x info:me\n200 - UNLOCK /x info:me\n404 - GET /y -'
	done
	let_go
	wait $!
	hold 2 "PUT /calm ${host}Content-Length: 99\r\n\r\n{"
	for bytes in 1 2 3; do sleep 1.2 && rows <<<'404 - GET /-/versions/none -'; done
	! grep 'name=calm' server.log || fail 'there was a thread for each'
	let_go
	mv slow answers
	want 'the slow upload' '200 404' "$(statuses)"
	until_true grep -q 'method=PUT name=y .*status=- .*why="others need its thread"' server.log
	hasnt server.log 'name=big .*status=- bytes=8388608'
}

# Who has no credentials holds no thread, though he may ask for health: not by a body that he
# sends in no hurry, nor by answers that he does not read. He gets all that he does read.
test_strangers_hold_no_thread() {
	hasty -DTHREADS_MAX=4 -DSTALL_MS=60000 -DBODY_MS=60000 -DHEAD_MS=60000
	local bytes fd floods host='HTTP/1.1\r\nHost: localhost\r\n'
	team_users
	serve -u users
	lock() { rows <<<$'200 ann:s3cret LOCK /demo info:me\n200 ann:s3cret UNLOCK /demo info:me'; }
	for bytes in "GET /-/healthy ${host}Content-Length: 60000\r\n\r\n{" \
		"GET /-/ready ${host}Transfer-Encoding: chunked\r\n\r\n9\r\n{" \
		"OPTIONS /-/healthy ${host}Content-Length: 9\r\n\r\n{"; do
		hold 8 "$bytes"
		lock
		let_go
	done
	for bytes in "POST /x ${host}Origin: http://x\r\n\r\n" "GET /-/healthy $host\r\n"; do
		# shellcheck disable=SC2059 # the bytes are the format
		printf "$bytes%.0s" {1..20000} >flood
		hold 8
		floods=()
		for fd in "${FDS[@]}"; do
			{ timeout 3 cat flood >&"$fd"; } 2>/dev/null &
			floods+=($!)
		done
		wait "${floods[@]}" || :
		lock
		let_go
	done
	for bytes in 'healthy|' 'nope|Authorization: Bearer s3cret\r\n'; do
		# shellcheck disable=SC2059
		printf "GET /-/${bytes%|*} $host${bytes#*|}\r\n%.0s" {1..40} >flood
		printf '\r\n' | cat flood - | raw >answers
		want "answers to ${bytes%|*}" 40 "$(statuses | wc -w)"
	done
}

# One client that asks without end, and one that never reads either, leave
# the others their turn, and do not fill the memory.
test_a_flood_of_requests_leaves_the_others_their_turn() {
	served
	local kib path
	kib=$(kib VmRSS)
	for path in /x /x /-/none /-/none /y; do
		exec 8<>"/dev/tcp/127.0.0.1/$PORT"
		yes "GET $path HTTP/1.1"$'\r\nHost: localhost\r\n\r' >&8 2>/dev/null &
		echo $! >>"$T/pids"
		[ $path = /y ] || cat <&8 >/dev/null &
		echo $! >>"$T/pids"
		exec 8>&-
	done
	every $'200 - PUT /x state:@@\n200 - GET /x -' {1..20}
	grew 4096 "$kib"
}

# Every wait for a client has an end, which single bytes do not push away. What
# stalls is cut without an answer, for a client takes 408 for final and sends
# again what was cut. A body that comes at 1 KiB/s may take its time.
test_every_wait_for_a_client_has_an_end() {
	hasty
	served
	local times size bytes i=0 put='PUT /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: '
	told() { [ "$(grep -c 'status=- .*why=.*[a-z]' server.log)" = "$i" ]; }
	while IFS=$'\t' read -r size times bytes; do
		i=$((i + 1))
		{ printf '%b' "${bytes//'~'/'\r\n'}"; trickle "$size" "$times"; } |
			slowly >"cut.$i" &
	done <<'END'
0	0	GET /x HTT
1	40	GET /x HTTP/1.1~X: y
0	0	PUT /y HTTP/1.1~Host: localhost~Content-Length: 9~~{
1	40	PUT /y HTTP/1.1~Host: localhost~Content-Length: 999~~{
1000000	5	PUT /y HTTP/1.1~Host: localhost~Content-Length: 9999999~~{
0	0	POST /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~9~{
1	40	POST /y HTTP/1.1~Host: localhost~Transfer-Encoding: chunked~~9;
0	0	LOCK /y HTTP/1.1~Host: localhost~Content-Length: 99~~{"ID":"a"}
0	0	UNLOCK /y HTTP/1.1~Host: localhost~Content-Length: 99~~{"ID":"a"}
END
	until_true told
	want 'what was cut was told' '' "$(cat cut.*)"
	printf '' | raw >answers
	request <<<'GET /x' | raw >>answers
	want 'one that is idle, one that is idle again' 200 "$(statuses)"
	{ printf '%b50013\r\n\r\n{"version":4' "$put"; trickle 2500 20
		printf '}GET /none HTTP/1.0\r\n\r\n'; } | slowly >answers
	want 'a body in its time' '200 404' "$(statuses)"
	big 16
	hold 5 '\x16'
	hold 5 "${put}9\r\n\r\n"
	hold 5 "${put/y/..}9\r\n\r\n"
	hold 5 'GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n'
	until_true connected 0
	until_true no_uploads_left
}

# When all slots are taken, the connection that is idle for longest makes room; one that is in the
# middle of something does not. The last free slot is as good as any.
test_when_all_slots_are_taken_the_idlest_makes_room() {
	hasty -DSLOTS_MAX=16 -DIDLE_MS=60000 -DBODY_MS=60000 -DSTALL_MS=500
	served
	local line half='PUT /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{"version":4'
	hold 1 "$half"
	hold 1
	hold 100 'GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n'
	expect 200 GET /x
	timeout "$PATIENCE" cat <&"${FDS[1]}" >answers || fail "the idlest lives on"
	want 'what the idlest was told' '' "$(cat answers)"
	printf '}' >&"${FDS[0]}"
	read -r -t "$PATIENCE" line <&"${FDS[0]}"
	want 'the busy one' $'HTTP/1.1 200 OK\r' "$line"
	let_go
	hold 15 "$half"
	until_true connected 15
	rows <<<$'200 - GET /x -\n200 - LOCK /x info:me\n200 - UNLOCK /x info:me'
}

# Where the limit is low, the connections leave descriptors for the files. Out
# of them altogether, accepting rests instead of spinning, and room is made.
test_limits_of_the_system_neither_spin_nor_kill() {
	need prlimit
	grumbles
	through "ulimit -n 64; ulimit -f 64; exec '$STATESRV'"
	served
	pad 1 100000 >big
	rows <<<'507 - PUT /big @big'	# past the limit of a file's size, no signal kills us
	hold 200
	every '200 - @@' 'PUT /x state:2' 'GET /x -' 'LOCK /x info:me' 'GET /x/lock -'
	let_go
	prlimit --pid "$PID" --nofile=$(($(descriptors) + 12))
	hold 40
	expect 200 GET /-/healthy
	calm 2 25
	expect 200 GET /-/healthy
	let_go
	expect 200 PUT '/x?ID=me' "$(state 2)"
}

# ---- names: from a URL to a file, and to no other ------------------------

# What a name may be, and where it lies. Each that is served is listed.
test_a_name_is_a_path_below_the_directory() {
	serve
	local words seg i deep
	printf -v seg 'a%.0s' {1..200}
	printf -v deep '/%s' {1..32}
	IFS=$'\t\n' read -r -d '' -a words <<END || :
/a	a	/a.tfstate	a	/%61	a	/a/b	a/b	/a%2Fc	a/c	/a%2fd.tfstate	a/d
/terraform_state/t	t	/terraform_state/t/u	t/u	/lock/x	lock/x	/locks	locks	/log	log
/a.b.c	a.b.c	/a..b	a..b	/a.	a.	/a-	a-	/a~	a~	/%7E	~	/tfstate	tfstate
/a%20b	a b	/a+b	a+b	/%2541	%41	/%252e%252e%252fx	%2e%2e%2fx	/%C3%A9	é	/%F0%9F%94%92	🔒
/*%3F%22%27%24(x)%3B&	*?"'\$(x);&	/x.tfstate.bak	x.tfstate.bak	/a:b@c,d;e=f	a:b@c,d;e=f
/Lockfile.LOCK	Lockfile.LOCK	/terraform_states/x	terraform_states/x	$deep	${deep:1}
/$seg	$seg	/$seg/$seg/$seg/$seg/${seg:4}	$seg/$seg/$seg/$seg/${seg:4}
END
	for ((i = 0; i < ${#words[@]}; i += 2)); do
		expect 200 PUT "${words[i]}" '{"version":4,"serial":'"$i}"
		want "the file of ${words[i]}" '{"version":4,"serial":'"$i}" \
			"$(cat "states/${words[i + 1]}.tfstate")"
		expect 200 LOCK "${words[i]}" '{"ID":"me"}'
		[ -f "states/${words[i + 1]}.lock" ] || fail "no ${words[i + 1]}.lock"
		rows <<<"200 - GET ${words[i]} -	\"serial\":$i}"
		expect 200 UNLOCK "${words[i]}" '{"ID":"me"}'
		ask GET / '' -H 'Accept: application/json'
		grep -q -F "\"name\":\"${words[i + 1]//\"/\\\"}\"" answer || fail "not listed: ${words[i]}"
	done
}

# No spelling leads out of the directory, onto our own files, or two names to
# one file; by no method, and in no dialect.
test_a_bad_name_is_refused_before_anything_is_opened() {
	serve
	local url urls long deep
	printf -v long 'a%.0s' {1..201}
	printf -v deep '/%s' {1..33}
	mkdir outside
	echo '{"out":"side"}' >outside/x.tfstate
	echo '{"ID":"them"}' >outside/x.lock
	touch answer head before
	find . ! -path './states/*' | sort >before
	read -r -d '' -a urls <<END || :
/.. /. /../outside/x /./outside/x /a/../../outside/x /a/.. /a/. /a/./b
/%2e%2e/outside/x /%2E%2E%2Foutside%2Fx /.%2e/outside/x /..%2foutside/x
/a%2f..%2f..%2foutside%2fx /..%5coutside%5cx /a%5cb /..%00/outside/x
/x%00 /x%00.tfstate /a%01b /a%0ab /a%0d /a%09b /a%1b%5b2J /a%7fb
/%c2%80 /a%c2%85b /a%C2%9fb /%c0%ae%c0%ae/outside/x /%c0%af /%c3 /%c3%28
/%e0%80%ae%e0%80%ae/outside/x /%f0%80%80%ae /%e2%82 /%ed%a0%80
/%f4%90%80%80 /%f8%88%80%80%80 /%ff /%80 /.gitignore /terraform_state/.x
/a%e2%80%aeb /a%e2%80%8eb /a%e2%80%8fb /a%d8%9cb /a%e2%81%a6b
/.x /.guard /.tmp/x /.history/x/y /a/.b /%2ehidden /-x /a/-x /%2dx
/x.lock /x.log /x.lock.tfstate /x.log.tfstate /x.tfstate.tfstate
/x.lock/y /x.log/y /x.tfstate/y /.tfstate /a/.tfstate
// //a /a//b /a/ /%2f /%2fa /a%2f /lock /lock/lock /a/lock/lock /../lock
/terraform_state/ /terraform_state/.. /terraform_state/%2e%2e%2foutside%2fx
/terraform_lock/../outside/x /terraform_lock/ $deep
/$long /a/$long /${long:1}/${long:1}/${long:1}/${long:1}/${long:4}
END
	for url in "${urls[@]}"; do
		printf '400 - %s {"ID":"them"}\n' "GET $url" "PUT $url" "DELETE $url" \
			"LOCK $url" "UNLOCK $url"
	done | rows
	for url in versions log; do
		printf "4%s - GET /-/$url/%s -\n" 00 ../outside/x 00 %2e%2e%2foutside%2fx 00 .tmp \
			'0[04]' x/..%2f..%2f..%2foutside%2fx '0[04]' x/../../../outside/x.tfstate
	done | rows
	find . ! -path './states/*' | sort | cmp - before
	want "in the directory" "" "$(find states -type f ! -name '.g*')"
	want "outside" '{"out":"side"}' "$(cat outside/x.tfstate)"
}

# No symbolic link is followed, neither at the end of a path nor on its way:
# what it points to is neither read nor written, nor taken for "no state". A
# FIFO or a directory in the place of a file makes nothing hang.
test_what_is_no_plain_file_is_no_state_and_no_lock() {
	grumbles
	serve
	local name
	mkdir -p outside/dir outside/hist states/.history
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
	ln -s "$PWD/outside/hist" states/.history/hist
	mkfifo states/fifo.tfstate states/fifolock.lock states/fifolog.log
	mkdir states/sub.tfstate states/sublock.lock states/sublog.log
	echo >states/plain
	find outside -type f -exec md5sum {} + >before
	for name in file dangling dir/x gone/x loop/x fifo sub; do
		printf "%s\n" "50. - GET /$name -	!side" "... - LOCK /$name info:me" \
			"[45].. - PUT /$name?ID=me state:1" "... - UNLOCK /$name info:me" \
			"... - GET /-/versions/$name -	!side" "[45].. - DELETE /$name -"
	done | rows
	for name in held theirs fifolock sublock; do
		printf "%s\n" "[45].. - LOCK /$name info:me" "[45].. - PUT /$name state:1" \
			"... - GET /$name/lock -	!them" "... - UNLOCK /$name info:them"
	done | rows
	for name in logged hist fifolog sublog; do
		printf "%s\n" "... - PUT /$name state:1" "... - PUT /$name state:2" \
			"... - GET /-/log/$name -	!side" "... - GET /-/versions/$name -	!side"
	done | rows
	rows <<'END'
404|50. - GET /plain/x -
[45].. - PUT /plain/x state:1
200 - GET / -	!side|them
200 - PUT /fine state:1
END
	find outside -type f -exec md5sum {} + | cmp - before
	want "new files outside" "" "$(find outside -newer before -type f)"
}

# ---- the pure parts: parser, chunks, JSON, names, digests ------------------

# pure_source [FILE]: C that includes the server, its main aside, and lets each
# of its pure parts say in words what it thinks of some bytes. These lie in
# blocks of exactly their size, so that the sanitizers see one read too far.
pure_source() {
	printf '#define main statesrv_main\n#include "%s"\n' "${1-$here/statesrv.c}"
	cat <<'END'
#include <sys/mman.h>
#undef main

static char *
exact(const void *data, size_t n)
{
	char *copy = malloc(n);

	return n > 0 ? memcpy(copy, data, n) : copy;
}

/* The byte where it is wrong, or "good" and ID, lineage, serial, and what it
 * is, or which key is there twice. The same, whatever part of it is at hand,
 * with the rest in a file. */
static void
say_json(const char *s, size_t n, char *out)
{
	static struct json j, start;
	static struct lock l;
	struct meta m;
	char *block, said[2048];
	int file = memfd_create("text", 0);
	size_t cut;

	assert(pwrite(file, s, n, 0) == (ssize_t)n);
	for (cut = n; cut <= n; cut = cut > 64 ? cut / 2 : cut - 1) {
		block = exact(s, cut);
		start = json_text(block, cut);
		start.fd = file;
		start.pos = (off_t)cut;
		start.max = (off_t)n;
		memset(&l, 0, sizeof(l));
		j = start;
		if (!lock_info(&j, &l))
			*l.id = '\0';
		j = start;
		meta_read(&j, &m);
		if (j.why == NULL)
			sprintf(said, "good %s %s %s %s.", l.id, m.lineage,
			    *m.serial != '\0' ? m.serial : "-",
			    m.doubled != NULL ? m.doubled : m.type == 's' ?
			    "state" : m.type == 'l' ? "lock" : "");
		else
			sprintf(said, "at %llu: %s", (unsigned long long)j.at,
			    j.why);
		free(block);
		assert(cut == n || strcmp(said, out) == 0);
		strcpy(out, said);
	}
	(void)close(file);
}

/* Each prefix says "more", the whole its length. */
static void
say_head(const char *s, size_t n, char *out)
{
	struct head h, g;
	size_t max = n < HEAD_MAX ? n : HEAD_MAX, i;
	int whole = http_parse(s, max, &h), part = 0;
	char *grown;

	assert(whole <= (int)n && (whole >= 0 || atoi(h.why) >= 400));
	assert(whole <= 0 || strlen(h.host) + strlen(h.target) < n);
	assert(whole <= 0 || (h.length >= -1 && !(h.field[F_CODING] && h.length != -1) &&
	    memcmp(s + whole - 4, "\r\n\r\n", 4) == 0));
	for (i = 1; i <= max && part == 0; i++) {
		grown = exact(s, i);
		part = http_parse(grown, i, &g);
		free(grown);
	}
	/* With a limit in its way it may be refused for another reason. */
	assert((part > 0) == (whole > 0) && (part <= 0 || part == whole));
	sprintf(out, "%d", whole == (int)n ? 200 : whole == -1 ? atoi(h.why) : -whole);
}

static void
say_chunk(const char *s, size_t n, char *out)
{
	int64_t size = 0;
	bool ok = chunk_size(strndupa(s, n), &size);

	assert(!ok || size >= 0);
	sprintf(out, "%lld", ok ? (long long)size : 400);
}

/* A letter for the kind, and a name that is safe to open. */
static void
say_route(const char *s, size_t n, char *out)
{
	static const char kinds[] = { [K_NONE] = '-', [K_ROOT] = '/',
	    [K_STATE] = 's', [K_LOCK] = 'l', [K_VERSIONS] = 'v', [K_VERSION] = 'e',
	    [K_LOG] = 'g', [K_HEALTHY] = 'h', [K_READY] = 'r', [K_METRICS] = 'm' };
	static struct request r;

	memset(&r, 0, sizeof(r));
	strcpy(out, "refused");
	if (name_route(strndupa(s, n), &r) != NULL)
		return;
	sprintf(out, "%c %s", kinds[r.kind], r.name);
	assert(strchr("slveg", *out) == NULL || (name_wrong(r.name) == NULL &&
	    *r.name != '/' && *r.name != '.' && strstr(r.name, "/.") == NULL));
	assert(r.kind != K_VERSION || strchr(r.version, '/') == NULL);
}

static void
say_digests(const char *s, size_t n, char *out)
{
	unsigned char digest[32];
	struct hash h = md5_start;

	for (size_t i = 0; i < n; i += 3)
		hash_add(&h, s + i, n - i < 3 ? n - i : 3);
	hash_end(&h, digest);
	hex(digest, 16, out);
	out[32] = ' ';
	sha256(s, n, digest);
	hex(digest, 32, out + 33);
}

static void
say_base64(const char *s, size_t n, char *out)
{
	ssize_t got = base64_decode(strndupa(s, n), out, 64);

	strcpy(out + (got == -1 ? 0 : got), got == -1 ? "refused" : "");
}

static const struct {
	const char *name;
	void (*say)(const char *, size_t, char *);
} parts[] = { { "json", say_json }, { "head", say_head },
    { "chunk", say_chunk }, { "route", say_route },
    { "digests", say_digests }, { "base64", say_base64 } };
END
}

# units_source: a program that is told a part, reads bytes, and prints what the part says of them.
units_source() {
	pure_source
	cat <<'END'
int
main(int argc, char **argv)
{
	static char s[65536], out[16384];
	size_t n = fread(s, 1, sizeof(s), stdin), i = 0;
	char *copy = exact(s, n);

	(void)argc;
	while (strcmp(parts[i].name, argv[1]) != 0)
		i++;
	parts[i].say(copy, n, out);
	printf("%s", out);
	free(copy);
	return 0;
}
END
}

# A table: a part, a pattern of what it says, and values: %XX is a byte, ~ is CR LF, but for a
# route; <> is nothing; a "value" stands in an object. RFC 8259 and the kinds of JSONTestSuite,
# RFC 9112, 3629, 4648; digests as others reckon them, where their padding changes.
units_table() {
	local n
	for n in 0 1 55 56 57 63 64 65 119 120 128 1000; do
		seq -s ' ' 1000 | head -c $n >text
		printf 'digests\t%s %s\t%s\n' "$(md5sum <text | cut -c -32)" \
			"$(sha256sum <text | cut -c -64)" "$(grep . text || echo '<>')"
	done
	cat <<'END'
value	good*	0	-0	1	-1	10	-123	0e+1	0e1	0E0	1E22	1E-2	1E+2	123e45	1.0	-1.5	0.1
value	good*	1.10	123.456e78	123.456789	20e1	12345678901234567890	123123e100000	-1e+9999
value	good*	-0.000000000000000000000000000000000000000000000000000000000000000001	0.4e00669999
value	good*	true	false	null	[]	{}	[[]]	[{}]	{"":0}	[ ]	{ }	[1%0a]	 [1]	[1,null,null,2]
value	good*	[1, 2 , 3]	{"a":1,"a":1}	{"x":[{"id":"x"}], "id":"y"}	{"min": -1.0e+28, "max": 1}
value	good*	""	" "	"asd"	"a/*b*/c"	"\"\\\/\b\f\n\r\t"	"\\\\\""	"\u0060\u012a\u12AB"	"\u0000"
value	good*	"\u0022"	"\u005C"	"\uFFFF"	"\uD801\udc37"	"\ud83d\ude39\ud83d\udc8d"	"\uDBFF\uDFFE"
value	good*	"\\u0000"	"\\a"	"\\n"	"new\u000Aline"	"%7f"	"%c2%80"	"%df%bf"	"%e0%a0%80"	"%ef%bf%bf"
value	good*	"%e2%80%a8%e2%80%a9"	"%ed%9f%bf%ee%80%80"	"%ef%bb%bf"	"%f0%90%80%80"	"%f4%8f%bf%bf"
value	good*	"\uDADA"	"\uD888\u1234"	"\uDd1ea"	"\uD800\n"	"\uD800\uD800\uDC00"	"\uDFAA"	"\uD800abc"
value	at *	-	+1	++1	+Inf	-01	-1.0.	-2.	.-1	.2e-3	0.1.2	0.3e	0.3e+	0.e1	0e	0e+	0E	0E+	1.0e
value	at *	1.0e+	1.0e-	1eE2	1 000.0	2.e+3	2.e-3	2.e3	9.e+	1+2	0x1	0x42	Inf	Infinity	-Infinity
value	at *	0%e5	1_0	1e1.5	1/2	%ef%bc%91	1%00	tru	fals	nul	True	NULL	truee	nulll	true false
value	at *	undefined	t	a%e5	*	truth	n	"	"""	"a	"\"	'a'	abc	"x" 1	"a%0ab"	"%09"	"%1f"	"a%00a"
value	at *	"\x00"	"\a"	"\'"	"\0"	"\ "	"\%09"	"\%00"	"\%0a"	"\u"	"\u0"	"\u00"	"\u00A"	"\uqqqq"	"\u00g0"
value	at *	"\U0041"	"\u 041"	"\u+041"	"\uD834\uDd"	"\uD800\u"	"\uD800\u1"	"\uD800\u1x"	"\uD800\"	"\{[\"
value	at *	"\\\"	\u0020"a"	"a"b"	%e2%80%9ca"	"%ff"	"%e5"	"%81"	"%80"	"%c0%af"	"%c1%bf"	"%c3"	"%c3("
value	at *	"%e0%ff"	"%e0%80%af"	"%e0%9f%bf"	"%e2%82"	"%e2(%ac"	"%ed%a0%80"	"%ed%bf%bf"	"%f0%80%80%af"
value	at *	"%f0%8f%bf%bf"	"%f0%9f%98"	"%f0%9f(%80"	"%f4%90%80%80"	"%f4%bf%bf%bf"	"%f5%80%80%80"	"\%e5"
value	at *	"%f8%88%80%80%80"	"\u%e5"	"\%f0%9f%8c%80"	[	]	[1	[1,	[1,]	[1,,]	[1,,2]	[,1]	[,]	[1 2]	[1:2]
value	at *	[1]]	[[1]	[3[4]]	[1}	[x	["": 1]	[*]	[-]	["",]	[1%0a,1%0a,1	[{]	[{}	[%0c]	[%e2%81%a0]	[<null>]
value	at *	[\n]	['	["a"x	["a\f"]]	[%0b"a"]	{	}	{]	{[: "x"}	{"x"}	{"x", null}	{"x"::1}	{"a" b}	{"a":
value	at *	{:1}	{1:1}	{null:null}	{9999E9999:1}	{'a':0}	{a:1}	{"a":0,}	{"a":0,,}	{,"a":0}	{"a":1,,"b":2}
value	at *	/**/0	%c2%a00	%ef%bb%bf0	%0b0	0%0c	0%e2%80%a8	%000	#0
json	good   - .	{}	 {}	{} 	~%09 {}~%09 	{"a":0}	{ "a"%0a:~0%09}	{"serial":-1}	{"serial":1.5}	{"serial":"7"}	{"serial":123456789012345678901}	{"serial":null,"lineage":null}
json	good   - .	{"serial":[7],"lineage":["x"]}	{"a":{"serial":7,"ID":"i"}}	{"a":"ID","b":"serial"}	{"IDx":"i","xID":"i"}	{"serial\u0000":7}	{"ID\u0000":"i"}	{"versions":4}	{"ID":1}	{"version":null}	{"encrypted_data":5}	{"version":[4]}
json	at 0:*	<>	[]	[{}]	0	"{}"	null	true	}	%00{}	%ef%bb%bf{}	%ef%bb{}	%ff%fe{%00}%00	%0c{}	(){}	5985~{	<html>	a: b
json	at 1:*	 	%0a	{	{,}	{%00}
json	at 2:*	{}}	{}{}	{},{}	{}0	{}#	{};	{}%00	{}%0b
json	at 6:*	{"a": }	{"a":01}	{"a":1	{"a":"%ff"}	{"a":"%01"}
json	at 7:*	{"a":1,}	{"a":1,	{"a":"\x"}
json	good  x 7 .	{"serial":7,"lineage":"x"}	{"lineage":"x","serial":7}	{"SERIAL":7,"LineAge":"x"}
json	good i  7 lock.	{ "serial" :%0a7 , "ID" : "i" }	{"id":"i","a":{"serial":9},"serial":7}
json	good   0 .	{"serial":0}	{"a":1,"serial":0}
json	good   98765432109876543210 .	{"serial":98765432109876543210}
json	good   8 state.	{"a":[{"serial":7}],"serial":8,"version":4}	{"\u0073erial":8,"Version":3}
json	good   - state.	{"version":4}	{"encrypted_data":"x"}	{"version":0}	{"ver\u017fion":4}
json	good   - lock.	{"version":"4"}	{"ID":""}	{"ID":"a\u0000b"}
json	good 😹  - lock.	{"ID":"\ud83d\ude39"}	{"\u0049D":"😹"}
json	good   2 serial.	{"serial":1,"serial":2}	{"serial":1,"SERIAL":2}
json	good   - version.	{"version":4,"Version":"1.11.4"}	{"version":4,"version":4}
json	good  b - lineage.	{"lineage":"a","lineage":"b"}
head	200	GET / HTTP/1.0~~	OPTIONS * HTTP/1.1~Host: a~~	GET http://a.b/c HTTP/1.1~Host: a~~
head	200	LOCK /a/b?ID=c HTTP/1.1~Host:[::1]:1~A:~B: %09~~	PUT / HTTP/1.1~Host: a~Content-Length: 9223372036854775807~~
head	200	PUT / HTTP/1.1~Host: a~Transfer-Encoding: chunked~~
route	v a/b	/-/versions/a/b
route	v a/20260102T030405.006Z-	/-/versions/a/20260102T030405.006Z-
route	e a	/-/versions/a/20260102T030405.006Z-7	/-/versions/a/20260102T030405.006Z-7.tfstate
route	- *	/-/none	/-/versions	/-/healthy/x	/-/changes/a
base64	refused	Z	Zg	Zg=	=	==	====	Z===	Zh==	Zm9=	Zm8=Zm8=	Zm 9v	 Zg==	Zg==%0a	-_-_	Zg=a	Zm9v=	Zm9vYg=%80
base64	foobar	Zm9vYmFy
base64	foob	Zm9vYg==
END
}

# units_pass COMMAND...: whether what units_source makes, run by it, does.
units_pass() {
	local part want line value said bad=0
	while IFS=$'\t' read -r part want line; do
		IFS=$'\t' read -r -a line <<<"$line"
		for value in "${line[@]}"; do
			value=${value/#<>/}
			[ "$part" = route ] || { value=${value//\\/\\\\} &&
				value=${value//%/\\x} && value=${value//'~'/'\r\n'}; }
			[ "$part" != value ] || value="{\"a\":[0,$value,{}]}"
			said=$(printf '%b' "$value" | "$@" "${part/value/json}")
			# shellcheck disable=SC2053 # a pattern
			[[ $said == $want ]] ||
				{ echo "$part $value: not $want but $said" && bad=$((bad + 1)); }
		done
	done < <(units_table)
	[ "$bad" = 0 ] || fail "$bad of the table"
}

test_source_the_pure_parts_pass_their_tables() {
	need "${CC:-cc}"
	units_source >units.c
	"${CC:-cc}" -std=gnu11 -w -g -O1 -pthread -fsanitize=address,undefined \
		-fno-sanitize-recover=undefined -o units units.c
	units_pass ./units
}

# ---- fuzzing ---------------------------------------------------------------
#
# ./test.sh fuzz SECONDS: each harness for that long, with limits so small
# that they are reached. PURE asks one of the pure parts, by the first byte.
# WIRE sends its input, in pieces as long as the first byte says, to a whole
# server in a thread: what comes back must be whole answers, and an end.

# fuzz [SECONDS]: builds each harness, runs it that long, and says how often
# it was called. 1 if one found something; what crashed it is then kept.
fuzz() {
	local name rest status=0
	sed 's/^\(#define HEAD_MAX\) .*/\1 1024/; s/^\(#define TARGET_MAX\) .*/\1 256/
		s/^\(#define FIELDS_MAX\) .*/\1 8/; s/^\(#define CHUNK_LINE_MAX\) .*/\1 64/
		s/^\(#define LOCK_INFO_MAX\) .*/\1 256/; s/^\(#define JSON_DEPTH\) .*/\1 12/' \
		"$here/statesrv.c" >near.c
	pure_source near.c >fuzz.c
	cat >>fuzz.c <<'END'
#ifdef PURE
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static char out[16384];
	size_t part = n > 0 ? *data % (sizeof(parts) / sizeof(*parts)) : 0;
	char *copy = exact(data + 1, n > 0 ? n - 1 : 0);

	parts[part].say(copy, n > 0 ? n - 1 : 0, out);
	free(copy);
	return 0;
}
#else
static void *
serve(void *nothing)
{
	char *argv[] = { "statesrv", "-d", "states", "-k", "2", "-m", "1",
	    "-l", "unix:socket", NULL };

	(void)nothing;
	exit(statesrv_main(9, argv));
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static const char last[] = "GET /-/healthy HTTP/1.0\r\n\r\n";
	static char answers[1 << 20], *s, *end, *length;
	static unsigned long runs;
	struct sockaddr_un to = { .sun_family = AF_UNIX, .sun_path = "socket" };
	struct pollfd p = { .events = POLLIN };
	int patience = 20;		/* milliseconds */
	size_t i, len, got = 0;
	ssize_t more = 1;
	pthread_t t;

	if (runs == 0)
		(void)pthread_create(&t, NULL, serve, NULL);
	if (runs++ % 1000 == 0)
		(void)!system("rm -rf states/* states/.history/*");
	p.fd = socket(AF_UNIX, SOCK_STREAM, 0);
	while (connect(p.fd, (struct sockaddr *)&to, sizeof(to)) == -1)
		(void)usleep(1000);
	for (i = 1; i < n; i += len) {
		len = *data == 0 || *data > n - i ? n - i : *data;
		(void)send(p.fd, data + i, len, MSG_NOSIGNAL);
	}
	(void)send(p.fd, last, sizeof(last) - 1, MSG_NOSIGNAL);
	while (more > 0)
		if (poll(&p, 1, patience) == 1) {
			more = recv(p.fd, answers + got,
			    sizeof(answers) - 1 - got, 0);
			got += more > 0 ? (size_t)more : 0;
		} else {		/* it waits for more: that was all */
			assert(patience < 60000 || !"an answer without end");
			(void)shutdown(p.fd, SHUT_WR);
			patience = 60000;
		}
	/* Each answer says where the next begins, but for HEAD's. */
	answers[got] = '\0';
	for (s = answers; s < answers + got && got < sizeof(answers) - 1; s = end) {
		end = strstr(s, "\r\n\r\n");
		assert(strncmp(s, "HTTP/1.", 7) == 0 && end != NULL);
		length = strstr(s, "Content-Length: ");
		end += 4;
		if (*end != '\0' && strncmp(end, "HTTP/1.", 7) != 0 && length != NULL)
			end += strtoul(length + 16, NULL, 10);
		assert(end <= answers + got);
	}
	return close(p.fd);
}
#endif
END
	mkdir seeds
	requests | while read -r name rest; do
		{ printf '\1' && cat "requests/$name"; } >"seeds/$name"
	done
	printf '\0{"serial":1,"ID":"\\u00e9","lineage":"x","a":[1.5e-3,true,null]}' >seeds/json
	printf '\3/-/versions/a%%2fb/20260102T030405.006Z-7' >seeds/url
	for name in 'LOCK /a {"ID":"i"}' 'POST /a?ID=i {"version":4}' 'UNLOCK /a {"ID":"i"}' \
		'GET /-/versions/a' 'GET /?q=A' 'DELETE /a' 'GET /-/log/a' 'GET /-/metrics'; do
		echo "$name"
	done | { printf '\0' && request; } >seeds/apply
	for name in PURE WIRE; do
		mkdir "$name"
		clang -std=gnu11 -w -g -O1 -pthread -D$name -DSLOTS_MAX=16 -DTHREADS_MAX=4 \
			-DSMALL=32 -DRESERVE=0 -DNO_SANDBOX -fsanitize=fuzzer,address,undefined \
			-fno-sanitize-recover=undefined -fno-sanitize=pointer-overflow \
			-o $name.fuzz fuzz.c || return
		./$name.fuzz -max_total_time="${1-60}" -max_len=4096 -len_control=0 -timeout=90 \
			-close_fd_mask=3 -print_final_stats=1 -artifact_prefix=/tmp/statesrv-$name- \
			$name seeds >$name.log 2>&1 || { status=1 && tail -n 40 $name.log; }
		echo "$name: called $(sed -n 's/.*executed_units: *//p' $name.log) times"
	done
	return $status
}

# What longer runs have found is not found again by a short one.
test_source_a_short_fuzzing_finds_nothing() {
	need clang
	fuzz 5
}
# ---- files, URLs, answers, promises: by curl -----------------------------
#
# "A common bug" marks a fault that other servers of this kind have.

# body_md5 FILE: its Content-MD5, base64 of the sixteen bytes.
body_md5() {
	# shellcheck disable=SC2059
	printf "$(md5sum <"$1" | cut -c 1-32 | sed 's/../\\x&/g')" | base64
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

# every ROW WORD...: the row once for each word, which stands where @@ is.
every() {
	local row=$1 word
	shift
	for word; do
		rows <<<"${row//@@/"$word"}"
	done
}

# lines_match FILE PREFIX: its lines match those on stdin, one each, in order.
lines_match() {
	local n=0 pattern
	while IFS= read -r pattern; do
		n=$((n + 1))
		sed -n "${n}p" "$1" >line
		has line "$2$pattern"
	done
	want "lines of $1" "$n" "$(wc -l <"$1")"
}

# events NAME: what its log tells happened, in one line.
events() {
	sed -n 's/.*"event":"\([a-z-]*\)".*/\1/p' "states/$1.log" | xargs
}

# versions NAME: the files of its history, oldest first.
versions() {
	find "states/.history/$1" -maxdepth 1 -name '*.tfstate' 2>/dev/null | sort
}

# kept NAME SERIALS: these are the serials in its history, oldest first.
kept() {
	[ "$(versions "$1" | sed 's/.*-\(.*\)\.tfstate/\1/' | xargs)" = "$2" ]
}

# refuses STATUS PATTERN OPTION...: does not start, exits so, and says that.
refuses() {
	local status=$1 pattern=$2 got=0
	shift 2
	timeout "$PATIENCE" "$STATESRV" "$@" >out 2>err </dev/null || got=$?
	want "statesrv $*: exit" "$status" "$got"
	has err "$pattern"
	want "statesrv $*: on stdout" "" "$(cat out)"
}

# The demo's dialect, GitLab's, Terraform's own, and what lies between; each
# takes the lock, is met by it, writes under it, releases it.
test_every_dialect_works() {
	local n=0 lock lurl write surl unlock uurl file
	local p=/api/v4/projects/grp%2Fsub%2Fproj/terraform/state
	serve
	while read -r lock lurl write surl unlock uurl file <&3; do
		n=$((n + 1))
		rows <<-EOF
			404 - GET $surl -
			200 - $lock $lurl info:run-$n	!.
			423 - $lock $lurl info:other	"run-$n"
			200 - GET ${surl%.tfstate}/lock -	"run-$n"
			423 - $write $surl state:$n	"run-$n"
			200 - $write $surl?ID=run-$n state:$n	!.
			409 - $unlock $uurl info:other	"run-$n"
			200 - $unlock $uurl info:run-$n	!.
			404 - GET ${surl%.tfstate}/lock -
			200 - GET $surl -	"serial": $n,
		EOF
		holds "states/$file.tfstate" "$(state "$n")"
	done 3<<-EOF
		LOCK /a POST /a UNLOCK /a a
		PUT /terraform_lock/c POST /terraform_state/c DELETE /terraform_lock/c c
		POST $p/x/lock POST $p/x DELETE $p/x/lock api/v4/projects/grp/sub/proj/terraform/state/x
		PUT /e/lock PUT /e DELETE /e/lock e
		LOCK /f/lock POST /f UNLOCK /f/lock f
		LOCK /j%2Fk POST /j%2fk UNLOCK /j%2Fk j/k
		LOCK /l.tfstate POST /l.tfstate UNLOCK /l.tfstate l
		POST /n%2flock POST /n DELETE /n%2Flock n
		LOCK /terraform_state/g/h PUT /terraform_state/g/h UNLOCK /terraform_lock/g/h g/h
	EOF
	# and all of them mean one state, with one lock
	rows <<<'200 - PUT /terraform_lock/g/h info:one'
	for surl in /g/h /g%2Fh /g/h.tfstate /%67/h /terraform_state/g/h '/g/h?'; do
		rows <<<"200 - GET $surl -	\"serial\": $n,"$'\n'"423 - LOCK $surl info:two	\"one\""
	done
}

# With ?env=prod and ?env=dev two environments would be one state: any query
# key but ID is refused, but for an UNLOCK of a run from before an upgrade.
test_a_query_other_than_the_id_is_refused() {
	serve
	every '200 - @@' 'POST /demo state:1' 'LOCK /demo info:me'
	every $'400 - @@\tpath' 'GET /demo?env=prod -' 'LOCK /demo?env=prod info:me' \
		'PUT /demo/lock?env=prod info:me' 'DELETE /demo?env=prod&ID=me -'
	rows <<<'400 - HEAD /demo?env=prod -'
	rows -H 'Transfer-Encoding: chunked' -d '' <<<$'400 - DELETE /demo?env=prod -\tpath'
	every $'400 - GET @@?x=1 -\tpath' /demo/lock /terraform_state/demo /terraform_lock/demo
	every '400 - POST /demo?@@ state:2' x id=me XID=me x=ID=me ID%3Dme 'ID=me&x=1' 'x=1&ID=me'
	rows <<-'EOF'
		200 - GET /demo -	"serial": 1,
		200 - POST /demo?ID=me state:1
		200 - UNLOCK /demo?env=prod&project=shop info:me
		404 - GET /demo/lock -
	EOF
	every '200 - GET @@?anything=goes -' / /-/versions/demo /-/healthy
}

# An ID is opaque text: JSON's and the query's meet after decoding, only then.
test_odd_ids_match_only_themselves() {
	local id query wrong
	serve
	while read -r id query wrong <&3; do
		rows <<-EOF
			200 - LOCK /demo {"Who":"ID","ID":"$id"}
			423 - POST /demo?ID=$wrong state:2
			200 - POST /demo?ID=$query state:1
			200 - UNLOCK /demo {"ID":"$id"}
		EOF
	done 3<<-'EOF'
		a\u0020b a+b a%2Bb
		a+b a%2Bb a+b
		a&b=c;d a%26b%3Dc%3Bd a
		%41 %2541 %41
		\"q\" %22q%22 q
		e:@!$'()*,/? e:@!$'()*,/? e
		caf\u00e9 caf%c3%a9 caf%E9
		\ud800 %EF%BF%BD ?
		\ud83d\ude00 %F0%9F%98%80 %F0%9F%98%81
	EOF
	# in part, twice, or with a bad escape
	rows <<<'200 - LOCK /demo info:me'
	every '4(00|23) - POST /demo?ID@@ state:2' '' = =m =ME =mee =%20me =me%00 =me%4 =me% \
		'=me&ID=you' '=you&ID=me' '=me&ID=me'
	rows <<<$'200 - GET /demo -\t"serial": 1,'
}

# Promise 6, common bugs: every repeat of a lost request says 200; a LOCK that
# fails leaves the holder's as it was; the lock is kept as it was sent.
test_repeats_do_no_harm() {
	serve
	printf '\r\n { "Who" : "a\\\\b@c", "x":{"ID":"no"},\n%s"ID"\t: "w\\u00e9" } \n' \
		'"y":[1.10,"ID"], ' >mine
	rows <<-'EOF'
		200 - LOCK /demo @mine	!.
		200 - LOCK /demo @mine	!.
		423 - LOCK /demo info:yours	a..b@c
		200 - LOCK /demo @mine	!.
		200 - POST /demo?ID=w%C3%A9 state:4	!.
		200 - POST /demo?ID=w%C3%A9 state:4	!.
		423 - POST /demo?ID=yours state:5	a..b@c
	EOF
	has head '[Cc]ontent-[Tt]ype: application/json'
	cmp mine answer
	cmp mine states/demo.lock
	rows <<-'EOF'
		200 - UNLOCK /demo @mine	!.
		200 - UNLOCK /demo @mine	!.
		200 - UNLOCK /never info:mine
		200 - GET /demo -	"serial": 4,
	EOF
	want "files that an UNLOCK made" "" "$(find states -name 'never.[tl]*[ek]')"
}

# Promise 3, and common bugs: of 200 clients that LOCK at once, one is told
# 200; the others get the winner's info, whole, and so does who only looks.
test_of_200_simultaneous_locks_one_wins() {
	local i won long
	long=$(head -c 50000 /dev/zero | tr '\0' w)
	serve
	for i in $(seq 200); do
		info "run-$i" "$long" >"body.$i"
		printf '%s\n' "url=$URL/t/red" request=LOCK "output=got.$i" silent \
			"data-binary=@body.$i" "write-out=\"%{http_code} $i\\n\"" next
		printf '%s\n' "url=$URL/t/red/lock" "output=got.x$i" silent \
			"write-out=\"look %{http_code} x$i\\n\"" next
	done | sed '$d' >all
	curl -s -Z --parallel-immediate --parallel-max 300 -K all >statuses
	want winners 1 "$(grep -c '^200 ' statuses)"
	want losers 199 "$(grep -c -E '^(423|503) ' statuses)"
	want lookers 200 "$(grep -c -E '^look (200|404) ' statuses)"
	won=$(sed -n 's/^200 //p' statuses)
	sed -n 's/^423 /got./p; s/^look 200 /got./p' statuses | xargs -n 1 cmp "body.$won"
	rows <<<'423 - LOCK /t/red info:late'
	cmp "body.$won" states/t/red.lock
	cmp "body.$won" answer
}

# What LOCK takes: a JSON object with a string ID of 1 to 256 bytes, once and
# without a NUL, in at most 64 KiB. Anything else is 400 and locks nothing.
test_a_lock_needs_an_id() {
	local x256
	x256=$(printf 'x%.0s' {1..256})
	serve
	printf '{"ID":"a","Info":"%*s"}' 65516 '' >big
	printf ' ' | cat big - >bigger
	every $'400 - LOCK /demo @@\tID' '{}' '{"ID":""}' '{"ID":5}' '{"Info":{"ID":"a"}}'
	every '400 - LOCK /demo @@' x '{"ID":"a"' '{"ID":"a"}x' '[{"ID":"a"}]' null \
		'{"ID":["a"]}' '{"ID":"a","ID":"b"}' '{"ID":"a","id":"a"}' \
		'{"ID":"a\u0000b"}' - @/dev/null "info:${x256}x" @bigger
	rows -H 'Transfer-Encoding: chunked' <<<'400 - LOCK /demo @bigger'
	rows <<-EOF
		404 - GET /demo/lock -
		200 - LOCK /demo @big
		423 - LOCK /demo info:b	"ID":"a"
		200 - UNLOCK /demo @big
		200 - LOCK /demo info:$x256
		200 - POST /demo?ID=$x256 state:1
		200 - UNLOCK /demo {"id":"$x256"}
	EOF
}

# A LOCK that is repeated leaves its lock as it was: no younger,
# and for no other operation, by which a plan user could end an apply.
test_a_lock_taken_again_stays_as_it_was() {
	local old
	install -m 600 <(printf 'ann s3cret write\npl pl-s3cret plan\n') users
	serve -u users
	expect 200 LOCK /a "$(info A)" -u ann:s3cret
	touch -d '2 hours ago' states/a.lock
	old=$(stat -c %Y states/a.lock)
	rows <<-'END'
	403	pl:pl-s3cret	LOCK	/a	{"ID":"A","Operation":"OperationTypePlan"}
	200	ann:s3cret	LOCK	/a	{"ID":"A","Operation":"OperationTypePlan"}
	403	pl:pl-s3cret	UNLOCK	/a	info:A
	200	ann:s3cret	POST	/a?ID=A	state:1
	200	ann:s3cret	DELETE	/a?ID=A	-
	200	ann:s3cret	GET	/?q=a	-	deleted
	200	ann:s3cret	GET	/-/versions/a	-	!present
	END
	want "the lock" "$old $(info A)" "$(stat -c %Y states/a.lock) $(<states/a.lock)"
}

# Promise 6, common bugs: what releases a lock. force-unlock is an empty
# chunked body (Terraform), none at all, or just the ID (OpenTofu).
test_what_releases_a_lock() {
	local method body
	serve
	rows <<<'200 - LOCK /demo info:mine'
	every $'409 - @@\t"mine"' 'UNLOCK /demo {"ID":"min"}' 'DELETE /demo/lock {"ID":"MINE"}'
	every '400 - @@' 'UNLOCK /demo {}' 'UNLOCK /demo {"ID":""}' 'UNLOCK /demo mine' \
		'UNLOCK /demo {"ID":"mine"' 'DELETE /demo/lock []'
	rows <<<$'200 - GET /demo/lock -\t"mine"'
	for method in UNLOCK DELETE; do
		for body in info:mine '{"ID":"mine"}' - @/dev/null \
			'{"ID":"mine","Who":"","Created":"0001-01-01T00:00:00Z"}'; do
			rows <<-EOF
				200 - LOCK /demo info:mine
				200 - $method /demo/lock $body	!.
				404 - GET /demo/lock -
			EOF
		done
		rows <<<'200 - LOCK /demo info:mine'
		rows -H 'Transfer-Encoding: chunked' -d '' <<<"200 - $method /demo/lock md5"
		rows <<<'404 - GET /demo/lock -'
	done
}

# unlock_method = DELETE on the state's own URL is an UNLOCK: lock info in the
# body, the MD5 of nothing, or Go's User-Agent (OpenTofu 1.8 and 1.9).
test_delete_by_a_client_is_an_unlock() {
	serve
	rows <<-'EOF'
		200 - POST /demo state:1
		200 - LOCK /demo info:mine
		409 - DELETE /demo info:other	"mine"
		200 - DELETE /demo info:mine
		200 - LOCK /demo info:mine
		200 - DELETE /demo md5
		400 - DELETE /demo {"version":4,"serial":1}
		200 - LOCK /demo info:mine
	EOF
	rows -A Go-http-client/1.1 <<-'EOF'
		409 - DELETE /demo info:other
		200 - DELETE /demo -
		404 - GET /demo/lock -
		200 - DELETE /terraform_state/demo -
		400 - GET /demo state:9	update_method
	EOF
	rows <<<$'200 - DELETE /demo -\n404 - GET /demo -'
	events demo >told
	has told '^write lock (refused )?unlock lock force-unlock refused lock (refused )?force-unlock delete$'
}

# A .lock made by hand freezes the state. Its first line is the ID that all
# clients show, and matches an UNLOCK only; -b never breaks it.
test_a_lock_file_made_by_hand_freezes_the_state() {
	local line id got
	serve -b 1
	while IFS='|' read -r id line <&3; do
		rm -f states/demo.* states/.f
		rows <<<'200 - POST /demo state:1'
		# shellcheck disable=SC2059
		printf "$line" >states/.f
		touch -d '5 hours ago' states/.f
		ln states/.f states/demo.lock
		every $'423 - @@\t!Created' 'POST /demo state:2' 'POST /demo?ID=mine state:2' \
			'DELETE /demo -' 'LOCK /demo info:mine'
		got=$(sed 's/.*"ID": *"\(\([^"\\]*\|\\.\)*\)".*/\1/' answer | head -1)
		[[ $got =~ ^($id)$ ]] || fail "$line: the ID is $got"
		rows <<-EOF
			409 - UNLOCK /demo info:mine	!Created
			423 - LOCK /demo {"ID":"$got"}
			200 - GET /demo -	"serial": 1,
			200 - UNLOCK /demo -
			200 - POST /demo state:2
		EOF
	done 3<<-'EOF'
		frozen for the audit|frozen for the audit\n
		frozen|frozen\r\nsecond line\r\n
		gel.* bis M.*|gel\xc3\xa9 bis M\xc3\xa4rz
		made-by-hand|\nsecond line
		say .*no.* <b>&[?]now|say \\"no\\"\\\\ <b>&\tnow\nsecond line
		[?]+binary f[?]r|\xff\xfe\x01binary f\xfcr\x00x
		.+|{"ID":"torn","Who":"a@b
	EOF
	# as the README says; and who may write may release it by its ID
	echo 'frozen for the audit' >states/.f && ln states/.f states/demo.lock
	rows <<-'EOF'
		423 - POST /demo?ID=frozen%20for%20the%20audit state:3	"Info": *"frozen for the audit"
		423 - POST /demo?ID=made-by-hand state:3
		200 - UNLOCK /demo {"ID":"frozen for the audit"}
	EOF
}

# -b lets a LOCK break an old lock; the broken run can do no harm, promise 4.
# Without -b a lock ages never (a common bug); promise 1: it outlives the server.
test_b_breaks_only_old_locks() {
	serve -b 2
	rows <<<'200 - LOCK /demo info:slow'
	touch -d '90 minutes ago' states/demo.lock
	rows <<<'423 - LOCK /demo info:fresh'
	touch -d '3 hours ago' states/demo.lock
	rows <<-'EOF'
		200 - POST /demo?ID=slow state:2
		200 - LOCK /demo info:fresh
		423 - POST /demo?ID=slow state:3	"fresh"
		200 - UNLOCK /demo info:fresh
		409 - POST /demo?ID=slow state:3
		200 - GET /demo -	"serial": 2,
		200 - LOCK /demo info:slow
	EOF
	has states/demo.log '"event":"break".*"broken":\{"id":"slow","who":"test@here","operation":"OperationTypeApply","created":"2026-11-22T13:21:24.079813084Z"'
	halt
	touch -d '3000 days ago' states/demo.lock
	serve # the default is never
	rows <<<$'423 - LOCK /demo info:fresh\t"slow"\n200 - POST /demo?ID=slow state:3'
}

# Promise 4, common bugs: which write lands, by either method and dialect.
test_a_write_lands_only_under_its_own_lock() {
	serve
	every '200 - POST /t/demo@@ state:1' '' '?'
	every '409 - @@ state:2' 'POST /t/demo?ID=gone' 'PUT /t/demo?ID' \
		'POST /terraform_state/t/demo?ID='
	rows <<<'200 - LOCK /t/demo info:mine'
	every $'423 - @@ state:2\t"mine"' 'POST /t/demo' 'PUT /terraform_state/t/demo' \
		'PUT /t/demo?ID=' 'POST /t/demo?ID=other'
	rows <<-'EOF'
		200 - GET /t/demo -	"serial": 1,
		200 - POST /t/demo?ID=mine state:2
		200 - PUT /terraform_state/t/demo?ID=mine state:3
		200 - UNLOCK /t/demo info:mine
		409 - POST /t/demo?ID=mine state:4
		200 - GET /t/demo -	"serial": 3,
	EOF
}

# Promise 4: DELETE obeys the lock, deletes one state only, and that into the
# history (common bugs: it takes a folder, or a locked state).
test_delete_moves_one_state_into_the_history() {
	serve
	rows <<-'EOF'
		200 - POST /team/prod state:1
		200 - POST /team/prod/eu state:1
		404 - DELETE /team -
		200 - LOCK /team/prod info:mine
		423 - DELETE /team/prod -	"mine"
		423 - DELETE /team/prod?ID=other -	"mine"
		200 - DELETE /team/prod?ID=mine -
		404 - GET /team/prod -
		404 - DELETE /team/prod?ID=mine -
		200 - UNLOCK /team/prod info:mine
		200 - GET /team/prod/eu -
		200 - POST /team/prod state:2
		409 - DELETE /team/prod?ID=gone -
		200 - DELETE /terraform_state/team/prod -
	EOF
	kept team/prod '1 2' || fail "versions: $(versions team/prod)"
	holds "$(versions team/prod | tail -1)" "$(state 2)"
}

# Promise 5, a common bug: no byte is touched, whichever way it came.
test_what_was_sent_is_what_is_served() {
	local f v='"version":4,'
	serve
	printf '{%s"b":1.10,"a":12345678901234567890,"e":1E+400,"z":-0.0,"a":2}' "$v" >s1
	printf ' {\r\n\t"k": "\\u00e9\\/\xc3\xa9\\ud83d\\ude00",\r\n"":[ ],%s"":7 }\n\n' "$v" >s2
	printf '{"meta":{"k":"v"},"encrypted_data":"QUJD","encryption_version":"v0"}' >s3
	{ printf '{%s"x":"' "$v" && head -c 3000000 /dev/urandom | base64 -w 0 &&
		printf '"}\n\n'; } >s4
	for f in s1 s2 s3 s4; do
		expect 200 POST "/s/$f" @$f -H "Content-MD5: $(body_md5 $f)"
		expect 200 GET "/s/$f"
		cmp $f answer
		cmp $f "states/s/$f.tfstate"
		has head "^[Cc]ontent-[Ll]ength: $(stat -c %s $f)"
		expect 200 PUT "/c/$f" @$f -H 'Transfer-Encoding: chunked' \
			-H "Content-MD5: $(body_md5 $f)"
		cmp $f "states/c/$f.tfstate"
	done
}

# Content-MD5 is verified on state and lock, small and large, chunked or not.
test_content_md5_is_checked() {
	local f md5 framing
	serve
	state 2 >s2
	{ state 3 && printf '%*s' 200000 ''; } >s3
	info mine >lock
	rows <<<'200 - POST /demo state:1'
	for f in s2 s3; do
		for md5 in "$(body_md5 lock)" x "$(md5sum <$f | cut -c 1-32)" \
			"$(body_md5 $f)=" "!$(body_md5 $f | cut -c 2-)"; do
			for framing in X-None:x 'Transfer-Encoding: chunked'; do
				rows -H "$framing" -H "Content-MD5: $md5" \
					<<<"400 - POST /demo @$f"$'\tMD5'
			done
		done
	done
	rows -H "content-md5: $(body_md5 s3)" <<-'EOF'
		200 - GET /demo -	"serial": 1,
		200 - POST /demo @s3
		400 - LOCK /demo @lock	MD5
		404 - GET /demo/lock -
	EOF
	has states/demo.log "\"md5\":\"$(md5sum <s3 | cut -c 1-32)\""
	rows -H "Content-MD5: $(body_md5 lock)" <<<'200 - LOCK /demo @lock'
	rows -H "Content-MD5: $(body_md5 s3)" <<<'400 - UNLOCK /demo @lock'
}

# Promise 8, common bugs: a body that is not one JSON object is 400, and told at
# which byte. What is JSON but no state is refused: an error page; lock info. Keys
# match in any case, as Go's do; a key that is read comes once.
test_a_body_that_is_no_json_or_no_state_is_refused() {
	serve
	printf '\xef\xbb\xbf{}' >bom
	printf '{"a":"\xff"}' >latin
	printf '%*s{}x' 100000 '' >long
	rows <<-'EOF'
		200 - POST /demo state:1
		400 - POST /demo []	byte 0[^0-9]
		400 - POST /demo @bom	byte 0[^0-9]
		400 - POST /demo @latin	byte 6[^0-9]
		400 - POST /demo @long	byte 100002[^0-9]
		400 - POST /demo @/dev/null
		400 - POST /demo {"message":"401 Unauthorized"}	no state
		400 - PUT /demo info:me	lock info.*lock_address
		400 - POST /demo {"version":4,"version":4}	version
		400 - POST /demo {"version":4,"Version":"1.11.4"}	version
		400 - POST /demo {"version":4,"serial":1,"SERIAL":2}	serial
		400 - POST /demo {"version":4,"lineage":"L","lineage":"L"}	lineage
		400 - POST /demo {"encrypted_data":"a","encrypted_data":"b"}	encrypted_data
	EOF
	every '400 - POST /demo @@' '{}' '{"version":"4","serial":2}' '{"version":null}' \
		'{"version":[4]}' '{"a":{"version":4}}' '{"encrypted_data":5}'
	rows <<<$'200 - GET /demo -\t"serial": 1,'
	every '200 - POST /a @@' '{"version":4}' '{"VERSION":3}' '{"a":1,"version":4,"a":2}' \
		'{"meta":{"version":"v1"},"encrypted_data":"QUJD"}'
	want events "write$(printf ' refused%.0s' {1..18})" "$(events demo)"
	want "files left behind" "" "$(find states/.tmp -type f)"
}

# Promise 2, a common bug: 404 means that there is no such file. A GET makes
# nothing. What is put there by hand is served at once.
test_only_an_absent_file_is_404() {
	serve
	mkdir states/team
	echo 'not json' >states/team/odd.tfstate
	find states >before
	every '404 - GET @@ -' /no/such /team /no/lock /-/log/no \
		/-/versions/no/20260101T000000.000Z-1
	rows <<<$'200 - GET /team/odd -\t^not json$'
	find states | cmp - before
	state 6 >states/team/odd.tfstate
	rows <<<$'200 - GET /team/odd -\t"serial": 6,\n200 - POST /team/odd state:7'
	holds "$(versions team/odd)" "$(state 6)"
	rm states/team/odd.tfstate
	rows <<<'404 - GET /team/odd -'
}

# Promise 8: a refusal says why, in a line or the holder's JSON, and in the log. Never a redirect.
test_every_refusal_says_why() {
	local row status method
	serve
	rows <<<'200 - LOCK /held info:mine'
	while read -r row <&3; do
		rows <<<"$row"
		read -r status _ method _ <<<"$row"
		hasnt head '^[Ll]ocation:'
		until_true grep -Eq "method=($method|-) .*status=$status .*why=\"[^\"]" server.log
		[ "$status" != 423 ] || { cmp answer states/held.lock && continue; }
		want "lines of $row" 1 "$(wc -l <answer)"
		has head '^[Cc]ontent-[Tt]ype: text/plain'
	done 3<<-'EOF'
		404 - GET /none -
		404 - GET /-/nothing -
		400 - GET /.x -
		405 - DELETE / -
		501 - PATCH /none -
		409 - POST /none?ID=%0aX-Evil:%20y%1b state:1
		423 - POST /held state:1
		423 - LOCK /held {"ID":"other"}
		411 - POST /none -
		404 - DELETE /none -
	EOF
	want 'files of refusals' '' "$(find states -name 'none*')"
	# RFC 9110 13.2 and 14.5: not done as if there were no condition
	rows -H 'If-None-Match: *' <<<'404 - GET /none -'
	rows -H 'If-None-Match: *' <<<'412 - PUT /none state:1'
	rows -H 'If-Match: "x"' <<<'412 - DELETE /none -'
	rows -H 'If-Unmodified-Since: today' <<<'412 - LOCK /none info:i'
	rows -H 'Content-Range: bytes 0-1/9' <<<'400 - PUT /none state:1'
}

# Promise 7: what is replaced or deleted is in the history, the newest -k of
# it; the present one is not counted, and nobody else's files are pruned.
test_the_history_keeps_the_newest() {
	local dir=states/.history/team/prod
	serve -k 3
	every '200 - POST /team/prod state:@@' 1 2 3 4 5 6
	until_true kept team/prod '3 4 5' # pruned behind the answer
	versions team/prod >files
	hasnt <(grep -v -E '/20[0-9]{6}T[0-9]{6}\.[0-9]{3}Z-[3-5]\.tfstate$' files) .
	holds "$(head -1 files)" "$(state 3)"
	echo mine >$dir/notes
	rows <<<'200 - DELETE /team/prod -'
	until_true kept team/prod '4 5 6'
	holds $dir/notes mine # a note by hand
	halt
	serve -k 0 # fewer than before, obeyed at the next change
	rows <<<'200 - POST /team/prod state:7'
	until_true kept team/prod ''
	rows <<<'200 - DELETE /team/prod -'
	kept team/prod '' || fail "-k 0 kept $(versions team/prod)"
}

# IDs of versions sort in the order of events: after an ID from the future
# comes the next millisecond. So nothing newer is pruned before the older.
test_ids_of_versions_only_grow() {
	mkdir -p states/.history/demo
	state 0 >states/.history/demo/20991200T235959.998Z-0.tfstate # by hand
	serve -k 3
	every '200 - POST /demo state:@@' 1 2 3 4 5
	until_true kept demo '2 3 4'
	rows <<<'200 - DELETE /demo -'
	until_true kept demo '3 4 5'
	want "the newest" 20991202T000000.003Z-5.tfstate "$(basename "$(versions demo | tail -1)")"
}

# Terraform writes every 20 seconds of a long run, under one lock: those
# versions go first, but for the newest. Without a lock the oldest goes.
test_a_long_run_leaves_the_versions_from_before_it() {
	serve -k 4
	every '200 - POST /demo state:@@' 1 2 3
	rows <<<'200 - LOCK /demo info:run'
	every '200 - POST /demo?ID=run state:@@' {4..7}
	touch -d '1 hour ago' states/demo.tfstate # by its time from before the run
	every '200 - POST /demo?ID=run state:@@' {8..12}
	until_true kept demo '2 3 7 11'
	every '200 - @@' 'UNLOCK /demo info:run' 'POST /demo state:13'
	until_true kept demo '3 7 11 12'
}

# Promise 6: the same bytes once more are written, and make no version.
test_equal_bytes_make_no_version() {
	serve
	{ state 7 && printf '%*s\n\n' 200000 ''; } >one
	{ state 7 && printf '%*s \n' 200000 ''; } >two
	every '200 - POST /demo state:@@' 1 2 2 2 2
	every '200 - POST /big @@' @one @one @two @two @one
	kept demo 1 || fail "$(versions demo)"
	kept big '7 7' || fail "$(versions big)"
	want events 'write write write write write' "$(events big)"
}

# A state's page: the lock and the line that releases it, the versions, the
# way back. Never a value. `a` and `a/b` do not meet in it (a common bug).
test_the_page_of_a_state() {
	local id kind page=/-/versions/team/prod
	serve
	rows <<-'EOF'
		200 - POST /team/prod {"version":4,"serial":1,"outputs":{"p":{"value":"opensesame"}}}
		200 - POST /team/prod {"version":4,"serial":18446744073709551615}
		200 - POST /team/prod/eu state:9
		200 - LOCK /team/prod {"ID":"it's","Who":"ann@laptop","Operation":"OperationTypeApply","Info":"why not"}
		200 - POST /team/prod?ID=it's state:3
	EOF
	for kind in text/html text/plain; do
		rows -H "Accept: $kind" <<-EOF
			200 - GET $page -	ann@laptop, apply .*why not.*terraform force-unlock .*it
			200 - GET $page -	20[0-9]{6}T[0-9]{6}\.[0-9]{3}Z-1[^0-9]
			200 - GET $page -	18446744073709551615
			200 - GET $page -	^curl -f --data-binary @old.tfstate .*team/prod
			200 - GET $page -	!opensesame|OperationType|<script|(href|action)=.?/
		EOF
		has head "^[Cc]ontent-[Tt]ype: $kind"
		rows -H "Accept: $kind" <<<'404 - GET /-/versions/team -'
	done
	rows -H 'Accept: application/json' <<<"404 - GET $page/nope -"$'\n'"200 - GET $page -"
	has answer '"serial": *18446744073709551615,' # which jq would round
	json answer 'map([.serial<9,.id==null,.replaced==null,.operation])' \
		'[[true,true,true,"OperationTypeApply"],[false,false,false,null],[true,false,false,null]]'
	json answer '.[0]|[.size,.written[:2],.who,.lock.id,.lock.info]' \
		'[180,"20","ann@laptop","it'"'"'s","why not"]'
	id=$(versions team/prod | head -1 | xargs basename -s .tfstate)
	# by what was logged before it was replaced, not by a later write that looks the same
	printf '{"cut by a cra' >>states/team/prod.log
	rows <<-'EOF'
		200 - POST /team/prod?ID=it's state:4
		200 - UNLOCK /team/prod {"ID":"it's"}
		200 - LOCK /team/prod {"ID":"b","Who":"bob@ci"}
		200 - POST /team/prod?ID=b state:3
		200 - LOCK /fresh {"ID":"first"}
	EOF
	rows -H 'Accept: application/json' <<<"200 - GET $page -"
	json answer 'map([.serial,.who])[:3]' '[[3,"bob@ci"],[4,"ann@laptop"],[3,"ann@laptop"]]'
	rows -H 'Accept: application/json' <<<'200 - GET /-/versions/fresh -'
	json answer 'map([.id,.size,.lock.id])' '[[null,null,"first"]]'
	rows <<-EOF
		200 - GET $page/$id -	opensesame
		200 - GET /-/versions/team%2Fprod/$id.tfstate -	opensesame
		404 - GET /-/versions/team/prod/eu/$id -
		200 - GET /-/log/team/prod -	^\{"time"
	EOF
}

# The listing: JSON for a program, a table for a person, nothing left out.
# What cannot be told is null, or - in the table.
test_the_listing() {
	local one
	serve
	rows <<-'EOF'
		200 - POST /team/prod {"version":4,"serial":7,"lineage":"L","terraform_version":"1.11.4"}
		200 - LOCK /team/prod {"ID":"run 1","Who":"ann@laptop","Operation":"OperationTypeApply","Info":"why not","Created":"2026-11-22T13:21:24Z"}
		200 - LOCK /fresh info:run-2
		200 - POST /sealed-and-longer-than-the-title {"encrypted_data":"QUJD"}
		200 - POST /odd1 {"version":4,"serial":123456789012345678901234567890}
		200 - POST /old {"version":3,"serial":5,"lineage":"M","modules":[]}
		200 - POST /Been state:1
		200 - DELETE /Been -
	EOF
	echo 'by hand' | tee states/README >states/odd.tfstate
	echo 'frozen "here"' >states/odd.lock
	expect 200 GET / '' -H 'Accept: application/json'
	json answer 'map(.name)|sort|join(" ")' 'fresh odd odd1 old sealed-and-longer-than-the-title team/prod'
	json answer 'map(select(.serial==null)|.name)|sort|join(" ")' 'fresh odd odd1 sealed-and-longer-than-the-title'
	one='.[]|select(.name=="team/prod")'
	json answer "$one|[.serial,.lineage,.terraform_version,.size,.deleted,.modified[:2]]" \
		"[7,\"L\",\"1.11.4\",67,false,\"20\"]"
	json answer "$one|.lock|[.id,.who,.operation,.info,.created,.since[:2],.release]" \
		'["run 1","ann@laptop","OperationTypeApply","why not","2026-11-22T13:21:24Z","20","terraform force-unlock '"'run 1'"'"]'
	json answer '.[]|select(.lock)|[.name,.serial,.size,.lock.id]' '["fresh",null,null,"run-2"]
["odd",null,8,"frozen \"here\""]
["team/prod",7,67,"run 1"]'
	rows <<-'EOF'
		200 - GET / -	^team/prod +7 .*ann@laptop.*apply
		200 - GET / -	^fresh {35}- +-
		200 - GET / -	^sealed-and-longer-than-the-title {8}- +[1-9]
		200 - GET / -	^odd .*frozen since .*: frozen "here"; to end it: terraform force-unlock
		200 - GET / -	!^(Been|README|\.)|OperationType
		200 - GET /?q=PROD -	!odd
		200 - GET /?q=M%2Fp -	^team/prod
		200 - GET /?q=bEEn -	^Been .*deleted
		200 - GET /-/versions/Been -	Z-1
	EOF
	expect 200 GET /?locked '' -H 'Accept: application/json'
	json answer 'map(.lock == null)' '[false,false,false,true,true,true]'
	expect 200 GET /?q=been '' -H 'Accept: application/json'
	json answer '.[0]|[.name,.deleted,([.[]|select(.==null)]|length)]' '["Been",true,6]'
}

# The state's log tells who did what, when, under which lock, and what was
# answered. A refused LOCK is in the request log only.
test_the_states_log_tells_the_story() {
	serve
	info run-1 ann@laptop >mine
	rows <<-'EOF'
		200 - POST /t/demo state:1
		200 - LOCK /t/demo @mine
		423 - LOCK /t/demo info:run-2
		200 - POST /t/demo?ID=run-1 state:2
		423 - POST /t/demo?ID=run-2 state:3
		400 - POST /t/demo?ID=run-1 {"serial":
		200 - UNLOCK /t/demo @mine
		200 - LOCK /t/demo @mine
		200 - UNLOCK /t/demo -
		409 - POST /t/demo?ID=run-3 state:3
		200 - DELETE /t/demo -
	EOF
	json states/t/demo.log
	hasnt <(grep -v -E '"client":"127.0.0.1:[0-9]+"' states/t/demo.log) .
	lines_match states/t/demo.log '^\{"time":"20[-0-9T:.]*Z",.*' <<-EOF
		"event":"write","method":"POST","status":200.*"serial":1,"lineage":"3f7d1c7e-.*"size":180}
		"event":"lock","method":"LOCK","status":200.*"id":"run-1","who":"ann@laptop","operation":"OperationTypeApply"
		"event":"write",.*"id":"run-1".*"serial":2.*"old_serial":1,"old_lineage":"3f7d1c7e
		"event":"refused","method":"POST","status":423.*"id":"run-2".*"why":"
		"event":"refused","method":"POST","status":400.*"id":"run-1".*"why":".*byte
		"event":"unlock","method":"UNLOCK","status":200.*"id":"run-1","who":"ann@laptop"
		"event":"lock",.*"id":"run-1"
		"event":"force-unlock",.*"status":200.*"broken":\{"id":"run-1","who":"ann@laptop","operation":"OperationTypeApply","created":"2026-11-22T13:21:24.079813084Z"
		"event":"refused",.*"status":409.*"id":"run-3".*"why":"
		"event":"delete","method":"DELETE","status":200.*"old_serial":2
	EOF
}

# Whatever a client puts in its lock info, its query or its name, a log line
# stays one line of valid JSON or of logfmt, UTF-8, also where it is cut.
test_hostile_text_stays_inside_its_log_line() {
	local id e
	need iconv
	e=$(printf 'é%.0s' {1..300})
	serve
	for id in 'a\n{\"event\":\"delete\"}' 'a\" b=\"c' '\u001b[31m' '\u2028' \
		'\u009b1m' '\ud83d\ude00' "back\\\\"; do
		rows <<-EOF
			200 - LOCK /demo {"ID":"$id","Who":"$id$e","Operation":"$id","Info":"a$e"}
			423 - LOCK /demo info:other
			200 - GET / -
			200 - UNLOCK /demo -
		EOF
	done
	rows -A $'x\ty' -e 'http://"' -u $'a\nb" x=y:z' <<-EOF
		409 - POST /demo?ID=a%0ab%22%20status=200 state:1
		409 - POST /demo?ID=%ff state:1
		200 - POST /demo {"version":4,"lineage":"a$e"}
		404 - GET /a%22%20why=%22b -
		400 - GET /a%0ab -
	EOF
	until_true logged 34 . server.log
	want "lines in the request log" 34 "$(wc -l <server.log)"
	hasnt server.log '^[^st]'
	cat server.log states/demo.log | iconv -f utf-8 -t utf-8 >both
	LC_ALL=C hasnt both '[[:cntrl:]]|"event":"delete"'
	json states/demo.log
}

# One line a request, in logfmt; none for a /-/ready that says yes.
test_the_request_log_is_one_line_each() {
	team_users
	serve -u users
	rows <<-'EOF'
		200 ann:s3cret POST /team/prod state:1
		200 ann:s3cret LOCK /team/prod info:run-1
		200 ann:s3cret GET /team/prod -
		423 ann:s3cret POST /team/prod?ID=other state:2
		200 - GET /-/ready -
		401 - GET /team/prod -
		200 ann:s3cret GET / -
	EOF
	until_true logged 7 . server.log
	grep '^time=' server.log >lines
	lines_match lines '^time=20[-0-9]+T[0-9:]+\.[0-9]{3}Z client=127.0.0.1:[0-9]+ ' <<-EOF
		user=ann method=POST name=team/prod status=200 bytes=[0-9]+ ms=[0-9]+\.[0-9]+$
		user=ann method=LOCK name=team/prod status=200 bytes=[0-9]+ ms=[0-9.]+ id=run-1$
		user=ann method=GET name=team/prod status=200 bytes=180 ms=[0-9.]+$
		user=ann method=POST name=team/prod status=423 bytes=[0-9]+ ms=[0-9.]+ id=other why=".*"$
		method=GET name=team/prod status=401 bytes=[0-9]+ ms=[0-9.]+ why=".*"$
		user=ann method=GET path=/ status=200 bytes=[0-9]+ ms=[0-9.]+$
	EOF
}

# Promise 9, a common bug: neither a state nor a credential in any log; -v
# shows heads and bodies, which it says at start, and no credential either.
test_no_secret_reaches_a_log() {
	local option
	team_users
	state 1 | sed 's/{}/{"p":{"value":"opensesame"}}/' >sent
	for option in -k9 -v; do
		serve $option -u users
		cp server.err first
		rows <<-'EOF'
			200 ann:s3cret POST /demo @sent
			400 ann:s3cret POST /demo {"x":"opensesame"
			400 ann:s3cret LOCK /demo {"opensesame":1}
			403 bob:b0b POST /demo @sent
			401 ann:wrong-guess GET /demo -
			200 ann:s3cret GET /-/log/demo -
		EOF
		rows -H 'authorization:Bearer s3cret' <<<'200 - GET /demo -'
		rows -H 'Authorization: Weird s3cret s3cret' \
			-H 'Proxy-Authorization: Basic s3cret' <<<'401 - GET /demo -'
		ask GET /demo '' --request-target "http://ann:s3cret@127.0.0.1/demo"
		halt
		cat server.log server.err states/*.log >logs
		hasnt logs "s3cret|b0b|guess|sha256|$(printf ann:s3cret | base64)"
		[ $option = -v ] || hasnt logs 'opensesame|[Bb]earer|[Bb]asic'
	done
	grumbles
	[ -s first ] || fail "-v did not say what it will show"
	for option in 'POST /demo HTTP/1.1' opensesame 'HTTP/1.1 200' '[Aa]uthorization:' \
		'^< .*"event":"write"'; do
		has server.err "$option"
	done
}

# ---- users -----------------------------------------------------------------

# team_users: the users file that the tests on rights share.
team_users() {
	cat >users <<-EOF
		# who       secret   right   patterns

		ann s3cret write
		bob sha256:$(printf b0b | sha256sum | cut -c 1-64)  read team/*
		pia	pl4n	plan	team/* solo
		eve sha256:$(printf Eve | sha256sum | cut -c 1-64 | tr a-f A-F) write eve-*-x
		two tw0 read
		two tw0 write t?am/*
		two new plan solo
		max m4x write # all, whatever
	EOF
	chmod 600 users
}

# Each right and pattern, by every method and dialect. The 403 says why.
test_rights_and_patterns() {
	team_users
	serve -u users
	every '200 ann:s3cret POST /@@ state:1' team/prod other/x solo
	every '200 bob:b0b GET @@ -' /team/prod /team%2Fprod /terraform_state/team/prod.tfstate \
		/-/versions/team/prod /-/log/team/prod
	every '404 bob:b0b GET @@ -' /team/none /terraform_lock/team/prod
	every $'403 bob:b0b GET @@ -\tbob.* name ' /other/x /%6fther%2fx.tfstate \
		/terraform_state/other/x /other/x/lock /-/versions/other/x /-/log/other/x \
		/teams/x /my/team/prod
	every $'403 bob:b0b @@\tbob.*team/prod.*read' 'POST /team/prod state:2' \
		'PUT /terraform_state/team/prod state:2' 'LOCK /team/prod info:mine' \
		'POST /team/prod/lock info:mine' 'UNLOCK /team/prod info:mine' \
		'UNLOCK /team/prod -' 'DELETE /team/prod -' 'DELETE /team/prod/lock -'
	rows <<-'EOF'
		400 bob:b0b GET /team/%2e%2e%2fother/x -
		403 bob:b0b HEAD /other/x -
		403 pia:pl4n POST /team/prod state:2	pia.*POST.*team/prod.*plan
		403 pia:pl4n LOCK /solo2 {"ID":"mine"}
		200 eve:Eve POST /eve-a/b-x state:1
		200 eve:Eve DELETE /eve-a/b-x -
		403 eve:Eve POST /eve-1-xy state:1
		200 two:tw0 POST /team/prod state:1
		200 two:tw0 GET /other/x -
		403 two:tw0 POST /other/x state:2
		200 two:new LOCK /solo {"ID":"x"}
		403 two:new GET /other/x -
		200 ann:s3cret UNLOCK /solo -
		200 ann:s3cret DELETE /solo -
	EOF
	every '401 @@ GET /team/prod -' bob:s3cret BOB:b0b ann: :s3cret
}

# A plan user takes and releases locks whose Operation does not write. He is
# told before his apply changes the world, and cannot end another's apply.
test_a_plan_user_locks_for_a_plan_only() {
	local op
	team_users
	serve -b 1 -u users
	for op in '' OperationTypePlan OperationTypeInvalid 'migration source state'; do
		op="{\"ID\":\"p\",\"Operation\":\"$op\"}"
		every '@@' "200 pia:pl4n LOCK /solo $op" "200 pia:pl4n UNLOCK /solo $op" \
			"200 pia:pl4n PUT /terraform_lock/solo $op" \
			"403 pia:pl4n POST /solo?ID=p state:1" \
			"403 pia:pl4n UNLOCK /solo -" "403 pia:pl4n DELETE /solo md5" \
			'409 pia:pl4n UNLOCK /solo {"ID":"other"}' \
			'200 pia:pl4n DELETE /terraform_lock/solo {"ID":"p"}'
	done
	every $'403 pia:pl4n LOCK /solo {"ID":"p","Operation":"@@"}\tplan' state-mv taint \
		OperationTypeApply OperationTypeRefresh 'migration destination state' x
	rows <<-'EOF'
		404 ann:s3cret GET /solo/lock -
		200 ann:s3cret LOCK /solo info:run
		403 pia:pl4n UNLOCK /solo info:run
		403 pia:pl4n UNLOCK /solo {"ID":"run"}
		403 pia:pl4n DELETE /solo/lock {"ID":"run","Operation":"OperationTypePlan"}
		423 pia:pl4n LOCK /solo {"ID":"p"}	"run"
	EOF
	touch -d '9 hours ago' states/solo.lock # nor does he break one under -b
	rows <<<$'423 pia:pl4n LOCK /solo {"ID":"p"}\t"run"\n200 ann:s3cret LOCK /solo info:new'
	echo frozen >states/solo.lock
	rows <<<$'403|409 pia:pl4n UNLOCK /solo {"ID":"frozen"}\n423 ann:s3cret POST /solo state:1\t"frozen"'
}

# Basic or Bearer, in any case and once; all else is 401 with the challenge.
test_ways_to_say_who_one_is() {
	local how ann
	ann=$(printf ann:s3cret | base64)
	team_users
	echo 'col a:b:c write' >>users
	serve -u users
	for how in "BASIC $ann" "Basic $(printf col:a:b:c | base64)" 'Bearer s3cret' \
		'bearer b0b'; do
		rows -H "Authorization: $how" <<<'200 - GET / -'
	done
	for how in "Basic ${ann%=}!" "Basic $(printf 'ann:s3cret\0' | base64)" \
		"Basic $(printf 'ann\0:s3cret' | base64)" Basic Bearer 'Bearer s3cret ann' \
		ann:s3cret "Bearer $(printf b0b | sha256sum | cut -c 1-64)"; do
		rows -H "Authorization: $how" <<<'401 - GET / -'
		has head '^WWW-Authenticate: Basic realm='
	done
	rows -H 'Authorization: Bearer s3cret' -H 'Authorization: Bearer wrong' \
		<<<'400|401 - GET / -'
}

# Common bugs: 401 and 403 come before anything is looked up: there or not,
# the answer is the same. The listing shows what the user may read.
test_existence_does_not_leak() {
	local url name who
	team_users
	serve -u users
	every '200 ann:s3cret @@' 'POST /other/here state:1' 'LOCK /other/here info:holder-id' \
		'POST /other/been state:1' 'DELETE /other/been -' 'POST /team/prod state:1'
	for who in X: Authorization:\ Bearer\ b0b; do
		for url in {GET,HEAD,POST,LOCK,UNLOCK,DELETE}\ {,/terraform_lock}/other/ \
			GET\ /-/{versions,log}/other/; do
			for name in here gone; do
				rows -H "$who" <<<"40[13] - $url$name -"
				sed "/^Date/d; s/$name/NAME/g" head answer >$name
			done
			cmp here gone
		done
	done
	want "traces of strangers" "" "$(find states -name 'gone*')"
	every '401 - GET @@ -' / /-/metrics /-/nothing /nothing /x/lock
	every '200 - GET @@ -' /-/healthy /-/ready
	for who in text/plain application/json text/html; do
		rows -H "Accept: $who" <<-'EOF'
			200 bob:b0b GET / -	team/prod
			200 bob:b0b GET / -	!other|holder-id
			200 bob:b0b GET /?q=e -	!other|holder-id
			200 ann:s3cret GET /?q=e -	other/been
		EOF
	done
}

# SIGHUP reads the users again; a broken file keeps the old ones. A FIFO in its
# place is not waited for, a link that the sandbox forbids not followed.
test_sighup_reads_the_users_again() {
	grumbles
	mkdir conf etc
	team_users
	mv users conf
	ln -s ../conf/users etc
	serve -u etc/users
	sed -i 's/s3cret/ch4nged/' conf/users
	kill -HUP "$PID"
	until_true says 200 GET / '' -u ann:ch4nged
	rows <<<'401 ann:s3cret GET / -'
	want "complaints" "" "$(cat server.err)"
	printf 'ann again write\n\nbob broken\n' >conf/users
	kill -HUP "$PID"
	until_true grep -Eq '(users:|line )3' server.err
	rm conf/users && mkfifo conf/users
	kill -HUP "$PID"
	until_true grep -q 'not a file' server.err
	: >server.err
	echo 'mallory inside write' >users && chmod 600 users
	ln -sf ../users conf/users
	kill -HUP "$PID"
	if grep -q '^NoNewPrivs:.*1' "/proc/$PID/status"; then
		until_true grep -q users server.err
		rows <<<$'401 mallory:inside GET / -\n200 ann:ch4nged GET / -'
	fi
}

# Without users SIGHUP, a closed terminal, ends the server; unless ignored at start (nohup).
test_sighup_without_users_ends_the_server() {
	through 'exec env --$how-signal=HUP '"'$STATESRV'"
	export how=default
	serve
	halt HUP
	want "exit status" 0 "$STATUS"
	how=ignore
	serve
	kill -HUP "$PID"
	every '404 - GET @@ -' /x /x
}

# A users file with a mistake, a pattern that is a slip too, is refused at
# start, with its line (a common bug: open, because it could not be read).
test_a_broken_users_file_is_told_with_its_line() {
	local line
	while IFS='|' read -r line pattern <&3; do
		printf '# first\nann s3cret write\nbob %s %s\n' "$line" "$pattern" >users
		chmod 600 users
		refuses 1 '(users:|line )3' -l 127.0.0.1:0 -u users
		hasnt err 's3cret|hunter2'
		grep -q -F -- "$pattern" err || fail "$pattern is not named: $(cat err)"
	done 3<<-'EOF'
		|
		hunter2 admin|
		sha256:abc write|
		sha256:zz23456789012345678901234567890123456789012345678901234567890123 write|
		hunter2 read|/team/*
		hunter2 read|team/
		hunter2 read|team//x
		hunter2 read|team/*,prod
		hunter2 read|!team/*
		hunter2 read|#team/*
		hunter2 read|prod.tfstate
		hunter2 read|team/*.lock
		hunter2 read|.hidden
		hunter2 read|team/-x
	EOF
	printf '\xef\xbb\xbfann s3cret write\n' >users
	refuses 1 '(users:|line )1.*([Bb]yte order mark|BOM)' -l 127.0.0.1:0 -u users
	: >users
	refuses 1 users -l 127.0.0.1:0 -u users
	refuses 1 no/such/users -l 127.0.0.1:0 -u no/such/users
	grumbles # others can read it: told, and it works
	printf 'ann s3cret write * team/* *-prod a?b */*\n' >users
	chmod 604 users
	serve -u users
	has server.err 'read.* users'
	rows <<<'200 ann:s3cret GET / -'
}

# A wrong secret is answered late; meanwhile others are served. (Some of six
# wrong ones must still be waiting when a right one has been answered.)
test_a_wrong_password_delays_nobody_else() {
	local try
	team_users
	serve -u users
	for try in 1 2 3 4 5; do
		for i in 1 2 3 4 5 6; do
			curl -s -o /dev/null -u "ann:guess$i" "$URL/" &
			echo $! >>"$T/pids"
		done
		expect 200 GET / '' -u ann:s3cret
		[ "$(jobs -p | wc -l)" -lt 2 ] || break
		[ "$try" -lt 5 ] || fail "no delay, or everybody waits"
	done
	until_true grep -Eq 'client=127.0.0.1:[0-9]+ .*status=401 .*why="' server.log
}

# TF_HTTP_USERNAME and TF_HTTP_PASSWORD make a user with all rights; half of
# the pair, or a newline in one, is refused (a common bug); empty is not set.
test_credentials_from_the_environment() {
	local name pass
	export TF_HTTP_USERNAME=tf TF_HTTP_PASSWORD='p:%ss'
	serve
	every '@@' '401 - GET /demo -' '200 tf:p:%ss POST /demo state:1' \
		'200 tf:p:%ss DELETE /demo -'
	! grep -q 'p:%ss' "/proc/$PID/cmdline" || fail "secret in argv"
	while IFS='|' read -r name pass <&3; do
		export TF_HTTP_USERNAME="${name@E}" TF_HTTP_PASSWORD="${pass@E}"
		refuses 2 'TF_HTTP_(USERNAME|PASSWORD)' -l 127.0.0.1:0 -d other
		[ "${name@E}${pass@E}" = "$name$pass" ] || has err 'control character'
		hasnt err s3cret
	done 3<<-'EOF'
		tf|
		|s3cret
		a:b|s3cret
		tf|s3cret\n
		tf|\ts3cret
	EOF
	export TF_HTTP_USERNAME='' TF_HTTP_PASSWORD=''
	serve_as open -d states
	rows <<<'404 - GET /demo -'
}

# An address that is not loopback needs users, or -n, as the message says.
test_a_public_address_needs_users() {
	local addr
	for addr in 0.0.0.0:0 '[::]:0' '*:0' :0; do
		refuses 2 '-u.*-n|-n.*-u' -l 127.0.0.1:0 -l "$addr" -d states
		has err TF_HTTP_USERNAME
	done
	serve -l localhost:0 -l 127.1.2.3:0 -l unix:states/sock
	want listeners 4 "$(grep -c '^statesrv: .* on [hu]' server.log)"
	[ -S states/sock ] || fail "no unix socket"
}

# A web page cannot change anything (Origin), nor read by DNS rebinding
# (Host), on a loopback listener without users. The text says the ways out.
test_web_pages_are_kept_out() {
	local host
	serve
	rows <<<'200 - POST /demo state:1'
	for host in http://evil.example null http://localhost:8080; do
		rows -H "Origin: $host" <<-'EOF'
			403 - POST /demo state:2
			403 - PUT /demo/lock info:x
			403 - DELETE /demo -
			403 - LOCK /demo info:x
			200 - GET /demo -	"serial": 1,
			204 - OPTIONS /demo -
		EOF
		hasnt head '^[Aa]ccess-[Cc]ontrol'
	done
	rows -H 'Host: host.docker.internal:8080' <<<$'403 - GET / -\thost.docker.internal.*-u.*-n\n403 - POST /demo state:2'
	halt
	serve -n
	rows -H 'Host: host.docker.internal' <<<'200 - POST /demo state:2'
	halt
	team_users
	serve -u users # who has a password is no web page
	rows -H 'Host: states.example' <<<'404 ann:s3cret GET /none -'
	rows -H 'Origin: http://a.b' <<<'403 ann:s3cret POST /x state:1'
}

# Once it runs, the server can open nothing outside: a build whose poll (the
# loop's) and fsync (a thread's) first try what an intruder would.
test_the_running_server_can_reach_nothing_outside() {
	grumbles # the spy's report
	need "${CC:-cc}"
	cat >spy.c <<-'EOF'
		#define _GNU_SOURCE
		#include <fcntl.h>
		#include <poll.h>
		#include <stdio.h>
		#include <sys/syscall.h>
		#include <unistd.h>
		static void try(const char *who)
		{
			if (syscall(444, 0, 0, 1) < 2)
				dprintf(2, "no Landlock\n");
			dprintf(2, "%s: own %d read %d create %d exec %d link %d\n",
			    who, open("states/.guard", O_RDONLY) >= 0,
			    open("outside", O_RDONLY) >= 0 ||
			    open("/etc/passwd", O_RDONLY) >= 0,
			    open("new", O_WRONLY | O_CREAT, 0600) >= 0,
			    execl("/bin/true", "true", (char *)NULL) == 0,
			    link("outside", "states/x.tfstate") == 0);
		}
		int spy_poll(struct pollfd *p, nfds_t n, int ms)
		{
			static int done;
			if (getpid() == syscall(SYS_gettid) && !done++)
				try("loop");
			return poll(p, n, ms);
		}
		int spy_fsync(int fd)
		{
			static int done;
			if (getpid() != syscall(SYS_gettid) && !done++)
				try("thread");
			return fsync(fd);
		}
	EOF
	"${CC:-cc}" -std=c11 -Dpoll=spy_poll -Dfsync=spy_fsync -c "$here/statesrv.c"
	"${CC:-cc}" -std=c11 -pthread -o spied spy.c statesrv.o
	echo secret >outside
	STATESRV=./spied serve
	rows <<<'200 - POST /demo state:1'
	! grep -q 'no Landlock' server.err || skip 'no Landlock in this kernel'
	has server.err 'loop: own 1 read 0 create 0 exec 0 link 0'
	has server.err 'thread: own 1 read 0 create 0 exec 0 link 0'
	has "/proc/$PID/status" '^NoNewPrivs:.*1'
}

# Promise 9: files 0600, directories 0700, whatever the umask; no core dumps.
# A directory that the server makes, or finds empty, is ignored by git.
test_files_are_private_whatever_the_umask() {
	local mask
	mkdir -m 700 states # empty, and then none
	ulimit -S -c unlimited 2>/dev/null || :
	for mask in 022 000 777; do
		umask "$mask"
		serve
		umask 022
		every '200 - @@' 'POST /team/prod state:1' 'POST /team/prod state:2' \
			'LOCK /team/prod info:mine' 'DELETE /team/prod?ID=mine -' 'POST /x state:1'
		want "umask $mask: odd files" "" "$(find states -type f ! -perm 600)"
		want "umask $mask: odd directories" "" "$(find states -type d ! -perm 700)"
			holds states/.gitignore '*'
		has "/proc/$PID/limits" '^Max core file size +0 +0 '
		halt
		rm states/.gitignore
		serve
		[ ! -e states/.gitignore ] || fail "made again, though states are there"
		halt
		rm -rf states
	done
}

# A common bug: every option is looked at, a wrong one is told by its letter
# or its value, with the way out; the user's mistake exits 2, the system's 1.
test_mistakes_at_the_start_are_told() {
	local options pattern
	while IFS='|' read -r options pattern <&3; do
		# shellcheck disable=SC2086
		refuses 2 "$pattern" -l 127.0.0.1:0 -d states $options
		has err '^(usage|statesrv):'
	done 3<<-'EOF'
		--nonsense|invalid option
		-b 1h|-b.*1h
		-k -1|-k.*-1
		-m 0|-m.*0
		-l 127.0.0.1:65536|65536
		-l [::1]|::1
		-l ::1:8080|write \[::1\]:8080
		-l unix:|unix
	EOF
	refuses 2 COMMAND -d states demo
	refuses 2 'options come first' demo -d states true
	echo >file
	serve_as other -d states
	refuses 1 "127.0.0.1:$PORT.*[Aa]ddress.*in use" -d s2 -l "127.0.0.1:$PORT"
	refuses 1 file -l 127.0.0.1:0 -d file
	refuses 1 no/such -l 127.0.0.1:0 -d no/such/dir
	# a directory that belongs to somebody else
	command -v setpriv && [ "$(id -u)" = 0 ] || return 0
	chmod 711 "$work" "$work/run" .
	mkdir theirs
	through "exec setpriv --reuid=65534 --regid=65534 --clear-groups '$STATESRV'"
	refuses 1 'theirs belongs to uid 0 and this is uid 65534: chown 65534' -d theirs
	chown 65534 theirs
	chmod 500 theirs
	refuses 1 'theirs.*: Permission denied' -d theirs
}

# -h fits a screen, on stdout; -V is one line; the long forms are the same.
test_help_fits_a_screen() {
	local option
	for option in h:help V:version; do
		"$STATESRV" "-${option%:*}" >"${option#*:}" 2>>err
		"$STATESRV" "--${option#*:}" 2>>err | cmp - "${option#*:}"
	done
	holds err ''
	[[ $(cat version) =~ ^statesrv\ [0-9.]+$ ]] || fail "-V: $(cat version)"
	[ "$(wc -l <help)" -le 40 ] || fail "-h has $(wc -l <help) lines"
	hasnt help '.{81}|	'
	for option in b c d h k l m n s u v x V -help -version; do
		has help "(^| |[(])-$option"
	done
	has help default
}

test_source_a_name_that_matches_no_test_is_an_error() {
	STATUS=0
	STATESRV=$STATESRV "$here/test.sh" nosuchtest >out 2>&1 || STATUS=$?
	[ "$STATUS" != 0 ] || fail "exit 0: $(cat out)"
	has out nosuchtest
}

# /-/healthy: alive; /-/ready: able to write and sync, or the log says why not; -c asks for it.
test_health_can_be_asked() {
	grumbles
	serve
	rows <<<$'200 - GET /-/healthy -\n200 - GET /-/ready -\t^ready$'
	"$STATESRV" -c -l "127.0.0.1:$PORT" || fail "-c: exit $?"
	rm -rf states
	until_true says 503 GET /-/ready
	until_true grep -q 'path=/-/ready status=503 .*why=' server.log
	rows <<<'200 - GET /-/healthy -'
	refuses 1 "127.0.0.1:$PORT is not ready: .*removed" -c -l "127.0.0.1:$PORT"
	halt
	refuses 1 "127.0.0.1:$PORT" -c -l "127.0.0.1:$PORT"
	need "${CC:-cc}"
	echo 'int no_fsync(int f) { return *getenv("ALL") || openat(f, ".", 0) >= 0 ? errno = EINVAL, -1 : fsync(f); }' >no.c
	"${CC:-cc}" -std=c11 -Dfsync=no_fsync -c "$here/statesrv.c"	# of no directory; or no file either
	"${CC:-cc}" -include fcntl.h -include unistd.h -include errno.h -include stdlib.h -pthread -o unsynced no.c statesrv.o
	for gone in '' 404; do
		ALL=$gone STATESRV=./unsynced serve
		until_true says 503 GET /-/ready
		every '@@' "5.. - POST /s$gone state:1" "${gone:-200} - GET /s$gone -" '5.. - LOCK /new info:me'
		halt
	done
}

# A common bug: a series for each name, method or path that a client invents.
test_metrics_please_promtool_and_do_not_grow_with_what_is_asked() {
	local n i
	serve
	every '200 - @@' 'LOCK /secret-name info:x' 'GET /-/metrics -'
	for n in 1 20; do
		for i in $(seq "$n"); do
			every '@@' "200 - POST /state-$i state:1" '423 - POST /secret-name state:2' \
				"404 - GET /-/page-$i -" "501 - METHOD$i / -"
		done
		expect 200 GET /-/metrics
		sed '/^#/d; s/ .*//' answer | sort >"series.$n"
	done
	cmp series.*
	has head '^[Cc]ontent-[Tt]ype: text/plain; version=0.0.4'
	hasnt answer 'secret-name|state-|page-|METHOD[0-9]'
	has answer '^statesrv_[a-z_]*requests_total\{.*\} [0-9]'
	has answer '^statesrv_[a-z_]*_bucket\{.*le="\+Inf"\} [1-9]'
	has answer '^statesrv_[a-z_]*lock[a-z_]* 1$'
	has answer '^statesrv_states 20$'
	has answer '^statesrv_threads [0-9]'
	need promtool
	want 'what promtool says' '' "$(promtool check metrics <answer 2>&1)"
}

# Promise 8, a common bug: whatever comes gets an answer; the process serves on.
test_bad_input_never_ends_the_process() {
	local url body
	serve -k 2
	head -c 3000 /dev/urandom >noise
	{ printf '{"a":%.0s' {1..2500}; printf '{"ID":"a"%.0s' {1..900}; } >deep
	head -c 200000 /dev/zero | tr '\0' ' ' >blanks
	for url in /demo /demo/lock '/demo?ID=x' / /-/log/x; do
		for body in @noise @deep @blanks '{"ID":{}}' state:2 info:x; do
			every "[24].. - @@ $url $body" GET POST PUT DELETE LOCK UNLOCK OPTIONS
		done
	done
	want "the process" "$PID" "$(jobs -p)"
}

# -s: a lower serial or another lineage is 409; without it both land, as
# `state push -force` needs. A lineage is compared whole.
test_strict_refuses_what_goes_back() {
	local long
	long=$(printf 'L%.0s' {1..300})
	grumbles
	serve -s
	rows <<-EOF
		200 - POST /demo {"version":4,"serial":5,"lineage":"L"}
		409 - POST /demo {"version":4,"serial":4,"lineage":"L"}	serial
		409 - POST /demo {"version":4,"serial":6,"lineage":"M"}	lineage
		409 - POST /demo {"version":4,"serial":6,"lineage":"L\u0000"}
		400 - POST /demo {"version":4,"serial":9,"serial":4,"lineage":"L"}
		200 - POST /demo {"version":4,"serial":5,"lineage":"L"}
		200 - LOCK /demo info:mine
		409 - POST /demo?ID=mine {"version":4,"serial":4,"lineage":"L"}
		200 - POST /demo?ID=mine {"version":4,"serial":99999999999999999999,"lineage":"L"}
		409 - POST /demo?ID=mine {"version":4,"serial":18446744073709551616,"lineage":"L"}
		200 - POST /zero {"version":4,"serial":0}
		409 - POST /zero {"version":4,"x":1}
		200 - POST /sealed {"encrypted_data":"QQ==","meta":{}}
		200 - POST /sealed {"encrypted_data":"Qg==","meta":{}}
		400 - POST /long {"version":4,"serial":1,"lineage":"$long"}	longer
	EOF
	spy -e trace=pread64 -e inject=pread64:error=EIO -P "$PWD/states/zero.tfstate"
	rows <<<$'503 - POST /zero {"version":4}\t^cannot read'
	unspy
	halt
	serve
	rows <<<'200 - POST /demo?ID=mine {"version":4,"serial":1,"lineage":"M"}'
}
# ---- the real terraform ---------------------------------------------------
#
# Configurations of terraform_data alone, so that nothing is downloaded; a command takes some 50
# ms. A slow run makes the file `started' when it has its lock, and waits for the file `go'.

# terraform_here: terraform as a machine of its own has it; what it would try
# again after a second, it tries again at once.
terraform_here() {
	need terraform
	unset "${!TF_@}"
	: >"$T/terraformrc"
	export TF_CLI_CONFIG_FILE=$T/terraformrc CHECKPOINT_DISABLE=1 \
		TF_IN_AUTOMATION=1 TF_CLI_ARGS=-no-color TF_HTTP_RETRY_WAIT_MIN=0
}

# backend DIR LINE...: the backend block of the configuration in DIR.
backend() {
	mkdir -p "$1"
	printf '%s\n' 'terraform {' 'backend "http" {' "${@:2}" '}' '}' >"$1/backend.tf"
}

# aim DIR NAME [BASE]: the block as most people have it.
aim() {
	local at=${3:-$URL}/$2
	backend "$1" "address = \"$at\"" "lock_address = \"$at\"" "unlock_address = \"$at\""
}

# resources DIR: one resource and one output, of variable v.
resources() {
	mkdir -p "$1"
	cat >"$1/main.tf" <<-'EOF'
	variable "v" { default = "1" }
	resource "terraform_data" "a" { input = var.v }
	output "v" { value = terraform_data.a.output }
	EOF
}

# project DIR NAME [BASE]: a configuration in DIR, applied; its state is NAME.
project() {
	resources "$1"
	aim "$@"
	works "$1" init
	works "$1" apply -auto-approve
}

# waits DIR [NUMBER]: its applies wait, half done, for DIR/go, half a minute
# at most; in as many resources as NUMBER says.
waits() {
	cat >"$1/slow.tf" <<-EOF
	resource "terraform_data" "slow" {
	  count            = ${2:-1}
	  triggers_replace = terraform_data.a.output
	  provisioner "local-exec" {
	    command = "touch started \${count.index}; timeout 30 sh -c 'until [ -e go ]; do sleep 0.05; done'"
	  }
	}
	EOF
}

# tf DIR WORDS...: terraform there. Sets STATUS; what it says is in DIR.out.
# works: it must end well. fails: it must not. meets PATTERN: and must say so.
tf() {
	STATUS=0
	terraform "-chdir=$1" "${@:2}" >"$1.out" 2>&1 </dev/null || STATUS=$?
}

works() {
	tf "$@"
	[ "$STATUS" = 0 ] || fail "terraform $*: $(tail -n 20 "$1.out")"
}

fails() {
	tf "$@"
	[ "$STATUS" = 1 ] || fail "terraform $*: exit $STATUS"
}

meets() {
	fails "${@:2}"
	has "$2.out" "$1"
}

# begin DIR WORDS...: terraform beside us, with pid RUN. under_way: a slow
# one, until it waits for DIR/go. ended [RUN]: waits for its end.
begin() {
	terraform "-chdir=$1" "${@:2}" >"$1.out" 2>&1 </dev/null &
	RUN=$!
	echo "$RUN" >>"$T/pids"
}

under_way() {
	rm -f "$1/started" "$1/go"
	begin "$@"
	until_true test -e "$1/started"
}

ended() {
	STATUS=0
	wait "${1:-$RUN}" || STATUS=$?
}

# serial NAME, unlocked NAME: what lies on disk.
serial() {
	sed -n 's/^ *"serial": *\([0-9]*\).*/\1/p' "states/$1.tfstate"
}

unlocked() {
	[ ! -e "states/$1.lock" ]
}

# Each command, its exit status, and what it asks besides GETs (of which newer
# versions send more). The lock stays as it was, be it somebody else's, who stops
# what would write and not what reads. An account that may plan is told at the
# LOCK of an apply, before anything is made. Promise 5: terraform reads back what
# it wrote. -force goes back, and changes the lineage: the wire does not show it.
test_every_command_of_terraform_works_and_asks_what_it_should() {
	local status verbs commands words mark before holder=
	terraform_here
	install -m 600 <(printf 'admin secret write\nplanner secret plan\n') users
	serve -u users
	resources work
	aim work demo
	cat >work/more.tf <<<'output "more" { value = [12345678901234567890, 1.10, "a<&\u00e4\n", null] }'
	state 7 11111111-2222-4333-8444-555555555555 >work/foreign
	export TF_HTTP_USERNAME=admin TF_HTTP_PASSWORD=secret
	asked() {
		[ "$verbs" = "$(tail -n "+$((mark + 1))" server.log |
			sed -n 's/.* method=\([A-Z]*\) .*/\1/p' | grep -v GET | paste -sd ' ')" ]
	}
	while IFS='|' read -r status verbs commands; do
		case $status in
		held) holder=$(info other) && echo "$holder" >states/demo.lock ;;
		free) holder= && rm states/demo.lock ;;
		admin | planner) TF_HTTP_USERNAME=$status ;;
		esac
		while read -r words; do
			mark=$(wc -l <server.log)
			before=$(cat states/demo.tfstate 2>/dev/null) || :
			# shellcheck disable=SC2086 # the words are words
			tf work $words
			want "$words: $(cat work.out)" "$status" "$STATUS"
			until_true asked "$words"
			want "$words: the lock" "$holder" "$(cat states/demo.lock 2>/dev/null)"
			[ "$verbs" != LOCK ] || hasnt work.out '(Creating|Modifying|Destroying)\.\.\.'
			[[ $verbs$status == *POST*0 ]] || continue
			[ "$(cat states/demo.tfstate)" != "$before" ] || fail "$words: no change"
			terraform -chdir=work state pull | cmp - <(cat states/demo.tfstate; echo)
		done < <([ -z "$commands" ] || echo "${commands//; /$'\n'}")
	done <<-'EOF'
	0||init
	2|LOCK UNLOCK|plan -detailed-exitcode
	0|LOCK POST UNLOCK|apply -auto-approve
	0|LOCK UNLOCK|apply -auto-approve; plan -detailed-exitcode; refresh
	0|LOCK UNLOCK|plan -out=saved -var v=2
	0|LOCK POST UNLOCK|apply saved
	1|LOCK UNLOCK|apply saved
	0|LOCK UNLOCK|console; state mv -dry-run terraform_data.a terraform_data.b
	0||show; show saved; graph; providers; validate; workspace show
	planner
	2|LOCK UNLOCK|plan -detailed-exitcode -out=saved
	0|LOCK UNLOCK|console
	1|LOCK|apply saved; apply -auto-approve; refresh; destroy -auto-approve
	0||output -raw v; state list; state pull
	held
	1|UNLOCK|force-unlock -force other
	admin
	1|LOCK|plan; apply -auto-approve; console; taint terraform_data.a
	0||plan -lock=false; output -raw v; state list; state show terraform_data.a
	0||state pull; init -reconfigure
	1|POST|apply -auto-approve -lock=false
	free
	0|LOCK POST UNLOCK|state push errored.tfstate; apply -auto-approve -var v=3
	1|LOCK UNLOCK|state push errored.tfstate; state push foreign
	0|LOCK POST UNLOCK|state push -force errored.tfstate
	0|LOCK POST UNLOCK|state mv terraform_data.a terraform_data.b
	0|LOCK POST UNLOCK|state mv terraform_data.b terraform_data.a
	0|LOCK POST UNLOCK|taint terraform_data.a; untaint terraform_data.a
	1|LOCK UNLOCK|untaint terraform_data.a
	0|LOCK POST UNLOCK|apply -auto-approve -replace=terraform_data.a
	0|LOCK POST UNLOCK|state rm terraform_data.a; import terraform_data.a an-id
	0|POST|apply -auto-approve -lock=false
	0|UNLOCK|force-unlock -force no-such-lock
	1||workspace new other
	0|LOCK POST UNLOCK|destroy -auto-approve; state push -force foreign
	EOF
	want serial 8 "$(serial demo)"
}

# Every dialect goes through a session: apply, a second one under a lock seen on disk, one that
# meets a lock held by somebody else, and force-unlock, which sends an empty body in each.
test_every_dialect_has_a_whole_session() {
	local name at lock unlock more d demo=4cdd0c76-d78b-11e9-9bea-db9cd8374f3a
	local gitlab=api/v4/projects/42/terraform/state/prod post='lock_method = "POST"'
	local group=api/v4/projects/grp%2Fsub%2Fproj/terraform/state/prod
	local put='lock_method = "PUT"' delete='unlock_method = "DELETE"'
	terraform_here
	serve
	while IFS='|' read -r name at lock unlock more; do
		d=${name//\//.}
		resources "$d"
		backend "$d" "address = \"$URL/$at\"" "lock_address = \"$URL/$lock\"" \
			"unlock_address = \"$URL/$unlock\"" "${more//; /$'\n'}"
		works "$d" init
		works "$d" apply -auto-approve
		waits "$d"
		under_way "$d" apply -auto-approve -var v=2
		! unlocked "$name" || fail "$at: applied without a lock"
		touch "$d/go"
		ended
		want "$at: status, serial" '0 2' "$STATUS $(serial "$name")"
		unlocked "$name" || fail "$at: not unlocked"

		info "holder-$d" >"states/$name.lock"
		meets "holder-$d" "$d" apply -auto-approve -var v=3
		works "$d" force-unlock -force "holder-$d"
		unlocked "$name" || fail "$at: force-unlock did nothing"
		want "$at: serial" 2 "$(serial "$name")"
		works "$d" destroy -auto-approve -var v=2
		unlocked "$name" || fail "$at: destroy left the lock"
	done <<-EOF
	own|own|own|own|
	team/prod/net|team/prod/net|team/prod/net|team/prod/net|
	dot|dot.tfstate|dot|dot.tfstate|
	a/b|a%2Fb|a%2Fb|a%2fb|
	put|put|put|put|update_method = "PUT"
	delete|delete|delete|delete|$delete
	child|child|child/lock|child/lock|$put
	mixed|mixed|terraform_lock/mixed|mixed/lock|
	$demo|terraform_state/$demo|terraform_lock/$demo|terraform_lock/$demo|$put; $delete
	$gitlab|$gitlab|$gitlab/lock|$gitlab/lock|$post; $delete; retry_wait_min = 5
	${group//%2F//}|$group|$group/lock|$group/lock|$post; $delete
	EOF
}

# fault METHOD N HOW: a proxy, at $LINE, one request a connection. It does to
# the Nth request with METHOD what HOW says: drop, the server's answer is lost;
# 503, it is replaced; cut, half of the request reaches the server; TERM, KILL:
# nothing does, the server ends so, and starts again. It makes the file `hit'.
fault() {
	need socat
	rm -f hit ./*.seen socat.log
	cat >line <<-'EOF'
	while IFS= read -r field && [ "$field" != $'\r' ]; do
		fields+=("$field")
		case ${field,,} in
		content-length:*) length=${field#*: } ;;
		transfer-encoding:*) length=5 ;; # no chunk but the last
		esac
	done
	[ ${#fields[@]} -gt 0 ] || exit
	{
		printf '%s\n' "${fields[@]}" $'Connection: close\r' $'\r'
		length=${length%$'\r'}
		head -c "${length:-0}"
	} >$$.request
	touch $$.${fields[0]%% *}.seen
	how=
	[ "${fields[0]%% *} $(ls | grep -c "\.$2.seen$")" != "$2 $3" ] || { how=$4 && touch hit; }
	case $how in
	TERM | KILL)
		kill -$how $(tail -n 1 servers)
		while (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; do sleep 0.02; done
		"$STATESRV" -d states -l "127.0.0.1:$1" >>server.log 2>>server.err &
		echo $! | tee -a servers >>pids
		until (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; do sleep 0.02; done
		exit
		;;
	esac
	exec 3<>"/dev/tcp/127.0.0.1/$1"
	[ "$how" != cut ] || exec head -c $(($(wc -c <$$.request) / 2)) $$.request >&3
	cat $$.request >&3
	cat <&3 >$$.answer
	case $how in
	503) printf 'HTTP/1.0 503 Gone\r\nContent-Length: 0\r\n\r\n' ;;
	'') cat $$.answer ;;
	esac
	EOF
	socat -d -d TCP-LISTEN:0,bind=127.0.0.1,fork EXEC:"bash line $PORT $*" 2>socat.log &
	echo $! >>"$T/pids"
	until_true grep -q 'listening on' socat.log
	LINE=http://$(sed -n 's/.*listening on AF=2 //p' socat.log)
}

# Promise 6. terraform repeats what it got no answer to, and none of its verbs
# may mind; Connection: close at each. A lock outlives its server.
test_a_lost_answer_is_not_noticed() {
	local method nth how name
	terraform_here
	export STATESRV
	serve
	while read -r method nth how; do
		fault "$method" "$nth" "$how"
		name=$method-$nth-$how
		project "$name" "$name" "$LINE"
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
	POST 1 drop
	POST 1 503
	POST 1 cut
	POST 1 TERM
	POST 2 drop
	POST 2 503
	POST 2 cut
	POST 2 KILL
	UNLOCK 1 drop
	UNLOCK 2 503
	EOF
}

# Promises 3 and 4. Each of twelve runs adds one to a number that it reads
# from the state, by terraform_remote_state, under the lock that it waits for:
# an update that is lost is a number too low.
test_twelve_applies_at_once_lose_no_update() {
	local i run runs=()
	terraform_here
	serve -k 12
	aim w1 n
	cat >w1/main.tf <<-EOF
	data "terraform_remote_state" "before" {
	  backend = "http"
	  config  = { address = "$URL/n" }
	}
	output "n" { value = data.terraform_remote_state.before.outputs.n + 1 }
	EOF
	works w1 init
	meets 'Unable to find remote state' w1 plan
	state 0 | sed 's/"outputs": {}/"outputs": {"n": {"value": 0, "type": "number"}}/' \
		>states/n.tfstate
	for i in {2..12}; do cp -r w1 "w$i"; done
	for i in {1..12}; do
		begin "w$i" apply -auto-approve -lock-timeout=300s
		runs+=("$RUN")
	done
	for run in "${runs[@]}"; do
		ended "$run"
		want "one of twelve" 0 "$STATUS"
	done
	has states/n.tfstate '"value": 12,'
	want versions 12 "$(find states/.history/n -name '*.tfstate' | wc -l)"
	unlocked n
}

# Promise 4. The lock of a run, of a killed one too, is told to those who come
# after, and force-unlock ends it. That run writes no more, be the state free
# since or in other hands: it keeps its work in a file.
test_a_run_whose_lock_was_broken_cannot_write() {
	local since id
	terraform_here
	serve
	for since in free taken killed; do
		project "$since" "$since"
		cp -r "$since" other
		waits "$since"
		under_way "$since" apply -auto-approve -var v=lost
		[ $since != killed ] || kill -9 "$RUN"
		id=$(sed 's/.*"ID":"\([^"]*\)".*/\1/' "states/$since.lock")
		meets "ID=$id" other apply -auto-approve -var v=kept
		works other force-unlock -force "$id"
		has "states/$since.log" "\"event\": *\"force-unlock\".*$id"
		works other apply -auto-approve -var v=kept
		cp "states/$since.tfstate" kept
		[ $since != taken ] || expect 200 LOCK /taken "$(info next)"
		touch "$since/go"
		ended
		[ "$STATUS" != 0 ] || fail "$since: the apply went well"
		cmp kept "states/$since.tfstate"
		rm -r other
	done
	has free.out 'HTTP error: 409'
	has taken.out 'HTTP error: 423'
	[ -s free/errored.tfstate ] || fail 'no errored.tfstate'
	has states/taken.log '"event": *"refused"'
	want 'the lock' "$(info next)" "$(cat states/taken.lock)"
}

# Ctrl-C: terraform writes after each resource that it gives up, all under one lock, and unlocks.
# Promise 7: -k counts, and yet the state from before the run stays, for the run's own go first.
test_an_interrupted_apply_saves_unlocks_and_spares_the_history() {
	terraform_here
	serve -k 2
	project work demo
	cp states/demo.tfstate before
	waits work 8
	under_way work apply -auto-approve -var v=2
	until_true eval '[ "$(ls work/[0-7] | wc -l)" = 8 ]'
	kill -INT "$RUN"
	ended
	touch work/go
	want 'interrupted apply' 1 "$STATUS"
	unlocked demo
	grep 'method=POST' server.log | sed '1d;s/.* id=\([^ ]*\).*/\1/' >ids
	[ "$(wc -l <ids)" -ge 3 ] || fail "$(wc -l <ids) writes only"
	want 'IDs of its writes' 1 "$(sort -u ids | wc -l)"
	cmp before states/.history/demo/*-1.tfstate
}

# What is over -m is refused at its head, and terraform gets to read the number,
# though most of the body is still on its way.
test_too_large_a_state_is_refused_so_that_terraform_can_tell() {
	terraform_here
	serve -m 1
	project work demo
	{
		sed '/"outputs"/,$d; s/"serial": 1/"serial": 9/' states/demo.tfstate
		printf '"outputs": {"big": {"type": "string", "value": "'
		head -c 40000000 /dev/zero | tr '\0' x
		echo '"}}, "resources": []}'
	} >big
	meets 'HTTP error: 413' work state push ../big
	want serial 1 "$(serial demo)"
	unlocked demo
	want 'times sent' 1 "$(grep -c 'status=413' server.log)"
}

# Promise 7: a state that another user put there can be replaced, and its old
# version is kept, though the kernel lets nobody link another's file.
test_a_state_of_another_owner_is_replaced_and_kept() {
	local server=$STATESRV
	terraform_here
	need setpriv
	[ "$(id -u)" = 0 ] || skip 'not root'
	chmod 711 "$work"
	install -d -o 12345 -g 12345 states
	as() { exec setpriv --reuid=12345 --regid=12345 --clear-groups "$server" "$@"; }
	STATESRV=as serve
	state 1 >demo.tfstate
	install -m 644 demo.tfstate states
	project work demo
	want 'serial, owner, mode' '2 12345 600' "$(serial demo) $(stat -c '%u %a' states/demo.tfstate)"
	cmp demo.tfstate states/.history/demo/*-1.tfstate
	info L >x.lock
	install -m 644 x.lock states
	rows <<<'200 - LOCK /x info:L'
	install -m 600 demo.tfstate states/.history/demo/20200101T000000.000Z-7.tfstate
	rows <<<$'200 - GET /-/versions/demo -\t^20200101T000000.000Z-7 +- '
}

# ---- one command: statesrv NAME COMMAND... --------------------------------

# wrap COMMAND...: statesrv demo COMMAND... on ./states. Sets STATUS, ./out, ./err.
wrap() {
	STATUS=0
	"$STATESRV" -d states demo "$@" >out 2>err || STATUS=$?
}

# A port and a password for the run, in the environment. What the command prints
# is all there is; but a name without a state is told before the command runs.
test_the_wrapper_hands_its_command_address_and_password() {
	local said status=404 at=http://127.0.0.1:PORT/demo
	for said in "statesrv: no state demo in $(pwd -P)/states yet" ''; do
		wrap sh -c 'cp err said
			env | grep "^TF_HTTP_" | sort
			curl -sS -o body -w "%{http_code}\n" "$TF_HTTP_ADDRESS"
			curl -sS -o body -w "%{http_code}\n" \
			-u "$TF_HTTP_USERNAME:$TF_HTTP_PASSWORD" "$TF_HTTP_ADDRESS"'
		want status 0 "$STATUS"
		want 'stderr, before and after' "$said|$said" "$(cat said)|$(cat err)"
		want stdout "ADDRESS=$at LOCK_ADDRESS=$at PASSWORD=LONG UNLOCK_ADDRESS=$at \
USERNAME=SOME 401 $status" "$(sed 's/:[0-9]*\/demo$/:PORT\/demo/; s/^TF_HTTP_//
			s/^\(PASSWORD\)=.\{24,\}/\1=LONG/; s/^\(USERNAME\)=..*/\1=SOME/' out |
			paste -sd ' ')"
		grep PASSWORD out >>passwords
		state 1 >states/demo.tfstate
		status=200
	done
	want 'different passwords' 2 "$(sort -u passwords | wc -l)"
}

# The status is the command's, as a shell would tell it; stdin and stdout are the command's, too.
# A forgotten name is told: `statesrv terraform init' would run init(8).
test_the_wrapper_exits_as_its_command_did() {
	local status said words first="the state's name comes first: statesrv NAME"
	mkdir states bin
	state 1 >states/demo.tfstate
	printf '#!/bin/sh\ntouch ran\n' >bin/init
	chmod +x bin/init
	while IFS='|' read -r status said words; do
		STATUS=0
		eval "PATH=$T/bin:$PATH env --block-signal=CHLD '$STATESRV' -d states $words" \
			<<<'yes, really' >out 2>err || STATUS=$?
		[[ $STATUS =~ ^($status)$ ]] || fail "$words: status $STATUS: $(cat err)"
		[ -z "$said" ] && want "$words: stderr" '' "$(cat err)" || has err "$said"
	done <<-EOF
	7||demo sh -c 'exit 7'
	143||demo sh -c 'kill -TERM \$\$'
	137||demo sh -c 'kill -KILL \$\$'
	127|no-such-command|demo ./no-such-command
	[1-9].*|$first terraform init|terraform init
	[1-9].*|$first tofu init|tofu init
	[1-9].*|$first terragrunt init|terragrunt init
	0||demo cat
	EOF
	want stdout 'yes, really' "$(cat out)"
	[ ! -e ran ] || fail 'init ran'
}

# A signal to statesrv alone is passed on; one to the whole group, as systemd,
# CI runners and a terminal's Ctrl-C send it, is not doubled: a second one tells
# terraform to drop everything. (In the background SIGINT may be ignored.)
test_a_signal_reaches_the_wrapped_command_once() {
	local signal to
	need setsid script
	# it gives a second signal time to come, and spins: two are not taken for one
	cat >job <<-'EOF'
	for s in TERM HUP INT; do trap "echo $s >>count" $s; done
	! stty echo 2>/dev/null </dev/tty || touch terminal
	touch ready
	until [ -s count ] || [ $SECONDS -gt 20 ]; do :; done
	for i in {1..10}; do sleep 0.02; done
	touch over
	exit 5
	EOF
	for signal in TERM HUP INT; do
		for to in '' -; do
			rm -f ready count over
			setsid env --default-signal "$STATESRV" -d states demo \
				bash job >out 2>err.txt &
			PID=$!
			echo "$PID" >>"$T/pids"
			until_true test -e ready
			halt "$signal" "$to$PID"
			wait "$PID" || STATUS=$?
			want "$signal to $to$PID" "5 $signal" "$STATUS $(cat count)"
		done
	done
	rm -f ready count over
	setsid env --default-signal "$STATESRV" -d states demo bash job >out 2>err.txt &
	PID=$!
	until_true test -e ready
	kill -HUP "$PID"
	until_true test -s count
	halt TERM
	want 'HUP, and TERM at once' '5 HUP TERM' "$STATUS $(xargs <count)"
	rm -f ready count over
	{
		until_true test -e ready
		printf '\003'
		until_true test -e over
	} | SHELL=/bin/sh script -qec "exec env --default-signal=INT \
		'$STATESRV' -d states demo bash job </dev/null" /dev/null >out 2>&1 || STATUS=$?
	want 'Ctrl-C' '5 INT' "$STATUS $(cat count)"
	[ -e terminal ] || fail 'the command has no terminal'
	setsid "$STATESRV" -d states demo sh -c 'kill -STOP $$' >out 2>err.txt &
	PID=$!
	until_true eval 'grep -q "^State:.T" /proc/$(pgrep -P $PID)/status'	# as by SIGTTIN
	halt TERM
	want 'stopped, and TERM' 143 "$STATUS"
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
	mkdir -p down/states
	cd down || exit
	state 1 >states/demo.tfstate
	bash ../job </dev/null >plain 2>&1
	"$STATESRV" -d states demo bash ../job </dev/null >wrapped 2>&1
	diff plain wrapped
}

# `backend "http" {}', and nothing to set up again from run to run. The lock
# taken at a server beside, on the same directory, is seen.
test_the_wrapper_carries_a_terraform_session_beside_a_server() {
	local status words
	terraform_here
	serve
	resources .
	backend .
	expect 200 LOCK /demo "$(info beside)"
	while IFS='|' read -r status words; do
		# shellcheck disable=SC2086 # the words are words
		TF_IN_AUTOMATION='' wrap terraform $words <<<yes
		want "$words: $(cat err)" "$status" "$STATUS"
		[ "$words" != plan ] || has err 'ID=beside'
		[ "$words" != plan ] || expect 200 UNLOCK /demo "$(info beside)"
	done <<-'EOF'
	0|init
	1|plan
	0|apply
	2|plan -detailed-exitcode -var v=2
	0|apply -var v=2
	EOF
	want 'stderr, serial, mode' ' 2 600' \
		"$(cat err) $(serial demo) $(stat -c %a states/demo.tfstate)"
}

# A lock left behind is named, with the line that releases it: we run that. It
# is for a shell, whatever the lock info and the names hold.
test_the_wrapper_names_a_lock_that_is_left_behind() {
	local id="a'b; touch pwned; '\$(touch pwned)"
	terraform_here
	backend .
	mkdir "it's here"
	state 1 >"it's here/my ain't.tfstate"
	printf '{"ID":"%s","Who":"\\u001b[31m\\n\\tred"}' "$id" >lock
	"$STATESRV" -d "it's here" "my ain't" sh -c 'terraform init >out && curl -sS -f \
		-X LOCK -d @lock -u "$TF_HTTP_USERNAME:$TF_HTTP_PASSWORD" "$TF_HTTP_ADDRESS"' 2>err
	want 'lines on stderr' 2 "$(wc -l <err)"
	hasnt err "$(printf '\033')"
	PATH=$(dirname "$STATESRV"):$PATH sh -c "$(tail -n 1 err)" </dev/null >out 2>&1 ||
		fail "$(tail -n 1 err): $(cat out)"
	[ ! -e pwned ] || fail 'it ran what the ID said'
	[ ! -e "it's here/my ain't.lock" ] || fail "that line released nothing: $(cat err)"
}

# ---- what the README says -------------------------------------------------

# recipe_of NAME: the README's lines under "# recipe: NAME", in ./recipe, as they stand, but for
# the port. follow NAME [STATUS]: runs them by bash; what they print is in ./said.
recipe_of() {
	shown "# recipe: $1" >recipe
	sed -i "s|127.0.0.1:8080|127.0.0.1:$PORT|g" recipe
}

follow() {
	recipe_of "$1"
	STATUS=0
	bash ./recipe >said 2>&1 </dev/null || STATUS=$?
	want "recipe $1: $(cat said): status" "${2:-0}" "$STATUS"
}

test_source_follows_every_recipe_of_the_readme() {
	sed -n 's/^ *# recipe: //p' "$here/README" | sort >written
	[ "$(wc -l <written)" -ge 12 ] || fail 'no recipes'
	sed -n 's/^	.*\b\(follow\|recipe_of\) \([a-z][a-z-]*\).*/\2/p' "$here/test.sh" |
		sort -u | diff written -
}

# one_two_three: a state demo that went from one over two to three, by this directory's .tf.
one_two_three() {
	terraform_here
	serve
	export TF_VAR_v=one
	project . demo
	for TF_VAR_v in two three; do
		works . apply -auto-approve
	done
}

# What changed is shown, what was comes back; a secret is gone from the history, and nothing else;
# and the old name of a state stays locked, so that the old address builds nothing a second time.
test_recipes_go_back_purge_and_rename() {
	one_two_three
	follow diff 1
	want 'lines with two, with three' '6 6' "$(grep -c '"two"' said) $(grep -c '"three"' said)"
	export TF_VAR_v=two
	follow go-back
	has said 'No changes'
	expect 200 DELETE /demo
	follow undelete
	has said 'demo.*deleted'
	works . plan -detailed-exitcode

	echo two >leaked.txt
	follow purge
	has said 'states/demo.tfstate'
	echo three >leaked.txt
	follow purge
	hasnt said 'states'
	! grep -r three states || fail 'it is still there'
	has states/.history/demo/*-1.tfstate '"one"'

	follow rename
	meets 'ID=moved-to-shop' . apply -auto-approve
	aim . shop
	works . init -reconfigure
	works . plan -detailed-exitcode
}

# A freeze is told in its own words, and none goes over a run's lock. What a
# refused write left on the client goes up when the cause is gone. The lock of
# a pipeline is held over its commands, and nobody else's is taken.
test_recipes_freeze_break_save_and_hold_a_lock() {
	one_two_three
	follow freeze
	meets 'already locked: ID=frozen for the audit' . apply -auto-approve
	works . output
	works . force-unlock -force whatever
	expect 200 LOCK /demo "$(info held)"
	follow freeze 1
	want 'the lock' "$(info held)" "$(cat states/demo.lock)"

	export TF_VAR_v=four CI_PIPELINE_ID=77
	meets 'errored.tfstate' . apply -auto-approve -lock=false
	follow pipeline-lock 22
	follow break-lock
	has said '"ID":"held"'
	follow errored
	has said 'No changes'
	[ ! -e errored.tfstate ] || fail 'it is still there'

	backend .
	rm -r .terraform
	TF_VAR_v=five follow pipeline-lock
	has states/demo.tfstate '"five"'
	until_true grep -q -- 'method=POST name=demo status=200 .*id=pipeline-77' server.log
	unlocked demo
}

# In from a local file, on by terraform alone, and out again: nothing to
# change, the lineage kept, the source left, no lock left.
test_recipes_move_a_state_in_and_out() {
	terraform_here
	serve
	resources .
	printf 'terraform {\n  backend "local" {}\n}\n' >backend.tf
	works . init
	works . apply -auto-approve
	cp terraform.tfstate source
	aim in demo
	printf '#!/bin/sh\ncat in/backend.tf >"$1"\n' >editor
	chmod +x editor
	EDITOR=./editor follow move-in
	has said 'No changes'
	has states/demo.tfstate "$(grep '"lineage"' source)"
	aim . team/second
	works . init -migrate-state -force-copy
	[ -s states/demo.tfstate ] || fail 'the source is gone'
	rm -f terraform.tfstate*
	follow move-out
	has said 'No changes'
	has terraform.tfstate '"lineage"'
	want 'locks left' '' "$(find states -name '*.lock')"
}

# What the shell has after these lines lets terraform in, at the container as
# at login: docker and systemctl are functions that keep what they were told.
test_recipes_start_a_container_and_a_server_at_login() {
	local unit=home/.config/systemd/user/statesrv.service
	terraform_here
	need systemd-analyze
	docker() { echo "$*" >docker.args; }
	systemctl() { echo "$*" >>systemctl.args; }
	export HOME=$T/home XDG_RUNTIME_DIR=$T
	PORT=8080 recipe_of login
	# shellcheck source=/dev/null
	. ./recipe
	has systemctl.args '--user enable --now statesrv'
	sed -i "s|^ExecStart=[^ ]*|ExecStart=$STATESRV|" $unit
	systemd-analyze --user verify ./$unit >said 2>&1 || fail "$(cat said)"
	hasnt said 'statesrv.service'

	PORT=8080 recipe_of container
	# shellcheck source=/dev/null
	. ./recipe
	has docker.args '-e TF_HTTP_USERNAME -e TF_HTTP_PASSWORD.* statesrv$'
	serve
	expect 401 GET /demo
	project work demo
}

# Each message in the README's section "When terraform says" is one that
# terraform really says. With ?env=prod, which
# would be the same state as ?env=dev, nothing is locked or stored.
test_terraform_says_what_the_readme_says() {
	local message user address words
	terraform_here
	install -m 600 <(printf 'ci right plan\nann strong write\n') users
	serve -u users
	sed -n '/^WHEN TERRAFORM SAYS/,/^LOOKING/p' "$here/README" >section
	want 'messages' 6 "$(grep -c '^"' section)"
	resources work
	backend work
	TF_HTTP_USERNAME=ann TF_HTTP_PASSWORD=strong TF_HTTP_ADDRESS=$URL/demo works work init
	while IFS='|' read -r message user address words; do
		case $message in
		held) info held >states/demo.lock && continue ;;
		halt) halt && continue ;;
		esac
		export TF_HTTP_USERNAME=${user%:*} TF_HTTP_PASSWORD=${user#*:} \
			TF_HTTP_ADDRESS=$URL/$address TF_HTTP_UNLOCK_ADDRESS=$URL/$address \
			TF_HTTP_LOCK_ADDRESS=$URL/$address
		# shellcheck disable=SC2086 # the words are words
		meets "$message" work $words
		has section "$message"
	done <<-'EOF'
	endpoint requires auth|ann:wrong|demo|plan
	endpoint invalid auth|ci:right|demo|apply -auto-approve
	Unexpected HTTP response code|ann:strong|demo?env=prod|plan -lock=false
	Unexpected HTTP response code|ann:strong|demo?env=prod|apply -auto-approve
	Unsupported state file format|ann:strong||plan -lock=false
	held
	HTTP remote state already locked: ID=|ann:strong|demo|plan
	Failed to save state|ann:strong|demo|apply -auto-approve -lock=false
	halt
	after 3 attempt|ann:strong|demo|plan
	EOF
	until_true grep -q -- 'method=GET name=demo .*status=400 .*why=.*path' server.log
	[ ! -e states/demo.tfstate ] || fail 'it is stored'
}

# One line on stdout for each listener: where the states are, and how many.
test_the_start_line_says_where_and_how_many() {
	local n
	for n in created '1 state' '2 states'; do
		serve -l 127.0.0.1:0
		want "$n: $(cat server.log)" 2 "$(grep -c -x \
			"statesrv: $(pwd -P)/states ($n) on http://127.0.0.1:[0-9]*" server.log)"
		expect 200 PUT "/team/${n% *}" "$(state 1)"
		halt
	done
}

# make demo, on port 8080 of a network of its own, with demo.tf as it stands;
# and with tofu, here terraform by that name, where there is no terraform.
test_source_demo_runs_with_terraform_and_with_tofu() {
	local tool dir
	terraform_here
	need unshare ip make
	unshare -n true 2>/dev/null || skip 'no network of our own'
	terraform fmt -check "$here/demo.tf"
	cp "$here"/{Makefile,statesrv.c,demo.tf} .
	cp "$STATESRV" statesrv
	mkdir bin
	printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v terraform)" >tofu
	for dir in ${PATH//:/ }; do
		ln -s "$dir"/* bin 2>/dev/null || :
	done
	for tool in terraform tofu; do
		PATH=$T/bin unshare -n sh -c 'ip link set lo up && make demo' >out 2>&1 ||
			fail "$tool: $(tail out)"
		has out "[$] $tool init"
		has out 'Destroy complete! Resources: 2'
		has out "stopped with status '?0"
		rm -f bin/terraform
		install tofu bin/tofu
	done
}
# ---- the disk: order, faults, slow and broken disks, several servers --------
#
# Promises 1 to 8, proven by breaking things: system calls that fail, disks
# that are full, slow or gone, clocks that jump, servers paused or killed.

# pad SERIAL BYTES: a state of about that size.
pad() {
	printf '{"version":4,"serial":%d,"pad":"%0*d"}' "$1" "$2" 7
}

# later FILE METHOD PATH [BODY [CURL OPTION...]]: ask, in the background. Once
# there is an answer, its status is in FILE; the answer itself in FILE.d.
later() {
	local file=$1
	shift
	mkdir "$file.d"
	(cd "$file.d" && ask "$@" && echo "$STATUS" >"../$file") &
}

# says STATUS METHOD PATH [BODY [CURL OPTION...]]: for until_true.
says() {
	ask "${@:2}"
	[ "$STATUS" = "$1" ]
}

# strays: what has no business in ./states: nothing, always.
strays() {
	find states -type f ! -name '*.tfstate' ! -name '*.lock' ! -name '*.log' \
		! -path 'states/.g*' ! -path 'states/.tmp/*'
}

no_uploads_left() {
	[ -z "$(ls -A states/.tmp)" ]
}

# files DIRECTORY TEST N: for until_true: how many files there are.
files() {
	test "$(find "$1" -type f | wc -l)" "${@:2}"
}

# logged N PATTERN FILE: for until_true: that many lines.
logged() {
	[ "$(grep -c -E -- "$2" "$3")" -ge "$1" ]
}

# spy OPTION...: strace watches the server until unspy; needs the right to.
spy() {
	need strace
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
	kill "-${1-TERM}" "$SPY" 2>/dev/null || :
	wait "$SPY" 2>/dev/null || :
}

# slow CALL SECONDS [OPTION...]: each such call of the server takes that long.
slow() {
	spy -e trace="$1" -e inject="$1:delay_enter=$2s" "${@:3}"
}

# apart FLAG: the test goes on in namespaces of its own (unshare's flag), as
# root there: its mounts and processes end with it, however it ends.
apart() {
	local rc=0 flags=(--mount --pid --fork --kill-child --mount-proc "$1")
	[ "$1${APART-}" != --net1 ] || ip link set lo up
	[ -z "${APART-}" ] || return 0
	[ "$(id -u)" = 0 ] || flags+=(--map-root-user)
	unshare "${flags[@]}" true 2>/dev/null || skip "no namespaces here"
	{
		declare -f
		declare -p here PATIENCE STATESRV BUILD T
		echo "set -eu; APART=1; ${FUNCNAME[1]}; settle"
	} >apart.sh
	unshare "${flags[@]}" bash apart.sh &
	echo $! >>"$T/pids"
	wait $! || rc=$?
	exit $rc
}

# loop_disk TYPE MIB [OPTION]: ./states is a file system of its own.
loop_disk() {
	need "mkfs.$1"
	[ "$(id -u)" = 0 ] || skip "needs root"
	[ -e disk ] || { truncate -s "$2m" disk && "mkfs.$1" -q disk; }
	mkdir -p states
	mount -t "$1" -o "loop,${3-rw}" disk states || skip "no $1 on a loop device"
}

# ---- the order on disk -----------------------------------------------------

# steps: the trace in words, in the order in which the steps were finished; an
# answer counts from when it was begun. sync(x) is the sync of a directory.
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
	/ write.*(\/\.tmp\/|\.lock>)/ { what = "write" }
	/ fsync.*(\/\.tmp\/|\.lock>)/ { what = "sync" }
	/ fsync.*\/states(\/[^.>]*)?>/ {
		what = $0
		gsub(/.*\/states\/?|>.*/, "", what)
		what = "sync(" (what == "" ? "." : what) ")"
	}
	/ fsync.*\/\.history/ { what = "sync(history)" }
	/ openat.*\.lock"/ { what = /O_EXCL/ ? "create" : "look" }
	/ fcntl.*SETLK.*F_WRLCK.* = 0/ { what = "guard" }
	/ fcntl.*SETLK.*F_UNLCK/ { what = "drop" }
	/ linkat/ { what = "link" }
	/ unlinkat/ { what = "unlink" }
	/ renameat/ { what = "rename" }
	/ mkdirat/ && / = 0/ { what = "mkdir" }
	/"HTTP\/1.1 200/ { what = "200" }
	/"HTTP\/1.1 [^2]/ { what = "refusal" }
	what != "" && what != last { printf "%s%s", sep, what; sep = " " }
	what != "" { last = what }
	/"HTTP\/1.1/ { exit }' trace
}

# Promises 1, 3 and 6: the data, then its name, then the directory, and only then 200; the guard
# spans the look at the lock and the publishing, and no sync of a state. The directories above a
# new name are synced before it is there. In a line with a FILE, the first sync of it fails: what
# that made doubtful is synced before a later 200, and a lock that could not be synced stays.
test_nothing_is_answered_before_it_is_on_disk() {
	local status file method path body steps
	grumbles
	serve
	fault_files
	for path in /s /old/s; do	# their histories are there from now on
		every "200 - POST $path @@" @new @old @new
	done
	while IFS='|' read -r status file method path body steps; do
		if [ -n "$file" ]; then
			spy -e trace=fsync -e inject=fsync:error=EIO:when=1 -P "$PWD/$file"
		else
			spy -e trace=file,desc,network
		fi
		ask "$method" "$path" "$body"
		[ -n "$file" ] || until_true grep -q '"HTTP/1.1 ' trace
		unspy
		[[ $STATUS =~ ^$status$ && $(steps) =~ ^(look )?($steps)$ ]] ||
			fail "$method $path $body: $STATUS, $(steps), should be: $steps"
	done <<-'END'
	200||LOCK|/s|@mine|guard look create write sync (sync\(.\) )?drop (sync\(.\) )?200
	200||LOCK|/s|@mine|guard look write sync (rename )?(sync\(.\) )?drop (sync\(.\) )?200
	200||POST|/s?ID=L|@old|write sync (link guard look|guard look link) rename drop sync\(.\) 200
	200||POST|/s?ID=L|@old|write sync guard look rename drop sync\(.\) 200
	200||UNLOCK|/s|@mine|guard look unlink drop sync\(.\) 200
	200||UNLOCK|/s|@mine|guard look drop sync\(.\) 200
	200||DELETE|/s||(link )?guard look rename .*sync\(history\) .*sync\(.\) 200
	404||DELETE|/s||guard look drop sync\(.\) refusal
	200||POST|/a/b|@old|write sync mkdir .*sync\(.\) guard look rename drop sync\(a\) 200
	200||POST|/a/b|@new|write sync [a-z ]*guard look .*rename drop sync\(a\) 200
	200||POST|/a/c|@new|write sync .*sync\(.\) guard look rename drop sync\(a\) 200
	200||LOCK|/b/c/d|@mine|mkdir sync\(.\) sync\(b\) guard look create write sync drop sync\(b.c\) 200
	5..|states|POST|/new/a|@old|.*
	200||POST|/old/s|@old|.*sync\(.\) guard look .*rename drop sync\(old\) 200
	200||POST|/new/a|@old|.*sync\(.\) guard look rename drop sync\(new\) 200
	5..|states/s.lock|LOCK|/s|@mine|.*
	423||LOCK|/s|@stale|.*refusal
	200||LOCK|/s|@mine|guard look write sync (rename )?(sync\(.\) )?drop (sync\(.\) )?200
	END
}

# ---- faults ----------------------------------------------------------------

# A deed is a request, and the files before and after it. The columns: its name; method, URL,
# body; the state's name; state and lock before; the same after; what is answered. - is nothing.
deeds='write	POST	/s?ID=L	new	s	old mine	new mine	-
large	POST	/s	large	s	old -	large -	-
first	POST	/s	new	s	- -	new -	-
deep	POST	/d/e/s	new	d/e/s	- -	new -	-
lock	LOCK	/s	mine	s	old -	old mine	-
relock	LOCK	/s	mine	s	old mine	old mine	-
break	LOCK	/s	mine	s	old stale	old mine	-
unlock	UNLOCK	/s	mine	s	old mine	old -	-
delete	DELETE	/s	-	s	old -	- -	-
read	GET	/s	-	s	old -	old -	old
big	GET	/s	-	s	big -	big -	big
look	GET	/s/lock	-	s	old mine	old mine	mine
list	GET	/	-	s	old mine	old mine	list'

fault_files() {
	mkdir -p states/t
	state 1 | tee states/t/u.tfstate >old
	state 2 >new
	info L >mine
	info S >stale
	pad 3 90000 >large
	pad 4 90000 >big
}

# deed NAME: makes the world as it is before it.
deed() {
	DEED=$1
	read -r method path body name state0 lock0 state1 lock1 said \
		<<<"$(sed -n "s/^$1	//p" <<<"$deeds")"
	[ "$DEED" != deep ] || rm -rf states/d
	rm -f "states/$name.tfstate" "states/$name.lock"
	[ "$state0" = - ] || cp "$state0" "states/$name.tfstate"
	[ "$lock0" = - ] || cp "$lock0" "states/$name.lock"
	[ "$lock0" != stale ] || touch -d '3 hours ago' states/s.lock
}

# do_deed: sets STATUS, also where the answer is cut.
do_deed() {
	[ "$body" = - ] || set -- --data-binary "@$body"
	: >answer
	STATUS=$(curl -sS -m "$PATIENCE" -o answer -H Expect: -X "$method" "$@" \
		-w '%{http_code}' "$URL$path" 2>curl.err) || STATUS="cut after $STATUS"
}

# is STATE LOCK: are these the files of the deed's name? An empty lock, one cut short, is none.
is() {
	if [ "$1" = - ]; then
		[ ! -e "states/$name.tfstate" ] || return
	else
		cmp -s "states/$name.tfstate" "$1" || return
	fi
	if [ "$2" = - ]; then [ ! -s "states/$name.lock" ]; else cmp -s "states/$name.lock" "$2"; fi
}

is_done() {
	is "$state1" "$lock1" || return
	case $said in
	-) ;;
	list) # with less, a state or a lock would seem to be gone
		grep -q '^t/u ' answer && grep -q -E '^s .*(test@here|cannot be read)' answer
		;;
	*) cmp -s answer "$said" ;;
	esac
}

# faults: runs the table on stdin. A line: system calls, @FILE: only those on that file; their
# error, or KILL: another server starts; which of them in its thread, in strace's words; the deed;
# the status; the world then: before (the history, too), after, either, honest: after if 200, else
# before, or late: after if 200, else either. Then the same request must get 200, nothing left.
faults() {
	local call error when status world what how versions first
	while read -r call error when deed status world; do
		SITE="$call $error $when $deed"
		deed "$deed"
		versions=$(ls -R states/.history)
		what=${call%@*}
		how=error=$error
		[ "$error" != KILL ] || how=signal=KILL
		set -- -e trace="$what" -e inject="$what:$how:when=$when"
		[ "$what" = "$call" ] || set -- "$@" -P "$PWD/${call#*@}"
		spy "$@"
		do_deed
		if [ "$error" = KILL ]; then start_again; else unspy; fi
		judge "$status"
		first=$STATUS
		do_deed				# the trouble is over
		case $DEED$STATUS in
		delete404) ;;
		*200) is_done || blame "$first, then 200, but not done" ;;
		*) blame "$first, then $STATUS: $(head -c 300 answer) $(cat curl.err)" ;;
		esac
		[ "$what" = unlinkat ] || no_uploads_left || blame "$(ls states/.tmp)"
		rm -f states/.tmp/*
		until_true says 200 GET /-/ready
		echo "$SITE" >>all.sites
	done
	[ ! -e blamed ] || fail "$(cat blamed)"
}

start_again() {
	local status=$STATUS
	halt KILL 2>/dev/null || :	# or it is
	unspy KILL			# strace 6.1 may wait for a thread that is gone
	serve -k 2 -b 1
	STATUS=$status
	[ -z "$(strays)" ] || blame "left: $(strays)"
}

judge() {
	[[ $STATUS =~ ^($1)$ ]] || blame "$STATUS: $(head -c 300 answer) $(cat curl.err)"
	[[ $STATUS != 5?? ]] || grep -q '^cannot ' answer || blame "says: $(cat answer)"
	[[ $error$STATUS != @(ENOSPC|EDQUOT)5* || $STATUS = 507 ]] || blame "no room: $STATUS"
	case $world$STATUS in
	after* | *[a-z]200) is_done || blame "$STATUS, but it is not done" ;;
	before* | honest*) is "$state0" "$lock0" || blame "$STATUS, but the old is gone" ;;
	*) is "$state0" "$lock0" || is "$state1" "$lock1" || blame "$STATUS, half done" ;;
	esac
	[ "$world" != before ] || [ "$versions" = "$(ls -R states/.history)" ] || blame "a version"
}

blame() {
	echo "$SITE: $*" >>blamed
}

# Promises 1, 7 and 8: a fault that lasts gets the answer that fits it, and
# leaves the old. Without hard links the earlier version is copied.
test_a_fault_is_told_and_changes_nothing() {
	serve -k 2 -b 1
	grumbles
	fault_files
	faults <<-'END'
	fsync		EIO	1+	write	5..	before
	fsync		EDQUOT	1+	large	507	before
	fsync		EIO	1+	delete	5..	before
	fsync@states	EIO	1	write	5..	after
	fsync@states/s.lock	EIO	1	lock	5..	after
	renameat,renameat2	ENOSPC	1+	write	507	before
	renameat,renameat2	EDQUOT	1+	break	507	before
	unlinkat	EIO	1+	unlock	5..	before
	mkdirat		ENOSPC	1+	deep	507	before
	openat		EMFILE	1+	write	5..	before
	getdents64	EIO	1+	list	5..	before
	fcntl		ENOLCK	1+	write	5..	before
	linkat		EPERM	1+	write	200	after
	linkat		EMLINK	1+	write	200	after
	linkat		EXDEV	1+	write	200	after
	linkat		EOPNOTSUPP	1+	write	200	after
	END
}

# fault_sites DEED: rows for faults. Its system calls that work on ./states,
# each as the how manieth call of that name in its thread, with errors to try.
fault_sites() {
	deed "$1"
	spy -e trace=file,desc,network,futex
	do_deed
	until_true at_rest		# there is work after the answer, too
	unspy
	awk -v dir="<$PWD/states" -v deed="$1" '
	BEGIN {
		e["fsync"] = e["linkat"] = e["renameat"] = "EIO KILL"
		e["unlinkat"] = e["mkdirat"] = "EIO KILL"
		e["write"] = e["pwrite64"] = "ENOSPC EINTR KILL"
		e["openat"] = "EIO"
		e["fcntl"] = "ENOLCK"
		e["pread64"] = e["preadv2"] = e["read"] = e["sendfile"] = "EIO EINTR"
		e["newfstatat"] = e["fstat"] = e["fstatfs"] = e["getdents64"] = "EIO"
		e["accept4"] = "EMFILE"
		e["sendto"] = e["sendmsg"] = e["recvfrom"] = "EINTR"
		right = "200|5.." (deed == "break" ? "|423" : "") " "
		dead = "(cut.after.)?[02]00 either"
		world = "honest"
	}
	/resumed>|^[0-9]+ +[-+]/ { next }
	{
		call = $2
		sub(/\(.*/, "", call)
		n = ++count[$1, call]
		fits = (call == "sendfile" ? "cut.after.200|" : "") right
		if (!(call in e) || n > (call ~ /read|write|send/ ? 3 : 20) ||
		    !(index($0, dir) || /accept4|sendto|sendmsg|recvfrom/))
			next
		for (i = split(e[call], es, " "); i > 0; i--)
			if (!seen[call, n, es[i]]++)
				print call, es[i], n, deed, (es[i] == "KILL" ? dead : fits world)
	}
	/ (renameat|unlinkat|write).*\.(tfstate|lock)[">]/ { world = "late" }' trace
}

# at_rest: every thread of the server waits for something to do, or has left.
at_rest() {
	awk '{ last[$1] = $0 }
	END { for (t in last) if (last[t] !~ / (futex|p?poll)\(|exited with/) exit 1 }' trace
}

# Promises 1, 3, 6 and 8: each system call of each deed fails in turn, or the
# server is killed on entering it. There is an answer; it is 200 only if the
# thing is done. After a death there is the old or the new, or an empty lock.
test_every_failing_system_call_is_survived() {
	local names deed n
	serve -k 2 -b 1
	grumbles
	fault_files
	mapfile -t names < <(cut -f 1 <<<"$deeds")
	for deed in "${names[@]}"; do
		for n in 1 2 3; do	# the history is full, threads started
			deed "$deed"
			do_deed
			want "$deed, no fault" 200 "$STATUS"
		done
		fault_sites "$deed" >sites
		[ -s sites ] || fail "$deed: no system calls: $(cat trace)"
		[ "$BUILD" != sanitized ] || sed -i '/ KILL /d' sites
		faults <sites
	done
	[ "$(wc -l <all.sites)" -gt 100 ] || fail "few faults: $(cat all.sites)"
}

# ---- full and broken disks -------------------------------------------------

# A full disk: writes are refused while locks still work; stderr and /-/ready
# tell of it, once each way; freed space ends it.
test_a_full_disk_refuses_writes_and_keeps_the_locks() {
	local n
	grumbles
	apart --mount
	mkdir states
	mount -t tmpfs -o size=2m tmpfs states || skip "no tmpfs here"
	mkdir full
	mount -t tmpfs -o size=4k tmpfs full
	echo full >full/.full
	serve_as full -d full
	[ ! -e full/.gitignore ] || fail "an empty .gitignore"
	serve
	pad 1 100000 >big
	pad 2 100000 >big2
	for ((n = 1; n < 30; n++)); do
		ask POST "/s$n" @big
		[ "$STATUS" = 200 ] || break
	done
	[ $n -gt 10 ] || fail "full after $n writes"
	rows <<-END
	507	-	POST	/s$n	@big	no room|No space
	404	-	GET	/s$n	-
	200	-	LOCK	/s1	info:L
	507	-	POST	/s1?ID=L	@big2	no room|No space
	END
	fill_all_but 40			# of the reserve
	until_true says 503 GET /-/ready
	has answer 'room|full|No space'
	rows <<-'END'
	507	-	POST	/s1?ID=L	state:2
	200	-	UNLOCK	/s1	info:L
	200	-	LOCK	/s3	info:L
	END
	fill_all_but 0
	rows <<-'END'
	507	-	LOCK	/s1	info:L
	404	-	GET	/s1/lock	-
	200	-	UNLOCK	/s3	info:L
	404	-	GET	/s3/lock	-
	200	-	GET	/s1	-
	END
	cmp answer big
	rm states/filler.log states/s4.tfstate states/s5.tfstate
	until_true says 200 GET /-/ready
	want "told once" '1 1' \
		"$(grep -c 'nearly full' server.err) $(grep -c 'room again' server.err)"
	expect 200 POST /s1 "$(state 2)"
	mount -o "remount,nr_inodes=$(($(df --output=iused states | tail -n 1) + 2))" states
	every '@@' '507 - POST /s1 state:3' '200 - LOCK /s1 info:L'
}

# fill_all_but KIB: of the file system under ./states.
fill_all_but() {
	local free
	free=$(df --output=avail -k states | tail -1)
	head -c $(((free - $1) * 1024)) /dev/zero >>states/filler.log
	[ "$1" -gt 0 ] || ! echo >>states/filler.log || fill_all_but 0
}

# The disk breaks and the kernel makes the file system read-only: what is there
# is read, writes and locks are refused, nothing is lost.
test_a_broken_disk_is_read_and_not_written() {
	grumbles
	apart --mount
	loop_disk ext4 16 errors=remount-ro
	rmdir states/lost+found
	serve
	every '200 - @@' 'POST /s state:1' 'LOCK /s info:L'
	echo broken >"/sys/fs/ext4/$(basename "$(findmnt -n -o SOURCE states)")/trigger_fs_error"
	until_true bash -c '! touch states/probe 2>/dev/null'
	every $'5.. - @@\t^cannot .*Read-only' 'POST /s?ID=L state:2' 'LOCK /new info:M' \
		'LOCK /s info:L' 'UNLOCK /s info:L' 'DELETE /s?ID=L -'
	rows <<-'END'
	423	-	LOCK	/s	info:M
	200	-	GET	/s/lock	-	"ID":"L"
	200	-	GET	/s	-	"serial": 1
	END
	until_true says 503 GET /-/ready
	want "files" 's.lock s.log s.tfstate' "$(cd states && echo *)"
}

# Promise 7: a file server may say of what it has done that it failed (NFS). The version, then the
# only copy, stays in the history; and repeating is no harm.
test_a_deed_that_is_told_as_failed_loses_nothing() {
	grumbles
	need "${CC:-cc}"
	"${CC:-cc}" -O1 -shared -fPIC -o liar.so -x c - <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>

static int lie(const char *path, int n)
{
	return n == 0 && strcmp(path, "s.tfstate") == 0 ? errno = ETIMEDOUT, -1 : n;
}

int renameat(int from, const char *old, int to, const char *new)
{
	int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");

	return lie(new, real(from, old, to, new));
}

int unlinkat(int dir, const char *path, int flags)
{
	int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");

	return lie(path, real(dir, path, flags));
}
C
	serve
	rows <<<'200 - POST /s state:1'
	halt
	LD_PRELOAD=$PWD/liar.so ASAN_OPTIONS=verify_asan_link_order=0 serve
	rows <<<$'5.. - POST /s state:2\n200 - GET /s -\t"serial": 2\n5.. - DELETE /s -\n404 - GET /s -'
	kept s '1 2' || fail "$(versions s)"
}

# Promise 7: a state that a hand puts in the place of one that is being deleted stays.
test_a_state_put_there_meanwhile_is_not_deleted() {
	serve
	rows <<<'200 - POST /s state:1'
	slow fsync 2 -P "$PWD/states/.history/s"
	later gone DELETE /s
	until_true grep -q fsync trace
	state 2 >new
	mv new states/s.tfstate
	until_true [ -s gone ]
	unspy
	want "the DELETE" 503 "$(cat gone)"
	holds states/s.tfstate "$(state 2)"
}

# Promise 1: XFS shuts itself down when it cannot write its metadata. The fsync of a directory
# says 0 then, and the rename before it is lost. So the server asks the directory once more.
test_a_sync_that_is_only_pretended_is_not_believed() {
	grumbles
	need xfs_io
	apart --mount
	loop_disk xfs 300
	serve
	every '200 - POST /s state:@@' 1 2
	slow fsync 15 -P "$PWD/states"
	later third POST /s "$(state 3)"
	until_true grep -q '"serial": 3' states/s.tfstate
	xfs_io -x -c shutdown states
	unspy
	until_true [ -s third ]
	halt KILL
	umount states
	loop_disk xfs 300
	[[ $(cat third) = 5* ]] || fail "told $(cat third), but there is $(cat states/s.tfstate)"
	want "the state on the disk" "$(state 2)" "$(cat states/s.tfstate)"
}

# Promise 2: 404 never means "could not look". The directory is moved, and
# nobody notices; it is removed, and no state becomes "no state yet"; also on
# overlayfs, in a container, where link counts tell nothing.
test_a_directory_removed_under_the_server_is_no_404() {
	local dir change
	grumbles
	apart --mount
	mkdir -p layers plain all
	mount -t tmpfs tmpfs layers || skip "no tmpfs here"
	mkdir -p layers/low/states layers/up layers/work
	(cd layers && mount -t overlay -o lowerdir=low,upperdir=up,workdir=work overlay ../all) ||
		skip "no overlay here"
	for dir in plain all; do
		serve_as $dir -d $dir/states
		every '200 - POST @@ state:1' /team/s /s
		if [ $dir = plain ]; then
			expect 200 LOCK /s "$(info L)"
			mv plain/states elsewhere
			expect 200 GET /team/s
			every $'5.. - @@\t^cannot .*replaced' 'POST /s?ID=L state:9' \
				'UNLOCK /s info:L'
			mv elsewhere plain/states
			every '200 - @@' 'UNLOCK /s info:L' 'POST /s state:2'
		fi
		for change in 'rm -rf' mkdir; do
			$change $dir/states
			every $'5.. - GET @@ -\t^cannot' /s /team/s /other /-/log/s /-/versions/s /
			every $'5.. - @@\t^cannot' 'POST /s state:2' 'POST /new/s state:2' \
				'LOCK /s info:L' 'DELETE /s -'
			expect 200 GET /-/healthy
			until_true says 503 GET /-/ready
		done
	done
}

# A file system may begin below the directory: rename and link say EXDEV.
test_names_may_lie_on_other_file_systems() {
	local at how
	apart --mount
	pad 2 300000 >big
	pad 9 6000000 >huge		# fits there, but leaves no room for locks
	for at in team .history .tmp bind; do
		how=(-t tmpfs -o size=6m tmpfs)
		[ $at != bind ] || at=.tmp how=(--bind other)
		mkdir -p states/$at other
		mount "${how[@]}" states/$at || skip "no tmpfs here"
		serve
		rows <<-'END'
		200	-	POST	/team/s	state:1
		200	-	LOCK	/team/s	info:L
		200	-	POST	/team/s?ID=L	@big
		200	-	POST	/team/s?ID=L	state:3
		200	-	UNLOCK	/team/s	info:L
		200	-	GET	/team/s	-	"serial": 3
		200	-	GET	/	-	^team/s 
		200	-	DELETE	/team/s	-
		404	-	GET	/team/s	-
		200	-	POST	/team/s	state:4
		200	-	POST	/s	@big
		200	-	LOCK	/s	info:L
		200	-	LOCK	/s	info:L
		200	-	POST	/s?ID=L	state:2
		END
		[ $at != team ] || rows <<<$'507\t-\tPOST\t/team/s\t@huge\tno room|No space'
		spy -e trace=fsync -P "$PWD/states/.history/team/s"
		expect 200 POST /team/s "$(state 5)"
		unspy
		[ $at = .tmp ] || has trace 'fsync.* = 0'	# the sweep of a start would take it
		expect 200 DELETE /team/s
		until_true kept team/s '1 2 3 4 5'
		cmp big states/.history/team/s/*-2.tfstate
		want "what is there" s.log "$(ls -A states/team)"
		want "strays" '' "$(strays)"
		no_uploads_left || fail "left: $(ls states/.tmp)"
		halt
		umount states/$at
		rm -r states
	done
}

# ---- several servers: the guard, pauses, clocks ----------------------------

# Promise 3: what servers share is the file called .guard. Where the one that
# a server has open is another, its changes are refused, not guarded by half.
test_a_guard_in_another_place_stops_changes() {
	local how first
	grumbles
	for how in 'mv states/.guard states/guard' 'rm states/.guard' \
		'cp -al states backup; rm states/.guard; serve_as second -d states'; do
		serve
		first=$URL
		every '200 - @@' 'POST /s state:1' 'LOCK /locked info:L'
		eval "$how"
		URL=$first
		every $'5.. - @@\t^cannot' 'POST /s state:2' 'LOCK /s info:L' \
			'UNLOCK /locked info:L' 'DELETE /s -'
		rows <<-'END'
		404	-	GET	/s/lock	-
		200	-	GET	/locked/lock	-
		200	-	GET	/s	-	"serial": 1
		END
		until_true says 503 GET /-/ready
		rm -rf states
	done
}

# Promises 4 and 8: every wait for another server has an end. Here one stands
# still before it publishes, for two names. What would come in between is
# refused; nobody else waits; who asks for a held lock is told who holds it.
test_a_guard_that_is_held_for_ever_holds_up_one_name() {
	local i frozen waiting=30
	[ "$BUILD" != sanitized ] || waiting=1	# it has few threads
	grumbles
	serve_as frozen -d states
	frozen=$PID
	every '200 - @@' 'POST /held state:1' 'POST /free state:1' 'LOCK /locked info:L'
	slow renameat,renameat2,unlinkat 600
	later stuck1 POST /held "$(state 9)"
	later stuck2 UNLOCK /locked "$(info L)"
	until_true grep -q renameat trace
	until_true grep -q unlinkat trace
	serve
	later held0 POST /held "$(state 2)"
	for ((i = 1; i <= waiting; i++)); do
		later held$i LOCK /held "$(info M)"
	done
	left "$PORT" POST /held "$(state 7)"
	rows <<<$'200 - GET /held -\t"serial": 1\n200 - GET / -\t^held '
	every '200 - @@' 'GET /-/versions/held -' 'POST /free state:2' 'LOCK /free info:M' \
		'GET /-/ready -'
	[ ! -e held0 ] || fail "the others waited with it"
	rows <<<$'423 - LOCK /locked info:M\t"ID":"L"\n503 - LOCK /locked info:L\t^cannot'
	for ((i = 0; i <= waiting; i++)); do
		until_true [ -s held$i ]
		want "status" 503 "$(cat held$i)"
	done
	has held0.d/head '^Retry-After: 10.$'
	want "complaints: $(cat server.err)" 1 "$(grep -c ': held: ' server.err)"
	kill -9 $frozen
	unspy KILL
	until_true grep -q abandoned states/held.log
	every '200 - @@' 'POST /held state:2' 'UNLOCK /locked info:L'
	kept held '7 1' || fail "$(versions held)"
}

# left PORT METHOD PATH BODY: a client sends this, and gives up.
left() {
	exec 9<>"/dev/tcp/127.0.0.1/$1"
	printf '%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s' \
		"$2" "$3" ${#4} "$4" >&9
	exec 9>&-
}

# paused METHOD PATH BODY: server A is stopped, a client sends it this, gives
# up, and turns to server B with the rows on stdin. Then A goes on.
paused() {
	local before
	before=$(grep -c ' method=' a.log) || :
	kill -STOP "$a"
	left "$port_a" "$@"
	rows
	kill -CONT "$a"
	until_true logged $((before + 1)) ' method=' a.log
}

# Promise 4: a change is made only for a client that is still there. A paused
# server's late one does not undo what was done since at the other, to which a
# client or its front has turned. But a state, perhaps the only copy, is kept.
test_a_paused_server_does_no_harm_when_it_goes_on() {
	local a port_a
	serve_as a -d states
	a=$PID port_a=$PORT
	serve_as b -d states
	paused POST /s "$(state 2)" <<-'END'
	200	-	POST	/s	state:1
	200	-	POST	/s	state:2
	200	-	POST	/s	state:3
	200	-	POST	/s	state:4
	END
	paused POST /s "$(state 2)" <<<'200 - GET /s -' # what is repeated is kept once
	paused POST /s "$(state 4)" <<<$'200 - GET /s -\t"serial": 4'
	kept s '1 2 3 2' || fail "$(versions s)"
	has states/s.log '"abandoned"'
	paused LOCK /s "$(info L)" <<-'END'
	200	-	GET	/s	-	"serial": 4
	200	-	LOCK	/s	info:L
	200	-	UNLOCK	/s	info:L
	END
	paused LOCK /s "$(info L)" <<<'404 - GET /s/lock -'
	paused UNLOCK /s '' <<-'END'
	404	-	GET	/s/lock	-
	200	-	LOCK	/s	info:L
	200	-	UNLOCK	/s	-
	200	-	LOCK	/s	info:N
	END
	paused UNLOCK /s "$(info L)" <<<$'200 - GET /s/lock -\t"ID":"N"'
	# by ID it can end only its sender's own run: that is done
	paused UNLOCK /s "$(info N)" <<<$'200 - GET /s/lock -\t"ID":"N"'
	paused DELETE /s '' <<-'END'
	404	-	GET	/s/lock	-
	200	-	DELETE	/s	-
	200	-	POST	/s	state:5
	END
	paused POST /s?ID=broken "$(pad 6 90000)" <<<$'200 - GET /s -\t"serial": 5'
	rows <<<$'200 - GET /s -\t"serial": 5'
	kept s '1 2 3 2 4 6' || fail "$(versions s)"
}

# Promise 7: each version's ID is later than all there are, though here the
# clock of one server goes back a year and that of another goes ahead for ten
# minutes, every other second. Under a lock, too, the oldest go then.
test_clocks_that_jump_forget_no_new_version() {
	local skew i urls=()
	load_tools
	for skew in -31536000 600; do
		SKEW=$skew LD_PRELOAD=$PWD/skew.so ASAN_OPTIONS=verify_asan_link_order=0 \
			serve_as "skew$skew" -d states -k 5
		urls+=("$URL")
	done
	for i in {1..24}; do
		URL=${urls[i % 2]}
		expect 200 POST /s "$(state "$i")"
		sleep 0.15
	done
	until_true kept s '19 20 21 22 23'
	expect 200 LOCK /s "$(info L)"
	every '200 - POST /s?ID=L state:@@' 25 26 27
	until_true kept s '22 23 24 25 26'
	expect 200 DELETE '/s?ID=L'
	until_true kept s '23 24 25 26 27'
}

# ---- nobody waits who need not, and nothing grows ---------------------------

# Promise 8: old versions are removed in one pass, after the answer, and the
# name's and the connection's next requests do not wait for it.
test_nobody_waits_for_old_versions_to_be_removed() {
	serve -k 5
	expect 200 POST /s "$(state 1)"
	mkdir -p states/.history/s
	seq -f 'states/.history/s/20250101T1200%05.2f0Z-1.tfstate' 0 0.01 20 | xargs touch
	state 2 >two
	info L >mine
	slow unlinkat 0.02
	curl -sS -m "$PATIENCE" -w '%{http_code}\n' -o a1 --data-binary @two "$URL/s" \
		--next -m "$PATIENCE" -w '%{http_code} %{num_connects}\n' -o a2 -X LOCK \
		--data-binary @mine "$URL/s" >statuses
	want "two statuses, one connection" '200 200 0' "$(paste -s -d ' ' statuses)"
	expect 200 UNLOCK /s @mine
	files states/.history/s -gt 1000 || fail "they waited"
	unspy
	until_true files states/.history/s -eq 5
	hasnt <(versions s | tail -1) /2025
}

# A page of a client that has gone is not made to its end, and its place is
# free. The walk through the directories is slow here.
test_pages_of_clients_that_have_gone_are_not_made() {
	local host='HTTP/1.1\r\nHost: localhost\r\n'
	mkdir -p states/d{1..60}
	serve
	expect 200 POST /s "$(state 1)"
	slow getdents64 0.1
	hold 8 "GET /-/healthy $host\r\nGET / $host\r\n"
	until_true grep -q getdents64 trace
	expect 200 POST /s "$(state 2)"
	hang_up				# with an answer unread: it is a reset
	until_true says 200 GET /-/versions/s
	until_true logged 8 'path=/ ' server.log
	unspy
	[ "$(grep -c getdents64 trace)" -lt 400 ] || fail "they were made for nobody"
}

# No fsync happens under anything that other names need: the root's sync is
# slow, new directories wait for it, a write elsewhere does not.
test_a_write_does_not_wait_for_those_that_make_directories() {
	serve
	every '200 - POST /team/s state:@@' 1 2
	slow fsync 15 -P "$PWD/states"
	later new POST /new/s "$(state 1)"
	until_true grep -q fsync trace
	[ ! -e states/new/s.tfstate ] || fail 'another could build on it'
	expect 200 POST /team/s "$(state 3)"
	hasnt trace ' = 0'		# it has not waited for the other
	unspy
	until_true [ -s new ]
	want "status" 200 "$(cat new)"
}

# A state that is not in memory is read by a thread; the loop answers others.
test_reading_from_a_slow_disk_holds_nobody_up() {
	local size
	for size in 2000 3000000; do
		serve
		pad 1 $size >sent
		expect 200 POST /s @sent
		spy -e trace=pread64,preadv2,read,sendfile,splice -P "$PWD/states/s.tfstate" \
			-e inject=preadv2:error=EAGAIN \
			-e inject=pread64,read,sendfile,splice:delay_enter=15s
		later get$size GET /s
		until_true grep -q -E ' (pread64|read|sendfile|splice)\(' trace
		every '200 - GET /-/healthy -' {1..20}
		[ ! -e get$size ] || fail "it held up the others"
		unspy
		until_true [ -s get$size ]
		cmp get$size.d/answer sent
		halt
	done
}

# Strangers may ask as often as they like whether the server is ready: it
# looks once a second at most. A look that does not come to its end is a no.
test_ready_is_one_look_a_second_for_everybody() {
	local i begun=$SECONDS
	grumbles
	serve
	slow fsync 15
	sleep 1.1			# the first verdict is old: one looks
	for i in {1..30}; do
		later "first$i" GET /-/ready
	done
	until_true eval '[ "$(cat first? first?? | wc -l)" = 29 ]'
	[ "$(find "/proc/$PID/task" | grep -c 'status$')" -lt 9 ] || fail "each has a thread"
	unspy
	until_true says 200 GET /-/ready
	spy -e trace=fsync
	curl -sS -o /dev/null -w '%{http_code}\n' "$URL/-/ready?[1-600]" >statuses
	want "answers" "600 200" "$(uniq -c statuses | sed 's/^ *//')"
	unspy
	[ "$(grep -c fsync trace)" -le $((2 * (SECONDS - begun + 2))) ] ||
		fail "$(grep -c fsync trace) syncs in $((SECONDS - begun)) s"
	slow fsync 15
	until_true says 503 GET /-/ready
	expect 200 GET /-/healthy
	unspy
	until_true says 200 GET /-/ready
	spy -e trace=fsync -e inject=fsync:error=EIO:delay_enter=30000
	sleep 1.1			# an older verdict serves nobody
	expect 503 GET /-/ready
	unspy
}

# kib WHAT: VmRSS, or VmHWM, which is its peak.
kib() {
	awk -v what="$1:" '$1 == what { print $2 }' "/proc/$PID/status"
}

# Promise 5: no page holds a state in memory, however many empty instances there are in it.
test_no_page_takes_memory_by_the_size_of_a_state() {
	local before
	[ "$BUILD" != sanitized ] || return 0	# it keeps what was freed
	serve
	printf '{"version":4,"serial":1,"resources":[{"instances":[{}' >big
	yes ',{}' | head -n 5600000 | tr -d '\n' >>big
	printf ']}]}' >>big
	expect 200 GET /-/healthy
	before=$(kib VmHWM)
	every '200 - @@' 'POST /s @big' 'POST /s @big' 'GET / -' 'GET /?q=s -' \
		'GET /-/versions/s -' 'GET /-/log/s -' 'GET /-/metrics -'
	[ $(($(kib VmHWM) - before)) -lt 4096 ] || fail "from $before to $(kib VmHWM) KiB"
}

has_threads() {
	test "$(find "/proc/$PID/task" -mindepth 1 -maxdepth 1 | wc -l)" "$@"
}

# begin_upload NAME: half of ./whole is sent, on a connection that FDS gets.
begin_upload() {
	local size
	size=$(wc -c <whole)
	hold 1 "POST /$1 HTTP/1.1\r\nHost: localhost\r\n${AUTH-}Content-Length: $size\r\n\r\n"
	head -c $((size / 2)) whole >&"${FDS[-1]}"
}

# end_upload FD: sends the rest; the answer's first line, at once or later.
end_upload() {
	tail -c +$(($(wc -c <whole) / 2 + 1)) whole >&"$1"
	timeout "$PATIENCE" head -1 <&"$1" | tr -d '\r'
}

hang_up() {
	local fd
	for fd in "${FDS[@]}"; do
		exec {fd}>&-
	done
	FDS=()
}

# Threads come as needed, and leave when there is nothing to do; their memory
# is back then, but for a few pages of each stack, which glibc keeps.
test_threads_leave_after_a_flood() {
	local i flood before='' FDS=()
	serve
	state 1 >whole
	for flood in 3 100; do		# the first one only sets the mark
		for ((i = 0; i < flood; i++)); do
			begin_upload "s$i"
		done
		[ "$BUILD" = sanitized ] || until_true has_threads -gt $flood
		hang_up
		until_true has_threads -le 2
		before=${before:-$(kib VmRSS)}
	done
	grew 2047 "$before"
}

# Promise 8: stdout and stderr go into one pipe that nobody reads. What there
# is to say waits or is dropped; no request does.
test_a_full_pipe_for_the_logs_stops_nobody() {
	local line
	mkdir -p states/s.log		# its log cannot be written: a complaint
	touch states/empty.tfstate
	mkfifo logs
	exec 8<>logs
	"$STATESRV" -l 127.0.0.1:0 -d states >&8 2>&8 &
	PID=$!
	echo $PID >>"$T/pids"
	read -r -t "$PATIENCE" line <&8
	URL=${line##* on }
	dd if=/dev/zero of=logs oflag=nonblock bs=1 count=100000 2>/dev/null || :
	every $'200 - POST /s state:@@\n5.. - GET /empty -\n200 - GET /-/healthy -' {1..40}
	halt
	want "exit status" 0 "$STATUS"
}

# No two threads touch the same memory unguarded: a mixed load with resets,
# HUPs and slow readers, watched by ThreadSanitizer.
test_source_has_no_data_race() {
	local i users=() FDS=() AUTH='Authorization: Bearer s3cret\r\n'
	need clang setarch
	CC=clang build ./tsan -O1 -g -DNO_SANDBOX -DTHREAD_STACK=1048576 -fsanitize=thread
	through 'exec setarch -R ./tsan'
	install -m 600 <(echo 'ann s3cret write') users
	serve -u users -k 2
	pad 1 3000000 >whole
	for i in 1 2 3; do
		(mkdir user$i && cd user$i && use_all $i) &
		users+=($!)
	done
	for i in {1..30}; do
		kill -HUP "$PID"
		begin_upload "s1?ID=nobody"
		timeout 0.1 curl -sS -u ann:s3cret --limit-rate 99K "$URL/big" >slow || :
		hang_up
	done
	for i in "${users[@]}"; do
		wait "$i" || fail "a user, see above"
	done
	halt
	want "exit status: $(cat server.err)" 0 "$STATUS"
}

use_all() {
	for _ in {1..10}; do
		every '200 ann:s3cret @@' "LOCK /team/s$1 info:L" \
			"POST /team/s$1?ID=L state:$RANDOM" "UNLOCK /team/s$1 info:L" \
			'POST /big @../whole' 'GET / -' 'GET /-/metrics -' \
			"GET /-/versions/team/s$1 -"
	done
}

# Promises 1 to 4 on GlusterFS, replica 3, mounted twice as the README says:
# two servers under load, one replica is killed meanwhile. One of three is not
# enough: all is refused, and nothing is 404. Then they are back.
test_two_servers_share_a_replicated_file_system() {
	local dir i bricks=() urls=() fresh=attribute-timeout=0,entry-timeout=0,negative-timeout=0
	need glusterd gluster mount.glusterfs ip
	[ "$(id -u)" = 0 ] || skip "needs root"
	[ -c /dev/fuse ] || skip "no /dev/fuse"
	grumbles
	apart --net
	load_tools
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
	gluster --mode=script volume create shared replica 3 "${bricks[@]}" force
	# Caches above the replicas: of names, of contents, of writes.
	for i in stat-prefetch quick-read open-behind write-behind; do
		until_true gluster --mode=script volume set shared performance.$i off
	done
	until_true gluster --mode=script volume start shared force
	for dir in a b; do
		mkdir $dir
		mount -t glusterfs -o direct-io-mode=enable,$fresh 192.0.2.1:/shared $dir
		serve_as $dir -d $dir/states -b 1
		echo "$PORT" >port.${#urls[@]}
		urls+=("$URL")
	done
	ln -s b/states states
	./load contend lock 400 >record &
	sleep 2
	kill -9 "$(cat /run/gluster/vols/shared/*brick2.pid)"
	wait $!
	for i in {1..9}; do
		URL=${urls[i % 2]}
		every '200 - @@' "LOCK /s info:$i" "POST /s?ID=$i state:$i"
		URL=${urls[(i + 1) % 2]}
		rows <<-END
		423	-	POST	/s	state:999
		200	-	GET	/s	-	"serial": $i,
		200	-	UNLOCK	/s	info:$i
		END
	done
	kill -9 "$(cat /run/gluster/vols/shared/*brick3.pid)"
	every '5.. - @@' 'GET /s -' 'GET /other -' 'POST /s state:0' 'LOCK /s info:M'
	until_true says 503 GET /-/ready
	until_true gluster --mode=script volume start shared force
	until_true says 200 GET /s
	rows <<-'END'
	404	-	GET	/other	-
	200	-	GET	/s	-	"serial": 9,
	200	-	LOCK	/s	info:M
	END
}

deaf() {
	! (exec 8<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null
}

# SIGTERM during uploads: they complete; who comes later is refused; the exit status is 0.
test_sigterm_lets_uploads_finish() {
	local i n=40 FDS=()
	[ "$BUILD" != sanitized ] || n=2	# it has few threads
	serve
	pad 1 600000 >whole
	for ((i = 0; i < n; i++)); do
		begin_upload "s$i"
	done
	until_true files states/.tmp -ge $n
	kill -TERM "$PID"
	until_true deaf
	for ((i = 0; i < n; i++)); do
		want "upload $i" 'HTTP/1.1 200 OK' "$(end_upload "${FDS[i]}")"
		cmp whole "states/s$i.tfstate"
	done
	ended "$PID"
	want "exit status" 0 "$STATUS"
	no_uploads_left || fail "left: $(ls states/.tmp)"
}

# What is cut at the end, after ten seconds, is told in the log, as any cut is.
test_what_the_end_cuts_is_logged() {
	serve
	hold 1 'PUT /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{'
	hold 1 'GET /x HTT'
	until_true files states/.tmp -ge 1
	halt
	want 'exit status' 0 "$STATUS"
	want 'lines' 2 "$(grep -c 'status=- .*why="the server stops"' server.log)"
	no_uploads_left || fail "left: $(ls states/.tmp)"
}

# A second SIGTERM does not wait, and its exit status says so. Temporary files of a server that is
# dead are swept by the next to start; those of a living one on the same directory are not.
test_only_a_dead_servers_uploads_are_swept() {
	local dead living FDS=()
	pad 1 600000 >whole
	serve_as dead -d states
	begin_upload dead
	until_true files states/.tmp -ge 1
	dead=$(ls states/.tmp)
	cp "states/.tmp/$dead" kept
	kill -TERM "$PID"
	until_true deaf
	halt TERM
	[ "$STATUS" != 0 ] || fail "exit status 0, with an upload under way"
	cp kept "states/.tmp/$dead"
	serve_as living -d states
	no_uploads_left || fail "the dead one's upload is still there"
	[ ! -e states/dead.tfstate ] || fail "half a state is there"
	cp kept "states/.tmp/$dead"
	begin_upload living
	until_true files states/.tmp -ge 2
	living=$(find states/.tmp -type f ! -name "$dead" -printf '%f\n')
	serve_as third -d states
	want "uploads left" "$living" "$(ls states/.tmp)"
	want "the living upload" 'HTTP/1.1 200 OK' "$(end_upload "${FDS[1]}")"
	cmp whole states/living.tfstate
	no_uploads_left
}

# ---- two servers under everything at once ----------------------------------
#
# Clients load two servers on one directory and record each request; meanwhile
# the servers are killed and stopped, and their clocks jump.
#
# A line of the record: op name id what status begin end, the times when it was
# sent, and when it was answered or given up:
#	R P D	a state is read, posted, deleted; id: of the lock, 0 for none
#	L U F G	a lock is taken, released, broken, read
#	H	a version in the history, id is its place; the last is the state
# what: a state's serial, 0 for none, -1 for a torn one; of L, U and G the ID
# of the lock that is there. status: 0 if no answer came.

# load_tools: builds skew.so, which makes a server's clock wrong by $SKEW
# seconds, every other second, and the clients:
#	load run DIR MILLISECONDS	the record goes to stdout
#	load contend DIR ROUNDS		two LOCKs at once, that many times
load_tools() {
	need "${CC:-cc}"
	cat >load.c <<'C'
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { NAMES = 4, CLIENTS = 8, BIG = 1 << 19 };

static const char *dir;
static long stop;			/* in microseconds */
static int rounds, patience;		/* for an answer, in seconds */
static atomic_int ids, states;
static _Thread_local FILE *conn[2];	/* to server 0 and 1 */
static _Thread_local char answer[BIG], body[BIG];

static long
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static size_t
state_make(int serial)
{
	static const int sizes[] = { 300, 20000, 66000, 300000, 1000, 9 };

	return (size_t)sprintf(body, "{\"version\":4,\"serial\":%d,\"pad\":"
	    "\"%0*d\",\"end\":%d}", serial, sizes[serial % 6], serial, serial);
}

static void
dial(int i)
{
	struct sockaddr_in a = { .sin_family = AF_INET };
	FILE *f = fopen(i == 0 ? "port.0" : "port.1", "r");

	(void)!fscanf(f, "%hu", &a.sin_port);
	fclose(f);
	a.sin_port = htons(a.sin_port);
	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	conn[i] = fdopen(socket(AF_INET, SOCK_STREAM, 0), "r");
	(void)!connect(fileno(conn[i]), (void *)&a, sizeof(a));
}

static void
say(int i, char op, int name, int id, int what)
{
	static const char *const form[128] = { ['R'] = "GET /%s/n%d",
	    ['P'] = "POST /%s/n%d?ID=L%d", ['D'] = "DELETE /%s/n%d?ID=L%d",
	    ['L'] = "LOCK /%s/n%d", ['U'] = "UNLOCK /%s/n%d",
	    ['F'] = "UNLOCK /%s/n%d", ['G'] = "GET /%s/n%d/lock" };
	struct timeval wait = { patience, 50000 + random() % 300000 };
	char head[300];
	size_t len = op == 'P' ? state_make(what) : 0, n;

	if (conn[i] == NULL)
		dial(i);
	if (op == 'L' || op == 'U')
		len = (size_t)sprintf(body, "{\"ID\":\"L%d\"}", id);
	sprintf(head, form[(int)op], dir, name, id);
	n = id == 0 ? strcspn(head, "?") : strlen(head);
	n += (size_t)sprintf(head + n, " HTTP/1.1\r\nHost: localhost\r\n"
	    "Content-Length: %zu\r\n\r\n", len);
	i = fileno(conn[i]);
	setsockopt(i, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
	send(i, head, n, MSG_NOSIGNAL | (len > 0 ? MSG_MORE : 0));
	send(i, body, len, MSG_NOSIGNAL);
}

/* The answer's status, or 0 if none came: then the client hangs up. */
static int
hear(int i)
{
	char line[1000] = "";
	size_t len = 0;
	int status = 0;

	while (fgets(line, sizeof(line), conn[i]) != NULL && line[0] != '\r') {
		(void)sscanf(line, "HTTP/1.1 %d", &status);
		(void)sscanf(line, "Content-Length: %zu", &len);
	}
	if (line[0] != '\r' || fread(answer, 1, len, conn[i]) != len) {
		fclose(conn[i]);
		conn[i] = NULL;
		return 0;
	}
	answer[len] = '\0';
	return status;
}

static int
ask(int i, char op, int name, int id, int what)
{
	long begin = now();
	int status;

	say(i, op, name, id, what);
	status = hear(i);
	if (op == 'R' && status == 200) {
		(void)sscanf(answer, "{\"version\":4,\"serial\":%9u", &what);
		state_make(what);
		what = strcmp(answer, body) == 0 ? what : -1;
	}
	if (strchr("LUG", op) != NULL && status != 0)
		(void)sscanf(answer, "{\"ID\":\"L%d\"", &what);
	printf("%c %d %d %d %d %ld %ld\n", op, name, id, what, status, begin,
	    now());
	return status;
}

/* A client that waits in vain asks the other server, or gives up. */
static int
insist(char op, int name, int id)
{
	int what = op == 'P' ? ++states : 0, i = (int)random() % 2, status;

	usleep((useconds_t)random() % 8000);
	while ((status = ask(i, op, name, id, what)) == 0 || status >= 500) {
		if (now() > stop + 40000000)
			errx(1, "nobody answers: %d", status);
		if (now() < stop && random() % 20 == 0)
			break;
		usleep(5000);
		i = 1 - i;
	}
	return status;
}

/* Name 0 is written without locks, the others mostly under them. */
static void *
client(void *arg)
{
	int name, id, status;

	while (now() < stop) {
		name = (int)random() % NAMES;
		for (long n = random() % 5; n > 0; n--)
			insist(n > 1 ? 'R' : 'G', name, 0);
		if (name == 0 || random() % 9 == 0) {
			insist(random() % 6 > 0 ? 'P' : 'D', name, 0);
			continue;
		}
		id = ++ids;
		status = insist('L', name, id);
		if (status == 423 && random() % 20 == 0)
			insist('F', name, 0);
		for (long n = random() % 4; n >= 0 && status == 200; n--) {
			insist('R', name, 0);
			insist(n == 0 ? 'U' : random() % 6 > 0 ? 'P' : 'D', name, id);
		}
	}
	return arg;
}

/* Two LOCKs at once, one at each server: one of them is granted. In every
 * other round there is a lock, and so old that it may be broken (-b). */
static void *
contender(void *arg)
{
	int name = (int)(long)arg, a, b;
	char lock[100];

	sprintf(lock, "states/%s/n%d.lock", dir, name);
	for (int id = 1; id < 2 * rounds; id += 2) {
		say(0, 'L', name, id, 0);
		say(1, 'L', name, id + 1, 0);
		a = hear(0);
		b = hear(1);
		if (a + b != 200 + 423)
			errx(1, "LOCKs: %d and %d", a, b);
		if (id % 4 == 1)
			utimes(lock, (struct timeval[2]){ 0 });
		else
			ask(id % 3 % 2, 'U', name, a == 200 ? id : id + 1, 0);
	}
	return arg;
}

int
main(int argc, char **argv)
{
	void *(*work)(void *) = argv[1][0] == 'r' ? client : contender;
	pthread_t thread[CLIENTS];

	srandom((unsigned)now());
	dir = argv[argc - 2];
	stop = now() + atol(argv[argc - 1]) * 1000;
	rounds = atoi(argv[argc - 1]) / CLIENTS;
	patience = work == client ? 0 : 60;
	for (long i = 0; i < CLIENTS; i++)
		pthread_create(&thread[i], NULL, work, (void *)i);
	for (int i = 0; i < CLIENTS; i++)
		pthread_join(thread[i], NULL);
	patience = 10;
	for (int i = 0; i < 3 * NAMES && work == client; i++)
		insist("FRG"[i % 3], i / 3, 0);
	return 0;
}
C
	${CC:-cc} -std=gnu11 -O1 -Wall -pthread -o load load.c
	${CC:-cc} -O1 -shared -fPIC -o skew.so -x c - <<'C'
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int
clock_gettime(clockid_t id, struct timespec *t)
{
	struct timespec up;
	int r = (int)syscall(SYS_clock_gettime, id, t);

	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &up);
	if (id == CLOCK_REALTIME && up.tv_sec % 2 == 0)
		t->tv_sec += atol(getenv("SKEW"));
	return r;
}
C
}

# check_record: says what breaks a rule in the record on stdin. A write that
# nobody answered may have landed, but not behind one that was sent after it
# was given up: the guard, and the look for its client, would not let it.
check_record() {
	awk '
	function never(broken, rule, a, b) {
		if (broken) {
			print rule ": " line[a] " | " line[b]
			exit failed = 1
		}
	}
	function ends(a, lock) {
		return op[a] == "F" || (op[a] == "U" && id[a] == lock)
	}
	# gone: when all knew that a write was replaced. till: the end of a lock
	function learn(a, b) {
		if (sent[a] && done[b] && what[a] != what[b] && from[b] > to[a] && to[b] < gone[a])
			gone[a] = to[b]
		if (from[b] < till[a] && to[b] > from[a] && ends(b, id[a]))
			till[a] = from[b] > to[a] ? from[b] : to[a]
	}
	# What happened while the lock a was held.
	function under(a, b, n) {
		never(done[b] && id[b] != id[a], "a write under the lock of another", a, b)
		never(op[b] == "G" ? status[b] == 404 : id[b] == id[a] && status[b] ~ /409|423/,
			"a lock was lost", a, b)
		if (op[b] == "R" && !was[a])
			was[a] = b
		never(op[b] == "R" && from[b] > to[was[a]] && what[b] != what[was[a]] &&
			!((n, what[b], id[a]) in wrote), "a state changed under a lock", was[a], b)
	}
	# What was sent after a was answered.
	function behind(a, b, n) {
		never(done[b] && id[b] && ends(a, id[b]) && from[a] > asked[n, id[b]],
			"a write under a broken lock", a, b)
		never(op[b] ~ /[LUG]/ && what[b] && ends(a, what[b]) && from[a] > asked[n, what[b]],
			"a broken lock is back", a, b)
		never(done[a] && done[b] && last[n, what[b]] && first[n, what[a]] > last[n, what[b]],
			"the history is out of order", a, b)
	}
	function judge(a, b, n) {
		if (till[a] > to[a] && to[b] < till[a] && from[b] > to[a])
			under(a, b, n)
		if (status[a] == 200 && from[b] > to[a])
			behind(a, b, n)
		if (op[b] == "R" && sent[a] && what[a] == what[b] && from[a] < to[b] &&
		    gone[a] >= from[b])
			known[b]
		never(a != b && till[a] > to[a] && till[b] > to[b] && to[b] < till[a] && to[a] < till[b],
			"two holders", a, b)
	}
	function alone(a, n) {
		never(op[a] == "R" && !(a in known), "a read of what was replaced or never sent", a)
		never(op[a] == "H" && !((n, what[a]) in wrote), "a version that nobody wrote", a)
		never(done[a] && what[a] && !((n, what[a]) in first), "a state is lost", a)
	}
	{
		line[NR] = $0
		op[NR] = $1 == "D" && $5 == 404 ? "R" : $1
		id[NR] = $3
		what[NR] = $4
		status[NR] = $5
		from[NR] = $6
		to[NR] = $7
		done[NR] = $1 ~ /[PD]/ && $5 == 200
		sent[NR] = $1 ~ /[PD]/ && $5 !~ /4../
		gone[NR] = 9e15
		till[NR] = $1 == "L" && $5 == 200 ? 9e15 : 0
		if ($1 != "R" || $5 ~ /[24]../)
			at[$2, ++lines[$2]] = NR
		if (sent[NR])
			wrote[$2, $4] = wrote[$2, $4, $3] = 1
		if ($1 == "L" && $7 > asked[$2, $3])
			asked[$2, $3] = $7
		if ($1 == "H" && !last[$2, $4])
			first[$2, $4] = $3
		if ($1 == "H")
			last[$2, $4] = $3
	}
	END {
		for (n in lines) {
			for (i = 1; a = at[n, i]; i++)
				for (j = 1; op[a] ~ /[LPD]/ && (b = at[n, j]); j++)
					learn(a, b)
			for (i = 1; a = at[n, i]; i++)
				for (j = 1; op[a] ~ /[LPDUF]/ && (b = at[n, j]); j++)
					judge(a, b, n)
			for (i = 1; a = at[n, i]; i++)
				alone(a, n)
		}
		exit failed
	}'
}

# The checker can fail: each record breaks one rule, but for the first two.
test_source_each_rule_for_records_of_requests_is_enforced() {
	local verdict record
	while IFS=$'\t' read -r verdict record; do
		tr ";" "\n" <<<"D 1 0 0 200 -1 -1;$record" >record
		check_record <record >said && echo right >said
		has said "^$verdict"
	done <<-'END'
	right	P 1 0 5 200 1 2;P 1 0 6 0 3 9;R 1 0 5 200 10 11;R 1 0 6 200 12 13;H 1 1 5 200 9 9
	right	L 1 7 0 200 1 2;G 1 0 7 200 3 4;R 1 0 0 404 3 5;P 1 7 5 200 6 7;R 1 0 5 200 8 9;F 1 0 0 200 10 13;L 1 8 0 200 11 14;H 1 1 5 200 9 9
	a read of .* never sent	P 1 0 5 200 1 2;R 1 0 -1 200 3 4;H 1 1 5 200 9 9
	a read of what was replaced	P 1 0 5 0 1 2;P 1 0 6 200 3 4;R 1 0 5 200 5 6;H 1 1 6 200 9 9
	a read of what was replaced	P 1 0 5 200 1 2;R 1 0 0 404 3 4;H 1 1 5 200 9 9
	two holders	L 1 7 0 200 1 2;L 1 8 0 200 3 4;U 1 7 0 200 5 6;U 1 8 0 200 7 8
	a write under the lock of another	L 1 7 0 200 1 2;P 1 0 5 200 3 4;R 1 0 5 200 5 6
	a lock was lost	L 1 7 0 200 1 2;P 1 7 5 409 3 4
	a lock was lost	L 1 7 0 200 1 2;G 1 0 0 404 3 4
	a state changed under a lock	P 1 0 5 0 1 2;L 1 7 0 200 3 4;R 1 0 0 404 5 6;R 1 0 5 200 7 8
	a write under a broken lock	L 1 7 0 200 1 2;F 1 0 0 200 3 4;P 1 7 5 200 5 6;R 1 0 5 200 7 8
	a broken lock is back	L 1 7 0 0 1 2;L 1 7 0 200 3 4;U 1 7 0 200 5 6;L 1 8 7 423 7 8
	a version that nobody wrote	P 1 0 5 423 1 2;H 1 1 5 200 9 9
	a state is lost	P 1 0 5 200 1 2;P 1 0 6 200 3 4;R 1 0 6 200 5 6
	the history is out of order	P 1 0 5 200 1 2;P 1 0 6 200 3 4;D 1 0 0 200 5 6;R 1 0 0 404 7 8;H 1 1 6 200 9 9;H 1 2 5 200 9 9
	END
}

# come S [OPTION...]: server S comes, or comes back, with another clock.
come() {
	SKEW=${skews[RANDOM % ${#skews[@]}]} LD_PRELOAD=$PWD/skew.so \
		ASAN_OPTIONS=verify_asan_link_order=0 \
		serve_as "s$1.$((++come))" -d states -k 100000 "${@:2}"
	pids[$1]=$PID
	echo "$PORT" >"port.$1"
}

# crash_rounds N: N times clients in troubled times, and the record of it is
# checked. In the end nothing is left over.
crash_rounds() {
	local round s how come=0 pids=() clients skews=(0 0 600 -600 86400 -31536000)
	load_tools
	come 0
	come 1
	for ((round = 1; round <= $1; round++)); do
		printf 'D %s 0 0 200 -1 -1\n' 0 1 2 3 >record
		./load run "r$round" 4000 >>record &
		clients=$!
		# a server is stopped, and then goes on, ends as it should, or is killed
		while kill -0 $clients 2>/dev/null; do
			s=$((RANDOM % 2)) how=$((RANDOM % 4))
			sleep "0.$((RANDOM % 6))"
			kill -STOP "${pids[s]}"
			sleep "$((RANDOM % 2)).$((RANDOM % 10))"
			[ $how = 0 ] || kill -CONT "${pids[s]}"
			[ $how -lt 2 ] || continue
			[ $how = 0 ] && halt KILL "${pids[s]}" || halt TERM "${pids[s]}"
			[ $how = 0 ] || want "exit status" 0 "$STATUS"
			come $s
		done
		wait $clients || fail "round $round"
		# the record's lines of what is on disk, in its order
		find "states/.history/r$round" "states/r$round" -name '*.tfstate' | LC_ALL=C sort |
			xargs -s 999999 awk -F '[":,{}]+' '
			FNR == 1 {
				match(FILENAME, "/n[0-9][/.]")
				print "H", substr(FILENAME, RSTART + 2, 1), ++place,
					($7 + 0 == $5 && $9 == $5 ? $5 : -1), 200, 9e15, 9e15
			}' >>record
		check_record <record || fail "round $round"
	done
	halt TERM "${pids[0]}"
	halt TERM "${pids[1]}"
	come 0
	until_true no_uploads_left
	want "strays" '' "$(strays)"
	! grep -v guard ./s*.err || fail "see above"
}

# ./test.sh crash [ROUNDS]
crash() {
	trap 'reap; rm -rf "$work"' EXIT
	set -e
	crash_rounds "${1-100}"
	echo "${1-100} rounds survived"
}

# Promises 1 to 4, 6 and 7, for the clients of two servers.
test_two_servers_under_everything_at_once_keep_their_promises() {
	grumbles
	crash_rounds 3
}

# contend_for_locks ROUNDS: promise 3, for LOCKs sent at once to two servers.
# Pages that look at the locks meanwhile do not end the guard.
contend_for_locks() {
	local come=0 pids=() clients skews=(0)
	load_tools
	come 0 -b 1
	come 1 -b 1
	./load contend c "$1" >record &
	clients=$!
	while kill -0 $clients 2>/dev/null; do
		every '200 - GET @@ -' / /-/ready
	done
	wait $clients || fail "see above"
}

test_no_lock_is_granted_twice_by_two_servers() {
	contend_for_locks 2000
}

# macOS and OpenBSD have only locks that belong to a process.
test_source_with_classic_record_locks_grants_no_lock_twice() {
	build classic "${shipped[@]}" -DNO_OFD
	STATESRV=./classic
	contend_for_locks 10000
}

# ---- the protocol, as a model ----------------------------------------------

# How two servers keep promises 1, 3 and 4, checked for all that can happen in
# three troubles; and each step of it is needed.
test_source_the_protocol_of_locks_and_writes_holds_in_a_model() {
	local steps=(-DGUARD=1 -DINODE=1 -DLOOK=1 -DSYNC=1 -DSTAY=1) step
	need spin "${CC:-cc}"
	cat >model.pml <<'PML'
/*
 * Two servers on one directory; in each, a thread for each of two clients. A
 * client that waits in vain hangs up and asks either server again, while the
 * first may be stopped anywhere. GUARD, INODE, LOOK, SYNC, STAY: 0 takes the
 * step out.
 */
#define NONE	2
#define ID(c)	(2 * run_no[c] + c + 1)			/* of its lock */
#define T	thread[2 * s + c]
#define THERE	(at[c] == s)
#define FREE	(lock == 0 || lock == T.id)
#define ASKS	(at[c] == NONE && op[c] != DONE)
#define SYNCED	old_lock = lock; old_state = state
#define HEARS(what)	(THERE && op[c] == what)

mtype = { LOCK, POST, UNLOCK, FORCE, DONE, IDLE, ASKED, INSIDE, PUBLISHED, ANSWERED };
typedef request { mtype is = IDLE, op; byte id, new };
request thread[4];
byte lock, old_lock, state, old_state;	/* old: perhaps, after a power cut */
byte named, opened[2];			/* inodes: of .guard, the servers' */
bool guard[2];				/* by inode: one is inside */
mtype op[2] = LOCK;			/* what a client wants, */
byte at[2] = NONE, new[2], run_no[2];	/* of which server */
bool holds[2], forced[2], ended[6];	/* what it believes of its locks */
byte made, acked;			/* states: sent, answered 200 */
byte trouble = 3, forces = 1;

inline set(s, c, is_now, what, lock_id, number) {
	T.is = is_now;
	T.op = what;
	T.id = lock_id;
	T.new = number
}

inline end(s, c) {			/* of a thread, and of a wait for it */
	at[c] = (THERE -> NONE : at[c]);
	set(s, c, IDLE, 0, 0, 0)
}

inline go_on() {			/* under the lock */
	if
	:: made < 2 -> made++; new[c] = made; op[c] = POST
	:: new[c] = 0; op[c] = UNLOCK; holds[c] = false
	fi
}

inline answer(ok) {
	if
	:: !THERE || (HEARS(LOCK) && !ok)
	:: HEARS(LOCK) && !ok && c == 1 && forces > 0 ->
		forces--; op[1] = FORCE; holds[0] = false; forced[0] = true
	:: HEARS(FORCE) -> op[c] = LOCK
	:: HEARS(LOCK) && ok -> holds[c] = !forced[c]; go_on()
	:: HEARS(POST) && ok -> acked = (new[c] > acked -> new[c] : acked); go_on()
	:: HEARS(POST) && !ok -> new[c] = 0; op[c] = UNLOCK
	:: HEARS(UNLOCK) -> ended[ID(c)] = ok; run_no[c]++;
		forced[c] = (op[1 - c] == FORCE);
		op[c] = (run_no[c] < 2 - c -> LOCK : DONE)
	fi;
	end(s, c)
}

active [2] proctype client() {
	byte c = _pid;
	do
	:: atomic { ASKS && thread[c].is == IDLE ->
		at[c] = 0; set(0, c, ASKED, op[c], ID(c), new[c]) }
	:: atomic { ASKS && thread[2 + c].is == IDLE ->
		at[c] = 1; set(1, c, ASKED, op[c], ID(c), new[c]) }
	:: atomic { at[c] != NONE && trouble > 0 -> trouble--; at[c] = NONE }
	od
}

active [4] proctype server() {
	byte s = (_pid - 2) / 2, c = _pid % 2;
	do
	:: atomic { T.is == ASKED && !(GUARD && guard[opened[s]]) ->
		if
		:: INODE && opened[s] != named -> end(s, c)		/* 503 */
		:: LOOK && !THERE && T.op != UNLOCK -> end(s, c)
		:: T.op == POST && lock != T.id -> answer(false)
		:: (T.op == LOCK || T.op == UNLOCK) && !FREE -> answer(false)
		:: else -> guard[opened[s]] = true; T.is = INSIDE
		fi }
	:: atomic { T.is == INSIDE -> guard[opened[s]] = false; T.is = PUBLISHED;
		if
		:: T.op == LOCK && FREE -> lock = T.id
		:: T.op == LOCK && !FREE -> end(s, c)			/* O_EXCL */
		:: T.op == POST -> assert(lock == T.id); state = T.new
		:: T.op == UNLOCK || T.op == FORCE -> lock = 0
		fi }
	:: atomic { T.is == PUBLISHED && SYNC -> SYNCED; answer(true) }
	:: atomic { T.is == PUBLISHED && !SYNC -> answer(true); T.is = ANSWERED }
	:: atomic { T.is == ANSWERED -> SYNCED; T.is = IDLE }
	:: atomic { T.is == PUBLISHED && trouble > 0 -> trouble--;	/* no sync: 503 */
		lock = (!STAY && T.op == LOCK && FREE -> 0 : lock);
		end(s, c) }
	od
}

inline restart(s) {
	guard[opened[s]] = guard[opened[s]] &&
	    thread[2 * s].is != INSIDE && thread[2 * s + 1].is != INSIDE;
	opened[s] = named;
	end(s, 0);
	end(s, 1)
}

active proctype troubles() {
	do
	:: atomic { trouble > 0 -> trouble--; restart(0) }
	:: atomic { trouble > 0 -> trouble--; restart(1) }
	:: atomic { trouble > 0 -> trouble--; restart(0); restart(1);
		if					/* the power was cut */
		:: lock = old_lock
		:: lock != old_lock -> lock = 0
		:: state = old_state
		:: lock = old_lock; state = old_state
		fi;
		SYNCED }
	:: atomic { trouble > 0 && named == 0 && !guard[0] ->	/* inside, it would be too late */
		trouble--; named = 1 }
	od
}

active proctype promises() {
	do
	:: holds[0] && lock != ID(0) -> assert(false)	/* one holder: each */
	:: holds[1] && lock != ID(1) -> assert(false)	/* has the lock */
	:: ended[lock] -> assert(false)			/* it is not back */
	:: state < acked -> assert(false)		/* no write is lost */
	od
}
PML
	for step in nothing GUARD INODE LOOK SYNC STAY; do
		spin "${steps[@]/$step=1/$step=0}" -a model.pml
		${CC:-cc} -w -O2 -DSAFETY -DMEMLIM=1500 -o pan pan.c
		./pan -E -m10000 >found
		case $step in
		nothing) has found 'errors: 0' && hasnt found 'not completed|too small' ;;
		*) has found 'assertion violated' ;;
		esac
	done
}
# ---- what stands around the server ----------------------------------------
#
# Each for real, where it is installed, and by what the README shows.

# shown LINE: the text that the README shows under that line.
shown() {
	awk -v head="$1" '
		!/^[ \t]/ && NF { on = 0 }
		{ sub(/^(\t|    )/, "") }
		/^# (recipe: |[^ ]*[.\/][^ ]*$)/ { on = $0 == head }
		on' "$here/README" >shown
	[ -s shown ] || fail "the README has no $1"
	cat shown
}

# front COMMAND...: starts it, waits until it takes connections on $FRONT.
front() {
	"$@" >front.log 2>front.out &
	PID=$!
	until_true eval '(: <>"/dev/tcp/127.0.0.1/$FRONT") 2>/dev/null'
}

# nginx_front: nginx with what is in ./front.
nginx_front() {
	mkdir tmp
	cat >nginx.conf <<-EOF
	daemon off; master_process off; pid nginx.pid; error_log stderr; events {}
	http {
		access_log off; client_body_temp_path tmp/1; proxy_temp_path tmp/2;
		fastcgi_temp_path tmp/3; uwsgi_temp_path tmp/4; scgi_temp_path tmp/5;
		include $T/front;
	}
	EOF
	front nginx -p "$T" -c nginx.conf
}

# behind FILE: a server, and in ./front the README's FILE, on a machine that is
# called states.example.org and has an /etc and a /run of its own.
behind() {
	terraform_here
	mount -t tmpfs none /run
	mkdir /run/{etc,work}
	mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work none /etc
	echo 127.0.0.1 localhost states.example.org >/etc/hosts
	mkdir -p /etc/statesrv
	shown '# certificates.sh' >certificates.sh
	(cd /etc/statesrv && bash -e "$T/certificates.sh") 2>openssl.out || fail "$(cat openssl.out)"
	serve -l unix:/run/statesrv.sock
	shown "# $1" >front
	export FRONT=443 URL=https://states.example.org CURL_HOME=$T
	printf '%s = /etc/statesrv/%s\n' cacert ca.crt cert client.crt key client.key >.curlrc
	resources work
	backend work
	shown '# client.sh' >env.sh
	# shellcheck source=/dev/null
	cd /etc/statesrv && . "$T/env.sh" && cd "$T"
}

# Terraform's whole round, TLS and client certificate from the environment; an
# early answer to a large upload; the client's address, which it cannot forge.
test_terraform_lives_behind_nginx_with_client_certificates() {
	local mark
	need terraform nginx openssl ip
	apart --net
	behind /etc/nginx/conf.d/statesrv.conf
	nginx_front
	works work init
	works work apply -auto-approve
	works work apply -auto-approve -var v=2
	until_true grep -q -E 'client=127\.0\.0\.1[: ](.* )?method=POST .*status=200' server.log
	expect 200 LOCK /demo "$(info 4711)"
	meets 4711 work apply -auto-approve -var v=3
	{ state 9 && head -c 20000000 /dev/zero | tr '\0' ' '; } >large
	# HTTP/1.1, for curl may lose an answer of HTTP/2 that comes that early.
	rows --http1.1 -H 'X-Forwarded-For: 192.0.2.66' <<<'423 - POST /demo @large	4711'
	hasnt server.log '192\.0\.2\.66'
	works work force-unlock -force 4711
	expect 200 POST /demo @large
	cmp large states/demo.tfstate
	want "states left in nginx's files" '' "$(find tmp -type f)"

	unset TF_HTTP_CLIENT_CERTIFICATE_PEM TF_HTTP_CLIENT_PRIVATE_KEY_PEM
	export TF_HTTP_RETRY_MAX=0
	mark=$(wc -l <server.log)
	fails work plan
	curl -q -s --cacert /etc/statesrv/ca.crt "$URL/demo" >answer 2>&1 || :
	want 'lines in the log without a certificate' "$mark" "$(wc -l <server.log)"
}

# The other front: its own check of the file, and an apply through it.
test_terraform_lives_behind_caddy_with_client_certificates() {
	need terraform caddy openssl ip
	apart --net
	behind /etc/caddy/Caddyfile
	export HOME=$T XDG_DATA_HOME=$T XDG_CONFIG_HOME=$T
	caddy validate --config front --adapter caddyfile >check 2>&1 || fail "$(cat check)"
	front caddy run --config front --adapter caddyfile
	works work init
	works work apply -auto-approve
	has states/demo.tfstate '"serial": 1,'
}

# From a unix socket the last element of X-Forwarded-For is believed, which the
# front itself has written, if it is an address.
test_the_clients_address_is_believed_of_a_front_on_a_socket() {
	local n=0 header told
	serve -l unix:sock
	while IFS='|' read -r header told; do
		n=$((n + 1))
		expect 404 GET /n$n '' -H "X-Forwarded-For: $header" --unix-socket sock
		until_true grep -q -E "client=$told .*name=n$n " server.log
	done <<-'EOF'
	192.0.2.66, 192.0.2.7|192\.0\.2\.7
	2001:db8::7|\[?2001:db8::7\]?
	<script> why="no"|unix
	192.0.2.66, unix:|unix
	EOF
	expect 404 GET /tcp '' -H 'X-Forwarded-For: 192.0.2.66'
	until_true grep -q -E 'client=127\.0\.0\.1:[0-9]+ .*name=tcp ' server.log
	hasnt server.log '192\.0\.2\.66|script'
}

# sd_listen_fds(3): passed sockets are used as they are, and no other; those
# meant for another process are left alone; a public one needs users, too.
test_sockets_passed_by_systemd_are_used_as_they_are() {
	need systemd-socket-activate ip
	apart --net
	FRONT=8080 URL=http://127.0.0.1:8080
	front systemd-socket-activate -l "127.0.0.1:$FRONT" -l /proc/self/cwd/passed \
		"$STATESRV" -d states
	until_true grep -q ' on unix:.*passed' front.log
	want listeners 2 "$(grep -c '^statesrv: .* on [hu]' front.log)"
	expect 200 POST /demo "$(state 1)"
	expect 200 GET /demo '' --unix-socket passed
	halt
	want 'exit status' 0 "$STATUS"
	[ -S passed ] || fail "the socket was systemd's, and it is gone"
	LISTEN_PID=1 LISTEN_FDS=1 serve_as other -d states
	expect 200 GET /demo
	front systemd-socket-activate -l "0.0.0.0:$FRONT" "$STATESRV" -d states
	! wait $PID || fail 'a public socket without users'
	has front.out TF_HTTP_USERNAME
}

# systemd has nothing to say against the units. The service runs under a systemd
# of our own, which sees the machine's files through an overlay: a write, a
# restart on the held socket, a user who may not connect.
test_the_units_of_the_readme_serve_under_systemd() {
	local etc=upper/etc/systemd/system
	need systemd-nspawn systemd-analyze
	apart --mount
	mkdir -p $etc/statesrv.service.d upper/usr/local/bin upper/etc/statesrv work root told user
	cp "$STATESRV" upper/usr/local/bin/statesrv
	shown '# /etc/systemd/system/statesrv.socket' >$etc/statesrv.socket
	shown '# /etc/systemd/system/statesrv.service' >$etc/statesrv.service
	shown '# recipe: login' | sed -n "s|/usr/local/bin/statesrv|$STATESRV|
		/^\[Service/,/^end/{/^end/d;p;}" >user/statesrv.service
	printf '[Service]\nEnvironment=ASAN_OPTIONS=detect_leaks=0\n' \
		>$etc/statesrv.service.d/sanitized.conf # has no ptrace(2) there
	(umask 077 && echo 'ci hunter2 write' >upper/etc/statesrv/users)
	printf '[Unit]\nRequires=statesrv.socket\nWants=try.service\n' >$etc/try.target
	printf '%s\n' '[Unit]' After=statesrv.socket '[Service]' Type=oneshot \
		'ExecStart=-/bin/sh /try' 'ExecStopPost=/bin/systemctl exit 0' >$etc/try.service
	cat >upper/try <<-'EOF'
	exec >/told/all 2>&1
	ask="curl -s -m 9 --unix-socket /run/statesrv.sock -o /told/answer -w %{http_code}\n"
	$ask -u ci:hunter2 -d '{"version": 4, "serial": 7}' http://states/team/prod
	$ask http://states/team/prod
	systemctl restart statesrv.service
	$ask -u ci:hunter2 http://states/team/prod
	setpriv --reuid nobody --clear-groups $ask http://states/-/ready || echo "exit $?"
	stat -L -c %a /var/lib/statesrv /var/lib/statesrv/team/prod.tfstate
	systemctl stop statesrv.socket statesrv.service
	systemctl show -p Result --value statesrv.service
	journalctl -q -o cat -u statesrv.service >/told/journal
	EOF
	mount -t tmpfs none /run
	mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root
	XDG_RUNTIME_DIR=/run systemd-analyze verify --man=no --user user/statesrv.service 2>verify
	systemd-analyze verify --man=no --root=root statesrv.socket 2>>verify
	hasnt verify 'statesrv\.'
	SYSTEMD_LOG_LEVEL=err timeout 60 systemd-nspawn -q -D root --bind "$PWD/told:/told" \
		--link-journal=no --private-network --register=no --keep-unit --console=pipe \
		/lib/systemd/systemd --unit=try.target </dev/null >nspawn.out 2>&1 || :
	rmdir /sys/fs/cgroup/{,*/}{payload/*,payload,supervisor} 2>/dev/null || :
	[ -e told/all ] || skip "no systemd starts here: $(tail -n 1 nspawn.out)"
	want 'what was told' '200 401 200 000 exit 7 700 600 success' "$(xargs <told/all)"
	want 'the state' '{"version": 4, "serial": 7}' "$(cat told/answer)"
	has told/journal 'method=POST name=team/prod status=200'
}

engine_is_up() {
	docker info >/dev/null 2>&1 && return
	kill -0 "$ENGINE" 2>/dev/null || skip "no dockerd starts here: $(tail -n 1 dockerd.log)"
	return 1
}

# Small; says what to do when nobody is let in; the README's command, locked up, and
# what it exports; healthy; a stop under load, nothing lost (promise 1). Then another
# processor's image (by qemu); root's state in a named volume, 0644, is kept.
test_source_makes_images_that_serve_and_stop_with_nothing_lost() {
	local n=1 volume=docker/volumes/kept/_data
	local locked_up='--read-only --cap-drop ALL --security-opt no-new-privileges'
	need docker dockerd ip musl-gcc aarch64-linux-gnu-gcc qemu-aarch64-static
	terraform_here
	apart --net
	# docker's engine, in the test's own name spaces, until the test ends
	mount -t tmpfs none /run
	mount -t tmpfs none /opt
	unset "${!DOCKER_@}"
	dockerd --data-root "$PWD/docker" --cgroup-parent "/${T##*/}" >dockerd.log 2>&1 &
	ENGINE=$!
	trap 'docker rm -f -v states; find /sys/fs/cgroup -depth -path "*/${T##*/}*" -type d \
		-exec rmdir {} +' EXIT
	until_true engine_is_up
	mkdir source states
	chown 12345:12345 states
	cp "$here/statesrv.c" "$here/Makefile" source
	make -C source image >make.out
	[ "$(docker image inspect -f '{{.Size}}' statesrv)" -lt 200000 ] || fail "$(docker images)"
	! docker run --rm --pull never statesrv >out.txt 2>&1 || fail 'it let anyone in'
	has out.txt TF_HTTP_USERNAME
	shown '# recipe: container' | sed "s/docker run/& --pull never $locked_up/" >run.sh
	id() { echo 12345; }
	# shellcheck source=/dev/null
	. ./run.sh >docker.out
	URL=http://127.0.0.1:8080
	until_true curl -s -o answer $URL/-/ready
	expect 401 GET /demo
	resources work
	aim work demo
	works work init -input=false
	works work apply -input=false -auto-approve -lock-timeout=10m
	want 'owner and mode' '12345 600' "$(stat -c '%u %a' states/demo.tfstate)"
	until_true eval '[ "$(docker inspect -f "{{.State.Health.Status}}" states)" = healthy ]'
	while state $n | curl -s -f -u "$TF_HTTP_USERNAME:$TF_HTTP_PASSWORD" \
		--data-binary @- $URL/busy; do
		echo $n >acknowledged
		n=$((n + 1))
	done &
	until_true test -s acknowledged
	docker stop -t 3 states >docker.out # and then it would be killed: status 137
	wait $!
	want 'exit status' 0 "$(docker inspect -f '{{.State.ExitCode}}' states)"
	[ "$(serial busy)" -ge "$(cat acknowledged)" ] ||
		fail "$(cat acknowledged) was acknowledged, $(serial busy) is there"

	docker rm -v states >docker.out
	make -C source image ARCH=arm64 >make.out
	want architecture linux/arm64 "$(docker image inspect -f '{{.Os}}/{{.Architecture}}' statesrv)"
	[ ! -e source/statesrv ] || fail 'a binary that does not run here is left'
	docker run -d --pull never --name states -v kept:/states -u 12345:12345 -p 127.0.0.1:8080:8080 \
		-e TF_HTTP_USERNAME -e TF_HTTP_PASSWORD --entrypoint /qemu \
		-v "$(command -v qemu-aarch64-static):/qemu:ro" statesrv \
		/statesrv -d /states -l 0.0.0.0:8080 >docker.out 2>&1
	until_true docker exec states /qemu /statesrv -c -l 127.0.0.1:8080
	state 7 >$volume/demo.tfstate
	chmod 644 $volume/demo.tfstate
	works work apply -auto-approve
	state 7 | cmp - $volume/.history/demo/*-7.tfstate
}

# browse DARK: a chromium runs the script on stdin in a page of nginx's own, which
# passes /tf/ on to us, as a front with a prefix does (but for our ban on frames).
# The script must find all as it must() be, and the console stay silent.
browse() {
	FRONT=8000
	mkdir www
	cat >front <<-EOF
	map \$upstream_http_content_security_policy \$policy {
		"~(.*)frame-ancestors[^;]*(.*)" \$1\$2;
	}
	log_format said \$args;
	server {
		listen 127.0.0.1:$FRONT;
		location / { root $T/www; }
		location /say { access_log $T/said said; return 204; }
		location /tf/ {
			proxy_pass $URL/;
			proxy_hide_header Content-Security-Policy;
			proxy_hide_header X-Frame-Options;
			add_header Content-Security-Policy \$policy;
		}
	}
	EOF
	{
		cat <<-'EOF'
		<!doctype html><meta charset=utf-8><link rel=icon href=data:,>
		<iframe width=320></iframe><script>
		const base = location.origin + '/tf/', frame = document.querySelector('iframe');
		const say = text => fetch('/say?' + encodeURIComponent(text));
		const must = (what, ok) => ok || say(what);
		const loaded = () => new Promise(f => frame.onload = () => f(frame.contentDocument));
		const go = url => (frame.src = url, loaded());
		const link = (d, text) => [...d.links].find(a => a.textContent == text);
		const calm = async d => { // no markup from outside, links that lead on
			must('markup in ' + d.URL, d.title != 1 &&
				!d.querySelector('script, img, iframe, object, embed, [onerror], #x'));
			for (const a of d.links) {
				must('a link to ' + a.href, a.href.startsWith(base));
				must('no ' + a.href, a.href.match('/frozen$') || (await fetch(a.href)).ok);
			}
			for (const e of frame.contentWindow.performance.getEntriesByType('resource'))
				must('loaded ' + e.name, e.name.startsWith(base));
			must(d.URL + ' is too wide', d.scrollingElement.scrollWidth <= 320);
			const [colour] = d.defaultView.getComputedStyle(d.body).color.match(/[0-9]+/);
			must(d.URL + ' has text of ' + colour, (colour > 127) == dark);
		};
		EOF
		echo "const dark = $1; (async () => {"
		cat
		echo '})().catch(e => say("error: " + e)).then(() => say("end"))</script>'
	} >www/index.html
	nginx_front
	mount -t tmpfs none /run
	HOME=$T TMPDIR=/run chromium --headless --no-sandbox --disable-gpu --disable-background-networking \
		--enable-logging=stderr --user-data-dir="$T/profile" \
		--blink-settings=preferredColorScheme=$((1 - $1)) \
		--host-resolver-rules='MAP evil.example 127.0.0.1' "http://127.0.0.1:$FRONT/" \
		>chromium.out 2>&1 &
	until_true grep -q '^end' said
	want 'what the script said' end "$(sed 's/%/\\x/g' said | xargs -0 printf %b)"
	hasnt chromium.out 'CONSOLE.*source: [^ ]*/tf/'
}

# The way that a person goes: search, in any case; the name; the state's page with
# what releases its lock; on to what it links. Then names, holders and versions
# that would be markup or script: they are shown as they are and do nothing.
test_the_pages_are_good_to_use_and_stay_calm() {
	local name evil='<img src=//evil.example/ onerror=document.title=1>'
	local names=('<img src=x onerror=document.title=1>' "\"'><b id=x>" '&lt;b&gt;' 'a?b#c' 'x'
		'100%25 & more' 'javascript:alert(1)' '{{7*7}}' 'data:text,x' 'ünï/cödé')
	need chromium nginx jq ip
	apart --net
	serve
	every '200 - @@' 'POST /web/shop state:1' 'POST /web/shop state:2' \
		'LOCK /web/shop info:4711'
	evil=$(jq -nc --arg e "$evil" '{ID: $e, Who: $e, Operation: $e, Info: $e,
		terraform_version: $e, lineage: $e, version: 4, serial: 1}')
	expect 200 LOCK /x "$evil"
	expect 200 POST '/x?ID=%3Cimg%20src=//evil.example/%20onerror=document.title=1%3E' "$evil"
	for name in "${names[@]}"; do
		mkdir -p "$(dirname "states/$name")"
		echo "$evil" | tee "states/$name".{lock,log} >"states/$name.tfstate"
	done
	jq -r .ID <<<"$evil" >states/frozen.lock
	browse 1 <<-EOF
	const names = $(jq -nc '$ARGS.positional' --args frozen "${names[@]}");
	const evil = $(jq .ID <<<"$evil");
	const list = await go('/tf/'), pages = names.map(name => link(list, name).href);
	await calm(list);
	must('the holders', list.body.innerText.split(evil).length > names.length);
	list.querySelector('[name=q]').value = 'WEB/SH';
	list.forms[0].requestSubmit();
	let d = await loaded();
	must('only what was found', !link(d, 'x'));
	link(d, 'web/shop').click();
	d = await loaded();
	await calm(d);
	must(d.URL, d.URL.startsWith(base + '-/versions/web/shop'));
	must('the way out', d.body.innerText.match(/test@here[^]*terraform force-unlock '?4711/));
	must('the way back', d.body.innerText.match(/curl .*Z-1'\ncurl .*old.tfstate .*web.shop'/));
	for (const to of [/web.shop\$/, /-.log.web.shop\$/, /versions.web.shop.[0-9T.]+Z-1\$/])
		must('a link ' + to, [...d.links].some(a => a.href.match(to)));
	for (const page of pages) {
		d = await go(page);
		must('evil on ' + page, d.body.innerText.includes(evil));
		await calm(d);
	}
	await calm(await go('/tf/?q=%3Cimg%20src=x%3E'));
	EOF
}

test_other_sites_can_do_nothing_through_a_browser() {
	need chromium nginx ip
	apart --net
	serve
	expect 200 POST /demo "$(state 1)"
	browse 0 <<-EOF
	for (const how of [{method: 'POST', mode: 'no-cors'}, {method: 'POST'}, {method: 'PUT'},
	    {method: 'DELETE'}, {method: 'LOCK'}, {}])
		await fetch('$URL/demo', {body: how.method && '{"version": 4, "ID": "x"}', ...how})
			.then(r => must('read, by ' + how.method, how.mode), e => 0);
	await fetch('http://evil.example:$PORT/demo', {mode: 'no-cors'});
	const d = frame.contentDocument, form = d.createElement('form');
	form.innerHTML = '<textarea name=\'{"version": 4, "a": "\'>"}</textarea>';
	Object.assign(form, {method: 'post', enctype: 'text/plain', action: '$URL/demo'});
	d.body.append(form);
	form.submit();
	await loaded();
	await calm(await go('/tf/'));
	EOF
	want 'refused for their origin' 3 "$(grep -c 'method=POST name=demo status=403' server.log)"
	until_true grep -q -- 'method=GET name=demo status=403' server.log
	want 'the state' "$(state 1)" "$(cat states/demo.tfstate)"
	[ ! -e states/demo.lock ] || fail 'somebody took the lock'
}

# Warnings are errors for OpenBSD, as far as a compiler sees without its headers;
# for a Mac; for Linux on other processors (a macro of musl's casts const away).
test_source_compiles_for_other_machines() {
	local cc target openbsd=(-U__linux__ -D__OpenBSD__ -D_DEFAULT_SOURCE -include calls.h)
	printf '%s(const char *, const char *);\n' 'int pledge' 'int unveil' 'char *strcasestr' >calls.h
	for cc in gcc clang; do
		need $cc
		CC=$cc build out -fsyntax-only "${openbsd[@]}"
	done
	need zig
	export ZIG_GLOBAL_CACHE_DIR=$T/zig ZIG_LOCAL_CACHE_DIR=$T/zig
	for target in {aarch64,x86_64}-macos {aarch64,s390x,riscv64}-linux-musl arm-linux-musleabihf; do
		CC="zig cc -target $target" build out.o -Os -c -Wno-cast-qual
	done
}

# foreign MACHINE [FLAG...]: the server is that one's from here on, built by CROSS.
foreign() {
	CROSS=$1-linux-gnu-gcc
	[ "$1" != arm ] || CROSS=arm-linux-gnueabihf-gcc
	need "$CROSS" "qemu-$1-static"
	CC=$CROSS build "foreign.$1" -O1 -static "${@:2}"
	through "exec qemu-$1-static $T/foreign.$1"
}

# The digests, JSON, names and the parser by their tables; a whole session,
# its secrets by SHA-256 and its states by MD5, a large one too; a version.
test_source_serves_on_other_processors() {
	local machine other='Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg=='
	{ state 1 && head -c 300000 /dev/zero | tr '\0' ' '; } >one
	install -m 600 <(echo "ann sha256:$(printf s3cret | sha256sum | cut -c 1-64) write") users
	units_source >units.c
	for machine in aarch64 arm s390x; do
		foreign $machine
		"$CROSS" -std=gnu11 -w -O1 -static -pthread -o units units.c
		units_pass "qemu-$machine-static" ./units
		serve_as $machine -d $machine -u users
		rows <<-'EOF'
		401 ann:other LOCK /team/a info:me
		200 ann:s3cret LOCK /team/a info:me
		423 ann:s3cret LOCK /team/a info:you	"ID":"me"
		400 ann:s3cret LOCK /a//b info:me
		400 ann:s3cret POST /b {"version":4,}
		EOF
		rows -H "$other" <<<'400 ann:s3cret POST /team/a?ID=me @one'
		rows -H "Content-MD5: $(body_md5 one)" <<<'200 ann:s3cret POST /team/a?ID=me @one'
		rows <<<'200 ann:s3cret GET /team/a -'
		cmp answer one
		rows <<-'EOF'
		423 ann:s3cret POST /team/a state:2	"ID":"me"
		200 ann:s3cret POST /team/a?ID=me state:2
		200 ann:s3cret UNLOCK /team/a info:me
		EOF
		every '200 ann:s3cret GET /-/versions/team/a/@@ -' \
			"$(basename $machine/.history/team/a/* .tfstate)"
		cmp answer one
	done
}

# Promise 3 on machines of both byte orders: both wait for who has the name's byte of
# .guard; of two that ask at once one gets the lock. The byte never changes: SHA-256,
# two words of four bytes, each with its lowest byte first, without the highest 2 bits.
test_source_guards_the_same_byte_on_every_machine() {
	local native=$STATESRV big name statuses h
	need perl
	grumbles
	foreign s390x
	serve_as big -d states
	big=$URL
	STATESRV=$native serve_as little -d states
	h=$(printf held | sha256sum)
	h=${h:6:2}${h:4:2}${h:2:2}${h:0:2}${h:14:2}${h:12:2}${h:10:2}${h:8:2}
	perl -MFcntl -e 'open F, "+<", "states/.guard" and fcntl(F, F_SETLK, pack("s2x4q2lx4",
		F_WRLCK, 0, $ARGV[0], 1, 0)) or die "$!"; system "touch held"; sleep 60' \
		$((16#$h & (1 << 62) - 1)) &
	echo $! >>"$T/pids"
	until_true test -e held
	while read -r name statuses; do
		curl -s -m 9 -o a -w '%{http_code}\n' -X LOCK -d '{"ID":"big"}' "$big/$name" >st.1 &
		curl -s -m 9 -o b -w '%{http_code}\n' -X LOCK -d '{"ID":"little"}' "$URL/$name" >st.2
		wait $!
		want "LOCK $name" "$statuses" "$(sort st.? | xargs)"
	done < <(echo held 503 503; printf '%s 200 423\n' free{1..20})
}

# A clock twenty years ahead and a file of 2040, where a long has 32 bits.
test_source_knows_dates_after_2038_on_32_bits() {
	local ahead=631139040
	need arm-linux-gnueabihf-gcc
	cat >ahead.c <<-EOF
	#include <time.h>
	int __real___clock_gettime64(clockid_t, struct timespec *);
	int __wrap___clock_gettime64(clockid_t which, struct timespec *t)
	{
		int rc = __real___clock_gettime64(which, t);
		t->tv_sec += which == CLOCK_REALTIME ? $ahead : 0;
		return rc;
	}
	EOF
	arm-linux-gnueabihf-gcc -D_TIME_BITS=64 -D_FILE_OFFSET_BITS=64 -c ahead.c
	foreign arm ahead.o -Wl,--wrap=__clock_gettime64
	mkdir states
	state 1 >states/demo.tfstate
	touch -d 2040-02-03T12:00Z states/demo.tfstate
	serve
	rows -H 'Accept: application/json' <<-EOF
	200 - GET / -	"modified": *"2040-02-03
	200 - POST /demo state:2
	200 - GET /-/versions/demo -	"replaced": *"$(date -u -d "$ahead seconds" +%Y)-
	EOF
}

# Where Demo and demo would be one file under two guards and two rights, names
# keep to small letters: where a build pretends it, and on exFAT.
test_source_refuses_capitals_where_a_file_system_would_fold_them() {
	build folding -O1 -DFOLD
	STATESRV=$T/folding small_letters
}

test_source_finds_a_file_system_that_folds() {
	need mkfs.exfat mount.exfat-fuse
	grumbles # FUSE may be a network's
	apart --mount
	truncate -s 16M image
	mkfs.exfat image >mkfs.out
	mkdir states
	mount -t exfat-fuse -o loop,umask=077 image states 2>mount.out || skip "$(cat mount.out)"
	small_letters
}

small_letters() {
	install -m 600 <(printf 'ann s3cret write\ndan s3cret write D*\n') users
	serve -u users
	every $'400 ann:s3cret @@\tcase' 'POST /Demo state:1' 'LOCK /team/Prod info:a' \
		'GET /%C3%BC -'
	every '200 ann:s3cret @@' 'POST /demo state:1' 'LOCK /demo info:a' 'POST /demo?ID=a state:2'
	rows <<<'403 dan:s3cret GET /demo'
	want 'the version' "$(state 1)" "$(cat states/.history/demo/*-1.tfstate)"
	refuses 2 'Demo: .*case' -d states Demo true
}

# ---- ./test.sh bench ------------------------------------------------------
#
# What a user would notice, beside nginx (one process, sendfile, PUT by its dav
# module), which neither syncs a write nor keeps the version before. Turn about,
# three rounds, ratios of medians: absolute figures are those of the machine.

bench() {
	local size server row what connections options
	declare -A pid url
	type nginx wrk curl ip >/dev/null || return
	apart --net
	echo reno >/proc/sys/net/ipv4/tcp_congestion_control # that nothing is paced
	mkdir states www
	for size in 4096 65536 1048576 209715200; do
		printf '{"version": 4, "serial": 1, "x": "%0*d"}' $((size - 36)) 1 >www/get$size
		ln www/get$size states/get$size.tfstate
	done
	serve_as server -d states -k 1
	pid[statesrv]=$PID url[statesrv]=$URL
	FRONT=8080
	echo "sendfile on; tcp_nopush on; client_max_body_size 0; keepalive_requests 1000000000;
		server { listen 127.0.0.1:$FRONT backlog=4096; root $T/www; dav_methods PUT; }" >front
	nginx_front
	pid[nginx]=$PID url[nginx]=http://127.0.0.1:$FRONT
	# No body is like another: each has a serial of its own.
	cat >put.lua <<-'EOF'
	local size, n, x = tonumber(os.getenv("SIZE")), 0
	local names = size > 100000 and 64 or 256
	function init() x = ', "x": "' .. ("x"):rep(size - 45) .. '"}' end
	function request()
		n = n + 1
		return wrk.format("PUT", "/put" .. size .. "-" .. n % names, nil,
			'{"version": 4, "serial": ' .. 1000000000 + n .. x)
	end
	EOF
	while IFS='|' read -r row what size connections options <&3; do
		for server in statesrv nginx; do
			# shellcheck disable=SC2086
			echo "$row|$server|$("bench_$what" $options)" >>rates
		done
	done 3< <(bench_rows && bench_rows && bench_rows)
	printf 'binary, bytes|%s|%s\n' statesrv "$(stat -L -c %s "$STATESRV")" \
		nginx "$(stat -L -c %s "$(command -v nginx)")" >>rates
	echo 'statesrv / nginx'
	sort -t '|' -k 3n rates | awk -F '|' '
	NR == FNR { if (!seen[$1]++) row[++rows] = $1; next }
	{ key = $1 FS $2; value[key, ++n[key]] = $3 }
	function median(key) { return value[key, int((n[key] + 1) / 2)] }
	END { for (r = 1; r <= rows; r++) printf "%9.2f  %s\n",
		median(row[r] FS "statesrv") / median(row[r] FS "nginx"), row[r] }' rates -
}

bench_rows() {
	cat <<-'EOF'
	memory, 200 MiB up and down|memory|209715200|1
	GET 4 KiB, 1 connection|wrk|4096|1
	GET 4 KiB, 64 connections|wrk|4096|64
	GET 64 KiB, 16 connections|wrk|65536|16
	GET 1 MiB, 16 connections|wrk|1048576|16
	GET 4 KiB beside 16 writers|beside|4096|4
	GET 4 KiB, new connections|wrk|4096|16|-H Connection:close
	write 4 KiB, 1 connection|wrk|4096|1|-s put.lua
	write 4 KiB, 16 connections|wrk|4096|16|-s put.lua
	write 4 KiB, 64 connections|wrk|4096|64|-s put.lua
	write 1 MiB, 16 connections|wrk|1048576|16|-s put.lua
	EOF
}

# What each prints: requests a second, and on stderr if any failed; or KiB.
bench_wrk() {
	SIZE=$size wrk -t 1 -c "$connections" -d 1 "$@" "${url[$server]}/get$size" |
		sed -n -e '/Non-2xx\|Socket errors/w /dev/stderr' -e 's/^Requests.sec: *//p'
}

bench_beside() {
	connections=16 bench_wrk -s put.lua -d 2 >/dev/null &
	sleep 0.5
	bench_wrk
	wait $!
}

bench_memory() {
	echo 5 >"/proc/${pid[$server]}/clear_refs" # the peak from here on
	curl -s -f -o /dev/null -T "www/get$size" "${url[$server]}/big"
	curl -s -f -o /dev/null "${url[$server]}/big"
	sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/${pid[$server]}/status"
}
# ---- the source itself -----------------------------------------------------

# The map in the opening comment is the banner titles, in their order.
test_source_map_names_the_sections() {
	sed -n 's/^\/\* ==== \(.*[^ =]\) =*\( \*\/\)*$/\1/p' "$here/statesrv.c" >banners
	sed -n '/^ \* The map;/,/^ \* Copyright/s/^ \*	\(.*\)/\1/p' "$here/statesrv.c" >map
	[ "$(wc -l <map)" -gt 10 ] || fail 'no map'
	diff map banners
}

test_source_has_a_test_for_each_promise() {
	local n
	for n in 1 2 3 4 5 6 7 8 9; do
		has "$here/test.sh" "[Pp]romise $n"
	done
}

test_source_is_clean_under_every_compiler() {
	local cc
	for cc in gcc clang musl-gcc; do
		need $cc
		CC=$cc build out -O2
	done
}

# The program as it is shipped: below 90 KiB, or 160 KiB with its libc.
test_source_is_a_small_program() {
	need gcc musl-gcc
	CC=musl-gcc build out "${shipped[@]}" -static -s
	[ "$(wc -c <out)" -lt 163840 ] || fail "static: $(wc -c <out) bytes"
	[ "$(uname -m)" = x86_64 ] || return 0
	CC=gcc build out "${shipped[@]}" -s
	[ "$(wc -c <out)" -lt 92160 ] || fail "dynamic: $(wc -c <out) bytes"
}

test_source_is_clean_under_cppcheck_and_shellcheck() {
	need cppcheck shellcheck
	cppcheck -q --std=c11 --enable=warning,performance,portability \
		--inline-suppr --error-exitcode=1 "$here/statesrv.c"
	shellcheck "$here/test.sh" "$here/.ci/run"
}

# Nothing is read before it was written, nothing is lost, nothing is read after it was freed.
test_valgrind_finds_nothing() {
	need valgrind
	grumbles
	through "exec valgrind -q --error-exitcode=99 --leak-check=full \
		--show-leak-kinds=definite --errors-for-leak-kinds=definite '$work/release'"
	[ -x "$work/release" ] || build "$work/release" "${shipped[@]}"
	install -m 600 <(echo 'ann s3cret write') users
	PATIENCE=60
	serve -u users -k 2
	local i
	pad 1 300000 >whole
	(mkdir user && cd user && use_all 1)
	rows -H 'Transfer-Encoding: chunked' <<<'200 ann:s3cret PUT /big @whole'
	rows <<-'EOF'
		200 ann:s3cret LOCK /team/s1 info:me
		423 ann:s3cret LOCK /team/s1 info:you
		400 ann:s3cret PUT /big {"a":
		401 - GET /big -
		401 ann:wrong GET /big -
	EOF
	for i in / '/?q=A' '/?locked' /-/metrics /-/ready /-/versions/team/s1 \
		/-/log/team/s1 /big /team/s1; do
		rows -H 'Accept: text/html' <<<"200 ann:s3cret GET $i -"
		rows -H 'Accept: application/json' <<<"200 ann:s3cret GET $i -"
	done
	rows <<<'200 ann:s3cret DELETE /team/s1?ID=me -'
	printf 'PUT /big HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{' | raw 1 >answers
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
		build "$work/sanitized" -O1 -g -DNO_SANDBOX -DSMALL=256 \
			-DTHREADS_MAX=24 -DTHREAD_STACK=1048576 \
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
	skip)
		echo "SKIP  $BUILD $1: $(cat "$T/skipped")"
		sed 's/^no \(.*\) here$/\1/' "$T/skipped" >"$T.skip"
		;;
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

# run_all WORD...: on each build, JOBS tests at a time. What tests the source runs once.
run_all() {
	local t given=${STATESRV-} running=0
	for BUILD in ${given:+given} ${given:-release sanitized}; do
		[ "$BUILD" != "$given" ] || continue
		STATESRV=${given:-$work/$BUILD}
		for t in $(chosen "$@"); do
			[[ $BUILD != sanitized || $t != test_source_* ]] || continue
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
	local failed why word
	work=$(mktemp -d "${TMPDIR:-/tmp}/statesrv-test.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	mkdir "$work/run"
	case ${1-} in
	list) all_tests | sed 's/^test_//' && return ;;
	crash | fuzz | bench) ;;
	*)
		for word; do
			[ -n "$(chosen "$word")" ] ||
				{ echo "no test has a name with $word in it" >&2 && exit 2; }
		done
		;;
	esac
	[ -n "${STATESRV-}" ] || build_both || exit 1
	case ${1-} in
	crash | fuzz | bench)
		STATESRV=${STATESRV:-$work/release}
		T=$work/run/$1 BUILD=release
		mkdir "$T" && cd "$T" || exit 1
		"$@"
		exit
		;;
	esac
	run_all "$@"
	failed=$(count fail)
	[ "$failed" = 0 ] || {
		echo "failed:"
		grep -l '^fail$' "$work"/run/*.result | sed 's|.*/run/\(.*\).result|	\1|'
	}
	why=$(cat "$work"/run/*.skip 2>/dev/null | sort | uniq -c | sort -rn |
		sed 's/^ *\([0-9]*\) \(.*\)/\2 \1/' | paste -s -d , | sed 's/,/, /g')
	[ -z "$why" ] || echo "$(count skip) skipped: $why"
	echo "$(count ok) passed, $failed failed, $(count skip) skipped"
	[ "$failed" = 0 ]
}

main "$@"
