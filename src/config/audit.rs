//! `[audit]`: whether, and where, it is written down who asked for what.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::sections::words;
use super::validate::Faults;
use super::{Bytes, Config, units};

/// `[audit]`: the audit log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Audit {
    #[serde(with = "units::text")]
    pub mode: AuditMode,
    pub file: PathBuf,
    /// Most bytes of the file; the one before it is kept.
    pub file_bytes_max: Bytes,
    /// Calls that only read, too: there may be a hundred times as many.
    pub reads: bool,
}

impl Default for Audit {
    fn default() -> Self {
        Self { mode: AuditMode::default(), file: PathBuf::new(), file_bytes_max: Bytes::mib(64), reads: false }
    }
}

/// Where it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuditMode {
    #[default]
    Off,
    Stdout,
    File,
}

words!(AuditMode { Off = "off", Stdout = "stdout", File = "file" });

/// Less holds no day of anything.
const FILE_BYTES_MIN: Bytes = Bytes::mib(1);

impl Config {
    pub(super) fn check_audit(&self, faults: &mut Faults) {
        let Audit { mode, file, file_bytes_max, reads } = &self.audit;
        let is_named = !file.as_os_str().is_empty();
        let got = if is_named { format!("{file:?}") } else { "nothing".into() };
        let (expected, action) = match mode {
            AuditMode::File => ("the path of a file", "name it"),
            _ => ("nothing, for audit.mode is not file", "set the mode, or leave it out"),
        };
        faults.check(is_named == (*mode == AuditMode::File), "audit.file", got, expected, action);
        let of_use = !reads || *mode != AuditMode::Off;
        faults.check(of_use, "audit.reads", reads, "false, for audit.mode is off", "set the mode, or leave it out");
        let expected = format!("at least {FILE_BYTES_MIN}");
        faults.check(*file_bytes_max >= FILE_BYTES_MIN, "audit.file_bytes_max", file_bytes_max, expected, "raise it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_goes_with_its_mode() {
        let told = |mode, file: &str, reads| {
            let audit = Audit { mode, file: file.into(), reads, ..Audit::default() };
            Config { audit, ..Config::default() }.validate().map_or_else(|e| e.to_string(), |()| "valid".into())
        };
        assert_eq!(told(AuditMode::File, "/a", true), "valid");
        assert_eq!(told(AuditMode::Stdout, "", true), "valid");
        assert!(told(AuditMode::File, "", false).contains("audit.file: got nothing"));
        assert!(told(AuditMode::Stdout, "/a", false).contains("audit.file: got \"/a\""));
        assert!(told(AuditMode::Off, "", true).contains("audit.reads: got true"));
        let audit = Audit { file_bytes_max: Bytes(1), ..Audit::default() };
        let error = Config { audit, ..Config::default() }.validate().unwrap_err().to_string();
        assert!(error.contains("audit.file_bytes_max: got"), "{error}");
    }
}
