//! Forms of what is printed: raw lines, tables, JSON.

use base64::Engine;
use serde_json::{Value, json};

use crate::pb::KeyValue;
use crate::pb::etcd::ResponseHeader;

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people, and for line by line scripts
    Simple,
    /// One JSON object; keys and values are base64, for they may be any bytes
    Json,
}

/// Columns two spaces apart, the last one as wide as it is. Cells come from servers: none of them can command the terminal.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> Vec<u8> {
    let head: Vec<String> = head.iter().map(|title| (*title).to_owned()).collect();
    let rows = rows.iter().map(|row| row.iter().map(|cell| crate::identity::shown(cell)).collect());
    let lines: Vec<Vec<String>> = std::iter::once(head.clone()).chain(rows).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default())
        .collect();
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text.into_bytes()
}

/// One object, and a line end.
pub fn json_line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

/// Fields and numbers as etcd's own client prints them.
pub fn header_json(header: Option<&ResponseHeader>) -> Value {
    let header = header.copied().unwrap_or_default();
    json!({
        "cluster_id": header.cluster_id,
        "member_id": header.member_id,
        "revision": header.revision,
        "raft_term": header.raft_term,
    })
}

pub fn key_value_json(kv: &KeyValue) -> Value {
    let fields = kv.fields();
    let mut object = json!({
        "key": base64(fields.key),
        "create_revision": fields.create_revision,
        "mod_revision": fields.mod_revision,
        "version": fields.version,
        "value": base64(fields.value),
    });
    if fields.lease != 0 {
        object["lease"] = fields.lease.into();
    }
    object
}

pub fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// A size to be read, not to be computed with: `1.5MiB`.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in units {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes}B") } else { format!("{value:.1}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["1".to_owned(), "aa".to_owned()], vec!["1000".to_owned(), "".to_owned()]];
        assert_eq!(String::from_utf8(table(&["ID", "NAME"], &rows)).unwrap(), "ID    NAME\n1     aa\n1000\n");
        let rows = [vec!["\u{1b}[2J\n".to_owned()]];
        assert_eq!(String::from_utf8(table(&["ID"], &rows)).unwrap(), "ID\n\u{fffd}[2J\u{fffd}\n");
    }

    #[test]
    fn sizes_are_rounded() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (64 << 20, "64.0MiB"), (3 << 40, "3.0TiB")]
        {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
