//! What happened in a simulation, as a hash: two runs of one seed must come to the same.
//!
//! One trace a thread, since a simulation has one. Events are what the simulated world sees (pieces that the network delivers,
//! calls to disks, operations of clients) and every line that the server logs. Absent: sizes of network pieces, because HTTP heads
//! carry the date of the machine.

use std::cell::RefCell;
use std::fmt::Write as _;

thread_local! {
    static TRACE: RefCell<Trace> = const { RefCell::new(Trace { hash: FNV_BASIS, events: 0, kept: None }) };
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x100_0000_01b3;

struct Trace {
    hash: u64,
    events: u64,
    kept: Option<String>,
}

/// The hash of a trace and how many events it covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub hash: u64,
    pub events: u64,
}

/// Begins a new trace; with `keep`, its text is kept too.
pub fn begin(keep: bool) {
    TRACE.with_borrow_mut(|trace| *trace = Trace { hash: FNV_BASIS, events: 0, kept: keep.then(String::new) });
}

/// Adds an event.
pub fn event(what: std::fmt::Arguments<'_>) {
    struct Hasher<'a>(&'a mut Trace);
    impl std::fmt::Write for Hasher<'_> {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            for byte in text.bytes() {
                self.0.hash = (self.0.hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
            }
            if let Some(kept) = &mut self.0.kept {
                kept.push_str(text);
            }
            Ok(())
        }
    }
    // A thread that ends may log after its trace is gone.
    let _ = TRACE.try_with(|trace| {
        let Ok(mut trace) = trace.try_borrow_mut() else { return };
        trace.events += 1;
        let _ = Hasher(&mut trace).write_fmt(what);
        let _ = Hasher(&mut trace).write_str("\n");
    });
}

/// The trace so far.
pub fn summary() -> Summary {
    TRACE.with_borrow(|trace| Summary { hash: trace.hash, events: trace.events })
}

/// The text that was kept.
pub fn text() -> String {
    TRACE.with_borrow(|trace| trace.kept.clone().unwrap_or_default())
}
