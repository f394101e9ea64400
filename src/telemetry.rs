//! Where log lines go: standard error, as text for people or as one JSON object a line.
//!
//! Owns the process's one subscriber. Absent: metrics, and every decision about what is logged.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, Telemetry};

/// Installs the subscriber. Call it once; a second one is refused.
pub fn init(telemetry: &Telemetry) -> anyhow::Result<()> {
    subscriber(telemetry, std::io::stderr)?.try_init()?;
    Ok(())
}

fn subscriber<W>(telemetry: &Telemetry, writer: W) -> anyhow::Result<Box<dyn tracing::Subscriber + Send + Sync>>
where
    W: for<'a> tracing_subscriber::fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    // kube logs each failed call as an error; we say the same once, with what to do.
    let quiet = if telemetry.level.contains("kube_client") { "" } else { ",kube_client=off" };
    let filter = EnvFilter::try_new(format!("{}{quiet}", telemetry.level))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    Ok(match telemetry.format {
        LogFormat::Text => Box::new(builder.with_ansi(std::io::stderr().is_terminal()).finish()),
        LogFormat::Json => Box::new(builder.json().flatten_event(true).with_current_span(true).finish()),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use parking_lot::Mutex;

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
        let telemetry = Telemetry { level: level.to_owned(), format };
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
    fn level_filters_text_lines() {
        let text = lines("info", LogFormat::Text);
        assert!(text.contains("became leader") && text.contains("term") && !text.contains("detail"), "{text}");
        assert_eq!(lines("off", LogFormat::Text), "");
    }
}
