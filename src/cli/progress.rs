//! How far long work is: a bar where standard error is a terminal, a line every few seconds elsewhere.
//!
//! Absent: standard output, which is the command's result alone.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::human_bytes;
use crate::env::Instant;

/// Between two lines.
const EVERY: Duration = Duration::from_secs(5);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Things,
}

pub struct Progress {
    what: String,
    unit: Unit,
    /// How much there is to do, where that is known.
    total: Option<u64>,
    bar: Option<ProgressBar>,
    told: Instant,
    begun: Instant,
}

impl Progress {
    /// Of work such as "copying keys".
    pub fn new(what: &str, unit: Unit, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(what, unit, total));
        let now = Instant::now();
        Self { what: what.to_owned(), unit, total, bar, told: now, begun: now }
    }

    /// Sets how much there is to do.
    pub fn set_total(&mut self, total: u64) {
        if self.total != Some(total) {
            self.total = Some(total);
            if let Some(old) = self.bar.take() {
                old.finish_and_clear();
                self.bar = Some(bar(&self.what, self.unit, self.total));
            }
        }
    }

    /// So much is done.
    pub fn at(&mut self, done: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.told.elapsed() >= EVERY => {
                self.told = Instant::now();
                eprintln!("{}", line(&self.what, self.unit, done, self.total, self.begun.elapsed()));
            }
            None => {}
        }
    }

    /// A line of its own, above the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, unit: Unit, total: Option<u64>) -> ProgressBar {
    let template = match (unit, total) {
        (Unit::Bytes, Some(_)) => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        (Unit::Bytes, None) => "{msg} {spinner} {bytes} {bytes_per_sec}",
        (Unit::Things, Some(_)) => "{msg} {wide_bar} {pos}/{len} {per_sec} {eta}",
        (Unit::Things, None) => "{msg} {spinner} {pos} {per_sec}",
    };
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

fn line(what: &str, unit: Unit, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let shown = |amount: u64| if unit == Unit::Bytes { human_bytes(amount) } else { amount.to_string() };
    let of = match total {
        Some(total) if total > 0 => format!(" of {} ({} %)", shown(total), done.saturating_mul(100) / total),
        _ => String::new(),
    };
    format!("{what}: {}{of} after {}", shown(done), humantime::format_duration(Duration::from_secs(elapsed.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_since_when() {
        let elapsed = Duration::from_millis(65_900);
        assert_eq!(line("copying", Unit::Things, 50, Some(200), elapsed), "copying: 50 of 200 (25 %) after 1m 5s");
        assert_eq!(line("saving", Unit::Bytes, 1 << 20, None, elapsed), "saving: 1.0MiB after 1m 5s");
    }
}
