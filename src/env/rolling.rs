//! A file that lines are added to, and that never grows beyond a bound: the one before it is kept as `<name>.1`, and no more.
//!
//! Absent: syncs. A line is the operating system's as soon as it is written, so it outlives the process and not a power loss.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

const PRIVATE: u32 = 0o600;

pub struct Rolling {
    path: PathBuf,
    bytes_max: u64,
    /// `None`: it could not be opened anew; tried with each line.
    file: Option<File>,
    bytes: u64,
}

impl Rolling {
    /// Goes on with the file at `path`, or makes it.
    pub fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = append(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), bytes_max, file: Some(file), bytes })
    }

    fn roll(&mut self) -> io::Result<()> {
        let mut before = self.path.clone().into_os_string();
        before.push(".1");
        self.file = None;
        std::fs::rename(&self.path, before)?;
        (self.file, self.bytes) = (Some(append(&self.path)?), 0);
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(PRIVATE).open(path)
}

impl Write for Rolling {
    /// Takes whole lines.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            self.roll()?;
        }
        if self.file.is_none() {
            let file = append(&self.path)?;
            self.bytes = file.metadata()?.len();
            self.file = Some(file);
        }
        let file = self.file.as_mut().expect("it was just opened");
        file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn two_files_at_most_hold_the_newest_lines_and_are_their_owners() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let mut rolling = Rolling::open(&path, 100).unwrap();
        for n in 0..100 {
            rolling.write_all(format!("line {n:03}\n").as_bytes()).unwrap();
            // A process goes on where one before it ended.
            if n == 50 {
                rolling = Rolling::open(&path, 100).unwrap();
            }
        }
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let (now, before) = (read(&path), read(&dir.path().join("audit.jsonl.1")));
        assert!(now.len() <= 100 && before.len() <= 100, "{} {}", now.len(), before.len());
        let numbers: Vec<u32> = (before + &now).lines().map(|line| line[5..].parse().unwrap()).collect();
        assert!(numbers.len() > 10 && numbers.iter().copied().eq(100 - numbers.len() as u32..100), "{numbers:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
