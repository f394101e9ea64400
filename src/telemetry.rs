//! Where log lines go: standard error, as text for people or as one JSON object a line.
//!
//! Owns the process's one subscriber. A server never waits for who reads its lines (`env::stderr`): those that are not read in time are
//! lost, and counted; the newest are kept in memory. Nothing fills a disk with lines of one kind (`limit`). Absent: every decision about what is logged.

pub mod audit;
mod limit;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use parking_lot::Mutex;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use self::limit::{Limit, Telling};
use crate::config::{LogFormat, Telemetry};
use crate::env::stderr::Lines;
use crate::metrics::metrics;

/// Bytes of lines that are kept in memory.
const RECENT_BYTES_MAX: usize = 256 << 10;
/// At its end a process waits no longer than this for its last lines to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The subscriber of a server, which waits for nobody. Its last lines are written when this is dropped.
pub struct Background(Lines);

impl Background {
    /// Installs the subscriber, also for panics. Call it once; a second one is refused.
    pub fn init(telemetry: &Telemetry) -> anyhow::Result<Self> {
        let lines = Lines::start(|| metrics().log_lines.lost.inc())?;
        let writer = lines.clone();
        subscriber(telemetry, move || Writer(writer.clone()))?.try_init()?;
        let writer = lines.clone();
        // What panics holds locks, perhaps, and must not wait either.
        std::panic::set_hook(Box::new(move |panic| {
            let thread = std::thread::current();
            writer.line(format!("thread '{}' {panic}\n", thread.name().unwrap_or("unnamed")).as_bytes());
        }));
        Ok(Self(lines))
    }

    /// Says why the process ends.
    pub fn last(&self, text: &str) {
        self.0.line(format!("{text}\n").as_bytes());
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.flush(LAST_LINES);
    }
}

static RECENT: Mutex<Recent> = Mutex::new(Recent { lines: VecDeque::new(), bytes: 0 });

/// The newest lines of this process, for `quorate diagnose`.
struct Recent {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Recent {
    fn add(&mut self, line: &[u8]) {
        let line = &line[..line.len().min(RECENT_BYTES_MAX / 16)];
        self.bytes += line.len();
        self.lines.push_back(line.to_vec());
        while self.bytes > RECENT_BYTES_MAX {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }
}

/// The newest lines that a server has written, oldest first: 256 KiB of them at most.
pub fn recent() -> Vec<u8> {
    RECENT.lock().lines.iter().flatten().copied().collect()
}

/// Takes one event at a time, whole.
struct Writer(Lines);

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        RECENT.lock().add(line);
        self.0.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Installs a subscriber that writes each line before it goes on: for commands. Call it once; a second one is refused.
pub fn init(telemetry: &Telemetry) -> anyhow::Result<()> {
    subscriber(telemetry, std::io::stderr)?.try_init()?;
    Ok(())
}

fn subscriber<W>(telemetry: &Telemetry, writer: W) -> anyhow::Result<Box<dyn tracing::Subscriber + Send + Sync>>
where
    W: for<'a> tracing_subscriber::fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter(&telemetry.level))?;
    let builder = fmt().with_env_filter(filter).with_writer(writer);
    let format = telemetry.format;
    Ok(match format {
        LogFormat::Text => {
            let colours = is_coloured();
            let inner = fmt::format().with_ansi(colours);
            let builder = builder.with_ansi(colours).event_format(Telling { inner, format });
            Box::new(builder.finish().with(Limit::default()))
        }
        LogFormat::Json => {
            let inner = fmt::format().json().flatten_event(true).with_current_span(true);
            let builder = builder.json().event_format(Telling { inner, format });
            Box::new(builder.finish().with(Limit::default()))
        }
    })
}

/// What the setting means: a level alone is that of our own lines. Libraries are heard from `error` on, unless they are named; kube, which
/// logs each failed call as an error, not at all: we say the same once, with what to do.
fn filter(level: &str) -> String {
    let own = |word: &str| match word.trim() {
        "off" => "off".to_owned(),
        word if word.contains('=') => word.to_owned(),
        word => format!("error,kube_client=off,quorate={word}"),
    };
    level.split(',').map(own).collect::<Vec<_>>().join(",")
}

/// On a terminal, unless its user wants none (<https://no-color.org>).
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn lines(level: &str, format: LogFormat) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let telemetry = Telemetry { level: level.to_owned(), format, ..Telemetry::default() };
        let subscriber = subscriber(&telemetry, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(term = 3, "became leader");
            tracing::debug!("detail");
        });
        let bytes = sink.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_hold_fields_at_the_top() {
        let line = lines("info", LogFormat::Json);
        let object: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
        assert_eq!((&object["message"], &object["term"]), (&"became leader".into(), &3.into()));
    }

    #[test]
    fn what_a_library_says_again_and_again_is_heard_only_by_who_asks() {
        let said = |level: &str| {
            let sink = Sink::default();
            let writer = sink.clone();
            let telemetry = Telemetry { level: level.to_owned(), ..Telemetry::default() };
            tracing::subscriber::with_default(subscriber(&telemetry, move || writer.clone()).unwrap(), || {
                tracing::warn!(target: "openraft::core::heartbeat", "failed to send a heartbeat");
                tracing::error!(target: "openraft::core", "the log is broken");
            });
            let bytes = sink.0.lock().clone();
            String::from_utf8(bytes).unwrap().lines().count()
        };
        assert_eq!((said("info"), said("debug"), said("info,openraft=warn"), said("off")), (1, 1, 2, 0));
        assert_eq!(filter("debug,h2=info"), "error,kube_client=off,quorate=debug,h2=info");
    }

    #[test]
    fn the_newest_lines_are_kept_up_to_a_bound() {
        let mut recent = Recent { lines: VecDeque::new(), bytes: 0 };
        for n in 0..100_000 {
            recent.add(format!("line {n}\n").as_bytes());
        }
        recent.add(&vec![b'x'; 10 * RECENT_BYTES_MAX]);
        let kept: usize = recent.lines.iter().map(Vec::len).sum();
        assert!(kept == recent.bytes && kept <= RECENT_BYTES_MAX && kept > RECENT_BYTES_MAX / 2, "{kept}");
        assert!(recent.lines[recent.lines.len() - 2].ends_with(b"line 99999\n"));
    }

    #[test]
    fn level_filters_text_lines() {
        let text = lines("info", LogFormat::Text);
        assert!(text.contains("became leader") && text.contains("term") && !text.contains("detail"), "{text}");
        assert_eq!(lines("off", LogFormat::Text), "");
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_in_the_code_writes_so_many_lines_a_minute_and_then_tells_what_it_left_out() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let sink = Sink::default();
            let writer = sink.clone();
            let telemetry = Telemetry { level: "debug".to_owned(), format, ..Telemetry::default() };
            let subscriber = subscriber(&telemetry, move || writer.clone()).unwrap();
            let lines = || String::from_utf8(std::mem::take(&mut *sink.0.lock())).unwrap();
            let _guard = tracing::subscriber::set_default(subscriber);
            let refuse = || tracing::warn!(max = 7, "refused");
            (0..100).for_each(|_| refuse());
            assert_eq!(lines().lines().count(), 30);
            tracing::warn!("another place");
            (0..100).for_each(|_| tracing::debug!("detail"));
            assert_eq!(lines().lines().count(), 101);
            tokio::time::advance(Duration::from_secs(60)).await;
            (0..2).for_each(|_| refuse());
            let text = lines();
            let (first, second) = text.trim_end().split_once('\n').unwrap();
            match format {
                LogFormat::Text => assert!(first.ends_with("refused max=7 left_out=70"), "{text}"),
                LogFormat::Json => {
                    let line: serde_json::Value = serde_json::from_str(first).unwrap();
                    assert_eq!((&line["max"], &line["left_out"]), (&7.into(), &70.into()), "{text}");
                }
            }
            assert!(second.contains("refused") && !second.contains("left_out"), "{text}");
        }
    }
}
