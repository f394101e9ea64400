#!/usr/bin/env bash
# Quorate with nothing but curl: the JSON gateway on the client port.
#
#     examples/clients/curl.sh [HOST:PORT]
#
# Bytes are base64, 64-bit numbers are strings, a field that is unset is left out. Any member may be asked.
set -euo pipefail

url="http://${1:-127.0.0.1:2379}/v3"
encode() { printf %s "$1" | base64; }
# Looks for a text in a file until it is there, for at most 30 s.
appears() {
  for _ in {1..300}; do
    if grep -q "$1" "$2"; then return; fi
    sleep 0.1
  done
  echo "$1 did not come: $(cat "$2")" >&2
  return 1
}
post() { curl --silent --show-error --fail-with-body "$url/$1" --data "$2"; }

echo "- put greeting = hello"
post kv/put "{\"key\": \"$(encode greeting)\", \"value\": \"$(encode hello)\"}"

echo -e "\n- get greeting"
post kv/range "{\"key\": \"$(encode greeting)\"}"

echo -e "\n- every key that begins with \"gree\": up to the first that does not"
post kv/range "{\"key\": \"$(encode gree)\", \"range_end\": \"$(encode gref)\", \"keys_only\": true}"

echo -e "\n- if greeting is hello, make it goodbye, else read it"
post kv/txn "{
  \"compare\": [{\"key\": \"$(encode greeting)\", \"target\": \"VALUE\", \"value\": \"$(encode hello)\"}],
  \"success\": [{\"request_put\": {\"key\": \"$(encode greeting)\", \"value\": \"$(encode goodbye)\"}}],
  \"failure\": [{\"request_range\": {\"key\": \"$(encode greeting)\"}}]
}"

echo -e "\n- watch it: one line an event, from the first answer on, until we have seen one"
watched=$(mktemp)
curl --silent --no-buffer --max-time 30 "$url/watch" \
  --data "{\"create_request\": {\"key\": \"$(encode greeting)\"}}" >"$watched" &
watcher=$!
trap 'kill "$watcher" 2>/dev/null || true; rm -f "$watched"' EXIT
appears '"created":true' "$watched"
post kv/put "{\"key\": \"$(encode greeting)\", \"value\": \"$(encode again)\"}" >/dev/null
appears '"events"' "$watched"
grep '"events"' "$watched"

echo "- delete it"
post kv/deleterange "{\"key\": \"$(encode greeting)\"}"

echo -e "\n- a refusal has a code and a text"
post kv/range "{\"key\": \"$(encode greeting)\", \"revision\": \"999999999\"}" || true
echo -e "\n- done"
