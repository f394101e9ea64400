//! SIGKILL of a random part of three members, under load, again and again.
//!
//! Beside the crowd there are writers whose every key is written once: after each cycle each member must have all that was
//! acknowledged since the last, at its revision, and in the end all of it.
//! Absent: every other fault (`faults`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorate::testing::history::{Action, Outcome, Recorder, Request, Span};
use quorate::testing::users::Clients;
use quorate::testing::verdict::Violation;
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use crate::crowd::Crowd;
use crate::support::cluster::{Cluster, wait_for};

const SIZE: u64 = 3;
const CLIENTS: u64 = 4;
const WRITERS: u64 = 3;
const WRITER_PAUSE: Duration = Duration::from_millis(15);
/// Acknowledged writes between one cycle and the next.
const PROGRESS: usize = 40;

/// A write that was acknowledged: key, value, revision.
type Written = (String, String, i64);

#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<Vec<Written>>>);

impl Ledger {
    fn since(&self, from: usize) -> Vec<Written> {
        self.0.lock()[from..].to_vec()
    }

    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

struct Writer {
    name: u64,
    clients: Clients,
    recorder: Recorder,
    cycle: Arc<AtomicU64>,
    ledger: Ledger,
}

impl Writer {
    async fn run(self, stop: CancellationToken) {
        for n in 0.. {
            if stop.is_cancelled() {
                return;
            }
            // Behind every key of the crowd, and in the order of cycles.
            let key = format!("~{:06}/{}/{n}", self.cycle.load(Ordering::Relaxed), self.name);
            let value = format!("w{}.{n}", self.name);
            let put = Request::Do(Action::Put { key: key.clone(), value: value.clone() });
            let member = (self.name + n) % SIZE;
            let done = self.clients.recorded(&self.recorder, 200 + self.name, member as usize, put).await;
            if let Outcome::Answered(answer) = done {
                self.ledger.0.lock().push((key, value, answer.revision));
            }
            tokio::time::sleep(WRITER_PAUSE).await;
        }
    }
}

pub async fn run(cycles: u64, seed: u64) -> Result<(), Violation> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new(SIZE);
    // So that members also catch up by snapshot.
    cluster.set("log.entries_max", "2000").set("log.entries_kept", "100");
    cluster.start_all().await;
    let endpoints: Vec<String> = (0..SIZE).map(|slot| cluster.endpoint(slot)).collect();
    let mut crowd = Crowd::new(SIZE as usize, move |member| endpoints.get(member).cloned());
    crowd.start(&mut rng, CLIENTS);
    let (cycle, ledger) = (Arc::new(AtomicU64::new(0)), Ledger::default());
    for name in 0..WRITERS {
        let (clients, recorder) = (crowd.clients.clone(), crowd.recorder.clone());
        let writer = Writer { name, clients, recorder, cycle: cycle.clone(), ledger: ledger.clone() };
        let stop = crowd.stopping();
        crowd.spawn(writer.run(stop));
    }
    let begun = Instant::now();
    let (mut kills, mut checked) = ([0_u64; SIZE as usize], 0);
    for n in 0..cycles {
        cycle.store(n, Ordering::Relaxed);
        wait_progress(&ledger, checked).await;
        let victims = any_of(&mut rng);
        kills[victims.len() - 1] += 1;
        victims.iter().for_each(|slot| cluster.signal(*slot, Signal::KILL));
        for slot in &victims {
            cluster.kill(*slot);
        }
        for slot in victims {
            tokio::time::sleep(Duration::from_millis(rng.u64(..200))).await;
            cluster.start_pod(slot);
        }
        checked = check(&crowd, &ledger, checked, &format!("after cycle {n}")).await?;
        if n % 20 == 19 {
            println!("cycle {}: {checked} acknowledged writes, lost 0, {:.0?}", n + 1, begun.elapsed());
        }
    }
    crowd.stop().await;
    cluster.wait_formed().await;
    let written = check(&crowd, &ledger, 0, "at the end").await?;
    println!(
        "cycles: {cycles} (one killed {}, two {}, all {}), members killed: {}, {:.0?}",
        kills[0],
        kills[1],
        kills[2],
        kills[0] + 2 * kills[1] + 3 * kills[2],
        begun.elapsed()
    );
    println!("writes of one key each: {written} acknowledged, lost 0, read from each member");
    crowd.judge(&format!("kills, seed {seed}")).await
}

/// A part of the members that is not empty, in any order.
fn any_of(rng: &mut fastrand::Rng) -> Vec<u64> {
    let mut slots: Vec<u64> = (0..SIZE).collect();
    rng.shuffle(&mut slots);
    slots.truncate(rng.usize(1..=slots.len()));
    slots
}

async fn wait_progress(ledger: &Ledger, from: usize) {
    wait_for("writes to be acknowledged", async || {
        let more = ledger.len() - from;
        if more >= PROGRESS { Ok(()) } else { Err(more) }
    })
    .await;
}

/// Every write that was acknowledged from number `from` on is there, through each member and in it. Returns how many there are.
async fn check(crowd: &Crowd, ledger: &Ledger, from: usize, when: &str) -> Result<usize, Violation> {
    let written = ledger.since(from);
    let Some(first) = written.iter().map(|(key, ..)| key).min() else { return Ok(from) };
    for member in 0..SIZE as usize {
        let span = Span::range(first, "\x7f");
        let reads = crowd.read_twice(member, span).await;
        for (kvs, how) in reads.iter().zip(["linearizably through", "from"]) {
            let found = |(key, value, revision): &&Written| {
                let at = kvs.binary_search_by(|kv| kv.key.cmp(key));
                !at.is_ok_and(|at| kvs[at].value == *value && kvs[at].mod_revision == *revision)
            };
            let lost: Vec<&Written> = written.iter().filter(found).collect();
            if let Some(one) = lost.first() {
                let what = format!("{when}, read {how} member {member}: {} are lost, such as {one:?}", lost.len());
                return Err(Violation::new("durable", what));
            }
        }
    }
    Ok(from + written.len())
}
