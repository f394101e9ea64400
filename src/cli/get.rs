//! `get`: what is read, in which order, and the forms in which it is printed.

use serde_json::json;

use super::client::{ANSWER_BYTES_MAX, ClientArgs};
use super::credentials::Channel;
use super::kv::KeyRange;
use super::output::{Lines, escaped, header_json, id, json_line, key_value_json, lease_id, table};
use crate::pb::KeyValue;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::{RangeRequest, RangeResponse};

/// What is read; also in a transaction.
#[derive(Debug, clap::Args)]
pub struct Read {
    #[command(flatten)]
    range: KeyRange,
    /// Most keys to print; 0: all
    #[arg(long, default_value_t = 0)]
    limit: i64,
    /// As of this revision; 0: now
    #[arg(long, default_value_t = 0)]
    rev: i64,
    /// Sort by this
    #[arg(long, value_enum, value_name = "WHAT")]
    sort_by: Option<SortBy>,
    /// Ascending or descending [default: ascending]
    #[arg(long, value_enum)]
    order: Option<Order>,
    /// Print no values
    #[arg(long, conflicts_with_all = ["count_only", "print_value_only"])]
    keys_only: bool,
    /// Print how many keys there are, and nothing else
    #[arg(long, conflicts_with = "print_value_only")]
    count_only: bool,
    /// Print no keys
    #[arg(long)]
    print_value_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SortBy {
    Key,
    Value,
    /// The revision at which the key was made
    Create,
    /// The revision of its last change
    Modify,
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    #[value(alias = "ASCEND")]
    Ascend,
    #[value(alias = "DESCEND")]
    Descend,
}

/// How keys are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KeyFormat {
    /// A line a key, a line a value; bytes as they are, but for a terminal
    Simple,
    /// One JSON object; keys and values are base64, for they may be any bytes
    Json,
    /// A row a key, with its revisions
    Table,
    /// A line a field
    Fields,
}

#[derive(Debug, clap::Args)]
pub struct GetArgs {
    #[command(flatten)]
    read: Read,
    /// Take the answer of the one member that is asked; it may be behind
    #[arg(long)]
    serializable: bool,
    /// Print the bytes of keys and values in hexadecimal
    #[arg(long)]
    hex: bool,
    #[arg(short, long, value_enum, default_value_t = KeyFormat::Simple)]
    output: KeyFormat,
    #[command(flatten)]
    client: ClientArgs,
}

impl Read {
    pub fn request(&self) -> RangeRequest {
        let (key, range_end) = self.range.bounds();
        let target = match self.sort_by {
            None | Some(SortBy::Key) => SortTarget::Key,
            Some(SortBy::Value) => SortTarget::Value,
            Some(SortBy::Create) => SortTarget::Create,
            Some(SortBy::Modify) => SortTarget::Mod,
            Some(SortBy::Version) => SortTarget::Version,
        };
        let order = match (self.order, self.sort_by) {
            (None, None) => SortOrder::None,
            (None, Some(_)) | (Some(Order::Ascend), _) => SortOrder::Ascend,
            (Some(Order::Descend), _) => SortOrder::Descend,
        };
        RangeRequest {
            key,
            range_end,
            limit: self.limit,
            revision: self.rev,
            sort_order: order.into(),
            sort_target: target.into(),
            keys_only: self.keys_only,
            count_only: self.count_only,
            ..RangeRequest::default()
        }
    }

    /// The raw lines of an answer.
    pub fn lines(&self, lines: &mut Lines, answer: &RangeResponse) {
        if self.count_only {
            return lines.text(&answer.count.to_string());
        }
        for kv in &answer.kvs {
            if !self.print_value_only {
                lines.key(kv.key());
            }
            if !self.keys_only {
                lines.value(kv.value());
            }
        }
    }
}

pub async fn get(args: GetArgs) -> anyhow::Result<Vec<u8>> {
    let request = RangeRequest { serializable: args.serializable, ..args.read.request() };
    let ask = async |channel: Channel| {
        KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX).range(request.clone()).await
    };
    let answer = args.client.read(ask).await?.into_inner();
    Ok(format_get(&args, &answer))
}

/// The fields of a range's answer, for JSON.
pub fn range_json(answer: &RangeResponse) -> serde_json::Value {
    json!({
        "header": header_json(answer.header.as_ref()),
        "kvs": answer.kvs.iter().map(key_value_json).collect::<Vec<_>>(),
        "more": answer.more,
        "count": answer.count,
    })
}

fn format_get(args: &GetArgs, answer: &RangeResponse) -> Vec<u8> {
    match args.output {
        KeyFormat::Json => json_line(&range_json(answer)),
        KeyFormat::Table => as_table(args, answer),
        KeyFormat::Fields => as_fields(args, answer),
        KeyFormat::Simple => {
            let mut lines = Lines::new(args.hex);
            args.read.lines(&mut lines, answer);
            lines.finish()
        }
    }
}

/// Keys and values of cells and fields: always text, whatever the bytes are.
fn shown(bytes: &[u8], hex: bool) -> String {
    if hex { bytes.iter().map(|byte| format!("{byte:02x}")).collect() } else { escaped(bytes, &[]) }
}

fn as_table(args: &GetArgs, answer: &RangeResponse) -> Vec<u8> {
    let row = |kv: &KeyValue| {
        let fields = kv.fields();
        vec![
            shown(fields.key, args.hex),
            fields.create_revision.to_string(),
            fields.mod_revision.to_string(),
            fields.version.to_string(),
            if fields.lease == 0 { "-".to_owned() } else { lease_id(fields.lease) },
            shown(fields.value, args.hex),
        ]
    };
    table(&["KEY", "CREATED", "MODIFIED", "VERSION", "LEASE", "VALUE"], &answer.kvs.iter().map(row).collect::<Vec<_>>())
}

/// As etcd's own client prints them.
fn as_fields(args: &GetArgs, answer: &RangeResponse) -> Vec<u8> {
    let header = answer.header.unwrap_or_default();
    let mut text = format!(
        "\"ClusterID\" : {}\n\"MemberID\" : {}\n\"Revision\" : {}\n\"RaftTerm\" : {}\n",
        id(header.cluster_id),
        id(header.member_id),
        header.revision,
        header.raft_term
    );
    for kv in &answer.kvs {
        let fields = kv.fields();
        let quoted = |bytes| format!("\"{}\"", shown(bytes, args.hex).replace('"', "\\\""));
        text += &format!(
            "\"Key\" : {}\n\"CreateRevision\" : {}\n\"ModRevision\" : {}\n\"Version\" : {}\n\"Value\" : {}\n\"Lease\" : {}\n",
            quoted(fields.key),
            fields.create_revision,
            fields.mod_revision,
            fields.version,
            quoted(fields.value),
            lease_id(fields.lease)
        );
    }
    text += &format!("\"More\" : {}\n\"Count\" : {}\n", answer.more, answer.count);
    text.into_bytes()
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

    fn answer() -> RangeResponse {
        let kv = |key, value, lease| KeyValue::new(Fields { key, value, version: 1, lease, ..Fields::default() });
        RangeResponse { kvs: vec![kv(b"a", b"1\xff", 31), kv(b"b", b"", 0)], count: 2, ..RangeResponse::default() }
    }

    #[test]
    fn get_prints_raw_lines() {
        let cases: [(&[&str], &[u8]); 5] = [
            (&["a"], b"a\n1\xff\nb\n\n"),
            (&["a", "--print-value-only"], b"1\xff\n\n"),
            (&["a", "--keys-only"], b"a\nb\n"),
            (&["a", "--count-only"], b"2\n"),
            (&["a", "--hex"], b"\\x61\n\\x31\\xff\n\\x62\n\n"),
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
        assert_eq!(object["kvs"][0]["lease"], json!("000000000000001f"));
    }

    #[test]
    fn get_prints_tables_and_fields() {
        let print = |form: &str| String::from_utf8(format_get(&parse(&["a", "-o", form]), &answer())).unwrap();
        let rows = print("table");
        assert!(rows.lines().nth(1).unwrap().ends_with("000000000000001f  1\\xff"), "{rows}");
        let fields = print("fields");
        assert!(fields.contains("\"Key\" : \"a\"\n") && fields.ends_with("\"Count\" : 2\n"), "{fields}");
    }

    #[test]
    fn the_order_is_as_asked() {
        let order = |words: &[&str]| {
            let request = parse(words).read.request();
            (request.sort_target(), request.sort_order())
        };
        assert_eq!(order(&["a"]), (SortTarget::Key, SortOrder::None));
        assert_eq!(order(&["a", "--order", "descend"]), (SortTarget::Key, SortOrder::Descend));
        assert_eq!(order(&["a", "--order", "ASCEND"]), (SortTarget::Key, SortOrder::Ascend));
        assert_eq!(order(&["a", "--sort-by", "modify"]), (SortTarget::Mod, SortOrder::Ascend));
    }
}
