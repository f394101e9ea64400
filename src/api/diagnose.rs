//! What whoever helps needs of this member, as files.
//!
//! Invariants: no secrets, and no keys and values of clients but for keys in log lines of slow requests; bounded: some hundred KiB.
//! Absent: the file that holds it all, and what the other members say (`cli/diagnose`).

use std::fmt::Write as _;
use std::path::Path;

use super::Api;
use crate::conditions;
use crate::env::{Disk, OpenMode, Pool};
use crate::pb::admin::Diagnosis;
use crate::pb::admin::diagnosis::File;
use crate::telemetry;

/// Files of the data directory that are listed.
const FILES_MAX: usize = 2000;
/// A member directory has two levels below it.
const DEPTH_MAX: usize = 4;

impl Api {
    pub(super) async fn diagnosis(&self) -> Diagnosis {
        let file = |name: &str, content: Vec<u8>| File { name: name.into(), content: content.into() };
        let conditions: String =
            self.conditions().list().iter().map(|condition| conditions::line(condition) + "\n").collect();
        let events = self.conditions().events();
        let events: String =
            events.iter().map(|event| format!("{} {}\n", conditions::time_text(event.at), event.sentence)).collect();
        let (env, dir) = (self.shared.env.clone(), self.shared.diagnosis.data_dir.clone());
        let disk = env.disk.clone();
        let files = env.long(Pool::Disk, move || inventory(&*disk, &dir)).await;
        let facts: String = self.overview().facts.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
        Diagnosis {
            files: vec![
                file("config.toml", self.shared.diagnosis.config.clone().into()),
                file("state.txt", facts.into()),
                file("conditions.txt", conditions.into()),
                file("events.txt", events.into()),
                file("metrics.txt", self.metrics_text().into()),
                file("files.txt", files.into()),
                file("log.txt", telemetry::recent()),
            ],
        }
    }
}

/// Bytes and path of each file.
fn inventory(disk: &dyn Disk, root: &Path) -> String {
    let (mut text, mut left) = (String::new(), FILES_MAX);
    list(disk, root, root, DEPTH_MAX, &mut left, &mut text);
    if left == 0 {
        text.push_str("... and more\n");
    }
    text
}

fn list(disk: &dyn Disk, root: &Path, dir: &Path, depth: usize, left: &mut usize, text: &mut String) {
    let mut names = disk.list(dir).unwrap_or_default();
    names.sort();
    for name in names {
        if *left == 0 {
            return;
        }
        let path = dir.join(name);
        if depth > 0 && disk.list(&path).is_ok() {
            list(disk, root, &path, depth - 1, left, text);
            continue;
        }
        *left -= 1;
        let shown = path.strip_prefix(root).unwrap_or(&path).display();
        let _ = match disk.open(&path, OpenMode::Read).and_then(|file| file.len()) {
            Ok(bytes) => writeln!(text, "{bytes:>14} {shown}"),
            Err(error) => writeln!(text, "{:>14} {shown} ({error})", "?"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::disk::RealDisk;

    #[test]
    fn every_file_is_listed_with_its_size_up_to_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("member-1/log")).unwrap();
        std::fs::write(dir.path().join("current"), b"12345").unwrap();
        std::fs::write(dir.path().join("member-1/log/segment"), b"1").unwrap();
        let text = inventory(&RealDisk, dir.path());
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines, ["5 current", "1 member-1/log/segment"]);
        for n in 0..FILES_MAX {
            std::fs::write(dir.path().join(format!("f{n}")), b"").unwrap();
        }
        let text = inventory(&RealDisk, dir.path());
        assert_eq!(text.lines().count(), FILES_MAX + 1);
        assert!(text.ends_with("... and more\n"));
    }
}
