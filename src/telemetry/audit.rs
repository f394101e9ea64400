//! The audit log: who asked for what, from where, and what came of it, one JSON object a line; never a value, a password or a token.
//!
//! Whoever serves a call begins an [`Entry`] for it, which goes along with the request; what is learnt on the way is noted in it, and it is written
//! when the call ends, also if its client has gone. Nobody waits for a line (`env::stderr::Lines`): what is not written in time is lost,
//! and counted.
//! Absent: which call is of which kind (`server/meter`), and what a request says (`api/audited`).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::config::{self, AuditMode};
use crate::env::rolling::Rolling;
use crate::env::stderr::Lines;
use crate::env::wall_clock;
use crate::metrics::metrics;

/// Bytes of a key, and of a name, that a line shows.
const SHOWN_BYTES_MAX: usize = 1024;

/// How much depends on a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads keys, or looks at the cluster.
    Read,
    Write,
    /// Changes what others may do, or what becomes of the cluster; or shows all data.
    Admin,
}

/// Where lines go. Cloning shares it.
#[derive(Clone)]
pub struct Audit {
    lines: Lines,
    member: Arc<str>,
    reads: bool,
}

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct What {
    pub key: Option<Bytes>,
    pub range_end: Option<Bytes>,
    /// A user, a role, a member, a lease, or what else is not a key.
    pub target: Option<String>,
    /// Of the request, values and all.
    pub bytes: Option<usize>,
    /// Of a transaction.
    pub operations: Option<usize>,
}

#[derive(Default)]
struct Noted {
    user: Option<String>,
    what: What,
}

/// A call under way. Cloning shares it.
#[derive(Clone, Default)]
pub struct Entry(Arc<Mutex<Noted>>);

impl Entry {
    pub fn note(&self, what: What) {
        self.0.lock().what = what;
    }

    pub fn note_user(&self, name: &str) {
        self.0.lock().user = Some(name.to_owned());
    }

    /// Of a stream: the first one that it asks for is shown, and how many.
    pub fn note_range(&self, key: &Bytes, range_end: &Bytes) {
        let what = &mut self.0.lock().what;
        if what.key.is_none() {
            what.key = Some(key.clone());
            what.range_end = Some(range_end.clone()).filter(|end| !end.is_empty());
        }
        what.operations = Some(what.operations.unwrap_or(0) + 1);
    }
}

impl Audit {
    /// As the settings say; `member` is this one's name.
    pub fn open(settings: &config::Audit, member: &str) -> anyhow::Result<Option<Self>> {
        let lost = || metrics().log_lines.audit_lost.inc();
        let lines = match settings.mode {
            AuditMode::Off => return Ok(None),
            AuditMode::Stdout => Lines::start_to("audit", std::io::stdout(), lost)?,
            AuditMode::File => {
                let path = &settings.file;
                let file = Rolling::open(path, settings.file_bytes_max.0);
                let file = file.with_context(|| {
                    format!(
                        "audit.file ({}) cannot be opened; expected a file in a directory that exists",
                        path.display()
                    )
                })?;
                Lines::start_to("audit", file, lost)?
            }
        };
        Ok(Some(Self { lines, member: member.into(), reads: settings.reads }))
    }

    /// The entry of a call, if calls of its kind are written down.
    pub fn begin(&self, kind: Kind) -> Option<Entry> {
        (kind != Kind::Read || self.reads).then(Entry::default)
    }

    /// Writes what has become of a call.
    pub fn end(&self, entry: &Entry, method: &str, from: Option<IpAddr>, code: &str, took: Duration) {
        let Noted { user, what } = std::mem::take(&mut *entry.0.lock());
        let mut line = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                line.insert(name.to_owned(), value);
            }
        };
        put("time", Some(humantime::format_rfc3339_millis(wall_clock()).to_string().into()));
        put("member", Some((&*self.member).into()));
        put("from", from.map(|from| from.to_string().into()));
        put("user", user.map(|name| shown(name.as_bytes())));
        put("method", Some(method.into()));
        put("key", what.key.map(|key| shown(&key)));
        put("range_end", what.range_end.map(|end| shown(&end)));
        put("target", what.target.map(|target| shown(target.as_bytes())));
        put("operations", what.operations.map(Value::from));
        put("bytes", what.bytes.map(Value::from));
        put("code", Some(code.into()));
        put("took_us", Some((took.as_micros() as u64).into()));
        let mut line = Value::Object(line).to_string().into_bytes();
        line.push(b'\n');
        self.lines.line(&line);
    }

    /// Waits for what was handed in, at the end of a process.
    pub fn flush(&self, patience: Duration) {
        self.lines.flush(patience);
    }
}

/// Bytes of strangers as text: what is printable in ASCII as it is, everything else as `\x..`, so that no two keys look the same and no
/// terminal obeys one.
fn shown(bytes: &[u8]) -> Value {
    let cut = bytes.len() > SHOWN_BYTES_MAX;
    let text = bytes[..bytes.len().min(SHOWN_BYTES_MAX)].escape_ascii().to_string();
    Value::from(if cut { text + "..." } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Bytes as Size;

    #[test]
    fn a_line_says_who_asked_for_what_and_from_where() {
        let dir = tempfile::tempdir().unwrap();
        let (mode, file) = (AuditMode::File, dir.path().join("audit.jsonl"));
        let settings = config::Audit { mode, file: file.clone(), reads: false, file_bytes_max: Size::mib(1) };
        let audit = Audit::open(&settings, "kv-0").unwrap().unwrap();
        assert!(audit.begin(Kind::Read).is_none(), "reads are a setting");
        let entry = audit.begin(Kind::Write).unwrap();
        entry.note_user("ro\"ot\u{1b}[2J");
        let key = Some(Bytes::from_static(b"a\xff\n"));
        entry.note(What { key, bytes: Some(17), ..What::default() });
        audit.end(&entry, "KV/Put", Some([10, 0, 0, 7].into()), "OK", Duration::from_micros(1500));
        let stream = audit.begin(Kind::Admin).unwrap();
        for key in ["x".repeat(2 * SHOWN_BYTES_MAX), "second".to_owned()] {
            stream.note_range(&key.into(), &Bytes::new());
        }
        audit.end(&stream, "Watch/Watch", None, "CANCELLED", Duration::ZERO);
        audit.flush(Duration::from_secs(60));
        let text = std::fs::read_to_string(file).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2, "{text}");
        let of = |line: &Value, name: &str| line[name].clone();
        for (name, value) in [
            ("member", "kv-0"),
            ("from", "10.0.0.7"),
            ("user", "ro\\\"ot\\x1b[2J"),
            ("method", "KV/Put"),
            ("key", "a\\xff\\n"),
            ("code", "OK"),
        ] {
            assert_eq!(of(&lines[0], name), value);
        }
        assert_eq!((of(&lines[0], "bytes"), of(&lines[0], "took_us")), (17.into(), 1500.into()));
        assert!(lines[0]["range_end"].is_null() && lines[0]["time"].as_str().unwrap().ends_with('Z'));
        assert_eq!(of(&lines[1], "operations"), 2);
        assert_eq!(of(&lines[1], "key").as_str().unwrap().len(), SHOWN_BYTES_MAX + 3);
    }
}
