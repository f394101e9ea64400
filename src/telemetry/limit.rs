//! At most so many lines of one place in the code in a minute: what a client or a fault repeats without end must not fill a disk.
//!
//! Lines that are left out are counted, and the next line of the same place that is written says how many they were (`left_out`).
//! Invariant: of levels that are on by default nothing writes more than that, whoever causes it. DEBUG and TRACE are not limited: who
//! turns them on wants all. Absent: what a line says.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogFormat;
use crate::env::Instant;
use crate::metrics::metrics;

/// Lines of one place in the code in a window.
const LINES_MAX: u32 = 30;
const WINDOW: Duration = Duration::from_secs(60);

thread_local! {
    /// How many were left out before the line that this thread writes now.
    static LEFT_OUT: Cell<u64> = const { Cell::new(0) };
}

/// Decides which lines are written.
#[derive(Default)]
pub struct Limit {
    /// Bounded by the program's length.
    places: Mutex<HashMap<Identifier, Place>>,
}

struct Place {
    begun: Instant,
    written: u32,
    left_out: u64,
}

impl Limit {
    /// `None`: this line is not written. Else how many were left out before it.
    fn take(&self, place: Identifier, now: Instant) -> Option<u64> {
        let mut places = self.places.lock();
        let place = places.entry(place).or_insert(Place { begun: now, written: 0, left_out: 0 });
        if now - place.begun >= WINDOW {
            (place.begun, place.written) = (now, 0);
        }
        if place.written == LINES_MAX {
            place.left_out += 1;
            return None;
        }
        place.written += 1;
        Some(std::mem::take(&mut place.left_out))
    }
}

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let left_out = self.take(event.metadata().callsite(), Instant::now());
        match left_out {
            Some(left_out) => LEFT_OUT.set(left_out),
            None => metrics().log_lines.left_out.inc(),
        }
        left_out.is_some()
    }
}

/// A format that says at the end of a line how many were left out before it.
pub struct Telling<F> {
    pub inner: F,
    pub format: LogFormat,
}

impl<S, N, F> FormatEvent<S, N> for Telling<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let left_out = LEFT_OUT.take();
        if left_out == 0 {
            return self.inner.format_event(context, out, event);
        }
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        let line = line.trim_end();
        match (self.format, line.strip_suffix('}')) {
            (LogFormat::Json, Some(object)) => writeln!(out, "{object},\"left_out\":{left_out}}}"),
            _ => writeln!(out, "{line} left_out={left_out}"),
        }
    }
}
