//! `get`, `put`, `del` and `compact`.
//!
//! Keys and values are bytes throughout: arguments are taken as the system gives them, and output is raw unless JSON is
//! asked for.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, ensure};
use bytes::Bytes;
use serde_json::json;

use super::client::{ANSWER_BYTES_MAX, ClientArgs};
use super::credentials::Channel;
use super::output::{Format, header_json, json_line, key_value_json};
use crate::pb::KeyValue;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::{
    CompactionRequest, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
};

/// Most bytes of a value from standard input; every server refuses less.
const STDIN_BYTES_MAX: u64 = 64 << 20;

/// One key, or an interval of keys.
#[derive(Debug, clap::Args)]
pub struct KeyRange {
    /// The key, or the first one
    key: OsString,
    /// The first key that is no longer meant
    range_end: Option<OsString>,
    /// All keys that begin with KEY
    #[arg(long, conflicts_with_all = ["range_end", "from_key"])]
    prefix: bool,
    /// All keys from KEY on
    #[arg(long, conflicts_with = "range_end")]
    from_key: bool,
}

#[derive(Debug, clap::Args)]
pub struct GetArgs {
    #[command(flatten)]
    range: KeyRange,
    /// Most keys to print; 0: all
    #[arg(long, default_value_t = 0)]
    limit: i64,
    /// As of this revision; 0: now
    #[arg(long, default_value_t = 0)]
    rev: i64,
    /// Take the answer of the one member that is asked; it may be behind
    #[arg(long)]
    serializable: bool,
    /// Print no values
    #[arg(long, conflicts_with_all = ["count_only", "print_value_only"])]
    keys_only: bool,
    /// Print how many keys there are, and nothing else
    #[arg(long, conflicts_with = "print_value_only")]
    count_only: bool,
    /// Print no keys
    #[arg(long)]
    print_value_only: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct PutArgs {
    key: OsString,
    /// The value; left out: standard input to its end
    value: Option<OsString>,
    /// The key goes when this lease ends; hexadecimal
    #[arg(long, value_parser = super::lease::parse_id)]
    lease: Option<i64>,
    /// Print what was there before
    #[arg(long)]
    prev_kv: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct DelArgs {
    #[command(flatten)]
    range: KeyRange,
    /// Print what was deleted
    #[arg(long)]
    prev_kv: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct CompactArgs {
    /// The oldest revision that can still be read afterwards
    revision: i64,
    /// Wait until the space is free
    #[arg(long)]
    physical: bool,
    #[command(flatten)]
    client: ClientArgs,
}

impl KeyRange {
    /// Key and range end, as the API means them.
    pub(super) fn bounds(&self) -> (Bytes, Bytes) {
        const FROM_HERE_ON: &[u8] = b"\0";
        let key = self.key.as_bytes();
        let end = match &self.range_end {
            _ if self.prefix => prefix_end(key),
            _ if self.from_key => FROM_HERE_ON.to_vec(),
            Some(end) => end.as_bytes().to_vec(),
            None => Vec::new(),
        };
        // No key is empty: the least one stands for "from the beginning".
        let everything = key.is_empty() && (self.prefix || self.from_key);
        (Bytes::copy_from_slice(if everything { FROM_HERE_ON } else { key }), end.into())
    }
}

/// The first key after all that begin with `prefix`; "\0", the end of all keys, if there is none.
pub(super) fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    match prefix.iter().rposition(|byte| *byte != 0xff) {
        Some(last) => {
            let mut end = prefix[..=last].to_vec();
            end[last] += 1;
            end
        }
        None => vec![0],
    }
}

async fn connect(client: &ClientArgs) -> anyhow::Result<KvClient<Channel>> {
    Ok(KvClient::new(client.connect().await?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

pub async fn get(args: GetArgs) -> anyhow::Result<Vec<u8>> {
    let (key, range_end) = args.range.bounds();
    let request = RangeRequest {
        key,
        range_end,
        limit: args.limit,
        revision: args.rev,
        serializable: args.serializable,
        keys_only: args.keys_only,
        count_only: args.count_only,
        ..RangeRequest::default()
    };
    let mut client = connect(&args.client).await?;
    let answer = args.client.answer(client.range(request)).await?.into_inner();
    Ok(format_get(&args, &answer))
}

fn format_get(args: &GetArgs, answer: &RangeResponse) -> Vec<u8> {
    if args.output == Format::Json {
        return json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "kvs": answer.kvs.iter().map(key_value_json).collect::<Vec<_>>(),
            "more": answer.more,
            "count": answer.count,
        }));
    }
    if args.count_only {
        return format!("{}\n", answer.count).into_bytes();
    }
    let mut out = Vec::new();
    for kv in &answer.kvs {
        if !args.print_value_only {
            line(&mut out, kv.key());
        }
        if !args.keys_only {
            line(&mut out, kv.value());
        }
    }
    out
}

fn line(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
    out.push(b'\n');
}

pub(super) fn key_value_lines(out: &mut Vec<u8>, kv: &KeyValue) {
    line(out, kv.key());
    line(out, kv.value());
}

pub async fn put(args: PutArgs) -> anyhow::Result<Vec<u8>> {
    let value = match &args.value {
        Some(value) => Bytes::copy_from_slice(value.as_bytes()),
        None => read_value(std::io::stdin().lock())?,
    };
    let key = Bytes::copy_from_slice(args.key.as_bytes());
    let lease = args.lease.unwrap_or(0);
    let request = PutRequest { key, value, lease, prev_kv: args.prev_kv, ..PutRequest::default() };
    let mut client = connect(&args.client).await?;
    let answer = args.client.answer(client.put(request)).await?.into_inner();
    Ok(format_put(args.output, &answer))
}

fn read_value(input: impl Read) -> anyhow::Result<Bytes> {
    let mut value = Vec::new();
    input.take(STDIN_BYTES_MAX + 1).read_to_end(&mut value).context("cannot read the value from standard input")?;
    let too_large = "the value on standard input is larger than 64 MiB, and no server takes that; give a smaller one";
    ensure!(value.len() as u64 <= STDIN_BYTES_MAX, too_large);
    Ok(value.into())
}

fn format_put(format: Format, answer: &PutResponse) -> Vec<u8> {
    if format == Format::Json {
        let mut object = json!({ "header": header_json(answer.header.as_ref()) });
        if let Some(kv) = &answer.prev_kv {
            object["prev_kv"] = key_value_json(kv);
        }
        return json_line(&object);
    }
    let mut out = b"OK\n".to_vec();
    if let Some(kv) = &answer.prev_kv {
        key_value_lines(&mut out, kv);
    }
    out
}

pub async fn del(args: DelArgs) -> anyhow::Result<Vec<u8>> {
    let (key, range_end) = args.range.bounds();
    let mut client = connect(&args.client).await?;
    let request = DeleteRangeRequest { key, range_end, prev_kv: args.prev_kv };
    let answer = args.client.answer(client.delete_range(request)).await?.into_inner();
    Ok(format_del(args.output, &answer))
}

fn format_del(format: Format, answer: &DeleteRangeResponse) -> Vec<u8> {
    if format == Format::Json {
        return json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "deleted": answer.deleted,
            "prev_kvs": answer.prev_kvs.iter().map(key_value_json).collect::<Vec<_>>(),
        }));
    }
    let mut out = format!("{}\n", answer.deleted).into_bytes();
    answer.prev_kvs.iter().for_each(|kv| key_value_lines(&mut out, kv));
    out
}

pub async fn compact(args: CompactArgs) -> anyhow::Result<Vec<u8>> {
    let request = CompactionRequest { revision: args.revision, physical: args.physical };
    let mut client = connect(&args.client).await?;
    args.client.answer(client.compact(request)).await?;
    Ok(format!("compacted revision {}\n", args.revision).into_bytes())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::pb::Fields;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        get: GetArgs,
    }

    fn parse(words: &[&str]) -> GetArgs {
        Line::try_parse_from(std::iter::once(&"x").chain(words)).unwrap().get
    }

    #[test]
    fn ranges_are_as_the_api_means_them() {
        let cases: [(&[&str], &[u8], &[u8]); 7] = [
            (&["k"], b"k", b""),
            (&["a", "c"], b"a", b"c"),
            (&["ab", "--prefix"], b"ab", b"ac"),
            (&["k", "--from-key"], b"k", b"\0"),
            (&["", "--prefix"], b"\0", b"\0"),
            (&["", "--from-key"], b"\0", b"\0"),
            (&["--", "-k"], b"-k", b""),
        ];
        for (words, key, end) in cases {
            assert_eq!(parse(words).range.bounds(), (Bytes::from_static(key), Bytes::from_static(end)), "{words:?}");
        }
        assert_eq!(prefix_end(b"a\xff\xff"), b"b");
        assert_eq!(prefix_end(b"\xff\xff"), b"\0");
    }

    fn answer() -> RangeResponse {
        let kv = |key, value| KeyValue::new(Fields { key, value, version: 1, ..Fields::default() });
        RangeResponse { kvs: vec![kv(b"a", b"1\xff"), kv(b"b", b"")], count: 2, ..RangeResponse::default() }
    }

    #[test]
    fn get_prints_raw_lines() {
        let cases: [(&[&str], &[u8]); 4] = [
            (&["a"], b"a\n1\xff\nb\n\n"),
            (&["a", "--print-value-only"], b"1\xff\n\n"),
            (&["a", "--keys-only"], b"a\nb\n"),
            (&["a", "--count-only"], b"2\n"),
        ];
        for (words, expected) in cases {
            assert_eq!(format_get(&parse(words), &answer()), expected, "{words:?}");
        }
        assert_eq!(format_get(&parse(&["a"]), &RangeResponse::default()), b"");
    }

    #[test]
    fn get_prints_json_with_base64() {
        let text = format_get(&parse(&["a", "-o", "json"]), &answer());
        let object: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!((&object["count"], &object["kvs"][0]["key"]), (&json!(2), &json!("YQ==")));
        assert_eq!(object["kvs"][0]["value"], json!("Mf8="));
    }

    #[test]
    fn put_and_del_print_former_values() {
        let put = PutResponse { prev_kv: Some(answer().kvs.remove(0)), ..PutResponse::default() };
        assert_eq!(format_put(Format::Simple, &put), b"OK\na\n1\xff\n");
        assert!(format_put(Format::Json, &put).starts_with(b"{\"header\":"));
        let del = DeleteRangeResponse { deleted: 2, prev_kvs: answer().kvs, ..DeleteRangeResponse::default() };
        assert_eq!(format_del(Format::Simple, &del), b"2\na\n1\xff\nb\n\n");
    }

    #[test]
    fn value_from_standard_input_is_taken_as_it_is() {
        assert_eq!(read_value(&b"a\0\xff\n"[..]).unwrap(), b"a\0\xff\n"[..]);
        assert!(read_value(std::io::repeat(0)).unwrap_err().to_string().contains("larger than 64 MiB"));
    }
}
