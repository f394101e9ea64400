//! Standard error of a server, which waits for nobody who reads it; and other places that lines go to in the same way.
//!
//! A thread writes; lines wait for it in a queue that is bounded by number and bytes. What does not fit is lost, and whoever started this is
//! told, to count it. So a pipe that nobody reads costs lines, and nothing else.
//! Absent: what a line says (`telemetry`).

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use super::threads;

/// Lines that wait, and their bytes: some seconds of a flood.
const LINES_MAX: usize = 4096;
const BYTES_MAX: usize = 2 << 20;

enum Entry {
    Line(Vec<u8>),
    /// Whoever has sent this is told when all before it is written.
    Flush(SyncSender<()>),
}

/// Where lines are handed in. Cloning shares it.
#[derive(Clone)]
pub struct Lines {
    queue: SyncSender<Entry>,
    waiting_bytes: Arc<AtomicUsize>,
    lost: fn(),
}

impl Lines {
    /// Writes to standard error; `lost` is called for each line that is lost.
    pub fn start(lost: fn()) -> io::Result<Self> {
        Self::start_to("stderr", io::stderr(), lost)
    }

    /// The same to another place; `name` is the thread's. A line that cannot be written is lost, too.
    pub fn start_to(name: &'static str, out: impl Write + Send + 'static, lost: fn()) -> io::Result<Self> {
        let (queue, entries) = sync_channel(LINES_MAX);
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let waiting = waiting_bytes.clone();
        threads::start(name, move || write(out, &entries, &waiting, lost))?;
        Ok(Self { queue, waiting_bytes, lost })
    }

    /// Hands a line in, or loses it.
    pub fn line(&self, line: &[u8]) {
        let waiting = self.waiting_bytes.fetch_add(line.len(), Ordering::Relaxed);
        let is_taken = waiting + line.len() <= BYTES_MAX && self.queue.try_send(Entry::Line(line.to_vec())).is_ok();
        if !is_taken {
            self.waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            (self.lost)();
        }
    }

    /// Waits until what was handed in before is written, at most for `patience`. Blocks: for the end of a process.
    pub fn flush(&self, patience: Duration) {
        let (written, told) = sync_channel(1);
        // A queue that is full now will not be empty soon.
        if self.queue.try_send(Entry::Flush(written)).is_ok() {
            let _ = told.recv_timeout(patience);
        }
    }
}

fn write(mut out: impl Write, entries: &Receiver<Entry>, waiting: &AtomicUsize, lost: fn()) {
    for entry in entries {
        match entry {
            Entry::Line(line) => {
                // There is nobody to tell.
                if out.write_all(&line).and_then(|()| out.flush()).is_err() {
                    lost();
                }
                waiting.fetch_sub(line.len(), Ordering::Relaxed);
            }
            Entry::Flush(written) => drop(written.try_send(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    static LOST: AtomicUsize = AtomicUsize::new(0);

    /// Takes bytes while nobody holds the lock.
    struct Reader(Arc<Mutex<Vec<u8>>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_nobody_reads_are_lost_and_counted_and_the_others_come_in_order() {
        let read = Arc::new(Mutex::new(Vec::new()));
        let lost = || {
            LOST.fetch_add(1, Ordering::Relaxed);
        };
        let lines = Lines::start_to("reader", Reader(read.clone()), lost).unwrap();
        let stuck = read.lock();
        for n in 0..3 * LINES_MAX {
            lines.line(format!("{n}\n").as_bytes());
        }
        lines.flush(Duration::from_millis(1));
        assert!(stuck.is_empty());
        // One may be in the writer's hands.
        let lost = LOST.load(Ordering::Relaxed);
        assert!((2 * LINES_MAX - 1..=2 * LINES_MAX).contains(&lost), "{lost} were lost");
        drop(stuck);
        while lines.waiting_bytes.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        lines.line(&vec![b'x'; BYTES_MAX + 1]);
        assert_eq!(LOST.load(Ordering::Relaxed), lost + 1, "larger than all that may wait");
        lines.line(b"last\n");
        lines.flush(Duration::from_secs(60));
        let text = String::from_utf8(read.lock().clone()).unwrap();
        let numbers: Vec<usize> = text.lines().filter_map(|line| line.parse().ok()).collect();
        assert!(numbers.len() == 3 * LINES_MAX - lost && numbers.is_sorted(), "{} lines", numbers.len());
        // The writer may have taken the first when the queue was full already: one line more fits then.
        assert!(numbers.iter().copied().take(LINES_MAX).eq(0..LINES_MAX), "the first wait, the last are lost");
        assert!(text.ends_with("\nlast\n"));
    }
}
