//! `put`, `del` and `compact`, and what they share with `get` and `txn`.
//!
//! Keys and values are bytes throughout: arguments are taken as the system gives them, and output is raw unless JSON is
//! asked for, or a terminal is written to.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Read};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use serde_json::{Value, json};

use super::client::{ANSWER_BYTES_MAX, ClientArgs};
use super::credentials::Channel;
use super::output::{Format, Lines, escaped, header_json, json_line, key_value_json};
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::{
    CompactionRequest, Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
    RequestOp, TxnRequest, compare, request_op, response_op,
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

/// What is written; also in a transaction.
#[derive(Debug, clap::Args)]
pub struct Write {
    key: OsString,
    /// The value; left out: standard input to its end
    #[arg(conflicts_with = "ignore_value")]
    value: Option<OsString>,
    /// The key goes when this lease ends; hexadecimal
    #[arg(long, value_parser = super::lease::parse_id, conflicts_with = "ignore_lease")]
    lease: Option<i64>,
    /// Print what was there before
    #[arg(long)]
    prev_kv: bool,
    /// Leave the value as it is, and change the lease alone
    #[arg(long)]
    ignore_value: bool,
    /// Leave the lease as it is, and change the value alone
    #[arg(long)]
    ignore_lease: bool,
}

#[derive(Debug, clap::Args)]
pub struct PutArgs {
    #[command(flatten)]
    write: Write,
    /// Only if the last change of the key was at this revision; else nothing is written, and the exit code is 1
    #[arg(long, value_name = "REVISION", conflicts_with = "if_absent", value_parser = clap::value_parser!(i64).range(1..))]
    if_rev: Option<i64>,
    /// Only if the key does not exist; else nothing is written, and the exit code is 1
    #[arg(long)]
    if_absent: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// What is deleted; also in a transaction.
#[derive(Debug, clap::Args)]
pub struct Delete {
    #[command(flatten)]
    range: KeyRange,
    /// Print what was deleted
    #[arg(long)]
    prev_kv: bool,
}

#[derive(Debug, clap::Args)]
pub struct DelArgs {
    #[command(flatten)]
    delete: Delete,
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
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
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

pub(super) async fn connect(client: &ClientArgs) -> anyhow::Result<KvClient<Channel>> {
    Ok(KvClient::new(client.connect().await?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

impl Write {
    /// With the value of `stdin` where none is given: once, at most.
    pub fn request(&self, stdin: impl FnOnce() -> anyhow::Result<Bytes>) -> anyhow::Result<PutRequest> {
        let value = match &self.value {
            Some(value) => Bytes::copy_from_slice(value.as_bytes()),
            None if self.ignore_value => Bytes::new(),
            None => stdin()?,
        };
        Ok(PutRequest {
            key: Bytes::copy_from_slice(self.key.as_bytes()),
            value,
            lease: self.lease.unwrap_or(0),
            prev_kv: self.prev_kv,
            ignore_value: self.ignore_value,
            ignore_lease: self.ignore_lease,
        })
    }
}

impl Delete {
    pub fn request(&self) -> DeleteRangeRequest {
        let (key, range_end) = self.range.bounds();
        DeleteRangeRequest { key, range_end, prev_kv: self.prev_kv }
    }
}

pub async fn put(args: PutArgs) -> anyhow::Result<Vec<u8>> {
    let request = args.write.request(|| {
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            eprintln!("quorate: type the value, and end it with Ctrl-D on a line of its own");
        }
        read_value(stdin.lock())
    })?;
    let mut client = connect(&args.client).await?;
    let answer = match (args.if_rev, args.if_absent) {
        (None, false) => args.client.answer(client.put(request)).await?.into_inner(),
        (condition, _) => put_if(&args.client, &mut client, request, condition).await?,
    };
    Ok(format_put(args.output, &answer))
}

/// Writes only if the key's last change was at `revision`; `None`: only if there is no such key.
async fn put_if(
    args: &ClientArgs,
    client: &mut KvClient<Channel>,
    put: PutRequest,
    revision: Option<i64>,
) -> anyhow::Result<PutResponse> {
    let key = put.key.clone();
    let read = RangeRequest { key: key.clone(), keys_only: true, ..RangeRequest::default() };
    let compare = Compare {
        key: key.clone(),
        target: compare::CompareTarget::Mod.into(),
        result: compare::CompareResult::Equal.into(),
        // Of what does not exist it is 0.
        target_union: Some(compare::TargetUnion::ModRevision(revision.unwrap_or(0))),
        ..Compare::default()
    };
    let op = |request| vec![RequestOp { request: Some(request) }];
    let txn = TxnRequest {
        compare: vec![compare],
        success: op(request_op::Request::RequestPut(put)),
        failure: op(request_op::Request::RequestRange(read)),
    };
    let answer = args.answer(client.txn(txn)).await?.into_inner();
    let header = answer.header;
    match answer.responses.into_iter().next().and_then(|one| one.response) {
        Some(response_op::Response::ResponsePut(put)) => Ok(PutResponse { header, ..put }),
        Some(response_op::Response::ResponseRange(found)) => {
            let is = match found.kvs.first() {
                Some(kv) => format!("it was last changed at revision {}", kv.mod_revision()),
                None => "it does not exist".to_owned(),
            };
            let wanted = revision.map_or("--if-absent".to_owned(), |revision| format!("--if-rev {revision}"));
            bail!("{:?} is not written, because of {wanted}: {is}", escaped(&key, &[]))
        }
        _ => bail!("the answer does not fit the request; see the server's version with `quorate status`"),
    }
}

fn read_value(input: impl Read) -> anyhow::Result<Bytes> {
    let mut value = Vec::new();
    input.take(STDIN_BYTES_MAX + 1).read_to_end(&mut value).context("cannot read the value from standard input")?;
    let too_large = "the value on standard input is larger than 64 MiB, and no server takes that; give a smaller one";
    ensure!(value.len() as u64 <= STDIN_BYTES_MAX, too_large);
    Ok(value.into())
}

pub fn put_json(answer: &PutResponse) -> Value {
    let mut object = json!({ "header": header_json(answer.header.as_ref()) });
    if let Some(kv) = &answer.prev_kv {
        object["prev_kv"] = key_value_json(kv);
    }
    object
}

pub fn put_lines(lines: &mut Lines, answer: &PutResponse) {
    lines.text("OK");
    answer.prev_kv.iter().for_each(|kv| lines.key_value(kv));
}

fn format_put(format: Format, answer: &PutResponse) -> Vec<u8> {
    if format == Format::Json {
        return json_line(&put_json(answer));
    }
    let mut lines = Lines::new(false);
    put_lines(&mut lines, answer);
    lines.finish()
}

pub async fn del(args: DelArgs) -> anyhow::Result<Vec<u8>> {
    let mut client = connect(&args.client).await?;
    let answer = args.client.answer(client.delete_range(args.delete.request())).await?.into_inner();
    Ok(format_del(args.output, &answer))
}

pub fn del_json(answer: &DeleteRangeResponse) -> Value {
    json!({
        "header": header_json(answer.header.as_ref()),
        "deleted": answer.deleted,
        "prev_kvs": answer.prev_kvs.iter().map(key_value_json).collect::<Vec<_>>(),
    })
}

pub fn del_lines(lines: &mut Lines, answer: &DeleteRangeResponse) {
    lines.text(&answer.deleted.to_string());
    answer.prev_kvs.iter().for_each(|kv| lines.key_value(kv));
}

fn format_del(format: Format, answer: &DeleteRangeResponse) -> Vec<u8> {
    if format == Format::Json {
        return json_line(&del_json(answer));
    }
    let mut lines = Lines::new(false);
    del_lines(&mut lines, answer);
    lines.finish()
}

pub async fn compact(args: CompactArgs) -> anyhow::Result<Vec<u8>> {
    let request = CompactionRequest { revision: args.revision, physical: args.physical };
    let mut client = connect(&args.client).await?;
    let answer = args.client.answer(client.compact(request)).await?.into_inner();
    Ok(match args.output {
        Format::Simple => format!("compacted revision {}\n", args.revision).into_bytes(),
        Format::Json => {
            json_line(&json!({ "header": header_json(answer.header.as_ref()), "compacted": args.revision }))
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::pb::{Fields, KeyValue};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        range: KeyRange,
    }

    fn parse(words: &[&str]) -> KeyRange {
        Line::try_parse_from(std::iter::once(&"x").chain(words)).unwrap().range
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
            assert_eq!(parse(words).bounds(), (Bytes::from_static(key), Bytes::from_static(end)), "{words:?}");
        }
        assert_eq!(prefix_end(b"a\xff\xff"), b"b");
        assert_eq!(prefix_end(b"\xff\xff"), b"\0");
    }

    fn former() -> KeyValue {
        KeyValue::new(Fields { key: b"a", value: b"1\xff", version: 1, ..Fields::default() })
    }

    #[test]
    fn put_and_del_print_former_values() {
        let put = PutResponse { prev_kv: Some(former()), ..PutResponse::default() };
        assert_eq!(format_put(Format::Simple, &put), b"OK\na\n1\xff\n");
        assert!(format_put(Format::Json, &put).starts_with(b"{\"header\":"));
        let del = DeleteRangeResponse { deleted: 2, prev_kvs: vec![former()], ..DeleteRangeResponse::default() };
        assert_eq!(format_del(Format::Simple, &del), b"2\na\n1\xff\n");
    }

    #[test]
    fn value_from_standard_input_is_taken_as_it_is() {
        assert_eq!(read_value(&b"a\0\xff\n"[..]).unwrap(), b"a\0\xff\n"[..]);
        assert!(read_value(std::io::repeat(0)).unwrap_err().to_string().contains("larger than 64 MiB"));
    }
}
