//! Forms of what is printed: raw lines, tables, JSON. Each command's output goes through here, so that an id, a table and a key look
//! alike everywhere.
//!
//! Invariants: an id is 16 hexadecimal digits, as text and in JSON; nothing that came from a server commands a terminal.

use std::io::IsTerminal as _;

use base64::Engine;
use serde_json::{Value, json};

use crate::conditions;
use crate::pb::KeyValue;
use crate::pb::admin::Condition;
use crate::pb::etcd::ResponseHeader;

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people, and for line by line scripts
    #[value(alias = "table")]
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

/// What a person should know, and what to do about it.
pub fn condition_lines(conditions: &[Condition]) -> String {
    if conditions.is_empty() {
        return "conditions: none\n".into();
    }
    let mut text = String::new();
    for condition in conditions {
        let Condition { name, severity, sentence, remedy, since, .. } = condition;
        let (since, runbook) = (conditions::time_text(*since), conditions::runbook(name));
        let shown = crate::identity::shown;
        text += &format!("[{}] {}, since {since}: {}\n", shown(name), shown(severity), shown(sentence));
        text += &format!("    what to do: {} ({})\n", shown(remedy), shown(&runbook));
    }
    text
}

/// One object, and a line end.
pub fn json_line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

/// What was done: a sentence, or its facts as an object.
pub fn done(format: Format, facts: &Value, sentence: &str) -> Vec<u8> {
    match format {
        Format::Simple => format!("{sentence}\n").into_bytes(),
        Format::Json => json_line(facts),
    }
}

/// An id of a member, a cluster or a lease.
pub fn id(id: u64) -> String {
    format!("{id:016x}")
}

/// Of a lease, which is signed in the API.
pub fn lease_id(lease: i64) -> String {
    id(lease as u64)
}

/// Names in the order in which people count: kv-2 before kv-10.
pub fn by_name(one: &str, other: &str) -> std::cmp::Ordering {
    let parts = |name: &str| {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (text, number) = name.split_at(name.len() - digits);
        (text.to_owned(), number.parse::<u64>().unwrap_or_default(), name.to_owned())
    };
    parts(one).cmp(&parts(other))
}

/// Raw lines of keys and values. Files and pipes get the bytes as they are; where a terminal is written to, what it would obey is escaped.
pub struct Lines {
    out: Vec<u8>,
    terminal: bool,
    hex: bool,
}

impl Lines {
    /// For standard output; with `hex` each byte is written as `\x6b`.
    pub fn new(hex: bool) -> Self {
        Self { out: Vec::new(), terminal: std::io::stdout().is_terminal(), hex }
    }

    /// A key, or another text of one line.
    pub fn key(&mut self, bytes: &[u8]) {
        self.bytes(bytes, &[]);
    }

    /// A value, which may be text of many lines.
    pub fn value(&mut self, bytes: &[u8]) {
        self.bytes(bytes, &['\n', '\t']);
    }

    /// A line of our own.
    pub fn text(&mut self, text: &str) {
        self.out.extend_from_slice(text.as_bytes());
        self.out.push(b'\n');
    }

    fn bytes(&mut self, bytes: &[u8], harmless: &[char]) {
        if self.hex {
            bytes.iter().for_each(|byte| self.out.extend_from_slice(format!("\\x{byte:02x}").as_bytes()));
        } else if self.terminal {
            self.out.extend_from_slice(escaped(bytes, harmless).as_bytes());
        } else {
            self.out.extend_from_slice(bytes);
        }
        self.out.push(b'\n');
    }

    pub fn key_value(&mut self, kv: &KeyValue) {
        self.key(kv.key());
        self.value(kv.value());
    }

    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// As text without anything that a terminal would obey: such characters, and bytes that are no text, as escapes.
pub fn escaped(bytes: &[u8], harmless: &[char]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if harmless.contains(&c) || !crate::identity::is_hostile(c) => text.push(c),
                c if c.is_ascii() => text.push_str(&format!("\\x{:02x}", u32::from(c))),
                c => text.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// Fields as etcd's own client prints them; ids as everywhere here.
pub fn header_json(header: Option<&ResponseHeader>) -> Value {
    let header = header.copied().unwrap_or_default();
    json!({
        "cluster_id": id(header.cluster_id),
        "member_id": id(header.member_id),
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
        object["lease"] = lease_id(fields.lease).into();
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
    fn ids_have_sixteen_digits_and_names_are_counted() {
        assert_eq!((id(0xa1), lease_id(-1)), ("00000000000000a1".to_owned(), "ffffffffffffffff".to_owned()));
        let mut names = ["kv-10", "kv-2", "b", "kv-1", ""];
        names.sort_by(|one, other| by_name(one, other));
        assert_eq!(names, ["", "b", "kv-1", "kv-2", "kv-10"]);
    }

    #[test]
    fn a_terminal_gets_nothing_that_it_would_obey() {
        let lines = |terminal, hex| {
            let mut lines = Lines { out: Vec::new(), terminal, hex };
            lines.key(b"k\n\x1b[2J");
            lines.value("v\n\u{202e}\u{fc}".as_bytes());
            lines.value(b"\xff");
            String::from_utf8_lossy(&lines.finish()).into_owned()
        };
        assert_eq!(lines(true, false), "k\\x0a\\x1b[2J\nv\n\\u{202e}\u{fc}\n\\xff\n");
        assert_eq!(lines(false, false), "k\n\u{1b}[2J\nv\n\u{202e}\u{fc}\n\u{fffd}\n", "bytes as they are");
        assert!(lines(false, true).starts_with("\\x6b\\x0a\\x1b"));
    }

    #[test]
    fn sizes_are_rounded() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (64 << 20, "64.0MiB"), (3 << 40, "3.0TiB")]
        {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
