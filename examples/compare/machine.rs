//! What the figures were made on. Absent: the load of other programs; the machine must be quiet.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Appends whose flush is timed.
const FLUSHES: usize = 200;
const FLUSH_BYTES: usize = 4096;

/// A list in Markdown; `data_dir` is on the disk that is used.
pub fn describe(programs: &[&Path], data_dir: &Path) -> anyhow::Result<String> {
    let field = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("unknown".into(), |rest| rest.trim_start_matches([':', ' ', '\t']).trim().to_owned())
    };
    let cores = std::thread::available_parallelism()?;
    let memory = field("/proc/meminfo", "MemTotal");
    let mut lines = vec![
        format!("{cores} cores of {}, memory {memory}", field("/proc/cpuinfo", "model name")),
        format!("Linux {}", std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim()),
        format!("an fdatasync after {FLUSH_BYTES} bytes takes {} µs (median of {FLUSHES})", flush_micros(data_dir)?),
    ];
    for program in programs {
        let version = Command::new(program).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
        let version = String::from_utf8_lossy(&version);
        lines.extend(version.lines().next().map(str::to_owned));
    }
    Ok(lines.iter().map(|line| format!("- {line}\n")).collect())
}

fn flush_micros(data_dir: &Path) -> anyhow::Result<u128> {
    let mut file: File = tempfile::tempfile_in(data_dir)?;
    let mut micros = Vec::new();
    for _ in 0..FLUSHES {
        file.write_all(&[0x5a; FLUSH_BYTES])?;
        let begin = Instant::now();
        file.sync_data()?;
        micros.push(begin.elapsed().as_micros());
    }
    micros.sort_unstable();
    Ok(micros[FLUSHES / 2])
}
